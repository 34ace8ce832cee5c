"""The processor of a model that sees, with Pillow alone: torchvision is not asked for, and changes nothing.

A processor belongs to its tokenizer, which carries it as ``vision``: whoever encodes chats with that tokenizer encodes
their pictures, too.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from opdengine.errors import ConfigError, ModelFileError
from opdengine.models.files import read_config
from opdengine.models.given import is_given
from opdengine.models.lora import architecture
from opdengine.models.vision import Vision

logger = logging.getLogger(__name__)

FILES = ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json", "chat_template.json")
"""What a processor is made of, beside the tokenizer; a saved model gets copies."""


def can_see(config: Any) -> bool:
    """Whether a configuration is of a model that reads pictures and text and writes text."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as KNOWN

    saved = (getattr(config, "architectures", None) or [KNOWN.get(getattr(config, "model_type", ""))])[0]
    return getattr(config, "vision_config", None) is not None and saved in set(KNOWN.values())


def reader_of(config: Any, sees: bool) -> Any:
    """The class that loads a model: with its tower, or its language model alone where it can be had so.

    Args:
        config: of the model.
        sees: whether it is given pictures.
    """
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    whole = can_see(config) and (sees or type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING)
    return AutoModelForImageTextToText if whole else AutoModelForCausalLM


def give_eyes(tokenizer: Any, path: str, *, sees: bool = True, trust_remote_code: bool = False) -> None:
    """Set the tokenizer's ``vision`` where its model sees and is to; else it is None.

    The files of the processor are kept as ``processor_files`` in either case: a model that sees is saved with them,
    also one that was given no pictures.

    Args:
        tokenizer: of the model; has its chat template, or gets the processor's.
        path: of the model, or of a tokenizer alone, which belongs to none.
        sees: whether the model is given pictures.

    Raises:
        ConfigError: the processor cannot be read or loaded.
    """
    tokenizer.vision, tokenizer.processor_files = None, {}
    if is_given(path):  # an object comes without a processor
        return
    path = architecture(path)
    if Path(path).is_dir() and not (Path(path) / "config.json").is_file():
        return
    try:
        if not can_see(read_config(path, trust_remote_code)):
            return
    except ModelFileError:  # what loads the model says so
        return
    try:
        files = {name: file.read_bytes() for name in FILES if (file := _file(path, name)) is not None}
        tokenizer.processor_files = files
        if not sees:
            return
        if not {"processor_config.json", "preprocessor_config.json"} & set(files):
            logger.warning("%s has no processor of pictures, so it reads text alone", path)
            return
        processor = _load(path, tokenizer, trust_remote_code)
        vision = Vision(processor)
    except Exception as error:  # transformers and the code of a model raise what they like
        said = " ".join(str(error).split()) or type(error).__name__
        raise ConfigError(f"the processor of {path!r} cannot be loaded: {said}") from error
    tokenizer.chat_template = tokenizer.chat_template or processor.chat_template
    tokenizer.vision = vision


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Save a tokenizer, and the processor that belongs to it, beside a model."""
    tokenizer.save_pretrained(folder)
    for name, content in getattr(tokenizer, "processor_files", {}).items():
        (folder / name).write_bytes(content)


def _load(path: str, tokenizer: Any, trust_remote_code: bool) -> Any:
    """Put a processor together without its reader of videos, which cannot be without torchvision."""
    from transformers import AutoImageProcessor, AutoProcessor
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES, processor_class_from_name

    config = read_config(path, trust_remote_code)
    settings = _settings(path)
    if trust_remote_code and "AutoProcessor" in settings.get("auto_map", {}):
        return AutoProcessor.from_pretrained(path, trust_remote_code=True)
    name = settings.get("processor_class") or PROCESSOR_MAPPING_NAMES.get(config.model_type)
    kind: Any = processor_class_from_name(name) if name else None
    if kind is None:
        raise ConfigError(f"transformers knows no processor {name!r} of {config.model_type!r}")
    pictures = _with_pillow(AutoImageProcessor, path, trust_remote_code)
    given = {"image_processor": pictures, "tokenizer": tokenizer}
    parts = [given.get(part) for part in kind.get_attributes()]
    return _without_video(kind).from_args_and_dict(parts, {k: v for k, v in settings.items() if k not in given})


def _with_pillow(auto: Any, path: str, trust_remote_code: bool) -> Any:
    try:
        return auto.from_pretrained(path, backend="pil", trust_remote_code=trust_remote_code)
    except (ImportError, ValueError) as error:
        logger.warning("%s: no reader of pictures with Pillow (%s), so its default one is used", path, error)
        return auto.from_pretrained(path, trust_remote_code=trust_remote_code)


def _without_video(kind: Any) -> Any:
    """The class of processors, which takes None for parts that read no pictures."""

    def check(self: Any, name: str, part: Any) -> Any:
        return type(None) if part is None else kind.check_argument_for_proper_class(self, name, part)

    return type(kind.__name__, (kind,), {"check_argument_for_proper_class": check, "__module__": kind.__module__})


def _settings(path: str) -> dict[str, Any]:
    """What the files of a processor say, its template among it."""
    from transformers import ProcessorMixin

    settings: dict[str, Any] = ProcessorMixin.get_processor_dict(path)[0]
    return settings


def _file(path: str, name: str) -> Path | None:
    """A small file of a model folder or hub name, if it has one."""
    from transformers.utils import cached_file

    if Path(path).is_dir():
        file = Path(path) / name
        return file if file.is_file() else None
    found = cached_file(path, name, _raise_exceptions_for_missing_entries=False)
    return None if found is None else Path(found)
