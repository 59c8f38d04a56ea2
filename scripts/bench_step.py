"""Time and memory of one private step against the same step without privacy.

`python scripts/bench_step.py [--device cuda] [--captured] [--quick] [--json FILE] [--profile FILE]`

The private step and the one it is compared with use the same optimizer, dpsynth's `FleetAdam`
(torch's fused kernel on a CPU), and are both recorded or both not. Opacus' rows use
`torch.optim.Adam`, as its user would, and are never recorded: they cannot be. On a CPU the private
step is also held against a plain step with `torch.optim.Adam` as it comes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from benchmarking import (
    Step,
    arguments,
    difference,
    finish,
    fleet_adam,
    interleave,
    keyed,
    memories,
    numbered,
    parser,
    ratios,
    recorded,
    spread,
    target,
    within,
)
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from dpsynth.codec import Layout
from dpsynth.models.diffusion import Diffusion
from dpsynth.models.gan import Gan
from dpsynth.networks import Mlp
from dpsynth.optimizers import FleetAdam
from dpsynth.privacy.engine import PrivateEngine
from dpsynth.randomness import FleetRng

PLAIN, TORCH, TAPS = "non-private", "non-private, torch Adam", "taps"
OPACUS = ("opacus_hooks", "opacus_ghost")
# Own steps in shorter formats; what concerns the sum of gradients alone has no step of its own
# without privacy.
SHORT = ((PLAIN, "tf32"), (TAPS, "tf32"), (TAPS, "bf16"))


@dataclass(eq=False)
class Workload:
    """One network's step, private or not, always on the same batch.

    Attributes:
        network: What the step moves.
        optimizers: Over its parameters; further ones belong to what follows.
        losses: Unreduced loss (runs, batch) at a step number.
        data: Rows of the batch.
        rng: What the noise is drawn from.
        after: What follows the step without touching rows; a GAN's generator.
    """

    network: nn.Module
    optimizers: list[torch.optim.Optimizer]
    losses: Callable[[Any], Tensor]
    data: list[Tensor]
    rng: FleetRng
    after: Callable[[Any], None] = lambda step: None

    @property
    def batch(self) -> int:
        """Records."""
        return self.data[0].shape[1]

    def step(self, mode: str, *, precision: str = "32", captured: bool = False) -> Step:
        """The whole step in this mode: forward, backward, clipping, noise, optimizer."""
        if mode in (PLAIN, TORCH):
            return self._made(self._plain, [], None, captured=captured)
        engine = self.engine(mode, precision)
        counts = torch.ones(1, self.batch, device=self.rng.device)

        def private(step: Any) -> None:
            engine.accumulate(lambda: self.losses(step), counts)
            engine.step(self.rng, step)
            self.after(step)

        return self._made(private, [counts], engine, captured=captured)

    def _made(
        self, work: Any, further: list[Tensor], engine: PrivateEngine | None, *, captured: bool
    ) -> Step:
        if not captured:
            return numbered(work)
        moved = [o for o in self.optimizers if isinstance(o, FleetAdam)]
        assert len(moved) == len(self.optimizers), "torch's own optimizers are not recorded"
        return recorded(work, moved, [*self.data, *further], engine=engine)

    def _plain(self, step: Any) -> None:
        (self.losses(step).sum() / self.batch).backward()
        self.optimizers[0].step()
        self.optimizers[0].zero_grad(set_to_none=True)
        self.after(step)

    def engine(self, mode: str, precision: str = "32") -> PrivateEngine:
        """With σ = C = 1."""
        return PrivateEngine(
            self.network,
            self.optimizers[0],
            sigma=[1.0],
            bound=[1.0],
            batch=[float(self.batch)],
            mode=mode,
            precision=precision,
        )


def mlp(batch: int, rng: FleetRng, quick: bool) -> Workload:
    """Plain regression, nothing but matrix products."""
    widths = _widths(quick)
    network = Mlp(1, widths).to(rng.device)
    network.reset(rng, "mlp", zero=False)
    rows, wanted = (rng.at(name).normal(batch, widths[0]) for name in ("rows", "wanted"))
    return Workload(
        network,
        [fleet_adam(network)],
        lambda step: (network(rows) - wanted).square().mean(-1),
        [rows, wanted],
        rng,
    )


def diffusion(batch: int, rng: FleetRng, quick: bool) -> Workload:
    """Masked diffusion, four draws a record inside one clipped contribution."""
    layout, codes = _rows(batch, rng.device, quick)
    model = Diffusion(layout, 1, hidden=_hidden(quick), draws=4).to(rng.device)
    model.reset(rng)
    return Workload(
        model.network,
        model.configure_optimizers(),
        lambda step: model.record_loss(codes, rng.at("draws", step)),
        [codes],
        rng,
    )


def gan(batch: int, rng: FleetRng, quick: bool) -> Workload:
    """Two networks: a private discriminator step, then a generator step (which sees no rows)."""
    layout, codes = _rows(batch, rng.device, quick)
    model = Gan(layout, 1, hidden=_hidden(quick), ladder=1, public_batch=batch).to(rng.device)
    model.reset(rng)
    # Lightning would hand them over; whatever is put in place of one moves the model.
    model._optimizers = model.configure_optimizers()
    return Workload(
        model.network,
        model._optimizers,
        lambda step: model.record_loss(codes, rng.at("draws", step)),
        [codes],
        rng,
        lambda step: model.public_step(rng.at("public", step)),
    )


def _widths(quick: bool) -> list[int]:
    return [8, 16, 16, 8] if quick else [128, 512, 512, 128]


def _hidden(quick: bool) -> tuple[int, int]:
    return (16, 16) if quick else (512, 512)


def _rows(batch: int, device: torch.device, quick: bool) -> tuple[Layout, Tensor]:
    """Ten columns, 128 levels in all, the last of them a binary target."""
    layout = Layout((2,) * 3, 2) if quick else Layout((14,) * 9 + (2,), 9)
    levels = torch.tensor(layout.levels, device=device)
    draws = FleetRng([2], device=device).at("codes").uniform(batch, layout.columns)
    return layout, (draws * levels).long()


WORKLOADS: dict[str, Callable[[int, FleetRng, bool], Workload]] = {
    "mlp": mlp,
    "diffusion": diffusion,
    "gan": gan,
}


def workload_of(
    workload: str, batch: int, device: str, quick: bool, *, captured: bool = False
) -> Workload:
    """A network and its rows."""
    return WORKLOADS[workload](batch, keyed([0], device=device, captured=captured), quick)


def build(
    workload: str,
    mode: str,
    batch: int,
    device: str,
    quick: bool,
    precision: str = "32",
    captured: bool = False,
) -> Step:
    """A step of its own network; one with torch's optimizer is not recorded."""
    theirs = mode == TORCH or mode in OPACUS
    captured = captured and not theirs
    made = workload_of(workload, batch, device, quick, captured=captured)
    if theirs:
        made.optimizers[:] = [_torch_adam(optimizer) for optimizer in made.optimizers]
    return within(precision, lambda: made.step(mode, precision=precision, captured=captured))


