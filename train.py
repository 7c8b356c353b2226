"""DreamerV2: a world model learned from pixels, and an actor and a critic learned inside it (arXiv 2010.02193).

One update (`Dreamer.train_step`) on a batch of replayed sequences:
  1. the world model takes a step on image, reward, discount and KL losses (equation 2);
  2. from posterior states the improved model imagines H steps under the actor;
  3. actor and critic take a step on lambda-returns of the imagined rewards (equations 4 - 6);
  4. every `target_every` updates, the target value network copies the critic or moves towards it;
  5. the averaged policy, which is evaluated, moves towards the policy.

Shapes: T time, B batch, N = T * B imagination starts (or `imagine_starts` of them), H horizon, A action, E embed,
D deter, S x K stochastic groups x classes, F = S * K + D features, C x H x W image (H is the height there). Time is
always the first axis.

Nothing here steps an environment, opens a file or prints: `python run.py` trains.
"""

import contextlib
import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from actor import Actor, TruncNormal
from buffer import Batch
from image_codec import Decoder, Encoder
from networks import LOG_2PI, Bernoulli, Draws, Head, UnitNormal
from rssm import RSSM, RSSMState, kl_loss

# Float32 means float32: from Ampere on, cuDNN would round what goes into a convolution to the 10 bits of TF32.
torch.backends.cudnn.allow_tf32 = False


@dataclass(frozen=True)
class Range:
    """The finite numbers that a constant may be: from `low` to `high`. If `above` is true, `low` itself is excluded."""

    low: float
    high: float = math.inf
    above: bool = False


T = TypeVar("T")
Fixed = Annotated[T, "fixed"]  # a resumed run keeps it: weights, or what stored actions and pictures mean, depend on it
Kept = Annotated[T, "kept"]  # a resumed run keeps it, although its weights would fit another value
Env = Annotated[T, "env"]  # a keyword of `make_env`
Count = Annotated[int, Range(1, 1e12)]
Whole = Annotated[int, Range(0, 1e12)]
Size = Annotated[int, Range(1, 1e5), "fixed"]
Layers = Annotated[int, Range(0, 100), "fixed"]
Positive = Annotated[float, Range(0, above=True)]
Weight = Annotated[float, Range(0)]
Share = Annotated[float, Range(0, 1)]
PositiveShare = Annotated[float, Range(0, 1, above=True)]
Heads = tuple[Literal["decoder", "reward", "discount"], ...]


