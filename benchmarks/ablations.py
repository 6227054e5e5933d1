r"""The paper's study at a small size: every row of tables 1a to 1f and of figures 5 and 9, beside the paper's numbers.

    OMP_NUM_THREADS=1 python benchmarks/ablations.py --path_to_data IMAGENETTE --working_directory work_dir/ablations
    OMP_NUM_THREADS=1 python benchmarks/ablations.py ... --tables 1f 1e --seeds 0 1 2

A ViT of 1.2 million parameters at 64 pixels, with patches of 8, is pretrained once for each row, by default with a
decoder of 2 blocks (paper: 8), then finetuned, probed linearly, and classified by nearest neighbours. Started again, it
goes on where it was. Ends with a table for each of the paper's, with the pairs of rows whose order is another one than
the paper's and what seeds alone change, and with the curves of the figures as pictures in --working_directory.
"""

import argparse
import itertools
import statistics
from pathlib import Path
from typing import NamedTuple

from measure import print_table
from pretraining_helps import CLASSIFICATION, SIZE, run, run_all

from tools.plot_log import build_axis, draw_panel

PRETRAINING = ["--model", "mae_vit_tiny_patch16", *SIZE, "--img_size", "64", "--per_gpu_batch_size", "64"]
PRETRAINING += ["--gradient_accumulation_steps", "1", "--base_learning_rate", "4e-3", "--decoder_embed_dim", "128"]
PRETRAINING += ["--decoder_num_heads", "4", "--decoder_depth", "2", "--target", "pixels"]
FINETUNING = [*CLASSIFICATION, "--learning_rate", "4e-3", "--layer_decay", "0.75"]
# LARS at the paper's base rate (0.1 for 256 images) hardly moves a layer in the few steps of this size.
LINEAR = ["--linear_probe", "--per_gpu_batch_size", "256", "--learning_rate", "12.8"]
LINEAR_EPOCHS = 10


class Row(NamedTuple):
    """A variant: its name, flags of pretraining and finetuning, and the paper's top-1 (ViT-L/16, 800 epochs)."""

    name: str
    flags: str = ""
    finetuned: float | None = None
    linear: float | None = None
    finetuning_flags: str = ""


