"""metrics.jsonl in the run folder and its mirror on Weights & Biases; means and speeds of training.

The local file is the truth; W&B mirrors it when it is installed and not disabled. docs/metrics.md explains each metric.
"""

import contextlib
import importlib.util
import json
import math
import os
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from buffer import ReplayBuffer
from runtime.console import UserError, warn, warn_once
from runtime.device import OtherPrograms, memory
from runtime.video import VideoError, write_video
from train import Dreamer

WANDB_MODES = ("online", "offline", "disabled")
BUFFER = 1 << 20  # bytes; metrics that a full disk did not take wait here for room


class Stopwatch:
    """Seconds spent in parts of the program: `with watch("env"): ...`."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    @contextlib.contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        """Add the time that the block takes to `part`."""
        started = time.perf_counter()
        yield
        self.seconds[part] += time.perf_counter() - started


class Meter:
    """Means of the training metrics, and speeds, since the last line of them."""

    PARTS = ("env", "update", "eval", "video", "save")

    def __init__(self, agent: Dreamer, replay: ReplayBuffer, watch: Stopwatch):
        self.agent, self.replay, self.watch = agent, replay, watch
        self.totals: dict[str, Tensor | float] = {}  # sums over the updates since the last line
        self.updates = 0  # since the last line
        self.is_new = True  # no update in this process yet
        self.logged = 0  # control step of the last line
        self.others = OtherPrograms()
        self.start(0)

    def start(self, step: int) -> None:
        """Measure speeds from here on: not those of a line that an earlier process began."""
        self.started, self.timed_from = time.monotonic(), (step, self.agent.updates)

    def add(self, metrics: dict[str, Tensor]) -> None:
        """The metrics of one update. Does not wait for the device."""
        for name, value in metrics.items():
            self.totals[name] = self.totals.get(name, 0.0) + value
        self.updates += 1
        self.is_new = False
        if self.agent.device.type == "cpu":
            self.others.look()

    def due(self, step: int, every: int) -> bool:
        """Whether a line is due, `every` control steps after the last one."""
        return self.updates > 0 and step - self.logged >= every

    def line(self, step: int) -> dict[str, float]:
        """The metrics of a line at this control step; begins the next one. Waits for the device."""
        seconds = time.monotonic() - self.started
        metrics = {name: float(total) / self.updates for name, total in self.totals.items()}
        if bad := [name for name, value in metrics.items() if not math.isfinite(value)]:
            warn(f"not finite since the last line, and left out of it: {', '.join(bad)}")
        metrics |= {
            "perf/env_steps_per_s": (step - self.timed_from[0]) / seconds,
            "perf/updates_per_s": (self.agent.updates - self.timed_from[1]) / seconds,
            "perf/updates": self.agent.updates,
            "optim/skipped": sum(float(optimizer.skipped) for optimizer in self.agent.optimizers),
            "replay/steps": self.replay.steps,
            "replay/episodes": sum(map(len, self.replay.episodes)),
            "replay/gb": len(self.replay) * self.replay.row_bytes / 1e9,
        }
        metrics |= {f"perf/share_{part}": self.watch.seconds[part] / seconds for part in self.PARTS}
        metrics |= memory(self.agent.device)
        self.watch.seconds.clear()
        self.totals, self.updates, self.logged = {}, 0, step
        self.start(step)
        return metrics

    def state_dict(self) -> dict[str, Any]:
        """What the next line has so far."""
        return {"totals": self.totals, "updates": self.updates, "logged": self.logged}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with a line that an earlier process began."""
        device = self.agent.device
        self.totals = {name: torch.as_tensor(total).to(device) for name, total in state["totals"].items()}
        self.updates, self.logged = state["updates"], state["logged"]


