"""What is done to axes in more than one place."""

from __future__ import annotations

from torch import Tensor

__all__ = ["expand"]


def expand(mask: Tensor, like: Tensor) -> Tensor:
    """`mask` with as many axes as `like`, the new ones of length 1."""
    return mask.reshape(*mask.shape, *(1,) * (like.dim() - mask.dim()))
