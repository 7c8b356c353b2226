import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from actor import SAMPLE_MARGIN, TruncNormal
from distributions import ACTORS, ExactTruncNormal, OneHot, OneHotActor, TanhNormal
from networks import Draws
from tiny import seeded

MEANS = torch.tensor([-0.999, -0.7, 0.0, 0.3, 0.95])
STDS = torch.tensor([0.11, 0.4, 1.1, 2.0])
CONTINUOUS = {"trunc_normal": TruncNormal, "exact": ExactTruncNormal, "tanh_normal": TanhNormal}
continuous = pytest.mark.parametrize("build", CONTINUOUS.values(), ids=CONTINUOUS)
kinds = pytest.mark.parametrize("kind", ACTORS.values())


@pytest.fixture(autouse=True)
def draws_of_the_squashed_gaussian(monkeypatch) -> None:
    """Its entropy is sampled."""
    monkeypatch.setattr(TanhNormal, "draws", seeded())


class Fixed(Draws):
    """Hands out one prepared sample of the truncated normal."""

    def __init__(self, action: Tensor):
        super().__init__()
        self.action = action

    def trunc_normal(self, mean: Tensor, std: Tensor) -> Tensor:
        return self.action


def trunc_normal(mean: Tensor, std: Tensor, gradient: str = "straight_through") -> TruncNormal:
    """The distribution with these parameters, through the network's raw ones."""
    kind = {"straight_through": TruncNormal, "exact": ExactTruncNormal}[gradient]
    return kind(mean.atanh(), 2 * ((std - 0.1) / 2).logit())


def every_pair() -> tuple[Tensor, Tensor]:
    """All combinations of MEANS and STDS, (M, 1) each: M distributions over one action."""
    means, stds = torch.meshgrid(MEANS, STDS, indexing="ij")
    return means.reshape(-1, 1), stds.reshape(-1, 1)


def integral(density: Tensor, grid: Tensor) -> Tensor:
    """Trapezoidal integral over the first axis in float64."""
    return torch.trapezoid(density.double(), grid.double(), dim=0)


