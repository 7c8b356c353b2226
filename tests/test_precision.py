"""bfloat16 computes what float32 does, up to rounding: gradients at equal draws point the same way."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import image_codec
import rssm
from networks import Head
from runtime.device import RecordedDraws, gradients
from tiny import random_batch, tiny_config, tiny_dreamer

PARTS = ("world_model.encoder", "world_model.rssm", "world_model.decoder", "world_model.reward", "actor", "value")


def cosines() -> dict[str, float]:
    """Cosine of the gradients in float32 and in bfloat16 at equal weights, batch and draws, for each part."""
    config = tiny_config(batch_size=8, batch_length=8, cnn_depth=8, deter=32, hidden=32, stoch=8, classes=8)
    agent, batch = tiny_dreamer(config), random_batch(config)
    draws = RecordedDraws(torch.Generator().manual_seed(0))
    exact = gradients(agent, batch, draws)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = gradients(agent, batch, draws.replay())

    def flat(found: dict[str, Tensor], part: str) -> Tensor:
        return torch.cat([value.flatten() for name, value in found.items() if name.startswith(part)])

    return {part: float(F.cosine_similarity(flat(exact, part), flat(rounded, part), dim=0)) for part in PARTS}


def test_gradients_in_bfloat16_point_where_those_in_float32_do():
    """Of model, actor and critic."""
    found = cosines()
    assert min(found.values()) > 0.99, found


def dead_under_autocast(forward):
    """The same layer, whose output is zero where precision is lowered."""

    def mutated(self, *args):
        out = forward(self, *args)
        if not torch.is_autocast_enabled("cpu"):
            return out
        return type(out)(0 * out.mean, out.event_dims) if hasattr(out, "event_dims") else 0 * out

    return mutated


@pytest.mark.parametrize(
    ("owner", "part"),
    [(image_codec.Decoder, "decoder"), (rssm.GRUCell, "rssm"), (image_codec.Encoder, "encoder")],
    ids=["decoder zeroed", "GRU dead", "encoder blind"],
)
def test_a_dead_part_is_noticed(owner, part, monkeypatch):
    """The comparison fails where bfloat16 loses a whole part."""
    monkeypatch.setattr(owner, "forward", dead_under_autocast(owner.forward))
    assert not cosines()[f"world_model.{part}"] > 0.9


def test_output_layers_leave_autocast():
    """Values between 64 and 128 are finer than bfloat16's grid of 0.5."""
    head = Head(4, 0, 4, image_codec.UnitNormal)
    with torch.no_grad():
        head.out.weight.fill_(1.0)
        head.out.bias.fill_(100.0)
        with torch.autocast("cpu", torch.bfloat16):
            assert head(torch.full((1, 4), 0.03125)).mean.item() == 100.125
