"""The program as a whole: its loops on a fake environment, and `run.py --preset debug` on real RoboSuite."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import gymnasium
import imageio.v2 as imageio
import numpy as np
import pytest
import torch
from tqdm import tqdm

import run
from fake_env import FakeEnv
from faults import TINY, newest
from runtime import checkpoint, cli, console, evaluate, logger
from runtime.collect import HeldActions
from train import Config, Dreamer

ROOT = Path(__file__).parent.parent


def train(run_dir: Path, flags: str = "", make_env=FakeEnv) -> int:
    return run.main([*TINY.split(), *flags.split(), "--run_dir", str(run_dir)], make_env)


def page_script(words: str, page: str = "docs/own-task.md") -> str:
    """The script of a page that has these words."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    return next(block for block in blocks if words in block)


def metrics(run_dir: Path) -> list[dict]:
    """The lines of metrics.jsonl, read as a strict parser does: NaN and Infinity are no JSON."""

    def refuse(constant: str):
        raise ValueError(f"{constant} is no JSON")

    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line, parse_constant=refuse) for line in lines]


def start(run_dir: Path, flags: str = "", redirect: str = "", make_env=FakeEnv, **options) -> subprocess.Popen:
    """The same as `train` in a process of its own, as a user's script starts it; `redirect` is the shell's."""
    module, name = make_env.__module__, make_env.__name__
    code = f"import sys, run; from {module} import {name}; sys.exit(run.main(sys.argv[1:], {name}))"
    environ = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    environ["PYTHONPATH"] = os.pathsep.join((str(ROOT), str(ROOT / "tests")))
    command = [sys.executable, "-c", code, *TINY.split(), *flags.split(), "--run_dir", str(run_dir)]
    return subprocess.Popen(["sh", "-c", f'exec "$@" {redirect}', "sh", *command], env=environ, **options)


def same(a, b) -> bool:
    """Equality of nested checkpoint contents, tensors bit by bit."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


class VisibleBar(tqdm):
    """The bar as at a terminal, also where the output is none."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs | {"disable": False, "mininterval": 0.0})


# ------------------------------------------------------------------------------------------ the real thing


@pytest.fixture(scope="module")
def debug_run(tmp_path_factory) -> tuple[Path, subprocess.CompletedProcess]:
    """One `python run.py --preset debug` on real RoboSuite, as a user starts it on two cores."""
    run_dir = tmp_path_factory.mktemp("debug run ü") / "run"
    environ = {k: v for k, v in os.environ.items() if not k.startswith("WANDB")}
    environ["NETRC"] = os.devnull  # where `wandb login` leaves its key
    del environ["OMP_NUM_THREADS"]
    command = [sys.executable, str(ROOT / "run.py"), "--preset", "debug", "--device", "cpu", "--run_dir", str(run_dir)]
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(cores)[:2])  # with more of them, it might warn of other programs
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, stdin=subprocess.DEVNULL, env=environ, timeout=500
        )
    finally:
        os.sched_setaffinity(0, cores)
    assert done.returncode == 0, done.stdout + done.stderr
    return run_dir, done


def test_debug_run_prints_a_preflight_that_fits_a_terminal_and_no_warning(debug_run):
    """The preflight names preset, device, shapes, memory, folder and W&B mode; nothing else is printed."""
    run_dir, done = debug_run
    for word in ("preset debug", "device cpu", "Lift", "(9, 64, 64)", "parameters", "replay", "offline", "done: 180"):
        assert word in done.stdout
    assert ("environments step in processes of their own" in done.stdout) == (len(os.sched_getaffinity(0)) > 1)
    assert done.stderr == ""
    assert "warning" not in done.stdout.lower()
    assert max(len(line.replace(str(run_dir), "")) for line in done.stdout.splitlines()) <= 80


def test_debug_run_leaves_the_run_folder_of_the_readme(debug_run):
    """Configuration, metrics, the last two checkpoints and the best, policy, replay, videos; nothing half-written."""
    run_dir, _ = debug_run
    names = {path.name for path in run_dir.iterdir()}
    assert {"config.json", "metrics.jsonl", "policy.pt", "replay", "videos", "wandb"} <= names
    saved = [name for name in names if name.startswith("checkpoint")]
    assert len(saved) in (2, 3) and all(checkpoint.NAME.fullmatch(name) for name in saved)
    assert not [name for name in names if "tmp" in name]
    assert json.loads((run_dir / "config.json").read_text())["task"] == "Lift"


