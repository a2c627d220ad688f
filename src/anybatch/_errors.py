"""The errors of anybatch. Each message states what is wrong, with the value, and what to do."""


class AnybatchError(Exception):
    """Base class of every error that anybatch raises on purpose."""


class InvalidValueError(AnybatchError, ValueError):
    """An argument has a value outside its range, or two arguments contradict each other."""


class UsageError(AnybatchError, RuntimeError):
    """A call came in the wrong phase, or the training loop has an error that would otherwise be silent."""


class UnsupportedError(AnybatchError, NotImplementedError):
    """A combination that anybatch does not support; the message names it."""


class DivergedError(AnybatchError, ArithmeticError):
    """Weights or gradients are not finite, so training cannot continue."""


class StateError(AnybatchError, ValueError):
    """A saved state does not match: another model, base batch, set of names or a newer version."""


class AnybatchWarning(UserWarning):
    """Training continues, but could be better; the message states what to change."""
