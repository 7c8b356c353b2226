"""Replays a recorded case: three updates of a real `Dreamer`, acting, and the open-loop video.

Nothing of the agent is reimplemented here. What is compared is noted down while the code that trains runs.
"""

import copy
import re
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import train
from actor import Actor, TruncNormal
from buffer import Batch
from distributions import OneHot, TanhNormal
from fast import speed_up
from recorded_config import actor_of, config_of, model_of
from recording import Recording, Replay, from_their_layout, refuse, to_their_layout
from rssm import stack
from runtime.predict import open_loop
from train import Config, Dreamer

METRICS = {
    "kl_loss": "model/kl_loss",
    "image_loss": "model/image_loss",
    "reward_loss": "model/reward_loss",
    "discount_loss": "model/discount_loss",
    "model_kl": "model/kl",
    "model_loss": "model/loss",
    "prior_ent": "model/prior_entropy",
    "post_ent": "model/post_entropy",
    "model_grad_norm": "model/grad_norm",
    "actor_loss": "behavior/actor_loss",
    "actor_grad_norm": "behavior/actor_grad_norm",
    "critic_loss": "behavior/value_loss",
    "critic_grad_norm": "behavior/value_grad_norm",
    "actor_ent": "behavior/entropy",
    "critic": "behavior/value",
    "critic_slow": "behavior/target_value",
    "critic_target": "behavior/lambda_return",
    "reward_mean": "behavior/imagined_reward",
    "reward_std": "behavior/imagined_reward_std",
    # The author's normalizer is switched off.
    "reward_normed_mean": "behavior/imagined_reward",
    "reward_normed_std": "behavior/imagined_reward_std",
}


class Observed(NamedTuple):
    """A distribution that a head returned, and what it was trained on."""

    dist: Any  # a UnitNormal or a Bernoulli
    targets: list[Tensor]
    log_probs: list[Tensor]


def trained(observed: list[Observed]) -> Observed:
    """The first distribution whose log-density was asked for; others only served a prediction."""
    return next(x for x in observed if x.targets)


class Watch:
    """Notes what happens inside `train_step`, in lists with an entry for each call, and changes nothing."""

    def __init__(self, dreamer: Dreamer):
        model, behavior = dreamer.world_model, dreamer.behavior
        self.embed = noted_outputs(model.encoder)
        self.image, self.reward = noted_heads(model.decoder), noted_heads(model.reward)
        self.discount = noted_heads(model.discount) if model.discount is not None else []
        self.value, self.target_value = noted_heads(behavior.value), noted_heads(behavior.target_value)
        self.observed, self.kl = noted_calls(model.rssm, "observe"), noted_calls(model.rssm, "kl")
        self.prior = noted_calls(model.rssm, "prior")
        self.states, self.imagined = noted_calls(model.rssm, "imagine"), noted_calls(model, "imagine")
        self.gradients: dict[Tensor, Tensor] = {}  # of the latest update, before clipping
        for parameter in (*model.parameters(), *behavior.parameters()):
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(self._note_gradient)

    def _note_gradient(self, parameter: Tensor) -> None:
        assert parameter.grad is not None
        self.gradients[parameter] = parameter.grad.clone()


def noted_calls(owner: nn.Module, method: str) -> list:
    """A list that collects what `owner.method` returns from now on."""
    results, plain = [], getattr(owner, method)

    def noting(*args, **kwargs):
        results.append(plain(*args, **kwargs))
        return results[-1]

    setattr(owner, method, noting)
    return results


def noted_outputs(module: nn.Module) -> list[Tensor]:
    results = []
    module.register_forward_hook(lambda module, args, output: results.append(output))
    return results


def noted_heads(head: nn.Module) -> list[Observed]:
    results = []

    def hook(module: nn.Module, args: tuple, dist: Any) -> None:
        observed, plain = Observed(dist, [], []), dist.log_prob

        def log_prob(value: Tensor) -> Tensor:
            observed.targets.append(value)
            observed.log_probs.append(plain(value))
            return observed.log_probs[-1]

        dist.log_prob = log_prob
        results.append(observed)

    head.register_forward_hook(hook)
    return results


