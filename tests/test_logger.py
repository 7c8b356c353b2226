"""Metrics and speeds of a run: metrics.jsonl, and W&B read back from its own files."""

import contextlib
import getpass
import json
import math
import os
import resource
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import urlparse

import numpy as np
import pytest
import torch
import wandb

from buffer import ReplayBuffer, Transition
from faults import difference
from runtime import logger
from runtime.console import told
from runtime.logger import Logger, Meter, Stopwatch
from tiny import random_batch, tiny_config, tiny_dreamer

pytestmark = pytest.mark.films
ROOT = Path(__file__).parent.parent
CONFIG = {"task": "Lift", "preset": "debug", "robot": "Panda", "controller": "OSC_POSITION", "horizon": 15}
SAVED = {"size": 0, "wandb_id": "abc123", "wandb_step": 7}  # state of a Logger


def lines(run_dir) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def noise(steps: int = 8, side: int = 64) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (steps, side, side, 3), dtype=np.uint8)


@contextlib.contextmanager
def largest_file(size: int):
    """No file of this process may grow beyond `size` bytes, which looks like a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


# ------------------------------------------------------------------------------------------ Weights & Biases


@pytest.fixture(scope="module")
def offline(tmp_path_factory) -> dict:
    """A real offline W&B run that was resumed, read back record by record with W&B's own reader; and all of its text.

    Metrics at 20, 40 and 60, a policy at 40 and a video at 60; it is resumed from the checkpoint at 40.
    """
    run_dir = tmp_path_factory.mktemp("Lift_debug_0")
    config = CONFIG | {"run_dir": "/home/somebody/run"}
    (run_dir / "policy.pt").write_bytes(b"weights")
    with without_wandb_settings():
        log = Logger(run_dir, config, "offline")
        log.scalars(20, {"model/loss": 1.5, "episode/return": 3.0, "model/kl": math.nan})
        log.scalars(40, {"eval/return_mean": 4.0, "eval/success_rate": 0.8})
        log.policy(run_dir / "policy.pt", {"env_step": 40, "eval/success_rate": 0.8})
        log.summary({"best_success_rate": 0.8, "last_success_rate": 0.3})
        log.sync()
        state = log.state_dict()
        log.scalars(60, {"eval/return_mean": 4.0, "eval/success_rate": 0.3})
        log.video(60, "eval", noise(), 10)
        assert not told
        log.close()
        time.sleep(1.1)  # W&B names its folders by the second
        again = Logger(run_dir, config, "offline", state)
        again.scalars(60, {"eval/return_mean": 5.0})
        assert not told
        again.close()
    (run_dir / "policy.pt").write_bytes(b"a later policy")
    first, second = sorted(run_dir.glob("wandb/offline-run-*/run-*.wandb"))
    return {"run_dir": run_dir, "id": log.wandb_id, "first": read(first), "second": read(second)}


@contextlib.contextmanager
def without_wandb_settings():
    """W&B as it is where the environment says nothing of it."""
    with pytest.MonkeyPatch.context() as patch:
        for name in {"WANDB_DATA_DIR", *(name for name in os.environ if name.startswith("WANDB_"))}:
            patch.setenv(name, "")  # so that it is put back
            patch.delenv(name)
        yield


def read(file: Path) -> tuple[list[dict], str]:
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(file)]
    text = subprocess.run(command, capture_output=True, text=True, check=True, stdin=subprocess.DEVNULL).stdout
    return [json.loads(line) for line in text.splitlines()], text + file.read_bytes().decode("latin-1")


def records(offline: dict, kind: str, part: str = "first") -> list[dict]:
    return [record[kind] for record in offline[part][0] if record["type"] == kind]


def test_wandb_gets_the_configuration_and_where_the_run_belongs(offline):
    """Config, name, group, tags, job type and project."""
    run = records(offline, "run")[0]
    assert run["config"]["update"].items() >= CONFIG.items()
    assert run["display_name"].startswith("Lift_debug_0") and run["run_group"] == "Lift_debug"
    assert run["job_type"] == "train" and set(run["tags"]) == {"Lift", "Panda", "OSC_POSITION", "debug"}
    assert run["project"] == "mydreamerv2"


def test_wandb_draws_everything_over_env_step(offline):
    """Every line carries env_step, and env_step is the axis of all metrics."""
    metrics = records(offline, "metric")
    assert any(m.get("glob_name") == "*" and m.get("step_metric") == "env_step" for m in metrics), metrics
    history = [record["item"] for record in records(offline, "history")]
    assert len(history) == 4  # three lines and a video
    assert all("env_step" in item for item in history)
    assert {"model/loss", "episode/return", "eval/success_rate", "video/eval._type"} <= set().union(*history)
    assert "model/kl" not in set().union(*history)  # it was a NaN


def test_wandb_keeps_the_video_and_figures_of_the_whole_run(offline):
    """The video goes in as a file; the summary holds what it was told."""
    text = json.dumps([record for record in offline["first"][0] if record["type"] in ("files", "summary", "history")])
    assert "media/videos/video/eval" in text and ".mp4" in text
    summary = {}
    for record in records(offline, "summary"):
        summary |= record.get("update", {})
    assert summary["best_success_rate"] == 0.8 and summary["last_success_rate"] == 0.3


def test_wandb_keeps_each_best_policy_with_its_figures(offline):
    """As an artifact of the run whose copy lies in the run folder, not at home, and is not the policy of later."""
    (artifact,) = records(offline, "artifact")
    assert artifact["type"] == "policy" and artifact["name"] == f"policy-{offline['id']}"
    assert json.loads(artifact["metadata"]) == {"env_step": 40, "eval/success_rate": 0.8}
    (content,) = artifact["manifest"]["contents"]
    copy = Path(content["local_path"])
    assert content["path"] == "policy.pt" and copy.read_bytes() == b"weights"
    assert copy.is_relative_to(offline["run_dir"] / "wandb")


def test_wandb_steps_go_on_after_a_resume(offline):
    """The resumed part has the run's id, and its first line the step of the one that it replaces."""
    steps = {
        part: [(x["step"].get("num", 0), x["item"]["env_step"]) for x in records(offline, "history", part)]
        for part in ("first", "second")
    }
    assert steps == {"first": [(0, 20), (1, 40), (2, 60), (3, 60)], "second": [(2, 60)]}
    (run,) = records(offline, "run", "second")
    assert run["run_id"] == offline["id"] and run["resume"] is True
    assert [line["env_step"] for line in lines(offline["run_dir"])] == [20, 40, 60]


