"""One HTML file that shows runs at a glance: curves, evaluations, pictures, configuration. It loads nothing else."""

import base64
import html
import io
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from checkpoint import write_file
from logger import CONTEXT, OPEN_LOOP_STEPS, read_metrics
from train import Config

COLOURS = ("#0b6fb8", "#d9730d", "#2a9d5c", "#c23b6b", "#7a5bc9", "#8a6d3b", "#4b9fb5", "#777777")
DASHES = ("-", "--", ":", "-.")  # of metrics, where colours tell runs apart
MEAN_OF = 10  # episodes in a running mean, as the titles say


class ReportError(Exception):
    """Why there is no report, in one line."""


class Panel(NamedTuple):
    """One small plot."""

    title: str
    metrics: dict[str, str]  # label -> metric
    log: bool = False
    episodes: bool = False  # one point an episode: shown faintly, with their running mean
    spread: str = ""  # metric whose values are drawn as a band around the first
    share: bool = False  # between 0 and 1


SECTIONS: dict[str, tuple[Panel, ...]] = {
    "Does it learn?": (
        Panel("Evaluation return, mean ± spread", {"": "eval/return_mean"}, spread="eval/return_std"),
        Panel("Evaluation success rate", {"": "eval/success_rate"}, share=True),
        Panel("Return of training episodes, mean of 10", {"": "episode/return"}, episodes=True),
        Panel("Success of training episodes, mean of 10", {"": "episode/success"}, episodes=True, share=True),
        Panel("Largest reward of a control step, evaluation", {"": "eval/max_reward_mean"}),
        Panel("Control steps to success, evaluation", {"": "eval/time_to_success_mean"}),
    ),
    "Is the model right?": (
        Panel(
            "Open-loop image MSE after k imagined steps", {f"{k}": f"openloop/image_mse_{k}" for k in OPEN_LOOP_STEPS}
        ),
        Panel("Open-loop reward error after k steps", {f"{k}": f"openloop/reward_error_{k}" for k in OPEN_LOOP_STEPS}),
        Panel(
            "Reward error by class of the true reward",
            {name: f"reward/error_{name}" for name in ("hovering", "holding", "lifted")} | {"all": "reward/error"},
        ),
        Panel("Image MSE in training", {"": "model/image_mse"}, log=True),
        Panel("KL, nats", {"plain": "model/kl", "loss, after free nats": "model/kl_loss"}),
        Panel("Entropy of the latents, nats", {"prior": "model/prior_entropy", "posterior": "model/post_entropy"}),
        Panel("Reward loss", {"": "model/reward_loss"}),
        Panel("Share of latents in use", {"": "model/latents_used"}, share=True),
        Panel("Gradient norm of the model", {"": "model/grad_norm"}, log=True),
    ),
    "Is the policy healthy?": (
        Panel("Value and λ-return in imagination", {"value": "behaviour/value", "λ-return": "behaviour/lambda_return"}),
        Panel(
            "Value on evaluation episodes",
            {"predicted": "behaviour/value_predicted", "realised": "behaviour/value_realised"},
        ),
        Panel("Imagined reward a step", {"": "behaviour/imagined_reward"}),
        Panel("Policy entropy, nats", {"": "behaviour/entropy"}),
        Panel("Actions in imagination", {"mean": "behaviour/action_mean", "spread": "behaviour/action_std"}),
        Panel("Share of saturated actions", {"": "behaviour/action_saturated"}, share=True),
        Panel("Actor loss", {"": "behaviour/actor_loss"}),
        Panel("Value loss", {"": "behaviour/value_loss"}),
        Panel("Gradient norms", {"actor": "behaviour/actor_grad_norm", "value": "behaviour/value_grad_norm"}, log=True),
    ),
    "How fast is it?": (
        Panel("Per second", {"env steps": "perf/env_steps_per_s", "updates": "perf/updates_per_s"}),
        Panel(
            "Share of time",
            {"updates": "perf/share_update", "env": "perf/share_env", "evaluation": "perf/share_eval"},
            share=True,
        ),
        Panel("Memory, GB", {"RAM": "perf/ram_gb", "GPU": "perf/gpu_gb", "replay": "replay/gb"}),
        Panel("Share of time spent on videos", {"": "perf/share_video"}),
        Panel("Agent steps in the replay", {"": "replay/steps"}),
        Panel("Updates skipped", {"": "optim/skipped"}),
    ),
}
FRAMES = {  # kind of video -> title and the frames of it that are shown, as shares of its length
    "eval": ("An evaluation episode: the robot, and what the agent sees", (0.0, 0.25, 0.5, 0.75, 1.0)),
    "openloop": (f"Open-loop prediction: {CONTEXT} frames seen, then imagined", (0.08, 0.4, 1.0)),
    "dream": ("What the policy imagines", (0.1, 0.388, 1.0)),
}
PLOT_STYLE = {
    "font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": "#9999aa",
    "axes.grid": True, "grid.color": "#e8eaed", "legend.edgecolor": "none", "legend.framealpha": 0.7,
    "svg.hashsalt": "report",
}  # fmt: skip
STYLE = """
:root { color-scheme: light; }
body { margin: 0 auto; max-width: 1320px; padding: 24px 28px 60px; background: #fafafa; color: #1f2328;
  font: 15px/1.5 system-ui, "DejaVu Sans", sans-serif; }
h1 { font-size: 25px; margin: 0 0 2px; }
h2 { font-size: 19px; margin: 34px 0 10px; }
h3 { font-size: 15px; margin: 18px 0 6px; }
.note { color: #667; font-size: 13px; font-weight: 400; margin: 0 0 14px; }
.cards { display: flex; flex-wrap: wrap; gap: 10px; margin: 10px 0; }
.card { background: #fff; border: 1px solid #e3e5e8; border-radius: 8px; padding: 6px 11px; }
.card b { display: block; font-size: 19px; font-variant-numeric: tabular-nums; }
.card span { color: #667; font-size: 12px; }
.run { font-weight: 600; }
.run i, summary i { display: inline-block; width: 12px; height: 12px; border-radius: 3px; margin-right: 6px; }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(400px, 1fr)); gap: 12px; }
.grid img { width: 100%; background: #fff; border: 1px solid #e3e5e8; border-radius: 8px; }
.frames { display: flex; flex-wrap: wrap; gap: 8px; }
.frames img { height: 184px; border-radius: 4px; }
.frames.dream img { height: 150px; }
.frames.openloop img { height: 385px; }
table { border-collapse: collapse; background: #fff; font-size: 13px; font-variant-numeric: tabular-nums; }
th, td { border: 1px solid #e3e5e8; padding: 3px 10px; text-align: right; }
th { background: #f1f3f5; font-weight: 600; }
td:first-child, th:first-child { text-align: left; }
.best td { background: #eaf6ee; }
.config { columns: 4 260px; font-size: 13px; margin-top: 8px; }
.config div { display: flex; justify-content: space-between; gap: 12px; border-bottom: 1px dotted #d5d8dc;
  break-inside: avoid; }
.config .changed { font-weight: 650; }
summary { cursor: pointer; }
"""


