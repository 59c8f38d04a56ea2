"""Laws that every generator keeps: those that privacy rests on, and those that users rely on."""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from fleets import (
    TRAINED,
    VARIANTS,
    Start,
    make_fleet,
    random_codes,
    random_marginals,
    random_mixture,
)
from oracles import chi_square
from torch import Tensor

from dpsynth.checks import UsageError
from dpsynth.codec import Layout
from dpsynth.mixture import Mixture
from dpsynth.models import Generator
from dpsynth.models.diffusion import RATES
from dpsynth.randomness import FleetRng
from dpsynth.training.recipe import FAMILIES

LAYOUT = Layout((3, 4, 2, 5), target=2)
NO_TARGET = Layout((3, 4, 2, 5), target=None)
# A numeric target: many groups, most of them empty.
GAPS = Layout((3, 6, 4), target=1)
USED = torch.tensor([*(1, 0, 1), *(1, 0, 1, 0, 0, 1), *(1, 1, 1, 0)]).bool()
# More target levels than components can belong to.
MANY = Layout((3, 10, 4), target=1)
KEYS = [31, 32, 33]
# One in ten thousand, shared among a few thousand checks.
LEAST = 1e-4 / 3000

families = pytest.mark.parametrize("family", VARIANTS)
both = pytest.mark.parametrize("components", [0, 6])


def draws(keys: list[int], purpose: str = "draws", dtype: torch.dtype = torch.float64) -> FleetRng:
    return FleetRng(keys, dtype=dtype).at(purpose, 0)


def loss_of(model: Generator, codes: Tensor, keys: list[int]) -> Tensor:
    return model.record_loss(codes, draws(keys)).detach()


# What privacy rests on


@pytest.mark.parametrize("layout", [LAYOUT, NO_TARGET])
@families
def test_the_loss_of_a_record_knows_no_other_record(family: str, layout: Layout) -> None:
    """Clipping bounds one record's influence only if each record has a loss of its own."""
    model, codes = make_fleet(family, layout, KEYS), random_codes(layout, 3, 8)
    before = loss_of(model, codes, KEYS)
    assert before.shape == (3, 8)
    assert before.isfinite().all()
    for record in range(8):
        others = random_codes(layout, 3, 8, seed=record + 1)
        others[:, record] = codes[:, record]
        after = loss_of(model, others, KEYS)
        torch.testing.assert_close(after[:, record], before[:, record], rtol=1e-12, atol=1e-12)
    changed = loss_of(model, random_codes(layout, 3, 8, seed=99), KEYS)
    assert (changed != before).any()


@pytest.mark.parametrize("family", [f"{name}+{k}" for name in TRAINED for k in (0, 6)])
def test_rows_reach_the_private_network_alone(family: str) -> None:
    """Weights outside of `network` are not clipped, so no loss of a record may move them."""
    model, codes = make_fleet(family, LAYOUT, KEYS), random_codes(LAYOUT, 3, 5)
    private = {id(p) for p in model.network.parameters()}
    outside = [p for p in model.parameters() if id(p) not in private]
    loss = model.record_loss(codes, draws(KEYS)).sum()
    inside = torch.autograd.grad(loss, list(model.network.parameters()), retain_graph=True)
    assert all((gradient != 0).any() for gradient in inside)
    if outside:
        moved = torch.autograd.grad(loss, outside, allow_unused=True)
        assert all(gradient is None for gradient in moved)


@families
def test_a_run_feels_no_other_run(family: str) -> None:
    codes = random_codes(LAYOUT, 3, 6)
    model = make_fleet(family, LAYOUT, KEYS)
    before, rows = loss_of(model, codes, KEYS), model.sample(20, FleetRng(KEYS).at("s"))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter[1] = parameter[1] * 3 + 1
        model.prior_logits[1] = model.prior_logits[1].flip(-1) * 2
        model.given_logits[1] = model.given_logits[1].flip(0) * 2
        if model.components:
            model.weight_logits[1, :4] = model.weight_logits[1, :4].flip(0) * 2
            model.component_logits[1, :4] = model.component_logits[1, :4].flip(0) * 2
    moved = codes.clone()
    moved[1] = random_codes(LAYOUT, 3, 6, seed=5)[1]
    keys = [KEYS[0], 77, KEYS[2]]
    after, other = loss_of(model, moved, keys), model.sample(20, FleetRng(keys).at("s"))
    torch.testing.assert_close(after[[0, 2]], before[[0, 2]], rtol=1e-12, atol=1e-12)
    assert torch.equal(other[[0, 2]], rows[[0, 2]])
    assert (after[1] != before[1]).all()


@pytest.mark.parametrize("layout", [LAYOUT, NO_TARGET])
@families
def test_a_fleet_is_its_runs_side_by_side(family: str, layout: Layout) -> None:
    """The same keys, the same numbers: a run of three, and the same run alone."""
    codes = random_codes(layout, 3, 6)
    fleet = make_fleet(family, layout, KEYS)
    together = loss_of(fleet, codes, KEYS)
    rows = fleet.sample(40, FleetRng(KEYS, dtype=torch.float64))
    for run, key in enumerate(KEYS):
        alone = make_fleet(family, layout, [key])
        for name, value in alone.state_dict().items():
            if name != "completed":
                assert torch.equal(value[0], fleet.state_dict()[name][run])
        torch.testing.assert_close(
            loss_of(alone, codes[run : run + 1], [key]), together[run : run + 1]
        )
        assert torch.equal(alone.sample(40, FleetRng([key], dtype=torch.float64))[0], rows[run])


