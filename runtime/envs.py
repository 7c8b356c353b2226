"""The environments of a run: built together, some in worker processes, and built anew after a fault.

An environment of the world outside fails now and then. Here that is one event, whatever raised or was not a number:
the episode ends, a line says why, and the next one is drawn anew. This file imports no torch: workers need none.
"""

import contextlib
import functools
import math
import multiprocessing
import multiprocessing.connection
import os
import random
import signal
import sys
import threading
import time
import traceback
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv
from gymnasium.vector.async_vector_env import AsyncState

from runtime.console import Failure, StopSignals, Tolerant, UserError

RUN = Path(__file__).resolve().parent.parent / "run.py"
MakeEnv = Callable[..., gymnasium.Env]
Envs = SyncVectorEnv | AsyncVectorEnv

MAX_REWARD = 1e9  # its weighted square has to be a float32
FAULTS = (Exception, SystemExit)  # a simulator may raise anything, and some call sys.exit
CLOSE_PATIENCE = 20.0  # seconds for workers to close their environments
ENDED_AT_START = "a worker process ended at its start: see the error above, if there is one"
RESET_TRIES = 10  # a reset that fails is drawn anew so often, each time in an environment that was built anew


class BrokenEnv(RuntimeError):
    """An environment that can't be mended; the message is for the user."""


class RebuildingEnv(gymnasium.Wrapper):
    """Builds its environment anew after a fault, and goes on with its generator.

    A fault is an exception in `step` or `reset`, an image of another type or shape than the first space's, a reward
    that is no number up to MAX_REWARD, a success or an end that is neither true nor false, or an info that is no dict.
    In `step` it ends the episode: the last image once more, no reward, truncated. In `reset` it is followed by other
    draws, RESET_TRIES times. Either is told in info["env_error"], one line. What can't be mended is told in
    info["broken"] and not raised: a worker that raises ends, with a traceback. Beside these, only info["success"] is
    passed on, since a vector of environments can't stack all that an info may hold. What the first `build` raises
    passes through.

    Between episodes a step does nothing, so that an episode can begin and end beside others that go on. If it
    `is_alone` in its process, each reset also seeds the global generators of Python and NumPy, from which some
    environments draw: nothing saves their states.
    """

    def __init__(self, build: Callable[[], gymnasium.Env], is_alone: bool = False) -> None:
        super().__init__(build())
        self._build, self._is_alone = build, is_alone
        self.observation_space = self.env.observation_space  # also where an environment is built anew with another
        self._image = np.zeros(self.observation_space.shape or (), self.observation_space.dtype)  # the last one
        self._seed: int | None = None  # that drew the present episode
        self._ended = True

    def reset(self, **kwargs: Any) -> tuple[np.ndarray, dict[str, Any]]:
        """Begin an episode; see the class for what happens after a fault."""
        self._seed = kwargs.get("seed")
        told: dict[str, str] = {}
        for _ in range(RESET_TRIES):
            if self._is_alone:
                _seed_globals(kwargs.get("seed"), self.env.np_random)
            try:
                image, info = self.env.reset(**kwargs)
                success = self._check(image, 0.0, info)
            except FAULTS as error:
                told = {"env_error": describe_error(error)}
                kwargs.pop("seed", None)  # which would repeat the draws
                if broken := self._rebuild():
                    return self._image, broken
                self.env.np_random.random()  # in case that no draw was made before the fault
            else:
                self._image, self._ended = image, False
                return image, {"success": success, **told}
        reason = f"{RESET_TRIES} resets failed one after the other, the last with {told['env_error']}"
        return self._image, {"broken": reason}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """One agent step; see the class for what happens after a fault."""
        if self._ended:
            return self._image, 0.0, False, True, {}
        try:
            image, reward, terminated, truncated, info = self.env.step(np.array(action))  # which it may change
            told = {"success": self._check(image, reward, info)}
            reward, terminated, truncated = float(reward), _flag("end", terminated), _flag("end", truncated)
        except FAULTS as error:
            image, reward, terminated, truncated = self._image, 0.0, False, True
            told = self._rebuild() or {"success": False, "env_error": describe_error(error)}
        self._image, self._ended = image, terminated or truncated
        return image, reward, terminated, truncated, told

    def frame(self, seed: int) -> np.ndarray | str | None:
        """What the episode of `seed` looks like, uint8 (H, W, 3), or why that can't be had; None in other episodes."""
        if seed != self._seed:
            return None
        try:
            frame = np.array(self.env.render())  # a copy, as the next one may be drawn into the same array
            if frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[-1] != 3 or not frame.size:
                return f"render() gave a frame of {frame.dtype} {frame.shape}, not of uint8 (height, width, 3)"
        except NotImplementedError:
            return "this environment has no render()"
        except FAULTS as error:
            return f"render() raised {describe_error(error)}"
        return frame

    def close(self) -> None:
        """Close the environment; one that can't even close is let go."""
        with contextlib.suppress(*FAULTS):
            self.env.close()

    def _check(self, image: np.ndarray, reward: Any, info: Any) -> bool:
        """Whether the task is solved. Checked here: on its way to the replay an image is cast to the space's type."""
        space = self.observation_space
        if image.dtype != space.dtype or image.shape != space.shape:
            raise ValueError(f"an image of {image.dtype} {image.shape}, not of {space.dtype} {space.shape}")
        if not math.isfinite(reward) or abs(reward) > MAX_REWARD:
            raise ValueError(f"a reward of {reward}")
        if not isinstance(info, dict):
            raise TypeError(f"an info of {type(info).__name__}, not a dict")
        return _flag("success", info.get("success") or False)

    def _rebuild(self) -> dict[str, Any]:
        """Build the environment anew; an info that tells why that failed, empty if it did not."""
        generator = self.env.np_random
        self.close()
        try:
            self.env = self._build()
        except FAULTS as error:
            return {"broken": f"an environment can't be built anew: {describe_error(error)}"}
        self.env.np_random = generator
        return {}


