"""Evaluation: its figures, what model and critic make of its episodes, the best policy, broken environments, --eval."""

import contextlib
import dataclasses
import functools
import multiprocessing
import re
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import run
from fake_env import FakeEnv
from faulty_env import KilledWorker, UnevenEpisodes
from runtime import checkpoint, evaluate
from runtime.collect import EpisodeStats
from runtime.console import StopSignals
from runtime.envs import BrokenEnv, close_envs
from runtime.evaluate import (
    EVAL_SEED,
    OTHER_SEED,
    OWN_SEED,
    TRIES,
    Episode,
    Evaluator,
    Row,
    analyze,
    open_envs,
    open_loop_windows,
    play_episodes,
    realized_return,
    summarize,
)
from runtime.logger import Stopwatch
from runtime.predict import Prediction, dream
from test_run import metrics, newest, train
from tiny import ACTION_SIZE, image_shape, random_batch, seeded, tiny_config, tiny_dreamer
from train import PRESETS, Config, Dreamer, Policy


def recording(steps: int, seed: int = 0, terminal: bool = False, channels: int = 3, rewards=None) -> Episode:
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (steps + 1, channels, 64, 64), dtype=np.uint8)
    actions = rng.uniform(-1, 1, (steps + 1, ACTION_SIZE)).astype(np.float32)
    rewards = np.float32(np.r_[0, rng.uniform(0, 1, steps)] if rewards is None else rewards)
    successes = np.arange(steps + 1) > steps // 2
    return Episode(1, rows=list(map(Row, images, actions, rewards, successes)), terminal=terminal)


def rewards_of(episode: Episode) -> np.ndarray:
    return np.array([row.reward for row in episode.rows])


def evaluations(run_dir) -> list[dict]:
    return [line for line in metrics(run_dir) if "eval/return_mean" in line]


# ------------------------------------------------------------------------------------------ figures


def test_episode_figures():
    """Steps are control steps, rewards those of a control step, and success is latched at its first moment."""
    stats = EpisodeStats(repeat=2)
    for reward, success in ((0.2, False), (1.6, True), (0.4, False)):
        stats.add(reward, success)
    expected = {"return": 2.2, "length": 6, "max_reward": 0.8, "success": 1.0, "time_to_success": 4}
    assert stats.metrics() == pytest.approx(expected)
    never = EpisodeStats(repeat=1)
    never.add(0.5, False)
    assert "time_to_success" not in never.metrics() and never.metrics()["success"] == 0.0
    summary = summarize([stats, never])
    assert summary["eval/return_mean"] == pytest.approx(1.35) and summary["eval/return_std"] == pytest.approx(0.85)
    assert summary["eval/success_rate"] == 0.5 and summary["eval/episodes"] == 2
    assert summary["eval/time_to_success_mean"] == 4 and summary["eval/max_reward_mean"] == pytest.approx(0.65)
    assert "eval/time_to_success_mean" not in summarize([never])


@pytest.mark.parametrize("terminal", [True, False])
def test_realized_return_is_the_discounted_sum(terminal):
    """Of the rewards from the row on; where the clock ended the episode, the critic's last value closes it."""
    reward = np.random.default_rng(0).uniform(0, 1, 9)
    returns = realized_return(reward, 7.0, terminal, 0.9)
    last = reward[-1] if terminal else 7.0
    for t in range(9):
        assert returns[t] == pytest.approx(sum(0.9**k * reward[t + k] for k in range(8 - t)) + 0.9 ** (8 - t) * last)


def test_open_loop_windows_are_whole_and_start_in_different_episodes():
    """50 rows each, from all episodes that have them, or as many rows as half of the episodes have."""
    long, short = [recording(120, seed) for seed in range(2)], recording(30, 5)
    windows = open_loop_windows([*long, short])
    assert windows.image.shape[:2] == (50, 4)
    for column, (episode, start) in enumerate(((0, 0), (1, 0), (0, 50), (1, 50))):
        rows = long[episode].rows[start : start + 50]
        assert np.array_equal(windows.image[:, column], [row.image for row in rows])
        assert np.array_equal(windows.action[:, column], [row.action for row in rows])
        assert np.array_equal(windows.reward[:, column], [row.reward for row in rows])
    assert windows.is_first[0].all() and not windows.is_first[1:].any()
    assert open_loop_windows([short, recording(20)]).image.shape[:2] == (31, 1)
    assert open_loop_windows([recording(n) for n in (40, 31, 30, 20, 19, 9)]).image.shape[:2] == (31, 3)


def known_agent(monkeypatch, config, offset: float, value: float):
    """Predicts the true reward + 0.1 with images `offset` too bright; its critic always says `value`."""
    predictions = {
        "open_loop": lambda _, batch, draws: Prediction(batch.image / 255 + offset, batch.reward + 0.1),
        "judge": lambda _, batch, draws: (batch.reward + 0.1, torch.full_like(batch.reward, value)),
    }
    for name, predict in predictions.items():
        monkeypatch.setattr(evaluate, name, predict)
    model = SimpleNamespace(learned_reward=lambda reward: reward)
    return SimpleNamespace(config=config, device="cpu", world_model=model)


