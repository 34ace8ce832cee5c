"""Final hidden states and LM head of a causal language model, as trainers wrap it.

``in_place_of_head`` runs a model whose output embedding is replaced by a function of its input and of the head's
parameters, so that no logits are made. Whatever wraps the model stays in force, since the call goes through it: an
adapter (PEFT), ``DistributedDataParallel``, FSDP2, autocast within or around ``forward``, ``torch.compile``, gradient
checkpointing. The function runs where the head would: parameters are gathered, and what it returns is the output of
the whole, from which the wrappers find the parameters that got a gradient.

This module imports neither transformers nor peft: a model is asked for ``get_output_embeddings`` and ``config``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from .types import LMHead, TeacherHead

R = TypeVar("R")

PROBE = (-64.0, 0.5, 32.0)
"""What stands for the head's output while the model finishes its pass; exact in every dtype."""

CONSTANTS = ("logit_scale", "output_multiplier", "lm_head_multiplier")
"""Names of a factor of the logits in configurations (Cohere, Muse Glimmer, Falcon-H1)."""


def in_place_of_head(
    model: nn.Module, function: Callable[[Tensor, LMHead], R], /, *, head: LMHead | None = None, **inputs: Any
) -> R:
    """Run a causal language model with a function in place of its LM head.

    Example:

        loss = in_place_of_head(model, lambda hidden, head: linear_divergence(hidden[mask], head, teachers).loss,
                                input_ids=ids, attention_mask=attention_mask)

    Args:
        model: as the trainer has it: with an adapter, in DDP, FSDP2 or ``torch.compile``, under autocast.
        function: gets the final hidden states [..., d] and the head, whose parameters are the live ones, and returns
            the loss, or what the loss is made of (tensors, or tuples, lists and dicts of them). The hidden states have
            the dtype in which the head would have multiplied: that of autocast where it is on. It runs outside of
            autocast. Call it for other models (a teacher) before, not within.
        head: of which ``logit_scale`` and ``softcap`` are used in place of those that the configuration names.
        inputs: of the model's ``forward``; without ``labels``.

    Returns:
        What the function returns.

    Raises:
        ValueError: the model is wrapped in something unknown, its head is none of :class:`LMHead`'s kind (proved in
            the first call), or its forward pass did not call the head once.
    """
    if inputs.get("labels") is not None:
        raise ValueError("labels make the model compute a loss of its own from logits; leave them out of the inputs")
    with Replaced(unwrapped(model), function, head) as call:
        model(**inputs)
    result: R = call.result
    return result


def teacher_head(model: nn.Module, *, rows: Tensor | None = None, head: LMHead | None = None, **inputs: Any) -> Any:
    """A teacher's hidden states and head for ``linear_divergence``, without gradient, in the mode that it is in.

    Args:
        model: as in :func:`in_place_of_head`. Where FSDP2 splits it, the head's weight is copied out of it whole.
        rows: bool [B, L] or an index: which hidden states to keep; None keeps [B, L, d].
        head: as in :func:`in_place_of_head`.
        inputs: of the model's ``forward``.

    Returns:
        A :class:`TeacherHead`.
    """
    core = unwrapped(model)
    split = any(hasattr(module, "unshard") for module in core.modules())

    def keep(hidden: Tensor, found: LMHead) -> tuple[Any, ...]:
        weight, bias = (None if t is None else t.clone() if split else t for t in (found.weight, found.bias))
        # The op wants a teacher's weight in the dtype of its states.
        weight = None if weight is None else weight.to(hidden.dtype)
        return hidden if rows is None else hidden[rows], weight, bias, found.logit_scale, found.softcap

    with torch.no_grad():
        return TeacherHead(*in_place_of_head(model, keep, head=head, **inputs))


def unwrapped(model: Any) -> Any:
    """The model in DDP and ``torch.compile``: with its adapter, and with FSDP2, which changes it in place.

    Raises:
        ValueError: the wrapper is unknown, or there is no language model in it.
    """
    while True:
        if hasattr(model, "_orig_mod"):
            model = model._orig_mod
        elif isinstance(model, DistributedDataParallel):
            model = model.module
        elif isinstance(model, DataParallel) or not hasattr(model, "get_output_embeddings"):
            raise ValueError(
                f"{type(model).__name__} is neither a causal language model nor PEFT, DistributedDataParallel, FSDP2 "
                "(fully_shard) or torch.compile around one; use one of these"
            )
        else:
            return model


