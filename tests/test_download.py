"""Downloads from a server in this process: whole, cut, resumed, wrong, hostile, and laid out as the scripts read."""

import hashlib
import http.server
import io
import json
import re
import shutil
import tarfile
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import load_tool
from PIL import Image
from torchvision.datasets import Imagenette, OxfordIIITPet

from dataset import IGNORE_INDEX, check_pairs, find_splits, label_table, list_images, list_pairs, read_label_map

CONTENT = np.random.default_rng(0).bytes(300_000)


class Handler(http.server.BaseHTTPRequestHandler):
    """Serve `server.files`, with ranges unless `ignores_ranges`; the first `cuts` answers break off half-way."""

    def do_HEAD(self):
        self.answer(http.HTTPStatus.OK, len(self.server.files[self.path]))

    def do_GET(self):
        asked = self.headers["Range"]
        self.server.ranges.append(asked)
        content = self.server.files[self.path]
        if asked and not self.server.ignores_ranges:
            start = int(re.fullmatch(r"bytes=(\d+)-", asked)[1])
            self.answer(http.HTTPStatus.PARTIAL_CONTENT, len(content) - start, (start, len(content)))
            content = content[start:]
        else:
            self.answer(http.HTTPStatus.OK, len(content))
        if self.server.cuts:
            self.server.cuts -= 1
            content = content[: len(content) // 2]
            self.close_connection = True
        self.wfile.write(content)

    def answer(self, status: int, length: int, span: tuple[int, int] | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(length))
        if span:
            self.send_header("Content-Range", f"bytes {span[0]}-{span[1] - 1}/{span[1]}")
        self.end_headers()

    def log_message(self, *_):
        """Keep the test's output clean."""


@pytest.fixture
def server() -> Iterator[http.server.ThreadingHTTPServer]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.files, server.ranges, server.cuts, server.ignores_ranges = {}, [], 0, False
    server.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def tool(monkeypatch):
    tool = load_tool("download")
    monkeypatch.setattr(tool, "RETRY_WAIT_S", 0)
    return tool


def checksum(content: bytes, digits: int | None = None) -> str:
    return f"md5:{hashlib.md5(content).hexdigest()[:digits]}"


def serve(server, tool, name: str, files: dict[str, bytes], checksums: dict[str, str] | None = None) -> None:
    """Let a name of the tool mean these files on the server, at their right checksums where no other is given."""
    key = next(key for key in tool.DOWNLOADS if key[0] == name)
    server.files |= {f"/{file}": content for file, content in files.items()}
    checksums = checksums or {file: checksum(content) for file, content in files.items()}
    sources = tuple(tool.Source(f"{server.url}/{file}", checksums[file]) for file in files)
    tool.DOWNLOADS[key] = tool.DOWNLOADS[key]._replace(sources=sources)


def run(tool, name: str, output: Path, *more: str) -> None:
    tool.main(tool.parse_args([name, "--output", str(output), *more]))


def names_in(folder: Path) -> set[str]:
    return {entry.name for entry in folder.iterdir()}


WEIGHTS = "mae_pretrain_vit_base.pth"

# -------------------------------------------------------------------------------- one file


def test_file_is_downloaded_once(server, tool, tmp_path, capsys):
    serve(server, tool, "mae_base", {WEIGHTS: CONTENT}, {WEIGHTS: checksum(CONTENT, 6)})
    run(tool, "mae_base", tmp_path / "new")
    assert (tmp_path / "new" / WEIGHTS).read_bytes() == CONTENT
    assert "the 6 digits that are published" in capsys.readouterr().out
    run(tool, "mae_base", tmp_path / "new")
    assert f"{WEIGHTS} is there: verified by" in capsys.readouterr().out
    assert server.ranges == [None] and names_in(tmp_path / "new") == {WEIGHTS}


def test_cut_connection_is_taken_up_where_it_broke(server, tool, tmp_path):
    serve(server, tool, "mae_base", {WEIGHTS: CONTENT})
    server.cuts = 2
    run(tool, "mae_base", tmp_path)
    assert server.ranges == [None, "bytes=150000-", "bytes=225000-"]
    assert (tmp_path / WEIGHTS).read_bytes() == CONTENT and names_in(tmp_path) == {WEIGHTS}


def test_later_run_asks_for_the_rest_only(server, tool, tmp_path):
    serve(server, tool, "mae_base", {WEIGHTS: CONTENT})
    (tmp_path / f"{WEIGHTS}.part").write_bytes(CONTENT[:123_456])
    run(tool, "mae_base", tmp_path)
    assert server.ranges == ["bytes=123456-"]
    assert (tmp_path / WEIGHTS).read_bytes() == CONTENT and names_in(tmp_path) == {WEIGHTS}


def test_server_without_ranges_is_asked_from_the_start(server, tool, tmp_path):
    serve(server, tool, "mae_base", {WEIGHTS: CONTENT})
    server.ignores_ranges = True
    (tmp_path / f"{WEIGHTS}.part").write_bytes(b"x" * 100_000)
    run(tool, "mae_base", tmp_path)
    assert (tmp_path / WEIGHTS).read_bytes() == CONTENT and names_in(tmp_path) == {WEIGHTS}


def test_part_longer_than_the_file_is_begun_anew(server, tool, tmp_path):
    serve(server, tool, "mae_base", {WEIGHTS: CONTENT})
    (tmp_path / f"{WEIGHTS}.part").write_bytes(CONTENT + b"more")
    run(tool, "mae_base", tmp_path)
    assert server.ranges == [None] and (tmp_path / WEIGHTS).read_bytes() == CONTENT


def test_connection_that_gives_nothing_more_is_an_error_that_keeps_what_came(server, tool, tmp_path):
    serve(server, tool, "mae_base", {WEIGHTS: CONTENT})
    server.ignores_ranges, server.cuts = True, 100  # always the same half
    with pytest.raises(ConnectionError, match=r"no more than 150,000 of 300,000 bytes .*run the command again"):
        run(tool, "mae_base", tmp_path)
    assert len(server.ranges) == 1 + tool.MAX_IDLE_TRIES
    assert (tmp_path / f"{WEIGHTS}.part").read_bytes() == CONTENT[:150_000] and not (tmp_path / WEIGHTS).exists()


def test_server_that_cannot_be_reached_is_named(server, tool, tmp_path):
    serve(server, tool, "mae_base", {WEIGHTS: CONTENT})
    server.shutdown()
    server.server_close()
    with pytest.raises(ConnectionError, match=rf"{server.url}/{WEIGHTS} cannot be reached: .*refused"):
        run(tool, "mae_base", tmp_path)
    assert names_in(tmp_path) == set()


def test_wrong_checksum_leaves_nothing(server, tool, tmp_path):
    serve(server, tool, "mae_base", {WEIGHTS: CONTENT}, {WEIGHTS: checksum(b"other", 6)})
    right, wrong = checksum(CONTENT).split(":")[1], checksum(b"other", 6).split(":")[1]
    with pytest.raises(ValueError, match=rf"has the md5 {right}, but that of .*{WEIGHTS} is {wrong}; .*was removed"):
        run(tool, "mae_base", tmp_path)
    assert names_in(tmp_path) == set()


def test_other_file_under_the_final_name_is_kept(server, tool, tmp_path):
    serve(server, tool, "mae_base", {WEIGHTS: CONTENT})
    (tmp_path / WEIGHTS).write_text("mine")
    with pytest.raises(ValueError, match="has the md5"):
        run(tool, "mae_base", tmp_path)
    assert (tmp_path / WEIGHTS).read_text() == "mine" and server.ranges == []


def test_weights_without_a_checksum_are_verified_by_those_inside(server, tool, tmp_path, capsys):
    torch.save({"model": {"cls_token": torch.rand(1000)}}, tmp_path / "source.pth")
    content = (tmp_path / "source.pth").read_bytes()
    serve(server, tool, "mae_base", {WEIGHTS: content}, {WEIGHTS: None})
    run(tool, "mae_base", tmp_path / "sound")
    assert "verified by the checksums inside it" in capsys.readouterr().out
    middle = len(content) // 2
    server.files[f"/{WEIGHTS}"] = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
    with pytest.raises(ValueError, match=r"is damaged: .* in it has another checksum; .*was removed"):
        run(tool, "mae_base", tmp_path / "damaged")
    assert names_in(tmp_path / "damaged") == set()


def test_full_disk_is_refused_before_anything_is_downloaded(server, tool, tmp_path, monkeypatch):
    serve(server, tool, "mae_base", {WEIGHTS: CONTENT})
    serve(server, tool, "ade20k", {"ADEChallengeData2016.zip": CONTENT})
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage._replace(free=len(CONTENT) - 1))
    for name in ("mae_base", "ade20k"):
        with pytest.raises(OSError, match=r"needs 0\.00 GB in .*, where 0\.00 GB are free"):
            run(tool, name, tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage._replace(free=len(CONTENT)))
    run(tool, "mae_base", tmp_path)
    with pytest.raises(
        OSError, match="downloading and unpacking ADEChallengeData2016 needs"
    ):  # room for the file alone
        run(tool, "ade20k", tmp_path)
    assert server.ranges == [None]