# Samples


@pytest.mark.parametrize("layout", [LAYOUT, NO_TARGET, Layout((4,), 0), Layout((4,), None)])
@families
def test_samples_are_codes(family: str, layout: Layout) -> None:
    model = make_fleet(family, layout, KEYS, double=False)
    for rows in (1, 7):
        codes = model.sample(rows, FleetRng(KEYS))
        assert codes.shape == (3, rows, layout.columns)
        assert codes.dtype == torch.int64
        assert ((codes >= 0) & (codes < torch.tensor(layout.levels))).all()


@families
def test_many_rows_are_drawn_in_pieces_and_none_twice(family: str) -> None:
    layout = Layout((200, 200, 2), target=2)
    model = make_fleet(family, layout, [1], double=False)
    codes = model.sample(9000, FleetRng([1]))[0].numpy()
    assert codes.shape == (9000, 3)
    same = (codes[:800] == codes[8192:8992]).all(1).mean()
    assert same < 0.05
    assert (codes[:2000] == codes[2048:4048]).all(1).mean() < 0.05


@families
def test_the_key_decides_the_table(family: str) -> None:
    model = make_fleet(family, LAYOUT, KEYS, double=False)
    first, again = (model.sample(50, FleetRng(KEYS)) for _ in range(2))
    assert torch.equal(first, again)
    other = model.sample(50, FleetRng([k + 100 for k in KEYS]))
    assert all((other[run] != first[run]).any() for run in range(3))


@pytest.mark.parametrize("jitter", [0.0, 4.0])
@families
def test_unused_levels_are_never_drawn(family: str, jitter: float) -> None:
    """Whatever the weights, and whatever the noise has put on the target's empty levels."""
    model = make_fleet(family, GAPS, KEYS, used=USED, jitter=jitter, double=False)
    tables = [random_marginals(GAPS, key) for key in KEYS]
    found = [spilled(random_mixture(GAPS, key, USED), key) for key in KEYS]
    for surveyed in (None, found):
        model.prepare(tables, [USED] * len(KEYS), FleetRng(KEYS), surveyed)
        codes = model.sample(4000, FleetRng(KEYS))
        allowed = [m.nonzero().flatten() for m in USED.split(list(GAPS.levels))]
        for j, levels in enumerate(allowed):
            assert torch.isin(codes[..., j], levels).all()


def spilled(mixture: Mixture, key: int) -> Mixture:
    """The same with mass on unused levels of all columns but the target."""
    levels = (mixture.levels + random_mixture(GAPS, key).levels) / 2
    block = slice(GAPS.offsets[1], GAPS.offsets[1] + GAPS.levels[1])
    levels[:, block] = mixture.levels[:, block]
    return Mixture(mixture.weight, levels)


@families
def test_what_is_given_is_in_every_row(family: str) -> None:
    model = make_fleet(family, LAYOUT, KEYS, double=False)
    assert LAYOUT.target in model.conditions()
    for column in model.conditions():
        for level in range(LAYOUT.levels[column]):
            codes = model.sample(30, FleetRng(KEYS), {column: level})
            assert (codes[..., column] == level).all()
            free = [j for j in range(LAYOUT.columns) if j != column]
            assert all(codes[..., j].unique().numel() > 1 for j in free)
    both = {column: LAYOUT.levels[column] - 1 for column in model.conditions()}
    codes = model.sample(30, FleetRng(KEYS), both)
    assert all((codes[..., column] == level).all() for column, level in both.items())
    assert make_fleet(family, NO_TARGET, KEYS).conditions() <= frozenset(range(4))


def assert_follows(rows: np.ndarray, start: Start, columns: Sequence[int], seen: Any) -> None:
    """A table of some columns of the rows against its law."""
    law = start.table(columns, seen)
    places = np.ravel_multi_index(tuple(rows[:, columns].T), law.shape)
    counts = np.bincount(places, minlength=law.size)
    assert chi_square(counts, law.ravel()) > LEAST, (columns, seen)


# A copula starts from correlations with the target, and graphical models keep few rows: theirs
# have tests of their own.
PRODUCTS = [name for name in VARIANTS if name not in ("copula+0", "mst+0", "aim+0")]


@pytest.mark.parametrize("layout", [LAYOUT, NO_TARGET, MANY], ids=["few", "none", "many"])
@pytest.mark.parametrize("family", PRODUCTS)
def test_untrained_samples_follow_what_they_start_from(family: str, layout: Layout) -> None:
    """Tables of one, two and three columns, of all rows and of a target level."""
    model = make_fleet(family, layout, KEYS[:2], jitter=0.0, double=False)
    target = layout.target
    for level in (None,) if target is None else (None, 1):
        seen = {} if level is None or target is None else {target: level}
        codes = model.sample(6000, FleetRng(KEYS[:2]), seen).numpy()
        for run, key in enumerate(KEYS[:2]):
            start = Start.of(family, layout, key)
            asked = {} if family.startswith(("independent", "copula")) else seen
            for size in (1, 2, 3):
                for columns in itertools.combinations(range(layout.columns), size):
                    if not (level is not None and target in columns):
                        assert_follows(codes[run], start, list(columns), asked)


# Reconciliation

