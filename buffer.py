"""Experience replay of uint8 images in preallocated memory.

One row is one agent step, and everything in a row belongs together:

    row      0          1          2        ...  n
    image    x0 (reset) x1         x2            xn
    action   zeros      a1 -> x1   a2 -> x2      an -> xn      the action that LED TO the row's image
    reward   0          r1         r2            rn            received with that image
    is_first 1          0          0             0
    is_terminal 0       0          0             1 only if the task ended there; a time limit is no end

An episode of n agent steps has n + 1 rows. Each environment writes into a ring of its own; a full ring forgets its
oldest row for each new one. No other code shifts an index.
"""

import math
from collections import deque
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class Transition(NamedTuple):
    """One row: image uint8 (C, H, W), action (A,), and scalars."""

    image: np.ndarray
    action: np.ndarray
    reward: float
    is_first: bool
    is_terminal: bool


class Batch(NamedTuple):
    """Sequences of rows, time first."""

    image: Tensor  # (T, B, C, H, W) uint8
    action: Tensor  # (T, B, A) float32
    reward: Tensor  # (T, B) float32
    is_first: Tensor  # (T, B) bool
    is_terminal: Tensor  # (T, B) bool

    def to(self, device: torch.device | str) -> "Batch":
        """The same on another device."""
        # From unpinned memory CUDA has read everything when a copy returns; MPS might still be reading what is freed.
        return Batch(*(x.to(device, non_blocking=torch.device(device).type == "cuda") for x in self))


@dataclass
class Episode:
    """Rows `start .. start + length - 1` of a ring, counted without wrapping around."""

    start: int
    length: int
    number: int = -1  # of a finished episode, in the order in which they finished; -1: it is running
    total: float = 0.0  # return of a finished episode
    file: str = ""  # that keeps the rows of a finished episode; empty: none does