class Logger:
    """Writes metrics and videos of one run. What can't be written costs one warning, never the run.

    If a run goes on from a `state`, what is behind it in metrics.jsonl is cut off.
    """

    def __init__(self, run_dir: Path, config: dict[str, Any], wandb_mode: str, state: dict[str, Any] | None = None):
        self.run_dir = run_dir
        state = state or {"size": 0, "wandb_id": "", "wandb_step": 0}
        self.wandb_id, self.wandb_step = state["wandb_id"], state["wandb_step"]
        # While the disk is full, lines wait in this buffer: a megabyte is more than a thousand of them.
        path, size = run_dir / "metrics.jsonl", state["size"]
        try:
            self.file = open(path, "ab", buffering=BUFFER)  # noqa: SIM115 (closed in `close`)
        except OSError as error:
            raise UserError(f"{path} can't be written: {error.strerror}") from error
        if self.file.tell() < size:
            warn("metrics.jsonl is shorter than it was at the checkpoint: lines are lost")
            size = path.read_bytes().rfind(b"\n") + 1  # the last line may be torn
        self.file.truncate(size)
        self.size = self.file.seek(size)  # bytes of metrics.jsonl that are on disk
        self.wandb: Any = None
        if wandb_mode != "disabled":
            with self._mirroring():
                self.wandb = _start_wandb(run_dir, config, wandb_mode, self.wandb_id)
                self.wandb_id = self.wandb.id

    def scalars(self, env_step: int, metrics: dict[str, float]) -> None:
        """Append one line to metrics.jsonl, strict JSON: what is not finite is left out."""
        # Six digits are what a curve needs.
        finite = {name: float(f"{float(value):.6g}") for name, value in metrics.items() if math.isfinite(value)}
        line = {"env_step": env_step} | finite
        self._write((json.dumps(line, allow_nan=False) + "\n").encode())
        self._mirror(line)

    def summary(self, figures: dict[str, float]) -> None:
        """Figures of the whole run, for W&B's table of runs."""
        if self.wandb:
            with self._mirroring():
                self.wandb.summary.update(figures)

    def sync(self) -> None:
        """Put all lines on the disk; OSError if that is impossible."""
        self.file.flush()
        os.fsync(self.file.fileno())
        self.size = self.file.tell()

    def video(self, env_step: int, name: str, frames: np.ndarray, fps: float) -> None:
        """Write frames uint8 (T, H, W, 3) as videos/<name>_<env_step>.mp4."""
        path = self.run_dir / "videos" / f"{name}_{env_step:09d}.mp4"
        try:
            write_video(path, frames, fps)
        except VideoError as error:
            warn_once("videos", f"videos can't be written, training goes on: {error}")
            return
        if self.wandb:
            with self._mirroring():
                import wandb

                self._mirror({"env_step": env_step, f"video/{name}": wandb.Video(str(path), format="mp4")})

    def policy(self, path: Path, figures: dict[str, float]) -> None:
        """Send the policy of the best evaluation to W&B as an artifact with that evaluation's figures."""
        if self.wandb:
            import wandb

            with self._mirroring():
                artifact = wandb.Artifact(f"policy-{self.wandb_id}", type="policy", metadata=figures)
                artifact.add_file(str(path))
                self.wandb.log_artifact(artifact)

    def close(self, failed: bool = False) -> None:
        """Write what is left and end the W&B run, as a failed one if it did not come to its end."""
        self._write(b"")
        with contextlib.suppress(OSError):  # _write has said so
            self.file.close()
        if self.wandb:
            with self._mirroring():
                self.wandb.finish(exit_code=int(failed))
        if os.environ.get("WANDB_DATA_DIR") == str(self.run_dir / "wandb"):
            del os.environ["WANDB_DATA_DIR"]  # a later run in this process has a folder of its own

    def state_dict(self) -> dict[str, Any]:
        """Where a run that goes on from here finds its metrics."""
        return {"size": self.size, "wandb_id": self.wandb_id, "wandb_step": self.wandb_step}

    def _write(self, data: bytes) -> None:
        """Bytes that the disk does not take stay in the buffer and are tried again with the next line."""
        try:
            self.file.write(data)
            self.file.flush()
            self.size = self.file.tell()
        except OSError as error:
            warn_once("metrics", f"metrics.jsonl can't be written, training goes on: {error.strerror or error}")

    def _mirror(self, line: dict[str, Any]) -> None:
        """One step of W&B's, which goes on counting when a run is continued: parts of an offline run join in order."""
        if self.wandb:
            with self._mirroring():
                self.wandb.log(line, step=self.wandb_step)
                self.wandb_step += 1

    @contextlib.contextmanager
    def _mirroring(self) -> Iterator[None]:
        """W&B may fail at any call: no network, a full disk, its process gone. The local files go on without it."""
        try:
            yield
        except (Exception, SystemExit) as error:  # settings and broken packages raise more than wandb.Error
            self.wandb = None
            reason = (str(error) or type(error).__name__).splitlines()[0]
            warn_once("W&B", f"W&B is off from here on, training goes on: {reason}")
            with contextlib.suppress(Exception):
                import wandb

                wandb.teardown()  # or its exit hook stumbles over the same, with a traceback


