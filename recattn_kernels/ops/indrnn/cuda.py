"""IndRNN on an NVIDIA GPU: hands pointers and strides to csrc/cuda/indrnn.cu."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from recattn_kernels import backends
from recattn_kernels.ops.indrnn import scan
from recattn_kernels.ops.indrnn.contract import ACTIVATIONS, Call, empty_backward, empty_forward
from recattn_kernels.strides import contiguous, contiguous_rows, strided

DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # the order of csrc/cuda/kernels.h's enum Dtype


def typed(x: Tensor | None) -> tuple[int, int]:
    """Pointer and type of a contiguous tensor."""
    return (0, 0) if x is None else (x.data_ptr(), DTYPES.index(x.dtype))


def forward(call: Call) -> tuple[Tensor, Tensor]:
    x, weight_hh = contiguous_rows(call.x), call.weight_hh.contiguous()
    h0, bias, lengths = contiguous(call.h0), contiguous(call.bias), contiguous(call.lengths)
    output, h_n = empty_forward(call)
    with torch.cuda.device(x.device):
        _cuda().indrnn_forward(
            call.sizes, DTYPES.index(x.dtype), ACTIVATIONS.index(call.activation), call.negative_slope,
            typed(weight_hh), typed(h0), strided(call.reset, call.time), 0 if lengths is None else lengths.data_ptr(),
            call.reverse, scan.applies(call, multiprocessors(x), forward=True), stream(), typed(bias),
            strided(x, call.time), strided(output, call.time), typed(h_n),
        )  # fmt: skip
    return output, h_n


def backward(grad_output: Tensor | None, grad_h_n: Tensor | None, call: Call) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    output, weight_hh = contiguous_rows(call.x), call.weight_hh.contiguous()
    dy = None if grad_output is None else contiguous_rows(grad_output)
    h0, dh_n, lengths = contiguous(call.h0), contiguous(grad_h_n), contiguous(call.lengths)
    grads = dx, du, dh0, db = empty_backward(call)
    _, B, H = call.sizes
    columns = output.new_empty((2, B, H), dtype=torch.float32)  # scratch
    with torch.cuda.device(output.device):
        _cuda().indrnn_backward(
            call.sizes, DTYPES.index(output.dtype), ACTIVATIONS.index(call.activation), call.negative_slope,
            typed(weight_hh), typed(h0), strided(call.reset, call.time), 0 if lengths is None else lengths.data_ptr(),
            call.reverse, scan.applies(call, multiprocessors(output), forward=False), stream(),
            math.inf if call.grad_clip is None else call.grad_clip, strided(dy, call.time),
            strided(output, call.time), typed(dh_n), strided(dx, call.time), typed(dh0), columns.data_ptr(), typed(du),
            typed(db),
        )  # fmt: skip
    return grads


def multiprocessors(x: Tensor) -> int:
    return int(torch.cuda.get_device_properties(x.device).multi_processor_count)


def stream() -> int:
    return int(torch.cuda.current_stream().cuda_stream)


def _cuda() -> Any:
    return backends.extension("_cuda")
