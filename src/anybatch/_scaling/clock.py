"""The scale-invariant clock: tau counts base iterations, and everything counted in steps follows it."""

from collections.abc import Callable
from math import floor

from anybatch._errors import InvalidValueError, UsageError
from anybatch._numbers import positive, real, shown

Subscriber = Callable[[float], None]

# tau is a sum of up to millions of floats. A total = n * (total / n) must be reached after n of them.
_SLACK = 1e-9
# Relative to the interval that is counted: at a tau of 1e9 the slack above would be a whole base iteration.
_MOST_SLACK = 1e-4


class Clock:
    """The number of scale-invariant iterations done, tau, and its subscribers.

        tau <- tau + iterations        after every step that was not skipped

    One base iteration is one optimizer step at the base batch. A step of AdaScale advances the clock by its gain, a
    step of linear scaling by its scale. The schedule is at `floor(tau)`; training ends when `tau >= total`.

    Args:
        total: base iterations of the whole run, T_SI; positive, or `None` when training has no planned end.

    Raises:
        InvalidValueError: `total` is not a positive, finite number.

    Example:
        >>> clock = anybatch.Clock(total=10)
        >>> moved = []
        >>> unsubscribe = clock.subscribe(moved.append)
        >>> clock.advance(6.5); clock.advance(3.5)
        >>> clock.tau, clock.iteration, clock.done, moved
        (10.0, 10, True, [6.5, 3.5])

    Source:
        Johnson et al., AdaScale SGD, ICML 2020, Algorithm 2 (tau and T_SI).
    """

    def __init__(self, total: float | None = None) -> None:
        if total is not None and positive(total) is None:
            raise InvalidValueError(f"total must be a positive number of base iterations, got {shown(total)}.")
        self.total = total
        self.tau: float = 0.0
        self._subscribers: dict[object, Subscriber] = {}

    @property
    def subscribers(self) -> int:
        """The number of subscribers."""
        return len(self._subscribers)

    @property
    def iteration(self) -> int:
        """`floor(tau)`, the index into a schedule that was written for the base batch."""
        return self.count(1.0)

    def count(self, length: float) -> int:
        """The number of completed intervals of `length` base iterations, such as epochs."""
        return floor((self.tau + min(_SLACK * max(1.0, self.tau), _MOST_SLACK * length)) / length)

    @property
    def done(self) -> bool:
        """Whether `tau >= total`.

        Raises:
            UsageError: the clock has no `total`, so a loop on `done` would never end.
        """
        if self.total is None:
            raise UsageError("The clock has no total: pass total=, the base iterations of the whole run.")
        return self.reached(self.total)

    def reached(self, tau: float) -> bool:
        """Whether the clock has reached `tau`, up to the rounding of a long sum."""
        return self.tau + _SLACK * max(1.0, abs(tau)) >= tau

    def advance(self, iterations: float) -> None:
        """Advance by `iterations` (finite, not negative) and call every subscriber, in the order of subscription.

        If a subscriber raises, the others are still called. The error is raised after that; several, as a group.

        Raises:
            InvalidValueError: `iterations` is negative, or not a finite number; the clock has not advanced.
        """
        moved = real(iterations)
        if moved is None or moved < 0:
            raise InvalidValueError(f"The clock advances by a finite, non-negative amount, got {shown(iterations)}.")
        self.tau += moved
        errors: list[BaseException] = []
        for subscriber in list(self._subscribers.values()):
            try:
                subscriber(moved)
            except BaseException as error:  # an interrupt, too, must not keep the others behind the clock
                errors.append(error)
        if len(errors) == 1:
            raise errors[0]
        if errors:
            raise BaseExceptionGroup(f"Several subscribers of the clock failed at tau = {self.tau:g}", errors)

    def subscribe(self, subscriber: Subscriber) -> Callable[[], None]:
        """Call `subscriber(iterations)` after every advance; return a function that ends this."""
        key = object()
        self._subscribers[key] = subscriber

        def unsubscribe() -> None:
            self._subscribers.pop(key, None)

        return unsubscribe
