import math
from fractions import Fraction

import pytest
import torch
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


@given(
    whole=st.integers(0, 10**11),
    part=st.fractions(0, 1, max_denominator=1000).filter(lambda part: part < 1),
    length=st.sampled_from([Fraction(1), Fraction(1, 4), Fraction(3, 2), Fraction(390), Fraction(1000, 3)]),
)
def test_what_is_counted_is_exact_however_far_the_clock_is(whole, part, length):
    """At a tau of 1e9, and for a part of a stretch that is no rounding of a whole one."""
    clock = anybatch.Clock()
    clock.advance(float((whole + part) * length))
    assert clock.count(float(length)) == whole


@given(
    moves=st.lists(st.integers(10, 5000), min_size=1, max_size=60),
    parts=st.integers(1, 97),
    times=st.integers(1, 20),
    begin=st.integers(0, 10**9),
)
def test_a_long_sum_of_moves_counts_what_their_exact_sum_does(moves, parts, times, begin):
    clock, exact = anybatch.Clock(), Fraction(begin)
    clock.advance(float(begin))
    for move in moves * times:
        clock.advance(move / parts)
        exact += Fraction(move, parts)
    assert clock.iteration == math.floor(exact)


@pytest.mark.parametrize("amount", [-1, math.nan, math.inf])
def test_the_clock_never_goes_back(amount):
    clock = anybatch.Clock(10)
    with pytest.raises(anybatch.InvalidValueError):
        clock.advance(amount)
    assert clock.tau == 0


def test_it_may_be_told_of_no_movement():
    clock, heard = anybatch.Clock(10), []
    clock.subscribe(heard.append)
    clock.advance(0)
    assert (clock.tau, heard) == (0, [0])


def test_subscribers_come_in_order_and_may_leave():
    clock, heard = anybatch.Clock(), []
    first = clock.subscribe(lambda i: heard.append(("first", i, clock.tau)))
    clock.subscribe(lambda i: (heard.append(("second", i, clock.tau)), first()))
    clock.advance(2)
    clock.advance(3)
    first()
    assert heard == [("first", 2, 2), ("second", 2, 2), ("second", 3, 5)]


@pytest.mark.parametrize(
    "total",
    [
        "100",
        True,
        pytest.param(10**400, id="huge"),
        pytest.param(10**5000, id="beyond text"),
        math.nan,
        math.inf,
        0,
        -1,
        [100],
        1j,
    ],
)
def test_a_total_is_a_positive_number(total):
    with pytest.raises(anybatch.InvalidValueError, match="total must be a positive number of base iterations"):
        anybatch.Clock(total)


@pytest.mark.parametrize("amount", ["1", True, None, pytest.param(10**400, id="huge"), [1]])
def test_a_move_is_a_number(amount):
    clock, heard = anybatch.Clock(10), []
    clock.subscribe(heard.append)
    with pytest.raises(anybatch.InvalidValueError, match="The clock advances by"):
        clock.advance(amount)
    assert (clock.tau, heard) == (0, [])


def raising(error):
    def subscriber(_):
        raise error

    return subscriber


def test_a_subscriber_that_raises_leaves_nobody_behind():
    clock, heard = anybatch.Clock(), []
    clock.subscribe(heard.append)
    clock.subscribe(raising(KeyError("mine")))
    clock.subscribe(heard.append)
    for moves in (1, 2):
        with pytest.raises(KeyError, match="mine"):
            clock.advance(2.5)
        assert (clock.tau, heard) == (2.5 * moves, [2.5, 2.5] * moves)


def test_the_errors_of_several_subscribers_are_all_raised():
    clock, heard = anybatch.Clock(), []
    errors = [anybatch.UsageError("first"), OSError("second")]
    for error in errors:
        clock.subscribe(raising(error))
    clock.subscribe(heard.append)
    with pytest.raises(ExceptionGroup) as caught:
        clock.advance(1)
    assert list(caught.value.exceptions) == errors
    assert heard == [1]
    clock.subscribe(raising(KeyboardInterrupt()))
    with pytest.raises(BaseExceptionGroup) as interrupted:
        clock.advance(1)
    assert not isinstance(interrupted.value, Exception)  # an interrupt is not held up by `except Exception`
    assert (clock.tau, heard) == (2, [1, 1])


def test_an_average_behind_a_subscriber_that_raises_follows_the_step():
    weights = torch.nn.Linear(2, 1)
    optimizer = torch.optim.SGD(weights.parameters(), lr=0.1)
    controller = anybatch.attach(optimizer, model=weights, scale="count", rule=anybatch.Linear())
    controller.clock.subscribe(raising(OSError("disk full")))
    ema = anybatch.ModelEMA(weights, 0.5, clock=controller.clock)
    weights(torch.ones(1, 2)).sum().backward()
    with pytest.raises(OSError, match="disk full"):
        optimizer.step()
    assert ema.tau == controller.tau == 1
