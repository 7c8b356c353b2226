"""Train DreamerV2 on RoboSuite, evaluate what it learnt, or draw its curves.

    python run.py                           train with the preset that fits this machine
    python run.py --task Door --seed 1      any constant of train.Config is a flag
    python run.py --eval runs/Lift_cpu_0    evaluate a run or a policy file without training
    python run.py --report runs/Lift_cpu_0  write report.html into a run folder; several runs: their curves together

The same command continues a run from its newest checkpoint. Exit codes: 0 done, 1 failure, 2 the user's input,
130 and 143 interrupted (Ctrl-C, SIGTERM).
"""

import argparse
import contextlib
import ctypes
import dataclasses
import difflib
import functools
import itertools
import json
import math
import os
import random
import shlex
import shutil
import signal
import sys
import textwrap
import time
import typing
from collections import deque
from collections.abc import Callable
from pathlib import Path

import gymnasium
import numpy as np
import torch
from gymnasium.vector import VectorEnv
from tqdm import tqdm

from actor import GripperHold
from buffer import Batch, ReplayBuffer, Transition
from checkpoint import (
    LOCK_NAME,
    OLDER_CONSTANTS,
    CheckpointError,
    InUse,
    ReplayFiles,
    RunLock,
    Saver,
    cut_back,
    global_rngs,
    list_checkpoints,
    load_checkpoint,
    load_policy,
    policy_file,
    remove_leftovers,
    set_global_rngs,
    snapshot,
    versions,
    write_file,
)
from env import BrokenEnv, RebuildingEnv, close_vector_env, make_vector_env
from env import make_env as make_robosuite_env
from logger import (
    RECORDINGS,
    SEQUENCES,
    Analysis,
    EpisodeStats,
    Evaluation,
    Logger,
    Recording,
    Stopwatch,
    VideoError,
    analyse,
    dream_video,
    memory,
    open_loop_video,
    pick_wandb_mode,
    policy_video,
    write_video,
)
from networks import Draws
from report import ReportError, write_report
from train import (
    CONTEXT,
    MAX_SKIPPED_IN_A_ROW,
    PRESETS,
    ActState,
    Config,
    Dreamer,
    check_choice,
    check_config,
    compare_with_cpu,
)

EVAL_SEED = 1_000_000  # of the evaluation env; its episodes are the same in every evaluation
EVAL_EPISODES = 20  # with --eval
LAST_EVALUATION = 2  # times eval_episodes are evaluated at a run's end
DREAM_STEPS = 45  # imagined in the video of the policy's dreams
ENV_ERRORS, ENV_ERROR_SECONDS = 2, 300.0  # an environment may fail that often in that time; then the run stops
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # glibc's names for its settings
MAX_GRADIENT_DEVIATION = 1e-3  # of a GPU's gradients from the CPU's, relative
# Fits 80 columns: tqdm gives the bar itself what the words leave.
BAR_FORMAT = "{desc} {percentage:.0f}%|{bar}|{n_fmt}/{total_fmt} {remaining} left, {rate_noinv_fmt}{postfix}"
ENV_FIELDS = (
    "task", "robot", "controller", "rotation_scale", "cameras", "image_size", "control_freq", "action_repeat",
    "episode_steps", "reward_shaping", "physics_step",
)  # fmt: skip
SHAPE_FIELDS = (  # a run that differs in these can't be continued
    "task", "robot", "controller", "rotation_scale", "cameras", "image_size", "action_repeat", "cnn_depth", "deter",
    "hidden", "stoch", "classes", "reward_layers", "reward_units", "discount_layers", "discount_units", "discount_head",
    "actor_layers", "actor_units", "actor_dist", "value_layers", "value_units",
)  # fmt: skip


OUTPUTS = ("metrics.jsonl", "policy.pt", "replay", "videos", "wandb", "report.html")  # of a run, beside checkpoints


class UserError(Exception):
    """The user's mistake, told in one line; exit code 2."""


class Failure(Exception):
    """What the program can't go on with, told in one line; exit code 1."""


class EnvFailure(Failure):
    """The environments can't go on; what was learnt is sound and saved."""


class Interrupted(Exception):
    """A signal asked the program to stop; carries its number."""


MakeEnv = Callable[..., gymnasium.Env]


# ---------------------------------------------------------------------------------------------- configuration


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> typing.NoReturn:
        if "unrecognized arguments" in message:
            flag = (message.split(": ")[1].split() or ["''"])[0]
            names = [f"--{field.name}" for field in dataclasses.fields(Config)] + ["--eval", "--report"]
            near = difflib.get_close_matches(flag, names, n=1)
            hint = f"did you mean {near[0]}?" if near else "`python run.py --help` lists them all"
            message = f"unknown flag {flag}: {hint}"
        raise UserError(message)


def _parse_bool(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"invalid value {text!r}: true or false")
    return text.lower() == "true"


def _parse_names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _parser() -> Parser:
    parser = Parser(
        prog="run.py", allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter,
        description=__doc__.split("\n\n", 1)[1], epilog="The constants are explained at the top of train.py.",
    )  # fmt: skip
    parser.add_argument("--eval", metavar="RUN", help="evaluate a run folder or policy file without training")
    parser.add_argument("--report", metavar="RUN", nargs="+", help="write report.html into the (first) run folder")
    parsers = {bool: _parse_bool, tuple[str, ...]: _parse_names}
    for field in dataclasses.fields(Config):
        parse = parsers.get(field.type, field.type)
        default = ",".join(field.default) if isinstance(field.default, tuple) else field.default
        name = getattr(field.type, "__name__", "name,name")
        parser.add_argument(f"--{field.name}", type=parse, metavar=name, help=f"standard: {default}")
    return parser


class Command(typing.NamedTuple):
    """What to do instead of training."""

    eval: str | None  # run folder or policy file
    report: list[str] | None  # run folders