RECONCILED = [name for name in VARIANTS if name.split("+")[0] in (*TRAINED, "mixture")]


@pytest.fixture
def quick_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer trees for the head that draws labels."""
    monkeypatch.setattr("dpsynth.models.labels._TREES", 8)


@pytest.mark.usefixtures("quick_labels")
@pytest.mark.parametrize("layout", [LAYOUT, NO_TARGET, MANY], ids=["few", "none", "many"])
@pytest.mark.parametrize("family", RECONCILED)
def test_reconciled_samples_have_the_tables_whatever_the_weights(
    family: str, layout: Layout
) -> None:
    """Each column alone, and given the target where it is given: nearer than unreconciled ones."""
    close, free = (
        make_fleet(family, layout, KEYS[:1], reconcile=reconcile) for reconcile in (True, False)
    )
    start, rng = Start.of(family, layout, KEYS[0]), FleetRng(KEYS[:1], dtype=torch.float64)
    target, far = layout.target, {True: [], False: []}
    for seen in ({},) if target is None else ({}, {target: 1}):
        for kind, model in ((True, close), (False, free)):
            codes = model.sample(4000, rng, seen)[0]
            for j in range(layout.columns):
                if j not in seen:
                    counts = torch.bincount(codes[:, j], minlength=layout.levels[j]).numpy()
                    far[kind].append(np.abs(counts / 4000 - start.table([j], seen)).sum() / 2)
    if family.split("+")[0] in TRAINED:
        assert max(far[True]) < 0.05
        assert np.mean(far[True]) < 0.6 * np.mean(far[False])
    else:  # nothing to correct: spread evenly
        assert max(far[True]) < 0.02


@pytest.mark.usefixtures("quick_labels")
@pytest.mark.parametrize("family", RECONCILED[1::2])
def test_reconciled_runs_are_alike_alone_and_in_a_fleet(family: str) -> None:
    rng = FleetRng(KEYS[:2], dtype=torch.float64)
    fleet = make_fleet(family, GAPS, KEYS[:2], used=USED, reconcile=True)
    rows, again = fleet.sample(500, rng), fleet.sample(500, rng)
    assert torch.equal(rows, again)
    for j, levels in enumerate(USED.split(list(GAPS.levels))):
        assert torch.isin(rows[..., j], levels.nonzero()).all()
    alone = make_fleet(family, GAPS, KEYS[1:2], used=USED, reconcile=True)
    assert torch.equal(alone.sample(500, FleetRng(KEYS[1:2], dtype=torch.float64))[0], rows[1])
    for level in (0, 2, 5):
        assert (fleet.sample(20, rng, {1: level})[..., 1] == level).all()


@pytest.mark.usefixtures("quick_labels")
def test_few_reconciled_rows_are_some_of_many() -> None:
    """Else a handful would be bent to the tables one by one."""
    model = make_fleet("vae", LAYOUT, KEYS[:2], reconcile=True, double=False)
    rng = FleetRng(KEYS[:2])
    for given in ({}, {2: 1}):
        assert torch.equal(model.sample(5, rng, given), model.sample(400, rng, given)[:, :5])


# Components

TINY = Layout((2, 3, 2), target=2)
TINY_ALONE = Layout((2, 3, 2), target=None)


@pytest.mark.parametrize("layout", [TINY, TINY_ALONE], ids=["target", "none"])
@pytest.mark.parametrize("family", ["vae+6", "autoregressive+6"])
def test_a_records_component_follows_its_posterior(family: str, layout: Layout) -> None:
    """Bayes' rule on every row that there is; without draws it is the likeliest one."""
    model, rows = make_fleet(family, layout, KEYS[:2]), every_row(layout)[0]
    many = rows.repeat_interleave(3000, 0).expand(2, -1, -1)
    found = model.component_of(many, draws(KEYS[:2])).unflatten(1, (len(rows), 3000))
    best = model.component_of(rows.expand(2, -1, -1), None)
    for run, key in enumerate(KEYS[:2]):
        start = Start.of(family, layout, key)
        for place, row in enumerate(rows.tolist()):
            law = np.append(start.posterior(dict(enumerate(row))), [0, 0])
            seen = torch.bincount(found[run, place], minlength=6).numpy()
            assert chi_square(seen, law) > LEAST
            assert int(best[run, place]) == law.argmax()


@families
def test_without_components_a_record_has_its_targets_level(family: str) -> None:
    model, codes = make_fleet(family, LAYOUT, KEYS), random_codes(LAYOUT, 3, 9)
    found = model.component_of(codes, draws(KEYS))
    if not model.components:
        assert torch.equal(found, codes[..., 2])
        return
    if family == "independent+6":  # whose columns know no component
        return
    # Each belongs to one.
    for run, key in enumerate(KEYS):
        own = Start.of(family, LAYOUT, key).blocks[2].argmax(1)
        assert own[found[run].numpy()].tolist() == codes[run, :, 2].tolist()


