"""Bad input is refused before any work, in one wording; it never crashes and never gives silent garbage."""

from __future__ import annotations

import linecache
import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from recattn_kernels import BackendUnavailableError, backends, explain, glimpse, indrnn, slot_attention, use_backend

X, U = torch.randn(4, 3, 5), torch.rand(5)
CASES: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"x": [1.0]}, TypeError, "indrnn: x must be a Tensor, got list"),
    ({"x": X.to_sparse()}, TypeError, "indrnn: x must be a dense Tensor, got torch.sparse_coo"),
    ({"x": X[0]}, ValueError, "indrnn: x must be (T, B, H), got (3, 5)"),
    ({"x": X[0], "batch_first": True}, ValueError, "indrnn: x must be (B, T, H), got (3, 5)"),
    (
        {"x": X.long()},
        TypeError,
        "indrnn: x must be float64 or float32 or bfloat16 or float16, got int64",
    ),
    ({"x": X.to(torch.complex64)}, TypeError, "indrnn: x must be float64"),
    ({"weight_hh": torch.rand(4)}, ValueError, "indrnn: weight_hh must be (H,) = (5,), got (4,)"),
    ({"weight_hh": torch.rand(5, 5)}, ValueError, "indrnn: weight_hh must be (H,) = (5,), got (5, 5)"),
    ({"weight_hh": U.double()}, TypeError, "indrnn: weight_hh must be float32, got float64"),
    ({"weight_hh": U.bfloat16()}, TypeError, "indrnn: weight_hh must be float32, got bfloat16"),
    (
        {"x": X.bfloat16(), "weight_hh": U.half()},
        TypeError,
        "indrnn: weight_hh must be bfloat16 or float32, got float16",
    ),
    ({"weight_hh": U.to("meta")}, ValueError, "indrnn: weight_hh must be on cpu as x is, got meta"),
    ({"h0": torch.rand(5)}, ValueError, "indrnn: h0 must be (B, H) = (3, 5), got (5,)"),
    ({"h0": torch.rand(1, 5)}, ValueError, "indrnn: h0 must be (B, H) = (3, 5), got (1, 5)"),
    ({"h0": 0.0}, TypeError, "indrnn: h0 must be a Tensor, got float"),
    ({"bias": torch.rand(1)}, ValueError, "indrnn: bias must be (H,) = (5,), got (1,)"),
    ({"activation": "gelu"}, ValueError, "indrnn: activation must be one of relu, tanh, sigmoid"),
    ({"activation": None}, ValueError, "indrnn: activation must be one of"),
    ({"algorithm": "fast"}, ValueError, "indrnn: algorithm must be one of auto, sequential, scan, got 'fast'"),
    ({"algorithm": "scan", "backend": "cpp"}, BackendUnavailableError, "indrnn: backend 'cpp' cannot run this call: "),
    ({"negative_slope": "a"}, TypeError, "indrnn: negative_slope must be a number, got 'a'"),
    ({"negative_slope": float("nan")}, ValueError, "indrnn: negative_slope must not be NaN"),
    ({"grad_clip": -1.0}, ValueError, "indrnn: grad_clip must be positive, got -1.0"),
    ({"grad_clip": 0}, ValueError, "indrnn: grad_clip must be positive, got 0"),
    ({"grad_clip": float("nan")}, ValueError, "indrnn: grad_clip must be positive, got nan"),
    ({"reverse": 1}, TypeError, "indrnn: reverse must be a bool, got 1"),
    ({"batch_first": "yes"}, TypeError, "indrnn: batch_first must be a bool, got 'yes'"),
    ({"reset": torch.zeros(4, 3)}, TypeError, "indrnn: reset must be bool, got float32"),
    ({"reset": torch.zeros(3, 4).bool()}, ValueError, "indrnn: reset must be (T, B) = (4, 3), got (3, 4)"),
    (
        {"reset": torch.zeros(3, 4).bool(), "batch_first": True},
        ValueError,
        "indrnn: reset must be (B, T) = (4, 3), got (3, 4)",
    ),
    ({"lengths": [1, 2]}, ValueError, "indrnn: lengths must be (B,) = (3,), got (2,)"),
    ({"lengths": [1, 2, 5]}, ValueError, "indrnn: lengths must lie in [0, T] = [0, 4], got 5"),
    ({"lengths": [1, -2, 3]}, ValueError, "indrnn: lengths must lie in [0, T] = [0, 4], got -2"),
    ({"lengths": [1, 10**30, 3]}, ValueError, "indrnn: lengths must lie in [0, T] = [0, 4], got 10"),
    ({"lengths": torch.tensor([1, 9, 3])}, ValueError, "indrnn: lengths must lie in [0, T] = [0, 4], got 9"),
    ({"lengths": [1.5, 2, 3]}, TypeError, "indrnn: lengths must be a list of ints or an int64 Tensor"),
    ({"lengths": torch.tensor([1, 2, 3]).int()}, TypeError, "indrnn: lengths must be int64, got int32"),
    ({"lengths": torch.tensor([1, 2, 3]).to("meta")}, ValueError, "indrnn: lengths must be on cpu as x is, got meta"),
    ({"lengths": 3}, TypeError, "indrnn: lengths must be a list of ints or an int64 Tensor, got int"),
    ({"backend": "tpu"}, ValueError, "indrnn: backend must be one of auto, reference, vendor, cpp, triton, cuda"),
    ({"backend": "vendor"}, BackendUnavailableError, "indrnn: backend 'vendor' cannot run this call: torch's own"),
    ({"backend": "cuda"}, BackendUnavailableError, "indrnn: backend 'cuda' cannot run this call: it runs on an NVIDIA"),
    (
        {"backend": "cpp", "activation": "leaky_relu", "negative_slope": -0.5},
        BackendUnavailableError,
        "indrnn: backend 'cpp' cannot run this call: a negative negative_slope",
    ),
]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        pytest.param({"backend": backend, **change}, *expected, id=f"{i}-{backend}")
        for i, (change, *expected) in enumerate(CASES)
        for backend in ([change["backend"]] if "backend" in change else ["auto", "reference", "cpp"])
    ],
)
def test_bad_argument(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = {"x": X, "weight_hh": U, **change}
    with pytest.raises(error, match="^" + re.escape(message)):
        indrnn(arguments.pop("x"), arguments.pop("weight_hh"), **arguments)


@pytest.mark.parametrize("number", [np.float32, np.float64, np.int64])
def test_numpys_numbers_are_numbers(number: Callable[[int], Any]) -> None:
    x, weight = torch.randn(3, 2, 5, requires_grad=True), torch.rand(5)
    slope = {"activation": "leaky_relu", "negative_slope": number(1)}
    torch.testing.assert_close(
        indrnn(x, weight, grad_clip=number(2), **slope), indrnn(x, weight, activation="identity")
    )
    q, k, image = torch.randn(2, 3, 4), torch.randn(2, 6, 4), torch.rand(2, 1, 9, 9)
    found, expected = (
        (slot_attention(q, k, scale=one, eps=one), glimpse(image, torch.zeros(2, 2), 4, zoom=one))
        for one in (number(1), 1.0)
    )
    torch.testing.assert_close(found, expected)


def test_a_negative_slope_falls_to_the_reference() -> None:
    x = X.clone().requires_grad_()
    options = {"activation": "leaky_relu", "negative_slope": -0.5}
    output, _ = indrnn(x, U, **options)
    expected, _ = indrnn(x, U, **options, backend="reference")
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(torch.autograd.grad(output.sum(), x), torch.autograd.grad(expected.sum(), x))


@pytest.mark.parametrize("backend", ["auto", "reference", "cpp"])
def test_out_of_memory_is_torchs_own_error(backend: str) -> None:
    """x is a view of three numbers that pretends to be larger than any memory; its output cannot be."""
    x = torch.zeros(1, 1, 3).expand(2, 2**44, 3)
    with pytest.raises(RuntimeError, match=r"memory|allocate|overflow"):
        indrnn(x, torch.rand(3), backend=backend)
    output, _ = indrnn(X, U, backend=backend)
    assert output.isfinite().all()


def test_explain_names_every_backend() -> None:
    reasons = explain("indrnn", X, U, activation="leaky_relu", negative_slope=-1.0)
    assert set(reasons) == {"reference", "vendor", "cpp", "triton", "cuda"}
    assert reasons["reference"] is None
    assert "negative_slope" in str(reasons["cpp"])
    assert "NVIDIA" in str(reasons["cuda"])
    assert explain("indrnn", X, U)["cpp"] is None
    with pytest.raises(TypeError, match=r"^indrnn: missing a required argument: 'weight_hh'"):
        explain("indrnn", X)
    with pytest.raises(ValueError, match="explain: op must be one of indrnn"):
        explain("gelu", X)
    with pytest.raises(ValueError, match=r"explain: op must be one of indrnn.*, got \['indrnn'\]"):
        explain(["indrnn"], X)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="indrnn: weight_hh must be"):
        explain("indrnn", X, torch.rand(2))


