import math
import sys

import pytest
import torch
from faults.ledger import pytest_terminal_summary  # noqa: F401  # xdist's main process does not load faults/conftest.py

import anybatch

collect_ignore = [] if sys.platform == "linux" else ["faults"]  # its processes are forks, looked at through /proc
torch.set_num_threads(1)  # two workers of one thread each beat more threads on tensors as small as the tests' are


@pytest.fixture(autouse=True)
def _namespace(doctest_namespace, tmp_path):
    torch.manual_seed(0)
    doctest_namespace.update(anybatch=anybatch, torch=torch, tmp_path=tmp_path, math=math)
