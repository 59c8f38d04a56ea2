"""Number formats of the weight-gradient products, and how a bound survives them.

TF32 and bfloat16 keep float32's exponent and 11 or 8 of its 24 significant bits, so the product of
two such numbers is exact in float32, and a conversion by the hardware changes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from dpsynth.checks import UsageError, check_choice

__all__ = ["FULL", "PRECISIONS", "Precision", "check_precision", "choose_precision"]


@dataclass(frozen=True)
class Precision:
    """One format.

    Attributes:
        name: As it is chosen, one of `PRECISIONS`.
        dropped: Low bits of a float32 that it does not keep; 0 for the weights' own format.
        products: Names of the float32 matrix products (`fp32_precision`) that change none of its
            numbers.
    """

    name: str
    dropped: int
    products: tuple[str, ...]

    @property
    def short(self) -> bool:
        """Whether it is shorter than the weights."""
        return self.dropped > 0

    @property
    def step(self) -> float:
        """Most that truncation takes off a number, relative to it: 2^-10 or 2^-7, else 0."""
        return 2.0 ** (self.dropped - 23) if self.short else 0.0

    def round(self, x: Tensor) -> Tensor:
        """To the nearest number of the format; what is not finite stays so."""
        if self.name == "bf16":
            return x.to(torch.bfloat16)
        if not self.short:
            return x
        bits = x.view(torch.int32)
        half = (1 << (self.dropped - 1)) - 1 + ((bits >> self.dropped) & 1)
        # The carry turns some NaNs into numbers, which would let their records through.
        return torch.where(x.isfinite(), self._cut(bits + half), x)

    def truncate(self, x: Tensor) -> Tensor:
        """Towards zero: no entry gets longer, no NaN or infinity becomes a number."""
        if not self.short:
            return x
        cut = self._cut(x.view(torch.int32))
        return cut.to(torch.bfloat16) if self.name == "bf16" else cut

    def _cut(self, bits: Tensor) -> Tensor:
        return (bits & (-1 << self.dropped)).view(torch.float32)

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        """Batched matrix product in the weights' format of what `round` or `truncate` gave."""
        if self.name != "bf16":
            return a @ b
        if a.is_cuda and "dtype" in torch.ops.aten.bmm.overloads():
            return torch.bmm(a, b, out_dtype=torch.float32)
        return a.float() @ b.float()


FULL = Precision("32", 0, ("none", "ieee"))
PRECISIONS: Mapping[str, Precision] = MappingProxyType(
    {
        "32": FULL,
        "tf32": Precision("tf32", 13, ("none", "ieee", "tf32")),
        "bf16": Precision("bf16", 16, ("none", "ieee", "tf32", "bf16")),
    }
)


def choose_precision(name: str, like: Tensor) -> Precision:
    """The format of that name for weights such as `like`.

    Raises:
        UsageError: On an unknown name, and on a short format for weights that are not float32.
    """
    check_choice("precision", name, PRECISIONS)
    chosen = PRECISIONS[name]
    if chosen.short and like.dtype != torch.float32:
        raise UsageError(f"precision={name}: needs weights in float32, not {like.dtype}")
    return chosen


def check_precision(like: Tensor, precision: str = "32") -> None:
    """Refuse arithmetic in which the norms are not those of what is summed.

    Args:
        like: A weight: its type, and where it is.
        precision: One of `PRECISIONS`.

    Raises:
        UsageError: On weights or on a `torch.set_float32_matmul_precision` that do not fit.
    """
    covered = choose_precision(precision, like).products
    backend: Any = torch.backends.cuda if like.is_cuda else torch.backends.mkldnn
    every: Any = torch.backends
    chosen = backend.matmul.fp32_precision
    chosen = every.fp32_precision if chosen == "none" else chosen
    if like.dtype not in (torch.float32, torch.float64):
        raise UsageError(f"weights in {like.dtype}: clipping needs float32 or float64")
    if like.dtype == torch.float32 and chosen not in covered:
        raise UsageError(
            f"matrix products in {chosen}: a clipped record could exceed its bound with "
            f"precision={precision}; call torch.set_float32_matmul_precision('highest')"
        )
