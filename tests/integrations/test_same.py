"""The plain loop itself, whose training every framework's is, and the table of all of them."""

from statistics import fmean, stdev

from distributed import launch

from integrations import same, task, workers


def test_the_plain_loop_on_two_processes_is_that_on_one():
    two = launch.run(workers.plain, world=2, args=(2,))
    for i, clip in enumerate((None, 0.5)):
        same.hold("plain loop", [task.plain(clip=clip)], clip)
        same.hold("plain loop", [found[i] for found in two], clip)


def test_a_run_whose_batch_doubles_ends_as_good_as_one_whose_batch_does_not():
    """Of other examples each: what is resumed with twice the batch is held to be the first of these, to 1e-6."""
    whole = [task.quality(task.plain(first=first)) for first in range(0, 200, 20)]
    assert abs(task.quality(task.doubling()) - fmean(whole)) < 2 * stdev(whole)


def test_the_pages_table_is_the_kept_one_of_all_frameworks():
    lines = same.table()
    assert len(lines) == 2 + len(same.FRAMEWORKS) * 2 * 2 + len(same.SHARDED)
    assert "\n".join(lines) in same.PAGE.read_text()
