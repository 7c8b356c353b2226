"""What README.md and docs/ say is there: their links, files, flags and commands."""

import dataclasses
import re
import shlex
from pathlib import Path

import pytest

from runtime import cli
from train import PRESETS, Config

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
OWN_FLAGS = {field.name for field in dataclasses.fields(Config)} | {"eval", "report", "help"}
# Of the other programs that the pages name: pip, sbatch and srun, wandb.
OTHER_FLAGS = set(
    [
        "index-url",
        "force-reinstall",
        "job-name",
        "array",
        "time",
        "cpus-per-task",
        "mem",
        "signal",
        "requeue",
        "open-mode",
        "output",
        "project",
    ]
)


def code_lines(page: Path) -> list[str]:
    """The lines of a page's fenced blocks."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)
    return [line.strip() for block in blocks for line in block.splitlines()]


def commands() -> list[tuple[str, str]]:
    """(page, flags) of each command in a fenced block that runs this program and has no variable of a shell in it."""
    lines = [(page.name, line.split("python run.py", 1)) for page in PAGES for line in code_lines(page)]
    return [(page, parts[1]) for page, parts in lines if len(parts) == 2 and "$" not in parts[1]]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_images_exist(page):
    """Every relative link and image leads to a file of the repository."""
    links = re.findall(r"\]\(([^)\s]+)\)", page.read_text())
    local = [link.split("#")[0] for link in links if not link.startswith(("http", "#"))]
    assert not [link for link in local if not (page.parent / link).exists()]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_to_headings_lead_to_one(page):
    """A link's `#part` is the heading of the page that it leads to."""
    for link in re.findall(r"\]\((?!http)([^)\s]*#[^)\s]+)\)", page.read_text()):
        name, part = link.split("#")
        target = (page.parent / name) if name else page
        headings = re.findall(r"^#+ (.+)$", target.read_text(), re.MULTILINE)
        assert part in {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_readme_is_short():
    """One reads it in five minutes."""
    assert len(README.read_text().split()) <= 1_050


@pytest.mark.parametrize("promise", ["python run.py", "python -m pytest"])
def test_the_two_promises_stand_word_for_word(promise):
    """They are what .ci/run checks in a fresh environment."""
    assert f"pip install -r requirements.txt && {promise}" in code_lines(README)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_flags_exist(page):
    """Every flag is a constant, one of `eval`, `report` and `help`, or known to be another program's."""
    text = re.sub(r"unknown flag --\w+", "", page.read_text())  # an error message
    flags = set(re.findall(r"(?<![\w-])--([a-z][\w-]*)", text))
    assert not flags - OWN_FLAGS - OTHER_FLAGS


@pytest.mark.parametrize(("page", "flags"), commands())
def test_commands_are_accepted(page, flags):
    """The command line takes every command as it stands."""
    cli.parse(shlex.split(flags, comments=True))


def test_the_table_of_files_is_true():
    """Every file that the README's table and diagram name exists."""
    table = re.findall(r"^\| (`.*?`) \|", README.read_text().split("## The code")[1], re.MULTILINE)
    files = {name for cell in table for name in re.findall(r"`([^`]+)`", cell)}
    diagram = set(re.findall(r"\b\w+\.py\b", README.read_text().split("## The code")[1].split("| file |")[0]))
    assert len(files) >= 10 and diagram <= files
    assert not [name for name in files if not (ROOT / name).exists()]


@pytest.mark.parametrize("preset", ["standard", "cpu"])
def test_all_departures_from_the_paper_are_explained(preset):
    """The tables have a flag for each constant in which the preset differs from `paper`; together they take it back."""
    here, paper = (vars(Config()) | PRESETS[name] for name in (preset, "paper"))
    different = {name for name in here if here[name] != paper[name]}
    tables = (ROOT / "docs" / "departures.md").read_text().split("## What `standard`")[1]
    given = cli.parse(shlex.split(" ".join(re.findall(r"`(--[^`]+)` \|$", tables, re.MULTILINE)))).given
    assert {name: given.get(name) for name in different} == {name: paper[name] for name in different}
