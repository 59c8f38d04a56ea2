"""Timestep attack: a small network reads losses at several masking rates under many fixed masks.

It won every track of the MIDST challenge on diffusion models: losses at seven timesteps for 300
fixed noises, into a perceptron of three layers. Here each loss is taken relative to that of models
that did not see the row, which says how hard the row is under that very mask.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from sklearn.neural_network import MLPClassifier
from sklearn.preprocessing import StandardScaler

from dpsynth.audit.lira import out_means
from dpsynth.checks import UsageError

__all__ = ["timestep_scores"]

# Most (shadow, row) pairs that the network is fitted to.
MOST = 40_000
HIDDEN = (64, 64)


def timestep_scores(
    own: np.ndarray, shadows: np.ndarray, inside: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """Log odds of membership by a network trained on shadows, whose coins are the labels.

    Args:
        own: Losses of the audited model (rows, rates, masks).
        shadows: Losses of the shadow models (models, rows, rates, masks).
        inside: Which of them saw which row (models, rows) bool.
        rng: Of the pairs that are fitted to, and of the network.

    Returns:
        (rows,), higher for a member.

    Raises:
        UsageError: On shapes that do not fit together, or a row with fewer than two OUT models.
    """
    if own.ndim != 3 or shadows.shape[1:] != own.shape or inside.shape != shadows.shape[:2]:
        raise UsageError(
            f"losses of shapes {own.shape}, {shadows.shape} and coins {inside.shape}: give "
            "(rows, rates, masks), (models, rows, rates, masks) and (models, rows)"
        )
    features, others = _centred(own, shadows, inside)
    pairs = rng.permutation(inside.size)[:MOST]
    scaler = StandardScaler().fit(others[pairs])
    network = _network(rng).fit(scaler.transform(others[pairs]), inside.reshape(-1)[pairs])
    odds = network.predict_proba(scaler.transform(features))
    return np.log(odds[:, 1] + 1e-12) - np.log(odds[:, 0] + 1e-12)


def _centred(
    own: np.ndarray, shadows: np.ndarray, inside: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Losses less the mean over the (other) OUT models, (rows, features) and (pairs, features)."""
    mean, means = out_means(shadows, inside)
    pairs = (shadows - means).reshape(inside.size, -1)
    return (own - mean).reshape(len(own), -1), pairs


def _network(rng: np.random.Generator) -> MLPClassifier:
    # A mapping, because the stubs of scikit-learn know the defaults' types only.
    settings: dict[str, Any] = {
        "hidden_layer_sizes": HIDDEN,
        "alpha": 1e-3,
        "batch_size": 512,
        "early_stopping": True,
        "n_iter_no_change": 3,
        "max_iter": 30,
        "random_state": int(rng.integers(1 << 31)),
    }
    return MLPClassifier(**settings)
