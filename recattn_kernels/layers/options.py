"""How a layer shows its options."""

from __future__ import annotations

from typing import Any

from torch import nn


def changed_options(module: nn.Module, **defaults: Any) -> list[str]:
    """The options of a module that are not at their defaults, as extra_repr prints them."""
    values = {name: getattr(module, name) for name in defaults}
    return [f"{name}={value!r}" for name, value in values.items() if value != defaults[name]]
