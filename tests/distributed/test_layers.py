"""Layers that are looked at: DDP and FSDP2 find what accumulation finds, in the all-reduce that is there."""

import functools

import oracle
import pytest

from distributed import launch
from distributed import layer_workers as workers

WORLD = 2
LAYERS = 2  # of the oracle's model


@functools.cache
def routes():
    return launch.run(workers.routes, world=WORLD, args=(WORLD,))


@pytest.mark.parametrize(
    ("engine", "accumulation"), [("DDP", 1), ("DDP", 3), ("FSDP2", 1), ("FSDP2", 3), ("compiled", 1)]
)
def test_every_engine_finds_the_same_by_layer_in_one_all_reduce(engine, accumulation):
    expected, none = workers.looks(oracle.make_model(), accumulation=WORLD * accumulation)
    assert none == []
    looked = [1, 0] * (workers.STEPS // workers.EVERY)
    (first, _), (second, _) = routes()
    lines, sizes = first[engine, accumulation]
    assert [len(line) for line in lines] == [2 + 2 * LAYERS * at for at in looked]
    assert sizes == second[engine, accumulation][1] == [12 + 2 * LAYERS] * workers.STEPS
    for line, wanted in zip(lines, expected, strict=True):
        assert line == pytest.approx(wanted, rel=1e-6)
        for what in ("variance", "sqnorm"):
            parts = [value for name, value in line.items() if name.endswith(f"/{what}") and "per_layer" in name]
            assert not parts or sum(parts) == pytest.approx(line[f"anybatch/raw_{what}"], rel=1e-9)


def test_a_record_on_another_rank_alone_and_join_are_refused():
    for _, told in routes():
        assert "a record on rank 1 and none on rank 0" in told[0]
        assert "does not support a record with per_layer" in told[1]
