"""What the world model expects to see and to get: open-loop predictions, dreams, and its judgment of states.

Only evaluations use these, and they leave no gradient. Shapes: the legend is in train.py.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from buffer import Batch
from networks import Draws
from rssm import RSSMState
from train import Dreamer, WorldModel

CONTEXT = 5  # frames observed before an open-loop prediction


class Prediction(NamedTuple):
    """What the model expects."""

    image: Tensor  # (T, B, C, H, W), about [0, 1], not clipped
    reward: Tensor  # (T, B), as `WorldModel.learned_reward` has it


@torch.no_grad()
def open_loop(agent: Dreamer, batch: Batch, draws: Draws, context: int = CONTEXT) -> Prediction:
    """Prediction of a batch (T, B, ...): `context` frames are observed (at most T - 1), the others imagined.

    What is imagined follows the true actions.
    """
    context, actions = min(context, len(batch.image) - 1), batch.action
    with agent.autocast():
        post = _filter(agent.world_model, Batch(*(x[:context] for x in batch)), draws)
        later = iter(actions[context:])
        start, steps = post.map(lambda x: x[-1]), len(actions) - context
        _, imagined, _ = agent.world_model.rssm.imagine(lambda _: next(later), start, steps, draws)
        return _decode(agent.world_model, torch.cat([post.feat, imagined[1:]]))


@torch.no_grad()
def dream(agent: Dreamer, batch: Batch, steps: int, draws: Draws) -> Prediction:
    """What the policy, sampled as in training, expects after a batch (T, B, ...): (steps, B, ...)."""
    with agent.autocast():
        start = _filter(agent.world_model, batch, draws).map(lambda x: x[-1])
        actor = agent.behavior.actor
        _, feat, _ = agent.world_model.rssm.imagine(lambda feat: actor(feat).rsample(draws), start, steps, draws)
        return _decode(agent.world_model, feat[1:])


@torch.no_grad()
def judge(agent: Dreamer, batch: Batch, draws: Draws) -> tuple[Tensor, Tensor]:
    """The reward and the value that model and critic read from the posteriors of a batch: (T, B) each."""
    with agent.autocast():
        feat = _filter(agent.world_model, batch, draws).feat
        return agent.world_model.reward(feat).mean, agent.behavior.value(feat).mean


def _filter(model: WorldModel, batch: Batch, draws: Draws) -> RSSMState:
    """Posteriors (T, B, ...) of a batch."""
    embed = model.encoder(model.encoder.preprocess(batch.image))
    return model.rssm.observe(embed, batch.action, batch.is_first, draws)


def _decode(model: WorldModel, feat: Tensor) -> Prediction:
    """What the model expects in the states of these features (T, B, F)."""
    return Prediction(model.encoder.picture(model.decoder(feat).mean), model.reward(feat).mean)
