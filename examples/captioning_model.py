"""The captioner of captioning.py: an encoder, a decoder that attends, its loss, and the search for a caption."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from captioning_scenes import END, INDEX, LONGEST, PAD, START, WORDS
from torch import Tensor, nn

from recattn_kernels import AttentionLSTMCell

GRID = 12  # feature vectors to a side


@dataclass(frozen=True)
class Options:
    """What a training depends on: a checkpoint holds it."""

    attention: str
    features: int
    hidden: int
    width: int
    batch: int
    steps: int
    minutes: float
    lr: float
    penalty: float
    entropy: float
    evaluate_every: int
    seed: int
    backend: str | None


def convolution(inputs: int, outputs: int, size: int, stride: int) -> nn.Module:
    layer = nn.Conv2d(inputs, outputs, size, stride=stride, padding=size // 2, bias=False)
    return nn.Sequential(layer, nn.BatchNorm2d(outputs), nn.ReLU())


class Encoder(nn.Module):
    """Pictures (B, 3, SIZE, SIZE) to features (B, GRID * GRID, D), each with its place added."""

    def __init__(self, features: int) -> None:
        super().__init__()
        half = features // 2
        self.layers = nn.Sequential(
            convolution(3, half, 5, 2), convolution(half, features, 3, 2), convolution(features, features, 3, 1),
            nn.Conv2d(features, features, 3, padding=1),
        )  # fmt: skip
        self.place = nn.Linear(4, features)
        line = torch.linspace(-1, 1, GRID)
        y, x = torch.meshgrid(line, line, indexing="ij")
        self.register_buffer("places", torch.stack((x, y, -x, -y), -1).flatten(0, 1), persistent=False)

    def forward(self, image: Tensor) -> Tensor:
        features = self.layers(image).flatten(2).transpose(1, 2)
        return F.relu(features + self.place(self.places))


class State(NamedTuple):
    h: Tensor
    c: Tensor


class Look(NamedTuple):
    """What a step of the decoder saw: its logits come of h and context."""

    state: State
    context: Tensor
    weights: Tensor
    log_prob: Tensor | None  # of the position that was drawn


class Captioner(nn.Module):
    def __init__(self, options: Options) -> None:
        super().__init__()
        D, H = options.features, options.hidden
        self.hard = options.attention == "hard"
        self.encoder = Encoder(D)
        self.embedding = nn.Embedding(len(WORDS), H, padding_idx=INDEX[PAD])
        self.first = nn.Linear(D, 2 * H)
        self.cell = AttentionLSTMCell(H, H, D, options.width, backend=options.backend)
        self.from_h, self.from_context = nn.Linear(H, H), nn.Linear(D, H, bias=False)
        self.readout = nn.Linear(H, len(WORDS))

    def start(self, features: Tensor) -> State:
        return State(*torch.tanh(self.first(features.mean(1))).chunk(2, 1))

    def look(
        self, words: Tensor, state: State, features: Tensor, projected: Tensor, soft: Tensor | None = None
    ) -> Look:
        """One step after words (B,). soft (B,): of a hard decoder in training, the rows that take the expectation."""
        context, weights = self.cell.attend(state.h, features, projected=projected)
        log_prob = None
        if self.hard:
            at = (
                weights.argmax(1) if soft is None else torch.multinomial(weights.detach().nan_to_num(1.0), 1).squeeze(1)
            )
            drawn = features[torch.arange(len(at)), at]
            context = drawn if soft is None else torch.where(soft[:, None], context, drawn)
            log_prob = weights.gather(1, at[:, None]).squeeze(1).clamp_min(1e-30).log()
        h, c, context = self.cell.step(self.embedding(words), context, state)
        return Look(State(h, c), context, weights, log_prob)

    def logits(self, words: Tensor, h: Tensor, context: Tensor) -> Tensor:
        return self.readout(torch.tanh(self.embedding(words) + self.from_h(h) + self.from_context(context)))

    def forward(self, image: Tensor, words: Tensor, soft: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Teacher forcing on words (B, T): logits (B, T, words), weights (B, T, N), log_probs (B, T) of a hard one."""
        features = self.encoder(image)
        projected, state, looks = self.cell.precompute(features), self.start(features), []
        for word in words.unbind(1):
            looks.append(self.look(word, state, features, projected, soft))
            state = looks[-1].state
        h, context, weights = (
            torch.stack(parts, 1) for parts in zip(*((s.state.h, s.context, s.weights) for s in looks), strict=True)
        )
        log_probs = torch.stack([s.log_prob for s in looks if s.log_prob is not None], 1) if self.hard else None
        return self.logits(words, h, context), weights, log_probs


