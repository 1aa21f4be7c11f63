"""Figures say their finding, keep one look per method and show seeds as intervals; `show` is one whole output."""

import json
import math

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import plotly.io as pio
import pytest

from helpers.figures import plots
from helpers.figures.canvas import band
from helpers.figures.style import ALONE, METHODS, faded

COMMON = {"title": "TopK wins", "subtitle": "smoke scale, 3 seeds"}


@pytest.fixture(scope="module")
def sweep() -> pd.DataFrame:
    """Two methods, two sizes, three sparsities, three seeds; ReLU's L0 differs between seeds."""
    rows = [
        {
            "method": method,
            "n_latents": n,
            "sparsity": k,
            "seed": seed,
            "l0": k * (1 + 0.1 * seed * worse),
            "nmse": nmse,
        }
        for worse, method in enumerate(("TopK", "ReLU"))
        for n in (512, 1024)
        for k in (8, 16, 32)
        for seed in range(3)
        for nmse in [(1 + worse) / k**0.5 + 0.01 * seed + 1 / n]
    ]
    return pd.DataFrame(rows)


@pytest.fixture
def shown(monkeypatch) -> list[tuple[dict, dict]]:
    """What `show` handed to the notebook."""
    outputs = []
    monkeypatch.setattr(plots, "display", lambda bundle, metadata=None, raw=False: outputs.append((bundle, metadata)))
    return outputs


@pytest.fixture(scope="module")
def figures(sweep) -> dict[str, go.Figure]:
    """One figure of each kind."""
    return {
        "frontier": plots.frontier(sweep, **COMMON),
        "curves": plots.curves(sweep, "sparsity", "nmse", series="method", **COMMON),
        "scatter": plots.scatter(sweep, "l0", "nmse", series="method", **COMMON),
        "histogram": plots.histogram(sweep, "nmse", series="method", **COMMON),
        "bars": plots.bars(sweep, "sparsity", "nmse", series="method", **COMMON),
        "heatmap": plots.heatmap(sweep, "sparsity", "n_latents", "nmse", **COMMON),
    }


def named(figure: go.Figure, name: str) -> list:
    return [trace for trace in figure.data if trace.name == name]


def test_every_figure_states_its_finding_and_names_its_axes(figures):
    for figure in figures.values():
        assert "<b>TopK wins</b>" in figure.layout.title.text and "3 seeds" in figure.layout.title.text
        assert figure.layout.xaxis.title.text and figure.layout.yaxis.title.text


def test_every_figure_has_the_suites_template_and_only_that(figures):
    assert pio.templates.default == "suite"
    for figure in figures.values():
        template = figure.layout.template.to_plotly_json()
        assert template == pio.templates["suite"].to_plotly_json()
        assert len(json.dumps(template)) < 4000


def test_a_method_has_its_colour_in_every_kind_of_figure(figures):
    for kind, figure in figures.items():
        for method in ("TopK", "ReLU") if kind != "heatmap" else ():
            colors = {trace.marker.color or trace.line.color for trace in named(figure, method)}
            assert METHODS[method].color in colors and colors <= {METHODS[method].color, None}


def test_each_method_stands_in_the_legend_once(figures):
    for kind, figure in figures.items():
        legend = [trace.name for trace in figure.data if trace.showlegend]
        assert kind == "heatmap" or sorted(legend) == ["ReLU", "TopK"]


def test_frontier_has_a_panel_per_size_and_a_marker_per_cell_at_the_mean(sweep):
    figure = plots.frontier(sweep, **COMMON)
    assert [note.text for note in figure.layout.annotations] == ["n_latents = 512", "n_latents = 1,024"]
    relu = named(figure, "ReLU")[0]
    assert relu.x == pytest.approx([8 * 1.1, 16 * 1.1, 32 * 1.1])
    part = sweep[(sweep.method == "ReLU") & (sweep.n_latents == 512)]
    assert relu.y == pytest.approx([part[part.sparsity == k].nmse.mean() for k in (8, 16, 32)], rel=1e-5)
    assert relu.error_y.array == pytest.approx(
        (lambda t: t["high"] - t["mean"])(band(part, "sparsity", "nmse")), rel=1e-4
    )
    assert figure.layout.xaxis.type == figure.layout.yaxis2.type == "log"


