"""Collection: exploration by held actions, the ratio of updates to steps, and the collector that fills the replay."""

import contextlib
import dataclasses
import math
import statistics
from collections import deque
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from gymnasium import Space
from gymnasium.vector import AsyncVectorEnv

from buffer import ReplayBuffer, Transition, moved
from networks import Draws
from runtime.checkpoint import check_finite, plain
from runtime.console import StopSignals, warn, warn_once
from runtime.envs import BrokenEnv, EnvFailure, Envs, dead_workers, faults, own_seed
from runtime.learn import BesideSteps
from runtime.logger import Stopwatch
from train import ActState, Config, Dreamer

LAST = 10  # episodes whose success and largest rewards decide how much is explored
RISE, STALLED = 0.1, 20  # largest rewards that have not risen by this share for so many episodes have stalled
LARGE_REWARD = 10  # a control step; the presets are made for at most 1
RECENT = 20  # episodes, or four of each environment if that is more; a run ends when half of them have failed


class HeldActions:
    """Exploration that now and then holds a random command for several steps (Dabney et al. 2021, arXiv 2006.01782).

    Noise that is drawn anew in every step averages out: it leaves the fingers half open, since only the sign of their
    command counts and they need 0.4 s, and it takes the hand nowhere. Once the policy comes no further (`Progress`), a
    `share` of its episodes is disturbed, less if the task is often solved. In a third of these, the gripper is held at
    random times. In the others, the hand goes straight on once: one of the first `moves` actions is at its bound and
    all others are 0 but the gripper's, which stays the policy's, or the hand would drop what it carries. That begins
    where the policy has come about as far as it can (as in Go-Explore, Ecoffet et al. 2021, arXiv 2004.12919): after a
    random step of the episode's middle half, once the reward is near the median of the last episodes' largest rewards.
    Where it solves the task, the hand then rests, with all of them 0: if it went on, it would let go of the open door,
    and a policy that has never opened it would shut it. Nothing else is held in an episode that is solved. The random
    actions before training have the gripper held all the time. When a run goes on, only the state of `rng` has to come
    back.

    Args:
        share: of the policy's episodes in this environment; with 0 nothing is held, before training either.
        gripper: whether the last action is a gripper's.
        moves: how many of the first actions move the hand.
        steps: agent steps in an episode.
    """

    GRIPPER_START, GRIPPER_STEPS = 0.1, (4, 13)  # chance of a step to begin a hold, and its agent steps
    MOVES = 2 / 3  # share of the disturbed episodes that have a move
    NEAR = 0.7  # of that median
    MOVE_STEPS, REST_STEPS = 30, 20  # Door opens after about 20; a can has to be carried for longer

    def __init__(self, share: float, rng: np.random.Generator, *, gripper: bool, moves: int, steps: int):
        self.share, self.rng, self.gripper, self.moves, self.steps = share, rng, gripper, moves, steps
        self.disturbed = self.grips = False  # the present episode; in that its gripper is held
        self.gripper_left, self.command = 0, 0.0
        self.done = self.earliest = self.move_at = self.move_to = 0  # steps of the episode
        self.waits, self.level = False, 0.0  # for this reward of a control step, to move
        self.axis = self.side = 0

    def begin(self, solved: float = 0.0, level: float = -math.inf) -> None:
        """An episode begins.

        `solved` is the share of the last ones that succeeded, `level` the median of their largest rewards of a control
        step.
        """
        if not self.share:
            return
        self.disturbed = self.rng.random() < self.share * (1 - solved)
        self.gripper_left = self.done = self.move_to = 0
        moves = self.disturbed and self.rng.random() < self.MOVES
        self.grips, self.waits = self.disturbed and not moves, moves and self.moves > 0
        if self.waits:
            self.earliest = self.rng.integers(self.steps // 4, 3 * self.steps // 4, endpoint=True)
            self.level = level - (1 - self.NEAR) * abs(level)
            self.axis, self.side = self.rng.integers(self.moves), self.rng.choice((-1, 1))

    def see(self, reward: float) -> None:
        """The reward of a control step after the last action: a move begins if it is due and this is near the best."""
        if self.waits and self.done >= self.earliest and reward >= self.level:
            self.waits, self.move_at, self.move_to = False, self.done, self.done + self.MOVE_STEPS

    def end(self) -> None:
        """The episode has solved its task: a move ends in a rest, and then the policy is alone."""
        if self.disturbed:
            was_moving = self.move_at < self.done <= self.move_to
            self.move_to = self.done + self.REST_STEPS if was_moving else 0
            self.disturbed = self.grips = self.waits = False
            self.side = self.gripper_left = 0

    def __call__(self, action: np.ndarray, is_random: bool) -> np.ndarray:
        """An action (A,) with the held commands in place of its own."""
        if not self.share:
            return action
        action = action.copy()
        if self.gripper:
            self._hold_gripper(action, is_random)
        if self.move_at <= self.done < self.move_to and not is_random:
            arm = action[: -1 if self.gripper else None]
            arm[:] = 0
            arm[self.axis] = self.side
        self.done += 1
        return action

    def _hold_gripper(self, action: np.ndarray, is_random: bool) -> None:
        free = self.gripper_left == 0
        if free and (is_random or (self.grips and self.rng.random() < self.GRIPPER_START)):
            self.gripper_left = self.rng.integers(*self.GRIPPER_STEPS, endpoint=True)
            self.command = self.rng.choice((-1.0, 1.0))
        if self.gripper_left:
            self.gripper_left -= 1
            action[-1] = self.command


@dataclasses.dataclass
class EpisodeStats:
    """Figures of one episode; times in control steps, `repeat` of which make an agent step."""

    repeat: int
    total: float = 0.0
    length: int = 0
    max_reward: float = -math.inf  # of a control step
    success_at: int = 0  # 0: not yet

    def add(self, reward: float, success: bool) -> None:
        """One agent step."""
        self.total += reward
        self.length += self.repeat
        self.max_reward = max(self.max_reward, reward / self.repeat)
        if success and not self.success_at:
            self.success_at = self.length

    def metrics(self) -> dict[str, float]:
        """Without `time_to_success` if there was none, and without `max_reward` if there was no step."""
        figures = {"return": self.total, "length": self.length, "success": float(self.success_at > 0)}
        figures |= {"max_reward": self.max_reward} if self.length else {}
        return figures | ({"time_to_success": self.success_at} if self.success_at else {})


class UpdateRatio:
    """How many updates are due: `pretrain` after the prefill, then one for each `train_every` agent steps."""

    def __init__(self, config: Config, replay: ReplayBuffer):
        self.config, self.replay = config, replay
        self.owed = 0.0  # agent steps that no update was made for yet
        self.pretrained = False

    @property
    def prefilled(self) -> bool:
        """Whether the replay holds `prefill` agent steps, or all that it can: short episodes have many reset rows."""
        return self.replay.steps >= self.config.prefill or self.replay.full

    def due(self) -> int:
        """Updates that are due after one more agent step in each environment."""
        c = self.config
        if not self.prefilled:
            return 0
        pretrain, new = 0, c.num_envs
        if not self.pretrained:
            self.pretrained, pretrain = True, c.pretrain
            new = max(0, self.replay.steps - c.prefill)  # those beyond the prefill
        self.owed += new
        due = int(self.owed / c.train_every + 1e-9)  # train_every may be a fraction such as 1.6
        self.owed -= due * c.train_every
        return pretrain + due

    def state_dict(self) -> dict[str, Any]:
        """The steps that are owed."""
        return {"owed": self.owed, "pretrained": self.pretrained}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state."""
        self.owed, self.pretrained = state["owed"], state["pretrained"]


class Progress:
    """Whether the policy still comes further: by the median of the last episodes' largest rewards of a control step."""

    def __init__(self) -> None:
        self.largest: deque[float] = deque(maxlen=LAST)
        self.highest = -math.inf  # median when it last rose
        self.stalled = 0  # episodes since then

    @property
    def level(self) -> float:
        """The median, or minus infinity before the first episode has ended."""
        return statistics.median(self.largest) if self.largest else -math.inf

    @property
    def has_stalled(self) -> bool:
        """Whether it has not risen by the share RISE in STALLED episodes."""
        return self.stalled >= STALLED

    def add(self, largest: float) -> None:
        """The largest reward of an episode that has ended."""
        self.largest.append(largest)
        self.stalled += 1
        if self.level - RISE * abs(self.level) > self.highest:
            self.highest, self.stalled = self.level, 0

    def state_dict(self) -> dict[str, Any]:
        """All of it."""
        return {"largest": list(self.largest), "highest": self.highest, "stalled": self.stalled}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state."""
        self.largest.extend(state["largest"])
        self.highest, self.stalled = state["highest"], state["stalled"]


class Acting:
    """Chooses actions: random ones until the first update, then the policy's, with draws of its own.

    It is the agent's policy or, if updates are made beside the steps, the copy of it that `beside` has. `actions` is
    the space of an environment's actions, whose generator the random ones are drawn from.
    """

    def __init__(self, agent: Dreamer, actions: Space[np.ndarray], seed: int, beside: BesideSteps | None):
        self.agent, self.actions, self.beside = agent, actions, beside
        self.newest = beside or agent
        self.generator = torch.Generator(agent.device).manual_seed(seed)
        self.draws = Draws(self.generator)  # updates may draw at the same time
        self.state: ActState | None = None

    @property
    def is_random(self) -> bool:
        """Whether no update has come yet."""
        return self.newest.updates == 0

    def choose(self, image: np.ndarray, resets: np.ndarray, greedy: np.ndarray) -> np.ndarray:
        """Actions (num_envs, A) for images (num_envs, C, H, W); episodes begin at `resets` (num_envs,).

        Those of episodes that are `greedy` (num_envs,) are deterministic.
        """
        if self.is_random:
            return np.stack([self.actions.sample() for _ in resets])
        # The policy takes over from random actions, or from nothing after a resume.
        is_first = np.ones_like(resets) if self.state is None else resets
        images, first, greedily = (moved(torch.as_tensor(x), self.agent.device) for x in (image, is_first, greedy))
        with self.beside.acting() if self.beside else contextlib.nullcontext():
            action, self.state = self.agent.act(images, self.state, first, self.draws, greedily, self.newest.policy)
        return action.float().cpu().numpy()

    def remember(self, action: np.ndarray) -> None:
        """Store the executed actions (num_envs, A), so that the policy's state matches the replay."""
        if self.state is not None:
            executed = torch.as_tensor(action, dtype=torch.float32)
            self.state = self.state._replace(action=moved(executed, self.agent.device))

    def check_finite(self, step: int) -> None:
        """Failure if the agent is why an action is not finite."""
        if self.beside:
            self.beside.wait()
        check_finite(self.agent, step)

    def state_dict(self) -> dict[str, Any]:
        """The state of its draws: no episode is running."""
        return {"device": self.agent.device.type, "draws": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Any], seed: int | None) -> None:
        """Go on from saved draws, unless a `seed` for others is given or the device was another."""
        if seed is not None:
            self.generator.manual_seed(seed)
        elif state["device"] == self.agent.device.type:
            self.generator.set_state(state["draws"])


