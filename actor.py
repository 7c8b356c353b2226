"""The policy, feat -> distribution over actions in [-1, 1], and the class of that distribution.

Gradients are those of the author's TensorFlow code. Shapes: the legend is in train.py.
"""

import torch
from torch import Tensor, nn

from networks import LOG_2PI, MLP, Draws, in_float32, init_weights

MIN_STD = 0.1
SAMPLE_MARGIN = 1e-6  # samples keep this far from the bounds


class TruncNormal:
    """Normal around tanh(out), std in (0.1, 2.1), cut to [-1, 1] and renormalized there.

    The gradient of a sample is straight-through, as in the author's library: da/dloc = 1, da/dstd = (a - loc)/std.
    It would be exact if the bounds moved and widened with the normal.

    Args:
        out, raw_std: the actor's raw outputs (..., A) for actions (..., A).
    """

    def __init__(self, out: Tensor, raw_std: Tensor):
        self.loc = torch.tanh(out.float())
        self.std = 2 * (raw_std.float() / 2).sigmoid() + MIN_STD
        self.low, self.high = (-1 - self.loc) / self.std, (1 - self.loc) / self.std
        self.mass = torch.special.ndtr(self.high) - torch.special.ndtr(self.low)

    @property
    def mode(self) -> Tensor:
        """The likeliest action (..., A)."""
        return self.loc

    @property
    def mean(self) -> Tensor:
        """The average sample (..., A): further inside than the mode, the more so the wider the distribution is."""
        return self.loc + self.std * (_density(self.low) - _density(self.high)) / self.mass

    def rsample(self, draws: Draws) -> Tensor:
        """A sample (..., A) that carries a gradient to the raw outputs."""
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
        """Log-density of `action` (..., A), summed over A: (...)."""
        z = (action - self.loc) / self.std
        return (-0.5 * (z.square() + LOG_2PI) - self.std.log() - self.mass.log()).sum(-1)

    def entropy(self) -> Tensor:
        """Entropy in nats, summed over A: (...)."""
        bounds = (self.low * _density(self.low) - self.high * _density(self.high)) / (2 * self.mass)
        return (0.5 * (1 + LOG_2PI) + (self.std * self.mass).log() + bounds).sum(-1)


def _density(z: Tensor) -> Tensor:
    """Of the standard normal."""
    return torch.exp(-0.5 * (z.square() + LOG_2PI))


class Actor(nn.Module):
    """feat (..., F) -> action distribution over (..., A)."""

    distribution = TruncNormal  # subclasses in tests have others of the author's

    def __init__(self, feat_size: int, action_size: int, layers: int, units: int):
        super().__init__()
        self.action_size = action_size
        self.mlp = MLP(feat_size, layers, units)
        self.out = nn.Linear(self.mlp.size, action_size)
        self.std = nn.Linear(self.mlp.size, action_size)
        self.apply(init_weights)

    def forward(self, feat: Tensor) -> TruncNormal:
        """(..., F) -> distribution over actions (..., A)."""
        return self.distribution(*self.raw(feat))

    def raw(self, feat: Tensor) -> tuple[Tensor, Tensor]:
        """The raw outputs (..., A) from which `distribution` is made; those of many steps may be stacked."""
        x = self.mlp(feat)
        return in_float32(self.out, x), in_float32(self.std, x)