@dataclass(frozen=True)
class Config:
    """The constants of a run. Edit them here, or give any of them as a flag: `python run.py --task Door`.

    These are the preset `standard`; TASKS and PRESETS below replace some of them. A flag beats PRESETS, which beats
    TASKS, which beats this block. A control step is one action sent to the robot's controller; an agent step is one
    decision, which holds for `action_repeat` control steps; an update is one `train_step`. Most types say which values
    are allowed; what RoboSuite has to know is checked when an environment is built.
    """

    # task
    task: Env[Fixed[str]] = "Lift"  # name of a single-arm RoboSuite task
    robot: Env[Fixed[str]] = "Panda"  # name of a RoboSuite robot with one arm on a fixed base
    controller: Env[Fixed[str]] = "OSC_POSE"  # OSC_POSE, OSC_POSITION (without turns), JOINT_POSITION or JOINT_TORQUE
    rotation_scale: Env[Fixed[PositiveShare]] = 0.02  # with OSC_POSE, a factor for the commands that turn the hand
    cameras: Env[Fixed[tuple[str, ...]]] = ("agentview", "sideview", "robot0_eye_in_hand")  # the cameras of the agent
    camera_radius: Env[Fixed[Weight]] = 0.0  # radius in meters that fixed cameras show; 0: RoboSuite's own view
    image_size: Env[Fixed[Literal[32, 64, 128]]] = 64  # height and width of a camera picture, in pixels
    control_freq: Env[Kept[Positive]] = 20  # control steps in a simulated second; must divide 500 Hz, the physics rate
    action_repeat: Env[Fixed[Count]] = 2  # control steps for which the robot holds each action of the agent
    episode_steps: Env[Count] = 200  # control steps in a training episode; greedy_episodes have eval_steps
    reward_shaping: Env[Kept[bool]] = True  # give a dense reward, if the task has one; if false, reward only success
    num_envs: Count = 1  # environments at once; several, or one beside a CPU's updates, are in worker processes

    # run
    preset: Literal["auto", "standard", "cpu", "debug", "paper"] = "auto"  # auto: standard on an NVIDIA GPU, else cpu
    seed: Kept[Annotated[int, Range(0, 2**32 - 1)]] = 0  # seed of every random draw of training
    steps: Count = 500_000  # control steps in the whole run, random ones at the start included
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"  # auto: the first of cuda, mps and cpu that is available
    precision: Literal["auto", "float32", "bfloat16"] = "auto"  # for products of matrices; auto: bfloat16 if possible
    run_dir: str = ""  # run folder; empty: runs/{task}_{preset}_{seed}
    cuda_graphs: bool = True  # launch each update as CUDA graphs, which is faster on an NVIDIA GPU
    checkpoint_minutes: Weight = 10  # minutes, at least, between two checkpoints; the best evaluation has one too
    save_replay: bool = True  # keep finished episodes on disk; if false, a resumed run fills its replay anew
    log_every: Count = 500  # control steps, at least, between two lines of training metrics
    eval_every: Count = 20_000  # control steps between evaluations; a quarter once training succeeds, until they do
    eval_steps: Whole = 500  # control steps in an evaluation episode; 0: as many as in a training episode
    eval_action: Literal["mean", "mode"] = "mean"  # action of an evaluation: mean or mode of the policy's distribution
    eval_episodes: Count = 10  # episodes in an evaluation; twice as many at the end of a run; 20 with --eval
    video_every: Count = 20_000  # control steps, at least, between two filmed evaluations; the last is always filmed
    wandb: Literal["auto", "online", "offline", "disabled"] = "auto"  # auto: WANDB_MODE, else online if there is a key

    # replay
    capacity: Count = 250_000  # agent steps and resets in the replay; each takes 36 KB with three cameras of 64 pixels
    prefill: Count = 5_000  # agent steps of random actions before the first update
    pretrain: Whole = 100  # updates made at once after the prefill
    train_every: Annotated[float, Range(0.001)] = 5  # agent steps between two updates; may be a fraction
    replay_focus: Share = 0.5  # share of sequences from favored episodes: half the newest tenth, half the best
    held_actions: Share = 0.75  # share of episodes with held random commands once progress stalls; 0 with success
    greedy_episodes: Share = 0.5  # training episodes without noise: this share times the success rate of the last 10
    batch_size: Count = 16  # sequences in a batch
    batch_length: Count = 50  # agent steps in a sequence

    # world model
    image_norm: Fixed[Literal["none", "mean", "white"]] = "white"  # subtract 0.5 or the mean picture, or whiten as well
    binary_gripper: Fixed[bool] = True  # the model sees only the sign of a gripper's command, as the gripper does
    cnn_depth: Size = 48  # channels of the encoder's first convolution; the number doubles in each later one
    deter: Size = 200  # size of the GRU state
    hidden: Size = 200  # units of the layers that lead into the GRU and to the prior and the posterior
    stoch: Size = 32  # number of stochastic latent variables
    classes: Annotated[int, Range(0, 1e4), "fixed"] = 32  # classes of each latent variable; 0: Gaussian ones
    reward_layers: Layers = 4  # hidden layers of the reward head
    reward_units: Size = 400  # units of each hidden layer of the reward head
    discount_layers: Layers = 4  # hidden layers of the discount head
    discount_units: Size = 400  # units of each hidden layer of the discount head
    discount_head: Fixed[bool] = True  # learn where episodes terminate; if false, the discount is constant
    grad_heads: Heads = ("decoder", "reward", "discount")  # heads whose gradients shape the latent state
    reward_norm: bool = False  # divide the rewards that the model learns by their root mean square
    reward_scale: Weight = 100.0  # weight of the reward loss; with reward_norm, 10 is about right
    discount_scale: Weight = 1.0  # weight of the discount loss
    kl_scale: Weight = 1.0  # weight of the KL loss
    kl_balance: Share = 0.8  # share of the KL loss that trains the prior, not the posterior; 0.5: one plain KL for both
    kl_free: Weight = 0.5  # nats of KL that are not penalized
    kl_free_avg: bool = False  # apply kl_free to the batch's mean KL; if false, or if kl_balance is 0.5, to each state
    decode_fraction: PositiveShare = 1.0  # share of the frames, drawn anew in each update, that have an image loss
    model_lr: Positive = 3e-4  # learning rate of the world model
    model_eps: Positive = 1e-5  # epsilon of the world model's Adam optimizer
    model_clip: Positive = 100.0  # largest global norm of the world model's gradient
    model_decay: Share = 1e-6  # each update multiplies the world model's parameters by 1 minus this number

    # behavior
    horizon: Annotated[int, Range(2, 1e4)] = 15  # agent steps in an imagined rollout
    imagine_starts: Whole = 0  # number of a batch's states, drawn at random, from which rollouts start; 0: all
    discount: Share = 0.98  # discount factor of one agent step
    return_lambda: Share = 0.95  # lambda of the lambda-return
    actor_layers: Layers = 4  # hidden layers of the actor
    actor_units: Size = 400  # units of each hidden layer of the actor
    actor_grad: Literal["dynamics", "reinforce", "both"] = "reinforce"  # how the actor's gradient is estimated
    actor_grad_mix: Share = 0.1  # weight of the dynamics gradient if actor_grad is both; the rest is reinforce
    actor_entropy: Weight = 0.01  # weight of the entropy bonus in the first update; above 0 if it decays
    actor_entropy_final: Weight = 0.001  # value to which the weight of the entropy bonus decays exponentially
    entropy_updates: Whole = 3_000  # updates over which the entropy weight decays; 0: it stays at actor_entropy
    actor_output_cost: Weight = 1e-3  # weight of a cost on squared outputs before tanh, so that tanh keeps its gradient
    actor_lr: Positive = 8e-5  # learning rate of the actor
    actor_eps: Positive = 1e-5  # epsilon of the actor's Adam optimizer
    actor_clip: Positive = 100.0  # largest global norm of the actor's gradient
    actor_decay: Share = 1e-6  # each update multiplies the actor's parameters by 1 minus this number
    policy_average: Share = 0.99  # decay of the policy's exponential moving average, which is evaluated; 0: none
    return_norm: bool = True  # divide the actor's returns by the running width of their 5 - 95 % range, if above 1
    value_layers: Layers = 4  # hidden layers of the critic
    value_units: Size = 400  # units of each hidden layer of the critic
    value_lr: Positive = 8e-5  # learning rate of the critic
    value_eps: Positive = 1e-5  # epsilon of the critic's Adam optimizer
    value_clip: Positive = 100.0  # largest global norm of the critic's gradient
    value_decay: Share = 1e-6  # each update multiplies the critic's parameters by 1 minus this number
    target_every: Count = 50  # updates between two updates of the target critic
    target_fraction: PositiveShare = 1.0  # how far an update moves the target critic towards the critic; 1 copies it


