"""What a model folder holds, by content: the same model is the same wherever it lies, and another one is not."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from opdengine.models.files import read_config, read_object, weight_files
from opdengine.models.given import is_given
from opdengine.models.lora import read_adapted
from opdengine.models.manifest import hashes_of

TEXTS = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model"),
    *("vocab.json", "merges.txt", "chat_template.jinja"),
)
CONFIGS = ("config.json", "adapter_config.json")
PLACES = ("_name_or_path", "base_model_name_or_path", "transformers_version")
"""Keys of a configuration that say where the model came from, and not what it is."""


def contents(path: str, trust_remote_code: bool = False) -> dict[str, str] | None:
    """The files that make up a model, each with its SHA-256; of a name of the hub its ``revision``, None if unknown.

    Every byte of a folder's weights is read. A base that an adapter names is taken in, as ``base/...``.

    Args:
        path: model folder or hub name.
        trust_remote_code: run code that comes with a hub model's configuration.

    Raises:
        ModelFileError: the folder holds no whole model.
    """
    if is_given(path):
        return {"object": path}  # the name says what it is
    folder = Path(path).expanduser()
    if not folder.is_dir():
        revision = getattr(read_config(path, trust_remote_code), "_commit_hash", None)
        return None if revision is None else {"revision": str(revision)}
    files = {file.relative_to(folder).as_posix(): file for file in weight_files(folder)}
    files |= {name: folder / name for name in TEXTS if (folder / name).is_file()}
    found = hashes_of(files)
    found |= {name: _of_config(folder / name) for name in CONFIGS if (folder / name).is_file()}
    base = read_adapted(path)
    below = contents(base, trust_remote_code) if base is not None else None
    return found | {f"base/{name}": value for name, value in (below or {}).items()}


def differences(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """The names of the files that differ, or are only on one side."""
    return sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))


def _of_config(file: Path) -> str:
    settings = {key: value for key, value in read_object(file).items() if key not in PLACES}
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
