"""The changes of anybatch's defaults that `levels` compares: the noise factor, and Adam's own values."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch.optim import Optimizer

import anybatch


@dataclass(frozen=True)
class Level:
    """One change of the defaults.

    Args:
        noise_factor: of `AdaScale`.
        beta1_fixed: beta1 is the same at every batch.
        beta2_least: beta2 is at least this; the base's where that is lower.
        eps: the power of S by which Adam's eps is divided.
    """

    noise_factor: float | None = None
    beta1_fixed: bool = False
    beta2_least: float = 0.0
    eps: float = 0.0

    @property
    def rule(self) -> anybatch.AdaScale:
        """The rule to attach."""
        return anybatch.AdaScale(noise_factor=self.noise_factor)

    def hook(self, optimizers: Sequence[Optimizer], scale: int) -> None:
        """Change the values of Adam's steps; after `attach`, so that its hooks are around the defaults."""
        if not (self.beta1_fixed or self.beta2_least or self.eps):
            return
        for optimizer in optimizers:
            kept: list[dict[str, Any]] = [
                {name: group[name] for name in ("betas", "eps") if name in group} for group in optimizer.param_groups
            ]

            def before(changed: Optimizer, *_: Any, kept: list[dict[str, Any]] = kept) -> None:
                for group, base in zip(changed.param_groups, kept, strict=True):
                    if "betas" in base:
                        group["betas"] = self.betas(base["betas"], group["betas"])
                        group["eps"] = base["eps"] / scale**self.eps

            def after(changed: Optimizer, *_: Any, kept: list[dict[str, Any]] = kept) -> None:
                for group, base in zip(changed.param_groups, kept, strict=True):
                    group.update(base)

            optimizer.register_step_pre_hook(before)
            optimizer.register_step_post_hook(after)

    def betas(self, base: tuple[float, float], clock: tuple[float, float]) -> tuple[float, float]:
        """The betas of a step, of the base's and of those on the clock."""
        beta1 = base[0] if self.beta1_fixed else clock[0]
        return beta1, max(clock[1], min(base[1], self.beta2_least))


LEVELS = {
    "": Level(),
    "c = 2": Level(noise_factor=2.0),
    "c = 4": Level(noise_factor=4.0),
    "beta1 fixed": Level(beta1_fixed=True),
    "beta2 >= 0.9": Level(beta2_least=0.9),
    "beta2 >= 0.95": Level(beta2_least=0.95),
    "beta1 fixed, beta2 >= 0.95": Level(beta1_fixed=True, beta2_least=0.95),
    "eps / sqrt(S)": Level(eps=0.5),
}
