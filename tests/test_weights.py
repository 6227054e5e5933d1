"""Weight files: read without executing anything, and refused with what is wrong and what to do."""

import argparse
import dataclasses
import json
import os
import sys
import zipfile
from types import SimpleNamespace

import pytest
import torch
from conftest import TINY
from safetensors.torch import save_file

from model import (
    MAEConfig,
    VisionTransformer,
    ViTMAEForPreTraining,
    load_classifier,
    load_pretrained_encoder,
    load_pretrained_mae,
    read_sizes,
)
from storage.files import read_json
from storage.weights import SIZES, convert_command, find_weights, read_config, read_state_dict


def write_checkpoint(folder, model):
    folder.mkdir()
    save_file(model.state_dict(), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"config": model.config.as_record(decoder=True)}))


def test_sizes_that_config_json_may_have_are_the_fields_of_the_models_config():
    names = sorted(name for names in SIZES.values() for name in names.split())
    assert names == sorted(field.name for field in dataclasses.fields(MAEConfig))


def test_config_of_another_project_is_refused(tmp_path):
    write_checkpoint(tmp_path / "theirs", ViTMAEForPreTraining(TINY))
    (tmp_path / "theirs" / "config.json").write_text('{"hidden_size": 32}')
    with pytest.raises(ValueError, match=r"config\.json is not of this project: it has no sizes under 'config'"):
        load_pretrained_mae(tmp_path / "theirs")


class Hostile:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return (open, (self.target, "w"))


def test_file_that_wraps_itself_is_refused(tmp_path):
    content = {}
    content["model"] = content
    torch.save(content, tmp_path / "loop.pth")
    with pytest.raises(ValueError, match=r"loop\.pth is not weights by name: 'model' is a dict"):
        read_state_dict(tmp_path / "loop.pth")


def test_read_state_dict_runs_no_code(tmp_path):
    torch.save({"model": Hostile(str(tmp_path / "owned"))}, tmp_path / "hostile.pth")
    with pytest.raises(ValueError, match=r"hostile\.pth is not opened: it wants \S*open called"):
        read_state_dict(tmp_path / "hostile.pth")
    assert not (tmp_path / "owned").exists()


def test_read_state_dict_says_what_is_no_weights(tmp_path):
    torch.save([torch.zeros(1)], tmp_path / "list.pth")
    (tmp_path / "cut.safetensors").write_bytes(b"cut")
    save_file({"a": torch.zeros(100)}, tmp_path / "short.safetensors")
    (tmp_path / "short.safetensors").write_bytes((tmp_path / "short.safetensors").read_bytes()[:-50])
    with zipfile.ZipFile(tmp_path / "program.pth", "w") as archive:  # as TorchScript's are
        archive.writestr("program/constants.pkl", b"")
        archive.writestr("program/version", "3")
    for name, message in {
        "list.pth": r"list\.pth holds a list",
        "cut.safetensors": r"cut\.safetensors is damaged, .*: it begins as none does$",
        "short.safetensors": r"short\.safetensors is damaged, or no safetensors file: [^.\n]*$",
        "program.pth": "it is a program of TorchScript",  # of which torch itself would advise to execute it
    }.items():
        for loader in (read_state_dict, load_pretrained_mae, load_classifier):
            with pytest.raises(ValueError, match=message):
                loader(tmp_path / name)


@pytest.mark.parametrize("name", ["model.bin", "model_best.pth.tar", "model", "model.safetensors"])
def test_weight_files_are_detected_from_their_content(tmp_path, name):
    expected = VisionTransformer(TINY).state_dict()
    for write in (lambda path: save_file(expected, path), lambda path: torch.save({"model": expected}, path)):
        write(tmp_path / name)
        assert torch.equal(read_state_dict(tmp_path / name)["cls_token"], expected["cls_token"])


