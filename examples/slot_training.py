"""What the slot attention examples share: their arguments, an encoder, and a training that can be ended and resumed."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, TypeVar

import torch
import typer
from checkpoints import check_left, check_resumed, load, options_of, restoring, save
from commands import diverged, known_backend, make_folder, write_json
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from slot_scenes import KINDS, Scenes
from torch import Tensor, nn

TEST_SEED, TEST_BATCH = 1_000_000, 64


class Init(str, Enum):
    gaussian = "gaussian"
    learned = "learned"


@dataclass(frozen=True)
class Settings:
    """What has a bearing on the result."""

    scenes: str
    paper: bool
    init: str  # of the slots
    dim: int
    channels: int
    iters: int
    batch: int
    steps: int
    lr: float
    warm_up: int
    halving: int  # steps in which the rate halves
    evaluate_every: int
    seed: int


@dataclass(frozen=True)
class Run:
    """What has none."""

    out: Path
    minutes: float
    device: str
    workers: int
    console: Console


AnySettings = TypeVar("AnySettings", bound=Settings)
Batch = dict[str, Tensor]
Point = dict[str, float]  # of a learning curve
Checkpoint = dict[str, Any]


def known(scenes: str) -> str:
    if scenes not in KINDS:
        raise typer.BadParameter(f"must be one of {', '.join(KINDS)}, got {scenes}")
    return scenes


def present(device: str) -> str:
    """The GPU, if there is one, where no device is asked for."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.Generator(device)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise typer.BadParameter(f"{device}: {str(error).splitlines()[0]}") from None
    return device


ScenesArgument = Annotated[str, typer.Option(help="shapes, tetrominoes or sprites.", callback=known)]
PaperArgument = Annotated[bool, typer.Option("--paper", help="The paper's network and training.")]
InitArgument = Annotated[Init | None, typer.Option(help="Of the slots; learned by default, gaussian with --paper.")]
DimArgument = Annotated[int, typer.Option(min=1, help="Of a slot.")]
BatchArgument = Annotated[int | None, typer.Option(min=1)]
StepsArgument = Annotated[int | None, typer.Option(min=1)]
MinutesArgument = Annotated[float, typer.Option(min=0.001, help="Ends this run, if steps do not.")]
RateArgument = Annotated[float | None, typer.Option(help="Adam's, once it is warm.")]
EveryArgument = Annotated[int, typer.Option(min=1, help="Steps.")]
SeedArgument = Annotated[int, typer.Option(min=0, help="Of initialisation, noise and scenes.")]
DeviceArgument = Annotated[str, typer.Option(help="cuda where there is a GPU, by default.", callback=present)]
WorkersArgument = Annotated[int, typer.Option(min=0, help="Processes that draw scenes.")]
BackendArgument = Annotated[
    str | None, typer.Option(help="Of slot attention: auto, reference, cpp, triton.", callback=known_backend)
]
OutArgument = Annotated[Path, typer.Option(help="Folder of checkpoint, curve and pictures.")]
ResumeArgument = Annotated[bool, typer.Option("--resume", help="Goes on from the checkpoint in --out.")]


def given(**values: Any) -> dict[str, Any]:
    """Those that are not left to a default."""
    return {name: value for name, value in values.items() if value is not None}


def resumed(
    context: typer.Context, options: AnySettings, steps: int | None, out: Path
) -> tuple[AnySettings, Checkpoint]:
    """The checkpoint in out, and its options: no other may be asked for, but for the number of steps."""
    check_resumed(context, {"steps", "backend", *Run.__annotations__})
    checkpoint = load(out / "last.pt")
    options = options_of(checkpoint, type(options))
    options = replace(options, steps=steps or options.steps)
    with restoring():
        check_left(checkpoint["step"], options.steps, "--steps")
    return options, checkpoint


def run_in(out: Path, minutes: float, device: str, workers: int) -> Run:
    """Makes the folder of the results."""
    make_folder(out)
    return Run(out, minutes, device, workers, Console(highlight=False))


