"""Move weights between the layouts that masked autoencoders are published in; nothing in a source is executed.

    python tools/convert_weights.py SOURCE TARGET --to {ours,original,timm,huggingface,mmseg,tutorial}
    python tools/convert_weights.py --inspect SOURCE

SOURCE is a weight file or a folder with one, whole or in shards; its layout is read from its keys. TABLES is the map,
one table for each layout, read both ways. Tensors are renamed, and q, k and v cut or joined, without touching a bit.
What a target has no place for is named, and needs --drop.
"""

import argparse
import dataclasses
import functools
import os
import re
import shutil
import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dataset import ADE20K_CLASS_NAMES, ADE20K_NUM_CLASSES, IMAGENET_MEAN, IMAGENET_STD, LABEL_COLOURS
from model import (
    LAYER_NORM_EPS,
    MODEL_CONFIGS,
    MAEConfig,
    VisionTransformer,
    ViTMAEForImageClassification,
    ViTMAEForPreTraining,
    ViTMAEForSegmentation,
    convert_command,
    count_blocks,
    default_taps,
    named_heads,
    read_file,
    read_json,
    read_sizes,
    relative_position_index,
    sizes_from_shapes,
    unwrap,
)
from utils import write_json

# ------------------------------------------------------------------------------------------------ the map

# Our name: theirs, without .weight and .bias; N is the number of a block. Of three names the first is of q, the second
# of k, the third of v.
Table = dict[str, str]


def same(names: str) -> Table:
    return {name: name for name in names.split()}


def blocks(ours: str, theirs: str, parts: Table) -> Table:
    """Put the table of one block under both projects' names for the list of blocks."""
    return {f"{ours}.N.{name}": " ".join(f"{theirs}.N.{part}" for part in parts[name].split()) for name in parts}


BLOCK = same("norm1 attn.qkv attn.proj norm2 mlp.fc1 mlp.fc2")
# What blocks of BEiT's kind have more; of it ours have the table, and `simplify` expresses the rest.
BEIT_BLOCK = same(
    "gamma_1 gamma_2 attn.q_bias attn.v_bias attn.relative_position_bias_table attn.relative_position_index"
)
ENCODER = {**same("cls_token pos_embed patch_embed.proj norm"), **blocks("blocks", "blocks", BLOCK)}
DECODER = {
    **same("mask_token decoder_pos_embed decoder_embed decoder_norm decoder_pred"),
    **blocks("decoder_blocks", "decoder_blocks", BLOCK),
}
SEGMENTER = same(
    """
    neck.upsample_4x.N neck.upsample_2x.N
    decode_head.psp_modules.N.1.conv decode_head.psp_modules.N.1.bn decode_head.bottleneck.conv
    decode_head.bottleneck.bn decode_head.lateral_convs.N.conv decode_head.lateral_convs.N.bn
    decode_head.fpn_convs.N.conv decode_head.fpn_convs.N.bn decode_head.fpn_bottleneck.conv
    decode_head.fpn_bottleneck.bn decode_head.conv_seg
    auxiliary_head.convs.N.conv auxiliary_head.convs.N.bn auxiliary_head.conv_seg
    """
)
MMSEG_BLOCK = BLOCK | {"norm1": "ln1", "norm2": "ln2", "mlp.fc1": "ffn.layers.0.0", "mlp.fc2": "ffn.layers.1"}
HUGGINGFACE_BLOCK = {
    "norm1": "layernorm_before",
    "attn.qkv": "attention.attention.query attention.attention.key attention.attention.value",
    "attn.proj": "attention.output.dense",
    "norm2": "layernorm_after",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}
HUGGINGFACE = {
    "cls_token": "vit.embeddings.cls_token",
    "pos_embed": "vit.embeddings.position_embeddings",
    "patch_embed.proj": "vit.embeddings.patch_embeddings.projection",
    **blocks("blocks", "vit.encoder.layer", HUGGINGFACE_BLOCK),
    "head": "classifier",
}
TABLES = {
    "ours": {
        **ENCODER,
        **DECODER,
        **SEGMENTER,
        **same("fc_norm head head.N"),
        **blocks("blocks", "blocks", BEIT_BLOCK),
    },
    "original": {**ENCODER, **DECODER, **same("fc_norm head head.N")},
    "timm": {**ENCODER, **same("fc_norm head")},
    "huggingface": {
        **HUGGINGFACE,
        "norm": "vit.layernorm",
        "mask_token": "decoder.mask_token",
        "decoder_pos_embed": "decoder.decoder_pos_embed",
        "decoder_embed": "decoder.decoder_embed",
        **blocks("decoder_blocks", "decoder.decoder_layers", HUGGINGFACE_BLOCK),
        "decoder_norm": "decoder.decoder_norm",
        "decoder_pred": "decoder.decoder_pred",
    },
    # ViTForImageClassification looks at the cls token; the mean of the patches behind a norm is BeitFor...'s.
    "beit": {
        **{ours: theirs.replace("vit.", "beit.") for ours, theirs in HUGGINGFACE.items()},
        "fc_norm": "beit.pooler.layernorm",
    },
    "mmseg": {
        **same("cls_token pos_embed norm"),
        "patch_embed.proj": "patch_embed.projection",
        **blocks("blocks", "layers", MMSEG_BLOCK | BEIT_BLOCK),
        **SEGMENTER,
    },
    "tutorial": {
        "cls_token": "encoder.enc_cls_token",
        "pos_embed": "encoder.enc_pos_embed",
        "patch_embed.proj": "encoder.patch_embed.proj",
        **blocks("blocks", "encoder.encoder_blocks", BLOCK),
        "norm": "encoder.encoder_layer_norm",
        "head": "head",
    },
}
# Other spellings that are read, as (pattern, the table's spelling), applied in this order.
SPELLINGS = {
    "ours": [
        (r"^backbone\.", ""),
        (r"\.ls([12])\.gamma$", r".gamma_\1"),  # timm's
        (r"^fpn1\.", "neck.upsample_4x."),  # BEiT's own segmenter
        (r"^fpn2\.", "neck.upsample_2x."),
    ],
    "mmseg": [(r"^backbone\.", "")],
    "huggingface": [
        (r"^(?=(embeddings|encoder|layers|layernorm|pooler)\.)", "vit."),  # of a model without a head
        (r"^vit\.layers\.", "vit.encoder.layer."),  # what transformers 5 has in memory
        (r"^decoder\.decoder_encoder\.layer\.", "decoder.decoder_layers."),  # what transformers 5 saves
        (r"\.attention\.q_proj\.", ".attention.attention.query."),
        (r"\.attention\.k_proj\.", ".attention.attention.key."),
        (r"\.attention\.v_proj\.", ".attention.attention.value."),
        (r"\.attention\.o_proj\.", ".attention.output.dense."),
        (r"\.mlp\.fc1\.", ".intermediate.dense."),
        (r"\.mlp\.fc2\.", ".output.dense."),
    ],
    "tutorial": [(r"^(?=(patch_embed|enc_cls_token|enc_pos_embed|encoder_blocks|encoder_layer_norm)\b)", "encoder.")],
}
SPELLINGS["beit"] = [(old.replace("vit", "beit"), new.replace("vit", "beit")) for old, new in SPELLINGS["huggingface"]]
# What is known to have no counterpart in ours, and why.
LEFT_OVER = {
    "huggingface": (r"vit\.(pooler|embeddings\.mask_token)\b", "ours read the tokens as they are"),
    "tutorial": (
        r"(decoder|embed2image|upernet)\b",
        "its decoder never sees the cls token, its pyramid has other bins",
    ),
}
TITLES = {
    "ours": "this project's",
    "original": "the original release's",
    "timm": "timm's",
    "huggingface": "Hugging Face's ViT and ViTMAE",
    "beit": "Hugging Face's BEiT",
    "mmseg": "MMSegmentation's",
    "tutorial": "PyTorch-Adventures'",
    "beit style": "BEiT's",
}
ORIGINAL_OR_TIMM = f"{TITLES['original']} (or timm's, which has the same names)"

