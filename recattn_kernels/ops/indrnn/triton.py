"""IndRNN in Triton: configurations, launches, and what is compiled ahead of time. The kernels: triton_kernels.py."""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from recattn_kernels.ops.indrnn.contract import ACTIVATIONS, Call, empty_backward, empty_forward
from recattn_kernels.ops.indrnn.scan import PIECEWISE, applies
from recattn_kernels.ops.indrnn.triton_kernels import backward_kernel, forward_kernel, sum_rows_kernel
from recattn_kernels.ops.indrnn.triton_scan_kernels import backward_scan_kernel, forward_scan_kernel
from recattn_kernels.strides import contiguous, contiguous_rows
from recattn_kernels.triton_launch import Launch, Machine, SameCompilation, Variant, Variants, guard, machine, strided

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Config(NamedTuple):
    steps: int
    num_warps: int
    registers: int


# Little's law: a GPU needs tens of KB of loads in flight on each multiprocessor. Few columns get them from many steps
# of each, many columns from many lanes, for which a lane must be small. A slow step (an exponential on the path from
# one to the next, or registers spent on reset and lengths) needs fewer ahead. "many halves": of a 16-bit x without
# those, whose steps are half the bytes: 24 KB in flight instead of 14, where an H100 takes about 30 (an estimate).
FORWARD = {
    "few": Config(32, 1, 168), "few slow": Config(16, 1, 168), "many": Config(8, 4, 72),
    "many halves": Config(16, 4, 80),
}  # fmt: skip
BACKWARD = {"few": Config(16, 1, 168), "few slow": Config(16, 1, 168), "many": Config(8, 4, 96)}
FEW = 512  # columns a multiprocessor
# Of the scans, each warp of which takes a chunk of so many steps. "gated": with reset, lengths or grad_clip.
FORWARD_SCAN = {"plain": Config(16, 8, 128), "gated": Config(8, 8, 168)}
BACKWARD_SCAN = {"plain": Config(8, 8, 128), "gated": Config(8, 8, 168)}
# The interpreter's, so small that the tests' samples are several tiles, of few columns: it composes maps one by one.
INTERPRETER_SCAN, INTERPRETER_COLUMNS = Config(2, 4, 168), 8


def config(table: dict[str, Config], call: Call, on: Machine) -> Config:
    _, batch, hidden = call.sizes
    gated = call.reset is not None or call.lengths is not None
    if batch * hidden > FEW * on.multiprocessors:
        halves = call.x.element_size() == 2 and not gated and "many halves" in table
        return table["many halves" if halves else "many"]
    return table["few slow" if gated or call.activation in ("tanh", "sigmoid") else "few"]


def launch(kernel: Any, call: Call, grid: int, chosen: Config, own: dict[str, Any]) -> Launch:
    """A launch of either direction, with `own` beside the arguments that both take."""
    T, B, H = call.sizes
    args = {
        "weight_hh_ptr": call.weight_hh.contiguous(), "h0_ptr": contiguous(call.h0),
        "lengths_ptr": contiguous(call.lengths), "T": T, "B": B, "H": H, "negative_slope": call.negative_slope,
        "ACTIVATION": call.activation, "REVERSE": call.reverse, "STEPS": chosen.steps,
    }  # fmt: skip
    reset = None if call.reset is None else call.reset.view(torch.uint8)
    args |= strided("reset", reset, call.time) | own
    return Launch(kernel, (grid,), args, chosen.num_warps, chosen.registers)


def walk_launch(kernel: Any, table: dict[str, Config], call: Call, on: Machine, own: dict[str, Any]) -> Launch:
    _, B, H = call.sizes
    chosen = config(table, call, on)
    block = chosen.num_warps * on.lanes
    return launch(kernel, call, triton.cdiv(B * H, block), chosen, own | {"BLOCK": block})


def scan_launch(kernel: Any, table: dict[str, Config], call: Call, on: Machine, own: dict[str, Any]) -> Launch:
    _, B, H = call.sizes
    gated = call.reset is not None or call.lengths is not None or own.get("grad_clip") is not None
    chosen, columns = table["gated" if gated else "plain"], on.lanes
    if on.interpreted:
        chosen, columns = INTERPRETER_SCAN, INTERPRETER_COLUMNS
    sizes = {"CHUNKS": chosen.num_warps, "COLUMNS": columns}
    return launch(kernel, call, triton.cdiv(B * H, columns), chosen, own | sizes)


def forward_launch(call: Call, output: Tensor, h_n: Tensor, on: Machine) -> Launch:
    own = {"bias_ptr": contiguous(call.bias), "h_n_ptr": h_n}
    own |= strided("x", contiguous_rows(call.x), call.time) | strided("output", output, call.time)
    if applies(call, on.multiprocessors, forward=True):
        return scan_launch(forward_scan_kernel, FORWARD_SCAN, call, on, own)
    return walk_launch(forward_kernel, FORWARD, call, on, own)


