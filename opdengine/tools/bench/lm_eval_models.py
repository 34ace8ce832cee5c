"""The models that ``lm-eval`` asks: a loaded one, and one that says nothing. Importing this needs the package."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from lm_eval.api.model import LM, TemplateLM

from opdengine.config.train import TrainConfig
from opdengine.models.batching import forward_options
from opdengine.models.rendering import thought_opening
from opdengine.models.thoughts import answer_part
from opdengine.rollout.transformers import TransformersSampler
from opdengine.training.evaluate import answer_params
from opdengine.types import Request

logger = logging.getLogger(__name__)


class Model(TemplateLM):  # type: ignore[misc]
    """A loaded model that answers the harness."""

    def __init__(self, sampler: TransformersSampler, tokenizer: Any, config: TrainConfig, seed: int) -> None:
        super().__init__()
        self.sampler, self.tokenizer = sampler, tokenizer
        self.params = replace(answer_params(config), seed=seed)
        self.template = dict(config.chat_template_kwargs)
        self.opening = thought_opening(tokenizer, config.chat_template_kwargs)
        self.cut = 0
        """Prompts whose beginning did not fit the window."""

    @property
    def eot_token_id(self) -> int:
        """Stands for an empty context."""
        return int(self.tokenizer.eos_token_id)

    @property
    def tokenizer_name(self) -> str:
        """Names a cache of the harness that is not used here."""
        return ""

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        more = {"add_generation_prompt": add_generation_prompt, "continue_final_message": not add_generation_prompt}
        return str(self.tokenizer.apply_chat_template(chat_history, tokenize=False, **more, **self.template))

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        return list(self.tokenizer.encode(string, add_special_tokens=False))  # the template has them

    def fit(self, ids: list[int], room: int) -> list[int]:
        """The end of a prompt that leaves ``room`` in the window; counted where something is lost."""
        window = self.sampler.window
        if window is None or len(ids) + room <= window:
            return ids
        if room >= window:
            raise ValueError(f"answers of {room} tokens do not fit the window of {window}; lower max_completion_length")
        self.cut += 1
        if self.cut == 1:
            logger.warning("WARNING: prompts longer than the model's window of %d lose their beginning", window)
        return ids[room - window :]

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        answers = [""] * len(requests)
        for until, places in by_stop(requests).items():
            params = replace(self.params, stop=until)
            asked = [
                Request(str(i), self.fit(self.tok_encode(requests[i].args[0]), params.max_tokens), seed=i)
                for i in places
            ]
            for i, (answer,) in zip(places, self.sampler.generate(asked, params), strict=True):
                text = answer_part(self.opening + answer.text) or ""
                for stop in until:
                    text = text.partition(stop)[0]
                answers[i] = text
        return answers

    def _loglikelihood_tokens(self, requests: list[Any], **kwargs: Any) -> list[tuple[float, bool]]:
        found: list[tuple[float, bool]] = []
        known: list[int] = []
        last = torch.empty(0)
        for _, context, continuation in requests:
            ids = self.fit(list(context), len(continuation))
            if len(continuation) > 1 or ids != known:
                rows = self.logprobs(ids + list(continuation[:-1]))[len(ids) - 1 :]
                known, last = ids, rows[:1]
            else:
                rows = last
            targets = torch.tensor(continuation, device=rows.device)
            value = float(rows.gather(1, targets[:, None]).sum())
            found.append((value, bool((rows.argmax(-1) == targets).all())))
        return found

    def logprobs(self, ids: list[int]) -> torch.Tensor:
        """[T, V] log-probabilities of what follows each token."""
        sampler = self.sampler
        with torch.no_grad(), torch.autocast(sampler.device.type, torch.bfloat16, enabled=sampler.bf16):
            given = torch.tensor([ids], device=sampler.device)
            out = sampler.model(input_ids=given, use_cache=False, **forward_options(sampler.model))
        logits: torch.Tensor = out.logits[0, :, : sampler.vocabulary]
        return logits.float().log_softmax(-1)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        raise ValueError("tasks of perplexity are not run; choose one that generates or chooses")


class Silent(LM):  # type: ignore[misc]
    """Empty answers, and options that are all alike."""

    def generate_until(self, requests: list[Any]) -> list[str]:
        return [""] * len(requests)

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        return [(0.0, False)] * len(requests)

    def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
        return [0.0] * len(requests)


def by_stop(requests: Sequence[Any]) -> dict[tuple[str, ...], list[int]]:
    """Places of requests by the texts that end their answers."""
    found: dict[tuple[str, ...], list[int]] = {}
    for i, request in enumerate(requests):
        until = request.args[1].get("until") or ()
        texts = (until,) if isinstance(until, str) else tuple(until)
        found.setdefault(tuple(text for text in texts if text), []).append(i)
    return found
