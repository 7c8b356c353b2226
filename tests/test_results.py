"""What is published in results/: the tables are whole, the page says what they say, and the shipped policy lifts."""

import csv
import json
from collections import Counter
from dataclasses import asdict, fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from env import make_env
from results import add, plot
from runtime.checkpoint import load_policy
from runtime.cli import check_config, defaults, marked
from runtime.evaluate import describe, eval_options, open_envs, play_episodes, summarize
from train import PRESETS, Config

RESULTS = Path(__file__).parent.parent / "results"
TABLES = {  # runs, and where the evaluations of each are
    "claim": (RESULTS / "runs.csv", [RESULTS / f"{task}.csv" for task in plot.tasks()]),
    "experiments": (RESULTS / "experiments" / "runs.csv", [RESULTS / "experiments" / "curves.csv"]),
}
POLICIES = {task: RESULTS / f"{task.lower()}-cpu-policy.pt" for task in ("Lift", "Door", "Stack", "PickPlaceCan")}


@pytest.fixture(params=TABLES, name="tables")
def fixture_tables(request):
    """The runs and the evaluations of one part of results/."""
    runs, curves = TABLES[request.param]
    return add.read_table(runs), [row for path in curves for row in add.read_table(path)]


def test_the_tables_have_their_columns():
    """A reader of the csv files finds the same columns in both parts, and as many values in every line."""
    for runs, curves in TABLES.values():
        for path, columns in ((runs, add.RUN), *((curve, add.CURVE) for curve in curves)):
            lines = list(csv.reader(path.open(newline="")))
            assert tuple(lines[0]) == columns
            assert {len(line) for line in lines} == {len(columns)}


def test_every_run_has_a_curve(tables):
    """A run is listed once and has evaluations, or its note says that there were none; no curve lacks its run."""
    runs, curves = tables
    assert set(Counter(row["run"] for row in runs).values()) == {1}
    without = {row["run"] for row in runs if "No evaluation" in row["note"]}
    assert {row["run"] for row in curves} == {row["run"] for row in runs} - without


def test_a_run_says_how_it_was_made(tables):
    """Task, preset, seed, commit, hardware and status are there, and a curve has its run's seed."""
    runs, curves = tables
    for row in runs:
        assert row["preset"] in PRESETS and row["task"] and row["commit"] and row["hardware"] and row["cores"]
        assert row["status"] in ("finished", "stopped") and row["note"]
        assert {point["seed"] for point in curves if point["run"] == row["run"]} <= {row["seed"]}


def test_a_curve_is_whole(tables):
    """Steps and hours increase, and no figure lies outside what it can be."""
    runs, curves = tables
    lengths = {row["run"]: int(row["eval_steps"]) for row in runs}
    for name in {row["run"] for row in curves}:
        curve = [row for row in curves if row["run"] == name]
        for column in ("env_step", "hours"):
            known = [float(point[column]) for point in curve if point[column]]
            assert all(np.diff(known) > 0), (name, column)
        for point in curve:
            assert 0 <= float(point["success"]) <= 1 and int(point["episodes"]) >= 10
            assert 0 <= float(point["return"]) <= lengths[name]
            assert float(point["return_share"]) == add.share(float(point["return"]), lengths[name])
            assert float(point["return_std"] or 0) >= 0 and point["eval_action"] in ("mean", "mode")


def test_overrides_are_flags(tables):
    """Each override names a constant of today and has a value of its type, so that the run can be repeated."""
    for row in tables[0]:
        given = dict(flag.removeprefix("--").split("=", 1) for flag in row["overrides"].split())
        values = {name: parsed(name, text) for name, text in given.items()}
        check_config(replace(Config(), **defaults(row["task"], row["preset"]) | values))
        assert add.flags(values) == row["overrides"]


def parsed(name, text):
    """The value of a flag, by what the constant's own value is."""
    default = getattr(Config(), name)
    if isinstance(default, bool):
        return {"True": True, "False": False}[text]
    if isinstance(default, int | float):
        return int(text) if text.isdigit() else float(text)
    return tuple(text.split(",")) if isinstance(default, tuple) else type(default)(text)


def test_the_page_says_what_the_tables_say():
    """The table of results/README.md is the one that plot.py prints."""
    page = (RESULTS / "README.md").read_text()
    for line in plot.table():
        assert line in page


