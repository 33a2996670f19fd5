"""Whole iterations of SlotAttention in Triton: configuration and launch. Kernel: triton_iterations_kernels.py."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from recattn_kernels.ops.slot_attention.contract import Sizes
from recattn_kernels.ops.slot_attention.iterations import Options, Weights, empty
from recattn_kernels.ops.slot_attention.triton_arguments import INTERPRETER_BLOCK, REGISTERS, Tile, common, is_narrow
from recattn_kernels.ops.slot_attention.triton_iterations_kernels import iterations_kernel
from recattn_kernels.triton_launch import Launch, Machine, guard, machine


def launch_of(
    slots: Tensor, k: Tensor, v: Tensor | None, slot_mask: Tensor | None, input_mask: Tensor | None,
    weights: Sequence[Tensor | None], options: Options, results: tuple[Tensor, Tensor], on: Machine,
) -> Launch:  # fmt: skip
    out, attn = results
    (B, K, D), (N, E) = slots.shape, k.shape[1:]
    given = Weights(*(None if w is None else w.contiguous() for w in weights))  # type: ignore[arg-type]
    M = given.up.shape[0]
    narrow, rows = is_narrow(k, v), max(16, triton.next_power_of_2(K))
    widest = max(16, triton.next_power_of_2(max(D, E)))
    block = min(widest, 64 if narrow else 16)
    block_n = 32 if narrow else 16
    if on.interpreted:
        block, block_n = min(widest, 16), INTERPRETER_BLOCK
    import os
    warps = 8
    if "CFG" in os.environ:
        block, block_n, warps = map(int, os.environ["CFG"].split(","))
        block = min(block, widest)
    tile = Tile(rows, block_n, block, 1, warps)
    shared = common(
        Sizes(B, 1, K, N, D, E), k, v, slot_mask, input_mask, options.eps, options.denominator, narrow, tile, on
    )  # fmt: skip
    for name in ("H", "CHUNKS", "BLOCK_D", "k_stride_h", "v_stride_h"):
        del shared[name]
    arguments = shared | {f"{name}_ptr": weight for name, weight in given._asdict().items()} | {
        "slots_ptr": slots.contiguous(), "out_ptr": out, "attn_ptr": attn if options.return_attn else None,
        "scale": options.scale, "ln_eps": options.ln_eps, "T": options.times, "M": M,
        "ALIGNED": shared["ALIGNED"] and M % 16 == 0, "BLOCK": block, "BLOCK_M": block,
        "D_TILES": triton.cdiv(D, block), "E_TILES": triton.cdiv(E, block),
    }  # fmt: skip
    return Launch(iterations_kernel, (B,), arguments, tile.num_warps, REGISTERS, num_stages=1)


def run(*args: Any) -> tuple[Tensor, Tensor]:
    inputs, options = args[:6], Options(*args[6:])
    results = empty(*args)
    if results[0].numel() > 0:
        with guard(inputs[0]):
            launch_of(*inputs, options, results, machine(inputs[0])).run()
    return results
