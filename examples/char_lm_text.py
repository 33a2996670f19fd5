"""The text of char_lm.py as indices, in parallel streams, and what counting its characters gives."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from pydoc_data import topics

import torch
import typer
from torch import Tensor


@dataclass(frozen=True)
class Text:
    """A text's characters, as indices (length,) into its vocabulary."""

    vocabulary: str
    train: Tensor
    validation: Tensor
    test: Tensor
    digest: str


def read_text(path: str | None) -> Text:
    try:
        text = "\n".join(topics.topics.values()) if path is None else Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise typer.BadParameter(f"--text: {path} cannot be read: {error}") from None
    vocabulary = "".join(sorted(set(text)))  # of the whole text: a model can name what it has not seen in training
    ids = encode(text, vocabulary)
    train, validation, test = ids.tensor_split((int(0.9 * len(ids)), int(0.95 * len(ids))))
    return Text(vocabulary, train, validation, test, hashlib.sha256(text.encode()).hexdigest())


def encode(text: str, vocabulary: str) -> Tensor:
    index = {character: i for i, character in enumerate(vocabulary)}
    return torch.tensor([index[character] for character in text])


def streams(ids: Tensor, batch: int) -> Tensor:
    """ids (length,) cut into parallel streams (length // batch, batch)."""
    length = len(ids) // batch
    if length < 2:
        raise typer.BadParameter(f"of the text, {len(ids)} characters are too few for {batch} streams")
    return ids[: length * batch].view(batch, length).t().contiguous()


def count_baselines(train: Tensor, ids: Tensor, vocabulary: int) -> dict[str, float]:
    """Bits a character of streams ids (length, B) under the counts of train (length,), each with one added."""
    ones = torch.ones(vocabulary, vocabulary, dtype=torch.float64)
    unigram = ones[0].index_put((train,), ones.new_ones(()), accumulate=True)
    bigram = ones.index_put((train[:-1], train[1:]), ones.new_ones(()), accumulate=True)
    probability = {
        "unigram": (unigram / unigram.sum())[ids[1:]],
        "bigram": (bigram / bigram.sum(1, keepdim=True))[ids[:-1], ids[1:]],
    }
    return {name: -p.log2().mean().item() for name, p in probability.items()}
