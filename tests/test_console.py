"""What a run prints: dropped where nobody reads, without orders to the terminal, in any encoding."""

import os
import subprocess
import sys

from conftest import ROOT

CODE = r"""
import sys
from storage.console import protect_output
protect_output()
print("a" * 100_000, flush=True)
print("\u00e9", file=sys.stderr)
raise ValueError("first\ncat\x1b[31m\x9b2J\u202e\udcff.jpg")
"""


def test_output_is_dropped_where_nobody_reads_and_escaped_where_somebody_does():
    """/dev/full refuses every byte. The name has colours, clears the screen, turns the line around, and is no UTF-8."""
    with open("/dev/full", "w") as full:
        environment = os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONUNBUFFERED": ""}
        command = [sys.executable, "-c", CODE]
        ended = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, env=environment, cwd=ROOT)
    assert ended.returncode == 1
    lines = ended.stderr.decode("ascii").splitlines()
    assert lines[:2] == [r"\xe9", "Traceback (most recent call last):"]
    assert lines[-2:] == ["ValueError: first", r"cat\x1b[31m\x9b2J\u202e\udcff.jpg"]
