"""RNN, LSTM and GRU: torch.nn's, on the ops of this package, with what torch.nn's do not have."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from recattn_kernels import backends, checks
from recattn_kernels.layers.gated_base import Gated, States
from recattn_kernels.layers.packing import Packed, Padded, check_reset, permute
from recattn_kernels.layers.tracing import Proxy, leaf


class Layer(Gated, nn.RNNBase):
    """What RNN, LSTM and GRU share: the forms of a batch, and the stack of layers and directions."""

    _first_weight_hh = "weight_hh_l0"

    def _suffixes(self) -> list[str]:
        directions = ("", "_reverse") if self.bidirectional else ("",)
        return [f"_l{k}{direction}" for k in range(self.num_layers) for direction in directions]

    def _weights_have_changed(self) -> bool:
        """torch.nn's answer, which looks up each weight twice through Module.__getattr__: 4 us a call."""
        parameters = self._parameters
        for ref, name in zip(self._flat_weight_refs, self._flat_weights_names, strict=True):
            if name not in parameters:  # a parametrisation has taken its place
                return bool(super()._weights_have_changed())  # type: ignore[no-untyped-call]
            weight = parameters[name]
            if ref is not None and weight is not None and ref() is not weight:
                return True
        return False

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: Any = None,
        *,
        lengths: Tensor | list[int] | None = None,
        reset: Tensor | None = None,
    ) -> Any:
        if isinstance(input, Proxy):
            return leaf(Layer.forward, self, input, hx=hx, lengths=lengths, reset=reset)
        name = self._vendor.__name__
        extras = ["lengths"] if lengths is not None else []
        if reset is not None:
            extras.append("reset")
        if isinstance(input, PackedSequence):
            if lengths is not None:
                raise ValueError(f"{name}: lengths must be None with a PackedSequence, which has its own")
            data, batch_sizes = input.data, input.batch_sizes
            states = self._states(hx, data)
            self._check(data, states, batch_sizes)  # which torch.nn.LSTM leaves out
            T, B = len(batch_sizes), int(batch_sizes[0])
            backend = self._backend(data, T, B, extras, packed=True)
            return super().forward(input, hx) if backend == "vendor" else self._packed(input, states, reset, backend)
        checks.tensor(name, "input", input)
        dim = input.dim()
        if dim not in (2, 3):
            tensor = " tensor" if self._op == "rnn" else ""
            raise ValueError(f"{name}: Expected input to be 2D or 3D, got {dim}D{tensor} instead")
        states = self._states(hx, input)
        T = input.shape[1 if self.batch_first and dim == 3 else 0]
        B = 1 if dim == 2 else input.shape[0 if self.batch_first else 1]
        backend = self._backend(input, T, B, extras)
        if backend == "vendor":
            plain = states is None and dim == 3 and self._passes_checks(input)
            return self._kernel(input, B) if plain else super().forward(input, hx)
        for s in states or ():
            if s.dim() != dim:
                batched, what = "batched" if dim == 3 else "unbatched", "hx and cx" if len(states or ()) == 2 else "hx"
                got = ", ".join(f"{s.dim()}-D" for s in states or ())
                got = f"({got}) tensors" if what != "hx" else f"{got} tensor"
                raise RuntimeError(f"For {batched} {dim}-D input, {what} should also be {dim}-D but got {got}")
        if dim == 3:
            return self._padded(input, states, lengths, reset, backend)
        if lengths is not None:
            raise ValueError(f"{name}: lengths must be None with unbatched input, got {lengths!r}")
        if reset is not None:
            check_reset(name, reset, T, None, self.batch_first, input)
        batch_dim = 0 if self.batch_first else 1
        output, last = self._padded(
            input.unsqueeze(batch_dim),
            None if states is None else tuple(s.unsqueeze(1) for s in states),
            None,
            None if reset is None else reset.unsqueeze(batch_dim),
            backend,
        )
        hidden = tuple(s.squeeze(1) for s in last) if isinstance(last, tuple) else last.squeeze(1)
        return output.squeeze(batch_dim), hidden

    # Of one step of one row torch.nn's forward takes half as long again as its kernel, for checks that nearly every
    # call passes. Calls that may not pass, and those that are recorded, take torch.nn's own way.
    def _passes_checks(self, input: Tensor) -> bool:
        if torch.compiler.is_compiling() or backends.tracing() or input.shape[2] != self.input_size:
            return False
        self._update_flat_weights()
        weight = self._flat_weights[0]
        return weight is not None and weight.dtype == input.dtype

    def _kernel(self, input: Tensor, B: int) -> tuple[Tensor, Any]:
        layers = 2 * self.num_layers if self.bidirectional else self.num_layers
        hx: Any = input.new_zeros(layers, B, self.proj_size or self.hidden_size)
        if is_lstm := self._op == "lstm":
            hx = (hx, input.new_zeros(layers, B, self.hidden_size))
        result = getattr(torch, self.mode.lower())(
            input, hx, self._flat_weights, self.bias, self.num_layers, self.dropout, self.training, self.bidirectional,
            self.batch_first,
        )  # fmt: skip
        return result[0], result[1:] if is_lstm else result[1]

    def _padded(
        self, input: Tensor, states: States | None, lengths: Any, reset: Tensor | None, backend: str
    ) -> tuple[Tensor, Any]:
        self._check(input, states, None)
        name = self._vendor.__name__
        B, T = input.shape[:2] if self.batch_first else (input.shape[1], input.shape[0])
        if reset is not None:
            check_reset(name, reset, T, B, self.batch_first, input)
        if lengths is not None:
            lengths = checks.lengths(name, lengths, B, T, input, "input")
        batch = Padded(input, self.batch_first, lengths)
        # Zeros past the lengths, so that nothing which lies there gets into the gradient of weight_ih.
        return self._stack(batch.zero_padding(input), states, reset, batch, backend)

    def _packed(
        self, input: PackedSequence, states: States | None, reset: Tensor | None, backend: str
    ) -> tuple[PackedSequence, Any]:
        data, batch_sizes, order, inverse = input
        batch = Packed(batch_sizes)
        if reset is not None:
            check_reset(self._vendor.__name__, reset, batch.T, batch.B, self.batch_first, data)
            reset = permute(reset.transpose(0, 1) if self.batch_first else reset, order, 1)
        if states is not None and order is not None:
            states = tuple(s.index_select(1, order) for s in states)
        output, hidden = self._stack(data, states, reset, batch, backend)
        return PackedSequence(output, batch_sizes, order, inverse), self.permute_hidden(hidden, inverse)

    def _check(self, input: Tensor, states: States | None, batch_sizes: Tensor | None) -> None:
        """torch.nn's checks of shapes and of input's dtype."""
        if not torch.compiler.is_compiling():
            self._update_flat_weights()  # torch.nn's cached list, of which the dtype is looked at
        if states is None:
            self.check_input(input, batch_sizes)
        else:
            hx: Any = states if self._op == "lstm" else states[0]
            self.check_forward_args(input, hx, batch_sizes)
        weight_ih: Tensor = getattr(self, "weight_ih_l0")  # noqa: B009  (to mypy self.weight_ih_l0 may be a Module)
        checks.device(self._vendor.__name__, "input", input, "weight_ih_l0", weight_ih)

    def _stack(
        self, x: Tensor, states: States | None, reset: Tensor | None, batch: Padded | Packed, backend: str
    ) -> tuple[Tensor, Any]:
        """All layers over x (..., D), in the form of batch: the output, and h_n or (h_n, c_n)."""
        suffixes = self._suffixes()
        directions = 2 if self.bidirectional else 1
        last: list[States] = []
        for k in range(self.num_layers):
            outputs = []
            for suffix in suffixes[k * directions : (k + 1) * directions]:
                first = None if states is None else tuple(s[len(last)] for s in states)
                output, final = self._recurrence(x, suffix, first, backend, batch, reset)
                outputs.append(output)
                last.append(final)
            x = torch.cat(outputs, -1) if self.bidirectional else outputs[0]
            if self.dropout > 0 and k < self.num_layers - 1:
                x = F.dropout(x, self.dropout, self.training)
        hidden = tuple(torch.stack(s) for s in zip(*last, strict=True))
        return x, hidden if self._op == "lstm" else hidden[0]


