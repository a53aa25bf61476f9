"""torch-fidelity's Inception with random weights, in a file of its own format."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch


def random_inception(folder: Path) -> Path:
    """Write the weights, from a fixed seed. Skips the test if torch-fidelity is missing."""
    module = pytest.importorskip(
        "torch_fidelity.feature_extractor_inceptionv3", reason="the extra 'eval' (torch-fidelity) is not installed"
    )

    class Unloaded(module.FeatureExtractorInceptionV3):
        def load_state_dict(self, state: object, strict: bool = True) -> None:
            """Nothing is there to be loaded."""

    path = folder / "inception.pth"
    torch.save({}, path)
    torch.manual_seed(0)
    net = Unloaded("", ["2048"], feature_extractor_weights_path=str(path))
    for part in net.modules():
        if isinstance(part, torch.nn.Conv2d):  # so that an image's features do not vanish
            torch.nn.init.kaiming_normal_(part.weight)
    torch.save(net.state_dict(), path)
    return path
