"""The registered ops of IndRNN: schemas, shapes, and the hand-over to the module that runs them."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from recattn_kernels import backends, checks
from recattn_kernels.ops import gpu

# The order of csrc/cells.h's enum Activation.
ACTIVATIONS = ("relu", "tanh", "sigmoid", "identity", "leaky_relu", "relu6", "hardtanh")
ALGORITHMS = ("auto", "sequential", "scan")


class Call(NamedTuple):
    """One checked call. x and reset are (T, B, ...), or (B, T, ...) under batch_first; lengths is an int64 tensor."""

    x: Tensor
    weight_hh: Tensor
    h0: Tensor | None
    bias: Tensor | None
    reset: Tensor | None
    lengths: Tensor | None
    activation: str
    negative_slope: float
    reverse: bool
    batch_first: bool
    grad_clip: float | None
    algorithm: str

    @property
    def time(self) -> int:
        """The dimension of x that is time; the batch is 1 - time."""
        return 1 if self.batch_first else 0

    @property
    def sizes(self) -> tuple[int, int, int]:
        """T, B, H"""
        return self.x.shape[self.time], self.x.shape[1 - self.time], self.x.shape[2]

    @property
    def h_n_dtype(self) -> torch.dtype:
        return self.x.dtype if self.h0 is None else self.h0.dtype

    def definition(self) -> dict[str, Any]:
        """The keyword arguments of the reference."""
        kwargs = self._asdict()
        for name in ("x", "weight_hh", "h0", "algorithm"):
            del kwargs[name]
        return kwargs


def refusal(call: Call) -> str | None:
    """Why no backend that reads the derivative off the output can run the call."""
    if call.activation == "leaky_relu" and call.negative_slope < 0:
        return "a negative negative_slope hides the sign that the backward reads off the output"
    return None


def _cpp_refusal(call: Call) -> str | None:
    if call.algorithm == "scan":
        return "it has no scan: a CPU has too few lanes to gain by computing everything twice"
    return refusal(call)


def _gpu_refusal(call: Call) -> str | None:
    return gpu.refusal_of_float64(call) or refusal(call)


# A CPU tensor ends at cpp, a CUDA tensor at triton or cuda: the order of those two waits for a measurement on a GPU.
BACKENDS: backends.Table = {"cpp": _cpp_refusal, "triton": _gpu_refusal, "cuda": _gpu_refusal}

_ARGUMENTS = (
    "Tensor weight_hh, Tensor? h0, Tensor? bias, Tensor? reset, Tensor? lengths, str activation, "
    "float negative_slope, bool reverse, bool batch_first, float? grad_clip, str algorithm, str backend"
)
LIBRARY = torch.library.Library("recattn_kernels", "FRAGMENT")
LIBRARY.define(f"indrnn(Tensor x, {_ARGUMENTS}) -> (Tensor output, Tensor h_n)", tags=(torch.Tag.pt2_compliant_tag,))
# The gradient of x needs output in x's place, and not x. An absent gradient is an empty tensor.
LIBRARY.define(
    f"indrnn_backward(Tensor? grad_output, Tensor? grad_h_n, Tensor output, {_ARGUMENTS})"
    " -> (Tensor grad_x, Tensor grad_weight_hh, Tensor grad_h0, Tensor grad_bias)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def empty_forward(call: Call) -> tuple[Tensor, Tensor]:
    """Uninitialised output and h_n."""
    _, B, H = call.sizes
    return call.x.new_empty(call.x.shape), call.x.new_empty((B, H), dtype=call.h_n_dtype)


def empty_backward(call: Call) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Uninitialised gradients of x, weight_hh, h0 and bias."""
    return (
        call.x.new_empty(call.x.shape),
        call.weight_hh.new_empty(call.weight_hh.shape),
        call.x.new_empty(0) if call.h0 is None else call.h0.new_empty(call.h0.shape),
        call.x.new_empty(0) if call.bias is None else call.bias.new_empty(call.bias.shape),
    )


def _module(backend: str) -> str:
    # The reference comes here for algorithm="scan" alone: as the definition it needs no derivative of ours.
    return "scan" if backend == "reference" else backend


def forward(*args: Any) -> tuple[Tensor, Tensor]:
    call, backend = Call(*args[:-1]), args[-1]
    output, h_n = backends.load("indrnn", _module(backend)).forward(call)
    return output, h_n


def backward(grad_output: Tensor | None, grad_h_n: Tensor | None, *args: Any) -> tuple[Tensor, ...]:
    call, backend = Call(*args[:-1]), args[-1]  # call.x is the output
    return tuple(backends.load("indrnn", _module(backend)).backward(grad_output, grad_h_n, call))


def _registered_forward(*args: Any) -> tuple[Tensor, Tensor]:
    call = Call(*args[:-1])
    if call.lengths is not None:
        checks.length_values("indrnn", call.lengths, call.sizes[0])  # a compiled caller could not look at them
    return forward(*args)


for _key in ("CPU", "CUDA"):
    LIBRARY.impl("indrnn", _registered_forward, _key)
    LIBRARY.impl("indrnn_backward", backward, _key)


@torch.library.register_fake("recattn_kernels::indrnn", lib=LIBRARY)
def _fake_forward(*args: Any) -> tuple[Tensor, Tensor]:
    return empty_forward(Call(*args[:-1]))


@torch.library.register_fake("recattn_kernels::indrnn_backward", lib=LIBRARY)
def _fake_backward(
    grad_output: Tensor | None, grad_h_n: Tensor | None, *args: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return empty_backward(Call(*args[:-1]))
