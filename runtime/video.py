"""Pictures for people: what the robot does, what the model predicts, and what the policy imagines, as mp4 files."""

import contextlib
import functools
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

Color = tuple[int, int, int]
Words = tuple[int, str, Color]  # distance from the left in pixels, text, color

STRIP = 32  # pixels, height of a line of text
MARGIN = 96  # pixels, width of the column of labels
PANEL = 128  # pixels a side, to which smaller pictures of what the agent sees are enlarged
FONT_SIZE = 14  # pixels
LINE = 24  # gray value of the lines between panels
BACKGROUND = (24, 24, 28)
WHITE, GRAY, GREEN, ORANGE = (235, 235, 235), (150, 150, 150), (110, 220, 120), (255, 170, 70)


class VideoError(Exception):
    """A video could not be written; the message says why in one line."""


def write_video(path: Path, frames: np.ndarray, fps: float) -> None:
    """Write frames uint8 (T, H, W, 3) as an mp4, with a black edge where their sides are no multiples of 16.

    A file is there only when it is whole. Raises VideoError if that is impossible.
    """
    aside = path.with_name(f".{path.name}.tmp.mp4")
    edge = (0, -frames.shape[1] % 16), (0, -frames.shape[2] % 16), (0, 0)
    try:
        import imageio.v2 as imageio  # here, so that training goes on without it

        path.parent.mkdir(exist_ok=True)
        writer: Any = imageio.get_writer(
            aside,
            format="FFMPEG",  # without it, what else imageio knows is tried, and fails in ways of its own
            fps=fps,
            codec="libx264",
            quality=8,
            output_params=["-preset", "veryfast"],  # takes a third of the default's time
        )
        with writer:
            for frame in frames:
                writer.append_data(np.pad(frame, edge))
        if b"moov" not in aside.read_bytes():  # the index comes last, and ffmpeg does not report every failure
            raise OSError("the file is cut off; is the disk full?")
        os.replace(aside, path)
    except (OSError, ImportError, RuntimeError, ValueError) as error:  # no ffmpeg, a full disk
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)
        reason = str(error).strip().splitlines()
        raise VideoError(f"{path.name}: {reason[0] if reason else type(error).__name__}") from error


def policy_video(
    renders: np.ndarray, images: np.ndarray, rewards: np.ndarray, successes: np.ndarray, repeat: int
) -> np.ndarray:
    """An episode of n agent steps with step, reward, return and success written on it: uint8 (n + 1, STRIP + h, W, 3).

    A spectator sees `renders`, uint8 (n + 1, h, h, 3), and the agent `images`, uint8 (n + 1, 3 * cameras, size, size).
    A reward is written per control step, of which an agent step has `repeat`.
    """
    frames = []
    for i, (render, image, reward, success) in enumerate(zip(renders, images, rewards, successes, strict=True)):
        picture = policy_frame(render, image)
        words = [
            (8, f"step {i * repeat}", WHITE),
            (92, f"reward {reward / repeat:.2f}", WHITE),
            (192, f"return {rewards[: i + 1].sum():.1f}", WHITE),
            (300, "success" if success else "was solved" if successes[:i].any() else "", GREEN),
        ]
        frames.append(np.concatenate([text_strip(picture.shape[1], words), picture]))
    return np.stack(frames)


def policy_frame(render: np.ndarray, image: np.ndarray) -> np.ndarray:
    """A large frame (h, h, 3) beside what the agent saw, uint8 (3 * cameras, size, size): uint8 (h, W, 3).

    The agent's cameras are enlarged to at most half of the large frame's height and fill columns from the top.
    """
    enlarged = math.ceil(image.shape[-1] / render.shape[0])  # a small frame is drawn as high as the cameras at least
    render = render.repeat(enlarged, 0).repeat(enlarged, 1)
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


def open_loop_video(truth: np.ndarray, model: np.ndarray, cameras: Sequence[str], context: int) -> np.ndarray:
    """The model's prediction beside the truth, (T, B, 3 * cameras, size, size) in [0, 1] each: uint8 (T, H, W, 3).

    Each sequence has a column, and each camera three rows: truth, model, and their difference, which is gray where the
    model is right. The model has observed `context` frames; the others are imagined.
    """
    shown = {"truth": truth, "model": model, "error": (model - truth + 1) / 2}
    by_camera = {what: _by_camera(images, cameras) for what, images in shown.items()}
    rows = {f"{camera}\n{what}": by_camera[what][camera] for camera in by_camera["truth"] for what in shown}
    return _grid(rows, functools.partial(_phase, context=context))


