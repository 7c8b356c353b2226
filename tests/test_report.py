"""report.html: one file that needs no other, from whatever a run folder holds."""

import base64
import json
import re
import xml.etree.ElementTree as xml

import numpy as np
import pytest

import report
import run
from logger import write_video
from report import ReportError, write_report


def make_run(folder, name: str = "run", scale: float = 1.0, config: dict | None = None):
    """A run folder with 20 episodes, 5 evaluations and a few training lines."""
    run_dir = folder / name
    run_dir.mkdir()
    lines = []
    for i in range(1, 21):
        lines.append({"env_step": 20 * i, "episode/return": scale * i, "episode/success": float(i > 10)})
        if i % 4 == 0:
            lines.append({"env_step": 20 * i, "model/kl": 2.0, "model/kl_loss": 1.0, "perf/updates": i, "my/own": 3.0})
            evaluation = {"eval/return_mean": scale * i, "eval/return_std": 1.0, "eval/success_rate": i / 20}
            lines.append({"env_step": 20 * i, "eval/episodes": 3, **evaluation})
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (run_dir / "config.json").write_text(json.dumps({"task": "Lift", "seed": 0, "steps": 400} | (config or {})))
    return run_dir


def images(page: str, kind: str) -> list[bytes]:
    return [base64.b64decode(data) for data in re.findall(rf'src="data:image/{re.escape(kind)};base64,([^"]+)"', page)]


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> str:
    """The report of one run with a video, a torn last line and a name that is HTML."""
    run_dir = make_run(tmp_path_factory.mktemp("runs ü"), "<b>run & co")
    with open(run_dir / "metrics.jsonl", "a") as file:
        file.write('{"env_step": 500, "eval/return_m')
    frames = np.random.default_rng(0).integers(0, 256, (20, 64, 96, 3), dtype=np.uint8)
    for step in (100, 200):
        (run_dir / "videos").mkdir(exist_ok=True)
        write_video(run_dir / "videos" / f"eval_{step:09d}.mp4", frames, 10)
    (run_dir / "videos" / "dream_000000200.mp4").write_bytes(b"no video at all")
    path = write_report([run_dir])
    assert path == run_dir / "report.html" and not list(run_dir.glob(".*"))
    return path.read_text()


def test_the_report_needs_nothing_from_outside(page):
    """No script, no link, no frame; every image is in the file."""
    assert not re.search(r"<(script|link|iframe|object|embed|a)\b|@import|url\(|https?:", page, re.IGNORECASE)
    sources = re.findall(r"\bsrc=(.{12})", page)
    assert sources and all(source.startswith('"data:image/') for source in sources)


def test_the_report_has_curves_frames_evaluations_and_configuration(page):
    """What the run logged is drawn, the newest video of a kind is shown, all evaluations are listed."""
    plots = images(page, "svg+xml")
    for title in ("Evaluation return", "Return of training episodes", "KL, nats", "my/own"):
        assert f'alt="{title}' in page
    assert all(xml.fromstring(plot).tag.endswith("svg") for plot in plots)
    assert "Gradient norm" not in page  # never logged
    frames = images(page, "jpeg")
    assert len(frames) == len(report.FRAMES["eval"][1]) and all(frame.startswith(b"\xff\xd8") for frame in frames)
    assert "after 200 steps" in page and "after 100 steps" not in page
    assert page.count("<tr>") + page.count("<tr class=best>") == 1 + 5 and "20.0 ± 1.0" in page
    assert "<span>seed</span><span>0</span>" in page


def test_what_a_crash_left_is_tolerated_and_said(page):
    """A torn last line and a video that is none cost themselves only."""
    assert "1 unreadable line" in page
    assert "dream_000000200.mp4 could not be read" in page


def test_names_are_text_in_the_report(page):
    """A folder's name can't become markup."""
    assert "<b>run" not in page and "&lt;b&gt;run &amp; co" in page


def test_several_runs_share_their_plots(tmp_path):
    """The curves of all are in one plot, the page is in the first one's folder, and what differs is listed."""
    (tmp_path / "other").mkdir()
    runs = [make_run(tmp_path), make_run(tmp_path / "other", scale=2.0, config={"seed": 1})]
    before = sorted(path.name for path in runs[1].iterdir())
    assert write_report(runs) == runs[0] / "report.html"
    assert sorted(path.name for path in runs[1].iterdir()) == before
    page = (runs[0] / "report.html").read_text()
    assert str(runs[0]) in page and str(runs[1]) in page  # both are called "run"
    plot = images(page, "svg+xml")[0].decode()
    assert all(colour in plot for colour in report.COLOURS[:2])
    assert "<td>seed</td><td>0</td><td>1</td>" in page and "<td>task</td>" not in page


@pytest.mark.parametrize("content", [None, "", '{"env_step": 1'])
def test_a_folder_without_metrics_gets_one_line_and_exit_code_2(content, tmp_path, capsys):
    """Missing, empty or unreadable: nothing is written."""
    if content is not None:
        (tmp_path / "metrics.jsonl").write_text(content)
    assert run.main(["--report", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and str(tmp_path) in error and "no metrics" in error
    assert not (tmp_path / "report.html").exists()


def test_the_report_is_one_command(tmp_path, capsys):
    """`python run.py --report RUN` prints where the report is."""
    run_dir = make_run(tmp_path)
    assert run.main(["--report", str(run_dir)]) == 0
    assert capsys.readouterr().out == f"report {run_dir / 'report.html'}\n"


def test_a_report_that_cannot_be_written_or_drawn_says_so(tmp_path, monkeypatch):
    """A full disk, or no matplotlib: one line."""
    run_dir = make_run(tmp_path)

    def fail(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(report, "_page", lambda runs: "")
        patch.setattr(report, "write_file", fail)
        with pytest.raises(ReportError, match="No space left"):
            write_report([run_dir])
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(ReportError, match="matplotlib"):
        write_report([run_dir])
    with pytest.raises(ReportError, match="no such run folder"):
        write_report([tmp_path / "nowhere"])
