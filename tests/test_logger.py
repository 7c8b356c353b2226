"""What a run shows of itself: lines, figures of evaluation episodes, pictures, and W&B read back from its own files."""

import contextlib
import getpass
import json
import resource
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import wandb

import logger
from logger import EpisodeStats, Evaluation, Logger, Recording
from tiny import ACTION_SIZE, image_shape, seeded, tiny_config, tiny_dreamer
from train import CONTEXT, Prediction

ROOT = Path(__file__).parent.parent
CONFIG = {"task": "Lift", "preset": "debug", "robot": "Panda", "controller": "OSC_POSITION", "horizon": 15}


def lines(run_dir) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def noise(steps: int = 8, side: int = 64) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (steps, side, side, 3), dtype=np.uint8)


def recording(steps: int, seed: int = 0, terminal: bool = False, channels: int = 3) -> Recording:
    rng = np.random.default_rng(seed)
    return Recording(
        image=rng.integers(0, 256, (steps + 1, channels, 64, 64), dtype=np.uint8),
        action=rng.uniform(-1, 1, (steps + 1, ACTION_SIZE)).astype(np.float32),
        reward=np.r_[0, rng.uniform(0, 1, steps)].astype(np.float32),
        success=np.arange(steps + 1) > steps // 2,
        terminal=terminal,
        renders=rng.integers(0, 256, (steps + 1, 256, 256, 3), dtype=np.uint8),
    )


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
def offline(tmp_path_factory) -> tuple[list[dict], str]:
    """A real offline W&B run, read back record by record with W&B's own reader; and all of its text."""
    run_dir = tmp_path_factory.mktemp("Lift_debug_0")
    log = Logger(run_dir, CONFIG | {"run_dir": "/home/somebody/run"}, "offline")
    log.scalars(20, {"model/loss": 1.5, "episode/return": 3.0})
    for step, success in ((40, 0.8), (60, 0.3)):
        log.scalars(step, {"eval/return_mean": 4.0, "eval/success_rate": success})
    log.video(60, "eval", noise(), 10)
    assert not log.warned
    log.close()
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(run_dir / "wandb")]
    (file,) = run_dir.glob("wandb/offline-run-*/run-*.wandb")
    command[-1] = str(file)
    text = subprocess.run(command, capture_output=True, text=True, check=True, stdin=subprocess.DEVNULL).stdout
    return [json.loads(line) for line in text.splitlines()], text + file.read_bytes().decode("latin-1")


def records(offline, kind: str) -> list[dict]:
    return [record[kind] for record in offline[0] if record["type"] == kind]


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


def test_wandb_keeps_the_video_and_best_and_last_success(offline):
    """The video goes in as a file; the summary holds the best and the last success rate."""
    text = json.dumps([record for record in offline[0] if record["type"] in ("files", "summary", "history")])
    assert "media/videos/video/eval" in text and ".mp4" in text
    summary = {}
    for record in records(offline, "summary"):
        summary |= record.get("update", {})
    assert summary["best_success_rate"] == 0.8 and summary["last_success_rate"] == 0.3


def test_wandb_learns_no_names_of_people_or_machines(offline):
    """Neither the host's name, nor the user's, nor the path of the program is in the run's file."""
    text = offline[1]
    assert f'"{socket.gethostname()}"' not in text and f'"{getpass.getuser()}"' not in text
    assert sys.executable not in text and sys.argv[0] not in text and "/home/somebody" not in text


@pytest.mark.parametrize("mode", ["online", "offline"])
def test_wandb_goes_on_with_the_run_it_was_given(mode, tmp_path):
    """A resumed run keeps its id, and the best success rate of before."""
    log = Logger(tmp_path, CONFIG, "disabled", wandb_id="abc123")
    log.scalars(20, {"eval/success_rate": 0.9})
    log.close()
    assert log.wandb_id == "abc123"  # also where W&B was off in between
    calls = {}
    wandb_init = wandb.init

    def init(**kwargs):
        calls.update(kwargs)
        return wandb_init(**kwargs | {"mode": "disabled"})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(wandb, "init", init)
        log = Logger(tmp_path, CONFIG, mode, wandb_id="abc123", size=log.size)
        log.close()
    assert calls["id"] == "abc123" and calls["resume"] == "allow" and calls["mode"] == mode
    assert log.best_success == 0.9


