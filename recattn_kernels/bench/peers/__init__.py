"""What is timed for each op: its backends, and beside them what people use today.

An op has a module with a function peers(case, definition), and a line in PEERS. A row is compared with the first of its
group, which is what its name has before a colon: the op's own rows have none, "layer:IndRNN" is of the group "layer".
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from recattn_kernels import backends
from recattn_kernels.bench.peers import additive_attention, gated, glimpse, indrnn, slot_attention
from recattn_kernels.bench.peers.case import Case, Impl, reference_of

__all__ = ["NOTES", "PEERS", "Case", "Impl", "build", "label"]

# What the names of rows stand for, printed below the tables.
NOTES = {
    "relu": "torch.relu(x): a pass that reads and writes as many bytes and computes next to nothing",
    "compile": "torch.compile of the reference, static shapes",
    "compile/": "torch.compile of N steps of the reference, called in a loop: compiling all takes minutes",
    "layer:": "a whole layer of width H over an input of width H, its input projection included; of slot attention"
    " three iterations, with its GRU and MLP",
    "packed:": "the same on a PackedSequence of lengths from T/2 to T, in a random order, packing included",
    "normed:": "with layer normalisation of W_hh h, in the lstm of c too",
    "zoneout:": "with zoneout, as in evaluation",
    "gather": "the image padded, one gather of the widest windows at whole pixels, their centres average-pooled",
    "slicing": "a slice of the padded image for each sample and scale, pooled",
    "grid_sample": "a bilinear tap of F.grid_sample for every pixel of the windows, pooled",
    "conv3x3": "a convolution of the whole image, to 16 channels",
    "broadcast": "eager PyTorch as captioning code has it: (softmax(e).unsqueeze(2) * values).sum(1)",
    "step:": "a word through a decoder of width 512: attention, gate, LSTM; keys projected beforehand, or every time",
    "einsum": "slot attention as models are written, softmax over the last dimension",
    "compile einsum": "torch.compile of that",
    "flash + lse": "scaled_dot_product_attention over the inputs; one channel more of the keys: -logsumexp over slots",
    "FlexAttention": "the same, the logsumexp in score_mod",
}

# op -> its peers, given the case and the op's reference
PEERS: dict[str, Callable[[Case, Callable[..., Any]], list[Impl]]] = {
    "indrnn": indrnn.peers,
    "rnn": functools.partial(gated.peers, layer="RNN"),
    "lstm": functools.partial(gated.peers, layer="LSTM"),
    "gru": functools.partial(gated.peers, layer="GRU"),
    "glimpse": glimpse.peers,
    "additive_attention": additive_attention.peers,
    "slot_attention": slot_attention.peers,
}


def label(backend: str, variant: Mapping[str, Any]) -> str:
    """What a row of a backend is called: triton, or triton scan."""
    return " ".join([backend, *map(str, variant.values())])


def build(
    case: Case, backend: str | None, variants: Sequence[Mapping[str, Any]] = ({},)
) -> tuple[list[Impl], dict[str, str]]:
    """Every row of a case, and {row: reason} for those that cannot run it.

    backend: leaves out the other fused ones; the package's layers run on it too. variants: each backend has a row for
    each of them; the first defines the op.
    """
    function = case.spec.function
    definition = reference_of(function, **variants[0])
    reasons = [backends.explain(case.spec.name, *case.args, **case.kwargs, **variant) for variant in variants]
    impls, refused = [], dict[str, str]()
    if backend is not None and backend not in case.spec.backends:
        refused[backend] = "the op has no such backend"
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
        others = PEERS[case.spec.name](case, definition)
        impls += [_on(backend, impl) if impl.ours and backend is not None else impl for impl in others]
    return impls, refused


def _on(backend: str, impl: Impl) -> Impl:
    """A layer's row on a backend, which raises BackendUnavailableError where it cannot run the layer."""

    def call() -> Any:
        with backends.use_backend(backend):
            return impl.call()

    return dataclasses.replace(impl, name=impl.name.replace(":auto", f":{backend}"), call=call, may_refuse=True)
