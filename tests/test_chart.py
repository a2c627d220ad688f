"""Charts: whatever the numbers, what is drawn lies in the frame, and thinning keeps the extremes."""

import math
import re
from math import inf, isnan, log10, nan
from xml.etree import ElementTree

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("matplotlib")

from anybatch._report.chart import Chart, Legend, Line
from anybatch._report.difference import difference
from anybatch._report.figure import RAMP, colour
from anybatch._report.page import LIGHT
from anybatch._report.picture import picture
from anybatch._report.points import thin
from anybatch._report.words import duration, short_number

NUMBERS = st.one_of(
    st.floats(), st.sampled_from([0.0, 1.0, 1e99, -1e99, 5e-324, 1e-323, 1.0 + 2**-52, nan, inf, 1e-13, 5e-12])
)
POINTS = st.lists(st.tuples(NUMBERS, NUMBERS), max_size=12)


def drawn(chart):
    """The SVG of a chart, as a tree."""
    return ElementTree.fromstring(re.search(r"<svg.*</svg>", chart.html(), re.DOTALL)[0])


def paths(chart, kind="line"):
    """What is drawn of each line, or as each strip: lists of points, one for each piece without a gap."""
    groups = [g for g in drawn(chart).iter("g") if g.get("class") == kind]
    texts = ["".join(path.get("d").rstrip("z") for path in g.iter("path") if not path.get("transform")) for g in groups]
    return [[[tuple(map(float, p.split())) for p in re.split("[LC]", m)] for m in t.split("M")[1:]] for t in texts]


def words(chart, kind):
    return [g.find("title").text for g in drawn(chart).iter("g") if g.get("class") == kind]


def labels(chart):
    return [text.text for text in drawn(chart).iter("text")]


@settings(deadline=None, max_examples=60)
@given(POINTS, st.booleans(), st.booleans(), st.booleans())
def test_whatever_the_numbers_the_picture_lies_in_its_frame(points, log_x, log_y, dots):
    band = [(x, y, y * 2) for x, y in points]
    chart = Chart("y", "x", [Line(points, "a", dots=dots, band=band)], log_x=log_x, log_y=log_y)
    text = chart.html()
    if chart.empty:
        assert text == ""
        return
    assert "nan" not in text
    assert "inf" not in text
    shapes = list(drawn(chart).iter("path"))
    places = [re.search(r"translate\((\S+) (\S+)\)", p.get("transform")).groups() for p in shapes if p.get("transform")]
    for path in (p.get("d").rstrip("z") for p in shapes if not p.get("transform")):
        places += [point.split() for point in re.split("[MLCQ]", path)[1:]]
    assert places
    for x, y in places:
        assert -1 <= float(x) <= 381
        assert -1 <= float(y) <= 237
    assert text.count("<text") < 30


def thinned(points, *, columns=10, log=False):
    x, y = torch.tensor(points, dtype=torch.float64).reshape(-1, 2).T
    return thin(x, y, columns=columns, log=log)


def plainly_thinned(points, *, columns, log):
    """Point by point: each column's lowest and highest, the first of equal ones, else its first point."""
    given = [(x, y) for x, y in points if (1e-100 if log else -1e100) < x < 1e100]
    if len(given) <= 2 * columns:
        return given
    across = [log10(x) if log else x for x, _ in given]
    span = max(across) - min(across)
    held = {}
    for place, point in zip(across, given, strict=True):
        held.setdefault(int((place - min(across)) / span * columns) if span else 0, []).append(point)
    kept = []
    for column in sorted(held):
        drawn = [i for i, (_, y) in enumerate(held[column]) if abs(y) < 1e100]
        ends = {pick(drawn, key=lambda i: held[column][i][1]) for pick in (min, max)} if drawn else {0}
        kept += [held[column][i] for i in sorted(ends)]
    return kept


@given(
    st.lists(st.tuples(st.floats(0, 100) | st.sampled_from([0.0, 1.0, 1e-200, 1e200, nan]), NUMBERS), max_size=300),
    st.booleans(),
    st.sampled_from([1, 7, 65536]),
)
def test_thinning_is_that_of_a_plain_loop_whatever_the_parts(points, log, part):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("anybatch._report.points._PART", part)
        found, expected = thinned(points, log=log), plainly_thinned(points, columns=10, log=log)
    assert repr(found) == repr(expected)