# What each preset replaces in the block above.
PRESETS: dict[str, dict[str, Any]] = {
    "standard": {},
    # The same task for a laptop without a GPU: a small model, and fewer frames in an update.
    "cpu": dict(image_size=32, steps=100_000, log_every=1_000, eval_every=10_000)
    | dict(capacity=60_000, prefill=1_000, train_every=6, batch_length=25)
    | dict(cnn_depth=16, deter=256, hidden=256, stoch=16, classes=16, reward_layers=2, reward_units=256)
    | dict(discount_head=False, decode_fraction=0.5, model_lr=8e-4, imagine_starts=256)
    | dict(actor_layers=3, actor_units=256, actor_lr=4e-4, value_layers=3, value_units=256, value_lr=4e-4),
    # Everything once, in about half a minute.
    "debug": dict(controller="OSC_POSITION", control_freq=10, action_repeat=1, episode_steps=30, steps=180)
    | dict(checkpoint_minutes=0, log_every=30, eval_every=90, eval_steps=0, eval_episodes=1, video_every=90)
    | dict(capacity=1_000, prefill=60, pretrain=2, train_every=10, batch_size=4, batch_length=10)
    | dict(cnn_depth=8, deter=64, hidden=64, stoch=8, classes=8, reward_layers=2, reward_units=64)
    | dict(discount_layers=2, discount_units=64, horizon=5, imagine_starts=16)
    | dict(actor_layers=2, actor_units=64, value_layers=2, value_units=64),
    # The author's dmc_vision numbers; docs/departures.md lists what is still ours.
    "paper": dict(rotation_scale=1.0, cameras=("agentview",), camera_radius=0.0, episode_steps=500)
    | dict(steps=1_000_000, eval_steps=0, eval_action="mode", prefill=1_000)
    | dict(replay_focus=0.0, held_actions=0.0, greedy_episodes=0.0, image_norm="none", binary_gripper=False)
    | dict(discount_head=False, reward_scale=1.0, kl_free=1.0, kl_free_avg=True, discount=0.99)
    | dict(actor_grad="dynamics", actor_entropy=1e-4, actor_entropy_final=1e-4, entropy_updates=0)
    | dict(actor_output_cost=0.0, policy_average=0.0, return_norm=False, target_every=100),
}

BINS = ("PickPlace", "PickPlaceBread", "PickPlaceCan", "PickPlaceCereal", "PickPlaceMilk", "PickPlaceSingle")
TASKS: dict[str, dict[str, Any]] = {  # constants that a task replaces, unless a preset or a flag does
    "Door": {"cameras": ("sideview", "robot0_eye_in_hand")},  # agentview hardly shows its door and the hand
    "Stack": {"camera_radius": 0.3},  # in RoboSuite's sideview, the red cube is one pixel wide at 32 pixels
    # These have no sideview, and in agentview a can is three pixels wide.
    **dict.fromkeys(BINS, {"cameras": ("robot0_robotview", "robot0_eye_in_hand")}),
}


