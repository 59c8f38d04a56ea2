"""Defects found in other systems, planted here one by one: each is refused, flagged by an audit, or
breaks a law that the sound version keeps.

The laws are: the step audit and the sampler audit; noninterference (with every mechanism cut off
from the rows, two tables leave the same run); the sum that one-at-a-time autograd gives; and what
is executed is what is paid. "Teachers and student are one object" has no counterpart: no family
has teachers, and the runs of one fleet share no weights and no noise, which is tested.
"""

import dataclasses
import math
import pickle
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from fleets import make_fleet, random_codes
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint
from oracles import record_gradients, sum_clipped
from tiny import HERE, ROWS, SCHEMA, frame, recipe, seat, table
from torch import Tensor, nn

from dpsynth.audit.step import SamplerAudit, StepAudit, audit_sampler, audit_steps
from dpsynth.checks import RefusedError, UsageError
from dpsynth.codec import Codec, Layout
from dpsynth.data import Table
from dpsynth.models import Gan, Generator, Vae
from dpsynth.networks import Mlp
from dpsynth.privacy import batches as batches_module
from dpsynth.privacy.accounting import compose_epsilon
from dpsynth.privacy.batches import PoissonBatches
from dpsynth.privacy.clipping import ENGINES, TapClipper
from dpsynth.privacy.engine import PrivateEngine
from dpsynth.privacy.mechanisms import HistogramNoise
from dpsynth.privacy.plan import PrivacyPlan
from dpsynth.randomness import FleetRng
from dpsynth.sampling import sample_table
from dpsynth.training import fleet as fleet_module
from dpsynth.training.callbacks import LastCheckpoint
from dpsynth.training.canary import CanaryEngine, Observed, StepCanary, WatchedBatches
from dpsynth.training.fleet import Trained, train_fleet
from dpsynth.training.recipe import FAMILIES, Seat
from dpsynth.training.run import Run

# Of every audit here: a sound engine is flagged once in a thousand.
ALPHA = 1e-3
# One long plan for all fleets here: its noise is calibrated once.
LONG = {"steps": 160}


# -- the step audit ----------------------------------------------------------------------------

WIDTHS, RECORDS, Q, SIGMA, CLIP = [3, 4, 2], 40, 0.2, 1.2, 0.5


