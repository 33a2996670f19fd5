"""The model of char_lm.py, how it is measured, and how it writes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from char_lm_text import encode
from torch import Tensor, nn

import recattn_kernels
from recattn_kernels import IndRNN

EMBEDDING = 64
EVALUATION_STEPS = 500
GATED = {"lstm": "LSTM", "gru": "GRU", "rnn": "RNN"}  # classes of recattn_kernels and of torch.nn
State = Tensor | tuple[Tensor, ...] | None


@dataclass(frozen=True)
class Options:
    """What a training depends on: a checkpoint holds it."""

    model: str
    text: str | None
    torch: bool
    hidden: int
    layers: int
    steps: int
    batch: int
    epochs: int
    minutes: float
    lr: float
    clip: float
    dropout: float
    zoneout: float
    layer_norm: bool
    evaluate_every: int | None
    seed: int
    backend: str | None


class CharacterModel(nn.Module):
    """Embedded characters, a recurrence, and a linear read-out at every step."""

    def __init__(self, options: Options, vocabulary: int, length: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, EMBEDDING)
        if options.model in GATED:
            extra: dict[str, Any] = {}
            if not options.torch:
                extra = {"zoneout": options.zoneout, "layer_norm": options.layer_norm, "backend": options.backend}
            kind = getattr(nn if options.torch else recattn_kernels, GATED[options.model])
            self.rnn = kind(EMBEDDING, options.hidden, options.layers, dropout=options.dropout, **extra)
        else:
            self.rnn = IndRNN(
                EMBEDDING, options.hidden, options.layers, norm="before", residual=options.model == "indrnn-21",
                dropout=options.dropout, recurrent_max=2 ** (1 / length), backend=options.backend,
            )  # fmt: skip
            for k in range(options.layers):
                nn.init.uniform_(getattr(self.rnn, f"weight_hh_l{k}"), 0.0, 0.5)
        self.readout = nn.Linear(options.hidden, vocabulary)

    def forward(self, ids: Tensor, state: State = None) -> tuple[Tensor, State]:
        """Characters ids (T, B): logits (T, B, vocabulary) of those that follow, and the state after the last."""
        output, state = self.rnn(self.embedding(ids), state)
        return self.readout(output), state

    def after_step(self) -> None:
        if isinstance(self.rnn, IndRNN):
            self.rnn.clamp_recurrent_()


def detach(state: State) -> State:
    return tuple(s.detach() for s in state) if isinstance(state, tuple) else None if state is None else state.detach()


def loss_in_bits(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten()) / math.log(2)


@torch.no_grad()
def bits_per_character(network: CharacterModel, ids: Tensor) -> float:
    """Over parallel streams (length, B), each read from a zero state to its end."""
    state: State = None
    total = 0.0
    for i in range(0, len(ids) - 1, EVALUATION_STEPS):
        chunk = ids[i : i + EVALUATION_STEPS + 1]
        logits, state = network(chunk[:-1], state)
        total += loss_in_bits(logits, chunk[1:]).item() * (len(chunk) - 1)
    return total / (len(ids) - 1)


def evaluate(network: CharacterModel, train: Tensor, validation: Tensor) -> float:
    network.eval()
    # BatchNorm's statistics anew, as the mean over some of the training text: running averages trail behind weights
    # that change fast, and more in every layer.
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm1d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain mean; training itself does not use the averages
        norm.train()
    if norms:
        bits_per_character(network, train[: len(validation)])
    network.eval()
    bits = bits_per_character(network, validation)
    network.train()
    return bits


@torch.no_grad()
def sample(network: CharacterModel, vocabulary: str, prime: str, characters: int, temperature: float, seed: int) -> str:
    """prime, and characters drawn from softmax(logits / temperature); at temperature 0 always the likeliest."""
    network.eval()
    generator = torch.Generator().manual_seed(seed)
    ids, state, text = encode(prime, vocabulary), None, prime
    for _ in range(characters):
        logits, state = network(ids.unsqueeze(1), state)
        last = logits[-1, 0]
        if temperature > 0:
            ids = torch.multinomial((last / temperature).softmax(-1), 1, generator=generator)
        else:
            ids = last.argmax(-1, keepdim=True)
        text += vocabulary[int(ids)]
    return text
