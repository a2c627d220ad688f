"""The long form, `CASES=long` or `make faults`, has more faults of each kind; the short one is part of `make test`."""

import random

import common
import pytest
from processes import Processes

from faults.ledger import faults  # noqa: F401  # a fixture


@pytest.fixture
def times():
    """`times(short, long)`: how often, in the form that runs."""
    return common.times


@pytest.fixture
def rng(request):
    return random.Random(request.node.name)


@pytest.fixture
def processes(tmp_path):
    """Starts processes; none of them outlives the test."""
    started = Processes(tmp_path)
    yield started
    started.close()