def test_wandb_that_fails_costs_one_warning(tmp_path, monkeypatch, capsys):
    """At the start or in the middle: the local files go on, and the id stays for the next start."""

    def fail(*_, **__):
        raise wandb.errors.CommError("no network")

    with monkeypatch.context() as patch:
        patch.setattr(wandb, "init", fail)
        log = Logger(tmp_path, CONFIG, "online", wandb_id="abc123")
        log.scalars(1, {"a": 1})
        log.close()
    assert capsys.readouterr().out.count("warning: W&B is off") == 1 and log.wandb_id == "abc123"

    log = Logger(tmp_path, CONFIG, "disabled", size=log.size)
    log.wandb = SimpleNamespace(log=fail, summary={})
    log.scalars(2, {"a": 2})
    log.scalars(3, {"a": 3})
    log.close()
    assert capsys.readouterr().out.count("warning") == 1
    assert [line["a"] for line in lines(tmp_path)] == [1, 2, 3]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="finds W&B's process in /proc")
def test_wandb_whose_process_is_killed_costs_one_warning(tmp_path):
    """The run goes on, its metrics are complete, and nothing but the warning is printed, also at exit."""
    code = f"""
import os, pathlib, signal, time
from logger import Logger
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


def test_wandb_mode_flag_beats_environment_beats_key(monkeypatch, tmp_path):
    """Online only where a key exists, even if asked for, because W&B would ask for it at the terminal."""
    environ = {"NETRC": str(tmp_path / "netrc")}
    key = environ | {"WANDB_API_KEY": "x"}
    assert logger.pick_wandb_mode("disabled", key | {"WANDB_MODE": "online"})[0] == "disabled"
    assert logger.pick_wandb_mode("auto", key | {"WANDB_MODE": "offline"})[0] == "offline"
    assert logger.pick_wandb_mode("auto", key)[0] == "online"
    assert logger.pick_wandb_mode("auto", key | {"WANDB_MODE": "dryrun"})[0] == "offline"
    mode, reason = logger.pick_wandb_mode("auto", key | {"WANDB_MODE": "disable"})  # a slip must not send anything
    assert mode == "disabled" and "WANDB_MODE disable is unknown" in reason
    assert logger.pick_wandb_mode("auto", environ)[0] == "offline"
    assert logger.pick_wandb_mode("online", environ) == ("offline", "--wandb online, but no API key was found")
    assert logger.pick_wandb_mode("auto", environ | {"WANDB_MODE": "online"})[0] == "offline"
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password x")
    assert logger.pick_wandb_mode("auto", environ)[0] == "online"
    assert logger.pick_wandb_mode("auto", environ | {"WANDB_BASE_URL": "https://wandb.example.org"})[0] == "offline"
    monkeypatch.setattr(logger.importlib.util, "find_spec", lambda name: None)
    assert logger.pick_wandb_mode("online", key)[0] == "disabled"


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


def test_a_resumed_log_cuts_what_the_checkpoint_does_not_know(tmp_path):
    """Lines behind the checkpoint go; a size beyond the file's end adds nothing."""
    log = Logger(tmp_path, CONFIG, "disabled")
    log.scalars(1, {"a": 1})
    size = log.size
    log.scalars(2, {"a": 2})
    log.close()
    Logger(tmp_path, CONFIG, "disabled", size=size).close()
    assert [line["a"] for line in lines(tmp_path)] == [1]
    Logger(tmp_path, CONFIG, "disabled", size=10_000).close()
    assert [line["a"] for line in lines(tmp_path)] == [1]


def test_torn_and_foreign_lines_are_counted_not_fatal(tmp_path):
    """What a crash leaves at the end of metrics.jsonl does not cost the rest."""
    (tmp_path / "metrics.jsonl").write_bytes(b'{"env_step": 1, "a": 2}\n[1]\n\xff\xfe\n{"env_step": 2, "a"')
    assert logger.read_metrics(tmp_path) == ([{"env_step": 1, "a": 2}], 3)
    assert logger.read_metrics(tmp_path / "nowhere") == ([], 0)


def test_a_video_is_written_whole(tmp_path):
    """Frames, sides and length come back, and nothing else is left in the folder."""
    import imageio.v2 as imageio

    frames = np.zeros((12, 32, 48, 3), np.uint8)
    frames[6:] = 255
    logger.write_video(tmp_path / "videos" / "a.mp4", frames, 10)
    back = np.stack(list(imageio.get_reader(tmp_path / "videos" / "a.mp4").iter_data()))
    assert back.shape == frames.shape and np.abs(back.astype(int) - frames).max() < 10
    assert [path.name for path in (tmp_path / "videos").iterdir()] == ["a.mp4"]


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


# ------------------------------------------------------------------------------------------ figures


