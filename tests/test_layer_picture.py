"""The report's picture of layers: what it shows is what the looks tell, in colours that hold it, within its frame."""

import itertools
import math
import random
import re
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

import anybatch
from anybatch._scaling import Moments

pytest.importorskip("matplotlib")

from test_run_report import NAMES, written

from anybatch._report.figure import colour
from anybatch._report.layers import Cell, LayerChart, LayerMap, layer_legend, layer_map, levels
from anybatch._report.picture import picture
from anybatch._report.report import report

END = 480.0


def looked(layers, *, every=1, steps=480):
    """Steps of one base iteration each, at which `layers(tau)` are seen."""
    names = ["iterations", "scale", "raw_variance", "raw_sqnorm", "variance", "sqnorm", "gain", "lr", "lr_factor"]
    values = {**dict.fromkeys([*names, "noise_scale", "seconds"], 1.0), "count": 2}
    found = []
    for i in range(1, steps + 1):
        seen = {name: Moments(*pair) for name, pair in layers(i).items()} if i % every == 0 else {}
        found.append(anybatch.StepRecord(**values, step=i, tau=float(i), per_layer=seen))
    return found


def test_cells_are_as_long_as_the_noise_wants_and_none_where_it_hides_all():
    draw = random.Random(0)

    def layers(tau):
        return {
            "sharp": (6.0, 2.0),
            "turning": (6.0, 2.0 if tau <= END / 2 else 0.5),
            "loud": (9.0, draw.gauss(1.0, 5.0)),
            "hidden": (9.0, draw.gauss(0.0, 5.0)),
        }

    found = layer_map(looked(layers), unit=10.0)
    assert list(found.layers) == ["sharp", "turning", "loud", "hidden"]
    assert found.end == END
    assert found.layers["sharp"] == [Cell(20.0 * i, 20.0 * (i + 1), 30.0) for i in range(24)]
    assert [cell.noise for cell in found.layers["turning"]] == [30.0] * 12 + [120.0] * 12
    loud = found.layers["loud"]
    assert 2 <= len(loud) < 16
    assert all(30 < cell.noise < 270 for cell in loud)  # the truth is 90
    assert all(before.end == after.begin for before, after in itertools.pairwise(loud))
    assert sum(cell.end - cell.begin for cell in found.layers["hidden"]) < END / 2


def test_no_look_no_map_and_one_look_no_cell():
    assert layer_map(looked(lambda _: {}), unit=1.0) is None
    assert layer_map(looked(lambda _: {"a": (1.0, 1.0)}, every=480), unit=1.0).layers == {"a": []}
    odd = {"a": (math.nan, 1.0), "b": (1e200, 1.0), "c": (0.0, 1.0), "d": (-1.0, 1.0), "e": (1.0, 1e-300)}
    found = layer_map(looked(lambda _: odd, every=10), unit=1.0)
    assert list(found.layers) == list(odd)
    assert all(cells == [] for cells in found.layers.values())


NOISE = st.floats(-100, 100, exclude_min=True, exclude_max=True).map(lambda x: 10**x)


@given(st.lists(NOISE, min_size=1, max_size=20))
def test_nine_colours_hold_all_values(values):
    cells = {str(i): [Cell(0.0, 1.0, value)] for i, value in enumerate(values)}
    limits = levels([LayerMap(cells, 1.0)])
    assert 2 <= len(limits) <= 10
    assert limits == sorted(limits)
    assert limits[0] * (1 - 1e-9) <= min(values)
    assert max(values) <= limits[-1] * (1 + 1e-9)
    assert len(layer_legend(limits).entries) == len(limits) - 1


def test_every_cell_is_drawn_in_the_colour_of_its_value():
    cells = [Cell(10.0 * i, 10.0 * (i + 1), value) for i, value in enumerate((1.5, 15.0, 150.0, 15.0))]
    found = LayerMap({"a": cells[:2], "b": cells}, 40.0)
    html = LayerChart("x", found, levels([found])).html()
    shapes = {colour: d.count("M") for d, colour in re.findall(r'<path d="([^"]*)" style="fill: (#\w+)', html)}
    assert shapes == {colour(0, 7): 2, colour(3, 7): 3, colour(6, 7): 1}  # three to a decade, from 1 to 215
    titles = re.findall(r"<title>(.*?)</title>", html, re.DOTALL)
    assert titles == ["a\n1.5 for tau 0 to 10\n15 for tau 10 to 20", "b\n1.5 for tau 0 to 10\n15 for tau 30 to 40"]


