"""Checkpoints whose weights are stored in few bits: they are loaded as transformers loads them.

The loss reads the head as one matrix; a quantised one is restored once. All else stays as small as it was stored.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from opdengine.config.sections import SELF
from opdengine.config.train import TrainConfig
from opdengine.errors import ConfigError
from opdengine.models.files import read_config
from opdengine.models.given import is_given
from opdengine.models.lora import architecture, read_adapted

logger = logging.getLogger(__name__)

PACKAGES = {
    "torchao": "torchao",
    "bitsandbytes": "bitsandbytes",
    "compressed-tensors": "compressed_tensors",
    "gptq": "gptqmodel",
    "awq": "gptqmodel",
    "hqq": "hqq",
}
"""What reads the checkpoints of a kind of quantisation, by the name of its module; transformers itself reads FP8."""

WHOLE = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
"""Dtypes of a head as it is."""


def quantisation(config: Any) -> str:
    """The kind of quantisation that a model's configuration names; "" for none."""
    given = getattr(config, "quantization_config", None)
    if given is None:
        return ""
    kind = given.get("quant_method", "") if isinstance(given, dict) else getattr(given, "quant_method", "")
    return str(getattr(kind, "value", kind))


def read_quantisation(path: str, trust_remote_code: bool = False) -> str:
    """The same of a model folder, hub name or adapter, for which no weights are read."""
    return quantisation(read_config(architecture(path), trust_remote_code))


def require_quantiser(path: str, trust_remote_code: bool = False) -> None:
    """Raise ConfigError where a model's quantisation is unknown, or the package that reads it is not installed."""
    if is_given(path) or not (kind := read_quantisation(path, trust_remote_code)):
        return
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

    if kind != "bitsandbytes" and kind not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        raise ConfigError(
            f"the model {path!r} is quantised by {kind!r}, which transformers does not know; correct "
            "quantization_config in its config.json, or name the model as it was before"
        )
    wanted = [PACKAGES[kind]] if kind in PACKAGES else []
    if kind == "bitsandbytes" or (wanted and torch.cuda.is_available()):
        wanted.append("accelerate")
    missing = [name.replace("_", "-") for name in wanted if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"the model {path!r} is quantised by {kind} and needs {' and '.join(missing)}: pip install "
            f"{' '.join(missing)}, or name the model as it was before"
        )


@contextmanager
def explained(path: str, kind: str) -> Iterator[None]:
    """What cannot be loaded here says that the model is quantised, and by what; without a ``kind`` nothing is changed.

    Raises:
        ConfigError: in the place of any error within.
    """
    try:
        yield
    except Exception as error:  # every quantiser has errors of its own
        if not kind:
            raise
        said = " ".join(str(error).split()) or type(error).__name__
        raise ConfigError(
            f"the model {path!r} is quantised by {kind} and cannot be loaded here: {said}; use a machine or packages "
            "that can, or name the model as it was before"
        ) from error


@contextmanager
def rounding(model: Any) -> Iterator[None]:
    """What is found wrong with a quantised model's states says that its rounding can be the reason.

    Raises:
        ConfigError: in the place of a ValueError within.
    """
    try:
        yield
    except ValueError as error:
        if not is_quantised(model):
            raise
        raise ConfigError(
            f"{error}. It is quantised by {quantisation(model.config)}: where activations are rounded, too, small "
            "differences become large ones, and it judges the same token differently in every pass; take a checkpoint "
            "of which the weights alone are quantised, or the model as it was before"
        ) from error


def is_quantised(model: Any) -> bool:
    """Whether a loaded model holds quantised weights."""
    return bool(getattr(model, "is_quantized", False))


