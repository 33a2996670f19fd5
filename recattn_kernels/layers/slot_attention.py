"""SlotAttention: the iterations around slot_attention(), with their parameters."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Generator, Tensor, nn

from recattn_kernels import backends, checks
from recattn_kernels.layers import slot_attention_weights
from recattn_kernels.layers.autocast import accepted_dtypes
from recattn_kernels.layers.gated_cell import GRUCell
from recattn_kernels.layers.options import changed_options, from_generator
from recattn_kernels.layers.slot_attention_inputs import Attention, attention_over, is_plain, linear
from recattn_kernels.layers.slot_attention_iterations import Masks, fused, update_weights
from recattn_kernels.layers.tracing import Proxy, leaf, unscriptable
from recattn_kernels.ops.slot_attention import update
from recattn_kernels.ops.slot_attention.api import EPS_MODES, HEAD_SOFTMAX

NAME = "SlotAttention"


class SlotAttention(nn.Module):
    r"""Slot attention: K slots compete over a few iterations for N inputs, until each stands for a part of them.

    .. math::
        x &= \mathrm{LN}(\mathrm{inputs}), \quad k = x W_k^T, \quad v = x W_v^T \\
        \text{iters times:} \quad q &= \mathrm{LN}(\mathrm{slots}) W_q^T, \quad
        A = \mathop{\mathrm{softmax}}_{\mathrm{slots}} \Big(\frac{q k^T}{\mathrm{temperature} \sqrt{D / \mathrm{heads}}}
        \Big), \quad W_{kn} = \frac{A_{kn} + \mathrm{eps}}{\sum_n (A_{kn} + \mathrm{eps})} \\
        \mathrm{slots} &\leftarrow \mathrm{GRU}(W v, \mathrm{slots}), \quad
        \mathrm{slots} \leftarrow \mathrm{slots} + \mathrm{MLP}(\mathrm{LN}(\mathrm{slots}))

    The slots begin as :math:`\mu + e^{\log \sigma} \epsilon`, :math:`\epsilon` from N(0, 1): exchangeable, and of any
    number.

    Args:
        num_slots: K, the slots of a call that does not say otherwise.
        dim: D, the features of a slot.
        input_dim: the features of an input; None: D.
        iters: the iterations of a call.
        mlp_dim: the width of the MLP's hidden layer (ReLU).
        heads: divide D among them; each has its own A, and D / heads features of q, k and v.
        eps: what keeps a slot that wins nothing from dividing by zero; 0 or more.
        eps_mode: "add", as above; "denominator": W = A / (sum over n of A + eps).
        temperature: divides the logits.
        head_softmax: "slots": the slots of each head compete by themselves; "joint": those of all heads together.
        bias: gives W_q, W_k and W_v biases.
        ln_eps: of the three layer normalisations.
        init: "gaussian", as above; "learned": K slots that are parameters, the same for every sample, without noise.
        update: "gru", as above; "residual": slots + W v.
        grad_mode: "full": the gradient goes back through every iteration. "fixed-point": slots are detached before the
            last one, the first-order implicit gradient of Chang et al.; iterations before it keep nothing.
            "bi-level": that, and the gradient of the last iteration's slots is handed to the initial ones (Jia et al.).
        device, dtype: of the parameters.
        backend: auto, reference, cpp or triton; None takes that of use_backend(), else of RECATTN_BACKEND.

    Inputs:
        inputs: (B, N, input_dim).
        slots: (B, K, D), the initial slots; None: drawn, or learned. Those of a video's last frame, say.
        num_slots: K of this call; with learned slots at most those there are, of which it takes the first.
        slot_mask: (B, K) bool. A slot where it is False takes no part and is 0 in the result.
        input_mask: (B, N) bool. An input where it is False is not read. A sample without any is no error: its slots
            are updated with zeros.
        return_attn: whether to return the last iteration's A beside the slots.
        generator: of the noise, on the parameters' device.

    Returns: slots (B, K, D); with return_attn (slots, A), A (B, K, N), or (B, heads, K, N) with more than one head,
    before eps is added.

    Parameters: norm_inputs, norm_slots, norm_mlp (LayerNorm), project_q (D, D), project_k and project_v (D, input_dim)
    (Linear), gru (GRUCell, not under update "residual"), mlp (Linear, ReLU, Linear), slots_mu (1, 1, D) and
    slots_log_sigma (1, 1, D), or slots_mu (1, K, D) alone under init "learned". They start as in the authors' code:
    weights Glorot-uniform, those of the GRU's state orthogonal, biases 0, slots_mu and slots_log_sigma uniform within
    sqrt(6 / (1 + D)).

    Where that is cheaper the keys and values are never computed: W_k is applied to the queries and W_v to the weighted
    mean of the normalised inputs, which is the same by associativity. On a CPU GRU and MLP of an iteration are one
    operation: see ops/slot_attention/update.py. On a GPU the iterations that need no gradient, those of an evaluation
    and those before the last of an implicit grad_mode, are one launch where that is estimated to be faster: see
    ops/slot_attention/iterations.py.

    Raises:
        ValueError, TypeError: for arguments that do not fit; the message names the argument.
        BackendUnavailableError: the backend asked for cannot run the call.

    Sources: Locatello et al., "Object-centric learning with slot attention", NeurIPS 2020, arXiv:2006.15055;
    fixed-point: Chang et al., "Object representations as fixed points", NeurIPS 2022, arXiv:2207.00787; bi-level: Jia
    et al., "Improving object-centric learning with query optimization", ICLR 2023, arXiv:2210.08990; heads with a joint
    softmax: Singh et al., "Illiterate DALL-E learns to compose" (SLATE), ICLR 2022, arXiv:2110.11405.
    """

    slots_log_sigma: nn.Parameter | None

    __prepare_scriptable__ = unscriptable

    def __init__(
        self,
        num_slots: int,
        dim: int,
        *,
        input_dim: int | None = None,
        iters: int = 3,
        mlp_dim: int = 128,
        heads: int = 1,
        eps: float = 1e-8,
        eps_mode: str = "add",
        temperature: float = 1.0,
        head_softmax: str = "slots",
        bias: bool = False,
        ln_eps: float = 1e-5,
        init: str = "gaussian",
        update: str = "gru",
        grad_mode: str = "full",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        input_dim = dim if input_dim is None else input_dim
        sizes = {
            "num_slots": num_slots, "dim": dim, "input_dim": input_dim, "iters": iters, "mlp_dim": mlp_dim,
            "heads": heads,
        }  # fmt: skip
        for name, size in sizes.items():
            checks.count(NAME, name, size)
        if dim % heads != 0:
            raise ValueError(f"{NAME}: heads must divide dim = {dim}, got {heads}")
        checks.not_negative(NAME, "eps", eps)
        checks.finite_positive(NAME, "temperature", temperature)
        checks.finite_positive(NAME, "ln_eps", ln_eps)
        checks.choice(NAME, "eps_mode", eps_mode, EPS_MODES)
        checks.choice(NAME, "head_softmax", head_softmax, HEAD_SOFTMAX)
        checks.flag(NAME, "bias", bias)
        checks.choice(NAME, "init", init, ("gaussian", "learned"))
        checks.choice(NAME, "update", update, ("gru", "residual"))
        checks.choice(NAME, "grad_mode", grad_mode, ("full", "fixed-point", "bi-level"))
        backends.requested(NAME, backend)
        self.num_slots = num_slots
        self.dim = dim
        self.input_dim = input_dim
        self.iters = iters
        self.mlp_dim = mlp_dim
        self.heads = heads
        self.eps = float(eps)
        self.eps_mode = eps_mode
        self.temperature = float(temperature)
        self.head_softmax = head_softmax
        self.bias = bias
        self.ln_eps = float(ln_eps)
        self.init = init
        self.update = update
        self.grad_mode = grad_mode
        self.backend = backend

        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.norm_inputs = nn.LayerNorm(input_dim, ln_eps, **factory)
        self.norm_slots = nn.LayerNorm(dim, ln_eps, **factory)
        self.norm_mlp = nn.LayerNorm(dim, ln_eps, **factory)
        self.project_q = nn.Linear(dim, dim, bias, **factory)
        self.project_k = nn.Linear(input_dim, dim, bias, **factory)
        self.project_v = nn.Linear(input_dim, dim, bias, **factory)
        self.gru = GRUCell(dim, dim, backend=backend, **factory) if update == "gru" else None
        self.mlp = nn.Sequential(
            nn.Linear(dim, mlp_dim, **factory), nn.ReLU(inplace=True), nn.Linear(mlp_dim, dim, **factory)
        )
        self.slots_mu = nn.Parameter(torch.empty(1, num_slots if init == "learned" else 1, dim, **factory))
        self.slots_log_sigma = nn.Parameter(torch.empty(1, 1, dim, **factory)) if init == "gaussian" else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for norm in (self.norm_inputs, self.norm_slots, self.norm_mlp):
            norm.reset_parameters()
        for module in (self.project_q, self.project_k, self.project_v, *self.mlp, self.gru):
            for name, parameter in () if module is None else module.named_parameters(recurse=False):
                if name == "weight_hh":
                    _orthogonal(parameter)
                elif name.startswith("weight"):
                    nn.init.xavier_uniform_(parameter)
                else:
                    nn.init.zeros_(parameter)
        # TensorFlow's Glorot bound: torch.nn.init takes the dimensions of such a shape for others.
        for parameter in (self.slots_mu, self.slots_log_sigma):
            if parameter is not None:
                bound = math.sqrt(6 / (parameter.shape[1] + self.dim))
                nn.init.uniform_(parameter, -bound, bound)

    def forward(
        self,
        inputs: Tensor,
        slots: Tensor | None = None,
        *,
        num_slots: int | None = None,
        slot_mask: Tensor | None = None,
        input_mask: Tensor | None = None,
        return_attn: bool = False,
        generator: Generator | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        if isinstance(inputs, Proxy):
            return leaf(
                SlotAttention.forward, self, inputs, slots=slots, num_slots=num_slots, slot_mask=slot_mask,
                input_mask=input_mask, return_attn=return_attn, generator=generator,
            )  # fmt: skip
        K = self._check(inputs, slots, num_slots, slot_mask, input_mask, return_attn)
        slots = self._initial(inputs.shape[0], K, generator) if slots is None else slots
        absent = None if slot_mask is None else ~slot_mask.unsqueeze(-1)
        if absent is not None:
            slots = slots.masked_fill(absent, 0)  # what is not a slot may hold anything, as NaN
        if input_mask is not None:
            inputs = inputs.masked_fill(~input_mask.unsqueeze(-1), 0)
        implicit = self.grad_mode != "full"
        backend, masks = backends.requested(NAME, self.backend), (slot_mask, input_mask)
        attention = attention_over(self, inputs, K, *masks, 1 if implicit else self.iters - return_attn, backend)

        initial, times = slots, self.iters
        if implicit:
            with torch.no_grad():
                slots, _ = self._iterations(attention, slots, self.iters - 1, False, masks, backend)
            slots, times = slots.detach(), 1
        if self.grad_mode == "bi-level":
            slots = slots + (initial - initial.detach())
        slots, attn = self._iterations(attention, slots, times, return_attn, masks, backend)
        if absent is not None:
            slots = slots.masked_fill(absent, 0)
        return slots if attn is None else (slots, attn)

    def _initial(self, B: int, K: int, generator: Generator | None) -> Tensor:
        mu = self.slots_mu
        if self.slots_log_sigma is None:
            return mu[:, :K].expand(B, -1, -1)
        noise = torch.randn(B, K, self.dim, **from_generator(generator), device=mu.device, dtype=mu.dtype)
        return mu + self.slots_log_sigma.exp() * noise

    def _iterations(
        self, attention: Attention, slots: Tensor, times: int, return_attn: bool, masks: Masks, backend: str
    ) -> tuple[Tensor, Tensor | None]:
        found = fused(self, attention, slots, times, return_attn, masks, backend)
        if found is not None:
            return found
        attn, weights = None, update_weights(self, slots, backend)
        for i in range(times):
            updates, attn = attention.attend(self.norm_slots(slots), return_attn and i == times - 1)
            if weights is None:
                slots = self._updated(slots, updates, backend)
            else:
                slots = update.run(updates, slots, weights, self.norm_mlp.eps)
        return slots, attn

    def _updated(self, slots: Tensor, updates: Tensor, backend: str) -> Tensor:
        if self.gru is None:
            slots = slots + updates
        else:
            slots = self.gru(updates.flatten(0, 1), slots.flatten(0, 1)).view(slots.shape)
        hidden = self.norm_mlp(slots)
        for module in self.mlp if is_plain(self.mlp, nn.Sequential) else (self.mlp,):
            hidden = linear(module, hidden, backend)
        result: Tensor = slots + hidden
        return result

    def _check(
        self,
        inputs: Any,
        slots: Any,
        num_slots: Any,
        slot_mask: Any,
        input_mask: Any,
        return_attn: Any,
    ) -> int:
        """The number of slots of a call that fits."""
        checks.tensor(NAME, "inputs", inputs)
        symbols, weight = "(B, N, input_dim)", self.slots_mu
        checks.rank(NAME, "inputs", inputs, symbols)
        B, N = inputs.shape[:2]
        checks.shape(NAME, "inputs", inputs, symbols, (B, N, self.input_dim))
        checks.device(NAME, "inputs", inputs, "slots_mu", weight)
        dtypes = accepted_dtypes(inputs, weight.dtype)
        checks.dtype(NAME, "inputs", inputs, dtypes)
        if num_slots is not None:
            checks.count(NAME, "num_slots", num_slots)
        if slots is not None:
            checks.tensor(NAME, "slots", slots)
            checks.rank(NAME, "slots", slots, "(B, K, dim)")
            K: int = slots.shape[1] if num_slots is None else num_slots
            checks.shape(NAME, "slots", slots, "(B, K, dim)", (B, K, self.dim))
            checks.device(NAME, "slots", slots, "inputs", inputs)
            checks.dtype(NAME, "slots", slots, dtypes)
        else:
            K = self.num_slots if num_slots is None else num_slots
            if self.init == "learned" and self.num_slots < K:
                raise ValueError(
                    f"{NAME}: num_slots must be at most {self.num_slots}, as that many are learned, got {K}"
                )
        if slot_mask is not None:
            checks.mask(NAME, "slot_mask", slot_mask, "(B, K)", (B, K), inputs, "inputs")
        if input_mask is not None:
            checks.mask(NAME, "input_mask", input_mask, "(B, N)", (B, N), inputs, "inputs")
        checks.flag(NAME, "return_attn", return_attn)
        return K

    @classmethod
    def preset(cls, name: str, num_slots: int, dim: int, **options: Any) -> SlotAttention:
        """The layer as a well-known implementation has it: official, savi, lucidrains or slate.

        official: Locatello et al.'s TensorFlow code, whose layer normalisation has an eps of 1e-3. savi: Kipf et al.
        2022, an eps in the denominator, layer normalisation's 1e-6, one iteration a frame, MLP of 256. lucidrains: the
        PyTorch package slot-attention: biases in the projections, an MLP at least as wide as a slot. slate: Singh et
        al. 2022, a joint softmax where there are heads, an MLP as wide as a slot. options: any of the constructor's,
        which go before the preset's. Raises ValueError for another name.
        """
        return cls(num_slots, dim, **{**slot_attention_weights.preset(name, dim), **options})

    @classmethod
    def from_tensorflow(cls, arrays: Mapping[str, Any], *, num_slots: int = 7, **options: Any) -> SlotAttention:
        """A layer with the weights of the authors' TensorFlow code: see slot_attention_weights.from_tensorflow."""
        sizes, state = slot_attention_weights.from_tensorflow(arrays)
        return cls._loaded("official", num_slots, sizes, state, options)

    @classmethod
    def from_lucidrains(
        cls, state_dict: Mapping[str, Tensor], *, num_slots: int = 7, heads: int = 1, **options: Any
    ) -> SlotAttention:
        """A layer with the weights of the package slot-attention: see slot_attention_weights.from_lucidrains."""
        sizes, state = slot_attention_weights.from_lucidrains(state_dict, heads)
        return cls._loaded("lucidrains", num_slots, sizes, state, options)

    @classmethod
    def _loaded(
        cls, name: str, num_slots: int, sizes: dict[str, Any], state: dict[str, Tensor], options: dict[str, Any]
    ) -> SlotAttention:
        dtype = options.pop("dtype", state["slots_mu"].dtype)
        layer = cls.preset(name, num_slots, **{**sizes, **options}, dtype=dtype)
        layer.load_state_dict(state)
        return layer

    def extra_repr(self) -> str:
        options = [f"num_slots={self.num_slots}", f"dim={self.dim}"]
        if self.input_dim != self.dim:
            options.append(f"input_dim={self.input_dim}")
        options += changed_options(
            self, iters=3, mlp_dim=128, heads=1, eps=1e-8, eps_mode="add", temperature=1.0, head_softmax="slots",
            bias=False, ln_eps=1e-5, init="gaussian", update="gru", grad_mode="full", backend=None,
        )  # fmt: skip
        return ", ".join(options)


def _orthogonal(weight: Tensor) -> None:
    with torch.no_grad():  # torch has no QR decomposition of 16-bit numbers
        wide = weight.to(torch.promote_types(weight.dtype, torch.float32), copy=True)
        weight.copy_(nn.init.orthogonal_(wide))