def test_errors_of_a_known_model_are_found(monkeypatch):
    """Squared image error, absolute reward error and value calibration of predictions that are off by known amounts."""
    config = tiny_config(discount=0.5)
    episodes = [recording(n, n, n == 40, rewards=np.linspace(0, 1, n + 1)) for n in (60, 40)]
    metrics = analyze(known_agent(monkeypatch, config, 0.2, 3.0), episodes, seeded(), 1.0).metrics
    for k in (1, 5, 15, 45):
        assert metrics[f"openloop/image_mse_{k}"] == pytest.approx(0.04, rel=1e-4)
        assert metrics[f"openloop/reward_error_{k}"] == pytest.approx(0.1, rel=1e-4)
    for name in ("error", "error_low", "error_middle", "error_high"):
        assert metrics[f"reward/{name}"] == pytest.approx(0.1, rel=1e-4)
    realized = [realized_return(rewards_of(e), 3.0, e.terminal, 0.5) for e in episodes]
    known = np.concatenate([realized[0][:-1], realized[1]])  # where the clock ended, the last row knows nothing
    assert metrics["behavior/value_predicted"] == pytest.approx(3.0)
    assert metrics["behavior/value_realized"] == pytest.approx(known.mean(), rel=1e-4)
    assert metrics["behavior/value_error"] == pytest.approx(np.abs(known - 3).mean(), rel=1e-4)


def test_figures_that_cannot_be_had_are_left_out(monkeypatch):
    """Open-loop steps beyond the episodes, and thirds of the largest reward that no reward fell into."""
    episode = recording(30, rewards=[0.1] * 31)
    agent = known_agent(monkeypatch, tiny_config(), 0.0, 0.0)

    def found(largest: float) -> set[str]:
        return set(analyze(agent, [episode], seeded(), largest).metrics)

    assert {"openloop/image_mse_15", "reward/error"} <= found(1.0)
    assert not {"openloop/image_mse_45", "openloop/reward_error_45"} & found(1.0)
    for largest, thirds in ((1.0, {"low"}), (0.2, {"middle"}), (0.1, {"high"}), (0.0, set())):
        assert {name for name in found(largest) if "error_" in name and "open" not in name} == {
            f"reward/error_{third}" for third in thirds
        }


def test_looking_leaves_the_agent_as_it_was():
    """Analysis and dreams are finite, change no parameter, and take nothing from training's random stream."""
    config = tiny_config()
    agent = tiny_dreamer(config)
    before = {name: value.clone() for name, value in agent.world_model.state_dict().items()}
    stream = torch.get_rng_state()
    channels = image_shape(config)[0]
    analysis = analyze(agent, [recording(60, channels=channels), recording(33, 1, channels=channels)], seeded(), 1.0)
    dreamed = dream(agent, analysis.windows, 7, seeded())
    assert all(np.isfinite(value) for value in analysis.metrics.values())
    assert dreamed.image.shape[:2] == dreamed.reward.shape == (7, analysis.windows.image.shape[1])
    assert torch.equal(stream, torch.get_rng_state())
    assert all(torch.equal(before[name], value) for name, value in agent.world_model.state_dict().items())
    assert all(p.grad is None for p in agent.world_model.parameters())


def test_dreams_tell_rewards_of_a_control_step(tmp_path, monkeypatch):
    """In the environment's units: what the model learns is divided by its size, and of a whole action."""
    config = tiny_config(reward_norm=True, action_repeat=2)
    agent, told = tiny_dreamer(config), []
    agent.world_model.loss(random_batch(config), seeded())
    assert agent.world_model.reward_size() != 1
    evaluator = Evaluator(config, agent, FakeEnv, SimpleNamespace(run_dir=tmp_path), Stopwatch(), StopSignals(), None)
    evaluator._video = lambda *_: None
    monkeypatch.setattr(evaluate, "dream", lambda agent, batch, steps, draws: Prediction(batch.image / 255, reward))
    monkeypatch.setattr(evaluate, "dream_video", lambda seen, image, reward, *_: told.append(reward))
    analysis = analyze(agent, [recording(60, channels=image_shape(config)[0])], seeded(), 1.0)
    reward = torch.full((5, 1), 3.0)
    evaluator._film(10, None, analysis, seeded())
    assert told[0] == pytest.approx(np.full((5, 1), 3.0 * float(agent.world_model.reward_size()) / 2))


# ------------------------------------------------------------------------------------------ in a run


def test_evaluations_of_another_kind_do_not_compete_with_earlier_ones(tmp_path, monkeypatch, capsys):
    """A resumed run whose evaluations are shorter must not keep the policy of a longer one for ever."""
    assert train(tmp_path / "run", "--eval_steps 200 --eval_episodes 2") == 0
    assert newest(tmp_path / "run")["evaluator"]["best"] > 20
    compare, evaluations = Evaluator._compare, []

    def recorded(self, step, played, summary):
        # The last evaluation is longer, and competes by its first episode alone, whose return no line has.
        evaluations.append((played[0].total, step))
        compare(self, step, played, summary)

    monkeypatch.setattr(Evaluator, "_compare", recorded)
    best_step, policy = newest(tmp_path / "run")["best_step"], (tmp_path / "run/policy.pt").read_bytes()
    assert train(tmp_path / "run", "--eval_steps 20 --steps 200") == 0
    assert "can't be compared" in capsys.readouterr().out
    kept = tmp_path / f"run/policy_{best_step:09d}.pt"
    assert kept.read_bytes() == policy != (tmp_path / "run/policy.pt").read_bytes()
    evaluator = newest(tmp_path / "run")["evaluator"]
    assert evaluator["best_success"] < 1 and evaluator["largest"] > 0
    assert evaluations and (evaluator["best"], evaluator["best_step"]) == pytest.approx(max(evaluations), rel=1e-4)
    assert train(tmp_path / "run", "--eval_steps 20 --steps 240") == 0
    assert "can't be compared" not in capsys.readouterr().out
    assert train(tmp_path / "run", "--eval_steps 20 --eval_episodes 3 --steps 280") == 0
    assert "can't be compared" in capsys.readouterr().out


