"""The figure builds from any sweep, says what it must, and its folder is whole or untouched."""

from __future__ import annotations

import math
import re
import warnings
from itertools import combinations

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from test_frontier_results import simulated

from dpsynth.checks import UsageError
from dpsynth.frontier import plot, read
from dpsynth.frontier.plot import figure, interactive, utility_metric, write_frontier
from dpsynth.frontier.results import aggregate

ENDINGS = ("pdf", "svg", "png", "html", "parquet", "csv")
NAMES = {f"frontier.{ending}" for ending in ENDINGS} | {"README.md"}


def texts(drawn: Figure) -> list[str]:
    found = [text for ax in drawn.axes for text in ax.texts] + list(drawn.texts)
    found += [text for legend in drawn.legends for text in legend.get_texts()]
    return [text.get_text() for text in found]


def test_figure_names_families_epsilons_and_title():
    drawn = figure(simulated(), title="Adult, one row, add/remove")
    said = texts(drawn)
    assert "Adult, one row, add/remove" in said
    assert any("δ = 1e-05" in text and "3 seeds" in text for text in said)
    for family in ("vae", "gan", "diffusion", "bayes net (baseline)", "copy (control)"):
        assert family in said
    assert said.count("8") == 3 and said.count("∞") == 5
    assert drawn.get_size_inches()[0] == pytest.approx(180 / 25.4)
    assert len(drawn.axes) == 4


def test_the_axis_breaks_only_above_a_wide_gap():
    results = simulated()
    lower, upper = plot._limits(aggregate(results))
    assert upper is not None and lower[1] < upper[0] and upper[1] >= 1
    near = aggregate(results[results["family"] != "copy"])
    assert plot._limits(near)[1] is None
    assert len(figure(results[results["family"] != "copy"]).axes) == 3


def test_wide_intervals_of_two_seeds_do_not_set_the_scale():
    results = simulated(2)
    results.loc[results["run"] == "vae-1-0", "attack_auc"] += 0.02
    points = aggregate(results)
    assert points["attack_auc_low"].min() < 0.42
    lower, upper = plot._limits(points)
    assert lower[0] > 0.45 and upper is not None
    assert points["attack_auc"].between(*lower).sum() >= len(points) - 2


def test_every_point_lies_in_one_of_the_parts():
    for root in range(5):
        points = aggregate(simulated(root=root))
        lower, upper = plot._limits(points)
        assert upper is not None
        inside = points["attack_auc"].between(*lower) | points["attack_auc"].between(*upper)
        assert inside.all()


@pytest.mark.parametrize("seeds", [1, 2])
@pytest.mark.parametrize("roles", [("model",), ("model", "control"), ("baseline",), ("control",)])
def test_partial_sweeps_draw_without_a_warning(seeds, roles):
    results = simulated(seeds)
    results = results[results["role"].isin(roles)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure(results).canvas.draw()
        assert "frontier" in interactive(results)


def test_one_run_draws():
    figure(simulated(1).iloc[:1]).canvas.draw()


def test_labels_keep_apart():
    drawn = figure(simulated())
    drawn.canvas.draw()
    labels = [t for t in drawn.axes[0].texts if t.get_text() in ("0.5", "1", "2", "4", "8", "∞")]
    assert len(labels) == 22
    # A text's extent includes the descent that digits do not use, hence the shrinking.
    boxes = [label.get_window_extent().shrunk(0.8, 0.6) for label in labels]
    overlapping = [(a, b) for a, b in combinations(boxes, 2) if a.overlaps(b)]
    assert overlapping == []


def test_without_a_target_detection_stands_for_utility():
    results = simulated(task=False)
    assert utility_metric(results) == "c2st_auc"
    assert utility_metric(simulated()) == "tstr_gbt_auc"
    figure(results).canvas.draw()


def test_a_score_is_no_error_axis():
    with pytest.raises(UsageError, match="x=tstr_gbt_auc: larger is better"):
        figure(simulated(1), x="tstr_gbt_auc")


def test_zero_rates_stay_on_the_log_axis():
    results = simulated(1)
    results[["attack_tpr1", "attack_tpr1_low"]] = 0.0
    figure(results).canvas.draw()


def test_names_are_text_not_mathematics_nor_markup():
    results = simulated()
    evil = "$\\frac{</script><script>alert(1)</script>"
    results["family"] = results["family"].replace("vae", evil)
    figure(results, title="$x").canvas.draw()
    page = interactive(results, title="<script>alert(2)</script>")
    assert "<script>alert" not in page
    assert "</script><script>alert" not in page


def test_the_page_asks_for_nothing_elsewhere():
    page = interactive(simulated(), title="Adult")
    assert not re.search(r"<(script|link|img|iframe)[^>]*(src|href)=", page)
    assert 'src="http' not in page
    assert "run diffusion-inf-2" in page
    assert "Where more budget did worse" in page


def test_steps_go_right_then_down():
    best = pd.DataFrame({"x": [2.0, 1.0], "attack_auc": [0.5, 0.6]})
    across, down = plot._staircase(best)
    np.testing.assert_array_equal(across, [1, 2, 2])
    np.testing.assert_array_equal(down, [0.6, 0.6, 0.5])


def test_the_legend_fits():
    drawn = figure(simulated())
    drawn.canvas.draw()
    whole, legend = drawn.bbox, drawn.legends[0].get_window_extent()
    assert whole.x0 <= legend.x0 and legend.x1 <= whole.x1
    under = min(ax.get_tightbbox().y0 for ax in drawn.axes)
    assert legend.y1 < under


def test_write_frontier_leaves_seven_files_twice_the_same(tmp_path):
    results = simulated()
    first = write_frontier(results, tmp_path / "a", title="Adult")
    again = write_frontier(results, tmp_path / "b", title="Adult")
    assert {file.name for file in first.iterdir()} == NAMES
    assert {path.name for path in tmp_path.iterdir()} == {"a", "b"}
    for name in NAMES:
        assert (first / name).stat().st_size > 0
        assert (first / name).read_bytes() == (again / name).read_bytes(), name
    assert (first / "frontier.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert (first / "frontier.pdf").read_bytes()[:5] == b"%PDF-"
    assert b"/Type3" not in (first / "frontier.pdf").read_bytes()
    assert "<svg" in (first / "frontier.svg").read_text()
    pd.testing.assert_frame_equal(read(first), results)
    table = pd.read_csv(first / "frontier.csv")
    assert table["epsilon"].map(math.isinf).sum() == results["epsilon"].map(math.isinf).sum()


def test_a_failure_leaves_the_folder_as_it_was(tmp_path, monkeypatch):
    folder = write_frontier(simulated(1), tmp_path / "a", title="Adult")
    (folder / "notes.txt").write_text("mine")
    before = {file.name: file.read_bytes() for file in folder.iterdir()}

    def broken(*_: object, **__: object) -> str:
        raise RuntimeError("no page")

    monkeypatch.setattr(plot, "interactive", broken)
    with pytest.raises(RuntimeError, match="no page"):
        write_frontier(simulated(2), folder, title="Adult")
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
