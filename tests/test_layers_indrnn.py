"""IndRNN and IndRNNCell against plain steps written out here, and as citizens of torch.nn."""

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

from recattn_kernels import BackendUnavailableError, use_backend
from recattn_kernels.layers.indrnn import IndRNN, IndRNNCell
from recattn_kernels.layers.norm import batch_norm

D, H = 3, 4

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu, "tanh": torch.tanh, "sigmoid": torch.sigmoid, "identity": lambda v: v,
    "leaky_relu": F.leaky_relu, "relu6": F.relu6, "hardtanh": F.hardtanh,
}  # fmt: skip


def plain(
    layer: IndRNN, rows: list[Tensor], h0: Tensor | None, resets: list[Tensor] | None
) -> tuple[list[Tensor], Tensor]:
    """What the layer should compute, a row and a step at a time: rows (T_b, D), h0 (states, B, H), resets (T_b,)."""
    act = ACTIVATIONS[layer.nonlinearity]
    states = []
    for k in range(layer.num_layers):
        outputs = []
        for suffix in [f"_l{k}", f"_l{k}_reverse"][: 2 if layer.bidirectional else 1]:
            weight_ih, weight_hh = layer.get_parameter("weight_ih" + suffix), layer.get_parameter("weight_hh" + suffix)
            bias = layer.get_parameter("bias" + suffix) if layer.bias else torch.zeros_like(weight_hh)
            norm = getattr(layer, "norm" + suffix, None)
            projected = [torch.stack([weight_ih @ x for x in row]) if len(row) else row.new_zeros(0, H) for row in rows]
            if layer.norm == "before":
                projected = list(norm(torch.cat(projected)).split([len(row) for row in rows]))
            out, last = [], []
            for b, row in enumerate(projected):
                h = torch.zeros(H, dtype=row.dtype) if h0 is None else h0[len(states), b]
                steps: list[Any] = [None] * len(row)
                for t in reversed(range(len(row))) if suffix.endswith("reverse") else range(len(row)):
                    if resets is not None and resets[b][t]:
                        h = torch.zeros_like(h)
                    h = steps[t] = act(row[t] + bias + weight_hh * h)
                out.append(torch.stack(steps) if steps else row.new_zeros(0, H))
                last.append(h)
            if layer.norm == "after":
                out = list(norm(torch.cat(out)).split([len(row) for row in rows]))
            outputs.append(out)
            states.append(torch.stack(last))
        ys = [torch.cat(parts, -1) for parts in zip(*outputs, strict=True)]
        rows = [x + y if layer.residual and x.shape == y.shape else y for x, y in zip(rows, ys, strict=True)]
    return rows, torch.stack(states)


LENGTHS = {"even": [5, 5, 5], "lengths": [2, 5, 0, 3], "packed": [2, 5, 3], "packed-even": [5, 5], "unbatched": [5]}


def call(
    layer: IndRNN, form: str, rows: list[Tensor], h0: Tensor | None, resets: list[Tensor] | None
) -> tuple[list[Tensor], Tensor]:
    """The layer's result for these rows, handed to it in one of the forms that it takes."""
    first = layer.batch_first
    reset = None if resets is None else pad_sequence(resets, first)
    if form.startswith("packed"):
        packed, h_n = layer(pack_sequence(rows, enforce_sorted=False), h0, reset=reset)
        assert isinstance(packed, PackedSequence)
        output, lengths = pad_packed_sequence(packed, batch_first=True)
        assert lengths.tolist() == [len(row) for row in rows]
        return [y[:n] for y, n in zip(output, lengths.tolist(), strict=True)], h_n
    if form == "unbatched":
        h0, reset = None if h0 is None else h0[:, 0], None if resets is None else resets[0]
        output, h_n = layer(rows[0], h0, reset=reset)
        return [output], h_n.unsqueeze(1)
    # NaN in the padding: nothing there may reach an output or a gradient.
    lengths = [len(row) for row in rows] if form == "lengths" else None
    output, h_n = layer(pad_sequence(rows, first, padding_value=math.nan), h0, lengths=lengths, reset=reset)
    output = output if first else output.transpose(0, 1)
    for y, row in zip(output, rows, strict=True):
        assert (y[len(row) :] == 0).all()
    return [y[: len(row)] for y, row in zip(output, rows, strict=True)], h_n


