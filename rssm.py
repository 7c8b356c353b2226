"""Recurrent state-space model with categorical (DreamerV2, section 2.1) or Gaussian (PlaNet) latents.

A state is a deterministic vector that a GRU carries through time and a stochastic part drawn at each step:

    deter[t] = GRU(deter[t-1], stoch[t-1], action[t])     action[t] is the one that LED TO image[t]
    prior    p(stoch[t] | deter[t])                        the model's guess before it sees image[t]
    post     q(stoch[t] | deter[t], embed[t])              after it has

Shapes: the legend is in train.py. `stats` are the parameters of the stochastic part: logits (..., S, K), or for
Gaussian latents, whose K is 0, mean and standard deviation (..., S, 2); then F is S + D.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from networks import LOG_2PI, Draws, init_weights, low_precision

GRU_NORM_EPS = 1e-3  # Keras' default
GRU_UPDATE_BIAS = -1.0  # keeps the old state at first: sigmoid(-1) = 0.27
MIN_STD = 0.1  # of Gaussian latents


class RSSMState(NamedTuple):
    """What the model knows at one step, or at many stacked ones."""

    deter: Tensor  # (..., D)
    stoch: Tensor  # (..., S * K), one-hot groups side by side; Gaussian (..., S)
    stats: Tensor  # (..., S, K) logits; Gaussian (..., S, 2) mean and std

    @property
    def feat(self) -> Tensor:
        """(..., F), stoch first; in autocast's precision, as all that reads it is a matrix product."""
        return torch.cat([low_precision(self.stoch), low_precision(self.deter)], -1)

    def map(self, function: Callable[[Tensor], Tensor]) -> "RSSMState":
        """The state with `function` applied to each tensor."""
        return RSSMState(*(function(x) for x in self))

    def detach(self) -> "RSSMState":
        """The state without gradient."""
        return self.map(Tensor.detach)


def stack(states: list[RSSMState]) -> RSSMState:
    """States of successive steps, (...) each -> one of (T, ...)."""
    return RSSMState(*(torch.stack(x) for x in zip(*states, strict=True)))


class GRUCell(nn.Module):
    """GRU whose three gates share one layer norm; the reset gate scales the candidate, not the state."""

    def __init__(self, inputs: int, size: int):
        super().__init__()
        self.dense = nn.Linear(inputs + size, 3 * size)
        self.norm = nn.LayerNorm(3 * size, eps=GRU_NORM_EPS)
        self.apply(init_weights)

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        """x (N, inputs), h (N, D) -> (N, D) in float32."""
        gates = self.norm(self.dense(torch.cat([x, h.to(x.dtype)], -1)).float())
        reset, candidate, update = gates.chunk(3, -1)
        candidate = torch.tanh(reset.sigmoid() * candidate)
        update = (update + GRU_UPDATE_BIAS).sigmoid()
        return update * candidate + (1 - update) * h


