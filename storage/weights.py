"""Weight files: found, read without executing anything in them, and refused where they are not ours.

Key names of other projects live in layouts.py; what becomes of the tensors in model.py.
"""

import argparse
import math
import os
import pickle
import re
import shlex
import statistics
import struct
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.models import adapt_input_conv
from torch import Tensor

from storage import files
from storage.layouts import BEIT_ONLY, BIAS_TABLE, NO_COUNTERPART, PUBLISHED_WIDTHS, count_blocks
from storage.sizes import BEST_CHECKPOINT, LAST_CHECKPOINT
from storage.snapshots import PUBLISHED, fetch_model, is_hub_model, pin_model

# ------------------------------------------------------------------------------------------------ reading files

WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
OF_AN_EXPERIMENT = (BEST_CHECKPOINT, LAST_CHECKPOINT)  # the checkpoint that its folder stands for, the first there
FEW_WEIGHTS = 10**8  # which are built before anybody notices
SMALL_TENSOR = 1 << 20  # bytes up to which a file may hold a tensor as repetitions of a part
WRAPPERS = ("model", "state_dict", "module")
FIRST_LAYER = "patch_embed.proj.weight"
PREDICTION = ("decoder_pred.weight", "decoder_pred.bias", "pca_mean", "pca_basis")
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
DAMAGED = (RuntimeError, EOFError, LookupError, UnicodeDecodeError, struct.error)
DAMAGED += (AssertionError, AttributeError, TypeError)


class Inert:
    """Stand for an object that is not looked at; it ignores all that a file says of it."""

    def __new__(cls, *_):
        return super().__new__(cls)

    def __setstate__(self, state: object) -> None:
        pass


def read_file(file: Path) -> dict:
    """Read a safetensors or pickled file, detected from the content, without executing anything in it.

    ValueError says what is wrong with it.
    """
    with files.open_regular(file) as opened:
        start, held = opened.read(9), os.fstat(opened.fileno()).st_size
    try:
        if start[8:] == b"{":  # the 8 bytes before are the length of this header
            return load_file(file)
        if not start.startswith((b"PK", b"\x80")):
            raise ValueError(f"{file} is damaged, or no file of weights: it begins as none does")
        if start.startswith(b"PK"):
            refuse_compressed(file, held)
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


def refuse_compressed(file: Path, held: int) -> None:
    """Refuse an archive that grows when it is read: torch compresses nothing. ValueError."""
    try:
        with zipfile.ZipFile(file) as archive:
            grown = sum(entry.file_size for entry in archive.infolist())
    except zipfile.BadZipFile:  # torch says what is wrong with it
        return
    if grown > 2 * held:
        raise ValueError(f"{file} is not opened: its {held:,} bytes would grow to {grown:,}, and weights never do")


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
        if value.nbytes > max(held := value.untyped_storage().nbytes(), SMALL_TENSOR):
            raise ValueError(f"{file} holds {held:,} of the {value.nbytes:,} bytes of {key}")
    while prefix := next((p for p in PREFIXES if all(key.startswith(p) for key in content)), None):
        content = {key.removeprefix(prefix): value for key, value in content.items()}
    return content


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """Read the weights of a .safetensors or pickled file, whatever a training wrapped around them; see `read_file`."""
    return unwrap(read_file(Path(path)), Path(path))


def find_weights(path: str | Path, names: Sequence[str] = WEIGHT_FILES[:1]) -> Path:
    """Give the weight file of a folder, the first of these names in it, or the file itself.

    The folder of an experiment stands for its best checkpoint, or where there is none for its last one, and
    hf:OWNER/NAME for a folder of the Hub. FileNotFoundError says what was looked for, ValueError how to make one file
    of several.
    """
    path = fetch_model(str(path)) if is_hub_model(path) else Path(path)
    if not any((path / name).is_file() for name in names):
        path = next((path / name for name in OF_AN_EXPERIMENT if (path / name).is_dir()), path)
    found = [path / name for name in names if (path / name).is_file()] if path.is_dir() else [path]
    if path.name.endswith(".index.json") or (not found and any(path.glob("*.index.json"))):
        way_out = "save them as one with transformers' save_pretrained(FOLDER, max_shard_size='50GB')"
        raise ValueError(f"{path} lists several files of weights, which are not read together; {way_out}")
    if not found:
        foreign = (path / WEIGHT_FILES[-1]).is_file()
        way_out = convert_command(path) if foreign else "give a checkpoint folder such as checkpoint_800"
        raise FileNotFoundError(f"{path} holds no {' and no '.join([*names, *OF_AN_EXPERIMENT])}; {way_out}")
    if not found[0].is_file():
        raise FileNotFoundError(f"no checkpoint folder or weight file at {path}")
    return found[0]


