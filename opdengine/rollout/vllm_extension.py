"""What runs inside vLLM's own workers (``worker_extension_cls``): description and weight updates.

Both ways to run vLLM share it: the child process of :mod:`opdengine.rollout.vllm_worker` calls it in
place, a server through ``/collective_rpc``. Arguments and answers are plain JSON values.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from opdengine.rollout.policy_file import read_policy


@dataclass(frozen=True)
class EngineInfo:
    """What an engine says of itself once it has started.

    Args:
        is_cpu: whether this is a CPU build of vLLM.
        window: most tokens of prompt and completion together.
        vocabulary: number of rows of the embedding.
        shapes: name -> shape of the model's whole ``state_dict``, in its order.
        tied: name -> name of the weight that it shares its storage with.
        model: folder or hub name that was loaded at start.
        dtype: of the weights in the engine.
        logprobs_mode: which log-probs it returns.
    """

    is_cpu: bool
    window: int
    vocabulary: int
    shapes: Mapping[str, tuple[int, ...]]
    tied: Mapping[str, str]
    model: str
    dtype: str
    logprobs_mode: str


class PolicyLoader:
    """Mixed into vLLM's workers."""

    def describe_engine(self: Any) -> dict[str, Any]:
        """The fields of :class:`EngineInfo`."""
        from vllm.platforms import current_platform

        config = self.vllm_config.model_config
        shapes, tied = model_weights(config.model, config.trust_remote_code)
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
        self: Any, path: str | None = None, names: Mapping[str, str] | None = None, low_rank: str | None = None
    ) -> None:
        """Load a stored policy, or the model's own checkpoint when path is None."""
        if path is None:
            from vllm.model_executor.model_loader import get_model_loader

            loader: Any = get_model_loader(self.vllm_config.load_config)
            model_config = self.vllm_config.model_config
            weights = loader.get_all_weights(model_config, self.model_runner.get_model())
        else:
            weights = read_policy(path, names or {}, low_rank, self.device)
        self.reload_weights(weights_iterator=weights)


WORKER_EXTENSION = f"{PolicyLoader.__module__}.{PolicyLoader.__qualname__}"


def model_weights(model: str, trust_remote_code: bool) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
    """Names and shapes of the ``state_dict``, and which names share storage; allocates nothing.

    Raises:
        ValueError: the weights of all experts of a layer are one tensor, which vLLM loads by other names.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(model, trust_remote_code=trust_remote_code)
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    empty.tie_weights()
    shapes: dict[str, tuple[int, ...]] = {}
    tied: dict[str, str] = {}
    owner: dict[int, str] = {}
    for name, tensor in empty.state_dict(keep_vars=True).items():
        shapes[name] = tuple(tensor.shape)
        first = owner.setdefault(id(tensor), name)
        if first != name:
            tied[name] = first
    if fused := [name for name, shape in shapes.items() if ".experts." in name and len(shape) == 3]:
        raise ValueError(
            f"{model} is a mixture of experts ({fused[0]}), whose weights vLLM cannot be given anew; set use_vllm to "
            "false to train it"
        )
    return shapes, tied