REWARD_MOMENTUM = 0.01  # share of the newest batch in the running size of rewards
RANGE_MOMENTUM = 0.01  # share of the newest update in the running range of returns
LOW, HIGH = 0.05, 0.95  # quantiles of the returns, between which their range is taken
LEAST_REWARD = 1e-3  # rewards are divided by at least this much: there may be none but zeros
USED_NATS, USED_VARIANCE = 0.01, 0.01  # above it, a latent tells something about the image (`latents_used`)


class Imagination(NamedTuple):
    """Rollouts of the actor inside the model. Entry i of the first axis belongs to the state after i steps:

        state   s0 --a1--> s1 --a2--> s2 ...  s(H-1) --aH--> sH       s0 is a replayed posterior
        reward  r0         r1         r2                     rH       of BEING in that state
        weight  1          d0         d0 d1                           discount from the start, with d = `discount`

    `action[i]` led to state i and was drawn from the policy at state i - 1; action[0] is zeros.
    """

    feat: Tensor  # (H + 1, N, F)
    action: Tensor  # (H + 1, N, A)
    policy: tuple[Tensor, ...]  # raw parameters of the action distributions at states 0 .. H - 1, (H, N, A) each
    reward: Tensor  # (H + 1, N)
    discount: Tensor  # (H + 1, N), gamma times the chance that the episode goes on
    weight: Tensor  # (H + 1, N), without gradient


