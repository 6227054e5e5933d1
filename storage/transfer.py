"""Fetch a file from a web server into a folder of this user's own: resumed, bounded in time, no link followed.

What is fetched, and whether it is the right file, is known elsewhere.
"""

# Fetching is written by hand because no library here does all of it: torch.hub and torchvision do not resume (and the
# latter falls back from https to http), huggingface_hub takes any range, and requests leaves resuming to its caller.

import contextlib
import fcntl
import http.client
import os
import shutil
import signal
import stat
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

from storage.files import TEXT, WHOLE, beside, check_entries, escape, read_json, write_json

CONNECTION_ERRORS = (OSError, http.client.HTTPException)  # where nothing but the network can raise them
PASSING_ERRORS = (408, 425, 429, 500, 502, 503, 504)  # answers that may be another one later
RANGE_REFUSED = 416
TIMEOUT_S = 30  # of one wait for the network
MAX_IDLE_TRIES = 5  # tries in a row that bring nothing
MAX_STARTS = 10  # a file that changes more often than this is never whole
RETRY_WAIT_S = 3  # doubled by each idle try
MAX_RETRY_WAIT_S = 120  # also where the server asks for more: five waits of it are as long as STALL_S
STALL_S = 600  # within this time, over all tries ...
STALL_BYTES = 10**6  # ... less than this is given up: at that rate the largest file takes weeks
CHUNK_BYTES = 2**20
MAX_BYTES = 2 * 10**10  # of a file whose length is not said; the largest here has some 10**9


