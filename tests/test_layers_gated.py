"""RNN, LSTM and GRU against torch.nn's, against plain steps written out here, and as citizens of torch.nn."""

from __future__ import annotations

import copy
import itertools
import math
import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence, pad_packed_sequence, pad_sequence

from recattn_kernels import GRU, LSTM, RNN, BackendUnavailableError, use_backend
from recattn_kernels.layers.gated_backend import TABLES, fused_backend

D, H = 3, 4
LAYERS = {"RNN": RNN, "LSTM": LSTM, "GRU": GRU}


def randomise(layer: nn.Module, generator: torch.Generator) -> None:
    with torch.no_grad():
        for p in layer.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) / 2)


def flat(result: Any) -> list[Tensor]:
    """The Tensors of a result, in order."""
    if isinstance(result, PackedSequence):
        return [result.data]
    return [result] if isinstance(result, Tensor) else [t for part in result for t in flat(part)]


def loss_of(result: Any) -> Tensor:
    weights = (torch.linspace(-1, 1, t.numel(), dtype=t.dtype).sin().view(t.shape) for t in flat(result))
    return torch.stack([(t * w).sum() for t, w in zip(flat(result), weights, strict=True)]).sum()


def results_and_grads(layer: nn.Module, call: Callable[[nn.Module], Any], inputs: list[Tensor]) -> tuple[Any, Any]:
    result = call(layer)
    return result, torch.autograd.grad(loss_of(result), [*inputs, *layer.parameters()], materialize_grads=True)


def make_states(layer: Any, batch: tuple[int, ...], generator: torch.Generator) -> Any:
    n = layer.num_layers * (2 if layer.bidirectional else 1)
    widths = [layer.proj_size or H, H] if isinstance(layer, nn.LSTM) else [H]
    states = [torch.randn(n, *batch, w, generator=generator, dtype=torch.float64).requires_grad_() for w in widths]
    return tuple(states) if isinstance(layer, nn.LSTM) else states[0]


# Against torch.nn

LENGTHS = {"even": [4, 4, 4], "sorted": [4, 2, 1], "unsorted": [2, 4, 1], "unbatched": [4]}


@pytest.mark.parametrize("backend", ["auto", "vendor", "reference"])
@pytest.mark.parametrize("form", LENGTHS)
@pytest.mark.parametrize("name", LAYERS)
def test_agrees_with_torch(name: str, form: str, backend: str) -> None:
    generator = torch.Generator().manual_seed(1)
    own: list[dict[str, Any]] = [{}]
    if name == "RNN":
        own.append({"nonlinearity": "relu"})
    if name == "LSTM":
        own.append({"proj_size": 2})
    flags = itertools.product([1, 2], [False, True], [False, True], [False, True], own, [False, True])
    for num_layers, bidirectional, batch_first, bias, extra, with_states in flags:
        options = {
            "num_layers": num_layers, "bidirectional": bidirectional, "batch_first": batch_first, "bias": bias, **extra,
        }  # fmt: skip
        expected = getattr(nn, name)(D, H, dtype=torch.float64, **options)
        randomise(expected, generator)
        layer = LAYERS[name](D, H, dtype=torch.float64, backend=backend, **options)
        layer.load_state_dict(expected.state_dict())
        rows = [torch.randn(n, D, generator=generator, dtype=torch.float64).requires_grad_() for n in LENGTHS[form]]
        hx = make_states(layer, () if form == "unbatched" else (len(rows),), generator) if with_states else None
        inputs = rows if hx is None else [*rows, *flat(hx)]

        def run(m: nn.Module) -> Any:
            if form == "unbatched":
                return m(rows[0], hx)  # noqa: B023
            if form == "even":
                return m(pad_sequence(rows, batch_first), hx)  # noqa: B023
            return m(pack_sequence(rows, enforce_sorted=form == "sorted"), hx)  # noqa: B023

        found, wanted = (results_and_grads(m, run, inputs) for m in (layer, expected))
        assert isinstance(found[0][0], type(wanted[0][0])) and isinstance(found[0][1], type(wanted[0][1]))
        case = f"{options} {with_states=}"
        torch.testing.assert_close(found[1], wanted[1], msg=lambda m, case=case: f"{case}: {m}")
        if isinstance(wanted[0][0], PackedSequence):
            for a, b in zip(found[0][0], wanted[0][0], strict=True):
                torch.testing.assert_close(a, b)
            found, wanted = ((r[0][1], None) for r in (found, wanted))
        torch.testing.assert_close(found[0], wanted[0], msg=lambda m, case=case: f"{case}: {m}")


