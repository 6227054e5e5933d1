"""Move weights between the layouts that masked autoencoders are published in; nothing in a source is executed.

    python tools/convert_weights.py SOURCE TARGET --to {ours,original,timm,huggingface,mmseg,tutorial}
    python tools/convert_weights.py --inspect SOURCE

SOURCE is a weight file, a folder with one, or, to convert it, the address of a file, which is kept beside TARGET; its
layout is read from its keys. LAYOUTS of storage/layouts.py is the map, one table for each layout, read both ways.
Tensors are renamed, and q, k and v cut or joined, without touching a bit. What a target has no place for is named, and
needs --drop. A target is whole or not there: it is written as TARGET.unfinished.tmp and renamed. A kill between the two
renames of --overwrite leaves a folder as TARGET.replaced.old, which the next conversion to TARGET puts back first.
"""

import argparse
import contextlib
import math
import os
import re
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save_file
from timm.layers import gen_relative_position_index
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import model
from dataset import IMAGENET_MEAN, IMAGENET_STD
from storage import files, layouts, weights
from storage.console import escape_lines
from storage.labels import ADE20K_CLASS_NAMES, LABEL_COLOURS
from storage.layouts import LAYOUTS, NOT_OF_THE_ENCODER, describe_names, their_names
from storage.published import get_weights, is_url
from storage.sizes import ADE20K_NUM_CLASSES, VARIANTS, without_decoder
from storage.sources import Source, add_backbone, describe_shapes, rename, simplify

# What a source can be, and our class for it
KINDS = {
    "masked autoencoder": model.ViTMAEForPreTraining,
    "encoder": model.VisionTransformer,
    "classifier of the mean": model.ViTMAEForImageClassification,
    "classifier of the cls token": model.ViTMAEForImageClassification,
    "linear probe": model.ViTMAEForImageClassification,
    "segmenter": model.ViTMAEForSegmentation,
}
OPENS_HERE = {
    "ViTMAEForPreTraining": "tools/reconstruct.py --checkpoint {0}, and as an encoder",
    "VisionTransformer": "--path_to_pretrained_mae_weights {0} or --path_to_backbone_checkpoint {0}",
    "ViTMAEForImageClassification": "tools/classify.py --checkpoint {0}",
    "ViTMAEForSegmentation": "tools/segment.py --checkpoint {0}",
}

# ------------------------------------------------------------------------------------------------ what a source is


def read_source(path: str | Path) -> Source:
    """Read weights of any layout under our names; ValueError names every key that no table explains."""
    path = Path(path)
    file = weights.find_weights(path, weights.WEIGHT_FILES)
    content = weights.read_file(file)
    tensors = weights.unwrap(content, file)
    source = Source(path, layouts.detect_layout(tensors, path), {})
    if others := weights.other_weights(content):
        source.notes.append(f"{', '.join(others)} in the same file not read; these are other weights")
    rename(source, tensors)
    add_facts(source, file.parent, content)
    if not source.title:  # the layouts that share our names, as far as that can be seen
        beit = any(re.search(r"gamma|_bias$|relative|^backbone", key) for key in tensors)
        shared = "BEiT's" if beit else layouts.ORIGINAL_OR_TIMM
        source.title = shared if source.layout == "ours" else LAYOUTS[source.layout].title
    simplify(source)
    pooling = "avg" if source.has("fc_norm.") else "token"
    if source.has("head.") and source.pooling not in (None, pooling):
        where = "behind" if source.has("norm.") else "before"
        reason = f"timm's {source.pooling!r} pooling {where} the norm is of no classifier here"
        source.leave_out(("head.", "fc_norm."), reason)
    if source.kind == "encoder":
        source.leave_out(("fc_norm.",), "without a head, nothing here has a norm behind the mean of the patches")
    return source


