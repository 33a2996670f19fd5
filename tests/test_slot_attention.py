"""slot_attention beyond its samples: what masks, eps, heads and absent values mean, and that nothing large is kept."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from test_conformance import judge
from torch import Tensor

from recattn_kernels import backends, conformance, slot_attention
from recattn_kernels.bench.memory import peak_bytes
from recattn_kernels.ops.slot_attention.api import normalise
from recattn_kernels.ops.slot_attention.contract import BACKENDS
from recattn_kernels.ops.slot_attention.spec import SPEC, sample

CPU_BACKENDS = ["reference", "cpp"]
Q, K, V = torch.randn(2, 3, 4), torch.randn(2, 5, 4), torch.randn(2, 5, 6)


def randn(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype).requires_grad_()


def grads(output: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    outputs = output if isinstance(output, tuple) else (output,)
    generator = torch.Generator().manual_seed(1)
    flow = [torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o.dtype) for o in outputs]
    return torch.autograd.grad(outputs, inputs, flow)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("eps_mode", ["add", "denominator"])
def test_is_the_published_formula(backend: str, eps_mode: str) -> None:
    q, k, v = randn(2, 3, 4), randn(2, 50, 4), randn(2, 50, 6)
    attn = torch.einsum("bnd,bkd->bnk", k, q * 4**-0.5).softmax(-1)
    if eps_mode == "add":
        weights = (attn + 1e-3) / (attn + 1e-3).sum(1, keepdim=True)
    else:
        weights = attn / (attn.sum(1, keepdim=True) + 1e-3)
    expected = torch.einsum("bnk,bnd->bkd", weights, v), attn.transpose(1, 2)
    got = slot_attention(q, k, v, eps=1e-3, eps_mode=eps_mode, return_attn=True, backend=backend)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(grads(got, (q, k, v)), grads(expected, (q, k, v)))


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_heads(backend: str) -> None:
    """Apart, each head is a call of its own; jointly, their slots are those of one call on a block-diagonal query."""
    q, k, v, bias = randn(2, 3, 4, 5), randn(2, 3, 70, 5), randn(2, 3, 70, 6), randn(2, 3, 4)
    got = slot_attention(q, k, v, bias=bias, backend=backend)
    apart = [slot_attention(q[:, h], k[:, h], v[:, h], bias=bias[:, h], backend=backend) for h in range(3)]
    torch.testing.assert_close(got, torch.stack(apart, 1))

    updates, attn = slot_attention(q, k, v, bias=bias, head_softmax="joint", return_attn=True, backend=backend)
    blocks = torch.stack([torch.block_diag(*heads) for heads in q])  # (B, heads * K, heads * D)
    wide_k, wide_v = (t.transpose(1, 2).flatten(-2) for t in (k, v))
    one, one_attn = slot_attention(
        blocks, wide_k, wide_v, scale=5**-0.5, bias=bias.flatten(1), return_attn=True, backend=backend
    )  # fmt: skip
    torch.testing.assert_close(attn, one_attn.view(attn.shape))
    torch.testing.assert_close(updates, torch.stack([one.view(2, 3, 4, 3, 6)[:, h, :, h] for h in range(3)], 1))


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_values_that_are_the_keys(backend: str) -> None:
    q, k = randn(2, 3, 4), randn(2, 70, 4)
    results = [slot_attention(q, k, *v, backend=backend) for v in ((), (k,), (k.clone(),))]
    found = [grads(result, (q, k)) for result in results]
    for result, grad in zip(results[1:], found[1:], strict=True):
        torch.testing.assert_close(result, results[0])
        torch.testing.assert_close(grad, found[0])
    assert normalise(q, k, k).inputs[2] is None


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("eps_mode", ["add", "denominator"])
def test_a_mask_is_as_if_the_rest_were_not_there(backend: str, eps_mode: str) -> None:
    q, k, v, bias = randn(3, 5, 4), randn(3, 150, 4), randn(3, 150, 6), randn(3, 5)
    slots, inputs = torch.rand(3, 5) < 0.6, torch.rand(3, 150) < 0.6
    slots[:, 0] = inputs[:, 0] = True
    options: dict[str, Any] = {"eps": 0.1, "eps_mode": eps_mode, "backend": backend, "return_attn": True}
    updates, attn = slot_attention(q, k, v, bias=bias, slot_mask=slots, input_mask=inputs, **options)
    found = grads((updates, attn), (q, k, v, bias))
    flow = grads((updates, attn), (updates, attn))
    for b in range(3):
        s, n = slots[b], inputs[b]
        few = tuple(t.detach().requires_grad_() for t in (q[b, s], k[b, n], v[b, n], bias[b, s]))
        u, a = slot_attention(*(t[None] for t in few[:3]), bias=few[3][None], **options)
        torch.testing.assert_close(updates[b, s], u[0])
        torch.testing.assert_close(attn[b, s][:, n], a[0])
        assert not updates[b, ~s].any()
        assert not attn[b, ~s].any()
        assert not attn[b, :, ~n].any()
        expected = torch.autograd.grad((u, a), few, (flow[0][b, s][None], flow[1][b, s][:, n][None]))
        for grad, kept, e in zip(found, (s, n, n, s), expected, strict=True):
            torch.testing.assert_close(grad[b, kept], e)
            assert not grad[b, ~kept].any()


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("eps_mode", ["add", "denominator"])
@pytest.mark.parametrize("masked", ["slots", "inputs"])
def test_all_masked_is_zero(backend: str, eps_mode: str, masked: str) -> None:
    q, k, v, bias = randn(2, 3, 4), randn(2, 5, 4), randn(2, 5, 6), randn(2, 3)
    mask = {"slot_mask": torch.tensor([[False] * 3, [True] * 3])}
    if masked == "inputs":
        mask = {"input_mask": torch.tensor([[False] * 5, [True] * 5])}
    output = slot_attention(q, k, v, bias=bias, eps=0.0, eps_mode=eps_mode, return_attn=True, backend=backend, **mask)
    for t in (*output, *grads(output, (q, k, v, bias))):
        assert not t[0].any()
        assert t[1].isfinite().all()
        assert t[1].any()


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_slot_that_wins_nothing_takes_the_mean(backend: str, dtype: torch.dtype) -> None:
    """In float16 too, whose smallest number is above eps."""
    q, k, v = torch.zeros(1, 2, 4), torch.full((1, 300, 4), 5.0), torch.randn(1, 300, 6)
    q[:, 0] = 10.0
    q, k, v = (t.to(dtype).requires_grad_() for t in (q, k, v))
    updates = slot_attention(q, k, v, backend=backend)
    torch.testing.assert_close(updates, v.mean(1, keepdim=True).expand_as(updates))
    for grad in grads(updates, (q, k, v)):
        assert grad.isfinite().all()


@pytest.mark.parametrize("capability", ["x86-64", "avx2", "avx512", "generic"])
def test_every_instruction_set_and_number_of_threads(capability: str) -> None:
    """The same bits for any number of threads; whole and partial vectors, and many slots of many columns."""
    cpu = backends.extension("_cpu")
    assert not isinstance(cpu, str)
    if capability not in cpu.capabilities():
        pytest.skip(f"this machine has not {capability}")
    before, threads = cpu.capability(), torch.get_num_threads()
    try:
        for shape in ((2, 3, 1100, 64), (1, 200, 130, 600), (3, 9, 70, 33)):
            B, slots, N, D = shape
            q, k, v = randn(B, slots, D), randn(B, N, D), randn(B, N, D + 1)
            expected = slot_attention(q, k, v, backend="reference")
            expected_grads = grads(expected, (q, k, v))
            cpu.set_capability(capability)
            results = []
            for n in (1, 2, 3):
                torch.set_num_threads(n)
                output = slot_attention(q, k, v, backend="cpp")
                results.append((output, *grads(output, (q, k, v))))
            torch.testing.assert_close(results[0], (expected, *expected_grads))
            for result in results[1:]:
                assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))
    finally:
        cpu.set_capability(before)
        torch.set_num_threads(threads)


def test_nothing_of_the_size_of_the_attention_is_kept() -> None:
    q, k, v = (randn(2, n, 8, dtype=torch.float32) for n in (64, 4096, 4096))
    inputs = sum(t.nbytes for t in (q, k, v))

    def run() -> None:
        torch.autograd.grad(slot_attention(q, k, v, backend="cpp").sum(), (q, k, v))

    run()
    assert peak_bytes(run, "cpu") < 1.2 * inputs < 2 * 64 * 4096 * 4


BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"q": [1.0]}, TypeError, "q must be a Tensor, got list"),
    ({"q": Q[0]}, ValueError, "q must be (B, K, D) or (B, heads, K, D), got (3, 4)"),
    ({"q": Q.long()}, TypeError, "q must be float64 or float32 or bfloat16 or float16, got int64"),
    ({"k": None}, TypeError, "k must be a Tensor, got NoneType"),
    ({"k": K[0]}, ValueError, "k must be (B, N, D), got (5, 4)"),
    ({"q": Q[:, None]}, ValueError, "k must be (B, heads, N, D), got (2, 5, 4)"),
    ({"k": K[..., :3]}, ValueError, "k must be (B, N, D) = (2, 5, 4), got (2, 5, 3)"),
    ({"k": K.double()}, TypeError, "k must be float32, got float64"),
    ({"q": Q.half(), "k": K.bfloat16()}, TypeError, "k must be float16 or float32, got bfloat16"),
    ({"k": K.to("meta")}, ValueError, "k must be on cpu as q is, got meta"),
    ({"v": V[:, :4]}, ValueError, "v must be (B, N, Dv) = (2, 5, 6), got (2, 4, 6)"),
    ({"bias": torch.zeros(3)}, ValueError, "bias must be (B, K) = (2, 3), got (3,)"),
    ({"slot_mask": torch.ones(2, 3)}, TypeError, "slot_mask must be bool, got float32"),
    ({"slot_mask": torch.ones(2, 5).bool()}, ValueError, "slot_mask must be (B, K) = (2, 3), got (2, 5)"),
    ({"input_mask": torch.ones(2, 5).int()}, TypeError, "input_mask must be bool, got int32"),
    ({"input_mask": torch.ones(5).bool()}, ValueError, "input_mask must be (B, N) = (2, 5), got (5,)"),
    ({"scale": "1"}, TypeError, "scale must be a number, got '1'"),
    ({"scale": float("nan")}, ValueError, "scale must not be NaN"),
    ({"eps": -1e-8}, ValueError, "eps must be at least 0, got -1e-08"),
    ({"eps_mode": "none"}, ValueError, "eps_mode must be one of add, denominator, got 'none'"),
    ({"head_softmax": "heads"}, ValueError, "head_softmax must be one of slots, joint, got 'heads'"),
    ({"return_attn": 1}, TypeError, "return_attn must be a bool, got 1"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD, ids=[str(i) for i in range(len(BAD))])
def test_bad_argument(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = {"q": Q, "k": K, "v": V, **change}
    with pytest.raises(error, match="^slot_attention: " + re.escape(message)):
        slot_attention(arguments.pop("q"), arguments.pop("k"), arguments.pop("v"), **arguments)


@pytest.mark.interpret
def test_more_joint_slots_than_a_program_takes() -> None:
    """What the heads share is computed first, and its gradient too."""
    masks: dict[str, Any] = {"bias": True, "slot_mask": True, "input_mask": True, "return_attn": True}
    for joint in (
        sample("everything", 2, 17, 40, 17, 9, heads=2, scale=0.3, eps=1e-3, head_softmax="joint", **masks),
        sample("k_alone", 1, 17, 33, 70, heads=2, eps=1e-2, eps_mode="denominator", head_softmax="joint"),
    ):
        for dtype in (torch.float32, torch.bfloat16)[: 2 if joint.name == "everything" else 1]:
            judge(conformance.compare(SPEC, joint, "triton", dtype))


def test_what_triton_refuses() -> None:
    refusal = BACKENDS["triton"]
    assert refusal(normalise(Q, K, V)) is None
    assert "float64" in str(refusal(normalise(Q.double(), K.double())))
    assert refusal(normalise(torch.zeros(1, 128, 512), torch.zeros(1, 3, 512))) is None
    assert "K must be at most 128, got 129" in str(refusal(normalise(torch.zeros(1, 129, 4), torch.zeros(1, 3, 4))))
    for heads, slots, message in ((1, 128, None), (9, 64, None), (2, 65, "at most 64 where heads compete together")):
        joint = normalise(torch.zeros(1, heads, slots, 4), torch.zeros(1, heads, 3, 4), head_softmax="joint")
        assert (refusal(joint) is None) if message is None else (message in str(refusal(joint)))
    assert "at most 512, got 513" in str(refusal(normalise(torch.zeros(1, 2, 513), torch.zeros(1, 3, 513))))