def test_debug_run_saves_at_each_episode_end(debug_run):
    """Six episodes of 30 steps end in the debug preset; the newest checkpoints are those of the last two."""
    run_dir, _ = debug_run
    steps = [int(checkpoint.NAME.fullmatch(p.name)[1]) for p in checkpoint.list_checkpoints(run_dir)]
    assert steps[:2] == [180, 150]
    assert newest(run_dir)["collector"]["episode"] == 6


def test_debug_run_metrics_are_finite_ordered_and_unique(debug_run):
    """metrics.jsonl has an env_step in every line, never goes back and says nothing twice."""
    lines = metrics(debug_run[0])
    steps = [line["env_step"] for line in lines]
    assert steps == sorted(steps) and steps[-1] == 180
    assert len({json.dumps(line) for line in lines}) == len(lines)
    assert all(np.isfinite(value) for line in lines for value in line.values())
    names = set().union(*lines)
    assert {"episode/return", "eval/return_mean", "eval/success_rate", "model/kl", "behavior/value"} <= names
    assert {"openloop/image_mse_15", "reward/error_low", "behavior/value_realized", "replay/gb"} <= names
    assert "openloop/image_mse_45" not in names  # episodes have 31 rows
    assert [line["eval/episodes"] for line in lines if "eval/episodes" in line] == [1, 2]  # the last is of more


def test_debug_run_videos_show_a_picture(debug_run):
    """The three kinds of videos have the expected sides and moving, non-black frames."""
    for name, height in (("eval", 32 + 256), ("openloop", 32 + 3 * 3 * 128), ("dream", 32 + 3 * 128 + 32)):
        path = sorted((debug_run[0] / "videos").glob(f"{name}_*.mp4"))[-1]
        frames = [frame for frame in imageio.get_reader(path)]
        assert frames[0].shape[0] == height and frames[0].shape[1] % 16 == 0
        assert len(frames) >= 30
        assert frames[0].std() > 20
        assert np.abs(frames[0].astype(int) - frames[-1]).mean() > 0.5


def test_policy_file_acts_in_ones_own_script(debug_run):
    """The README's lines: load policy.pt, act in an environment of one's own."""
    policy, config = checkpoint.load_policy(debug_run[0] / "policy.pt")
    env = FakeEnv(**evaluate.eval_options(config))
    image, _ = env.reset(seed=1)
    state, done, steps = None, False, 0
    while not done:
        action, state = policy.step(image, state)
        image, _, terminated, truncated, _ = env.step(action)
        done, steps = terminated or truncated, steps + 1
    assert steps == config.episode_steps


def test_the_readmes_script_trains_a_task_of_ones_own(tmp_path):
    """Word for word, with environments in workers, which import it again."""
    (tmp_path / "mine.py").write_text(page_script("import my_task", "README.md"))
    (tmp_path / "my_task.py").write_text(page_script("class MyTask(Lift)"))
    command = [sys.executable, "mine.py", *TINY.split(), "--num_envs", "2", "--run_dir", "run"]
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "task MyTask" in done.stdout and "eval/return_mean" in metrics(tmp_path / "run")[-1]
    assert f"python mine.py --eval {tmp_path / 'run'}\n" in done.stdout  # run.py would not know the task
    assert "robosuite" not in done.stdout + done.stderr  # its log


def test_a_pages_environment_trains(tmp_path):
    """Word for word, without the part that reads the command line."""
    page = {"__name__": "page"}
    exec(page_script("class Dot"), page)
    words = [
        *TINY.split(),
        "--task",
        "Dot",
        "--cameras",
        "dot",
        "--action_repeat",
        "1",
        "--run_dir",
        str(tmp_path / "run"),
    ]
    assert run.main(words, make_env=page["Dot"]) == 0


def test_a_pages_script_sums_up_runs(tmp_path, monkeypatch, capsys):
    """Median and range of three runs; of two evaluations near the same ten thousand, the later one counts."""
    monkeypatch.chdir(tmp_path)
    for seed, value in enumerate((3.0, 9.0, 1.0)):
        folder = tmp_path / f"runs/Lift_cpu_{seed}"
        folder.mkdir(parents=True)
        found = ((9_000, 0.0), (10_100, value), (1_000_000, 5.0))
        lines = [{"env_step": step, "eval/return_mean": mean} for step, mean in found]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"env_st')
    exec(page_script("median", "docs/many-runs.md"), {})
    assert capsys.readouterr().out == ("10,000 steps: 3 (1 to 9) of 3 runs\n1,000,000 steps: 5 (5 to 5) of 3 runs\n")