def test_frontier_joins_markers_in_the_order_of_l0_not_of_the_setting():
    frame = pd.DataFrame(
        {"method": "ReLU", "n_latents": 8, "sparsity": [1e-3, 1e-2], "l0": [90.0, 10.0], "nmse": [0.1, 0.4]}
    )
    assert plots.frontier(frame, **COMMON).data[0].x == (10.0, 90.0)


def test_curves_have_a_band_around_the_mean_of_the_seeds(sweep):
    frame = sweep[sweep.n_latents == 512]
    fill, line = named(plots.curves(frame, "sparsity", "nmse", series="method", **COMMON), "TopK")
    table = band(frame[frame.method == "TopK"], "sparsity", "nmse")
    assert fill.fillcolor == faded(METHODS["TopK"].color) and not fill.showlegend
    assert fill.y == pytest.approx([*table["high"], *table["low"][::-1]], rel=1e-5)
    assert line.y == pytest.approx(table["mean"], rel=1e-5) and line.mode == "lines+markers"


def test_the_papers_value_is_grey_and_dashed(sweep):
    frame = pd.DataFrame({"sparsity": [8, 32], "nmse": [0.5, 0.2]})
    level = named(plots.curves(sweep, "sparsity", "nmse", paper=0.3, **COMMON), "paper")[0]
    line = named(plots.curves(sweep, "sparsity", "nmse", paper=frame, panel="n_latents", **COMMON), "paper")
    assert (level.x, level.y) == ((8, 32), (0.3, 0.3))
    assert [trace.y for trace in line] == [(0.5, 0.2)] * 2 and [trace.showlegend for trace in line] == [True, False]
    for trace in (level, *line):
        assert trace.line.color == METHODS["paper"].color and trace.line.dash == "dash"
    marks = named(plots.bars(sweep, "sparsity", "nmse", paper={8: 0.5}, **COMMON), "paper")[0]
    assert (marks.x, marks.y) == (("8",), (0.5,)) and marks.marker.color == METHODS["paper"].color


def test_one_series_needs_no_legend(sweep):
    trace = plots.scatter(sweep, "l0", "nmse", hover="method", **COMMON).data[0]
    assert trace.showlegend is False and trace.marker.color == ALONE.color
    assert trace.text == tuple(sweep.method)


def test_histogram_steps_are_shares_of_each_series_on_common_edges(monkeypatch):
    monkeypatch.setattr(plots, "BINS", 2)
    frame = pd.DataFrame({"method": ["TopK"] * 4 + ["ReLU"] * 2, "x": [0.0, 0.1, 0.2, 1.0, 0.9, 1.0]})
    topk, relu = plots.histogram(frame, "x", series="method", **COMMON).data
    assert topk.x == relu.x == (0, 0, 0.5, 1)
    assert topk.y == (0, 0.75, 0.25, 0) and relu.y == (0, 0, 1, 0)
    log = plots.histogram(frame, "x", series="method", log="y", **COMMON)
    floor = log.data[1].y[0]
    assert log.data[1].y == (floor, floor, 1, floor) and log.data[0].y == (floor, 0.75, 0.25, floor)
    assert 0 < floor < 10 ** log.layout.yaxis.range[0] < 0.25  # an empty bin lies below the axis


def test_histogram_bins_are_equal_on_a_log_axis(monkeypatch):
    monkeypatch.setattr(plots, "BINS", 2)
    trace = plots.histogram(pd.DataFrame({"x": [1.0, 10.0, 100.0]}), "x", log="x", **COMMON).data[0]
    assert trace.x == pytest.approx((1, 1, 10, 100))


