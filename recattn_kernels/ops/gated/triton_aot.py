"""What tests/test_aot.py compiles ahead of time of rnn, lstm and gru in Triton."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch
from torch import Tensor

from recattn_kernels.ops.gated import triton, triton_normed
from recattn_kernels.ops.gated.contract import CELLS, Call, empty_backward, empty_forward
from recattn_kernels.ops.gated.products import q_gradient
from recattn_kernels.ops.gated.triton_arguments import empty_sums, float_state
from recattn_kernels.triton_launch import Launch, Machine, SameCompilation, Variant, Variants


class Shape(NamedTuple):
    """What decides which code a call runs."""

    x: torch.dtype
    weight_hh: torch.dtype
    hidden: int
    options: str  # plain; biased: bias_hh and initial states; gated: everything else too; normed: all and a layer norm
    reverse: bool = False
    T: int = 100
    B: int = 3


F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
SOME = (
    Shape(F32, F32, 7, "gated"),
    Shape(F32, F32, 64, "biased"),
    Shape(BF16, BF16, 64, "gated", reverse=True),
    Shape(F16, F16, 128, "biased"),
    Shape(BF16, BF16, 512, "gated"),
    Shape(F16, F16, 512, "plain", B=4096),
    Shape(F32, F32, 512, "gated", B=4096),
    Shape(BF16, F32, 511, "gated"),
)
OF_GRU_BEFORE = (SOME[2], SOME[3], SOME[4], SOME[6])  # the others show nothing that the gru's do not
NORMED = {
    "lstm": (Shape(F32, F32, 7, "normed"), Shape(BF16, BF16, 2048, "normed", B=64)),
    "gru": (Shape(F32, F32, 511, "normed", reverse=True, B=64),),
    "rnn_tanh": (Shape(F32, F32, 64, "normed"),),
}
ALL = tuple(
    Shape(x, weight_hh, hidden, options, reverse, B=B)
    for (x, weight_hh), hidden, options, reverse, B in itertools.product(
        ((F32, F32), (BF16, BF16), (F16, F16), (BF16, F32)), (7, 32, 64, 100, 128, 256, 511), ("plain", "gated"),
        (False, True), (3, 512, 1024, 4096),  # each of the step kernels' blocks, for 256 units
    )
)  # fmt: skip
ALL_NORMED = tuple(
    Shape(x, weight_hh, hidden, "normed", B=64)
    for (x, weight_hh), hidden in itertools.product(((F32, F32), (BF16, BF16), (BF16, F32)), (7, 32, 50, 64, 511, 2048))
)


def machine(lanes: int) -> Machine:
    """The least shared memory among the architectures that are tested; an H100's multiprocessors."""
    return Machine(lanes, 132, 163 * 2**10 if lanes == 32 else 2**16)


def example(cell: str, shape: Shape, on: Machine) -> tuple[tuple[Launch, ...], tuple[Launch, ...]]:
    """What a call on the meta device launches in each direction, once or in every step."""
    T, B, H, G = shape.T, shape.B, shape.hidden, CELLS[cell]
    biased, gated, lstm = shape.options != "plain", shape.options in ("gated", "normed"), cell == "lstm"
    normed = shape.options == "normed"

    def empty(*sizes: int, dtype: torch.dtype = shape.weight_hh, when: bool = True) -> Tensor | None:
        return torch.empty(sizes, dtype=dtype, device="meta") if when else None

    x, weight_hh = empty(T, B, G * H, dtype=shape.x), empty(G * H, H)
    assert x is not None and weight_hh is not None
    call = Call(
        x, weight_hh, empty(B, H, when=biased), empty(B, H, when=biased and lstm), empty(G * H, when=biased),
        empty(G * H, when=normed), empty(G * H, when=normed),
        empty(H, when=normed and lstm), empty(H, when=normed and lstm),
        empty(T, B, dtype=torch.bool, when=gated), empty(B, dtype=torch.int64, when=gated),
        empty(T, B, H, dtype=torch.bool, when=gated), empty(T, B, H, dtype=torch.bool, when=gated and lstm), None,
        cell, 0.0, 0.0, gated, shape.reverse, False, 1.0 if gated else None,
    )  # fmt: skip
    output, h_n, c_n, kept = empty_forward(call, True)
    backward = call._replace(x=output)
    results = empty_backward(backward)
    dq = q_gradient(backward, results[0])
    state = float_state(call, None)
    c = state if lstm else None
    sums = empty_sums(call) if normed else None
    if triton.holds_weights(call, on):
        grads = (output, h_n, c_n if lstm else None)
        sequence = triton.forward_sequence(call, output, h_n, c_n, kept, on)
        return (sequence,), (triton.backward_sequence(grads, backward, kept, results, dq, sums, on),)
    if sums is not None:
        own = triton_normed.backward_step(output, backward, kept, results[0], dq, state, c, sums, on)
        return triton_normed.forward_step(call, output, kept, state, c, on), own
    forward = triton.forward_step(call, output, kept, state.repeat(2, 1, 1), c, on)
    return forward, triton.backward_step(output, backward, kept, results[0], dq, state, c, on)


def variants(cells: tuple[str, ...], lanes: int, full: bool) -> Variants:
    """Launches that cover the kernels; in full, every type, option and size that changes the code."""
    on = machine(lanes)
    for cell in cells:
        before = cell == "gru_before"
        normed = () if before else ALL_NORMED if full else NORMED.get(cell, ())
        for shape in (*(ALL if full else OF_GRU_BEFORE if before else SOME), *normed):
            types = "-".join(str(dtype).removeprefix("torch.") for dtype in dict.fromkeys((shape.x, shape.weight_hh)))
            name = f"{cell}-{types}-{shape.hidden}-{shape.options}{'-reverse' * shape.reverse}-{shape.B}"
            for launch in itertools.chain(*example(cell, shape, on)):
                yield Variant(f"{launch.kernel.__name__.removesuffix('_kernel')}-{name}", launch, shared=on.shared)


def same(cells: tuple[str, ...], lanes: int) -> SameCompilation:
    """Launches that differ in T and B alone, and in the strides that follow from them.

    None spans 2 GB: on AMD such a sequence, which 32-bit offsets do not reach, is a compilation of its own.
    """
    for cell, hidden, options in itertools.product(cells, (64, 512), ("gated", "normed")):
        if options == "normed" and cell == "gru_before":
            continue
        shape = Shape(BF16, BF16, hidden, options)
        sizes = ((1, 1), (2, 1), (1, 16), (16, 16), (784, 8), (10_000, 13))
        calls = (example(cell, shape._replace(T=T, B=B), machine(lanes)) for T, B in sizes)
        yield [(*forward, *backward) for forward, backward in calls]
