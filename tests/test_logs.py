"""A log that is cut at a step, or damaged; what else is read of a run is in test_report.py."""

import pytest
from test_files import limited

from storage.files import append_lines
from training.logs import cut_rows

ROWS = b'{"step": 1}\n{"step": 3}\n{"step": 5}\n'


@pytest.mark.parametrize(
    "tail", [b"", b'{"step": 7, "lo', b"\0\0\0", b'{"step": 6}\n{"step": 8}\n', b'{"step": 6}\n{"step": 8'], ids=repr
)
def test_rows_beyond_a_step_are_cut_without_room(tmp_path, tail, capsys):
    file = tmp_path / "log.jsonl"
    file.write_bytes(ROWS + tail)
    inode = file.stat().st_ino
    with limited(0):
        cut_rows(file, 5)
    assert (file.read_bytes(), file.stat().st_ino) == (ROWS, inode)
    with limited(0):
        cut_rows(file, 4)
    assert file.read_bytes() == ROWS[:24] and not capsys.readouterr().out
    file.write_bytes(ROWS[:-1])  # the line end alone is missing
    cut_rows(file, 5)
    append_lines(file, b'{"step": 6}\n')
    assert file.read_bytes() == ROWS + b'{"step": 6}\n'


@pytest.mark.parametrize(
    ("content", "good"),
    [
        (ROWS[:12] + b"\xff\n" + ROWS[12:], ROWS),
        (ROWS + b"[]\n", ROWS),
        (ROWS + b"[1, 2]", ROWS),
        (ROWS[:12] + b'{"step": 9999}\n' + ROWS[12:], ROWS),  # a digit too many
        (ROWS + b'{"step": 2}\n', ROWS),
        (ROWS + b'{"step": "6"}\n{"step": true}\n{"step": NaN}\n', ROWS),
        (ROWS + b'{"a":' * 99_999 + b"\n", ROWS),
        (ROWS + b"{" * (1 << 20) + b"\n", ROWS),
    ],
)
def test_good_rows_of_a_damaged_log_go_into_a_new_one(tmp_path, content, good, capsys):
    file = tmp_path / "log.jsonl"
    file.write_bytes(content)
    cut_rows(file, 8)
    assert file.read_bytes() == good
    assert (tmp_path / "log.jsonl_1.damaged").read_bytes() == content
    assert "log.jsonl, which is damaged (line " in capsys.readouterr().out


def test_rows_behind_a_link_are_kept_and_the_link_is_not_written_through(tmp_path):
    (tmp_path / "elsewhere").write_bytes(ROWS)
    (tmp_path / "log.jsonl").symlink_to("elsewhere")
    cut_rows(tmp_path / "log.jsonl", 3)
    assert (tmp_path / "log.jsonl").read_bytes() == ROWS[:24] and not (tmp_path / "log.jsonl").is_symlink()
    assert (tmp_path / "elsewhere").read_bytes() == ROWS
