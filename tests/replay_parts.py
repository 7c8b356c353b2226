"""Replays recorded single parts: each network layer, distribution, loss and optimizer on its own."""

import math
import re
from collections.abc import Callable
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from actor import TruncNormal
from distributions import ExactTruncNormal, OneHot, TanhNormal
from networks import Bernoulli, Draws, UnitNormal
from recording import Recording, Replay, from_their_layout, refuse, to_their_layout
from replay_case import named_parameters, optimizer_of
from rssm import RSSM, GRUCell, kl_loss
from tiny import descend
from train import PRESETS, Config, Dreamer, Optimizer, lambda_return


def replay_gru(recording: Recording) -> None:
    names = "x h kernel bias gamma beta"
    x, h, kernel, bias, gamma, beta = recording.arrays_below("gru", names)
    cell = GRUCell(x.shape[-1], h.shape[-1])
    values = {"dense.weight": kernel.mT, "dense.bias": bias, "norm.weight": gamma, "norm.bias": beta}
    cell.load_state_dict(values)
    x, h = x.requires_grad_(), h.requires_grad_()
    out = cell(x, h)
    recording.compare("gru/out", out, "forward")
    inputs = x, h, cell.dense.weight, cell.dense.bias, cell.norm.weight, cell.norm.bias
    gradients = torch.autograd.grad((out * recording.array("gru/coef")).sum(), inputs)
    for name, gradient in zip(names.split(), gradients, strict=True):
        gradient = to_their_layout(gradient) if name == "kernel" else gradient
        recording.compare(f"gru/grad_{name}", gradient, "gradient")
    outs = [out]
    for _ in range(2):
        outs.append(cell(x, outs[-1]))
    recording.compare("gru/out_3_steps_same_x", torch.stack(outs), "forward")


def replay_lambda_return(recording: Recording) -> None:
    for part in recording.entries("lambda_return"):
        names = "reward value discount bootstrap"
        inputs = [x.requires_grad_() for x in recording.arrays_below(part, names)]
        reward, value, discount, bootstrap = inputs
        lambda_, coef = recording.arrays_below(part, "lambda coef")
        out = lambda_return(reward, value, discount, bootstrap, lambda_.item())
        recording.compare(f"{part}/out", out, "forward", "lambda_return/out")
        gradients = torch.autograd.grad((out * coef).sum(), inputs)
        for name, gradient in zip(names.split(), gradients, strict=True):
            recording.compare(f"{part}/grad_{name}", gradient, "gradient", f"lambda_return/grad_{name}")


def replay_onehot(recording: Recording) -> None:
    """Both users of one-hot samples: discrete actions and categorical latents."""
    logit, coef, sample = recording.arrays_below("onehot", "logit coef sample")
    logit.requires_grad_()
    policy, rssm = OneHot(logit), fresh_rssm(stoch=logit.shape[-2], classes=logit.shape[-1])
    action = policy.rsample(Replay([("onehot", sample)]))
    latent = rssm.sample(logit, Replay([("onehot", sample)])).view_as(sample)
    for user, ours in (("action", action), ("latent", latent)):
        recording.compare("onehot/sample", ours, "forward", f"onehot/sample, {user}")
        gradient = torch.autograd.grad((ours * coef).sum(), logit, retain_graph=True)[0]
        recording.compare("onehot/grad_logit", gradient, "gradient", f"onehot/grad_logit, {user}")
    recording.compare("onehot/mode", policy.mode, "forward")
    recording.compare("onehot/entropy", policy.entropy().sum(-1), "forward", "onehot/entropy, action")
    recording.compare("onehot/entropy", rssm.entropy(logit), "forward", "onehot/entropy, latent")
    sample.requires_grad_()
    log_prob = policy.log_prob(sample).sum(-1)
    recording.compare("onehot/log_prob_of_sample", log_prob, "forward")
    gradient = torch.autograd.grad(log_prob.sum(), sample, allow_unused=True, materialize_grads=True)[0]
    recording.compare("onehot/grad_log_prob_wrt_sample", gradient, "gradient")