def batch_of(recording: Recording) -> Batch:
    """The recorded batch, time first and channels first."""
    image, action, reward = recording.arrays_below("data", "image action reward")
    is_first, is_terminal = recording.arrays_below("data", "is_first is_terminal")
    recording.array("data/is_last")  # for information: training does not use it
    for name, size in zip(("batch", "length", "action_dim"), action.shape, strict=True):
        if recording.entry(name) != size:
            refuse(f"{recording.name}: {name} {recording.entry(name)} does not fit data/action")
    rows = image.movedim(-1, 2), action, reward, is_first.bool(), is_terminal.bool()
    return Batch(*(x.transpose(0, 1) for x in rows))


def build(recording: Recording, config: Config, batch: Batch, overlay: bool) -> Dreamer:
    """An agent with the recorded weights; `overlay` speeds it up."""
    _, _, channels, height, width = batch.image.shape
    with mock.patch.multiple(train, Actor=actor_of(recording), WorldModel=model_of(recording)):
        dreamer = Dreamer(config, (channels, height, width), batch.action.shape[-1])
    dreamer.updates = recording.entry("slow_target_updates_at_start")
    with torch.no_grad():
        for name, parameter in named_parameters(dreamer).items():
            value = from_their_layout(recording.array(f"weights/{name}"))
            if value.shape != parameter.shape:
                refuse(f"weights/{name} is {tuple(value.shape)}, ours {tuple(parameter.shape)}")
            parameter.copy_(value)
    if overlay:
        speed_up(dreamer)
    return dreamer


def named_parameters(dreamer: Dreamer) -> dict[str, nn.Parameter]:
    """All parameters under the author's names."""
    model, behavior, rssm = dreamer.world_model, dreamer.behavior, dreamer.world_model.rssm
    layers: dict[str, Any] = {
        "rssm/img_in": rssm.img_in,
        "rssm/gru/dense": rssm.gru.dense,
        "rssm/obs_out": rssm.obs_out,
        "rssm/img_out_0": rssm.img_out,
        "rssm/img_dist_0": rssm.img_dist,
        "rssm/obs_dist": rssm.obs_dist,
        "decoder/convin": model.decoder.dense,
    }
    for name, codec in (("encoder", model.encoder), ("decoder", model.decoder)):
        layers |= {f"{name}/conv{i}": conv for i, conv in enumerate(codec.conv)}
    heads = {"reward": model.reward, "discount": model.discount, "actor": behavior.actor}
    heads |= {"critic": behavior.value, "target_critic": behavior.target_value}
    for name, head in heads.items():
        if head is not None:
            layers |= {f"{name}/dense{i}": dense for i, dense in enumerate(head.mlp.dense)}
            layers[f"{name}/out/out"] = head.out
    if hasattr(behavior.actor, "std"):
        layers["actor/out/std"] = behavior.actor.std
    named = {f"{name}/kernel": layer.weight for name, layer in layers.items()}
    named |= {f"{name}/bias": layer.bias for name, layer in layers.items()}
    named |= {"rssm/gru/norm/gamma": rssm.gru.norm.weight, "rssm/gru/norm/beta": rssm.gru.norm.bias}
    assert set(named.values()) == {*model.parameters(), *behavior.parameters()}, "a parameter has no name"
    return named


def optimizer_of(name: str) -> str:
    """model, actor or critic, for the author's name of a weight."""
    first = name.split("/")[0]
    return "critic" if first == "target_critic" else first if first in ("actor", "critic") else "model"


def latent_draws(recording: Recording, key: str, classes: int) -> list[tuple[str, Tensor]]:
    """Draws of the stochastic state for each entry of the first axis."""
    if classes:
        return [("onehot", x) for x in F.one_hot(recording.array(f"{key}_index").long(), classes).float()]
    return [("normal", x) for x in recording.array(f"{key}_eps").float()]


