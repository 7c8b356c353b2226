"""Evaluation: episodes of the deterministic policy, what model and critic make of them, and the best policy so far."""

import dataclasses
import functools
import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import fast
from buffer import Batch
from networks import Draws
from runtime.checkpoint import load_policy, policy_file, write_file
from runtime.cli import check_config, check_fits_policy, env_options
from runtime.collect import EpisodeStats
from runtime.console import Failure, ProgressBar, StopSignals, UserError, say, warn
from runtime.device import pick_device
from runtime.envs import (
    FAULTS,
    BrokenEnv,
    Envs,
    EvalEnv,
    MakeEnv,
    build_errors,
    close_envs,
    dead_workers,
    describe_error,
    make_vector_env,
)
from runtime.logger import Logger, Stopwatch
from runtime.video import VideoError, dream_video, open_loop_video, policy_video, write_video
from train import CONTEXT, ActState, Config, Dreamer, Prediction

Act = Callable[..., tuple[Tensor, ActState]]

EVAL_SEED = 1_000_000  # of the evaluation env; its episodes are the same in every evaluation
OWN_SEED = 2_000_000  # of `--eval`, whose episodes no evaluation of training has played
EVAL_EPISODES = 20  # with --eval
LAST_EVALUATION = 2  # times eval_episodes are evaluated at a run's end
TRIES, OTHER_SEED = 3, 1_000  # an episode that fails is played again that often, its seed moved by so much
DREAM_STEPS = 45  # imagined in the video of the policy's dreams
OPEN_LOOP_STEPS = (1, 5, 15, 45)  # imagined agent steps after which the open-loop error is logged
OPEN_LOOP_WINDOWS = 24  # sequences that the open-loop errors are means of
RECORDINGS = 6  # evaluation episodes that are kept for figures and pictures
SEQUENCES = 6  # columns of the open-loop and the imagination videos
# Lift's dense reward a control step: at most 0.444 near the cube, 0.556 with both fingers on it, 1 with it in the air.
LIFT_CLASSES = {"hovering": (-np.inf, 0.45), "holding": (0.45, 0.6), "lifted": (0.6, np.inf)}


# ---------------------------------------------------------------------------------------------- episodes


@dataclasses.dataclass
class Recording:
    """An evaluation episode of n agent steps; rows are those of the replay (buffer.py)."""

    image: np.ndarray  # (n + 1, C, H, W) uint8
    action: np.ndarray  # (n + 1, A)
    reward: np.ndarray  # (n + 1,)
    success: np.ndarray  # (n + 1,) bool
    terminal: bool  # the task ended the episode, not the clock
    renders: np.ndarray | None  # (n + 1, h, h, 3) uint8, if the episode was filmed

    def video(self, repeat: int) -> np.ndarray:
        """The frames of a filmed episode, `repeat` control steps apart."""
        assert self.renders is not None
        return policy_video(self.renders, self.image, self.reward, self.success, repeat)


@dataclasses.dataclass
class Evaluation:
    """What the episodes of an evaluation gave, and recordings of the first ones."""

    episodes: list[EpisodeStats]
    recordings: list[Recording]
    failed: int = 0  # episodes that the environment could not play
    render_seconds: float = 0.0

    @property
    def filmed(self) -> Recording | None:
        """The recording that has frames, if one has."""
        return next((recording for recording in self.recordings if recording.renders is not None), None)

    def summary(self) -> dict[str, float]:
        """Mean and spread of each figure over the episodes (time to success: over those with success)."""
        figures = [episode.metrics() for episode in self.episodes]
        summary: dict[str, float] = {
            "eval/success_rate": float(np.mean([x["success"] for x in figures])),
            "eval/episodes": len(figures),
        }
        for name in ("return", "length", "max_reward", "time_to_success"):
            if values := [x[name] for x in figures if name in x]:
                summary |= {f"eval/{name}_mean": float(np.mean(values)), f"eval/{name}_std": float(np.std(values))}
        return summary


