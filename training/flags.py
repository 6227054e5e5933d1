"""The flags that all scripts share, and the check of their values."""

import argparse
from pathlib import Path


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keep the module docstring's lines, and show every default that says something."""

    def _get_help_string(self, action: argparse.Action) -> str:
        silent = action.default is None or "(default" in action.help
        return action.help if silent else super()._get_help_string(action)


def add_run_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that every script has; a script sets its own defaults with `parser.set_defaults`."""
    run = parser.add_argument_group("run")
    run.add_argument("--experiment_name", default="experiment", help="folder below --working_directory; W&B project")
    run.add_argument("--working_directory", default="work_dir", help="where experiments and cached file lists are kept")
    run.add_argument(
        "--resume_from_checkpoint",
        metavar="CHECKPOINT",
        help="a checkpoint folder, the name of one inside the experiment, or 'latest': the newest one that is whole, "
        "or a fresh start where there is none",
    )
    run.add_argument(
        "--save_checkpoint_interval",
        type=int,
        default=10,
        help="epochs between checkpoints that are kept for good; the last epoch is always saved",
    )
    run.add_argument(
        "--save_minutes",
        type=float,
        default=30,
        help="minutes after which the state is saved also within an epoch; 0 never",
    )
    run.add_argument(
        "--keep_checkpoints", type=int, default=2, help="newest checkpoints that are never removed, at least 2"
    )
    run.add_argument(
        "--max_nonfinite_steps",
        type=int,
        default=10,
        help="stop after so many optimizer steps in a row whose loss or gradient was not finite; each is left out",
    )
    run.add_argument(
        "--deterministic",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="only kernels that give the same bits every time; slower on a GPU, and needed there for an exact resume",
    )
    run.add_argument(
        "--timeout_minutes",
        type=float,
        default=30,
        help="how long a process waits for the others before the job is given up",
    )
    run.add_argument(
        "--activation_checkpointing",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="compute the blocks again in the backward pass: less memory, a third more work, the same gradients",
    )
    run.add_argument(
        "--bf16_gradient_sync",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="average gradients over processes in bfloat16: half the traffic, coarser rounding",
    )
    run.add_argument("--log_interval", type=int, default=20, help="optimizer steps between log rows")
    run.add_argument(
        "--log_wandb",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="also log to Weights & Biases (needs the package; offline without a key)",
    )
    run.add_argument("--wandb_run_name", help="name of the W&B run (default: W&B's choice)")
    run.add_argument("--seed", type=int, default=0, help="decides weights, order, crops and masks")
    run.add_argument(
        "--demo",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="draw a small data set and train a small model on it; other flags still win",
    )

    data = parser.add_argument_group("data")
    data.add_argument("--path_to_data", help="root of the data set")
    data.add_argument(
        "--img_size", type=int, nargs="+", default=[224], metavar="PIXELS", help="one number, or height and width"
    )
    data.add_argument("--input_channels", type=int, default=3, help="1 grey, 3 RGB, 4 RGBA")
    data.add_argument(
        "--mean",
        type=float,
        nargs="+",
        default=[0.485, 0.456, 0.406],
        help="channel means, 0..1 (default: ImageNet's; 0.5 each when the channels are not three)",
    )
    data.add_argument(
        "--std",
        type=float,
        nargs="+",
        default=[0.229, 0.224, 0.225],
        help="channel standard deviations, 0..1 (likewise)",
    )
    data.add_argument(
        "--num_workers",
        type=int,
        default=8,
        help="processes that decode, for each training process; at most the machine's cores",
    )
    data.add_argument(
        "--max_bad_fraction",
        type=float,
        default=0.01,
        help="stop when more than this share of the images cannot be decoded",
    )
    data.add_argument(
        "--rescan_data",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="list the files anew instead of reading the cached list",
    )

    optim = parser.add_argument_group("optimisation")
    optim.add_argument("--epochs", type=int, help="passes over the training images")
    optim.add_argument("--warmup_epochs", type=float, help="epochs of linear warmup from 0")
    optim.add_argument(
        "--per_gpu_batch_size",
        type=int,
        help="images of one optimizer step on one process, cut into --gradient_accumulation_steps forward passes",
    )
    optim.add_argument("--gradient_accumulation_steps", type=int, default=1, help="forward passes per optimizer step")
    optim.add_argument("--weight_decay", type=float, help="AdamW's, not on biases and norms")
    optim.add_argument(
        "--max_grad_norm", type=float, default=1.0, help="clip the gradient norm to this; 0 never clips, as the paper"
    )


def check_run_flags(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse impossible values of the shared flags, and turn the lists into what the code uses."""
    positive = (
        "epochs",
        "per_gpu_batch_size",
        "gradient_accumulation_steps",
        "save_checkpoint_interval",
        "log_interval",
        "max_nonfinite_steps",
    )
    for name in positive:
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1, not {getattr(args, name)}")
    for name in ("warmup_epochs", "num_workers", "weight_decay", "max_grad_norm", "save_minutes"):
        if getattr(args, name) is not None and getattr(args, name) < 0:
            parser.error(f"--{name} cannot be negative, and is {getattr(args, name)}")
    if args.keep_checkpoints < 2:
        parser.error(
            f"--keep_checkpoints {args.keep_checkpoints}: at least 2, so that one is left when the newest is damaged"
        )
    if args.timeout_minutes <= 0:
        parser.error(f"--timeout_minutes must be above 0, and is {args.timeout_minutes:g}")
    if args.epochs is not None and args.warmup_epochs is not None and args.warmup_epochs >= args.epochs:
        parser.error(
            f"--warmup_epochs {args.warmup_epochs:g} leaves nothing of --epochs {args.epochs}; give both, the paper's "
            "share is a twentieth"
        )
    if args.per_gpu_batch_size % args.gradient_accumulation_steps:
        parser.error(
            f"--per_gpu_batch_size {args.per_gpu_batch_size} cannot be cut into --gradient_accumulation_steps "
            f"{args.gradient_accumulation_steps} equal forward passes; choose a multiple of it"
        )
    if len(args.img_size) > 2:
        parser.error(f"--img_size takes one number, or height and width, not {len(args.img_size)} numbers")
    args.img_size = args.img_size[0] if len(args.img_size) == 1 else tuple(args.img_size)
    for name in ("mean", "std"):
        values = getattr(args, name)
        if values == parser.get_default(name) and args.input_channels != len(values):
            values = [0.5]
        if len(values) == 1:
            values = values * args.input_channels
        if len(values) != args.input_channels:
            parser.error(
                f"--{name} has {len(values)} values, --input_channels is {args.input_channels}; give as many, or one"
            )
        setattr(args, name, tuple(values))
    if min(args.std) <= 0:
        parser.error(f"--std must be positive, and is {args.std}")
    if not 0 <= args.max_bad_fraction <= 1:
        parser.error(f"--max_bad_fraction is a share between 0 and 1, not {args.max_bad_fraction}")
    if args.seed < 0:
        parser.error(f"--seed cannot be negative, and is {args.seed}")
    if Path(args.experiment_name).name != args.experiment_name or args.experiment_name in ("", ".."):
        parser.error(
            f"--experiment_name {args.experiment_name!r} is a folder name; the path goes into --working_directory"
        )


def micro_batch_size(args: argparse.Namespace) -> int:
    """Count the images of one forward pass on one process."""
    return args.per_gpu_batch_size // args.gradient_accumulation_steps
