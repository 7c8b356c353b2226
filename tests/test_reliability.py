"""Never lose a run: interrupted, damaged and starved runs end where undisturbed ones do (cases in tests/README.md)."""

import copy
import errno
import itertools
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv

import faults
import run
import train as training
from env import make_env as make_robosuite_env
from fake_env import FakeEnv
from faults import (
    TINY,
    Fork,
    NoisyEnv,
    copies_at_each_checkpoint,
    descendants,
    difference,
    fingerprint,
    flip_bit,
    metrics,
    newest,
)
from faulty_env import (
    RESET_FAULTS,
    STEP_FAULTS,
    FailingReset,
    FaultyEnv,
    GlobalDraws,
    NanCorner,
    Plan,
    UnevenInfo,
    faulty,
)
from runtime import checkpoint, cli, collect, device, envs, evaluate
from runtime.checkpoint import RunFolder, non_finite
from runtime.console import StopSignals
from runtime.envs import RebuildingEnv, own_seed
from tiny import descend, random_batch, tiny_config, tiny_dreamer

ROOT = Path(__file__).parent.parent
EPISODE = 20  # control steps


@pytest.fixture(scope="module", autouse=True)
def disturbed() -> Iterator[None]:
    """The runs of these tests are short, and explore by held commands from the first episode on."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(collect, "STALLED", 0)
        yield


@pytest.fixture(scope="module")
def straight(disturbed, tmp_path_factory) -> dict:
    """An undisturbed run: its fingerprint, and a copy of its folder at each of its checkpoints."""
    folder = tmp_path_factory.mktemp("straight")
    with pytest.MonkeyPatch.context() as patch:
        faults.without_videos(patch)
        copies = copies_at_each_checkpoint(patch, folder)
        assert faults.train(folder / "run", make_env=NoisyEnv) == 0
    return {"end": fingerprint(folder / "run"), "copies": copies, "run": folder / "run"}


def slow(*cases: tuple) -> list:
    """Cases that repeat what others show in another combination."""
    return [pytest.param(*case, marks=pytest.mark.slow) for case in cases]


def scratch(path: Path, to: Path) -> Path:
    """A copy of a run folder to be spoilt."""
    return Path(shutil.copytree(path, to))


def without_workers(patch: pytest.MonkeyPatch) -> None:
    """Several environments live in this process too."""

    def in_process(builders, apart=False) -> SyncVectorEnv:
        makers = [lambda build=build: RebuildingEnv(build) for build in builders]
        return SyncVectorEnv(makers, autoreset_mode=AutoresetMode.DISABLED)

    patch.setattr(envs, "make_vector_env", in_process)


# ------------------------------------------------------------------------------------------ exact resume


def test_a_run_resumed_at_any_checkpoint_ends_bit_for_bit_where_the_straight_run_does(straight, tmp_path):
    """R1: weights, moments, generators, replay (by the hash of its rows), counters and metrics, at each of them."""
    state = straight["end"]["state"]
    assert state["collector"]["episode"] == 8 and state["agent"]["updates"] >= 40
    assert len(state["replay"]["index"]) < 8 and len(straight["copies"]) == 8
    for copied in straight["copies"][:-1]:
        folder = scratch(copied, tmp_path / copied.name)
        assert faults.train(folder, make_env=NoisyEnv) == 0
        assert difference(fingerprint(folder), straight["end"]) == "", folder.name


def test_a_run_of_several_envs_resumes_exactly_where_all_episodes_ended(tmp_path):
    """Episodes of one length end together, and nothing is lost then. (In this process: workers change nothing.)"""

    flags = "--num_envs 3 --prefill 60 --capacity 160 --steps 360"
    with pytest.MonkeyPatch.context() as patch:
        without_workers(patch)
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
    """The same modules with other values: what an agent begins with instead of what it has learned."""
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


# checkpoints: in training, between two lines of metrics; in the prefill; after the best evaluation
LATE, EARLY, AFTER_BEST = 3, 0, 6
DROPPED = [
    drop("agent.world_model", fresh),
    drop("agent.behavior", fresh),
    drop("agent.behavior", no_target),
    drop("agent.averaged", fresh),
    drop("agent.model_optimizer", no_moments),
    drop("agent.model_optimizer.steps", 0),
    drop("agent.actor_optimizer", no_moments),
    drop("agent.value_optimizer", no_moments),
    drop("agent.updates", 0),
    drop("collector.step", 0),
    drop("collector.episode", 100),  # 0 would give two episodes one number, which no run does
    drop("collector.envs", lambda _: [another({})]),
    drop("collector.acting", lambda old: old | {"draws": torch.Generator().manual_seed(99).get_state()}),
    drop("ratio.owed", 0.0),
    drop("ratio.pretrained", False),
    drop("meter.totals", {}),
    drop("meter.updates", 0),
    drop("meter.logged", 0),
    drop("evaluator.evaluated", 0),
    drop("logger.size", 0),
    drop("replay.index", []),
    drop("replay.next", 0),
    drop("replay.rng", another),
    drop("generators.torch", lambda _: torch.Generator().manual_seed(99).get_state()),
    drop("generators.python", lambda _: random.Random(99).getstate()),
    drop("generators.numpy", lambda old: old | {"state": old["state"] | {"pos": (old["state"]["pos"] + 7) % 600}}),
]


OTHERS_NEEDED = {  # not by this run: tests that follow, and those of the parts, need them
    "collector.successes",
    "collector.progress",
    "collector.restarts",
    "collector.action_space",
    "evaluator.filmed",
    "evaluator.largest",
    "evaluator.best",
    "evaluator.best_step",
    "evaluator.best_success",
    "evaluator.incomplete",
    "evaluator.unwritten",
    "evaluator.kind",
    "generators.cuda",
    "generators.mps",
    "logger.wandb_id",
    "logger.wandb_step",
    "replay.rings",
}


def test_every_saved_item_is_named_here(straight):
    """R2: whoever adds one has to say which test needs it."""
    state = newest(straight["run"])
    parts = set(state) - {"step", "best_step", "config", "versions"}
    items = {f"{part}.{name}" for part in parts for name in state[part]}
    assert items == {".".join(change.id.split(".")[:2]) for change in DROPPED} | OTHERS_NEEDED


def resumes_otherwise(straight: dict, at: int, change, folder: Path) -> bool:
    """Whether the run, continued from a checkpoint that was changed, ends elsewhere, or not at all."""
    scratch(straight["copies"][at], folder)
    state, path = checkpoint.load_checkpoint(folder)
    change(state)
    path.unlink()
    checkpoint.save_checkpoint(folder, 20 * (at + 1), state)
    code = faults.train(folder, make_env=NoisyEnv)
    return code != 0 or difference(fingerprint(folder), straight["end"]) != ""


@pytest.mark.parametrize("change", DROPPED)
def test_each_saved_item_is_needed_for_an_exact_resume(change, straight, tmp_path):
    """R2, negative controls: without any one of the saved items, the comparison of R1 fails."""
    assert resumes_otherwise(straight, LATE, change, tmp_path / "run")


@pytest.mark.parametrize("change", [drop("evaluator.best", float("-inf")), drop("evaluator.best_step", -1)])
def test_the_best_evaluation_is_needed_after_it(change, straight, tmp_path):
    """R2: the last evaluation of this run is not its best."""
    assert straight["end"]["state"]["best_step"] == 120
    assert resumes_otherwise(straight, AFTER_BEST, change, tmp_path / "run")


def test_a_resumed_run_films_no_more_often(tmp_path, monkeypatch):
    """R2: when it was filmed last is needed too."""
    films = []
    monkeypatch.setattr(run.Logger, "video", lambda logger, step, *_: films.append(step))
    flags = "--eval_every 20 --steps 100"
    assert faults.train(tmp_path / "run", flags, NoisyEnv) == 0
    assert films == [40] * 3 + [100] * 3
    assert faults.train(tmp_path / "run", f"{flags} --steps 160", NoisyEnv) == 0
    assert films == [40] * 3 + [100] * 3 + [160] * 3


def test_the_action_space_is_needed_in_the_prefill(straight, tmp_path):
    """R2: the generator of random actions decides only as long as actions are random."""

    def change(state):
        state["collector"]["action_space"] = another({})

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
    """Arrange for a signal in the fourth episode or thereabouts: in an update, a step, an evaluation, a save, ..."""
    if place == "update":
        send = send_once(number, lambda agent, _: agent.updates == 17)
        step = training.Dreamer.train_step
        patch.setattr(training.Dreamer, "train_step", lambda self, batch: (send(self, batch), step(self, batch))[1])
    elif place in ("episode", "evaluation"):
        seed = evaluate.EVAL_SEED if place == "evaluation" else 0
        send = send_once(number, lambda env: env.seed == seed and env.total_steps == (67 if seed == 0 else 7))
        patch.setattr(CountingEnv, "hook", staticmethod(send))
    elif place == "analysis":
        send, analyze = send_once(number), evaluate.analyze
        patch.setattr(evaluate, "analyze", lambda *args: (send(), analyze(*args))[1])
    elif place == "video":
        send = send_once(number)
        patch.setattr(run.Logger, "video", lambda *args: send())
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


PLACES = ("update", "episode", "evaluation", "analysis", "video", "save")
OTHERS = (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU)
STOPS = [
    *((place, signal.SIGTERM) for place in PLACES),
    *(("update", number) for number in OTHERS),
    *slow(*itertools.product(("episode", "evaluation", "save"), (signal.SIGINT,))),
    *slow(*itertools.product(("analysis", "video"), (signal.SIGUSR1,))),
]


@pytest.mark.parametrize(("place", "number"), STOPS, ids=lambda x: getattr(x, "name", x))
def test_a_signal_saves_the_last_episodes_end_and_the_resumed_run_is_exact(place, number, straight, tmp_path, capsys):
    """R6: exit code 128 + its number within 10 s of processor time, wherever it arrives, though saves are rare."""
    run_dir, minutes = tmp_path / "run", 0 if place == "save" else 60
    started = []
    handle = StopSignals._handle

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StopSignals, "_handle", lambda *a: (started.append(time.process_time()), handle(*a))[1])
        stop_in(place, number, patch)
        assert faults.train(run_dir, f"--checkpoint_minutes {minutes}", CountingEnv) == 128 + number
        assert time.process_time() - started[0] < 10
    step = newest(run_dir)["step"]
    out = capsys.readouterr().out
    assert f"stopped by {signal.Signals(number).name}" in out and f"from step {step}" in out
    assert step == {"update": 60, "episode": 60, "save": 80}.get(place, 40)
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
            time.sleep(StopSignals.ECHO + 0.1)
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
    assert newest(tmp_path / "run")["step"] == 40


def test_xcpu_may_come_again_and_again(tmp_path):
    """The kernel sends it after each further second of processor time: none of them is a wish to end at once."""

    def work():
        save = checkpoint.save_checkpoint

        def slow(*args):
            end = time.process_time() + 2.5
            while time.process_time() < end:
                pass
            return save(*args)

        def limit_time(env):
            if env.total_steps == 25:  # the first episode has ended
                limit = int(time.process_time()) + 2
                resource.setrlimit(resource.RLIMIT_CPU, (limit, limit + 60))

        checkpoint.save_checkpoint, CountingEnv.hook = slow, staticmethod(limit_time)
        flags = "--steps 100000 --checkpoint_minutes 60 --eval_every 1000000"
        return faults.train(tmp_path / "run", flags, CountingEnv)

    code, output = Fork(work).finish(120)
    assert code == 128 + signal.SIGXCPU and "stopped by SIGXCPU" in output, output
    assert newest(tmp_path / "run")["step"] >= 20


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGUSR1], ids=lambda x: x.name)
def test_a_signal_that_is_ignored_stays_ignored(number, tmp_path, monkeypatch):
    """As HUP under nohup, also while the run itself handles the others."""
    monkeypatch.setattr(CountingEnv, "hook", staticmethod(send_once(number, lambda env: env.total_steps == 45)))

    def work():
        signal.signal(number, signal.SIG_IGN)
        code = faults.train(tmp_path / "run", "--steps 80", CountingEnv)
        assert signal.getsignal(number) is signal.SIG_IGN
        return code

    code, output = Fork(work).finish(60)
    assert code == 0, output
    assert newest(tmp_path / "run")["step"] == 80


def test_handlers_are_put_back(tmp_path):
    """A script that calls `main` has its own handlers again after it."""
    before = {number: signal.getsignal(number) for number in StopSignals.NUMBERS}
    assert faults.train(tmp_path / "run", "--steps 60") == 0
    assert before == {number: signal.getsignal(number) for number in StopSignals.NUMBERS}
    assert all(before[number] == signal.SIG_DFL for number in StopSignals.NUMBERS if number != signal.SIGINT)


def test_a_signal_before_any_episodes_end_saves_the_beginning(straight, tmp_path, capsys):
    """The run that goes on from there is the straight one, bit for bit."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CountingEnv, "hook", staticmethod(send_once(signal.SIGTERM, lambda env: env.total_steps == 5)))
        assert faults.train(tmp_path / "run", "--checkpoint_minutes 0", CountingEnv) == 143
    assert "the same command continues from step 0" in capsys.readouterr().out
    assert faults.train(tmp_path / "run", "--checkpoint_minutes 0", NoisyEnv) == 0
    assert difference(fingerprint(tmp_path / "run"), straight["end"]) == ""


