"""What the launches of slot_attention in Triton share: a program's tile, and the arguments that every kernel takes."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from recattn_kernels import backends
from recattn_kernels.ops.slot_attention.contract import Sizes
from recattn_kernels.strides import contiguous_rows
from recattn_kernels.triton_launch import Machine

TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
REGISTERS = 255
INTERPRETER_BLOCK = 32  # so small that the tests' samples are several blocks


class Tile(NamedTuple):
    rows: int  # the slots of a sample, padded
    block_n: int
    block_d: int
    chunks: int  # of the widest row, each of which has programs of its own
    num_warps: int


def is_narrow(*multiplied: Tensor | None) -> bool:
    """Whether all that is multiplied has the same 16 bits."""
    dtypes = {x.dtype for x in multiplied if x is not None}
    return len(dtypes) == 1 and torch.float32 not in dtypes


def is_aligned(sizes: Sizes, k: Tensor, v: Tensor | None) -> bool:
    """Whether rows begin at multiples of 16 numbers."""
    strides = (stride for x in (k, v) if x is not None for stride in contiguous_rows(x).stride()[:-1])
    return all(size % 16 == 0 for size in (sizes.D, sizes.Dv, *strides))


def common(
    sizes: Sizes, k: Tensor, v: Tensor | None, slot_mask: Tensor | None, input_mask: Tensor | None, eps: float,
    denominator: bool, narrow: bool, tile: Tile, on: Machine,
) -> dict[str, Any]:  # fmt: skip
    arguments = {
        "slot_mask_ptr": as_bytes(slot_mask), "input_mask_ptr": as_bytes(input_mask), "eps": eps, "H": sizes.heads,
        "K": sizes.K, "N": sizes.N, "D": sizes.D, "E": sizes.Dv, "DENOMINATOR": denominator, "CHUNKS": tile.chunks,
        "ROWS": tile.rows, "BLOCK_N": tile.block_n, "BLOCK_D": tile.block_d,
    }  # fmt: skip
    arguments |= (
        products(k, narrow, on)
        | _strided("k", contiguous_rows(k))
        | _strided("v", None if v is None else contiguous_rows(v))
    )
    return arguments | {"ALIGNED": is_aligned(sizes, k, v)}


def products(k: Tensor, narrow: bool, on: Machine) -> dict[str, Any]:
    """What is multiplied in which type."""
    # A is 1e-8 where float16 ends at 6e-8: beside it, the other products are in TF32, which holds all of float16.
    kind = torch.bfloat16 if narrow and k.dtype == torch.bfloat16 else torch.float32
    half = narrow and k.dtype == torch.float16
    score = k.dtype if narrow else torch.float32
    tf32 = half or (k.dtype == torch.float32 and backends.allows_tf32())
    precision = ("interpreted_" if on.interpreted else "") + ("tf32" if tf32 else "ieee")
    return {"SCORE_TYPE": TYPES[score], "TYPE": TYPES[kind], "PRECISION": precision}


def as_bytes(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask.contiguous().view(torch.uint8)


def _strided(name: str, x: Tensor | None) -> dict[str, Any]:
    if x is None:
        return {f"{name}_ptr": None, f"{name}_stride_b": 0, f"{name}_stride_h": 0, f"{name}_stride_n": 0}
    strides = {"b": x.stride(0), "h": x.stride(1) if x.dim() == 4 else 0, "n": x.stride(-2)}
    return {f"{name}_ptr": x} | {f"{name}_stride_{of}": stride for of, stride in strides.items()}
