"""The author's other distributions of actions, which the project has no use for and the recordings need."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from actor import MIN_STD, Actor, TruncNormal, _density
from networks import LOG_2PI, Draws, in_float32

TANH_SCALE = 5.0  # soft limit on the mean before tanh
ENTROPY_SAMPLES = 100  # a squashed Gaussian has no closed entropy
ATANH_LIMIT = 0.99999997  # the author's


class ExactTruncNormal(TruncNormal):
    """The truncated normal whose samples have the gradient of its quantile function."""

    @torch.no_grad()
    def sample_gradients(self, action: Tensor) -> tuple[Tensor, Tensor]:
        # The quantile u of the sample stays fixed while the bounds move with loc and std.
        z = (action - self.loc) / self.std
        u = (torch.special.ndtr(z) - torch.special.ndtr(self.low)) / self.mass
        low, high = (1 - u) * _density(self.low), u * _density(self.high)
        return 1 - (low + high) / _density(z), z - (low * self.low + high * self.high) / _density(z)


class TanhNormal:
    """tanh of a normal with mean 5 tanh(out / 5) and std softplus(raw) + 0.1."""

    draws = Draws()  # for the entropy, which can only be estimated

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

    def entropy(self) -> Tensor:
        loc = self.loc.expand(ENTROPY_SAMPLES, *self.loc.shape)
        return -self._log_prob_before_tanh(loc + self.std * self.draws.normal(loc.detach())).mean(0)

    def _log_prob_before_tanh(self, x: Tensor) -> Tensor:
        z = (x - self.loc) / self.std
        log_slope = 2 * (math.log(2) - x - F.softplus(-2 * x))  # log d tanh(x) / dx
        return (-0.5 * (z.square() + LOG_2PI) - self.std.log() - log_slope).sum(-1)


class OneHot:
    """One of A discrete actions as a one-hot vector, with straight-through gradients."""

    def __init__(self, logit: Tensor):
        self.logit = logit.float()

    @property
    def mode(self) -> Tensor:
        return F.one_hot(self.logit.argmax(-1), self.logit.shape[-1]).to(self.logit.dtype)

    mean = mode  # an action is one of them, not a mixture

    def rsample(self, draws: Draws) -> Tensor:
        probs = self.logit.softmax(-1)
        return draws.onehot(probs.detach()) + (probs - probs.detach())

    def log_prob(self, action: Tensor) -> Tensor:
        return (action.detach() * self.logit.log_softmax(-1)).sum(-1)

    def entropy(self) -> Tensor:
        logp = self.logit.log_softmax(-1)
        return -(logp.exp() * logp).sum(-1)


class ExactActor(Actor):
    distribution: Any = ExactTruncNormal


class TanhActor(Actor):
    distribution: Any = TanhNormal


class OneHotActor(Actor):
    """Its distribution has one parameter."""

    distribution: Any = OneHot

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        del self.std

    def raw(self, feat: Tensor) -> tuple[Tensor]:
        return (in_float32(self.out, self.mlp(feat)),)


# By the author's name of the distribution, and of the gradient of truncated normals' samples.
ACTORS: dict[tuple[str, str], type[Actor]] = {
    ("trunc_normal", "straight_through"): Actor,
    ("trunc_normal", "exact"): ExactActor,
    ("tanh_normal", "straight_through"): TanhActor,
    ("onehot", "straight_through"): OneHotActor,
}