def test_a_pages_script_draws_what_the_cameras_see(tmp_path, monkeypatch):
    """Word for word: three pictures of 32 pixels, eight times as large."""
    monkeypatch.chdir(tmp_path)
    exec(page_script("cameras.png"), {})
    assert imageio.imread("cameras.png").shape == (256, 768, 3)


def test_eval_repeats_the_evaluation_of_a_run_on_real_robosuite(debug_run, capsys):
    """`--eval RUN` makes the env from the run's own configuration and films the first episode."""
    assert run.main(["--eval", str(debug_run[0]), "--eval_episodes", "1"]) == 0
    assert re.search(r"evaluation return \d+\.\d", capsys.readouterr().out)
    assert (debug_run[0] / "policy.mp4").exists()


# ------------------------------------------------------------------------------------------ loops


@pytest.mark.parametrize(
    ("flags", "agent_steps", "prefill", "train_every"),
    [
        ("--num_envs 1 --train_every 5", 100, 20, 5),
        ("--num_envs 1 --train_every 1.6", 100, 20, 1.6),
        ("--num_envs 1 --train_every 5 --action_repeat 2 --prefill 11", 50, 11, 5),
        ("--num_envs 2 --train_every 3 --steps 120", 120, 20, 3),
    ],
)
def test_training_updates_at_the_exact_ratio(flags, agent_steps, prefill, train_every, tmp_path):
    """One update for each train_every agent steps after the prefill, plus the pretraining, for any num_envs."""
    assert train(tmp_path / "run", flags) == 0
    assert newest(tmp_path / "run")["agent"]["updates"] == 2 + int((agent_steps - prefill) / train_every + 1e-9)


@pytest.mark.parametrize("overlap", [False, True], ids=["in turns", "at once"])
def test_several_envs_live_in_workers_that_end_with_the_run(overlap, tmp_path, monkeypatch):
    """With num_envs 2, both write to the replay, steps count for both, and no worker is left behind.

    So also where they step while the agent learns, as they do beside a GPU.
    """
    monkeypatch.setattr(run, "overlaps", lambda num_envs, device: overlap)
    assert train(tmp_path / "run", "--num_envs 2 --prefill 40 --steps 160") == 0
    lines = metrics(tmp_path / "run")
    assert sum("episode/return" in line for line in lines) == 160 // 20
    assert newest(tmp_path / "run")["collector"]["step"] == 160
    assert len(newest(tmp_path / "run")["collector"]["envs"]) == 2
    after_prefill = 160 - 40 - 2 * overlap  # steps under way when learning begins earn no update
    assert newest(tmp_path / "run")["agent"]["updates"] == 2 + after_prefill // 5
    import multiprocessing

    assert not multiprocessing.active_children()


def test_a_run_continues_from_its_newest_checkpoint(tmp_path, capsys):
    """The same command with more steps resumes: it says so first, and counters, weights and moments go on."""
    run_dir = tmp_path / "run"
    assert train(run_dir) == 0
    before = newest(run_dir)
    capsys.readouterr()
    assert train(run_dir, "--steps 160 --kl_scale 2") == 0
    out = capsys.readouterr().out
    assert out.startswith("resumed ") and "changed since the checkpoint: kl_scale 1.0 -> 2.0\n" in out
    after = newest(run_dir)
    assert after["collector"]["step"] == after["step"] == 160 and after["collector"]["episode"] == 8
    assert after["agent"]["updates"] > before["agent"]["updates"]
    assert after["agent"]["model_optimizer"]["steps"] == after["agent"]["updates"]
    steps = [line["env_step"] for line in metrics(run_dir)]
    assert steps == sorted(steps)


def test_a_finished_run_says_so(tmp_path, capsys):
    """Starting a finished run again changes nothing and exits with 0."""
    assert train(tmp_path / "run") == 0
    files = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    capsys.readouterr()
    assert train(tmp_path / "run", "--kl_scale 2") == 0
    out = capsys.readouterr().out
    assert out.startswith("finished") and out.count("\n") == 1  # what has changed has no effect
    assert train(tmp_path / "run", "--deter 7") == 2
    assert capsys.readouterr().out == ""  # refused before anything is said of a run that goes on
    assert files == {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}


