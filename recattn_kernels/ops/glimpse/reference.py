"""Multi-scale glimpses in plain PyTorch: the definition that every other backend is tested against.

Scale s has cells of k = zoom * scale_factor^s pixels around the centre c = (l + 1)/2 * N of an axis of N pixels, of
which pixel p covers [p, p + 1]. Both smooth modes are separable, out = Wy I Wx^T:

area:      w(j, p) = (R_p(e[j+1]) - R_p(e[j])) / k,  e[j] = c + (j - n/2) * k,  R_p(e) the part of pixel p before e
bilinear:  one tap at c + (j + 1/2 - n/2) * k

The compatible modes crop whole pixels, as kevinzakka/recurrent-visual-attention, TensorFlow's extract_glimpse and
Torch's dpnn do, in their own arithmetic.
"""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor

NAN = float("nan")
# Centres further out are moved here: no image is near, and positions still have their fractions.
FAR = 2.0**30


def windows(n: int, scales: int, factor: float) -> list[int]:
    """Sides of the compatible modes' windows in pixels: n, then each the whole part of `factor` times the last."""
    sides = [n]
    for _ in range(scales - 1):
        sides.append(int(factor * sides[-1]))
    return sides


def pixels_per_cell(base: float, scales: int, factor: float) -> list[float]:
    """base * factor^s for each scale s, in the order of roundings that every backend keeps."""
    steps = [base]
    for _ in range(scales - 1):
        steps.append(steps[-1] * factor)
    return steps


def glimpse(
    image: Tensor, loc: Tensor, zoom: Tensor | None, height: int, width: int, scales: int, factor: float, base: float,
    mode: str, padding: str, dtype: torch.dtype,
) -> tuple[Tensor]:  # fmt: skip
    """image (B,C,H,W), loc (B,G,2) as x, y, zoom (B,G), to be multiplied by base -> (B,G,S,C,height,width)."""
    valid = loc.isfinite().all(-1)  # (B, G)
    if zoom is not None:
        valid = valid & zoom.isfinite() & (zoom > 0)
        zoom = torch.where(valid, zoom, 1.0)
    loc = torch.where(valid.unsqueeze(-1), loc, 0.0)
    image = image.to(torch.float64 if torch.float64 in (image.dtype, loc.dtype) else torch.float32)
    if mode in ("area", "bilinear"):
        out = _smooth(image, loc, zoom, height, width, pixels_per_cell(base, scales, factor), mode, padding)
    else:
        sides = zip(windows(height, scales, factor), windows(width, scales, factor), strict=True)
        out = torch.stack([_crop(image, loc, height, width, tall, wide, mode) for tall, wide in sides], 2)
    return (torch.where(valid[:, :, None, None, None, None], out, NAN).to(dtype),)


def _smooth(
    image: Tensor,
    loc: Tensor,
    zoom: Tensor | None,
    height: int,
    width: int,
    steps: list[float],
    mode: str,
    padding: str,
) -> Tensor:
    H, W = image.shape[2:]
    # Positions in float64 whatever the type: a pixel's fraction is what is left of them.
    centre = (loc.double() + 1) / 2
    ones = torch.ones_like(centre[..., 0])
    scale = ones if zoom is None else zoom.double()
    k = torch.stack([scale * step for step in steps], -1)  # (B, G, S)
    wy = _weights(centre[..., 1] * H, k, height, H, mode, padding)  # (B, G, S, height, H)
    wx = _weights(centre[..., 0] * W, k, width, W, mode, padding)
    # A value that is not finite is seen by the cells that have some weight on it, and by no others.
    finite = image.isfinite()
    out = _product(torch.where(finite, image, 0.0), wy.to(image.dtype), wx.to(image.dtype))
    marks = torch.stack([image.isnan() | image.isposinf(), image.isnan() | image.isneginf()]).to(image.dtype)
    touched = [_product(mark, (wy != 0).to(image.dtype), (wx != 0).to(image.dtype)) > 0 for mark in marks]
    inf = float("inf")
    return out + torch.where(touched[0], inf, 0.0) - torch.where(touched[1], inf, 0.0)


def _product(image: Tensor, wy: Tensor, wx: Tensor) -> Tensor:
    available = torch.amp.is_autocast_available(image.device.type)
    with torch.autocast(image.device.type, enabled=False) if available else contextlib.nullcontext():
        columns = torch.einsum("bchw,bgsjw->bchgsj", image, wx)
        return torch.einsum("bgsih,bchgsj->bgscij", wy, columns)


