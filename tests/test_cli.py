"""The command line: a flag for each field of Config, checks of their values, and words before a run."""

import dataclasses
import re
import shutil
import subprocess
import sys
import time
import typing
from pathlib import Path
from typing import Literal

import pytest
import torch

import run
from fake_env import FakeEnv
from runtime import cli
from runtime.console import UserError
from test_run import TINY, newest, train
from train import PRESETS, TASKS, Config, Dreamer, Range

ROOT = Path(__file__).parent.parent
LONG = "x" * 300  # characters; no file's name may have as many
FIELDS = {field.name: field for field in dataclasses.fields(Config)}


def parts(name: str) -> tuple:
    """The plain type of a field, and its marks."""
    hint = cli.hints()[name]
    return (typing.get_args(hint)[0], hint.__metadata__) if hasattr(hint, "__metadata__") else (hint, ())


def comments() -> dict[str, str]:
    """The comment behind each field of Config, as it stands in train.py."""
    block = re.search(r"^class Config:\n(.*?)^\S", (ROOT / "train.py").read_text(), re.DOTALL | re.MULTILINE)
    return dict(re.findall(r"^    (\w+): .*?  # (.+)$", block[1], re.MULTILINE))


def refusal(argv: list[str]) -> str:
    """The line with which a command is refused."""
    with pytest.raises(UserError) as caught:
        cli.parse(argv)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ------------------------------------------------------------------------------------------ flags


def test_flag_beats_preset_beats_config():
    """The three sources of a constant in their order."""
    config, given, _, _ = cli.parse(["--preset", "cpu", "--batch_length", "30"])
    assert config.batch_length == 30 and given["batch_length"] == 30
    assert config.train_every == PRESETS["cpu"]["train_every"] != Config().train_every
    assert config.batch_size == Config().batch_size


def test_a_task_may_have_cameras_of_its_own():
    """Door's are not Lift's, the preset and the flag come before the task, and every entry names constants."""
    assert cli.parse(["--preset", "cpu", "--task", "Stack"]).config.camera_radius == 0.3
    assert cli.parse(["--preset", "paper", "--task", "Stack"]).config.camera_radius == 0
    door = TASKS["Door"]["cameras"]
    assert cli.parse(["--preset", "cpu", "--task", "Door"]).config.cameras == door != Config().cameras
    assert cli.parse(["--preset", "paper", "--task", "Door"]).config.cameras == PRESETS["paper"]["cameras"]
    assert cli.parse(["--preset", "cpu", "--task", "Door", "--cameras", "agentview"]).config.cameras == ("agentview",)
    assert all(set(constants) <= set(FIELDS) for constants in TASKS.values())


def test_auto_preset_follows_the_device(monkeypatch):
    """standard on an NVIDIA GPU, cpu otherwise: a Mac's memory is seldom enough for the replay of standard."""
    for device, preset in {"cpu": "cpu", "mps": "cpu", "cuda": "standard"}.items():
        monkeypatch.setattr(cli, "pick_device", lambda name, device=device: torch.device(device))
        assert cli.parse([]).config.preset == preset