def test_wandb_learns_no_names_of_people_or_machines(offline):
    """Neither the host's name, nor the user's, nor the path of the program is in the run's files."""
    for part in ("first", "second"):
        text = offline[part][1]
        assert f'"{socket.gethostname()}"' not in text and f'"{getpass.getuser()}"' not in text
        assert sys.executable not in text and sys.argv[0] not in text and "/home/somebody" not in text


@pytest.mark.parametrize("mode", ["online", "offline"])
def test_wandb_goes_on_with_the_run_it_was_given(mode, tmp_path):
    """A resumed run keeps its id and counts on, also if W&B was off in between."""
    log = Logger(tmp_path, CONFIG, "disabled", SAVED)
    log.scalars(20, {"eval/success_rate": 0.9})
    log.close()
    state = log.state_dict()
    assert state == {"size": (tmp_path / "metrics.jsonl").stat().st_size, "wandb_id": "abc123", "wandb_step": 7}
    calls = {}
    wandb_init = wandb.init

    def init(**kwargs):
        calls.update(kwargs)
        return wandb_init(**kwargs | {"mode": "disabled"})

    with pytest.MonkeyPatch.context() as patch, without_wandb_settings():
        patch.setattr(wandb, "init", init)
        log = Logger(tmp_path, CONFIG, mode, state)
        log.close()
    assert calls["id"] == "abc123" and calls["resume"] == "allow" and calls["mode"] == mode


def test_every_line_is_a_step_of_wandb(tmp_path):
    """Videos too; the count is part of the state."""
    log = Logger(tmp_path, CONFIG, "disabled", SAVED)
    logged, ended = [], []
    log.wandb = SimpleNamespace(
        log=lambda line, step: logged.append((step, line)), finish=lambda exit_code: ended.append(exit_code)
    )
    log.scalars(20, {"a": 1, "b": math.inf})
    log.scalars(20, {"a": 2})
    log.video(40, "eval", noise(), 10)
    log.close(failed=True)
    assert ended == [1]  # or W&B calls a run finished that did not come to its end
    assert [(step, line["env_step"]) for step, line in logged] == [(7, 20), (8, 20), (9, 40)]
    assert logged[0][1] == {"env_step": 20, "a": 1} and "video/eval" in logged[2][1]
    assert log.state_dict()["wandb_step"] == 10


