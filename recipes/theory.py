"""The theorems of AdaScale, drawn with what they bound: E[F(w) - F*] measured over thousands of runs.

    python -m recipes.theory [--runs 20000] [--out docs/figures/theory.png] [--json docs/figures/theory.json]

For a constant learning rate eta, an alpha-PL and beta-smooth F, and base gradients of variance at most V (Johnson et
al., ICML 2020, Theorems 1 to 3):

    gamma = eta alpha (2 - eta beta)      Delta = eta^2 beta V / (2 gamma)      xi = (2 - eta beta) / (2 - S eta beta)

    scale 1     E[F - F*] <= (1 - gamma)^tau (F_0 - F*) + Delta
    AdaScale    the same at every S <= 1 / gamma, tau being the sum of the gains
    linear      E[F - F*] <= (1 - gamma / xi)^tau (F_0 - F*) + xi Delta, only while eta < 2 / (S beta)

Two problems. A quadratic whose curvature is the same in all directions, where Theorem 1 is an equality; and
F(w) = w^2 + 2 sin^2(w), which is not convex and yet PL (Karimi et al. 2016 study w^2 + 3 sin^2(w)).

The paper's gain is a ratio of expectations over all that could have happened up to this step, so that all runs of a
simulation share it ("expected"). A real run knows its own gradient alone: with the exact variance and gradient of each
run ("own") the floor lies a few per cent above Delta, because the gain falls where F is high. The dotted curve is the
library's, with the moments estimated from the samples.
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from math import inf, sqrt
from pathlib import Path

import torch
from torch import Tensor

import anybatch

SCALES = (1, 2, 4, 8, 16, 32, 64)
RULES = ("expected", "own", "linear")
HORIZON = 24  # runs last this many times 1 / gamma: the start is forgotten to e^-18 where the floor is taken


@dataclass(frozen=True)
class Problem:
    """A function with its constants, and noise of variance `variance` on its gradient.

    Args:
        value, slope: F and its gradient, of points `[runs, dim]`; F* = 0.
        alpha, beta: PL and smoothness constants.
        start: every coordinate of w_0.
        dim: number of coordinates.
        variance: V, the trace of the covariance of one base gradient.
        eta: the learning rate.
    """

    name: str
    value: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor], Tensor]
    alpha: float
    beta: float
    start: float
    dim: int
    variance: float
    eta: float

    @property
    def gamma(self) -> float:
        """Rate of Theorem 1."""
        return self.eta * self.alpha * (2 - self.eta * self.beta)

    @property
    def delta(self) -> float:
        """Floor of Theorem 1."""
        return self.eta**2 * self.beta * self.variance / (2 * self.gamma)

    def xi(self, scale: float) -> float:
        """How much higher the floor of linear scaling is; infinite where it need not converge."""
        room = 2 - scale * self.eta * self.beta
        return (2 - self.eta * self.beta) / room if room > 0 else inf

    def bound(self, tau: float, xi: float = 1.0) -> float:
        """Theorems 1 and 2 at `tau`, and Theorem 3 with its `xi`."""
        if xi == inf:
            return inf
        first = float(self.value(torch.full((1, self.dim), self.start, dtype=torch.float64)))
        return (1 - self.gamma / xi) ** tau * first + xi * self.delta


def quadratic() -> Problem:
    """F(w) = |w|^2 / 2 in four dimensions: alpha = beta = 1."""
    return Problem(
        "quadratic", lambda w: w.square().sum(1) / 2, lambda w: w, 1.0, 1.0, 2.0, dim=4, variance=1.0, eta=0.05
    )


def sine() -> Problem:
    """F(w) = w^2 + 2 sin^2(w): F'' = 2 + 4 cos(2w) is negative in places; alpha is found on a grid."""

    def value(w: Tensor) -> Tensor:
        return (w.square() + 2 * w.sin().square()).sum(1)

    def slope(w: Tensor) -> Tensor:
        return 2 * w + 2 * (2 * w).sin()

    grid = torch.linspace(1e-3, 12, 200_001, dtype=torch.float64).unsqueeze(1)  # beyond, F'^2 / F only grows
    alpha = float((slope(grid).square().sum(1) / (2 * value(grid))).min())
    return Problem("w² + 2 sin² w", value, slope, alpha, 6.0, 3.0, dim=1, variance=0.05, eta=0.05)


@dataclass(frozen=True)
class Curve:
    """E[F - F*] at the mean tau of each step; `spread` is the standard error."""

    tau: list[float]
    excess: list[float]
    spread: list[float]


def simulate(problem: Problem, scale: int, *, rule: str, runs: int, total: float, seed: int = 0) -> Curve:
    """All runs at once: r = (V + mu^2) / (V / S + mu^2), mu^2 "expected" over the runs or a run's "own"; or S."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.full((runs, problem.dim), problem.start, dtype=torch.float64)
    tau = torch.zeros(runs, dtype=torch.float64)
    curve = Curve([], [], [])

    def look() -> None:
        excess = problem.value(w)
        curve.tau.append(float(tau.mean()))
        curve.excess.append(float(excess.mean()))
        curve.spread.append(float(excess.std()) / sqrt(runs))

    look()
    noise = sqrt(problem.variance / problem.dim / scale)
    while bool((tau < total).any()) and curve.excess[-1] < 1e12:
        mean = problem.slope(w)
        mu2, v = mean.square().sum(1), problem.variance
        if rule == "expected":
            mu2 = mu2.mean().expand_as(mu2)
        gain = torch.full_like(tau, float(scale)) if rule == "linear" else (v + mu2) / (v / scale + mu2)
        sample = mean + noise * torch.randn(w.shape, generator=generator, dtype=w.dtype)
        w = w - gain.unsqueeze(1) * problem.eta * sample
        tau = tau + gain
        look()
    return curve


