"""Never lose a run: interrupted, damaged and starved runs end where undisturbed ones do (cases in tests/README.md)."""

import copy
import functools
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv

import checkpoint
import faults
import run
import train as training
from env import RebuildingEnv
from fake_env import FakeEnv
from faults import Fork, NoisyEnv, copies_at_each_checkpoint, descendants, difference, fingerprint, flip_bit
from test_run import TINY, metrics, newest
from tiny import descend, random_batch, tiny_config, tiny_dreamer

ROOT = Path(__file__).parent.parent
EPISODE = 20  # control steps


@pytest.fixture(scope="module")
def straight(tmp_path_factory) -> dict:
    """An undisturbed run: its fingerprint, and a copy of its folder at each of its checkpoints."""
    folder = tmp_path_factory.mktemp("straight")
    with pytest.MonkeyPatch.context() as patch:
        faults.without_videos(patch)
        copies = copies_at_each_checkpoint(patch, folder)
        assert faults.train(folder / "run", make_env=NoisyEnv) == 0
    return {"end": fingerprint(folder / "run"), "copies": copies, "run": folder / "run"}


@pytest.fixture(autouse=True)
def no_videos(monkeypatch):
    faults.without_videos(monkeypatch)


def scratch(path: Path, to: Path) -> Path:
    """A copy of a run folder to be spoilt."""
    return Path(shutil.copytree(path, to))


# ------------------------------------------------------------------------------------------ exact resume


def test_a_run_resumed_at_any_checkpoint_ends_bit_for_bit_where_the_straight_run_does(straight, tmp_path):
    """R1: weights, moments, generators, replay (by the hash of its rows), counters and metrics, at each of them."""
    state = straight["end"]["state"]
    assert state["progress"]["episode"] == 8 and state["agent"]["updates"] >= 40
    assert len(state["replay"]) < 8 and len(straight["copies"]) == 8
    for copied in straight["copies"][:-1]:
        folder = scratch(copied, tmp_path / copied.name)
        assert faults.train(folder, make_env=NoisyEnv) == 0
        assert difference(fingerprint(folder), straight["end"]) == "", folder.name


def test_a_run_of_several_envs_resumes_exactly_where_all_episodes_ended(tmp_path):
    """Episodes of one length end together, and nothing is lost then. (In this process: workers change nothing.)"""

    def in_process(config, make_env):
        makers = [lambda i=i: RebuildingEnv(lambda: make_env(**run.env_options(config), seed=i)) for i in range(3)]
        return SyncVectorEnv(makers, autoreset_mode=AutoresetMode.DISABLED)

    flags = "--num_envs 3 --prefill 60 --capacity 160 --steps 360"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "make_envs", in_process)
        with pytest.MonkeyPatch.context() as inner:
            copies = copies_at_each_checkpoint(inner, tmp_path)
            assert faults.train(tmp_path / "run", flags) == 0
        assert len(copies) == 6
        assert faults.train(copies[3], flags) == 0
    assert difference(fingerprint(copies[3]), fingerprint(tmp_path / "run")) == ""


def drop(path: str, value):
    """A change of a checkpoint's state: the item at `path` as it would be had it not been saved."""

    def change(state: dict) -> None:
        *parents, name = path.split(".")
        for parent in parents:
            state = state[parent]
        assert name in state, path
        state[name] = value(state[name]) if callable(value) else value

    return pytest.param(change, id=path)


def fresh(old):
    """The same modules with other values: what an agent begins with instead of what it has learnt."""
    generator = torch.Generator().manual_seed(7)
    return {
        name: torch.randn(value.shape, generator=generator).to(value.dtype) if value.dim() else value
        for name, value in old.items()
    }


def no_moments(old: dict) -> dict:
    old = copy.deepcopy(old)
    for moments in old["adam"]["state"].values():
        moments["exp_avg"].zero_()
        moments["exp_avg_sq"].zero_()
    return old


def no_target(old: dict) -> dict:
    return old | {name: old[name.replace("target_value", "value")] for name in old if name.startswith("target_value")}


def another(old: dict) -> dict:
    """The state of a NumPy generator with a seed of its own."""
    return np.random.default_rng(99).bit_generator.state


LATE, EARLY = 3, 0  # checkpoints: in training, between two lines of metrics; in the prefill
DROPPED = [
    drop("agent.world_model", fresh),
    drop("agent.behavior", fresh),
    drop("agent.behavior", no_target),
    drop("agent.model_optimizer", no_moments),
    drop("agent.actor_optimizer", no_moments),
    drop("agent.value_optimizer", no_moments),
    drop("agent.updates", 0),
    drop("progress.step", 0),
    drop("progress.episode", 0),
    drop("progress.owed", 0.0),
    drop("progress.pretrained", False),
    drop("progress.logged", 0),
    drop("progress.evaluated", 0),
    drop("progress.metrics_size", 0),
    drop("replay", []),
    drop("totals", {}),
    drop("updates_since", 0),
    drop("rng.torch", lambda _: torch.Generator().manual_seed(99).get_state()),
    drop("rng.python", lambda _: random.Random(99).getstate()),
    drop("rng.numpy", lambda old: old | {"state": old["state"] | {"pos": (old["state"]["pos"] + 7) % 600}}),
    drop("rng.replay", another),
    drop("rng.envs", lambda _: [another({})]),
]


def resumes_otherwise(straight: dict, at: int, change, folder: Path) -> bool:
    """Whether the run, continued from a checkpoint that was changed, ends elsewhere, or not at all."""
    scratch(straight["copies"][at], folder)
    state, path, _ = checkpoint.load_checkpoint(folder)
    change(state)
    path.unlink()
    checkpoint.save_checkpoint(folder, 20 * (at + 1), state)
    code = faults.train(folder, make_env=NoisyEnv)
    return code != 0 or difference(fingerprint(folder), straight["end"]) != ""