def other_weights(content: dict) -> list[str]:
    """Name what holds tensors beside that which `unwrap` takes, such as a moving average of the weights."""
    taken = next((key for key in WRAPPERS if isinstance(content.get(key), dict)), None)
    tables = {key: value for key, value in content.items() if isinstance(value, dict) and key != taken}
    return [str(key) for key, value in tables.items() if any(isinstance(item, Tensor) for item in value.values())]


# ------------------------------------------------------------------------------------------------ files of ours


def by_number(labels: dict[str, str] | list[str]) -> list[str | None]:
    """Give texts in the order of their numbers "0", "1" and so on, None for a missing one, or as listed."""
    return [labels.get(str(index)) for index in range(len(labels))] if isinstance(labels, dict) else labels


def is_value_range(given: object) -> bool:
    """Tell whether an entry says how values become pixels: null (8-bit pictures), own (units), low and high."""
    return given in (None, "own") or (files.NUMBERS.check(given) and len(given) == 2 and given[0] < given[1])


def is_label_values(given: object) -> bool:
    """Tell whether an entry says what the values of label maps are: null, or a table such as {"255": "cell"}."""
    is_table = isinstance(given, dict) and all(map(files.is_text, given.values()))
    return given is None or (is_table and all(re.fullmatch("[0-9]{1,5}|#[0-9a-f]{6}", value) for value in given))


# What the sizes under "config" in config.json have to be, which are the fields of MAEConfig
SIZES = {
    files.ONE_OR_TWO: "img_size",
    files.WHOLE: "patch_size input_channels encoder_embed_dim encoder_depth encoder_num_heads decoder_embed_dim "
    "decoder_depth decoder_num_heads",
    files.WHOLE_OR_ZERO: "pca_target",
    files.NOT_NEGATIVE: "encoder_mlp_ratio decoder_mlp_ratio",
    files.TRUE_OR_FALSE: "norm_pix_loss encode_mask_tokens",
}
OF_ENCODER = "img_size patch_size input_channels encoder_embed_dim encoder_depth encoder_num_heads encoder_mlp_ratio"
OF_DECODER = "decoder_embed_dim decoder_depth decoder_num_heads decoder_mlp_ratio norm_pix_loss"
OF_SEGMENTER = "num_classes taps channels norm rel_pos_bias ignore_zero resize_to class_names"
# and all else in JSON files beside weights: ours, transformers' and timm's
ENTRIES = {
    files.ONE_OR_TWO: "img_size image_size",
    files.WHOLE: f"{SIZES[files.WHOLE]} num_channels hidden_size num_hidden_layers num_attention_heads num_heads "
    "decoder_hidden_size decoder_num_hidden_layers decoder_num_attention_heads",
    files.WHOLE_OR_ZERO: SIZES[files.WHOLE_OR_ZERO],
    files.WHOLE_OR_NULL: "channels",  # of a segmenter; null is the encoder's width
    files.NOT_NEGATIVE: f"{SIZES[files.NOT_NEGATIVE]} layer_norm_eps",
    files.TRUE_OR_FALSE: f"{SIZES[files.TRUE_OR_FALSE]} rel_pos_bias layer_scale ignore_zero",
    files.TEXT: "architecture global_pool norm",
    files.TEXTS: "class_names",
    files.Kind("null, or names by label value or colour", lambda given: is_label_values(given)): "label_values",
    files.NUMBERS: "image_mean image_std mean std",
    files.Kind("own, null or two numbers, the higher one last", lambda given: is_value_range(given)): "value_range",
    files.INDICES: "taps resize_to",
    files.TABLE: "config pretrained_cfg model_args",
    files.Kind("gelu, as in all models here", lambda name: name == "gelu"): "hidden_act act_layer",
    files.Kind("texts by number from 0", lambda labels: files.TEXTS.check(by_number(labels))): "id2label label_names",
}


def name_conversion(path: str | Path, ending: str) -> str:
    """Name weights, and what they become beside them or, of a model of the Hub, in the working directory."""
    source = str(pin_model(path) or Path(path))
    return shlex.join([source, re.sub(r"hf:.*/(.*)@.*", r"\1", source) + ending])


