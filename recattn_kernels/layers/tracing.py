"""What torch.fx, torch.jit.script and torch.export need to know of the layers.

torch.fx: a layer is one node of the graph that symbolic_trace() makes of a model, as torch.nn's are. A Tracer takes the
modules of torch.nn for leaves, and calls forward of all others on Proxies. Ours asks for shapes and dtypes, which a
Proxy does not have; so forward gives what the Tracer would have given for a leaf.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

from torch import fx, nn
from torch.utils import _pytree

Result = TypeVar("Result")
Class = TypeVar("Class", bound=type)
Proxy: Any = fx.Proxy  # to mypy nothing that forward takes can be one


def leaf(forward: Callable[..., Result], module: nn.Module, input: Any, *args: Any, **kwargs: Any) -> Result:
    """The node of module(input, *args, **kwargs), traced in forward; a keyword that is None is left out.

    Raises TypeError where the node would not be this call: forward of a class derived from ours may compute more, and
    so may hooks, which have run for this call and would run again for the node; the root is no module of a graph.
    """
    name = type(module).__name__
    path = input.tracer.path_of_module(module)
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    if path == "":
        raise TypeError(f"{name}: torch.fx traces a model of which this layer is a part, not the layer alone")
    if type(module).forward is not forward or "forward" in vars(module) or any(hooks):
        raise TypeError(
            f"{name}: torch.fx cannot trace into this layer, which has hooks or a forward that is not ours: use a"
            " torch.fx.Tracer whose is_leaf_module(module, name) is True for it"
        )
    given = {key: value for key, value in kwargs.items() if value is not None}
    node: Result = input.tracer.create_proxy("call_module", path, (input, *args), given)
    return node


def unscriptable(module: nn.Module) -> NoReturn:
    """The layers' __prepare_scriptable__, which torch.jit.script() calls on each module of a model before all else.

    It could give torch.nn's layer in ours' place, but torch would put that into the model too, for good.
    """
    name = type(module).__name__
    instead = "take torch.export or torch.jit.trace"
    if hasattr(module, "to_torch"):
        instead += ", or script what to_torch() gives"
    raise TypeError(f"{name}: torch.jit.script cannot compile this layer: {instead}")


def savable(cls: Class) -> Class:
    """A NamedTuple by whose name torch.export.save() finds it again: without it refuses what returns one.

    torch's refusal names the function, for all that it is private; a torch without it goes on refusing.
    """
    if hasattr(_pytree, "_register_namedtuple"):
        _pytree._register_namedtuple(cls, serialized_type_name=f"recattn_kernels.{cls.__name__}")
    return cls