@pytest.mark.parametrize("change", DROPPED)
def test_each_saved_item_is_needed_for_an_exact_resume(change, straight, tmp_path):
    """R2, negative controls: without any one of the saved items, the comparison of R1 fails."""
    assert resumes_otherwise(straight, LATE, change, tmp_path / "run")


def test_the_action_space_is_needed_in_the_prefill(straight, tmp_path):
    """R2: the generator of random actions decides only as long as actions are random."""

    def change(state):
        state["rng"]["action_space"] = another({})

    assert resumes_otherwise(straight, EARLY, change, tmp_path / "run")


def test_the_negative_controls_change_nothing_else(straight, tmp_path):
    """R2: a checkpoint that is loaded and saved again without a change still resumes exactly."""
    assert not resumes_otherwise(straight, LATE, lambda state: None, tmp_path / "run")


def test_the_seed_decides_a_run_in_a_fresh_process(tmp_path):
    """R5: the same seed in a process of its own ends in the same state, another seed elsewhere."""
    flags = "--steps 80"
    faults.train(tmp_path / "here", flags)
    for name, seed in (("there", 0), ("other", 1)):
        code, output = Fork(lambda n=name, s=seed: faults.train(tmp_path / n, f"{flags} --seed {s}")).finish(120)
        assert code == 0, output
    assert difference(fingerprint(tmp_path / "there"), fingerprint(tmp_path / "here")) == ""
    other, here = (fingerprint(tmp_path / name)["state"]["agent"] for name in ("other", "here"))
    assert difference(other["world_model"], here["world_model"]) != ""


def test_another_torch_or_thread_count_is_said(straight, tmp_path, capsys):
    """One line names what keeps the resumed run from being exact."""
    folder = scratch(straight["copies"][6], tmp_path / "run")
    state, path, _ = checkpoint.load_checkpoint(folder)
    state["versions"] |= {"torch": "1.0", "threads": 64}
    path.unlink()
    checkpoint.save_checkpoint(folder, state["progress"]["step"], state)
    assert faults.train(folder, make_env=NoisyEnv) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if "not be bit for bit" in line)
    assert "torch 1.0 -> " in line and "threads 64 -> 1" in line


# ------------------------------------------------------------------------------------------ signals


def send_once(number: int, condition=lambda *_: True):
    """A function that sends this process a signal the first time its condition holds."""
    sent = []

    def send(*args):
        if not sent and condition(*args):
            sent.append(True)
            os.kill(os.getpid(), number)

    return send


def stop_in(place: str, number: int, patch: pytest.MonkeyPatch) -> None:
    """Arrange for a signal in the fourth episode or thereabouts: in an update, a step, an evaluation or a save."""
    if place == "update":
        send = send_once(number, lambda agent, _: agent.updates == 17)
        step = training.Dreamer.train_step
        patch.setattr(training.Dreamer, "train_step", lambda self, batch: (send(self, batch), step(self, batch))[1])
    elif place in ("episode", "evaluation"):
        seed = run.EVAL_SEED if place == "evaluation" else 0
        send = send_once(number, lambda env: env.seed == seed and env.total_steps == (67 if seed == 0 else 7))
        patch.setattr(CountingEnv, "hook", staticmethod(send))
    elif place == "save":
        send = send_once(number, lambda step: step == 80)
        fsync = os.fsync
        patch.setattr(os, "fsync", lambda fd: (send(saving[-1]), fsync(fd))[1])
        saving, save = [0], checkpoint.save_checkpoint

        def spy(run_dir, step, state, best_step=-1):
            saving.append(step)
            return save(run_dir, step, state, best_step)

        patch.setattr(checkpoint, "save_checkpoint", spy)


class CountingEnv(NoisyEnv):
    """Calls `hook` with itself after each step."""

    hook = staticmethod(lambda env: None)

    def __init__(self, *, seed, **options):
        super().__init__(seed=seed, **options)
        self.seed, self.total_steps = seed, 0

    def step(self, action):
        self.total_steps += 1
        type(self).hook(self)
        return super().step(action)


@pytest.mark.parametrize("place", ["update", "episode", "evaluation", "save"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
def test_a_signal_saves_the_last_episodes_end_and_the_resumed_run_is_exact(place, number, straight, tmp_path, capsys):
    """R6: exit code 143 or 130 within 10 s, wherever it arrives, though checkpoints are an hour apart."""
    run_dir, minutes = tmp_path / "run", 0 if place == "save" else 60
    started = []
    handle = run.stop_on_signals.handle

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run.stop_on_signals, "handle", lambda *a: (started.append(time.monotonic()), handle(*a))[1])
        stop_in(place, number, patch)
        assert faults.train(run_dir, f"--checkpoint_minutes {minutes}", CountingEnv) == 128 + number
        assert time.monotonic() - started[0] < 10
    step = newest(run_dir)["progress"]["step"]
    out = capsys.readouterr().out
    assert f"stopped by {signal.Signals(number).name}" in out and f"from step {step}" in out
    assert step == {"update": 60, "episode": 60, "evaluation": 40, "save": 80}[place]
    assert faults.train(run_dir, "--checkpoint_minutes 0", NoisyEnv) == 0
    end = fingerprint(run_dir)
    assert difference(end["metrics"], straight["end"]["metrics"]) == ""
    assert difference(end["state"], straight["end"]["state"]) == ""


def test_a_second_signal_ends_at_once(tmp_path):
    """The process does not wait for the save."""

    def work():
        save = checkpoint.save_checkpoint

        def twice(*args):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(run.stop_on_signals.SAME + 0.1)
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)
            return save(*args)

        checkpoint.save_checkpoint = twice
        return faults.train(tmp_path / "run")

    code, output = Fork(work).finish(60)
    assert code == 143, output
    assert not checkpoint.list_checkpoints(tmp_path / "run")


