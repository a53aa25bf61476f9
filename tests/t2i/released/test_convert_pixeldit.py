"""Released PixelDiT weights in our networks: every key and shape of the public ones, the same numbers, the way back."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from released_cases import compare, part
from released_pixeldit import DiTSizes, dit_shapes, dit_weights, ends_unused, projector_shapes
from released_pixeldit_cases import T2I, TINY, TINY_CLASS, TINY_TEXT, XL, B, Given, L, dit_config, dit_stored
from released_pixeldit_cases import dit_velocity as reference
from torch import Tensor

from t2i.build import build_denoiser, build_projector
from t2i.config.base import ConfigError
from t2i.released.checkpoint import Checkpoint
from t2i.released.convert import Imported, export_weights, import_weights
from t2i.released.names import check_kind, denoiser_table, released_shares, released_sizes, unused_weights


@pytest.mark.parametrize(
    ("s", "parameters"),
    [
        (B, 184_749_155),
        (L, 569_648_963),
        (XL, 797_383_203),
        (replace(XL, post=True), 759_601_699),
        (T2I, 1_302_470_787),
        (replace(T2I, post=True), 1_277_288_579),
    ],
    ids=["B", "L", "XL", "XL post", "T2I", "T2I post"],
)
def test_every_key_and_shape_of_the_public_networks_has_its_place(s: DiTSizes, parameters: int) -> None:
    shapes = dit_shapes(s)
    assert sum(torch.Size(shape).numel() for shape in shapes.values()) == parameters
    model = dit_config(s).model
    with torch.device("meta"):
        ours = build_denoiser(model, s.text_width, s.text_length).state_dict()
        projector = build_projector(model, 768)
    found: dict[str, tuple[int, ...]] = {}
    for name, tensor in ours.items():
        shares = released_shares(denoiser_table(model), name)
        for share, size in zip(shares, released_sizes(name, tensor.shape, shares, model), strict=True):
            assert share.name not in found
            found[share.name] = tuple(size)
    assert found.keys() & unused_weights(model).keys() == set()
    assert found | unused_weights(model) == shapes
    assert sum(p.numel() for p in projector.parameters()) == sum(
        torch.Size(shape).numel() for shape in projector_shapes(s).values()
    )


def imported(s: DiTSizes, folder: Path, average: bool = True) -> tuple[dict[str, Tensor], dict[str, Tensor], Imported]:
    """Released weights, their average, and what the importer makes of them."""
    weights, own = dit_weights(s)
    checkpoint = dit_stored(folder / "x.ckpt", weights, own if average else {})
    return weights, own, import_weights(checkpoint, dit_config(s), s.text_width)


@pytest.mark.parametrize("which", ["raw", "ema"])
@pytest.mark.parametrize("s", TINY.values(), ids=TINY)
def test_output_features_and_gradients_are_the_references(s: DiTSizes, which: str, tmp_path: Path) -> None:
    run, (weights, average, result) = dit_config(s), imported(s, tmp_path)
    if s.classes:
        theirs = part(weights, "denoiser." if which == "raw" else "ema_denoiser.")
        theirs_projector = part(weights, "diffusion_trainer.proj.0.")
    else:
        theirs, theirs_projector = (
            part(weights if which == "raw" else average, prefix) for prefix in ("core.", "_repa_projector.")
        )
    theirs, theirs_projector = (
        {n: v.clone().requires_grad_() for n, v in w.items()} for w in (theirs, theirs_projector)
    )
    tensors = result.raw if which == "raw" else result.ema
    network, projector = build_denoiser(run.model, s.text_width, s.text_length), build_projector(run.model, s.features)
    network.load_state_dict(part(tensors, "denoiser."))
    projector.load_state_dict(part(tensors, "projector."))

    given = Given.of(s)
    cotangents = torch.randn_like(given.x), torch.randn(2, 15, 11)
    ours_in, theirs_in = ([value.clone().requires_grad_() for value in (given.x, given.t)] for _ in range(2))
    prediction = network(*ours_in, given.condition)
    output, features = reference(theirs, s, *theirs_in, given.condition)
    projected = features
    for n in (0, 2, 4):
        activated = torch.nn.functional.silu(projected) if n else projected
        projected = activated @ theirs_projector[f"{n}.weight"].T + theirs_projector[f"{n}.bias"]
    ours_out = prediction.output, projector(prediction.features)
    assert output.std() > 0.3 and features.std() > 0.3
    compare((*ours_out, prediction.features), (output, projected, features))

    parameters = {f"denoiser.{name}": value for name, value in network.named_parameters()}
    parameters |= {f"projector.{name}": value for name, value in projector.named_parameters()}
    ours_loss, theirs_loss = (
        sum((o * c).mean() for o, c in zip(out, cotangents, strict=True)) for out in (ours_out, (output, projected))
    )
    ours = torch.autograd.grad(ours_loss, [*ours_in, *parameters.values()])
    found = torch.autograd.grad(
        theirs_loss, [*theirs_in, *theirs.values(), *theirs_projector.values()], allow_unused=True
    )
    compare(ours[:2], found[:2])
    # What gradients are called in a checkpoint is as with weights; where we have nothing, zeros are written.
    by_name = dict(zip(parameters, ours[2:], strict=True))
    released = export_weights(run, by_name, by_name).content["state_dict"]
    prefixes = ("denoiser.", "diffusion_trainer.proj.0.") if s.classes else ("core.", "_repa_projector.")
    names = [f"{prefix}{name}" for prefix, w in zip(prefixes, (theirs, theirs_projector), strict=True) for name in w]
    for name, gradient in zip(names, found[2:], strict=True):
        if name.removeprefix("core.") in ends_unused(s):
            assert not released[name].any() and (gradient is None or not gradient.any())
        else:
            assert gradient is not None
            assert gradient.abs().max() > 1e-6
            compare([released[name]], [gradient])


@pytest.mark.parametrize("average", [True, False])
@pytest.mark.parametrize("s", TINY.values(), ids=TINY)
def test_the_way_back_gives_every_key_and_byte(s: DiTSizes, average: bool, tmp_path: Path) -> None:
    weights, own, result = imported(s, tmp_path, average)
    exported = export_weights(dit_config(s), result.raw, result.ema)
    expected = [("state_dict", weights)] + [("state_dict_ema", own)] * (average and not s.classes)
    assert [key for key in exported.content if key.startswith("state_dict")] == [key for key, _ in expected]
    for key, tensors in expected:
        written = exported.content[key]
        assert written.keys() == tensors.keys()
        for name, value in tensors.items():
            assert torch.equal(written[name], value), name
    assert exported.notes == []
    torch.save(exported.content, tmp_path / "y.ckpt")
    again = import_weights(Checkpoint(tmp_path / "y.ckpt"), dit_config(s), s.text_width)
    for one, other in ((again.raw, result.raw), (again.ema, result.ema)):
        assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_what_no_network_reads_is_zero_once_it_is_gone(tmp_path: Path) -> None:
    """As after training: of the last block's text the keys and values are left, and what modulates them."""
    s = TINY_TEXT
    weights, _, result = imported(s, tmp_path, average=False)
    trained = {name: value for name, value in result.raw.items() if not name.startswith("unused.")}
    assert len(result.raw) - len(trained) == len(ends_unused(s)) + 3
    exported = export_weights(dit_config(s), trained, trained)
    last = f"core.patch_blocks.{s.blocks - 1}."
    for name, value in exported.content["state_dict"].items():
        expected = weights[name].clone()
        if name.removeprefix("core.") in ends_unused(s):
            expected[:] = 0
        elif name == f"{last}attn.qkv_y.weight":
            expected[: s.hidden] = 0
        elif name.startswith(f"{last}adaLN_modulation_txt.0."):
            expected[2 * s.hidden :] = 0
        assert torch.equal(value, expected), name
    assert [note.partition(":")[0] for note in exported.notes] == ["the last block's text"]


