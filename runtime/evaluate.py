"""Evaluation: episodes of the deterministic policy, what model and critic make of them, and the best policy so far."""

import dataclasses
import functools
import math
import os
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

import fast
from buffer import Batch
from networks import Draws
from runtime.checkpoint import load_policy, policy_file, write_file
from runtime.cli import check_config, check_fits_policy, env_options
from runtime.collect import EpisodeStats
from runtime.console import Failure, ProgressBar, StopSignals, UserError, say, warn, warn_once
from runtime.device import pick_device
from runtime.envs import (
    FAULTS,
    BrokenEnv,
    Envs,
    MakeEnv,
    build_errors,
    check_spaces,
    close_envs,
    dead_workers,
    describe_error,
    faults,
    make_vector_env,
)
from runtime.logger import Logger, Stopwatch
from runtime.predict import CONTEXT, Prediction, dream, judge, open_loop
from runtime.video import VideoError, dream_video, open_loop_video, policy_video, write_video
from train import ActState, Config, Dreamer

Act = Callable[..., tuple[Tensor, ActState]]

EVAL_SEED = 1_000_000  # of the evaluation env; its episodes are the same in every evaluation
OWN_SEED = 2_000_000  # of `--eval`, whose episodes no evaluation of training has played
EVAL_EPISODES = 20  # with --eval
EVAL_ENVS = 2  # at once, where environments have cores of their own; each takes 0.8 GB
LAST_EVALUATION = 2  # the last evaluation of a run has this many times eval_episodes
EARLY = 4  # evaluations in `eval_every` once training episodes succeed, until all episodes of one do
TRIES, OTHER_SEED = 3, 1_000  # an episode that fails is played again that often, its seed moved by so much
DREAM_STEPS = 45  # imagined in the video of the policy's dreams
OPEN_LOOP_STEPS = (1, 5, 15, 45)  # imagined agent steps after which the open-loop error is logged
OPEN_LOOP_WINDOWS = 24  # sequences that the open-loop errors are means of, at most
RECORDINGS = 6  # evaluation episodes whose rows are kept for figures and pictures
SEQUENCES = 6  # columns of the open-loop and the imagination videos
THIRDS = ("low", "middle", "high")  # of the largest reward so far: in Lift, far from the cube, at it, lifting it


class Row(NamedTuple):
    """An agent step and what it led to, as in the replay (buffer.py); an episode's first row is its reset."""

    image: np.ndarray  # (C, H, W) uint8
    action: np.ndarray  # (A,)
    reward: np.float32
    success: bool


@dataclasses.dataclass(eq=False)
class Episode(EpisodeStats):
    """An evaluation episode: its figures, its rows, and a frame for each row if it is filmed."""

    number: int = 0
    attempt: int = 0  # failed ones before this one
    seed: int = 0  # of the environment's draws
    rows: list[Row] = dataclasses.field(default_factory=list)
    renders: list[np.ndarray] = dataclasses.field(default_factory=list)  # (h, w, 3) uint8
    terminal: bool = False  # the task ended it, not the clock

    def again(self) -> "Episode":
        """The same episode, to be played once more with other draws."""
        return Episode(self.repeat, number=self.number, attempt=self.attempt + 1, seed=self.seed + OTHER_SEED)

    def video(self) -> np.ndarray:
        """The frames of a filmed episode."""
        images, _, rewards, successes = map(np.stack, zip(*self.rows, strict=True))
        return policy_video(np.stack(self.renders), images, rewards, successes, self.repeat)


def filmed(episodes: Sequence[Episode]) -> Episode | None:
    """The episode that was filmed, if one was."""
    return next((episode for episode in episodes if episode.rows and episode.renders), None)


def summarize(episodes: Sequence[EpisodeStats]) -> dict[str, float]:
    """Mean and spread of each figure over the episodes (time to success: over those with success)."""
    figures = [episode.metrics() for episode in episodes]
    summary: dict[str, float] = {
        "eval/success_rate": float(np.mean([x["success"] for x in figures])),
        "eval/episodes": len(figures),
    }
    for name in ("return", "length", "max_reward", "time_to_success"):
        if values := [x[name] for x in figures if name in x]:
            summary |= {f"eval/{name}_mean": float(np.mean(values)), f"eval/{name}_std": float(np.std(values))}
    return summary