def test_restore_gives_back_all_that_was_saved(tmp_path):
    """State saved, restored into a fresh run and saved again is the same, generators included."""
    assert train(tmp_path / "run") == 0
    state = newest(tmp_path / "run")
    config = Config(**(state["config"] | {"cameras": tuple(state["config"]["cameras"])}))
    with contextlib.ExitStack() as stack:
        folder = checkpoint.RunFolder(tmp_path / "run")
        stack.callback(folder.release)
        parts = run.build(config, {}, FakeEnv, torch.device("cpu"), folder, folder.newest(), stack)
        parts.checkpointer.hold(state["step"], state["best_step"], last=True)
        assert parts.checkpointer.held is not state and same(state, parts.checkpointer.held)


def test_no_two_generators_of_a_run_draw_the_same(tmp_path):
    """Environments, random actions and the replay begin with draws of their own."""
    with contextlib.ExitStack() as stack:
        folder = checkpoint.RunFolder(tmp_path / "run")
        stack.callback(folder.release)
        config = cli.parse([*TINY.split(), "--num_envs", "2", "--seed", "3"]).config
        parts = run.build(config, {}, FakeEnv, torch.device("cpu"), folder, None, stack)
        workers = parts.collector.envs.get_attr("np_random")
        states = [
            rng.bit_generator.state["state"]["state"] for rng in (*workers, parts.collector.rng, parts.replay.rng)
        ]
    assert len(set(states)) == 4


@pytest.mark.films
def test_observing_changes_nothing(tmp_path, monkeypatch):
    """R15: losses and weights are identical with W&B, bar, videos and evaluations on or off, in all pairs of those."""
    settings = [(0, 0, 0, 0), (0, 1, 1, 1), (1, 0, 1, 1), (1, 1, 0, 1), (1, 1, 1, 0)]
    timed = ("perf/env_steps_per_s", "perf/updates_per_s", "perf/share", "perf/ram_gb")
    found = []
    for number, (wandb, bar, video, often) in enumerate(settings):
        run_dir = tmp_path / str(number)
        with monkeypatch.context() as patch:
            if bar:
                patch.setattr(console, "tqdm", VisibleBar)
            if not video:
                patch.setattr(evaluate.Evaluator, "_film", lambda *args: None)
            evaluations = "--eval_every 20 --video_every 40 --eval_episodes 3" if often else "--eval_every 100000"
            assert train(run_dir, f"{evaluations} --wandb {'offline' if wandb else 'disabled'}") == 0
        losses = [
            {key: value for key, value in line.items() if not key.startswith(timed)}
            for line in metrics(run_dir)
            if "model/loss" in line
        ]
        assert bool(list(run_dir.glob("wandb/offline-run-*"))) == bool(wandb)
        assert bool(list(run_dir.glob("videos/*.mp4"))) == bool(video)
        assert sum("eval/return_mean" in line for line in metrics(run_dir)) == (5 if often else 1)
        found.append((losses, newest(run_dir)["agent"]))
    assert len(found[0][0]) >= 3
    for losses, agent in found[1:]:
        assert losses == found[0][0] and same(agent, found[0][1])


def test_the_seed_decides_the_run(tmp_path):
    """Two runs with one seed end with the same weights; another seed ends elsewhere."""
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        train(tmp_path / name, f"--seed {seed}")
    a, b, c = (newest(tmp_path / name)["agent"]["world_model"] for name in "abc")
    assert same(a, b) and not same(a, c)


def test_a_run_without_an_update_is_no_success(tmp_path, capsys):
    """Its steps ended with the prefill."""
    for _ in range(2):  # the second start finds its last checkpoint
        assert train(tmp_path / "run", "--prefill 40 --steps 41 --pretrain 0") == 1
        assert "error: no update was made" in capsys.readouterr().err
    assert train(tmp_path / "run", "--prefill 40 --steps 100 --pretrain 0") == 0


def test_sigterm_stops_with_143_and_the_next_start_resumes(tmp_path):
    """A terminated run exits with 143 within seconds and continues from its last episode's end."""
    process = start(tmp_path / "run", "--steps 100000", stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not list((tmp_path / "run").glob("checkpoint_*.pt")):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=10)
    assert process.returncode == 143
    assert "stopped by SIGTERM" in out
    step = newest(tmp_path / "run")["step"]
    assert train(tmp_path / "run", f"--steps {step + 40}") == 0


