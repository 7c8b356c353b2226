"""The program's own output: lines appear when they happen, and nothing that becomes of them ends a run."""

import contextlib
import io
import os
import re
import signal
import subprocess
import sys
import time

import pytest

import run
from fake_env import FakeEnv
from runtime import console
from test_run import ROOT, TINY, metrics, newest, start

FINISHED = "done: 100 steps"


def finished(run_dir) -> bool:
    """Whether a run is complete, and nothing that was printed went into its files."""
    names = {path.name for path in run_dir.iterdir()}
    assert {"config.json", "lock", "metrics.jsonl", "policy.pt", "replay", "videos"} <= names
    assert (run_dir / "lock").read_text() == ""
    assert "eval/return_mean" in metrics(run_dir)[-1]
    return newest(run_dir)["step"] == 100


@pytest.mark.parametrize("both", [False, True], ids=["stdout", "stdout and stderr"])
def test_a_pipe_whose_reader_has_ended_costs_nothing(both, tmp_path):
    """`python run.py | head -1`: training goes on to its end and exit code 0, without a traceback."""
    options = {"stderr": subprocess.STDOUT if both else subprocess.PIPE}
    process = start(tmp_path / "run", stdout=subprocess.PIPE, text=True, **options)
    assert process.stdout.readline().startswith("preset debug")
    process.stdout.close()
    errors = "" if both else process.stderr.read()
    assert process.wait(300) == 0, errors
    assert "Error" not in errors and finished(tmp_path / "run")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a file that is always full")
@pytest.mark.parametrize("redirect", [">/dev/full", ">/dev/full 2>&1"])
def test_a_log_on_a_full_disk_costs_nothing(redirect, tmp_path):
    """Training goes on to its end and exit code 0, and what can still be printed is no traceback."""
    process = start(tmp_path / "run", redirect=redirect, stderr=subprocess.PIPE, text=True)
    errors = process.communicate(timeout=300)[1]
    assert process.returncode == 0 and "Error" not in errors and finished(tmp_path / "run")


