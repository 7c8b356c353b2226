"""An environment that misbehaves as it is told. It imports no torch, so that worker processes start quickly."""

import functools
import os
import signal
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fake_env import FakeEnv


class Unprintable(Exception):
    """Can't be pickled, nor built from its message alone, as some simulators' exceptions."""

    def __init__(self, what: str, where: Callable):
        super().__init__(f"{what}\nat {where.__name__}")
        self.where = where


class Speechless(Exception):
    """Fails to say what it is."""

    def __str__(self):
        raise KeyError("message")


def _raise(error: Callable[[], Exception]) -> Callable:
    def spoil(*_: Any):
        raise error()

    return spoil


# What becomes of a step: its five values -> what the environment returns instead.
STEP_FAULTS: dict[str, Callable] = {
    "reward None": lambda x, r, *rest: (x, None, *rest),
    "reward text": lambda x, r, *rest: (x, "0.5", *rest),
    "reward nan": lambda x, r, *rest: (x, float("nan"), *rest),
    "reward inf": lambda x, r, *rest: (x, float("inf"), *rest),
    "reward -inf": lambda x, r, *rest: (x, np.float32("-inf"), *rest),
    "reward beyond all reason": lambda x, r, *rest: (x, 1e25, *rest),
    "reward beyond float32": lambda x, r, *rest: (x, 1e300, *rest),
    "reward beyond float64": lambda x, r, *rest: (x, 10**400, *rest),
    "reward of two numbers": lambda x, r, *rest: (x, np.array([r, r]), *rest),
    "reward complex": lambda x, r, *rest: (x, complex(r, 1), *rest),
    "image of another shape": lambda x, *rest: (x[:, ::2, ::2], *rest),
    "image with the channels last": lambda x, *rest: (np.moveaxis(x, 0, -1), *rest),
    "image of floats": lambda x, *rest: (x / 255, *rest),
    "image of NaNs": lambda x, *rest: (np.full(x.shape, np.nan), *rest),
    "image of int64": lambda x, *rest: (x.astype(np.int64), *rest),
    "image a list": lambda x, *rest: (x.tolist(), *rest),
    "image None": lambda x, *rest: (None, *rest),
    "info None": lambda *out: (*out[:4], None),
    "info a list": lambda *out: (*out[:4], []),
    "info missing": lambda *out: out[:4],
    "success of two": lambda *out: (*out[:4], {"success": np.array([True, False])}),
    "success text": lambda *out: (*out[:4], {"success": "False"}),
    "success nan": lambda *out: (*out[:4], {"success": float("nan")}),
    "terminated text": lambda x, r, *rest: (x, r, "False", *rest[1:]),
    "terminated of two": lambda x, r, *rest: (x, r, np.array([True, False]), *rest[1:]),
    "nothing at all": lambda *out: None,
    "exception": _raise(lambda: RuntimeError("simulation unstable")),
    "exception without words": _raise(AssertionError),
    "exception that can't describe itself": _raise(Speechless),
    "exception of several lines": _raise(lambda: ValueError("one\ntwo\n\nthree")),
    "exit": _raise(lambda: SystemExit("license expired")),
    "exception that can't be pickled": _raise(lambda: Unprintable("contact", lambda: None)),
}
RESET_FAULTS: dict[str, Callable] = {
    "exception": _raise(lambda: RuntimeError("Cannot place all objects")),
    "image of another shape": lambda x, info: (x[:, ::2, ::2], info),
    "image of floats": lambda x, info: (x / 255, info),
    "image None": lambda x, info: (None, info),
    "info None": lambda x, info: (x, None),
    "info missing": lambda x, info: x,
    "exit": _raise(lambda: SystemExit(3)),
}


