"""`just setup` and constraints.txt: which Python and which versions a fresh machine gets."""

import os
import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from packaging.specifiers import SpecifierSet

import ws

HOME = Path(__file__).resolve().parents[1]
JUST = Path(sys.executable).parent / "just"
PYTHON = """#!/bin/sh
echo "$0 $*" >> "$CALLS"
case "$*" in
*version_info*) exit {fits} ;;
"-m venv"*) mkdir -p .venv/bin && cp "$0" .venv/bin/python ;;
esac
"""


@pytest.mark.parametrize("python", ["3.11.2", "3.12.0", "3.13.0"])
def test_every_pin_allows_the_pythons_that_the_readme_names(python):
    pins = re.findall(r"^([\w.-]+)==(\S+)$", (HOME / "constraints.txt").read_text(), flags=re.MULTILINE)
    assert len(pins) > 100
    refused = []
    for name, version in pins:
        try:
            found = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue  # on this system nothing needs it
        needs = found.metadata.get("Requires-Python") or ""
        if found.version.split("+")[0] == version and not SpecifierSet(needs).contains(python):
            refused.append(f"{name} {version} needs Python {needs}")
    assert refused == []


def test_what_one_cites_is_this_package():
    cited = yaml.safe_load((HOME / "CITATION.cff").read_text())
    project = tomllib.loads((HOME / "pyproject.toml").read_text())["project"]
    assert cited["version"] == ws.__version__ and cited["license"] == project["license"] == "MIT"
    assert cited["title"] == f"{project['name']}: {project['description'][0].lower()}{project['description'][1:]}"
    assert [author["name"] for author in cited["authors"]] == [author["name"] for author in project["authors"]]
    paper = cited["references"][0]
    number = paper["identifiers"][0]["value"].replace(":", " ")
    text = (HOME / "docs" / "method.md").read_text()
    assert paper["title"] in text and number in text and paper["authors"][0]["family-names"] in text


@pytest.fixture
def clone(tmp_path):
    """A folder with this project's setup and Pythons that only write down how they were called; runs `just setup`."""
    place, tools = tmp_path / "clone", tmp_path / "tools"
    place.mkdir(), tools.mkdir()
    for name in ("justfile", "pyproject.toml", "setup.py", "constraints.txt"):
        (place / name).write_text((HOME / name).read_text())
    for tool in ("sh", "cat", "cmp", "head", "grep", "mkdir", "cp"):
        (tools / tool).symlink_to(subprocess.check_output(["sh", "-c", f"command -v {tool}"], text=True).strip())

    def python(name: str, fits: bool) -> None:
        (tools / name).write_text(PYTHON.format(fits=int(not fits)))
        (tools / name).chmod(0o755)

    def setup(folder: Path = place) -> tuple[subprocess.CompletedProcess, list[str]]:
        calls = tmp_path / "calls"
        calls.write_text("")
        env = {"PATH": str(tools), "CALLS": str(calls), "HOME": str(tmp_path), "PWD": str(folder)}
        env |= {"TMPDIR": os.environ.get("TMPDIR", "/tmp")}
        run = subprocess.run([JUST, "setup"], cwd=folder, env=env, capture_output=True, text=True)
        return run, [line for line in calls.read_text().splitlines() if "version_info" not in line]

    return place, python, setup


def test_setup_takes_a_python_that_fits_and_does_nothing_again(clone):
    _, python, setup = clone
    python("python3", fits=False)
    python("python3.12", fits=True)
    run, calls = setup()
    assert run.returncode == 0 and calls[0].endswith("python3.12 -m venv --clear .venv"), run.stderr
    assert len(calls) == 3 and "torch==" in calls[1] and calls[2].endswith("-e .[dev]")
    assert setup()[1] == []


def test_setup_without_a_python_says_so_in_one_line(clone):
    _, python, setup = clone
    python("python3", fits=False)
    run, calls = setup()
    assert run.returncode == 1 and calls == []
    (line,) = run.stderr.splitlines()
    assert "Python 3.11 or newer" in line and "python3-venv" in line


def test_a_link_to_a_clone_keeps_its_environment_and_a_moved_clone_gets_a_new_one(clone, tmp_path):
    place, python, setup = clone
    python("python3", fits=True)
    setup()
    (tmp_path / "link").symlink_to(place)
    assert setup(tmp_path / "link")[1] == []
    place.rename(tmp_path / "moved")
    calls = setup(tmp_path / "moved")[1]
    assert calls[0].endswith("-m venv --clear .venv") and len(calls) == 3


def test_an_environment_whose_python_went_away_is_made_anew(clone):
    place, python, setup = clone
    python("python3", fits=True)
    setup()
    (place / "constraints.txt").write_text((place / "constraints.txt").read_text() + "# another\n")
    assert len(setup()[1]) == 2  # an update
    (place / "constraints.txt").write_text((place / "constraints.txt").read_text() + "# and another\n")
    (place / ".venv/bin/python").unlink()
    calls = setup()[1]
    assert calls[0].endswith("-m venv --clear .venv") and len(calls) == 3