@dataclasses.dataclass
class Episode:
    """An evaluation episode that is being played, for the `attempt`-th time."""

    number: int
    stats: EpisodeStats
    attempt: int = 0
    rows: list[tuple[np.ndarray, np.ndarray, float, bool]] = dataclasses.field(default_factory=list)
    renders: list[np.ndarray] = dataclasses.field(default_factory=list)
    terminal: bool = False

    def recording(self) -> Recording:
        """What is kept of it."""
        images, actions, rewards, successes = map(np.stack, zip(*self.rows, strict=True))
        renders = np.stack(self.renders) if self.renders else None
        return Recording(images, actions, rewards.astype(np.float32), successes, self.terminal, renders)


class Player:
    """Plays episodes of the deterministic policy with fixed seeds, as many at once as there are environments.

    An episode's seed follows from its number alone, so the environment's draws are the same however many run at once.
    The policy's own draws are made for all running episodes together.

    Args:
        act: images (B, C, H, W), state, is_first (B,), draws, deterministic -> actions (B, A) and the next state.
        envs: B environments of the kind `EvalEnv`.
        repeat: action_repeat.
        seed: of the first episode; the next ones have the numbers after it.
        each_step: gets the lowest number of a running episode, and may raise to stop.
    """

    def __init__(
        self,
        act: Act,
        envs: Envs,
        repeat: int,
        device: torch.device,
        seed: int = EVAL_SEED,
        each_step: Callable[[int], None] = lambda _: None,
    ):
        self.act, self.envs, self.repeat, self.device, self.seed = act, envs, repeat, device, seed
        self.each_step = each_step
        self.draws = Draws(torch.Generator(device).manual_seed(seed))

    def play(self, episodes: int, film: bool) -> Evaluation:
        """An evaluation, in the order of its episodes; `film` keeps frames of the first one.

        An episode is a success if the task was solved at any of its steps. Failed episodes are played again with other
        draws. Raises BrokenEnv if an environment can't be mended, or its process has ended.
        """
        self.waiting, self.film, self.render_seconds = deque(range(episodes)), film, 0.0
        self.done: list[Episode] = []  # by number
        self.running = [self._next() for _ in range(self.envs.num_envs)]
        state: ActState | None = None
        with dead_workers(self.envs):
            while any(self.running):
                first = self._begin()
                self.each_step(min(episode.number for episode in self.running if episode))
                image, is_first = (torch.as_tensor(x, device=self.device) for x in (self.image, first))
                state = None if first.all() else state
                action, state = self.act(image, state, is_first, self.draws, deterministic=True)
                self._step(action.float().cpu().numpy())
        recordings = [episode.recording() for episode in self.done[:RECORDINGS]]
        stats = [episode.stats for episode in self.done]
        return Evaluation(stats, recordings, episodes - len(stats), self.render_seconds)

    def _next(self) -> Episode | None:
        """The next episode, or None: then an environment rests until the others have finished theirs."""
        return Episode(self.waiting.popleft(), EpisodeStats(self.repeat)) if self.waiting else None

    def _seed(self, episode: Episode) -> int:
        return self.seed + episode.number + OTHER_SEED * episode.attempt

    def _begin(self) -> np.ndarray:
        """Begin the episodes that have no row yet, and say which those are: (B,) bool."""
        first = np.array([episode is not None and not episode.rows for episode in self.running])
        if first.any():
            seeds = [self._seed(episode) if episode else None for episode in self.running]
            self.image, info = self.envs.reset(seed=seeds, options={"reset_mask": first.copy()})
            failed = self._failed(info)
            for i, episode in enumerate(self.running):
                if episode and first[i]:
                    if failed[i]:
                        warn(f"a reset of the evaluation failed and was drawn anew: {info['env_error'][i]}")
                    nothing = np.zeros(self.envs.single_action_space.shape or (), np.float32)
                    episode.rows.append((self.image[i].copy(), nothing, 0.0, False))
                    self._render(i, episode)
        return first

    def _step(self, action: np.ndarray) -> None:
        """Let all running episodes make a step (B, A), and put others in the place of those that end with it."""
        self.image, reward, terminated, truncated, info = self.envs.step(action)
        failed, success = self._failed(info), info.get("success", np.zeros(len(action), bool))
        for i, episode in enumerate(self.running):
            if episode and failed[i]:
                warn(f"an episode of the evaluation failed and is played with other draws: {info['env_error'][i]}")
                again = Episode(episode.number, EpisodeStats(self.repeat), episode.attempt + 1)
                self.running[i] = again if again.attempt < TRIES else self._next()
            elif episode:
                episode.stats.add(float(reward[i]), bool(success[i]))
                episode.rows.append((self.image[i].copy(), action[i], float(reward[i]), bool(success[i])))
                self._render(i, episode)
                if terminated[i] or truncated[i]:
                    episode.terminal = bool(terminated[i])
                    self._keep(episode)
                    self.running[i] = self._next()

    def _failed(self, info: dict[str, Any]) -> np.ndarray:
        """Which environments tell of a fault: (B,) bool."""
        if "broken" in info:
            raise BrokenEnv(next(filter(None, info["broken"])))
        return info.get("_env_error", np.zeros(self.envs.num_envs, bool))

    def _keep(self, episode: Episode) -> None:
        """Keep an episode that has ended; rows only of the first ones."""
        self.film = self.film and not episode.renders
        self.done = sorted([*self.done, episode], key=lambda x: x.number)
        for later in self.done[RECORDINGS:]:
            later.rows.clear()

    def _render(self, i: int, episode: Episode) -> None:
        """Film the first environment until it has played an episode; without frames, an evaluation goes on."""
        if not self.film or i > 0:
            return
        started = time.perf_counter()
        frame = self.envs.call("frame", self._seed(episode))[i]
        if isinstance(frame, np.ndarray) and episode.renders and frame.shape != episode.renders[0].shape:
            frame = f"a frame of {frame.shape} after one of {episode.renders[0].shape}"
        if isinstance(frame, np.ndarray):
            episode.renders.append(frame)
        else:
            warn(f"the evaluation is not filmed: {frame}")
            episode.renders.clear()
            self.film = False
        self.render_seconds += time.perf_counter() - started


