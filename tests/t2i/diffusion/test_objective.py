"""The loss of a batch: gates, means over the global batch, and what the frozen networks are asked to see."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from t2i.diffusion.flow import flow_matching_loss, interpolate
from t2i.diffusion.objective import BANDS, LossTerms, LossWeights, Objective, add_bands, band_names

PAPER = LossWeights(lpips=0.1, pdino=0.01, repa=0.5, perceptual_t_min=0.3, t_eps=0.05)
GRID, WIDTH = (2, 3), 5
TIMES = np.array([0.05, 0.31, 0.1, 0.9, 0.299, 0.2, 0.3, 0.97])
UNGATED = [1, 3, 6, 7]
NOISE = torch.randn(len(TIMES), 3, 4 * GRID[0], 4 * GRID[1], generator=torch.Generator().manual_seed(5))


class StandIn(nn.Module):
    """A random convolution that plays both frozen networks and notes the images it is given."""

    width, depth = WIDTH, 3

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, WIDTH, 4, stride=4).requires_grad_(False)
        self.compared: list[tuple[Tensor, Tensor]] = []
        self.described: list[Tensor] = []
        self.layers: list[list[int]] = []

    def distance(self, predicted: Tensor, image: Tensor) -> Tensor:
        self.compared.append((predicted, image))
        return (self.conv(predicted) - self.conv(image)).square().flatten(1).mean(1)

    def tokens(self, image: Tensor, grid: tuple[int, int], layers: Sequence[int]) -> list[Tensor]:
        self.described.append(image)
        self.layers.append(list(layers))
        whole = [self.layer(image, number) for number in layers]
        if grid == GRID:
            return whole
        maps = (F.adaptive_avg_pool2d(tokens.transpose(1, 2).unflatten(-1, GRID), grid) for tokens in whole)
        return [item.flatten(2).transpose(1, 2) for item in maps]

    def layer(self, image: Tensor, number: int = depth) -> Tensor:
        return (number * self.conv(image)).sin().flatten(2).transpose(1, 2)


def batch(size: int = len(TIMES)) -> tuple[Tensor, Tensor, Tensor]:
    """Predicted images, projected features (both leaves), clean images."""
    torch.manual_seed(1)
    shape = (size, 3, 4 * GRID[0], 4 * GRID[1])
    predicted, projected = torch.randn(shape), torch.randn(size, GRID[0] * GRID[1], WIDTH)
    return predicted.requires_grad_(), projected.requires_grad_(), torch.randn(shape)


def weights(**changes: Any) -> LossWeights:
    return LossWeights(**{**vars(PAPER), **changes})


def whole(
    weights_: LossWeights, t: np.ndarray = TIMES, **balance: Any
) -> tuple[Tensor, LossTerms, Tensor, Tensor, StandIn]:
    """The loss of the whole batch in one piece; its gradients are on the leaves."""
    net, (predicted, projected, image) = StandIn(), batch(len(t))
    sizes = {"batch_size": len(t), "ungated": int((t >= 0.3).sum()), "micro_batches": 1}
    loss, terms = Objective(weights_, net, net)(
        predicted, projected, image, NOISE[: len(t)], t, grid=GRID, **sizes, **balance
    )
    loss.backward()
    return loss, terms, predicted.grad, projected.grad, net


def means(terms: LossTerms) -> dict[str, float]:
    return {name: (total / terms.counts[name]).item() for name, total in terms.sums.items()}


def cosine(a: Tensor, b: Tensor) -> Tensor:
    return 1 - (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))


def test_loss_is_the_weighted_sum_of_its_terms_over_the_right_samples() -> None:
    loss, terms, *_ = whole(PAPER)
    net, (predicted, projected, image) = StandIn(), batch()
    clean = net.layer(image)
    expected = {
        "loss_fm": flow_matching_loss(predicted, image, NOISE, torch.from_numpy(TIMES), "image", 0.05).mean(),
        "loss_lpips": net.distance(predicted[UNGATED], image[UNGATED]).mean(),
        "loss_pdino": cosine(net.layer(predicted[UNGATED]), clean[UNGATED]).mean(),
        "loss_repa": cosine(projected, clean).mean(),
    }
    found = means(terms)
    for name, value in expected.items():
        assert found[name] == pytest.approx(value.item(), rel=1e-5), name
    total = sum(w * expected[name] for w, name in zip((1, 0.1, 0.01, 0.5), expected, strict=True))
    assert loss.item() == pytest.approx(total.item(), rel=1e-6)
    assert found["loss"] == pytest.approx(total.item(), rel=1e-6)


@pytest.mark.parametrize("term", ["lpips", "pdino"])
def test_a_gated_samples_perceptual_gradient_is_exactly_zero(term: str) -> None:
    off = {"lpips": 0.0, "pdino": 0.0, "repa": 0.0}
    _, _, with_term, _, _ = whole(weights(**{**off, term: 1.0}))
    _, _, without, _, _ = whole(weights(**off))
    for n in range(len(TIMES)):
        if n in UNGATED:
            assert (with_term[n] - without[n]).abs().max() > 1e-5
        else:
            assert torch.equal(with_term[n], without[n])


def test_alignment_applies_at_every_t_and_never_to_the_image() -> None:
    _, _, image_gradient, features_gradient, _ = whole(PAPER)
    _, _, without, none, _ = whole(weights(repa=0.0))
    assert (features_gradient.abs().amax(dim=(1, 2)) > 1e-4).all()
    assert none is None
    torch.testing.assert_close(image_gradient, without, atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize("cuts", [[4, 4], [2, 2, 2, 2], [1] * 8])
@pytest.mark.parametrize("weights_", [PAPER, weights(lpips=1.0, pdino=1.0, repa=0.0)])
def test_micro_batches_average_to_the_whole_batch(cuts: list[int], weights_: LossWeights) -> None:
    loss, terms, predicted_gradient, projected_gradient, _ = whole(weights_)
    predicted, projected, image = batch()
    objective, parts, losses = Objective(weights_, StandIn(), StandIn()), LossTerms(), []
    for part in np.split(np.arange(len(TIMES)), np.cumsum(cuts)[:-1]):
        index = torch.from_numpy(part)
        part_loss, part_terms = objective(
            predicted[index], projected[index], image[index], NOISE[index], TIMES[part],
            grid=GRID, batch_size=len(TIMES), ungated=len(UNGATED), micro_batches=len(cuts),
        )  # fmt: skip
        # What the engine does: gradients are averaged over the micro-batches of all ranks.
        (part_loss / len(cuts)).backward()
        losses.append(part_loss.item())
        parts.merge(part_terms)
    torch.testing.assert_close(predicted.grad, predicted_gradient, atol=1e-7, rtol=1e-5)
    if projected_gradient is not None:
        torch.testing.assert_close(projected.grad, projected_gradient, atol=1e-7, rtol=1e-5)
    assert np.mean(losses) == pytest.approx(loss.item(), rel=1e-5)
    assert means(parts) == pytest.approx(means(terms), rel=1e-5)
    assert parts.counts == terms.counts


def test_an_ungated_sample_weighs_the_same_whatever_its_micro_batch_holds() -> None:
    """The mean over a micro-batch's own un-gated samples would weigh a lone one double."""
    predicted, projected, image = batch()
    objective = Objective(weights(lpips=1.0, pdino=0.0, repa=0.0), StandIn(), None)
    alone = {}
    for part in ([0, 1], [1, 3]):
        loss, _ = objective(
            predicted[part], projected[part], image[part], NOISE[part], TIMES[part],
            grid=GRID, batch_size=8, ungated=4, micro_batches=4,
        )  # fmt: skip
        alone[tuple(part)] = torch.autograd.grad(loss, predicted)[0][1]
    torch.testing.assert_close(alone[0, 1], alone[1, 3])


