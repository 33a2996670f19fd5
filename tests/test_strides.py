"""How tensors are handed to the kernels: what large ones lie in."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from recattn_kernels import IndRNN, indrnn
from recattn_kernels.strides import LARGE


def flags(x: Tensor) -> list[str]:
    """What Linux has been told of the memory in the middle of x."""
    middle, within = x.data_ptr() + x.nbytes // 2, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, *rest = line.split()
        if "-" in first and not first.endswith(":"):
            begin, end = (int(address, 16) for address in first.split("-"))
            within = begin <= middle < end
        elif within and first == "VmFlags:":
            return rest
    raise AssertionError("no mapping holds x")


@pytest.mark.skipif(not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="a system without large pages")
def test_large_outputs_and_gradients_lie_in_large_pages() -> None:
    x = torch.randn(16, 64, 16384).requires_grad_()  # 64 MB, which malloc takes from the system by themselves
    assert x.nbytes >= 16 * LARGE
    output, _ = indrnn(x, torch.rand(16384), backend="cpp")
    assert "hg" in flags(output.detach())
    (grad,) = torch.autograd.grad(output.sum(), x)
    assert "hg" in flags(grad)
    assert "hg" not in flags(torch.empty_like(x))


def test_a_layer_of_large_sequences_equals_the_reference() -> None:
    layer, x = IndRNN(8, 512), torch.randn(64, 64, 8)
    output, h_n = layer(x)
    assert output.nbytes >= LARGE
    layer.backend = "reference"
    torch.testing.assert_close((output, h_n), layer(x), rtol=1e-5, atol=1e-5)
