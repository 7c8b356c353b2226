"""Small building blocks: dense layers, scalar heads, their distributions, and the one source of randomness.

Shapes: the legend is in train.py. Leading axes are free: "...".
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

LOG_2PI = math.log(2 * math.pi)


class Draws:
    """Every random draw of the networks goes through here, so that it can be seeded apart or replayed.

    Evaluation passes its own generator and thereby leaves the training stream untouched; the parity tests pass a
    subclass that hands out recorded draws. No draw carries a gradient: whoever draws attaches it.
    """

    def __init__(self, generator: torch.Generator | None = None):
        self.generator = generator

    def onehot(self, probs: Tensor) -> Tensor:
        """One-hot sample of categoricals with `probs` (..., K), of the same shape."""
        # One uniform number a categorical, looked up in the cumulative distribution: on a CPU 14 times as fast as
        # noise for each class (Gumbel, or torch.multinomial), which took a tenth of an update.
        cumulative = probs.cumsum(-1)
        cumulative[..., -1] = 1.0 + probs.shape[-1]  # rounding must not leave the last class out of reach
        uniform = torch.empty_like(probs[..., :1]).uniform_(generator=self.generator)
        index = (cumulative > uniform).to(torch.uint8).argmax(-1, keepdim=True)  # the first that exceeds it
        return (index == torch.arange(probs.shape[-1], device=probs.device)).to(probs.dtype)

    def normal(self, mean: Tensor) -> Tensor:
        """Standard normal noise of `mean`'s shape."""
        return torch.empty_like(mean).normal_(generator=self.generator)

    def trunc_normal(self, mean: Tensor, std: Tensor) -> Tensor:
        """Sample of a normal cut to [-1, 1], elementwise, by inverting its cumulative distribution."""
        low = torch.special.ndtr((-1 - mean) / std)
        high = torch.special.ndtr((1 - mean) / std)
        uniform = torch.empty_like(mean).uniform_(generator=self.generator)
        # Rounded to 0 or 1, the quantile would be infinite: once in 2^24 draws from a narrow normal at a bound.
        quantile = (low + uniform * (high - low)).clamp(2.0**-24, 1 - 2.0**-24)
        return mean + std * math.sqrt(2) * torch.erfinv(2 * quantile - 1)  # ndtri(quantile), which MPS lacks

    def subset(self, total: int, count: int, device: torch.device) -> Tensor:
        """`count` different indices below `total`, in random order."""
        return torch.randperm(total, generator=self.generator, device=device)[:count]


def low_precision(x: Tensor) -> Tensor:
    """`x` in the type that autocast would give it at the next matrix product: a cast there and then, made once."""
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x


def in_float32(layer: nn.Module, x: Tensor) -> Tensor:
    """`layer(x)` outside of autocast: in bfloat16, outputs between 64 and 128 would lie on a grid of 0.5."""
    with torch.autocast(x.device.type, enabled=False):
        return layer(x.float())


def init_weights(module: nn.Module) -> None:
    """Keras' defaults, which the author left in place: Glorot-uniform kernels, zero biases."""
    if isinstance(module, nn.Linear | nn.Conv2d | nn.ConvTranspose2d):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


class MLP(nn.Module):
    """`layers` dense layers of `units` with ELU: (..., inputs) -> (..., size). Without layers, it is the identity."""

    def __init__(self, inputs: int, layers: int, units: int):
        super().__init__()
        sizes = [inputs] + [units] * layers
        self.dense = nn.ModuleList(nn.Linear(a, b) for a, b in zip(sizes[:-1], sizes[1:], strict=True))
        self.size = sizes[-1]
        self.apply(init_weights)

    def forward(self, x: Tensor) -> Tensor:
        """(..., inputs) -> (..., units)."""
        # Without leading axes a layer's output is no view: autograd copies gradients to write into a view in place.
        rows = x.reshape(-1, x.shape[-1])
        for dense in self.dense:
            rows = F.elu(dense(rows), inplace=True)
        return rows.reshape(*x.shape[:-1], self.size)


class UnitNormal:
    """Normal with unit variance over the last `event_dims` axes of `mean`."""

    def __init__(self, mean: Tensor, event_dims: int = 0):
        self.mean = mean.float()
        self.event_dims = event_dims

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density of `value` (..., *event) -> (...)."""
        size = math.prod(self.mean.shape[self.mean.ndim - self.event_dims :])
        error = F.mse_loss(self.mean, value, reduction="none")  # its backward is one pass over the images, not four
        error = error.sum(tuple(range(-self.event_dims, 0))) if self.event_dims else error
        return -0.5 * (error + size * LOG_2PI)


class Bernoulli:
    """Bernoulli with `logit` (...)."""

    def __init__(self, logit: Tensor):
        self.logit = logit.float()

    @property
    def mean(self) -> Tensor:
        """The chance of a 1, (...)."""
        return self.logit.sigmoid()

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-likelihood of soft targets `value` (...) in [0, 1] -> (...)."""
        return -F.binary_cross_entropy_with_logits(self.logit, value, reduction="none")


class Head(nn.Module):
    """A scalar read from features: feat (..., F) -> `distribution` over (...), a UnitNormal or a Bernoulli."""

    def __init__(self, inputs: int, layers: int, units: int, distribution: type[UnitNormal] | type[Bernoulli]):
        super().__init__()
        self.mlp = MLP(inputs, layers, units)
        self.out = nn.Linear(self.mlp.size, 1)
        self.distribution = distribution
        self.apply(init_weights)

    def forward(self, feat: Tensor) -> UnitNormal | Bernoulli:
        """(..., F) -> distribution over (...)."""
        return self.distribution(in_float32(self.out, self.mlp(feat)).squeeze(-1))
