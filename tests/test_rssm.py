import pytest
import torch
from torch import Tensor
from torch import distributions as D
from torch.nn import functional as F

from networks import Draws
from rssm import RSSM, GRUCell, RSSMState, categorical_kl, gaussian_kl, kl_loss, stack
from tiny import seeded

T, B, E, A = 6, 3, 5, 2
both_latents = pytest.mark.parametrize("classes", [4, 0], ids=["categorical", "gaussian"])


def make_rssm(classes: int) -> RSSM:
    """A small model with random biases, so that none of them hides behind its zero."""
    torch.manual_seed(0)
    rssm = RSSM(embed_size=E, action_size=A, deter=7, hidden=8, stoch=3, classes=classes)
    for p in rssm.parameters():
        torch.nn.init.normal_(p, std=0.5)
    return rssm


def sequence(seed: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Random embed, action and is_first (only row 0)."""
    g = torch.Generator().manual_seed(seed)
    is_first = torch.zeros(T, B, dtype=torch.bool)
    is_first[0] = True
    return torch.randn(T, B, E, generator=g), torch.rand(T, B, A, generator=g) * 2 - 1, is_first


def some_state(rssm: RSSM, seed: int = 2) -> RSSMState:
    """A state that was reached by observing."""
    return rssm.observe(*sequence(seed), seeded(seed)).map(lambda x: x[-1])


def some_stats(classes: int, seed: int) -> Tensor:
    """Random stats (T, B, S, K or 2) that require a gradient."""
    x = torch.randn(T, B, 3, classes or 2, generator=torch.Generator().manual_seed(seed))
    return (x if classes else torch.stack([x[..., 0], x[..., 1].exp() + 0.1], -1)).requires_grad_()


def as_torch(stats: Tensor) -> D.Distribution:
    """torch's own distribution with these stats, one event a group."""
    return D.Normal(stats[..., 0], stats[..., 1]) if stats.shape[-1] == 2 else D.Categorical(logits=stats)


def assert_equal_states(a: RSSMState, b: RSSMState, atol: float = 0.0) -> None:
    for x, y in zip(a, b, strict=True):
        assert torch.allclose(x, y, rtol=0, atol=atol)


def naive_step(rssm: RSSM, state: RSSMState, embed: Tensor, action: Tensor, is_first: Tensor, draws: Draws):
    """One filtering step with nothing hoisted: posterior and prior stats."""
    keep = 1 - is_first.float()[:, None]
    x = F.elu(rssm.img_in(torch.cat([state.stoch * keep, action * keep], -1)))
    deter = rssm.gru(x, state.deter * keep)
    stats = rssm._stats(rssm.obs_dist(F.elu(rssm.obs_out(torch.cat([deter, embed], -1)))))
    return RSSMState(deter, rssm.sample(stats, draws), stats), rssm.prior(deter)


@both_latents
def test_hoisted_observe_equals_the_naive_loop(classes):
    """`observe` equals a loop of naive steps and a loop of `obs_step`, resets in mid-sequence included."""
    rssm = make_rssm(classes)
    embed, action, is_first = sequence()
    is_first[0, 0], is_first[2, 1], is_first[4] = False, True, True
    start = some_state(rssm)
    post = rssm.observe(embed, action, is_first, seeded(), start)
    naive_draws, step_draws = seeded(), seeded()
    naive_state = step_state = start
    naive, stepped, priors = [], [], []
    for inputs in zip(embed, action, is_first, strict=True):
        naive_state, prior_stats = naive_step(rssm, naive_state, *inputs, naive_draws)
        step_state = rssm.obs_step(step_state, *inputs, step_draws)
        naive.append(naive_state), stepped.append(step_state), priors.append(prior_stats)
    assert_equal_states(post, stack(naive), 1e-5)
    assert_equal_states(post, stack(stepped), 1e-5)
    assert torch.allclose(rssm.prior(post.deter), torch.stack(priors), atol=1e-5)


@both_latents
def test_is_first_forgets_the_past(classes):
    """Nothing before an is_first step changes what follows in its column; without the flag it does."""
    rssm = make_rssm(classes)
    embed, action, is_first = sequence()
    is_first[3, 0] = True  # column 1 goes on, column 0 starts anew
    other_embed, other_action, _ = sequence(seed=7)
    other_embed[3:], other_action[4:] = embed[3:], action[4:]  # the action at the reset led out of the past
    other_action[3, 1] = action[3, 1]
    post = rssm.observe(embed, action, is_first, seeded())
    other = rssm.observe(other_embed, other_action, is_first, seeded(), some_state(rssm))
    prior, other_prior = rssm.prior(post.deter), rssm.prior(other.deter)
    for a, b in zip((*post, prior), (*other, other_prior), strict=True):
        assert torch.equal(a[3:, 0], b[3:, 0])
    assert not torch.allclose(post.deter[3:, 1], other.deter[3:, 1], atol=1e-3)
    assert not torch.allclose(prior[3:, 1], other_prior[3:, 1], atol=1e-3)


@both_latents
def test_action_leads_to_the_state_of_its_own_row(classes):
    """action[t] changes the posteriors from row t on, and none before."""
    rssm = make_rssm(classes)
    embed, action, is_first = sequence()
    changed = action.clone()
    changed[3] = -changed[3]
    ours, other = (rssm.observe(embed, a, is_first, seeded()) for a in (action, changed))
    assert torch.equal(ours.deter[:3], other.deter[:3])
    assert ((ours.deter[3] - other.deter[3]).abs().amax(-1) > 1e-3).all()


@both_latents
def test_of_a_binary_action_only_the_sign_is_seen(classes):
    """Observed or imagined, a binary action does what its sign does; its gradient is the sign's (straight-through)."""
    rssm = make_rssm(classes)
    rssm.binary[-1] = 1
    embed, action, is_first = sequence()
    size, sign = (torch.cat([action[..., :-1], last], -1) for last in (action[..., -1:] / 3, action[..., -1:].sign()))
    ours, other = (rssm.observe(embed, a, is_first, seeded()) for a in (size, sign))
    assert_equal_states(ours, other, 1e-5)
    start, gradients = some_state(rssm).detach(), []
    for a in size[0].clone().requires_grad_(), sign[0].clone().requires_grad_():
        imagine_step(rssm, start, a, seeded()).deter.sum().backward()
        gradients.append(a.grad)
    assert torch.allclose(*gradients, atol=1e-5) and (gradients[0][:, -1] != 0).all()
    assert_equal_states(*(imagine_step(rssm, start, a[0], seeded()) for a in (size, sign)), 1e-5)
    flipped = imagine_step(rssm, start, size[0] * torch.tensor([1.0, -1.0]), seeded())
    assert (imagine_step(rssm, start, size[0], seeded()).deter - flipped.deter).abs().max() > 1e-3


@both_latents
def test_prior_is_blind_to_its_image_and_posterior_is_not(classes):
    """embed[t] changes the posterior at t but the prior only from t + 1 on."""
    rssm = make_rssm(classes)
    embed, action, is_first = sequence()
    changed = embed.clone()
    changed[3] += 1
    post, other = (rssm.observe(e, action, is_first, seeded()) for e in (embed, changed))
    prior, other_prior = rssm.prior(post.deter), rssm.prior(other.deter)
    assert torch.equal(prior[:4], other_prior[:4]) and torch.equal(post.stats[:3], other.stats[:3])
    assert ((post.stats[3] - other.stats[3]).abs().amax((-2, -1)) > 1e-3).all()


def imagine_step(rssm: RSSM, state: RSSMState, action: Tensor, draws: Draws) -> RSSMState:
    """The state that an action leads to, drawn from the prior."""
    return rssm.imagine(lambda feat: action, state, 1, draws)[0][1]


@both_latents
def test_imagine_alignment(classes):
    """action[0] is zeros, state 0 the start, and action[i], chosen at state i - 1, led to state i."""
    rssm, horizon = make_rssm(classes), 5
    start = some_state(rssm)
    steps, feat, actions = rssm.imagine(lambda feat: feat[:, :A].tanh(), start, horizon, seeded())
    states = stack(steps)
    assert torch.equal(feat, states.feat)
    assert len(actions) == len(states.deter) == horizon + 1
    assert (actions[0] == 0).all()
    state, draws = start, seeded()
    for i in range(horizon + 1):
        assert_equal_states(state, states.map(lambda x: x[i]))  # noqa: B023
        if i < horizon:
            assert torch.equal(actions[i + 1], state.feat[:, :A].tanh())
            state = imagine_step(rssm, state, actions[i + 1], draws)


@both_latents
def test_an_imagined_step_is_an_observed_one_with_the_prior(classes):
    """Imagining a step gives the memory that observing it gives, and a sample of that memory's prior."""
    rssm, action = make_rssm(classes), torch.rand(B, A)
    start = some_state(rssm)
    imagined = imagine_step(rssm, start, action, seeded())
    observed = rssm.obs_step(start, torch.randn(B, E), action, torch.zeros(B, dtype=torch.bool), seeded())
    assert torch.allclose(imagined.deter, observed.deter, atol=1e-6)
    assert torch.allclose(imagined.stats, rssm.prior(imagined.deter), atol=1e-6)


def test_feat_has_stoch_first():
    """feat is [stoch, deter] and the initial state is zeros of the right sizes."""
    rssm = make_rssm(4)
    feat = some_state(rssm).feat
    assert feat.shape == (B, rssm.feat_size) == (B, 3 * 4 + 7)
    assert (feat[:, :12].unflatten(1, (3, 4)).sum(-1) == 1).all()
    assert all((x == 0).all() for x in rssm.initial(B)) and rssm.initial(B).feat.shape == feat.shape


def test_detach_cuts_every_tensor():
    """A detached state carries no gradient in any part."""
    state = some_state(make_rssm(4))
    assert all(x.requires_grad for x in state) and not any(x.requires_grad for x in state.detach())


def test_gru_by_hand():
    """With silent inputs the update gate is sigmoid(-1), and with the layer norm's offsets the gates follow suit."""
    cell, h = GRUCell(2, 3), torch.randn(4, 3)
    torch.nn.init.zeros_(cell.dense.weight)
    update = torch.tensor(-1.0).sigmoid()
    assert torch.allclose(cell(torch.randn(4, 2), h), (1 - update) * h, atol=1e-6)
    # reset, candidate, update: the reset gate halves the candidate before the tanh
    cell.norm.bias.data = torch.tensor([0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0])
    expected = 0.5 * torch.tensor(0.5).tanh() + 0.5 * h
    assert torch.allclose(cell(torch.randn(4, 2), h), expected, atol=1e-6)


def test_straight_through_gradient_is_the_softmax_jacobian():
    """A categorical sample is exactly one-hot, and its gradient is that of the probabilities."""
    rssm = make_rssm(4)
    logits, cotangent = some_stats(4, 1), torch.randn(T, B, 3, 4)
    sample = rssm.sample(logits, seeded()).unflatten(-1, (3, 4))
    assert torch.equal(sample.sum(-1), torch.ones(T, B, 3)) and torch.equal(sample, sample.round())
    (gradient,) = torch.autograd.grad((sample * cotangent).sum(), logits)
    p = logits.softmax(-1).detach()
    jacobian = torch.diag_embed(p) - p.unsqueeze(-1) * p.unsqueeze(-2)
    assert torch.allclose(gradient, (jacobian @ cotangent.unsqueeze(-1)).squeeze(-1), atol=1e-6)


def test_gaussian_sample_is_reparameterized():
    """A Gaussian sample is mean + std * noise, with the gradients 1 and noise."""
    rssm, stats = make_rssm(0), some_stats(0, 1)
    noise = seeded().normal(torch.zeros(T, B, 3))
    sample = rssm.sample(stats, seeded())
    mean, std = stats.unbind(-1)
    assert torch.allclose(sample, mean + std * noise, atol=1e-6)
    (gradient,) = torch.autograd.grad(sample.sum(), stats)
    assert torch.allclose(gradient, torch.stack([torch.ones_like(noise), noise], -1), atol=1e-6)


def test_gaussian_std_stays_in_its_range():
    """Whatever the network says, a latent's standard deviation lies in [0.1, 2.1] and rises with its raw value."""
    rssm = make_rssm(0)
    raw = torch.cat([torch.zeros(5, 3), torch.tensor([-100.0, -1.0, 0.0, 1.0, 100.0])[:, None].expand(5, 3)], 1)
    std = rssm._stats(raw)[:, 0, 1]
    assert (std.diff() > 0).all()
    assert torch.allclose(std[[0, 2, 4]], torch.tensor([0.1, 1.1, 2.1]))


@both_latents
def test_kl_and_entropy_equal_torchs(classes):
    """KL and entropy are torch's own, summed over the groups; the KL of equals is zero."""
    rssm, post, prior = make_rssm(classes), some_stats(classes, 1), some_stats(classes, 2)
    assert torch.allclose(rssm.kl(post, prior), D.kl_divergence(as_torch(post), as_torch(prior)).sum(-1), atol=1e-5)
    assert torch.allclose(rssm.entropy(post), as_torch(post).entropy().sum(-1), atol=1e-5)
    assert torch.allclose(rssm.kl(post, post), torch.zeros(T, B), atol=1e-6)


def kl_gradients(kl, post: Tensor, prior: Tensor, **settings) -> tuple[Tensor, Tensor, Tensor]:
    """The loss, and its gradients by the posterior's and the prior's stats."""
    loss, value = kl_loss(kl, post, prior, **settings)
    assert not value.requires_grad and torch.allclose(value, kl(post, prior))
    by_post, by_prior = torch.autograd.grad(loss, (post, prior))
    return loss.detach(), by_post, by_prior


@both_latents
@pytest.mark.parametrize("balance", [0.0, 0.3, 0.8, 1.0])
def test_kl_sides(classes, balance):
    """Above the free nats, `balance` of the KL's gradient trains the prior and the rest the posterior."""
    kl = categorical_kl if classes else gaussian_kl
    post, prior = some_stats(classes, 1), some_stats(classes, 2)
    whole = kl(post, prior).mean()
    to_post, to_prior = torch.autograd.grad(whole, (post, prior))
    loss, post_grad, prior_grad = kl_gradients(kl, post, prior, balance=balance, free=0.0, free_avg=True)
    assert torch.allclose(loss, whole.detach())
    assert torch.allclose(post_grad, (1 - balance) * to_post, atol=1e-7)
    assert torch.allclose(prior_grad, balance * to_prior, atol=1e-7)


def test_free_nats_of_the_mean():
    """Averaged free nats: no gradient at all while the mean is below them, all of it above, outliers or not."""
    post, prior = some_stats(4, 1), some_stats(4, 2)
    kl = categorical_kl(post, prior).detach()
    below, above = (kl.mean() * 1.01).item(), (kl.mean() * 0.99).item()
    assert (kl > below).any() and (kl < above).any()
    settings = dict(balance=0.8, free_avg=True)
    loss, *gradients = kl_gradients(categorical_kl, post, prior, free=below, **settings)
    assert torch.allclose(loss, torch.tensor(below)) and all((g == 0).all() for g in gradients)
    loss, *gradients = kl_gradients(categorical_kl, post, prior, free=above, **settings)
    assert torch.allclose(loss, kl.mean()) and all((g.abs().amax((-2, -1)) > 0).all() for g in gradients)


@pytest.mark.parametrize("balance", [0.8, 0.5])
def test_free_nats_of_each_element(balance):
    """Free nats of each element: only elements above them carry a gradient, and the others cost the free nats."""
    post, prior = some_stats(4, 1), some_stats(4, 2)
    kl = categorical_kl(post, prior).detach()
    free = kl.median().item() + 1e-4
    settings = dict(balance=balance, free=free, free_avg=False)
    loss, *gradients = kl_gradients(categorical_kl, post, prior, **settings)
    assert torch.allclose(loss, kl.clamp(min=free).mean())
    for gradient in gradients:
        assert torch.equal(gradient.abs().amax((-2, -1)) > 0, kl > free)


def test_balance_of_one_half_is_one_plain_kl():
    """A balance of exactly 0.5 trains both sides in full, with free nats of each element even if averaged."""
    post, prior = some_stats(4, 1), some_stats(4, 2)
    kl = categorical_kl(post, prior)
    free = kl.median().item() + 1e-4
    expected = torch.where(kl > free, kl, free).mean()
    loss, *gradients = kl_gradients(categorical_kl, post, prior, balance=0.5, free=free, free_avg=True)
    assert torch.allclose(loss, expected.detach())
    for ours, whole in zip(gradients, torch.autograd.grad(expected, (post, prior)), strict=True):
        assert torch.allclose(ours, whole, atol=1e-7)
