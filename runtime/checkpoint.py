"""Checkpoints, replay and policy files: written aside and renamed, verified before they are parsed, free of code.

A checkpoint is one file, `checkpoint_<env_step>_<hash>.pt`, whose name carries the first 16 hex digits of the
SHA-256 of its bytes. Loading compares them and then reads with `weights_only=True`. The replay's finished episodes
lie beside it, `replay/episode_<number>_<hash>.npz`, and the checkpoint lists those that it needs: an episode that
finished later belongs to no checkpoint, and a resume deletes it.
"""

import dataclasses
import errno
import hashlib
import io
import itertools
import json
import os
import platform
import random
import re
import time
import zipfile
from collections.abc import Callable, Iterator
from importlib.metadata import distributions
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import filelock
import numpy as np
import torch

from buffer import Episode, ReplayBuffer
from runtime.cli import hints, marked
from runtime.console import Failure, UserError, say, told, warn, warn_once
from runtime.logger import Logger
from train import MAX_SKIPPED_IN_A_ROW, Behavior, Config, Dreamer, Policy, WorldModel

NAME = re.compile(r"(?:checkpoint|episode)_(\d+)_([0-9a-f]{16})\.(?:pt|npz)")
SIMULATION = ("numpy", "mujoco", "robosuite")  # packages on whose releases an episode depends
KEEP = 2  # newest checkpoints that stay on disk
LOCK_NAME = "lock"
# what a run leaves beside checkpoints
OUTPUTS = ("metrics.jsonl", "policy*.pt", "policy*.mp4", "replay", "videos", "wandb", "report.html")
# errors of file systems that lack a call; NFS has no locks (ENOLCK) if no lock daemon runs
UNSUPPORTED = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EBADF, errno.ENOLCK)


class Damaged(Exception):
    """A file that can't be read or is not what its name says, in one line; it never reaches the user as it is."""


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
    _sync_folder(path.parent)


def _sync_folder(path: Path) -> None:
    """Put a renaming on the disk: without it, a power cut may undo it. Some network file systems can't."""
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
        what = f"this file system can't sync a folder ({error.strerror})"
        warn_once("folder", f"{what}: a power cut may undo the last save")
    finally:
        os.close(folder)


