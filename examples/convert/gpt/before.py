"""A small language model in the form of nanoGPT: a function for the rate, accumulation, clipping, evaluations."""

import argparse
import json
import math
from pydoc_data.topics import topics

import torch
from torch import nn
from torch.nn.functional import cross_entropy

parser = argparse.ArgumentParser()
parser.add_argument("--batch-size", type=int, default=4, help="passages of one backward")
parser.add_argument("--accumulation", type=int, default=2)
parser.add_argument("--resume", metavar="FILE")
parser.add_argument("--stop-at", type=int, default=10**9, help="leave at this iteration, to resume later")
args = parser.parse_args()

max_iters, warmup_iters, eval_interval, learning_rate, min_lr, context = 240, 20, 40, 4e-3, 4e-4, 16

torch.manual_seed(0)
torch.set_num_threads(1)
text = torch.tensor(list("\n".join(topics[name] for name in sorted(topics)).encode()))
train, valid = text[: len(text) * 9 // 10], text[len(text) * 9 // 10 :]


def passages(source, n):
    rows = torch.randint(len(source) - context, (n, 1)) + torch.arange(context + 1)
    return source[rows[:, :-1]], source[rows[:, 1:]]


def get_lr(it):
    if it < warmup_iters:
        return learning_rate * (it + 1) / (warmup_iters + 1)
    share = min(1.0, (it - warmup_iters) / (max_iters - warmup_iters))
    return min_lr + 0.5 * (1 + math.cos(math.pi * share)) * (learning_rate - min_lr)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.bytes = nn.Embedding(256, 32)
        self.layers = nn.GRU(32, 64, batch_first=True)
        self.head = nn.Linear(64, 256)

    def forward(self, x):
        return self.head(self.layers(self.bytes(x))[0])


model = Model()
optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.1)

iter_num = 0
if args.resume:
    checkpoint = torch.load(args.resume)
    model.load_state_dict(checkpoint["model"])
    optimizer.load_state_dict(checkpoint["optimizer"])
    iter_num = checkpoint["iter_num"]


@torch.no_grad()
def evaluate():
    rows = torch.linspace(0, len(valid) - context - 1, 256).long()[:, None] + torch.arange(context + 1)
    return cross_entropy(model(valid[rows[:, :-1]]).flatten(0, 1), valid[rows[:, 1:]].flatten()).item()


saved = []
while iter_num < max_iters:
    for group in optimizer.param_groups:
        group["lr"] = get_lr(iter_num)
    for _ in range(args.accumulation):
        x, y = passages(train, args.batch_size)
        loss = cross_entropy(model(x).flatten(0, 1), y.flatten()) / args.accumulation
        loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    iter_num += 1
    if iter_num % eval_interval == 0:
        saved.append(iter_num)
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "iter_num": iter_num}
        torch.save(state, "checkpoint.pt")
        if iter_num >= args.stop_at:
            break

print(json.dumps({"loss": evaluate(), "lr": optimizer.param_groups[0]["lr"], "saved": saved}))
