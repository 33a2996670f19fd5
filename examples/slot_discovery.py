"""Object discovery (Locatello et al., 2020): a network learns to take scenes apart into objects, though told of none.

An encoder turns an image into a set of features with positions, slot attention groups these into slots, and from each
slot alone a decoder paints a picture of its own and a mask of where it is seen; all that is trained is that the
pictures, mixed by their masks, give the image. That a slot comes to stand for an object is measured by the adjusted
Rand index between the objects and the slots that own their pixels, over the pixels of objects: 1 is a perfect match, 0
what chance gives. The scenes are drawn anew for every step: see slot_scenes.py.

    python examples/slot_discovery.py                      tetrominoes, 35 x 35: for a CPU
    python examples/slot_discovery.py --scenes sprites     two to five objects that hide each other, 64 x 64
    python examples/slot_discovery.py --minutes 20         ends after 20 minutes
    python examples/slot_discovery.py --resume             goes on where the last run, or its last checkpoint, ended
    python examples/slot_discovery.py --paper              the paper's network and training, for a GPU: 500,000 steps

It needs typer, rich, matplotlib and numpy: pip install "recattn_kernels[examples]".

The paper's encoder has four 5 x 5 convolutions on every pixel, and its decoder as many, for every slot. For a CPU the
encoder takes every second pixel (every fourth of the sprites), and the decoder begins with a quarter of the image's
side and doubles it twice. The rate of Adam is larger, as there are far fewer steps, and warms up sooner.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from slot_scenes import KINDS, Scenes
from torch import Tensor, nn

from recattn_kernels import SlotAttention

TEST_SEED, TEST_SCENES, TEST_BATCH = 1_000_000, 320, 64
SLOT_COLOURS = ListedColormap(["black", "#e6194b", "#3cb44b", "#4363d8", "#ffe119", "#f58231", "#911eb4"])


@dataclass(frozen=True)
class Options:
    scenes: str
    paper: bool
    slots: int
    dim: int
    channels: int
    iters: int
    test_iters: int
    batch: int
    steps: int
    lr: float
    warm_up: int
    halving: int  # steps in which the rate halves
    evaluate_every: int
    seed: int


# What the paper trains with, on both kinds of scenes, and what does on a CPU.
PAPER: dict[str, Any] = {"batch": 64, "steps": 500_000, "lr": 4e-4, "warm_up": 10_000, "halving": 100_000}
CPU: dict[str, Any] = {"batch": 16, "steps": 20_000, "lr": 1e-3, "warm_up": 500, "halving": 10_000}


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


def encoder(options: Options, size: int) -> nn.Module:
    """Image (B, 3, H, W) to features (B, D, H', W') with their positions."""
    C, D = options.channels, options.dim
    if options.paper:
        layers = [
            nn.Conv2d(3, C, 5, 1, 2),
            nn.Conv2d(C, C, 5, 1, 2),
            nn.Conv2d(C, C, 5, 1, 2),
            nn.Conv2d(C, D, 5, 1, 2),
        ]
    else:
        first = 1 if size < 64 else 2
        layers = [
            nn.Conv2d(3, C, 5, first, 2),
            nn.Conv2d(C, C, 5, 2, 2),
            nn.Conv2d(C, C, 3, 1, 1),
            nn.Conv2d(C, D, 3, 1, 1),
        ]
        size = math.ceil(math.ceil(size / first) / 2)
    return nn.Sequential(*(part for layer in layers for part in (layer, nn.ReLU())), SoftPosition(D, size))


def decoder(options: Options, size: int) -> tuple[nn.Module, int]:
    """A slot (B, D, s, s), the same at every place, to a picture and the logits of its mask (B, 4, H, W); and s."""
    C, D = options.channels, options.dim
    if options.paper:
        layers: list[nn.Module] = [nn.Conv2d(D, C, 5, 1, 2), nn.Conv2d(C, C, 5, 1, 2), nn.Conv2d(C, C, 5, 1, 2)]
    else:
        size = math.ceil(size / 4)
        layers = [
            nn.Conv2d(D, 4 * C, 1), nn.Conv2d(4 * C, 2 * C, 3, 1, 1), nn.ConvTranspose2d(2 * C, C, 4, 2, 1),
            nn.Conv2d(C, C, 3, 1, 1), nn.ConvTranspose2d(C, C // 2, 4, 2, 1),
        ]  # fmt: skip
    last = nn.Conv2d(C if options.paper else C // 2, 4, 3, 1, 1)
    return nn.Sequential(SoftPosition(D, size), *(p for layer in layers for p in (layer, nn.ReLU())), last), size


@dataclass(frozen=True)
class Decomposition:
    """image (B, 3, H, W): the mixture. pictures (B, K, 3, H, W) and masks (B, K, H, W), which add up to 1: of slots."""

    image: Tensor
    pictures: Tensor
    masks: Tensor


class AutoEncoder(nn.Module):
    """An image through slots and back."""

    def __init__(self, options: Options, backend: str | None = None) -> None:
        super().__init__()
        D, self.size = options.dim, KINDS[options.scenes].size
        self.encoder = encoder(options, self.size)
        self.features = nn.Sequential(nn.LayerNorm(D), nn.Linear(D, D), nn.ReLU(), nn.Linear(D, D))
        self.slot_attention = SlotAttention(options.slots, D, iters=options.iters, backend=backend)
        self.decoder, self.broadcast = decoder(options, self.size)

    def forward(self, image: Tensor, generator: torch.Generator | None = None) -> Decomposition:
        features = self.features(self.encoder(image).flatten(2).transpose(1, 2))  # (B, N, D)
        slots = self.slot_attention(features, generator=generator)
        B, K, D = slots.shape
        places = slots.view(B * K, D, 1, 1).expand(-1, -1, self.broadcast, self.broadcast)
        painted = self.decoder(places)[..., : self.size, : self.size].unflatten(0, (B, K))
        pictures, logits = painted.split((3, 1), dim=2)
        masks = logits.softmax(1)
        return Decomposition((pictures * masks).sum(1), pictures, masks.squeeze(2))


def foreground_ari(objects: Tensor, slots: Tensor, count: int) -> Tensor:
    """The adjusted Rand index (B,) of two labellings (B, H, W), both below count, over the pixels where objects > 0.

    With n[i, j] pixels of object i in slot j, and pairs(n) = n (n - 1) / 2: (sum pairs(n[i, j]) - e) / (m - e), where
    e = sum pairs(n[i, .]) * sum pairs(n[., j]) / pairs(n) is expected of chance, and m the mean of the two sums.
    """
    objects, slots = objects.flatten(1), slots.flatten(1)
    joint = F.one_hot(objects * count + slots, count * count).masked_fill((objects == 0).unsqueeze(-1), 0)
    table = joint.sum(1).unflatten(-1, (count, count)).double()

    def pairs(n: Tensor) -> Tensor:
        return n * (n - 1) / 2

    both, rows, columns = pairs(table).sum((1, 2)), pairs(table.sum(2)).sum(1), pairs(table.sum(1)).sum(1)
    expected = rows * columns / pairs(table.sum((1, 2))).clamp(min=1)
    most = (rows + columns) / 2
    same = most == expected  # as where there is one object, in one slot
    return torch.where(same, 1.0, (both - expected) / torch.where(same, 1.0, most - expected))


@torch.no_grad()
def evaluate(network: AutoEncoder, scenes: Scenes, options: Options, device: str) -> dict[str, float]:
    network.eval()
    network.slot_attention.iters = options.test_iters
    generator = torch.Generator(device).manual_seed(0)
    errors, scores = [], []
    for batch in scenes.batches(TEST_BATCH):
        image, mask = batch["image"].to(device), batch["mask"].to(device)
        found = network(image, generator)
        errors.append((found.image - image).square().mean((1, 2, 3)))
        labels = max(found.masks.shape[1], KINDS[scenes.name].objects + 1)
        scores.append(foreground_ari(mask, found.masks.argmax(1), labels))
    network.train()
    network.slot_attention.iters = options.iters
    return {"test_mse": float(torch.cat(errors).mean()), "ari": float(torch.cat(scores).mean())}


def rate(options: Options, step: int) -> float:
    return options.lr * min(1.0, (step + 1) / options.warm_up) * 0.5 ** (step / options.halving)


def batches(options: Options, step: int, workers: int) -> Iterator[dict[str, Tensor]]:
    """Those from this step on: each scene is seen once."""
    count = (options.steps - step) * options.batch
    return iter(Scenes(options.scenes, options.seed, count, step * options.batch).batches(options.batch, workers))


def save(checkpoint: dict[str, Any], path: Path) -> None:
    torch.save(checkpoint, path.with_suffix(".part"))
    path.with_suffix(".part").replace(path)


def train(
    options: Options, checkpoint: dict[str, Any] | None, minutes: float, device: str, workers: int,
    backend: str | None, out: Path, console: Console,
) -> tuple[AutoEncoder, dict[str, Any]]:  # fmt: skip
    torch.manual_seed(options.seed)
    network = AutoEncoder(options, backend).to(device)
    optimizer = torch.optim.Adam(network.parameters(), options.lr)
    test = Scenes(options.scenes, TEST_SEED + options.seed, TEST_SCENES)
    generator = torch.Generator(device).manual_seed(options.seed)  # of the slots' noise
    curve: list[dict[str, float]] = []
    step, elapsed = 0, 0.0
    if checkpoint is not None:
        network.load_state_dict(checkpoint["network"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        generator.set_state(checkpoint["random_state"])
        step, curve, elapsed = checkpoint["step"], checkpoint["curve"], checkpoint["elapsed"]
    started = time.perf_counter() - elapsed
    cpu_started = time.process_time() - (curve[-1]["cpu_seconds"] if curve else 0)
    losses: list[float] = []

    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.5f}  ARI {task.fields[ari]:.3f}"), TimeElapsedColumn(),
        TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(
            options.scenes,
            total=options.steps,
            completed=step,
            loss=math.nan,
            ari=curve[-1]["ari"] if curve else math.nan,
        )
        for batch in batches(options, step, workers):
            for group in optimizer.param_groups:
                group["lr"] = rate(options, step)
            image = batch["image"].to(device)
            loss = F.mse_loss(network(image, generator).image, image)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            step += 1
            progress.update(task, advance=1, loss=losses[-1])
            assert math.isfinite(losses[-1]), f"the training diverged at step {step}: a smaller --lr may help"
            is_last = step == options.steps or time.perf_counter() - started >= 60 * minutes
            if not is_last and step % options.evaluate_every != 0:
                continue
            elapsed = time.perf_counter() - started
            point = {
                "step": step, "minutes": elapsed / 60, "cpu_seconds": time.process_time() - cpu_started,
                "train_mse": sum(losses) / len(losses), **evaluate(network, test, options, device),
            }  # fmt: skip
            losses.clear()
            curve.append(point)
            progress.update(task, ari=point["ari"])
            progress.console.print(
                f"step {step:6}  {point['minutes']:6.1f} minutes  training {point['train_mse']:.5f}"
                f"  test {point['test_mse']:.5f}  foreground ARI {point['ari']:.3f}"
            )
            checkpoint = {
                "options": asdict(options), "step": step, "network": network.state_dict(),
                "optimizer": optimizer.state_dict(), "random_state": generator.get_state(), "curve": curve,
                "elapsed": elapsed,
            }  # fmt: skip
            save(checkpoint, out / "last.pt")
            if is_last:
                break
    return network, {"parameters": sum(p.numel() for p in network.parameters()), "curve": curve}


@torch.no_grad()
def draw(network: AutoEncoder, options: Options, device: str, path: Path) -> None:
    """A few test scenes: the image, its mixture, the objects, the slots that own the pixels, and what each paints."""
    rows = 6
    batch = next(iter(Scenes(options.scenes, TEST_SEED + options.seed, rows).batches(rows)))
    network.slot_attention.iters = options.test_iters
    found = network.eval()(batch["image"].to(device), torch.Generator(device).manual_seed(0))
    owner = found.masks.argmax(1)
    K = options.slots
    figure = Figure(figsize=(1.3 * (4 + K), 1.3 * rows + 0.4), layout="constrained")
    grid = figure.subplots(rows, 4 + K, squeeze=False)
    titles = ["image", "mixture", "objects", "slots", *(f"slot {k + 1}" for k in range(K))]
    colours = {"cmap": SLOT_COLOURS, "vmin": 0, "vmax": SLOT_COLOURS.N - 1, "interpolation": "nearest"}
    for b, line in enumerate(grid):
        mask = found.masks[b].unsqueeze(-1)
        painted = found.pictures[b].permute(0, 2, 3, 1) * mask + (1 - mask)  # what it does not own is white
        images = [batch["image"][b].permute(1, 2, 0), found.image[b].permute(1, 2, 0)]
        for axes, image in zip((*line[:2], *line[4:]), (*images, *painted), strict=True):
            axes.imshow(image.clamp(0, 1).cpu().numpy(), interpolation="nearest")
        line[2].imshow(batch["mask"][b].numpy() % SLOT_COLOURS.N, **colours)
        line[3].imshow((owner[b].cpu().numpy() + 1) % SLOT_COLOURS.N, **colours)
        for axes, title in zip(line, titles, strict=True):
            axes.set(xticks=[], yticks=[], title=title if b == 0 else "")
    figure.savefig(path, dpi=150)


def plot(curve: list[dict[str, float]], title: str, path: Path) -> None:
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    steps = [point["step"] for point in curve]
    axes.plot(steps, [point["ari"] for point in curve], marker=".", label="foreground ARI")
    axes.set(title=title, xlabel="step", ylabel="foreground ARI", ylim=(0, 1))
    errors = axes.twinx()
    errors.plot(steps, [point["test_mse"] for point in curve], "k--", label="test error")
    errors.set(ylabel="mean squared error", yscale="log")
    figure.legend(loc="outside lower center", ncols=2)
    figure.savefig(path, dpi=150)


def resumed(context: typer.Context, out: Path, changeable: set[str]) -> dict[str, Any]:
    """The checkpoint in out. What has a bearing on the result is taken from it, but for what is changeable."""
    free = {"resume", "out", "minutes", "device", "workers", "backend", *changeable}
    for key in context.params:
        source = context.get_parameter_source(key)
        if key not in free and source is not None and source.name == "COMMANDLINE":
            raise typer.BadParameter(f"--resume takes this option from the checkpoint: {key}")
    checkpoint: dict[str, Any] = torch.load(out / "last.pt", weights_only=True)
    return checkpoint


def main(
    context: typer.Context,
    scenes: Annotated[str, typer.Option(help="tetrominoes or sprites.")] = "tetrominoes",
    paper: Annotated[bool, typer.Option("--paper", help="The paper's network and training.")] = False,
    slots: Annotated[int | None, typer.Option(min=1, help="One more than there are objects, by default.")] = None,
    dim: Annotated[int, typer.Option(min=1, help="Of a slot.")] = 64,
    channels: Annotated[int, typer.Option(min=2, help="Of the convolutions.")] = 32,
    iters: Annotated[int, typer.Option(min=1, help="Of slot attention, in training.")] = 3,
    test_iters: Annotated[int, typer.Option(min=1, help="And in tests, where more of them part objects better.")] = 5,
    batch: Annotated[int | None, typer.Option(min=1)] = None,
    steps: Annotated[int | None, typer.Option(min=1)] = None,
    minutes: Annotated[float, typer.Option(min=0.001, help="Ends the training, if steps do not.")] = math.inf,
    lr: Annotated[float | None, typer.Option(help="Adam's, once it is warm.")] = None,
    evaluate_every: Annotated[int, typer.Option(min=1, help="Steps.")] = 500,
    seed: Annotated[int, typer.Option(min=0, help="Of initialisation, noise and scenes.")] = 0,
    device: Annotated[str, typer.Option(help="cuda where there is a GPU, by default.")] = "",
    workers: Annotated[int, typer.Option(min=0, help="Processes that draw scenes.")] = 0,
    backend: Annotated[str | None, typer.Option(help="Of slot attention: auto, reference, cpp, triton.")] = None,
    out: Annotated[Path, typer.Option(help="Folder of checkpoint, curve and picture.")] = Path(
        "slot-discovery-results"
    ),
    resume: Annotated[bool, typer.Option("--resume", help="Goes on from the checkpoint in --out.")] = False,
) -> None:
    """Trains slot attention to take scenes apart into objects, and draws what its slots stand for."""
    if scenes not in KINDS:
        raise typer.BadParameter(f"--scenes must be one of {', '.join(KINDS)}, got {scenes}")
    training = {**(PAPER if paper else CPU)}
    training |= {k: v for k, v in {"batch": batch, "steps": steps, "lr": lr}.items() if v is not None}
    options = Options(
        scenes=scenes, paper=paper, slots=slots or KINDS[scenes].objects + 1, dim=dim, channels=channels, iters=iters,
        test_iters=test_iters, evaluate_every=evaluate_every, seed=seed, **training,
    )  # fmt: skip
    checkpoint = resumed(context, out, {"steps"}) if resume else None
    if checkpoint is not None:
        options = Options(**checkpoint["options"])
        options = replace(options, steps=steps or options.steps)
        if checkpoint["step"] >= options.steps:
            raise typer.BadParameter(f"--resume: all {options.steps} steps have been taken: give it more with --steps")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")

    out.mkdir(parents=True, exist_ok=True)
    console = Console(highlight=False)
    network, result = train(options, checkpoint, minutes, device, workers, backend, out, console)
    (out / "curve.json").write_text(json.dumps({"options": asdict(options), **result}, indent=1) + "\n")
    last = result["curve"][-1]
    plot(result["curve"], f"{options.scenes}, {options.slots} slots", out / "curve.png")
    draw(network, options, device, out / "slots.png")
    console.print(
        f"{options.scenes}: foreground ARI {last['ari']:.3f} after {last['step']} steps, {last['minutes']:.1f} minutes"
    )
    console.print(f"Slots and masks: {out / 'slots.png'}", soft_wrap=True)
    console.print(f"Learning curve: {out / 'curve.png'}, {out / 'curve.json'}", soft_wrap=True)
    console.print(f"Checkpoint: {out / 'last.pt'}", soft_wrap=True)


if __name__ == "__main__":
    typer.run(main)
