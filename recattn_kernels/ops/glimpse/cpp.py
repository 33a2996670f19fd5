"""glimpse on the CPU: hands pointers and strides to csrc/cpu/glimpse_forward.cpp and glimpse_backward.cpp."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from recattn_kernels.ops.glimpse.contract import MODES, PADDINGS, empty
from recattn_kernels.strides import CPU_DTYPES, cpu, huge_pages, pointer

PIXELS = {**CPU_DTYPES, torch.uint8: 4}
MODE_OF = {name: i for i, name in enumerate(MODES)}
PADDING_OF = {name: i for i, name in enumerate(PADDINGS)}


def forward(image: Tensor, loc: Tensor, zoom: Tensor | None, *options: Any) -> tuple[Tensor]:
    results = empty(image, loc, zoom, *options)
    huge_pages(*results)
    if results[0].numel() > 0:
        cpu().glimpse_forward(_arguments(image, loc, zoom, *options), results[0].data_ptr())
    return results


def backward(
    grads: Sequence[Tensor | None], saved: Sequence[Tensor], inputs: Sequence[Any], options: Any, needs: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    image, loc, zoom = inputs
    (grad,) = grads
    assert grad is not None
    grad = grad.contiguous()
    grad_image = image.new_empty(image.shape) if needs[0] else None
    huge_pages(grad_image)
    grad_loc = loc.new_empty(loc.shape) if needs[1] or needs[2] else None
    grad_zoom = zoom.new_empty(zoom.shape) if needs[2] else None
    if grad.numel() == 0:
        for t in (grad_image, grad_loc, grad_zoom):
            if t is not None:
                t.zero_()
    else:
        parts = None
        if grad_loc is not None:
            parts = loc.new_empty((*loc.shape[:2], options[2], 3), dtype=torch.float64)
        cpu().glimpse_backward(
            _arguments(image, loc, zoom, *options), grad.data_ptr(), pointer(grad_image), pointer(grad_loc),
            pointer(grad_zoom), pointer(parts),
        )  # fmt: skip
    return grad_image, grad_loc if needs[1] else None, grad_zoom


def _arguments(
    image: Tensor, loc: Tensor, zoom: Tensor | None, height: int, width: int, scales: int, factor: float, base: float,
    mode: str, padding: str, dtype: torch.dtype,
) -> tuple[Any, ...]:  # fmt: skip
    return (
        tuple(image.shape), (loc.shape[1], scales, height, width), MODE_OF[mode], PADDING_OF[padding], factor, base,
        PIXELS[image.dtype], CPU_DTYPES[dtype], loc.dtype == torch.float64, image.data_ptr(), image.stride(),
        (loc.data_ptr(), *loc.stride()), (0, 0, 0) if zoom is None else (zoom.data_ptr(), *zoom.stride()),
        torch.get_num_threads(),
    )  # fmt: skip