@pytest.mark.parametrize("name", LAYERS)
def test_is_a_layer_of_torch(name: str) -> None:
    theirs, cls = getattr(nn, name), LAYERS[name]
    extra = {"proj_size": 2} if name == "LSTM" else {}
    torch.manual_seed(0)
    layer = cls(D, H, 2, bidirectional=True, **extra)
    torch.manual_seed(0)
    expected = theirs(D, H, 2, bidirectional=True, **extra)
    assert isinstance(layer, theirs) and repr(layer) == repr(expected)
    assert list(layer.state_dict()) == list(expected.state_dict())
    torch.testing.assert_close(layer.state_dict(), expected.state_dict(), rtol=0, atol=0)  # the same initialisation
    expected.load_state_dict(layer.state_dict())
    by_position = ["relu"] if name == "RNN" else []
    layer, expected = (m(D, H, 2, *by_position, False, True, 0.5, True) for m in (cls, theirs))
    assert layer.extra_repr() == expected.extra_repr()
    with pytest.raises(TypeError):
        cls(D, H, 2, *by_position, False, True, 0.5, True, 0, None, None, True)  # options of ours go by keyword


def test_dropout_between_layers() -> None:
    x = torch.randn(6, 3, D)
    for cls in LAYERS.values():
        layer = cls(D, H, 2, dropout=1.0, backend="reference")
        empty = copy.deepcopy(layer)
        with torch.no_grad():
            empty.weight_ih_l1.zero_()
        torch.testing.assert_close(layer(x), empty(x))  # nothing of the first layer gets through, and all of the second
        layer.dropout = 0.5
        assert not torch.equal(layer(x)[0], layer(x)[0])
        layer.eval()
        layer.backend = "vendor"
        expected = layer(x)
        layer.backend = "reference"
        torch.testing.assert_close(layer(x), expected)
    identity = RNN(64, 64, 2, nonlinearity="relu", dropout=0.25, backend="reference").irnn_()
    with torch.no_grad():
        for k in range(2):
            identity.get_parameter(f"weight_ih_l{k}").copy_(torch.eye(64))
            identity.get_parameter(f"weight_hh_l{k}").zero_()
    y = identity(torch.ones(5, 2, 64))[0]
    assert set(y.unique().tolist()) == {0.0, torch.tensor(1 / 0.75).item()}  # an element at a time
    assert 0.65 < (y != 0).float().mean() < 0.85
    assert (y[0] != y[1]).any()


# The options, against plain steps


