"""Layers compiled and exported once, for batches, sequences and sets of any size."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from test_layers_citizenship import CASES, INPUTS, B, Case, H, T
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils import _pytree as pytree

import recattn_kernels as rk

N = 9  # of the inputs of an attention; no other size of CASES and INPUTS is B, T or N
DYNAMIC = {B: "b", T: "t", N: "n"}
LATER = ({B: 2, T: 7, N: 40}, {B: 50, T: 20, N: 3}, {B: 7, T: 2, N: 9})

plain = pytest.mark.parametrize(
    "case", [c for c in CASES if c.variant == "plain"], ids=[c.name for c in CASES if c.variant == "plain"]
)


def inputs(case: Case, layer: nn.Module, sizes: Mapping[int, int]) -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn([sizes.get(n, n) for n in shape], generator=generator)

    # Given slots: those that a layer draws are others in every call.
    slots = (randn(B, 4, H),) if case.name == "SlotAttention" else ()
    return (*INPUTS[case.name](layer, randn), *slots)


@plain
def test_export(case: Case) -> None:
    layer = case.make().eval()
    example = inputs(case, layer, {})
    dims = {name: torch.export.Dim(name, min=2, max=512) for name in DYNAMIC.values()}

    def dynamic(x: Tensor) -> dict[int, Any]:
        return {i: dims[DYNAMIC[n]] for i, n in enumerate(x.shape) if n in DYNAMIC}

    exported = torch.export.export(layer, example, dynamic_shapes=pytree.tree_map(dynamic, example)).module()
    for sizes in LATER:
        args = inputs(case, layer, sizes)
        torch.testing.assert_close(exported(*args), layer(*args))


@pytest.mark.parametrize("needs_grad", [False, True])
def test_export_of_an_lstm_that_torch_would_run(needs_grad: bool) -> None:
    """Of torch.nn's kernel an exported program has every step, and holds for one number of them."""
    layer = rk.LSTM(24, 32)
    dims = {i: torch.export.Dim(name, min=2, max=512) for i, name in enumerate("tb")}
    with torch.set_grad_enabled(needs_grad):
        exported = torch.export.export(layer, (torch.randn(5, 3, 24),), dynamic_shapes=(dims,)).module()
        for T, B in ((5, 3), (40, 70)):
            x = torch.randn(T, B, 24)
            torch.testing.assert_close(exported(x), layer(x))


@plain
def test_compile(case: Case) -> None:
    layer = case.make().eval()
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    with torch._dynamo.config.patch(allow_rnn=True):
        for sizes in ({}, *LATER):
            args = inputs(case, layer, sizes)
            torch.testing.assert_close(compiled(*args), layer(*args))
    assert counter.frame_count <= 2  # for the first sizes, and for any


@pytest.mark.parametrize("name", ["SlotAttention", "RecurrentAttention"])
def test_compile_what_draws(name: str) -> None:
    """torch.randn with generator=None does not compile for sizes that change."""
    case = next(c for c in CASES if c.name == name)
    layer = case.make().train()
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    for sizes in ({}, *LATER):
        (image,) = inputs(case, layer, sizes)[:1]
        result = compiled(image)
        assert pytree.tree_leaves(result)[0].shape[0] == image.shape[0]


def test_compile_glimpse_of_any_zoom() -> None:
    image, loc = torch.rand(2, 1, 9, 8), torch.rand(2, 2) - 0.5

    def take(zoom: float, factor: float) -> Tensor:
        return rk.glimpse(image, loc, 3, scales=2, zoom=zoom, scale_factor=factor)

    compiled = torch.compile(take, fullgraph=True, backend="eager")
    for zoom, factor in ((1.0, 2.0), (1.5, 2.0), (0.7, 1.5)):
        torch.testing.assert_close(compiled(zoom, factor), take(zoom, factor))
