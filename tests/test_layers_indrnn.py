"""IndRNN and IndRNNCell against plain steps written out here, with their norms and their dropout."""

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

from recattn_kernels.layers.batch_norm import batch_norm
from recattn_kernels.layers.indrnn import IndRNN, IndRNNCell

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


@pytest.mark.parametrize("momentum", [0.1, None])
def test_masked_norm_keeps_its_statistics_in_the_dtype_of_x(momentum: float | None) -> None:
    norm = nn.BatchNorm1d(H, momentum=momentum).double()
    other = copy.deepcopy(norm)
    valid = torch.arange(12).view(4, 3, 1) < 8
    for _ in range(3):  # 8 / 7 and 1 / 3 are no float32
        x = torch.randn(4, 3, H, dtype=torch.float64)
        batch_norm(norm, x, valid), other(x[valid.squeeze(-1)])
    torch.testing.assert_close(dict(norm.named_buffers()), dict(other.named_buffers()), rtol=1e-13, atol=1e-15)


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