@pytest.mark.parametrize("module", ["pathlib", "pathlib._local"])
@pytest.mark.parametrize("name", ["PosixPath", "WindowsPath"])
def test_paths_among_the_arguments_of_a_training_are_let_in(tmp_path, monkeypatch, module, name):
    class Stand:
        def __init__(self, *parts):
            self.parts = parts

        def __reduce__(self):
            return type(self), self.parts

    Stand.__module__, Stand.__name__, Stand.__qualname__ = module, name, name
    expected = VisionTransformer(TINY).state_dict()
    with monkeypatch.context() as patch:  # as another system or Python would write it
        patch.setitem(sys.modules, module, SimpleNamespace(**{name: Stand}))
        torch.save({"model": expected, "args": argparse.Namespace(output=Stand("a", "b"))}, tmp_path / "a.pth")
    assert f"{module}\n{name}".encode() in zipfile.ZipFile(tmp_path / "a.pth").read("a/data.pkl")
    assert read_state_dict(tmp_path / "a.pth").keys() == expected.keys()


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"config": {"encoder_num_heads": "4"}}, r"encoder_num_heads in .*config\.json has to be a whole .*, not '4'$"),
        ({"config": {"encoder_num_heads": True}}, "a whole number above 0, not True"),
        ({"config": {"encoder_mlp_ratio": float("inf")}}, "encoder_mlp_ratio in .* a number of at least 0, not inf"),
        ({"config": {"encoder_mlp_ratio": -1}}, "a number of at least 0, not -1"),
        ({"config": {"img_size": [16, 16, 16]}}, "img_size in .* one or two whole numbers"),
        ({"config": {"norm_pix_loss": 1}}, "norm_pix_loss in .* true or false, not 1"),
        ({"config": {"hidden_size": 32}}, r"hidden_size in .*config\.json is no size of a model here"),
        ({"label_values": {"red": "a"}}, "label_values in .* null, or names by label value or colour"),
        ({"class_names": 3}, "class_names in .* a list of texts, not 3"),
        ({"class_names": [1, 2]}, "class_names in .* a list of texts"),
        ({"image_mean": 0.5}, "image_mean in .* a list of numbers"),
        ({"image_std": ["a"] * 3}, "image_std in .* a list of numbers"),
        ({"taps": [-1, 2, 3, 4]}, "taps in .* a list of whole numbers"),
        ({"norm": 3}, "norm in .* a text"),
        ({"channels": 0}, "channels in .* a whole number above 0, or null"),
    ],
)
def test_entries_of_our_config_that_make_no_sense_are_named(tmp_path, entries, message):
    write_checkpoint(tmp_path / "a", ViTMAEForPreTraining(TINY))
    record = {"config": dataclasses.asdict(TINY) | entries.pop("config", {}), **entries}
    (tmp_path / "a" / "config.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match=message):
        read_sizes(tmp_path / "a")


@pytest.mark.parametrize(
    ("text", "message"), [("[1]", "holds a list"), ("{", "is no JSON"), ("[" * 99999, "is no JSON")]
)
def test_config_that_is_no_table_is_named(tmp_path, text, message):
    write_checkpoint(tmp_path / "a", ViTMAEForPreTraining(TINY))
    (tmp_path / "a" / "config.json").write_text(text)
    with pytest.raises(ValueError, match=rf"config\.json {message}"):
        read_sizes(tmp_path / "a")


def test_read_state_dict_unwraps_what_trainings_wrap(tmp_path):
    expected = VisionTransformer(TINY).state_dict()
    for prefix in ("", "module.", "_orig_mod.", "model.", "module._orig_mod."):
        tensors = {prefix + key: value for key, value in expected.items()}
        for content in (tensors, {"state_dict": tensors}, {"model": {"module": tensors}}):
            torch.save({"model": None} | content if "state_dict" in content else content, tmp_path / "a.pth")
            found = read_state_dict(tmp_path / "a.pth")
            assert found.keys() == expected.keys() and torch.equal(found["cls_token"], expected["cls_token"])


def test_the_command_that_converts_is_for_a_shell(tmp_path):
    for name, source in (("a b", "'a b' 'a b_ours'"), ("hf/", "hf hf_ours")):
        assert convert_command(name).endswith(f"convert_weights.py {source} --to ours")
    torch.save(ViTMAEForPreTraining(TINY).state_dict(), tmp_path / "narrow.pth")
    with pytest.raises(ValueError, match=r"narrow\.pth_ours --to ours --encoder_num_heads N$"):
        load_pretrained_mae(tmp_path / "narrow.pth")


@pytest.mark.parametrize(
    ("extra", "flags"),
    [
        ("vit.pooler.dense.weight", " --drop --encoder_num_heads N"),
        ("embed2image.weight", " --drop --encoder_num_heads N"),
        ("vit.relative_position_bias_table", ""),
    ],
)
def test_the_command_has_the_flags_that_the_keys_show(tmp_path, extra, flags):
    torch.save({"vit.cls_token": torch.zeros(1, 1, 36), extra: torch.zeros(1)}, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=rf"--to ours{flags}$"):
        load_pretrained_mae(tmp_path / "a.pth")


@pytest.mark.parametrize("key", ["blocks.0.ls1.gamma", "blocks.0.gamma_2", "blocks.0.attn.q_bias", "fpn1.0.weight"])
def test_blocks_of_beits_kind_are_refused_with_the_command(tmp_path, key):
    torch.save(VisionTransformer(TINY).state_dict() | {key: torch.ones(32)}, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=rf"such as \['{key}'\]; convert it once with: .* --to ours --enc"):
        load_pretrained_encoder(VisionTransformer(TINY), tmp_path / "a.pth")


def test_a_file_beside_a_foreign_config_is_what_the_command_converts(tmp_path):
    for name, source in (("mae.pth", tmp_path / "mae.pth"), ("model.safetensors", tmp_path)):
        save_file(ViTMAEForPreTraining(TINY).state_dict(), tmp_path / name)
        (tmp_path / "config.json").write_text('{"hidden_size": 32}')
        with pytest.raises(ValueError, match=rf"convert_weights\.py {source} {source}_ours --to ours$"):
            load_pretrained_mae(tmp_path / name)


@pytest.mark.parametrize("size", [{"encoder_depth": 10**7}, {"img_size": 10**7}, {"input_channels": 10**9}])
def test_sizes_that_a_file_cannot_hold_are_refused_before_anything_is_built(tmp_path, size):
    save_file({"cls_token": torch.zeros(1, 1, 32)}, tmp_path / "model.safetensors")
    config = {
        "img_size": 16,
        "patch_size": 4,
        "encoder_embed_dim": 32,
        "encoder_depth": 3,
        "encoder_num_heads": 4,
    } | size
    (tmp_path / "config.json").write_text(json.dumps({"config": config}))
    name = next(iter(size))
    with pytest.raises(ValueError, match=rf"{name} {size[name]} in the config\.json .* bytes hold"):
        read_config(tmp_path / "model.safetensors")


def test_archive_that_grows_when_it_is_read_is_refused_unread(tmp_path):
    path = tmp_path / "bomb.pth"
    torch.save({"head.weight": torch.zeros(5_000_000)}, tmp_path / "plain.pth")
    with zipfile.ZipFile(tmp_path / "plain.pth") as plain, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as bomb:
        for name in plain.namelist():
            bomb.writestr(name, plain.read(name))
    assert path.stat().st_size < 100_000
    with pytest.raises(ValueError, match=r"bomb\.pth is not opened: its .* bytes would grow to 20,"):
        read_state_dict(path)


def test_tensor_that_repeats_a_part_of_itself_is_refused_where_it_is_large(tmp_path):
    torch.save({"pos_embed": torch.zeros(1, 1, 8).expand(1, 10**8, 8)}, tmp_path / "large.pth")
    with pytest.raises(ValueError, match=r"large\.pth holds 32 of the 3,200,000,000 bytes of pos_embed"):
        read_state_dict(tmp_path / "large.pth")
    torch.save({"pos_embed": torch.zeros(1, 1, 8).expand(1, 10, 8)}, tmp_path / "small.pth")
    assert read_state_dict(tmp_path / "small.pth")["pos_embed"].shape == (1, 10, 8)


@pytest.mark.parametrize("name", ["model.safetensors", "weights.pth", "config.json"])
def test_pipe_in_the_place_of_a_file_is_refused_and_not_waited_for(tmp_path, name):
    save_file({"cls_token": torch.zeros(1, 1, 32)}, tmp_path / "real.safetensors")
    os.mkfifo(tmp_path / name)
    with pytest.raises(OSError, match="is no regular file"):
        read_json(tmp_path / name) if name == "config.json" else read_state_dict(tmp_path / name)


def test_folder_of_an_experiment_is_its_best_checkpoint_or_its_last(tmp_path):
    for name in ("checkpoint_1", "checkpoint_2"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").touch()
    with pytest.raises(FileNotFoundError, match="give a checkpoint folder such as checkpoint_800"):
        find_weights(tmp_path)
    (tmp_path / "last_checkpoint").symlink_to("checkpoint_2")
    assert find_weights(tmp_path) == tmp_path / "last_checkpoint" / "model.safetensors"
    (tmp_path / "best_checkpoint").mkdir()
    (tmp_path / "best_checkpoint" / "model.safetensors").touch()
    assert find_weights(tmp_path) == tmp_path / "best_checkpoint" / "model.safetensors"
