"""Files written whole or not at all, checked JSON, checksums: once, for everybody.

What lies in the files is known elsewhere.
"""

import contextlib
import fcntl
import hashlib
import itertools
import json
import math
import os
import reprlib
import secrets
import shutil
import stat
import unicodedata
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TextIO


def unused_name(path: Path, suffix: str) -> Path:
    """Give the first of path_1, path_2, ... with a suffix that does not exist."""
    numbered = (path.with_name(f"{path.name}_{number}{suffix}") for number in itertools.count(1))
    return next(name for name in numbered if not os.path.lexists(name))


def rename_aside(file: Path) -> None:
    """Rename what an earlier run without a checkpoint left under this name, so that nothing is overwritten."""
    if os.path.lexists(file):
        file.rename(unused_name(file.with_suffix(""), file.suffix))


def rename_damaged(path: Path, reason: object, verb: str = "set aside") -> Path:
    """Rename what cannot be used, say so in a line that begins with `verb`, and give its new name."""
    renamed = unused_name(path, ".damaged")
    os.rename(path, renamed)
    reason = escape(str(reason), also_bytes=True)
    print(f"{verb:<16}{path.name}, which is damaged ({reason}): now {renamed.name}", flush=True)
    return renamed


def rename_irregular(path: Path, is_kind: Callable[[int], bool] = stat.S_ISREG) -> Path | None:
    """Rename what has a file's name and is none, a planted link say, and give its new name; None where all is well."""
    if not os.path.lexists(path) or is_kind(mode := path.lstat().st_mode):
        return None
    found = "link" if stat.S_ISLNK(mode) else "folder" if stat.S_ISDIR(mode) else "file of another kind"
    return rename_damaged(path, f"it is a {found}")


def user_path(text: str) -> Path:
    """Give a path that a user typed; a shell leaves the ~ of --flag=~/folder alone."""
    return Path(text).expanduser()


def open_regular(path: str | Path) -> BinaryIO:
    """Open a file to read, if it is a regular one; OSError where it is not.

    A pipe, a socket or a device would block for ever, or never end.
    """
    return open(path, "rb", opener=only_regular)


def only_regular(path: str, flags: int) -> int:
    """Be the `opener` of `open` that waits for nothing; OSError for what is no regular file."""
    descriptor = os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(f"{os.fspath(path)} is no regular file")
    return descriptor


def no_links(path: str, flags: int) -> int:
    """Be the `opener` of `open` for what a run writes: others may plant links in a shared folder; OSError for one."""
    return only_regular(path, flags | os.O_NOFOLLOW)


def hold(file: Path, *, waits: bool = False) -> TextIO:
    """Open a file as this process's alone until it is closed; BlockingIOError where another has it, unless it waits."""
    lock = os.fdopen(no_links(file, os.O_RDWR | os.O_CREAT), "r+")
    try:
        # A record lock, not flock's, which a data worker that outlives a killed process for seconds would hold on
        fcntl.lockf(lock, fcntl.LOCK_EX | (0 if waits else fcntl.LOCK_NB))
    except OSError:
        lock.close()
        raise
    return lock


CHUNK_BYTES = 1 << 24
MAX_TEXT_BYTES = 1 << 28


def checksum_of(file: Path) -> str:
    """Give the CRC-32 of a file's content. It is there to find damage, not forgery, and reads 1 to 2 GB a second."""
    checksum = 0
    with open_regular(file) as content:
        while chunk := content.read(CHUNK_BYTES):
            checksum = zlib.crc32(chunk, checksum)
    return f"{checksum:08x}"


def sync_to_disk(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, would survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def beside(target: Path, ending: str) -> Path:
    """Give TARGET.unfinished.tmp, where a target is written until it is whole, or TARGET.replaced.old meanwhile."""
    return target.with_name(f"{target.name}.{ending}")  # names that nobody gives to files of his own


def remove(path: Path) -> None:
    """Remove a file, a link or a folder, if it is there; what cannot be removed costs a line."""
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)  # as much of it as can be
            if os.path.lexists(path):
                shutil.rmtree(path)  # which says what stands in the way
        else:
            path.unlink(missing_ok=True)
    except OSError as error:
        print(f"{path} could not be removed ({error}); remove it by hand", flush=True)


