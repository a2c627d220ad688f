"""Whether the user's own step is right: a few steps of it on copies, at scale 1 and at a larger one."""

from anybatch._check.check import Check, Finding, check

__all__ = ["Check", "Finding", "check"]