# What a source can be: our class for it, and the layouts that hold it whole. Of the rest only the encoder goes there.
KINDS = {
    "masked autoencoder": ("ViTMAEForPreTraining", {"ours", "original", "huggingface"}),
    "classifier of the mean": ("ViTMAEForImageClassification", {"ours", "original", "timm", "beit"}),
    "classifier of the cls token": (
        "ViTMAEForImageClassification",
        {"ours", "original", "timm", "huggingface", "tutorial"},
    ),
    "linear probe": ("ViTMAEForImageClassification", {"ours", "original"}),
    "segmenter": ("ViTMAEForSegmentation", {"ours", "mmseg"}),
    "encoder": ("VisionTransformer", {"ours", "original", "timm", "huggingface", "mmseg", "tutorial"}),
}
HUGGINGFACE_CLASSES = {
    "masked autoencoder": ("ViTMAEForPreTraining", "vit_mae"),
    "classifier of the mean": ("BeitForImageClassification", "beit"),
    "classifier of the cls token": ("ViTForImageClassification", "vit"),
    "encoder": ("ViTModel", "vit"),
}
NEED_FINAL_NORM = {"timm", "huggingface", "tutorial"}
FOLDERS = {"ours", "huggingface"}
SUFFIXES = {"original": ".pth", "timm": ".safetensors", "mmseg": ".pth", "tutorial": ".safetensors"}

BUFFERS = ("running_mean", "running_var", "num_batches_tracked")
SEGMENTER_PARTS = ("neck.", "decode_head.", "auxiliary_head.")
DECODER_PARTS = ("decoder_", "mask_token")
NOT_OF_THE_ENCODER = ("fc_norm.", "head.", *SEGMENTER_PARTS, *DECODER_PARTS)
LEAVES = ("weight", "bias", *BUFFERS)
# Numbers of dimensions, so that all later code may rely on them; the rest have one.
RANKS = {
    r".*\.num_batches_tracked": 0,
    r"blocks\..*\.relative_position_(index|bias_table)": 2,
    r"((decoder_)?blocks\..*\.(attn|mlp)\..*|decoder_embed|decoder_pred|head.*)\.weight": 2,
    r"cls_token|mask_token|(decoder_)?pos_embed": 3,
    r"patch_embed\.proj\.weight": 4,
}


def split_name(name: str) -> tuple[str, str, str]:
    """Split blocks.3.norm1.weight into blocks.N.norm1, 3 and .weight; what is missing is empty."""
    stem, _, leaf = name.rpartition(".")
    stem, leaf = (stem, f".{leaf}") if leaf in LEAVES else (name, "")
    number = re.search(r"\.(\d+)(?=\.|$)", stem)
    if number is None:
        return stem, "", leaf
    return f"{stem[: number.start()]}.N{stem[number.end() :]}", number[1], leaf


def with_number(template: str, number: str) -> str:
    return template.replace(".N", f".{number}", 1)


def their_names(name: str, layout: str) -> list[str]:
    """Give what a layout calls a tensor of ours: one name, or three of q, k, v; none where it has no such thing."""
    template, number, leaf = split_name(name)
    return [with_number(theirs, number) + leaf for theirs in TABLES[layout].get(template, "").split()]


@functools.cache
def inverse_table(layout: str) -> dict[str, tuple[str, int]]:
    pairs = [(ours, theirs.split()) for ours, theirs in TABLES[layout].items()]
    return {name: (ours, index) for ours, theirs in pairs for index, name in enumerate(theirs)}


def respell(key: str, layout: str) -> str:
    for pattern, replacement in SPELLINGS.get(layout, []):
        key = re.sub(pattern, replacement, key)
    return key


def our_name(key: str, layout: str) -> tuple[str, int] | None:
    """Give our name for a key of a layout, and which third of q, k, v it is; None for keys that the table lacks."""
    template, number, leaf = split_name(respell(key, layout))
    if template not in inverse_table(layout):
        return None
    ours, index = inverse_table(layout)[template]
    return with_number(ours, number) + leaf, index


# ------------------------------------------------------------------------------------------------ reading files

WHOLE_OR_INDEX = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


def find_source(path: Path) -> Path:
    """Give the weight file, or the index of shards, that a path means."""
    if path.is_dir():
        for name in WHOLE_OR_INDEX:
            if (path / name).is_file():
                return path / name
        raise FileNotFoundError(f"{path} holds none of {', '.join(WHOLE_OR_INDEX)}; give the weight file itself")
    if not path.is_file():
        raise FileNotFoundError(f"no weight file or folder at {path}")
    return path