class SoftPosition(nn.Module):
    """Adds to each feature of a picture (B, C, H, W) a linear function of its distances from the four edges."""

    grid: Tensor

    def __init__(self, channels: int, size: int) -> None:
        super().__init__()
        axis = torch.linspace(0, 1, size)
        grid = torch.stack(torch.meshgrid(axis, axis, indexing="ij"))
        self.register_buffer("grid", torch.cat((grid, 1 - grid)), persistent=False)  # (4, H, W)
        self.project = nn.Conv2d(4, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.project(self.grid)


class Encoder(nn.Module):
    """An image (B, 3, H, W) to features (B, N, D) of its places, which know where they are.

    strides: of the four convolutions. The paper's are all 5 x 5; for a CPU the last two are 3 x 3.
    """

    def __init__(self, options: Settings, strides: tuple[int, ...]) -> None:
        super().__init__()
        C, D, size = options.channels, options.dim, KINDS[options.scenes].size
        layers: list[nn.Module] = []
        sides = (5, 5, 5, 5) if options.paper else (5, 5, 3, 3)
        for before, after, side, stride in zip((3, C, C, C), (C, C, C, D), sides, strides, strict=True):
            layers += [nn.Conv2d(before, after, side, stride, side // 2), nn.ReLU()]
            size = math.ceil(size / stride)
        self.places = nn.Sequential(*layers, SoftPosition(D, size))
        self.features = nn.Sequential(nn.LayerNorm(D), nn.Linear(D, D), nn.ReLU(), nn.Linear(D, D))

    def forward(self, image: Tensor) -> Tensor:
        features: Tensor = self.features(self.places(image).flatten(2).transpose(1, 2))
        return features


def rate(options: Settings, step: int) -> float:
    return options.lr * min(1.0, (step + 1) / options.warm_up) * 0.5 ** (step / options.halving)


def batches(options: Settings, step: int, run: Run) -> Iterator[Batch]:
    """Those from this step on: each scene is seen once."""
    count = (options.steps - step) * options.batch
    scenes = Scenes(options.scenes, options.seed, count, step * options.batch)
    for batch in scenes.batches(options.batch, run.workers):
        yield {name: tensor.to(run.device) for name, tensor in batch.items()}


def train(
    network: nn.Module,
    options: Settings,
    run: Run,
    checkpoint: Checkpoint | None,
    loss_of: Callable[[Batch, torch.Generator], Tensor],
    evaluate: Callable[[], Point],
    shown: Callable[[Point], str],
) -> list[Point]:
    """Trains the network by loss_of(batch, generator of the slots' noise), and returns the learning curve.

    evaluate() measures it, and shown() has in words what it measured. After each measurement there is a checkpoint, and
    in the end the curve is written to curve.json.
    """
    optimizer = torch.optim.Adam(network.parameters(), options.lr)
    generator = torch.Generator(run.device).manual_seed(options.seed)
    curve: list[Point] = []
    step, earlier, cpu = 0, 0.0, 0.0  # minutes and seconds of processors in earlier runs
    if checkpoint is not None:
        with restoring():
            network.load_state_dict(checkpoint["network"])
            optimizer.load_state_dict(checkpoint["optimizer"])
            if len(checkpoint["random_state"]) == len(generator.get_state()):
                generator.set_state(checkpoint["random_state"])
            else:  # of another kind of device: new noise, and not that of the first steps once more
                generator.manual_seed(options.seed + checkpoint["step"])
            step, curve = checkpoint["step"], checkpoint["curve"]
            earlier, cpu = curve[-1]["minutes"], curve[-1]["cpu_seconds"]
    started, cpu_started = time.perf_counter(), time.process_time() - cpu
    losses: list[float] = []

    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.5f}  {task.fields[test]}"), TimeElapsedColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=run.console) as progress:
        test = shown(curve[-1]) if curve else ""
        task = progress.add_task(options.scenes, total=options.steps, completed=step, loss=math.nan, test=test)
        for batch in batches(options, step, run):
            for group in optimizer.param_groups:
                group["lr"] = rate(options, step)
            loss = loss_of(batch, generator)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            step += 1
            progress.update(task, advance=1, loss=losses[-1])
            if not math.isfinite(losses[-1]):
                raise diverged(step)
            elapsed = time.perf_counter() - started
            is_last = step == options.steps or elapsed >= 60 * run.minutes
            if not is_last and step % options.evaluate_every != 0:
                continue
            network.eval()
            with torch.no_grad():
                measured = evaluate()
            network.train()
            point = {
                "step": step, "minutes": earlier + (time.perf_counter() - started) / 60,
                "cpu_seconds": time.process_time() - cpu_started, "train_loss": sum(losses) / len(losses), **measured,
            }  # fmt: skip
            losses.clear()
            curve.append(point)
            progress.update(task, test=shown(point))
            progress.console.print(
                f"step {step:6}  {point['minutes']:6.1f} minutes  training {point['train_loss']:.5f}  {shown(point)}",
                soft_wrap=True,
            )
            checkpoint = {
                "options": asdict(options), "step": step, "network": network.state_dict(),
                "optimizer": optimizer.state_dict(), "random_state": generator.get_state(), "curve": curve,
            }  # fmt: skip
            save(checkpoint, run.out / "last.pt")
            if is_last:
                break
    parameters = sum(p.numel() for p in network.parameters())
    result = {"options": asdict(options), "parameters": parameters, "curve": curve}
    write_json(run.out / "curve.json", result)
    return curve


def tell_files(run: Run) -> None:
    """Where the results of a training lie."""
    run.console.print(f"Learning curve: {run.out / 'curve.png'}, {run.out / 'curve.json'}", soft_wrap=True)
    run.console.print(f"Checkpoint: {run.out / 'last.pt'}", soft_wrap=True)
