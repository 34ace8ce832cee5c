"""A model is trained on what its files say or not at all: whole files, all weights, and a copy of them in memory."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from opdengine.errors import ModelFileError
from opdengine.models.given import find_given, is_given
from opdengine.models.hub import hub_problem
from opdengine.models.lfs import require_no_pointer, require_no_pointers

logger = logging.getLogger(__name__)

WHOLE, INDEX, ADAPTER_FILE = "model.safetensors", "model.safetensors.index.json", "adapter_model.safetensors"
COMPUTED = re.compile(r"(^|\.)(inv_freq|position_ids|masked_bias|num_batches_tracked|rotary_emb\.\w+)$")
"""Buffers that a model computes itself; files of older versions have them or have them not."""

BESIDE = re.compile(r"vision|visual|image|video|audio|speech|modal|mm_projector|(^|\.)(v_head|mtp\w*)\.")
"""Parts that the logits of text do not depend on: those that see and hear, value heads, prediction of later tokens."""


def require_whole_files(folder: Path) -> None:
    """Refuse a model folder whose files are missing, cut off or pointers; reads no weights.

    Raises:
        ModelFileError: names the file and the remedy.
    """
    require_no_pointers(folder)
    for name in ("config.json", "adapter_config.json", "tokenizer_config.json", "generation_config.json"):
        if (folder / name).is_file():
            read_object(folder / name)
    for file, names in weight_files(folder).items():
        if not file.is_file():
            raise ModelFileError(
                f"the weights file {str(file)!r} that {INDEX} names is missing (with {some(names)}); fetch it, or "
                "save the model again"
            )
        if lost := sorted(set(names) - set(tensor_shapes(file))):
            raise ModelFileError(
                f"{INDEX} says that {str(file)!r} has tensors which it lacks: {some(lost)}; the files do not belong "
                "together: fetch or save the model again"
            )


def weight_files(folder: Path) -> dict[Path, list[str]]:
    """The safetensors files that a model or an adapter is read from, with the tensors they are said to hold."""
    name = ADAPTER_FILE if (folder / "adapter_config.json").is_file() else WHOLE
    if (folder / name).is_file():
        return {folder / name: []}
    if name == ADAPTER_FILE or not (folder / INDEX).is_file():
        raise ModelFileError(f"{str(folder)!r} has no {name}; only safetensors are read: save it with save_pretrained")
    places = read_object(folder / INDEX).get("weight_map")
    if not isinstance(places, dict) or not places or not all(isinstance(place, str) for place in places.values()):
        raise ModelFileError(f"{str(folder / INDEX)!r} has no 'weight_map' of names to files; save the model again")
    files: dict[Path, list[str]] = {}
    for name, place in places.items():
        files.setdefault(folder / place, []).append(name)
    return files


def tensor_shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes in a safetensors file, from its header.

    Raises:
        ModelFileError: it is none, or is cut off.
    """
    require_no_pointer(file)
    try:
        with safe_open(file, "pt") as tensors:
            return {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ModelFileError(
            f"the weights file {str(file)!r} is damaged or cut off ({error}); fetch it again, or save the model again"
        ) from error


def read_config(path: str, trust_remote_code: bool = False) -> Any:
    """The configuration of a model folder or hub name.

    Raises:
        ModelFileError: it cannot be read, or says what cannot be.
    """
    from transformers import AutoConfig

    if is_given(path):
        return find_given(path).model.config
    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    except Exception as error:  # huggingface_hub has classes of its own, and so has the code of a model
        if not Path(path).is_dir() and (problem := hub_problem(path, error)):
            raise ModelFileError(f"the model {path!r} {problem}") from error
        said = " ".join(str(error).split()) or type(error).__name__
        raise ModelFileError(f"the configuration of the model {path!r} cannot be read: {said}") from error


def read_model(read: Callable[..., Any], path: str, **options: Any) -> Any:
    """A transformers model of whose weights none is made up, none left out and none part of a file.

    Args:
        read: ``from_pretrained`` of the class to load.
        path: folder or hub name.
        options: of ``from_pretrained``.

    Raises:
        ModelFileError: names the tensors that are missing, left over or of another shape.
    """
    with _without_report() as reports:
        try:
            model, found = read(path, output_loading_info=True, ignore_mismatched_sizes=True, **options)
        except (OSError, ValueError, ImportError, AssertionError):
            raise
        except Exception as error:  # safetensors and huggingface_hub have classes of their own
            lines = [line.partition("|") for report in reports for line in report.splitlines()]
            broken = [name.strip() for name, _, status in lines if "CONVERSION" in status]
            said = " ".join(str(error).split()) or type(error).__name__
            reason = f"parts of {some(broken)} are missing or of another shape" if broken else said
            raise ModelFileError(
                f"the model {path!r} cannot be read: {reason}; correct its config.json, or fetch or save it again"
            ) from error
    require_all_weights(path, model, found)
    return model


def require_all_weights(path: str, model: Any, found: Mapping[str, Any]) -> None:
    """Raise ModelFileError unless a model has taken all of its weights from its files, and all weights of the files.

    Tied weights, buffers that are computed, and what transformers knows to be left out are no fault.

    Args:
        path: of the model.
        model: as loaded.
        found: what ``from_pretrained`` tells about its weights: ``missing_keys``, ``unexpected_keys`` and
            ``mismatched_keys`` (name, shape in the file, shape in the model).
    """
    kind = type(model).__name__
    if wrong := sorted(found["mismatched_keys"]):
        shapes = [f"{name} {tuple(stored)} instead of {tuple(wanted)}" for name, stored, wanted in wrong]
        raise ModelFileError(
            f"the model {path!r} has weights of other shapes than its config.json says: {some(shapes)}; config.json "
            "and weights do not belong together"
        )
    if missing := sorted(name for name in found["missing_keys"] if not COMPUTED.search(name)):
        raise ModelFileError(
            f"the model {path!r} lacks weights that {kind} needs: {some(missing)}{_saved_as(model)}; they would be "
            "random: fetch or save the model again, or name another"
        )
    rest = [name for name in found["unexpected_keys"] if not COMPUTED.search(name)]
    unused = [name for name in rest if BESIDE.search(name) or _predicts_later(name, model.config)]
    if left := sorted(set(rest) - set(unused)):
        raise ModelFileError(
            f"the model {path!r} has weights that {kind} has no place for: {some(left)}{_saved_as(model)}; without "
            "them it is another model: correct its config.json, or save it as a causal language model"
        )
    if unused:
        logger.info("%s: not part of the language model and left out: %s", path, some(sorted(unused)))


def own_memory(model: torch.nn.Module) -> None:
    """Copy every tensor on the CPU out of the file that it was read from.

    Safetensors gives views of a memory-mapped file: who writes to the file changes the model, who cuts it
    off ends the process. Their addresses depend on the file, too, and results on the alignment.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.device.type == "cpu":
            tensor.data = tensor.data.clone()


def _predicts_later(name: str, config: Any) -> bool:
    """Whether a tensor is of the layers after the last one, which predict the tokens after the next."""
    layer = re.search(r"\blayers\.(\d+)\.", name)
    text = config.get_text_config()
    extra = getattr(text, "num_nextn_predict_layers", None) or 0
    return layer is not None and 0 <= int(layer[1]) - text.num_hidden_layers < extra


def _saved_as(model: Any) -> str:
    """Return the class that the model was saved as, if it was another."""
    saved = getattr(model.config, "architectures", None) or []
    return f" (it was saved as {saved[0]})" if saved and saved[0] != type(model).__name__ else ""


def some(names: Iterable[str], most: int = 5) -> str:
    """A list in a sentence, its end as a number."""
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def read_object(file: Path) -> dict[str, Any]:
    """The JSON object in a file; raises ModelFileError where there is none."""
    try:
        value = json.loads(file.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ModelFileError(f"{str(file)!r} is not JSON ({error}); fetch it again, or save the model again") from error
    if not isinstance(value, dict):
        raise ModelFileError(f"{str(file)!r} is not a JSON object; fetch it again, or save the model again")
    return value


@contextmanager
def _without_report() -> Iterator[list[str]]:
    """Keep transformers' table of what did not fit, which it prints whether it matters or not."""
    kept: list[str] = []

    def is_other(record: logging.LogRecord) -> bool:
        text = record.getMessage()
        if "LOAD REPORT" in text:
            kept.append(text)
        return "LOAD REPORT" not in text

    theirs = logging.getLogger("transformers.modeling_utils")
    theirs.addFilter(is_other)
    try:
        yield kept
    finally:
        theirs.removeFilter(is_other)
