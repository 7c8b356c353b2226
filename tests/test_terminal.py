"""What a terminal shows and sends: lines above the progress bar, streams that end, signals."""

import io
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from runtime import console
from runtime.console import ProgressBar, Stopped, StopSignals, say, tolerant_output, warn

ROOT = Path(__file__).parent.parent


class Stream(io.StringIO):
    """One of the two streams of a terminal; `screen` is shared."""

    def __init__(self, screen: list[str], fails: bool = False):
        super().__init__()
        self.screen, self.fails = screen, fails

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        if self.fails:
            raise OSError("the terminal was closed")
        self.screen.append(text)
        return len(text)


def shown(screen: list[str]) -> list[str]:
    """The lines of a terminal: a carriage return goes back to the beginning, and later characters replace earlier."""
    lines, column = [""], 0
    for character in "".join(screen):
        if character == "\n":
            lines.append("")
            column = 0
        elif character == "\r":
            column = 0
        else:
            lines[-1] = lines[-1][:column].ljust(column) + character + lines[-1][column + 1 :]
            column += 1
    return [line.rstrip() for line in lines]


def terminal(monkeypatch) -> list[str]:
    """From now on, stdout and stderr are a terminal of 80 columns; what they were sent."""
    screen: list[str] = []
    monkeypatch.setattr(sys, "stdout", Stream(screen))
    monkeypatch.setattr(sys, "stderr", Stream(screen))
    monkeypatch.setenv("COLUMNS", "80")
    return screen


def test_lines_stand_above_the_bar(monkeypatch):
    """Each whole and on a line of its own, in order; below them there is one bar, which goes on."""
    screen = terminal(monkeypatch)
    with tolerant_output():
        bar = ProgressBar(1000, 0)
        bar.show("train")
        bar.move(100)
        say("one")
        bar.move(200)
        warn("two")
        bar.move(300)
        say("three")
        lines = shown(screen)
        bar.close()
    assert lines[:3] == ["one", "warning: two", "three"]
    assert len(lines) == 4 and lines[3].startswith("train 30%|") and "300/1.00k" in lines[3]


def test_a_line_without_a_bar_is_a_line(capsys):
    """Also before and after there is one; it is flushed at once."""
    say("before")
    bar = ProgressBar(10, 0)
    bar.close()
    warn("after")
    assert capsys.readouterr().out == "before\nwarning: after\n"


def test_a_terminal_that_is_closed_stops_neither_bar_nor_lines(monkeypatch):
    """As when a window is closed under nohup."""
    screen = terminal(monkeypatch)
    with tolerant_output():
        bar = ProgressBar(1000, 0)
        sys.stdout.stream.fails = sys.stderr.stream.fails = True
        for step in range(100, 1001, 100):
            bar.move(step)
            say("line")
        bar.close()
    assert "0%|" in "".join(screen) and "line" not in "".join(screen)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a file that is always full")
@pytest.mark.parametrize("redirect", [">/dev/full", ">&-", "2>&-", ">&- 2>&-", "| true", ">/dev/full 2>&1"])
def test_output_that_cannot_be_written_changes_no_exit_code(redirect):
    """Full, closed, missing: neither a traceback nor another code, also where the interpreter flushes at its end."""
    code = """
import sys, runtime.console
with runtime.console.tolerant_output():
    for _ in range(20):
        runtime.console.say("x" * 10000)
sys.exit(7)
"""
    command = f'set -o pipefail; {sys.executable} -c "$0" {redirect}'
    done = subprocess.run(["bash", "-c", command, code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 7 and done.stderr == ""
    assert done.stdout == ("x" * 10000 + "\n" if redirect == "2>&-" else "") * 20


# ------------------------------------------------------------------------------------------ signals


@pytest.fixture(autouse=True)
def no_signal_is_ignored() -> Iterator[None]:
    """Also if a shell started the tests in the background, where it lets INT be ignored."""
    before = {number: signal.signal(number, signal.SIG_DFL) for number in StopSignals.NUMBERS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", StopSignals.NUMBERS)
def test_the_first_signal_is_noted_and_stops_at_the_next_check(number):
    """With its own number; afterwards the signal does what it did before."""
    before = [signal.getsignal(n) for n in StopSignals.NUMBERS]
    with StopSignals() as stop:
        stop.check()
        os.kill(os.getpid(), number)
        with pytest.raises(Stopped) as stopped:
            stop.check()
    assert stopped.value.args == (number,)
    assert [signal.getsignal(n) for n in StopSignals.NUMBERS] == before


@pytest.fixture
def clock(monkeypatch) -> list[float]:
    """The seconds that `StopSignals` sees, and the codes with which it has ended the process."""
    now = [100.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    return now


@pytest.fixture
def ends(monkeypatch) -> list[int]:
    codes: list[int] = []
    monkeypatch.setattr(console.os, "_exit", codes.append)
    return codes


def test_an_echo_within_a_second_is_the_same_signal(clock, ends):
    """`timeout` signals the process and then its group; the first number counts."""
    with StopSignals() as stop:
        for number, seconds in ((signal.SIGTERM, 0.0), (signal.SIGTERM, 0.5), (signal.SIGINT, 0.4)):
            clock[0] += seconds
            os.kill(os.getpid(), number)
        with pytest.raises(Stopped) as stopped:
            stop.check()
    assert stopped.value.args == (signal.SIGTERM,) and ends == []


def test_a_second_signal_ends_the_process_at_once(clock, ends):
    """With the first one's number. The state is saved first, unless the run is about to do that."""
    for seen, saved in ((False, [signal.SIGTERM]), (True, [])):
        left: list[int] = []
        with StopSignals() as stop:
            stop.leave = left.append
            os.kill(os.getpid(), signal.SIGTERM)
            if seen:
                with pytest.raises(Stopped):
                    stop.check()
            clock[0] += StopSignals.ECHO + 0.1
            os.kill(os.getpid(), signal.SIGINT)
        assert left == saved and ends.pop() == 128 + signal.SIGTERM


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="needs the signals of Unix")
def test_an_ignored_signal_stays_ignored():
    """nohup ignores HUP for a run that is to outlive its terminal."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignals() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            stop.check()
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
