"""The errors a user can meet. Each message says what was wrong, with the value, and what to do."""


class AnybatchError(Exception):
    """Base class of every error that anybatch raises on purpose."""


class InvalidValueError(AnybatchError, ValueError):
    """An argument has a value outside its range, or two arguments contradict each other."""


class UsageError(AnybatchError, RuntimeError):
    """A call came in the wrong phase, or the training loop does something that would go wrong silently."""


class UnsupportedError(AnybatchError, NotImplementedError):
    """A combination that anybatch does not support; the message names it."""


class DivergedError(AnybatchError, ArithmeticError):
    """Training has come to weights or gradients that are not finite, and goes nowhere."""


class StateError(AnybatchError, ValueError):
    """A saved state does not fit: another model, another base batch, other names or a newer version."""


class AnybatchWarning(UserWarning):
    """Training goes on, but not as well as it could; the message says what to change."""