def add_facts(source: Source, folder: Path, content: dict) -> None:
    """Add what a source's config.json, or a training's own record, says beyond shapes.

    The config.json of another layout than the weights' happens to lie in the same folder, and says nothing.
    """
    file = folder / "config.json"
    config = weights.own_record(files.read_json(file)) if file.is_file() else {}
    if source.layout == "ours" and isinstance(config.get("config"), dict):
        source.title, source.record = LAYOUTS["ours"].title, weights.read_config(file)
        source.known = source.record.pop("config")
    elif LAYOUTS[source.layout].config_entry in config:
        add_facts_of_libraries(source, folder)
    arguments, meta = content.get("args"), content.get("meta")
    if isinstance(arguments, argparse.Namespace) and hasattr(arguments, "norm_pix_loss"):
        source.known.setdefault("norm_pix_loss", bool(arguments.norm_pix_loss))
    if isinstance(meta, dict):
        data = meta.get("dataset_meta")
        classes = data.get("classes") if isinstance(data, dict) else meta.get("CLASSES")
        source.record |= {"class_names": list(map(str, classes))} if isinstance(classes, list | tuple) else {}


def add_facts_of_libraries(source: Source, folder: Path) -> None:
    """Add what the JSON files of transformers, or of timm, say: sizes, pooling, mean and std, class names."""
    told, is_timm = {}, source.layout == "ours"
    for file in (folder / "config.json", folder / "preprocessor_config.json"):
        entries = files.read_json(file) if file.is_file() else {}
        files.check_entries(file, entries, weights.ENTRIES)
        told |= entries | entries.get("pretrained_cfg", {}) | entries.get("model_args", {})
    names = layouts.TIMM_SIZES if is_timm else layouts.HUGGINGFACE_SIZES
    source.known = {ours: told[theirs] for ours, theirs in names.items() if theirs in told}
    prefix = "" if is_timm else "image_"
    source.record = {f"image_{name}": told[prefix + name] for name in ("mean", "std") if prefix + name in told}
    class_names = weights.by_number(told.get("label_names" if is_timm else "id2label", []))
    if class_names and class_names[0] != "LABEL_0":  # which is no name
        source.record["class_names"] = class_names
    if is_timm:
        source.title, source.pooling = LAYOUTS["timm"].title, told.get("global_pool")
    elif (eps := told.get("layer_norm_eps", 1e-12)) != model.LAYER_NORM_EPS:
        here = f"{model.LAYER_NORM_EPS:g} here, as in the original release"
        source.notes.append(f"layer norms: epsilon {eps:g} there, {here}")


def needed_sizes(kind: str) -> list[str]:
    return ["encoder_num_heads", *(["decoder_num_heads", "norm_pix_loss"] if kind == "masked autoencoder" else [])]


def resolve_sizes(source: Source, args: argparse.Namespace) -> dict:
    """Give the fields of model.MAEConfig by shapes, flags and the source's own record; None for what nobody says.

    ValueError where shapes make no sense, or shapes, flags and record contradict each other.
    """
    needed = ["cls_token", "pos_embed", "patch_embed.proj.weight"]
    lists = ("blocks", "decoder_blocks") if "decoder_embed.weight" in source.tensors else ("blocks",)
    needed += [f"{name}.0.{part}.weight" for name in lists for part in ("norm1", "mlp.fc1")]
    source.refuse([f"missing {source.key_of(name)}" for name in needed if name not in source.tensors])
    sizes = weights.sizes_from_shapes(source.tensors, source.path)
    for part in ("encoder", "decoder"):  # a ratio need not give a whole number, and is then rounded down
        name, width = f"{part}_mlp_ratio", sizes.get(f"{part}_embed_dim", 0)
        if name in sizes and source.known.get(name, -1) * width // 1 == round(sizes[name] * width):
            sizes[name] = source.known[name]
    told = {name: source.known.get(name, value) for name, value in sizes.items() if name != "img_size"}
    sizes = {name: source.known[name] for name in VARIANTS if name in source.known} | sizes
    differ = [name for name, value in told.items() if value != sizes[name]]
    source.refuse([f"{name} is {told[name]} in config.json, {sizes[name]} in the weights" for name in differ])
    guesses = model.named_heads(sizes) or {}
    for name in ("img_size", *needed_sizes(source.kind)):
        given, known = square(getattr(args, name)), square(source.known.get(name))
        if None not in (given, known) and given != known:
            raise ValueError(f"--{name} {given}, but {source.path} has {known}; leave the flag out")
        told = known if given is None else given
        if told is None and name in guesses:
            source.notes.append(f"{name} {guesses[name]} is a guess from the width; --{name} says otherwise")
        sizes[name] = told if told is not None else sizes.get(name, guesses.get(name))
    return sizes


