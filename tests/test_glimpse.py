"""glimpse beyond the registry's samples: against OpenCV, F.grid_sample and restatements of other projects' retinas."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from recattn_kernels import glimpse, registry
from recattn_kernels.ops.glimpse import contract
from recattn_kernels.ops.glimpse.api import normalise

Array = NDArray[Any]
BACKENDS = ("reference", "cpp")
# What the registry's samples, which show every behaviour, do not need again.
assert "everything" in [sample.name for sample in registry.find("glimpse").samples]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


# Area


@pytest.mark.parametrize(("rows", "size"), [(24, (8, 8)), (30, (8, 12)), (19, (7, 7)), (64, (9, 9))])
@pytest.mark.parametrize("dtype", [np.float32, np.uint8])
def test_area_is_opencvs(backend: str, rows: int, size: tuple[int, int], dtype: Any) -> None:
    """A window on whole pixels, at whole and at fractional factors."""
    side = (rows, rows * size[1] // size[0])
    generator = np.random.default_rng(0)
    image = generator.integers(0, 256, (80, 90, 2)).astype(dtype)
    top, left = 11, 17
    window = image[top : top + side[0], left : left + side[1]].astype(np.float32)
    expected = cv2.resize(window, size[::-1], interpolation=cv2.INTER_AREA)
    loc = [(left + side[1] / 2) / 90 * 2 - 1, (top + side[0] / 2) / 80 * 2 - 1]
    out = glimpse(
        torch.from_numpy(image).permute(2, 0, 1)[None], torch.tensor([loc], dtype=torch.float32), size,
        zoom=side[0] / size[0], backend=backend,
    )  # fmt: skip
    assert out.dtype == torch.float32
    # OpenCV's own weights are float32, and loc rounds the corner to some 1e-5 of a pixel.
    torch.testing.assert_close(out[0, 0].permute(1, 2, 0), torch.from_numpy(expected), rtol=1e-5, atol=5e-3)


def test_the_mean_of_whole_pixels_is_exact(backend: str) -> None:
    image = torch.arange(64.0).view(1, 1, 8, 8)
    out = glimpse(image, torch.zeros(1, 2), 4, scales=2, backend=backend)
    assert torch.equal(out[0, 0, 0], image[0, 0, 2:6, 2:6])
    assert torch.equal(out[0, 1], F.avg_pool2d(image, 2)[0])


@pytest.mark.parametrize("side", [3, 17, 70])
@pytest.mark.parametrize("size", [1, (5, 17), (12, 33)])
def test_windows_that_double(side: int, size: int | tuple[int, int]) -> None:
    """Cells of 1, 2, 4, 8 and 16 pixels, whose windows lie inside the image, across its edges, and around all of it."""
    generator = torch.Generator().manual_seed(side)
    image = torch.randn(3, 2, side, side + 2, generator=generator).requires_grad_()
    loc = (torch.rand(3, 4, 2, generator=generator) * 2 - 1) * 1.3
    loc[0] = (loc[0] * 8).round() / 8  # some cells' edges on those of pixels
    out = glimpse(image, loc, size, scales=5, backend="cpp")
    grad_out = torch.randn(out.shape, generator=generator)
    (grad,) = torch.autograd.grad(out, image, grad_out)
    exact_image = image.detach().double().requires_grad_()
    exact = glimpse(exact_image, loc.double(), size, scales=5, backend="reference")
    (exact_grad,) = torch.autograd.grad(exact, exact_image, grad_out.double())
    torch.testing.assert_close(out, exact.float(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(grad, exact_grad.float(), rtol=1e-5, atol=1e-5)


def test_the_derivative_on_the_grid_is_the_one_to_the_right(backend: str) -> None:
    """Every edge falls on a pixel's. On a ramp both sides agree: to count both would double it."""
    image = torch.arange(8.0).expand(1, 1, 8, 8)
    loc = torch.zeros(1, 2, requires_grad=True)
    (grad,) = torch.autograd.grad(glimpse(image, loc, 4, backend=backend).sum(), loc)
    assert torch.equal(grad, torch.tensor([[16 * 8 / 2, 0.0]]))


# Bilinear


@pytest.mark.parametrize("padding", ["zeros", "border", "reflect"])
def test_bilinear_is_grid_samples(backend: str, padding: str) -> None:
    image = torch.randn(3, 2, 11, 17, dtype=torch.float64, requires_grad=True)
    loc = (torch.rand(3, 2, dtype=torch.float64) * 3 - 1.5).requires_grad_()
    zoom, (gh, gw) = 1.7, (5, 6)
    out = glimpse(image, loc, (gh, gw), zoom=zoom, mode="bilinear", padding=padding, backend=backend)[:, 0]
    x = loc[:, 0, None] + (torch.arange(gw).double() + 0.5 - gw / 2) * zoom * 2 / 17
    y = loc[:, 1, None] + (torch.arange(gh).double() + 0.5 - gh / 2) * zoom * 2 / 11
    grid = torch.stack([x[:, None, :].expand(3, gh, gw), y[:, :, None].expand(3, gh, gw)], -1)
    name = "reflection" if padding == "reflect" else padding
    expected = F.grid_sample(image, grid, padding_mode=name, align_corners=False)
    torch.testing.assert_close(out, expected)
    flow = torch.randn_like(out)
    torch.testing.assert_close(
        torch.autograd.grad(out, (image, loc), flow), torch.autograd.grad(expected, (image, loc), flow)
    )


