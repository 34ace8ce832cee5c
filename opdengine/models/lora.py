"""Low-rank adapters (LoRA, arXiv 2106.09685) on a frozen student, with ``peft``.

Only the adapter is trained, saved and sent to the sampler: a weight W of the base becomes
``W + left @ right``, with ``left = scaling * B`` [out, r] and ``right = A`` [r, in].
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from opdengine.config.sections import LoRAConfig
from opdengine.distributed import Ranks
from opdengine.errors import ConfigError, ModelFileError
from opdengine.models.files import ADAPTER_FILE, read_model, read_object, some, tensor_shapes
from opdengine.models.sharding import split_like, whole, whole_weights

logger = logging.getLogger(__name__)

ADAPTER = "default"
BASE_FILE = "base_model.json"
SAMPLES = 256

UNMERGED = "which cannot be merged into the weights of its model; take one that can (LoRA, IA3, LoHa), or a whole model"

LowRank = Mapping[str, tuple[torch.Tensor, torch.Tensor]]
"""Name of a weight -> (left [..., a, r], right [..., r, b]), float32: their product is added to the weight."""


def add_adapter(model: Any, config: LoRAConfig, left_out: Collection[str] = ()) -> Any:
    """Freeze a model and give it a new adapter, which changes nothing yet.

    Args:
        model: a loaded causal LM; its linear layers are replaced in place.
        config: of the adapter.
        left_out: names of layers that get none.

    Returns:
        The ``PeftModel`` around it. Adapters of models below float32 are float32.

    Raises:
        ConfigError: the target modules do not exist, or are the input or output embedding.
    """
    require_peft()
    from peft import LoraConfig, get_peft_model

    targets = config.target_modules
    adapter = LoraConfig(
        task_type="CAUSAL_LM",
        r=config.r,
        lora_alpha=config.lora_alpha,  # type: ignore[arg-type]
        lora_dropout=config.lora_dropout,
        use_rslora=config.use_rslora,
        target_modules=targets if isinstance(targets, str) else list(targets),
        exclude_modules=sorted(left_out) or None,
    )
    try:
        # peft asks for `is_gradient_checkpointing`, which transformers 5.24 calls deprecated.
        with warnings.catch_warnings(action="ignore", category=FutureWarning):
            adapted = get_peft_model(model, adapter)
    except ValueError as error:
        raise ConfigError(f"lora.target_modules={targets!r} is not possible: {error}") from error
    _refuse_embeddings(base_of(adapted), targets)
    return adapted


def load_adapter(model: Any, folder: Path) -> Any:
    """Like :func:`add_adapter`, with the adapter that :func:`save_model` wrote.

    Raises:
        ConfigError: the adapter belongs to another base model.
    """
    if trained_on := _other_base(model, folder):
        raise ConfigError(
            f"the adapter in {str(folder)!r} was trained on other weights ({trained_on!r}) than those of "
            f"{model.name_or_path!r} now; it is only valid on its own base: put that model back, or start a new run"
        )
    return _with_adapter(model, folder, trained=True)


def merge_adapter(model: Any, folder: Path) -> Any:
    """A plain model from a base and an adapter's folder, under the name of that folder.

    In a quantised base the adapter stays beside the weights, which merging would round to others.

    Raises:
        ModelFileError: the adapter does not fit the base, or is of a kind that changes no weights of it.
    """
    if trained_on := _other_base(model, folder):
        logger.warning("the adapter in %s was trained on other weights or another dtype (%s)", folder, trained_on)
    adapted = _with_adapter(model, folder, trained=False)
    if getattr(model, "is_quantized", False):
        merged = base_of(adapted)
    else:
        if not hasattr(adapted, "merge_and_unload"):  # prompt and prefix tuning
            kind = adapted.peft_config[ADAPTER].peft_type.value
            raise ModelFileError(f"the adapter in {str(folder)!r} is of the kind {kind}, {UNMERGED}")
        _untie(base_of(adapted), folder)
        try:
            merged = adapted.merge_and_unload().requires_grad_(True)
        except (RuntimeError, NotImplementedError) as error:
            raise ModelFileError(f"the adapter in {str(folder)!r} is one ({error}), {UNMERGED}") from error
    merged.name_or_path = str(folder)
    return merged


def _untie(model: Any, folder: Path) -> None:
    """Make tied embeddings two matrices where the adapter has a part of its own for either: merging that into a matrix
    that both share would change the other one, too."""
    inputs, outputs = model.get_input_embeddings(), model.get_output_embeddings()
    own = getattr(outputs, "base_layer", outputs)
    if not any(hasattr(layer, "base_layer") for layer in (inputs, outputs)):
        return
    if getattr(inputs, "base_layer", inputs).weight is own.weight:
        logger.warning("the adapter in %s changes tied embeddings: its model has two matrices in their place", folder)
        own.weight = torch.nn.Parameter(own.weight.detach().clone())
        for config in (model.config, model.config.get_text_config()):
            config.tie_word_embeddings = False


def _with_adapter(model: Any, folder: Path, trained: bool) -> Any:
    require_peft()
    from peft import PeftModel, get_peft_model_state_dict

    if not (folder / ADAPTER_FILE).is_file():
        raise ConfigError(f"{str(folder)!r} has no {ADAPTER_FILE}; adapters are read from safetensors only")
    stored, where = set(tensor_shapes(folder / ADAPTER_FILE)), f"the adapter in {str(folder)!r}"
    name = model.name_or_path
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of what is missing
            warnings.simplefilter("ignore", FutureWarning)  # as in add_adapter
            adapted = PeftModel.from_pretrained(
                model, str(folder), is_trainable=trained, torch_device=str(model.device)
            )
    except RuntimeError as error:
        sizes = " ".join(line.strip() for line in str(error).splitlines() if "size mismatch" in line)
        raise ModelFileError(f"{where} does not fit the model {name!r}: {sizes or error}") from error
    wanted = set(get_peft_model_state_dict(adapted, save_embedding_layers=False))
    if missing := sorted(wanted - stored):
        raise ModelFileError(f"{where} lacks weights: {some(missing)}; they would be random: fetch or save it again")
    # peft saves an embedding that it adapts (or has resized) along with its adapter, and has read it back.
    if left := sorted(stored - wanted - set(adapted.state_dict())):
        raise ModelFileError(f"{where} has weights that the model {name!r} has no place for: {some(left)}")
    return adapted


def is_adapted(model: Any) -> bool:
    """Whether the model came from :func:`add_adapter` or :func:`load_adapter`."""
    return hasattr(model, "peft_config") and hasattr(model, "get_base_model")


def base_of(model: Any) -> Any:
    """The transformers model itself, with the adapter's layers inside where there is one."""
    return model.get_base_model() if is_adapted(model) else model