def recover(target: Path) -> None:
    """Undo what a kill in the middle of `written_whole` left: an older folder comes back, a half-written one goes."""
    old = beside(target, "replaced.old")
    if os.path.lexists(old):
        remove(old) if os.path.lexists(target) else os.rename(old, target)
    remove(beside(target, "unfinished.tmp"))


def publish(temporary: Path, target: Path, *, flush: bool = True) -> None:
    """Give a file or folder that was written under another name its own, when all of it is on the disk.

    An older folder of that name is there until then, and comes back by `recover` after a kill in between.
    """
    umask = os.umask(0)
    os.umask(umask)
    for path in [temporary, *temporary.rglob("*")]:
        if path.is_file():
            path.chmod(0o666 & ~umask)  # safetensors lets nobody else read
        if flush:
            sync_to_disk(path)
    in_the_way = target.is_dir() or (temporary.is_dir() and os.path.lexists(target))
    if in_the_way:  # a folder cannot be renamed over another, nor over a file
        os.rename(target, beside(target, "replaced.old"))
    os.replace(temporary, target)
    sync_to_disk(target.parent)
    if in_the_way:
        remove(beside(target, "replaced.old"))


@contextlib.contextmanager
def written_whole(target: Path, *, unique: bool = False, flush: bool = True) -> Iterator[Path]:
    """Give a name beside `target` to write a file or a folder under; at the end it takes the target's place, flushed.

    An error in between leaves the target as it was and nothing beside it. `unique` is for targets that several
    processes may write at once: of folders the first stays, and so does what a kill leaves. `flush` off is for what
    can be made again after a power cut: 10,000 small files take 40 s to flush.
    """
    temporary = beside(target, f"{secrets.token_hex(4)}.tmp" if unique else "unfinished.tmp")
    target.parent.mkdir(parents=True, exist_ok=True)
    if not unique:
        recover(target)
    try:
        yield temporary
        if not (unique and target.is_dir()):
            publish(temporary, target, flush=flush)
    finally:
        remove(temporary)
        if not unique:
            recover(target)


@contextlib.contextmanager
def optional_write(file: Path) -> Iterator[None]:
    """Write a file that a run can do without: a disk that is full costs the file and a message."""
    try:
        yield
    except OSError as error:
        print(f"{file} could not be written ({error}); the run goes on", flush=True)


def append_lines(file: Path, lines: bytes) -> None:
    """Append whole lines to a file, through no link: all of them, or an OSError and none.

    A last line that a crash cut short is ended first. What is no file is renamed.
    """
    rename_irregular(file)
    with open(file, "a+b", buffering=0, opener=no_links) as opened:
        before = opened.seek(0, os.SEEK_END)
        if before and os.pread(opened.fileno(), 1, before - 1) != b"\n":
            lines = b"\n" + lines
        try:
            while lines:
                lines = lines[opened.write(lines) :]
        except OSError:
            opened.truncate(before)
            if not before:
                file.unlink()
            raise


def read_optional(file: Path, read: Callable[[Path], Any]) -> Any | None:
    """Read a file that a run can do without: None where there is none; one that is damaged is renamed."""
    if os.path.lexists(file):
        try:
            return read(file)
        except (OSError, ValueError) as error:
            with optional_write(file):
                rename_damaged(file, error)
    return None


def read_bytes(file: Path) -> bytes:
    """Read a regular file of text; ValueError where it is larger than any of them."""
    with open_regular(file) as opened:
        data = opened.read(MAX_TEXT_BYTES + 1)
    if len(data) > MAX_TEXT_BYTES:
        raise ValueError(f"{file} has more than {MAX_TEXT_BYTES:,} bytes, which no file of text here has")
    return data


def read_text(file: Path) -> str:
    """Read a text file of a user, UTF-8 with or without a byte order mark; ValueError names one that is none."""
    try:
        return read_bytes(file).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is no UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8") from error


def write_rows(file: Path, rows: Iterable[Iterable[object]], *, append: bool = False) -> None:
    """Write a table, cells between tabs. Names of files may be any bytes: those that are no UTF-8 stay as they are."""
    text = "".join("\t".join(escape(str(cell)) for cell in row) + "\n" for row in rows)
    lines = text.encode("utf-8", "surrogateescape")
    if append:
        append_lines(file, lines)
        return
    with written_whole(file) as temporary, temporary.open("xb") as opened:
        opened.write(lines)