def hang_at(step: int, number: int):
    """A hook that hangs in this step, and gets a signal meanwhile."""

    def hook(env):
        if env.total_steps == step:
            threading.Timer(0.2, os.kill, (os.getpid(), number)).start()
            time.sleep(1000)

    return staticmethod(hook)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGXCPU], ids=lambda x: x.name)
def test_a_run_whose_environment_hangs_is_saved_too(number, tmp_path, monkeypatch):
    """After a patience of seconds, with the code and the line of the first signal."""
    monkeypatch.setattr(StopSignals, "PATIENCE", 1.5)
    monkeypatch.setattr(CountingEnv, "hook", hang_at(45, number))
    code, output = Fork(lambda: faults.train(tmp_path / "run", "--checkpoint_minutes 60", CountingEnv)).finish(60)
    assert code == 128 + number, output
    assert f"stopped by {number.name}; the same command continues from step 40" in output
    assert newest(tmp_path / "run")["step"] == 40


def test_it_is_saved_although_sigterm_does_nothing(tmp_path, monkeypatch):
    """A job script with `trap '' TERM`, an environment with such a handler: the patience ends by another signal."""
    monkeypatch.setattr(StopSignals, "PATIENCE", 1.5)
    monkeypatch.setattr(CountingEnv, "hook", hang_at(45, signal.SIGUSR1))

    class Deaf(CountingEnv):
        def step(self, action):
            signal.signal(signal.SIGTERM, lambda *_: None)
            return super().step(action)

    def work():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        return faults.train(tmp_path / "run", "--checkpoint_minutes 60", Deaf)

    code, output = Fork(work).finish(60)
    assert code == 128 + signal.SIGUSR1 and "continues from step 40" in output, output
    assert newest(tmp_path / "run")["step"] == 40


