"""The plain loop itself, whose training every framework's is, and the table of all of them."""

from distributed import launch

from integrations import same, task, workers


def test_the_plain_loop_on_two_processes_is_that_on_one():
    two = launch.run(workers.plain, world=2, args=(2,))
    for i, clip in enumerate((None, 0.5)):
        same.hold("plain loop", [task.plain(clip=clip)], clip)
        same.hold("plain loop", [found[i] for found in two], clip)


def test_the_pages_table_is_the_kept_one_of_all_frameworks():
    lines = same.table()
    assert len(lines) == 2 + len(same.FRAMEWORKS) * 2 * 2 + len(same.SHARDED)
    assert "\n".join(lines) in same.PAGE.read_text()
