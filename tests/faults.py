"""Faults from outside for the tests of reliability: forked processes, environments that misbehave, damaged files."""

import json
import os
import random
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import numpy as np

import run
from fake_env import FakeEnv
from runtime import checkpoint
from runtime.envs import own_seed
from runtime.logger import Logger, Meter

TINY = (
    "--preset debug --cameras agentview --cnn_depth 2 --deter 8 --hidden 8 --stoch 4 --classes 4 --reward_units 8 "
    "--discount_units 8 --actor_units 8 --value_units 8 --batch_size 2 --batch_length 5 --prefill 20 --pretrain 2 "
    "--train_every 5 --steps 100 --episode_steps 20 --log_every 20 --eval_every 40 --video_every 1000000 --horizon 3 "
    "--imagine_starts 4 --precision float32 --wandb disabled --device cpu"
)
# 8 episodes of 20 steps; training starts in the second, 40 updates; the replay wraps around in the fifth.
SHORT = (
    "--steps 160 --prefill 30 --pretrain 8 --train_every 4 --capacity 90 --log_every 50 --eval_every 60 "
    "--eval_episodes 1 --replay_focus 1 "  # of two sequences one is new, one of the best
    "--policy_average 0.9"  # of 40 updates
)


class NoisyEnv(FakeEnv):
    """Also draws from the global generators, as some users' environments do."""

    def step(self, action):
        noise = 0.01 * (random.random() + np.random.rand())
        return super().step(np.clip(action + np.float32(noise), -1, 1))


class HangingEnv(FakeEnv):
    """The second of several environments stops answering at its 50th step."""

    def __init__(self, *, seed, **options):
        super().__init__(seed=seed, **options)
        self.left = 50 if seed == own_seed(0, 1) else -1

    def step(self, action):
        self.left -= 1
        if self.left == 0:
            time.sleep(1000)
        return super().step(action)


def train(run_dir: Path, flags: str = "", make_env=FakeEnv) -> int:
    return run.main([*TINY.split(), *SHORT.split(), *flags.split(), "--run_dir", str(run_dir)], make_env)


def metrics(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def newest(run_dir: Path) -> dict:
    """The state in the newest checkpoint."""
    return checkpoint.load_checkpoint(run_dir)[0]


def without_videos(monkeypatch) -> None:
    """Encoding videos takes longer than all the rest of a tiny run, and decides nothing in it."""
    monkeypatch.setattr(Logger, "video", lambda *_: None)


def fingerprint(run_dir: Path) -> dict:
    """All that two equal runs have in common at their ends: the newest checkpoint, the metrics, the replay's files.

    The replay's index names each episode by the hash of its rows.
    """
    state = newest(run_dir)
    missing = [name for name, _, _ in state["replay"]["index"] if not (run_dir / "replay" / name).exists()]
    del state["config"]["run_dir"]
    for name in ("size", "wandb_id"):  # depends on the length of the figures of speed
        del state["logger"][name]
    measured = ("_per_s", "_gb", *(f"share_{part}" for part in Meter.PARTS))  # the machine, not the run
    lines = [{name: value for name, value in line.items() if not name.endswith(measured)} for line in metrics(run_dir)]
    return {"state": state, "metrics": lines, "missing": missing}


def difference(a, b, path: str = "") -> str:
    """Where two nested values first differ, or an empty text; tensors and figures are compared bit by bit."""
    if isinstance(a, dict) and isinstance(b, dict):
        if a.keys() != b.keys():
            return f"{path}: {sorted(map(str, a.keys() ^ b.keys()))}"
        return next((found for k in a if (found := difference(a[k], b[k], f"{path}.{k}"))), "")
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        if len(a) != len(b):
            return f"{path}: {len(a)} and {len(b)} entries"
        pairs = enumerate(zip(a, b, strict=True))
        return next((found for i, (x, y) in pairs if (found := difference(x, y, f"{path}[{i}]"))), "")
    if hasattr(a, "numpy") and hasattr(b, "numpy"):
        equal = a.dtype == b.dtype and a.shape == b.shape and a.numpy().tobytes() == b.numpy().tobytes()
        return "" if equal else f"{path}: tensors differ"
    return "" if a == b else f"{path}: {a} and {b}"


def copies_at_each_checkpoint(monkeypatch, to: Path) -> list[Path]:
    """From now on, each checkpoint that is saved leaves a copy of its run folder in `to`; the list grows with them."""
    copies, save = [], checkpoint.save_checkpoint

    def save_and_copy(run_dir, step, state, best_step=-1):
        path = save(run_dir, step, state, best_step)
        copies.append(Path(shutil.copytree(run_dir, to / f"at_{step}")))
        return path

    monkeypatch.setattr(checkpoint, "save_checkpoint", save_and_copy)
    return copies


class Fork:
    """A forked process that runs `work`, with its output in `finish`'s return value.

    Forking saves the seconds that a fresh process takes to import torch. What is open and what was drawn is
    inherited: what must not depend on either is what these tests are about.
    """

    def __init__(self, work: Callable[[], int | None]):
        read, write = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            code = 99
            try:
                signal.alarm(600)  # none is left behind by a test that fails
                os.close(read)
                os.dup2(write, 1)
                os.dup2(write, 2)
                sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)
                code = work() or 0
            except BaseException:  # noqa: B036 (whatever it is, it must not reach pytest in this process)
                traceback.print_exc()
            finally:
                for stream in (sys.stdout, sys.stderr):
                    stream.flush()
                os._exit(code)
        os.close(write)
        self.output, self.status = read, None

    def running(self) -> bool:
        if self.status is None:
            ended, status = os.waitpid(self.pid, os.WNOHANG)
            self.status = status if ended else None
        return self.status is None

    def finish(self, seconds: float) -> tuple[int, str]:
        """Exit code, or minus the number of the signal that killed it, and output; TimeoutError if it takes longer."""
        deadline, chunks = time.monotonic() + seconds, []
        os.set_blocking(self.output, False)
        while True:
            try:
                while chunk := os.read(self.output, 1 << 16):
                    chunks.append(chunk)
            except BlockingIOError:
                pass
            if not self.running():
                break
            if time.monotonic() > deadline:
                os.kill(self.pid, signal.SIGKILL)
                os.waitpid(self.pid, 0)
                raise TimeoutError(b"".join(chunks).decode())
            time.sleep(0.02)
        os.close(self.output)
        return os.waitstatus_to_exitcode(self.status), b"".join(chunks).decode()


def flip_bit(path: Path, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


def descendants(pid: int) -> set[int]:
    """The processes below a process, from /proc."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
        except (FileNotFoundError, ProcessLookupError):  # it has just ended
            continue
    found, new = set(), {pid}
    while new:
        new = {child for child, parent in parents.items() if parent in new}
        found |= new
    return found