def test_an_environment_may_install_handlers_of_its_own(tmp_path, monkeypatch):
    """A signal saves all the same."""

    def hook(env):
        if env.total_steps == 30:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if env.total_steps == 45:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(CountingEnv, "hook", staticmethod(hook))
    code, output = Fork(lambda: faults.train(tmp_path / "run", "--checkpoint_minutes 60", CountingEnv)).finish(60)
    assert code == 143 and newest(tmp_path / "run")["step"] == 40, output


def test_an_environment_may_change_the_working_directory(tmp_path, monkeypatch):
    """A relative run folder stays where it was."""

    class Wanderer(FakeEnv):
        def __init__(self, **options):
            super().__init__(**options)
            os.chdir("/")

    for steps in (60, 100):
        monkeypatch.chdir(tmp_path)
        assert faults.train(Path("run"), f"--steps {steps}", Wanderer) == 0
        assert newest(tmp_path / "run")["step"] == steps


@pytest.mark.parametrize("kind", [np.random.MT19937, np.random.SFC64, *slow((np.random.Philox,))])
def test_an_environment_may_draw_from_another_kind_of_generator(kind, tmp_path):
    """Its run resumes exactly, and draws anew after an end through faults."""

    class Drawn(NoisyEnv):
        def __init__(self, *, seed, **options):
            super().__init__(seed=seed, **options)
            self.np_random = np.random.Generator(kind(seed))

    assert faults.train(tmp_path / "straight", "--checkpoint_minutes 0", Drawn) == 0
    for steps in (60, 160):
        assert faults.train(tmp_path / "run", f"--checkpoint_minutes 0 --steps {steps}", Drawn) == 0
    both = (newest(tmp_path / name)["collector"]["envs"] for name in ("run", "straight"))
    assert difference(*both) == ""
    state = newest(tmp_path / "run")["collector"]["envs"][0]
    again = [collect._generator(state, restarts).random(3).tolist() for restarts in (0, 1, 2)]
    assert again[0] != again[1] != again[2] != again[0]


# ------------------------------------------------------------------------------------------ crashes


def kill_at_random(run_dir: Path, kills: int, seed: int, make_env=NoisyEnv) -> int:
    """Start the run again and again and kill -9 it at random moments, then let it end; the times that it had saved."""
    moments, killed = random.Random(seed), 0
    for _ in range(4 * kills):
        if killed == kills:
            break
        process = Fork(lambda: faults.train(run_dir, make_env=make_env))
        time.sleep(moments.uniform(0.0, 1.5))
        if not process.running():
            process.finish(1)
            break
        os.kill(process.pid, signal.SIGKILL)
        process.finish(10)
        killed += bool(checkpoint.list_checkpoints(run_dir))  # before the first one, nothing can go wrong
    code, output = Fork(lambda: faults.train(run_dir, make_env=make_env)).finish(300)
    assert code == 0, output
    return killed


def test_kill_9_at_random_moments_changes_nothing(straight, tmp_path):
    """R4: killed after a checkpoint, once or more, the run still ends where the straight one does."""
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
    index = newest(folder)["replay"]["index"]
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
    assert len(newest(run_dir)["replay"]["index"]) == 3