def test_without_its_gpu_a_run_is_not_begun_anew(tmp_path, monkeypatch):
    """The command that began a run of `standard` would find a folder of another name and start from nothing."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli, "pick_device", lambda name: torch.device("cpu"))
    (tmp_path / "runs/Lift_standard_0").mkdir(parents=True)
    with pytest.raises(UserError, match="^preset auto is cpu, .* runs/Lift_standard_0 is a run of standard: name the"):
        cli.parse([])
    for words in (["--preset", "cpu"], ["--seed", "1"], ["--run_dir", "a"], ["--eval", "a"]):
        assert cli.parse(words).config.preset == "cpu"
    (tmp_path / "runs/Lift_cpu_0").mkdir()
    assert cli.parse([]).config.preset == "cpu"


def test_every_preset_that_can_be_chosen_exists():
    """The names in the type of Config.preset are `auto` and the keys of PRESETS."""
    assert typing.get_args(parts("preset")[0]) == ("auto", *PRESETS)


@pytest.mark.parametrize(
    "table, entry, constants, words",
    [
        (
            PRESETS,
            "cpu",
            {"model_lrr": 1e-4},
            "PRESETS in train.py, cpu: unknown constant model_lrr: did you mean model_lr",
        ),
        (TASKS, "Stack", {"xyz": 1}, "TASKS in train.py, Stack: unknown constant xyz: Config has no such constant"),
        (PRESETS, "paper", {"steps": 1e5}, "steps 100000.0 is of the wrong type: it must be a whole number"),
        (PRESETS, "cpu", None, "PRESETS in train.py lacks cpu"),
    ],
)
def test_a_mistake_in_the_block_of_constants_is_named(table, entry, constants, words, monkeypatch):
    """One line, whatever the flags are, for a name that is no constant and for a preset that is not there."""
    monkeypatch.setitem(table, entry, constants) if constants else monkeypatch.delitem(table, entry)
    with pytest.raises(UserError, match=words):
        cli.parse(["--preset", "debug"])


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_are_valid_and_name_their_steps(preset):
    """Each preset names fields that exist and passes the checks; it says how long it trains."""
    assert set(PRESETS[preset]) <= set(FIELDS)
    config = cli.parse(["--preset", preset]).config
    cli.check_config(config)
    assert {name: getattr(config, name) for name in PRESETS[preset]} == PRESETS[preset]
    assert preset == "standard" or "steps" in PRESETS[preset]


def test_every_field_is_a_flag_and_its_comment_stands_in_the_help(capsys, monkeypatch):
    """`--help` lists all constants, each with the comment behind it, and ways to start the program line by line."""
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as caught:
        run.main(["--help"])
    assert not caught.value.code
    text = capsys.readouterr().out
    assert all(f"--{name} " in text for name in (*FIELDS, "eval", "report"))
    assert all(
        re.search(rf"^ +python run.py {words}", text, re.MULTILINE) for words in ("--task", "--eval", "--report")
    )
    told = " ".join(text.replace("│", " ").split())
    assert comments().keys() == FIELDS.keys()
    for name, comment in comments().items():
        assert re.search(rf"--{name} [^-]*{re.escape(' '.join(comment.split()))} \(default: ", told), name


@pytest.mark.parametrize(
    ("words", "given"),
    [
        ("--save_replay=False", {"save_replay": False}),
        ("--save_replay=false", {"save_replay": False}),
        ("--save_replay True", {"save_replay": True}),
        ("--save-replay true", {"save_replay": True}),
        ("--batch_size=3 --batch-length=7", {"batch_size": 3, "batch_length": 7}),
        ("--train_every 1.6 --discount=1", {"train_every": 1.6, "discount": 1.0}),
        ("--model_lr=1e-3 --steps 400_000", {"model_lr": 1e-3, "steps": 400_000}),
        ("--cameras frontview sideview --seed 1", {"cameras": ("frontview", "sideview"), "seed": 1}),
        ("--cameras=frontview,sideview --seed=1", {"cameras": ("frontview", "sideview"), "seed": 1}),
        ("--cameras frontview,sideview --seed 1", {"cameras": ("frontview", "sideview"), "seed": 1}),
        ("--image_size 128", {"image_size": 128}),
        ("--run_dir=a=b", {"run_dir": "a=b"}),
        ("--run_dir=-x --seed 1", {"run_dir": "-x", "seed": 1}),
        ("--seed 1 --seed 2", {"seed": 2}),
    ],
)
def test_a_flag_is_written_in_several_ways(words, given):
    """With a space or `=`, with hyphens, a bool in either case, several names; what was given is known by name."""
    command = cli.parse(words.split())
    assert command.given == given and not command.eval and not command.report
    assert all(type(getattr(command.config, name)) is type(value) for name, value in given.items())
    assert all(getattr(command.config, name) == value for name, value in given.items())


def test_a_script_that_names_its_task_can_report():
    """It gives `--task` before the user's own words, as the README has it."""
    assert cli.parse(["--task", "MyTask", "--report", "a", "b"]).report == [Path("a"), Path("b")]


