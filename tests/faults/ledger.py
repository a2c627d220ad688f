"""What the injectors have done and what came of it: counted in the tests, told in one line at the end of a run."""

import contextlib
import json

import pytest
import torch


class Ledger:
    """The counts of one test.

    A fault is `injected` once there is proof that it happened: an exit status, an error that was raised, a count of the
    injector's own. It is `survived` once everything after it was found right.
    """

    def __init__(self):
        self.counts = {"injected": 0, "survived": 0, "lost": 0, "wrong": 0}

    def fired(self, faults=1):
        self.counts["injected"] += faults

    def survived(self):
        """All that was injected so far, and that is something."""
        assert self.counts["injected"] > 0, "no fault fired"
        self.counts["survived"] = self.counts["injected"]

    def same(self, mine, expected, what=""):
        """Two states of tensors and numbers agree to the last bit."""
        different = list(differences(mine, expected))
        self.counts["wrong"] += bool(different)
        assert not different, f"{what}: {different[:5]}"

    def steps(self, mine, expected):
        """The numbers of the steps that a record tells."""
        missing = sorted(set(expected) - set(mine))
        self.counts["lost"] += len(missing)
        assert not missing, f"steps {missing[:5]} are missing"
        assert list(mine) == list(expected)


def differences(mine, expected, path="state"):
    """Where two nested states differ, in words; nan is equal to nan."""
    if isinstance(expected, torch.Tensor):
        if mine.dtype != expected.dtype or mine.shape != expected.shape:
            yield f"{path}: {mine.dtype} {tuple(mine.shape)}"
        elif bits(mine) != bits(expected):
            yield f"{path}: {mine.flatten()[:3].tolist()} for {expected.flatten()[:3].tolist()}"
    elif isinstance(expected, dict):
        if list(map(str, mine)) != list(map(str, expected)):
            yield f"{path}: {list(mine)} for {list(expected)}"
        else:
            for key, value in expected.items():
                yield from differences(mine[key], value, f"{path}.{key}")
    elif isinstance(expected, list | tuple):
        if len(mine) != len(expected):
            yield f"{path}: {len(mine)} for {len(expected)}"
        else:
            for i, (a, b) in enumerate(zip(mine, expected)):
                yield from differences(a, b, f"{path}[{i}]")
    elif type(mine) is not type(expected) or repr(mine) != repr(expected):
        yield f"{path}: {mine!r} for {expected!r}"


def bits(tensor):
    return tensor.detach().contiguous().flatten().view(torch.uint8).tolist() if tensor.numel() else []


def equal(mine, expected):
    """Whether two states agree; also where one is none at all."""
    try:
        return not list(differences(mine, expected))
    except (AttributeError, TypeError):
        return False


def steps_of(run):
    """A record's steps without their times, which no two runs share."""
    return [{**vars(step), "seconds": 0.0} for step in run.steps]


@pytest.fixture
def faults(request):
    """The test's ledger."""
    ledger = Ledger()
    request.node.user_properties.append(("faults", ledger.counts))  # which reach the process that prints the summary
    return ledger


def summary(terminalreporter):
    """One line of what was injected and what came of it."""
    total = dict.fromkeys(("injected", "survived", "lost", "wrong"), 0)
    for outcome in ("passed", "failed", "xfailed"):
        for report in terminalreporter.stats.get(outcome, []):
            for name, counts in getattr(report, "user_properties", []):
                if name == "faults" and report.when == "call":
                    total = {key: total[key] + value for key, value in counts.items()}
    if total["injected"]:
        terminalreporter.write_line(
            f"faults: {total['injected']} injected, {total['survived']} survived, lost steps {total['lost']}, "
            f"wrong results {total['wrong']}"
        )


def json_lines(path):
    """The JSON lines of a log whose last line may not be whole yet."""
    found = []
    for text in path.read_text().splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError):
            found.append(json.loads(text))
    return found
