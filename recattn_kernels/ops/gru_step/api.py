"""gru_step(): the public function and its checks."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from recattn_kernels import checks
from recattn_kernels.ops.gru_step import reference
from recattn_kernels.ops.gru_step.contract import BACKENDS
from recattn_kernels.ops.operator import Call, Operator

OPERATOR = Operator(
    "gru_step",
    inputs="Tensor x_gates, Tensor h_gates, Tensor h",
    outputs=("h_n",),
    definition=reference.gru_step,
    empty=lambda x_gates, h_gates, h: (h.new_empty(h.shape),),
)


def normalise(x_gates: Tensor, h_gates: Tensor, h: Tensor) -> Call:
    """Checks the arguments of gru_step(), before any work."""
    checks.gates("gru_step", "x_gates", x_gates, 3)
    B, H = x_gates.shape[0], x_gates.shape[1] // 3
    checks.parameter("gru_step", "h_gates", h_gates, "(B, 3H)", (B, 3 * H), x_gates, "x_gates")
    checks.parameter("gru_step", "h", h, "(B, H)", (B, H), x_gates, "x_gates")
    return Call(x_gates, (x_gates, h_gates, h))


def gru_step(x_gates: Tensor, h_gates: Tensor, h: Tensor, *, backend: str | None = None) -> Tensor:
    r"""One step of a gated recurrent unit (GRU) from its gates: what follows the products.

    .. math::
        r &= \sigma(x_r + q_r), \quad z = \sigma(x_z + q_z) \\
        n &= \tanh(x_n + r \odot q_n) \\
        h' &= (1 - z) \odot n + z \odot h

    Args:
        x_gates: (B, 3H), (x_r, x_z, x_n) = W_ih input + b_ih. float64, float32, bfloat16 or float16.
        h_gates: (B, 3H), (q_r, q_z, q_n) = W_hh h + b_hh, in x_gates' dtype, or float32 beside 16-bit ones (so too h).
        h: (B, H), the state.
        backend: auto, reference, cpp or triton; None takes that of use_backend(), else of RECATTN_BACKEND.

    Returns: h', (B, H), in h's dtype.

    Gradients: x_gates, h_gates and h, of any order; forward-mode AD, functorch transforms and second derivatives run
    the reference. The arithmetic is in float32, float64 for float64 gates.

    Raises:
        ValueError, TypeError: for arguments that do not fit; the message names the argument.
        BackendUnavailableError: the backend asked for cannot run this call; recattn_kernels.explain() says why.

    Source: Cho et al., "Learning phrase representations using RNN encoder-decoder for statistical machine
    translation", 2014, arXiv:1406.1078, in the form of cuDNN and torch.nn, r after the product.
    """
    if has_torch_function((x_gates, h_gates, h)) and not torch.compiler.is_compiling():
        return handle_torch_function(gru_step, (x_gates, h_gates, h), **locals())
    (h_n,) = OPERATOR.run(BACKENDS, backend, normalise(x_gates, h_gates, h))
    result: Tensor = h_n
    return result
