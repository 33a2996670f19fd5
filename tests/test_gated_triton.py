"""rnn, lstm and gru in Triton: the kernel that the interpreter's small samples would not meet, and its products."""

from __future__ import annotations

from typing import Any

import pytest
import test_aot
import torch
from test_conformance import judge

from recattn_kernels import backends, conformance, registry

OPS = ("rnn", "lstm", "gru")
SAMPLES = (
    "plain", "wide", "one_element", "reset", "lengths", "zoneout_evaluation", "everything", "everything_reverse",
    "everything_batch_first", "no_steps", "nan", "nan_past_the_end",
)  # fmt: skip


@pytest.mark.interpret
@pytest.mark.parametrize("name", SAMPLES)
@pytest.mark.parametrize("op", OPS)
def test_one_launch_a_step(op: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where the weights are too large for one program to hold."""
    from recattn_kernels.ops.gated import triton

    monkeypatch.setattr(triton, "holds_weights", lambda call, on: False)
    spec = registry.find(op)
    sample = next(s for s in spec.samples if s.name == name)
    for dtype in spec.dtypes["triton"][: 2 if name == "everything" else 1]:
        judge(conformance.compare(spec, sample, "triton", dtype))


@pytest.mark.interpret
@pytest.mark.parametrize("op", OPS)
def test_one_program_holds_the_weights(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from recattn_kernels.ops.gated import triton

    monkeypatch.setattr(triton, "holds_weights", lambda call, on: True)
    spec = registry.find(op)
    sample = next(s for s in spec.samples if s.name == "everything")
    judge(conformance.compare(spec, sample, "triton", torch.float32))


def test_refusals() -> None:
    from recattn_kernels.ops.gated.contract import triton_refusal
    from recattn_kernels.ops.gru.api import normalise

    x, weight_hh, ones = torch.zeros(2, 3, 15), torch.zeros(15, 5), torch.ones(15)
    assert triton_refusal(normalise(x, weight_hh)) is None
    assert "float64" in str(triton_refusal(normalise(x.double(), weight_hh.double())))
    assert "normalisation" in str(triton_refusal(normalise(x, weight_hh, layer_norm=(ones, ones))))
    assert "reset_after" in str(triton_refusal(normalise(x, weight_hh, reset_after=False)))


@test_aot.needs_compiler
@pytest.mark.parametrize("hidden", [64, 512])
def test_float32_is_multiplied_exactly_unless_torch_allows_less(hidden: int, monkeypatch: Any) -> None:
    from triton.backends.compiler import GPUTarget

    from recattn_kernels.ops.gated import triton_aot

    def tf32(allowed: bool) -> list[bool]:
        monkeypatch.setattr(backends, "allows_tf32", lambda: allowed)
        shape = triton_aot.Shape(torch.float32, torch.float32, hidden, "biased")
        launches = triton_aot.example("gru", shape, triton_aot.machine(32))
        return ["tf32" in launch.compile(GPUTarget("cuda", 80, 32)).asm["ptx"] for launch in launches]

    assert tf32(False) == [False, False]
    assert tf32(True) == [True, True]
