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
side and doubles it twice. The rate of Adam is larger, as there are far fewer steps, warms up sooner and halves sooner.
And slots start from learned vectors, with bi-level gradients (Jia, Liu and Huang, 2023), and find the objects within
minutes; slots from noise, as in the paper (--init gaussian), first share out the image as quarters, with an index
around 0.5, and with some seeds stay there for long.

There is a slot more than objects, as in the paper. Of tetrominoes, which are on black, any slot can paint the black
beside its piece, and the spare one halves a piece instead: --init gaussian --test-slots 3 leaves it out in tests, where
one knows that there are three.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import slot_training as shared
import torch
import torch.nn.functional as F
import typer
from commands import command
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from slot_scenes import KINDS, Scenes
from torch import Tensor, nn

from recattn_kernels import SlotAttention

TEST_SCENES = 320
SLOT_COLOURS = ListedColormap(["black", "#e6194b", "#3cb44b", "#4363d8", "#ffe119", "#f58231", "#911eb4"])


@dataclass(frozen=True)
class Options(shared.Settings):
    slots: int
    test_slots: int
    test_iters: int


# What the paper trains with, on both kinds of scenes, and what does on a CPU.
PAPER: dict[str, Any] = {
    "batch": 64, "steps": 500_000, "lr": 4e-4, "warm_up": 10_000, "halving": 100_000, "init": "gaussian",
}  # fmt: skip
CPU: dict[str, Any] = {"batch": 32, "steps": 2_500, "lr": 1e-3, "warm_up": 200, "halving": 1_000, "init": "learned"}


