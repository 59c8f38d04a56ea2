"""ROC figures: the curve against brute force, and what is drawn, read back from the axes."""

import math
from pathlib import Path

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from dpsynth.audit.ceiling import Ceiling
from dpsynth.audit.roc import roc_curve, roc_figure
from dpsynth.audit.statistics import Scores, auc, clopper_pearson
from dpsynth.checks import UsageError

CEILING = Ceiling.from_gdp(0.925)


def several(names: int = 10, rows: int = 300) -> dict[str, Scores]:
    rng = np.random.default_rng(0)
    scores: dict[str, Scores] = {
        f"attack_with_a_name_{i}": (rng.normal(0.1 * i, 1, rows), rng.normal(size=rows + 50))
        for i in range(names - 1)
    }
    scores["tied"] = (rng.integers(0, 2, rows) * 1.0, rng.integers(0, 2, rows + 50) * 1.0)
    return scores


def drawn(tmp_path: Path, scores: dict[str, Scores], ceiling: Ceiling = CEILING) -> Figure:
    return roc_figure(
        scores, ceiling, strongest=next(iter(scores)), path=tmp_path / "roc.png", title="a table"
    )


def line(ax: Axes, start: str) -> tuple[np.ndarray, np.ndarray]:
    (found,) = (each for each in ax.lines if str(each.get_label()).startswith(start))
    return np.asarray(found.get_xdata(), float), np.asarray(found.get_ydata(), float)


def test_curve_is_that_of_every_threshold() -> None:
    rng = np.random.default_rng(1)
    members, holdout = rng.integers(0, 6, 40) * 1.0, rng.integers(0, 5, 30) * 1.0
    fpr, tpr = roc_curve(members, holdout)
    known = {((holdout >= t).mean(), (members >= t).mean()) for t in [*range(6), math.inf]}
    assert set(zip(fpr.tolist(), tpr.tolist(), strict=True)) == known
    assert (np.diff(fpr) >= 0).all() and (np.diff(tpr) >= 0).all()
    area = (np.diff(fpr) * (tpr[1:] + tpr[:-1]) / 2).sum()
    assert area == pytest.approx(auc(members, holdout))


def test_drawn_curves_are_the_scores(tmp_path: Path) -> None:
    scores = several(4)
    linear, log = drawn(tmp_path, scores).axes
    for ax in (linear, log):
        for name, pair in scores.items():
            start = f"strongest: {name}" if name == next(iter(scores)) else name
            x, y = line(ax, start)
            for i in range(0, len(x), 37):
                fpr, tpr = roc_curve(*pair)
                reached = tpr[fpr <= x[i] + 1e-9].max()
                above = tpr[fpr >= x[i] - 1e-9].min()
                shown = 0.0 if math.isnan(y[i]) else y[i]
                assert min(reached, above) - 1e-9 <= shown <= max(reached, above) + 1e-9
    x, y = line(linear, "tied")
    # Equal scores are cut by lot, so the area drawn is the AUC printed.
    assert (np.diff(x) * (y[1:] + y[:-1]) / 2).sum() == pytest.approx(
        auc(*scores["tied"]), abs=2e-3
    )


def test_ceiling_diagonal_and_axes(tmp_path: Path) -> None:
    scores = several(3)
    linear, log = drawn(tmp_path, scores).axes
    for ax in (linear, log):
        x, y = line(ax, "ceiling of this run")
        np.testing.assert_allclose(y, [CEILING.tpr_at(float(v)) for v in x])
        x, y = line(ax, "knows nothing")
        np.testing.assert_array_equal(x, y)
    assert (linear.get_xlim(), linear.get_ylim()) == ((0, 1), (0, 1))
    assert log.get_xscale() == log.get_yscale() == "log"
    assert log.get_xlim() == pytest.approx((1 / 350, 1))


def test_band_is_clopper_pearson(tmp_path: Path) -> None:
    scores = several(2)
    linear = drawn(tmp_path, scores).axes[0]
    (band,) = linear.collections
    corners = np.asarray(band.get_paths()[0].vertices)
    x, y = line(linear, "strongest")
    for i in (0, 10, 200, 400):
        low, high = clopper_pearson(round(y[i] * 300), 300)
        at = corners[np.abs(corners[:, 0] - x[i]) < 1e-12, 1]
        assert (at.min(), at.max()) == pytest.approx((low, high))