class RNN(Layer, nn.RNN):
    r"""torch.nn.RNN on the ops of this package: layers of simple recurrent networks over whole sequences.

    .. math:: h_t = \mathrm{act}(W_{ih} x_t + b_{ih} + W_{hh} h_{t-1} + b_{hh})

    The constructor's arguments, the call, what it returns, the parameters' names and their initialisation are
    torch.nn.RNN's, and an RNN is a torch.nn.RNN. Only what is added is described here; all of it is by keyword alone.

    Args:
        layer_norm: normalises W_ih x and W_hh h, each over its H features, before the biases are added (eps 1e-5). Adds
            the parameters ln_ih_weight_l{k}, ln_ih_bias_l{k}, ln_hh_weight_l{k} and ln_hh_bias_l{k}, each (H,), with
            the suffix _reverse in the second direction; weights start at 1, biases at 0.
        zoneout: the probability z that a unit keeps its old state in a step, in training; else the new state is
            z * old + (1 - z) * new.
        recurrent_dropout: the probability that an element of weight_hh is dropped, in training: one mask a call for
            each layer and direction, the same in all steps.
        grad_clip: in the backward, clamps dL/dh_t of every step to [-grad_clip, grad_clip].
        backend: auto, vendor (torch.nn's own kernels, which know no option of these), reference, cpp, triton or cuda;
            None takes that of use_backend(), else of RECATTN_BACKEND.

    Inputs: input and hx, as torch.nn.RNN takes them: batched, unbatched, or a PackedSequence; and by keyword
        lengths: (B,), the valid steps of each row, 0 to T: a list, or an int64 tensor. What input holds past them is
            not used, output is 0 there, h_n is the state at each row's end. Not with a PackedSequence, nor unbatched.
        reset: bool (T, B), or (B, T) under batch_first; (T,) unbatched. Where True, the row's states are zeroed before
            that step is taken. With a PackedSequence it is padded, in the order of the rows before packing.

    Returns: output and h_n, as torch.nn.RNN.

    Under autocast the results have the dtypes of torch.nn's: 16 bits, but float32 in a GRU and a packed LSTM on a CPU.
    Inside a function given to torch.compile, every torch.nn.RNN breaks the graph unless torch._dynamo.config.allow_rnn
    is set, and so this one. To torch.fx.symbolic_trace it is one node, as torch.nn.RNN; with hooks, or where a class
    derived from it has its own forward, only by a Tracer whose is_leaf_module says so.

    Raises:
        What torch.nn.RNN raises where it checks; ValueError, TypeError otherwise, naming the argument.
        BackendUnavailableError: the backend asked for cannot run the call.

    Sources: Elman, "Finding structure in time", 1990; zoneout: Krueger et al., arXiv:1606.01305; layer normalisation:
    Ba, Kiros and Hinton, arXiv:1607.06450; recurrent_dropout: Merity, Keskar and Socher, arXiv:1708.02182.
    """

    _op = "rnn"
    _vendor = nn.RNN

    @property
    def _cell(self) -> str:
        return self.mode.lower()

    @torch.no_grad()
    def irnn_(self) -> RNN:
        """Initialises in place as an IRNN: W_hh the identity, biases 0, W_ih in N(0, 0.001). Returns self.

        Raises ValueError unless nonlinearity is relu: with it the state is then kept as it is until input changes it.

        Source: Le, Jaitly and Hinton, "A simple way to initialize recurrent networks of rectified linear units", 2015,
        arXiv:1504.00941.
        """
        if self.mode != "RNN_RELU":
            raise ValueError(f"RNN: irnn_ needs nonlinearity='relu', got {self.nonlinearity!r}")
        for suffix in self._suffixes():
            nn.init.normal_(getattr(self, "weight_ih" + suffix), std=0.001)
            nn.init.eye_(getattr(self, "weight_hh" + suffix))
            if self.bias:
                nn.init.zeros_(getattr(self, "bias_ih" + suffix))
                nn.init.zeros_(getattr(self, "bias_hh" + suffix))
        return self


