"""Write a checkpoint as a folder for the Hugging Face Hub, with a model card, and upload it.

    python tools/publish.py work_dir/MAEPretraining --repo OWNER/NAME
    python tools/publish.py work_dir/MAEPretraining --repo OWNER/NAME --push

The first command writes the folder NAME, whose README.md is to be read, and its licence filled in; the second uploads
the folder as it then is. Its model.safetensors has this project's key names, which are timm's, transformers.safetensors
has those of transformers, and one config.json serves all three. What timm or transformers has no model for (segmenters,
linear probes, variants of the autoencoder) this project alone opens, and that is said. `--push` logs in as `hf auth
login` or HF_TOKEN say; no token is written or printed.
"""

import argparse
import os
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from storage import explained_errors
from storage.files import escape, read_json, user_path, write_json, written_whole
from storage.snapshots import PUBLISHED
from training.flags import RECORDED

CARD, CONFIG, CURVE, RECIPE, SCORES = "README.md", "config.json", "curve.png", "recipe.json", "evaluation.json"
OURS, THEIRS = "model.safetensors", "transformers.safetensors"
# Beginnings of flags that name places of this machine
PLACES = ("path_to", "working_directory", "resume", "init_from", "log_", "wandb", "test_folder", "class_names")
# Entries of evaluation.json that are flags, and what they are by default
EVALUATION_FLAGS = {"class_subset": False, "slide": True, "multi_scale": False, "flip": False}
MADE_WITH = ("commit", "hardware", "precision", "python", "torch", "timm", "accelerate")
SHARED_KINDS = ("masked autoencoder", "encoder", "classifier of the cls token", "classifier of the mean")
# Of each kind: what the Hub calls the task, the script that makes it, and the flag by which a script takes it
PRETRAINING = ("image-feature-extraction", "pretrain_mae.py", "path_to_pretrained_mae_weights")
SEGMENTING = ("image-segmentation", "finetune_segmentation.py", "path_to_backbone_checkpoint")
CLASSIFYING = ("image-classification", "finetune_classifier.py", "path_to_pretrained_mae_weights")
TASKS = {"masked autoencoder": PRETRAINING, "encoder": PRETRAINING, "segmenter": SEGMENTING}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = "checkpoint or experiment folder, original .pth, or hf:OWNER/NAME[@REVISION]"
    parser.add_argument("checkpoint", type=user_path, metavar="CHECKPOINT", help=source)
    parser.add_argument("--repo", required=True, metavar="OWNER/NAME", help="what it is called on the Hub")
    parser.add_argument("--output", type=user_path, metavar="FOLDER", help="folder to write (default: NAME)")
    parser.add_argument("--license", metavar="ID", help="such as mit or cc-by-nc-4.0 (default: a line to fill in)")
    parser.add_argument("--push", action="store_true", help="upload the folder, which is written where it is not there")
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    parser.add_argument("--overwrite", action="store_true", help="write the folder anew where it is there")
    args = parser.parse_args(argv)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", args.repo):
        parser.error(f"--repo takes OWNER/NAME, not {args.repo!r}")
    if args.license is not None and not re.fullmatch(r"[\w.-]+", args.license):
        parser.error(f"--license takes an identifier of the Hub such as mit or cc-by-nc-4.0, not {args.license!r}")
    args.output = args.output or Path(args.repo.partition("/")[2])
    if os.path.lexists(args.output):
        config = args.output / CONFIG
        if not (args.output / CARD).is_file() or not config.is_file() or PUBLISHED not in read_json(config):
            parser.error(f"{args.output} was not written by this tool and stays as it is; choose another --output")
        if not (args.push or args.overwrite):
            parser.error(f"{args.output} exists; add --push to upload it as it is, or --overwrite to write it anew")
    return args


if __name__ == "__main__":  # --help and refusals come before the imports that take seconds
    with explained_errors():
        parse_args()

from typing import NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dataset import eval_crop_ratio
from model import read_sizes
from storage.sizes import VARIANTS, MAEConfig
from storage.values import ImageReader
from storage.weights import find_weights, read_weights
from tools import convert_weights, plot_log
from training.logs import read_rows

# ------------------------------------------------------------------------------------------------ the model


class Model(NamedTuple):
    """What a folder holds of a model, by file; its kind; the lines that open it, by library; and what no line does."""

    contents: dict[str, dict]
    kind: str
    opening: dict[str, str]
    note: str = ""


