"""A training step without its economies: the same loss, by the way that is simpler and costs more."""

from __future__ import annotations

import torch
from torch import Tensor

from data.loader import Batch
from data.randomness import uniform
from t2i.diffusion.objective import Objective, _MicroBatch, _Subset
from t2i.diffusion.perceptual import cosine_distance
from t2i.models import text
from t2i.train.step import TrainingStep


class SpendthriftObjective(Objective):
    """The loss of another objective.

    Args:
        objective: whose weights and networks these are.
        all_samples: gated samples go through the perceptual networks too, and their distances are left out after.
        features_twice: the clean images' features are computed for P-DINO again.
    """

    def __init__(self, objective: Objective, *, all_samples: bool = False, features_twice: bool = False) -> None:
        super().__init__(objective.weights, objective.image_distance, objective.patch_features, objective.prediction)
        self._all_samples, self._features_twice = all_samples, features_twice

    def _seen(self, part: _MicroBatch, counted: _Subset) -> _Subset:
        """The samples that are computed."""
        return part.everyone if self._all_samples else counted

    def _sum(self, distances: Tensor, counted: _Subset) -> Tensor:
        return (counted.of(distances) if self._all_samples else distances).sum()

    def _lpips(self, part: _MicroBatch, predicted: Tensor, image: Tensor) -> Tensor:
        counted, seen = part.ungated, self._seen(part, part.ungated)
        if seen.count == 0:
            return predicted.new_zeros(())
        assert self.image_distance is not None
        distance = self._sum(self.image_distance.distance(seen.of(predicted), seen.of(image)), counted)
        part.terms.add("loss_lpips", distance, counted.count)
        return self.weights.lpips * distance * part.per_ungated

    def _pdino(self, part: _MicroBatch, predicted: Tensor, clean: dict[int, Tensor], grid: tuple[int, int]) -> Tensor:
        counted, seen = part.pdino, self._seen(part, part.pdino)
        if seen.count == 0:
            return predicted.new_zeros(())
        assert self.patch_features is not None
        tokens = self.patch_features.tokens(seen.of(predicted), grid, self._layers)
        if self._features_twice:
            with torch.no_grad():
                found = self.patch_features.tokens(seen.of(self._image), grid, self._layers)
        else:
            found = [seen.of(clean[layer]) for layer in self._layers]
        by_layer = [cosine_distance(a, b) for a, b in zip(tokens, found, strict=True)]
        distance = self._sum(torch.stack(by_layer).mean(0), counted)
        part.terms.add("loss_pdino", distance, counted.count)
        return self.weights.pdino * distance * (part.per_ungated if self.weights.pdino_gated else part.per_sample)

    def _clean_features(self, part: _MicroBatch, image: Tensor, grid: tuple[int, int]) -> dict[int, Tensor]:
        self._image = image
        return super()._clean_features(part, image, grid)


class CaptionsByMicroBatch(TrainingStep):
    """Captions are encoded micro-batch by micro-batch, those too that caption dropout takes; no batch is filled up."""

    def _conditions(self, batch: Batch) -> list[Tensor]:
        config, micro = self._config, self._config.train.micro_batch_size
        dropped = uniform(self._keys["caption"], batch.slots) < config.objective.caption_dropout
        found: list[Tensor] = []
        usual, text.ENCODE_BATCH = text.ENCODE_BATCH, min(micro, text.ENCODE_BATCH)
        for start in range(0, len(batch.captions), micro):
            found += self._conditioner(batch.captions[start : start + micro])
        text.ENCODE_BATCH = usual
        return [self._null_caption if gone else states for gone, states in zip(dropped, found, strict=True)]
