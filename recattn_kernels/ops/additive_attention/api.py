"""additive_attention(): the public function and its checks."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from recattn_kernels import checks
from recattn_kernels.ops.additive_attention import reference
from recattn_kernels.ops.additive_attention.contract import ACTIVATIONS, BACKENDS
from recattn_kernels.ops.operator import Call, Operator
from recattn_kernels.ops.sequence import compute_dtype

NAME = "additive_attention"


def _empty(
    query: Tensor, keys: Tensor, weight: Tensor, values: Tensor, mask: Tensor | None, activation: str, weights: bool
) -> tuple[Tensor, Tensor, Tensor]:
    B, N, _ = keys.shape
    return (
        query.new_empty((B, values.shape[2])),
        query.new_empty((B, N) if weights else (0,)),
        query.new_empty((B, N), dtype=compute_dtype(query.dtype)),
    )


# The softmax is kept in the type of the arithmetic: 16 bits of it would cost the gradients their digits.
OPERATOR = Operator(
    NAME,
    inputs="Tensor query, Tensor keys, Tensor weight, Tensor values, Tensor? mask",
    options="str activation, bool return_weights",
    outputs=("context", "weights"),
    kept=("softmax",),
    saves=("softmax",),
    definition=reference.additive_attention,
    empty=_empty,
)


def normalise(
    query: Tensor,
    keys: Tensor,
    weight: Tensor,
    values: Tensor,
    *,
    mask: Tensor | None = None,
    activation: str = "tanh",
    return_weights: bool = False,
) -> Call:
    """Checks the arguments of additive_attention(), before any work."""
    checks.tensor(NAME, "query", query)
    checks.rank(NAME, "query", query, "(B, A)")
    checks.dtype(NAME, "query", query, checks.FLOATING)
    B, A = query.shape
    checks.tensor(NAME, "keys", keys)
    checks.rank(NAME, "keys", keys, "(B, N, A)")
    N = keys.shape[1]
    checks.parameter(NAME, "keys", keys, "(B, N, A)", (B, N, A), query, "query")
    checks.parameter(NAME, "weight", weight, "(A,)", (A,), query, "query")
    checks.tensor(NAME, "values", values)
    checks.rank(NAME, "values", values, "(B, N, D)")
    checks.parameter(NAME, "values", values, "(B, N, D)", (B, N, values.shape[2]), query, "query")
    if mask is not None:
        checks.mask(NAME, "mask", mask, "(B, N)", (B, N), query, "query")
    checks.choice(NAME, "activation", activation, ACTIVATIONS)
    checks.flag(NAME, "return_weights", return_weights)
    return Call(query, (query, keys, weight, values, mask), (activation, return_weights))


def additive_attention(
    query: Tensor,
    keys: Tensor,
    weight: Tensor,
    values: Tensor,
    *,
    mask: Tensor | None = None,
    activation: str = "tanh",
    return_weights: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Additive (Bahdanau) attention: one query a row, over N positions.

    .. math::
        e_n &= w \cdot \mathrm{act}(k_n + q) \\
        a &= \mathrm{softmax}_n(e) \\
        \mathrm{context} &= \sum_n a_n v_n

    query and keys are projected already. The projection of the keys is the same at every step of a decoder: do it once
    a sequence, not once a step (:meth:`recattn_kernels.AdditiveAttention.precompute`).

    Args:
        query: (B, A), for instance the decoder's state projected to A, the attention's width. float64, float32,
            bfloat16 or float16.
        keys: (B, N, A), the positions, projected. Any strides: for the beams of a search, an expanded tensor will do.
        weight: (A,), w.
        values: (B, N, D), what is averaged. keys, weight and values have query's dtype, or float32 beside a 16-bit one.
        mask: (B, N) bool, True where a position takes part. What is masked is not read: it may hold NaN. A row with no
            position left has the context 0, the weights 0 and no gradients but zeros.
        activation: act: tanh or relu.
        return_weights: also return a.
        backend: auto, reference, cpp or triton; None takes that of use_backend(), else of RECATTN_BACKEND.

    Returns: the context, (B, D); with return_weights the pair (context, a), a (B, N). Both have query's dtype.

    Gradients: query, keys, weight and values, of any order, by way of a too; forward-mode AD, functorch transforms and
    second derivatives run the reference. For the backward only a is saved beside the inputs; act is computed again.
    The arithmetic is in float32, float64 for a float64 query.

    Raises:
        ValueError, TypeError: for arguments that do not fit; the message names the argument.
        BackendUnavailableError: the backend asked for cannot run this call; recattn_kernels.explain() says why.

    Sources: Bahdanau, Cho and Bengio, "Neural machine translation by jointly learning to align and translate", ICLR
    2015, arXiv:1409.0473; Xu et al., "Show, attend and tell", ICML 2015, arXiv:1502.03044.
    """
    if has_torch_function((query, keys, weight, values)) and not torch.compiler.is_compiling():
        return handle_torch_function(additive_attention, (query, keys, weight, values), **locals())
    call = normalise(query, keys, weight, values, mask=mask, activation=activation, return_weights=return_weights)
    context, a = OPERATOR.run(BACKENDS, backend, call)
    return (context, a) if return_weights else context
