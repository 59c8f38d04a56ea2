"""Scores of candidates on one synthetic table, whoever made it, from tables only."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import stats

from dpsynth.audit.attacks import DIAGNOSTICS, QUICK, score_all
from dpsynth.audit.shadow_scores import other_tables, shadow_scores
from dpsynth.audit.shadow_tables import ShadowTable, read_shadows
from dpsynth.audit.table_inputs import Inputs
from dpsynth.checks import UsageError
from dpsynth.data import Table
from dpsynth.schema import Schema

__all__ = ["ShadowTable", "audit_table", "read_shadows"]

# Reference rows kept as known non-members, as a share and at most.
HELD_SHARE = 0.2
HELD_ROWS = 4000
# Fewest reference rows: below, hardly any is left to hold out.
LEAST_REFERENCE = 50
# The fixed combination: the attacks that a reference corrects and that rank local leaks well.
COMBINED = ("nn_ratio_quantile", "nn_ratio_range")

Progress = Callable[[str], None]


def audit_table(
    synthetic: pd.DataFrame,
    candidates: pd.DataFrame,
    *,
    reference: pd.DataFrame | None = None,
    shadows: Sequence[ShadowTable] = (),
    schema: Schema | None = None,
    rng: np.random.Generator,
    device: str = "cpu",
    progress: Progress | None = None,
    cache: Path | None = None,
) -> pd.DataFrame:
    """Score how likely each candidate was among the rows that made `synthetic`.

    Without reference and shadows a column is an attack's score as it is, and `combined` the mean
    of their ranks among the candidates. With a reference a column is the share of known non-members
    (reference rows held out) with a lower score, and `combined` that of Fisher's combination of
    the nearest-neighbour ratios. With shadows there are also `shadow_z` and `shadow_density`,
    distances and kernel densities calibrated by the other generators; `combined` is then the
    probability of a classifier fitted on the shadows' known members, or of `shadow_density` alone
    where the shadows tell of none.

    Args:
        synthetic: The table under audit; its columns are the ones compared.
        candidates: Rows that are asked about; a column `member` is never read.
        reference: Rows of the population that are neither members nor candidates.
        shadows: Tables of other generators of the same kind. One with the rows of `synthetic` is
            left out, for it would give away the answers.
        schema: Public facts; without them kinds and bounds are read off all tables together.
        rng: Of all draws.
        device: Where neighbours of the reference attacks are searched; it changes no score.
        progress: Called with each remark, one line.
        cache: Folder that keeps the fitted classifier for the next call with these shadows.

    Returns:
        One row a candidate in the given order; all columns finite, higher = more "member".

    Raises:
        UsageError: On empty tables, a column of `synthetic` that another table lacks or holds
            twice, too few reference rows, or no column that varies.
    """
    say = progress or _silent
    # A stream each, so that a cached classifier draws the others nothing else.
    rng_attacks, rng_meta = rng.spawn(2)
    inputs = Inputs.of(synthetic, candidates, reference, shadows, schema, say)
    asked, made = inputs.table("candidates"), inputs.table("synthetic")
    known = _known(inputs, rng_attacks)
    if reference is None:
        columns = _bare_scores(asked, made, known, rng_attacks, device)
    else:
        columns = _held_out_scores(asked, made, known, rng_attacks, device)
    others = other_tables(inputs, made, say)
    if others:
        columns |= shadow_scores(inputs, others, known, rng_meta, say, cache)
    scores = pd.DataFrame(columns, index=pd.RangeIndex(len(asked)))
    assert np.isfinite(scores.to_numpy()).all()
    last = scores.pop("combined")
    return scores.assign(combined=last)


def _silent(remark: str) -> None:
    """Say nothing."""


def _known(inputs: Inputs, rng: np.random.Generator) -> Table:
    """What stands for the population: the reference, or rows of the shadows, or of the table."""
    if "reference" in inputs.frames:
        return inputs.table("reference")
    if not inputs.shadows:
        return inputs.table("synthetic")
    size = len(inputs.frames["synthetic"])
    each = max(1, -(-size // len(inputs.shadows)))
    parts = []
    for shadow in inputs.shadows:
        frame = inputs.frames[f"shadow {shadow.name!r}"]
        parts.append(frame.iloc[np.sort(rng.permutation(len(frame))[:each])])
    frame = pd.concat(parts, ignore_index=True)
    return Table.from_frame(frame, inputs.schema, strict=False)


def _bare_scores(
    asked: Table, made: Table, known: Table, rng: np.random.Generator, device: str
) -> dict[str, np.ndarray]:
    """Diagnostics only, each as it is: nothing tells typical rows from members."""
    chosen = {name: QUICK[name] for name in QUICK if name in DIAGNOSTICS}
    if len(made) < max(attack.neighbours for attack in chosen.values()):
        chosen = {name: one for name, one in chosen.items() if one.neighbours <= len(made)}
    scores = score_all(chosen, asked, made, known, rng, device=device)
    ranks = [stats.rankdata(one) / (len(asked) + 1) for one in scores.values()]
    return {**scores, "combined": np.mean(ranks, axis=0)}


def _held_out_scores(
    asked: Table, made: Table, known: Table, rng: np.random.Generator, device: str
) -> dict[str, np.ndarray]:
    """Shares of held-out reference rows below each candidate, by attack and combined."""
    if len(known) < LEAST_REFERENCE:
        raise UsageError(
            f"reference: {len(known)} rows; give at least {LEAST_REFERENCE}, or none at all"
        )
    order = rng.permutation(len(known))
    held = min(HELD_ROWS, int(HELD_SHARE * len(known)))
    outside, rest = known.take(order[:held]), known.take(order[held:])
    both = Table(asked.schema, pd.concat([asked.frame, outside.frame], ignore_index=True))
    chosen = {name: one for name, one in QUICK.items() if one.neighbours <= len(made)}
    shares = {}
    for name, score in score_all(chosen, both, made, rest, rng, device=device).items():
        shares[name] = _shares_below(score, len(asked))
    fisher = -np.sum([np.log1p(-shares[name]) for name in COMBINED], axis=0)
    shares["combined"] = _shares_below(fisher, len(asked))
    return {name: share[: len(asked)] for name, share in shares.items()}


def _shares_below(scores: np.ndarray, asked: int) -> np.ndarray:
    """Mid-rank share of the scores behind place `asked` that lie below each: (rows,) in (0, 1)."""
    known = np.sort(scores[asked:])
    below, upto = (np.searchsorted(known, scores, side=side) for side in ("left", "right"))
    return ((below + upto) / 2 + 0.5) / (len(known) + 1)
