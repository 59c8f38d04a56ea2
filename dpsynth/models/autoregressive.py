"""Linear autoregressive likelihood in a fixed order of the columns; samples meet the noisy tables.

Each column has a softmax over its levels that is linear in the levels of the columns before it
(Larochelle & Murray 2011; logits as in a fully visible sigmoid belief network, Neal 1992), and
starts from the mixture that agrees with the noisy tables. Order, kernels, centres and scale follow
from these: they are published with them and cost nothing. Why each of them lowers the noise of
DP-SGD: docs/design/quality-network.md.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dpsynth.codec import Layout
from dpsynth.marginals import Marginals
from dpsynth.models.base import Generator
from dpsynth.models.denoise import denoised
from dpsynth.models.reconcile import corrected
from dpsynth.networks import FleetMaskedLinear, column_log_likelihood, draw_level, sample_columns
from dpsynth.optimizers import FALL, FleetSgd
from dpsynth.privacy.calibration import whole_mu
from dpsynth.privacy.layers import masked_squared_norms
from dpsynth.privacy.plan import PrivacyPlan
from dpsynth.randomness import FleetRng

__all__ = ["Autoregressive"]

# Weight of the smooth part of a kernel, and its length on the scale of a column's own mass.
_SMOOTH, _LENGTH = 0.8, 0.08
# Rows drawn from the tables, and the quantile of their gradient norms that the bound is set to.
_DRAWN, _QUANTILE = 4096, 0.3
# Median norm of a gradient that a pair of columns has, about; fewest and most steps; least batch.
_PAIR, _STEPS, _BATCH = 0.45, (200, 1000), 2048
# Most noise that all steps together may put on a weight (standard deviation, in logits).
_SPREAD = 0.4
_RATE = 3.0


class Autoregressive(Generator):
    """z_j = log P(x_j | k) + R_j Σ_{i before j} W_ij f_i, with f_i = (R_i e_{x_i} - its mean given
    k) / C: all pairs of columns at once, each in one matrix W_ij. k is the component of a mixture
    that agrees with chosen tables, or without components the target's level.

    R_j is the root of a kernel that is smooth along the values of an ordered column, the identity
    for a category. C is a quantile of the gradient norms of rows drawn from the tables, so one
    clipping bound, 1, fits every table.

    At the end weights are drawn towards 0 as far as they are noise (`denoised`).

    Args:
        lr: Learning rate of plain SGD in units of the features before they are divided by C; less
            in a run whose noise would otherwise put more than 0.4 on a weight.
    """

    family = "autoregressive"
    suits = (
        "The usual choice: it learns how all pairs of columns go together, whether their table "
        "was asked for or not, which tells in wide tables. In others mixture is as good and faster."
    )

    root: Tensor
    mean: Tensor
    scale: Tensor

    def __init__(
        self,
        layout: Layout,
        runs: int,
        *,
        lr: float | Sequence[float] = _RATE,
        **common: Any,
    ) -> None:
        super().__init__(layout, runs, lr=lr, **common)
        self.network = FleetMaskedLinear(runs, layout.levels)
        # Row w holds the root's row of level w in its own column, padded to the longest.
        self.register_buffer("root", torch.zeros(runs, layout.width, max(layout.levels)))
        starts = self.components or layout.groups
        self.register_buffer("mean", torch.zeros(runs, starts, layout.width))
        self.register_buffer("scale", torch.ones(runs))

    @classmethod
    def planned(cls, plan: PrivacyPlan, columns: int) -> Mapping[str, Any]:
        """As many steps at the usual rate as add up to `_SPREAD` of noise on a weight, and batches
        large enough that a step's own noise is about twice its bound or more.

        In the accountant's central limit the noise of a whole training is C/(μ n), whatever its
        batches are; the smaller that is, the longer it pays to go on.
        """
        if not plan.private:
            return {"steps": _STEPS[1], "batch": _BATCH}
        whole = whole_mu(plan.epsilon, plan.delta, plan.spent, plan.contributions)
        left = max(0.0, 1 - sum(plan.shares.values()))
        signal = whole / plan.contributions * math.sqrt(left) * plan.rows
        pairs = max(1, math.comb(columns, 2))
        steps = _SPREAD * signal / (_PAIR * math.sqrt(pairs)) / _RATE
        steps = round(min(max(steps, _STEPS[0]), _STEPS[1]))
        return {"steps": steps, "batch": max(_BATCH, round(2 * signal / math.sqrt(steps)))}

    @property
    def _linear(self) -> FleetMaskedLinear:
        assert isinstance(self.network, FleetMaskedLinear)
        return self.network

    def reset(self, rng: FleetRng) -> None:
        """Weights 0: the start is the mixture, or without components a DP naive Bayes."""
        self._linear.reset(rng)

    # -- what follows from the tables ---------------------------------------------------------

    def prepare(
        self,
        marginals: Sequence[Marginals],
        used: Sequence[Tensor],
        rng: FleetRng,
        surveyed: Sequence[Any] | None = None,
    ) -> None:
        super().prepare(marginals, used, rng, surveyed)
        for run, (tables, possible) in enumerate(zip(marginals, used, strict=True)):
            self._linear.rank[run] = self._rank(tables)
            start = self.component_logits[run] if self.components else self.given_logits[run]
            for j in range(self.layout.columns):
                block, levels = self._block(j), self.layout.levels[j]
                share, law = tables.one_way()[block], start[:, block].softmax(-1)
                root = _root(tables.values[block], share, possible[block])
                if j != self.layout.target:
                    self.root[run, block, :levels] = root.to(self.root)
                    self.mean[run, :, block] = law @ root.to(start)
        self.scale.fill_(1.0)
        pieces = [
            self._gradients(size, rng.at("init:scale", number))[2]
            for number, size in enumerate(self.chunks(_DRAWN, 512))
        ]
        self.scale.copy_(torch.cat(pieces, dim=1).quantile(_QUANTILE, dim=1))

    def _block(self, column: int) -> slice:
        start = self.layout.offsets[column]
        return slice(start, start + self.layout.levels[column])

    def _rank(self, tables: Marginals) -> Tensor:
        """Place of each column (D,): the target first, then by falling mutual information with it;
        without a target by falling entropy."""
        alone = tables.one_way().clamp_min(1e-12)
        joint = tables.prior[:, None] * tables.given
        against = tables.prior[:, None] * alone if self.layout.target is not None else 1.0
        gain = (joint * (joint.clamp_min(1e-12) / against).clamp_min(1e-12).log()).sum(0)
        sign = -1.0 if self.layout.target is None else 1.0
        gains = torch.stack([sign * block.sum() for block in gain.split(list(self.layout.levels))])
        if self.layout.target is not None:
            gains[self.layout.target] = math.inf
        return gains.argsort(descending=True, stable=True).argsort()

    def _gradients(self, rows: int, rng: FleetRng) -> tuple[Tensor, Tensor, Tensor]:
        """Of rows drawn from the tables, at weights of 0: the layer's inputs and the gradients at
        its outputs (runs, rows, W), and the norms of the weights' own (runs, rows)."""
        levels = list(self.layout.levels)
        component, group = self.draw_components(rows, rng, None)
        start = self.offset(component)
        codes = self.with_target(sample_columns(start, levels, rng), group)
        share = torch.cat([block.softmax(-1) for block in start.split(levels, -1)], dim=-1)
        back = self.layout.one_hot(codes, share.dtype) - share
        a, b = self.features(codes, component), self._rooted(back)
        squared = masked_squared_norms(a[:, :, None], b[:, :, None], self._linear)
        return a, b, squared.sqrt().clamp_min(1e-6)

    # -- likelihood ---------------------------------------------------------------------------

    def features(self, codes: Tensor, component: Tensor) -> Tensor:
        """Centred, smoothed and scaled one-hot rows: codes (runs, rows, D), components (runs, rows)
        -> (runs, rows, W)."""
        run = torch.arange(self.runs, device=codes.device)[:, None]
        places = codes + torch.tensor(self.layout.offsets, device=codes.device)
        padded = self.root[run[..., None], places]
        rows = [padded[..., j, :levels] for j, levels in enumerate(self.layout.levels)]
        centred = torch.cat(rows, dim=-1) - self.mean[run, component]
        return centred / self.scale[:, None, None]

    def _rooted(self, x: Tensor) -> Tensor:
        """R_j times the block of each column (runs, rows, W)."""
        blocks = x.split(list(self.layout.levels), dim=-1)
        parts = [
            block @ self.root[:, self._block(j), : block.shape[-1]]
            for j, block in enumerate(blocks)
        ]
        return torch.cat(parts, dim=-1)

    def logits(self, codes: Tensor, component: Tensor) -> Tensor:
        """Scores of every column's levels given its component and the columns before it (runs,
        rows, W)."""
        features = self.features(codes, component)
        return self.offset(component) + self._rooted(self._linear(features))

    def record_loss(self, codes: Tensor, rng: FleetRng) -> Tensor:
        """-log p(x | k), with k drawn given x where there are components."""
        return self._loss(codes, self.component_of(codes, rng))

    def attack_loss(self, codes: Tensor, rng: FleetRng) -> Tensor:
        """The same under the likeliest component; nothing is drawn."""
        return self._loss(codes, self.component_of(codes, None))

    def _loss(self, codes: Tensor, component: Tensor) -> Tensor:
        logits = self.logits(codes, component)
        return -column_log_likelihood(logits, codes, self.layout.levels).sum(-1)

    def configure_optimizers(self) -> Any:
        return [FleetSgd(self.network.parameters(), self._rates())]

    def _rates(self) -> Tensor:
        """Learning rate of each run (runs,)."""
        rates = [self._rate(run, lr) for run, lr in enumerate(self.lr)]
        return torch.tensor(rates).to(self.scale) * self.scale.square()

    def _rate(self, run: int, lr: float) -> float:
        """Learning rate of a run: at most that at which the noise of all its steps adds up to
        `_SPREAD`; all of it is public."""
        plan = self.plans[run]
        if not (plan.private and plan.steps):
            return lr
        each = plan.noise * plan.bound * float(self.scale[run]) / (plan.q * plan.rows)
        return min(lr, _SPREAD / (each * math.sqrt(plan.steps)))

    def finish(self) -> None:
        """Sample from the averaged weights, less the noise in them, from now on."""
        pull = self._pull() if self.total else None
        super().finish()
        if pull is not None:
            self._linear.weight.data.copy_(denoised(self._linear, pull))

    @torch.no_grad()
    def _pull(self) -> Tensor:
        """Curvature of the clipped loss at each weight, by the Fisher information of the start,
        times the learning rate, summed over a training's steps (runs, W, W)."""
        rng, found = FleetRng([0] * self.runs, device=self.scale.device), 0.0
        bound = torch.tensor([plan.bound for plan in self.plans]).to(self.scale)
        for number, size in enumerate(self.chunks(_DRAWN, 512)):
            a, b, norm = self._gradients(size, rng.at("curvature", number))
            kept = (bound[:, None] / norm).clamp_max(1)
            found = found + (a.square() * kept[..., None]).mT @ b.square() / _DRAWN
        steps = torch.tensor([plan.steps for plan in self.plans]).to(self.scale)
        return found * ((1 - FALL / 2) * self._rates() * steps)[:, None, None]

    # -- sampling -----------------------------------------------------------------------------

    def draw(
        self,
        component: Tensor,
        group: Tensor,
        draws: Tensor,
        rng: FleetRng,
        given: Mapping[int, int],
    ) -> Tensor:
        drawn = [
            self._columns(run, component[run], group[run], draws[run]) for run in range(self.runs)
        ]
        return torch.stack(drawn)

    def _columns(self, run: int, component: Tensor, group: Tensor, draws: Tensor) -> Tensor:
        """All columns given component and target (rows,), from uniform draws (rows, D)."""
        codes = torch.zeros_like(draws, dtype=torch.long)
        if self.layout.target is not None:
            codes[:, self.layout.target] = group
        features = draws.new_zeros(len(draws), self.layout.width).to(self.root)
        weight, rank = self._linear.masked()[run], self._linear.rank[run]
        held = self.component_logits[run] if self.components else self.given_logits[run]
        for j in rank.argsort().tolist():
            block = self._block(j)
            root = self.root[run, block, : self.layout.levels[j]]
            if j != self.layout.target:
                start = held[:, block][component]
                logits = start + features @ weight[:, block] @ root
                if self.reconcile:
                    logits = corrected(logits, start, group)
                codes[:, j] = draw_level(logits, draws[:, j])
            centred = root[codes[:, j]] - self.mean[run, :, block][component]
            features[:, block] = centred / self.scale[run]
        return codes


def _root(values: Tensor, share: Tensor, used: Tensor) -> Tensor:
    """Symmetric root of a column's kernel (L, L).

    Args:
        values: Where each level lies, NaN where it has no place (L,).
        share: Noisy share of each level (L,).
        used: Which levels can occur (L,).
    """
    kernel = torch.eye(len(values), dtype=torch.float64)
    placed = (used & values.isfinite()).nonzero().flatten()
    if len(placed) > 1:
        placed = placed[values[placed].argsort(stable=True)]
        mass = share[placed].double() / share[placed].sum().clamp_min(1e-12)
        middle = mass.cumsum(0) - mass / 2
        near = (-(middle[:, None] - middle).square() / (2 * _LENGTH**2)).exp()
        kernel[placed[:, None], placed] = _SMOOTH * near + (1 - _SMOOTH) * torch.eye(len(placed))
    scales, vectors = torch.linalg.eigh(kernel)
    half = vectors * scales.clamp_min(0).sqrt().sqrt()
    return half @ half.T