def test_every_key_is_accounted_for(tmp_path: Path) -> None:
    weights, average, result = imported(TINY_TEXT, tmp_path)
    report, end = result.report, {f"core.{name}" for name in ends_unused(TINY_TEXT)}
    everything = weights.keys() | {f"state_dict_ema.{name}" for name in average}
    unused = end | {f"state_dict_ema.{name}" for name in end}
    assert report.used.keys() == everything - unused and report.recomputed == {}
    places = {name if name.startswith("state_dict_ema.") else f"state_dict.{name}" for name in unused}
    rows = {name: text for name, text in report.left.items() if name.endswith(", the other rows")}
    assert report.left.keys() == places | rows.keys() | {"optimizer", "scheduler", "epoch", "rng_state"}
    at = "core.patch_blocks.2"
    assert (
        rows[f"state_dict.{at}.attn.qkv_y.weight, the other rows"]
        == "used are 48 to 143 of 144; kept to be exported again"
    )
    assert (
        rows[f"state_dict_ema.{at}.adaLN_modulation_txt.0.bias, the other rows"]
        == "used are 0 to 95 of 288; kept to be exported again"
    )
    assert len(rows) == 6
    assert report.used[f"{at}.mlp_x.w1.weight"] == report.used[f"{at}.mlp_x.w3.weight"]
    assert [note.partition(":")[0] for note in report.notes] == ["the last block's text"]
    single = imported(TINY_TEXT, tmp_path, average=False)[2]
    assert [note.partition(":")[0] for note in single.report.notes] == ["ema", "the last block's text"]
    assert all(torch.equal(single.raw[name], single.ema[name]) for name in single.raw)
    classes = imported(TINY_CLASS, tmp_path)
    assert classes[2].report.used.keys() == classes[0].keys() and classes[2].report.notes == []


def test_without_the_part_that_nothing_reads(tmp_path: Path) -> None:
    weights, _, result = imported(TINY_TEXT, tmp_path, average=False)
    end = {f"core.{name}" for name in ends_unused(TINY_TEXT)}
    checkpoint = dit_stored(tmp_path / "y.pth", {name: weights[name] for name in weights.keys() - end}, {})
    shorter = import_weights(checkpoint, dit_config(TINY_TEXT), TINY_TEXT.text_width)
    assert len(shorter.raw) == len(result.raw) - len(end)
    assert all(torch.equal(shorter.raw[name], result.raw[name]) for name in shorter.raw)


