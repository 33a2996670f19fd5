"""glimpse in Triton: launches, and what is compiled ahead of time. Kernels: triton_forward_kernels.py and
triton_backward_kernels.py."""

from __future__ import annotations

import itertools
import struct
from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from recattn_kernels.ops.glimpse.contract import BLOCK, COMPATIBLE, MODES, PADDINGS, empty
from recattn_kernels.ops.glimpse.triton_backward_kernels import image_kernel, point_kernel
from recattn_kernels.ops.glimpse.triton_forward_kernels import forward_kernel, whole_forward_kernel
from recattn_kernels.triton_launch import Launch, SameCompilation, Variant, Variants, guard

TAPS = 4  # pixels of a row that each cell of a block reads at once
PIXELS, CELLS = 32, 16  # sides of the tile of an image's gradient, and of the tiles of cells that it gathers


def bits(value: float) -> int:
    found: int = struct.unpack("<q", struct.pack("<d", value))[0]
    return found


def common(image: Tensor, loc: Tensor, zoom: Tensor | None, options: Sequence[Any]) -> dict[str, Any]:
    height, width, scales, factor, base, mode, padding, _ = options
    B, C, H, W = image.shape
    strides = (0, 0) if zoom is None else zoom.stride()
    return {
        "loc_ptr": loc, "zoom_ptr": zoom, "B": B, "C": C, "H": H, "W": W, "G": loc.shape[1], "S": scales, "M": height,
        "N": width, "k": bits(base), "f": bits(factor), "loc_stride_b": loc.stride(0), "loc_stride_g": loc.stride(1),
        "loc_stride_x": loc.stride(2), "zoom_stride_b": strides[0], "zoom_stride_g": strides[1], "MODE": mode,
        "PADDING": padding,
    }  # fmt: skip


def read(image: Tensor) -> dict[str, Any]:
    return {"image_ptr": image, **{f"image_stride_{d}": n for d, n in zip("bcyx", image.stride(), strict=True)}}


def forward_launch(image: Tensor, loc: Tensor, zoom: Tensor | None, options: Sequence[Any], out: Tensor) -> Launch:
    kernel = whole_forward_kernel if options[5] in COMPATIBLE else forward_kernel
    args = common(image, loc, zoom, options) | read(image) | {"out_ptr": out, "BLOCK": BLOCK, "TAPS": TAPS}
    B, G, S, C, M, N = out.shape
    return Launch(kernel, (B * G * S, triton.cdiv(M * N, BLOCK), C), args, 4, 168, fp_fusion=False)


def image_launch(
    grad: Tensor, image: Tensor, loc: Tensor, zoom: Tensor | None, options: Sequence[Any], to: Tensor
) -> Launch:
    args = common(image, loc, zoom, options) | {
        "grad_out_ptr": grad, "grad_image_ptr": to, "SMOOTH": options[5] not in COMPATIBLE, "PIXELS": PIXELS,
        "CELLS": CELLS,
    }  # fmt: skip
    B, C, H, W = image.shape
    grid = (B * triton.cdiv(H, PIXELS) * triton.cdiv(W, PIXELS), C)
    return Launch(image_kernel, grid, args, 4, 255, fp_fusion=False)


def point_launch(
    grad: Tensor, image: Tensor, loc: Tensor, zoom: Tensor | None, options: Sequence[Any], parts: Tensor, wanted: bool
) -> Launch:
    args = common(image, loc, zoom, options) | read(image) | {
        "grad_out_ptr": grad, "parts_ptr": parts, "ZOOM": wanted, "BLOCK": BLOCK, "TAPS": TAPS,
    }  # fmt: skip
    return Launch(point_kernel, (parts.shape[0] * parts.shape[1] * parts.shape[2],), args, 4, 255, fp_fusion=False)


def forward(image: Tensor, loc: Tensor, zoom: Tensor | None, *options: Any) -> tuple[Tensor]:
    results = empty(image, loc, zoom, *options)
    if results[0].numel() > 0:
        with guard(image):
            forward_launch(image, loc, zoom, options, results[0]).run()
    return results


def backward(
    grads: Sequence[Tensor | None], saved: Sequence[Tensor], inputs: Sequence[Any], options: Any, needs: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    image, loc, zoom = inputs
    (grad,) = grads
    assert grad is not None
    grad = grad.contiguous()
    grad_image = grad_loc = grad_zoom = None
    with guard(image):
        if needs[0]:
            grad_image = image.new_empty(image.shape)
            if grad.numel() == 0:
                grad_image.zero_()
            elif image.numel() > 0:
                image_launch(grad, image, loc, zoom, options, grad_image).run()
        if needs[1] or needs[2]:
            parts = loc.new_empty((*loc.shape[:2], options[2], 3), dtype=torch.float32)
            if grad.numel() == 0:
                parts.zero_()
            else:
                point_launch(grad, image, loc, zoom, options, parts, needs[2]).run()
            total = parts.sum(2)
            grad_loc = total[..., :2].contiguous() if needs[1] else None
            grad_zoom = total[..., 2].contiguous() if needs[2] else None
    return grad_image, grad_loc, grad_zoom


# Ahead of time: see tests/test_aot.py


def example(
    dtype: torch.dtype, mode: str, padding: str, zoomed: bool, B: int = 3, G: int = 2, N: int = 40
) -> tuple[Launch, ...]:
    """What a call on the meta device launches."""

    def tensor(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    image, loc, zoom = tensor(B, 3, N, N, dtype=dtype), tensor(B, G, 2), tensor(B, G) if zoomed else None
    options = (5, 7, 2, 2.0, 1.0, mode, padding, torch.bfloat16 if dtype == torch.uint8 else dtype)
    (out,) = empty(image, loc, zoom, *options)
    launches = [forward_launch(image, loc, zoom, options, out)]
    if dtype != torch.uint8:
        launches.append(image_launch(out, image, loc, zoom, options, tensor(*image.shape, dtype=dtype)))
    if mode not in COMPATIBLE:
        launches.append(point_launch(out, image, loc, zoom, options, tensor(B, G, 2, 3), zoomed))
    return tuple(launches)


def aot_variants(lanes: int, full: bool) -> Variants:
    """Launches that cover the kernels; in full, every mode, padding and type."""
    every = itertools.product(
        (torch.float32, torch.bfloat16, torch.float16, torch.uint8), MODES, PADDINGS, (False, True)
    )
    some = (
        (torch.float32, "area", "zeros", False),
        (torch.uint8, "area", "reflect", True),
        (torch.bfloat16, "bilinear", "border", True),
        (torch.float16, "dpnn", "zeros", False),
    )
    for dtype, mode, padding, zoomed in every if full else some:
        if mode in COMPATIBLE and (padding != "zeros" or zoomed):
            continue
        for launch in example(dtype, mode, padding, zoomed):
            part = launch.kernel.fn.__name__.removesuffix("_kernel")
            words = (part, str(dtype).removeprefix("torch."), mode, padding, "zoom" * zoomed)
            yield Variant("-".join(filter(None, words)), launch, shared=2**15)


def aot_same(lanes: int) -> SameCompilation:
    """Launches that differ in sizes alone, and in the strides that follow from them."""
    yield [example(torch.float32, "area", "zeros", True, *sizes) for sizes in ((1, 1, 1), (16, 1, 32), (7, 5, 33))]
