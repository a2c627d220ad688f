"""What a scenario of training comes to, by a plain float64 loop: nothing of anybatch is imported here.

Every micro-batch's gradient is taken by itself; its deviations from their mean give the variance, which is what
expectation says of independent samples: one of b examples has the variance v / b. Averages are sums over all earlier
steps with their weights written out; SGD, Adam and the schedules are the textbook's.
"""

import math

import torch

FIRST_SINCE = 1.0  # base iterations before the first sample
SHARE = 0.01  # of the run: the averages' horizon
MEMORY = 0.02  # of the run: what a constant momentum may remember
FLOOR = 1e-6  # the paper's
OWN_NOISE_FACTOR = {"SGD": 1.0, "Adam": 2.0, "AdamW": 2.0}
EXPONENT = {"SGD": 1.0, "Adam": 0.5, "AdamW": 0.5}


def expected(s):
    """The numbers of each step, the learning rates after the last, and the final weights."""
    net = s.model().double()
    groups = s.parameters_of(net)
    parameters = [p for group in groups for p in group]
    states = {id(p): {} for p in parameters}
    present, tau, lines = set(), 0.0, []
    samples = []  # (variance, sqnorm, theta) of each measured step
    at, taken = -FIRST_SINCE, 0  # tau at the last of them, and its number
    previous = None  # consecutive: the last step's gradient and its size
    counted = []  # the windows of the steps so far
    for number, window in enumerate(s.windows):
        step_number = len(counted)
        if number == s.resumed:
            previous = None  # a gradient is not in the state
        grads, used = [], set()
        for micro_batch in window:
            x, y = (each.double() for each in s.data(micro_batch))
            loss = (net(x, micro_batch.use_branch) - y).square().mean()
            found = torch.autograd.grad(loss, parameters, allow_unused=True)
            used |= {id(p) for p, g in zip(parameters, found) if g is not None}
            grads.append([torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found)])
        present = used if s.set_to_none else present | used
        if number in s.bad:  # the step is skipped, and with it all that follows
            previous = None
            continue
        counted.append(window)
        n = len(window)
        mean = [sum(g) / n for g in zip(*grads)]
        scale, sample = size_of(s, window)

        raw = shown = None
        since = tau - at if samples else FIRST_SINCE
        if s.rule == "AdaScale" and n > 1 and not lost(s, counted):
            spread = sum(square([a - b for a, b in zip(g, mean)]) for g in grads) / (n - 1)
            found = with_replacement(s, sample * spread, square(mean) - spread / n)
            raw = found if due(s, step_number, since) else None
            shown = found if s.by_layer and step_number % 2 == 0 else None  # in the record, and no sample
        if s.options.get("consecutive") and n == 1 and previous is not None:
            half = square([a - b for a, b in zip(mean, previous[0])]) / 2
            harmonic = 2 / (1 / sample + 1 / previous[1])
            raw = (harmonic * half, square([(a + b) / 2 for a, b in zip(mean, previous[0])]) - half / 2)
        previous = (mean, sample) if n == 1 else None

        before = list(samples)
        if raw is not None:
            steps = min(step_number - taken, s.options["every"]) if samples else 1
            samples.append(sample_of(s, raw, scale=scale, since=since, steps=steps, n=len(samples)))
            at, taken = tau, step_number
        prior = s.options.get("estimator") == "paper"
        gain = gain_of(s, before if prior else samples, scale)
        factor, iterations = scaling_of(s, scale, gain, tau)

        rate = [group["lr"] * schedule(s, position(tau)) for group in s.groups]
        line = {"scale": scale, "gain": gain, "factor": factor, "iterations": iterations}
        line |= {"lr": [], "momentum": [], "weight decay": []}
        step = {id(p): g for p, g in zip(parameters, mean)}
        first = s.reduction == "mean" or s.mean_first or s.clamp is not None
        clipping(s, step, present, times=1 if first else n // s.world / (1 if s.reduction == "sum" else s.reduction))
        for group, members, lr in zip(s.groups, groups, rate):
            update = sgd if s.optimizer == "SGD" else adam
            mine = [(p.data, step[id(p)], states[id(p)]) for p in members if id(p) in present]
            shows = update(s, group, mine, lr=lr, factor=factor, iterations=iterations, scale=scale)
            for name, value in zip(("lr", "momentum", "weight decay"), shows):
                line[name].append(value)
        tau += iterations
        line |= {"tau": tau, "raw": raw or shown or (math.nan, math.nan)}
        line["average"] = [max(x, 0.0) for x in average(samples)] if samples else (math.nan, math.nan)
        lines.append(line)
    after = [group["lr"] * schedule(s, position(tau)) for group in s.groups]
    return {"lines": lines, "weights": {n: p.detach() for n, p in net.named_parameters()}, "lr after": after}


def square(vector):
    return sum(float(t.square().sum()) for t in vector)


# ---- how big a step is, and what it shows ----


def size_of(s, window):
    """Scale of the step and of one sample, in base batches: the harmonic mean where sizes differ."""
    n, given = len(window), s.batch.get("scale")
    if given is not None:
        return (float(n), 1.0) if given == "count" else (given, given / n)
    sizes = [m.size if s.sized else s.batch["micro_batch"] for m in window]
    sample = len(sizes) / sum(1 / b for b in sizes) / s.batch["base_batch"]
    return n * sample, sample


def due(s, step_number, since):
    """Each k-th step, and where the clock has moved by a quarter of the horizon since the last sample."""
    horizon = SHARE * s.total if s.total is not None and s.options["smoothing"] is None else math.inf
    return step_number % s.options["every"] == 0 or since >= horizon / 4


def lost(s, counted):
    """On one process a window of fewer micro-batches than that of the step before is not measured."""
    if s.world > 1 or len(counted) == 1:
        return False
    return 1 < len(counted[-1]) < len(counted[-2])


def with_replacement(s, variance, sqnorm):
    """Base batches of one pass over P of them are correlated by -1 / (P - 1): differences show P / (P - 1) of the
    variance, and the mean of all is off by what is missing.
    """
    if "examples" not in s.batch:
        return variance, sqnorm
    population = s.batch["examples"] / s.batch["base_batch"]
    right = variance * (population - 1) / population
    return right, sqnorm + variance - right


def sample_of(s, raw, *, scale, since, steps, n):
    """What is averaged, and the factor by which the averages before it fade; n samples came before."""
    smoothing = s.options["smoothing"]
    if isinstance(smoothing, float):
        theta = smoothing**steps
    else:
        theta = max(1 - scale / 1000, 0.0) ** steps
        if smoothing is None and s.total is not None:
            theta = min(theta, math.exp(-since / (SHARE * s.total)))
    if s.options["estimator"] == "paper":
        raw = (max(raw[0], FLOOR), max(raw[1], 0.0))
        if n * (1 - theta) < 1:
            theta = n / (n + 1)  # a plain mean
    return (*raw, theta)


def average(samples):
    weights = []
    for k, (_, _, theta) in enumerate(samples):
        weights.append((1 - theta) * math.prod(later[2] for later in samples[k + 1 :]))
    return [sum(w * x[i] for w, x in zip(weights, samples)) / sum(weights) for i in (0, 1)]


def gain_of(s, samples, scale):
    if s.rule != "AdaScale":
        return math.nan
    if scale == 1:
        return 1.0
    if not samples:
        return min(1.0, scale)
    noise, estimator = s.options["noise_factor"], s.options["estimator"]
    if noise is None:
        noise = OWN_NOISE_FACTOR[s.optimizer] if estimator == "unbiased" else 1.0
    v, q = average(samples)
    v *= noise
    v, q = max(v, 0.0), max(q, 0.0)
    gain = 1.0 if v == 0 else (v + q) / (v / scale + q)
    if estimator == "unbiased" and gain > 1:  # half of the way, and then half of the rest every two steps
        gain = math.exp(math.log(gain) * (1 - math.sqrt(0.5) ** (len(samples) + 1)))
    return gain


def scaling_of(s, scale, gain, tau):
    """The factor on the learning rate, and how far the clock moves."""
    if s.rule == "AdaScale":
        return gain ** EXPONENT[s.optimizer], gain
    if s.rule == "SquareRoot":
        return math.sqrt(scale), scale
    if s.rule == "Identity":
        return 1.0, 1.0
    warmup, steps = s.options["warmup"], s.options["steps"]
    ramp = min(1.0, tau / (warmup * s.total)) if warmup else 1.0
    return 1 + ramp * (scale - 1), s.total / steps if steps else scale


def position(tau):
    return math.floor(tau + 1e-9 * max(1.0, tau))  # a sum of floats that comes to a whole number has come to it


def schedule(s, i):
    """The closed form of torch's scheduler."""
    name, options = s.schedule
    if name == "StepLR":
        return options["gamma"] ** (i // options["step_size"])
    if name == "MultiStepLR":
        return options["gamma"] ** sum(i >= m for m in options["milestones"])
    if name == "ExponentialLR":
        return options["gamma"] ** i
    if name == "CosineAnnealingLR":
        return (1 + math.cos(math.pi * i / options["T_max"])) / 2
    if name == "LinearLR":
        start = options["start_factor"]
        return start + (1 - start) * min(i, options["total_iters"]) / options["total_iters"]
    return 1 / math.sqrt(1 + i) if name == "LambdaLR" else 1.0


# ---- the optimizers: each returns what its group shows inside of the step ----


def clipping(s, step, present, *, times):
    """The user clamps `.grad`, and clips what is `times` the mean."""
    if s.clamp is not None:
        for key in step:
            step[key] = step[key].clamp(-s.clamp, s.clamp)
    if s.clip is not None:
        norm = times * math.sqrt(square([g for key, g in step.items() if key in present]))
        for key in step:
            step[key] = step[key] * min(1.0, s.clip / (norm + 1e-6))


def sgd(s, group, members, *, lr, factor, iterations, scale):
    """b = m' b + c (1 - d) g with c = (1 - m') / (1 - m), a step of lr * factor * b; with Nesterov of c g + m' b."""
    m, d = group["momentum"], group["dampening"]
    power = {"clock": 1.0, "constant": 0.0}.get(s.decays, s.decays)
    if power == "auto":
        short = s.rule == "AdaScale" and s.total is not None and scale > 1
        power = 0.5 if short and scale / (1 - m) > MEMORY * s.total * (1 + 1e-9) else 0.0
    now = m ** (iterations**power) if m else 0.0
    c = (1 - now) / (1 - m)
    for p, g, state in members:
        g = g + group["weight_decay"] * p
        if not m:
            p -= lr * factor * g
            continue
        entering = c * (1 - d) * g
        if "b" not in state:  # torch's own first step takes the gradient whole
            state["b"] = g if now == m else entering
        else:
            state["b"] = now * state["b"] + entering
        p -= lr * factor * (c * g + now * state["b"] if group["nesterov"] else state["b"])
    return lr * factor * (c if group["nesterov"] else 1.0), now, group["weight_decay"]


def adam(s, group, members, *, lr, factor, iterations, scale):
    """The averages move by k base iterations, and each parameter's own count of them debiases."""
    power = {"clock": 1.0, "auto": 1.0, "constant": 0.0}.get(s.decays, s.decays)
    k = iterations**power
    b1, b2 = (beta**k for beta in group["betas"])
    decay = group["weight_decay"]
    if s.optimizer == "AdamW" and power:  # decoupled, so lr * decay moves by k, where decays follow the clock at all
        decay *= k / factor
    for p, g, state in members:
        if s.optimizer == "AdamW":
            p *= 1 - lr * factor * decay
        else:
            g = g + decay * p
        state["age"] = state.get("age", 0.0) + k
        state["m"] = b1 * state.get("m", 0.0) + (1 - b1) * g
        state["v"] = b2 * state.get("v", 0.0) + (1 - b2) * g * g
        m = state["m"] / (1 - group["betas"][0] ** state["age"])
        v = state["v"] / (1 - group["betas"][1] ** state["age"])
        p -= lr * factor * m / (v.sqrt() + group["eps"])
    return lr * factor, 0.0, decay
