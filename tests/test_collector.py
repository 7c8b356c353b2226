"""Collection: what reaches the replay in which order, when updates are due, and how both go on after a resume."""

import functools
import math
import statistics
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv, VectorEnv

from buffer import ReplayBuffer
from fake_env import FakeEnv
from faults import difference
from runtime import collect as collect_module
from runtime.cli import training_options
from runtime.collect import RECENT, Collector, Progress, UpdateRatio
from runtime.console import Failure, Stopped, StopSignals
from runtime.envs import EnvFailure, RebuildingEnv
from runtime.logger import Stopwatch
from tiny import tiny_config

STALLED = collect_module.STALLED
OPTIONS = {"cameras": ("agentview",), "image_size": 16, "action_repeat": 2, "episode_steps": 10}  # 5 agent steps


@pytest.fixture(autouse=True)
def no_progress(monkeypatch):
    """The policies of these tests come no further, so that their episodes are disturbed from the first one on."""
    monkeypatch.setattr(collect_module, "STALLED", 0)


class Logged(FakeEnv):
    """Notes its rows as the replay should have them, ends some episodes itself, and raises at some steps."""

    def __init__(self, *, seed, log, faults=(), **options):
        super().__init__(seed=seed, **(OPTIONS | options))
        self.log, self.faults = log, faults

    def reset(self, **kwargs):
        image, info = super().reset(**kwargs)
        self.log.append([(image, np.zeros(4, np.float32), 0.0, False)])
        return image, info

    def step(self, action):
        total = sum(len(rows) for rows in self.log)
        if total in self.faults:
            raise RuntimeError(f"unstable at {total}")
        image, reward, _, truncated, info = super().step(action)
        terminated = len(self.log) % 3 == 2 and self.steps == 3
        self.log[-1].append((image, np.array(action, np.float32), reward, terminated))
        return image, reward, terminated, truncated, info


class Memory(NamedTuple):
    """What the policy remembers between steps."""

    seen: int
    action: torch.Tensor


class Policy:
    """Actions that follow from the image, with notes of what it was asked."""

    device, action_size, policy = torch.device("cpu"), 4, object()

    def __init__(self, updates: int = 0):
        self.updates, self.asked, self.greedy = updates, [], []

    def act(self, image, state, is_first, draws, deterministic, policy):
        assert policy is self.policy
        self.greedy.append(deterministic.tolist())
        self.asked.append((image.numpy().copy(), state, is_first.tolist()))
        number = image.flatten(1).float().mean(1, keepdim=True) / 255
        return torch.cat([number, -number, number, -number], 1), Memory(len(self.asked), torch.zeros(len(image), 4))


def collector_of(
    logs: list[list], policy: Policy | None = None, faults: dict[int, tuple] | None = None, envs=None, **changes
) -> Collector:
    """Of environments in this process, one for each log."""
    config = tiny_config(num_envs=len(logs), **(OPTIONS | {"held_actions": 0.0} | changes))
    makers = [
        functools.partial(Logged, seed=i, log=log, faults=(faults or {}).get(i, ())) for i, log in enumerate(logs)
    ]
    envs = envs or SyncVectorEnv(
        [functools.partial(RebuildingEnv, maker) for maker in makers], autoreset_mode=AutoresetMode.DISABLED
    )
    replay = ReplayBuffer(200 * len(logs), len(logs), (3, 16, 16), 4, seed=0)
    return Collector(config, envs, policy or Policy(), replay, Stopwatch(), StopSignals())


def collect(collector: Collector, rounds: int) -> list[dict]:
    """The figures of the episodes that ended."""
    ended = []
    for _ in range(rounds):
        collector.act()
        collector.observe()
        ended += collector.finish_episodes()
    return ended


def stored(replay: ReplayBuffer, env: int) -> list[tuple]:
    """Rows of each episode, as the environment noted them."""
    columns = [replay.export(env, episode) for episode in replay.episodes[env]]
    return [
        list(zip(c["image"], c["action"], c["reward"].tolist(), c["is_terminal"].tolist(), strict=True))
        for c in columns
    ]


def same_rows(found: list, noted: list) -> bool:
    return len(found) == len(noted) and all(
        len(one) == len(other)
        and all(
            np.array_equal(a[0], b[0]) and np.array_equal(a[1], b[1]) and a[2] == np.float32(b[2]) and a[3] == b[3]
            for a, b in zip(one, other, strict=True)
        )
        for one, other in zip(found, noted, strict=True)
    )


