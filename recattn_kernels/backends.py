"""Which backend runs a call: the only place that decides, and the only reader of RECATTN_BACKEND.

A backend of an op is a module recattn_kernels.ops.<op>.<backend> and a line in the table BACKENDS of the op's contract:
its name, and the function `refusal(call) -> str | None` that says in words why it cannot run a call. One asked for by
name that refuses raises BackendUnavailableError; `auto` takes the first that does not refuse, else `reference`.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import os
import re
import sys
import warnings
from collections.abc import Callable, Mapping
from types import ModuleType, TracebackType
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

NAMES = ("auto", "reference", "vendor", "cpp", "triton", "cuda")


class BackendUnavailableError(RuntimeError):
    """The backend that was asked for cannot run this call on this machine; the message says why."""


def _checked(name: Any, source: str) -> str:
    if name not in NAMES:
        raise ValueError(f"{source} must be one of {', '.join(NAMES)}, got {name!r}")
    return str(name)


# A module global, not a ContextVar: a compiled graph guards on it, where a ContextVar would break the graph.
# What the environment says is looked at when a call asks: an import that fails leaves a command no words of its own.
_current = os.environ.get("RECATTN_BACKEND") or "auto"


class use_backend:
    """Context manager: calls inside that name no backend themselves run on this one.

    with recattn_kernels.use_backend("reference"):
        output, h_n = recattn_kernels.indrnn(x, weight_hh)

    Raises ValueError for a name that is not a backend. The setting is global to the process, not to a thread.
    """

    def __init__(self, name: str) -> None:
        self.name = _checked(name, "use_backend: name")
        self.previous: list[str] = []  # one for each time it has been entered

    def __enter__(self) -> None:
        global _current
        self.previous.append(_current)
        _current = self.name

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        global _current
        _current = self.previous.pop()


def requested(op: str, name: str | None) -> str:
    """The backend that a call asks for: its argument, else use_backend's, else RECATTN_BACKEND's, else auto."""
    if name is None:
        return _current if _current in NAMES else _checked(_current, f"{op}: RECATTN_BACKEND")
    return name if name in NAMES else _checked(name, f"{op}: backend")


def under_transform() -> bool:
    """True under vmap, jvp, func.grad and the like, or forward-mode AD: only the reference can follow there."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


# Machine

Function = TypeVar("Function", bound=Callable[..., Any])


def constant_when_compiled(function: Function) -> Function:
    """torch.compiler.assume_constant_result without importing the compiler, which takes longer than importing torch."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@functools.cache
def extension(name: str) -> ModuleType | str:
    """A compiled module of this package ("_cpu", "_cuda"), or the reason why there is none."""
    try:
        return importlib.import_module(f"recattn_kernels.{name}")
    except ImportError as error:
        if importlib.util.find_spec(f"recattn_kernels.{name}") is not None:
            return f"the extension {name} does not load: {error}"
    try:
        info = importlib.import_module("recattn_kernels._build_info")
    except ImportError:
        return f"the extension {name} has not been built"
    return str(getattr(info, name.strip("_").upper()) or f"the extension {name} is missing, though it was built")


@constant_when_compiled
def cpu_capability() -> str | None:
    """The instruction set that _cpu dispatches to; None where it has not been built."""
    module = extension("_cpu")
    return None if isinstance(module, str) else str(module.capability())


@functools.cache
def triton_missing() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    try:
        importlib.import_module("triton")
    except Exception as error:
        return f"triton does not import: {error}"
    return None


# What depends on the machine alone is a constant to a compiled graph.
@constant_when_compiled
def machine_refusal(backend: str, device_type: str) -> str | None:
    """Why a backend cannot run on tensors of this kind of device on this machine, whatever the op."""
    if backend == "cpp":
        if device_type != "cpu":
            return f"it runs on the CPU, its input is on {device_type}"
        loaded = extension("_cpu")
        return loaded if isinstance(loaded, str) else None
    if backend == "triton":
        if (missing := triton_missing()) is not None:
            return missing
        if device_type == "cuda" or (device_type == "cpu" and interpreting()):
            return None
        return f"it runs on a GPU, its input is on {device_type}"
    if backend == "cuda":
        if device_type != "cuda":
            return f"it runs on an NVIDIA GPU, its input is on {device_type}"
        if torch.version.hip is not None:
            return "it runs on an NVIDIA GPU, this torch is built for ROCm"
        loaded = extension("_cuda")
        return loaded if isinstance(loaded, str) else None
    if backend == "vendor":
        return "torch's own kernels run a whole layer: they are a backend of the layers, not of the ops"
    return None


def interpreting() -> bool:
    """True where Triton kernels run on CPU tensors, in Triton's interpreter."""
    return bool(importlib.import_module("triton").knobs.runtime.interpret)


# A graph is compiled anew where torch's setting has changed: it guards on it.
@constant_when_compiled
def allows_tf32() -> bool:
    """Whether torch multiplies float32 matrices on a GPU as TF32."""
    matmul = torch.backends.cuda.matmul
    # allow_tf32 raises where the newer setting has been used.
    return bool(matmul.fp32_precision == "tf32" if hasattr(matmul, "fp32_precision") else matmul.allow_tf32)


