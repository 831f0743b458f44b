"""What a frozen base in fewer bits does to the gradient, in words."""

from __future__ import annotations


def describe_agreement(kind: object, cosine: float) -> str:
    """kind: of the frozen base. cosine: between the gradients before and after."""
    return f"frozen base in {kind}: the gradient of distribution matching has a cosine of {cosine:.3f} with bfloat16's"