def square(size: object) -> object:
    """Give one number for a list of equal ones, as of a square, and a tuple for a rectangle."""
    if not isinstance(size, list | tuple):
        return size
    return size[0] if len(size) < 3 and len(set(size)) == 1 else tuple(size)


def options_of(source: Source, config: model.MAEConfig) -> dict:
    """Give what our class for a source takes beside the sizes, as its weights show it."""
    if source.kind == "segmenter":
        classifier = source.tensors.get("decode_head.conv_seg.weight")
        if classifier is None or classifier.ndim != 4:
            source.refuse(["missing decode_head.conv_seg.weight, (classes, channels, 1, 1)"])
        batch_norm = any(name.endswith("running_mean") for name in source.tensors)
        taps = source.record.get("taps") or model.default_taps(config.encoder_depth)
        options = dict(num_classes=classifier.shape[0], channels=classifier.shape[1], taps=taps)
        return options | dict(norm="batch" if batch_norm else "group", rel_pos_bias=bool(source.tables))
    if source.has("head."):
        layer = next(value for name, value in source.tensors.items() if re.match(r"head\.(1\.)?(weight|bias)", name))
        return dict(num_classes=len(layer), global_pool="avg" if source.has("fc_norm.") else "cls")
    return {}


def check(source: Source, sizes: dict) -> None:
    """Raise ValueError unless a source is whole: every name there, none too many, every shape right."""
    known = {name: value for name, value in sizes.items() if value is not None}  # only shapes are needed here
    config = model.MAEConfig(**{"encoder_num_heads": 1, "decoder_num_heads": 1, "norm_pix_loss": False} | known)
    found = source.tensors
    # These two first, because a model computes tables of their size even where nothing else has memory
    tables = {"pos_embed": config.encoder_embed_dim, "decoder_pos_embed": config.decoder_embed_dim}
    source.refuse(describe_shapes(source, {name: (1, 1 + config.num_patches, tables[name]) for name in tables}))
    with torch.device("meta"):
        probe_head = {"probe_head": True} if source.kind == "linear probe" else {}
        network = KINDS[source.kind](config, **options_of(source, config), **probe_head)
        if source.kind == "encoder" and source.tables:
            network.add_relative_positions()
    expected = {name.removeprefix("backbone."): value.shape for name, value in network.state_dict().items()}
    optional = {name for name in expected if name.endswith("num_batches_tracked")}
    if source.kind == "encoder" and not source.has("norm."):
        optional |= {"norm.weight", "norm.bias"}  # segmenters and classifiers of the mean have none
    problems = [f"missing {source.key_of(name)}" for name in expected if name not in found and name not in optional]
    problems += [f"{source.key_of(name)} does not belong to a {source.kind}" for name in found if name not in expected]
    problems += describe_shapes(source, expected)
    num_tokens = 1 + config.num_patches
    for block, index in source.indices.items():
        if index.shape != (num_tokens, num_tokens) or not torch.equal(
            index, gen_relative_position_index(config.grid_size, class_token=True)
        ):
            problems.append(f"{block}.attn.relative_position_index numbers positions otherwise than BEiT")
    source.refuse(problems)


# ------------------------------------------------------------------------------------------------ to a layout


class Converted(NamedTuple):
    """Weights under a target's names, the kind that they are there, and what was left out on the way."""

    tensors: dict[str, Tensor]
    kind: str
    left_out: list[str]


