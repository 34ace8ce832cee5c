"""``opdengine.train``: a run from Python, with settings as they stand in a file and objects in place of paths."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from opdengine.config.loading import from_mapping, to_mapping
from opdengine.config.sections import SELF, DataConfig, TeacherConfig
from opdengine.config.train import TrainConfig
from opdengine.data.files import rows_in_memory
from opdengine.errors import ConfigError
from opdengine.models.files import some
from opdengine.models.given import PREFIX, Given, given
from opdengine.models.lora import fingerprint, is_adapted
from opdengine.training.callbacks import Callbacks
from opdengine.training.run import TrainResult
from opdengine.training.run import train as run

logger = logging.getLogger(__name__)

DATA = ("train_data", "eval_data")


def train(
    config: TrainConfig | Mapping[str, Any] | None = None,
    *,
    tokenizer: Any = None,
    callbacks: Sequence[Any] = (),
    progress: bool = True,
    **settings: Any,
) -> TrainResult:
    """Train a student, as ``opdengine train`` does; in a notebook, too.

    Example:

        result = train(model=student, tokenizer=tokenizer, teachers=[{"model": teacher, "name": "large"}],
                       train_data=[{"prompt": "What is 1 + 2?"}], method="opd", output_dir="runs/first", max_steps=20)

    Settings are those of a file: sections are dicts, and what is not said has the default of the method's paper. Where
    they name a model, a ``transformers`` model may stand, and where they name data, a list of rows (dicts) or a
    ``datasets.Dataset``. A student that is given as an object is trained in place.

    Args:
        config: settings, or None. A :class:`TrainConfig` is taken as it is, without the defaults of a paper.
        tokenizer: of the student, where that is an object. A teacher that is an object brings its own
            (``{"model": teacher, "tokenizer": ...}``), or reads with this one.
        callbacks: objects with ``on_step(event)`` or ``on_evaluate(event)``; see
            :class:`opdengine.training.callbacks.Callback`.
        progress: show the run's progress.
        settings: further settings, over those of ``config``.

    Returns:
        The folder of the run, its final model's, the last metrics and all of them by step.

    Raises:
        ConfigError: a setting is not possible, or an object cannot be used.
        As :func:`opdengine.training.run.train`.
    """
    called = Callbacks(callbacks)
    if isinstance(config, TrainConfig) and not settings and tokenizer is None:
        return run(config, progress=progress, callbacks=called)
    data: dict[str, Any] = dict(to_mapping(config) if isinstance(config, TrainConfig) else config or {})
    plain, objects = lift({**data, **settings}, tokenizer)
    read = from_mapping(TrainConfig, plain)
    _require_possible(read, objects)
    with given(objects):
        return run(read, progress=progress, callbacks=called)


def lift(settings: Mapping[str, Any], tokenizer: Any = None) -> tuple[dict[str, Any], dict[str, Given]]:
    """Settings with names in place of objects, and the objects by name.

    Args:
        settings: of a run.
        tokenizer: the student's, where that is an object.

    Raises:
        ConfigError: an object is none that can be used.
    """
    plain, objects = dict(settings), {}
    student = plain.get("model")
    if _is_object(student):
        if tokenizer is None:
            raise ConfigError("the student is given as an object: give its tokenizer, too (tokenizer=...)")
        plain["model"] = name = PREFIX + _described(student, "the student")
        objects[name] = Given(student, tokenizer)
    elif tokenizer is not None:
        raise ConfigError("tokenizer= belongs to a student that is given as an object; a folder has its own")
    if isinstance(teachers := plain.get("teachers"), Sequence) and not isinstance(teachers, str):
        plain["teachers"] = [_lift_teacher(t, i, student, tokenizer, objects) for i, t in enumerate(teachers)]
    for key in DATA:
        if key in plain:
            plain[key] = _lift_data(key, plain[key], objects)
    return plain, objects


def _is_object(value: Any) -> bool:
    return value is not None and not isinstance(value, (str, Mapping))


def _lift_teacher(teacher: Any, number: int, student: Any, tokenizer: Any, objects: dict[str, Given]) -> Any:
    if isinstance(teacher, TeacherConfig):
        return dataclasses.asdict(teacher)
    section = dict(teacher) if isinstance(teacher, Mapping) else {"model": teacher}
    model = section.get("model")
    if not _is_object(model):
        return section if isinstance(teacher, Mapping) else teacher
    where = f"teachers.{number}"
    if model is student:
        raise ConfigError(f"{where} is the student itself, which is trained in place; give copy.deepcopy(model)")
    its_own = section.pop("tokenizer", None) or tokenizer
    if its_own is None:
        raise ConfigError(f"{where} is given as an object: give its tokenizer, too ('tokenizer' beside 'model')")
    described = _described(model, where)
    section["name"] = section.get("name") or f"teacher_{number}"
    section["model"] = name = f"{PREFIX}{described} with the weights {fingerprint(model)}"
    objects[name] = Given(model, its_own)
    return section


def _described(model: Any, where: str) -> str:
    """What a model object is, in words."""
    if is_adapted(model):
        raise ConfigError(
            f"{where} has an adapter of peft; give the model itself (merge_and_unload(), or unload() to leave the "
            "adapter out), and train one with lora: {...}"
        )
    if not all(hasattr(model, name) for name in ("get_output_embeddings", "save_pretrained", "config", "dtype")):
        raise ConfigError(f"{where} is a {type(model).__name__}; give a causal language model of transformers")
    parameters = dict(model.named_parameters())
    if any(".lora_" in name for name in parameters):
        raise ConfigError(
            f"{where} still has the layers of an adapter, of an earlier run perhaps; take them out with "
            "result.model.unload(), or load the model again"
        )
    count = sum(p.numel() for p in parameters.values())
    return f"{type(model).__name__} of {count} parameters in {str(model.dtype).removeprefix('torch.')}"


def _lift_data(key: str, value: Any, objects: dict[str, Given]) -> Any:
    if isinstance(value, (str, DataConfig)) or value is None:
        return value
    if _are_rows(value):
        return [_named_rows(key, value, objects)]
    if isinstance(value, Mapping) and "path" not in value:
        raise ConfigError(f"{key} is a mapping of {sorted(map(str, value))[:5]}; choose one split or source of it")
    sources = [value] if isinstance(value, Mapping) else list(value)
    return [_lift_source(key if len(sources) == 1 else f"{key}.{i}", s, objects) for i, s in enumerate(sources)]


def _lift_source(key: str, source: Any, objects: dict[str, Given]) -> Any:
    if isinstance(source, Mapping):
        path = source.get("path")
        return {**source, "path": _named_rows(key, path, objects)} if _are_rows(path) else source
    if isinstance(source, DataConfig):
        return dataclasses.asdict(source)
    return _named_rows(key, source, objects) if _are_rows(source) else source


def _are_rows(value: Any) -> bool:
    """Whether something is rows: a data set, or a list of mappings that are no sources."""
    if hasattr(value, "column_names") and not isinstance(value, Mapping):
        return True
    if isinstance(value, (str, Mapping, DataConfig)) or not isinstance(value, Sequence) or not value:
        return False
    return all(isinstance(row, Mapping) and ("path" not in row or {"prompt", "messages"} & set(row)) for row in value)


def _named_rows(key: str, rows: Any, objects: dict[str, Given]) -> str:
    found = [dict(row) for row in (rows_in_memory(rows) if hasattr(rows, "with_format") else rows)]
    digest = hashlib.sha256()
    for row in found:
        digest.update(json.dumps(row, default=_content, sort_keys=True).encode("utf-8", "surrogatepass"))
    label = key.replace(".", "_")
    name = f"{PREFIX}{label} of {len(found)} rows with the content {digest.hexdigest()[:16]}"
    objects[name] = Given(rows=found)
    return name


def _content(value: Any) -> Any:
    """What a value of a row is, where JSON has no form for it: of pictures and arrays every byte counts."""
    about = [type(value).__name__, *(str(getattr(value, name, "")) for name in ("mode", "size", "dtype", "shape"))]
    if isinstance(value, (bytes, bytearray)):
        return [about[0], hashlib.sha256(value).hexdigest()]
    if not callable(getattr(value, "tobytes", None)):
        return str(value)
    palette = str(value.getpalette()) if hasattr(value, "getpalette") else ""
    try:
        return [*about, palette, hashlib.sha256(value.tobytes()).hexdigest()]
    except (OSError, SyntaxError):  # a damaged picture, which is refused by name when it is read
        return about


def _require_trainable(student: Any) -> None:
    """Refuse a student that is frozen as a whole; one of which a part is frozen is trained so, and a line says it."""
    frozen = [name for name, parameter in student.named_parameters() if not parameter.requires_grad]
    count = len(list(student.parameters()))
    if len(frozen) == count:
        raise ConfigError(
            "no parameter of the student requires a gradient, so nothing would be trained: call "
            "model.requires_grad_(True) (after unload() of an adapter, say)"
        )
    if frozen:
        logger.info("%d of the student's %d parameters are frozen, as given: %s", len(frozen), count, some(frozen))


def _require_possible(config: TrainConfig, objects: Mapping[str, Given]) -> None:
    """Refuse what needs the files of a model that is only here."""
    models = {name: found.model for name, found in objects.items() if found.model is not None}
    for name, model in models.items():
        used = getattr(model.config, "_attn_implementation", None)
        if config.attn_implementation not in ("auto", used):
            raise ConfigError(
                f"attn_implementation={config.attn_implementation!r} is not that of the object {name!r} ({used}); "
                "load it with that, or leave the setting out"
            )
    if config.model not in models:
        return
    for i, teacher in enumerate(config.teachers):
        if teacher.model == SELF and not config.shares_student(teacher):
            raise ConfigError(
                f"teachers.{i}.weights={teacher.weights!r} holds weights beside the student's, which is given as an "
                "object and trained in place: save it with save_pretrained and name the folder"
                + ("" if teacher.weights == "ema" else ", train an adapter (lora), or give copy.deepcopy(model)")
            )
    if config.lora is None:
        _require_trainable(models[config.model])
    for setting, wanted in (
        ("use_vllm", config.use_vllm),
        ("lora.merge_final", config.lora and config.lora.merge_final),
    ):
        if wanted:
            raise ConfigError(
                f"{setting} reads the files of the student, which is given as an object: save it with save_pretrained "
                "and name the folder"
            )
