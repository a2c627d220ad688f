"""The EMA scaling rule on the noisy parabola, where everything can be seen.

    python -m recipes.ema.parabola [--out docs/figures]       eta 0.01, rho 0.99, 512 base steps, kappa to 32
    python -m recipes.ema.parabola --config full              eta 1e-4, rho 0.9999, 51,200 base steps, kappa to 1024
    python -m recipes.ema.parabola --config adam              Adam under ten times the noise, the SDE's square root
    python -m recipes.ema.parabola --config adam-quiet        Adam under the noise of SGD's

Many independent runs of SGD on L(theta) = theta^2 / 2 from theta = 1, in float64. The gradient of a base batch is

    g = theta + e,        e normal with variance (theta^2 / 2 + 1) noise^2,

that of a step of kappa base batches the mean of kappa of these at one theta; every kappa sees the same samples.
Written <.> is the mean over the runs, zeta the EMA. After n base batches, n a multiple of kappa,

    the target model's error   max_n |<theta_kappa(n)> - <theta_1(n)>|
    the EMA's error            max_n |<zeta_kappa(n)> - <zeta_1(n)>|

"before" is the paper's order, in which the EMA sees the weights that the step starts from; "after" is that of
`ModelEMA` on a clock, and of most code: it sees those that the step ends with.

The error term: in one step of kappa with a constant gradient g, the EMA differs from that of kappa base steps by
eta g (kappa - (1 - rho^kappa) / (1 - rho)) before, and eta g (rho (1 - rho^kappa) / (1 - rho) - kappa rho^kappa) after.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import anybatch
from recipes.ema.plots import figure, kappas

ORDERS = ("before", "after")
Row = dict[str, Any]


@dataclass(frozen=True)
class Config:
    """The set-up.

    Args:
        rate: eta.
        decay: rho.
        total: base steps.
        runs: how many in parallel; Adam scales each coordinate by itself, so that each has its own there, too.
        scales: kappa; each divides `total`.
        seed: of the noise.
        optimizer: `"sgd"`, with linear scaling, or `"adam"`, betas 0.9 and 0.99, with the SDE's square root.
        noise: factor on the noise's standard deviation.
    """

    rate: float = 0.01
    decay: float = 0.99
    total: int = 512
    runs: int = 4000
    scales: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    seed: int = 0
    optimizer: str = "sgd"
    noise: float = 1.0


CONFIGS = {
    "small": Config(),
    "full": Config(1e-4, 0.9999, 51_200, 1000, (1, 4, 16, 64, 256, 1024)),
    "adam": Config(rate=0.1, optimizer="adam", noise=10.0),
    "adam-quiet": Config(rate=0.02, optimizer="adam"),
}


class Parabola(nn.Module):
    """`runs` independent values of theta; L summed over them, so that each has its own gradient."""

    def __init__(self, runs: int) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.ones(runs, dtype=torch.float64))

    def forward(self, noise: Tensor) -> Tensor:
        """L with the gradient `theta + e`, `noise` being e in units of `sqrt(theta^2 / 2 + 1)`."""
        deviation = (self.theta.detach() ** 2 / 2 + 1).sqrt()
        return (self.theta**2 / 2 + deviation * noise * self.theta).sum()


def path(config: Config, kappa: int, *, order: str, rule: bool) -> tuple[Tensor, Tensor]:
    """<theta> and <zeta> after every step, `[total / kappa]`, each."""
    model = Parabola(config.runs)
    optimizer, answer = _optimizer(model, config)
    controller = anybatch.attach(optimizer, model=model, rule=answer, scale=kappa, total=config.total)
    ema = anybatch.ModelEMA(model, config.decay, clock=controller.clock if rule and order == "after" else None)
    iterations = float(kappa) if rule else 1.0
    generator = torch.Generator().manual_seed(config.seed)
    thetas, zetas = [], []
    while not controller.done:
        noise = torch.zeros(config.runs, dtype=torch.float64)
        for _ in range(kappa):  # one base batch after the other, so that every kappa sees the same
            noise += torch.randn(config.runs, generator=generator, dtype=torch.float64)
        model(config.noise * noise / kappa).backward()
        if order == "before":
            ema.update(iterations)
        optimizer.step()
        optimizer.zero_grad()
        if order == "after" and not rule:
            ema.update(iterations)
        thetas.append(model.theta.mean().item())
        with ema.applied():
            zetas.append(model.theta.mean().item())
    return torch.tensor(thetas, dtype=torch.float64), torch.tensor(zetas, dtype=torch.float64)


def _optimizer(model: Parabola, config: Config) -> tuple[torch.optim.Optimizer, anybatch.Rule]:
    if config.optimizer == "adam":
        return torch.optim.Adam(model.parameters(), lr=config.rate, betas=(0.9, 0.99)), anybatch.SquareRoot()
    return torch.optim.SGD(model.parameters(), lr=config.rate), anybatch.Linear()


def errors(config: Config) -> list[Row]:
    """One row for each order and kappa above 1: the target model's error, and the EMA's with and without the rule."""
    rows = []
    for order in ORDERS:
        theta, zeta = path(config, 1, order=order, rule=True)
        for kappa in config.scales:
            if kappa == 1:
                continue
            at = slice(kappa - 1, None, kappa)
            moved, averaged = path(config, kappa, order=order, rule=True)
            unscaled = path(config, kappa, order=order, rule=False)[1]
            target, on, off = (
                (values - base[at]).abs().max().item()
                for values, base in ((moved, theta), (averaged, zeta), (unscaled, zeta))
            )
            rows.append({"order": order, "kappa": kappa, "target": target, "rule": on, "off": off})
            print(f"{order:6} kappa {kappa}: target {target:.5f}, rule {on:.5f}, off {off:.5f}", flush=True)
    return rows


def term(config: Config, kappa: float, order: str) -> float:
    """The error term of one step of kappa at a constant gradient of 1."""
    left = config.decay**kappa
    if order == "before":
        return config.rate * (kappa - (1 - left) / (1 - config.decay))
    return config.rate * (config.decay * (1 - left) / (1 - config.decay) - kappa * left)


def measured_term(config: Config, kappa: int, order: str) -> float:
    """The same, from `ModelEMA`: kappa base steps of a constant gradient against one step of kappa."""
    ends = []
    for steps, size in ((kappa, 1), (1, kappa)):
        model = Parabola(1)
        ema = anybatch.ModelEMA(model, config.decay)
        for _ in range(steps):
            if order == "before":
                ema.update(size)
            model.theta.data -= config.rate * size
            if order == "after":
                ema.update(size)
        with ema.applied():
            ends.append(model.theta.item())
    return abs(ends[1] - ends[0])


def table(rows: list[Row]) -> str:
    """The rows for a document."""
    head = "| the EMA sees the weights | kappa | target model | EMA, rule on | EMA, rule off | on / target | off / on |"
    lines = [head, "|---" * 7 + "|"]
    for row in rows:
        on, off, target = row["rule"], row["off"], row["target"]
        lines.append(
            f"| {row['order']} the step | {row['kappa']} | {target:.4f} | {on:.4f} | {off:.4f} | {on / target:.2f} "
            f"| {off / on:.1f} |"
        )
    return "\n".join(lines)


def draw(config: Config, rows: list[Row], path: Path) -> None:
    """Left: the errors against kappa. Right: the error term."""
    blue, orange, black = "#0072B2", "#D55E00", "black"
    scales = config.scales[1:]
    with figure(path, panels=2) as (left, right):
        for order, style, marker in (("before", "-", "o"), ("after", "--", "^")):
            mine = [row for row in rows if row["order"] == order]
            where = {"ls": style, "marker": marker, "ms": 5, "lw": 1.5}
            left.plot(
                scales,
                [r["off"] for r in mine],
                color=orange,
                label=f"EMA, $\\rho$ (rule off), {order} the step",
                **where,
            )
            left.plot(
                scales,
                [r["rule"] for r in mine],
                color=blue,
                label=f"EMA, $\\rho^{{\\kappa}}$ (the rule), {order} the step",
                **where,
            )
            if order == "before":
                left.plot(scales, [r["target"] for r in mine], color=black, lw=3, alpha=0.35, label="target model")
            fine = torch.logspace(0, torch.log2(torch.tensor(scales[-1])).item(), 80, base=2.0).tolist()[16:]
            right.plot(fine, [term(config, kappa, order) for kappa in fine], color=blue, ls=style, lw=1.5)
            values = [measured_term(config, kappa, order) for kappa in scales]
            right.plot(scales, values, color=blue, ls="", marker=marker, ms=6, label=f"ModelEMA moved {order} the step")
        first = [config.rate * (1 - config.decay) * kappa * (kappa - 1) / 2 for kappa in scales]
        right.plot(scales, first, color=black, lw=3, alpha=0.35, label=r"$\eta\,(1-\rho)\,\kappa(\kappa-1)/2$")
        for axis, title in (
            (left, "Largest error along the run"),
            (right, "Error term of one step, at a constant gradient of 1"),
        ):
            axis.set_yscale("log")
            kappas(axis, scales)
            axis.set_title(title)
            axis.legend(fontsize=8)
        left.set_ylabel("distance from κ = 1 at equal samples")


def main(arguments: Sequence[str] | None = None) -> list[Row]:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m recipes.ema.parabola", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--config", choices=list(CONFIGS), default="small")
    parser.add_argument("--out", type=Path, default=Path("runs"), help="folder of the figure")
    parser.add_argument("--json", type=Path, help="the results file; in --out by default")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    config = CONFIGS[options.config]
    name = "ema_parabola" + ("" if options.config == "small" else f"_{options.config}")
    options.out.mkdir(parents=True, exist_ok=True)
    rows = _rows(config, options.json or options.out / f"{name}.json")
    print(table(rows))
    if config.optimizer == "sgd":  # the right panel is the error term of its steps
        draw(config, rows, options.out / f"{name}.png")
    return rows


def _rows(config: Config, file: Path) -> list[Row]:
    """Those of the results file; where there is none, they are computed and kept."""
    setup = json.loads(json.dumps(asdict(config)))
    if file.exists():
        saved = json.loads(file.read_text())
        # What a configuration has got since then is at its default in results from before.
        if json.loads(json.dumps(asdict(Config()))) | saved["config"] != setup:
            raise SystemExit(f"{file} holds the rows of another configuration: name another --json, or delete it.")
        return saved["rows"]
    rows = errors(config)
    content = {"study": "parabola", "torch": torch.__version__, "config": setup, "rows": rows}
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content, indent=1))
    return rows


if __name__ == "__main__":
    main()