def convert(source: Source, target: str) -> Converted:
    """Rename a source's tensors for a target; ValueError when the target needs what the source lacks.

    Where a target has no place for a part beside the encoder, the encoder alone goes there: so with what pretraining
    by another target (paper, table 1d) or with mask tokens in the encoder (table 1c) has, anywhere but here.
    """
    kind = source.kind
    layout = "beit" if (target, kind) == ("huggingface", "classifier of the mean") else target
    names = {name: their_names(name, layout) for name in source.tensors}
    reduced = any(not theirs and name.startswith(NOT_OF_THE_ENCODER) for name, theirs in names.items())
    reduced |= target != "ours" and any(source.known.get(name) for name in VARIANTS)
    tensors, left_out = {}, list(source.left_over)
    for name, theirs in names.items():
        tensor = source.tensors[name]
        if not theirs or (reduced and name.startswith(NOT_OF_THE_ENCODER)):
            left_out.append(source.key_of(name))
            continue
        thirds = tensor.chunk(3) if len(theirs) == 3 else (tensor,)
        if layout == "beit" and name.endswith("attn.qkv.bias"):  # BEiT's keys have none
            theirs, (query, key, value) = [theirs[0], theirs[2]], thirds
            thirds = query, value
            if key.any():
                left_out.append(f"the keys' third of {source.key_of(name)}, on which no output depends")
        parts = (part.clone(memory_format=torch.contiguous_format) for part in thirds)
        tensors |= zip(theirs, parts, strict=True)
    kind = "encoder" if reduced else kind
    if LAYOUTS[layout].needs_norm and kind != "classifier of the mean" and not source.has("norm."):
        lacking = " and ".join(their_names(name, layout)[0] for name in ("norm.weight", "norm.bias"))
        raise ValueError(f"{LAYOUTS[layout].title} {kind} needs {lacking}, which {source.path} lacks")
    return Converted(tensors, kind, left_out)


def mmseg_checkpoint(tensors: dict[str, Tensor], config: model.MAEConfig, record: dict) -> dict:
    """Add what MMSegmentation's MAE has in every layer and ours need not have, at values that change nothing."""
    if record["norm"] != "batch":
        raise ValueError(f"MMSegmentation's heads have batch norm, not {record['norm']} norm")
    index = gen_relative_position_index(config.grid_size, class_token=True)
    ones = torch.ones(config.encoder_embed_dim, dtype=tensors["cls_token"].dtype)
    table = torch.zeros(int(index.max()) + 1, config.encoder_num_heads, dtype=ones.dtype)
    added = {}
    for layer in range(config.encoder_depth):
        added |= {f"layers.{layer}.gamma_{number}": ones.clone() for number in (1, 2)}
        added[f"layers.{layer}.attn.relative_position_bias_table"] = table.clone()
        added[f"layers.{layer}.attn.relative_position_index"] = index.clone()
    names = record["class_names"]
    meta = {"dataset_meta": {"classes": names, "palette": LABEL_COLOURS[: len(names)].tolist()}}
    return {"meta": meta, "state_dict": add_backbone(added | tensors)}


def flags_for(untold: list[str]) -> str:
    return "".join(" --[no-]norm_pix_loss" if name == "norm_pix_loss" else f" --{name} N" for name in untold)


def build_record(source: Source, config: model.MAEConfig, args: argparse.Namespace) -> dict:
    """Build the config.json that the training scripts write; ValueError where what is told contradicts the weights."""
    told, seen = source.record, options_of(source, config)
    told = {name: value for name, value in told.items() if name != "layer_scale"}  # multiplied into the weights
    fields, num_classes = config.as_record(decoder=source.kind == "masked autoencoder"), seen.get("num_classes")
    record = {"architecture": KINDS[source.kind].__name__, "config": fields}
    if source.kind == "segmenter":
        is_ade20k = num_classes == ADE20K_NUM_CLASSES
        names = ADE20K_CLASS_NAMES if is_ade20k else [f"class {index}" for index in range(num_classes)]
        record["class_names"] = list(names)
        record |= {"ignore_zero": is_ade20k, "resize_to": [4 * max(config.image_hw), min(config.image_hw)]}
    elif source.kind == "encoder" and source.tables:
        record["rel_pos_bias"] = True
    for name, value in seen.items():
        if told.get(name) not in (None, value):
            raise ValueError(f"{name} is {told[name]} beside the weights of {source.path}, {value} in them")
    record |= {name: value for name, value in told.items() if name != "class_names" or seen} | seen
    num_names = len(record.get("class_names", []))
    if num_names not in (0, num_classes):
        raise ValueError(f"{source.path} has {num_names} class names, but weights for {num_classes} classes")
    for name, default in (("mean", IMAGENET_MEAN), ("std", IMAGENET_STD)):
        channels = config.input_channels  # the scripts' own default where these are not three is 0.5 each
        default = default if channels == len(default) else [0.5] * channels
        values, least = getattr(args, name) or told.get(f"image_{name}", default), 0 if name == "std" else -math.inf
        if len(values) != channels or not all(least < value < math.inf for value in values):
            kind = "numbers" if name == "mean" else "numbers above 0"
            raise ValueError(f"--{name} takes {channels} {kind}, one for each channel, not {list(values)}")
        record[f"image_{name}"] = list(values)
    if args.value_range:
        given = "own" if args.value_range == ["own"] else [float(value) for value in args.value_range]
        files.check_entries(source.path, {"value_range": given}, weights.ENTRIES)
        record["value_range"] = given
    return record


