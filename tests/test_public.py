"""Every public name is documented, and its examples run."""

import ast
import doctest
import inspect
import re
from dataclasses import fields
from pathlib import Path

import pytest

import anybatch
from anybatch._branch.branch import Branch
from anybatch._branch.critical import BatchLoss
from anybatch._check.check import Check, Finding
from anybatch._forecast.forecast import Forecast, ScaleForecast
from anybatch._forecast.steps import Estimate
from anybatch._maps.maps import Change
from anybatch._record.record import Run
from anybatch._scaling.moments import Moments

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
    "branch",
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
# What functions return and nobody makes: no public names, but each documented where it is returned.
RETURNED = {
    "branch": [Branch, BatchLoss, Estimate],
    "check": [Check, Finding],
    "forecast": [Forecast, ScaleForecast, Estimate],
    "moments": [Moments],
    "read_record": [Run],
    "scale_hyperparameters": [Change],
    "scale_optimizer": [Change],
}
KINDS = {kind.__name__: kind for kinds in RETURNED.values() for kind in kinds}
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
    "branch",
    "forecast",
    "gain",
    "moments",
    "scale_hyperparameters",
    "scale_optimizer",
]


def test_there_are_few_public_names():
    assert len(anybatch.__all__) <= 38


@pytest.mark.parametrize(
    "name", ["Change", "Check", "Estimate", "Finding", "Forecast", "MetricRecord", "Moments", "Run", "ScaleForecast"]
)
def test_a_name_that_was_removed_is_an_error_that_states_what_returns_it(name):
    with pytest.raises(AttributeError, match="no public name any more") as caught:
        getattr(anybatch, name)
    function = re.search(r"anybatch\.(\w+) returns", str(caught.value))[1]
    assert function in anybatch.__all__


@pytest.mark.parametrize("name", RETURNED)
def test_what_is_returned_is_told_where_it_is_returned(name):
    text = re.search(r"Returns:\n(.*?)\n\n", inspect.getdoc(getattr(anybatch, name)), re.DOTALL)[1]
    for kind in RETURNED[name]:
        assert kind.__name__ not in anybatch.__all__
        assert f"`{kind.__name__}`" in text
        for field in fields(kind):
            assert re.search(rf"`{field.name}`", text), f"{name} does not name {kind.__name__}.{field.name}"


@pytest.mark.parametrize("name", [*NAMES, *KINDS])
def test_is_documented_with_all_its_arguments(name):
    thing = KINDS.get(name) or getattr(anybatch, name)
    text = inspect.getdoc(thing)
    assert text
    if name.endswith(("Error", "Warning")) or name == "Controller":
        return
    for argument in inspect.signature(thing).parameters:
        assert re.search(rf"\b{argument}\b.*:", text), f"{name} does not document {argument}"


@pytest.mark.parametrize("name", ["Controller", "Clock", "ModelEMA", "RunRecord", "Rule", *KINDS])
def test_public_members_are_documented(name):
    kind = KINDS.get(name) or getattr(anybatch, name)
    for member in dir(kind):  # what it inherits too
        value = inspect.getattr_static(kind, member)
        if not member.startswith("_") and (callable(value) or isinstance(value, property)):
            assert inspect.getdoc(value), f"{name}.{member}"


@pytest.mark.parametrize(("name", "least"), [("Controller", 5), ("Run", 1)])
def test_examples_of_members_run(name, least, doctest_namespace):
    found, kind = 0, KINDS.get(name) or getattr(anybatch, name)
    for member in dir(kind):
        value = inspect.getattr_static(kind, member)
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