def read_shards(index: Path) -> dict[str, Tensor]:
    """Read the files that an index.json lists; ValueError where they and the index disagree."""
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise ValueError(f"{index} has no weight_map of keys and files")
    tensors = {}
    for name in sorted(set(places.values())):
        if Path(name).name != name or not (index.parent / name).is_file():
            raise ValueError(f"{index} lists the shard {name!r}, which is no file in {index.parent}")
        shard = read_file(index.parent / name)
        expected = {key for key, place in places.items() if place == name}
        if shard.keys() != expected:
            key = sorted(shard.keys() ^ expected)[0]
            raise ValueError(f"{index} and {name} disagree about {key}")
        tensors |= shard
    return tensors


# ------------------------------------------------------------------------------------------------ what a source is


@dataclass
class Source:
    """Weights under our names (an encoder's without `backbone.`), and what is known about them beside their shapes."""

    path: Path
    layout: str
    title: str
    tensors: dict[str, Tensor]
    keys: dict[str, str]  # the source's own for each of our names, for messages
    left_over: list[str]  # keys that have no counterpart in ours
    known: dict  # fields of MAEConfig
    record: dict  # other entries of config.json
    notes: list[str]
    indices: dict[str, Tensor]  # relative_position_index of blocks, to be compared with ours

    @property
    def kind(self) -> str:
        if any(name.startswith(SEGMENTER_PARTS) for name in self.tensors):
            return "segmenter"
        if any(name.startswith(DECODER_PARTS) for name in self.tensors):
            return "masked autoencoder"
        if any(name.startswith("head.1.") for name in self.tensors):
            return "linear probe"
        if any(name.startswith("head.") for name in self.tensors):
            pooled = any(name.startswith("fc_norm.") for name in self.tensors)
            return "classifier of the mean" if pooled else "classifier of the cls token"
        return "encoder"

    @property
    def has_relative_positions(self) -> bool:
        return any(name.endswith("relative_position_bias_table") for name in self.tensors)

    def key_of(self, name: str) -> str:
        """Give what the source calls, or would call, a tensor of ours."""
        if name in self.keys:
            return self.keys[name]
        prefix = "backbone." if any(key.startswith("backbone.") for key in self.keys.values()) else ""
        names = their_names(name, self.layout)
        return f"{'' if name.startswith(NOT_OF_THE_ENCODER) else prefix}{names[0]}" if names else name


def detect_layout(keys: Collection[str], path: Path) -> str:
    """Give the table that knows most of these keys; ValueError when none knows any."""
    layouts = [layout for layout in TABLES if layout not in ("original", "timm")]  # they are read as ours
    counts = {layout: sum(our_name(key, layout) is not None for key in keys) for layout in layouts}
    best = max(layouts, key=counts.get)
    if counts[best] == 0:
        raise ValueError(
            f"{path} is in no layout known here: its keys are such as {sorted(keys)[:3]}. Known are "
            f"{', '.join(TITLES.values())}"
        )
    return best


def read_source(path: str | Path) -> Source:
    """Read weights of any layout under our names; ValueError names every key that no table explains."""
    path = Path(path)
    file = find_source(path)
    content = read_shards(file) if file.name.endswith(".index.json") else read_file(file)
    tensors = unwrap(content, file)
    layout = detect_layout(tensors, path)
    left_over = [key for key in tensors if layout in LEFT_OVER and re.match(LEFT_OVER[layout][0], respell(key, layout))]
    ours, keys = rename(path, {key: value for key, value in tensors.items() if key not in left_over}, layout)
    known, record, notes = read_facts(file.parent, layout, content)
    source = Source(path, layout, TITLES[layout], ours, keys, left_over, known, record, notes, {})
    if layout == "ours":
        source.title = title_of_ours(tensors, file.parent, record)
    simplify(source)
    if source.kind == "encoder":  # a norm behind timm's mean of the patches, without a head
        behind = [name for name in source.tensors if name.startswith("fc_norm.")]
        source.left_over += [source.key_of(name) for name in behind]
        source.tensors = {name: value for name, value in source.tensors.items() if name not in behind}
    return source


def title_of_ours(tensors: Mapping, folder: Path, record: dict) -> str:
    """Tell apart the layouts that share our names, as far as that can be seen."""
    if "architecture" in record:
        return TITLES["ours"]
    if any(re.search(r"gamma|q_bias|relative_position|^backbone", key) for key in tensors):
        return TITLES["beit style"]
    return TITLES["timm"] if "pretrained_cfg" in read_json(folder / "config.json") else ORIGINAL_OR_TIMM


