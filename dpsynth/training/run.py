"""Run: what a training leaves behind. Saves and loads without executing code."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd
import yaml
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from dpsynth.artifacts import read_folder, write_folder
from dpsynth.checks import UsageError
from dpsynth.codec import Codec
from dpsynth.data import Table
from dpsynth.models.base import Generator
from dpsynth.privacy.ledger import Ledger
from dpsynth.privacy.plan import PrivacyPlan
from dpsynth.sampling import parse_where, sample_table
from dpsynth.schema import Schema
from dpsynth.training.fleet import Trained
from dpsynth.training.recipe import Recipe, build

__all__ = ["SEALED", "Run"]

# What the ledger of a run is sealed over: with itself, all that a run needs.
SEALED = ("config.yaml", "schema.json", "codec.json", "model.safetensors")

_PACKAGES = ("dpsynth", "torch", "opacus", "dp-accounting", "lightning", "numpy", "pandas")


@dataclass(frozen=True, eq=False)
class Run:
    """A trained generator with everything needed to sample it and to check its claim.

    Attributes:
        recipe: How it was trained.
        plan: What it was allowed to spend, and how.
        ledger: What it spent.
        codec: How rows are encoded.
        generator: A fleet of one.
        seed: Fixed seed of the training, or `None` for the operating system's entropy.
        lineage: Versions, time, and a name for the data.
    """

    recipe: Recipe
    plan: PrivacyPlan
    ledger: Ledger
    codec: Codec
    generator: Generator
    seed: int | None
    lineage: Mapping[str, Any]

    @classmethod
    def of(cls, trained: Trained, **lineage: Any) -> Run:
        """The run that one seat of a fleet left."""
        facts = {
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "python": platform.python_version(),
            "versions": {name: version(name) for name in _PACKAGES},
            **lineage,
        }
        return cls(
            trained.recipe,
            trained.plan,
            replace(trained.ledger, sink=None, executed=trained.executed),
            trained.codec,
            trained.generator,
            trained.seat.seed,
            facts,
        )

    @property
    def schema(self) -> Schema:
        """Public facts about the table."""
        return self.codec.schema

    @property
    def executed(self) -> int:
        """DP-SGD steps taken."""
        return self.ledger.executed.steps

    @property
    def epsilon(self) -> float:
        """ε spent, composed from the ledger."""
        return self.ledger.epsilon

    def sample(
        self,
        rows: int,
        *,
        where: Mapping[str, object] | str | None = None,
        rng: int | None = None,
    ) -> pd.DataFrame:
        """Draw a table; see `dpsynth.sampling.sample_table`."""
        return self.sample_table(rows, where=where, rng=rng).frame

    generate = sample

    def sample_table(
        self,
        rows: int,
        *,
        where: Mapping[str, object] | str | None = None,
        rng: int | None = None,
    ) -> Table:
        """As `sample`, as a `Table` under the run's schema."""
        conditions = parse_where(where) if isinstance(where, str) else where
        return sample_table(self.generator, self.codec, rows, where=conditions, rng=rng)

    def save(self, folder: str | Path, extra: Mapping[str, bytes] | None = None) -> None:
        """Write the run folder, with any `extra` files, whole or not at all."""
        write_folder(Path(folder), {**self._files(), **(extra or {})}, self.lineage)

    def _files(self) -> dict[str, bytes]:
        config = {
            "recipe": self.recipe.to_dict(),
            "plan": self.plan.to_dict(),
            "seed": self.seed,
        }
        files = {
            "config.yaml": yaml.safe_dump(config, sort_keys=False).encode(),
            "schema.json": self.schema.to_json().encode(),
            "codec.json": json.dumps(self.codec.to_dict()).encode(),
            "model.safetensors": save_tensors(
                {k: v.contiguous() for k, v in self.generator.state_dict().items()}
            ),
        }
        return {**files, "ledger.json": self.ledger.sealed(files).to_json().encode()}

    @classmethod
    def load(cls, folder: str | Path) -> Run:
        """Read a run folder after checking its hashes; executes nothing from it."""
        files, lineage = read_folder(Path(folder))
        for name in (*SEALED, "ledger.json"):
            if name not in files:
                raise UsageError(f"run {str(folder)!r}: {name} is missing; fetch it again")
        try:
            return cls._of_files(files, lineage)
        except UsageError as error:
            raise UsageError(f"run {str(folder)!r}: {error}") from error
        except (RuntimeError, SafetensorError) as error:
            raise UsageError(
                f"run {str(folder)!r}: weights do not fit its schema and recipe; fetch it again"
            ) from error
        except (KeyError, TypeError, ValueError, yaml.YAMLError) as error:
            raise UsageError(
                f"run {str(folder)!r}: its files do not fit together; fetch it again"
            ) from error

    @classmethod
    def _of_files(cls, files: Mapping[str, bytes], lineage: Mapping[str, Any]) -> Run:
        config = yaml.safe_load(files["config.yaml"])
        recipe = Recipe(**config["recipe"])
        schema = Schema.from_json(files["schema.json"].decode())
        codec = Codec.from_dict(schema, json.loads(files["codec.json"]))
        generator = build(recipe, codec.layout, 1)
        generator.load_state_dict(load_tensors(files["model.safetensors"]))
        generator.finish()
        ledger = Ledger.from_json(files["ledger.json"].decode())
        ledger.check_seal({name: files[name] for name in SEALED})
        return cls(
            recipe,
            PrivacyPlan(**config["plan"]),
            ledger,
            codec,
            generator,
            config["seed"],
            lineage,
        )
