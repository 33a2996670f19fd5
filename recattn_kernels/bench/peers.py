"""What is timed for each op: its backends, and beside them what people use today.

A later op adds one function to PEERS. The first row of a group ("", "layer") is the one that the others are compared
with.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

from recattn_kernels import backends
from recattn_kernels.conformance import differentiable
from recattn_kernels.spec import OpSpec, Workload, tensors

Cost = Callable[[bool], tuple[int, int]]

# What the names of rows stand for, printed below the tables.
NOTES = {
    "relu": "torch.relu(x): a pass that reads and writes as many bytes and computes next to nothing",
    "compile": "torch.compile of the reference, static shapes",
    "compile/": "torch.compile of N steps of the reference, called in a loop: compiling all takes minutes",
    "layer:": "a whole layer of width H over an input of width H, its input projection included",
    "packed:": "the same on a PackedSequence of lengths from T/2 to T, in a random order, packing included",
    "normed:": "with layer normalisation of W_hh h, in the lstm of c too",
    "zoneout:": "with zoneout, as in evaluation",
}


@dataclass(frozen=True)
class Impl:
    """One row to be: a call, and what it should compute."""

    name: str
    call: Callable[[], Any]
    args: tuple[Any, ...]  # those that require grad are what a backward differentiates by
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    # The same in plain PyTorch, of args and kwargs. None: there is nothing to check, as the row is the reference
    # itself, a yardstick, or another model.
    definition: Callable[..., Any] | None = None
    cost: Cost | None = None  # whether with backward -> bytes, FLOPs; None: the op's own
    ours: bool = False  # if it fails, the package has failed

    @property
    def inputs(self) -> list[Tensor]:
        return differentiable(self.args, dict(self.kwargs))


@dataclass(frozen=True)
class Case:
    """One workload, in a dtype, on a device, with its inputs."""

    spec: OpSpec
    workload: Workload
    dtype: torch.dtype
    device: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    compile: bool
    unroll: int = 64  # a loop of at most so many steps is compiled whole
    sweep: bool = False  # a point of a sweep, whose inputs keep every size checkable

    def impl(self, name: str, call: Callable[..., Any], **options: Any) -> Impl:
        """A row that calls call(*args, **kwargs) of the op."""
        return Impl(name, functools.partial(call, *self.args, **self.kwargs), self.args, self.kwargs, **options)


# Cached: dynamo compiles anew for each new object and gives up after a few, so the copies of a case must share theirs.
@functools.cache
def reference_of(function: Callable[..., Any], **variant: Any) -> Callable[..., Any]:
    return functools.partial(function, backend="reference", **variant)


@functools.cache
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    result: Callable[..., Any] = torch.compile(function, dynamic=False)
    return result


def label(backend: str, variant: Mapping[str, Any]) -> str:
    """What a row of a backend is called: triton, or triton scan."""
    return " ".join([backend, *map(str, variant.values())])


def build(
    case: Case, backend: str | None, variants: Sequence[Mapping[str, Any]] = ({},)
) -> tuple[list[Impl], dict[str, str]]:
    """Every row of a case, and {row: reason} for those that cannot run it.

    backend: leaves out the other fused ones. variants: each backend has a row for each of them; the first defines the
    op.
    """
    function = case.spec.function
    definition = reference_of(function, **variants[0])
    reasons = [backends.explain(case.spec.name, *case.args, **case.kwargs, **variant) for variant in variants]
    impls, refused = [], {}
    for name in (*(name for name in case.spec.backends if backend in (None, name)), "reference"):
        fused = name != "reference"
        for variant, reason in ((v, r[name]) for v, r in zip(variants, reasons, strict=True)):
            row = label(name, variant)
            if reason is not None:
                refused[row] = reason
            elif fused or variant is not variants[0]:
                call = functools.partial(function, backend=name, **variant)
                impls.append(case.impl(row, call, definition=definition, ours=fused))
            else:
                impls.append(case.impl(row, definition))
    if case.spec.name in PEERS:
        impls += PEERS[case.spec.name](case, definition)
    return impls, refused


def _indrnn(case: Case, definition: Callable[..., Any]) -> list[Impl]:
    x, u = case.args
    T, B, H = (case.workload.sizes[name] for name in "TBH")
    impls = []
    if case.compile:
        # Inductor unrolls the loop and takes about a second for four steps: a whole sequence of 784 takes minutes.
        steps = T if case.unroll >= T else next((n for n in range(32, 15, -1) if T % n == 0), 32)
        run = compiled(definition) if steps == T else _in_chunks(definition, steps)
        name = "compile" if steps == T else f"compile/{steps}"
        impls.append(case.impl(name, run, definition=definition))
    impls.append(Impl("relu", functools.partial(torch.relu, x), (x,)))
    return impls + _indrnn_layers(case, u, T, B, H)


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


def _indrnn_layers(case: Case, u: Tensor, T: int, B: int, H: int) -> list[Impl]:
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
    input = torch.randn(T, B, H, **factory).requires_grad_()
    # The layer's weights are bounded as the op's are: by the paper's bound, or by that of a sweep, whose states keep
    # away from relu's kink too.
    ours = IndRNN(H, H, recurrent_max=SWEEP_WEIGHT if case.sweep else 2 ** (1 / T), **factory)
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


def _gated(case: Case, definition: Callable[..., Any], layer: str) -> list[Impl]:
    """The layers beside torch.nn's, on padded and on packed sequences, and the options that torch.nn does not have."""
    import recattn_kernels

    T, B, H = (case.workload.sizes[name] for name in "TBH")
    gates = case.args[1].shape[0] // H
    steps = T > 1
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
            name, functools.partial(call, *own), own, definition=definition if mine else None,
            cost=functools.partial(cost, share), ours=mine,
        )  # fmt: skip

    impls = []
    if case.compile and T <= 32:  # Inductor unrolls the loop, at about a second for four steps
        impls.append(case.impl("compile", compiled(definition), definition=definition))
    impls += [
        row("layer:recattn_kernels", ours, lambda input, *_: ours(input), padded),
        row("layer:torch.nn", theirs, lambda input, *_: theirs(input), None),
    ]
    if steps:
        share = float(lengths.sum()) / (T * B)
        impls += [
            row("packed:recattn_kernels", ours, functools.partial(on_packed, ours), packed, share),
            row("packed:torch.nn", theirs, functools.partial(on_packed, theirs), None, share),
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


# op -> its peers, given the case and the op's reference
PEERS: dict[str, Callable[[Case, Callable[..., Any]], list[Impl]]] = {
    "indrnn": _indrnn,
    "rnn": functools.partial(_gated, layer="RNN"),
    "lstm": functools.partial(_gated, layer="LSTM"),
    "gru": functools.partial(_gated, layer="GRU"),
}
