"""The critical batch by experiment: short trainings from one checkpoint at several batches."""

from anybatch._branch.branch import Branch, branch

__all__ = ["Branch", "branch"]