def test_pictures_of_unequal_height_stand_below_one_another_in_a_file(tmp_path):
    maps = [LayerMap({str(i): [Cell(0.0, 1.0, 2.0)] for i in range(rows)}, 1.0) for rows in (3, 40, 1)]
    limits = levels(maps)
    charts = [LayerChart(f"the {i}th", found, limits) for i, found in enumerate(maps)]
    text = picture(charts, layer_legend(limits), tmp_path / "p.svg").read_text()
    root = ElementTree.fromstring(text)
    inner = [each for each in root if each.tag.endswith("svg")]
    ends = [(float(each.get("y")), float(each.get("height"))) for each in inner]
    assert [height for _, height in ends] == [87, 502, 57]
    assert all(y + height < after for (y, height), (after, _) in itertools.pairwise(ends))
    assert ends[-1][0] + ends[-1][1] < float(root.get("height"))
    for each, (_, height) in zip(inner, ends, strict=True):
        assert float(each.get("viewBox").split()[3]) == height


def test_the_legend_says_round_numbers():
    def of(*values):
        limits = levels([LayerMap({"a": [Cell(0, 1, value) for value in values]}, 1.0)])
        return [words for words, _, _ in layer_legend(limits).entries]

    assert of(12.0, 900.0) == ["10 to 22", "22 to 46", "46 to 100", "100 to 220", "220 to 460", "460 to 1000"]
    assert of(3.0, 2e5) == ["1 to 10", "10 to 100", "100 to 1000", "1000 to 10k", "10k to 100k", "100k to 1M"]
    assert len(of(5.0)) == 1


@pytest.mark.parametrize("count", [1, 15, 60, 400])
def test_the_picture_lies_in_its_frame_whatever_the_number_and_the_names(count):
    names = [(NAMES * 40)[i] + str(i) for i in range(count)]
    found = layer_map(looked(lambda tau: {name: (tau + i, 1.0) for i, name in enumerate(names)}), unit=1.0)
    html = LayerChart("<b>", found, levels([found])).html()
    assert "<script" not in html
    root = ElementTree.fromstring(re.search(r"<svg.*</svg>", html, re.DOTALL)[0])
    _, _, width, height = map(float, root.get("viewBox").split())
    assert height < 560
    rows = [g for g in root.iter("g") if g.get("class") == "row"]
    assert len(rows) == min(count, 230)
    labels = [text for text in root.iter("text") if text.text != "tau (base iterations)"]
    assert len(labels) < 45
    for path in root.iter("path"):
        if path.get("transform"):
            continue
        for x, y in (point.split() for point in re.split("[MLCQz]+", path.get("d")) if point):
            assert -1 <= float(x) <= width + 1
            assert -1 <= float(y) <= height + 1
    assert len(html) < 350_000


def test_the_page_draws_each_run_that_was_looked_at(tmp_path):
    plain = written(tmp_path / "plain.jsonl", scale=2)
    assert "Noise by layer" not in report([tmp_path / "plain.jsonl"])
    for i in range(6):
        record = anybatch.RunRecord(tmp_path / f"{i}.jsonl", config={**plain.config, "base_batch": 32})
        for step in plain.steps[:40]:
            layers = {"body.<i>": Moments(2.0, 1.0), "head": Moments(10.0 + step.step, 1.0)}
            record.write(anybatch.StepRecord(**{**vars(step), "per_layer": layers}))
        record.close()
    text = report(sorted(tmp_path.glob("*.jsonl")))
    part = text.partition("Noise by layer</h2>")[2].partition("<h2>")[0]
    assert part.count('<svg class="chart"') == 4
    assert "omits the layers of 2 more runs" in part
    assert "in examples, as colour" in part
    assert "body.&lt;i&gt;\n64 for tau 0 to" in part
    assert "body.<i>" not in text
    record = anybatch.RunRecord(tmp_path / "unsaid.jsonl", config={**plain.config, "base_batch": None})
    for step in plain.steps[:40]:
        record.write(anybatch.StepRecord(**{**vars(step), "per_layer": {"head": Moments(2.0, 1.0)}}))
    record.close()
    assert "in base batches, as colour" in report([tmp_path / "unsaid.jsonl"])
    assert "in examples (in base batches for runs without" in report(sorted(tmp_path.glob("*.jsonl")))