def _torch_adam(optimizer: torch.optim.Optimizer) -> torch.optim.Adam:
    """torch's Adam as it comes, over the same parameters."""
    return torch.optim.Adam([p for group in optimizer.param_groups for p in group["params"]])


def split(batch: int, device: str, quick: bool, rounds: int) -> dict[str, Any]:
    """Where a `taps` step spends its time, in ms, by differences within a round.

    `backward` is the plain one; `clipping` what a private gradient costs beyond it (norms and
    re-weighting); `noise` drawing, rounding and adding it.
    """
    forward, both, moved, released = (workload_of("mlp", batch, device, quick) for _ in range(4))
    engine = released.engine(TAPS)
    for parameter in moved.network.parameters():
        parameter.grad = torch.ones_like(parameter)

    def gradient() -> None:
        both.losses(0).sum().backward()
        both.optimizers[0].zero_grad(set_to_none=True)

    steps: dict[str, Step] = {
        "forward": lambda: forward.losses(0),
        "gradient": gradient,
        "adam": moved.optimizers[0].step,
        # Without an accumulated batch, a step is noise and optimizer alone.
        "release": numbered(lambda step: engine.step(released.rng, step)),
        TAPS: build("mlp", TAPS, batch, device, quick),
    }
    times = interleave(steps, device=device, rounds=rounds)
    return {
        "batch": batch,
        "whole": spread(times[TAPS]),
        "forward": spread(times["forward"]),
        "backward": difference(times, "gradient", "forward"),
        "clipping": difference(times, TAPS, "gradient", "release"),
        "noise": difference(times, "release", "adam"),
        "adam": spread(times["adam"]),
    }