def backward_launches(
    grad_output: Tensor | None, grad_h_n: Tensor | None, call: Call, grads: tuple[Tensor, ...], on: Machine
) -> tuple[Launch, Launch]:
    _, B, H = call.sizes
    grad_x, grad_weight_hh, grad_h0, grad_bias = grads
    rows = call.x.new_empty((2, B, H), dtype=torch.float32)
    own = {
        "grad_h_n_ptr": contiguous(grad_h_n), "grad_h0_ptr": None if call.h0 is None else grad_h0, "rows_ptr": rows,
        "grad_clip": call.grad_clip,
    }  # fmt: skip
    own |= strided("grad_output", None if grad_output is None else contiguous_rows(grad_output), call.time)
    own |= strided("output", contiguous_rows(call.x), call.time) | strided("grad_x", grad_x, call.time)
    sums = {
        "rows_ptr": rows, "grad_weight_hh_ptr": grad_weight_hh,
        "grad_bias_ptr": None if call.bias is None else grad_bias, "B": B, "H": H, "ROWS": 64, "BLOCK": 32,
    }  # fmt: skip
    sum_rows = Launch(sum_rows_kernel, (triton.cdiv(H, 32),), sums, num_warps=4, registers=64)
    if applies(call, on.multiprocessors, forward=False):
        return scan_launch(backward_scan_kernel, BACKWARD_SCAN, call, on, own), sum_rows
    return walk_launch(backward_kernel, BACKWARD, call, on, own), sum_rows


def forward(call: Call) -> tuple[Tensor, Tensor]:
    output, h_n = empty_forward(call)
    if h_n.numel() > 0:
        with guard(output):
            forward_launch(call, output, h_n, machine(output)).run()
    return output, h_n


def backward(grad_output: Tensor | None, grad_h_n: Tensor | None, call: Call) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grads = empty_backward(call)
    if call.x.shape[1 - call.time] * call.x.shape[2] > 0:
        with guard(call.x):
            for launch in backward_launches(grad_output, grad_h_n, call, grads, machine(call.x)):
                launch.run()
    else:
        for grad in grads:
            grad.zero_()
    return grads


# Ahead of time: see tests/test_aot.py


def example(
    on: Machine, activation: str, dtype: torch.dtype, gated: bool, reverse: bool, few: bool, algorithm: str,
    T: int = 100, B: int = 3,
) -> tuple[Launch, ...]:  # fmt: skip
    """What a call on the meta device, with every optional argument (gated) or with none, launches."""
    H = 7 if few else 777

    def empty(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    call = Call(
        empty(T, B, H), empty(H), empty(B, H) if gated else None, empty(H) if gated else None,
        empty(T, B, dtype=torch.bool) if gated else None, empty(B, dtype=torch.int64) if gated else None,
        activation, 0.01, reverse, False, 1.0 if gated else None, algorithm,
    )  # fmt: skip
    output, h_n = empty_forward(call)
    grads = empty_backward(call)
    backward = backward_launches(output, h_n if gated else None, call, grads, on)
    return forward_launch(call, output, h_n, on), *backward


def aot_variants(lanes: int, full: bool) -> Variants:
    """Launches that cover the kernels; in full, every activation, dtype, option, size and algorithm."""
    every = itertools.product(ACTIVATIONS, DTYPES, (False, True), (False, True), (False, True), ("sequential", "scan"))
    some = (
        ("relu", torch.float32, False, False, True, "sequential"),
        ("tanh", torch.bfloat16, True, False, False, "sequential"),
        ("relu6", torch.float16, True, True, True, "sequential"),
        ("leaky_relu", torch.float32, False, False, False, "sequential"),
        ("identity", torch.float16, False, False, False, "sequential"),
        ("sigmoid", torch.bfloat16, False, True, True, "sequential"),
        ("relu", torch.float32, False, False, True, "scan"),
        ("identity", torch.bfloat16, False, True, True, "scan"),
        ("relu6", torch.float16, True, True, True, "scan"),
        ("tanh", torch.bfloat16, False, False, True, "scan"),
    )
    for activation, dtype, gated, reverse, few, algorithm in every if full else some:
        scan = algorithm == "scan"
        if scan and not few:
            continue  # a scan has one configuration for any number of columns
        words = (
            activation, str(dtype).removeprefix("torch."), "gated" * gated, "reverse" * reverse, "few" * few,
            "scan" * scan,
        )  # fmt: skip
        name = "-".join(filter(None, words))
        forward, backward, sums = example(Machine(lanes, 1, 2**16), activation, dtype, gated, reverse, few, algorithm)
        exchange = 20 * lanes * 8 if scan else 0  # between the warps: the maps of their chunks, 5 numbers each
        if not scan or activation in PIECEWISE:
            yield Variant(f"forward-{name}", forward, shared=exchange)
        yield Variant(f"backward-{name}", backward, shared=exchange)
        if activation == "relu" and not reverse and few and not scan:
            yield Variant(f"sum-rows-{name}", sums, shared=1024)


def aot_same(lanes: int) -> SameCompilation:
    """Launches that differ in T and B alone, and in the strides that follow from them."""
    for gated, algorithm in itertools.product((False, True), ("sequential", "scan")):
        yield [
            example(Machine(lanes, 1, 2**16), "relu", torch.bfloat16, gated, gated, True, algorithm, T, B)
            for T, B in ((1, 1), (2, 1), (1, 16), (16, 16), (784, 32), (100_000, 73))
        ]