def parse_config(argv: list[str]) -> tuple[Config, dict, Command]:
    """The configuration that flags, preset and Config give together; the flags; and what else to do than train."""
    flags = vars(_parser().parse_args(argv))
    command = Command(flags.pop("eval"), flags.pop("report"))
    flags = {name: value for name, value in flags.items() if value is not None}
    preset, device = flags.get("preset", Config.preset), flags.get("device", Config.device)
    try:
        check_choice("preset", preset)
        check_choice("device", device)
        if preset == "auto":
            preset = "cpu" if pick_device(device).type == "cpu" else "standard"
        config = dataclasses.replace(Config(), **{**PRESETS[preset], **flags, "preset": preset})
        if command.eval is None:  # else the policy's constants decide, with the flags
            check_config(config)
    except ValueError as error:
        raise UserError(str(error)) from error
    return config, flags, command


def pick_device(name: str) -> torch.device:
    """The device that was asked for, or the first there is of cuda, mps and cpu."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return torch.device(next(kind for kind, found in there.items() if found))
    if not there[name]:
        raise UserError(f"device {name} is not available here; valid: {', '.join(k for k, v in there.items() if v)}")
    return torch.device(name)


def pick_precision(name: str, device: torch.device) -> torch.dtype | None:
    """The autocast type: bfloat16 where the hardware multiplies it natively, else None for plain float32."""
    if name == "auto":
        if device.type == "cuda":
            fast = torch.cuda.is_bf16_supported(including_emulation=False)
        else:
            fast = device.type == "cpu" and torch.cpu.get_capabilities().get("avx512_bf16", False)
        name = "bfloat16" if fast else "float32"
    return torch.bfloat16 if name == "bfloat16" else None


def keep_freed_memory() -> None:
    """Let glibc reuse the memory that one update frees in the next one, as CUDA's allocator does.

    By default it hands large blocks back to the kernel, and fetching their pages anew takes a tenth of an update on a
    CPU. Other C libraries have no such setting.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, 2**28)  # bytes; larger blocks, such as the replay's, are mapped one by one
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)  # bytes free at the heap's end, above which they are given back


def seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


# ---------------------------------------------------------------------------------------------- environments


def env_options(config: Config) -> dict:
    """The keywords of `make_env`, seed excepted, of a configuration."""
    return {name: getattr(config, name) for name in ENV_FIELDS}


def eval_options(config: Config) -> dict:
    """The same, of the evaluation's environment: its episodes may be longer or shorter."""
    return env_options(config) | {"episode_steps": config.eval_steps or config.episode_steps, "seed": EVAL_SEED}


def make_envs(config: Config, make_env: MakeEnv) -> VectorEnv:
    """The training environments, with seeds `seed`, `seed` + 1, ..."""
    options = env_options(config)
    builders = [functools.partial(make_env, **options, seed=config.seed + i) for i in range(config.num_envs)]
    with env_errors():
        return make_vector_env(builders)


@contextlib.contextmanager
def env_errors():
    """What an environment refuses is the user's to mend; a machine that can't render is a failure."""
    try:
        yield
    except ValueError as error:
        raise UserError(str(error)) from error
    except RuntimeError as error:
        raise Failure(str(error)) from error


def evaluate(
    act: Callable[..., tuple[torch.Tensor, ActState]],
    env: gymnasium.Env,
    episodes: int,
    repeat: int,
    device: torch.device,
    film: bool,
    each_step: Callable[[int], None] = lambda episode: None,
) -> Evaluation:
    """Run the deterministic policy for `episodes` episodes with fixed seeds, in an env and with draws of its own.

    An episode is a success if the task was solved at any of its steps. `repeat` is action_repeat; `film` keeps
    frames of the first episode; `each_step` gets the episode's number and may raise to stop.
    """
    draws = Draws(torch.Generator(device).manual_seed(EVAL_SEED))
    result = Evaluation([], [])
    for episode in range(episodes):
        image, _ = env.reset(seed=EVAL_SEED + episode)
        stats, state, done = EpisodeStats(repeat), None, False
        rows, renders = [(image, np.zeros(env.action_space.shape, np.float32), 0.0, False)], []
        while True:
            if film and episode == 0:
                started = time.perf_counter()
                try:
                    renders.append(env.render())
                except Exception as error:  # whatever a simulator raises, the evaluation needs no pictures
                    tqdm.write(f"warning: the evaluation is not filmed: render() raised {error!r}")
                    film, renders = False, []
                result.render_seconds += time.perf_counter() - started
            if done:
                break
            each_step(episode)
            batch = torch.as_tensor(image, device=device)[None]
            is_first = torch.tensor([state is None], device=device)
            action, state = act(batch, state, is_first, draws, deterministic=True)
            action = action[0].float().cpu().numpy()
            image, reward, terminated, truncated, info = env.step(action)
            if "env_error" in info:
                tqdm.write(f"warning: an episode of the evaluation ended early: {info['env_error']}")
            done, success = terminated or truncated, bool(info.get("success", False))
            stats.add(float(reward), success)
            rows.append((image, action, reward, success))
        result.episodes.append(stats)
        if episode < RECORDINGS:
            images, actions, rewards, successes = map(np.stack, zip(*rows, strict=True))
            filmed = np.stack(renders) if renders else None
            result.recordings.append(
                Recording(images, actions, rewards.astype(np.float32), successes, bool(terminated), filmed)
            )
    return result


# ---------------------------------------------------------------------------------------------- run


@dataclasses.dataclass
class Progress:
    """The counters of a run; saved with it."""

    step: int = 0  # control steps
    episode: int = 0  # finished ones
    owed: float = 0.0  # agent steps that no update was made for yet
    pretrained: bool = False
    logged: int = 0  # control step of the last line of training metrics
    evaluated: int = 0
    filmed: int = 0
    best: float = -np.inf  # mean return of the best evaluation
    best_step: int = -1  # its control step
    metrics_size: int = 0  # bytes of metrics.jsonl
    wandb_id: str = ""


