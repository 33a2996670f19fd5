"""SlotAttention against the iterations written out here, its presets and converters, and as a citizen of torch.nn."""

from __future__ import annotations

import copy
import io
import math
import pickle
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recattn_kernels import BackendUnavailableError, SlotAttention, use_backend
from recattn_kernels.layers import slot_attention_inputs
from recattn_kernels.layers.slot_attention_inputs import absorbs

B, N, K, D, D_IN = 3, 40, 4, 8, 6


def make(*args: Any, **options: Any) -> SlotAttention:
    """A layer in float64, whose parameters are all random."""
    layer = SlotAttention(*(args or (K, D)), dtype=torch.float64, **options)
    with torch.no_grad():
        for name, p in layer.named_parameters():
            p.normal_(1.0 if "norm" in name and "weight" in name else 0.0, 0.5)
    return layer


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64).requires_grad_()


def some(*shape: int) -> Tensor:
    """A mask with about two thirds True, the first row all, the last none."""
    mask = torch.rand(*shape) < 0.67
    mask[0], mask[-1] = True, False
    return mask


def plain(
    layer: SlotAttention, inputs: Tensor, slots: Tensor, slot_mask: Tensor | None = None,
    input_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The definition, head by head and sample by sample; masked slots and inputs are taken out."""
    p, h = dict(layer.named_parameters()), layer.heads

    def norm(x: Tensor, name: str) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        deviation = (centred.square().mean(-1, keepdim=True) + layer.ln_eps).sqrt()
        return centred / deviation * p[f"{name}.weight"] + p[f"{name}.bias"]

    def linear(x: Tensor, name: str) -> Tensor:
        y = x @ p[f"{name}.weight"].T
        return y + p[f"{name}.bias"] if f"{name}.bias" in p else y

    def gru(x: Tensor, state: Tensor) -> Tensor:
        gates = x @ p["gru.weight_ih"].T + p["gru.bias_ih"], state @ p["gru.weight_hh"].T + p["gru.bias_hh"]
        (r, z, n), (r_h, z_h, n_h) = (g.chunk(3, -1) for g in gates)
        z = torch.sigmoid(z + z_h)
        return (1 - z) * torch.tanh(n + torch.sigmoid(r + r_h) * n_h) + z * state

    def sample(x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        x = norm(x, "norm_inputs")
        k, v = (linear(x, name).view(len(x), h, D // h) for name in ("project_k", "project_v"))
        initial = state
        for i in range(layer.iters):
            if layer.grad_mode != "full" and i == layer.iters - 1:
                state = state.detach()
                if layer.grad_mode == "bi-level":
                    state = state + initial - initial.detach()
            q = linear(norm(state, "norm_slots"), "project_q").view(len(state), h, -1)
            logits = torch.einsum("khd,nhd->hkn", q, k) / (layer.temperature * math.sqrt(layer.dim / h))
            joint = layer.head_softmax == "joint"
            attn = logits.exp() / logits.exp().sum((0, 1) if joint else 1, keepdim=True)
            if layer.eps_mode == "add":
                weights = (attn + layer.eps) / (attn + layer.eps).sum(-1, keepdim=True)
            else:
                weights = attn / (attn.sum(-1, keepdim=True) + layer.eps)
            updates = torch.einsum("hkn,nhd->khd", weights, v).flatten(1)
            state = state + updates if layer.update == "residual" else gru(updates, state)
            hidden = linear(norm(state, "norm_mlp"), "mlp.0").relu()
            state = state + linear(hidden, "mlp.2")
        return state, attn

    result = torch.zeros_like(slots)
    attns = inputs.new_zeros(len(inputs), h, slots.shape[1], inputs.shape[1])
    for b in range(len(inputs)):
        rows = torch.arange(slots.shape[1]) if slot_mask is None else slot_mask[b].nonzero().flatten()
        columns = torch.arange(inputs.shape[1]) if input_mask is None else input_mask[b].nonzero().flatten()
        if len(rows):
            state, attn = sample(inputs[b, columns], slots[b, rows])
            result = result.index_put((torch.tensor(b), rows), state)
            attns = attns.index_put((torch.tensor(b), torch.arange(h)[:, None, None], rows[:, None], columns), attn)
    return result, attns.squeeze(1) if h == 1 else attns


def grads(outputs: tuple[Tensor, ...], inputs: list[Tensor]) -> tuple[Tensor, ...]:
    weights = [torch.linspace(-1, 1, t.numel(), dtype=t.dtype).mul(7).sin().view(t.shape) for t in outputs]
    loss = sum((t * w).sum() for t, w in zip(outputs, weights, strict=True))
    return torch.autograd.grad(loss, inputs, materialize_grads=True)


OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "bias": {"bias": True, "input_dim": D_IN, "temperature": 0.5, "eps": 1e-2, "ln_eps": 1e-3},
    "denominator": {"bias": True, "eps_mode": "denominator", "eps": 1e-2},
    "heads": {"heads": 4, "bias": True, "mlp_dim": 5},
    "joint": {"heads": 2, "bias": True, "head_softmax": "joint", "input_dim": D_IN, "eps": 1e-2},
    "residual": {"update": "residual", "iters": 2},
    "fixed-point": {"grad_mode": "fixed-point"},
    "bi-level": {"grad_mode": "bi-level", "bias": True},
}


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", OPTIONS)
def test_agrees_with_plain_iterations(name: str, masked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = make(**OPTIONS[name])
    inputs, slots = randn(B, N, layer.input_dim), randn(B, K, D)
    masks = {"slot_mask": some(B, K), "input_mask": some(B, N).flip(0)} if masked else {}
    wanted = [inputs, slots, *layer.parameters()]
    expected = plain(layer, inputs, slots, **masks)
    expected = *expected, *grads(expected, wanted)
    absorbed = []
    for cost in (1e9, 0.0):  # keys and values, or none, in so far as they can be absorbed
        monkeypatch.setattr(slot_attention_inputs, "ATTENTION_COST", cost)
        absorbed.append(absorbs(layer, N, K))
        outputs = layer(inputs, slots, **masks, return_attn=True)
        torch.testing.assert_close((*outputs, *grads(outputs, wanted)), expected)
        torch.testing.assert_close(layer(inputs, slots, **masks), outputs[0])
    if name in ("bias", "joint", "default", "residual", "fixed-point", "bi-level"):
        assert absorbed[1]
    if name in ("denominator", "heads"):
        assert absorbed == [False, False]
