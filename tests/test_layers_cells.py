"""RNNCell, LSTMCell and GRUCell against torch.nn's and against the layers, one step at a time."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_layers_gated import D, H, flat, randomise
from torch import Tensor, nn

import recattn_kernels as rk
from recattn_kernels import BackendUnavailableError, GRUCell, LSTMCell, RNNCell, use_backend

CELLS = {"RNNCell": RNNCell, "LSTMCell": LSTMCell, "GRUCell": GRUCell}
LAYERS = {"RNNCell": rk.RNN, "LSTMCell": rk.LSTM, "GRUCell": rk.GRU}


def make_state(
    name: str, batch: tuple[int, ...], generator: torch.Generator, dtype: torch.dtype = torch.float64
) -> Any:
    one, other = (torch.randn(*batch, H, generator=generator, dtype=dtype).requires_grad_() for _ in range(2))
    return (one, other) if name == "LSTMCell" else one


def results_and_grads(result: Any, inputs: list[Tensor]) -> tuple[Any, Any]:
    loss = sum((t * torch.linspace(-1, 1, t.numel(), dtype=t.dtype).sin().view(t.shape)).sum() for t in flat(result))
    return result, torch.autograd.grad(loss, inputs, materialize_grads=True)


@pytest.mark.parametrize("backend", ["auto", "vendor", "reference", "cpp"])
@pytest.mark.parametrize("name", CELLS)
def test_agrees_with_torch(name: str, backend: str) -> None:
    generator = torch.Generator().manual_seed(1)
    options: list[dict[str, Any]] = [{}, {"nonlinearity": "relu"}] if name == "RNNCell" else [{}]
    for bias, extra, batch, with_state in itertools.product([False, True], options, [(), (2,), (0,)], [False, True]):
        expected = getattr(nn, name)(D, H, bias, dtype=torch.float64, **extra)
        randomise(expected, generator)
        cell = CELLS[name](D, H, bias, dtype=torch.float64, backend=backend, **extra)
        cell.load_state_dict(expected.state_dict())
        x = torch.randn(*batch, D, generator=generator, dtype=torch.float64, requires_grad=True)
        hx = make_state(name, batch, generator) if with_state else None
        found, wanted = (
            results_and_grads(m(x, hx), [x, *m.parameters(), *([] if hx is None else flat(hx))])
            for m in (cell, expected)
        )
        assert type(found[0]) is type(wanted[0])
        torch.testing.assert_close(found, wanted, msg=lambda m, case=f"{bias=} {extra} {batch=}": f"{case}: {m}")


@pytest.mark.parametrize("name", CELLS)
def test_is_a_cell_of_torch(name: str) -> None:
    theirs = getattr(nn, name)
    torch.manual_seed(0)
    cell = CELLS[name](D, H, False)
    torch.manual_seed(0)
    expected = theirs(D, H, False)
    assert isinstance(cell, theirs) and repr(cell) == repr(expected)
    torch.testing.assert_close(cell.state_dict(), expected.state_dict(), rtol=0, atol=0)
    cell = CELLS[name].from_torch(expected.eval())
    assert type(cell) is CELLS[name] and not cell.training and cell.weight_hh is expected.weight_hh
    back = cell.to_torch()
    assert type(back) is theirs and back.weight_ih is expected.weight_ih and back.bias_ih is None
    with pytest.raises(ValueError, match=f"^{name}: to_torch: torch.nn has no zoneout$"):
        CELLS[name](D, H, zoneout=0.1).to_torch()
    got = f"torch.nn.modules.rnn.{name.removesuffix('Cell')}"
    with pytest.raises(TypeError, match=f"^{name}: module must be a torch.nn.{name}, got {got}$"):
        CELLS[name].from_torch(getattr(nn, name.removesuffix("Cell"))(D, H))
    if name == "RNNCell":
        assert RNNCell.from_torch(nn.RNNCell(D, H, True, "relu")).nonlinearity == "relu"


@pytest.mark.parametrize("name", CELLS)
def test_steps_agree_with_the_layer(name: str) -> None:
    """The layer itself is held against plain steps in test_layers_gated.py."""
    generator = torch.Generator().manual_seed(2)
    zoneout: Any = (0.3, 0.2) if name == "LSTMCell" else 0.3
    for layer_norm, rate, grad_clip in itertools.product([False, True], [0.0, zoneout], [None, 0.05]):
        options = {"layer_norm": layer_norm, "zoneout": rate, "grad_clip": grad_clip, "dtype": torch.float64}
        layer = LAYERS[name](D, H, backend="reference", **options).eval()
        randomise(layer, generator)
        cell = CELLS[name](D, H, backend="reference", **options).eval()
        cell.load_state_dict({key.removesuffix("_l0"): value for key, value in layer.state_dict().items()})
        x = torch.randn(5, 2, D, generator=generator, dtype=torch.float64)
        hx = make_state(name, (2,), generator)
        inputs = flat(hx)
        output, last = layer(x, tuple(s.unsqueeze(0) for s in hx) if isinstance(hx, tuple) else hx.unsqueeze(0))
        states = []
        for x_t in x:
            hx = cell(x_t, hx)
            states.append(hx[0] if isinstance(hx, tuple) else hx)
        found = results_and_grads([torch.stack(states), flat(hx)], [*inputs, *cell.parameters()])
        wanted = results_and_grads([output, [s.squeeze(0) for s in flat(last)]], [*inputs, *layer.parameters()])
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("backend", ["auto", "reference", "cpp"])
@pytest.mark.parametrize("name", [*CELLS, "IndRNNCell"])
def test_reset_zeroes_a_rows_states_before_the_step(name: str, backend: str) -> None:
    cell = getattr(rk, name)(D, H, dtype=torch.float64, backend=backend)
    x, reset = torch.randn(3, D, dtype=torch.float64), torch.tensor([True, False, True])
    hx = make_state(name, (3,), torch.Generator().manual_seed(1))
    zeroed = tuple(torch.where(reset[:, None], 0.0, s) for s in flat(hx))
    inputs = [*cell.parameters(), *flat(hx)]
    found = results_and_grads(cell(x, hx, reset=reset), inputs)
    expected = results_and_grads(cell(x, zeroed if name == "LSTMCell" else zeroed[0]), inputs)
    torch.testing.assert_close(found, expected)
    first = tuple(s[0] for s in flat(hx))
    unbatched = cell(x[0], first if name == "LSTMCell" else first[0], reset=torch.tensor(True))
    torch.testing.assert_close(flat(unbatched), tuple(s[0] for s in flat(expected[0])))
    with pytest.raises(ValueError, match=rf"^{name}: reset must be \(B,\) = \(3,\), got \(2,\)$"):
        cell(x, reset=reset[:2])


@pytest.mark.parametrize("name", CELLS)
def test_recurrent_dropout_draws_a_mask_a_call(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cell = CELLS[name](D, H, recurrent_dropout=0.5)
    x, hx = torch.randn(2, D), make_state(name, (2,), torch.Generator().manual_seed(0), torch.float32)
    masks = []
    original = F.dropout

    def dropout(w: Tensor, p: float, training: bool) -> Tensor:
        assert p == 0.5 and training
        masks.append(original(torch.ones_like(w), p))
        return w * masks[-1]

    monkeypatch.setattr(F, "dropout", dropout)
    found = cell(x, hx)
    dropped = CELLS[name](D, H)
    dropped.load_state_dict(cell.state_dict())
    with torch.no_grad():
        dropped.weight_hh.mul_(masks[0])
    torch.testing.assert_close(found, dropped(x, hx))
    cell(x, hx)
    assert len(masks) == 2 and not torch.equal(*masks)


@pytest.mark.parametrize("name", CELLS)
def test_zoneout_in_training_keeps_or_renews(name: str) -> None:
    cell = CELLS[name](D, 64, zoneout=0.25, dtype=torch.float64)
    x, h = torch.randn(20, D, dtype=torch.float64), torch.randn(20, 64, dtype=torch.float64)
    hx: Any = (h, torch.randn_like(h)) if name == "LSTMCell" else h
    found = flat(cell(x, hx))
    cell.zoneout = 0.0
    renewed = flat(cell(x, hx))
    kept = found[0] == h
    torch.testing.assert_close(found[0], torch.where(kept, h, renewed[0]))
    torch.testing.assert_close(found[1:], renewed[1:])
    assert 0.2 < kept.double().mean() < 0.3


def test_backends() -> None:
    x = torch.randn(2, D)
    for name, cls in CELLS.items():
        for options, what in (({"layer_norm": True}, "layer_norm"), ({"grad_clip": 1.0}, "grad_clip")):
            message = f"{name}: backend 'vendor' cannot run this call: torch.nn has no {what}"
            with pytest.raises(BackendUnavailableError, match=f"^{message}$"):
                cls(D, H, backend="vendor", **options)(x)
        with pytest.raises(
            BackendUnavailableError, match=f"^{name[:-4].lower()}: backend 'cuda' cannot run this call: "
        ):
            cls(D, H, backend="cuda")(x)
        with pytest.raises(BackendUnavailableError, match=f"^{name}: backend 'vendor' .*: torch.nn has no reset$"):
            cls(D, H, backend="vendor")(x, reset=torch.zeros(2) > 0)
        cell = cls(D, H, grad_clip=1.0, recurrent_dropout=0.5).eval()
        with torch.no_grad(), use_backend("vendor"):
            expected = cell(x)
        with use_backend("reference"):
            torch.testing.assert_close(cell(x), expected)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("name", CELLS)
def test_compile_export_autocast_and_vmap(name: str) -> None:
    x = torch.randn(2, D)
    cell = CELLS[name](D, H, layer_norm=True, zoneout=0.1, backend="reference").eval()
    expected = cell(x)
    compiled = torch.compile(nn.Sequential(cell), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), expected)
    torch.testing.assert_close(torch.export.export(cell, (x,)).module()(x), expected)
    with torch.autocast("cpu", torch.bfloat16):
        found = cell(x, make_state(name, (2,), torch.Generator(), torch.float32))
    # As torch.nn's, whose LSTMCell and GRUCell promote their gates with the state.
    assert {s.dtype for s in flat(found)} == {torch.bfloat16 if name == "RNNCell" else torch.float32}
    rows = torch.func.vmap(CELLS[name].forward, (None, 0))(cell, x)
    torch.testing.assert_close(rows, expected)


# Bad input

Z = torch.zeros
# Arguments that torch.nn refuses in its own words, the same on every backend; the state of a batch of 2.
AS_TORCH: list[Callable[[bool], tuple[Any, ...]]] = [
    lambda pair: (Z(1, 2, D),),
    lambda pair: (Z(2, 7),),
    lambda pair: (Z(7),),
    lambda pair: (Z(2, D), (Z(3, H), Z(3, H)) if pair else Z(3, H)),
    lambda pair: (Z(2, D), (Z(2, 5), Z(2, H)) if pair else Z(2, 5)),
    lambda pair: (Z(D), (Z(5), Z(5)) if pair else Z(5)),
    lambda pair: (Z(D), (Z(1, H), Z(1, H)) if pair else Z(1, H)),
    lambda pair: (Z(2, D), (Z(H), Z(H)) if pair else Z(H)),
    lambda pair: (Z(2, D), (Z(2, H), Z(1, 2, H)) if pair else Z(1, 2, H)),
]


@pytest.mark.parametrize("case", range(len(AS_TORCH)))
@pytest.mark.parametrize("name", CELLS)
def test_bad_calls_in_the_words_of_torch(name: str, case: int) -> None:
    args = AS_TORCH[case](name == "LSTMCell")
    with pytest.raises(Exception) as expected:
        getattr(nn, name)(D, H)(*args)
    for backend in ("reference", "vendor", "auto", "cpp"):
        with pytest.raises(type(expected.value), match=f"^{re.escape(str(expected.value))}$"):
            CELLS[name](D, H, backend=backend)(*args)


@pytest.mark.parametrize(
    ("name", "args", "error", "message"),
    [
        ("GRUCell", (1,), TypeError, "GRUCell: input must be a Tensor, got int"),
        ("RNNCell", (Z(2, D), [0]), TypeError, "RNNCell: hx must be a Tensor, got list"),
        ("RNNCell", (Z(2, D), Z(2, H).half()), TypeError, "RNNCell: hx must be float32, got float16"),
        ("GRUCell", (Z(2, D), Z(2, H, device="meta")), ValueError, "GRUCell: hx must be on cpu as input is, got meta"),
        ("LSTMCell", (Z(2, D), Z(2, H)), TypeError, r"LSTMCell: hx must be a pair of Tensors \(h_0, c_0\), got Tensor"),
        ("LSTMCell", (Z(2, D), (Z(2, H), 1)), TypeError, r"LSTMCell: hx\[1\] must be a Tensor, got int"),
        ("GRUCell", (Z(2, D).double(),), TypeError, "GRUCell: input must be float32, got float64"),
        ("LSTMCell", (Z(2, D).long(),), TypeError, "LSTMCell: input must be float32, got int64"),
    ],
)
def test_bad_calls(name: str, args: tuple[Any, ...], error: type[Exception], message: str) -> None:
    for backend in ("reference", "vendor"):
        with pytest.raises(error, match=f"^{message}$"):
            CELLS[name](D, H, backend=backend)(*args)


@pytest.mark.parametrize("shape", [(D,), (2, D)])
@pytest.mark.parametrize("backend", ["reference", "vendor", "auto", "cpp"])
def test_an_unknown_nonlinearity_in_the_words_of_torch(backend: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(RuntimeError) as expected:
        nn.RNNCell(D, H, nonlinearity="gelu")(Z(shape))
    with pytest.raises(RuntimeError, match=f"^{re.escape(str(expected.value))}$"):
        RNNCell(D, H, nonlinearity="gelu", backend=backend)(Z(shape))


def test_bad_options() -> None:
    for name, cls in CELLS.items():
        with pytest.raises(ValueError, match=rf"^{name}: zoneout must be a probability in \[0, 1\], got 2$"):
            cls(D, H, zoneout=2)
        with pytest.raises(TypeError, match=f"^{name}: layer_norm must be a bool, got 0$"):
            cls(D, H, layer_norm=0)
