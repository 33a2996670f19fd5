"""RNNCell, LSTMCell and GRUCell: one step of the layers of gated.py."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from recattn_kernels import checks
from recattn_kernels.layers.autocast import accepted_dtypes
from recattn_kernels.layers.gated_base import Gated, States
from recattn_kernels.layers.tracing import Proxy, leaf


class Cell(Gated, nn.RNNCellBase):
    """What the three cells share: the call."""

    def forward(self, input: Tensor, hx: Any = None, *, reset: Tensor | None = None) -> Any:
        if isinstance(input, Proxy):
            return leaf(Cell.forward, self, input, hx=hx, reset=reset)
        name = self._vendor.__name__
        checks.tensor(name, "input", input)
        dim = input.dim()
        if dim not in (1, 2):
            raise ValueError(f"{name}: Expected input to be 1D or 2D, got {dim}D instead")
        weight_ih = self._parameter("weight_ih")
        checks.device(name, "input", input, "weight_ih", weight_ih)
        checks.dtype(name, "input", input, accepted_dtypes(input, weight_ih.dtype))
        states = self._states(hx, input)
        B = input.shape[0] if dim == 2 else 1
        if reset is not None:
            symbols, shape = ("(B,)", (B,)) if dim == 2 else ("()", ())
            checks.mask(name, "reset", reset, symbols, shape, input, "input")
        if self._op == "rnn" and self._cell not in ("rnn_tanh", "rnn_relu"):
            raise RuntimeError(f"Unknown nonlinearity: {self.nonlinearity}")  # as torch.nn words it
        backend = self._backend(input, 1, B, [] if reset is None else ["reset"])
        if backend == "vendor":
            batched = dim == 2 and (states is None or all(s.dim() == 2 for s in states))
            return self._kernel(input, states, weight_ih) if batched else super().forward(input, hx)

        # In the words of torch.nn's cells, and of the C++ beneath them.
        if input.shape[-1] != self.input_size:
            raise RuntimeError(f"input has inconsistent input_size: got {input.shape[-1]} expected {self.input_size}")
        for i, state in enumerate(states or ()):
            if state.dim() not in (1, 2):
                what = f"hx[{i}]" if self._op == "lstm" else "hidden"
                raise ValueError(f"{name}: Expected {what} to be 1D or 2D, got {state.dim()}D instead")
            rows, *width = state.shape if dim == 2 else (1, *state.shape)
            if rows != B:
                raise RuntimeError(f"Input batch size {B} doesn't match hidden{i} batch size {rows}")
            if width != [self.hidden_size]:
                got = width[0] if width else 1
                raise RuntimeError(f"hidden{i} has inconsistent hidden_size: got {got}, expected {self.hidden_size}")
        if dim == 1:
            input = input.unsqueeze(0)
            states = None if states is None else tuple(s.unsqueeze(0) for s in states)
        reset = None if reset is None else reset.reshape(1, B)
        _, last = self._recurrence(input.unsqueeze(0), "", states, backend, reset=reset)
        if dim == 1:
            last = tuple(s.squeeze(0) for s in last)
        return last if self._op == "lstm" else last[0]

    # torch.nn's forward without what it checks, which of a small cell takes as long as the kernel.
    def _kernel(self, input: Tensor, states: States | None, weight_ih: Tensor) -> Any:
        if states is None:
            zeros = input.new_zeros(input.shape[0], self.hidden_size)
            states = (zeros, zeros)
        kernel = getattr(torch, f"{self._cell}_cell")
        weights = (weight_ih, *map(self._parameter, ("weight_hh", "bias_ih", "bias_hh")))
        return kernel(input, states if self._op == "lstm" else states[0], *weights)


class RNNCell(Cell, nn.RNNCell):
    r"""torch.nn.RNNCell on the ops of this package: one step of a simple recurrent network.

    .. math:: h' = \mathrm{act}(W_{ih} x + b_{ih} + W_{hh} h + b_{hh})

    The constructor's arguments, the call, what it returns, the parameters' names and their initialisation are
    torch.nn.RNNCell's, and an RNNCell is a torch.nn.RNNCell. The options layer_norm, zoneout, recurrent_dropout,
    grad_clip and backend are those of :class:`recattn_kernels.RNN`, by keyword alone, and so are the errors. The
    parameters of layer_norm are ln_ih_weight, ln_ih_bias, ln_hh_weight and ln_hh_bias. recurrent_dropout draws a mask a
    call, which in a cell is a step. reset, by keyword, zeroes a row's states before the step is taken.

    Shapes: input (B, D) or (D,); h (B, H) or (H,); reset bool (B,) or ().

    Raises: what torch.nn.RNNCell raises where it checks, otherwise what :class:`recattn_kernels.RNN` raises.

    Sources: see :class:`recattn_kernels.RNN`.
    """

    _op = "rnn"
    _vendor = nn.RNNCell

    @property
    def _cell(self) -> str:
        return f"rnn_{self.nonlinearity}"


class LSTMCell(Cell, nn.LSTMCell):
    r"""torch.nn.LSTMCell on the ops of this package: one step of long short-term memory.

    .. math::
        (i, f, g, o) &= W_{ih} x + b_{ih} + W_{hh} h + b_{hh} \\
        c' &= \sigma(f) \odot c + \sigma(i) \odot \tanh(g) \\
        h' &= \sigma(o) \odot \tanh(c')

    The constructor's arguments, the call, what it returns, the parameters' names and their initialisation are
    torch.nn.LSTMCell's, and an LSTMCell is a torch.nn.LSTMCell. reset and the options are those of :class:`RNNCell`,
    layer_norm and zoneout those of :class:`recattn_kernels.LSTM`: ln_c_weight and ln_c_bias, and a pair for h and c.

    Shapes: input (B, D) or (D,); h and c (B, H) or (H,).

    Raises: what torch.nn.LSTMCell raises where it checks, otherwise what :class:`recattn_kernels.RNN` raises.

    Sources: see :class:`recattn_kernels.LSTM`.
    """

    _op = "lstm"
    _vendor = nn.LSTMCell
    _promotes = True


class GRUCell(Cell, nn.GRUCell):
    r"""torch.nn.GRUCell on the ops of this package: one step of a gated recurrent unit.

    .. math::
        r &= \sigma(W_{ir} x + b_{ir} + W_{hr} h + b_{hr}) \\
        z &= \sigma(W_{iz} x + b_{iz} + W_{hz} h + b_{hz}) \\
        n &= \tanh(W_{in} x + b_{in} + r \odot (W_{hn} h + b_{hn})) \\
        h' &= (1 - z) \odot n + z \odot h

    The constructor's arguments, the call, what it returns, the parameters' names and their initialisation are
    torch.nn.GRUCell's, and a GRUCell is a torch.nn.GRUCell. reset and the options are those of :class:`RNNCell`.

    Shapes: input (B, D) or (D,); h (B, H) or (H,).

    Raises: what torch.nn.GRUCell raises where it checks, otherwise what :class:`recattn_kernels.RNN` raises.

    Sources: see :class:`recattn_kernels.GRU`.
    """

    _op = "gru"
    _vendor = nn.GRUCell
    _promotes = True
