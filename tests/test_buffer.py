import random
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from buffer import Batch, ReplayBuffer, Transition

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


class NaiveReplay:
    """The oracle: per env a list of episodes, each a list of (tag, is_terminal)."""

    def __init__(self, rows: int, num_envs: int):
        self.rows, self.episodes = rows, [[] for _ in range(num_envs)]

    def add(self, env: int, row: Transition) -> None:
        episodes = self.episodes[env]
        if row.is_first:
            episodes.append([])
        episodes[-1].append((int(row.reward), row.is_terminal))
        if sum(map(len, episodes)) > self.rows:
            episodes[0].pop(0)
            if not episodes[0]:
                episodes.pop(0)

    def windows(self, length: int) -> Iterator[tuple]:
        for episode in (episode for episodes in self.episodes for episode in episodes):
            for start in range(len(episode) - length + 1):
                yield tuple(episode[start : start + length])


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
    """The windows are a naive list's, all and only: aligned, inside an episode, without overwritten rows.

    Several envs, wrap-around, running and terminal episodes; only row 0 of a window has is_first.
    """
    num_envs, rows, length = (data.draw(st.integers(1, high)) for high in (3, 12, 5))
    spare = data.draw(st.integers(0, num_envs - 1))  # rows of capacity that can't be shared equally
    buffer = ReplayBuffer(num_envs * rows + spare, num_envs, IMAGE_SHAPE, 2, seed=data.draw(st.integers(0, 9)))
    naive, started = NaiveReplay(rows, num_envs), set()
    steps = data.draw(st.lists(st.tuples(st.integers(0, num_envs - 1), st.integers(0, 5)), max_size=60))
    for tag, (env, event) in enumerate(steps):
        row = transition(tag, is_first=event == 0 or env not in started, is_terminal=event == 1)
        started = started - {env} if row.is_terminal else started | {env}
        buffer.add(row, env)
        naive.add(env, row)
    assert len(buffer) == sum(len(episode) for episodes in naive.episodes for episode in episodes)
    expected = sorted(naive.windows(length))
    if not expected:
        with pytest.raises(ValueError, match=f"{length} rows"):
            buffer.sample(1, length)
        return
    batch = buffer.sample(40 * len(expected), length)  # misses a window once in e^40
    assert batch.image.dtype == torch.uint8 and batch.reward.shape == (length, 40 * len(expected))
    assert batch.is_first[0].all() and not batch.is_first[1:].any()
    columns = zip(tags(batch).T.tolist(), batch.is_terminal.T.tolist(), strict=True)
    assert sorted({tuple(zip(*column, strict=True)) for column in columns}) == expected


def test_windows_are_equally_likely():
    """Every window is as likely as any other, whatever episode and env it lies in (chi-square)."""
    buffer, length, draws = filled([[7, 4, 3], [9]], seed=1), 4, 22_000
    first = tags(buffer.sample(draws, length))[0].bincount()
    first = first[first > 0]
    assert len(first) == 4 + 1 + 6
    expected = draws / len(first)
    assert ((first - expected) ** 2 / expected).sum() < 29.6  # 99.9 % quantile at 10 degrees of freedom


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


def test_a_return_is_the_same_from_memory_and_from_a_file():
    """What ranks an episode is the same to the last bit after its way through a file, also once rows are forgotten."""
    buffer, other = (ReplayBuffer(100, 1, IMAGE_SHAPE, 2, seed=0) for _ in range(2))
    for i in range(30):
        buffer.add(transition(i, is_first=i == 0)._replace(reward=0.1 * i), 0)
    buffer.finish(0, 0)
    other.load(0, buffer.export(0, buffer.episodes[0][0]), 12, 0, "file")
    assert other.episodes[0][0].length == 12
    assert other.episodes[0][0].total == buffer.episodes[0][0].total > 43


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
    """While no episode has as many rows as a window, sampling says so and names the number."""
    for buffer in (filled([[]]), filled([[4, 4], [3]])):
        with pytest.raises(ValueError, match="no episode in replay has 5 rows"):
            buffer.sample(2, 5)


def test_batch_moves_as_a_whole():
    """Batch.to moves every tensor and changes no value."""
    batch = filled([[9]]).sample(2, 3)
    assert all(x.device.type == "meta" for x in batch.to("meta"))
    assert all(torch.equal(a, b) for a, b in zip(batch, batch.to("cpu"), strict=True))
