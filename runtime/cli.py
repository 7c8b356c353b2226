"""The command line: flags from the fields of `train.Config`, checks of their values, what is said before a run."""

import dataclasses
import difflib
import functools
import math
import os
import shutil
import textwrap
import typing
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import torch
import tyro

from buffer import ReplayBuffer
from runtime.console import UserError, say
from runtime.device import free_memory, pick_device
from runtime.envs import Envs
from train import PRESETS, TASKS, Config, Dreamer, Range

DESCRIPTION = """\
Train DreamerV2 on RoboSuite, evaluate what it learned, or draw its curves:
  python run.py                           train with the preset that fits this machine
  python run.py --task Door --seed 1      every constant of train.Config is a flag
  python run.py --eval runs/Lift_cpu_0    evaluate a run or a policy file without training
  python run.py --report runs/Lift_cpu_0  write report.html into a run folder; several: their curves together

The same command continues a run from its newest checkpoint. Exit codes: 0 done, 1 failure, 2 wrong input, and
128 + the signal's number if a signal stopped the run. The defaults below are those of the preset `{preset}`."""

# Names that other programs have for constants.
ELSEWHERE = {"env": "task", "gamma": "discount", "lr": "model_lr", "learning_rate": "model_lr", "logdir": "run_dir"}
ELSEWHERE |= {"log_dir": "run_dir", "buffer_size": "capacity", "replay_size": "capacity", "total_steps": "steps"}


@dataclasses.dataclass(frozen=True)
class Flags(Config):
    """All flags: the constants, and what to do instead of training."""

    eval: str = ""  # evaluate this run folder or policy file without training
    report: tuple[str, ...] = ()  # write report.html about these run folders into the first of them


class Command(typing.NamedTuple):
    """What the command line asks for."""

    config: Config
    given: dict[str, Any]  # the constants among its flags
    eval: Path | None
    report: list[Path]


def parse(argv: Sequence[str]) -> Command:
    """The configuration that flags, preset and Config give together, and what to do. UserError for wrong input."""
    check_block()
    words = list(_words(argv))
    options: dict[str, Any] = dict(args=words, config=(tyro.conf.FlagConversionOff,), use_underscores=True)
    with tyro._errors.on_parse_error(_refuse):
        first, _ = tyro.cli(Flags, **options, add_help=False, return_unknown_args=True)
        preset = first.preset  # it and the task decide what the other flags default to
        if preset == "auto":
            preset = "standard" if pick_device(first.device).type == "cuda" else "cpu"
        default, description = Flags(**defaults(first.task, preset)), DESCRIPTION.format(preset=preset)
        flags = tyro.cli(Flags, **options, prog="run.py", description=description, default=default)
    named = {_field(word) for word in words if word.startswith("--")}
    values = {field.name: getattr(flags, field.name) for field in dataclasses.fields(Config)}
    given = {name: value for name, value in values.items() if name in named}
    config = Config(**values | {"preset": preset})
    if "eval" in named and not flags.eval:
        raise UserError("--eval needs a run folder or a policy file")
    if "report" in named and not all(flags.report or [""]):
        raise UserError("--report needs one run folder or several")
    if flags.report and (flags.eval or given.keys() - {"task"}):  # which a script of the user's adds by itself
        name = "eval" if flags.eval else next(name for name in given if name != "task")
        raise UserError(
            f"{name} {_text(getattr(flags, name))} can't be chosen with --report, which takes only run folders"
        )
    if flags.eval:
        check_fields(config)
    elif not flags.report:
        check_config(config)
        if flags.preset == "auto" and preset == "cpu":
            _check_no_gpu_run(config)
    return Command(config, given, _path(flags.eval) if flags.eval else None, [_path(name) for name in flags.report])


def check_block() -> None:
    """Refuse what an edit has made of the block of constants in train.py (UserError)."""
    check_fields(Config())
    if lacking := set(typing.get_args(hints()["preset"])) - {"auto", *PRESETS}:
        raise UserError(f"PRESETS in train.py lacks {', '.join(sorted(lacking))}")
    for table, entries in (("PRESETS", PRESETS), ("TASKS", TASKS)):
        for entry, constants in entries.items():
            for name in constants.keys() - hints().keys():
                hint = _did_you_mean(name, hints(), "Config has no such constant")
                raise UserError(f"{table} in train.py, {entry}: unknown constant {name}: {hint}")
            # Here, as tyro would warn of a wrong type in lines of its own.
            check_fields(dataclasses.replace(Config(), **constants))


