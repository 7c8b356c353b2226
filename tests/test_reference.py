"""The agent computes what the author's TensorFlow DreamerV2 computes, number by number.

`tests/reference` holds recordings of danijar/dreamerv2: weights, batches, every random draw, and the results.
Each is replayed: the weights go into a real `Dreamer`, the draws come out of a `Draws` that hands out the
recorded ones, `train_step` runs three times, and everything on its way is compared.

    python -m pytest tests/test_reference.py [--reference DIR]

replays every recording in DIR. The table of errors is printed at the end of the run.
"""

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from fast import OneHotLinear
from recording import Recording
from replay_case import replay_case
from replay_parts import PARTS, replay_parts

OWN_RECORDINGS = Path(__file__).parent / "reference"


@pytest.fixture(autouse=True)
def rows_are_looked_up(monkeypatch) -> None:
    """With fast.py laid over, also where the rows of a recording are few."""
    monkeypatch.setattr(OneHotLinear, "FEW", 0)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The recorded matrices are tiny: more threads only wait for each other, for minutes on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def replay(path: Path, errors: list[tuple[str, str, float, float]], overlay: bool = False) -> None:
    """Replay the recording `path` (without suffix) and fail with all that did not match."""
    recording = Recording(path, errors)
    if {key.split("/")[0] for key in recording.arrays} & set(PARTS):
        replay_parts(recording)
    else:
        replay_case(recording, overlay)
    recording.finish()


def recordings(folder: Path) -> list[Path]:
    """All recordings in `folder`, or one that does not exist: an empty folder must fail, not be skipped."""
    names = {file.stem for file in folder.glob("*") if file.suffix in (".npz", ".json")}
    return [folder / name for name in sorted(names)] or [folder / "*"]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "path" in metafunc.fixturenames:
        folder = Path(metafunc.config.getoption("--reference") or OWN_RECORDINGS)
        metafunc.parametrize("path", recordings(folder), ids=lambda path: path.name)


@pytest.mark.parametrize("overlay", [False, True], ids=["plain", "fast"])
def test_recording(path: Path, overlay: bool, reference_errors: list):
    """Every recorded number is ours, within what float32 rounding explains, with fast.py laid over or without."""
    replay(path, reference_errors, overlay)


@pytest.fixture
def small_case(tmp_path: Path) -> Path:
    """A copy of the smallest recorded case, for damaging."""
    settings = [file for file in OWN_RECORDINGS.glob("*.json") if "config" in json.loads(file.read_text())]
    source = min(settings, key=lambda file: file.with_suffix(".npz").stat().st_size)
    for suffix in (".npz", ".json"):
        shutil.copy(source.with_suffix(suffix), tmp_path / f"copy{suffix}")
    return tmp_path / "copy"


def with_arrays(case: Path, change: Callable[[dict], object]) -> Path:
    arrays = dict(np.load(f"{case}.npz"))
    change(arrays)
    np.savez(f"{case}.npz", **arrays)
    return case


@pytest.mark.parametrize("key", ["weights/encoder/conv0/kernel", "data/is_last", "wm/embed", "step2/metrics/critic"])
def test_missing_array_is_named(small_case: Path, key: str):
    """A recording without an array fails with the array's name."""
    with pytest.raises(pytest.fail.Exception, match=f"lacks {key}"):
        replay(with_arrays(small_case, lambda arrays: arrays.pop(key)), [])


def test_unknown_array_is_named(small_case: Path):
    """An array that nothing is compared with fails with its name."""
    with pytest.raises(pytest.fail.Exception, match="unknown key wm/novel"):
        replay(with_arrays(small_case, lambda arrays: arrays.update({"wm/novel": np.zeros(1)})), [])


def test_wrong_number_is_named(small_case: Path):
    """A recorded number that is not ours fails with the array's name, NaN included."""

    def damage(arrays: dict) -> None:
        arrays["wm/embed"] += np.float32(1e-3)
        arrays["imag/reward"][0, 0] = np.nan

    with pytest.raises(pytest.fail.Exception, match="(?s)wm/embed is off.*imag/reward is off by inf"):
        replay(with_arrays(small_case, damage), [])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("config.encoder.norm", "layer"),
        ("config.rssm.ensemble", 2),
        ("config.kl.forward", True),
        ("config.actor.dist", "normal"),
        ("config.actor_ent", "linear(1,0.1,100)"),
        ("config.clip_rewards", "sign"),
        ("config.kl.novel", 1),
        ("config.kl.free", None),
        ("trunc_normal_sample_gradient", "other"),
        ("novel", 1),
        ("batch", None),
    ],
)
def test_other_setting_is_named(small_case: Path, name: str, value):
    """A setting that is unknown, missing (None here) or that the project lacks fails with its name."""
    info = json.loads(small_case.with_suffix(".json").read_text())
    *groups, last = name.split(".")
    group = info
    for part in groups:
        group = group[part]
    group[last] = value
    if value is None:
        del group[last]
    small_case.with_suffix(".json").write_text(json.dumps(info))
    with pytest.raises(pytest.fail.Exception, match=re.escape(name)):
        replay(small_case, [])


def test_empty_folder_fails(tmp_path: Path):
    """A folder without recordings, or none at all, is an error that names it."""
    for folder in (tmp_path, tmp_path / "missing"):
        (path,) = recordings(folder)
        with pytest.raises(pytest.fail.Exception, match=str(folder)):
            replay(path, [])
