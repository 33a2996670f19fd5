"""What SlotAttention refuses, and in which words."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from test_layers_slot_attention import B, D, K, N

from recattn_kernels import SlotAttention


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"num_slots": 0}, ValueError, "num_slots must be at least 1, got 0"),
        ({"dim": 2.0}, TypeError, "dim must be an int, got 2.0"),
        ({"iters": 0}, ValueError, "iters must be at least 1, got 0"),
        ({"heads": 3}, ValueError, "heads must divide dim = 8, got 3"),
        ({"eps": -1.0}, ValueError, "eps must be at least 0, got -1.0"),
        ({"temperature": 0.0}, ValueError, "temperature must be positive, got 0.0"),
        ({"ln_eps": math.inf}, ValueError, "ln_eps must be finite, got inf"),
        ({"eps_mode": "mean"}, ValueError, "eps_mode must be one of add, denominator, got 'mean'"),
        ({"head_softmax": "heads"}, ValueError, "head_softmax must be one of slots, joint, got 'heads'"),
        ({"bias": 1}, TypeError, "bias must be a bool, got 1"),
        ({"init": "zeros"}, ValueError, "init must be one of gaussian, learned, got 'zeros'"),
        ({"update": "lstm"}, ValueError, "update must be one of gru, residual, got 'lstm'"),
        ({"grad_mode": "implicit"}, ValueError, "grad_mode must be one of full, fixed-point, bi-level, got 'implicit'"),
        ({"backend": "metal"}, ValueError, "backend must be one of"),
    ],
)
def test_refuses_options(options: dict[str, Any], error: type[Exception], match: str) -> None:
    arguments: dict[str, Any] = {"num_slots": K, "dim": D, **options}
    with pytest.raises(error, match=f"^SlotAttention: {match}"):
        SlotAttention(arguments.pop("num_slots"), arguments.pop("dim"), **arguments)


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        ({"inputs": [1.0]}, TypeError, "inputs must be a Tensor, got list"),
        ({"inputs": torch.zeros(N, D)}, ValueError, r"inputs must be \(B, N, input_dim\), got \(40, 8\)"),
        ({"inputs": torch.zeros(B, N, 5)}, ValueError, r"inputs must be \(B, N, input_dim\) = \(3, 40, 8\), got"),
        ({"inputs": torch.zeros(B, N, D).double()}, TypeError, "inputs must be float32, got float64"),
        ({"slots": torch.zeros(B, K, 5)}, ValueError, r"slots must be \(B, K, dim\) = \(3, 4, 8\), got \(3, 4, 5\)"),
        ({"slots": torch.zeros(2, K, D)}, ValueError, r"slots must be \(B, K, dim\) = \(3, 4, 8\), got \(2, 4, 8\)"),
        ({"slots": torch.zeros(B, K, D).half()}, TypeError, "slots must be float32, got float16"),
        (
            {"slots": torch.zeros(B, K, D), "num_slots": 5},
            ValueError,
            r"slots must be \(B, K, dim\) = \(3, 5, 8\), got",
        ),
        ({"num_slots": 0}, ValueError, "num_slots must be at least 1, got 0"),
        ({"slot_mask": torch.ones(B, K)}, TypeError, "slot_mask must be bool, got float32"),
        ({"slot_mask": torch.ones(B, 5).bool()}, ValueError, r"slot_mask must be \(B, K\) = \(3, 4\), got \(3, 5\)"),
        ({"input_mask": torch.ones(N).bool()}, ValueError, r"input_mask must be \(B, N\) = \(3, 40\), got \(40,\)"),
        (
            {"slot_mask": torch.ones(B, K, device="meta").bool()},
            ValueError,
            "slot_mask must be on cpu as inputs is, got meta$",
        ),
        ({"return_attn": 1}, TypeError, "return_attn must be a bool, got 1"),
    ],
)
def test_refuses_calls(call: dict[str, Any], error: type[Exception], match: str) -> None:
    layer, arguments = SlotAttention(K, D), {"inputs": torch.zeros(B, N, D), **call}
    with pytest.raises(error, match=f"^SlotAttention: {match}"):
        layer(arguments.pop("inputs"), **arguments)
