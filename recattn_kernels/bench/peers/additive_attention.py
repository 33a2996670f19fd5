"""Beside additive_attention: how captioning code has it, and a decoder's whole step, which projects the keys or not."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recattn_kernels.bench.peers.case import PEER_SLACK, Case, Impl, compiled

HIDDEN = 512  # of the decoder, and of its words


def peers(case: Case, definition: Callable[..., Any]) -> list[Impl]:
    impls = [case.impl("compile", compiled(definition), definition=definition)] if case.compile else []
    impls.append(case.impl("broadcast", _broadcast, definition=definition))
    return impls + _steps(case)


def _broadcast(query: Tensor, keys: Tensor, weight: Tensor, values: Tensor) -> Tensor:
    e = F.linear(torch.tanh(keys + query.unsqueeze(1)), weight.unsqueeze(0)).squeeze(2)
    return (torch.softmax(e, 1).unsqueeze(2) * values).sum(1)


def _steps(case: Case) -> list[Impl]:
    """A word, h and c in, h and c out; differentiated by what came in."""
    from recattn_kernels.layers.additive_attention import AttentionLSTMCell

    B, N, A, D = (case.workload.sizes[name] for name in "BNAD")
    factory: Mapping[str, Any] = {"device": case.device, "dtype": case.dtype}
    torch.manual_seed(0)
    cell = AttentionLSTMCell(HIDDEN, HIDDEN, D, A, **factory).requires_grad_(False)
    lstm = nn.LSTMCell(HIDDEN + D, HIDDEN, **factory).requires_grad_(False)
    lstm.load_state_dict(cell.lstm.state_dict())
    word, h, c = (torch.randn(B, HIDDEN, **factory).requires_grad_() for _ in range(3))
    features = case.args[3].detach()
    projected = cell.precompute(features)

    def ours(word: Tensor, h: Tensor, c: Tensor, *_: Tensor) -> Any:
        return cell(word, (h, c), features, projected=projected)[:2]

    def projecting(word: Tensor, h: Tensor, c: Tensor, *_: Tensor) -> Any:
        attention = cell.attention
        keys = attention.project_keys(features)
        context = _broadcast(attention.project_query(h), keys, attention.weight, features)
        assert cell.gate is not None
        context = torch.sigmoid(cell.gate(h)) * context
        return lstm(torch.cat((word, context), 1), (h, c))

    names = ("attention.project_query.weight", "attention.weight", "gate.weight", "gate.bias")
    lstm_names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    parameters = [cell.get_parameter(name) for name in (*names, *(f"lstm.{name}" for name in lstm_names))]
    args = (word, h, c, features, projected, *parameters)
    weights = sum(p.numel() for p in parameters)

    def cost(backward: bool) -> tuple[int, int]:
        moved = B * N * (A + D) + weights + 5 * B * HIDDEN
        flops = B * N * (4 * A + 2 * D) + 2 * B * weights
        return (2 if backward else 1) * moved * case.dtype.itemsize, (2 if backward else 1) * flops

    return [
        Impl("step:precomputed", functools.partial(ours, *args), args, definition=_step, cost=cost, ours=True),
        Impl(
            "step:projecting", functools.partial(projecting, *args), args, definition=_step, slack=PEER_SLACK, cost=cost
        ),
    ]


def _step(
    word: Tensor, h: Tensor, c: Tensor, features: Tensor, projected: Tensor, w_query: Tensor, weight: Tensor,
    w_gate: Tensor, b_gate: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor, b_hh: Tensor,
) -> Any:  # fmt: skip
    """A step in plain PyTorch, of the keys' projection."""
    context = torch.sigmoid(F.linear(h, w_gate, b_gate)) * _broadcast(F.linear(h, w_query), projected, weight, features)
    i, f, g, o = (F.linear(torch.cat((word, context), 1), w_ih, b_ih) + F.linear(h, w_hh, b_hh)).chunk(4, 1)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c