def _seed_globals(seed: int | None, rng: np.random.Generator) -> None:
    """Seed the global generators with an episode's own seed, or with what its generator is about to draw."""
    number = zlib.crc32(repr(rng.bit_generator.state).encode()) if seed is None else seed
    random.seed(number)
    np.random.seed(number)


def _flag(name: str, value: Any) -> bool:
    """True or false; ValueError for what is neither, such as the text "False"."""
    if value not in (0, 1):
        raise ValueError(f"{name} {value!r} is neither true nor false")
    return bool(value)


def describe_error(error: BaseException) -> str:
    """One line: type, message, and the file and line that raised."""
    place = traceback.extract_tb(error.__traceback__)[-1]
    try:
        message = " ".join(str(error).split())
    except Exception as broken:  # an error may fail to describe itself
        message = f"no message ({type(broken).__name__})"
    return f"{type(error).__name__}: {message} ({os.path.basename(place.filename)}:{place.lineno})"


def make_vector_env(builders: Sequence[Callable[[], gymnasium.Env]], apart: bool = False) -> Envs:
    """Environments that step together: several, or one if it is to be `apart`, in spawned workers that end with us.

    Else one lives in this process.
    """
    makers = [functools.partial(_rebuilding, build, os.getpid()) for build in builders]
    if len(makers) == 1 and not apart:
        return SyncVectorEnv(makers, autoreset_mode=AutoresetMode.DISABLED)
    with _light_workers():
        return AsyncVectorEnv(makers, context="spawn", autoreset_mode=AutoresetMode.DISABLED)


@contextlib.contextmanager
def _light_workers() -> Iterator[None]:
    """Inside, spawned workers do not import run.py again, and with it torch, which takes 200 MB in each of them.

    They do import a user's own script: it may register a task.
    """
    main = sys.modules["__main__"]
    file, spec = getattr(main, "__file__", None), getattr(main, "__spec__", None)
    if file is None or Path(file).resolve() != RUN:
        yield
        return
    main.__spec__ = main.__file__ = None
    try:
        yield
    finally:
        main.__spec__, main.__file__ = spec, file


def _rebuilding(build: Callable[[], gymnasium.Env], trainer: int) -> RebuildingEnv:
    if os.getpid() != trainer:  # a worker; the trainer itself may be another program's child
        for number in StopSignals.NUMBERS:  # these reach workers too; the parent decides
            if number != signal.SIGTERM:
                signal.signal(number, signal.SIG_IGN)
        threading.Thread(target=_end_with_parent, daemon=True).start()
        sys.stdout, sys.stderr = Tolerant(sys.stdout), Tolerant(sys.stderr)
    return RebuildingEnv(build, is_alone=os.getpid() != trainer)


def _end_with_parent() -> None:
    """End this worker when the parent has ended, by kill -9 too, and also if the simulator hangs."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)


def faults(envs: Envs, info: dict[str, Any]) -> np.ndarray:
    """Which environments tell of a fault, (num_envs,) bool; BrokenEnv if one can't be mended."""
    if "broken" in info:
        raise BrokenEnv(next(filter(None, info["broken"])))
    return np.asarray(info.get("_env_error", np.zeros(envs.num_envs)), bool)


@contextlib.contextmanager
def dead_workers(envs: Envs) -> Iterator[None]:
    """Raise BrokenEnv where a worker process turns out to have ended."""
    try:
        yield
    except (EOFError, OSError) as error:
        time.sleep(0.5)  # its exit code, or the signal that ended it and is meant for this process too, may be late
        codes = [process.exitcode for process in getattr(envs, "processes", ())]
        raise BrokenEnv(f"an environment's process has ended; exit codes: {codes}") from error


