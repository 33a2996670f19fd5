"""The iterations of SlotAttention in one launch: when the layer takes it, and that it computes the same."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from test_layers_slot_attention import B, N, plain, some
from torch import Tensor, nn

from recattn_kernels import GRUCell, SlotAttention, backends, use_backend
from recattn_kernels.layers.slot_attention_inputs import attention_over
from recattn_kernels.layers.slot_attention_iterations import weights_of
from recattn_kernels.ops.slot_attention import iterations

K, D = 4, 32
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
interpret = pytest.mark.interpret
pytestmark = pytest.mark.usefixtures("absorbing")


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """How many iterations each launch made."""
    made: list[int] = []
    run = iterations._run

    def counted(*args: Any) -> Any:
        made.append(iterations.Options(*args[6:]).times)
        return run(*args)

    monkeypatch.setattr(iterations, "_run", counted)
    yield made


def make(preset: str = "official", **options: Any) -> SlotAttention:
    """A layer whose parameters are all random."""
    layer = SlotAttention.preset(preset, K, options.pop("dim", D), **{"mlp_dim": 48, **options})
    with torch.no_grad():
        for name, p in layer.named_parameters():
            p.normal_(1.0 if "norm" in name and "weight" in name else 0.0, 0.2)
    return layer


def attention_of(layer: SlotAttention, inputs: Tensor, K: int = K) -> Any:
    return attention_over(layer, inputs, K, None, None, 1, "reference")


# What differs in the kernel: values that are the keys or not, eps, GRU or sum, biases, widths of one tile and of two.
CASES: dict[str, tuple[dict[str, Any], tuple[torch.dtype, ...]]] = {
    "official": ({"eps": 1e-2}, (F32, BF16, F16)),
    "savi": ({"iters": 2, "eps": 1e-2}, (F32, BF16)),
    "lucidrains": ({"input_dim": 48, "iters": 2}, (F32,)),
    "slate": ({"dim": 48, "update": "residual", "temperature": 0.5, "iters": 2}, (F32,)),
}


@interpret
@pytest.mark.parametrize("name", CASES)
def test_is_as_close_to_the_definition_as_the_layer(name: str, launches: list[int]) -> None:
    options, dtypes = CASES[name]
    exactly = make(name, **options)
    masks = {} if name == "slate" else {"slot_mask": some(B, K), "input_mask": some(B, N).flip(0)}
    for dtype in dtypes:
        layer = copy.deepcopy(exactly).to(dtype)
        inputs, slots = torch.randn(B, N, layer.input_dim, dtype=dtype), torch.randn(B, K, layer.dim, dtype=dtype)
        with torch.no_grad():
            expected = plain(copy.deepcopy(layer).double(), inputs.double(), slots.double(), **masks)
            with use_backend("reference"):
                reference = layer(inputs, slots, return_attn=True, **masks)
            with use_backend("triton"):
                found = layer(inputs, slots, return_attn=True, **masks)
        for actual, of_layer, exact in zip(found, reference, expected, strict=True):
            assert actual.dtype == dtype
            most = 2 * (of_layer.double() - exact).abs().max() + 4 * torch.finfo(dtype).eps * exact.abs().max()
            assert (actual.double() - exact).abs().max() <= most
    assert launches == [layer.iters] * len(dtypes)


@interpret
def test_most_slots_and_features_and_no_inputs(launches: list[int]) -> None:
    layer = make(input_dim=64, iters=1)
    for slots_of, inputs_of in ((20, 33), (1, 1), (2, 0)):
        inputs, slots = torch.randn(1, inputs_of, 64), torch.randn(1, slots_of, D)
        with torch.no_grad(), use_backend("reference"):
            expected = layer(inputs, slots)
        with torch.no_grad(), use_backend("triton"):
            torch.testing.assert_close(layer(inputs, slots), expected, rtol=1e-4, atol=1e-5)
    assert launches == [1, 1, 1]


@interpret
@pytest.mark.parametrize("mode", ["full", "fixed-point", "bi-level"])
def test_gradients(mode: str, launches: list[int]) -> None:
    """The iterations that keep nothing are one launch; those that are differentiated go on as they did."""
    layer = make(grad_mode=mode, iters=2)
    inputs, slots = torch.randn(1, 33, D), torch.randn(1, K, D).requires_grad_()
    results = []
    for backend in ("reference", "triton"):
        with use_backend(backend):
            output = layer(inputs, slots)
        wanted = [slots, *layer.parameters()]
        results.append((output, *torch.autograd.grad(output.square().sum(), wanted, materialize_grads=True)))
    assert launches == ([] if mode == "full" else [1])
    torch.testing.assert_close(results[1], results[0], rtol=1e-3, atol=1e-3)


@interpret
@pytest.mark.parametrize("update", ["gru", "residual"])
def test_autocast(update: str, launches: list[int]) -> None:
    layer = make(update=update, iters=2)
    inputs, slots = torch.randn(1, N, D), torch.randn(1, K, D)
    with torch.no_grad():
        expected = layer(inputs, slots)
        for given in (slots, slots.bfloat16())[: 2 if update == "gru" else 1]:  # else the results' dtype is not given
            with torch.autocast("cpu", BF16):
                with use_backend("reference"):
                    reference, attn = layer(inputs, given, return_attn=True)
                with use_backend("triton"):
                    found, of_found = layer(inputs, given, return_attn=True)
            assert found.dtype == reference.dtype and of_found.dtype == attn.dtype
            assert (found.float() - expected).norm() <= 2 * (reference.float() - expected).norm()
    assert launches == ([2, 2] if update == "gru" else [2])


@interpret
def test_compiles_and_keeps_the_registered_op(fresh_compiler: None) -> None:
    """Of sizes that do not change; of others a graph goes on operation by operation."""
    layer = make(backend="triton", iters=1)
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, example: Any) -> Any:
        graphs.append(graph)
        return graph

    compiled = torch.compile(layer, fullgraph=True, backend=keep)
    for sizes in ((B, N), (2, 7), (5, 50)):
        inputs, slots = torch.randn(*sizes, D), torch.randn(sizes[0], K, D)
        with torch.no_grad():
            torch.testing.assert_close(compiled(inputs, slots), layer(inputs, slots), rtol=1e-4, atol=1e-5)
    fused = ["slot_attention_iterations" in graph.code for graph in graphs]
    assert fused == [True, False]


@interpret
def test_opcheck() -> None:
    layer = make()
    for p in layer.parameters():
        p.requires_grad_(False)
    attention = attention_of(layer, torch.randn(2, 9, D))
    weights = weights_of(layer, attention)
    assert weights is not None
    for dtype, return_attn in ((F32, True), (BF16, False)):
        options = iterations.Options(0.1, 1e-8, False, 1e-5, 1, return_attn, dtype)
        args = (torch.randn(2, K, D), attention.k, attention.v, None, None, list(weights), *options)
        torch.library.opcheck(
            torch.ops.recattn_kernels.slot_attention_iterations.default, args,
            test_utils=("test_schema", "test_faketensor"),
        )  # fmt: skip


@pytest.fixture
def anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU with one multiprocessor."""
    monkeypatch.setattr(backends, "machine_refusal", lambda backend, device: None)