def test_wandb_that_fails_costs_one_warning(tmp_path, monkeypatch, capsys):
    """At the start or in the middle: the local files go on, and the id stays for the next start."""

    def fail(*_, **__):
        raise wandb.errors.CommError("no network")

    with monkeypatch.context() as patch:
        patch.setattr(wandb, "init", fail)
        log = Logger(tmp_path, CONFIG, "online", SAVED)
        log.scalars(1, {"a": 1})
        log.close()
    assert capsys.readouterr().out.count("warning: W&B is off") == 1 and log.wandb_id == "abc123"

    told.clear()
    log = Logger(tmp_path, CONFIG, "disabled", log.state_dict())
    log.wandb = SimpleNamespace(log=fail, summary={})
    log.scalars(2, {"a": 2})
    log.scalars(3, {"a": 3})
    log.close()
    assert capsys.readouterr().out.count("warning") == 1
    assert [line["a"] for line in lines(tmp_path)] == [1, 2, 3]


@pytest.mark.parametrize("call", ["summary", "policy", "video", "close"])
def test_each_call_of_wandb_may_fail(call, tmp_path, capsys):
    """It costs one warning, and W&B is off from there on."""

    def fail(*_, **__):
        raise OSError("its process is gone")

    log = Logger(tmp_path, CONFIG, "disabled")
    log.wandb = SimpleNamespace(log=fail, log_artifact=fail, finish=fail, summary=SimpleNamespace(update=fail))
    (tmp_path / "policy.pt").write_bytes(b"weights")
    calls = {
        "summary": lambda: log.summary({"a": 1}),
        "policy": lambda: log.policy(tmp_path / "policy.pt", {}),
        "video": lambda: log.video(1, "eval", noise(), 10),
        "close": log.close,
    }
    calls[call]()
    assert capsys.readouterr().out == "warning: W&B is off from here on, training goes on: its process is gone\n"
    assert log.wandb is None
    log.summary({"a": 2})
    log.policy(tmp_path / "policy.pt", {})
    assert capsys.readouterr().out == ""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="finds W&B's process in /proc")
def test_wandb_whose_process_is_killed_costs_one_warning(tmp_path):
    """The run goes on, its metrics are complete, and nothing but the warning is printed, also at exit."""
    code = f"""
import os, pathlib, signal, time
from runtime.logger import Logger
log = Logger(pathlib.Path({str(tmp_path)!r}), {CONFIG!r}, "offline")
log.scalars(1, {{"a": 1}})
tasks = pathlib.Path(f"/proc/{{os.getpid()}}/task")
children = {{int(pid) for file in tasks.glob("*/children") for pid in file.read_text().split()}}
assert children
for pid in children:
    os.kill(pid, signal.SIGKILL)
time.sleep(0.5)
for step in (2, 3):
    log.scalars(step, {{"a": step}})
log.close()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert done.stdout.count("\n") == 1 and done.stdout.startswith("warning: W&B is off from here on")
    assert [line["a"] for line in lines(tmp_path)] == [1, 2, 3]


@pytest.fixture
def pick(monkeypatch, tmp_path):
    """Pick a mode by a flag, in an environment with these variables, by a W&B that has not looked at another one."""
    for name in [name for name in os.environ if name.startswith("WANDB")]:
        monkeypatch.delenv(name)

    def pick(flag: str, **environ: str) -> tuple[str, str]:
        with monkeypatch.context() as patch:
            for name, value in {"NETRC": str(tmp_path / "netrc"), "WANDB_CONFIG_DIR": str(tmp_path), **environ}.items():
                patch.setenv(name, value)
            wandb.teardown()
            return logger.pick_wandb_mode(flag)

    yield pick
    wandb.teardown()


def test_wandb_mode_flag_beats_environment_beats_key(pick, monkeypatch):
    """Online only where a key exists, even if asked for, because W&B would ask for it at the terminal."""
    key = {"WANDB_API_KEY": "0" * 40}
    assert pick("disabled", WANDB_MODE="online", **key) == ("disabled", "--wandb")
    assert pick("auto", WANDB_MODE="offline", **key) == ("offline", "WANDB_MODE")
    assert pick("auto", **key) == ("online", "an API key was found")
    assert pick("auto", WANDB_MODE="dryrun", **key)[0] == "offline"
    mode, reason = pick("auto", WANDB_MODE="disable", **key)  # a slip must not send anything
    assert mode == "disabled" and "WANDB_MODE disable is unknown" in reason
    assert pick("auto") == ("offline", "no API key was found")
    assert pick("online") == ("offline", "--wandb online, but no API key was found")
    assert pick("auto", WANDB_MODE="online")[0] == "offline"
    mode, reason = pick("auto", WANDB_BASE_URL="nonsense")
    assert mode == "offline" and reason.startswith("no API key can be looked for: ")
    monkeypatch.setattr(logger.importlib.util, "find_spec", lambda name: None)
    assert pick("online", **key)[0] == "disabled"


def test_a_key_is_found_where_wandb_login_leaves_it(pick, tmp_path):
    """For the server that W&B would use: its present and its former one, and one's own, named to W&B in either way."""
    netrc = tmp_path / "netrc"
    own, line = "http://localhost:8080", "machine {} login user password {}"
    for host in (urlparse(wandb.Settings().base_url).netloc, "api.wandb.ai"):
        netrc.write_text(line.format(host, "0" * 40))
        netrc.chmod(0o644)  # as in a container that mounts the home folder
        assert pick("auto")[0] == "online", host
        assert pick("auto", WANDB_BASE_URL=own)[0] == "offline"
    netrc.write_text(line.format("localhost:8080", "0" * 40))
    assert pick("auto")[0] == "offline"
    assert pick("auto", WANDB_BASE_URL=own)[0] == "online"
    (tmp_path / "settings").write_text(f"[default]\nbase_url = {own}\n")  # as `wandb login --host` does
    assert pick("auto")[0] == "online"
    netrc.unlink()
    (tmp_path / "token").write_text("x")
    assert pick("auto")[0] == "offline"
    assert pick("auto", WANDB_IDENTITY_TOKEN_FILE=str(tmp_path / "token"))[0] == "online"