def stepped(
    engine_type: Callable[..., Any] = PrivateEngine,
    *,
    mode: str = "taps",
    runs: int = 3,
    steps: int = 160,
    rng: Callable[[list[int]], FleetRng] = FleetRng,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scores, coins and noise of an engine on a small network with rows of its own."""
    network = Mlp(runs, WIDTHS)
    network.reset(FleetRng(list(range(runs))), "plain", zero=False)
    mover = torch.optim.SGD(network.parameters(), lr=1e-3)
    bound, batch = [CLIP] * runs, [Q * RECORDS] * runs
    engine = engine_type(network, mover, sigma=[SIGMA] * runs, bound=bound, batch=batch, mode=mode)
    watched = CanaryEngine(engine, network, mover, bound=bound, batch=batch, key=8)
    batches = PoissonBatches([RECORDS] * runs, [Q] * runs)
    keys = rng([1000 + run for run in range(runs)])
    x = FleetRng(list(range(runs))).at("x").normal(RECORDS, WIDTHS[0])
    run = torch.arange(runs)[:, None]
    for step in range(steps):
        for index, inside in batches.draw(keys, step):
            part = x[run, index]
            watched.accumulate(lambda p=part: network(p).square().sum(-1), inside.float())
        watched.step(keys, step)
    return watched.observed()


def judged(scores: np.ndarray, present: np.ndarray, noise: np.ndarray) -> StepAudit:
    return audit_steps(scores, present, noise, sigma=SIGMA, epsilon_of=lambda s: 1 / s, alpha=ALPHA)


@pytest.mark.parametrize("mode", list(ENGINES))
def test_no_sound_engine_is_flagged_over_20_seeds(mode: str) -> None:
    scores, present, noise = stepped(mode=mode, runs=20)
    for run in range(20):
        part = slice(run, run + 1)
        assert judged(scores[part], present[part], noise[part]).flags == ()
    together = judged(scores, present, noise)
    assert together.flags == ()
    assert together.bound.mu < 1 / SIGMA


@pytest.fixture(scope="module")
def sound() -> tuple[Trained, Observed]:
    """20 seeds of one family, trained as one fleet by the real path."""
    watch = StepCanary(key=4)
    made = recipe("diffusion", options={"block": 10}, privacy=LONG)
    trained = train_fleet(made, [seat(4.0, s) for s in range(20)], callbacks=[watch])
    return trained[0], watch.observed()


def test_no_sound_fleet_is_flagged_over_20_seeds(sound: tuple[Trained, Observed]) -> None:
    trained, seen = sound
    plan = trained.plan
    event = plan.training_event("dpsgd")

    def epsilon_of(sigma: float) -> float:
        return compose_epsilon([dataclasses.replace(event, sigma=sigma)], plan.delta, 1e-3)

    for run in range(20):
        part = slice(run, run + 1)
        steps = audit_steps(
            seen.scores[part],
            seen.present[part],
            seen.noise[part],
            sigma=plan.noise,
            epsilon_of=lambda sigma: 1 / sigma,
            alpha=ALPHA,
        )
        assert steps.flags == ()
        groups = np.arange(ROWS) % 4
        assert audit_sampler(seen.batches[part], q=plan.q, groups=groups, alpha=ALPHA).flags == ()
    whole = audit_steps(
        seen.scores, seen.present, seen.noise, sigma=plan.noise, epsilon_of=epsilon_of
    )
    assert whole.flags == ()
    assert 0 < whole.bound.epsilon < whole.claimed < plan.epsilon


class NoNoise(PrivateEngine):
    def step(self, rng: FleetRng, step: int) -> None:
        self.optimizer.scale.zero_()
        super().step(rng, step)


class HalfNoise(PrivateEngine):
    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.optimizer.scale *= 0.5


class NoClip(PrivateEngine):
    """Noise for C, but nothing is clipped to it."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.clipper.bound = torch.full_like(self.clipper.bound, math.inf)


class LooseClip(PrivateEngine):
    """Each of two groups of weights is clipped to C, together √2 C."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.clipper.bound = self.clipper.bound * math.sqrt(2)


class SameNoise(PrivateEngine):
    """A stream that is opened anew with the same seed at each step."""

    def step(self, rng: FleetRng, step: int) -> None:
        super().step(rng, 0)


class NoiseTwice(PrivateEngine):
    """Each draw serves two steps, far apart."""

    def step(self, rng: FleetRng, step: int) -> None:
        super().step(rng, step % 80)


class NoiseOnceAgain(PrivateEngine):
    """A resumed training that has forgotten one step."""

    def step(self, rng: FleetRng, step: int) -> None:
        super().step(rng, 17 if step == 111 else step)


class RealisedBatch(PrivateEngine):
    """Divides by the records that are in the batch."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self._records: Tensor = torch.zeros(())

    def accumulate(self, losses: Callable[[], Tensor], counts: Tensor) -> Tensor:
        self._records = self._records + counts.sum(1)
        return super().accumulate(losses, counts)

    def step(self, rng: FleetRng, step: int) -> None:
        self.optimizer.batch = self._records.clamp_min(1.0)
        super().step(rng, step)
        self._records = torch.zeros(())


class QuietBiases(PrivateEngine):
    """Takes the noise of every bias off again."""

    def step(self, rng: FleetRng, step: int) -> None:
        network = self.clipper.network
        biases = [p for name, p in network.named_parameters() if name.endswith("bias")]
        sums = [getattr(p, "summed_grad").clone() for p in biases]  # noqa: B009

        def silence(*_: Any) -> None:
            for bias, total in zip(biases, sums, strict=True):
                bias.grad = total / self.optimizer.batch[:, None]

        mover = self.optimizer.original_optimizer
        # Runs before what reads the release, as a defect of the engine itself would.
        handle = mover.register_step_pre_hook(silence)
        mover._optimizer_step_pre_hooks.move_to_end(handle.id, last=False)
        try:
            super().step(rng, step)
        finally:
            handle.remove()


class SameStart(FleetRng):
    """Draws of every shape begin with the same numbers: one stream, opened for each weight."""

    def at(self, purpose: str, step: int = 0) -> FleetRng:
        if purpose != "noise":
            return super().at(purpose, step)
        return Reopened(self.keys, step)


class Reopened(FleetRng):
    def __init__(self, keys: Sequence[int], step: int) -> None:
        super().__init__(keys)
        self._step = step

    def normal(self, *shape: int, **settings: Any) -> Tensor:
        whole = FleetRng(self.keys).at("noise", self._step).normal(*shape, **settings)
        sizes = [p[0].numel() for p in Mlp(1, WIDTHS).parameters()]
        return torch.cat([whole[:, :size] for size in sizes], dim=1)[:, : whole.shape[1]]


def one_key(keys: list[int]) -> FleetRng:
    return FleetRng([keys[0]] * len(keys))


class Bounded(FleetRng):
    """Uniform noise of the right variance."""

    def at(self, purpose: str, step: int = 0) -> FleetRng:
        return Even(self.keys, step) if purpose == "noise" else super().at(purpose, step)


class Even(Reopened):
    def __init__(self, keys: Sequence[int], step: int) -> None:
        super().__init__(keys, step)
        self._opened = FleetRng(self.keys).at("noise", step)

    def normal(self, *shape: int, **settings: Any) -> Tensor:
        return (self._opened.uniform(*shape, **settings) - 0.5) * math.sqrt(12)


@pytest.mark.parametrize(
    ("settings", "flags"),
    [
        ({"engine_type": NoNoise}, {"guesses", "scale", "parameters"}),
        ({"engine_type": HalfNoise}, {"guesses", "scale", "parameters"}),
        ({"engine_type": NoClip}, {"guesses", "contribution"}),
        ({"engine_type": LooseClip}, {"contribution"}),
        ({"engine_type": SameNoise}, {"repeats", "steps"}),
        ({"engine_type": NoiseTwice}, {"repeats", "steps"}),
        ({"engine_type": NoiseOnceAgain}, {"repeats"}),
        ({"engine_type": RealisedBatch}, {"parameters"}),
        ({"engine_type": QuietBiases}, {"parameters"}),
        ({"rng": SameStart}, {"coordinates"}),
        ({"rng": one_key}, {"runs", "repeats"}),
        ({"rng": Bounded}, {"law"}),
    ],
    ids=lambda value: "+".join(sorted(value)) if isinstance(value, set) else None,
)
def test_a_defect_of_the_step_is_flagged(settings: dict[str, Any], flags: set[str]) -> None:
    assert flags <= set(judged(*stepped(**settings)).flags)


class NanPasses(TapClipper):
    """min(1, C/‖g‖) as it is often written: NaN passes."""

    def accumulate(self, losses: Callable[[], Tensor], counts: Tensor) -> Tensor:
        parameters, loss = list(self.network.parameters()), losses()
        sums = [torch.zeros_like(parameter) for parameter in parameters]
        for record in range(loss.shape[1]):
            found = torch.autograd.grad(loss[:, record].sum(), parameters, retain_graph=True)
            norm = torch.cat([g.flatten(1) for g in found], dim=1).norm(dim=1)
            factor = (self.bound / norm).clamp(max=1.0)
            for total, g in zip(sums, found, strict=True):
                total += g * factor.reshape(-1, *(1,) * (g.dim() - 1))
        for parameter, total in zip(parameters, sums, strict=True):
            parameter.summed_grad = total  # type: ignore[attr-defined]
        return loss.detach()


def test_a_nan_that_passes_the_clip_is_refused() -> None:
    """One record with a loss that is not a number."""
    weight = torch.tensor([[1.0, math.nan, 1.0]])
    x = FleetRng([1]).at("x").normal(3, WIDTHS[0])
    for clipper, passes in ((TapClipper, False), (NanPasses, True)):
        network = Mlp(1, WIDTHS)
        network.reset(FleetRng([0]), "plain", zero=False)
        one = clipper(network, torch.ones(1))
        one.accumulate(lambda n=network: n(x).square().sum(-1) * weight, torch.ones(1, 3))
        sums = [p.summed_grad for p in network.parameters()]  # type: ignore[attr-defined]
        assert any(not total.isfinite().all() for total in sums) == passes
    released = np.full((1, 8), math.nan)
    coins = np.arange(8)[None] % 2 == 0
    with pytest.raises(UsageError, match="finite"):
        judged(released, coins, np.zeros((1, 8, 2)))


# -- the sampler audit -------------------------------------------------------------------------


class Sampler:
    """Passes the sound one on; what is planted draws otherwise."""

    def __init__(self, rows: Sequence[int], q: Sequence[float], *, piece: int = 1024) -> None:
        self.sound = PoissonBatches(rows, q, piece=piece)

    def draw(self, rng: FleetRng, step: int) -> Iterator[tuple[Tensor, Tensor]]:
        yield from self.sound.draw(rng, step)


class Shuffled(Sampler):
    """Epochs over a shuffled table, in batches of equal size."""

    def draw(self, rng: FleetRng, step: int) -> Iterator[tuple[Tensor, Tensor]]:
        size = round(Q * RECORDS)
        epoch, place = divmod(step, RECORDS // size)
        order = rng.at("shuffle", epoch).uniform(RECORDS).argsort(1)
        index = order[:, place * size : (place + 1) * size]
        yield index, torch.ones_like(index, dtype=torch.bool)


class FixedSize(Sampler):
    """Batches of equal size without replacement, each drawn anew."""

    def draw(self, rng: FleetRng, step: int) -> Iterator[tuple[Tensor, Tensor]]:
        index = rng.at("fixed", step).uniform(RECORDS).argsort(1)[:, : round(Q * RECORDS)]
        yield index, torch.ones_like(index, dtype=torch.bool)


class CutShort(Sampler):
    """What does not fit the buffer is left out."""

    def draw(self, rng: FleetRng, step: int) -> Iterator[tuple[Tensor, Tensor]]:
        yield next(super().draw(rng, step))


class HeldOver(Sampler):
    """One batch serves two steps."""

    def draw(self, rng: FleetRng, step: int) -> Iterator[tuple[Tensor, Tensor]]:
        yield from super().draw(rng, step // 2)


class NoEmptyBatch(Sampler):
    """Draws again until somebody is in."""

    def draw(self, rng: FleetRng, step: int) -> Iterator[tuple[Tensor, Tensor]]:
        pieces = list(super().draw(rng, step))
        extra = 1
        while not all(sum(inside[r].sum() for _, inside in pieces) > 0 for r in range(rng.runs)):
            pieces = list(super().draw(rng, step + 10_000 * extra))
            extra += 1
        yield from pieces


CATEGORIES = np.repeat([0, 1, 2, 3], [24, 10, 4, 2])


class ByCategory(Sampler):
    """Train-by-sampling: a category at even odds, then rows that have it."""

    def draw(self, rng: FleetRng, step: int) -> Iterator[tuple[Tensor, Tensor]]:
        opened = rng.at("category", step)
        chosen = (opened.uniform(1) * 4).long()
        groups = torch.from_numpy(CATEGORIES)
        rate = Q * RECORDS / torch.bincount(groups)[groups]
        inside = (groups == chosen) & (opened.uniform(RECORDS) < rate)
        index = torch.arange(RECORDS).expand(inside.shape)
        yield torch.where(inside, index, 0), inside


class Balanced(Sampler):
    """Rare categories at a higher rate, the same number of rows on average."""

    def draw(self, rng: FleetRng, step: int) -> Iterator[tuple[Tensor, Tensor]]:
        groups = torch.from_numpy(CATEGORIES)
        weight = torch.bincount(groups)[groups].float() ** -0.5
        rate = (weight / weight.sum() * Q * RECORDS).clamp(max=1.0)
        inside = rng.at("balanced", step).uniform(RECORDS) < rate
        yield torch.where(inside, torch.arange(RECORDS).expand(inside.shape), 0), inside


def batches_seen(kind: type[Sampler], q: float = Q, piece: int = 1024) -> np.ndarray:
    watched = WatchedBatches(kind([RECORDS] * 2, [q] * 2, piece=piece), RECORDS)
    rng = FleetRng([5, 6])
    for step in range(300):
        for _ in watched.draw(rng, step):
            pass
    return watched.observed()


def sampled(kind: type[Sampler], q: float = Q, **settings: Any) -> SamplerAudit:
    bits = batches_seen(kind, q, settings.pop("piece", 1024))
    return audit_sampler(bits, q=q, alpha=ALPHA, **settings)


@pytest.mark.parametrize(
    ("kind", "settings", "flags"),
    [
        (Shuffled, {}, {"batch sizes", "records", "steps"}),
        (FixedSize, {}, {"batch sizes"}),
        (CutShort, {"piece": 8}, {"batch sizes"}),
        (HeldOver, {}, {"steps", "batches again"}),
        (NoEmptyBatch, {"q": 0.02}, {"rate"}),
        (ByCategory, {}, {"batch sizes", "records", "records together"}),
        (ByCategory, {"groups": CATEGORIES}, {"group sizes"}),
        (Balanced, {}, {"records"}),
        (Balanced, {"groups": CATEGORIES}, {"group rates"}),
    ],
)
def test_a_sampler_that_is_not_poisson_is_flagged(
    kind: type[Sampler], settings: dict[str, Any], flags: set[str]
) -> None:
    honest = {**settings, "piece": 1024}
    assert sampled(Sampler, **honest).flags == ()
    assert flags <= set(sampled(kind, **settings).flags)


class Loader:
    """Somebody else's sampler."""

    def draw(self, rng: FleetRng, step: int) -> Iterator[tuple[Tensor, Tensor]]:
        yield torch.zeros(1, 1).long(), torch.ones(1, 1).bool()


def test_a_sampler_that_is_not_ours_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fleet_module, "PoissonBatches", lambda *args, **settings: Loader())
    with pytest.raises(RefusedError, match="Poisson"):
        train_fleet(recipe("vae"), [seat(4.0)])


def test_a_fleet_that_shuffles_is_flagged(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted below everything: the class that the fleet uses draws shuffled epochs."""

    def draw(self: PoissonBatches, rng: FleetRng, step: int) -> Iterator[tuple[Tensor, Tensor]]:
        epoch, place = divmod(step, ROWS // 32)
        order = rng.at("shuffle", epoch).uniform(ROWS).argsort(1)
        index = order[:, place * 32 : (place + 1) * 32]
        yield index, torch.ones_like(index, dtype=torch.bool)

    monkeypatch.setattr(batches_module.PoissonBatches, "draw", draw)
    watch = StepCanary(key=2)
    trained = train_fleet(recipe("vae", privacy=LONG), [seat(4.0)], callbacks=[watch])
    audit = audit_sampler(watch.observed().batches, q=trained[0].plan.q, alpha=ALPHA)
    assert {"batch sizes", "records", "steps"} <= set(audit.flags)


# -- noninterference ---------------------------------------------------------------------------


class Deaf(PrivateEngine):
    """Evaluates losses, so that a model's code sees its rows, and adds nothing of them."""

    def accumulate(self, losses: Callable[[], Tensor], counts: Tensor) -> Tensor:
        return losses().detach()


def left_by(rows: Table, model: str, **settings: Any) -> dict[str, Any]:
    """All that a run keeps, its times apart."""
    trained = train_fleet(recipe(model, **settings), [Seat(rows, 4.0, seed=3)])[0]
    events = [dataclasses.replace(event, when="") for event in trained.ledger.events]
    return {
        "weights": {k: v.tolist() for k, v in trained.generator.state_dict().items()},
        "schema": trained.codec.schema.to_json(),
        "codec": trained.codec.to_dict(),
        "layout": trained.codec.layout,
        "plan": trained.plan.to_dict(),
        "ledger": [event.to_dict() for event in events],
        "executed": trained.executed,
        "sample": sample_table(trained.generator, trained.codec, 5, rng=1).frame.to_json(),
    }


@pytest.fixture
def cut(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Every mechanism answers with its noise alone: counts are taken for 0, sums for nothing."""
    answer = HistogramNoise.__call__
    monkeypatch.setattr(
        HistogramNoise, "__call__", lambda self, counts: answer(self, np.zeros_like(counts))
    )
    monkeypatch.setattr("dpsynth.models.base.PrivateEngine", Deaf)
    return monkeypatch


def two_tables(schema: Any = SCHEMA) -> tuple[Table, Table]:
    """No row in common, and not the same number of rows."""
    return table(ROWS, 0, schema), table(ROWS - 130, 1, schema)


@pytest.mark.parametrize("declared", [True, False], ids=["rows declared", "rows measured"])
@pytest.mark.parametrize("model", HERE)
def test_rows_reach_a_run_through_mechanisms_alone(
    model: str, declared: bool, cut: pytest.MonkeyPatch
) -> None:
    schema = SCHEMA if declared else dataclasses.replace(SCHEMA, expected_rows=None)
    first, second = (left_by(rows, model) for rows in two_tables(schema))
    assert first == second


@pytest.mark.parametrize("model", ["vae", "gan", "diffusion"])
def test_without_the_cut_rows_do_reach_it(model: str) -> None:
    """Else the test above could not fail."""
    first, second = (left_by(rows, model) for rows in two_tables())
    assert first["weights"] != second["weights"]
    assert first["codec"] != second["codec"]


def differs(monkeypatch: pytest.MonkeyPatch, model: str = "vae", **settings: Any) -> set[str]:
    """What two tables leave different with all mechanisms cut."""
    first, second = (left_by(rows, model, **settings) for rows in two_tables())
    return {name for name in first if first[name] != second[name]}


class OpenEncoder(Vae):
    """Only the decoder is in the private network; the encoder has an optimizer of its own."""

    def __init__(self, layout: Layout, runs: int, **options: Any) -> None:
        super().__init__(layout, runs, **options)
        self.encoder = self.network.get_submodule("encoder")
        self.network = nn.ModuleDict({"decoder": self.network.get_submodule("decoder")})

    def _part(self, name: str) -> Mlp:
        part = self.encoder if name == "encoder" else self.network.get_submodule(name)
        assert isinstance(part, Mlp)
        return part

    def configure_optimizers(self) -> Any:
        encoder = self.adam(self.encoder, self.lr)
        return [*super().configure_optimizers(), encoder]

    def record_loss(self, codes: Tensor, rng: FleetRng) -> Tensor:
        loss = super().record_loss(codes, rng)
        if loss.requires_grad and hasattr(self, "_optimizers"):
            gradients = torch.autograd.grad(
                loss.sum(), list(self.encoder.parameters()), retain_graph=True
            )
            for parameter, gradient in zip(self.encoder.parameters(), gradients, strict=True):
                parameter.grad = gradient
        return loss

    public_every = 1  # type: ignore[assignment]

    def public_step(self, rng: FleetRng) -> None:
        self._optimizers[1].step()


class KeptLatents(Vae):
    """Keeps the mean latent of the rows it saw, to sample from: taken for post-processing."""

    def __init__(self, layout: Layout, runs: int, **options: Any) -> None:
        super().__init__(layout, runs, **options)
        self.register_buffer("latents", torch.zeros(runs, self.latent))

    def record_loss(self, codes: Tensor, rng: FleetRng) -> Tensor:
        with torch.no_grad():
            hot = self.layout.one_hot(codes, self.prior_logits.dtype)
            seen = self._part("encoder")(hot)[..., : self.latent].mean(1)
            self.get_buffer("latents").lerp_(seen, 0.1)
        return super().record_loss(codes, rng)


class BestWeights(Vae):
    """Leans towards the weights at which the rows' own loss was small."""

    mass = 0.0
    public_every = 1  # type: ignore[assignment]

    def public_step(self, rng: FleetRng) -> None:
        with torch.no_grad():
            loss = float(self.record_loss(self._codes.long(), rng).mean())
        share = math.exp(-loss)
        self.mass += share
        held = {k: v.clone() for k, v in self.network.state_dict().items()}
        before = getattr(self, "kept", held)
        self.kept = {k: before[k].lerp(v, share / self.mass) for k, v in held.items()}

    def finish(self) -> None:
        super().finish()
        if hasattr(self, "kept"):
            self.network.load_state_dict(self.kept)


@pytest.mark.parametrize("family", [OpenEncoder, KeptLatents, BestWeights])
def test_a_model_that_reads_rows_past_the_engine_is_seen(
    family: type[Generator], cut: pytest.MonkeyPatch
) -> None:
    cut.setitem(FAMILIES, "vae", family)
    assert "weights" in differs(cut, privacy={"steps": 20})


@pytest.mark.parametrize(("family", "open_weights"), [(Vae, False), (OpenEncoder, True)])
def test_weights_outside_the_private_network_are_not_moved_by_rows(
    family: type[Vae], open_weights: bool
) -> None:
    layout = Layout((3, 4, 2), target=2)
    model = family(layout, 1, hidden=[4], latent=2)
    model.reset(FleetRng([0]))
    private = {id(p) for p in model.network.parameters()}
    outside = [p for p in model.parameters() if id(p) not in private]
    # A term that is 0, so that the law also speaks of a family without such weights.
    anchor = torch.zeros((), requires_grad=True)
    loss = model.record_loss(random_codes(layout, 1, 5), FleetRng([1]).at("d")).sum() + anchor
    found = torch.autograd.grad(loss, [anchor, *outside], allow_unused=True)[1:]
    assert any(gradient is not None for gradient in found) == open_weights


def raw_bounds(fit: Callable[..., Codec]) -> Callable[..., Codec]:
    """Min and max of the rows instead of the declared bounds."""

    def bounded(seen: Table, *args: Any, **settings: Any) -> Codec:
        pay = seen.frame["pay"]
        facts = {"lower": float(pay.min()), "upper": float(pay.max())}
        return fit(redeclared(seen, "pay", **facts), *args, **settings)

    return bounded


def raw_levels(fit: Callable[..., Codec]) -> Callable[..., Codec]:
    """A level that is in the rows, whether it was declared or not."""

    def opened(seen: Table, *args: Any, **settings: Any) -> Codec:
        rows = redeclared(seen, "job", levels=tuple(sorted(seen.frame["job"].dropna().unique())))
        return fit(rows, *args, **settings)

    return opened


def redeclared(rows: Table, name: str, **facts: Any) -> Table:
    """The same rows under other facts on one column."""
    column = dataclasses.replace(rows.schema[name], **facts)
    columns = tuple(column if c.name == name else c for c in rows.schema.columns)
    frame = rows.frame
    if column.levels:
        frame = frame.assign(**{name: pd.Categorical(frame[name], categories=column.levels)})
    return Table(dataclasses.replace(rows.schema, columns=columns), frame)


@pytest.mark.parametrize("plant", [raw_bounds, raw_levels])
def test_a_codec_fitted_on_raw_rows_is_seen(
    plant: Callable[..., Any], cut: pytest.MonkeyPatch
) -> None:
    """The second table has no nurse, and pays up to 60. The ledger alone would not tell."""
    cut.setattr(Codec, "fit", plant(Codec.fit))
    encode = Codec.encode
    cut.setattr(Codec, "encode", lambda self, rows: encode(self, rewritten(rows, self.schema)))
    first, rows = two_tables()
    few = rows.frame[(rows.frame["job"] != "nurse") & (rows.frame["pay"] < 60)]
    second = Table(rows.schema, few.reset_index(drop=True))
    left, right = (left_by(t, "vae") for t in (first, second))
    assert left["schema"] != right["schema"]
    assert left["sample"] != right["sample"]
    assert left["ledger"] == right["ledger"]


def rewritten(rows: Table, schema: Any) -> Table:
    """Rows under the schema that a planted codec made up."""
    job = pd.Categorical(rows.frame["job"], categories=schema["job"].levels)
    return Table(schema, rows.frame.assign(job=job))


class BatchFromRows(PrivateEngine):
    """The expected batch follows from how many rows there are, not from how many are declared."""

    def __init__(self, network: nn.Module, optimizer: Any, *, batch: Any, **settings: Any) -> None:
        actual = [size * BatchFromRows.rows / ROWS for size in batch]
        super().__init__(network, optimizer, batch=actual, **settings)

    rows = ROWS


def test_an_expected_batch_from_the_number_of_rows_is_flagged(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Twice the declared rows: the declared number is what sums are divided by."""
    rows = table(2 * ROWS)
    for engine, flagged in ((PrivateEngine, False), (BatchFromRows, True)):
        BatchFromRows.rows = len(rows)
        monkeypatch.setattr("dpsynth.models.base.PrivateEngine", engine)
        watch = StepCanary(key=3)
        made = recipe("vae", privacy=LONG)
        plan = train_fleet(made, [Seat(rows, 4.0, seed=1)], callbacks=[watch])[0].plan
        seen = watch.observed()
        audit = audit_steps(
            seen.scores,
            seen.present,
            seen.noise,
            sigma=plan.noise,
            epsilon_of=lambda s: 1 / s,
            alpha=ALPHA,
        )
        assert ({"scale", "parameters"} <= set(audit.flags)) == flagged
        assert bool(audit.flags) == flagged


# -- refused before a row is read --------------------------------------------------------------


def test_facts_read_off_the_rows_are_refused() -> None:
    age = dataclasses.replace(SCHEMA["age"], provenance="data")
    columns = (age, *SCHEMA.columns[1:])
    with pytest.raises(RefusedError, match="age"):
        train_fleet(recipe("vae"), [seat(4.0, columns=columns)])


def test_a_level_that_nobody_declared_is_refused_or_sent_elsewhere() -> None:
    """Never a level of its own: that one row would then show in the domain."""
    rows = frame()
    rows.loc[7, "job"] = "poet"
    with pytest.raises(UsageError, match="job"):
        Table.from_frame(rows, SCHEMA)
    lenient = Table.from_frame(rows, SCHEMA, strict=False)
    assert list(lenient.frame["job"].cat.categories) == list(SCHEMA["job"].levels)


class Chooses(Callback):
    """Whatever has something to watch."""

    monitor = "loss"


@pytest.mark.parametrize(
    "callback",
    [EarlyStopping("loss"), ModelCheckpoint(monitor="loss"), Chooses()],
    ids=["early stopping", "best checkpoint", "any choice"],
)
def test_choosing_by_a_private_loss_is_refused(callback: Callback) -> None:
    with pytest.raises(RefusedError, match=type(callback).__name__):
        train_fleet(recipe("vae"), [seat(4.0)], callbacks=[callback])


@pytest.mark.parametrize("factor", [1.0, 1.5, 100.0])
def test_a_delta_of_one_over_n_or_more_is_refused(factor: float) -> None:
    PrivacyPlan(1.0, 0.99 / ROWS, ROWS)
    with pytest.raises(UsageError, match="delta"):
        PrivacyPlan(1.0, factor / ROWS, ROWS)
    with pytest.raises(UsageError, match="delta"):
        train_fleet(recipe("vae", privacy={"delta": factor / ROWS}), [seat(4.0)])


# -- what is executed is what is paid ----------------------------------------------------------


class WholeBlocks(Vae):
    """Looks at the budget before a block of steps only, so the last block runs over."""

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        for _ in range(self.block):
            self._private_step(int(self.completed))


@pytest.mark.parametrize("block", [1, 2, 3, 7])
def test_no_step_is_taken_that_was_not_paid(block: int) -> None:
    watch = StepCanary(key=1)
    made = recipe("vae", options={"block": block})
    trained = train_fleet(made, [seat(4.0)], callbacks=[watch])[0]
    paid = sum(e.steps for e in trained.ledger.events if e.what.startswith("dpsgd"))
    assert watch.observed().scores.shape[1] == trained.executed.steps == paid == 5


def test_a_last_block_that_overspends_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FAMILIES, "vae", WholeBlocks)
    watch = StepCanary(key=1)
    with pytest.raises(KeyboardInterrupt):  # a training that did not end as planned leaves no run
        train_fleet(recipe("vae", options={"block": 2}), [seat(4.0)], callbacks=[watch])
    assert watch.observed().scores.shape[1] > 5


def test_a_calibration_that_overshoots_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hundredth less noise than the target needs: nothing is trained with it."""
    honest = PrivacyPlan.calibrate
    train_fleet(recipe("vae"), [seat(4.0)])

    def short(self: PrivacyPlan) -> PrivacyPlan:
        plan = honest(self)
        return dataclasses.replace(plan, sigma=0.99 * plan.noise)

    monkeypatch.setattr(PrivacyPlan, "calibrate", short)
    with pytest.raises(RefusedError, match="above the target 4"):
        train_fleet(recipe("vae"), [seat(4.0)])


def test_runs_of_a_fleet_share_no_weights_and_no_noise() -> None:
    """A reference model beside the audited one, as a teacher is not beside its student."""
    pair = [seat(4.0), dataclasses.replace(seat(4.0), role="reference")]
    first, second = (one.generator for one in train_fleet(recipe("vae"), pair))
    places = [
        {v.untyped_storage().data_ptr() for v in g.state_dict().values()} for g in (first, second)
    ]
    assert not places[0] & places[1]
    for left, right in zip(first.parameters(), second.parameters(), strict=True):
        assert (left != right).all()


# -- GAN ---------------------------------------------------------------------------------------

LAYOUT = Layout((3, 4, 2), target=2)
BOUND = torch.tensor([0.05, 0.3], dtype=torch.float64)


def gap(clipper: type[TapClipper], family: type[Gan] = Gan) -> float:
    """Greatest distance of a clipper's sums from one-at-a-time autograd."""
    sums = []
    rows, counts = random_codes(LAYOUT, 2, 6), torch.ones(2, 6, dtype=torch.float64)
    draws = FleetRng([1, 2], dtype=torch.float64)
    for exact in (True, False):
        model = gan(family)
        losses = lambda m=model: m.record_loss(rows, draws.at("draws"))  # noqa: E731
        parameters = list(model.network.parameters())
        if exact:
            sums.append(sum_clipped(record_gradients(losses, parameters), BOUND.tolist(), counts))
        else:
            clipper(model.network, BOUND).accumulate(losses, counts)
            sums.append([p.summed_grad for p in parameters])  # type: ignore[attr-defined]
    return max(float((a - b).abs().max()) for a, b in zip(*sums, strict=True))


def gan(family: type[Gan] = Gan) -> Gan:
    made = make_fleet("gan", LAYOUT, [100, 101])
    assert isinstance(made, Gan)
    made.__class__ = family
    return made


class TwoPasses(Gan):
    """Record and fakes in two forward passes."""

    def record_loss(self, codes: Tensor, rng: FleetRng) -> Tensor:
        whole = self.network
        passes = lambda x: torch.cat([whole(x[:, :, :1]), whole(x[:, :, 1:])], dim=2)  # noqa: E731
        vars(self)["network"] = passes
        try:
            return super().record_loss(codes, rng)
        finally:
            del vars(self)["network"]


class LastPassOnly(TapClipper):
    """Holds what the last pass left: the fakes' gradients are taken for the record's."""

    def reduce(self, pairs: Any, *rest: Any, **settings: Any) -> None:
        last = [(layer, a[:, :, 1:], b[:, :, 1:]) for layer, a, b in pairs]
        super().reduce(last, *rest, **settings)


class WrongForward(TapClipper):
    """Pairs a record's gradient with what another record put in."""

    def reduce(self, pairs: Any, *rest: Any, **settings: Any) -> None:
        rolled = [(layer, a.roll(1, dims=1), b) for layer, a, b in pairs]
        super().reduce(rolled, *rest, **settings)


@pytest.mark.parametrize("family", [Gan, TwoPasses])
def test_record_and_fakes_are_one_contribution(family: type[Gan]) -> None:
    assert gap(TapClipper, family) < 1e-10
    for planted in (LastPassOnly, WrongForward):
        assert gap(planted, family) > 1e-3


def test_gradients_beside_the_engine_are_lost_and_seen_to_be() -> None:
    """Fakes' loss by a backward of its own: the release overwrites what it left in `p.grad`."""
    moves = []
    for whole in (True, False):
        model = gan()
        network = model.network
        before = [p.detach().clone() for p in network.parameters()]
        mover = torch.optim.SGD(network.parameters(), lr=1.0)
        settings: dict[str, Any] = {"sigma": [0.0] * 2, "bound": [math.inf] * 2, "batch": [6.0] * 2}
        engine = PrivateEngine(network, mover, **settings)
        x = FleetRng([1, 2], dtype=torch.float64).at("x").normal(6, 3, LAYOUT.width)
        real = lambda n=network, x=x: F.softplus(-n(x[:, :, 0]).squeeze(-1))  # noqa: E731
        fake = lambda n=network, x=x: F.softplus(n(x[:, :, 1:]).squeeze(-1)).mean(-1)  # noqa: E731
        counts = torch.ones(2, 6, dtype=torch.float64)
        if whole:
            engine.accumulate(lambda r=real, f=fake: r() + f(), counts)
        else:
            fake().sum().backward()
            engine.accumulate(real, counts)
        gradients = torch.autograd.grad((real() + fake()).sum(), list(network.parameters()))
        engine.step(FleetRng([1, 2], dtype=torch.float64), 0)
        after = [b - p.detach() for b, p in zip(before, network.parameters(), strict=True)]
        pairs = zip(after, gradients, strict=True)
        moves.append(max(float((a - g / 6).abs().max()) for a, g in pairs))
    assert moves[0] < 1e-12
    assert moves[1] > 1e-3


class WrongSign(Gan):
    """softplus(D(x)) for the record too."""

    def record_loss(self, codes: Tensor, rng: FleetRng) -> Tensor:
        kept: list[Any] = []
        handle = self.network.register_forward_hook(lambda m, i, out: kept.append(out))
        loss = super().record_loss(codes, rng)
        handle.remove()
        real = kept[-1].squeeze(-1)[..., 0]
        return loss - F.softplus(-real) + F.softplus(real)


@pytest.mark.parametrize(("family", "right"), [(Gan, True), (WrongSign, False)])
def test_a_discriminator_is_pulled_up_at_records_and_down_at_fakes(
    family: type[Gan], right: bool
) -> None:
    model = gan(family)
    kept: list[Any] = []
    model.network.register_forward_hook(lambda m, i, out: kept.append(out))
    draws = FleetRng([1, 2], dtype=torch.float64).at("draws")
    loss = model.record_loss(random_codes(LAYOUT, 2, 6), draws)
    slope = torch.autograd.grad(loss.sum(), kept[-1])[0].squeeze(-1)
    assert bool((slope[..., 0] < 0).all()) == right
    assert (slope[..., 1:] > 0).all()


# -- files that would run code -----------------------------------------------------------------


class Evil:
    """Makes a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return Path.touch, (self.mark,)


class Stop(Callback):
    """Ctrl-C after the first block."""

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        raise KeyboardInterrupt


def test_a_checkpoint_that_would_run_code_does_not(tmp_path: Path) -> None:
    state, mark = tmp_path / "state", tmp_path / "mark"
    with pytest.raises(KeyboardInterrupt):
        train_fleet(
            recipe("vae"),
            [seat(4.0)],
            state=state,
            callbacks=[LastCheckpoint(state, seconds=0), Stop()],
        )
    torch.save({"state_dict": Evil(mark)}, state / "last.ckpt")
    with pytest.raises(UsageError, match="holds more than tensors"):
        train_fleet(recipe("vae"), [seat(4.0)], state=state)
    assert not mark.exists()
    torch.load(state / "last.ckpt", weights_only=False)
    assert mark.exists()


def test_weights_that_would_run_code_do_not(tmp_path: Path) -> None:
    folder, mark = tmp_path / "run", tmp_path / "mark"
    run = Run.of(train_fleet(recipe("vae"), [seat(4.0)])[0])
    harm = pickle.dumps(Evil(mark))
    run.save(folder, {"model.safetensors": harm})
    with pytest.raises(UsageError):
        Run.load(folder)
    assert not mark.exists()
    pickle.loads(harm)
    assert mark.exists()


class Watched(Callback):
    """Logs how well the private rows are fitted, as a validation loop would."""

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        rows = pl_module._codes[:, :8].long()
        loss = pl_module.record_loss(rows, pl_module._rng.at("watched"))
        pl_module.log_dict({"validation_loss": float(loss.mean())})


def test_validation_losses_of_private_rows_are_not_logged() -> None:
    with pytest.raises(RefusedError, match="log 'validation_loss': a figure of private rows"):
        train_fleet(recipe("vae"), [seat(4.0)], callbacks=[Watched()])
    train_fleet(recipe("vae"), [seat(math.inf)], callbacks=[Watched()])
