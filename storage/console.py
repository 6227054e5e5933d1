"""What is printed: never the end of a run, and never an order to the terminal.

Whoever reads the output may leave, and names of files and tensors may hold anything.
"""

import contextlib
import io
import os
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import NoReturn

from storage.files import escape
from storage.lazily import end_imports

ROOT = Path(__file__).resolve().parent.parent
OWN_FOLDERS = (ROOT, ROOT / "storage", ROOT / "training", ROOT / "tools")  # and nobody's who lives in between
FOR_USERS = (OSError, ValueError, RuntimeError, ImportError, FloatingPointError)  # what is raised to be read
SECOND_S = 2  # that a process waits with an error, which the first one has as well: its launcher ends it by then


class DataError(ValueError):
    """Data that cannot be used, said to a user; from a data worker without the traceback that torch puts before it."""

    def __init__(self, message: str):
        super().__init__(message.rpartition("DataError: ")[2].rstrip())


class OptionalFile(io.FileIO):
    """A file that drops what it cannot write: its reader has left, its terminal is closed, its disk is full."""

    def write(self, data: bytes) -> int:
        try:
            return super().write(data)
        except OSError:
            return len(data)


class PlainText(io.TextIOWrapper):
    """A text stream that shows what a terminal would obey."""

    def write(self, text: str) -> int:
        super().write(escape_lines(text))
        return len(text)


def protect_output() -> None:
    """Make stdout and stderr optional, with what their encoding lacks as \\x.., and show what a terminal would obey.

    On stderr only in errors: progress bars and trackers move and colour their own lines there.

    Streams that are not this process's own, as in a notebook or a test, stay as they are.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None or stream is not getattr(sys, f"__{name}__"):
            continue
        with contextlib.suppress(OSError):  # nobody reads what was printed so far
            stream.flush()
        binary = OptionalFile(stream.fileno(), "wb", closefd=False)
        if isinstance(stream.buffer, io.BufferedWriter):  # not with PYTHONUNBUFFERED
            binary = io.BufferedWriter(binary)
        lines = dict(line_buffering=stream.line_buffering, write_through=stream.write_through)
        text = PlainText if name == "stdout" else io.TextIOWrapper
        setattr(sys, name, text(binary, stream.encoding, "backslashreplace", **lines))
    sys.excepthook = print_error


def print_error(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Print a traceback as Python does, with control characters escaped: an error may quote the name of a file."""
    text = "".join(traceback.format_exception(kind, error, trace))
    print(escape_lines(text), end="", file=sys.stderr, flush=True)


def escape_lines(text: str) -> str:
    return "\n".join(escape(line, also_bytes=True) for line in text.split("\n"))


def is_explained(error: Exception) -> bool:
    """Tell whether an error is the system's, or raised here to be read by a user; of a bug one wants the traceback."""
    if isinstance(error, OSError | DataError):
        return True
    raised = traceback.extract_tb(error.__traceback__)[-1]
    return Path(raised.filename).resolve().parent in OWN_FOLDERS and (raised.line or "").startswith("raise ")


def colour_red(text: str) -> str:
    """Colour a word on stderr where that is a terminal, unless NO_COLOR is set (no-color.org)."""
    return f"\x1b[31m{text}\x1b[0m" if sys.stderr.isatty() and not os.environ.get("NO_COLOR") else text


def refuse(message: str) -> NoReturn:
    """Say what is wrong, once for all processes of a launcher, and exit with 2."""
    if os.environ.get("RANK", "0") != "0":
        time.sleep(SECOND_S)
    print(colour_red("error:"), escape_lines(message), file=sys.stderr, flush=True)
    sys.exit(2)


@contextlib.contextmanager
def explained_errors() -> Iterator[None]:
    """Protect the output of a command, and print an error that explains itself in its own words alone."""
    end_imports()
    protect_output()
    try:
        yield
    except FOR_USERS as error:
        if is_explained(error):
            refuse(str(error))
        raise