def dream_video(
    seen: np.ndarray, dream: np.ndarray, reward: np.ndarray, cameras: Sequence[str], horizon: int
) -> np.ndarray:
    """What the policy imagines after what it saw, one column a sequence and one row a camera: uint8 (C + K, H, W, 3).

    `seen` (C, B, 3 * cameras, size, size) and `dream` (K, B, ...) are in [0, 1]. Rewards (K, B) are written below their
    columns, and the header marks frames beyond the horizon, from which training does not learn.
    """
    image = np.concatenate([seen, dream])

    def header(t: int) -> tuple[str, Color]:
        step = t - len(seen) + 1
        beyond = f"step {step}, beyond the horizon of {horizon}"  # short enough to stand over two columns
        return (beyond, GRAY) if step > horizon else _phase(t, len(seen))

    def footer(t: int) -> list[str]:
        return [f"{x:.2f}" for x in reward[t - len(seen)]] if t >= len(seen) else [""] * image.shape[1]

    return _grid(_by_camera(image, cameras), header, footer, "reward")


def _by_camera(image: np.ndarray, cameras: Sequence[str]) -> dict[str, np.ndarray]:
    """What each camera shows of (T, B, 3 * cameras, size, size)."""
    return {name.removeprefix("robot0_"): image[:, :, 3 * i : 3 * i + 3] for i, name in enumerate(cameras)}


def _phase(t: int, context: int) -> tuple[str, Color]:
    if t < context:
        return f"observed {t + 1} of {context}", WHITE
    return f"imagined step {t - context + 1}", ORANGE


def _grid(
    rows: dict[str, np.ndarray],
    header: Callable[[int], tuple[str, Color]],
    footer: Callable[[int], list[str]] | None = None,
    footer_label: str = "",
) -> np.ndarray:
    """Lay out rows label -> (T, B, 3, size, size) in [0, 1] under a header, with a footer text below each column."""
    zoom = max(1, PANEL // next(iter(rows.values())).shape[-1])
    pixels = [(row.clip(0, 1) * 255).round().astype(np.uint8) for row in rows.values()]
    video = np.concatenate(pixels, axis=3)  # (T, B, 3, rows * size, size)
    video = np.concatenate(np.moveaxis(np.moveaxis(video, 2, -1), 1, 0), axis=2)  # (T, rows * size, B * size, 3)
    video = video.repeat(zoom, 1).repeat(zoom, 2)
    height, width = video.shape[1] // len(rows), MARGIN + video.shape[2]
    video[:, height - 1 :: height] = video[:, :, height - 1 :: height] = LINE
    labels = np.concatenate([text_strip(MARGIN, [(6, label, WHITE)], height) for label in rows])
    frames = []
    for t, picture in enumerate(video):
        parts = [text_strip(width, [(MARGIN + 6, *header(t))]), np.concatenate([labels, picture], axis=1)]
        if footer:
            texts = [(MARGIN + 6 + height * i, text, WHITE) for i, text in enumerate(footer(t))]
            parts.append(text_strip(width, [(6, footer_label, WHITE), *texts]))
        frames.append(np.concatenate(parts))
    return np.stack(frames)


def text_strip(width: int, words: Sequence[Words], height: int = STRIP) -> np.ndarray:
    """Write words at mid-height of a dark strip: uint8 (height, width, 3)."""
    try:
        from PIL import Image, ImageDraw
    except ImportError:  # imageio needs it too, so `write_video` will fail and say so
        return np.zeros((height, width, 3), np.uint8)
    strip = Image.new("RGB", (width, height), BACKGROUND)
    draw = ImageDraw.Draw(strip)
    for x, text, color in words:
        draw.text((x, height // 2), text, fill=color, font=_font(), anchor="lm")
    return np.asarray(strip)


@functools.cache
def _font() -> Any:
    from PIL import ImageFont

    return ImageFont.load_default(FONT_SIZE)
