"""One line where a run ends before its clock does: at `detach()`, or at the interpreter's end."""

import atexit
import sys

from anybatch._scaling import Clock

_open: dict[int, "Ending"] = {}


class Ending:
    """The progress of a run, apart from the controller, so that nothing of the run is kept alive.

    Args:
        total: Base iterations of the run; `None` where it has no planned end.
        shown: Whether this process prints the line.
    """

    def __init__(self, total: float | None, *, shown: bool) -> None:
        self._total = total
        self._tau: float | None = None  # after this process's last step
        if shown and total is not None:
            _open[id(self)] = self

    def at(self, clock: Clock) -> None:
        """Note the clock after a step."""
        self._tau = clock.tau
        if self._total is not None and clock.done:
            self.drop()

    def drop(self) -> None:
        """Print nothing about this run any more."""
        _open.pop(id(self), None)

    def report(self) -> None:
        """Print the line if the run has begun and has not come to its end, once."""
        if id(self) in _open and self._tau is not None:
            print(
                f"anybatch: the training ended at tau = {self._tau:.6g} of {self._total:g} base iterations, so its "
                "schedule has not ended. Train `while not controller.done`, or resume from a checkpoint.",
                file=sys.stderr,
            )
        self.drop()


@atexit.register
def _at_exit() -> None:
    """Print the line of the newest run; an error has its own traceback."""
    failed = getattr(sys, "last_type", None) is not None
    begun = [each for each in _open.values() if each._tau is not None]
    if begun and not failed:
        begun[-1].report()