BIDIRECTIONAL = "\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"  # which turn a line around


def escape(text: str, *, also_bytes: bool = False) -> str:
    """Write control characters, and what else breaks a line, as \\n, \\x1b or \\u2028; `also_bytes`: no UTF-8, too."""

    def is_plain(character: str) -> bool:
        if "\ud800" <= character <= "\udfff":  # a byte of a name that is no UTF-8
            return not also_bytes
        return unicodedata.category(character) not in ("Cc", "Zl", "Zp") and character not in BIDIRECTIONAL

    escaped = (c if is_plain(c) else c.encode("unicode_escape").decode() for c in text)
    return "".join(escaped)


def write_json(file: Path, content: Mapping) -> None:
    """Write a table as JSON into a new file: in a folder that is published later, or inside `written_whole`."""
    with file.open("x") as opened:  # which follows no link
        opened.write(json.dumps(content, indent=2) + "\n")


def replace_json(file: Path, content: Mapping) -> None:
    """Write a table as JSON in the place of an older one, whole; what is no file under that name is renamed."""
    rename_irregular(file)
    with written_whole(file) as temporary:
        write_json(temporary, content)


def random_key(*parts: int | str) -> int:
    """Hash (seed, epoch, index, ...) into 64 bits, alike in every process and on every machine."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "little")


def fingerprint(content: bytes) -> str:
    """Hash bytes into 16 hexadecimal digits, by which a resumed run tells whether its data is still the same."""
    return hashlib.sha256(content).hexdigest()[:16]


def read_json(file: Path) -> dict:
    """Read a JSON file of entries by name; ValueError names a file that holds anything else."""
    try:
        content = json.loads(read_bytes(file))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is no JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds a {type(content).__name__}, not entries by name")
    return content


class Kind(NamedTuple):
    """What an entry of a JSON file has to be: in words, and as a check."""

    words: str
    check: Callable[[object], bool]


def is_whole(value: object, least: int = 1) -> bool:
    return type(value) is int and value >= least


def is_number(value: object) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def is_text(value: object) -> bool:
    return isinstance(value, str)


def is_list(value: object, check: Callable[[object], bool]) -> bool:
    return isinstance(value, list) and all(check(item) for item in value)


WHOLE = Kind("a whole number above 0", is_whole)
WHOLE_OR_ZERO = Kind("a whole number of at least 0", lambda value: is_whole(value, 0))
WHOLE_OR_NULL = Kind("a whole number above 0, or null", lambda value: value is None or is_whole(value))
ONE_OR_TWO = Kind(
    "one or two whole numbers above 0", lambda value: is_whole(value) or (is_list(value, is_whole) and len(value) == 2)
)
NOT_NEGATIVE = Kind("a number of at least 0", lambda value: is_number(value) and value >= 0)
TRUE_OR_FALSE = Kind("true or false", lambda value: isinstance(value, bool))
TEXT = Kind("a text", is_text)
TABLE = Kind("a table", lambda value: isinstance(value, dict))
TEXTS = Kind("a list of texts", lambda value: is_list(value, is_text))
NUMBERS = Kind("a list of numbers", lambda value: is_list(value, is_number))
INDICES = Kind("a list of whole numbers", lambda value: is_list(value, lambda item: is_whole(item, 0)))


def check_entries(file: Path, entries: Mapping[str, object], kinds: Mapping[Kind, str]) -> None:
    """Raise ValueError, naming file and entry, where an entry, also of a table within, is not of the kind it has to be.

    `kinds` gives the names of the entries of each kind, with spaces between them.
    """
    for kind, names in kinds.items():
        for name in names.split():
            if name in entries and not kind.check(entries[name]):
                raise ValueError(f"{name} in {file} has to be {kind.words}, not {reprlib.repr(entries[name])}")
            if kind is TABLE and name in entries:
                check_entries(file, entries[name], kinds)


def refuse_missing(file: Path, entries: Mapping[str, object], names: str) -> None:
    """Raise ValueError where a record lacks entries, whose names have spaces between them."""
    if missing := [name for name in names.split() if name not in entries]:
        raise ValueError(f"{file} lacks {', '.join(missing)}; give the checkpoint folder as the training wrote it")
