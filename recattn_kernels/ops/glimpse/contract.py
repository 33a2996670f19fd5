"""The backends of glimpse, and its results as empty tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from recattn_kernels import backends, checks
from recattn_kernels.ops.operator import Call

SMOOTH = ("area", "bilinear")
COMPATIBLE = ("kevinzakka", "tf", "dpnn")
MODES = (*SMOOTH, *COMPATIBLE)
PADDINGS = ("zeros", "border", "reflect")
COORDS = ("xy", "yx")
IMAGE_DTYPES = (*checks.FLOATING, torch.uint8)
# Of loc beside an image, where float32 is not the only one.
LOC_DTYPES = {torch.float64: (torch.float64,), torch.uint8: (torch.float32, torch.float64)}
BLOCK = 128  # cells of a program of Triton's
MOST_PROGRAMS = 65535  # in each dimension of CUDA's grids but the first


def empty(
    image: Tensor, loc: Tensor, zoom: Tensor | None, height: int, width: int, scales: int, factor: float, base: float,
    mode: str, padding: str, dtype: torch.dtype,
) -> tuple[Tensor]:  # fmt: skip
    B, C = image.shape[:2]
    return (image.new_empty((B, loc.shape[1], scales, C, height, width), dtype=dtype),)


def _triton_refusal(call: Call) -> str | None:
    if call.inputs[1] is not None and call.inputs[1].dtype == torch.float64:
        return "it computes in float32, loc is float64"
    channels, (height, width) = call.x.shape[1], call.options[:2]
    if channels > MOST_PROGRAMS:
        return f"image's channels must be at most {MOST_PROGRAMS}, got {channels}"
    if height * width > MOST_PROGRAMS * BLOCK:
        return f"size must be of at most {MOST_PROGRAMS * BLOCK} cells, got {height * width}"
    return None


BACKENDS: backends.Table = {"cpp": backends.no_refusal, "triton": _triton_refusal}
