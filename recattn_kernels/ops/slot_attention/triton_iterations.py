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


def example(
    on: Machine, dtype: torch.dtype, K: int, D: int, E: int, full: bool, of_weights: torch.dtype, B: int = 3,
    N: int = 1000,
) -> Launch:  # fmt: skip
    """What a call on the meta device launches; full: with every option and absorbed projections, else with none."""

    def empty_of(*shape: int, dtype: torch.dtype = of_weights) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    row, square, weight = empty_of(D), empty_of(D, D), empty_of(D, E)
    slots, k = empty_of(B, K, D), empty_of(B, N, E, dtype=dtype)
    gates = (empty_of(3 * D, D), empty_of(3 * D, D), empty_of(3 * D), empty_of(3 * D))
    absorbed = (weight, row, weight, row) if full else (None, None, None, None)
    weights: Any = (
        row, row, square, row if full else None, *absorbed, *gates,
        row, row, empty_of(128, D), empty_of(128), empty_of(D, 128), row,
    )  # fmt: skip
    masks = (empty_of(B, K, dtype=torch.bool), empty_of(B, N, dtype=torch.bool))
    slot_mask, input_mask = masks if full else (None, None)
    options = Options(0.1, 1e-8, False, 1e-5, 3, full, of_weights)
    v = None if full else empty_of(B, N, E, dtype=dtype)
    results = empty(slots, k, v, slot_mask, input_mask, weights, *options)
    return launch_of(slots, k, v, slot_mask, input_mask, weights, options, results, on)


def examples(on: Machine, full: bool) -> Iterator[tuple[str, Launch]]:
    """Names and launches that cover the kernel: most slots and features of each type, float32 weights of autocast."""
    F32, BF16, F16 = MOST
    shapes = [(BF16, 7, 64, 64, True, BF16)]
    if full:
        for dtype, most in MOST.items():
            shapes += [(dtype, 7, most // 16, most // 16, options, dtype) for options in (False, True)]
            if on.lanes == 32:  # more slots than AMD takes
                shapes += [(dtype, 24, most // 32, most // 32, options, dtype) for options in (False, True)]
        shapes += [(BF16, 7, 48, 128, True, BF16), (BF16, 7, 128, 128, True, F32), (F16, 7, 128, 128, False, F32)]
        shapes += [(BF16, 24, 64, 64, True, F32)] if on.lanes == 32 else []
    for dtype, K, D, E, options, of_weights in shapes:
        words = (str(dtype).removeprefix("torch."), f"K{K}", f"D{D}", f"E{E}", "everything" * options)
        name = "-".join(filter(None, (*words, "autocast" * (dtype != of_weights))))
        yield name, example(on, dtype, K, D, E, options, of_weights)