def describe(summary: dict[str, float]) -> str:
    """An evaluation in one line."""
    return (
        f"evaluation return {summary['eval/return_mean']:.1f} +- {summary['eval/return_std']:.1f}, "
        f"success {summary['eval/success_rate']:.0%} of {summary['eval/episodes']} episodes"
    )


def play_episodes(
    act: Act,
    envs: Envs,
    config: Config,
    device: torch.device,
    episodes: int,
    film: bool,
    seed: int = EVAL_SEED,
    watch: Stopwatch | None = None,
    each_step: Callable[[int], None] = lambda _: None,
) -> list[Episode]:
    """Play episodes of the deterministic policy with fixed seeds, as many at once as there are environments.

    An episode's seed is `seed` plus its number, so the environment's draws are the same however many run at once. The
    policy's own draws are made for all running episodes together. `act` is `Policy.forward` or `Dreamer.act`;
    `each_step` gets the lowest number of a running episode, and may raise to stop.

    Gives the episodes that could be played, by number, the first ones with their rows; `film` films the first one.
    Raises BrokenEnv if an environment can't be mended, or its process has ended.
    """
    draws, watch = Draws(torch.Generator(device).manual_seed(seed)), watch or Stopwatch()
    limit = episode_length(config)  # for episodes that their environment does not end
    nothing = np.zeros(envs.single_action_space.shape or (), np.float32)
    waiting = (Episode(config.action_repeat, number=n, seed=seed + n) for n in range(episodes))
    running = [next(waiting, None) for _ in range(envs.num_envs)]  # None rests until the others end
    done: list[Episode] = []
    state: ActState | None = None

    def add(i: int, episode: Episode, action: np.ndarray, reward: float, success: bool) -> None:
        nonlocal film
        episode.rows.append(Row(image[i].copy(), action, np.float32(reward), success))
        if film and i == 0:  # the first environment, until it has played an episode
            with watch("video"):
                film = _add_frame(envs, episode)

    with dead_workers(envs):
        while any(running):
            first = np.array([episode is not None and not episode.rows for episode in running])
            if first.any():
                seeds = [episode.seed if episode else None for episode in running]
                image, info = envs.reset(seed=seeds, options={"reset_mask": first.copy()})
                failed = faults(envs, info)
                for i, episode in enumerate(running):
                    if episode is None or not first[i]:
                        continue
                    if failed[i]:
                        warn(f"a reset of the evaluation failed and was drawn anew: {info['env_error'][i]}")
                    add(i, episode, nothing, 0.0, False)
            each_step(min(episode.number for episode in running if episode))
            images, is_first = (torch.as_tensor(x, device=device) for x in (image, first))
            chosen, state = act(images, None if first.all() else state, is_first, draws, deterministic=True)
            action = chosen.float().cpu().numpy()
            image, reward, terminated, truncated, info = envs.step(action)
            failed, success = faults(envs, info), info.get("success", np.zeros(len(action), bool))
            for i, episode in enumerate(running):
                if episode is None:
                    continue
                if failed[i]:
                    warn(f"an episode of the evaluation failed and is played with other draws: {info['env_error'][i]}")
                    again = episode.again()
                    running[i] = again if again.attempt < TRIES else next(waiting, None)
                    continue
                episode.add(float(reward[i]), bool(success[i]))
                add(i, episode, action[i], reward[i], bool(success[i]))
                if terminated[i] or truncated[i] or episode.length >= limit:
                    episode.terminal = bool(terminated[i])
                    film = film and not episode.renders
                    done = sorted([*done, episode], key=lambda x: x.number)
                    for later in done[RECORDINGS:]:
                        later.rows.clear()
                    running[i] = next(waiting, None)
    return done