def describe(summary: dict[str, float]) -> str:
    """An evaluation in one line."""
    return (
        f"evaluation return {summary['eval/return_mean']:.1f} +- {summary['eval/return_std']:.1f}, "
        f"success {summary['eval/success_rate']:.0%} of {summary['eval/episodes']} episodes"
    )


# ---------------------------------------------------------------------------------------------- analysis


@dataclasses.dataclass
class Analysis:
    """How model and critic see evaluation episodes, which training never saw."""

    metrics: dict[str, float]
    windows: Batch  # (T, B, ...), T at most 50
    prediction: Prediction  # of these windows, open loop


def analyse(agent: Dreamer, recordings: Sequence[Recording], draws: Draws) -> Analysis:
    """Open-loop errors, reward errors and value calibration; changes nothing in the agent."""
    windows = open_loop_windows(recordings).to(agent.device)
    prediction = agent.predict(windows, draws)
    metrics = _open_loop_errors(agent, windows, prediction)
    episodes, length = whole_episodes(recordings)
    reward, value = (x.float().cpu().numpy() for x in agent.judge(episodes.to(agent.device), draws))  # (T, B)
    learned = agent.world_model.learned_reward(episodes.reward).numpy()
    inside = np.arange(len(reward))[:, None] < length  # (T, B): no padding
    metrics |= _reward_errors(agent.config, np.abs(reward - learned), episodes.reward.numpy(), inside)
    metrics |= _value_errors(agent.config, recordings, value, learned, length, inside)
    return Analysis(metrics, windows, prediction)


def _open_loop_errors(agent: Dreamer, windows: Batch, prediction: Prediction) -> dict[str, float]:
    truth, metrics = windows.image.float() / 255, {}
    for k in OPEN_LOOP_STEPS:
        row = CONTEXT + k - 1
        if row < len(truth):
            learned = agent.world_model.learned_reward(windows.reward[row])
            metrics[f"openloop/image_mse_{k}"] = float((prediction.image[row] - truth[row]).square().mean())
            metrics[f"openloop/reward_error_{k}"] = float((prediction.reward[row] - learned).abs().mean())
    return metrics


def _reward_errors(config: Config, error: np.ndarray, reward: np.ndarray, inside: np.ndarray) -> dict[str, float]:
    """Mean error of the reward that is read from a state; arrays (T, B)."""
    metrics = {"reward/error": float(error[inside].mean())}
    if config.task == "Lift" and config.reward_shaping:
        step_reward = reward / config.action_repeat
        for name, (low, high) in LIFT_CLASSES.items():
            rows = inside & (step_reward >= low) & (step_reward < high)
            if rows.any():
                metrics[f"reward/error_{name}"] = float(error[rows].mean())
    return metrics