def quantile(uniform: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Of the normal cut to [-1, 1], in float64."""
    ndtr = torch.special.ndtr
    low, high = ndtr((-1 - mean) / std), ndtr((1 - mean) / std)
    return mean + std * torch.special.ndtri(low + uniform * (high - low))


@continuous
def test_samples_within_bounds_with_finite_log_prob(build):
    """However extreme the network's outputs: samples and modes in [-1, 1], finite densities and gradients."""
    raw = torch.tensor([-1e4, -30.0, -3.0, 0.0, 3.0, 30.0, 1e4])
    out, raw_std = (x.reshape(-1, 1) for x in torch.meshgrid(raw, raw, indexing="ij"))
    out.requires_grad_(), raw_std.requires_grad_()
    dist = build(out, raw_std)
    draws = seeded()
    action = torch.stack([dist.rsample(draws) for _ in range(200)])
    assert (action.abs() <= 1).all() and (dist.mode.abs() <= 1).all()
    assert dist.log_prob(action).isfinite().all() and dist.entropy().isfinite().all()
    loss = action.sum() + dist.log_prob(action.detach()).sum() + dist.entropy().sum()
    assert all(g.isfinite().all() for g in torch.autograd.grad(loss, (out, raw_std)))


def test_trunc_normal_keeps_a_margin():
    """Samples of the truncated normal stay off the bounds by the author's margin."""
    dist = trunc_normal(torch.tensor([0.0]), torch.tensor([1.0]))
    action = torch.cat([dist.rsample(Fixed(torch.tensor([x]))) for x in (-1.0, 0.5, 1.0)])
    assert torch.allclose(action, torch.tensor([-1 + SAMPLE_MARGIN, 0.5, 1 - SAMPLE_MARGIN]), atol=1e-8)
    assert (action.abs() < 1).all()


def test_trunc_normal_density_integrates_to_one():
    """exp(log_prob) of the truncated normal integrates to one over [-1, 1]."""
    grid = torch.linspace(-1, 1, 8001)
    density = trunc_normal(*every_pair()).log_prob(grid[:, None, None]).exp()
    assert torch.allclose(integral(density, grid), torch.ones(()).double(), atol=1e-4)


def test_tanh_normal_density_integrates_to_one():
    """exp(log_prob) of the squashed Gaussian integrates to one over [-1, 1]."""
    out, raw_std = (x.reshape(-1, 1) for x in torch.meshgrid(torch.linspace(-2, 2, 5), STDS, indexing="ij"))
    x = torch.linspace(-8, 8, 8001)  # before tanh: dense where the action's density piles up at the bounds
    density = TanhNormal(out, raw_std).log_prob(x.tanh()[:, None, None]).exp() * (1 - x.tanh().square())[:, None]
    assert torch.allclose(integral(density, x), torch.ones(()).double(), atol=5e-3)


def test_trunc_normal_entropy():
    """The truncated normal's entropy equals -E log p by quadrature."""
    dist, grid = trunc_normal(*every_pair()), torch.linspace(-1, 1, 8001)
    logp = dist.log_prob(grid[:, None, None])
    assert torch.allclose(dist.entropy().double(), -integral(logp.exp() * logp, grid), atol=1e-4)


def test_tanh_normal_entropy():
    """The squashed Gaussian's sampled entropy is right on average."""
    out, raw_std, x = torch.tensor([0.7]), torch.tensor([0.2]), torch.linspace(-8, 8, 8001)
    logp = TanhNormal(out, raw_std).log_prob(x.tanh()[:, None])
    expected = -integral(logp.exp() * logp * (1 - x.tanh().square()), x)
    entropy = TanhNormal(out.expand(4000, 1), raw_std.expand(4000, 1)).entropy()
    assert abs(entropy.mean().item() - expected.item()) < 0.01


@continuous
def test_samples_follow_log_prob(build):
    """The samples' distribution function is the integral of exp(log_prob) (Kolmogorov-Smirnov)."""
    count, out, raw_std = 20_000, torch.tensor([-0.6]), torch.tensor([0.3])
    sample = build(out.expand(count, 1), raw_std.expand(count, 1)).rsample(seeded()).flatten().sort().values
    x = torch.linspace(-9, 9, 20_001)
    density = build(out, raw_std).log_prob(x.tanh()[:, None]).exp() * (1 - x.tanh().square())
    distribution = torch.cumulative_trapezoid(density, x)
    expected = distribution[torch.searchsorted(x[1:-1].tanh().contiguous(), sample)]
    assert (expected - torch.linspace(0, 1, count)).abs().max() < 1.95 / math.sqrt(count)


@kinds
def test_actions_are_independent(kind):
    """log_prob and entropy of several actions are sums over them, except that a one-hot is one action."""
    torch.manual_seed(0)
    actor = kind(feat_size=5, action_size=4, layers=1, units=8)
    raw = actor.raw(torch.randn(6, 5))
    whole = actor.distribution(*raw)
    action = whole.rsample(seeded())
    assert whole.log_prob(action).shape == whole.entropy().shape == (6,)
    if kind is OneHotActor:
        assert torch.allclose(whole.log_prob(action), raw[0].log_softmax(-1)[action.bool()])
        return
    parts = [actor.distribution(*(x[:, i : i + 1] for x in raw)) for i in range(4)]
    joint = sum(part.log_prob(action[:, i : i + 1]) for i, part in enumerate(parts))
    assert torch.allclose(whole.log_prob(action), joint, atol=1e-5)
    if isinstance(whole, TruncNormal):  # the other's is sampled
        entropy = sum(part.entropy() for part in parts)
        assert torch.allclose(whole.entropy(), entropy, atol=1e-5)


def sample_with_gradients(gradient: str, uniform: float) -> tuple[Tensor, ...]:
    """Means, stds, samples at that quantile, and the samples' derivatives by both, for every pair."""
    mean, std = every_pair()
    dist = trunc_normal(mean.requires_grad_(), std.requires_grad_(), gradient)
    action = dist.rsample(Fixed(quantile(torch.tensor(uniform).double(), mean.double(), std.double()).float()))
    return mean.detach(), std.detach(), action.detach(), *torch.autograd.grad(action.sum(), (dist.loc, dist.std))


@pytest.mark.parametrize("uniform", [0.05, 0.4, 0.7, 0.99])
def test_exact_sample_gradient(uniform):
    """The exact gradient of a truncated-normal sample is that of its quantile function (finite differences)."""
    mean, std, _, by_mean, by_std = sample_with_gradients("exact", uniform)
    u, mean, std, h = torch.tensor(uniform).double(), mean.double(), std.double(), 1e-5
    numeric_mean = (quantile(u, mean + h, std) - quantile(u, mean - h, std)) / (2 * h)
    numeric_std = (quantile(u, mean, std + h) - quantile(u, mean, std - h)) / (2 * h)
    assert torch.allclose(by_mean.double(), numeric_mean, atol=2e-3)
    assert torch.allclose(by_std.double(), numeric_std, atol=2e-3)


def test_straight_through_sample_gradient():
    """The straight-through gradient of a sample is 1 by the mean and (a - mean) / std by the std."""
    mean, std, action, by_mean, by_std = sample_with_gradients("straight_through", 0.7)
    assert torch.equal(by_mean, torch.ones_like(mean))
    assert torch.allclose(by_std, (action - mean) / std, atol=1e-4)


def test_sample_gradients_agree_where_the_bounds_are_far():
    """Far from the bounds, the exact gradient is the straight-through one; near them it is smaller."""
    mean, std = torch.tensor([0.0, 0.9]), torch.tensor([0.11, 1.0])
    action = torch.tensor([0.1, 0.5])
    exact, through = (trunc_normal(mean, std, g).sample_gradients(action) for g in ("exact", "straight_through"))
    assert torch.allclose(exact[0][0], through[0][0], atol=1e-3)
    assert torch.allclose(exact[1][0], through[1][0], atol=1e-3)
    assert exact[0][1] < 0.5 * through[0][1]


def test_tanh_normal_sample_is_reparameterized():
    """A squashed Gaussian's sample has the gradient of tanh(mean + std * noise)."""
    out, raw_std = torch.randn(2, 6, 3, generator=torch.Generator().manual_seed(0)).requires_grad_().unbind()
    noise = seeded().normal(out.detach())
    expected = (5 * (out / 5).tanh() + (F.softplus(raw_std) + 0.1) * noise).tanh()
    sample = TanhNormal(out, raw_std).rsample(seeded())
    assert torch.allclose(sample, expected, atol=1e-6)
    for ours, plain in zip(
        torch.autograd.grad(sample.sum(), (out, raw_std)),
        torch.autograd.grad(expected.sum(), (out, raw_std)),
        strict=True,
    ):
        assert torch.allclose(ours, plain, atol=1e-5)


def test_means_of_truncated_normals():
    """The mean is the integral of action times density, between the mode and 0."""
    mean, std = every_pair()
    dist, grid = trunc_normal(mean, std), torch.linspace(-1, 1, 20_001)
    density = dist.log_prob(grid[:, None, None]).double().exp()
    expected = torch.trapezoid(grid[:, None].double() * density, grid.double(), dim=0)
    assert torch.allclose(dist.mean.flatten().double(), expected, atol=1e-4)
    assert (dist.mean.abs() <= dist.mode.abs()).all()


def test_modes():
    """The truncated normal's mode is its densest point, the squashed Gaussian's its median, the one-hot's likeliest."""
    mean, std = every_pair()
    dist, grid = trunc_normal(mean, std), torch.linspace(-0.999, 0.999, 4001)
    densest = grid[dist.log_prob(grid[:, None, None]).argmax(0)]
    assert torch.allclose(dist.mode.flatten(), densest, atol=1e-3)
    squashed = TanhNormal(torch.full((20_000, 1), 0.8), torch.zeros(20_000, 1))
    assert abs((squashed.rsample(seeded()) < squashed.mode).float().mean().item() - 0.5) < 0.02
    onehot = OneHot(torch.tensor([[0.1, 2.0, -1.0], [3.0, 0.0, 0.0]]))
    assert torch.equal(onehot.mode, torch.tensor([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0]]))