def test_second_run_at_once_is_refused(server, tool, tmp_path):
    serve(server, tool, "mae_base", {WEIGHTS: CONTENT})
    with (
        tool.held(tmp_path / f"{WEIGHTS}.part"),
        pytest.raises(BlockingIOError, match="another run is downloading"),
    ):
        run(tool, "mae_base", tmp_path)
    assert server.ranges == []


# -------------------------------------------------------------------------------- data sets


def picture(size: tuple[int, int], format: str = "JPEG") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, "red").save(file, format)
    return file.getvalue()


def label_map(values: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(values.astype(np.uint8)).save(file, "PNG")
    return file.getvalue()


def pack_tar(files: dict[str, bytes], links: dict[str, str] | None = None) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
        for name, target in (links or {}).items():
            entry = tarfile.TarInfo(name)
            entry.type, entry.linkname = tarfile.SYMTYPE, target
            archive.addfile(entry)
    return packed.getvalue()


def pack_zip(files: dict[str, bytes], link: str | None = None) -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
        if link:
            entry = zipfile.ZipInfo(link)
            entry.external_attr = 0o120777 << 16
            archive.writestr(entry, "/etc/hostname")
    return packed.getvalue()


def imagenette_files() -> dict[str, bytes]:
    return {
        f"imagenette2-160/{split}/{breed}/{split}_{index}.JPEG": picture((20, 30))
        for split, count in (("train", 3), ("val", 2))
        for breed in ("n01440764", "n02102040")
        for index in range(count)
    }


def ade20k_files() -> dict[str, bytes]:
    values = np.arange(600).reshape(20, 30) % 151
    files = {"ADEChallengeData2016/objectInfo150.txt": b"Idx\tRatio\n"}
    for split in ("training", "validation"):
        files[f"ADEChallengeData2016/images/{split}/ADE_{split}_1.jpg"] = picture((30, 20))
        files[f"ADEChallengeData2016/annotations/{split}/ADE_{split}_1.png"] = label_map(values)
    return files


TRIMAP = np.array([[1, 1, 3, 2], [1, 3, 2, 2], [3, 2, 2, 2]])
PETS = {
    "trainval": ("Abyssinian_1", "Abyssinian_2", "yorkshire_terrier_9"),
    "test": ("Abyssinian_3", "yorkshire_terrier_1"),
}


def pets_archives() -> dict[str, bytes]:
    stems = [stem for part in PETS.values() for stem in part]
    images = {f"images/{stem}.jpg": picture((4, 3)) for stem in stems} | {"images/Abyssinian_1.mat": b"no image"}
    annotations = {f"./annotations/trimaps/{stem}.png": label_map(TRIMAP) for stem in stems}
    annotations["./annotations/trimaps/._Abyssinian_1.png"] = b"a file manager's"
    for part, members in PETS.items():
        annotations[f"./annotations/{part}.txt"] = "".join(f"{stem} 1 1 1\n" for stem in members).encode()
    return {"images.tar.gz": pack_tar(images), "annotations.tar.gz": pack_tar(annotations)}


def test_imagenette_gets_imagenets_layout(server, tool, tmp_path, capsys):
    serve(server, tool, "imagenette", {"imagenette2-160.tgz": pack_tar(imagenette_files())})
    run(tool, "imagenette", tmp_path, "--size", "160")
    root = tmp_path / "imagenette2-160"
    train, validation = find_splits(root)
    assert [len(list_images(folder)) for folder in (train, validation)] == [6, 4]
    assert list_images(train).classes == list_images(validation).classes == ("n01440764", "n02102040")
    assert "6 training and 4 validation images in 2 classes" in capsys.readouterr().out
    assert names_in(tmp_path) == {"imagenette2-160"}
    run(tool, "imagenette", tmp_path, "--size", "160")
    assert "is complete" in capsys.readouterr().out and len(server.ranges) == 1


def test_ade20k_gets_its_own_layout(server, tool, tmp_path):
    serve(server, tool, "ade20k", {"ADEChallengeData2016.zip": pack_zip(ade20k_files())})
    run(tool, "ade20k", tmp_path)
    for split in ("training", "validation"):
        pairs = list_pairs(tmp_path, split)  # the scripts take the folder above as well
        check_pairs(pairs, label_table(150, ignore_zero=True), num_threads=1)
        assert len(pairs) == 1
    assert names_in(tmp_path) == {"ADEChallengeData2016"}


def test_pets_serve_all_three_scripts_and_are_stored_once(server, tool, tmp_path):
    serve(server, tool, "pets", pets_archives())
    run(tool, "pets", tmp_path)
    root = tmp_path / "pets"
    assert names_in(tmp_path) == {"pets"}
    assert names_in(root) == {"train", "val", "images", "annotations", "download.json"}
    train, validation = (list_images(folder) for folder in find_splits(root))
    assert train.classes == validation.classes == ("Abyssinian", "yorkshire_terrier")
    assert train.labels.tolist() == [0, 0, 1] and validation.labels.tolist() == [0, 1]
    table = label_table(2, ignore_zero=True)
    expected = np.array([[0, 0, IGNORE_INDEX, 1], [0, IGNORE_INDEX, 1, 1], [IGNORE_INDEX, 1, 1, 1]])
    for split, files in (("training", train), ("validation", validation)):
        pairs = list_pairs(root, split)
        check_pairs(pairs, table, num_threads=1)
        assert len(pairs) == len(files)
        for index in range(len(pairs)):
            assert (read_label_map(pairs.label_path(index), table) == expected).all()
            assert Path(pairs.path(index)).samefile(files.path(index))


def test_pets_are_copied_where_there_are_no_hard_links(server, tool, tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError("no hard links here")

    serve(server, tool, "pets", pets_archives())
    monkeypatch.setattr(tool.os, "link", refuse)
    run(tool, "pets", tmp_path)
    images = list_images(tmp_path / "pets" / "train")
    assert len(images) == 3
    assert all(Path(images.path(index)).read_bytes() == picture((4, 3)) for index in range(3))


def test_trimap_of_other_values_is_refused(tool, tmp_path):
    (tmp_path / "trimap.png").write_bytes(label_map(TRIMAP + 1))
    with pytest.raises(ValueError, match=r"trimap\.png is no trimap: its values are \[2 3 4\]"):
        tool.convert_trimap(tmp_path / "trimap.png", tmp_path / "labels.png")
    assert names_in(tmp_path) == {"trimap.png"}


HOSTILE = {
    "imagenette": {
        "above": pack_tar({**imagenette_files(), "imagenette2-160/../../evil": b"x"}),
        "absolute": pack_tar({**imagenette_files(), "/evil": b"x"}),
        "link": pack_tar(imagenette_files(), {"imagenette2-160/train/link": "/etc"}),
    },
    "ade20k": {
        "above": pack_zip({**ade20k_files(), "../evil": b"x"}),
        "absolute": pack_zip({**ade20k_files(), "/evil": b"x"}),
        "link": pack_zip(ade20k_files(), "ADEChallengeData2016/link"),
    },
}


@pytest.mark.parametrize(("name", "how"), [(name, how) for name, kinds in HOSTILE.items() for how in kinds])
def test_hostile_archive_is_not_unpacked(name, how, server, tool, tmp_path):
    output = tmp_path / "a" / "b"
    key, file = {"imagenette": ("160", "imagenette2-160.tgz"), "ade20k": (None, "ADEChallengeData2016.zip")}[name]
    serve(server, tool, name, {file: HOSTILE[name][how]})
    with pytest.raises(ValueError, match=r"(evil|link)', which is a link, a device or outside its folder"):
        run(tool, name, output, *(["--size", key] if key else []))
    (work,) = output.iterdir()
    assert names_in(work) == {".lock", file}
    assert not list(tmp_path.rglob("*evil")) and not Path("/evil").exists()


def test_interrupted_unpacking_leaves_no_half_data_set(server, tool, tmp_path, monkeypatch):
    serve(server, tool, "pets", pets_archives())
    convert_trimap, calls = tool.convert_trimap, []

    def interrupt(*paths):
        calls.append(paths)
        if len(calls) == 3:
            raise KeyboardInterrupt
        convert_trimap(*paths)

    monkeypatch.setattr(tool, "convert_trimap", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(tool, "pets", tmp_path)
    assert names_in(tmp_path) == {"pets.download"}
    assert names_in(tmp_path / "pets.download") == {".lock", "images.tar.gz", "annotations.tar.gz"}
    num_requests = len(server.ranges)
    run(tool, "pets", tmp_path)
    assert len(list_images(tmp_path / "pets" / "train")) == 3
    assert len(server.ranges) == num_requests  # the archives were there


def test_data_set_of_another_make_is_left_alone(server, tool, tmp_path):
    serve(server, tool, "ade20k", {"ADEChallengeData2016.zip": pack_zip(ade20k_files())})
    (tmp_path / "ADEChallengeData2016").mkdir()
    (tmp_path / "ADEChallengeData2016" / "download.json").write_text(json.dumps({"sources": ["elsewhere"]}))
    with pytest.raises(FileExistsError, match="not from this tool; move it away or choose another --output"):
        run(tool, "ade20k", tmp_path)
    assert names_in(tmp_path / "ADEChallengeData2016") == {"download.json"} and server.ranges == []


def test_archive_of_another_layout_is_named(server, tool, tmp_path):
    files = {name.replace("ADEChallengeData2016", "ADE"): content for name, content in ade20k_files().items()}
    serve(server, tool, "ade20k", {"ADEChallengeData2016.zip": pack_zip(files)})
    with pytest.raises(FileNotFoundError, match="holds no folder ADEChallengeData2016, but ADE/"):
        run(tool, "ade20k", tmp_path)
    assert names_in(tmp_path) == {"ADEChallengeData2016.download"}


# -------------------------------------------------------------------------------- the addresses


def test_addresses_and_checksums_are_torchvisions(tool):
    ours = {size: tool.DOWNLOADS["imagenette", size].sources[0] for size in ("160", "320", "full")}
    theirs = {size.removesuffix("px"): source for size, source in Imagenette._ARCHIVES.items()}
    assert {size: (source.url, source.checksum.removeprefix("md5:")) for size, source in ours.items()} == theirs
    pets = tool.DOWNLOADS["pets", None].sources
    assert tuple((s.url, s.checksum.removeprefix("md5:")) for s in pets) == OxfordIIITPet._RESOURCES


def test_every_name_and_variant_can_be_asked_for(tool):
    asked = {
        (args.name, args.variant)
        for name, variant in tool.DOWNLOADS
        for flag in ("--size" if name == "imagenette" else "--kind",)
        for args in [tool.parse_args([name, "--output", "x", *([flag, variant] if variant else [])])]
    }
    assert asked == set(tool.DOWNLOADS) and len(asked) == 3 + 2 + 9
    assert tool.DOWNLOADS["mae_huge", "finetuned"].sources[0].url.endswith("/mae/finetune/mae_finetuned_vit_huge.pth")
