"""The Triton kernels of slot attention: a program takes a part of one sample's inputs, a block at a time.

A sample is what one softmax goes over: a head, or, where they are joint, the GROUP heads of a row of the batch; its
rows are the slots of its heads, padded to ROWS. Joint heads of more slots are samples too, with the sums that they
share, most, total and average, from triton_joint_kernels.py. Where a width is more than BLOCK_D, each of its chunks has
programs of its own, which all compute A. An absent argument is None. ALIGNED: every row of q, k and v, and of their
gradients, begins at a multiple of 16 numbers, so that a lane loads 16 bytes at once, and ahead of the products.
"""

# mypy: ignore-errors

from __future__ import annotations

from functools import partial

import triton
import triton.language as tl

from recattn_kernels.triton_launch import kernel


@triton.jit
def hint(value, ALIGNED: tl.constexpr):
    # tl.multiple_of says nothing of a kernel's argument.
    return value // 16 * 16 if ALIGNED else value


@triton.jit
def chunks_of(width, CHUNKS: tl.constexpr, BLOCK_D: tl.constexpr):
    """How many a loop goes over. Known only at run time, else it is unrolled and finds no registers."""
    return 1 if CHUNKS == 1 else tl.cdiv(width, BLOCK_D)


@triton.jit
def rounded(x, TYPE: tl.constexpr, PRECISION: tl.constexpr):
    """x in TYPE as a product has it: of float32 in TF32 it drops the last 13 bits."""
    INTERPRETED: tl.constexpr = PRECISION == "interpreted_ieee" or PRECISION == "interpreted_tf32"
    if INTERPRETED and tl.bfloat16 == TYPE and x.dtype == tl.float32:
        # Triton's interpreter cuts bits off: here to the nearest, ties to even.
        bits = x.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
        x = tl.where(x == x, bits.to(tl.float32, bitcast=True), x)
    x = x.to(TYPE)
    if x.dtype == tl.float32 and (PRECISION == "tf32" or PRECISION == "interpreted_tf32"):
        x = (x.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)
    return x


@triton.jit
def product(a, b, total, TYPE: tl.constexpr, PRECISION: tl.constexpr):
    """total + a b, in TYPE, summed in float32."""
    if PRECISION == "interpreted_ieee" or PRECISION == "interpreted_tf32":
        # Triton's interpreter multiplies the bits of bfloat16, and all of those of float32.
        a, b = rounded(a, TYPE, PRECISION), rounded(b, TYPE, PRECISION)
        total = tl.dot(a.to(tl.float32), b.to(tl.float32), total)
    else:
        total = tl.dot(a.to(TYPE), b.to(TYPE), total, input_precision=PRECISION)
    return total


@triton.jit
def of_head(tile, head, h, GROUP: tl.constexpr):
    """The rows of one head; zero elsewhere."""
    if GROUP > 1:
        tile = tl.where((head == h)[:, None], tile, tl.zeros_like(tile))
    return tile


@triton.jit
def product_of_head(a, b, total, head, h, GROUP: tl.constexpr, TYPE: tl.constexpr, PRECISION: tl.constexpr):
    """total + a b in the rows of one head."""
    added = product(a, b, total, TYPE, PRECISION)
    if GROUP > 1:
        added = tl.where((head == h)[:, None], added, total)
    return added


@triton.jit
def load_rows(ptr, row, stride, mask, width, c, BLOCK_D: tl.constexpr):
    """Chunk c of rows of a tensor, zero where they are masked."""
    d = c * BLOCK_D + tl.arange(0, BLOCK_D)
    at = ptr + row.to(tl.int64)[:, None] * stride + d[None, :]
    return tl.load(at, mask=mask[:, None] & (d < width)[None, :], other=0.0)


@triton.jit
def store_rows(ptr, row, stride, mask, width, c, values, BLOCK_D: tl.constexpr):
    d = c * BLOCK_D + tl.arange(0, BLOCK_D)
    at = ptr + row.to(tl.int64)[:, None] * stride + d[None, :]
    tl.store(at, values.to(ptr.dtype.element_ty), mask=mask[:, None] & (d < width)[None, :])