def _read_verified(path: Path) -> bytes:
    """The bytes of a file whose name carries their hash; Damaged if they differ, Failure if they can't be read now."""
    try:
        data = path.read_bytes()
    except (FileNotFoundError, IsADirectoryError) as error:
        raise Damaged(f"{path.name}: {error.strerror}") from error
    except OSError as error:  # a network's trouble: what is skipped or set aside as damaged now would be lost for good
        raise Failure(f"{path} can't be read now ({error.strerror}): start again, or move it away") from error
    match = NAME.fullmatch(path.name)
    if match is None or _digest(data) != match[2]:
        raise Damaged(f"{path.name} is damaged (its bytes do not match the hash in its name)")
    return data


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def _torch_bytes(state: dict[str, Any]) -> bytes:
    """What `torch.save` writes."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def _number(name: str) -> int:
    """Of a checkpoint or an episode, whose name this is."""
    return int(name.split("_")[1])


class RunFolder:
    """A run folder. If it exists, it is locked at once, else `claim` makes and locks it; `release` unlocks it.

    UserError if the path can't be one; Failure if another process works there.
    """

    def __init__(self, path: Path):
        _check_folder(path)
        self.path = path = path.absolute()  # an environment may change the working directory
        self.loaded: Path | None = None  # the checkpoint that the run goes on from
        self.lock = filelock.FileLock(path / LOCK_NAME, timeout=0, preserve_lock_file=True, fallback_to_soft=False)
        if path.exists():
            self._acquire()

    def newest(self) -> dict[str, Any] | None:
        """The state in the newest undamaged checkpoint, None if there is no checkpoint, Failure if all are damaged."""
        try:
            state, self.loaded = load_checkpoint(self.path) or (None, None)
        except OSError as error:
            raise Failure(f"{self.path} can't be read now ({error.strerror}): start again") from error
        return state

    def claim(self, config: Config) -> None:
        """Make the folder, and clear what lies in it beyond the checkpoint that the run goes on from."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._acquire()
            for names in (".*.tmp", "replay/.*.tmp", "videos/.*.tmp.mp4"):  # of a process that was killed
                for leftover in self.path.glob(names):
                    leftover.unlink()
            there = list_checkpoints(self.path)
            if self.loaded is None:
                if there:
                    raise Failure(f"{self.path} got a checkpoint from another process just now: start again")
                self._set_earlier_aside()
            for damaged in itertools.takewhile(lambda path: path != self.loaded, there):
                damaged.rename(f"{damaged}.damaged")  # left there, newer ones would count among the last two
            write_file(self.path / "config.json", json.dumps(dataclasses.asdict(config), indent=2).encode())
        except OSError as error:
            raise UserError(f"run_dir {self.path} can't be used: {error.strerror}") from error

    def release(self) -> None:
        """Let other processes work in the folder. Nobody should stop the process that gets this one's number next."""
        if self.lock.is_locked:
            try:
                (self.path / LOCK_NAME).write_text("")
            except OSError as error:
                warn(f"{self.path / LOCK_NAME} keeps the number of a process that has ended: {error.strerror}")
        self.lock.release()

    def _acquire(self) -> None:
        """Take the lock. It belongs to the open file, which workers don't inherit: none of them can keep it."""
        if self.lock.is_locked:
            return
        try:
            self.lock.acquire()
            (self.path / LOCK_NAME).write_text(f"{os.getpid()}\n")
        except filelock.Timeout as error:
            owner = (self.path / LOCK_NAME).read_text().strip()
            raise Failure(f"{self.path} is in use by process {owner or '?'}: one run, one process") from error
        except (OSError, NotImplementedError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            if getattr(error, "errno", errno.ENOSYS) not in UNSUPPORTED:
                raise UserError(f"run_dir {self.path} can't be locked: {reason}") from error
            what = f"this file system has no locks ({reason})"
            warn_once("lock", f"{what}: nothing keeps a second process out of {self.path}")

    def _set_earlier_aside(self) -> None:
        """Move what a run without checkpoints has left into `earlier_<n>`."""
        earlier = [path for pattern in OUTPUTS for path in self.path.glob(pattern)]
        if not earlier:
            return
        paths = (self.path / f"earlier_{number}" for number in itertools.count(1))
        aside = next(path for path in paths if not path.exists())
        aside.mkdir()
        for path in earlier:
            path.rename(aside / path.name)
        say(f"{self.path} has no checkpoint: starting afresh; what lay there is in {aside}")


def _check_folder(path: Path) -> None:
    """Refuse a path that can't be a run folder (UserError)."""
    try:
        if path.is_symlink() and not path.exists():
            raise UserError(f"run_dir {path} can't be used: it is a link to {os.readlink(path)}, which does not exist")
        there = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
        if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
            raise UserError(f"run_dir {path} can't be used: {there} is not a folder that can be written to")
        ours = {"config.json", ".config.json.tmp", LOCK_NAME}  # all there may be after a crash at the very start
        names = {entry.name for entry in path.iterdir()} if path.exists() else set()
        if names - ours and not is_run_dir(path):
            raise UserError(f"run_dir {path} is not empty and no run folder: choose another")
    except OSError as error:
        raise UserError(f"run_dir {path} can't be used: {error.strerror}") from error


def is_run_dir(folder: Path) -> bool:
    """Whether a folder has checkpoints or the constants of a run."""
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError):
        config = None
    return bool(list_checkpoints(folder)) or (isinstance(config, dict) and {"task", "preset"} <= config.keys())


