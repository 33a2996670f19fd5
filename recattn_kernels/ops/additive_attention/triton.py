"""additive_attention in Triton: configurations, launches, and what is compiled ahead of time. The kernels:
triton_kernels.py."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from recattn_kernels.ops.additive_attention import triton_kernels as kernels
from recattn_kernels.ops.additive_attention.contract import ACTIVATIONS
from recattn_kernels.strides import contiguous, contiguous_rows
from recattn_kernels.triton_launch import Launch, Machine, SameCompilation, Variant, Variants, guard, machine

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Config(NamedTuple):
    rows: int
    block: int
    num_warps: int
    registers: int


# A tile is what a program has in flight: about 8 KB of 16-bit numbers, in vectors of 16 bytes a lane.
SCORES = Config(8, 256, 4, 128)
CONTEXT = Config(32, 128, 4, 168)
VALUES_BACKWARD = Config(8, 512, 4, 168)
SOFTMAX_BACKWARD = Config(1, 256, 4, 64)
KEYS_BACKWARD = Config(16, 128, 4, 168)
SUM_ROWS = Config(16, 64, 4, 64)
# The interpreter's, so small that the tests' samples are several tiles.
INTERPRETER = Config(4, 32, 4, 0)


class Inputs(NamedTuple):
    query: Tensor
    keys: Tensor
    weight: Tensor
    values: Tensor
    mask: Tensor | None

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        B, N, A = self.keys.shape
        return B, N, A, self.values.shape[2]


def prepared(query: Tensor, keys: Tensor, weight: Tensor, values: Tensor, mask: Tensor | None) -> Inputs:
    rows = contiguous_rows(keys), contiguous_rows(values)
    return Inputs(query.contiguous(), rows[0], weight.contiguous(), rows[1], mask)


def launch(
    kernel: Any, config: Config, on: Machine, groups: int, size: int, over_rows: bool, args: dict[str, Any]
) -> Launch:
    """A program for each block of `size` (ROWS of it, or BLOCK) in each of `groups`."""
    if on.interpreted:
        config = INTERPRETER._replace(num_warps=config.num_warps)
    blocks = triton.cdiv(max(size, 1), config.rows if over_rows else config.block)
    args = args | {"ROWS": config.rows, "BLOCK": config.block}
    if "ROWS" not in kernel.arg_names:
        del args["ROWS"]
    return Launch(kernel, (groups * blocks,), args, config.num_warps, config.registers)


def strided(name: str, x: Tensor) -> dict[str, Any]:
    """The arguments of a kernel that are rows of x (B, N, width), and whether they are aligned."""
    aligned = x.shape[2] % 16 == x.stride(0) % 16 == x.stride(1) % 16 == 0
    return {f"{name}_ptr": x, f"{name}_stride_b": x.stride(0), f"{name}_stride_n": x.stride(1), "ALIGNED": aligned}


def masked(mask: Tensor | None) -> dict[str, Any]:
    if mask is None:
        return {"mask_ptr": None, "mask_stride_b": 0, "mask_stride_n": 0}
    view = mask.view(torch.uint8)
    return {"mask_ptr": view, "mask_stride_b": mask.stride(0), "mask_stride_n": mask.stride(1)}


def forward_launches(
    inputs: Inputs, activation: str, scores: Tensor, softmax: Tensor, weights: Tensor | None, context: Tensor,
    on: Machine,
) -> tuple[Launch, Launch]:  # fmt: skip
    B, N, A, D = inputs.sizes
    own = {"query_ptr": inputs.query, "weight_ptr": inputs.weight, "scores_ptr": scores, "N": N, "A": A}
    own |= strided("keys", inputs.keys) | masked(inputs.mask) | {"ACTIVATION": activation}
    average = {"scores_ptr": scores, "softmax_ptr": softmax, "weights_ptr": weights, "context_ptr": context}
    average |= strided("values", inputs.values) | masked(inputs.mask) | {"N": N, "D": D}
    return (
        launch(kernels.scores_kernel, SCORES, on, B, N, True, own),
        launch(kernels.context_kernel, CONTEXT, on, B, D, False, average),
    )


def backward_launches(
    inputs: Inputs, activation: str, softmax: Tensor, grad_context: Tensor, grad_weights: Tensor | None,
    grads: Sequence[Tensor | None], on: Machine,
) -> list[Launch]:  # fmt: skip
    """grads: those of query, keys, weight and values that are wanted."""
    B, N, A, D = inputs.sizes
    grad_query, grad_keys, grad_weight, grad_values = grads
    scores = softmax.new_empty(B, N)
    values: dict[str, Any] = {
        "softmax_ptr": softmax,
        "grad_context_ptr": grad_context,
        "grad_weights_ptr": grad_weights,
    }
    values |= {"grad_values_ptr": grad_values, "scores_ptr": scores, "N": N, "D": D}
    values |= strided("values", inputs.values) | masked(inputs.mask)
    launches = [launch(kernels.values_backward_kernel, VALUES_BACKWARD, on, B, N, True, values)]
    if grad_query is None and grad_keys is None and grad_weight is None:
        return launches
    own: dict[str, Any] = {"softmax_ptr": softmax, "scores_ptr": scores, "N": N} | masked(inputs.mask)
    launches.append(launch(kernels.softmax_backward_kernel, SOFTMAX_BACKWARD, on, B, 1, True, own))
    blocks = triton.cdiv(N, (INTERPRETER if on.interpreted else KEYS_BACKWARD).rows)
    sums = softmax.new_empty(2, B, blocks, A)
    own = {"query_ptr": inputs.query, "weight_ptr": inputs.weight, "scores_ptr": scores, "grad_keys_ptr": grad_keys}
    own |= {"sums_ptr": sums, "B": B, "N": N, "A": A, "ACTIVATION": activation}
    own |= strided("keys", inputs.keys) | masked(inputs.mask)
    launches.append(launch(kernels.keys_backward_kernel, KEYS_BACKWARD, on, B, N, True, own))
    for part, grad, groups, rows in ((sums[0], grad_query, B, blocks), (sums[1], grad_weight, 1, B * blocks)):
        if grad is not None:
            own = {"sums_ptr": part, "out_ptr": grad, "R": rows, "A": A}
            launches.append(launch(kernels.sum_rows_kernel, SUM_ROWS, on, groups, A, False, own))
    return launches


def forward(
    query: Tensor, keys: Tensor, weight: Tensor, values: Tensor, mask: Tensor | None, activation: str, weights: bool
) -> tuple[Tensor, Tensor, Tensor]:
    inputs = prepared(query, keys, weight, values, mask)
    B, N, _, D = inputs.sizes
    scores, softmax = (query.new_empty((B, N), dtype=torch.float32) for _ in range(2))
    a, context = query.new_empty((B, N) if weights else (0,)), query.new_empty((B, D))
    if B > 0:
        with guard(query):
            for each in forward_launches(
                inputs, activation, scores, softmax, a if weights else None, context, machine(query)
            ):
                if each.grid[0] > 0:
                    each.run()
    return context, a, softmax


def backward(
    grads: Sequence[Tensor | None],
    saved: Sequence[Tensor],
    inputs: Sequence[Tensor | None],
    options: Sequence[Any],
    needs: Sequence[bool],
) -> list[Tensor | None]:
    query, keys, weight, values, mask = inputs
    assert query is not None and keys is not None and weight is not None and values is not None
    given = prepared(query, keys, weight, values, mask)
    four = (query, keys, weight, values)
    results = [t.new_empty(t.shape) if need else None for t, need in zip(four, needs[:4], strict=True)]
    B, N, _, D = given.sizes
    if B * N == 0:
        return [None if g is None else g.zero_() for g in results] + [None]
    grad_context, grad_weights = (contiguous(g) for g in grads)
    if grad_context is None:
        grad_context = query.new_zeros(B, D)
    with guard(query):
        for each in backward_launches(given, options[0], saved[0], grad_context, grad_weights, results, machine(query)):
            each.run()
    return [*results, None]


# Ahead of time: see tests/test_aot.py


def example(
    on: Machine, activation: str, dtype: torch.dtype, weight: torch.dtype, width: int, full: bool, N: int = 196,
    B: int = 3,
) -> list[Launch]:  # fmt: skip
    """What a call on the meta device, with every optional argument (full) or with none, launches."""

    def empty(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    inputs = Inputs(
        empty(B, width), empty(B, N, width), empty(width, dtype=weight), empty(B, N, 2 * width, dtype=weight),
        empty(B, N, dtype=torch.bool) if full else None,
    )  # fmt: skip
    scores, softmax = (empty(B, N, dtype=torch.float32) for _ in range(2))
    weights, context = empty(B, N) if full else None, empty(B, 2 * width)
    grads = [t.new_empty(t.shape) if full or t is inputs.query else None for t in inputs[:4] if t is not None]
    return [
        *forward_launches(inputs, activation, scores, softmax, weights, context, on),
        *backward_launches(inputs, activation, softmax, context, weights, grads, on),
    ]


def aot_variants(lanes: int, full: bool) -> Variants:
    F32, BF16, F16 = DTYPES
    every = itertools.product(
        ACTIVATIONS, ((F32, F32), (BF16, BF16), (F16, F16), (BF16, F32)), (512, 37), (False, True)
    )
    some = (("tanh", (BF16, BF16), 512, False), ("relu", (F16, F32), 37, True), ("tanh", (F32, F32), 512, True))
    for activation, (dtype, weight), width, options in every if full else some:
        words = (
            activation,
            *(str(d).removeprefix("torch.") for d in {dtype: 0, weight: 0}),
            str(width),
            "full" * options,
        )
        name = "-".join(filter(None, words))
        for i, each in enumerate(example(Machine(lanes, 1, 2**16), activation, dtype, weight, width, options)):
            yield Variant(f"{i}-{each.kernel.__name__}-{name}", each, shared=2**14)


def aot_same(lanes: int) -> SameCompilation:
    """Launches that differ in B and N alone, and in the strides that follow from them."""
    for width, full in ((512, False), (37, True)):
        yield [
            tuple(example(Machine(lanes, 1, 2**16), "tanh", torch.bfloat16, torch.bfloat16, width, full, N, B))
            for N, B in ((1, 1), (2, 1), (1, 16), (196, 32), (1000, 73))
        ]