def check_disk(folder: Path, needed: float, what: str) -> None:
    """Refuse what would fill the disk; OSError names both sizes."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        sizes = f"{needed / 1e9:.2f} GB in {folder}, where {free / 1e9:.2f} GB are free"
        raise OSError(f"{what} needs {sizes}; choose another --output or make room")


@contextlib.contextmanager
def private_folder(work: Path) -> Iterator[None]:
    """Hold a folder that nobody else can write to, as the only run; what came stays in it, an empty one goes.

    So nobody plants a link where this tool writes. FileExistsError for one that is not the user's own, and
    BlockingIOError where another run holds it.
    """
    try:
        work.mkdir(0o700)
    except FileExistsError as error:
        found = work.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
            wrong = f"{work} is a link, a file or another user's folder, so nothing is written there"
            raise FileExistsError(f"{wrong}; remove it or choose another --output") from error
        work.chmod(0o700)
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    busy = f"another run is downloading {work.with_suffix('')}; wait for it"
    file = work / "lock"
    if file.is_symlink():
        raise FileExistsError(f"{file} is a link, which is not followed; remove it")
    with open(os.open(file, flags, 0o600), "rb") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BlockingIOError(busy) from error
        if os.fstat(lock.fileno()).st_nlink == 0:  # of a run that was just ending
            raise BlockingIOError(busy)
        try:
            yield
        finally:
            file.unlink(missing_ok=True)
            if work.is_dir() and not any(work.iterdir()):
                work.rmdir()


class TransientError(ConnectionError):
    """A failure that may pass; `wait_s` is how long the server asks to wait."""

    def __init__(self, reason: str, wait_s: int = 0):
        super().__init__(reason)
        self.wait_s = wait_s


class RefusedError(FileNotFoundError):
    """An answer that stays the same, however often it is asked for."""


class GivenUpError(Exception):
    """No try will bring the file. No OSError, so that nothing on the way takes it for one failed try."""


class Redirects(urllib.request.HTTPRedirectHandler):
    """Follow redirects, to other hosts too, but never from an encrypted connection to a plain one."""

    def redirect_request(self, req, fp, code, msg, headers, newurl):
        if not newurl.startswith("https:") and (req.type == "https" or not newurl.startswith("http:")):
            raise ValueError(f"{req.full_url} leads to {newurl}, which is not followed: it is less safe")
        fp.close()  # or urllib reads the whole answer into memory, however long it is
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def whole_number(text: str | None) -> int:
    """Read a number of a header; 0 for anything else, and for more digits than any length or time has."""
    return int(text) if text and text.isdecimal() and len(text) < 19 else 0


def open_url(url: str, headers: dict[str, str]) -> http.client.HTTPResponse:
    """Ask a server for a file; RefusedError where it will not give it, TransientError where asking again may help."""
    request = urllib.request.Request(url, headers={"User-Agent": "mae-download", **headers})
    try:
        return urllib.request.build_opener(Redirects).open(request, timeout=TIMEOUT_S)
    except urllib.error.HTTPError as error:
        if error.code == RANGE_REFUSED and "Range" in headers:
            return error  # which is an answer as well
        error.close()
        answer = f"the server answers {error.code} {' '.join(str(error.reason).split())}"
        if error.code not in PASSING_ERRORS:
            raise RefusedError(answer) from error
        # A date instead of seconds is left to the usual waits
        raise TransientError(answer, whole_number(error.headers["Retry-After"])) from error
    except CONNECTION_ERRORS as error:
        raise TransientError(f"{url} cannot be reached: {' '.join(str(error).split())}") from error


class Part:
    """An unfinished file, open to append to, with what is known of the version on the server that it was begun with.

    One that cannot be continued is begun anew: without such a record, or no plain file with one owner and one name.
    """

    def __init__(self, path: Path):
        self.path, self.version_file = path, beside(path, "json")
        self.received = self.starts = 0
        if os.path.lexists(path):
            found = path.lstat()
            if not stat.S_ISREG(found.st_mode) or found.st_nlink > 1 or found.st_uid != path.parent.stat().st_uid:
                print(f"{path} is a link, has a second name or another owner, and is removed")
                self.remove()
        flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        self.out = os.fdopen(os.open(path, flags, 0o666), "ab", buffering=0)
        try:
            self.version = read_json(self.version_file)
            check_entries(self.version_file, self.version, {WHOLE: "length", TEXT: "url etag last_modified"})
        except (OSError, ValueError):
            self.version = {}

    def __enter__(self) -> "Part":
        return self

    def __exit__(self, *_: object) -> None:
        empty = self.size == 0
        self.out.close()
        if empty:
            self.remove()

    @property
    def size(self) -> int:
        return os.fstat(self.out.fileno()).st_size

    def append(self, content: bytes) -> None:
        rest = memoryview(content)
        try:
            while rest:
                rest = rest[self.out.write(rest) :]
        except OSError as error:
            raise OSError(f"{self.path} cannot be written: {error}; make room and run again to go on") from error
        self.received += len(content)

    def start_over(self, version: dict[str, str | int]) -> None:
        """Empty the part, which is one of this version from now on; GivenUpError where that happens again and again."""
        self.starts += 1
        if self.starts > MAX_STARTS:
            raise GivenUpError(f"the file was begun {MAX_STARTS} times, as the server gave no rest of it")
        self.out.truncate(0)
        self.version_file.unlink(missing_ok=True)
        self.version = version
        if version:
            write_json(self.version_file, version)

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)
        self.version_file.unlink(missing_ok=True)


def version_of(url: str, response: http.client.HTTPResponse) -> dict[str, str | int]:
    """Give what tells two versions of a file on a server apart, as far as it is said."""
    headers = response.headers
    length = headers["Content-Length"]
    if response.status == http.client.PARTIAL_CONTENT:
        length = (headers["Content-Range"] or "").rpartition("/")[2]
    known = {"url": url, "etag": headers["ETag"], "last_modified": headers["Last-Modified"]}
    known["length"] = whole_number(length)
    return {name: value for name, value in known.items() if value}


def ask(url: str, part: Part) -> http.client.HTTPResponse:
    """Ask for what the part lacks, or for all of it where the file has changed since the part was begun."""
    if part.size and (part.version.get("url") != url or part.size > part.version.get("length", 0)):
        print(f"{part.path} is of another file, or of one without a length: the download starts over")
        part.start_over({})
    if part.size == 0:
        return open_url(url, {})
    etag = part.version.get("etag", "W/")  # a weak one does not promise the same bytes
    unchanged = part.version.get("last_modified") if etag.startswith("W/") else etag
    return open_url(url, {"Range": f"bytes={part.size}-"} | ({"If-Range": unchanged} if unchanged else {}))


def accept(url: str, part: Part, response: http.client.HTTPResponse, room: float) -> int | None:
    """Give the length of the whole file, or None for a transfer that marks its own end; an error refuses the answer."""
    headers, given = response.headers, version_of(url, response)
    if response.status in (http.client.PARTIAL_CONTENT, RANGE_REFUSED):
        changed = any(part.version.get(name, value) != value for name, value in given.items())
        rest, wanted = headers["Content-Range"], f"bytes {part.size}-{part.version.get('length', 0) - 1}/"
        if part.size == 0 or changed or not (rest or "").startswith(wanted):
            found = f"asked for the bytes from {part.size} on, {url} gives {rest or 'no range'}"
            part.start_over({})
            raise TransientError(f"{found}, or has changed: the download starts over")
        return part.version["length"]
    if response.status != http.client.OK:
        raise RefusedError(f"the server answers {response.status} {response.reason}")
    encoding = headers["Content-Encoding"] or "identity"
    if headers.get_content_type() == "text/html":  # instead of a rest as well, which is kept
        raise RefusedError("the server gives a web page, perhaps one to log in")
    if encoding != "identity" and not url.endswith("gz"):  # some servers say so of an archive that is one itself
        raise RefusedError(f"the server gives it in the encoding {encoding}, not as it is")
    length = None if response.chunked else given.get("length")
    if length is None and not response.chunked:
        raise RefusedError(f"the server does not say how long it is (Content-Length {headers['Content-Length']})")
    check_disk(part.path.parent, room * (length or 0), f"getting {part.path.stem}")
    if part.size:
        print(f"{url} has changed, or its server gives no rest: the download starts over")
    part.start_over(given if length else {})
    return length


def receive(url: str, part: Part, room: float) -> None:
    """Append what the part lacks, or all of it anew where the server gives no rest; TransientError before the end."""
    with ask(url, part) as response:
        length = accept(url, part, response, room)
        with tqdm(total=length, initial=part.size, unit="B", unit_scale=True, unit_divisor=1024) as bar:
            while length is None or part.size < length:
                try:  # around the reading alone, so that an error of the disk is not taken for one of the network
                    # One read of the socket: `read` would wait for a whole chunk, however slowly it comes
                    chunk = response.read1(CHUNK_BYTES if length is None else min(CHUNK_BYTES, length - part.size))
                except CONNECTION_ERRORS as error:
                    raise TransientError(f"the connection to {url} broke: {error}") from error
                if not chunk and length is None and part.size:
                    return
                if not chunk:
                    raise TransientError(f"{url} closed the connection")
                part.append(chunk)
                bar.update(len(chunk))
                if length is None and part.size > MAX_BYTES:
                    raise GivenUpError(f"more than {MAX_BYTES:,} bytes came, and no length was said")


@contextlib.contextmanager
def stall_alarm(part: Part) -> Iterator[None]:
    """Raise GivenUpError wherever the program waits, for a name, a handshake or a byte, when too little comes."""
    counted = 0

    def check(*_: object) -> None:
        nonlocal counted
        came, counted = part.received - counted, part.received
        if came < STALL_BYTES:
            raise GivenUpError(f"only {came:,} bytes in {STALL_S} s, of which {STALL_BYTES:,} are the least")

    before = signal.signal(signal.SIGALRM, check)
    signal.setitimer(signal.ITIMER_REAL, STALL_S, STALL_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def fetch(url: str, file: Path, part: Part, room: float) -> bool:
    """Download what the part lacks, trying again as long as enough comes; give whether several answers made it."""
    tries, idle_tries = int(part.size > 0), 0
    try:
        with stall_alarm(part):
            while part.size == 0 or part.size != part.version.get("length"):
                before, tries = part.size, tries + 1
                try:
                    receive(url, part, room)
                    break
                except TransientError as error:
                    idle_tries = 0 if part.size > before else idle_tries + 1
                    if idle_tries == MAX_IDLE_TRIES:
                        raise GivenUpError(str(error)) from error
                    wait_s = min(max(error.wait_s, RETRY_WAIT_S * 2**idle_tries), MAX_RETRY_WAIT_S)
                    print(escape(f"{error}; trying again in {wait_s} s"), flush=True)
                    time.sleep(wait_s)
    except RefusedError as error:
        advice = f"If you find it elsewhere, save it as {file}, run again"
        raise FileNotFoundError(f"{url} cannot be downloaded: {error}. {advice}") from error
    except GivenUpError as error:
        length = f"{part.version['length']:,}" if part.version else "an unknown number of"
        came = f"only {part.size:,} of {length} bytes came"
        raise ConnectionError(f"{came}: {error}; run again to go on") from error
    return tries > 1
