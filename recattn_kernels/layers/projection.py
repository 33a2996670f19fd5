"""The input projection of every step at once: the one product of a recurrent layer that does not wait for a state."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from recattn_kernels import backends
from recattn_kernels.strides import cpu, huge_pages

COMPILED = ("auto", "cpp")  # the backends under which what a layer computes itself may run in csrc
# The rows and million multiply-adds from which our product of float32 is faster than the BLAS behind F.linear, in a
# forward alone and with a backward. For fewer, packing the weights and some 20 us of Python do not pay.
LEAST = ((128, 8), (256, 16))
FEWEST_ROWS = 16  # of less than these a product takes as long as reading weight, in any backend


def project(input: Tensor, weight: Tensor, bias: Tensor | None, backend: str = "auto") -> Tensor:
    """input (..., D) weight^T + bias, with weight (G*H, D) and bias (G*H,): (..., G*H).

    Under auto and cpp in float32 on a CPU by csrc/cpu/gemm.cpp, under auto where that pays, and so in the backward; in
    float16 as well, which torch multiplies there some twenty times slower than float32. backend is what
    backends.requested() says to the layer.
    """
    # A compiler would compile for one side of a rule on sizes, and an export would take no other.
    if backend not in COMPILED or torch.compiler.is_compiling():
        return F.linear(input, weight, bias)
    differentiates = torch.is_grad_enabled() and True in [
        t.requires_grad for t in (input, weight, bias) if t is not None
    ]
    least_rows, millions = LEAST[differentiates]
    if backend == "cpp" or input.dtype == torch.float16:
        least_rows, millions = FEWEST_ROWS, 0
    D = input.shape[-1]
    few = D == 0 or input.numel() < least_rows * D or input.numel() * weight.shape[0] < millions * 1e6
    if few or not _runs(input, weight, bias):
        return F.linear(input, weight, bias)
    if input.dtype == torch.float16:
        return project(input.float(), weight.float(), None if bias is None else bias.float(), "cpp").half()
    rows = input.reshape(-1, D)
    if differentiates:
        output: Tensor = _Projection.apply(rows, weight, bias)  # type: ignore[no-untyped-call]
    else:
        output = matmul(rows, weight.t(), bias)
    return output.view(*input.shape[:-1], weight.shape[0])


def _runs(input: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    if input.dtype not in (torch.float32, torch.float16) or weight.dtype != input.dtype or input.device.type != "cpu":
        return False
    if torch.is_autocast_enabled("cpu") or backends.under_transform() or backends.dispatches(input, weight, bias):
        return False
    return not isinstance(backends.extension("_cpu"), str)


class _Projection(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return matmul(x, weight.t(), bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        plain = torch.is_grad_enabled() or backends.dispatches(grad)  # create_graph=True; a batch of gradients
        product, total = (torch.matmul, _sum) if plain else (matmul, column_sum)
        return (
            product(grad, weight) if ctx.needs_input_grad[0] else None,
            product(grad.t(), x) if ctx.needs_input_grad[1] else None,
            total(grad) if ctx.needs_input_grad[2] else None,
        )


def _sum(a: Tensor) -> Tensor:
    return a.sum(0)


def matmul(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """a (M, K) times b (K, N), of any strides, + bias (N,): float32 on a CPU, without a derivative."""
    (M, K), N = a.shape, b.shape[1]
    c = a.new_empty(M, N)
    huge_pages(c)
    bias = None if bias is None else bias.contiguous()
    cpu().gemm(
        (M, N, K), 0, (a.data_ptr(), *a.stride()), (b.data_ptr(), *b.stride()), (c.data_ptr(), N),
        0 if bias is None else bias.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return c


def column_sum(a: Tensor) -> Tensor:
    """The sum of a (M, N) over its rows."""
    a = a if a.stride(1) == 1 else a.contiguous()
    out = a.new_empty(a.shape[1])
    cpu().column_sum(tuple(a.shape), 0, (a.data_ptr(), a.stride(0)), out.data_ptr(), torch.get_num_threads())
    return out