def test_a_run_folder_is_added(tmp_path, monkeypatch):
    """The command reads a finished run from its own files, replaces it when it has gone on, and keeps the others."""
    monkeypatch.setattr(add, "HERE", tmp_path)
    (tmp_path / "experiments").mkdir()
    folder = tmp_path / "run"
    folder.mkdir()
    config = replace(Config(), **PRESETS["cpu"], preset="cpu", seed=3)
    (folder / "config.json").write_text(json.dumps(asdict(config)))
    evaluation = {"eval/return_mean": 250.0, "eval/return_std": 1.5, "eval/success_rate": 0.5, "eval/episodes": 10.0}
    lines = [{"env_step": 36_000, "perf/env_steps_per_s": 10.0}, {"env_step": 40_000} | evaluation]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text + '{"env_step": 41_')  # torn by a crash
    columns = {"cores": "2", "commit": "abc", "hardware": "", "note": ""}
    assert add.add(folder, "", **columns) == "lift-cpu-seed3"
    assert add.read_table(tmp_path / "runs.csv")[0]["status"] == "stopped"
    (folder / "metrics.jsonl").write_text(text + json.dumps({"env_step": 100_000} | evaluation))
    add.add(folder, "", **columns)
    (row,) = add.read_table(tmp_path / "runs.csv")
    assert (row["status"], row["overrides"], row["hours"]) == ("finished", "", "1.0")
    curve = add.read_table(tmp_path / "lift.csv")
    assert [point["env_step"] for point in curve] == ["40000", "100000"] and curve[0]["return_share"] == "0.5"

    (folder / "config.json").write_text(json.dumps(asdict(replace(config, train_every=2))))
    with pytest.raises(ValueError, match="--train_every=2.*--name"):
        add.add(folder, "", **columns)
    add.add(folder, "every2-seed3", **columns)
    (folder / "config.json").write_text(json.dumps(asdict(replace(Config(), preset="standard"))))
    with pytest.raises(ValueError, match="is of standard: give it a --name"):  # lift.csv holds runs of `cpu` only
        add.add(folder, "", **columns)
    (folder / "config.json").write_text(json.dumps(asdict(config)))
    (folder / "metrics.jsonl").write_text(text + json.dumps({"env_step": 100_000, "perf/gpu_gb": 0.2}))
    with pytest.raises(ValueError, match="is of cpu on a GPU: give it a --name"):
        add.add(folder, "", **columns)
    (folder / "config.json").write_text(json.dumps(asdict(config) | {"center_images": True}))
    with pytest.raises(ValueError, match="another release .center_images."):
        add.add(folder, "", **columns)
    (folder / "config.json").write_text(json.dumps(asdict(config)))
    (folder / "metrics.jsonl").write_text(json.dumps(lines[0]))
    with pytest.raises(ValueError, match="no evaluation yet"):
        add.add(folder, "", **columns)
    assert add.read_table(tmp_path / "experiments" / "runs.csv")[0]["overrides"] == "--train_every=2"
    assert len(add.read_table(tmp_path / "runs.csv")) == 1


@pytest.mark.parametrize("task", POLICIES)
def test_a_shipped_policy_is_complete(task):
    """Its file names constants of today only, all that it acts by among them, and runs no code when it is loaded."""
    saved = torch.load(POLICIES[task], weights_only=True)
    needed = {*marked("env"), *marked("fixed"), "eval_action"}
    assert needed <= saved["config"].keys() <= {field.name for field in fields(Config)}
    assert Config(**saved["config"]).task == task


@pytest.mark.parametrize("task", POLICIES)
def test_a_shipped_policy_acts(task):
    """It gives actions for the images of its own configuration."""
    policy, config = load_policy(POLICIES[task])
    image = np.zeros((3 * len(config.cameras), config.image_size, config.image_size), np.uint8)
    action, state = policy.step(image)
    again, _ = policy.step(image, state)
    assert action.shape == again.shape == (7,)
    assert (np.abs(action) <= 1).all()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "success", "share"),
    [("Lift", 0.95, 0.8), ("Door", 0.95, 0.8), ("Stack", 0.9, 0.7), ("PickPlaceCan", 0.85, 0.7)],
)
def test_a_shipped_policy_solves_its_task(task, success, share):
    """On RoboSuite, 20 episodes: success and return are not far below those in results/README.md."""
    policy, config = load_policy(POLICIES[task])
    envs = open_envs(config, make_env)
    summary = summarize(play_episodes(policy, envs, config, torch.device("cpu"), 20, film=False))
    envs.close()
    print(f"\n{describe(summary)}")
    assert (
        summary["eval/success_rate"] >= success
        and summary["eval/return_mean"] >= share * eval_options(config)["episode_steps"]
    )
