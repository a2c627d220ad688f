"""Trackers as destinations of `attach(record=...)`, beside or instead of a file.

A sink is any function of one dictionary. It is called after every step, on rank 0, with the numbers of the step's
record under their names behind "anybatch/", and after every `controller.log` with those results; "anybatch/step" and
"anybatch/tau" are in both. Numbers that are not finite are left out. A sink that raises is dropped with one warning.

This module imports no tracker: each function takes the object of yours that logs.
"""

from collections.abc import Callable
from typing import Any

Values = dict[str, float]


def tensorboard(writer: Any) -> Callable[[Values], None]:
    """Write to TensorBoard; the horizontal axis is the number of steps.

    Args:
        writer: a `torch.utils.tensorboard.SummaryWriter`, or any object with `add_scalar(name, value, step)`. Give it
            `max_queue=1000`: with the 10 of torch's default most steps wait for the thread that writes.

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
    """Log to Weights & Biases; the horizontal axis of `anybatch/` charts is tau, where runs at any batch size meet.

    Args:
        run: what `wandb.init()` returned. Its own step counter counts one more for every step.

    Returns:
        A sink.

    Example:
        >>> class Printed:
        ...     def define_metric(self, name, step_metric): print(name, "against", step_metric)
        ...     def log(self, values): print(values)
        >>> sink = anybatch.sinks.wandb(Printed())         # wandb.init() in earnest
        anybatch/* against anybatch/tau
        >>> sink({"anybatch/step": 1, "anybatch/tau": 3.2})
        {'anybatch/step': 1, 'anybatch/tau': 3.2}
    """
    run.define_metric("anybatch/*", step_metric="anybatch/tau")

    def sink(values: Values) -> None:
        run.log(values)

    return sink


def mlflow(module: Any) -> Callable[[Values], None]:
    """Log to MLflow's active run. Every step is one request; `mlflow.config.enable_async_logging()` makes it cheap.

    Args:
        module: `mlflow` itself, or any object with `log_metrics(values, step=...)`.

    Returns:
        A sink.

    Example:
        >>> class Printed:
        ...     def log_metrics(self, values, step): print(step, values)
        >>> sink = anybatch.sinks.mlflow(Printed())        # the module mlflow in earnest
        >>> sink({"anybatch/step": 1, "anybatch/tau": 3.2})
        1 {'anybatch/tau': 3.2}
    """

    def sink(values: Values) -> None:
        rest = {name: value for name, value in values.items() if name != "anybatch/step"}
        module.log_metrics(rest, step=int(values["anybatch/step"]))

    return sink
