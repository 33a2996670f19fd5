"""How a layer shows its options, and hands on those of a call."""

from __future__ import annotations

from typing import Any

from torch import Generator, nn


def changed_options(module: nn.Module, **defaults: Any) -> list[str]:
    """The options of a module that are not at their defaults, as extra_repr prints them."""
    values = {name: getattr(module, name) for name in defaults}
    return [f"{name}={value!r}" for name, value in values.items() if value != defaults[name]]


def from_generator(generator: Generator | None) -> dict[str, Any]:
    """The argument `generator` of torch.rand or randn, absent for None: compiled with it they take no dynamic shape."""
    return {} if generator is None else {"generator": generator}
