"""Mutated image files, checkpoints, packs and lists: read, or refused in a sentence; no crash, no hang, no code run."""

import collections
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SEED = 0
# The kind, and how many cases of it in the quick and in the full form.
COUNTS = {"images": (200, 1000), "checkpoints": (60, 300), "packs": (100, 300)}


@pytest.mark.parametrize("kind", COUNTS)
def test_mutated_files_are_read_or_refused(kind, tmp_path, request):
    count = COUNTS[kind][request.config.getoption("--full")]
    command = [sys.executable, str(Path(__file__).with_name("fuzz.py")), kind, str(SEED), str(count), str(tmp_path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=3000, check=False)
    cases = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(cases) == count, f"case {len(cases)} ended the process with {done.returncode}: {done.stderr[-2000:]}"
    assert [case for case in cases if case["outcome"] not in ("read", "refused") or case["violations"]] == []
    outcomes = collections.Counter(case["outcome"] for case in cases)
    print(f"{kind}: {count} mutated files, {outcomes['refused']} refused, {outcomes['read']} read")
    assert min(outcomes["refused"], outcomes["read"]) > count / 20  # both happen, or the mutations say nothing
    assert all(case["text"] for case in cases if case["outcome"] == "refused")
