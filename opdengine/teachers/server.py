"""A teacher behind an OpenAI-compatible server: it writes text and judges by top-k log-probs.

Token ids go in and are verified to have arrived; nothing is ever re-tokenised on the way to a
judgement. Scoring needs ``prompt_logprobs`` (vLLM) or completions with ``echo`` and ``logprobs``. The exact
path is a local teacher.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from opdengine.config.sections import TeacherConfig
from opdengine.data.templates import Reader
from opdengine.errors import ConfigError, ProbeError
from opdengine.models.chat import (
    PROBES,
    encode_behind,
    kept_marks,
    stop_token_ids,
    text_of_completion,
)
from opdengine.models.rendering import opening, thought_opening, turn_end
from opdengine.models.surrogates import without_surrogates
from opdengine.rollout.transformers import stream_key
from opdengine.teachers import Configured
from opdengine.teachers.echo import Echo
from opdengine.teachers.endpoint import Answer, BadAnswer, Endpoint
from opdengine.teachers.top_k import read_top_k
from opdengine.types import Completion, Failure, Request, SamplingParams, TeacherContext, TopK
from opdengine.workers.printing import brief

logger = logging.getLogger(__name__)

MOST_CHARACTERS = 500
"""Of one token, on average, in a text whose ids a server does not tell."""


class ServedTeacher(Configured):
    """A served model as a frozen teacher.

    Args:
        config: with ``base_url``.
        tokenizer: of the served model; renders its chats.
        vocab_size: ids of the tokenizer.
        stop_on_failure: raise at the first call that fails for good, instead of returning failures.

    Raises:
        ConfigError: the variable that should hold the key is not set.
    """

    head = None

    def __init__(self, config: TeacherConfig, tokenizer: Any, vocab_size: int, *, stop_on_failure: bool = True) -> None:
        assert config.base_url is not None
        self.config = config
        self.tokenizer = tokenizer
        self.vocab_size = vocab_size
        self._reader = Reader(f"teacher {config.name!r}", tokenizer, config.chat_template_kwargs)
        self.opening = thought_opening(tokenizer, config.chat_template_kwargs)
        self.window: int | None = None
        self._ends = stop_token_ids(tokenizer, template_kwargs=config.chat_template_kwargs)
        # A server stops at the eos token by itself, but need not know the end of a turn.
        more = [i for i in self._ends if i != tokenizer.eos_token_id]
        self._stops: dict[str, Any] = {"stop_token_ids": more} if more else {}
        self._echo: Echo | None = None
        self.endpoint = Endpoint(
            name=config.name,
            base_url=config.base_url.rstrip("/"),
            api_key=api_key(config),
            timeout=config.timeout,
            max_retries=config.max_retries,
            max_concurrency=config.max_concurrency,
            stop_on_failure=stop_on_failure,
        )

    @property
    def fingerprint(self) -> str:
        """The served name: a server does not tell which weights it holds."""
        return f"served {self.config.model}"

    async def generate(self, requests: Sequence[Request], params: SamplingParams) -> list[Completion | Failure]:
        """One completion per request; their log-probs are unknown (NaN)."""
        # Every field is stated: a server fills gaps from the model's generation_config.
        bodies = [
            {
                "model": self.config.model,
                "prompt": list(r.token_ids),
                **params.as_json(),
                **self._stops,
                "seed": stream_key(params.seed, r.seed, 0) >> 1,  # servers take signed seeds
                "return_token_ids": True,
            }
            for r in requests
        ]
        return await self.endpoint.post_all(
            "/completions", bodies, lambda i, answer: self._completion(requests[i], params, answer)
        )

    async def score(self, contexts: Sequence[TeacherContext]) -> list[TopK | Failure]:
        """The ``score_top_k`` likeliest tokens at the targets of every context, in order."""
        return await self.endpoint.post_all(
            "/completions",
            [self._scoring(c.token_ids.tolist()) for c in contexts],
            lambda i, answer: self._read(answer, contexts[i].token_ids, contexts[i].target_positions),
        )

    def _read(self, answer: Answer, token_ids: np.ndarray, target_positions: np.ndarray) -> TopK:
        choice = _choice(answer)
        if self._echo is not None:
            choice = self._echo.translate(choice, token_ids.tolist())
        return read_top_k(choice, token_ids, target_positions, self.config.score_top_k, self.vocab_size)

    def counts(self) -> dict[str, float]:
        """Failures by reason and retries since the last call, as metrics."""
        counts = {name: float(count) for name, count in self.endpoint.counts.items()}
        self.endpoint.counts.clear()
        return counts

    async def probe(self, *, judges: bool) -> None:
        """Before step 0: is it there, is it the right model, and does it answer what is needed?

        Args:
            judges: whether log-probs of prompts are needed.

        Raises:
            ProbeError: it is not; says what to change.
        """
        listing = await self._ask("get", "/models")
        listed = listing.get("data")
        if not isinstance(listed, list):
            raise ProbeError(
                f"teacher {self.name!r}: {self.endpoint.base_url} lists no models but {brief(listing, 80)}; is it the "
                "address of an OpenAI-compatible server, up to and including /v1?"
            )
        served = {str(m.get("id")): m for m in listed if isinstance(m, Mapping)}
        if self.config.model not in served:
            raise ProbeError(
                f"teacher {self.name!r}: {self.endpoint.base_url} does not serve {self.config.model!r} but "
                f"{brief(sorted(served))}; set the teacher's 'model' to one of them"
            )
        window = served[self.config.model].get("max_model_len")
        if window is not None and not (type(window) is int and 2 <= window < 1 << 40):
            raise ProbeError(
                f"teacher {self.name!r}: {self.endpoint.base_url} tells a max_model_len of {brief(window, 40)}, which "
                "is no number of tokens; correct the server"
            )
        # One token of room stays free: a scoring call must ask for at least one new token.
        self.window = None if window is None else window - 1
        if window is None:
            logger.info("teacher %s: the server does not tell its context length", self.name)
        await self._probe_tokenizer()
        # Special tokens are part of every chat.
        ids = [*self.tokenizer.encode(PROBES[0], add_special_tokens=False), self.tokenizer.eos_token_id]
        # Whether it knows the fields that writing will need shows itself here, too.
        body = self._scoring(ids) | {"top_k": 1, "top_p": 1.0, "repetition_penalty": 1.0} | self._stops
        if judges:
            await self._probe_scores(ids, body)
        else:
            del body["prompt_logprobs"]
            await self._ask("post", "/completions", body)
        self.endpoint.counts.clear()

    async def _probe_scores(self, ids: list[int], body: Answer) -> None:
        """Find the way in which the server tells the log-probs of a prompt."""
        answer = await self.endpoint.request("post", "/completions", body)
        try:
            if not isinstance(answer, Failure):
                self._read(answer, np.array(ids), np.arange(1, len(ids)))
                return
            refusal = self._refusal(answer)
        except BadAnswer as error:
            refusal = (
                f"teacher {self.name!r}: {self.endpoint.base_url} does not answer with usable prompt log-probs "
                f"({error.reason}: {error}), nor with those of an echoed prompt; a served teacher judges by them: use "
                "a vLLM server, or a local teacher"
            )
        self._echo = await self._probe_echo(ids)
        if self._echo is None:
            raise ProbeError(refusal)
        logger.info("teacher %s: the server has no prompt_logprobs; it judges by echoed prompts", self.name)

    async def _probe_echo(self, ids: list[int]) -> Echo | None:
        body = self._scoring(ids) | Echo.fields(self.config.score_top_k)
        del body["prompt_logprobs"]
        answer = await self.endpoint.request("post", "/completions", body)
        try:
            return None if isinstance(answer, Failure) else Echo.found_in(_choice(answer), ids, self.tokenizer)
        except BadAnswer:
            return None

    async def _probe_tokenizer(self) -> None:
        """The server's own tokenizer against the folder's, where it has one to ask."""
        added = sorted(self.tokenizer.get_added_vocab())
        text = "\n".join([*PROBES, *added])
        body = {"model": self.config.model, "prompt": text, "add_special_tokens": False}
        root = self.endpoint.base_url.removesuffix("/v1")
        answer = await self.endpoint.request("post", f"{root}/tokenize", body)
        if isinstance(answer, Failure):
            logger.info("teacher %s: the server's tokenizer cannot be asked (%s)", self.name, answer.reason)
            return
        ours, theirs = self.tokenizer.encode(text, add_special_tokens=False), answer.get("tokens")
        if theirs != ours:
            raise ProbeError(
                f"teacher {self.name!r}: the server at {self.endpoint.base_url} encodes text differently than "
                f"the tokenizer {self.config.tokenizer or self.config.model!r}: {brief(theirs)[:80]} instead of "
                f"{brief(ours)[:80]}; set the teacher's 'tokenizer' to the folder of the served model"
            )

    async def _ask(self, method: str, path: str, body: Answer | None = None) -> Answer:
        answer = await self.endpoint.request(method, path, body)
        if isinstance(answer, Failure):
            raise ProbeError(self._refusal(answer))
        return answer

    def _refusal(self, failure: Failure) -> str:
        hint = ""
        if "logprobs" in failure.detail:
            hint = f"; start the server with --max-logprobs {self.config.score_top_k}, or lower score_top_k"
        return f"{failure}{hint}"

    def _scoring(self, token_ids: list[int]) -> dict[str, Any]:
        k = self.config.score_top_k
        return {
            "model": self.config.model,
            "prompt": token_ids,
            "max_tokens": 1,
            "temperature": 0,
            "return_token_ids": True,
            **({"prompt_logprobs": k} if self._echo is None else Echo.fields(k)),
        }

    def _completion(self, request: Request, params: SamplingParams, answer: Answer) -> Completion:
        """Read one completion.

        Raises:
            BadAnswer: "bad_answer" or "wrong_ids".
        """
        choice = _choice(answer)
        text, stop = without_surrogates(choice.get("text")), choice.get("finish_reason")
        if not isinstance(text, str) or stop not in ("stop", "length"):
            raise BadAnswer("bad_answer", f"no text or no end: finish_reason {brief(stop, 40)}, text {brief(text, 80)}")
        if len(text) > MOST_CHARACTERS * (params.max_tokens + 10):
            raise BadAnswer("bad_answer", f"a text of {len(text)} characters for max_tokens={params.max_tokens}")
        echoed, ids = choice.get("prompt_token_ids"), choice.get("token_ids")
        if echoed is not None and echoed != list(request.token_ids):
            raise BadAnswer("wrong_ids", "the server read other token ids than were sent")
        if ids is None:  # a server that tells no ids: its text is all there is
            ids = self._ids_of(text)
            ids += [self._end()] if stop == "stop" else []
        elif not isinstance(ids, list) or not all(type(i) is int and 0 <= i < 1 << 31 for i in ids):
            raise BadAnswer("wrong_ids", f"no token ids: {brief(ids, 80)}")
        elif len(ids) > params.max_tokens:
            raise BadAnswer("wrong_ids", f"{len(ids)} token ids for max_tokens={params.max_tokens}: {ids[:8]}")
        if kept_marks(self.tokenizer).keys() & set(ids):  # which the server may have left out of the text
            text = text_of_completion(self.tokenizer, ids, self._ends)
        unknown = np.full(len(ids), np.nan, dtype=np.float32)
        return Completion(np.array(ids, dtype=np.int64), unknown, stop, text)

    def _ids_of(self, text: str) -> list[int]:
        """The ids of a written text, where it stands."""
        return encode_behind(self.tokenizer, opening(self.tokenizer, self.config.chat_template_kwargs), text)

    def _end(self) -> int:
        end = turn_end(self.tokenizer, self.config.chat_template_kwargs)
        return int(self.tokenizer.eos_token_id if end is None else end)


def _choice(answer: Answer) -> Mapping[str, Any]:
    choices = answer.get("choices")
    if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], Mapping):
        raise BadAnswer("bad_answer", f"not exactly one choice: {brief(answer, 80)}")
    return choices[0]


def api_key(config: TeacherConfig) -> str | None:
    """The key of a teacher's endpoint; None where its settings name none.

    Raises:
        ConfigError: the variable is not set, or holds no key.
    """
    if config.api_key_env is None:
        return None
    where = f"teacher {config.name!r}: the environment variable {config.api_key_env!r} named by api_key_env"
    if not (key := os.environ.get(config.api_key_env)):
        raise ConfigError(f"{where} is not set; give it again when a run is resumed: keys are stored nowhere")
    if not (key.isascii() and key.isprintable() and " " not in key):
        raise ConfigError(f"{where} holds a blank or another character that no key has")
    return key
