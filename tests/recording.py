"""Recordings of the author's code: reading them, comparing with them, and replaying their random draws."""

import json
import math
import re
import zipfile
from collections import deque
from pathlib import Path
from typing import NoReturn

import numpy as np
import pytest
import torch
from torch import Tensor

from networks import Draws

# The largest |ours - theirs| / largest |theirs| of an array. An independent re-implementation reached 2e-6,
# 7e-6, 6e-5, 7e-7 and 2e-3: what remains is float32 rounding, which grows from update to update.
TOLERANCES = {
    "forward": 2e-5,  # of update 0
    "gradient": 1e-4,  # and the metrics of update 0
    "later": 5e-4,  # metrics of updates 1 and 2
    "weight": 2e-6,  # after optimizer steps
    "change": 5e-3,  # of a weight since the start
    "decay": 5e-2,  # the same where a weight only decays, by little more than its rounding error
    "zero": 1e-8,  # absolute, where all of the recorded array is zero
}


def refuse(reason: str) -> NoReturn:
    """Fail because of a recording that can't be replayed; `reason` names the file, the key or the setting."""
    pytest.fail(reason, pytrace=False)


class Recording:
    """A file pair NAME.npz and NAME.json. Knows which arrays are still unused and what did not match.

    Every comparison adds a row (file, quantity, error, tolerance) to `errors`.
    """

    def __init__(self, path: Path, errors: list[tuple[str, str, float, float]]):
        self.name = path.name
        files = path.with_name(f"{path.name}.npz"), path.with_name(f"{path.name}.json")
        for file in files:
            if not file.is_file():
                refuse(f"there is no {file}")
        try:
            with np.load(files[0]) as arrays:
                self.arrays = dict(arrays)
            self.info = json.loads(files[1].read_text())
        except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
            refuse(f"{path} can't be read: {error}")
        self.unused = set(self.arrays)
        self.errors = errors
        self.failures: list[str] = []

    def below(self, prefix: str) -> list[str]:
        """Keys that begin with `prefix`."""
        return [key for key in self.arrays if key.startswith(prefix)]

    def entries(self, part: str) -> list[str]:
        """part/0, part/1, ... as far as there are arrays below them."""
        return sorted({m[0] for key in self.arrays if (m := re.match(rf"{part}/\d+(?=/)", key))})

    def entry(self, name: str):
        """Of the json."""
        if name not in self.info:
            refuse(f"{self.name}.json lacks {name}")
        return self.info[name]

    def array(self, key: str) -> Tensor:
        if key not in self.arrays:
            refuse(f"{self.name}.npz lacks {key}")
        self.unused.discard(key)
        return torch.from_numpy(self.arrays[key])

    def arrays_below(self, prefix: str, names: str) -> list[Tensor]:
        return [self.array(f"{prefix}/{name}") for name in names.split()]

    def thinned(self, key: str, *full: Tensor) -> tuple[Tensor, ...]:
        """The recorded array `key`, and `full` ones thinned out like it where not every element is stored."""
        if key in self.arrays or f"{key}@sub" not in self.arrays:
            return self.array(key), *full
        stride = math.ceil(full[0].numel() / 300)
        return self.array(f"{key}@sub"), *(x.reshape(-1)[::stride] for x in full)

    def compare(self, key: str, ours: Tensor, tolerance: str, quantity: str | None = None) -> None:
        """Compare with the recorded array `key`, which the table shows as `quantity`."""
        theirs, ours = self.thinned(key, ours)
        self.check(key, ours, theirs, tolerance, quantity or key)

    def check(self, key: str, ours: Tensor, theirs: Tensor, tolerance: str, quantity: str) -> None:
        if ours.shape != theirs.shape:
            self.failures.append(f"{key} has shape {tuple(theirs.shape)}, ours {tuple(ours.shape)}")
            return
        ours, theirs = ours.detach().double(), theirs.double()
        scale, error = theirs.abs().max().item(), (ours - theirs).abs().max().item()
        if scale == 0:
            tolerance, quantity = "zero", "all zero (absolute error)"
        else:
            error /= scale
        error = error if math.isfinite(error) else math.inf
        limit = TOLERANCES[tolerance]
        self.errors.append((self.name, quantity, error, limit))
        self.require(error <= limit, f"{key} is off by {error:.1e} > {limit:.0e}")

    def require(self, condition: bool, failure: str) -> None:
        if not condition:
            self.failures.append(failure)

    def finish(self) -> None:
        """Fail unless everything matched and every array was used."""
        self.failures += [f"unknown key {key}: nothing was compared with it" for key in sorted(self.unused)]
        if self.failures:
            heading = f"{self.name}: {len(self.failures)} failures"
            pytest.fail("\n".join([heading, *self.failures]), pytrace=False)


class Replay(Draws):
    """Hands out recorded draws, in the order in which acting and training must ask for them."""

    def __init__(self, draws: list[tuple[str, Tensor]]):
        super().__init__()
        self.waiting = deque(draws)

    def onehot(self, probs: Tensor) -> Tensor:
        return self._next("onehot", probs)

    def normal(self, mean: Tensor) -> Tensor:
        return self._next("normal", mean)

    def trunc_normal(self, mean: Tensor, std: Tensor) -> Tensor:
        return self._next("trunc_normal", mean)

    def subset(self, total: int, count: int, device: torch.device) -> Tensor:
        raise AssertionError("the author's code draws no subset")

    def finish(self) -> None:
        assert not self.waiting, f"{len(self.waiting)} recorded draws were not asked for"

    def _next(self, kind: str, like: Tensor) -> Tensor:
        assert self.waiting, f"no recorded draw is left for {kind} {tuple(like.shape)}"
        recorded, value = self.waiting.popleft()
        assert (recorded, value.shape) == (kind, like.shape), (
            f"asked for {kind} {tuple(like.shape)} where {recorded} {tuple(value.shape)} was recorded"
        )
        return value.to(like.dtype)


def from_their_layout(weight: Tensor) -> Tensor:
    """Dense (in, out) -> (out, in); convolutions (h, w, in, out) -> (out, in, h, w), also transposed ones."""
    return weight.permute(3, 2, 0, 1) if weight.ndim == 4 else weight.mT if weight.ndim == 2 else weight


def to_their_layout(weight: Tensor) -> Tensor:
    return weight.permute(2, 3, 1, 0) if weight.ndim == 4 else weight.mT if weight.ndim == 2 else weight
