"""Beside slot_attention: torch.compile of the reference, the einsum that models are written with, eager and compiled,
and flash attention with one channel more."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from recattn_kernels.bench.peers.case import PEER_SLACK, Case, Impl, compiled
from recattn_kernels.bench.peers.slot_attention_layer import layers


def peers(case: Case, definition: Callable[..., Any]) -> list[Impl]:
    impls = []
    if case.compile:
        impls.append(case.impl("compile", compiled(definition), definition=definition))
    others = {"einsum": einsum, "compile einsum": compiled(einsum), "flash + lse": flash, "FlexAttention": flex}
    if not case.compile:
        del others["compile einsum"]
    if not case.compile or case.device != "cuda":
        del others["FlexAttention"]
    impls += [case.impl(n, call, definition=definition, slack=PEER_SLACK) for n, call in others.items()]
    return [*impls, *layers(case)]


def einsum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """As the official implementation has it: the softmax over the slots as the last dimension."""
    attn = torch.einsum("bnd,bkd->bnk", k, q * q.shape[-1] ** -0.5).softmax(-1).float() + 1e-8
    weights = attn / attn.sum(1, keepdim=True)
    return torch.einsum("bnk,bnd->bkd", weights.to(v.dtype), v)


def normaliser(q: Tensor, k: Tensor) -> Tensor:
    """-log sum over k of exp(scale * q[k] . k[n]), (B, N, 1)."""
    logits = torch.matmul(k, (q * q.shape[-1] ** -0.5).transpose(-1, -2))
    return -logits.float().logsumexp(-1, keepdim=True).to(q.dtype)


def flash(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention over the inputs, eps left out: its softmax over n of scale * q[k] . k[n] - lse[n] is W. The lse is one
    channel more of the keys, beside which the query has a 1; seven more of zeros keep rows aligned."""
    B, K, D = q.shape
    scale = D**-0.5
    more = torch.cat([normaliser(q, k), k.new_zeros(B, k.shape[1], 7)], -1)
    one = torch.cat([q.new_ones(B, K, 1), q.new_zeros(B, K, 7)], -1)
    queries, keys = torch.cat([q * scale, one], -1), torch.cat([k, more], -1)
    values = F.pad(v, (0, 8))
    attend = F.scaled_dot_product_attention(queries[:, None], keys[:, None], values[:, None], scale=1.0)
    return attend[:, 0, :, : v.shape[-1]]


@functools.cache
def _flex() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    result: Callable[..., Any] = torch.compile(flex_attention, dynamic=False)
    return result


def flex(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The same, the lse as the score's modification."""
    lse = normaliser(q, k)[..., 0]

    def shifted(score: Tensor, b: Tensor, h: Tensor, i: Tensor, n: Tensor) -> Tensor:
        return score + lse[b, n]

    output: Tensor = _flex()(q[:, None], k[:, None], v[:, None], score_mod=shifted)
    return output[:, 0]
