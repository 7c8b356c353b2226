import copy
import io
import itertools
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from distributions import TanhNormal
from image_codec import Encoder
from networks import LOG_2PI, Draws
from rssm import RSSMState
from runtime.cli import check_config
from runtime.console import UserError
from runtime.predict import open_loop
from tiny import ACTION_SIZE, descend, image_shape, random_batch, seeded, tiny_config, tiny_dreamer
from train import (
    LEAST_REWARD,
    Behavior,
    Config,
    Dreamer,
    Imagination,
    Optimizer,
    frozen,
    lambda_return,
    latents_used,
    move_towards,
)

FEAT_SIZE = 8
ROOT = Path(__file__).parent.parent


class FirstCome(Draws):
    """No chance at all: categories take their likeliest class, and subsets go round and round."""

    def __init__(self):
        super().__init__()
        self.taken = 0

    def onehot(self, probs: Tensor) -> Tensor:
        return nn.functional.one_hot(probs.argmax(-1), probs.shape[-1]).float()

    def subset(self, total: int, count: int, device: torch.device) -> Tensor:
        self.taken += count
        return torch.arange(self.taken - count, self.taken, device=device) % total


def parameters(module: nn.Module) -> dict[str, Tensor]:
    """A copy of the module's state, as it is now."""
    return copy.deepcopy(module.state_dict())


def unchanged(module: nn.Module, before: dict[str, Tensor]) -> bool:
    return all(torch.equal(x, before[name]) for name, x in module.state_dict().items())


def gradient_size(module: nn.Module) -> float:
    return sum(p.grad.abs().sum().item() for p in module.parameters() if p.grad is not None)


def say_always(head: nn.Module, value: float) -> None:
    """Make a head's output this number whatever its input."""
    nn.init.zeros_(head.get_parameter("out.weight"))
    nn.init.constant_(head.get_parameter("out.bias"), value)


def imagine(dreamer: Dreamer, seed: int = 0) -> Imagination:
    """Imagination from the posteriors of a random batch."""
    batch = random_batch(dreamer.config)
    _, post, _ = dreamer.world_model.loss(batch, seeded(seed))
    start = post.detach().map(lambda x: x.flatten(0, 1))
    with frozen(dreamer.world_model):
        differentiable = dreamer.config.actor_grad != "reinforce"
        terminal = batch.is_terminal.flatten()
        return dreamer.world_model.imagine(dreamer.behavior.actor, start, terminal, seeded(seed), differentiable)


def rollouts(behavior: Behavior, reward: float | Tensor = 0.0, discount: float = 0.9, n: int = 5) -> Imagination:
    """Imagined rollouts over random features with a reward and a discount of our choice."""
    rows, g = behavior.config.horizon + 1, torch.Generator().manual_seed(0)
    feat = torch.randn(rows, n, FEAT_SIZE, generator=g)
    raw = behavior.actor.raw(feat[:-1])
    action = behavior.actor.distribution(*raw).rsample(seeded())
    discounts = torch.full((rows, n), discount)
    weight = torch.cat([torch.ones(1, n), discounts[:-1]]).cumprod(0)
    reward = reward if isinstance(reward, Tensor) else torch.full((rows, n), reward)
    return Imagination(feat, torch.cat([torch.zeros(1, n, 2), action]), raw, reward, discounts, weight)


def tiny_behavior(**changes) -> Behavior:
    torch.manual_seed(0)
    return Behavior(tiny_config(**changes), FEAT_SIZE, action_size=2)


# returns


def test_lambda_return_by_hand():
    """Lambda-returns equal the recursion worked out by hand, for each column apart."""
    reward, value, discount = torch.tensor([[1.0, 2.0, 3.0], [10.0, 20.0, 30.0], [0.5, 0.5, 0.0]])
    ours = lambda_return(*(x[:, None] for x in (reward, value, discount)), torch.tensor([40.0]), 0.6)
    # G2 = 3 + 0 = 3,  G1 = 2 + .5 (.4 * 30 + .6 * 3) = 8.9,  G0 = 1 + .5 (.4 * 20 + .6 * 8.9) = 7.67
    assert torch.allclose(ours[:, 0], torch.tensor([7.67, 8.9, 3.0]))
    inputs = torch.rand(4, 3, 5, generator=torch.Generator().manual_seed(0))
    whole = lambda_return(*inputs[:3], inputs[3, 0], 0.6)
    for n, column in enumerate(inputs.split(1, dim=2)):
        assert torch.equal(whole[:, n], lambda_return(*column[:3], column[3, 0], 0.6)[:, 0])


def test_lambda_return_limits():
    """Lambda 0 looks one step ahead, lambda 1 sums all discounted rewards and the bootstrap value."""
    g = torch.Generator().manual_seed(0)
    (reward, value, discount), bootstrap = torch.rand(3, 4, 2, generator=g), torch.rand(2, generator=g)
    one_step = reward + discount * torch.cat([value[1:], bootstrap[None]])
    assert torch.allclose(lambda_return(reward, value, discount, bootstrap, 0.0), one_step)
    reach = torch.cat([torch.ones(1, 2), discount]).cumprod(0)
    everything = (reach[:-1] * reward).sum(0) + reach[-1] * bootstrap
    assert torch.allclose(lambda_return(reward, value, discount, bootstrap, 1.0)[0], everything)
    changed = lambda_return(reward, value + 1, discount, bootstrap, 1.0)
    assert torch.equal(changed, lambda_return(reward, value, discount, bootstrap, 1.0))


# world model