def test_a_wholly_gated_batch_has_no_perceptual_terms_and_a_finite_loss() -> None:
    t = np.array([0.01, 0.1, 0.2, 0.29])
    loss, terms, gradient, _, net = whole(PAPER, t)
    assert loss.isfinite() and gradient.isfinite().all()
    assert not {"loss_lpips", "loss_pdino"} & set(terms.sums)
    assert means(terms)["loss"] == pytest.approx(means(terms)["loss_fm"] + 0.5 * means(terms)["loss_repa"])
    assert net.compared == [] and len(net.described) == 1


def test_networks_see_ungated_samples_only_and_clean_images_once() -> None:
    *_, net = whole(PAPER)
    predicted, _, image = batch()
    ((compared, compared_image),) = net.compared
    assert torch.equal(compared, predicted[UNGATED]) and torch.equal(compared_image, image[UNGATED])
    clean, generated = net.described
    assert torch.equal(clean, image) and torch.equal(generated, predicted[UNGATED])


def test_the_gate_itself_is_open() -> None:
    t = np.array([np.nextafter(0.3, 0), 0.3])
    *_, net = whole(PAPER, t)
    assert len(net.compared[0][0]) == 1


def test_weight_zero_leaves_a_network_out() -> None:
    _, terms, _, _, net = whole(weights(lpips=0.0))
    assert net.compared == [] and "loss_lpips" not in terms.sums
    _, terms, _, _, net = whole(weights(pdino=0.0))
    assert len(net.described) == 1 and "loss_pdino" not in terms.sums
    _, terms, _, _, net = whole(weights(repa=0.0))
    assert "loss_repa" not in terms.sums and "loss_pdino" in terms.sums
    objective = Objective(weights(lpips=0.0, pdino=0.0, repa=0.0), None, None)
    predicted, _, image = batch()
    loss, terms = objective(predicted, None, image, NOISE, TIMES, grid=GRID, batch_size=8, ungated=4, micro_batches=1)
    assert loss.item() == pytest.approx(means(terms)["loss_fm"])