def test_bars_stand_at_the_mean_in_the_order_of_the_frame():
    frame = pd.DataFrame({"fix": ["none", "AuxK", "none", "AuxK"], "dead_fraction": [0.5, 0.1, 0.7, 0.3]})
    bar = plots.bars(frame, "fix", "dead_fraction", **COMMON).data[0]
    assert bar.x == ("none", "AuxK") and bar.y == pytest.approx((0.6, 0.2))
    assert bar.error_y.array == pytest.approx([12.7062 * 0.1] * 2, rel=1e-4)


def test_heatmap_cells_are_means_at_their_place(sweep):
    trace = plots.heatmap(sweep, "sparsity", "n_latents", "nmse", **COMMON).data[0]
    assert trace.x == ("8", "16", "32") and trace.y == ("512", "1024")
    expected = sweep[(sweep.sparsity == 32) & (sweep.n_latents == 1024)].nmse.mean()
    assert trace.z[1][2] == pytest.approx(expected, rel=1e-5)


def test_a_heatmap_draws_a_largest_mean_that_was_rounded_up(sweep):
    largest = sweep.assign(nmse=(sweep.sparsity == 32) * 0.42928766)  # a drawn number has six digits
    trace = plots.heatmap(largest, "sparsity", "n_latents", "nmse", **COMMON).data[0]
    assert np.max(trace.z) > largest.nmse.max()


def test_sizes_as_series_get_a_legend_title(sweep):
    figure = plots.curves(sweep, "sparsity", "nmse", series="n_latents", **COMMON)
    assert figure.layout.legend.title.text == "number of latents n"
    assert {trace.name for trace in figure.data} == {"512", "1,024"}


@pytest.mark.parametrize("draw", ["frontier", "curves", "scatter", "histogram", "bars", "heatmap"])
def test_a_wrong_column_is_named(draw, sweep):
    columns = {"histogram": ["l9"], "heatmap": ["l9", "seed", "nmse"]}.get(draw, ["l9", "nmse"])
    with pytest.raises(ValueError, match="no column 'l9'"):
        getattr(plots, draw)(sweep, *columns, **COMMON)


def test_a_wrong_series_panel_or_keyword_is_named(sweep):
    with pytest.raises(ValueError, match="no column 'methods'"):
        plots.curves(sweep, "l0", "nmse", series="methods", **COMMON)
    with pytest.raises(ValueError, match="no column 'size'"):
        plots.curves(sweep, "l0", "nmse", panel="size", **COMMON)
    with pytest.raises(TypeError, match="titel"):
        plots.curves(sweep, "l0", "nmse", titel="t")


def test_a_value_that_a_log_axis_cannot_show_is_refused(sweep):
    frame = sweep.assign(nmse=sweep.nmse.where(sweep.index > 0, np.nan))
    with pytest.raises(ValueError, match="cannot show 1 of 36 values of 'nmse'"):
        plots.frontier(frame, **COMMON)
    assert plots.curves(frame, "l0", "nmse", log="x", **COMMON).data


def test_show_is_one_output_with_json_and_text(sweep, shown):
    figure = plots.frontier(sweep, **COMMON)
    plots.show(figure)
    ((bundle, _),) = shown
    assert set(bundle) == {"application/vnd.plotly.v1+json", "text/plain"}
    assert bundle["text/plain"] == "TopK wins smoke scale, 3 seeds"
    content = bundle["application/vnd.plotly.v1+json"]
    assert set(content) == {"data", "layout", "config"} and content["config"]["displayModeBar"] is False
    assert go.Figure(content["data"], content["layout"]) == figure


def test_the_good_direction_stands_on_the_axis(sweep):
    figure = plots.curves(sweep, "l0", "nmse", better="lower", **COMMON)
    assert figure.layout.yaxis.title.text.endswith("<br>↓ lower is better")


def test_the_point_of_the_title_is_marked_where_it_is_on_a_log_axis(sweep):
    figure = plots.mark(plots.frontier(sweep, **COMMON), 100.0, 0.1, "n = 512", log="xy")
    (found,) = (note for note in figure.layout.annotations if note.text == "n = 512")
    assert (found.x, found.y, found.showarrow) == (2.0, -1.0, True)


