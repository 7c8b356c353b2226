"""What a run shows of itself: metrics.jsonl and videos/ in the run folder, and the same on Weights & Biases.

The local files are the truth; W&B mirrors them when it is installed and not disabled. From top to bottom: the Logger,
W&B, figures of evaluation episodes, pictures. README.md explains each metric.
"""

import contextlib
import dataclasses
import functools
import importlib.util
import json
import math
import netrc
import os
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from urllib.parse import urlparse

import numpy as np
import torch
from tqdm import tqdm

from buffer import Batch
from networks import Draws
from train import CONTEXT, Dreamer, Prediction

WANDB_MODES = ("online", "offline", "disabled")
BUFFER = 1 << 20  # bytes; metrics that a full disk did not take wait here for room

OPEN_LOOP_STEPS = (1, 5, 15, 45)  # imagined agent steps after which the open-loop error is logged
OPEN_LOOP_WINDOWS = 24  # sequences that the open-loop errors are means of
RECORDINGS = 6  # evaluation episodes that are kept for figures and pictures
SEQUENCES = 6  # columns of the open-loop and the imagination videos
# Lift's dense reward a control step: at most 0.444 near the cube, 0.556 with both fingers on it, 1 with it in the air.
LIFT_CLASSES = {"hovering": (-np.inf, 0.45), "holding": (0.45, 0.6), "lifted": (0.6, np.inf)}


class VideoError(Exception):
    """Why a video could not be written, in one line."""


class Logger:
    """Writes metrics and videos of one run. What can't be written costs one warning, never the run.

    Args:
        run_dir: the run folder.
        config: what `config.json` holds, for W&B.
        wandb_mode: online, offline or disabled.
        wandb_id: of the W&B run to go on with; empty starts a new one.
        size: bytes of metrics.jsonl that belong to the state the run goes on from; what is behind is cut off.
    """

    def __init__(self, run_dir: Path, config: dict, wandb_mode: str, wandb_id: str = "", size: int = 0):
        self.run_dir, self.wandb_id = run_dir, wandb_id
        # Where the disk is full, lines wait in this buffer: a megabyte is more than a thousand of them.
        self.file = open(run_dir / "metrics.jsonl", "ab", buffering=BUFFER)
        if self.file.tell() < size:
            tqdm.write("warning: metrics.jsonl is shorter than it was at the checkpoint: lines are lost")
        else:
            self.file.truncate(size)
            self.file.seek(size)
        self.size = self.file.tell()  # bytes of metrics.jsonl that are on disk
        self.warned: set[str] = set()
        self.wandb = None
        if wandb_mode != "disabled":
            with self._mirroring():
                self.wandb = _start_wandb(run_dir, config, wandb_mode, wandb_id)
                self.wandb_id = self.wandb.id
        earlier = [line["eval/success_rate"] for line in read_metrics(run_dir)[0] if "eval/success_rate" in line]
        self.best_success = max(earlier, default=0.0)

    def scalars(self, env_step: int, metrics: dict[str, float]) -> None:
        """Append one line to metrics.jsonl."""
        line = {"env_step": env_step} | {name: _short(value) for name, value in metrics.items()}
        self._write((json.dumps(line) + "\n").encode())
        success = line.get("eval/success_rate")
        if success is not None:
            self.best_success = max(self.best_success, success)
        if self.wandb:
            with self._mirroring():
                self.wandb.log(line)
                if success is not None:
                    self.wandb.summary.update({"best_success_rate": self.best_success, "last_success_rate": success})

    def sync(self) -> None:
        """Put all lines on the disk; OSError where that is impossible."""
        self.file.flush()
        os.fsync(self.file.fileno())
        self.size = self.file.tell()

    def video(self, env_step: int, name: str, frames: np.ndarray, fps: float) -> None:
        """Write frames uint8 (T, H, W, 3), sides multiples of 16, as videos/<name>_<env_step>.mp4."""
        path = self.run_dir / "videos" / f"{name}_{env_step:09d}.mp4"
        try:
            write_video(path, frames, fps)
        except VideoError as error:
            self.warn("videos can't be written", str(error))
            return
        if self.wandb:
            import wandb

            with self._mirroring():
                self.wandb.log({"env_step": env_step, f"video/{name}": wandb.Video(str(path), format="mp4")})

    def warn(self, what: str, reason: str) -> None:
        """Say `what` went wrong, and why, once in a run."""
        if what not in self.warned:
            tqdm.write(f"warning: {what}, training goes on: {reason}")
            self.warned.add(what)

    def close(self) -> None:
        self._write(b"")
        with contextlib.suppress(OSError):  # _write has said so
            self.file.close()
        if self.wandb:
            with self._mirroring():
                self.wandb.finish()

    def _write(self, data: bytes) -> None:
        """Bytes that the disk does not take stay in the buffer and are tried again with the next line."""
        try:
            self.file.write(data)
            self.file.flush()
            self.size = self.file.tell()
        except OSError as error:
            self.warn("metrics.jsonl can't be written", error.strerror or str(error))

    @contextlib.contextmanager
    def _mirroring(self) -> Iterator[None]:
        """W&B may fail at any call: no network, a full disk, its process gone. The local files go on without it."""
        try:
            yield
        except Exception as error:  # its settings' validation and a broken package raise more than wandb.Error
            self.wandb = None
            self.warn("W&B is off from here on", (str(error) or type(error).__name__).splitlines()[0])
            with contextlib.suppress(Exception):
                import wandb

                wandb.teardown()  # or its exit hook stumbles over the same, with a traceback