def batch_first(draws: list[tuple[str, Tensor]]) -> list[tuple[str, Tensor]]:
    """Draws recorded for each row of a batch (B) x (T, ...) -> for each step (T) x (B, ...)."""
    return [(draws[0][0], x) for x in torch.stack([x for _, x in draws], 1)]


def update_draws(recording: Recording, config: Config, distribution: Any, update: int, batch: int) -> Replay:
    """The draws of a whole `train_step`, in its order: posteriors; action and state of each step; entropy."""
    prefix = f"step{update}/draw"
    posts = batch_first(latent_draws(recording, f"{prefix}/post", config.classes))
    states = latent_draws(recording, f"{prefix}/imag", config.classes)[-config.horizon :]
    kind = "onehot" if distribution is OneHot else "trunc_normal"
    actions = recording.array(f"{prefix}/imag_action")[1:]
    if distribution is TanhNormal:
        kind, actions = "normal", recording.array(f"{prefix}/imag_action_eps")
    imagination = [draw for a, state in zip(actions, states, strict=True) for draw in ((kind, a), state)]
    entropy = []
    if distribution is TanhNormal:
        entropy = [("normal", starts_time_first(recording.array(f"{prefix}/entropy_eps"), batch, axis=2))]
    return Replay(posts + [(kind, starts_time_first(x, batch)) for kind, x in imagination] + entropy)


def starts_time_first(x: Tensor, batch: int, axis: int = 0) -> Tensor:
    """Imagination starts in the author's order, n = b T + t -> in ours, n = t B + b."""
    return x.unflatten(axis, (batch, -1)).transpose(axis, axis + 1).flatten(axis, axis + 1)


def starts_batch_first(x: Tensor, batch: int, axis: int = 1) -> Tensor:
    """The other way round."""
    return x.unflatten(axis, (-1, batch)).transpose(axis, axis + 1).flatten(axis, axis + 1)


def replay_case(recording: Recording, overlay: bool) -> None:
    """Three updates, acting and the open-loop video, as far as they were recorded, with or without fast.py."""
    config, batch = config_of(recording), batch_of(recording)
    if recording.below("policy/"):
        replay_acting(recording, config, build(recording, config, batch, overlay))
    if recording.below("report/"):
        replay_video(recording, config, build(recording, config, batch, overlay), batch)
    dreamer = build(recording, config, batch, overlay)
    old_actor, watch = copy.deepcopy(dreamer.behavior.actor), Watch(dreamer)
    for update in range(3):
        dreamer.draws = update_draws(recording, config, old_actor.distribution, update, batch.action.shape[1])
        with mock.patch.object(TanhNormal, "draws", dreamer.draws):
            metrics = dreamer.train_step(batch)
        dreamer.draws.finish()
        if update == 0:
            compare_world_model(recording, config, watch)
            compare_imagination(recording, config, watch, old_actor, batch.action.shape[1])
            compare_gradients(recording, named_parameters(dreamer), watch)
            compare_weights(recording, config, dreamer, updates=1)
        actions = starts_batch_first(watch.imagined[update].action, batch.action.shape[1])
        recording.compare(f"step{update}/draw/imag_action", actions, "later" if update else "forward")
        compare_metrics(recording, config, update, metrics)
    compare_weights(recording, config, dreamer, updates=3)


