"""Models by name: files of the Hugging Face Hub, from the Hub's cache or fetched into it.

The package `huggingface_hub` does it, so that HF_HOME, HF_ENDPOINT, HF_HUB_OFFLINE and tokens work
as they do everywhere. It is imported for a name alone: folders do not wait for it. Nothing here
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
    """Whether a path leads nowhere and could be a name on the Hub: `gpt2` or `owner/name`."""
    return NAME.fullmatch(path.as_posix()) is not None and not path.exists()


class Repository:
    """A repository of the Hub, at one commit: all that is fetched from it belongs together.

    UserError, of one line, for what is not there and cannot be fetched.
    """

    def __init__(self, name: str):
        os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # errors are told in a line of ours
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

    def fetch(self, *files: str, after: Iterable[str] = ()) -> Path:
        """The first of these files that the repository has, after others that it may have.

        Where one is in the cache, all is there, and the Hub is not asked.
        """
        path = next(filter(None, map(self.cached, files)), None)
        if path is None:
            for file in after:
                self.download(file)
            path = next(filter(None, map(self.download, files)), None)
        if path is None:
            missing = f"{self.name} on the Hub has no {' or '.join(files)}"
            is_of_weights = files[0].endswith(".safetensors")
            pickles = ": pickles (pytorch_model.bin) are not loaded" if is_of_weights else ""
            raise UserError(f"{missing}{pickles}")
        self.revision = path.parent.name  # snapshots/COMMIT/FILE
        return path

    def cached(self, file: str) -> Path | None:
        path = self.client.try_to_load_from_cache(self.name, file, revision=self.revision)
        return Path(path) if isinstance(path, str) else None

    def download(self, file: str) -> Path | None:
        """None if the repository lacks the file."""
        try:
            if not self.is_reached:  # the download would try for half a minute to get there
                url = self.client.hf_hub_url(self.name, file, revision=self.revision)
                self.client.get_hf_file_metadata(url)
                self.is_reached = True
            return Path(self.client.hf_hub_download(self.name, file, revision=self.revision))
        except Exception as error:  # of many kinds, which change with the client's version
            errors = self.client.errors
            is_missing = isinstance(error, errors.EntryNotFoundError)
            if is_missing and not isinstance(error, errors.LocalEntryNotFoundError):
                return None
            raise UserError(self.explain(error, file)) from error

    def explain(self, error: Exception, file: str) -> str:
        errors, constants = self.client.errors, self.client.constants
        nowhere = f"there is no model folder {self.name}, and"
        cause = error.__cause__ or error
        status = getattr(getattr(cause, "response", None), "status_code", None)
        if isinstance(error, errors.GatedRepoError):
            return (
                f"{self.name} is gated: ask for access at {constants.ENDPOINT}/{self.name}, "
                "then log in with: hf auth login"
            )
        if status in (401, 404):  # to those who are not logged in, 401 for any unknown name
            return f"{nowhere} no such name on the Hub (if the model is private: hf auth login)"
        if isinstance(error, errors.OfflineModeIsEnabled):
            return f"{nowhere} the cache {constants.HF_HUB_CACHE} lacks its {file} (HF_HUB_OFFLINE)"
        if isinstance(error, OSError) and error.strerror and not isinstance(error, ConnectionError):
            return f"cannot store {file} in {constants.HF_HUB_CACHE}: {error.strerror}"
        reason = f"HTTP status {status}" if status else " ".join(str(cause).split())
        return f"{nowhere} {constants.ENDPOINT} does not give its {file}: {reason:.200}"
