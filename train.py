"""DreamerV2: a world model learned from pixels, and an actor and a critic learned inside it (arXiv 2010.02193).

One update (`Dreamer.train_step`) on a batch of replayed sequences:
  1. the world model takes a step on image, reward, discount and KL losses (equation 2);
  2. from every posterior state the improved model imagines H steps under the actor;
  3. actor and critic take a step on lambda-returns of the imagined rewards (equations 4 - 6);
  4. now and then the target value network copies the critic.

Shapes: T time, B batch, N = T * B imagination starts (or `imagine_starts` of them), H horizon, A action, E embed,
D deter, S x K stochastic groups x classes, F = S * K + D features, C x H x W image. Time is always the first axis.

Nothing here steps an environment, opens a file or prints.
"""

import contextlib
import copy
import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from actor import DISTRIBUTIONS, TRUNC_NORMAL_GRADIENTS, Actor
from buffer import Batch
from image_codec import IMAGE_SIZES, Decoder, Encoder
from networks import LOG_2PI, Draws, RecordedDraws, discount_head, reward_head, value_head
from rssm import RSSM, RSSMState, kl_loss

# Float32 means float32: from Ampere on, cuDNN would round what goes into a convolution to the 10 bits of TF32.
torch.backends.cudnn.allow_tf32 = False


@dataclass(frozen=True)
class Config:
    """The constants of a run. Edit them here, or give any of them as a flag: `python run.py --task Door`.

    These are the preset `standard`; PRESETS below replaces some of them. A flag beats the preset, the preset beats
    this block. A control step is one action sent to the robot's controller; an agent step is one decision, that is
    `action_repeat` control steps; an update is one `train_step`.
    """

    # task
    task: str = "Lift"  # any single-arm RoboSuite task
    robot: str = "Panda"
    controller: str = "OSC_POSE"  # 6 dims of hand motion + gripper; OSC_POSITION has 3 + gripper
    rotation_scale: float = 0.02  # of how far OSC_POSE turns the hand; RoboSuite's 1 is half a radian a control step
    cameras: tuple[str, ...] = ("agentview", "robot0_eye_in_hand")  # stacked as channels, 3 each
    image_size: int = 64  # pixels a side: 64 or 128
    control_freq: float = 20  # Hz, control steps a second of simulated time
    action_repeat: int = 2  # control steps an agent step
    episode_steps: int = 200  # control steps an episode
    reward_shaping: bool = True  # dense reward in [0, 1]; false: 1 on success only
    physics_step: float = 0.002  # seconds; 0.005 halves the cost of a step but is not RoboSuite's standard physics
    num_envs: int = 1  # more than one: each in a worker process

    # run
    preset: str = "auto"  # standard, cpu, debug or paper; auto: standard on a GPU, else cpu
    seed: int = 0
    steps: int = 500_000  # control steps, prefill included
    device: str = "auto"  # cuda, mps or cpu; auto takes the first there is
    precision: str = "auto"  # of matrix products: float32 or bfloat16; auto: bfloat16 where the hardware has it
    run_dir: str = ""  # empty: runs/{task}_{preset}_{seed}
    cuda_graphs: bool = True  # on CUDA, launch an update's kernels as two graphs; no effect elsewhere
    checkpoint_minutes: float = 10  # saved at the first episode end after that many minutes
    save_replay: bool = True  # keep finished episodes on disk; false: a resume fills the replay anew
    log_every: int = 500  # control steps between metric lines
    eval_every: int = 20_000  # control steps between evaluations
    eval_steps: int = 500  # control steps an episode of an evaluation; 0: episode_steps
    eval_action: str = "mean"  # of the policy's distribution, or mode
    eval_episodes: int = 10  # of each evaluation; twice as many of the last one, and 20 with --eval
    video_every: int = 20_000  # control steps between videos
    wandb: str = "auto"  # online, offline or disabled; auto: WANDB_MODE, else online with a key and offline without

    # replay
    capacity: int = 250_000  # agent steps; 24 KB each at 64 px with two cameras
    prefill: int = 5_000  # agent steps of random actions before training
    pretrain: int = 100  # updates right after the prefill
    train_every: float = 5  # agent steps an update
    replay_focus: float = 0.5  # share of the sequences from the newest and the best tenth of episodes, half of it each
    gripper_hold: float = 0.3  # share of training episodes that hold random gripper commands now and then
    batch_size: int = 16  # sequences an update
    batch_length: int = 50  # agent steps a sequence

    # world model
    cnn_depth: int = 48  # channels of the first convolution
    deter: int = 200  # size of the GRU state
    hidden: int = 200  # units of the layers around the GRU
    stoch: int = 32  # categorical latents
    classes: int = 32  # classes of each; 0: Gaussian latents
    reward_layers: int = 4
    reward_units: int = 400
    discount_layers: int = 4
    discount_units: int = 400
    discount_head: bool = True  # learn where episodes end; false: `discount` everywhere
    grad_heads: tuple[str, ...] = (
        "decoder",
        "reward",
        "discount",
    )  # heads whose loss shapes the latent state
    reward_transform: str = "none"  # tanh squashes the rewards that the model learns
    reward_scale: float = 100.0  # weight of the reward loss
    discount_scale: float = 1.0  # weight of the discount loss
    kl_scale: float = 1.0  # weight of the KL loss
    kl_balance: float = 0.8  # share of the KL loss that trains the prior
    kl_free: float = 0.5  # nats of KL that cost nothing
    kl_free_avg: bool = False  # free nats of the batch's mean KL; false: of each element's
    decode_fraction: float = 1.0  # share of the frames, drawn anew each update, whose image loss is computed
    model_lr: float = 3e-4
    model_eps: float = 1e-5
    model_clip: float = 100.0  # of the gradient's global norm
    model_decay: float = 1e-6  # each step multiplies all parameters by 1 - decay

    # behaviour
    horizon: int = 15  # imagined agent steps
    imagine_starts: int = 0  # posteriors to imagine from, drawn at random; 0: all
    discount: float = 0.98  # an agent step
    return_lambda: float = 0.95
    actor_layers: int = 4
    actor_units: int = 400
    actor_dist: str = "trunc_normal"  # or tanh_normal; onehot for discrete actions
    trunc_normal_gradient: str = "straight_through"  # as the author's; exact: with the bounds' movement
    actor_grad: str = "dynamics"  # or reinforce, or both
    actor_grad_mix: float = 0.1  # of `both`: share of dynamics
    actor_entropy: float = 0.05  # weight of the entropy bonus
    actor_entropy_final: float = 0.003  # that it falls to, by an equal factor each update,
    entropy_updates: int = 10_000  # over so many updates; 0: it stays as it is
    actor_lr: float = 8e-5
    actor_eps: float = 1e-5
    actor_clip: float = 100.0
    actor_decay: float = 1e-6
    return_norm: bool = True  # divide the actor's returns by their running 5 - 95 % range where that exceeds 1
    value_layers: int = 4
    value_units: int = 400
    value_lr: float = 8e-5
    value_eps: float = 1e-5
    value_clip: float = 100.0
    value_decay: float = 1e-6
    target_every: int = 100  # updates between copies of the critic into the target value
    target_fraction: float = 1.0  # of the critic in such a copy


