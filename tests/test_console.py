"""What a run prints: dropped where nobody reads, without orders to the terminal, in any encoding."""

import os
import subprocess
import sys

import pytest
from conftest import ROOT

from storage.console import refuse

CODE = r"""
import os, sys
from storage.console import protect_output
protect_output()
name = "first\ncat\x1b[31m\x9b2J\u202e\udcff.jpg"
print(name, flush=True)
os.dup2(os.open("/dev/full", os.O_WRONLY), 1)
print("a" * 100_000, flush=True)
print("\u00e9", file=sys.stderr)
raise ValueError(name)
"""


def test_output_is_dropped_where_nobody_reads_and_escaped_where_somebody_does():
    """/dev/full refuses every byte. The name has colours, clears the screen, turns the line around, and is no UTF-8."""
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONUNBUFFERED": ""}
    ended = subprocess.run([sys.executable, "-c", CODE], capture_output=True, env=environment, cwd=ROOT)
    assert ended.returncode == 1
    assert ended.stdout.decode("ascii").splitlines() == ["first", r"cat\x1b[31m\x9b2J\u202e\udcff.jpg"]
    lines = ended.stderr.decode("ascii").splitlines()
    assert lines[:2] == [r"\xe9", "Traceback (most recent call last):"]
    assert lines[-2:] == ["ValueError: first", r"cat\x1b[31m\x9b2J\u202e\udcff.jpg"]


@pytest.mark.parametrize(("terminal", "no_color", "coloured"), [(1, "", 1), (1, "1", 0), (0, "", 0)])
def test_errors_are_red_on_a_terminal_alone_and_not_where_somebody_wants_none(
    terminal, no_color, coloured, monkeypatch, capsys
):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: bool(terminal))
    monkeypatch.setenv("NO_COLOR", no_color)
    with pytest.raises(SystemExit):
        refuse("--epochs 0\x1b[2J")
    said = capsys.readouterr().err
    assert said == ("\x1b[31merror:\x1b[0m" if coloured else "error:") + " --epochs 0\\x1b[2J\n"