def head_constants(config: Any) -> tuple[float, float | None]:
    """Scale and soft cap of the logits, by the names that the configurations of models use.

    Args:
        config: of the language model.
    """
    scale = next((float(value) for name in CONSTANTS if (value := getattr(config, name, None))), 1.0)
    if divisor := getattr(config, "logits_scaling", None):  # Granite and MiniCPM3 divide
        scale = float(divisor) if getattr(config, "model_type", "") == "hyperclovax" else 1.0 / float(divisor)
    return scale, getattr(config, "final_logit_softcapping", None)


def head_parameters(layer: Any) -> tuple[Tensor, Tensor | None]:
    """Weight [V, d] and bias of an output embedding, with what an adapter makes of them; gradients reach both.

    Raises:
        ValueError: they are not here as such.
    """
    if hasattr(layer, "modules_to_save"):  # peft trains a copy of the layer
        names = [] if layer.disable_adapters else list(layer.active_adapters)
        return head_parameters(layer.modules_to_save[names[0]] if names else layer.original_module)
    if not hasattr(layer, "base_layer"):
        return layer.weight, getattr(layer, "bias", None)
    weight, bias = head_parameters(layer.base_layer)
    if layer.disable_adapters or layer.merged:
        return weight, bias
    for name in (name for name in layer.active_adapters if name in getattr(layer, "lora_A", {})):
        dropout = layer.lora_dropout[name]
        if isinstance(dropout, nn.Dropout) and dropout.p and layer.training:
            raise ValueError("the adapter of the head has a dropout, which no single weight stands for; set it to 0")
        weight = weight + layer.get_delta_weight(name).to(weight.dtype)
    return weight, bias


def _constants(core: Any, head: LMHead | None) -> tuple[float, float | None]:
    if head is not None:
        return head.logit_scale, head.softcap
    config = core.config
    return head_constants(config.get_text_config() if hasattr(config, "get_text_config") else config)


def _language_model(core: Any) -> Any:
    """The model itself, in an adapter or not."""
    return core.get_base_model() if hasattr(core, "peft_config") and hasattr(core, "get_base_model") else core


class _Call:
    """One pass: what to do with the hidden states, and what came of it."""

    def __init__(self, function: Callable[[Tensor, LMHead], Any], scale: float, softcap: float | None) -> None:
        self.function, self.scale, self.softcap = function, scale, softcap
        self.times = 0
        self.result: Any = None


class Replaced:
    """A context in which one pass of a model runs a function in place of its head; see :func:`in_place_of_head`.

    Args:
        core: the model without DDP and ``torch.compile`` (:func:`unwrapped`).
        function, head: as there.
    """

    def __init__(self, core: Any, function: Callable[[Tensor, LMHead], Any], head: LMHead | None = None) -> None:
        place = _PLACES.get(core)
        if place is None:
            place = _PLACES[core] = _Place()
        self.core, self.place = core, place
        self.call = _Call(function, *_constants(core, head))

    def __enter__(self) -> _Call:
        place, layer = self.place, _language_model(self.core).get_output_embeddings()
        if layer is None:
            raise ValueError(f"{type(self.core).__name__} has no output embedding")
        self._before = place.current, place.layer, layer.__dict__.get("forward")
        place.current, place.layer = self.call, layer
        layer.forward, after = place.callables()
        # Before the hook of FSDP2, which has to see what is returned.
        self._hook = self.core.register_forward_hook(after, prepend=True)
        return self.call

    def __exit__(self, kind: Any, *error: Any) -> None:
        self._hook.remove()
        layer = self.place.layer
        del layer.forward
        self.place.current, self.place.layer, forward = self._before
        if forward is not None:
            layer.forward = forward
        if kind is None and self.call.times != 1:
            raise ValueError(
                f"the forward pass of {type(self.core).__name__} called its output embedding {self.call.times} times, "
                "not once; its loss cannot be computed in place of the head"
            )