class RSSM(nn.Module):
    """The world model's memory and its one-step dynamics."""

    binary: Tensor  # (A,), 1 for an action of which only the sign counts, else 0; zeros until Dreamer sets it

    def __init__(self, embed_size: int, action_size: int, deter: int, hidden: int, stoch: int, classes: int):
        super().__init__()
        self.deter, self.stoch, self.classes = deter, stoch, classes
        self.stoch_size = stoch * max(classes, 1)
        self.feat_size = self.stoch_size + deter
        stats = stoch * (classes or 2)
        self.img_in = nn.Linear(self.stoch_size + action_size, hidden)
        self.gru = GRUCell(hidden, deter)
        self.img_out = nn.Linear(deter, hidden)
        self.img_dist = nn.Linear(hidden, stats)
        self.obs_out = nn.Linear(deter + embed_size, hidden)
        self.obs_dist = nn.Linear(hidden, stats)
        self.apply(init_weights)
        self.register_buffer("binary", torch.zeros(action_size))

    def initial(self, batch: int) -> RSSMState:
        """The state before anything was seen: zeros, not learned."""
        weight = self.img_in.weight
        return RSSMState(
            weight.new_zeros(batch, self.deter),
            weight.new_zeros(batch, self.stoch_size),
            weight.new_zeros(batch, self.stoch, self.classes or 2),
        )

    def observe(
        self, embed: Tensor, action: Tensor, is_first: Tensor, draws: Draws, state: RSSMState | None = None
    ) -> RSSMState:
        """Filter a sequence: embed (T, B, E), action (T, B, A), is_first (T, B) -> posteriors (T, B, ...).

        `state` (B, ...) is the one before the first step, zeros if not given. Where `is_first`, the previous state
        and the action are zeroed: an episode never sees the one before it.
        """
        state = self.initial(embed.shape[1]) if state is None else state
        keep = 1.0 - is_first.to(embed.dtype).unsqueeze(-1)
        # What does not depend on the state is computed for all steps at once: the action's part of the layer before
        # the GRU, and the embedding's part of the posterior's first layer, which is by far the larger one.
        action_part = F.linear(self.obeyed(action) * keep, self.img_in.weight[:, self.stoch_size :], self.img_in.bias)
        embed_part = F.linear(embed, self.obs_out.weight[:, self.deter :], self.obs_out.bias)
        stoch_weight = low_precision(self.img_in.weight[:, : self.stoch_size])
        deter_weight = low_precision(self.obs_out.weight[:, : self.deter])
        posts = []
        for a, e, k in zip(action_part.unbind(), embed_part.unbind(), keep.unbind(), strict=True):
            deter = self.gru(F.elu(a + F.linear(state.stoch * k, stoch_weight)), state.deter * k)
            hidden = F.elu(e + F.linear(deter, deter_weight))
            stats = self._stats(self.obs_dist(hidden))
            state = RSSMState(deter, self.sample(stats, draws), stats)
            posts.append(state)
        return stack(posts)

    def obs_step(self, state: RSSMState, embed: Tensor, action: Tensor, is_first: Tensor, draws: Draws) -> RSSMState:
        """One step of `observe`: state (B, ...), embed (B, E), action (B, A), is_first (B,) -> posterior (B, ...)."""
        return self.observe(embed[None], action[None], is_first[None], draws, state).map(lambda x: x[0])

    def imagine(
        self, policy: Callable[[Tensor], Tensor], start: RSSMState, horizon: int, draws: Draws
    ) -> tuple[list[RSSMState], Tensor, Tensor]:
        """Roll out `policy` (feat (N, F) -> action (N, A)) for `horizon` steps from `start` (N, ...).

        Returns the H + 1 states, the start first, their features (H + 1, N, F), and actions (H + 1, N, A): action[i]
        led to state[i], so action[0] is zeros.
        """
        states, feats, actions = [start], [start.feat], []
        for _ in range(horizon):
            actions.append(policy(feats[-1]))
            inputs = torch.cat([low_precision(states[-1].stoch), low_precision(self.obeyed(actions[-1]))], -1)
            deter = self.gru(F.elu(self.img_in(inputs)), states[-1].deter)
            stats = self.prior(deter)
            states.append(RSSMState(deter, self.sample(stats, draws), stats))
            feats.append(states[-1].feat)
        return states, torch.stack(feats), torch.stack([torch.zeros_like(actions[0]), *actions])

    def obeyed(self, action: Tensor) -> Tensor:
        """Actions (..., A) as the robot obeys them: binary ones by their sign. Their gradients are straight-through."""
        return action + self.binary * (action.sign() - action).detach()

    def prior(self, deter: Tensor) -> Tensor:
        """Stats of the prior for deter (..., D)."""
        return self._stats(self.img_dist(F.elu(self.img_out(deter))))

    def sample(self, stats: Tensor, draws: Draws) -> Tensor:
        """Draw stoch (..., S * K): straight-through gradients for categories, reparameterized for Gaussians."""
        if self.classes:
            probs = stats.softmax(-1)
            onehot = draws.onehot(probs.detach())
            return (onehot + (probs - probs.detach())).flatten(-2)
        mean, std = stats.unbind(-1)
        return mean + std * draws.normal(mean.detach())

    def kl(self, post: Tensor, prior: Tensor) -> Tensor:
        """KL(post || prior) in nats summed over the S groups: stats (..., S, K or 2) -> (...)."""
        return categorical_kl(post, prior) if self.classes else gaussian_kl(post, prior)

    def entropy(self, stats: Tensor) -> Tensor:
        """Entropy in nats summed over the S groups: stats (..., S, K or 2) -> (...)."""
        if self.classes:
            logp = stats.log_softmax(-1)
            return -(logp.exp() * logp).sum((-2, -1))
        return (stats[..., 1].log() + 0.5 * (1 + LOG_2PI)).sum(-1)

    def _stats(self, raw: Tensor) -> Tensor:
        raw = raw.float()
        if self.classes:
            return raw.unflatten(-1, (self.stoch, self.classes))
        mean, raw_std = raw.chunk(2, -1)
        return torch.stack([mean, 2 * (raw_std / 2).sigmoid() + MIN_STD], -1)


def categorical_kl(post: Tensor, prior: Tensor) -> Tensor:
    """KL between groups of categoricals with logits (..., S, K), summed over S."""
    post, prior = post.log_softmax(-1), prior.log_softmax(-1)
    return (post.exp() * (post - prior)).sum((-2, -1))


def gaussian_kl(post: Tensor, prior: Tensor) -> Tensor:
    """KL between groups of Gaussians with stats (..., S, 2), summed over S."""
    (mean, std), (prior_mean, prior_std) = post.unbind(-1), prior.unbind(-1)
    ratio = std / prior_std
    return (0.5 * (ratio.square() + ((mean - prior_mean) / prior_std).square() - 1) - ratio.log()).sum(-1)


def kl_loss(
    kl: Callable[[Tensor, Tensor], Tensor],
    post: Tensor,
    prior: Tensor,
    *,
    balance: float,
    free: float,
    free_avg: bool,
) -> tuple[Tensor, Tensor]:
    """Balanced KL (DreamerV2, algorithm 2): `balance` of the loss trains the prior, the rest the posterior.

    `free` nats are not penalized: of the mean over all elements if `free_avg`, else of each element. Returns the
    loss, a scalar, and the plain KL of each element, (...) for stats of (..., S, K or 2).
    """
    if balance == 0.5:  # the author's special case: one plain KL, with free nats of each element in any case
        value = kl(post, prior)
        return value.clamp(min=free).mean(), value.detach()
    post_side = kl(post, prior.detach())
    prior_side = kl(post.detach(), prior)
    if free_avg:
        sides = post_side.mean().clamp(min=free), prior_side.mean().clamp(min=free)
    else:
        sides = post_side.clamp(min=free).mean(), prior_side.clamp(min=free).mean()
    return (1 - balance) * sides[0] + balance * sides[1], post_side.detach()
