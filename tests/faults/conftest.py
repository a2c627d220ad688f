"""The long form, `FAULTS=long` or `make faults`, has more faults of each kind; the short one is part of `make test`."""

import os
import random

import pytest

from faults.ledger import faults  # noqa: F401  # a fixture
from processes import Processes


@pytest.fixture
def times():
    """`times(short, long)`: how often, in the form that runs."""
    return lambda short, long: long if os.environ.get("FAULTS") == "long" else short


@pytest.fixture
def rng(request):
    return random.Random(request.node.name)


@pytest.fixture
def processes(tmp_path):
    """Starts processes; none of them outlives the test."""
    started = Processes(tmp_path)
    yield started
    started.close()
