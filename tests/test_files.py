"""Files written whole or not at all, after errors and kills, and JSON files whose entries make no sense."""

import contextlib
import os
import resource
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from storage import files
from storage.files import (
    append_lines,
    check_entries,
    hold,
    open_regular,
    read_json,
    recover,
    remove,
    rename_aside,
    replace_json,
    write_json,
    write_rows,
    written_whole,
)

KINDS = ["file", "folder"]


def write(path: Path, kind: str, text: str) -> None:
    if kind == "folder":
        path.mkdir()
        path = path / "inside"
        path.mkdir()
        path = path / "content"
    path.write_text(text)
    path.chmod(0o600)  # as safetensors does


def content_of(path: Path) -> str:
    return (path / "inside" / "content" if path.is_dir() else path).read_text()


@pytest.fixture
def target(tmp_path) -> Path:
    return tmp_path / "new" / "target"


@pytest.mark.parametrize("unique", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_written_whole_puts_the_new_in_the_place_of_the_old(target, kind, unique):
    for text in ("first", "second"):
        with written_whole(target, unique=unique) as temporary:
            assert temporary.parent == target.parent and temporary != target
            write(temporary, kind, text)
            assert text == "first" or content_of(target) == "first"
        first_stays = unique and kind == "folder"  # as another process may be reading it
        assert content_of(target) == ("first" if first_stays else text) and list(target.parent.iterdir()) == [target]


@pytest.mark.parametrize("unique", [False, True])
@pytest.mark.parametrize("there_before", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_an_error_leaves_the_old_target_and_nothing_beside_it(target, kind, there_before, unique):
    target.parent.mkdir()
    if there_before:
        write(target, kind, "old")
    with pytest.raises(OSError, match="no space left"), written_whole(target, unique=unique) as temporary:
        write(temporary, kind, "half of the n")
        raise OSError("no space left")
    assert list(target.parent.iterdir()) == [target] * there_before
    assert not there_before or content_of(target) == "old"


@pytest.mark.parametrize("kind", KINDS)
def test_a_rename_that_fails_brings_the_old_target_back(target, kind, monkeypatch):
    def no_rename(*_):
        raise OSError("no rename")

    target.parent.mkdir()
    write(target, kind, "old")
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", no_rename)
        with pytest.raises(OSError, match="no rename"), written_whole(target) as temporary:
            write(temporary, kind, "new")
    assert list(target.parent.iterdir()) == [target] and content_of(target) == "old"


KILLED = """
import os, sys
from pathlib import Path
import storage.files
with storage.files.written_whole(Path(sys.argv[1])) as temporary:
    (temporary / "inside").mkdir(parents=True)
    (temporary / "inside" / "content").write_text("new")
    {moment}
"""


@pytest.mark.parametrize(
    ("moment", "left", "content"),
    [
        ("os._exit(9)", {"target", "target.unfinished.tmp"}, "old"),
        ("os.replace = lambda *_: os._exit(9)", {"target.replaced.old", "target.unfinished.tmp"}, "old"),
        ("storage.files.remove = lambda *_: os._exit(9)", {"target", "target.replaced.old"}, "new"),
    ],
    ids=["before the renames", "between the renames", "after the renames"],
)
def test_recover_after_a_kill_leaves_one_whole_folder(target, moment, left, content):
    target.parent.mkdir()
    write(target, "folder", "old")
    command = [sys.executable, "-c", KILLED.format(moment=moment), str(target)]
    assert subprocess.run(command, cwd=ROOT, check=False).returncode == 9
    assert {path.name for path in target.parent.iterdir()} == left
    recover(target)
    assert list(target.parent.iterdir()) == [target] and content_of(target) == content


@pytest.mark.parametrize("kind", KINDS)
def test_the_next_write_recovers_first(target, kind):
    target.parent.mkdir()
    write(target.with_name("target.replaced.old"), kind, "old")  # a kill between the renames
    write(target.with_name("target.unfinished.tmp"), kind, "half")
    with written_whole(target) as temporary:
        assert content_of(target) == "old" and not temporary.exists()
        write(temporary, kind, "new")
    assert content_of(target) == "new" and list(target.parent.iterdir()) == [target]


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
@pytest.mark.parametrize("kind", KINDS)
def test_modes_of_files_follow_the_umask(target, kind, umask, mode):
    before = os.umask(umask)
    try:
        with written_whole(target) as temporary:
            write(temporary, kind, "new")
        assert os.umask(umask) == umask
    finally:
        os.umask(before)
    file = target / "inside" / "content" if kind == "folder" else target
    assert file.stat().st_mode & 0o777 == mode


def test_writers_of_unique_names_do_not_touch_what_others_write(target):
    target.parent.mkdir()
    others = target.with_name("target.tmp"), target.with_name("target.1.tmp")
    for other in others:
        other.write_text("of another process")
    with written_whole(target, unique=True) as temporary:
        assert temporary not in others
        temporary.write_text("ours")
    assert target.read_text() == "ours" and all(other.read_text() == "of another process" for other in others)


def test_json_comes_back_and_what_is_no_table_is_named(tmp_path):
    file = tmp_path / "a.json"
    write_json(file, {"a": [1, None]})
    assert read_json(file) == {"a": [1, None]}
    for text, message in (("[1]", "holds a list, not entries"), ("{", "is no JSON"), ("[" * 99999, "is no JSON")):
        file.write_text(text)
        with pytest.raises(ValueError, match=rf"a\.json {message}"):
            read_json(file)


@contextlib.contextmanager
def limited(max_bytes: int):
    """Let no file of this process become larger, as a quota or a full disk would."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (max_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_appended_lines_are_there_as_a_whole_or_not_at_all(tmp_path):
    file = tmp_path / "log"
    for before, expected in ((b"", None), (b"one\n", b"one\n"), (b"one\ncut", b"one\ncut")):
        if before:
            file.write_bytes(before)
        with limited(len(before) + 3), pytest.raises(OSError, match="File too large"):
            append_lines(file, b"second\n")
        assert (file.read_bytes() if file.exists() else None) == expected
    append_lines(file, b"second\n")
    append_lines(file, b"third\n")
    assert file.read_bytes() == b"one\ncut\nsecond\nthird\n"


@pytest.mark.parametrize("leads_to", ["a file", "a folder", "nothing"])
def test_what_is_planted_under_the_name_of_a_file_is_renamed_and_never_written_through(tmp_path, leads_to, capsys):
    victim = tmp_path / "victim"
    if leads_to == "a file":
        victim.write_text("of somebody else")
    elif leads_to == "a folder":
        victim.mkdir()
    writes = {
        "log": lambda file: append_lines(file, b"ours\n"),
        "a.json": lambda file: replace_json(file, {"a": 1}),
        "table": lambda file: write_rows(file, [["a"]]),
    }
    for name, act in writes.items():
        file = tmp_path / name
        file.symlink_to(victim)
        file.with_name(f"{name}.unfinished.tmp").symlink_to(victim)
        act(file)
        assert stat.S_ISREG(file.lstat().st_mode) and file.stat().st_size > 0
    assert capsys.readouterr().out.count("which is damaged (it is a link): now") == 2  # a table replaces it
    assert not victim.is_file() or victim.read_text() == "of somebody else"
    assert leads_to != "a folder" or not list(victim.iterdir())
    assert leads_to != "nothing" or not os.path.lexists(victim)
    with pytest.raises(FileExistsError):
        write_json(tmp_path / "log_1.damaged", {})


def test_rename_aside_also_takes_links_and_never_another_name(tmp_path):
    for name in ("a.json", "a_1.json"):
        (tmp_path / name).symlink_to("nowhere")
    rename_aside(tmp_path / "a.json")
    assert {path.name for path in tmp_path.iterdir()} == {"a_1.json", "a_2.json"}


def test_what_cannot_be_removed_is_named_and_the_rest_goes(tmp_path, capsys):
    kept = tmp_path / "folder" / "kept"
    kept.mkdir(parents=True)
    (kept / "file").touch()
    (tmp_path / "folder" / "other").touch()
    if os.geteuid():
        kept.chmod(0o500)
    elif subprocess.run(["mount", "--bind", kept, kept], check=False, capture_output=True).returncode:
        pytest.skip("nothing can be protected from root here")
    try:
        remove(tmp_path / "folder")
        assert [path.name for path in (tmp_path / "folder").iterdir()] == ["kept"]
        assert f"{tmp_path / 'folder'} could not be removed (" in capsys.readouterr().out
    finally:
        subprocess.run(["umount", kept], check=True) if not os.geteuid() else kept.chmod(0o700)
    remove(tmp_path / "folder")
    remove(tmp_path / "folder")
    assert not (tmp_path / "folder").exists() and not capsys.readouterr().out


def test_folder_takes_the_place_of_a_file_or_a_link(target):
    target.parent.mkdir()
    (target.parent / "elsewhere").mkdir()
    (target.parent / "elsewhere" / "file").touch()
    for plant in (target.touch, lambda: target.symlink_to("nowhere"), lambda: target.symlink_to("elsewhere")):
        plant()
        with written_whole(target) as temporary:
            write(temporary, "folder", "new")
        assert content_of(target) == "new" and not target.is_symlink()
        remove(target)
    assert [path.name for path in target.parent.rglob("*")] == ["elsewhere", "file"]


@pytest.mark.parametrize(
    ("kind", "good", "bad"),
    [
        ("WHOLE", [1, 12], [0, True, 1.0, "1", None]),
        ("WHOLE_OR_NULL", [1, None], [0, False]),
        ("ONE_OR_TWO", [1, [2, 3]], [0, [1], [1, 2, 3], [0, 1], (1, 2)]),
        ("NOT_NEGATIVE", [0, 0.5, 2], [-1, float("nan"), float("inf"), True, "1"]),
        ("TRUE_OR_FALSE", [True, False], [0, 1, None]),
        ("TEXT", ["", "a"], [None, 1, ["a"]]),
        ("TABLE", [{}], [[], None]),
        ("TEXTS", [[], ["a"]], ["a", ["a", 1], {"0": "a"}]),
        ("NUMBERS", [[], [0.5, -1]], [0.5, ["a"], [None], [float("nan")]]),
        ("INDICES", [[0, 2]], [[-1], [1.0], 1]),
    ],
)
def test_check_entries_names_file_entry_and_kind(kind, good, bad):
    kind = getattr(files, kind)
    for value in good:
        check_entries(Path("a.json"), {"one": value}, {kind: "one other"})
    for value in bad:
        with pytest.raises(ValueError, match=rf"^one in a\.json has to be {kind.words}, not "):
            check_entries(Path("a.json"), {"one": value}, {kind: "other one"})


def test_check_entries_looks_into_tables_and_shortens_what_is_long():
    kinds = {files.TABLE: "inner", files.TEXT: "name"}
    check_entries(Path("a.json"), {"inner": {"inner": {"name": "a"}}, "unknown": 3}, kinds)
    with pytest.raises(ValueError, match=r"^name in a\.json has to be a text, not \[0, 1, 2, 3, 4, 5, \.\.\.\]$"):
        check_entries(Path("a.json"), {"inner": {"inner": {"name": list(range(99))}}}, kinds)


def test_only_regular_files_are_opened_and_none_is_waited_for(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe.png")
    with socket.socket(socket.AF_UNIX) as server:
        monkeypatch.chdir(tmp_path)  # the path of a socket may be short only
        server.bind("socket.png")
        for path in (tmp_path / "pipe.png", tmp_path / "socket.png", Path("/dev/zero"), tmp_path):
            with pytest.raises(OSError, match=r"is no regular file|No such device"):
                open_regular(path)
    (tmp_path / "file").write_bytes(b"content")
    with open_regular(tmp_path / "file") as file:
        assert file.read() == b"content"


def test_text_of_users_is_utf_8_with_or_without_a_mark(tmp_path):
    for encoding in ("utf-8", "utf-8-sig"):
        (tmp_path / "names.txt").write_text("Straße\nçà", encoding=encoding)
        assert files.read_text(tmp_path / "names.txt") == "Straße\nçà"
    for encoding in ("latin-1", "utf-16"):
        (tmp_path / "names.txt").write_text("Straße\nçà", encoding=encoding)
        with pytest.raises(ValueError, match=r"names\.txt is no UTF-8 text \(.* at byte \d+\); save it as UTF-8"):
            files.read_text(tmp_path / "names.txt")


def test_rows_take_any_name_that_a_disk_can_hold(tmp_path):
    names = [
        "plain",
        "tab\tline\nreturn\r",
        "bell\x07\x1b[31m",
        "\u2028\u202e",
        os.fsdecode(b"\xff\xfe"),
        "ü 漢",
        "犬\u3000猫 \u200c",
    ]
    files.write_rows(tmp_path / "table.tsv", [["name", "number"], *((name, 1) for name in names)])
    lines = (tmp_path / "table.tsv").read_bytes().split(b"\n")
    assert lines[1:4] == [b"plain\t1", rb"tab\tline\nreturn\r" + b"\t1", rb"bell\x07\x1b[31m" + b"\t1"]
    assert lines[4:] == [
        rb"\u2028\u202e" + b"\t1",
        b"\xff\xfe\t1",
        "ü 漢\t1".encode(),
        "犬\u3000猫 \u200c\t1".encode(),
        b"",
    ]
    assert files.escape(names[4], also_bytes=True) == r"\udcff\udcfe"


def test_file_is_held_by_one_process_and_free_when_that_ends(tmp_path):
    held = "import sys; from storage.files import hold; lock = hold(sys.argv[1]); print('held', flush=True); input()"
    other = subprocess.Popen(
        [sys.executable, "-c", held, tmp_path / "lock"], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert other.stdout.readline() == b"held\n"
    with pytest.raises(BlockingIOError):
        hold(tmp_path / "lock")
    other.kill()
    with hold(tmp_path / "lock", waits=True), pytest.raises(OSError, match="link"):
        (tmp_path / "planted").symlink_to(tmp_path / "lock")
        hold(tmp_path / "planted")
    other.communicate()