def timm_entries(tensors: dict[str, Tensor], config: MAEConfig, record: dict) -> dict:
    """Build what timm reads in config.json: a ViT of its own with all sizes given, which loads our file as it is."""
    hw, channels = list(config.image_hw), config.input_channels
    names = {name: f"encoder_{name}" for name in ("embed_dim", "depth", "num_heads", "mlp_ratio")}
    names |= {"patch_size": "patch_size", "in_chans": "input_channels"}
    sizes = {"img_size": hw} | {theirs: getattr(config, ours) for theirs, ours in names.items()}
    sizes["global_pool"] = "avg" if "fc_norm.weight" in tensors else "token"
    if "mask_token" in tensors:
        sizes["pretrained_strict"] = False  # a ViT has no place for the decoder
    transform = {"input_size": [channels, *hw], "fixed_input_size": True, "pool_size": None, "crop_mode": "center"}
    transform |= {"interpolation": "bicubic", "crop_pct": eval_crop_ratio(config.image_hw)}
    transform |= {"mean": record["image_mean"], "std": record["image_std"]}
    transform |= {"first_conv": "patch_embed.proj", "classifier": "head"}
    entries = {"architecture": "vit_base_patch16_224", "num_classes": len(tensors.get("head.bias", ()))}
    entries |= {"num_features": config.encoder_embed_dim, "model_args": sizes, "pretrained_cfg": transform}
    return entries | ({"label_names": record["class_names"]} if record.get("class_names") else {})


def build_model(checkpoint: Path, repo: str) -> Model:
    """Build weights and config.json for this project, and for timm and transformers where they have such a model."""
    options = convert_weights.parse_args([str(checkpoint), "unused", "--to", "huggingface"])
    (_, tensors), record = read_weights(checkpoint), read_sizes(checkpoint)
    config = MAEConfig(**record["config"])
    reader = ImageReader(config.input_channels, record)
    record |= {"image_mean": list(reader.mean), "image_std": list(reader.std)}
    contents, opening = {OURS: tensors, CONFIG: {PUBLISHED: record}}, {}
    variants = [name for name in VARIANTS if record["config"].get(name)]
    if variants:
        return Model(contents, "masked autoencoder", opening, f"timm and transformers have no {variants[0]}")
    source, sizes = convert_weights.open_source(checkpoint, options)
    if source.kind not in SHARED_KINDS:
        return Model(contents, source.kind, opening, f"timm and transformers have no such {source.kind}")
    if source.kind == "encoder" and not source.has("norm."):
        return Model(contents, source.kind, opening, "timm and transformers need a norm behind the blocks")
    contents[CONFIG] |= timm_entries(tensors, config, record)
    opening["timm"] = f'timm.create_model("hf-hub:{repo}", pretrained=True)'
    try:
        configs = convert_weights.huggingface_configs(source.kind, MAEConfig(**sizes), record)
    except ValueError as error:  # it has no masked autoencoder of rectangles
        return Model(contents, source.kind, opening, str(error))
    contents[THEIRS] = convert_weights.convert(source, "huggingface").tensors
    contents["preprocessor_config.json"] = configs["preprocessor_config.json"]
    contents[CONFIG] |= configs[CONFIG] | {"transformers_weights": THEIRS}
    (name,) = configs[CONFIG]["architectures"]
    more = ", add_pooling_layer=False" if source.kind == "encoder" else ""
    opening["transformers"] = f'transformers.{name}.from_pretrained("{repo}"{more})'
    return Model(contents, source.kind, opening)


# ------------------------------------------------------------------------------------------------ the card


class Records(NamedTuple):
    """What a run wrote down: flags without places, what it was made with, name of the data, log, scores by name."""

    flags: dict
    environment: dict
    data: str
    log: Path | None
    scores: dict[str, float]
    chosen: bool = False  # whether the images of the scores chose these weights
    scored_on: str = "held-out images"
    asked: str = ""  # the flags of the evaluation


