"""The networks of ram_mnist.py, each of which gives the logits of images (B, 1, H, W) uint8; their loss and error."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from ram_mnist_images import CLASSES, Task
from torch import Tensor, nn

from recattn_kernels import GlimpseNetwork, GlimpseSensor, RecurrentAttention, RNNCell

EVALUATION_BATCH = 250
# The gradient of a location's log density is 1/std times its noise: at the rate of the others, plain SGD soon has the
# eye off the image. To Adam it makes no difference.
POLICY, POLICY_SHARE = ("locator", "baseline"), 0.01


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
