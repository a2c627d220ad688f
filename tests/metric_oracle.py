"""AdaScale in Adam's metric as a plain loop over float64 gradients.

AdamW, its second moments and the averages are written out. No hooks, no library; gradients come from
`torch.autograd.grad`, one micro-batch at a time.
"""

import math

import oracle
import torch

READY = 10  # steps after which the second moments count
LR, BETAS, EPS, DECAY = 0.02, (0.9, 0.99), 1e-6, 0.01


class Means:
    """Weighted means over all samples, each written out: nothing is updated in place."""

    def __init__(self, total):
        self.horizon, self.samples, self.since = 0.01 * total, [], 1.0

    def add(self, variance, sqnorm, scale):
        theta = min(math.exp(-self.since / self.horizon), 1 - scale / 1000)
        self.samples.append((variance, sqnorm, theta))
        self.since = 0.0

    def read(self):
        weights = [
            (1 - theta) * math.prod(later for _, _, later in self.samples[k + 1 :])
            for k, (_, _, theta) in enumerate(self.samples)
        ]
        return [sum(w * s[i] for w, s in zip(weights, self.samples)) / sum(weights) for i in (0, 1)]


def gain_of(variance, sqnorm, scale, samples):
    """The gain after so many Euclidean samples: the first ones are drawn towards 1."""
    variance, sqnorm = max(variance, 0), max(sqnorm, 0)
    gain = (variance + sqnorm) / (variance / scale + sqnorm)
    return gain ** (1 - math.sqrt(0.5) ** (samples + 1)) if gain > 1 else gain


def moments_of(grads, weight, sample):
    """Variance and squared mean from micro-batch gradients, by their deviations from their mean."""
    n = len(grads)
    mean = [sum(g[k] for g in grads) / n for k in range(len(grads[0]))]

    def square(vector):
        return sum(float((x.square() * w).sum()) for x, w in zip(vector, weight))

    deviation = sum(square([a - b for a, b in zip(g, mean)]) for g in grads) / (n - 1)
    return sample * deviation, square(mean) - deviation / n


def plain_loop(*, steps, counts, amsgrad=False, sample=1.0, total=100.0, repeat=1):
    """AdamW written out, with its decays on the clock, and AdaScale in its metric; each micro-batch `repeat` times."""
    model = oracle.make_model()
    w = [p.detach().clone() for p in model.parameters()]
    m, v, top = ([torch.zeros_like(x) for x in w] for _ in range(3))
    euclidean, metric = Means(total), Means(total)
    tau, found = 0.0, []
    for t in range(steps):
        n = counts[t % len(counts)]
        grads = []
        for i in range(n):
            with torch.no_grad():
                for p, x in zip(model.parameters(), w):
                    p.copy_(x)
            x, y = oracle.micro_batch(t, i)
            grads += [torch.autograd.grad(oracle.loss_fn(model(x), y), list(model.parameters()))] * repeat
        scale = len(grads) * sample
        measured = t == 0 or n >= counts[(t - 1) % len(counts)]  # not a window shorter than the one before
        if measured:
            euclidean.add(*moments_of(grads, [torch.ones_like(x) for x in w], sample), scale)
        means = metric if metric.samples else euclidean
        if t >= READY and measured:
            second = top if amsgrad else v
            weight = [1 / ((x / (1 - BETAS[1] ** tau)).sqrt() + EPS) for x in second]
            metric.add(*moments_of(grads, weight, sample), scale)
            means = metric
        r = gain_of(*means.read(), scale, len(euclidean.samples))
        mean = [sum(g[k] for g in grads) / len(grads) for k in range(len(w))]
        lr, betas = LR * r**0.5, [beta**r for beta in BETAS]
        tau += r
        for k, g in enumerate(mean):
            m[k] = betas[0] * m[k] + (1 - betas[0]) * g
            v[k] = betas[1] * v[k] + (1 - betas[1]) * g.square()
            top[k] = torch.maximum(top[k], v[k])
            denominator = ((top if amsgrad else v)[k] / (1 - BETAS[1] ** tau)).sqrt() + EPS
            w[k] = w[k] * (1 - LR * DECAY * r) - lr * m[k] / (1 - BETAS[0] ** tau) / denominator
        euclidean.since += r
        metric.since += r if metric.samples else 0.0
        found.append((r, *(metric.read() if metric.samples else (math.nan, math.nan)), *euclidean.read()))
    return found, w
