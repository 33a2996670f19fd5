"""Which backend runs a call of RNN, LSTM and GRU."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from test_layers_gated import LAYERS, D, H, flat
from torch import nn
from torch.nn.utils.rnn import pack_sequence
from torch.utils.checkpoint import checkpoint

from recattn_kernels import GRU, LSTM, BackendUnavailableError
from recattn_kernels.layers.gated_backend import TABLES, fused_runs, vendor_is_faster


def test_vendor_is_refused_where_torch_has_no_such_option() -> None:
    x = torch.randn(5, 2, D)
    cases: list[tuple[dict[str, Any], dict[str, Any], str]] = [
        ({"layer_norm": True}, {}, "layer_norm"),
        ({"zoneout": 0.1}, {}, "zoneout"),
        ({"recurrent_dropout": 0.1}, {}, "recurrent_dropout"),
        ({"grad_clip": 1.0}, {}, "grad_clip"),
        ({}, {"reset": torch.zeros(5, 2) > 0}, "reset"),
        ({}, {"lengths": [5, 4]}, "lengths"),
        ({"zoneout": 0.1, "grad_clip": 1.0}, {"lengths": [5, 4]}, "zoneout and no grad_clip and no lengths"),
    ]
    for name, cls in LAYERS.items():
        for options, kwargs, what in cases:
            layer = cls(D, H, backend="vendor", **options)
            message = f"{name}: backend 'vendor' cannot run this call: torch.nn has no {what}"
            with pytest.raises(BackendUnavailableError, match=f"^{message}$"):
                layer(x, **kwargs)
        layer = cls(D, H, backend="vendor", recurrent_dropout=0.5, grad_clip=1.0).eval()
        with torch.no_grad():  # neither makes a difference here
            torch.testing.assert_close(layer(x), layer.__class__._vendor.forward(layer, x))
        assert cls(D, H, backend="vendor", zoneout=0.0)(x)[0].shape == (5, 2, H)
    LSTM(D, H, backend="vendor", zoneout=(0.0, 0.0))(x)


def test_a_backend_that_cannot_run_says_so() -> None:
    x = torch.randn(5, 2, D)
    for name, cls in LAYERS.items():
        with pytest.raises(BackendUnavailableError, match=f"^{name.lower()}: backend 'cuda' cannot run this call: "):
            cls(D, H, backend="cuda")(x)
    with pytest.raises(BackendUnavailableError, match=r"^LSTM: backend 'c.*' cannot run this call: "):
        LSTM(D, H, proj_size=2, backend="cuda")(x)
    LSTM(D, H, proj_size=2, layer_norm=True)(x)


def test_auto_asks_for_a_fused_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def refusal(call: Any) -> str | None:
        asked.append(call)
        return None if call.sizes[2] == H else "another width"

    monkeypatch.setattr("recattn_kernels.backends.machine_refusal", lambda backend, device: None)
    monkeypatch.setitem(TABLES, "lstm", {"cpp": refusal})
    weight_hh = torch.randn(4 * H, H)
    assert fused_runs("lstm", "lstm", weight_hh, torch.bfloat16, 3, 2) is True
    assert asked[0].x.shape == (3, 2, 4 * H) and asked[0].x.dtype == torch.bfloat16
    assert asked[0].sizes == (3, 2, H)
    assert fused_runs("lstm", "lstm", torch.randn(8, 2), torch.float32, 3, 2) is False


@pytest.mark.parametrize(
    ("op", "T", "B", "H", "change", "expected"),
    [
        ("gru", 24, 20, 256, {}, False),
        ("gru", 24, 20, 256, {"packed": True}, False),
        ("gru", 24, 20, 256, {"device": "cuda"}, True),
        ("gru", 2, 4, 64, {"packed": True}, True),
        ("gru", 3, 4, 64, {"needs_grad": True}, True),
        ("gru", 4, 4, 64, {"needs_grad": True}, False),
        ("gru", 4, 4, 64, {}, True),
        ("rnn", 16, 4, 64, {"needs_grad": True}, False),
        ("rnn", 16, 4, 64, {}, True),
        ("rnn", 16, 128, 64, {}, False),
        ("rnn", 1, 4096, 256, {}, False),
        ("rnn", 1, 256, 256, {}, True),
        ("gru", 1, 64, 512, {"cell": True}, True),
        ("gru", 1, 384, 256, {"cell": True}, False),
        ("lstm", 1, 64, 512, {"cell": True, "needs_grad": True}, True),
        ("lstm", 1, 256, 256, {"cell": True}, False),
        ("lstm", 1, 1, 512, {}, False),  # oneDNN's start
        ("lstm", 1, 1, 64, {}, True),
        ("lstm", 128, 32, 256, {"needs_grad": True}, False),
        ("lstm", 128, 32, 256, {"packed": True}, False),
        ("lstm", 4, 16, 64, {}, True),
        ("lstm", 4, 16, 64, {"needs_grad": True}, True),
        ("lstm", 40, 16, 64, {"needs_grad": True}, False),
        ("lstm", 40, 64, 16, {"needs_grad": True}, True),
        ("lstm", 40, 64, 16, {"needs_grad": True, "onednn": False}, False),
        ("lstm", 4, 16, 64, {"onednn": False}, False),
        ("lstm", 40, 16, 64, {"needs_grad": True, "dtype": torch.bfloat16}, False),
    ],
)
def test_the_rule(op: str, T: int, B: int, H: int, change: dict[str, Any], expected: bool) -> None:
    facts: dict[str, Any] = {
        "device": "cpu", "dtype": torch.float32, "cell": False, "packed": False, "needs_grad": False, "onednn": True,
    }  # fmt: skip
    assert vendor_is_faster(op, T=T, B=B, H=H, **(facts | change)) is expected


def test_the_rule_without_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.nn's LSTM is then a loop, as its GRU is everywhere."""
    monkeypatch.setattr("recattn_kernels.layers.gated_backend.ONEDNN", ())
    for needs_grad in (False, True):
        facts: dict[str, Any] = {"device": "cpu", "dtype": torch.float32, "cell": False, "packed": False}
        for op in ("lstm", "gru"):
            assert not vendor_is_faster(op, T=40, B=64, H=16, needs_grad=needs_grad, onednn=True, **facts)


