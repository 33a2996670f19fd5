"""Set prediction (Locatello et al., 2020): a network names the objects of a scene, their shapes, colours and places.

Slot attention turns an image's features into slots, and each slot says of one object whether there is one, where its
centre is, and its shape and colour. For the loss each object is paired with the slot that fits it, so that the sum of
all pairs is least (Hungarian matching). The result is measured by average precision, as in the paper: slots are taken
in the order of how sure they are that there is an object, and one is right if the nearest object of the same shape and
colour has its centre within some distance and is no other slot's yet. Beside it stands what the objects of another
scene would get, a guess that knows what scenes are like and does not look. The scenes are those of slot_scenes.py,
drawn anew for every step.

    python examples/slot_set_prediction.py                        one to four simple shapes, 32 x 32
    python examples/slot_set_prediction.py --scenes tetrominoes   three of 7 shapes in any turn, 35 x 35: harder
    python examples/slot_set_prediction.py --scenes sprites       two to five sprites that hide each other, 64 x 64
    python examples/slot_set_prediction.py --minutes 5            ends after 5 minutes
    python examples/slot_set_prediction.py --resume               goes on from the last checkpoint
    python examples/slot_set_prediction.py --paper                the paper's network, loss and training, for a GPU

It needs scipy, typer, rich, matplotlib and numpy: pip install "recattn_kernels[examples]".

The paper trains 150,000 steps of 512 scenes, on the Huber loss of all that a slot says, as numbers between 0 and 1. In
that loss the places, which vary little, hardly count beside the names, and are learnt last. To be done on a CPU within
minutes three things differ here: the loss, cross-entropy for the names and a distance that weighs as much for the
places; slots that start from learned vectors, each of which soon has a part of the image that it looks after (--init
gaussian: from noise, as in the paper; it takes several times as many steps); and the scenes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
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

Costs = Callable[[Tensor, Tensor, Kind], Tensor]
TEST_SCENES = 640
# How far from an object's centre a slot's may be, in sides of the image: the paper's 1, 0.5, 0.25 and 0.125 of 6.
THRESHOLDS = {"any": math.inf, "1/6": 1 / 6, "1/12": 1 / 12, "1/24": 1 / 24, "1/48": 1 / 48}
PLACE_WEIGHT = 5  # of a distance in sides of the image, beside cross-entropies


PAPER: dict[str, Any] = {
    "batch": 512, "steps": 150_000, "lr": 4e-4, "warm_up": 1_000, "halving": 50_000, "init": "gaussian",
}  # fmt: skip
CPU: dict[str, Any] = {
    "batch": 32, "steps": 6_000, "lr": 5e-4, "warm_up": 200, "halving": 1_500, "init": "learned",
}  # fmt: skip


class SetPredictor(nn.Module):
    """Image (B, 3, H, W) to what each slot says (B, K, 3 + shapes + colours), all in (0, 1) after a sigmoid."""

    def __init__(self, options: shared.Settings, backend: str | None = None) -> None:
        super().__init__()
        D, kind = options.dim, KINDS[options.scenes]
        self.encoder = shared.Encoder(options, strides=(1, 2, 2, 1) if options.paper else (2, 2, 1, 1))
        self.slot_attention = SlotAttention(kind.objects, D, iters=options.iters, init=options.init, backend=backend)
        self.head = nn.Sequential(nn.Linear(D, D), nn.ReLU(), nn.Linear(D, 3 + kind.shapes + kind.colours))

    def forward(self, image: Tensor, generator: torch.Generator | None = None) -> Tensor:
        said: Tensor = self.head(self.slot_attention(self.encoder(image), generator=generator))
        return said


def targets(batch: dict[str, Tensor], kind: Kind) -> Tensor:
    """What slots should say (B, K, 3 + shapes + colours): presence, centre, shape and colour; all 0 of no object."""
    shape, colour = F.one_hot(batch["shape"], kind.shapes), F.one_hot(batch["colour"], kind.colours)
    present = batch["present"].unsqueeze(-1)
    return torch.cat((present, batch["centre"], shape, colour), -1) * present


def parts(said: Tensor, kind: Kind) -> tuple[Tensor, ...]:
    """Presence (..., 1), centre (..., 2), shape (..., shapes) and colour (..., colours)."""
    return said.split((1, 2, kind.shapes, kind.colours), -1)


def huber_costs(said: Tensor, wanted: Tensor, kind: Kind) -> Tensor:
    """The paper's loss (B, K, K) of each slot with each object."""
    pairs = torch.broadcast_tensors(said.sigmoid().unsqueeze(2), wanted.unsqueeze(1))
    return F.huber_loss(*pairs, reduction="none").mean(-1)


