"""Scenes of one or two things, drawn with numpy, and their captions: what captioning.py describes.

A thing has a shape, a colour, a size and a place. Of these come the captions, in two templates, and for two things from
either's side. Scenes of a seed are always the same.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

SIZE = 48  # pixels to a side
SHAPES = ("circle", "square", "triangle", "cross")
COLOURS = {
    "red": (0.9, 0.15, 0.15), "green": (0.15, 0.75, 0.2), "blue": (0.2, 0.3, 0.95), "yellow": (0.95, 0.9, 0.2),
    "purple": (0.6, 0.2, 0.75), "white": (0.95, 0.95, 0.95),
}  # fmt: skip
SIZES = {"small": 5.0, "large": 9.0}  # half of the width, in pixels
HELD_OUT = {
    ("small", "red", "triangle"), ("large", "blue", "triangle"), ("small", "green", "circle"),
    ("large", "white", "circle"), ("small", "yellow", "cross"), ("large", "red", "cross"),
    ("small", "blue", "square"), ("large", "purple", "square"),
}  # fmt: skip
RELATIONS = {"to the left of": "to the right of", "above": "below"}
PLACES = (("in the top left corner", "at the top", "in the top right corner"),
          ("on the left", "in the middle", "on the right"),
          ("in the bottom left corner", "at the bottom", "in the bottom right corner"))  # fmt: skip
PAD, START, END = "<pad>", "<start>", "<end>"
PLACED = " ".join((*itertools.chain(*PLACES), *RELATIONS, *RELATIONS.values()))
WORDS = (PAD, START, END, *sorted({*SHAPES, *COLOURS, *SIZES, *PLACED.split(), "a", "is", "there"}))
INDEX = {word: i for i, word in enumerate(WORDS)}
LONGEST = 20  # words of a caption, its end included


class Thing(NamedTuple):
    size: str
    colour: str
    shape: str
    x: float
    y: float

    @property
    def held_out(self) -> bool:
        return self[:3] in HELD_OUT

    @property
    def words(self) -> str:
        return f"a {self.size} {self.colour} {self.shape}"


class Scene(NamedTuple):
    image: np.ndarray[Any, Any]  # (3, SIZE, SIZE), float32
    captions: tuple[str, ...]  # all that are right


def draw_thing(rng: np.random.Generator) -> Thing:
    size, colour, shape = (str(rng.choice(list(names))) for names in (SIZES, COLOURS, SHAPES))
    x, y = rng.uniform(SIZES[size] + 1, SIZE - 1 - SIZES[size], 2)
    return Thing(size, colour, shape, x, y)


def relation(a: Thing, b: Thing) -> str | None:
    """Where a is, seen from b. None where they are too close to each other, or to a diagonal, to tell."""
    dx, dy = a.x - b.x, a.y - b.y
    if max(abs(dx), abs(dy)) < SIZES[a.size] + SIZES[b.size] + 1 or abs(abs(dx) - abs(dy)) < 6:
        return None
    first, second = next(iter(RELATIONS.items())) if abs(dx) > abs(dy) else list(RELATIONS.items())[1]
    return first if (dx if abs(dx) > abs(dy) else dy) < 0 else second


def captions(things: Sequence[Thing]) -> tuple[str, ...]:
    if len(things) == 1:
        (thing,) = things
        ends = [(thing.words, PLACES[int(3 * thing.y / SIZE)][int(3 * thing.x / SIZE)])]
    else:
        ends = [(a.words, f"{relation(a, b)} {b.words}") for a, b in itertools.permutations(things)]
    return tuple(form.format(*end) for end in ends for form in ("{0} is {1}", "there is {0} {1}"))


def clear(things: Sequence[Thing]) -> bool:
    """Whether the words for where things are leave no doubt."""
    if len(things) == 2:
        return relation(*things) is not None
    return all(abs(v - edge) > 2 for v in things[0][3:] for edge in (SIZE / 3, 2 * SIZE / 3))


def render(things: Sequence[Thing], rng: np.random.Generator) -> np.ndarray[Any, Any]:
    rows, columns = np.mgrid[:SIZE, :SIZE] + 0.5
    image = np.full((3, SIZE, SIZE), 0.1) + rng.normal(0, 0.02, (3, SIZE, SIZE))
    for thing in things:
        x, y, r = columns - thing.x, rows - thing.y, SIZES[thing.size]
        inside = {
            "circle": x**2 + y**2 < r**2,
            "square": np.maximum(abs(x), abs(y)) < 0.85 * r,
            "triangle": (y < 0.8 * r) & (2 * abs(x) < y + r),
            "cross": (np.minimum(abs(x), abs(y)) < r / 3) & (np.maximum(abs(x), abs(y)) < r),
        }[thing.shape]
        image[:, inside] = np.array(COLOURS[thing.colour])[:, None] * rng.uniform(0.85, 1.0)
    return image.astype(np.float32)


def draw_scene(rng: np.random.Generator, held_out: bool) -> Scene:
    """held_out: with a thing that is, else without any."""
    count = 1 if rng.random() < 0.25 else 2
    while True:
        things = [draw_thing(rng) for _ in range(count)]
        if any(thing.held_out for thing in things) == held_out and clear(things):
            return Scene(render(things, rng), captions(things))


def draw_scenes(seed: Sequence[int], count: int, held_out: bool) -> list[Scene]:
    rng = np.random.default_rng(list(seed))
    return [draw_scene(rng, held_out) for _ in range(count)]


def images(scenes: Sequence[Scene]) -> Tensor:
    return torch.from_numpy(np.stack([scene.image for scene in scenes]))


def encode(texts: Sequence[str]) -> Tensor:
    """Words (B, longest + 2) from <start> to <end>, padded."""
    rows = [torch.tensor([INDEX[word] for word in (START, *text.split(), END)]) for text in texts]
    return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=INDEX[PAD])


def decode(words: Sequence[int]) -> str:
    texts = itertools.takewhile(lambda word: word != END, (WORDS[i] for i in words))
    return " ".join(text for text in texts if text != START)
