"""glimpse(): the public function and its checks."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from recattn_kernels import checks
from recattn_kernels.ops.glimpse import reference
from recattn_kernels.ops.glimpse.contract import (
    BACKENDS,
    COMPATIBLE,
    COORDS,
    IMAGE_DTYPES,
    LOC_DTYPES,
    MODES,
    PADDINGS,
    empty,
)
from recattn_kernels.ops.operator import Call, Operator

OPERATOR = Operator(
    "glimpse",
    inputs="Tensor image, Tensor loc, Tensor? zoom",
    options="SymInt height, SymInt width, int scales, float factor, float base, str mode, str padding, "
    "ScalarType dtype",
    outputs=("out",),
    definition=reference.glimpse,
    empty=empty,
)


def _size(value: Any) -> tuple[int, int]:
    sides = value if isinstance(value, (tuple, list)) else (value, value)
    if len(sides) != 2 or not all(map(checks.whole, sides)):
        raise TypeError(f"glimpse: size must be an int or a pair of ints (gh, gw), got {value!r}")
    if min(sides) <= 0:
        raise ValueError(f"glimpse: size must be positive, got {value!r}")
    height, width = (n if isinstance(n, torch.SymInt) else int(n) for n in sides)
    return height, width  # type: ignore[return-value]  # of an export, what stands for an int


def _zoom(zoom: Any, loc: Tensor) -> tuple[float, Tensor | None]:
    """A number, and the tensor (B, G) that it multiplies."""
    if not isinstance(zoom, Tensor):
        checks.finite_positive("glimpse", "zoom", zoom)
        return float(zoom), None
    checks.tensor("glimpse", "zoom", zoom)
    B, G = loc.shape[:2]
    if zoom.dim() < 2:
        checks.rank("glimpse", "zoom", zoom, "(B,)")
        checks.shape("glimpse", "zoom", zoom, "(B,)", (B,))
    else:
        checks.rank("glimpse", "zoom", zoom, "(B, G)")
        checks.shape("glimpse", "zoom", zoom, "(B, G)", (B, G))
    checks.dtype("glimpse", "zoom", zoom, (loc.dtype,))
    checks.device("glimpse", "zoom", zoom, "image", loc)
    return 1.0, zoom if zoom.dim() == 2 else zoom[:, None].expand(B, G)


def _compatible(mode: str, size: tuple[int, int], scales: int, factor: float, base: Any, padding: str) -> None:
    if isinstance(base, Tensor) or base != 1:
        got = "a Tensor" if isinstance(base, Tensor) else base
        raise ValueError(f"glimpse: zoom must be 1 with mode={mode!r}, got {got}")
    if padding != "zeros":
        raise ValueError(f"glimpse: padding must be zeros with mode={mode!r}, got {padding!r}")
    if mode == "tf" and scales != 1:
        raise ValueError(f"glimpse: scales must be 1 with mode='tf', got {scales}")
    for n in size:
        for side in reference.windows(n, scales, factor):
            if side % n != 0 or side == 0:
                raise ValueError(
                    f"glimpse: scale_factor must give windows that are multiples of size with mode={mode!r}, "
                    f"got a window of {side} for a size of {n}"
                )


def normalise(
    image: Tensor,
    loc: Tensor,
    size: int | tuple[int, int],
    *,
    scales: int = 1,
    scale_factor: float = 2.0,
    zoom: float | Tensor = 1.0,
    mode: str = "area",
    padding: str = "zeros",
    coords: str = "xy",
    dtype: torch.dtype | None = None,
) -> Call:
    """Checks the arguments of glimpse(), and brings loc to (B, G, 2) in the order x, y, before any work."""
    checks.tensor("glimpse", "image", image)
    checks.rank("glimpse", "image", image, "(B, C, H, W)")
    checks.dtype("glimpse", "image", image, IMAGE_DTYPES)
    B, _, H, W = image.shape
    checks.tensor("glimpse", "loc", loc)
    if loc.dim() == 2:
        checks.shape("glimpse", "loc", loc, "(B, 2)", (B, 2))
    elif loc.dim() != 3 or loc.shape[0] != B or loc.shape[2] != 2:
        raise ValueError(f"glimpse: loc must be (B, 2) or (B, G, 2) with B = {B}, got {tuple(loc.shape)}")
    checks.dtype("glimpse", "loc", loc, LOC_DTYPES.get(image.dtype, (torch.float32,)))
    checks.device("glimpse", "loc", loc, "image", image)
    height, width = _size(size)
    checks.count("glimpse", "scales", scales)
    checks.finite_positive("glimpse", "scale_factor", scale_factor)
    checks.choice("glimpse", "mode", mode, MODES)
    checks.choice("glimpse", "padding", padding, PADDINGS)
    checks.choice("glimpse", "coords", coords, COORDS)
    if dtype is None:
        dtype = torch.float32 if image.dtype == torch.uint8 else image.dtype
    elif dtype not in checks.FLOATING:
        raise TypeError(f"glimpse: dtype must be float64 or float32 or bfloat16 or float16, got {dtype}")
    if padding != "zeros" and (H == 0 or W == 0):
        raise ValueError(f"glimpse: image must have pixels with padding={padding!r}, got {tuple(image.shape)}")
    if loc.dim() == 2:
        loc = loc[:, None]
    if coords == "yx":
        loc = loc.flip(-1)
    base, scale = _zoom(zoom, loc)
    if mode in COMPATIBLE:
        _compatible(mode, (height, width), scales, scale_factor, zoom, padding)
        loc = loc.detach()  # whole pixels: no derivative
    # Not math.isfinite(): a compiled graph has symbols for numbers that change.
    if scales > 1 and not reference.pixels_per_cell(base, scales, scale_factor)[-1] < math.inf:
        raise ValueError(f"glimpse: scales must leave cells of finite size, got {scales} with factor {scale_factor}")
    return Call(image, (image, loc, scale), (height, width, scales, float(scale_factor), base, mode, padding, dtype))


def glimpse(
    image: Tensor,
    loc: Tensor,
    size: int | tuple[int, int],
    *,
    scales: int = 1,
    scale_factor: float = 2.0,
    zoom: float | Tensor = 1.0,
    mode: str = "area",
    padding: str = "zeros",
    coords: str = "xy",
    dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> Tensor:
    r"""Multi-scale glimpses: windows of an image around given points, each averaged to the same few cells.

    With mode="area" the cell (i, j) of scale s is the exact mean of the image over a box of k x k pixels,

    .. math::
        k &= \mathrm{zoom} \cdot \mathrm{scale\_factor}^s, \quad
        c_x = (l_x + 1) W / 2, \quad c_y = (l_y + 1) H / 2 \\
        \mathrm{out}_{ij} &= \frac{1}{k^2} \int_{c_y + (i - g_h/2) k}^{c_y + (i + 1 - g_h/2) k}
        \int_{c_x + (j - g_w/2) k}^{c_x + (j + 1 - g_w/2) k} I(y, x) \, dx \, dy

    where pixel p covers [p, p+1]: sub-pixel positions count, and nothing aliases however large the window.

    Args:
        image: (B, C, H, W), of any strides; float64, float32, bfloat16, float16 or uint8.
        loc: (B, 2), one glimpse per image, or (B, G, 2): the centres as x, y, where -1 and 1 are the outer edges of the
            image (align_corners=False). float32, float64 beside a float64 image, either beside uint8. Points outside
            are allowed.
        size: cells of a glimpse: an int, or (gh, gw).
        scales: S, how many windows are taken around each point.
        scale_factor: by how much each window is larger than the one before.
        zoom: pixels per cell of the first scale: a number, or a tensor (B,) or (B, G) in loc's dtype.
        mode: "area", as above. "bilinear": one tap at the centre of each cell, as F.grid_sample takes it. Those of
            other projects, to the bit, on whole pixels, in which zoom is 1 and padding "zeros": "kevinzakka"
            (recurrent-visual-attention) and "dpnn" (Torch) average windows that are multiples of size, "tf"
            (extract_glimpse, centered and normalized, without noise) takes one scale.
        padding: what is around the image: "zeros", "border" or "reflect", as in F.grid_sample with align_corners=False.
        coords: "xy", or "yx" where loc has y first.
        dtype: of the result: by default the image's; of a uint8 image float32, with values from 0 to 255.
        backend: auto, reference, cpp or triton; None takes that of use_backend(), else of RECATTN_BACKEND.

    Returns: (B, S, C, gh, gw), or (B, G, S, C, gh, gw) where loc has G. A glimpse whose loc is not finite, or whose
    zoom in a tensor is not positive and finite, is NaN, alone, and passes no gradient on.

    Gradients: image, and in "area" and "bilinear" loc and zoom, of any order; forward-mode AD, functorch transforms and
    second derivatives run the reference. Where the edge of a cell falls on that of a pixel the derivative is the one to
    the right. All are deterministic. The arithmetic is in float32, float64 for float64 images, positions in float64.

    Raises:
        ValueError, TypeError: for arguments that do not fit; the message names the argument.
        BackendUnavailableError: the backend asked for cannot run this call; recattn_kernels.explain() says why.

    Source: Mnih, Heess, Graves and Kavukcuoglu, "Recurrent models of visual attention", 2014.
    """
    if has_torch_function((image, loc)) and not torch.compiler.is_compiling():
        return handle_torch_function(glimpse, (image, loc), **locals())
    call = normalise(
        image, loc, size, scales=scales, scale_factor=scale_factor, zoom=zoom, mode=mode, padding=padding,
        coords=coords, dtype=dtype,
    )  # fmt: skip
    out: Tensor = OPERATOR.run(BACKENDS, backend, call)[0]
    return out.squeeze(1) if loc.dim() == 2 else out
