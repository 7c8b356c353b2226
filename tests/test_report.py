"""report.html: one file that loads no other, drawn from whatever a run folder holds."""

import base64
import json
import re
import sys
import xml.etree.ElementTree as xml

import numpy as np
import pytest

import run
from runtime import report
from runtime.console import UserError
from runtime.report import write_report
from runtime.video import write_video


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
            lines.append({"env_step": 20 * i, "eval/episodes": 3, "eval/best": float(i <= 12), **evaluation})
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (run_dir / "config.json").write_text(json.dumps({"task": "Lift", "seed": 0, "steps": 400} | (config or {})))
    return run_dir


def images(page: str, kind: str) -> list[bytes]:
    return [base64.b64decode(data) for data in re.findall(rf'src="data:image/{re.escape(kind)};base64,([^"]+)"', page)]


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> str:
    """The report of one run with a video, a torn last line, and a name and a constant that are HTML."""
    run_dir = make_run(tmp_path_factory.mktemp("runs ü"), "<b>run & co", config={"task": "<b>Lift"})
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
    """The page has no script, no link and no frame, and all of its images are in the file."""
    assert not re.search(r"<(script|link|iframe|object|embed|a)\b|@import|url\(|https?:", page, re.IGNORECASE)
    sources = re.findall(r"\bsrc=(.{12})", page)
    assert sources and all(source.startswith('"data:image/') for source in sources)


def test_the_report_has_curves_frames_evaluations_and_configuration(page):
    """The page draws what the run logged, shows the newest video of a kind, and lists all evaluations and constants."""
    plots = images(page, "svg+xml")
    for title in ("Evaluation return", "Return of training episodes", "KL, nats", "my/own"):
        assert f'alt="{title}' in page
    assert all(xml.fromstring(plot).tag.endswith("svg") for plot in plots)
    assert "Gradient norm" not in page  # never logged
    frames = images(page, "jpeg")
    assert len(frames) == len(report.FILMS["eval"][1]) and all(frame.startswith(b"\xff\xd8") for frame in frames)
    assert "after 200 steps" in page and "after 100 steps" not in page
    assert page.count("<tr>") + page.count("<tr class=best>") == 1 + 5 and "20.0 ± 1.0" in page
    assert "<span>seed</span><span>0</span>" in page


def test_what_a_crash_left_is_tolerated_and_said(page):
    """A torn last line and a broken video are named, and cost nothing else."""
    assert "1 unreadable line" in page
    assert "dream_000000200.mp4 could not be read" in page


def test_names_are_text_in_the_report(page):
    """The name of a folder and the value of a constant can't become markup."""
    assert "<b>run" not in page and "&lt;b&gt;run &amp; co" in page
    assert "<b>Lift" not in page and "&lt;b&gt;Lift" in page


def test_a_plot_says_what_its_metrics_are(page):
    """The sentences of docs/metrics.md show up under the pointer."""
    meaning = next(metric.meaning for metric in report.described() if metric.name == "model/kl")
    assert f'title="model/kl: {meaning}' in page and 'alt="my/own" src=' in page


def test_a_figure_that_was_not_measured_is_a_dash(page):
    """An evaluation without some figures keeps its row, and the evaluation whose policy was kept is marked."""
    assert page.count("<tr class=best>") == 1 and page.count("<td>–</td>") == 5 * 6
    assert re.search(r"<tr class=best><td>240</td><td>12.0 ", page)


def test_an_incomplete_evaluation_is_not_the_best(tmp_path):
    """The card has the best success rate of those evaluations in which all episodes could be played."""
    run_dir = make_run(tmp_path, config={"eval_episodes": 3})
    lines = [{"env_step": n, "eval/episodes": n, "eval/success_rate": 1 / n} for n in (4, 3, 2)]
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    cards = dict(report._read_run(run_dir, "red").cards())
    assert (cards["success rate, last"], cards["best success rate"]) == ("50%", "33%")