def huggingface_configs(kind: str, config: model.MAEConfig, record: dict) -> dict[str, dict]:
    """Build the config.json and preprocessor_config.json of transformers' model of this kind."""
    sizes, (height, width) = record["config"], config.image_hw
    sizes = sizes if kind == "masked autoencoder" else without_decoder(sizes)
    # transformers' default epsilon, 1e-12, is not the original's
    content = layouts.HUGGINGFACE_CONFIGS[kind] | layouts.HUGGINGFACE_OF_ALL | {"layer_norm_eps": model.LAYER_NORM_EPS}
    content |= {theirs: sizes[ours] for ours, theirs in layouts.HUGGINGFACE_SIZES.items() if ours in sizes}
    content["intermediate_size"] = int(config.encoder_embed_dim * config.encoder_mlp_ratio)
    if kind == "masked autoencoder":
        if height != width:
            raise ValueError(f"transformers' ViTMAE takes square images only, not {height} x {width}")
        content["decoder_intermediate_size"] = int(config.decoder_embed_dim * config.decoder_mlp_ratio)
    elif kind != "encoder":
        names = record.get("class_names") or [f"LABEL_{index}" for index in range(record["num_classes"])]
        content["id2label"] = {str(index): name for index, name in enumerate(names)}
        numbers = content["label2id"] = {}
        for index, name in enumerate(names):  # ImageNet has two cranes
            numbers[f"{name} ({index})" if name in numbers else name] = index
    told = {"size": {"height": height, "width": width}} | {f"image_{n}": record[f"image_{n}"] for n in ("mean", "std")}
    return {"config.json": content, "preprocessor_config.json": layouts.HUGGINGFACE_PREPROCESSOR | told}


# ------------------------------------------------------------------------------------------------ writing


def check_target(target: Path, layout: str, overwrite: bool) -> None:
    """Refuse a target before any work: one of the wrong kind, or there already, or a folder with more than weights."""
    suffix = LAYOUTS[layout].suffix
    if suffix and target.suffix != suffix:
        raise ValueError(f"--to {layout} writes a {suffix} file, so {target} must end in {suffix}")
    if not suffix and target.suffix in (".safetensors", ".pth", ".pt", ".bin"):
        raise ValueError(f"--to {layout} writes a folder with model.safetensors; {target} looks like a file")
    if not os.path.lexists(target):  # a link to nowhere is there too
        return
    if not overwrite:
        raise FileExistsError(f"{target} exists; choose another target or add --overwrite")
    if target.exists() and target.is_dir() == bool(suffix):
        raise ValueError(f"{target} is a {'folder' if suffix else 'file'}, which --overwrite does not replace")
    others = {file.name for file in target.iterdir()} if target.is_dir() else set()
    others -= {"model.safetensors", "config.json", "preprocessor_config.json"}
    if others:
        raise ValueError(f"{target} also holds {min(others)}, so --overwrite does not replace it")


def write_target(target: Path, contents: Mapping[str, object]) -> None:
    """Write a target whole or not at all: one file under the name "", or those of a folder."""
    with files.written_whole(target) as temporary:
        if "" not in contents:
            temporary.mkdir()
        for name, content in contents.items():
            file = temporary / name
            if name.endswith(".json"):
                files.write_json(file, content)
            elif (name or target.name).endswith(".safetensors"):
                save_file(content, file, metadata={"format": "pt"})
            else:
                torch.save(content, file)


