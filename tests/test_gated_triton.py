"""rnn, lstm and gru in Triton: the kernel that the interpreter's small samples would not meet, and its products; and
lstm_step and gru_step, whose cells are the same."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import test_aot
import torch
from test_conformance import judge

from recattn_kernels import backends, conformance, gru, gru_step, lstm, lstm_step, registry
from recattn_kernels.spec import Sample

OPS = ("rnn", "lstm", "gru")
SAMPLES = (
    "plain", "wide", "one_element", "reset", "lengths", "zoneout_evaluation", "everything", "everything_reverse",
    "everything_batch_first", "no_steps", "nan", "nan_past_the_end", "layer_norm_reverse",
)  # fmt: skip
ORIGINAL = ("everything", "everything_batch_first", "no_steps", "nan")


@pytest.mark.interpret
@pytest.mark.parametrize(
    ("op", "name"), [*itertools.product(OPS, SAMPLES), *(("gru", f"original_{name}") for name in ORIGINAL)]
)
def test_one_launch_a_step(op: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where the weights are too large for one program to hold; reset_after=False takes two."""
    from recattn_kernels.ops.gated import triton

    monkeypatch.setattr(triton, "holds_weights", lambda call, on: False)
    spec = registry.find(op)
    sample = next(s for s in spec.samples if s.name == name)
    for dtype in spec.dtypes["triton"][: 2 if name.endswith("everything") else 1]:
        judge(conformance.compare(spec, sample, "triton", dtype))


