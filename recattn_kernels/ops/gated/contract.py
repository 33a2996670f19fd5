"""The registered ops of the gated recurrences: schemas, shapes, and the hand-over to the module that runs them.

Every one has the arguments of all: those that its cell does not know are None.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from recattn_kernels import backends, checks
from recattn_kernels.ops import gpu
from recattn_kernels.ops.gated import launch_plan
from recattn_kernels.ops.sequence import compute_dtype

# cell -> gates; the order is that of csrc/cpu/kernels.h's enum Cell. gru_before resets the state before the product.
CELLS = {"rnn_tanh": 1, "rnn_relu": 1, "lstm": 4, "gru": 3, "gru_before": 3}
# cell -> blocks of H that the backward needs of each step. The gru's fourth is what r multiplies.
KEPT = {"rnn_tanh": 1, "rnn_relu": 1, "lstm": 4, "gru": 4, "gru_before": 3}


class Call(NamedTuple):
    """One checked call. x, reset and keep are (T, B, ...), or (B, T, ...) under batch_first.

    With batch_sizes x is (N, ...), and so is output: the rows of a packed batch, of which lengths says the steps.
    """

    x: Tensor  # G*H wide; output in its place in a backward
    weight_hh: Tensor
    h0: Tensor | None
    c0: Tensor | None
    bias_hh: Tensor | None
    ln_weight: Tensor | None
    ln_bias: Tensor | None
    ln_c_weight: Tensor | None
    ln_c_bias: Tensor | None
    reset: Tensor | None
    lengths: Tensor | None
    keep_h: Tensor | None  # zoneout's masks in training, True where the old state stays
    keep_c: Tensor | None
    batch_sizes: Tensor | None  # (T,), on the CPU: how many rows step t has, the longest first
    cell: str
    zoneout_h: float  # the probabilities
    zoneout_c: float
    training: bool
    reverse: bool
    batch_first: bool
    grad_clip: float | None

    @property
    def time(self) -> int:
        """The dimension of x that is time; the batch is 1 - time."""
        return 1 if self.batch_first else 0

    @property
    def sizes(self) -> tuple[int, int, int]:
        """T, B, H"""
        if self.batch_sizes is not None and self.lengths is not None:
            return self.batch_sizes.shape[0], self.lengths.shape[0], self.weight_hh.shape[1]
        return self.x.shape[self.time], self.x.shape[1 - self.time], self.weight_hh.shape[1]

    @property
    def steps(self) -> tuple[int, ...]:
        """The dimensions of what is kept of each step: (T, B), time-major; (N,) if packed."""
        return self.sizes[:2] if self.batch_sizes is None else (self.x.shape[0],)

    @property
    def op(self) -> str:
        """Whose cell it is, for messages."""
        return self.cell.partition("_")[0]

    @property
    def gates(self) -> int:
        return CELLS[self.cell]

    @property
    def direct(self) -> int:
        """The gates whose product is with the state itself: those before the one that is with r * h."""
        return 2 if self.cell == "gru_before" else self.gates

    @property
    def has_c(self) -> bool:
        return self.cell == "lstm"

    def state_dtype(self, state: Tensor | None) -> torch.dtype:
        return self.x.dtype if state is None else state.dtype

    def interruptions(self) -> dict[str, Any]:
        """The keyword arguments of the references' walk over time."""
        states = 2 if self.has_c else 1
        return {
            "reset": self.reset, "lengths": self.lengths, "reverse": self.reverse, "batch_first": self.batch_first,
            "grad_clip": self.grad_clip, "zoneout": self.mixing[:states], "keep": (self.keep_h, self.keep_c)[:states],
        }  # fmt: skip

    @property
    def layer_norm(self) -> tuple[Tensor | None, ...]:
        norm = (self.ln_weight, self.ln_bias, self.ln_c_weight, self.ln_c_bias)
        return norm if self.has_c else norm[:2]

    @property
    def mixing(self) -> tuple[float, float]:
        """The share of the old h and c in the new ones: zoneout in evaluation."""
        return (0.0, 0.0) if self.training else (self.zoneout_h, self.zoneout_c)


# The differentiable ones of a call's tensors, x first.
PARAMETERS = Call._fields[:9]
TENSORS = Call._fields[:14]

_ARGUMENTS = (
    ", ".join(f"Tensor{'' if name == 'weight_hh' else '?'} {name}" for name in TENSORS[1:])
    + ", str cell, float zoneout_h, float zoneout_c, bool training, bool reverse, bool batch_first, float? grad_clip"
)
LIBRARY = torch.library.Library("recattn_kernels", "FRAGMENT")


class Kept(NamedTuple):
    """What a forward keeps for its backward, time-major and in the type of the arithmetic; empty where not needed."""

    gates: Tensor  # (*steps, KEPT * H): activated, and for the gru what r multiplies
    cells: Tensor  # (*steps, H): the lstm's c
    normed: Tensor  # (*steps, G*H): W_hh h, normalised
    rstd: Tensor  # steps: by what it was multiplied


def empty_forward(call: Call, keep: bool) -> tuple[Tensor, Tensor, Tensor, Kept]:
    """Uninitialised output, h_n, c_n and what is kept."""
    _, B, H = call.sizes
    output = call.x.new_empty((*call.x.shape[:-1], H))
    h_n = call.x.new_empty((B, H), dtype=call.state_dtype(call.h0))
    c_n = call.x.new_empty((B, H) if call.has_c else (0,), dtype=call.state_dtype(call.c0))
    normalised = keep and call.ln_weight is not None
    shapes = (
        (*call.steps, KEPT[call.cell] * H) if keep and not reads_output(call) else (0,),
        (*call.steps, H) if keep and call.has_c else (0,),
        (*call.steps, call.gates * H) if normalised else (0,),
        call.steps if normalised else (0,),
    )
    dtype = compute_dtype(call.x.dtype)
    return output, h_n, c_n, Kept(*(call.x.new_empty(shape, dtype=dtype) for shape in shapes))


