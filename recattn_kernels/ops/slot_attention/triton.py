"""slot_attention in Triton: configurations, launches, what is compiled ahead of time. Kernels: triton_kernels.py.

What leaves dk and dv of several calls to one pass: triton_inputs.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from recattn_kernels.ops.slot_attention import triton_iterations
from recattn_kernels.ops.slot_attention.contract import empty_forward, sizes_of
from recattn_kernels.ops.slot_attention.reference import scale_of
from recattn_kernels.ops.slot_attention.triton_arguments import (
    INTERPRETER_BLOCK,
    REGISTERS,
    TYPES,
    Tile,
    common,
    is_narrow,
)
from recattn_kernels.ops.slot_attention.triton_inputs import inputs_backward as inputs_backward
from recattn_kernels.ops.slot_attention.triton_inputs import inputs_launches
from recattn_kernels.ops.slot_attention.triton_inputs_kernels import inputs_backward_kernel
from recattn_kernels.ops.slot_attention.triton_joint_kernels import joint_kernel
from recattn_kernels.ops.slot_attention.triton_kernels import (
    backward_kernel,
    finish_forward_kernel,
    forward_kernel,
    sum_parts_kernel,
)
from recattn_kernels.strides import contiguous
from recattn_kernels.triton_launch import (
    Launch,
    Machine,
    SameCompilation,
    Variant,
    Variants,
    guard,
    machine,
)

# Where joint heads have more, joint_kernel goes before: from 64 on, Triton's compiler for sm_100 fails on float32.
MOST_ROWS_OF_GROUP = 32


class Plan(NamedTuple):
    group: int  # heads of one softmax, which a program takes together
    samples: int
    parts: int
    tile: Tile


# What joint_kernel takes of the arguments of the kernel to come.
JOINT_ARGUMENTS = (
    "q_ptr", "k_ptr", "v_ptr", "bias_ptr", "slot_mask_ptr", "input_mask_ptr", "scale", "H", "K", "N", "D", "E",
    "k_stride_b", "k_stride_h", "k_stride_n", "v_stride_b", "v_stride_h", "v_stride_n", "CHUNKS", "ROWS", "BLOCK_N",
    "BLOCK_D", "SCORE_TYPE", "TYPE", "PRECISION", "ALIGNED",
)  # fmt: skip


def plan(q: Tensor, k: Tensor, v: Tensor | None, joint: bool, on: Machine, backward: bool) -> Plan:
    B, H, K, N, D, Dv = sizes_of(q, k, v)
    group = H if joint and H * K <= MOST_ROWS_OF_GROUP else 1
    samples, rows = B * H // max(group, 1), max(16, triton.next_power_of_2(group * K))
    widest = max(16, triton.next_power_of_2(max(D, Dv)))
    # What the registers hold, as tests/test_aot.py finds it. Exact products in float32 need many times those of matrix
    # units, and those in TF32, which float16's are, twice the shared memory of bfloat16's, and on AMD more registers.
    half_backward = backward and k.dtype == torch.float16
    if is_narrow(q, k, v) and not (half_backward and on.lanes == 64):
        fewest = 32 if half_backward else 64
        block_d = min(widest, 256, (4096 if rows >= fewest else 8192) // rows)
        block_n = min(8192 // block_d, 32 if backward else 128, (512 if backward else 2048) // rows)
        num_warps = 4 if rows * block_d <= 1024 else 8
        if group > 1:  # a product of each head is kept beside the sum
            block_d, block_n, num_warps = min(block_d, 2048 // rows), 16, 8
        elif joint and H > 1:  # what the heads share is read beside the rest
            block_d, block_n = min(block_d, 2048 // rows), min(block_n, 32)
    else:
        block_d = max(16, min(widest, 64, 1024 // rows))
        block_n, num_warps = 16, 8
    block_n = max(16, block_n)
    if on.interpreted:
        block_n = INTERPRETER_BLOCK
    chunks = triton.cdiv(max(D, Dv, 1), block_d)
    # Enough programs for every multiprocessor to have a few, but a few blocks for each unless some would have none.
    wanted = triton.cdiv(4 * on.multiprocessors, max(samples * chunks, 1))
    blocks = triton.cdiv(N, block_n)
    parts = max(1, min(wanted, blocks // 4))
    if samples * chunks * parts < on.multiprocessors:
        parts = max(1, min(wanted, blocks))
    if on.interpreted:
        parts = min(2, max(1, blocks))
    return Plan(group, samples, parts, Tile(rows, block_n, block_d, chunks, num_warps))


def arguments_of(inputs: Sequence[Any], options: Sequence[Any], chosen: Plan, on: Machine) -> dict[str, Any]:
    """The arguments that both directions take."""
    q, k, v, bias, slot_mask, input_mask = inputs
    scale, eps, denominator, _, _ = options
    own = {
        "q_ptr": q.contiguous(), "bias_ptr": contiguous(bias), "scale": scale_of(q, scale), "P": chosen.parts,
        "GROUP": chosen.group,
    }  # fmt: skip
    narrow = is_narrow(q, k, v)
    return own | common(
        sizes_of(q, k, v), k, v, slot_mask, input_mask, eps, denominator, narrow, chosen.tile, on
    )  # fmt: skip


def joint_launch(arguments: dict[str, Any], backward: dict[str, Any] | None, num_warps: int) -> Launch:
    """Of what the heads share where no program takes them together; puts it into the arguments of the kernel to come.

    backward: that kernel's updates, den and gradients.
    """
    q, N = arguments["q_ptr"], arguments["N"]
    B = q.shape[0]
    shared = {f"{name}_ptr": q.new_empty((B, N), dtype=torch.float32) for name in ("most", "total", "average")}
    if backward is None:
        backward = dict.fromkeys(("updates_ptr", "den_ptr", "du_ptr", "dattn_ptr"))
        del shared["average_ptr"]
    arguments |= shared
    own = {name: arguments[name] for name in JOINT_ARGUMENTS} | {"average_ptr": None} | shared | backward
    return Launch(joint_kernel, (B * triton.cdiv(N, arguments["BLOCK_N"]),), own, num_warps, REGISTERS)


def is_apart(chosen: Plan, q: Tensor, joint: bool) -> bool:
    """Whether joint heads have programs of their own."""
    return joint and q.shape[1] > chosen.group


def forward_launches(args: Sequence[Any], results: Sequence[Tensor], on: Machine) -> list[Launch]:
    q, k, v = args[:3]
    updates, attn, mean, den = results
    chosen = plan(q, k, v, args[9], on, backward=False)
    Dv, rows = updates.shape[-1], chosen.group * q.shape[-2]
    sums = q.new_empty((chosen.samples, chosen.parts, rows, Dv), dtype=torch.float32)
    sums_den = q.new_empty(sums.shape[:-1], dtype=torch.float32)
    attend = arguments_of(args[:6], args[6:], chosen, on) | {"most_ptr": None, "total_ptr": None}
    launches = [joint_launch(attend, None, chosen.tile.num_warps)] if is_apart(chosen, q, args[9]) else []
    attend |= {
        "attn_ptr": attn if attn.dim() > 1 else None, "sums_ptr": sums, "den_ptr": sums_den,
    }  # fmt: skip
    finish = {
        "sums_ptr": sums, "sums_den_ptr": sums_den, "updates_ptr": updates,
        "mean_ptr": None if updates.dtype == den.dtype else mean, "den_ptr": den, "eps": args[7], "R": rows, "E": Dv,
        "P": chosen.parts, "DENOMINATOR": args[8], "BLOCK_D": chosen.tile.block_d,
    }  # fmt: skip
    grid = (chosen.samples, chosen.parts, chosen.tile.chunks)
    return [
        *launches,
        Launch(forward_kernel, grid, attend, chosen.tile.num_warps, REGISTERS, num_stages=2),
        Launch(finish_forward_kernel, (den.numel(), chosen.tile.chunks), finish, 1, 64),
    ]


def backward_launches(
    grads: Sequence[Tensor | None], saved: Sequence[Tensor], inputs: Sequence[Any], options: Sequence[Any],
    results: Sequence[Tensor | None], on: Machine,
) -> list[Launch]:  # fmt: skip
    q, k, v = inputs[:3]
    updates, mean, den = saved
    dq, dk, dv, dbias = results
    chosen = plan(q, k, v, options[3], on, backward=True)
    rows = chosen.group * q.shape[-2]
    parts = (chosen.samples, chosen.parts, rows)
    sums = None if dq is None else q.new_empty((*parts, q.shape[-1]), dtype=torch.float32)
    sums_bias = None if dbias is None else q.new_empty(parts, dtype=torch.float32)
    flow = {
        "updates_ptr": (updates if updates.dtype == den.dtype else mean).contiguous(), "den_ptr": den,
        "du_ptr": contiguous(grads[0]), "dattn_ptr": contiguous(grads[1]),
    }  # fmt: skip
    own = {"dk_ptr": dk, "dv_ptr": dv, "sums_ptr": sums, "sums_bias_ptr": sums_bias}
    grid = (chosen.samples, chosen.parts, chosen.tile.chunks)
    arguments = arguments_of(inputs, options, chosen, on) | {f"{x}_ptr": None for x in ("most", "total", "average")}
    before = [joint_launch(arguments, flow, chosen.tile.num_warps)] if is_apart(chosen, q, options[3]) else []
    arguments |= flow | own
    launches = [*before, Launch(backward_kernel, grid, arguments, chosen.tile.num_warps, REGISTERS, num_stages=1)]
    for out, of_parts, scale in ((dq, sums, arguments["scale"]), (dbias, sums_bias, 1.0)):
        if out is not None:
            width = q.shape[-1] if out is dq else 1
            block = chosen.tile.block_d if out is dq else 1
            last = {
                "sums_ptr": of_parts, "out_ptr": out, "scale": scale, "R": rows, "D": width, "P": chosen.parts,
                "BLOCK_D": block,
            }  # fmt: skip
            launches.append(Launch(sum_parts_kernel, (den.numel(), triton.cdiv(width, block)), last, 1, 64))
    return launches


def forward(*args: Any) -> tuple[Tensor, ...]:
    results = empty_forward(*args)
    updates, _, _, den = results
    if den.numel() > 0:
        with guard(updates):
            for launch in forward_launches(args, results, machine(updates)):
                launch.run()
    return results


def backward(
    grads: Sequence[Tensor | None], saved: Sequence[Tensor], inputs: Sequence[Any], options: Any, needs: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    none = saved[2].numel() == 0  # no slots: the inputs' gradients are all that is left, and zero

    def like(i: int) -> Tensor | None:
        x: Tensor | None = inputs[i]
        if x is None or not needs[i]:
            return None
        return x.new_zeros(x.shape) if none else x.new_empty(x.shape)

    dq, dk, dv, dbias = results = [like(i) for i in range(4)]
    if not none:
        with guard(inputs[0]):
            for launch in backward_launches(grads, saved, inputs, options, results, machine(inputs[0])):
                launch.run()
    return dq, dk, dv, dbias, None, None


# Ahead of time: see tests/test_aot.py


def example(
    on: Machine, dtype: torch.dtype, K: int, D: int, full: bool, B: int = 3, N: int = 1000
) -> tuple[Launch, ...]:
    """What a call on the meta device launches, and several in a backward of their own; full: with every option, else
    with v=None and none."""

    def empty(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    heads = (2,) if full else ()
    q, k = empty(B, *heads, K, D), empty(B, *heads, N, D)
    v, bias = (empty(B, *heads, N, D), empty(B, *heads, K)) if full else (None, None)
    masks = (empty(B, K, dtype=torch.bool), empty(B, N, dtype=torch.bool)) if full else (None, None)
    inputs: tuple[Any, ...] = (q, k, v, bias, *masks)
    options: tuple[Any, ...] = (None, 1e-8, False, full, full)
    results = empty_forward(*inputs, *options)
    updates, attn, mean, den = results
    grads = (torch.empty_like(q), torch.empty_like(k), None if v is None else torch.empty_like(v), bias)
    backward = backward_launches(
        (updates, attn if full else None), (updates, mean, den), inputs, options, grads, on
    )  # fmt: skip
    alone = backward_launches(
        (updates, None), (updates, mean, den), inputs, options, (grads[0], None, None, bias), on
    )  # fmt: skip
    calls = empty(3, *q.shape[:-1], 3 * D + 2, dtype=torch.float32)
    shared = inputs_launches(calls, k, v, masks[0], masks[1], 0.1, 1e-8, False, grads[1:3], on)
    return *forward_launches((*inputs, *options), results, on), *backward, *alone, *shared


def aot_variants(lanes: int, full: bool) -> Variants:
    """Launches that cover the kernels: the shapes of the workloads, the widest, every option, and rows out of line."""
    BF16, F16 = torch.bfloat16, torch.float16
    some = (
        (BF16, 7, 64, False), (F16, 10, 512, True), (BF16, 7, 250, False), (F16, 24, 256, False), (BF16, 24, 64, True)
    )  # fmt: skip
    shapes = ((7, 64), (16, 256), (24, 256), (64, 512), (128, 512), (7, 60), (16, 250), (64, 500), (128, 500))
    more = tuple((d, K, D, f) for d in TYPES for K, D in shapes for f in sorted({False, K <= 64}))
    for i, (dtype, K, D, options) in enumerate(more if full else some):
        words = (str(dtype).removeprefix("torch."), f"K{K}", f"D{D}", "everything" * options)
        name, seen = "-".join(filter(None, words)), set()
        for shared in (2**16, 2**17) if full and lanes == 32 else (2**16,):  # every GPU's, and NVIDIA's for servers
            for launch in example(Machine(lanes, 132, shared), dtype, K, D, options):
                apart = options and 2 * K > MOST_ROWS_OF_GROUP  # of joint heads no call leaves dk and dv to one pass
                if apart and (launch.kernel is inputs_backward_kernel or not (full or launch.kernel is joint_kernel)):
                    continue
                kernel = launch.kernel.fn.__name__
                if launch.kernel is inputs_backward_kernel:
                    kernel += f"-{launch.args['BLOCK_D']}"
                elif launch.kernel is backward_kernel and launch.args["dk_ptr"] is None:
                    kernel += "-queries"
                elif launch.kernel is joint_kernel and launch.args["average_ptr"] is not None:
                    kernel += "-gradients"
                # Of the others one is as good as another.
                many = launch.kernel in (forward_kernel, backward_kernel, inputs_backward_kernel, joint_kernel)
                if kernel not in seen and (i == 0 or (many and (full or "queries" not in kernel))):
                    seen.add(kernel)
                    yield Variant(f"{kernel}-{name}", launch, shared=shared)

    for name, launch in triton_iterations.examples(Machine(lanes, 132, 2**16), full):
        yield Variant(f"iterations_kernel-{name}", launch, shared=2**16)


def aot_same(lanes: int) -> SameCompilation:
    """Launches that differ in B and N alone."""
    BF16 = torch.bfloat16
    yield [
        example(Machine(lanes, 132, 2**16), torch.bfloat16, 7, 64, False, B, N)
        for B, N in ((1, 1), (2, 1), (1, 16), (64, 16384))
    ]
    yield [
        (triton_iterations.example(Machine(lanes, 132, 2**16), BF16, 7, 64, 64, True, BF16, B, N),)
        for B, N in ((1, 1), (2, 1), (1, 16), (64, 1024))
    ]