def make_rows(lengths: list[int], generator: torch.Generator, width: int = D) -> list[Tensor]:
    return [torch.randn(n, width, generator=generator, dtype=torch.float64).requires_grad_() for n in lengths]


def randomise(layer: nn.Module, generator: torch.Generator) -> None:
    with torch.no_grad():
        for p in layer.parameters():
            p.copy_(torch.randn(p.shape, generator=generator))


@pytest.mark.parametrize("form", LENGTHS)
@pytest.mark.parametrize("norm", [None, "before", "after"])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_agrees_with_plain_steps(form: str, norm: str | None, bidirectional: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    # residual with a first layer that is as wide as its input, and with one that is not
    cases = itertools.product([1, 2], [False, True], [False, True], [False, True])
    for num_layers, residual, with_reset, batch_first in cases:
        width = H * (2 if bidirectional else 1) if residual and with_reset else D
        layer = IndRNN(
            width, H, num_layers, bidirectional=bidirectional, norm=norm, residual=residual,
            batch_first=batch_first, bias=num_layers == 2, dtype=torch.float64,
        )  # fmt: skip
        randomise(layer, generator)
        other = copy.deepcopy(layer)
        rows = make_rows(LENGTHS[form], generator, width)
        resets = [torch.rand(len(row), generator=generator) < 0.3 for row in rows] if with_reset else None
        h0 = torch.randn(num_layers * layer.num_directions, len(rows), H, generator=generator, dtype=torch.float64)
        h0.requires_grad_()

        results = []
        for run in (lambda: call(layer, form, rows, h0, resets), lambda: plain(other, rows, h0, resets)):  # noqa: B023
            outputs, h_n = run()
            weights = [torch.linspace(-1, 1, t.numel(), dtype=t.dtype).sin().view(t.shape) for t in (*outputs, h_n)]
            loss = sum((t * w).sum() for t, w in zip((*outputs, h_n), weights, strict=True))
            parameters = (layer if not results else other).parameters()
            grads = torch.autograd.grad(loss, [*rows, h0, *parameters], materialize_grads=True)
            results.append((outputs, h_n, grads))
        case = f"{num_layers=} {residual=} {with_reset=} {batch_first=}"
        torch.testing.assert_close(*results, msg=lambda m, case=case: f"{case}: {m}")
        torch.testing.assert_close(dict(layer.named_buffers()), dict(other.named_buffers()))


@pytest.mark.parametrize("nonlinearity", ACTIVATIONS)
def test_nonlinearities_and_absent_state(nonlinearity: str) -> None:
    generator = torch.Generator().manual_seed(2)
    layer = IndRNN(D, H, 2, nonlinearity=nonlinearity, dtype=torch.float64)
    randomise(layer, generator)
    rows = make_rows([4, 4], generator)
    torch.testing.assert_close(call(layer, "even", rows, None, None), plain(layer, rows, None, None))


@pytest.mark.parametrize("norm", ["before", "after"])
@pytest.mark.parametrize("form", LENGTHS)
def test_norm_in_evaluation_uses_what_it_has_run_up(form: str, norm: str) -> None:
    generator = torch.Generator().manual_seed(3)
    layer = IndRNN(D, H, 2, norm=norm, bidirectional=True, dtype=torch.float64)
    randomise(layer, generator)
    rows = make_rows(LENGTHS[form], generator)
    call(layer, form, rows, None, None)
    layer.eval()
    before = copy.deepcopy(dict(layer.named_buffers()))
    torch.testing.assert_close(call(layer, form, rows, None, None), plain(layer, rows, None, None))
    torch.testing.assert_close(dict(layer.named_buffers()), before, rtol=0, atol=0)


@pytest.mark.parametrize("change", ["cumulative", "no statistics", "no affine", "layer norm"])
def test_norm_with_lengths_follows_the_module_in_its_place(change: str) -> None:
    generator = torch.Generator().manual_seed(4)
    layer = IndRNN(D, H, norm="before", dtype=torch.float64)
    randomise(layer, generator)
    layer.norm_l0 = {
        "cumulative": nn.BatchNorm1d(H, momentum=None),
        "no statistics": nn.BatchNorm1d(H, track_running_stats=False),
        "no affine": nn.BatchNorm1d(H, affine=False),
        "layer norm": nn.LayerNorm(H),
    }[change].double()
    other = copy.deepcopy(layer)
    for training in (True, True, False):
        rows = make_rows(LENGTHS["lengths"], generator)
        layer.train(training), other.train(training)
        torch.testing.assert_close(call(layer, "lengths", rows, None, None), plain(other, rows, None, None))
        torch.testing.assert_close(dict(layer.named_buffers()), dict(other.named_buffers()))


def test_masked_norm_is_that_of_the_valid_steps() -> None:
    norm = nn.BatchNorm1d(H).double()
    other = copy.deepcopy(norm)
    valid = torch.tensor([True, False, True, True]).view(2, 2, 1)
    x = torch.randn(2, 2, H, dtype=torch.float64).masked_fill(~valid, math.nan).requires_grad_()
    y = batch_norm(norm, x, valid)[valid.squeeze(-1)]
    expected = other(x[valid.squeeze(-1)])
    weight = torch.randn(3, H, dtype=torch.float64)
    grads = [torch.autograd.grad((t * weight).sum(), (x, *m.parameters())) for t, m in ((y, norm), (expected, other))]
    torch.testing.assert_close((y, *grads[0]), (expected, *grads[1]))
    torch.testing.assert_close(dict(norm.named_buffers()), dict(other.named_buffers()))


def test_packed_sorted_and_unsorted_agree() -> None:
    generator = torch.Generator().manual_seed(5)
    layer = IndRNN(D, H, 2, bidirectional=True, dtype=torch.float64)
    rows = make_rows([5, 3, 2], generator)
    h0 = torch.randn(4, 3, H, generator=generator, dtype=torch.float64)
    output, h_n = layer(pack_sequence(rows), h0)
    order = [2, 0, 1]
    shuffled, h_n_shuffled = layer(pack_sequence([rows[b] for b in order], enforce_sorted=False), h0[:, order])
    assert output.sorted_indices is None and shuffled.unsorted_indices is not None
    torch.testing.assert_close(shuffled.data, output.data)
    torch.testing.assert_close(h_n_shuffled, h_n[:, order])


def pass_through(dropout: float) -> IndRNN:
    """Two layers that hand on a positive input: the output shows the dropout between them."""
    layer = IndRNN(64, 64, 2, dropout=dropout)
    with torch.no_grad():
        for name, p in layer.named_parameters():
            p.copy_(torch.eye(64) if "weight_ih" in name else torch.zeros(64))
    return layer


@pytest.mark.parametrize("form", ["even", "lengths", "packed"])
def test_dropout_drops_a_feature_of_a_row_in_every_step(form: str) -> None:
    torch.manual_seed(0)
    layer = pass_through(0.25)
    rows = [torch.rand(n, 64) + 1 for n in LENGTHS[form]]
    outputs, h_n = call(layer, form, rows, None, None)
    kept = torch.stack([(y != 0)[0] for y in outputs if len(y)])
    for row, y in zip(rows, outputs, strict=True):
        if len(y):
            torch.testing.assert_close(y, row / 0.75 * (y[0] != 0))
    assert 0.6 < kept.float().mean() < 0.9
    assert (kept[0] != kept[1]).any()
    torch.testing.assert_close(h_n[0, 0], rows[0][-1])  # a state is what the recurrence holds: nothing is dropped of it
    torch.testing.assert_close(call(layer.eval(), form, rows, None, None)[0], rows)


def test_dropout_of_everything_and_of_the_last_layer() -> None:
    x = torch.rand(5, 2, 64) + 1
    assert (pass_through(1.0)(x)[0] == 0).all()
    with pytest.warns(UserWarning, match=r"^IndRNN: dropout=0.5 has no effect with num_layers=1"):
        layer = IndRNN(3, 4, dropout=0.5)
    x = torch.randn(5, 2, 3)
    torch.testing.assert_close(layer(x), layer.eval()(x))


def test_cell_agrees_with_the_layer() -> None:
    generator = torch.Generator().manual_seed(6)
    layer = IndRNN(D, H, nonlinearity="tanh", recurrent_max=0.5, dtype=torch.float64)
    cell = IndRNNCell(D, H, nonlinearity="tanh", recurrent_max=0.5, dtype=torch.float64)
    randomise(layer, generator)
    cell.load_state_dict({name.removesuffix("_l0"): value for name, value in layer.state_dict().items()})
    x = torch.randn(5, 2, D, generator=generator, dtype=torch.float64)
    h = torch.randn(2, H, generator=generator, dtype=torch.float64)
    output, h_n = layer(x, h.unsqueeze(0))
    states, single = [], []
    h_row = h[1]
    for x_t in x:
        h = cell(x_t, h)
        h_row = cell(x_t[1], h_row)
        states.append(h)
        single.append(h_row)
    torch.testing.assert_close(torch.stack(states), output)
    torch.testing.assert_close(torch.stack(single), output[:, 1])
    torch.testing.assert_close(h, h_n[0])
    loss, other = torch.stack(states).square().sum(), output.square().sum()
    torch.testing.assert_close(
        torch.autograd.grad(loss, list(cell.parameters())), torch.autograd.grad(other, list(layer.parameters()))
    )
    assert cell(x[0]).shape == (2, H) and cell(x[0, 0]).shape == (H,)
    assert "bias" not in IndRNNCell(D, H, bias=False).state_dict()


def test_states_carried_over_chunks_give_the_whole() -> None:
    layer = IndRNN(D, H, 2, dtype=torch.float64)
    x = torch.randn(7, 2, D, dtype=torch.float64)
    output, h_n = layer(x)
    first, h = layer(x[:3])
    second, h = layer(x[3:], h)
    torch.testing.assert_close((torch.cat((first, second)), h), (output, h_n))


# The bound


def test_initialisation() -> None:
    T = 50
    high, low = 2 ** (1 / T), 2 ** (-1 / T)
    ranges = {
        (None, None): [(0, 1), (0, 1)],
        (None, T): [(0, high), (low, high)],
        (1.5, None): [(0, 1.5), (0, 1.5)],
        (1.0, T): [(0, 1.0), (low, 1.0)],
        (0.5, T): [(0, 0.5), (0.5, 0.5)],
    }
    for (recurrent_max, sequence_length), expected in ranges.items():
        layer = IndRNN(10, 2000, 2, bidirectional=True, recurrent_max=recurrent_max, sequence_length=sequence_length)
        for k, (a, b) in enumerate(expected):
            for suffix in ("", "_reverse"):
                u = layer.get_parameter(f"weight_hh_l{k}{suffix}")
                slack = 0.02 * (b - a)
                assert a <= u.min() <= a + slack + 1e-7 and b - slack - 1e-7 <= u.max() <= b + 1e-7
                assert (layer.get_parameter(f"bias_l{k}{suffix}") == 0).all()
        assert 0.0095 < layer.get_parameter("weight_ih_l0").std() < 0.0105
    assert 0.99 < IndRNNCell(3, 2000).weight_hh.max() <= 1
    assert 1.98 < IndRNNCell(3, 2000, recurrent_max=2).weight_hh.max() <= 2


def test_bound_is_a_clamp_with_a_straight_through_gradient() -> None:
    generator = torch.Generator().manual_seed(7)
    layer = IndRNN(D, H, recurrent_max=0.9, nonlinearity="tanh")
    clamped = IndRNN(D, H, nonlinearity="tanh")
    values = torch.tensor([0.3, 2.0, -2.0, -0.5])
    with torch.no_grad():
        layer.weight_hh_l0.copy_(values)
    clamped.load_state_dict(layer.state_dict())
    with torch.no_grad():
        clamped.weight_hh_l0.clamp_(-0.9, 0.9)
    x = torch.randn(6, 2, D, generator=generator)
    output, expected = layer(x)[0], clamped(x)[0]
    assert torch.equal(output, expected)
    output.square().sum().backward()
    expected.square().sum().backward()
    assert torch.equal(layer.weight_hh_l0.grad, clamped.weight_hh_l0.grad)
    assert torch.equal(layer.weight_hh_l0, values)  # forward leaves the parameter as it is
    assert layer.clamp_recurrent_() is layer
    assert torch.equal(layer.weight_hh_l0, clamped.weight_hh_l0)
    assert torch.equal(layer(x)[0], output)


def test_clamp_recurrent_reaches_every_layer() -> None:
    layer = IndRNN(D, H, 2, bidirectional=True, recurrent_max=0.5)
    cell = IndRNNCell(D, H, recurrent_max=0.5)
    free = IndRNN(D, H)
    for module in (layer, cell, free):
        with torch.no_grad():
            for p in module.parameters():
                p.fill_(3.0)
        module.clamp_recurrent_()
        for name, p in module.named_parameters():
            assert (p == (0.5 if "weight_hh" in name and module is not free else 3.0)).all()
            assert p.requires_grad


def test_grad_clip_bounds_the_gradient_of_every_step() -> None:
    layer = IndRNN(1, 1, nonlinearity="identity", bias=False, grad_clip=0.5, dtype=torch.float64)
    with torch.no_grad():
        layer.weight_ih_l0.fill_(1.0), layer.weight_hh_l0.fill_(2.0)
    x = torch.zeros(4, 1, 1, dtype=torch.float64, requires_grad=True)
    layer(x)[0][-1].backward(torch.ones(1, 1, dtype=torch.float64))
    assert x.grad.flatten().tolist() == [0.5] * 4


# A citizen of torch.nn


def test_state_dict_keys() -> None:
    layer = IndRNN(D, H, 2, bidirectional=True, norm="before")
    suffixes = ["_l0", "_l0_reverse", "_l1", "_l1_reverse"]
    buffers = ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]
    keys = [f"{name}{s}" for s in suffixes for name in ("weight_ih", "weight_hh", "bias")]
    assert set(layer.state_dict()) == {*keys, *(f"norm{s}.{buffer}" for s in suffixes for buffer in buffers)}
    assert layer.weight_ih_l1_reverse.shape == (H, 2 * H) and layer.weight_hh_l1.shape == (H,)
    assert list(IndRNN(D, H, bias=False).state_dict()) == ["weight_ih_l0", "weight_hh_l0"]
    assert list(IndRNNCell(D, H).state_dict()) == ["weight_ih", "weight_hh", "bias"]


