"""rnn, lstm and gru in Triton: in the interpreter against the reference, by the rule of recattn_kernels/conformance.py,
with each of the kernels; and compiled ahead of time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import test_aot
import torch
from torch import Tensor

import recattn_kernels.ops.gru as gru_op
import recattn_kernels.ops.lstm as lstm_op
import recattn_kernels.ops.rnn as rnn_op
from recattn_kernels import backends, conformance
from recattn_kernels.spec import cast, tensors

FUNCTIONS: dict[str, tuple[Callable[..., Any], int]] = {
    "rnn": (rnn_op.rnn, 1), "lstm": (lstm_op.lstm, 4), "gru": (gru_op.gru, 3),
}  # fmt: skip
CELLS = ("rnn_tanh", "rnn_relu", "lstm", "gru")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
KERNELS = ("sequence", "step")


def randn(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()


def make(cell: str, T: int, B: int, H: int, options: str = "") -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A call in float64. options: words that say what it has."""
    generator = torch.Generator().manual_seed(T + B + H)
    words = options.split()
    op = cell.split("_")[0]
    lstm, G = op == "lstm", FUNCTIONS[op][1]
    rows = (B, T) if "batch_first" in words else (T, B)
    x = randn(generator, *rows, G * H)
    if "strided" in words:
        x = randn(generator, *reversed(rows), 2 * G * H).detach()[..., ::2].transpose(0, 1).requires_grad_()
    weight_hh = (randn(generator, G * H, H).detach() / H**0.5).requires_grad_()
    kwargs: dict[str, Any] = {"reverse": "reverse" in words, "batch_first": "batch_first" in words}
    if op == "rnn":
        kwargs["nonlinearity"] = cell.removeprefix("rnn_")
    args: tuple[Any, ...] = (x, weight_hh)
    if "state" in words:
        h0 = randn(generator, B, H)
        args = (*args, (h0, randn(generator, B, H)) if lstm else h0)
    if "bias" in words:
        kwargs["bias_hh"] = randn(generator, G * H)
    if "reset" in words:
        kwargs["reset"] = torch.rand(*rows, generator=generator) < 0.3
    if "lengths" in words:
        lengths = torch.randint(0, T + 1, (B,), generator=generator)
        lengths[0], lengths[-1] = T, 0
        kwargs["lengths"] = lengths
    if "masks" in words:
        masks = [torch.rand(*rows, H, generator=generator) < 0.4 for _ in range(2)]
        kwargs |= {"training": True, "zoneout_mask": tuple(masks) if lstm else masks[0]}
    if "rates" in words:
        kwargs["zoneout"] = (0.3, 0.2) if lstm else 0.3
    if "clip" in words:
        kwargs["grad_clip"] = 0.5
    return args, kwargs


def check(
    cell: str, kernel: str, dtype: torch.dtype, args: Any, kwargs: Any, monkeypatch: Any, *,
    mixed: bool = False, layout: str = "contiguous", used: list[int] | None = None,
) -> None:  # fmt: skip
    from recattn_kernels.ops.gated import triton

    if kernel == "step":
        monkeypatch.setattr(triton, "holds_weights", lambda call, on: False)
    function, _ = FUNCTIONS[cell.split("_")[0]]
    others = torch.float32 if mixed else dtype
    args, kwargs = (cast(args[0], dtype, "cpu"), *cast(args[1:], others, "cpu")), cast(kwargs, others, "cpu")
    reference_kwargs = kwargs | {"backend": "reference"}
    exact_args, exact_kwargs = conformance.exactly(args), conformance.exactly(reference_kwargs)
    outputs = tensors(function(*args, **reference_kwargs))
    grads = conformance.output_gradients(outputs, torch.Generator().manual_seed(1), layout, used)
    reference = conformance.evaluate(function, args, reference_kwargs, grads)
    exact = conformance.evaluate(function, exact_args, exact_kwargs, conformance.exactly(grads))
    actual = conformance.evaluate(function, args, kwargs | {"backend": "triton"}, grads)
    names = conformance.input_names(function, args, kwargs)
    findings = conformance.judge(actual, reference, exact, names, dtype)
    assert findings
    wrong = [f"{f.name}: {f.complaint}" for f in findings if f.complaint is not None]
    assert not wrong, wrong


EVERYTHING = "state bias reset lengths masks clip"
OPTIONS = (
    "", "state", "bias", "state bias", "state reset", "state lengths", "state lengths reverse", "masks", "state rates",
    "state clip", "state reverse batch_first bias", "strided state bias", EVERYTHING, f"{EVERYTHING} batch_first",
    f"{EVERYTHING} reverse", "reset lengths rates clip reverse batch_first bias",
)  # fmt: skip


@pytest.mark.interpret
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("cell", CELLS)
def test_options(cell: str, options: str, kernel: str, monkeypatch: Any) -> None:
    check(cell, kernel, torch.float32, *make(cell, 9, 3, 5, options), monkeypatch)


@pytest.mark.interpret
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(("T", "B", "H"), [(0, 3, 5), (1, 1, 1), (9, 0, 5), (9, 1, 33), (4, 17, 16), (9, 3, 65)])
@pytest.mark.parametrize("cell", CELLS)
def test_sizes(cell: str, T: int, B: int, H: int, kernel: str, monkeypatch: Any) -> None:
    check(cell, kernel, torch.float32, *make(cell, T, B, H, "state bias"), monkeypatch)