@pytest.mark.parametrize("updates", [0, 5], ids=["random actions", "the policy's actions"])
@pytest.mark.parametrize("num_envs", [1, 3])
@pytest.mark.parametrize("held_actions", [0.0, 1.0])
def test_the_replay_has_what_each_environment_did(updates, num_envs, held_actions):
    """Row by row: the executed action beside the image that it led to, reset rows first, ends as the task set them."""
    logs = [[] for _ in range(num_envs)]
    collector = collector_of(logs, Policy(updates), held_actions=held_actions)
    ended = collect(collector, 17)
    assert all(same_rows(stored(collector.replay, i), log) for i, log in enumerate(logs))
    assert [len(rows) for rows in logs[0]] == [6, 4, 6, 5]  # the last one is running
    assert collector.step == 17 * num_envs * 2
    assert collector.episode == len(ended) == 3 * num_envs
    finished = [episode.number for episodes in collector.replay.episodes for episode in episodes if episode.number >= 0]
    assert sorted(finished) == list(range(3 * num_envs))


def test_figures_of_an_episode_are_those_of_its_rows():
    """Return and length in control steps, and the last episodes for the progress bar."""
    logs = [[]]
    collector = collector_of(logs)
    assert collector.describe_recent() == ""
    ended = collect(collector, 8)
    returns = [sum(row[2] for row in rows) for rows in logs[0]]
    assert [figures["return"] for figures in ended] == pytest.approx(returns)
    assert [figures["length"] for figures in ended] == [10, 6]
    share = np.mean([figures["success"] for figures in ended])
    assert collector.describe_recent() == f"return {returns[1]:.3g}, success {share:.0%}"
    assert collector.watch.seconds["env"] > 0 and collector.watch.seconds["update"] > 0


def test_the_policy_sees_the_newest_images_and_which_of_them_begin_an_episode():
    """It starts from nothing at its first action, also in mid-episode; later it remembers the executed action."""
    logs, policy = [[], []], Policy()
    collector = collector_of(logs, policy)
    collect(collector, 2)
    assert policy.asked == []
    policy.updates = 1
    collect(collector, 5)
    firsts = [is_first for _, _, is_first in policy.asked]
    assert firsts == [[True, True], [False, False], [False, False], [True, True], [False, False]]
    rows = [[row for episode in log for row in episode] for log in logs]
    for number, (image, state, _) in enumerate(policy.asked):
        at = number + 2 + (number >= 3)  # the second episode has a reset row too
        assert all(np.array_equal(image[i], rows[i][at][0]) for i in range(2))
        if number == 0:
            assert state is None
        else:
            executed = [rows[i][at if number != 3 else at - 1][1] for i in range(2)]
            assert state.seen == number and np.array_equal(state.action.numpy(), np.stack(executed))


def test_a_failed_step_is_no_row_and_ends_its_episode_only(capsys):
    """The rows before it are an episode; the other environment's goes on."""
    logs = [[], []]
    collector = collector_of(logs, faults={0: (3,)})  # in its third step
    ended = collect(collector, 5)
    assert capsys.readouterr().out.startswith(
        "warning: environment 0 was rebuilt after a fault: RuntimeError: unstable"
    )
    assert [figures["length"] for figures in ended] == [4, 10]
    assert [[len(rows) for rows in log] for log in logs] == [[3, 3], [6]]
    assert all(same_rows(stored(collector.replay, i), log) for i, log in enumerate(logs))
    assert list(collector.recent) == [True, False]
    assert collector.step == 5 * 2 * 2


def test_a_run_ends_when_most_of_its_last_episodes_failed(capsys):
    """Not before half of the last RECENT, and not for what is longer ago."""
    collector, half = collector_of([[]]), RECENT // 2
    collector.recent.extend([True] * (half - 1) + [False] * (half + 1))
    collector.check_faults()
    collector.recent.append(True)  # and one of the old ones is forgotten
    collector.check_faults()
    collector.recent.append(True)
    collector.recent.extend([True] * 8)
    with pytest.raises(EnvFailure, match=f"failed in {half} of the last {RECENT} episodes.*the same command goes on"):
        collector.check_faults()
    assert issubclass(EnvFailure, Failure)


def test_one_fault_that_meets_all_environments_ends_no_run():
    """A hiccup of the machine may fail an episode of each at once."""
    collector = collector_of([[] for _ in range(RECENT)])
    collector.recent.extend([True] * RECENT)
    collector.check_faults()
    collector.recent.extend([True] * RECENT)
    with pytest.raises(EnvFailure):
        collector.check_faults()