def test_episode_figures():
    """Steps are control steps, rewards those of a control step, and success is latched at its first moment."""
    stats = EpisodeStats(repeat=2)
    for reward, success in ((0.2, False), (1.6, True), (0.4, False)):
        stats.add(reward, success)
    expected = {"return": 2.2, "length": 6, "max_reward": 0.8, "success": 1.0, "time_to_success": 4}
    assert stats.metrics() == pytest.approx(expected)
    never = EpisodeStats(repeat=1)
    never.add(0.5, False)
    assert "time_to_success" not in never.metrics() and never.metrics()["success"] == 0.0
    summary = Evaluation([stats, never], []).summary()
    assert summary["eval/return_mean"] == pytest.approx(1.35) and summary["eval/return_std"] == pytest.approx(0.85)
    assert summary["eval/success_rate"] == 0.5 and summary["eval/episodes"] == 2
    assert summary["eval/time_to_success_mean"] == 4 and summary["eval/max_reward_mean"] == pytest.approx(0.65)
    assert "eval/time_to_success_mean" not in Evaluation([never], []).summary()


@pytest.mark.parametrize("terminal", [True, False])
def test_realised_return_is_the_discounted_sum(terminal):
    """Of the rewards from the row on; where the clock ended the episode, the critic's last value closes it."""
    reward = np.random.default_rng(0).uniform(0, 1, 9)
    returns = logger.realised_return(reward, 7.0, terminal, 0.9)
    last = reward[-1] if terminal else 7.0
    for t in range(9):
        assert returns[t] == pytest.approx(sum(0.9**k * reward[t + k] for k in range(8 - t)) + 0.9 ** (8 - t) * last)


def test_open_loop_windows_are_whole_and_start_in_different_episodes():
    """50 rows each, from all episodes that have them; shorter episodes alone set a shorter length."""
    long, short = [recording(120, seed) for seed in range(2)], recording(30, 5)
    windows = logger.open_loop_windows([*long, short])
    assert windows.image.shape[:2] == (50, 4)
    for column, (episode, start) in enumerate(((0, 0), (1, 0), (0, 50), (1, 50))):
        rows = slice(start, start + 50)
        assert torch.equal(windows.image[:, column], torch.as_tensor(long[episode].image[rows]))
        assert torch.equal(windows.reward[:, column], torch.as_tensor(long[episode].reward[rows]))
    assert windows.is_first[0].all() and not windows.is_first[1:].any()
    assert logger.open_loop_windows([short, recording(20)]).image.shape[:2] == (31, 1)


def known_agent(config, offset: float, value: float):
    """Predicts the true reward + 0.1 with images `offset` too bright; its critic always says `value`."""
    return SimpleNamespace(
        config=config,
        device="cpu",
        world_model=SimpleNamespace(learned_reward=lambda reward: reward),
        predict=lambda batch, draws: Prediction(batch.image / 255 + offset, batch.reward + 0.1),
        judge=lambda batch, draws: (batch.reward + 0.1, torch.full_like(batch.reward, value)),
    )


def test_errors_of_a_known_model_are_found():
    """Squared image error, absolute reward error and value calibration of predictions that are off by known amounts."""
    config = tiny_config(discount=0.5)
    episodes = [recording(60), recording(40, 1, terminal=True)]
    for episode in episodes:
        episode.reward[:] = np.linspace(0, 1, len(episode.reward))
    metrics = logger.analyse(known_agent(config, 0.2, 3.0), episodes, seeded()).metrics
    for k in (1, 5, 15, 45):
        assert metrics[f"openloop/image_mse_{k}"] == pytest.approx(0.04, rel=1e-4)
        assert metrics[f"openloop/reward_error_{k}"] == pytest.approx(0.1, rel=1e-4)
    for name in ("error", "error_hovering", "error_holding", "error_lifted"):
        assert metrics[f"reward/{name}"] == pytest.approx(0.1, rel=1e-4)
    realised = [logger.realised_return(e.reward, 3.0, e.terminal, 0.5) for e in episodes]
    known = np.concatenate([realised[0][:-1], realised[1]])  # where the clock ended, the last row knows nothing
    assert metrics["behaviour/value_predicted"] == pytest.approx(3.0)
    assert metrics["behaviour/value_realised"] == pytest.approx(known.mean(), rel=1e-4)
    assert metrics["behaviour/value_error"] == pytest.approx(np.abs(known - 3).mean(), rel=1e-4)


def test_figures_that_cannot_be_had_are_left_out():
    """Open-loop steps beyond the episodes, and classes that no reward fell into or that the task does not have."""
    episode = recording(30)
    episode.reward[:] = 0.1
    agent = known_agent(tiny_config(), 0.0, 0.0)
    names = set(logger.analyse(agent, [episode], seeded()).metrics)
    assert {"openloop/image_mse_15", "reward/error", "reward/error_hovering"} <= names
    assert not {"openloop/image_mse_45", "openloop/reward_error_45", "reward/error_lifted"} & names
    agent.config = tiny_config(task="Door")
    assert "reward/error_hovering" not in logger.analyse(agent, [episode], seeded()).metrics
    agent.config = tiny_config(action_repeat=2)
    episode.reward[:] = 1.1  # 0.55 a control step
    assert "reward/error_holding" in logger.analyse(agent, [episode], seeded()).metrics


