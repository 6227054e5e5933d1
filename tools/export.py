"""Export a finetuned classifier or segmenter as a file that runs without this project: ONNX, or torch.export.

    python tools/export.py --checkpoint work_dir/MAE_Imagenet_Finetuning/best_checkpoint --to onnx --output model.onnx

It takes `images`, float32 (N, C, H, W), any number of them, of the size that the model was finetuned at, normalised to
(pixels / 255 - image_mean) / image_std, and gives `logits`, float32: (N, K) of a classifier, (N, K, H, W) of a
segmenter. Task, size, mean, std and class names travel in the file as JSON: each under its name in the metadata of an
ONNX file, together as metadata.json among the extra files of torch.export.
"""

import argparse
import importlib.util
import io
import json
import os
import shutil
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dataset import IMAGENET_MEAN, IMAGENET_STD
from model import ViTMAEForSegmentation, find_weights, load_classifier, load_segmenter, read_config
from storage.files import beside, publish, remove, user_path
from upernet import resize

SUFFIXES = {"onnx": ".onnx", "torch_export": ".pt2"}
ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")  # the last one runs the file, to check it
TRACED_IMAGES, CHECKED_IMAGES = 2, 3  # another number, so that a batch size that froze in the file is noticed
TOLERANCE = 1e-4  # largest difference from the model, as a share of the largest logit where that is above 1


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    about = "checkpoint folder of one of the finetuning scripts, hf:OWNER/NAME, or mae_finetuned_vit_*.pth"
    parser.add_argument("--checkpoint", required=True, help=about)
    parser.add_argument("--to", choices=SUFFIXES, required=True, help=f"onnx needs {', '.join(ONNX_PACKAGES)}")
    parser.add_argument("--output", type=user_path, required=True, help="file to write, .onnx or .pt2 by --to")
    parser.add_argument("--overwrite", action="store_true", help="allow --output to exist")
    return parser.parse_args(argv)


class PixelScores(nn.Module):
    """A segmenter without its auxiliary head, which only helps training, and with scores as large as the images."""

    def __init__(self, segmenter: ViTMAEForSegmentation):
        super().__init__()
        self.taps, self.backbone = segmenter.taps, segmenter.backbone
        self.neck, self.decode_head = segmenter.neck, segmenter.decode_head

    def forward(self, images: Tensor) -> Tensor:
        maps = self.backbone.get_intermediate_layers(images, self.taps)  #  4 x (N, D, h, w)
        logits = self.decode_head(self.neck(maps))  #                       (N, K, 4h, 4w)
        return resize(logits, size=images.shape[-2:])  #                    (N, K, H, W)


def open_model(checkpoint: str) -> tuple[nn.Module, dict]:
    """Load what is to be exported, in evaluation mode, and describe it; ValueError where nothing finetuned is in it."""
    record = read_config(find_weights(checkpoint)) or {}
    if record.get("architecture") == ViTMAEForSegmentation.__name__:
        segmenter, record = load_segmenter(checkpoint)
        model, config, task = PixelScores(segmenter), segmenter.backbone.config, "segmentation"
    else:
        model, record = load_classifier(checkpoint)
        config, task = model.config, "classification"
    metadata = {"task": task, "input_channels": config.input_channels, "image_hw": list(config.image_hw)}
    for name, default in (("image_mean", IMAGENET_MEAN), ("image_std", IMAGENET_STD)):
        # Without a record, what the scripts would take: ImageNet's for three channels, else 0.5 each.
        default = default if config.input_channels == len(default) else [0.5] * config.input_channels
        metadata[name] = list(record.get(name, default))
    metadata |= {name: record[name] for name in ("class_names", "ignore_zero", "value_range") if name in record}
    return model.eval(), metadata


def draw_images(count: int, metadata: dict) -> Tensor:
    generator = torch.Generator().manual_seed(count)
    return torch.randn(count, metadata["input_channels"], *metadata["image_hw"], generator=generator)


def trace(model: nn.Module, metadata: dict) -> torch.export.ExportedProgram:
    """Record the model as a graph that takes any number of images."""
    images, shapes = draw_images(TRACED_IMAGES, metadata), {"images": {0: torch.export.Dim("batch")}}
    # Strict, because the other tracer takes len(tensor) for a constant, and the batch size with it.
    program = torch.export.export(model, (images,), dynamic_shapes=shapes, strict=True)
    for node in program.graph.nodes:  # lines of code with the paths of this machine, which would go into the file
        node.meta.pop("stack_trace", None)
    return program