@dataclass
class RunData:
    """What a run folder holds."""

    folder: Path
    name: str
    colour: str
    lines: list[dict]
    torn: int  # lines that could not be read
    config: dict

    def series(self, metric: str) -> tuple[np.ndarray, np.ndarray]:
        """Control steps and values of a metric, (N,) each."""
        points = [(line["env_step"], line[metric]) for line in self.lines if metric in line]
        steps, values = np.array(points, float).reshape(-1, 2).T
        return steps, values

    def last(self, metric: str) -> float | None:
        return next((line[metric] for line in reversed(self.lines) if metric in line), None)


def write_report(folders: Sequence[Path]) -> Path:
    """Write report.html about the runs into the first one's folder; ReportError where there is nothing to show."""
    runs = [_read_run(folder, COLOURS[i % len(COLOURS)]) for i, folder in enumerate(folders)]
    names = [run.name for run in runs]
    for run in runs:
        if names.count(run.name) > 1:
            run.name = str(run.folder)
    path = folders[0] / "report.html"
    try:
        write_file(path, _page(runs).encode())
    except ImportError as error:
        raise ReportError(f"the curves need {error.name}: pip install -r requirements.txt") from error
    except OSError as error:
        raise ReportError(f"{path} can't be written: {error.strerror}") from error
    return path


