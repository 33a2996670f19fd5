"""lstm_step(): the public function and its checks."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from recattn_kernels import checks
from recattn_kernels.ops.lstm_step import reference
from recattn_kernels.ops.lstm_step.contract import BACKENDS
from recattn_kernels.ops.operator import Call, Operator

OPERATOR = Operator(
    "lstm_step",
    inputs="Tensor gates, Tensor c",
    outputs=("h", "c_n"),
    definition=reference.lstm_step,
    empty=lambda gates, c: (gates.new_empty(c.shape), c.new_empty(c.shape)),
)


def normalise(gates: Tensor, c: Tensor) -> Call:
    """Checks the arguments of lstm_step(), before any work."""
    checks.gates("lstm_step", "gates", gates, 4)
    B, H = gates.shape[0], gates.shape[1] // 4
    checks.parameter("lstm_step", "c", c, "(B, H)", (B, H), gates, "gates")
    return Call(gates, (gates, c))


def lstm_step(gates: Tensor, c: Tensor, *, backend: str | None = None) -> tuple[Tensor, Tensor]:
    r"""One step of a long short-term memory (LSTM) from its gates: what follows the products.

    .. math::
        (i, f, g, o) &= \mathrm{gates} \\
        c' &= \sigma(f) \odot c + \sigma(i) \odot \tanh(g) \\
        h &= \sigma(o) \odot \tanh(c')

    Args:
        gates: (B, 4H), W_ih input + b_ih + W_hh h + b_hh, in the order i f g o. float64, float32, bfloat16 or float16.
        c: (B, H), the cell's state, in gates' dtype, or float32 beside 16-bit gates.
        backend: auto, reference, cpp or triton; None takes that of use_backend(), else of RECATTN_BACKEND.

    Returns: h, (B, H), in gates' dtype, and c', (B, H), in c's.

    Gradients: gates and c, of any order; forward-mode AD, functorch transforms and second derivatives run the
    reference. The arithmetic is in float32, float64 for float64 gates.

    Raises:
        ValueError, TypeError: for arguments that do not fit; the message names the argument.
        BackendUnavailableError: the backend asked for cannot run this call; recattn_kernels.explain() says why.

    Source: Hochreiter and Schmidhuber, "Long short-term memory", 1997; Gers, Schmidhuber and Cummins, "Learning to
    forget", 2000.
    """
    if has_torch_function((gates, c)) and not torch.compiler.is_compiling():
        return handle_torch_function(lstm_step, (gates, c), **locals())
    h, c_n = OPERATOR.run(BACKENDS, backend, normalise(gates, c))
    return h, c_n