def test_the_help_has_the_presets_own_defaults(capsys, monkeypatch):
    """Those that a run would have with these flags: of the preset that is named, or of the one for this machine."""
    monkeypatch.setattr(cli, "pick_device", lambda name: torch.device("cpu"))
    for words, size, name in (
        ("", 32, "cpu"),
        ("--preset paper", 64, "paper"),
        ("--preset=paper --preset=cpu --task Door", 32, "cpu"),
    ):
        with pytest.raises(SystemExit):
            run.main([*words.split(), "--help"])
        text = " ".join(capsys.readouterr().out.replace("│", " ").split())
        assert f"in pixels (default: {size})" in text and f"those of the preset `{name}`" in text
        assert ("(default: agentview" in text) == ("Door" not in words)


def test_only_switches_turn_true_into_a_bool():
    """As a sweep writes it, with `=` or without; a folder may have that name, and a name may end in it."""
    for words in (["--save_replay=false", "--run_dir=true"], ["--save-replay", "false", "--run_dir", "true"]):
        config = cli.parse(words).config
        assert config.save_replay is False and config.run_dir == "true"
    assert cli.parse(["--run_dir", "a=true"]).config.run_dir == "a=true"


@pytest.mark.parametrize(
    ("flag", "near"),
    [
        ("--bath_size", "--batch_size"),
        ("--bath-size=3", "--batch_size"),
        ("--batchsize", "--batch_size"),
        ("--evl", "--eval"),
        ("--reports", "--report"),
        ("-seed", "--seed"),
        ("--no-wandb", "--wandb"),
        ("--gamma", "--discount"),  # as other programs call it
        ("--logdir=3", "--run_dir"),
    ],
)
def test_a_misspelt_flag_is_told_the_near_name(flag, near):
    """Also with hyphens, a value, or the dashes wrong; and no flag can be abbreviated."""
    assert refusal([flag, "3"]) == f"unknown flag {flag.split('=')[0]}: did you mean {near}?"
    assert refusal(["--xyzzy", "3"]) == "unknown flag --xyzzy: see python run.py --help"
    assert refusal(["--batch_siz", "3"]).startswith("unknown flag --batch_siz: ")
    for flag in ("--epochs", "--log", "--resume", "--name"):  # no field is near
        assert refusal([flag, "3"]) == f"unknown flag {flag}: see python run.py --help"
    assert set(cli.ELSEWHERE.values()) <= FIELDS.keys() and not cli.ELSEWHERE.keys() & FIELDS.keys()


# ------------------------------------------------------------------------------------------ fields


def beyond(kind: type, allowed: Range) -> list[float]:
    """Values just outside a range."""
    step = 1 if kind is int else 1e-3
    values = [allowed.low if allowed.above else allowed.low - step, allowed.high + step, float("nan")]
    return [kind(value) if abs(value) < float("inf") else value for value in values]


def within(kind: type, allowed: Range) -> list[float]:
    """Values just inside of it."""
    values = [allowed.low + (1e-3 if allowed.above else 0), allowed.high, allowed.low + 1]
    return [kind(value) for value in values if value < float("inf")]


RANGES = {name: mark for name in FIELDS for mark in parts(name)[1] if isinstance(mark, Range)}


@pytest.mark.parametrize("name", RANGES)
def test_values_beyond_a_fields_range_are_refused(name):
    """The line names field, value and the bound; the values on this side of the bounds are taken."""
    kind, allowed = parts(name)[0], RANGES[name]
    for value in within(kind, allowed):
        cli.check_fields(dataclasses.replace(Config(), **{name: value}))
    for value in beyond(kind, allowed):
        with pytest.raises(UserError) as caught:
            cli.check_fields(dataclasses.replace(Config(), **{name: value}))
        low = f"{'above' if allowed.above else 'at least'} {allowed.low:g}"
        high = "" if allowed.high == float("inf") else f" and at most {allowed.high:.10g}"
        wrong = f"{name} {value} is out of range: it must be {low}{high}", f"{name} {value!r} is of the wrong type"
        assert str(caught.value).startswith(wrong[kind is int and isinstance(value, float)])