def restore_head(model: Any, path: str) -> None:
    """Make the head of a quantised model one matrix in the model's dtype; a tied input embedding stays as it is.

    Raises:
        ConfigError: nobody knows how to restore it.
    """
    layer = model.get_output_embeddings()
    weight = getattr(layer, "weight", None)
    if layer is None or (isinstance(layer, nn.Linear) and type(weight) is nn.Parameter and weight.dtype in WHOLE):
        return
    whole = _restored(layer, weight)
    if whole is None:
        raise ConfigError(
            f"the model {path!r} has a quantised head of the kind {type(layer).__name__}, which cannot be restored to "
            "the one matrix that the loss reads; quantise it without its lm_head, or name the model as it was before"
        )
    bias = getattr(layer, "bias", None)
    head = nn.Linear(whole.shape[1], whole.shape[0], bias=bias is not None, device="meta")
    head.weight = nn.Parameter(whole.detach().to(model.dtype), requires_grad=False)
    if bias is not None:
        head.bias = nn.Parameter(bias.detach().to(model.dtype), requires_grad=False)
    model.set_output_embeddings(head)
    logger.info("%s: its quantised head is restored to %s", path, str(model.dtype).removeprefix("torch."))


def _restored(layer: Any, weight: Any) -> torch.Tensor | None:
    """[V, d] the weight of a quantised layer; None: unknown."""
    if type(weight).__name__ in ("Params4bit", "Int8Params"):
        from transformers.integrations.bitsandbytes import dequantize_bnb_weight

        found: torch.Tensor = dequantize_bnb_weight(weight, getattr(layer, "state", None))
        return found
    if (
        isinstance(layer, nn.Linear)
        and hasattr(weight, "dequantize")
        and type(weight) not in (nn.Parameter, torch.Tensor)
    ):
        restored: torch.Tensor = weight.dequantize()
        return restored
    return None


def refuse_quantised(config: TrainConfig, processes: int = 1) -> None:
    """Raise ConfigError for what quantised models of a run cannot do here, before any of them is loaded.

    Args:
        config: of the run.
        processes: that train.
    """
    for teacher in config.teachers:
        if teacher.model == SELF or not teacher.is_here:
            continue
        require_quantiser(teacher.model, config.trust_remote_code)
        kind = read_quantisation(teacher.model, config.trust_remote_code)
        for setting in ("offload", "shard") if kind else ():
            if getattr(teacher, setting):
                raise ConfigError(
                    f"{setting} is not possible for teacher {teacher.name!r}, which is quantised by {kind}: nobody but "
                    "its own package moves or splits its weights; leave it out"
                )
    require_quantiser(config.model, config.trust_remote_code)
    if not (kind := read_quantisation(config.model, config.trust_remote_code)):
        return
    averaged = any(t.weights == "ema" for t in config.teachers)
    merges = config.lora is not None and config.lora.merge_final
    refused = (
        (config.lora is None, "training", "such weights cannot be trained; set lora to train an adapter on it"),
        (kind != "bitsandbytes", "training", "adapters are trained on bitsandbytes' 4 and 8 bits only (QLoRA)"),
        (read_adapted(config.model) is not None, "another adapter", "it has one already"),
        (config.use_vllm, "use_vllm", "vLLM would be sent weights of another form; sample with transformers"),
        (processes > 1, f"training in {processes} processes", "its weights are split by nobody; use one"),
        (averaged, "a teacher with weights: ema", "an average is of whole weights; use base or live"),
        (merges, "lora.merge_final", "rounding would change the merged weights; leave it out"),
    )  # fmt: skip
    for bad, what, remedy in refused:
        if bad:
            raise ConfigError(
                f"{what} is not possible with the student {config.model!r}, which is quantised by {kind}: {remedy}, or "
                "name the model as it was before"
            )


def keep_layout(model: Any) -> None:
    """Leave the 4-bit weights of a student as they were stored.

    On CPUs with bfloat16 products in AVX-512, bitsandbytes turns them, at the first pass without gradient, into a
    layout whose products pass no gradient on: every later backward pass would lose what flows through the base without
    a word, and the base would not be recognised when the run is resumed.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