@dataclass
class Plan:
    """When which fault happens, counted over all environments of a process that share this plan."""

    faults: tuple[str, ...] = ("exception",)  # one after the other
    steps: Collection[int] = ()  # numbers of the steps that fail
    resets: Collection[int] = ()  # numbers of the resets that fail
    seeds: Collection[int] = (0,)  # environments with other seeds work
    step_count: int = 0
    reset_count: int = 0
    built: int = 0
    done: int = 0  # faults so far

    def fault(self) -> str:
        """The next one."""
        self.done += 1
        return self.faults[(self.done - 1) % len(self.faults)]


class FaultyEnv(FakeEnv):
    """Follows a plan, which lives on in the environments that replace this one."""

    def __init__(self, *, seed: int, plan: Plan, **options: Any):
        super().__init__(seed=seed, **options)
        self.plan = plan if seed in plan.seeds else Plan()
        self.plan.built += 1

    def reset(self, **kwargs: Any):
        out = super().reset(**kwargs)
        self.plan.reset_count += 1
        return RESET_FAULTS[self.plan.fault()](*out) if self.plan.reset_count in self.plan.resets else out

    def step(self, action: np.ndarray):
        out = super().step(action)
        self.plan.step_count += 1
        return STEP_FAULTS[self.plan.fault()](*out) if self.plan.step_count in self.plan.steps else out


def faulty(*faults: str, **when: Any) -> tuple[Callable, Plan]:
    """A `make_env` and the plan that its environments follow."""
    plan = Plan(faults or ("exception",), **when)
    return functools.partial(FaultyEnv, plan=plan), plan


class UnevenInfo(FakeEnv):
    """Its info holds what a vector of environments can't stack, or can't send: legal in Gymnasium, no fault."""

    def __init__(self, *, seed: int, **options: Any):
        super().__init__(seed=seed, **options)
        self.number = int(seed != 0)

    def step(self, action: np.ndarray):
        *out, info = super().step(action)
        odd = {"contacts": np.zeros(1 + self.number), "state": "lifted" if self.number else 0.5, "f": lambda: None}
        return *out, info | odd


class NanCorner(FakeEnv):
    """The reward is NaN in a corner, like one that divides by a distance."""

    def step(self, action: np.ndarray):
        image, reward, *rest = super().step(action)
        corner = self.position[0] > 0.9 and self.position[1] > 0.7
        return image, float("nan") if corner else reward, *rest


class FailingReset(FakeEnv):
    """A tenth of all resets raises, as a placement sampler does that finds no room."""

    def reset(self, **kwargs: Any):
        out = super().reset(**kwargs)
        if self.np_random.uniform() < 0.1:
            raise RuntimeError("Cannot place all objects")
        return out


class GlobalDraws(FakeEnv):
    """Whether an episode fails is drawn from NumPy's global generator, which a resume restores."""

    chance = 0.6

    def reset(self, **kwargs: Any):
        self.fails = np.random.rand() < type(self).chance
        return super().reset(**kwargs)

    def step(self, action: np.ndarray):
        if self.fails and self.steps == 5:
            raise RuntimeError("simulation unstable")
        return super().step(action)


class UnevenEpisodes(FakeEnv):
    """Episodes of 3 to 19 steps; in those that begin with a seed of `bad`, the third step raises."""

    def __init__(self, *, bad: Collection[int] = (), **options: Any):
        super().__init__(**options)
        self.bad, self.begun_with = bad, None

    def reset(self, *, seed: int | None = None, options: Any = None):
        out = super().reset(seed=seed)
        self.begun_with, self.length = seed, int(self.np_random.integers(3, 20))
        return out

    def step(self, action: np.ndarray):
        if self.begun_with in self.bad and self.steps == 2:
            raise RuntimeError("contact")
        return super().step(action)


class KilledWorker(FakeEnv):
    """Its process ends in the middle of an evaluation's episode, as by kill -9, unless the file `once` is there."""

    def __init__(self, *, seed: int, once: Path, eval_seed: int, **options: Any):
        super().__init__(seed=seed, **options)
        self.once, self.lethal = once, seed == eval_seed

    def step(self, action: np.ndarray):
        if self.lethal and self.steps == 5 and not self.once.exists():
            self.once.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().step(action)