# ------------------------------------------------------------------------------------------ files


def test_lines_that_a_full_disk_refused_are_written_when_there_is_room(tmp_path, capsys):
    """One warning; no line is lost, torn or doubled; `size` counts what is on disk only."""
    log = Logger(tmp_path, CONFIG, "disabled")
    log.scalars(1, {"a": 1})
    size = log.size
    with largest_file(size + 10):
        for step in (2, 3, 4):
            log.scalars(step, {"a": step})
        assert log.size == size
    log.scalars(5, {"a": 5})
    assert log.size == (tmp_path / "metrics.jsonl").stat().st_size
    log.close()
    assert [line["a"] for line in lines(tmp_path)] == [1, 2, 3, 4, 5]
    assert capsys.readouterr().out.count("warning") == 1


def test_a_resumed_log_cuts_what_the_checkpoint_does_not_know(tmp_path, capsys):
    """Lines behind the checkpoint go; a size beyond the file's end adds nothing and is told."""
    log = Logger(tmp_path, CONFIG, "disabled")
    log.scalars(1, {"a": 1})
    size = log.size
    log.scalars(2, {"a": 2})
    log.close()
    Logger(tmp_path, CONFIG, "disabled", SAVED | {"size": size}).close()
    assert [line["a"] for line in lines(tmp_path)] == [1]
    assert capsys.readouterr().out == ""
    with open(tmp_path / "metrics.jsonl", "ab") as file:
        file.write(b'{"env_step": 3, "a"')
    log = Logger(tmp_path, CONFIG, "disabled", SAVED | {"size": 10_000})
    log.scalars(4, {"a": 4})
    log.close()
    assert [line["a"] for line in lines(tmp_path)] == [1, 4]
    assert capsys.readouterr().out.startswith("warning: metrics.jsonl is shorter than it was at the checkpoint")
    Logger(tmp_path, CONFIG, "disabled").close()  # a run from its start
    assert lines(tmp_path) == []