def fresh_rssm(stoch: int, classes: int) -> RSSM:
    return RSSM(embed_size=1, action_size=1, deter=1, hidden=1, stoch=stoch, classes=classes)


def replay_kl_discrete(recording: Recording) -> None:
    post, prior = recording.arrays_below("kl_discrete", "post_logit prior_logit")
    rssm = fresh_rssm(stoch=post.shape[-2], classes=post.shape[-1])
    replay_kl(recording, "kl_discrete", rssm, post, prior, lambda grad: {"logit": grad})


def replay_kl_gauss(recording: Recording) -> None:
    post = torch.stack(recording.arrays_below("kl_gauss", "post_mean post_std"), -1)
    prior = torch.stack(recording.arrays_below("kl_gauss", "prior_mean prior_std"), -1)
    rssm = fresh_rssm(stoch=post.shape[-2], classes=0)
    replay_kl(recording, "kl_gauss", rssm, post, prior, lambda grad: {"mean": grad[..., 0], "std": grad[..., 1]})


def replay_kl(
    recording: Recording,
    part: str,
    rssm: RSSM,
    post: Tensor,
    prior: Tensor,
    split: Callable[[Tensor], dict[str, Tensor]],
) -> None:
    post, prior = post.requires_grad_(), prior.requires_grad_()
    for entry in recording.entries(part):
        balance, free, free_avg = (x.item() for x in recording.arrays_below(entry, "balance free free_avg"))
        loss, value = kl_loss(rssm.kl, post, prior, balance=balance, free=free, free_avg=bool(free_avg))
        recording.compare(f"{entry}/loss", loss, "forward", f"{part}/loss")
        recording.compare(f"{part}/value", value, "forward")
        for side, gradient in zip(("post", "prior"), torch.autograd.grad(loss, (post, prior)), strict=True):
            for name, ours in split(gradient).items():
                recording.compare(f"{entry}/grad_{side}_{name}", ours, "gradient", f"{part}/grad_{side}_{name}")


def replay_gauss_stats(recording: Recording) -> None:
    raw = recording.array("gauss_stats/raw_std")
    rssm = fresh_rssm(stoch=len(raw), classes=0)
    nn.init.zeros_(rssm.img_dist.weight)
    rssm.img_dist.bias.data = torch.cat([torch.zeros_like(raw), raw])
    recording.compare("gauss_stats/std", rssm.prior(torch.zeros(1))[:, 1], "forward")


def replay_trunc_normal(recording: Recording) -> None:
    part = "trunc_normal"
    out, std, sample, coef = recording.arrays_below(part, "raw_out raw_std sample coef")
    raw = out.requires_grad_(), std.requires_grad_()
    dist = TruncNormal(*raw)
    entropy, log_prob = dist.entropy(), dist.log_prob(sample.requires_grad_())
    compare_parts(recording, part, mean=dist.loc, std=dist.std, mode=dist.mode, entropy=entropy)
    ours = dist.rsample(Replay([("trunc_normal", sample.detach())]))
    compare_parts(recording, part, sample=ours, log_prob_of_sample=log_prob)
    compare_raw_gradients(recording, f"{part}/grad", (ours * coef).sum(), raw)
    compare_raw_gradients(recording, f"{part}/grad_entropy", entropy.sum(), raw)
    compare_raw_gradients(recording, f"{part}/grad_log_prob", log_prob.sum(), raw)
    gradient = torch.autograd.grad(dist.log_prob(sample).sum(), sample)[0]
    recording.compare(f"{part}/grad_log_prob_sample", gradient, "gradient")
    replay_sample_gradients(recording, raw)


