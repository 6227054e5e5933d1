"""What masked autoencoders' projects call their tensors: one table for each layout, read both ways.

Data, and the functions that look names up in it; no tensor is touched here. Files are read in weights.py and converted
by tools/convert_weights.py.
"""

import functools
import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

# Our name: theirs, without .weight and .bias; N is the number of a block. Of three names the first is of q, the second
# of k, the third of v.
Table = dict[str, str]


def same(names: str) -> Table:
    return {name: name for name in names.split()}


def blocks(ours: str, theirs: str, parts: Table) -> Table:
    """Put the table of one block under both projects' names for the list of blocks."""
    return {f"{ours}.N.{name}": " ".join(f"{theirs}.N.{part}" for part in parts[name].split()) for name in parts}


BLOCK = same("norm1 attn.qkv attn.proj norm2 mlp.fc1 mlp.fc2")
# What blocks of BEiT's kind have more; of it ours have the table, and the conversion expresses the rest.
BEIT_BLOCK = same("gamma_1 gamma_2 attn.q_bias attn.v_bias attn.relative_position_bias_table")
BEIT_BLOCK |= same("attn.relative_position_index")
TIMM = same("cls_token pos_embed patch_embed.proj norm fc_norm head") | blocks("blocks", "blocks", BLOCK)
DECODER = same("mask_token decoder_pos_embed decoder_embed decoder_norm decoder_pred")
ORIGINAL = TIMM | same("head.N") | DECODER | blocks("decoder_blocks", "decoder_blocks", BLOCK)
SEGMENTER = same("neck.upsample_4x.N neck.upsample_2x.N decode_head.conv_seg auxiliary_head.conv_seg")
CONVS = [f"decode_head.{name}" for name in ("psp_modules.N.1", "bottleneck", "lateral_convs.N", "fpn_convs.N")]
CONVS += ["decode_head.fpn_bottleneck", "auxiliary_head.convs.N"]
SEGMENTER |= same(" ".join(f"{name}.conv {name}.bn" for name in CONVS))
MMSEG = SEGMENTER | same("cls_token pos_embed norm") | {"patch_embed.proj": "patch_embed.projection"}
MMSEG_BLOCK = {"norm1": "ln1", "norm2": "ln2", "mlp.fc1": "ffn.layers.0.0", "mlp.fc2": "ffn.layers.1"}
MMSEG |= blocks("blocks", "layers", BLOCK | MMSEG_BLOCK | BEIT_BLOCK)
TUTORIAL = {"cls_token": "enc_cls_token", "pos_embed": "enc_pos_embed", "norm": "encoder_layer_norm"}
TUTORIAL |= same("patch_embed.proj") | blocks("blocks", "encoder_blocks", BLOCK)
TUTORIAL = {ours: f"encoder.{theirs}" for ours, theirs in TUTORIAL.items()} | same("head")
HUGGINGFACE_BLOCK = {"norm1": "layernorm_before", "norm2": "layernorm_after", "attn.proj": "attention.output.dense"}
HUGGINGFACE_BLOCK |= {"attn.qkv": "attention.attention.query attention.attention.key attention.attention.value"}
HUGGINGFACE_BLOCK |= {"mlp.fc1": "intermediate.dense", "mlp.fc2": "output.dense"}


@dataclass(frozen=True)
class Layout:
    """What a project calls its tensors and writes them to."""

    title: str
    table: Table
    suffix: str = ""  # of the file that is written; none is a folder
    needs_norm: bool = False  # its encoders always have the last norm
    spellings: Iterable[tuple[str, str]] = ()  # others that are read, as (pattern, the table's), applied in this order
    left_over: str = "(?!)"  # its keys that are known to have no counterpart in ours
    reason: str = ""  # why they have none
    config_entry: str | None = None  # by which a config.json beside its weights is known to be of its project


def huggingface(name: str, title: str) -> Layout:
    """Give the layout of transformers' model `name`; its versions spell some keys in other ways."""
    table = {
        "cls_token": f"{name}.embeddings.cls_token",
        "pos_embed": f"{name}.embeddings.position_embeddings",
        "patch_embed.proj": f"{name}.embeddings.patch_embeddings.projection",
        "norm": f"{name}.layernorm",
        "fc_norm": f"{name}.pooler.layernorm",  # of beit
        "head": "classifier",
        **{name: f"decoder.{name}" for name in DECODER},
        **blocks("blocks", f"{name}.encoder.layer", HUGGINGFACE_BLOCK),
        **blocks("decoder_blocks", "decoder.decoder_layers", HUGGINGFACE_BLOCK),
    }
    spellings = (
        (r"^(?=(embeddings|encoder|layers|layernorm|pooler)\.)", f"{name}."),  # of a model without a head
        (rf"^{name}\.layers\.", f"{name}.encoder.layer."),  # what transformers 5 has in memory
        (r"^decoder\.decoder_encoder\.layer\.", "decoder.decoder_layers."),  # what transformers 5 saves
        (r"\.attention\.q_proj\.", ".attention.attention.query."),
        (r"\.attention\.k_proj\.", ".attention.attention.key."),
        (r"\.attention\.v_proj\.", ".attention.attention.value."),
        (r"\.attention\.o_proj\.", ".attention.output.dense."),
        (r"\.mlp\.fc1\.", ".intermediate.dense."),
        (r"\.mlp\.fc2\.", ".output.dense."),
    )
    left_over = rf"({name}\.)?(pooler\.dense|embeddings\.mask_token)\b", "ours read the tokens as they are"
    return Layout(title, table, "", name == "vit", spellings, *left_over, "model_type")