def _read_run(folder: Path, colour: str) -> RunData:
    if not folder.is_dir():
        raise ReportError(f"--report {folder}: there is no such run folder")
    try:
        lines, torn = read_metrics(folder)
        config_file = folder / "config.json"
        config = json.loads(config_file.read_text()) if config_file.exists() else {}
        if not isinstance(config, dict):
            raise ValueError("its config.json holds no constants")
    except (OSError, ValueError) as error:
        raise ReportError(f"--report {folder}: {error}") from error
    if not lines:
        raise ReportError(f"--report {folder}: there are no metrics in it (metrics.jsonl)")
    return RunData(folder, folder.resolve().name, colour, lines, torn, config)


# ---------------------------------------------------------------------------------------------- the page


def _page(runs: list[RunData]) -> str:
    title = html.escape(", ".join(run.name for run in runs))
    parts = [f"<h1>{title}</h1>", *(_head(run, len(runs) > 1) for run in runs)]
    shown = set()
    for name, panels in SECTIONS.items():
        images = [image for panel in panels if (image := _plot(panel, runs))]
        shown |= {metric for panel in panels for metric in panel.metrics.values()}
        if images:
            axis = "" if len(parts) > 1 + len(runs) else " <span class=note>all curves over control steps</span>"
            parts.append(f"<h2>{name}{axis}</h2><div class=grid>{''.join(images)}</div>")
    parts.append("<h2>What it looks like</h2>" + "".join(_pictures(run, len(runs) > 1) for run in runs))
    parts.append("<h2>Evaluations</h2>" + "".join(_evaluations(run, len(runs) > 1) for run in runs))
    parts.append("<h2>Configuration</h2>" + _configuration(runs))
    rest = sorted({name for run in runs for line in run.lines for name in line} - shown - {"env_step"})
    images = [image for name in rest if (image := _plot(Panel(name, {"": name}), runs))]
    if images:
        parts.append(f"<h2>All other metrics</h2><details><summary>{len(images)} plots</summary>"
                     f"<div class=grid>{''.join(images)}</div></details>")  # fmt: skip
    return (
        f"<!doctype html><html lang=en><head><meta charset=utf-8><title>{title}</title><style>{STYLE}</style></head>"
        f"<body>{''.join(parts)}</body></html>\n"
    )


def _head(run: RunData, several: bool) -> str:
    """What the run is and its key figures."""
    written = time.strftime("%Y-%m-%d %H:%M", time.localtime((run.folder / "metrics.jsonl").stat().st_mtime))
    about = [
        f"{name} {run.config[name]}" for name in ("task", "robot", "controller", "preset", "seed") if name in run.config
    ]
    about.append(f"last metrics {written}")
    if run.torn:
        about.append(f"{run.torn} unreadable line(s) in metrics.jsonl left out")
    name = f"<p class=run>{_chip(run)}</p>" if several else ""
    returns, success = run.series("eval/return_mean")[1], run.series("eval/success_rate")[1]
    steps, total = run.lines[-1]["env_step"], run.config.get("steps")
    cards = [("control steps" + (f" of {total:,}" if total else ""), f"{steps:,}")]
    if len(returns):
        cards += [("evaluation return, last", f"{returns[-1]:.1f}"), ("best", f"{returns.max():.1f}")]
        cards += [("success rate, last", f"{success[-1]:.0%}"), ("best", f"{success.max():.0%}")]
    for label, metric, form in (
        ("training episodes", "", ""),
        ("updates", "perf/updates", ",.0f"),
        ("env steps a second", "perf/env_steps_per_s", ".3g"),
        ("updates a second", "perf/updates_per_s", ".3g"),
        ("GB of RAM", "perf/ram_gb", ".2f"),
        ("GB of GPU memory", "perf/gpu_gb", ".2f"),
    ):
        value = run.last(metric) if metric else len(run.series("episode/return")[0])
        if value is not None:
            cards.append((label, format(value, form)))
    tiles = "".join(f"<div class=card><b>{value}</b><span>{label}</span></div>" for label, value in cards)
    return f"{name}<p class=note>{html.escape(' · '.join(about))}</p><div class=cards>{tiles}</div>"


