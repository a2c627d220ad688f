"""Whether the user's own step is right: a few steps of it on copies, at scale 1 and at a larger one."""

from anybatch._check.check import check

__all__ = ["check"]
