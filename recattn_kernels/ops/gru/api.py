"""gru(): the public function."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from recattn_kernels import checks
from recattn_kernels.ops.gated import api as gated
from recattn_kernels.ops.gated.contract import Call
from recattn_kernels.ops.gru import reference
from recattn_kernels.ops.gru.contract import BACKENDS


def normalise(
    x: Tensor, weight_hh: Tensor, h0: Tensor | None = None, *, reset_after: bool = True, **options: Any
) -> Call:
    """Checks the arguments of gru(), before any work, and puts them in one form."""
    checks.flag("gru", "reset_after", reset_after)
    if not reset_after and options.get("layer_norm") is not None:
        raise ValueError("gru: layer_norm must be None with reset_after=False, whose W_hh h is not one product")
    return gated.normalise("gru", "gru" if reset_after else "gru_before", x, weight_hh, h0, **options)


def _definition(call: Call) -> tuple[Tensor, Tensor]:
    return reference.gru(
        call.x, call.weight_hh, call.h0, bias_hh=call.bias_hh, reset_after=call.cell == "gru",
        layer_norm=call.layer_norm, **call.interruptions(),
    )  # fmt: skip


gated.define("gru", _definition)


def gru(
    x: Tensor,
    weight_hh: Tensor,
    h0: Tensor | None = None,
    *,
    bias_hh: Tensor | None = None,
    reset_after: bool = True,
    reset: Tensor | None = None,
    lengths: Tensor | list[int] | None = None,
    reverse: bool = False,
    batch_first: bool = False,
    grad_clip: float | None = None,
    zoneout: float = 0.0,
    zoneout_mask: Tensor | None = None,
    layer_norm: tuple[Tensor, Tensor] | None = None,
    training: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    r"""The recurrence of a gated recurrent unit (GRU) over a whole sequence.

    .. math::
        q &= W_{hh} h_{t-1} + b_{hh} \\
        r &= \sigma(x_{t,r} + q_r), \quad z = \sigma(x_{t,z} + q_z) \\
        n &= \tanh(x_{t,n} + r \odot q_n) \\
        h_t &= (1 - z) \odot n + z \odot h_{t-1}

    x already holds the input projection, as torch.nn.GRU computes it: W_ih input + b_ih, gates in the order r z n.

    Args:
        x: (T, B, 3H), or (B, T, 3H) under batch_first. float64, float32, bfloat16 or float16.
        weight_hh: (3H, H), in x's dtype, or float32 beside a 16-bit x (so too h0, bias_hh and layer_norm).
        h0: (B, H), the initial state; zeros when None.
        bias_hh: (3H,), added to every step.
        reset_after: True: as above and in torch.nn.GRU. False: the original form of Cho et al. 2014,
            n = tanh(x_n + W_hn (r * h) + b_hn).
        reset: bool (T, B), or (B, T) under batch_first. Where True, the row's state is zeroed before the step is taken.
        lengths: (B,), the number of valid steps of each row, 0 to T, in any order: a list, or an int64 tensor. Steps
            past it output 0 and leave the state alone. A list or CPU tensor is checked; a CUDA tensor is clamped.
        reverse: takes each row's valid steps from last to first; output[t] stays at x[t].
        batch_first: x, reset, zoneout_mask and output are (B, T, ...). Nothing is copied.
        grad_clip: in the backward, dL/dh_t is clamped to [-grad_clip, grad_clip] once the gradient of output[t] and
            that from the later steps have been added. Second derivatives are exact where nothing is clipped.
        zoneout: the probability z that a unit keeps its old state in a step (Krueger et al. 2016), in training; else
            the new state is z * old + (1 - z) * new.
        zoneout_mask: bool (T, B, H), as x under batch_first: True where a unit keeps its old state, instead of a drawn
            mask. It has no effect outside training.
        layer_norm: (weight, bias), each (3H,): W_hh h is normalised over its 3H features before b_hh is added
            (Ba et al. 2016, eps 1e-5). Not with reset_after=False.
        training: whether zoneout draws.
        backend: auto, reference, cpp, triton or cuda; None takes that of use_backend(), else of RECATTN_BACKEND.

    Returns:
        output, (T, B, H), or (B, T, H) under batch_first, in x's dtype: h_t of every step; and h_n, (B, H), in h0's
        dtype (x's without h0): each row's state after the last step that was taken.

    Gradients: x, weight_hh, h0, bias_hh and layer_norm, of any order; forward-mode AD, functorch transforms and second
    derivatives run the reference. States and sums are float32, float64 for a float64 x.

    Raises:
        ValueError, TypeError: for arguments that do not fit; the message names the argument.
        BackendUnavailableError: the backend asked for cannot run this call; recattn_kernels.explain() says why.

    Sources: Cho et al., "Learning phrase representations using RNN encoder-decoder for statistical machine
    translation", 2014, arXiv:1406.1078; zoneout: Krueger et al., arXiv:1606.01305; layer normalisation: Ba, Kiros and
    Hinton, arXiv:1607.06450.
    """
    if has_torch_function((x, weight_hh, h0)) and not torch.compiler.is_compiling():
        return handle_torch_function(gru, (x, weight_hh, h0), **locals())
    call = normalise(
        x, weight_hh, h0, bias_hh=bias_hh, reset_after=reset_after, reset=reset, lengths=lengths, reverse=reverse,
        batch_first=batch_first, grad_clip=grad_clip, zoneout=zoneout, zoneout_mask=zoneout_mask, layer_norm=layer_norm,
        training=training,
    )  # fmt: skip
    output, h_n, _ = gated.run("gru", call, BACKENDS, backend)
    return output, h_n