def rename(path: Path, tensors: Mapping[str, Tensor], layout: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Give tensors our names, q, k and v joined, with the key that each came from."""
    parts: dict[str, dict[int, Tensor]] = {}
    keys: dict[str, str] = {}
    problems = []
    for key, tensor in tensors.items():
        place = our_name(key, layout)
        if place is not None and (problem := describe_misfit(place[0], tensor)):
            raise_problems(path, layout, [f"{key} {problem}"])
        if place is None:
            problems.append(f"unknown key {key}")
        elif place[1] in parts.setdefault(place[0], {}):
            problems.append(f"{keys[place[0]]} and {key} are the same tensor")
        else:
            parts[place[0]][place[1]] = tensor
            keys.setdefault(place[0], key)
    joined = {}
    for name, thirds in parts.items():
        theirs = their_names(name, layout)
        if layout == "beit" and name.endswith("attn.qkv.bias") and 1 not in thirds and 0 in thirds:
            thirds[1] = torch.zeros_like(thirds[0])  # BEiT's keys have no bias: no output depends on it
        missing = [theirs[index] for index in range(len(theirs)) if index not in thirds]
        problems += [f"missing {key}" for key in missing]
        if len({(part.shape, part.dtype) for part in thirds.values()}) > 1:
            parts_of = (f"{theirs[i]} {tuple(thirds[i].shape)} {thirds[i].dtype}" for i in sorted(thirds))
            problems.append(f"shapes or types that differ: {', '.join(parts_of)}")
        elif not missing:
            joined[name] = torch.cat([thirds[index] for index in range(3)]) if len(theirs) == 3 else thirds[0]
    raise_problems(path, layout, problems)
    return joined, keys


def describe_misfit(name: str, tensor: Tensor) -> str | None:
    """Say what is wrong with the type or the dimensions of a tensor of this name; a segmenter's are compared later."""
    if not tensor.is_floating_point() and not name.endswith(("relative_position_index", "num_batches_tracked")):
        return f"is of {tensor.dtype}, not of floating point"
    rank = next((rank for pattern, rank in RANKS.items() if re.fullmatch(pattern, name)), 1)
    if tensor.ndim != rank and not name.startswith(SEGMENTER_PARTS):
        return f"has the shape {tuple(tensor.shape)} instead of one of {rank} dimensions"
    return None


def raise_problems(path: Path, layout: str, problems: list[str]) -> None:
    if problems:
        shown = "; ".join(problems[:5]) + (f"; and {len(problems) - 5} more" if len(problems) > 5 else "")
        raise ValueError(f"{path}, read as {TITLES[layout]} layout, does not fit: {shown}")


def simplify(source: Source) -> None:
    """Express what blocks of BEiT's kind have more than ours by what ours have, so that outputs stay the same."""
    tensors, depth, folded = source.tensors, count_blocks(source.tensors, "blocks"), 0
    for gamma in ("gamma_1", "gamma_2"):
        absent = [name for index in range(depth) if (name := f"blocks.{index}.{gamma}") not in tensors]
        if 0 < len(absent) < depth:
            raise_problems(source.path, source.layout, [f"missing {source.key_of(name)}" for name in absent])
    for block in (f"blocks.{index}" for index in range(depth)):
        for gamma, layer in (("gamma_1", "attn.proj"), ("gamma_2", "mlp.fc2")):
            scale = tensors.pop(f"{block}.{gamma}", None)
            weight, bias = (tensors.get(f"{block}.{layer}.{leaf}") for leaf in ("weight", "bias"))
            if scale is None or weight is None or bias is None or bool((scale == 1).all()):
                continue
            if not len(scale) == len(bias) == len(weight):
                found = {gamma: scale, f"{layer}.weight": weight, f"{layer}.bias": bias}
                listed = ", ".join(f"{source.key_of(f'{block}.{n}')} {tuple(v.shape)}" for n, v in found.items())
                raise_problems(source.path, source.layout, [f"lengths that differ: {listed}"])
            tensors[f"{block}.{layer}.weight"], tensors[f"{block}.{layer}.bias"] = weight * scale[:, None], bias * scale
            folded += 1
        q_bias, v_bias = (tensors.pop(f"{block}.attn.{name}", None) for name in ("q_bias", "v_bias"))
        if q_bias is not None and v_bias is not None:
            tensors[f"{block}.attn.qkv.bias"] = torch.cat([q_bias, torch.zeros_like(q_bias), v_bias])
        position_index = tensors.pop(f"{block}.attn.relative_position_index", None)
        if position_index is not None:
            source.indices[block] = position_index
    if folded:
        source.notes.append(f"{folded} layer scales multiplied into the layers before them; each value rounded once")
    zero_tables = [name for name in tensors if name.endswith("relative_position_bias_table")]
    if zero_tables:
        source.known.setdefault("encoder_num_heads", tensors[zero_tables[0]].shape[-1])
    if zero_tables and "architecture" not in source.record and not any(tensors[name].any() for name in zero_tables):
        source.notes.append("relative positions left out: all are zero, which changes nothing")
        source.tensors = {name: value for name, value in tensors.items() if name not in zero_tables}


# ------------------------------------------------------------------------------------------------ facts beside them


def read_facts(folder: Path, layout: str, content: dict) -> tuple[dict, dict, list[str]]:
    """Read what a source's config.json, or a training's own record, says beyond shapes: sizes, record, notes.

    The config.json of another layout than the weights' happens to lie in the same folder, and says nothing.
    """
    config = read_json(folder / "config.json")
    if layout in ("huggingface", "beit") and "model_type" in config:
        return facts_of_huggingface(config, read_json(folder / "preprocessor_config.json"))
    if layout == "ours" and isinstance(config.get("config"), dict):
        return config["config"], {name: value for name, value in config.items() if name != "config"}, []
    if layout == "ours" and isinstance(config.get("pretrained_cfg"), dict):
        pretrained = config["pretrained_cfg"]
        return {}, {f"image_{name}": pretrained[name] for name in ("mean", "std") if name in pretrained}, []
    known, record = {}, {}
    arguments = content.get("args")
    if isinstance(arguments, argparse.Namespace):
        name = str(getattr(arguments, "model", ""))
        named = MODEL_CONFIGS.get(name) or MODEL_CONFIGS.get(f"mae_{name}")
        if named is not None:
            known = {field: getattr(named, field) for field in ("encoder_num_heads", "decoder_num_heads")}
        if hasattr(arguments, "norm_pix_loss"):
            known["norm_pix_loss"] = bool(arguments.norm_pix_loss)
    meta = content.get("meta")
    if isinstance(meta, dict):
        classes = meta.get("CLASSES") or (meta.get("dataset_meta") or {}).get("classes")
        record = {"class_names": list(classes)} if classes else {}
    return known, record, []


HUGGINGFACE_SIZES = {
    "img_size": "image_size",
    "patch_size": "patch_size",
    "input_channels": "num_channels",
    "encoder_embed_dim": "hidden_size",
    "encoder_depth": "num_hidden_layers",
    "encoder_num_heads": "num_attention_heads",
    "decoder_embed_dim": "decoder_hidden_size",
    "decoder_depth": "decoder_num_hidden_layers",
    "decoder_num_heads": "decoder_num_attention_heads",
    "norm_pix_loss": "norm_pix_loss",
}


def facts_of_huggingface(config: dict, preprocessor: dict) -> tuple[dict, dict, list[str]]:
    if config.get("hidden_act", "gelu") != "gelu":
        raise ValueError(f"hidden_act {config['hidden_act']!r} of this config.json is not gelu, which all of ours have")
    known = {ours: config[theirs] for ours, theirs in HUGGINGFACE_SIZES.items() if theirs in config}
    record = {name: preprocessor[name] for name in ("image_mean", "image_std") if name in preprocessor}
    labels = config.get("id2label") or {}
    class_names = [labels[key] for key in sorted(labels, key=int)]
    if class_names and class_names != [f"LABEL_{index}" for index in range(len(class_names))]:
        record["class_names"] = class_names
    eps, notes = config.get("layer_norm_eps", 1e-12), []
    if eps != LAYER_NORM_EPS:
        notes.append(f"layer norms: epsilon {eps:g} there, {LAYER_NORM_EPS:g} here, as in the original release")
    return known, record, notes


# ------------------------------------------------------------------------------------------------ sizes


def resolve_sizes(source: Source, args: argparse.Namespace) -> dict:
    """Give the fields of MAEConfig by shapes, flags and the source's own record; None for what nobody says.

    ValueError where shapes make no sense, or shapes, flags and record contradict each other.
    """
    needed = ("cls_token", "pos_embed", "patch_embed.proj.weight", "blocks.0.norm1.weight")
    problems = [f"missing {source.key_of(name)}" for name in needed if name not in source.tensors]
    weight = source.tensors.get("patch_embed.proj.weight")
    if weight is not None and (weight.ndim != 4 or weight.shape[2] != weight.shape[3]):
        key = source.key_of("patch_embed.proj.weight")
        problems.append(f"{key} {tuple(weight.shape)} is no convolution of square patches")
    raise_problems(source.path, source.layout, problems)
    sizes = sizes_from_shapes(source.tensors, source.path)
    for part in ("encoder", "decoder"):  # a ratio need not give a whole number, and is then rounded down
        name, width = f"{part}_mlp_ratio", sizes.get(f"{part}_embed_dim", 0)
        known = source.known.get(name)
        if name in sizes and isinstance(known, int | float) and int(known * width) == round(sizes[name] * width):
            sizes[name] = known
    problems = [
        f"{name} is {source.known[name]} in config.json, {value} in the weights"
        for name, value in sizes.items()
        if name != "img_size" and square(source.known.get(name, value)) != value
    ]
    raise_problems(source.path, source.layout, problems)
    heads = named_heads(sizes) or {}
    tables = [value for name, value in source.tensors.items() if name.endswith("relative_position_bias_table")]
    if tables:
        heads["encoder_num_heads"] = tables[0].shape[-1]
    for name in ("encoder_num_heads", "decoder_num_heads", "norm_pix_loss", "img_size"):
        told = choose(name, getattr(args, name), source.known.get(name), source.path)
        sizes[name] = told if told is not None else sizes.get(name, heads.get(name))
    return sizes


def choose(name: str, given: object, known: object, path: Path) -> object:
    """Give a flag, or else what the source says; ValueError where they differ."""
    given, known = (square(value) if name == "img_size" else value for value in (given, known))
    if None not in (given, known) and given != known:
        raise ValueError(f"--{name} {given}, but {path} has {known}; leave the flag out")
    return known if given is None else given


def square(size: object) -> object:
    """Give one number for a list of equal ones, as of a square, and a tuple for a rectangle."""
    if not isinstance(size, list | tuple):
        return size
    return size[0] if len(set(size)) == 1 else tuple(size)


def build_config(sizes: dict, placeholder: bool = False) -> MAEConfig:
    """Build a MAEConfig; for what only shapes are needed of, heads that nobody told may be one."""
    known = {name: value for name, value in sizes.items() if value is not None}
    if placeholder:
        known = {"encoder_num_heads": 1, "decoder_num_heads": 1, "norm_pix_loss": False} | known
    return MAEConfig(**known)


def build_model(source: Source, sizes: dict) -> nn.Module:
    """Build the model that a source is of, without memory, to compare names and shapes with."""
    config, tensors = build_config(sizes, placeholder=True), source.tensors
    with torch.device("meta"):
        if source.kind == "masked autoencoder":
            return ViTMAEForPreTraining(config)
        if source.kind == "segmenter":
            return ViTMAEForSegmentation(config, **segmenter_options(source), taps=[0] * 4)
        if source.kind != "encoder":
            head = "head.1" if source.kind == "linear probe" else "head"
            num_classes = len(tensors.get(f"{head}.weight", tensors.get(f"{head}.bias", [0])))
            pool = "avg" if "fc_norm.weight" in tensors else "cls"
            return ViTMAEForImageClassification(config, num_classes, pool, probe_head=head == "head.1")
        model = VisionTransformer(config)
        if source.has_relative_positions:
            model.add_relative_positions()
        return model


def segmenter_options(source: Source) -> dict:
    classifier = source.tensors.get("decode_head.conv_seg.weight")
    if classifier is None or classifier.ndim != 4:
        raise_problems(source.path, source.layout, ["missing decode_head.conv_seg.weight, (classes, channels, 1, 1)"])
    batch_norm = any(name.endswith("running_mean") for name in source.tensors)
    return dict(
        num_classes=classifier.shape[0],
        channels=classifier.shape[1],
        norm="batch" if batch_norm else "group",
        rel_pos_bias=source.has_relative_positions,
    )


def check(source: Source, sizes: dict) -> None:
    """Raise ValueError unless a source is whole: every name there, none too many, every shape right."""
    model = build_model(source, sizes)
    expected = {name.removeprefix("backbone."): value.shape for name, value in model.state_dict().items()}
    optional = {name for name in expected if name.endswith("num_batches_tracked")}
    if source.kind == "encoder" and not any(name.startswith("norm.") for name in source.tensors):
        optional |= {"norm.weight", "norm.bias"}  # segmenters and classifiers of the mean have none
    found, problems = source.tensors, []
    problems += [f"missing {source.key_of(name)}" for name in expected if name not in found and name not in optional]
    problems += [f"{source.key_of(name)} does not belong to a {source.kind}" for name in found if name not in expected]
    problems += [
        f"{source.key_of(name)} is {tuple(found[name].shape)} instead of {tuple(shape)}"
        for name, shape in expected.items()
        if name in found and found[name].shape != shape
    ]
    grid = build_config(sizes, placeholder=True).grid_size
    problems += [
        f"{block}.attn.relative_position_index numbers positions otherwise than BEiT"
        for block, index in source.indices.items()
        if not torch.equal(index, relative_position_index(grid))
    ]
    raise_problems(source.path, source.layout, problems)


# ------------------------------------------------------------------------------------------------ to a layout


@dataclass
class Converted:
    """Weights under a target's names, the kind that they are there, and what was left out on the way."""

    tensors: dict[str, Tensor]
    kind: str
    left_out: list[str]


def convert(source: Source, target: str) -> Converted:
    """Rename a source's tensors for a target; ValueError when the target needs what the source lacks."""
    kind = source.kind
    layout = "beit" if (target, kind) == ("huggingface", "classifier of the mean") else target
    reduced = layout not in KINDS[kind][1]
    tensors, left_out = {}, list(source.left_over)
    for name, tensor in source.tensors.items():
        theirs = their_names(name, layout)
        if not theirs or (reduced and name.startswith(NOT_OF_THE_ENCODER)):
            left_out.append(source.key_of(name))
            continue
        thirds = tensor.chunk(3) if len(theirs) == 3 else (tensor,)
        if layout == "beit" and name.endswith("attn.qkv.bias"):  # BEiT's keys have none
            theirs, (query, key, value) = [theirs[0], theirs[2]], thirds
            thirds = query, value
            if key.any():
                left_out.append(f"the keys' third of {source.key_of(name)}, on which no output depends")
        tensors |= {
            key: part.clone(memory_format=torch.contiguous_format) for key, part in zip(theirs, thirds, strict=True)
        }
    kind = "encoder" if reduced else kind
    if layout in NEED_FINAL_NORM and kind != "classifier of the mean" and "norm.weight" not in source.tensors:
        lacking = [their_names(name, layout)[0] for name in ("norm.weight", "norm.bias")]
        raise ValueError(f"{TITLES[layout]} {kind} needs {' and '.join(lacking)}, which {source.path} lacks")
    return Converted(tensors, kind, left_out)


def describe_names(names: list[str]) -> str:
    """Put many keys in few words: what the encoder has by their names in a block, all else by their beginnings."""
    shown = dict.fromkeys(
        re.sub(r"\.\d+\.", ".N.", name).removesuffix(".weight").removesuffix(".bias")
        if re.match(r"(the |backbone|blocks|layers)", name)
        else name.split(".")[0]
        for name in names
    )
    return f"{', '.join(shown)} ({len(names)} tensors)"


def add_backbone(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Put the encoder of a segmenter under `backbone.`."""
    return {n if n.startswith(SEGMENTER_PARTS) else f"backbone.{n}": value for n, value in tensors.items()}


def mmseg_checkpoint(tensors: dict[str, Tensor], config: MAEConfig, record: dict) -> dict:
    """Add what MMSegmentation's MAE has in every layer and ours need not have, at values that change nothing."""
    if record["norm"] != "batch":
        raise ValueError(f"MMSegmentation's heads have batch norm, not {record['norm']} norm")
    index = relative_position_index(config.grid_size)
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


# ------------------------------------------------------------------------------------------------ beside the weights


def flags_for(untold: list[str]) -> str:
    return "".join(" --[no-]norm_pix_loss" if name == "norm_pix_loss" else f" --{name} N" for name in untold)


def needed_sizes(kind: str) -> list[str]:
    return ["encoder_num_heads", *(["decoder_num_heads", "norm_pix_loss"] if kind == "masked autoencoder" else [])]


def without_decoder(sizes: dict) -> dict:
    return {name: value for name, value in sizes.items() if not name.startswith(("decoder", "norm_pix"))}


def build_record(source: Source, config: MAEConfig, args: argparse.Namespace) -> dict:
    """Build the config.json that the training scripts write, as far as the source tells."""
    fields = dataclasses.asdict(config)
    if source.kind != "masked autoencoder":
        fields = without_decoder(fields)
    record = {"architecture": KINDS[source.kind][0], "config": fields}
    if "class_names" in source.record:
        record["class_names"] = source.record["class_names"]
    if record["architecture"] == "ViTMAEForImageClassification":
        head = next(value for name, value in source.tensors.items() if name in ("head.bias", "head.1.bias"))
        pool = "avg" if "fc_norm.weight" in source.tensors else "cls"
        record |= {"num_classes": len(head), "global_pool": pool}
    if source.kind == "segmenter":
        record |= segmenter_record(source, config, args)
    elif source.has_relative_positions:
        record["rel_pos_bias"] = True
    for name, default in (("mean", IMAGENET_MEAN), ("std", IMAGENET_STD)):
        channels = config.input_channels  # the scripts' own default where these are not three is 0.5 each
        default = default if channels == len(default) else [0.5] * channels
        values = list(getattr(args, name) or source.record.get(f"image_{name}") or default)
        if len(values) != channels:
            raise ValueError(f"--{name} takes {channels} numbers, one for each channel, not {values}")
        record[f"image_{name}"] = values
    return source.record | record


def segmenter_record(source: Source, config: MAEConfig, args: argparse.Namespace) -> dict:
    options = segmenter_options(source)
    is_ade20k = options["num_classes"] == ADE20K_NUM_CLASSES
    names = ADE20K_CLASS_NAMES if is_ade20k else [f"class {index}" for index in range(options["num_classes"])]
    taps = choose("taps", args.taps, source.record.get("taps"), source.path)
    ignore_zero = choose("ignore_zero", args.ignore_zero, source.record.get("ignore_zero"), source.path)
    return {
        **options,
        "taps": taps or default_taps(config.encoder_depth),
        "class_names": list(source.record.get("class_names") or names),
        "ignore_zero": is_ade20k if ignore_zero is None else ignore_zero,
        "resize_to": source.record.get("resize_to") or [4 * max(config.image_hw), min(config.image_hw)],
    }


def huggingface_configs(kind: str, config: MAEConfig, record: dict) -> dict[str, dict]:
    """Build the config.json and preprocessor_config.json of transformers' model of this kind."""
    architecture, model_type = HUGGINGFACE_CLASSES[kind]
    height, width = config.image_hw
    if kind == "masked autoencoder" and height != width:
        raise ValueError(f"transformers' ViTMAE takes square images only, not {height} x {width}")
    sizes = dataclasses.asdict(config)
    if kind != "masked autoencoder":
        sizes = without_decoder(sizes)
    content = {
        "architectures": [architecture],
        "model_type": model_type,
        **{HUGGINGFACE_SIZES[name]: value for name, value in sizes.items() if name in HUGGINGFACE_SIZES},
        "intermediate_size": int(config.encoder_embed_dim * config.encoder_mlp_ratio),
        "hidden_act": "gelu",
        "layer_norm_eps": LAYER_NORM_EPS,  # transformers' default, 1e-12, is not the original's
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }
    if kind == "masked autoencoder":
        content |= {
            "decoder_intermediate_size": int(config.decoder_embed_dim * config.decoder_mlp_ratio),
            "mask_ratio": 0.75,
        }
    if kind.startswith("classifier"):
        names = record.get("class_names") or [f"LABEL_{index}" for index in range(record["num_classes"])]
        content["id2label"] = {str(index): name for index, name in enumerate(names)}
        content["label2id"] = {name: index for index, name in enumerate(names)}
    if kind == "classifier of the mean":
        content |= {
            "use_mean_pooling": True,
            "use_absolute_position_embeddings": True,
            "use_relative_position_bias": False,
            "use_shared_relative_position_bias": False,
            "layer_scale_init_value": 0.0,  # no layer scale
            "drop_path_rate": 0.0,
        }
    preprocessor = {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": height, "width": width},
        "resample": 3,  # bicubic
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": record["image_mean"],
        "image_std": record["image_std"],
    }
    return {"config.json": content, "preprocessor_config.json": preprocessor}


# ------------------------------------------------------------------------------------------------ writing


def check_target(target: Path, layout: str, overwrite: bool) -> None:
    """Refuse a target before any work: one of the wrong kind, or there already, or a folder with more than weights."""
    suffix = SUFFIXES.get(layout)
    if suffix and target.suffix != suffix:
        raise ValueError(f"--to {layout} writes a {suffix} file, so {target} must end in {suffix}")
    if layout in FOLDERS and target.suffix in (".safetensors", ".pth", ".pt", ".bin"):
        raise ValueError(
            f"--to {layout} writes a folder, model.safetensors and config.json; {target} looks like a file"
        )
    if not target.exists():
        return
    if not overwrite:
        raise FileExistsError(f"{target} exists; choose another target or add --overwrite")
    if target.is_dir() != (layout in FOLDERS):
        raise ValueError(f"{target} is a {'folder' if target.is_dir() else 'file'}, which --overwrite does not replace")
    if target.is_dir():
        written = {"model.safetensors", "config.json", "preprocessor_config.json"}
        others = {file.name for file in target.iterdir()} - written
        if others:
            raise ValueError(f"{target} also holds {sorted(others)[0]}, so --overwrite does not replace it")


def write_target(target: Path, files: Mapping[str, object]) -> None:
    """Write files beside the target and rename them in its place: one file under the name "", or those of a folder."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary, old = (target.with_name(f"{target.name}.{os.getpid()}.{what}") for what in ("tmp", "old"))
    try:
        if "" in files:
            write_file(temporary, target.suffix, files[""])
        else:
            temporary.mkdir()
            for name, content in files.items():
                write_file(temporary / name, Path(name).suffix, content)
        if target.is_dir():  # a folder cannot be renamed over another
            os.rename(target, old)
        os.replace(temporary, target)
    finally:
        if old.exists() and not target.exists():
            os.rename(old, target)
        for leftover in (temporary, old):
            if leftover.is_dir():
                shutil.rmtree(leftover)
            leftover.unlink(missing_ok=True)


def write_file(file: Path, suffix: str, content: object) -> None:
    if suffix == ".json":
        write_json(file, content)
    elif suffix == ".safetensors":
        save_file(content, file, metadata={"format": "pt"})
    else:
        torch.save(content, file)


def build_files(
    source: Source, converted: Converted, sizes: dict, args: argparse.Namespace
) -> tuple[dict[str, object], str]:
    """Build what a target consists of, and say what opens it."""
    tensors, kind, target = converted.tensors, converted.kind, args.target
    if args.to == "original":
        return {"": {"model": tensors}}, "the original release's scripts"
    if args.to == "timm":
        return {"": tensors}, timm_call(tensors, kind, sizes, target)
    if args.to == "tutorial":
        return {"": tensors}, f'path_to_pretrained_weights="{target}"'
    if args.to == "mmseg" and kind == "encoder":
        return {"": tensors}, f'pretrained="{target}" in MMSegmentation\'s config'
    untold = [name for name in needed_sizes(kind) if sizes[name] is None]
    if untold:
        raise ValueError(
            f"neither shapes nor anything beside {source.path} tell {', '.join(untold)}; add{flags_for(untold)}"
        )
    config = build_config(sizes)
    record = build_record(source, config, args)
    if args.to == "mmseg":
        return {"": mmseg_checkpoint(tensors, config, record)}, f'mmseg.apis.init_model(config, "{target}")'
    if args.to == "huggingface":
        files = {"model.safetensors": tensors, **huggingface_configs(kind, config, record)}
        return files, OPENS_IN_TRANSFORMERS[kind].format(target)
    tensors = add_backbone(tensors) if kind == "segmenter" else tensors
    return {"model.safetensors": tensors, "config.json": record}, OPENS_HERE[KINDS[kind][0]].format(target)


OPENS_HERE = {
    "ViTMAEForPreTraining": "tools/reconstruct.py --checkpoint {0}, and as an encoder",
    "VisionTransformer": "--path_to_pretrained_mae_weights {0} or --path_to_backbone_checkpoint {0}",
    "ViTMAEForImageClassification": "tools/classify.py --checkpoint {0}",
    "ViTMAEForSegmentation": "tools/segment.py --checkpoint {0}",
}
OPENS_IN_TRANSFORMERS = {
    kind: f'transformers.{name}.from_pretrained("{{0}}")' for kind, (name, _) in HUGGINGFACE_CLASSES.items()
} | {
    "encoder": 'transformers.ViTModel.from_pretrained("{0}", add_pooling_layer=False); ViTMAEForPreTraining needs a '
    "decoder, which the source lacks"
}


def timm_call(tensors: dict[str, Tensor], kind: str, sizes: dict, target: Path) -> str:
    """Give the line that opens a file in timm, whatever its sizes are."""
    options = {
        "img_size": sizes["img_size"],
        "patch_size": sizes["patch_size"],
        "in_chans": sizes["input_channels"],
        "embed_dim": sizes["encoder_embed_dim"],
        "depth": sizes["encoder_depth"],
        "num_heads": sizes["encoder_num_heads"],
        "mlp_ratio": sizes["encoder_mlp_ratio"],
        "num_classes": len(tensors["head.bias"]) if "head.bias" in tensors else 0,
        "global_pool": "avg" if kind == "classifier of the mean" else "token",
        "checkpoint_path": str(target),
    }
    listed = ", ".join(f"{name}={value!r}" for name, value in options.items() if value is not None)
    return f'timm.create_model("vit_base_patch16_224", {listed})'


# ------------------------------------------------------------------------------------------------ the command


def inspect(path: str, args: argparse.Namespace) -> None:
    """Print what a source is, and what it can serve here."""
    source = read_source(path)
    sizes = resolve_sizes(source, args)
    check(source, sizes)
    num_values = sum(value.numel() for name, value in source.tensors.items() if not name.endswith(BUFFERS))
    has_decoder = source.kind == "masked autoencoder"
    shown = sizes if has_decoder else without_decoder(sizes)
    print(f"{'layout':<24}{source.title} {source.kind}")
    print(f"{'sizes':<24}{', '.join(f'{name} {value}' for name, value in shown.items())}")
    print(f"{'parameters':<24}{num_values:,} in {len(source.tensors)} tensors")
    segmenter = source.kind == "segmenter"
    classifier = KINDS[source.kind][0] == "ViTMAEForImageClassification"
    lacks = {
        "finetuning": "a plain encoder; --to original --drop takes it out" if segmenter else "",
        "pretraining, pictures": "" if has_decoder else "the decoder (mask_token, decoder_*)",
        "classifying": "" if classifier else "a head (head.*)",
        "segmenting": "" if segmenter else "neck.*, decode_head.* and auxiliary_head.*",
    }
    if source.has_relative_positions:
        condition = ", a segmenter with --rel_pos_bias, and no classifier"
    else:
        condition = "" if "norm.weight" in source.tensors else ", a classifier with --global_pool avg, or a segmenter"
    for use, lack in lacks.items():
        yes = f"yes{condition if use == 'finetuning' else ''}"
        print(f"{use:<24}{f'no, it lacks {lack}' if lack else yes}")
    for note in source.notes:
        print(f"{'note':<24}{note}")
    if source.left_over:
        print(f"{'no counterpart':<24}{describe_names(source.left_over)}")
    untold = [name for name in needed_sizes(source.kind) if sizes[name] is None]
    if untold:
        print(f"{'nobody tells':<24}{', '.join(untold)}")
    flags = flags_for(untold) + (" --drop" if source.left_over else "")
    as_it_is = source.title in (TITLES["ours"], ORIGINAL_OR_TIMM) and not source.left_over and scripts_take(path)
    print(f"{'to use it here':<24}{'as it is' if as_it_is else convert_command(path) + flags}")


def scripts_take(path: str) -> bool:
    """Say whether the scripts open a source of our names, by opening it as they do."""
    try:
        read_sizes(path)
    except (ValueError, OSError):
        return False
    return True


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", nargs="?", metavar="SOURCE", help="weight file, index of shards, or folder with one")
    parser.add_argument("target", nargs="?", type=Path, metavar="TARGET", help="a folder, or a file, by --to")
    parser.add_argument("--to", choices=("ours", "original", "timm", "huggingface", "mmseg", "tutorial"))
    parser.add_argument("--inspect", metavar="SOURCE", help="say what a source is and serves; writes nothing")
    parser.add_argument("--drop", action="store_true", help="leave out what the target has no place for")
    parser.add_argument("--overwrite", action="store_true", help="allow TARGET to exist")
    told = parser.add_argument_group("what shapes do not tell (default: what lies beside the weights, or named sizes)")
    told.add_argument("--img_size", type=int, nargs="+", metavar="PIXELS", help="of images that are no squares")
    told.add_argument("--encoder_num_heads", type=int, help="attention heads")
    told.add_argument("--decoder_num_heads", type=int, help="attention heads of the decoder")
    told.add_argument(
        "--norm_pix_loss",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="whether the decoder predicts normalised patches: mae_visualize_vit_*.pth does not",
    )
    told.add_argument(
        "--mean", type=float, nargs="+", help="of the images, in [0, 1] (default: ImageNet's, or 0.5 each)"
    )
    told.add_argument("--std", type=float, nargs="+", help="of the images, in [0, 1] (default: ImageNet's)")
    told.add_argument("--taps", type=int, nargs=4, help="blocks that a segmenter sees, from 0 (default: by depth)")
    told.add_argument(
        "--ignore_zero",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="whether a segmenter's raw label 0 is ignored (default: with ADE20K's 150 classes)",
    )
    args = parser.parse_args(argv)
    if args.inspect is None and None in (args.source, args.target, args.to):
        parser.error("give SOURCE, TARGET and --to, or --inspect SOURCE")
    if args.inspect is not None and args.source is not None:
        parser.error("--inspect takes one source and no target")
    return args


def main(args: argparse.Namespace) -> None:
    if args.inspect is not None:
        return inspect(args.inspect, args)
    check_target(args.target, args.to, args.overwrite)
    source = read_source(args.source)
    sizes = resolve_sizes(source, args)
    check(source, sizes)
    converted = convert(source, args.to)
    if converted.left_out and not args.drop:
        reason = f" ({LEFT_OVER[source.layout][1]})" if source.layout in LEFT_OVER and source.left_over else ""
        raise ValueError(
            f"{TITLES[args.to]} layout has no place for {describe_names(converted.left_out)} of {args.source}{reason}; "
            "add --drop to leave them out"
        )
    files, opening = build_files(source, converted, sizes, args)
    write_target(args.target, files)
    for note in source.notes:
        print(f"{'note':<12}{note}")
    if converted.left_out:
        print(f"{'left out':<12}{describe_names(converted.left_out)}")
    print(f"{'read':<12}{source.title} {source.kind}, {args.source}")
    print(f"{'written':<12}{len(converted.tensors)} tensors, {args.target}")
    print(f"{'opens with':<12}{opening}")
    return None


if __name__ == "__main__":
    try:
        main(parse_args())
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
