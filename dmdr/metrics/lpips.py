"""Diversity as in DMDR's Table 6: the mean LPIPS over the pairs of one prompt's images, by the lpips package.

1. The backbone is VGG-16, and images are first resized to 512 pixels a side, as in DMD2's evaluation, which the table
   follows. The table does not say how many images a prompt has; here it is `evaluate.seeds`.
2. The backbone sees each image once, not once a pair: the package's own layers run one by one, as in its forward.
3. The backbone's weights are read from torchvision's checkpoint (vgg16-397923af.pth); nothing is fetched while loading.

P prompts, S images of each.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import lpips
import numpy as np
import torch

from dmdr.errors import DataError
from dmdr.rewards.checkpoint import read_tensors
from dmdr.rewards.preprocess import resize

FIGURE = "diversity/lpips-vgg16"
SIDE = 512  # pixels


class LPIPS:
    """LPIPS with VGG-16. file: torchvision's checkpoint; side: of the resized images, in pixels.

    Raises:
        DataError: the file is damaged, or holds another network.
    """

    def __init__(self, file: Path, device: str, side: int = SIDE) -> None:
        self.side = side
        self.distance = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False)
        self.distance.net.load_state_dict(read_backbone(file, self.distance.net))
        self.distance.to(device).requires_grad_(False).eval()

    @torch.no_grad()
    def __call__(self, images_PS: torch.Tensor) -> np.ndarray:
        """(P, S, 3, H, W) in [0, 1], S at least 2 -> (P,), NaN where a value of an image is not finite."""
        finite_P = images_PS.isfinite().flatten(1).all(dim=1).cpu().numpy()
        features_S = [self._features(self._resize(images_P)) for images_P in images_PS.unbind(1)]
        pairs = list(itertools.combinations(features_S, 2))
        total_P = torch.zeros(len(images_PS), dtype=torch.float64)
        for a, b in pairs:
            total_P += self._distance(a, b).double().cpu()
        return np.where(finite_P, (total_P / len(pairs)).numpy(), np.nan)

    def _resize(self, images: torch.Tensor) -> torch.Tensor:
        return resize(images.nan_to_num(0.0, 0.0, 0.0), self.side, self.side).clamp(0, 1)

    def _features(self, images: torch.Tensor) -> list[torch.Tensor]:
        """(P, 3, H, W) in [0, 1] -> the features (P, C, h, w) of each layer, of length 1 along C."""
        layers = self.distance.net(self.distance.scaling_layer(2 * images - 1))
        return [lpips.normalize_tensor(layer) for layer in layers]

    def _distance(self, a: list[torch.Tensor], b: list[torch.Tensor]) -> torch.Tensor:
        """Features of both images -> (P,): summed over the layers, the mean of the weighted squared differences."""
        first, *others = [
            weigh((x - y).square()).mean(dim=(1, 2, 3)) for weigh, x, y in zip(self.distance.lins, a, b, strict=True)
        ]
        return sum(others, start=first)


def read_backbone(file: Path, network: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The tensors of torchvision's VGG-16 under the names of the package's network, which groups them in five slices.

    Raises:
        DataError: the file is damaged, or holds another network.
    """
    checkpoint = read_tensors(file)
    tensors = {}
    for name, expected in network.state_dict().items():
        _, _, layer = name.partition(".")
        value = checkpoint.get(f"features.{layer}")
        if value is None or value.shape != expected.shape:
            raise DataError(
                f"weights.lpips-vgg16 {file} lacks VGG-16's features.{layer}; give torchvision's vgg16 checkpoint"
            )
        tensors[name] = value
    return tensors
