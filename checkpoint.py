"""Checkpoints, replay and policy files: written aside and renamed, verified before they are parsed, free of code.

A checkpoint is one file, `checkpoint_<env_step>_<hash>.pt`, whose name carries the first 16 hex digits of the
SHA-256 of its bytes. Loading compares them and then reads with `weights_only=True`. The replay's finished episodes
lie beside it, `replay/episode_<number>_<hash>.npz`, and the checkpoint lists those that it needs: an episode that
finished later belongs to no checkpoint, and a resume deletes it.
"""

import dataclasses
import fcntl
import hashlib
import io
import os
import platform
import random
import re
import time
import zipfile
from pathlib import Path
from pickle import UnpicklingError

import numpy as np
import torch
from tqdm import tqdm

from buffer import ReplayBuffer
from train import Config, Policy

NAME = re.compile(r"checkpoint_(\d+)_([0-9a-f]{16})\.pt")
EPISODE_NAME = re.compile(r"episode_(\d+)_([0-9a-f]{16})\.npz")
KEEP = 2  # newest checkpoints that stay on disk
LOCK_NAME = "lock"


class CheckpointError(RuntimeError):
    """A run folder or policy file that can't be read; the message is for the user."""


class InUse(RuntimeError):
    """Another process works in the run folder; the message is for the user."""


class RunLock:
    """Makes a run folder one process's, until `release` or the end of the process, however that comes.

    The lock belongs to the open file, which worker processes don't inherit: none of them can keep it.
    """

    def __init__(self, run_dir: Path):
        self.path, self.file = run_dir / LOCK_NAME, None

    def acquire(self) -> None:
        """Take the lock of an existing folder, if it isn't held yet. InUse where another process has it."""
        if self.file is not None:
            return
        file = open(self.path, "a+")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            owner = file.read().strip()
            file.close()
            raise InUse(f"{self.path.parent} is in use by process {owner or '?'}: one run, one process") from error
        self.file = file
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()

    def release(self) -> None:
        if self.file is not None:
            self.file.close()
            self.file = None


