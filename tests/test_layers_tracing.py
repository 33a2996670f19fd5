"""Every layer as torch.fx, torch.jit and torch.export take it down."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from test_layers_citizenship import CASES, Case, D, H, assert_same, every_layer, inputs_of, run, tensors
from torch import Tensor, nn

import recattn_kernels as rk


@every_layer
def test_symbolic_trace(case: Case) -> None:
    """As a layer of torch.nn a leaf, one node of the graph."""
    layer = case.make()
    inputs = inputs_of(case, layer)
    forward = [
        lambda self, a: self.layer(a), lambda self, a, b: self.layer(a, b), lambda self, a, b, c: self.layer(a, b, c)
    ][len(inputs) - 1]  # fmt: skip
    model = type("Traced", (nn.Module,), {"forward": forward})()
    model.layer = layer
    traced = torch.fx.symbolic_trace(model)
    assert next((n.op, n.target) for n in traced.graph.nodes if n.op != "placeholder") == ("call_module", "layer")
    alone = copy.deepcopy(model)
    assert_same(run(traced, inputs), run(alone, inputs))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
@every_layer
def test_jit_trace(case: Case) -> None:
    layer = case.make().eval()
    inputs = inputs_of(case, layer)
    others = inputs_of(case, layer, scale=0.5)
    with torch.no_grad():
        traced = torch.jit.trace(layer, inputs, check_trace=False)
        results = []
        for run_layer in (traced, layer):
            torch.manual_seed(0)
            results.append(tensors(run_layer(*others)))
    torch.testing.assert_close(*results)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
@every_layer
def test_jit_trace_agrees_with_itself(case: Case) -> None:
    """torch traces once more without gradients, and compares the graphs; what was traced can be trained."""
    layer = case.make().eval()
    inputs = inputs_of(case, layer)
    traced = torch.jit.trace(layer, inputs)
    parameters = list(layer.parameters())
    if not parameters:  # a GlimpseSensor
        return
    grads = []
    for run_layer in (traced, layer):
        torch.manual_seed(0)
        outputs = [out for out in tensors(run_layer(*inputs)) if out.requires_grad]
        grads.append(
            torch.autograd.grad(outputs, parameters, [torch.ones_like(out) for out in outputs], allow_unused=True)
        )
    torch.testing.assert_close(*grads)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@every_layer
def test_jit_script_is_refused(case: Case) -> None:
    layer = case.make()
    model = nn.Sequential(nn.Identity(), layer)
    instead = ", or script what to_torch" if hasattr(layer, "to_torch") else "$"
    for scripted in (layer, model):
        message = rf"^{type(layer).__name__}: torch\.jit\.script cannot compile this layer: .*trace{instead}"
        with pytest.raises(TypeError, match=message):
            torch.jit.script(scripted)
    assert model[1] is layer


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_jit_script_of_what_was_unpatched() -> None:
    model = nn.Sequential(nn.GRU(D, H))
    rk.patch_model(model)
    with pytest.raises(TypeError, match=r"^GRU: torch\.jit\.script"):
        torch.jit.script(model)
    rk.unpatch_model(model)
    x = torch.randn(3, 2, D)
    torch.testing.assert_close(torch.jit.script(model)(x), model(x))


@pytest.mark.parametrize("name", ["RecurrentAttention", "AttentionLSTMCell"])
def test_an_exported_program_that_returns_names(name: str) -> None:
    case = next(case for case in CASES if case.name == name)
    layer = case.make().eval()
    inputs = inputs_of(case, layer)
    file = io.BytesIO()
    torch.export.save(torch.export.export(layer, inputs), file)
    found = torch.export.load(io.BytesIO(file.getvalue())).module()(*inputs)
    expected = layer(*inputs)
    assert type(found) is type(expected)
    torch.testing.assert_close(tuple(found), tuple(expected))


def test_what_is_not_a_leaf() -> None:
    """What would run twice, once while it is traced and once in the node, and the root, which is in no graph."""

    class Halved(rk.LSTM):
        def forward(self, input: Tensor, hx: Any = None, **options: Any) -> Any:
            return super().forward(input / 2, hx, **options)

    hooked = rk.GRU(D, H)
    hooked.register_forward_hook(lambda module, args, result: result)
    for layer in (Halved(D, H), hooked):
        with pytest.raises(TypeError, match=r"torch\.fx cannot trace into this layer"):
            torch.fx.symbolic_trace(nn.Sequential(layer))
    with pytest.raises(TypeError, match=r"IndRNN: torch\.fx traces a model of which this layer is a part"):
        torch.fx.symbolic_trace(rk.IndRNN(D, H))