def _did_you_mean(name: str, valid: Iterable[str], otherwise: str, dashes: str = "") -> str:
    """A question that names the nearest valid name, or other words if none is near."""
    near = [ELSEWHERE[name]] if name in ELSEWHERE else difflib.get_close_matches(name, valid, 1, cutoff=0.75)
    return f"did you mean {dashes}{near[0]}?" if near else otherwise


def _check_no_gpu_run(config: Config) -> None:
    """Refuse to begin a small run beside the one that the same command began on a GPU, which is missing (UserError)."""
    on_gpu = run_dir(dataclasses.replace(config, preset="standard"))
    if on_gpu != run_dir(config) and on_gpu.is_dir() and not run_dir(config).is_dir():
        raise UserError(
            f"preset auto is cpu, as no NVIDIA GPU is used here, but {on_gpu} is a run of standard: name the --preset"
        )


def _field(word: str) -> str:
    """The field that a flag names: `save_replay` of `--save-replay=False`."""
    return word.split("=")[0].lstrip("-").replace("-", "_")


def _words(argv: Sequence[str]) -> Iterator[str]:
    """A sweep's `--save_replay=false` and `--cameras=a,b` in tyro's form: `--save_replay=False`, `--cameras a b`."""
    flag = ""
    for word in argv:
        start, value = "", word
        if word.startswith("--"):
            flag, equals, value = word.partition("=")
            start = flag + equals
        default = getattr(Config, _field(flag), None)
        if isinstance(default, tuple) and start != flag:
            yield from [flag] if start else []
            yield from value.split(",")
        else:
            switch = isinstance(default, bool) and value in ("true", "false")
            yield start + (value.capitalize() if switch else value)


def _path(name: str) -> Path:
    """A path in which `~` is the home folder."""
    return Path(os.path.expanduser(name))  # unlike Path.expanduser, this takes the `~` of an unknown user as it is


def _refuse(event: Any) -> NoReturn:
    """Turn tyro's account of a wrong command line into one line (UserError)."""
    errors = tyro._errors
    if isinstance(event, errors.UnrecognizedArgs):
        token, names = event.tokens[0], [field.name for field in dataclasses.fields(Flags)]
        flag = token.split("=")[0]
        if not flag.startswith("-"):
            hint = (
                f"did you mean --{token}?" if flag in names else "most flags take one value; see python run.py --help"
            )
            raise UserError(f"{token} is no flag: {hint}")
        hint = _did_you_mean(_field(flag), names, "see python run.py --help", dashes="--")
        raise UserError(f"unknown flag {flag}: {hint}")
    argument = getattr(event, "argument", None)
    name = argument.lowered.name_or_flags[0].lstrip("-") if argument is not None else ""
    if isinstance(event, errors.InvalidChoice):
        valid = ", ".join(str(choice).lower() if choice in ("True", "False") else choice for choice in event.choices)
        raise UserError(f"{name} {event.value or repr(event.value)} is unknown; valid: {valid}")
    if isinstance(event, errors.InstantiationFailure) and name in hints():  # int's or float's: "...: 'abc'"
        raise UserError(f"{name} {event.message.rpartition(': ')[2]} is of the wrong type: {_valid(name)}")
    raise UserError(f"{name or 'flags'}: a value is missing; {_valid(name)}")


def _valid(name: str) -> str:
    """What a field takes, in words."""
    kind, *_ = _type_and_marks(hints().get(name))
    if typing.get_origin(kind) is Literal:
        return f"valid: {', '.join(map(str, typing.get_args(kind)))}"
    return f"it must be {WORDS[kind]}" if kind in WORDS else "see python run.py --help"


def check_fits_policy(given: dict[str, Any], config: Config) -> None:
    """Refuse flags that an evaluation would ignore, unless the policy was trained with them (UserError)."""
    env, fixed = marked("env"), marked("fixed")
    free = {*env, "num_envs", "eval_episodes", "eval_steps", "eval_action"} - {*fixed, "episode_steps"}
    free |= {"device", "run_dir"}  # which a script may name for its runs; an evaluation has none
    for name, value in given.items():
        if name not in free and value != getattr(config, name):
            made = f"the policy was trained with {_text(getattr(config, name))}"
            valid = "" if name in fixed else f"; valid: {', '.join(sorted(free))}"
            raise UserError(f"{name} {_text(value)} can't be chosen with --eval: {made}{valid}")


WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}


@functools.cache
def hints() -> dict[str, Any]:
    """The types of Config's fields with all their marks."""
    return typing.get_type_hints(Config, include_extras=True)


