"""Algorithm 2 of the paper as a plain loop over float64 gradients: no hooks, no library, nothing vectorised.

With the two defaults that the paper has not: the first gains, of n samples, go half of the way to the full one and then
half of the rest every two steps; and the momentum is `MOMENTUM ** sqrt(gain)` where a constant one could remember more
than 2 % of the run.

A step has `accumulations x ranks` micro-batches of `a` base batches each. Gradients come from `torch.autograd.grad`,
one micro-batch at a time; momentum SGD, the cosine schedule and the averages are written out.
"""

import itertools
import math

import torch
from torch import nn

TOTAL = 200.0
LR, MOMENTUM = 0.05, 0.9


def make_model(seed=0, dtype=torch.float64):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).to(dtype)


def micro_batch(step, index, size=4, dtype=torch.float64):
    """The same data for every engine: micro-batch `index` of `step`."""
    g = torch.Generator().manual_seed(1000 * step + index)
    x = torch.randn(size, 6, generator=g, dtype=torch.float64)
    y = torch.stack([x[:, :2].sum(1), x[:, 2:4].sum(1), x[:, 4:].sum(1)], 1) + torch.randn(
        size, 3, generator=g, dtype=torch.float64
    )
    return x.to(dtype), y.to(dtype)


def loss_fn(prediction, y):
    return (prediction - y).square().mean()


def cosine(i):
    return LR * (1 + math.cos(math.pi * i / TOTAL)) / 2


def norm2(vector):
    return sum(float(t.square().sum()) for t in vector)


def adascale(*, steps, counts, sample=1.0, horizon=0.01 * TOTAL, several=False):
    """Gains and final parameters of `steps` steps; step t has `counts[t % len(counts)]` micro-batches of `sample`
    base batches. On one process a window shorter than the one before is not measured."""
    model = make_model()
    weights = [p.detach().clone() for p in model.parameters()]
    buffers = None
    tau = 0.0
    samples = []  # (variance, sqnorm, tau at which it was taken)
    gains, taus = [], []
    for t in range(steps):
        n = counts[t % len(counts)]
        grads = []
        for i in range(n):
            with torch.no_grad():
                for p, w in zip(model.parameters(), weights):
                    p.copy_(w)
            x, y = micro_batch(t, i)
            grads.append(torch.autograd.grad(loss_fn(model(x), y), list(model.parameters())))
        mean = [sum(g[k] for g in grads) / n for k in range(len(weights))]
        scale = n * sample
        shorter = not several and t > 0 and n < counts[(t - 1) % len(counts)]
        if n > 1 and not shorter:
            deviation = sum(norm2([a - b for a, b in zip(g, mean)]) for g in grads) / (n - 1)
            variance = sample * deviation  # covariance of one micro-batch's gradient -> of one base batch's
            sqnorm = norm2(mean) - deviation / n
            samples.append((variance, sqnorm, tau))
        thetas = [math.exp(-(b[2] - a[2]) / horizon) for a, b in itertools.pairwise(samples)]
        thetas = [math.exp(-1 / horizon), *thetas][: len(samples)]
        total_weight = v = q = 0.0
        for k, (variance, sqnorm, _) in enumerate(samples):
            weight = 1 - thetas[k]
            for later in thetas[k + 1 :]:
                weight *= later
            total_weight += weight
            v += weight * variance
            q += weight * sqnorm
        if scale == 1:
            gain = 1.0
        elif not samples:
            gain = min(1.0, scale)
        else:
            v, q = max(v / total_weight, 0), max(q / total_weight, 0)
            gain = (v + q) / (v / scale + q)
            gain = gain ** (1 - math.sqrt(0.5) ** (len(samples) + 1)) if gain > 1 else gain
        lr = cosine(math.floor(tau))
        momentum = MOMENTUM
        if scale > 1 and scale / (1 - MOMENTUM) > 0.02 * TOTAL:
            momentum = MOMENTUM ** math.sqrt(gain)
        entering = (1 - momentum) / (1 - MOMENTUM)
        buffers = (
            [entering * g for g in mean]
            if buffers is None
            else [momentum * b + entering * g for b, g in zip(buffers, mean)]
        )
        weights = [w - gain * lr * b for w, b in zip(weights, buffers)]
        tau += gain
        gains.append(gain)
        taus.append(tau)
    return gains, taus, weights
