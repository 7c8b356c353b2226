"""The policy: feat -> distribution over actions in [-1, 1], and those distributions.

Gradients are those of the author's TensorFlow code. Shapes: the legend is in train.py.
"""

import abc
import math
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from networks import LOG_2PI, MLP, Draws, in_float32, init_weights

MIN_STD = 0.1
SAMPLE_MARGIN = 1e-6  # samples of the truncated normal keep this far from its bounds
TANH_SCALE = 5.0  # soft limit on the mean before tanh
ENTROPY_SAMPLES = 100  # a squashed Gaussian has no closed entropy
ATANH_LIMIT = 0.99999997  # the author's


class ActionDistribution(abc.ABC):
    """A distribution over actions (..., A), built from the outputs (..., A) of the actor's last layers, `layers`."""

    layers: ClassVar[tuple[str, ...]] = ("out", "std")

    @abc.abstractmethod
    def __init__(self, *raw: Tensor): ...

    @property
    @abc.abstractmethod
    def mode(self) -> Tensor:
        """The likeliest action (..., A)."""

    @property
    @abc.abstractmethod
    def mean(self) -> Tensor:
        """The action (..., A) that samples are on average."""

    @abc.abstractmethod
    def rsample(self, draws: Draws) -> Tensor:
        """A sample (..., A) that carries a gradient to the raw outputs."""

    @abc.abstractmethod
    def log_prob(self, action: Tensor) -> Tensor:
        """Log-density of `action` (..., A), summed over A: (...)."""

    @abc.abstractmethod
    def entropy(self, draws: Draws) -> Tensor:
        """Entropy in nats, summed over A: (...). `draws` serves distributions that can only estimate it."""


class TruncNormal(ActionDistribution):
    """Normal around tanh(out), std in (0.1, 2.1), cut to [-1, 1] and renormalized there.

    The gradient of a sample is straight-through, as in the author's library: da/dloc = 1, da/dstd = (a - loc)/std.
    It would be exact if the bounds moved and widened with the normal.
    """

    def __init__(self, out: Tensor, raw_std: Tensor):
        self.loc = torch.tanh(out.float())
        self.std = 2 * (raw_std.float() / 2).sigmoid() + MIN_STD
        self.low, self.high = (-1 - self.loc) / self.std, (1 - self.loc) / self.std
        self.mass = torch.special.ndtr(self.high) - torch.special.ndtr(self.low)

    @property
    def mode(self) -> Tensor:
        return self.loc

    @property
    def mean(self) -> Tensor:
        """The mean is further inside than the mode, the more so the wider the distribution is."""
        return self.loc + self.std * (_density(self.low) - _density(self.high)) / self.mass

    def rsample(self, draws: Draws) -> Tensor:
        loc, std = self.loc.detach(), self.std.detach()
        action = draws.trunc_normal(loc, std).clamp(-1 + SAMPLE_MARGIN, 1 - SAMPLE_MARGIN)
        dloc, dstd = self.sample_gradients(action)
        return action + dloc * (self.loc - loc) + dstd * (self.std - std)  # the added terms are zero

    @torch.no_grad()
    def sample_gradients(self, action: Tensor) -> tuple[Tensor, Tensor]:
        """Derivatives of a sample (..., A) by loc and std, elementwise."""
        z = (action - self.loc) / self.std
        return torch.ones_like(z), z

    def log_prob(self, action: Tensor) -> Tensor:
        z = (action - self.loc) / self.std
        return (-0.5 * (z.square() + LOG_2PI) - self.std.log() - self.mass.log()).sum(-1)

    def entropy(self, draws: Draws) -> Tensor:
        bounds = (self.low * _density(self.low) - self.high * _density(self.high)) / (2 * self.mass)
        return (0.5 * (1 + LOG_2PI) + (self.std * self.mass).log() + bounds).sum(-1)


class ExactTruncNormal(TruncNormal):
    """The truncated normal whose samples have the gradient of its quantile function."""

    @torch.no_grad()
    def sample_gradients(self, action: Tensor) -> tuple[Tensor, Tensor]:
        # The quantile u of the sample stays fixed while the bounds move with loc and std.
        z = (action - self.loc) / self.std
        u = (torch.special.ndtr(z) - torch.special.ndtr(self.low)) / self.mass
        low, high = (1 - u) * _density(self.low), u * _density(self.high)
        return 1 - (low + high) / _density(z), z - (low * self.low + high * self.high) / _density(z)


class TanhNormal(ActionDistribution):
    """tanh of a normal with mean 5 tanh(out / 5) and std softplus(raw) + 0.1."""

    def __init__(self, out: Tensor, raw_std: Tensor):
        self.loc = TANH_SCALE * torch.tanh(out.float() / TANH_SCALE)
        self.std = F.softplus(raw_std.float()) + MIN_STD

    @property
    def mode(self) -> Tensor:
        """tanh of the normal's mean: the median, which stands in for the mode, and for the mean."""
        return torch.tanh(self.loc)

    mean = mode

    def rsample(self, draws: Draws) -> Tensor:
        return torch.tanh(self.loc + self.std * draws.normal(self.loc.detach()))

    def log_prob(self, action: Tensor) -> Tensor:
        return self._log_prob_before_tanh(torch.atanh(action.clamp(-ATANH_LIMIT, ATANH_LIMIT)))

    def entropy(self, draws: Draws) -> Tensor:
        loc = self.loc.expand(ENTROPY_SAMPLES, *self.loc.shape)
        return -self._log_prob_before_tanh(loc + self.std * draws.normal(loc.detach())).mean(0)

    def _log_prob_before_tanh(self, x: Tensor) -> Tensor:
        z = (x - self.loc) / self.std
        log_slope = 2 * (math.log(2) - x - F.softplus(-2 * x))  # log d tanh(x) / dx
        return (-0.5 * (z.square() + LOG_2PI) - self.std.log() - log_slope).sum(-1)


def _density(z: Tensor) -> Tensor:
    """Of the standard normal."""
    return torch.exp(-0.5 * (z.square() + LOG_2PI))


DISTRIBUTIONS: dict[str, type[ActionDistribution]] = {"trunc_normal": TruncNormal, "tanh_normal": TanhNormal}
EXACT: dict[type[ActionDistribution], type[ActionDistribution]] = {TruncNormal: ExactTruncNormal}


class Actor(nn.Module):
    """feat (..., F) -> action distribution over (..., A).

    Args:
        dist: name of the distribution in DISTRIBUTIONS.
        sample_gradient: see `Config.trunc_normal_gradient`; distributions with only one gradient ignore it.
    """

    def __init__(self, feat_size: int, action_size: int, layers: int, units: int, dist: str, sample_gradient: str):
        super().__init__()
        self.action_size = action_size
        self.distribution = DISTRIBUTIONS[dist]
        if sample_gradient == "exact":
            self.distribution = EXACT.get(self.distribution, self.distribution)
        self.mlp = MLP(feat_size, layers, units)
        for name in self.distribution.layers:
            self.add_module(name, nn.Linear(self.mlp.size, action_size))
        self.apply(init_weights)

    def forward(self, feat: Tensor) -> ActionDistribution:
        """(..., F) -> distribution over actions (..., A)."""
        return self.distribution(*self.raw(feat))

    def raw(self, feat: Tensor) -> tuple[Tensor, ...]:
        """The raw outputs (..., A) of the distribution's layers; `distribution` takes those of many steps stacked."""
        x = self.mlp(feat)
        return tuple(in_float32(self.get_submodule(name), x) for name in self.distribution.layers)