def write_file(path: Path, data: bytes) -> None:
    """Replace `path` with `data` so that a crash at any moment leaves the old file or the new one (OSError)."""
    aside = path.with_name(f".{path.name}.tmp")
    try:
        with open(aside, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except OSError:
        aside.unlink(missing_ok=True)  # on a full disk its bytes are needed
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # without it a power cut may undo the renaming
    finally:
        os.close(folder)


def save_checkpoint(run_dir: Path, step: int, state: dict, best_step: int = -1) -> Path:
    """Write `state` (tensors and plain values) as the newest checkpoint; the path.

    Of the older ones, the last and that of `best_step`, the control step of the best evaluation, are kept. Raises
    OSError where the file can't be written: what was there stays.
    """
    buffer = io.BytesIO()
    torch.save(state, buffer)
    data = buffer.getvalue()
    path = run_dir / f"checkpoint_{step:09d}_{_digest(data)}.pt"
    write_file(path, data)
    os.utime(path)  # an equal file of this step may have been there: it is the newest now
    for old in list_checkpoints(run_dir)[KEEP:]:
        if _step(old) != best_step:
            old.unlink()
    return path


def _step(path: Path) -> int:
    return int(NAME.fullmatch(path.name)[1])


def list_checkpoints(run_dir: Path) -> list[Path]:
    """Newest first."""
    found = [path for path in run_dir.glob("checkpoint_*.pt") if NAME.fullmatch(path.name)]
    return sorted(found, key=lambda path: (_step(path), path.stat().st_mtime_ns), reverse=True)


def cut_back(run_dir: Path, loaded: Path) -> None:
    """Set aside, as `<name>.damaged`, the checkpoints that are newer than the one that was loaded.

    They can't be read. Left where they are, they would count among the last two.
    """
    for path in list_checkpoints(run_dir):
        if path == loaded:
            return
        path.rename(path.with_name(f"{path.name}.damaged"))


def remove_leftovers(run_dir: Path) -> None:
    """Delete what a crash in the middle of a write left: `.<name>.tmp` files."""
    for path in (*run_dir.glob(".*.tmp"), *run_dir.glob("replay/.*.tmp")):
        path.unlink()


def snapshot(state):
    """A copy of nested dicts, lists and tuples whose tensors, copied to the CPU, no later update changes."""
    if isinstance(state, torch.Tensor):
        return state.detach().to("cpu", copy=True)
    if isinstance(state, dict):
        return {name: snapshot(value) for name, value in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(snapshot(value) for value in state)
    return state


def versions(device: torch.device, autocast_dtype: torch.dtype | None) -> dict[str, str | int]:
    """What has to stay the same for a resumed run to be bit for bit the uninterrupted one."""
    return {
        "torch": str(torch.__version__), "threads": torch.get_num_threads(), "device": device.type,
        "machine": platform.machine(), "instructions": torch.backends.cpu.get_cpu_capability(),
        "products in": str(autocast_dtype or torch.float32).removeprefix("torch."),
    }  # fmt: skip


def load_checkpoint(run_dir: Path) -> tuple[dict, Path, list[str]] | None:
    """The newest undamaged checkpoint: its state on the CPU, its path, and a line about each newer, damaged file.

    None where there is no checkpoint yet; CheckpointError if all are damaged.
    """
    damaged = []
    for path in list_checkpoints(run_dir):
        try:
            return _load(path), path, damaged
        except CheckpointError as error:
            damaged.append(str(error))
    if damaged:
        raise CheckpointError(f"no checkpoint in {run_dir} can be read: {'; '.join(damaged)}")
    return None


def _read_verified(path: Path, name: re.Pattern) -> bytes:
    """The bytes of a file whose name, matching `name`, carries their hash; CheckpointError where they differ."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path.name}: {error.strerror}") from error
    if _digest(data) != name.fullmatch(path.name)[2]:
        raise CheckpointError(f"{path.name} is damaged (its bytes do not match the hash in its name)")
    return data


def _load(path: Path) -> dict:
    data = _read_verified(path, NAME)
    try:
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except (RuntimeError, UnpicklingError) as error:
        raise CheckpointError(f"{path.name} holds something else than tensors and plain values: refused") from error


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def global_rngs(device: torch.device) -> dict:
    """The states of torch's generators, Python's and NumPy's global ones, in types that a checkpoint may hold."""
    numpy = np.random.get_state(legacy=False)
    key = torch.from_numpy(numpy["state"]["key"].astype(np.int64))
    return {
        "torch": torch.get_rng_state(),
        "cuda": [torch.cuda.get_rng_state(device)] if device.type == "cuda" else [],
        "mps": [torch.mps.get_rng_state()] if device.type == "mps" else [],
        "python": random.getstate(),
        "numpy": numpy | {"state": numpy["state"] | {"key": key}},
    }


def set_global_rngs(rng: dict, device: torch.device) -> None:
    """Put the generators into the states that `global_rngs` gave."""
    random.setstate(rng["python"])
    numpy = rng["numpy"]
    key = numpy["state"]["key"].numpy().astype(np.uint32)
    np.random.set_state(numpy | {"state": numpy["state"] | {"key": key}})
    if rng["cuda"] and device.type == "cuda":
        torch.cuda.set_rng_state(rng["cuda"][0], device)
    if rng["mps"] and device.type == "mps":
        torch.mps.set_rng_state(rng["mps"][0])
    torch.set_rng_state(rng["torch"])


class ReplayFiles:
    """The finished episodes of a replay on disk, one file each, written once and never changed.

    Args:
        run_dir: the run folder.
        replay: whose episodes are written, and restored.
        enabled: false writes none, and the next checkpoint lists none.
    """

    def __init__(self, run_dir: Path, replay: ReplayBuffer, enabled: bool):
        self.folder, self.replay, self.enabled = run_dir / "replay", replay, enabled
        self.needed = 0  # number of the oldest episode that the checkpoint before the next one lists

    def write(self) -> None:
        """Write the finished episodes that are on no disk yet. Raises OSError; a later call then goes on."""
        if not self.enabled:
            return
        self.folder.mkdir(exist_ok=True)
        for env, episodes in enumerate(self.replay.episodes):
            for episode in episodes:
                if episode.number >= 0 and not episode.file:
                    buffer = io.BytesIO()
                    np.savez(buffer, **self.replay.export(env, episode))
                    data = buffer.getvalue()
                    name = f"episode_{episode.number:07d}_{_digest(data)}.npz"
                    write_file(self.folder / name, data)
                    episode.file = name

    def index(self) -> list[tuple[str, int, int]]:
        """(file, env, rows that are left of it) of the finished episodes, for a checkpoint; call `write` before."""
        if not self.enabled:
            return []
        return [
            (episode.file, env, episode.length)
            for env, episodes in enumerate(self.replay.episodes)
            for episode in episodes
            if episode.number >= 0
        ]

    def restore(self, index: list[tuple[str, int, int]], episodes: int) -> list[str]:
        """Fill the empty replay with the episodes of a checkpoint's index and delete those that came later.

        `episodes` is the number of finished ones as of the checkpoint. Returns a line about each file that is
        missing or damaged; its episode is skipped.
        """
        lost = []
        for name, env, length in index:
            try:
                columns = _load_episode(self.folder / name)
                self.replay.load(env % len(self.replay.episodes), columns, length, _number(name), name)
            except (CheckpointError, ValueError, IndexError) as error:
                lost.append(str(error))
        self.needed = min((_number(name) for name, _, _ in index), default=episodes)
        self._delete(lambda number: number >= episodes)
        return lost

    def prune(self, index: list[tuple[str, int, int]], episodes: int) -> None:
        """After a save with this index: delete the files that neither that checkpoint nor the one before needs."""
        oldest = min((_number(name) for name, _, _ in index), default=episodes)
        self._delete(lambda number: number < min(self.needed, oldest))
        self.needed = oldest

    def _delete(self, condition) -> None:
        for path in self.folder.glob("episode_*.npz"):
            if EPISODE_NAME.fullmatch(path.name) and condition(_number(path.name)):
                path.unlink()


def _number(name: str) -> int:
    return int(EPISODE_NAME.fullmatch(name)[1])


def _load_episode(path: Path) -> dict[str, np.ndarray]:
    """The columns of an episode's file; CheckpointError where it is missing, damaged or something else."""
    data = _read_verified(path, EPISODE_NAME)
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as columns:
            return dict(columns)
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        raise CheckpointError(f"{path.name} holds something else than plain arrays: refused") from error


class Saver:
    """Holds the state of a run as of the last episode's end, and writes it when asked.

    What the disk refuses costs a warning, not the run.
    """

    def __init__(self, run_dir: Path, replay_files: ReplayFiles):
        self.run_dir, self.replay_files = run_dir, replay_files
        self.held: dict | None = None
        self.saved_step = -1  # control step of the newest checkpoint
        self.saved_at = time.monotonic()
        self.failing = False

    def save(self) -> None:
        """Write the state that is held, unless that is done."""
        if self.held is None or self.held["progress"]["step"] == self.saved_step:
            return
        progress = self.held["progress"]
        try:
            save_checkpoint(self.run_dir, progress["step"], self.held, progress["best_step"])
            self.saved_step, self.saved_at = progress["step"], time.monotonic()
            self.replay_files.prune(self.held["replay"], progress["episode"])
        except (OSError, RuntimeError) as error:  # torch.save turns some errors of the system into RuntimeErrors
            self.warn(error)
            return
        if self.failing:
            tqdm.write(f"step {progress['step']}: saved again")
        self.failing = False

    def warn(self, error: Exception) -> None:
        """Once for all failures in a row."""
        if not self.failing:
            tqdm.write(f"warning: {self.run_dir} can't be written to, training goes on: {error}")
        self.failing = True


def policy_file(policy: Policy, config: Config, **about) -> bytes:
    """The bytes of a `policy.pt`: encoder, RSSM and actor with all that is needed to build them again."""
    buffer = io.BytesIO()
    torch.save(
        {
            "config": dataclasses.asdict(config) | {"run_dir": ""},  # where it was learnt is nobody else's business
            "image_shape": policy.encoder.shape,
            "action_size": policy.actor.out.out_features,
            "weights": {name: value.cpu() for name, value in policy.state_dict().items()},
            **about,
        },
        buffer,
    )
    return buffer.getvalue()


# What was done before these constants existed, for runs and policies that don't name them.
OLDER_CONSTANTS = {"rotation_scale": 1.0, "replay_focus": 0.0, "eval_steps": 0, "eval_action": "mode"}


def load_policy(path: str | Path, device: torch.device | str = "cpu") -> tuple[Policy, Config]:
    """The policy of a `policy.pt` and the configuration that it was trained with.

    Raises CheckpointError if the file is not there or is not a policy.
    """
    try:
        saved = torch.load(path, map_location=device, weights_only=True)
        if not isinstance(saved, dict):
            raise TypeError("it holds something else")
        config = Config(**(OLDER_CONSTANTS | saved["config"]))
        policy = Policy.build(config, saved["image_shape"], saved["action_size"])
        policy.load_state_dict(saved["weights"])
    except FileNotFoundError as error:
        raise CheckpointError(f"there is no policy file {path}") from error
    except Exception as error:  # torch.load raises almost anything for files that aren't its own
        raise CheckpointError(f"{path} is no policy file: {type(error).__name__}") from error
    return policy.to(device).eval(), config