def test_checkpoint_minutes_decide_when_and_the_best_is_kept(tmp_path):
    """Between two dates only a new best evaluation is saved; its checkpoint stays beside the last two."""
    assert faults.train(tmp_path / "run", "--checkpoint_minutes 60 --eval_every 20 --steps 200") == 0
    best = newest(tmp_path / "run")["best_step"]
    steps = [checkpoint._number(path.name) for path in checkpoint.list_checkpoints(tmp_path / "run")]
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
                found = checkpoint.load_checkpoint(run_dir)
                print("on disk:", found and found[0]["step"])

        checkpoint.save_checkpoint = spy
        return faults.train(tmp_path / "run", flags, StarvingEnv)

    code, output = Fork(work).finish(120)
    assert code == 0, output
    assert output.count("warning: metrics.jsonl can't be written") == 1  # its lines wait in memory
    output = re.sub("warning: metrics.jsonl.*\n", "", output)
    events = [line for line in output.splitlines() if re.match("warning|on disk|step .* saved", line)]
    assert [re.sub(r"warning: .* can't be written to, training goes on: .*", "warning", x) for x in events] == [
        *("warning", "on disk: None", "on disk: 40", "step 40: saved again"),
        *("warning", "on disk: 80", "step 80: saved again"),
        *("on disk: 80", "warning", "on disk: 120", "step 120: saved again"),
        *("on disk: 120", "warning", "on disk: 160", "step 160: saved again"),
    ]
    assert output.count("File too large") == 4
    assert difference(fingerprint(tmp_path / "run"), fingerprint(tmp_path / "straight")) == ""


# ------------------------------------------------------------------------------------------ poor file systems

FILE_SYSTEM = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdlib.h>
#include <sys/stat.h>

int flock(int fd, int operation) {
    const char *error = getenv("NO_FLOCK");
    if (error) { errno = atoi(error); return -1; }
    int (*real)(int, int) = dlsym(RTLD_NEXT, "flock");
    return real(fd, operation);
}

