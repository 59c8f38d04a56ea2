"""Cross-validated strength of the shadow classifier on the MIDST black-box single-table track.

See README.md beside this file for the question, the command and the result.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from dpsynth.audit.calibration import Neighbourhoods
from dpsynth.audit.meta import MetaClassifier
from dpsynth.audit.shadow_scores import labelled_features, labelled_rows
from dpsynth.audit.statistics import auc
from dpsynth.audit.table_inputs import Inputs
from dpsynth.audit.tables import read_shadows

DEV = {f"model {number}" for number in (*range(51, 61), *range(91, 101))}
BOOTSTRAPS = 1000
FIGURES = ("auc", "tpr10", "tpr1", "auc_mean")
Scored = Sequence[tuple[np.ndarray, np.ndarray]]


def figures(scored: Scored) -> dict[str, float]:
    """AUC, TPR at 10 % and 1 % FPR of all generators' scores pooled, and the mean AUC of one."""
    scores = np.concatenate([one for one, _ in scored])
    members = np.concatenate([labels for _, labels in scored])
    inside, outside = scores[members], np.sort(scores[~members])[::-1]
    values = {"auc": auc(inside, outside)}
    for name, rate in (("tpr10", 0.1), ("tpr1", 0.01)):
        values[name] = float((inside > outside[int(rate * len(outside))]).mean())
    values["auc_mean"] = float(np.mean([auc(one[who], one[~who]) for one, who in scored]))
    return values


def report(scored: Scored, rng: np.random.Generator) -> dict[str, list[float]]:
    """Each figure with the 95 % interval of a bootstrap over generators."""
    draws = [
        figures([scored[i] for i in rng.integers(len(scored), size=len(scored))])
        for _ in range(BOOTSTRAPS)
    ]
    found = figures(scored)
    ends = {name: np.quantile([draw[name] for draw in draws], (0.025, 0.975)) for name in found}
    return {name: [round(float(v), 4) for v in (found[name], *ends[name])] for name in FIGURES}


def challenge(
    scores: Sequence[np.ndarray], labels: Sequence[np.ndarray], asked: Sequence[int]
) -> Scored:
    """The challenge rows of each generator: the first of its labelled rows."""
    return [(s[:n], y[:n]) for s, y, n in zip(scores, labels, asked, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("midst.json"))
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    rng = np.random.default_rng(arguments.seed)
    shadows = read_shadows(arguments.folder)
    reference = pd.read_parquet(arguments.folder / "reference.parquet")
    first = shadows[0].synthetic
    inputs = Inputs.of(first, first, reference, shadows, None, lambda remark: None)
    others = [
        (shadow, inputs.coarse(inputs.table(f"shadow {shadow.name!r}"))) for shadow in shadows
    ]
    around = Neighbourhoods(
        [table for _, table in others], inputs.coarse(inputs.table("reference"))
    )
    rows = labelled_rows(inputs, others, rng)
    features = labelled_features(inputs, around, rows, rng)
    labels = [one.labels for one in rows]
    asked = [0 if shadow.labels is None else len(shadow.labels) for shadow in shadows]
    dev = np.array([shadow.name in DEV for shadow in shadows])
    results = evaluate(features, labels, asked, dev, rng)
    arguments.out.write_text(json.dumps(results, indent=1) + "\n")
    for name, entry in results.items():
        print(name, entry)


def evaluate(
    features: Sequence[pd.DataFrame],
    labels: Sequence[np.ndarray],
    asked: Sequence[int],
    dev: np.ndarray,
    rng: np.random.Generator,
) -> Mapping[str, Any]:
    """Train to dev, five-fold over all generators, and two columns that learn nothing."""
    every, train, held = (
        range(len(labels)),
        np.flatnonzero(~dev).tolist(),
        np.flatnonzero(dev).tolist(),
    )

    def of(scores: Sequence[np.ndarray], which: Sequence[int]) -> dict[str, list[float]]:
        return report(challenge(scores, [labels[i] for i in which], [asked[i] for i in which]), rng)

    crossed = MetaClassifier.fit(features, labels, rng).cross_fitted
    fitted = MetaClassifier.fit([features[i] for i in train], [labels[i] for i in train], rng)
    scored = {i: fitted.score(features[i]) for i in held}
    listed = [(crossed[i][asked[i] :], labels[i][asked[i] :]) for i in train]
    results: dict[str, Any] = {
        "cross-validated, 50 generators": of(crossed, every),
        "train to dev, 20 generators": of([scored[i] for i in held], held),
        "cross-validated, listed rows of train": report(listed, rng),
    }
    for column in ("z 1", "density ratio 0.08"):
        plain = [frame[column].to_numpy(float) for frame in features]
        results[f"{column}, 50 generators"] = of(plain, every)
        results[f"{column}, dev"] = of([plain[i] for i in held], held)
    results["generators"] = {"train": len(train), "dev": len(held)}
    results["rows"] = int(sum(map(len, labels)))
    return results


if __name__ == "__main__":
    main()