def close_envs(envs: Envs) -> None:
    """Close environments. A worker that is dead, owes an answer or hangs in its own close is ended."""
    if isinstance(envs, SyncVectorEnv):
        envs.close()
        return
    until = time.monotonic() + (CLOSE_PATIENCE if envs._state is AsyncState.DEFAULT else 0)
    for pipe in filter(None, envs.parent_pipes):  # Gymnasium forgets that of a worker which has raised
        with contextlib.suppress(OSError):
            pipe.send(("close", None))
    for process in envs.processes:
        process.join(max(0, until - time.monotonic()))
        process.kill()
        process.join()
    envs.closed = True


class EnvFailure(Failure):
    """The environments can't go on; what was learned is sound."""

    def __init__(self, reason: str):
        super().__init__(f"{reason}; the same command goes on, and draws other episodes")


def make_envs(options: dict[str, Any], num_envs: int, seed: int, make_env: MakeEnv, apart: bool = False) -> Envs:
    """The training environments of a run; `options` are the keywords of `make_env`, seed excepted.

    `apart`: in a worker also if there is one. Their seeds are the run's own and others that follow from it, none of
    which a neighboring run has.
    """
    seeds = [seed, *(own_seed(seed, i) for i in range(1, num_envs))]
    with build_errors():
        return make_vector_env([functools.partial(make_env, **options, seed=x) for x in seeds], apart)


def own_seed(seed: int, *user: int) -> int:
    """A seed that follows from the run's, for a generator whose draws are to be no other's of the run.

    `user` is i for environment i, (0, 1) for random actions and exploration, (0, 2) for the replay, and (0, 3) for
    the policy's draws when it acts.
    """
    return int(np.random.SeedSequence([seed, *user]).generate_state(1)[0]) >> 1  # some environments take 31 bits


@contextlib.contextmanager
def build_errors() -> Iterator[None]:
    """What an environment refuses when it is built is a UserError, and what a machine can't do is a Failure."""
    try:
        yield
    except (ValueError, TypeError) as error:
        raise UserError(_explain(error)) from error
    except RuntimeError as error:  # the machine can't render
        raise Failure(_explain(error)) from error
    except SystemExit as error:
        raise Failure(f"the environment called sys.exit({error.code!r}) while it was built") from error
    except (EOFError, ConnectionResetError, BrokenPipeError) as error:
        # a worker ends if it imports a script that calls `main` at once
        guard = 'if __name__ == "__main__":'
        raise UserError(f"{ENDED_AT_START}; a script that calls run.main needs `{guard}`") from error
    except OSError as error:  # a file is missing, or too many are open
        raise Failure(f"the environment can't be built: {describe_error(error)}") from error


def _explain(error: Exception) -> str:
    """What env.py says of bad input is a sentence for the user; another's error needs its type and place too."""
    place = Path(traceback.extract_tb(error.__traceback__)[-1].filename).resolve()
    return str(error) if place in (RUN.with_name("env.py"), RUN.with_name("render.py")) else describe_error(error)


def check_spaces(envs: Envs, task: str, cameras: int, image_size: int) -> tuple[tuple[int, int, int], int]:
    """The image shape (C, H, W) and the action size A; UserError if the agent can't work with the spaces."""
    images, actions = envs.single_observation_space, envs.single_action_space
    image_shape = (3 * cameras, image_size, image_size)
    if images.dtype != np.uint8 or images.shape != image_shape:
        needed = f"uint8 {image_shape}, with three channels for each of --cameras"
        raise UserError(f"task {task}: its images {images.dtype} {images.shape} are not {needed}")
    box = actions if isinstance(actions, gymnasium.spaces.Box) and len(actions.shape) == 1 else None
    if box is None or (box.low != -1).any() or (box.high != 1).any():
        raise UserError(f"task {task}: its action space {actions} is not a Box in [-1, 1] of one axis")
    moves, most = envs.metadata.get("moves", 0), box.shape[0] - bool(envs.metadata.get("gripper"))
    if not isinstance(moves, int | np.integer) or not 0 <= moves <= most:
        raise UserError(f"task {task}: metadata moves {moves!r} must be 0 to {most}, the actions without the gripper's")
    try:
        generators = envs.get_attr("np_random")
    except (EOFError, OSError) as error:
        raise Failure(ENDED_AT_START) from error
    except FAULTS:  # a worker can't send it
        generators = (None,)
    if not all(isinstance(rng, np.random.Generator) for rng in generators):
        raise UserError(f"task {task}: its np_random is no np.random.Generator")
    return image_shape, box.shape[0]
