"""RNN, LSTM and GRU as modules: initialisation, torch.nn's in their place, autocast, compilation, transforms."""

from __future__ import annotations

import copy
import itertools
import warnings
from typing import Any

import pytest
import torch
from test_layers_cells import CELLS
from test_layers_gated import LAYERS, D, H, flat, loss_of, make_states, results_and_grads
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

from recattn_kernels import GRU, RNN, use_backend


def test_irnn() -> None:
    layer = RNN(50, 40, 2, nonlinearity="relu", bidirectional=True)
    assert layer.irnn_() is layer
    for name, p in layer.named_parameters():
        if "weight_hh" in name:
            assert torch.equal(p, torch.eye(40))
        elif "bias" in name:
            assert (p == 0).all()
        else:
            assert 0.0008 < p.std() < 0.0012
    RNN(D, H, nonlinearity="relu", bias=False).irnn_()
    with pytest.raises(ValueError, match=r"^RNN: irnn_ needs nonlinearity='relu', got 'tanh'$"):
        RNN(D, H).irnn_()


def test_parameters_of_layer_norm() -> None:
    for name, cls in LAYERS.items():
        layer = cls(D, H, 2, bidirectional=True, layer_norm=True)
        G = {"RNN": 1, "LSTM": 4, "GRU": 3}[name]
        widths = {"ln_ih": G * H, "ln_hh": G * H} | ({"ln_c": H} if name == "LSTM" else {})
        expected = {
            f"{part}_{what}_l{k}{suffix}": width
            for (part, width), what, k, suffix in itertools.product(
                widths.items(), ("weight", "bias"), range(2), ("", "_reverse")
            )
        }
        added = {key: p for key, p in layer.named_parameters() if key.startswith("ln_")}
        assert {key: len(p) for key, p in added.items()} == expected
        expected_keys = set(layer.state_dict()) - set(getattr(nn, name)(D, H, 2, bidirectional=True).state_dict())
        assert expected_keys == set(added)


# Citizens


@pytest.mark.parametrize("name", LAYERS)
def test_from_and_to_torch(name: str) -> None:
    cls, theirs = LAYERS[name], getattr(nn, name)
    extra = {"LSTM": {"proj_size": 2}, "RNN": {"nonlinearity": "relu"}}.get(name, {})
    module = theirs(D, H, 2, bias=False, batch_first=True, dropout=0.5, bidirectional=True, **extra).eval()
    module.weight_hh_l1.requires_grad_(False)
    layer = cls.from_torch(module)
    x = torch.randn(2, 5, D)
    assert type(layer) is cls and not layer.training and repr(layer) == repr(module)
    torch.testing.assert_close(layer(x), module(x))
    back = layer.train().to_torch()
    assert type(back) is theirs and back.training and repr(back) == repr(module)
    for other in (layer, back):
        assert [(n, id(p)) for n, p in other.named_parameters()] == [(n, id(p)) for n, p in module.named_parameters()]
    back.eval()
    torch.testing.assert_close(back(x), module(x))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        one = theirs(D, H)
        one.dropout = 0.5
        assert cls.from_torch(one).dropout == 0.5
    with pytest.raises(
        TypeError, match=f"^{name}: module must be a torch.nn.{name}, got torch.nn.modules.linear.Linear$"
    ):
        cls.from_torch(nn.Linear(1, 1))
    with pytest.raises(ValueError, match=f"^{name}: to_torch: torch.nn has no layer_norm and no grad_clip$"):
        cls(D, H, layer_norm=True, grad_clip=1.0, backend="reference").to_torch()
    normed = (
        torch.nn.utils.weight_norm(theirs(D, H), "weight_hh_l0") if hasattr(torch.nn.utils, "weight_norm") else None
    )
    if normed is not None:
        with pytest.raises(ValueError, match=f"^{name}: weight_hh_l0 must be a Parameter of the module"):
            cls.from_torch(normed)


def test_a_pickle_without_the_options() -> None:
    layer = GRU(D, H)
    state = {k: v for k, v in layer.__getstate__().items() if k not in ("layer_norm", "zoneout", "backend")}
    old = GRU.__new__(GRU)
    old.__setstate__(state)
    x = torch.randn(5, 2, D)
    for backend in ("reference", "vendor"):
        with use_backend(backend):
            torch.testing.assert_close(old(x), layer(x))
    assert repr(old) == repr(layer)


