"""The flags that all scripts share, and how a command line becomes the arguments of a run.

A flag is a row of a table: name, default (or, where there is none, its type), help, its lowest and highest value, both
allowed, with why where that is not plain, and options of argparse. A command is parsed once; what it leaves out comes
from a recipe, from the sizes of the weights it names, and else from the table.
"""

import argparse
import dataclasses
import decimal
import difflib
import functools
import itertools
import math
import os
import re
import sys
from collections.abc import Callable, Container, Mapping, Sequence
from pathlib import Path
from typing import NoReturn

import yaml

from storage.console import refuse
from storage.files import escape, read_text, user_path
from storage.lazily import begin_imports
from storage.snapshots import is_hub_model, pin_model
from training.states import find_checkpoints

Rows = Sequence[tuple]

# Accelerate's; packages have the same names
TRACKERS = ("wandb", "tensorboard", "trackio", "mlflow", "aim", "clearml", "comet_ml", "dvclive", "swanlab")

FIRST_FLAGS: dict[str, Rows] = {
    "run": [
        ("experiment_name", "experiment", "folder below --working_directory; W&B project"),
        ("working_directory", "work_dir", "where experiments and cached file lists are kept"),
        ("resume_from_checkpoint", str, "'latest' (the newest whole one, else a fresh start), a name or a folder"),
        ("check", False, "measure data, disk, steps and memory for two minutes, say what to expect, and stop"),
        ("demo", False, "draw a small data set and train a small model on it; other flags still win"),
        ("config", str, "files of flags and values, such as a run's args.json; flags win", {"nargs": "+"}),
        ("seed", 0, "decides weights, order, crops and masks", (0, None)),
        ("save_checkpoint_interval", 10, "epochs between checkpoints kept for good, beside the last", (1, None)),
        ("log_wandb", False, "also log to Weights & Biases (needs the package; offline without a key)"),
        (
            "log_with",
            str,
            f"also log with one or several of {', '.join(TRACKERS)}; each needs its package",
            {"nargs": "+", "choices": TRACKERS, "metavar": "TRACKER"},
        ),
        ("wandb_run_name", str, "name of the run at the trackers (default: W&B's choice, or --experiment_name)"),
    ],
    "data": [
        ("path_to_data", str, "folder, data set of the Hub (hf:OWNER/NAME[:CONFIG][@REVISION]), or address of packs"),
        ("image_column", str, "of a data set of the Hub (default: the only one of images)"),
        ("val_fraction", float, "share that is held out, of every class, where there is no val/", (0.001, 0.5)),
        ("shard_cache_gb", 100.0, "of packs at an address, such as s3://BUCKET/PACK, so much is kept here", (0, None)),
        ("img_size", [224], "one number, or height and width", {"metavar": "PIXELS"}),
        ("input_channels", 3, "1 grey, 3 RGB, 4 RGBA; any number of bands with --value_range", (1, None)),
        (
            "value_range",
            str,
            "LOW HIGH, values that become 0 and 1; auto (percentiles of the training set); own (the files' units, "
            "described by --mean and --std) (default: 8-bit pictures; own for .npy and other channels than 1, 3, 4)",
            {"nargs": "+", "metavar": "RANGE"},
        ),
        ("mean", [0.485, 0.456, 0.406], "channel means, 0..1 (default: ImageNet's; 0.5 each if not three)"),
        ("std", [0.229, 0.224, 0.225], "channel standard deviations, 0..1 (likewise)", (1e-9, None)),
        ("show_channels", [0, 1, 2], "bands, from 0, that pictures show as red, green and blue", (0, None)),
        ("num_workers", 8, "processes that decode, for each training process; at most the cores", (0, None)),
    ],
    "optimisation": [
        ("epochs", int, "passes over the training images", (1, None)),
        ("warmup_epochs", float, "epochs of linear warmup from 0; of other --epochs a twentieth", (0, None)),
        ("per_gpu_batch_size", int, "images of an optimizer step on one process, in all forward passes", (1, None)),
        ("gradient_accumulation_steps", 1, "forward passes of an optimizer step", (1, None)),
        ("weight_decay", float, "AdamW's, not on biases and norms", (0, None)),
        ("max_grad_norm", 1.0, "clip the gradient norm to this; 0 never clips, as the paper", (0, None)),
    ],
}
RARE_FLAGS: dict[str, Rows] = {
    "rarely changed": [
        ("log_interval", 20, "optimizer steps between log rows", (1, None)),
        ("save_minutes", 30.0, "minutes after which the state is saved also within an epoch; 0 never", (0, None)),
        ("keep_checkpoints", 2, "newest checkpoints that are never removed", (2, None, "as the newest may be damaged")),
        ("max_nonfinite_steps", 10, "stop after so many non-finite losses or gradients in a row", (1, None)),
        ("max_image_pixels", 89_478_485, "larger images are refused, Pillow's guard against bombs", (1, None)),
        ("max_bad_fraction", 0.01, "stop when more than this share of the images cannot be used", (0, 1)),
        ("rescan_data", False, "list the files anew instead of reading the cached list"),
        ("pin_memory", True, "on a GPU, copy batches from page-locked memory"),
        ("activation_checkpointing", False, "compute the blocks twice: less memory, a third more work"),
        ("deterministic", False, "only kernels that give the same bits every time: exact resumes on a GPU"),
        ("timeout_minutes", 30.0, "how long to wait for data or another process; then save and fail", (0.01, None)),
        ("bias_weight_decay", False, "also decay biases"),
        ("norm_weight_decay", False, "also decay the weights of norms"),
    ],
}
WARMUP_SHARE = 1 / 20  # of the epochs, where --epochs is not the recipe's: the paper's 40 of 800
OPEN_BATCH = 32  # images of an evaluation where the batch is left open, as only a training settles it
NOT_GIVEN = object()
# In args.json, but not to be given again
RECORDED = ("config", "decoder", "statistics_given", "changed_flags", "environment")
# Beginnings of flags that name files
PATHS = ("path_to", "init_from", "working_directory", "resume_from_checkpoint", "class_names", "test_folder")
WEIGHTS = ("path_to_pretrained_mae_weights", "path_to_backbone_checkpoint", "init_from")
FOLDERS = ("path_to_data", "path_to_probe_data", "test_folder", "working_directory")
MAX_NAME_BYTES = 255  # of a file or folder, on nearly every disk
METAVARS = {int: "N", float: "X", str: "TEXT"}


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, without a usage that repeats the flags."""

    def error(self, message: str) -> NoReturn:
        refuse(message.removeprefix("argument "))

    def _check_value(self, action: argparse.Action, value: object) -> None:
        if action.choices is not None and value not in action.choices:
            close = difflib.get_close_matches(str(value), action.choices, 1, 0.5)
            hint = f"; did you mean {close[0]}?" if close else ""
            self.error(f"--{action.dest} takes {', '.join(action.choices)}, not {shorten(str(value))}{hint}")


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keep the module docstring's lines, put a flag on one line where it fits, and show defaults that say something."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if isinstance(action, argparse.BooleanOptionalAction):
            return f"--[no-]{action.dest}"
        return super()._format_action_invocation(action)

    def _get_help_string(self, action: argparse.Action) -> str:
        silent = action.default is None or action.default is False or "(default" in action.help
        return action.help if silent else super()._get_help_string(action)


def size_flags(config_class: type, prefixes: tuple[str, ...], note: str) -> Rows:
    """Give a flag for each size of a network: the fields of its dataclass whose names begin with a prefix."""
    fields = [field for field in dataclasses.fields(config_class) if field.name.startswith(prefixes)]
    return [(field.name, type(field.default), f"(default: {note})") for field in fields]


class Flags:
    """The flags of a script: the shared groups, its own, which may add to those, and the rarely changed ones last."""

    def __init__(self, description: str, own: Mapping[str, Rows]):
        self.parser = Parser(
            description=description,
            usage="accelerate launch %(prog)s [flags]",
            formatter_class=functools.partial(HelpFormatter, max_help_position=36),
            allow_abbrev=False,
            add_help=False,
        )
        self.error = self.parser.error
        self.ranges: dict[str, tuple] = {}
        for title in dict.fromkeys([*FIRST_FLAGS, *own, *RARE_FLAGS]):
            group = self.parser.add_argument_group(title)
            for table in (FIRST_FLAGS, own, RARE_FLAGS):
                for name, default, text, *more in table.get(title, ()):
                    options = dict(*(extra for extra in more if isinstance(extra, dict)))
                    for limits in (extra for extra in more if isinstance(extra, tuple)):
                        self.ranges[name] = limits
                    add_flag(group, name, default, text, **options)
        self.parser.add_argument("-h", "--help", action="store_true", help="show this and exit")

    def parse(self, argv: list[str] | None) -> dict[str, object]:
        """Parse a command line, and give what it says; what it leaves out is left out."""
        argv = [write_out(word) for word in (sys.argv[1:] if argv is None else argv)]
        names = vars(self.parser.parse_args([]))  # of all flags
        files = Parser(add_help=False, allow_abbrev=False)
        files.add_argument("--config", nargs="+", type=user_path, default=())
        written = [self.read_config(file, names) for file in files.parse_known_args(argv)[0].config]
        argv = [*itertools.chain(*written), *argv]  # of a flag that is given twice the last one holds
        found, unknown = self.parser.parse_known_args(argv, argparse.Namespace(**dict.fromkeys(names, NOT_GIVEN)))
        if unknown:
            self.error(f"unknown: {' '.join(unknown)}{suggest(unknown[0], names)} --help shows all flags")
        given = {name: value for name, value in vars(found).items() if value is not NOT_GIVEN}
        paths = {name: os.path.expanduser(value) for name, value in given.items() if name.startswith(PATHS)}
        if "help" not in given:
            self.check_ranges(given)
            for name, path in paths.items():
                self.check_path(name, path)
        return given | paths  # a shell leaves the ~ of --flag=~/folder alone

    def read_config(self, file: Path, names: Container[str]) -> list[str]:
        """Read flags from a file of names and values, JSON or YAML; args.json of a run is one."""
        try:
            values = yaml.safe_load(read_text(file))  # JSON is YAML
        except (OSError, ValueError, yaml.YAMLError) as error:
            self.error(f"--config {file} cannot be read ({error}); give a JSON or YAML file of flags and values")
        if not isinstance(values, dict):
            self.error(f"--config {file} holds a {type(values).__name__}, not flags and values")
        words = []
        for name, value in values.items():
            if name in RECORDED or value is None:
                continue
            if name not in names:
                self.error(f"--config {file} has {name!r}{suggest(str(name), names)} --help shows all flags")
            if isinstance(value, bool):
                words.append(f"--{name}" if value else f"--no-{name}")
            else:
                items = value if isinstance(value, list) else [value]
                words += [f"--{name}", *(write_out(str(item)) for item in items)]
        return words

    def complete(self, given: Mapping[str, object], *defaults: Mapping[str, object]) -> argparse.Namespace:
        """Complete a command line by defaults, of which later ones win, and check it; --help shows these and exits."""
        for table in defaults:
            self.parser.set_defaults(**table)
        if given.get("help"):
            self.parser.print_help()
            self.parser.exit()
        recipe = self.parser.parse_args([])
        args = argparse.Namespace(**vars(recipe) | dict(given))
        del args.help
        args.changed_flags = sorted(name for name, value in given.items() if value != getattr(recipe, name))
        # Whether these are somebody's, or stand in for what nobody said
        args.statistics_given = all(any(name in table for table in (given, *defaults)) for name in ("mean", "std"))
        if "warmup_epochs" not in given and recipe.warmup_epochs is not None and args.epochs != recipe.epochs:
            args.warmup_epochs = WARMUP_SHARE * args.epochs
        if "gradient_accumulation_steps" not in given and (args.per_gpu_batch_size or 0) > 0:
            args.gradient_accumulation_steps = fit_accumulation(args)
        self.check(args)
        for name in WEIGHTS:  # of the Hub: args.json says which commit was used, and a resume asks for the same
            if is_hub_model(getattr(args, name, None)):
                setattr(args, name, pin_model(getattr(args, name)) or getattr(args, name))
        return args

    def find_demo_weights(self, given: Mapping) -> str | None:
        """Give the newest checkpoint of pretrain_mae.py --demo, from which the demos of finetuning start."""
        work = given.get("working_directory", self.parser.get_default("working_directory"))
        checkpoints = find_checkpoints(Path(work) / "demo")
        if not checkpoints and not given.get("help"):
            self.error("--demo starts from the demo pretraining: first run accelerate launch pretrain_mae.py --demo")
        return str(checkpoints[-1]) if checkpoints else None

    def size_defaults(self, given: Mapping, record: Mapping, sizes: Mapping, source: str | None) -> dict[str, object]:
        """Give the defaults that come with weights: the sizes that are flags, image size, channels, mean and std.

        `sizes` are all of them, `record` the config.json beside the weights. A given size that differs is refused,
        except for those of the images; with other channels the weights' mean, std and range mean nothing.
        """
        flags = {action.dest for action in self.parser._actions}
        fixed = [name for name in sizes if name.startswith(("encoder", "decoder", "patch_size")) and name in flags]
        for name in fixed if source else ():
            if given.get(name, sizes[name]) != sizes[name]:
                self.error(f"--{name} {given[name]}, but {source} has {sizes[name]}; leave the flag out")
        defaults = {name: sizes[name] for name in fixed}
        if source:
            img_size = sizes["img_size"]
            defaults["img_size"] = [img_size] if isinstance(img_size, int) else list(img_size)
            defaults["input_channels"] = sizes["input_channels"]
        if "image_mean" in record and given.get("input_channels", sizes["input_channels"]) == sizes["input_channels"]:
            defaults |= {"mean": list(record["image_mean"]), "std": list(record["image_std"])}
            defaults["value_range"] = record.get("value_range")
        return defaults

    def check(self, args: argparse.Namespace) -> None:
        """Refuse impossible values, and turn the lists of the shared flags into what the code uses."""
        self.check_ranges(vars(args))
        if args.epochs is not None and args.warmup_epochs is not None and args.warmup_epochs >= args.epochs:
            self.error(
                f"--warmup_epochs {args.warmup_epochs:g} leaves nothing of --epochs {args.epochs}; give both, a "
                "twentieth is the paper's share in pretraining"
            )
        if (args.per_gpu_batch_size or 0) % args.gradient_accumulation_steps:
            self.error(
                f"--per_gpu_batch_size {args.per_gpu_batch_size} cannot be cut into --gradient_accumulation_steps "
                f"{args.gradient_accumulation_steps} equal forward passes; choose a multiple of it"
            )
        if len(args.img_size) > 2:
            self.error(f"--img_size takes one number, or height and width, not {len(args.img_size)} numbers")
        args.img_size = args.img_size[0] if len(args.img_size) == 1 else tuple(args.img_size)
        for name in ("mean", "std"):
            values, channels = getattr(args, name), args.input_channels
            if values == self.parser.get_default(name) and channels != len(values):
                values = [0.5]
            if len(values) == 1:
                values = values * channels
            if len(values) != channels:
                self.error(f"--{name} has {len(values)} values, --input_channels is {channels}; give as many, or one")
            setattr(args, name, tuple(values))
        args.value_range = self.check_value_range(args.value_range)
        shown = args.show_channels
        if len(shown) != 3 or (max(shown) >= args.input_channels and shown != self.parser.get_default("show_channels")):
            self.error(f"--show_channels takes three bands of 0 to {args.input_channels - 1}, not {shown}")
        args.show_channels = [min(channel, args.input_channels - 1) for channel in shown]
        for name in ("eval_only", "knn"):
            if args.check and getattr(args, name, False):
                self.error(f"--check measures a training, and --{name} trains nothing; leave one of them out")
        self.check_experiment(args)

    def check_path(self, name: str, path: str) -> None:
        """Refuse a path that cannot be one, a file where a folder is needed, and a folder for a list of names."""
        try:
            os.stat(path)
        except (FileNotFoundError, NotADirectoryError, PermissionError) as error:
            if name == "class_names":
                self.error(f"--{name} {path} cannot be read ({error.strerror}); give a file with a name on every line")
            return  # of data and weights more is said where they are looked for
        except (OSError, ValueError) as error:
            self.error(f"--{name} {shorten(path)} is no path that can be read ({getattr(error, 'strerror', error)})")
        if name in FOLDERS and not os.path.isdir(path):
            self.error(f"--{name} {path} is a file; a folder is needed")
        if name == "class_names" and os.path.isdir(path):
            self.error(f"--{name} {path} is a folder; a file with a name on every line is needed")

    def check_experiment(self, args: argparse.Namespace) -> None:
        """Refuse a name that no folder can have, and a place where the run could not write."""
        name = args.experiment_name
        if Path(name).name != name or name in ("", ".."):
            self.error(f"--experiment_name {shorten(name)} is a folder name; the path goes into --working_directory")
        if len(os.fsencode(name)) > MAX_NAME_BYTES:
            size = f"{len(os.fsencode(name))} bytes, a folder's name at most {MAX_NAME_BYTES}"
            self.error(f"--experiment_name {shorten(name)} has {size}; choose a shorter one")
        if name != name.strip() or escape(name) != name:
            self.error(
                f"--experiment_name {shorten(name)} has spaces at an end, or characters that cannot be seen; leave "
                "them out"
            )
        experiment = Path(os.path.abspath(args.working_directory), name)
        nearest = next(folder for folder in (experiment, *experiment.parents) if os.path.lexists(folder))
        if not os.path.isdir(nearest):
            self.error(f"the run is kept in {experiment}, but {nearest} is no folder; choose another place or name")
        trains = not any(getattr(args, flag, False) for flag in ("eval_only", "knn"))
        if trains and not os.access(nearest, os.W_OK | os.X_OK):
            self.error(f"the run is kept in {experiment}, but {nearest} cannot be written to; choose another place")

    def check_value_range(self, given: list | str | None) -> tuple[float, float] | str | None:
        """Turn --value_range into two numbers, "auto", "own" or None."""
        if given is None or isinstance(given, str) or given in (["own"], ["auto"]):
            return given[0] if isinstance(given, list) else given
        try:
            numbers = tuple(map(float, given))
        except ValueError:
            numbers = ()
        if len(numbers) != 2 or not -math.inf < numbers[0] < numbers[1] < math.inf:
            self.error(f"--value_range takes LOW HIGH (the higher number last), auto or own, not {' '.join(given)}")
        return numbers

    def check_ranges(self, given: Mapping[str, object]) -> None:
        """Refuse values outside their range; of flags with several values each of them."""
        for name, (low, high, *why) in self.ranges.items():
            value = given.get(name)
            values = value if isinstance(value, list) else [] if value is None else [value]
            if not all(low <= one and (high is None or one <= high) for one in values):
                allowed = f"at least {low:g}" if high is None else f"between {low:g} and {high:g}"
                if 0 < low < 1e-6:
                    allowed = "above 0" if high is None else f"above 0 and at most {high:g}"
                shown = " ".join(f"{one:g}" for one in values)
                self.error(f"--{name} must be {allowed}, not {shown}" + "".join(f", {reason}" for reason in why))


def check_command(description: str, own: Mapping[str, Rows], parse_args: Callable[[], object]) -> None:
    """Answer --help and refuse flags that cannot be, before a script imports what takes seconds."""
    if Flags(description, own).parse(None).keys() == {"help"}:
        parse_args()
    begin_imports()


def suggest(word: str, names: Container[str]) -> str:
    """Give the flag that somebody may have meant, as the rest of a message."""
    close = difflib.get_close_matches(word.lstrip("-").partition("=")[0].replace("-", "_"), names, 1)
    return f"; did you mean --{close[0]}?" if close else "."


def shorten(text: str) -> str:
    """Show a text in quotes, its middle left out where it is long, and with nothing in it that a terminal obeys."""
    return repr(text if len(text) <= 60 else f"{text[:30]}...{text[-20:]}")


def write_out(word: str) -> str:
    """Write -1e-5 as -0.00001: argparse takes it for a flag."""
    return format(decimal.Decimal(word), "f") if re.fullmatch(r"-[0-9.]+[eE][-+]?[0-9]{1,3}", word) else word


def add_flag(group, name: str, default: object, text: str, **options: object) -> None:
    """Add a flag whose type is told by its default, or by a type in the default's place; lists take several values."""
    kind = default if isinstance(default, type) else type(default[0] if isinstance(default, list) else default)
    if kind is bool:
        options = {"action": argparse.BooleanOptionalAction, **options}
    else:
        options = {"type": kind} | ({} if "choices" in options else {"metavar": METAVARS[kind]}) | options
    if isinstance(default, list):
        options = {"nargs": "+", **options}
    group.add_argument(f"--{name}", default=None if isinstance(default, type) else default, help=text, **options)


def fit_accumulation(args: argparse.Namespace) -> int:
    """Give the most forward passes, up to the recipe's, that cut a batch into equal parts of two images or more."""
    recipe, batch = args.gradient_accumulation_steps, args.per_gpu_batch_size
    return max(steps for steps in range(1, recipe + 1) if batch % steps == 0 and (steps == 1 or batch // steps > 1))


def micro_batch_size(args: argparse.Namespace) -> int:
    """Count the images of one forward pass on one process; OPEN_BATCH where a recipe has left the batch open."""
    return (args.per_gpu_batch_size or OPEN_BATCH) // args.gradient_accumulation_steps
