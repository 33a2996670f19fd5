"""Set prediction (Locatello et al., 2020): a network names the objects of a scene, their shapes, colours and places.

Slot attention turns an image's features into slots, and each slot says of one object whether there is one, where its
centre is, and its shape and colour. No object has a slot of its own: for the loss each is paired with the slot that
fits it, so that the sum of all pairs is least (Hungarian matching). The result is measured by average precision: slots
are taken in the order of how sure they are that there is an object, and one is right if an object of the same shape and
colour, no other slot's yet, has its centre within some distance of the slot's. The scenes are those of slot_scenes.py,
drawn anew for every step.

    python examples/slot_set_prediction.py                      three tetrominoes, 35 x 35
    python examples/slot_set_prediction.py --scenes sprites     two to five sprites that hide each other, 64 x 64
    python examples/slot_set_prediction.py --minutes 5          ends after 5 minutes
    python examples/slot_set_prediction.py --resume             goes on from the last checkpoint
    python examples/slot_set_prediction.py --paper              the paper's encoder and training, for a GPU

It needs scipy, typer, rich, matplotlib and numpy: pip install "recattn_kernels[examples]".
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import slot_training as shared
import torch
import torch.nn.functional as F
import typer
from commands import command
from matplotlib.figure import Figure
from rich.table import Table
from scipy.optimize import linear_sum_assignment
from slot_scenes import KINDS, Kind, Scenes
from torch import Tensor, nn

from recattn_kernels import SlotAttention

TEST_SCENES = 640
# How far from an object's centre a slot's may be, in sides of the image.
THRESHOLDS = {"any": math.inf, "1/4": 1 / 4, "1/8": 1 / 8, "1/16": 1 / 16, "1/32": 1 / 32}


PAPER: dict[str, Any] = {
    "batch": 512, "steps": 150_000, "lr": 4e-4, "warm_up": 1_000, "halving": 50_000, "channels": 64,
}  # fmt: skip
CPU: dict[str, Any] = {"batch": 32, "steps": 10_000, "lr": 1e-3, "warm_up": 500, "halving": 4_000, "channels": 32}


class SetPredictor(nn.Module):
    """Image (B, 3, H, W) to what each slot says (B, K, 3 + shapes + colours), all in (0, 1)."""

    def __init__(self, options: shared.Settings, backend: str | None = None) -> None:
        super().__init__()
        D, kind = options.dim, KINDS[options.scenes]
        self.encoder = shared.Encoder(options)
        self.slot_attention = SlotAttention(kind.objects, D, iters=options.iters, backend=backend)
        self.head = nn.Sequential(nn.Linear(D, D), nn.ReLU(), nn.Linear(D, 3 + kind.shapes + kind.colours))

    def forward(self, image: Tensor, generator: torch.Generator | None = None) -> Tensor:
        said: Tensor = self.head(self.slot_attention(self.encoder(image), generator=generator))
        return said.sigmoid()


def targets(batch: dict[str, Tensor], kind: Kind) -> Tensor:
    """What slots should say (B, K, 3 + shapes + colours): presence, centre, shape and colour; all 0 of no object."""
    shape, colour = F.one_hot(batch["shape"], kind.shapes), F.one_hot(batch["colour"], kind.colours)
    present = batch["present"].unsqueeze(-1)
    return torch.cat((present, batch["centre"], shape, colour), -1) * present


def matched(said: Tensor, wanted: Tensor) -> Tensor:
    """For each sample's slots (B, K), the object that is theirs in the pairing of the least sum of losses."""
    pairs = torch.broadcast_tensors(said.detach().unsqueeze(2), wanted.unsqueeze(1))
    costs = F.huber_loss(*pairs, reduction="none").sum(-1).cpu().numpy()  # (B, K, K)
    theirs = np.stack([linear_sum_assignment(cost)[1] for cost in costs])
    return torch.from_numpy(theirs).to(said.device)


def set_loss(said: Tensor, wanted: Tensor) -> Tensor:
    """The mean Huber loss of slots and the objects that are theirs."""
    theirs = matched(said, wanted).unsqueeze(-1).expand_as(wanted)
    return F.huber_loss(said, wanted.gather(1, theirs))


