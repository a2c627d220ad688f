"""The noise of a small transformer's layers against tau, at two batch sizes: a picture.

    python -m benchmarks.per_layer_picture [--out docs/figures/per-layer.svg]

AdamW on the bytes of python's own documentation, tuned at 8 passages of 32 bytes; every step is looked at.
"""

import argparse
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import anybatch
from anybatch._report import LayerChart, LayerMap, layer_legend, layer_map, levels, picture
from anybatch._scaling import Moments

BASE_BATCH, CONTEXT, WIDTH, BLOCKS = 8, 32, 48, 3
SCALES = (4, 16)
TOTAL = 1500
RATE = 2e-3
MIDDLE = (500, 1000)  # of tau


class Transformer(nn.Module):
    """Bytes to logits of the next byte."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes, self.places = nn.Embedding(256, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(WIDTH, 4, 4 * WIDTH, dropout=0.0, batch_first=True, norm_first=True)
            for _ in range(BLOCKS)
        )
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 256)

    def forward(self, x: Tensor) -> Tensor:
        """`[n, CONTEXT]` to `[n, CONTEXT, 256]`."""
        mask = nn.Transformer.generate_square_subsequent_mask(CONTEXT)
        h = self.bytes(x) + self.places.weight
        for block in self.blocks:
            h = block(h, src_mask=mask, is_causal=True)
        logits: Tensor = self.head(self.norm(h))
        return logits


def train(scale: int, record: Path) -> None:
    """One run."""
    from pydoc_data.topics import topics

    data = torch.tensor(list("\n".join(topics[name] for name in sorted(topics)).encode()))
    torch.manual_seed(0)
    model = Transformer()
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, TOTAL + 1)
    controller = anybatch.attach(
        optimizer, model=model, scheduler=scheduler, total=TOTAL, base_batch=BASE_BATCH, micro_batch=BASE_BATCH,
        record=anybatch.RunRecord(record, per_layer=1),
    )  # fmt: skip
    while not controller.done:
        rows = torch.randint(len(data) - CONTEXT, (BASE_BATCH * scale, 1)) + torch.arange(CONTEXT + 1)
        for part, share in controller.parts(data[rows], scale):
            (cross_entropy(model(part[:, :-1]).flatten(0, 1), part[:, 1:].flatten()) * share).backward()
        optimizer.step()
        optimizer.zero_grad()
    controller.detach()


def words(scale: int, layers: dict[str, Moments], found: LayerMap) -> str:
    """The layers' noise in the middle of the run, in passages, and by how much each grows from its first cell on."""
    noise = {name: BASE_BATCH * moments.noise_scale for name, moments in layers.items()}
    whole = Moments(sum(m.variance for m in layers.values()), sum(m.sqnorm for m in layers.values()))
    growth = [cells[-1].noise / cells[0].noise for cells in found.layers.values()]
    lines = [
        f"S = {scale}: from its first cell to its last each layer's grows {min(growth):.0f}-fold or more. From tau = "
        f"{MIDDLE[0]} to {MIDDLE[1]}, the whole's is {BASE_BATCH * whole.noise_scale:.0f}, the mean of the layers' "
        f"{sum(noise.values()) / len(noise):.0f}:"
    ]
    lines += [f"    {value:5.0f}  {name}" for name, value in sorted(noise.items(), key=lambda pair: pair[1])]
    return "\n".join(lines)


def main() -> None:
    """Train, and draw."""
    parser = argparse.ArgumentParser(description="The noise of layers against tau.")
    parser.add_argument("--out", type=Path, default=Path("docs/figures/per-layer.svg"))
    out = parser.parse_args().out
    torch.set_num_threads(1)
    maps = {}
    with tempfile.TemporaryDirectory() as folder:
        for scale in SCALES:
            record = Path(folder) / f"{scale}.jsonl"
            train(scale, record)
            run = anybatch.read_record(record)
            found = layer_map(run.steps, unit=BASE_BATCH)
            if found is not None:
                print(words(scale, run.per_layer(*MIDDLE), found))
                maps[f"S = {scale}: noise scale in passages"] = found
    limits = levels(maps.values())
    picture([LayerChart(title, found, limits) for title, found in maps.items()], layer_legend(limits), out)


if __name__ == "__main__":
    main()