def test_onehot_gradient_is_that_of_the_probabilities():
    """A discrete action is exactly one-hot, with the softmax's gradient, and log_prob sends none through it."""
    logit = torch.randn(50, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    dist, cotangent = OneHot(logit), torch.randn(50, 4)
    action = dist.rsample(seeded())
    assert torch.equal(action, action.round()) and (action.sum(-1) == 1).all()
    (ours,) = torch.autograd.grad((action * cotangent).sum(), logit, retain_graph=True)
    (plain,) = torch.autograd.grad((logit.softmax(-1) * cotangent).sum(), logit)
    assert torch.allclose(ours, plain, atol=1e-6)
    (ours,) = torch.autograd.grad(dist.log_prob(action).sum(), logit)
    assert torch.allclose(ours, action.detach() - logit.softmax(-1).detach(), atol=1e-5)


def test_onehot_entropy():
    """A one-hot's entropy is log A for equal logits and near zero for a sure choice."""
    entropy = OneHot(torch.tensor([[1.0, 1.0, 1.0], [90.0, 0.0, 0.0]])).entropy()
    assert torch.allclose(entropy, torch.tensor([math.log(3), 0.0]), atol=1e-6)


@kinds
def test_stacked_raw_parameters_make_the_same_distributions(kind):
    """Distributions of stacked raw parameters are the stacked distributions, in float32 under autocast too."""
    torch.manual_seed(0)
    actor = kind(feat_size=5, action_size=2, layers=1, units=8)
    feats = torch.randn(3, 4, 5)
    raws = [actor.raw(feat) for feat in feats]
    stacked = actor.distribution(*(torch.stack(x) for x in zip(*raws, strict=True)))
    assert torch.allclose(stacked.mode, actor(feats).mode, atol=1e-6)
    assert torch.allclose(stacked.log_prob(stacked.mode)[2], actor(feats[2]).log_prob(stacked.mode[2]), atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        lowered = actor(feats)
        action = lowered.rsample(seeded())
    assert action.dtype == lowered.log_prob(action).dtype == lowered.entropy().dtype == torch.float32