def _value_errors(
    config: Config,
    recordings: Sequence[Recording],
    value: np.ndarray,
    learned: np.ndarray,
    length: np.ndarray,
    inside: np.ndarray,
) -> dict[str, float]:
    """The critic's values (T, B) against the returns that followed."""
    realised = np.full_like(value, np.nan)
    for b, recording in enumerate(recordings):
        rows = slice(0, length[b])
        realised[rows, b] = realised_return(
            learned[rows, b], value[length[b] - 1, b], recording.terminal, config.discount
        )
    known = inside.copy()
    known[length - 1, np.arange(len(length))] = [recording.terminal for recording in recordings]
    return {
        "behavior/value_predicted": float(value[known].mean()),
        "behavior/value_realised": float(realised[known].mean()),
        "behavior/value_error": float(np.abs(value - realised)[known].mean()),
    }


def realised_return(reward: np.ndarray, last_value: float, terminal: bool, discount: float) -> np.ndarray:
    """The discounted return from each row on, the row's own reward included: (n + 1,) -> (n + 1,).

    If the clock ended the episode, the critic's value of the last row stands for what would have followed.
    """
    returns = np.empty(len(reward))
    returns[-1] = reward[-1] if terminal else last_value
    for t in reversed(range(len(reward) - 1)):
        returns[t] = reward[t] + discount * returns[t + 1]
    return returns


def open_loop_windows(recordings: Sequence[Recording]) -> Batch:
    """Windows of 50 rows, or of the longest episode's, as (T, B, ...): the first of each episode, then the second."""
    length = min(CONTEXT + max(OPEN_LOOP_STEPS), max(len(recording.image) for recording in recordings))
    parts = max(len(recording.image) for recording in recordings) // length
    windows = [
        (recording, slice(part * length, (part + 1) * length))
        for part in range(parts)
        for recording in recordings
        if (part + 1) * length <= len(recording.image)
    ]
    return _batch([_cut(recording, rows) for recording, rows in windows[:OPEN_LOOP_WINDOWS]])


def whole_episodes(recordings: Sequence[Recording]) -> tuple[Batch, np.ndarray]:
    """All rows of each episode as (T, B, ...), the shorter ones padded with their last row, and their lengths (B,)."""
    length = np.array([len(recording.image) for recording in recordings])
    padded = [np.minimum(np.arange(length.max()), n - 1) for n in length]
    return _batch([_cut(recording, rows) for recording, rows in zip(recordings, padded, strict=True)]), length