class WorldModel(nn.Module):
    """Encoder, RSSM, decoder, reward and discount heads, and their loss."""

    reward_square: Tensor  # (), running mean of squared rewards, which began at 0
    reward_known: Tensor  # (), the weight of batches in `reward_square`, which is divided by it: Adam's bias correction

    def __init__(self, config: Config, image_shape: tuple[int, int, int], action_size: int):
        super().__init__()
        c = self.config = config
        channels, size = image_shape[0], image_shape[1]
        self.encoder = Encoder(size, channels, c.cnn_depth, whiten=c.image_norm == "white")
        self.rssm = RSSM(self.encoder.embed_size, action_size, c.deter, c.hidden, c.stoch, c.classes)
        self.decoder = Decoder(self.rssm.feat_size, size, channels, c.cnn_depth)
        self.reward = Head(self.rssm.feat_size, c.reward_layers, c.reward_units, UnitNormal)
        self.register_buffer("reward_square", torch.zeros(()))
        self.register_buffer("reward_known", torch.zeros(()))
        self.discount = None
        if c.discount_head:
            self.discount = Head(self.rssm.feat_size, c.discount_layers, c.discount_units, Bernoulli)

    def loss(self, batch: Batch, draws: Draws) -> tuple[Tensor, RSSMState, dict[str, Tensor]]:
        """Equation 2 on a batch (T, B, ...). Returns the loss (), the posteriors (T, B, ...) and metrics, () each."""
        c = self.config
        image = self.encoder.preprocess(batch.image)
        post = self.rssm.observe(self.encoder(image), batch.action, batch.is_first, draws)
        prior, feat = self.rssm.prior(post.deter), post.feat
        decoded, target = feat, image
        if c.decode_fraction < 1:  # a random part leaves the mean loss unbiased
            decoded, target = pick(draws, math.ceil(c.decode_fraction * batch.reward.numel()), feat, image)
        image_dist = self.decoder(self._head_input("decoder", decoded))
        self._measure(batch.reward)
        reward = self.learned_reward(batch.reward)
        losses = {
            "image": -image_dist.log_prob(target).mean(),
            "reward": -self.reward(self._head_input("reward", feat)).log_prob(reward).mean(),
        }
        if self.discount is not None:
            discount = c.discount * (1.0 - batch.is_terminal.float())
            losses["discount"] = -self.discount(self._head_input("discount", feat)).log_prob(discount).mean()
        losses["kl"], kl = kl_loss(
            self.rssm.kl, post.stats, prior, balance=c.kl_balance, free=c.kl_free, free_avg=c.kl_free_avg
        )
        scales = {"image": 1.0, "reward": c.reward_scale, "discount": c.discount_scale, "kl": c.kl_scale}
        loss = sum(scales[name] * value for name, value in losses.items())
        with torch.no_grad():
            metrics = {f"model/{name}_loss": value.detach() for name, value in losses.items()}
            metrics |= {
                "model/loss": loss.detach(),
                "model/reward_size": self.reward_size(),
                # What the loss is made of, without another pass over all pixels.
                "model/image_mse": 2 * losses["image"] / math.prod(target.shape[-3:]) - LOG_2PI,
                "model/kl": kl.mean(),
                "model/prior_entropy": self.rssm.entropy(prior).mean(),
                "model/post_entropy": self.rssm.entropy(post.stats).mean(),
                "model/latents_used": latents_used(post.stats, categorical=c.classes > 0),
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
        """The environment's rewards (...) as the reward head learns them (...): divided by their size, if so asked."""
        return reward / self.reward_size()

    def reward_size(self) -> Tensor:
        """What rewards are divided by, a scalar: the running root mean square of the batches' rewards, or 1."""
        if not self.config.reward_norm:
            return torch.ones_like(self.reward_square)
        return (self.reward_square / self.reward_known).sqrt().clamp(min=LEAST_REWARD)

    def _measure(self, reward: Tensor) -> None:
        """Let the running mean know of a batch's rewards (T, B)."""
        square = reward.square().mean()
        finite = square.isfinite()  # an update that is skipped for a NaN leaves no trace
        share = REWARD_MOMENTUM * finite
        self.reward_square.lerp_(torch.where(finite, square, self.reward_square), share)
        self.reward_known.lerp_(torch.ones_like(square), share)

    def _head_input(self, name: str, feat: Tensor) -> Tensor:
        return feat if name in self.config.grad_heads else feat.detach()


class Behavior(nn.Module):
    """Actor, value (critic) and target value, and their losses on imagined rollouts."""

    return_range: Tensor  # (), running 5 - 95 % range of the returns
    entropy_weight: Tensor  # (), of the present update

    def __init__(self, config: Config, feat_size: int, action_size: int):
        super().__init__()
        c = self.config = config
        self.actor = Actor(feat_size, action_size, c.actor_layers, c.actor_units)
        self.value = Head(feat_size, c.value_layers, c.value_units, UnitNormal)
        self.target_value = copy.deepcopy(self.value).requires_grad_(False)
        self.register_buffer("return_range", torch.zeros(()))
        # This is a tensor because a CUDA graph would freeze a Python number. It follows from the count of updates.
        self.register_buffer("entropy_weight", torch.tensor(float(c.actor_entropy)), persistent=False)

    def loss(self, imagined: Imagination) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Actor loss () by equation 6 and value loss () by equation 5 on imagined rollouts, and metrics, () each."""
        c = self.config
        feat, weight = imagined.feat, imagined.weight
        target_value = self.target_value(feat).mean
        returns = lambda_return(  # (H, N), of states 0 .. H - 1
            imagined.reward[:-1], target_value[:-1], imagined.discount[:-1], target_value[-1], c.return_lambda
        )
        # The action drawn at state i shows its effect from state i + 1 on: policies 0 .. H - 2 meet returns
        # 1 .. H - 1, and baselines of states 0 .. H - 2, as the author has it: these values count their state's own
        # reward too, but a baseline may be any function of the state. The last policy's action only feeds the
        # bootstrap value.
        policy = self.actor.distribution(*(x[:-1] for x in imagined.policy))
        entropy = policy.entropy()
        objective = self._objective(policy, imagined.action[1:-1], returns[1:], target_value[:-2])
        out = imagined.policy[0][:-1].float()  # before tanh
        bonus = self.entropy_weight * entropy
        if c.actor_output_cost:  # where tanh is flat, only the width of the distribution would still learn
            bonus = bonus - c.actor_output_cost * out.square().sum(-1)
        actor_loss = -(weight[:-2] * (objective + bonus)).mean()
        value = self.value(feat[:-1].detach())
        value_loss = -(weight[:-1] * value.log_prob(returns.detach())).mean()
        metrics = {
            "behavior/actor_loss": actor_loss,
            "behavior/value_loss": value_loss,
            "behavior/entropy": entropy.mean(),
            "behavior/actor_output": out.square().mean().sqrt(),
            "behavior/value": value.mean.mean(),
            "behavior/target_value": target_value.mean(),
            "behavior/lambda_return": returns.mean(),
            "behavior/imagined_reward": imagined.reward.mean(),
            "behavior/imagined_reward_std": imagined.reward.std(correction=0),
            "behavior/action_mean": imagined.action[1:].mean(),
            "behavior/action_std": imagined.action[1:].std(correction=0),
        }
        return actor_loss, value_loss, {name: value.detach() for name, value in metrics.items()}

    def _objective(self, policy: TruncNormal, action: Tensor, returns: Tensor, baseline: Tensor) -> Tensor:
        """What the actor maximizes beside its entropy, (H - 1, N)."""
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
        """What returns (H - 1, N) are multiplied by: 1, or a scalar with `return_norm`."""
        if not self.config.return_norm:
            return 1.0
        # quantile() has an input limit and sorts anyway; nearest ranks are enough here.
        ranked = returns.detach().flatten().sort().values
        width = ranked[int(HIGH * (len(ranked) - 1))] - ranked[int(LOW * (len(ranked) - 1))]
        # A skipped update must not change the range either, or a NaN would stay in it.
        self.return_range.lerp_(torch.where(width.isfinite(), width, self.return_range), RANGE_MOMENTUM)
        return 1.0 / self.return_range.clamp(min=1.0)

    def set_entropy_weight(self, updates: int) -> None:
        """The weight of the entropy bonus after so many updates."""
        c = self.config
        done = min(updates / c.entropy_updates, 1.0) if c.entropy_updates else 0.0
        self.entropy_weight.fill_(c.actor_entropy ** (1 - done) * c.actor_entropy_final**done)


class ActState(NamedTuple):
    """What the policy remembers between steps: the latent state and the action it chose last."""

    latent: RSSMState  # (B, ...)
    action: Tensor  # (B, A)


class Policy(nn.Module):
    """The part that acts: encoder, RSSM and actor. `eval_action`, mean or mode, is its deterministic action."""

    def __init__(self, encoder: Encoder, rssm: RSSM, actor: Actor, eval_action: str):
        super().__init__()
        self.encoder, self.rssm, self.actor, self.eval_action = encoder, rssm, actor, eval_action

    def initial(self, batch: int) -> ActState:
        """The state before the first step."""
        latent = self.rssm.initial(batch)
        return ActState(latent, latent.deter.new_zeros(batch, self.actor.action_size))

    @torch.no_grad()
    def forward(
        self, image: Tensor, state: ActState | None, is_first: Tensor, draws: Draws, deterministic: bool | Tensor
    ) -> tuple[Tensor, ActState]:
        """uint8 images (B, C, H, W) and is_first (B,) -> actions (B, A) in [-1, 1] and the next state.

        The latent is drawn from the posterior either way; `deterministic`, which may be (B,), takes the action's mean
        or mode instead of a sample.
        """
        state = self.initial(len(image)) if state is None else state
        embed = self.encoder(self.encoder.preprocess(image))
        latent = self.rssm.obs_step(state.latent, embed, state.action, is_first, draws)
        dist = self.actor(latent.feat)
        action = getattr(dist, self.eval_action)
        if deterministic is not True:
            greedy = torch.as_tensor(deterministic, device=action.device).unsqueeze(-1)
            action = torch.where(greedy, action, dist.rsample(draws))
        return action, ActState(latent, action)

    def step(self, image: np.ndarray, state: ActState | None = None) -> tuple[np.ndarray, ActState]:
        """Act in one environment: uint8 image (C, H, W) -> action (A,), the mean or mode, and the next state.

        The latent state is drawn from torch's global generator, so that two runs may differ a little.
        Pass no state at an episode's start, and the returned one after that.
        """
        device = next(self.parameters()).device
        images = torch.as_tensor(image, device=device)[None]
        is_first = torch.tensor([state is None], device=device)
        action, state = self(images, state, is_first, Draws(), deterministic=True)
        return action[0].float().cpu().numpy(), state


MAX_SKIPPED_IN_A_ROW = 10  # updates; after that the run ends


class Optimizer:
    """Adam with global-norm clipping and decoupled decay, as the author's TensorFlow code computes them.

    TensorFlow adds epsilon before the second moment's bias correction. Torch adds it after that, so torch's epsilon is
    divided by the correction. The decay is not multiplied by the learning rate. A step whose gradient is not finite is
    skipped and counted on the device, so that the host need not wait for it.
    """

    BETAS = (0.9, 0.999)

    def __init__(self, module: nn.Module, lr: float, eps: float, clip: float, decay: float):
        self.params = [p for p in module.parameters() if p.requires_grad]
        self.eps, self.clip, self.steps = eps, clip, 0
        self.adam: Any = torch.optim.AdamW(self.params, lr, self.BETAS, weight_decay=decay / lr, fused=True)
        self.skipped = torch.zeros((), device=self.params[0].device)
        # On MPS the kernel neither divides nor skips (github.com/pytorch/pytorch/pull/186360), and says nothing.
        self.kernel_clips = self.skipped.device.type != "mps"
        self.skipped_in_a_row = torch.zeros_like(self.skipped)  # stays once it is MAX_SKIPPED_IN_A_ROW

    def backward(self, loss: Tensor) -> None:
        """Leave the gradients of `loss` () in the parameters, for `step`."""
        loss.backward(inputs=self.params)

    def step(self) -> Tensor:
        """Descend the gradients and forget them; returns their global norm () before clipping."""
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.params if p.grad is not None])
        found_inf = 1.0 - norm.isfinite().float()
        self.skipped += found_inf
        in_a_row = (self.skipped_in_a_row + 1) * found_inf
        self.skipped_in_a_row = torch.where(
            self.skipped_in_a_row < MAX_SKIPPED_IN_A_ROW, in_a_row, MAX_SKIPPED_IN_A_ROW
        )
        self.steps += 1  # skipped ones too: to leave them out the host would have to wait for the device
        self.adam.param_groups[0]["eps"] = self.eps / math.sqrt(1 - self.BETAS[1] ** self.steps)
        if self.kernel_clips:
            self.adam.grad_scale = norm.clamp(min=self.clip) / self.clip  # the fused kernel divides gradients by it
            self.adam.found_inf = found_inf  # and skips the step if this is 1
            self.adam.step()
        elif not found_inf:  # the host waits
            torch.nn.utils.clip_grads_with_norm_(self.params, self.clip, norm)
            self.adam.step()
        self.adam.zero_grad(set_to_none=True)
        return norm

    def state_dict(self) -> dict:
        """Moments and counters."""
        return {"adam": self.adam.state_dict(), "steps": self.steps, "skipped": self.skipped}

    def load_state_dict(self, state: dict) -> None:
        """Take over moments and counters; learning rate and decay stay those of the present configuration."""
        (saved,), (ours,) = state["adam"]["param_groups"], self.adam.param_groups
        group = dict(saved, lr=ours["lr"], weight_decay=ours["weight_decay"])
        self.adam.load_state_dict(dict(state["adam"], param_groups=[group]))
        self.steps = state["steps"]
        self.skipped.copy_(state["skipped"])


NETWORKS = ("world_model", "behavior", "averaged")  # of a Dreamer
OPTIMIZERS = ("model_optimizer", "actor_optimizer", "value_optimizer")


class Dreamer:
    """The agent: world model, behavior and their three optimizers, the policy that collects, and the averaged one.

    Args:
        image_shape: (C, H, W) of the uint8 images.
        action_size: A.
        device: where parameters live and updates run.
        autocast_dtype: torch.bfloat16 for mixed precision (parameters and losses stay float32), or None.
        gripper: whether the last action is a gripper's.
    """

    def __init__(
        self,
        config: Config,
        image_shape: tuple[int, int, int],
        action_size: int,
        device: torch.device | str = "cpu",
        autocast_dtype: torch.dtype | None = None,
        gripper: bool = False,
    ):
        self.config, self.device, self.autocast_dtype = config, torch.device(device), autocast_dtype
        self.image_shape, self.action_size = image_shape, action_size
        self.world_model = WorldModel(config, image_shape, action_size).to(self.device)
        self.world_model.rssm.binary[-1] = float(gripper and config.binary_gripper)
        feat_size = self.world_model.rssm.feat_size
        self.behavior = Behavior(config, feat_size, action_size).to(self.device)
        c = config
        self.policy = Policy(self.world_model.encoder, self.world_model.rssm, self.behavior.actor, c.eval_action)
        self.averaged = copy.deepcopy(self.policy).requires_grad_(False)
        self.model_optimizer = Optimizer(self.world_model, c.model_lr, c.model_eps, c.model_clip, c.model_decay)
        self.actor_optimizer = Optimizer(self.behavior.actor, c.actor_lr, c.actor_eps, c.actor_clip, c.actor_decay)
        self.value_optimizer = Optimizer(self.behavior.value, c.value_lr, c.value_eps, c.value_clip, c.value_decay)
        self.optimizers = self.model_optimizer, self.actor_optimizer, self.value_optimizer
        self.draws = Draws()
        self.updates = 0

    def train_step(self, batch: Batch) -> dict[str, Tensor]:
        """One update of everything on a batch (T, B, ...) on the agent's device. Returns detached scalars."""
        if self.updates == 0 and self.config.image_norm != "none":  # once: later, networks would see other pictures
            for encoder in self.world_model.encoder, self.averaged.encoder:
                encoder.normalize(batch.image)
        self.behavior.set_entropy_weight(self.updates)
        post, metrics = self.model_gradients(batch)
        metrics = metrics | {"model/grad_norm": self.model_optimizer.step()}
        start, is_terminal = self._starts(post, batch.is_terminal)
        metrics |= self.behavior_gradients(start, is_terminal)
        metrics["behavior/actor_grad_norm"] = self.actor_optimizer.step()
        metrics["behavior/value_grad_norm"] = self.value_optimizer.step()
        if self.updates % self.config.target_every == 0:
            share = 1.0 if self.updates == 0 else self.config.target_fraction
            move_towards(self.behavior.target_value, self.behavior.value, share)
        self.updates += 1
        # The plain mean of the first policies, until there are enough for the running average (Polyak and Juditsky,
        # 1992, average the steps of stochastic gradients): what one of them has forgotten, the others know.
        move_towards(self.averaged, self.policy, max(1 - self.config.policy_average, 1 / self.updates))
        return metrics

    def model_gradients(self, batch: Batch) -> tuple[RSSMState, dict[str, Tensor]]:
        """Step 1 up to the gradients. Returns the posteriors (T, B, ...), detached, and metrics."""
        with self.autocast():
            loss, post, metrics = self.world_model.loss(batch, self.draws)
        self.model_optimizer.backward(loss)
        return post.detach(), metrics

    def behavior_gradients(self, start: RSSMState, is_terminal: Tensor) -> dict[str, Tensor]:
        """Steps 2 and 3 up to the gradients, from states (N, ...) and is_terminal (N,). Returns metrics."""
        differentiable = self.config.actor_grad != "reinforce"
        with self.autocast(), frozen(self.world_model):
            imagined = self.world_model.imagine(self.behavior.actor, start, is_terminal, self.draws, differentiable)
            actor_loss, value_loss, metrics = self.behavior.loss(imagined)
        self.actor_optimizer.backward(actor_loss)
        self.value_optimizer.backward(value_loss)
        return metrics

    def act(
        self,
        image: Tensor,
        state: ActState | None,
        is_first: Tensor,
        draws: Draws | None = None,
        deterministic: bool | Tensor = False,
        policy: Policy | None = None,
    ) -> tuple[Tensor, ActState]:
        """Actions (B, A) of the newest or another policy for uint8 images (B, C, H, W); see `Policy.forward`."""
        with self.autocast():
            return (policy or self.policy)(image, state, is_first, draws or self.draws, deterministic)

    def autocast(self) -> contextlib.AbstractContextManager:
        """The only place that lowers precision: matrix products and convolutions inside run in `autocast_dtype`."""
        if self.autocast_dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.autocast_dtype)

    def state_dict(self) -> dict:
        """All that an update depends on, but for the state of the random draws."""
        parts = {name: getattr(self, name).state_dict() for name in NETWORKS + OPTIMIZERS}
        return parts | {"updates": self.updates}

    def load_state_dict(self, state: dict) -> None:
        """Continue as the agent whose `state_dict` this is; see `Optimizer.load_state_dict`."""
        for name in NETWORKS + OPTIMIZERS:
            getattr(self, name).load_state_dict(state[name])
        self.updates = state["updates"]

    def _starts(self, post: RSSMState, is_terminal: Tensor) -> tuple[RSSMState, Tensor]:
        """The posteriors (T, B, ...) to imagine from: all (T * B, ...) or `imagine_starts` of them."""
        count = self.config.imagine_starts
        if not 0 < count < is_terminal.numel():
            return post.map(lambda x: x.flatten(0, 1)), is_terminal.flatten()
        *start, is_terminal = pick(self.draws, count, *post, is_terminal)
        return RSSMState(*start), is_terminal