def test_a_signal_that_comes_twice_at_once_is_one(tmp_path, monkeypatch):
    """`timeout` sends its signal to the process and to its group: the state is saved all the same."""

    def hook(env):
        if env.total_steps == 45:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(CountingEnv, "hook", staticmethod(hook))
    code, output = Fork(lambda: faults.train(tmp_path / "run", "--checkpoint_minutes 60", CountingEnv)).finish(60)
    assert code == 143, output
    assert newest(tmp_path / "run")["progress"]["step"] == 40


def test_a_signal_before_any_episodes_end_leaves_a_folder_that_starts_afresh(tmp_path, capsys):
    """There is nothing to save then; the next start says so and drops replay and metrics."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CountingEnv, "hook", staticmethod(send_once(signal.SIGTERM, lambda env: env.total_steps == 5)))
        assert faults.train(tmp_path / "run", make_env=CountingEnv) == 143
    assert "from its beginning" in capsys.readouterr().out
    assert faults.train(tmp_path / "run", "--steps 60") == 0
    assert "starting afresh" in capsys.readouterr().out
    steps = [line["env_step"] for line in metrics(tmp_path / "run")]
    assert steps == sorted(steps) and newest(tmp_path / "run")["progress"]["episode"] == 3


# ------------------------------------------------------------------------------------------ crashes


def kill_at_random(run_dir: Path, kills: int, seed: int, make_env=NoisyEnv) -> int:
    """Start the run again and again and kill -9 it at random moments, then let it end; times it was killed."""
    moments, killed = random.Random(seed), 0
    while killed < kills:
        process = Fork(lambda: faults.train(run_dir, make_env=make_env))
        time.sleep(moments.uniform(0.0, 1.5))
        if not process.running():
            process.finish(1)
            break
        os.kill(process.pid, signal.SIGKILL)
        process.finish(10)
        killed += 1
    code, output = Fork(lambda: faults.train(run_dir, make_env=make_env)).finish(300)
    assert code == 0, output
    return killed


def test_kill_9_at_random_moments_changes_nothing(straight, tmp_path):
    """R4: killed twice or more, the run still ends where the straight one does."""
    assert kill_at_random(tmp_path / "run", 3, seed=1) >= 1
    assert difference(fingerprint(tmp_path / "run"), straight["end"]) == ""
    steps = [line["env_step"] for line in metrics(tmp_path / "run")]
    assert steps == sorted(steps)
    assert not list((tmp_path / "run").rglob(".*.tmp"))


def test_metrics_and_replay_ahead_of_the_checkpoint_are_cut_back(straight, tmp_path):
    """R11: lines and episodes that came after the checkpoint don't appear twice."""
    folder = scratch(straight["run"], tmp_path / "run")
    early = straight["copies"][4]
    for path in checkpoint.list_checkpoints(folder):
        path.unlink()
    for path in (*checkpoint.list_checkpoints(early)[:1], *early.glob("replay/*")):
        target = folder / path.relative_to(early)
        target.write_bytes(path.read_bytes())
    assert faults.train(folder, make_env=NoisyEnv) == 0
    assert difference(fingerprint(folder), straight["end"]) == ""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    assert len(set(lines)) == len(lines)


def test_a_damaged_checkpoint_costs_an_episode_and_changes_nothing(straight, tmp_path, capsys):
    """R8: the one before is used, replay and metrics go back to it, and the end is the same."""
    folder = scratch(straight["copies"][5], tmp_path / "run")
    damaged = checkpoint.list_checkpoints(folder)[0]
    flip_bit(damaged, 54321)
    assert faults.train(folder, make_env=NoisyEnv) == 0
    assert f"warning: {damaged.name} is damaged" in capsys.readouterr().out
    assert difference(fingerprint(folder), straight["end"]) == ""


def test_all_checkpoints_damaged_changes_nothing_on_disk(straight, tmp_path, capsys):
    """R9: exit code 1, a line that names them, and every file as it was."""
    folder = scratch(straight["copies"][5], tmp_path / "run")
    paths = checkpoint.list_checkpoints(folder)
    for path in paths:
        flip_bit(path, 54321)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != "lock"}
    assert faults.train(folder, make_env=NoisyEnv) == 1
    error = capsys.readouterr().err
    assert all(path.name in error for path in paths) and error.count("\n") == 1
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != "lock"}


def test_a_lost_replay_file_costs_a_warning(straight, tmp_path, capsys):
    """R10: skipped, counted and named; training ends well."""
    folder = scratch(straight["copies"][5], tmp_path / "run")
    index = newest(folder)["replay"]
    (folder / "replay" / index[1][0]).unlink()
    flip_bit(folder / "replay" / index[2][0], 12345)
    assert faults.train(folder, make_env=NoisyEnv) == 0
    out = capsys.readouterr().out
    assert f"warning: 2 of {len(index)} replay episodes skipped" in out
    assert index[1][0] in out and index[2][0] in out


def test_without_saved_replay_a_resume_fills_it_anew_and_says_so(straight, tmp_path, capsys):
    """--save_replay false writes no episode; no update is made before there are `prefill` rows again."""
    run_dir = tmp_path / "run"
    assert faults.train(run_dir, "--save_replay false --steps 100", NoisyEnv) == 0
    assert not (run_dir / "replay").exists()
    before = newest(run_dir)["agent"]["updates"]
    assert "replay on disk: none" in capsys.readouterr().out
    assert faults.train(run_dir, "--save_replay false", NoisyEnv) == 0
    assert "the replay was not saved" in capsys.readouterr().out
    made = newest(run_dir)["agent"]["updates"] - before
    assert 0 < made <= (160 - 100 - 28) / 4 + 1