def test_looking_leaves_the_agent_as_it_was():
    """Analysis and dreams are finite, change no parameter, and take nothing from training's random stream."""
    config = tiny_config()
    agent = tiny_dreamer(config)
    before = {name: value.clone() for name, value in agent.world_model.state_dict().items()}
    stream = torch.get_rng_state()
    channels = image_shape(config)[0]
    analysis = logger.analyse(agent, [recording(60, channels=channels), recording(33, 1, channels=channels)], seeded())
    dream = agent.dream(analysis.windows, 7, seeded())
    assert all(np.isfinite(value) for value in analysis.metrics.values())
    assert dream.image.shape[:2] == dream.reward.shape == (7, analysis.windows.image.shape[1])
    assert torch.equal(stream, torch.get_rng_state())
    assert all(torch.equal(before[name], value) for name, value in agent.world_model.state_dict().items())
    assert all(p.grad is None for p in agent.world_model.parameters())


def test_the_stopwatch_adds_up():
    """Parts are kept apart, and a part that runs twice counts twice."""
    watch = logger.Stopwatch()
    for part in ("env", "update", "env"):
        with watch(part):
            pass
    assert set(watch.seconds) == {"env", "update"} and watch.seconds["env"] > 0


# ------------------------------------------------------------------------------------------ pictures


def test_open_loop_video_places_truth_model_and_error():
    """Each camera has its truth, model and error rows, each sequence its column; sides are multiples of 16."""
    truth = np.zeros((7, 2, 6, 64, 64))
    truth[:, 1, 3:] = 1.0  # second sequence, second camera: white
    video = logger.open_loop_video(truth, np.zeros_like(truth), ("agentview", "robot0_eye_in_hand"))
    assert video.dtype == np.uint8 and video.shape == (7, 32 + 6 * 128, 96 + 2 * 128, 3)
    assert all(side % 16 == 0 for side in video.shape[1:3])
    rows = [video[:, 32 + 128 * i : 32 + 128 * i + 126, 96:] for i in range(6)]
    left, right = slice(0, 126), slice(128, 254)
    assert (rows[0] <= 24).all() and (rows[3][:, :, right] == 255).all() and (rows[3][:, :, left] == 0).all()
    assert (rows[4][:, :, left] == 0).all()
    assert (rows[5][:, :, left] == 128).all() and (rows[5][:, :, right] == 0).all()  # right; too dark
    header = video[:, :32]
    assert not np.array_equal(header[CONTEXT - 1], header[CONTEXT])  # "observed" becomes "imagined"
    assert video[0, 32:160, :96].max() > 100  # the row's label


def test_dream_video_shows_what_was_seen_then_what_is_imagined():
    """Observed frames first, then the dream with the imagined reward below each column."""
    seen, dream = np.ones((5, 3, 3, 64, 64)), np.zeros((20, 3, 3, 64, 64))
    video = logger.dream_video(seen, dream, np.full((20, 3), 0.5), ("agentview",), horizon=15)
    assert video.shape == (25, 32 + 128 + 32, 96 + 3 * 128, 3) and video.dtype == np.uint8
    assert (video[4, 32:158, 96:222] == 255).all() and (video[5, 32:158, 96:222] == 0).all()
    assert video[5, -32:, 96:].max() > 100 and video[4, -32:, 96:].max() < 50
    assert not np.array_equal(
        video[5 + 14, :32], video[5 + 15, :32]
    )  # the last step of the horizon, and the first beyond


def test_policy_video_has_its_figures_written_on_it():
    """One frame a row, a strip of text that changes with the figures, sides that are multiples of 16."""
    video = logger.policy_video(recording(10), repeat=1)
    assert video.shape == (11, 288, 384, 3) and video.dtype == np.uint8
    assert not np.array_equal(video[3, :32], video[4, :32])
    green = (video[:, :32, 300:].astype(int) * (-1, 1, -1)).max((1, 2)).max(-1) > 100
    assert not green[:6].any() and green[6:].all()


def test_policy_frame_shows_every_camera_beside_the_large_view():
    """One to three cameras, zoomed to half the height, in columns."""
    render = np.full((256, 256, 3), 9, np.uint8)
    for cameras, width in ((1, 384), (2, 384), (3, 512)):
        image = np.arange(cameras).repeat(3)[:, None, None] * np.ones((1, 64, 64))
        frame = logger.policy_frame(render, image.astype(np.uint8))
        assert frame.shape == (256, width, 3)
        assert (frame[:128, 256:384] == 0).all() and (cameras == 1 or (frame[128:, 256:384] == 1).all())