# Whether a tensor with these dispatch keys is numbers on a device and nothing more.
_plain: dict[int, bool] = {}


def _is_plain(x: Tensor) -> bool:
    """An ordinary tensor, or an inference tensor, which has none of autograd's keys."""
    if x.is_meta:
        return False
    keys = []
    for mode in (False, True):
        with torch.inference_mode(mode):
            keys.append(torch._C._dispatch_keys(torch.empty(0, device=x.device)))
    return torch._C._dispatch_keys(x) in keys


def tracing() -> bool:
    """True in torch.jit.trace, which checks itself by a second trace, without gradients: both have to choose alike."""
    return not torch.compiler.is_compiling() and torch._C._is_tracing()


_PRE_DISPATCH = torch._C.DispatchKey.PreDispatch


def dispatches(*inputs: Tensor | None) -> bool:
    """True where an op must go through torch's dispatcher, for what listens there: tracing, modes, or a key of a tensor
    that is more than numbers on a device (fake, meta, a subclass, a lazy negation, ...).

    Where nothing listens the op's function is called directly: the dispatcher's way through Python costs about 10 us a
    call, and some 50 us where another model has run in between and the interpreter's code is out of the caches.
    """
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0 or torch._C._is_tracing():
        return True
    if torch._C._dispatch_tls_is_dispatch_key_included(_PRE_DISPATCH):  # make_fx(pre_dispatch=True)
        return True
    for x in inputs:  # not any(...): a generator is a call more for every tensor
        if x is not None:
            keys = torch._C._dispatch_keys(x).raw_repr()
            if keys not in _plain:
                _plain[keys] = _is_plain(x)
            if not _plain[keys]:
                return True
    return False


# Op

UNDER_TRANSFORM = (
    "only the reference runs under a functorch transform or forward-mode AD, and auto takes it there by itself"
)

# The fused backends of an op, the one that auto prefers first, each with its refusal.
Table = Mapping[str, Callable[[Any], str | None]]


@functools.cache
def load(op: str, module: str) -> Any:
    """recattn_kernels.ops.<op>.<module>, imported when it is first needed: triton.py needs Triton."""
    return importlib.import_module(f"recattn_kernels.ops.{op}.{module}")


def no_refusal(call: Any) -> None:
    """The line of a backend that runs every call."""


def refusal(backend: str, table: Table, call: Any) -> str | None:
    """Why this backend cannot run this call; None: it can."""
    if backend == "reference":
        return None
    if backend != "vendor" and backend not in table:
        return "the op has no such backend"
    reason = machine_refusal(backend, call.x.device.type)
    if reason is None and under_transform():
        reason = UNDER_TRANSFORM
    return table[backend](call) if reason is None else reason


def choose(op: str, name: str | None, table: Table, call: Any) -> str:
    """The backend that runs this call."""
    name = requested(op, name)
    if name != "auto":
        reason = refusal(name, table, call)
        if reason is not None:
            raise BackendUnavailableError(f"{op}: backend {name!r} cannot run this call: {reason}")
        return name
    if call.x.device.type == "meta":
        return next(iter(table), "reference")  # shapes only, which every backend agrees on
    reasons = []
    for backend in table:
        reason = refusal(backend, table, call)
        if reason is None:
            return backend
        reasons.append(f"{backend}: {reason}")
    if call.x.device.type == "cuda" and not under_transform():
        _warn_once(f"{op}: no fused backend runs this call on the GPU, so the reference does. {'; '.join(reasons)}")
    return "reference"


_warned: set[str] = set()
# A layer's forward is called by torch's Module.__call__.
_NOT_THE_USERS = re.compile(r"recattn_kernels(\.|$)|torch\.nn\.modules\.module$")


@constant_when_compiled
def _warn_once(message: str) -> None:
    """Points at the line outside this package that the call came from."""
    if message in _warned:
        return
    _warned.add(message)
    frame, level = sys._getframe(), 1
    while frame.f_back is not None and _NOT_THE_USERS.match(frame.f_globals.get("__name__", "")):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)


def explain(op: str, *args: Any, **kwargs: Any) -> dict[str, str | None]:
    """Which backends can run a call, and why the others cannot.

    Takes an op's name and then what its function takes:

        >>> recattn_kernels.explain("indrnn", x, weight_hh)
        {'reference': None, 'vendor': "torch's own ...", 'cpp': None, 'triton': 'it runs on a GPU, its input ...', ...}

    Returns {backend: reason or None} with every named backend. Raises what the op itself would raise for arguments that
    no backend takes, and ValueError for an unknown op.
    """
    functions = {spec.name: spec.function for spec in importlib.import_module("recattn_kernels.registry").OPS}
    if not isinstance(op, str) or op not in functions:
        raise ValueError(f"explain: op must be one of {', '.join(functions)}, got {op!r}")
    kwargs.pop("backend", None)
    try:
        inspect.signature(functions[op]).bind(*args, **kwargs)
    except TypeError as error:
        raise TypeError(f"{op}: {error}") from None
    call = load(op, "api").normalise(*args, **kwargs)
    table = load(op, "contract").BACKENDS
    return {backend: refusal(backend, table, call) for backend in NAMES if backend != "auto"}