def _cut(recording: Recording, rows: slice | np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return recording.image[rows], recording.action[rows], recording.reward[rows]


def _batch(columns: list[tuple[np.ndarray, np.ndarray, np.ndarray]]) -> Batch:
    image, action, reward = (torch.as_tensor(np.stack(x, axis=1)) for x in zip(*columns, strict=True))
    nothing = torch.zeros(reward.shape, dtype=torch.bool)
    is_first = nothing.clone()
    is_first[0] = True
    return Batch(image, action, reward, is_first, nothing)


# ---------------------------------------------------------------------------------------------- in a run


def eval_options(config: Config) -> dict[str, Any]:
    """The keywords of `make_env` for the evaluation's environment: its episodes may be longer or shorter."""
    return env_options(config) | {"episode_steps": config.eval_steps or config.episode_steps, "seed": EVAL_SEED}


def open_envs(config: Config, make_env: MakeEnv) -> Envs:
    """The environments of evaluations: in workers where there are several, as those of training."""
    build = functools.partial(make_env, **eval_options(config))
    return make_vector_env([build] * min(config.num_envs, config.eval_episodes), EvalEnv)


class Evaluator:
    """Evaluates a run's agent, films it, and keeps the policy of the best evaluation.

    Nothing here changes what training does.

    Args:
        config, agent: of the run.
        make_env: builds the evaluation environments at the first evaluation; they live as long as the run.
        run_dir: where policy.pt goes.
        logger, watch, stop, bar: told, or asked, in between.
    """

    def __init__(
        self,
        config: Config,
        agent: Dreamer,
        make_env: MakeEnv,
        run_dir: Path,
        logger: Logger,
        watch: Stopwatch,
        stop: StopSignals,
        bar: ProgressBar,
    ):
        self.config, self.agent, self.run_dir = config, agent, run_dir
        self.open = functools.partial(open_envs, config, make_env)
        self.logger, self.watch, self.stop, self.bar = logger, watch, stop, bar
        self.envs: Envs | None = None
        self.started, self.seconds = time.monotonic(), 0.0  # of this process; those that its evaluations took
        self.evaluated = self.filmed = 0  # control steps
        self.best, self.best_step = -math.inf, -1  # mean return and control step of the best evaluation
        self.best_success = 0.0
        self.incomplete = 0  # evaluations in which the environment could not play all episodes
        self.unwritten: bytes | None = None  # policy.pt of the best evaluation
        self.figures: dict[str, float] = {}  # of that evaluation

    def due(self, step: int) -> bool:
        """Whether an evaluation is due at this control step."""
        return self.agent.updates > 0 and (step >= self.config.steps or step - self.evaluated >= self.config.eval_every)

    def evaluate(self, step: int) -> None:
        """Evaluate, log what that gives, film if that is due, and keep the best policy."""
        c, last = self.config, step >= self.config.steps
        film = last or step - self.filmed >= c.video_every or self.filmed == 0
        episodes = c.eval_episodes * (LAST_EVALUATION if last else 1)
        began = time.monotonic()
        with self.watch("eval"):
            result = self._play(episodes, film)
            if result.episodes:
                self._log(step, result, film)
            self._compare(step, result)
        self.evaluated = step
        now = time.monotonic()
        self.seconds += now - began
        share = self.seconds / (now - self.started)
        say(f"step {step}: the evaluation took {now - began:.0f} s; evaluations are {share:.0%} of the time so far")
        self.bar.show("train")

    def _play(self, episodes: int, film: bool) -> Evaluation:
        def each_step(episode: int) -> None:
            self.bar.show("evaluate", f"episode {episode + 1}/{episodes}")
            self.stop.check()

        try:
            self.envs = self.envs or self._open()
            repeat, device = self.config.action_repeat, self.agent.device
            return Player(self.agent.act, self.envs, repeat, device, each_step=each_step).play(episodes, film)
        except BrokenEnv as error:
            self.close(broken=True)
            self.stop.check()  # the signal that ends the run may have ended a worker first
            warn(f"the evaluation failed: {error}")
            return Evaluation([], [], failed=episodes)

    def _open(self) -> Envs:
        try:
            return self.open()
        except FAULTS as error:
            raise BrokenEnv(f"its environment can't be built: {describe_error(error)}") from error

    def _log(self, step: int, result: Evaluation, film: bool) -> None:
        summary = result.summary()
        draws = Draws(torch.Generator(self.agent.device).manual_seed(EVAL_SEED))
        analysis = analyse(self.agent, result.recordings, draws)
        self.logger.scalars(step, summary | analysis.metrics)
        self.best_success = max(self.best_success, summary["eval/success_rate"])
        figures = {"best_success_rate": self.best_success, "last_success_rate": summary["eval/success_rate"]}
        self.logger.summary(figures)
        say(f"step {step}: {describe(summary)}")
        if film and result.filmed:
            self.bar.show("evaluate", "videos")
            self.watch.seconds["video"] += result.render_seconds
            with self.watch("video"):
                self._film(step, result.filmed, analysis, draws)
            self.filmed = step

    def _compare(self, step: int, result: Evaluation) -> None:
        """Keep the policy if this is the best evaluation. An incomplete one does not compete."""
        if result.failed:
            self.incomplete += 1
            what = f"{result.failed} episode(s) failed {TRIES} times"
            warn(f"the evaluation at step {step} is incomplete, so its policy can't be the best: {what}")
            return
        # The last evaluation is longer; it competes with the others over their episodes.
        mean = Evaluation(result.episodes[: self.config.eval_episodes], []).summary()["eval/return_mean"]
        if mean > self.best:
            self.best, self.best_step = mean, step
            self.figures = {"env_step": step, **result.summary()}
            self.unwritten = policy_file(self.agent.policy, self.config, **self.figures)

    def write_policy(self) -> None:
        """Write the best evaluation's policy, unless that is done. If the disk refuses it, a later call tries again."""
        if self.unwritten:
            path = self.run_dir / "policy.pt"
            try:
                write_file(path, self.unwritten)
            except OSError as error:
                self.logger.warn("policy.pt can't be written", str(error))
                return
            self.unwritten = None
            self.logger.policy(path, self.figures)

    def close(self, broken: bool = False) -> None:
        """Close the evaluation environments; a later evaluation builds new ones."""
        envs, self.envs = self.envs, None
        if envs is not None:
            close_envs(envs, broken)

    def state_dict(self) -> dict[str, Any]:
        """What was evaluated, and by which evaluations."""
        names = ("evaluated", "filmed", "best", "best_step", "best_success", "incomplete")
        return {name: getattr(self, name) for name in names} | {"kind": self._kind()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on; with evaluations of another kind, the search for the best policy starts anew."""
        for name, value in state.items():
            if name != "kind":
                setattr(self, name, value)
        if state["kind"] != self._kind():
            say("evaluations can't be compared with those before: the next one's policy is the best so far")
            self.best, self.best_step = -math.inf, -1

    def _kind(self) -> dict[str, Any]:
        return eval_options(self.config) | {"eval_action": self.config.eval_action}

    def _film(self, step: int, recording: Recording, analysis: Analysis, draws: Draws) -> None:
        """The three videos: an episode, the model's open-loop prediction, and what the policy imagines."""
        c, fps = self.config, self.config.control_freq / self.config.action_repeat
        self._video(step, "eval", recording.video(c.action_repeat), fps)
        windows = Batch(*(x[:, :SEQUENCES] for x in analysis.windows))
        truth, model = windows.image.float() / 255, analysis.prediction.image[:, :SEQUENCES]
        frames = open_loop_video(truth.cpu().numpy(), model.float().cpu().numpy(), c.cameras, CONTEXT)
        self._video(step, "openloop", frames, fps)
        dream = self.agent.dream(Batch(*(x[:CONTEXT] for x in windows)), DREAM_STEPS, draws)
        image, reward = dream.image.float().cpu().numpy(), dream.reward.cpu().numpy() / c.action_repeat
        self._video(step, "dream", dream_video(truth[:CONTEXT].cpu().numpy(), image, reward, c.cameras, c.horizon), fps)

    def _video(self, step: int, name: str, frames: np.ndarray, fps: float) -> None:
        self.stop.check()
        self.logger.video(step, name, frames, fps)


# ---------------------------------------------------------------------------------------------- --eval


def evaluate_policy(path: Path, given: dict[str, Any], make_env: MakeEnv) -> None:
    """Evaluate a run folder's best policy, or a policy file, on episodes of its own, and film the first.

    `given` are the flags that were given. Failure if episodes could not be played.
    """
    file = _find_policy(path)
    policy, config = load_policy(file)
    check_fits_policy(given, config)
    config = dataclasses.replace(config, **{"eval_episodes": EVAL_EPISODES, **given})
    check_config(config)
    policy.eval_action = config.eval_action
    device = pick_device(given.get("device", "auto"))
    fast.speed_up(policy.to(device))
    with build_errors():
        envs = open_envs(config, make_env)
    whole = False
    try:
        player = Player(policy, envs, config.action_repeat, device, seed=OWN_SEED)
        result = player.play(config.eval_episodes, film=True)
        whole = True
    except BrokenEnv as error:
        raise Failure(f"the evaluation failed: {error}") from error
    finally:
        close_envs(envs, broken=not whole)
    if not result.episodes:
        raise Failure("the evaluation failed: no episode could be played")
    say(describe(result.summary()))
    if result.filmed:
        try:
            frames = result.filmed.video(config.action_repeat)
            write_video(file.with_suffix(".mp4"), frames, config.control_freq / config.action_repeat)
            say(f"video {file.with_suffix('.mp4')}")
        except VideoError as error:
            warn(f"no video: {error}")
    if result.failed:
        raise Failure(f"the evaluation is incomplete: {result.failed} episode(s) failed {TRIES} times")


def _find_policy(path: Path) -> Path:
    try:
        file = path / "policy.pt" if path.is_dir() else path
        there = file.exists()
    except OSError as error:
        raise UserError(f"--eval {path}: {error.strerror}") from error
    if not there:
        what = "policy.pt in it" if path.is_dir() else "such run or policy"
        raise UserError(f"--eval {path}: there is no {what}")
    return file