@pytest.mark.parametrize("layout", [LAYOUT, NO_TARGET, MANY], ids=["few", "none", "many"])
def test_new_rows_have_each_component_as_often_as_it_is_due(layout: Layout) -> None:
    """Given some columns too; the target then follows the component, or what was given."""
    model = make_fleet("vae+6", layout, KEYS)
    conditions: list[dict[int, int]] = [{}, {0: 1}, {0: 2, 2: 1}]
    conditions += [] if layout.target is None else [{layout.target: 1}, {layout.target: 0, 0: 1}]
    for seen in conditions:
        component, group = model.draw_components(5000, draws(KEYS), seen)
        assert component.shape == group.shape == (3, 5000)
        for run, key in enumerate(KEYS):
            start = Start.of("vae+6", layout, key)
            law = start.posterior(seen)
            counts = torch.bincount(component[run], minlength=6).numpy()
            assert (counts[4:] == 0).all()
            assert np.abs(counts[:4] - 5000 * law).max() < 1
            # In random order.
            early = torch.bincount(component[run, :1000], minlength=6).numpy()
            assert chi_square(early[:4], law) > LEAST
            levels = group[run].numpy()
            if layout.target is None:
                assert (levels == 0).all()
            elif layout.target in seen:
                assert (levels == seen[layout.target]).all()
            else:
                joint = law[:, None] * start.blocks[layout.target]
                places = component[run].numpy() * layout.groups + levels
                assert chi_square(np.bincount(places, minlength=joint.size), joint.ravel()) > LEAST


@pytest.mark.parametrize("layout", [LAYOUT, NO_TARGET, MANY], ids=["few", "none", "many"])
def test_components_of_target_levels_are_those_that_have_them(layout: Layout) -> None:
    model = make_fleet("gan+6", layout, KEYS)
    for level in range(min(layout.groups, 3)):
        group = torch.full((3, 4000), level)
        found = model.components_given(group, draws(KEYS))
        for run, key in enumerate(KEYS):
            start = Start.of("gan+6", layout, key)
            law = start.posterior({} if layout.target is None else {layout.target: level})
            assert chi_square(torch.bincount(found[run], minlength=4).numpy(), law) > LEAST
    without = make_fleet("gan+0", layout, KEYS)
    group = random_codes(layout, 3, 9)[..., 1] % layout.groups
    assert torch.equal(without.components_given(group, draws(KEYS)), group)


@pytest.mark.parametrize("layout", [LAYOUT, NO_TARGET, MANY], ids=["few", "none", "many"])
@families
def test_logits_start_from_the_components(family: str, layout: Layout) -> None:
    if family.startswith(("independent", "copula")):
        return
    model = make_fleet(family, layout, KEYS)
    number = len(Start.of(family, layout, KEYS[0]).weight)
    component = torch.arange(number).expand(3, -1)
    found = model.offset(component)
    for run, key in enumerate(KEYS):
        start = Start.of(family, layout, key)
        for j, block in enumerate(found[run].split(list(layout.levels), -1)):
            if j == layout.target and not model.components:  # taken from the component's number
                continue
            np.testing.assert_allclose(block.softmax(-1).numpy(), start.blocks[j], atol=1e-6)
            if model.components:
                for level in range(layout.levels[j]):
                    at = torch.full((3, 1), level)
                    logits = model.level_logits(j, at)[run, 0, :number].exp().numpy()
                    np.testing.assert_allclose(logits, start.blocks[j][:, level], atol=1e-6)


@pytest.mark.parametrize("layout", [LAYOUT, NO_TARGET, MANY], ids=["few", "none", "many"])
def test_components_without_chosen_tables_are_naive_bayes(layout: Layout) -> None:
    """One a target level, from the noisy tables."""
    model = make_fleet("naive_bayes", layout, KEYS, components=12)
    tables = [random_marginals(layout, key) for key in KEYS]
    used = [torch.ones(layout.width, dtype=torch.bool)] * 3
    model.prepare(tables, used, FleetRng(KEYS))
    plain = make_fleet("naive_bayes+0", layout, KEYS)
    group = torch.arange(layout.groups).expand(3, -1)
    found, due = (held.offset(group).split(list(layout.levels), -1) for held in (model, plain))
    for j, (block, expected) in enumerate(zip(found, due, strict=True)):
        if j != layout.target:
            law = expected.softmax(-1)
            torch.testing.assert_close(block.softmax(-1), law, rtol=0, atol=1e-6)
    weight = model.weight_logits.softmax(-1)
    torch.testing.assert_close(weight[:, : layout.groups], plain.prior_logits.softmax(-1))
    assert (weight[:, layout.groups :] == 0).all()


def test_a_mixture_too_large_for_the_family_is_refused() -> None:
    with pytest.raises(UsageError, match=r"components=3: the tables ask for 4; raise it"):
        make_fleet("vae", LAYOUT, KEYS, components=3)


def test_the_tables_of_a_family_with_components_are_the_mixtures() -> None:
    """Priors and label tables that it samples towards agree with the components."""
    for layout in (LAYOUT, NO_TARGET, MANY):
        model = make_fleet("vae+6", layout, KEYS)
        for run, key in enumerate(KEYS):
            start = Start.of("vae+6", layout, key)
            prior = np.ones(1) if layout.target is None else start.table([layout.target])
            np.testing.assert_allclose(model.prior_logits[run].softmax(-1), prior, atol=1e-5)
            for level in range(layout.groups):
                seen = {} if layout.target is None else {layout.target: level}
                blocks = model.given_logits[run, level].exp().split(list(layout.levels))
                for j in range(layout.columns):
                    if j != layout.target:
                        np.testing.assert_allclose(blocks[j], start.table([j], seen), atol=4e-3)


# Losses


