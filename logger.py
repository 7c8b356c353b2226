"""Where a run's numbers and pictures go: metrics.jsonl and videos/ in the run folder, and Weights & Biases.

The local files are the truth; W&B mirrors them when it is installed and not disabled.
"""

import contextlib
import importlib.util
import json
import netrc
import os
from pathlib import Path

import numpy as np
from tqdm import tqdm

WANDB_MODES = ("online", "offline", "disabled")


class Logger:
    """Writes metrics and videos of one run.

    Args:
        run_dir: the run folder.
        config: what `config.json` holds, for W&B.
        wandb_mode: online, offline or disabled.
        wandb_id: of the W&B run to go on with; empty starts a new one.
        size: bytes of metrics.jsonl that belong to the state the run goes on from; what is behind is cut off.
    """

    def __init__(self, run_dir: Path, config: dict, wandb_mode: str, wandb_id: str = "", size: int = 0):
        self.run_dir = run_dir
        # Where the disk is full, lines wait in this buffer: a megabyte is more than a thousand of them.
        self.file = open(run_dir / "metrics.jsonl", "ab", buffering=1 << 20)
        if self.file.seek(0, os.SEEK_END) < size:
            tqdm.write("warning: metrics.jsonl is shorter than it was at the checkpoint: lines are lost")
        else:
            self.file.truncate(size)
            self.file.seek(0, os.SEEK_END)
        self.wandb = None
        if wandb_mode != "disabled":
            self.wandb = _start_wandb(run_dir, config, wandb_mode, wandb_id)

    @property
    def wandb_id(self) -> str:
        return self.wandb.id if self.wandb else ""

    @property
    def size(self) -> int:
        """Bytes of metrics.jsonl so far."""
        return self.file.tell()

    def scalars(self, env_step: int, metrics: dict[str, float]) -> None:
        """Append one line to metrics.jsonl."""
        line = {"env_step": env_step} | {name: _short(value) for name, value in metrics.items()}
        with contextlib.suppress(OSError):  # the line waits in the buffer; sync() raises this before every save
            self.file.write((json.dumps(line) + "\n").encode())
            self.file.flush()
        if self.wandb:
            self.wandb.log(line)

    def sync(self) -> None:
        """Put all lines on the disk; OSError where that is impossible."""
        self.file.flush()
        os.fsync(self.file.fileno())

    def video(self, env_step: int, name: str, frames: np.ndarray, fps: float) -> Path | None:
        """Write frames uint8 (T, H, W, 3), sides multiples of 16, as videos/<name>_<env_step>.mp4."""
        path = self.run_dir / "videos" / f"{name}_{env_step:09d}.mp4"
        if not write_video(path, frames, fps):
            return None
        if self.wandb:
            import wandb

            self.wandb.log({"env_step": env_step, f"video/{name}": wandb.Video(str(path), format="mp4")})
        return path

    def close(self) -> None:
        try:
            self.file.close()
        except OSError as error:
            tqdm.write(f"warning: the last lines of metrics.jsonl are lost: {error.strerror}")
        if self.wandb:
            self.wandb.finish()


def write_video(path: Path, frames: np.ndarray, fps: float) -> bool:
    """Write an mp4; where that is not possible, say so in one line and return False: a video is not worth a run."""
    import imageio.v2 as imageio

    path.parent.mkdir(exist_ok=True)
    try:
        imageio.mimwrite(path, frames, fps=fps, codec="libx264", quality=8, macro_block_size=16)
    except (OSError, ImportError, RuntimeError, ValueError) as error:  # no ffmpeg, a full disk
        path.unlink(missing_ok=True)
        message = str(error).strip().splitlines()
        tqdm.write(f"warning: {path.name} not written: {message[0] if message else type(error).__name__}")
        return False
    return True


def pick_wandb_mode(flag: str, environ: dict[str, str]) -> tuple[str, str]:
    """The W&B mode and the reason: the flag beats WANDB_MODE, which beats "online only where a key exists"."""
    if importlib.util.find_spec("wandb") is None:
        return "disabled", "wandb is not installed"
    if flag != "auto":
        return flag, "--wandb"
    if environ.get("WANDB_MODE") in WANDB_MODES:
        return environ["WANDB_MODE"], "WANDB_MODE"
    if environ.get("WANDB_API_KEY") or _key_in_netrc():
        return "online", "an API key was found"
    return "offline", "no API key was found"


def _key_in_netrc() -> bool:
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators("api.wandb.ai") is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _start_wandb(run_dir: Path, config: dict, mode: str, run_id: str):
    import wandb

    run = wandb.init(
        mode=mode,
        project=os.environ.get("WANDB_PROJECT", "mydreamerv2"),
        name=run_dir.name,
        group=f"{config['task']}_{config['preset']}",
        config=config,
        dir=str(run_dir),
        id=run_id or None,
        resume="allow" if run_id and mode == "online" else None,
        settings=wandb.Settings(silent=True, console="off", x_disable_stats=True),
    )
    run.define_metric("env_step")
    run.define_metric("*", step_metric="env_step")
    return run


def _short(value: float) -> float:
    """Six digits are what a curve needs."""
    return float(f"{float(value):.6g}")


def policy_frame(render: np.ndarray, image: np.ndarray) -> np.ndarray:
    """A large RGB frame (256, 256, 3) beside what the agent saw, uint8 (3 n, h, h): uint8 (256, W, 3)."""
    height = render.shape[0]
    cameras = [np.moveaxis(x, 0, -1) for x in np.split(image, len(image) // 3)]
    zoom = max(1, height // 2 // cameras[0].shape[0])
    cameras = [x.repeat(zoom, 0).repeat(zoom, 1) for x in cameras]
    rows = height // cameras[0].shape[0]  # cameras in a column
    columns = []
    for i in range(0, len(cameras), rows):
        column = np.concatenate(cameras[i : i + rows])
        columns.append(np.pad(column, ((0, height - len(column)), (0, 0), (0, 0))))
    return np.concatenate([render, *columns], axis=1)


def open_loop_frames(truth: np.ndarray, model: np.ndarray) -> np.ndarray:
    """Truth, model and error, each camera on its own: (T, B, 3 n, h, h) in [0, 1] -> uint8 (T, n * 3 * h, B * h, 3).

    From top to bottom: truth, model, error (grey where the model is right) of the first camera, then of the next;
    one column a sequence.
    """
    rows = []
    for camera in range(truth.shape[2] // 3):
        channels = slice(3 * camera, 3 * camera + 3)
        t, m = truth[:, :, channels], model[:, :, channels]
        rows += [t, m, (m - t + 1) / 2]
    video = np.concatenate(rows, axis=3)  # (T, B, 3, n * 3 * h, h)
    video = np.moveaxis(video, 2, -1)  # (T, B, rows, h, 3)
    video = np.concatenate(np.moveaxis(video, 1, 0), axis=2)
    return (video.clip(0, 1) * 255).round().astype(np.uint8)