@pytest.mark.films
def test_an_env_that_cannot_render_films_what_the_model_sees(tmp_path, capsys):
    """Frames are needed for the episode's video only: a warning says so, and the two others are there."""

    class Unseen(FakeEnv):
        def render(self):
            raise NotImplementedError

    assert train(tmp_path / "run", make_env=Unseen) == 0
    assert "evaluations are not filmed" in capsys.readouterr().out
    assert {path.name.split("_")[0] for path in (tmp_path / "run").glob("videos/*")} == {"openloop", "dream"}
    assert "eval/return_mean" in str(metrics(tmp_path / "run"))


def test_a_policy_that_a_full_disk_refused_is_written_later(tmp_path, monkeypatch, capsys):
    """The best evaluation's policy is not lost: the next episode's end tries again."""
    write, refused = evaluate.write_file, []

    class Worse(Watched):
        """The first evaluation is the best one."""

        def spoil(self, reward):
            return reward - 10 * len(self.seeds)

    def full(path, data):
        if path.name == "policy.pt" and len(refused) < 2:
            refused.append(data)
            raise OSError(28, "No space left on device")
        write(path, data)

    monkeypatch.setattr(evaluate, "write_file", full)
    assert train(tmp_path / "run", make_env=Worse) == 0
    assert len(refused) == 2 and capsys.readouterr().out.count("policy.pt can't be written") == 1
    assert (tmp_path / "run/policy.pt").read_bytes() == refused[0] == refused[1]  # the first evaluation's


def test_a_policy_that_was_refused_to_the_end_is_written_by_the_next_start(tmp_path, monkeypatch, capsys):
    """Of a finished run too: the exit code is 1 until it is there."""
    write = evaluate.write_file

    def full(path, data):
        if path.name == "policy.pt":
            raise OSError(28, "No space left on device")
        write(path, data)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "write_file", full)
        assert train(tmp_path / "run") == train(tmp_path / "run") == 1
    assert not (tmp_path / "run/policy.pt").exists() and "can't be written" in capsys.readouterr().err
    assert train(tmp_path / "run") == 0
    assert checkpoint.load_policy(tmp_path / "run/policy.pt")[1].task == "Lift"


def test_the_last_evaluation_competes_over_the_same_starts_as_the_others(tmp_path, monkeypatch):
    """It has twice as many episodes; what is compared with the others' mean is the mean of the first half of them."""
    played = []

    def listen(episodes):
        played.append([episode.total for episode in episodes])
        return summarize(episodes)

    monkeypatch.setattr(evaluate, "summarize", listen)
    assert train(tmp_path / "run", "--eval_episodes 2") == 0
    assert list(map(len, played)) == [2, 2, 4]
    assert newest(tmp_path / "run")["evaluator"]["best"] == max(np.mean(totals[:2]) for totals in played)
    assert [line["eval/episodes"] for line in evaluations(tmp_path / "run")] == [2, 2, 4]


# ------------------------------------------------------------------------------------------ several at once


def counting(image, state, is_first, draws, deterministic):
    """A policy without draws, whose actions depend on the image and on how many steps its episode has had."""
    steps = torch.zeros(len(image)) if state is None else torch.where(is_first, 0.0, state)
    shift = image[:, 0, :, :32].float().mean((1, 2)) / 255 - image[:, 0].float().mean((1, 2)) / 255
    action = torch.stack([torch.sin(steps), torch.cos(steps), shift, 10 * shift], -1)
    return action.clamp(-1, 1), steps + 1


def play(num_envs: int, episodes: int = 7, film: bool = True, **options) -> list[Episode]:
    """Episodes of different lengths, as many at once as there are environments."""
    config = tiny_config(num_envs=num_envs, eval_episodes=episodes, episode_steps=20)
    envs = open_envs(config, functools.partial(UnevenEpisodes, **options))
    assert envs.num_envs == num_envs
    assert len(getattr(envs, "processes", ())) == (num_envs if num_envs > 1 else 0)
    with contextlib.closing(envs):
        return play_episodes(counting, envs, config, torch.device("cpu"), episodes, film)


def assert_equal_evaluations(one: list[Episode], other: list[Episode]) -> None:
    for a, b in zip(one, other, strict=True):
        assert (a.number, a.attempt, a.terminal, a.metrics()) == (b.number, b.attempt, b.terminal, b.metrics())
        assert np.array_equal(a.renders, b.renders)
        for row, same in zip(a.rows, b.rows, strict=True):
            assert all(map(np.array_equal, row, same))


