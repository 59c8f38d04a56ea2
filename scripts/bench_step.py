"""Time and memory of one private step against the same step without privacy.

`python scripts/bench_step.py [--device cuda] [--quick] [--json FILE] [--profile FILE]`
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from benchmarking import (
    Step,
    arguments,
    compare,
    difference,
    finish,
    interleave,
    memories,
    parser,
    spread,
    target,
)
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from dpsynth.codec import Layout
from dpsynth.models.diffusion import Diffusion
from dpsynth.models.gan import Gan
from dpsynth.networks import Mlp
from dpsynth.privacy.engine import PrivateEngine
from dpsynth.randomness import FleetRng

PLAIN = "non-private"
MODES = (PLAIN, "taps", "opacus_hooks", "opacus_ghost")


@dataclass(eq=False)
class Workload:
    """One network's step, private or not, always on the same batch.

    Attributes:
        network: What the step moves.
        optimizer: Over its parameters.
        losses: Unreduced loss (runs, batch) at a step number.
        batch: Records.
        device: Where all of it is.
        after: What follows the step without touching rows; a GAN's generator.
    """

    network: nn.Module
    optimizer: torch.optim.Optimizer
    losses: Callable[[int], Tensor]
    batch: int
    device: str
    after: Callable[[int], None] = lambda step: None
    rng: FleetRng = field(init=False)

    def __post_init__(self) -> None:
        self.rng = FleetRng([1], device=self.device)
        self.steps = itertools.count()

    def step(self, mode: str) -> Step:
        """The whole step in this mode: forward, backward, clipping, noise, optimizer."""
        if mode == PLAIN:
            return self._plain
        engine, counts = self.engine(mode), torch.ones(1, self.batch, device=self.device)

        def private() -> None:
            step = next(self.steps)
            engine.accumulate(lambda: self.losses(step), counts)
            engine.step(self.rng, step)
            self.after(step)

        return private

    def _plain(self) -> None:
        step = next(self.steps)
        (self.losses(step).sum() / self.batch).backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.after(step)

    def engine(self, mode: str) -> PrivateEngine:
        """With σ = C = 1."""
        size = [float(self.batch)]
        return PrivateEngine(
            self.network, self.optimizer, sigma=[1.0], bound=[1.0], batch=size, mode=mode
        )


def mlp(batch: int, device: str, quick: bool) -> Workload:
    """Plain regression, nothing but matrix products."""
    widths = _widths(quick)
    rng = FleetRng([0], device=device)
    network = Mlp(1, widths).to(device)
    network.reset(rng, "mlp", zero=False)
    rows, wanted = (rng.at(name).normal(batch, widths[0]) for name in ("rows", "wanted"))
    optimizer = torch.optim.Adam(network.parameters())
    return Workload(
        network, optimizer, lambda _: (network(rows) - wanted).square().mean(-1), batch, device
    )


def diffusion(batch: int, device: str, quick: bool) -> Workload:
    """Masked diffusion, four draws a record inside one clipped contribution."""
    layout, codes = _rows(batch, device, quick)
    model = Diffusion(layout, 1, hidden=_hidden(quick), draws=4).to(device)
    rng = FleetRng([0], device=device)
    model.reset(rng)
    optimizer = model.configure_optimizers()[0]
    return Workload(
        model.network,
        optimizer,
        lambda step: model.record_loss(codes, rng.at("draws", step)),
        batch,
        device,
    )


def gan(batch: int, device: str, quick: bool) -> Workload:
    """Two networks: a private discriminator step, then a generator step (which sees no rows)."""
    layout, codes = _rows(batch, device, quick)
    model = Gan(layout, 1, hidden=_hidden(quick), ladder=1, public_batch=batch).to(device)
    rng = FleetRng([0], device=device)
    model.reset(rng)
    model._optimizers = model.configure_optimizers()  # Lightning would hand them over
    return Workload(
        model.network,
        model._optimizers[0],
        lambda step: model.record_loss(codes, rng.at("draws", step)),
        batch,
        device,
        lambda step: model.public_step(rng.at("public", step), step),
    )


def _widths(quick: bool) -> list[int]:
    return [8, 16, 16, 8] if quick else [128, 512, 512, 128]


def _hidden(quick: bool) -> tuple[int, int]:
    return (16, 16) if quick else (512, 512)


def _rows(batch: int, device: str, quick: bool) -> tuple[Layout, Tensor]:
    """Ten columns, 128 levels in all, the last of them a binary target."""
    layout = Layout((2,) * 3, 2) if quick else Layout((14,) * 9 + (2,), 9)
    levels = torch.tensor(layout.levels, device=device)
    draws = FleetRng([2], device=device).at("codes").uniform(batch, layout.columns)
    return layout, (draws * levels).long()


WORKLOADS: dict[str, Callable[[int, str, bool], Workload]] = {
    "mlp": mlp,
    "diffusion": diffusion,
    "gan": gan,
}


def build(workload: str, mode: str, batch: int, device: str, quick: bool) -> Step:
    """A step of its own network."""
    return WORKLOADS[workload](batch, device, quick).step(mode)


def split(batch: int, device: str, quick: bool, rounds: int) -> dict[str, Any]:
    """Where a `taps` step spends its time, in ms, by differences within a round.

    `backward` is the plain one; `clipping` what a private gradient costs beyond it (norms and
    re-weighting); `noise` drawing, rounding and adding it.
    """
    forward, both, moved, released = (mlp(batch, device, quick) for _ in range(4))
    engine = released.engine("taps")
    for parameter in moved.network.parameters():
        parameter.grad = torch.ones_like(parameter)

    def gradient() -> None:
        both.losses(0).sum().backward()
        both.optimizer.zero_grad(set_to_none=True)

    steps: dict[str, Step] = {
        "forward": lambda: forward.losses(0),
        "gradient": gradient,
        "adam": moved.optimizer.step,
        # Without an accumulated batch, a step is noise and optimizer alone.
        "release": lambda: engine.step(released.rng, next(released.steps)),
        "taps": build("mlp", "taps", batch, device, quick),
    }
    times = interleave(steps, device=device, rounds=rounds)
    return {
        "batch": batch,
        "whole": spread(times["taps"]),
        "forward": spread(times["forward"]),
        "backward": difference(times, "gradient", "forward"),
        "clipping": difference(times, "taps", "gradient", "release"),
        "noise": difference(times, "release", "adam"),
        "adam": spread(times["adam"]),
    }


def profiled(batch: int, device: str, quick: bool) -> str:
    """Operators of five `taps` steps, the slowest first."""
    step = build("mlp", "taps", batch, device, quick)
    for _ in range(3):
        step()
    activities = [ProfilerActivity.CPU]
    order = "self_cpu_time_total"
    if device == "cuda":
        activities.append(ProfilerActivity.CUDA)
        order = "self_cuda_time_total"
    with profile(activities=activities, record_shapes=True) as seen:
        for _ in range(5):
            step()
    return seen.key_averages(group_by_input_shape=True).table(
        sort_by=order, row_limit=40, max_name_column_width=48, max_shapes_column_width=60
    )


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the benchmark; returns what `--json` writes."""
    options = parser(str(__doc__).splitlines()[0])
    options.add_argument("--profile", type=Path, default=None, help="text file for a profile")
    chosen = arguments(options, argv)
    device, quick = chosen.device, chosen.quick
    rounds = chosen.rounds or (2 if quick else 15)
    batches = (4,) if quick else (256, 1024)
    kinds = list(itertools.product(WORKLOADS, batches))
    measured = [_measure(workload, batch, device, quick, rounds) for workload, batch in kinds]
    results = [row for rows in measured for row in rows]
    cases = [case for workload, batch in kinds for case in _cases(workload, batch, device, quick)]
    _add_memory(results, memories(build, cases, device))
    parts = [split(batch, device, quick, rounds) for batch in batches]
    if chosen.profile is not None:
        chosen.profile.write_text(profiled(batches[-1], device, quick))
    sizes = {"widths": _widths(quick), "batches": list(batches), "rounds": rounds}
    targets = [found for row in results if row["name"] == "taps" for found in _targets(row, device)]
    return finish("step", chosen, results, sizes=sizes, split=parts, targets=targets)


