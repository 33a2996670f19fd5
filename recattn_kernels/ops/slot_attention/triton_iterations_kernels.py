"""The Triton kernel of whole iterations of SlotAttention: one program takes a sample, from its slots to its slots.

Rows of slots are tuples of tiles (ROWS, BLOCK), float32, one for every BLOCK of their width, and 0 beyond it: so are a
weight's tiles, which come from the L2 cache anew for every product. Widths are multiples of 16, so that a lane loads 16
bytes at once. An absent argument is None; all are contiguous.
"""

# mypy: ignore-errors

from __future__ import annotations

from functools import partial

import triton
import triton.language as tl

from recattn_kernels.ops.slot_attention.triton_kernels import (
    competition,
    hint,
    load_rows,
    product,
    rounded,
    sample_rows,
    store_rows,
)
from recattn_kernels.triton_launch import kernel
from recattn_kernels.triton_math import add_tiles, sigmoid, tanh


@triton.jit
def zeros(TILES: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    tiles = ()
    for _ in tl.static_range(TILES):
        tiles += (tl.zeros((ROWS, BLOCK), tl.float32),)
    return tiles


@triton.jit
def load_row(ptr, width, c, otherwise: tl.constexpr, BLOCK: tl.constexpr):
    """Chunk c of one row, which every slot shares; `otherwise` where there is none, and 0 beyond its width."""
    d = c * BLOCK + tl.arange(0, BLOCK)
    if ptr is None:
        row = tl.where(d < width, otherwise, 0.0)
    else:
        row = tl.load(ptr + d, mask=d < width, other=0.0).to(tl.float32)
    return row[None, :]


@triton.jit
def add_row(tiles, ptr, width, BLOCK: tl.constexpr):
    if ptr is not None:
        total = ()
        for c in tl.static_range(len(tiles)):
            total += (tiles[c] + load_row(ptr, width, c, 0.0, BLOCK),)
        tiles = total
    return tiles


@triton.jit
def layer_norm(tiles, weight_ptr, bias_ptr, eps, D, BLOCK: tl.constexpr):
    """(x - mean) / sqrt(variance + eps) * weight + bias"""
    mean = tl.sum(tiles[0], 1)
    for c in tl.static_range(1, len(tiles)):
        mean += tl.sum(tiles[c], 1)
    mean = mean / D
    variance, centred = tl.zeros_like(mean), ()
    for c in tl.static_range(len(tiles)):
        d = c * BLOCK + tl.arange(0, BLOCK)
        tile = tl.where((d < D)[None, :], tiles[c] - mean[:, None], 0.0)
        variance += tl.sum(tile * tile, 1)
        centred += (tile,)
    rstd = 1.0 / tl.sqrt(variance / D + eps)
    normed = ()
    for c in tl.static_range(len(tiles)):
        weight = load_row(weight_ptr, D, c, 1.0, BLOCK)
        normed += (centred[c] * rstd[:, None] * weight + load_row(bias_ptr, D, c, 0.0, BLOCK),)
    return normed


@triton.jit
def linear(
    x, weight_ptr, first, height, width, totals, TRANSPOSED: tl.constexpr, BLOCK: tl.constexpr, TYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """totals + x W^T, W the rows first .. first + height of a weight of that width; TRANSPOSED: x W, W all of it."""
    # A loop of one turn, which the compiler does not know: it would load the weights of all products ahead of the
    # first, and find no registers for them.
    for _ in range(tl.minimum(width, 1)):
        results = ()
        for o in tl.static_range(len(totals)):
            total = totals[o]
            for c in tl.static_range(len(x)):
                if TRANSPOSED:
                    row = c * BLOCK + tl.arange(0, BLOCK)
                    tile = load_rows(weight_ptr, row, width, row < height, width, o, BLOCK)
                else:
                    row = o * BLOCK + tl.arange(0, BLOCK)
                    tile = tl.trans(load_rows(weight_ptr, first + row, width, row < height, width, c, BLOCK))
                total = product(x[c], tile, total, TYPE, PRECISION)
            results += (total,)
        totals = results
    return totals


@triton.jit
def gates_of(
    gate: tl.constexpr, updates, slots, totals, weight_ih_ptr, weight_hh_ptr, bias_ih_ptr, bias_hh_ptr, D,
    BLOCK: tl.constexpr, TYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """sigmoid(W_i updates + b_i + W_h slots + b_h) of one gate"""
    totals = linear(updates, weight_ih_ptr, gate * D, D, D, totals, False, BLOCK, TYPE, PRECISION)
    totals = linear(slots, weight_hh_ptr, gate * D, D, D, totals, False, BLOCK, TYPE, PRECISION)
    totals = add_row(add_row(totals, bias_ih_ptr + gate * D, D, BLOCK), bias_hh_ptr + gate * D, D, BLOCK)
    gates = ()
    for c in tl.static_range(len(totals)):
        gates += (sigmoid(totals[c]),)
    return gates


@triton.jit
def gru(
    updates, slots, zero, weight_ih_ptr, weight_hh_ptr, bias_ih_ptr, bias_hh_ptr, D,
    BLOCK: tl.constexpr, TYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # r, z: gates_of();  n = tanh(W_in updates + b_in + r * (W_hn slots + b_hn));  slots' = (1 - z) * n + z * slots
    r = gates_of(
        0, updates, slots, zero, weight_ih_ptr, weight_hh_ptr, bias_ih_ptr, bias_hh_ptr, D, BLOCK, TYPE, PRECISION
    )  # fmt: skip
    x = linear(updates, weight_ih_ptr, 2 * D, D, D, zero, False, BLOCK, TYPE, PRECISION)
    h = linear(slots, weight_hh_ptr, 2 * D, D, D, zero, False, BLOCK, TYPE, PRECISION)
    x, h = add_row(x, bias_ih_ptr + 2 * D, D, BLOCK), add_row(h, bias_hh_ptr + 2 * D, D, BLOCK)
    z = gates_of(
        1, updates, slots, zero, weight_ih_ptr, weight_hh_ptr, bias_ih_ptr, bias_hh_ptr, D, BLOCK, TYPE, PRECISION
    )  # fmt: skip
    result = ()
    for c in tl.static_range(len(slots)):
        result += ((1.0 - z[c]) * tanh(x[c] + r[c] * h[c]) + z[c] * slots[c],)
    return result


@triton.jit
def mlp(
    x, totals, up_ptr, up_bias_ptr, down_ptr, down_bias_ptr, D, M,
    BLOCK: tl.constexpr, BLOCK_M: tl.constexpr, TYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """totals + W_down relu(W_up x + b_up) + b_down, a part of the hidden layer at a time."""
    totals = add_row(totals, down_bias_ptr, D, BLOCK)
    for part in range(tl.cdiv(M, BLOCK_M)):
        m = part * BLOCK_M + tl.arange(0, BLOCK_M)
        hidden = tl.zeros((x[0].shape[0], BLOCK_M), tl.float32)
        for c in tl.static_range(len(x)):
            tile = load_rows(up_ptr, m, D, m < M, D, c, BLOCK)
            hidden = product(x[c], tl.trans(tile), hidden, TYPE, PRECISION)
        if up_bias_ptr is not None:
            hidden += load_row(up_bias_ptr, M, part, 0.0, BLOCK_M)
        hidden = tl.where(hidden <= 0.0, 0.0, hidden)  # keeps NaN
        after = ()
        for c in tl.static_range(len(totals)):
            row = c * BLOCK + tl.arange(0, BLOCK)
            tile = load_rows(down_ptr, row, M, row < D, M, part, BLOCK_M)
            after += (product(hidden, tl.trans(tile), totals[c], TYPE, PRECISION),)
        totals = after
    return totals


@partial(kernel, aligned=("k_ptr", "v_ptr", "query_ptr", "key_ptr", "value_ptr", "weight_ih_ptr", "weight_hh_ptr"))
def iterations_kernel(
    slots_ptr, k_ptr, v_ptr, slot_mask_ptr, input_mask_ptr, norm_slots_ptr, norm_slots_bias_ptr, query_ptr,
    query_bias_ptr, key_ptr, key_shift_ptr, value_ptr, value_shift_ptr, weight_ih_ptr, weight_hh_ptr, bias_ih_ptr,
    bias_hh_ptr, norm_mlp_ptr, norm_mlp_bias_ptr, up_ptr, up_bias_ptr, down_ptr, down_bias_ptr, out_ptr, attn_ptr,
    scale, eps, ln_eps, T, Z, K, N, D, E, M,
    DENOMINATOR: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK: tl.constexpr, BLOCK_M: tl.constexpr,
    D_TILES: tl.constexpr, E_TILES: tl.constexpr, SCORE_TYPE: tl.constexpr, TYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    # T times:  q = LN(slots) W_q^T + b_q;  with W_key:  bias = scale * q . shift_key, q = q W_key
    # A[k, n] = softmax over k of scale * q[k] . k[n] + bias[k];  mean = sum over n of W v[n], as in forward_kernel
    # updates = mean, or mean W_value^T + shift_value;  slots = GRU(updates, slots), or slots + updates
    # slots = slots + W_down relu(W_up LN(slots) + b_up) + b_down
    sample = tl.program_id(0)
    b, _, first_row, _, exists, valid = sample_rows(slot_mask_ptr, sample, 1, K, 1, ROWS)
    row = first_row + tl.arange(0, ROWS)
    D, E, M = hint(D, True), hint(E, True), hint(M, True)
    k_ptr += b * N * E
    if v_ptr is not None:
        v_ptr += b * N * E
    slots = ()
    for c in tl.static_range(D_TILES):
        slots += (load_rows(slots_ptr, row, D, valid, D, c, BLOCK).to(tl.float32),)
    narrow, wide = zeros(D_TILES, ROWS, BLOCK), zeros(E_TILES, ROWS, BLOCK)
    for i in range(T):
        # Z is 0, which the compiler does not know: it would keep the addresses in all weights from one iteration to the
        # next, and find no registers for them.
        D, E, M = hint(D + Z, True), hint(E + Z, True), hint(M + Z, True)
        x = layer_norm(slots, norm_slots_ptr, norm_slots_bias_ptr, ln_eps, D, BLOCK)
        q = linear(x, query_ptr, 0, D, D, narrow, False, BLOCK, SCORE_TYPE, PRECISION)
        q = add_row(q, query_bias_ptr, D, BLOCK)
        bias = tl.zeros((ROWS,), tl.float32)
        if key_ptr is not None:
            for c in tl.static_range(D_TILES):
                bias += scale * tl.sum(q[c] * load_row(key_shift_ptr, D, c, 0.0, BLOCK), 1)
            q = linear(q, key_ptr, 0, D, E, wide, True, BLOCK, SCORE_TYPE, PRECISION)

        totals, den = wide, tl.zeros((ROWS,), tl.float32)
        for block in range(tl.cdiv(N, BLOCK_N)):
            n = block * BLOCK_N + tl.arange(0, BLOCK_N)
            keep = n < N
            if input_mask_ptr is not None:
                keep &= tl.load(input_mask_ptr + b * N + n, mask=keep, other=0) != 0
            scores, keys = tl.zeros((ROWS, BLOCK_N), tl.float32), ()
            for c in tl.static_range(E_TILES):
                tile = load_rows(k_ptr, n, E, keep, E, c, BLOCK)
                scores = product(q[c], tl.trans(tile), scores, SCORE_TYPE, PRECISION)
                keys += (tile,)
            attn = competition(scores, scale, bias, valid, keep, 0)
            if attn_ptr is not None:
                at = attn_ptr + row[:, None] * N + n[None, :]
                inside = exists[:, None] & (n < N)[None, :] & (i == T - 1)
                tl.store(at, attn.to(attn_ptr.dtype.element_ty), mask=inside)
            weights = attn
            if not DENOMINATOR:
                weights = tl.where(valid[:, None] & keep[None, :], attn + eps, 0.0)
            weights = rounded(weights, TYPE, PRECISION)  # summed as the product has them
            den += tl.sum(weights.to(tl.float32), 1)
            after = ()
            for c in tl.static_range(E_TILES):
                values = keys[c]
                if v_ptr is not None:
                    values = load_rows(v_ptr, n, E, keep, E, c, BLOCK)
                after += (product(weights, values, totals[c], TYPE, PRECISION),)
            totals = after
        if DENOMINATOR:
            den += eps
        some, updates = den != 0.0, ()
        for c in tl.static_range(E_TILES):
            mean = totals[c] / tl.where(some, den, 1.0)[:, None]
            updates += (tl.where(valid[:, None], mean, 0.0),)  # a weight of 0 makes NaN of infinity
        if value_ptr is not None:
            products = linear(updates, value_ptr, 0, D, E, narrow, False, BLOCK, SCORE_TYPE, PRECISION)
            updates = ()
            for c in tl.static_range(D_TILES):
                shift = load_row(value_shift_ptr, D, c, 0.0, BLOCK)
                updates += (products[c] + tl.where(some[:, None], shift, 0.0),)

        if weight_ih_ptr is None:
            slots = add_tiles(slots, updates)
        else:
            slots = gru(
                updates, slots, narrow, weight_ih_ptr, weight_hh_ptr, bias_ih_ptr, bias_hh_ptr, D, BLOCK, SCORE_TYPE,
                PRECISION,
            )  # fmt: skip
        x = layer_norm(slots, norm_mlp_ptr, norm_mlp_bias_ptr, ln_eps, D, BLOCK)
        slots = mlp(
            x, slots, up_ptr, up_bias_ptr, down_ptr, down_bias_ptr, D, M, BLOCK, BLOCK_M, SCORE_TYPE, PRECISION
        )  # fmt: skip
        # In every iteration: beside a loop that stores nothing the compiler would load all weights before it.
        for c in tl.static_range(D_TILES):
            store_rows(out_ptr, row, D, exists, D, c, tl.where(valid[:, None], slots[c], 0.0), BLOCK)