PRESETS: dict[str, dict] = {
    "standard": {},
    # The same task for a laptop without a GPU: a small model, and fewer frames an update.
    "cpu": dict(
        steps=100_000, log_every=1_000, eval_every=10_000, capacity=60_000, prefill=1_000, train_every=6,
        batch_length=25, cnn_depth=16, deter=256, hidden=256, stoch=16, classes=16,
        reward_layers=2, reward_units=256, discount_head=False, decode_fraction=0.5, model_lr=4e-4,
        imagine_starts=256, actor_layers=3, actor_units=256, actor_lr=2e-4,
        value_layers=3, value_units=256, value_lr=2e-4,
    ),
    # Everything once, in about half a minute.
    "debug": dict(
        controller="OSC_POSITION", control_freq=10, action_repeat=1, episode_steps=30,
        physics_step=0.005, steps=180, checkpoint_minutes=0,
        log_every=30, eval_every=90, eval_steps=0, eval_episodes=1, video_every=90,
        capacity=1_000, prefill=60, pretrain=2, train_every=10, batch_size=4, batch_length=10,
        cnn_depth=8, deter=64, hidden=64, stoch=8, classes=8, reward_layers=2, reward_units=64,
        discount_layers=2, discount_units=64, horizon=5, imagine_starts=16,
        actor_layers=2, actor_units=64, value_layers=2, value_units=64,
    ),
    # The author's dmc_vision numbers; only replay sampling, replay capacity and precision are ours.
    "paper": dict(
        rotation_scale=1.0, cameras=("agentview",), episode_steps=500,
        steps=1_000_000, eval_steps=0, eval_action="mode",
        prefill=1_000, replay_focus=0.0, gripper_hold=0.0, discount_head=False, grad_heads=("decoder", "reward"),
        reward_scale=1.0, kl_free=1.0, kl_free_avg=True, discount=0.99,
        actor_entropy=1e-4, actor_entropy_final=1e-4, entropy_updates=0, return_norm=False,
    ),
}  # fmt: skip


CHOICES = {
    "image_size": IMAGE_SIZES,
    "preset": ("auto", *PRESETS),
    "device": ("auto", "cuda", "mps", "cpu"),
    "precision": ("auto", "float32", "bfloat16"),
    "wandb": ("auto", "online", "offline", "disabled"),
    "reward_transform": ("none", "tanh"),
    "eval_action": ("mean", "mode"),
    "actor_dist": DISTRIBUTIONS,
    "trunc_normal_gradient": TRUNC_NORMAL_GRADIENTS,
    "actor_grad": ("dynamics", "reinforce", "both"),
}
MAY_BE_ZERO = {
    "seed", "checkpoint_minutes", "pretrain", "classes", "imagine_starts", "discount", "return_lambda",
    "reward_scale", "discount_scale", "kl_scale", "kl_balance", "kl_free", "actor_entropy", "actor_grad_mix",
    "actor_entropy_final", "entropy_updates", "eval_steps",
    "model_decay", "actor_decay", "value_decay", "gripper_hold", "replay_focus",
    "reward_layers", "discount_layers", "actor_layers", "value_layers",
}  # fmt: skip
AT_MOST_ONE = {
    "discount", "return_lambda", "kl_balance", "decode_fraction", "actor_grad_mix", "target_fraction", "gripper_hold",
    "replay_focus", "rotation_scale", "model_decay", "actor_decay", "value_decay",
}  # fmt: skip


