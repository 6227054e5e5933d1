"""Downloads from a server in this process: whole, cut, resumed, wrong, hostile, and laid out as the scripts read."""

import contextlib
import fcntl
import gzip
import hashlib
import http.server
import io
import json
import os
import re
import resource
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import threading
import time
import urllib.request
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, load_tool
from PIL import Image
from torchvision.datasets import Imagenette, OxfordIIITPet

from model import VisionTransformer, ViTMAEForImageClassification, load_classifier
from storage import published, transfer
from storage.labels import IGNORE_INDEX, label_table, read_label_map
from storage.lists import find_splits, list_images
from storage.pairs import check_pairs, list_pairs
from storage.sizes import MAEConfig

CONTENT = np.random.default_rng(0).bytes(300_000)


class Handler(http.server.BaseHTTPRequestHandler):
    """Serve `server.files`, with ranges unless `ignores_ranges`; the first `cuts` answers break off half-way.

    What is in `server.lies`, by path, answers instead. `server.etag` tells the version of all files, if it is given,
    and an If-Range with another one gets the whole file.
    """

    def handle(self):
        with contextlib.suppress(ConnectionError):  # a client that leaves before the end of an answer
            super().handle()

    def do_GET(self):
        asked = self.headers["Range"]
        self.server.ranges.append(asked)
        if lie := self.server.lies.get(self.path):
            return lie(self)
        content = self.server.files[self.path]
        current = self.headers["If-Range"] in (None, self.server.etag)
        if asked and current and not self.server.ignores_ranges:
            start = int(re.fullmatch(r"bytes=(\d+)-", asked)[1])
            self.answer(http.HTTPStatus.PARTIAL_CONTENT, len(content) - start, (start, len(content)))
            content = content[start:]
        else:
            self.answer(http.HTTPStatus.OK, len(content))
        if self.server.cuts:
            self.server.cuts -= 1
            content = content[: len(content) // 2]
            self.close_connection = True
        return self.wfile.write(content)

    def answer(self, status: int, length: int, span: tuple[int, int] | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(length))
        if self.server.etag and not span:  # a rest may go without
            self.send_header("ETag", self.server.etag)
        if span:
            self.send_header("Content-Range", f"bytes {span[0]}-{span[1] - 1}/{span[1]}")
        self.end_headers()

    def reply(self, status: int, content: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        """Keep the test's output clean."""


@pytest.fixture(scope="session")
def running_server() -> Iterator[http.server.ThreadingHTTPServer]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def server(running_server) -> http.server.ThreadingHTTPServer:
    """The one server, which holds nothing and obeys."""
    running_server.files, running_server.lies, running_server.ranges = {}, {}, []
    running_server.cuts, running_server.ignores_ranges, running_server.etag = 0, False, None
    return running_server


@pytest.fixture
def tool(monkeypatch):
    monkeypatch.setattr(transfer, "RETRY_WAIT_S", 0)
    return load_tool("download")


def checksum(content: bytes, digits: int | None = None) -> str:
    return f"md5:{hashlib.md5(content).hexdigest()[:digits]}"


def serve(server, tool, name: str, files: dict[str, bytes], checksum_of=checksum) -> None:
    """Let a name of the tool mean these files on the server, with their right checksums where no others are given."""
    key = next(key for key in tool.SOURCES if key[0] == name)
    server.files |= {f"/{file}": content for file, content in files.items()}
    tool.SOURCES[key] = {f"{server.url}/{file}": checksum_of(content) for file, content in files.items()}


def run(tool, name: str, output: Path, *more: str) -> None:
    tool.main(tool.parse_args([name, "--output", str(output), *more]))


def names_in(folder: Path) -> set[str]:
    return {entry.name for entry in folder.iterdir()}


def lie(status: int, content: bytes = b"", **headers: str) -> Callable[[Handler], None]:
    return lambda handler: handler.reply(status, content, **headers)


WEIGHTS = "mae_pretrain_vit_base.pth"
WORK, PART = f"{WEIGHTS}.download", f"{WEIGHTS}.part"


def begin_part(server, output: Path, content: bytes, **version: str | int) -> Path:
    """Leave what a killed run leaves: a part, and the version that it was begun with."""
    part = output / WORK / PART
    part.parent.mkdir(parents=True)
    part.write_bytes(content)
    begun = {"url": f"{server.url}/{WEIGHTS}", "length": len(CONTENT)} | version
    part.with_name(f"{PART}.json").write_text(json.dumps(begun))
    return part


# -------------------------------------------------------------------------------- one file


def test_file_is_downloaded_once(server, tool, tmp_path, capsys):
    serve(server, tool, "mae_base", {WEIGHTS: CONTENT}, lambda content: checksum(content, 6))
    run(tool, "mae_base", tmp_path / "new")
    assert (tmp_path / "new" / WEIGHTS).read_bytes() == CONTENT
    agree = "the first 6 digits of its md5, all that are published, agree"
    assert f"{WEIGHTS}: {agree}" in capsys.readouterr().out
    run(tool, "mae_base", tmp_path / "new")
    assert f"{WEIGHTS} is there: {agree}" in capsys.readouterr().out
    assert server.ranges == [None] and names_in(tmp_path / "new") == {WEIGHTS}


@pytest.mark.parametrize(
    ("part", "behaviour", "asked"),
    [
        (b"", {"cuts": 2}, [None, "bytes=150000-", "bytes=225000-"]),
        (CONTENT[:123_456], {}, ["bytes=123456-"]),
        (b"x" * 100_000, {"ignores_ranges": True}, ["bytes=100000-"]),  # all of it comes, and replaces what there was
        (CONTENT + b"more", {}, [None]),  # of another file
        (b"x" * 100_000, {}, ["bytes=100000-", None]),  # found by the checksum
        (CONTENT, {}, []),
    ],
    ids=["cut", "later run", "no ranges", "longer part", "damaged part", "whole part"],
)
def test_download_goes_on_where_it_stopped(part, behaviour, asked, server, tool, tmp_path):
    serve(server, tool, "mae_base", {WEIGHTS: CONTENT})
    vars(server).update(behaviour)
    if part:
        begin_part(server, tmp_path, part)
    run(tool, "mae_base", tmp_path)
    assert server.ranges == asked
    assert (tmp_path / WEIGHTS).read_bytes() == CONTENT and names_in(tmp_path) == {WEIGHTS}


def test_connection_that_gives_nothing_more_is_an_error_that_keeps_what_came(server, tool, tmp_path):
    serve(server, tool, "mae_base", {WEIGHTS: CONTENT})
    server.ignores_ranges, server.cuts = True, 100  # always the same half
    with pytest.raises(ConnectionError, match=r"only 150,000 of 300,000 bytes came: .*; run again to go on"):
        run(tool, "mae_base", tmp_path)
    assert len(server.ranges) == 1 + transfer.MAX_IDLE_TRIES
    assert (tmp_path / WORK / PART).read_bytes() == CONTENT[:150_000] and not (tmp_path / WEIGHTS).exists()


def test_server_that_cannot_be_reached_is_named(tool, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as free:
        url = f"http://127.0.0.1:{free.getsockname()[1]}/{WEIGHTS}"
    tool.SOURCES["mae_base", "pretrain"] = {url: None}
    with pytest.raises(ConnectionError, match=rf"{url} cannot be reached: .*refused"):
        run(tool, "mae_base", tmp_path)
    assert names_in(tmp_path) == set()


@pytest.mark.parametrize("status", [401, 403, 404, 410, 416])
def test_no_of_the_server_is_final(status, server, tool, tmp_path):
    serve(server, tool, "mae_base", {WEIGHTS: CONTENT})
    server.lies[f"/{WEIGHTS}"] = lie(status, b"<html>no</html>")
    answer = rf"cannot be downloaded: the server answers {status} .*save it as "
    with pytest.raises(FileNotFoundError, match=rf"{WEIGHTS} {answer}.*/{WEIGHTS}, run again"):
        run(tool, "mae_base", tmp_path)
    assert len(server.ranges) == 1 and names_in(tmp_path) == set()
    serve(server, tool, "pets", pets_archives())
    server.lies["/annotations.tar.gz"] = lie(status)
    with pytest.raises(FileNotFoundError, match=rf"{answer}.*pets\.download/annotations\.tar\.gz, run again"):
        run(tool, "pets", tmp_path)
    assert [names_in(folder) for folder in tmp_path.iterdir()] == [{"images.tar.gz"}]


def test_passing_failure_of_the_server_is_tried_again(server, tool, tmp_path):
    serve(server, tool, "mae_base", {WEIGHTS: CONTENT})
    busy = [503, 429, 408, 500]

    def answer(handler: Handler) -> None:
        status = busy.pop()
        if not busy:
            del server.lies[f"/{WEIGHTS}"]
        handler.reply(status)

    server.lies[f"/{WEIGHTS}"] = answer
    run(tool, "mae_base", tmp_path)
    assert (tmp_path / WEIGHTS).read_bytes() == CONTENT and len(server.ranges) == 5
    server.lies[f"/{WEIGHTS}"] = lie(503)
    with pytest.raises(ConnectionError, match=r"only 0 of an unknown number of bytes came: .*503 Service Unavailable"):
        run(tool, "mae_base", tmp_path / "other")
    assert len(server.ranges) == 5 + transfer.MAX_IDLE_TRIES and names_in(tmp_path / "other") == set()


def test_waits_double_and_the_server_may_ask_for_longer_ones_within_a_bound(server, tool, tmp_path, monkeypatch):
    monkeypatch.setattr(transfer, "RETRY_WAIT_S", 3)
    waits = []
    monkeypatch.setattr(time, "sleep", waits.append)
    serve(server, tool, "mae_base", {WEIGHTS: CONTENT})
    for retry_after, expected in {
        "": [6, 12, 24, 48],
        "30": [30, 30, 30, 48],
        "9" * 9: 4 * [transfer.MAX_RETRY_WAIT_S],
        "9" * 5000: [6, 12, 24, 48],  # more than int() reads
        "Wed, 21 Oct 2099 07:28:00 GMT": [6, 12, 24, 48],
        "-5": [6, 12, 24, 48],
    }.items():
        waits.clear()
        server.lies[f"/{WEIGHTS}"] = lie(429, **({"Retry_After": retry_after} if retry_after else {}))
        with pytest.raises(ConnectionError, match="429 Too Many Requests"):
            run(tool, "mae_base", tmp_path)
        assert waits == expected, retry_after


def lie_about_the_rest(**headers: str) -> Callable[[Handler], None]:
    """Answer a request for a rest with other headers than it should have, and one for all of it rightly."""

    def answer(handler: Handler) -> None:
        if handler.headers["Range"]:
            handler.reply(206, CONTENT[99_999:299_999], Content_Length="200000", **headers)
        else:
            handler.answer(200, len(CONTENT))
            handler.wfile.write(CONTENT)

    return answer


@pytest.mark.parametrize(
    "headers",
    [
        {"Content_Range": "bytes 99999-299999/300000"},
        {"Content_Range": "bytes 1000000-2000000/300000"},
        {"Content_Range": "bytes 100000-299999/300001"},
        {"Content_Range": "bytes 100000"},
        {},
        {"Content_Range": "bytes 100000-299999/300000", "ETag": '"new"'},
        {"Content_Range": "bytes 100000-299999/300000", "Last_Modified": "Thu, 01 Jan 2026 00:00:00 GMT"},
    ],
)
def test_other_part_than_asked_for_is_not_taken(headers, server, tool, tmp_path, capsys):
    serve(server, tool, "mae_base", {WEIGHTS: CONTENT}, lambda content: checksum(content, 6))
    begin_part(server, tmp_path, CONTENT[:100_000], etag='"old"', last_modified="Wed, 01 Jan 2025 00:00:00 GMT")
    server.lies[f"/{WEIGHTS}"] = lie_about_the_rest(**headers)
    run(tool, "mae_base", tmp_path)
    assert (tmp_path / WEIGHTS).read_bytes() == CONTENT and server.ranges == ["bytes=100000-", None]
    assert "the download starts over" in capsys.readouterr().out


def test_rest_that_the_server_refuses_is_replaced_by_the_whole(server, tool, tmp_path):
    serve(server, tool, "mae_base", {WEIGHTS: CONTENT})
    begin_part(server, tmp_path, b"x" * 100_000)

    def refuse_the_rest(handler: Handler) -> None:
        del server.lies[f"/{WEIGHTS}"]
        handler.reply(416, b"<html>no</html>", Content_Type="text/html", Content_Range="bytes */50000")

    server.lies[f"/{WEIGHTS}"] = refuse_the_rest
    run(tool, "mae_base", tmp_path)
    assert (tmp_path / WEIGHTS).read_bytes() == CONTENT and server.ranges == ["bytes=100000-", None]


@pytest.mark.parametrize("begun", ['"old"', '"new"', 'W/"new"'])
def test_part_of_an_older_version_is_not_continued(begun, server, tool, tmp_path, capsys):
    source = tmp_path / "source.pth"
    torch.save(torch.rand(30_000), source, _use_new_zipfile_serialization=False)
    content = source.read_bytes()
    serve(server, tool, "mae_base", {WEIGHTS: content}, lambda _: None)  # nothing else would notice
    server.etag = '"new"'
    output = tmp_path / "output"
    begin_part(server, output, content[:5000], etag=begun, length=len(content))
    run(tool, "mae_base", output)
    assert (output / WEIGHTS).read_bytes() == content
    assert ("has changed" in capsys.readouterr().out) == (begun == '"old"')
    assert names_in(output) == {WEIGHTS}


@pytest.mark.parametrize("record", [None, "", "[]", '{"url": 5}', '{"url": "http://elsewhere/", "length": 300000}'])
def test_part_without_a_record_of_its_version_is_begun_anew(record, server, tool, tmp_path, capsys):
    serve(server, tool, "mae_base", {WEIGHTS: CONTENT})
    part = begin_part(server, tmp_path, b"x" * 100_000)
    part.with_name(f"{PART}.json").unlink()
    if record is not None:
        part.with_name(f"{PART}.json").write_text(record)
    run(tool, "mae_base", tmp_path)
    assert (tmp_path / WEIGHTS).read_bytes() == CONTENT and server.ranges == [None]
    assert "the download starts over" in capsys.readouterr().out


@pytest.mark.parametrize("length", ["299999", "300001"])
def test_length_that_is_a_lie_is_noticed(length, server, tool, tmp_path):
    serve(server, tool, "mae_base", {WEIGHTS: CONTENT})
    server.lies[f"/{WEIGHTS}"] = lie(200, CONTENT, Content_Length=length)
    with pytest.raises((ConnectionError, ValueError), match=r"closed the connection|has the md5"):
        run(tool, "mae_base", tmp_path)
    assert WEIGHTS not in names_in(tmp_path)


def test_no_more_than_the_announced_length_is_written(server, tool, tmp_path):
    serve(server, tool, "mae_base", {WEIGHTS: CONTENT})
    server.lies[f"/{WEIGHTS}"] = lie(200, CONTENT + b"and so on" * 100_000, Content_Length="300000")
    run(tool, "mae_base", tmp_path)
    assert (tmp_path / WEIGHTS).read_bytes() == CONTENT


@pytest.mark.parametrize("length", [None, "-5", "many", "0", "9" * 5000])
def test_unknown_length_is_refused(length, server, tool, tmp_path):
    serve(server, tool, "mae_base", {WEIGHTS: CONTENT})
    server.lies[f"/{WEIGHTS}"] = lie(200, CONTENT, **({"Content_Length": length} if length else {}))
    with pytest.raises(FileNotFoundError, match=rf"does not say how long it is \(Content-Length {length}\)"):
        run(tool, "mae_base", tmp_path)
    assert names_in(tmp_path) == set()


def send_pieces(handler: Handler, content: bytes, end: bytes = b"0\r\n\r\n") -> None:
    pieces = b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in (content[:1000], content[1000:]) if piece)
    handler.reply(200, pieces + end, Transfer_Encoding="chunked")


def test_transfer_that_marks_its_own_end_needs_no_length(server, tool, tmp_path, capsys):
    serve(server, tool, "mae_base", {WEIGHTS: CONTENT})
    answers = [{"end": b""}, {"content": CONTENT[:1001], "end": b"5\r\nab"}, {}]  # cut twice, then whole
    server.lies[f"/{WEIGHTS}"] = lambda handler: send_pieces(handler, **{"content": CONTENT} | answers.pop(0))
    run(tool, "mae_base", tmp_path)
    assert (tmp_path / WEIGHTS).read_bytes() == CONTENT and server.ranges == [None] * 3
    assert "one without a length: the download starts over" in capsys.readouterr().out


def test_transfer_without_a_length_or_an_end_is_given_up(server, tool, tmp_path, monkeypatch):
    monkeypatch.setattr(transfer, "MAX_BYTES", 200_000)
    serve(server, tool, "mae_base", {WEIGHTS: CONTENT})
    server.lies[f"/{WEIGHTS}"] = lambda handler: send_pieces(handler, CONTENT)
    with pytest.raises(ConnectionError, match="more than 200,000 bytes came, and no length was said"):
        run(tool, "mae_base", tmp_path)


def trickle(handler: Handler, before: bytes, byte: bytes) -> None:
    handler.wfile.write(before)
    with contextlib.suppress(ConnectionError):
        for _ in range(1000):
            handler.wfile.write(byte)
            time.sleep(0.01)


HEAD = b"HTTP/1.1 200 OK\r\nContent-Length: 300000\r\n"


@pytest.mark.parametrize(
    ("before", "byte"),
    [
        (b"", b"H"),
        (HEAD + b"X: ", b"x"),
        (HEAD + b"\r\n", b"x"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"0"),
        (b"HTTP/1.1 503 Busy\r\nRetry-After: 100\r\n\r\n", b""),
    ],
    ids=["status", "header", "content", "size of a piece", "asks to wait"],
)
def test_byte_now_and_then_is_given_up(before, byte, server, tool, tmp_path, monkeypatch):
    monkeypatch.setattr(transfer, "STALL_S", 0.3)
    serve(server, tool, "mae_base", {WEIGHTS: CONTENT})
    server.lies[f"/{WEIGHTS}"] = lambda handler: trickle(handler, before, byte)
    started = time.monotonic()
    handler = signal.getsignal(signal.SIGALRM)
    with pytest.raises(ConnectionError, match=r"only \d+ bytes in 0\.3 s, .*; run again to go on"):
        run(tool, "mae_base", tmp_path)
    assert time.monotonic() - started < 5
    assert signal.getsignal(signal.SIGALRM) == handler and signal.getitimer(signal.ITIMER_REAL) == (0, 0)


def test_byte_per_connection_is_given_up(server, tool, tmp_path, monkeypatch):
    monkeypatch.setattr(transfer, "STALL_S", 0.3)
    serve(server, tool, "mae_base", {WEIGHTS: CONTENT})

    def give_one_byte(handler: Handler) -> None:
        start = int((handler.headers["Range"] or "bytes=0-")[6:-1])
        handler.answer(206 if start else 200, len(CONTENT) - start, (start, len(CONTENT)) if start else None)
        handler.wfile.write(CONTENT[start : start + 1])
        handler.close_connection = True

    server.lies[f"/{WEIGHTS}"] = give_one_byte
    with pytest.raises(ConnectionError, match=r"only \d+ bytes in 0\.3 s"):
        run(tool, "mae_base", tmp_path)
    come = (tmp_path / WORK / PART).read_bytes()
    assert len(come) > transfer.MAX_IDLE_TRIES and CONTENT.startswith(come)


def test_file_that_changes_all_the_time_is_given_up(server, tool, tmp_path):
    serve(server, tool, "mae_base", {WEIGHTS: CONTENT})

    def change(handler: Handler) -> None:
        length = 1000 + len(server.ranges)  # a little more each time, so that no try is idle
        handler.reply(200, CONTENT[:length], Content_Length="300000", ETag=f'"{length}"')
        handler.close_connection = True

    server.lies[f"/{WEIGHTS}"] = change
    with pytest.raises(ConnectionError, match="the file was begun 10 times"):
        run(tool, "mae_base", tmp_path)


@pytest.mark.parametrize("first", ["close", "garbage", "silence in the handshake"])
def test_connection_that_breaks_before_an_answer_is_tried_again(first, tool, tmp_path, monkeypatch):
    monkeypatch.setattr(transfer, "TIMEOUT_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        protocol = "https" if first.startswith("silence") else "http"
        url = f"{protocol}://127.0.0.1:{listening.getsockname()[1]}/{WEIGHTS}"
        connections = []

        def answer() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connections.append(listening.accept()[0])
                    if first == "garbage":
                        connections[-1].sendall(b"\x00\x01\x02 no HTTP\r\n\r\n")
                    if protocol == "http":
                        connections[-1].close()

        threading.Thread(target=answer, daemon=True).start()
        tool.SOURCES["mae_base", "pretrain"] = {url: None}
        with pytest.raises(ConnectionError, match=rf"{url} cannot be reached: .*; run again to go on"):
            run(tool, "mae_base", tmp_path)
        assert len(connections) == transfer.MAX_IDLE_TRIES and names_in(tmp_path) == set()


@pytest.mark.parametrize("with_part", [False, True])
def test_page_to_log_in_is_refused_and_leaves_the_part(with_part, server, tool, tmp_path):
    serve(server, tool, "mae_base", {WEIGHTS: CONTENT})
    if with_part:
        begin_part(server, tmp_path, CONTENT[:100_000])
    page = b"<!DOCTYPE html><title>Please log in</title>"
    server.lies[f"/{WEIGHTS}"] = lie(200, page, Content_Type="text/html; charset=utf-8", Content_Length=str(len(page)))
    with pytest.raises(FileNotFoundError, match=r"gives a web page, perhaps one to log in\. If you find it elsewhere"):
        run(tool, "mae_base", tmp_path)
    server.lies.clear()
    run(tool, "mae_base", tmp_path)
    assert server.ranges[1:] == (["bytes=100000-"] if with_part else [None])
    assert (tmp_path / WEIGHTS).read_bytes() == CONTENT


def test_compressed_answer_is_refused_but_not_that_of_an_archive(server, tool, tmp_path):
    serve(server, tool, "mae_base", {WEIGHTS: CONTENT})
    serve(server, tool, "pets", pets_archives())
    packed = gzip.compress(CONTENT)
    server.lies[f"/{WEIGHTS}"] = lie(200, packed, Content_Encoding="gzip", Content_Length=str(len(packed)))
    with pytest.raises(FileNotFoundError, match="gives it in the encoding gzip, not as it is"):
        run(tool, "mae_base", tmp_path)
    for name, content in pets_archives().items():
        serve(server, tool, "pets", pets_archives())
        content = server.files[f"/{name}"]
        server.lies[f"/{name}"] = lie(200, content, Content_Encoding="x-gzip", Content_Length=str(len(content)))
    run(tool, "pets", tmp_path)
    assert names_in(tmp_path) == {"pets"}


def test_words_of_the_server_cannot_steer_the_terminal(server, tool, tmp_path, capsys):
    serve(server, tool, "mae_base", {WEIGHTS: CONTENT})
    server.lies[f"/{WEIGHTS}"] = lambda handler: handler.wfile.write(b"HTTP/1.1 503 \x1b[2Jgone\r\n\r\n")
    with pytest.raises(ConnectionError):
        run(tool, "mae_base", tmp_path)
    assert "\x1b" not in capsys.readouterr().out


@pytest.mark.parametrize("digits", ["right", "wrong", "none"])
def test_weights_at_an_address_are_fetched_checked_and_converted(digits, server, tmp_path, capsys):
    torch.manual_seed(0)
    config = MAEConfig(img_size=32, encoder_embed_dim=192, encoder_depth=1, encoder_num_heads=3)
    model = ViTMAEForImageClassification(config, 3)
    torch.save({"model": model.state_dict()}, tmp_path / "source.pth")
    content = (tmp_path / "source.pth").read_bytes()
    known = {"right": "-" + hashlib.sha256(content).hexdigest()[:8], "wrong": "-" + "0" * 8, "none": ""}[digits]
    server.files[f"/vit{known}.pth"] = content
    converter = load_tool("convert_weights")
    given = [f"{server.url}/vit{known}.pth", str(tmp_path / "ours"), "--to", "ours"]
    if digits == "wrong":
        with pytest.raises(ValueError, match="has the sha256"):
            converter.main(converter.parse_args(given))
        assert not (tmp_path / "ours").exists() and not (tmp_path / f"vit{known}.pth").exists()
        return
    converter.main(converter.parse_args(given))
    told = "the first 8 digits of its sha256" if digits == "right" else "not verified, no published checksum"
    assert told in capsys.readouterr().out and (tmp_path / f"vit{known}.pth").read_bytes() == content
    converter.main(converter.parse_args([*given, "--overwrite"]))
    assert f"vit{known}.pth is there: " in capsys.readouterr().out and len(server.ranges) == 1
    loaded, _ = load_classifier(tmp_path / "ours")
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in loaded.state_dict().items())


def test_file_of_the_same_name_from_another_address_is_not_taken(server, tmp_path):
    """Or finetuned weights of one place would be called those of another, without a word."""
    torch.save({"model": VisionTransformer(MAEConfig(img_size=32, encoder_depth=1)).state_dict()}, tmp_path / "a.pth")
    server.files |= {
        name: (tmp_path / "a.pth").read_bytes() for name in ("/mine/vit.pth?key=secret", "/theirs/vit.pth")
    }
    converter = load_tool("convert_weights")

    def convert(path: str, target: str = "ours") -> None:
        converter.main(converter.parse_args([server.url + path, str(tmp_path / target), "--to", "ours", "--overwrite"]))

    convert("/mine/vit.pth?key=secret")
    assert "secret" not in (tmp_path / "vit.pth.source").read_text()
    convert("/mine/vit.pth?key=secret")  # which is the same
    for path in ("/theirs/vit.pth", "/mine/vit.pth?key=other", "/mine/vit.pth"):
        with pytest.raises(ValueError, match=r"vit.pth is there, and nothing says that it is from .*; give it as"):
            convert(path)
    (tmp_path / "vit.pth.source").unlink()  # as where somebody put the file there
    with pytest.raises(ValueError, match=r"vit.pth is there, and nothing says"):
        convert("/theirs/vit.pth")
    with pytest.raises(ValueError, match=r"looks like a file"):
        convert("/theirs/vit.pth", "new/vit.pth")
    assert len(server.ranges) == 1


def test_target_of_the_name_of_the_download_is_refused(server, tmp_path):
    server.files["/weights"] = CONTENT
    converter, target = load_tool("convert_weights"), tmp_path / "weights"
    with pytest.raises(ValueError, match=r"weights is where .* is downloaded to; choose another target"):
        converter.main(converter.parse_args([f"{server.url}/weights", str(target), "--to", "ours"]))
    with pytest.raises(SystemExit):
        converter.parse_args(["--inspect", f"{server.url}/weights"])
    assert server.ranges == [] and not target.exists()


@pytest.mark.parametrize("name", ["mae-20260427.pth", "mae_0a1b2c3d.pth", "mae-19991231.bin"])
def test_date_or_word_at_the_end_of_a_name_is_no_checksum(name, server, tmp_path, capsys):
    torch.save({"model": {"cls_token": torch.rand(9)}}, tmp_path / "a.pth")
    server.files[f"/{name}"] = (tmp_path / "a.pth").read_bytes()
    assert published.get_weights(f"{server.url}/{name}", tmp_path / "ours") == tmp_path / name
    assert "not verified, no published checksum" in capsys.readouterr().out


def test_weights_of_an_old_torch_are_never_called_verified(server, tool, tmp_path, capsys):
    """Only a digest of the whole file finds each flipped bit; without one nothing may be claimed."""
    file = tmp_path / "source.pth"
    torch.save({"model": {"cls_token": torch.rand(1000)}}, file, _use_new_zipfile_serialization=False)
    content, random = file.read_bytes(), np.random.default_rng(0)
    url, taken = "http://server/weights.pth", 0
    for bit in random.choice(8 * len(content), 200, replace=False):
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        file.write_bytes(damaged)
        for known in (checksum(content), checksum(content, 6)):
            with pytest.raises(ValueError, match="has the md5"):
                published.verify(file, url, known, "remove it")
        with contextlib.suppress(ValueError):  # of the first bytes, by which such a file is known
            assert published.verify(file, url, None, "remove it") == "not verified, no published checksum"
            taken += 1
    assert taken >= 190
    file.write_bytes(content)
    assert published.verify(file, url, checksum(content), "").startswith("verified, it has the published md5 ")
    assert "verified" not in published.verify(file, url, checksum(content, 6), "")
    serve(server, tool, "mae_base", {WEIGHTS: content}, lambda _: None)
    run(tool, "mae_base", tmp_path / "output")
    assert f"{WEIGHTS}: not verified, no published checksum" in capsys.readouterr().out


def test_redirect_to_another_address_is_followed(server, tool, tmp_path):
    serve(server, tool, "mae_base", {WEIGHTS: CONTENT})
    server.files["/moved"] = CONTENT
    server.lies[f"/{WEIGHTS}"] = lie(301, Location=f"http://localhost:{server.server_port}/moved")
    begin_part(server, tmp_path, CONTENT[:1000])
    run(tool, "mae_base", tmp_path)
    assert (tmp_path / WEIGHTS).read_bytes() == CONTENT and server.ranges[-1] == "bytes=1000-"


@pytest.mark.parametrize("location", ["file:///etc/hostname", "ftp://127.0.0.1/x", "data:,x", f"/{WEIGHTS}"])
def test_redirect_to_anything_but_a_server_is_refused(location, server, tool, tmp_path):
    serve(server, tool, "mae_base", {WEIGHTS: CONTENT})
    server.lies[f"/{WEIGHTS}"] = lie(302, Location=location)
    with pytest.raises((FileNotFoundError, ValueError), match=r"302|is not followed"):
        run(tool, "mae_base", tmp_path)
    assert names_in(tmp_path) == set()
    assert len(server.ranges) <= 11  # a loop ends, and is not begun again


def test_redirect_with_an_endless_answer_is_followed_without_it(server, tool, tmp_path):
    serve(server, tool, "mae_base", {WEIGHTS: CONTENT})
    server.files["/moved"] = CONTENT
    start = b"HTTP/1.1 302 Found\r\nLocation: /moved\r\n\r\n"
    server.lies[f"/{WEIGHTS}"] = lambda handler: trickle(handler, start, b"x")
    started = time.monotonic()
    run(tool, "mae_base", tmp_path)
    assert (tmp_path / WEIGHTS).read_bytes() == CONTENT and time.monotonic() - started < 5


def test_redirect_never_leaves_encryption(tool):
    def follow(start: str, end: str) -> str:
        request = urllib.request.Request(start)
        return transfer.Redirects().redirect_request(request, io.BytesIO(), 301, "Moved", {}, end).full_url

    assert follow("https://a.org/x", "https://b.org/x") == "https://b.org/x"
    assert follow("http://a.org/x", "http://b.org/x") == "http://b.org/x"
    assert follow("http://a.org/x", "https://b.org/x") == "https://b.org/x"
    for end in ("http://a.org/x", "ftp://a.org/x"):
        with pytest.raises(ValueError, match=f"leads to {end}, which is not followed"):
            follow("https://a.org/x", end)


KILLED = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell leaves out of what it has in the background
sys.path.insert(0, {tools!r})
import download as tool
tool.SOURCES.update({sources!r})
tool.main(tool.parse_args(["mae_base", "--output", "output"]))
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_killed_download_goes_on_where_it_was(number, server, tool, tmp_path):
    serve(server, tool, "mae_base", {WEIGHTS: CONTENT})
    killed = threading.Event()

    def give_half(handler: Handler) -> None:
        handler.answer(200, len(CONTENT))
        handler.wfile.write(CONTENT[:200_000])
        killed.wait(60)

    server.lies[f"/{WEIGHTS}"] = give_half
    script = KILLED.format(
        tools=str(ROOT / "tools"), sources={key: tool.SOURCES[key] for key in [("mae_base", "pretrain")]}
    )
    part = tmp_path / "output" / WORK / PART
    with subprocess.Popen(
        [sys.executable, "-c", script], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT), "no_proxy": "*"},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    ) as process:  # fmt: skip
        try:
            deadline = time.monotonic() + 60
            while not part.exists() or part.stat().st_size < 200_000:
                assert process.poll() is None and time.monotonic() < deadline
                time.sleep(0.01)
            with pytest.raises(BlockingIOError, match="another run is downloading"):  # while that one lives
                run(tool, "mae_base", tmp_path / "output")
            process.send_signal(number)
            process.communicate(timeout=60)
        finally:
            killed.set()
            process.kill()
    assert part.read_bytes() == CONTENT[:200_000]
    server.lies.clear()
    run(tool, "mae_base", tmp_path / "output")
    assert server.ranges == [None, "bytes=200000-"]
    assert (tmp_path / "output" / WEIGHTS).read_bytes() == CONTENT and names_in(tmp_path / "output") == {WEIGHTS}