int fsync(int fd) {
    const char *error = getenv("NO_DIRSYNC");
    struct stat status;
    if (error && !fstat(fd, &status) && S_ISDIR(status.st_mode)) { errno = atoi(error); return -1; }
    int (*real)(int) = dlsym(RTLD_NEXT, "fsync");
    return real(fd);
}
"""


@pytest.mark.skipif(not sys.platform.startswith("linux") or not shutil.which("cc"), reason="needs Linux and cc")
def test_a_file_system_without_flock_and_folder_sync_costs_two_warnings(tmp_path):
    """As on Lustre without the option, and CIFS: they name what is missing, once, and the run ends well."""
    (tmp_path / "fs.c").write_text(FILE_SYSTEM)
    command = ["cc", "-shared", "-fPIC", "-o", str(tmp_path / "fs.so"), str(tmp_path / "fs.c"), "-ldl"]
    subprocess.run(command, check=True, capture_output=True)
    flags = [*TINY.split(), "--steps", "60", "--run_dir", str(tmp_path / "run")]
    code = f"import sys, run; from fake_env import FakeEnv; sys.exit(run.main({flags!r}, FakeEnv))"
    environ = os.environ | {"PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "tests")))}
    environ |= {"LD_PRELOAD": str(tmp_path / "fs.so"), "NO_FLOCK": str(errno.ENOSYS), "NO_DIRSYNC": str(errno.EINVAL)}
    done = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    warnings = [line for line in done.stdout.splitlines() if line.startswith("warning: ")]
    assert len(warnings) == 2 and "has no locks" in warnings[0] and "can't sync a folder" in warnings[1], warnings
    assert newest(tmp_path / "run")["step"] == 60


def test_a_lock_that_is_taken_is_no_lack_of_locks(tmp_path, capsys):
    """Where the file system has them, a second process is kept out, and no warning is printed."""
    holder = RunFolder(tmp_path)
    code, output = Fork(lambda: faults.train(tmp_path)).finish(60)
    assert code == 1 and f"in use by process {os.getpid()}" in output and "has no locks" not in output, output
    holder.release()


# ------------------------------------------------------------------------------------------ guards


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
    assert state["step"] == 160 and state["agent"]["model_optimizer"]["skipped"] == 1
    assert all(value.isfinite().all() for value in state["agent"]["world_model"].values())


def test_ten_nans_in_a_row_stop_the_run_and_the_good_checkpoint_stays(tmp_path, monkeypatch, capsys):
    """R16: exit code 1, one line that names the part, and nothing saved after the first of them."""
    poison(monkeypatch, range(20, 1000))
    assert faults.train(tmp_path / "run") == 1
    error = capsys.readouterr().err
    assert "the gradient of the world model" in error and "10 updates" in error and error.count("\n") == 1
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
        assert int(optimizer.skipped_in_a_row) == expected
    assert not non_finite(agent)


def test_a_moment_that_is_not_finite_has_a_name():
    """The first one in the order of the parameters."""
    agent = tiny_dreamer(tiny_config())
    agent.train_step(random_batch(agent.config))
    assert not non_finite(agent)
    for i in 3, 1:
        agent.value_optimizer.adam.state[agent.value_optimizer.params[i]]["exp_avg_sq"].fill_(float("inf"))
    assert non_finite(agent) == "value_optimizer.adam.state.1.exp_avg_sq"


def test_a_skipped_update_leaves_no_trace_in_the_return_range():
    """A NaN among the returns would otherwise be kept by their running range for ever."""
    agent = tiny_dreamer(tiny_config(return_norm=True))
    for returns in (torch.arange(100.0), torch.full((100,), float("nan"))):
        agent.behavior._return_scale(returns)
    assert float(agent.behavior.return_range) == pytest.approx(0.9, abs=0.02)


def options() -> dict:
    """The keywords of `make_env` in tiny runs, seed excepted."""
    return cli.env_options(cli.parse(TINY.split()).config)


def rebuilding(make_env, seed: int = 0) -> RebuildingEnv:
    return RebuildingEnv(lambda: make_env(**options(), seed=seed))


NO_ACTION = np.zeros(4, np.float32)


@pytest.mark.parametrize("fault", STEP_FAULTS)
def test_a_fault_in_a_step_ends_the_episode_and_is_told(fault):
    """The last image once more, no reward, truncated, one line; the next episode is new, of a new environment."""
    make_env, plan = faulty(fault, steps={3})
    env = rebuilding(make_env)
    first, _ = env.reset()
    env.step(NO_ACTION)
    before, *_ = env.step(NO_ACTION)
    image, reward, terminated, truncated, info = env.step(NO_ACTION)
    assert np.array_equal(image, before) and (reward, terminated, truncated) == (0.0, False, True)
    assert set(info) == {"success", "env_error"} and info["success"] is False
    assert re.fullmatch(r"\w+: .*\(\w+\.py:\d+\)", info["env_error"]), info
    assert plan.built == 2
    second, info = env.reset()
    assert not np.array_equal(first, second) and "env_error" not in info
    image, reward, terminated, truncated, info = env.step(NO_ACTION)
    assert (terminated, truncated, info) == (False, False, {"success": info["success"]}) and np.isfinite(reward)


@pytest.mark.parametrize("fault", RESET_FAULTS)
@pytest.mark.parametrize("times", [1, 3])
def test_a_reset_that_fails_is_drawn_anew(fault, times):
    """Once or three times in a row, each time in a new environment; the line is told, and other draws are used."""
    expected, _ = rebuilding(FakeEnv).reset(seed=5)
    make_env, plan = faulty(fault, resets=set(range(2, 2 + times)))
    env = rebuilding(make_env)
    env.reset()
    image, info = env.reset(seed=5)
    assert plan.built == 1 + times and not np.array_equal(image, expected)
    assert "\n" not in info["env_error"] and re.search(r"\(\w+\.py:\d+\)$", info["env_error"]) and not info["success"]
    again, info = env.reset()
    assert info == {"success": False} and not np.array_equal(image, again)


@pytest.mark.parametrize("before_drawing", [False, True])
def test_a_reset_that_failed_is_never_tried_with_the_draws_that_failed(before_drawing):
    """Also if it fails before anything is drawn: the generator moves on all the same."""
    tried = []

    class Picky(FakeEnv):
        def reset(self, *, seed=None, options=None):
            if seed is not None:
                self.np_random = np.random.default_rng(seed)
            state = self.np_random.bit_generator.state["state"]["state"]
            if not before_drawing:
                super().reset()
            tried.append(state)
            if len(tried) < 5:
                raise OSError("not from here")
            return super().reset()

    env = rebuilding(Picky)
    assert "OSError: not from here" in env.reset(seed=7)[1]["env_error"]
    assert len(tried) == len(set(tried)) == 5


def test_a_run_survives_every_kind_of_fault(tmp_path, capsys):
    """R16, R17: another one in every third episode; exit code 0, one line each, no row made up, strict JSON."""
    kinds = len(STEP_FAULTS)
    make_env, plan = faulty(*STEP_FAULTS, steps={45 * (i + 1) for i in range(kinds)})
    flags = f"--steps {45 * kinds} --capacity 2000 --train_every 40 --checkpoint_minutes 60 --eval_every 100000"
    assert faults.train(tmp_path / "run", flags, make_env) == 0
    out = capsys.readouterr().out
    assert plan.done == kinds and out.count("environment 0 was rebuilt after a fault: ") == kinds
    state = newest(tmp_path / "run")
    assert [rows for _, _, rows in state["replay"]["index"]] == [21, 21, 5] * kinds  # 4 steps and a reset
    for name, _, _ in state["replay"]["index"]:
        columns = checkpoint._load_episode(tmp_path / "run" / "replay" / name)
        assert columns["reward"].dtype == np.float32 and np.abs(columns["reward"]).max() <= 2
    lengths = [line["episode/length"] for line in metrics(tmp_path / "run") if "episode/length" in line]
    assert lengths == [20, 20, 4] * kinds
    assert "NaN" not in (tmp_path / "run" / "metrics.jsonl").read_text()


def test_a_run_survives_resets_that_fail(tmp_path, capsys):
    """R17: each kind, once and three times in a row; no episode is lost for it."""
    kinds = len(RESET_FAULTS)
    make_env, _ = faulty(*RESET_FAULTS, resets={3 * i + 1 for i in range(kinds)} | {30, 31, 32})
    flags = "--steps 600 --capacity 2000 --train_every 40 --checkpoint_minutes 60 --eval_every 100000"
    assert faults.train(tmp_path / "run", flags, make_env) == 0
    assert capsys.readouterr().out.count("environment 0 was rebuilt after a fault: ") == kinds + 1
    assert [rows for _, _, rows in newest(tmp_path / "run")["replay"]["index"]] == [21] * 30


def test_workers_survive_every_kind_of_fault(tmp_path):
    """R17: two workers, both faulty, at different times; also an exception that can't be sent to another process."""
    make_env, _ = faulty(
        *STEP_FAULTS, steps={45 * (i + 1) for i in range(100)}, resets={7, 8, 9}, seeds=[0, own_seed(0, 1)]
    )
    flags = f"--num_envs 2 --steps {2 * 45 * len(STEP_FAULTS)} --capacity 4000 --prefill 40 --train_every 80"
    flags += " --checkpoint_minutes 60 --eval_every 100000 --save_replay false"
    code, output = Fork(lambda: faults.train(tmp_path / "run", flags, make_env)).finish(120)
    assert code == 0, output
    for i in (0, 1):
        assert output.count(f"environment {i} was rebuilt after a fault: ") >= len(STEP_FAULTS) - 1, output
    assert "Unprintable: contact at <lambda>" in output and "Traceback" not in output


@pytest.mark.parametrize("num_envs", [1, 2])
def test_an_info_may_hold_anything(num_envs, tmp_path):
    """Arrays of other lengths, other types under one name, a function: none of it is a fault, nor ends a worker."""
    flags = f"--num_envs {num_envs} --steps {80 * num_envs} --prefill {20 * num_envs} --capacity 400"
    code, output = Fork(lambda: faults.train(tmp_path / "run", flags, UnevenInfo)).finish(120)
    assert code == 0 and "warning: " not in output, output


@pytest.mark.parametrize("make_env", [NanCorner, FailingReset])
def test_faults_that_come_now_and_then_do_not_end_a_run(make_env, tmp_path, capsys):
    """Issue 19, 1: one start, or at most a second one, makes 3000 steps."""
    flags = "--steps 3000 --train_every 60 --capacity 4000 --checkpoint_minutes 60 --eval_every 1000 --episode_steps 30"
    codes = [faults.train(tmp_path / "run", flags, make_env)]
    if codes[0]:
        codes.append(faults.train(tmp_path / "run", flags, make_env))
    out = capsys.readouterr().out
    assert codes[-1] == 0 and newest(tmp_path / "run")["step"] == 3000
    assert out.count("was rebuilt after a fault") >= 3


