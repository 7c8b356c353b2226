"""The settings of a recorded case as a `Config`; what the project can't do is refused by name."""

from torch import Tensor

from actor import Actor
from distributions import ACTORS, OneHot
from image_codec import DECODER_KERNELS, ENCODER_KERNELS
from recording import Recording, refuse
from train import PRESETS, Config, WorldModel

# The recorded numbers and switches, and our names for them.
NUMBERS = {
    "rssm.deter": "deter",
    "rssm.hidden": "hidden",
    "rssm.stoch": "stoch",
    "rssm.discrete": "classes",
    "encoder.cnn_depth": "cnn_depth",
    "decoder.cnn_depth": "cnn_depth",
    "reward_head.layers": "reward_layers",
    "reward_head.units": "reward_units",
    "discount_head.layers": "discount_layers",
    "discount_head.units": "discount_units",
    "actor.layers": "actor_layers",
    "actor.units": "actor_units",
    "critic.layers": "value_layers",
    "critic.units": "value_units",
    "kl.free": "kl_free",
    "kl.balance": "kl_balance",
    "kl.free_avg": "kl_free_avg",
    "loss_scales.kl": "kl_scale",
    "loss_scales.reward": "reward_scale",
    "loss_scales.discount": "discount_scale",
    "pred_discount": "discount_head",
    "discount": "discount",
    "discount_lambda": "return_lambda",
    "imag_horizon": "horizon",
    "actor_grad_mix": "actor_grad_mix",
    "actor_ent": "actor_entropy",
    "slow_target_update": "target_every",
    "slow_target_fraction": "target_fraction",
}
NUMBERS |= {
    f"{theirs}_opt.{setting}": f"{ours}_{name}"
    for theirs, ours in (("model", "model"), ("actor", "actor"), ("critic", "value"))
    for setting, name in (("lr", "lr"), ("eps", "eps"), ("clip", "clip"), ("wd", "decay"))
}
# The recorded settings that the project has no use for, and the value that it implements.
FIXED_SETTINGS = {
    "rssm.ensemble": 1,
    "rssm.std_act": "sigmoid2",
    "rssm.min_std": 0.1,
    "actor.min_std": 0.1,
    "encoder.cnn_keys": "image",
    "encoder.mlp_keys": "$^",
    "encoder.mlp_layers": [400] * 4,
    "decoder.cnn_keys": "image",
    "decoder.mlp_keys": "$^",
    "decoder.mlp_layers": [400] * 4,
    "encoder.cnn_kernels": list(ENCODER_KERNELS[64]),
    "decoder.cnn_kernels": list(DECODER_KERNELS[64]),
    "reward_head.dist": "mse",
    "discount_head.dist": "binary",
    "critic.dist": "mse",
    "kl.forward": False,
    "loss_scales.proprio": 1.0,
    "slow_target": True,
    "reward_norm.momentum": 1.0,
    "reward_norm.scale": 1.0,
    "reward_norm.eps": 1e-8,
}
HEADS = {"decoder", "reward", "discount"}
NETWORKS = ("rssm", "encoder", "decoder", "reward_head", "discount_head", "actor", "critic")
FIXED_SETTINGS |= {f"{network}.act": "elu" for network in NETWORKS}
FIXED_SETTINGS |= {f"{network}.norm": "none" for network in NETWORKS}
FIXED_SETTINGS |= {f"{name}_opt.opt": "adam" for name in ("model", "actor", "critic")}
# These may be "auto"; what that came to is recorded beside them.
RESOLVED_SETTINGS = {"actor.dist": "effective_actor_dist", "actor_grad": "effective_actor_grad"}

ACTOR_GRADS = ("dynamics", "reinforce", "both")

# Entries of a recording's json beside its settings: what a replay needs, and what is told for information.
ENTRIES = {
    "config",
    "overrides",
    "batch",
    "length",
    "action_dim",
    "discrete_action",
    "slow_target_updates_at_start",
    "trunc_normal_sample_gradient",
    "effective_actor_dist",
    "effective_actor_grad",
}
INFORMATION = {"case", "origin", "versions", "seed", "base_config", "facts", "checkpoint_variable_order"}


def config_of(recording: Recording) -> Config:
    """The recorded settings, on top of the preset with the author's numbers."""
    info, settings = recording.info, flat(recording.entry("config"))
    check_names(recording, settings)

    def require(condition: bool, name: str, value) -> None:
        if not condition:
            refuse(f"{recording.name}.json: the project has no {name} {value!r}")

    for name, value in flat(info["overrides"]).items():
        require(settings.get(name) == value, f"overrides.{name}", value)
    for name, value in FIXED_SETTINGS.items():
        require(settings[name] == value, f"config.{name}", settings[name])
    fields = dict(PRESETS["paper"])
    for name, field in NUMBERS.items():
        value, kind = settings[name], type(getattr(Config(), field))
        valid = type(value) is bool if kind is bool else type(value) in (int, float) and kind(value) == value
        require(valid and (value > 0 or not name.endswith("clip")), f"config.{name}", value)
        fields[field] = kind(value)
    require(settings["encoder.cnn_depth"] == fields["cnn_depth"], "config.encoder.cnn_depth", "of its own")
    fields["grad_heads"] = tuple(settings["grad_heads"])
    require(set(fields["grad_heads"]) <= HEADS, "config.grad_heads", fields["grad_heads"])
    fields["actor_grad"] = info["effective_actor_grad"]
    require(fields["actor_grad"] in ACTOR_GRADS, "effective_actor_grad", fields["actor_grad"])
    require(settings["clip_rewards"] in MODELS, "config.clip_rewards", settings["clip_rewards"])
    for name, resolved in RESOLVED_SETTINGS.items():
        require(settings[name] in ("auto", info[resolved]), f"config.{name}", settings[name])
    discrete = info["discrete_action"]
    require(discrete == (actor_of(recording).distribution is OneHot), "discrete_action", discrete)
    return Config(**fields)


def actor_of(recording: Recording) -> type[Actor]:
    """The kind of actor with the recorded distribution of actions."""
    names = "effective_actor_dist", "trunc_normal_sample_gradient"
    asked = recording.entry(names[0]), recording.entry(names[1])
    if asked not in ACTORS:
        refuse(f"{recording.name}.json: the project has no {' and '.join(names)} {asked!r}")
    return ACTORS[asked]


class TanhRewards(WorldModel):
    """Learns tanh of the rewards, as the author does in Atari."""

    def learned_reward(self, reward: Tensor) -> Tensor:
        return super().learned_reward(reward).tanh()


MODELS = {"identity": WorldModel, "tanh": TanhRewards}


def model_of(recording: Recording) -> type[WorldModel]:
    """The kind of world model with the recorded rewards."""
    return MODELS[recording.entry("config")["clip_rewards"]]


def check_names(recording: Recording, settings: dict) -> None:
    """Refuse a json with unknown or missing names."""
    known = {*NUMBERS, *FIXED_SETTINGS, *RESOLVED_SETTINGS, "clip_rewards", "grad_heads"}
    known = {"config." + name for name in known}
    names = {"config." + name for name in settings} | set(recording.info)
    unknown, missing = names - known - ENTRIES - INFORMATION, (known | ENTRIES) - names
    if unknown:
        refuse(f"{recording.name}.json has unknown {', '.join(sorted(unknown))}")
    if missing:
        refuse(f"{recording.name}.json lacks {', '.join(sorted(missing))}")


def flat(tree: dict, prefix: str = "") -> dict:
    """{"a": {"b": 1}} -> {"a.b": 1}."""
    leaves: dict = {}
    for name, value in tree.items():
        leaves |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return leaves
