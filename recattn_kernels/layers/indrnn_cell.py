"""IndRNNCell: one step, and what it shares with the layer: the bound, the initialisation, the checks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from recattn_kernels import backends, checks
from recattn_kernels.layers.autocast import accepted_dtypes, projected_dtype
from recattn_kernels.layers.options import changed_options
from recattn_kernels.layers.projection import project
from recattn_kernels.layers.tracing import Proxy, leaf, unscriptable
from recattn_kernels.ops.indrnn.api import indrnn
from recattn_kernels.ops.indrnn.contract import ACTIVATIONS


def bounded(weight_hh: Tensor, bound: float | None) -> Tensor:
    """weight_hh clamped to [-bound, bound]; its gradient passes unchanged (straight-through)."""
    if bound is None:
        return weight_hh
    # The difference is exactly 0, so that the value is exactly the clamped one.
    return weight_hh.detach().clamp(-bound, bound) + (weight_hh - weight_hh.detach())


def initialise_input_weight(weight_ih: Tensor) -> None:
    # Far smaller than for a ReLU without memory: a unit with weight_hh near 1 sums over time what comes in. With
    # kaiming_uniform_(a=8), which the authors put before batch normalisation, the adding problem of 1000 steps starts
    # at an error of 10^4 and is not solved after 1000 steps of Adam; with this it nearly is.
    nn.init.normal_(weight_ih, std=0.01)


def check_bound(layer: str, recurrent_max: Any) -> None:
    if recurrent_max is not None:
        checks.finite_positive(layer, "recurrent_max", recurrent_max)


def check_input(layer: str, input: Tensor, symbols: str, weight_ih: Tensor) -> None:
    checks.width(layer, "input", input, symbols, "D = input_size", weight_ih.shape[1])
    checks.device(layer, "input", input, "weight_ih", weight_ih)
    checks.dtype(layer, "input", input, accepted_dtypes(input, weight_ih.dtype))


def check_state(
    layer: str, name: str, state: Any, symbols: str, expected: tuple[int, ...], input: Tensor, weight_ih: Tensor
) -> None:
    checks.tensor(layer, name, state)
    checks.shape(layer, name, state, symbols, expected)
    checks.device(layer, name, state, "input", input)
    dtype = projected_dtype(input, weight_ih.dtype)
    checks.dtype(layer, name, state, (dtype, torch.float32) if dtype in checks.SIXTEEN_BIT else (dtype,))


class IndRNNCell(nn.Module):
    r"""One step of an independently recurrent neural network (IndRNN).

    .. math:: h' = \mathrm{act}(W_{ih} x + b + w_{hh} \odot h)

    Args:
        input_size: D, the features of the input.
        hidden_size: H, the features of the state.
        bias: False leaves b out.
        nonlinearity: act: relu, tanh, sigmoid, identity, leaky_relu, relu6 or hardtanh.
        recurrent_max: the bound on ``|weight_hh|``, and the upper end of its initialisation; None: no bound, and 1. See
            :class:`IndRNN` for how it is kept.
        backend: auto, reference, cpp, triton or cuda; None takes that of use_backend(), else of RECATTN_BACKEND.

    Inputs: input (B, D), or (D,) unbatched; hx (B, H), or (H,) unbatched, zeros when None; by keyword reset, bool (B,),
        or () unbatched: where True, the row's state is zeroed before the step is taken.

    Returns: the next state, (B, H), or (H,) unbatched.

    Parameters: weight_ih (H, D), from N(0, 0.01); weight_hh (H,), from U(0, recurrent_max); bias (H,), zeros.

    Raises:
        ValueError, TypeError: for arguments that do not fit; the message names the argument.
        BackendUnavailableError: the backend asked for cannot run the call.

    Source: Li et al., "Independently Recurrent Neural Network (IndRNN): Building A Longer and Deeper RNN", CVPR 2018,
    arXiv:1803.04831.
    """

    bias: nn.Parameter | None

    __prepare_scriptable__ = unscriptable

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        nonlinearity: str = "relu",
        recurrent_max: float | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        checks.count("IndRNNCell", "input_size", input_size)
        checks.count("IndRNNCell", "hidden_size", hidden_size)
        checks.flag("IndRNNCell", "bias", bias)
        checks.choice("IndRNNCell", "nonlinearity", nonlinearity, ACTIVATIONS)
        check_bound("IndRNNCell", recurrent_max)
        backends.requested("IndRNNCell", backend)
        self.input_size = input_size
        self.hidden_size = hidden_size
        self.nonlinearity = nonlinearity
        self.recurrent_max = recurrent_max
        self.backend = backend
        self.weight_ih = nn.Parameter(torch.empty(hidden_size, input_size, device=device, dtype=dtype))
        self.weight_hh = nn.Parameter(torch.empty(hidden_size, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(hidden_size, device=device, dtype=dtype)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        initialise_input_weight(self.weight_ih)
        nn.init.uniform_(self.weight_hh, 0.0, self.recurrent_max or 1.0)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    @torch.no_grad()
    def clamp_recurrent_(self) -> IndRNNCell:
        """Writes the bound back into weight_hh, in place: to be called after an optimizer step. Returns self."""
        if self.recurrent_max is not None:
            self.weight_hh.clamp_(-self.recurrent_max, self.recurrent_max)
        return self

    def forward(self, input: Tensor, hx: Tensor | None = None, *, reset: Tensor | None = None) -> Tensor:
        if isinstance(input, Proxy):
            return leaf(IndRNNCell.forward, self, input, hx=hx, reset=reset)
        checks.tensor("IndRNNCell", "input", input)
        if input.dim() not in (1, 2):
            raise ValueError(f"IndRNNCell: input must be (B, D) or (D,), got {tuple(input.shape)}")
        batched = input.dim() == 2
        check_input("IndRNNCell", input, "(B, D)" if batched else "(D,)", self.weight_ih)
        if hx is not None:
            expected = (*input.shape[:-1], self.hidden_size)
            check_state("IndRNNCell", "hx", hx, "(B, H)" if batched else "(H,)", expected, input, self.weight_ih)
        if reset is not None:
            rows = tuple(input.shape[:-1])
            checks.mask("IndRNNCell", "reset", reset, "(B,)" if batched else "()", rows, input, "input")
        backend = backends.requested("IndRNNCell", self.backend)
        x = project(input, self.weight_ih, None, backend)
        _, h = indrnn(
            x.unsqueeze(0) if batched else x[None, None],
            bounded(self.weight_hh, self.recurrent_max),
            hx if hx is None or batched else hx.unsqueeze(0),
            activation=self.nonlinearity,
            bias=self.bias,
            reset=None if reset is None else reset.reshape(1, -1),
            backend=backend,
        )
        return h if batched else h.squeeze(0)

    def extra_repr(self) -> str:
        options = [str(self.input_size), str(self.hidden_size)]
        if self.bias is None:
            options.append("bias=False")
        options += changed_options(self, nonlinearity="relu", recurrent_max=None, backend=None)
        return ", ".join(options)