def test_a_run_whose_resets_fail_resumes_exactly(tmp_path):
    """R1: draws after a fault are draws like others."""
    with pytest.MonkeyPatch.context() as patch:
        copies = copies_at_each_checkpoint(patch, tmp_path)
        assert faults.train(tmp_path / "run", "--steps 300 --seed 3", FailingReset) == 0
    for copied in (copies[4], copies[9]):
        assert faults.train(copied, "--steps 300 --seed 3", FailingReset) == 0
        assert difference(fingerprint(copied), fingerprint(tmp_path / "run")) == ""


def failing_episodes(numbers, steps: int = 3) -> dict:
    """A plan in which these episodes, counted from 0, end with an exception at their third step; others last 20."""
    count, fails = 0, set()
    for number in range(max(numbers) + 1):
        count += steps if number in numbers else EPISODE
        if number in numbers:
            fails.add(count)
    return {"steps": fails}


def test_a_fault_in_nine_of_twenty_episodes_does_not_end_a_run(tmp_path):
    """R17: and so it may go on for ever."""
    make_env, plan = faulty(**failing_episodes([i for i in range(60) if i % 20 in range(3, 12)]))
    flags = "--steps 726 --train_every 60 --capacity 2000 --checkpoint_minutes 60 --eval_every 100000"
    assert faults.train(tmp_path / "run", flags, make_env) == 0
    assert plan.done >= 26


def test_a_fault_in_ten_of_twenty_episodes_ends_the_run_and_the_next_start_draws_anew(tmp_path, capsys):
    """R17: exit code 1, a line with what and how often; the state counts a restart; then exact resumes hold again."""
    flags = "--checkpoint_minutes 60 --capacity 1000 --steps 400"
    make_env, _ = faulty(**failing_episodes([i for i in range(40) if i % 2]))
    assert faults.train(tmp_path / "run", flags, make_env) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "failed in 10 of the last 20 episodes" in error
    assert "RuntimeError: simulation unstable (faulty_env.py:" in error and "the same command" in error
    state = newest(tmp_path / "run")
    assert state["collector"]["restarts"] == 1 and state["collector"]["episode"] == 20
    assert state["step"] == 10 * EPISODE + 10 * 3
    same_draws = scratch(tmp_path / "run", tmp_path / "same")
    state["collector"]["restarts"] = 0
    checkpoint.list_checkpoints(same_draws)[0].unlink()
    checkpoint.save_checkpoint(same_draws, state["step"], state)

    with pytest.MonkeyPatch.context() as patch:
        copies = copies_at_each_checkpoint(patch, tmp_path)
        assert faults.train(tmp_path / "run", f"{flags} --checkpoint_minutes 0", NoisyEnv) == 0
    out = capsys.readouterr().out
    assert "warning: the run ended through a fault of its environments: their next episodes are drawn anew" in out
    assert newest(tmp_path / "run")["collector"]["restarts"] == 0
    first_new = next(line for line in metrics(tmp_path / "run") if line["env_step"] == 250 and "episode/return" in line)
    assert len(copies) == 9
    assert faults.train(copies[3], f"{flags} --checkpoint_minutes 0", NoisyEnv) == 0
    assert "drawn anew" not in capsys.readouterr().out
    end = fingerprint(tmp_path / "run")
    assert difference(fingerprint(copies[3]), end) == ""

    assert faults.train(same_draws, flags, NoisyEnv) == 0
    assert "drawn anew" not in capsys.readouterr().out
    other = next(line for line in metrics(same_draws) if line["env_step"] == 250 and "episode/return" in line)
    assert other["episode/return"] != first_new["episode/return"]


class Witness(FaultyEnv):
    """Notes the first draw of a start from each generator that an environment may use, and its first action."""

    seen: list = []

    def reset(self, **kwargs):
        draws = random.random(), np.random.rand(), float(torch.rand(())), self.np_random.random()
        self.note(dict(zip(("random", "np.random", "torch", "np_random"), draws, strict=True)))
        return super().reset(**kwargs)

    def step(self, action):
        self.note({"action": float(action[0])})
        return super().step(action)

    def note(self, draws: dict) -> None:
        if self.seen:
            type(self).seen[-1] = draws | self.seen[-1]


def test_no_generator_repeats_after_an_end_through_faults(tmp_path, monkeypatch):
    """Starts from one state, after no, one and two such ends, draw differently everywhere; here in the prefill."""
    flags = "--prefill 150 --capacity 1000 --checkpoint_minutes 60"
    plan = Plan(resets=range(3, 1000))
    monkeypatch.setattr(Witness, "seen", [])

    def start(folder: Path) -> int:
        Witness.seen.append({})
        return faults.train(folder, flags, lambda **given: Witness(plan=plan, **given))

    assert start(tmp_path / "run") == 1
    state = newest(tmp_path / "run")
    assert (state["step"], state["collector"]["restarts"]) == (40, 1)
    control = scratch(tmp_path / "run", tmp_path / "control")
    state["collector"]["restarts"] = 0
    checkpoint.list_checkpoints(control)[0].unlink()
    checkpoint.save_checkpoint(control, 40, state)
    assert start(tmp_path / "run") == 1  # breaks at its first reset
    assert newest(tmp_path / "run")["collector"]["restarts"] == 2
    plan.resets = ()
    assert start(tmp_path / "run") == start(control) == 0
    _, once, twice, never = Witness.seen
    for name in ("random", "np.random", "torch", "np_random"):
        assert len({once[name], twice[name], never[name]}) == 3, name
    assert twice["action"] != never["action"]


def test_faults_drawn_from_a_global_generator_do_not_repeat(tmp_path, monkeypatch):
    """A run that ended through such faults ends at another step next time, and ends well once they are fewer."""
    flags = "--steps 2000 --train_every 100 --checkpoint_minutes 60 --eval_every 100000"
    monkeypatch.setattr(GlobalDraws, "chance", 0.9)
    starts = []
    for _ in range(3):
        before = newest(tmp_path / "run")["collector"]["episode"] if starts else 0
        assert faults.train(tmp_path / "run", flags, GlobalDraws) == 1
        starts.append(newest(tmp_path / "run")["collector"]["episode"] - before)
    assert all(10 <= episodes <= 20 for episodes in starts)
    monkeypatch.setattr(GlobalDraws, "chance", 0.1)
    assert faults.train(tmp_path / "run", f"{flags} --steps 1200", GlobalDraws) == 0