class Run:
    """Everything that one training run holds, and the loop over it."""

    def __init__(self, config: Config, envs: VectorEnv, make_env: MakeEnv, run_dir: Path, device: torch.device):
        self.config, self.make_env, self.run_dir, self.device = config, make_env, run_dir, device
        self.envs = envs
        self.eval_env: gymnasium.Env | None = None
        images, actions = envs.single_observation_space, envs.single_action_space
        image_shape = (3 * len(config.cameras), config.image_size, config.image_size)
        if images.dtype != np.uint8 or images.shape != image_shape:
            raise UserError(f"task {config.task}: its images {images.dtype} {images.shape} are not uint8 {image_shape}")
        if not isinstance(actions, gymnasium.spaces.Box) or (actions.low != -1).any() or (actions.high != 1).any():
            raise UserError(f"task {config.task}: its action space {actions} is not a Box in [-1, 1]")
        action_size = actions.shape[0]
        dtype = pick_precision(config.precision, device)
        self.agent = Dreamer(config, image_shape, action_size, device, dtype)
        where = pick_replay_device(config.capacity, image_shape, device)
        try:
            self.replay = ReplayBuffer(
                config.capacity, config.num_envs, image_shape, action_size, config.seed, config.replay_focus, where
            )
        except RuntimeError as error:  # torch's, where the system refuses that much
            size = config.capacity * math.prod(image_shape) / 1e9
            raise UserError(f"capacity {config.capacity} needs {size:,.0f} GB, which can't be had") from error
        self.replay_files = ReplayFiles(run_dir, self.replay, config.save_replay)
        self.saver = Saver(run_dir, self.replay_files)
        self.envs.single_action_space.seed(config.seed)
        self.has_gripper = bool(envs.metadata.get("gripper"))
        share = config.gripper_hold if self.has_gripper else 0.0
        self.gripper_hold = GripperHold(share, config.num_envs, self.envs.single_action_space.np_random)
        self.progress = Progress()
        self.logger: Logger | None = None
        self.stop_signal = 0
        self.totals: dict[str, torch.Tensor] = {}  # sums of training metrics since the last line
        self.updates_since = 0
        self.timed_from = 0, 0  # step and updates at `logged_at`
        self.watch = Stopwatch()
        self.phase = self.note = ""  # as the bar shows them
        self.last_episodes = ""  # their return and success
        self.logged_at = time.monotonic()
        self.env_errors: deque[float] = deque()  # times of the last ones
        self.lost_workers = False
        self.unwritten_policy: bytes | None = None  # of the best evaluation
        self.gradients_checked = device.type != "mps"

    # -- saving

    def state(self) -> dict:
        """All that decides how the run goes on, in a copy on the CPU. To be taken where an episode has ended."""
        self.progress.metrics_size = self.logger.size
        self.progress.wandb_id = self.logger.wandb_id
        with self.worker_failures():
            env_rngs = self.envs.get_attr("np_random")
        return snapshot(
            {
                "progress": dataclasses.asdict(self.progress),
                "agent": self.agent.state_dict(),
                "config": dataclasses.asdict(self.config),
                "replay": self.replay_files.index(),
                "totals": self.totals,
                "updates_since": self.updates_since,
                "rng": global_rngs(self.device)
                | {
                    "replay": self.replay.rng.bit_generator.state,
                    "action_space": self.envs.single_action_space.np_random.bit_generator.state,
                    "envs": [rng.bit_generator.state for rng in env_rngs],
                },
                "versions": versions(self.device, self.agent.autocast_dtype),
            }
        )

    def load(self, state: dict, path: Path) -> None:
        """The part of a checkpoint's state that can fail to fit; CheckpointError then."""
        try:
            self.progress = Progress(**state["progress"])
            self.agent.load_state_dict(state["agent"])
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise CheckpointError(f"{path} does not fit this release or environment: {reason}") from error

    def compare_evaluations(self, saved: dict) -> None:
        """Where they have changed since the checkpoint's configuration, the search for the best policy starts anew."""
        saved, names = OLDER_CONSTANTS | saved, (*ENV_FIELDS, "eval_steps", "eval_action")
        before = dataclasses.replace(self.config, **{name: saved[name] for name in names if name in saved})
        if (eval_options(before), before.eval_action) != (eval_options(self.config), self.config.eval_action):
            print("evaluations can't be compared with those before: the next one's policy is the best so far")
            self.progress.best, self.progress.best_step = -math.inf, -1

    def restore(self, state: dict) -> None:
        """Go on from the rest of a checkpoint's state; says what keeps that from being exact."""
        self.totals = {name: total.to(self.device) for name, total in state["totals"].items()}
        self.updates_since = state["updates_since"]
        self.saver.saved_step = self.progress.step
        self.restore_replay(state["replay"])
        here = versions(self.device, self.agent.autocast_dtype)
        if other := [f"{name} {old} -> {here[name]}" for name, old in state["versions"].items() if old != here[name]]:
            print(f"warning: this will not be bit for bit the run that was saved: {', '.join(other)}")
        rng = state["rng"]
        if len(rng["envs"]) == self.config.num_envs:
            self.envs.set_attr("np_random", [_generator(saved) for saved in rng["envs"]])
        else:
            print(f"warning: num_envs was {len(rng['envs'])}: the environments start from new seeds")
        self.envs.single_action_space.np_random.bit_generator.state = rng["action_space"]
        self.replay.rng.bit_generator.state = rng["replay"]
        set_global_rngs(rng, self.device)  # last: nothing above may draw after it

    def restore_replay(self, index: list[tuple[str, int, int]]) -> None:
        lost = self.replay_files.restore(index, self.progress.episode)
        if lost:
            print(f"warning: {len(lost)} of {len(index)} replay episodes skipped: {'; '.join(lost[:3])}"
                  f"{' ...' if len(lost) > 3 else ''}")  # fmt: skip
        if self.progress.episode and not index:
            print("the replay was not saved: it is filled anew before the next update")
        elif self.config.num_envs > 1:
            print("environments whose episodes were running at the checkpoint start new ones")

    def keep(self) -> None:
        """Where an episode has ended: hold the state in memory, for a stop at any moment."""
        try:
            self.logger.sync()
            self.replay_files.write()
        except OSError as error:
            self.saver.warn(error)
            return
        skipped = self.check_finite()
        if skipped and self.progress.step < self.config.steps:  # at the end there is no later state to save instead
            tqdm.write(f"warning: {skipped} update(s) just skipped for a NaN: the state before that is kept")
        else:
            self.saver.held = self.state()
        self.write_policy()

    def check_finite(self) -> int:
        """The number of updates just skipped in a row; Failure where learning has ended. Waits for the device."""
        skipped = self.agent.skipped_in_a_row()
        name = self.agent.non_finite()
        if name is None and skipped >= MAX_SKIPPED_IN_A_ROW:
            name = self.non_finite_gradient()
        if name is not None:
            raise Failure(
                f"step {self.progress.step}: {name} is not finite ({skipped} updates skipped in a row); "
                "the last checkpoint was saved before that"
            )
        return skipped

    def non_finite_gradient(self) -> str:
        """The first gradient with a NaN or infinity, on a new batch; for the message, after which nothing goes on."""
        batch = self.sample()
        for name, gradient in self.agent.gradients(batch, Draws()).items():
            if not gradient.isfinite().all():
                return f"the gradient of {name}"
        return "a gradient"

    # -- the loop

    def train(self) -> None:
        """Collect, learn, look and save until `steps`, or until a stop that saves first."""
        try:
            self.loop()
        except Exception:  # what is held is sound, whatever has happened since
            self.saver.save()
            raise
        if self.saver.saved_step < self.progress.step or self.unwritten_policy:
            raise Failure(f"the last checkpoint or policy.pt of {self.run_dir} was not written: see the warnings above")

    def loop(self) -> None:
        """Collect, learn, look and save until `steps`."""
        c, p = self.config, self.progress
        overlap = overlaps(c.num_envs, self.device)
        resets = np.ones(c.num_envs, bool)
        stats = [EpisodeStats(c.action_repeat) for _ in resets]
        image, act_state = None, None
        recent = deque(maxlen=10)  # successes of the last episodes
        bar = tqdm(
            total=c.steps, initial=p.step, unit=" steps", unit_scale=True, smoothing=0.05, disable=None,
            dynamic_ncols=True, bar_format=BAR_FORMAT,
        )  # fmt: skip
        self.show(bar, "train" if self.agent.updates and self.replay.steps >= c.prefill else "prefill")
        self.logged_at = self.saver.saved_at = time.monotonic()
        self.timed_from = p.step, self.agent.updates  # not those of a line that an earlier process began
        with bar:
            while p.step < c.steps:
                # begin episodes
                if resets.any():
                    with self.watch("env"), self.worker_failures():
                        image, info = self.envs.reset(options={"reset_mask": resets.copy()})
                    self.count_env_errors(info)
                    for i in np.flatnonzero(resets):
                        self.add(i, Transition(image[i], np.zeros(self.agent.action_size), 0.0, True, False))
                        stats[i] = EpisodeStats(c.action_repeat)
                        self.gripper_hold.begin(i)

                # act
                with self.watch("update"):  # acting waits for the GPU's updates: the two can't be told apart
                    action, act_state = self.choose_actions(image, act_state, resets)
                if overlap:  # the workers step while the GPU learns
                    with self.watch("env"), self.worker_failures():
                        self.envs.step_async(action)
                    self.learn(c.num_envs, bar)
                with self.watch("env"), self.worker_failures():
                    result = self.envs.step_wait() if overlap else self.envs.step(action)
                image, reward, terminated, truncated, info = result
                failed = self.count_env_errors(info)
                for i in np.flatnonzero(~failed):
                    self.add(i, Transition(image[i], action[i], reward[i], False, terminated[i]))
                    stats[i].add(float(reward[i]), bool(info["success"][i]) if "success" in info else False)
                p.step += c.num_envs * c.action_repeat
                bar.update(c.num_envs * c.action_repeat)
                resets = terminated | truncated

                # learn
                if not overlap:
                    self.learn(c.num_envs, bar)
                self.check_signal()

                # look and save, where an episode ends
                for i in np.flatnonzero(resets):
                    self.replay.finish(i, p.episode)
                    p.episode += 1
                    figures = stats[i].metrics()
                    self.logger.scalars(p.step, {f"episode/{name}": value for name, value in figures.items()})
                    recent.append(figures["success"])
                    self.last_episodes = f"return {figures['return']:.3g}, success {np.mean(recent):.0%}"
                    bar.set_postfix_str(self.last_episodes, refresh=False)
                if resets.any() or p.step >= c.steps:
                    self.look(bar)
                    self.keep()
                    best = p.best_step == p.step  # kept apart from the last two
                    if best or p.step >= c.steps or time.monotonic() - self.saver.saved_at >= 60 * c.checkpoint_minutes:
                        self.saver.save()

    def check_signal(self) -> None:
        if self.stop_signal:
            raise Interrupted(self.stop_signal)

    @contextlib.contextmanager
    def worker_failures(self):
        """Around calls of the environments: a worker process that has died ends the run (EnvFailure)."""
        try:
            yield
        except (EOFError, ConnectionError) as error:
            self.lost_workers = True
            time.sleep(0.5)  # a signal that ended a worker may be on its way to this process too
            self.check_signal()
            codes = [process.exitcode for process in self.envs.processes]
            raise EnvFailure(f"an environment's process has ended; exit codes: {codes}") from error
        except BrokenEnv as error:
            self.lost_workers = True
            raise EnvFailure(f"{error}; the same command continues") from error

    def add(self, env: int, row: Transition) -> None:
        """To the replay; what that refuses ends the run (EnvFailure)."""
        try:
            self.replay.add(row, env)
        except ValueError as error:
            raise EnvFailure(str(error)) from error

    def sample(self) -> Batch:
        """A batch from the replay; where no episode there is long enough, the run ends (EnvFailure)."""
        try:
            return self.replay.sample(self.config.batch_size, self.config.batch_length).to(self.device)
        except ValueError as error:
            raise EnvFailure(f"{error}: the environment ends its episodes earlier") from error

    def count_env_errors(self, info: dict) -> np.ndarray:
        """Which environments were rebuilt in this step, (num_envs,); EnvFailure where that happens too often."""
        failed = np.asarray(info.get("_env_error", np.zeros(self.config.num_envs)), bool)
        now = time.monotonic()
        for i in np.flatnonzero(failed):
            tqdm.write(f"warning: environment {i} was rebuilt, its episode ends here: {info['env_error'][i]}")
            self.env_errors.append(now)
        while self.env_errors and now - self.env_errors[0] > ENV_ERROR_SECONDS:
            self.env_errors.popleft()
        if len(self.env_errors) > ENV_ERRORS:
            count, seconds = len(self.env_errors), ENV_ERROR_SECONDS
            raise EnvFailure(f"the environments failed {count} times in {seconds:.0f} s; the same command continues")
        return failed

    def choose_actions(self, image: np.ndarray, state: ActState | None, is_first: np.ndarray):
        """Random actions until the first update, then the policy's: (num_envs, A) and the policy's state."""
        if self.agent.updates == 0:
            action = np.stack([self.envs.single_action_space.sample() for _ in is_first])
            return self.gripper_hold(action, is_random=True), None
        if state is None:  # the policy takes over from random actions, or from nothing after a resume
            is_first = np.ones_like(is_first)
        images = torch.as_tensor(image, device=self.device)
        action, state = self.agent.act(images, state, torch.as_tensor(is_first, device=self.device))
        taken = self.gripper_hold(action.float().cpu().numpy(), is_random=False)
        # What the policy remembers is what was done, as the replay has it, not what it had wanted.
        return taken, state._replace(action=torch.as_tensor(taken, dtype=torch.float32, device=self.device))

    def learn(self, agent_steps: int, bar: tqdm) -> None:
        """The updates that are due after `agent_steps` more: one for each `train_every`, whatever num_envs is."""
        c, p = self.config, self.progress
        if self.replay.steps < c.prefill:
            return
        updates = 0
        if not p.pretrained:
            p.pretrained, updates = True, c.pretrain
            agent_steps = self.replay.steps - c.prefill  # those beyond the prefill
            self.show(bar, "pretrain", f"{updates} updates")
        p.owed += agent_steps
        due = int(p.owed / c.train_every + 1e-9)  # train_every may be a fraction such as 1.6
        updates, p.owed = updates + due, p.owed - due * c.train_every
        with self.watch("update"):
            for _ in range(updates):
                batch = self.sample()
                if not self.gradients_checked:
                    self.check_gradients(batch)
                for name, value in self.agent.train_step(batch).items():
                    self.totals[name] = self.totals.get(name, 0.0) + value
                self.updates_since += 1
                self.check_signal()
        if self.phase != "train":
            self.show(bar, "train")

    def check_gradients(self, batch: Batch) -> None:
        """Failure where this device's gradients are not the CPU's; once a process, before its first update."""
        deviation, name = compare_with_cpu(self.agent, batch)
        if deviation > MAX_GRADIENT_DEVIATION:
            raise Failure(
                f"device {self.device} computes wrong gradients ({name} is off by {deviation:.1g} from the CPU's): "
                "use another release of torch, or --device cpu"
            )
        self.gradients_checked = True

    # -- looking

    def show(self, bar: tqdm, phase: str, note: str = "") -> None:
        """Name the phase and what it is at in the bar; where there is no bar, in a line when it begins."""
        if bar.disable and "evaluate" not in (phase, self.phase):  # an evaluation prints its result
            print(f"step {self.progress.step}: {phase}" + (f", {note}" if note else ""), flush=True)
        self.phase, self.note = phase, note
        bar.set_description_str(phase, refresh=False)
        bar.set_postfix_str(note or self.last_episodes)

    def look(self, bar: tqdm) -> None:
        """Log, evaluate and film what is due. Nothing here changes what training does."""
        c, p = self.config, self.progress
        last = p.step >= c.steps
        if self.updates_since and (last or p.step - p.logged >= c.log_every):
            self.log_training()
        if self.agent.updates and (last or p.step - p.evaluated >= c.eval_every):
            film = last or p.step - p.filmed >= c.video_every or p.filmed == 0
            with self.watch("eval"):
                self.evaluate(film, bar)

    def log_training(self) -> None:
        """One line with the means of all updates since the last one."""
        p, now = self.progress, time.monotonic()
        seconds = now - self.logged_at
        metrics = {name: float(total) / self.updates_since for name, total in self.totals.items()}
        if not all(np.isfinite(value) for value in metrics.values()):
            bad = ", ".join(name for name, value in metrics.items() if not np.isfinite(value))
            tqdm.write(f"warning: not finite since the last line: {bad}")
        metrics |= {
            "perf/env_steps_per_s": (p.step - self.timed_from[0]) / seconds,
            "perf/updates_per_s": (self.agent.updates - self.timed_from[1]) / seconds,
            "perf/updates": self.agent.updates,
            "optim/skipped": sum(float(optimizer.skipped) for optimizer in self.agent.optimizers),
            "replay/steps": self.replay.steps,
            "replay/episodes": sum(map(len, self.replay.episodes)),
            "replay/gb": len(self.replay) * self.replay.row_bytes / 1e9,
        }
        metrics |= {
            f"perf/share_{part}": self.watch.seconds[part] / seconds for part in ("env", "update", "eval", "video")
        }
        metrics |= memory(self.device)
        self.watch.seconds.clear()
        self.logger.scalars(p.step, metrics)
        self.totals, self.updates_since, p.logged = {}, 0, p.step
        self.logged_at, self.timed_from = now, (p.step, self.agent.updates)

    def evaluate(self, film: bool, bar: tqdm) -> None:
        """Evaluate, log what that gives, film if asked, and keep the best policy."""
        c, p = self.config, self.progress
        episodes = c.eval_episodes if p.step < c.steps else LAST_EVALUATION * c.eval_episodes
        if self.eval_env is None:
            self.eval_env = RebuildingEnv(functools.partial(self.make_env, **eval_options(c)))

        def each_step(episode: int) -> None:
            note = f"episode {episode + 1}/{episodes}"
            if self.note != note:
                self.show(bar, "evaluate", note)
            self.check_signal()

        try:
            result = evaluate(self.agent.act, self.eval_env, episodes, c.action_repeat, self.device, film, each_step)
        except BrokenEnv as error:
            raise EnvFailure(f"in the evaluation, {error}; the same command continues") from error
        summary = result.summary()
        draws = Draws(torch.Generator(self.device).manual_seed(EVAL_SEED))
        analysis = analyse(self.agent, result.recordings, draws)
        self.logger.scalars(p.step, summary | analysis.metrics)
        tqdm.write(f"step {p.step}: {describe(summary)}")
        if film and result.recordings[0].renders is not None:
            self.show(bar, "evaluate", "videos")
            self.watch.seconds["video"] += result.render_seconds
            with self.watch("video"):
                self.film(result, analysis, draws)
            p.filmed = p.step
        if summary["eval/return_mean"] > p.best:
            p.best, p.best_step = summary["eval/return_mean"], p.step
            self.unwritten_policy = policy_file(self.agent.policy, c, env_step=p.step, **summary)  # `keep` writes it
        p.evaluated = p.step
        self.show(bar, "train")

    def write_policy(self) -> None:
        """The best evaluation's policy, unless that is done. Where the disk refuses it, a later call tries again."""
        if self.unwritten_policy:
            try:
                write_file(self.run_dir / "policy.pt", self.unwritten_policy)
                self.unwritten_policy = None
            except OSError as error:
                self.logger.warn("policy.pt can't be written", str(error))

    def film(self, result: Evaluation, analysis: Analysis, draws: Draws) -> None:
        """The three videos: an episode, the model's open-loop prediction, and what the policy imagines."""
        c, p = self.config, self.progress
        fps = c.control_freq / c.action_repeat
        self.logger.video(p.step, "eval", policy_video(result.recordings[0], c.action_repeat), fps)
        windows = Batch(*(x[:, :SEQUENCES] for x in analysis.windows))
        truth, model = windows.image.float() / 255, analysis.prediction.image[:, :SEQUENCES]
        frames = open_loop_video(truth.cpu().numpy(), model.float().cpu().numpy(), c.cameras)
        self.logger.video(p.step, "openloop", frames, fps)
        dream = self.agent.dream(Batch(*(x[:CONTEXT] for x in windows)), DREAM_STEPS, draws)
        image, reward = dream.image.float().cpu().numpy(), dream.reward.cpu().numpy() / c.action_repeat
        frames = dream_video(truth[:CONTEXT].cpu().numpy(), image, reward, c.cameras, c.horizon)
        self.logger.video(p.step, "dream", frames, fps)

    def close(self) -> None:
        close_vector_env(self.envs, terminate=self.lost_workers)
        if self.eval_env is not None:
            self.eval_env.close()
        if self.logger is not None:
            self.logger.close()