def pick(draws: Draws, count: int, *columns: Tensor) -> list[Tensor]:
    """`count` different entries of columns (T, B, ...), the same ones of each: (count, ...) each."""
    index = draws.subset(columns[0].shape[0] * columns[0].shape[1], count, columns[0].device)
    return [x.flatten(0, 1)[index] for x in columns]


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


def latents_used(stats: Tensor, categorical: bool) -> Tensor:
    """Share of the S latents that tell posteriors (T, B, S, K or 2) of a batch apart: a scalar.

    A categorical does whose mutual information with the batch's frames exceeds 0.01 nats, a Gaussian whose mean
    varies by more than 0.01 (Burda et al., 2016, count active units so).
    """
    if not categorical:
        return (stats[..., 0].var((0, 1), correction=0) > USED_VARIANCE).float().mean()
    logp = stats.log_softmax(-1)
    probs = logp.exp()
    information = torch.special.entr(probs.mean((0, 1))).sum(-1) + (probs * logp).sum(-1).mean((0, 1))
    return (information > USED_NATS).float().mean()


@torch.no_grad()
def move_towards(follower: nn.Module, module: nn.Module, share: float) -> None:
    """Move the follower's parameters towards the module's by a share of the way; 1 copies them."""
    for a, b in zip(follower.parameters(), module.parameters(), strict=True):
        a.lerp_(b, share)


@contextlib.contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Inside, the module's parameters collect no gradient; gradients still pass through it."""
    module.requires_grad_(False)
    try:
        yield
    finally:
        module.requires_grad_(True)