# Compatible retinas, restated


def cut(image: Array, top: int, left: int, n: int) -> Array:
    """n x n pixels of (C, H, W), zero outside."""
    C, H, W = image.shape
    window = np.zeros((C, n, n), image.dtype)
    for y in range(n):
        for x in range(n):
            if 0 <= top + y < H and 0 <= left + x < W:
                window[:, y, x] = image[:, top + y, left + x]
    return window


def pooled(window: Array, g: int) -> Array:
    C, n, _ = window.shape
    q = n // g
    total = np.zeros((C, g, g), np.float32)
    for i in range(q):
        for j in range(q):
            part = window[:, i::q, j::q]
            total = part.copy() if i == j == 0 else total + part
    return total / np.float32(q * q)


def kevinzakka(image: Array, loc: Array, g: int, scales: int) -> list[Array]:
    H, n, found = image.shape[1], g, []
    for _ in range(scales):
        x, y = (int(np.floor(np.float32(0.5) * ((v + np.float32(1)) * np.float32(H)))) for v in loc)
        found.append(pooled(cut(image, y - n // 2, x - n // 2, n), g))
        n = int(2.0 * n)
    return found


def extract_glimpse(image: Array, loc: Array, g: int, scales: int) -> list[Array]:
    starts = []
    for o, N in zip(loc, image.shape[:0:-1], strict=True):
        starts.append(int(np.trunc(o * np.float32(N) / np.float32(2) + np.float32(N / 2) - np.float32(g / 2))))
    return [cut(image, starts[1], starts[0], g)]


def dpnn(image: Array, loc: Array, g: int, scales: int) -> list[Array]:
    found = []
    for s in range(scales):
        n = g * 2**s
        p, starts = (n - 1) // 2, []
        for v, N in zip(loc, image.shape[:0:-1], strict=True):
            room = np.float32(N + 2 * p - n)
            starts.append(int(np.floor(np.clip((v + np.float32(1)) / np.float32(2) * room, 0, room))) - p)
        found.append(pooled(cut(image, starts[1], starts[0], n), g))
    return found


RETINAS: dict[str, Callable[[Array, Array, int, int], list[Array]]] = {
    "kevinzakka": kevinzakka, "tf": extract_glimpse, "dpnn": dpnn,
}  # fmt: skip


@pytest.mark.parametrize("mode", RETINAS)
@pytest.mark.parametrize("g", [4, 5])
def test_compatible_modes_to_the_bit(backend: str, mode: str, g: int) -> None:
    image = torch.randn(6, 2, 21, 18)
    loc = torch.rand(6, 2) * 2.4 - 1.2
    loc[0] = 0
    scales = 1 if mode == "tf" else 3
    pairs = zip(image.numpy(), loc.numpy(), strict=True)
    expected = np.stack([np.stack(RETINAS[mode](*pair, g, scales)) for pair in pairs])
    out = glimpse(image, loc, g, scales=scales, mode=mode, backend=backend)
    assert torch.equal(out, torch.from_numpy(expected))
    yx = glimpse(image.to(memory_format=torch.channels_last), loc.flip(1), g, scales=scales, mode=mode, coords="yx",
                 backend=backend)  # fmt: skip
    assert torch.equal(yx, out)


# Types and layouts


def test_bytes_are_read_as_they_are() -> None:
    image = torch.randint(0, 256, (2, 3, 40, 50), dtype=torch.uint8)
    loc = torch.rand(2, 3, 2) * 2 - 1
    out = glimpse(image, loc, 9, scales=3, backend="cpp")
    assert torch.equal(out, glimpse(image.float(), loc, 9, scales=3, backend="cpp"))
    sixteen = glimpse(image, loc, 9, scales=3, dtype=torch.bfloat16, backend="cpp")
    assert torch.equal(sixteen, out.bfloat16())


def test_bytes_give_float32(backend: str) -> None:
    """Whatever the dtype of loc; float64 is asked for by dtype."""
    image = torch.randint(0, 256, (2, 3, 40, 50), dtype=torch.uint8)
    loc = (torch.rand(2, 3, 2, dtype=torch.float64) * 2 - 1).requires_grad_()
    out = glimpse(image, loc, 9, scales=3, backend=backend)
    assert out.dtype == torch.float32
    exact = glimpse(image, loc, 9, scales=3, dtype=torch.float64, backend=backend)
    torch.testing.assert_close(exact, glimpse(image.double(), loc, 9, scales=3, backend=backend))
    torch.testing.assert_close(out, exact.float())
    flow = torch.randn_like(out)
    (grad,), (grad_exact,) = (torch.autograd.grad(o, loc, flow.to(o.dtype)) for o in (out, exact))
    torch.testing.assert_close(grad, grad_exact)


def test_layouts_do_not_matter(backend: str) -> None:
    image, loc = torch.randn(2, 3, 20, 30), torch.rand(2, 2, 2) * 2 - 1
    plain = glimpse(image, loc, 6, scales=2, backend=backend)
    for other in (
        image.to(memory_format=torch.channels_last),
        image.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
        torch.stack([image, image], -1)[..., 0],
    ):
        torch.testing.assert_close(glimpse(other, loc, 6, scales=2, backend=backend), plain)


def test_threads_do_not_change_a_bit() -> None:
    image = torch.randn(3, 2, 90, 70, requires_grad=True)
    loc = (torch.rand(3, 4, 2) * 2 - 1).requires_grad_()
    zoom = (torch.rand(3, 4) + 0.5).requires_grad_()
    flow = torch.randn(3, 4, 3, 2, 11, 13)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            out = glimpse(image, loc, (11, 13), scales=3, zoom=zoom, backend="cpp")
            results.append((out, *torch.autograd.grad(out, (image, loc, zoom), flow)))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


# Bad input


@pytest.mark.parametrize("mode", ["area", "bilinear", *RETINAS])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_bad_location_is_nan_alone(backend: str, mode: str, bad: float) -> None:
    image = torch.randn(3, 1, 12, 12, requires_grad=True)
    loc = torch.rand(3, 2, 2) - 0.5
    good = glimpse(image, loc, 4, mode=mode, backend=backend)
    loc = loc.clone()
    loc[1, 0, 1] = bad
    out = glimpse(image, loc, 4, mode=mode, backend=backend)
    assert out[1, 0].isnan().all()
    out, good = out.flatten(0, 1)[[0, 1, 3, 4, 5]], good.flatten(0, 1)[[0, 1, 3, 4, 5]]
    assert torch.equal(out, good)
    flow = torch.randn_like(out)
    torch.testing.assert_close(torch.autograd.grad(out, image, flow), torch.autograd.grad(good, image, flow))


@pytest.mark.parametrize("padding", ["zeros", "border", "reflect"])
@pytest.mark.parametrize("mode", ["area", "bilinear"])
def test_no_position_reads_elsewhere(backend: str, mode: str, padding: str) -> None:
    """Of an image of ones every mean is at most 1, wherever the window is and however large."""
    image = torch.ones(1, 1, 5, 7, requires_grad=True)
    loc = torch.tensor([[[x, y] for x in (0.0, 1e3, -1e9, 3e38) for y in (0.1, -1e7, -3e38)]])
    zoom = torch.tensor([1e-30, 1e-3, 1.0, 1e5, 1e30, 3e38]).repeat(2)[None]
    out = glimpse(image, loc, 3, scales=2, zoom=zoom, mode=mode, padding=padding, backend=backend)
    assert not (out > 1.001).any()
    assert not (out < -0.001).any()
    (grad,) = torch.autograd.grad(out.nan_to_num().sum(), image)
    assert grad.shape == image.shape
    if padding == "border" and mode == "area":
        ordinary = out[:, 2:5]  # windows of moderate cells: the edge's pixels go on for ever
        torch.testing.assert_close(ordinary, torch.ones_like(ordinary))


IMAGE, LOC = torch.randn(2, 3, 8, 9), torch.zeros(2, 2)
CASES: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"image": IMAGE[0]}, ValueError, "glimpse: image must be (B, C, H, W), got (3, 8, 9)"),
    ({"image": IMAGE.long()}, TypeError, "glimpse: image must be float64 or float32 or bfloat16 or float16 or uint8"),
    ({"loc": LOC[:1]}, ValueError, "glimpse: loc must be (B, 2) = (2, 2), got (1, 2)"),
    ({"loc": torch.zeros(2, 4, 3)}, ValueError, "glimpse: loc must be (B, 2) or (B, G, 2) with B = 2, got (2, 4, 3)"),
    ({"loc": LOC.double()}, TypeError, "glimpse: loc must be float32, got float64"),
    ({"loc": LOC.bfloat16(), "image": IMAGE.bfloat16()}, TypeError, "glimpse: loc must be float32, got bfloat16"),
    ({"loc": LOC.to("meta")}, ValueError, "glimpse: loc must be on cpu as image is, got meta"),
    ({"size": 0}, ValueError, "glimpse: size must be positive, got 0"),
    ({"size": (4, -1)}, ValueError, "glimpse: size must be positive, got (4, -1)"),
    ({"size": 2.5}, TypeError, "glimpse: size must be an int or a pair of ints (gh, gw), got 2.5"),
    ({"scales": 0}, ValueError, "glimpse: scales must be at least 1, got 0"),
    ({"scales": 1.5}, TypeError, "glimpse: scales must be an int, got 1.5"),
    ({"scale_factor": -2.0}, ValueError, "glimpse: scale_factor must be positive, got -2.0"),
    ({"scale_factor": float("nan")}, ValueError, "glimpse: scale_factor must be positive, got nan"),
    ({"scales": 2000}, ValueError, "glimpse: scales must leave cells of finite size, got 2000 with factor 2.0"),
    ({"zoom": 0.0}, ValueError, "glimpse: zoom must be positive, got 0.0"),
    ({"zoom": float("inf")}, ValueError, "glimpse: zoom must be finite, got inf"),
    ({"zoom": torch.ones(3)}, ValueError, "glimpse: zoom must be (B,) = (2,), got (3,)"),
    ({"zoom": torch.ones(())}, ValueError, "glimpse: zoom must be (B,), got ()"),
    ({"zoom": torch.ones(2, 3)}, ValueError, "glimpse: zoom must be (B, G) = (2, 1), got (2, 3)"),
    ({"zoom": torch.ones(2).double()}, TypeError, "glimpse: zoom must be float32, got float64"),
    ({"zoom": torch.ones(2).to_sparse()}, TypeError, "glimpse: zoom must be a dense Tensor"),
    ({"mode": "cubic"}, ValueError, "glimpse: mode must be one of area, bilinear, kevinzakka, tf, dpnn, got 'cubic'"),
    ({"padding": "wrap"}, ValueError, "glimpse: padding must be one of zeros, border, reflect, got 'wrap'"),
    ({"coords": "ij"}, ValueError, "glimpse: coords must be one of xy, yx, got 'ij'"),
    ({"dtype": torch.uint8}, TypeError, "glimpse: dtype must be float64 or float32 or bfloat16 or float16, got"),
    ({"mode": "tf", "scales": 2}, ValueError, "glimpse: scales must be 1 with mode='tf', got 2"),
    ({"mode": "tf", "zoom": 2.0}, ValueError, "glimpse: zoom must be 1 with mode='tf', got 2.0"),
    ({"mode": "dpnn", "padding": "border"}, ValueError, "glimpse: padding must be zeros with mode='dpnn'"),
    ({"mode": "kevinzakka", "scales": 2, "scale_factor": 1.5, "size": 5}, ValueError,
     "glimpse: scale_factor must give windows that are multiples of size with mode='kevinzakka', got a window of 7"),
    ({"image": IMAGE[:, :, :0], "padding": "border"}, ValueError, "glimpse: image must have pixels with padding"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "error", "message"), CASES, ids=[str(i) for i in range(len(CASES))])
