"""A model's name to a local folder: a folder as it is, a Hub id through huggingface_hub (its cache works offline)."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from tpqwen.errors import ConfigError

FILES = ["*.json", "*.safetensors", "*.jinja", "merges.txt", "vocab.txt"]


def resolve_model(model: str, revision: str | None = None) -> Path:
    """The folder that holds config.json, downloaded if need be (HF_TOKEN, HF_HOME, HF_HUB_OFFLINE are the library's).

    Only safetensors, JSON and template files are fetched. Raises ConfigError saying what was tried.
    """
    folder = Path(model).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ConfigError(f"{folder} has no config.json; a model folder in Hugging Face format is needed")
        return folder
    if folder.is_absolute() or model.startswith((".", "~")):
        raise ConfigError(f"{model} is not a folder")
    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=FILES))
    except LocalEntryNotFoundError:
        raise ConfigError(
            f"{model} is neither a local folder nor in the Hub's cache, and the Hub cannot be reached"
        ) from None
    except (HfHubHTTPError, HFValidationError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigError(f"cannot get {model} from the Hub: {reason}") from None