class _Place:
    """Where the head is in a model. Its callables stay the same, so that compiled code that met them is reused."""

    def __init__(self) -> None:
        self.current: _Call | None = None
        self.layer: Any = None
        self.proved = False
        self._callables: tuple[Callable[..., Any], ...] = (self.in_layer, self.after)
        self._disabled = False

    def callables(self) -> tuple[Callable[..., Any], ...]:
        """``in_layer`` and ``after``; they run as they are within compiled code."""
        if "torch._dynamo" in sys.modules and not self._disabled:  # else nothing is compiled yet
            self._callables = tuple(torch.compiler.disable(f) for f in self._callables)
            self._disabled = True
        return self._callables

    def in_layer(self, hidden: Tensor) -> Tensor:
        """Stand for the head's ``forward``."""
        call, layer = self.current, self.layer
        assert call is not None
        call.times += 1
        weight, bias = head_parameters(layer)
        if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1] or not weight.is_floating_point():
            raise ValueError(
                f"the head ({type(layer).__name__}) has no weight of [V, {hidden.shape[-1]}] in floating point, but "
                f"{weight.dtype} of {list(weight.shape)}; load the model without quantisation of its head"
            )
        if hasattr(weight, "full_tensor"):
            raise ValueError("the head's weight is split by tensor parallelism; keep the head whole")
        kind = hidden.device.type
        if not self.proved:
            self._prove(hidden, weight, bias)
        if torch.is_autocast_enabled(kind):
            hidden = hidden.to(torch.get_autocast_dtype(kind))
        with torch.autocast(kind, enabled=False):
            call.result = call.function(hidden, LMHead(weight, bias, call.scale, call.softcap))
        if hasattr(layer, "unshard"):  # FSDP2 gathers for the backward pass what its own output asks for
            _unshard_for(call.result, layer)
        return hidden.new_tensor(PROBE).repeat(*hidden.shape[:-1], 1)

    def after(self, core: nn.Module, inputs: Any, output: Any) -> Any:
        """Give what the function returned in place of the model's output, after a look at the latter."""
        call = self.current
        assert call is not None
        if not self.proved and call.times == 1:
            logits = output[0] if isinstance(output, tuple) else getattr(output, "logits", None)
            self._prove_logits(core, call, logits)
            self.proved = True
        return call.result

    @torch.no_grad()
    def _prove(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
        """The layer multiplies with its weight and adds its bias."""
        row = hidden.flatten(0, -2)[-1:].detach()
        theirs = type(self.layer).forward(self.layer, row).double()
        kind = row.device.type
        half = torch.is_autocast_enabled(kind) or row.dtype.itemsize == 2 or weight.dtype.itemsize == 2
        with torch.autocast(kind, enabled=False):
            ours = LMHead(weight, bias).to(torch.float64).logits(row.double())
        told = f"{type(self.layer).__name__} is no product with its weight"
        _compare(theirs, ours, 3e-2 if half else 1e-4, told)

    @staticmethod
    def _prove_logits(core: nn.Module, call: _Call, logits: Any) -> None:
        """What follows the head is its scale and its soft cap."""
        name = type(core).__name__
        if not isinstance(logits, Tensor) or logits.shape[-1] != len(PROBE):
            raise ValueError(f"{name} does not return what its head gives as logits, so its loss cannot be theirs")
        theirs = logits.detach().flatten(0, -2)[-1].double()
        ours = theirs.new_tensor(PROBE) * call.scale
        if call.softcap is not None:
            ours = call.softcap * torch.tanh(ours / call.softcap)
        told = f"{name} makes other logits than scale {call.scale:g} and soft cap {call.softcap} do"
        _compare(theirs, ours, 1e-2, f"{told}; name both with head=LMHead(...)")


_PLACES: WeakKeyDictionary[nn.Module, _Place] = WeakKeyDictionary()


def _compare(theirs: Tensor, ours: Tensor, limit: float, told: str) -> None:
    error = ((theirs - ours).abs().max() / ours.abs().max().clamp(min=1e-30)).item()
    if not error <= limit:
        raise ValueError(f"{told} (relative difference {error:.2g}, allowed {limit:g})")


def _unshard_for(result: Any, layer: Any) -> None:
    for value in torch.utils._pytree.tree_leaves(result):
        if isinstance(value, Tensor) and value.requires_grad:
            value.register_hook(lambda _: layer.unshard())
