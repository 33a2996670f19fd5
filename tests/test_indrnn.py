"""What indrnn() promises in its docstring, checked against loops written here and against torch.nn."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import recattn_kernels
from recattn_kernels import indrnn

BACKENDS = [
    "reference",
    "cpp",
    pytest.param("triton", marks=pytest.mark.interpret),
]
ACT = {
    "relu": torch.relu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "identity": lambda v: v,
    "leaky_relu": lambda v: torch.nn.functional.leaky_relu(v, 0.3),
    "relu6": torch.nn.functional.relu6,
    "hardtanh": torch.nn.functional.hardtanh,
}


def numbers(T: int = 7, B: int = 3, H: int = 5) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return torch.randn(T, B, H), torch.rand(H) * 2 - 1, torch.randn(B, H), torch.randn(H)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("activation", ACT)
def test_equals_the_equation(backend: str, activation: str) -> None:
    x, u, h0, bias = (t.requires_grad_() for t in numbers())
    output, h_n = indrnn(x, u, h0, bias=bias, activation=activation, negative_slope=0.3, backend=backend)
    h, expected = h0, []
    for x_t in x:
        h = ACT[activation](x_t + bias + u * h)
        expected.append(h)
    torch.testing.assert_close(output, torch.stack(expected))
    torch.testing.assert_close(h_n, h)
    weight = torch.randn_like(output)
    got = torch.autograd.grad((output * weight).sum() + h_n.square().sum(), (x, u, h0, bias))
    want = torch.autograd.grad((torch.stack(expected) * weight).sum() + h.square().sum(), (x, u, h0, bias))
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("backend", BACKENDS)
def test_equals_torch_rnn_with_a_diagonal_recurrence(backend: str) -> None:
    rnn = torch.nn.RNN(4, 6, nonlinearity="relu")
    u = torch.rand(6)
    with torch.no_grad():
        rnn.weight_hh_l0.copy_(torch.diag(u))
        rnn.bias_hh_l0.zero_()
    x, h0 = torch.randn(9, 3, 4), torch.randn(3, 6)
    output, h_n = indrnn(x @ rnn.weight_ih_l0.T, u, h0, bias=rnn.bias_ih_l0, backend=backend)
    expected, expected_n = rnn(x, h0[None])
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(h_n, expected_n[0])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reverse", [False, True])
def test_lengths_equal_the_rows_alone(backend: str, reverse: bool) -> None:
    x, u, h0, bias = numbers()
    lengths = [4, 0, 7]
    output, h_n = indrnn(x, u, h0, bias=bias, lengths=lengths, reverse=reverse, activation="tanh", backend=backend)
    for b, n in enumerate(lengths):
        row = x[:n, b : b + 1].flip(0) if reverse else x[:n, b : b + 1]
        alone, last = indrnn(row, u, h0[b : b + 1], bias=bias, activation="tanh", backend="reference")
        torch.testing.assert_close(output[:n, b], (alone.flip(0) if reverse else alone)[:, 0])
        assert output[n:, b].eq(0).all()
        torch.testing.assert_close(h_n[b], last[0])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reverse", [False, True])
def test_reset_starts_again_from_zeros(backend: str, reverse: bool) -> None:
    x, u, h0, _ = numbers()
    reset = torch.zeros(7, 3, dtype=torch.bool)
    reset[3] = True
    h0.requires_grad_()
    output, h_n = indrnn(x, u, h0, reset=reset, reverse=reverse, activation="tanh", backend=backend)
    after = x[:4].flip(0) if reverse else x[3:]
    alone, last = indrnn(after, u, activation="tanh", backend="reference")
    torch.testing.assert_close(output[:4].flip(0) if reverse else output[3:], alone)
    torch.testing.assert_close(h_n, last)
    (grad,) = torch.autograd.grad(h_n.sum(), h0)
    assert grad.eq(0).all(), "a reset cuts the gradient"


@pytest.mark.parametrize("backend", BACKENDS)
def test_grad_clip_clamps_each_step(backend: str) -> None:
    x, u, h0, _ = numbers(T=6)
    h0.requires_grad_()
    x.requires_grad_()
    output, _ = indrnn(x, u, h0, activation="identity", grad_clip=0.5, backend=backend)
    dy = torch.randn_like(output) * 3
    dx, dh0 = torch.autograd.grad(output, (x, h0), dy)
    flow = torch.zeros_like(h0)
    for t in range(5, -1, -1):
        g = (dy[t] + flow).clamp(-0.5, 0.5)
        torch.testing.assert_close(dx[t], g)
        flow = u * g
    torch.testing.assert_close(dh0, flow)  # what flows out of the last step is not clamped


@pytest.mark.parametrize("backend", BACKENDS)
def test_batch_first_equals_the_transpose(backend: str) -> None:
    x, u, h0, bias = numbers()
    reset = torch.rand(7, 3) < 0.3
    options = {"bias": bias, "lengths": [7, 2, 5], "activation": "tanh", "backend": backend}
    output, h_n = indrnn(x, u, h0, reset=reset, **options)
    swapped = x.transpose(0, 1).contiguous()
    output_b, h_n_b = indrnn(swapped, u, h0, reset=reset.T, batch_first=True, **options)
    torch.testing.assert_close(output_b, output.transpose(0, 1))
    torch.testing.assert_close(h_n_b, h_n)
    assert output_b.is_contiguous()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("sizes", [(0, 3, 5), (4, 0, 5), (4, 3, 0), (0, 0, 0)])
def test_empty_sizes_return_the_initial_state(backend: str, sizes: tuple[int, int, int]) -> None:
    x, u, h0, bias = (t.requires_grad_() for t in numbers(*sizes))
    output, h_n = indrnn(x, u, h0, bias=bias, activation="tanh", backend=backend)
    assert output.shape == sizes
    if sizes[0] == 0:
        assert h_n.equal(h0)
    assert h_n.data_ptr() != h0.data_ptr() or h0.numel() == 0
    grads = torch.autograd.grad(output.sum() + h_n.sum(), (x, u, h0, bias))
    assert all(g.isfinite().all() for g in grads)
    assert [g.shape for g in grads] == [t.shape for t in (x, u, h0, bias)]


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_and_infinity_stay_in_their_column(backend: str) -> None:
    x, u, _, _ = numbers()
    x[2, 1, 3], x[2, 0, 0] = float("nan"), float("inf")
    for activation in ACT:
        output, _ = indrnn(x, u, activation=activation, backend=backend)
        bad = ~output.isfinite()
        assert output[2:, 1, 3].isnan().all(), activation
        bad[2:, 1, 3] = bad[2:, 0, 0] = False
        assert not bad.any(), activation


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("algorithm", ["sequential", "scan"])
@pytest.mark.parametrize("activation", ["relu", "relu6", "hardtanh"])
def test_a_mask_takes_out_any_gradient(backend: str, algorithm: str, activation: str) -> None:
    """As torch's backward does: times 0 it would be NaN."""
    if (backend, algorithm) == ("cpp", "scan"):
        pytest.skip("the CPU has one algorithm")
    x, u, h0, _ = (t.requires_grad_() for t in numbers(T=40))
    weight = torch.randn(40, 3, 5)
    weight[20, 0], weight[20, 1], weight[30, 2, 2] = float("inf"), float("nan"), -float("inf")
    options = {"algorithm": algorithm} if algorithm == "scan" else {}
    output, _ = indrnn(x, u, h0, activation=activation, backend=backend, **options)
    h, expected = h0, []
    for x_t in x:
        h = ACT[activation](x_t + u * h)
        expected.append(h)
    got = torch.autograd.grad(output, (x, u, h0), weight)
    want = torch.autograd.grad(torch.stack(expected), (x, u, h0), weight)
    assert (want[0][20, :2] == 0).any()
    torch.testing.assert_close(got, want, equal_nan=True)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_final_state_and_gradients_have_their_inputs_dtypes(backend: str, dtype: torch.dtype) -> None:
    x, u, h0, bias = numbers()
    x = x.to(dtype).requires_grad_()
    output, h_n = indrnn(x, u.to(dtype), backend=backend)
    assert output.dtype == h_n.dtype == dtype
    u, h0, bias = (t.requires_grad_() for t in (u, h0, bias))
    output, h_n = indrnn(x, u, h0, bias=bias, backend=backend)
    assert output.dtype == dtype
    assert h_n.dtype == torch.float32
    grads = torch.autograd.grad(output.float().sum() + h_n.sum(), (x, u, h0, bias))
    assert [g.dtype for g in grads] == [dtype, torch.float32, torch.float32, torch.float32]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("activation", "near"), [("relu6", 5.9999), ("hardtanh", 0.99999), ("hardtanh", -0.99999)])
