"""Images in epochs: StepLR, validation after each epoch, a DataLoader; at any batch size.

    python examples/images.py                       # at the batch it was tuned for
    python examples/images.py --scale 32            # 32 times the batch, nothing else changed
    python examples/images.py --scale 32 --rule linear

The data are the handwritten digits of scikit-learn; put your own data set and network in their place. Epochs are those
of the base batch: the schedule, the validation and the end of the run follow the clock, not the passes over the data.
"""

import argparse
import json

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import anybatch

BASE_BATCH, LEARNING_RATE, MOMENTUM, EPOCHS = 8, 0.05, 0.9, 24
RULES = {
    "adascale": anybatch.AdaScale(),
    "linear": anybatch.Linear(warmup=0.055),
    "sqrt": anybatch.SquareRoot(),
}


def main() -> None:
    """Train, and print what it came to."""
    parser = argparse.ArgumentParser(description="Images in epochs at any batch size.")
    parser.add_argument("--scale", type=int, default=1, help="the batch, in base batches of 8 images")
    parser.add_argument("--epochs", type=int, default=EPOCHS, help="of the base batch")
    parser.add_argument("--rule", choices=RULES, default="adascale")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and the data")
    options = parser.parse_args()
    print(json.dumps(train(**vars(options), verbose=True)))


def train(
    *, scale: int = 1, epochs: int = EPOCHS, rule: str = "adascale", seed: int = 0, verbose: bool = False
) -> dict[str, float]:
    """One run; returns the validation accuracy, the steps and the images seen."""
    torch.manual_seed(seed)
    data, validation = images()
    loader = DataLoader(data, batch_size=BASE_BATCH * scale, shuffle=True, drop_last=True)
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10)
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE, momentum=MOMENTUM)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=max(1, epochs // 3), gamma=0.1)
    parts = max(2, min(scale, 8))  # backwards a step: as few as fit into memory, but two
    controller = anybatch.attach(
        optimizer,
        model=model,
        rule=RULES[rule],
        scheduler=scheduler,
        schedule_every="epoch",
        epochs=epochs,
        examples=len(data),
        base_batch=BASE_BATCH,
        micro_batch=BASE_BATCH * scale / parts,
    )
    epoch = 0
    for batch in controller.batches(loader):
        for (x, y), share in controller.parts(batch, parts):
            (cross_entropy(model(x), y) * share).backward()
        optimizer.step()
        optimizer.zero_grad()
        if verbose and controller.epoch > epoch:
            epoch = controller.epoch
            print(f"epoch {epoch}: {validate(model, validation):.1f} %, gain {controller.gain:.1f} of {scale}")
    controller.detach()
    seen = controller.steps * BASE_BATCH * scale
    return {
        "accuracy": validate(model, validation),
        "steps": controller.steps,
        "images": seen,
        "gain": controller.tau / controller.steps,
    }


def images() -> tuple[TensorDataset, tuple[Tensor, Tensor]]:
    """The data set, and the images and labels of the validation."""
    x, y = load_digits(return_X_y=True)
    x, x_valid, y, y_valid = train_test_split(x, y, test_size=0.25, random_state=0, stratify=y)
    as_images = [torch.as_tensor((part - 4.9) / 6.0).float().view(-1, 1, 8, 8) for part in (x, x_valid)]
    return TensorDataset(as_images[0], torch.as_tensor(y)), (as_images[1], torch.as_tensor(y_valid))


@torch.no_grad()
def validate(model: nn.Module, validation: tuple[Tensor, Tensor]) -> float:
    """Accuracy in per cent."""
    x, y = validation
    return 100 * (model(x).argmax(1) == y).double().mean().item()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
