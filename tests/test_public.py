"""Every public name is documented, and its examples run."""

import ast
import doctest
import inspect
import re
from pathlib import Path

import pytest

import anybatch

ROOT = Path(__file__).parent.parent
NAMES = [name for name in anybatch.__all__ if not name.startswith("__")]
WITH_EXAMPLES = [
    "AdaScale",
    "BatchController",
    "Clock",
    "HeldScheduler",
    "Identity",
    "Linear",
    "ModelEMA",
    "Progressive",
    "RunRecord",
    "Seesaw",
    "SquareRoot",
    "attach",
    "check",
    "ema_state_from",
    "forecast",
    "gain",
    "half_life",
    "iter_record",
    "moments",
    "scale_hyperparameters",
    "scale_optimizer",
    "split",
]
WITH_SOURCES = [
    "AdaScale",
    "BatchController",
    "Clock",
    "Identity",
    "Linear",
    "ModelEMA",
    "Progressive",
    "Seesaw",
    "SquareRoot",
    "attach",
    "forecast",
    "gain",
    "moments",
    "scale_hyperparameters",
    "scale_optimizer",
]


@pytest.mark.parametrize("name", NAMES)
def test_is_documented_with_all_its_arguments(name):
    thing = getattr(anybatch, name)
    text = inspect.getdoc(thing)
    assert text
    if name.endswith(("Error", "Warning")) or name == "Controller":
        return
    for argument in inspect.signature(thing).parameters:
        assert re.search(rf"\b{argument}\b.*:", text), f"{name} does not document {argument}"


@pytest.mark.parametrize("name", ["Controller", "Clock", "ModelEMA", "Run", "RunRecord", "Moments", "Rule"])
def test_public_members_are_documented(name):
    for member in dir(getattr(anybatch, name)):  # what it inherits too
        value = inspect.getattr_static(getattr(anybatch, name), member)
        if not member.startswith("_") and (callable(value) or isinstance(value, property)):
            assert inspect.getdoc(value), f"{name}.{member}"


@pytest.mark.parametrize(("name", "least"), [("Controller", 5), ("Run", 1)])
def test_examples_of_members_run(name, least, doctest_namespace):
    found = 0
    for member in dir(getattr(anybatch, name)):
        value = inspect.getattr_static(getattr(anybatch, name), member)
        if member.startswith("_"):
            continue
        for test in doctest.DocTestFinder(recurse=False).find(value, member, globs=dict(doctest_namespace)):
            assert doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(test).failed == 0, member
            found += len(test.examples) > 0
    assert found >= least


@pytest.mark.parametrize("name", WITH_EXAMPLES)
def test_examples_run(name, doctest_namespace):
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    tests = doctest.DocTestFinder(recurse=False).find(getattr(anybatch, name), name, globs=dict(doctest_namespace))
    assert sum(len(test.examples) for test in tests) > 0
    for test in tests:
        assert runner.run(test).failed == 0


@pytest.mark.parametrize("name", WITH_SOURCES)
def test_the_papers_are_named(name):
    assert re.search(r"Source:\n.*\d{4}", inspect.getdoc(getattr(anybatch, name)))


def test_no_bare_assert_stands_before_a_user():
    """Errors a user can meet are typed; an assert vanishes under python -O."""
    for path in (ROOT / "src").rglob("*.py"):
        asserts = [node.lineno for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Assert)]
        assert not asserts, f"{path.name}: {asserts}"


def test_errors_are_of_their_builtin_kinds():
    kinds = {"InvalidValueError": ValueError, "StateError": ValueError, "UsageError": RuntimeError,
             "UnsupportedError": NotImplementedError}  # fmt: skip
    for name, kind in kinds.items():
        assert issubclass(getattr(anybatch, name), (anybatch.AnybatchError, kind))
        assert issubclass(getattr(anybatch, name), kind)
