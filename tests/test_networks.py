import pytest
import torch
from torch import distributions as D

from networks import MLP, Bernoulli, Draws, Head, UnitNormal
from tiny import seeded

EVERY_DRAW = {
    "onehot": lambda draws: draws.onehot(torch.full((50, 5), 0.2)),
    "normal": lambda draws: draws.normal(torch.zeros(50)),
    "trunc_normal": lambda draws: draws.trunc_normal(torch.zeros(50), torch.ones(50)),
    "subset": lambda draws: draws.subset(50, 20, torch.device("cpu")),
}


@pytest.mark.parametrize("draw", EVERY_DRAW.values(), ids=EVERY_DRAW)
def test_own_generator_is_reproducible_and_apart(draw):
    """Draws from an own generator repeat with its seed, differ with another and leave the global stream alone."""
    before = torch.get_rng_state()
    first, again, other = draw(seeded(1)), draw(seeded(1)), draw(seeded(2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), before)
    draw(Draws())
    assert not torch.equal(torch.get_rng_state(), before)


def test_onehot_frequencies():
    """One-hot samples come with the frequencies of their softmax, whatever is added to the logits."""
    logits = torch.tensor([[0.0, 1.0, -2.0, 3.0], [5.0, 5.0, 5.0, -60.0]]) + torch.tensor([[0.0], [1000.0]])
    count = 40_000
    samples = seeded().onehot(logits.softmax(-1).expand(count, 2, 4))
    assert ((samples == 0) | (samples == 1)).all() and (samples.sum(-1) == 1).all()
    probs = logits.softmax(-1)
    deviation = (probs * (1 - probs) / count).sqrt()
    assert ((samples.mean(0) - probs).abs() <= 4.5 * deviation).all()


def test_normal_is_standard():
    """Normal noise has the moments of a standard normal, each element apart."""
    noise = seeded().normal(torch.zeros(100_000, 2))
    moments = torch.stack([noise.mean(0), noise.square().mean(0), noise.pow(3).mean(0), noise.pow(4).mean(0)])
    assert torch.allclose(moments, torch.tensor([[0.0], [1.0], [0.0], [3.0]]).expand(4, 2), atol=0.1)
    assert noise.prod(1).mean().abs() < 0.02


@pytest.mark.parametrize("mean, std", [(0.0, 1.0), (0.9, 0.1), (-1.0, 2.1), (-0.3, 0.4)])
def test_trunc_normal_distribution(mean, std):
    """Samples of a truncated normal follow its distribution function (Kolmogorov-Smirnov)."""
    count = 20_000
    sample = seeded().trunc_normal(torch.full((count,), mean), torch.full((count,), std)).sort().values
    normal = D.Normal(mean, std)
    low, high = normal.cdf(torch.tensor(-1.0)), normal.cdf(torch.tensor(1.0))
    expected = (normal.cdf(sample) - low) / (high - low)
    assert (expected - torch.linspace(0, 1, count)).abs().max() < 1.9 / count**0.5


@pytest.mark.parametrize("uniform", [0.0, 1 - 2.0**-24], ids=["least", "greatest"])
def test_trunc_normal_extremes(monkeypatch, uniform):
    """The least and the greatest uniform number give finite samples, also from a narrow normal at a bound."""
    monkeypatch.setattr(torch.Tensor, "uniform_", lambda self, generator=None: self.fill_(uniform))
    mean = torch.tensor([-1.0, -0.5, 0.0, 0.5, 1.0])
    for std in (0.1, 1.0, 2.1):
        assert Draws().trunc_normal(mean, torch.full_like(mean, std)).isfinite().all()


def test_subset_is_uniform_without_repetition():
    """A subset holds different indices, and each index is as likely as any other."""
    draws, total, count = seeded(), 10, 4
    picks = torch.stack([draws.subset(total, count, torch.device("cpu")) for _ in range(4000)])
    assert all(len(set(row.tolist())) == count for row in picks)
    frequency = picks.flatten().bincount(minlength=total) / len(picks)
    assert (frequency - count / total).abs().max() < 4.5 * (0.4 * 0.6 / len(picks)) ** 0.5


@pytest.mark.parametrize("event_dims", [0, 1, 3])
def test_unit_normal_log_prob(event_dims):
    """UnitNormal is the normal of standard deviation 1 over its event axes, constant included."""
    mean, value = torch.randn(2, 5, 4, 3, 2, generator=torch.Generator().manual_seed(0)).unbind()
    reference = D.Independent(D.Normal(mean, 1.0), event_dims)
    assert torch.allclose(UnitNormal(mean, event_dims).log_prob(value), reference.log_prob(value), atol=1e-4)


def test_bernoulli_soft_targets():
    """A Bernoulli's log-likelihood of a soft target is greatest where its mean is that target."""
    target = torch.tensor([0.0, 0.3, 0.99, 1.0])
    logit = torch.linspace(-3, 3, 4).requires_grad_()
    dist = Bernoulli(logit)
    expected = target * dist.mean.log() + (1 - target) * (1 - dist.mean).log()
    assert torch.allclose(dist.log_prob(target), expected, atol=1e-6)
    (gradient,) = torch.autograd.grad(dist.log_prob(target).sum(), logit)
    assert torch.allclose(gradient, target - dist.mean, atol=1e-6)


@pytest.mark.parametrize("kind", [UnitNormal, Bernoulli])
def test_head_takes_any_leading_axes(kind):
    """A head maps features with any leading axes to a scalar distribution over just those axes, in float32."""
    head, feat = Head(7, 2, 16, kind), torch.randn(5, 3, 7)
    with torch.autocast("cpu", torch.bfloat16):
        lowered = head(feat)
    assert isinstance(lowered, kind) and lowered.mean.dtype == torch.float32
    assert torch.allclose(lowered.mean, head(feat).mean, atol=0.05)
    assert torch.allclose(head(feat).mean.flatten(), head(feat.flatten(0, 1)).mean, atol=1e-6)


def test_mlp_without_layers_is_the_identity():
    """An MLP of no layers hands its input on, and says so in its size."""
    mlp, x = MLP(7, 0, 16), torch.randn(3, 7)
    assert mlp.size == 7 and torch.equal(mlp(x), x)
