"""Weights of another project, taken under our names: renamed, joined and simplified, so that outputs stay the same.

Key names are known to layouts.py, reading files safely to weights.py, and what lies beside the weights to
tools/convert_weights.py.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from storage import layouts
from storage.layouts import BIAS_TABLE, LAYOUTS, SEGMENTER_PARTS, count_blocks, their_names


@dataclass
class Source:
    """Weights under our names (an encoder's without `backbone.`), and what is known about them beside their shapes."""

    path: Path
    layout: str
    tensors: dict[str, Tensor]
    title: str = ""
    keys: dict[str, str] = field(default_factory=dict)  # the source's own for each of our names, for messages
    left_over: dict[str, str] = field(default_factory=dict)  # keys without a counterpart in ours, and why
    known: dict = field(default_factory=dict)  # fields of MAEConfig
    record: dict = field(default_factory=dict)  # other entries of config.json
    notes: list[str] = field(default_factory=list)
    indices: dict[str, Tensor] = field(default_factory=dict)  # relative_position_index of blocks, to compare with ours
    pooling: str | None = None  # timm's word for it

    def has(self, *beginnings: str) -> bool:
        return any(name.startswith(beginnings) for name in self.tensors)

    @property
    def kind(self) -> str:
        classifier = f"classifier of the {'mean' if self.has('fc_norm.') else 'cls token'}"
        parts = {"segmenter": SEGMENTER_PARTS, "masked autoencoder": layouts.DECODER_PARTS}
        parts |= {"linear probe": ("head.1.",), classifier: ("head.",)}
        return next((kind for kind, names in parts.items() if self.has(*names)), "encoder")

    @property
    def tables(self) -> list[str]:
        return [name for name in self.tensors if name.endswith(BIAS_TABLE)]

    @property
    def reasons(self) -> str:
        return "; ".join(dict.fromkeys(self.left_over.values()))

    def key_of(self, name: str) -> str:
        """Give what the source calls, or would call, a tensor of ours."""
        if name in self.keys:
            return self.keys[name]
        prefix = "backbone." if any(key.startswith("backbone.") for key in self.keys.values()) else ""
        names = their_names(name, self.layout)
        return f"{'' if name.startswith(layouts.NOT_OF_THE_ENCODER) else prefix}{names[0]}" if names else name

    def refuse(self, problems: list[str]) -> None:
        """Raise ValueError with these problems, if there are any."""
        if problems:
            shown = "; ".join(problems[:5]) + (f"; and {len(problems) - 5} more" if len(problems) > 5 else "")
            title = LAYOUTS[self.layout].title
            raise ValueError(f"{self.path}, read as {title} layout, does not fit: {shown}")

    def leave_out(self, beginnings: tuple[str, ...], reason: str) -> None:
        for name in [name for name in self.tensors if name.startswith(beginnings)]:
            self.left_over[self.key_of(name)] = reason
            del self.tensors[name]


def rename(source: Source, tensors: Mapping[str, Tensor]) -> None:
    """Take tensors into a source under our names, q, k and v joined, with the key that each came from."""
    parts: dict[str, dict[int, Tensor]] = {}
    layout, problems = LAYOUTS[source.layout], []
    for key, tensor in tensors.items():
        if re.match(layout.left_over, key):
            source.left_over[key] = layout.reason
            continue
        name, third = layouts.our_name(key, source.layout) or (None, 0)
        if name is None:
            problems.append(f"unknown key {key}")
        elif misfit := describe_misfit(name, tensor):
            source.refuse([f"{key} {misfit}"])
        elif third in parts.setdefault(name, {}):
            problems.append(f"{source.keys[name]} and {key} are the same tensor")
        else:
            parts[name][third] = tensor
            source.keys.setdefault(name, key)
    for name, thirds in parts.items():
        theirs = their_names(name, source.layout)
        if source.layout == "beit" and name.endswith("attn.qkv.bias") and 1 not in thirds and 0 in thirds:
            thirds[1] = torch.zeros_like(thirds[0])  # BEiT's keys have no bias: no output depends on it
        missing = [theirs[index] for index in range(len(theirs)) if index not in thirds]
        problems += [f"missing {key}" for key in missing]
        if len({(part.shape, part.dtype) for part in thirds.values()}) > 1:
            parts_of = (f"{theirs[i]} {tuple(thirds[i].shape)} {thirds[i].dtype}" for i in sorted(thirds))
            problems.append(f"shapes or types that differ: {', '.join(parts_of)}")
        elif not missing:
            source.tensors[name] = torch.cat([thirds[i] for i in range(3)]) if len(theirs) == 3 else thirds[0]
    source.refuse(problems)


def describe_misfit(name: str, tensor: Tensor) -> str | None:
    """Say what is wrong with the type or the dimensions of a tensor of this name; a segmenter's are compared later."""
    if not tensor.is_floating_point() and not name.endswith(("relative_position_index", "num_batches_tracked")):
        return f"is of {tensor.dtype}, not of floating point"
    rank = next((rank for pattern, rank in layouts.RANKS.items() if re.fullmatch(pattern, name)), 1)
    if tensor.ndim != rank and not name.startswith(SEGMENTER_PARTS):
        return f"has the shape {tuple(tensor.shape)} instead of one of {rank} dimensions"
    return None


def simplify(source: Source) -> None:
    """Express what blocks of BEiT's kind have more than ours by what ours have, so that outputs stay the same."""
    tensors, depth, folded = source.tensors, count_blocks(source.tensors, "blocks"), 0
    for gamma, layer in (("gamma_1", "attn.proj"), ("gamma_2", "mlp.fc2")):
        names = [f"blocks.{index}.{gamma}" for index in range(depth)]
        absent = [f"missing {source.key_of(name)}" for name in names if name not in tensors]
        source.refuse(absent if len(absent) < depth else [])
        for name in names if not absent else []:
            scale, layers = tensors.pop(name), [f"{name.replace(gamma, layer)}.{leaf}" for leaf in ("weight", "bias")]
            if not all(other in tensors for other in layers) or bool((scale == 1).all()):
                continue
            shapes = {name: scale.shape} | {other: tensors[other].shape for other in layers}
            if len({shape[0] for shape in shapes.values()}) > 1:
                listed = ", ".join(f"{source.key_of(other)} {tuple(shape)}" for other, shape in shapes.items())
                source.refuse([f"lengths that differ: {listed}"])
            tensors[layers[0]], tensors[layers[1]] = tensors[layers[0]] * scale[:, None], tensors[layers[1]] * scale
            folded += 1
    for block in (f"blocks.{index}" for index in range(depth)):
        q_bias, v_bias = (tensors.pop(f"{block}.attn.{name}", None) for name in ("q_bias", "v_bias"))
        if q_bias is not None and v_bias is not None:
            tensors[f"{block}.attn.qkv.bias"] = torch.cat([q_bias, torch.zeros_like(q_bias), v_bias])
        if f"{block}.attn.relative_position_index" in tensors:
            source.indices[block] = tensors.pop(f"{block}.attn.relative_position_index")
    if folded:
        source.notes.append(f"{folded} layer scales multiplied into the layers before them; each value rounded once")
    if source.tables:
        source.known.setdefault("encoder_num_heads", tensors[source.tables[0]].shape[-1])
        if source.title != LAYOUTS["ours"].title and not any(tensors[name].any() for name in source.tables):
            source.notes.append("relative positions left out: all are zero, which changes nothing")
            source.tensors = {name: value for name, value in tensors.items() if name not in source.tables}


def describe_shapes(source: Source, expected: Mapping[str, Iterable[int]]) -> list[str]:
    return [
        f"{source.key_of(name)} is {tuple(source.tensors[name].shape)} instead of {tuple(shape)}"
        for name, shape in expected.items()
        if name in source.tensors and source.tensors[name].shape != shape
    ]


def add_backbone(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Put the encoder of a segmenter under `backbone.`."""
    return {n if n.startswith(SEGMENTER_PARTS) else f"backbone.{n}": value for n, value in tensors.items()}