@pytest.mark.parametrize("backend", ["reference", "vendor", "auto"])
@pytest.mark.parametrize("name", LAYERS)
def test_meta_device(name: str, backend: str) -> None:
    layer = LAYERS[name](D, H, 2, layer_norm=backend != "vendor", device="meta", backend=backend)
    output, last = layer(torch.empty(5, 2, D, device="meta"))
    assert output.is_meta and output.shape == (5, 2, H) and flat(last)[0].shape == (2, 2, H)


@pytest.mark.parametrize("form", ["lengths", "packed"])
def test_the_default_device_has_no_say(form: str) -> None:
    layer, x, lengths = GRU(D, H, backend="cpp"), torch.randn(5, 3, D), [2, 5, 1]
    call = x if form == "lengths" else nn.utils.rnn.pack_padded_sequence(x, lengths, enforce_sorted=False)
    options: Any = {"lengths": lengths} if form == "lengths" else {}
    expected = flat(layer(call, **options))
    with torch.device("meta"):
        found = flat(layer(call, **options))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("layer_norm", [False, True])
@pytest.mark.parametrize("name", ["RNN", "LSTM", "GRU", "LSTM-proj"])
def test_autocast(name: str, layer_norm: bool) -> None:
    extra = {"proj_size": 2} if "-" in name else {}
    layer = LAYERS[name.removesuffix("-proj")](
        D, H, 2, bidirectional=True, layer_norm=layer_norm, backend="reference", **extra
    )
    x = torch.randn(5, 2, D, requires_grad=True)
    hx = make_states(layer, (2,), torch.Generator().manual_seed(0))
    hx = tuple(s.float() for s in hx) if isinstance(hx, tuple) else hx.float()
    with torch.autocast("cpu", torch.bfloat16):
        output, last = layer(x, hx)
        again, _ = layer(x, last)  # a state under autocast is what the next call gets
    assert {t.dtype for t in (output, again, *flat(last))} == {torch.float32 if name == "GRU" else torch.bfloat16}
    (output.float().sum() + again.float().sum()).backward()
    assert {p.grad.dtype for p in (x, *layer.parameters())} == {torch.float32}
    torch.testing.assert_close(output.float(), layer(x, hx)[0], rtol=0.05, atol=0.05)


