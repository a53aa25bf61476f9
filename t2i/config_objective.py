"""The part of the config that says what is minimised, and at which noise."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from t2i.config_base import ExpandedPath, PathText, Section

STAND_IN = "efficientnet-lite0"


class ObjectiveConfig(Section):
    """The loss (PixelGen eq. 6) and the distribution of t and of the noise. The defaults are what the paper adopts."""

    time_mean: float = -0.8
    """Mean of logit(t)."""
    time_std: float = Field(0.8, gt=0)
    """Standard deviation of logit(t)."""
    timeshift: float = Field(1.0, gt=0)
    """t becomes t / (t + (1 - t) timeshift); above 1 trains at more noise. PixelGen has 1 in all stages."""
    noise_scale: float = Field(1.0, gt=0)
    """Standard deviation of the noise at t = 0, in training and sampling. PixelGen has 1 at 256 and 512 px; JiT
    doubles it with the resolution, to 2 at 512 px."""
    min_noise: float = Field(0.05, gt=0, lt=1)
    """Lower bound of 1 - t where it divides (JiT, Li and He 2025), in training and sampling."""
    gate: float = Field(0.3, ge=0, le=1)
    """Perceptual terms apply to samples with t at or above it (PixelGen Table 6d)."""
    lpips_weight: float = Field(0.1, ge=0)
    """Weight of LPIPS (Table 6a)."""
    lpips_network: Literal["vgg16", "efficientnet-lite0"] = "vgg16"
    """Network of LPIPS; efficientnet-lite0 is a labelled stand-in."""
    lpips_path: ExpandedPath | None = None
    """File with torchvision's VGG16 weights; none takes them from torchvision's cache or site."""
    pdino_weight: float = Field(0.01, ge=0)
    """Weight of P-DINO (Table 6b)."""
    pdino_gate: Literal["masked", "none"] = "masked"
    """masked: P-DINO heeds the gate, as the paper says. none: it applies at every t, as in the released code, whose
    mask comes to the mean over all samples; LPIPS heeds the gate there too."""
    pdino_layers: list[Annotated[int, Field(gt=0)]] = Field([])
    """Layers of DINOv2 (from 1) that P-DINO compares, the mean over them (Table 6c: 6, 9, 12 or all three, of 12); an
    empty list: the last, which the paper adopts. REPA has the last always."""
    repa_weight: float = Field(0.5, ge=0)
    """Weight of representation alignment, at every t: 0.5 as in the released code; eq. 6 shows none, so 1. PixelDiT has
    0.5, and none after its first stage from text."""
    repa_side: int | None = Field(None, gt=0)
    """Side of the grid of patches on which alignment compares: the image is resized to as many of the feature network's
    patches, and the model's features, bilinearly, to the same grid. PixelDiT from text has 16. None: the model's own
    grid."""
    features_network: Literal["dinov2", "efficientnet-lite0"] = "dinov2"
    """Network of P-DINO and REPA; efficientnet-lite0 is a labelled stand-in."""
    features_path: PathText = "facebook/dinov2-base"
    """Hugging Face name or folder of DINOv2."""
    balance_from_step: int | None = Field(None, ge=0)
    """Step of the stage from which the perceptual terms are balanced with flow matching: they are multiplied by a
    smoothed ratio of the two gradients' norms at the head's weight. None: never. The paper does it for class to image
    alone, after 80 of 160 epochs."""
    balance_every: int = Field(50, gt=0)
    """Steps between measurements of that ratio."""
    balance_smoothing: float = Field(0.8, ge=0, lt=1)
    """Share of the old multiplier that a measurement keeps; it starts at 1 in every stage."""
    balance_max: float = Field(100.0, gt=0)
    """Largest ratio that is taken for true."""
    caption_dropout: float = Field(0.1, ge=0, le=1)
    """Probability that a sample trains on the null caption."""

    @model_validator(mode="after")
    def _goes_together(self) -> ObjectiveConfig:
        if len(set(self.pdino_layers)) < len(self.pdino_layers):
            raise ValueError(f"pdino_layers {self.pdino_layers} must name each layer once")
        if self.pdino_layers and self.features_network == STAND_IN:
            raise ValueError(f"pdino_layers {self.pdino_layers} must be empty under {STAND_IN}, which has one layer")
        if self.balance_from_step is not None and self.lpips_weight == self.pdino_weight == 0:
            raise ValueError("balance_from_step needs a perceptual term: lpips_weight or pdino_weight above 0")
        if self.repa_side is not None and self.repa_weight == 0:
            raise ValueError(f"repa_side {self.repa_side} does nothing at repa_weight 0: leave it at null")
        return self