def test_as_many_episodes_run_at_once_as_there_are_environments():
    """The same returns, lengths, rows and pictures in the same order from 1, 2 and 3; only the first one is filmed."""
    alone = play(1)
    assert len({episode.length for episode in alone}) > 3 and evaluate.filmed(alone) is alone[0]
    assert [len(x.renders) for x in alone] == [alone[0].length + 1] + [0] * 6
    assert [len(x.rows) for x in alone] == [x.length + 1 for x in alone[: evaluate.RECORDINGS]] + [0]
    for num_envs in (2, 3):
        assert_equal_evaluations(play(num_envs), alone)


def test_failed_episodes_are_played_again_in_workers_too(capsys):
    """With the same other draws, however many run at once: one twice, one thrice and then counted as failed."""
    bad = {EVAL_SEED, EVAL_SEED + 2, *(EVAL_SEED + 4 + OTHER_SEED * attempt for attempt in range(TRIES))}
    results = []
    for num_envs in (1, 3):
        results.append(play(num_envs, bad=bad))
        told = [line for line in capsys.readouterr().out.splitlines() if "failed and is played with other" in line]
        assert len(told) == 2 + TRIES and all("RuntimeError: contact" in line for line in told)
    assert len(results[0]) == 6
    assert_equal_evaluations(*results)
    whole, some = ([episode.metrics() for episode in episodes] for episodes in (play(1), results[0]))
    assert whole[1] == some[1] and whole[0] != some[0]


def test_recordings_are_of_the_first_episodes_that_could_be_played():
    """In their order, although those before them fail only after others have ended; one of them is filmed."""
    bad = {EVAL_SEED + i + OTHER_SEED * attempt for i in (0, 1) for attempt in range(TRIES)}
    played = play(2, bad=bad)
    assert [x.number for x in played] == [2, 3, 4, 5, 6] and evaluate.filmed(played) is not None
    assert [len(x.rows) - 1 for x in played] == [x.length for x in played]


def test_more_environments_than_episodes_rest():
    """They are neither reset nor stepped; the time that filming the others takes is measured."""
    config = tiny_config(num_envs=3, eval_episodes=3, episode_steps=20)
    with contextlib.closing(open_envs(config, UnevenEpisodes)) as envs:
        watch = Stopwatch()
        result = play_episodes(counting, envs, config, torch.device("cpu"), 1, film=True, watch=watch)
        assert envs.get_attr("begun_with") == (EVAL_SEED, None, None) and watch.seconds["video"] > 0
    assert_equal_evaluations(result, play(1, 1))


@pytest.mark.parametrize("num_envs", [1, 2])
def test_an_environment_that_cannot_be_mended_is_told_without_a_traceback(num_envs, capfd):
    """Every reset fails: that is no fault of one episode."""

    class Unmendable(UnevenEpisodes):
        def reset(self, *, seed=None, options=None):
            raise RuntimeError("100%d of it is broken")  # which looks like a format

    config = tiny_config(num_envs=num_envs, eval_episodes=2, episode_steps=20)
    envs = open_envs(config, Unmendable)
    with pytest.raises(BrokenEnv, match="10 resets failed .* 100%d of it is broken"):
        play_episodes(counting, envs, config, torch.device("cpu"), 2, film=False)
    close_envs(envs)
    assert not multiprocessing.active_children() and "Traceback" not in capfd.readouterr().err


def test_an_episode_that_does_not_end_is_ended():
    """After `eval_steps`; the next one begins as after any other."""
    config = tiny_config(eval_episodes=3, episode_steps=20)
    with contextlib.closing(open_envs(config, FakeEnv)) as envs:
        config = dataclasses.replace(config, eval_steps=7)
        played = play_episodes(counting, envs, config, torch.device("cpu"), 3, film=False)
    assert [(x.number, x.length, x.terminal) for x in played] == [(0, 7, False), (1, 7, False), (2, 7, False)]


def test_evaluation_environments_with_other_images_are_refused(tmp_path, capsys):
    """A run goes on without evaluations, told in one line each; --eval says it in one line."""

    class Grown(FakeEnv):
        def __init__(self, *, seed, image_size, **options):
            super().__init__(seed=seed, image_size=image_size * (2 if seed == EVAL_SEED else 1), **options)

    assert train(tmp_path / "run", make_env=Grown) == 1
    out, error = capsys.readouterr()
    assert "its environment can't be built: UserError: task Lift: its images" in out and error.count("\n") == 1
    assert not (tmp_path / "run/policy.pt").exists()


FOUR_WORKERS = "--num_envs 2 --prefill 40 --eval_episodes 2 --steps 120"


@pytest.mark.films
def test_a_run_evaluates_in_workers_that_end_with_it(tmp_path, monkeypatch, capsys):
    """The same two for all its evaluations, beside those that train; all are gone at its end. --eval plays alone."""
    workers = []
    monkeypatch.setattr(evaluate, "analyze", lambda *args: workers.append(processes()) or analyze(*args))
    assert train(tmp_path / "run", FOUR_WORKERS) == 0
    assert len(workers) > 1 and len(workers[0]) == 4 and all(found == workers[0] for found in workers)
    assert not multiprocessing.active_children()
    assert [line["eval/episodes"] for line in evaluations(tmp_path / "run")] == [2] * (len(workers) - 1) + [4]
    assert list((tmp_path / "run/videos").glob("eval_*.mp4"))
    counts, make = [], evaluate.make_vector_env
    monkeypatch.setattr(evaluate, "make_vector_env", lambda all_, *args: counts.append(len(all_)) or make(all_, *args))
    for flag in ("", "--num_envs 2"):
        flags = ["--eval", str(tmp_path / "run"), "--eval_episodes", "3", *flag.split()]
        assert run.main(flags, FakeEnv) == 0 and "of 3 episodes" in capsys.readouterr().out
    assert counts == [1, 2] and (tmp_path / "run/policy.mp4").exists()
    assert not multiprocessing.active_children()


