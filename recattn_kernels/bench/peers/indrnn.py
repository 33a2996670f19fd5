"""Beside indrnn: a plain pass over as many bytes, and the layer beside torch.nn's recurrences."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recattn_kernels.bench.peers.case import Case, Cost, Impl, compiled


def peers(case: Case, definition: Callable[..., Any]) -> list[Impl]:
    x = case.args[0]
    T, B, H = (case.workload.sizes[name] for name in "TBH")
    impls = []
    if case.compile:
        # Inductor unrolls the loop and takes about a second for four steps: a whole sequence of 784 takes minutes.
        steps = T if case.unroll >= T else next((n for n in range(32, 15, -1) if T % n == 0), 32)
        run = compiled(definition) if steps == T else _in_chunks(definition, steps)
        name = "compile" if steps == T else f"compile/{steps}"
        impls.append(case.impl(name, run, definition=definition))
    impls.append(Impl("relu", functools.partial(torch.relu, x), (x,)))
    return impls + _indrnn_layers(case, T, B, H)


def _in_chunks(definition: Callable[..., Any], steps: int) -> Callable[..., Any]:
    chunk = compiled(definition)

    def run(x: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        # Like the states that follow it, the first requires grad: one compilation then serves every chunk. In the type
        # that states are computed in: a 16-bit one would be rounded after every chunk.
        dtype = torch.promote_types(x.dtype, torch.float32)
        h = x.new_zeros(x.shape[1:], dtype=dtype).requires_grad_(torch.is_grad_enabled())
        outputs = []
        for part in x.split(steps):
            output, h = chunk(part, u, h)
            outputs.append(output)
        return torch.cat(outputs), h.to(x.dtype)

    return run


def _coarse(x: Tensor, steps: int) -> Tensor:
    """x in multiples of 1 / steps."""
    return x.mul(steps).round_().div_(steps)


def _indrnn_layers(case: Case, T: int, B: int, H: int) -> list[Impl]:
    from recattn_kernels.layers.indrnn import IndRNN
    from recattn_kernels.ops.indrnn.spec import SWEEP_WEIGHT

    def cost(gates: int, recurrent: int, backward: bool) -> tuple[int, int]:
        """recurrent: multiply-adds that a state costs."""
        n, weights = T * B * H, gates * H * (H + recurrent)
        # Forward: reads input and weights, writes output. Backward: reads grad_output, output, input and weights,
        # writes the gradients of input and weights.
        moved = 6 * n + 3 * weights if backward else 2 * n + weights
        return moved * case.dtype.itemsize, (3 if backward else 1) * 2 * n * gates * (H + recurrent)

    factory: Mapping[str, Any] = {"device": case.device, "dtype": case.dtype}
    torch.manual_seed(0)
    # Of so few bits that the projection is exact in whatever order it is summed up: else relu may pass an element that
    # it stops in the reference, and the check finds what is no fault.
    input = _coarse(torch.randn(T, B, H, **factory), 4).requires_grad_()
    # The layer's weights are bounded as the op's are: by the paper's bound, or by that of a sweep, whose states keep
    # away from relu's kink too.
    ours = IndRNN(H, H, recurrent_max=SWEEP_WEIGHT if case.sweep else 2 ** (1 / T), **factory)
    weight_ih = ours.get_parameter("weight_ih_l0")
    weight_ih.data = _coarse(weight_ih.data, 1024)
    if case.sweep:
        nn.init.constant_(ours.get_parameter("bias_l0"), 5.0)
    # Time-major, cuDNN's own layout; batch_first takes as long on a CPU.
    layers: Sequence[tuple[str, nn.Module, Cost]] = (
        ("layer:nn.RNN(relu)", nn.RNN(H, H, nonlinearity="relu", **factory), functools.partial(cost, 1, H)),
        ("layer:nn.LSTM", nn.LSTM(H, H, **factory), functools.partial(cost, 4, H)),
    )

    def definition(input: Tensor, weight_ih: Tensor, weight_hh: Tensor, bias: Tensor) -> Any:
        output, h_n = case.spec.function(F.linear(input, weight_ih), weight_hh, bias=bias, backend="reference")
        return output, h_n.unsqueeze(0)

    parameters = (ours.get_parameter(name) for name in ("weight_ih_l0", "weight_hh_l0", "bias_l0"))
    return [
        Impl(
            "layer:IndRNN", functools.partial(ours, input), (input, *parameters), definition=definition,
            cost=functools.partial(cost, 1, 1), ours=True,
        ),
        *(
            Impl(name, functools.partial(layer, input), (input, *layer.parameters()), cost=cost_)
            for name, layer, cost_ in layers
        ),
    ]  # fmt: skip
