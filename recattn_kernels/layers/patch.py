"""patch_model and unpatch_model: the recurrences of a finished model from torch.nn's to ours, and back."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import nn

from recattn_kernels.layers.gated import GRU, LSTM, RNN
from recattn_kernels.layers.gated_base import Gated
from recattn_kernels.layers.gated_cell import GRUCell, LSTMCell, RNNCell

OURS: dict[type[nn.Module], type[Gated]] = {cls._vendor: cls for cls in (RNN, LSTM, GRU, RNNCell, LSTMCell, GRUCell)}
THEIRS: dict[type[nn.Module], type[nn.Module]] = {ours: vendor for vendor, ours in OURS.items()}
NAMES = {cls.__name__ for cls in OURS}


@dataclass(frozen=True)
class PatchReport:
    """What patch_model or unpatch_model did, by the modules' names in the model; the model's own name is ''.

    patched: the modules whose class was changed.
    left: the recurrences that were left as they are, and why.
    """

    patched: tuple[str, ...] = ()
    left: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{len(self.patched)} patched, {len(self.left)} left"]
        lines += [f"  patched  {name or '(the model)'}" for name in self.patched]
        lines += [f"  left     {name or '(the model)'}: {reason}" for name, reason in self.left.items()]
        return "\n".join(lines)


def patch_model(model: nn.Module) -> PatchReport:
    """Turns every torch.nn.RNN, LSTM, GRU, RNNCell, LSTMCell and GRUCell of a model into ours, in place.

    The modules stay the same objects, and so do their Parameters, hooks, mode, device and dtype: their __class__
    changes, and with it what forward runs. Optimizers, checkpoints and references to them are not affected. model may
    itself be one. Of any other class, also one derived from these, a module is left as it is, as its forward may
    compute something else; the report says so.
    """
    _check("patch_model", model)
    patched, left = [], {}
    for name, module in model.named_modules():  # a module that is there twice is named once
        if type(module) in OURS:
            if "forward" in vars(module):
                left[name] = "its forward has been replaced on the instance"
                continue
            module.__class__ = OURS[type(module)]
            module._patched = True  # an attribute like any other: copies and pickles have it
            patched.append(name)
        elif not isinstance(module, Gated) and (reason := _why_left(module)) is not None:
            left[name] = reason
    return PatchReport(tuple(patched), left)


def unpatch_model(model: nn.Module) -> PatchReport:
    """Undoes patch_model: every RNN, LSTM, GRU and cell that it made ours in a model, or in what the model was copied
    from, becomes torch.nn's again, in place.

    One that was made as ours is left as it is, and so is one on which an option that torch.nn does not have has been
    set, or whose class is by now derived from ours; the report says so. A backend that was set is forgotten.
    """
    _check("unpatch_model", model)
    patched, left = [], {}
    module: nn.Module
    for name, module in model.named_modules():
        if not isinstance(module, Gated):
            continue
        if not module._patched:
            left[name] = "it was not patched but made as ours; to_torch() gives one of torch.nn's"
        elif type(module) not in THEIRS:
            left[name] = f"its class {_path(module)} is derived from ours"
        elif extras := module._extras():
            left[name] = f"torch.nn has no {' and no '.join(extras)}"
        else:
            for option in ("layer_norm", "zoneout", "recurrent_dropout", "grad_clip", "backend", "_patched"):
                vars(module).pop(option, None)
            module.__class__ = THEIRS[type(module)]  # type: ignore[assignment]  # no longer the Gated that it was
            patched.append(name)
    return PatchReport(tuple(patched), left)


def _check(function: str, model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{function}: model must be a torch.nn.Module, got {type(model).__name__}")


def _why_left(module: nn.Module) -> str | None:
    """Why a module is left, if it is a recurrence at all."""
    if isinstance(module, torch.jit.ScriptModule):
        return "TorchScript has compiled it" if getattr(module, "original_name", None) in NAMES else None
    if isinstance(module, (nn.RNNBase, nn.RNNCellBase)):
        return f"its class {_path(module)} is derived from torch.nn's"
    if type(module).__module__.startswith("torch.ao.nn.") and type(module).__name__ in NAMES:
        return f"{_path(module)} is of torch's quantisation"
    return None


def _path(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"
