"""What is published: opened by transformers and timm to the same answers, uploaded, and fetched again by hf:OWNER/NAME.

The Hub is a server on this machine that knows as much of its interface as one upload and one download take.
"""

import base64
import dataclasses
import http.server
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import huggingface_hub
import pytest
import timm
import torch
import transformers
from conftest import ROOT, TINY, load_tool
from safetensors.torch import save_file

import finetune_classifier
import pretrain_mae
from model import (
    MODEL_CONFIGS,
    VisionTransformer,
    ViTMAEForImageClassification,
    ViTMAEForPreTraining,
    ViTMAEForSegmentation,
    load_classifier,
    load_pretrained_encoder,
    load_pretrained_mae,
    load_segmenter,
)
from storage import snapshots
from storage.files import read_json
from storage.snapshots import fetch_model, pin_model
from storage.weights import find_weights, read_weights

COMMIT = "0123456789abcdef0123456789abcdef01234567"
HALF = (0.5,) * 3
SEGMENTER = dict(taps=[0, 1, 2, 2], channels=64, norm="group", rel_pos_bias=False)


def build_model(kind: str) -> tuple[torch.nn.Module, dict]:
    torch.manual_seed(0)
    if kind == "masked autoencoder":
        model, record = ViTMAEForPreTraining(TINY), {}
    elif kind == "segmenter":
        config = dataclasses.replace(TINY, encoder_embed_dim=64)
        model = ViTMAEForSegmentation(config, 3, **SEGMENTER)
        record = SEGMENTER | dict(num_classes=3, class_names=["a", "b", "c"], ignore_zero=False, resize_to=[64, 16])
        record["config"] = config.as_record(decoder=False)
    else:
        pool = "avg" if kind == "classifier of the mean" else "cls"
        model = ViTMAEForImageClassification(TINY, 3, pool)
        record = dict(num_classes=3, global_pool=pool, class_names=["cat", "dog", "<b>`|"])
    for name, value in model.named_parameters():  # so that no tensor could be left out unseen
        if "pos_embed" not in name:
            torch.nn.init.normal_(value, std=0.1)
    return model.eval(), {"architecture": type(model).__name__, "config": dataclasses.asdict(TINY)} | record


@pytest.fixture
def publish(tmp_path, monkeypatch):
    """Write a tiny checkpoint of a kind in the folder of a run, publish it, and give the model and the folder."""
    monkeypatch.chdir(tmp_path)

    def publish(kind: str, *flags: str) -> tuple[torch.nn.Module, Path]:
        model, record = build_model(kind)
        folder = tmp_path / "run" / "checkpoint_2"
        folder.mkdir(parents=True)
        save_file(model.state_dict(), folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps({"image_mean": HALF, "image_std": HALF, **record}))
        rows = [{"step": i, "epoch": i / 2, "training_loss": 2 / i, "testing_loss": 3 / i} for i in (1, 2, 3, 4)]
        (folder.parent / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        args = vars(pretrain_mae.parse_args(["--path_to_data", "/secret/place/photographs", "--epochs", "7"]))
        made_with = {"commit": "abc1234", "script": "/secret/pretrain_mae.py", "torch": "2.14.1"}
        (folder.parent / "args.json").write_text(json.dumps(args | {"environment": made_with}))
        tool = load_tool("publish")
        tool.main(tool.parse_args([str(folder), "--repo", "someone/tiny", *flags]))
        return model, tmp_path / "tiny"

    return publish


IMAGES = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_autoencoder_equals_transformers_and_timm(publish):
    model, folder = publish("masked autoencoder")
    noise = torch.rand(3, 16, generator=torch.Generator().manual_seed(2))
    expected = model(IMAGES, noise=noise)
    theirs = transformers.ViTMAEForPreTraining.from_pretrained(folder).eval()
    found = theirs(IMAGES, noise=noise)
    torch.testing.assert_close(found.logits, expected.pred, rtol=0, atol=1e-5)
    torch.testing.assert_close(found.loss, expected.loss, rtol=0, atol=1e-5)
    vit = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    torch.testing.assert_close(vit.forward_features(IMAGES), model.forward_features(IMAGES), rtol=0, atol=1e-5)
    assert (load_pretrained_mae(folder)(IMAGES, noise=noise).pred == expected.pred).all()
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    assert list(processor.image_mean) == list(HALF) and vit.pretrained_cfg["mean"] == list(HALF)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["classifier of the mean", "classifier of the cls token"])
def test_classifier_equals_transformers_and_timm(publish, kind):
    model, folder = publish(kind)
    expected = model(IMAGES)
    theirs = transformers.AutoModelForImageClassification.from_pretrained(folder).eval()
    torch.testing.assert_close(theirs(IMAGES).logits, expected, rtol=0, atol=1e-5)
    assert theirs.config.id2label[2] == "<b>`|"
    vit = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    torch.testing.assert_close(vit(IMAGES), expected, rtol=0, atol=1e-5)
    ours, record = load_classifier(folder)
    assert (ours.eval()(IMAGES) == expected).all() and record["global_pool"] == model.global_pool


