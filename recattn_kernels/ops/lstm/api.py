"""lstm(): the public function."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from recattn_kernels.ops.gated import api as gated
from recattn_kernels.ops.gated.contract import Call
from recattn_kernels.ops.lstm import reference
from recattn_kernels.ops.lstm.contract import BACKENDS


def normalise(x: Tensor, weight_hh: Tensor, state: tuple[Tensor, Tensor] | None = None, **options: Any) -> Call:
    """Checks the arguments of lstm(), before any work, and puts them in one form."""
    return gated.normalise("lstm", "lstm", x, weight_hh, state, **options)


def _definition(call: Call) -> tuple[Tensor, Tensor, Tensor]:
    return reference.lstm(
        call.x, call.weight_hh, call.h0, call.c0, bias_hh=call.bias_hh, layer_norm=call.layer_norm,
        **call.interruptions(),
    )  # fmt: skip


gated.define("lstm", _definition)


def lstm(
    x: Tensor,
    weight_hh: Tensor,
    state: tuple[Tensor, Tensor] | None = None,
    *,
    bias_hh: Tensor | None = None,
    reset: Tensor | None = None,
    lengths: Tensor | list[int] | None = None,
    reverse: bool = False,
    batch_first: bool = False,
    grad_clip: float | None = None,
    zoneout: float | tuple[float, float] = 0.0,
    zoneout_mask: tuple[Tensor | None, Tensor | None] | None = None,
    layer_norm: tuple[Tensor, Tensor, Tensor, Tensor] | None = None,
    training: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    r"""The recurrence of a long short-term memory (LSTM) over a whole sequence.

    .. math::
        (i, f, g, o) &= x_t + W_{hh} h_{t-1} + b_{hh} \\
        c_t &= \sigma(f) \odot c_{t-1} + \sigma(i) \odot \tanh(g) \\
        h_t &= \sigma(o) \odot \tanh(c_t)

    x already holds the input projection, as torch.nn.LSTM computes it: W_ih input + b_ih, gates in the order i f g o.

    Args:
        x: (T, B, 4H), or (B, T, 4H) under batch_first. float64, float32, bfloat16 or float16.
        weight_hh: (4H, H), in x's dtype, or float32 beside a 16-bit x (so too state, bias_hh and layer_norm).
        state: (h0, c0), each (B, H), the initial state; zeros when None.
        bias_hh: (4H,), added to every step.
        reset: bool (T, B), or (B, T) under batch_first. Where True, the row's h and c are zeroed before the step is
            taken.
        lengths: (B,), the number of valid steps of each row, 0 to T, in any order: a list, or an int64 tensor. Steps
            past it output 0 and leave the state alone. A list or CPU tensor is checked; a CUDA tensor is clamped.
        reverse: takes each row's valid steps from last to first; output[t] stays at x[t].
        batch_first: x, reset, zoneout_mask and output are (B, T, ...). Nothing is copied.
        grad_clip: in the backward, dL/dh_t is clamped to [-grad_clip, grad_clip] once the gradient of output[t] and
            that from the later steps have been added, and dL/dc_t as it comes from the later steps, before h_t's share.
            Second derivatives are exact where nothing is clipped.
        zoneout: the probability z that a unit keeps its old h in a step (Krueger et al. 2016), or a pair of them for h
            and c, in training; else the new state is z * old + (1 - z) * new. The new h is that of c_t before zoneout.
        zoneout_mask: (h, c), each bool (T, B, H), as x under batch_first, or None: True where a unit keeps its old
            state, instead of a drawn mask. It has no effect outside training.
        layer_norm: (weight, bias, weight_c, bias_c), two (4H,) and two (H,): W_hh h is normalised over its 4H features
            before b_hh is added, and c_t over its H features before the tanh of h_t (Ba et al. 2016, eps 1e-5).
        training: whether zoneout draws.
        backend: auto, reference, cpp, triton or cuda; None takes that of use_backend(), else of RECATTN_BACKEND.

    Returns:
        output, (T, B, H), or (B, T, H) under batch_first, in x's dtype: h_t of every step; and (h_n, c_n), each (B, H),
        in the dtypes of h0 and c0 (x's without): each row's state after the last step that was taken.

    Gradients: x, weight_hh, state, bias_hh and layer_norm, of any order; forward-mode AD, functorch transforms and
    second derivatives run the reference. States and sums are float32, float64 for a float64 x.

    Raises:
        ValueError, TypeError: for arguments that do not fit; the message names the argument.
        BackendUnavailableError: the backend asked for cannot run this call; recattn_kernels.explain() says why.

    Sources: Hochreiter and Schmidhuber, "Long short-term memory", 1997; Gers, Schmidhuber and Cummins, "Learning to
    forget", 2000; zoneout: Krueger et al., arXiv:1606.01305; layer normalisation: Ba, Kiros and Hinton,
    arXiv:1607.06450.
    """
    if has_torch_function((x, weight_hh)) and not torch.compiler.is_compiling():
        return handle_torch_function(lstm, (x, weight_hh), **locals())
    call = normalise(
        x, weight_hh, state, bias_hh=bias_hh, reset=reset, lengths=lengths, reverse=reverse, batch_first=batch_first,
        grad_clip=grad_clip, zoneout=zoneout, zoneout_mask=zoneout_mask, layer_norm=layer_norm, training=training,
    )  # fmt: skip
    output, h_n, c_n = gated.run("lstm", call, BACKENDS, backend)
    return output, (h_n, c_n)