def test_bad_argument(change: dict[str, Any], error: type[Exception], message: str, backend: str) -> None:
    arguments = {"image": IMAGE, "loc": LOC, "size": 4, "backend": backend, **change}
    with pytest.raises(error, match="^" + re.escape(message)):
        glimpse(**arguments)


def test_one_glimpse_has_no_dimension_of_its_own() -> None:
    assert glimpse(IMAGE, LOC, (4, 5), scales=2).shape == (2, 2, 3, 4, 5)
    assert glimpse(IMAGE, LOC[:, None].expand(2, 6, 2), (4, 5), scales=2).shape == (2, 6, 2, 3, 4, 5)


def test_zoom_as_numbers_and_as_a_tensor(backend: str) -> None:
    number: Tensor = glimpse(IMAGE, LOC, 4, zoom=1.5, backend=backend)
    assert torch.equal(glimpse(IMAGE, LOC, 4, zoom=torch.full((2,), 1.5), backend=backend), number)
    assert torch.equal(glimpse(IMAGE, LOC[:, None], 4, zoom=torch.full((2, 1), 1.5), backend=backend)[:, 0], number)


def test_what_triton_refuses() -> None:
    def refusal(channels: int, size: int | tuple[int, int], dtype: torch.dtype = torch.float32) -> str | None:
        image = torch.empty(1, channels, 1, 1, dtype=dtype, device="meta")
        loc = torch.empty(1, 2, dtype=dtype, device="meta")
        return contract.BACKENDS["triton"](normalise(image, loc, size))

    assert refusal(65535, (128, 65535)) is None
    assert "float64" in str(refusal(1, 1, torch.float64))
    assert "at most 65535, got 65536" in str(refusal(65536, 1))
    assert "at most 8388480 cells, got 8388608" in str(refusal(1, (128, 65536)))
