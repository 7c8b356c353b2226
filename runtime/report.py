"""report.html shows runs at a glance: curves, evaluations, pictures and constants, in one file that loads no other.

docs/metrics.md says which plots there are: its headings are the sections, and metrics with the same title share a plot.
"""

import base64
import colorsys
import fnmatch
import functools
import io
import json
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from runtime.checkpoint import write_file
from runtime.console import UserError
from runtime.logger import read_metrics
from runtime.predict import CONTEXT
from train import Config

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.typing import RcKeyType

PAGE = Path(__file__).parent.parent / "docs" / "metrics.md"
OTHERS = "All other metrics"
LOG = ", log axis"  # ends the titles of plots with one
MEAN_OF = 10  # training episodes, whose figures are noisy
COLORS = ("#0b6fb8", "#d9730d", "#2a9d5c", "#c23b6b", "#7a5bc9", "#8a6d3b", "#4b9fb5", "#777777")
DASHES = ("-", "--", ":", "-.")  # they tell metrics apart where colors tell runs apart
PLOT_STYLE: "dict[RcKeyType, Any]" = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#9999aa",
    "axes.grid": True,
    "grid.color": "#e8eaed",
    "legend.edgecolor": "none",
    "legend.framealpha": 0.7,
    "svg.hashsalt": "report",  # equal runs give equal files
}
FACTS = ("task", "robot", "controller", "preset", "seed")  # constants in the first line
CARDS = {  # label: metric and its form
    "updates": "{perf/updates:,.0f}",
    "env steps a second": "{perf/env_steps_per_s:.3g}",
    "updates a second": "{perf/updates_per_s:.3g}",
    "GB of RAM": "{perf/ram_gb:.2f}",
    "GB of GPU memory": "{perf/gpu_gb:.2f}",
}
COLUMNS = {  # of the table of evaluations
    "control step": "{env_step:,}",
    "return": "{eval/return_mean:.1f} ± {eval/return_std:.1f}",
    "success": "{eval/success_rate:.0%}",
    "steps to success": "{eval/time_to_success_mean:.0f}",
    "largest reward": "{eval/max_reward_mean:.2f}",
    "image MSE, 15 steps": "{openloop/image_mse_15:.4f}",
    "reward error": "{reward/error:.3f}",
    "value predicted": "{behavior/value_predicted:.2f}",
    "realized": "{behavior/value_realized:.2f}",
    "episodes": "{eval/episodes:.0f}",
}
FILMS = {  # kind of video: title, and the frames that are shown, as shares of its length
    "eval": ("An evaluation episode: the robot, and what the agent sees", (0.0, 0.25, 0.5, 0.75, 1.0)),
    "openloop": (f"Open-loop prediction: {CONTEXT} frames seen, then imagined", (0.08, 0.4, 1.0)),
    "dream": ("What the policy imagines", (0.1, 0.388, 1.0)),
}
UNREADABLE = (OSError, ImportError, RuntimeError, ValueError, IndexError)  # a damaged video, or one without ffmpeg


class Metric(NamedTuple):
    """A row of the page of metrics."""

    section: str
    name: str  # `*` in it stands for a number
    meaning: str
    plot: str  # title; empty: it has a plot of its own among all other metrics


@functools.cache
def described() -> list[Metric]:
    """What the page of metrics has; nothing if it is not there."""
    found, section = [], ""
    for line in PAGE.read_text().splitlines() if PAGE.exists() else ():
        if line.startswith("## "):
            section = line[3:]
        elif row := re.fullmatch(r"\| `(.+?)` \| (.+) \|(.*)\|", line):
            found.append(Metric(section, row[1], row[2], row[3].strip()))
    return found