def every_row(layout: Layout) -> Tensor:
    """All rows that there are (1, rows, D)."""
    return torch.tensor(list(itertools.product(*(range(n) for n in layout.levels))))[None]


MEASURED = [name for name in VARIANTS if not FAMILIES[name.split("+")[0]].trained]


@pytest.mark.parametrize("family", MEASURED)
@pytest.mark.parametrize("layout", [LAYOUT, NO_TARGET])
def test_likelihoods_of_all_rows_add_up_to_one(family: str, layout: Layout) -> None:
    model = make_fleet(family, layout, [4])
    rows = every_row(layout)
    likelihood = (-loss_of(model, rows, [4])).exp()
    assert float(likelihood.sum()) == pytest.approx(1, abs=1e-9)
    drawn = model.sample(20_000, FleetRng([4], dtype=torch.float64))[0].numpy()
    places = np.ravel_multi_index(tuple(drawn.T), layout.levels)
    assert chi_square(np.bincount(places, minlength=rows.shape[1]), likelihood[0].numpy()) > 1e-4


def test_the_evidence_bound_stays_below_the_evidence() -> None:
    """−loss ≤ log p(x) for every row, so the sum of exp(−loss) over all rows is 1 at most."""
    for seed in range(3):
        model = make_fleet("vae+0", LAYOUT, [seed], draws=400)
        total = float((-loss_of(model, every_row(LAYOUT), [seed])).exp().sum())
        assert 0.05 < total <= 1.0


@both
def test_untrained_networks_have_the_likelihood_of_a_component(components: int) -> None:
    """That of the record's likeliest one, or of its target level, whatever the family."""
    codes = random_codes(LAYOUT, 3, 20)
    for family, signal in (("vae", "reconstruction"), ("autoregressive", "loss")):
        variant = f"{family}+{components}"
        model = make_fleet(variant, LAYOUT, KEYS, jitter=0.0)
        place = model.signal_names.index(signal)
        found = signals_of(model, codes)[..., place]
        for run, key in enumerate(KEYS):
            start, due = Start.of(variant, LAYOUT, key), []
            for row in codes[run].tolist():
                best = int(start.posterior(dict(enumerate(row))).argmax())
                share = 0.0 if components else math.log(start.weight[best])
                due.append(start.loss(row, best) - share)
            np.testing.assert_allclose(found[run].numpy(), due, atol=1e-5)


@both
def test_a_loss_is_minus_the_evidence_bound(components: int) -> None:
    """Against torch's own normal distribution and divergence, from the same draws."""
    model, codes = make_fleet(f"vae+{components}", LAYOUT, KEYS), random_codes(LAYOUT, 3, 9)
    network, group = model.network, codes[..., 2]
    stats = network["encoder"](LAYOUT.one_hot(codes, torch.float64))  # type: ignore[index, operator]
    mean, log_var = stats[..., :3], stats[..., 3:]
    code = torch.distributions.Normal(mean, log_var.exp().sqrt())
    unit = torch.distributions.Normal(torch.zeros_like(mean), torch.ones_like(mean))
    rng = draws(KEYS)
    noise, fits = rng.normal(9, 2, 3), []
    component = model.component_of(codes, rng)
    for k in range(2):
        z = code.mean + code.stddev * noise[:, :, k]
        made = model.decode(z, group, component)  # type: ignore[operator]
        blocks = made.split(LAYOUT.levels, dim=-1)
        columns = zip(blocks, codes.unbind(-1), strict=True)
        fits.append(sum(torch.distributions.Categorical(logits=b).log_prob(c) for b, c in columns))
    divergence = torch.distributions.kl_divergence(code, unit).sum(-1)
    expected = divergence - torch.stack(fits).mean(0)  # type: ignore[arg-type]
    torch.testing.assert_close(loss_of(model, codes, KEYS), expected.detach())


@both
def test_an_untrained_denoiser_predicts_the_tables(components: int) -> None:
    variant = f"diffusion+{components}"
    model, start = make_fleet(variant, LAYOUT, [7], jitter=0.0), Start.of(variant, LAYOUT, 7)
    codes = every_row(LAYOUT)
    hidden = torch.ones_like(codes, dtype=torch.bool)
    hidden[..., 2] = False
    for k in range(len(start.weight)):
        component = torch.full(codes.shape[:2], k)
        found = model.logits(codes, hidden, component)[0]  # type: ignore[operator]
        for j, block in enumerate(found.split(LAYOUT.levels, dim=-1)):
            if j != 2:
                law = torch.from_numpy(start.blocks[j][k]).expand_as(block)
                torch.testing.assert_close(block.softmax(-1), law, rtol=0, atol=1e-6)


@both
def test_a_denoiser_does_not_see_what_is_hidden(components: int) -> None:
    model = make_fleet(f"diffusion+{components}", LAYOUT, KEYS)
    codes, other = random_codes(LAYOUT, 3, 9), random_codes(LAYOUT, 3, 9, seed=1)
    hidden = torch.from_numpy(np.random.default_rng(2).random((3, 9, 4)) < 0.5)
    hidden[..., 2] = False  # the target is always shown
    mixed = torch.where(hidden, other, codes)
    component = model.component_of(codes, draws(KEYS))

    def shown(rows: Tensor) -> Tensor:
        return model.logits(rows, hidden, component)  # type: ignore[operator]

    assert torch.equal(shown(codes), shown(mixed))
    assert not torch.equal(shown(codes), shown(other))