def _cases(workload: str, batch: int, device: str, quick: bool) -> list[dict[str, Any]]:
    case = {"workload": workload, "batch": batch, "device": device, "quick": quick}
    return [{**case, "mode": mode} for mode in MODES]


def _measure(workload: str, batch: int, device: str, quick: bool, rounds: int):
    steps = {case["mode"]: build(**case) for case in _cases(workload, batch, device, quick)}
    times = interleave(steps, device=device, rounds=rounds, least_ms=1.0 if quick else 20.0)
    return compare(times, PLAIN, workload=workload, batch=batch)


def _add_memory(rows: list[dict[str, Any]], held: Sequence[dict[str, float] | None]) -> None:
    """`memory_ratio` compares what a step needs in all, resting tensors included."""
    base: dict[str, float] | None = None
    for row, memory in zip(rows, held, strict=True):
        base = memory if row["name"] == PLAIN else base
        row["memory"] = memory
        row["memory_ratio"] = sum(memory.values()) / sum(base.values()) if memory and base else None


def _targets(taps: dict[str, Any], device: str) -> list[dict[str, Any]]:
    """Limits of the private step, time and memory."""
    what = f"{taps['workload']} B={taps['batch']}: taps / {PLAIN}"
    most = 1.25 if device == "cpu" else 1.30
    found = [target(f"{what}, time", taps["ratio"]["median"], most=most)]
    if taps["memory_ratio"]:
        found.append(target(f"{what}, peak memory", taps["memory_ratio"], most=1.3))
    return found


if __name__ == "__main__":
    main()
