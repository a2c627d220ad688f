"""fairscale's `AdaScale` and `AdaScaleWrapper` over anybatch, so that a loop written for them runs as it is."""

from collections.abc import Iterable, Mapping
from math import isnan
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.optim import SGD, Optimizer

import anybatch


class AdaScale(Optimizer):
    """An optimizer whose learning rate is multiplied by the gain of AdaScale, with fairscale's interface.

    The gain is that of the running averages, this step's gradients included:

        gain = (avg m1 + 1e-6) / (avg m2 + 1e-6)        m1 = avg var + avg sqr, m2 = avg var / scale + avg sqr

    docs/from-fairscale.md lists what differs on purpose; new code is better off with `anybatch.attach`.

    Args:
        optimizer: the one to scale; it stays usable by itself.
        world_size: number of ranks; counted, and compared if given.
        scale: S, this batch over the one that the learning rate was tuned for; positive. `None` for `world_size *
            num_gradients_to_accumulate`.
        smoothing: factor of the running averages, in [0, 1); `None` for `max(1 - scale / 1000, 0)`.
        num_gradients_to_accumulate: backwards on each rank between two steps, at least 1.
        is_scaled_loss: whether each loss is divided by `num_gradients_to_accumulate`. If not, call
            `scale_grad_by_num_grads_to_accum()` after the last backward.
        debias_ewma: False for the averages of the paper's Appendix B.3: a plain mean first, each sample clipped, and
            the gain that of the steps before, 1 at first.
        model: the DistributedDataParallel or FSDP2 module, needed on several ranks; fairscale has no such argument.

    Raises:
        UsageError: one rank without accumulation; several ranks without `model`.
        InvalidValueError: a value out of range, or a `world_size` that is not the number of ranks.

    Example:
        >>> from anybatch.integrations.fairscale import AdaScale
        >>> model = torch.nn.Linear(2, 1)
        >>> optim = AdaScale(torch.optim.SGD(model.parameters(), lr=0.1), num_gradients_to_accumulate=2)
        >>> step = 0
        >>> while step < 10:
        ...     for x in torch.randn(2, 8, 2):
        ...         (model(x).square().mean() / 2).backward()
        ...     step += optim.gain()
        ...     optim.step()
        ...     optim.zero_grad()
        >>> optim.controller.tau == step, 5 <= optim.controller.steps <= 10
        (True, True)

    Source:
        Johnson et al., AdaScale SGD, ICML 2020, Section 3.4 and Appendix B.3; the interface is fairscale 0.4.13's.
    """

    _step_supports_amp_scaling = False  # a GradScaler would tell this object, and not the fused one inside, its factor

    def __init__(
        self,
        optimizer: Optimizer,
        world_size: int | None = None,
        scale: float | None = None,
        smoothing: float | None = None,
        num_gradients_to_accumulate: int = 1,
        is_scaled_loss: bool = True,
        debias_ewma: bool = True,
        *,
        model: nn.Module | None = None,
    ) -> None:
        # Optimizer.__init__ is not called: groups, state and defaults are the inner optimizer's, through __getattr__.
        ranks = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
        if ranks > 1 and model is None:
            raise anybatch.UsageError(
                "On several ranks AdaScale needs the wrapped module: AdaScale(optimizer, model=ddp_model), after "
                "ddp_model = DistributedDataParallel(model)."
            )
        self._optimizer = optimizer
        self._scaled_loss = is_scaled_loss
        self._smoothing = smoothing
        self._accumulated = _backwards(num_gradients_to_accumulate)
        self._divided = False
        self.controller: anybatch.Controller = anybatch.attach(
            optimizer,
            model=model
            if model is not None
            else nn.ParameterList(p for g in optimizer.param_groups for p in g["params"]),
            rule=anybatch.AdaScale(
                estimator="ratio" if debias_ewma else "paper",
                smoothing=smoothing,
                decays="constant",
            ),
            base_batch=1.0,
            micro_batch=1.0,
        )
        self._ranks = self.controller.ranks
        try:
            if world_size not in (None, self._ranks):
                raise anybatch.InvalidValueError(f"world_size={world_size}, but {self._ranks} ranks train together.")
            if self._ranks * self._accumulated == 1:
                raise anybatch.UsageError(
                    "One gradient a step shows no variance: accumulate (num_gradients_to_accumulate=2), or use "
                    "anybatch.attach(rule=anybatch.AdaScale(consecutive=True), ...)."
                )
            self.set_scale(float(self._ranks * self._accumulated) if scale is None else scale)
        except Exception:
            self.unhook()
            raise

    @property
    def scale(self) -> float:
        """S."""
        return self._scale

    @property
    def smoothing(self) -> float:
        """Factor of the running averages at this scale."""
        return max(1 - self._scale / 1000, 0.0) if self._smoothing is None else self._smoothing

    def set_scale(self, scale: float, update_estimate: bool = True) -> None:
        """Tell the scale of the steps to come, before their first backward.

        Args:
            scale: S, positive.
            update_estimate: without effect: the variance is kept as that of one base batch, which no scale changes.
        """
        self.controller.micro_batch = scale / (self._ranks * self._accumulated)
        self._scale = float(scale)

    def set_num_gradients_to_accumulate(self, num_gradients_to_accumulate: int, update_smoothing: bool = True) -> None:
        """Tell the number of backwards on each rank in the steps to come, at the same scale until `set_scale`.

        Args:
            num_gradients_to_accumulate: at least 1.
            update_smoothing: False is an error, unless `smoothing` was given as a number: that one stays.
        """
        new = _backwards(num_gradients_to_accumulate)
        if not update_smoothing and self._smoothing is None:
            raise anybatch.InvalidValueError(
                "update_smoothing=False: give AdaScale(smoothing=...) the number that is to stay."
            )
        if not self._scaled_loss:  # the averages are of sums of so many gradients
            state, unit = self.controller.state_dict(), (new / self._accumulated) ** 2
            moments = {name: state[name] * unit for name in ("variance", "sqnorm")}
            self.controller.load_state_dict({**state, **moments})
        self._accumulated = new
        self.set_scale(self._scale)

    def gain(self, pg_idx: int | None = None) -> float:
        """The gain that `step()` will have, after the last backward; after `step()` the one it had, 1 before any.

        Over several ranks it is the step's all-reduce, ahead of time: call it on every rank.

        Args:
            pg_idx: without effect: all parameter groups have one gain.
        """
        gain = self.controller.peek()
        return 1.0 if isnan(gain) else gain

    def step(self, *args: Any, **kwargs: Any) -> Any:
        """One step of the inner optimizer, its learning rates multiplied by the gain."""
        if not (self._scaled_loss or self._divided or self._accumulated == 1):
            raise anybatch.UsageError(
                "With is_scaled_loss=False the gradients are sums: call scale_grad_by_num_grads_to_accum() after the "
                "last backward, before step()."
            )
        self._divided = False
        return self._optimizer.step(*args, **kwargs)

    def scale_grad_by_num_grads_to_accum(self) -> None:
        """Divide the gradients by the number of backwards, where the losses were not."""
        if self._scaled_loss or self._accumulated == 1:
            raise anybatch.UsageError("Only for sums of several gradients, with is_scaled_loss=False.")
        for group in self._optimizer.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.grad.div_(self._accumulated)
        self._divided = True

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients."""
        self._optimizer.zero_grad(set_to_none)

    def add_param_group(self, pg: dict[str, Any]) -> None:
        """Add a parameter group; its gradients count from the next step on."""
        self._optimizer.add_param_group(pg)

    def state_dict(self) -> dict[str, Any]:
        """The inner optimizer's state, which carries the controller's."""
        return self._optimizer.state_dict()

    def load_state_dict(self, data: Mapping[str, Any]) -> None:
        """Take what `state_dict()` gave, or what fairscale's gave.

        Raises:
            StateError: it has neither state of AdaScale; nothing was loaded then.
        """
        fairscales = data["state"].get("adascale")
        if fairscales is None and not any(str(name).startswith("anybatch_run_") for name in data["param_groups"][0]):
            raise anybatch.StateError(
                "There is no state of AdaScale in it. If it is the inner optimizer's, load it there, before AdaScale()."
            )
        unit = 1.0 if self._scaled_loss else float(self._accumulated**2)
        old = {} if fairscales is None else _from_fairscale(fairscales, unit)
        self._optimizer.load_state_dict(
            {**data, "state": {key: value for key, value in data["state"].items() if key != "adascale"}}
        )
        self.controller.load_state_dict({**self.controller.state_dict(), **old})

    def unhook(self) -> None:
        """Remove every hook and let go of the parameters; the steps after it are the inner optimizer's own."""
        self.controller.detach()

    def __getattr__(self, name: str) -> Any:
        if name == "_optimizer":  # a half-made object must not ask itself for ever
            raise AttributeError(name)
        return getattr(self._optimizer, name)

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise anybatch.UsageError("AdaScale hangs on its optimizer's hooks: copy the inner optimizer, or state_dict().")