def convert_command(path: str | Path, state_dict: Mapping[str, Tensor] | None = None) -> str:
    """Give the command that makes weights ours, with the flags that their keys show it to need."""
    state_dict, names = state_dict or {}, name_conversion(path, "_ours")
    path = find_weights(path) if pin_model(path) else path
    flags = " --drop" if any(re.search(NO_COUNTERPART, key) for key in state_dict) else ""
    folder = Path(path) if Path(path).is_dir() else Path(path).parent
    told = (folder / "config.json").is_file() or any(key.endswith(BIAS_TABLE) for key in state_dict)
    width = next((len(value.flatten()) for key, value in state_dict.items() if key.endswith("cls_token")), None)
    if not told and width not in (None, *PUBLISHED_WIDTHS):
        flags += " --encoder_num_heads N"
    return f"convert it once with: python tools/convert_weights.py {names} --to ours{flags}"


def refuse_foreign(path: str | Path, state_dict: dict[str, Tensor]) -> None:
    """Raise ValueError, with the command that converts them, for weights in the key names of another project."""
    ours = any(key.startswith(("blocks.", "backbone.blocks.")) for key in state_dict)
    if foreign := sorted(key for key in state_dict if not ours or re.search(BEIT_ONLY, key)):
        raise ValueError(
            f"{path} has other key names than the original release, such as {foreign[:3]}; "
            f"{convert_command(path, state_dict)}"
        )


def read_weights(path: str | Path) -> tuple[Path, dict[str, Tensor]]:
    """Give the weight file that a path means and the tensors in it; ValueError for names of another project."""
    file = find_weights(path)
    state_dict = read_state_dict(file)
    refuse_foreign(path, state_dict)
    return file, state_dict


def own_record(content: dict) -> dict:
    """Give what this project wrote into a config.json, which tools/publish.py puts under one name."""
    return content[PUBLISHED] if isinstance(content.get(PUBLISHED), dict) else content


def read_config(weights: Path) -> dict | None:
    """Read the config.json beside a weight file: sizes, image mean and std; None where there is none.

    ValueError for the config.json of another project, and for entries of another kind than the scripts write.
    """
    file = weights.with_name("config.json")
    if not file.is_file():
        return None
    record = own_record(files.read_json(file))
    if not isinstance(record.get("config"), dict):
        source = weights.parent if weights.name == "model.safetensors" else weights
        command = convert_command(source, read_state_dict(weights))
        raise ValueError(f"{file} is not of this project: it has no sizes under 'config'; {command}")
    files.check_entries(file, record, ENTRIES)
    if unknown := record["config"].keys() - {name for names in SIZES.values() for name in names.split()}:
        raise ValueError(f"{sorted(unknown)[0]} in {file} is no size of a model here")
    if weights != file:  # the conversion gives that, and compares all sizes with the tensors
        refuse_sizes_beyond(weights, record)
    files.refuse_missing(file, record["config"], OF_ENCODER)
    if record.get("architecture") == "ViTMAEForSegmentation":
        files.refuse_missing(file, record, OF_SEGMENTER)
    return record