def test_a_checkpoint_that_would_run_code_is_refused(tmp_path):
    """A pickle with a payload, correctly named, is refused and not executed."""

    class Payload:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "owned"),))

    train(tmp_path / "run")
    for path in checkpoint.list_checkpoints(tmp_path / "run"):
        path.unlink()
    checkpoint.save_checkpoint(tmp_path / "run", 200, {"agent": Payload()})
    assert train(tmp_path / "run", "--steps 300") == 1
    assert not (tmp_path / "owned").exists()


# ------------------------------------------------------------------------------------------ environments and folders


def test_actions_beyond_the_policys_bounds_are_refused(tmp_path, capsys):
    """An environment whose actions are not in [-1, 1] is named in one line."""

    def wide(**options):
        env = FakeEnv(**options)
        env.action_space = gymnasium.spaces.Box(-2, 2, (4,), np.float32)
        return env

    assert train(tmp_path / "run", make_env=wide) == 2
    assert "is not a Box in [-1, 1]" in capsys.readouterr().err


def test_the_policy_remembers_held_commands(tmp_path, monkeypatch):
    """What the policy takes for its last action is what the environment got, held gripper commands included."""
    executed, remembered, act = [], [], Dreamer.act

    class Listening(FakeEnv):
        def step(self, action):
            executed.append(np.array(action, np.float32))
            return super().step(action)

    def listen(self, image, state, is_first, draws=None, deterministic=False, policy=None):
        if policy is self.policy and state is not None:  # an evaluation asks the averaged policy
            remembered.append((state.action[0].numpy(), executed[-1]))
        return act(self, image, state, is_first, draws, deterministic, policy)

    monkeypatch.setattr(Dreamer, "act", listen)
    monkeypatch.setattr(HeldActions, "MOVES", 0.0)  # grippers are held in all episodes
    monkeypatch.setattr("runtime.collect.STALLED", 0)
    assert train(tmp_path / "run", "--held_actions 1 --eval_every 1000 --seed 1", Listening) == 0
    assert len(remembered) > 70 and all(np.array_equal(*pair) for pair in remembered)
    assert 10 < sum(abs(action[-1]) == 1 for action, _ in remembered) < len(remembered)


def test_nothing_is_held_where_no_action_is_known(tmp_path, capsys):
    """If the environment names neither gripper nor moves, all actions are the agent's own, and a line says so."""

    class Armless(FakeEnv):
        metadata = FakeEnv.metadata | {"gripper": False}

    agents = []
    for share in ("0.5", "0"):
        assert train(tmp_path / share, f"--held_actions {share}", Armless) == 0
        assert ("held_actions 0.5 is off" in capsys.readouterr().out) == (share == "0.5")
        agents.append(newest(tmp_path / share)["agent"])
    assert same(*agents)


def test_the_model_knows_of_the_gripper(tmp_path):
    """What the environment's metadata say of a gripper reaches the model and `policy.pt`."""
    assert train(tmp_path / "run") == 0
    policy, _ = checkpoint.load_policy(tmp_path / "run" / "policy.pt")
    assert policy.rssm.binary[-1] == newest(tmp_path / "run")["agent"]["world_model"]["rssm.binary"][-1] == 1


@pytest.mark.parametrize("other", ["thesis.tex", "config.json"])
def test_a_folder_that_is_no_run_is_not_touched(other, tmp_path, capsys):
    """--run_dir on a folder with other things in it is refused, also where one has the name of ours."""
    (tmp_path / other).write_text('{"years": "of work"}')
    (tmp_path / "metrics.jsonl").write_text("{}")
    assert train(tmp_path) == 2
    assert "not empty" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {other, "metrics.jsonl"}


def test_a_run_without_its_checkpoints_is_kept_aside(tmp_path, capsys):
    """What a run has left is moved, not deleted, where the same command has to start afresh."""
    assert train(tmp_path) == 0
    for path in checkpoint.list_checkpoints(tmp_path):
        path.unlink()
    policy, lines = (tmp_path / "policy.pt").read_bytes(), metrics(tmp_path)
    assert train(tmp_path) == 0
    assert "earlier_1" in capsys.readouterr().out
    assert (tmp_path / "earlier_1/policy.pt").read_bytes() == policy and metrics(tmp_path / "earlier_1") == lines
    assert len(list((tmp_path / "earlier_1/replay").glob("*.npz"))) == 5
    assert newest(tmp_path)["step"] == 100


