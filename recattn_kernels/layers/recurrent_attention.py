"""RecurrentAttention: a classifier that looks at an image glimpse by glimpse, and the loss that trains it."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recattn_kernels import backends, checks
from recattn_kernels.layers.autocast import autocasts
from recattn_kernels.layers.gated_cell import LSTMCell, RNNCell
from recattn_kernels.layers.glimpse import COMBINATIONS, GlimpseNetwork, height_and_width
from recattn_kernels.layers.options import changed_options, from_generator
from recattn_kernels.layers.tracing import Proxy, leaf, savable, unscriptable
from recattn_kernels.ops.glimpse.api import glimpse as take_glimpse
from recattn_kernels.ops.glimpse.contract import IMAGE_DTYPES

CORES = ("rnn", "lstm")


@savable
class RecurrentAttentionOutput(NamedTuple):
    """What RecurrentAttention returns; see there."""

    logits: Tensor
    locations: Tensor
    log_probs: Tensor
    baselines: Tensor
    glimpses: Tensor
    steps: Tensor


def reinforce_loss(output: RecurrentAttentionOutput, target: Tensor, *, glimpse_cost: float = 0.0) -> Tensor:
    r"""The hybrid loss of Mnih et al. (2014): supervised for what is named, REINFORCE for where to look.

    .. math::
        L = \frac{1}{N} \sum_n \Big( -\log p(y) + \sum_t \big[ -\log\pi_t\, (R_t - b_t) + (R_t - b_t)^2 \big] \Big),
        \quad R_t = [\arg\max = y] - \mathrm{cost} \cdot (\mathrm{steps} - t)

    over all N images and samples, and for each over the glimpses t that it took, counted from 0. In the second term
    R - b is a constant; the third trains the baseline alone.

    Args:
        output: what :class:`RecurrentAttention` returned in training.
        target: (B,) int64, the right class of each image.
        glimpse_cost: what a glimpse costs, beside the 1 that a right answer earns: with stop=True the reason to stop.
            Without, where all take as many, the baselines learn it and nothing else changes.

    Returns: the loss, a scalar of the baselines' dtype. Nothing is read by the host.

    Raises: ValueError, TypeError: for arguments that do not fit; the message names the argument.

    Source: Mnih et al., "Recurrent Models of Visual Attention", NIPS 2014; REINFORCE: Williams, 1992.
    """
    logits, log_probs, baselines, steps = output.logits, output.log_probs, output.baselines, output.steps
    checks.tensor("reinforce_loss", "target", target)
    checks.shape("reinforce_loss", "target", target, "(B,)", (logits.shape[-2],))
    checks.dtype("reinforce_loss", "target", target, (torch.int64,))
    checks.device("reinforce_loss", "target", target, "output", logits)
    checks.number("reinforce_loss", "glimpse_cost", glimpse_cost)
    target = target.expand(logits.shape[:-1])  # (samples, B) or (B,)
    supervised = F.cross_entropy(logits.to(baselines.dtype).flatten(0, -2), target.flatten())

    t = torch.arange(baselines.shape[-1], device=steps.device)
    left = (steps.unsqueeze(-1) - t).to(baselines.dtype)  # an int64 times glimpse_cost has torch's default dtype
    reward = (logits.detach().argmax(-1) == target).to(baselines.dtype).unsqueeze(-1)
    error = torch.where(left > 0, reward - glimpse_cost * left - baselines, 0)
    return supervised + (error.square() - log_probs * error.detach()).sum(-1).mean()


class RecurrentAttention(nn.Module):
    r"""The recurrent attention model of Mnih et al. (2014): few glimpses of an image, then its class.

    .. math::
        l_t &\sim N(W_l h_{t-1} + b_l, \mathrm{std}^2), \quad h_0 = 0 \\
        g_t &= \mathrm{GlimpseNetwork}(\mathrm{glimpse}(\mathrm{image}, l_t), l_t) \\
        h_t &= \mathrm{ReLU}(W_{hh} h_{t-1} + b_{hh} + W_{ih} g_t + b_{ih}), \text{ or an LSTM's}

    and logits = W_a h_T + b_a. In training locations are drawn, in evaluation they are their mean. They are fed back
    detached, and the networks of location, baseline and stopping read h detached: no gradient of the classification
    goes through where it looked, and none of REINFORCE into what it saw; see :func:`reinforce_loss`, which is also the
    method reinforce_loss.

    Args:
        num_classes: what there is to name.
        channels: C, of the images.
        glimpse_size: cells of a patch, g or (gh, gw).
        scales: S, patches of a glimpse, each scale_factor times as wide as the one before.
        num_glimpses: T, glimpses of an image; with stop=True at most.
        scale_factor: see :class:`GlimpseSensor`.
        hidden_size: of the core and of the glimpse's vector.
        core: "rnn", with ReLU, or "lstm".
        glimpse: "additive" or "multiplicative"; see :class:`GlimpseNetwork`.
        location_std: std, in units of half the image's side.
        learn_std: makes the std of either coordinate a parameter, which starts there.
        stop: after each glimpse the model may stop and answer. In training it draws whether to, by the probability
            sigmoid(W_s h_t + b_s); in evaluation it stops where that is above 1/2.
        backend: auto, reference, cpp or triton, of the glimpses and of the core; None takes that of use_backend(), else
            of RECATTN_BACKEND.

    Inputs:
        image: (B, C, H, W), any H and W, floating or uint8, which is divided by 255.
        samples: M, the paths drawn for each image; their glimpses are one launch.
        generator: where the locations are drawn from; the device's default when None.

    Returns: a named tuple; with samples > 1 everything in it has a leading dimension (M, ...).
        logits: (B, num_classes), of the parameters' dtype.
        locations: (B, T, 2), the x and y of every glimpse, detached; in [-1, 1] where the centre is in the image.
            float32 (float64 with a float64 image).
        log_probs: (B, T), log density of each location, and of the decision to stop after it where there is one:
            float32 (float64 for float64 parameters), as is baselines.
        baselines: (B, T), what was expected of h_{t-1} to be earned from glimpse t on.
        glimpses: (B, T, S, C, gh, gw), what was seen, of the parameters' dtype.
        steps: (B,) int64, the glimpses taken, T without stop. Everything above is 0 at later ones.

    A training step waits for nothing on the host, so that it can be replayed as a CUDA graph: a stopped row's steps are
    computed and left unused.

    Raises:
        ValueError, TypeError: for arguments that do not fit; the message names the argument.
        BackendUnavailableError: the backend asked for cannot run the call.

    Parameters: those of glimpse_network, core, locator, baseline, classifier, with stop stopper, with learn_std
    log_std (2,).

    Gradients: from logits to the classifier, core, glimpse network and image; from log_probs to locator, log_std and
    stopper; from baselines to baseline.

    Source: Mnih et al., "Recurrent Models of Visual Attention", NIPS 2014. That the first location too is the policy's,
    of h_0 = 0, is ours: the paper does not say where it looks first.
    """

    reinforce_loss = staticmethod(reinforce_loss)

    __prepare_scriptable__ = unscriptable

    def __init__(
        self,
        num_classes: int,
        channels: int = 1,
        glimpse_size: int | tuple[int, int] = 8,
        scales: int = 1,
        num_glimpses: int = 6,
        *,
        scale_factor: float = 2.0,
        hidden_size: int = 256,
        core: str = "rnn",
        glimpse: str = "additive",
        location_std: float = 0.1,
        learn_std: bool = False,
        stop: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        for name, value in (
            ("num_classes", num_classes), ("channels", channels), ("scales", scales), ("num_glimpses", num_glimpses),
            ("hidden_size", hidden_size),
        ):  # fmt: skip
            checks.count("RecurrentAttention", name, value)
        height_and_width("RecurrentAttention", "glimpse_size", glimpse_size)
        checks.positive("RecurrentAttention", "scale_factor", scale_factor)
        checks.choice("RecurrentAttention", "core", core, CORES)
        checks.choice("RecurrentAttention", "glimpse", glimpse, COMBINATIONS)
        checks.positive("RecurrentAttention", "location_std", location_std)
        for name, flag in (("learn_std", learn_std), ("stop", stop)):
            checks.flag("RecurrentAttention", name, flag)
        backends.requested("RecurrentAttention", backend)
        self.num_classes = num_classes
        self.channels = channels
        self.glimpse_size = glimpse_size
        self.scales = scales
        self.num_glimpses = num_glimpses
        self.scale_factor = scale_factor
        self.hidden_size = hidden_size
        self.core_type = core
        self.glimpse = glimpse
        self.location_std = location_std
        self.learn_std = learn_std
        self.stop = stop
        self.backend = backend

        def linear(width: int) -> nn.Linear:
            return nn.Linear(hidden_size, width, device=device, dtype=dtype)

        self.glimpse_network = GlimpseNetwork(
            channels, glimpse_size, scales, hidden_size, glimpse=glimpse, device=device, dtype=dtype
        )
        self.core: RNNCell | LSTMCell
        if core == "rnn":
            self.core = RNNCell(
                hidden_size, hidden_size, nonlinearity="relu", backend=backend, device=device, dtype=dtype
            )
        else:
            self.core = LSTMCell(hidden_size, hidden_size, backend=backend, device=device, dtype=dtype)
        self.locator = linear(2)
        self.baseline = linear(1)
        self.classifier = linear(num_classes)
        self.stopper = linear(1) if stop else None
        self.log_std = nn.Parameter(torch.empty(2, device=device, dtype=dtype)) if learn_std else None
        self._initialise_policy()

    def _initialise_policy(self) -> None:
        if self.log_std is not None:
            nn.init.constant_(self.log_std, math.log(self.location_std))
        if self.stopper is not None:
            # It stops with probability 1 / (1 + T): from 1/2 on it would hardly ever learn from a later glimpse.
            nn.init.constant_(self.stopper.bias, -math.log(self.num_glimpses))

    def reset_parameters(self) -> None:
        """torch.nn's initialisation of every part, but for the std, and the bias of stopper, -log(num_glimpses)."""
        for module in self.children():
            module.reset_parameters()  # type: ignore[operator]
        self._initialise_policy()

    def forward(
        self, image: Tensor, *, samples: int = 1, generator: torch.Generator | None = None
    ) -> RecurrentAttentionOutput:
        if isinstance(image, Proxy):
            return leaf(RecurrentAttention.forward, self, image, samples=samples, generator=generator)
        self._check(image, samples)
        B, M, T = image.shape[0], samples, self.num_glimpses
        weight = self.classifier.weight
        seen_dtype = torch.get_autocast_dtype(image.device.type) if autocasts(image) else weight.dtype
        loc_dtype = torch.float64 if image.dtype == torch.float64 else torch.float32
        noise = chance = None
        if self.training:
            drawn = {**from_generator(generator), "device": image.device, "dtype": loc_dtype}
            noise = torch.randn(T, B * M, 2, **drawn)
            if self.stop:
                chance = torch.rand(T, B * M, **drawn)
        std = self._log_std(weight).detach().to(loc_dtype).exp()

        h = c = weight.new_zeros(B * M, self.hidden_size)
        taking = torch.ones(B * M, dtype=torch.bool, device=image.device)
        states: list[Tensor] = []
        locations: list[Tensor] = []
        glimpses: list[Tensor] = []
        taken: list[Tensor] = []
        stops: list[Tensor] = []
        for t in range(T):
            # Not under no_grad: autocast would keep the weights' copies, and use them without gradient further down.
            loc = self.locator(h.detach()).detach().to(loc_dtype)  # (B * M, 2)
            if noise is not None:
                loc = loc + std * noise[t]
            seen = take_glimpse(
                image, loc.view(B, M, 2), self.glimpse_size, scales=self.scales, scale_factor=self.scale_factor,
                dtype=seen_dtype, backend=self.backend,
            ).flatten(0, 1)  # fmt: skip
            if image.dtype == torch.uint8:
                seen = seen / 255
            states.append(h.detach())
            locations.append(loc)
            glimpses.append(seen)
            taken.append(taking)

            h_next, c_next = self._step(self.glimpse_network(seen, loc), h, c)
            if self.stopper is None:
                h, c = h_next, c_next
                continue
            active = taking.unsqueeze(1)
            h, c = torch.where(active, h_next, h), torch.where(active, c_next, c)
            odds = self.stopper(h.detach()).detach().squeeze(1)
            stops.append(odds > 0 if chance is None else chance[t] < odds.to(loc_dtype).sigmoid())
            taking = taking & ~stops[-1]

        was_taken = torch.stack(taken)  # (T, B * M)
        before = torch.stack(states)
        precise = torch.promote_types(weight.dtype, torch.float32)

        def result(part: Tensor) -> Tensor:
            """(T, B * M, ...) as ([M,] B, T, ...), 0 where no glimpse was taken."""
            if self.stop:
                part = torch.where(was_taken.view(T, B * M, *[1] * (part.dim() - 2)), part, 0)
            return by_sample(part.transpose(0, 1))

        def by_sample(part: Tensor) -> Tensor:
            """(B * M, ...) as (M, B, ...), or (B, ...) for one sample."""
            return part if M == 1 else part.unflatten(0, (B, M)).transpose(0, 1)

        where = torch.stack(locations)
        return RecurrentAttentionOutput(
            logits=by_sample(self.classifier(h)),
            locations=result(where),
            log_probs=result(self._log_probs(before, where, stops).to(precise)),
            baselines=result(self.baseline(before).squeeze(-1).to(precise)),
            glimpses=result(torch.stack(glimpses)),
            steps=by_sample(was_taken.sum(0)),
        )

    def _step(self, g: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        """The core's next state; an "rnn" has no c."""
        if isinstance(self.core, LSTMCell):
            h, c = self.core(g, (h, c))
            return h, c
        return self.core(g, h), c

    def _log_std(self, like: Tensor) -> Tensor:
        if self.log_std is None:
            return torch.full((2,), math.log(self.location_std), dtype=torch.float64, device=like.device)
        return self.log_std

    def _log_probs(self, before: Tensor, locations: Tensor, stops: list[Tensor]) -> Tensor:
        """(T, N), of locations (T, N, 2), drawn in states before (T, N, H), and of the decisions to stop after them.

        In one piece, which is cheaper than glimpse by glimpse.
        """
        mean = self.locator(before).to(locations.dtype)
        log_std = self._log_std(mean).to(mean.dtype)
        z = (locations - mean) * torch.exp(-log_std)
        log_probs: Tensor = -(0.5 * z.square() + log_std + 0.5 * math.log(2 * math.pi)).sum(-1)
        if self.stopper is None or len(before) == 1:
            return log_probs
        # After the last glimpse there is nothing to decide.
        odds = self.stopper(before[1:]).squeeze(-1).to(mean.dtype)
        stopped = torch.stack(stops[:-1])
        return log_probs + F.pad(F.logsigmoid(torch.where(stopped, odds, -odds)), (0, 0, 0, 1))

    def _check(self, image: Tensor, samples: int) -> None:
        checks.tensor("RecurrentAttention", "image", image)
        checks.rank("RecurrentAttention", "image", image, "(B, C, H, W)")
        checks.width("RecurrentAttention", "image", image, "(B, C, H, W)", "C = channels", self.channels, dim=1)
        checks.dtype("RecurrentAttention", "image", image, IMAGE_DTYPES)
        checks.device("RecurrentAttention", "image", image, "classifier.weight", self.classifier.weight)
        checks.count("RecurrentAttention", "samples", samples)

    def extra_repr(self) -> str:
        options = changed_options(
            self, channels=1, glimpse_size=8, scales=1, num_glimpses=6, scale_factor=2.0, hidden_size=256
        )
        if self.core_type != "rnn":  # self.core is the module
            options.append(f"core={self.core_type!r}")
        options += changed_options(
            self, glimpse="additive", location_std=0.1, learn_std=False, stop=False, backend=None
        )
        return ", ".join([str(self.num_classes), *options])
