import gc
import math
import random
import sys
from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import run
from buffer import Batch, ReplayBuffer, Transition
from fake_env import FakeEnv
from runtime.device import make_replay
from test_run import newest as newest_state
from test_run import train

IMAGE_SHAPE = (3, 2, 2)


def transition(tag: int, is_first: bool = False, is_terminal: bool = False) -> Transition:
    """A row whose image, action and reward all carry the number `tag`."""
    image = np.full(IMAGE_SHAPE, tag % 256, np.uint8)
    image[0, 0, 0] = tag // 256
    return Transition(image, np.float32([tag, -tag]), float(tag), is_first, is_terminal)


def tags(batch: Batch) -> torch.Tensor:
    """The rows' numbers (T, B), after a check that image, action and reward agree on them."""
    tag = batch.reward.long()
    assert torch.equal(batch.action, torch.stack([batch.reward, -batch.reward], -1))
    assert torch.equal(batch.image[:, :, 1, 0, 0] + 256 * batch.image[:, :, 0, 0, 0].long(), tag)
    return tag


class NaiveEpisode:
    """Rows as (tag, is_first, is_terminal); `number` and `score` once it is finished."""

    def __init__(self):
        self.rows: list[tuple[int, bool, bool]] = []
        self.number, self.score = math.inf, -math.inf


class NaiveReplay:
    """The oracle: per env a list of episodes."""

    def __init__(self, rows: int, num_envs: int):
        self.rows, self.rings = rows, [[] for _ in range(num_envs)]

    def add(self, env: int, row: Transition) -> None:
        ring = self.rings[env]
        if row.is_first:
            ring.append(NaiveEpisode())
        ring[-1].rows.append((int(row.reward), row.is_first, row.is_terminal))
        if sum(len(episode.rows) for episode in ring) > self.rows:
            ring[0].rows.pop(0)
            if not ring[0].rows:
                ring.pop(0)

    def finish(self, env: int, number: int) -> None:
        episode = self.rings[env][-1]
        tags = [tag for tag, _, _ in episode.rows]
        episode.number, episode.score = number, max(tags[1:], default=-math.inf) + 1e-4 * sum(tags)

    def all_rows(self) -> list[list[tuple]]:
        return [[row for episode in ring for row in episode.rows] for ring in self.rings]

    def newest(self, least: int) -> list[list[tuple]]:
        """Rows of each episode of the newest tenth, or of as many as have `least` rows together.

        All running episodes count as one.
        """
        episodes = sorted((x for ring in self.rings for x in ring), key=lambda x: x.number)  # oldest first
        chosen, running = [], sum(x.number == math.inf for x in episodes)
        while episodes and (len(chosen) < self.tenth() + max(running - 1, 0) or sum(map(len, chosen)) < least):
            chosen.insert(0, episodes.pop().rows)
        return chosen

    def best(self, least: int) -> list[list[tuple]]:
        """Rows of each episode of the best tenth, or of as many as have `least` rows; of equal ones, the newest."""
        episodes = sorted((x for ring in self.rings for x in ring), key=lambda x: x.number)
        order = sorted(range(len(episodes)), key=lambda i: (episodes[i].score, i))
        chosen: list[int] = []
        while order and (len(chosen) < self.tenth() or sum(len(episodes[i].rows) for i in chosen) < least):
            chosen.append(order.pop())
        return [episodes[i].rows for i in sorted(chosen)]

    def tenth(self) -> int:
        return math.ceil(sum(map(len, self.rings)) / 10)


def windows_of(parts: list[list[tuple]], length: int) -> list[tuple]:
    """All windows of the rows of parts that follow each other in a circle; a part's first row is a seam."""
    rows = [(tag, first or i == 0, end) for part in parts for i, (tag, first, end) in enumerate(part)]
    windows = [[rows[(start + i) % len(rows)] for i in range(length)] for start in range(len(rows))]
    return sorted(tuple((tag, first or i == 0, end) for i, (tag, first, end) in enumerate(w)) for w in windows)


def windows_in(batch: Batch) -> set[tuple]:
    """The windows of a batch as the oracle has them."""
    columns = (x.T.tolist() for x in (tags(batch), batch.is_first, batch.is_terminal))
    return {tuple(zip(*window, strict=True)) for window in zip(*columns, strict=True)}