def test_images_of_another_shape_are_refused(tmp_path, capsys):
    """An environment whose images are not those that were asked for is named in one line."""

    class Grey(FakeEnv):
        def __init__(self, **options):
            super().__init__(**options)
            self.observation_space = gymnasium.spaces.Box(0, 255, (1, 64, 64), np.uint8)

    assert train(tmp_path / "run", make_env=Grey) == 2
    assert "(1, 64, 64) are not uint8 (3, 64, 64)" in capsys.readouterr().err


def test_importing_does_no_work():
    """`import train` and `import run` need neither robosuite nor wandb and print nothing."""
    code = "import sys, train, run; assert not {'robosuite', 'wandb', 'mujoco', 'imageio'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


# ------------------------------------------------------------------------------------------ logging


def test_the_program_runs_without_wandb(tmp_path, monkeypatch):
    """With wandb not importable a run ends well and its metrics are complete."""
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setattr(logger.importlib.util, "find_spec", lambda name: None)
    assert train(tmp_path / "run", "--wandb auto") == 0
    assert any("eval/return_mean" in line for line in metrics(tmp_path / "run"))


@pytest.mark.films
def test_a_missing_video_back_end_costs_a_warning_not_the_run(tmp_path, monkeypatch, capsys):
    """Training goes on when videos can't be written."""

    def fail(*_, **__):
        raise OSError("no ffmpeg here")

    monkeypatch.setattr(imageio, "get_writer", fail)
    assert train(tmp_path / "run") == 0
    assert capsys.readouterr().out.count("no ffmpeg here") == 1
    assert not list((tmp_path / "run" / "videos").glob("*"))


def test_each_phase_is_named_in_the_bar(tmp_path, monkeypatch, capsys):
    """Prefill, pretrain, train and evaluate show in the bar; the end names folder, policy and report."""
    monkeypatch.setattr(console, "tqdm", VisibleBar)
    train(tmp_path / "run")
    out, bar = capsys.readouterr()
    for words in ("prefill ", "pretrain ", "train ", "evaluate ", "2 updates", "episode 1/1", "return "):
        assert words in bar, words
    for words in ("done: 100 steps, 5 episodes", "best evaluation return", "--report", "--eval", "metrics.jsonl"):
        assert words in out, words
    assert "step 0: prefill" not in out  # the bar says it


def test_the_end_names_no_policy_if_there_is_none(tmp_path, monkeypatch, capsys):
    """Without a complete evaluation, there is nothing that `--eval` could play."""
    monkeypatch.setattr(evaluate, "play_episodes", lambda *_: [])
    assert train(tmp_path / "run") == 1
    out = capsys.readouterr().out
    assert "done: 100 steps" in out and "--report" in out and "--eval" not in out


def test_phases_are_lines_where_there_is_no_bar(tmp_path, capsys):
    """Without a terminal each phase is said once, when it begins."""
    train(tmp_path / "run")
    out = capsys.readouterr().out
    for phase in ("prefill", "pretrain, 2 updates", "train"):
        assert len(re.findall(rf"^step \d+: {phase}$", out, re.MULTILINE)) == 1, out


@pytest.mark.parametrize("columns", [80, 140])
def test_the_bar_fits_a_terminal(columns):
    """With the longest words and numbers there can be, nothing is cut off at 80 columns."""
    line = tqdm.format_meter(
        n=499_000,
        total=500_000,
        elapsed=5e5,
        ncols=columns,
        prefix="evaluate",
        unit=" steps",
        unit_scale=True,
        rate=13.9,
        bar_format=console.ProgressBar.FORMAT,
        postfix="return 444, success 100%",
    )
    assert len(line) <= columns and line.endswith("return 444, success 100%")


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB. GPU 0 has 24 GiB in all."),
            "CUDA out of memory",
        ),
        (
            RuntimeError(
                "[enforce fail at alloc_cpu.cpp:1] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to "
                "allocate 8 bytes. Error code 12"
            ),
            "DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes",
        ),
        (MemoryError(), "out of memory"),
    ],
    ids=["gpu", "cpu", "python"],
)
def test_a_full_memory_ends_in_one_line(error, words, tmp_path, monkeypatch, capsys):
    """It says what takes less memory. The beginning has been saved."""

    def full(*_):
        raise error

    monkeypatch.setattr(Dreamer, "train_step", full)
    assert train(tmp_path / "run") == 1
    line = f"error: {words}: a smaller --batch_size or --imagine_starts takes less\n"
    assert capsys.readouterr().err.endswith(line)
    assert checkpoint.list_checkpoints(tmp_path / "run")