@pytest.mark.parametrize("norm", [None, "before", "after"])
def test_autocast(norm: str | None) -> None:
    torch.manual_seed(0)
    layer = IndRNN(D, H, 2, norm=norm)
    exact = copy.deepcopy(layer)
    x = torch.randn(5, 2, D, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        output, h_n = layer(x, lengths=[5, 4])
        again, _ = layer(x, h_n)  # a state under autocast is what the next call gets
    assert output.dtype == h_n.dtype == again.dtype == torch.bfloat16
    (output.float().sum() + again.float().sum()).backward()
    assert {p.grad.dtype for p in (x, *layer.parameters())} == {torch.float32}
    torch.testing.assert_close(output.float(), exact(x, lengths=[5, 4])[0], rtol=0.05, atol=0.05)
    with torch.autocast("cpu", torch.bfloat16):
        h = IndRNNCell(D, H)(x[0], torch.zeros(2, H))
    assert h.dtype == torch.float32  # as the state that it was given


def test_sixteen_bit_parameters() -> None:
    layer = IndRNN(D, H, 2, dtype=torch.bfloat16)
    output, h_n = layer(torch.randn(5, 2, D, dtype=torch.bfloat16), torch.zeros(2, 2, H))
    assert output.dtype == torch.bfloat16 and h_n.dtype == torch.float32


@pytest.mark.parametrize("lengths", [None, torch.tensor([5, 3])])
def test_compiles_to_one_graph(lengths: Tensor | None) -> None:
    torch.manual_seed(0)
    layer = IndRNN(D, H, 2, norm="before", residual=True, bidirectional=True, recurrent_max=0.5)
    other = copy.deepcopy(layer)
    x = torch.randn(5, 2, D)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    results = []
    for module, run in ((layer, compiled), (other, other)):
        output, h_n = run(x, lengths=lengths)
        (output.sum() + h_n.sum()).backward()
        results.append((output, h_n, {name: p.grad for name, p in module.named_parameters()}, module.state_dict()))
    torch.testing.assert_close(*results)


def test_functional_transforms() -> None:
    layer = IndRNN(D, H, 2, recurrent_max=0.5, dtype=torch.float64)
    x = torch.randn(5, 2, D, dtype=torch.float64)
    parameters = dict(layer.named_parameters())

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(layer, parameters, (x,))[0].square().sum()

    expected = torch.autograd.grad(loss(parameters, x), list(parameters.values()))
    grads = torch.func.grad(loss)(parameters, x)
    torch.testing.assert_close(list(grads.values()), list(expected))
    per_row = torch.func.vmap(torch.func.grad(loss), (None, 1))(parameters, x)  # unbatched rows
    torch.testing.assert_close([g.sum(0) for g in per_row.values()], list(expected))


def test_empty_batches() -> None:
    for norm in (None, "before", "after"):
        layer = IndRNN(D, H, 2, norm=norm, residual=True)
        h0 = torch.randn(2, 2, H)
        output, h_n = layer(torch.zeros(0, 2, D), h0)
        assert output.shape == (0, 2, H) and torch.equal(h_n, h0)
        output, h_n = layer(torch.zeros(5, 0, D), lengths=[])
        assert output.shape == (5, 0, H) and h_n.shape == (2, 0, H)
        output.sum().backward()
    assert IndRNNCell(D, H)(torch.zeros(0, D)).shape == (0, H)


def test_backend() -> None:
    x = torch.randn(5, 2, D)
    layer = IndRNN(D, H, backend="reference")
    expected = layer(x)[0]
    layer.backend = None
    with use_backend("reference"):
        assert torch.equal(layer(x)[0], expected)
    for module in (IndRNN(D, H, backend="cuda"), IndRNNCell(D, H, backend="cuda")):
        with pytest.raises(BackendUnavailableError, match=r"^indrnn: backend 'cuda' cannot run this call"):
            module(x if isinstance(module, IndRNN) else x[0])


# Bad input

BAD_OPTIONS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"input_size": 0}, ValueError, "IndRNN: input_size must be at least 1, got 0"),
    ({"hidden_size": 2.0}, TypeError, "IndRNN: hidden_size must be an int, got 2.0"),
    ({"num_layers": 0}, ValueError, "IndRNN: num_layers must be at least 1, got 0"),
    ({"num_layers": True}, TypeError, "IndRNN: num_layers must be an int, got True"),
    ({"nonlinearity": "gelu"}, ValueError, "IndRNN: nonlinearity must be one of relu, tanh, .*, got 'gelu'"),
    ({"bias": 1}, TypeError, "IndRNN: bias must be a bool, got 1"),
    ({"batch_first": None}, TypeError, "IndRNN: batch_first must be a bool, got None"),
    ({"dropout": 1.5}, ValueError, r"IndRNN: dropout must be a probability in \[0, 1\], got 1.5"),
    ({"dropout": True}, TypeError, "IndRNN: dropout must be a number, got True"),
    ({"bidirectional": 2}, TypeError, "IndRNN: bidirectional must be a bool, got 2"),
    ({"norm": "layer"}, ValueError, "IndRNN: norm must be one of None, 'before', 'after', got 'layer'"),
    ({"residual": "yes"}, TypeError, "IndRNN: residual must be a bool, got 'yes'"),
    ({"recurrent_max": 0}, ValueError, "IndRNN: recurrent_max must be positive, got 0"),
    ({"recurrent_max": math.inf}, ValueError, "IndRNN: recurrent_max must be finite, got inf"),
    ({"sequence_length": 0}, ValueError, "IndRNN: sequence_length must be at least 1, got 0"),
    ({"sequence_length": 9.5}, TypeError, "IndRNN: sequence_length must be an int, got 9.5"),
    ({"grad_clip": -1}, ValueError, "IndRNN: grad_clip must be positive, got -1"),
    ({"backend": "cudnn"}, ValueError, "IndRNN: backend must be one of auto, .*, got 'cudnn'"),
]