def costs(said: Tensor, wanted: Tensor, kind: Kind) -> Tensor:
    """The cross-entropies of presence and names, and the distance of centres (B, K, K); of no object, presence only."""
    presence, centre, *names = parts(said.unsqueeze(2), kind)  # (B, K, 1, ...)
    present, true_centre, *true_names = parts(wanted.unsqueeze(1), kind)  # (B, 1, K, ...)
    cost = PLACE_WEIGHT * (centre.sigmoid() - true_centre).abs().sum(-1)
    for logits, true in zip(names, true_names, strict=True):
        cost = cost - (logits.log_softmax(-1) * true).sum(-1)
    presence, present = torch.broadcast_tensors(presence.squeeze(-1), present.squeeze(-1))
    return F.binary_cross_entropy_with_logits(presence, present, reduction="none") + cost * present


def matched(costs: Tensor) -> Tensor:
    """For each sample's slots (B, K), the object that is theirs in the pairing of the least sum of costs (B, K, K)."""
    theirs = np.stack([linear_sum_assignment(cost)[1] for cost in costs.detach().cpu().numpy()])
    return torch.from_numpy(theirs).to(costs.device)


def set_loss(costs: Tensor) -> Tensor:
    """The mean cost of slots and the objects that are theirs."""
    return costs.gather(2, matched(costs).unsqueeze(-1)).mean()


def average_precision(said: Tensor, wanted: Tensor, kind: Kind, threshold: float) -> float:
    """The area under precision over recall, as slots of all scenes are taken from the surest to the least sure.

    A slot is right if the nearest object that is of its shape and colour is nearer than threshold, and no surer slot
    took it. Precision at a recall is the best at that recall or a higher one. said, wanted: (B, K, ...).
    """
    said, wanted = said.double().cpu(), wanted.double().cpu()
    presence, centre, *names = parts(said, kind)
    present, true_centre, *true_names = parts(wanted, kind)
    fits = (present > 0).mT
    for name, true in zip(names, true_names, strict=True):
        fits = fits & (name.argmax(-1).unsqueeze(2) == true.argmax(-1).unsqueeze(1))  # (B, K, K)
    distance, nearest = torch.cdist(centre, true_centre).masked_fill(~fits, math.inf).min(2)

    K, right, taken = said.shape[1], [], set()
    for row in presence.flatten().argsort(descending=True, stable=True).tolist():
        scene, slot = divmod(row, K)
        found = (scene, int(nearest[scene, slot]))
        right.append(bool(distance[scene, slot] < threshold) and found not in taken)
        if right[-1]:
            taken.add(found)
    count = torch.tensor(right, dtype=torch.float64).cumsum(0)
    precision = count / torch.arange(1, len(right) + 1)
    best = precision.flip(0).cummax(0).values.flip(0)
    return float((best * torch.tensor(right)).sum() / present.sum())


def precisions(said: Tensor, wanted: Tensor, kind: Kind) -> shared.Point:
    return {name: average_precision(said, wanted, kind, limit) for name, limit in THRESHOLDS.items()}


def rights(said: Tensor, wanted: Tensor, theirs: Tensor, kind: Kind) -> shared.Point:
    """Of slots, how many are right on whether there is an object; of objects, how many have their shape and colour
    from their slots, and how far off their centres are, in sides of the image."""
    wanted = wanted.gather(1, theirs.unsqueeze(-1).expand_as(wanted))
    present = wanted[..., 0] > 0
    presence = ((said[..., 0] > 0.5) == present).double().mean()
    (_, centre, *names), (_, true_centre, *true_names) = parts(said[present], kind), parts(wanted[present], kind)
    shape, colour = (
        (name.argmax(-1) == true.argmax(-1)).double().mean() for name, true in zip(names, true_names, strict=True)
    )
    off = (centre - true_centre).norm(dim=-1).mean()
    return {"presence": float(presence), "shape": float(shape), "colour": float(colour), "off": float(off)}