def marked(mark: str) -> tuple[str, ...]:
    """Names of the fields that carry a mark: `fixed`, `kept`, `env`."""
    return tuple(name for name, hint in hints().items() if mark in getattr(hint, "__metadata__", ()))


def defaults(task: str, preset: str) -> dict[str, Any]:
    """The constants that a task and a preset replace; where both replace one, the preset's value holds."""
    return TASKS.get(task, {}) | PRESETS[preset]


def env_options(config: Config) -> dict[str, Any]:
    """The keywords of `make_env`, seed excepted, of a configuration."""
    return {name: getattr(config, name) for name in marked("env")}


def training_options(config: Config) -> dict[str, Any]:
    """The keywords of `make_env` for training. The collector itself ends those episodes that are to be shorter."""
    longest = max(config.episode_steps, config.eval_steps if config.greedy_episodes else 0)
    return env_options(config) | {"episode_steps": longest}


def _type_and_marks(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if typing.get_origin(hint) is Annotated else (hint,)


def check_fields(config: Config) -> None:
    """Refuse values that their fields' types don't allow: UserError, one line with field, value and what is valid."""
    for name, hint in hints().items():
        kind, *marks = _type_and_marks(hint)
        value = getattr(config, name)
        if typing.get_origin(kind) is tuple:
            if not isinstance(value, tuple):
                raise UserError(f"{name} {value!r} is of the wrong type: it must be several names, as a tuple")
            for item in value:
                _check_value(name, item, typing.get_args(kind)[0])
        else:
            _check_value(name, value, kind)
        for mark in marks:
            if isinstance(mark, Range):
                _check_range(name, value, mark)


def _check_value(name: str, value: Any, kind: Any) -> None:
    if typing.get_origin(kind) is Literal:
        valid = typing.get_args(kind)
        if not any(value == choice and type(value) is type(choice) for choice in valid):
            raise UserError(f"{name} {value or repr(value)} is unknown; valid: {', '.join(map(str, valid))}")
        return
    right = isinstance(value, (int, float) if kind is float else kind) and (kind is bool or not isinstance(value, bool))
    if not right:
        raise UserError(f"{name} {value!r} is of the wrong type: it must be {WORDS[kind]}")


def _check_range(name: str, value: float, allowed: Range) -> None:
    low = value > allowed.low if allowed.above else value >= allowed.low
    if not (low and value <= allowed.high and math.isfinite(value)):
        words = f"{'above' if allowed.above else 'at least'} {allowed.low:g}"
        words += f" and at most {allowed.high:.10g}" if math.isfinite(allowed.high) else ""
        raise UserError(f"{name} {value} is out of range: it must be {words}")


def check_config(config: Config) -> None:
    """Refuse values that can't work, alone or together: UserError, one line."""
    check_fields(config)
    c = config
    if not c.cameras or not all(c.cameras):
        raise UserError(f"cameras {','.join(c.cameras)!r} lack a name: the agent sees through one camera at least")
    if len(set(c.cameras)) < len(c.cameras):
        raise UserError(f"cameras {','.join(c.cameras)!r} name one twice")
    if c.entropy_updates and not (c.actor_entropy and c.actor_entropy_final):
        raise UserError(
            f"entropy_updates {c.entropy_updates} needs actor_entropy {c.actor_entropy} and actor_entropy_final "
            f"{c.actor_entropy_final} above 0: the weight goes from one to the other by equal factors"
        )
    for name in ("episode_steps", "eval_steps"):
        if getattr(c, name) % c.action_repeat:
            raise UserError(f"{name} {getattr(c, name)} is not a multiple of action_repeat {c.action_repeat}")
    # Reset rows, and the first remaining row of a half-overwritten episode, do not count as steps.
    ring = c.capacity // c.num_envs
    held = c.num_envs * (ring - math.ceil(ring / (c.episode_steps // c.action_repeat + 1)) - 1)
    if held < c.prefill:
        raise UserError(f"capacity {c.capacity} is too small: it holds {held} agent steps, prefill is {c.prefill}")
    if c.steps <= c.prefill * c.action_repeat:
        raise UserError(
            f"steps {c.steps} end before the first update: prefill {c.prefill} x action_repeat {c.action_repeat} are "
            f"{c.prefill * c.action_repeat} control steps"
        )


def check_same_run(run_dir: Path, saved: dict[str, Any], config: Config) -> list[str]:
    """Refuse to continue a run with other fixed or kept constants (UserError); which others have changed, in words."""
    changes = []
    if gone := saved.keys() - hints().keys():  # what today's code does in its place may not be what that run did
        raise UserError(
            f"the run in {run_dir} is from another release, with {', '.join(sorted(gone))}: choose another --run_dir"
        )
    fixed = {*marked("fixed"), *marked("kept")} - ({"rotation_scale"} if config.controller != "OSC_POSE" else set())
    for name, new in dataclasses.asdict(config).items():
        if name in fixed and name not in saved:  # its default of today may not be what it was
            raise UserError(f"the run in {run_dir} is from another release, without {name}: choose another --run_dir")
        old = saved.get(name)
        if name in fixed and old != new:
            made = f"the run in {run_dir}, made with {_text(old)}"
            raise UserError(f"{name} {_text(new)} does not fit {made}: choose another --run_dir")
        if old != new and name not in ("run_dir", "device", "wandb"):
            changes.append(f"{name} {_text(old) if name in saved else 'new'} -> {_text(new)}")
    return changes


def run_dir(config: Config) -> Path:
    """The run folder of a configuration."""
    return _path(config.run_dir or f"runs/{config.task}_{config.preset}_{config.seed}")


def preflight(
    config: Config,
    given: dict[str, Any],
    folder: Path,
    agent: Dreamer,
    envs: Envs,
    replay: ReplayBuffer,
    wandb_mode: tuple[str, str],
    beside: int,
) -> None:
    """Say in a few lines what is about to happen; refuse what can't fit (UserError).

    `beside`: threads that make updates beside the steps of environments, 0 if they are made between them.
    """
    c = config
    why = "as asked" if given.get("preset", Config.preset) != "auto" else f"--preset auto on {agent.device}"
    say(f"preset {c.preset} ({why}), seed {c.seed}, {c.steps} control steps")
    of_task = defaults(c.task, c.preset).keys() - PRESETS[c.preset].keys()
    for what, names in (("preset", PRESETS[c.preset].keys()), (f"task {c.task}", of_task)):
        if replaced := [f"{name}={_text(getattr(c, name))}" for name in names if name not in given]:
            say(textwrap.fill(f"the {what} replaces: {', '.join(replaced)}", 79, subsequent_indent="  "))
    precision = "bfloat16 products, float32 parameters" if agent.autocast_dtype else "float32"
    threads = f", threads: {beside or torch.get_num_threads()}" if agent.device.type == "cpu" else ""
    say(f"device {agent.device}, {precision}{threads}")
    if beside:
        say("environments step in processes of their own while the agent learns")
    if agent.device.type == "cuda" and c.num_envs == 1:
        say("num_envs 1: the GPU waits while the environment steps; with more of them, both work at once")
    say(
        f"task {c.task} with {c.robot}, {c.controller}, {c.num_envs} env(s): image {agent.image_shape}, "
        f"{agent.action_size} actions"
    )
    if c.held_actions and not (envs.metadata.get("gripper") or envs.metadata.get("moves")):
        say(f"held_actions {c.held_actions} is off: this environment's metadata names no gripper and no moves")
    modules = {"world model": agent.world_model, "actor": agent.behavior.actor, "value": agent.behavior.value}
    sizes = {name: sum(p.numel() for p in module.parameters()) / 1e6 for name, module in modules.items()}
    say("parameters: " + ", ".join(f"{name} {size:.2f} M" for name, size in sizes.items()))
    _say_replay(c, folder, replay)
    say(f"W&B {wandb_mode[0]} ({wandb_mode[1]})")
    say(f"run folder {folder}")


def _say_replay(config: Config, folder: Path, replay: ReplayBuffer) -> None:
    rows = config.steps // config.action_repeat + config.steps // config.episode_steps  # with those of resets
    need = replay.row_bytes * min(len(replay.image), int(1.1 * rows))  # some episodes are shorter: tasks may end them
    free = free_memory()
    if replay.image.is_cuda:
        say(f"replay: {replay.image.nbytes / 1e9:.2f} GB of the GPU's memory")
    elif need <= free:
        say(f"replay: up to {need / 1e9:.2f} GB of memory, {free / 1e9:.1f} GB free")
    else:
        rows = int(free / replay.row_bytes * 0.9)
        raise UserError(
            f"capacity {config.capacity} needs {need / 1e9:.1f} GB but {free / 1e9:.1f} are free: try {rows}"
        )
    if config.save_replay:
        there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        say(f"replay on disk: up to {need / 1e9:.2f} GB, {shutil.disk_usage(there).free / 1e9:.1f} GB free")
    else:
        say("replay on disk: none; a resumed run fills it anew")


def _text(value: Any) -> str:
    """A value as a flag takes it."""
    if isinstance(value, tuple | list):
        return " ".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else str(value)
