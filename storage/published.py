"""Files that others publish: fetched once, and checked against all that is known of them."""

import hashlib
import os
import re
import tarfile
import urllib.parse
import zipfile
import zlib
from pathlib import Path

from storage.files import beside, open_regular, publish, read_text, written_whole
from storage.transfer import Part, fetch, private_folder

# What unpacking raises for damage, and RuntimeError for a password or an unknown compression.
DAMAGED_ARCHIVE = (zipfile.BadZipFile, tarfile.TarError, zlib.error, EOFError, RuntimeError)
PICKLE_START = b"\x80\x02"  # of weights that torch wrote before its files were archives
URL = re.compile(r"https?://", re.IGNORECASE)


def is_url(path: str) -> bool:
    return URL.match(path) is not None


def name_origin(url: str) -> str:
    """Give an address without what may be secret: user and password go, and of a query its SHA-256 stays."""
    parts = urllib.parse.urlsplit(url)
    query = hashlib.sha256(parts.query.encode()).hexdigest() if parts.query else ""
    return parts._replace(netloc=parts.netloc.rpartition("@")[2], query=query, fragment="").geturl()


def verify(file: Path, url: str, checksum: str | None, advice: str) -> str:
    """Check a file against all that is known of it, and say what that was; ValueError where it is another."""
    found = "not verified, no published checksum"
    with open_regular(file) as content:
        start = content.read(len(PICKLE_START))
        content.seek(0)
        if checksum:
            algorithm, digits = checksum.split(":")
            digest = hashlib.file_digest(content, algorithm).hexdigest()
            if not digest.startswith(digits):
                raise ValueError(f"{file} has the {algorithm} {digest}, but that of {url} is {digits}; {advice}")
            if digest == digits:
                return f"verified, it has the published {algorithm} {digits}"
            found = f"the first {len(digits)} digits of its {algorithm}, all that are published, agree ({digits})"
    if zipfile.is_zipfile(file):  # as torch writes weights, with a checksum for each tensor
        try:
            with zipfile.ZipFile(file) as content:
                damaged = content.testzip()
        except DAMAGED_ARCHIVE as error:
            damaged = error
        if damaged:
            raise ValueError(f"{file} is damaged: {damaged} does not have its checksum; {advice}")
        return f"{found}; the checksums of the parts inside it agree"
    if not checksum and url.endswith(".pth") and start != PICKLE_START:  # a page that asks to log in, for example
        raise ValueError(f"{file} is no file of weights: it begins with {start!r}; {advice}")
    return found


def get_file(url: str, checksum: str | None, file: Path, work: Path, room: float = 1) -> None:
    """Download a file unless it exists; ValueError when another one does. `room` is the disk space, in file sizes."""
    if os.path.lexists(file):
        print(f"{file} is there: {verify(file, url, checksum, 'move it away and run the command again')}")
        return
    print(f"downloading {url}")
    for last in (False, True):
        with Part(work / f"{file.name}.part") as part:
            continued = fetch(url, file, part, room)
        try:
            found = verify(part.path, url, checksum, "it was removed")
            break
        except ValueError as error:
            part.remove()
            if last or not continued:  # continued: pieces of several answers, perhaps of several files
                raise ValueError(f"{error}, run the command again") from error
            print(f"{error}; it came in several pieces, so the download starts over")
    publish(part.path, file)
    part.remove()
    print(f"{file}: {found}")


def get_weights(url: str, target: Path) -> Path:
    """Download a file of weights into the folder of what is made of it, unless it is there, and give its path.

    Of a name such as upernet_mae-base-1f0d7b3c.pth the end is the first eight digits of its SHA-256, as torch's and
    MMSegmentation's releases have it, unless it is a date; what has none is not verified, and that is said. Where it
    came from lies beside it, in NAME.source. ValueError where another file, or one from elsewhere, has its name.
    """
    name = url.partition("?")[0].partition("#")[0].rstrip("/").rpartition("/")[2]
    if not name or name.startswith("."):
        raise ValueError(f"{url} names no file; give the address of a file of weights")
    file, digits = target.with_name(name), re.search(r"-(?!(?:19|20)\d{6}\.)([0-9a-f]{8})\.\w+$", name)
    checksum, work = f"sha256:{digits[1]}" if digits else None, beside(file, "download")
    origin, known = name_origin(url), beside(file, "source")
    if file == target:
        raise ValueError(f"{target} is where {url} is downloaded to; choose another target")
    if os.path.lexists(file) and not digits and not (known.is_file() and read_text(known).strip() == origin):
        raise ValueError(
            f"{file} is there, and nothing says that it is from {origin}; give it as it is, or move it away and run "
            "the command again"
        )
    file.parent.mkdir(parents=True, exist_ok=True)
    with private_folder(work):
        get_file(url, checksum, file, work)
    with written_whole(known) as temporary:
        temporary.write_text(f"{origin}\n", encoding="utf-8")
    return file
