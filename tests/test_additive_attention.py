"""additive_attention, its layer and the decoder's step: what the samples of the op do not show."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_conformance import judge
from torch import Tensor, nn

import recattn_kernels
from recattn_kernels import AdditiveAttention, AttentionLSTMCell, additive_attention, conformance, registry

B, N, A, D = 3, 5, 4, 6
SPEC = registry.find("additive_attention")


def arguments(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in ((B, A), (B, N, A), (A,), (B, N, D))]


ARGS = [t.detach() for t in arguments()]
BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"query": [1.0]}, TypeError, "query must be a Tensor, got list"),
    ({"query": ARGS[0][0]}, ValueError, "query must be (B, A), got (4,)"),
    ({"query": ARGS[0].long()}, TypeError, "query must be float64 or float32"),
    ({"keys": ARGS[1][0]}, ValueError, "keys must be (B, N, A), got (5, 4)"),
    ({"keys": ARGS[3]}, ValueError, "keys must be (B, N, A) = (3, 5, 4), got (3, 5, 6)"),
    ({"keys": ARGS[1][:1]}, ValueError, "keys must be (B, N, A) = (3, 5, 4), got (1, 5, 4)"),
    ({"keys": ARGS[1].double()}, TypeError, "keys must be float32, got float64"),
    ({"weight": torch.ones(1, A)}, ValueError, "weight must be (A,) = (4,), got (1, 4)"),
    ({"weight": torch.ones(A, device="meta")}, ValueError, "weight must be on cpu as query is, got meta"),
    ({"values": None}, TypeError, "values must be a Tensor, got NoneType"),
    ({"values": ARGS[3][:, :4]}, ValueError, "values must be (B, N, D) = (3, 5, 6), got (3, 4, 6)"),
    ({"mask": torch.ones(B, N)}, TypeError, "mask must be bool, got float32"),
    ({"mask": torch.ones(N, B).bool()}, ValueError, "mask must be (B, N) = (3, 5), got (5, 3)"),
    ({"activation": "gelu"}, ValueError, "activation must be one of tanh, relu, got 'gelu'"),
    ({"return_weights": 1}, TypeError, "return_weights must be a bool, got 1"),
    ({"backend": "tpu"}, ValueError, "backend must be one of auto"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD, ids=[str(i) for i in range(len(BAD))])
def test_bad_argument(change: dict[str, Any], error: type[Exception], message: str) -> None:
    given = dict(zip(("query", "keys", "weight", "values"), ARGS, strict=True)) | change
    with pytest.raises(error, match="^" + re.escape(f"additive_attention: {message}")):
        additive_attention(**given)


@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_a_row_without_positions_is_zero_and_gets_zeros(backend: str) -> None:
    args = arguments()
    mask = torch.ones(B, N, dtype=torch.bool)
    mask[1] = False
    with torch.no_grad():
        args[1][1], args[3][1] = float("nan"), float("inf")
    context, weights = additive_attention(*args, mask=mask, return_weights=True, backend=backend)
    assert context[1].eq(0).all() and weights[1].eq(0).all()
    torch.testing.assert_close(weights.sum(1), torch.tensor([1.0, 0.0, 1.0]))
    grads = torch.autograd.grad(context.sum() + weights.square().sum(), args)
    for grad in (grads[0], grads[1], grads[3]):
        assert grad[1].eq(0).all() and grad[0].ne(0).any()
    assert grads[2].isfinite().all()


def test_only_the_softmax_is_saved() -> None:
    """Beside the inputs themselves."""
    args, sizes = arguments(), []

    def pack(t: Tensor) -> Tensor:
        if all(t is not a for a in args):
            sizes.append(t.numel())
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        additive_attention(*args, backend="cpp")
    assert sizes == [B * N]


@pytest.mark.parametrize("needs", range(4))
def test_each_gradient_alone(needs: int) -> None:
    args = arguments(torch.float64)
    expected = torch.autograd.grad(additive_attention(*args, backend="reference").square().sum(), args)[needs]
    for i, t in enumerate(args):
        t.requires_grad_(i == needs)
    (got,) = torch.autograd.grad(additive_attention(*args, backend="cpp").square().sum(), args[needs])
    torch.testing.assert_close(got, expected)


def test_threads_and_instruction_sets_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit by bit in the threads, closely in the instruction sets; of one row too, whose features are split."""
    cpu = pytest.importorskip("recattn_kernels._cpu")
    sizes = [(2, 150, 130, 200), (1, 150, 130, 200)]

    def run(args: list[Tensor]) -> list[Tensor]:
        context, weights = additive_attention(*args, return_weights=True, backend="cpp")
        return [context, weights, *torch.autograd.grad(context.square().sum() + weights.square().sum(), args)]

    widest, threads = cpu.capability(), torch.get_num_threads()
    try:
        for b, n, a, d in sizes:
            args = [torch.randn(shape, requires_grad=True) for shape in ((b, a), (b, n, a), (a,), (b, n, d))]
            torch.set_num_threads(1)
            expected = run(args)
            for count in (2, 3):
                torch.set_num_threads(count)
                assert all(x.equal(y) for x, y in zip(run(args), expected, strict=True))
            for name in cpu.capabilities():
                cpu.set_capability(name)
                torch.testing.assert_close(run(args), expected, rtol=1e-4, atol=1e-4)
            cpu.set_capability(widest)
    finally:
        cpu.set_capability(widest)
        torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("A", "D"), [(416, 352), (413, 350)])
