"""Beside slot_attention: the layer of three iterations, and the same as the official implementation is written."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from recattn_kernels.bench.peers.case import Case, Impl, compiled

ITERATIONS = 3


def layers(case: Case) -> list[Impl]:
    from recattn_kernels.layers.slot_attention import SlotAttention

    B, N, K, D = (case.workload.sizes[name] for name in "BNKD")
    factory: Mapping[str, Any] = {"device": case.device, "dtype": case.dtype}
    torch.manual_seed(0)
    inputs, slots = torch.randn(B, N, D, **factory).requires_grad_(), torch.randn(B, K, D, **factory)
    layer = SlotAttention(K, D, iters=ITERATIONS, **factory)
    weights = {name: p for name, p in layer.named_parameters() if not name.startswith("slots_")}
    # A shift of all queries moves all logits of an input alike: of its gradient, 0, only roundings would be compared.
    weights["norm_slots.bias"].requires_grad_(False)
    args = (inputs, slots, *weights.values())
    definition = _of(tuple(weights))

    def cost(backward: bool) -> tuple[int, int]:
        """Inputs read once, their gradient written once; per iteration what the absorbed form computes."""
        parameters = sum(p.numel() for p in weights.values())
        moved = B * N * D * (3 if backward else 1) + (2 * B * K * D + parameters) * (3 if backward else 1)
        rows = B * K * sum(p.numel() for p in weights.values() if p.dim() == 2)
        return moved * case.dtype.itemsize, ITERATIONS * ((7 if backward else 2) * 2 * B * N * K * D + 6 * rows)

    impls = [
        Impl(
            "layer:SlotAttention", functools.partial(layer, inputs, slots), args, definition=definition, cost=cost,
            ours=True,
        ),
        Impl("layer:einsum", functools.partial(definition, *args), args, cost=cost),
    ]  # fmt: skip
    if case.compile and case.device == "cuda":  # half a minute a workload on a CPU
        impls.append(Impl("layer:compile", functools.partial(compiled(definition), *args), args, cost=cost))
    return impls


# Cached: the copies of a case must share one function, or each is compiled anew.
@functools.cache
def _of(names: tuple[str, ...]) -> Any:
    """The layer's formula, of its inputs, its slots and its weights in the order of names."""

    def official(inputs: Tensor, slots: Tensor, *weights: Tensor) -> Tensor:
        w = dict(zip(names, weights, strict=True))
        B, K, D = slots.shape

        def norm(x: Tensor, name: str) -> Tensor:
            return F.layer_norm(x, (D,), w[f"{name}.weight"], w[f"{name}.bias"])

        x = norm(inputs, "norm_inputs")
        k, v = F.linear(x, w["project_k.weight"]), F.linear(x, w["project_v.weight"])
        gru = [w[f"gru.{part}"] for part in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]
        for _ in range(ITERATIONS):
            q = F.linear(norm(slots, "norm_slots"), w["project_q.weight"])
            attn = torch.einsum("bkd,bnd->bkn", q, k * D**-0.5).softmax(1) + 1e-8
            attn = attn / attn.sum(-1, keepdim=True)
            updates = torch.einsum("bkn,bnd->bkd", attn, v)
            slots = torch.gru_cell(updates.reshape(-1, D), slots.reshape(-1, D), *gru).view(B, K, D)
            hidden = F.linear(norm(slots, "norm_mlp"), w["mlp.0.weight"], w["mlp.0.bias"]).relu()
            slots = slots + F.linear(hidden, w["mlp.2.weight"], w["mlp.2.bias"])
        return slots

    return official
