"""GlimpseSensor and GlimpseNetwork: what a model of visual attention sees, and what it makes of it."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recattn_kernels import backends, checks
from recattn_kernels.layers.autocast import accepted_dtypes
from recattn_kernels.layers.options import changed_options
from recattn_kernels.layers.tracing import Proxy, leaf, unscriptable
from recattn_kernels.ops.glimpse.api import glimpse
from recattn_kernels.ops.glimpse.contract import COORDS, MODES, PADDINGS

COMBINATIONS = ("additive", "multiplicative")


def height_and_width(layer: str, name: str, size: Any) -> tuple[int, int]:
    if isinstance(size, (tuple, list)):
        if len(size) != 2:
            raise ValueError(f"{layer}: {name} must be an int or a pair (gh, gw), got {size!r}")
        height, width = size
    else:
        height = width = size
    checks.count(layer, name, height)
    checks.count(layer, name, width)
    return height, width


class GlimpseSensor(nn.Module):
    r"""The retina: patches around a location, each scale_factor times as wide as the one before, in as many cells.

    Args:
        size: the cells of a patch, g or (gh, gw).
        scales: S, patches of a glimpse. At scale s a cell is zoom * scale_factor^s pixels wide.
        scale_factor: how much wider each patch is than the one before.
        zoom: the width of a cell at scale 0, in pixels.
        mode: area, bilinear, kevinzakka, tf or dpnn; see :func:`recattn_kernels.glimpse`.
        padding: what lies outside the image: zeros, border or reflect.
        coords: "xy" or "yx", the order of a location's coordinates.
        device: as every layer has it; a sensor has no parameters to put there.
        dtype: of what is returned; None is the image's, and float32 for uint8.
        backend: auto, reference, cpp or triton; None takes that of use_backend(), else of RECATTN_BACKEND.

    Inputs:
        image: (B, C, H, W), floating or uint8, of any strides.
        loc: (B, 2), or (B, G, 2) for G glimpses of each image, in [-1, 1]: from edge to edge of the image.
        zoom: a number, (B,) or (B, G), in the place of the sensor's own.

    Returns: (B, S, C, gh, gw), or (B, G, S, C, gh, gw).

    Gradients: those of :func:`recattn_kernels.glimpse`.

    Raises: what :func:`recattn_kernels.glimpse` raises; for an unknown mode, padding or coords the constructor does.

    Source: Mnih et al., "Recurrent Models of Visual Attention", NIPS 2014.
    """

    __prepare_scriptable__ = unscriptable

    def __init__(
        self,
        size: int | tuple[int, int],
        scales: int = 1,
        scale_factor: float = 2.0,
        *,
        zoom: float = 1.0,
        mode: str = "area",
        padding: str = "zeros",
        coords: str = "xy",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        height_and_width("GlimpseSensor", "size", size)
        checks.count("GlimpseSensor", "scales", scales)
        checks.positive("GlimpseSensor", "scale_factor", scale_factor)
        checks.positive("GlimpseSensor", "zoom", zoom)
        checks.choice("GlimpseSensor", "mode", mode, MODES)
        checks.choice("GlimpseSensor", "padding", padding, PADDINGS)
        checks.choice("GlimpseSensor", "coords", coords, COORDS)
        backends.requested("GlimpseSensor", backend)
        self.size = size
        self.scales = scales
        self.scale_factor = scale_factor
        self.zoom = zoom
        self.mode = mode
        self.padding = padding
        self.coords = coords
        self.dtype = dtype
        self.backend = backend

    def forward(self, image: Tensor, loc: Tensor, zoom: float | Tensor | None = None) -> Tensor:
        if isinstance(image, Proxy):
            return leaf(GlimpseSensor.forward, self, image, loc, zoom=zoom)
        return glimpse(
            image, loc, self.size, scales=self.scales, scale_factor=self.scale_factor,
            zoom=self.zoom if zoom is None else zoom, mode=self.mode, padding=self.padding, coords=self.coords,
            dtype=self.dtype, backend=self.backend,
        )  # fmt: skip

    def extra_repr(self) -> str:
        return ", ".join([
            str(self.size),
            *changed_options(
                self, scales=1, scale_factor=2.0, zoom=1.0, mode="area", padding="zeros", coords="xy", dtype=None,
                backend=None,
            ),
        ])  # fmt: skip


class GlimpseNetwork(nn.Module):
    r"""What was seen and where, in one vector.

    .. math::
        h_g &= \mathrm{ReLU}(W_g\, \mathrm{glimpse} + b_g), \quad h_l = \mathrm{ReLU}(W_l\, l + b_l) \\
        g &= \mathrm{ReLU}(W_{what} h_g + b_{what} + W_{where} h_l + b_{where})

    and with glimpse="multiplicative" (Ba et al., 2015)

    .. math:: g = \mathrm{ReLU}(W_{what} h_g + b_{what}) \odot \mathrm{ReLU}(W_{where} h_l + b_{where})

    Args:
        channels: C, of the image.
        glimpse_size: the cells of a patch, g or (gh, gw).
        scales: S, patches of a glimpse.
        hidden_size: H, the width of the result.
        features: the widths of h_g and of h_l.
        glimpse: how both meet, "additive" or "multiplicative".

    Inputs: glimpse (B, S, C, gh, gw), of the parameters' dtype; loc (B, 2), of any floating dtype.

    Returns: g (B, H).

    Parameters: those of the Linear modules glimpse_in, location_in, what and where.

    Raises: ValueError, TypeError: for arguments that do not fit; the message names the argument.

    Gradients: to glimpse, loc and all parameters, of any order.

    Sources: Mnih et al., "Recurrent Models of Visual Attention", NIPS 2014; Ba et al., "Multiple Object Recognition
    with Visual Attention", ICLR 2015, arXiv:1412.7755.
    """

    __prepare_scriptable__ = unscriptable

    def __init__(
        self,
        channels: int = 1,
        glimpse_size: int | tuple[int, int] = 8,
        scales: int = 1,
        hidden_size: int = 256,
        *,
        features: int = 128,
        glimpse: str = "additive",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, value in (
            ("channels", channels), ("scales", scales), ("hidden_size", hidden_size), ("features", features)
        ):  # fmt: skip
            checks.count("GlimpseNetwork", name, value)
        height, width = height_and_width("GlimpseNetwork", "glimpse_size", glimpse_size)
        checks.choice("GlimpseNetwork", "glimpse", glimpse, COMBINATIONS)
        self.channels = channels
        self.glimpse_size = glimpse_size
        self.scales = scales
        self.hidden_size = hidden_size
        self.features = features
        self.glimpse = glimpse
        self._shape = (scales, channels, height, width)
        self.glimpse_in = nn.Linear(scales * channels * height * width, features, device=device, dtype=dtype)
        self.location_in = nn.Linear(2, features, device=device, dtype=dtype)
        self.what = nn.Linear(features, hidden_size, device=device, dtype=dtype)
        self.where = nn.Linear(features, hidden_size, device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        """torch.nn.Linear's own initialisation."""
        for linear in (self.glimpse_in, self.location_in, self.what, self.where):
            linear.reset_parameters()

    def forward(self, glimpse: Tensor, loc: Tensor) -> Tensor:
        if isinstance(glimpse, Proxy):
            return leaf(GlimpseNetwork.forward, self, glimpse, loc)
        checks.tensor("GlimpseNetwork", "glimpse", glimpse)
        checks.tensor("GlimpseNetwork", "loc", loc)
        checks.shape("GlimpseNetwork", "glimpse", glimpse, "(B, S, C, gh, gw)", (*glimpse.shape[:1], *self._shape))
        checks.shape("GlimpseNetwork", "loc", loc, "(B, 2)", (glimpse.shape[0], 2))
        checks.device("GlimpseNetwork", "glimpse", glimpse, "what.weight", self.what.weight)
        checks.device("GlimpseNetwork", "loc", loc, "glimpse", glimpse)
        checks.dtype("GlimpseNetwork", "glimpse", glimpse, accepted_dtypes(glimpse, self.what.weight.dtype))
        h_g = F.relu(self.glimpse_in(glimpse.flatten(1)))
        h_l = F.relu(self.location_in(loc.to(self.location_in.weight.dtype)))
        what, where = self.what(h_g), self.where(h_l)
        if self.glimpse == "additive":
            return F.relu(what + where)
        return F.relu(what) * F.relu(where)

    def extra_repr(self) -> str:
        options = changed_options(
            self, channels=1, glimpse_size=8, scales=1, hidden_size=256, features=128, glimpse="additive"
        )
        return ", ".join(options)
