"""bfloat16 computes what float32 does, up to rounding, in every part of the agent; and the check can fail."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from actor import Actor
from fast import OneHotLinear
from image_codec import Decoder, Encoder
from networks import Bernoulli, Head, UnitNormal
from precision import assert_bfloat16_computes_the_same
from rssm import RSSM, GRUCell
from tiny import tiny_config

CONFIGS: dict[str, dict[str, Any]] = {
    "standard": {},
    "cpu": dict(decode_fraction=0.5, imagine_starts=7, discount_head=False, return_norm=True),
    "gaussian": dict(classes=0),
    "both": dict(actor_grad="both"),
    "reinforce": dict(actor_grad="reinforce"),
}
# Without free nats, the KL has a gradient in the prior of fresh weights too.
PRECISE = {name: tiny_config(**changes, kl_free=0.0) for name, changes in CONFIGS.items()}


@pytest.mark.parametrize("overlay", [False, True], ids=["plain", "sped up"])
@pytest.mark.parametrize("name", PRECISE)
def test_an_update_in_bfloat16_is_that_of_float32(name, overlay, monkeypatch):
    """At equal draws, gradients of world model, actor, value and each parameter have a cosine above 0.99 to float32's.

    The outputs of encoder, GRU, prior, posterior, decoder, heads and actor, and the actions, are within 2 %.
    """
    monkeypatch.setattr(OneHotLinear, "FEW", 0)  # a tiny update's rows are looked up too
    assert_bfloat16_computes_the_same(PRECISE[name], overlay=overlay)


def zeroed(distribution: UnitNormal | Bernoulli) -> UnitNormal | Bernoulli:
    if isinstance(distribution, UnitNormal):
        return UnitNormal(distribution.mean * 0, distribution.event_dims)
    return Bernoulli(distribution.logit * 0)


# What goes wrong under autocast alone: class, method, what takes its place, and what the check then names first.
MUTATIONS: dict[str, tuple[type, str, Callable[..., Any], str]] = {
    "decoder zeroed": (Decoder, "forward", lambda f, self, x: zeroed(f(self, x)), "gradient of world model"),
    "decoder without gradient": (Decoder, "forward", lambda f, self, x: f(self, x.detach()), "gradient of "),
    "GRU dead": (GRUCell, "forward", lambda f, self, x, h: h + 0 * f(self, x, h), "gradient of "),
    "GRU zeroed": (GRUCell, "forward", lambda f, self, x, h: 0 * f(self, x, h), "gradient of "),
    "GRU without memory": (GRUCell, "forward", lambda f, self, x, h: f(self, x, 0 * h), "gradient of "),
    "encoder blind": (Encoder, "forward", lambda f, self, x: f(self, 0 * x), "gradient of "),
    "encoder zeroed": (Encoder, "forward", lambda f, self, x: 0 * f(self, x), "gradient of "),
    "heads zeroed": (Head, "forward", lambda f, self, x: zeroed(f(self, x)), "gradient of "),
    "heads blind": (Head, "forward", lambda f, self, x: f(self, 0 * x), "gradient of "),
    "actor blind": (Actor, "raw", lambda f, self, x: f(self, 0 * x), "gradient of actor"),
    "prior zeroed": (RSSM, "prior", lambda f, self, x: 0 * f(self, x), "gradient of "),
    "samples without gradient": (RSSM, "sample", lambda f, self, *x: f(self, *x).detach(), "gradient of "),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_the_check_notices_what_goes_wrong_under_autocast(name, monkeypatch):
    """The same check fails if a part of the model is dead, blind or cut off in bfloat16 only."""
    owner, method, mutated, words = MUTATIONS[name]
    original = getattr(owner, method)

    def forward(self, *args):
        if torch.is_autocast_enabled("cpu"):
            return mutated(original, self, *args)
        return original(self, *args)

    monkeypatch.setattr(owner, method, forward)
    with pytest.raises(AssertionError, match=words):
        assert_bfloat16_computes_the_same(PRECISE["standard"])


def exactly(layer: nn.Module, x: Tensor) -> Tensor:
    """What the layer gives in float32 for a hidden activation that autocast has rounded."""
    assert x.dtype == torch.bfloat16
    return layer(x.float())


@pytest.mark.parametrize("kind", [UnitNormal, Bernoulli])
def test_a_heads_output_layer_is_in_float32(kind):
    """Under autocast, hidden layers are in bfloat16 and the output layer in float32, its gradients included."""
    torch.manual_seed(0)
    head, feat = Head(7, 2, 16, kind), torch.randn(50, 7)
    nn.init.constant_(head.out.bias, 100.0)  # where bfloat16 has only every half
    with torch.autocast("cpu", torch.bfloat16):
        dist, hidden = head(feat), head.mlp(feat)
    raw = dist.mean if isinstance(dist, UnitNormal) else dist.logit
    expected = exactly(head.out, hidden).squeeze(-1)
    assert torch.equal(raw, expected)
    found, expected = (torch.autograd.grad(x.square().sum(), head.out.weight)[0] for x in (raw, expected))
    assert torch.equal(found, expected)


def test_the_actors_output_layers_are_in_float32():
    """Under autocast, hidden layers are in bfloat16 and the output layers in float32."""
    torch.manual_seed(0)
    actor = Actor(feat_size=7, action_size=2, layers=2, units=16)
    feat = torch.randn(50, 7)
    with torch.autocast("cpu", torch.bfloat16):
        raws, hidden = actor.raw(feat), actor.mlp(feat)
    for layer, raw in zip((actor.out, actor.std), raws, strict=True):
        assert torch.equal(raw, exactly(layer, hidden))
