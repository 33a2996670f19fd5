"""IndRNN on an NVIDIA GPU: hands pointers and strides to csrc/cuda/indrnn.cu."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from recattn_kernels.ops import gpu
from recattn_kernels.ops.gpu import DTYPES, typed
from recattn_kernels.ops.indrnn import scan
from recattn_kernels.ops.indrnn.contract import ACTIVATIONS, Call, empty_backward, empty_forward
from recattn_kernels.strides import contiguous, contiguous_rows, sequence


def forward(call: Call) -> tuple[Tensor, Tensor]:
    x, weight_hh = contiguous_rows(call.x), call.weight_hh.contiguous()
    h0, bias, lengths = contiguous(call.h0), contiguous(call.bias), contiguous(call.lengths)
    output, h_n = empty_forward(call)
    with gpu.guard(x):
        gpu.cuda().indrnn_forward(
            call.sizes, DTYPES.index(x.dtype), ACTIVATIONS.index(call.activation), call.negative_slope,
            typed(weight_hh), typed(h0), sequence(call.reset, call.time), 0 if lengths is None else lengths.data_ptr(),
            call.reverse, scan.applies(call, gpu.gpu_of(x.device).multiprocessors, forward=True), gpu.stream(),
            typed(bias), sequence(x, call.time), sequence(output, call.time), typed(h_n),
        )  # fmt: skip
    return output, h_n


def backward(grad_output: Tensor | None, grad_h_n: Tensor | None, call: Call) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    output, weight_hh = contiguous_rows(call.x), call.weight_hh.contiguous()
    dy = None if grad_output is None else contiguous_rows(grad_output)
    h0, dh_n, lengths = contiguous(call.h0), contiguous(grad_h_n), contiguous(call.lengths)
    grads = dx, du, dh0, db = empty_backward(call)
    _, B, H = call.sizes
    columns = output.new_empty((2, B, H), dtype=torch.float32)  # scratch
    with gpu.guard(output):
        gpu.cuda().indrnn_backward(
            call.sizes, DTYPES.index(output.dtype), ACTIVATIONS.index(call.activation), call.negative_slope,
            typed(weight_hh), typed(h0), sequence(call.reset, call.time), 0 if lengths is None else lengths.data_ptr(),
            call.reverse, scan.applies(call, gpu.gpu_of(output.device).multiprocessors, forward=False), gpu.stream(),
            math.inf if call.grad_clip is None else call.grad_clip, sequence(dy, call.time),
            sequence(output, call.time), typed(dh_n), sequence(dx, call.time), typed(dh0), columns.data_ptr(),
            typed(du), typed(db),
        )  # fmt: skip
    return grads