def test_ten_successes_in_a_row_are_a_reason_to_evaluate_sooner():
    """After a quarter of `eval_every`, until all episodes of an evaluation have succeeded, also over a resume."""
    config = tiny_config(eval_every=100, steps=1000)
    new = functools.partial(Evaluator, config, SimpleNamespace(updates=1), FakeEnv, None, Stopwatch(), StopSignals())
    evaluator = new(None)
    evaluator.evaluated, evaluator.best_success = 200, 0.9
    for step, solved, due in ((224, True, False), (225, True, True), (225, False, False), (300, False, True)):
        assert evaluator.due(step, solved) == due
    evaluator.best_success = 1.0
    again = new(None)
    again.load_state_dict(evaluator.state_dict())
    assert not again.due(299, True) and again.due(300, True) and again.due(1000)


def processes() -> set[int]:
    return {process.pid for process in multiprocessing.active_children()}


def test_a_killed_worker_costs_its_evaluation_and_nothing_else(tmp_path, capfd):
    """It is told in a line; training goes on; the next evaluation has new workers; the exit code tells."""
    make_env = functools.partial(KilledWorker, once=tmp_path / "once", eval_seed=EVAL_SEED)
    assert train(tmp_path / "run", FOUR_WORKERS, make_env) == 1
    out, error = capfd.readouterr()
    assert re.search(
        r"^warning: the evaluation failed: an environment's process has ended; exit.*-9", out, re.MULTILINE
    )
    assert out.count("is incomplete") == 1 and "done: 120 steps" in out
    assert error == "error: 1 evaluation(s) were incomplete: see the warnings about them\n"
    assert newest(tmp_path / "run")["step"] == 120 and (tmp_path / "run/policy.pt").exists()
    assert evaluations(tmp_path / "run")[-1]["eval/episodes"] == 4
    assert not multiprocessing.active_children()


def test_the_cost_of_evaluations_is_printed_as_a_share(tmp_path, monkeypatch, capsys):
    """Seconds of this one, videos included, and the share of all of them in the time since the start."""
    clock = [100.0]
    monkeypatch.setattr(evaluate, "time", SimpleNamespace(monotonic=lambda: clock[0], perf_counter=lambda: clock[0]))
    step, judge = Dreamer.train_step, evaluate.analyze

    def slow(seconds, work):
        def with_time(*args):
            clock[0] += seconds
            return work(*args)

        return with_time

    monkeypatch.setattr(evaluate, "analyze", slow(30, judge))
    monkeypatch.setattr(Dreamer, "train_step", slow(5, step))
    assert train(tmp_path / "run") == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "the evaluation took" in line]
    updates = [line["perf/updates"] for line in metrics(tmp_path / "run") if "perf/updates" in line]
    assert len(lines) == len(evaluations(tmp_path / "run")) == 3 and max(map(len, lines)) <= 80
    share = 90 / (90 + 5 * updates[-1])
    assert lines[-1] == f"step 100: the evaluation took 30 s; evaluations are {share:.0%} of the time so far"


# ------------------------------------------------------------------------------------------ broken environments


class Watched(FakeEnv):
    """Notes the seeds with which evaluation episodes begin; subclasses spoil some of those."""

    seeds: list[int] = []

    def __init__(self, *, seed, **options):
        super().__init__(seed=seed, **options)
        self.evaluates, self.episode = seed == EVAL_SEED, -1

    def reset(self, *, seed=None, options=None):
        if self.evaluates and seed is not None:
            self.episode = seed
            self.seeds.append(seed)
        return super().reset(seed=seed, options=options)

    def step(self, action):
        image, reward, *rest = super().step(action)
        return image, self.spoil(reward) if self.evaluates else reward, *rest

    def spoil(self, reward):
        return reward


@pytest.fixture(autouse=True)
def no_seeds_yet(monkeypatch):
    monkeypatch.setattr(Watched, "seeds", [])


class Raising(Watched):
    """Each step of an evaluation raises."""

    def spoil(self, reward):
        raise RuntimeError("the contact solver diverged")


class Failing(Watched):
    """No evaluation can begin."""

    def reset(self, *, seed=None, options=None):
        if self.evaluates:
            raise RuntimeError("Cannot place all objects")
        return super().reset(seed=seed, options=options)


class Absent(Watched):
    """There is no second environment."""

    def __init__(self, *, seed, **options):
        if seed == EVAL_SEED:
            raise RuntimeError("no OpenGL context is left")
        super().__init__(seed=seed, **options)