def _add_frame(envs: Envs, episode: Episode) -> bool:
    """Add the first environment's frame to its episode. False, and a line, if that can't be had."""
    frame = envs.call("frame", episode.seed)[0]
    if isinstance(frame, np.ndarray):
        if not episode.renders or frame.shape == episode.renders[0].shape:
            episode.renders.append(frame)
            return True
        frame = f"a frame of {frame.shape} after one of {episode.renders[0].shape}"
    warn_once(str(frame), f"evaluations are not filmed: {frame}")
    episode.renders.clear()
    return False


class Analysis(NamedTuple):
    """How model and critic see evaluation episodes, which training never saw."""

    metrics: dict[str, float]
    windows: Batch  # (T, B, ...), T at most 50
    prediction: Prediction  # of these windows, open loop


def analyze(agent: Dreamer, recordings: Sequence[Episode], draws: Draws, largest: float) -> Analysis:
    """Open-loop errors, reward errors and value calibration; changes nothing in the agent.

    `largest` is the largest reward of an agent step so far; errors are told for each third of it.
    """
    windows = open_loop_windows(recordings).to(agent.device)
    prediction = open_loop(agent, windows, draws)
    episodes = whole_episodes(recordings).to(agent.device)
    reward, value = judge(agent, episodes, draws)
    learned = agent.world_model.learned_reward(episodes.reward)
    columns = [x.float().cpu().numpy() for x in (reward, value, learned, episodes.reward)]
    judged = [np.stack([x[: len(recording.rows), b] for x in columns]) for b, recording in enumerate(recordings)]
    metrics = _open_loop_errors(agent, windows, prediction)
    metrics |= _reward_errors(np.concatenate(judged, axis=1), largest)
    metrics |= _value_errors(agent.config, recordings, judged)
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


def _reward_errors(judged: np.ndarray, largest: float) -> dict[str, float]:
    """Mean error of the reward that is read from a state; predicted, value, learned and true (4, rows)."""
    predicted, _, learned, true = judged
    error = np.abs(predicted - learned)
    metrics = {"reward/error": float(error.mean())}
    third = np.digitize(true, [largest / 3, 2 * largest / 3])
    for i, name in enumerate(THIRDS):
        if largest > 0 and (third == i).any():
            metrics[f"reward/error_{name}"] = float(error[third == i].mean())
    return metrics


def _value_errors(config: Config, recordings: Sequence[Episode], judged: Sequence[np.ndarray]) -> dict[str, float]:
    """The critic's values against the returns that followed; arrays as above, one for each recording."""
    known = []
    for recording, (_, value, learned, _) in zip(recordings, judged, strict=True):
        returns = realized_return(learned, value[-1], recording.terminal, config.discount)
        rows = len(value) if recording.terminal else len(value) - 1  # what followed the last row is unknown
        known.append(np.stack([value, returns])[:, :rows])
    predicted, realized = np.concatenate(known, axis=1)
    return {
        "behavior/value_predicted": float(predicted.mean()),
        "behavior/value_realized": float(realized.mean()),
        "behavior/value_error": float(np.abs(predicted - realized).mean()),
    }


def realized_return(reward: np.ndarray, last_value: float, terminal: bool, discount: float) -> np.ndarray:
    """The discounted return from each row on, the row's own reward included: (n + 1,) -> (n + 1,).

    If the clock ended the episode, the critic's value of the last row stands for what would have followed.
    """
    returns = np.empty(len(reward))
    returns[-1] = reward[-1] if terminal else last_value
    for t in reversed(range(len(reward) - 1)):
        returns[t] = reward[t] + discount * returns[t + 1]
    return returns


def open_loop_windows(recordings: Sequence[Episode]) -> Batch:
    """Windows (T, B, ...) of 50 rows, or as many as half of the episodes have: the first of each, then the second."""
    lengths = [len(recording.rows) for recording in recordings]
    length = min(CONTEXT + max(OPEN_LOOP_STEPS), statistics.median_high(lengths))
    windows = [x.rows[start : start + length] for start in range(0, max(lengths), length) for x in recordings]
    return _batch([window for window in windows if len(window) == length][:OPEN_LOOP_WINDOWS])


def whole_episodes(recordings: Sequence[Episode]) -> Batch:
    """All rows of each episode as (T, B, ...), the shorter ones padded with their last row."""
    longest = max(len(recording.rows) for recording in recordings)
    return _batch([x.rows + x.rows[-1:] * (longest - len(x.rows)) for x in recordings])