def test_rounding_does_not_saturate(backend: str, dtype: torch.dtype, activation: str, near: float) -> None:
    """Just inside its bound an activation has derivative 1, also where a 16-bit output would round onto the bound."""
    h0 = torch.full((1, 4), near)
    x, u = torch.zeros(1, 1, 4, dtype=dtype, requires_grad=True), torch.ones(4)
    output, _ = indrnn(x, u, h0, activation=activation, backend=backend)
    (grad,) = torch.autograd.grad(output.sum(), x)
    assert grad.eq(1).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_small_positive_half_keeps_its_gradient(backend: str) -> None:
    h0 = torch.full((1, 4), 1e-8)
    x = torch.zeros(1, 1, 4, dtype=torch.float16, requires_grad=True)
    output, _ = indrnn(x, torch.ones(4), h0, backend=backend)
    assert torch.autograd.grad(output.sum(), x)[0].eq(1).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_one_output_used(backend: str) -> None:
    x, u, h0, _ = numbers()
    x.requires_grad_()
    expected = torch.autograd.grad(indrnn(x, u, h0, backend="reference")[1].sum(), x)
    torch.testing.assert_close(torch.autograd.grad(indrnn(x, u, h0, backend=backend)[1].sum(), x), expected)
    expected = torch.autograd.grad(indrnn(x, u, h0, backend="reference")[0].sum(), x)
    torch.testing.assert_close(torch.autograd.grad(indrnn(x, u, h0, backend=backend)[0].sum(), x), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_lazily_negated_tensor_is_read_as_its_values(backend: str) -> None:
    """The imaginary part of a conjugate is a view whose memory holds the opposite sign."""
    x, u, h0, _ = numbers()
    lazy = torch.complex(x, x).conj().imag
    assert lazy.is_neg()
    lazy_u = torch.complex(u, u).conj().imag
    for activation in ("relu", "identity"):
        output, _ = indrnn(lazy, lazy_u, h0, activation=activation, backend=backend)
        expected, _ = indrnn(-x, -u, h0, activation=activation, backend="reference")
        torch.testing.assert_close(output, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_runs_are_bitwise_equal(backend: str) -> None:
    x, u, h0, bias = (t.requires_grad_() for t in numbers(9, 33, 40))
    runs = []
    for _ in range(2):
        output, h_n = indrnn(x, u, h0, bias=bias, activation="tanh", backend=backend)
        runs.append((output, h_n, *torch.autograd.grad(output.square().sum(), (x, u, h0, bias))))
    assert all(a.equal(b) for a, b in zip(*runs, strict=True))


def test_the_reference_backward_is_linear_in_time() -> None:
    """The number of autograd nodes and saved bytes grows with T, not with its square."""

    def saved(T: int) -> int:
        total = 0

        def pack(t: Tensor) -> Tensor:
            nonlocal total
            total += t.numel()
            return t

        x, u, _, _ = numbers(T)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            output, _ = indrnn(x.requires_grad_(), u, backend="reference")
        grads: list[int] = []
        node, seen = [output.grad_fn], set()
        while node:
            fn = node.pop()
            if fn is None or fn in seen:
                continue
            seen.add(fn)
            grads.append(1)
            node += [parent for parent, _ in fn.next_functions]
        names = {type(fn).__name__ for fn in seen}
        assert not names & {"SelectBackward0", "SliceBackward0", "CopySlices", "IndexPutBackward0"}, names
        return total + len(grads)

    assert saved(64) < 2.2 * saved(32)


@pytest.mark.parametrize("capability", getattr(recattn_kernels.backends.extension("_cpu"), "capabilities", tuple)())
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_every_instruction_set_agrees(capability: str, dtype: torch.dtype) -> None:
    """The binary holds a kernel for each; the machine's widest is what all other tests run."""
    cpu = recattn_kernels.backends.extension("_cpu")
    widest = cpu.capability()
    x, u, h0, bias = numbers(9, 3, 71)
    x, u, h0, bias = (t.to(dtype).requires_grad_() for t in (x, u, h0, bias))

    def run() -> list[Tensor]:
        results = []
        for activation in ACT:
            output, h_n = indrnn(x, u, h0, bias=bias, activation=activation, backend="cpp")
            loss = output.float().square().sum() + h_n.float().sum()
            results += [output, h_n, *torch.autograd.grad(loss, (x, u, h0, bias))]
        return results

    expected = run()
    try:
        cpu.set_capability(capability)
        torch.testing.assert_close(run(), expected)
    finally:
        cpu.set_capability(widest)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_the_number_of_threads_changes_no_bit(threads: int) -> None:
    before = torch.get_num_threads()
    x, u, h0, bias = (t.requires_grad_() for t in numbers(17, 40, 130))

    def run() -> tuple[Tensor, ...]:
        output, h_n = indrnn(x, u, h0, bias=bias, activation="tanh", backend="cpp")
        return output, h_n, *torch.autograd.grad(output.square().sum() + h_n.sum(), (x, u, h0, bias))

    expected = run()
    try:
        torch.set_num_threads(threads)
        assert all(a.equal(b) for a, b in zip(run(), expected, strict=True))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(("function", "ulp"), [("tanh", 4), ("sigmoid", 4)])
def test_activations_are_accurate_to_a_few_ulp(function: str, ulp: int) -> None:
    """Of the float32 result, from 1e-30 to beyond saturation on both sides."""
    magnitude = torch.cat([torch.logspace(-30, 2, 20001), torch.linspace(0.01, 20, 20001)])
    x = torch.cat([magnitude, -magnitude])
    if function == "sigmoid":
        x = x[x > -80]  # below, the result leaves float32's normal range
    got = indrnn(x.view(1, 1, -1), torch.zeros(x.shape), activation=function, backend="cpp")[0].flatten()
    exact = getattr(torch, function)(x.double())
    spacing = torch.nextafter(exact.float().abs(), torch.tensor(float("inf"))) - exact.float().abs()
    worst = ((got.double() - exact).abs() / spacing).max()
    assert worst <= ulp, f"{worst:.2f} ulp"


def test_activations_at_the_ends() -> None:
    ends = torch.tensor([float("inf"), -float("inf"), 1e38, -1e38, 0.0])
    got = indrnn(ends.view(1, 1, -1), torch.zeros(5), activation="tanh", backend="cpp")[0].flatten()
    assert got.equal(torch.tanh(ends))
    got = indrnn(ends.view(1, 1, -1), torch.zeros(5), activation="sigmoid", backend="cpp")[0].flatten()
    torch.testing.assert_close(got, torch.sigmoid(ends), rtol=0, atol=2e-38)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_conversions_are_exact(dtype: torch.dtype) -> None:
    """Every 16-bit value survives load and store; sums round to nearest, ties to even, as torch's."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    zeros = torch.zeros(every.shape, dtype=torch.float32)
    got = indrnn(every.view(1, 1, -1), zeros, activation="identity", backend="cpp")[0].flatten()
    finite = ~every.isnan()
    assert got[finite].eq(every[finite]).all()
    assert got.isnan().equal(every.isnan())
    bias = torch.randn(every.shape) * every.float().abs().clamp(1e-7, 1e4).nan_to_num(1.0) * 0.01
    got = indrnn(every.view(1, 1, -1), zeros, bias=bias, activation="identity", backend="cpp")[0].flatten()
    expected = (every.float() + bias).to(dtype)
    assert got[finite].equal(expected[finite])