def test_the_more_often_the_task_is_solved_the_less_is_explored():
    """In unsolved tasks no episode is greedy; in solved ones a share is, and nothing is held."""
    policy = Policy(updates=5)
    collector = collector_of([[], []], policy, held_actions=1.0, greedy_episodes=0.5)
    collect(collector, 50)
    collector.successes.extend([0.0] * 10)
    assert collector.solved == 0
    for i in range(2):
        collector._explore(i)
    assert not collector.greedy.any() and all(hold.disturbed for hold in collector.held_actions)
    begun = []
    for _ in range(400):
        collector.successes.extend([1.0] * 10)
        collector._explore(0)
        begun.append((collector.greedy[0], collector.held_actions[0].disturbed))
    greedy, disturbed = np.mean(begun, 0)
    assert 0.4 < greedy < 0.6 and disturbed == 0
    collector.act()
    assert policy.greedy[-1] == collector.greedy.tolist()


def test_greedy_episodes_are_as_those_of_evaluations():
    """A task solved half of the time has some: nothing is held in them, and they have the evaluation's length."""
    changes = {"held_actions": 1.0, "greedy_episodes": 1.0, "eval_steps": 30}
    collector, begun = collector_of([[]], Policy(updates=5), **changes), []
    collector.successes.extend([0.0, 1.0] * 5)
    for _ in range(200):
        collector._explore(0)
        begun.append((bool(collector.greedy[0]), bool(collector.held_actions[0].disturbed), collector.limit[0]))
    assert set(begun) == {(True, False, 30), (False, True, 10), (False, False, 10)}
    assert training_options(collector.config)["episode_steps"] == 30
    assert training_options(tiny_config(**OPTIONS, greedy_episodes=0.0, eval_steps=30))["episode_steps"] == 10


def test_a_move_waits_for_the_median_of_the_last_largest_rewards(monkeypatch):
    """Of a control step, in the last ten episodes; where there is none yet, it waits for nothing."""
    collector, begun = collector_of([[]], Policy(updates=5), held_actions=1.0), []
    monkeypatch.setattr(collector.held_actions[0], "begin", lambda *args: begun.append(args))
    largest = [figures["max_reward"] for figures in collect(collector, 100)]
    levels = tuple(level for _, level in begun)
    assert len(levels) > 12
    assert levels == (-math.inf, *(statistics.median(largest[:i][-10:]) for i in range(1, len(levels))))
    seen = []
    monkeypatch.setattr(collector.held_actions[0], "see", seen.append)
    ended = collect(collector, 20)[-1]
    assert ended["max_reward"] in seen and len(seen) == 20


def test_nothing_is_held_while_the_policy_comes_further(monkeypatch):
    """Only from 20 episodes on in which the median of the largest rewards has not risen by a tenth."""
    monkeypatch.setattr(collect_module, "STALLED", STALLED)
    collector = collector_of([[]], Policy(updates=5), held_actions=1.0)
    begun = []
    for episode in range(60):
        collector._explore(0)
        begun.append(bool(collector.held_actions[0].disturbed))
        collector.progress.add(episode if episode < 10 else 30.0 + 0.01 * episode)  # the median rises up to episode 15
    first = begun.index(True)
    assert 30 < first < 40 and all(begun[first:])


@pytest.mark.parametrize(("before", "after", "stalled"), [(1, 1.09, 21), (1, 1.12, 6), (-1, -0.92, 21), (-1, -0.8, 6)])
def test_a_rise_by_a_tenth_is_progress(before, after, stalled):
    """Of rewards that are costs too; less than that is chance."""
    progress = Progress()
    for largest in [before] * 10 + [after] * 12:  # it is the median of ten from the sixth on
        progress.add(largest)
    assert progress.stalled == stalled


def test_no_episode_of_random_actions_is_greedy():
    """There is no policy yet whose noise could be left out, however often the task is solved by chance."""
    collector = collector_of([[]], Policy(updates=0), greedy_episodes=1.0)
    collector.successes.extend([1.0] * 10)
    for _ in range(20):
        collector._explore(0)
        assert not collector.greedy[0] and collector.limit[0] == 10


def test_one_success_is_not_a_solved_task():
    """The share counts ten episodes, also before there are ten."""
    collector = collector_of([[]])
    collector.successes.append(1.0)
    assert collector.solved == 0.1