def read_records(weights: Path) -> Records:
    """Read the records that lie beside weights, or in the folder above; empty where there are none."""
    folders = (weights.parent, *([weights.parent.parent] if weights.name == OURS else []))  # of a checkpoint's folder
    experiment = next((folder for folder in folders if (folder / "args.json").is_file()), None)
    flags = read_json(experiment / "args.json") if experiment else {}
    log = experiment / "log.jsonl" if experiment else None
    rows = read_rows(log) if log and log.is_file() else []
    log = log if any(type(row.get("training_loss")) is float for row in rows) else None
    beside = [weights.with_name(name) for name in (SCORES, CONFIG)]
    (scores, record), more = (read_json(file) if file.is_file() else {} for file in beside), {}
    if Path(str(scores.get("weights"))).name == weights.name:  # not of another file of the folder
        place, held_out = scores.get("data", scores.get("path_to_data")), flags.get("val_fraction") or 0
        held_out = held_out if name_data(str(place)) == name_data(str(flags.get("path_to_data"))) else 0
        kind = "held-out images" if held_out else "images"
        more = {"scored_on": f"{scores.get('num_images', 'the')} {kind} of {as_code(name_data(str(place)))}"}
        given = [name for name, default in EVALUATION_FLAGS.items() if scores.get(name) is (not default)]
        more["asked"] = "".join(f"--{name} " if scores[name] else f"--no-{name} " for name in given)
        more["asked"] += f"--val_fraction {held_out} --seed {flags.get('seed', 0)} " * bool(held_out)
        if "test_data" in scores:
            more["scored_on"] += f", `test_...` on those of {as_code(name_data(scores['test_data']))}"
    elif isinstance(record.get("testing"), dict):  # of the evaluation by which these weights became the best
        scores = {f"testing_{name.removeprefix('testing_')}": value for name, value in record["testing"].items()}
        scores["chose_best_checkpoint"] = True
    else:  # of the last evaluation, which is in the last row of its epoch
        scores = next((row for row in reversed(rows) if any(name.startswith("testing") for name in row)), {})
        scores = {n: v for n, v in scores.items() if n.startswith(("testing", "knn")) or n.endswith("_error")}
    figures = {n: v for n, v in scores.items() if type(v) in (int, float)}
    kept = {n: v for n, v in flags.items() if v is not None and n not in RECORDED and not n.startswith(PLACES)}
    kept = {n: v for n, v in kept.items() if not any(map(is_place, v if isinstance(v, list) else [v]))}
    environment = flags["environment"] if isinstance(flags.get("environment"), dict) else {}
    data = name_data(str(flags.get("path_to_data") or ""))
    return Records(kept, environment, data, log, figures, scores.get("chose_best_checkpoint") is True, **more)


def is_place(value: object) -> bool:
    return isinstance(value, str) and value.startswith(("/", "~", "./", "../"))


def name_data(place: str) -> str:
    """Name a data set of the Hub, else the last folder of a path or an address, without the keys it may hold."""
    if re.fullmatch(r"hf:\w[\w.-]*(/\w[\w.-]*)?(:[\w.+-]+)?(@[\w./+-]+)?", place):
        return place
    if "://" in place:
        place = place.partition("?")[0].rpartition("@")[2]
    return Path(place.removeprefix("hf:")).name


def as_code(text: object) -> str:
    """Give a text of a user as Markdown's code, which it cannot leave."""
    return "`" + escape(str(text), also_bytes=True).replace("`", "'").replace("|", "/") + "`"


CARD_TEXT = """---
{license_entry}
pipeline_tag: {task}
{library}tags:
- masked-autoencoder
- timm
---
# {name}

{kind} ([He et al.](https://arxiv.org/abs/2111.06377)): {sizes}.

## Licence

{license}

## Use

{use}

## Data

{data}

## Recipe

{recipe}

## Scores

{scores}
"""
PLAIN_USE = "`--{flag} hf:{repo}` of this project's scripts, `--checkpoint hf:{repo}` of its tools."
FILL_IN = "**To be filled in**, here and as `license:` above."
UNKNOWN = "Not recorded beside these weights."


def write_card(model: Model, records: Records, args: argparse.Namespace) -> str:
    """Write the model card by the run's own records."""
    config = model.contents[CONFIG][PUBLISHED]["config"]
    task, script, flag = TASKS.get(model.kind, CLASSIFYING)
    names = ("encoder_embed_dim", "encoder_depth", "encoder_num_heads", "patch_size", "img_size", "input_channels")
    use = [PLAIN_USE.format(flag=flag, repo=args.repo)]
    use += ["", "```python", *model.opening.values(), "```"] if model.opening else []
    use += ["", f"Of this project alone: {model.note}."] if model.note else []
    train = f"`accelerate launch {script} --config {RECIPE} --path_to_data DATA`"
    recipe = f"{train}, with all flags in [{RECIPE}]({RECIPE})." if records.flags else UNKNOWN
    made_with = ", ".join(f"{name} {value}" for name, value in records.environment.items() if name in MADE_WITH)
    recipe += f"\n\nMade with {as_code(made_with)}." * bool(made_with)
    recipe += f"\n\n![curves of the training]({CURVE})" * (records.log is not None)
    scores = UNKNOWN
    if records.scores:
        evaluate = f"`accelerate launch {script} --eval_only {records.asked}--path_to_data DATA --{flag} FOLDER`"
        how = f"in training, {train}" if script == "pretrain_mae.py" else f"by {evaluate}, after `hf download`"
        rows = [f"| {as_code(name)} | {value:.6g} |" for name, value in records.scores.items()]
        scores = "\n".join([f"On {records.scored_on}, {how}:", "", "| figure | value |", "|---|---|", *rows])
        scores += "\n\nImages of `testing_...` chose the weights, so these are too high on average." * records.chosen
    return CARD_TEXT.format(
        license_entry=f"license: {args.license}" if args.license else "# license: fill in, such as mit",
        task=task,
        library="library_name: transformers\n" if "transformers" in model.opening else "",
        name=args.repo.partition("/")[2],
        kind=model.kind.capitalize(),
        sizes=", ".join(f"{name} {config[name]}" for name in names),
        license=args.license or FILL_IN,
        use="\n".join(use),
        data=as_code(records.data) if records.data else UNKNOWN,
        recipe=recipe,
        scores=scores,
    )


