import math
import sys

import hypothesis
import pytest
import torch
from faults import ledger

import anybatch

collect_ignore = [] if sys.platform == "linux" else ["faults"]  # its processes are forks, looked at through /proc
hypothesis.settings.register_profile("anybatch", deadline=None)  # a busy machine is no failure
hypothesis.settings.load_profile("anybatch")
torch.set_num_threads(1)  # two workers of one thread each beat more threads on tensors as small as the tests' are


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a GPU"))


@pytest.fixture(autouse=True)
def _namespace(doctest_namespace, tmp_path):
    torch.manual_seed(0)
    doctest_namespace.update(anybatch=anybatch, torch=torch, tmp_path=tmp_path, math=math)


@pytest.fixture(autouse=True)
def _no_search_for_averages(request, monkeypatch):
    """Every controller would walk all objects of this process once; `test_ema_foreign` alone tests it."""
    if request.path.name != "test_ema_foreign.py":
        monkeypatch.setattr("anybatch._controller.step_hooks.warn_of_foreign_average", lambda _: None)


def pytest_sessionfinish():
    from anybatch._controller import ending

    ending._open.clear()  # many tests end before their run does


def pytest_terminal_summary(terminalreporter):
    """What tests have left by `record_property`, on all workers: of a worst error the largest, of a count the sum."""
    found = {}
    for report in terminalreporter.stats.get("passed", ()):
        for name, value in report.user_properties:
            if name.startswith("worst "):
                found[name] = max(value, found.get(name, value))
            elif name.startswith("number of "):
                found[name] = value + found.get(name, 0)
    for name, value in sorted(found.items()):
        terminalreporter.write_line(f"{name}: {value:.2g}" if name.startswith("worst ") else f"{name}: {value}")
    ledger.summary(terminalreporter)