@pytest.mark.parametrize("name", {(parts(name)[0], allowed): name for name, allowed in RANGES.items()}.values())
def test_values_beyond_the_bounds_of_each_type_are_refused_as_flags(name):
    """One field of each type with a range: on either side, with a space and with `=`, negative numbers included."""
    kind, allowed = parts(name)[0], RANGES[name]
    for value in [
        *beyond(kind, allowed)[: 2 if allowed.high < float("inf") else 1],
        *(["nan", "inf"] * (kind is float)),
    ]:
        for argv in ([f"--{name}", str(value)], [f"--{name}={value}"]):
            assert refusal(argv).startswith(f"{name} {value} is out of range: it must be a")
    wrong = {int: "2.5", float: "much"}[kind]
    words = {int: "a whole number", float: "a number"}[kind]
    assert refusal([f"--{name}", wrong]) == f"{name} '{wrong}' is of the wrong type: it must be {words}"


@pytest.mark.parametrize("name", [name for name in FIELDS if typing.get_origin(parts(name)[0]) is Literal])
def test_other_words_than_a_fields_are_refused(name):
    """The line names field, value and all that is valid; the words of the type are taken."""
    choices = typing.get_args(parts(name)[0])
    for choice in choices:
        cli.check_fields(dataclasses.replace(Config(), **{name: choice}))
    assert refusal([f"--{name}", "nonsense"]) == f"{name} nonsense is unknown; valid: {', '.join(map(str, choices))}"
    with pytest.raises(UserError, match=f"{name} nonsense is unknown; valid: "):
        cli.check_fields(dataclasses.replace(Config(), **{name: "nonsense"}))


def test_every_field_has_a_type_that_is_checked():
    """A field whose type says nothing about its values is a text, a bool or a tuple of names."""
    for name in FIELDS:
        kind, marks = parts(name)
        checked = name in RANGES or typing.get_origin(kind) is Literal or kind in (str, bool)
        assert checked or typing.get_origin(kind) is tuple, name
        assert set(marks) <= {"env", "fixed", "kept", RANGES.get(name)}, name


