"""Ranks that were given different settings: an error that names the setting, at `attach` or at the first step."""

import functools
from dataclasses import fields

import pytest

from anybatch._controller.settings import Settings
from anybatch._scaling import BatchSize
from distributed import launch
from distributed import settings_workers as workers

CASES = [
    *workers.FIELDS,
    *((cls, name) for cls, entries in workers.OPTIMIZERS.items() for name in entries),
    *(("scheduler", name) for name in workers.SCHEDULERS),
    "record",
]


@functools.cache
def differ():
    return launch.run(workers.differ, world=2)


def test_every_setting_that_is_compared_has_a_case():
    compared = {field.name for field in fields(Settings) if field.compare} - {"batch"}
    sizes = {field.name for field in fields(BatchSize)} - {"micro_batch"}
    assert set(workers.FIELDS) == compared | sizes
    assert {field.name for field in fields(Settings) if not field.compare} == {
        "leader",
        "pipeline",
        "process_group",
        "record",
    }


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_setting_that_differs_on_one_rank_is_an_error_on_both(case):
    name = case if isinstance(case, str) else case[1]
    first, second = (found[case] for found in differ())
    assert first == second
    assert name in first
    assert ("only rank 0 writes" if case == "record" else "give every rank the same") in first.lower()


def test_what_drifts_apart_is_an_error_at_the_next_step():
    for found in launch.run(workers.drift, world=2):
        for name, error in found.items():
            assert "different clocks, averages, learning rates or positions" in error, name


def test_a_record_by_layer_on_the_first_rank_is_enough():
    (steps, layers), (other, none) = launch.run(workers.same, world=2)
    assert (steps, other) == (3, 3)
    assert (layers, none) == ([True, False, True], [])
