"""Files that survive a crash: checkpoints, the replay on disk, policy files, and the lock of a run folder."""

import builtins
import errno
import fcntl
import io
import math
import os
import random
import shutil
import stat
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from buffer import ReplayBuffer, Transition
from fake_env import FakeEnv
from faults import Fork, difference, flip_bit
from runtime import checkpoint
from runtime.checkpoint import Checkpointer, GlobalGenerators, ReplayFiles, RunFolder, load_checkpoint, save_checkpoint
from runtime.console import Failure, StopSignals, UserError
from runtime.evaluate import Evaluator
from runtime.logger import Logger, Stopwatch, read_metrics
from tiny import random_batch, seeded, tiny_config, tiny_dreamer
from train import Config

IMAGE_SHAPE = (3, 2, 2)
CPU = torch.device("cpu")
OS_CALLS = ("open", "fsync", "replace", "unlink", "rename", "utime", "mkdir")


def some_state(step: int) -> dict:
    return {"step": step, "collector": {}, "weights": torch.arange(500.0) + step, "names": ["a", ("b", None)]}


def saved_steps(run_dir: Path) -> list[int]:
    return [int(checkpoint.NAME.fullmatch(path.name)[1]) for path in checkpoint.list_checkpoints(run_dir)]


def add_episode(replay: ReplayBuffer, number: int, rows: int, env: int = 0, finish: bool = True) -> None:
    """Rows that carry the episode's number and their place in it."""
    for i in range(rows):
        image = np.full(IMAGE_SHAPE, (7 * number + i) % 256, np.uint8)
        replay.add(Transition(image, np.float32([number, i]), number + i / 100, i == 0, i == rows - 1), env)
    if finish:
        replay.finish(env, number)


def replay_with_files(
    run_dir: Path, capacity: int = 50, num_envs: int = 1, enabled: bool = True
) -> tuple[ReplayBuffer, ReplayFiles]:
    replay = ReplayBuffer(capacity, num_envs, IMAGE_SHAPE, 2, seed=5)
    return replay, ReplayFiles(run_dir, replay, enabled)


def numbers(replay: ReplayBuffer, env: int = 0) -> list[int]:
    return [episode.number for episode in replay.episodes[env]]


def numbers_on_disk(files: ReplayFiles) -> list[int]:
    return sorted(int(path.name.split("_")[1]) for path in files.folder.iterdir())


def same_batches(one: ReplayBuffer, other: ReplayBuffer, length: int = 4) -> bool:
    """Whether the next batches are equal, bit by bit."""
    pairs = [(one.sample(8, length), other.sample(8, length)) for _ in range(5)]
    return all(torch.equal(a, b) for pair in pairs for a, b in zip(*pair, strict=True))


class Part:
    """A part of a run that is nothing but its state."""

    def __init__(self, **state):
        self.state = state

    def state_dict(self) -> dict:
        return dict(self.state)

    def load_state_dict(self, state: dict) -> None:
        self.state = dict(state)


class FakeAgent(Part):
    device, autocast_dtype = CPU, None

    def __init__(self, **state):
        super().__init__(**state)
        self.optimizers = [SimpleNamespace(skipped_in_a_row=torch.zeros(())) for _ in range(3)]


def checkpointer_of(run_dir: Path, agent=None, files: ReplayFiles | None = None) -> Checkpointer:
    """Of a run that is made of an agent, a replay, a collector and the metrics."""
    agent = agent or FakeAgent(weights=torch.arange(500.0))
    files = files or replay_with_files(run_dir)[1]
    log, collector = Logger(run_dir, {}, "disabled"), Part(restarts=0)
    return Checkpointer(tiny_config(), agent, files, log, collector=collector, generators=GlobalGenerators(CPU))