def test_without_a_guarantee_the_legend_says_so(tmp_path: Path) -> None:
    figure = drawn(tmp_path, several(2), Ceiling.none())
    assert "no ceiling: the run has no guarantee" in [
        text.get_text() for text in figure.legends[0].get_texts()
    ]


@pytest.mark.parametrize("names", [1, 4, 12])
def test_no_text_overlaps(tmp_path: Path, names: int) -> None:
    figure = drawn(tmp_path, several(names))
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    boxes = [text.get_window_extent() for text in figure.texts]
    boxes += [text.get_window_extent() for text in figure.legends[0].get_texts()]
    for ax in figure.axes:
        texts = [ax.xaxis.label, ax.yaxis.label, ax._left_title]  # pyright: ignore[reportAttributeAccessIssue]
        ticks = [*ax.get_xticklabels(), *ax.get_yticklabels()]
        shown = [t for t in ticks if t.get_text() and t.get_visible()]
        limits = (*ax.get_xlim(), *ax.get_ylim())
        inside = [
            t for t in shown
            if limits[0] <= t.get_position()[0] <= limits[1]
            and limits[2] <= t.get_position()[1] <= max(limits[3], 1)
        ]  # fmt: skip
        boxes += [t.get_window_extent() for t in [*texts, *inside] if t.get_text()]
    whole = figure.bbox
    for i, box in enumerate(boxes):
        assert box.x0 >= whole.x0 and box.x1 <= whole.x1 and box.y0 >= 0 and box.y1 <= whole.y1
        assert not any(box.overlaps(other) for other in boxes[:i])


def test_styles_are_told_apart_in_grey(tmp_path: Path) -> None:
    """No two attacks share dashes and width; strongest and ceiling differ in both."""
    linear = drawn(tmp_path, several(11)).axes[0]
    styles = [(str(each._dash_pattern), each.get_linewidth()) for each in linear.lines]  # pyright: ignore[reportAttributeAccessIssue]
    assert len(set(styles)) == len(styles)
    best = max(linear.lines, key=lambda each: each.get_linewidth())
    assert str(best.get_label()).startswith("strongest")
    faint = [to_rgb(each.get_color()) for each in linear.lines if "attack" in str(each.get_label())]
    assert len(set(faint)) == 2


@pytest.mark.parametrize(
    ("suffix", "magic"), [("png", b"\x89PNG"), ("pdf", b"%PDF"), ("svg", b"<?xml")]
)
def test_files_are_written_and_repeatable(tmp_path: Path, suffix: str, magic: bytes) -> None:
    scores = several(3)
    for name in ("a", "b"):
        roc_figure(scores, CEILING, strongest="tied", path=tmp_path / f"{name}.{suffix}")
    first, second = ((tmp_path / f"{name}.{suffix}").read_bytes() for name in ("a", "b"))
    assert first.startswith(magic)
    assert first == second


def test_names_are_not_mathematics(tmp_path: Path) -> None:
    scores = several(2)
    scores["_$x^$"] = scores["tied"]
    drawn(tmp_path, scores)


def test_refusals(tmp_path: Path) -> None:
    scores = several(2)
    with pytest.raises(UsageError, match=r"must end in one of \.png, \.pdf, \.svg"):
        roc_figure(scores, CEILING, strongest="tied", path=tmp_path / "roc.jpg")
    with pytest.raises(UsageError, match="strongest='none': has no scores"):
        roc_figure(scores, CEILING, strongest="none", path=tmp_path / "roc.png")
    with pytest.raises(UsageError, match="different numbers of rows"):
        roc_figure(
            {**scores, "b": (np.ones(2), np.ones(3))}, CEILING, strongest="tied",
            path=tmp_path / "roc.png",
        )  # fmt: skip
    with pytest.raises(UsageError, match="not finite"):
        roc_figure(
            {"b": (np.full(2, math.nan), np.ones(3))}, CEILING, strongest="b",
            path=tmp_path / "roc.png",
        )  # fmt: skip
    assert not list(tmp_path.iterdir())
