"""Scenes of a few objects, drawn with their exact masks and factors: what the slot attention examples look at.

shapes: 32 x 32, one to four squares, discs, crosses and rings of 9 x 9 pixels, in one of 6 colours, on black, apart.
tetrominoes: 35 x 35, three pieces of 4 squares of 5 x 5 pixels, in one of 19 shapes and 6 colours, on black, apart.
sprites: 64 x 64, two to five squares, ellipses and hearts of any position, turn and size (their half width is 7 to 12
pixels), in one of 8 colours, on a grey; the later hides the earlier, of which at least a third is seen.

The last two are of the kinds of the data sets Tetrominoes and Multi-dSprites (Kabra et al., 2019), but not those data
sets: results are not to be compared with tables that are on them. Scene i of a seed is always the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

Array = NDArray[Any]

BLOCK = 5
TETROMINOES = {
    "I": ["1111"], "O": ["11", "11"], "T": ["111", "010"], "S": ["011", "110"], "Z": ["110", "011"],
    "J": ["100", "111"], "L": ["001", "111"],
}  # fmt: skip
SHAPES = ("square", "disc", "cross", "ring")
SHAPE_SIDE = 9
SPRITES = ("square", "ellipse", "heart")
COLOURS = np.array(
    [[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0], [1, 0, 1], [0, 1, 1], [1, 1, 1], [1, 0.5, 0]], np.float32
)


@dataclass(frozen=True)
class Kind:
    """size: pixels of a side. objects: the most in a scene. shapes, colours: how many kinds there are."""

    size: int
    objects: int
    shapes: int
    colours: int


KINDS = {
    "shapes": Kind(32, 4, len(SHAPES), 6),
    "tetrominoes": Kind(35, 3, len(TETROMINOES), 6),
    "sprites": Kind(64, 5, len(SPRITES), len(COLOURS)),
}


def shape_masks() -> list[Array]:
    v, u = np.abs(np.mgrid[:SHAPE_SIDE, :SHAPE_SIDE] - SHAPE_SIDE // 2)
    far = np.maximum(u, v)
    return [far >= 0, u**2 + v**2 <= (SHAPE_SIDE / 2) ** 2, np.minimum(u, v) <= 1, far >= SHAPE_SIDE // 2 - 1]


MASKS = shape_masks()


def turned_pieces() -> list[tuple[int, Array]]:
    """Every tetromino in every turn that looks different: its kind, and its mask in pixels."""
    pieces: list[tuple[int, Array]] = []
    for kind, rows in enumerate(TETROMINOES.values()):
        cells = np.array([[cell == "1" for cell in row] for row in rows])
        turns = {(turned.shape, turned.tobytes()): turned for turned in (np.rot90(cells, k) for k in range(4))}
        pieces += [(kind, np.kron(turned, np.ones((BLOCK, BLOCK), bool))) for turned in turns.values()]
    return pieces


PIECES = turned_pieces()


def shapes(random: np.random.Generator) -> dict[str, Array]:
    kind = KINDS["shapes"]
    count = int(random.integers(1, kind.objects + 1))
    while True:
        corners = random.integers(kind.size - SHAPE_SIDE + 1, size=(count, 2))
        distances = np.abs(corners[:, None] - corners).max(-1)[np.triu_indices(count, 1)]
        if (distances > SHAPE_SIDE).all():
            break
    names = random.integers(kind.shapes, size=count)
    mask = np.zeros((kind.size, kind.size), np.int64)
    for i, (y, x) in enumerate(corners):
        mask[y : y + SHAPE_SIDE, x : x + SHAPE_SIDE][MASKS[names[i]]] = i + 1
    return painted(mask, names, random.integers(kind.colours, size=count), np.zeros(3, np.float32))


def tetrominoes(random: np.random.Generator) -> dict[str, Array]:
    kind = KINDS["tetrominoes"]
    while True:
        mask = np.zeros((kind.size, kind.size), np.int64)
        shapes: list[int] = []
        for _ in range(50):  # two that leave no room for a third are given up
            shape, piece = PIECES[random.integers(len(PIECES))]
            y, x = (random.integers(kind.size - side + 1) for side in piece.shape)
            area = mask[y : y + piece.shape[0], x : x + piece.shape[1]]
            if not area[piece].any():
                shapes.append(shape)
                area[piece] = len(shapes)
            if len(shapes) == kind.objects:
                colours = random.integers(kind.colours, size=kind.objects)
                return painted(mask, np.array(shapes), colours, np.zeros(3, np.float32))


def sprites(random: np.random.Generator) -> dict[str, Array]:
    kind = KINDS["sprites"]
    y, x = np.mgrid[: kind.size, : kind.size].astype(np.float32)
    count = int(random.integers(2, kind.objects + 1))
    while True:
        mask = np.zeros((kind.size, kind.size), np.int64)
        shapes, whole = random.integers(kind.shapes, size=count), []
        for i, shape in enumerate(shapes):
            half, turn = random.uniform(7, 12), random.uniform(0, 2 * np.pi)
            cy, cx = random.uniform(half, kind.size - half, size=2)
            u = ((x - cx) * np.cos(turn) + (y - cy) * np.sin(turn)) / half
            v = ((y - cy) * np.cos(turn) - (x - cx) * np.sin(turn)) / half
            if SPRITES[shape] == "square":
                inside = np.maximum(np.abs(u), np.abs(v)) < 0.8
            elif SPRITES[shape] == "ellipse":
                inside = u**2 + (v / 0.6) ** 2 < 1
            else:
                inside = (1.3 * u) ** 2 + (1.2 * v - np.sqrt(np.abs(1.3 * u))) ** 2 < 1
            mask[inside] = i + 1
            whole.append(inside.sum())
        if all((mask == i + 1).sum() >= area / 3 for i, area in enumerate(whole)):
            grey = np.full(3, random.uniform(0.1, 0.6), np.float32)
            return painted(mask, shapes, random.integers(kind.colours, size=count), grey)


def painted(mask: Array, shapes: Array, colours: Array, background: Array) -> dict[str, Array]:
    image = np.concatenate((background[None], COLOURS[colours]))[mask]
    centres = [np.argwhere(mask == i + 1).mean(0) / (len(mask) - 1) for i in range(len(shapes))]
    return {"image": image, "mask": mask, "shape": shapes, "colour": colours, "centre": np.array(centres, np.float32)}


DRAW = {"shapes": shapes, "tetrominoes": tetrominoes, "sprites": sprites}


class Scenes(Dataset[dict[str, Tensor]]):
    """Scenes first to first + count of a seed. Each is

    image (3, H, W), in [0, 1]; mask (H, W) int64: the object that is seen at a pixel, 1 to n, or 0; present (M,) bool:
    which of at most M objects there are; shape (M,) and colour (M,) int64; centre (M, 2): y and x of what is seen of
    it, in [0, 1].
    """

    def __init__(self, name: str, seed: int, count: int, first: int = 0) -> None:
        self.name, self.seed, self.count, self.first = name, seed, count, first

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not 0 <= index < self.count:
            raise IndexError(index)
        scene = DRAW[self.name](np.random.default_rng((self.seed, self.first + index)))
        n, most = len(scene["shape"]), KINDS[self.name].objects
        item = {name: torch.from_numpy(array) for name, array in scene.items()}
        for name in ("shape", "colour", "centre"):
            item[name] = torch.cat((item[name], item[name].new_zeros(most - n, *item[name].shape[1:])))
        image = item["image"].permute(2, 0, 1).contiguous()
        return {**item, "image": image, "present": torch.arange(most) < n}

    def batches(self, size: int, workers: int = 0) -> DataLoader[dict[str, Tensor]]:
        return DataLoader(self, size, num_workers=workers, persistent_workers=workers > 0)