@triton.jit
def sample_rows(slot_mask_ptr, sample, H, K, GROUP: tl.constexpr, ROWS: tl.constexpr):
    """b, the first head, the first of the sample's rows among all; each row's head, and whether it is a slot's."""
    b = (sample * GROUP // H).to(tl.int64)
    r = tl.arange(0, ROWS)
    exists = r < GROUP * K
    valid = exists
    if slot_mask_ptr is not None:
        valid &= tl.load(slot_mask_ptr + b * K + r % K, mask=exists, other=0) != 0
    return b, (sample * GROUP) % H, sample.to(tl.int64) * GROUP * K, r // K, exists, valid


@triton.jit
def competition(scores, scale, bias, valid, keep, SLOTS: tl.constexpr, most=None, total=None):
    """A of a block, whose slots lie along dimension SLOTS. most, total: of all heads', where they are joint."""
    slots, inputs = tl.expand_dims(valid, 1 - SLOTS), tl.expand_dims(keep, SLOTS)
    scores = tl.where(slots, scores * scale + tl.expand_dims(bias, 1 - SLOTS), -float("inf"))
    if most is None:
        most = tl.max(scores, SLOTS)
        most = tl.where(tl.sum(valid.to(tl.int32), 0) > 0, most, 0.0)  # a sample without slots
    e = tl.exp(scores - tl.expand_dims(most, SLOTS))
    if total is None:
        total = tl.sum(e, SLOTS)
    attn = e / tl.expand_dims(total, SLOTS)
    return tl.where(slots & inputs, attn, 0.0)


@triton.jit
def scores_of(
    q, q_ptr, k_ptr, row, head, valid, n, keep, k_stride_h, k_stride_n, D,
    GROUP: tl.constexpr, CHUNKS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, TYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """q . k of a block (ROWS, BLOCK_N), and the first tile of its keys. q: their first chunk."""
    scores = tl.zeros((q.shape[0], BLOCK_N), tl.float32)
    first = load_rows(k_ptr, n, k_stride_n, keep, D, 0, BLOCK_D)
    if GROUP * CHUNKS == 1:
        scores = product(q, tl.trans(first), scores, TYPE, PRECISION)
    else:
        for h in range(GROUP):
            for c in range(chunks_of(D, CHUNKS, BLOCK_D)):
                keys = load_rows(k_ptr + h * k_stride_h, n, k_stride_n, keep, D, c, BLOCK_D)
                queries = load_rows(q_ptr, row, D, valid, D, c, BLOCK_D)
                scores = product_of_head(queries, tl.trans(keys), scores, head, h, GROUP, TYPE, PRECISION)
    return scores, first


@triton.jit
def attention(
    q, q_ptr, k_ptr, most_ptr, total_ptr, row, head, valid, bias, n, keep, k_stride_h, k_stride_n, scale, D,
    GROUP: tl.constexpr, CHUNKS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, TYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """A of a block (ROWS, BLOCK_N), and the first tile of its keys. most, total: joint_kernel's."""
    scores, first = scores_of(
        q, q_ptr, k_ptr, row, head, valid, n, keep, k_stride_h, k_stride_n, D, GROUP, CHUNKS, BLOCK_N, BLOCK_D, TYPE,
        PRECISION,
    )  # fmt: skip
    most, total = None, None
    if most_ptr is not None:
        most = tl.load(most_ptr + n, mask=keep, other=0.0)
        total = tl.load(total_ptr + n, mask=keep, other=1.0)
    return competition(scores, scale, bias, valid, keep, 0, most, total), first


@partial(kernel, aligned=("q_ptr", "k_ptr", "v_ptr", "sums_ptr"))
def forward_kernel(
    q_ptr, k_ptr, v_ptr, bias_ptr, slot_mask_ptr, input_mask_ptr, most_ptr, total_ptr, attn_ptr, sums_ptr, den_ptr,
    scale, eps, H, K, N, D, E, P, k_stride_b, k_stride_h, k_stride_n, v_stride_b, v_stride_h, v_stride_n,
    DENOMINATOR: tl.constexpr, GROUP: tl.constexpr, CHUNKS: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, SCORE_TYPE: tl.constexpr, TYPE: tl.constexpr, PRECISION: tl.constexpr,
    ALIGNED: tl.constexpr,
):  # fmt: skip
    # A[k, n] = softmax over k of scale * q[k] . k[n] + bias[k];  of each part of the inputs
    # sums[k] = sum over n of (A[k, n] + eps) v[n],  den[k] = sum over n of (A[k, n] + eps)
    sample, part, chunk = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    b, first_head, first_row, head, exists, valid = sample_rows(slot_mask_ptr, sample, H, K, GROUP, ROWS)
    row = first_row + tl.arange(0, ROWS)
    D, E = hint(D, ALIGNED), hint(E, ALIGNED)
    k_stride_b, k_stride_h, k_stride_n = hint(k_stride_b, ALIGNED), hint(k_stride_h, ALIGNED), hint(k_stride_n, ALIGNED)
    v_stride_b, v_stride_h, v_stride_n = hint(v_stride_b, ALIGNED), hint(v_stride_h, ALIGNED), hint(v_stride_n, ALIGNED)
    k_ptr += b * k_stride_b + first_head.to(tl.int64) * k_stride_h
    if v_ptr is not None:
        v_ptr += b * v_stride_b + first_head.to(tl.int64) * v_stride_h
    if most_ptr is not None:
        most_ptr += b * N
        total_ptr += b * N
    q = load_rows(q_ptr, row, D, valid, D, 0, BLOCK_D)
    bias = tl.zeros((ROWS,), tl.float32)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + row, mask=valid, other=0.0).to(tl.float32)
    total, den = tl.zeros((ROWS, BLOCK_D), tl.float32), tl.zeros((ROWS,), tl.float32)
    blocks = tl.cdiv(N, BLOCK_N)
    for block in range(blocks * part // P, blocks * (part + 1) // P):
        n = block * BLOCK_N + tl.arange(0, BLOCK_N)
        keep = n < N
        if input_mask_ptr is not None:
            keep &= tl.load(input_mask_ptr + b * N + n, mask=keep, other=0) != 0
        attn, keys = attention(
            q, q_ptr, k_ptr, most_ptr, total_ptr, row, head, valid, bias, n, keep, k_stride_h, k_stride_n, scale, D,
            GROUP, CHUNKS, BLOCK_N, BLOCK_D, SCORE_TYPE, PRECISION,
        )  # fmt: skip
        if attn_ptr is not None:
            at = attn_ptr + row[:, None] * N + n[None, :]
            inside = exists[:, None] & (n < N)[None, :] & (chunk == 0)
            tl.store(at, attn.to(attn_ptr.dtype.element_ty), mask=inside)
        weights = attn
        if not DENOMINATOR:
            weights = tl.where(valid[:, None] & keep[None, :], attn + eps, 0.0)
        # The sum of the weights as the product has them: what rounding does to them cancels.
        weights = rounded(weights, TYPE, PRECISION)
        den += tl.sum(weights.to(tl.float32), 1)
        for h in range(GROUP):
            values = keys
            if v_ptr is not None:
                values = load_rows(v_ptr + h * v_stride_h, n, v_stride_n, keep, E, chunk, BLOCK_D)
            elif GROUP * CHUNKS > 1:
                values = load_rows(k_ptr + h * k_stride_h, n, k_stride_n, keep, E, chunk, BLOCK_D)
            total = product_of_head(weights, values, total, head, h, GROUP, TYPE, PRECISION)
    total = tl.where(valid[:, None], total, 0.0)  # a weight of 0 makes NaN of infinity
    # (samples, parts, rows)
    out = (sample.to(tl.int64) * P + part) * GROUP * K + tl.arange(0, ROWS)
    store_rows(sums_ptr, out, E, exists, E, chunk, total, BLOCK_D)
    tl.store(den_ptr + out, den, mask=exists & (chunk == 0))


@kernel
def finish_forward_kernel(
    sums_ptr, sums_den_ptr, updates_ptr, mean_ptr, den_ptr, eps, R, E, P, DENOMINATOR: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    # updates = sum of the parts' sums / den;  R rows a sample
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    d = chunk * BLOCK_D + tl.arange(0, BLOCK_D)
    at = row // R * P * R + row % R
    total, den = tl.zeros((BLOCK_D,), tl.float32), 0.0
    for part in range(P):
        total += tl.load(sums_ptr + (at + part * R) * E + d, mask=d < E, other=0.0)
        den += tl.load(sums_den_ptr + at + part * R)
    if DENOMINATOR:
        den += eps
    total = total / tl.where(den == 0.0, 1.0, den)
    tl.store(updates_ptr + row * E + d, total.to(updates_ptr.dtype.element_ty), mask=d < E)
    if mean_ptr is not None:
        tl.store(mean_ptr + row * E + d, total, mask=d < E)
    tl.store(den_ptr + row, den, mask=chunk == 0)


@triton.jit
def flow(
    du_ptr, den, row, stride, valid, E, c, BLOCK_D: tl.constexpr, TYPE: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """g = dupdates / den of a chunk, rounded as the products round it: then g . v - g . updates loses nothing."""
    du = load_rows(du_ptr, row, stride, valid, E, c, BLOCK_D).to(tl.float32)
    g = tl.where((den == 0.0)[:, None], 0.0, du / tl.where(den == 0.0, 1.0, den)[:, None])
    return rounded(g, TYPE, PRECISION)


@triton.jit
def delta_of(
    du_ptr, updates_ptr, den, row, valid, E, CHUNKS: tl.constexpr, BLOCK_D: tl.constexpr, TYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """g . updates"""
    delta = tl.zeros_like(den)
    for c in range(chunks_of(E, CHUNKS, BLOCK_D)):
        g = flow(du_ptr, den, row, E, valid, E, c, BLOCK_D, TYPE, PRECISION)
        updates = load_rows(updates_ptr, row, E, valid, E, c, BLOCK_D)
        delta += tl.sum(g.to(tl.float32) * updates, 1)
    return delta


@triton.jit
def gradient_of_attention(
    keys, own_g, du_ptr, dattn_ptr, v_ptr, k_ptr, den, delta, row, head, valid, n, keep, v_stride_h, v_stride_n,
    k_stride_h, k_stride_n, N, E, GROUP: tl.constexpr, CHUNKS: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, TYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dA of a block: g . v - delta + dattn. keys, own_g: first chunks."""
    grad = tl.zeros((own_g.shape[0], BLOCK_N), tl.float32)
    if du_ptr is not None:
        for h in range(GROUP):
            for c in range(chunks_of(E, CHUNKS, BLOCK_D)):
                values, g_c = keys, own_g
                if v_ptr is not None:
                    values = load_rows(v_ptr + h * v_stride_h, n, v_stride_n, keep, E, c, BLOCK_D)
                elif GROUP * CHUNKS > 1:
                    values = load_rows(k_ptr + h * k_stride_h, n, k_stride_n, keep, E, c, BLOCK_D)
                if CHUNKS > 1:
                    g_c = flow(du_ptr, den, row, E, valid, E, c, BLOCK_D, TYPE, PRECISION)
                grad = product_of_head(g_c, tl.trans(values), grad, head, h, GROUP, TYPE, PRECISION)
        grad -= delta[:, None]
    if dattn_ptr is not None:
        at = dattn_ptr + row[:, None] * N + n[None, :]
        grad += tl.load(at, mask=valid[:, None] & keep[None, :], other=0.0).to(tl.float32)
    return grad


@partial(
    kernel, aligned=("q_ptr", "k_ptr", "v_ptr", "updates_ptr", "du_ptr", "dk_ptr", "dv_ptr", "sums_ptr")
)  # fmt: skip
def backward_kernel(
    q_ptr, k_ptr, v_ptr, bias_ptr, slot_mask_ptr, input_mask_ptr, most_ptr, total_ptr, average_ptr, updates_ptr,
    den_ptr, du_ptr, dattn_ptr, dk_ptr, dv_ptr, sums_ptr, sums_bias_ptr, scale, eps, H, K, N, D, E, P,
    k_stride_b, k_stride_h, k_stride_n, v_stride_b, v_stride_h, v_stride_n,
    DENOMINATOR: tl.constexpr, GROUP: tl.constexpr, CHUNKS: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, SCORE_TYPE: tl.constexpr, TYPE: tl.constexpr, PRECISION: tl.constexpr,
    ALIGNED: tl.constexpr,
):  # fmt: skip
    # g = dupdates / den;  dA[k, n] = g[k] . v[n] - g[k] . updates[k] + dattn[k, n]
    # dS = A * (dA - sum over j of A[j, n] dA[j, n])
    # dv[n] = sum over k of (A + eps) g[k];  dk[n] = scale * sum over k of dS q[k];  of each part of the inputs
    # sums[k] = sum over n of dS k[n],  sums_bias[k] = sum over n of dS
    sample, part, chunk = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    b, first_head, first_row, head, exists, valid = sample_rows(slot_mask_ptr, sample, H, K, GROUP, ROWS)
    row = first_row + tl.arange(0, ROWS)
    D, E = hint(D, ALIGNED), hint(E, ALIGNED)
    k_stride_b, k_stride_h, k_stride_n = hint(k_stride_b, ALIGNED), hint(k_stride_h, ALIGNED), hint(k_stride_n, ALIGNED)
    v_stride_b, v_stride_h, v_stride_n = hint(v_stride_b, ALIGNED), hint(v_stride_h, ALIGNED), hint(v_stride_n, ALIGNED)
    out_head = b * H + first_head
    k_ptr += b * k_stride_b + first_head.to(tl.int64) * k_stride_h
    if v_ptr is not None:
        v_ptr += b * v_stride_b + first_head.to(tl.int64) * v_stride_h
    if most_ptr is not None:
        most_ptr += b * N
        total_ptr += b * N
        average_ptr += b * N
    q = load_rows(q_ptr, row, D, valid, D, 0, BLOCK_D)
    own_q, own_g = q, q
    den, delta = None, None
    if CHUNKS > 1:
        own_q = load_rows(q_ptr, row, D, valid, D, chunk, BLOCK_D)
    bias = tl.zeros((ROWS,), tl.float32)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + row, mask=valid, other=0.0).to(tl.float32)
    if du_ptr is not None:
        den = tl.load(den_ptr + row, mask=valid, other=0.0)
        delta = delta_of(du_ptr, updates_ptr, den, row, valid, E, CHUNKS, BLOCK_D, TYPE, PRECISION)
        own_g = flow(du_ptr, den, row, E, valid, E, chunk, BLOCK_D, TYPE, PRECISION)
    total, bias_total = tl.zeros((ROWS, BLOCK_D), tl.float32), tl.zeros((ROWS,), tl.float32)
    blocks = tl.cdiv(N, BLOCK_N)
    for block in range(blocks * part // P, blocks * (part + 1) // P):
        n = block * BLOCK_N + tl.arange(0, BLOCK_N)
        keep = n < N
        if input_mask_ptr is not None:
            keep &= tl.load(input_mask_ptr + b * N + n, mask=keep, other=0) != 0
        attn, keys = attention(
            q, q_ptr, k_ptr, most_ptr, total_ptr, row, head, valid, bias, n, keep, k_stride_h, k_stride_n, scale, D,
            GROUP, CHUNKS, BLOCK_N, BLOCK_D, SCORE_TYPE, PRECISION,
        )  # fmt: skip
        grad = gradient_of_attention(
            keys, own_g, du_ptr, dattn_ptr, v_ptr, k_ptr, den, delta, row, head, valid, n, keep, v_stride_h, v_stride_n,
            k_stride_h, k_stride_n, N, E, GROUP, CHUNKS, BLOCK_N, BLOCK_D, TYPE, PRECISION,
        )  # fmt: skip
        average = tl.sum(attn * grad, 0)
        if most_ptr is not None:
            average = tl.load(average_ptr + n, mask=keep, other=0.0)
        ds = attn * (grad - average[None, :])
        bias_total += tl.sum(ds, 1)
        weights = attn
        if not DENOMINATOR:
            weights = tl.where(valid[:, None] & keep[None, :], attn + eps, 0.0)
        for h in range(GROUP):
            if sums_ptr is not None:
                own_keys = keys
                if GROUP * CHUNKS > 1:
                    own_keys = load_rows(k_ptr + h * k_stride_h, n, k_stride_n, keep, D, chunk, BLOCK_D)
                total = product_of_head(ds, own_keys, total, head, h, GROUP, TYPE, PRECISION)
            zero = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
            out_row = n + (out_head + h) * N
            if dv_ptr is not None or (dk_ptr is not None and v_ptr is None):
                dv = zero
                if du_ptr is not None:
                    dv = product(tl.trans(of_head(weights, head, h, GROUP)), own_g, zero, TYPE, PRECISION)
                if dv_ptr is not None:
                    store_rows(dv_ptr, out_row, E, n < N, E, chunk, dv, BLOCK_D)
            if dk_ptr is not None:
                dk = product(tl.trans(of_head(ds, head, h, GROUP)), own_q, zero, TYPE, PRECISION) * scale
                if v_ptr is None:
                    dk += dv
                store_rows(dk_ptr, out_row, D, n < N, D, chunk, dk, BLOCK_D)
    out = (sample.to(tl.int64) * P + part) * GROUP * K + tl.arange(0, ROWS)
    if sums_ptr is not None:
        store_rows(sums_ptr, out, D, exists, D, chunk, total, BLOCK_D)
    if sums_bias_ptr is not None:
        tl.store(sums_bias_ptr + out, bias_total, mask=exists & (chunk == 0))


@kernel
def sum_parts_kernel(sums_ptr, out_ptr, scale, R, D, P, BLOCK_D: tl.constexpr):
    # out = scale * sum of the parts' sums;  R rows a sample
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    d = chunk * BLOCK_D + tl.arange(0, BLOCK_D)
    at = row // R * P * R + row % R
    total = tl.zeros((BLOCK_D,), tl.float32)
    for part in range(P):
        total += tl.load(sums_ptr + (at + part * R) * D + d, mask=d < D, other=0.0)
    tl.store(out_ptr + row * D + d, (total * scale).to(out_ptr.dtype.element_ty), mask=d < D)