def test_weight_zero_leaves_a_given_network_uncalled() -> None:
    *_, net = whole(weights(lpips=0.0, pdino=0.0, repa=0.0))
    assert net.described == []


def test_without_alignment_clean_features_are_of_ungated_samples_only() -> None:
    *_, net = whole(weights(repa=0.0))
    assert [len(image) for image in net.described] == [len(UNGATED)] * 2


def test_no_gradient_flows_into_targets() -> None:
    net, (predicted, projected, image) = StandIn(), batch()
    image.requires_grad_()
    loss, _ = Objective(weights(pdino=1.0, repa=1.0, lpips=0.0), None, net)(
        predicted, projected, image, NOISE, TIMES, grid=GRID, batch_size=8, ungated=4, micro_batches=1
    )
    flow = flow_matching_loss(predicted, image, NOISE, torch.from_numpy(TIMES), "image", 0.05).mean()
    # Of all terms only the flow's plain arithmetic knows the clean image.
    torch.testing.assert_close(*torch.autograd.grad(loss, image), *torch.autograd.grad(flow, image))


# P-DINO's gate and layers


def test_without_its_gate_pdino_is_the_mean_over_all_samples() -> None:
    """What the released code's mask comes to; LPIPS keeps its gate."""
    loss, terms, gradient, _, net = whole(weights(pdino_gated=False, lpips=0.2))
    helper, (predicted, _, image) = StandIn(), batch()
    distances = cosine(helper.layer(predicted), helper.layer(image))
    assert means(terms)["loss_pdino"] == pytest.approx(distances.mean().item(), rel=1e-5)
    assert terms.counts["loss_pdino"] == 8 and terms.counts["loss_lpips"] == 4
    found = means(terms)
    total = found["loss_fm"] + 0.2 * found["loss_lpips"] + 0.01 * found["loss_pdino"] + 0.5 * found["loss_repa"]
    assert loss.item() == pytest.approx(total, rel=1e-6)
    _, _, without, _, _ = whole(weights(pdino=0.0, lpips=0.2))
    (alone,) = torch.autograd.grad(0.01 * distances.mean(), predicted)
    torch.testing.assert_close(gradient - without, alone, atol=1e-7, rtol=1e-3)
    assert [len(image) for image in net.described] == [8, 8]
    *_, net = whole(weights(pdino_gated=False, repa=0.0))
    assert [len(image) for image in net.described] == [8, 8]


