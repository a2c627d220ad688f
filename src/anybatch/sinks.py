"""Trackers as destinations of `attach(record=...)`, beside or instead of a file.

A sink is any function of one dictionary. It is called on rank 0, after every step with the numbers of the step's record
under their names after "anybatch/", and after every `controller.log` with its results. Both have "anybatch/step" and
"anybatch/tau". Numbers that are not finite are left out. A sink that raises is dropped with one warning.

This module imports no tracker: each function takes your own logging object.
"""

from collections.abc import Callable
from typing import Any

Values = dict[str, float]


def tensorboard(writer: Any) -> Callable[[Values], None]:
    """Write to TensorBoard; the horizontal axis is the number of steps.

    Args:
        writer: a `torch.utils.tensorboard.SummaryWriter`, or any object with `add_scalar(name, value, step)`. Set
            `max_queue=1000`: with torch's default of 10 most steps block until the writer's thread is done.

    Returns:
        A sink.

    Example:
        >>> from torch.utils.tensorboard import SummaryWriter
        >>> writer = SummaryWriter(tmp_path, max_queue=1000)
        >>> sink = anybatch.sinks.tensorboard(writer)      # attach(..., record=["run.jsonl", sink])
        >>> sink({"anybatch/step": 1, "anybatch/tau": 3.2, "anybatch/gain": 3.2})
        >>> writer.close()
    """

    def sink(values: Values) -> None:
        step = int(values["anybatch/step"])
        for name, value in values.items():
            if name != "anybatch/step":
                writer.add_scalar(name, value, step)

    return sink


def wandb(run: Any) -> Callable[[Values], None]:
    """Log to Weights & Biases; the horizontal axis of `anybatch/` charts is tau, which compares runs at any batch size.

    Args:
        run: the result of `wandb.init()`. Its own step counter increases by one for every step.

    Returns:
        A sink.

    Example:
        >>> class Printed:
        ...     def define_metric(self, name, step_metric): print(name, "against", step_metric)
        ...     def log(self, values): print(values)
        >>> sink = anybatch.sinks.wandb(Printed())         # in your script: wandb.init()
        anybatch/* against anybatch/tau
        >>> sink({"anybatch/step": 1, "anybatch/tau": 3.2})
        {'anybatch/step': 1, 'anybatch/tau': 3.2}
    """
    run.define_metric("anybatch/*", step_metric="anybatch/tau")
    sink: Callable[[Values], None] = run.log
    return sink


def mlflow(module: Any) -> Callable[[Values], None]:
    """Log to MLflow's active run, one request a step; `mlflow.config.enable_async_logging()` makes it cheap.

    Args:
        module: `mlflow` itself, or any object with `log_metrics(values, step=...)`.

    Returns:
        A sink.

    Example:
        >>> class Printed:
        ...     def log_metrics(self, values, step): print(step, values)
        >>> sink = anybatch.sinks.mlflow(Printed())        # in your script: mlflow
        >>> sink({"anybatch/step": 1, "anybatch/tau": 3.2})
        1 {'anybatch/tau': 3.2}
    """

    def sink(values: Values) -> None:
        rest = {name: value for name, value in values.items() if name != "anybatch/step"}
        module.log_metrics(rest, step=int(values["anybatch/step"]))

    return sink
