"""One step of a cell in Triton: configurations, launches, what is compiled ahead of time. Kernels:
triton_one_step_kernels.py."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from recattn_kernels.ops.gated.contract import CELLS
from recattn_kernels.ops.gated.triton_one_step_kernels import backward_one_step_kernel, forward_one_step_kernel
from recattn_kernels.strides import contiguous_rows
from recattn_kernels.triton_launch import Launch, Machine, SameCompilation, Variant, Variants, guard, machine

# A block's elements on 64 lanes. Where they are aligned, a lane has 8 of each tensor, which in 16 bits are one load;
# else each has an address of its own, and 4 are what the registers are enough for.
ELEMENTS, UNALIGNED_ELEMENTS, UNITS, LANES = 512, 256, 128, 64
# The interpreter's units, so few that the tests' samples are several blocks.
INTERPRETER_UNITS = 32
REGISTERS = 128


class Step(NamedTuple):
    """A cell and what it takes: x and q (B, G*H), h and c (B, H). Those that it has not are None."""

    cell: str
    x: Tensor
    q: Tensor | None
    h: Tensor | None
    c: Tensor | None


def rows_of(tensors: Mapping[str, Tensor | None]) -> dict[str, Any]:
    """The arguments of a kernel that are inputs: each one's pointer and the stride of its rows."""
    args: dict[str, Any] = {}
    for name, x in tensors.items():
        rows = None if x is None else contiguous_rows(x)
        args |= {f"{name}_ptr": rows, f"{name}_stride_b": 0 if rows is None else rows.stride(0)}
    return args


def launch(
    kernel: Any, step: Step, on: Machine, inputs: Mapping[str, Tensor | None], results: Mapping[str, Tensor | None]
) -> Launch:
    B, gates = step.x.shape[0], CELLS[step.cell]
    H = step.x.shape[1] // gates
    args = rows_of({"x": step.x, "q": step.q, "h": step.h, "c": step.c, **inputs})
    aligned = H % 8 == 0 and not any(stride % 8 for name, stride in args.items() if name.endswith("_stride_b"))
    # Not triton.cdiv and next_power_of_2: at 2 us a call they would be half of what it takes to get here.
    units = min(1 << (H - 1).bit_length(), INTERPRETER_UNITS if on.interpreted else UNITS)
    rows = (ELEMENTS if aligned else UNALIGNED_ELEMENTS) // units
    args |= {f"{name}_ptr": x for name, x in results.items()}
    args |= {
        "B": B, "H": H, "CELL": step.cell, "GATES": gates, "ALIGNED": aligned, "BLOCK_B": rows, "BLOCK_H": units,
    }  # fmt: skip
    return Launch(kernel, (-(-B // rows) * -(-H // units),), args, LANES // on.lanes, REGISTERS)


def forward_launch(step: Step, h_n: Tensor, c_n: Tensor | None, on: Machine) -> Launch:
    return launch(forward_one_step_kernel, step, on, {}, {"h_n": h_n, "c_n": c_n})


def backward_launch(
    step: Step, grad_h_n: Tensor | None, grad_c_n: Tensor | None, results: Sequence[Tensor | None], on: Machine
) -> Launch:
    """results: where the gradients of x, q, h and c go, None for those that are not wanted."""
    grads = {"grad_h_n": grad_h_n, "grad_c_n": grad_c_n}
    return launch(backward_one_step_kernel, step, on, grads, dict(zip(("dx", "dq", "dh", "dc"), results, strict=True)))


def forward(step: Step, h_n: Tensor, c_n: Tensor | None = None) -> None:
    if h_n.numel() > 0:
        with guard(h_n):
            forward_launch(step, h_n, c_n, machine(h_n)).run()


def backward(step: Step, grad_h_n: Tensor | None, grad_c_n: Tensor | None, results: Sequence[Tensor | None]) -> None:
    if step.x.numel() > 0:
        with guard(step.x):
            backward_launch(step, grad_h_n, grad_c_n, results, machine(step.x)).run()


# Ahead of time: see tests/test_aot.py

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def example(
    cell: str, dtype: torch.dtype, other: torch.dtype, H: int, on: Machine, B: int = 3
) -> tuple[Launch, Launch]:
    """What a call on the meta device launches; other: the dtype of everything but x."""

    def empty(*sizes: int, dtype: torch.dtype = other, when: bool = True) -> Tensor | None:
        return torch.empty(sizes, dtype=dtype, device="meta") if when else None

    lstm, width = cell == "lstm", CELLS[cell] * H
    x = torch.empty(B, width, dtype=dtype, device="meta")
    h_n = torch.empty(B, H, dtype=dtype if lstm else other, device="meta")
    step = Step(cell, x, empty(B, width, when=not lstm), empty(B, H, when=not lstm), empty(B, H, when=lstm))
    return forward_launch(step, h_n, step.c, on), backward_launch(step, h_n, step.c, step[1:], on)


def variants(cell: str, lanes: int, full: bool) -> Variants:
    """Launches that cover the kernels; in full, every type, and every size of a block."""
    F32, BF16, F16 = DTYPES
    every = itertools.product(((F32, F32), (BF16, BF16), (F16, F16), (BF16, F32), (F16, F32)), (1, 5, 33, 64, 512))
    some = (((BF16, F32), 512), ((F16, F16), 5))
    for (dtype, other), H in every if full else some:
        types = "-".join(str(d).removeprefix("torch.") for d in dict.fromkeys((dtype, other)))
        launches = example(cell, dtype, other, H, Machine(lanes, 1, 2**16))
        for direction, each in zip(("forward", "backward"), launches, strict=True):
            # Where types differ, what a lane loads of one is not what it loads of the other.
            yield Variant(f"{direction}-{types}-{H}", each, shared=2**11)


def same(cell: str, lanes: int) -> SameCompilation:
    """Launches that differ in B alone, or in H where a block has as many units."""
    for sizes in (((1, 512), (2, 512), (4096, 256), (17, 1000)), ((1, 33), (2, 63), (300, 41))):
        yield [example(cell, torch.bfloat16, torch.float32, H, Machine(lanes, 1, 2**16), B) for B, H in sizes]