def _batch(columns: Sequence[Sequence[Row]]) -> Batch:
    """Equally many rows of several episodes, side by side."""
    image, action, reward = (
        torch.as_tensor(np.stack([[getattr(row, name) for row in rows] for rows in zip(*columns, strict=True)]))
        for name in ("image", "action", "reward")
    )
    is_first = torch.zeros(reward.shape, dtype=torch.bool)
    is_first[0] = True
    return Batch(image, action, reward, is_first, torch.zeros_like(is_first))


def eval_options(config: Config) -> dict[str, Any]:
    """The keywords of `make_env` for the evaluation's environment: its episodes may be longer or shorter."""
    return env_options(config) | {"episode_steps": episode_length(config), "seed": EVAL_SEED}


def episode_length(config: Config) -> int:
    """Control steps of an evaluation episode, at most."""
    return config.eval_steps or config.episode_steps


def open_envs(config: Config, make_env: MakeEnv, apart: bool = False) -> Envs:
    """The environments of evaluations: `num_envs` of them, or EVAL_ENVS if they are to be `apart` and that is more.

    UserError if their images or actions are not those of training.
    """
    build = functools.partial(make_env, **eval_options(config))
    wanted = max(config.num_envs, EVAL_ENVS if apart else 1)
    envs = make_vector_env([build] * min(wanted, config.eval_episodes), apart)
    try:
        check_spaces(envs, config.task, len(config.cameras), config.image_size)
    except (UserError, Failure):
        close_envs(envs)
        raise
    return envs