def filled(lengths: list[list[int]], capacity: int = 1000, seed: int = 0) -> ReplayBuffer:
    """A buffer with episodes of these many rows, one list an env; tags count on over all rows."""
    buffer, tag = ReplayBuffer(capacity, len(lengths), IMAGE_SHAPE, 2, seed), 0
    for env, episodes in enumerate(lengths):
        for length in episodes:
            for i in range(length):
                buffer.add(transition(tag, is_first=i == 0), env)
                tag += 1
    return buffer


@settings(max_examples=500, deadline=None)
@given(st.data())
def test_windows_equal_a_naive_lists(data):
    """The windows are a naive list's, all and only: aligned, with all seams flagged, without overwritten rows.

    Several envs, wrap-around, running, finished and terminal episodes, windows longer than the replay; and those of
    the newest and of the best tenth.
    """
    num_envs, rows, length = (data.draw(st.integers(1, high)) for high in (3, 12, 5))
    spare = data.draw(st.integers(0, num_envs - 1))  # rows of capacity that can't be shared equally
    buffer = ReplayBuffer(num_envs * rows + spare, num_envs, IMAGE_SHAPE, 2, seed=data.draw(st.integers(0, 9)))
    naive, running, number = NaiveReplay(rows, num_envs), set(), 0
    steps = data.draw(st.lists(st.tuples(st.integers(0, num_envs - 1), st.integers(0, 5)), max_size=60))
    for tag, (env, event) in enumerate(steps):
        row = transition(tag, is_first=env not in running, is_terminal=event == 1)
        buffer.add(row, env)
        naive.add(env, row)
        running.add(env)
        if event < 2:
            buffer.finish(env, number)
            naive.finish(env, number)
            running, number = running - {env}, number + 1
    held = sum(map(len, naive.all_rows()))
    assert len(buffer) == held and buffer.full == (held == num_envs * rows)
    if not held:
        with pytest.raises(ValueError, match="no row"):
            buffer.sample(1, length)
        return
    batch = buffer.sample(40 * held, length)  # misses a window once in e^40
    assert batch.image.dtype == torch.uint8 and batch.reward.shape == (length, 40 * held)
    assert sorted(windows_in(batch)) == windows_of(naive.all_rows(), length)
    buffer.focus = 1.0
    batch = buffer.sample(80 * held, length)
    newest, best = (Batch(*(x[:, half] for x in batch)) for half in (slice(40 * held), slice(40 * held, None)))
    assert sorted(windows_in(newest)) == windows_of(naive.newest(length), length)
    assert sorted(windows_in(best)) == windows_of(naive.best(length), length)


def test_every_row_is_equally_likely():
    """In each place of a window, whatever row of an episode it is and in whatever episode and env (chi-square).

    Episodes of one row, shorter and longer than a window, a half overwritten one, running ones, an env without rows.
    """
    buffer, length, draws = filled([[20, 7, 1, 4, 3], [9], [], [2]], capacity=4 * 28, seed=1), 6, 40_000
    batch = tags(buffer.sample(draws, length))
    rows = [*range(7, 35), *range(35, 46)]  # the first 7 are overwritten
    for place in batch:
        counts = place.bincount()
        assert counts.nonzero().flatten().tolist() == rows
        expected = draws / len(rows)
        assert ((counts[rows] - expected) ** 2 / expected).sum() < 70.7  # 99.9 % quantile at 38 degrees of freedom


@pytest.mark.parametrize("episode_rows", [3, 8, 40, 400])
def test_first_middle_and_last_rows_have_their_shares(episode_rows):
    """A batch has those of the replay, whether episodes are shorter or longer than a window."""
    buffer = ReplayBuffer(3000, 2, IMAGE_SHAPE, 2, seed=0)
    for tag in range(4000):
        i = tag // 2 % episode_rows
        kind = 1 if i == 0 else 3 if i == episode_rows - 1 else 2
        buffer.add(transition(kind, is_first=i == 0, is_terminal=kind == 3), tag % 2)
    held = buffer.reward.long().bincount() / len(buffer)
    batches = [buffer.sample(16, 25) for _ in range(1000)]
    kinds = torch.cat([tags(batch) for batch in batches], 1)
    drawn = kinds.flatten().bincount() / kinds.numel()
    deviation = (held * (1 - held) / 16_000).sqrt()  # as if all rows of a window were alike
    assert ((drawn - held).abs() <= 4 * deviation).all(), (drawn, held)
    assert torch.equal(torch.cat([batch.is_terminal for batch in batches], 1), kinds == 3)
    assert all(batch.is_first[tags(batch) == 1].all() and batch.is_first[0].all() for batch in batches)