def compare_world_model(recording: Recording, config: Config, watch: Watch) -> None:
    def compare(key: str, ours: Tensor) -> None:
        recording.compare(f"wm/{key}", ours.transpose(0, 1), "forward")

    post, prior = watch.observed[0], watch.prior[0]
    compare("embed", watch.embed[0])
    compare("post/deter", post.deter)
    if config.classes:
        compare("post/logit", post.stats)
        compare("prior/logit", prior)
    else:
        compare("post/stoch", post.stoch)
        for side, stats in (("post", post.stats), ("prior", prior)):
            compare(f"{side}/mean", stats[..., 0])
            compare(f"{side}/std", stats[..., 1])
    sides = ("posterior side", "prior side")[: len(watch.kl)]  # a balance of 0.5 has only one
    for side, kl in zip(sides, watch.kl, strict=True):
        recording.compare("wm/kl_value", kl.transpose(0, 1), "forward", f"wm/kl_value, {side}")
    image, reward = trained(watch.image), trained(watch.reward)
    compare("logprob/image", image.log_probs[0])
    compare("logprob/reward", reward.log_probs[0])
    compare("reward_mean", reward.dist.mean)
    compare("target/reward", reward.targets[0])
    if config.discount_head:
        discount = trained(watch.discount)
        compare("logprob/discount", discount.log_probs[0])
        compare("discount_logit", discount.dist.logit)
        compare("discount_prob", discount.dist.mean)
        compare("target/discount", discount.targets[0])
    else:
        recording.array("wm/target/discount")  # for information: without the head, nothing is trained on it
    for key in recording.below("wm/image_mean/"):
        if frame := re.fullmatch(r"(wm/image_mean/b(\d+)_t(\d+))(@sub)?", key):
            mean = image.dist.mean[int(frame[3]), int(frame[2])].movedim(0, -1)
            recording.compare(frame[1], mean, "forward", "wm/image_mean")


def compare_imagination(recording: Recording, config: Config, watch: Watch, actor: Actor, batch: int) -> None:
    """`actor` is the one before its update."""

    def compare(key: str, ours: Tensor) -> None:
        recording.compare(f"imag/{key}", starts_batch_first(ours, batch), "forward")

    states, imagined = stack(watch.states[0][0]), watch.imagined[0]
    compare("deter", states.deter)
    if config.classes:
        compare("logit", states.stats)
        # The features were not recorded: they are the classes drawn, one-hot, followed by the deterministic part.
        stoch, deter = imagined.feat.split([config.stoch * config.classes, config.deter], -1)
        theirs = F.one_hot(recording.array("step0/draw/imag_index").long(), config.classes).flatten(-2)
        recording.check("imag/feat", starts_batch_first(stoch, batch), theirs, "forward", "imag/feat, stoch")
        recording.compare("imag/deter", starts_batch_first(deter, batch), "forward", "imag/feat, deter")
    else:
        compare("mean", states.stats[..., 0])
        compare("std", states.stats[..., 1])
        compare("stoch", states.stoch)
        compare("feat", imagined.feat)
    compare("reward", imagined.reward)
    compare("discount", imagined.discount)
    compare("weight", imagined.weight)
    if not watch.target_value:
        recording.failures.append("imag/slow_value: nothing was asked of our target value")
    for target_value in watch.target_value[:1]:
        compare("slow_value", target_value.dist.mean)
    compare("critic_value", trained(watch.value).dist.mean)
    compare("target", trained(watch.value).targets[0])
    # The policies that were rolled out, and the one of the last state, which acts no more.
    last = actor.raw(imagined.feat[-1:])
    raw = [torch.cat(pair) for pair in zip(imagined.policy, last, strict=True)]
    policy: Any = actor.distribution(*raw)
    if actor.distribution is OneHot:
        compare("policy_logit", policy.logit)
    else:
        compare("policy_mean", policy.loc)
        compare("policy_std", policy.std)
    if isinstance(policy, TruncNormal):
        compare("policy_mode", policy.mode)
    if not isinstance(policy, TanhNormal):
        compare("policy_entropy", policy.entropy()[:-2])


def compare_metrics(recording: Recording, config: Config, update: int, metrics: dict[str, Tensor]) -> None:
    ours_of = {name: metrics[ours] for name, ours in METRICS.items() if ours in metrics}
    ours_of["actor_ent_scale"] = torch.tensor(config.actor_entropy)
    if config.actor_grad == "both":
        ours_of["actor_grad_mix"] = torch.tensor(config.actor_grad_mix)
    for name, ours in ours_of.items():
        key, tolerance = f"step{update}/metrics/{name}", "later" if update else "gradient"
        recording.compare(key, ours, tolerance, f"metric {name}, update{'s 1, 2' if update else ' 0'}")


