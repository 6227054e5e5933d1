"""Weight files, read without executing anything in them.

Key names of other projects live in layouts.py, what becomes of the tensors in model.py.
"""

import argparse
import pickle
import re
import statistics
import struct
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

WRAPPERS = ("model", "state_dict", "module")


PREFIXES = ("module.", "_orig_mod.", "model.")


# Objects of logs and arguments that trainings save beside the weights; `Inert` is built in their place.
BESIDE_WEIGHTS = (
    "mmengine.logging.history_buffer.HistoryBuffer",
    "numpy.ndarray",
    "numpy.dtype",
    *(f"{module}.getattr" for module in ("builtins", "__builtin__")),  # of a HistoryBuffer's methods, and not called
    *(f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("_reconstruct", "scalar")),
    *(f"{module}.{name}Path" for module in ("pathlib", "pathlib._local") for name in ("Posix", "Windows")),
)


# What torch raises for files that are cut short or no weights at all
DAMAGED = (
    RuntimeError,
    EOFError,
    LookupError,
    UnicodeDecodeError,
    struct.error,
    AssertionError,
    AttributeError,
    TypeError,
)


class Inert:
    """Stand for an object that is not looked at; it ignores all that a file says of it."""

    def __new__(cls, *_):
        return super().__new__(cls)

    def __setstate__(self, state: object) -> None:
        pass


def read_file(file: Path) -> dict:
    """Read a safetensors or pickled file, told apart by content, without executing anything in it.

    ValueError says what is wrong with it.
    """
    with file.open("rb") as opened:
        start = opened.read(9)
    try:
        if start[8:] == b"{":  # the 8 bytes before are the length of this header
            return load_file(file)
        if not start.startswith((b"PK", b"\x80")):
            raise ValueError(f"{file} is damaged, or no file of weights: it begins as none does")
        let_in = [argparse.Namespace, *((Inert, name) for name in BESIDE_WEIGHTS)]
        with torch.serialization.safe_globals(let_in), file.open("rb") as opened:  # a path's ending torch would believe
            content = torch.load(opened, map_location="cpu", weights_only=True)
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged, or no safetensors file: {error}") from error
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"it wants {found[1]} called or built when opened" if found else "it is no file of weights"
        raise ValueError(f"{file} is not opened: {reason}, and only tensors and plain values are let in") from error
    except DAMAGED as error:
        reason = re.split(r"\. |\n", str(error))[0]
        if "weights_only" in reason:  # torch's advice on it would be to execute the file
            reason = "it is a program of TorchScript, or older than torch 0.2"
        raise ValueError(f"{file} is damaged, or no file of weights: {reason}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds a {type(content).__name__}, not weights by name")
    return content


def unwrap(content: dict, file: Path) -> dict[str, Tensor]:
    """Take the tensors out of what trainings wrap around them; ValueError where there is something else among them."""
    for _ in WRAPPERS:  # no deeper, as a file may wrap itself
        wrapper = next((key for key in WRAPPERS if isinstance(content.get(key), dict)), None)
        content = content[wrapper] if wrapper else content
    if not content:
        raise ValueError(f"{file} is not weights by name: it is empty")
    for key, value in content.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            found = "an object that is not opened" if isinstance(value, Inert) else f"a {type(value).__name__}"
            raise ValueError(f"{file} is not weights by name: {key!r} is {found}")
        if value.is_meta or value.is_nested or value.layout != torch.strided or 0 in value.shape:
            raise ValueError(f"{file} is not weights by name: {key} holds no values, or not as a plain array")
    while prefix := next((p for p in PREFIXES if all(key.startswith(p) for key in content)), None):
        content = {key.removeprefix(prefix): value for key, value in content.items()}
    return content


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """Read the weights of a .safetensors or pickled file, whatever a training wrapped around them; see `read_file`."""
    return unwrap(read_file(Path(path)), Path(path))


def count_blocks(state_dict: dict[str, Tensor], name: str) -> int:
    """Count the blocks of a list; ValueError where their numbers leave one out, before any of them is built."""
    numbers = {int(match[1]) for key in state_dict if (match := re.match(rf"{name}\.([0-9]{{1,9}})\.", key))}
    absent = sorted(set(range(len(numbers))) - numbers)
    if absent:
        raise ValueError(f"{name} are numbered up to {max(numbers)}, but there is no {name}.{absent[0]}")
    return len(numbers)


def mlp_width(state_dict: dict[str, Tensor], name: str) -> int:
    """Give the width of most blocks' MLPs, so that a block with another one is what is reported not to fit."""
    keys = [key for key in state_dict if re.fullmatch(rf"{name}\.\d+\.mlp\.fc1\.weight", key)]
    return statistics.mode(len(state_dict[key]) for key in keys or [f"{name}.0.mlp.fc1.weight"])