def refusal(layer: SlotAttention, B: int = 1, N: int = 9, K: int = K) -> str | None:
    dtype = layer.slots_mu.dtype
    attention = attention_of(layer, torch.randn(B, N, layer.input_dim, dtype=dtype), K)
    weights = weights_of(layer, attention)
    assert weights is not None
    return iterations.refusal(torch.randn(B, K, layer.dim, dtype=dtype), attention.k, attention.v, weights)


@torch.no_grad()
def test_what_one_launch_refuses(anywhere: None) -> None:
    layer = make()
    assert refusal(layer) is None and refusal(layer, K=32) is None
    assert "at most 32 slots" in str(refusal(layer, K=33))
    wide = SlotAttention(K, 64)
    assert refusal(wide) is None
    assert "at most 32 features in float32, got 64" in str(refusal(wide, K=17))
    assert refusal(copy.deepcopy(wide).bfloat16(), K=17) is None
    assert "at most 64 features in float32, got 80" in str(refusal(SlotAttention(K, 64, input_dim=80), N=200))
    assert "multiples of 16, got 32, 32 and 20" in str(refusal(make(mlp_dim=20)))
    assert "the inputs are float64" in str(refusal(copy.deepcopy(layer).double()))
    with torch.enable_grad():
        assert "nothing for a gradient" in str(refusal(layer))
    with torch.autograd.forward_ad.dual_level():
        assert refusal(layer) == backends.UNDER_TRANSFORM


@torch.no_grad()
@pytest.mark.parametrize(("D", "most"), [(64, 13), (128, 3)])
def test_the_rule(D: int, most: int, anywhere: None) -> None:
    """The numbers that pays() names, and the inputs that it takes."""
    layer = SlotAttention(7, D, dtype=BF16)
    assert refusal(layer, most, 1024) is None
    assert "longer than launches take" in str(refusal(layer, most + 1, 1024))
    assert "longer than launches take" in str(refusal(layer, 1, 1025))


def test_runs_on_a_gpu_alone() -> None:
    if backends.interpreting():
        pytest.skip("the interpreter runs it here")
    with torch.no_grad():
        assert refusal(make()) == "it runs on a GPU, its input is on cpu"


@pytest.mark.parametrize("part", ["norm_slots", "norm_mlp", "project_q", "gru", "mlp", "mlp.0", "mlp.1", "mlp.2"])
def test_follows_hooks(part: str) -> None:
    layer = make()
    inputs = torch.randn(1, 9, D)
    assert weights_of(layer, attention_of(layer, inputs)) is not None
    layer.get_submodule(part).register_forward_hook(lambda module, args, output: output * 2)
    assert weights_of(layer, attention_of(layer, inputs)) is None


def test_follows_what_is_put_in_place_of_its_parts() -> None:
    inputs = torch.randn(1, 9, D)
    changes: dict[str, Any] = {
        "heads": 4, "mlp": nn.Sequential(nn.Linear(D, D), nn.Tanh(), nn.Linear(D, D)), "norm_mlp": nn.LayerNorm(D, 0.1),
        "norm_slots": nn.LayerNorm((K, D)), "gru": GRUCell(D, D, zoneout=0.5), "project_q": nn.Linear(D, D).double(),
    }  # fmt: skip
    for name, change in changes.items():
        layer = make()
        attention = attention_of(layer, inputs)
        assert weights_of(layer, attention) is not None
        setattr(layer, name, change)
        assert weights_of(layer, attention) is None, name
    layer = make(backend="triton")
    layer.gru.backend = "reference"
    assert weights_of(layer, attention_of(layer, inputs)) is None