def save_checkpoint(run_dir: Path, step: int, state: dict[str, Any], best_step: int = -1) -> Path:
    """Write `state` (tensors and plain values) as the newest checkpoint; the path.

    Of the older ones, the last of another step and that of `best_step`, the control step of the best evaluation, are
    kept. Raises OSError if the file can't be written: what was there stays.
    """
    data = _torch_bytes(state)
    path = run_dir / f"checkpoint_{step:09d}_{_digest(data)}.pt"
    write_file(path, data)
    os.utime(path)  # an equal file of this step may have been there: it is the newest now
    others = [old for old in list_checkpoints(run_dir) if old != path]
    same = [old for old in others if _number(old.name) == step]  # the run ended there before, by a fault
    for old in same + [old for old in others if old not in same and _number(old.name) != best_step][KEEP - 1 :]:
        old.unlink()
    return path


def list_checkpoints(run_dir: Path) -> list[Path]:
    """Newest first."""
    found = [path for path in run_dir.glob("checkpoint_*.pt") if NAME.fullmatch(path.name) and path.exists()]
    return sorted(found, key=lambda path: (_number(path.name), path.stat().st_mtime_ns), reverse=True)


def load_checkpoint(run_dir: Path) -> tuple[dict[str, Any], Path] | None:
    """The newest undamaged checkpoint's state, on the CPU, and path; warns of newer, damaged ones.

    None if there is no checkpoint yet; Failure if all are damaged, or if it is from another release.
    """
    damaged: list[str] = []
    for path in list_checkpoints(run_dir):
        try:
            state = torch.load(io.BytesIO(_read_verified(path)), map_location="cpu", weights_only=True)
        except Damaged as error:
            damaged.append(str(error))
        except (RuntimeError, UnpicklingError):
            damaged.append(f"{path.name} holds something else than tensors and plain values: refused")
        else:
            for line in damaged:
                warn(line)
            if not isinstance(state, dict) or "collector" not in state:
                raise Failure(f"{path} is from another release of this program, which alone can continue it")
            return state, path
    if damaged:
        raise Failure(f"no checkpoint in {run_dir} can be read: {'; '.join(damaged)}")
    return None


