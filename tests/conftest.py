"""What the tests share: real environments, the author's recordings, and the table of errors against them."""

import os
import signal
from collections.abc import Iterator
from typing import Any

import pytest

# Tests share the cores, and so do the programs that they start. Runs stay in their process, where tests reach them.
os.environ["OMP_NUM_THREADS"] = "1"

import faults
import simulated
from runtime import console
from runtime.device import load_triton

load_triton()  # before the first test that draws
REFERENCE_ERRORS = "reference_errors"  # name of a property of reports, which workers send
FILES_A_TABLE = 7  # columns


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--reference", metavar="DIR", help="recordings to replay, by default those in tests/reference")


def pytest_configure(config: pytest.Config) -> None:
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in the background of a shell without job control
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:  # as under nohup
        signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(autouse=True)
def nothing_told_yet() -> None:
    """What a test is warned of once, it is warned of whatever tests before it were warned of."""
    console.told.clear()


@pytest.fixture(autouse=True)
def no_videos(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs in this process film only in tests marked `films`: that takes half of a tiny run, and decides nothing."""
    if not request.node.get_closest_marker("films"):
        faults.without_videos(monkeypatch)


@pytest.fixture
def reference_errors(request: pytest.FixtureRequest) -> list:
    """Rows (file, quantity, error, tolerance) that are printed when all tests have run."""
    rows: list = []
    request.node.user_properties.append((REFERENCE_ERRORS, rows))
    return rows


@pytest.fixture(scope="module")
def lift() -> Iterator[Any]:
    """Our Lift, built once for a file of tests."""
    environment = simulated.build()
    yield environment
    environment.close()


@pytest.fixture(scope="module")
def plain(lift: Any) -> Iterator[Any]:
    """RoboSuite without us (`lift` has set up rendering); soft resets, the only ones that can be seeded."""
    import robosuite

    task = robosuite.make(
        "Lift",
        robots="Panda",
        has_renderer=False,
        renderer="mujoco",
        use_camera_obs=True,
        camera_names=["agentview", "robot0_eye_in_hand"],
        camera_heights=64,
        camera_widths=64,
        control_freq=20,
        reward_shaping=True,
        hard_reset=False,
        seed=simulated.ARGUMENTS["seed"],
    )
    yield task
    task.close()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    worst: dict[str, dict[str, float]] = {}
    tolerances: dict[str, float] = {}
    reports = terminalreporter.getreports("passed") + terminalreporter.getreports("failed")
    properties = [x for report in reports if report.when == "call" for x in report.user_properties]
    errors = [row for name, rows in properties if name == REFERENCE_ERRORS for row in rows]
    for file, quantity, error, tolerance in errors:
        row = worst.setdefault(quantity, {})
        row[file] = max(error, row.get(file, 0.0))
        tolerances[quantity] = tolerance
    files = sorted({file for row in worst.values() for file in row})
    for first in range(0, len(files), FILES_A_TABLE):
        shown = files[first : first + FILES_A_TABLE]
        widths = {file: max(10, len(file) + 1) for file in shown}
        terminalreporter.section("largest relative errors against the author's recordings")
        names = "".join(f"{file:>{widths[file]}}" for file in shown)
        terminalreporter.write_line(f"{'quantity':<42}{'tolerance':>9}{names}")
        for quantity, row in worst.items():
            if any(file in row for file in shown):
                cells = (_cell(row.get(file), tolerances[quantity]).rjust(widths[file]) for file in shown)
                terminalreporter.write_line(f"{quantity:<42}{tolerances[quantity]:>9.0e}{''.join(cells)}")


def _cell(error: float | None, tolerance: float) -> str:
    if error is None:
        return ""
    return f"{error:.1e}" if error <= tolerance else f"!{error:.1e}"
