"""Who says how many micro-batches the next step takes: the options, the noise, or the schedule."""

import anybatch
from recipes.training.options import Options
from recipes.training.task import Task

Accumulation = anybatch.BatchController | anybatch.Seesaw
EFFICIENCY = 0.8  # BatchController's own


def growth(options: Options, task: Task, controller: anybatch.Controller) -> Accumulation | None:
    """What chooses the accumulation, between those of `--scale` and `--most`; `None` where the options do.

    Raises:
        InvalidValueError: the accumulation is not whole, or `--most` is below `--scale`.
        UsageError: a rule that measures no noise, where the batch follows it.
    """
    if options.grow is None or options.most is None:
        return None
    ranks, least = controller.ranks, options.scales[0][0]
    first, last = (options.accumulation_for(scale, task, ranks=ranks) for scale in (least, options.most))
    if options.grow == "seesaw":
        return anybatch.Seesaw(controller, bounds=(first, last))
    return anybatch.BatchController(controller, efficiency=options.efficiency or EFFICIENCY, bounds=(first, last))