def measured(problem: Problem, scale: int, *, runs: int, total: float) -> Curve:
    """The library itself on the same problem: the gain is estimated from the S samples of each step."""
    excess: list[list[float]] = []
    taus: list[list[float]] = []
    for seed in range(runs):
        generator = torch.Generator().manual_seed(seed)
        weights = torch.nn.ParameterList([torch.full((problem.dim,), problem.start, dtype=torch.float64)])
        optimizer = torch.optim.SGD(weights.parameters(), lr=problem.eta)
        controller = anybatch.attach(optimizer, model=weights, total=total, scale="count")
        excess.append([])
        taus.append([])
        while True:
            w = weights[0].detach().unsqueeze(0)
            excess[-1].append(float(problem.value(w)))
            taus[-1].append(controller.tau)
            if controller.done:
                break
            shape = (scale, problem.dim)
            noise = torch.randn(shape, generator=generator, dtype=torch.float64) * sqrt(problem.variance / problem.dim)
            controller.observe([problem.slope(w) + noise])
            optimizer.step()
            optimizer.zero_grad()
        controller.detach()
    length = min(map(len, excess))
    grid = torch.tensor([row[:length] for row in excess], dtype=torch.float64)
    mean_tau = torch.tensor([row[:length] for row in taus], dtype=torch.float64).mean(0)
    return Curve(mean_tau.tolist(), grid.mean(0).tolist(), (grid.std(0) / sqrt(runs)).tolist())


