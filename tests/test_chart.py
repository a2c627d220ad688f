"""Charts: whatever the numbers, what is drawn lies in the frame, and thinning keeps the extremes."""

import re
from math import inf, isfinite, isnan, nan

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anybatch._report.chart import Chart, Line, short_number, thin

NUMBERS = st.one_of(
    st.floats(), st.sampled_from([0.0, 1.0, 1e99, -1e99, 5e-324, 1e-323, 1.0 + 2**-52, nan, inf, 1e-13, 5e-12])
)
POINTS = st.lists(st.tuples(NUMBERS, NUMBERS), max_size=12)


@given(POINTS, st.booleans(), st.booleans(), st.booleans())
def test_whatever_the_numbers_the_picture_lies_in_its_frame(points, log_x, log_y, dots):
    band = [(x, y, y * 2) for x, y in points]
    chart = Chart("y", "x", [Line(points, "a", dots=dots, band=band)], log_x=log_x, log_y=log_y)
    text = chart.html()
    assert "nan" not in text
    assert "inf" not in text
    if chart.empty:
        assert text == ""
    for x, y in re.findall(r"[ML\"](-?[\d.]+),(-?[\d.]+)", text):
        assert -1 <= float(x) <= 440
        assert -1 <= float(y) <= 271
    assert text.count("<text") < 30


@given(st.lists(st.tuples(st.floats(0, 1000), NUMBERS), max_size=300), st.booleans())
def test_thinning_keeps_the_extremes_and_the_order(points, log):
    points = sorted(points, key=lambda p: p[0])
    kept = thin(points, columns=10, log=log)
    drawn = [p for p in points if not log or p[0] > 1e-100]
    assert len(kept) <= max(20, 2 * 11)
    assert [p[0] for p in kept] == sorted(p[0] for p in kept)
    values = [y for _, y in drawn if abs(y) < 1e100]
    if values:
        left = [y for _, y in kept if isfinite(y)]
        assert (min(left), max(left)) == (min(values), max(values)) or len(drawn) <= 20


def test_a_gap_stays_a_gap():
    points = [(float(i), nan if 400 <= i < 600 else 1.0) for i in range(1000)]
    kept = thin(points, columns=10)
    assert any(isnan(y) for _, y in kept)
    path = re.search(r'<path d="([^"]*)" stroke-dasharray', Chart("y", "x", [Line(kept, "a")]).html())[1]
    assert path.count("M") == 2


def test_points_lie_where_they_should():
    """Ends of a linear axis map to the ends of the frame less its margin, and a decade to equal lengths."""
    text = Chart("y", "x", [Line([(1, 0), (10, 5), (100, 10)], "a")], log_x=True).html()
    path = re.search(r'<path d="M([^"]*)" stroke-dasharray', text)[1]
    (x0, y0), (x1, y1), (x2, y2) = (map(float, p.split(",")) for p in path.split("L"))
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.2)
    assert y0 - y1 == pytest.approx(y1 - y2, abs=0.2)
    assert 46 <= x0 < x2 <= 432
    assert 8 <= y2 < y0 <= 230


def test_an_axis_is_logarithmic_where_values_are_far_apart():
    far = Chart("y", "x", [Line([(0, 0.001), (1, 1000)], "a")]).html()
    near = Chart("y", "x", [Line([(0, 0), (1, 1000)], "a")]).html()
    assert ">0.1<" in far
    assert ">0.1<" not in near
    assert ">500<" in near


@pytest.mark.parametrize(
    ("value", "text"),
    [(1, "1"), (9999, "9999"), (12500, "12.5k"), (3.2e6, "3.2M"), (1e-5, "1e-5"), (0.05, "0.05"), (1e20, "1e20")],
)
def test_short_numbers(value, text):
    assert short_number(value) == text