@dataclass
class Baseline:
    """A moving average of what REINFORCE maximises: the log-likelihood of a word."""

    value: float = 0.0
    seen: int = 0

    def update(self, reward: float) -> None:
        self.seen += 1
        self.value += (reward - self.value) * max(0.02, 1 / self.seen)


def loss_of(
    network: Captioner, image: Tensor, words: Tensor, options: Options, baseline: Baseline
) -> tuple[Tensor, float]:
    """The loss of a batch, and the mean negative log-likelihood of a word."""
    inputs, targets = words[:, :-1], words[:, 1:]
    valid = (targets != INDEX[PAD]).float()
    soft = torch.rand(len(words)) < 0.5 if network.hard else None
    logits, weights, log_probs = network(image, inputs, soft)
    losses = F.cross_entropy(logits.transpose(1, 2), targets, reduction="none") * valid
    nll = losses.sum() / valid.sum()
    seen = (weights * valid.unsqueeze(2)).sum(1)  # (B, N): how much attention a position got in all
    loss = nll + options.penalty * (1 - seen).square().mean()
    if log_probs is not None and soft is not None:
        reward = -losses.detach().sum(1) / valid.sum(1)
        drawn = valid * ~soft[:, None]
        entropy = -(weights * weights.clamp_min(1e-30).log()).sum(2)
        surprise = (reward - baseline.value)[:, None] * log_probs * drawn
        loss = loss - (surprise.sum() + options.entropy * (entropy * valid).sum()) / valid.sum()
        baseline.update(reward.mean().item())
    return loss, nll.item()


class Caption(NamedTuple):
    words: list[int]
    weights: Tensor  # (words, N): where the decoder looked for each


@torch.no_grad()
def beam_search(network: Captioner, image: Tensor, width: int) -> list[Caption]:
    """The likeliest caption of each picture, by the mean log-likelihood of its words, among `width` at a time."""
    features = network.encoder(image)
    B, N, _ = features.shape
    projected = network.cell.precompute(features)
    # A row for each beam of each picture. Keys and values are computed once a picture.
    features, projected = (t.repeat_interleave(width, 0) for t in (features, projected))
    state = network.start(features)
    words = torch.full((B * width, 1), INDEX[START])
    weights = features.new_zeros(B * width, 0, N)
    scores = features.new_full((B, width), -math.inf)
    scores[:, 0] = 0.0  # the beams start equal: only one counts
    best: list[tuple[float, Caption]] = [(-math.inf, Caption([], features.new_zeros(0, N)))] * B
    rows = torch.arange(B)[:, None] * width
    for step in range(1, LONGEST + 1):
        look = network.look(words[:, -1], state, features, projected)
        likelihood = network.logits(words[:, -1], look.state.h, look.context).log_softmax(1)
        likelihood[:, [INDEX[PAD], INDEX[START]]] = -math.inf
        scores, chosen = (scores[:, :, None] + likelihood.view(B, width, -1)).flatten(1).topk(width)
        beam, word = (rows + chosen // len(WORDS)).flatten(), chosen.flatten() % len(WORDS)
        state = State(*(t[beam] for t in look.state))
        words = torch.cat((words[beam], word[:, None]), 1)
        weights = torch.cat((weights[beam], look.weights[beam, None]), 1)
        ended = (word == INDEX[END]).view(B, width) if step < LONGEST else torch.ones(B, width, dtype=torch.bool)
        for b, k in ended.nonzero().tolist():
            score, row = scores[b, k].item() / step, b * width + k
            if score > best[b][0]:
                best[b] = score, Caption(words[row, 1:].tolist(), weights[row])
        scores = scores.masked_fill(ended, -math.inf)
        # At best a beam's remaining words are certain, and as many as can be.
        if (scores.max(1).values / LONGEST < torch.tensor([score for score, _ in best])).all():
            break
    return [caption for _, caption in best]
