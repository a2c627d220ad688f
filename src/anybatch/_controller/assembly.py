"""The parts of a run, made from its settings: schedules, probes, hooks on the gradients, the record, and the steps."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from anybatch._controller.gain_estimator import GainEstimator
from anybatch._controller.run_state import RunState
from anybatch._controller.settings import Settings, optimizer_settings, schedule_settings
from anybatch._controller.step_hooks import StepHooks
from anybatch._errors import UnsupportedError, UsageError
from anybatch._gradients import (
    AdamNorms,
    DeepSpeedHooks,
    Engine,
    GradientHooks,
    JoinSupport,
    LayerNorms,
    PipelineHooks,
    Probe,
    Ranks,
    Sizes,
    Steps,
    check_same,
    deepspeed_engine,
    engine_of,
    is_deepspeed,
    pipeline_engine,
    trained_parameters,
)
from anybatch._record import RecordSinks, run_config
from anybatch._scaling import (
    Clock,
    Family,
    Hyperparameters,
    ScheduleDriver,
    bare_optimizer,
    family_of,
    held_by,
    second_moment_of,
)


@dataclass(frozen=True)
class RunParts:
    """The parts of one run."""

    state: RunState
    ranks: Ranks
    measured: float  # share of the parameters whose noise is measured
    members: Callable[[], list[Tensor]]  # all parameters of the optimizers
    no_sync: Callable[[], AbstractContextManager[None]]
    drivers: list[ScheduleDriver]
    gradients: GradientHooks | None  # `None` where backwards are not counted
    sinks: RecordSinks
    join: JoinSupport
    step_hooks: StepHooks


def assemble(
    given: Sequence[Optimizer],
    optimizers: Sequence[Optimizer],
    *,
    model: nn.Module,
    schedulers: Sequence[Any],
    settings: Settings,
    joined: Callable[[], bool],
    check: Callable[[], None],
) -> RunParts:
    """Make the parts of a run, after a comparison of the settings over the ranks.

    Args:
        given: The optimizers as passed to `attach`.
        optimizers: The same without wrappers.
        model: The module that they train.
        schedulers: The schedulers.
        settings: The settings of the run.
        joined: Whether the controller takes part in a `Join` now.
        check: Raises before a step whose loop over the parts of a batch was left.
    """
    measurement = settings.measurement
    stated = (measurement.exponent, measurement.like) if measurement else (1.0, None)
    families = []
    for optimizer in optimizers:  # a comprehension may add a frame between a warning and its cause
        families.append(family_of(optimizer, exponent=stated[0], like=stated[1]))  # noqa: PERF401
    # Fixed rules are baselines: their automatic momentum is that of the papers, constant.
    total = None if measurement is None else settings.total
    values = [
        Hyperparameters(optimizer, family, settings.rule.decays, total)
        for optimizer, family in zip(optimizers, families, strict=True)
    ]
    engine, trained, hooks = _engine(model, optimizers, settings)
    members = partial(engine.steps.members, optimizers)
    clock = settings.leader or Clock(settings.total)
    run = RunState(clock=clock, batch=settings.batch, shown=engine.ranks.first, leads=settings.leader is None)
    gradients: GradientHooks | None = None
    drivers: list[ScheduleDriver] = []
    for each, optimizer in _paired(schedulers, optimizers):
        drivers.append(ScheduleDriver(each, optimizer=optimizer, clock=run.clock, every=settings.schedule_every))
    try:
        per_layer = check_same(
            settings.shared() | optimizer_settings(optimizers) | schedule_settings(drivers),
            ranks=engine.ranks,
            first=settings.per_layer,
            only_first={"record": bool(settings.record)},
        )
        probes = _probes(model, optimizers, families, engine, settings, run, per_layer)
        estimator = GainEstimator(
            settings.rule,
            measurement=measurement,
            batch=settings.batch,
            clock=run.clock,
            exponent=values[0].exponent,
            # One gain for all of them: the more careful one, where their own noise factors differ.
            noise_factor=min(family.noise_factor for family in families),
            layers=lambda: next((probe.names for probe in probes if isinstance(probe, LayerNorms)), ()),
        )
        if settings.counts:
            gradients = hooks(
                members,
                measure=measurement is not None,
                due=lambda: estimator.due(run.running, steps=run.steps),
                place=engine.place,
                reduced=engine.reduced,
                arrived=engine.arrived,
                loss_scale=engine.loss_scale or settings.loss_scale,
                consecutive=measurement is not None and measurement.consecutive,
                probes=probes,
                sizes=Sizes(model if settings.pipeline is None else None, given=settings.batch.micro_batch),
            )
        config = run_config(
            optimizers,
            rule=settings.rule,
            noise_factor=estimator.noise_factor,
            total=settings.total,
            batch=settings.batch,
            ranks=engine.ranks.size,
            trained=trained,
            measured=engine.measured,
        )
        sinks = RecordSinks(settings.record, config=config, first=engine.ranks.first)
    except Exception:
        remove_hooks(gradients, drivers)
        raise
    refused = {"a grad_scaler": settings.grad_scaler, "a record with per_layer": per_layer}
    join = JoinSupport(
        engine,
        sizes=None if gradients is None else gradients.sizes_of_norms,
        refused=" and ".join(name for name, value in refused.items() if value is not None),
    )
    step_hooks = StepHooks(
        settings,
        model=model,
        given=given,
        values=values,
        estimator=estimator,
        engine=engine,
        gradients=gradients,
        drivers=drivers,
        run=run,
        sinks=sinks,
        share=lambda: join.share(joined=joined()),
        check=check,
    )
    for driver in drivers:
        driver.hold()
    return RunParts(
        run, engine.ranks, engine.measured, members, engine.no_sync, drivers, gradients, sinks, join, step_hooks
    )


def _engine(
    model: nn.Module, optimizers: Sequence[Optimizer], settings: Settings
) -> tuple[Engine, list[Tensor], Callable[..., GradientHooks]]:
    """The engine that averages the gradients, the parameters that are trained, and the class of their hooks."""
    measurement, pipeline = settings.measurement, settings.pipeline
    if is_deepspeed(model):
        engine, trained = deepspeed_engine(
            model,
            optimizers,
            settings.process_group,
            reduction=settings.reduction,
            grad_scaler=settings.grad_scaler,
            metric="euclidean" if measurement is None else measurement.metric,
            consecutive=measurement is not None and measurement.consecutive,
        )
        return engine, trained, partial(DeepSpeedHooks, model)
    trained = [p for optimizer in optimizers for p in trained_parameters(optimizer, model=model)]
    if pipeline is None:
        return engine_of(model, trained, settings.process_group), trained, GradientHooks
    engine = pipeline_engine(
        pipeline,
        trained,
        settings.process_group,
        members=Steps().members(optimizers),
        reduction=settings.reduction,
        grad_scaler=settings.grad_scaler,
    )
    return engine, trained, partial(PipelineHooks, pipeline)


def remove_hooks(gradients: GradientHooks | None, drivers: Sequence[ScheduleDriver]) -> None:
    """Remove the hooks on gradients and forwards, and stop the schedules."""
    if gradients is not None:
        gradients.detach()
    for driver in drivers:
        driver.stop()


def _probes(
    model: nn.Module,
    optimizers: Sequence[Optimizer],
    families: Sequence[Family],
    engine: Engine,
    settings: Settings,
    run: RunState,
    per_layer: int | None,
) -> list[Probe]:
    """The probes beside the Euclidean norms."""
    measurement, probes = settings.measurement, list[Probe]()
    if measurement is not None and measurement.metric == "adam":
        if len(optimizers) > 1:
            raise UnsupportedError("AdaScale(metric='adam') is for one optimizer: use metric='euclidean'.")
        entry = second_moment_of(optimizers[0], families[0])
        steps = lambda: run.steps  # noqa: E731
        probes.append(AdamNorms(optimizers[0], entry=entry, steps=steps, rows=engine.rows, shards=engine.shards))
    if per_layer is not None and is_deepspeed(model):
        raise UnsupportedError(
            f"RunRecord(per_layer={per_layer}) needs the mean gradient of each layer, and DeepSpeed keeps flat "
            "partitions: leave per_layer out."
        )
    if per_layer is not None and settings.pipeline is not None:
        raise UnsupportedError(
            f"RunRecord(per_layer={per_layer}) needs all layers on every rank, and a pipeline has a part of them on "
            "each: leave per_layer out."
        )
    if per_layer is not None:
        if measurement is None:
            raise UsageError(
                f"{settings.rule} measures no noise, so RunRecord(per_layer={per_layer}) has nothing to record: "
                "pass attach rule=anybatch.AdaScale()."
            )
        probes.append(LayerNorms(model, due=lambda: run.steps % per_layer == 0))
    return probes


def _paired(schedulers: Sequence[Any], optimizers: Sequence[Optimizer]) -> list[tuple[Any, Optimizer]]:
    """Each scheduler with the optimizer that it moves; with the first where it names none."""
    by_id = {id(optimizer): optimizer for optimizer in optimizers}
    moved = [getattr(held_by(each)[0], "optimizer", optimizers[0]) for each in schedulers]
    return [(each, by_id.get(id(bare_optimizer(m)), optimizers[0])) for each, m in zip(schedulers, moved, strict=True)]
