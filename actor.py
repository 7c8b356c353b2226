"""The policy: feat -> distribution over actions in [-1, 1] (or one-hot), and those distributions.

Each distribution has `rsample(draws)`, `log_prob(action)`, `entropy(draws)`, `mode` and `mean`, with gradients as the
author's TensorFlow code has them. Shapes: raw and action (..., A); log_prob and entropy (...), summed over A.
"""

import math

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from networks import LOG_2PI, MLP, Draws, init_weights

MIN_STD = 0.1
SAMPLE_MARGIN = 1e-6  # samples of the truncated normal keep this far from its bounds
TANH_SCALE = 5.0  # soft limit on the mean before tanh
ENTROPY_SAMPLES = 100  # a squashed Gaussian has no closed entropy
ATANH_LIMIT = 0.99999997

DISTRIBUTIONS = ("trunc_normal", "tanh_normal", "onehot")
TRUNC_NORMAL_GRADIENTS = ("straight_through", "exact")


class TruncNormal:
    """Normal around tanh(out), std in (0.1, 2.1), cut to [-1, 1] and renormalised there.

    The gradient of a sample is `straight_through` as in the author's library (da/dloc = 1, da/dstd = (a - loc)/std:
    the bounds' movement relative to the middle is ignored), or `exact`.
    """

    def __init__(self, out: Tensor, raw_std: Tensor, gradient: str = "straight_through"):
        self.loc = torch.tanh(out.float())
        self.std = 2 * (raw_std.float() / 2).sigmoid() + MIN_STD
        self.low, self.high = (-1 - self.loc) / self.std, (1 - self.loc) / self.std
        self.mass = torch.special.ndtr(self.high) - torch.special.ndtr(self.low)
        self.gradient = gradient

    @property
    def mode(self) -> Tensor:
        return self.loc

    @property
    def mean(self) -> Tensor:
        """What samples are on average: further inside than the mode, the more so the wider the distribution is."""
        return self.loc + self.std * (_density(self.low) - _density(self.high)) / self.mass

    def rsample(self, draws: Draws) -> Tensor:
        loc, std = self.loc.detach(), self.std.detach()
        action = draws.trunc_normal(loc, std).clamp(-1 + SAMPLE_MARGIN, 1 - SAMPLE_MARGIN)
        dloc, dstd = self.sample_gradients(action)
        return action + dloc * (self.loc - loc) + dstd * (self.std - std)  # the added terms are zero

    def sample_gradients(self, action: Tensor) -> tuple[Tensor, Tensor]:
        """Derivatives of a sample by loc and std, elementwise."""
        with torch.no_grad():
            z = (action - self.loc) / self.std
            if self.gradient == "straight_through":
                return torch.ones_like(z), z
            # The quantile u of the sample stays fixed while the bounds move with loc and std.
            u = (torch.special.ndtr(z) - torch.special.ndtr(self.low)) / self.mass
            low, high = (1 - u) * _density(self.low), u * _density(self.high)
            return 1 - (low + high) / _density(z), z - (low * self.low + high * self.high) / _density(z)

    def log_prob(self, action: Tensor) -> Tensor:
        z = (action - self.loc) / self.std
        return (-0.5 * (z.square() + LOG_2PI) - self.std.log() - self.mass.log()).sum(-1)

    def entropy(self, draws: Draws) -> Tensor:
        bounds = (self.low * _density(self.low) - self.high * _density(self.high)) / (2 * self.mass)
        return (0.5 * (1 + LOG_2PI) + (self.std * self.mass).log() + bounds).sum(-1)


class TanhNormal:
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

    def entropy(self, draws: Draws) -> Tensor:
        logp = self.logit.log_softmax(-1)
        return -(logp.exp() * logp).sum(-1)


def _density(z: Tensor) -> Tensor:
    """Of the standard normal."""
    return torch.exp(-0.5 * (z.square() + LOG_2PI))


class Actor(nn.Module):
    """feat (..., F) -> action distribution. `latents` as in `MLP`."""

    def __init__(
        self, *, feat_size: int, action_size: int, layers: int, units: int, dist: str, sample_gradient: str,
        latents: tuple[int, int] = (0, 0),
    ):  # fmt: skip
        super().__init__()
        self.dist, self.sample_gradient = dist, sample_gradient
        self.mlp = MLP(feat_size, layers, units, latents)
        self.out = nn.Linear(self.mlp.size, action_size)
        if dist != "onehot":
            self.std = nn.Linear(self.mlp.size, action_size)
        self.apply(init_weights)

    def forward(self, feat: Tensor) -> TruncNormal | TanhNormal | OneHot:
        return self.distribution(*self.raw(feat))

    def raw(self, feat: Tensor) -> tuple[Tensor, ...]:
        """The distribution's raw parameters, (..., A) each."""
        x = self.mlp(feat)
        return (self.out(x),) if self.dist == "onehot" else (self.out(x), self.std(x))

    def distribution(self, *raw: Tensor) -> TruncNormal | TanhNormal | OneHot:
        """The distribution with the raw parameters that `raw` gave, of one step or of many stacked."""
        if self.dist == "onehot":
            return OneHot(*raw)
        if self.dist == "tanh_normal":
            return TanhNormal(*raw)
        return TruncNormal(*raw, self.sample_gradient)


class GripperHold:
    """Exploration that now and then holds a random command of the gripper, the last action, for several steps.

    Only the sign of that action counts, and RoboSuite's fingers need about 0.4 s to open or close. Signs drawn anew
    every step leave them half open, where the cube doesn't fit between them.

    Args:
        share: of the policy's episodes that are disturbed; of the random actions before training, all are, unless 0.
        rng: what it draws from. Where a run goes on, its state is all that has to come back.
    """

    START = 0.1  # chance of a disturbed policy's step to begin a hold
    STEPS = (4, 13)  # agent steps of a hold

    def __init__(self, share: float, num_envs: int, rng: np.random.Generator):
        self.share, self.rng = share, rng
        self.disturbed = np.zeros(num_envs, bool)
        self.left, self.command = np.zeros(num_envs, int), np.zeros(num_envs)

    def begin(self, env: int) -> None:
        """An episode of environment `env`."""
        if self.share:
            self.disturbed[env], self.left[env] = self.rng.random() < self.share, 0

    def __call__(self, action: np.ndarray, is_random: bool) -> np.ndarray:
        """Actions (num_envs, A) with the held commands in place of the gripper's own."""
        if not self.share:
            return action
        action = action.copy()
        for i in range(len(action)):
            if self.left[i] == 0 and (is_random or (self.disturbed[i] and self.rng.random() < self.START)):
                self.left[i] = self.rng.integers(*self.STEPS, endpoint=True)
                self.command[i] = self.rng.choice((-1.0, 1.0))
            if self.left[i]:
                self.left[i] -= 1
                action[i, -1] = self.command[i]
        return action