OURS = ORIGINAL | same("pca_mean pca_basis") | SEGMENTER | blocks("blocks", "blocks", BEIT_BLOCK)
OF_SEGMENTERS = ((r"^backbone\.", ""),)
OF_TIMM_AND_BEIT = (  # layer scales are timm's, pyramids are of BEiT's own segmenter
    *OF_SEGMENTERS,
    (r"\.ls([12])\.gamma$", r".gamma_\1"),
    (r"^fpn1\.", "neck.upsample_4x."),
    (r"^fpn2\.", "neck.upsample_2x."),
)
OF_THE_TUTORIALS_ENCODER = (
    (r"^(?=(patch_embed|enc_cls_token|enc_pos_embed|encoder_blocks|encoder_layer_norm)\b)", "encoder."),
)
NOT_OF_IT = r"(decoder|embed2image|upernet)\b", "its decoder never sees the cls token, its pyramid has other bins"
LAYOUTS = {
    "ours": Layout("this project's", OURS, spellings=OF_TIMM_AND_BEIT, config_entry="architecture"),
    "original": Layout("the original release's", ORIGINAL, ".pth"),
    "timm": Layout("timm's", TIMM, ".safetensors", needs_norm=True),
    "huggingface": huggingface("vit", "Hugging Face's ViT and ViTMAE"),
    # ViTForImageClassification looks at the cls token; the mean of the patches behind a norm is BeitFor...'s.
    "beit": huggingface("beit", "Hugging Face's BEiT"),
    "mmseg": Layout("MMSegmentation's", MMSEG, ".pth", spellings=OF_SEGMENTERS),
    "tutorial": Layout("PyTorch-Adventures'", TUTORIAL, ".safetensors", True, OF_THE_TUTORIALS_ENCODER, *NOT_OF_IT),
}
# Names of what only blocks and pyramids of BEiT's kind have, and of what has no counterpart in ours
# (backbone.blocks.N.ls1.gamma is our own segmenter's, of --layer_scale)
BEIT_ONLY = (
    r"^(?!backbone\.blocks\.).*\.(ls[12]\.gamma|gamma_[12]|attn\.(q_bias|v_bias|relative_position_index))$"
    r"|^(backbone\.)?fpn[12]\."
)
NO_COUNTERPART = r"(^|\.)(pooler|embeddings\.mask_token|embed2image|dec_pos_embed|upernet)(\.|$)"
# Widths of published encoders, from which the number of heads follows: tiny, small, base, large and huge
PUBLISHED_WIDTHS = (192, 384, 768, 1024, 1280)
ORIGINAL_OR_TIMM = f"{LAYOUTS['original'].title} (or timm's, which has the same names)"
# Fields of MAEConfig in transformers' config.json, and in the model_args of timm's
HUGGINGFACE_SIZES = (
    dict(img_size="image_size", patch_size="patch_size", input_channels="num_channels", norm_pix_loss="norm_pix_loss")
    | dict(encoder_embed_dim="hidden_size", encoder_depth="num_hidden_layers", encoder_num_heads="num_attention_heads")
    | dict(decoder_embed_dim="decoder_hidden_size", decoder_depth="decoder_num_hidden_layers")
    | dict(decoder_num_heads="decoder_num_attention_heads")
)
TIMM_SIZES = dict(img_size="img_size", encoder_num_heads="num_heads")
# transformers' class for each kind of model, and what its config.json has beside sizes and class names
HUGGINGFACE_CONFIGS = {
    "masked autoencoder": dict(architectures=["ViTMAEForPreTraining"], model_type="vit_mae", mask_ratio=0.75),
    "encoder": dict(architectures=["ViTModel"], model_type="vit"),
    "classifier of the cls token": dict(architectures=["ViTForImageClassification"], model_type="vit"),
    "classifier of the mean": dict(architectures=["BeitForImageClassification"], model_type="beit")
    | dict(use_mean_pooling=True, use_absolute_position_embeddings=True, use_relative_position_bias=False)
    | dict(use_shared_relative_position_bias=False, layer_scale_init_value=0.0, drop_path_rate=0.0),
}
HUGGINGFACE_OF_ALL = dict(hidden_act="gelu", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
HUGGINGFACE_PREPROCESSOR = (
    dict(image_processor_type="ViTImageProcessor", do_resize=True, do_rescale=True, do_normalize=True)
    | dict(resample=3, rescale_factor=1 / 255)  # bicubic
)

BUFFERS = ("running_mean", "running_var", "num_batches_tracked")
SEGMENTER_PARTS = ("neck.", "decode_head.", "auxiliary_head.")
DECODER_PARTS = ("decoder_", "mask_token", "pca_")
NOT_OF_THE_ENCODER = ("fc_norm.", "head.", *SEGMENTER_PARTS, *DECODER_PARTS)
BIAS_TABLE = ".relative_position_bias_table"
# Numbers of dimensions, so that all later code may rely on them; the rest have one.
RANKS = {
    r".*\.num_batches_tracked": 0,
    r"blocks\..*\.relative_position_(index|bias_table)": 2,
    r"((decoder_)?blocks\..*\.(attn|mlp)\..*|decoder_embed|decoder_pred|head.*)\.weight|pca_basis": 2,
    r"cls_token|mask_token|(decoder_)?pos_embed": 3,
    r"patch_embed\.proj\.weight": 4,
}


def split_name(name: str) -> tuple[str, str, str]:
    """Split blocks.3.norm1.weight into blocks.N.norm1, 3 and .weight; what is missing is empty."""
    stem, _, leaf = name.rpartition(".")
    stem, leaf = (stem, f".{leaf}") if leaf in ("weight", "bias", *BUFFERS) else (name, "")
    number = re.search(r"\.([0-9]{1,9})(?=\.|$)", stem)
    if number is None:
        return stem, "", leaf
    return f"{stem[: number.start()]}.N{stem[number.end() :]}", number[1], leaf


def their_names(name: str, layout: str) -> list[str]:
    """Give what a layout calls a tensor of ours: one name, or three of q, k, v; none where it has no such thing."""
    template, number, leaf = split_name(name)
    theirs = LAYOUTS[layout].table.get(template, "").split()
    return [name.replace(".N", f".{number}", 1) + leaf for name in theirs]


@functools.cache
def inverse_table(layout: str) -> dict[str, tuple[str, int]]:
    pairs = [(ours, theirs.split()) for ours, theirs in LAYOUTS[layout].table.items()]
    return {name: (ours, index) for ours, theirs in pairs for index, name in enumerate(theirs)}


def our_name(key: str, layout: str) -> tuple[str, int] | None:
    """Give our name for a key of a layout, and which third of q, k, v it is; None for keys that the table lacks."""
    for pattern, replacement in LAYOUTS[layout].spellings:
        key = re.sub(pattern, replacement, key)
    template, number, leaf = split_name(key)
    if template not in inverse_table(layout):
        return None
    ours, index = inverse_table(layout)[template]
    return ours.replace(".N", f".{number}", 1) + leaf, index


def detect_layout(keys: Collection[str], path: Path) -> str:
    """Give the layout whose table knows most of these keys; ValueError when none knows any."""
    counts = {layout: sum(our_name(key, layout) is not None for key in keys) for layout in LAYOUTS}
    best = max(LAYOUTS, key=counts.get)  # of several the first, so that what shares our names is read as ours
    if counts[best] == 0:
        known, found = ", ".join(layout.title for layout in LAYOUTS.values()), sorted(keys)[:3]
        raise ValueError(f"{path} is in no layout known here: its keys are such as {found}. Known are {known}")
    return best


def count_blocks(keys: Collection[str], name: str) -> int:
    """Count the blocks of a list; ValueError where their numbers leave one out, before any of them is built."""
    numbers = {int(match[1]) for key in keys if (match := re.match(rf"{name}\.([0-9]{{1,9}})\.", key))}
    absent = sorted(set(range(len(numbers))) - numbers)
    if absent:
        raise ValueError(f"{name} are numbered up to {max(numbers)}, but there is no {name}.{absent[0]}")
    return len(numbers)


def describe_names(names: Collection[str]) -> str:
    """Put many keys in few words: what the encoder has by their names in a block, all else by their beginnings."""
    shown = dict.fromkeys(
        re.sub(r"\.\d+\.", ".N.", name).removesuffix(".weight").removesuffix(".bias")
        if re.match(r"(the |backbone|blocks|layers)", name)
        else name.split(".")[0]
        for name in names
    )
    return f"{', '.join(shown)} ({len(names)} tensors)"