def test_rows_of_a_large_batch_equal_those_of_a_small_one(A: int, D: int, dtype: torch.dtype) -> None:
    """Gradients of 8 MB and more go past the caches, where their rows are whole lines of one: the last A's and D's are
    not."""
    rows, some, N = 320, 20, 40
    query, keys, values, grad = (torch.randn(rows, *size).to(dtype) for size in ((A,), (N, A), (N, D), (D,)))
    weight, mask = (torch.randn(A) / A**0.5).to(dtype), torch.rand(rows, N) > 0.2
    assert min(keys.nbytes, values.nbytes) >= 8 << 20

    def gradients(count: int) -> tuple[Tensor, ...]:
        inputs = [t[-count:].clone().requires_grad_() for t in (query, keys, values)]
        context = additive_attention(inputs[0], inputs[1], weight, inputs[2], mask=mask[-count:], backend="cpp")
        return torch.autograd.grad(context, inputs, grad[-count:])

    for of_all, of_some in zip(gradients(rows), gradients(some), strict=True):
        assert torch.equal(of_all[-some:], of_some)


@pytest.mark.parametrize("single", range(1, 4))
def test_one_of_them_in_float32_beside_sixteen_bits(single: int) -> None:
    """keys, weight or values: what autocast makes of a layer."""
    args, kwargs = next(s for s in SPEC.samples if s.name == "everything").make(torch.Generator().manual_seed(0))
    mixed = [
        t.detach().to(torch.float32 if i == single else torch.bfloat16).requires_grad_() for i, t in enumerate(args)
    ]
    results = []
    for backend in ("reference", "cpp"):
        outputs = additive_attention(*mixed, **kwargs, backend=backend)
        grads = torch.autograd.grad(sum(o.float().square().sum() for o in outputs), mixed)
        results.append([*outputs, *grads])
    for wanted, got in zip(*results, strict=True):
        assert got.dtype == wanted.dtype
        # What flows back was rounded with the outputs: by half a unit more or less.
        torch.testing.assert_close(got, wanted, rtol=0, atol=0.01 * wanted.abs().max().item())


@pytest.mark.interpret
def test_triton_without_a_gradient_of_the_context() -> None:
    sample = next(s for s in SPEC.samples if s.name == "everything")
    judge(conformance.compare(SPEC, sample, "triton", torch.float32, used=[1]))