def write_torch_export(model: nn.Module, metadata: dict, file: Path, images: Tensor) -> Tensor:
    """Write a torch.export file, and give what the written program says of images; `write_onnx` likewise."""
    packed = io.BytesIO()  # not the file itself: on a full disk torch's writer ends the whole process
    torch.export.save(trace(model, metadata), packed, extra_files={"metadata.json": json.dumps(metadata)})
    file.write_bytes(packed.getbuffer())
    return torch.export.load(file).module()(images)


def write_onnx(model: nn.Module, metadata: dict, file: Path, images: Tensor) -> Tensor:
    """Write an ONNX file; weights of more than 2 GB, which the format cannot hold, go into FILE.data beside it."""
    import onnxruntime

    # ONNX has no fused attention, and torch cannot take its own apart when a batch is dynamic and biases are added.
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
    names = {"input_names": ["images"], "output_names": ["logits"], "dynamic_shapes": {"images": {0: "batch"}}}
    program = torch.onnx.export(trace(model, metadata), **names, dynamo=True, verbose=False)
    program.model.metadata_props.update({name: json.dumps(value) for name, value in metadata.items()})
    program.save(file)
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


WRITERS = {"onnx": write_onnx, "torch_export": write_torch_export}


def check_request(args: argparse.Namespace) -> None:
    """Refuse, before anything is loaded, a wrong suffix, what cannot be written over, and packages not there."""
    if args.output.suffix != SUFFIXES[args.to]:
        raise ValueError(f"--to {args.to} writes a {SUFFIXES[args.to]} file, not {args.output.name}")
    for file in (args.output, beside(args.output, "data")):
        if file.is_dir():
            raise IsADirectoryError(f"{file} is a folder; --output takes the name of a file")
        if os.path.lexists(file) and not args.overwrite:
            raise FileExistsError(f"{file} exists; choose another --output or add --overwrite")
    missing = [name for name in ONNX_PACKAGES if args.to == "onnx" and importlib.util.find_spec(name) is None]
    if missing:
        raise ModuleNotFoundError(f"--to onnx needs {', '.join(missing)}: pip install {' '.join(missing)}")


def put_in_place(written: Path, output: Path) -> None:
    """Move a file, with its weights if they are beside it, over older ones; never beside the weights of another."""
    if beside(written, "data").exists() or beside(output, "data").exists():
        output.unlink(missing_ok=True)
        beside(output, "data").unlink(missing_ok=True)
    for file in sorted(written.parent.iterdir(), reverse=True):  # FILE.data before FILE
        publish(file, output.with_name(file.name))


@torch.no_grad()
def main(args: argparse.Namespace) -> None:
    check_request(args)
    # Written and checked in a folder beside its place, so that what bears the final name is whole and right. Not by
    # written_whole: the ONNX file holds the name of the one with its weights, so both need their names from the start.
    folder = beside(args.output, "unfinished.tmp")
    remove(folder)  # of a run that was killed
    folder.mkdir(parents=True)
    try:
        model, metadata = open_model(args.checkpoint)
        images = draw_images(CHECKED_IMAGES, metadata)
        expected = model(images)
        largest = expected.abs().max().item()
        if not expected.isfinite().all():
            raise ValueError(f"the scores of {args.checkpoint} are not finite numbers, so there is nothing to export")
        needed, free = sum(tensor.nbytes for tensor in model.state_dict().values()), shutil.disk_usage(folder).free
        if free < needed:
            room = f"{free / 1e9:.2f} GB are free; choose another --output or make room"
            raise OSError(f"the weights take {needed / 1e9:.2f} GB in {folder.parent}, where {room}")
        written = folder / args.output.name
        difference = (WRITERS[args.to](model, metadata, written, images) - expected).abs().max().item()
        if not difference <= TOLERANCE * max(1.0, largest):  # false for NaN as well
            found = f"the exported program differs from the model by up to {difference:.1e}"
            raise ValueError(f"{found}; nothing is written")
        put_in_place(written, args.output)
    finally:
        remove(folder)
    print(f"{args.output}: {metadata['task']} of images (N, {', '.join(map(str, images.shape[1:]))})")
    print(f"  on {CHECKED_IMAGES} random images it differs from the model by up to {difference:.1e} of {largest:.1e}")


if __name__ == "__main__":
    try:
        main(parse_args())
    except (ValueError, OSError, ModuleNotFoundError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted; nothing is written")