@torch.no_grad()
def test_encoder_of_the_original_layout_equals_transformers_and_timm(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = dataclasses.replace(MODEL_CONFIGS["mae_vit_tiny_patch16"], img_size=32, encoder_depth=2)
    encoder, images = VisionTransformer(config).eval(), torch.randn(2, 3, 32, 32)
    torch.save({"model": encoder.state_dict()}, "mae_pretrain.pth")
    tool = load_tool("publish")
    tool.main(tool.parse_args(["mae_pretrain.pth", "--repo", "someone/tiny"]))
    expected = encoder(images)
    theirs = transformers.AutoModel.from_pretrained("tiny", add_pooling_layer=False).eval()
    torch.testing.assert_close(theirs(images).last_hidden_state, expected, rtol=0, atol=1e-5)
    vit = timm.create_model("local-dir:tiny", pretrained=True).eval()
    torch.testing.assert_close(vit.forward_features(images), expected, rtol=0, atol=1e-5)


def test_rectangles_are_not_for_transformers_and_that_is_said(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    config = dataclasses.replace(TINY, img_size=(8, 16))
    (tmp_path / "wide").mkdir()
    save_file(ViTMAEForPreTraining(config).state_dict(), tmp_path / "wide" / "model.safetensors")
    (tmp_path / "wide" / "config.json").write_text(json.dumps({"config": dataclasses.asdict(config)}))
    tool = load_tool("publish")
    tool.main(tool.parse_args(["wide", "--repo", "someone/tiny"]))
    assert "transformers' ViTMAE takes square images only, not 8 x 16" in capsys.readouterr().out
    assert timm.create_model("local-dir:tiny", pretrained=True).patch_embed.grid_size == (2, 4)
    assert not (tmp_path / "tiny" / "transformers.safetensors").exists()


def test_segmenter_is_for_this_project_alone_and_says_so(publish, capsys):
    model, folder = publish("segmenter")
    assert "for this project alone (timm and transformers have no such segmenter)" in capsys.readouterr().out
    assert "have no such segmenter" in (folder / "README.md").read_text() and not list(folder.glob("transformers*"))
    ours, record = load_segmenter(folder)
    assert record["class_names"] == ["a", "b", "c"]
    assert (ours.eval()(IMAGES).logits == model(IMAGES).logits).all()


def test_card_is_made_of_the_runs_records_and_names_no_place(publish, tmp_path):
    _, folder = publish("masked autoencoder")
    card = (folder / "README.md").read_text()
    assert card.startswith("---\n# license: fill in") and "**To be filled in**" in card
    assert "`commit abc1234, torch 2.14.1`" in card
    assert "`photographs`" in card and "![curves of the training](curve.png)" in card
    assert "| `testing_loss` | 0.75 |" in card and (folder / "curve.png").stat().st_size > 1000
    texts = [file.read_text() for file in folder.iterdir() if file.suffix in (".json", ".md")]
    assert not any("/secret" in text or str(tmp_path) in text for text in texts)
    again = pretrain_mae.parse_args(["--config", str(folder / "recipe.json"), "--path_to_data", "elsewhere"])
    assert again.epochs == 7 and "accelerate launch pretrain_mae.py --config recipe.json" in card
    tool = load_tool("convert_weights")  # which takes what is published for this project's
    tool.main(tool.parse_args([str(folder), str(tmp_path / "back"), "--to", "ours"]))
    assert read_json(tmp_path / "back" / "config.json")["config"] == TINY.as_record(decoder=True)


@pytest.mark.parametrize(
    "data, named",
    [
        ("hf:/secret/place/folder", "folder"),
        ("https://user:secret@host/secret/pack?signature=secret", "pack"),
        ("https://user:secret@host", "host"),
        ("hf:owner/name:config@v1", "hf:owner/name:config@v1"),
    ],
)
def test_card_and_recipe_hold_no_place_or_key(publish, tmp_path, data, named):
    _, folder = publish("masked autoencoder")
    flags = dict(path_to_data=data, class_weights=["/secret/weights.txt"], label_values="../secret.txt", mean=[0.5])
    (tmp_path / "run" / "args.json").write_text(json.dumps(flags | {"environment": "not recorded"}))
    tool = load_tool("publish")
    tool.main(tool.parse_args([str(tmp_path / "run" / "checkpoint_2"), "--repo", "someone/tiny", "--overwrite"]))
    card = (folder / "README.md").read_text()
    assert f"`{named}`" in card and "secret" not in card
    assert read_json(folder / "recipe.json") == {"mean": [0.5]}


def card_of(folder: Path, evaluation: dict) -> str:
    """Publish again with an evaluation beside the weights, and give the card."""
    checkpoint, told = folder.parent / "run" / "checkpoint_2", {"data": "/secret/place/val", "num_images": 8}
    told |= {"weights": str(checkpoint / "model.safetensors")} | evaluation
    (checkpoint / "evaluation.json").write_text(json.dumps({k: told[k] for k in (*evaluation, *told)}))
    tool = load_tool("publish")
    tool.main(tool.parse_args([str(checkpoint), "--repo", "someone/tiny", "--overwrite"]))
    return (folder / "README.md").read_text()


def test_scores_of_images_that_chose_the_weights_are_called_too_high(publish, tmp_path):
    _, folder = publish("classifier of the mean")
    card = card_of(folder, {"testing_top1_acc": 81.25, "chose_best_checkpoint": True})
    assert "On 8 images of `val`, by" in card
    assert "| `testing_top1_acc` | 81.25 |\n| `num_images` | 8 |\n\nImages of `testing_...` chose the weights" in card
    assert "finetune_classifier.py --eval_only --path_to_data DATA" in card and "/secret" not in card


def test_card_says_on_which_images_and_how_scores_were_measured(publish):
    """Or the scores of ImageNet-A would be read as those of the held-out images."""
    _, folder = publish("classifier of the mean")
    tested = {"test_top1_acc": 50.5, "test_data": "/secret/place/test"}
    card = card_of(folder, {"testing_top1_acc": 7.5, "data": "/secret/imagenet-a", "class_subset": True} | tested)
    assert "On 8 images of `imagenet-a`, `test_...` on those of `test`, by" in card and "/secret" not in card
    assert "finetune_classifier.py --eval_only --class_subset --path_to_data DATA" in card
    card = card_of(folder, {"testing_miou": 7.5, "slide": False, "multi_scale": True, "flip": False})
    assert "--eval_only --no-slide --multi_scale --path_to_data DATA" in card
    card = card_of(folder, {"testing_top1_acc": 7.5, "weights": "/secret/place/epoch_3.safetensors"})
    assert "7.5" not in card  # of another file of that folder; those of the log stay
    assert "On held-out images" in card and "| `testing_loss` | 0.75 |" in card
    config = folder.parent / "run" / "checkpoint_2" / "config.json"
    config.write_text(json.dumps(read_json(config) | {"testing": {"loss": 0.25}}))  # as the best weights have it
    card = card_of(folder, {"testing_top1_acc": 7.5, "weights": "/secret/place/epoch_3.safetensors"})
    assert "| `testing_loss` | 0.25 |" in card and "chose the weights" in card and "0.75" not in card


def test_card_of_a_held_out_share_says_how_it_is_held_out(publish, tmp_path):
    _, folder = publish("classifier of the mean")
    args = tmp_path / "run" / "args.json"
    args.write_text(json.dumps(read_json(args) | {"val_fraction": 0.25, "seed": 3}))
    card = card_of(folder, {"testing_top1_acc": 7.5, "data": "/secret/place/photographs"})
    assert "On 8 held-out images of `photographs`, by" in card
    assert "--eval_only --val_fraction 0.25 --seed 3 --path_to_data DATA" in card
    card = card_of(folder, {"testing_top1_acc": 7.5, "data": "/secret/place/others"})
    assert "On 8 images of `others`, by" in card and "--val_fraction" not in card.partition("## Scores")[2]


def test_folder_is_not_overwritten_and_others_are_left_alone(publish, tmp_path, capsys):
    _, folder = publish("masked autoencoder", "--license", "mit")
    card = folder / "README.md"
    assert card.read_text().startswith("---\nlicense: mit\n") and "**To be filled in**" not in card.read_text()
    tool, source = load_tool("publish"), str(tmp_path / "run" / "checkpoint_2")
    (tmp_path / "mine").mkdir()
    for flags, message in (
        ([], "add --push to upload it as it is"),
        (["--output", "mine", "--overwrite"], "stays as it"),
    ):
        with pytest.raises(SystemExit):
            tool.parse_args([source, "--repo", "someone/tiny", *flags])
        assert message in capsys.readouterr().err
    for repo, seed, message in (
        ("someone/tiny2", 0, r"tiny has a README.md that does not name someone/tiny2"),
        ("someone/tiny", 1, r"tiny has other weights than .*checkpoint_2; choose another --output"),
    ):
        torch.manual_seed(seed)
        if seed:
            save_file(ViTMAEForPreTraining(TINY).state_dict(), Path(source) / "model.safetensors")
        with pytest.raises(ValueError, match=message):
            tool.main(tool.parse_args([source, "--repo", repo, "--output", "tiny", "--push"]))
    card.write_text("changed")
    tool.main(tool.parse_args([source, "--repo", "someone/tiny", "--overwrite"]))
    assert card.read_text() != "changed"


# ------------------------------------------------------------------------------------------------ the Hub


class Hub(http.server.BaseHTTPRequestHandler):
    """A repository that holds what was uploaded; every request's path and token are kept."""

    files: dict[str, bytes]
    seen: list[tuple[str, str | None]]

    def answer(self, body: object = b"", code: int = 200, **headers: str) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(code)
        for name, value in {"Content-Length": str(len(content)), "X-Repo-Commit": COMMIT, **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def do_POST(self):
        self.seen.append((self.path, self.headers["Authorization"]))
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path == "/api/repos/create":
            self.answer({"url": f"http://{self.headers['Host']}/someone/tiny", "id": "someone/tiny"})
        elif self.path == "/api/validate-yaml":
            self.answer({"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            names = [file["path"] for file in json.loads(body)["files"]]
            self.answer({"files": [{"path": n, "uploadMode": "regular", "shouldIgnore": False} for n in names]})
        else:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            self.answer({"commitOid": COMMIT, "commitUrl": "https://huggingface.co/someone/tiny/commit/1"})

    def do_GET(self):
        self.seen.append((self.path, self.headers["Authorization"]))
        name = self.path.rpartition("/")[2]
        if "someone/tiny" not in self.path:
            self.answer({"error": "none"}, 401, X_Error_Code="RepoNotFound")
        elif "/revision/" in self.path and "/revision/main" not in self.path:
            self.answer({"error": "none"}, 404, X_Error_Code="RevisionNotFound")
        elif "/revision/" in self.path:
            self.answer({"id": "someone/tiny", "sha": COMMIT, "siblings": []})
        elif "/tree/" in self.path:
            entries = [
                {"type": "file", "path": n, "size": len(c), "oid": n.encode().hex()} for n, c in self.files.items()
            ]
            self.answer(entries)
        elif name not in self.files:
            self.answer({"error": "none"}, 404, X_Error_Code="EntryNotFound")
        else:
            self.answer(self.files[name], ETag=f'"{name.encode().hex()}"')

    do_HEAD = do_GET  # noqa: N815

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A Hub on this machine, with a cache of its own; gives the handler, with `address`."""
    handler = type("Handler", (Hub,), {"files": {}, "seen": []})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    handler.address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", handler.address)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "home" / "hub"))
    yield handler
    server.shutdown()


def fetch(hub, path: str, **environment: str) -> subprocess.CompletedProcess:
    """Ask for a model in a process of its own, as huggingface_hub reads where the Hub is when it is imported."""
    code = "from storage import explained_errors\nfrom storage.snapshots import fetch_model\n"
    code += f"with explained_errors(): print(fetch_model({path!r}))"
    home = huggingface_hub.constants.HF_HUB_CACHE.removesuffix("/hub")
    told = {"HF_ENDPOINT": hub.address, "HF_HOME": home, "HF_HUB_DISABLE_XET": "1", **environment}
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env={**os.environ, **told}, capture_output=True, text=True, check=False
    )


def test_published_model_comes_back_from_the_hub(publish, hub, monkeypatch, capsys, tmp_path, image_folder):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    model, folder = publish("masked autoencoder", "--push")
    assert hub.files.keys() == {file.name for file in folder.iterdir()}
    assert hub.files["model.safetensors"] == (folder / "model.safetensors").read_bytes()
    tokens = {path: token for path, token in hub.seen if path.startswith(("/api/repos", "/api/models"))}
    assert len(tokens) >= 3 and set(tokens.values()) == {"Bearer hf_secret"}
    printed = capsys.readouterr()
    assert "uploaded" in printed.out
    held = [file.read_bytes() for file in folder.iterdir()] + [(printed.out + printed.err).encode()]
    assert not any(b"hf_secret" in content for content in held)

    hub.files["pytorch_model.bin"] = b"pickled"
    fetched = Path(fetch(hub, "hf:someone/tiny").stdout.strip())
    assert sorted(file.name for file in fetched.iterdir()) == [
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
    ]
    # From here on without a network: what is in the cache is taken, by timm too
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    fetch_model.cache_clear()
    assert pin_model("hf:someone/tiny") == f"hf:someone/tiny@{COMMIT}"
    assert (load_pretrained_mae("hf:someone/tiny").cls_token == model.cls_token).all()
    vit = timm.create_model("hf-hub:someone/tiny", pretrained=True)
    assert (vit.cls_token == model.cls_token).all()
    flags = ["--path_to_data", str(image_folder), "--path_to_pretrained_mae_weights", "hf:someone/tiny"]
    args = finetune_classifier.parse_args([*flags, "--knn", "--num_workers", "0", "--working_directory", str(tmp_path)])
    assert args.path_to_pretrained_mae_weights == f"hf:someone/tiny@{COMMIT}" and args.encoder_embed_dim == 32
    assert "knn_top1_acc" in finetune_classifier.main(args)
    with pytest.raises(PermissionError, match="hf download someone/tiny --local-dir FOLDER"):
        finetune_classifier.main(finetune_classifier.parse_args([*flags, "--eval_only"]))


def test_what_the_hub_does_not_give_is_said_in_a_sentence(publish, hub):
    publish("masked autoencoder", "--push")
    hub.files.pop("model.safetensors")
    cases = {
        "hf:someone/tiny": r"hf:someone/tiny has no model\.safetensors, and files of other kinds are not fetched",
        "hf:someone/tiny@v9": r"hf:someone/tiny@v9: someone/tiny has no such revision",
        "hf:someone/other": r"there is no model hf:someone/other that one may see; if it is private, log in",
        "hf:some--one/tiny": r"hf:some--one/tiny is no model of the Hub: Cannot have -- or",
        "hf:nonsense": r"hf:nonsense is no model of the Hub; give hf:OWNER/NAME",
    }
    for path, message in cases.items():
        done = fetch(hub, path)
        assert done.returncode == 2 and re.search(message, done.stderr) and "Traceback" not in done.stderr, done.stderr
    offline = fetch(hub, "hf:someone/absent", HF_HUB_OFFLINE="1")
    assert offline.returncode == 2 and "cannot be reached; fetch it once" in offline.stderr


def test_upload_that_fails_is_said_in_a_sentence(publish, hub, monkeypatch):
    def refuse(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.answer({"error": "Invalid credentials"}, 401)

    monkeypatch.setattr(hub, "do_POST", refuse)
    with pytest.raises(ConnectionError, match=r"tiny was not uploaded: .*401.*log in by `hf auth login`"):
        publish("masked autoencoder", "--push")


def test_published_segmenter_is_refused_as_an_encoder_with_a_command_that_writes_here(publish, tmp_path, monkeypatch):
    _, folder = publish("segmenter")
    snapshot = tmp_path / "models--someone--tiny" / "snapshots" / COMMIT
    shutil.copytree(folder, snapshot)
    monkeypatch.setattr(snapshots, "fetch_model", lambda path: snapshot)
    monkeypatch.setattr("storage.weights.fetch_model", lambda path: snapshot)
    config = dataclasses.replace(TINY, encoder_embed_dim=64)
    with pytest.raises(ValueError, match=f"take it out with: .* hf:someone/tiny@{COMMIT} tiny_encoder.pth --to orig"):
        load_pretrained_encoder(VisionTransformer(config), "hf:someone/tiny")


def test_another_projects_weights_are_refused_with_the_command_that_converts_them(tmp_path, monkeypatch):
    snapshot = tmp_path / "models--facebook--vit-mae" / "snapshots" / COMMIT
    transformers.ViTMAEForPreTraining(
        transformers.ViTMAEConfig(
            hidden_size=32, num_attention_heads=4, num_hidden_layers=1, decoder_num_hidden_layers=1, image_size=32
        )
    ).save_pretrained(snapshot)
    monkeypatch.setattr(snapshots, "fetch_model", lambda path: snapshot)
    monkeypatch.setattr("storage.weights.fetch_model", lambda path: snapshot)
    command = f"tools/convert_weights.py hf:facebook/vit-mae@{COMMIT} vit-mae_ours --to ours"
    with pytest.raises(ValueError, match=command):
        read_weights("hf:facebook/vit-mae")
    with pytest.raises(ValueError, match=command):
        pretrain_mae.read_sizes("hf:facebook/vit-mae")
    assert find_weights("hf:facebook/vit-mae") == snapshot / "model.safetensors"
    monkeypatch.chdir(tmp_path)
    tool = load_tool("convert_weights")
    tool.main(tool.parse_args(["hf:facebook/vit-mae", "vit-mae_ours", "--to", "ours"]))
    assert load_pretrained_mae("vit-mae_ours").config.encoder_embed_dim == 32
    shutil.rmtree(snapshot)
