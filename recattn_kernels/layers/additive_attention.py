"""AdditiveAttention, and AttentionLSTMCell: a step of the decoder that attends with it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from recattn_kernels import backends, checks
from recattn_kernels.layers.autocast import accepted_dtypes
from recattn_kernels.layers.gated_cell import LSTMCell
from recattn_kernels.layers.options import changed_options
from recattn_kernels.layers.projection import project
from recattn_kernels.layers.tracing import Proxy, leaf, savable, unscriptable
from recattn_kernels.ops.additive_attention.api import additive_attention
from recattn_kernels.ops.additive_attention.contract import ACTIVATIONS
from recattn_kernels.ops.gated.api import pair


class AdditiveAttention(nn.Module):
    r"""Additive (Bahdanau) attention with its projections: one query a row, over N positions.

    .. math::
        e_n &= w \cdot \mathrm{act}(U k_n + b + W q) \\
        \mathrm{context} &= \sum_n \mathrm{softmax}_n(e) \, v_n

    Args:
        query_dim: the features of the query.
        key_dim: the features of a key.
        attn_dim: A, the width in which they are compared.
        activation: act: tanh or relu.
        bias: False leaves b out.
        backend: auto, reference, cpp or triton; None takes that of use_backend(), else of RECATTN_BACKEND.

    Inputs: query (B, query_dim); keys (B, N, key_dim); values (B, N, D), keys when None; mask (B, N) bool, True where a
    position takes part; projected (B, N, A), what :meth:`precompute` gave for keys, which are then only the values (and
    may be None beside values). return_weights also returns the softmax.

    Returns: the context, (B, D); with return_weights the pair (context, weights), weights (B, N). A row with every
    position masked gives zeros.

    In a decoder U k + b is the same at every step: compute it once a sequence.

        >>> projected = attention.precompute(features)
        >>> for _ in range(steps):
        ...     context = attention(h, features, projected=projected)

    Parameters: project_query.weight (A, query_dim), project_keys.weight (A, key_dim) and .bias (A,), initialised as
    torch.nn.Linear does; weight (A,), from U(-1/sqrt(A), 1/sqrt(A)).

    Raises:
        ValueError, TypeError: for arguments that do not fit; the message names the argument.
        BackendUnavailableError: the backend asked for cannot run the call.

    Sources: see :func:`recattn_kernels.additive_attention`.
    """

    __prepare_scriptable__ = unscriptable

    def __init__(
        self,
        query_dim: int,
        key_dim: int,
        attn_dim: int,
        *,
        activation: str = "tanh",
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        for name, size in (("query_dim", query_dim), ("key_dim", key_dim), ("attn_dim", attn_dim)):
            checks.count("AdditiveAttention", name, size)
        checks.choice("AdditiveAttention", "activation", activation, ACTIVATIONS)
        checks.flag("AdditiveAttention", "bias", bias)
        backends.requested("AdditiveAttention", backend)
        self.query_dim = query_dim
        self.key_dim = key_dim
        self.attn_dim = attn_dim
        self.activation = activation
        self.bias = bias
        self.backend = backend
        self.project_query = nn.Linear(query_dim, attn_dim, bias=False, device=device, dtype=dtype)
        self.project_keys = nn.Linear(key_dim, attn_dim, bias=bias, device=device, dtype=dtype)
        self.weight = nn.Parameter(torch.empty(attn_dim, device=device, dtype=dtype))
        self._reset_weight()

    def reset_parameters(self) -> None:
        self.project_query.reset_parameters()
        self.project_keys.reset_parameters()
        self._reset_weight()

    def _reset_weight(self) -> None:
        bound = self.attn_dim**-0.5
        nn.init.uniform_(self.weight, -bound, bound)

    def precompute(self, keys: Tensor) -> Tensor:
        """U k + b of keys (B, N, key_dim): (B, N, A), for the argument `projected` of every step."""
        _check("AdditiveAttention", "keys", keys, "(B, N, key_dim)", self.key_dim, self.weight)
        backend = backends.requested("AdditiveAttention", self.backend)
        return project(keys, self.project_keys.weight, self.project_keys.bias, backend)

    def forward(
        self,
        query: Tensor,
        keys: Tensor | None,
        values: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        projected: Tensor | None = None,
        return_weights: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        if isinstance(query, Proxy):
            return leaf(
                AdditiveAttention.forward, self, query, keys, values=values, mask=mask, projected=projected,
                return_weights=return_weights,
            )  # fmt: skip
        _check("AdditiveAttention", "query", query, "(B, query_dim)", self.query_dim, self.weight)
        if values is None:
            values = keys
        if projected is not None:
            _check("AdditiveAttention", "projected", projected, "(B, N, attn_dim)", self.attn_dim, self.weight)
            _rows("projected", projected, query)
        elif keys is not None:
            _check("AdditiveAttention", "keys", keys, "(B, N, key_dim)", self.key_dim, self.weight)
            _rows("keys", keys, query)
            projected = self.precompute(keys)
        else:
            raise ValueError("AdditiveAttention: keys or projected must be given")
        if values is None:
            raise ValueError("AdditiveAttention: keys or values must be given beside projected")
        return additive_attention(
            self.project_query(query), projected, self.weight, values, mask=mask, activation=self.activation,
            return_weights=return_weights, backend=self.backend,
        )  # fmt: skip

    def extra_repr(self) -> str:
        options = [str(self.query_dim), str(self.key_dim), str(self.attn_dim)]
        return ", ".join(options + changed_options(self, activation="tanh", bias=True, backend=None))


@savable
class AttentionStep(NamedTuple):
    """What a step of :class:`AttentionLSTMCell` gives."""

    h: Tensor  # (B, hidden_size)
    c: Tensor  # (B, hidden_size)
    context: Tensor  # (B, key_dim), gated: what the LSTM read
    weights: Tensor  # (B, N)


class AttentionLSTMCell(nn.Module):
    r"""One step of the decoder of "Show, attend and tell": an LSTM that reads its input and what it attends to.

    .. math::
        z, a &= \mathrm{attention}(h, \mathrm{keys}) \\
        z &= \sigma(W_\beta h + b_\beta) \odot z \\
        h', c' &= \mathrm{LSTM}([x, z], (h, c))

    Args:
        input_size: the features of x, for instance of an embedded word.
        hidden_size: the features of h and c.
        key_dim: the features of a position, which are what is averaged.
        attn_dim: see :class:`AdditiveAttention`.
        gate: False leaves the middle line out.
        activation: of the attention: tanh or relu.
        backend: of the attention and of the LSTM; None takes that of use_backend(), else of RECATTN_BACKEND.

    Inputs: input (B, input_size); state, the pair (h, c), each (B, hidden_size), zeros when None; keys (B, N, key_dim);
    mask (B, N) bool, True where a position takes part; projected (B, N, attn_dim), what precompute(keys) gave: once a
    sequence, not once a step.

    Returns: AttentionStep(h, c, context, weights).

    attend() and step() are its two halves, for a context that is drawn or made otherwise (hard attention).

    Submodules: attention, an :class:`AdditiveAttention`; lstm, a :class:`LSTMCell`; gate, a torch.nn.Linear or None.

    Raises:
        ValueError, TypeError: for arguments that do not fit; the message names the argument.
        BackendUnavailableError: the backend asked for cannot run the call.

    Source: Xu et al., "Show, attend and tell", ICML 2015, arXiv:1502.03044, sections 3.1.2 and 4.2.1.
    """

    __prepare_scriptable__ = unscriptable

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        key_dim: int,
        attn_dim: int,
        *,
        gate: bool = True,
        activation: str = "tanh",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        for name, size in (("input_size", input_size), ("hidden_size", hidden_size), ("key_dim", key_dim)):
            checks.count("AttentionLSTMCell", name, size)
        checks.flag("AttentionLSTMCell", "gate", gate)
        self.input_size = input_size
        self.hidden_size = hidden_size
        self.attention = AdditiveAttention(
            hidden_size, key_dim, attn_dim, activation=activation, device=device, dtype=dtype, backend=backend
        )
        self.lstm = LSTMCell(input_size + key_dim, hidden_size, device=device, dtype=dtype, backend=backend)
        self.gate = nn.Linear(hidden_size, key_dim, device=device, dtype=dtype) if gate else None

    def reset_parameters(self) -> None:
        for module in (self.attention, self.lstm, self.gate):
            if module is not None:
                module.reset_parameters()

    def precompute(self, keys: Tensor) -> Tensor:
        """See :meth:`AdditiveAttention.precompute`."""
        return self.attention.precompute(keys)

    def attend(
        self, h: Tensor, keys: Tensor, *, mask: Tensor | None = None, projected: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The context before its gate, (B, key_dim), and the weights, (B, N)."""
        context, weights = self.attention(h, keys, mask=mask, projected=projected, return_weights=True)
        return context, weights

    def step(self, input: Tensor, context: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """h, c and the gated context."""
        if self.gate is not None:
            context = torch.sigmoid(self.gate(state[0])) * context
        h, c = self.lstm(torch.cat((input, context), 1), state)
        return h, c, context

    def forward(
        self,
        input: Tensor,
        state: tuple[Tensor, Tensor] | None,
        keys: Tensor,
        *,
        mask: Tensor | None = None,
        projected: Tensor | None = None,
    ) -> AttentionStep:
        if isinstance(input, Proxy):
            return leaf(AttentionLSTMCell.forward, self, input, state, keys, mask=mask, projected=projected)
        _check("AttentionLSTMCell", "input", input, "(B, input_size)", self.input_size, self.attention.weight)
        h, c = pair("AttentionLSTMCell", "state", state, "a pair of Tensors (h, c)")
        if state is None:
            h = c = input.new_zeros(input.shape[0], self.hidden_size)
        for name, value in (("state[0]", h), ("state[1]", c)):
            checks.tensor("AttentionLSTMCell", name, value)
            checks.shape("AttentionLSTMCell", name, value, "(B, hidden_size)", (input.shape[0], self.hidden_size))
        context, weights = self.attend(h, keys, mask=mask, projected=projected)
        h, c, context = self.step(input, context, (h, c))
        return AttentionStep(h, c, context, weights)

    def extra_repr(self) -> str:
        attention = self.attention
        options = [str(n) for n in (self.input_size, self.hidden_size, attention.key_dim, attention.attn_dim)]
        if self.gate is None:
            options.append("gate=False")
        return ", ".join(options + changed_options(attention, activation="tanh", backend=None))


def _rows(name: str, value: Tensor, query: Tensor) -> None:
    if value.shape[0] != query.shape[0]:
        raise ValueError(
            f"AdditiveAttention: {name} must be (B, N, ...) with B = {query.shape[0]}, got {tuple(value.shape)}"
        )


def _check(layer: str, name: str, value: Tensor, symbols: str, width: int, weight: Tensor) -> None:
    checks.tensor(layer, name, value)
    checks.rank(layer, name, value, symbols)
    checks.device(layer, name, value, "the layer's weight", weight)
    checks.dtype(layer, name, value, accepted_dtypes(value, weight.dtype))
    checks.width(layer, name, value, symbols, symbols.strip("()").split(", ")[-1], width)