class Evaluator:
    """Evaluates a run's averaged policy, films it, and keeps that of the best evaluation.

    Nothing here changes what training does. `make_env` builds the environments at the first evaluation; they live as
    long as the run. If `apart`, they have cores of their own.
    """

    SAVED = ("evaluated", "filmed", "largest", "best", "best_step", "best_success", "incomplete", "unwritten")

    def __init__(
        self,
        config: Config,
        agent: Dreamer,
        make_env: MakeEnv,
        logger: Logger,
        watch: Stopwatch,
        stop: StopSignals,
        bar: ProgressBar,
        apart: bool = False,
    ):
        self.config, self.agent, self.make_env, self.apart = config, agent, make_env, apart
        self.logger, self.watch, self.stop, self.bar = logger, watch, stop, bar
        self.envs: Envs | None = None
        self.started, self.seconds = time.monotonic(), 0.0  # of this process; those that its evaluations took
        self.evaluated = self.filmed = 0  # control steps
        self.largest = 0.0  # reward of an agent step, of all evaluations
        self.best, self.best_step = -math.inf, -1  # mean return and control step of the best evaluation
        self.best_success = 0.0
        self.incomplete = 0  # evaluations in which the environment could not play all episodes
        self.unwritten: tuple[bytes, dict[str, float]] | None = None  # policy.pt of the best evaluation, its figures

    def due(self, step: int, solved: bool = False) -> bool:
        """Whether an evaluation is due at this control step.

        One is due after `eval_every` and at the end. While the last ten training episodes have all succeeded (`solved`)
        and no evaluation has had success in all of its episodes, a quarter of `eval_every` is enough.
        """
        if self.agent.updates == 0:
            return False
        hurry = EARLY if solved and self.best_success < 1 else 1
        return step >= self.config.steps or step - self.evaluated >= self.config.eval_every / hurry

    def evaluate(self, step: int) -> None:
        """Evaluate, log what that gives, film if that is due, and keep the best policy."""
        c, last = self.config, step >= self.config.steps
        film = last or step - self.filmed >= c.video_every or self.filmed == 0
        began = time.monotonic()
        wanted = c.eval_episodes * (LAST_EVALUATION if last else 1)
        with self.watch("eval"):
            played = self._play(wanted, film)
            summary = summarize(played) if played else {}
            complete = len(played) == wanted
            if complete:
                self._compare(step, played, summary)
            if played:
                self._log(step, played, summary | {"eval/best": float(self.best_step == step)}, film)
            if not complete:
                self.incomplete += 1
                what = f"{wanted - len(played)} of {wanted} episodes could not be played"
                warn(f"the evaluation at step {step} is incomplete, so its policy can't be the best: {what}")
        self.evaluated = step
        now = time.monotonic()
        self.seconds += now - began
        share = self.seconds / (now - self.started)
        say(f"step {step}: the evaluation took {now - began:.0f} s; evaluations are {share:.0%} of the time so far")
        self.bar.show("train")

    def _play(self, episodes: int, film: bool) -> list[Episode]:
        def each_step(episode: int) -> None:
            self.bar.show("evaluate", f"episode {episode + 1}/{episodes}")
            self.stop.check()

        try:
            self.envs = self.envs or self._open()
            act, device = functools.partial(self.agent.act, policy=self.agent.averaged), self.agent.device
            return play_episodes(act, self.envs, self.config, device, episodes, film, EVAL_SEED, self.watch, each_step)
        except BrokenEnv as error:
            self.close()
            self.stop.check()  # the signal that ends the run may have ended a worker first
            warn(f"the evaluation failed: {error}")
            return []

    def _open(self) -> Envs:
        try:
            return open_envs(self.config, self.make_env, self.apart)
        except FAULTS as error:
            raise BrokenEnv(f"its environment can't be built: {describe_error(error)}") from error

    def _log(self, step: int, played: Sequence[Episode], summary: dict[str, float], film: bool) -> None:
        draws = Draws(torch.Generator(self.agent.device).manual_seed(EVAL_SEED))
        recordings = [episode for episode in played if episode.rows]
        self.largest = max(self.largest, *(float(row.reward) for episode in recordings for row in episode.rows))
        analysis = analyze(self.agent, recordings, draws, self.largest)
        self.logger.scalars(step, summary | analysis.metrics)
        figures = {"best_success_rate": self.best_success, "last_success_rate": summary["eval/success_rate"]}
        self.logger.summary(figures)
        say(f"step {step} of {self.config.steps}: {describe(summary)}")
        if film:
            self.bar.show("evaluate", "videos")
            with self.watch("video"):
                self._film(step, filmed(played), analysis, draws)
            self.filmed = step

    def _compare(self, step: int, played: Sequence[Episode], summary: dict[str, float]) -> None:
        """Keep the policy if this is the best evaluation."""
        # The last evaluation is longer; it competes with the others over their episodes.
        self.best_success = max(self.best_success, summary["eval/success_rate"])
        mean = float(np.mean([episode.total for episode in played[: self.config.eval_episodes]]))
        if mean > self.best:
            self.best, self.best_step = mean, step
            figures = {"env_step": step, **summary}
            self.unwritten = policy_file(self.agent.averaged, self.config, **figures), figures

    def write_policy(self) -> None:
        """Write the best evaluation's policy, unless that is done. If the disk refuses it, a later call tries again."""
        if self.unwritten:
            path, (data, figures) = self.logger.run_dir / "policy.pt", self.unwritten
            try:
                write_file(path, data)
            except OSError as error:
                warn_once("policy", f"policy.pt can't be written, training goes on: {error}")
                return
            self.unwritten = None
            self.logger.policy(path, figures)

    def close(self) -> None:
        """Close the evaluation environments; a later evaluation builds new ones."""
        if self.envs is not None:
            close_envs(self.envs)
        self.envs = None

    def state_dict(self) -> dict[str, Any]:
        """What was evaluated, by which evaluations, and a policy that the disk has not taken yet."""
        return {name: getattr(self, name) for name in self.SAVED} | {"kind": self._kind()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on; with evaluations of another kind, the search for the best policy starts anew."""
        for name in self.SAVED:
            setattr(self, name, state[name])
        if state["kind"] != self._kind():
            say("evaluations can't be compared with those before: the next one's policy is the best so far")
            self._keep_best()
            self.best, self.best_step = -math.inf, -1
            self.best_success = self.largest = 0.0

    def _keep_best(self) -> None:
        """Leave the best policy beside the ones that come, under a name of its own (OSError)."""
        kept = self.logger.run_dir / f"policy_{self.best_step:09d}.pt"
        if self.best_step >= 0 and not kept.exists():  # an earlier start, which was killed, may have kept it
            try:
                write_file(kept, self.unwritten[0] if self.unwritten else kept.with_name("policy.pt").read_bytes())
                say(f"{kept} keeps the best one until now")
            except FileNotFoundError:  # any other error ends the start: what is not kept now would be overwritten
                warn(f"the best one until now can't be kept as {kept}: there is no policy.pt")
        self.unwritten = None

    def _kind(self) -> dict[str, Any]:
        c = self.config
        return eval_options(c) | {"eval_action": c.eval_action, "eval_episodes": c.eval_episodes}

    def _film(self, step: int, episode: Episode | None, analysis: Analysis, draws: Draws) -> None:
        """The videos: an episode if it has frames, the model's open-loop prediction, and what the policy imagines."""
        c = self.config
        if episode:
            self._video(step, "eval", episode.video())
        windows = Batch(*(x[:, :SEQUENCES] for x in analysis.windows))
        truth = (windows.image.float() / 255).cpu().numpy()
        model = analysis.prediction.image[:, :SEQUENCES].float().cpu().numpy()
        self._video(step, "openloop", open_loop_video(truth, model, c.cameras, CONTEXT))
        dreamed = dream(self.agent, Batch(*(x[:CONTEXT] for x in windows)), DREAM_STEPS, draws)
        image = dreamed.image.float().cpu().numpy()
        reward = dreamed.reward * self.agent.world_model.reward_size() / c.action_repeat  # of a control step
        self._video(step, "dream", dream_video(truth[:CONTEXT], image, reward.cpu().numpy(), c.cameras, c.horizon))

    def _video(self, step: int, name: str, frames: np.ndarray) -> None:
        self.stop.check()
        self.logger.video(step, name, frames, self.config.control_freq / self.config.action_repeat)


def check_complete(incomplete: int) -> None:
    """Failure if a run had incomplete evaluations."""
    if incomplete:
        raise Failure(f"{incomplete} evaluation(s) were incomplete: see the warnings about them")


def write_left_policy(run_dir: Path, state: dict[str, Any]) -> None:
    """Write the policy that the disk refused when a run finished, if it did; Failure if it still does."""
    if state["unwritten"]:
        try:
            write_file(run_dir / "policy.pt", state["unwritten"][0])
        except OSError as error:
            raise Failure(f"{run_dir / 'policy.pt'} can't be written: {error}") from error
        say(f"{run_dir / 'policy.pt'} could not be written then: it is now")


def evaluate_policy(path: Path, given: dict[str, Any], make_env: MakeEnv) -> None:
    """Evaluate a run folder's best policy, or a policy file, on episodes of its own, and film the first.

    `given` are the flags that were given. Failure if episodes could not be played.
    """
    file = path / "policy.pt" if os.path.isdir(path) else path  # unlike path.is_dir, it raises nothing
    policy, config = load_policy(file)
    check_fits_policy(given, config)
    config = dataclasses.replace(config, **{"eval_episodes": EVAL_EPISODES, "num_envs": 1, **given})
    check_config(config)
    policy.eval_action = config.eval_action
    device = pick_device(given.get("device", "auto"))
    fast.speed_up(policy.to(device))
    with build_errors():
        envs = open_envs(config, make_env)
    try:
        played = play_episodes(policy, envs, config, device, config.eval_episodes, film=True, seed=OWN_SEED)
    except BrokenEnv as error:
        raise Failure(f"the evaluation failed: {error}") from error
    finally:
        close_envs(envs)
    if not played:
        raise Failure("the evaluation failed: no episode could be played")
    say(describe(summarize(played)))
    if episode := filmed(played):
        video = file.with_suffix(".mp4")
        try:
            write_video(video, episode.video(), config.control_freq / config.action_repeat)
            say(f"video {video}")
        except VideoError as error:
            warn(f"no video: {error}")
    if failed := config.eval_episodes - len(played):
        raise Failure(f"the evaluation is incomplete: {failed} episode(s) failed {TRIES} times")