@pytest.mark.parametrize("redirect", ["2>&-", ">&-", "<&- >&- 2>&-"])
def test_a_missing_stream_costs_nothing(redirect, tmp_path):
    """Closed before the start: training goes on to exit code 0; no file of the run gets that stream's number."""
    process = start(tmp_path / "run", redirect=redirect, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    out, errors = process.communicate(timeout=300)
    assert process.returncode == 0 and errors == "" and (FINISHED in out) == (redirect == "2>&-")
    assert finished(tmp_path / "run")


def test_workers_and_w_and_b_live_without_streams_too(tmp_path):
    """Environments in processes of their own, and an offline W&B run, beside a closed stdout and stderr."""
    process = start(tmp_path / "run", "--num_envs 2 --prefill 40 --wandb offline", ">&- 2>&-")
    assert process.wait(300) == 0 and finished(tmp_path / "run")
    assert list((tmp_path / "run").glob("wandb/offline-run-*"))


class Talking(FakeEnv):
    """Prints more in each step than a buffer takes."""

    def step(self, action):
        print("x" * io.DEFAULT_BUFFER_SIZE)
        print("y", file=sys.stderr, flush=True)
        return super().step(action)


@pytest.mark.parametrize("num_envs", [1, 2])
def test_what_an_environment_prints_is_no_fault_of_it(num_envs, tmp_path):
    """Into a pipe that nobody reads any more, from this process or from workers: no episode ends for that."""
    flags, options = f"--num_envs {num_envs} --prefill 40", {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    process = start(tmp_path / "run", flags, make_env=Talking, **options)
    process.stdout.close()
    assert process.wait(300) == 0 and finished(tmp_path / "run")
    lengths = [line["episode/length"] for line in metrics(tmp_path / "run") if "episode/length" in line]
    assert lengths == [20] * (5 if num_envs == 1 else 4)  # five of the one; of each of the two, two


@pytest.mark.parametrize("number", [1, 2])
def test_a_closed_streams_number_goes_to_no_file(number, tmp_path):
    """What a C library or a child process prints there goes nowhere, and not into the file that was opened next."""
    code = """
import os, sys
from runtime import console
with console.tolerant_output(), open(sys.argv[1], "wb") as file:
    os.write(int(sys.argv[2]), b"noise")
    os.system(f"echo noise >&{sys.argv[2]}")
    file.write(b"data")
"""
    command = ["sh", "-c", f'exec "$@" {number}>&-', "sh", sys.executable, "-c", code, str(tmp_path / "a"), str(number)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert (tmp_path / "a").read_bytes() == b"data"


def test_an_error_without_a_stderr_keeps_its_exit_code(tmp_path):
    """Nobody can be told, but a script can ask."""
    assert start(tmp_path / "run", "--batch_size 0", "2>&-").wait(300) == 2
    assert start(tmp_path / "run", "--help", ">/dev/full", stderr=subprocess.DEVNULL).wait(300) == 0


def test_lines_appear_at_once_in_a_file(tmp_path):
    """Without PYTHONUNBUFFERED: a run that is killed after its first evaluation has left that evaluation's line."""
    log = tmp_path / "log"
    with open(log, "w") as file:
        process = start(tmp_path / "run", "--steps 100000 --save_replay false", stdout=file, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + 300
        while not any("eval/return_mean" in line for line in seen(tmp_path / "run")):
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.05)
        waited = time.monotonic() + 20  # the line is printed just after its metrics
        while "evaluation return" not in log.read_text() and time.monotonic() < waited:
            time.sleep(0.05)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    text = log.read_text()
    assert re.search(
        r"^step \d+ of 100000: evaluation return \d+\.\d .* success \d+% of 1 episodes$", text, re.MULTILINE
    ), text
    assert (
        text.index("preset debug") < text.index(": prefill") < text.index(": train") < text.index("evaluation return")
    )
    assert len(text) < io.DEFAULT_BUFFER_SIZE  # or a full buffer could have brought it


def seen(run_dir) -> list[dict]:
    """Whole lines of the metrics of a run that goes on."""
    with contextlib.suppress(OSError, ValueError):  # not there yet; a line in the making
        return metrics(run_dir)
    return []


class Fickle(io.StringIO):
    """A stream that refuses while it is told to."""

    refuses = False

    def write(self, text: str) -> int:
        if self.refuses:
            raise OSError(28, "No space left on device")
        return super().write(text)


@pytest.mark.parametrize("stream", [None, io.StringIO()], ids=["missing", "closed"])
def test_tolerant_streams_are_streams(stream):
    """Writing to no stream or to a closed one does nothing; neither is a terminal."""
    if stream is not None:
        stream.close()
    tolerant = console.Tolerant(stream)
    assert tolerant.write("text") == 4
    tolerant.flush()
    tolerant.release()
    assert stream is not None or tolerant.isatty() is False


def test_what_an_output_can_not_encode_is_escaped():
    """Instead of the whole line being lost."""
    data = io.BytesIO()
    stream = io.TextIOWrapper(data, encoding="ascii")
    console.Tolerant(stream).write("run folder Lernläufe\n")
    assert data.getvalue() == b"run folder Lernl\\xe4ufe\n"


def test_printing_goes_on_when_there_is_room_again(monkeypatch):
    """Lines that a full disk refused are lost, the ones after that are not; the streams are put back."""
    stream = Fickle()
    monkeypatch.setattr(sys, "stdout", stream)
    with console.tolerant_output():
        for number, refuses in enumerate((False, True, False)):
            stream.refuses = refuses
            console.say(f"line {number}")
        console.warn("something")
    assert sys.stdout is stream and stream.getvalue() == "line 0\nline 2\nwarning: something\n"


@pytest.mark.films
def test_output_that_fails_changes_no_exit_code(tmp_path, monkeypatch):
    """Also in a script's own process: a run, and a refusal."""
    stream = Fickle()
    stream.refuses = True
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setattr(sys, "stderr", stream)
    assert run.main([*TINY.split(), "--run_dir", str(tmp_path / "run")], FakeEnv) == 0
    assert run.main(["--bath_size", "3"], FakeEnv) == 2
    assert finished(tmp_path / "run")