def test_first_update_whitens_images():
    """The first update whitens by its batch, for the averaged policy too; later ones change nothing."""
    dreamer = tiny_dreamer(tiny_config(image_norm="white"))
    batch, other = (random_batch(dreamer.config, seed) for seed in (0, 1))
    batch = batch._replace(image=batch.image // 8)
    encoders = dreamer.world_model.encoder, dreamer.averaged.encoder
    assert all((encoder.mean == 0.5).all() for encoder in encoders)
    expected = Encoder(64, 3, 4, whiten=True)
    expected.normalize(batch.image)
    for update in batch, other:
        dreamer.train_step(update)
        for encoder in encoders:
            assert torch.equal(encoder.mean, expected.mean) and torch.equal(encoder.mix, expected.mix)
    dark = open_loop(dreamer, batch, dreamer.draws).image
    assert float(dark.mean()) == pytest.approx(float(expected.mean.mean()), abs=0.05)  # pictures have the mean back


def test_paper_subtracts_a_half():
    """With `image_norm` none, pixels are those of the author, from -0.5 to 0.5."""
    dreamer = tiny_dreamer(tiny_config(image_norm="none"))
    dreamer.train_step(random_batch(dreamer.config))
    for encoder in dreamer.world_model.encoder, dreamer.averaged.encoder:
        assert (encoder.mean == 0.5).all() and "mix" not in encoder.state_dict()
    image = torch.arange(256, dtype=torch.uint8).repeat(48).reshape(3, 64, 64)
    assert torch.equal(dreamer.world_model.encoder.preprocess(image), image / 255 - 0.5)


@pytest.mark.parametrize(("gripper", "constant"), [(True, True), (True, False), (False, True)])
def test_a_grippers_action_is_binary(gripper, constant):
    """If there is a gripper and the constant says so, the last action is binary, for the averaged policy too."""
    dreamer = tiny_dreamer(tiny_config(binary_gripper=constant), gripper=gripper)
    for network in dreamer.world_model, dreamer.policy, dreamer.averaged:
        assert network.rssm.binary.tolist() == [0.0] * (ACTION_SIZE - 1) + [float(gripper and constant)]


def test_parameter_counts():
    """At the author's dmc_vision sizes, parameters number what the author's do."""
    dreamer = Dreamer(Config(discount_head=False), (3, 64, 64), action_size=7)
    modules = dreamer.world_model, dreamer.behavior.actor, dreamer.behavior.value
    counts = [sum(p.numel() for p in module.parameters()) for module in modules]
    assert counts == [13_656_972, 976_814, 971_601]


def test_glorot_uniform_weights_and_zero_biases():
    """Every layer's kernel fills Keras' Glorot-uniform range and every bias is zero, heads included."""
    torch.manual_seed(0)
    dreamer = Dreamer(Config(cnn_depth=16), (3, 64, 64), action_size=7)
    layers = [*dreamer.world_model.modules(), *dreamer.behavior.modules()]
    layers = [x for x in layers if isinstance(x, nn.Linear | nn.Conv2d | nn.ConvTranspose2d)]
    assert len(layers) == 8 + 1 + 6 + 5 * 2 + 6 + 5 * 2  # codec, RSSM, two heads, actor, value and its target
    for layer in layers:
        area = np.prod(layer.weight.shape[2:])  # of the kernel, 1 in a dense layer
        limit = (6 / (area * sum(layer.weight.shape[:2]))) ** 0.5
        assert 0.95 * limit < layer.weight.abs().max() <= limit
        assert layer.weight.std().item() == pytest.approx(limit / 3**0.5, rel=0.1)
        assert (layer.bias == 0).all()


def test_model_loss_is_the_weighted_sum_of_its_parts():
    """The model's loss is image + scaled reward, discount and KL losses, and its metrics say each."""
    config = tiny_config(reward_scale=3.0, discount_scale=0.5, kl_scale=2.0, kl_free=0.01)
    loss, _, metrics = tiny_dreamer(config).world_model.loss(random_batch(config), seeded())
    image, reward, discount, kl = (metrics[f"model/{x}_loss"] for x in ("image", "reward", "discount", "kl"))
    assert torch.allclose(loss, image + 3.0 * reward + 0.5 * discount + 2.0 * kl)
    assert torch.allclose(metrics["model/image_mse"] * 12288, 2 * image - 12288 * LOG_2PI, rtol=1e-3)
    assert torch.allclose(kl, metrics["model/kl"])


@pytest.mark.parametrize("classes", [4, 0], ids=["categorical", "gaussian"])
def test_used_latents_are_those_that_depend_on_the_input(classes):
    """One of three latents changes over the batch, the others are the same everywhere: a third is used."""
    raw = torch.randn(1, 1, 3, classes or 2, generator=torch.Generator().manual_seed(3))
    stats = raw.expand(6, 3, -1, -1).clone()
    assert latents_used(stats, categorical=classes > 0) == 0
    stats[:3, :, 1, 0] += 3
    assert latents_used(stats, categorical=classes > 0) == pytest.approx(1 / 3)


@pytest.mark.parametrize("name", ["decoder", "reward", "discount"])
def test_grad_heads_choose_who_shapes_the_latents(name):
    """A head shapes the latents only if it is named; unnamed heads still learn themselves."""
    for heads in ((), (name,)):
        config = tiny_config(kl_scale=0.0, grad_heads=heads)
        model = tiny_dreamer(config).world_model
        model.loss(random_batch(config), seeded())[0].backward()
        assert all(gradient_size(head) > 0 for head in (model.decoder, model.reward, model.discount))
        assert (gradient_size(model.encoder) > 0) == (gradient_size(model.rssm) > 0) == bool(heads)


@pytest.mark.parametrize("size", [0.01, 1.0, 100.0])
def test_learned_rewards_have_the_same_size_on_every_task(size):
    """Rewards of any size are learned as rewards with a root mean square of 1, from the first batch on."""
    model = tiny_dreamer(tiny_config(reward_norm=True)).world_model
    for seed in range(4):
        batch = random_batch(model.config, seed)
        batch = batch._replace(reward=size * batch.reward)
        metrics = model.loss(batch, seeded())[2]
        if seed == 0:
            assert float(model.learned_reward(batch.reward).square().mean()) == pytest.approx(1, rel=1e-5)
    sizes = [size * float(random_batch(model.config, seed).reward.square().mean()) ** 0.5 for seed in range(4)]
    assert min(sizes) < float(metrics["model/reward_size"]) < max(sizes)


def test_a_constant_reward_is_learned_as_one():
    """A cost of each step has no spread by which it could be divided."""
    model = tiny_dreamer(tiny_config(reward_norm=True)).world_model
    batch = random_batch(model.config)
    model.loss(batch._replace(reward=torch.full_like(batch.reward, -200.0)), seeded())
    assert float(model.learned_reward(torch.tensor(-200.0))) == pytest.approx(-1)


def test_rewards_that_are_all_zero_stay_zero():
    """Before a task's first reward there is nothing to enlarge, and the first one is finite."""
    model = tiny_dreamer(tiny_config(reward_norm=True)).world_model
    batch = random_batch(model.config)
    model.loss(batch._replace(reward=torch.zeros_like(batch.reward)), seeded())
    assert model.learned_reward(torch.tensor([0.0, 1.0])).tolist() == [0.0, pytest.approx(1 / LEAST_REWARD)]


def test_rewards_are_learned_as_they_are_without_normalization():
    """As in the author's code."""
    model = tiny_dreamer(tiny_config(reward_norm=False)).world_model
    model.loss(random_batch(model.config), seeded())
    assert model.learned_reward(torch.tensor(0.3)) == torch.tensor(0.3)


def test_a_head_that_says_the_reward_has_no_gradient():
    """The reward loss is least where the head gives what `learned_reward` makes of the reward."""
    config = tiny_config(reward_norm=True)
    model, batch = tiny_dreamer(config).world_model, random_batch(config)
    say_always(model.reward, 1.0)  # a constant reward is divided by itself
    model.loss(batch._replace(reward=torch.full_like(batch.reward, 2.0)), seeded())[0].backward()
    assert model.reward.out.bias.grad.abs().item() < 1e-6


def test_time_limits_keep_the_discount():
    """The discount head learns gamma wherever the task did not end, so also at a time limit, and 0 where it did."""
    config = tiny_config(discount=0.9)
    batch = random_batch(config)
    ended = torch.zeros_like(batch.is_terminal)
    ended[-1, 0] = True
    for is_terminal, share in ((batch.is_terminal, 0.0), (ended, 1 / 24)):
        model = tiny_dreamer(config).world_model
        say_always(model.discount, math.log(0.9 / 0.1))
        model.loss(batch._replace(is_terminal=is_terminal), seeded())[0].backward()
        assert model.discount.out.bias.grad.item() == pytest.approx(0.9 * share, abs=1e-6)


def test_decode_fraction_is_unbiased():
    """The image losses of two halves of the frames average to the loss of all of them."""
    whole, half = tiny_config(), tiny_config(decode_fraction=0.5)
    batch = random_batch(whole)
    losses, draws = [], FirstCome()
    for config, times in ((whole, 1), (half, 2)):
        model = tiny_dreamer(config).world_model
        losses.append([model.loss(batch, draws)[2]["model/image_loss"].item() for _ in range(times)])
    assert draws.taken == 24 and losses[1][0] != losses[1][1]
    assert np.mean(losses[1]) == pytest.approx(losses[0][0], rel=1e-5)


def test_one_batch_overfits():
    """Repeated updates on one batch learn its images and rewards by heart."""
    config = tiny_config(
        cnn_depth=8,
        batch_length=5,
        deter=32,
        hidden=32,
        stoch=8,
        classes=8,
        reward_units=64,
        model_lr=3e-3,
        imagine_starts=4,
    )
    dreamer, batch = tiny_dreamer(config), random_batch(config)
    coarse = batch.image.flatten(0, 1)[..., ::16, ::16].float()
    smooth = nn.functional.interpolate(coarse, 64, mode="bilinear").to(torch.uint8)
    batch = batch._replace(image=smooth.reshape(batch.image.shape))

    def errors() -> tuple[float, float]:
        metrics = dreamer.train_step(batch)
        return metrics["model/image_mse"].item(), 2 * metrics["model/reward_loss"].item() - LOG_2PI

    first = errors()
    for _ in range(150):
        last = errors()
    assert last[0] < first[0] / 20 and last[1] < first[1] / 20


def test_video_prediction_is_open_loop():
    """After the context, predicted frames follow from the actions alone and never from the true images."""
    config = tiny_config(batch_length=9)
    dreamer, batch = tiny_dreamer(config), random_batch(config)
    ours = open_loop(dreamer, batch, seeded())
    assert ours.image.shape == batch.image.shape and ours.reward.shape == batch.reward.shape
    images, actions = batch.image.clone(), batch.action.clone()
    images[5:], actions[7] = 0, -actions[7]
    blind = open_loop(dreamer, batch._replace(image=images), seeded())
    assert torch.equal(ours.image, blind.image) and torch.equal(ours.reward, blind.reward)
    other = open_loop(dreamer, batch._replace(action=actions), seeded())
    assert torch.equal(ours.image[:7], other.image[:7]) and not torch.equal(ours.image[7], other.image[7])


# imagination


def test_imagined_rows_belong_together():
    """Reward and discount of row i are read from state i, and policy i is the one at state i."""
    dreamer = tiny_dreamer(tiny_config())
    imagined, model = imagine(dreamer), dreamer.world_model
    assert imagined.feat.shape == (5, 24, model.rssm.feat_size) and (imagined.action[0] == 0).all()
    assert torch.allclose(imagined.reward, model.reward(imagined.feat).mean, atol=1e-6)
    assert torch.allclose(imagined.discount[1:], model.discount(imagined.feat[1:]).mean, atol=1e-6)
    for ours, plain in zip(imagined.policy, dreamer.behavior.actor.raw(imagined.feat[:-1]), strict=True):
        assert torch.allclose(ours, plain, atol=1e-6)


def test_weights_accumulate_the_discounts():
    """A row's weight is the product of the discounts before it; nothing after a terminal start counts."""
    dreamer = tiny_dreamer(tiny_config(discount=0.9))
    start = dreamer.world_model.rssm.initial(2)
    terminal = torch.tensor([False, True])
    imagined = dreamer.world_model.imagine(dreamer.behavior.actor, start, terminal, seeded(), True)
    assert torch.allclose(imagined.discount[0], torch.tensor([0.9, 0.0]))  # the truth, not the head's guess
    assert (imagined.weight[0] == 1).all() and not imagined.weight.requires_grad
    for i in range(1, 5):
        assert torch.allclose(imagined.weight[i], imagined.discount[:i].prod(0))
    assert (imagined.weight[1:, 1] == 0).all() and (imagined.weight[:, 0] > 0).all()


def test_without_discount_head_the_discount_is_constant():
    """With the discount head off there is none, no loss of its own, and gamma everywhere, terminal or not."""
    dreamer = tiny_dreamer(tiny_config(discount_head=False, discount=0.9))
    model, terminal = dreamer.world_model, torch.tensor([False, True])
    imagined = model.imagine(dreamer.behavior.actor, model.rssm.initial(2), terminal, seeded(), True)
    assert torch.allclose(imagined.discount, torch.full((5, 2), 0.9))
    assert torch.allclose(imagined.weight, 0.9 ** torch.arange(5.0)[:, None].expand(5, 2))
    metrics = dreamer.train_step(random_batch(dreamer.config))
    assert model.discount is None and not any("discount" in name for name in metrics)


@pytest.mark.parametrize("count", [0, 7, 99])
def test_imagination_starts_from_posteriors(monkeypatch, count):
    """Imagination starts, detached, from all posteriors or from `imagine_starts` different ones, ends included."""
    config = tiny_config(imagine_starts=count)
    dreamer, batch = tiny_dreamer(config), random_batch(config)
    batch.is_terminal[1::2] = True
    seen, model = {}, dreamer.world_model
    model_loss, model_imagine = model.loss, model.imagine

    def spy_loss(*args):
        seen["post"] = model_loss(*args)
        return seen["post"]

    def spy_imagine(actor, start: RSSMState, is_terminal: Tensor, *args, **kwargs):
        seen.update(start=start, is_terminal=is_terminal)
        return model_imagine(actor, start, is_terminal, *args, **kwargs)

    monkeypatch.setattr(model, "loss", spy_loss)
    monkeypatch.setattr(model, "imagine", spy_imagine)
    dreamer.train_step(batch)
    post, start = seen["post"][1].map(lambda x: x.flatten(0, 1)), seen["start"]
    same = (start.feat[:, None] == post.feat[None]).all(-1)  # (starts, T * B)
    assert not start.feat.requires_grad and len(start.feat) == (7 if count == 7 else 24)
    assert (same.sum(1) == 1).all() and (same.sum(0) <= 1).all()
    assert torch.equal(seen["is_terminal"], batch.is_terminal.flatten()[same.int().argmax(1)])


# actor and value


@pytest.mark.parametrize("grad", ["dynamics", "reinforce", "both"])
def test_actor_update_moves_only_the_actor(grad):
    """The actor's loss moves the actor and leaves world model, value and target value untouched."""
    dreamer = tiny_dreamer(tiny_config(actor_grad=grad, actor_entropy=0.0))
    model, behavior = dreamer.world_model, dreamer.behavior
    actor_loss, _, _ = behavior.loss(imagine(dreamer))
    actor_loss.backward(retain_graph=True)
    assert gradient_size(behavior.actor) > 0
    others = [*model.parameters(), *behavior.value.parameters(), *behavior.target_value.parameters()]
    assert all(p.grad is None for p in others)
    behavior.zero_grad()
    before = [parameters(m) for m in (model, behavior.value, behavior.target_value, behavior.actor)]
    descend(dreamer.actor_optimizer, actor_loss)
    assert unchanged(model, before[0]) and unchanged(behavior.value, before[1])
    assert unchanged(behavior.target_value, before[2]) and not unchanged(behavior.actor, before[3])


@pytest.mark.parametrize("classes", [4, 0], ids=["categorical", "gaussian"])
def test_dynamics_gradient_comes_from_imagined_rewards_and_values(classes):
    """Under `dynamics` the actor's gradient comes through imagined rewards and values, and through nothing else."""
    dreamer = tiny_dreamer(tiny_config(classes=classes, actor_entropy=0.0))

    def actor_gradient(reward: bool, value: bool) -> float:
        agent = copy.deepcopy(dreamer)
        if not reward:
            say_always(agent.world_model.reward, 0.0)
        if not value:
            say_always(agent.behavior.target_value, 0.0)
        agent.behavior.loss(imagine(agent))[0].backward()
        return gradient_size(agent.behavior.actor)

    assert actor_gradient(reward=True, value=False) > 0 and actor_gradient(reward=False, value=True) > 0
    assert actor_gradient(reward=False, value=False) == 0


def test_dynamics_gradient_is_the_derivative_of_the_return():
    """The actor's gradient is the finite difference of its loss, where all is smooth and the policy is blind.

    Blind to features, because the gradient that goes through the policy's input is left out on purpose; and with a
    constant discount, because the weights carry no gradient either.
    """
    config = tiny_config(classes=0, actor_entropy=0.0, discount_head=False)
    dreamer = tiny_dreamer(config)
    dreamer.behavior.actor.distribution = TanhNormal  # whose samples have an exact gradient
    out = dreamer.behavior.actor.out
    for layer in (out, dreamer.behavior.actor.std):
        nn.init.zeros_(layer.weight)
    for p in (*dreamer.world_model.rssm.parameters(), *dreamer.world_model.reward.parameters()):
        p.data *= 3  # a gradient well above float32's noise

    def loss() -> Tensor:
        return dreamer.behavior.loss(imagine(dreamer))[0]

    (gradient,) = torch.autograd.grad(loss(), out.bias)
    for i in range(ACTION_SIZE):
        out.bias.data[i] += (h := 0.02)
        above = loss().item()
        out.bias.data[i] -= 2 * h
        numeric = (above - loss().item()) / (2 * h)
        out.bias.data[i] += h
        assert numeric == pytest.approx(gradient[i].item(), rel=0.03, abs=0.01 * gradient.abs().max().item())


def test_policy_gets_no_gradient_through_its_input():
    """A later policy's gradient is that of the actor at its state, however earlier actions shaped that state."""
    dreamer = tiny_dreamer(tiny_config())
    imagined, params = imagine(dreamer), list(dreamer.behavior.actor.parameters())
    for ours, plain in zip(imagined.policy, dreamer.behavior.actor.raw(imagined.feat[:-1].detach()), strict=True):
        gradients = (
            torch.autograd.grad(x[3].sum(), params, retain_graph=True, allow_unused=True) for x in (ours, plain)
        )
        for a, b in zip(*gradients, strict=True):
            assert (a is None and b is None) or torch.allclose(a, b, atol=1e-5)


def test_reinforce_lets_no_gradient_through_the_dynamics():
    """Under `reinforce` imagined states, actions and rewards carry no gradient."""
    imagined = imagine(tiny_dreamer(tiny_config(actor_grad="reinforce")))
    assert not any(x.requires_grad for x in (imagined.feat, imagined.action, imagined.reward, imagined.discount))
    assert all(x.requires_grad for x in imagined.policy)


def test_reinforce_raises_the_odds_of_better_actions():
    """Under `reinforce` the loss is -weight * log-probability * advantage over the actions that led somewhere."""
    behavior = tiny_behavior(actor_grad="reinforce", actor_entropy=0.0)
    reward = torch.rand(5, 5, generator=torch.Generator().manual_seed(1))
    imagined = rollouts(behavior, reward)
    value = behavior.target_value(imagined.feat).mean
    returns = lambda_return(reward[:-1], value[:-1], imagined.discount[:-1], value[-1], 0.95)
    advantage = (returns[1:] - value[:3]).detach()
    expected = 0.0
    for i in range(3):  # the action drawn at state i leads to state i + 1
        logp = behavior.actor(imagined.feat[i]).log_prob(imagined.action[i + 1].detach())
        expected = expected - (0.9**i * logp * advantage[i]).mean() / 3
    loss = behavior.loss(imagined)[0]
    assert torch.allclose(loss, expected, atol=1e-6)
    params = list(behavior.actor.parameters())
    for ours, plain in zip(*(torch.autograd.grad(x, params) for x in (loss, expected)), strict=True):
        assert torch.allclose(ours, plain, atol=1e-6)


def test_actor_answers_for_rewards_after_its_actions():
    """Each reward weighs on the actor as often as an action came before it, discounted from the start: t * g^(t-1)."""
    behavior = tiny_behavior(actor_entropy=0.0, return_lambda=1.0, horizon=5)
    reward = torch.zeros(6, 5, requires_grad=True)
    (gradient,) = torch.autograd.grad(behavior.loss(rollouts(behavior, reward))[0], reward)
    times = torch.arange(6.0)
    share = times * 0.9 ** (times - 1) / (4 * 5)  # 4 policies that have an effect, 5 rollouts
    share[5] = 0  # the last state counts by its value
    assert torch.allclose(gradient, -share[:, None].expand(6, 5), atol=1e-6)


def test_both_is_a_mix():
    """`both` at a mix of 1 is `dynamics`; in between, its loss is the share of each."""
    losses = {}
    for grad, mix in (("dynamics", 0.0), ("reinforce", 0.0), ("both", 1.0), ("both", 0.3)):
        behavior = tiny_behavior(actor_grad=grad, actor_grad_mix=mix, actor_entropy=0.0)
        reward = torch.rand(5, 5, generator=torch.Generator().manual_seed(1))
        losses[grad, mix] = behavior.loss(rollouts(behavior, reward))[0].item()
    dynamics, reinforce = losses["dynamics", 0.0], losses["reinforce", 0.0]
    assert losses["both", 1.0] == pytest.approx(dynamics)
    assert losses["both", 0.3] == pytest.approx(0.3 * dynamics + 0.7 * reinforce, rel=1e-4)


def test_outputs_before_tanh_cost_their_squares():
    """The cost is weight * cost * squares, summed over A, of the policies that led somewhere; the critic has none."""
    plain, costly = (tiny_behavior(actor_grad="reinforce", actor_output_cost=cost) for cost in (0.0, 0.5))
    costly.load_state_dict(plain.state_dict())
    imagined = rollouts(plain)
    out = 3 * torch.randn_like(imagined.policy[0])
    imagined = imagined._replace(policy=(out.requires_grad_(), *imagined.policy[1:]))
    losses = [behavior.loss(imagined)[:2] for behavior in (plain, costly)]
    weight = 0.9 ** torch.arange(3.0)
    expected = 0.5 * (weight[:, None] * out[:3].square().sum(-1)).mean()
    assert torch.allclose(losses[1][0] - losses[0][0], expected, rtol=1e-4)
    assert torch.equal(losses[1][1], losses[0][1])
    (gradient,) = torch.autograd.grad(losses[1][0] - losses[0][0], out)
    assert torch.allclose(gradient[:3], weight[:, None, None] * out[:3] / (3 * out.shape[1]), atol=1e-5)
    assert not gradient[3:].any()  # the last policy's action only feeds the bootstrap value


def test_entropy_bonus():
    """With nothing to gain, the bonus raises the policy's entropy."""
    behavior = tiny_behavior(actor_entropy=1.0)
    say_always(behavior.target_value, 0.0)
    optimizer = Optimizer(behavior.actor, lr=1e-2, eps=1e-5, clip=100.0, decay=0.0)
    entropy = []
    for _ in range(20):
        loss, _, metrics = behavior.loss(rollouts(behavior))
        descend(optimizer, loss)
        entropy.append(metrics["behavior/entropy"].item())
    assert entropy[-1] > entropy[0] + 0.05


@pytest.mark.parametrize("actor_grad", ["dynamics", "reinforce", "both"])
def test_return_norm(actor_grad):
    """With each of the actor's gradients, returns are divided by their running 5 - 95 % range, but never enlarged."""
    for size in (0.1, 100.0):
        changes = {"actor_entropy": 0.0, "actor_grad": actor_grad}
        behavior, plain = (tiny_behavior(return_norm=norm, **changes) for norm in (True, False))
        for target in (behavior.target_value, plain.target_value):
            say_always(target, 0.0)
        reward = size * torch.rand(5, 400, generator=torch.Generator().manual_seed(1))
        imagined = rollouts(behavior, reward, n=400)
        behavior.loss(imagined)
        spread = behavior.return_range.item() / 0.01  # one step of the running mean from zero
        zeros = torch.zeros(4, 400)
        returns = lambda_return(reward[:-1], zeros, imagined.discount[:-1], zeros[0], 0.95)[1:]
        ends = torch.quantile(returns, torch.tensor([0.05, 0.95]))
        assert spread == pytest.approx((ends[1] - ends[0]).item(), rel=0.02)
        behavior.return_range.fill_(spread)
        ours, plainly = (b.loss(imagined)[0].item() for b in (behavior, plain))
        assert (spread < 1) == (size < 1)
        assert ours * max(spread, 1.0) == pytest.approx(plainly, rel=1e-4)


@pytest.mark.parametrize("off", [0.0, 2.0, -1.0])
def test_value_regresses_on_returns_not_on_advantages(off):
    """Where the reward is always r, a value of r / (1 - gamma) has no gradient, and any other is drawn to it."""
    behavior, right = tiny_behavior(), 0.5 / (1 - 0.9)
    say_always(behavior.value, right + off)
    say_always(behavior.target_value, right)
    imagined = rollouts(behavior, reward=0.5)
    _, loss, _ = behavior.loss(imagined)
    loss.backward()
    mean_weight = imagined.weight[:-1].mean().item()
    assert behavior.value.out.bias.grad.item() == pytest.approx(off * mean_weight, abs=1e-4)


def test_value_converges_to_the_return():
    """In a world that always pays r, value and target value come to r / (1 - gamma)."""
    behavior = tiny_behavior()
    optimizer = Optimizer(behavior.value, lr=1e-2, eps=1e-5, clip=100.0, decay=0.0)
    imagined = rollouts(behavior, reward=0.5, discount=0.8)
    imagined = imagined._replace(feat=imagined.feat[:1].expand(5, -1, -1))  # states that stay as they are
    for _ in range(300):
        descend(optimizer, behavior.loss(imagined)[1])
        move_towards(behavior.target_value, behavior.value, 1.0)
    assert torch.allclose(behavior.value(imagined.feat).mean, torch.tensor(2.5), atol=0.1)


def test_value_learns_nothing_past_an_end():
    """What is imagined beyond a terminal start does not reach the value's loss, nor its target at the start."""
    behavior = tiny_behavior()
    imagined = rollouts(behavior)
    discount = imagined.discount.clone()
    discount[0, 2] = 0.0
    weight = torch.cat([torch.ones(1, 5), discount[:-1]]).cumprod(0)

    def value_loss(column: int, later_reward: float) -> float:
        reward = torch.zeros(5, 5)
        reward[1:, column] = later_reward
        ended = imagined._replace(reward=reward, discount=discount, weight=weight)
        return behavior.loss(ended)[1].item()

    assert value_loss(2, 0.0) == value_loss(2, 9.0) and value_loss(3, 0.0) != value_loss(3, 9.0)


def test_target_value_is_copied_on_schedule():
    """The target value is the value as of updates 0, k, 2k, ..., and rests in between."""
    dreamer = tiny_dreamer(tiny_config(target_every=3, value_lr=1e-2))
    batch, behavior = random_batch(dreamer.config), dreamer.behavior
    for update in range(7):
        before = parameters(behavior.target_value)
        dreamer.train_step(batch)
        if update % 3 == 0:
            assert unchanged(behavior.target_value, parameters(behavior.value))
        assert unchanged(behavior.target_value, before) == (update % 3 != 0)


def test_evaluated_policies_are_averages():
    """A plain mean of the policies so far, and a running average once it has enough of them; without it, the newest."""
    momentum, dreamer = 0.75, tiny_dreamer(tiny_config(policy_average=0.75, actor_lr=1e-2, model_lr=1e-2))
    newest = tiny_dreamer(tiny_config(policy_average=0.0, actor_lr=1e-2, model_lr=1e-2))
    batch, expected = random_batch(dreamer.config), {}
    for update in range(1, 8):
        dreamer.train_step(batch), newest.train_step(batch)
        for name, weight in dreamer.policy.state_dict().items():
            share = 1 / update if update <= 4 else 1 - momentum
            expected[name] = (1 - share) * expected.get(name, 0.0) + share * weight
    averaged = dreamer.averaged.state_dict()
    assert averaged.keys() == expected.keys() == dreamer.policy.state_dict().keys()
    for name, weight in expected.items():
        assert torch.allclose(averaged[name], weight, atol=1e-6), name
    assert not unchanged(dreamer.averaged, dreamer.policy.state_dict())
    assert unchanged(newest.averaged, newest.policy.state_dict())
    assert not any(p.requires_grad for p in dreamer.averaged.parameters())
    image, is_first = batch.image[0], batch.is_first[0]
    for chosen, policy in ((dreamer.averaged, dreamer.averaged), (None, dreamer.policy)):
        action, _ = dreamer.act(image, None, is_first, seeded(1), deterministic=True, policy=chosen)
        assert torch.equal(action, policy(image, None, is_first, seeded(1), deterministic=True)[0])


def test_target_fraction():
    """A later copy moves the target by the fraction; the first is whole."""
    dreamer = tiny_dreamer(tiny_config(target_every=1, target_fraction=0.25, value_lr=1e-2))
    batch, behavior = random_batch(dreamer.config), dreamer.behavior
    dreamer.train_step(batch)
    before = parameters(behavior.target_value)
    assert unchanged(behavior.value, before)
    dreamer.train_step(batch)
    for name, value in behavior.value.state_dict().items():
        target = behavior.target_value.state_dict()[name]
        assert torch.allclose(target, before[name] + 0.25 * (value - before[name]), atol=1e-7)


# optimizer


class Numbers(nn.Module):
    """Parameters whose gradient under `loss(g)` is g."""

    def __init__(self):
        super().__init__()
        self.a = nn.Parameter(torch.tensor([1.0, -2.0, 3.0]))
        self.b = nn.Parameter(torch.tensor([[0.5]]))

    def loss(self, gradient: Tensor) -> Tensor:
        return (self.a * gradient[:3]).sum() + (self.b * gradient[3]).sum()

    def flat(self) -> Tensor:
        return torch.cat([self.a.detach(), self.b.detach()[0]])


def some_gradients() -> Tensor:
    """30 gradients of sizes from where epsilon rules to where clipping does."""
    g = torch.Generator().manual_seed(0)
    return torch.randn(30, 4, generator=g) * 10 ** torch.linspace(-6, 2, 30)[torch.randperm(30, generator=g), None]


def test_the_weight_of_the_entropy_falls_by_equal_factors():
    """From actor_entropy to actor_entropy_final over entropy_updates; also where a saved agent goes on; 0: constant."""
    config = tiny_config(actor_entropy=0.81, actor_entropy_final=0.01, entropy_updates=4)
    dreamer, batch = tiny_dreamer(config), random_batch(config)
    weights = []
    for _ in range(6):
        dreamer.train_step(batch)
        weights.append(dreamer.behavior.entropy_weight.item())
    assert weights == pytest.approx([0.81, 0.27, 0.09, 0.03, 0.01, 0.01])
    dreamer.updates = 2
    dreamer.train_step(batch)
    assert dreamer.behavior.entropy_weight.item() == pytest.approx(0.09)
    constant = tiny_dreamer(tiny_config(actor_entropy=0.5, actor_entropy_final=0.1))
    constant.updates = 1000
    constant.train_step(batch)
    assert constant.behavior.entropy_weight.item() == 0.5
    whole = tiny_dreamer(tiny_config(actor_entropy=1, actor_entropy_final=0.25, entropy_updates=2))  # an edited block
    whole.behavior.set_entropy_weight(1)
    assert whole.behavior.entropy_weight.item() == 0.5


@pytest.mark.parametrize("kernel_clips", [True, False])
def test_optimizer_equals_a_plain_loop(kernel_clips):
    """Adam with epsilon before the bias correction, one clipping norm for all parameters and decay apart from lr."""
    module, lr, eps, clip, decay = Numbers(), 1e-2, 1e-4, 5.0, 1e-2
    optimizer = Optimizer(module, lr=lr, eps=eps, clip=clip, decay=decay)
    optimizer.kernel_clips = kernel_clips  # false as on MPS
    w, m, v = module.flat().double().numpy(), np.zeros(4), np.zeros(4)
    gradients = some_gradients()
    norms = gradients.norm(dim=1)
    assert (norms > clip).any() and (norms < eps).any()
    for t, gradient in enumerate(gradients, start=1):
        norm = descend(optimizer, module.loss(gradient))
        assert norm.item() == pytest.approx(norms[t - 1].item())
        g = gradient.double().numpy() * min(1.0, clip / norms[t - 1].item())
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        w = (1 - decay) * w - lr * math.sqrt(1 - 0.999**t) / (1 - 0.9**t) * m / (np.sqrt(v) + eps)
        assert module.flat().numpy() == pytest.approx(w, rel=1e-4)


def test_decay_does_not_depend_on_the_learning_rate():
    """Without gradient, a step multiplies all parameters by 1 - decay at any learning rate."""
    for lr in (1e-4, 1.0):
        module = Numbers()
        before = module.flat()
        descend(Optimizer(module, lr=lr, eps=1e-5, clip=1.0, decay=0.125), module.loss(torch.zeros(4)))
        assert torch.allclose(module.flat(), 0.875 * before)


@pytest.mark.parametrize("kernel_clips", [True, False])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_gradients_are_skipped_and_counted(bad, kernel_clips):
    """A step with one non-finite gradient changes neither parameters (decay included) nor moments, and is counted."""
    module = Numbers()
    optimizer = Optimizer(module, lr=1e-2, eps=1e-5, clip=1.0, decay=0.125)
    optimizer.kernel_clips = kernel_clips
    gradients = some_gradients()
    descend(optimizer, module.loss(gradients[0]))
    before, moments = module.flat(), copy.deepcopy(optimizer.adam.state_dict()["state"])
    norm = descend(optimizer, module.loss(torch.tensor([1.0, bad, 1.0, 1.0])))
    assert not norm.isfinite() and optimizer.skipped.item() == 1
    assert torch.equal(module.flat(), before)
    for index, state in optimizer.adam.state_dict()["state"].items():
        assert all(torch.equal(x, moments[index][name]) for name, x in state.items())
    descend(optimizer, module.loss(gradients[1]))
    assert module.flat().isfinite().all() and not torch.equal(module.flat(), before)
    assert optimizer.skipped.item() == 1


def test_a_bad_reward_stops_only_the_model():
    """A batch with a NaN leaves the world model as it was while actor and value go on."""
    dreamer = tiny_dreamer(tiny_config())
    batch = random_batch(dreamer.config)
    dreamer.train_step(batch)
    modules = dreamer.world_model, dreamer.behavior.actor, dreamer.behavior.value
    before = [parameters(m) for m in modules]
    batch.reward[2, 1] = float("nan")
    dreamer.train_step(batch)
    assert [unchanged(m, b) for m, b in zip(modules, before, strict=True)] == [True, False, False]
    assert all(p.isfinite().all() for m in modules for p in m.parameters())
    optimizers = dreamer.model_optimizer, dreamer.actor_optimizer, dreamer.value_optimizer
    assert [optimizer.skipped.item() for optimizer in optimizers] == [1, 0, 0]


def test_frozen():
    """Inside `frozen` a module collects no gradient but passes it on; afterwards it does again, errors included."""
    module, x = nn.Linear(3, 2), torch.randn(4, 3, requires_grad=True)
    with pytest.raises(KeyError), frozen(module):
        module(x).sum().backward()
        assert module.weight.grad is None and x.grad.abs().sum() > 0
        raise KeyError
    assert module.weight.requires_grad and module.bias.requires_grad


# the whole agent


def updated(dreamer: Dreamer, seed: int) -> list[Tensor]:
    """All parameters and buffers after one more update."""
    torch.manual_seed(seed)
    dreamer.train_step(random_batch(dreamer.config, seed))
    return [*dreamer.world_model.state_dict().values(), *dreamer.behavior.state_dict().values()]


def saved_and_loaded(dreamer: Dreamer) -> dict:
    """The agent's state through a file that may not run code."""
    file = io.BytesIO()
    torch.save(dreamer.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def test_loading_keeps_the_present_learning_rate():
    """A loaded state brings moments, not settings: with learning rates and decays of almost 0 nothing moves on."""
    still = {f"{name}_lr": 1e-30 for name in ("model", "actor", "value")}
    still |= {f"{name}_decay": 0.0 for name in ("model", "actor", "value")}
    dreamer, loaded = tiny_dreamer(tiny_config()), tiny_dreamer(tiny_config(**still))
    updated(dreamer, 0)
    loaded.load_state_dict(saved_and_loaded(dreamer))
    modules = loaded.world_model, loaded.behavior.actor, loaded.behavior.value
    before = copy.deepcopy([list(m.parameters()) for m in modules])
    updated(loaded, 1)
    now = [list(m.parameters()) for m in modules]
    assert all(map(torch.equal, itertools.chain(*now), itertools.chain(*before)))


@pytest.mark.parametrize(
    "changes",
    [{}, {"classes": 0}, {"actor_grad": "both"}],
    ids=["default", "gaussian", "both"],
)
def test_bfloat16_stays_close_to_float32(changes):
    """Under bfloat16 autocast losses are finite and near float32's, and parameters and metrics stay float32."""
    config = tiny_config(actor_lr=1e-3, **changes)
    metrics = []
    for dtype in (None, torch.bfloat16):
        dreamer, batch = tiny_dreamer(config, autocast_dtype=dtype), random_batch(config)
        metrics.append([dreamer.train_step(batch) for _ in range(2)])
        modules = dreamer.world_model, dreamer.behavior
        assert all(p.dtype == torch.float32 and p.isfinite().all() for m in modules for p in m.parameters())
    for plain, lowered in zip(*metrics, strict=True):
        assert all(x.shape == () and x.dtype == torch.float32 and x.isfinite() for x in lowered.values())
        assert all(not x.requires_grad for x in lowered.values())
        for name in ("model/loss", "model/image_loss", "model/reward_loss", "behavior/value_loss"):
            assert lowered[name].item() == pytest.approx(plain[name].item(), rel=0.05)


def test_acting_sees_what_training_sees():
    """Acting step by step reaches the posteriors that `observe` finds in the episode it recorded."""
    dreamer, draws, state = tiny_dreamer(tiny_config()), seeded(), None
    image = random_batch(dreamer.config).image
    actions, deter = [torch.zeros(4, ACTION_SIZE)], []
    is_first = torch.zeros(6, 4, dtype=torch.bool)
    is_first[0] = is_first[3, 1] = True  # env 1 starts a new episode in between
    for t in range(6):
        action, state = dreamer.act(image[t], state, is_first[t], draws, deterministic=True)
        actions.append(action)
        deter.append(state.latent.deter)
    model = dreamer.world_model
    embed = model.encoder(model.encoder.preprocess(image))
    post = model.rssm.observe(embed, torch.stack(actions[:-1]), is_first, seeded())
    assert torch.allclose(torch.stack(deter), post.deter, atol=1e-5)


@pytest.mark.parametrize("eval_action", ["mean", "mode"])
def test_actions_in_bounds_and_deterministic_ones_repeat(eval_action):
    """Actions lie in [-1, 1]; deterministic ones are the mean or the mode; own draws leave the global stream."""
    dreamer = tiny_dreamer(tiny_config(eval_action=eval_action))
    nn.init.normal_(dreamer.behavior.actor.out.weight, std=3.0)
    image, is_first = random_batch(dreamer.config).image[0], torch.ones(4, dtype=torch.bool)
    before = torch.get_rng_state()
    certain, state = dreamer.act(image, None, is_first, seeded(1), deterministic=True)
    samples = [dreamer.act(image, None, is_first, seeded(seed))[0] for seed in (1, 1, 2)]
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(certain, getattr(dreamer.behavior.actor(state.latent.feat), eval_action))
    assert torch.equal(samples[0], samples[1]) and not torch.equal(samples[0], samples[2])
    some = torch.tensor([True, False, True, False])
    mixed, _ = dreamer.act(image, None, is_first, seeded(1), deterministic=some)
    assert torch.equal(mixed, torch.where(some[:, None], certain, samples[0]))
    for action in (certain, *samples):
        assert action.shape == (4, ACTION_SIZE) and (action.abs() <= 1).all() and not action.requires_grad


def test_two_cameras_and_large_images_train():
    """Stacked cameras and 128 px images go through a whole update."""
    config = tiny_config(cameras=("agentview", "robot0_eye_in_hand"), image_size=128, batch_size=2, batch_length=3)
    assert image_shape(config) == (6, 128, 128)
    metrics = tiny_dreamer(config).train_step(random_batch(config))
    assert all(x.isfinite() for x in metrics.values())


# configuration and imports


@pytest.mark.parametrize(
    "name, value",
    [
        ("batch_size", 0),
        ("batch_size", -3),
        ("discount", 1.5),
        ("image_size", 37),
        ("horizon", 0),
        ("horizon", 1),
        ("model_lr", float("nan")),
        ("target_fraction", 2.0),
        ("actor_grad", "none"),
        ("grad_heads", ("decoder", "rewards")),
        ("kl_free", -1.0),
        ("capacity", 10),
        ("steps", 10),
    ],
)
def test_values_out_of_range_are_refused(name, value):
    """A value that can't work is refused in one line that names the field and the value."""
    with pytest.raises(UserError) as error:
        check_config(Config(**{name: value}))
    text = str(error.value)
    shown = value[-1] if isinstance(value, tuple) else str(value)
    assert name in text and shown in text and "\n" not in text


def test_train_imports_no_environment_and_prints_nothing():
    """Importing train.py loads neither simulator, gymnasium, W&B nor the program's outer files, and says nothing."""
    forbidden = ["robosuite", "mujoco", "gymnasium", "wandb", "imageio", "env", "fast", "run", "runtime"]
    code = f"import sys, train; print(*(m for m in {forbidden} if m in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "" and done.stderr == ""