@pytest.mark.parametrize(
    ("make_env", "why"),
    [
        (Raising, "contact solver diverged"),
        (Failing, "Cannot place all objects"),
        (Absent, "no OpenGL context is left"),
    ],
)
def test_a_broken_evaluation_is_no_evaluation(make_env, why, tmp_path, capsys):
    """In each step, reset or at its building: no figures, no policy.pt, exit code 1, told; training is complete."""
    assert train(tmp_path / "run", make_env=make_env) == 1
    out, error = capsys.readouterr()
    assert why in out and out.count("is incomplete") == 3 and "evaluation return" not in out
    assert "done: 100 steps" in out
    assert error == "error: 3 evaluation(s) were incomplete: see the warnings about them\n"
    assert not evaluations(tmp_path / "run") and not (tmp_path / "run/policy.pt").exists()
    state = newest(tmp_path / "run")
    assert state["step"] == 100 and state["best_step"] == -1 and state["agent"]["updates"] > 10
    assert make_env is not Raising or len(Watched.seeds) == TRIES * (1 + 1 + 2)


def test_training_does_not_notice_that_evaluations_break(tmp_path):
    """Its weights and its episodes are those of a run whose evaluations work."""
    assert train(tmp_path / "whole") == 0 and train(tmp_path / "broken", make_env=Raising) == 1
    states = [newest(tmp_path / name) for name in ("whole", "broken")]
    weights = [{**state["agent"]["world_model"], **state["agent"]["behavior"]} for state in states]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
    assert states[0]["collector"]["envs"] == states[1]["collector"]["envs"]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "much", None])
def test_an_evaluation_episode_with_a_bad_reward_is_played_with_other_draws(value, tmp_path, capsys):
    """Neither its return nor its rows are used; the evaluation is complete, and competes; metrics.jsonl is strict."""

    class Bad(Watched):
        def spoil(self, reward):
            return value if self.episode == EVAL_SEED + 1 and self.steps == 7 else reward

    assert train(tmp_path / "run", "--eval_episodes 2 --eval_every 1000", Bad) == 0
    out = capsys.readouterr().out
    assert out.count("warning: an episode of the evaluation failed and is played with other draws: ") == 1
    expected = [EVAL_SEED, EVAL_SEED + 1, EVAL_SEED + 1 + OTHER_SEED, EVAL_SEED + 2, EVAL_SEED + 3]
    assert Watched.seeds == expected
    (line,) = evaluations(tmp_path / "run")
    assert line["eval/episodes"] == 4 and line["eval/length_mean"] == 20 and line["eval/length_std"] == 0
    assert (tmp_path / "run/policy.pt").exists()


def test_an_incomplete_evaluation_is_logged_but_does_not_compete(tmp_path, capsys):
    """Its figures are those of the episodes that could be played; an earlier, complete one keeps policy.pt."""

    class Late(Watched):
        def spoil(self, reward):
            # from the second evaluation on, its second episode always fails, and the others are the best there are
            if self.seeds.count(EVAL_SEED) < 2:
                return reward
            return float("nan") if (self.episode - EVAL_SEED) % OTHER_SEED == 1 else 50.0

    assert train(tmp_path / "run", "--eval_episodes 2", Late) == 1
    out, error = capsys.readouterr()
    assert out.count("is incomplete") == 2 and error.startswith("error: 2 evaluation(s) were incomplete")
    lines = evaluations(tmp_path / "run")
    assert [line["eval/episodes"] for line in lines] == [2, 1, 3]
    assert lines[2]["eval/return_mean"] > lines[1]["eval/return_mean"] - 1 > lines[0]["eval/return_mean"]
    assert [line["eval/best"] for line in lines] == [1, 0, 0]
    saved = torch.load(tmp_path / "run/policy.pt", weights_only=True)
    assert saved["env_step"] == lines[0]["env_step"] == newest(tmp_path / "run")["best_step"]


def test_the_averaged_policy_is_played_and_kept(tmp_path, monkeypatch):
    """Evaluations play it and not the newest one, and policy.pt is it as the best evaluation has played it."""
    playing, kept, forward, evaluation = set(), {}, Policy.forward, Evaluator.evaluate

    def listen(policy, *args):
        playing.add(id(policy))
        return forward(policy, *args)

    def watched(evaluator, step):
        playing.clear()
        kept[step] = {name: value.clone() for name, value in evaluator.agent.averaged.state_dict().items()}
        evaluation(evaluator, step)
        newest_one = evaluator.agent.policy.state_dict()
        assert playing == {id(evaluator.agent.averaged)}
        assert not torch.equal(kept[step]["actor.out.weight"], newest_one["actor.out.weight"])

    monkeypatch.setattr(Policy, "forward", listen)
    monkeypatch.setattr(Evaluator, "evaluate", watched)
    assert train(tmp_path / "run") == 0
    policy, _ = checkpoint.load_policy(tmp_path / "run/policy.pt")
    best = kept[newest(tmp_path / "run")["best_step"]]
    assert len(kept) > 1 and all(torch.equal(value, best[name]) for name, value in policy.state_dict().items())