def build_contents(source: Source, converted: Converted, sizes: dict, args: argparse.Namespace) -> tuple[dict, str]:
    """Build what a target consists of, and say what opens it."""
    tensors, kind, target = converted.tensors, converted.kind, str(args.target)
    if args.to == "original":
        return {"": {"model": tensors}}, "the original release's scripts"
    if args.to == "timm":
        return {"": tensors}, timm_call(tensors, kind, sizes, target)
    if args.to == "tutorial":
        whole = f"ViTMAEForImageClassification(config).load_state_dict(safetensors.torch.load_file({target!r}))"
        return {"": tensors}, f"path_to_pretrained_weights={target!r}" if kind == "encoder" else whole
    if args.to == "mmseg" and kind == "encoder":
        return {"": tensors}, f"pretrained={target!r} in MMSegmentation's config"
    untold = [name for name in needed_sizes(kind) if sizes[name] is None]
    if untold:
        raise ValueError(f"nothing in or beside {source.path} tells {', '.join(untold)}; add{flags_for(untold)}")
    config = model.MAEConfig(**sizes)
    record = build_record(source, config, args)
    if args.to == "mmseg":
        return {"": mmseg_checkpoint(tensors, config, record)}, f"mmseg.apis.init_model(config, {target!r})"
    if args.to == "huggingface":
        contents = {"model.safetensors": tensors, **huggingface_configs(kind, config, record)}
        more = ", add_pooling_layer=False" if kind == "encoder" else ""
        (name,) = contents["config.json"]["architectures"]
        return contents, f"transformers.{name}.from_pretrained({target!r}{more})"
    tensors = add_backbone(tensors) if kind == "segmenter" else tensors
    opening = OPENS_HERE[record["architecture"]].format(shlex.quote(target))
    return {"model.safetensors": tensors, "config.json": record}, opening


def timm_call(tensors: dict[str, Tensor], kind: str, sizes: dict, target: str) -> str:
    """Give the line that opens a file in timm, whatever its sizes are."""
    names = {"img_size": "img_size", "patch_size": "patch_size", "in_chans": "input_channels"}
    names |= {name: f"encoder_{name}" for name in ("embed_dim", "depth", "num_heads", "mlp_ratio")}
    options = {theirs: sizes[ours] for theirs, ours in names.items()}
    options["num_classes"] = len(tensors["head.bias"]) if "head.bias" in tensors else 0
    options |= {"global_pool": "avg" if kind == "classifier of the mean" else "token", "checkpoint_path": target}
    listed = ", ".join(f"{name}={value!r}" for name, value in options.items() if value is not None)
    return f'timm.create_model("vit_base_patch16_224", {listed})'


# ------------------------------------------------------------------------------------------------ the command


def say(title: str, *lines: str) -> None:
    for line in lines:
        print(f"{title:<24}{line}")


def open_source(path: str, args: argparse.Namespace) -> tuple[Source, dict]:
    """Read a source and its sizes; ValueError, which names it, unless it is whole."""
    try:
        source = read_source(path)
        sizes = resolve_sizes(source, args)
        check(source, sizes)
    except ValueError as error:
        raise ValueError(str(error) if str(path) in str(error) else f"{path}: {error}") from error
    return source, sizes