def test_without_its_gate_pdino_is_there_where_all_samples_are_gated() -> None:
    _, terms, _, _, net = whole(weights(pdino_gated=False), np.array([0.01, 0.1, 0.2, 0.29]))
    assert terms.counts["loss_pdino"] == 4 and net.compared == []


@pytest.mark.parametrize(("layers", "clean"), [((1,), [1, 3]), ((3,), [3]), ((2, 1), [1, 2, 3]), ((), [3])])
def test_pdino_is_the_mean_over_its_layers_alignment_has_the_last(layers: tuple[int, ...], clean: list[int]) -> None:
    _, terms, *_, net = whole(weights(pdino_layers=layers))
    helper, (predicted, projected, image) = StandIn(), batch()
    distances = [
        cosine(helper.layer(predicted[UNGATED], n), helper.layer(image[UNGATED], n)).mean() for n in layers or (3,)
    ]
    assert means(terms)["loss_pdino"] == pytest.approx(torch.stack(distances).mean().item(), rel=1e-5)
    assert means(terms)["loss_repa"] == pytest.approx(cosine(projected, helper.layer(image)).mean().item(), rel=1e-5)
    assert net.layers == [clean, list(layers or (3,))]


@pytest.mark.parametrize("pdino", [0.0, 0.01])
def test_alignment_on_a_grid_of_its_own_resizes_the_models_features(pdino: float) -> None:
    loss, terms, _, gradient, net = whole(weights(repa_grid=2, pdino=pdino, lpips=0.0))
    helper, (_, projected, image) = StandIn(), batch()
    resized = F.interpolate(projected.transpose(1, 2).unflatten(-1, GRID), (2, 2), mode="bilinear")
    target = helper.tokens(image, (2, 2), [3])[0]
    expected = cosine(resized.flatten(2).transpose(1, 2), target).mean()
    assert means(terms)["loss_repa"] == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(gradient, torch.autograd.grad(0.5 * expected, projected)[0], atol=1e-8, rtol=1e-4)
    # P-DINO keeps to the model's grid, and its clean features are of ungated samples alone.
    assert [len(item) for item in net.described] == [len(UNGATED)] * (2 if pdino else 0) + [len(TIMES)]
    assert loss.isfinite()


# A network that predicts velocities


def test_of_a_velocity_flow_matching_is_plain_and_perception_sees_the_image_that_it_means() -> None:
    net, (velocity, projected, image) = StandIn(), batch()
    loss, terms = Objective(PAPER, net, net, "velocity")(
        velocity, projected, image, NOISE, TIMES, grid=GRID, batch_size=8, ungated=4, micro_batches=1
    )
    flow = (velocity - (image - NOISE)).square().mean()
    assert means(terms)["loss_fm"] == pytest.approx(flow.item(), rel=1e-5)
    t = torch.from_numpy(TIMES)
    predicted = interpolate(image, NOISE, t) + (1 - t[:, None, None, None].float()) * velocity
    helper = StandIn()
    distance = helper.distance(predicted[UNGATED], image[UNGATED]).mean()
    assert means(terms)["loss_lpips"] == pytest.approx(distance.item(), rel=1e-5)
    assert torch.autograd.grad(loss, velocity)[0][UNGATED].abs().amax(dim=(1, 2, 3)).min() > 0


def test_an_exact_velocity_has_no_loss_at_any_t() -> None:
    _, projected, image = batch()
    objective = Objective(weights(repa=0.0), StandIn(), StandIn(), "velocity")
    loss, _ = objective(
        image - NOISE, projected, image, NOISE, TIMES, grid=GRID, batch_size=8, ungated=4, micro_batches=1
    )
    assert loss.item() == pytest.approx(0.0, abs=1e-6)


