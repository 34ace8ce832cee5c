"""What runs inside vLLM's own workers (``worker_extension_cls``): description and weight updates.

Both kinds of engine share it: a child process calls it in place, a server through ``/collective_rpc``. Arguments and
answers are plain JSON values.

vLLM's own interface for updates (``start_weight_update`` to ``finish_weight_update``) is not used: the ways that it
comes with need GPUs, and none of them knows weights as a base and low-rank factors, or adds those in float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from opdengine.rollout.vllm.policy_file import read_policy
from opdengine.rollout.vllm.weight_names import as_in_checkpoint, model_weights


class PolicyLoader:
    """Mixed into vLLM's workers."""

    def describe_engine(self: Any, sees: bool = False) -> dict[str, Any]:
        """The fields of :class:`~opdengine.rollout.vllm.engine.EngineInfo`; ``sees``: of the model with its tower."""
        from vllm.platforms import current_platform

        config = self.vllm_config.model_config
        shapes, tied = model_weights(config.model, config.trust_remote_code, sees)
        return {
            "is_cpu": current_platform.is_cpu(),
            "window": config.max_model_len,
            "vocabulary": config.get_vocab_size(),
            "shapes": shapes,
            "tied": tied,
            "model": config.model,
            "dtype": str(config.dtype).removeprefix("torch."),
            "logprobs_mode": str(config.logprobs_mode),
        }

    def load_policy_file(
        self: Any,
        path: str | None = None,
        names: Mapping[str, str] | None = None,
        low_rank: str | None = None,
        sees: bool = False,
    ) -> None:
        """Load a stored policy, or the model's own checkpoint when path is None.

        A policy that is here already is not loaded again: its files never change. So several processes that
        find a server without their policy may all give it back. Weights that ``names`` leaves out stay as they are.
        """
        policy = (path, low_rank)
        if path is not None and policy == getattr(self, "loaded_policy", None):
            return
        self.loaded_policy = None
        if path is None:
            from vllm.model_executor.model_loader import get_model_loader

            loader: Any = get_model_loader(self.vllm_config.load_config)
            model_config = self.vllm_config.model_config
            weights = loader.get_all_weights(model_config, self.model_runner.get_model())
        else:
            config = self.vllm_config.model_config
            stored = read_policy(path, names or {}, low_rank, self.device)
            weights = as_in_checkpoint(stored, config.model, config.trust_remote_code, sees)
        self.reload_weights(weights_iterator=weights)
        _pack_experts(self.model_runner.get_model())
        self.loaded_policy = policy


def _pack_experts(model: Any) -> None:
    """Bring reloaded experts into the layout of the CPU kernel: vLLM packs them at the first load only.

    On GPUs the layout is part of the reload, and this does nothing.
    """
    for layer in model.modules():
        experts = getattr(getattr(getattr(layer, "quant_method", None), "moe_kernel", None), "fused_experts", None)
        if experts is not None and layer.w13_weight.device.type == "cpu":
            experts.process_weights_after_loading(layer)


WORKER_EXTENSION = f"{PolicyLoader.__module__}.{PolicyLoader.__qualname__}"
