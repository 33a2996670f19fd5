"""Whole iterations of SlotAttention in Triton: configuration and launch. Kernel: triton_iterations_kernels.py."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from recattn_kernels.ops.slot_attention.iterations import MOST, Options, Weights, empty
from recattn_kernels.ops.slot_attention.triton_arguments import (
    INTERPRETER_BLOCK,
    REGISTERS,
    Tile,
    as_bytes,
    is_narrow,
    products,
)
from recattn_kernels.ops.slot_attention.triton_iterations_kernels import iterations_kernel
from recattn_kernels.strides import contiguous
from recattn_kernels.triton_launch import Launch, Machine, guard, machine


def plan(k: Tensor, v: Tensor | None, K: int, D: int, on: Machine) -> Tile:
    """What the registers hold, as tests/test_aot.py finds it: see triton.py."""
    rows, widest = max(16, triton.next_power_of_2(K)), max(16, triton.next_power_of_2(max(D, k.shape[2])))
    if on.interpreted:
        return Tile(rows, INTERPRETER_BLOCK, min(widest, 32), 1, 4)
    block_n, block = (32, 64) if is_narrow(k, v) else (16, 32)
    return Tile(rows, block_n, min(widest, block), 1, 4 if on.lanes == 64 else 8)


def launch_of(
    slots: Tensor, k: Tensor, v: Tensor | None, slot_mask: Tensor | None, input_mask: Tensor | None,
    weights: Sequence[Tensor | None], options: Options, results: tuple[Tensor, Tensor], on: Machine,
) -> Launch:  # fmt: skip
    out, attn = results
    (B, K, D), (N, E) = slots.shape, k.shape[1:]
    tile = plan(k, v, K, D, on)
    given: dict[str, Any] = {f"{name}_ptr": contiguous(w) for name, w in zip(Weights._fields, weights, strict=True)}
    own = {
        "slots_ptr": slots.contiguous(), "k_ptr": k.contiguous(), "v_ptr": contiguous(v),
        "slot_mask_ptr": as_bytes(slot_mask), "input_mask_ptr": as_bytes(input_mask), "out_ptr": out,
        "attn_ptr": attn if options.return_attn else None, "scale": options.scale, "eps": options.eps,
        "ln_eps": options.ln_eps, "T": options.times, "Z": 0, "K": K, "N": N, "D": D, "E": E,
        "M": given["up_ptr"].shape[0], "DENOMINATOR": options.denominator, "ROWS": tile.rows,
        "BLOCK_N": tile.block_n, "BLOCK": tile.block_d, "BLOCK_M": tile.block_d,
        "D_TILES": triton.cdiv(D, tile.block_d), "E_TILES": triton.cdiv(E, tile.block_d),
    }  # fmt: skip
    arguments = own | given | products(k, is_narrow(k, v), on)
    return Launch(iterations_kernel, (B,), arguments, tile.num_warps, REGISTERS)


def run(*args: Any) -> tuple[Tensor, Tensor]:
    slots, k, v, slot_mask, input_mask, weights = args[:6]
    results = empty(*args)
    if slots.numel() > 0:
        with guard(slots):
            options = Options(*args[6:])
            launch_of(slots, k, v, slot_mask, input_mask, weights, options, results, machine(slots)).run()
    return results


def example(on: Machine, dtype: torch.dtype, K: int, D: int, E: int, full: bool, B: int = 3, N: int = 1000) -> Launch:
    """What a call on the meta device launches; full: with every option and absorbed projections, else with none."""

    def empty_of(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    row, square, weight = empty_of(D), empty_of(D, D), empty_of(D, E)
    slots, k = empty_of(B, K, D), empty_of(B, N, E)
    gates = (empty_of(3 * D, D), empty_of(3 * D, D), empty_of(3 * D), empty_of(3 * D))
    absorbed = (weight, row, weight, row) if full else (None, None, None, None)
    weights = Weights(
        row, row, square, row if full else None, *absorbed, *gates,
        row, row, empty_of(128, D), empty_of(128), empty_of(D, 128), row,
    )  # fmt: skip
    masks = (torch.empty(B, K, dtype=torch.bool, device="meta"), torch.empty(B, N, dtype=torch.bool, device="meta"))
    slot_mask, input_mask = masks if full else (None, None)
    options = Options(0.1, 1e-8, False, 1e-5, 3, full, dtype)
    v = None if full else empty_of(B, N, E)
    results = empty(slots, k, v, slot_mask, input_mask, weights, *options)
    return launch_of(slots, k, v, slot_mask, input_mask, weights, options, results, on)


def examples(on: Machine, full: bool) -> Iterator[tuple[str, Launch]]:
    """Names and launches that cover the kernel: the most slots and features of each type."""
    shapes = [(torch.bfloat16, 7, 64, 64, True)]
    if full:
        for dtype, most in MOST.items():
            shapes += [(dtype, 7, most // 16, most // 16, options) for options in (False, True)]
            shapes += [(dtype, 7, 48, most // 16, True)]
            shapes += [(dtype, 24, most // 32, most // 32, options) for options in (False, True) if on.lanes == 32]
    for dtype, K, D, E, options in shapes:
        words = (str(dtype).removeprefix("torch."), f"K{K}", f"D{D}", f"E{E}", "everything" * options)
        yield "-".join(filter(None, words)), example(on, dtype, K, D, E, options)
