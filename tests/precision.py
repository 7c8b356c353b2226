"""One update's gradients and outputs in bfloat16 against float32, at equal weights and draws. Needs no pytest."""

from collections.abc import Iterator

import torch
from torch import Tensor

from fast import speed_up
from networks import Bernoulli, Draws, UnitNormal
from runtime.device import RecordedDraws, gradients
from tiny import random_batch, tiny_dreamer
from train import Config, Dreamer

COSINE = 0.99  # of the gradients; what rounding leaves is above 0.999
OUTPUT = 0.02  # relative error of a module's outputs; rounding makes 0.008
GROUPS = {"world model": "world_model.", "actor": "behavior.actor.", "value": "behavior.value."}
# Modules whose outputs are compared, if an agent has them. The actor's two layers stand for it: nobody calls it whole.
WATCHED = (
    "world_model.encoder",
    "world_model.rssm.gru",
    "world_model.rssm.img_dist",
    "world_model.rssm.obs_dist",
    "world_model.decoder",
    "world_model.reward",
    "world_model.discount",
    "behavior.actor.out",
    "behavior.actor.std",
    "behavior.value",
    "behavior.target_value",
)


def assert_bfloat16_computes_the_same(config: Config, device: str = "cpu", overlay: bool = False) -> None:
    """Every gradient points where float32's does, and every module gives what it gives in float32, up to rounding."""
    plain = tiny_dreamer(config, device=device)
    lowered = tiny_dreamer(config, device=device, autocast_dtype=torch.bfloat16)
    lowered.load_state_dict(plain.state_dict())
    if overlay:
        speed_up(lowered)
    draws = RecordedDraws(torch.Generator(device).manual_seed(0))
    expected, outputs = gradients_and_outputs(plain, draws)
    found, lowered_outputs = gradients_and_outputs(lowered, draws.replay())
    assert {x.dtype for x in lowered_outputs["world_model.encoder"]} == {torch.bfloat16}
    for name, cosine in cosines(found, expected):
        assert cosine > COSINE, f"gradient of {name}: the cosine is {cosine:.4f}"
    for name, output in outputs.items():
        ours, theirs = (torch.cat([x.float().flatten() for x in xs]) for xs in (lowered_outputs[name], output))
        error = float((ours - theirs).norm() / theirs.norm())
        assert error < OUTPUT, f"output of {name}: the relative error is {error:.4f}"


def gradients_and_outputs(agent: Dreamer, draws: Draws) -> tuple[dict[str, Tensor], dict[str, list[Tensor]]]:
    """What `train_step` would descend, by parameter, and what modules gave: outputs, and means of distributions.

    Also those of acting, which training does not use.
    """
    both = torch.nn.ModuleDict({"world_model": agent.world_model, "behavior": agent.behavior})
    named = dict(both.named_modules())
    outputs: dict[str, list[Tensor]] = {name: [] for name in WATCHED if name in named}
    hooks = [
        named[name].register_forward_hook(lambda _, __, y, given=given: given.append(values(y)))
        for name, given in outputs.items()
    ]
    batch = random_batch(agent.config).to(agent.device)
    found = gradients(agent, batch, draws)
    action, _ = agent.act(batch.image[0], None, batch.is_first[0], deterministic=True)
    outputs["action"] = [action]
    for hook in hooks:
        hook.remove()
    return found, outputs


def values(output: Tensor | UnitNormal | Bernoulli) -> Tensor:
    """The output, or its mean if it is a distribution."""
    return (output if isinstance(output, Tensor) else output.mean).detach()


def cosines(found: dict[str, Tensor], expected: dict[str, Tensor]) -> Iterator[tuple[str, float]]:
    """Cosines between two sets of gradients: of world model, actor and value, then of each parameter."""
    assert found.keys() == expected.keys()
    groups = {group: [name for name in expected if name.startswith(prefix)] for group, prefix in GROUPS.items()}
    for group, names in (groups | {name: [name] for name in expected}).items():
        ours, theirs = (torch.cat([x[name].flatten() for name in names]) for x in (found, expected))
        yield group, float(torch.cosine_similarity(ours, theirs, dim=0))