def test_several_runs_share_their_plots(tmp_path):
    """One plot has the curves of all runs, the first folder gets the page, and the page lists what differs."""
    (tmp_path / "other").mkdir()
    runs = [make_run(tmp_path), make_run(tmp_path / "other", scale=2.0, config={"seed": 1})]
    before = sorted(path.name for path in runs[1].iterdir())
    assert write_report(runs) == runs[0] / "report.html"
    assert sorted(path.name for path in runs[1].iterdir()) == before
    page = (runs[0] / "report.html").read_text()
    assert str(runs[0]) in page and str(runs[1]) in page  # both are called "run"
    plot = images(page, "svg+xml")[0].decode()
    assert all(color in plot for color in report.COLORS[:2])
    assert "<td>seed</td><td>0</td><td>1</td>" in page and "<td>task</td>" not in page


def test_each_of_many_runs_has_a_color_of_its_own(tmp_path):
    """Also where there are more of them than COLORS."""
    folders = [tmp_path / str(i) for i in range(9)]
    for folder in folders:
        folder.mkdir()
        (folder / "metrics.jsonl").write_text(
            '{"env_step": 1, "eval/return_mean": 1}\n{"env_step": 2, "eval/return_mean": 2}\n'
        )
    page = write_report(folders).read_text()
    colors = report._colors(9)
    assert len(set(colors)) == 9
    assert all(color in images(page, "svg+xml")[0].decode() for color in colors)


@pytest.mark.parametrize("content", [None, "", '{"env_step": 1'])
def test_a_folder_without_metrics_gets_one_line_and_exit_code_2(content, tmp_path, capsys):
    """A folder whose metrics are missing, empty or unreadable gets one line of error and no report."""
    if content is not None:
        (tmp_path / "metrics.jsonl").write_text(content)
    assert run.main(["--report", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and str(tmp_path) in error and "no metrics" in error
    assert not (tmp_path / "report.html").exists()


def test_the_report_is_one_command(tmp_path, capsys):
    """`python run.py --report RUN` draws the report and prints its path."""
    run_dir = make_run(tmp_path)
    assert run.main(["--report", str(run_dir)]) == 0
    assert capsys.readouterr().out == f"report {run_dir / 'report.html'}\n"


def test_a_report_that_cannot_be_written_or_drawn_says_so(tmp_path, monkeypatch):
    """A full disk, a missing package and a missing folder each give one line that names them."""
    run_dir = make_run(tmp_path)

    def fail(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(report, "_page", lambda runs: "")
        patch.setattr(report, "write_file", fail)
        with pytest.raises(UserError, match="No space left"):
            write_report([run_dir])
    for package in ("matplotlib", "jinja2"):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, package, None)
            with pytest.raises(UserError, match=package):
                write_report([run_dir])
    assert not (run_dir / "report.html").exists()
    with pytest.raises(UserError, match="no such run folder"):
        write_report([tmp_path / "nowhere"])
    (run_dir / "config.json").write_text('{"task": "Li')
    with pytest.raises(UserError, match=r"its config\.json holds no constants"):
        write_report([run_dir])


def test_a_run_that_lacks_a_metric_shares_its_plot_with_one_that_has_it(tmp_path):
    """A curve that only one run has is drawn, and each run keeps its color."""
    runs = [make_run(tmp_path, "short"), make_run(tmp_path, "long")]
    (runs[0] / "metrics.jsonl").write_text('{"env_step": 20, "episode/return": 1.0}\n')
    page = write_report(runs).read_text()
    plots = dict(zip(re.findall('alt="([^"]+)"', page), images(page, "svg+xml"), strict=True))
    assert report.COLORS[1] in plots["KL, nats"].decode() and report.COLORS[0] not in plots["KL, nats"].decode()
    assert "none yet" in page and "no videos yet" in page


def test_equal_runs_give_equal_pages(tmp_path):
    """A report that is drawn again is the same file, byte for byte."""
    run_dir = make_run(tmp_path)
    assert write_report([run_dir]).read_bytes() == write_report([run_dir]).read_bytes()
