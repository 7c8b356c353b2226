"""Pictures for people: what stands where in them, and files that are whole or absent."""

import subprocess
import sys
from pathlib import Path

import imageio.v2 as imageio
import numpy as np
import pytest

from runtime import video
from runtime.video import VideoError, write_video

ROOT = Path(__file__).parent.parent


def test_a_video_is_written_whole(tmp_path):
    """Frames, sides and length come back, and nothing else is left in the folder."""
    frames = np.zeros((12, 32, 48, 3), np.uint8)
    frames[6:] = 255
    write_video(tmp_path / "videos" / "a.mp4", frames, 10)
    back = np.stack(imageio.mimread(tmp_path / "videos" / "a.mp4"))
    assert back.shape == frames.shape and np.abs(back.astype(int) - frames).max() < 10
    assert [path.name for path in (tmp_path / "videos").iterdir()] == ["a.mp4"]


def test_frames_of_any_size_are_written_as_they_are(tmp_path):
    """Below and beside them is a black edge up to the next multiple of 16: nothing is stretched."""
    frames = np.full((3, 40, 50, 3), 200, np.uint8)
    write_video(tmp_path / "a.mp4", frames, 10)
    back = np.stack(imageio.mimread(tmp_path / "a.mp4")).astype(int)
    assert back.shape == (3, 48, 64, 3)
    assert np.abs(back[:, :38, :48] - 200).max() < 12 and back[:, 42:].max() < 40 and back[:, :, 52:].max() < 40


@pytest.mark.parametrize("failure", ["no package", "no ffmpeg", "no folder"])
def test_a_video_that_cannot_be_written_is_a_video_error(failure, tmp_path, monkeypatch):
    """The error has one line with the file's name, and the video of before stays as it was."""
    path = tmp_path / "a.mp4"
    path.write_bytes(b"the video of before")
    if failure == "no package":
        monkeypatch.setitem(sys.modules, "imageio.v2", None)
    elif failure == "no ffmpeg":
        monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(tmp_path / "nothing"))
    else:
        path = path / "a.mp4"
    with pytest.raises(VideoError, match=r"^a\.mp4: [^\n]+$"):
        write_video(path, np.zeros((4, 32, 32, 3), np.uint8), 10)
    assert [file.name for file in tmp_path.iterdir()] == ["a.mp4"]
    assert (tmp_path / "a.mp4").read_bytes() == b"the video of before"


def test_the_module_needs_neither_torch_nor_the_project():
    """Pictures are drawn from plain arrays: importing the module imports neither torch nor the project."""
    code = "import sys, runtime.video; print({'torch', 'train', 'buffer', 'imageio', 'PIL'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "set()", done.stderr


def test_open_loop_video_places_truth_model_and_error():
    """Each camera has its truth, model and error rows, each sequence its column; sides are multiples of 16."""
    truth = np.zeros((7, 2, 6, 64, 64))
    truth[:, 1, 3:] = 1.0  # second sequence, second camera: white
    frames = video.open_loop_video(truth, np.zeros_like(truth), ("agentview", "robot0_eye_in_hand"), context=5)
    assert frames.dtype == np.uint8 and frames.shape == (7, 32 + 6 * 128, 96 + 2 * 128, 3)
    assert all(side % 16 == 0 for side in frames.shape[1:3])
    rows = [frames[:, 32 + 128 * i : 32 + 128 * i + 126, 96:] for i in range(6)]
    left, right = slice(0, 126), slice(128, 254)
    assert (rows[0] <= 24).all() and (rows[3][:, :, right] == 255).all() and (rows[3][:, :, left] == 0).all()
    assert (rows[4][:, :, left] == 0).all()
    assert (rows[5][:, :, left] == 128).all() and (rows[5][:, :, right] == 0).all()  # right; too dark
    assert frames[0, 32:160, :96].max() > 100  # the row's label


def test_open_loop_video_tells_observed_frames_from_imagined_ones():
    """The header's text is white over the observed frames and orange over the imagined ones."""
    frames = video.open_loop_video(np.zeros((7, 1, 3, 64, 64)), np.zeros((7, 1, 3, 64, 64)), ("agentview",), context=5)
    orange = (frames[:, :32].astype(int) * (1, 0, -1)).sum(-1).max((1, 2)) > 50
    assert not orange[:5].any() and orange[5:].all()


def test_dream_video_shows_what_was_seen_then_what_is_imagined():
    """Observed frames come first, then the dream with the imagined reward below each column."""
    seen, dream = np.ones((5, 3, 3, 64, 64)), np.zeros((20, 3, 3, 64, 64))
    frames = video.dream_video(seen, dream, np.full((20, 3), 0.5), ("agentview",), horizon=15)
    assert frames.shape == (25, 32 + 128 + 32, 96 + 3 * 128, 3) and frames.dtype == np.uint8
    assert (frames[4, 32:158, 96:222] == 255).all() and (frames[5, 32:158, 96:222] == 0).all()
    assert frames[5, -32:, 96:].max() > 100 and frames[4, -32:, 96:].max() < 50
    last, beyond = frames[5 + 14, :32], frames[5 + 15, :32]  # of the horizon, and the first beyond it
    assert not np.array_equal(last, beyond)


def test_policy_video_has_its_figures_written_on_it():
    """One frame a row, a strip of text that changes with the figures, green from the first success on."""
    rng = np.random.default_rng(0)
    frames = video.policy_video(
        renders=rng.integers(0, 256, (11, 256, 256, 3), dtype=np.uint8),
        images=rng.integers(0, 256, (11, 3, 64, 64), dtype=np.uint8),
        rewards=np.r_[0, rng.uniform(0, 1, 10)],
        successes=np.arange(11) == 6,
        repeat=1,
    )
    assert frames.shape == (11, 288, 384, 3) and frames.dtype == np.uint8
    assert all(side % 16 == 0 for side in frames.shape[1:3])
    assert not np.array_equal(frames[3, :32], frames[4, :32])
    green = (frames[:, :32, 300:].astype(int) * (-1, 1, -1)).max((1, 2)).max(-1) > 100
    assert not green[:6].any() and green[6:].all()


def test_policy_frame_shows_every_camera_beside_the_large_view():
    """One to three cameras, enlarged to half the height, fill columns from the top."""
    render = np.full((256, 256, 3), 9, np.uint8)
    for cameras, width in ((1, 384), (2, 384), (3, 512)):
        image = np.arange(cameras).repeat(3)[:, None, None] * np.ones((1, 64, 64))
        frame = video.policy_frame(render, image.astype(np.uint8))
        assert frame.shape == (256, width, 3)
        assert (frame[:128, 256:384] == 0).all() and (cameras == 1 or (frame[128:, 256:384] == 1).all())
        assert (frame[:, :256] == 9).all()


def test_text_is_left_out_without_pillow(monkeypatch):
    """Without Pillow the strip is black, so that an optional video never costs the run."""
    monkeypatch.setitem(sys.modules, "PIL", None)
    strip = video.text_strip(64, [(0, "step", video.WHITE)])
    assert strip.shape == (32, 64, 3) and not strip.any()


@pytest.mark.parametrize("height", [16, 48, 64, 100])
def test_a_frame_of_any_size_stands_beside_the_cameras(height):
    """Also one that is smaller than what the agent sees."""
    picture = video.policy_frame(np.full((height, height, 3), 7, np.uint8), np.full((6, 64, 64), 9, np.uint8))
    assert picture.shape[0] >= 64 and (picture[:height, :height] == 7).all() and (picture[0, -1] == 9).all()
