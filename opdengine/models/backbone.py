"""A causal language model split into backbone and head, so that its head is never called.

The fused loss wants final hidden states and the head's weight. What the model does between the two
and the logits (scale, bias, soft cap) is read from its configuration and *proved* at load time by
comparing with the model's own logits; a head that cannot be reproduced is refused.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from opd_kernels import LMHead
from opd_kernels.causal_lm import head_constants
from opdengine.errors import ConfigError, ModelFileError
from opdengine.models.batching import (
    changes_in_training,
    choose_image_layout,
    choose_layout,
    find_regimes,
    forget_lengths,
    forward_options,
    probe_sequences,
    prove_causal,
    relative,
    window_of,
)
from opdengine.models.files import own_memory, read_config, read_model, require_whole_files
from opdengine.models.given import find_given, is_given
from opdengine.models.hub import hub_problem
from opdengine.models.lfs import require_no_gguf
from opdengine.models.lora import architecture, base_of, merge_adapter, read_adapted
from opdengine.models.packing import ONE_REGIME, Packed, Regimes, pack
from opdengine.models.processor import can_see, reader_of
from opdengine.models.quantised import explained, is_quantised, quantisation, require_quantiser, restore_head, rounding
from opdengine.models.sharding import Sharded
from opdengine.models.vision import Vision, counts_rows
from opdengine.models.vision_tower import tower
from opdengine.types import Image

logger = logging.getLogger(__name__)

T = TypeVar("T")
B = TypeVar("B")


def load_model(
    path: str,
    *,
    dtype: str = "auto",
    attn_implementation: str = "auto",
    trust_remote_code: bool = False,
    revision: str | None = None,
    device: str | torch.device = "cpu",
    bf16: bool = False,
    sees: bool = False,
) -> Any:
    """Load any causal LM that ``AutoModelForCausalLM`` knows, or ``AutoModelForImageTextToText``.

    A model that sees is loaded with its tower where ``sees`` says so or its language model cannot be had alone.

    A folder that holds a LoRA adapter stands for its base with the adapter merged in. ``bf16``: its passes
    will run under autocast to bfloat16, so that flash-attn can be used with float32 parameters.

    Raises:
        ValueError: the folder does not exist or holds no model in safetensors, files or weights are missing
            or left over, or the attention implementation is not installed.
    """
    check_model_path(path)
    if is_given(path):
        return _prepared(find_given(path).model, dtype, device, bf16)
    if base := read_adapted(path):
        plain = load_model(
            base,
            dtype=dtype,
            attn_implementation=attn_implementation,
            trust_remote_code=trust_remote_code,
            revision=revision,
            device=device,
            bf16=bf16,
            sees=sees,
        )
        return merge_adapter(plain, Path(path))
    logger.info("loading %s", path)
    config = read_config(path, trust_remote_code)
    read = _reader(path, config, sees)
    # Pickled weights (*.bin) can run code when they are read.
    options: dict[str, Any] = {
        "dtype": dtype,
        "trust_remote_code": trust_remote_code,
        "revision": revision,
        "use_safetensors": True,
    }
    kind = quantisation(config)
    if kind:
        require_quantiser(path, trust_remote_code)
        if torch.device(device).type == "cuda":
            options["device_map"] = {"": device}
    with explained(path, kind):
        model = _read_weights(read, path, choose_attention(attn_implementation, device), options)
    if kind:
        restore_head(model, path)
        if not is_quantised(model):
            own = str(model.dtype).removeprefix("torch.")
            logger.warning(
                "%s is quantised by %s, which does not run here: its weights are restored to %s", path, kind, own
            )
    fit_attention(model, bf16=bf16)
    if not is_quantised(model) or model.device != torch.device(device):
        model = model.to(device)
    own_memory(model)
    return model


def _reader(path: str, config: Any, sees: bool) -> Callable[..., Any]:
    """``from_pretrained`` of the class that loads a model: with its tower, or its language model alone."""
    from transformers import AutoModelForCausalLM

    kind = reader_of(config, sees)
    if can_see(config) and kind is AutoModelForCausalLM:
        logger.warning("%s sees, but is loaded as its language model alone: there are no pictures for it", path)
    read: Callable[..., Any] = kind.from_pretrained
    return read


def _read_weights(read: Callable[..., Any], path: str, attention: str, options: Mapping[str, Any]) -> Any:
    """The model, with eager attention where it does not support another one."""
    try:
        return read_model(read, path, attn_implementation=attention, **options)
    except ModelFileError:
        raise
    except ValueError as error:
        if "attention" not in str(error).lower() or attention not in ("sdpa", "flash_attention_2"):
            raise
        logger.warning("%s does not support %s attention: using eager", path, attention)
        return read_model(read, path, attn_implementation="eager", **options)
    except (OSError, ImportError) as error:
        if not Path(path).is_dir() and (problem := hub_problem(path, error)):
            raise ModelFileError(f"the model {path!r} {problem}") from error
        remedy = "; only safetensors are read: save it with save_pretrained" if "safetensors" in str(error) else ""
        raise ValueError(f"the model {path!r} cannot be loaded: {error}{remedy}") from error


def _prepared(model: Any, dtype: str, device: str | torch.device, bf16: bool) -> Any:
    """A model object as it is, on the device."""
    own = str(model.dtype).removeprefix("torch.")
    if dtype not in ("auto", own):
        raise ConfigError(
            f"dtype={dtype!r} is not that of the {type(model).__name__} that was given ({own}); convert it with "
            f"model.to(torch.{dtype}), or give another dtype"
        )
    fit_attention(model, bf16=bf16)
    return model.to(device)


def fit_attention(model: Any, *, bf16: bool = False) -> None:
    """Leave implementations that would refuse a model's attention, or compute another one, and say so.

    flash-attn computes in half precision only; SDPA leaves out a cap of the attention scores (Gemma 2), without a word
    in transformers before 5.24.

    Args:
        model: a causal LM.
        bf16: its passes run under bfloat16 autocast.
    """
    given = chosen = getattr(model.config, "_attn_implementation", None) or ""
    reason = ""
    if "flash" in given and model.dtype == torch.float32 and not bf16:
        chosen, reason = "sdpa", "parameters are float32 and bf16 is off"
    if chosen == "sdpa" and getattr(model.config.get_text_config(), "attn_logit_softcapping", None):
        chosen, reason = "eager", "its attention scores are capped, which SDPA leaves out"
    if chosen != given:
        logger.warning("%s: %s, so its attention is %s", model.name_or_path, reason, chosen)
        model.set_attn_implementation(chosen)


def choose_attention(wanted: str, device: str | torch.device) -> str:
    """Return what "auto" means on a device: flash-attn on a GPU where it is installed, else SDPA."""
    if wanted != "auto":
        return wanted
    has_flash = torch.device(device).type == "cuda" and importlib.util.find_spec("flash_attn") is not None
    return "flash_attention_2" if has_flash else "sdpa"


def default_device() -> torch.device:
    """This process's GPU, by number (threads start on the first one), or the CPU where there is none."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def read_window(path: str, *, trust_remote_code: bool = False) -> int | None:
    """Longest sequence of a model, in tokens, from its configuration alone; None if unbounded."""
    config = read_config(architecture(path), trust_remote_code)
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def read_dtype(path: str, *, trust_remote_code: bool = False) -> torch.dtype | None:
    """Return the dtype of a model's weights from its configuration alone; None if it names none."""
    if is_given(path):
        dtype: torch.dtype = find_given(path).model.dtype
        return dtype
    config = read_config(architecture(path), trust_remote_code)
    return getattr(config, "dtype", None) or getattr(config.get_text_config(), "dtype", None)