def assert_samples_follow(model: Generator, key: int, law: np.ndarray) -> None:
    """8000 rows against the probability of each row that there is."""
    drawn = model.sample(8000, FleetRng([key], dtype=torch.float64))[0].numpy()
    places = np.ravel_multi_index(tuple(drawn.T), LAYOUT.levels)
    assert law.sum() == pytest.approx(1, abs=1e-9)
    assert chi_square(np.bincount(places, minlength=law.size), law) > 1e-4


@both
def test_a_denoiser_samples_from_its_chain_rule_in_the_order_drawn(components: int) -> None:
    """p(x) = Σ_k p(k, target) · Π p(column | k, what was unveiled before)."""
    variant = f"diffusion+{components}"
    model, start = make_fleet(variant, LAYOUT, [7], jitter=0.8), Start.of(variant, LAYOUT, 7)
    rows, orders = every_row(LAYOUT), set()
    for number in range(6):
        rng = draws([7], f"order:{number}")
        order = [j for j in draws([7], f"order:{number}").uniform(4)[0].argsort().tolist() if j - 2]
        orders.add(tuple(order))
        law = torch.zeros(rows.shape[1], dtype=torch.float64)
        for k in range(len(start.weight)):
            hidden = torch.ones_like(rows, dtype=torch.bool)
            hidden[..., 2] = False
            chain = start.weight[k] * torch.from_numpy(start.blocks[2][k])[rows[0, :, 2]]
            component = torch.full(rows.shape[:2], k)
            for column in order:
                with torch.no_grad():
                    logits = model.logits(rows, hidden, component)[0]  # type: ignore[operator]
                block = logits.split(LAYOUT.levels, dim=-1)[column].softmax(-1)
                chain *= block.gather(-1, rows[0, :, column, None])[:, 0]
                hidden[..., column] = False
            law += chain
        own, group = model.draw_components(8000, draws([7], f"own:{number}"), {})
        uniform = draws([7], f"levels:{number}").uniform(8000, 4)
        with torch.no_grad():
            drawn = model.draw(own, group, uniform, rng, {})[0].numpy()
        assert law.sum() == pytest.approx(1, abs=1e-9)
        places = np.ravel_multi_index(tuple(drawn.T), LAYOUT.levels)
        assert chi_square(np.bincount(places, minlength=len(law)), law.numpy()) > 1e-4
    assert len(orders) > 2


@both
@pytest.mark.parametrize(("family", "decoder"), [("vae", "decode"), ("gan", "logits")])
def test_decoders_sample_from_their_distributions_over_the_latent(
    family: str, decoder: str, components: int
) -> None:
    """p(x) = Σ_k p(k, target) · E_z Π p(column | z, target, k), by many z; never only the
    likeliest level."""
    variant = f"{family}+{components}"
    model, start = make_fleet(variant, LAYOUT, [7], jitter=0.8), Start.of(variant, LAYOUT, 7)
    rows = every_row(LAYOUT)[0]
    law = np.zeros(len(rows))
    for k in range(len(start.weight)):
        group = int(start.blocks[2][k].argmax())
        z = draws([7], f"latent:{k}").normal(60_000, 3)
        with torch.no_grad():
            target, component = torch.full(z.shape[:2], group), torch.full(z.shape[:2], k)
            made = getattr(model, decoder)(z, target, component)[0]
        soft = [block.softmax(-1).numpy() for block in made.split(LAYOUT.levels, dim=-1)]
        joint = np.einsum("za,zb,zd->abd", soft[0], soft[1], soft[3]) / 60_000
        here = rows[:, 2] == group
        a, b, _, d = rows[here].T.numpy()
        law[here] += start.weight[k] * joint[a, b, d]
    assert_samples_follow(model, 7, law)


@both
def test_a_discriminator_is_asked_about_the_record_and_its_own_fakes(components: int) -> None:
    """The loss from its parts: softplus(−D(x)) and the mean of softplus(D(fake))."""
    model = make_fleet(f"gan+{components}", LAYOUT, [3], fakes=1)
    codes = random_codes(LAYOUT, 1, 6)
    real = model.attack_loss(codes, draws([3])).detach()  # −D(x)
    total = loss_of(model, codes, [3])
    fake_part = total - torch.nn.functional.softplus(real)
    assert (fake_part > 0).all()
    reachable = -model.attack_loss(every_row(LAYOUT), draws([3])).detach()[0]
    allowed = torch.nn.functional.softplus(reachable)
    targets = every_row(LAYOUT)[0, :, 2]
    for record in range(6):
        own = allowed[targets == codes[0, record, 2]]
        assert (own - fake_part[0, record]).abs().min() < 1e-9


@families
def test_scores_are_minus_the_mean_loss_of_an_attacker(family: str) -> None:
    model, codes = make_fleet(family, LAYOUT, KEYS), random_codes(LAYOUT, 3, 10)
    rng = FleetRng(KEYS, dtype=torch.float64)
    found = model.scores(codes, rng, draws=3)
    losses = [model.attack_loss(codes, rng.at(f"attack:{d}", 0)).detach() for d in range(3)]
    torch.testing.assert_close(found.double(), -torch.stack(losses).mean(0), rtol=1e-5, atol=1e-5)
    pieces = model.scores(codes, rng, draws=3, piece=4)
    assert pieces.shape == (3, 10)
    torch.testing.assert_close(pieces[:, :4], model.scores(codes[:, :4], rng, draws=3))