class ReplayBuffer:
    """Replay of windows that lie inside one episode; running episodes are included.

    Args:
        capacity: rows in all, shared equally by the environments.
        num_envs: environments that write.
        image_shape, action_size: (C, H, W) and A.
        seed: of the sampling generator, which is the buffer's own.
        focus: share of the windows that come from the newest and from the best tenth of the episodes, half of it
            each; the others, and without it all, are drawn uniformly.
        device: where the rows lie and batches are made.
    """

    COLUMNS = ("image", "action", "reward", "is_terminal")

    def __init__(
        self,
        capacity: int,
        num_envs: int,
        image_shape: tuple[int, int, int],
        action_size: int,
        seed: int,
        focus: float = 0.0,
        device: torch.device | str = "cpu",
    ):
        self.rows = capacity // num_envs
        total = self.rows * num_envs
        self.image = torch.empty((total, *image_shape), dtype=torch.uint8, device=device)
        self.action = torch.empty((total, action_size), device=device)
        self.reward = torch.empty(total, device=device)
        self.is_terminal = torch.empty(total, dtype=torch.bool, device=device)
        self.written = [0] * num_envs  # rows ever written into each ring
        self.episodes: list[deque[Episode]] = [deque() for _ in range(num_envs)]
        self.rng, self.focus = np.random.default_rng(seed), focus

    def __len__(self) -> int:
        """Rows held."""
        return sum(min(n, self.rows) for n in self.written)

    @property
    def steps(self) -> int:
        """Agent steps held: rows without those of resets."""
        return len(self) - sum(len(episodes) for episodes in self.episodes)

    @property
    def row_bytes(self) -> int:
        """Memory of a row."""
        return sum(x[0].nbytes for x in (self.image, self.action, self.reward, self.is_terminal))

    def bytes(self, steps: int) -> int:
        """Memory, and disk, that the rows of `steps` agent steps take, or of a full buffer if that is less."""
        return self.row_bytes * min(len(self.image), int(1.1 * steps))

    def add(self, transition: Transition, env: int = 0) -> None:
        """Append a row to the ring of `env`; refuses what training could not survive (ValueError)."""
        if not np.isfinite(transition.reward) or not np.isfinite(transition.action).all():
            raise ValueError(f"non-finite reward {transition.reward} or action {transition.action} from env {env}")
        image = np.asarray(transition.image)
        if image.dtype != np.uint8 or image.shape != self.image.shape[1:]:
            shape = tuple(self.image.shape[1:])
            raise ValueError(f"image from env {env} is {image.dtype} {image.shape}, expected uint8 {shape}")
        episodes, position = self.episodes[env], self.written[env]
        if transition.is_first:
            episodes.append(Episode(position, 0))
        elif not episodes:
            raise ValueError(f"the first row of env {env} must be the start of an episode")
        row = env * self.rows + position % self.rows
        self.image[row] = torch.as_tensor(image)
        self.action[row] = torch.as_tensor(transition.action)
        self.reward[row] = float(transition.reward)
        self.is_terminal[row] = bool(transition.is_terminal)
        episodes[-1].length += 1
        self.written[env] += 1
        self._forget(env)

    def finish(self, env: int, number: int) -> None:
        """Say that the newest episode of `env` has ended, as the run's finished episode `number`."""
        episode = self.episodes[env][-1]
        rows = self._index(env, episode.start, episode.length)
        episode.number, episode.total = number, _total(self.reward[rows].cpu().numpy())

    def export(self, env: int, episode: Episode) -> dict[str, np.ndarray]:
        """Copies of the rows that are left of an episode of `env`: name -> (length, ...), for `load`."""
        rows = self._index(env, episode.start, episode.length)
        return {name: getattr(self, name)[rows].cpu().numpy() for name in self.COLUMNS}

    def load(self, env: int, columns: dict[str, np.ndarray], length: int, number: int, file: str) -> None:
        """Append the last `length` rows of a finished episode, as exported, to the ring of `env`.

        Raises ValueError, and changes nothing, where a column is missing or of another shape or type than this
        buffer's.
        """
        total = len(columns.get("reward", ()))
        length = min(length, total, self.rows)
        for name in self.COLUMNS:
            ours = getattr(self, name)
            dtype = torch.empty(0, dtype=ours.dtype).numpy().dtype
            column = columns.get(name)
            if column is None or column.dtype != dtype or column.shape != (total, *ours.shape[1:]):
                raise ValueError(f"{file} has no column {name} of {dtype} {tuple(ours.shape[1:])}")
        rows = self._index(env, self.written[env], length)
        for name in self.COLUMNS:
            getattr(self, name)[rows] = torch.as_tensor(columns[name][-length:], device=rows.device)
        self.episodes[env].append(Episode(self.written[env], length, number, _total(columns["reward"]), file))
        self.written[env] += length
        self._forget(env)

    def _index(self, env: int, start: int, length: int) -> Tensor:
        """Where the rows `start .. start + length - 1` of a ring lie."""
        return env * self.rows + torch.arange(start, start + length, device=self.image.device) % self.rows

    def _forget(self, env: int) -> None:
        """Drop the rows that were just overwritten from the oldest episodes."""
        episodes, first_kept = self.episodes[env], self.written[env] - self.rows
        while episodes[0].start < first_kept:
            lost = min(first_kept - episodes[0].start, episodes[0].length)
            episodes[0].start += lost
            episodes[0].length -= lost
            if episodes[0].length == 0:
                episodes.popleft()

    def sample(self, batch_size: int, batch_length: int) -> Batch:
        """`batch_size` windows of `batch_length` rows as (T, B, ...), each window equally likely but for `focus`.

        Row 0 of every window has `is_first` set: the model starts from its initial state there, also in
        mid-episode. Raises ValueError while no episode is long enough.
        """
        episodes = [
            (env, episode.start, episode.length - batch_length + 1, episode.number, episode.total)
            for env, episodes in enumerate(self.episodes)
            for episode in episodes
            if episode.length >= batch_length
        ]
        if not episodes:
            raise ValueError(f"no episode in replay has {batch_length} rows yet")
        env, start, windows, number, total = map(np.array, zip(*episodes, strict=True))
        total = np.where(number < 0, -np.inf, total)  # a running one has no return yet
        number = np.where(number < 0, number.max() + 1, number)  # and is the newest
        part = min(round(self.focus * batch_size / 2), batch_size // 2)
        draws = [
            self._draw(windows * _highest_tenth(number), part),
            self._draw(windows * _highest_tenth(total), part),
            self._draw(windows, batch_size - 2 * part),
        ]
        episode, offset = np.concatenate(draws, axis=1)
        first = start[episode] + offset
        position = (first + np.arange(batch_length)[:, None]) % self.rows  # (T, B)
        index = torch.as_tensor(env[episode] * self.rows + position, device=self.image.device)
        is_first = torch.zeros(index.shape, dtype=torch.bool, device=index.device)
        is_first[0] = True
        return Batch(self.image[index], self.action[index], self.reward[index], is_first, self.is_terminal[index])

    def _draw(self, windows: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Episode and offset in it of `count` windows, all equally likely, where episode i has `windows[i]` of them."""
        ends = windows.cumsum()
        drawn = self.rng.integers(ends[-1], size=count)
        episode = np.searchsorted(ends, drawn, side="right")
        return episode, drawn - (ends - windows)[episode]


def _highest_tenth(values: np.ndarray) -> np.ndarray:
    """Which of the values are among the highest tenth, at least one; the last of equal ones come first."""
    chosen = np.zeros(len(values), bool)
    chosen[np.argsort(values, kind="stable")[-math.ceil(len(values) / 10) :]] = True
    return chosen


def _total(reward: np.ndarray) -> float:
    """The return of an episode, the same to the last bit whether its rows come from memory or from a file."""
    return float(reward.sum(dtype=np.float64))