def normed(v: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return (v - v.mean()) / (v.var(correction=0) + 1e-5).sqrt() * weight + bias


def plain_step(layer: Any, suffix: str, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """One row's step, as the classes' docstrings have it."""
    p: Callable[[str], Tensor] = lambda name: getattr(layer, name + suffix)  # noqa: E731
    x, r = p("weight_ih") @ x, p("weight_hh") @ h
    if layer.layer_norm:
        x, r = normed(x, p("ln_ih_weight"), p("ln_ih_bias")), normed(r, p("ln_hh_weight"), p("ln_hh_bias"))
    if layer.bias:
        x, r = x + p("bias_ih"), r + p("bias_hh")
    if isinstance(layer, (nn.RNN, nn.RNNCell)):
        return (torch.relu if layer.nonlinearity == "relu" else torch.tanh)(x + r), c
    if isinstance(layer, (nn.GRU, nn.GRUCell)):
        (x_r, x_z, x_n), (r_r, r_z, r_n) = x.chunk(3), r.chunk(3)
        z = torch.sigmoid(x_z + r_z)
        return (1 - z) * torch.tanh(x_n + torch.sigmoid(x_r + r_r) * r_n) + z * h, c
    i, f, g, o = (x + r).chunk(4)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    h = torch.sigmoid(o) * torch.tanh(normed(c, p("ln_c_weight"), p("ln_c_bias")) if layer.layer_norm else c)
    return (p("weight_hr") @ h if getattr(layer, "proj_size", 0) else h), c


def plain(layer: Any, rows: list[Tensor], hx: Any, resets: list[Tensor] | None) -> tuple[list[Tensor], list[Tensor]]:
    """What the layer should compute in evaluation, a row and a step at a time: outputs (T_b, ...) and the states."""
    lstm = isinstance(layer, nn.LSTM)
    zoneout_h, zoneout_c = layer.zoneout if isinstance(layer.zoneout, tuple) else (layer.zoneout, 0.0)
    P = getattr(layer, "proj_size", 0) or H
    states: list[tuple[Tensor, Tensor]] = []
    for k in range(layer.num_layers):
        parts = []
        for suffix in [f"_l{k}", f"_l{k}_reverse"][: 2 if layer.bidirectional else 1]:
            outputs, last = [], []
            for b, row in enumerate(rows):
                zeros = row.new_zeros(P), row.new_zeros(H)
                h, c = zeros
                if hx is not None:
                    h, c = (hx[0][len(states), b], hx[1][len(states), b]) if lstm else (hx[len(states), b], c)
                steps: list[Any] = [None] * len(row)
                for t in reversed(range(len(row))) if suffix.endswith("reverse") else range(len(row)):
                    if resets is not None and resets[b][t]:
                        h, c = zeros
                    new_h, new_c = plain_step(layer, suffix, row[t], h, c)
                    h, c = zoneout_h * h + (1 - zoneout_h) * new_h, zoneout_c * c + (1 - zoneout_c) * new_c
                    steps[t] = h
                outputs.append(torch.stack(steps) if steps else row.new_zeros(0, P))
                last.append((h, c))
            parts.append(outputs)
            states.append((torch.stack([h for h, _ in last]), torch.stack([c for _, c in last])))
        rows = [torch.cat(ys, -1) for ys in zip(*parts, strict=True)]
    hidden = [torch.stack([h for h, _ in states])]
    return rows, [*hidden, torch.stack([c for _, c in states])] if lstm else hidden


FORMS = {"even": [4, 4], "lengths": [2, 4, 0, 3], "packed": [2, 4, 3], "packed-even": [4, 4], "unbatched": [4]}


def call(layer: Any, form: str, rows: list[Tensor], hx: Any, resets: list[Tensor] | None) -> tuple[Any, list[Tensor]]:
    """The layer's result for these rows, handed to it in one of the forms that it takes."""
    first = layer.batch_first
    reset = None if resets is None else pad_sequence(resets, first)
    if form.startswith("packed"):
        packed, last = layer(pack_sequence(rows, enforce_sorted=False), hx, reset=reset)
        output, lengths = pad_packed_sequence(packed, batch_first=True)
        return [y[:n] for y, n in zip(output, lengths.tolist(), strict=True)], flat(last)
    if form == "unbatched":
        one = None if hx is None else tuple(s[:, 0] for s in flat(hx))
        one = one if one is None or isinstance(hx, tuple) else one[0]
        output, last = layer(rows[0], one, reset=None if resets is None else resets[0])
        return [output], [s.unsqueeze(1) for s in flat(last)]
    # NaN in the padding: nothing there may reach an output or a gradient.
    lengths = [len(row) for row in rows] if form == "lengths" else None
    output, last = layer(pad_sequence(rows, first, padding_value=math.nan), hx, lengths=lengths, reset=reset)
    output = output if first else output.transpose(0, 1)
    for y, row in zip(output, rows, strict=True):
        assert (y[len(row) :] == 0).all()
    return [y[: len(row)] for y, row in zip(output, rows, strict=True)], flat(last)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["RNN", "LSTM", "GRU", "LSTM-proj"])
def test_options_agree_with_plain_steps(name: str, form: str) -> None:
    generator = torch.Generator().manual_seed(2)
    extra = {"proj_size": 2} if "-" in name else {}
    cls = LAYERS[name.removesuffix("-proj")]
    zoneouts: list[Any] = [0.0, (0.3, 0.2) if cls is LSTM else 0.3]
    for layer_norm, zoneout, bidirectional in itertools.product([False, True], zoneouts, [False, True]):
        with_reset = (zoneout != 0.0) != bidirectional
        layer = cls(
            D, H, 2, bidirectional=bidirectional, batch_first=with_reset, bias=not bidirectional or layer_norm,
            layer_norm=layer_norm, zoneout=zoneout, dtype=torch.float64, **extra,
        ).eval()  # fmt: skip
        randomise(layer, generator)
        rows = [torch.randn(n, D, generator=generator, dtype=torch.float64).requires_grad_() for n in FORMS[form]]
        resets = [torch.rand(len(row), generator=generator) < 0.3 for row in rows] if with_reset else None
        hx = make_states(layer, (len(rows),), generator) if with_reset or layer_norm else None
        inputs = rows if hx is None else [*rows, *flat(hx)]
        found = results_and_grads(layer, lambda m: call(m, form, rows, hx, resets), inputs)  # noqa: B023
        wanted = results_and_grads(layer, lambda m: plain(m, rows, hx, resets), inputs)  # noqa: B023
        case = f"{layer_norm=} {zoneout=} {with_reset=} {bidirectional=}"
        torch.testing.assert_close(found, wanted, msg=lambda m, case=case: f"{case}: {m}")


@pytest.mark.parametrize("name", ["RNN", "LSTM", "GRU", "LSTM-proj"])
def test_zoneout_in_training_keeps_or_renews(name: str) -> None:
    extra = {"proj_size": 32} if "-" in name else {}
    cls, P = LAYERS[name.removesuffix("-proj")], 32 if extra else 64
    layer = cls(D, 64, zoneout=0.25, dtype=torch.float64, **extra)
    x, h0 = torch.randn(1, 20, D, dtype=torch.float64), torch.randn(1, 20, P, dtype=torch.float64)
    hx: Any = (h0, torch.randn(1, 20, 64, dtype=torch.float64)) if cls is LSTM else h0
    free = copy.deepcopy(layer)
    free.zoneout = 0.0
    (output, _), (renewed, _) = layer(x, hx), free(x, hx)
    kept = output == h0
    torch.testing.assert_close(output, torch.where(kept, h0, renewed))
    assert 0.2 < kept.double().mean() < 0.3
    if cls is LSTM:
        layer.zoneout = (0.0, 1.0)
        _, (h_n, c_n) = layer(x, hx)
        assert torch.equal(c_n, hx[1])  # the cell is kept, and h is that of the cell before zoneout
        torch.testing.assert_close(h_n, renewed)


@pytest.mark.parametrize("name", LAYERS)
def test_recurrent_dropout_is_one_mask_a_call(name: str) -> None:
    layer = LAYERS[name](D, H, 2, bidirectional=True, recurrent_dropout=0.4)
    x = torch.randn(7, 2, D)
    masks: list[Tensor] = []
    original = F.dropout

    def dropout(w: Tensor, p: float, training: bool) -> Tensor:
        assert p == 0.4 and training
        masks.append(original(torch.ones_like(w), p))
        return w * masks[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "dropout", dropout)
        output = layer(x)
    assert len(masks) == 4
    dropped = copy.deepcopy(layer)
    dropped.recurrent_dropout = 0.0
    with torch.no_grad():
        for k, mask in enumerate(masks):
            dropped.get_parameter(f"weight_hh_l{k // 2}" + "_reverse" * (k % 2)).mul_(mask)
    torch.testing.assert_close(output, dropped(x))
    assert set(torch.cat([m.flatten() for m in masks]).unique().tolist()) == {0.0, torch.tensor(1 / 0.6).item()}
    assert not torch.equal(layer(x)[0], layer(x)[0])
    layer.eval()
    with use_backend("vendor"):
        expected = layer(x)  # in evaluation it makes no difference, so that torch.nn's kernel can run
    with use_backend("reference"):
        torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("name", ["RNN", "LSTM", "GRU", "LSTM-proj"])
def test_grad_clip(name: str) -> None:
    extra = {"proj_size": 2} if "-" in name else {}
    layer = LAYERS[name.removesuffix("-proj")](D, H, grad_clip=0.01, dtype=torch.float64, **extra)
    x = torch.randn(1, 2, D, dtype=torch.float64, requires_grad=True)
    hx: Any = make_states(layer, (2,), torch.Generator().manual_seed(3))
    output, _ = layer(x, hx)
    weight = torch.randn_like(output)
    found = torch.autograd.grad((output * weight).sum(), [x, *flat(hx), *layer.parameters()], materialize_grads=True)
    layer.grad_clip = None
    output, _ = layer(x, hx)
    clipped = weight.clamp(-0.01, 0.01)  # in one step, dL/dh is the gradient of output
    wanted = torch.autograd.grad((output * clipped).sum(), [x, *flat(hx), *layer.parameters()], materialize_grads=True)
    torch.testing.assert_close(found, wanted)


def test_states_carried_over_chunks_give_the_whole() -> None:
    for cls in LAYERS.values():
        layer = cls(D, H, 2, layer_norm=True, dtype=torch.float64)
        x = torch.randn(7, 2, D, dtype=torch.float64)
        output, last = layer(x)
        first, hx = layer(x[:3])
        second, hx = layer(x[3:], hx)
        torch.testing.assert_close((torch.cat((first, second)), hx), (output, last))


# Which backend


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
    batch_sizes = torch.tensor([2, 2, 1])
    assert fused_backend("lstm", "lstm", weight_hh, torch.bfloat16, 3, 2, batch_sizes) == "cpp"
    assert asked[0].x.shape == (3, 2, 4 * H) and asked[0].x.dtype == torch.bfloat16
    assert asked[0].lengths.tolist() == [3, 2] and asked[0].sizes == (3, 2, H)
    assert fused_backend("lstm", "lstm", torch.randn(8, 2), torch.float32, 3, 2, None) is None
    monkeypatch.setitem(TABLES, "lstm", {})
    assert fused_backend("lstm", "lstm", weight_hh, torch.float32, 3, 2, None) is None


@pytest.mark.parametrize("faster", [False, True])
def test_auto_follows_the_rule(monkeypatch: pytest.MonkeyPatch, faster: bool) -> None:
    asked: list[dict[str, Any]] = []

    def rule(op: str, **facts: Any) -> bool:
        asked.append({"op": op, **facts})
        return faster

    vendor = []
    monkeypatch.setattr("recattn_kernels.layers.gated_base.vendor_is_faster", rule)
    monkeypatch.setattr(nn.GRU, "forward", lambda self, input, hx: vendor.append(input) or (input, hx))
    layer = GRU(D, H, 3, batch_first=True, bidirectional=True)
    x = torch.randn(2, 5, D)
    layer(x)
    facts = {"op": "gru", "device": "cpu", "dtype": torch.float32, "T": 5, "B": 2, "D": D, "H": H,
             "layers": 3, "directions": 2, "packed": False, "needs_grad": True}  # fmt: skip
    assert asked.pop() == facts
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        layer(pack_sequence([x[0], x[1, :2], x[1, :1]]))
    assert asked.pop() == facts | {"dtype": torch.bfloat16, "B": 3, "packed": True, "needs_grad": False}
    layer(x[0])
    assert asked.pop() == facts | {"B": 1}
    assert len(vendor) == 3 * faster
    layer(x, reset=torch.zeros(2, 5) > 0), layer(x[:, :0])
    assert not asked and len(vendor) == 3 * faster  # not asked where torch.nn cannot run
    monkeypatch.setitem(TABLES, "gru", {})
    layer(x)
    assert len(vendor) == 3 * faster + 1  # the reference is all that is left


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


# Initialisation


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
    with pytest.raises(TypeError, match=f"^{name}: module must be a torch.nn.{name}, got Linear$"):
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
    assert {t.dtype for t in (output, again, *flat(last))} == {torch.bfloat16}
    (output.float().sum() + again.float().sum()).backward()
    assert {p.grad.dtype for p in (x, *layer.parameters())} == {torch.float32}
    torch.testing.assert_close(output.float(), layer(x, hx)[0], rtol=0.05, atol=0.05)


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


# Bad input

BAD_OPTIONS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"layer_norm": 1}, TypeError, "NAME: layer_norm must be a bool, got 1"),
    ({"zoneout": 1.5}, ValueError, r"NAME: zoneout must be a probability in \[0, 1\], got 1.5"),
    ({"zoneout": "x"}, TypeError, "NAME: zoneout must be a number, got 'x'"),
    ({"recurrent_dropout": -0.1}, ValueError, r"NAME: recurrent_dropout must be a probability in \[0, 1\], got -0.1"),
    ({"grad_clip": 0}, ValueError, "NAME: grad_clip must be positive, got 0"),
    ({"backend": "cudnn"}, ValueError, "NAME: backend must be one of auto, .*, got 'cudnn'"),
    ({"hidden_size": 0}, ValueError, "hidden_size must be greater than zero"),
    ({"bias": 1}, TypeError, "bias should be of type bool, got: int"),
    ({"dropout": 2.0}, ValueError, "dropout should be a number in range .*"),
]