@given(st.lists(st.tuples(st.floats(0, 1000), NUMBERS), max_size=300), st.booleans())
def test_thinning_keeps_the_extremes_and_the_order(points, log):
    points = sorted(points, key=lambda p: p[0])
    kept = thinned(points, log=log)
    drawn = [p for p in points if not log or p[0] > 1e-100]
    assert len(kept) <= max(20, 2 * 11)
    assert [p[0] for p in kept] == sorted(p[0] for p in kept)
    values = [y for _, y in drawn if abs(y) < 1e100]
    if values:
        left = [y for _, y in kept if abs(y) < 1e100]  # one beyond stays as a gap
        assert (min(left), max(left)) == (min(values), max(values)) or len(drawn) <= 20


def test_a_gap_stays_a_gap():
    points = [(float(i), nan if 400 <= i < 600 else 1.0) for i in range(1000)]
    kept = thinned(points)
    assert any(isnan(y) for _, y in kept)
    [pieces] = paths(Chart("y", "x", [Line(kept, "a")]))
    assert len(pieces) == 2


def test_a_point_between_two_gaps_is_a_dot():
    chart = Chart("y", "x", [Line([(0, 1), (1, 2), (2, nan), (3, 1.5), (4, inf), (5, 1)], "a")])
    dots = [path for path in drawn(chart).iter("path") if path.get("transform")]
    assert len(dots) == 2


def test_points_lie_where_they_should():
    """Ends of a linear axis map to the ends of the frame less its margin, and a decade to equal lengths."""
    [[[(x0, y0), (x1, y1), (x2, y2)]]] = paths(Chart("y", "x", [Line([(1, 0), (10, 5), (100, 10)], "a")], log_x=True))
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.2)
    assert y0 - y1 == pytest.approx(y1 - y2, abs=0.2)
    assert 45 <= x0 < x2 <= 375
    assert 7 <= y2 < y0 <= 194


def test_an_axis_is_logarithmic_where_values_are_far_apart():
    far = labels(Chart("y", "x", [Line([(0, 0.001), (1, 1000)], "a")]))
    near = labels(Chart("y", "x", [Line([(0, 0), (1, 1000)], "a")]))
    decades = {"0.001", "0.01", "0.1", "10", "100"}
    assert len(decades & set(far)) >= 2
    assert not decades & set(near)
    assert "500" in near


def test_under_the_pointer_are_names_and_values():
    lines = [Line([(0, 1), (50, 3), (100, nan)], "low"), Line([(0, 10), (50, 20), (100, 12)], "$x$ <b>")]
    chart = Chart("y", "tau", lines)
    assert words(chart, "line") == ["low\n3 at tau 50", "$x$ <b>\n12 at tau 100"]
    assert words(chart, "strip") == [
        "tau 0\n$x$ <b>: 10\nlow: 1",
        "tau 50\n$x$ <b>: 20\nlow: 3",
        "tau 100\n$x$ <b>: 12",
    ]
    edges = [x for [corners] in paths(chart, "strip") for x, _ in corners[:3]]
    assert edges == sorted(edges)
    assert 45 <= edges[0] < edges[-1] <= 375


def test_a_strip_of_many_lines_names_some_of_them():
    chart = Chart("y", "x", [Line([(0, i), (1, i)], f"run {i}") for i in range(40)])
    first, last = (text.splitlines() for text in words(chart, "strip"))
    assert first == ["x 0", *(f"run {i}: {i}" for i in range(39, 27, -1)), "and 28 more"]
    assert last[0] == "x 1"


def test_a_picture_has_the_pages_colours_and_nothing_of_a_users_style(monkeypatch):
    import matplotlib as mpl

    chart = Chart("y", "x", [Line([(0, 1), (1, 2)], "a"), Line([(0, 1), (1, 2)], "b", colour(0, 2))])
    text = chart.html()
    with mpl.rc_context({"lines.linewidth": 9, "axes.edgecolor": "#123456", "font.family": "monospace"}):
        assert chart.html() == text
    assert RAMP[0] in text
    assert "var(--ink)" in text
    assert not [value for value in LIGHT.values() if value in text]
    assert "font-family" not in text
    assert " id=" not in text


def test_one_evaluation_is_a_dot_that_can_be_seen():
    """Its path reaches 2.25 pixels to each side in a chart of 380, where it was .8."""
    [dot] = [p for p in drawn(Chart("y", "x", [Line([(100, 0.5)], "a")])).iter("path") if p.get("transform")]
    reach = [float(number) for number in re.findall(r"-?\d+\.?\d*", dot.get("d"))]
    assert max(reach) - min(reach) == pytest.approx(4.5, abs=0.1)