def floor(curve: Curve) -> float:
    """The mean over the last quarter of a run."""
    last = curve.excess[3 * len(curve.excess) // 4 :]
    return sum(last) / len(last)


def experiment(problem: Problem, *, runs: int, library_runs: int) -> dict[str, dict[int, Curve]]:
    """The rules at every scale, and the library at 8."""
    total = HORIZON / problem.gamma
    curves = {rule: {s: simulate(problem, s, rule=rule, runs=runs, total=total) for s in SCALES} for rule in RULES}
    return {**curves, "library": {8: measured(problem, 8, runs=library_runs, total=total)}}


def figure(found: list[tuple[Problem, dict[str, dict[int, Curve]]]], out: Path) -> None:
    """A row for each problem: the runs with their bounds, and the floors against the scale."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    colours = mpl.colormaps["viridis"]
    fig, axes = plt.subplots(len(found), 3, figsize=(13, 4 * len(found)), layout="constrained")
    for (problem, curves), (left, middle, right) in zip(found, axes, strict=True):
        for axis, rule, title in ((left, "expected", "AdaScale"), (middle, "linear", "linear scaling")):
            shown = [s for s in SCALES if rule == "linear" or s <= 1 / problem.gamma]
            for i, scale in enumerate(shown):
                curve, shade = curves[rule][scale], colours(0.9 * i / max(1, len(shown) - 1))
                axis.plot(curve.tau, curve.excess, color=shade, lw=1.6, label=f"S = {scale}")
                xi = problem.xi(scale) if rule == "linear" else 1.0
                if xi < inf and (rule == "linear" or scale == 1):
                    bound = [problem.bound(tau, xi) for tau in curve.tau]
                    axis.plot(curve.tau, bound, color=shade if rule == "linear" else "black", ls="--", lw=1)
            axis.set(yscale="log", xlabel="τ, base iterations", title=f"{problem.name}: {title}")
            axis.set_ylim(problem.delta / 30, 30 * problem.bound(0))
            axis.set_xlim(0, HORIZON / problem.gamma)
            axis.grid(alpha=0.3)
        for curve in curves["library"].values():
            left.plot(curve.tau, curve.excess, color="crimson", ls=":", lw=1.6, label="S = 8, estimated gain")
        left.plot([], [], color="black", ls="--", lw=1, label="Theorems 1 and 2")
        middle.plot([], [], color="black", ls="--", lw=1, label="Theorem 3")
        left.set_ylabel("E[F(w) − F*]")
        left.legend(fontsize=8)
        middle.legend(fontsize=8)
        scales = SCALES
        fine = [1 + 0.01 * i for i in range(100 * scales[-1]) if problem.xi(1 + 0.01 * i) < 50]
        right.plot(fine, [problem.xi(s) for s in fine], color="tab:orange", ls="--", lw=1, label="bound, linear: ξ")
        right.axhline(1, color="tab:blue", ls="--", lw=1, label="bound, AdaScale: 1")
        edge = 2 / (problem.eta * problem.beta)
        right.axvline(edge, color="grey", lw=1, ls=":", label=f"S = 2/(ηβ) = {edge:.3g}")
        right.axvspan(1 / problem.gamma, 100, color="grey", alpha=0.12, lw=0, label="S > 1/γ: no theorem")
        for rule, colour, marker, label in (
            ("linear", "tab:orange", "s", "measured, linear"),
            ("expected", "tab:blue", "o", "measured, AdaScale"),
            ("own", "tab:blue", "x", "measured, each run's own gain"),
        ):
            right.plot(scales, [floor(curves[rule][s]) / problem.delta for s in scales], color=colour, marker=marker,
                       ls="", label=label)  # fmt: skip
        right.set(xscale="log", yscale="log", xlabel="scale S", ylabel="floor / Δ", title=f"{problem.name}: floors")
        right.set_xticks(scales, [str(s) for s in scales])
        right.minorticks_off()
        right.set_ylim(0.05, 40)
        right.set_xlim(0.9, 80)
        right.grid(alpha=0.3)
        right.legend(fontsize=7, loc="upper left")
    out.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(out, dpi=90)
    plt.close(fig)


def main() -> None:
    """Simulate, print the floors, draw the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=20_000)
    parser.add_argument("--library-runs", type=int, default=200)
    parser.add_argument("--out", type=Path, default=Path("docs/figures/theory.png"))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = [(p, experiment(p, runs=options.runs, library_runs=options.library_runs)) for p in (quadratic(), sine())]
    rows = []
    for problem, curves in found:
        print(f"\n{problem.name}: alpha {problem.alpha:.3g}, gamma {problem.gamma:.3g}, Delta {problem.delta:.3g}")
        print(f"floor / Delta, theorem up to S = {1 / problem.gamma:.3g}")
        print(f"{'S':>3} {'AdaScale':>9} {'own gain':>9} {'steps':>6} {'linear':>9} {'xi':>6} {'steps':>6}")
        for scale in SCALES:
            heights = {rule: floor(curves[rule][scale]) / problem.delta for rule in RULES}
            steps = {rule: len(curves[rule][scale].tau) - 1 for rule in RULES}
            xi = problem.xi(scale)
            diverged = xi == inf and heights["linear"] > 100
            rows.append({
                "problem": problem.name,
                "scale": scale,
                **heights,
                "steps": steps,
                "xi": None if xi == inf else xi,
                "linear": None if diverged else heights["linear"],
            })  # fmt: skip
            print(
                f"{scale:3} {heights['expected']:9.3f} {heights['own']:9.3f} {steps['expected']:6} "
                f"{'diverged' if diverged else format(heights['linear'], '.3f'):>9} "
                f"{'-' if xi == inf else format(xi, '.2f'):>6} {steps['linear']:6}"
            )
        for scale, curve in curves["library"].items():
            height = floor(curve) / problem.delta
            print(f"{scale:3} {height:9.3f} with the library's estimated gain, {len(curve.tau) - 1} steps")
            rows.append({"problem": problem.name, "scale": scale, "library": height})
    figure(found, options.out)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