@pytest.mark.parametrize(("options", "error", "message"), BAD_OPTIONS, ids=lambda v: str(v)[:40])
def test_bad_options(options: dict[str, Any], error: type[Exception], message: str) -> None:
    for name, cls in LAYERS.items():
        with pytest.raises(error, match=f"^{message.replace('NAME', name)}$"):
            cls(**{"input_size": D, "hidden_size": H, **options})


def test_bad_pairs_of_zoneout() -> None:
    with pytest.raises(TypeError, match=r"^LSTM: zoneout must be a number or a pair of them \(h, c\), got 3 elements$"):
        LSTM(D, H, zoneout=(0.1, 0.1, 0.1))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"^GRU: zoneout must be a number, got \(0.1, 0.1\)$"):
        GRU(D, H, zoneout=(0.1, 0.1))
    with pytest.raises(ValueError, match=r"^Unknown nonlinearity 'gelu'"):
        RNN(D, H, nonlinearity="gelu")
    with pytest.raises(ValueError, match=r"^proj_size argument is only supported for LSTM"):
        GRU(D, H, proj_size=2)


X, Z = torch.zeros(5, 2, D), torch.zeros
PACKED = pack_sequence([Z(3, D), Z(2, D)])

# Arguments that torch.nn refuses in its own words, the same on every backend.
AS_TORCH: list[Callable[[bool], tuple[Any, ...]]] = [
    lambda pair: (Z(D),),
    lambda pair: (Z(1, 5, 2, D),),
    lambda pair: (Z(5, 2, 7),),
    lambda pair: (Z(5, 7),),
    lambda pair: (X.double(),),
    lambda pair: (X.long(),),
    lambda pair: (X, (Z(2, H), Z(2, H)) if pair else Z(2, H)),
    lambda pair: (X[:, 0], (Z(2, 1, H), Z(2, 1, H)) if pair else Z(2, 1, H)),
    lambda pair: (X, (Z(1, 2, H), Z(2, 2, H)) if pair else Z(1, 2, H)),
    lambda pair: (X, (Z(2, 2, H), Z(2, 2, 7)) if pair else Z(2, 2, 7)),
    lambda pair: (PACKED, (Z(2, 3, H), Z(2, 3, H)) if pair else Z(2, 3, H)),
    lambda pair: (pack_sequence([Z(3, 7)]),),
]