def _weights(centre: Tensor, k: Tensor, n: int, N: int, mode: str, padding: str) -> Tensor:
    """centre (B, G) and k (B, G, S) in pixels -> the weights (B, G, S, n, N) of n cells on an axis of N pixels."""
    centre = torch.remainder(centre, 2 * N) if padding == "reflect" else centre.clamp(-FAR, FAR)
    centre, k = centre[..., None, None], k[..., None]
    p = torch.arange(N, dtype=centre.dtype, device=centre.device)
    if mode == "bilinear":
        at = centre + (_steps(n, centre) + 0.5 - n / 2) * k - 0.5
        first = at.floor()
        t = (at - first)[..., None]
        return (1 - t) * _is_at(first, p, padding) + t * _is_at(first + 1, p, padding)
    edge = centre + (_steps(n + 1, centre) - n / 2) * k
    pixel = edge.floor()
    before = _before(edge, p, padding)
    share = (before[..., 1:, :] - before[..., :-1, :]) / k[..., None]
    within = pixel[..., 1:] == pixel[..., :-1]  # one pixel has the whole cell: exactly, however small the cell
    return torch.where(within[..., None], _is_at(pixel[..., :-1], p, padding).to(share.dtype), share)


def _steps(n: int, like: Tensor) -> Tensor:
    return torch.arange(n, dtype=like.dtype, device=like.device)


def _is_at(pixel: Tensor, p: Tensor, padding: str) -> Tensor:
    """Whether pixel, which may lie outside the image, shows p: (..., N)."""
    N = p.shape[0]
    if padding == "border":
        pixel = pixel.clamp(0, N - 1)
    elif padding == "reflect":
        pixel = torch.remainder(pixel, 2 * N)
        pixel = torch.minimum(pixel, 2 * N - 1 - pixel)
    return pixel[..., None] == p


def _before(edge: Tensor, p: Tensor, padding: str) -> Tensor:
    """R_p(edge): how much of what shows p lies before edge, counted from 0; (..., N)."""
    N = p.shape[0]
    edge = edge[..., None]
    if padding == "reflect":
        turns = (edge / (2 * N)).floor()
        edge = edge - turns * (2 * N)
        return 2 * turns + _part(edge, p) + _part(edge, 2 * N - 1 - p)
    part = _part(edge, p)
    if padding == "border":
        part = part + torch.where((p == 0) & (edge < 0), edge, 0.0)
        part = part + torch.where((p == N - 1) & (edge >= N), edge - N, 0.0)
    return part


def _part(edge: Tensor, p: Tensor) -> Tensor:
    """0 up to p, edge - p within it, 1 from p + 1; the derivative at p is the one to the right, not half of it."""
    pixel = edge.floor()
    return torch.where(pixel > p, 1.0, torch.where(pixel == p, edge - pixel, 0.0))


def _crop(image: Tensor, loc: Tensor, height: int, width: int, tall: int, wide: int, mode: str) -> Tensor:
    """Windows of tall x wide pixels, zero outside the image, averaged to height x width: (B, G, C, height, width)."""
    B, C, H, W = image.shape
    G = loc.shape[1]
    if H * W == 0:
        return image.new_zeros((B, G, C, height, width))
    # The first takes the image's height for both axes.
    top = _start(loc[..., 1], H, H, height, tall, mode)
    left = _start(loc[..., 0], H if mode == "kevinzakka" else W, W, width, wide, mode)
    y = top[..., None] + torch.arange(tall, device=image.device)
    x = left[..., None] + torch.arange(wide, device=image.device)
    inside = ((y >= 0) & (y < H))[..., :, None] & ((x >= 0) & (x < W))[..., None, :]
    at = y.clamp(0, H - 1)[..., :, None] * W + x.clamp(0, W - 1)[..., None, :]  # (B, G, tall, wide)
    pixels = image.flatten(2)[:, None].expand(B, G, C, H * W)
    taken = pixels.gather(3, at.flatten(2)[:, :, None].expand(B, G, C, tall * wide))
    taken = torch.where(inside.flatten(2)[:, :, None], taken, 0.0)
    down, across = tall // height, wide // width
    blocks = taken.reshape(B, G, C, height, down, width, across)
    total = blocks[:, :, :, :, 0, :, 0]
    for i in range(1, down * across):
        total = total + blocks[:, :, :, :, i // across, :, i % across]
    return total / (down * across) if down * across > 1 else total


def _start(loc: Tensor, seen: int, N: int, n: int, window: int, mode: str) -> Tensor:
    """The first pixel of the window, on an axis of N pixels; the arithmetic is that of loc's type."""
    if mode == "kevinzakka":
        start = (0.5 * ((loc + 1) * seen)).floor() - window // 2
    elif mode == "tf":
        start = (loc * N / 2 + N / 2 - n / 2).trunc()
    else:
        half = (window - 1) // 2
        start = ((loc + 1) / 2 * (N + 2 * half - window)).clamp(0, N + 2 * half - window).floor() - half
    return start.clamp(-window, N).long()