def check_config(config: Config) -> None:
    """Refuse values that can't work: ValueError with one line that names the field, the value and what is valid."""
    c = config
    for field in dataclasses.fields(c):
        value = getattr(c, field.name)
        check_type(field.name, value, field.type)
        check_choice(field.name, value)
        if isinstance(value, int | float) and not isinstance(value, bool):
            least = "at least 0" if field.name in MAY_BE_ZERO else "above 0"
            if not math.isfinite(value) or value < 0 or (value == 0 and field.name not in MAY_BE_ZERO):
                raise ValueError(f"{field.name} {value} is out of range: it must be {least}")
            if field.name in AT_MOST_ONE and value > 1:
                raise ValueError(f"{field.name} {value} is out of range: it must be {least} and at most 1")
    if c.actor_dist == "onehot":
        raise ValueError(
            "actor_dist onehot is for discrete actions; RoboSuite's are continuous: trunc_normal, tanh_normal"
        )
    if unknown := set(c.grad_heads) - {"decoder", "reward", "discount"}:
        raise ValueError(f"grad_heads {', '.join(sorted(unknown))} is unknown; valid: decoder, reward, discount")
    if c.entropy_updates and not (c.actor_entropy and c.actor_entropy_final):
        raise ValueError(
            f"entropy_updates {c.entropy_updates} needs actor_entropy {c.actor_entropy} and actor_entropy_final "
            f"{c.actor_entropy_final} above 0: the weight goes from one to the other by equal factors"
        )
    if c.seed >= 2**32:  # NumPy's limit
        raise ValueError(f"seed {c.seed} is out of range: it must be at most {2**32 - 1}")
    if c.horizon < 2:
        raise ValueError(f"horizon {c.horizon} is out of range: the actor needs at least 2 imagined steps")
    if c.eval_steps % c.action_repeat:
        raise ValueError(f"eval_steps {c.eval_steps} is not a multiple of action_repeat {c.action_repeat}")
    rows = c.episode_steps // c.action_repeat + 1
    if rows < c.batch_length:
        raise ValueError(
            f"batch_length {c.batch_length} is longer than an episode of {rows} rows "
            f"(episode_steps {c.episode_steps} / action_repeat {c.action_repeat}, and the reset)"
        )
    # Of the two episodes that share a full replay, one has a whole sequence if there is room for two.
    for name, sequences in (("prefill", 1), ("capacity", 2)):
        least = sequences * c.num_envs * c.batch_length
        if getattr(c, name) < least:
            raise ValueError(
                f"{name} {getattr(c, name)} is too small: at least {least}, {sequences} x num_envs {c.num_envs} x "
                f"batch_length {c.batch_length}"
            )
    # A replay must hold the steps that training waits for. No step are the resets, nor the first row that is left of
    # a half overwritten episode.
    ring = c.capacity // c.num_envs
    held = c.num_envs * (ring - math.ceil(ring / rows) - 1)
    if held < c.prefill:
        raise ValueError(f"capacity {c.capacity} is too small: it holds {held} agent steps, prefill is {c.prefill}")
    if c.steps < c.prefill * c.action_repeat:
        raise ValueError(f"steps {c.steps} end before the prefill of {c.prefill * c.action_repeat} control steps does")


TYPES = {bool: "true or false", int: "a whole number", float: "a number", str: "text", tuple[str, ...]: "names"}


def check_type(name: str, value: object, wanted: type) -> None:
    """Refuse a value that isn't of its field's type (ValueError)."""
    if wanted == tuple[str, ...]:
        right = isinstance(value, tuple) and all(isinstance(item, str) for item in value)
    else:
        right = isinstance(value, (int, float) if wanted is float else wanted)
        right &= wanted is bool or not isinstance(value, bool)
    if not right:
        raise ValueError(f"{name} {value!r} is of the wrong type: it must be {TYPES[wanted]}")


def check_choice(name: str, value: object) -> None:
    """Refuse a value that is not among the field's choices, if it has any (ValueError)."""
    if name in CHOICES and value not in CHOICES[name]:
        raise ValueError(f"{name} {value} is unknown; valid: {', '.join(map(str, CHOICES[name]))}")


CONTEXT = 5  # frames observed before an open-loop prediction
SATURATED = 0.95  # an action beyond it counts as saturated in the metrics


class Imagination(NamedTuple):
    """Rollouts of the actor inside the model. Entry i of the first axis belongs to the state after i steps:

        state   s0 --a1--> s1 --a2--> s2 ...  s(H-1) --aH--> sH       s0 is a replayed posterior
        reward  r0         r1         r2                     rH       of BEING in that state
        weight  1          d0         d0 d1                           chance that the episode got that far

    `action[i]` led to state i and was drawn from `policy[i-1]`; action[0] is zeros.
    """

    feat: Tensor  # (H + 1, N, F)
    action: Tensor  # (H + 1, N, A)
    policy: tuple[Tensor, ...]  # raw parameters of the action distributions at states 0 .. H - 1, (H, N, A) each
    reward: Tensor  # (H + 1, N)
    discount: Tensor  # (H + 1, N), gamma times the chance that the episode goes on
    weight: Tensor  # (H + 1, N), without gradient


class Prediction(NamedTuple):
    """What the model expects to see and to get."""

    image: Tensor  # (T, B, C, H, W), about [0, 1], not clipped
    reward: Tensor  # (T, B), as `WorldModel.learned_reward` has it