@pytest.mark.parametrize("case", range(len(AS_TORCH)))
@pytest.mark.parametrize("name", LAYERS)
def test_bad_calls_in_the_words_of_torch(name: str, case: int) -> None:
    args = AS_TORCH[case](name == "LSTM")
    if name == "LSTM" and isinstance(args[0], PackedSequence):
        args = (pad_packed_sequence(args[0])[0], *args[1:])  # torch.nn.LSTM looks at neither when they are packed
    with pytest.raises(Exception) as expected:
        getattr(nn, name)(D, H, 2)(*args)
    for backend in ("reference", "vendor", "auto"):
        with pytest.raises(type(expected.value), match=f"^{re.escape(str(expected.value))}$"):
            LAYERS[name](D, H, 2, backend=backend)(*args)


BAD_CALLS: list[tuple[tuple[Any, ...], dict[str, Any], type[Exception], str]] = [
    ((None,), {}, TypeError, "GRU: input must be a Tensor, got NoneType"),
    ((X, [0]), {}, TypeError, "GRU: hx must be a Tensor, got list"),
    ((X, Z(2, 2, H).double()), {}, TypeError, "GRU: hx must be float32, got float64"),
    ((X, Z(2, 2, H, device="meta")), {}, ValueError, "GRU: hx must be on cpu as input is, got meta"),
    ((X,), {"lengths": [5]}, ValueError, r"GRU: lengths must be \(B,\) = \(2,\), got \(1,\)"),
    ((X,), {"lengths": [6, 1]}, ValueError, r"GRU: lengths must lie in \[0, T\] = \[0, 5\], got 6"),
    ((X,), {"lengths": torch.tensor([1.0, 2.0])}, TypeError, "GRU: lengths must be int64, got float32"),
    ((X[:, 0],), {"lengths": [5]}, ValueError, r"GRU: lengths must be None with unbatched input, got \[5\]"),
    ((PACKED,), {"lengths": [3, 2]}, ValueError, "GRU: lengths must be None with a PackedSequence, which has its own"),
    ((X,), {"reset": Z(2, 5) > 0}, ValueError, r"GRU: reset must be \(T, B\) = \(5, 2\), got \(2, 5\)"),
    ((X,), {"reset": Z(5, 2)}, TypeError, "GRU: reset must be bool, got float32"),
    ((X[:, 0],), {"reset": Z(5, 2) > 0}, ValueError, r"GRU: reset must be \(T,\) = \(5,\), got \(5, 2\)"),
    ((PACKED,), {"reset": Z(2, 3) > 0}, ValueError, r"GRU: reset must be \(T, B\) = \(3, 2\), got \(2, 3\)"),
]  # fmt: skip