def replay_sample_gradients(recording: Recording, raw: tuple[Tensor, Tensor]) -> None:
    """Derivatives of single samples, as the author's library has them and exact; and the sampler itself."""
    part = "trunc_normal/path"
    sample, quantile = recording.arrays_below(part, "sample exact_u")
    for kind, name in ((TruncNormal, "reference"), (ExactTruncNormal, "exact")):
        dist = kind(*raw)
        dmean, dstd = dist.sample_gradients(sample)
        compare_parts(recording, part, "gradient", **{f"{name}_dsample_dmean": dmean, f"{name}_dsample_dstd": dstd})
    compare_parts(recording, part, mean=dist.loc, std=dist.std)
    with mock.patch.object(Tensor, "uniform_", lambda self, generator=None: self.copy_(quantile)):
        recording.compare(f"{part}/sample", Draws().trunc_normal(dist.loc, dist.std), "forward")


def replay_tanh_normal(recording: Recording) -> None:
    part = "tanh_normal"
    out, std, eps, coef = recording.arrays_below(part, "raw_out raw_std eps coef")
    raw = out.requires_grad_(), std.requires_grad_()
    dist = TanhNormal(*raw)
    ours, log_prob = dist.rsample(Replay([("normal", eps)])), dist.log_prob(recording.array(f"{part}/sample"))
    compare_parts(recording, part, mean=dist.loc, std=dist.std, sample=ours, log_prob_of_sample=log_prob)
    compare_raw_gradients(recording, f"{part}/grad", (ours * coef).sum(), raw)


def compare_parts(recording: Recording, part: str, tolerance: str = "forward", **ours: Tensor) -> None:
    for name, value in ours.items():
        recording.compare(f"{part}/{name}", value, tolerance)


def compare_raw_gradients(recording: Recording, prefix: str, output: Tensor, raw: tuple[Tensor, Tensor]) -> None:
    gradients = torch.autograd.grad(output, raw, retain_graph=True)
    for name, gradient in zip(("out", "std"), gradients, strict=True):
        recording.compare(f"{prefix}_raw_{name}", gradient, "gradient")


def replay_bernoulli(recording: Recording) -> None:
    logit, target = recording.arrays_below("bernoulli", "logit target")
    dist = Bernoulli(logit.requires_grad_())
    log_prob = dist.log_prob(target)
    compare_parts(recording, "bernoulli", log_prob=log_prob, mean=dist.mean)
    recording.compare("bernoulli/grad_logit", torch.autograd.grad(log_prob.sum(), logit)[0], "gradient")


def replay_normal_image(recording: Recording) -> None:
    mean, target = recording.arrays_below("normal_image", "mean target")
    recording.compare("normal_image/log_prob", UnitNormal(mean, event_dims=3).log_prob(target), "forward")


def replay_conv(recording: Recording) -> None:
    replay_convolution(recording, "conv", F.conv2d)


def replay_conv_transpose(recording: Recording) -> None:
    replay_convolution(recording, "conv_transpose", F.conv_transpose2d)


def replay_convolution(recording: Recording, part: str, function: Callable[..., Tensor]) -> None:
    """That the layout in which weights are loaded here is the right one."""
    x, kernel, bias = recording.arrays_below(part, "x kernel bias")
    out = function(x.movedim(-1, 1), from_their_layout(kernel), bias, stride=2)
    recording.compare(f"{part}/out", out.movedim(1, -1), "forward")


def replay_adam(recording: Recording) -> None:
    for part in recording.entries("adam"):
        lr, eps, clip, decay = (x.item() for x in recording.arrays_below(part, "lr eps clip wd"))
        starts, gradients = (
            recording.arrays_below(part, "a0 b0"),
            recording.arrays_below(part, "grad_a grad_b"),
        )
        params = nn.ParameterList(nn.Parameter(x.clone()) for x in starts)
        optimizer, norms = Optimizer(params, lr, eps, clip, decay), []
        steps: tuple[list[Tensor], list[Tensor]] = [], []
        for step in range(len(gradients[0])):
            norms.append(descend(optimizer, sum((p * g[step]).sum() for p, g in zip(params, gradients, strict=True))))
            for history, p in zip(steps, params, strict=True):
                history.append(p.detach().clone())
        recording.compare(f"{part}/grad_norm", torch.stack(norms), "gradient", "adam/grad_norm")
        for name, start, history in zip("ab", starts, steps, strict=True):
            ours, theirs = torch.stack(history), recording.array(f"{part}/{name}")
            recording.check(f"{part}/{name}", ours, theirs, "weight", "adam/weights")
            recording.check(f"{part}/{name} - {name}0", ours - start, theirs - start, "change", "adam/changes")