@pytest.mark.parametrize("num_envs", [1, 2], ids=["here", "in workers"])
def test_an_env_that_breaks_for_good_ends_the_run_with_its_state_saved(num_envs, tmp_path):
    """Exit code 1, one line with what failed and how often; each start that fails counts; a mended one goes on."""
    flags = f"--num_envs {num_envs} --checkpoint_minutes 60 --steps {120 * num_envs} --prefill {20 * num_envs}"
    broken, _ = faulty(resets=range(3, 1000))
    code, output = Fork(lambda: faults.train(tmp_path / "run", flags, broken)).finish(120)
    errors = [line for line in output.splitlines() if line.startswith("error: ")]
    assert code == 1 and len(errors) == 1 and "Traceback" not in output, output
    assert "10 resets failed one after the other, the last with RuntimeError: Cannot place all objects" in errors[0]
    state = newest(tmp_path / "run")
    assert (state["step"], state["collector"]["restarts"]) == (2 * EPISODE * num_envs, 1)
    broken, _ = faulty(resets=range(1000))
    assert Fork(lambda: faults.train(tmp_path / "run", flags, broken)).finish(120)[0] == 1
    assert newest(tmp_path / "run")["collector"]["restarts"] == 2
    code, output = Fork(lambda: faults.train(tmp_path / "run", flags)).finish(120)
    assert code == 0 and "their next episodes are drawn anew" in output, output
    assert newest(tmp_path / "run")["collector"]["restarts"] == 0


def test_an_env_that_is_broken_from_the_start_leaves_a_folder_that_starts(tmp_path, capsys):
    """Exit code 1 and one line; the same command starts once the environment is mended."""
    assert faults.train(tmp_path / "run", "--steps 60", faulty(resets=range(1000))[0]) == 1
    error = capsys.readouterr().err
    assert "10 resets failed one after the other, the last with RuntimeError" in error and error.count("\n") == 1
    assert (newest(tmp_path / "run")["step"], newest(tmp_path / "run")["collector"]["restarts"]) == (0, 1)
    assert faults.train(tmp_path / "run", "--steps 60", faulty(resets=range(1000))[0]) == 1
    assert newest(tmp_path / "run")["collector"]["restarts"] == 2
    assert len(checkpoint.list_checkpoints(tmp_path / "run")) == 1
    assert faults.train(tmp_path / "run", "--steps 60") == 0
    assert "their next episodes are drawn anew" in capsys.readouterr().out


FRAMES = [None, 0.5, *(np.zeros(x, np.uint8) for x in ((64, 64), (0, 0, 3))), np.zeros((64, 64, 3))]
FRAMES += ["growing", "exit", "none"]


def test_an_env_that_can_not_close_is_let_go(tmp_path):
    """At the end of a run that has done its work."""

    class Clinging(FakeEnv):
        def close(self):
            raise RuntimeError("a window is open")

    assert faults.train(tmp_path / "run", "--steps 60", Clinging) == 0


@pytest.mark.parametrize("frame", FRAMES)
def test_a_frame_that_is_none_costs_the_video(frame, tmp_path, monkeypatch, capsys):
    """Whatever `render` returns, the evaluation counts; one line says why its episode is not filmed."""

    class BadFrames(FakeEnv):
        def render(self):
            if isinstance(frame, str):
                if frame == "none":
                    raise NotImplementedError
                return np.zeros((64 + 16 * self.steps, 64, 3), np.uint8) if frame == "growing" else sys.exit(3)
            return frame

    films = []
    monkeypatch.setattr(run.Logger, "video", lambda logger, step, name, *_: films.append(name))
    assert faults.train(tmp_path / "run", "--steps 60 --prefill 20", BadFrames) == 0
    out = capsys.readouterr().out
    assert out.count("warning: evaluations are not filmed: ") == 1
    assert ("this environment has no render()" in out) == (isinstance(frame, str) and frame == "none")
    assert films == ["openloop", "dream"]
    assert (tmp_path / "run" / "policy.pt").exists()


def test_an_evaluation_env_that_is_broken_makes_no_best_policy(tmp_path, capsys):
    """Training goes on to its end; the exit code is 1, also where the end is reached in another start."""
    flags = "--eval_every 60 --steps 120"
    broken, _ = faulty(steps=range(100_000), seeds=(evaluate.EVAL_SEED,))
    assert faults.train(tmp_path / "run", flags, broken) == 1
    out, error = capsys.readouterr()
    assert out.count("is incomplete, so its policy can't be the best") == 2
    assert "evaluation(s) were incomplete" in error and error.count("\n") == 1
    assert newest(tmp_path / "run")["step"] == 120 and not (tmp_path / "run" / "policy.pt").exists()
    assert faults.train(tmp_path / "run", "--steps 160") == 1
    assert "evaluation(s) were incomplete" in capsys.readouterr().err
    assert (tmp_path / "run" / "policy.pt").exists()


def test_evaluation_episodes_that_fail_are_played_again(tmp_path, capsys):
    """With other draws: all episodes are there in the end, and so are the exit code 0 and the policy."""
    flags = "--steps 80 --eval_episodes 3"
    make_env, _ = faulty(steps={5, 30}, resets={4}, seeds=(evaluate.EVAL_SEED,))
    assert faults.train(tmp_path / "run", flags, make_env) == 0
    out = capsys.readouterr().out
    assert out.count("an episode of the evaluation failed and is played with other draws: RuntimeError") == 2
    assert out.count("a reset of the evaluation failed and was drawn anew: RuntimeError") == 1
    assert [line["eval/episodes"] for line in metrics(tmp_path / "run") if "eval/episodes" in line] == [3, 6]
    assert (tmp_path / "run" / "policy.pt").exists()


