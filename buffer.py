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

A batch is made of windows: successive rows of all rings, one ring after the other. A window runs on from an episode
into the next one, from a ring's newest row into the next ring's oldest, and from the last ring into the first.
`is_first` is set at each such seam, and in the window's row 0:

    ring 0     x5 x6 x7 | y0 y1 y2 y3        x0 to x4 are overwritten; y is still running
    ring 1     z0 z1 z2
    window        x6 x7 | y0 y1 y2 y3 | z0
    is_first       1  0    1  0  0  0    1

So every row is equally likely to be trained on, those at the ends of episodes like those in the middle. A part of the
windows (`focus`) is made of some episodes only: there, every row of these is equally likely.
"""

import math
from collections import deque
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

BEST = 10  # episodes at most: with more of them, a first success would hardly be sampled
RETURN_SHARE = 1e-4  # what the return counts in an episode's score


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
        return Batch(*(moved(x, device) for x in self))


@dataclass
class Episode:
    """Rows `start .. start + length - 1` of a ring, counted without wrapping around."""

    start: int
    length: int
    number: int = -1  # of a finished episode, in the order in which they finished; -1: it is running
    score: float = 0.0  # how good a finished episode is
    file: str = ""  # that keeps the rows of a finished episode; empty: none does


class ReplayBuffer:
    """Replay of windows of rows, those of running episodes included.

    Args:
        capacity: rows in all, shared equally by the environments.
        num_envs: environments that write.
        image_shape, action_size: (C, H, W) and A.
        seed: of the sampling generator, which is the buffer's own.
        focus: share of the windows that are made of the newest and of the best tenth of the episodes (of the
            best ten, if that is fewer, by `_score`), half of it each. The other windows are made of all rows.
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
        self.is_first = torch.empty(total, dtype=torch.bool, device=device)
        self.is_terminal = torch.empty(total, dtype=torch.bool, device=device)
        self.written = [0] * num_envs  # rows ever written into each ring
        self.episodes: list[deque[Episode]] = [deque() for _ in range(num_envs)]
        self.finished = np.empty((5, 0))  # of each finished one: ring, first row, end, number, score; by number
        self.rng, self.focus = np.random.default_rng(seed), focus

    def __len__(self) -> int:
        """Rows held."""
        return sum(min(n, self.rows) for n in self.written)

    @property
    def steps(self) -> int:
        """Agent steps held: rows without those of resets."""
        return len(self) - sum(len(episodes) for episodes in self.episodes)

    @property
    def full(self) -> bool:
        """Whether each new row overwrites an old one."""
        return len(self) == len(self.image)

    @property
    def row_bytes(self) -> int:
        """Memory of a row."""
        return sum(x[0].nbytes for x in (self.image, self.action, self.reward, self.is_first, self.is_terminal))

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
        self.image[row] = moved(torch.as_tensor(image), self.image.device)
        self.action[row] = moved(torch.as_tensor(transition.action), self.image.device)
        # Assigned, a number would be copied to a GPU, and the host would wait for all that the GPU has to do before.
        self.reward[row].fill_(float(transition.reward))
        self.is_first[row].fill_(bool(transition.is_first))
        self.is_terminal[row].fill_(bool(transition.is_terminal))
        episodes[-1].length += 1
        self.written[env] += 1
        self._forget(env)

    def finish(self, env: int, number: int) -> None:
        """Say that the newest episode of `env` has ended, as the run's finished episode `number`."""
        episode = self.episodes[env][-1]
        rows = self._index(env, episode.start, episode.length)
        episode.number, episode.score = number, _score(self.reward[rows].cpu().numpy())
        self._tabulate(env, episode)

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
        self.is_first[rows] = torch.arange(length, device=rows.device) == 0  # also where first rows are missing
        episode = Episode(self.written[env], length, number, _score(columns["reward"]), file)
        self.episodes[env].append(episode)
        self.written[env] += length
        self._forget(env)
        self._tabulate(env, episode)

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
            if episodes[0].length == 0 and (number := episodes.popleft().number) >= 0:
                self.finished = np.delete(self.finished, np.searchsorted(self.finished[3], number), axis=1)

    def _tabulate(self, env: int, episode: Episode) -> None:
        """Enter a finished episode into the table, which spares sampling a look at each `Episode`."""
        entry = env, episode.start, episode.start + episode.length, episode.number, episode.score
        self.finished = np.insert(self.finished, np.searchsorted(self.finished[3], episode.number), entry, axis=1)

    def sample(self, batch_size: int, batch_length: int) -> Batch:
        """`batch_size` windows of `batch_length` rows as (T, B, ...); each row is equally likely, but for `focus`.

        The host never waits for a GPU here. Raises ValueError while there is no row.
        """
        if not len(self):
            raise ValueError("the replay holds no row yet")
        oldest = np.maximum(np.array(self.written) - self.rows, 0)  # row that each ring holds
        part = min(round(self.focus * batch_size / 2), batch_size // 2)
        groups = [(parts, part) for parts in self._newest_and_best(oldest, batch_length)] if part else []
        groups.append((np.stack([np.arange(len(oldest)), oldest, self.written]), batch_size - 2 * part))
        env, row, seam = np.concatenate([_windows(self.rng, *group, batch_length) for group in groups], axis=-1)
        index, seam = moved(torch.as_tensor(np.stack([env * self.rows + row % self.rows, seam])), self.image.device)
        is_first = self.is_first[index] | seam.bool()
        return Batch(self.image[index], self.action[index], self.reward[index], is_first, self.is_terminal[index])

    def _newest_and_best(self, oldest: np.ndarray, rows: int) -> tuple[np.ndarray, np.ndarray]:
        """The newest and the best tenth of the episodes, at most BEST of these, each as ring, first row and end (3, n).

        Running episodes have no score yet; all of them are among the newest, where they count as one. While a tenth has
        fewer than `rows` rows, the next episodes are added: a window would repeat the few rows of an episode that has
        just begun, or that its task soon ends.
        """
        last = [(env, x[-1], self.written[env]) for env, x in enumerate(self.episodes) if x]
        running = [(env, x.start, end, x.number, -np.inf) for env, x, end in last if x.number < 0]
        table = np.concatenate([self.finished, np.reshape(running, (-1, 5)).T], axis=1)
        parts = table[:3].astype(int)
        parts[1] = np.maximum(parts[1], oldest[parts[0]])
        tenth = math.ceil(table.shape[1] / 10)
        lengths = parts[2] - parts[1]

        def final(order: np.ndarray, count: int) -> np.ndarray:
            return order[-max(count, 1 + int(np.searchsorted(lengths[order[::-1]].cumsum(), rows))) :]

        newest = final(np.arange(len(lengths)), tenth + len(running[1:]))
        best = final(np.argsort(table[4], kind="stable"), min(tenth, BEST))  # of equal score, the last ones
        return parts[:, newest], parts[:, np.sort(best)]


def _windows(rng: np.random.Generator, parts: np.ndarray, count: int, length: int) -> np.ndarray:
    """Ring, row and whether it is a seam (3, length, count) of `count` windows.

    `parts` has ring, first row and end (3, n) of what the windows are made of. The parts follow each other in a circle,
    so that each of their rows is equally likely, also if a window is longer than all of them.
    """
    env, start, end = parts
    ends = (end - start).cumsum()
    position = (rng.integers(ends[-1], size=count) + np.arange(length)[:, None]) % ends[-1]
    part = np.searchsorted(ends, position, side="right")
    row = end[part] - ends[part] + position
    seam = row == start[part]
    seam[0] = True
    return np.stack([env[part], row, seam])


def moved(x: Tensor, device: torch.device | str) -> Tensor:
    """The same on another device. A GPU fetches it from pinned memory by itself, while the host goes on."""
    if x.device.type == "cpu" and torch.device(device).type == "cuda":
        return x.pin_memory().to(device, non_blocking=True)
    return x.to(device)


def _score(reward: np.ndarray) -> float:
    """How good an episode is: its largest reward, plus a little of its return, which ranks those that solve the task.

    The row of its reset counts in neither. By returns alone, an episode that solves the task at its very end would rank
    behind those that never do. The score is the same to the last bit whether its rows come from memory or from a file.
    """
    return float(reward[1:].max(initial=-np.inf)) + RETURN_SHARE * float(reward.sum(dtype=np.float64))