INFORMATION = {"origin", "versions", "seed", "schedule"}  # of the json, not replayed
PARTS = {
    "gru": replay_gru,
    "lambda_return": replay_lambda_return,
    "onehot": replay_onehot,
    "kl_discrete": replay_kl_discrete,
    "kl_gauss": replay_kl_gauss,
    "gauss_stats": replay_gauss_stats,
    "trunc_normal": replay_trunc_normal,
    "tanh_normal": replay_tanh_normal,
    "bernoulli": replay_bernoulli,
    "normal_image": replay_normal_image,
    "conv": replay_conv,
    "conv_transpose": replay_conv_transpose,
    "adam": replay_adam,
}


def replay_parts(recording: Recording) -> None:
    """Single parts, each on its own; any of them may be recorded."""
    unknown = set(recording.info) - INFORMATION - {"full_size_dmc_vision"}
    if unknown:
        refuse(f"{recording.name}.json has unknown {', '.join(sorted(unknown))}")
    for part, replay in PARTS.items():
        if recording.below(f"{part}/"):
            replay(recording)
    for name, model in recording.info.get("full_size_dmc_vision", {}).items():
        compare_fresh_agent(recording, name, model)


def compare_fresh_agent(recording: Recording, name: str, model: dict) -> None:
    """Size and initial ranges of an agent of the author's full size."""
    layout = "variables_name_shape_initmin_initmax_initstd"
    action_size = re.fullmatch(r"action_dim_(\d+)", name)
    unknown = set(model) - {"parameter_counts", layout}
    if not action_size or unknown or "parameter_counts" not in model:
        refuse(f"full_size_dmc_vision/{name} is unknown, has unknown {unknown} or no parameter_counts")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        dreamer = Dreamer(Config(**PRESETS["paper"]), (3, 64, 64), int(action_size[1]))
    weights, counts = named_parameters(dreamer), {"model": 0}
    for weight, parameter in weights.items():
        network = weight.split("/")[0]
        counts[network] = counts.get(network, 0) + parameter.numel()
        counts["model"] += parameter.numel() if optimizer_of(weight) == "model" else 0
    theirs = model["parameter_counts"]
    recording.require(counts == theirs, f"{name}/parameter_counts {theirs}, ours {counts}")
    if layout not in model:
        return
    recorded = {weight: (shape, *ranges) for weight, shape, *ranges in model[layout]}
    recording.require(set(recorded) == set(weights), f"{name}: {sorted(set(recorded) ^ set(weights))}")
    for weight in set(recorded) & set(weights):
        ours, (shape, low, high, std) = to_their_layout(weights[weight].detach()), recorded[weight]
        size, width, rounding = ours.numel(), high - low, 1e-3 * std  # four digits were recorded
        # Both are samples of one uniform distribution. Their extremes lie a few width / size inside its bounds,
        # and their standard deviations scatter by 0.45 / sqrt(size) of it: six times that does not happen.
        extremes = max(abs(ours.min().item() - low), abs(ours.max().item() - high))
        deviation = abs(ours.std(correction=0).item() - std)
        recording.require(list(ours.shape) == shape, f"{name}/{weight} has shape {shape}, ours {list(ours.shape)}")
        recording.require(extremes <= 15 * width / size + rounding, f"{name}/{weight}: extremes off by {extremes}")
        recording.require(
            deviation <= 6 * 0.45 * std * math.sqrt(2 / size) + rounding,
            f"{name}/{weight}: std off by {deviation}",
        )
