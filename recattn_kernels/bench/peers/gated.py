"""Beside rnn, lstm and gru: torch.nn's layers, on padded and on packed sequences, and the options it does not have."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

from recattn_kernels.bench.peers.case import PEER_SLACK, Case, Impl, compiled
from recattn_kernels.spec import tensors


def peers(case: Case, definition: Callable[..., Any], layer: str) -> list[Impl]:
    """The layers beside torch.nn's, on padded and on packed sequences, and the options that torch.nn does not have."""
    import recattn_kernels

    T, B, H = (case.workload.sizes[name] for name in "TBH")
    gates = case.args[1].shape[0] // H
    factory: Mapping[str, Any] = {"device": case.device, "dtype": case.dtype}
    torch.manual_seed(0)
    input = torch.randn(T, B, H, **factory).requires_grad_()
    ours, theirs = getattr(recattn_kernels, layer)(H, H, **factory), getattr(nn, layer)(H, H, **factory)
    theirs.load_state_dict(ours.state_dict())
    names = ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0")
    # In a random order, as batches come: between half of the steps and all of them.
    lengths = torch.randint(T // 2, T + 1, (B,), generator=torch.Generator().manual_seed(0))
    lengths[0] = T

    def padded(input: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor, b_hh: Tensor) -> Any:
        output, state = definition(F.linear(input, w_ih, b_ih), w_hh, bias_hh=b_hh)
        return output, [s.unsqueeze(0) for s in tensors(state)]

    def packed(input: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor, b_hh: Tensor) -> Any:
        output, state = definition(F.linear(input, w_ih, b_ih), w_hh, bias_hh=b_hh, lengths=lengths)
        return *pack_padded_sequence(output, lengths, enforce_sorted=False), [s.unsqueeze(0) for s in tensors(state)]

    def on_packed(module: nn.Module, input: Tensor, *_: Tensor) -> Any:
        return module(pack_padded_sequence(input, lengths, enforce_sorted=False))

    def cost(share: float, backward: bool) -> tuple[int, int]:
        n, weights = int(share * T * B * H), 2 * gates * H * H
        moved = 6 * n + 3 * weights if backward else 2 * n + weights
        return moved * case.dtype.itemsize, (3 if backward else 1) * 2 * n * gates * 2 * H

    def row(name: str, module: nn.Module, call: Callable[..., Any], definition: Any, share: float = 1.0) -> Impl:
        own = (input, *(module.get_parameter(name) for name in names))
        mine = module is ours
        return Impl(
            name, functools.partial(call, *own), own, definition=definition, slack=1.0 if mine else PEER_SLACK,
            cost=functools.partial(cost, share), ours=mine,
        )  # fmt: skip

    impls = []
    if case.compile and T <= 32:  # Inductor unrolls the loop, at about a second for four steps
        impls.append(case.impl("compile", compiled(definition), definition=definition))
    impls += [
        row("layer:recattn_kernels", ours, lambda input, *_: ours(input), padded),
        row("layer:torch.nn", theirs, lambda input, *_: theirs(input), padded),
    ]
    if T > 1:
        share = float(lengths.sum()) / (T * B)
        impls += [
            row("packed:recattn_kernels", ours, functools.partial(on_packed, ours), packed, share),
            row("packed:torch.nn", theirs, functools.partial(on_packed, theirs), packed, share),
        ]
        impls += _options(case, definition)
    return impls


def _options(case: Case, definition: Callable[..., Any]) -> list[Impl]:
    """The op with layer normalisation, and with zoneout, beside the reference."""
    x, weight_hh = case.args
    GH, H = weight_hh.shape
    # With weights of 1 gradients grow without bound over a thousand steps, and roundings with them.
    norm = [x.new_full((GH,), 0.1), x.new_zeros(GH)]
    if case.spec.name == "lstm":
        norm += [x.new_ones(H), x.new_zeros(H)]
    options: dict[str, dict[str, Any]] = {
        "normed": {"layer_norm": tuple(t.requires_grad_() for t in norm)},
        "zoneout": {"zoneout": 0.1},  # as in evaluation: nothing is drawn, so that both compute the same
    }
    impls = []
    for name, kwargs in options.items():
        args = (x, weight_hh, *kwargs.get("layer_norm", ()))
        for row, call in (("auto", case.spec.function), ("reference", definition)):
            fused = row == "auto"
            impls.append(
                Impl(
                    f"{name}:{row}", functools.partial(call, x, weight_hh, **kwargs), args,
                    definition=functools.partial(_with_options, definition, kwargs) if fused else None, ours=fused,
                )
            )  # fmt: skip
    return impls


def _with_options(
    definition: Callable[..., Any], kwargs: Mapping[str, Any], x: Tensor, w: Tensor, *norm: Tensor
) -> Any:
    return definition(x, w, **({"layer_norm": tuple(norm)} if norm else kwargs))