# Gradient balancing


@pytest.mark.parametrize("t", [TIMES, np.array([0.01, 0.1])])
@pytest.mark.parametrize("balance", [1.0, 0.0, 7.5])
def test_watching_changes_neither_loss_nor_gradients(balance: float, t: np.ndarray) -> None:
    plain = whole(PAPER, t, perceptual_weight=balance)
    watched = whole(PAPER, t, perceptual_weight=balance, gradient_hook=lambda *_: None)
    assert watched[0].item() == pytest.approx(plain[0].item(), rel=1e-6)
    assert means(watched[1]) == pytest.approx(means(plain[1]), rel=1e-6)
    for a, b in zip(watched[2:4], plain[2:4], strict=True):
        torch.testing.assert_close(a, b, atol=1e-8, rtol=1e-5)


def test_the_perceptual_weight_multiplies_the_perceptual_terms_alone() -> None:
    loss, terms, *_ = whole(PAPER, perceptual_weight=7.5)
    found = means(terms)
    perceptual = 0.1 * found["loss_lpips"] + 0.01 * found["loss_pdino"]
    assert loss.item() == pytest.approx(found["loss_fm"] + 7.5 * perceptual + 0.5 * found["loss_repa"], rel=1e-6)
    # In the metrics, and to the guard, a run's losses stay comparable.
    assert found["loss"] == pytest.approx(whole(PAPER)[0].item(), rel=1e-6)


def test_a_watcher_sees_the_gradients_of_flow_and_of_unweighted_perceptual_terms() -> None:
    seen: list[Tensor] = []
    whole(PAPER, perceptual_weight=7.5, gradient_hook=lambda *pulls: seen.extend(pulls))
    _, _, flow, _, _ = whole(weights(lpips=0.0, pdino=0.0))
    _, _, both, _, _ = whole(PAPER)
    torch.testing.assert_close(seen[0], flow)
    torch.testing.assert_close(seen[1], both - flow, atol=1e-7, rtol=1e-4)
    assert seen[1][UNGATED].abs().amax(dim=(1, 2, 3)).min() > 1e-6
    seen.clear()
    whole(PAPER, np.array([0.01, 0.1]), gradient_hook=lambda *pulls: seen.extend(pulls))
    assert not seen[1].any()


# Bands of t


def test_bands_split_the_flow_loss() -> None:
    _, terms, *_ = whole(PAPER)
    names = band_names("loss_fm")
    assert names == ["loss_fm_t0.0-0.2", "loss_fm_t0.2-0.4", "loss_fm_t0.4-0.6", "loss_fm_t0.6-0.8", "loss_fm_t0.8-1.0"]
    present = [name for name in names if name in terms.sums]
    assert [terms.counts[name] for name in present] == [2, 4, 2]
    assert "loss_fm_t0.4-0.6" not in terms.sums
    assert sum(terms.sums[name] for name in present).item() == pytest.approx(terms.sums["loss_fm"].item(), rel=1e-6)
    predicted, _, image = batch()
    low = flow_matching_loss(predicted, image, NOISE, torch.from_numpy(TIMES), "image", 0.05)[[0, 2]].sum()
    assert terms.sums[names[0]].item() == pytest.approx(low.item(), rel=1e-6)


def test_band_edges_belong_to_the_band_above_and_one_to_the_last() -> None:
    terms = LossTerms()
    add_bands(terms, "x", torch.arange(1.0, 7.0), np.array(BANDS))
    assert terms.counts == {name: 2 if name.endswith("1.0") else 1 for name in band_names("x")}
    assert terms.sums["x_t0.2-0.4"] == 2 and terms.sums["x_t0.8-1.0"] == 11


def test_terms_are_detached_sums() -> None:
    _, terms, *_ = whole(PAPER)
    assert not any(total.requires_grad for total in terms.sums.values())
    assert terms.counts["loss_lpips"] == terms.counts["loss_pdino"] == 4
    assert terms.counts["loss"] == terms.counts["loss_fm"] == terms.counts["loss_repa"] == 8