def average_precision(said: Tensor, wanted: Tensor, kind: Kind, threshold: float) -> float:
    """The area under precision over recall, as slots of all scenes are taken from the surest to the least sure.

    A slot takes the nearest object within threshold that is of its shape and colour and that none took before; it is
    wrong if there is none. Precision at a recall is the best at that recall or a higher one. said, wanted: (B, K, ...).
    """
    said, wanted = said.double().cpu(), wanted.double().cpu()
    fits = torch.cdist(said[..., 1:3], wanted[..., 1:3])  # (B, K, K)
    for first, count in ((3, kind.shapes), (3 + kind.shapes, kind.colours)):
        names, true = (t[..., first : first + count].argmax(-1) for t in (said, wanted))
        fits = fits.masked_fill(names.unsqueeze(2) != true.unsqueeze(1), math.nan)
    present = wanted[..., 0] > 0
    fits = fits.masked_fill(~present.unsqueeze(1) | (fits > threshold), math.nan).nan_to_num(math.inf, math.inf)

    right = []
    K = said.shape[1]
    for row in said[..., 0].flatten().argsort(descending=True, stable=True).tolist():
        scene, slot = divmod(row, K)
        nearest = int(fits[scene, slot].argmin())
        right.append(bool(fits[scene, slot, nearest] < math.inf))
        if right[-1]:
            fits[scene, :, nearest] = math.inf
    found = torch.tensor(right, dtype=torch.float64).cumsum(0)
    precision = found / torch.arange(1, len(right) + 1)
    best = precision.flip(0).cummax(0).values.flip(0)
    return float((best * torch.tensor(right)).sum() / present.sum())


def evaluate(network: SetPredictor, scenes: Scenes, device: str) -> shared.Point:
    kind, generator = KINDS[scenes.name], torch.Generator(device).manual_seed(0)
    said, wanted = [], []
    for batch in scenes.batches(shared.TEST_BATCH):
        said.append(network(batch["image"].to(device), generator).cpu())
        wanted.append(targets(batch, kind))
    results, truth = torch.cat(said), torch.cat(wanted)
    precisions = {name: average_precision(results, truth, kind, limit) for name, limit in THRESHOLDS.items()}
    return {"test_loss": float(set_loss(results, truth)), **precisions}


def plot(curve: list[dict[str, float]], title: str, path: Path) -> None:
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for name in THRESHOLDS:
        label = "at any distance" if name == "any" else f"within {name} of the side"
        axes.plot([p["step"] for p in curve], [100 * p[name] for p in curve], marker=".", label=label)
    axes.set(title=title, xlabel="step", ylabel="average precision, %", ylim=(0, 100))
    axes.legend()
    figure.savefig(path, dpi=150)


@command
def main(
    context: typer.Context,
    scenes: shared.ScenesArgument = "tetrominoes",
    paper: shared.PaperArgument = False,
    dim: shared.DimArgument = 64,
    channels: Annotated[int | None, typer.Option(min=1, help="Of the convolutions.")] = None,
    iters: Annotated[int, typer.Option(min=1, help="Of slot attention.")] = 3,
    batch: shared.BatchArgument = None,
    steps: shared.StepsArgument = None,
    minutes: shared.MinutesArgument = math.inf,
    lr: shared.RateArgument = None,
    evaluate_every: shared.EveryArgument = 500,
    seed: shared.SeedArgument = 0,
    device: shared.DeviceArgument = "",
    workers: shared.WorkersArgument = 0,
    backend: shared.BackendArgument = None,
    out: shared.OutArgument = Path("slot-set-results"),
    resume: shared.ResumeArgument = False,
) -> None:
    """Trains slot attention to name the objects of scenes, and measures how many it gets right."""
    training = {**(PAPER if paper else CPU), **shared.given(batch=batch, steps=steps, lr=lr, channels=channels)}
    options = shared.Settings(
        scenes=scenes, paper=paper, dim=dim, iters=iters, evaluate_every=evaluate_every, seed=seed, **training
    )
    options, checkpoint = shared.resumed(context, options, steps, out) if resume else (options, None)
    run = shared.run_in(out, minutes, device, workers)

    torch.manual_seed(options.seed)
    network, kind = SetPredictor(options, backend).to(run.device), KINDS[options.scenes]
    test = Scenes(options.scenes, shared.TEST_SEED + options.seed, TEST_SCENES)

    def shown(point: shared.Point) -> str:
        return f"test {point['test_loss']:.5f}  AP " + "  ".join(f"{name} {point[name]:.3f}" for name in THRESHOLDS)

    def loss(batch: shared.Batch, generator: torch.Generator) -> Tensor:
        return set_loss(network(batch["image"], generator), targets(batch, kind))

    curve = shared.train(network, options, run, checkpoint, loss, lambda: evaluate(network, test, run.device), shown)
    plot(curve, options.scenes, out / "curve.png")
    last = curve[-1]
    table = Table(title=f"{options.scenes}, {last['step']} steps: average precision by distance, in sides of the image")
    for name in THRESHOLDS:
        table.add_column(name, justify="right")
    table.add_row(*(f"{100 * last[name]:.1f} %" for name in THRESHOLDS))
    run.console.print(table)
    shared.tell_files(run)


if __name__ == "__main__":
    typer.run(main)
