"""Models of the Hugging Face Hub, hf:OWNER/NAME[@REVISION], wherever a checkpoint's path is taken.

Of a repository weights as safetensors and JSON files are fetched, never pickled ones. huggingface_hub, which
accelerate and timm bring along, keeps them in its cache and is imported when it is first needed. Imports no torch.
"""

import functools
import re
from pathlib import Path

PREFIX = "hf:"
SPEC = re.compile(r"hf:(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./+-]+))?")
IN_THE_CACHE = re.compile(r"models--(?P<owner>[^/]+)--(?P<name>[^/]+)/snapshots/(?P<commit>[0-9a-f]{40})")
WEIGHTS, SHARDS = "model.safetensors", "model.safetensors.index.json"
PUBLISHED = "masked_autoencoder"  # entry of a config.json that is transformers' and timm's as well: tools/publish.py
FETCHED = (WEIGHTS, SHARDS, "config.json", "preprocessor_config.json")


def is_hub_model(path: str | Path) -> bool:
    return str(path).startswith(PREFIX)


@functools.cache
def fetch_model(path: str) -> Path:
    """Give the folder of a model of the Hub, or of its cache where there is no network, once for a process.

    An error says in a sentence why there is none: ValueError, FileNotFoundError, PermissionError or ConnectionError.
    """
    found = SPEC.fullmatch(path)
    if found is None:
        raise ValueError(f"{path} is no model of the Hub; give hf:OWNER/NAME or hf:OWNER/NAME@REVISION, or a folder")
    from huggingface_hub import errors, snapshot_download

    login = "log in by `hf auth login`, or set HF_TOKEN"
    try:
        folder = Path(snapshot_download(found["repo"], revision=found["revision"], allow_patterns=list(FETCHED)))
    except errors.HFValidationError as error:
        raise ValueError(f"{path} is no model of the Hub: {error}") from error
    except errors.GatedRepoError as error:
        raise PermissionError(f"{path} is given after a request on its page alone; make it, and {login}") from error
    except errors.RepositoryNotFoundError as error:
        raise FileNotFoundError(f"there is no model {path} that one may see; if it is private, {login}") from error
    except errors.RevisionNotFoundError as error:
        raise FileNotFoundError(f"{path}: {found['repo']} has no such revision; leave out @ or see its page") from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        raise ConnectionError(
            f"{path} is not in the Hub's cache here, and the Hub cannot be reached; fetch it once on a machine that "
            "can, and set HF_HOME to that cache"
        ) from error
    except errors.HTTPError as error:
        raise ConnectionError(f"{path} cannot be fetched: {' '.join(str(error).split())}") from error
    if not (folder / WEIGHTS).exists() and not (folder / SHARDS).exists():
        raise FileNotFoundError(f"{path} has no {WEIGHTS}, and files of other kinds are not fetched from the Hub")
    return folder


def pin_model(path: str | Path) -> str | None:
    """Give hf:OWNER/NAME@COMMIT of a model of the Hub, or of its folder in the cache; None for other paths."""
    folder = fetch_model(str(path)) if is_hub_model(path) else Path(path)
    found = IN_THE_CACHE.search(folder.as_posix())
    return found and f"{PREFIX}{found['owner']}/{found['name']}@{found['commit']}"