def read_metrics(run_dir: Path) -> tuple[list[dict], int]:
    """The lines of metrics.jsonl and how many could not be read, such as a last one torn by a crash."""
    path, lines, torn = run_dir / "metrics.jsonl", [], 0
    for text in path.read_bytes().splitlines() if path.exists() else ():
        try:
            line = json.loads(text)
            if not isinstance(line, dict) or "env_step" not in line:
                raise ValueError("no metrics")
            lines.append(line)
        except ValueError:  # of json and of utf-8 too
            torn += 1
    return lines, torn


def write_video(path: Path, frames: np.ndarray, fps: float) -> None:
    """Write frames uint8 (T, H, W, 3), sides multiples of 16, as an mp4. VideoError where that is not possible."""
    aside = path.with_name(f".{path.name}.tmp.mp4")
    try:
        import imageio.v2 as imageio

        path.parent.mkdir(exist_ok=True)
        # veryfast takes a third of the time of the standard one
        imageio.mimwrite(
            aside,
            frames,
            fps=fps,
            codec="libx264",
            quality=8,
            macro_block_size=16,
            output_params=["-preset", "veryfast"],
        )
        if b"moov" not in aside.read_bytes():  # the index, written last; ffmpeg's own failure is not always reported
            raise OSError("the file is cut off; is the disk full?")
        os.replace(aside, path)
    except (OSError, ImportError, RuntimeError, ValueError) as error:  # no ffmpeg, a full disk
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)
        message = str(error).strip().splitlines()
        raise VideoError(f"{path.name}: {message[0] if message else type(error).__name__}") from error


def _short(value: float) -> float:
    """Six digits are what a curve needs."""
    return float(f"{float(value):.6g}")


class Stopwatch:
    """Seconds spent in parts of the program: `with watch("env"): ...`."""

    def __init__(self):
        self.seconds: dict[str, float] = defaultdict(float)

    @contextlib.contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds[part] += time.perf_counter() - started


def memory(device: torch.device) -> dict[str, float]:
    """GB that this process takes: of RAM, and of the GPU's memory (CUDA: the largest so far)."""
    try:
        with open("/proc/self/statm") as file:
            ram = int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:  # not Linux: the largest so far, for want of a better figure in the standard library
        import resource

        ram = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    figures = {"perf/ram_gb": ram / 1e9}
    if device.type == "cuda":
        figures["perf/gpu_gb"] = torch.cuda.max_memory_allocated(device) / 1e9
    elif device.type == "mps":
        figures["perf/gpu_gb"] = torch.mps.current_allocated_memory() / 1e9
    return figures


# ---------------------------------------------------------------------------------------------- Weights & Biases


def pick_wandb_mode(flag: str, environ: dict[str, str]) -> tuple[str, str]:
    """The W&B mode and the reason: the flag beats WANDB_MODE, which beats "online only where a key exists".

    Without a key it is never online: W&B would ask for one at the terminal.
    """
    if importlib.util.find_spec("wandb") is None:
        return "disabled", "wandb is not installed"
    key = bool(environ.get("WANDB_API_KEY")) or _key_in_netrc(environ)
    asked, source = (flag, "--wandb") if flag != "auto" else (environ.get("WANDB_MODE"), "WANDB_MODE")
    if asked == "online" and not key:
        return "offline", f"{source} online, but no API key was found"
    if asked == "dryrun":  # an older name, which wandb still takes
        return "offline", source
    if asked in WANDB_MODES:
        return asked, source
    if asked:
        return "disabled", f"{source} {asked} is unknown; valid: {', '.join(WANDB_MODES)}"
    return ("online", "an API key was found") if key else ("offline", "no API key was found")