@pytest.mark.interpret
@pytest.mark.parametrize("op", OPS)
def test_one_program_holds_the_weights(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from recattn_kernels.ops.gated import triton

    monkeypatch.setattr(triton, "holds_weights", lambda call, on: True)
    spec = registry.find(op)
    sample = next(s for s in spec.samples if s.name == "everything")
    judge(conformance.compare(spec, sample, "triton", torch.float32))


@pytest.mark.interpret
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("op", OPS)
def test_nothing_is_launched_without_steps(op: str, normed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that reads what is kept of each step would not compile: it is absent."""
    from recattn_kernels.ops.gated.spec import Samples
    from recattn_kernels.triton_launch import Launch

    launched: list[Launch] = []
    monkeypatch.setattr(Launch, "run", lambda self, **moved: launched.append(self))
    spec, G, B, H = registry.find(op), {"rnn": 1, "lstm": 4, "gru": 3}[op], 2, 5
    norm = Samples(G, has_c=op == "lstm").layer_norm

    def arguments(generator: torch.Generator) -> tuple[tuple[torch.Tensor, ...], dict[str, Any]]:
        x, weight_hh = torch.randn(0, B, G * H), torch.randn(G * H, H)
        states = [torch.randn(B, H).requires_grad_() for _ in range(2)]
        options = {"layer_norm": norm(generator, 0, B, H)} if normed else {}
        state = tuple(states) if op == "lstm" else states[0]
        return (x.requires_grad_(), weight_hh.requires_grad_(), state), options

    judge(conformance.compare(spec, Sample("no_steps", arguments), "triton", torch.float32))
    assert launched == []


@pytest.mark.interpret
@pytest.mark.parametrize("op", OPS)
def test_layer_norm_in_float32_beside_sixteen_bits(op: str) -> None:
    """Of an x in bfloat16 with parameters in float32, the states' own gradients alone, and nothing kept."""
    spec = registry.find(op)
    sample = next(s for s in spec.samples if s.name == "layer_norm_reverse")
    judge(conformance.compare(spec, sample, "triton", torch.bfloat16, mixed=True, used=[1]))
    args, kwargs = spec.arguments(sample, torch.bfloat16, "cpu")
    kept = conformance.tensors(spec.function(*args, **kwargs, backend="triton"))
    with torch.no_grad():
        found = conformance.tensors(spec.function(*args, **kwargs, backend="triton"))
    torch.testing.assert_close(found, [x.detach() for x in kept], rtol=0, atol=0)


def test_refusals() -> None:
    from recattn_kernels.ops.gated.contract import cuda_refusal, triton_refusal
    from recattn_kernels.ops.gru.api import normalise

    x, weight_hh, ones = torch.zeros(2, 3, 15), torch.zeros(15, 5), torch.ones(15)
    assert triton_refusal(normalise(x, weight_hh)) is None
    assert triton_refusal(normalise(x, weight_hh, layer_norm=(ones, ones))) is None
    assert triton_refusal(normalise(x, weight_hh, reset_after=False)) is None
    for refusal in (triton_refusal, cuda_refusal):
        assert "float64" in str(refusal(normalise(x.double(), weight_hh.double())))


@pytest.mark.interpret
@pytest.mark.parametrize("name", ["lstm_step", "gru_step"])
def test_a_step_is_one_launch_whatever_gradients_are_wanted(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from recattn_kernels.triton_launch import Launch

    launched, run = [], Launch.run
    monkeypatch.setattr(Launch, "run", lambda self: (launched.append(self), run(self)))
    spec = registry.find(name)
    sample = next(s for s in spec.samples if s.name == "plain")
    inputs, _ = spec.arguments(sample, torch.float32, "cpu")
    for wanted in itertools.product([False, True], repeat=len(inputs)):
        for x, needs_grad in zip(inputs, wanted, strict=True):
            x.requires_grad_(needs_grad)
        results = []
        for backend in ("triton", "reference"):
            outputs = conformance.tensors(spec.function(*inputs, backend=backend))
            found = [x for x in inputs if x.requires_grad]
            value = sum((o * o).sum() for o in outputs)
            results.append([*outputs, *(torch.autograd.grad(value, found) if found else ())])
        torch.testing.assert_close(*results)
        assert len(launched) == 1 + any(wanted)
        if any(wanted):
            gradients = (
                launched[1].args[f"{n}_ptr"] for n in (("dx", "dc") if name == "lstm_step" else ("dx", "dq", "dh"))
            )
            assert [g is not None for g in gradients] == list(wanted)
        launched.clear()


@pytest.mark.cuda
@pytest.mark.parametrize("name", ["lstm_step", "gru_step"])
def test_a_step_in_a_cuda_graph(name: str) -> None:
    spec = registry.find(name)
    sample = next(s for s in spec.samples if s.name == "everything")
    inputs, _ = spec.arguments(sample, torch.bfloat16, "cuda")

    def step() -> list[torch.Tensor]:
        outputs = conformance.tensors(spec.function(*inputs, backend="triton"))
        return [*outputs, *torch.autograd.grad(outputs, inputs, [torch.ones_like(o) for o in outputs])]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()  # compiles
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step()
    with torch.no_grad():
        for x in inputs:
            x.copy_(torch.randn_like(x))
    graph.replay()
    torch.testing.assert_close(found, step(), rtol=0, atol=0)


@pytest.mark.interpret
def test_steps_equal_the_sequences() -> None:
    B, H = 3, 5
    x, weight, h, c = torch.randn(1, B, 4 * H), torch.randn(4 * H, H), torch.randn(B, H), torch.randn(B, H)
    q = h @ weight.t()
    _, expected = lstm(x, weight, (h, c), backend="triton")
    torch.testing.assert_close(lstm_step(x[0] + q, c, backend="triton"), expected)
    x, weight, q = (t.narrow(d, 0, 3 * H) for t, d in ((x, 2), (weight, 0), (q, 1)))
    _, h_n = gru(x, weight, h, backend="triton")
    torch.testing.assert_close(gru_step(x[0], q, h, backend="triton"), h_n)


def test_steps_refuse_float64() -> None:
    for op, rest in (("lstm_step", []), ("gru_step", [(2, 12)])):
        function, refusal = backends.load(op, "api").normalise, backends.load(op, "contract").BACKENDS["triton"]
        for dtype, reason in ((torch.float64, "it has no float64 kernel"), (torch.float32, None)):
            shapes = [(2, 12), *rest, (2, 3 if op == "lstm_step" else 4)]
            assert refusal(function(*(torch.zeros(shape, dtype=dtype) for shape in shapes))) == reason


@test_aot.needs_compiler
@pytest.mark.parametrize("hidden", [64, 512])
def test_float32_is_multiplied_exactly_unless_torch_allows_less(hidden: int, monkeypatch: Any) -> None:
    from triton.backends.compiler import GPUTarget

    from recattn_kernels.ops.gated import triton_aot

    def tf32(allowed: bool) -> list[bool]:
        monkeypatch.setattr(backends, "allows_tf32", lambda: allowed)
        shape = triton_aot.Shape(torch.float32, torch.float32, hidden, "biased")
        launches = triton_aot.example("gru", shape, triton_aot.machine(32))
        return ["tf32" in launch.compile(GPUTarget("cuda", 80, 32)).asm["ptx"] for (launch,) in launches]

    assert tf32(False) == [False, False]
    assert tf32(True) == [True, True]


@test_aot.needs_compiler
@pytest.mark.parametrize(
    ("B", "H", "blocks"), [(1, 512, (16, 16)), (50, 512, (16, 16)), (512, 256, (16, 32)), (4096, 256, (64, 32))]
)
def test_a_step_is_split_for_as_many_multiprocessors_as_it_can_fill(B: int, H: int, blocks: tuple[int, int]) -> None:
    from recattn_kernels.ops.gated import triton_aot

    shape = triton_aot.Shape(torch.bfloat16, torch.bfloat16, H, "plain", B=B)
    for (launch,) in triton_aot.example("lstm", shape, triton_aot.machine(32)):
        rows, units = launch.args["BLOCK_B"], launch.args["BLOCK_H"]
        assert (rows, units) == blocks
        assert launch.grid == (-(-B // rows), -(-H // units))