def test_an_incomplete_evaluation_has_no_best_success():
    """Its one episode that could be played may have been lucky; evaluations go on coming early."""
    evaluator = Evaluator(tiny_config(), None, FakeEnv, None, Stopwatch(), StopSignals(), SimpleNamespace())
    evaluator._play = lambda episodes, film: [SimpleNamespace(total=9.0)] * (episodes - 1)
    evaluator._log = lambda *_: None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "summarize", lambda played: {"eval/success_rate": 1.0})
        evaluator.bar.show = lambda phase: None
        evaluator.evaluate(10)
        assert (evaluator.best_success, evaluator.best_step, evaluator.incomplete) == (0.0, -1, 1)
        evaluator._play = lambda episodes, film: [SimpleNamespace(total=9.0)] * episodes
        patch.setattr(evaluate, "policy_file", lambda *_, **__: b"")
        evaluator.agent = SimpleNamespace(averaged=None)
        evaluator.evaluate(20)
        assert (evaluator.best_success, evaluator.best_step, evaluator.incomplete) == (1.0, 20, 1)


def test_a_resumed_run_remembers_that_an_evaluation_was_incomplete(tmp_path, capsys):
    """The exit code of its end counts the evaluations of all its parts."""

    class Once(Watched):
        def spoil(self, reward):
            return float("nan") if self.seeds.count(EVAL_SEED) == 1 else reward

    assert train(tmp_path / "run", "--eval_every 60", Once) == 1
    assert train(tmp_path / "run", "--steps 140 --eval_every 60") == 1
    assert train(tmp_path / "run", "--steps 140 --eval_every 60") == 1  # which is finished
    assert capsys.readouterr().err.count("1 evaluation(s) were incomplete") == 3
    assert (tmp_path / "run/policy.pt").exists()


def test_a_reset_that_fails_in_an_evaluation_is_drawn_anew_and_told(tmp_path, capsys):
    """One failure costs a warning; the evaluation is complete."""

    class Tight(Watched):
        failures = Counter()

        def reset(self, *, seed=None, options=None):
            out = super().reset(seed=seed, options=options)
            if seed == EVAL_SEED:
                self.failures[seed] += 1
                raise RuntimeError("Cannot place all objects")
            return out

    assert train(tmp_path / "run", "--eval_every 1000", Tight) == 0
    assert capsys.readouterr().out.count("warning: a reset of the evaluation failed and was drawn anew: ") == 1
    assert Tight.failures[EVAL_SEED] == 1 and evaluations(tmp_path / "run")[0]["eval/episodes"] == 2


def test_a_metric_that_is_no_number_is_left_out_and_told(tmp_path, monkeypatch, capsys):
    """metrics.jsonl is strict JSON in every line, whatever an update or an analysis gives."""
    step, judge = Dreamer.train_step, evaluate.analyze

    def spoilt(self, batch):
        return step(self, batch) | {"model/odd": torch.tensor(float("inf"))}

    def odd(*args):
        analysis = judge(*args)
        analysis.metrics["reward/error"] = float("nan")
        return analysis

    monkeypatch.setattr(Dreamer, "train_step", spoilt)
    monkeypatch.setattr(evaluate, "analyze", odd)
    assert train(tmp_path / "run") == 0
    names = set().union(*metrics(tmp_path / "run"))
    assert {"model/loss", "openloop/image_mse_5"} <= names and not {"model/odd", "reward/error"} & names
    assert "not finite since the last line, and left out of it: model/odd" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------ --eval


def test_evaluations_have_a_length_of_their_own(tmp_path):
    """`eval_steps` in training; and with --eval, as the run had it or as the flag says."""
    assert train(tmp_path / "run", "--eval_steps 34 --greedy_episodes 0") == 0
    for name, length in (("episode/length", 20), ("eval/length_mean", 34)):
        assert {line[name] for line in metrics(tmp_path / "run") if name in line} == {length}
    built = []

    def make_env(**options):
        built.append(options["episode_steps"])
        return FakeEnv(**options)

    for flag in ("", "--eval_steps 16", "--eval_steps 0"):
        assert run.main(["--eval", str(tmp_path / "run"), "--eval_episodes", "1", *flag.split()], make_env) == 0
    assert built == [34, 16, 20]


def test_eval_judges_flags_by_the_policys_constants(tmp_path, monkeypatch, capsys):
    """Not by the preset that training would have here; and on the device that is here, not the one it was made on."""
    assert train(tmp_path / "run") == 0
    monkeypatch.setattr(evaluate, "pick_device", lambda name: torch.device("cpu" if name != "cuda" else "meta"))
    monkeypatch.setattr(evaluate, "load_policy", lambda path: _on_cuda(checkpoint.load_policy(path)))
    assert PRESETS["debug"]["action_repeat"] == 1 and Config().action_repeat == 2
    assert run.main(["--eval", str(tmp_path / "run"), "--eval_episodes", "1", "--eval_steps", "15"], FakeEnv) == 0
    assert run.main(["--eval", str(tmp_path / "run"), "--eval_episodes", "0"], FakeEnv) == 2
    assert "eval_episodes 0" in capsys.readouterr().err


def _on_cuda(loaded: tuple) -> tuple:
    policy, config = loaded
    return policy, dataclasses.replace(config, device="cuda")


def test_eval_takes_the_mean_or_the_mode(tmp_path, capsys):
    """As the run did, or as the flag says."""
    assert train(tmp_path / "run", "--eval_action mode") == 0
    printed = []
    for flag in ("", "--eval_action mode", "--eval_action mean"):
        capsys.readouterr()
        assert run.main(["--eval", str(tmp_path / "run"), "--eval_episodes", "2", *flag.split()], FakeEnv) == 0
        printed.append(capsys.readouterr().out.splitlines()[0])
    assert printed[0] == printed[1] != printed[2]