def test_metrics_are_strict_json(tmp_path):
    """What is not finite is left out of its line; the rest has six digits."""
    log = Logger(tmp_path, CONFIG, "disabled")
    values = {"nan": math.nan, "inf": -math.inf, "numpy": np.float32("nan"), "tensor": torch.tensor(math.inf)}
    log.scalars(20, values | {"a": 1 / 3, "b": np.float64(2), "c": torch.tensor(0.5), "d": 12345678})
    log.scalars(40, values)
    log.close()

    def refuse(name):
        raise AssertionError(name)

    text = (tmp_path / "metrics.jsonl").read_text()
    found = [json.loads(line, parse_constant=refuse) for line in text.splitlines()]
    assert found == [{"env_step": 20, "a": 0.333333, "b": 2, "c": 0.5, "d": 12345700}, {"env_step": 40}]


def test_a_loggers_state_is_what_is_on_the_disk(tmp_path):
    """A run that goes on from it continues the same file."""
    log = Logger(tmp_path, CONFIG, "disabled")
    log.scalars(20, {"a": 1})
    log.sync()
    state = log.state_dict()
    assert state == {"size": (tmp_path / "metrics.jsonl").stat().st_size, "wandb_id": "", "wandb_step": 0}
    log.close()
    again = Logger(tmp_path, CONFIG, "disabled", state)
    assert again.state_dict() == state
    again.scalars(40, {"a": 2})
    again.close()
    assert logger.read_metrics(tmp_path) == ([{"env_step": 20, "a": 1}, {"env_step": 40, "a": 2}], 0)


def test_a_disk_that_cannot_sync_reaches_the_caller(tmp_path, capsys):
    """`sync` is asked before a state counts on the lines."""
    log = Logger(tmp_path, CONFIG, "disabled")
    with largest_file(10):
        log.scalars(20, {"a": 1})
        with pytest.raises(OSError, match="File too large"):
            log.sync()
    log.sync()
    assert log.state_dict()["size"] == (tmp_path / "metrics.jsonl").stat().st_size > 10
    log.close()


def test_torn_and_foreign_lines_are_counted_not_fatal(tmp_path):
    """What a crash leaves at the end of metrics.jsonl does not cost the rest."""
    (tmp_path / "metrics.jsonl").write_bytes(b'{"env_step": 1, "a": 2}\n[1]\n\xff\xfe\n{"env_step": 2, "a"')
    assert logger.read_metrics(tmp_path) == ([{"env_step": 1, "a": 2}], 3)
    assert logger.read_metrics(tmp_path / "nowhere") == ([], 0)


@pytest.mark.parametrize("failure", ["no package", "no ffmpeg", "full disk"])
def test_videos_that_cannot_be_written_cost_one_warning(failure, tmp_path, monkeypatch, capsys):
    """However many are tried: one line with the reason, no exception, no half-written file."""
    log, limit = Logger(tmp_path, CONFIG, "disabled"), contextlib.nullcontext()
    if failure == "no package":
        monkeypatch.setitem(sys.modules, "imageio.v2", None)
    elif failure == "no ffmpeg":
        monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(tmp_path / "nothing"))
    else:
        limit = largest_file(60_000)
    with limit:
        log.video(1, "eval", noise(16, 256), 10)
        log.video(2, "eval", noise(16, 256), 10)
    log.close()
    out = capsys.readouterr().out
    assert out.count("warning: videos can't be written, training goes on: eval_000000001.mp4: ") == 1, out
    assert out.count("\n") == 1
    assert not list(tmp_path.glob("videos/*")) and not list(tmp_path.glob("videos/.*"))


# ------------------------------------------------------------------------------------------ speeds and means


def test_the_stopwatch_adds_up():
    """Parts are kept apart, and a part that runs twice counts twice."""
    watch = Stopwatch()
    for part in ("env", "update", "env"):
        with watch(part):
            pass
    assert set(watch.seconds) == {"env", "update"} and watch.seconds["env"] > 0


@pytest.fixture
def clock(monkeypatch):
    """A monotonic clock that is told the time."""
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(logger.time, "monotonic", lambda: clock.now)
    return clock


def some_meter(updates: int = 0) -> Meter:
    """Of an agent that has made some updates, and a replay with an episode of three rows."""
    replay = ReplayBuffer(100, 1, (3, 4, 4), 2, seed=0)
    for i in range(3):
        replay.add(Transition(np.zeros((3, 4, 4), np.uint8), np.zeros(2, np.float32), 0.0, i == 0, False))
    optimizers = [SimpleNamespace(skipped=torch.tensor(n)) for n in (1.0, 0.0, 2.0)]
    agent = SimpleNamespace(updates=updates, optimizers=optimizers, device=torch.device("cpu"))
    return Meter(agent, replay, Stopwatch())


