"""The adding problem (Hochreiter and Schmidhuber, 1997), on which IndRNN was shown to remember 5000 steps.

A sequence holds T pairs (value, mark). Values are uniform in [0, 1]; one mark in each half of the sequence is 1, all
others are 0. After the last step the network gives the sum of the two marked values. Always answering 1, the mean, has
a mean squared error of 1/6 = 0.167: a curve that stays there has learnt nothing.

    python examples/adding_problem.py                  IndRNN at T = 1000
    python examples/adding_problem.py --model all      with IRNN, RNN and LSTM for as many steps
    python examples/adding_problem.py --quick          IndRNN and LSTM at T = 200

It needs typer, rich and matplotlib: pip install "recattn_kernels[examples]".

IndRNN is that of Li et al. (2018): two layers of 128, ReLU, |u| <= 2^(1/T), Adam, gradients of the states clamped to
10, batches of 50. The learning rate is 1e-3 where the paper takes 2e-4: the error falls below 0.01 in fewer steps. The
others have one layer of 128, as in the authors' code, the LSTM's forget bias is 1, and IRNN (Le et al., 2015) is ReLU
with the identity for a recurrent matrix and a smaller learning rate.

All have their gradients clipped to norm 1. IndRNN learns without, but later: its first guesses are far off, as it adds
up T numbers, and Adam divides by those gradients for a thousand steps. Over the last steps the rate falls to 0.
"""

from __future__ import annotations

import math
import time
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from commands import command, known_backend, make_folder, write_json
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor, nn

from recattn_kernels import IndRNN

BASELINE = 1 / 6  # the variance of the sum of two values
LEARNING_RATES = {"indrnn": 1e-3, "irnn": 1e-4, "rnn": 1e-3, "lstm": 1e-3}
TITLES = {"indrnn": "IndRNN", "irnn": "IRNN", "rnn": "RNN (tanh)", "lstm": "LSTM"}
TEST_SEQUENCES = 500


class Model(str, Enum):
    indrnn = "indrnn"
    irnn = "irnn"
    rnn = "rnn"
    lstm = "lstm"
    all = "all"


