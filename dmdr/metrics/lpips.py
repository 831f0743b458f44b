"""Diversity as DMDR's Table 6 has it: mean LPIPS over the pairs of one prompt's images, by the lpips package.

1. The backbone is VGG-16, and images are brought to 512 pixels a side first, as in DMD2's evaluation, which the table
   follows. The table does not say how many images a prompt has; here it is `evaluate.seeds`.
2. The backbone sees each image once, not once a pair: the package's own layers, put together as its forward does.
3. torchvision's checkpoint of the backbone (vgg16-397923af.pth) is read from a file: nothing is fetched on the way.
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
    """From a file with torchvision's VGG-16; side: what images are brought to, in pixels.

    Raises:
        DataError: it is damaged, or another network's.
    """

    def __init__(self, file: Path, device: str, side: int = SIDE) -> None:
        self.side = side
        self.distance = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False)
        wanted = {f"slice{number}.{name}" for number in range(1, 6) for name in _names(self.distance.net, number)}
        found = read_tensors(file)
        given = {key: found.get(f"features.{key.split('.', 1)[1]}") for key in wanted}
        for key, value in given.items():
            if value is None or value.shape != self.distance.net.state_dict()[key].shape:
                name = f"features.{key.split('.', 1)[1]}"
                raise DataError(
                    f"weights.lpips-vgg16 {file} has not VGG-16's {name}; give torchvision's vgg16 checkpoint"
                )
        self.distance.net.load_state_dict(given)
        self.distance.to(device).requires_grad_(False).eval()

    @torch.no_grad()
    def __call__(self, images_PS: torch.Tensor) -> np.ndarray:
        """(P, S, 3, H, W) in [0, 1], S at least 2 -> (P,), NaN where an image is not a number."""
        sound_P = images_PS.isfinite().flatten(1).all(dim=1).cpu().numpy()
        count = images_PS.shape[1]
        images_SP = [self._square(images_PS[:, n]) for n in range(count)]
        pairs = list(itertools.combinations([self._features(images) for images in images_SP], 2))
        total_P = sum(self._between(a, b).double().cpu() for a, b in pairs)
        return np.where(sound_P, (total_P / len(pairs)).numpy(), np.nan)

    def _square(self, images: torch.Tensor) -> torch.Tensor:
        return resize(images.nan_to_num(0.0, 0.0, 0.0), self.side, self.side).clamp(0, 1)

    def _features(self, images: torch.Tensor) -> list[torch.Tensor]:
        """(P, 3, H, W) in [0, 1] -> of each layer (P, C, h, w), of length 1 along C."""
        layers = self.distance.net(self.distance.scaling_layer(2 * images - 1))
        return [lpips.normalize_tensor(layer) for layer in layers]

    def _between(self, a: list[torch.Tensor], b: list[torch.Tensor]) -> torch.Tensor:
        """(P,): over the layers, the sum of the weighted squared differences' spatial means."""
        return sum(
            weigh((x - y).square()).mean(dim=(1, 2, 3)) for weigh, x, y in zip(self.distance.lins, a, b, strict=True)
        )


def _names(network: torch.nn.Module, number: int) -> list[str]:
    return list(getattr(network, f"slice{number}").state_dict())