@pytest.mark.parametrize(("args", "kwargs", "error", "message"), BAD_CALLS, ids=lambda v: str(v)[-40:])
def test_bad_calls(args: tuple[Any, ...], kwargs: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{message}$"):
        GRU(D, H, 2)(*args, **kwargs)


def test_packed_input_of_the_lstm_is_checked() -> None:
    for backend in ("reference", "vendor"):
        layer = LSTM(D, H, 2, backend=backend)
        with pytest.raises(RuntimeError, match=r"^Expected hidden\[0\] size \(2, 2, 4\), got \[2, 3, 4\]$"):
            layer(PACKED, (Z(2, 3, H), Z(2, 3, H)))
        with pytest.raises(RuntimeError, match=r"^input.size\(-1\) must be equal to input_size. Expected 3, got 7$"):
            layer(pack_sequence([Z(3, 7)]))


def test_bad_states_of_the_lstm() -> None:
    state, pair = Z(1, 2, H), r"LSTM: hx must be a pair of Tensors \(h_0, c_0\), got "
    for hx, error, message in (
        (state, TypeError, pair + "Tensor"),
        ((state,), TypeError, pair + "1 elements"),
        ((state, None), TypeError, r"LSTM: hx\[1\] must be a Tensor, got NoneType"),
        ((state.double(), state), TypeError, r"LSTM: hx\[0\] must be float32, got float64"),
    ):
        with pytest.raises(error, match=f"^{message}$"):
            LSTM(D, H)(X, hx)
    with pytest.raises(ValueError, match=r"^GRU: input must be on meta as weight_ih_l0 is, got cpu$"):
        GRU(D, H, device="meta", backend="reference")(X)