class Collector:
    """Acts in the environments, one agent step at a time in all of them, and writes what happens into the replay.

    A round is `act` (begin episodes, choose actions, let the environments step), `observe` (take what they answer) and
    `finish_episodes`. Between the first two, workers step on their own. Each environment has a ring of its own in the
    replay.
    """

    def __init__(
        self,
        config: Config,
        envs: Envs,
        agent: Dreamer,
        replay: ReplayBuffer,
        watch: Stopwatch,
        stop: StopSignals,
        beside: BesideSteps | None = None,
    ):
        self.config, self.envs, self.agent, self.replay = config, envs, agent, replay
        self.watch, self.stop = watch, stop
        self.step = 0  # control steps so far
        self.episode = 0  # finished episodes
        envs.single_action_space.seed(own_seed(config.seed, 0, 1))
        self.rng = envs.single_action_space.np_random
        self.acting = Acting(agent, envs.single_action_space, own_seed(config.seed, 0, 3), beside)
        gripper, moves = bool(envs.metadata.get("gripper")), envs.metadata.get("moves", 0)
        share = config.held_actions if gripper or moves else 0.0
        steps = config.episode_steps // config.action_repeat
        self.resets = np.ones(config.num_envs, bool)
        self.held_actions = [
            HeldActions(share, self.rng, gripper=gripper, moves=moves, steps=steps) for _ in self.resets
        ]
        self.stats = [EpisodeStats(config.action_repeat) for _ in self.resets]
        self.failed = np.zeros(config.num_envs, bool)  # whether its last step failed, which ends the episode
        self.recent: deque[bool] = deque(maxlen=max(RECENT, 4 * config.num_envs))  # whether the last episodes failed
        self.last_fault = ""
        self.successes: deque[float] = deque(maxlen=LAST)
        self.progress = Progress()
        self.greedy = np.zeros(config.num_envs, bool)  # whether the present episode has deterministic actions
        self.limit = np.full(config.num_envs, config.episode_steps)  # control steps after which it ends
        self.last_return = 0.0
        self.image = np.zeros(0, np.uint8)
        self.action = np.zeros(0)

    def act(self) -> None:
        """Begin the episodes that are due, choose all actions, and let the environments start to step."""
        if self.resets.any():
            with self.watch("env"), self._env_failures():
                self.image, info = self.envs.reset(options={"reset_mask": self.resets.copy()})
                self._tell_faults(info)
            for i in np.flatnonzero(self.resets):
                self.replay.add(Transition(self.image[i], np.zeros(self.agent.action_size), 0.0, True, False), i)
                self.stats[i] = EpisodeStats(self.config.action_repeat)
                self._explore(i)
        with self.watch("update"):  # acting waits for the GPU's updates: the two can't be told apart
            self._choose_actions()
        if isinstance(self.envs, AsyncVectorEnv):
            with self.watch("env"), self._env_failures():
                self.envs.step_async(self.action)

    def observe(self) -> None:
        """Take what the environments answer. A row whose environment failed is not trained on."""
        with self.watch("env"), self._env_failures():
            envs = self.envs
            answer = envs.step_wait() if isinstance(envs, AsyncVectorEnv) else envs.step(self.action)
            self.image, reward, terminated, truncated, info = answer
            self.failed = self._tell_faults(info)
        success = info.get("success", np.zeros(len(reward), bool))
        for i in np.flatnonzero(~self.failed):
            self.replay.add(Transition(self.image[i], self.action[i], reward[i], False, terminated[i]), i)
            self.stats[i].add(float(reward[i]), bool(success[i]))
            self.held_actions[i].see(float(reward[i]) / self.config.action_repeat)
            if success[i]:
                self.held_actions[i].end()
        _warn_of_task(self.config, reward[~self.failed], terminated)
        self.step += self.config.num_envs * self.config.action_repeat
        lengths = np.array([stats.length for stats in self.stats])
        self.resets = terminated | truncated | (lengths >= self.limit)

    def finish_episodes(self) -> list[dict[str, float]]:
        """Figures of the episodes that have just ended."""
        ended = []
        for i in np.flatnonzero(self.resets):
            self.replay.finish(i, self.episode)
            self.episode += 1
            ended.append(self.stats[i].metrics())
            self.recent.append(bool(self.failed[i]))
            self.successes.append(ended[-1]["success"])
            self.progress.add(self.stats[i].max_reward)
            self.last_return = ended[-1]["return"]
        return ended

    @property
    def solved(self) -> float:
        """The share of the last ten episodes that succeeded, 0 at first."""
        return sum(self.successes) / LAST

    def describe_recent(self) -> str:
        """The last episodes for the progress bar: the return of the last one, the share with success."""
        return f"return {self.last_return:.3g}, success {np.mean(self.successes):.0%}" if self.successes else ""

    def check_faults(self) -> None:
        """Raise Failure if too many of the last episodes ended through a fault of the environment."""
        if 2 * sum(self.recent) >= (self.recent.maxlen or 0):
            share = f"{sum(self.recent)} of the last {len(self.recent)} episodes"
            raise EnvFailure(f"the environments failed in {share}, the last time with {self.last_fault}")

    def state_dict(self) -> dict[str, Any]:
        """Counters and generators: they decide all later episodes if none is running."""
        with self._env_failures():
            rngs = self.envs.get_attr("np_random")
        return {
            "step": self.step,
            "episode": self.episode,
            "successes": list(self.successes),
            "progress": self.progress.state_dict(),
            "restarts": 0,  # ends through a fault of the environments at this state: Checkpointer.save counts them
            "action_space": plain(self.rng.bit_generator.state),
            "envs": [plain(rng.bit_generator.state) for rng in rngs],
            "acting": self.acting.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state; after an end through the environments' fault, from other draws."""
        self.step, self.episode = state["step"], state["episode"]
        self.successes.extend(state["successes"])
        self.progress.load_state_dict(state["progress"])
        self.rng.bit_generator.state = _generator(state["action_space"], state["restarts"]).bit_generator.state
        generators = [_generator(saved, state["restarts"]) for saved in state["envs"]]
        if len(generators) != self.config.num_envs:
            warn(f"num_envs was {len(generators)}: the environments start from new seeds")
            seeds = self.rng.integers(2**32, size=self.config.num_envs)
            generators = [np.random.default_rng([*seeds, i, state["restarts"]]) for i in range(len(seeds))]
        with self._env_failures():
            self.envs.set_attr("np_random", generators)
        self.acting.load_state_dict(state["acting"], int(self.rng.integers(2**31)) if state["restarts"] else None)
        if state["restarts"]:
            warn("the run ended through a fault of its environments: their next episodes are drawn anew")

    def _explore(self, env: int) -> None:
        """Decide how much the episode that begins explores, and how long it is.

        The more often the task is solved, the more episodes are as those of evaluations: deterministic, and as long.
        """
        c = self.config
        chance = c.greedy_episodes * self.solved if not self.acting.is_random else 0.0
        self.greedy[env] = chance > 0 and self.rng.random() < chance
        self.limit[env] = (c.eval_steps if self.greedy[env] else 0) or c.episode_steps
        alone = self.greedy[env] or not self.progress.has_stalled  # while it still improves, it needs no help
        self.held_actions[env].begin(1.0 if alone else self.solved, self.progress.level)

    def _choose_actions(self) -> None:
        """Random actions or the policy's, with the commands that are held: (num_envs, A)."""
        wanted, is_random = self.acting.choose(self.image, self.resets, self.greedy), self.acting.is_random
        self.action = np.stack([hold(x, is_random) for hold, x in zip(self.held_actions, wanted, strict=True)])
        if not np.isfinite(self.action).all():
            self.acting.check_finite(self.step)
        self.acting.remember(self.action)

    def _tell_faults(self, info: dict[str, Any]) -> np.ndarray:
        """Say which environments were built anew; (num_envs,) bool."""
        failed = faults(self.envs, info)
        for i in np.flatnonzero(failed):
            self.last_fault = info["env_error"][i]
            warn(f"environment {i} was rebuilt after a fault: {self.last_fault}")
        return failed

    @contextlib.contextmanager
    def _env_failures(self) -> Iterator[None]:
        """Turn what ends the environments for good into a Failure: a dead worker, one that can't be mended."""
        try:
            with dead_workers(self.envs):
                yield
        except BrokenEnv as error:
            self.stop.check()  # the signal that ends the run may have ended a worker first
            raise EnvFailure(str(error)) from error


def _warn_of_task(config: Config, reward: np.ndarray, terminated: np.ndarray) -> None:
    """Say once what a task's rewards of an agent step, or its ends, need that the constants do not have."""
    if terminated.any() and not config.discount_head:
        why = "the task ends episodes itself, but the model learns that only in a new run with --discount_head true"
        warn_once("ends", why)
    largest = np.abs(reward).max(initial=0.0) / config.action_repeat
    if largest > LARGE_REWARD and not config.reward_norm:
        why = "the presets are made for at most 1, and --reward_norm true --reward_scale 10 divides them"
        warn_once("rewards", f"a control step has a reward of {largest:g}: {why}")


def _generator(state: dict[str, Any], restarts: int) -> np.random.Generator:
    """A generator in a saved state; after restarts, one that draws otherwise."""
    kind = getattr(np.random, state["bit_generator"])
    bits = kind()
    bits.state = state
    if restarts:
        bits = kind(np.random.Generator(bits).integers(2**32, size=restarts).tolist())
    return np.random.Generator(bits)
