"""The Hydra launcher of `python -m dpsynth -m`: collects the jobs of a sweep and trains them as
fleets."""

from __future__ import annotations

import copy
import importlib
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Protocol, cast

from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus, configure_log, run_job, setup_globals
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from dpsynth.checks import UsageError

__all__ = ["FleetLauncher", "Task", "register"]

# Hydra takes launchers only from a package `hydra_plugins`; `register` lets this file stand in it.
_NAME = "hydra_plugins.dpsynth"


class Task(Protocol):
    """What Hydra is given to run."""

    def __call__(self, cfg: DictConfig) -> None:
        """Do one job, as any launcher may ask."""

    def together(
        self, jobs: Sequence[Callable[[], tuple[DictConfig, Path]]], sweep: Path
    ) -> list[int]:
        """Do jobs, each a configuration and a folder, with room to work under `sweep`; an exit
        code each. What went wrong has been said by then."""
        ...


class FleetLauncher(Launcher):
    """Trains what it is given in one call, then reports each job as Hydra's own launcher would.

    A sweeper that asks in batches has each batch trained together. A job that fails is told apart
    from the others, which are kept; the sweeper ends with its exit code. Callbacks see a job
    begin when all of them are trained.
    """

    __module__ = _NAME

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        """What Hydra hands over before the first `launch`."""
        self._context, self._config = hydra_context, config
        self._task = cast(Task, task_function)

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        """Train all jobs, then let Hydra do what it does around each.

        Args:
            job_overrides: Overrides of each job.
            initial_job_idx: Number of the first.

        Returns:
            One a job, in order; where one failed, its value is the `SystemExit` it would have been.
        """
        setup_globals()
        configure_log(self._config.hydra.hydra_logging, self._config.hydra.verbose)
        sweep = Path(str(self._config.hydra.sweep.dir))
        sweep.mkdir(parents=True, exist_ok=True)
        configs = [
            self._job(list(overrides), initial_job_idx + number)
            for number, overrides in enumerate(job_overrides)
        ]
        codes = self._task.together([partial(_resolved, config) for config in configs], sweep)
        return [self._report(config, code) for config, code in zip(configs, codes, strict=True)]

    def _job(self, overrides: list[str], number: int) -> DictConfig:
        config = self._context.config_loader.load_sweep_config(self._config, overrides)
        with open_dict(config):
            config.hydra.job.id = config.hydra.job.num = number
        return config

    def _report(self, config: DictConfig, code: int) -> JobReturn:
        """Folder, files and callbacks of a job that is done."""

        def done(_: DictConfig) -> None:
            if code:
                raise UsageError(f"exit code {code}")

        job = run_job(
            task_function=done,
            config=config,
            job_dir_key="hydra.sweep.dir",
            job_subdir_key="hydra.sweep.subdir",
            hydra_context=self._context,
        )
        if job.status == JobStatus.FAILED:
            # Sweepers raise this; whatever else they raised would be shown as a traceback.
            job.return_value = SystemExit(code)
        configure_log(self._config.hydra.hydra_logging, self._config.hydra.verbose)
        return job


def _resolved(config: DictConfig) -> tuple[DictConfig, Path]:
    """A job's own configuration, as `run_job` would hand it over, and its folder."""
    with _current(config):
        folder = Path(str(config.hydra.sweep.dir), str(config.hydra.sweep.subdir)).absolute()
        with read_write(config.hydra.runtime), open_dict(config.hydra.runtime):
            config.hydra.runtime.output_dir = str(folder)
        if config.hydra.job.chdir or config.hydra.job.env_set:
            raise UsageError(
                "hydra.job.chdir, hydra.job.env_set: jobs of a fleet share one process; use "
                "hydra/launcher=basic"
            )
        # What it holds may speak of the job that it is for, so that it is settled here.
        whole = copy.deepcopy(config)
        with read_write(whole), open_dict(whole):
            del whole["hydra"]
        with read_write(whole):
            OmegaConf.resolve(whole)
    return whole, folder


@contextmanager
def _current(config: DictConfig) -> Iterator[None]:
    """As long as this lasts, `${hydra:…}` speaks of this job."""
    before = HydraConfig.instance().cfg
    HydraConfig.instance().set_config(config)
    try:
        yield
    finally:
        HydraConfig.instance().cfg = before


def register() -> None:
    """Let Hydra find the launcher, under the name that `conf/hydra/launcher/fleet.yaml` gives."""
    package, name = _NAME.split(".")
    try:
        home = importlib.import_module(package)
    except ImportError:  # no other plugin is installed
        home = sys.modules[package] = ModuleType(package)
        home.__path__ = []
    sys.modules[_NAME] = sys.modules[__name__]
    setattr(home, name, sys.modules[__name__])
    Plugins.instance().register(FleetLauncher)
