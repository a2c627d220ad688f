"""What used to be silent, or a false error, with several ranks."""

import pytest

from distributed import launch, trust_workers


@pytest.fixture(scope="module")
def clearings():
    return launch.run(trust_workers.clearings, world=2)


def test_every_way_to_clear_gradients_is_seen(clearings):
    for found in clearings:
        assert len(found) == 9 * 4 * 4 * 2 - 4 * 4 * 4
        wrong = {
            key: got
            for key, got in found.items()
            if key[3] != "not cleared" and got != [2 * key[-1]] * (3 if key[3] == "step skipped" else 5)
        }
        assert wrong == {}


def test_gradients_that_were_not_cleared_are_an_error(clearings):
    for found in clearings:
        outcomes = [str(got) for key, got in found.items() if key[3] == "not cleared"]
        assert outcomes
        assert all("were not cleared" in got for got in outcomes)


@pytest.mark.parametrize("broken", [False, True])
def test_what_one_rank_did_not_measure_none_did(broken):
    (samples, skipped, gain, weights), other = launch.run(trust_workers.hooks_on_one_rank, world=2, args=(broken,))
    assert (samples, skipped, gain, weights) == other
    assert (samples, skipped) == ([1, 2, 2, 3], broken)
    assert gain > 1


@pytest.mark.parametrize("shared", [True, False])
def test_ranks_with_the_same_examples_are_warned_of(shared):
    """Their gradients are equal, so the variance is exactly 0."""
    for warned, gain in launch.run(trust_workers.examples_of_ranks, world=2, args=(shared,)):
        assert len(warned) == shared
        assert (gain == 1) == shared
        assert all("Does every rank see the same examples?" in text and "DistributedSampler" in text for text in warned)


@pytest.mark.parametrize("reduction", ["sum", 2])
@pytest.mark.parametrize("sizes", [((4, 8), (4, 8)), ((4, 8), (4, 0)), ((4, 8), (0, 0)), ((0,), (4,))])
def test_the_mean_of_sums_is_over_the_micro_batches_of_all_ranks_that_are_not_empty(sizes, reduction):
    for pairs in launch.run(trust_workers.empty_micro_batches, world=2, args=(sizes, reduction)):
        for found, expected in pairs:
            assert found == pytest.approx(expected, rel=1e-9)


def test_what_is_wrong_on_one_rank_is_an_error_on_all():
    found, other = launch.run(trust_workers.errors, world=2)
    expected = {
        "another base batch": "UsageError: attach was given another base_batch",
        "another rule": "UsageError: attach was given another rule",
        "another size": "None",  # of a micro-batch may differ
        "a state on one rank": "UsageError: The ranks have different clocks",
        "a state on one rank, by layer": "UsageError: The ranks have different clocks",
        ("ddp", "never synchronised"): "UsageError: The gradients of this step are not averaged",
        ("fsdp", "never synchronised"): "UsageError: The gradients of this step are not averaged",
        ("ddp", "not synchronised at last"): "UsageError: The gradients of this step are not averaged",
        ("fsdp", "not synchronised at last"): "UsageError: The gradients of this step are not averaged",
        "the inner module": "UsageError: The ranks hold different gradients",
        "a forward inside of no_sync": "UsageError: The ranks hold different gradients",
        "no backward": "(0, 1, 0.0)",
    }
    assert found.keys() == expected.keys()
    for each in (found, other):
        assert {key: str(each[key]).startswith(text) for key, text in expected.items()} == dict.fromkeys(expected, True)


def test_several_backwards_are_one_micro_batch():
    for found in launch.run(trust_workers.together, world=2):
        for whole, apart in (found[:2], found[2:]):
            assert whole[:2] == apart[:2]
            assert apart[1] == 4
            assert apart[2:] == pytest.approx(whole[2:], rel=1e-10)