def test_triton_refuses_float64() -> None:
    from recattn_kernels.ops.additive_attention.api import normalise
    from recattn_kernels.ops.additive_attention.contract import BACKENDS

    assert "float64" in str(BACKENDS["triton"](normalise(*arguments(torch.float64))))
    assert BACKENDS["triton"](normalise(*arguments())) is None


# Layers


def test_layer_is_its_equation() -> None:
    attention = AdditiveAttention(7, 6, 4, activation="relu")
    query, keys, values = torch.randn(B, 7), torch.randn(B, N, 6), torch.randn(B, N, 2)
    mask = torch.rand(B, N) < 0.7
    mask[:, 0] = True
    hidden = F.linear(keys, attention.project_keys.weight, attention.project_keys.bias)
    hidden = F.relu(hidden + F.linear(query, attention.project_query.weight).unsqueeze(1))
    weights = (hidden @ attention.weight).masked_fill(~mask, float("-inf")).softmax(1)
    context, got = attention(query, keys, mask=mask, return_weights=True)
    torch.testing.assert_close(got, weights)
    torch.testing.assert_close(context, (weights.unsqueeze(2) * keys).sum(1))
    torch.testing.assert_close(attention(query, keys, values, mask=mask), (weights.unsqueeze(2) * values).sum(1))
    projected = attention.precompute(keys)
    torch.testing.assert_close(attention(query, None, values, mask=mask, projected=projected),
                               attention(query, keys, values, mask=mask))  # fmt: skip


def test_precomputed_keys_train_as_the_others_do() -> None:
    attention = AdditiveAttention(7, 6, 4)
    queries, keys = torch.randn(3, B, 7), torch.randn(B, N, 6, requires_grad=True)
    inputs = [keys, *attention.parameters()]
    projected = attention.precompute(keys)
    once = sum(attention(q, keys, projected=projected).square().sum() for q in queries)
    every = sum(attention(q, keys).square().sum() for q in queries)
    torch.testing.assert_close(torch.autograd.grad(once, inputs), torch.autograd.grad(every, inputs))


def test_parameters_and_autocast_of_the_layer() -> None:
    attention = AdditiveAttention(7, 6, 4, bias=False)
    assert {name: tuple(p.shape) for name, p in attention.named_parameters()} == {
        "weight": (4,), "project_query.weight": (4, 7), "project_keys.weight": (4, 6),
    }  # fmt: skip
    with torch.autocast("cpu", torch.bfloat16):
        assert AdditiveAttention(7, 6, 4)(torch.randn(B, 7), torch.randn(B, N, 6)).dtype == torch.bfloat16


@pytest.mark.usefixtures("fresh_compiler")
def test_cell_compiles_and_exports() -> None:
    cell = AttentionLSTMCell(3, 7, 6, 4)
    args = (torch.randn(B, 3), (torch.randn(B, 7), torch.randn(B, 7)), torch.randn(B, N, 6))
    expected = cell(*args)
    torch.testing.assert_close(torch.compile(cell, fullgraph=True, backend="aot_eager")(*args), expected)


@pytest.mark.parametrize("gate", [True, False])
def test_cell_is_its_equation(gate: bool) -> None:
    cell = AttentionLSTMCell(3, 7, 6, 4, gate=gate)
    lstm = nn.LSTMCell(9, 7)
    lstm.load_state_dict(cell.lstm.state_dict())
    x, h, c, keys = torch.randn(B, 3), torch.randn(B, 7), torch.randn(B, 7), torch.randn(B, N, 6)
    mask = torch.ones(B, N, dtype=torch.bool)
    mask[:, 2] = False
    step = cell(x, (h, c), keys, mask=mask, projected=cell.precompute(keys))
    context, weights = cell.attention(h, keys, mask=mask, return_weights=True)
    if cell.gate is not None:
        context = torch.sigmoid(cell.gate(h)) * context
    assert (cell.gate is not None) == gate and weights[:, 2].eq(0).all()
    h, c = lstm(torch.cat((x, context), 1), (h, c))
    torch.testing.assert_close(tuple(step), (h, c, context, weights))
    torch.testing.assert_close(cell(x, None, keys), cell(x, (torch.zeros(B, 7), torch.zeros(B, 7)), keys))
    cell.reset_parameters()


