"""Checkpoints and policy files: written aside and renamed, verified before they are parsed, unable to run code.

A checkpoint is one file, `checkpoint_<env_step>_<hash>.pt`, whose name carries the first 16 hex digits of the
SHA-256 of its bytes. Loading compares them and then reads with `weights_only=True`.
"""

import dataclasses
import hashlib
import io
import os
import re
from pathlib import Path
from pickle import UnpicklingError

import torch

from train import Config, Policy

NAME = re.compile(r"checkpoint_(\d+)_([0-9a-f]{16})\.pt")
KEEP = 2  # newest checkpoints that stay on disk


class CheckpointError(RuntimeError):
    """A run folder or policy file that can't be read; the message is for the user."""


def write_file(path: Path, data: bytes) -> None:
    """Replace `path` with `data` so that a crash at any moment leaves the old file or the new one."""
    aside = path.with_name(f".{path.name}.tmp")
    with open(aside, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)


def save_checkpoint(run_dir: Path, step: int, state: dict) -> Path:
    """Write `state` (tensors and plain values) as the newest checkpoint and drop those older than the last two."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    data = buffer.getvalue()
    path = run_dir / f"checkpoint_{step:09d}_{_digest(data)}.pt"
    write_file(path, data)
    for old in list_checkpoints(run_dir)[KEEP:]:
        old.unlink()
    return path


def list_checkpoints(run_dir: Path) -> list[Path]:
    """Newest first."""
    found = [path for path in run_dir.glob("checkpoint_*.pt") if NAME.fullmatch(path.name)]
    return sorted(found, key=lambda path: (path.name, path.stat().st_mtime), reverse=True)


def load_checkpoint(run_dir: Path, device: torch.device | str = "cpu") -> tuple[dict, Path, list[str]] | None:
    """The newest undamaged checkpoint: its state, its path, and a line about each newer file that is damaged.

    None where there is no checkpoint yet; CheckpointError if all are damaged.
    """
    damaged = []
    for path in list_checkpoints(run_dir):
        try:
            return _load(path, device), path, damaged
        except CheckpointError as error:
            damaged.append(str(error))
    if damaged:
        raise CheckpointError(f"no checkpoint in {run_dir} can be read: {'; '.join(damaged)}")
    return None


def _load(path: Path, device: torch.device | str) -> dict:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path.name}: {error.strerror}") from error
    if _digest(data) != NAME.fullmatch(path.name)[2]:
        raise CheckpointError(f"{path.name} is damaged (its bytes do not match the hash in its name)")
    try:
        return torch.load(io.BytesIO(data), map_location=device, weights_only=True)
    except (RuntimeError, UnpicklingError) as error:
        raise CheckpointError(f"{path.name} holds something else than tensors and plain values: refused") from error


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def save_policy(path: Path, policy: Policy, config: Config, **about) -> None:
    """Write encoder, RSSM and actor with all that is needed to build them again."""
    buffer = io.BytesIO()
    torch.save(
        {
            "config": dataclasses.asdict(config),
            "image_shape": policy.encoder.shape,
            "action_size": policy.actor.out.out_features,
            "weights": {name: value.cpu() for name, value in policy.state_dict().items()},
            **about,
        },
        buffer,
    )
    write_file(path, buffer.getvalue())


def load_policy(path: str | Path, device: torch.device | str = "cpu") -> tuple[Policy, Config]:
    """The policy of a `policy.pt` and the configuration that it was trained with.

    Raises CheckpointError if the file is not there or is not a policy.
    """
    try:
        saved = torch.load(path, map_location=device, weights_only=True)
        config = Config(**saved["config"])
        policy = Policy.build(config, saved["image_shape"], saved["action_size"])
        policy.load_state_dict(saved["weights"])
    except FileNotFoundError as error:
        raise CheckpointError(f"there is no policy file {path}") from error
    except (RuntimeError, OSError, EOFError, KeyError, TypeError, ValueError, UnpicklingError) as error:
        raise CheckpointError(f"{path} is no policy file: {type(error).__name__}") from error
    return policy.to(device).eval(), config