def read_generation(path: str, trust_remote_code: bool = False) -> Any:
    """The generation config that a model will have, from its files alone; of an object the object's."""
    from transformers import GenerationConfig

    if is_given(path):
        return find_given(path).model.generation_config
    folder = architecture(path)
    try:
        return GenerationConfig.from_pretrained(folder)
    except OSError:  # it has none of its own
        return GenerationConfig.from_model_config(read_config(folder, trust_remote_code))


def check_model_path(path: str) -> None:
    """Raise ValueError for a local model folder that is missing, damaged, without ``config.json``, or GGUF."""
    if is_given(path):
        find_given(path)
        return
    require_no_gguf(path)
    folder = Path(path).expanduser()
    looks_local = path.startswith((".", "/", "~")) or path.count("/") > 1
    if folder.is_dir():
        if not any((folder / name).is_file() for name in ("config.json", "adapter_config.json")):
            raise ValueError(
                f"model folder {path!r} has no config.json; save a model there with "
                "model.save_pretrained(...) or name another folder"
            )
        require_whole_files(folder)
        if (base := architecture(path)) != path:
            check_model_path(base)
    elif looks_local or folder.exists():
        raise ValueError(
            f"model folder {path!r} does not exist; give a folder written by save_pretrained or "
            "a hub name such as 'Qwen/Qwen3-4B'"
        )