def inspect(path: str, args: argparse.Namespace) -> None:
    """Print what a source is, and what it can serve here."""
    source, sizes = open_source(path, args)
    num_values = sum(value.numel() for name, value in source.tensors.items() if not name.endswith(layouts.BUFFERS))
    has_decoder = source.kind == "masked autoencoder"
    shown = sizes if has_decoder else without_decoder(sizes)
    say("layout", f"{source.title} {source.kind}")
    say("sizes", ", ".join(f"{name} {value}" for name, value in shown.items()))
    say("parameters", f"{num_values:,} in {len(source.tensors)} tensors")
    condition = "" if source.has("norm.") else ", a classifier with --global_pool avg, or a segmenter"
    if source.tables:
        condition = ", a segmenter with --rel_pos_bias, and no classifier"
    encoder = "a plain encoder; --to original --drop takes it out"
    uses = {
        "finetuning": (source.kind != "segmenter", encoder),
        "pretraining, pictures": (has_decoder, "the decoder (mask_token, decoder_*)"),
        "classifying": (source.has("head."), "a head (head.*)"),
        "segmenting": (source.kind == "segmenter", "neck.*, decode_head.* and auxiliary_head.*"),
    }
    for use, (serves, lacking) in uses.items():
        say(use, f"yes{condition if use == 'finetuning' else ''}" if serves else f"no, it lacks {lacking}")
    say("note", *source.notes)
    if source.left_over:
        say("no counterpart", f"{describe_names(source.left_over)}: {source.reasons}")
    untold = [name for name in needed_sizes(source.kind) if sizes[name] is None]
    if untold:
        say("nobody tells", ", ".join(untold))
    way_in = weights.convert_command(path) + flags_for(untold) + (" --drop" if source.left_over else "")
    with contextlib.suppress(ValueError, OSError):  # the scripts take what they open themselves
        way_in = "as it is" if model.read_sizes(path) and not source.left_over else way_in
    say("to use it here", way_in)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", nargs="?", metavar="SOURCE", help="weight file, folder with one, or http(s)://...")
    parser.add_argument(
        "target", nargs="?", type=files.user_path, metavar="TARGET", help="a folder, or a file, by --to"
    )
    parser.add_argument("--to", choices=[layout for layout in LAYOUTS if layout != "beit"])
    parser.add_argument("--inspect", metavar="SOURCE", help="say what a file or folder is and serves; writes nothing")
    parser.add_argument("--drop", action="store_true", help="leave out what the target has no place for")
    parser.add_argument("--overwrite", action="store_true", help="allow TARGET to exist")
    told = parser.add_argument_group("what shapes do not tell (default: what lies beside the weights, or named sizes)")
    told.add_argument("--img_size", type=int, nargs="+", metavar="PIXELS", help="of images that are no squares")
    told.add_argument("--encoder_num_heads", type=int, help="attention heads")
    told.add_argument("--decoder_num_heads", type=int, help="attention heads of the decoder")
    of_patches = "the decoder predicts normalised patches"
    told.add_argument("--norm_pix_loss", action=argparse.BooleanOptionalAction, help=of_patches)
    told.add_argument("--mean", type=float, nargs="+", help="of the images, in [0, 1] (ImageNet's, or 0.5 each)")
    told.add_argument("--std", type=float, nargs="+", help="of the images, in [0, 1] (ImageNet's, or 0.5 each)")
    told.add_argument("--value_range", nargs="+", help="of the images, as trained with: LOW HIGH, or own")
    args = parser.parse_args(argv)
    conversion = (args.source, args.target, args.to)
    if (args.source is not None) if args.inspect is not None else (None in conversion):
        parser.error("give SOURCE, TARGET and --to, or --inspect SOURCE alone")
    if args.inspect is not None and is_url(args.inspect):
        parser.error(f"--inspect fetches nothing; convert {args.inspect}, which keeps its file, or download it")
    return args


def main(args: argparse.Namespace) -> None:
    if args.inspect is not None:
        return inspect(args.inspect, args)
    place = Path(os.path.realpath(args.target))  # of a link, what it leads to
    if not os.path.lexists(place):
        files.recover(place)
    check_target(args.target, args.to, args.overwrite)
    if is_url(args.source):
        args.source = str(get_weights(args.source, place))
    source, sizes = open_source(args.source, args)
    converted = convert(source, args.to)
    if converted.left_out and not args.drop:
        because, shown = f" ({source.reasons})" if source.left_over else "", describe_names(converted.left_out)
        refusal = f"{LAYOUTS[args.to].title} layout has no place for {shown} of {args.source}{because}"
        raise ValueError(f"{refusal}; add --drop to leave them out")
    contents, opening = build_contents(source, converted, sizes, args)
    write_target(place, contents)
    say("note", *source.notes)
    if converted.left_out:
        say("left out", describe_names(converted.left_out))
    say("read", f"{source.title} {source.kind}, {args.source}")
    say("written", f"{len(converted.tensors)} tensors, {args.target}")
    say("opens with", opening)
    return None


if __name__ == "__main__":
    try:
        main(parse_args())
    except (ValueError, OSError) as error:
        sys.exit(escape_lines(f"error: {error}"))  # a server's words may hold control characters
