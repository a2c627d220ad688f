"""A test of the user's own step: a few calls on copies, at scale 1 and at a larger scale."""

from anybatch._check.check import check

__all__ = ["check"]