def draw_curve(log: Path, file: Path) -> None:
    """Draw the losses of a log, and of finetuning the score that chose the best weights."""
    found = {name for row in read_rows(log) for name in row}
    names = [name for name in ("testing_top1_acc", "testing_miou") if name in found]
    figures = ["+".join(name for name in ("training_loss", "testing_loss") if name in found), *names]
    plot_log.main(plot_log.parse_args([str(log), "--output", str(file), "--y", *figures]))


# ------------------------------------------------------------------------------------------------ the command


def write_folder(args: argparse.Namespace) -> None:
    """Write all that is published, whole or not at all."""
    model, records = build_model(args.checkpoint, args.repo), read_records(find_weights(args.checkpoint))
    with written_whole(args.output) as temporary:
        temporary.mkdir()
        for name, content in model.contents.items():
            if name.endswith(".json"):
                write_json(temporary / name, content)
            else:
                tensors = {key: value.contiguous() for key, value in content.items()}
                save_file(tensors, temporary / name, {"format": "pt"})
        if records.flags:
            write_json(temporary / RECIPE, records.flags)
        if records.log is not None:
            draw_curve(records.log, temporary / CURVE)
        (temporary / CARD).write_text(write_card(model, records, args), encoding="utf-8")
    opened = ", ".join(["this project", *model.opening])
    print(f"{'written':<16}{args.output}: {model.kind}, for {opened}" + f" alone ({model.note})" * bool(model.note))


def push(args: argparse.Namespace) -> None:
    """Upload the folder; ConnectionError in a sentence."""
    from huggingface_hub import HfApi, errors

    api = HfApi()
    try:
        url = api.create_repo(args.repo, private=args.private or None, exist_ok=True)
        api.upload_folder(repo_id=args.repo, folder_path=args.output, commit_message="Publish the model")
    except (errors.HTTPError, errors.LocalTokenNotFoundError, errors.OfflineModeIsEnabled) as error:
        reason = " ".join(str(error).split())
        advice = "log in by `hf auth login` or set HF_TOKEN, and run again with --push: the folder is whole"
        raise ConnectionError(f"{args.output} was not uploaded: {reason}; {advice}") from error
    print(f"{'uploaded':<16}{url}")


def check_folder(args: argparse.Namespace) -> None:
    """Refuse a folder that was written from other weights, or for another repository; ValueError says which."""
    wrong, (_, ours), theirs = "", read_weights(args.checkpoint), load_file(args.output / OURS)
    if ours.keys() != theirs.keys() or not all(torch.equal(ours[name], theirs[name]) for name in ours):
        wrong = f"other weights than {args.checkpoint}"
    elif not re.search(rf"(?<![\w.-]){re.escape(args.repo)}(?![\w-])", (args.output / CARD).read_text("utf-8")):
        wrong = f"a {CARD} that does not name {args.repo}"
    if wrong:
        way_out = "choose another --output, or add --overwrite to write all of it anew"
        raise ValueError(f"{args.output} has {wrong}; {way_out}")


def main(args: argparse.Namespace) -> None:
    if args.overwrite or not args.output.exists():
        write_folder(args)
    else:
        check_folder(args)
    if FILL_IN in (args.output / CARD).read_text(encoding="utf-8"):
        print(f"{'licence':<16}fill it in, in two places of {args.output / CARD}")
    if args.push:
        push(args)
    else:
        print(f"{'to upload it':<16}the same command with --push")


if __name__ == "__main__":
    with explained_errors():
        main(parse_args())