class Backbone:
    """A loaded causal LM whose final hidden states and head are used separately.

    Args:
        model: what :func:`load_model` returns, with an adapter or without.
        name: appears in errors.
        max_tokens: token budget of one forward pass without gradient.
        sharded: splits the model's parameters over ranks; its passes are then collective.
        bf16: passes run under autocast to bfloat16, and hidden states are bfloat16.
        vision: of a model that is given pictures.

    Attributes:
        layout: in which sequences do not change each other; see :mod:`opdengine.models.packing`.
        image_layout: the same of sequences with pictures.
        regimes: which lengths may share a pass.
        tolerance: the relative difference of hidden states that is rounding.
        has_dropout: whether its log-probs in training are not those of the model that is sampled; of a
            frozen model False.

    Raises:
        ValueError: the head cannot be reproduced from weight, bias, scale and soft cap, or tokens see later ones.
    """

    def __init__(
        self,
        model: Any,
        name: str = "model",
        max_tokens: int = 16384,
        sharded: Sharded | None = None,
        bf16: bool = False,
        vision: Vision | None = None,
    ) -> None:
        self.model = model
        self.vision = vision
        self.sharded = sharded
        self.bf16 = bf16
        self._whole = False
        self.name = name
        self.max_tokens = max_tokens
        inner = base_of(model)
        self.trunk = inner.base_model
        self._tower = [part for _, part in tower(inner)]
        self.options = forward_options(model)
        if self.trunk is inner or not _has_embeddings(model):
            raise ValueError(
                f"{name}: {type(inner).__name__} has no separate backbone and output embedding; "
                "only decoder language models with an LM head can be used"
            )
        self._scale, self._softcap = head_constants(model.config.get_text_config())
        self.regimes = ONE_REGIME
        self.with_weights(self._prove_head)
        with rounding(model):
            self.regimes = self.with_weights(self._find_regimes)
            self.tolerance = self.with_weights(self._prove_causal)
            self.layout = self.with_weights(self._choose_layout)
        self.image_layout = "alone" if vision is None else self.with_weights(self._choose_image_layout)
        trained = any(p.requires_grad for p in model.parameters())
        self.has_dropout = trained and self.with_weights(self._changes_in_training)

    @property
    def device(self) -> torch.device:
        place: torch.device = self.trunk.get_input_embeddings().weight.device
        return place

    @property
    def window(self) -> int | None:
        """Longest sequence the model was built for, in tokens."""
        return window_of(self.model.config)

    @property
    def has_split_head(self) -> bool:
        """Whether every rank keeps its rows of the head; then the loss needs :attr:`head_rows`."""
        return self.sharded is not None and self.sharded.head == "rows"

    @property
    def head(self) -> LMHead:
        """The current head; its weight is the live parameter. A split one is gathered, detached: all ranks ask."""
        layer = self.model.get_output_embeddings()
        weight, bias = layer.weight, getattr(layer, "bias", None)
        if self.sharded is not None and self.has_split_head:
            weight, bias = self.sharded.gather(weight), None if bias is None else self.sharded.gather(bias)
        return LMHead(weight, bias, self._scale, self._softcap)

    @property
    def head_rows(self) -> LMHead:
        """This rank's rows of a split head; gradients reach its parameter."""
        layer = self.model.get_output_embeddings()
        bias = getattr(layer, "bias", None)
        return LMHead(layer.weight.to_local(), None if bias is None else bias.to_local(), self._scale, self._softcap)

    def with_weights(self, function: Callable[[], T]) -> T:
        """Call a function that uses the weights. Where ranks split them, the head is whole during the call."""
        if self.sharded is None or self._whole:
            return function()
        self._whole = True
        try:
            result: T = self.sharded(function)
        finally:
            self._whole = False
        if not (isinstance(result, torch.Tensor) and result.requires_grad):
            self.sharded.release()
        return result

    def in_step(self, batches: Iterable[B]) -> Iterator[B | None]:
        """The batches; where ranks split the model, then None until every rank has had as many.

        For each None :meth:`idle` takes part in the others' pass.
        """
        batches = list(batches)
        most = len(batches) if self.sharded is None else self.sharded.ranks.max(len(batches))
        yield from batches
        for _ in range(most - len(batches)):
            yield None

    def idle(self) -> torch.Tensor:
        """Hidden state [1, d] of a pass over one token, which takes part in a pass of other ranks."""
        batch = pack([np.zeros(2, dtype=np.int64)], max_tokens=2, layout="padded")[0]
        return self.hidden(batch, [np.array([1])])

    def without_tokens(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return a loss of 0 from the result of :meth:`idle`; its gradient is 0 for every parameter."""
        if self.has_split_head:  # its gradient is none of this pass's
            return 0.0 * hidden.float().sum()
        return 0.0 * self.head.logits(hidden.to(self.head.weight.dtype)).float().sum()

    def autocast(self) -> torch.autocast:
        """Around the model's own code: bfloat16 where asked."""
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.bf16)

    def pack(
        self, sequences: Sequence[np.ndarray], max_tokens: int, images: Sequence[tuple[Image, ...]] = ()
    ) -> list[Packed]:
        """Micro-batches in which every sequence gets what it gets alone; see :func:`opdengine.models.packing.pack`."""
        return pack(
            sequences,
            max_tokens=max_tokens,
            layout=self.layout,
            regimes=self.regimes,
            images=images,
            image_layout=self.image_layout,
        )

    def forward(self, batch: Packed) -> torch.Tensor:
        """Final hidden states [B * L, d] of a packed batch, after the last norm."""
        if self.regimes.moving:
            forget_lengths(self.trunk)
        if batch.images:
            assert self.vision is not None
            inputs = self.vision.inputs(self.model, self.trunk, batch)
        else:
            positions = batch.position_ids.to(self.device)
            inputs = {"position_ids": positions.expand(4, *positions.shape) if counts_rows(self.trunk) else positions}
        with self.autocast():
            output = self.trunk(input_ids=batch.input_ids.to(self.device), use_cache=False, **inputs, **self.options)
        # With float32 parameters the last norm gives float32 under autocast, too; the head would follow.
        states: torch.Tensor = output.last_hidden_state.flatten(0, 1)
        if self.sharded is not None and torch.is_grad_enabled():
            states = self._beside_tower(states)
        return states.to(torch.bfloat16) if self.bf16 else states

    def _beside_tower(self, states: torch.Tensor) -> torch.Tensor:
        """The states of a pass, from which every trained weight of the tower gets a gradient of 0 at least.

        Ranks reduce the gradients of one pass together: those that had pictures in it, and those that had none.
        """
        trained = [p for p in self._tower_weights() if p.requires_grad]
        if not trained:
            return states
        return states + 0.0 * torch.stack([p.flatten()[0] for p in trained]).sum().to(states.dtype)

    def _tower_weights(self) -> list[torch.nn.Parameter]:
        return [p for part in self._tower for p in part.parameters()]

    def leave_tower(self, has_pictures: bool) -> None:
        """Take the tower's gradients of 0 away where no rank has pictures in a step, so that it stays as it is.

        One process has none either. All ranks call this.
        """
        if self.sharded is not None and self._tower and not self.sharded.ranks.max(has_pictures):
            for parameter in self._tower_weights():
                parameter.grad = None

    def hidden(self, batch: Packed, target_positions: Sequence[np.ndarray]) -> torch.Tensor:
        """Hidden states [T, d] that predict the targets of the batch's members, in their order."""
        rows = batch.predictors(target_positions).to(self.device)
        return self.forward(batch).index_select(0, rows)

    @torch.no_grad()
    def score(
        self,
        sequences: Sequence[np.ndarray],
        target_positions: Sequence[np.ndarray],
        images: Sequence[tuple[Image, ...]] = (),
    ) -> list[torch.Tensor]:
        """Hidden states [T_i, d] predicting the targets of every sequence, without gradient, on the host.

        Those of a whole step would fill a GPU; the loss takes those of a micro-batch back. ``images`` are the pictures
        of each sequence, () where none has any.
        """
        return self.with_weights(lambda: self._score(sequences, target_positions, images))

    def _score(
        self,
        sequences: Sequence[np.ndarray],
        target_positions: Sequence[np.ndarray],
        images: Sequence[tuple[Image, ...]],
    ) -> list[torch.Tensor]:
        result: list[torch.Tensor | None] = [None] * len(sequences)
        for batch in self.in_step(self.pack(sequences, self.max_tokens, images)):
            if batch is None:
                self.idle()
                continue
            positions = [target_positions[i] for i in batch.members]
            hidden = self.hidden(batch, positions).cpu()
            for i, rows in zip(batch.members, hidden.split([len(p) for p in positions]), strict=True):
                result[i] = rows
        return [rows for rows in result if rows is not None]

    def probe_sequences(self) -> list[np.ndarray]:
        """Four sequences within one regime; the last one crosses the limits of the model's layers."""
        vocabulary = self.trunk.get_input_embeddings().weight.shape[0]
        return probe_sequences(self.model.config, vocabulary, self.regimes.switch)

    @torch.no_grad()
    def _prove_head(self) -> None:
        training = self.model.training
        self.model.eval()
        ids = torch.from_numpy(self.probe_sequences()[1])[None].to(self.device)
        try:
            with self.autocast():
                with self._head_in_place():
                    theirs = self.model(input_ids=ids, use_cache=False, **self.options).logits[0].float()
                hidden, again = (
                    self.trunk(input_ids=ids, use_cache=False, **self.options).last_hidden_state[0] for _ in range(2)
                )
                head = self.head
                if hidden.shape[-1] != head.weight.shape[1]:
                    raise ValueError(
                        f"{self.name}: {type(self.model).__name__} has another layer between its hidden states "
                        f"({hidden.shape[-1]} wide) and its head ({head.weight.shape[1]} wide), which a fused loss "
                        "cannot take in"
                    )
                error = relative(head.logits(hidden), theirs)
        finally:
            self.model.train(training)
        limit = 1e-4 if hidden.dtype == torch.float32 and not self.bf16 else 3e-2
        if (noise := relative(again, hidden)) > limit:
            raise ValueError(
                f"{self.name}: the same tokens get different hidden states each time (relative difference {noise:.2g}, "
                f"allowed {limit:g}) though {type(self.model).__name__} is in evaluation mode; remove what is random"
            )
        if not error <= limit:
            raise ValueError(
                f"{self.name}: {type(self.model).__name__} computes its logits in a way that is not "
                f"softcap(scale * (hidden @ W.T + b)) (relative difference {error:.2g}, allowed "
                f"{limit:g}); its head cannot be used in a fused loss"
            )

    @contextmanager
    def _head_in_place(self) -> Iterator[None]:
        """Return a context in which the model's own forward pass can run; a split head is put together for it."""
        layer = self.model.get_output_embeddings()
        split = dict(layer.named_parameters(recurse=False)) if self.has_split_head else {}
        for name, parameter in split.items():
            assert self.sharded is not None
            setattr(layer, name, torch.nn.Parameter(self.sharded.gather(parameter), requires_grad=False))
        try:
            yield
        finally:
            for name, parameter in split.items():
                setattr(layer, name, parameter)

    def _observe(self, look: Callable[[], T]) -> T:
        """Look at what passes in evaluation mode give; the mode is left as it was."""
        training = self.model.training
        self.model.eval()
        try:
            with torch.no_grad():
                return look()
        finally:
            self.model.train(training)

    def _prove_causal(self) -> float:
        ids = self.probe_sequences()[-1]
        exact = self.trunk.dtype == torch.float32 and not self.bf16

        def states(part: np.ndarray) -> torch.Tensor:
            (batch,) = pack([part], max_tokens=len(part), layout="alone")
            return self.hidden(batch, [np.arange(1, len(part) + 1)])

        return self._observe(lambda: prove_causal(self.name, self.model, ids, states, exact))

    def _find_regimes(self) -> Regimes:
        return self._observe(lambda: find_regimes(self.model, self._states))

    def _states(self, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        states: torch.Tensor = self.forward(Packed((), ids, positions, ())).unflatten(0, tuple(ids.shape))
        return states

    def _choose_layout(self) -> str:
        """Packed input if the model treats it exactly like separate sequences, else padded, else alone.

        SDPA on a GPU takes padded input: its fast kernels take no mask, and the others keep one of [L, L] per layer
        and row for the backward pass.
        """
        implementation = getattr(self.model.config, "_attn_implementation", "") or ""
        layout = "one_row" if "flash" in implementation else "rows"
        if implementation == "sdpa" and self.device.type == "cuda":
            layout = "padded"
        sequences = self.probe_sequences()
        return self._observe(lambda: choose_layout(self.name, sequences, self.hidden, layout, self.tolerance))

    def _choose_image_layout(self) -> str:
        """Like :meth:`_choose_layout`, of sequences with pictures of several sizes."""
        assert self.vision is not None
        probes = self.vision.probe(self.probe_sequences()[1].tolist())
        images = [probe.images for probe in probes]
        ids = [np.array(probe) for probe in probes]

        def lay_out(members: Sequence[int], layout: str) -> list[Packed]:
            part = [ids[i] for i in members]
            budget = sum(map(len, part)) * len(part)
            own = [images[i] for i in members]
            return pack(part, max_tokens=budget, images=own, image_layout=layout)

        return self._observe(
            lambda: choose_image_layout(self.name, ids, lay_out, self.hidden, self.layout, self.tolerance)
        )

    def _changes_in_training(self) -> bool:
        ids = torch.from_numpy(self.probe_sequences()[1])[None]
        positions = torch.arange(ids.shape[1])[None]
        with torch.no_grad():
            return changes_in_training(self.model, lambda: self._states(ids, positions), self.tolerance)


def _has_embeddings(model: Any) -> bool:
    try:
        layers = model.get_input_embeddings(), model.get_output_embeddings(), base_of(model).base_model
        return None not in (*layers, layers[2].get_input_embeddings())
    except NotImplementedError:  # of encoder-decoder models read as decoders
        return False
