"""What a run says to the person who started it, and what that person's system says to it: lines, errors, signals.

Three exceptions reach the user. `main` turns each of them into one line and an exit code.
"""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, TextIO

from tqdm import tqdm


class UserError(Exception):
    """The user's mistake, told in one line; exit code 2."""


class Failure(Exception):
    """What the program can't go on with, told in one line; exit code 1."""


class Stopped(Exception):
    """A signal asked the program to stop; carries its number; exit code 128 + that number."""


def say(line: str) -> None:
    """Print a line at once, above the progress bar if there is one."""
    tqdm.write(line)
    sys.stdout.flush()


def warn(line: str) -> None:
    """Print a line that begins with `warning:`."""
    say(f"warning: {line}")


told: set[str] = set()  # what `warn_once` has warned of in this run


def warn_once(what: str, line: str) -> None:
    """Warn, unless this run has warned of `what` already: the lines of one trouble may differ."""
    if what not in told:
        told.add(what)
        warn(line)


class Tolerant:
    """A text stream that writes at once and drops what its file does not take, so that no run ends for its output.

    A file refuses when its disk is full, when the program behind a pipe has ended, and when a terminal is closed.
    """

    def __init__(self, stream: TextIO | None):
        self.stream = stream

    def write(self, text: str) -> int:
        """Write and flush, or drop the text."""
        if self.stream is not None:
            encoding = getattr(self.stream, "encoding", None) or "utf-8"
            text = text.encode(encoding, "backslashreplace").decode(encoding)
            with contextlib.suppress(OSError, ValueError):  # ValueError: the stream is closed
                self.stream.write(text)
                self.stream.flush()
        return len(text)

    def flush(self) -> None:
        """Flush, or drop what is left."""
        self.write("")

    def release(self) -> None:
        """Let the interpreter's own last flush succeed, by dropping what could not be written."""
        if self.stream is None:
            return
        try:
            self.stream.flush()
        except (OSError, ValueError):
            with contextlib.suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())

    def __getattr__(self, name: str) -> Any:
        """What else a stream has: encoding, isatty, fileno. A missing stream is no terminal."""
        if self.stream is None and name == "isatty":
            return lambda: False
        return getattr(self.stream, name)


@contextlib.contextmanager
def tolerant_output() -> Iterator[None]:
    """Inside, stdout and stderr are `Tolerant`: also for what libraries print and for the progress bar."""
    told.clear()
    _fill_standard_descriptors()
    out, err = Tolerant(sys.stdout), Tolerant(sys.stderr)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            yield
    finally:
        out.release()
        err.release()


def _fill_standard_descriptors() -> None:
    """If 0, 1 or 2 was closed (`2>&-`), open it on nothing: else the next file of the run would get that number.

    Whatever C libraries and child processes print there would then stand in that file.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest number that is free: this one


class StopSignals:
    """Inside, the first signal asks the run to stop: `check` then raises Stopped. A second one ends it at once.

    If no `check` has come until then, as an environment hangs, `leave` is called first, with the number of the first
    signal. After PATIENCE seconds without a `check` this happens without a second signal.

    These are the signals of a terminal (INT, HUP) and of schedulers (TERM, USR1, USR2, XCPU). One that is ignored, as
    HUP is under nohup, stays ignored. A second signal within a second is taken for the first one's echo: `timeout`
    sends its signal to the process and then to the process's group. XCPU never counts as a second signal: the kernel
    sends it again after each further second of processor time.
    """

    NUMBERS = signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU
    ECHO = 1.0  # seconds
    PATIENCE = 9.0  # seconds

    def __init__(self) -> None:
        self.number, self.since = 0, 0.0
        self.before: dict[int, Any] = {}
        self.leave: Callable[[int], None] = lambda _: None
        self.leaving = False  # the run knows of the first signal
        self.timer = threading.Timer(self.PATIENCE, self._insist)
        self.timer.daemon = True

    def __enter__(self) -> "StopSignals":
        for number in self.NUMBERS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                self.before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        self.timer.cancel()
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def check(self) -> None:
        """Raise Stopped if a signal has come. Handlers that an environment has put in place of ours are replaced."""
        if self.number:
            self.leaving = True
            self.timer.cancel()
            raise Stopped(self.number)
        for number in self.before:
            if signal.getsignal(number) != self._handle:
                signal.signal(number, self._handle)

    def _insist(self) -> None:
        """Send a second signal, one that is neither ignored nor handled by the environment."""
        for number in (signal.SIGTERM, *self.before):
            if signal.getsignal(number) == self._handle and number != signal.SIGXCPU:
                os.kill(os.getpid(), number)
                return

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if not self.number:
            self.number, self.since = number, time.monotonic()
            self.timer.start()
        elif number != signal.SIGXCPU and time.monotonic() - self.since > self.ECHO:
            try:
                if not self.leaving:
                    self.leaving = True
                    self.leave(self.number)
            finally:
                os._exit(128 + self.number)


class ProgressBar:
    """The bar of a run in a terminal; elsewhere, lines that say when each phase begins.

    Of `steps` control steps, `step` are done.
    """

    # Fits 80 columns: tqdm gives the bar itself what the words leave.
    FORMAT = "{desc} {percentage:.0f}%|{bar}|{n_fmt}/{total_fmt} {remaining} left, {rate_noinv_fmt}{postfix}"

    def __init__(self, steps: int, step: int):
        self.bar = tqdm(
            total=steps,
            initial=step,
            unit=" steps",
            unit_scale=True,
            smoothing=0.05,
            disable=None,
            dynamic_ncols=True,
            bar_format=self.FORMAT,
        )
        self.step, self.phase, self.note, self.episodes = step, "", "", ""

    def move(self, step: int) -> None:
        """The run has come to this control step."""
        self.bar.update(step - self.step)
        self.step = step

    def show(self, phase: str, note: str = "") -> None:
        """Name the phase and what it is at. An evaluation prints its result, so it needs no line of its own."""
        if (phase, note) == (self.phase, self.note):
            return
        if self.bar.disable and phase != self.phase and "evaluate" not in (phase, self.phase):
            say(f"step {self.step}: {phase}" + (f", {note}" if note else ""))
        self.phase, self.note = phase, note
        self.bar.set_description_str(phase, refresh=False)
        self.bar.set_postfix_str(note or self.episodes)

    def show_learning(self, updates: int, first: bool) -> None:
        """So many updates follow: many at once if they are a run's first."""
        if updates:
            self.show("pretrain" if first else "train", f"{updates} updates" if first else "")

    def show_episodes(self, text: str) -> None:
        """What the last episodes gave, where nothing else is to be told."""
        self.episodes = text
        self.bar.set_postfix_str(self.note or text, refresh=False)

    def close(self) -> None:
        """End the bar's line."""
        self.bar.close()
