"""The LSTM whose state is projected (torch.nn.LSTM's proj_size), in plain PyTorch.

i, f, g, o = x[t] + W_hh h[t-1] + bias_hh               (Sak, Senior and Beaufays, 2014, arXiv:1402.1128)
c[t] = sigmoid(f) * c[t-1] + sigmoid(i) * tanh(g)
h[t] = W_hr (sigmoid(o) * tanh(c[t]))
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from recattn_kernels import backends
from recattn_kernels.ops import sequence
from recattn_kernels.ops.sequence import after_no_steps, compute_dtype, no_steps, recurrent, walk, zeros


def _refusal(call: Any) -> str:
    return "with proj_size > 0 only reference and vendor run"


# Every backend that the lstm has or will have.
BACKENDS: backends.Table = dict.fromkeys(("cpp", "triton", "cuda"), _refusal)


class _Call(NamedTuple):
    x: Tensor


def lstmp(
    x: Tensor,
    weight_hh: Tensor,
    weight_hr: Tensor,
    state: tuple[Tensor, ...] | None = None,
    *,
    bias_hh: Tensor | None = None,
    layer_norm: tuple[Tensor, ...] | None = None,
    zoneout: float | tuple[float, float] = 0.0,
    training: bool = False,
    batch_first: bool = False,
    backend: str | None = None,
    **interruptions: Any,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """lstm() with weight_hr (P, H): weight_hh (4H, P), h (B, P), c (B, H) and output (T, B, P).

    The options are those of lstm(): layer_norm normalises W_hh h and c, zoneout mixes the projected h.
    """
    backends.choose("LSTM", backend, BACKENDS, _Call(x))
    dtype = compute_dtype(x.dtype)
    P, H = weight_hr.shape
    h0, c0 = (None, None) if state is None else state
    h = zeros(x.to(dtype), P, batch_first) if h0 is None else h0.to(dtype)
    c = zeros(x.to(dtype), H, batch_first) if c0 is None else c0.to(dtype)
    h_n_dtype, c_n_dtype = (x.dtype if s is None else s.dtype for s in (h0, c0))
    norm = (None, None, None, None) if layer_norm is None else layer_norm
    if x.shape[1 if batch_first else 0] == 0:
        output = no_steps(x, P, (weight_hh, weight_hr, h0, c0, bias_hh, *norm))
        return output, (after_no_steps(h, output).to(h_n_dtype), after_no_steps(c, output).to(c_n_dtype))
    product, projection = recurrent(weight_hh, bias_hh, norm, dtype), recurrent(weight_hr, None, (None, None), dtype)
    weight_c, bias_c = norm[2:]

    def step(x_t: Tensor, states: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        h, c = states
        i, f, g, o = (x_t + product(h)).chunk(4, -1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        normed = c if weight_c is None or bias_c is None else sequence.layer_norm(c, weight_c, bias_c)
        return projection(torch.sigmoid(o) * torch.tanh(normed)), c

    rates = zoneout if isinstance(zoneout, tuple) else (zoneout, 0.0)
    if training:
        widths = zip((P, H), rates, strict=True)
        keep = [torch.rand((*x.shape[:2], n), device=x.device) < z if z > 0 else None for n, z in widths]
        interruptions["keep"] = keep
    else:
        interruptions["zoneout"] = rates
    output, (h_n, c_n) = walk(step, x.to(dtype), (h, c), batch_first=batch_first, **interruptions)
    return output.to(x.dtype), (h_n.to(h_n_dtype), c_n.to(c_n_dtype))
