"""One step of a cell in Triton from its gates, whose products somebody else has taken: one pass over memory.

A program takes a block of rows and units. Inputs are read through the strides of their rows, results are contiguous; an
absent one is None. ALIGNED: H and those strides are multiples of 8, so that 16 bytes are loaded at once.
"""

# mypy: ignore-errors

from __future__ import annotations

from functools import partial

import triton
import triton.language as tl

from recattn_kernels.ops.gated.triton_cells import (
    cell_backward,
    cell_forward,
    eights,
    load_tiles,
    rows_at,
    store_tiles,
    to_float,
)
from recattn_kernels.triton_launch import kernel


@triton.jit
def block_of(B, H, BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr):
    """The rows b and the units n of this program, and which of them there are."""
    across = tl.cdiv(H, BLOCK_H)
    b = (tl.program_id(0) // across).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    n = tl.program_id(0) % across * BLOCK_H + tl.arange(0, BLOCK_H)
    return b, n, (b < B)[:, None] & (n < H)[None, :]


@triton.jit
def load_state(ptr, b, stride_b, n, mask, ALIGNED: tl.constexpr):
    """A state, or a gradient of one, in float32; zeros for an absent one."""
    state = tl.zeros(mask.shape, tl.float32)
    if ptr is not None:
        state = tl.load(rows_at(ptr, b, eights(stride_b, ALIGNED), n), mask=mask, other=0.0).to(tl.float32)
    return state


@triton.jit
def load_gates(ptr, b, stride_b, n, H, mask, GATES: tl.constexpr, ALIGNED: tl.constexpr):
    """All gates, in float32; None for absent ones."""
    gates = None
    if ptr is not None:
        gates = to_float(load_tiles(rows_at(ptr, b, eights(stride_b, ALIGNED), n), H, mask, GATES))
    return gates


@partial(kernel, aligned=("x_ptr", "q_ptr", "h_ptr", "c_ptr", "h_n_ptr", "c_n_ptr"))
def forward_one_step_kernel(
    x_ptr, q_ptr, h_ptr, c_ptr, h_n_ptr, c_n_ptr, B, H, x_stride_b, q_stride_b, h_stride_b, c_stride_b,
    CELL: tl.constexpr, GATES: tl.constexpr, ALIGNED: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    # h', c' = cell(x, q, h, c)
    H = eights(H, ALIGNED)
    b, n, mask = block_of(B, H, BLOCK_B, BLOCK_H)
    x = load_gates(x_ptr, b, x_stride_b, n, H, mask, GATES, ALIGNED)
    q = load_gates(q_ptr, b, q_stride_b, n, H, mask, GATES, ALIGNED)
    h = load_state(h_ptr, b, h_stride_b, n, mask, ALIGNED)
    c = load_state(c_ptr, b, c_stride_b, n, mask, ALIGNED)
    h, c, _ = cell_forward(x, q, h, c, CELL)
    tl.store(rows_at(h_n_ptr, b, H, n), h.to(h_n_ptr.dtype.element_ty), mask=mask)
    if c_n_ptr is not None:
        tl.store(rows_at(c_n_ptr, b, H, n), c.to(c_n_ptr.dtype.element_ty), mask=mask)


@partial(
    kernel,
    aligned=(
        "grad_h_n_ptr", "grad_c_n_ptr", "x_ptr", "q_ptr", "h_ptr", "c_ptr", "dx_ptr", "dq_ptr", "dh_ptr", "dc_ptr",
    ),
)  # fmt: skip
def backward_one_step_kernel(
    grad_h_n_ptr, grad_c_n_ptr, x_ptr, q_ptr, h_ptr, c_ptr, dx_ptr, dq_ptr, dh_ptr, dc_ptr, B, H,
    grad_h_n_stride_b, grad_c_n_stride_b, x_stride_b, q_stride_b, h_stride_b, c_stride_b,
    CELL: tl.constexpr, GATES: tl.constexpr, ALIGNED: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    # dx, dq, dh, dc = the cell's backward, of dL/dh' and dL/dc', at what its forward computes once more
    H = eights(H, ALIGNED)
    b, n, mask = block_of(B, H, BLOCK_B, BLOCK_H)
    x = load_gates(x_ptr, b, x_stride_b, n, H, mask, GATES, ALIGNED)
    q = load_gates(q_ptr, b, q_stride_b, n, H, mask, GATES, ALIGNED)
    h = load_state(h_ptr, b, h_stride_b, n, mask, ALIGNED)
    c = load_state(c_ptr, b, c_stride_b, n, mask, ALIGNED)
    dh = load_state(grad_h_n_ptr, b, grad_h_n_stride_b, n, mask, ALIGNED)
    dc = load_state(grad_c_n_ptr, b, grad_c_n_stride_b, n, mask, ALIGNED)
    _, _, kept = cell_forward(x, q, h, c, CELL)
    dx, dq, dh, dc = cell_backward(dh, dc, kept, h, c, CELL)
    if dx_ptr is not None:
        store_tiles(rows_at(dx_ptr, b, GATES * H, n), H, mask, dx)
    if dq_ptr is not None:
        store_tiles(rows_at(dq_ptr, b, GATES * H, n), H, mask, dq)
    if dh_ptr is not None:
        tl.store(rows_at(dh_ptr, b, H, n), dh.to(dh_ptr.dtype.element_ty), mask=mask)
    if dc_ptr is not None:
        tl.store(rows_at(dc_ptr, b, H, n), dc.to(dc_ptr.dtype.element_ty), mask=mask)