TEXT, CLASS = (
    "x.ckpt, PixelDiT for text to image, 3 blocks of width 48,",
    "x.ckpt, PixelDiT for class to image, 3 blocks of width 48,",
)


@pytest.mark.parametrize(
    ("s", "change", "words"),
    [
        (TINY_CLASS, {"denoiser.patch_blocks.1.mlp.w3.weight": None}, rf"{CLASS} .* it lacks denoiser.*w3.weight$"),
        (TINY_CLASS, {"denoiser.pos_embed": torch.ones(1, 4, 48)}, r"it has denoiser.pos_embed$"),
        (
            TINY_CLASS,
            {"denoiser.patch_blocks.1.attn.q_norm.weight": torch.ones(12)},
            r"is \[12\], by the config \[16\]",
        ),
        (TINY_CLASS, {"diffusion_trainer.proj.0.2.bias": None}, r"it lacks diffusion_trainer.proj.0.2.bias$"),
        (TINY_TEXT, {"core.patch_blocks.2.attn.qkv_y.weight": torch.ones(96, 48)}, r"\[96, 48\], .* \[144, 48\]"),
        (TINY_TEXT, {"core.patch_blocks.2.norm_y2.weight": torch.ones(9)}, r"norm_y2.weight is \[9\], by the config"),
        (TINY_TEXT, {"core.patch_blocks.1.norm_y2.weight": None}, rf"{TEXT} .* it lacks core.patch_blocks.1.norm_y2"),
        (TINY_TEXT, {"core.patch_blocks.3.norm_y2.weight": torch.ones(48)}, r"it has core.patch_blocks.3.norm_y2"),
        (TINY_TEXT, {"core.y_pos_embedding": torch.ones(1, 8, 48)}, r"is \[1, 8, 48\], by the config \[1, 7, 48\]"),
    ],
)
def test_another_network_is_refused(s: DiTSizes, change: dict[str, Any], words: str, tmp_path: Path) -> None:
    changed = {name: value for name, value in {**dit_weights(s)[0], **change}.items() if value is not None}
    with pytest.raises(ConfigError, match=words):
        import_weights(dit_stored(tmp_path / "x.ckpt", changed, {}), dit_config(s), s.text_width)


@pytest.mark.parametrize(
    ("s", "other", "words"),
    [
        (
            TINY_CLASS,
            TINY_TEXT,
            "not a checkpoint of PixelDiT: no weight's name begins with core. or state_dict_ema.core.",
        ),
        (
            TINY_TEXT,
            TINY_CLASS,
            "not a checkpoint of PixelDiT: no weight's name begins with denoiser. or ema_denoiser.",
        ),
        (
            TINY_CLASS,
            replace(TINY_CLASS, post=True),
            r"adaLN_modulation.0.weight is \[768, 48\], by the config \[512, 48\]",
        ),
    ],
)
def test_the_config_of_another_network(s: DiTSizes, other: DiTSizes, words: str, tmp_path: Path) -> None:
    checkpoint = dit_stored(tmp_path / "x.ckpt", dit_weights(s)[0], {})
    with pytest.raises(ConfigError, match=words):
        import_weights(checkpoint, dit_config(other), other.text_width)


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ({"prediction": "image"}, "model.prediction image: it should be velocity for the released layout of PixelDiT"),
        ({"pixel": {"attention": False}}, "model.pixel.attention False: it should be True"),
        ({"pixel": {"tokens_per_patch": 4}}, "model.pixel.tokens_per_patch 4: it should be 1"),
        ({"pixel": {"modulation": "patch"}}, "model.pixel.modulation patch: it should be pixel"),
    ],
)
def test_what_was_never_released_is_neither_read_nor_written(model: Any, words: str, tmp_path: Path) -> None:
    run, (weights, _, result) = dit_config(TINY_CLASS, **model), imported(TINY_CLASS, tmp_path)
    with pytest.raises(ConfigError, match=words):
        import_weights(dit_stored(tmp_path / "y.ckpt", weights, {}), run, 0)
    with pytest.raises(ConfigError, match=words):
        export_weights(run, result.raw, result.ema)


def test_what_a_network_predicts_is_told_before_its_weights_are_read(tmp_path: Path) -> None:
    checkpoint = dit_stored(tmp_path / "x.ckpt", dit_weights(TINY_CLASS)[0], {})
    with pytest.raises(ConfigError, match="width 48: the config's model.prediction should be velocity, not image"):
        check_kind(checkpoint, dit_config(TINY_CLASS, prediction="image").model)
    with pytest.raises(ConfigError, match="model.condition should be class, not text$"):
        check_kind(checkpoint, dit_config(TINY_TEXT).model)
    with pytest.raises(ConfigError, match="model.pixel.modulation patch: it should be pixel"):
        check_kind(checkpoint, dit_config(TINY_CLASS, pixel={"modulation": "patch"}).model)
    check_kind(checkpoint, dit_config(TINY_CLASS).model)