def snapshot(state: Any) -> Any:
    """A copy of nested dicts, lists and tuples whose tensors, copied to the CPU, no later update changes."""
    if isinstance(state, torch.Tensor):
        return state.detach().to("cpu", copy=True)
    if isinstance(state, dict):
        return {name: snapshot(value) for name, value in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(snapshot(value) for value in state)
    return state


class Checkpointer:
    """Holds the state of a run as of the last episode's end, and writes it when asked.

    What the disk refuses costs a warning, not the run. `parts` have `state_dict` and `load_state_dict`. The logger
    begins in its saved state. Other parts may draw while they are restored, so the generators are restored last.
    """

    def __init__(
        self,
        config: Config,
        agent: Dreamer,
        replay: "ReplayFiles",
        logger: Logger,
        generators: "GlobalGenerators",
        beside: int = 0,
        **parts: Any,
    ):
        self.run_dir, self.agent, self.replay, self.logger = logger.run_dir, agent, replay, logger
        self.generators = generators
        self.config = dataclasses.asdict(config)
        self.versions = versions(agent.device, agent.autocast_dtype, beside)
        self.parts: dict[str, Any] = {"agent": agent, "replay": replay, **parts, "generators": generators}
        self.held: dict[str, Any] | None = None
        self.saved_step, self.saved_at = -1, time.monotonic()  # control steps, seconds

    def restore(self, state: dict[str, Any]) -> None:
        """Let all parts go on from a state; says what keeps that from being exact. Failure if a part does not fit."""
        here, then = self.versions, state["versions"]
        if other := [f"{name} {then.get(name)} -> {here[name]}" for name in here if then.get(name) != here[name]]:
            warn(f"this will not be bit for bit the run that was saved: {', '.join(other)}")
        for name, part in self.parts.items():
            try:
                part.load_state_dict(state[name])
            except (KeyError, TypeError, ValueError, RuntimeError) as error:
                reason = " ".join(str(error).split())[:200]
                raise Failure(f"the checkpoint does not fit this release or environment: {name}: {reason}") from error
            except OSError as error:  # a file that can't be deleted
                raise Failure(f"{self.run_dir} can't be used: {error}") from error
        if restarts := state["collector"]["restarts"]:
            self.generators.redraw(restarts)
        self.held = snapshot(state)  # Adam goes on in the tensors that it was given
        self.saved_step = state["step"]

    def hold(self, step: int, best_step: int, last: bool) -> None:
        """Keep a copy, on the CPU, of all that decides how the run goes on. To be called where an episode has ended.

        Failure if something in the agent is not finite. Right after a skipped update, the state before that is kept,
        unless it is the `last` one.
        """
        skipped = check_finite(self.agent, step)
        if skipped and not last:
            warn(f"{skipped} update(s) just skipped for a NaN: the state before that is kept")
            return
        try:
            self.logger.sync()
            self.replay.write()
        except OSError as error:
            self._warn(error)
            return
        state = {name: part.state_dict() for name, part in self.parts.items()} | {"logger": self.logger.state_dict()}
        about = {"step": step, "best_step": best_step, "config": self.config, "versions": self.versions}
        self.held = snapshot(about | state)

    def save(self, env_failed: bool = False) -> None:
        """Write the state that is held, unless that is done.

        `env_failed`: the environments have ended the run, and the next start is to draw other episodes.
        """
        if self.held is None or (self.held["step"] == self.saved_step and not env_failed):
            return
        self.held["collector"]["restarts"] += env_failed
        again = self.held["step"] == self.saved_step
        try:
            save_checkpoint(self.run_dir, self.held["step"], self.held, self.held["best_step"])
            self.saved_step, self.saved_at = self.held["step"], time.monotonic()
            if not again:  # the checkpoint before is still there, and needs its episodes
                self.replay.prune()
        except (OSError, RuntimeError) as error:  # torch.save turns some errors of the system into RuntimeErrors
            self._warn(error)
            return
        if "checkpoint" in told:
            told.remove("checkpoint")
            say(f"step {self.saved_step}: saved again")

    def _warn(self, error: Exception) -> None:
        warn_once("checkpoint", f"{self.run_dir} can't be written to, training goes on: {error}")


def versions(device: torch.device, autocast_dtype: torch.dtype | None, beside: int) -> dict[str, str | int]:
    """What has to stay the same for a resumed run to be bit for bit the uninterrupted one.

    `beside`: threads that make updates beside the steps of environments, 0 if they are made between them.
    """
    return {
        "torch": str(torch.__version__),
        "threads": beside or torch.get_num_threads(),
        "updates": "beside steps" if beside else "between steps",
        "device": device.type,
        "machine": platform.machine(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "products in": str(autocast_dtype or torch.float32).removeprefix("torch."),
        "pictures by": os.environ.get("MUJOCO_GL", ""),
        **{name: next((x.version for x in distributions(name=name)), "none") for name in SIMULATION},
    }


def non_finite(agent: Dreamer) -> str:
    """The name of the agent's first tensor with a NaN or infinity, moments included; nothing if there is none."""
    named = dict(_tensors(agent.state_dict()))
    # Magnitudes, unlike sums, don't overflow; one transfer for all of them.
    largest = torch.stack([x.abs().max().float().to(agent.device) for x in named.values()]).isfinite().tolist()
    return next((name for name, finite in zip(named, largest, strict=True) if not finite), "")


def _tensors(state: dict[Any, Any], above: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors in nested dicts, with their names joined by dots."""
    for name, value in state.items():
        if isinstance(value, torch.Tensor):
            yield f"{above}{name}", value
        elif isinstance(value, dict):
            yield from _tensors(value, f"{above}{name}.")


def check_finite(agent: Dreamer, step: int) -> int:
    """The number of updates just skipped in a row; Failure if learning has ended. Waits for the device."""
    in_a_row = [int(optimizer.skipped_in_a_row) for optimizer in agent.optimizers]
    skipped, name = max(in_a_row), non_finite(agent)
    if not name and skipped >= MAX_SKIPPED_IN_A_ROW:
        name = "the gradient of the " + ("world model", "actor", "critic")[in_a_row.index(skipped)]
    if name:
        raise Failure(
            f"step {step}: {name} is not finite ({skipped} updates skipped in a row); "
            "the last checkpoint was saved before that"
        )
    return skipped


class GlobalGenerators:
    """The states of torch's generators, Python's and NumPy's global ones, in types that a checkpoint may hold."""

    def __init__(self, device: torch.device):
        self.device = device

    def seed(self, seed: int) -> None:
        """Seed all of them."""
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)

    def redraw(self, restarts: int) -> None:
        """Go on from other draws than those of the present states: environments may draw from these generators too."""
        self.seed(random.getrandbits(31) + restarts)

    def state_dict(self) -> dict[str, Any]:
        """The generators' states."""
        return {
            "torch": torch.get_rng_state(),
            "cuda": [torch.cuda.get_rng_state(self.device)] if self.device.type == "cuda" else [],
            "mps": [torch.mps.get_rng_state()] if self.device.type == "mps" else [],
            "python": random.getstate(),
            "numpy": plain(np.random.get_state(legacy=False)),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put the generators into these states."""
        random.setstate(state["python"])
        np.random.set_state(state["numpy"])
        if state["cuda"] and self.device.type == "cuda":
            torch.cuda.set_rng_state(state["cuda"][0], self.device)
        if state["mps"] and self.device.type == "mps":
            torch.mps.set_rng_state(state["mps"][0])
        torch.set_rng_state(state["torch"])


def plain(state: Any) -> Any:
    """The state of a generator of NumPy's in types that a checkpoint may hold: some kinds have arrays in it."""
    return json.loads(json.dumps(state, default=np.ndarray.tolist))


class ReplayFiles:
    """The finished episodes of a replay on disk, one file each, written once and never changed.

    If not `enabled`, none is written, and the next checkpoint lists none.
    """

    def __init__(self, run_dir: Path, replay: ReplayBuffer, enabled: bool):
        self.folder, self.replay, self.enabled = run_dir / "replay", replay, enabled
        self.listed = 0  # number of the oldest episode that the newest state lists
        self.needed = 0  # the same of the checkpoint before the next one

    def write(self) -> None:
        """Write the finished episodes that are on no disk yet. Raises OSError; a later call then goes on."""
        if not self.enabled:
            return
        self.folder.mkdir(exist_ok=True)
        for env, episode in self._finished():
            if not episode.file:
                buffer = io.BytesIO()
                np.savez(buffer, **self.replay.export(env, episode))
                data = buffer.getvalue()
                name = f"episode_{episode.number:07d}_{_digest(data)}.npz"
                write_file(self.folder / name, data)
                episode.file = name

    def state_dict(self) -> dict[str, Any]:
        """The sampling generator, and (file, ring, rows left) of each finished episode; call `write` before."""
        index = [(x.file, env, x.length) for env, x in self._finished()] if self.enabled else []
        following = 1 + max((episode.number for _, episode in self._finished()), default=-1)
        self.listed = min((_number(name) for name, _, _ in index), default=following)
        rings = len(self.replay.episodes)
        return {"index": index, "rings": rings, "next": following, "rng": self.replay.rng.bit_generator.state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Fill the empty replay with the episodes that a state lists and delete those that came later.

        Says what is missing, damaged, or does not fit.
        """
        index = state["index"]
        rings = len(self.replay.episodes)
        if rings != state["rings"]:  # deal them out anew, oldest first; a full ring forgets its oldest
            index = [(name, i % rings, length) for i, (name, _, length) in enumerate(sorted(index))]
        lost = []
        for name, env, length in index:
            try:
                self.replay.load(env, _load_episode(self.folder / name), length, _number(name), name)
            except (Damaged, ValueError, IndexError) as error:
                lost.append(str(error))
        if lost:
            more = " ..." if len(lost) > 3 else ""
            warn(f"{len(lost)} of {len(index)} replay episodes skipped: {'; '.join(lost[:3])}{more}")
        if unfit := len(index) - len(lost) - sum(map(len, self.replay.episodes)):
            warn(f"{unfit} of {len(index)} replay episodes, the oldest, do not fit any more")
        if state["next"] and not index:
            say("the replay was not saved: it is filled anew before the next update")
        elif rings > 1:
            say("environments whose episodes were running at the checkpoint start new ones")
        self.needed = self.listed = min((_number(name) for name, _, _ in index), default=state["next"])
        self._delete(lambda number: number >= state["next"])
        self.replay.rng.bit_generator.state = state["rng"]

    def prune(self) -> None:
        """After a save: delete the files that neither that checkpoint nor the one before it needs."""
        oldest = min(self.needed, self.listed)
        self._delete(lambda number: number < oldest)
        self.needed = self.listed

    def _finished(self) -> list[tuple[int, Episode]]:
        """(ring, episode) of the finished ones."""
        rings = enumerate(self.replay.episodes)
        return [(env, episode) for env, episodes in rings for episode in episodes if episode.number >= 0]

    def _delete(self, condition: Callable[[int], bool]) -> None:
        for path in self.folder.glob("episode_*.npz"):
            if NAME.fullmatch(path.name) and path.is_file() and condition(_number(path.name)):
                path.unlink()


def _load_episode(path: Path) -> dict[str, np.ndarray]:
    """The columns of an episode's file; Damaged if it is missing, damaged or something else."""
    data = io.BytesIO(_read_verified(path))
    try:
        with np.load(data, allow_pickle=False) as columns:
            return dict(columns)
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        raise Damaged(f"{path.name} holds something else than plain arrays: refused") from error


def policy_file(policy: Policy, config: Config, **about: float) -> bytes:
    """The bytes of a `policy.pt`: encoder, RSSM and actor with all that is needed to build them again."""
    known = {
        "config": dataclasses.asdict(config) | {"run_dir": ""},  # the folder may name its user
        "image_shape": policy.encoder.shape,
        "action_size": policy.actor.action_size,
        "weights": {name: value.cpu() for name, value in policy.state_dict().items()},
    }
    return _torch_bytes(known | about)


def load_policy(path: str | Path) -> tuple[Policy, Config]:
    """The policy of a `policy.pt`, on the CPU, and the configuration that it was trained with.

    Raises UserError if the file is not there or is not a policy of this release.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            if name := archive.testzip():
                raise UserError(f"{path} is damaged ({name})")  # torch would not notice
        saved = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(saved, dict):  # a tensor would answer to a name with a warning of torch's
            raise TypeError("no policy")
        if gone := saved["config"].keys() - hints().keys():
            raise UserError(f"{path} is no policy file of this release: it has {', '.join(sorted(gone))}")
        config = Config(**saved["config"])
        if lacking := {*marked("env"), *marked("fixed"), "eval_action"} - saved["config"].keys():
            what = ", ".join(sorted(lacking))  # whose default of today may not be what it was
            raise UserError(f"{path} is no policy file of this release: it lacks {what}")
        model = WorldModel(config, saved["image_shape"], saved["action_size"])
        actor = Behavior(config, model.rssm.feat_size, saved["action_size"]).actor
        policy = Policy(model.encoder, model.rssm, actor, config.eval_action)
        policy.load_state_dict(saved["weights"])
    except UserError:
        raise
    except FileNotFoundError as error:
        raise UserError(f"there is no {path}; in a run's folder, its first evaluation writes policy.pt") from error
    except OSError as error:
        raise UserError(f"policy {path} can't be read: {error.strerror}") from error
    except Exception as error:  # torch.load raises almost anything for files that aren't its own
        raise UserError(f"{path} is no policy file of this release: {type(error).__name__}") from error
    return policy.eval(), config
