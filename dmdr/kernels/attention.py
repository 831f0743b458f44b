"""Which kernel computes attention in the networks (`execution.attention`), and whether it can: forward and backward.

Only the networks' attention is chosen here. What a kernel cannot do, such as a mask or heads as wide as an
autoencoder's, the next one in its order does.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, activate_flash_attention_impl, sdpa_kernel

from dmdr.config.execution import AttentionKernel
from dmdr.errors import ConfigError

FALLBACK = (SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH)
ORDER = {
    "flash": [SDPBackend.FLASH_ATTENTION, *FALLBACK],
    "fa3": [SDPBackend.FLASH_ATTENTION, *FALLBACK],
    "cudnn": [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, *FALLBACK],
}
PACKAGE = "flash_attn_interface"  # of FlashAttention 3
HEADS = (64, 128)  # numbers of a head, in the families here
ALIKE = 0.999  # cosine of the gradients of a kernel and of the formula; bfloat16 alone gives 0.9999 (ours)


@contextmanager
def use_attention(kernel: AttentionKernel) -> Iterator[None]:
    """Inside it, attention runs by this kernel. auto: torch chooses."""
    if kernel == "auto":
        yield
        return
    with sdpa_kernel(ORDER[kernel], set_priority=True):
        yield


def prepare_attention(kernel: AttentionKernel, device: str, compute: torch.dtype) -> None:
    """Check that a kernel is there and that its gradients on this device are those of the formula; load that of fa3.

    compute: the dtype in which the networks run.

    Raises:
        ConfigError: it is not there, cannot run in this dtype, or computes something else.
    """
    if kernel == "auto":
        return
    advice = "set execution.attention: auto"
    has_gpu = device == "cuda" and torch.cuda.is_available()
    if not has_gpu and (kernel != "flash" or device == "cuda"):
        raise ConfigError(f"execution.attention {kernel} needs an NVIDIA GPU, and this run has none; {advice}")
    if device == "cuda" and compute == torch.float32:
        raise ConfigError(
            f"execution.attention {kernel} computes in bfloat16, and the precision of this run is float32; set "
            "execution.attention: auto, or precision: bfloat16"
        )
    if kernel == "fa3":
        if find_spec(PACKAGE) is None:
            raise ConfigError(
                f"execution.attention fa3 needs FlashAttention 3 (the package {PACKAGE}), which is not installed here; "
                "install it, or set execution.attention: cudnn or flash"
            )
        activate_flash_attention_impl("FA3")
    for head in HEADS:
        try:
            cosine = compare_gradients(kernel, device, compute, head)
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:200]
            raise ConfigError(f"execution.attention {kernel} fails on this device: {reason}; {advice}") from error
        if not cosine > ALIKE:
            raise ConfigError(
                f"execution.attention {kernel} computes gradients on this device that are not those of attention "
                f"(cosine {cosine:.3f}, heads of {head}); {advice}"
            )


def compare_gradients(kernel: AttentionKernel, device: str, compute: torch.dtype, head: int) -> float:
    """The smallest cosine of the gradients in query, key and value, by the kernel and by the formula in float32."""
    generator = torch.Generator().manual_seed(0)
    exact = [torch.randn(2, 4, 96, head, generator=generator).to(device, compute) for _ in range(4)]
    *inputs, towards = exact
    found = []
    for order, dtype in ((ORDER[kernel][:1], compute), ([SDPBackend.MATH], torch.float32)):
        leaves = [each.to(dtype).requires_grad_(True) for each in inputs]
        with sdpa_kernel(order):
            out = F.scaled_dot_product_attention(leaves[0], leaves[1], leaves[2])
        gradients = torch.autograd.grad((out * towards.to(dtype)).sum(), leaves)
        found.append([each.detach().double().flatten() for each in (out, *gradients)])
    return min(float(one @ other / (one.norm() * other.norm())) for one, other in zip(*found, strict=True))