class ShortEpisodes(FakeEnv):
    """Four fifths of the episodes are solved and ended by the task after a few steps."""

    share = 0.8

    def step(self, action):
        image, reward, _, truncated, info = super().step(action)
        ends = self.steps == 3 and self.np_random.uniform() < self.share
        return image, 7.0 if ends else reward, ends, truncated, {"success": ends}


@pytest.mark.parametrize("num_envs", [1, 3])
def test_a_run_trains_on_the_ends_of_short_episodes(num_envs, tmp_path, monkeypatch):
    """500 batches hold terminal and rewarded rows in their share, where no episode is as long as a sequence."""
    made = []
    monkeypatch.setattr(run, "make_replay", lambda *args: made.append(make_replay(*args)) or made[-1])
    flags = f"--num_envs {num_envs} --steps 360 --capacity 240 --batch_length 30 --train_every 50 --eval_every 1000"
    assert train(tmp_path / "run", f"{flags} --eval_episodes 1 --replay_focus 0", ShortEpisodes) == 0
    replay = made[0]
    assert max(episode.length for episodes in replay.episodes for episode in episodes) < 30
    batches = [replay.sample(4, 30) for _ in range(500)]
    rows = np.concatenate([replay._index(env, x.start, x.length) for env, e in enumerate(replay.episodes) for x in e])
    for name, is_end in (("is_terminal", lambda x: x), ("reward", lambda x: x == 7)):
        share = is_end(getattr(replay, name)[rows]).float().mean()
        drawn = torch.stack([is_end(getattr(batch, name)).float().mean() for batch in batches]).mean()
        assert share > 0.05 and abs(drawn / share - 1) < 0.05, (name, share, drawn)


def test_a_replay_of_short_episodes_is_prefilled_when_it_is_full(tmp_path, monkeypatch):
    """Where so many rows are resets that it never holds `prefill` steps, a run learns all the same."""
    monkeypatch.setattr(ShortEpisodes, "share", 1)  # a quarter of the rows are resets
    flags = "--capacity 60 --prefill 55 --steps 200 --eval_every 1000 --eval_episodes 1"
    assert train(tmp_path / "run", flags, ShortEpisodes) == 0
    assert newest_state(tmp_path / "run")["agent"]["updates"] > 10


def work(function: Callable[[], object]) -> int:
    """The bytecodes that a call executes in Python, in all functions."""
    count = 0

    def trace(frame, event, _):
        nonlocal count
        frame.f_trace_opcodes = True
        count += event == "opcode"
        return trace

    before = sys.gettrace()
    gc.disable()  # what it calls is not the function's work
    sys.settrace(trace)
    try:
        function()
    finally:
        sys.settrace(before)
        gc.enable()
    return count


@pytest.mark.parametrize("focus", [0.0, 0.5])
def test_python_work_does_not_grow_with_the_episodes(focus):
    """Sampling, adding a row and finishing an episode take as many bytecodes at 5,000 episodes as at 50."""
    figures = []
    for episodes in (50, 5000):
        buffer = ReplayBuffer(2 * episodes, 2, (1, 1, 1), 1, seed=0, focus=focus)
        row = Transition(np.zeros((1, 1, 1), np.uint8), np.zeros(1), 0.0, True, False)
        for number in range(episodes + 10):  # the oldest are overwritten
            for is_first in (True, False):
                buffer.add(row._replace(is_first=is_first, reward=number % 7), number % 2)
            buffer.finish(number % 2, number)
        assert sum(map(len, buffer.episodes)) == buffer.finished.shape[1] == episodes and buffer.full
        figures.append([work(call) for call in calls(buffer, row)])
    assert figures[0] == figures[1] and min(figures[0]) > 50, figures


def calls(buffer: ReplayBuffer, row: Transition) -> list[Callable[[], object]]:
    """What a run does in an episode."""
    sample = lambda: buffer.sample(16, 25)  # noqa: E731
    return [sample, sample, lambda: buffer.add(row), sample, lambda: buffer.finish(0, 10**6), sample]


def test_the_counter_of_work_notices_a_loop():
    """A comprehension over what grows is seen: the test above can fail."""
    assert work(lambda: [x + 1 for x in range(1000)]) > work(lambda: [x + 1 for x in range(10)]) + 1000


def test_sampling_reads_no_number_from_the_device():
    """On a device without numbers it works too, so it can't wait for any."""
    buffer = ReplayBuffer(40, 2, IMAGE_SHAPE, 2, seed=0, focus=0.5, device="meta")
    for tag in range(30):
        buffer.add(transition(tag, is_first=tag % 10 < 2), tag % 2)
    batch = buffer.sample(8, 5)
    assert batch.image.shape == (5, 8, *IMAGE_SHAPE) and all(x.device.type == "meta" for x in batch)