@families
def test_one_pass_scores_the_same_rows_for_all_runs(family: str) -> None:
    model, codes = make_fleet(family, LAYOUT, KEYS), random_codes(LAYOUT, 1, 9)
    rng = FleetRng([5] * 3, dtype=torch.float64)
    found = model.scores(codes, rng, draws=2)
    assert torch.equal(found, model.scores(codes.expand(3, -1, -1), rng, draws=2))
    assert (found[0] != found[1]).any()
    same = make_fleet(family, LAYOUT, [KEYS[0]] * 3)
    assert torch.equal(*same.scores(codes, rng, draws=2)[:2])
    with pytest.raises(UsageError, match="piece=0"):
        model.scores(codes, rng, piece=0)


# Signals


def signals_of(model: Generator, codes: Tensor, key: int = 5, **settings: Any) -> Tensor:
    return model.signals(codes, FleetRng([key], dtype=torch.float64), **settings)


@pytest.mark.parametrize("layout", [LAYOUT, NO_TARGET, Layout((4,), 0), Layout((4,), None)])
@families
def test_a_signal_of_a_record_knows_neither_other_records_nor_other_runs(
    family: str, layout: Layout
) -> None:
    """The same noises for all: a number depends on the record and its model alone."""
    model, codes = make_fleet(family, layout, KEYS), random_codes(layout, 1, 5)
    found = signals_of(model, codes, draws=6)
    assert found.shape == (3, 5, len(model.signal_names))
    assert found.isfinite().all()
    for piece in (1, 3):
        torch.testing.assert_close(signals_of(model, codes, draws=6, piece=piece), found)
    order = torch.tensor([4, 0, 2])
    torch.testing.assert_close(signals_of(model, codes[:, order], draws=6), found[:, order])
    torch.testing.assert_close(signals_of(model, codes.expand(3, -1, -1), draws=6), found)
    for run, key in enumerate(KEYS):
        alone = signals_of(make_fleet(family, layout, [key]), codes, draws=6)
        torch.testing.assert_close(alone[0], found[run])
    own = codes.expand(3, -1, -1).clone()
    own[1] = random_codes(layout, 1, 5, seed=3)[0]
    torch.testing.assert_close(signals_of(model, own, draws=6)[[0, 2]], found[[0, 2]])
    for settings, part in (({"draws": 0}, "draws=0"), ({"piece": 0}, "piece=0")):
        with pytest.raises(UsageError, match=part):
            signals_of(model, codes, **settings)
    with pytest.raises(UsageError, match="3 keys"):
        model.signals(codes, FleetRng(KEYS))


@pytest.mark.parametrize(
    "family", [*MEASURED, *(f"{name}+{k}" for name in ("gan", "autoregressive") for k in (0, 6))]
)
def test_a_family_without_draws_signals_its_attack_loss(family: str) -> None:
    model, codes = make_fleet(family, LAYOUT, KEYS), random_codes(LAYOUT, 3, 9)
    loss = model.attack_loss(codes, draws(KEYS)).detach()
    torch.testing.assert_close(signals_of(model, codes)[..., 0], loss)


def test_masks_hide_every_column_but_the_target_equally_often() -> None:
    for layout, free in ((LAYOUT, 3), (NO_TARGET, 4), (Layout((2,) * 14, 13), 13)):
        model = make_fleet("diffusion", layout, [1])
        masks = model.masks(draws([3]), 2 * free)  # type: ignore[operator]
        counts = masks.sum(-1)
        for rate, found in zip(RATES, counts.tolist(), strict=True):
            assert set(found) == {max(1, round(rate * free))}
        often = masks.sum(1)
        for column in range(layout.columns):
            due = 0 if column == layout.target else 2 * counts[:, 0]
            assert (often[:, column] == due).all()
        again = model.masks(draws([3]), 2 * free)  # type: ignore[operator]
        assert torch.equal(again, masks)
    # One of 13! orders.
    assert not torch.equal(model.masks(draws([4]), 2 * free), masks)  # type: ignore[operator]


@both
def test_losses_by_mask_are_the_denoisers_own_and_signals_their_means(components: int) -> None:
    """Against torch's own cross-entropy, mask by mask, under the likeliest component."""
    model, codes = (
        make_fleet(f"diffusion+{components}", LAYOUT, KEYS),
        random_codes(LAYOUT, 3, 5),
    )
    component = model.component_of(codes, None)
    rng = FleetRng([5], dtype=torch.float64)
    losses = model.mask_losses(codes, rng, draws=4, piece=2)  # type: ignore[operator]
    masks = model.masks(rng.at("signals"), 4)  # type: ignore[operator]
    for rate, draw in itertools.product(range(len(RATES)), range(4)):
        hidden = masks[rate, draw]
        with torch.no_grad():
            shown = hidden.expand(codes.shape)
            logits = model.logits(codes, shown, component)  # type: ignore[operator]
        blocks = logits.split(LAYOUT.levels, dim=-1)
        each = [
            torch.nn.functional.cross_entropy(blocks[j].mT, codes[..., j], reduction="none")
            for j in hidden.nonzero().flatten().tolist()
        ]
        torch.testing.assert_close(losses[..., rate, draw], torch.stack(each).mean(0))
    found = signals_of(model, codes, draws=4)
    torch.testing.assert_close(found[..., 1:], losses.mean(-1))
    torch.testing.assert_close(found[..., 0], losses.mean((-1, -2)))