def _key_in_netrc(environ: dict[str, str]) -> bool:
    host = urlparse(environ.get("WANDB_BASE_URL", "")).hostname or "api.wandb.ai"
    try:
        return netrc.netrc(environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _start_wandb(run_dir: Path, config: dict, mode: str, run_id: str):
    import wandb

    run = wandb.init(
        mode=mode,
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


# ---------------------------------------------------------------------------------------------- episodes


@dataclasses.dataclass
class EpisodeStats:
    """Figures of one episode; times in control steps, `repeat` of which make an agent step."""

    repeat: int
    total: float = 0.0
    length: int = 0
    max_reward: float = -math.inf  # of a control step
    success_at: int = 0  # 0: not yet

    def add(self, reward: float, success: bool) -> None:
        """One agent step."""
        self.total += reward
        self.length += self.repeat
        self.max_reward = max(self.max_reward, reward / self.repeat)
        if success and not self.success_at:
            self.success_at = self.length

    def metrics(self) -> dict[str, float]:
        """Without `time_to_success` where there was none."""
        figures = {
            "return": self.total,
            "length": self.length,
            "max_reward": self.max_reward,
            "success": float(self.success_at > 0),
        }
        return figures | ({"time_to_success": self.success_at} if self.success_at else {})


@dataclasses.dataclass
class Recording:
    """An evaluation episode of n agent steps; rows are those of the replay (buffer.py)."""

    image: np.ndarray  # (n + 1, C, H, W) uint8
    action: np.ndarray  # (n + 1, A)
    reward: np.ndarray  # (n + 1,)
    success: np.ndarray  # (n + 1,) bool
    terminal: bool  # the task ended the episode, not the clock
    renders: np.ndarray | None  # (n + 1, h, h, 3) uint8, where the episode was filmed


@dataclasses.dataclass
class Evaluation:
    """What the episodes of an evaluation gave, and recordings of the first ones."""

    episodes: list[EpisodeStats]
    recordings: list[Recording]
    render_seconds: float = 0.0

    def summary(self) -> dict[str, float]:
        """Mean and spread of each figure over the episodes (time to success: over those with success)."""
        figures = [episode.metrics() for episode in self.episodes]
        summary = {
            "eval/success_rate": float(np.mean([x["success"] for x in figures])),
            "eval/episodes": len(figures),
        }
        for name in ("return", "length", "max_reward", "time_to_success"):
            if values := [x[name] for x in figures if name in x]:
                summary |= {f"eval/{name}_mean": float(np.mean(values)), f"eval/{name}_std": float(np.std(values))}
        return summary


@dataclasses.dataclass
class Analysis:
    """How model and critic see evaluation episodes, which training never saw."""

    metrics: dict[str, float]
    windows: Batch  # (T, B, ...), T at most 50
    prediction: Prediction  # of these windows, open loop


def analyse(agent: Dreamer, recordings: Sequence[Recording], draws: Draws) -> Analysis:
    """Open-loop errors, reward errors and value calibration; changes nothing in the agent."""
    c, model = agent.config, agent.world_model
    windows = open_loop_windows(recordings).to(agent.device)
    prediction = agent.predict(windows, draws)
    truth, model_image = windows.image.float() / 255, prediction.image
    metrics = {}
    for k in OPEN_LOOP_STEPS:
        row = CONTEXT + k - 1
        if row < len(truth):
            reward_error = (prediction.reward[row] - model.learned_reward(windows.reward[row])).abs().mean()
            metrics[f"openloop/image_mse_{k}"] = float((model_image[row] - truth[row]).square().mean())
            metrics[f"openloop/reward_error_{k}"] = float(reward_error)

    episodes, length = whole_episodes(recordings)
    reward, value = (x.float().cpu().numpy() for x in agent.judge(episodes.to(agent.device), draws))  # (T, B)
    learned = model.learned_reward(episodes.reward).numpy()
    inside = np.arange(len(reward))[:, None] < length  # (T, B): no padding
    error = np.abs(reward - learned)
    metrics["reward/error"] = float(error[inside].mean())
    if c.task == "Lift" and c.reward_shaping:
        step_reward = episodes.reward.numpy() / c.action_repeat
        for name, (low, high) in LIFT_CLASSES.items():
            rows = inside & (step_reward >= low) & (step_reward < high)
            if rows.any():
                metrics[f"reward/error_{name}"] = float(error[rows].mean())

    realised = np.full_like(value, np.nan)
    for b, recording in enumerate(recordings):
        rows = slice(0, length[b])
        realised[rows, b] = realised_return(learned[rows, b], value[length[b] - 1, b], recording.terminal, c.discount)
    known = inside.copy()
    known[length - 1, np.arange(len(length))] = [recording.terminal for recording in recordings]
    metrics["behaviour/value_predicted"] = float(value[known].mean())
    metrics["behaviour/value_realised"] = float(realised[known].mean())
    metrics["behaviour/value_error"] = float(np.abs(value - realised)[known].mean())
    return Analysis(metrics, windows, prediction)


def realised_return(reward: np.ndarray, last_value: float, terminal: bool, discount: float) -> np.ndarray:
    """The discounted return from each row on, the row's own reward included: (n + 1,) -> (n + 1,).

    Where the clock ended the episode, the critic's value of the last row stands for what would have followed.
    """
    returns = np.empty(len(reward))
    returns[-1] = reward[-1] if terminal else last_value
    for t in reversed(range(len(reward) - 1)):
        returns[t] = reward[t] + discount * returns[t + 1]
    return returns


def open_loop_windows(recordings: Sequence[Recording]) -> Batch:
    """Windows of 50 rows, or of the longest episode's, as (T, B, ...): the first of each episode, then the second."""
    length = min(CONTEXT + max(OPEN_LOOP_STEPS), max(len(recording.image) for recording in recordings))
    parts = max(len(recording.image) for recording in recordings) // length
    windows = [
        (recording, slice(part * length, (part + 1) * length))
        for part in range(parts)
        for recording in recordings
        if (part + 1) * length <= len(recording.image)
    ]
    return _batch([_cut(recording, rows) for recording, rows in windows[:OPEN_LOOP_WINDOWS]])


def whole_episodes(recordings: Sequence[Recording]) -> tuple[Batch, np.ndarray]:
    """All rows of each episode as (T, B, ...), the shorter ones padded with their last row, and their lengths (B,)."""
    length = np.array([len(recording.image) for recording in recordings])
    padded = [np.minimum(np.arange(length.max()), n - 1) for n in length]
    return _batch([_cut(recording, rows) for recording, rows in zip(recordings, padded, strict=True)]), length


def _cut(recording: Recording, rows: slice | np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return recording.image[rows], recording.action[rows], recording.reward[rows]


def _batch(columns: list[tuple[np.ndarray, np.ndarray, np.ndarray]]) -> Batch:
    image, action, reward = (torch.as_tensor(np.stack(x, axis=1)) for x in zip(*columns, strict=True))
    nothing = torch.zeros(reward.shape, dtype=torch.bool)
    is_first = nothing.clone()
    is_first[0] = True
    return Batch(image, action, reward, is_first, nothing)


# ---------------------------------------------------------------------------------------------- pictures

STRIP = 32  # pixels, height of a line of text
MARGIN = 96  # pixels, width of the column of labels
PANEL = 128  # pixels a side, at least, of what the agent sees
FONT_SIZE = 14
LINE = 24  # grey of the lines between panels
WHITE, GREY, GREEN, ORANGE = (235, 235, 235), (150, 150, 150), (110, 220, 120), (255, 170, 70)


def policy_video(recording: Recording, repeat: int) -> np.ndarray:
    """A filmed episode with step, reward, return and success written on it: uint8 (n + 1, 288, W, 3)."""
    frames, total, solved = [], 0.0, False
    for i, render in enumerate(recording.renders):
        total += recording.reward[i]
        solved |= bool(recording.success[i])
        picture = policy_frame(render, recording.image[i])
        words = [
            (8, f"step {i * repeat}", WHITE),
            (92, f"reward {recording.reward[i] / repeat:.2f}", WHITE),
            (192, f"return {total:.1f}", WHITE),
            (300, "success" if recording.success[i] else "was solved" if solved else "", GREEN),
        ]
        frames.append(np.concatenate([text_strip(picture.shape[1], words), picture]))
    return np.stack(frames)


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


def open_loop_video(truth: np.ndarray, model: np.ndarray, cameras: Sequence[str]) -> np.ndarray:
    """Truth, model and error, each camera on its own: (T, B, 3 n, h, h) in [0, 1] -> uint8 (T, H, W, 3).

    From top to bottom: truth, model, error (grey where the model is right) of the first camera, then of the next;
    one column a sequence.
    """
    rows = {}
    for i, camera in enumerate(cameras):
        t, m = truth[:, :, 3 * i : 3 * i + 3], model[:, :, 3 * i : 3 * i + 3]
        rows |= {
            f"{_label(camera)}\ntruth": t,
            f"{_label(camera)}\nmodel": m,
            f"{_label(camera)}\nerror": (m - t + 1) / 2,
        }
    return _film(rows, _phase)


def dream_video(seen: np.ndarray, dream: np.ndarray, reward: np.ndarray, cameras: Sequence[str], horizon: int):
    """What the policy imagines after frames it saw: (C, B, 3 n, h, h) and (K, B, 3 n, h, h) -> uint8 (C + K, H, W, 3).

    The last line has the imagined reward (K, B) of each column; what is beyond the training's `horizon` says so.
    """
    image = np.concatenate([seen, dream])
    rows = {_label(camera): image[:, :, 3 * i : 3 * i + 3] for i, camera in enumerate(cameras)}

    def phase(t: int) -> tuple[str, tuple[int, int, int]]:
        beyond = t - len(seen) + 1 > horizon
        words, colour = _phase(t)
        return (f"{words}, beyond the horizon of {horizon}", GREY) if beyond else (words, colour)

    def footer(t: int) -> list[str]:
        return [f"{x:.2f}" for x in reward[t - len(seen)]] if t >= len(seen) else [""] * image.shape[1]

    return _film(rows, phase, footer, "reward")


def _phase(t: int) -> tuple[str, tuple[int, int, int]]:
    return (f"observed {t + 1} of {CONTEXT}", WHITE) if t < CONTEXT else (f"imagined step {t - CONTEXT + 1}", ORANGE)


def _label(camera: str) -> str:
    return camera.removeprefix("robot0_")


def _film(
    rows: dict[str, np.ndarray],
    header: Callable[[int], tuple[str, tuple[int, int, int]]],
    footer: Callable[[int], list[str]] | None = None,
    footer_label: str = "",
) -> np.ndarray:
    """Rows label -> (T, B, 3, h, h) in [0, 1], with a header line and, if given, a text under each column."""
    zoom = max(1, PANEL // next(iter(rows.values())).shape[-1])
    pixels = [(row.clip(0, 1) * 255).round().astype(np.uint8) for row in rows.values()]
    video = np.concatenate(pixels, axis=3)  # (T, B, 3, rows * h, h)
    video = np.concatenate(np.moveaxis(np.moveaxis(video, 2, -1), 1, 0), axis=2)  # (T, rows * h, B * h, 3)
    video = video.repeat(zoom, 1).repeat(zoom, 2)
    height, width = video.shape[1] // len(rows), MARGIN + video.shape[2]
    video[:, height - 1 :: height] = video[:, :, height - 1 :: height] = LINE  # thin lines between panels
    labels = np.concatenate([text_strip(MARGIN, [(6, label, WHITE)], height) for label in rows])
    frames = []
    for t, picture in enumerate(video):
        lines = [text_strip(width, [(MARGIN + 6, *header(t))]), np.concatenate([labels, picture], axis=1)]
        if footer:
            texts = [(MARGIN + 6 + height * i, text, WHITE) for i, text in enumerate(footer(t))]
            lines.append(text_strip(width, [(6, footer_label, WHITE), *texts]))
        frames.append(np.concatenate(lines))
    return np.stack(frames)


def text_strip(width: int, words: Sequence[tuple[int, str, tuple[int, int, int]]], height: int = STRIP) -> np.ndarray:
    """Words (x in pixels, text, colour), in the middle of a dark strip: uint8 (height, width, 3)."""
    try:
        from PIL import Image, ImageDraw
    except ImportError:  # imageio needs it too, so the video itself is what will be missed and warned about
        return np.zeros((height, width, 3), np.uint8)
    strip = Image.new("RGB", (width, height), (24, 24, 28))
    draw = ImageDraw.Draw(strip)
    for x, text, colour in words:
        draw.text((x, height // 2), text, fill=colour, font=_font(), anchor="lm")
    return np.asarray(strip)


@functools.cache
def _font():
    from PIL import ImageFont

    return ImageFont.load_default(FONT_SIZE)