def _generator(state: dict) -> np.random.Generator:
    generator = np.random.default_rng()
    generator.bit_generator.state = state
    return generator


def describe(summary: dict[str, float]) -> str:
    return (
        f"evaluation return {summary['eval/return_mean']:.1f} +- {summary['eval/return_std']:.1f}, "
        f"success {summary['eval/success_rate']:.0%} of {summary['eval/episodes']} episodes"
    )


# ---------------------------------------------------------------------------------------------- preflight


def preflight(run: Run, flags: dict, wandb_mode: tuple[str, str]) -> None:
    """Say in a few lines what is about to happen; refuse what can't fit (UserError)."""
    c, agent = run.config, run.agent
    asked = flags.get("preset", "auto")
    why = "as asked" if asked != "auto" else f"--preset auto on {run.device.type}"
    say = functools.partial(print, flush=True)
    say(f"preset {c.preset} ({why}), seed {c.seed}, {c.steps} control steps")
    replaced = [f"{name}={_text(getattr(c, name))}" for name in PRESETS[c.preset] if name not in flags]
    if replaced:
        say(textwrap.fill(f"the preset replaces: {', '.join(replaced)}", 79, subsequent_indent="  "))
    precision = "bfloat16 products, float32 parameters" if agent.autocast_dtype else "float32"
    threads = f", threads: {torch.get_num_threads()}" if run.device.type == "cpu" else ""
    say(f"device {run.device}, {precision}{threads}")
    say(f"task {c.task} with {c.robot}, {c.controller}, {c.num_envs} env(s): image {agent.image_shape}, "
        f"{agent.action_size} actions")  # fmt: skip
    if c.gripper_hold and not run.has_gripper:
        say(f"gripper_hold {c.gripper_hold} is off: this environment's last action is no gripper's")
    modules = {"world model": agent.world_model, "actor": agent.behavior.actor, "value": agent.behavior.value}
    sizes = {name: sum(p.numel() for p in module.parameters()) / 1e6 for name, module in modules.items()}
    say("parameters: " + ", ".join(f"{name} {size:.2f} M" for name, size in sizes.items()))
    need, free = run.replay.bytes(c.steps // c.action_repeat), free_memory()
    if run.replay.image.is_cuda:
        say(f"replay: {run.replay.image.nbytes / 1e9:.2f} GB of the GPU's memory")
    elif need <= free:
        say(f"replay: up to {need / 1e9:.2f} GB of memory, {free / 1e9:.1f} GB free")
    else:
        rows = int(free / run.replay.row_bytes * 0.9)
        raise UserError(f"capacity {c.capacity} needs {need / 1e9:.1f} GB but {free / 1e9:.1f} are free: try {rows}")
    if c.save_replay:
        say(f"replay on disk: up to {need / 1e9:.2f} GB, {free_disk(run.run_dir) / 1e9:.1f} GB free")
    else:
        say("replay on disk: none; a resumed run fills it anew")
    say(f"W&B {wandb_mode[0]} ({wandb_mode[1]})")
    say(f"run folder {run.run_dir}")


def farewell(run: Run) -> None:
    """Say what a finished run gave, and where it is."""
    p, folder = run.progress, shlex.quote(str(run.run_dir))
    print(f"done: {p.step} steps, {p.episode} episodes, {run.agent.updates} updates")
    if p.evaluated:
        print(f"best evaluation return {p.best:.1f}, best success rate {run.logger.best_success:.0%}")
    lines = {
        "numbers": f"{folder}/metrics.jsonl",
        "videos": f"{folder}/videos",
        "policy": f"python run.py --eval {folder}",
        "curves": f"python run.py --report {folder}",
    }
    if run.logger.wandb:
        wandb_run = run.logger.wandb
        lines["W&B"] = f"wandb leet {folder}/wandb" if wandb_run.offline else wandb_run.url
    for name, where in lines.items():
        print(f"  {name:<8} {where}")


def overlaps(num_envs: int, device: torch.device) -> bool:
    """Whether environments step while the agent learns: in workers beside a GPU. On a CPU both want its cores."""
    return num_envs > 1 and device.type == "cuda"


def pick_replay_device(capacity: int, image_shape: tuple[int, int, int], device: torch.device) -> torch.device:
    """The GPU if the replay takes at most half of the memory that is free there, else the host."""
    if device.type == "cuda" and capacity * np.prod(image_shape) <= torch.cuda.mem_get_info(device)[0] / 2:
        return device
    return torch.device("cpu")


def free_memory() -> float:
    """Bytes of memory that a process can still take."""
    try:
        with open("/proc/meminfo") as file:
            return 1024 * next(float(line.split()[1]) for line in file if line.startswith("MemAvailable"))
    except OSError:  # not Linux: all there is, for want of a better figure in the standard library
        return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def free_disk(run_dir: Path) -> int:
    """Bytes that can be written to the disk of a run folder that may not exist yet."""
    there = next(path for path in (run_dir, *run_dir.absolute().parents) if path.exists())
    return shutil.disk_usage(there).free


def _text(value) -> str:
    return "+".join(value) if isinstance(value, tuple) else str(value).lower() if value in (True, False) else str(value)


@contextlib.contextmanager
def path_errors(what: str):
    """A path that the system refuses, such as a name that is too long, is the user's to mend."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{what}: {error.strerror}") from error


def pick_run_dir(config: Config) -> Path:
    """The run folder, not made yet; refused where it can't be one (UserError)."""
    run_dir = Path(config.run_dir or f"runs/{config.task}_{config.preset}_{config.seed}")
    there = next(path for path in (run_dir, *run_dir.absolute().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"run_dir {run_dir} can't be used: {there} is not a folder that can be written to")
    ours = {"config.json", ".config.json.tmp", LOCK_NAME}  # all there may be after a crash at the very start
    names = {path.name for path in run_dir.iterdir()} if run_dir.exists() else set()
    if names - ours and not is_run_dir(run_dir):
        raise UserError(f"run_dir {run_dir} is not empty and no run folder: choose another")
    return run_dir


def is_run_dir(folder: Path) -> bool:
    """Whether a folder has checkpoints or the constants of a run."""
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError):
        config = None
    return bool(list_checkpoints(folder)) or (isinstance(config, dict) and {"task", "preset"} <= config.keys())


def make_run_dir(run_dir: Path, config: Config, lock: RunLock, resumed: Path | None) -> None:
    """Make the run folder this process's own, and clear what lies in it beyond the checkpoint to go on from."""
    with path_errors(f"run_dir {run_dir} can't be used"):
        run_dir.mkdir(parents=True, exist_ok=True)
        lock.acquire()
        remove_leftovers(run_dir)
        if resumed:
            cut_back(run_dir, resumed)
        elif list_checkpoints(run_dir):
            raise InUse(f"{run_dir} got a checkpoint from another process just now: start again")
        elif earlier := [run_dir / name for name in OUTPUTS if (run_dir / name).exists()]:
            number = next(n for n in itertools.count(1) if not (run_dir / f"earlier_{n}").exists())
            aside = run_dir / f"earlier_{number}"
            aside.mkdir()
            for path in earlier:
                path.rename(aside / path.name)
            print(f"{run_dir} has no checkpoint: starting afresh; what lay there is in {aside}")
        write_file(run_dir / "config.json", json.dumps(dataclasses.asdict(config), indent=2).encode())


def check_same_shapes(run_dir: Path, saved: dict, config: Config) -> None:
    """Refuse to continue a run with other shapes; say which other constants changed."""
    now = json.loads(json.dumps(dataclasses.asdict(config)))
    saved = OLDER_CONSTANTS | json.loads(json.dumps(saved))
    changed = {name: (saved[name], value) for name, value in now.items() if name in saved and saved[name] != value}
    no_matter = {"rotation_scale"} if config.controller != "OSC_POSE" else set()
    for name in SHAPE_FIELDS:
        if name in changed and name not in no_matter:
            old, new = changed[name]
            raise UserError(
                f"{name} {new} does not fit the run in {run_dir}, made with {old}: choose another --run_dir"
            )
    for name in (name for name in now if name not in saved):
        print(f"not in the checkpoint, which is older: {name}; it is {now[name]} from here on")
    for name, (old, new) in changed.items():
        if name not in ("run_dir", "device", "wandb"):
            print(f"changed since the checkpoint: {name} {old} -> {new}")


# ---------------------------------------------------------------------------------------------- main


def main(argv: list[str] | None = None, make_env: MakeEnv = make_robosuite_env) -> int:
    """Train or evaluate; returns the exit code."""
    try:
        config, flags, command = parse_config(sys.argv[1:] if argv is None else argv)
        if command.eval is not None:
            return evaluate_run(Path(command.eval), flags, make_env)
        if command.report:
            with path_errors(f"--report {' '.join(command.report)}"):
                print(f"report {write_report([Path(path) for path in command.report])}")
            return 0
        return train_run(config, flags, make_env)
    except (UserError, ReportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (CheckpointError, Failure, InUse) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:  # before or after the training loop, which has its own handler
        return 130


def train_run(config: Config, flags: dict, make_env: MakeEnv) -> int:
    """Start or continue the run of this configuration."""
    keep_freed_memory()
    with path_errors(f"run_dir {config.run_dir}"):
        run_dir = pick_run_dir(config)
    device = pick_device(config.device)
    lock = RunLock(run_dir)
    with path_errors(f"run_dir {run_dir} can't be locked"):
        if run_dir.exists():
            lock.acquire()
    try:
        return _train_run(config, flags, make_env, run_dir, device, lock)
    finally:
        lock.release()


def _train_run(
    config: Config, flags: dict, make_env: MakeEnv, run_dir: Path, device: torch.device, lock: RunLock
) -> int:
    loaded = load_checkpoint(run_dir)
    state, path, damaged = loaded or (None, None, [])
    if state:
        step = state["progress"]["step"]
        finished = step >= config.steps
        print(f"finished: {run_dir} has its {step} steps; --steps extends it" if finished
              else f"resumed {path} at step {step}")  # fmt: skip
        for line in damaged:
            print(f"warning: {line}")
        check_same_shapes(run_dir, state["config"], config)
        if finished:
            return 0
        if "replay" not in state:
            raise CheckpointError(f"{path} is from a release of this program that saved no replay: use that one")
    seed_everything(config.seed)
    run = Run(config, make_envs(config, make_env), make_env, run_dir, device)
    try:
        wandb_mode = pick_wandb_mode(config.wandb, dict(os.environ))
        preflight(run, flags, wandb_mode)
        if state:
            run.load(state, path)
            run.compare_evaluations(state["config"])
        make_run_dir(run_dir, config, lock, path)
        if state:
            run.restore(state)
        p = run.progress
        run.logger = Logger(run_dir, dataclasses.asdict(config), wandb_mode[0], p.wandb_id, p.metrics_size)
        with stop_on_signals(run):
            run.train()
        farewell(run)
        return 0
    except Interrupted as stop:
        number = stop.args[0]
        saved = run.saver.saved_step
        at = f"from step {saved}" if saved >= 0 else "from its beginning: no episode had ended"
        print(f"stopped by {signal.Signals(number).name}; the same command continues {at}")
        return 128 + number
    finally:
        run.close()


class stop_on_signals:
    """Inside, the first SIGINT or SIGTERM asks the run to stop; a second one ends the process at once.

    Not where it comes in the same second: `timeout` sends its signal to the process and then to its group.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)
    SAME = 1.0  # seconds

    def __init__(self, run: Run):
        self.run, self.since = run, 0.0

    def __enter__(self):
        self.before = [signal.signal(number, self.handle) for number in self.SIGNALS]

    def __exit__(self, *_):
        for number, handler in zip(self.SIGNALS, self.before, strict=True):
            signal.signal(number, handler)

    def handle(self, number, _frame):
        if not self.run.stop_signal:
            self.run.stop_signal, self.since = number, time.monotonic()
        elif time.monotonic() - self.since > self.SAME:
            os._exit(128 + number)


def evaluate_run(path: Path, flags: dict, make_env: MakeEnv) -> int:
    """Evaluate a run folder's best policy, or a policy file, for 20 episodes and film the first."""
    with path_errors(f"--eval {path}"):
        file = path / "policy.pt" if path.is_dir() else path
        if not file.exists():
            raise UserError(
                f"--eval {path}: there is no {'policy.pt in it' if path.is_dir() else 'such run or policy'}"
            )
    free = {*ENV_FIELDS, "device", "eval_episodes", "eval_steps", "eval_action"} - {*SHAPE_FIELDS, "episode_steps"}
    if fixed := [name for name in flags if name not in free]:
        raise UserError(f"{fixed[0]} {flags[fixed[0]]} can't be chosen with --eval; valid: {', '.join(sorted(free))}")
    try:
        policy, config = load_policy(file)
        config = dataclasses.replace(config, eval_episodes=EVAL_EPISODES)
        config = dataclasses.replace(config, **flags)
        check_config(config)
    except (CheckpointError, ValueError) as error:
        raise UserError(str(error)) from error
    policy.eval_action = config.eval_action
    device = pick_device(flags.get("device", "auto"))
    with env_errors():
        env = make_env(**eval_options(config))
    result = evaluate(policy.to(device), env, config.eval_episodes, config.action_repeat, device, film=True)
    env.close()
    print(describe(result.summary()))
    if result.recordings[0].renders is None:
        return 0
    video = file.with_suffix(".mp4")
    try:
        frames = policy_video(result.recordings[0], config.action_repeat)
        write_video(video, frames, config.control_freq / config.action_repeat)
        print(f"video {video}")
    except VideoError as error:
        print(f"warning: no video: {error}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