def test_a_gpu_fetches_from_pinned_memory(monkeypatch):
    """So that the host need not wait until earlier work on the GPU is done."""
    batch, asked = filled([[9]]).sample(2, 3), []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: asked.append("pinned") or x)
    monkeypatch.setattr(torch.Tensor, "to", lambda x, *args, **kwargs: asked.append((args, kwargs)) or x)
    batch.to("cuda")
    assert asked == ["pinned", (("cuda",), {"non_blocking": True})] * len(batch)


@pytest.mark.parametrize("running", [False, True])
def test_focus_draws_from_the_newest_and_the_best_episodes(running):
    """With a focus of 0.5, a quarter of the windows is of the newest tenth and one of the best tenth of episodes."""
    buffer = ReplayBuffer(1000, 2, IMAGE_SHAPE, 2, seed=0, focus=0.5)
    best, count = (3, 11, 12) if running else (3, 11), 20
    for number in range(count + running):
        for i in range(6):
            row = transition(number, is_first=i == 0)
            buffer.add(row._replace(reward=float(number in best) - 2), number % 2)  # a running one has no return yet
        if number < count:
            buffer.finish(number % 2, number)
    newest = (18, 19, 20) if running else (18, 19)
    episodes = torch.stack([buffer.sample(16, 4).action[0, :, 0] for _ in range(1000)])  # (1000, 16), their tags
    assert np.isin(episodes[:, :4], newest).all() and np.isin(episodes[:, 4:8], best).all()
    shares = episodes[:, 8:].long().flatten().bincount(minlength=len(episodes[0])) / episodes[:, 8:].numel()
    assert (shares[: count + running] - 1 / (count + running)).abs().max() < 0.015
    buffer.focus = 0.0
    assert np.isin(buffer.sample(1000, 4).action[0, :, 0], best).mean() < 0.2
    buffer.focus = 1.0
    assert all(buffer.sample(size, 4).action.shape[1] == size for size in range(1, 9))


def test_the_best_episode_is_the_one_with_the_largest_reward():
    """One that solves the task at its very end is better than those with a higher return; of equals, that decides."""
    buffer = ReplayBuffer(1000, 1, IMAGE_SHAPE, 2, seed=0, focus=1.0)
    late, early = [0.1] * 9 + [1.0], [0.1] * 3 + [1.0] * 7
    for number, rewards in enumerate([[0.45] * 10, late, [0.45] * 10, early]):
        for i, reward in enumerate(rewards):
            buffer.add(transition(number, is_first=i == 0)._replace(reward=reward), 0)
        buffer.finish(0, number)
    scores = [episode.score for episode in buffer.episodes[0]]
    assert scores[0] == scores[2] < scores[1] < scores[3]
    assert (buffer.sample(16, 4).action[:, 8:, 0] == 3).all()


def test_of_costs_the_smallest_makes_the_best_episode():
    """Where all rewards are negative, one that comes near is better than one that soon ends or fails at its reset."""
    buffer = ReplayBuffer(1000, 1, IMAGE_SHAPE, 2, seed=0)
    for number, rewards in enumerate([[], [-1.0] * 2, [-1.0] * 50, [-1.0] * 60 + [-0.01] * 40]):
        for i, reward in enumerate([0.0, *rewards]):
            buffer.add(transition(number, is_first=i == 0)._replace(reward=reward), 0)
        buffer.finish(0, number)
    nothing, short, long, near = (episode.score for episode in buffer.episodes[0])
    assert nothing < long < short < near


def test_a_first_success_among_many_episodes_is_drawn_often():
    """Of 500 episodes, ten count as the best: the only one with success is in a twentieth of their windows or more."""
    buffer = ReplayBuffer(10_000, 1, IMAGE_SHAPE, 2, seed=0, focus=1.0)
    for number in range(500):
        for i in range(8):
            buffer.add(transition(number, is_first=i == 0)._replace(reward=1.0 if number == 200 else 0.45), 0)
        buffer.finish(0, number)
    drawn = buffer.sample(2000, 4).action[0, 1000:, 0]
    assert len(drawn.unique()) == 10 and (drawn == 200).float().mean() > 0.05