@pytest.mark.parametrize("faster", [False, True])
def test_auto_follows_the_rule(monkeypatch: pytest.MonkeyPatch, faster: bool) -> None:
    asked: list[dict[str, Any]] = []

    def rule(op: str, **facts: Any) -> bool:
        asked.append({"op": op, **facts})
        return faster

    vendor = []
    monkeypatch.setattr("recattn_kernels.layers.gated_base.vendor_is_faster", rule)
    monkeypatch.setattr(nn.GRU, "forward", lambda self, input, hx: vendor.append(input) or (input, hx))
    monkeypatch.setattr(GRU, "_kernel", lambda self, input, B: vendor.append(input) or (input, None))
    layer = GRU(D, H, 3, batch_first=True, bidirectional=True)
    x = torch.randn(2, 5, D)
    layer(x)
    facts = {"op": "gru", "device": "cpu", "dtype": torch.float32, "T": 5, "B": 2, "H": H, "cell": False,
             "packed": False, "needs_grad": True, "onednn": True}  # fmt: skip
    assert asked.pop() == facts
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        layer(pack_sequence([x[0], x[1, :2], x[1, :1]]))
    assert asked.pop() == facts | {"dtype": torch.bfloat16, "B": 3, "packed": True, "needs_grad": False}
    layer(x[0])
    assert asked.pop() == facts | {"B": 1}
    assert len(vendor) == 3 * faster
    layer(x, reset=torch.zeros(2, 5) > 0), layer(x[:, :0])
    assert not asked and len(vendor) == 3 * faster  # not asked where torch.nn cannot run
    monkeypatch.setitem(TABLES, "gru", {"cpp": lambda call: "not this one"})
    layer(x)
    assert len(vendor) == 3 * faster + 1  # the reference is all that is left