def test_importance_weights_estimate_the_likelihood_of_a_row() -> None:
    """exp(−IWAE) is an unbiased estimate of p(x), so over all rows it adds up to one, while the
    evidence bound falls short; reconstruction + KL is that bound under the same noises."""
    model, rows = make_fleet("vae+0", LAYOUT, [2], jitter=0.2), every_row(LAYOUT)
    found = signals_of(model, rows, draws=2000)[0]
    iwae, reconstruction, kl = (found * torch.tensor([1, 1, -1])).unbind(-1)
    # The weights have a long tail, which 2000 draws miss a little of.
    assert float((-iwae).exp().sum()) == pytest.approx(1, abs=0.04)
    assert (iwae < reconstruction + kl).all()
    assert float((-(reconstruction + kl)).exp().sum()) < 0.9
    single = signals_of(model, rows, 3, draws=1)[0]
    stats = model.network["encoder"](LAYOUT.one_hot(rows, torch.float64))[0].detach()  # type: ignore[index, operator]
    mean, log_var = stats.chunk(2, dim=-1)
    noise = FleetRng([3], dtype=torch.float64).at("signals").normal(1, 3)[0]
    code = torch.distributions.Normal(mean, (0.5 * log_var).exp())
    z = code.mean + code.stddev * noise
    unit = torch.distributions.Normal(0.0, 1.0)
    weight = (unit.log_prob(z) - code.log_prob(z)).sum(-1)
    torch.testing.assert_close(single[:, 0], single[:, 1] - weight)
    divergence = torch.distributions.kl_divergence(
        code, torch.distributions.Normal(torch.zeros_like(mean), torch.ones_like(mean))
    )
    torch.testing.assert_close(single[:, 2], -divergence.sum(-1))


def test_finished_models_neither_learn_nor_hold_rows() -> None:
    for family in VARIANTS:
        model = make_fleet(family, LAYOUT, KEYS)
        model.finish()
        assert not any(p.requires_grad for p in model.parameters())
        assert not any(module.training for module in model.modules())
        assert not hasattr(model, "_codes")


# Refusals


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("settings", "part"),
    [
        ({"runs": 0}, "runs=0"),
        ({"lr": 0.0}, "lr=0"),
        ({"lr": math.inf}, "lr=inf"),
        ({"average": 0.0}, "average=0"),
        ({"average": 1.0}, "average=1"),
        ({"block": 0}, "block=0"),
        ({"components": -1}, "components=-1"),
        ({"components": 1.5}, r"components=1\.5"),
        ({"reconcile": "no"}, "reconcile=no"),
        ({"reconcile": None}, "reconcile=None"),
    ],
)
def test_settings_of_all_families_are_checked(
    family: str, settings: dict[str, Any], part: str
) -> None:
    with pytest.raises(UsageError, match=part):
        FAMILIES[family](LAYOUT, **{"runs": 2, **settings})


@pytest.mark.parametrize(
    ("family", "settings", "part"),
    [
        ("vae", {"latent": 0}, "latent=0"),
        ("vae", {"draws": 0}, "draws=0"),
        ("vae", {"beta": 0.0}, "beta=0"),
        ("gan", {"latent": 0}, "latent=0"),
        ("gan", {"fakes": 0}, "fakes=0"),
        ("gan", {"ladder": 0}, "ladder=0"),
        ("gan", {"public_batch": 0}, "public_batch=0"),
        ("gan", {"temperature": 0.0}, "temperature=0"),
        ("gan", {"generator_lr": -1.0}, "generator_lr=-1"),
        ("diffusion", {"draws": 0}, "draws=0"),
    ],
)
def test_settings_of_a_family_are_checked(family: str, settings: dict[str, Any], part: str) -> None:
    with pytest.raises(UsageError, match=part):
        FAMILIES[family](LAYOUT, 1, **settings)


def test_unknown_settings_are_refused() -> None:
    deep: dict[str, Any] = {"depth": 3}
    for family in FAMILIES.values():
        with pytest.raises(TypeError, match="depth"):
            family(LAYOUT, 1, **deep)


@families
def test_no_scores_without_draws(family: str) -> None:
    with pytest.raises(UsageError, match="draws=0"):
        make_fleet(family, LAYOUT, KEYS).scores(random_codes(LAYOUT, 3, 2), draws(KEYS), draws=0)


@pytest.mark.parametrize(
    ("family", "name"), [("vae", "lr"), ("gan", "lr"), ("gan", "generator_lr")]
)
def test_a_rate_is_one_for_all_or_one_each(family: str, name: str) -> None:
    one: dict[str, Any] = {name: 0.1}
    model = FAMILIES[family](LAYOUT, 2, **{**one, name: [0.1, 0.2]})
    assert getattr(model, name) == [0.1, 0.2]
    assert getattr(FAMILIES[family](LAYOUT, 2, **one), name) == [0.1, 0.1]
    with pytest.raises(UsageError, match=f"{name}: 3 values for 2 runs"):
        FAMILIES[family](LAYOUT, 2, **{**one, name: [0.1, 0.2, 0.3]})
    with pytest.raises(UsageError, match=f"{name}=-1.0"):
        FAMILIES[family](LAYOUT, 2, **{**one, name: [0.1, -1.0]})