def refuse_sizes_beyond(weights: Path, record: dict) -> None:
    """Refuse sizes of a model that a weight file cannot hold, before anything of them is built; ValueError.

    Counts a byte for each weight of the encoder's blocks, position embeddings and classifier, which is too few.
    """
    sizes, held = record["config"], weights.stat().st_size if weights.is_file() else 0
    width, patch_size = sizes.get("encoder_embed_dim", 1), sizes.get("patch_size", 16)
    img_size = sizes.get("img_size", 1)
    sides = img_size if isinstance(img_size, list) else [img_size] * 2
    needed = {
        "encoder_depth": sizes.get("encoder_depth", 1) * width * max(width, 4),
        "img_size": math.prod(side // patch_size for side in sides) * width,
        "input_channels": sizes.get("input_channels", 1) * patch_size**2 * width,
        "num_classes": record["num_classes"] * min(width, 64) if isinstance(record.get("num_classes"), int) else 0,
    }
    for name, count in needed.items():
        if held and count > max(held, FEW_WEIGHTS):
            value = sizes.get(name, record.get(name))
            raise ValueError(f"{name} {value} in the config.json beside {weights} is more than its {held:,} bytes hold")


# ------------------------------------------------------------------------------------------------ sizes by shapes


def sizes_from_shapes(state_dict: dict[str, Tensor], path: str | Path) -> dict:
    """Read the sizes of weights, with or without a decoder, off their names and shapes, as fields of MAEConfig.

    Shapes do not tell the number of heads, nor a rectangle: the image is taken for a square. ValueError names what
    the weights lack.
    """
    try:
        _, channels, patch_size, _ = state_dict["patch_embed.proj.weight"].shape
        widths = [state_dict[key].shape[-1] for key in ("cls_token", "pos_embed", "blocks.0.norm1.weight")]
        parts = {"encoder": ("blocks", statistics.mode(widths))}
        if "decoder_embed.weight" in state_dict:
            parts["decoder"] = "decoder_blocks", len(state_dict["decoder_embed.weight"])
        side = math.isqrt(state_dict["pos_embed"].shape[1] - 1)
        sizes = {"img_size": side * patch_size, "patch_size": patch_size, "input_channels": channels}
        for part, (blocks, width) in parts.items():
            sizes[f"{part}_embed_dim"] = width
            sizes[f"{part}_depth"] = count_blocks(state_dict, blocks)
            keys = [key for key in state_dict if re.fullmatch(rf"{blocks}\.\d+\.mlp\.fc1\.weight", key)]
            mlp_widths = [len(state_dict[key]) for key in keys or [f"{blocks}.0.mlp.fc1.weight"]]
            sizes[f"{part}_mlp_ratio"] = statistics.mode(mlp_widths) / width  # a block with another is then reported
        if "pca_basis" in state_dict:
            sizes["pca_target"] = state_dict["pca_basis"].shape[-1]
    except KeyError as error:
        raise ValueError(
            f"{error} is not among these weights, whose names are such as {sorted(state_dict)[:3]}; they are not in "
            f"the layout of the original release; {convert_command(path)}"
        ) from error
    return sizes


class LoadReport(NamedTuple):
    """Which keys of a weight file went into a model, which of the model's are not in it, and which were left over."""

    loaded: list[str]
    missing: list[str]
    unexpected: list[str]
    file: Path
    resampled: Sequence[str] = ()
    adapted: str = ""

    def describe(self) -> str:
        parts = [f"{len(self.loaded)} tensors loaded"]
        for what, keys in (("fresh", self.missing), ("left out", self.unexpected), ("resampled", self.resampled)):
            if keys:
                groups = sorted({key.split(".")[0] for key in keys})
                parts.append(f"{len(keys)} {what} ({', '.join(groups)})")
        return ", ".join([*parts, *([self.adapted] if self.adapted else []), f"from {self.file}"])


def match_tensors(
    file: Path,
    state_dict: Mapping[str, Tensor],
    taken: Mapping[str, Tensor],
    own: Mapping[str, Tensor],
    may_be_missing: Sequence[str],
    may_be_left_out: tuple[str, ...],
) -> LoadReport:
    """Compare what is `taken` of a file's tensors with a model's `own`; ValueError names all that does not fit.

    `may_be_missing` are the model's names that the file need not have, `may_be_left_out` beginnings of the file's.
    """
    missing, unexpected = sorted(own.keys() - taken.keys()), sorted(state_dict.keys() - taken.keys())
    problems = [f"missing: {key}" for key in missing if key not in may_be_missing]
    problems += [f"unexpected: {key}" for key in unexpected if not key.startswith(may_be_left_out)]
    unfit = [key for key, value in taken.items() if value.shape != own[key].shape]
    problems += [f"{key}: {tuple(taken[key].shape)} in the file, {tuple(own[key].shape)} in the model" for key in unfit]
    if problems:
        shown = "".join(f"\n  {problem}" for problem in problems[:10])
        more = f"\n  and {len(problems) - 10} more" if len(problems) > 10 else ""
        raise ValueError(f"{file} does not fit this model:{shown}{more}")
    return LoadReport(sorted(taken), missing, unexpected, file)


def adapt_channels(taken: dict[str, Tensor], channels: int) -> str:
    """Turn a first layer of 3 channels into one of a model's, as timm does, in place; say so where it was needed.

    One channel gets the sum of the three, as of a grey image given three times; more get them in turn, scaled to the
    same total. The decoder's last layer, which predicts three channels, is taken out.
    """
    weight = taken.get(FIRST_LAYER)
    if weight is None or weight.ndim != 4 or weight.shape[1] != 3 or channels == 3:
        return ""
    taken[FIRST_LAYER] = adapt_input_conv(channels, weight)
    for name in PREDICTION:
        taken.pop(name, None)
    return f"first layer adapted from 3 channels to {channels}"


def refuse_as_encoder(path: str | Path, state_dict: Mapping[str, Tensor], *, relative_positions: bool) -> None:
    """Refuse weights that are no encoder alone, or have positions that a model does not; ValueError."""
    if any(key.startswith("backbone.") for key in state_dict):
        raise ValueError(
            f"{path} is a segmenter, and an encoder is needed to start from; take it out with: python "
            f"tools/convert_weights.py {name_conversion(path, '_encoder.pth')} --to original --drop"
        )
    if any(key.endswith(BIAS_TABLE) for key in state_dict) and not relative_positions:
        raise ValueError(f"{path} has relative positions, which only a segmenter takes, with --rel_pos_bias")