def freeze_head(model: Any) -> None:
    """Train no weight of the output embedding; where it is tied, the input embedding is the same matrix."""
    model.get_output_embeddings().requires_grad_(False)


def save_model(model: Any, folder: Path, ranks: Ranks | None = None) -> None:
    """Save a model, or its adapter alone with a note on the base that it belongs to.

    All ranks call this; the first one writes.
    """
    ranks = ranks or Ranks()
    adapted = is_adapted(model)
    split = {"state_dict": _on_first(model, ranks, adapted)} if ranks.world_size > 1 else {}
    identity = fingerprint(model) if adapted else ""
    with ranks.agree():
        if ranks.is_first and not adapted:
            model.save_pretrained(folder, **split)
        elif ranks.is_first:
            _save_adapter(model, folder, identity, split)


@torch.no_grad()
def restore_model(model: Any, folder: Path, trust_remote_code: bool = False) -> None:
    """Give a model the weights that :func:`save_model` wrote of it, in place; no rank waits for another.

    Args:
        model: possibly split over the ranks.
        folder: of its weights, or of its adapter's.
        trust_remote_code: run code from the model folder.

    Raises:
        ModelFileError: they are not those of this model.
    """
    if is_adapted(model):
        from peft import get_peft_model_state_dict

        own = model.state_dict(keep_vars=True)
        places = get_peft_model_state_dict(model, state_dict=own, save_embedding_layers=False)
        stored = load_file(folder / ADAPTER_FILE)
    else:
        places = model.state_dict(keep_vars=True)
        options = {"dtype": model.dtype, "trust_remote_code": trust_remote_code, "use_safetensors": True}
        stored = read_model(type(model).from_pretrained, str(folder), **options).state_dict()
    if other := sorted(places.keys() ^ stored.keys()):
        raise ModelFileError(f"the model in {str(folder)!r} has not the weights of the one to restore: {some(other)}")
    for name, place in places.items():
        place.copy_(split_like(stored[name].to(place.dtype), place))


def _on_first(model: Any, ranks: Ranks, adapted: bool) -> dict[str, torch.Tensor]:
    """Whole weights, of an adapted model the adapter's, on the first rank's host."""
    weights = whole_weights(model, host=True)
    return {name: w for name, w in weights if ranks.is_first and (not adapted or ".lora_" in name)}