def test_bad_arguments_of_the_layers() -> None:
    attention, cell = AdditiveAttention(7, 6, 4), AttentionLSTMCell(3, 7, 6, 4)
    query, keys, state = torch.randn(B, 7), torch.randn(B, N, 6), (torch.randn(B, 7), torch.randn(B, 7))
    calls = [
        (lambda: AdditiveAttention(0, 6, 4), ValueError, "AdditiveAttention: query_dim must be at least 1, got 0"),
        (lambda: AdditiveAttention(7, 6, 4, activation="gelu"), ValueError, "AdditiveAttention: activation must be"),
        (lambda: AdditiveAttention(7, 6, 4, backend="tpu"), ValueError, "AdditiveAttention: backend must be one of"),
        (lambda: attention(query[0], keys), ValueError, "AdditiveAttention: query must be (B, query_dim), got (7,)"),
        (lambda: attention(keys[:, 0], keys), ValueError, "AdditiveAttention: query must be (B, query_dim) with"),
        (lambda: attention(query, keys[0]), ValueError, "AdditiveAttention: keys must be (B, N, key_dim), got (5, 6)"),
        (lambda: attention(query, None), ValueError, "AdditiveAttention: keys or projected must be given"),
        (lambda: attention(query, None, projected=torch.randn(B, N, 4)), ValueError, "AdditiveAttention: keys or val"),
        (lambda: attention(query, keys[:2]), ValueError, "AdditiveAttention: keys must be (B, N, ...) with B = 3, got"),
        (lambda: attention(query, keys, projected=keys), ValueError, "AdditiveAttention: projected must be (B, N, at"),
        (lambda: attention(query.double(), keys), TypeError, "AdditiveAttention: query must be float32, got float64"),
        (lambda: attention(query, keys.double()), TypeError, "AdditiveAttention: keys must be float32, got float64"),
        (lambda: AttentionLSTMCell(3, 7, 6, 4, gate=1), TypeError, "AttentionLSTMCell: gate must be a bool, got 1"),
        (lambda: cell(query[:, :3], query, keys), TypeError, "AttentionLSTMCell: state must be a pair of Tensors"),
        (lambda: cell(query[:, :3], (query, None), keys), TypeError, "AttentionLSTMCell: state[1] must be a Tensor"),
        (lambda: cell(query[:, :3], (keys, query), keys), ValueError, "AttentionLSTMCell: state[0] must be (B, hid"),
        (lambda: cell(query, state, keys), ValueError, "AttentionLSTMCell: input must be (B, input_size) with input_s"),
    ]  # fmt: skip
    for call, error, message in calls:
        with pytest.raises(error, match="^" + re.escape(message)):
            call()


def test_public_names() -> None:
    assert {"additive_attention", "AdditiveAttention", "AttentionLSTMCell"} <= set(recattn_kernels.__all__)


@pytest.mark.parametrize("backend", ["cpp", pytest.param("triton", marks=pytest.mark.interpret)])
def test_a_mask_takes_out_any_gradient(backend: str) -> None:
    """As torch's relu does in its backward: times 0 it would be NaN."""
    args = arguments()
    dcontext = torch.ones(B, D)
    dcontext[1] = float("inf")
    got, want = (
        torch.autograd.grad(additive_attention(*args, activation="relu", backend=name), args[:3], dcontext)
        for name in (backend, "reference")
    )
    assert (want[1][1] == 0).any() and want[1][1].isnan().any()
    torch.testing.assert_close(got, want, equal_nan=True)