@pytest.mark.parametrize("name", LAYERS)
def test_vendor_is_refused_under_a_transform(name: str) -> None:
    layer = LAYERS[name](D, H, backend="vendor")
    message = f"^{name}: backend 'vendor' cannot run this call: only the reference runs under a functorch transform"
    with pytest.raises(BackendUnavailableError, match=message):
        torch.func.grad(lambda x: layer(x)[0].sum())(torch.randn(5, 2, D))


@pytest.mark.parametrize("name", LAYERS)
def test_dropout_is_the_same_without_a_gradient(name: str) -> None:
    """As checkpoint(use_reentrant=True) computes at first, though another kernel may be faster there."""
    layer, x = LAYERS[name](D, H, 2, dropout=0.5, batch_first=True), torch.randn(8, 4, D, requires_grad=True)
    outputs = []
    for run in (layer, lambda x: checkpoint(lambda x: layer(x)[0], x, use_reentrant=True), torch.no_grad()(layer)):
        torch.manual_seed(1)
        outputs.append(flat(run(x))[0])
    torch.testing.assert_close(outputs[1:], outputs[:1] * 2, rtol=0, atol=0)


@pytest.mark.parametrize("backend", ["reference", "cpp"])
@pytest.mark.parametrize("name", LAYERS)
def test_no_steps_leave_gradients(name: str, backend: str) -> None:
    layer = LAYERS[name](D, H, backend=backend)
    _, last = layer(torch.zeros(0, 2, D, requires_grad=True))
    grads = torch.autograd.grad(sum(s.sum() for s in flat(last)), list(layer.parameters()), allow_unused=True)
    assert all(g is None or not g.any() for g in grads) and any(g is not None for g in grads)


def test_empty_sequences_run_on_ours() -> None:
    for cls in LAYERS.values():
        layer = cls(D, H, 2)
        output, _ = layer(torch.zeros(0, 2, D))
        assert output.shape == (0, 2, H)
        output, last = layer(torch.zeros(5, 0, D), lengths=[])
        assert output.shape == (5, 0, H) and flat(last)[0].shape == (2, 0, H)
        output.sum().backward()
    layer = LSTM(D, H, 2, proj_size=2)
    hx = (torch.randn(2, 2, 2), torch.randn(2, 2, H))
    output, last = layer(torch.zeros(0, 2, D), hx)
    assert output.shape == (0, 2, 2)
    torch.testing.assert_close(last, hx)


@pytest.mark.parametrize("name", LAYERS)
def test_vendor_without_the_checks_of_torch_nn(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A plain call goes straight to torch.nn's kernel, with the same result; one that fails a check does not."""
    layer = LAYERS[name](D, H, 2, bidirectional=True, batch_first=True, backend="vendor")
    theirs, x = layer.to_torch(), torch.randn(3, 5, D)
    expected = theirs(x)
    monkeypatch.delattr(LAYERS[name]._vendor, "forward")
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=0)
    monkeypatch.undo()
    for wrong in (torch.randn(3, 5, D + 1), x.double()):
        with pytest.raises(Exception) as theirs_says:
            theirs(wrong)
        with pytest.raises(type(theirs_says.value), match=re.escape(str(theirs_says.value))):
            layer(wrong)


@pytest.mark.parametrize("name", LAYERS)
def test_auto_has_second_derivatives_at_any_size(name: str) -> None:
    for T, B, width in ((1, 1, 4), (2, 3, 8), (12, 5, 16)):
        layer, x = LAYERS[name](D, width), torch.randn(T, B, D, requires_grad=True)
        (grad,) = torch.autograd.grad(layer(x)[0].square().sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(grad.square().sum(), layer.weight_ih_l0)
        assert second.isfinite().all() and second.any()