@dataclass
class RunData:
    """What a run folder holds, in the form in which the page shows it."""

    folder: Path
    name: str
    color: str
    lines: list[dict[str, float]]  # of metrics.jsonl
    torn: int  # lines that could not be read
    config: dict[str, Any]

    def series(self, metric: str) -> tuple[np.ndarray, np.ndarray]:
        """Control steps and values of a metric, (N,) each."""
        points = [(line["env_step"], line[metric]) for line in self.lines if metric in line]
        steps, values = np.array(points, float).reshape(-1, 2).T
        return steps, values

    def about(self) -> str:
        """What the run is, in one line."""
        words = [f"{name} {self.config[name]}" for name in FACTS if name in self.config]
        written = time.localtime((self.folder / "metrics.jsonl").stat().st_mtime)
        words.append(f"last metrics {time.strftime('%Y-%m-%d %H:%M', written)}")
        if self.torn:
            words.append(f"{self.torn} unreadable line(s) in metrics.jsonl left out")
        return " · ".join(words)

    def cards(self) -> list[tuple[str, str]]:
        """The key figures as (label, value)."""
        total, best = self.config.get("steps"), self.best_evaluation() or {}
        wanted = self.config.get("eval_episodes", 1)  # episodes; an incomplete evaluation says too little
        whole = [x["eval/success_rate"] for x in self.lines if x.get("eval/episodes", 0) >= wanted]
        latest = {name: value for line in self.lines for name, value in line.items()}
        cards = {
            "control steps" + (f" of {total:,}" if total else ""): f"{latest['env_step']:,}",
            "evaluation return, last": _fill("{eval/return_mean:.1f}", latest),
            "evaluation return, policy kept": _fill("{eval/return_mean:.1f}", best),
            "success rate, last": _fill("{eval/success_rate:.0%}", latest),
            "best success rate": f"{max(whole):.0%}" if whole else "",
            "training episodes": f"{len(self.series('episode/return')[0])}",
        } | {label: _fill(form, latest) for label, form in CARDS.items()}
        return [(label, text) for label, text in cards.items() if text]

    def best_evaluation(self) -> dict[str, float] | None:
        """The line of the evaluation whose policy was kept, if there was one."""
        return next((line for line in reversed(self.lines) if line.get("eval/best")), None)

    def evaluations(self) -> list[tuple[bool, list[str]]]:
        """The rows of the table of evaluations, each with whether its policy was kept."""
        lines = [line for line in self.lines if "eval/return_mean" in line]
        best = self.best_evaluation()
        return [(line is best, [_fill(form, line) or "–" for form in COLUMNS.values()]) for line in lines]

    def films(self) -> Iterator[dict[str, Any]]:
        """Frames of the newest video of each kind, or the problem with it."""
        for kind, (title, shares) in FILMS.items():
            for path in sorted((self.folder / "videos").glob(f"{kind}_*.mp4"))[-1:]:
                film = {"kind": kind, "title": title, "after": ""}
                try:
                    film["after"] = f"after {int(path.stem.split('_')[-1]):,} steps"
                    yield film | {"pictures": [_picture(title, "jpeg", data) for data in _frames(path, shares)]}
                except UNREADABLE as error:
                    yield film | {"problem": f"{path.name} could not be read: {error}"}


def write_report(folders: Sequence[Path]) -> Path:
    """Write report.html about the runs into the first one's folder; the path.

    Raises UserError if there is nothing to show or the file can't be written.
    """
    runs = [_read_run(*each) for each in zip(folders, _colors(len(folders)), strict=True)]
    names = [run.name for run in runs]
    for run in runs:
        if names.count(run.name) > 1:
            run.name = str(run.folder)
    path = folders[0] / "report.html"
    try:
        write_file(path, _page(runs).encode())
    except ImportError as error:
        raise UserError(f"the report needs {error.name}: pip install -r requirements.txt") from error
    except OSError as error:
        raise UserError(f"{path} can't be written: {error.strerror}") from error
    return path


def _colors(count: int) -> Sequence[str]:
    """Colors of so many runs, each of another: from COLORS, or from around the color wheel."""
    if count <= len(COLORS):
        return COLORS[:count]
    wheel = [colorsys.hls_to_rgb(i / count, 0.42, 0.65) for i in range(count)]
    return ["#" + "".join(f"{round(255 * x):02x}" for x in color) for color in wheel]


def _read_run(folder: Path, color: str) -> RunData:
    try:
        if not folder.is_dir():
            raise ValueError("there is no such run folder")
        lines, torn = read_metrics(folder)
        config_file = folder / "config.json"
        try:
            config = json.loads(config_file.read_text()) if config_file.exists() else {}
        except ValueError:
            config = None
        if not isinstance(config, dict):
            raise ValueError("its config.json holds no constants")
        if not lines:
            raise ValueError("there are no metrics in it (metrics.jsonl)")
    except (OSError, ValueError) as error:
        raise UserError(f"--report {folder}: {error}") from error
    return RunData(folder, folder.resolve().name, color, lines, torn, config)


def _page(runs: list[RunData]) -> str:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    logged = {name for run in runs for line in run.lines for name in line} - {"env_step"}
    constants = dict.fromkeys(name for run in runs for name in run.config)
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["constant"] = _constant
    return environment.get_template("report.html.jinja").render(
        title=", ".join(run.name for run in runs),
        runs=runs,
        several=len(runs) > 1,
        sections=_sections(runs, logged),
        others=OTHERS,
        columns=COLUMNS,
        differing=[name for name in constants if len({json.dumps(run.config.get(name)) for run in runs}) > 1],
        standard=json.loads(json.dumps(asdict(Config()))),
    )


