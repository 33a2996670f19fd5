"""slot_attention(): the public function and its checks."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from recattn_kernels import checks
from recattn_kernels.ops.operator import Call, Operator
from recattn_kernels.ops.slot_attention import reference
from recattn_kernels.ops.slot_attention.contract import BACKENDS, INPUTS, OPTIONS, empty_forward

NAME = "slot_attention"
EPS_MODES = ("add", "denominator")
HEAD_SOFTMAX = ("slots", "joint")

OPERATOR = Operator(
    NAME,
    inputs=INPUTS,
    options=OPTIONS,
    outputs=("updates", "attn"),
    kept=("mean", "den"),
    saves=("updates", "mean", "den"),
    definition=reference.slot_attention,
    empty=empty_forward,
)


def normalise(
    q: Tensor,
    k: Tensor,
    v: Tensor | None = None,
    *,
    scale: float | None = None,
    eps: float = 1e-8,
    eps_mode: str = "add",
    bias: Tensor | None = None,
    slot_mask: Tensor | None = None,
    input_mask: Tensor | None = None,
    head_softmax: str = "slots",
    return_attn: bool = False,
) -> Call:
    """Checks the arguments of slot_attention(), before any work."""
    for name, value in (("q", q), ("k", k)):
        checks.tensor(NAME, name, value)
    checks.dtype(NAME, "q", q, checks.FLOATING)
    if q.dim() not in (3, 4):
        raise ValueError(f"{NAME}: q must be (B, K, D) or (B, heads, K, D), got {tuple(q.shape)}")
    lead, symbols = tuple(q.shape[:-2]), "(B, heads, " if q.dim() == 4 else "(B, "
    K, D = q.shape[-2:]
    checks.rank(NAME, "k", k, f"{symbols}N, D)")
    N = k.shape[-2]
    checks.parameter(NAME, "k", k, f"{symbols}N, D)", (*lead, N, D), q, "q")
    if v is k:
        v = None
    if v is not None:
        checks.tensor(NAME, "v", v)
        checks.rank(NAME, "v", v, f"{symbols}N, Dv)")
        checks.parameter(NAME, "v", v, f"{symbols}N, Dv)", (*lead, N, v.shape[-1]), q, "q")
    if scale is not None:
        checks.number(NAME, "scale", scale)
    checks.not_negative(NAME, "eps", eps)
    checks.choice(NAME, "eps_mode", eps_mode, EPS_MODES)
    if bias is not None:
        checks.parameter(NAME, "bias", bias, f"{symbols}K)", (*lead, K), q, "q")
    if slot_mask is not None:
        checks.mask(NAME, "slot_mask", slot_mask, "(B, K)", (q.shape[0], K), q, "q")
    if input_mask is not None:
        checks.mask(NAME, "input_mask", input_mask, "(B, N)", (q.shape[0], N), q, "q")
    checks.choice(NAME, "head_softmax", head_softmax, HEAD_SOFTMAX)
    checks.flag(NAME, "return_attn", return_attn)
    joint = head_softmax == "joint" and q.dim() == 4
    options = (scale if scale is None else float(scale), float(eps), eps_mode == "denominator", joint, return_attn)
    return Call(q, (q, k, v, bias, slot_mask, input_mask), options)


def slot_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor | None = None,
    *,
    scale: float | None = None,
    eps: float = 1e-8,
    eps_mode: str = "add",
    bias: Tensor | None = None,
    slot_mask: Tensor | None = None,
    input_mask: Tensor | None = None,
    head_softmax: str = "slots",
    return_attn: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""One iteration of slot attention: K slots compete for N inputs, each takes the mean of what it wins.

    .. math::
        A_{kn} &= \mathop{\mathrm{softmax}}_k (\mathrm{scale}\; q_k \cdot k_n + \mathrm{bias}_k) \\
        W_{kn} &= \frac{A_{kn} + \mathrm{eps}}{\sum_n (A_{kn} + \mathrm{eps})} \quad\text{(eps_mode "add")}, \qquad
        W_{kn} = \frac{A_{kn}}{\sum_n A_{kn} + \mathrm{eps}} \quad\text{(eps_mode "denominator")} \\
        \mathrm{updates}_k &= \sum_n W_{kn} v_n

    Args:
        q: (B, K, D) or (B, heads, K, D), the slots' queries. float64, float32, bfloat16 or float16.
        k: (B, N, D) or (B, heads, N, D), the inputs' keys, in q's dtype, or float32 beside a 16-bit q.
        v: (B, N, Dv) or (B, heads, N, Dv), their values, as k. None: k itself, which is then read once.
        scale: multiplies the products q . k; None: 1 / sqrt(D).
        eps: at least 0, what keeps a slot that wins nothing from dividing by zero. A slot whose sum is 0 all the same
            (eps 0) has a zero update.
        eps_mode: "add": to each weight before they are normalised; "denominator": to their sum.
        bias: (B, K) or (B, heads, K), added to each slot's logits, in q's dtype, or float32 beside a 16-bit q.
        slot_mask: (B, K) bool, also with heads. A slot where it is False takes no part in the softmax and has a zero
            update; what q and bias hold there is not read. This is how samples have different numbers of slots.
        input_mask: (B, N) bool, also with heads. An input where it is False adds nothing to any sum, nor eps; what k
            and v hold there is not read. A sample without inputs or without slots has zero updates.
        head_softmax: "slots": the slots of each head compete by themselves; "joint": those of all heads together.
        return_attn: whether to return A beside the updates.
        backend: auto, reference, cpp or triton; None takes that of use_backend(), else of RECATTN_BACKEND.

    Returns: updates, (B, K, Dv) or (B, heads, K, Dv), in q's dtype. With return_attn (updates, A), A (B, K, N) or
    (B, heads, K, N), in q's dtype, before eps is added; 0 at masked slots and masked inputs.

    Gradients: q, k, v and bias, through updates and A, of any order; forward-mode AD, functorch transforms and second
    derivatives run the reference. The arithmetic is in float32, float64 for float64 q. Unless A is returned nothing of
    its size is kept, nor allocated by the fused backends.

    Raises:
        ValueError, TypeError: for arguments that do not fit; the message names the argument.
        BackendUnavailableError: the backend asked for cannot run this call; recattn_kernels.explain() says why.

    Source: Locatello et al., "Object-centric learning with slot attention", NeurIPS 2020.
    """
    if has_torch_function((q, k, v)) and not torch.compiler.is_compiling():
        return handle_torch_function(slot_attention, (q, k, v), **locals())
    call = normalise(
        q, k, v, scale=scale, eps=eps, eps_mode=eps_mode, bias=bias, slot_mask=slot_mask, input_mask=input_mask,
        head_softmax=head_softmax, return_attn=return_attn,
    )  # fmt: skip
    updates, attn = OPERATOR.run(BACKENDS, backend, call)
    return (updates, attn) if return_attn else updates