# The paper's numbers were compared with a copy of its text (arXiv 2111.06377: table 1, sections 4.1 and 4.3); of its
# figures' only those are here that the text names (54.6 is at 10 % by the figure). The decoder's widths are divided by
# four, the encoder's by eight.
TABLES = {
    "1a": [
        Row("decoder of 1 block", "--decoder_depth 1", 84.8, 65.5),
        Row("decoder of 2 blocks", "", 84.9, 70.0),
        Row("decoder of 4 blocks", "--decoder_depth 4", 84.9, 71.9),
        Row("decoder of 8 blocks", "--decoder_depth 8", 84.9, 73.5),
        Row("decoder of 12 blocks", "--decoder_depth 12", 84.4, 73.3),
    ],
    "1b": [
        Row("decoder 32 wide (paper: 128)", "--decoder_embed_dim 32", 84.9, 69.1),
        Row("decoder 64 wide (paper: 256)", "--decoder_embed_dim 64", 84.8, 71.3),
        Row("decoder 128 wide (paper: 512)", "", 84.9, 73.5),
        Row("decoder 192 wide (paper: 768)", "--decoder_embed_dim 192", 84.4, 73.1),
        Row("decoder 256 wide (paper: 1024)", "--decoder_embed_dim 256", 84.3, 73.1),
    ],
    "1c": [
        Row("encoder with mask tokens", "--encode_mask_tokens", 84.2, 59.6),
        Row("encoder without mask tokens", "", 84.9, 73.5),
    ],
    "1d": [
        Row("pixels", "", 84.9, 73.5),
        Row("normalised pixels", "--target normalized_pixels", 85.4, 73.9),
        Row("principal components", "--target pca", 84.6, 72.3),
    ],
    "1e": [
        Row("none", "--augmentation none", 84.0, 65.7),
        Row("crop of fixed size", "--augmentation fixed_crop", 84.7, 73.1),
        Row("crop of random size", "", 84.9, 73.5),
        Row("crop and colour jitter", "--augmentation random_crop_jitter", 84.3, 71.9),
    ],
    "1f": [
        Row("random, 75 %", "", 84.9, 73.5),
        Row("blocks, 50 %", "--masking block --mask_ratio 0.5", 83.9, 72.3),
        Row("blocks, 75 %", "--masking block", 82.8, 63.9),
        Row("grid, 75 %", "--masking grid", 84.0, 66.0),
    ],
    "figure 5": [
        Row("10 % removed", "--mask_ratio 0.1", None, 54.6),
        *(Row(f"{ratio} % removed", f"--mask_ratio 0.{ratio // 10}") for ratio in range(20, 80, 10)),
        Row("75 % removed", "", 84.9, 73.5),
        *(Row(f"{ratio} % removed", f"--mask_ratio 0.{ratio // 10}") for ratio in (80, 90)),
    ],
    "figure 9": [
        Row(f"{blocks:g} blocks finetuned", "", finetuned, 73.5, f"--finetune_blocks {blocks:g}")  # 0: the linear probe
        for blocks, finetuned in {0: None, 0.5: 79.1, 1: 81.0, 2: None, 4: None, 6: 84.9}.items()  # 6 are all here
    ],
}
CURVES = {"figure 5": "patches removed, in percent", "figure 9": "blocks finetuned"}  # over the number of each name


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--path_to_data", required=True, help="train/ and val/ with class folders")
    parser.add_argument("--working_directory", type=Path, required=True, help="where all runs are kept")
    parser.add_argument("--tables", nargs="+", choices=TABLES, default=list(TABLES), help="(default: all)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="(default: 0)")
    spread = "seeds of the row that all others vary, whose spread is the measure of what a difference means"
    parser.add_argument("--default_seeds", type=int, nargs="+", help=f"{spread} (default: those of --seeds)")
    parser.add_argument("--epochs", type=int, default=40, help="of pretraining (default: 40)")
    parser.add_argument("--finetuning_epochs", type=int, default=5, help="(default: 5)")
    parser.add_argument("--mixed_precision", choices=("no", "bf16"), default="no", help="(default: no)")
    parser.add_argument("--at_once", type=int, default=2, help="runs side by side, one thread each (default: 2)")
    return parser.parse_args(argv)


# ------------------------------------------------------------------------------------------------ runs


def name_run(what: str, flags: str, seed: int) -> str:
    variant = flags.replace("--", "").replace(" ", "_") or "default"
    return f"{what}_{variant}_seed{seed}"


def launched(args: argparse.Namespace) -> list[str]:
    return ["--mixed_precision", args.mixed_precision]


def seeds_of(args: argparse.Namespace, row: Row) -> list[int]:
    is_default = not row.flags and not row.finetuning_flags
    return args.default_seeds if is_default and args.default_seeds else args.seeds


def pretrain(args: argparse.Namespace, flags: str, seed: int) -> dict:
    command = [*PRETRAINING, *flags.split(), "--warmup_epochs", f"{args.epochs / 20:g}"]
    command += ["--probe_every", str(args.epochs), "--path_to_data", args.path_to_data, "--seed", str(seed)]
    name = name_run("pretrained", flags, seed)
    return run(args.working_directory, "pretrain_mae.py", name, args.epochs, command, launched(args))


def runs_of(row: Row) -> dict[str, Row]:
    """Give what is trained on the weights of a row, whatever it is called; a probe hangs on pretraining alone."""
    return {"finetuned": Row("", row.flags, finetuning_flags=row.finetuning_flags), "linear": Row("", row.flags)}


def classify(args: argparse.Namespace, kind: str, row: Row, seed: int) -> dict:
    """Finetune what was pretrained, or train a linear layer on its features."""
    weights = args.working_directory / name_run("pretrained", row.flags, seed)
    command = ["--path_to_pretrained_mae_weights", str(weights), "--path_to_data", args.path_to_data]
    command += ["--seed", str(seed)]
    if kind == "linear":
        command += LINEAR
        name, epochs = name_run(kind, row.flags, seed), LINEAR_EPOCHS
    else:
        command += [*FINETUNING, *row.finetuning_flags.split()]
        name, epochs = name_run(kind, f"{row.flags} {row.finetuning_flags}".strip(), seed), args.finetuning_epochs
    return run(args.working_directory, "finetune_classifier.py", name, epochs, command, launched(args))


# ------------------------------------------------------------------------------------------------ tables


def show(scores: list[float], form: str = ".2f") -> str:
    """Give the mean, and of several seeds the lowest and highest."""
    mean = f"{statistics.mean(scores):{form}}"
    return mean if len(scores) == 1 else f"{mean} ({min(scores):{form}} to {max(scores):{form}})"


def compare_order(rows: list[Row], paper: list[float | None], ours: list[list[float]], spread: float) -> list[str]:
    """Name the pairs of rows in another order than the paper's, how far apart, and whether seeds differ as much."""
    found = []
    for a, b in itertools.combinations(range(len(rows)), 2):
        if None in (paper[a], paper[b]) or paper[a] == paper[b]:
            continue
        better, worse = (a, b) if paper[a] > paper[b] else (b, a)
        wrong_by = statistics.mean(ours[worse]) - statistics.mean(ours[better])
        if wrong_by >= 0:
            noise = ", within the seeds' spread" if wrong_by <= spread else ""
            found.append(f"{rows[better].name} / {rows[worse].name} (by {wrong_by:.2f}{noise})")
    return found


def draw(args: argparse.Namespace, table: str, columns: dict[str, list[list[float]]]) -> None:
    """Draw the means of a table over the numbers that its rows' names begin with."""
    places = [float(row.name.split()[0]) for row in TABLES[table]]
    series = {kind: list(zip(places, map(statistics.mean, scores), strict=True)) for kind, scores in columns.items()}
    path = args.working_directory / f"{table.replace(' ', '_')}.png"
    draw_panel(series, build_axis(places), CURVES[table], "top-1, in percent").save(path)
    print(f"drawn in {path}", flush=True)


def main(args: argparse.Namespace) -> None:
    rows = [(row, seed) for table in args.tables for row in TABLES[table] for seed in seeds_of(args, row)]
    # Rows that share their flags share their runs, which are started once
    probed = run_all(args, pretrain, list(dict.fromkeys((row.flags, seed) for row, seed in rows)))
    runs = {(kind, variant, seed): None for row, seed in rows for kind, variant in runs_of(row).items()}
    scored = run_all(args, classify, list(runs))

    found = {table: {"finetuned": [], "linear": [], "k-NN": []} for table in args.tables}
    for table, columns in found.items():
        for row in TABLES[table]:
            seeds = seeds_of(args, row)
            for kind, variant in runs_of(row).items():
                columns[kind].append([scored[kind, variant, seed]["testing_top1_acc"] for seed in seeds])
            columns["k-NN"].append([probed[row.flags, seed]["knn_top1_acc"] for seed in seeds])
    spread = {
        kind: max(max(scores) - min(scores) for columns in found.values() for scores in columns[kind])
        for kind in ("finetuned", "linear", "k-NN")
    }
    for table, columns in found.items():
        cells = [
            [row.name, *("" if value is None else f"{value}" for value in (row.finetuned, row.linear))]
            + [show(scores[index]) for scores in columns.values()]
            + [show([probed[row.flags, seed]["testing_loss"] for seed in seeds_of(args, row)], ".4f")]
            for index, row in enumerate(TABLES[table])
        ]
        header = ["case", "paper: finetuned", "paper: linear", *columns, "held-out loss"]
        print_table(f"{table}: top-1 on the held-out images, in percent", header, cells)
        paper = {"finetuned": [r.finetuned for r in TABLES[table]], "linear": [r.linear for r in TABLES[table]]}
        for kind, values in paper.items():
            differs = compare_order(TABLES[table], values, columns[kind], spread[kind])
            if any(value is not None for value in values):
                print(f"{kind}, in another order than the paper's: {'; '.join(differs) or 'none'}", flush=True)
        if table in CURVES:
            draw(args, table, columns)
    seeds = f"seeds {args.seeds}, of the default row {args.default_seeds or args.seeds}"
    print(f"\n{seeds}; largest spread of a row: {', '.join(f'{kind} {spread[kind]:.2f}' for kind in spread)}")


if __name__ == "__main__":
    main(parse_args())