@pytest.mark.interpret
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", ["", EVERYTHING, "state bias rates reverse"])
@pytest.mark.parametrize("cell", CELLS)
def test_sixteen_bits(cell: str, options: str, dtype: torch.dtype, mixed: bool, kernel: str, monkeypatch: Any) -> None:
    args, kwargs = make(cell, 9, 3, 33, options)
    if cell == "rnn_relu":
        # The state is rounded to the weights' type for the product, which may carry a sum that is nearly 0 over the
        # kink, where the derivative jumps: they are kept away from it.
        with torch.no_grad():
            args[0].add_(2 * args[0].sign())
            args[1].mul_(0.1)
    check(cell, kernel, dtype, args, kwargs, monkeypatch, mixed=mixed)


@pytest.mark.interpret
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("layout", ["expanded", "transposed"])
@pytest.mark.parametrize("cell", CELLS)
def test_any_layout_of_the_output_gradient(cell: str, layout: str, kernel: str, monkeypatch: Any) -> None:
    check(cell, kernel, torch.float32, *make(cell, 5, 3, 7, EVERYTHING), monkeypatch, layout=layout)


@pytest.mark.interpret
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("used", [0, 1, 2])
@pytest.mark.parametrize("cell", CELLS)
def test_one_output_used(cell: str, used: int, kernel: str, monkeypatch: Any) -> None:
    if used == 2 and cell != "lstm":
        pytest.skip("it has two outputs")
    check(cell, kernel, torch.float32, *make(cell, 5, 3, 7, EVERYTHING), monkeypatch, used=[used])


@pytest.mark.interpret
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e4, -1e4])
@pytest.mark.parametrize("cell", CELLS)
def test_extreme_values(cell: str, value: float, kernel: str, monkeypatch: Any) -> None:
    """One value in x: saturated gates, and NaN where the reference has it."""
    args, kwargs = make(cell, 5, 3, 5, "state bias")
    with torch.no_grad():
        args[0][2, 0, 2] = value
    check(cell, kernel, torch.float32, args, kwargs, monkeypatch)


@pytest.mark.interpret
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("cell", CELLS)
def test_nothing_past_a_length_is_seen(cell: str, kernel: str, monkeypatch: Any) -> None:
    args, kwargs = make(cell, 5, 3, 5, "state bias reverse")
    kwargs["lengths"] = torch.tensor([3, 0, 1])
    with torch.no_grad():
        args[0][3:] = float("nan")
    check(cell, kernel, torch.float32, args, kwargs, monkeypatch)


def test_refusals() -> None:
    x, weight_hh, ones = torch.zeros(2, 3, 15), torch.zeros(15, 5), torch.ones(15)
    from recattn_kernels.ops.gated.contract import triton_refusal
    from recattn_kernels.ops.gru.api import normalise

    assert triton_refusal(normalise(x, weight_hh)) is None
    assert "float64" in str(triton_refusal(normalise(x.double(), weight_hh.double())))
    assert "normalisation" in str(triton_refusal(normalise(x, weight_hh, layer_norm=(ones, ones))))
    assert "reset_after" in str(triton_refusal(normalise(x, weight_hh, reset_after=False)))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "variant" not in metafunc.fixturenames:
        return
    full = metafunc.config.getoption("--aot-full")
    cases: list[Any] = []
    for name, (_, _, lanes, _) in test_aot.TARGETS.items():
        for op in FUNCTIONS if test_aot.HAS_TRITON and not test_aot.INTERPRETING else ():
            for variant in backends.load(op, "triton").aot_variants(lanes, full):
                cases.append(pytest.param(name, variant, id=f"{name}-{variant.name}"))
    metafunc.parametrize("target, variant", cases)


@test_aot.needs_compiler
def test_compiles_within_its_budget(target: str, variant: Any, tmp_path: Path) -> None:
    test_aot.test_triton_compiles_within_its_budget(target, variant, tmp_path)


@test_aot.needs_compiler
@pytest.mark.parametrize("target", test_aot.TARGETS)
@pytest.mark.parametrize("op", FUNCTIONS)
def test_does_not_recompile(op: str, target: str) -> None:
    test_aot.test_triton_does_not_recompile(op, target)


@test_aot.needs_compiler
@pytest.mark.parametrize("hidden", [64, 512])
def test_float32_is_multiplied_exactly_unless_torch_allows_less(hidden: int, monkeypatch: Any) -> None:
    from triton.backends.compiler import GPUTarget

    from recattn_kernels.ops.gated import triton, triton_aot

    def tf32(allowed: bool) -> list[bool]:
        monkeypatch.setattr(triton, "allows_tf32", lambda: allowed)
        shape = triton_aot.Shape(torch.float32, torch.float32, hidden, "biased")
        launches = triton_aot.example("gru", shape, triton_aot.machine(32))
        return ["tf32" in launch.compile(GPUTarget("cuda", 80, 32)).asm["ptx"] for launch in launches]

    assert tf32(False) == [False, False]
    assert tf32(True) == [True, True]
