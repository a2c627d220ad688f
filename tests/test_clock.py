import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

import anybatch


@given(steps=st.integers(1, 5000), total=st.floats(1, 1e7))
def test_equal_steps_reach_the_total_after_exactly_their_number(steps, total):
    """The sum of n times total / n is off by rounding; the clock is not."""
    clock = anybatch.Clock(total)
    for _ in range(steps - 1):
        clock.advance(total / steps)
    assert not clock.done
    clock.advance(total / steps)
    assert clock.done


@given(parts=st.integers(1, 64), n=st.integers(1, 300))
def test_the_iteration_is_the_floor_up_to_rounding(parts, n):
    clock = anybatch.Clock()
    for i in range(1, n + 1):
        clock.advance(1 / parts)
        assert clock.iteration == i // parts


@pytest.mark.parametrize("amount", [-1, math.nan, math.inf])
def test_the_clock_never_goes_back(amount):
    clock = anybatch.Clock(10)
    with pytest.raises(anybatch.InvalidValueError):
        clock.advance(amount)
    assert clock.tau == 0


def test_subscribers_come_in_order_and_may_leave():
    clock, heard = anybatch.Clock(), []
    first = clock.subscribe(lambda i: heard.append(("first", i, clock.tau)))
    clock.subscribe(lambda i: (heard.append(("second", i, clock.tau)), first()))
    clock.advance(2)
    clock.advance(3)
    first()
    assert heard == [("first", 2, 2), ("second", 2, 2), ("second", 3, 5)]