class WorldModel(nn.Module):
    """Encoder, RSSM, decoder, reward and discount heads, and their loss."""

    def __init__(self, config: Config, image_shape: tuple[int, int, int], action_size: int):
        super().__init__()
        c = self.config = config
        channels, size = image_shape[0], image_shape[1]
        self.encoder = Encoder(size, channels, c.cnn_depth)
        self.rssm = build_rssm(c, self.encoder.embed_size, action_size)
        self.decoder = Decoder(self.rssm.feat_size, size, channels, c.cnn_depth)
        self.reward = reward_head(self.rssm.feat_size, c.reward_layers, c.reward_units, (c.stoch, c.classes))
        self.discount = None
        if c.discount_head:
            units, latents = c.discount_units, (c.stoch, c.classes)
            self.discount = discount_head(self.rssm.feat_size, c.discount_layers, units, latents)

    def loss(self, batch: Batch, draws: Draws) -> tuple[Tensor, RSSMState, dict[str, Tensor]]:
        """Equation 2 on a batch (T, B, ...). Returns the loss, the posteriors (T, B, ...) and metrics."""
        c = self.config
        image = preprocess(batch.image)
        post, prior = self.rssm.observe(self.encoder(image), batch.action, batch.is_first, draws)
        feat = post.feat
        decoded, target = self._frames(feat, image, draws)
        image_dist = self.decoder(self._head_input("decoder", decoded))
        reward = self.learned_reward(batch.reward)
        losses = {
            "image": -image_dist.log_prob(target).mean(),
            "reward": -self.reward(self._head_input("reward", feat)).log_prob(reward).mean(),
        }
        if self.discount is not None:
            goes_on = c.discount * (1.0 - batch.is_terminal.float())
            losses["discount"] = -self.discount(self._head_input("discount", feat)).log_prob(goes_on).mean()
        losses["kl"], kl = kl_loss(
            self.rssm.kl, post.stats, prior, balance=c.kl_balance, free=c.kl_free, free_avg=c.kl_free_avg
        )
        scales = {"image": 1.0, "reward": c.reward_scale, "discount": c.discount_scale, "kl": c.kl_scale}
        loss = sum(scales[name] * value for name, value in losses.items())
        with torch.no_grad():
            metrics = {f"model/{name}_loss": value.detach() for name, value in losses.items()}
            metrics |= {
                "model/loss": loss.detach(),
                # what the loss is made of, without another pass over all pixels
                "model/image_mse": 2 * losses["image"] / math.prod(target.shape[-3:]) - LOG_2PI,
                "model/kl": kl.mean(),
                "model/prior_entropy": self.rssm.entropy(prior).mean(),
                "model/post_entropy": self.rssm.entropy(post.stats).mean(),
                "model/latents_used": self.rssm.used(post.stats),
            }
        return loss, post, metrics

    def imagine(
        self, actor: Actor, start: RSSMState, is_terminal: Tensor, draws: Draws, differentiable: bool
    ) -> Imagination:
        """Roll the actor out from `start` (N, ...), whose rows may be terminal (N,).

        The actor never gets a gradient through its input. If `differentiable`, its actions carry one, so that
        rewards and values of later states reach back to it through the dynamics.
        """
        c, raws = self.config, []

        def policy(feat: Tensor) -> Tensor:
            raws.append(actor.raw(feat.detach()))
            action = actor.distribution(*raws[-1]).rsample(draws)
            return action if differentiable else action.detach()

        _, feat, action = self.rssm.imagine(policy, start, c.horizon, draws)
        reward = self.reward(feat).mean
        discount = torch.full_like(reward, c.discount)
        if self.discount is not None:
            known = c.discount * (1.0 - is_terminal.float())  # of the start, where the truth is in the replay
            discount = torch.cat([known[None], self.discount(feat[1:]).mean])
        weight = torch.cat([torch.ones_like(discount[:1]), discount[:-1].detach()]).cumprod(0)
        policies = tuple(torch.stack(x) for x in zip(*raws, strict=True))
        return Imagination(feat, action, policies, reward, discount, weight)

    def learned_reward(self, reward: Tensor) -> Tensor:
        """The environment's rewards as the reward head learns them."""
        return reward.tanh() if self.config.reward_transform == "tanh" else reward

    def filter(self, batch: Batch, draws: Draws) -> RSSMState:
        """Posteriors (T, B, ...) of a batch."""
        return self.rssm.observe(self.encoder(preprocess(batch.image)), batch.action, batch.is_first, draws)[0]

    @torch.no_grad()
    def predict(self, batch: Batch, draws: Draws, context: int = CONTEXT) -> Prediction:
        """Open-loop prediction: `context` observed frames (T - 1 if that is less), then imagined ones.

        What is imagined follows the true actions.
        """
        context = min(context, len(batch.image) - 1)
        post = self.filter(Batch(*(x[:context] for x in batch)), draws)
        actions = iter(batch.action[context:])
        start, steps = post.map(lambda x: x[-1]), len(batch.action) - context
        _, imagined, _ = self.rssm.imagine(lambda feat: next(actions), start, steps, draws)
        feat = torch.cat([post.feat, imagined[1:]])
        return Prediction(self.decoder(feat).mean + 0.5, self.reward(feat).mean)

    def _frames(self, feat: Tensor, image: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
        """The frames to decode: all of them, or a random part, which leaves the mean loss unbiased."""
        if self.config.decode_fraction == 1.0:
            return feat, image
        total = feat.shape[0] * feat.shape[1]
        index = draws.subset(total, math.ceil(self.config.decode_fraction * total), feat.device)
        return feat.flatten(0, 1)[index], image.flatten(0, 1)[index]

    def _head_input(self, name: str, feat: Tensor) -> Tensor:
        return feat if name in self.config.grad_heads else feat.detach()


class Behavior(nn.Module):
    """Actor, value (critic) and target value, and their losses on imagined rollouts."""

    def __init__(self, config: Config, feat_size: int, action_size: int):
        super().__init__()
        c = self.config = config
        self.actor = build_actor(c, feat_size, action_size)
        self.value = value_head(feat_size, c.value_layers, c.value_units, (c.stoch, c.classes))
        self.target_value = copy.deepcopy(self.value).requires_grad_(False)
        self.register_buffer("return_range", torch.zeros(()))
        # A tensor, as a captured graph would keep a number; it follows from the count of updates.
        self.register_buffer("entropy_weight", torch.tensor(c.actor_entropy), persistent=False)

    def loss(self, imagined: Imagination, draws: Draws) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Actor loss (equation 6) and value loss (equation 5) on imagined rollouts, and metrics."""
        c = self.config
        feat, weight = imagined.feat, imagined.weight
        target_value = self.target_value(feat).mean
        returns = lambda_return(  # (H, N), of states 0 .. H - 1
            imagined.reward[:-1], target_value[:-1], imagined.discount[:-1], target_value[-1], c.return_lambda
        )
        # The action drawn at state i shows its effect from state i + 1 on: policies 0 .. H - 2 meet returns
        # 1 .. H - 1. The last policy's action only feeds the bootstrap value.
        policy = self.actor.distribution(*(x[:-1] for x in imagined.policy))
        entropy = policy.entropy(draws)
        objective = self._objective(policy, imagined.action[1:-1], returns[1:], target_value[:-2])
        actor_loss = -(weight[:-2] * (objective + self.entropy_weight * entropy)).mean()
        value = self.value(feat[:-1].detach())
        value_loss = -(weight[:-1] * value.log_prob(returns.detach())).mean()
        metrics = {
            "behaviour/actor_loss": actor_loss,
            "behaviour/value_loss": value_loss,
            "behaviour/entropy": entropy.mean(),
            "behaviour/value": value.mean.mean(),
            "behaviour/target_value": target_value.mean(),
            "behaviour/lambda_return": returns.mean(),
            "behaviour/imagined_reward": imagined.reward.mean(),
            "behaviour/imagined_reward_std": imagined.reward.std(correction=0),
            "behaviour/action_mean": imagined.action[1:].mean(),
            "behaviour/action_std": imagined.action[1:].std(correction=0),
            "behaviour/action_saturated": (imagined.action[1:].detach().abs() > SATURATED).float().mean(),
        }
        return actor_loss, value_loss, {name: value.detach() for name, value in metrics.items()}

    def _objective(self, policy, action: Tensor, returns: Tensor, baseline: Tensor) -> Tensor:
        """What the actor maximises beside its entropy, (H - 1, N)."""
        c = self.config
        scale = self._return_scale(returns)
        if c.actor_grad == "dynamics":
            return returns * scale
        advantage = (returns - baseline).detach() * scale
        if c.actor_grad == "reinforce":
            return policy.log_prob(action.detach()) * advantage
        # As in the author's code, the action inside the log-density is not stopped here.
        mix = c.actor_grad_mix
        return mix * returns * scale + (1 - mix) * policy.log_prob(action) * advantage

    def _return_scale(self, returns: Tensor) -> Tensor | float:
        if not self.config.return_norm:
            return 1.0
        # quantile() has an input limit and sorts anyway; nearest ranks are enough here.
        ranked = returns.detach().flatten().sort().values
        low, high = ranked[int(0.05 * (len(ranked) - 1))], ranked[int(0.95 * (len(ranked) - 1))]
        width = high - low
        # An update that is skipped for a NaN leaves no trace, here neither: the range would keep it for ever.
        self.return_range.lerp_(torch.where(width.isfinite(), width, self.return_range), 0.01)
        return 1.0 / self.return_range.clamp(min=1.0)

    def set_entropy_weight(self, updates: int) -> None:
        """The weight of the entropy bonus after so many updates."""
        c = self.config
        done = min(updates / c.entropy_updates, 1.0) if c.entropy_updates else 0.0
        self.entropy_weight.fill_(c.actor_entropy ** (1 - done) * c.actor_entropy_final**done)

    def update_target(self, fraction: float) -> None:
        """Move the target value towards the critic; a fraction of 1 copies it."""
        with torch.no_grad():
            for target, value in zip(self.target_value.parameters(), self.value.parameters(), strict=True):
                target.lerp_(value, fraction)


class ActState(NamedTuple):
    """What the policy remembers between steps: the latent state and the action it chose last."""

    latent: RSSMState  # (B, ...)
    action: Tensor  # (B, A)


class Policy(nn.Module):
    """The part that acts: encoder, RSSM and actor. `eval_action`, mean or mode, is its deterministic action."""

    def __init__(self, encoder: Encoder, rssm: RSSM, actor: Actor, eval_action: str):
        super().__init__()
        self.encoder, self.rssm, self.actor, self.eval_action = encoder, rssm, actor, eval_action

    @classmethod
    def build(cls, config: Config, image_shape: tuple[int, int, int], action_size: int) -> "Policy":
        """A freshly initialised policy, for weights that are loaded next."""
        encoder = Encoder(image_shape[1], image_shape[0], config.cnn_depth)
        rssm = build_rssm(config, encoder.embed_size, action_size)
        return cls(encoder, rssm, build_actor(config, rssm.feat_size, action_size), config.eval_action)

    def initial(self, batch: int) -> ActState:
        """The state before the first step."""
        latent = self.rssm.initial(batch)
        return ActState(latent, latent.deter.new_zeros(batch, self.actor.out.out_features))

    @torch.no_grad()
    def forward(
        self, image: Tensor, state: ActState | None, is_first: Tensor, draws: Draws, deterministic: bool
    ) -> tuple[Tensor, ActState]:
        """uint8 images (B, C, H, W) and is_first (B,) -> actions (B, A) in [-1, 1] and the next state.

        The latent is drawn from the posterior either way; `deterministic` takes the action's mean or mode.
        """
        state = self.initial(len(image)) if state is None else state
        latent = self.rssm.obs_step(state.latent, self.encoder(preprocess(image)), state.action, is_first, draws)
        dist = self.actor(latent.feat)
        action = getattr(dist, self.eval_action) if deterministic else dist.rsample(draws)
        return action, ActState(latent, action)

    def step(self, image: np.ndarray, state: ActState | None = None) -> tuple[np.ndarray, ActState]:
        """Act in one environment: uint8 image (C, H, W) -> deterministic action (A,) and the next state.

        Pass no state at an episode's start, and the returned one after that.
        """
        device = self.actor.out.weight.device
        images = torch.as_tensor(image, device=device)[None]
        is_first = torch.tensor([state is None], device=device)
        action, state = self(images, state, is_first, Draws(), deterministic=True)
        return action[0].float().cpu().numpy(), state


MAX_SKIPPED_IN_A_ROW = 10  # updates; after that nothing is learnt any more


class Optimizer:
    """Adam with global-norm clipping and decoupled decay, as the author's TensorFlow code computes them.

    There, epsilon is added before the second moment's bias correction, so torch's has to be divided by it; and
    the decay is not multiplied by the learning rate. A step whose gradient is not finite is skipped and counted on
    the device, so that the host need not wait for it.
    """

    BETAS = (0.9, 0.999)

    def __init__(self, module: nn.Module, lr: float, eps: float, clip: float, decay: float):
        self.params = [p for p in module.parameters() if p.requires_grad]
        self.eps, self.clip, self.steps = eps, clip, 0
        self.adam = torch.optim.AdamW(self.params, lr, self.BETAS, weight_decay=decay / lr, fused=True)
        self.skipped = torch.zeros((), device=self.params[0].device)
        # On MPS the kernel neither divides nor skips (github.com/pytorch/pytorch/pull/186360), and says nothing.
        self.kernel_clips = self.skipped.device.type != "mps"
        self.skipped_in_a_row = torch.zeros_like(self.skipped)  # stays once it is MAX_SKIPPED_IN_A_ROW

    def backward(self, loss: Tensor) -> None:
        """Leave the gradients of `loss` in the parameters, for `step`."""
        loss.backward(inputs=self.params)

    def step(self) -> Tensor:
        """Descend the gradients and forget them; returns their global norm before clipping."""
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.params])
        found_inf = 1.0 - norm.isfinite().float()
        self.skipped += found_inf
        in_a_row = (self.skipped_in_a_row + 1) * found_inf
        self.skipped_in_a_row = torch.where(
            self.skipped_in_a_row < MAX_SKIPPED_IN_A_ROW, in_a_row, MAX_SKIPPED_IN_A_ROW
        )
        self.steps += 1  # skipped ones too: to leave them out the host would have to wait for the device
        for group in self.adam.param_groups:
            group["eps"] = self.eps / math.sqrt(1 - self.BETAS[1] ** self.steps)
        if self.kernel_clips:
            self.adam.grad_scale = norm.clamp(min=self.clip) / self.clip  # the fused kernel divides by it
            self.adam.found_inf = found_inf
            self.adam.step()
        elif not found_inf:  # the host waits
            torch.nn.utils.clip_grads_with_norm_(self.params, self.clip, norm)
            self.adam.step()
        self.adam.zero_grad(set_to_none=True)
        return norm

    def moments(self) -> list[Tensor]:
        """Adam's moments of all parameters, none before the first step."""
        return [state[name] for state in self.adam.state.values() for name in ("exp_avg", "exp_avg_sq")]

    def state_dict(self) -> dict:
        return {"adam": self.adam.state_dict(), "steps": self.steps, "skipped": self.skipped}

    def load_state_dict(self, state: dict) -> None:
        """Moments and counters; learning rate and decay stay those of the present configuration."""
        (saved,), (ours,) = state["adam"]["param_groups"], self.adam.param_groups
        group = dict(saved, lr=ours["lr"], weight_decay=ours["weight_decay"])
        self.adam.load_state_dict(dict(state["adam"], param_groups=[group]))
        self.steps = state["steps"]
        self.skipped.copy_(state["skipped"])


class Graphed:
    """A function of tensors that leaves gradients, replayed as one CUDA graph after a few ordinary calls.

    An update is thousands of kernels that take longer to launch than to run; a graph launches them together. The
    function must do the same on the same shapes at every call and never wait for the device. What a call returns, and
    the gradients it leaves, are overwritten by the next one.
    """

    WARMUP = 3  # calls, in which libraries choose their algorithms and allocate their workspaces

    def __init__(self, function: Callable, params: list[nn.Parameter]):
        self.function, self.params = function, params
        self.calls = 0
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, *inputs: Tensor):
        self.calls += 1
        if self.calls <= self.WARMUP:
            return self.function(*inputs)
        if self.graph is None:
            self._capture(inputs)
        for ours, given in zip(self.inputs, inputs, strict=True):
            ours.copy_(given)
        self.graph.replay()
        for param, gradient in zip(self.params, self.gradients, strict=True):
            param.grad = gradient
        return self.outputs

    def _capture(self, inputs: tuple[Tensor, ...]) -> None:
        """Record the function's kernels, none of which runs yet. The parameters must have no gradients."""
        self.inputs = [x.clone() for x in inputs]
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.outputs = self.function(*self.inputs)
        self.gradients = [param.grad for param in self.params]