def test_a_constant_more_is_one_line(tmp_path):
    """A line added to Config is a flag with a check and a help text, a keyword of make_env, and fixed, if so marked."""
    for path in (*ROOT.glob("*.py"), ROOT / "runtime"):
        copy = shutil.copytree if path.is_dir() else shutil.copy
        copy(path, tmp_path / path.name)
    text = (tmp_path / "train.py").read_text()
    line = "    extra: Env[Fixed[Share]] = 0.5  # a constant that was added\n"
    (tmp_path / "train.py").write_text(text.replace("    # run\n", f"{line}    # run\n", 1))
    code = """
from runtime import cli
command = cli.parse(["--extra", "0.7"])
assert command.given == {"extra": 0.7} and command.config.extra == 0.7 == cli.env_options(command.config)["extra"]
assert cli.parse([]).config.extra == 0.5 and "extra" in cli.marked("fixed")
for value in ("1.5", "much"):
    try:
        cli.parse(["--extra", value])
        raise AssertionError(value)
    except cli.UserError as error:
        print(error)
cli.parse(["--help"])
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    first, second, *rest = done.stdout.splitlines()
    assert first == "extra 1.5 is out of range: it must be at least 0 and at most 1"
    assert second == "extra 'much' is of the wrong type: it must be a number"
    assert "a constant that was added" in " ".join(rest)


@pytest.mark.parametrize(
    "change",
    [{"capacity": 2.5e5}, {"discount_head": "false"}, {"steps": "1000"}, {"cameras": "agentview"}, {"horizon": True}],
)
def test_an_edited_constant_of_the_wrong_type_is_refused(change):
    """What no flag could give, an edit of the constants can: the field, the value and what is valid."""
    ((name, value),) = change.items()
    with pytest.raises(UserError, match=f"{name} {value!r} is of the wrong type: it must be"):
        cli.check_config(dataclasses.replace(Config(), **change))


# ------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--bath_size 3", ["--bath_size", "--batch_size"]),
        ("--batch_size 0", ["batch_size", "0", "at least 1"]),
        ("--batch_size -3", ["batch_size", "-3"]),
        ("--batch_size 2.5", ["batch_size", "2.5", "a whole number"]),
        ("--discount 1.5", ["discount", "1.5", "at most 1"]),
        ("--discount nan", ["discount", "nan"]),
        ("--image_size 37", ["image_size", "37", "32, 64, 128"]),
        ("--horizon 0", ["horizon", "0"]),
        ("--eval_steps 15 --action_repeat 2", ["eval_steps", "15", "multiple", "action_repeat 2"]),
        ("--episode_steps 15 --action_repeat 2", ["episode_steps", "15", "multiple", "action_repeat 2"]),
        ("--eval a --report b", ["eval", "a", "--report"]),
        ("--report a --steps 5", ["steps", "5", "--report"]),
        ("--report a --task Lift --steps 5", ["steps", "5", "--report"]),
        ("--discount abc", ["discount", "abc", "a number"]),
        ("--seed abc", ["seed", "abc", "a whole number"]),
        ("--preset large", ["preset", "large", "standard, cpu, debug, paper"]),
        ("--device tpu", ["device", "tpu", "cuda, mps, cpu"]),
        ("--precision half", ["precision", "half", "bfloat16"]),
        ("--reward_shaping maybe", ["reward_shaping", "maybe", "true, false"]),
        ("--capacity 3", ["capacity", "3", "prefill"]),
        ("--steps 10", ["steps", "10", "prefill"]),
        ("--preset debug --steps 60", ["steps 60", "prefill 60", "60 control steps"]),
        ("--actor_grad none", ["actor_grad", "none", "reinforce"]),
        ("--grad_heads decoder rewards", ["grad_heads", "rewards", "discount"]),
        ("--eval /no/such/run", ["/no/such/run"]),
        ("--report /no/such/run", ["/no/such/run"]),
        ("--eval", ["eval", "value"]),
        ("--report", ["--report", "run folder"]),
        ("--batch_size", ["batch_size", "value", "a whole number"]),
        ("--save_replay", ["save_replay", "value", "true or false"]),
        ("--wandb", ["wandb", "value", "auto, online, offline"]),
        ("--seed 0 1", ["1 is no flag", "one value"]),
        ("seed=3", ["seed=3 is no flag: did you mean --seed=3?"]),
        ("--image_size", ["image_size", "value", "32, 64, 128"]),
        ("--cameras agentview,,sideview", ["cameras 'agentview,,sideview' lack a name"]),
        ("--cameras", ["cameras '' lack a name"]),
        ("--cameras a,b,a", ["cameras 'a,b,a' name one twice"]),
        ("--camera_radius -0.1", ["camera_radius", "-0.1", "at least 0"]),
        ("--rotation_scale 0", ["rotation_scale", "0", "above 0 and at most 1"]),
        ("--rotation_scale 1.5", ["rotation_scale", "1.5", "above 0 and at most 1"]),
        ("--grad_heads=", ["grad_heads '' is unknown", "decoder"]),
        ("stray", ["stray", "--help"]),
        ("--eval ~nobody_of_that_name/run", ["~nobody_of_that_name/run"]),
        ("--run_dir /proc/run", ["run_dir", "/proc/run"]),
        ("--wandb maybe", ["wandb", "maybe", "offline"]),
        ("--seed 4294967296", ["seed", "4294967296", "4294967295"]),
        ("--preset debug --capacity 60", ["capacity", "60", "57", "prefill"]),
        (f"--run_dir {LONG}", ["run_dir", "too long"]),
        (f"--eval {LONG}", ["policy x", "too long"]),
        (f"--report {LONG}", ["--report", "too long"]),
    ],
)
def test_bad_input_gets_one_line_that_names_it(flags, words, tmp_path, capsys, monkeypatch):
    """Exit code 2, one line with field, value and what is valid, and nothing made."""
    monkeypatch.chdir(tmp_path)
    started = time.monotonic()
    assert run.main(flags.split(), FakeEnv) == 2
    assert time.monotonic() - started < 10
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and all(word in error for word in words), error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--task Lfit", ["task", "Lfit", "Lift"]),
        ("--robot Pandda", ["robot", "Pandda", "Panda"]),
        ("--controller OSC", ["controller", "OSC", "OSC_POSE"]),
        ("--cameras sideview nowhere", ["cameras", "nowhere", "agentview"]),
        ("--control_freq 15", ["control_freq", "15", "20"]),
        ("--task TwoArmLift", ["TwoArmLift"]),
        ("--action_repeat 7", ["action_repeat", "7"]),
    ],
)
def test_what_robosuite_does_not_know_is_refused_in_one_line(flags, words, tmp_path, capsys, monkeypatch):
    """The environment's own refusals reach the user the same way."""
    monkeypatch.chdir(tmp_path)
    assert run.main(["--preset", "debug", *flags.split()]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and all(word in error for word in words), error
    assert list(tmp_path.iterdir()) == []


def test_a_machine_that_cannot_render_gets_one_line(tmp_path, capsys, monkeypatch):
    """The environment's hint on what to install, exit code 1, no traceback."""

    def cannot_render(**_):
        raise RuntimeError("no OpenGL library; on Debian or Ubuntu: apt-get install libegl1")

    monkeypatch.chdir(tmp_path)
    assert run.main(TINY.split(), cannot_render) == 1
    line = r"error: RuntimeError: no OpenGL library; on Debian or Ubuntu: apt-get install libegl1 \(test_cli.py:\d+\)\n"
    assert re.fullmatch(line, capsys.readouterr().err)


def test_an_empty_flag_is_no_command_to_train(tmp_path, capsys, monkeypatch):
    """An unset variable of a shell, as in `--eval "$RUN"`, starts nothing."""
    monkeypatch.chdir(tmp_path)
    for argv in (["--eval", ""], ["--eval="], [""], ["--report", ""], ["--report="], ["--report", "a", ""]):
        assert run.main(argv, FakeEnv) == 2
        assert capsys.readouterr().err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("target", ["gone", "gone/deeper"])
def test_a_link_to_nowhere_is_no_run_folder(target, tmp_path, capsys):
    """It is refused in one line, with where it leads, before an environment is built; and nothing is made."""

    def never(**_):
        raise AssertionError("an environment was built")

    (tmp_path / "run").symlink_to(tmp_path / target)
    assert train(tmp_path / "run", make_env=never) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and f"run_dir {tmp_path / 'run'}" in error and str(tmp_path / target) in error
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


# ------------------------------------------------------------------------------------------ run folders


def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch, capsys):
    """In --run_dir, --eval and --report, also behind `=`, where a shell leaves it; and in an edited Config."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    assert run.main([*TINY.split(), "--run_dir=~/runs/a"], FakeEnv) == 0
    assert newest(tmp_path / "home/runs/a")["step"] == 100
    assert run.main(["--eval=~/runs/a", "--eval_episodes", "1"], FakeEnv) == 0
    assert run.main(["--eval", "~/runs/a/policy.pt", "--eval_episodes", "1"], FakeEnv) == 0
    assert cli.parse(["--report", "~/runs/a", "~/runs/b"]).report == [tmp_path / "home/runs" / name for name in "ab"]
    assert cli.run_dir(dataclasses.replace(Config(), run_dir="~/runs/a")) == tmp_path / "home/runs/a"
    assert cli.run_dir(dataclasses.replace(Config(), run_dir="~nobody_of_that_name/a")) == Path(
        "~nobody_of_that_name/a"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["home"]


def test_rotations_decide_a_run_only_if_there_are_any():
    """Its replay holds what commands of the old scale did, unless the controller only moves the hand."""
    config = Config()
    saved = dataclasses.asdict(dataclasses.replace(config, rotation_scale=1.0))
    with pytest.raises(UserError, match="rotation_scale 0.02 does not fit the run in old, made with 1.0"):
        cli.check_same_run(Path("old"), saved, config)
    cli.check_same_run(Path("old"), saved, dataclasses.replace(config, rotation_scale=1.0))
    cli.check_same_run(
        Path("old"), saved | {"controller": "OSC_POSITION"}, dataclasses.replace(config, controller="OSC_POSITION")
    )  # has no rotations


@pytest.mark.parametrize("name", [*cli.marked("fixed"), *cli.marked("kept")])
def test_what_weights_or_episodes_depend_on_is_fixed(name, capsys):
    """Each field marked `fixed` or `kept` is refused with both values where a run goes on; equal ones are taken."""
    other = {"image_size": 128, "cameras": ("sideview",), "rotation_scale": 0.5}
    value = getattr(Config(), name)
    saved = dataclasses.asdict(Config())
    saved[name] = other.get(name, not value if isinstance(value, bool) else f"{value}_" if value == str(value) else 77)
    with pytest.raises(
        UserError, match=f"^{name} .* does not fit the run in old, made with .*: choose another --run_dir"
    ):
        cli.check_same_run(Path("old"), saved, Config())
    cli.check_same_run(Path("old"), dataclasses.asdict(Config()), Config())
    assert capsys.readouterr().out == ""


def test_a_checkpoint_that_lacks_a_fixed_constant_or_has_an_unknown_one_is_refused():
    """It is of another release, whose constant may have been another; any other constant may be missing."""
    saved = dataclasses.asdict(Config())
    with pytest.raises(UserError, match="^the run in old is from another release, with old_scale: choose another"):
        cli.check_same_run(Path("old"), saved | {"old_scale": 2.0}, Config())
    assert cli.check_same_run(Path("old"), saved | {"run_dir": "new"}, Config()) == []
    del saved["model_lr"]
    assert cli.check_same_run(Path("old"), saved, Config()) == [f"model_lr new -> {Config.model_lr}"]
    del saved["deter"]
    with pytest.raises(UserError, match="^the run in old is from another release, without deter: choose another"):
        cli.check_same_run(Path("old"), saved, Config())


def test_other_shapes_are_refused_and_nothing_is_lost(tmp_path, capsys):
    """A run folder made with another model is named, with both values, and left as it was."""
    train(tmp_path / "run")
    files = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    assert train(tmp_path / "run", "--steps 200 --deter 12") == 2
    error = capsys.readouterr().err
    assert "deter 12" in error and "8" in error
    assert files == {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}


def test_an_edited_learning_rate_is_used_and_said(tmp_path, capsys):
    """Constants that are no shapes may change between runs."""
    train(tmp_path / "run")
    capsys.readouterr()
    assert train(tmp_path / "run", "--steps 140 --model_lr 0.001") == 0
    assert "model_lr 0.0003 -> 0.001" in capsys.readouterr().out
    assert newest(tmp_path / "run")["agent"]["model_optimizer"]["adam"]["param_groups"][0]["lr"] == 0.001


def test_a_replay_that_does_not_fit_is_refused(tmp_path, capsys, monkeypatch):
    """The preflight compares the replay with the memory that is free and proposes a capacity."""
    monkeypatch.setattr(cli, "free_memory", lambda: 1e5)
    assert train(tmp_path / "run") == 2
    assert "capacity" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_dreamer_parameter_counts_reach_the_preflight(tmp_path, capsys):
    """The preflight's figures are those of the modules."""
    train(tmp_path / "run")
    out = capsys.readouterr().out
    config = cli.parse(TINY.split()).config
    agent = Dreamer(config, (3, 64, 64), 4)
    assert f"world model {sum(p.numel() for p in agent.world_model.parameters()) / 1e6:.2f} M" in out