class LSTM(Layer, nn.LSTM):
    r"""torch.nn.LSTM on the ops of this package: layers of long short-term memory over whole sequences.

    .. math::
        (i, f, g, o) &= W_{ih} x_t + b_{ih} + W_{hh} h_{t-1} + b_{hh} \\
        c_t &= \sigma(f) \odot c_{t-1} + \sigma(i) \odot \tanh(g) \\
        h_t &= \sigma(o) \odot \tanh(c_t), \quad \text{with proj\_size} \quad h_t = W_{hr} (\sigma(o) \odot \tanh(c_t))

    The constructor's arguments, the call, what it returns, the parameters' names and their initialisation are
    torch.nn.LSTM's, and an LSTM is a torch.nn.LSTM. What is added is that of :class:`RNN`, all of it by keyword; here

    Args:
        layer_norm: normalises W_ih x and W_hh h, each over its 4H features, and c_t over its H before the tanh of h_t.
            Parameters as the RNN's, (4H,), and ln_c_weight_l{k} and ln_c_bias_l{k}, (H,).
        zoneout: a probability for h, or a pair of them for h and c. The new h is that of c_t before zoneout.
        grad_clip: also clamps dL/dc_t as it comes from the later steps.
        backend: with proj_size > 0, vendor and reference alone.

    Shapes: input (T, B, D), with batch_first (B, T, D), unbatched (T, D), or a PackedSequence; output alike, with H in
    the place of D, 2H if bidirectional; h and c (num_layers * directions, B, H). In output and h proj_size, if there is
    one, stands for H.

    Raises: what torch.nn.LSTM raises where it checks, otherwise what :class:`RNN` raises.

    Sources: Hochreiter and Schmidhuber, "Long short-term memory", 1997; Gers, Schmidhuber and Cummins, "Learning to
    forget", 2000; proj_size: Sak, Senior and Beaufays, arXiv:1402.1128; the options': see :class:`RNN`.
    """

    _op = "lstm"
    _vendor = nn.LSTM