def test_a_trend_lies_behind_what_was_measured_and_its_number_is_marked():
    points = pd.DataFrame({"n_latents": [1.0, 100.0], "nmse": [1.0, 0.01], "panel": "a"})
    figure = plots.scatter(points, "n_latents", "nmse", title="t", log="xy", panel="panel")
    plots.trend(figure, lambda n: 1 / n, (1, 100), "power -1", log="xy", row=1, col=1, ax=-20)
    plots.trend(figure, lambda n: 0.5, (1, 100), "level", log="xy", at=0)
    plots.trend(figure, lambda n: math.nan * n, (1, 100), "unknown")
    plots.trend(figure, lambda n: 0.0, (1, 100), "nothing", log="xy")
    level, power, measured = figure.data
    assert (power.x[20], power.y[20]) == (10, 0.1) and set(level.y) == {0.5} and measured.mode == "markers"
    assert power.line.dash != level.line.dash and not power.showlegend
    *_, marked, start = figure.layout.annotations
    assert (marked.text, marked.x, marked.y, marked.ax) == ("power -1", 1, pytest.approx(-1), -20)
    assert (start.text, start.x) == ("level", 0)


def test_a_cut_says_what_it_separates(sweep):
    figure = plots.cut(plots.curves(sweep, "l0", "nmse", **COMMON), "called chat-only", x=20.0)
    assert figure.layout.shapes[0].x0 == 20.0 and figure.layout.annotations[-1].text == "called chat-only"
    assert figure.layout.annotations[-1].x == 20.0
    figure = plots.cut(plots.curves(sweep, "l0", "nmse", log="x", **COMMON), "called chat-only", x=20.0)
    assert figure.layout.shapes[0].x0 == 20.0  # of a log axis plotly takes the value for a line, its log for a text
    assert figure.layout.annotations[-1].x == math.log10(20)


def test_numbers_in_cells_are_written_in_black_or_white(sweep):
    _, text = plots.heatmap(sweep, "sparsity", "n_latents", "nmse", **COMMON).data
    assert len(text.text) == 6 and set(text.textfont.color) <= {"#000000", "#FFFFFF"}


def test_the_stored_json_is_small_and_strict(figures, shown):
    for figure in figures.values():
        plots.show(figure)
    for bundle, _ in shown:
        text = json.dumps(bundle, allow_nan=False)
        assert len(text) < 12_000 and "bdata" not in text


def test_regions_are_shaded_in_every_panel_and_ticked_at_their_ends(sweep):
    figure = plots.curves(sweep, "l0", "nmse", panel="method", **COMMON)
    plots.regions(figure, {"few": (0.0, 10.0), "some": (20.0, 30.0), "many": (40.0, 50.0)})
    assert [(s.x0, s.x1) for s in figure.layout.shapes] == [(0, 10)] * 2 + [(20, 30)] * 2 + [(40, 50)] * 2
    assert [a.text for a in figure.layout.annotations].count("some") == 2
    assert figure.layout.xaxis.range == (0, 50) and figure.layout.xaxis.tickvals == (10, 20, 30, 40)


def test_a_cut_may_be_in_one_panel(sweep):
    figure = plots.curves(sweep, "l0", "nmse", panel="method", **COMMON)
    plots.cut(figure, "chance", x=20.0, row=1, col=2)
    (line,) = figure.layout.shapes
    assert line.xref == "x2" and line.x0 == line.x1 == 20.0


def test_a_bar_of_one_run_has_no_whisker(sweep):
    """Its interval is empty, and the ends of one are not drawn."""
    some = sweep[(sweep.n_latents == 512) & ((sweep.seed == 0) | (sweep.method == "TopK"))]
    topk, relu = plots.bars(some, "sparsity", "nmse", series="method", **COMMON).data
    assert topk.error_y.width == 4 and relu.error_y.width == 0