def test_updates_look_for_other_programs(clock):
    """On a CPU each of them does; a GPU's updates need no core."""
    meter, looks = some_meter(), []
    meter.others.look = lambda: looks.append(meter.updates)
    for kind in "cpu", "cuda", "cpu":
        meter.agent.device = torch.device(kind)
        meter.add({})
    assert looks == [1, 3]


def test_a_line_has_means_and_speeds_since_the_last_one(clock):
    """Means over the updates, rates over the seconds; the next line begins anew."""
    meter = some_meter(updates=10)
    meter.start(200)
    for value in (1.0, 2.0, 6.0):
        meter.add({"model/loss": torch.tensor(value)})
    meter.agent.updates, clock.now = 13, clock.now + 4.0
    meter.watch.seconds["env"] = 1.0
    line = meter.line(240)
    expected = {
        "model/loss": 3.0,
        "perf/env_steps_per_s": 10.0,
        "perf/updates_per_s": 0.75,
        "perf/updates": 13,
        "optim/skipped": 3.0,
        "replay/steps": 2,
        "replay/episodes": 1,
        "replay/gb": 3 * meter.replay.row_bytes / 1e9,
        "perf/share_env": 0.25,
        "perf/share_update": 0.0,
        "perf/share_eval": 0.0,
        "perf/share_video": 0.0,
        "perf/share_save": 0.0,
    }
    assert line.pop("perf/ram_gb") > 0.01 and line == expected
    assert meter.updates == 0 and meter.watch.seconds == {}
    meter.add({"model/loss": torch.tensor(5.0)})
    clock.now += 1.0
    line = meter.line(250)
    assert line["model/loss"] == 5.0 and line["perf/env_steps_per_s"] == 10.0 and line["perf/updates_per_s"] == 0.0


def test_a_line_is_due_after_so_many_steps_if_there_was_an_update(clock):
    """None in the prefill, whatever the step."""
    meter = some_meter()
    assert meter.is_new and not meter.due(1000, 0)
    meter.add({"model/loss": torch.tensor(1.0)})
    assert not meter.is_new
    assert (meter.due(49, 50), meter.due(50, 50), meter.due(1, 0)) == (False, True, True)
    clock.now += 1.0
    meter.line(50)
    meter.add({"model/loss": torch.tensor(1.0)})
    assert (meter.due(99, 50), meter.due(100, 50)) == (False, True)


def test_a_mean_that_is_not_finite_is_named(clock, capsys):
    """One line names all of them; the caller finds them in the metrics."""
    meter = some_meter()
    for value in (1.0, math.nan):
        meter.add({"model/loss": torch.tensor(value), "model/kl": torch.tensor(1.0), "actor/loss": torch.tensor(value)})
    clock.now += 1.0
    line = meter.line(10)
    assert math.isnan(line["model/loss"]) and line["model/kl"] == 1.0
    told = "warning: not finite since the last line, and left out of it: model/loss, actor/loss\n"
    assert capsys.readouterr().out == told


def test_a_line_goes_on_after_a_resume(clock):
    """Its means are those of the run that was not interrupted; its speeds are those of this process."""
    meter = some_meter()
    for value in (1.0, 2.0):
        meter.add({"model/loss": torch.tensor(value)})
    again = some_meter(updates=2)
    again.load_state_dict(meter.state_dict())
    assert difference(again.state_dict(), meter.state_dict()) == ""
    assert again.is_new  # no update in this process yet
    again.start(100)
    again.add({"model/loss": torch.tensor(6.0)})
    again.agent.updates, clock.now = 3, clock.now + 2.0
    line = again.line(120)
    assert line["model/loss"] == 3.0
    assert line["perf/env_steps_per_s"] == 10.0 and line["perf/updates_per_s"] == 0.5


def test_metrics_of_an_update_are_added_without_waiting():
    """The sums are tensors on the agent's device, one for each metric."""
    config = tiny_config()
    agent = tiny_dreamer(config)
    meter = Meter(agent, ReplayBuffer(10, 1, (3, 4, 4), 2, seed=0), Stopwatch())
    first, second = (agent.train_step(random_batch(config, seed)) for seed in range(2))
    meter.add(first)
    meter.add(second)
    assert meter.totals.keys() == first.keys() and meter.updates == 2
    assert all(torch.equal(total, first[name] + second[name]) for name, total in meter.totals.items())