@pytest.mark.parametrize(("options", "error", "message"), BAD_OPTIONS, ids=lambda v: str(v)[:40])
def test_bad_options(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{message}$"):
        IndRNN(**{"input_size": D, "hidden_size": H, **options})
    if set(options) <= {"input_size", "hidden_size", "bias", "nonlinearity", "recurrent_max", "backend"}:
        with pytest.raises(error, match=f"^{message.replace('IndRNN', 'IndRNNCell')}$"):
            IndRNNCell(**{"input_size": D, "hidden_size": H, **options})


X = torch.zeros(5, 2, D)
PACKED = pack_sequence([torch.zeros(3, D), torch.zeros(2, D)])
STATES = r"IndRNN: h0 must be \(num_layers \* num_directions, B, H\) = \(2, 2, 4\), got "

BAD_CALLS: list[tuple[tuple[Any, ...], dict[str, Any], type[Exception], str]] = [
    ((None,), {}, TypeError, "IndRNN: input must be a Tensor, got NoneType"),
    ((torch.zeros(D),), {}, ValueError, r"IndRNN: input must be \(T, B, D\) or \(T, D\), got \(3,\)"),
    ((torch.zeros(1, 5, 2, D),), {}, ValueError, r"IndRNN: input must be \(T, B, D\) or \(T, D\), got \(1, 5, 2, 3\)"),
    ((torch.zeros(5, 2, 7),), {}, ValueError,
     r"IndRNN: input must be \(T, B, D\) with D = input_size = 3, got \(5, 2, 7\)"),
    ((torch.zeros(5, 7),), {}, ValueError, r"IndRNN: input must be \(T, D\) with D = input_size = 3, got \(5, 7\)"),
    ((X.double(),), {}, TypeError, "IndRNN: input must be float32, got float64"),
    ((X.long(),), {}, TypeError, "IndRNN: input must be float32, got int64"),
    ((X.to("meta"),), {}, ValueError, "IndRNN: input must be on cpu as weight_ih is, got meta"),
    ((X, torch.zeros(1, 2, H)), {}, ValueError, STATES + r"\(1, 2, 4\)"),
    ((X, torch.zeros(2, H)), {}, ValueError, STATES + r"\(2, 4\)"),
    ((X[:, 0], torch.zeros(2, 1, H)), {}, ValueError,
     r"IndRNN: h0 must be \(num_layers \* num_directions, H\) = \(2, 4\), got \(2, 1, 4\)"),
    ((X, [0]), {}, TypeError, "IndRNN: h0 must be a Tensor, got list"),
    ((X, torch.zeros(2, 2, H).double()), {}, TypeError, "IndRNN: h0 must be float32, got float64"),
    ((X, torch.zeros(2, 2, H, device="meta")), {}, ValueError, "IndRNN: h0 must be on cpu as input is, got meta"),
    ((X,), {"lengths": [5]}, ValueError, r"IndRNN: lengths must be \(B,\) = \(2,\), got \(1,\)"),
    ((X,), {"lengths": [6, 1]}, ValueError, r"IndRNN: lengths must lie in \[0, T\] = \[0, 5\], got 6"),
    ((X,), {"lengths": torch.tensor([1.0, 2.0])}, TypeError, "IndRNN: lengths must be int64, got float32"),
    ((X[:, 0],), {"lengths": [5]}, ValueError, r"IndRNN: lengths must be None with unbatched input, got \[5\]"),
    ((X,), {"reset": torch.zeros(2, 5, dtype=torch.bool)}, ValueError,
     r"IndRNN: reset must be \(T, B\) = \(5, 2\), got \(2, 5\)"),
    ((X,), {"reset": torch.zeros(5, 2)}, TypeError, "IndRNN: reset must be bool, got float32"),
    ((X[:, 0],), {"reset": torch.zeros(5, 2) > 0}, ValueError, r"IndRNN: reset must be \(T,\) = \(5,\), got \(5, 2\)"),
    ((PACKED,), {"lengths": [3, 2]}, ValueError,
     "IndRNN: lengths must be None with a PackedSequence, which has its own"),
    ((PACKED, torch.zeros(2, 3, H)), {}, ValueError, STATES + r"\(2, 3, 4\)"),
    ((PACKED,), {"reset": torch.zeros(2, 3) > 0}, ValueError,
     r"IndRNN: reset must be \(T, B\) = \(3, 2\), got \(2, 3\)"),
    ((pack_sequence([torch.zeros(3, 7)]),), {}, ValueError,
     r"IndRNN: input must be packed \(N, D\) with D = input_size = 3, got \(3, 7\)"),
    ((pack_sequence([torch.zeros(3)]),), {}, ValueError,
     r"IndRNN: input must pack sequences of \(T, D\), got data of \(3,\)"),
]  # fmt: skip


@pytest.mark.parametrize(("args", "kwargs", "error", "message"), BAD_CALLS, ids=lambda v: str(v)[-40:])
def test_bad_calls(args: tuple[Any, ...], kwargs: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{message}$"):
        IndRNN(D, H, 2)(*args, **kwargs)


def test_bad_calls_under_batch_first() -> None:
    layer = IndRNN(D, H, 2, batch_first=True)
    with pytest.raises(
        ValueError, match=r"^IndRNN: input must be \(B, T, D\) with D = input_size = 3, got \(5, 2, 7\)$"
    ):
        layer(torch.zeros(5, 2, 7))
    with pytest.raises(ValueError, match=r"^IndRNN: reset must be \(B, T\) = \(5, 2\), got \(2, 5\)$"):
        layer(X, reset=torch.zeros(2, 5) > 0)
    with pytest.raises(ValueError, match=r"^IndRNN: h0 must be .* = \(2, 5, 4\), got \(2, 2, 4\)$"):
        layer(X, torch.zeros(2, 2, H))


@pytest.mark.parametrize(
    ("args", "error", "message"),
    [
        ((1,), TypeError, "input must be a Tensor, got int"),
        ((torch.zeros(1, 2, D),), ValueError, r"input must be \(B, D\) or \(D,\), got \(1, 2, 3\)"),
        ((torch.zeros(2, 7),), ValueError, r"input must be \(B, D\) with D = input_size = 3, got \(2, 7\)"),
        ((torch.zeros(7),), ValueError, r"input must be \(D,\) with D = input_size = 3, got \(7,\)"),
        ((torch.zeros(2, D).double(),), TypeError, "input must be float32, got float64"),
        ((torch.zeros(2, D), torch.zeros(3, H)), ValueError, r"hx must be \(B, H\) = \(2, 4\), got \(3, 4\)"),
        ((torch.zeros(D), torch.zeros(1, H)), ValueError, r"hx must be \(H,\) = \(4,\), got \(1, 4\)"),
        ((torch.zeros(2, D), torch.zeros(2, H).half()), TypeError, "hx must be float32, got float16"),
    ],
)
def test_bad_calls_of_the_cell(args: tuple[Any, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^IndRNNCell: {message}$"):
        IndRNNCell(D, H)(*args)


def test_norm_needs_more_than_one_step_in_training() -> None:
    layer = IndRNN(D, H, norm="before")
    with pytest.raises(ValueError, match=r"^IndRNN: norm needs more than 1 valid step in training, got 1$"):
        layer(X, lengths=[1, 0])
    with pytest.raises(ValueError, match=r"^IndRNN: norm needs more than 1 valid step in training, got 1$"):
        layer(torch.zeros(1, 1, D))
    assert layer.eval()(torch.zeros(1, 1, D))[0].shape == (1, 1, H)
