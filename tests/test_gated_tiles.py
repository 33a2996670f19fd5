"""rnn, lstm and gru of as many rows as the units that multiply tiles take at once: as precise as without those units,
what has no parts included, and the same for any number of threads."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from test_conformance import judge
from torch import Tensor

from recattn_kernels import backends, conformance, gru, lstm, registry, rnn
from recattn_kernels.layers.projection import matmul
from recattn_kernels.ops import samples
from recattn_kernels.ops.gated.spec import Samples
from recattn_kernels.spec import tensors

cpu: Any = backends.extension("_cpu")
CAPABILITIES = [] if isinstance(cpu, str) else [name for name in ("avx512", "amx") if name in cpu.capabilities()]
pytestmark = pytest.mark.skipif(not CAPABILITIES, reason="_cpu is not built, or this machine has no AVX-512")

T = 5
OPS: dict[str, tuple[Callable[..., Any], int]] = {"rnn": (rnn, 1), "lstm": (lstm, 4), "gru": (gru, 3)}


@pytest.fixture(params=CAPABILITIES)
def capability(request: pytest.FixtureRequest) -> Iterator[str]:
    before, threads = cpu.capability(), torch.get_num_threads()
    cpu.set_capability(request.param)
    yield request.param
    cpu.set_capability(before)
    torch.set_num_threads(threads)


def arguments(name: str, B: int, H: int) -> tuple[list[Tensor], dict[str, Any]]:
    """x, weight_hh, bias_hh and h0; and options that take rows out of a product."""
    G = OPS[name][1]
    inputs = [torch.randn(T, B, G * H), torch.randn(G * H, H) / H**0.5, torch.randn(G * H), torch.randn(B, H)]
    return inputs, {"lengths": torch.randint(0, T + 1, (B,)), "reset": torch.rand(T, B) < 0.2}


def run(name: str, inputs: list[Tensor], backend: str, **options: Any) -> list[Tensor]:
    """What it returns, and the gradients of all inputs."""
    x, weight, bias, h0 = inputs = [t.detach().requires_grad_() for t in inputs]
    state: dict[str, Any] = {"state": (h0, h0)} if name == "lstm" else {"h0": h0}
    output, last = OPS[name][0](x, weight, bias_hh=bias, backend=backend, **state, **options)
    results = [output, *tensors(last)]
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(r.shape, generator=generator, dtype=torch.float64).to(r.dtype) for r in results]
    return [*results, *torch.autograd.grad(results, inputs, weights)]


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize(("B", "H"), [(8, 390), (33, 100), (70, 96), (130, 20)])
@pytest.mark.parametrize("options", ["none", "rows", "reset_before", "thin"])
def test_as_precise_as_float32(capability: str, name: str, B: int, H: int, options: str) -> None:
    inputs, given = arguments(name, B, H)
    given = {} if options == "none" else given
    if options == "thin":  # weights of one part
        inputs[1] = inputs[1].bfloat16().float()
    if options == "reset_before":
        if name != "gru":
            pytest.skip("an option of gru")
        given["reset_after"] = False
    exact = run(name, [t.double() for t in inputs], "reference", **given)
    theirs = run(name, inputs, "reference", **given)
    ours = run(name, inputs, "cpp", **given)
    for a, b, e in zip(ours, theirs, exact, strict=True):
        scale = e.abs().max()
        assert (a - e).abs().max() <= 3 * (b - e).abs().max() + 4e-7 * scale


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize(("T", "B", "H"), [(5, 33, 100), (20, 40, 130)])
def test_bfloat16(capability: str, name: str, T: int, B: int, H: int) -> None:
    """Weights and states take one part each, but for those before the first step."""
    calls = Samples(OPS[name][1], has_c=name == "lstm")
    sample = calls.sample("sample", T, B, H, state=True, bias_hh=samples.bias, lengths=samples.lengths)
    for mixed in (False, True):
        judge(conformance.compare(registry.find(name), sample, "cpp", torch.bfloat16, mixed=mixed))


HUGE, INF, NAN = 1e30, float("inf"), float("nan")


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize(
    ("where", "value"),
    [("h0", HUGE), ("h0", INF), ("h0", NAN), ("weight", HUGE), ("weight", INF), ("gradient", INF), ("gradient", NAN)],
)
def test_what_has_no_parts_is_multiplied_as_floats(capability: str, name: str, where: str, value: float) -> None:
    B, H = 40, 100
    inputs, _ = arguments(name, B, H)
    inputs[{"h0": 3, "weight": 1, "gradient": 0}[where]].view(-1)[5] = value if where != "gradient" else 0.0

    def results(backend: str, inputs: list[Tensor]) -> list[Tensor]:
        x, weight, bias, h0 = inputs = [t.detach().requires_grad_() for t in inputs]
        state: dict[str, Any] = {"state": (h0, h0)} if name == "lstm" else {"h0": h0}
        output = OPS[name][0](x, weight, bias_hh=bias, backend=backend, **state)[0]
        grad = torch.ones_like(output)
        if where == "gradient":
            grad[3, 20, 7] = value
        return [output, *torch.autograd.grad(output, inputs, grad)]

    exact = results("reference", [t.double() for t in inputs])
    for found, e in zip(results("cpp", inputs), exact, strict=True):
        finite = e.isfinite() & (e.abs() < 1e29)
        assert torch.equal(found.isfinite() & (found.abs() < 1e29), finite)
        torch.testing.assert_close(found[finite].double(), e[finite], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", OPS)
def test_every_number_of_threads_gives_the_same_bits(capability: str, name: str) -> None:
    inputs, given = arguments(name, 50, 100)
    torch.set_num_threads(1)
    alone = run(name, inputs, "cpp", **given)
    for threads in (2, 3):
        torch.set_num_threads(threads)
        assert all(torch.equal(a, b) for a, b in zip(alone, run(name, inputs, "cpp", **given), strict=True))


@pytest.mark.parametrize("columns", [False, True])
@pytest.mark.parametrize(("M", "K", "N"), [(40, 96, 70), (300, 1100, 20), (9, 130, 500)])
def test_a_projection_as_precise_as_torchs(capability: str, M: int, K: int, N: int, columns: bool) -> None:
    a, b = torch.randn(M, K), torch.randn(K, N)
    if columns:
        a, b = a.t().contiguous().t(), b.t().contiguous().t()
    exact = a.double() @ b.double()
    assert (matmul(a, b) - exact).abs().max() <= 2 * (a @ b - exact).abs().max()


@pytest.mark.parametrize("value", [HUGE, INF, NAN])
def test_a_projection_of_what_has_no_parts(capability: str, value: float) -> None:
    a, b = torch.randn(40, 150), torch.randn(150, 60)
    a[3, 4], b[7, 8] = value, value
    torch.testing.assert_close(matmul(a, b), a @ b, equal_nan=True)