def _save_adapter(model: Any, folder: Path, identity: str, split: Mapping[str, Any]) -> None:
    base = base_of(model)
    name = str(base.name_or_path)
    config = model.peft_config[ADAPTER]
    config.base_model_name_or_path = str(Path(name).resolve()) if Path(name).is_dir() else name
    # peft writes sets as they iterate, which differs between processes; the same run writes the same bytes.
    for field, value in vars(config).items():
        if isinstance(value, set):
            setattr(config, field, sorted(value))
    model.save_pretrained(folder, save_embedding_layers=False, **split)
    (folder / "README.md").unlink(missing_ok=True)  # peft's empty form
    note = {"name": config.base_model_name_or_path, "fingerprint": identity}
    (folder / BASE_FILE).write_text(json.dumps(note, indent=1), "utf-8")


def read_adapted(folder: str) -> str | None:
    """The base model of a folder that holds an adapter; None for any other path.

    Raises:
        ModelFileError: the adapter does not name it.
    """
    file = Path(folder).expanduser() / "adapter_config.json"
    if not file.is_file():
        return None
    base = read_object(file).get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise ModelFileError(f"{str(file)!r} does not name the model that the adapter belongs to; save it again")
    return base


def architecture(path: str) -> str:
    """The folder or hub name with the configuration of a model: of an adapter, that of its base."""
    seen = [path]
    while base := read_adapted(path):
        path = base
        if path in seen:
            raise ModelFileError(f"the adapter in {seen[0]!r} is said to be its own base; save it again")
        seen.append(path)
    return path


def fingerprint(model: Any) -> str:
    """Identifies the weights of a base, with or without adapter, by 256 values of each."""
    return digest(base_weights(model))


def digest(weights: Iterable[tuple[str, torch.Tensor]]) -> str:
    """Identifies named weights by 256 values of each."""
    parts = []
    for name, tensor in weights:  # one whole tensor at a time, where they are split over ranks
        flat = tensor.detach().reshape(-1)
        chosen = torch.arange(SAMPLES, device=flat.device) * flat.numel() // SAMPLES
        values = flat[chosen] if flat.numel() else flat
        part = hashlib.sha256(f"{name}:{tuple(tensor.shape)}".encode())
        part.update(values.float().cpu().numpy().tobytes())
        parts.append(part.digest())
    return hashlib.sha256(b"".join(sorted(parts))).hexdigest()[:16]


def _other_base(model: Any, folder: Path) -> str:
    """The name of the base that the adapter was trained on, if its weights differ from the model's."""
    file = folder / BASE_FILE
    note = json.loads(file.read_text("utf-8")) if file.is_file() else None
    return "" if note is None or note["fingerprint"] == fingerprint(model) else str(note["name"])


def require_peft() -> None:
    """Raise ConfigError unless peft is installed."""
    if importlib.util.find_spec("peft") is None:
        raise ConfigError('lora needs the package peft: pip install "opdengine[train]"')


def _refuse_embeddings(model: Any, targets: object) -> None:
    """The loss reads the head's weight itself, and a tied input embedding is the same matrix."""
    for layer in (model.get_output_embeddings(), model.get_input_embeddings()):
        if hasattr(layer, "base_layer"):
            raise ConfigError(
                f"lora.target_modules={targets!r} takes in an embedding; leave the input and output embeddings "
                "('embed_tokens', 'lm_head') out: the loss needs the head as one matrix"
            )


def base_weights(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and whole weights of a model without its adapter, as the base alone calls them. All ranks call this."""
    for name, tensor in whole_weights(base_of(model)):
        if ".lora_" not in name:
            yield name.replace(".base_layer", ""), tensor


def adapter_factors(model: Any) -> Iterator[tuple[str, tuple[torch.Tensor, torch.Tensor]]]:
    """What an adapter adds to each weight of its base, as two factors. All ranks call this.

    Yields:
        The name of the base's weight, and float32 (left [..., r], right [..., r, :]) whose product, of that weight's
        shape, is added to it; the adapter's scaling is in ``left``, and of experts the first dimension counts them.
    """
    for name, layer in base_of(model).named_modules():
        if not hasattr(layer, "lora_A"):
            continue
        if getattr(layer, "num_experts", 1) > 1:  # the weights of all experts are one tensor
            left, right, _ = layer.get_delta_factors(ADAPTER)
        else:
            left, right = layer.lora_B[ADAPTER].weight, layer.lora_A[ADAPTER].weight
        left, right = whole(left), whole(right)
        if layer.fan_in_fan_out:  # such layers store their weight as [in, out]
            left, right = right.T, left.T
        left = left.float() * layer.scaling[ADAPTER]
        weight = getattr(layer, "parameter_name", "weight")
        yield f"{name.replace('.base_layer', '')}.{weight}", (left, right.float())
