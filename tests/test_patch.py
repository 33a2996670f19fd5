"""patch_model and unpatch_model."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import recattn_kernels as rk
from recattn_kernels import patch_model, unpatch_model, use_backend

D, H = 3, 4
NAMES = ("RNN", "LSTM", "GRU", "RNNCell", "LSTMCell", "GRUCell")


class Derived(nn.LSTM):
    pass


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(D, H, 2, bidirectional=True, dropout=0.5)
        self.heads = nn.ModuleDict({"gru": nn.GRU(2 * H, H), "cell": nn.GRUCell(H, H)})
        self.again = self.heads["gru"]
        self.linear = nn.Linear(H, 1)

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.heads["gru"](self.lstm(x)[0])
        y: Tensor = self.linear(self.heads["cell"](y[-1]))
        return y


@pytest.mark.parametrize("name", NAMES)
def test_every_class_there_and_back(name: str) -> None:
    module = getattr(nn, name)(D, H).eval()
    x = torch.randn(5, D) if name.endswith("Cell") else torch.randn(6, 5, D)
    expected, parameters = module(x), dict(module.named_parameters())
    calls = []
    module.register_forward_hook(lambda *args: calls.append(args))
    report = patch_model(module)  # the root itself
    assert report.patched == ("",) and report.left == {} and type(module) is getattr(rk, name)
    assert dict(module.named_parameters()) == parameters and not module.training
    for backend in ("reference", "vendor", "auto", "cpp"):
        with use_backend(backend):
            torch.testing.assert_close(module(x), expected)
    assert len(calls) == 4
    assert repr(module) == repr(getattr(nn, name)(D, H))
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(getattr(rk, name).from_torch(module.to_torch())))):
        assert type(other) is getattr(rk, name)
        torch.testing.assert_close(other(x), expected)
    again = patch_model(module)
    assert again.patched == () and again.left == {}
    module.backend = "reference"
    module.zoneout = 0.0
    assert unpatch_model(module).patched == ("",)
    assert type(module) is getattr(nn, name) and "backend" not in vars(module)
    torch.testing.assert_close(module(x), expected)


def test_a_model_keeps_everything_else() -> None:
    model = Model().eval()
    x = torch.randn(5, 2, D)
    expected = model(x)
    before = {name: id(module) for name, module in model.named_modules()}
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    report = patch_model(model)
    assert report.patched == ("lstm", "heads.gru", "heads.cell")  # heads.gru and again are one module
    assert report.left == {}
    assert {name: id(module) for name, module in model.named_modules()} == before
    assert type(model.again) is rk.GRU and isinstance(model.lstm, nn.LSTM)
    torch.testing.assert_close(model(x), expected)
    with use_backend("reference"):
        torch.testing.assert_close(model(x), expected)
        model(x).sum().backward()
    optimizer.step()
    assert not torch.equal(model(x), expected)
    fresh = Model()
    fresh.load_state_dict(model.state_dict())
    torch.testing.assert_close(fresh.eval()(x), model(x))
    assert unpatch_model(model).patched == report.patched
    assert type(model.lstm) is nn.LSTM
    torch.testing.assert_close(fresh(x), model(x))


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("how", ["torch.compile", "compile()", "fullgraph"])
def test_a_compiled_model_goes_on_working(how: str) -> None:
    with torch._dynamo.config.patch(allow_rnn=how == "fullgraph"), use_backend("reference"):
        model: Any = Model().double().eval()
        x = torch.randn(5, 2, D, dtype=torch.float64)
        run = model
        if how == "compile()":
            model.compile(backend="eager")
        else:
            run = torch.compile(model, fullgraph=how == "fullgraph", backend="eager")
        expected = run(x)
        names = patch_model(run).patched
        assert len(names) == 3
        torch.testing.assert_close(run(x), expected)
        assert len(unpatch_model(run).patched) == 3
        torch.testing.assert_close(run(x), expected)


def test_what_is_left_is_reported() -> None:
    replaced = nn.GRU(D, H)
    replaced.forward = replaced.forward
    parametrised = nn.LSTM(D, H)
    torch.nn.utils.parametrize.register_parametrization(parametrised, "weight_hh_l0", nn.Identity())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated, as is torch's quantisation
        scripted = torch.jit.script(nn.GRU(D, H))
        quantised = torch.ao.nn.quantized.dynamic.GRU(D, H)
    model = nn.ModuleDict(
        {"derived": Derived(D, H), "replaced": replaced, "parametrised": parametrised, "scripted": scripted,
         "quantised": quantised, "linear": nn.Linear(1, 1), "rnn": nn.RNN(D, H), "ours": rk.GRU(D, H)}
    )  # fmt: skip
    report = patch_model(model)
    assert report.patched == ("rnn",)
    assert report.left == {
        "derived": f"its class {__name__}.Derived is derived from torch.nn's",
        "replaced": "its forward has been replaced on the instance",
        "parametrised": "its class torch.nn.utils.parametrize.ParametrizedLSTM is derived from torch.nn's",
        "scripted": "TorchScript has compiled it",
        "quantised": "torch.ao.nn.quantized.dynamic.modules.rnn.GRU is of torch's quantisation",
    }
    assert str(report).splitlines()[:3] == [
        "1 patched, 5 left",
        "  patched  rnn",
        f"  left     derived: its class {__name__}.Derived is derived from torch.nn's",
    ]
    with pytest.raises(dataclasses.FrozenInstanceError):
        report.patched = ()  # type: ignore[misc]


def test_what_unpatch_leaves() -> None:
    model = nn.ModuleDict({"plain": nn.LSTM(D, H), "norm": nn.GRU(D, H), "clip": nn.LSTMCell(D, H),
                           "parametrised": nn.GRU(D, H)})  # fmt: skip
    assert len(patch_model(model).patched) == 4
    model["plain"].backend = "reference"
    model["norm"].recurrent_dropout = 0.5
    model["clip"].grad_clip, model["clip"].zoneout = 1.0, (0.1, 0.0)
    torch.nn.utils.parametrize.register_parametrization(model["parametrised"], "weight_hh_l0", nn.Identity())
    model["ours"], model["theirs"] = rk.LSTM(D, H), nn.RNN(D, H)
    report = unpatch_model(model)
    assert report.patched == ("plain",)
    assert report.left == {
        "norm": "torch.nn has no recurrent_dropout",
        "clip": "torch.nn has no zoneout and no grad_clip",
        "parametrised": "its class torch.nn.utils.parametrize.ParametrizedGRU is derived from ours",
        "ours": "it was not patched but made as ours; to_torch() gives one of torch.nn's",
    }
    assert type(model["ours"]) is rk.LSTM and type(model["plain"]) is nn.LSTM
    assert vars(model["plain"]).keys() == vars(nn.LSTM(D, H)).keys()
    assert str(patch_model(nn.LSTM(D, H))) == "1 patched, 0 left\n  patched  (the model)"


def test_a_copy_can_be_unpatched() -> None:
    model = nn.ModuleDict({"lstm": nn.LSTM(D, H), "cell": nn.GRUCell(D, H)})
    keys = model.state_dict().keys()
    patch_model(model)
    assert model.state_dict().keys() == keys
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert unpatch_model(other).patched == ("lstm", "cell")
        assert type(other["lstm"]) is nn.LSTM and type(other["cell"]) is nn.GRUCell
    # Of a patched module, but made as ours.
    assert unpatch_model(rk.LSTM.from_torch(model["lstm"].to_torch())).patched == ()


def test_weight_norm_by_hook_goes_on_working() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        module = torch.nn.utils.weight_norm(nn.GRU(D, H), "weight_hh_l0")
    x = torch.randn(5, 2, D)
    patch_model(module)
    for backend in ("reference", "vendor"):
        with use_backend(backend):
            with torch.no_grad():
                module.weight_hh_l0_g.mul_(0.5)
            expected = nn.GRU(D, H)
            module(x)  # its hook writes the weight
            expected.load_state_dict({name: getattr(module, name) for name in expected.state_dict()})
            torch.testing.assert_close(module(x), expected(x))


def test_only_a_module_is_patched() -> None:
    for function in (patch_model, unpatch_model):
        with pytest.raises(TypeError, match=f"^{function.__name__}: model must be a torch.nn.Module, got NoneType$"):
            function(None)  # type: ignore[arg-type]
