"""Commands beside other programs: torch's threads wait asleep, unless the user has said how they wait."""

import os
import sys
from pathlib import Path
from subprocess import run

import pytest

from sparsefeat.cli import neighbours


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """os.environ without a word about waiting, on four processors, and the system's file of what is at work."""
    for name in neighbours.SAID_BY_USER:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    monkeypatch.setattr(neighbours, "LOAD", tmp_path / "loadavg")
    yield tmp_path / "loadavg"
    monkeypatch.setenv("OMP_WAIT_POLICY", "")  # put back what was there before


@pytest.mark.parametrize(
    ("text", "waits"),
    [
        ("0.50 0.40 0.30 3/120 4242", "passive"),  # this one and two others
        ("0.50 0.40 0.30 2/120 4242", None),
        ("9.00 9.00 9.00 1/120 4242", None),  # it was busy
        ("", None),
        ("no such system", None),
    ],
)
def test_with_half_the_processors_at_work_for_others_it_waits_asleep(environment: Path, text: str, waits: str | None):
    environment.write_text(text)
    neighbours.wait_asleep_beside_others()
    assert os.environ.get("OMP_WAIT_POLICY") == waits


def test_a_system_that_does_not_tell_is_left_alone(environment: Path):
    neighbours.wait_asleep_beside_others()
    assert "OMP_WAIT_POLICY" not in os.environ


@pytest.mark.parametrize("said", [{"OMP_WAIT_POLICY": "active"}, {"GOMP_SPINCOUNT": "7"}])
def test_what_the_user_has_said_stands(environment: Path, said: dict[str, str], monkeypatch: pytest.MonkeyPatch):
    environment.write_text("0.50 0.40 0.30 9/120 4242")
    for name, value in said.items():
        monkeypatch.setenv(name, value)
    neighbours.wait_asleep_beside_others()
    assert {name: os.environ[name] for name in neighbours.SAID_BY_USER if name in os.environ} == said


def test_a_command_says_so_before_torch_is_there():
    """OpenMP asks once, when it is loaded."""
    code = """
import os, sys
from sparsefeat.cli import neighbours
from sparsefeat.cli.commands import hookpoints
neighbours._others_at_work = lambda: os.cpu_count()
assert "torch" not in sys.modules
from typer.testing import CliRunner
from sparsefeat.cli import app
answer = CliRunner().invoke(app, ["hookpoints", "--pipeline", "nowhere-at-all"])
assert "torch" not in sys.modules or os.environ["OMP_WAIT_POLICY"] == "passive"
print(os.environ["OMP_WAIT_POLICY"], answer.exit_code)
"""
    environment = {name: value for name, value in os.environ.items() if name not in neighbours.SAID_BY_USER}
    told = run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert told.stdout.split() == ["passive", "2"], told.stderr