def _chip(run: RunData) -> str:
    return f"<i style='background:{run.colour}'></i>{html.escape(run.name)}"


def _evaluations(run: RunData, several: bool) -> str:
    lines = [line for line in run.lines if "eval/return_mean" in line]
    name = f"<h3 class=run>{_chip(run)}</h3>" if several else ""
    if not lines:
        return name + "<p class=note>none yet</p>"
    columns = {
        "control step": lambda x: f"{x['env_step']:,}",
        "return": lambda x: f"{x['eval/return_mean']:.1f} ± {x['eval/return_std']:.1f}",
        "success": lambda x: f"{x['eval/success_rate']:.0%}",
        "steps to success": lambda x: f"{x['eval/time_to_success_mean']:.0f}",
        "largest reward": lambda x: f"{x['eval/max_reward_mean']:.2f}",
        "image MSE, 15 steps": lambda x: f"{x['openloop/image_mse_15']:.4f}",
        "reward error": lambda x: f"{x['reward/error']:.3f}",
        "value predicted": lambda x: f"{x['behaviour/value_predicted']:.2f}",
        "realised": lambda x: f"{x['behaviour/value_realised']:.2f}",
        "episodes": lambda x: f"{x['eval/episodes']:.0f}",
    }
    best = max(range(len(lines)), key=lambda i: lines[i]["eval/return_mean"])
    rows = []
    for i, line in enumerate(lines):
        cells = "".join(f"<td>{_cell(column, line)}</td>" for column in columns.values())
        rows.append(f"<tr{' class=best' if i == best else ''}>{cells}</tr>")
    head = "".join(f"<th>{title}</th>" for title in columns)
    note = "<p class=note>Green: the best return.</p>"
    return f"{name}<table><tr>{head}</tr>{''.join(rows)}</table>{note}"


def _cell(column, line: dict) -> str:
    try:
        return column(line)
    except KeyError:  # not measured in that evaluation
        return "–"


def _configuration(runs: list[RunData]) -> str:
    names = list(dict.fromkeys(name for run in runs for name in run.config))
    text = ""
    if len(runs) > 1:
        differ = [name for name in names if len({json.dumps(run.config.get(name)) for run in runs}) > 1]
        head = "".join(f"<th class=run>{_chip(run)}</th>" for run in runs)
        rows = "".join(
            f"<tr><td>{html.escape(name)}</td>"
            + "".join(f"<td>{_value(run.config.get(name, '–'))}</td>" for run in runs)
            + "</tr>"
            for name in differ
        )
        text += f"<table><tr><th>what differs</th>{head}</tr>{rows}</table><p class=note></p>"
    standard = json.loads(json.dumps(Config().__dict__))
    for run in runs:
        items = "".join(
            f"<div{'' if standard.get(name) == value else ' class=changed'}><span>{html.escape(name)}</span>"
            f"<span>{_value(value)}</span></div>"
            for name, value in run.config.items()
        )
        text += (
            f"<details{' open' if len(runs) == 1 else ''}><summary>{_chip(run) if len(runs) > 1 else 'all constants'}"
            f" <span class=note>(bold: other than in the preset standard)</span></summary>"
            f"<div class=config>{items}</div></details>"
        )
    return text


def _value(value: object) -> str:
    return html.escape(", ".join(map(str, value)) if isinstance(value, list) else str(value) or "–")


# ---------------------------------------------------------------------------------------------- pictures