@pytest.mark.parametrize("state_dtype", [None, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cls", [*LAYERS.values(), *CELLS.values()])
def test_autocast_gives_torchs_dtypes(cls: Any, dtype: torch.dtype, state_dtype: torch.dtype | None) -> None:
    """On every backend: whether a call is left to torch.nn must not show."""
    theirs = cls._vendor(D, H)
    for backend, T, grad in itertools.product((None, "reference"), (2, 30), (False, True)):
        layer = cls(D, H, backend=backend)
        of_cell = issubclass(cls, nn.RNNCellBase)
        x = torch.randn(*(() if of_cell else (T,)), 3, D).to(dtype)
        state = None if state_dtype is None else torch.zeros(*(() if of_cell else (1,)), 3, H, dtype=state_dtype)
        hx = (state, state) if state is not None and "LSTM" in cls.__name__ else state
        with torch.set_grad_enabled(grad), torch.autocast("cpu", torch.bfloat16):
            found, expected = flat(layer(x, hx)), flat(theirs(x, hx))
            if not of_cell:
                packed = pack_padded_sequence(x, [T, T - 1, 1])
                found += flat(layer(packed, hx)[0].data) + flat(layer(packed, hx)[1])
                expected += flat(theirs(packed, hx)[0].data) + flat(theirs(packed, hx)[1])
        assert [t.dtype for t in found] == [t.dtype for t in expected]


def test_sixteen_bit_parameters() -> None:
    for cls in LAYERS.values():
        layer = cls(D, H, 2, dtype=torch.bfloat16, backend="reference")
        output, last = layer(torch.randn(5, 2, D, dtype=torch.bfloat16))
        assert {output.dtype, *(s.dtype for s in flat(last))} == {torch.bfloat16}


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("backend", ["reference", "vendor"])
@pytest.mark.parametrize("name", ["RNN", "LSTM", "GRU", "LSTM-proj"])
def test_compile_and_export(name: str, backend: str) -> None:
    extra = {"proj_size": 2} if "-" in name else {}
    options = {"layer_norm": True, "zoneout": 0.1} if backend == "reference" else {}
    dtype = torch.float64  # of float32, torch 2.13 compiles no gradient of torch.nn.LSTM
    layer = LAYERS[name.removesuffix("-proj")](D, H, 2, backend=backend, dtype=dtype, **options, **extra).eval()
    x = torch.randn(2, 2, D, dtype=dtype)
    model = nn.Sequential(layer)
    results = [results_and_grads(layer, lambda m: m(x), [])]
    with torch._dynamo.config.patch(allow_rnn=True):
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        results.append(results_and_grads(layer, lambda m: compiled(x), []))
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager")  # breaks the graph at the layer, as at torch.nn's
    results.append(results_and_grads(layer, lambda m: compiled(x), []))
    for other in results[1:]:
        torch.testing.assert_close(other, results[0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.nn's own layers assign their list of weights as they are exported
        exported = torch.export.export(layer, (x,), strict=False).module()
    torch.testing.assert_close(exported(x), results[0][0])


@pytest.mark.parametrize("name", ["RNN", "LSTM", "GRU", "LSTM-proj"])
def test_functional_transforms(name: str) -> None:
    extra = {"proj_size": 2} if "-" in name else {}
    layer = LAYERS[name.removesuffix("-proj")](D, H, 2, dtype=torch.float64, **extra)
    x = torch.randn(5, 2, D, dtype=torch.float64)
    parameters = dict(layer.named_parameters())

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(layer, parameters, (x,))[0].square().sum()

    expected = torch.autograd.grad(loss(parameters, x), list(parameters.values()))
    grads = torch.func.grad(loss)(parameters, x)
    torch.testing.assert_close(list(grads.values()), list(expected))
    per_row = torch.func.vmap(torch.func.grad(loss), (None, 1))(parameters, x)  # unbatched rows
    torch.testing.assert_close([g.sum(0) for g in per_row.values()], list(expected))
    _, tangent = torch.func.jvp(lambda x: layer(x)[0].square().sum(), (x,), (torch.ones_like(x),))
    (of_x,) = torch.autograd.grad(layer(x.requires_grad_())[0].square().sum(), x)
    torch.testing.assert_close(tangent, of_x.sum())
    halved = {n: p.detach() / 2 for n, p in parameters.items()}
    with use_backend("reference"):
        once = torch.func.functional_call(layer, halved, (x,))
        single = torch.func.functional_call(layer, {n: p.float() for n, p in halved.items()}, (x.float(),))
    torch.testing.assert_close(single[0].double(), once[0], rtol=1e-5, atol=1e-5)


class Halved(nn.Module):
    def forward(self, w: Tensor) -> Tensor:
        return w / 2


@pytest.mark.parametrize("backend", ["reference", "vendor"])
@pytest.mark.parametrize("name", LAYERS)
def test_parametrised_and_tied_weights(name: str, backend: str) -> None:
    layer = LAYERS[name](D, H, 2, backend=backend)
    x = torch.randn(5, 2, D)
    halved = copy.deepcopy(layer)
    with torch.no_grad():
        halved.weight_hh_l1.div_(2)
    torch.nn.utils.parametrize.register_parametrization(layer, "weight_hh_l1", Halved())
    for _ in range(2):
        found, wanted = layer(x), halved(x)
        torch.testing.assert_close(found, wanted)
        loss_of(found).backward()
        loss_of(wanted).backward()
        with torch.no_grad():
            original = layer.parametrizations.weight_hh_l1.original
            torch.testing.assert_close(original.grad * 2, halved.weight_hh_l1.grad)
            original.mul_(0.9)
            halved.weight_hh_l1.mul_(0.9)
            layer.zero_grad(), halved.zero_grad()
    tied = LAYERS[name](H, H, 2, backend=backend)
    tied.weight_hh_l1 = tied.weight_hh_l0
    loss_of(tied(torch.randn(5, 2, H))).backward()
    both = tied.weight_hh_l0.grad
    assert len(list(tied.parameters())) == 7 and both is not None and tied.weight_hh_l1.grad is both
