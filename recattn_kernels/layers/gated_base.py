"""What RNN, LSTM, GRU and their cells add to torch.nn's: options, their parameters, and the choice of a backend."""

from __future__ import annotations

from typing import Any, ClassVar, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recattn_kernels import backends, checks
from recattn_kernels.layers.autocast import accepted_dtypes, autocasts, projected_dtype
from recattn_kernels.layers.gated_backend import TABLES, fused_runs, vendor_is_faster
from recattn_kernels.layers.lstmp import lstmp
from recattn_kernels.layers.options import changed_options
from recattn_kernels.layers.packing import Packed, Padded
from recattn_kernels.layers.projection import project
from recattn_kernels.layers.tracing import unscriptable
from recattn_kernels.ops import sequence
from recattn_kernels.ops.gated.api import pair, run
from recattn_kernels.ops.gru import api as gru
from recattn_kernels.ops.lstm import api as lstm
from recattn_kernels.ops.rnn import api as rnn

Self = TypeVar("Self", bound="Gated")
OPS: dict[str, Any] = {"rnn": rnn, "lstm": lstm, "gru": gru}

States = tuple[Tensor, ...]  # (h,), in the LSTM (h, c)

MANY = 64  # steps, or rows, where the rule that chooses a backend may not ask how many


class Gated(nn.Module):
    """Comes before a class of torch.nn in the bases of one of ours: its constructor, parameters and checks are torch's.

    The options' defaults belong to the class, so that a torch.nn module whose __class__ becomes ours, or one that was
    pickled before an option existed, has them all.
    """

    layer_norm: bool = False
    zoneout: float | tuple[float, float] = 0.0
    recurrent_dropout: float = 0.0
    grad_clip: float | None = None
    backend: str | None = None
    _patched: bool = False  # whether patch_model made it of one of torch.nn's

    _op: ClassVar[str]
    _vendor: ClassVar[type[nn.Module]]  # the class of torch.nn
    # Under autocast on a CPU torch.nn's adds the 16-bit gates to a state that stays float32, as input is.
    _promotes: ClassVar[bool] = False

    input_size: int
    hidden_size: int
    bias: bool
    dropout: float = 0.0  # of a layer: cells have none
    proj_size: int = 0  # likewise

    __prepare_scriptable__ = unscriptable

    def __init__(
        self,
        *args: Any,
        layer_norm: bool = False,
        zoneout: float | tuple[float, float] = 0.0,
        recurrent_dropout: float = 0.0,
        grad_clip: float | None = None,
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> None:
        name = self._vendor.__name__
        checks.flag(name, "layer_norm", layer_norm)
        if self._op == "lstm" and isinstance(zoneout, (tuple, list)):
            zoneout = pair(name, "zoneout", zoneout, "a number or a pair of them (h, c)")
        for rate in zoneout if isinstance(zoneout, tuple) and self._op == "lstm" else (zoneout,):
            checks.probability(name, "zoneout", rate)
        checks.probability(name, "recurrent_dropout", recurrent_dropout)
        if grad_clip is not None:
            checks.positive(name, "grad_clip", grad_clip)
        backends.requested(name, backend)
        # Named here for torch.nn.utils.skip_init, which looks for them; a cell of torch.nn takes them by position too.
        kwargs |= {key: value for key, value in (("device", device), ("dtype", dtype)) if value is not None}
        super().__init__(*args, **kwargs)
        self.layer_norm = layer_norm
        self.zoneout = zoneout
        self.recurrent_dropout = recurrent_dropout
        self.grad_clip = grad_clip
        self.backend = backend
        if layer_norm:
            for suffix in self._suffixes():
                wide = getattr(self, "bias_hh" + suffix if self.bias else "weight_hh" + suffix).detach()
                GH, H = wide.shape[0], self.hidden_size
                for part, width in (("ih", GH), ("hh", GH), ("c", H))[: 3 if self._op == "lstm" else 2]:
                    setattr(self, f"ln_{part}_weight{suffix}", nn.Parameter(wide.new_ones(width)))
                    setattr(self, f"ln_{part}_bias{suffix}", nn.Parameter(wide.new_zeros(width)))

    _first_weight_hh = "weight_hh"

    def _suffixes(self) -> list[str]:
        """What follows a parameter's name, for every recurrence of the module."""
        return [""]

    def _parameter(self, name: str) -> Any:
        """self.name, without Module.__getattr__, which takes a microsecond, where no parametrisation computes it."""
        found = self._parameters.get(name)
        return found if found is not None else getattr(self, name)

    @property
    def _cell(self) -> str:
        """The op's cell, of ops.gated.contract.CELLS."""
        return self._op

    def reset_parameters(self) -> None:
        """torch.nn's initialisation; layer normalisation starts with weights 1 and biases 0."""
        super().reset_parameters()  # type: ignore[misc]  # of the class that comes after this one
        for name, parameter in self.named_parameters(recurse=False):
            if name.startswith("ln_"):
                nn.init.constant_(parameter, float("_weight" in name))

    def extra_repr(self) -> str:
        options = changed_options(
            self, layer_norm=False, zoneout=0.0, recurrent_dropout=0.0, grad_clip=None, backend=None
        )
        return ", ".join([super().extra_repr(), *options])

    def _extras(self) -> list[str]:
        """The options that are set and that torch.nn does not have."""
        zoneout = any(self.zoneout) if isinstance(self.zoneout, tuple) else self.zoneout > 0
        found = []
        if self.layer_norm:
            found.append("layer_norm")
        if zoneout:
            found.append("zoneout")
        if self.recurrent_dropout > 0:
            found.append("recurrent_dropout")
        if self.grad_clip is not None:
            found.append("grad_clip")
        return found

    @classmethod
    def from_torch(cls: type[Self], module: nn.Module) -> Self:
        """A new layer of this class with the Parameters of a torch.nn module, the same objects, and its mode.

        Hooks are not copied. Raises TypeError for any class but torch.nn's own, ValueError where a parametrisation has
        taken a Parameter's place.
        """
        if type(module) is not cls._vendor:
            raise TypeError(
                f"{cls._vendor.__name__}: module must be a torch.nn.{cls._vendor.__name__},"
                f" got {type(module).__module__}.{type(module).__qualname__}"
            )
        return _rebuilt(cls, module)

    def to_torch(self) -> nn.Module:
        """A new torch.nn module with this one's Parameters, the same objects, and its mode. Hooks are not copied.

        Raises ValueError where an option that torch.nn does not have is set, or a parametrisation has taken a
        Parameter's place.
        """
        if extras := self._extras():
            raise ValueError(f"{self._vendor.__name__}: to_torch: torch.nn has no {' and no '.join(extras)}")
        return _rebuilt(self._vendor, self)

    # A call

    def _states(self, hx: Any, input: Tensor) -> States | None:
        """hx as a tuple of Tensors that can stand beside input; its shapes are still to be checked."""
        if hx is None:
            return None
        name = self._vendor.__name__
        is_pair = self._op == "lstm"
        states = pair(name, "hx", hx, "a pair of Tensors (h_0, c_0)") if is_pair else (hx,)
        for label, state in zip(("hx[0]", "hx[1]") if is_pair else ("hx",), states, strict=True):
            checks.tensor(name, label, state)
            checks.device(name, label, state, "input", input)
            checks.dtype(name, label, state, accepted_dtypes(input, input.dtype))
        return states

    def _backend(self, input: Tensor, T: int, B: int, called_with: list[str], *, packed: bool = False) -> str:
        """Who runs a call: "vendor", or what the op is to be asked for. packed: input was a PackedSequence."""
        name = backends.requested(self._vendor.__name__, self.backend)
        if name not in ("auto", "vendor"):
            return name
        tracing = backends.tracing()
        differentiates = torch.is_grad_enabled() or tracing
        extras = self._extras()
        if extras:  # what makes no difference to this call is no reason to refuse it
            if not self.training and "recurrent_dropout" in extras:
                extras.remove("recurrent_dropout")
            if not differentiates and "grad_clip" in extras:
                extras.remove("grad_clip")
        extras += called_with
        if name == "vendor":
            if backends.under_transform():
                raise backends.BackendUnavailableError(
                    f"{self._vendor.__name__}: backend 'vendor' cannot run this call: {backends.UNDER_TRANSFORM}"
                )
            if extras:
                raise backends.BackendUnavailableError(
                    f"{self._vendor.__name__}: backend 'vendor' cannot run this call: torch.nn has no"
                    f" {' and no '.join(extras)}"
                )
            return name
        # torch.nn refuses empty sequences, and a transform is followed by the reference alone.
        if extras or T == 0 or backends.under_transform() or input.dtype not in checks.FLOATING:
            return name
        dtype = projected_dtype(input, input.dtype)
        # A compiler has every step of oneDNN's kernel, for one number of them.
        onednn = not torch.compiler.is_compiling()
        if torch.compiler.is_compiling():  # a rule on sizes that change would compile anew for each, or not export
            T, B = 1 if T == 1 else MANY, MANY
        weight_hh = self._parameter(self._first_weight_hh)  # once: a parametrisation computes it anew each time
        needs_grad = differentiates and not tracing and (input.requires_grad or weight_hh.requires_grad)
        if self.training and self.dropout > 0:
            # torch.nn's kernels draw another mask from the same random numbers, and what checkpoint() first computes
            # without a gradient and then with one has to be the same: oneDNN's kernel rounds otherwise without one.
            needs_grad, onednn = True, False
        faster = vendor_is_faster(
            self._op,
            device=input.device.type,
            dtype=dtype,
            T=T,
            B=B,
            H=self.hidden_size,
            cell=isinstance(self, nn.RNNCellBase),
            packed=packed,
            needs_grad=needs_grad,
            onednn=onednn,
        )
        vendor = self.proj_size > 0 or faster or not fused_runs(self._op, self._cell, weight_hh, dtype, T, B)
        return "vendor" if vendor else name

    def _recurrence(
        self,
        x: Tensor,
        suffix: str,
        states: States | None,
        backend: str,
        batch: Padded | Packed | None = None,
        reset: Tensor | None = None,
    ) -> tuple[Tensor, States]:
        """One direction of one layer, projection and recurrence; without batch x is (T, B, D)."""

        def parameter(name: str) -> Any:
            return getattr(self, name + suffix)

        source = x.dtype
        weight_hh = parameter("weight_hh")
        if self.recurrent_dropout > 0:
            weight_hh = F.dropout(weight_hh, self.recurrent_dropout, self.training)
        b_ih = b_hh = None
        if self.bias and self._op == "gru":
            b_ih, b_hh = parameter("bias_ih"), parameter("bias_hh")
        elif self.bias:
            # Both are added to one sum, and the op's kernel gathers their gradient on the way. (In the gru r multiplies
            # b_hh alone.)
            b_hh = parameter("bias_ih") + parameter("bias_hh")
        norm = None
        if self.layer_norm:
            parts = ("hh", "c") if self._op == "lstm" else ("hh",)
            norm = tuple(parameter(f"ln_{part}_{what}") for part in parts for what in ("weight", "bias"))
            x = project(x, parameter("weight_ih"), None, backend)
            bias = parameter("ln_ih_bias") if b_ih is None else parameter("ln_ih_bias") + b_ih
            x = sequence.layer_norm(x, parameter("ln_ih_weight"), bias).to(x.dtype)  # autocast returns float32
        else:
            x = project(x, parameter("weight_ih"), b_ih, backend)
        if autocasts(x):
            # torch.nn's generic loop, which takes a packed LSTM too.
            promotes = self._promotes or (self._op == "lstm" and isinstance(batch, Packed))
            if promotes and x.device.type == "cpu" and x.dtype != (source if states is None else states[0].dtype):
                x = x.float()
            if states is not None:
                states = tuple(s.to(x.dtype) for s in states)

        options: dict[str, Any] = {
            "bias_hh": b_hh, "layer_norm": norm, "zoneout": self.zoneout, "training": self.training,
            "grad_clip": self.grad_clip, "reset": reset,
        }  # fmt: skip
        if batch is None:
            return self._run(x, weight_hh, states, suffix, backend, options)
        options |= {"lengths": batch.lengths, "batch_first": batch.batch_first, "reverse": suffix.endswith("_reverse")}
        if isinstance(batch, Packed) and not batch.even and self.proj_size == 0:
            return self._run(x, weight_hh, states, suffix, backend, options | {"batch_sizes": batch.batch_sizes})
        output, last = self._run(batch.pad(x), weight_hh, states, suffix, backend, options)
        return batch.pack(output), last

    def _run(
        self, x: Tensor, weight_hh: Tensor, states: Any, suffix: str, backend: str, options: dict[str, Any]
    ) -> tuple[Tensor, States]:
        if self.proj_size > 0:
            return lstmp(x, weight_hh, getattr(self, "weight_hr" + suffix), states, backend=backend, **options)
        is_lstm = self._op == "lstm"
        state = states if is_lstm or states is None else states[0]
        if self._op == "rnn":
            options["nonlinearity"] = self._cell.removeprefix("rnn_")
        op = OPS[self._op]
        if "batch_sizes" in options:  # which the public functions do not have
            call = op.normalise(x, weight_hh, state, **options)
            output, h_n, c_n = run(self._op, call, TABLES[self._op], backend)
            return output, (h_n, c_n) if is_lstm else (h_n,)
        output, last = getattr(op, self._op)(x, weight_hh, state, backend=backend, **options)
        return output, last if is_lstm else (last,)


Module = TypeVar("Module", bound=nn.Module)


def _rebuilt(cls: type[Module], module: Any) -> Module:
    """A cls made as module was, with module's own Parameters."""
    names = ["input_size", "hidden_size", "bias"]
    if isinstance(module, nn.RNNBase):
        names += ["num_layers", "batch_first", "bidirectional"]
    if isinstance(module, nn.LSTM):
        names.append("proj_size")
    if isinstance(module, (nn.RNN, nn.RNNCell)):
        names.append("nonlinearity")
    new = cls(**{name: getattr(module, name) for name in names}, device="meta")
    for name, _ in list(new.named_parameters()):
        if name not in module._parameters:
            raise ValueError(
                f"{type(module).__name__}: {name} must be a Parameter of the module, which has none so named"
            )
        setattr(new, name, module._parameters[name])
    if isinstance(new, nn.RNNBase):
        new.dropout = module.dropout  # here, where it cannot warn once more that it has no effect
        new._init_flat_weights()
    return new.train(module.training)