def test_holds_end_in_the_episode_that_has_succeeded():
    """Its first success ends them in its environment, and in no environment without one."""
    collector, ended, first = collector_of([[], []], Policy(updates=5), held_actions=1.0), [], 0
    for i, hold in enumerate(collector.held_actions):
        hold.end = functools.partial(ended.append, i)
    for _ in range(60):
        ended.clear()
        collector.act(), collector.observe()
        now = {i for i, stats in enumerate(collector.stats) if stats.length and stats.success_at == stats.length}
        assert now <= set(ended) <= {i for i, stats in enumerate(collector.stats) if stats.success_at}
        first += len(now)
        collector.finish_episodes()
    assert first


@pytest.mark.parametrize("updates", [0, 5])
def test_a_collector_goes_on_as_it_would_have(updates):
    """Between episodes, its state decides all that comes: rows bit by bit, counters, exploration, random actions."""
    logs = [[], []]
    straight = collector_of(logs, Policy(updates), held_actions=0.5, greedy_episodes=0.5)
    straight.successes.extend([0.0, 1.0] * 5)
    collect(straight, 5)
    assert straight.resets.all()
    state = straight.state_dict()
    assert (state["step"], state["episode"], state["restarts"]) == (20, 2, 0)
    again = collector_of(
        [[[]], [[]]], Policy(updates), held_actions=0.5, greedy_episodes=0.5
    )  # an episode is behind each
    again.load_state_dict(state)
    assert difference(again.state_dict(), state) == ""
    collect(straight, 3), collect(again, 3)
    for i in range(2):
        assert same_rows(stored(again.replay, i), stored(straight.replay, i)[1:])
    assert difference(again.state_dict(), straight.state_dict()) == ""


def test_after_an_end_through_a_fault_other_episodes_are_drawn(capsys):
    """And others again after the next; each is told, and each is repeatable."""
    collector = collector_of([[]])
    collect(collector, 5)
    images = []
    for restarts in (0, 1, 1, 2):
        again = collector_of([[]])
        again.load_state_dict(collector.state_dict() | {"restarts": restarts})
        collect(again, 1)
        images.append(stored(again.replay, 0)[0][0][0])
        told = "warning: the run ended through a fault of its environments: their next episodes are drawn anew\n"
        assert capsys.readouterr().out == (told if restarts else "")
    equal = [[np.array_equal(one, other) for other in images] for one in images]
    assert equal == [[1, 0, 0, 0], [0, 1, 1, 0], [0, 1, 1, 0], [0, 0, 0, 1]]


def test_another_number_of_environments_is_told(capsys):
    """They start from new seeds, others after each end through a fault; the counters go on."""
    collector = collector_of([[]])
    collect(collector, 5)
    drawn = [collector_of([[], []]).state_dict()["envs"]]
    for restarts in (0, 0, 1):
        more = collector_of([[], []])
        more.load_state_dict(collector.state_dict() | {"restarts": restarts})
        assert "warning: num_envs was 1: the environments start from new seeds\n" in capsys.readouterr().out
        assert (more.step, more.episode) == (10, 1)
        drawn.append(more.state_dict()["envs"])
    assert difference(drawn[1], drawn[2]) == ""
    assert difference(drawn[0], drawn[1]) and difference(drawn[1], drawn[3])


class Lost(VectorEnv):
    """Environments whose processes are gone."""

    def __init__(self, error):
        self.error, self.metadata = error, {}
        self.single_action_space = Logged(seed=0, log=[]).action_space
        self.processes = [SimpleNamespace(exitcode=-9)]

    def reset(self, **_):
        if isinstance(self.error, str):
            return None, {"broken": ["", self.error]}
        raise self.error

    def set_attr(self, *_):
        raise self.error


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (EOFError(), r"an environment's process has ended; exit codes: \[-9\]"),
        (BrokenPipeError(), r"an environment's process has ended; exit codes: \[-9\]"),
        (OSError("got end of file during message"), r"an environment's process has ended; exit codes: \[-9\]"),
        ("10 resets failed", "10 resets failed"),
    ],
)
def test_environments_that_are_lost_end_the_run(error, words):
    """One line says how."""
    with pytest.raises(EnvFailure, match=words):
        collector_of([[]], envs=Lost(error)).act()


def test_an_action_that_is_not_finite_ends_the_run():
    """The parameter is named, before an environment or the replay has seen the action."""
    policy = Policy(updates=1)
    policy.optimizers = [SimpleNamespace(skipped_in_a_row=torch.zeros(()))]
    policy.state_dict = lambda: {"behavior": {"actor.out.bias": torch.tensor([1.0, torch.inf])}, "updates": 1}
    policy.act = lambda image, *_, **__: (torch.full((len(image), 4), torch.nan), Memory(0, torch.zeros(1, 4)))
    with pytest.raises(Failure, match="step 0: behavior.actor.out.bias is not finite"):
        collector_of([[]], policy).act()