@pytest.mark.parametrize(
    "values", [[1.2345678e-05, 1.2346e-05], [97.5611, 97.5614], [-123456.25, -123456.0], [1e-9, 1.1e-9], [0, 1]]
)
def test_numbers_upwards_are_not_cut_and_differ(values):
    """Each ends where it is aligned to; a letter is no wider than .64 of its height of 11, a mark than .37."""
    chart = Chart("y", "x", [Line(list(enumerate(values)), "a")])
    svg = drawn(chart)
    upwards = [t for t in svg.iter("text") if "text-anchor: end" in t.get("style")]
    assert len(upwards) >= 2
    assert len({t.text for t in upwards}) == len(upwards)
    for text in upwards:
        end = float(text.get("x") or re.search(r"translate\((\S+)", text.get("transform"))[1])
        assert end - 11 * sum(0.37 if letter in ".-" else 0.64 for letter in text.text) >= 0, text.text


def test_charts_in_a_file_follow_dark_mode_and_are_as_wide_as_a_phone(tmp_path):
    chart = Chart("$y <b>", "x", [Line([(0, 1), (1, 2)], "a", dash=(6, 3))])
    entries = [(f"$a{i}", RAMP[0], (6, 3)) for i in range(9)]
    file = picture([chart, Chart("none", "x", []), chart], Legend(entries, "and more " * 12), tmp_path / "a.svg")
    text = file.read_text()
    tree = ElementTree.fromstring(text)
    space = "{http://www.w3.org/2000/svg}"
    assert float(tree.get("width")) == 404
    assert "prefers-color-scheme:dark" in text
    inner = [each for each in tree if each.tag == f"{space}svg"]
    assert [each.get("viewBox") for each in inner] == ["0 0 380 236"] * 2
    ends = [float(each.get("y")) + float(each.get("height")) for each in inner]
    assert float(inner[1].get("y")) > ends[0] > 236
    assert float(tree.get("height")) > ends[1]
    words = [each for each in tree if each.tag == f"{space}text"]
    assert [each.text for each in words].count("$y <b>") == 2
    places = {(each.get("x"), each.get("y")) for each in words}
    assert len(places) == len(words) == 9 + 2 + 2
    assert all(float(x) < 380 for x, _ in places)


def test_differences_are_those_of_a_plain_loop():
    """Of straight lines, where interpolation is exact: y = a + b tau at places of their own."""
    lines = {"S = 1": [(1.0, 0.5), (2.0, 0.25)], "S = 8": [(3.0, 0.5), (1.0, 0.0), (0.5, 0.125)], "S = 9": [(7.0, 0.0)]}
    groups = {
        name: (
            "#123456",
            [[(tau, a + b * tau) for tau in (0.0, 11.0 + i, 60.0, 100.0 + 3 * i)] for i, (a, b) in enumerate(of)],
        )
        for name, of in lines.items()
    }
    groups["S = 99"] = ("#123456", [[(5.0, 1.0)], [(0.0, math.nan), (100.0, 1.0)]])
    chart = difference("y", groups, "S = 1")
    assert [line.name for line in chart.lines] == ["S = 1", "S = 8", "S = 9"]
    for line in chart.lines:
        assert line.points[0][0] == pytest.approx(103 / 4)
        assert line.points[-1][0] > 99
        for tau, value in line.points:
            runs = 1 if tau > 100 else 2  # the first run of scale 1 ends there
            zero = sum(a + b * tau for a, b in lines["S = 1"][2 - runs :]) / runs
            ys = [a + b * tau - zero for i, (a, b) in enumerate(lines[line.name]) if tau <= 100 + 3 * i]
            assert value == pytest.approx(sum(ys) / len(ys))
            bands = [band for band in line.band if band[0] == tau]
            if len(ys) == 1:
                assert not bands
            else:
                mean = sum(ys) / len(ys)
                spread = math.sqrt(sum((y - mean) ** 2 for y in ys) / (len(ys) - 1))
                assert bands[0][1:] == pytest.approx((mean - spread, mean + spread))


def test_without_scale_1_there_is_no_difference_to_draw():
    points = [(float(i), 1.0) for i in range(10)]
    assert difference("y", {"S = 8": ("#123456", [points])}, "S = 1").empty
    assert difference("y", {"S = 1": ("#123456", [points])}, "S = 1").empty
    assert difference("y", {"S = 1": ("#123456", []), "S = 8": ("#123456", [points])}, "S = 1").empty


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.0012, "0.0012 s"), (119, "119 s"), (120, "2 min"), (7201, "2 h"), (3e6, "34.7 d"), (1e8, "1160 d"),
     (1e10, "116k d"), (1e30, "1.16e25 d"), (nan, "–"), (inf, "–")],
)  # fmt: skip
def test_durations(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(1, "1"), (9999, "9999"), (12500, "12.5k"), (3.2e6, "3.2M"), (1e-5, "1e-5"), (0.05, "0.05"), (1e20, "1e20")],
)
def test_short_numbers(value, text):
    assert short_number(value) == text