class AdaScaleWrapper(AdaScale):
    """The same, made like a standard optimizer: `AdaScaleWrapper(params, optim_cls=SGD, lr=0.1)`.

    Args:
        params: parameters, or groups of them.
        world_size: as for `AdaScale`, and so are the next four.
        scale: see there.
        smoothing: see there.
        num_gradients_to_accumulate: see there.
        debias_ewma: see there.
        optim_cls: class of the inner optimizer.
        model: see there.
        additional_optim_args: what `optim_cls` is given beside `params`.
    """

    def __init__(
        self,
        params: Iterable[Any],
        world_size: int | None = None,
        scale: float | None = None,
        smoothing: float | None = None,
        num_gradients_to_accumulate: int = 1,
        debias_ewma: bool = True,
        optim_cls: type[Optimizer] = SGD,
        *,
        model: nn.Module | None = None,
        **additional_optim_args: Any,
    ) -> None:
        super().__init__(
            optim_cls(params, **additional_optim_args),
            world_size,
            scale,
            smoothing,
            num_gradients_to_accumulate,
            debias_ewma=debias_ewma,
            model=model,
        )


def _backwards(number: int) -> int:
    if isinstance(number, bool) or not isinstance(number, int) or number < 1:
        raise anybatch.InvalidValueError(f"num_gradients_to_accumulate is a whole number, at least 1; got {number!r}.")
    return number


def _from_fairscale(old: Mapping[str, Any], unit: float) -> dict[str, float]:
    """What a controller's state takes from fairscale's: one gain for all groups, so its arrays are summed over them."""
    try:
        if "grad_var_avg_unbias" in old:
            weight, samples = max(float(each) for each in old["grad_var_avg_unbias"]), 1
        elif "grad_var_avg_count" in old:
            weight, samples = 1.0, int(old["grad_var_avg_count"][0])
        else:  # before its first step
            return {}
        variance, sqnorm = (weight * sum(float(x) for x in old[name]) for name in ("grad_var_avg", "grad_sqr_avg"))
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise anybatch.StateError(f"Not the state of fairscale's AdaScale: {error!r}.") from None
    return {"variance": variance * unit, "sqnorm": sqnorm * unit, "weight": weight, "samples": samples}