def test_use_backend_chooses_and_restores() -> None:
    with use_backend("cuda"):
        with pytest.raises(BackendUnavailableError, match="'cuda'"):
            indrnn(X, U)
        with use_backend("reference"):
            indrnn(X, U)
        indrnn(X, U, backend="cpp")  # the argument wins
        with pytest.raises(BackendUnavailableError):
            indrnn(X, U)
    indrnn(X, U)
    with pytest.raises(ValueError, match="use_backend: name must be one of auto"):
        use_backend("fastest")
    with pytest.raises(KeyError), use_backend("cuda"):
        raise KeyError
    assert backends.requested("indrnn", None) == backends._current != "cuda"


@pytest.mark.usefixtures("fresh_compiler")
def test_one_use_backend_in_itself() -> None:
    def nested(x: Tensor) -> tuple[Tensor, str]:
        chosen = use_backend("reference")
        with chosen:
            with chosen:
                output, _ = indrnn(x, U)
            return output, backends.requested("indrnn", None)

    before = backends._current
    for function in (nested, torch.compile(nested, fullgraph=True, backend="eager")):
        output, inside = function(X)
        assert torch.equal(output, indrnn(X, U, backend="reference")[0])
        assert inside == "reference" and backends._current == before


class Call(NamedTuple):
    """Of a GPU that need not be there."""

    x: Any = SimpleNamespace(device=torch.device("cuda"))


@pytest.mark.usefixtures("fresh_compiler")
def test_the_warning_points_at_the_users_line() -> None:
    ours: dict[str, Any] = {"__name__": "recattn_kernels.layers.of_this_test", "torch": torch, "backends": backends}
    exec("class Layer(torch.nn.Module):\n def forward(self, *args): return backends.choose(*args)", ours)
    layer, call = ours["Layer"](), ("of this test", "auto", {}, Call())
    with pytest.warns(UserWarning, match="no fused backend") as warned:
        layer(*call)
        layer(*call)  # said once, wherever the calls come from
    assert [linecache.getline(w.filename, w.lineno).strip() for w in warned] == ["layer(*call)"]
    with pytest.warns(UserWarning, match="^compiled$"):
        torch.compile(lambda x: (backends._warn_once("compiled"), x + 1)[1], fullgraph=True, backend="eager")(X)