def _plot(panel: Panel, runs: list[RunData]) -> str:
    """The panel as an image tag, or nothing where no run has such metrics."""
    curves = [
        (run, i, label, *run.series(metric))
        for run in runs
        for i, (label, metric) in enumerate(panel.metrics.items())
        if len(run.series(metric)[0])
    ]
    if not curves:
        return ""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    with matplotlib.rc_context(PLOT_STYLE):
        figure = Figure(figsize=(5.0, 2.7), layout="constrained")
        axes = figure.subplots()
        axes.set_title(panel.title, loc="left", fontsize=10, fontweight="bold", color="#1f2328")
        several, named = len(runs) > 1, set()
        for run, i, label, steps, values in curves:
            style = {
                "color": run.colour if several else COLOURS[i % len(COLOURS)],
                "linestyle": DASHES[i % len(DASHES)] if several else "-",
                "linewidth": 1.5,
                "label": None if label in named else label,
            }
            named.add(label)
            if panel.episodes:
                axes.plot(steps, values, ".", markersize=4, alpha=0.3, color=style["color"], markeredgewidth=0)
                steps, values = _running_mean(steps, MEAN_OF), _running_mean(values, MEAN_OF)
            few = len(steps) < 40 and not panel.episodes
            axes.plot(steps, values, marker="o" if few else None, markersize=2.5, **style)
            if panel.spread and i == 0 and len(spread := run.series(panel.spread)[1]) == len(values):
                axes.fill_between(
                    steps, values - spread, values + spread, color=style["color"], alpha=0.15, linewidth=0
                )
        if panel.log and all((values > 0).any() for *_, values in curves):
            axes.set_yscale("log")
        if any(label for _, _, label, *_ in curves):
            legend = axes.legend(fontsize=8, ncols=2, loc="best", handlelength=1.8)
            for line in legend.get_lines() if several else ():
                line.set_color("#444444")  # the dashes tell metrics apart, the colours runs
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.margins(x=0.02)
        if panel.share:
            axes.set_ylim(-0.03, 1.03)
        file = io.BytesIO()
        figure.savefig(file, format="svg", metadata={"Date": None})
    return _image("svg+xml", file.getvalue(), panel.title)


def _running_mean(values: np.ndarray, count: int) -> np.ndarray:
    """Means over `count` successive values, (N,) -> (N - count + 1,), or over all where there are fewer."""
    count = min(count, len(values))
    return np.convolve(values, np.full(count, 1 / count), mode="valid")


def _pictures(run: RunData, several: bool) -> str:
    """Frames of the newest video of each kind."""
    parts = [f"<h3 class=run>{_chip(run)}</h3>"] if several else []
    for kind, (title, shares) in FRAMES.items():
        videos = sorted((run.folder / "videos").glob(f"{kind}_*.mp4"))
        if not videos:
            continue
        after = ""
        try:
            after = f"after {int(videos[-1].stem.split('_')[-1]):,} steps"
            images = "".join(_image("jpeg", data, title) for data in _frames(videos[-1], shares))
            body = f"<div class='frames {kind}'>{images}</div>"
        except (OSError, ImportError, RuntimeError, ValueError, IndexError) as error:  # no back end, a damaged file
            body = f"<p class=note>{html.escape(f'{videos[-1].name} could not be read: {error}')}</p>"
        parts.append(f"<h3>{html.escape(title)} <span class=note>{after}</span></h3>{body}")
    return "".join(parts) or "<p class=note>no videos yet</p>"


def _frames(path: Path, shares: Sequence[float]) -> list[bytes]:
    """The frames at these shares of a video's length, as JPEG."""
    import imageio.v2 as imageio

    with imageio.get_reader(path) as reader:
        frames = list(reader.iter_data())
    chosen = [frames[round(share * (len(frames) - 1))] for share in shares]
    return [imageio.imwrite("<bytes>", frame, format="jpg", quality=85) for frame in chosen]


def _image(kind: str, data: bytes, title: str) -> str:
    return f'<img alt="{html.escape(title)}" src="data:image/{kind};base64,{base64.b64encode(data).decode()}">'