def full(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


# ------------------------------------------------------------------------------------------ checkpoints


def test_the_last_two_checkpoints_and_the_best_are_kept(tmp_path):
    """A checkpoint at the best evaluation's step stays for as long as that evaluation is the best."""
    for step, best in ((10, -1), (20, 20), (30, 20), (40, 20), (50, 50), (60, 50), (70, 50)):
        save_checkpoint(tmp_path, step, some_state(step), best)
    assert saved_steps(tmp_path) == [70, 60, 50]
    assert load_checkpoint(tmp_path)[0]["step"] == 70
    assert not list(tmp_path.glob(".*"))


def test_of_two_checkpoints_of_one_step_the_later_wins(tmp_path):
    """The hash in the name does not decide which is newer."""
    for value in range(6):
        path = save_checkpoint(tmp_path, 10, some_state(10) | {"value": value})
        os.utime(path, ns=(value * 10**9, value * 10**9))
        assert load_checkpoint(tmp_path)[0]["value"] == value


def damage(path: Path, how: str) -> None:
    data = path.read_bytes()
    if how == "empty":
        path.write_bytes(b"")
    elif how.startswith("cut"):
        path.write_bytes(data[: int(len(data) * float(how.split()[1]))])
    elif how == "no zip":
        path.write_bytes(b"x" * len(data))
    elif how == "one byte more":
        path.write_bytes(data + b"\0")
    elif how == "directory":
        path.unlink()
        path.mkdir()


@pytest.mark.parametrize(
    "how", ["empty", "cut 0.01", "cut 0.3", "cut 0.7", "cut 0.999", "no zip", "one byte more", "directory"]
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_used(how, tmp_path, capsys):
    """Whatever happened to the newest file, the state is that of the one before."""
    for step in (10, 20):
        newest = save_checkpoint(tmp_path, step, some_state(step))
    damage(newest, how)
    state, path = load_checkpoint(tmp_path)
    assert state["step"] == 10 and torch.equal(state["weights"], some_state(10)["weights"])
    out = capsys.readouterr().out
    assert path != newest and out.startswith(f"warning: {newest.name}") and out.count("\n") == 1


def test_random_single_bit_flips_are_detected(tmp_path, capsys):
    """20 of 20 flips, anywhere in the file, headers and padding included."""
    for step in (10, 20):
        newest = save_checkpoint(tmp_path, step, some_state(step))
    good, bits = newest.read_bytes(), random.Random(0)
    for _ in range(20):
        newest.write_bytes(good)
        flip_bit(newest, bits.randrange(8 * len(good)))
        assert load_checkpoint(tmp_path)[0]["step"] == 10
        assert capsys.readouterr().out.count("is damaged") == 1
    newest.write_bytes(good)
    assert load_checkpoint(tmp_path)[0]["step"] == 20


def test_all_damaged_is_an_error_that_names_them(tmp_path):
    """Never a silent fresh start."""
    paths = [save_checkpoint(tmp_path, step, some_state(step)) for step in (10, 20)]
    for path in paths:
        flip_bit(path, 99)
    with pytest.raises(Failure) as error:
        load_checkpoint(tmp_path)
    assert all(path.name in str(error.value) for path in paths)


def test_damaged_newer_checkpoints_do_not_count_among_the_last_two(tmp_path):
    """They are set aside when a run goes on from an older one, so that two good ones stay."""
    for step in (10, 20, 30):
        newest = save_checkpoint(tmp_path, step, some_state(step))
    flip_bit(newest, 999)
    folder = RunFolder(tmp_path)
    assert folder.newest()["step"] == 20
    folder.claim(tiny_config())
    folder.release()
    for step in (24, 28):
        save_checkpoint(tmp_path, step, some_state(step))
    assert saved_steps(tmp_path) == [28, 24]
    assert (tmp_path / f"{newest.name}.damaged").exists()


class Payload:
    """Unpickling this makes a folder."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_no_file_can_run_code(tmp_path, capsys):
    """A pickle with a payload, rightly named, is refused as a checkpoint, as a policy and as an episode."""
    owned = tmp_path / "owned"
    save_checkpoint(tmp_path, 10, {"step": Payload(owned)})
    with pytest.raises(Failure, match="refused"):
        load_checkpoint(tmp_path)
    torch.save({"config": Payload(owned)}, tmp_path / "policy.pt")
    with pytest.raises(UserError, match="no policy"):
        checkpoint.load_policy(tmp_path / "policy.pt")

    replay, files = replay_with_files(tmp_path)
    state = files.state_dict()
    files.folder.mkdir()
    np.savez(tmp_path / "evil.npz", reward=np.array([Payload(owned)], object))
    data = (tmp_path / "evil.npz").read_bytes()
    name = f"episode_0000000_{checkpoint._digest(data)}.npz"
    (files.folder / name).write_bytes(data)
    files.load_state_dict(state | {"index": [(name, 0, 5)], "next": 1})
    out = capsys.readouterr().out
    assert "warning: 1 of 1 replay episodes skipped: " in out and "refused" in out
    assert not owned.exists() and len(replay) == 0


def test_a_checkpoint_of_another_release_is_refused(tmp_path):
    """One line names the file and says that another release made it."""
    path = save_checkpoint(tmp_path, 10, {"progress": {"step": 10}})
    with pytest.raises(Failure, match=f"{path.name} is from another release"):
        load_checkpoint(tmp_path)


def test_a_snapshot_shares_no_memory():
    """Updates after it was taken change nothing in it."""
    live = {"a": [torch.zeros(3), (torch.ones(2), 5)], "b": None}
    copy = checkpoint.snapshot(live)
    live["a"][0] += 1
    live["a"][1][0].zero_()
    assert torch.equal(copy["a"][0], torch.zeros(3)) and torch.equal(copy["a"][1][0], torch.ones(2))
    assert copy["a"][1][1] == 5 and copy["b"] is None


# ------------------------------------------------------------------------------------------ the checkpointer


def test_what_is_held_is_written_once_and_no_later_update_changes_it(tmp_path):
    """`save` writes the state as of `hold`, and nothing where that is done."""
    agent = FakeAgent(weights=torch.zeros(5))
    saver = checkpointer_of(tmp_path, agent)
    saver.save()
    assert saved_steps(tmp_path) == []
    saver.hold(10, -1, last=False)
    agent.state["weights"] += 1
    saver.save()
    assert torch.equal(load_checkpoint(tmp_path)[0]["agent"]["weights"], torch.zeros(5))
    (path,) = checkpoint.list_checkpoints(tmp_path)
    written = path.stat().st_mtime_ns
    saver.save()
    assert checkpoint.list_checkpoints(tmp_path) == [path] and path.stat().st_mtime_ns == written


def test_training_after_a_resume_does_not_change_what_is_held(tmp_path):
    """If the environments fail before the first episode's end, the state is saved as it was loaded."""
    config = tiny_config()
    agent = tiny_dreamer(config)
    agent.train_step(random_batch(config))
    saver = checkpointer_of(tmp_path, agent)
    saver.hold(10, -1, last=False)
    saver.save()
    before = load_checkpoint(tmp_path)[0]

    other = tiny_dreamer(config, seed=1)
    again = checkpointer_of(tmp_path, other)
    again.restore(load_checkpoint(tmp_path)[0])
    for seed in range(2):
        other.train_step(random_batch(config, seed))
    again.save(env_failed=True)
    after = load_checkpoint(tmp_path)[0]
    assert difference(after["agent"], before["agent"]) == ""
    assert (before["collector"]["restarts"], after["collector"]["restarts"]) == (0, 1)


def test_right_after_a_skipped_update_the_state_before_it_is_kept(tmp_path, capsys):
    """Unless the run ends there."""
    agent = FakeAgent(weights=torch.zeros(5))
    saver = checkpointer_of(tmp_path, agent)
    saver.hold(10, -1, last=False)
    agent.optimizers[1].skipped_in_a_row += 3
    saver.hold(20, -1, last=False)
    assert saver.held["step"] == 10
    assert capsys.readouterr().out == "warning: 3 update(s) just skipped for a NaN: the state before that is kept\n"
    saver.hold(20, -1, last=True)
    assert saver.held["step"] == 20


def test_what_is_not_finite_ends_the_run_by_its_name(tmp_path):
    """Nothing of it is held."""
    agent = FakeAgent(weights=torch.zeros(5))
    saver = checkpointer_of(tmp_path, agent)
    saver.hold(10, -1, last=False)
    agent.state |= {"behavior": {"actor.out.bias": torch.tensor([0.0, torch.nan])}}
    with pytest.raises(Failure, match="step 20: behavior.actor.out.bias is not finite"):
        saver.hold(20, -1, last=True)
    assert saver.held["step"] == 10


@pytest.mark.parametrize("where", ["episode", "checkpoint"])
def test_a_disk_that_refuses_costs_one_warning_an_outage(where, tmp_path, monkeypatch, capsys):
    """What was saved stays, the run is told when the disk takes files again, and then nothing is missing."""
    replay, files = replay_with_files(tmp_path)
    saver = checkpointer_of(tmp_path, files=files)

    def episode(number: int) -> None:
        add_episode(replay, number, 6)
        saver.hold(10 * number, -1, last=False)
        saver.save()

    episode(1)
    write = checkpoint.write_file
    for number in (2, 4):
        with monkeypatch.context() as patch:
            patch.setattr(
                checkpoint, "write_file", lambda path, data: full() if where in path.name else write(path, data)
            )
            episode(number)
            episode(number + 1)
        assert saved_steps(tmp_path)[0] == (10 if number == 2 else 35)
        saver.hold(10 * number + 15, -1, last=False)
        saver.save()
        out = capsys.readouterr().out.splitlines()
        assert out == [
            f"warning: {tmp_path} can't be written to, training goes on: [Errno 28] No space left on device",
            f"step {10 * number + 15}: saved again",
        ]
    restored, again = replay_with_files(tmp_path)
    again.load_state_dict(load_checkpoint(tmp_path)[0]["replay"])
    assert numbers(restored) == [1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("what", "call"), [("checkpoint", "read_bytes"), ("episode", "read_bytes"), ("checkpoint", "stat")]
)
def test_a_file_that_cannot_be_read_now_is_not_taken_for_a_damaged_one(what, call, tmp_path, monkeypatch):
    """A network's trouble ends the start in one line, and nothing is set aside, skipped or deleted."""
    replay, files = replay_with_files(tmp_path)
    saver = checkpointer_of(tmp_path, files=files)
    for number in (1, 2):
        add_episode(replay, number, 6)
        saver.hold(10 * number, -1, last=False)
        saver.save()
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    state, works = load_checkpoint(tmp_path)[0], getattr(Path, call)

    def stale(path, **options):
        if path.name.startswith(what):
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return works(path, **options)

    where = tmp_path if call == "stat" else f"{what}_.*"
    with monkeypatch.context() as patch, pytest.raises(Failure, match=f"{where} can't be read now .*: start again"):
        folder = RunFolder(tmp_path)
        patch.setattr(Path, call, stale)
        folder.newest()
        checkpointer_of(tmp_path, files=replay_with_files(tmp_path)[1]).restore(state)
    assert before == {path: path.read_bytes() for path in before}


def test_a_state_that_does_not_fit_is_refused_with_the_parts_name(tmp_path):
    """Another network's weights, or a part that was not saved."""
    saver = checkpointer_of(tmp_path, tiny_dreamer(tiny_config()))
    saver.hold(10, -1, last=False)
    with pytest.raises(Failure, match="does not fit this release or environment: agent: "):
        checkpointer_of(tmp_path, tiny_dreamer(tiny_config(hidden=8))).restore(saver.held)
    del saver.held["collector"]
    with pytest.raises(Failure, match="does not fit this release or environment: collector"):
        saver.restore(saver.held)


def test_what_makes_a_resumed_run_another_is_said(tmp_path, capsys):
    """The saved and the present value of each thing that decides the last bits."""
    saver = checkpointer_of(tmp_path)
    saver.hold(10, -1, last=False)
    saver.restore(saver.held)
    assert "bit for bit" not in capsys.readouterr().out
    saver.held["versions"] |= {"torch": "1.0", "threads": 64}
    saver.restore(saver.held)
    line = capsys.readouterr().out
    assert line.startswith("warning: this will not be bit for bit the run that was saved: torch 1.0 -> ")
    assert f"threads 64 -> {torch.get_num_threads()}" in line
    assert {"mujoco", "robosuite", "numpy", "pictures by"} <= saver.versions.keys() and "none" not in str(
        saver.versions
    )


def through_a_file(state: dict) -> dict:
    """The state as a checkpoint gives it back."""
    buffer = io.BytesIO()
    torch.save(checkpoint.snapshot(state), buffer)
    return torch.load(io.BytesIO(buffer.getvalue()), map_location="cpu", weights_only=True)


def test_an_agent_learns_on_as_it_would_have():
    """Weights, moments, skips, return range and counters: the next update is the same bit for bit."""
    config = tiny_config(return_norm=True, target_every=2, imagine_starts=5, model_lr=1e-2)
    agent, other = tiny_dreamer(config), tiny_dreamer(config, seed=1)
    for seed in range(3):
        agent.train_step(random_batch(config, seed))
    agent.model_optimizer.skipped += 2
    other.load_state_dict(through_a_file(agent.state_dict()))
    assert difference(other.state_dict(), agent.state_dict()) == ""
    found = []
    for one in (agent, other):
        torch.manual_seed(9)
        found.append((one.train_step(random_batch(config, 7)), one.state_dict()))
    assert difference(*found) == ""


def test_an_evaluator_remembers_its_evaluations(tmp_path, capsys):
    """What was evaluated and filmed, and the best; but after a change of evaluations none of those is the best."""
    config = tiny_config(eval_action="mean")

    def evaluator_of(config: Config) -> Evaluator:
        logger = SimpleNamespace(run_dir=tmp_path)
        return Evaluator(config, FakeAgent(), FakeEnv, logger, Stopwatch(), StopSignals(), None)

    evaluator = evaluator_of(config)
    names = Evaluator.SAVED
    assert names == ("evaluated", "filmed", "largest", "best", "best_step", "best_success", "incomplete", "unwritten")
    values = [1, 2, 3, 4, 5, 6, 7, (bytes(range(256)), {"eval/success_rate": 0.5})]
    for name, value in zip(names, values, strict=True):
        setattr(evaluator, name, value)
    again = evaluator_of(config)
    again.load_state_dict(through_a_file(evaluator.state_dict()))
    assert [getattr(again, name) for name in names] == values and capsys.readouterr().out == ""
    assert again.state_dict() == evaluator.state_dict()
    (tmp_path / "policy.pt").write_bytes(b"an older one, as the disk has refused the best")
    for _ in range(2):  # the second start meets the first one's policy.pt
        changed = evaluator_of(tiny_config(eval_action="mode"))
        changed.load_state_dict(through_a_file(evaluator.state_dict()))
        assert (changed.best, changed.best_step, changed.evaluated) == (-math.inf, -1, 1)
        assert changed.unwritten is None  # or it would be written as the best of the new kind
        assert "evaluations can't be compared" in capsys.readouterr().out
        assert (tmp_path / "policy_000000005.pt").read_bytes() == bytes(range(256))


def test_a_best_policy_that_is_lost_does_not_end_the_start(tmp_path, capsys):
    """It costs a line. One that can't be read now ends it, as the next evaluation would overwrite it."""
    evaluators = [
        Evaluator(config, FakeAgent(), FakeEnv, SimpleNamespace(run_dir=tmp_path), Stopwatch(), StopSignals(), None)
        for config in (tiny_config(eval_steps=0), tiny_config(eval_steps=6))
    ]
    evaluators[0].best_step = 5
    evaluators[1].load_state_dict(evaluators[0].state_dict())
    assert "can't be kept as" in capsys.readouterr().out and evaluators[1].best_step == -1
    (tmp_path / "policy.pt").mkdir()  # it is there, but can't be read now
    with pytest.raises(OSError):
        evaluators[1].load_state_dict(evaluators[0].state_dict())


def test_the_global_generators_go_on():
    """torch's, Python's and NumPy's draw on as they would have; the state survives a checkpoint's file."""
    generators = GlobalGenerators(CPU)

    def draws() -> tuple:
        return torch.rand(3).tolist(), random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn()

    generators.seed(3)
    first = draws()
    generators.seed(3)
    assert draws() == first
    generators.seed(4)
    draws()  # NumPy and Python each keep a second normal draw for the next call
    state = through_a_file(generators.state_dict())
    expected = draws()
    generators.seed(5)
    generators.load_state_dict(state)
    assert draws() == expected != first


# ------------------------------------------------------------------------------------------ replay on disk


@pytest.mark.parametrize("episodes", [1, 3, 6, 14])
def test_a_restored_replay_samples_what_the_first_would_have(episodes, tmp_path):
    """Bit for bit, also after the ring has wrapped around into the middle of an episode, and while it goes on."""
    replay, files = replay_with_files(tmp_path)
    for number in range(episodes):
        add_episode(replay, number, 7 + number % 4)
        files.write()
        replay.sample(2, 4)
    restored, again = replay_with_files(tmp_path)
    again.load_state_dict(files.state_dict())
    assert len(restored) == len(replay) and again.state_dict() == files.state_dict()
    assert same_batches(replay, restored)
    for number in range(episodes, episodes + 9):
        for one in (replay, restored):
            add_episode(one, number, 8, finish=False)
        assert same_batches(replay, restored) and len(restored) == len(replay)
        for one in (replay, restored):
            one.finish(0, number)


def test_a_restored_replay_of_several_envs_samples_the_same(tmp_path, capsys):
    """Each ring gets its own episodes back; that running ones are lost is said."""
    replay, files = replay_with_files(tmp_path, capacity=60, num_envs=3)
    for number in range(15):
        add_episode(replay, number, 6 + number % 5, env=number % 3)
    files.write()
    restored, again = replay_with_files(tmp_path, capacity=60, num_envs=3)
    again.load_state_dict(files.state_dict())
    assert again.state_dict() == files.state_dict() and same_batches(replay, restored)
    assert capsys.readouterr().out == "environments whose episodes were running at the checkpoint start new ones\n"


def test_running_episodes_are_left_out(tmp_path):
    """Only finished episodes are listed; those of other envs that still run are not."""
    replay, files = replay_with_files(tmp_path, num_envs=2)
    add_episode(replay, 0, 6, env=0)
    add_episode(replay, 0, 9, env=1, finish=False)
    files.write()
    assert [(env, rows) for _, env, rows in files.state_dict()["index"]] == [(0, 6)]
    assert len(list(files.folder.iterdir())) == 1


def test_a_smaller_replay_and_fewer_envs_keep_the_newest_rows(tmp_path, capsys):
    """Episodes of environments that are gone go to those that are left; the oldest lose rows, or their place."""
    replay, files = replay_with_files(tmp_path, num_envs=2)
    for number in range(4):
        add_episode(replay, number, 10, env=number % 2)
    files.write()
    small, again = replay_with_files(tmp_path, capacity=14)
    again.load_state_dict(files.state_dict())
    assert len(small) == 14 and [(e.number, e.length) for e in small.episodes[0]] == [(2, 4), (3, 10)]
    assert capsys.readouterr().out == "warning: 2 of 4 replay episodes, the oldest, do not fit any more\n"
    rows = small.export(0, small.episodes[0][0])["action"]
    assert rows[:, 0].tolist() == [2.0] * 4 and rows[:, 1].tolist() == [6.0, 7.0, 8.0, 9.0]


def test_more_envs_share_the_episodes_newest_last(tmp_path, capsys):
    """All that fit are kept, spread over the rings, and each ring forgets its oldest first."""
    replay, files = replay_with_files(tmp_path, capacity=60)
    for number in range(5):
        add_episode(replay, number, 10)
    files.write()
    more, again = replay_with_files(tmp_path, capacity=60, num_envs=3)
    again.load_state_dict(files.state_dict())
    assert [numbers(more, env) for env in range(3)] == [[0, 3], [1, 4], [2]]
    assert "do not fit" not in capsys.readouterr().out
    more.sample(4, 4)


def test_a_replay_that_is_not_saved_is_said_to_be_filled_anew(tmp_path, capsys):
    """Switched off, no file is written, and the state lists none."""
    replay, files = replay_with_files(tmp_path, enabled=False)
    add_episode(replay, 0, 6)
    files.write()
    assert files.state_dict()["index"] == [] and not files.folder.exists()
    restored, again = replay_with_files(tmp_path, enabled=False)
    again.load_state_dict(files.state_dict())
    assert len(restored) == 0 and "the replay was not saved" in capsys.readouterr().out


def test_a_file_is_deleted_only_when_the_last_two_checkpoints_need_it_no_more(tmp_path):
    """A full replay's disk is bounded, and each of the last two checkpoints finds all of its episodes."""
    replay, files = replay_with_files(tmp_path)
    states = []
    for number in range(30):
        add_episode(replay, number, 10)
        files.write()
        states.append(files.state_dict())
        files.prune()
        there = {path.name for path in files.folder.iterdir()}
        assert all(name in there for state in states[-2:] for name, _, _ in state["index"])
        assert len(there) <= 50 // 10 + 1
    needed = {name for name, _, _ in states[-2]["index"]}
    restored, again = replay_with_files(tmp_path)
    again.load_state_dict(states[-2])
    assert len(restored) == 50 and {path.name for path in files.folder.iterdir()} >= needed


def test_a_checkpoint_that_is_written_again_leaves_the_files_of_the_one_before(tmp_path):
    """As when the environments end the run right after a save."""
    replay, files = replay_with_files(tmp_path)
    saver = checkpointer_of(tmp_path, files=files)
    for number in range(10):
        add_episode(replay, number, 10)
        saver.hold(10 * number, -1, last=False)
        saver.save()
    saver.save(env_failed=True)
    newer, older = (torch.load(path, weights_only=True) for path in checkpoint.list_checkpoints(tmp_path))
    assert (older["step"], newer["step"], newer["collector"]["restarts"]) == (80, 90, 1)
    assert {name for name, _, _ in older["replay"]["index"]} <= {path.name for path in files.folder.iterdir()}


def test_after_a_resume_the_checkpoint_before_still_finds_its_episodes(tmp_path):
    """Also if fewer fit than it lists: the newest checkpoint may yet turn out to be damaged."""
    replay, files = replay_with_files(tmp_path)
    for number in range(5):
        add_episode(replay, number, 10)
    files.write()
    state = files.state_dict()
    files.prune()
    small, again = replay_with_files(tmp_path, capacity=20, num_envs=2)
    again.load_state_dict(state)
    add_episode(small, 5, 10)
    again.write()
    again.state_dict()
    again.prune()
    assert numbers_on_disk(again) == [0, 1, 2, 3, 4, 5]
    again.state_dict()
    again.prune()
    assert numbers_on_disk(again) == [3, 4, 5]


def test_a_resume_deletes_episodes_that_came_after_the_checkpoint(tmp_path):
    """The replay never runs ahead of its checkpoint."""
    replay, files = replay_with_files(tmp_path)
    for number in range(4):
        add_episode(replay, number, 6)
        files.write()
        if number == 1:
            state = files.state_dict()
    restored, again = replay_with_files(tmp_path)
    again.load_state_dict(state)
    assert numbers_on_disk(files) == numbers(restored) == [0, 1]


def test_an_episode_that_a_resume_cannot_delete_is_told_in_one_line(tmp_path, monkeypatch):
    """A later one would come to lie beside it under the same number."""
    replay, files = replay_with_files(tmp_path)
    saver = checkpointer_of(tmp_path, files=files)
    saver.hold(10, -1, last=False)
    add_episode(replay, 0, 6)
    files.write()

    def refuse(path):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "unlink", refuse)
    with pytest.raises(Failure, match=rf"^{tmp_path} can't be used: .*Permission denied: '.*episode_0000000_.*npz'$"):
        checkpointer_of(tmp_path).restore(saver.held)


@pytest.mark.parametrize("how", ["empty", "cut 0.5", "no zip", "bit", "missing", "directory", "other shape"])
def test_a_damaged_or_missing_episode_is_skipped_and_named(how, tmp_path, capsys):
    """The others are loaded, and sampling works."""
    replay, files = replay_with_files(tmp_path)
    for number in range(4):
        add_episode(replay, number, 6)
    files.write()
    state = files.state_dict()
    index = state["index"]
    path = files.folder / index[1][0]
    if how == "missing":
        path.unlink()
    elif how == "bit":
        flip_bit(path, 4321)
    elif how == "other shape":
        np.savez(tmp_path / "other.npz", reward=np.zeros(6, np.float32), image=np.zeros((6, 3, 4, 4), np.uint8))
        data = (tmp_path / "other.npz").read_bytes()
        index[1] = (f"episode_0000001_{checkpoint._digest(data)}.npz", 0, 6)
        (files.folder / index[1][0]).write_bytes(data)
    else:
        damage(path, how)
    restored, again = replay_with_files(tmp_path)
    again.load_state_dict(state)
    out = capsys.readouterr().out
    assert out.startswith("warning: 1 of 4 replay episodes skipped: ") and out.count("\n") == 1 and index[1][0] in out
    assert len(restored) == 18 and numbers(restored) == [0, 2, 3]
    restored.sample(4, 4)


def test_an_episode_that_could_not_be_written_is_written_later(tmp_path, monkeypatch):
    """An error of the disk reaches the caller, leaves nothing half-written, and loses nothing."""
    replay, files = replay_with_files(tmp_path)
    add_episode(replay, 0, 6)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space"):
            files.write()
    assert list(files.folder.iterdir()) == []
    add_episode(replay, 1, 6)
    files.write()
    assert [int(name.split("_")[1]) for name, _, _ in files.state_dict()["index"]] == [0, 1]


# ------------------------------------------------------------------------------------------ policy files


def test_a_policy_file_gives_back_the_policy_and_its_configuration(tmp_path):
    """It acts as it did, bit for bit; what else was saved beside it is there, and where it was learned is not."""
    config = tiny_config(run_dir="/home/somebody/run", eval_action="mode")
    policy = tiny_dreamer(config).policy.eval()
    (tmp_path / "policy.pt").write_bytes(checkpoint.policy_file(policy, config, env_step=40, success=0.5))
    loaded, known = checkpoint.load_policy(tmp_path / "policy.pt")
    assert known == tiny_config(eval_action="mode") and not loaded.training
    image = random_batch(config).image[0]
    is_first = torch.ones(len(image), dtype=torch.bool)
    with torch.no_grad():
        (action, state), (expected, known_state) = (
            one(image, None, is_first, seeded(), deterministic=True) for one in (loaded, policy)
        )
    assert torch.equal(action, expected)
    assert all(torch.equal(a, b) for a, b in zip(state.latent, known_state.latent, strict=True))
    saved = torch.load(tmp_path / "policy.pt", weights_only=True)
    assert (saved["env_step"], saved["success"]) == (40, 0.5)


@pytest.mark.parametrize("change", ["constant missing", "constant unknown", "weight missing"])
def test_a_policy_file_of_another_release_is_refused_in_one_line(change, tmp_path):
    """Nothing is guessed: neither a constant that it does not name, nor a weight."""
    config = tiny_config()
    saved = torch.load(io.BytesIO(checkpoint.policy_file(tiny_dreamer(config).policy, config)), weights_only=True)
    if change == "weight missing":
        saved["weights"].popitem()
    elif change == "constant unknown":
        saved["config"]["warp"] = 9
    else:
        del saved["config"]["eval_action"]
    torch.save(saved, tmp_path / "policy.pt")
    told = {"constant missing": ": it lacks eval_action", "constant unknown": ": it has warp"}.get(change, "")
    with pytest.raises(UserError, match="policy.pt is no policy file of this release" + told):
        checkpoint.load_policy(tmp_path / "policy.pt")
    with pytest.raises(
        UserError, match="there is no .*nothing.pt; in a run's folder, its first evaluation writes policy.pt"
    ):
        checkpoint.load_policy(tmp_path / "nothing.pt")


def test_a_damaged_policy_file_is_noticed(tmp_path):
    """Any byte of a weight that has changed: torch itself does not look at the file's checksums."""
    config = tiny_config()
    data = bytearray(checkpoint.policy_file(tiny_dreamer(config).policy, config))
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        largest = max(archive.infolist(), key=lambda info: info.file_size)
    data[largest.header_offset + 200] ^= 1
    (tmp_path / "policy.pt").write_bytes(data)
    with pytest.raises(UserError, match="policy.pt is damaged"):
        checkpoint.load_policy(tmp_path / "policy.pt")


# ------------------------------------------------------------------------------------------ crashes


class CrashingFile:
    """Writes half of its data at one crash point, all of it at the next."""

    def __init__(self, file, point):
        self.file, self.point = file, point

    def write(self, data):
        self.file.write(data[: len(data) // 2])
        self.file.flush()
        self.point()
        self.file.write(data[len(data) // 2 :])
        self.point()

    def __getattr__(self, name):
        return getattr(self.file, name)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        return self.file.__exit__(*error)


def crash_at(last: int, monkeypatch) -> None:
    """End this process at the `last` point before or after an open, a write or a call to the system."""
    count = 0

    def point():
        nonlocal count
        count += 1
        if count == last:
            os._exit(77)

    def around(call):
        def wrapped(*args, **kwargs):
            point()
            result = call(*args, **kwargs)
            point()
            return result

        return wrapped

    for name in OS_CALLS:
        monkeypatch.setattr(os, name, around(getattr(os, name)))
    opened = around(builtins.open)
    monkeypatch.setattr(checkpoint, "open", lambda *args: CrashingFile(opened(*args), point), raising=False)


def test_a_crash_at_any_point_of_a_save_leaves_the_old_or_the_new_state(tmp_path, monkeypatch):
    """Before and after each open, write, fsync, rename and unlink: what is found next is whole, replay included."""
    capacity = 30

    def save(step: int, replay: ReplayBuffer, saver: Checkpointer) -> None:
        add_episode(replay, step, 10)
        saver.agent.state["weights"] = torch.arange(500.0) + step
        saver.logger.scalars(step, {"episode/return": 1.0})
        saver.hold(step, 1, last=False)
        saver.save()

    seen, point = set(), 0
    while True:
        point += 1
        run_dir = tmp_path / str(point)
        run_dir.mkdir()
        replay, files = replay_with_files(run_dir, capacity)
        saver = checkpointer_of(run_dir, files=files)
        for step in range(6):
            save(step, replay, saver)

        def crashing(last=point, replay=replay, saver=saver) -> int:
            crash_at(last, monkeypatch)
            save(6, replay, saver)
            return 0

        code, output = Fork(crashing).finish(20)
        assert code in (0, 77), output
        saver.logger.close()
        folder = RunFolder(run_dir)
        state = folder.newest()
        folder.claim(tiny_config())
        step = state["step"]
        assert step in (5, 6) and torch.equal(state["agent"]["weights"], torch.arange(500.0) + step)
        assert saved_steps(run_dir)[:2] == [step, step - 1] and 1 in saved_steps(run_dir)
        assert not list(run_dir.rglob(".*"))
        Logger(run_dir, {}, "disabled", state["logger"]).close()
        assert [line["env_step"] for line in read_metrics(run_dir)[0]] == list(range(step + 1))
        restored, again = replay_with_files(run_dir, capacity)
        again.load_state_dict(state["replay"])
        assert numbers(restored) == [step - 2, step - 1, step] and len(restored) == capacity
        before = load_before(run_dir)
        assert before["step"] == step - 1
        older, again = replay_with_files(run_dir, capacity)
        again.load_state_dict(before["replay"])
        assert numbers(older) == [step - 3, step - 2, step - 1] and len(older) == capacity
        folder.release()
        seen.add(step)
        shutil.rmtree(run_dir)
        if code == 0:
            break
    print(f"\n{point - 1} points")
    assert seen == {5, 6} and point > 20


def load_before(run_dir: Path) -> dict:
    """The state of the checkpoint before the newest, as if that were damaged."""
    flip_bit(checkpoint.list_checkpoints(run_dir)[0], 99)
    return load_checkpoint(run_dir)[0]


# ------------------------------------------------------------------------------------------ the run folder


def test_a_run_folder_is_one_processs_until_it_ends(tmp_path):
    """A second process is refused with the first one's number; the lock goes with its process, kill -9 included."""
    ready, go = os.pipe()

    def hold():
        folder = RunFolder(tmp_path)
        os.write(go, b"x")
        os.read(os.pipe()[0], 1)  # waits for ever
        folder.release()

    holder = Fork(hold)
    os.read(ready, 1)
    with pytest.raises(Failure, match=f"is in use by process {holder.pid}: one run, one process"):
        RunFolder(tmp_path)
    os.kill(holder.pid, 9)
    assert holder.finish(5)[0] == -9
    folder = RunFolder(tmp_path)
    folder.claim(tiny_config())  # which asks for the lock again
    assert (tmp_path / "lock").read_text() == f"{os.getpid()}\n"
    folder.release()
    assert (tmp_path / "lock").read_text() == ""  # another process may get that number
    RunFolder(tmp_path).release()


def test_a_folder_that_another_process_made_in_the_meantime_is_refused(tmp_path):
    """Between the first look and the claim lie the seconds that environments take to build."""
    path = tmp_path / "run"
    late = RunFolder(path)
    assert late.newest() is None and not path.exists()
    first = RunFolder(path)
    first.claim(tiny_config())
    with pytest.raises(Failure, match=f"is in use by process {os.getpid()}"):
        late.claim(tiny_config())
    save_checkpoint(path, 10, some_state(10))
    first.release()
    with pytest.raises(Failure, match="got a checkpoint from another process just now"):
        late.claim(tiny_config())
    late.release()


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOTSUP, errno.EINVAL, errno.ENOLCK])
def test_a_file_system_without_locks_costs_a_warning(code, tmp_path, monkeypatch, capsys):
    """Told once in a run, which goes on, and its folder can be released. ENOLCK is NFS's without a lock daemon."""

    def refuse(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", refuse)
    for _ in range(2):
        folder = RunFolder(tmp_path)
        folder.claim(tiny_config())
        folder.release()
    out = capsys.readouterr().out
    assert out.count("warning: this file system has no locks") == out.count("\n") == 1
    assert f"nothing keeps a second process out of {tmp_path}" in out


def test_a_lock_that_fails_otherwise_is_told_in_one_line(tmp_path, monkeypatch):
    """Such as an error of the disk: that is no lack of the file system."""

    def broken(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(fcntl, "flock", broken)
    with pytest.raises(UserError, match="can't be locked: Input/output error"):
        RunFolder(tmp_path)


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.ENOSYS])
def test_a_file_system_that_syncs_no_folder_costs_a_warning(code, tmp_path, monkeypatch, capsys):
    """Told once in a run; the file itself is synced all the same."""
    fsync_of_folders_fails(code, monkeypatch)
    for text in (b"one", b"two"):
        checkpoint.write_file(tmp_path / "a", text)
    assert (tmp_path / "a").read_bytes() == b"two"
    out = capsys.readouterr().out
    assert out.count("warning: this file system can't sync a folder") == out.count("\n") == 1


def test_a_folder_whose_sync_fails_is_no_saved_state(tmp_path, monkeypatch):
    """An error of the disk reaches the caller."""
    fsync_of_folders_fails(errno.EIO, monkeypatch)
    with pytest.raises(OSError, match="Input/output error"):
        checkpoint.write_file(tmp_path / "a", b"one")


def fsync_of_folders_fails(code: int, monkeypatch) -> None:
    fsync = os.fsync

    def some(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(code, os.strerror(code))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", some)


def test_a_path_that_can_be_no_run_folder_is_refused(tmp_path):
    """A file, something below a file, a name that is too long, a link into nowhere, a folder of something else."""
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letter.txt").write_text("x")
    paths = {
        "file": "is not a folder that can be written to",
        "file/run": "is not a folder that can be written to|Not a directory",
        "x" * 300: "File name too long",
        "link": "it is a link to .*gone, which does not exist",
        "home": "is not empty and no run folder: choose another",
    }
    for name, reason in paths.items():
        with pytest.raises(UserError, match=reason):
            RunFolder(tmp_path / name)
    assert {path.name for path in tmp_path.rglob("*")} == {"file", "link", "home", "letter.txt"}


def test_what_a_run_without_checkpoints_has_left_is_set_aside(tmp_path, capsys):
    """Whole, and once for each such run; leftovers of a crash are deleted, and an empty start moves nothing."""
    for number in (1, 2):
        folder = RunFolder(tmp_path)
        folder.claim(tiny_config())
        folder.release()
        (tmp_path / "metrics.jsonl").write_text(f"{number}")
        (tmp_path / "replay").mkdir()
        (tmp_path / "replay" / ".episode.tmp").write_text("x")
        (tmp_path / ".checkpoint.tmp").write_text("x")
        (tmp_path / "policy.mp4").write_text("x")
        (tmp_path / "videos").mkdir()
        (tmp_path / "videos" / ".eval_000000100.mp4.tmp.mp4").write_text("x")
    RunFolder(tmp_path).claim(tiny_config())
    assert [(tmp_path / f"earlier_{n}" / "metrics.jsonl").read_text() for n in (1, 2)] == ["1", "2"]
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"config.json", "lock", "earlier_1", "earlier_2"} and not list(tmp_path.rglob(".*"))
    assert capsys.readouterr().out.count("starting afresh") == 2
