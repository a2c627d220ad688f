"""anybatch against what people do instead: usual rules, rates re-tuned at the large batch, and others, on ten tasks.

    python -m benchmarks.instead [--jobs 2] [--stages 8] [--only lstm,vit]      trains what the cache lacks
    python -m benchmarks.instead --table                                        writes page, tables, JSON and figure

Each task's learning rate is tuned at scale 1 first, by factors of 2. Then each row trains at scales 8, 32 and 128.
Every training is a line of `--cache`, docs/instead/runs.jsonl. A stopped command continues from there; several caches
are joined by `cat`. The order is by use: a table of three seeds first, then five seeds, the other rows, the long runs
and scale 128; and in each of these stages the cheap tasks first.

A learning rate is re-tuned by factors of 2 around the usual rule's until the best lies inside, by the mean loss of
three of the compared seeds. That favours the re-tuned rows.
"""

import argparse
from collections.abc import Collection, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import torch

from benchmarks import instead_page
from benchmarks.instead_runs import STAGES, Cache, Stage, wanted
from benchmarks.instead_tasks import TASKS
from benchmarks.instead_train import Outcome, Run, train
from benchmarks.same_training import one_thread

CACHE = Path("docs/instead/runs.jsonl")


def work(stages: Sequence[Stage], cache: Cache, jobs: int) -> None:
    """Train what is missing, the first of the order first; every finished training is a line of the cache."""
    pending: dict[Future[Outcome], tuple[int, Run]] = {}
    complete: set[tuple[int, str]] = set()
    here = ThreadPoolExecutor(1)  # one job trains in this process
    with here if jobs == 1 else ProcessPoolExecutor(jobs, get_context("spawn"), one_thread) as pool:
        try:
            while True:
                for number, run in wanted(stages, cache, complete):
                    if len(pending) == jobs:
                        break
                    if all(run != other for _, other in pending.values()):
                        pending[pool.submit(train, run)] = number, run
                if not pending:
                    return
                for future in wait(pending, return_when=FIRST_COMPLETED).done:
                    number, run = pending.pop(future)
                    outcome = future.result()
                    cache.write(run, outcome)
                    print(f"{len(cache.found)}, stage {number}: {run} {_shown(outcome)}", flush=True)
        finally:  # an error of one training is raised now, not after all others
            pool.shutdown(cancel_futures=True)


def _shown(outcome: Outcome) -> str:
    return f"{outcome.steps} steps, {outcome.diverged or outcome.losses[-1]}, {outcome.seconds:.1f} s"


def of_tasks(names: Collection[str]) -> list[Stage]:
    """The stages of these tasks alone."""
    return [replace(stage, tasks=tuple(name for name in stage.tasks if name in names)) for stage in STAGES]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--cache", type=Path, default=CACHE)
    add("--jobs", type=int, default=2, help="processes of one thread each (default: 2)")
    add("--stages", type=int, default=len(STAGES), help=f"the first of the {len(STAGES)} (default: all)")
    add("--only", type=lambda text: text.split(","), default=list(TASKS), help="tasks, of " + ", ".join(TASKS))
    add("--table", action="store_true", help="write page, tables, JSON and figure from the cache; train nothing")
    add("--out", type=Path, default=Path("docs"), help="folder of instead.md and instead/ (default: docs)")
    options = parser.parse_args(arguments)
    if strangers := set(options.only) - TASKS.keys():
        parser.error(f"unknown: {', '.join(sorted(strangers))}")
    torch.set_num_threads(1)
    cache = Cache(options.cache)
    if not options.table:
        work(of_tasks(options.only)[: options.stages], cache, options.jobs)
    instead_page.write_all(cache, options.out)


if __name__ == "__main__":
    main()
