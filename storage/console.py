"""What is printed: never the end of a run, and never an order to the terminal.

Whoever reads the output may leave, and names of files and tensors may hold anything.
"""

import contextlib
import io
import sys
import traceback
from types import TracebackType

from storage.files import escape


class OptionalFile(io.FileIO):
    """A file that drops what it cannot write: its reader has left, its terminal is closed, its disk is full."""

    def write(self, data: bytes) -> int:
        try:
            return super().write(data)
        except OSError:
            return len(data)


def protect_output() -> None:
    """Make stdout and stderr optional, with what their encoding lacks as \\x.., and escape the texts of errors.

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
        setattr(sys, name, io.TextIOWrapper(binary, stream.encoding, "backslashreplace", **lines))
    sys.excepthook = print_error


def print_error(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Print a traceback as Python does, with control characters escaped: an error may quote the name of a file."""
    lines = "".join(traceback.format_exception(kind, error, trace)).split("\n")
    print("\n".join(escape(line, also_bytes=True) for line in lines), end="", file=sys.stderr, flush=True)