def test_scenes(scenes: Scenes) -> tuple[Tensor, Tensor]:
    """Their images and what is to be said of them."""
    (batch,) = scenes.batches(len(scenes))
    return batch["image"], targets(batch, KINDS[scenes.name])


def evaluate(network: SetPredictor, images: Tensor, wanted: Tensor, kind: Kind, costs: Costs) -> shared.Point:
    device = next(network.parameters()).device
    generator = torch.Generator(device).manual_seed(0)
    said = torch.cat([network(part.to(device), generator).cpu() for part in images.split(shared.TEST_BATCH)])
    cost = costs(said, wanted, kind)
    said = said.sigmoid()
    return {
        "test_loss": float(set_loss(cost)),
        **precisions(said, wanted, kind), **rights(said, wanted, matched(cost), kind),
    }  # fmt: skip


def plot(curve: list[dict[str, float]], title: str, path: Path) -> None:
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for name in THRESHOLDS:
        label = "at any distance" if name == "any" else f"within {name} of the side"
        axes.plot([p["step"] for p in curve], [100 * p[name] for p in curve], marker=".", label=label)
    axes.set(title=title, xlabel="step", ylabel="average precision, %", ylim=(0, 100))
    axes.legend()
    figure.savefig(path, dpi=150)


def report(last: shared.Point, blind: shared.Point, options: shared.Settings, run: shared.Run) -> None:
    title = f"{options.scenes}, {last['step']} steps: average precision by distance, in sides of the image"
    table = Table("", title=title)
    for name in THRESHOLDS:
        table.add_column(name, justify="right")
    for title, point in (("what the slots say", last), ("the objects of another scene", blind)):
        table.add_row(title, *(f"{100 * point[name]:.1f} %" for name in THRESHOLDS))
    run.console.print(table)
    run.console.print(
        f"Of the objects, by the slots paired with them: shape right {100 * last['shape']:.1f} %, colour"
        f" {100 * last['colour']:.1f} %, centre off by {KINDS[options.scenes].size * last['off']:.2f} pixels. Of the"
        f" slots, right on whether there is an object: {100 * last['presence']:.1f} %.",
        soft_wrap=True,
    )


@command
def main(
    context: typer.Context,
    scenes: shared.ScenesArgument = "shapes",
    paper: shared.PaperArgument = False,
    init: shared.InitArgument = None,
    dim: shared.DimArgument = 64,
    channels: Annotated[int, typer.Option(min=1, help="Of the convolutions.")] = 64,
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
    chosen = shared.given(batch=batch, steps=steps, lr=lr, init=init and init.value)
    options = shared.Settings(
        scenes=scenes, paper=paper, dim=dim, channels=channels, iters=iters, evaluate_every=evaluate_every, seed=seed,
        **{**(PAPER if paper else CPU), **chosen},
    )  # fmt: skip
    options, checkpoint = shared.resumed(context, options, steps, out) if resume else (options, None)
    run = shared.run_in(out, minutes, device, workers)

    torch.manual_seed(options.seed)
    network, kind = SetPredictor(options, backend).to(run.device), KINDS[options.scenes]
    cost = huber_costs if options.paper else costs
    images, wanted = test_scenes(Scenes(options.scenes, shared.TEST_SEED + options.seed, TEST_SCENES))

    def shown(point: shared.Point) -> str:
        return f"test {point['test_loss']:.5f}  AP " + "  ".join(f"{name} {point[name]:.3f}" for name in THRESHOLDS)

    def loss(batch: shared.Batch, generator: torch.Generator) -> Tensor:
        return set_loss(cost(network(batch["image"], generator), targets(batch, kind), kind))

    curve = shared.train(
        network, options, run, checkpoint, loss, lambda: evaluate(network, images, wanted, kind, cost), shown
    )
    plot(curve, options.scenes, out / "curve.png")
    report(curve[-1], precisions(wanted.roll(1, 0), wanted, kind), options, run)
    shared.tell_files(run)


if __name__ == "__main__":
    typer.run(main)