def test_the_replay_on_disk_can_be_switched_off_and_on(tmp_path):
    """Off: files go when no checkpoint needs them. On: what is in memory is written."""
    run_dir = tmp_path / "run"
    assert faults.train(run_dir, "--steps 60") == 0
    assert len(list((run_dir / "replay").iterdir())) == 3
    assert faults.train(run_dir, "--steps 100 --save_replay false") == 0
    assert list((run_dir / "replay").iterdir()) == []
    assert faults.train(run_dir, "--steps 160") == 0
    assert len(newest(run_dir)["replay"]) == 3


def test_checkpoint_minutes_decide_when_and_the_best_is_kept(tmp_path):
    """Between two dates only a new best evaluation is saved; its checkpoint stays beside the last two."""
    assert faults.train(tmp_path / "run", "--checkpoint_minutes 60 --eval_every 20 --steps 200") == 0
    best = newest(tmp_path / "run")["progress"]["best_step"]
    steps = [checkpoint._step(path) for path in checkpoint.list_checkpoints(tmp_path / "run")]
    assert best in steps and steps[0] == 200 and len(steps) <= 3


# ------------------------------------------------------------------------------------------ a full disk


class StarvingEnv(NoisyEnv):
    """Limits the size of files that this process may write, in the second half of some episodes."""

    limits: dict[int, int] = {}  # episode -> bytes

    def __init__(self, *, seed, **options):
        super().__init__(seed=seed, **options)
        self.training, self.episode = seed == 0, -1

    def reset(self, **kwargs):
        self.episode += 1
        if self.training:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        return super().reset(**kwargs)

    def step(self, action):
        if self.training and self.steps == 10 and self.episode in self.limits:
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.limits[self.episode], resource.RLIM_INFINITY))
        return super().step(action)


