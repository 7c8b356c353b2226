"""Small building blocks: dense layers, scalar heads, their distributions, and the one source of randomness.

Shapes: leading axes are free ("..."); F feature size, S stochastic groups, K classes, A action size.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

LOG_2PI = math.log(2 * math.pi)


class Draws:
    """Every random draw of acting and training goes through here, so that it can be seeded apart or replayed.

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


class RecordedDraws(Draws):
    """Draws that are kept, so that a second computation, on any device, can be given the same."""

    def __init__(self, generator: torch.Generator | None = None):
        super().__init__(generator)
        self.record: list[Tensor] = []

    def replay(self) -> "ReplayedDraws":
        return ReplayedDraws(self.record)

    def _keep(self, draw: Tensor) -> Tensor:
        self.record.append(draw.detach().clone())
        return draw

    def onehot(self, probs: Tensor) -> Tensor:
        return self._keep(super().onehot(probs))

    def normal(self, mean: Tensor) -> Tensor:
        return self._keep(super().normal(mean))

    def trunc_normal(self, mean: Tensor, std: Tensor) -> Tensor:
        return self._keep(super().trunc_normal(mean, std))

    def subset(self, total: int, count: int, device: torch.device) -> Tensor:
        return self._keep(super().subset(total, count, device))


class ReplayedDraws(Draws):
    """Hands out recorded draws in their order."""

    def __init__(self, record: list[Tensor]):
        super().__init__()
        self.record = iter(record)

    def onehot(self, probs: Tensor) -> Tensor:
        return next(self.record).to(probs.device)

    def normal(self, mean: Tensor) -> Tensor:
        return next(self.record).to(mean.device)

    def trunc_normal(self, mean: Tensor, std: Tensor) -> Tensor:
        return next(self.record).to(mean.device)

    def subset(self, total: int, count: int, device: torch.device) -> Tensor:
        return next(self.record).to(device)


def low_precision(x: Tensor) -> Tensor:
    """`x` in the type that autocast would give it at the next matrix product: a cast there and then, made once."""
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x


def init_weights(module: nn.Module) -> None:
    """Keras' defaults, which the author left in place: Glorot-uniform kernels, zero biases."""
    if isinstance(module, nn.Linear | nn.Conv2d | nn.ConvTranspose2d):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)


class FeatureLinear(nn.Linear):
    """Dense layer whose inputs (N, inputs) begin with `groups` one-hot groups of `classes`, as the RSSM's features do.

    A group may also be all zeros, as in the RSSM's initial state. (0, 0) and (S, 0) are an ordinary layer.
    """

    def __init__(self, inputs: int, units: int, groups: int, classes: int):
        super().__init__(inputs, units)
        self.groups, self.classes = groups, classes

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type == "cpu" and 0 < self.classes <= _OneHotLinear.MAX_CLASSES:
            return _OneHotLinear.apply(*map(low_precision, (x, self.weight, self.bias)), self.groups, self.classes)
        return super().forward(x)


class _OneHotLinear(torch.autograd.Function):
    """`F.linear` for `FeatureLinear` on a CPU: forward, the product with a one-hot group is a row of the weight.

    To look these rows up and to sum them takes a quarter of the time of the product; backward is that of any layer,
    as every class of a group gets a gradient.
    """

    MAX_CLASSES = 255  # bfloat16 counts no further

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor, groups: int, classes: int) -> Tensor:
        ctx.save_for_backward(x, weight)
        size = groups * classes
        number = torch.arange(1.0, classes + 1).unsqueeze(1)
        number = torch.kron(torch.eye(groups), number).to(x.dtype)  # (size, groups): one product for all groups
        index = (x[:, :size] @ number).round().long()  # 1 .. classes; 0: all zeros
        row = (index + classes * torch.arange(groups)) * (index > 0)
        table = torch.cat([weight.new_zeros(1, len(weight)), weight[:, :size].t()])
        return F.linear(x[:, size:], weight[:, size:], bias).add_(F.embedding_bag(row, table, mode="sum"))

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        need_x, need_weight, need_bias = ctx.needs_input_grad[:3]
        grad_x = grad @ weight if need_x else None
        grad_weight = grad.t() @ x if need_weight else None
        return grad_x, grad_weight, grad.sum(0) if need_bias else None, None, None


class MLP(nn.Module):
    """`layers` dense layers of `units` with ELU: (..., inputs) -> (..., units).

    `latents` are the (groups, classes) of the one-hot groups that the inputs begin with, if they do.
    """

    def __init__(self, inputs: int, layers: int, units: int, latents: tuple[int, int] = (0, 0)):
        super().__init__()
        sizes = [inputs] + [units] * layers
        self.dense = nn.ModuleList(
            FeatureLinear(a, b, *(latents if i == 0 else (0, 0)))
            for i, (a, b) in enumerate(zip(sizes[:-1], sizes[1:], strict=True))
        )
        self.size = sizes[-1]
        self.apply(init_weights)

    def forward(self, x: Tensor) -> Tensor:
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

    def squared_error(self, value: Tensor) -> Tensor:
        """Sum over the event axes of (value - mean)^2."""
        error = F.mse_loss(self.mean, value, reduction="none")  # its backward is one pass over the images, not four
        return error.sum(tuple(range(-self.event_dims, 0))) if self.event_dims else error

    def log_prob(self, value: Tensor) -> Tensor:
        size = math.prod(self.mean.shape[self.mean.ndim - self.event_dims :])
        return -0.5 * (self.squared_error(value) + size * LOG_2PI)


class Bernoulli:
    """Bernoulli with `logit`; `log_prob` takes soft targets in [0, 1]."""

    def __init__(self, logit: Tensor):
        self.logit = logit.float()

    @property
    def mean(self) -> Tensor:
        return self.logit.sigmoid()

    def log_prob(self, value: Tensor) -> Tensor:
        return -F.binary_cross_entropy_with_logits(self.logit, value, reduction="none")


class Head(nn.Module):
    """A scalar read from features: feat (..., F) -> distribution over (...). `latents` as in `MLP`."""

    def __init__(self, inputs: int, layers: int, units: int, latents: tuple[int, int], distribution: type):
        super().__init__()
        self.mlp = MLP(inputs, layers, units, latents)
        self.out = nn.Linear(self.mlp.size, 1)
        self.distribution = distribution
        self.apply(init_weights)

    def forward(self, feat: Tensor):
        return self.distribution(self.out(self.mlp(feat)).squeeze(-1))


def reward_head(inputs: int, layers: int, units: int, latents: tuple[int, int] = (0, 0)) -> Head:
    """Normal with unit variance over the reward of being in a state."""
    return Head(inputs, layers, units, latents, UnitNormal)


def value_head(inputs: int, layers: int, units: int, latents: tuple[int, int] = (0, 0)) -> Head:
    """Normal with unit variance over the discounted return from a state, that state's reward included."""
    return Head(inputs, layers, units, latents, UnitNormal)


def discount_head(inputs: int, layers: int, units: int, latents: tuple[int, int] = (0, 0)) -> Head:
    """Bernoulli whose mean is the discount: gamma where the episode goes on, 0 after a terminal state."""
    return Head(inputs, layers, units, latents, Bernoulli)