def _fill(form: str, line: dict[str, float]) -> str:
    """The form with the line's metrics in it, or nothing if one was not measured."""
    try:
        return form.format_map(line)
    except KeyError:
        return ""


def _constant(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value) or "–"


def _picture(title: str, kind: str, data: bytes, about: str = "") -> dict[str, str]:
    """An image within the page; `about` is shown while the pointer is on it."""
    return {"title": title, "source": f"data:image/{kind};base64,{base64.b64encode(data).decode()}", "about": about}


def _frames(path: Path, shares: Sequence[float]) -> list[bytes]:
    """The frames at these shares of a video's length, as JPEG."""
    import imageio.v2 as imageio

    frames = imageio.mimread(path, memtest=False)
    chosen = [frames[round(share * (len(frames) - 1))] for share in shares]
    return [imageio.imwrite("<bytes>", frame, format="jpg", quality=85) for frame in chosen]


def _sections(runs: list[RunData], logged: set[str]) -> dict[str, list[dict[str, str]]]:
    """The plots of each section, of all metrics that some run has logged."""
    plots: dict[tuple[str, str], dict[str, str]] = {}  # section and title: each metric, and what it is
    for metric in described():
        for name in sorted(fnmatch.filter(logged, metric.name), key=lambda name: (len(name), name)):  # by number
            key = (metric.section, metric.plot) if metric.plot else (OTHERS, name)
            plots.setdefault(key, {})[name] = metric.meaning
    known = {name for names in plots.values() for name in names}
    plots |= {(OTHERS, name): {name: ""} for name in sorted(logged - known)}
    sections: dict[str, list[dict[str, str]]] = {}
    for (section, title), names in sorted(plots.items(), key=lambda item: item[0][0] == OTHERS):
        about = "\n".join(f"{name}: {meaning}" for name, meaning in names.items() if meaning)
        picture = _picture(title, "svg+xml", _plot(title, list(names), runs), about)
        sections.setdefault(section, []).append(picture)
    return sections


def _plot(title: str, names: Sequence[str], runs: list[RunData]) -> bytes:
    """Draw metrics of all runs as an SVG image."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    several = len(runs) > 1  # then a color is a run, and a dash pattern a metric
    with matplotlib.rc_context(PLOT_STYLE):
        figure = Figure(figsize=(5.0, 2.7), layout="constrained")
        axes = figure.subplots()
        mean_of = MEAN_OF if all(name.startswith("episode/") for name in names) else 1
        title += f", mean of {mean_of}" if mean_of > 1 else ""
        axes.set_title(title, loc="left", fontsize=10, fontweight="bold", color="#1f2328")
        for i, name in enumerate(names):
            color, dash = COLORS[i % len(COLORS)], DASHES[i % len(DASHES)] if several else "-"
            for run in runs:
                _curve(axes, run, name, run.color if several else color, dash, mean_of)
            if len(names) > 1:
                axes.plot([], [], color="#444444" if several else color, linestyle=dash, linewidth=1.5, label=name)
        if len(names) > 1:
            axes.legend(fontsize=8, ncols=2, loc="best", handlelength=1.8)
        values = np.concatenate([run.series(name)[1] for run in runs for name in names])
        if title.endswith(LOG) and values.min() > 0:
            axes.set_yscale("log")
        elif values.min() >= 0 and 0.5 < values.max() <= 1 and {0, 1} & {values.min(), values.max()}:
            axes.set_ylim(-0.03, 1.03)  # shares
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.margins(x=0.02)
        file = io.BytesIO()
        figure.savefig(file, format="svg", metadata={"Date": None})
    return file.getvalue()


def _curve(axes: "Axes", run: RunData, name: str, color: str, dash: str, mean_of: int) -> None:
    """Draw a metric of a run: with its spread if that is logged, or as points and their running mean."""
    steps, values = run.series(name)
    if not len(steps):
        return
    if mean_of > 1:
        many = len(steps) > 2000  # each point of an SVG takes 400 bytes
        axes.plot(steps, values, ".", markersize=4, alpha=0.3, color=color, markeredgewidth=0, rasterized=many)
        count = min(mean_of, len(values))  # of all if they are fewer
        steps, values = (np.convolve(x, np.full(count, 1 / count), "valid") for x in (steps, values))
    marker = "o" if len(steps) < 40 and mean_of == 1 else None
    axes.plot(steps, values, color=color, linestyle=dash, linewidth=1.5, marker=marker, markersize=2.5)
    spread = run.series(name.removesuffix("_mean") + "_std")[1]
    if name.endswith("_mean") and len(spread) == len(values):
        axes.fill_between(steps, values - spread, values + spread, color=color, alpha=0.15, linewidth=0)
