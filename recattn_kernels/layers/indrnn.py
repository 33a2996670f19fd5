"""IndRNN: layers of the input projection, indrnn() and batch normalisation, stacked."""

from __future__ import annotations

import warnings
from typing import Any, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from recattn_kernels import backends, checks
from recattn_kernels.layers.batch_norm import batch_norm
from recattn_kernels.layers.indrnn_cell import (
    IndRNNCell,
    bounded,
    check_bound,
    check_input,
    check_state,
    initialise_input_weight,
)
from recattn_kernels.layers.options import changed_options
from recattn_kernels.layers.packing import Packed, Padded, check_reset, permute
from recattn_kernels.layers.projection import project
from recattn_kernels.layers.tracing import Proxy, leaf, unscriptable
from recattn_kernels.ops.indrnn.api import indrnn
from recattn_kernels.ops.indrnn.contract import ACTIVATIONS

__all__ = ["IndRNN", "IndRNNCell"]

# What a unit may amplify over sequence_length steps: the bound on its weight is GAMMA^(1/T) (Li et al., 2018).
GAMMA = 2.0


class IndRNN(nn.Module):
    r"""A stack of independently recurrent layers (IndRNN) over whole sequences.

    .. math:: h_t = \mathrm{act}(W_{ih} x_t + b + w_{hh} \odot h_{t-1})

    Each unit sees only its own past, so the recurrent weight is a vector. The call is that of torch.nn.RNN: shapes,
    PackedSequence, unbatched input, directions and layers all mean the same.

    Args:
        input_size: D, the features of the input.
        hidden_size: H, the features of each state.
        num_layers: layers, each fed by the output of the one below.
        nonlinearity: act: relu, tanh, sigmoid, identity, leaky_relu, relu6 or hardtanh.
        bias: False leaves b out.
        batch_first: input, output and reset are (B, T, ...); states are not affected, nor is unbatched input.
        dropout: in training, the probability that a feature of a row is dropped from a layer's output, in every step
            at once; not after the last layer. Under residual it is the layer's share that is dropped, before the sum.
        bidirectional: a second recurrence in each layer runs from the last step to the first; the outputs of both are
            concatenated, (..., 2H).
        norm: "before": batch normalisation over batch and time of W_ih x, before b and the recurrence (the paper's
            language models); "after": of the layer's output, h_n left as it is (its classifiers). Steps past a row's
            length count for nothing.
        residual: adds to each layer's output its input, where they are of one width.
        recurrent_max: the bound on ``|weight_hh|``. forward clamps weight_hh to it and passes its gradient on
            unchanged; the parameter itself is changed by clamp_recurrent_() alone.
        sequence_length: T, for a network that is read at the last of T steps. Sets the bound of the paper,
            recurrent_max = 2^(1/T), if that is not given, and lets the last layer start in U(2^(-1/T), 2^(1/T)), where
            every unit still holds at the last step what it saw at the first. For one that is read at every step, give
            recurrent_max = 2 ** (1 / T) instead.
        grad_clip: in the backward, clamps dL/dh_t of every step to [-grad_clip, grad_clip].
        backend: auto, reference, cpp, triton or cuda; None takes that of use_backend(), else of RECATTN_BACKEND.

    Inputs:
        input: (T, B, D), or (B, T, D) under batch_first; (T, D) unbatched; or a PackedSequence.
        h0: (num_layers * num_directions, B, H), or (num_layers * num_directions, H) unbatched; zeros when None.
        lengths: (B,), the valid steps of each row, 0 to T: a list, or an int64 tensor. What input holds past them is
            not used. Not with a PackedSequence, which has its own, nor unbatched.
        reset: bool (T, B), or (B, T) under batch_first; (T,) unbatched. Where True, the row's states are zeroed before
            that step is taken. With a PackedSequence it is padded, in the order of the rows before packing.

    Returns:
        output: (T, B, num_directions * H), or (B, T, ...) under batch_first, or (T, ...) unbatched, or a
            PackedSequence; 0 past a row's length.
        h_n: (num_layers * num_directions, B, H), or without B unbatched: each row's last states.

    Parameters: weight_ih_l{k} (H, D or num_directions * H), weight_hh_l{k} (H,), bias_l{k} (H,) and the module
    norm_l{k}, with the suffix _reverse in the second direction. weight_hh starts in U(0, recurrent_max), U(0, 1)
    without a bound; weight_ih in N(0, 0.01); b at 0.

    Raises:
        ValueError, TypeError: for arguments that do not fit; the message names the argument.
        BackendUnavailableError: the backend asked for cannot run the call.

    Source: Li et al., "Independently Recurrent Neural Network (IndRNN): Building A Longer and Deeper RNN", CVPR 2018,
    arXiv:1803.04831; residual: Li et al., "Deep Independently Recurrent Neural Network (IndRNN)", arXiv:1910.06251.
    """

    __prepare_scriptable__ = unscriptable

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        *,
        nonlinearity: str = "relu",
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        norm: str | None = None,
        residual: bool = False,
        recurrent_max: float | None = None,
        sequence_length: int | None = None,
        grad_clip: float | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        for name, size in (("input_size", input_size), ("hidden_size", hidden_size), ("num_layers", num_layers)):
            checks.count("IndRNN", name, size)
        checks.choice("IndRNN", "nonlinearity", nonlinearity, ACTIVATIONS)
        flags = {"bias": bias, "batch_first": batch_first, "bidirectional": bidirectional, "residual": residual}
        for name, flag in flags.items():
            checks.flag("IndRNN", name, flag)
        checks.probability("IndRNN", "dropout", dropout)
        if dropout > 0 and num_layers == 1:
            warnings.warn(
                f"IndRNN: dropout={dropout} has no effect with num_layers=1: it is not applied after the last layer",
                stacklevel=2,
            )
        if norm not in (None, "before", "after"):
            raise ValueError(f"IndRNN: norm must be one of None, 'before', 'after', got {norm!r}")
        check_bound("IndRNN", recurrent_max)
        if sequence_length is not None:
            checks.count("IndRNN", "sequence_length", sequence_length)
            if recurrent_max is None:
                recurrent_max = GAMMA ** (1 / sequence_length)
        if grad_clip is not None:
            checks.positive("IndRNN", "grad_clip", grad_clip)
        backends.requested("IndRNN", backend)
        self.input_size = input_size
        self.hidden_size = hidden_size
        self.num_layers = num_layers
        self.nonlinearity = nonlinearity
        self.bias = bias
        self.batch_first = batch_first
        self.dropout = float(dropout)
        self.bidirectional = bidirectional
        self.norm = norm
        self.residual = residual
        self.recurrent_max = recurrent_max
        self.sequence_length = sequence_length
        self.grad_clip = grad_clip
        self.backend = backend

        for k in range(num_layers):
            width = input_size if k == 0 else self.num_directions * hidden_size
            for suffix in self._suffixes(k):
                for name, shape in (("weight_ih", (hidden_size, width)), ("weight_hh", (hidden_size,))):
                    setattr(self, name + suffix, nn.Parameter(torch.empty(shape, device=device, dtype=dtype)))
                b = nn.Parameter(torch.empty(hidden_size, device=device, dtype=dtype)) if bias else None
                self.register_parameter("bias" + suffix, b)
                if norm is not None:
                    self.add_module("norm" + suffix, nn.BatchNorm1d(hidden_size, device=device, dtype=dtype))
        self.reset_parameters()

    @property
    def num_directions(self) -> int:
        return 2 if self.bidirectional else 1

    def _suffixes(self, k: int) -> list[str]:
        return [f"_l{k}", f"_l{k}_reverse"][: self.num_directions]

    def reset_parameters(self) -> None:
        high = 1.0 if self.recurrent_max is None else self.recurrent_max
        for k in range(self.num_layers):
            low = 0.0
            if self.sequence_length is not None and k == self.num_layers - 1:
                low = min(high, GAMMA ** (-1 / self.sequence_length))
            for suffix in self._suffixes(k):
                initialise_input_weight(getattr(self, "weight_ih" + suffix))
                nn.init.uniform_(getattr(self, "weight_hh" + suffix), low, high)
                if self.bias:
                    nn.init.zeros_(getattr(self, "bias" + suffix))
                if self.norm is not None:
                    getattr(self, "norm" + suffix).reset_parameters()

    @torch.no_grad()
    def clamp_recurrent_(self) -> IndRNN:
        """Writes the bound back into every weight_hh, in place: to be called after an optimizer step. Returns self.

        forward does not need it, as it clamps what it uses. But a weight that the optimizer has carried past the bound
        acts as if at it until it has come all the way back; the authors' code clamps before every step.
        """
        if self.recurrent_max is not None:
            for k in range(self.num_layers):
                for suffix in self._suffixes(k):
                    getattr(self, "weight_hh" + suffix).clamp_(-self.recurrent_max, self.recurrent_max)
        return self

    @overload
    def forward(
        self, input: Tensor, h0: Tensor | None = None, *, lengths: Tensor | list[int] | None = None,
        reset: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]: ...  # fmt: skip

    @overload
    def forward(
        self, input: PackedSequence, h0: Tensor | None = None, *, lengths: None = None, reset: Tensor | None = None
    ) -> tuple[PackedSequence, Tensor]: ...

    def forward(
        self,
        input: Tensor | PackedSequence,
        h0: Tensor | None = None,
        *,
        lengths: Tensor | list[int] | None = None,
        reset: Tensor | None = None,
    ) -> tuple[Tensor | PackedSequence, Tensor]:
        if isinstance(input, Proxy):
            return leaf(IndRNN.forward, self, input, h0=h0, lengths=lengths, reset=reset)
        if isinstance(input, PackedSequence):
            if lengths is not None:
                raise ValueError("IndRNN: lengths must be None with a PackedSequence, which has its own")
            return self._forward_packed(input, h0, reset)
        checks.tensor("IndRNN", "input", input)
        symbols = "(B, T, D)" if self.batch_first else "(T, B, D)"
        if input.dim() == 2:
            if lengths is not None:
                raise ValueError(f"IndRNN: lengths must be None with unbatched input, got {lengths!r}")
            self._check("(T, D)", input, h0, reset, None, input.shape[0])
            # Along dim 1: batch_first has no bearing on unbatched input, and (T, 1, D) is as good as (1, T, D).
            output, h_n = self._stack(
                input.unsqueeze(1),
                None if h0 is None else h0.unsqueeze(1),
                None if reset is None else reset.unsqueeze(1),
                Padded(input, False, None),
            )
            return output.squeeze(1), h_n.squeeze(1)
        if input.dim() != 3:
            raise ValueError(f"IndRNN: input must be {symbols} or (T, D), got {tuple(input.shape)}")
        B, T = input.shape[:2] if self.batch_first else (input.shape[1], input.shape[0])
        self._check(symbols, input, h0, reset, B, T)
        if lengths is not None:
            lengths = checks.lengths("IndRNN", lengths, B, T, input, "input")
        batch = Padded(input, self.batch_first, lengths)
        # Zeros past the lengths, so that nothing which lies there gets into the gradient of weight_ih.
        return self._stack(batch.zero_padding(input), h0, reset, batch)

    def _forward_packed(
        self, input: PackedSequence, h0: Tensor | None, reset: Tensor | None
    ) -> tuple[PackedSequence, Tensor]:
        data, batch_sizes, order, inverse = input
        if data.dim() != 2:
            raise ValueError(f"IndRNN: input must pack sequences of (T, D), got data of {tuple(data.shape)}")
        batch = Packed(batch_sizes)
        self._check("packed (N, D)", data, h0, reset, batch.B, batch.T)
        if reset is not None and self.batch_first:
            reset = reset.transpose(0, 1)
        output, h_n = self._stack(data, permute(h0, order, 1), permute(reset, order, 1), batch)
        h_n = h_n if inverse is None else h_n.index_select(1, inverse)
        return PackedSequence(output, batch_sizes, order, inverse), h_n

    def _check(self, symbols: str, input: Tensor, h0: Any, reset: Any, B: int | None, T: int) -> None:
        weight_ih: Tensor = getattr(self, "weight_ih_l0")  # noqa: B009  (to mypy self.weight_ih_l0 may be a Module)
        check_input("IndRNN", input, symbols, weight_ih)
        batch = () if B is None else (B,)
        if h0 is not None:
            symbols = f"(num_layers * num_directions, {'' if B is None else 'B, '}H)"
            expected = (self.num_layers * self.num_directions, *batch, self.hidden_size)
            check_state("IndRNN", "h0", h0, symbols, expected, input, weight_ih)
        if reset is not None:
            check_reset("IndRNN", reset, T, B, self.batch_first, input)

    def _stack(
        self, x: Tensor, h0: Tensor | None, reset: Tensor | None, batch: Padded | Packed
    ) -> tuple[Tensor, Tensor]:
        """All layers over x (..., D), in the form of batch: the output, and h_n (num_layers * num_directions, B, H)."""
        backend = backends.requested("IndRNN", self.backend)
        states: list[Tensor] = []
        for k in range(self.num_layers):
            outputs = []
            for suffix in self._suffixes(k):
                first = None if h0 is None else h0[len(states)]
                output, h_n = self._recurrence(x, suffix, first, reset, batch, backend)
                outputs.append(output)
                states.append(h_n)
            y = torch.cat(outputs, -1) if self.bidirectional else outputs[0]
            if self.dropout > 0 and self.training and k < self.num_layers - 1:
                ones = y.new_ones(states[-1].shape[0], y.shape[-1])
                y = y * batch.over_time(F.dropout(ones, self.dropout))
            x = x + y if self.residual and x.shape[-1] == y.shape[-1] else y
        return x, torch.stack(states)

    def _recurrence(
        self, x: Tensor, suffix: str, h0: Tensor | None, reset: Tensor | None, batch: Padded | Packed, backend: str
    ) -> tuple[Tensor, Tensor]:
        """One direction of one layer: projection, recurrence and norm."""
        x = project(x, getattr(self, "weight_ih" + suffix), None, backend)
        if self.norm == "before":
            x = batch_norm(getattr(self, "norm" + suffix), x, batch.valid)
        output, h_n = indrnn(
            batch.pad(x),
            bounded(getattr(self, "weight_hh" + suffix), self.recurrent_max),
            h0,
            activation=self.nonlinearity,
            # Here rather than in the projection: the kernel sums its gradient on the way, at no cost.
            bias=getattr(self, "bias" + suffix),
            reset=reset,
            lengths=batch.lengths,
            reverse=suffix.endswith("_reverse"),
            batch_first=batch.batch_first,
            grad_clip=self.grad_clip,
            backend=backend,
        )
        output = batch.pack(output)
        if self.norm == "after":
            output = batch.zero_padding(batch_norm(getattr(self, "norm" + suffix), output, batch.valid))
        return output, h_n

    def extra_repr(self) -> str:
        options = [str(self.input_size), str(self.hidden_size)]
        options += changed_options(
            self, num_layers=1, nonlinearity="relu", bias=True, batch_first=False, dropout=0.0, bidirectional=False,
            norm=None, residual=False, sequence_length=None,
        )  # fmt: skip
        if self.sequence_length is None or self.recurrent_max != GAMMA ** (1 / self.sequence_length):
            options += changed_options(self, recurrent_max=None)
        return ", ".join(options + changed_options(self, grad_clip=None, backend=None))
