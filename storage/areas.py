"""Decoding one area of a JPEG file with nvimgcodec, where that is installed; decoding.py says when it is asked."""

import functools
import importlib
import importlib.util
import os
import tempfile
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from torch import Tensor


def decode_area(data: bytes, top: int, left: int, height: int, width: int) -> Tensor | None:
    """Decode one area of a JPEG file, uint8 (3, h, w); None where nvimgcodec cannot."""
    library = load_nvimgcodec()
    decoder, parameters = start_area_decoder(os.getpid())
    try:
        stream = library.CodeStream(data)
        region = library.Region(top, left, top + height, left + width)
        image = decoder.decode(stream.get_sub_code_stream(region=region), params=parameters)
    except RuntimeError:  # a header that it cannot read
        return None
    return None if image is None else torch.from_numpy(np.asarray(image)).permute(2, 0, 1)


@functools.cache
def load_nvimgcodec() -> ModuleType | None:
    """Import nvimgcodec with no decoder but that for JPEG on the CPU; None where it is not installed.

    Its other parts look for CUDA libraries when they are loaded, print errors where there are none, and have no
    business in a worker process.
    """
    try:
        extensions = Path(importlib.util.find_spec("nvidia.nvimgcodec").origin).parent / "extensions"
    except (ImportError, AttributeError):  # no package `nvidia`, or none of this name in it
        return None
    variable, before = "NVIMGCODEC_EXTENSIONS_PATH", os.environ.get("NVIMGCODEC_EXTENSIONS_PATH")
    with tempfile.TemporaryDirectory() as folder:
        for extension in extensions.glob("libjpeg_turbo_ext*"):
            os.symlink(extension, os.path.join(folder, extension.name))
        os.environ[variable] = folder
        try:
            return importlib.import_module("nvidia.nvimgcodec")
        except (ImportError, OSError):  # no build for this Python or machine
            return None
        finally:
            os.environ.pop(variable) if before is None else os.environ.update({variable: before})


@functools.cache
def start_area_decoder(process_id: int) -> tuple:
    """Start the decoder of a process, whose threads would not survive a fork, and give it with its parameters."""
    library = load_nvimgcodec()
    decoder = library.Decoder(
        device_id=library.NVIMGCODEC_DEVICE_CPU_ONLY,
        max_num_cpu_threads=1,
        backends=[library.Backend(library.CPU_ONLY)],
        options=":fancy_upsampling=1",  # as Pillow and torchcodec
    )
    return decoder, library.DecodeParams(apply_exif_orientation=False)