def reads_output(call: Call) -> bool:
    """Whether the backward finds in output all that it needs of the gates: the one of the rnn, where nothing is mixed
    with it and it is not rounded."""
    zoneout = call.zoneout_h > 0 or call.keep_h is not None
    return call.gates == 1 and not zoneout and call.x.dtype == compute_dtype(call.x.dtype)


def empty_backward(call: Call, needs_weight: bool = True) -> tuple[Tensor, ...]:
    """Uninitialised gradients of PARAMETERS; call.x is the output. That of weight_hh is empty where not needed."""
    _, _, H = call.sizes
    dx = call.x.new_empty((*call.x.shape[:-1], call.gates * H))
    parameters = (getattr(call, name) if needs_weight or name != "weight_hh" else None for name in PARAMETERS[1:])
    return (dx, *(dx.new_empty(0) if p is None else p.new_empty(p.shape) for p in parameters))


def define(op: str) -> None:
    """Registers recattn_kernels::<op> and <op>_backward."""
    LIBRARY.define(
        f"{op}(Tensor x, {_ARGUMENTS}, bool keep, str backend) -> (Tensor output, Tensor h_n, Tensor c_n,"
        " Tensor gates, Tensor cells, Tensor normed, Tensor rstd)",
        tags=(torch.Tag.pt2_compliant_tag,),
    )
    # The gradient of x needs output in x's place, and not x. An absent gradient is an empty tensor. That of weight_hh,
    # half of the backward's time, is not made for frozen weights; the others come by the way.
    LIBRARY.define(
        f"{op}_backward(Tensor? grad_output, Tensor? grad_h_n, Tensor? grad_c_n, Tensor output, {_ARGUMENTS},"
        " Tensor gates, Tensor cells, Tensor normed, Tensor rstd, bool needs_weight, str backend)"
        f" -> ({', '.join(f'Tensor grad_{name}' for name in PARAMETERS)})",
        tags=(torch.Tag.pt2_compliant_tag,),
    )

    def run_forward(*args: Any) -> tuple[Tensor, ...]:
        call = Call(*args[:-2])
        if call.lengths is not None:
            checks.length_values(op, call.lengths, call.sizes[0])  # a compiled caller could not look at them
        return forward(op, *args)

    def run_backward(*args: Any) -> tuple[Tensor, ...]:
        return backward(op, *args)

    def fake_forward(*args: Any) -> tuple[Tensor, ...]:
        output, h_n, c_n, kept = empty_forward(Call(*args[:-2]), args[-2])
        return output, h_n, c_n, *kept

    def fake_backward(*args: Any) -> tuple[Tensor, ...]:
        return empty_backward(Call(*args[3:-6]), args[-2])

    for key in ("CPU", "CUDA"):
        LIBRARY.impl(op, run_forward, key)
        LIBRARY.impl(f"{op}_backward", run_backward, key)
    torch.library.register_fake(f"recattn_kernels::{op}", fake_forward, lib=LIBRARY)
    torch.library.register_fake(f"recattn_kernels::{op}_backward", fake_backward, lib=LIBRARY)


def forward(op: str, *args: Any) -> tuple[Tensor, ...]:
    """output, h_n, c_n and what is kept, of a call followed by whether anything is to be kept, and the backend."""
    call, keep, backend = Call(*args[:-2]), args[-2], args[-1]
    output, h_n, c_n, kept = backends.load(op, backend).forward(call, keep)
    return output, h_n, c_n, *kept


def backward(op: str, *args: Any) -> tuple[Tensor, ...]:
    """The gradients of PARAMETERS from those of output, h_n and c_n, the call with output for x, what was kept, whether
    weight_hh's is needed, and the backend."""
    grads: Sequence[Tensor | None] = args[:3]
    call, kept, needs_weight, backend = Call(*args[3:-6]), Kept(*args[-6:-2]), args[-2], args[-1]
    return tuple(backends.load(op, backend).backward(grads, call, kept, needs_weight))


def triton_refusal(call: Call) -> str | None:
    """Why the Triton kernels cannot run the call."""
    return gpu.refusal_of_float64(call)


def cuda_refusal(call: Call) -> str | None:
    """Why the CUDA kernels cannot run the call: what Triton's cannot they cannot either, and weight_hh has to fit."""
    reason = triton_refusal(call)
    # H may be a symbol to a compiler, which cannot ask for the GPU's properties either: there the launch raises.
    if reason is not None or torch.compiler.is_compiling():
        return reason
    return launch_plan.refusal(problem_of(call), gpu.gpu_of(call.weight_hh.device))


def problem_of(call: Call) -> launch_plan.Problem:
    """What the forward of the call is to be laid out for."""
    weight_hh = call.weight_hh
    return launch_plan.Problem(
        call.gates, call.sizes[2], weight_hh.element_size(), multiplies_exactly(weight_hh.dtype), backward=False,
        normed=call.ln_weight is not None, twice=call.direct < call.gates,
    )  # fmt: skip


def multiplies_exactly(weight_hh: torch.dtype) -> bool:
    """Whether the products with weights of this type are float32 in full."""
    return weight_hh == torch.float32 and not backends.allows_tf32()
