"""What leads: exact where nothing is hidden, what a model expects where all is, and saved with a
run."""

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from fleets import make_fleet
from test_survey import FREE, codes_of, counted, purse_of, survey_of
from torch import Tensor

from dpsynth.codec import Layout
from dpsynth.leading import Answers, Leading, ask_leading, cells_of
from dpsynth.marginals import NoisyTable
from dpsynth.models.base import Generator
from dpsynth.models.labels import LabelHead
from dpsynth.randomness import FleetRng, stream

MANY = Layout((4, 10, 6, 3), target=1)


def nested(rows: int, seed: int = 0, *, apart: bool = True) -> Tensor:
    """A target that the first column decides for each level of the third; the last tells nothing.
    Where it does not hang on the third, that one tells nothing either."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, MANY.levels, (rows, 4))
    codes[:, 1] = (2 * codes[:, 0] + (codes[:, 2] // 2 if apart else 0)) % 10
    return torch.from_numpy(codes)


def test_scores_are_those_of_the_cell_that_a_row_lies_in() -> None:
    codes, rng = codes_of(50, layout=MANY), np.random.default_rng(0)
    for columns in [(2,), (2, 0), (0, 2)]:
        table = torch.from_numpy(rng.normal(size=(10, *(MANY.levels[c] for c in columns))))
        scores = Leading(columns, table.flatten(1)).scores(codes, MANY)
        for row, found in zip(codes.tolist(), scores, strict=True):
            torch.testing.assert_close(found, table[(slice(None), *(row[c] for c in columns))])


@pytest.mark.parametrize(
    ("levels", "target"), [((4, 10, 6, 3), 1), ((5, 9), 1), ((9, 900, 700, 20), 0)]
)
def test_cells_of_all_columns_that_may_lead_have_room(levels: tuple[int, ...], target: int) -> None:
    layout = Layout(levels, target)
    others = [n for j, n in enumerate(levels) if j != target]
    fit = [a * b for a, b in itertools.combinations(others, 2) if a * b * layout.groups <= 2**18]
    assert cells_of(layout) == max(others + fit)


def answers_of(codes: Tensor, sigma: float, rng: np.random.Generator) -> Answers:
    tables = [
        NoisyTable(c, counts + sigma * rng.standard_normal(counts.shape), sigma)
        for c in [(1, 0), (1, 0, 2)]
        for counts in [counted(codes, c, MANY)]
    ]
    return Answers((tables[0],), tables[1])


def expected_of(codes: Tensor) -> dict[tuple[int, ...], np.ndarray]:
    """Of a model that knows the first column well and takes the target to hang on it alone."""
    return {c: counted(codes, c, MANY) + 0.5 for c in [(1, 0), (0, 2)]}


def test_without_noise_shares_are_those_of_the_rows() -> None:
    codes = nested(4000)
    found = answers_of(codes, 0.0, np.random.default_rng(0)).found(expected_of(nested(4000, 1)))
    assert found is not None and found.columns == (0, 2)
    counts = counted(codes, (1, 0, 2), MANY).reshape(10, -1)
    np.testing.assert_allclose(found.logits.exp(), counts / counts.sum(0), atol=1e-3)


def test_the_more_noise_the_nearer_shares_are_to_what_one_column_says() -> None:
    """And never are they farther from the truth than without the second table, by much."""
    codes, rng = nested(4000), np.random.default_rng(1)
    truth = counted(codes, (1, 0, 2), MANY).reshape(10, -1)
    truth /= truth.sum(0)
    alone = counted(codes, (1, 0), MANY)
    alone = (alone / alone.sum(0))[:, :, None].repeat(6, axis=2).reshape(10, -1)
    far, moved = [], []
    for sigma in (1.0, 10.0, 40.0, 1000.0):
        first = answers_of(codes, 0.0, rng).alone
        answers = Answers(first, answers_of(codes, sigma, rng).both)
        found = answers.found(expected_of(codes))
        assert found is not None
        share = found.logits.exp().numpy()
        far.append(np.abs(share - truth).sum())
        moved.append(np.abs(share - alone).sum())
    assert far[0] < 0.1 * far[-1] and far == sorted(far)
    assert moved == sorted(moved, reverse=True)
    assert far[-1] < 1.05 * np.abs(alone - truth).sum()


@pytest.mark.parametrize("sigma", [300.0, 3000.0])
def test_nothing_leads_where_its_table_is_more_noise_than_signal(sigma: float) -> None:
    codes, rng = nested(400), np.random.default_rng(2)
    found = [answers_of(codes, sigma, rng).found(expected_of(codes)) for _ in range(50)]
    assert sum(leading is None for leading in found) > 40


def test_of_settled_tables_the_column_is_found_and_kept_as_it_is() -> None:
    codes = nested(4000)
    marginals = survey_of([codes], purse_of(FREE), MANY).marginals
    answers = Answers.settled(marginals, MANY)
    counts = counted(codes, (1, 0), MANY)
    assert answers.column == 0 and answers.both is None
    np.testing.assert_allclose(answers.alone[0].counts, counts)
    found = answers.found({(1, 0): answers.alone[0].counts})
    assert found is not None and found.columns == (0,)
    np.testing.assert_allclose(found.logits.exp(), counts / counts.sum(0), atol=1e-3)


def test_answers_of_the_same_column_count_by_their_noise() -> None:
    table = np.arange(40.0).reshape(10, 4)
    one, two = NoisyTable((1, 0), table, 1.0), NoisyTable((1, 0), table + 10, 3.0)
    counts, sigma = Answers((one, two)).counted()
    np.testing.assert_allclose(counts, table + 1)
    assert sigma == pytest.approx(0.9**0.5)


@pytest.mark.parametrize("apart", [True, False])
@pytest.mark.parametrize("mu", [0.6, 5.0, FREE])
def test_a_second_column_is_asked_about_where_the_target_hangs_on_it(
    mu: float, apart: bool
) -> None:
    """Of a fifth of what is there at most, in whatever stage of a survey."""
    for seed in range(5):
        codes = nested(6000, seed, apart=apart)
        survey = survey_of([codes], purse_of(mu, stream(seed, "x")), MANY)
        answers = ask_leading(survey, 0.5)
        assert {table.columns for table in answers.alone} == {(1, 0)}
        assert len(answers.alone) == 2
        if apart:
            assert answers.both is not None and answers.both.columns == (1, 0, 2)
            assert survey.purse.left == pytest.approx(1 - 0.5 * 0.22)
        else:
            assert answers.both is None
            assert survey.purse.left == pytest.approx(1 - 0.5 * 0.07)


def test_with_two_columns_one_leads_alone() -> None:
    layout = Layout((12, 9), target=1)
    codes = codes_of(900, layout=layout)
    codes[:, 1] = codes[:, 0] * 9 // 12
    survey = survey_of([codes], purse_of(FREE), layout)
    assert ask_leading(survey, 1.0).both is None


# In a generator


def leading_fleet(keys: list[int], **settings: Any) -> Generator:
    return make_fleet("autoregressive", MANY, keys, double=False, reconcile=True, **settings)


def test_a_family_without_tables_of_its_own_starts_at_the_noisy_one() -> None:
    model = leading_fleet([1, 2])
    for run in range(2):
        leading = model._leading(run)
        assert leading is None or len(leading.columns) == 1
        assert torch.equal(
            model.leading_columns[run] >= 0, torch.tensor([leading is not None, False])
        )


def test_what_leads_is_saved_and_runs_of_before_have_nothing() -> None:
    model, other = leading_fleet([1]), leading_fleet([2])
    model.leading_columns[0] = torch.tensor([2, 0])
    model.leading_logits[0].normal_()
    state = model.state_dict()
    other.load_state_dict(state)
    found, wanted = other._leading(0), model._leading(0)
    assert found is not None and wanted is not None
    assert found.columns == wanted.columns == (2, 0)
    assert torch.equal(found.logits, wanted.logits)
    fresh = leading_fleet([3])
    kept = fresh.leading_columns.clone()
    fresh.load_state_dict({n: v for n, v in state.items() if not n.startswith("leading")})
    assert torch.equal(fresh.leading_columns, kept)


def test_a_sample_follows_what_leads(monkeypatch: pytest.MonkeyPatch) -> None:
    """A table that decides the label, which the generator knows nothing of, counts for all."""
    monkeypatch.setattr("dpsynth.models.labels._TREES", 5)
    monkeypatch.setattr(LabelHead, "_share", lambda *_: 1.0)
    model = leading_fleet([1])
    codes = model.sample(3000, FleetRng([5]))[0]
    sure = torch.full((10, 6, 4), -6.0)
    for a, b in itertools.product(range(6), range(4)):
        sure[(a + b) % 10, a, b] = 0.0
    model.leading_columns[0] = torch.tensor([2, 0])
    model.leading_logits[0] = sure.log_softmax(0).flatten(1)
    drawn = model.sample(3000, FleetRng([5]))[0]
    right = [(c[:, 1] == (c[:, 2] + c[:, 0]) % 10).double().mean() for c in (codes, drawn)]
    assert right[0] < 0.2 and right[1] > 0.35
