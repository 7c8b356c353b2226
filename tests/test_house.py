"""The house: who may import whom, how long a class may be, and how far it is from `main` to the loss."""

import ast
import traceback
from pathlib import Path

import pytest

from test_run import train as train_run
from train import WorldModel

ROOT = Path(__file__).parent.parent
FILES = [path for folder in (".", "runtime", "benchmarks", "results", "tests") for path in (ROOT / folder).glob("*.py")]
PROGRAM = [path for path in FILES if path.parent.name != "tests"]
OUTSIDE = {"benchmarks", "results", "tests"}  # scripts beside the program, which may import all of it
CLASS_LINES, RUN_LINES = 180, 260
CALLS = 5  # functions of the project from `main` on to the one that asks for the loss


def name(path: Path) -> str:
    """A file as an import names it; scripts and tests by their folder."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


NAMES = {name(path): path for path in FILES}


def imports(path: Path) -> set[str]:
    """The files of this repository that a file imports, anywhere in it, but for types alone."""
    found, skipped = set(), set()
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            skipped |= set(ast.walk(node))
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: {ast.unparse(node)}"
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    if path.parent.name == "tests":  # which are found without their folder
        found |= {f"tests.{module}" for module in found}
    return found & NAMES.keys()


GRAPH = {module: imports(path) for module, path in NAMES.items()}


def test_the_graph_is_that_of_the_files():
    """What this file says below is said of real imports."""
    assert {"train", "buffer", "runtime.cli", "runtime.envs"} <= GRAPH["run"]
    assert {"actor", "buffer", "image_codec", "networks", "rssm"} <= GRAPH["train"]
    assert "runtime.console" in GRAPH["runtime.cli"] and "tests.test_run" in GRAPH["tests.test_house"]


def test_only_run_imports_runtime():
    """The flat files tell the algorithm without what a run needs around it; so do render.py and fast.py."""
    flat = [path for path in FILES if path.parent == ROOT and path.name != "run.py"]
    assert {"train", "env", "image_codec", "rssm", "networks", "actor", "buffer", "fast"} <= {name(p) for p in flat}
    for path in flat:
        assert not {module for module in GRAPH[name(path)] if module.startswith("runtime")}, path.name


def test_nothing_in_the_program_imports_run_or_what_lies_beside_it():
    """run.py is the top; scripts and tests are imported by their own kind only."""
    for path in PROGRAM:
        own = path.parent.name if path.parent.name in OUTSIDE else None
        for module in GRAPH[name(path)]:
            folder = module.split(".")[0]
            assert folder not in OUTSIDE or folder == own, (path, module)
            assert module != "run" or own, path


def test_the_flat_files_are_layered():
    """env.py and buffer.py know nothing of learning; networks.py nothing of what is built from it; train.py no env."""
    flat = {module: {other for other in GRAPH[module] if "." not in other} for module in GRAPH if "." not in module}
    assert flat["networks"] == set() and flat["env"] <= {"render"}
    assert flat["image_codec"] | flat["rssm"] | flat["actor"] <= {"networks"}
    assert flat["buffer"] == set()
    assert not {"env", "render", "fast", "run"} & flat["train"]


def test_there_are_no_import_cycles():
    """In the whole repository, imports inside functions included."""
    done, path = set(), []

    def visit(module: str) -> None:
        assert module not in path, " -> ".join([*path[path.index(module) :], module])
        if module not in done:
            path.append(module)
            for other in sorted(GRAPH[module]):
                visit(other)
            done.add(path.pop())

    for module in GRAPH:
        visit(module)
    assert done == set(GRAPH)


@pytest.mark.parametrize("path", PROGRAM, ids=name)
def test_a_class_can_be_taken_in_at_once(path):
    """No class has more than 180 lines, and run.py has fewer than 260."""
    text = path.read_text()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ClassDef):
            assert node.end_lineno - node.lineno < CLASS_LINES, node.name  # the first line counts too
    assert path.name != "run.py" or text.count("\n") < RUN_LINES


def test_from_main_to_the_loss_in_five_calls(tmp_path, monkeypatch):
    """main, train, loop, train_step, and one half of an update: there the loss is asked for."""
    loss, stacks = WorldModel.loss, []

    def record(self, *args):
        frames = [
            frame for frame in traceback.extract_stack() if Path(frame.filename).parent in (ROOT, ROOT / "runtime")
        ]
        stacks.append([frame.name for frame in frames])
        return loss(self, *args)

    monkeypatch.setattr(WorldModel, "loss", record)
    assert train_run(tmp_path / "run") == 0
    assert stacks
    for stack in stacks:
        assert stack[:4] == ["main", "train", "loop", "train_step"] and len(stack) <= CALLS, stack