class Dreamer:
    """The agent: world model, behaviour and their three optimizers.

    Args:
        image_shape: (C, H, W) of the uint8 images.
        action_size: A.
        device: where parameters live and updates run.
        autocast_dtype: torch.bfloat16 for mixed precision (parameters and losses stay float32), or None.
    """

    def __init__(
        self,
        config: Config,
        image_shape: tuple[int, int, int],
        action_size: int,
        device: torch.device | str = "cpu",
        autocast_dtype: torch.dtype | None = None,
    ):
        self.config, self.device, self.autocast_dtype = config, torch.device(device), autocast_dtype
        self.image_shape, self.action_size = tuple(image_shape), action_size
        self.world_model = WorldModel(config, image_shape, action_size).to(self.device)
        feat_size = self.world_model.rssm.feat_size
        self.behavior = Behavior(config, feat_size, action_size).to(self.device)
        c = config
        self.policy = Policy(self.world_model.encoder, self.world_model.rssm, self.behavior.actor, c.eval_action)
        self.model_optimizer = Optimizer(self.world_model, c.model_lr, c.model_eps, c.model_clip, c.model_decay)
        self.actor_optimizer = Optimizer(self.behavior.actor, c.actor_lr, c.actor_eps, c.actor_clip, c.actor_decay)
        self.value_optimizer = Optimizer(self.behavior.value, c.value_lr, c.value_eps, c.value_clip, c.value_decay)
        self.draws = Draws()
        self.updates = 0
        self._learn_model, self._learn_behavior = self._model_gradients, self._behavior_gradients
        if self.device.type == "cuda" and c.cuda_graphs:
            self.use_graphs()

    def use_graphs(self) -> None:
        """Replay the two halves of an update as CUDA graphs from now on."""
        behavior_params = self.actor_optimizer.params + self.value_optimizer.params
        self._learn_model = Graphed(self._model_gradients, self.model_optimizer.params)
        self._learn_behavior = Graphed(self._behavior_gradients, behavior_params)

    @property
    def optimizers(self) -> tuple[Optimizer, Optimizer, Optimizer]:
        return self.model_optimizer, self.actor_optimizer, self.value_optimizer

    def train_step(self, batch: Batch) -> dict[str, Tensor]:
        """One update of everything on a batch (T, B, ...) on the agent's device. Returns detached scalars."""
        self.behavior.set_entropy_weight(self.updates)
        post, model_metrics = self._learn_model(*batch)
        metrics = dict(model_metrics)
        metrics["model/grad_norm"] = self.model_optimizer.step()
        start, is_terminal = self._starts(post, batch.is_terminal)
        metrics |= self._learn_behavior(*start, is_terminal)
        metrics["behaviour/actor_grad_norm"] = self.actor_optimizer.step()
        metrics["behaviour/value_grad_norm"] = self.value_optimizer.step()

        if self.updates % self.config.target_every == 0:
            self.behavior.update_target(1.0 if self.updates == 0 else self.config.target_fraction)
        self.updates += 1
        return metrics

    def _model_gradients(self, *batch: Tensor) -> tuple[RSSMState, dict[str, Tensor]]:
        """Step 1 up to the gradients. Returns the posteriors (T, B, ...) and metrics."""
        with self.autocast():
            loss, post, metrics = self.world_model.loss(Batch(*batch), self.draws)
        self.model_optimizer.backward(loss)
        return post.detach(), metrics

    def _behavior_gradients(self, *start: Tensor) -> dict[str, Tensor]:
        """Steps 2 and 3 up to the gradients, from the tensors of a state (N, ...) and is_terminal (N,)."""
        *state, is_terminal = start
        with self.autocast():
            actor_loss, value_loss, metrics = self._behavior_loss(RSSMState(*state), is_terminal, self.draws)
        self.actor_optimizer.backward(actor_loss)
        self.value_optimizer.backward(value_loss)
        return metrics

    def _behavior_loss(
        self, start: RSSMState, is_terminal: Tensor, draws: Draws
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Imagine from `start` (N, ...) in the model as it is: actor loss, value loss and metrics."""
        with frozen(self.world_model):
            differentiable = self.config.actor_grad != "reinforce"
            imagined = self.world_model.imagine(self.behavior.actor, start, is_terminal, draws, differentiable)
            return self.behavior.loss(imagined, draws)

    def skipped_in_a_row(self) -> int:
        """Updates up to now that an optimizer skipped without a break, the most of the three. Waits for the device."""
        return int(max(float(optimizer.skipped_in_a_row) for optimizer in self.optimizers))

    def non_finite(self) -> str | None:
        """The name of the first parameter, buffer or optimizer moment with a NaN or infinity. Waits for the device."""
        named = {
            f"{name}.{key}": value
            for name in ("world_model", "behavior")
            for key, value in getattr(self, name).state_dict().items()
        }
        for name in ("model_optimizer", "actor_optimizer", "value_optimizer"):
            named |= {f"{name}.moments[{i}]": value for i, value in enumerate(getattr(self, name).moments())}
        # Magnitudes, unlike sums, don't overflow; one transfer for all of them.
        largest = torch.stack([value.abs().max().float() for value in named.values()]).isfinite().tolist()
        return next((name for name, finite in zip(named, largest, strict=True) if not finite), None)

    def gradients(self, batch: Batch, draws: Draws) -> dict[str, Tensor]:
        """What an update on a batch would descend: parameter name -> gradient, in float32. No parameter changes."""
        model, behavior = self.world_model, self.behavior
        model_loss, post, _ = model.loss(batch, draws)
        found = _gradients("world_model", model, model_loss)
        start, is_terminal = post.detach().map(lambda x: x.flatten(0, 1)), batch.is_terminal.flatten()
        range_before = behavior.return_range.clone()
        actor_loss, value_loss, _ = self._behavior_loss(start, is_terminal, draws)
        behavior.return_range.copy_(range_before)
        return found | _gradients("actor", behavior.actor, actor_loss) | _gradients("value", behavior.value, value_loss)

    def act(
        self, image: Tensor, state: ActState | None, is_first: Tensor, draws: Draws | None = None,
        deterministic: bool = False,
    ) -> tuple[Tensor, ActState]:  # fmt: skip
        """Actions for uint8 images (B, C, H, W) of B environments; see `Policy.forward`."""
        with self.autocast():
            return self.policy(image, state, is_first, draws or self.draws, deterministic)

    def predict(self, batch: Batch, draws: Draws) -> Prediction:
        """Open-loop prediction of a batch; see `WorldModel.predict`."""
        with self.autocast():
            return self.world_model.predict(batch, draws)

    @torch.no_grad()
    def dream(self, batch: Batch, steps: int, draws: Draws) -> Prediction:
        """What the policy, sampled as in training, expects for `steps` steps after the batch: (steps, B, ...)."""
        with self.autocast():
            start = self.world_model.filter(batch, draws).map(lambda x: x[-1])
            actor = self.behavior.actor
            _, feat, _ = self.world_model.rssm.imagine(lambda feat: actor(feat).rsample(draws), start, steps, draws)
            feat = feat[1:]
            return Prediction(self.world_model.decoder(feat).mean + 0.5, self.world_model.reward(feat).mean)

    @torch.no_grad()
    def judge(self, batch: Batch, draws: Draws) -> tuple[Tensor, Tensor]:
        """The reward and the value that model and critic read from the posteriors of a batch: (T, B) each."""
        with self.autocast():
            feat = self.world_model.filter(batch, draws).feat
            return self.world_model.reward(feat).mean, self.behavior.value(feat).mean

    def autocast(self) -> contextlib.AbstractContextManager:
        """The only place that lowers precision: matrix products and convolutions inside run in `autocast_dtype`."""
        if self.autocast_dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.autocast_dtype)

    def state_dict(self) -> dict:
        return {
            "world_model": self.world_model.state_dict(),
            "behavior": self.behavior.state_dict(),
            "model_optimizer": self.model_optimizer.state_dict(),
            "actor_optimizer": self.actor_optimizer.state_dict(),
            "value_optimizer": self.value_optimizer.state_dict(),
            "updates": self.updates,
        }

    def load_state_dict(self, state: dict) -> None:
        for name in ("world_model", "behavior", "model_optimizer", "actor_optimizer", "value_optimizer"):
            getattr(self, name).load_state_dict(state[name])
        self.updates = state["updates"]

    def _starts(self, post: RSSMState, is_terminal: Tensor) -> tuple[RSSMState, Tensor]:
        """The posteriors to imagine from, detached: all (T * B, ...) or `imagine_starts` of them."""
        start, is_terminal = post.detach().map(lambda x: x.flatten(0, 1)), is_terminal.flatten()
        total, count = len(is_terminal), self.config.imagine_starts
        if 0 < count < total:
            index = self.draws.subset(total, count, is_terminal.device)
            return start.map(lambda x: x[index]), is_terminal[index]
        return start, is_terminal


def _gradients(prefix: str, module: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    named = {f"{prefix}.{name}": p for name, p in module.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(loss, list(named.values()), retain_graph=True)
    return dict(zip(named, found, strict=True))


def gradient_deviation(gradients: dict[str, Tensor], reference: dict[str, Tensor]) -> tuple[float, str]:
    """The largest relative difference of a gradient from its reference on the CPU, and its parameter's name.

    Relative to the norm of the parameter's own gradient, or to a millionth of the norm of all of them where that
    is more: rounding alone decides what a gradient is that cancels to almost zero.
    """
    floor = 1e-6 * float(torch.nn.utils.get_total_norm(list(reference.values())))
    worst, where = 0.0, ""
    for name, expected in reference.items():
        difference = float((gradients[name].cpu() - expected).norm())
        deviation = difference / max(float(expected.norm()), floor, 1e-30)
        if math.isnan(deviation):
            deviation = math.inf
        if deviation > worst:
            worst, where = deviation, name
    return worst, where


def compare_with_cpu(agent: Dreamer, batch: Batch) -> tuple[float, str]:
    """`gradient_deviation` of the agent's device from the CPU on one batch, with equal weights and draws.

    MPS has had wrong gradients without an error (pytorch issues 153957, 175188, 177116).
    """
    with torch.random.fork_rng(devices=[]):  # to build a Dreamer draws initial weights
        reference = Dreamer(agent.config, agent.image_shape, agent.action_size)
    for name in ("world_model", "behavior"):
        getattr(reference, name).load_state_dict(getattr(agent, name).state_dict())
    draws = RecordedDraws(torch.Generator().manual_seed(0))
    expected = reference.gradients(batch.to("cpu"), draws)
    return gradient_deviation(agent.gradients(batch, draws.replay()), expected)


def build_rssm(config: Config, embed_size: int, action_size: int) -> RSSM:
    return RSSM(
        embed_size=embed_size, action_size=action_size,
        deter=config.deter, hidden=config.hidden, stoch=config.stoch, classes=config.classes,
    )  # fmt: skip


def build_actor(config: Config, feat_size: int, action_size: int) -> Actor:
    return Actor(
        feat_size=feat_size, action_size=action_size, layers=config.actor_layers, units=config.actor_units,
        dist=config.actor_dist, sample_gradient=config.trunc_normal_gradient, latents=(config.stoch, config.classes),
    )  # fmt: skip


def lambda_return(reward: Tensor, value: Tensor, discount: Tensor, bootstrap: Tensor, lambda_: float) -> Tensor:
    """Equation 4: G[t] = r[t] + d[t] ((1 - lambda) v[t+1] + lambda G[t+1]), with v[H] = G[H] = bootstrap.

    reward, value, discount (H, N), bootstrap (N) -> (H, N).
    """
    assert reward.shape == value.shape == discount.shape and bootstrap.shape == reward.shape[1:]
    next_value = torch.cat([value[1:], bootstrap[None]])
    inputs = reward + discount * next_value * (1 - lambda_)
    returns, last = [], bootstrap
    for now, d in zip(reversed(inputs.unbind()), reversed(discount.unbind()), strict=True):
        last = now + d * lambda_ * last
        returns.append(last)
    return torch.stack(returns[::-1])


def preprocess(image: Tensor) -> Tensor:
    """uint8 images (..., C, H, W) -> float32 in [-0.5, 0.5]; the one place where pixels become floats.

    Here they also take the channels-last order in memory, while a pixel is still a byte: no later step copies them.
    """
    flat = image.reshape(-1, *image.shape[-3:]).contiguous(memory_format=torch.channels_last)
    return flat.float().div_(255).sub_(0.5).reshape(image.shape)


@contextlib.contextmanager
def frozen(module: nn.Module):
    """Inside, the module's parameters collect no gradient; gradients still pass through it."""
    params = [p for p in module.parameters() if p.requires_grad]
    for p in params:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in params:
            p.requires_grad_(True)