def test_a_worker_that_is_lost_while_a_run_is_restored_ends_it():
    """In the same line as later."""
    with pytest.raises(EnvFailure, match="an environment's process has ended"):
        collector_of([[]], envs=Lost(BrokenPipeError())).load_state_dict(collector_of([[]]).state_dict())


def test_a_worker_that_ended_with_the_whole_run_is_no_fault():
    """The signal that ended it is on its way to this process too: it is what stops the run."""
    collector = collector_of([[]], envs=Lost(EOFError()))
    collector.stop.number = 15
    with pytest.raises(Stopped):
        collector.act()


# ------------------------------------------------------------------------------------------ updates


def schedule(num_envs: int, rounds: int, **changes) -> tuple[UpdateRatio, list[int]]:
    """Updates after each round of agent steps, without resets."""
    replay = SimpleNamespace(steps=0, full=False)
    ratio = UpdateRatio(tiny_config(num_envs=num_envs, **changes), replay)
    return ratio, [go_on(ratio) for _ in range(rounds)]


def go_on(ratio: UpdateRatio) -> int:
    ratio.replay.steps += ratio.config.num_envs
    return ratio.due()


def test_updates_begin_with_the_pretraining_after_the_prefill():
    """Then there is one for each `train_every` agent steps."""
    _, updates = schedule(1, 14, prefill=5, pretrain=7, train_every=3)
    assert updates == [0, 0, 0, 0, 7, 0, 0, 1, 0, 0, 1, 0, 0, 1]


@pytest.mark.parametrize("num_envs", [1, 2, 3, 8])
@pytest.mark.parametrize("train_every", [0.25, 1.0, 1.6, 5.0, 7.3])
def test_the_ratio_is_exact(num_envs, train_every):
    """For any number of environments and any fraction, steps beyond the prefill included."""
    _, updates = schedule(num_envs, 1000, prefill=50, pretrain=10, train_every=train_every)
    for rounds in (100, 500, 1000):
        beyond = rounds * num_envs - 50
        assert sum(updates[:rounds]) == 10 + int(beyond / train_every + 1e-6)


def test_the_ratio_goes_on_after_a_resume():
    """Steps that no update was made for are not forgotten; the pretraining is not repeated."""
    ratio, _ = schedule(2, 12, prefill=10, pretrain=10, train_every=7.3)
    again = UpdateRatio(ratio.config, SimpleNamespace(steps=ratio.replay.steps, full=False))
    assert again.load_state_dict(ratio.state_dict()) is None and again.state_dict() == ratio.state_dict()
    assert [go_on(again) for _ in range(50)] == [go_on(ratio) for _ in range(50)]


def test_a_replay_that_is_filled_anew_makes_no_updates_until_the_prefill():
    """After a resume without saved episodes; the steps until then are not made up for."""
    ratio, _ = schedule(1, 40, prefill=10, pretrain=10, train_every=2)
    ratio.replay.steps = 0
    assert [go_on(ratio) for _ in range(13)] == [0] * 10 + [1, 0, 1]


@pytest.mark.parametrize("discount_head", [False, True])
def test_ends_that_the_model_does_not_learn_are_told_once(discount_head, capsys):
    """A task that ends its episodes itself wants a discount head."""
    collector = collector_of([[]], discount_head=discount_head)
    for _ in range(40):
        collector.act()
        collector.observe()
        collector.finish_episodes()
    assert collector.episode > 6
    assert capsys.readouterr().out.count("--discount_head true") == (0 if discount_head else 1)


@pytest.mark.parametrize("reward_norm, scale, lines", [(False, 1, 0), (False, 1000, 1), (True, 1000, 0)])
def test_rewards_that_are_too_large_to_learn_are_told_once(reward_norm, scale, lines, capsys, monkeypatch):
    """The presets weigh rewards of about 1; of larger ones, a line names the constants that help."""
    step = Logged.step

    def scaled(env, action):
        image, reward, *rest = step(env, action)
        return image, scale * (reward + 0.1), *rest

    monkeypatch.setattr(Logged, "step", scaled)
    collect(collector_of([[]], reward_norm=reward_norm), 20)
    assert capsys.readouterr().out.count("--reward_norm true --reward_scale 10") == lines
