"""indrnn(): the public function, its checks, and its derivative."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from recattn_kernels import backends, checks
from recattn_kernels.ops.autograd import c_apply, derive, needs_grad
from recattn_kernels.ops.indrnn import contract, reference
from recattn_kernels.ops.indrnn.contract import ACTIVATIONS, ALGORITHMS, BACKENDS, LIBRARY, Call
from recattn_kernels.ops.sequence import compute_dtype, on_device


def normalise(
    x: Tensor,
    weight_hh: Tensor,
    h0: Tensor | None = None,
    *,
    activation: str = "relu",
    negative_slope: float = 0.01,
    bias: Tensor | None = None,
    reset: Tensor | None = None,
    lengths: Tensor | list[int] | None = None,
    reverse: bool = False,
    batch_first: bool = False,
    grad_clip: float | None = None,
    algorithm: str = "auto",
) -> Call:
    """Checks the arguments of indrnn(), before any work, and puts them in one form."""
    op = "indrnn"
    checks.choice(op, "activation", activation, ACTIVATIONS)
    checks.choice(op, "algorithm", algorithm, ALGORITHMS)
    checks.number(op, "negative_slope", negative_slope)
    checks.flag(op, "reverse", reverse)
    checks.flag(op, "batch_first", batch_first)
    if grad_clip is not None:
        checks.positive(op, "grad_clip", grad_clip)
        grad_clip = float(grad_clip)
    checks.tensor(op, "x", x)
    checks.rank(op, "x", x, "(B, T, H)" if batch_first else "(T, B, H)")
    checks.dtype(op, "x", x, checks.FLOATING)
    if grad_clip is not None and grad_clip > torch.finfo(compute_dtype(x.dtype)).max:
        grad_clip = None  # it clips nothing, and without it the kernels are faster
    T, B, H = x.shape[1 if batch_first else 0], x.shape[0 if batch_first else 1], x.shape[2]
    checks.parameter(op, "weight_hh", weight_hh, "(H,)", (H,), x)
    if h0 is not None:
        checks.parameter(op, "h0", h0, "(B, H)", (B, H), x)
    if bias is not None:
        checks.parameter(op, "bias", bias, "(H,)", (H,), x)
    if reset is not None:
        checks.mask(op, "reset", reset, "(B, T)" if batch_first else "(T, B)", tuple(x.shape[:2]), x)
    if lengths is not None:
        lengths = on_device(op, checks.lengths(op, lengths, B, T, x), x)
    return Call(
        x, weight_hh, h0, bias, reset, lengths,
        activation, float(negative_slope), reverse, batch_first, grad_clip, algorithm,
    )  # fmt: skip


class _Indrnn(torch.autograd.Function):
    """Saves output and the parameters, not x: the backward reads nothing else."""

    @staticmethod
    def forward(ctx: Any, run: Callable[..., tuple[Tensor, Tensor]], *args: Any) -> tuple[Tensor | None, ...]:
        output, h_n = run(*args)
        _, *tensors = args[:6]
        # An output of its own, in the same memory: see indrnn_backward.
        unclipped = None if Call(*args[:-1]).grad_clip is None else output.detach()
        ctx.save_for_backward(output, *tensors, unclipped)
        ctx.options = args[6:]
        ctx.set_materialize_grads(False)
        return output, h_n, unclipped

    @staticmethod
    def backward(
        ctx: Any, grad_output: Tensor | None, grad_h_n: Tensor | None, grad_unclipped: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        *tensors, unclipped = ctx.saved_tensors
        args = (*tensors, *ctx.options)
        grads: tuple[Tensor | None, ...]
        if grad_output is None and grad_h_n is None and grad_unclipped is None:
            grads = (None, None, None, None)
        elif torch.is_grad_enabled() or grad_unclipped is not None:
            # create_graph=True: the reference's formula, in output and the parameters, can be differentiated again.
            call = Call(*args[:-1])
            grads = reference.indrnn_backward(
                grad_output, grad_h_n, call.x, call.weight_hh, call.h0, **call.definition(),
                unclipped=unclipped, grad_unclipped=grad_unclipped,
            )  # fmt: skip
        elif backends.dispatches(grad_output, grad_h_n, *args[:6]):
            grads = torch.ops.recattn_kernels.indrnn_backward.default(grad_output, grad_h_n, *args)
        else:
            grads = contract.backward(grad_output, grad_h_n, *args)
        needs = ctx.needs_input_grad[1:5]
        wanted = [grad if need else None for grad, need in zip(grads, needs, strict=True)]
        return (None, *wanted, *[None for _ in args[4:]])


_differentiable = c_apply(_Indrnn)
derive(LIBRARY, "indrnn", 4, 2, _differentiable)


def _scans(call: Call) -> bool:
    """Whether the reference takes the scan: not where its derivative would not do."""
    return call.algorithm == "scan" and not backends.under_transform() and contract.refusal(call) is None


def indrnn(
    x: Tensor,
    weight_hh: Tensor,
    h0: Tensor | None = None,
    *,
    activation: str = "relu",
    negative_slope: float = 0.01,
    bias: Tensor | None = None,
    reset: Tensor | None = None,
    lengths: Tensor | list[int] | None = None,
    reverse: bool = False,
    batch_first: bool = False,
    grad_clip: float | None = None,
    algorithm: str = "auto",
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    r"""The recurrence of the independently recurrent neural network (IndRNN) over a whole sequence.

    .. math:: h_t = \mathrm{act}(x_t + \mathrm{bias} + \mathrm{weight\_hh} \odot h_{t-1})

    Each hidden unit sees only its own past, so the recurrent weight is a vector. x already holds the input projection.

    Args:
        x: (T, B, H), or (B, T, H) under batch_first: the projected input. float64, float32, bfloat16 or float16.
        weight_hh: (H,), the recurrent weight, in x's dtype, or float32 beside a 16-bit x (so too h0 and bias).
        h0: (B, H), the initial state; zeros when None.
        activation: relu, tanh, sigmoid, identity, leaky_relu, relu6 or hardtanh.
        negative_slope: of leaky_relu.
        bias: (H,), added to every step.
        reset: bool (T, B), or (B, T) under batch_first. Where True, the row's state is zeroed before the step is taken.
        lengths: (B,), the number of valid steps of each row, 0 to T, in any order: a list, or an int64 tensor. Steps
            past it output 0 and leave the state alone. A list or CPU tensor is checked; a CUDA tensor is clamped.
        reverse: takes each row's valid steps from last to first; output[t] stays at x[t].
        batch_first: x, reset and output are (B, T, ...). Nothing is copied.
        grad_clip: in the backward, dL/dh_t is clamped to [-grad_clip, grad_clip] once the gradient of output[t] and
            that from the later steps have been added. Second derivatives are exact where nothing is clipped.
        algorithm: "sequential" walks over time. "scan" takes chunks of time in parallel, to the same results within
            rounding: in the forward of relu, relu6, hardtanh and identity, and in the backward of every activation;
            the forward of the others is walked, and so are chunks that NaN, infinity or an overflow reaches. It is for
            long sequences of few columns on a GPU; cpp refuses it. "auto" leaves the choice to the backend.
        backend: auto, reference, cpp, triton or cuda; None takes that of use_backend(), else of RECATTN_BACKEND.

    Returns:
        output, of x's shape and dtype: h_t of every step; and h_n, (B, H), in h0's dtype (x's without h0): each row's
        state after the last step that was taken.

    Gradients: x, weight_hh, h0 and bias, of any order; forward-mode AD and functorch transforms run the reference.
    They are deterministic. The state and every sum are float32, float64 for a float64 x. The derivative of act is taken
    from output, so with a 16-bit x those of tanh and sigmoid carry its rounding, as in torch's own tanh and sigmoid.

    Raises:
        ValueError, TypeError: for arguments that do not fit; the message names the argument.
        BackendUnavailableError: the backend asked for cannot run this call; recattn_kernels.explain() says why.

    Source: Li, Li, Cook, Zhu and Gao, "Independently Recurrent Neural Network (IndRNN): Building A Longer and Deeper
    RNN", CVPR 2018, arXiv:1803.04831.
    """
    if has_torch_function((x, weight_hh, h0)) and not torch.compiler.is_compiling():
        return handle_torch_function(indrnn, (x, weight_hh, h0), **locals())
    call = normalise(
        x,
        weight_hh,
        h0,
        activation=activation,
        negative_slope=negative_slope,
        bias=bias,
        reset=reset,
        lengths=lengths,
        reverse=reverse,
        batch_first=batch_first,
        grad_clip=grad_clip,
        algorithm=algorithm,
    )
    backend = backends.choose("indrnn", backend, BACKENDS, call)
    if backend == "reference" and not _scans(call):
        return reference.indrnn(x, weight_hh, h0, **call.definition())
    if backends.dispatches(*call[:6]):
        output, h_n = torch.ops.recattn_kernels.indrnn.default(*call, backend)
    elif needs_grad(call[:4]):
        output, h_n, _ = _differentiable(contract.forward, *call, backend)
    else:
        output, h_n = contract.forward(*call, backend)
    return output, h_n