def read_metrics(run_dir: Path) -> tuple[list[dict[str, float]], int]:
    """The lines of metrics.jsonl and how many could not be read, such as a last one torn by a crash."""
    path, lines, torn = run_dir / "metrics.jsonl", [], 0
    for text in path.read_bytes().splitlines() if path.exists() else ():
        try:
            line = json.loads(text)
            if not isinstance(line, dict) or "env_step" not in line:
                raise ValueError("no metrics")
            lines.append({name: float(value) for name, value in line.items()} | {"env_step": int(line["env_step"])})
        except (ValueError, TypeError, OverflowError, RecursionError):  # of json and of utf-8 too
            torn += 1
    return lines, torn


def pick_wandb_mode(flag: str) -> tuple[str, str]:
    """The W&B mode and the reason: the flag beats WANDB_MODE, which beats "online only where a key exists".

    Without a key it is never online: W&B would ask for one at the terminal.
    """
    if importlib.util.find_spec("wandb") is None:
        return "disabled", "wandb is not installed"
    asked, source = (flag, "--wandb") if flag != "auto" else (os.environ.get("WANDB_MODE"), "WANDB_MODE")
    asked = "offline" if asked == "dryrun" else asked  # an older name, which wandb still takes
    if asked and asked not in WANDB_MODES:
        return "disabled", f"{source} {asked} is unknown; valid: {', '.join(WANDB_MODES)}"
    if asked in ("offline", "disabled"):
        return asked, source
    if lack := _lack_of_key():
        return "offline", f"{source} online, but {lack}" if asked else lack
    return "online", source if asked else "an API key was found"


def _lack_of_key() -> str:
    """Why W&B would ask for an API key, or nothing. W&B itself looks for one: its releases differ in where that is."""
    try:
        import wandb
        from wandb.sdk.lib import wbauth

        host = wandb.setup(settings=wandb.Settings(silent=True)).settings.base_url
        found = wbauth.authenticate_session(host=host, source="run.py", prompt=False, update_session=False)
        return "" if found else "no API key was found"
    except Exception as error:  # settings that it refuses, a broken package
        return f"no API key can be looked for: {(str(error) or type(error).__name__).splitlines()[0]}"


def _start_wandb(run_dir: Path, config: dict[str, Any], mode: str, run_id: str) -> Any:
    import wandb

    # W&B copies artifacts before it sends them, by default into the home folder, which may not be writable.
    os.environ.setdefault("WANDB_DATA_DIR", str(run_dir / "wandb"))
    run = wandb.init(
        mode=mode,  # type: ignore[arg-type]
        project=os.environ.get("WANDB_PROJECT", "mydreamerv2"),
        name=run_dir.name,
        group=f"{config['task']}_{config['preset']}",
        job_type="train",
        tags=[config["task"], config["robot"], config["controller"], config["preset"]],
        config={name: value for name, value in config.items() if name != "run_dir"},
        dir=str(run_dir),
        id=run_id or None,
        resume="allow" if run_id else None,
        settings=wandb.Settings(
            silent=True,
            console="off",
            init_timeout=30,  # seconds
            finish_timeout=30,
            x_disable_stats=True,
            # Host, user, paths, git remotes and packages installed from a folder name people.
            x_disable_meta=True,
            x_disable_machine_info=True,
            disable_git=True,
            disable_code=True,
            x_save_requirements=False,
            host="-",
        ),
    )
    run.define_metric("env_step")
    run.define_metric("*", step_metric="env_step")
    return run