def test_a_full_disk_costs_a_warning_and_the_next_save_works(tmp_path):
    """R7: no byte, 1 KB, half and 99 % of a checkpoint can be written: old checkpoint valid, training goes on.

    The error is EFBIG; there is one warning an outage, and the end is that of the undisturbed run.
    """
    flags = "--eval_every 1000 --cnn_depth 8"  # a checkpoint is larger than an episode, so that it meets the limit
    assert faults.train(tmp_path / "straight", flags, NoisyEnv) == 0
    size = checkpoint.list_checkpoints(tmp_path / "straight")[0].stat().st_size
    assert size // 2 > max(path.stat().st_size for path in (tmp_path / "straight" / "replay").iterdir())

    def work():
        StarvingEnv.limits = {0: 0, 2: 1024, 4: size // 2, 6: size * 99 // 100}
        save = checkpoint.save_checkpoint

        def spy(run_dir, *args):
            try:
                return save(run_dir, *args)
            finally:
                print("on disk:", checkpoint.load_checkpoint(run_dir)[0]["progress"]["step"])

        checkpoint.save_checkpoint = spy
        return faults.train(tmp_path / "run", flags, StarvingEnv)

    code, output = Fork(work).finish(120)
    assert code == 0, output
    assert output.count("warning: metrics.jsonl can't be written") == 1  # its lines wait in memory
    output = re.sub("warning: metrics.jsonl.*\n", "", output)
    events = [line for line in output.splitlines() if re.match("warning|on disk|step .* saved", line)]
    assert [re.sub(r"warning: .* can't be written to, training goes on: .*", "warning", x) for x in events] == [
        *("warning", "on disk: 40", "step 40: saved again"),
        *("warning", "on disk: 80", "step 80: saved again"),
        *("on disk: 80", "warning", "on disk: 120", "step 120: saved again"),
        *("on disk: 120", "warning", "on disk: 160", "step 160: saved again"),
    ]
    assert output.count("File too large") == 4
    assert difference(fingerprint(tmp_path / "run"), fingerprint(tmp_path / "straight")) == ""


# ------------------------------------------------------------------------------------------ guards


class BadRewardEnv(NoisyEnv):
    def step(self, action):
        image, reward, terminated, truncated, info = super().step(action)
        self.count = getattr(self, "count", 0) + 1
        return image, float("nan") if self.count == 70 else reward, terminated, truncated, info


class BadImageEnv(NoisyEnv):
    def step(self, action):
        image, *rest = super().step(action)
        self.count = getattr(self, "count", 0) + 1
        return np.full(image.shape, np.nan) if self.count == 70 else image, *rest


def test_a_reward_that_is_not_finite_stops_the_run_with_the_last_episode_saved(tmp_path, capsys):
    """R16: refused at the replay's door; exit code 1, one line, and the state before it on disk."""
    assert faults.train(tmp_path / "run", "--checkpoint_minutes 60", BadRewardEnv) == 1
    error = capsys.readouterr().err
    assert "non-finite reward nan" in error and error.count("\n") == 1
    assert newest(tmp_path / "run")["progress"]["step"] == 60
    assert faults.train(tmp_path / "run", make_env=NoisyEnv) == 0


def test_an_image_that_is_not_finite_never_reaches_the_replay(tmp_path, capsys):
    """R16: a vector of environments would cast it to uint8 in silence; its environment is rebuilt instead."""
    assert faults.train(tmp_path / "run", "--steps 80", BadImageEnv) == 0
    out = capsys.readouterr().out
    assert out.count("environment 0 was rebuilt") == 1 and "an image of float64 (3, 64, 64)" in out


def poison(patch: pytest.MonkeyPatch, updates) -> None:
    """NaNs in the gradient of the world model in these updates."""
    loss = training.WorldModel.loss
    count = [0]

    def poisoned(self, batch, draws):
        value, post, parts = loss(self, batch, draws)
        count[0] += 1
        return value * (float("nan") if count[0] in updates else 1.0), post, parts

    patch.setattr(training.WorldModel, "loss", poisoned)


def test_one_nan_in_a_gradient_is_skipped_and_counted(tmp_path, monkeypatch):
    """R16: the other updates are made, all that is saved is finite, and the metrics have the count."""
    poison(monkeypatch, {20})
    assert faults.train(tmp_path / "run") == 0
    state = newest(tmp_path / "run")
    assert state["agent"]["model_optimizer"]["skipped"] == 1
    assert all(value.isfinite().all() for value in state["agent"]["world_model"].values())
    assert metrics(tmp_path / "run")[-2].get("optim/skipped", metrics(tmp_path / "run")[-1].get("optim/skipped")) == 1


def test_a_run_ends_well_whose_last_update_was_skipped(tmp_path, monkeypatch, capsys):
    """R16: nothing comes after it that could be saved instead, and a resume would only repeat it."""
    assert faults.train(tmp_path / "straight", make_env=NoisyEnv) == 0
    updates = newest(tmp_path / "straight")["agent"]["updates"]
    poison(monkeypatch, {updates})
    assert faults.train(tmp_path / "run", make_env=NoisyEnv) == 0
    state = newest(tmp_path / "run")
    assert state["progress"]["step"] == 160 and state["agent"]["model_optimizer"]["skipped"] == 1
    assert all(value.isfinite().all() for value in state["agent"]["world_model"].values())


def test_ten_nans_in_a_row_stop_the_run_and_the_good_checkpoint_stays(tmp_path, monkeypatch, capsys):
    """R16: exit code 1, one line that names a tensor, and nothing saved after the first of them."""
    poison(monkeypatch, range(20, 1000))
    assert faults.train(tmp_path / "run") == 1
    error = capsys.readouterr().err
    assert "the gradient of world_model." in error and "10 updates" in error and error.count("\n") == 1
    state = newest(tmp_path / "run")
    assert state["agent"]["model_optimizer"]["skipped"] == 0
    assert state["agent"]["updates"] < 20


def test_a_parameter_that_is_not_finite_stops_the_run_before_it_is_saved(tmp_path, monkeypatch, capsys):
    """R16: it is named."""
    step = training.Dreamer.train_step

    def overflow(self, batch):
        found = step(self, batch)
        if self.updates == 20:
            with torch.no_grad():
                self.behavior.actor.out.bias[1] = float("inf")
        return found

    monkeypatch.setattr(training.Dreamer, "train_step", overflow)
    assert faults.train(tmp_path / "run") == 1
    assert "behavior.actor.out.bias is not finite" in capsys.readouterr().err
    assert all(value.isfinite().all() for value in newest(tmp_path / "run")["agent"]["behavior"].values())


def test_skips_are_counted_in_a_row_on_the_device():
    """The count falls back to zero at a good update, and stays once it is ten."""
    agent = tiny_dreamer(tiny_config())
    optimizer, weight = agent.actor_optimizer, agent.behavior.actor.out.weight
    for bad, expected in ((1, 1), (1, 2), (0, 0), *((1, i + 1) for i in range(10)), (0, 10), (1, 10)):
        loss = weight.square().sum() * (float("nan") if bad else 1.0)
        loss = loss + sum(0.0 * p.sum() for p in optimizer.params)
        descend(optimizer, loss)
        assert agent.skipped_in_a_row() == expected
    assert agent.non_finite() is None


def test_a_skipped_update_leaves_no_trace_in_the_return_range():
    """A NaN among the returns would otherwise be kept by their running range for ever."""
    agent = tiny_dreamer(tiny_config(return_norm=True))
    for returns in (torch.arange(100.0), torch.full((100,), float("nan"))):
        agent.behavior._return_scale(returns)
    assert float(agent.behavior.return_range) == pytest.approx(0.9, abs=0.02)


class RaisingEnv(NoisyEnv):
    """Raises at some of the steps of all environments that this process has built."""

    raise_at: set[int] = set()
    count = built = 0

    def __init__(self, *, seed, **options):
        super().__init__(seed=seed, **options)
        self.training = seed == 0
        type(self).built += self.training

    def step(self, action):
        if self.training:
            type(self).count += 1
            if self.count in self.raise_at:
                raise RuntimeError(f"simulation unstable at {self.count}")
        return super().step(action)


@pytest.fixture
def raising(monkeypatch):
    """The class, with its counters at zero."""
    for name, value in (("raise_at", set()), ("count", 0), ("built", 0)):
        monkeypatch.setattr(RaisingEnv, name, value)
    return RaisingEnv


def test_an_env_that_raises_is_rebuilt_and_its_episode_truncated(tmp_path, raising, capsys):
    """R17: twice is survived; the rows before the exception are an episode, and none is made up."""
    raising.raise_at = {45, 70}
    assert faults.train(tmp_path / "run", "--capacity 1000", raising) == 0
    out = capsys.readouterr().out
    assert raising.built == 3 and out.count("environment 0 was rebuilt") == 2 and "simulation unstable at 45" in out
    lengths = [rows for _, _, rows in newest(tmp_path / "run")["replay"]]
    assert lengths[:5] == [21, 21, 5, 21, 5]  # 4 steps and a reset before each exception


def test_an_env_that_keeps_raising_ends_the_run_and_a_resume_works(tmp_path, raising, capsys):
    """R17: at the third time in 300 s the state of the last episode's end is saved; exit code 1, one line."""
    raising.raise_at = {45, 50, 55}
    assert faults.train(tmp_path / "run", "--checkpoint_minutes 60", raising) == 1
    error = capsys.readouterr().err
    assert "failed 3 times in 300 s" in error and error.count("\n") == 1
    assert newest(tmp_path / "run")["progress"]["step"] == 50  # the second exception ended an episode
    raising.raise_at = set()
    assert faults.train(tmp_path / "run", make_env=raising) == 0


def test_errors_that_are_long_past_do_not_count(tmp_path, raising, monkeypatch):
    """R17: three exceptions in more than 300 s don't stop the run."""
    raising.raise_at = {45, 70, 95}
    monkeypatch.setattr(run, "ENV_ERROR_SECONDS", 0.0)
    assert faults.train(tmp_path / "run", make_env=raising) == 0


def test_a_rebuilt_env_goes_on_with_its_generator(raising):
    """Episodes after the exception don't repeat the first ones."""
    options = run.env_options(run.parse_config(TINY.split())[0])
    env = run.RebuildingEnv(lambda: raising(**options, seed=0))
    first, _ = env.reset()
    raising.raise_at = {1}
    image, reward, terminated, truncated, info = env.step(np.zeros(4, np.float32))
    assert np.array_equal(image, first) and (reward, terminated, truncated) == (0.0, False, True)
    assert "RuntimeError: simulation unstable at 1 (test_reliability.py:" in info["env_error"]
    second, _ = env.reset()
    assert not np.array_equal(first, second)


def test_a_reset_that_raises_is_tried_once_more(monkeypatch):
    """What raises twice reaches the caller."""
    options = run.env_options(run.parse_config(TINY.split())[0])
    failures = [2]

    class Reluctant(FakeEnv):
        def reset(self, **kwargs):
            if failures[0]:
                failures[0] -= 1
                raise OSError("not now")
            return super().reset(**kwargs)

    env = run.RebuildingEnv(lambda: Reluctant(**options, seed=0))
    with pytest.raises(run.BrokenEnv, match="OSError: not now"):
        env.reset()
    failures[0] = 1
    assert "OSError: not now" in env.reset()[1]["env_error"]


class BreakingEnv(FakeEnv):
    """Has a seed whose environment can't be reset a third time, nor those that replace it."""

    resets = 0

    def __init__(self, *, seed, breaks, **options):
        super().__init__(seed=seed, **options)
        self.breaks = seed == breaks

    def reset(self, **kwargs):
        if self.breaks:
            type(self).resets += 1
            if type(self).resets > 2:
                raise OSError("gone")
        return super().reset(**kwargs)


@pytest.mark.parametrize(
    ("num_envs", "seed"), [(1, 0), (2, 0), (1, run.EVAL_SEED)], ids=["training", "in a worker", "evaluation"]
)
def test_an_env_that_breaks_for_good_ends_the_run_with_its_state_saved(num_envs, seed, tmp_path, capsys, monkeypatch):
    """A reset that fails twice: exit code 1, one line, and the same command continues."""
    monkeypatch.setattr(BreakingEnv, "resets", 0)
    flags = f"--num_envs {num_envs} --checkpoint_minutes 60 --steps {200 * num_envs} --prefill {20 * num_envs}"
    assert faults.train(tmp_path / "run", flags, functools.partial(BreakingEnv, breaks=seed)) == 1
    error = capsys.readouterr().err
    assert "a reset failed in a new environment too: OSError: gone" in error and error.count("\n") == 1
    assert newest(tmp_path / "run")["progress"]["step"] >= 20
    assert faults.train(tmp_path / "run", flags) == 0


def test_gradients_that_differ_from_the_cpus_stop_the_run(tmp_path, monkeypatch, capsys):
    """R31: a device that gets one parameter's gradient wrong is found before its first update; exit code 1."""
    gradients = training.Dreamer.gradients

    def wrong(self, batch, draws):
        found = gradients(self, batch, draws)
        if isinstance(draws, training.RecordedDraws):
            return found  # the reference
        name = next(iter(found))
        return found | {name: found[name] * 1.01}

    started = run.Run.__init__

    def as_on_mps(self, *args):
        started(self, *args)
        self.gradients_checked = False

    monkeypatch.setattr(run.Run, "__init__", as_on_mps)
    assert faults.train(tmp_path / "right", "--steps 60") == 0
    monkeypatch.setattr(training.Dreamer, "gradients", wrong)
    assert faults.train(tmp_path / "wrong", "--steps 60") == 1
    error = capsys.readouterr().err
    assert "wrong gradients (world_model." in error and "--device cpu" in error and error.count("\n") == 1


def test_comparing_gradients_changes_nothing():
    """R31: equal devices deviate by nothing; weights, return range and global draws stay."""
    config = tiny_config(return_norm=True, decode_fraction=0.5)
    agent = tiny_dreamer(config)
    before, draws = checkpoint.snapshot(agent.state_dict()), torch.get_rng_state()
    deviation, _ = training.compare_with_cpu(agent, random_batch(config))
    assert deviation == 0.0
    assert difference(checkpoint.snapshot(agent.state_dict()), before) == ""
    assert torch.equal(torch.get_rng_state(), draws)


def test_a_deviation_is_relative_to_the_gradient_and_found_with_its_name():
    """R31: one per mille is the limit; rounding in gradients that cancel is none; a NaN is."""
    reference = {"a": torch.full((4,), 2.0), "b": torch.full((4,), 1e-9)}
    same = training.gradient_deviation({"a": torch.full((4,), 2.001), "b": torch.full((4,), 1.1e-9)}, reference)
    assert same == (pytest.approx(5e-4, rel=0.01), "a")
    off = training.gradient_deviation(reference | {"b": torch.full((4,), 0.1)}, reference)
    assert off[0] > 1 and off[1] == "b"
    assert training.gradient_deviation(reference | {"a": torch.full((4,), float("nan"))}, reference)[0] == float("inf")


# ------------------------------------------------------------------------------------------ processes


def test_two_processes_cannot_share_a_run_folder(tmp_path):
    """R26: the second one exits with one line that names the first; nothing is changed."""
    first = Fork(lambda: faults.train(tmp_path / "run", "--steps 100000"))
    while not list(tmp_path.glob("run/checkpoint_*.pt")):
        assert first.running()
        time.sleep(0.05)
    code, output = Fork(lambda: faults.train(tmp_path / "run")).finish(60)
    assert code == 1 and f"in use by process {first.pid}" in output and output.count("\n") == 1
    os.kill(first.pid, signal.SIGKILL)
    first.finish(10)
    assert Fork(lambda: faults.train(tmp_path / "run")).finish(60)[0] == 0


TWO_WORKERS = "--num_envs 2 --prefill 40 --steps 100000 --checkpoint_minutes 60 --eval_every 1000000"
needs_proc = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")


def with_two_workers(run_dir: Path, make_env=FakeEnv, episodes: int = 4) -> tuple[Fork, set[int]]:
    """A run with two workers that has finished some episodes, and the processes below it."""

    def work():
        os.setpgid(0, 0)
        return faults.train(run_dir, TWO_WORKERS, make_env)

    process = Fork(work)
    while len(list(run_dir.glob("replay/*.npz"))) < episodes:
        if not process.running():
            pytest.fail(process.finish(1)[1])
        time.sleep(0.05)
    below = descendants(process.pid)
    assert len(below) >= 2
    return process, below


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def assert_gone(pids: set[int], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while any(map(alive, pids)):
        assert time.monotonic() < deadline
        time.sleep(0.05)


@needs_proc
def test_no_worker_outlives_a_killed_run_and_none_keeps_the_lock(tmp_path):
    """kill -9 of a run, one of whose two workers hangs: the lock is free at once, and 10 s later all are gone."""
    process, below = with_two_workers(tmp_path / "run", faults.HangingEnv)
    time.sleep(0.5)  # into the third episode, where it hangs
    os.kill(process.pid, signal.SIGKILL)
    assert process.finish(10)[0] == -signal.SIGKILL
    lock = checkpoint.RunLock(tmp_path / "run")
    lock.acquire()
    lock.release()
    assert_gone(below, 10)


@needs_proc
def test_a_signal_to_the_whole_process_group_saves_too(tmp_path):
    """R6: as schedulers and `timeout` send it: the workers die of it, and the run still saves; exit code 143."""
    process, below = with_two_workers(tmp_path / "run")
    os.killpg(process.pid, signal.SIGTERM)
    code, output = process.finish(10)
    assert code == 143, output
    assert newest(tmp_path / "run")["progress"]["episode"] >= 2  # of four, the last two may have been ending just then
    assert_gone(below, 10)


@needs_proc
@pytest.mark.parametrize("which", [min, max], ids=["first", "last"])
def test_a_worker_that_is_killed_ends_the_run_with_its_state_saved(which, tmp_path):
    """As where memory runs out: exit code 1, one line, and nothing is left behind."""
    process, below = with_two_workers(tmp_path / "run")
    worker = which(pid for pid in below if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes())
    os.kill(worker, signal.SIGKILL)
    code, output = process.finish(20)
    assert code == 1 and output.count("error: ") == 1 and "exit codes: [" in output and "-9" in output, output
    assert "Traceback" not in output
    assert newest(tmp_path / "run")["progress"]["episode"] >= 2
    assert_gone(below, 10)


# ------------------------------------------------------------------------------------------ long ones


@pytest.mark.slow
def test_50_kills_of_a_real_program_change_nothing(tmp_path):
    """R4: `run.py` on RoboSuite with rendering, killed 50 times, ends with the straight run's state."""
    kills = int(os.environ.get("KILLS", "50"))
    program = [sys.executable, str(ROOT / "run.py"), "--preset", "debug", "--wandb", "disabled", "--steps", "360"]
    environ = {**os.environ, "OMP_NUM_THREADS": "1"}

    def start(run_dir: Path) -> subprocess.Popen:
        return subprocess.Popen(
            [*program, "--run_dir", str(run_dir)], env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )

    begin = time.monotonic()
    straight = start(tmp_path / "straight")
    assert straight.communicate()[0] is not None and straight.returncode == 0
    seconds, moments, killed = time.monotonic() - begin, random.Random(0), 0
    for number in range(100 * kills):
        run_dir = tmp_path / f"run{number}"
        for _ in range(5):  # each run is killed five times at most, so that all phases of a run are met
            process = start(run_dir)
            try:
                process.wait(moments.uniform(0.1, 1.0) * seconds)
                break
            except subprocess.TimeoutExpired:
                process.kill()
                process.communicate()
                killed += 1
        process = start(run_dir)
        output = process.communicate()[0]
        assert process.returncode == 0, output.decode()
        assert difference(fingerprint(run_dir), fingerprint(tmp_path / "straight")) == ""
        if killed >= kills:
            break
    print(f"\n{killed} kills, {number + 1} runs, all ended in the straight run's state")
    assert killed >= kills


@pytest.mark.slow
def test_200_kills_on_the_fake_env_change_nothing(straight, tmp_path):
    """R4: the same with tiny networks, where kills fall into saves more often."""
    killed, number = 0, 0
    while killed < 200:
        number += 1
        killed += kill_at_random(tmp_path / f"run{number}", 8, seed=number)
        assert difference(fingerprint(tmp_path / f"run{number}"), straight["end"]) == ""
    print(f"\n{killed} kills, {number} runs")


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_does_not_grow_with_steps(tmp_path):
    """R21: 50,000 steps and 5,000 updates after the replay is full: less than 1 MB per 10,000 steps."""
    sizes = []

    class Watched(FakeEnv):
        def __init__(self, *, seed, **options):
            super().__init__(seed=seed, **options)
            self.training, self.total = seed == 0, 0

        def step(self, action):
            self.total += self.training
            if self.training and self.total % 1000 == 0:
                pages = int(Path("/proc/self/statm").read_text().split()[1])
                sizes.append(pages * resource.getpagesize() / 2**20)
            return super().step(action)

    flags = "--steps 50000 --train_every 10 --capacity 500 --eval_every 5000 --log_every 1000 --checkpoint_minutes 0.1"
    assert faults.train(tmp_path / "run", flags, Watched) == 0
    assert newest(tmp_path / "run")["agent"]["updates"] >= 4990
    settled = sizes[10:]
    slope = np.polyfit(np.arange(len(settled)) * 1000, settled, 1)[0] * 10_000
    print(f"\n{slope:.3f} MB per 10,000 steps; {settled[0]:.0f} -> {settled[-1]:.0f} MB")
    assert slope < 1.0


@pytest.mark.slow
def test_secrets_of_the_environment_reach_no_file_and_no_line(tmp_path):
    """R13: an API key and other variables are neither in the run folder, W&B's files included, nor in the output."""
    secrets = {"WANDB_API_KEY": "f" * 8 + "0123456789abcdef" * 2, "AWS_SECRET_ACCESS_KEY": "hunter2hunter2hunter2"}
    flags = [*TINY.split(), "--wandb", "offline", "--run_dir", str(tmp_path / "run")]
    code = f"import sys, run; from fake_env import FakeEnv; sys.exit(run.main({flags!r}, FakeEnv))"
    environ = {**os.environ, **secrets, "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "tests")))}
    done = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr.decode()
    found = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert found and any("wandb" in path.parts for path in found)
    for secret in secrets.values():
        assert secret.encode() not in done.stdout + done.stderr
        assert not [path for path in found if secret.encode() in path.read_bytes()]


@pytest.mark.slow
@pytest.mark.parametrize("how", ["offline", "unreachable", "no key", "killed"])
def test_a_run_does_not_need_wandb(how, tmp_path):
    """R14: whatever becomes of W&B: exit code 0, no prompt, metrics complete."""
    environ = {k: v for k, v in os.environ.items() if not k.startswith("WANDB")}
    environ |= {"PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "tests"))), "HOME": str(tmp_path)}
    mode = {"offline": "offline", "killed": "offline", "unreachable": "online", "no key": "auto"}[how]
    if how == "unreachable":
        environ |= {"WANDB_API_KEY": "0" * 40, "WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_INIT_TIMEOUT": "5"}
    flags = [*TINY.split(), "--steps", "400", "--wandb", mode, "--run_dir", str(tmp_path / "run")]
    code = f"import sys, run; from fake_env import FakeEnv; sys.exit(run.main({flags!r}, FakeEnv))"
    process = subprocess.Popen(
        [sys.executable, "-c", code], env=environ, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )  # fmt: skip
    if how == "killed":
        while not list(tmp_path.glob("run/checkpoint_*.pt")):
            assert process.poll() is None, process.communicate()[0].decode()
            time.sleep(0.05)
        for child in descendants(process.pid):
            if b"wandb" in Path(f"/proc/{child}/cmdline").read_bytes():
                os.kill(child, signal.SIGKILL)
    output, _ = process.communicate(timeout=900)
    assert process.returncode == 0, output.decode()
    assert [line["env_step"] for line in metrics(tmp_path / "run") if "episode/return" in line] == [
        *range(EPISODE, 401, EPISODE)
    ]


@pytest.mark.slow
def test_a_small_full_disk_is_survived(tmp_path):
    """R7 with ENOSPC, on a tmpfs of 8 MB, where mounting one is allowed."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("may not mount a tmpfs")
    try:

        class Filling(NoisyEnv):
            def reset(self, **kwargs):
                filler = disk / "filler"
                if filler.exists():
                    filler.unlink()
                self.episode = getattr(self, "episode", -1) + 1
                return super().reset(**kwargs)

            def step(self, action):
                if self.steps == 10 and self.episode == 4:
                    with open(disk / "filler", "wb", buffering=0) as file:
                        try:
                            while True:
                                file.write(b"x" * 4096)
                        except OSError:
                            pass
                return super().step(action)

        code, output = Fork(lambda: faults.train(disk / "run", "--eval_every 1000 --capacity 33", Filling)).finish(120)
        assert code == 0, output
        assert output.count("No space left") == 1 and output.count("saved again") == 1, output
        assert newest(disk / "run")["progress"]["step"] == 160
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.slow
def test_resume_is_exact_on_robosuite(tmp_path):
    """R1: every checkpoint of a debug run with rendering, each in a fresh process."""
    program = [sys.executable, str(ROOT / "run.py"), "--preset", "debug", "--wandb", "disabled"]
    environ = {**os.environ, "OMP_NUM_THREADS": "1"}

    def finish(run_dir: Path, *flags: str) -> None:
        done = subprocess.run(
            [*program, *flags, "--run_dir", str(run_dir)], env=environ, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr

    finish(tmp_path / "straight")
    for steps in (60, 90, 120, 150):
        finish(tmp_path / str(steps), "--steps", str(steps))
        state, path, _ = checkpoint.load_checkpoint(tmp_path / str(steps))
        before = checkpoint.list_checkpoints(tmp_path / str(steps))[1]  # of the episode before: no last step in it
        path.unlink()
        assert checkpoint._step(before) < steps
        finish(tmp_path / str(steps))
        assert difference(fingerprint(tmp_path / str(steps)), fingerprint(tmp_path / "straight")) == ""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_workers_memory_does_not_grow_with_resets():
    """Two workers with real RoboSuite: 200 resets and a few rendered steps after each add less than 50 MB to either."""
    config = training.Config(**training.PRESETS["cpu"], num_envs=2)
    envs = run.make_envs(config, run.make_robosuite_env)
    try:
        sizes = []
        for number in range(220):
            envs.reset(options={"reset_mask": np.ones(2, bool)})
            for _ in range(3):
                envs.step(np.stack([envs.single_action_space.sample() for _ in range(2)]))
            if number in (19, 219):  # after caches are warm, and at the end
                pages = [int(Path(f"/proc/{p.pid}/statm").read_text().split()[1]) for p in envs.processes]
                sizes.append(np.array(pages) * resource.getpagesize() / 2**20)
    finally:
        run.close_vector_env(envs, terminate=False)
    print(f"\n{sizes[0].round()} -> {sizes[1].round()} MB")
    assert (sizes[1] - sizes[0] < 50).all()
