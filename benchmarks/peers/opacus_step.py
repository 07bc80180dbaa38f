"""The plain and the private step of Opacus; run by `dp_step.py` in its environment."""

import itertools
import sys
from pathlib import Path

import torch
from opacus import PrivacyEngine
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import dp_step  # noqa: E402

SHAPES = {"mlp": (784,), "lenet": (1, 28, 28), "wide": (1, 28, 28)}


class Residual(nn.Module):
    """Two convolutions with GroupNorm around a shortcut."""

    def __init__(self, channels, width, stride):
        super().__init__()
        self.body = nn.Sequential(
            convolution(channels, width, stride), nn.ReLU(), convolution(width, width)
        )
        self.shortcut = nn.Identity()
        if stride > 1:
            self.shortcut = convolution(channels, width, stride, size=1)
        self.last = nn.ReLU()

    def forward(self, x):
        return self.last(self.body(x) + self.shortcut(x))


def convolution(channels, width, stride=1, size=3):
    return nn.Sequential(
        nn.Conv2d(channels, width, size, stride, padding=size // 2, bias=False),
        nn.GroupNorm(8, width),
    )


def make_net(name):
    """The students of `dp_step.make_net`, in PyTorch."""
    if name == "mlp":
        hidden = [nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU()]
        return nn.Sequential(*hidden, nn.Linear(256, 10))
    if name == "lenet":
        return nn.Sequential(
            nn.Conv2d(1, 16, 8, 2, padding=3),
            nn.ReLU(),
            nn.MaxPool2d(2, 1),
            nn.Conv2d(16, 32, 4, 2),
            nn.ReLU(),
            nn.MaxPool2d(2, 1),
            nn.Flatten(),
            nn.Linear(512, 32),
            nn.ReLU(),
            nn.Linear(32, 10),
        )
    if name == "wide":
        return nn.Sequential(
            nn.Conv2d(1, 32, 3),
            nn.ReLU(),
            nn.Conv2d(32, 64, 3),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(64 * 12 * 12, 128),
            nn.ReLU(),
            nn.Linear(128, 10),
        )
    blocks = [Residual(16, 16, 1), Residual(16, 32, 2), Residual(32, 64, 2)]
    pooled = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)]
    return nn.Sequential(convolution(3, 16), nn.ReLU(), *blocks, *pooled)


def make_batch(net, size):
    """Random images and labels."""
    images = torch.rand(size, *SHAPES.get(net, (3, 32, 32)))
    return images, torch.randint(0, 10, (size,))


def make_step(net, batch, mode):
    """The training step, plain for the mode None."""
    model, criterion = make_net(net), nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    if mode is not None:
        data = torch.utils.data.TensorDataset(*batch)
        made = PrivacyEngine().make_private(
            module=model,
            optimizer=optimizer,
            criterion=criterion,
            data_loader=torch.utils.data.DataLoader(data, batch_size=len(batch[1])),
            noise_multiplier=1.0,
            max_grad_norm=1.0,
            poisson_sampling=False,
            grad_sample_mode=mode,
        )
        model, optimizer = made[:2]
        criterion = made[2] if mode == "ghost" else criterion

    def step(images, labels):
        optimizer.zero_grad()
        loss = criterion(model(images), labels)
        loss.backward()
        optimizer.step()
        return loss

    return step


def main(kind, path, net, batch_size, repeats, threads):
    torch.set_num_threads(int(threads))
    mode = None if path == "plain" else path.removeprefix("opacus_")
    rest = dp_step.peak_mb()
    batch = make_batch(net, int(batch_size))
    step = make_step(net, batch, mode)
    if kind == "memory":
        for _ in itertools.repeat(None, 4):
            step(*batch)
        peak = dp_step.peak_mb()
        return {"peak_mb": peak, "step_mb": peak - rest}
    steps = {"plain": make_step(net, batch, None), "private": step}
    return dp_step.compare(steps, batch, int(repeats)) | {"threads": int(threads)}


if __name__ == "__main__":
    dp_step.answer(main(*sys.argv[1:]))