def test_gradients_that_differ_from_the_cpus_stop_the_run(tmp_path, monkeypatch, capsys):
    """R31: a device that gets one parameter's gradient wrong is found before its first update; exit code 1."""
    gradients = device.gradients

    def wrong(agent, batch, draws):
        found = gradients(agent, batch, draws)
        if draws.again is None:
            return found  # the reference
        name = next(iter(found))
        return found | {name: found[name] * 1.01}

    monkeypatch.setattr(device, "CHECKED", ("cpu",))
    assert faults.train(tmp_path / "right", "--steps 60") == 0
    monkeypatch.setattr(device, "gradients", wrong)
    assert faults.train(tmp_path / "wrong", "--steps 60") == 1
    error = capsys.readouterr().err
    assert "wrong gradients (world_model." in error and "--device cpu" in error and error.count("\n") == 1
    assert newest(tmp_path / "wrong")["agent"]["updates"] == 0


# ------------------------------------------------------------------------------------------ another number of envs


def episodes_in_memory(run_dir: Path, flags: str) -> list[list[tuple[int, int]]]:
    """(number, rows) of the episodes in each ring, right after a run was resumed; it is stopped there."""
    found = []

    def look_and_stop(p: run.Parts) -> None:
        found.extend([[(x.number, x.length) for x in ring] for ring in p.replay.episodes])
        p.stop.number = signal.SIGTERM
        p.stop.check()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "loop", look_and_stop)
        assert faults.train(run_dir, flags) == 143
    return found


@pytest.mark.parametrize("capacity", [1000, 3 * 12 * 21], ids=["roomy", "tight"])
@pytest.mark.parametrize(("before", "after"), [(1, 12), (4, 1), (2, 3), *slow((1, 2), (1, 4), (4, 2))])
def test_another_number_of_envs_keeps_the_replay(before, after, capacity, tmp_path, monkeypatch, capsys):
    """All finished episodes that fit, the newest ones, in each ring the newest last; what does not fit is said."""
    without_workers(monkeypatch)
    sizes = f"--capacity {capacity} --prefill 60 --checkpoint_minutes 60 --eval_every 100000 --train_every 60"
    assert faults.train(tmp_path / "run", f"{sizes} --num_envs {before} --steps 720") == 0
    saved = newest(tmp_path / "run")["replay"]["index"]
    assert len(saved) == 36
    capsys.readouterr()
    rings = episodes_in_memory(tmp_path / "run", f"{sizes} --num_envs {after} --steps 960")
    out = capsys.readouterr().out
    kept = sorted(itertools.chain(*rings))
    room = after * (capacity // after // 21)
    assert len(rings) == after and len(kept) == min(36, room)
    assert kept == [(number, 21) for number in range(36 - len(kept), 36)]
    assert all(ring == sorted(ring) for ring in rings)
    assert max(map(len, rings)) - min(map(len, rings)) <= 1
    assert ("do not fit any more" in out) == (room < 36) and "skipped" not in out
    assert f"num_envs was {before}" in out or f"num_envs {before} -> {after}" in out

    assert faults.train(tmp_path / "run", f"{sizes} --num_envs {after} --steps 960") == 0
    numbers = [checkpoint._number(name) for name, _, _ in newest(tmp_path / "run")["replay"]["index"]]
    assert max(numbers) >= 36 and len(set(numbers)) == len(numbers)


def test_a_stop_before_the_next_save_leaves_the_replay_of_the_earlier_number_of_envs(tmp_path, monkeypatch, capsys):
    """What did not fit is still needed by the checkpoint that is there."""
    without_workers(monkeypatch)
    sizes = "--capacity 300 --prefill 60 --eval_every 100000 --train_every 60"
    assert faults.train(tmp_path / "run", f"{sizes} --steps 280") == 0
    assert faults.train(tmp_path / "run", f"{sizes} --num_envs 4 --steps 360") == 0
    checkpoint.list_checkpoints(tmp_path / "run")[0].unlink()
    assert newest(tmp_path / "run")["step"] == 280
    capsys.readouterr()
    assert faults.train(tmp_path / "run", f"{sizes} --steps 360") == 0
    assert "skipped" not in capsys.readouterr().out


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
    RunFolder(tmp_path / "run").release()  # Failure if the lock is taken
    assert_gone(below, 10)


@needs_proc
def test_a_signal_to_the_whole_process_group_saves_too(tmp_path):
    """R6: as schedulers and `timeout` send it: the workers die of it, and the run still saves; exit code 143."""
    process, below = with_two_workers(tmp_path / "run")
    os.killpg(process.pid, signal.SIGTERM)
    code, output = process.finish(10)
    assert code == 143, output
    assert newest(tmp_path / "run")["collector"]["episode"] >= 2  # of four, the last two may have been ending just then
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
    assert newest(tmp_path / "run")["collector"]["episode"] >= 2
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
        [sys.executable, "-c", code],
        env=environ,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
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
        assert newest(disk / "run")["step"] == 160
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
    for steps in (90, 120, 150):
        finish(tmp_path / str(steps), "--steps", str(steps))
        state, path = checkpoint.load_checkpoint(tmp_path / str(steps))
        before = checkpoint.list_checkpoints(tmp_path / str(steps))[1]  # of the episode before: no last step in it
        path.unlink()
        assert checkpoint._number(before.name) < steps
        finish(tmp_path / str(steps))
        assert difference(fingerprint(tmp_path / str(steps)), fingerprint(tmp_path / "straight")) == ""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_workers_memory_does_not_grow_with_resets():
    """Two workers with real RoboSuite: 200 resets and a few rendered steps after each add less than 50 MB to either."""
    config = training.Config(**training.PRESETS["cpu"], num_envs=2)
    workers = envs.make_envs(cli.env_options(config), config.num_envs, config.seed, make_robosuite_env)
    try:
        sizes = []
        for number in range(220):
            workers.reset(options={"reset_mask": np.ones(2, bool)})
            for _ in range(3):
                workers.step(np.stack([workers.single_action_space.sample() for _ in range(2)]))
            if number in (19, 219):  # after caches are warm, and at the end
                pages = [int(Path(f"/proc/{p.pid}/statm").read_text().split()[1]) for p in workers.processes]
                sizes.append(np.array(pages) * resource.getpagesize() / 2**20)
    finally:
        workers.close()
    print(f"\n{sizes[0].round()} -> {sizes[1].round()} MB")
    assert (sizes[1] - sizes[0] < 50).all()
