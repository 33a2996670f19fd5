"""Beside glimpse: the ways that people take glimpses in plain PyTorch. They round the centres to whole pixels, which
grid_sample does not, so that none of them computes just what the op does."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recattn_kernels.bench.peers.case import Case, Impl, compiled


def peers(case: Case, definition: Callable[..., Any]) -> list[Impl]:
    impls = []
    # The reference multiplies whole images by dense weights: where those are large, compiled or not, it takes seconds.
    small = case.workload.sizes["G"] == 1
    if case.compile and small and not case.sweep:
        impls.append(case.impl("compile", compiled(definition), definition=definition))
    impls += [case.impl("gather", gather), case.impl("grid_sample", grid_sample)]
    if small:
        impls.append(case.impl("slicing", slicing))
    if case.sweep:
        image = case.args[0]
        convolution = nn.Conv2d(image.shape[1], 16, 3, padding=1, device=case.device, dtype=case.dtype)
        impls.append(Impl("conv3x3", functools.partial(convolution, image), (image, *convolution.parameters())))
    return impls


def gather(image: Tensor, loc: Tensor, size: int, scales: int, dtype: torch.dtype) -> Tensor:
    """The image padded, one gather of every widest window, and its centres pooled."""
    B, C, N, _ = image.shape
    G, wide = loc.shape[1], size * 2 ** (scales - 1)
    padded = F.pad(image, (wide // 2,) * 4)
    side = N + wide // 2 * 2
    corner = ((loc + 1) * (N / 2)).long()  # (B, G, 2)
    along = torch.arange(wide, device=image.device)
    y, x = corner[..., 1, None] + along, corner[..., 0, None] + along
    at = (y[..., :, None] * side + x[..., None, :]).view(B, 1, -1).expand(B, C, -1)
    windows = padded.view(B, C, side * side).gather(2, at).view(B, C * G, wide, wide).to(dtype)
    return torch.stack([_pooled(windows, size, s) for s in range(scales)], 1)


def _pooled(windows: Tensor, size: int, s: int) -> Tensor:
    margin = (windows.shape[-1] - size * 2**s) // 2
    centre = windows[..., margin : margin + size * 2**s, margin : margin + size * 2**s]
    return F.avg_pool2d(centre, 2**s) if s > 0 else centre


def slicing(image: Tensor, loc: Tensor, size: int, scales: int, dtype: torch.dtype) -> Tensor:
    """A slice of the padded image for each sample and scale."""
    wide, N = size * 2 ** (scales - 1), image.shape[-1]
    padded = F.pad(image, (wide // 2,) * 4)
    corner = ((loc[:, 0] + 1) * (N / 2)).long()
    glimpses = []
    for s in range(scales):
        n, margin = size * 2**s, (wide - size * 2**s) // 2
        parts = []
        for b in range(image.shape[0]):
            x, y = int(corner[b, 0]) + margin, int(corner[b, 1]) + margin
            parts.append(padded[b, :, y : y + n, x : x + n])
        windows = torch.stack(parts).to(dtype)
        glimpses.append(F.avg_pool2d(windows, 2**s) if s > 0 else windows)
    return torch.stack(glimpses, 1)


def grid_sample(image: Tensor, loc: Tensor, size: int, scales: int, dtype: torch.dtype) -> Tensor:
    """A bilinear tap for each pixel of the windows, and those of a cell pooled."""
    B, C, N, _ = image.shape
    G, image, loc = loc.shape[1], image.to(dtype), loc.to(dtype)
    glimpses = []
    for s in range(scales):
        n = size * 2**s
        along = (torch.arange(n, device=image.device, dtype=dtype) - (n - 1) / 2) * (2 / N)
        x = (loc[..., 0, None] + along)[..., None, :].expand(B, G, n, n)
        y = (loc[..., 1, None] + along)[..., :, None].expand(B, G, n, n)
        grid = torch.stack([x, y], -1).view(B, G * n, n, 2)
        taps = F.grid_sample(image, grid, align_corners=False).view(B, C * G, n, n)
        glimpses.append(F.avg_pool2d(taps, 2**s) if s > 0 else taps)
    return torch.stack(glimpses, 1)
