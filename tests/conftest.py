import math

import hypothesis
import pytest
import torch

import anybatch

hypothesis.settings.register_profile("anybatch", deadline=None)  # a busy machine is no failure
hypothesis.settings.load_profile("anybatch")
torch.set_num_threads(1)  # two workers of one thread each beat more threads on tensors as small as the tests' are


@pytest.fixture(autouse=True)
def _namespace(doctest_namespace, tmp_path):
    torch.manual_seed(0)
    doctest_namespace.update(anybatch=anybatch, torch=torch, tmp_path=tmp_path, math=math)


def pytest_terminal_summary(terminalreporter):
    """The largest of each number that passing tests have left by `record_property`, on all workers."""
    largest = {}
    for report in terminalreporter.stats.get("passed", ()):
        for name, value in report.user_properties:
            largest[name] = max(value, largest.get(name, value))
    for name, value in sorted(largest.items()):
        terminalreporter.write_line(f"worst {name}: {value:.2g}")
