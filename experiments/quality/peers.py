"""Generators without privacy that others publish, judged as our own families are at ε = ∞.

CTGAN and TVAE (Xu et al. 2019) come from the package `ctgan`, TabDDPM (Kotelnikov et al. 2023) from
`synthcity`; none is a dependency. One line of JSON a run; what is in the file already is not run
again. See README.md beside this file.

    pip install -c constraints.txt ctgan==0.12.1 loguru optuna cloudpickle pydantic
    pip install --no-deps synthcity==0.2.12
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pandas as pd
import torch
from protocol import judged, parts, whole
from sklearn.preprocessing import QuantileTransformer

from dpsynth.data import Table

MODELS = ("tabddpm", "tvae", "ctgan")
# A level of its own for missing categories.
MISSING = "(missing)"
# What synthcity imports on the way to TabDDPM, and TabDDPM never calls.
UNUSED = {
    "tsai": (),
    "tsai.models": (),
    "tsai.models.InceptionTime": ("InceptionTime",),
    "tsai.models.InceptionTimePlus": ("InceptionTimePlus",),
    "tsai.models.OmniScaleCNN": ("OmniScaleCNN",),
    "tsai.models.ResCNN": ("ResCNN",),
    "tsai.models.RNN_FCN": ("MLSTM_FCN",),
    "tsai.models.TCN": ("TCN",),
    "tsai.models.XceptionTime": ("XceptionTime",),
    "tsai.models.XCM": ("XCM",),
    "synthcity.metrics.weighted_metrics": ("WeightedMetrics",),
}


def plain(table: Table) -> tuple[pd.DataFrame, list[str]]:
    """A table as the packages take it, numbers as decimals and categories as texts; and the names
    of the categories."""
    columns = {}
    for column in table.schema.columns:
        values = table.frame[column.name]
        if column.numeric:
            if values.isna().any():
                raise ValueError(f"column {column.name!r}: missing numbers are not supported")
            columns[column.name] = values.astype(float)
        else:
            columns[column.name] = values.astype(object).where(values.notna(), MISSING)
    return pd.DataFrame(columns), [c.name for c in table.schema.columns if not c.numeric]


def returned(frame: pd.DataFrame, rows: Table) -> Table:
    """What a package made, under the schema: integers rounded, numbers within their bounds. A
    column that collapsed to one value counts like any other, hence not `strict`."""
    columns = {}
    for column in rows.schema.columns:
        values = frame[column.name]
        if not column.numeric:
            values = values.astype(object).where(values != MISSING, None)
        columns[column.name] = values
    return Table.from_frame(pd.DataFrame(columns), rows.schema, strict=False)


def xu(rows: Table, model: str, options: dict[str, Any]) -> Table:
    """CTGAN or TVAE."""
    frame, discrete = plain(rows)
    maker = getattr(importlib.import_module("ctgan"), model.upper())(**options)
    maker.fit(frame, discrete)
    return returned(maker.sample(len(rows)), rows)


def ddpm_module() -> Any:
    """TabDDPM's module. The packages around it load all of synthcity's plugins and metrics, with
    heavy libraries and an old torch that they ask for, so stand-ins take their place."""
    (folder,) = map(Path, importlib.import_module("synthcity").__path__)
    for name in ("plugins", "metrics"):
        package = ModuleType(f"synthcity.{name}")
        package.__path__ = [str(folder / name)]
        sys.modules[package.__name__] = package
    for name, classes in UNUSED.items():
        module = ModuleType(name)
        vars(module).update({each: type(each, (), {}) for each in classes}, __path__=[])
        sys.modules[name] = module
    return importlib.import_module("synthcity.plugins.core.models.tabular_ddpm")


def tabddpm(rows: Table, seed: int, options: dict[str, Any]) -> Table:
    """TabDDPM, given the class as its authors do on Adult, numbers by normal quantiles as they do.
    synthcity counts epochs, so `steps` are rounded to whole ones."""
    module = ddpm_module()
    frame, discrete = plain(rows)
    target = str(rows.schema.target)
    labels, classes = pd.factorize(frame.pop(target))
    discrete.remove(target)
    numbers = [name for name in frame if name not in discrete]
    quantiles = QuantileTransformer(
        n_quantiles=max(min(len(frame) // 30, 1000), 10),
        output_distribution="normal",
        subsample=None,
        random_state=seed,
    )
    inputs = pd.DataFrame(quantiles.fit_transform(frame[numbers]), columns=numbers)
    levels = {}
    for name in discrete:
        inputs[name], levels[name] = pd.factorize(frame[name])
    # By itself it takes columns of more than ten values for numbers; its authors diffuse all
    # categories as such.
    counts = [(name, len(levels[name])) for name in discrete]
    module.discrete_columns = lambda frame, return_counts: counts
    options = {**options, "model_params": {**options["model_params"], "random_state": seed}}
    steps = options.pop("steps")
    epochs = round(steps / -(-len(rows) // options["batch_size"]))
    maker = module.TabDDPM(n_iter=epochs, is_classification=True, **options)
    maker.fit(inputs, pd.Series(labels))
    drawn = np.random.default_rng(seed).choice(labels, len(rows))
    made = maker.generate(len(rows), cond=drawn)
    made[numbers] = quantiles.inverse_transform(made[numbers])
    for name in discrete:
        made[name] = levels[name][made[name].to_numpy(int)]
    made[target] = classes[drawn]
    return returned(made, rows)


def asked(settings: argparse.Namespace, model: str) -> dict[str, Any]:
    """Options that a model is made with; all else is its package's default."""
    if model != "tabddpm":
        return {"epochs": settings.epochs, "batch_size": 500}
    width = {"n_layers_hidden": settings.layers, "n_units_hidden": settings.width, "dropout": 0.0}
    return {
        "steps": settings.steps,
        "batch_size": settings.batch,
        "num_timesteps": settings.timesteps,
        "lr": settings.lr,
        "weight_decay": 0.0,
        "model_params": width,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path, help="folder with catalog.json and the tables")
    parser.add_argument("out", type=Path, help="file of JSON lines; it grows")
    parser.add_argument("--tables", nargs="+", default=["adult"])
    parser.add_argument("--models", nargs="+", default=MODELS, choices=MODELS)
    parser.add_argument("--seeds", nargs=2, type=int, default=(0, 1), metavar=("FIRST", "END"))
    parser.add_argument("--epochs", type=int, default=300, help="of CTGAN and TVAE")
    parser.add_argument("--steps", type=int, default=24_000, help="this and the rest: of TabDDPM")
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--timesteps", type=int, default=100)
    parser.add_argument("--lr", type=float, default=0.002)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=256)
    settings = parser.parse_args()
    torch.set_num_threads(1)
    lines = settings.out.read_text().splitlines() if settings.out.is_file() else []
    done = {json.loads(line)["key"] for line in lines}
    pairs = list(itertools.product(settings.tables, settings.models))
    for seed, (name, model) in itertools.product(range(*settings.seeds), pairs):
        options = asked(settings, model)
        key = json.dumps([name, model, options, seed])
        if key in done:
            continue
        rows, held = parts(whole(settings.data, name), seed, None)
        # The packages draw from the global states.
        np.random.seed(seed)  # noqa: NPY002
        torch.manual_seed(seed)
        began = time.process_time()
        made = tabddpm(rows, seed, options) if model == "tabddpm" else xu(rows, model, options)
        seconds = round(time.process_time() - began, 1)
        found, _ = judged(made, rows, held, None)
        line = {
            "key": key,
            "table": name,
            "rows": len(rows),
            "model": model,
            "settings": options,
            "seed": seed,
            "seconds": seconds,
            **found,
        }
        with settings.out.open("a") as file:
            file.write(json.dumps(line) + "\n")
        shown = " ".join(f"{figure} {value:.4f}" for figure, value in found.items())
        print(f"{name} {model} seed {seed}: {seconds:.0f} s {shown}", flush=True)


if __name__ == "__main__":
    main()