def compare_gradients(recording: Recording, parameters: dict[str, nn.Parameter], watch: Watch) -> None:
    for name, parameter in parameters.items():
        if parameter.requires_grad:
            optimizer = optimizer_of(name)
            if parameter not in watch.gradients:
                recording.failures.append(f"grad/{optimizer}/{name}: ours got no gradient")
                continue
            gradient, norm = to_their_layout(watch.gradients[parameter]), watch.gradients[parameter].double().norm()
            recording.compare(f"grad/{optimizer}/{name}", gradient, "gradient", f"gradients, {optimizer} loss")
            recording.compare(f"gradnorm/{optimizer}/{name}", norm, "gradient", f"gradient norms, {optimizer} loss")


def compare_weights(recording: Recording, config: Config, dreamer: Dreamer, updates: int) -> None:
    """All weights after so many updates, and their changes since the start."""
    for name, parameter in named_parameters(dreamer).items():
        key = f"after{updates}/{name}"
        recording.compare(key, to_their_layout(parameter), "weight", f"weights after {updates}")
        start = recording.array(f"weights/{name}")
        theirs, ours, start = recording.thinned(key, to_their_layout(parameter), start)
        decay = getattr(config, f"{optimizer_of(name)}_decay".replace("critic", "value"))
        rounding = updates * torch.finfo(torch.float32).eps * start.abs().max()
        only_decays = (theirs - start * (1 - decay) ** updates).abs().max() <= rounding
        tolerance = "decay" if only_decays else "change"
        quantity = f"weight changes after {updates}{', decay only' if only_decays else ''}"
        recording.check(f"{key} - weights/{name}", ours - start, theirs - start, tolerance, quantity)


def replay_acting(recording: Recording, config: Config, dreamer: Dreamer) -> None:
    """Evaluation in several environments: sampled latents, the mode of the action, resets in between."""
    if dreamer.behavior.actor.distribution is TanhNormal:
        # The author's mode is the likeliest of 100 samples, which are not recorded; ours is a closed form.
        refuse("policy/action: the mode of a tanh_normal policy is not the author's")
    image, is_first = recording.arrays_below("policy", "image is_first")
    draws = Replay(batch_first(latent_draws(recording, "policy/draw/post", config.classes)))
    actions, deters, state = [], [], None
    for step in range(image.shape[1]):
        now = image[:, step].movedim(-1, 1)
        action, state = dreamer.act(now, state, is_first[:, step].bool(), draws, deterministic=True)
        actions.append(action)
        deters.append(state.latent.deter)
    draws.finish()
    recording.compare("policy/action", torch.stack(actions, 1), "forward")
    recording.compare("policy/deter", torch.stack(deters, 1), "forward")


def replay_video(recording: Recording, config: Config, dreamer: Dreamer, batch: Batch) -> None:
    """Open-loop prediction, stacked as the author does: truth, model and error below each other."""
    seen = batch_first(latent_draws(recording, "report/draw/post", config.classes))
    imagined = batch_first(latent_draws(recording, "report/draw/prior", config.classes))
    draws, rows = Replay(seen + imagined), len(seen[0][1])
    batch = Batch(*(x[:, :rows] for x in batch))
    truth, model = batch.image.float() / 255, open_loop(dreamer, batch, draws, len(seen)).image
    draws.finish()
    video = torch.cat([truth, model, (model - truth + 1) / 2], -2)  # (T, B, C, 3 H, W)
    video = video.permute(0, 3, 1, 4, 2).flatten(2, 3)  # (T, 3 H, B W, C)
    shape = recording.array("report/openl_shape").tolist()
    recording.require(list(video.shape) == shape, f"report/openl_shape {shape}, ours {list(video.shape)}")
    videos = recording.below("report/openl_video@")
    recording.require(bool(videos), "report/openl_video@8, or with another stride, is missing")
    for key in videos:
        stride = int(key.split("@")[1])
        recording.compare(key, video[:, ::stride, ::stride], "forward")
