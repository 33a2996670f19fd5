"""RNN, LSTM and GRU against torch.nn's, and their options against plain steps written out here."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence, pad_packed_sequence, pad_sequence

from recattn_kernels import GRU, LSTM, RNN, use_backend

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


@pytest.mark.parametrize("backend", ["auto", "vendor", "reference", "cpp"])
@pytest.mark.parametrize("form", LENGTHS)
@pytest.mark.parametrize("name", LAYERS)
def test_agrees_with_torch(name: str, form: str, backend: str) -> None:
    generator = torch.Generator().manual_seed(1)
    own: list[dict[str, Any]] = [{}]
    if name == "RNN":
        own.append({"nonlinearity": "relu"})
    if name == "LSTM" and backend != "cpp":
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_packed_rows_give_what_padded_ones_give(name: str, dtype: torch.dtype) -> None:
    lengths = [7, 11, 1, 11, 4, 9, 2, 10, 6]
    generator = torch.Generator().manual_seed(5)
    rows = [torch.randn(n, D, generator=generator).to(dtype).requires_grad_() for n in lengths]
    for layer_norm, bidirectional in itertools.product([False, True], [False, True]):
        layer = LAYERS[name](
            D, 33, 2, bidirectional=bidirectional, layer_norm=layer_norm, zoneout=0.2, dtype=dtype, backend="cpp"
        ).eval()
        randomise(layer, generator)
        padded, packed = (
            results_and_grads(layer, lambda m, form=form: call(m, form, rows, None, None), rows)
            for form in ("lengths", "packed")
        )
        # The backward over time, and the sums for weights that follow it, take a row's steps in the same order; but the
        # rows come longest first, and biases and projections are summed over all of them.
        torch.testing.assert_close(packed[0], padded[0], rtol=0, atol=0)
        for found, wanted in zip(packed[1], padded[1], strict=True):
            assert (found - wanted).abs().max() <= 5 * torch.finfo(dtype).eps * wanted.abs().max()


@pytest.mark.parametrize("name", LAYERS)
def test_packed_rows_have_second_derivatives(name: str) -> None:
    layer = LAYERS[name](D, H, dtype=torch.float64, backend="cpp")
    rows = [torch.randn(n, D, dtype=torch.float64, requires_grad=True) for n in (2, 4, 3)]

    def output(*rows: Tensor) -> Tensor:
        packed, last = layer(pack_sequence(rows, enforce_sorted=False))
        return torch.cat([t.flatten() for t in (packed.data, *flat(last))])

    assert torch.autograd.gradgradcheck(output, rows)