def decoder(options: Options, size: int) -> tuple[nn.Module, int]:
    """A slot (B, D, s, s), the same at every place, to a picture and the logits of its mask (B, 4, H, W); and s."""
    C, D = options.channels, options.dim
    if options.paper:
        layers: list[nn.Module] = [nn.Conv2d(D, C, 5, 1, 2), nn.Conv2d(C, C, 5, 1, 2), nn.Conv2d(C, C, 5, 1, 2)]
    else:
        size = math.ceil(size / 4)
        layers = [
            nn.Conv2d(D, 2 * C, 3, 1, 1), nn.ConvTranspose2d(2 * C, C, 4, 2, 1), nn.Conv2d(C, C, 3, 1, 1),
            nn.ConvTranspose2d(C, C // 2, 4, 2, 1),
        ]  # fmt: skip
    last = nn.Conv2d(C if options.paper else C // 2, 4, 3, 1, 1)
    return nn.Sequential(shared.SoftPosition(D, size), *(p for layer in layers for p in (layer, nn.ReLU())), last), size


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
        strides = (1, 1, 1, 1) if options.paper else (1 if self.size < 64 else 2, 2, 1, 1)
        self.encoder = shared.Encoder(options, strides)
        grad_mode = "bi-level" if options.init == "learned" else "full"
        self.slot_attention = SlotAttention(
            options.slots, D, iters=options.iters, init=options.init, grad_mode=grad_mode, backend=backend
        )
        self.decoder, self.broadcast = decoder(options, self.size)

    def forward(
        self, image: Tensor, generator: torch.Generator | None = None, num_slots: int | None = None
    ) -> Decomposition:
        slots = self.slot_attention(self.encoder(image), num_slots=num_slots, generator=generator)
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


def evaluate(network: AutoEncoder, scenes: Scenes, options: Options, device: str) -> shared.Point:
    network.slot_attention.iters = options.test_iters
    generator = torch.Generator(device).manual_seed(0)
    errors, scores = [], []
    for batch in scenes.batches(shared.TEST_BATCH):
        image, mask = batch["image"].to(device), batch["mask"].to(device)
        found = network(image, generator, options.test_slots)
        errors.append((found.image - image).square().mean((1, 2, 3)))
        labels = max(found.masks.shape[1], KINDS[scenes.name].objects + 1)
        scores.append(foreground_ari(mask, found.masks.argmax(1), labels))
    network.slot_attention.iters = options.iters
    return {"test_loss": float(torch.cat(errors).mean()), "ari": float(torch.cat(scores).mean())}


@torch.no_grad()
def draw(network: AutoEncoder, options: Options, device: str, path: Path) -> None:
    """A few test scenes: the image, its mixture, the objects, the slots that own the pixels, and what each paints."""
    rows = 6
    batch = next(iter(Scenes(options.scenes, shared.TEST_SEED + options.seed, rows).batches(rows)))
    network.slot_attention.iters = options.test_iters
    found = network.eval()(batch["image"].to(device), torch.Generator(device).manual_seed(0), options.test_slots)
    owner = found.masks.argmax(1)
    K = options.test_slots
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
    errors.plot(steps, [point["test_loss"] for point in curve], "k--", label="test error")
    errors.set(ylabel="mean squared error", yscale="log")
    figure.legend(loc="outside lower center", ncols=2)
    figure.savefig(path, dpi=150)


@command
def main(
    context: typer.Context,
    scenes: shared.ScenesArgument = "tetrominoes",
    paper: shared.PaperArgument = False,
    slots: Annotated[int | None, typer.Option(min=1, help="One more than there are objects, by default.")] = None,
    test_slots: Annotated[int | None, typer.Option(min=1, help="In tests; as many as in training, by default.")] = None,
    init: shared.InitArgument = None,
    dim: shared.DimArgument = 64,
    channels: Annotated[int, typer.Option(min=2, help="Of the convolutions.")] = 32,
    iters: Annotated[int, typer.Option(min=1, help="Of slot attention, in training.")] = 3,
    test_iters: Annotated[int, typer.Option(min=1, help="And in tests, where more of them part objects better.")] = 5,
    batch: shared.BatchArgument = None,
    steps: shared.StepsArgument = None,
    minutes: shared.MinutesArgument = math.inf,
    lr: shared.RateArgument = None,
    evaluate_every: shared.EveryArgument = 500,
    seed: shared.SeedArgument = 0,
    device: shared.DeviceArgument = "",
    workers: shared.WorkersArgument = 0,
    backend: shared.BackendArgument = None,
    out: shared.OutArgument = Path("slot-discovery-results"),
    resume: shared.ResumeArgument = False,
) -> None:
    """Trains slot attention to take scenes apart into objects, and draws what its slots stand for."""
    training = {**(PAPER if paper else CPU), **shared.given(batch=batch, steps=steps, lr=lr, init=init and init.value)}
    slots = slots or KINDS[scenes].objects + 1
    options = Options(
        scenes=scenes, paper=paper, slots=slots, test_slots=test_slots or slots, dim=dim, channels=channels,
        iters=iters, test_iters=test_iters, evaluate_every=evaluate_every, seed=seed, **training,
    )  # fmt: skip
    options, checkpoint = shared.resumed(context, options, steps, out) if resume else (options, None)
    run = shared.run_in(out, minutes, device, workers)

    torch.manual_seed(options.seed)
    network = AutoEncoder(options, backend).to(run.device)
    test = Scenes(options.scenes, shared.TEST_SEED + options.seed, TEST_SCENES)

    def loss(batch: shared.Batch, generator: torch.Generator) -> Tensor:
        return F.mse_loss(network(batch["image"], generator).image, batch["image"])

    curve = shared.train(
        network, options, run, checkpoint, loss,
        evaluate=lambda: evaluate(network, test, options, run.device),
        shown=lambda point: f"test {point['test_loss']:.5f}  foreground ARI {point['ari']:.3f}",
    )  # fmt: skip
    plot(curve, f"{options.scenes}, {options.slots} slots", out / "curve.png")
    draw(network, options, run.device, out / "slots.png")
    last = curve[-1]
    run.console.print(
        f"{options.scenes}: foreground ARI {last['ari']:.3f} after {last['step']} steps, {last['minutes']:.1f} minutes"
    )
    run.console.print(f"Slots and masks: {out / 'slots.png'}", soft_wrap=True)
    shared.tell_files(run)


if __name__ == "__main__":
    typer.run(main)