def test_full_disk_in_mid_download_is_final_and_keeps_what_came(server, tool, tmp_path):
    serve(server, tool, "mae_base", {WEIGHTS: CONTENT})
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, before[1]))  # as a full disk, for files of this process
    try:
        with pytest.raises(OSError, match=rf"{PART} cannot be written: .*File too large; make room and run again"):
            run(tool, "mae_base", tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert len(server.ranges) == 1 and names_in(tmp_path) == {WORK}
    come = (tmp_path / WORK / PART).read_bytes()
    assert len(come) == 200_000 and CONTENT.startswith(come)
    run(tool, "mae_base", tmp_path)
    assert server.ranges[1:] == ["bytes=200000-"] and (tmp_path / WEIGHTS).read_bytes() == CONTENT


@pytest.mark.parametrize("kind", ["link to a folder", "link to nothing", "file"])
@pytest.mark.parametrize(("name", "target"), [("mae_base", WEIGHTS), ("pets", "pets")])
def test_folder_that_somebody_planted_is_not_written_to(name, target, kind, server, tool, tmp_path):
    serve(server, tool, "mae_base", {WEIGHTS: CONTENT})
    serve(server, tool, "pets", pets_archives())
    mine, output = tmp_path / "mine", tmp_path / "output"
    output.mkdir()
    (mine / "unpacked").mkdir(parents=True)
    (mine / "unpacked" / "thesis.txt").write_text("mine")
    work = output / f"{target}.download"
    work.write_text("theirs") if kind == "file" else work.symlink_to(mine if kind == "link to a folder" else "nothing")
    with pytest.raises(FileExistsError, match=rf"{target}\.download is a link, a file or another user's folder"):
        run(tool, name, output)
    assert [str(path.relative_to(mine)) for path in mine.rglob("*")] == ["unpacked", "unpacked/thesis.txt"]
    assert server.ranges == [] and names_in(output) == {work.name}


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder to another user")
def test_folder_or_part_of_another_user_is_not_continued(server, tool, tmp_path):
    serve(server, tool, "mae_base", {WEIGHTS: CONTENT})
    part = begin_part(server, tmp_path, b"x" * 1000)
    os.chown(part, 12345, -1)
    os.chown(part.parent, 12345, -1)
    with pytest.raises(FileExistsError, match="another user's folder"):
        run(tool, "mae_base", tmp_path)
    os.chown(part.parent, os.geteuid(), -1)
    run(tool, "mae_base", tmp_path)
    assert (tmp_path / WEIGHTS).read_bytes() == CONTENT and server.ranges == [None]


@pytest.mark.parametrize("kind", ["link", "hard link", "pipe"])
@pytest.mark.parametrize("name", [PART, f"{PART}.json"])
def test_links_in_the_folder_are_not_written_through(name, kind, server, tool, tmp_path):
    serve(server, tool, "mae_base", {WEIGHTS: CONTENT})
    mine, output = tmp_path / "mine", tmp_path / "output"
    mine.write_text("mine")
    planted = begin_part(server, output, CONTENT[:1000]).with_name(name)
    planted.unlink()
    if kind == "pipe":
        os.mkfifo(planted)
    else:
        planted.symlink_to(mine) if kind == "link" else planted.hardlink_to(mine)
    planted.parent.chmod(0o777)  # as it would have to be for somebody else
    run(tool, "mae_base", output)
    assert mine.read_text() == "mine" and mine.stat().st_nlink == 1
    assert (output / WEIGHTS).read_bytes() == CONTENT and names_in(output) == {WEIGHTS}


@pytest.mark.parametrize("kind", ["link", "hard link"])
def test_lock_that_is_a_link_empties_nothing(kind, server, tool, tmp_path):
    serve(server, tool, "mae_base", {WEIGHTS: CONTENT})
    mine, output = tmp_path / "mine", tmp_path / "output"
    mine.write_text("mine")
    lock = begin_part(server, output, CONTENT[:1000]).with_name("lock")
    if kind == "link":
        lock.symlink_to(mine)
        with pytest.raises(OSError, match=rf"{WORK}/lock is a link, which is not followed; remove it"):
            run(tool, "mae_base", output)
    else:  # nothing is ever written to a lock, and only this name of it goes
        lock.hardlink_to(mine)
        run(tool, "mae_base", output)
    assert mine.read_text() == "mine"


def test_folder_is_closed_to_others_and_the_file_is_not(server, tool, tmp_path):
    serve(server, tool, "mae_base", {WEIGHTS: CONTENT})
    server.ignores_ranges, server.cuts = True, 100
    with pytest.raises(ConnectionError):
        run(tool, "mae_base", tmp_path)
    assert (tmp_path / WORK).stat().st_mode & 0o777 == 0o700
    server.cuts = 0
    run(tool, "mae_base", tmp_path)
    umask = os.umask(0)
    os.umask(umask)
    assert (tmp_path / WEIGHTS).stat().st_mode & 0o777 == 0o666 & ~umask


def test_pipe_under_the_final_name_is_not_waited_for(server, tool, tmp_path):
    os.mkfifo(tmp_path / WEIGHTS)
    with pytest.raises(OSError, match="is no regular file"):
        run(tool, "mae_base", tmp_path)


@pytest.mark.parametrize("name", ["mae_base", "ade20k"])
def test_file_that_is_there_needs_no_writing(name, server, tool, tmp_path, capsys):
    serve(server, tool, "mae_base", {WEIGHTS: CONTENT})
    serve(server, tool, "ade20k", {"ADEChallengeData2016.zip": pack_zip(ade20k_files())})
    run(tool, name, tmp_path)
    before = tmp_path.stat().st_mtime_ns
    run(tool, name, tmp_path)
    assert tmp_path.stat().st_mtime_ns == before  # as a folder that is read-only needs it
    assert re.search(r"is there: verified|is complete", capsys.readouterr().out.splitlines()[-1])


@pytest.mark.parametrize("content", [CONTENT, b"<!DOCTYPE html><title>Please log in</title>"])
def test_wrong_checksum_leaves_nothing(content, server, tool, tmp_path):
    serve(server, tool, "mae_base", {WEIGHTS: content}, lambda _: checksum(b"other", 6))
    right, wrong = checksum(content).split(":")[1], checksum(b"other", 6).split(":")[1]
    with pytest.raises(ValueError, match=rf"has the md5 {right}, but that of .*{WEIGHTS} is {wrong}; it was removed"):
        run(tool, "mae_base", tmp_path)
    assert names_in(tmp_path) == set()


@pytest.mark.parametrize("content", [b"<!DOCTYPE html><title>Please log in</title>", b"PK\x03\x04 and no end"])
def test_what_is_no_file_of_weights_is_refused_where_no_checksum_is_known(content, server, tool, tmp_path):
    serve(server, tool, "mae_base", {WEIGHTS: content}, lambda _: None)
    with pytest.raises(ValueError, match=r"is no file of weights: it begins with b'(<!|PK)'; it was removed"):
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
    serve(server, tool, "mae_base", {WEIGHTS: content}, lambda _: None)
    run(tool, "mae_base", tmp_path / "sound")
    assert "not verified, no published checksum; the checksums of the parts inside it agree" in capsys.readouterr().out
    middle = len(content) // 2
    server.files[f"/{WEIGHTS}"] = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
    with pytest.raises(ValueError, match=r"is damaged: .* does not have its checksum; it was removed"):
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
    with pytest.raises(OSError, match=r"getting ADEChallengeData2016\.zip needs"):  # room for the file alone
        run(tool, "ade20k", tmp_path)
    assert server.ranges[-1] is None and names_in(tmp_path) == {WEIGHTS}


@pytest.mark.parametrize(("name", "target"), [("mae_base", WEIGHTS), ("pets", "pets")])
def test_second_run_at_once_is_refused(name, target, server, tool, tmp_path):
    serve(server, tool, "mae_base", {WEIGHTS: CONTENT})
    serve(server, tool, "pets", pets_archives())
    with (
        transfer.private_folder(tmp_path / f"{target}.download"),
        pytest.raises(BlockingIOError, match=rf"another run is downloading .*/{target}; wait for it"),
    ):
        run(tool, name, tmp_path)
    assert server.ranges == []
    run(tool, name, tmp_path)
    assert names_in(tmp_path) == {target}


def test_lock_that_a_run_at_its_end_removes_holds_nothing(server, tool, tmp_path, monkeypatch):
    serve(server, tool, "mae_base", {WEIGHTS: CONTENT})
    flock = fcntl.flock

    def end_the_other_run_first(lock, how):
        (tmp_path / WORK / "lock").unlink()
        flock(lock, how)

    monkeypatch.setattr(fcntl, "flock", end_the_other_run_first)
    with pytest.raises(BlockingIOError, match="another run is downloading"):
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


def pack_tar(files: dict[str, bytes], mode: int = 0o644, **special: tuple[bytes, str]) -> bytes:
    """Pack files, and behind them what is no file: type and what it links to by name."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode = len(content), mode
            archive.addfile(entry, io.BytesIO(content))
        for name, (kind, target) in special.items():
            entry = tarfile.TarInfo(name)
            entry.type, entry.linkname = kind, target
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


def pets_archives(parts: dict[str, tuple[str, ...]] = PETS) -> dict[str, bytes]:
    stems = [stem for part in parts.values() for stem in part]
    images = {f"images/{stem}.jpg": picture((4, 3)) for stem in stems} | {"images/Abyssinian_1.mat": b"no image"}
    annotations = {f"./annotations/trimaps/{stem}.png": label_map(TRIMAP) for stem in stems}
    annotations["./annotations/trimaps/._Abyssinian_1.png"] = b"a file manager's"
    for part, members in parts.items():
        annotations[f"./annotations/{part}.txt"] = "".join(f"{stem} 1 1 1\n" for stem in members).encode()
    return {"images.tar.gz": pack_tar(images), "annotations.tar.gz": pack_tar(annotations)}


def test_imagenette_gets_imagenets_layout(server, tool, tmp_path, capsys):
    serve(server, tool, "imagenette", {"imagenette2-160.tgz": pack_tar(imagenette_files())})
    run(tool, "imagenette", tmp_path, "--size", "160")
    root = tmp_path / "imagenette2-160"
    train, validation, _ = find_splits(root)
    assert [len(list_images(folder)) for folder in (train, validation)] == [6, 4]
    assert list_images(train).classes == list_images(validation).classes == ("n01440764", "n02102040")
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
    train, validation = (list_images(folder) for folder in find_splits(root)[:2])
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


def test_trimap_of_other_values_is_refused(server, tool, tmp_path):
    archives = pets_archives()
    archives["annotations.tar.gz"] = pack_tar(
        {"annotations/trainval.txt": b"Abyssinian_1", "annotations/trimaps/Abyssinian_1.png": label_map(TRIMAP + 1)}
    )
    serve(server, tool, "pets", archives)
    with pytest.raises(ValueError, match=r"Abyssinian_1\.png has the label values 4, which are no classes"):
        run(tool, "pets", tmp_path)
    assert names_in(tmp_path) == {"pets.download"}


HOSTILE = {
    "imagenette": {
        "above": pack_tar({**imagenette_files(), "imagenette2-160/../../evil": b"x"}),
        "absolute": pack_tar({**imagenette_files(), "/evil": b"x"}),
        "link": pack_tar(imagenette_files(), link=(tarfile.SYMTYPE, "/etc")),
        "hard link": pack_tar(imagenette_files(), link=(tarfile.LNKTYPE, "/etc/hostname")),
        "pipe": pack_tar(imagenette_files(), device=(tarfile.FIFOTYPE, "")),
        "device": pack_tar(imagenette_files(), device=(tarfile.CHRTYPE, "")),
        "windows": pack_tar({**imagenette_files(), "imagenette2-160\\..\\..\\evil": b"x"}),
    },
    "ade20k": {
        "windows": pack_zip({**ade20k_files(), "..\\evil": b"x"}),
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
    with pytest.raises(ValueError, match=r"(evil|link|device)', which is a link, a device or outside its folder"):
        run(tool, name, output, *(["--size", key] if key else []))
    (work,) = output.iterdir()
    assert names_in(work) == {file}
    assert not list(tmp_path.rglob("*evil")) and not Path("/evil").exists()


def test_archive_that_fills_the_disk_is_not_unpacked(server, tool, tmp_path, monkeypatch):
    archive = tmp_path / "imagenette2-160.tgz"
    archive.write_bytes(pack_tar({"large": bytes(500_000), "other": CONTENT, "empty": b""}))
    usage = shutil.disk_usage(tmp_path)
    needed = 800_000
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage._replace(free=needed - 1))
    (tmp_path / "unpacked").mkdir()
    with pytest.raises(OSError, match=r"unpacking imagenette2-160\.tgz needs 0\.00 GB"):
        tool.unpack(archive, tmp_path / "unpacked")
    assert names_in(tmp_path / "unpacked") == set()
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage._replace(free=needed))
    tool.unpack(archive, tmp_path / "unpacked")
    assert names_in(tmp_path / "unpacked") == {"large", "other", "empty"}


def test_unpacked_files_are_the_users_and_have_plain_rights(tool, tmp_path):
    archive = tmp_path / "files.tgz"
    archive.write_bytes(pack_tar({"strange": b"x", "other": b"y"}, mode=0o6077))
    (tmp_path / "unpacked").mkdir()
    tool.unpack(archive, tmp_path / "unpacked")
    for name in ("strange", "other"):
        status = (tmp_path / "unpacked" / name).stat()
        # Neither another user's rights, nor closed to others' reading, nor open to their writing.
        assert status.st_mode & 0o6000 == 0 and status.st_mode & 0o600 == 0o600 and status.st_mode & 0o022 == 0
        assert status.st_uid == os.getuid()


def broken_zip(how: str) -> bytes:
    content = bytearray(pack_zip({"file": b"content"}))
    start = content.index(b"content")
    if how == "content":
        content[start] ^= 1
    if how == "password":
        content[6] |= 1  # the flag in the file's own header, and in the list at the end
        content[content.index(b"PK\x01\x02") + 8] |= 1
    return bytes(content[:-10] if how == "end" else content)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.zip", broken_zip("content")),
        ("a.zip", broken_zip("password")),
        ("a.zip", broken_zip("end")),
        ("a.tgz", b"<html>no archive</html>"),
        ("a.tgz", pack_tar({"file": CONTENT})[:-1000]),
        ("a.tgz", b""),
    ],
)
def test_archive_that_cannot_be_read_is_named(name, content, tool, tmp_path):
    (tmp_path / name).write_bytes(content)
    (tmp_path / "unpacked").mkdir()
    with pytest.raises(ValueError, match=rf"{name} cannot be unpacked: .*; remove it and run the command again"):
        tool.unpack(tmp_path / name, tmp_path / "unpacked")


def test_archive_that_is_there_is_verified_before_it_is_unpacked(server, tool, tmp_path):
    serve(server, tool, "pets", pets_archives())
    work = tmp_path / "pets.download"
    work.mkdir()
    (work / "images.tar.gz").write_bytes(pack_tar({"images/other.jpg": b"x"}))
    with pytest.raises(ValueError, match=r"images\.tar\.gz has the md5 .*; move it away and run the command again"):
        run(tool, "pets", tmp_path)
    assert names_in(work) == {"images.tar.gz"} and server.ranges == []
    (work / "images.tar.gz").write_bytes(server.files["/images.tar.gz"])  # as one got elsewhere
    run(tool, "pets", tmp_path)
    assert len(server.ranges) == 1 and names_in(tmp_path) == {"pets"}


@pytest.mark.parametrize("stem", ["../../../mine", "/etc/mine", "..", "", "images/Abyssinian_1"])
def test_list_that_names_other_files_is_refused(stem, server, tool, tmp_path):
    archives = pets_archives()
    archives["annotations.tar.gz"] = pack_tar({"annotations/trainval.txt": f"{stem} 1 1 1\n".encode()})
    serve(server, tool, "pets", archives)
    (tmp_path / "mine.jpg").write_text("mine")
    with pytest.raises(ValueError, match=rf"trainval\.txt lists {stem!r}, which is no name of an image"):
        run(tool, "pets", tmp_path)
    assert names_in(tmp_path) == {"mine.jpg", "pets.download"}


def test_interrupted_unpacking_leaves_no_half_data_set(server, tool, tmp_path, monkeypatch):
    serve(server, tool, "pets", pets_archives())
    read_label_map, calls = tool.read_label_map, []

    def interrupt(*arguments):
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return read_label_map(*arguments)

    monkeypatch.setattr(tool, "read_label_map", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(tool, "pets", tmp_path)
    assert names_in(tmp_path) == {"pets.download"}
    assert names_in(tmp_path / "pets.download") == {"images.tar.gz", "annotations.tar.gz"}
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


def test_output_that_is_no_folder_is_refused_at_once(server, tool, tmp_path):
    serve(server, tool, "mae_base", {WEIGHTS: CONTENT})
    serve(server, tool, "pets", pets_archives())
    file, link = tmp_path / "file", tmp_path / "link"
    file.write_text("mine")
    link.symlink_to(tmp_path / "nothing")
    for name in ("mae_base", "pets"):
        for output in (file, file / "below", link):
            with pytest.raises((FileExistsError, NotADirectoryError), match=rf"'{output}'"):
                run(tool, name, output)
    assert server.ranges == [] and file.read_text() == "mine" and link.is_symlink()


def test_target_that_is_a_link_to_nothing_is_left_alone(server, tool, tmp_path):
    serve(server, tool, "mae_base", {WEIGHTS: CONTENT})
    serve(server, tool, "pets", pets_archives())
    for name in (WEIGHTS, "pets"):
        (tmp_path / name).symlink_to(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError):
        run(tool, "mae_base", tmp_path)
    with pytest.raises(FileExistsError, match="not from this tool"):
        run(tool, "pets", tmp_path)
    assert server.ranges == [] and names_in(tmp_path) == {WEIGHTS, "pets"}


# Die before the n-th change of the disk or connection, for every n there is; then run the same command once more.
DYING = """
import os, shutil, sys
from pathlib import Path
from tqdm import tqdm

tqdm.monitor_interval = 0  # no thread, so that a fork is safe
sys.path.insert(0, {tools!r})
import download as tool

CHANGES = {{"os.rename", "os.mkdir", "os.link", "os.remove", "os.rmdir", "shutil.rmtree", "socket.connect"}}
tool.SOURCES.update({sources!r})

def listing(root):
    return {{str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}}

def die_before(last):
    count = 0
    def hook(event, arguments):
        nonlocal count
        _, mode, flags = arguments if event == "open" else (None, None, 0)
        if event in CHANGES or (mode and not mode.startswith("r")) or (not mode and flags & os.O_CREAT):
            count += 1
            if count == last:
                os._exit(9)
    sys.addaudithook(hook)

for name, _ in {sources!r}:
    command = lambda output: tool.main(tool.parse_args([name, "--output", str(output)]))
    command(Path("whole"))
    status, step = 9, 0
    while status == 9:
        step, output = step + 1, Path(f"{{name}}_{{step}}")
        pid = os.fork()
        if pid == 0:
            die_before(step)
            command(output)
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        command(output)
        assert listing(output) == listing(Path("whole")), (name, step, sorted(listing(output)))
        shutil.rmtree(output)
    assert status == 0, status
    print(name, step - 1, "deaths")
    shutil.rmtree("whole")
"""


def test_same_command_after_a_death_at_any_step_makes_it_whole(server, tool, tmp_path):
    serve(server, tool, "mae_base", {WEIGHTS: CONTENT})
    serve(server, tool, "pets", pets_archives({"trainval": ("Abyssinian_1",), "test": ("Abyssinian_3",)}))
    sources = {key: tool.SOURCES[key] for key in (("mae_base", "pretrain"), ("pets", None))}
    done = subprocess.run(
        [sys.executable, "-c", DYING.format(tools=str(ROOT / "tools"), sources=sources)],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT), "no_proxy": "*"},
        capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    deaths = {name: int(count) for name, count in re.findall(r"(\w+) (\d+) deaths", done.stdout)}
    assert deaths["mae_base"] >= 4 and deaths["pets"] >= 30  # that the steps were counted at all
    assert names_in(tmp_path) == set()


def test_errors_and_interruptions_of_the_command_are_a_sentence(tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    def message(output: Path) -> str:
        monkeypatch.setattr(sys, "argv", ["download.py", "pets", "--output", str(output)])
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(str(ROOT / "tools" / "download.py"), run_name="__main__")
        return stop.value.code

    (tmp_path / "file").write_text("mine")
    assert re.fullmatch(r"error: .*File exists: '\S+/file'", message(tmp_path / "file"))
    # The address is the publisher's, so the interruption has to come before anything is asked for: at the lock.
    monkeypatch.setattr(fcntl, "flock", interrupt)
    assert message(tmp_path / "folder") == "interrupted; run the command again to go on"


# -------------------------------------------------------------------------------- the addresses


def test_addresses_and_checksums_are_torchvisions(tool):
    ours = {size: tool.SOURCES["imagenette", size] for size in ("160", "320", "full")}
    theirs = {size.removesuffix("px"): {url: f"md5:{md5}"} for size, (url, md5) in Imagenette._ARCHIVES.items()}
    assert ours == theirs
    assert tool.SOURCES["pets", None] == {url: f"md5:{md5}" for url, md5 in OxfordIIITPet._RESOURCES}


def test_every_name_and_variant_can_be_asked_for(tool):
    asked = {
        (args.name, args.variant)
        for name, variant in tool.SOURCES
        for flag in ("--size" if name == "imagenette" else "--kind",)
        for args in [tool.parse_args([name, "--output", "x", *([flag, variant] if variant else [])])]
    }
    assert asked == set(tool.SOURCES) and len(asked) == 3 + 2 + 4 + 5 + 4
    urls = {key: next(iter(sources)) for key, sources in tool.SOURCES.items()}
    assert urls["mae_huge", "finetuned"].endswith("/mae/finetune/mae_finetuned_vit_huge.pth")
    assert urls["mae_base", "full"].endswith("/mae/pretrain/mae_pretrain_vit_base_full.pth")
    assert urls["mae_large", "ganloss"].endswith("/mae/visualize/mae_visualize_vit_large_ganloss.pth")
    with pytest.raises(SystemExit):
        tool.parse_args(["mae_base", "--kind", "ganloss", "--output", "x"])
