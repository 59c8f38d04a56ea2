"""Labels: the target given all other columns of synthetic rows, and draws of it that are balanced.

A generator's rows say of the target what noisy tables and clipped gradients say, and each label
drawn adds noise of its own. Both are lowered after the fact, which touches no private row.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.tree import DecisionTreeRegressor
from torch import Tensor

from dpsynth.codec import Layout
from dpsynth.leading import Leading
from dpsynth.mixture import anchored
from dpsynth.models.additive import additive_logits

__all__ = ["LabelHead", "balanced"]

# Boosted trees as usual, and rows of a leaf within which labels are balanced.
_TREES, _RATE, _RIDGE, _LEAF = 120, 0.08, 1.0, 8
# Leaves a tree: as usual, since what more of them find in the generator's rows is mostly its noise,
# unless they explain so much more of rows they have not seen.
_LEAVES, _MORE = (31, 63, 127), 1.25
# Share of columns that a split may be of: greedy splits alone may never try those of a parity.
_TRIED = 0.5
# Part of the generator's rows that the two models are compared on.
_HELD = 0.2
# What the additive scores count for at most, where components know the target's levels, and where
# they know it as any other column: there rows of the generator hold more of its noise.
_HALF, _LED = 0.5, 0.8
# Scores times these are compared, where the surest need not be the best.
_SOFTER = (0.25, 0.5, 1.0)
# Golden section: of all irrational steps the one whose multiples are spread most evenly.
_GOLDEN = (5**0.5 - 1) / 2


class LabelHead:
    """Scores of the target's levels: a mean of two models' scores, whose errors differ.

    One is additive and fitted to the noisy label × column tables themselves (`additive_logits`);
    the other, boosted trees fitted to rows that the generator drew, knows what the generator knows
    of interactions but not the noise that single rows of it carry. Each counts a half, the additive
    one less by the share of what the trees explain of such rows' labels that it does not. For a
    target of more levels than components are told apart by, the additive one starts at what leads
    and counts .8, less only where it explains not even half of what the trees do.

    Args:
        rows: Codes that the generator drew, the target included (rows, D).
        rank: Place of each level in its column's order (W,).
        layout: Public shape, with a target.
        leading: Where the additive model starts.
    """

    def __init__(
        self, rows: Tensor, rank: Tensor, layout: Layout, leading: Leading | None = None
    ) -> None:
        assert layout.target is not None
        self.leading = leading
        self.layout, self._rank, self.target = layout, rank, layout.target
        self.others = [j for j in range(layout.columns) if j != self.target]
        kept = max(1, round(_HELD * len(rows)))
        self._held, seen = rows[:kept], rows[kept:]
        self._classes = np.unique(seen[:, self.target].numpy())
        self._trees = self._grown(seen) if len(self._classes) > 1 else None

    def _grown(self, seen: Tensor) -> HistGradientBoostingClassifier:
        """Trees of as many leaves as pay."""
        best, most = None, -math.inf
        for leaves in _LEAVES:
            trees = HistGradientBoostingClassifier(
                max_iter=_TREES,
                max_leaf_nodes=leaves,
                learning_rate=_RATE,
                l2_regularization=_RIDGE,
                max_features=_TRIED,
                early_stopping=False,
                random_state=0,
            ).fit(self.features(seen), seen[:, self.target].numpy())
            found = self._gain(self._by(trees, self._held))
            if best is not None and not found > max(_MORE * most, 0.0):
                break
            best, most = trees, found
        assert best is not None
        return best

    def features(self, codes: Tensor) -> np.ndarray:
        """All columns but the target by the places of their levels (rows, D - 1)."""
        places = codes + torch.tensor(self.layout.offsets)
        return self._rank[places][:, self.others].numpy()

    def scores(
        self, codes: Tensor, tables: Sequence[Tensor], prior_logits: Tensor, noise: float
    ) -> Tensor:
        """Unnormalised logits (rows, groups).

        Args:
            codes: Rows to be labelled; enough of them for means (rows, D).
            tables: Shares of all rows by target level and level, one a column but the target.
            prior_logits: Log of the target's shares (groups,).
            noise: Standard deviation of a cell's noise, as a share of all rows.
        """
        facts = tables, prior_logits, noise
        additive, boosted = self._both(codes, *facts)
        share = self._share(*self._both(self._held, *facts))
        scores = share * additive + (1 - share) * boosted
        # On the whole each level is as frequent as the tables say.
        for _ in range(10):
            share = scores.softmax(-1).mean(0)
            prior = prior_logits.softmax(-1)
            scores = scores + (prior.clamp_min(1e-9) / share.clamp_min(1e-9)).log()
        return scores

    def _both(
        self, codes: Tensor, tables: Sequence[Tensor], prior_logits: Tensor, noise: float
    ) -> tuple[Tensor, Tensor]:
        """Log-probabilities by the additive model and by the trees (rows, groups)."""
        columns = [codes[:, j] for j in self.others]
        start, led = None, []
        if self.leading is not None:
            start = self.leading.scores(codes, self.layout)
            led = [self.others.index(column) for column in self.leading.columns]
        additive = additive_logits(columns, tables, prior_logits, noise, start=start, led=led)
        additive = additive.log_softmax(-1)
        return additive, self._boosted(codes, additive)

    def _share(self, additive: Tensor, boosted: Tensor) -> float:
        """Of the additive scores in the mean, by what both models make of held-out rows."""
        if anchored(self.layout):
            return _HALF * self._explained(additive, boosted)
        # That tables are surer of the target than the generator's rows is why they count for more.
        softer = [(additive * part).log_softmax(-1) for part in _SOFTER]
        return _LED * min(1.0, 2 * self._explained(max(softer, key=self._gain), boosted))

    def _explained(self, additive: Tensor, boosted: Tensor) -> float:
        """What the additive scores explain of held-out labels, as a share, at most 1, of what the
        trees explain (nats)."""
        gains = [self._gain(one) for one in (additive, boosted)]
        return min(1.0, max(0.0, gains[0]) / gains[1]) if gains[1] > 0 else 1.0

    def _gain(self, scores: Tensor) -> float:
        """Nats of held-out labels that log-probabilities of their rows explain."""
        label = self._held[:, self.target]
        share = torch.bincount(label, minlength=scores.shape[1]) / len(label)
        return float(torch.special.entr(share).sum() + scores.gather(1, label[:, None]).mean())

    def _boosted(self, codes: Tensor, additive: Tensor) -> Tensor:
        """Log-probabilities by the trees (rows, groups); of one level alone they know nothing."""
        return additive if self._trees is None else self._by(self._trees, codes).to(additive)

    def _by(self, trees: HistGradientBoostingClassifier, codes: Tensor) -> Tensor:
        """Log-probabilities by trees (rows, groups)."""
        known = torch.from_numpy(trees.predict_proba(self.features(codes)))
        scores = known.new_full((len(codes), self.layout.groups), -30.0)
        scores[:, torch.from_numpy(self._classes)] = known.clamp_min(1e-9).log()
        return scores


def balanced(scores: Tensor, features: np.ndarray, offset: float) -> Tensor:
    """A level for each row by its probabilities, so that rows that are alike have them in the
    right shares (rows,).

    Rows are put in the order of the leaves of a tree that explains their scores, and levels are
    drawn by inverting their distributions at steps of the golden section: each draw is uniform
    over `offset`, neighbours' draws are spread evenly.

    Args:
        scores: Unnormalised logits (rows, groups).
        features: What rows are alike by (rows, features).
        offset: One uniform draw.
    """
    shares = scores.double().softmax(-1)
    tree = DecisionTreeRegressor(min_samples_leaf=_LEAF, random_state=0)
    leaf = tree.fit(features, scores.double().log_softmax(-1).clamp_min(-12).numpy()).apply(
        features
    )
    order = torch.from_numpy(np.lexsort((shares[:, -1].numpy(), leaf)))
    draws = torch.empty(len(shares), dtype=torch.float64)
    draws[order] = (offset + torch.arange(len(shares), dtype=torch.float64) * _GOLDEN) % 1
    reached = shares.cumsum(-1) <= draws.clamp(max=1 - 1e-12)[:, None]
    return reached.sum(-1).clamp(max=scores.shape[1] - 1)