def sample(length: int, batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Sequences (T, B, 2) and their targets (B,)."""
    values = torch.rand(length, batch, generator=generator)
    first = torch.randint(length // 2, (batch,), generator=generator)
    second = torch.randint(length // 2, length, (batch,), generator=generator)
    rows = torch.arange(batch)
    marks = torch.zeros(length, batch)
    marks[first, rows] = marks[second, rows] = 1.0
    return torch.stack((values, marks), -1), values[first, rows] + values[second, rows]


class Adder(nn.Module):
    """A recurrence, and a linear read-out of its last state."""

    def __init__(self, model: str, length: int, hidden: int, layers: int, backend: str | None) -> None:
        super().__init__()
        if model == "indrnn":
            self.rnn = IndRNN(2, hidden, layers, sequence_length=length, grad_clip=10.0, backend=backend)
        elif model == "lstm":
            self.rnn = nn.LSTM(2, hidden)
            with torch.no_grad():
                self.rnn.bias_ih_l0.zero_()[hidden : 2 * hidden].fill_(1.0)
                self.rnn.bias_hh_l0.zero_()
        else:
            self.rnn = nn.RNN(2, hidden, nonlinearity="relu" if model == "irnn" else "tanh")
            if model == "irnn":
                nn.init.normal_(self.rnn.weight_ih_l0, std=0.001)
                nn.init.eye_(self.rnn.weight_hh_l0)
                nn.init.zeros_(self.rnn.bias_ih_l0)
                nn.init.zeros_(self.rnn.bias_hh_l0)
        self.readout = nn.Linear(hidden, 1)

    def forward(self, x: Tensor) -> Tensor:
        _, state = self.rnn(x)
        h_n = state[0] if isinstance(state, tuple) else state  # an LSTM's state is (h_n, c_n)
        return self.readout(h_n[-1]).squeeze(-1)

    def after_step(self) -> None:
        if isinstance(self.rnn, IndRNN):
            self.rnn.clamp_recurrent_()


@torch.no_grad()
def test_error(network: Adder, batches: list[tuple[Tensor, Tensor]]) -> float:
    return sum(F.mse_loss(network(x), y).item() for x, y in batches) / len(batches)


def train(
    model: str, length: int, steps: int, batch: int, hidden: int, layers: int, lr: float, decay: float, seed: int,
    backend: str | None, evaluate_every: int, stop_at: float, progress: Progress,
) -> dict[str, Any]:  # fmt: skip
    """Trains one network: every model sees the same sequences in the same order."""
    torch.manual_seed(seed)
    network = Adder(model, length, hidden, layers, backend)
    optimizer = torch.optim.Adam(network.parameters(), lr)
    generator = torch.Generator().manual_seed(seed)
    test_generator = torch.Generator().manual_seed(seed + 1_000_003)
    test = [sample(length, batch, test_generator) for _ in range(math.ceil(TEST_SEQUENCES / batch))]

    curve: list[dict[str, float]] = []
    losses: list[float] = []
    seconds = 0.0
    started = time.perf_counter()
    task = progress.add_task(TITLES[model], total=steps, loss=math.nan, test=math.nan)
    for step in range(1, steps + 1):
        begin = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, (steps - step + 1) / max(decay * steps, 1.0))
        x, y = sample(length, batch, generator)
        loss = F.mse_loss(network(x), y)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        network.after_step()
        losses.append(loss.item())
        seconds += time.perf_counter() - begin
        progress.update(task, advance=1, loss=losses[-1])
        if not math.isfinite(losses[-1]):
            break
        if step % evaluate_every == 0 or step == steps:
            error = test_error(network, test)
            curve.append({"step": step, "train_mse": sum(losses) / len(losses), "test_mse": error})
            losses.clear()
            progress.update(task, test=error)
            if error < stop_at:
                break
    progress.update(task, total=step)
    return {
        "model": model,
        "lr": lr,
        "steps": step,
        "test_mse": curve[-1]["test_mse"] if curve and math.isfinite(loss.item()) else math.nan,
        "ms_per_step": 1000 * seconds / step,
        "minutes": (time.perf_counter() - started) / 60,
        "curve": curve,
    }


def plot(results: list[dict[str, Any]], length: int, path: Path) -> None:
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for result in results:
        steps = [point["step"] for point in result["curve"]]
        axes.plot(steps, [point["test_mse"] for point in result["curve"]], label=TITLES[result["model"]])
    axes.axhline(BASELINE, color="gray", linestyle="--", label="always the mean (0.167)")
    axes.set(title=f"Adding problem, T = {length}", xlabel="training step", ylabel="test MSE", yscale="log")
    axes.legend()
    figure.savefig(path, dpi=150)


def report(results: list[dict[str, Any]], length: int, console: Console) -> None:
    table = Table(title=f"Adding problem, T = {length} (always the mean: {BASELINE:.3f})")
    for column in ("model", "steps", "test MSE", "ms/step", "minutes"):
        table.add_column(column, justify="left" if column == "model" else "right")
    for result in results:
        error = f"{result['test_mse']:.4f}" if math.isfinite(result["test_mse"]) else "diverged"
        table.add_row(
            TITLES[result["model"]], str(result["steps"]), error, f"{result['ms_per_step']:.1f}",
            f"{result['minutes']:.1f}",
        )  # fmt: skip
    console.print(table)


@command
def main(
    model: Annotated[Model | None, typer.Option(help="Which to train; all: IndRNN, then the others.")] = None,
    length: Annotated[int | None, typer.Option("--length", "-T", min=2, help="T, 1000 by default.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="At most so many, 3000 by default.")] = None,
    batch: Annotated[int, typer.Option(min=1)] = 50,
    hidden: Annotated[int, typer.Option(min=1)] = 128,
    layers: Annotated[int, typer.Option(min=1, help="Of the IndRNN; the others have one.")] = 2,
    lr: Annotated[float | None, typer.Option(help="Adam's; by default what suits the model.")] = None,
    decay: Annotated[float, typer.Option(min=0, max=1, help="The share of the steps over which lr falls to 0.")] = 0.3,
    seed: Annotated[int, typer.Option(min=0, help="Of initialisation and data.")] = 0,
    backend: Annotated[
        str | None, typer.Option(help="Of the IndRNN: auto, reference, cpp.", callback=known_backend)
    ] = None,
    stop_at: Annotated[float, typer.Option(help="Ends a training at this test MSE; 0: never.")] = 0.01,
    evaluate_every: Annotated[int, typer.Option(min=1, help="Steps between looks at the test MSE.")] = 50,
    out: Annotated[Path, typer.Option(help="Folder of the curve, as a plot and as JSON.")] = Path("adding-results"),
    quick: Annotated[bool, typer.Option("--quick", help="T = 200, IndRNN and LSTM: about a minute.")] = False,
) -> None:
    """Trains recurrent networks on the adding problem and compares them."""
    if model is None:
        models = ["indrnn", "lstm"] if quick else ["indrnn"]
    else:
        models = list(LEARNING_RATES) if model is Model.all else [model.value]
    length = length or (200 if quick else 1000)
    steps = steps or (1000 if quick else 3000)

    make_folder(out)
    console = Console()
    columns = (
        TextColumn("{task.description:10}"), BarColumn(), MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.4f}  test {task.fields[test]:.4f}"),
        TimeElapsedColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    results: list[dict[str, Any]] = []
    with Progress(*columns, console=console) as progress:
        for name in models:
            rate = LEARNING_RATES[name] if lr is None else lr
            result = train(
                name, length, steps, batch, hidden, layers, rate, decay, seed, backend, evaluate_every, stop_at,
                progress,
            )  # fmt: skip
            results.append(result)
            if name == "indrnn":
                steps = int(result["steps"])  # the others get no more

    settings = {"length": length, "batch": batch, "hidden": hidden, "layers": layers, "decay": decay, "seed": seed}
    write_json(out / "curve.json", {**settings, "baseline": BASELINE, "results": results})
    plot(results, length, out / "curve.png")
    report(results, length, console)
    console.print(f"Learning curve: {out / 'curve.png'}, {out / 'curve.json'}")


if __name__ == "__main__":
    typer.run(main)
