"""Images in epochs, in the form of most image scripts: StepLR, validation and a checkpoint after each epoch."""

import argparse
import json

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

parser = argparse.ArgumentParser()
parser.add_argument("--epochs", type=int, default=9)
parser.add_argument("--batch-size", type=int, default=16)
parser.add_argument("--lr", type=float, default=0.05)
parser.add_argument("--resume", metavar="FILE")
parser.add_argument("--stop-at", type=int, default=100, help="leave after this epoch, to resume later")
args = parser.parse_args()

torch.manual_seed(0)
torch.set_num_threads(1)
x, y = (torch.as_tensor(part) for part in load_digits(return_X_y=True))
data = TensorDataset(x[:1400].float() / 16, y[:1400])
x_valid, y_valid = x[1400:].float() / 16, y[1400:]

loader = DataLoader(data, args.batch_size, shuffle=True)
model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
criterion = nn.CrossEntropyLoss()
optimizer = torch.optim.SGD(model.parameters(), args.lr, momentum=0.9, weight_decay=1e-4)
scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=3, gamma=0.1)

first_epoch = 0
if args.resume:
    checkpoint = torch.load(args.resume)
    first_epoch = checkpoint["epoch"]
    model.load_state_dict(checkpoint["model"])
    optimizer.load_state_dict(checkpoint["optimizer"])
    scheduler.load_state_dict(checkpoint["scheduler"])


def finish_epoch(epoch):
    with torch.no_grad():
        accuracy = (model(x_valid).argmax(1) == y_valid).double().mean().item()
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()}
    torch.save({"epoch": epoch, **state}, "checkpoint.pt")
    return accuracy


for epoch in range(first_epoch, min(args.epochs, args.stop_at)):
    for images, labels in loader:
        loss = criterion(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    scheduler.step()
    accuracy = finish_epoch(epoch + 1)

print(json.dumps({"accuracy": accuracy, "lr": scheduler.get_last_lr()[0]}))