@pytest.mark.parametrize("flag", ["--seed 3", "--precision float32", "--episode_steps 12"])
def test_eval_refuses_what_it_would_ignore(flag, tmp_path, capsys):
    """Only the task's settings, the device and the number of episodes can be chosen."""
    config = tiny_config(episode_steps=8, batch_length=4)
    file = tmp_path / "policy.pt"
    file.write_bytes(checkpoint.policy_file(tiny_dreamer(config).policy, config))
    assert run.main(["--eval", str(tmp_path), *flag.split()], FakeEnv) == 2
    name, value = flag.lstrip("-").split()
    error = capsys.readouterr().err
    assert f"{name} {value} can't be chosen with --eval: the policy was trained with {getattr(config, name)}" in error
    assert "; valid: control_freq, " in error


def test_eval_takes_what_the_policy_is_anyway_and_refuses_other_shapes(tmp_path, capsys):
    """So that a script which names its own task, and constants for it, can evaluate it too."""
    config = tiny_config(episode_steps=8, batch_length=4)
    file = tmp_path / "policy.pt"
    file.write_bytes(checkpoint.policy_file(tiny_dreamer(config).policy, config))
    make_env = functools.partial(FakeEnv, action_size=ACTION_SIZE)
    flags = ["--eval", str(file), "--eval_episodes", "1"]
    same = (
        f"--task {config.task} --episode_steps 8 --eval_every {config.eval_every} --reward_scale {config.reward_scale}"
    )
    assert run.main([*flags, *same.split()], make_env) == 0
    assert run.main([*flags, "--deter", "8"], make_env) == 2
    assert "deter 8 can't be chosen with --eval: the policy was trained with 16" in capsys.readouterr().err


@pytest.mark.parametrize("content", [b"", b"PK", b"l.", b"\x80\x02]q\x00.", b"tensor"])
def test_eval_of_a_file_that_is_no_policy_gets_one_line(content, tmp_path, capsys):
    """Whatever torch raises for it."""
    (tmp_path / "policy.pt").write_bytes(content)
    if content == b"tensor":
        torch.save(torch.zeros(3), tmp_path / "policy.pt")
    assert run.main(["--eval", str(tmp_path)], FakeEnv) == 2
    assert "is no policy file" in capsys.readouterr().err


def test_eval_of_a_run_without_an_evaluation_says_so(tmp_path, capsys):
    """It has no policy yet; nor is there a file of another name."""
    for path, file in ((tmp_path, tmp_path / "policy.pt"), (tmp_path / "a.pt", tmp_path / "a.pt")):
        assert run.main(["--eval", str(path)], FakeEnv) == 2
        told = f"error: there is no {file}; in a run's folder, its first evaluation writes policy.pt\n"
        assert capsys.readouterr().err == told


def test_a_policy_file_does_not_tell_where_it_was_learnt(tmp_path):
    """It is made to be given away."""
    assert train(tmp_path / "run") == 0
    assert str(tmp_path).encode() not in (tmp_path / "run/policy.pt").read_bytes()


class Noting(FakeEnv):
    """Notes the seeds with which all of its kind begin episodes."""

    seeds: list[int] = []

    def reset(self, *, seed=None, options=None):
        self.seeds.append(seed)
        return super().reset(seed=seed, options=options)


def test_eval_has_starts_that_no_evaluation_of_training_had(tmp_path, monkeypatch):
    """A policy that was chosen for its starts is judged on others."""
    monkeypatch.setattr(Noting, "seeds", [])
    assert train(tmp_path / "run", make_env=Noting) == 0
    trained = {seed for seed in Noting.seeds if seed is not None}
    Noting.seeds.clear()
    assert run.main(["--eval", str(tmp_path / "run")], Noting) == 0
    assert Noting.seeds == [OWN_SEED + i for i in range(20)] and not trained & set(Noting.seeds)


@pytest.mark.parametrize("fails", ["all", "one", "building", "refusing"])
def test_eval_in_a_broken_environment_is_told(fails, tmp_path, capsys):
    """No figures of nothing: exit code 1; 2 where the environment refuses a setting; one line, no traceback."""

    class Broken(FakeEnv):
        def __init__(self, **options):
            if fails in ("building", "refusing"):
                raise {"building": RuntimeError, "refusing": ValueError}[fails]("control_freq 15 is not one of mine")
            super().__init__(**options)
            self.episode = 0

        def reset(self, *, seed=None, options=None):
            self.episode = seed
            return super().reset(seed=seed, options=options)

        def step(self, action):
            if fails == "all" or self.episode % OTHER_SEED == 1:
                raise RuntimeError("the contact solver diverged")
            return super().step(action)

    assert train(tmp_path / "run") == 0
    capsys.readouterr()
    code = run.main(["--eval", str(tmp_path / "run"), "--eval_episodes", "2"], Broken)
    out, error = capsys.readouterr()
    assert code == (2 if fails == "refusing" else 1) and error.count("\n") == 1 and error.startswith("error: ")
    assert ("of 1 episodes" in out) == ("evaluation return" in out) == (fails == "one")
    words = {"all": "no episode could be played", "one": f"1 episode(s) failed {TRIES} times"}
    assert words.get(fails, "control_freq 15 is not one of mine") in error