class GRU(Layer, nn.GRU):
    r"""torch.nn.GRU on the ops of this package: layers of gated recurrent units over whole sequences.

    .. math::
        r &= \sigma(W_{ir} x_t + b_{ir} + W_{hr} h_{t-1} + b_{hr}) \\
        z &= \sigma(W_{iz} x_t + b_{iz} + W_{hz} h_{t-1} + b_{hz}) \\
        n &= \tanh(W_{in} x_t + b_{in} + r \odot (W_{hn} h_{t-1} + b_{hn})) \\
        h_t &= (1 - z) \odot n + z \odot h_{t-1}

    The constructor's arguments, the call, what it returns, the parameters' names and their initialisation are
    torch.nn.GRU's, and a GRU is a torch.nn.GRU. What is added is that of :class:`RNN`, all of it by keyword; layer_norm
    normalises over 3H features, and its parameters are (3H,).

    Shapes: input (T, B, D), with batch_first (B, T, D), unbatched (T, D), or a PackedSequence; output alike, with H in
    the place of D, 2H if bidirectional; h (num_layers * directions, B, H).

    Raises: what torch.nn.GRU raises where it checks, otherwise what :class:`RNN` raises.

    Sources: Cho et al., "Learning phrase representations using RNN encoder-decoder for statistical machine
    translation", 2014, arXiv:1406.1078; the options': see :class:`RNN`.
    """

    _op = "gru"
    _vendor = nn.GRU
    _promotes = True