def test_a_score_is_the_same_from_memory_and_from_a_file():
    """What ranks an episode is the same to the last bit after its way through a file, also once rows are forgotten."""
    buffer, other = (ReplayBuffer(100, 1, IMAGE_SHAPE, 2, seed=0) for _ in range(2))
    for i in range(30):
        buffer.add(transition(i, is_first=i == 0)._replace(reward=0.1 * i), 0)
    buffer.finish(0, 0)
    other.load(0, buffer.export(0, buffer.episodes[0][0]), 12, 0, "file")
    assert other.episodes[0][0].length == 12
    assert other.episodes[0][0].score == buffer.episodes[0][0].score > 2.9


def test_sampling_is_reproducible_and_apart():
    """The seed alone decides what is sampled, and the global generators are left alone."""
    numpy_state, torch_state, python_state = np.random.get_state()[1], torch.get_rng_state(), random.getstate()
    one, same, other = (filled([[50], [30]], seed=seed) for seed in (3, 3, 4))
    first, second = ([tags(buffer.sample(16, 5)) for _ in range(3)] for buffer in (one, same))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not torch.equal(first[0], first[1]) and not torch.equal(first[0], tags(other.sample(16, 5)))
    assert np.array_equal(np.random.get_state()[1], numpy_state) and random.getstate() == python_state
    assert torch.equal(torch.get_rng_state(), torch_state)


def test_full_buffer_overwrites_the_oldest_rows_in_place():
    """A full ring holds the newest rows, in the memory it began with, and other envs' rows are untouched."""
    buffer = ReplayBuffer(20, 2, IMAGE_SHAPE, 2, seed=0)
    memory = [x.data_ptr() for x in (buffer.image, buffer.action, buffer.reward, buffer.is_terminal)]
    buffer.add(transition(999, is_first=True), env=1)
    for tag in range(300):
        buffer.add(transition(tag, is_first=tag % 7 == 0))
    assert len(buffer) == 11
    assert set(tags(buffer.sample(1000, 1)).flatten().tolist()) == {*range(290, 300), 999}
    assert memory == [x.data_ptr() for x in (buffer.image, buffer.action, buffer.reward, buffer.is_terminal)]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_rows_are_refused(bad):
    """A reward or action that isn't finite is refused by name of its env, and leaves the replay as it was."""
    buffer = filled([[5], [6]])
    before = tags(buffer.sample(1000, 5)).unique()
    for row in (transition(7)._replace(reward=bad), transition(7)._replace(action=np.float32([0, bad]))):
        with pytest.raises(ValueError, match="env 1"):
            buffer.add(row, env=1)
    assert len(buffer) == 11 and torch.equal(tags(buffer.sample(1000, 5)).unique(), before)


@pytest.mark.parametrize("image", [np.full(IMAGE_SHAPE, np.nan), np.zeros((3, 4, 4), np.uint8)], ids=["NaN", "shape"])
def test_images_of_another_type_or_shape_are_refused(image):
    """Floats, and with them NaNs, never reach the replay, which stays as it was."""
    buffer = filled([[5]])
    with pytest.raises(ValueError, match="image from env 0 is"):
        buffer.add(transition(7)._replace(image=image))
    assert len(buffer) == 5


def test_a_ring_starts_with_an_episodes_start():
    """An env's first row must start an episode."""
    buffer = filled([[3], []])
    with pytest.raises(ValueError, match="env 1"):
        buffer.add(transition(0), env=1)


def test_sampling_too_early_is_a_clear_error():
    """While there is no row, sampling says so; from the first row on it works."""
    with pytest.raises(ValueError, match="the replay holds no row yet"):
        filled([[], []]).sample(2, 5)
    assert tags(filled([[], [1]]).sample(2, 5)).tolist() == [[0, 0]] * 5


def test_an_episode_that_has_just_begun_does_not_fill_a_batch():
    """While running episodes have few rows, the newest that are finished are drawn from with them."""
    buffer = ReplayBuffer(1000, 2, IMAGE_SHAPE, 2, seed=0, focus=1.0)
    for number in range(8):
        for i in range(20):
            buffer.add(transition(number, is_first=i == 0), number % 2)
        buffer.finish(number % 2, number)
    for env in range(2):
        buffer.add(transition(8 + env, is_first=True), env)
    newest = Counter(tags(buffer.sample(4000, 10))[:, :2000].flatten().tolist())
    assert newest.keys() == {7, 8, 9} and newest[7] > 0.85 * newest.total()


def test_batch_moves_as_a_whole():
    """Batch.to moves every tensor and changes no value."""
    batch = filled([[9]]).sample(2, 3)
    assert all(x.device.type == "meta" for x in batch.to("meta"))
    assert all(torch.equal(a, b) for a, b in zip(batch, batch.to("cpu"), strict=True))
