"""Downloads models of the Hugging Face Hub by name into the Hub's cache.

The package `huggingface_hub` does the work, so HF_HOME, HF_ENDPOINT, HF_HUB_OFFLINE and tokens
apply as everywhere. Its import is slow, and happens for names only, not for folders. Nothing here
knows of tensors.
"""

import os
import re
import warnings
from collections.abc import Iterable
from pathlib import Path

from backend.errors import UserError

PART = r"\w(?:[\w.-]{0,94}\w)?"
NAME = re.compile(rf"(?!.*(?:--|\.\.))(?:{PART}/)?{PART}(?<!\.git)", re.ASCII)


def is_name(path: Path) -> bool:
    """Whether the path could be a name on the Hub: `gpt2` or `owner/name`."""
    return NAME.fullmatch(path.as_posix()) is not None


class Repository:
    """A repository of the Hub. All files are of one commit.

    UserError for files that are neither in the cache nor on the Hub, or cannot be downloaded.
    """

    def __init__(self, name: str):
        os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # our errors say it in one line
        warnings.filterwarnings("ignore", module="huggingface_hub")
        try:
            import huggingface_hub
        except ImportError:
            raise UserError(
                f"there is no model folder {name}; models of the Hugging Face Hub are fetched by "
                "name with the package huggingface_hub: pip install '.[gpt2]'"
            ) from None
        self.client, self.name = huggingface_hub, name
        self.revision, self.is_reached = "main", False

    def fetch(self, *files: str, optional: Iterable[str] = ()) -> Path:
        """The path of the first of `files` that the repository has.

        Optional files are downloaded first: once one of `files` is in the cache, all are there.
        """
        path = next(filter(None, map(self.cached, files)), None)
        if path is None:
            for file in optional:
                self.download(file)
            path = next(filter(None, map(self.download, files)), None)
        if path is None:
            has_weights = files[0].endswith(".safetensors")
            pickles = ": pickles (pytorch_model.bin) are not loaded" if has_weights else ""
            raise UserError(f"{self.name} on the Hub has no {' or '.join(files)}{pickles}")
        self.revision = path.parent.name  # snapshots/COMMIT/FILE
        return path

    def cached(self, file: str) -> Path | None:
        path = self.client.try_to_load_from_cache(self.name, file, revision=self.revision)
        return Path(path) if isinstance(path, str) else None

    def download(self, file: str) -> Path | None:
        """The path of the file in the cache; None if the repository lacks the file."""
        try:
            if not self.is_reached:  # without a network, a download tries for half a minute
                url = self.client.hf_hub_url(self.name, file, revision=self.revision)
                self.client.get_hf_file_metadata(url)
                self.is_reached = True
            return Path(self.client.hf_hub_download(self.name, file, revision=self.revision))
        except Exception as error:  # the classes change with the version of the client
            errors = self.client.errors
            is_missing = isinstance(error, errors.EntryNotFoundError)
            if is_missing and not isinstance(error, errors.LocalEntryNotFoundError):
                return None
            raise UserError(self.explain(error, file)) from error

    def explain(self, error: Exception, file: str) -> str:
        errors, constants = self.client.errors, self.client.constants
        no_folder = f"there is no model folder {self.name}, and"
        cause = error.__cause__ or error
        status = getattr(getattr(cause, "response", None), "status_code", None)
        if isinstance(error, errors.GatedRepoError):
            return (
                f"{self.name} is gated: ask for access at {constants.ENDPOINT}/{self.name}, "
                "then log in with: hf auth login"
            )
        if status in (401, 404):  # without a login, unknown names are 401
            return f"{no_folder} no such name on the Hub (if the model is private: hf auth login)"
        if isinstance(error, errors.OfflineModeIsEnabled):
            cache = constants.HF_HUB_CACHE
            return f"{no_folder} the cache {cache} lacks its {file} (HF_HUB_OFFLINE)"
        if isinstance(error, OSError) and error.strerror and not isinstance(error, ConnectionError):
            return f"cannot store {file} in {constants.HF_HUB_CACHE}: {error.strerror}"
        reason = f"HTTP status {status}" if status else " ".join(str(cause).split())
        return f"{no_folder} {constants.ENDPOINT} does not give its {file}: {reason:.200}"