def profiled(batch: int, device: str, quick: bool, *, captured: bool = False) -> str:
    """All operators of five `taps` steps, the slowest first."""
    step = build("mlp", TAPS, batch, device, quick, captured=captured)
    for _ in range(3):
        step()
    activities = [ProfilerActivity.CPU]
    order = "self_cpu_time_total"
    if device == "cuda":
        activities.append(ProfilerActivity.CUDA)
        order = "self_device_time_total"
    with profile(activities=activities, record_shapes=True) as seen:
        for _ in range(5):
            step()
    return seen.key_averages(group_by_input_shape=True).table(
        sort_by=order, row_limit=-1, max_name_column_width=48, max_shapes_column_width=60
    )


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the benchmark; returns what `--json` writes."""
    options = parser(str(__doc__).splitlines()[0])
    options.add_argument("--profile", type=Path, default=None, help="text file for a profile")
    chosen = arguments(options, argv)
    device, quick, captured = chosen.device, chosen.quick, chosen.captured
    rounds = chosen.rounds or (2 if quick else 15)
    batches = (4,) if quick else (256, 1024)
    results, every = [], []
    for workload, batch in _kinds(batches, device):
        case = {"workload": workload, "batch": batch, "device": device, "quick": quick}
        case["captured"] = captured
        results += _measure(case, rounds)
        every += _cases(case)
    # A graph on a GPU keeps what it needs in a pool of its own, so memory is of the plain calls.
    _add_memory(
        results, every, memories(build, [{**each, "captured": False} for each in every], device)
    )
    parts = [] if captured else [split(batch, device, quick, rounds) for batch in batches]
    if chosen.profile is not None:
        chosen.profile.write_text(profiled(batches[-1], device, quick, captured=captured))
    sizes = {"widths": _widths(quick), "batches": list(batches), "rounds": rounds}
    targets = [found for row in results for found in _targets(row, device)]
    return finish("step", chosen, results, sizes=sizes, split=parts, targets=targets)


def _kinds(batches: Sequence[int], device: str) -> list[tuple[str, int]]:
    """Workloads and batches; on a GPU, where every one is compiled, families at the largest."""
    return [
        (workload, batch)
        for workload in WORKLOADS
        for batch in (batches if workload == "mlp" or device == "cpu" else batches[-1:])
    ]


def _modes(case: dict[str, Any]) -> list[tuple[str, str]]:
    """(mode, precision) of everything that takes turns."""
    modes = [(mode, "32") for mode in (PLAIN, TAPS, *OPACUS)]
    if case["device"] == "cpu" and not case["captured"]:
        modes.append((TORCH, "32"))
    if case["workload"] == "mlp" and (case["device"] == "cuda" or case["quick"]):
        modes += SHORT
    return modes


def _cases(case: dict[str, Any]) -> list[dict[str, Any]]:
    """What `build` is called with for each of them."""
    return [{**case, "mode": mode, "precision": precision} for mode, precision in _modes(case)]


def _measure(case: dict[str, Any], rounds: int) -> list[dict[str, Any]]:
    """Times of all modes, each against the plain step in its own products."""
    modes, quick = _modes(case), case["quick"]
    steps = {f"{each['mode']} {each['precision']}": build(**each) for each in _cases(case)}
    times = interleave(steps, device=case["device"], rounds=rounds, least_ms=1.0 if quick else 20.0)
    against = [(*each, PLAIN) for each in modes]
    if (TORCH, "32") in modes:
        against.append((TAPS, "32", TORCH))
    rows = []
    for mode, precision, base in against:
        label, other = f"{mode} {precision}", f"{base} {_plain_format(precision)}"
        row = {"workload": case["workload"], "batch": case["batch"], "precision": precision}
        row |= {"against": base, "name": mode, "ms": spread(times[label])}
        rows.append({**row, "ratio": ratios(times, label, other)})
    return rows


def _plain_format(precision: str) -> str:
    """Of the step without privacy that has the same forward and backward products."""
    return "32" if precision == "32" else "tf32"


def _add_memory(
    rows: Sequence[dict[str, Any]],
    cases: Sequence[dict[str, Any]],
    measured: Sequence[dict[str, float] | None],
) -> None:
    """`memory_ratio` compares what a step needs in all, resting tensors included."""

    def key(of: dict[str, Any], mode: str, precision: str) -> tuple[Any, ...]:
        return of["workload"], of["batch"], mode, precision

    held = {
        key(case, case["mode"], case["precision"]): memory
        for case, memory in zip(cases, measured, strict=True)
    }
    for row in rows:
        memory = held[key(row, row["name"], row["precision"])]
        base = held[key(row, row["against"], _plain_format(row["precision"]))]
        row["memory"] = memory
        row["memory_ratio"] = sum(memory.values()) / sum(base.values()) if memory and base else None


def _targets(row: dict[str, Any], device: str) -> list[dict[str, Any]]:
    """Limits of a private step by the same optimizer, time and memory."""
    judged = row["name"] == TAPS and row["against"] == PLAIN
    if not judged or (device == "cpu" and row["precision"] != "32"):
        return []
    what = f"{row['workload']} B={row['batch']}, precision {row['precision']}: {TAPS} / {PLAIN}"
    found = [
        target(f"{what}, time", row["ratio"]["median"], most=1.25 if device == "cpu" else 1.30)
    ]
    if row["memory_ratio"] and row["precision"] == "32":
        found.append(target(f"{what}, peak memory", row["memory_ratio"], most=1.3))
    return found


if __name__ == "__main__":
    main()
