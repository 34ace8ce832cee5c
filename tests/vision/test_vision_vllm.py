"""What is sent to a vLLM engine where the student sees, with an engine that is none; real ones: tests/rollout."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from test_vision_step import vision_config
from vision_helpers import chat, make_picture

from opdengine.data.prompts import load_prompts
from opdengine.distributed import Ranks
from opdengine.errors import ConfigError
from opdengine.models.backbone import load_model
from opdengine.models.chat import encode_chat, load_tokenizer
from opdengine.models.policy import policy
from opdengine.models.vision_tower import tower
from opdengine.rollout.vllm.child import _asked
from opdengine.rollout.vllm.engine import FRESH, EngineError, EngineInfo, InvalidRequestError, PicturePrompt, Sampled
from opdengine.rollout.vllm.policy_file import StoredPolicy
from opdengine.rollout.vllm.sampler import VLLMSampler
from opdengine.rollout.vllm.weight_names import as_in_checkpoint, checkpoint_names, model_weights
from opdengine.rollout.vllm.worker import ReadOtherwise, _input, _require_same
from opdengine.tools.balance import open_sampler
from opdengine.training.inputs import check_pictures
from opdengine.types import Prompt, Request, SamplingParams

KINDS = ("qwen3_vl", "qwen2_5_vl", "gemma3", "idefics3", "smolvlm")


class Recording:
    """Notes what it is asked, and samples one token each."""

    name, replaceable = "the engine", True

    def __init__(self, path: str, refuses: bool = False) -> None:
        shapes, tied = model_weights(path, False, True)
        self.info = EngineInfo(True, 512, 400, shapes, tied, path, "float32", "processed_logprobs")
        self.asked: list[Any] = []
        self.loaded: list[StoredPolicy | None] = []
        self.stamped, self.refuses = FRESH, refuses

    def describe(self) -> EngineInfo:
        return self.info

    def held(self) -> str:
        return self.stamped

    def stamp(self, name: str) -> None:
        self.stamped = name

    def load(self, policy: StoredPolicy | None, name: str) -> None:
        self.loaded.append(policy)
        self.stamped = name

    def generate(self, prompts: Sequence[Any], seeds: Sequence[Sequence[int]], sampling: Mapping[str, Any]) -> Any:
        if self.refuses and any(isinstance(prompt, PicturePrompt) for prompt in prompts):
            raise InvalidRequestError("vLLM reads a prompt with pictures as 3 tokens, the trainer as 9")
        self.asked += prompts
        one = Sampled(frozenset([self.stamped]), np.array([5]), np.zeros(1, dtype=np.float32), "length")
        return [one for row in seeds for _ in row]

    def sleep(self) -> None: ...

    def close(self) -> None: ...


@pytest.mark.parametrize("kind", KINDS)
def test_prompts_have_one_mark_for_each_picture(seeing: Any, tmp_path: Path, kind: str) -> None:
    """And what vLLM must come to beside it: with the marks replaced by the processor, the two are the same."""
    path = seeing(kind)
    tokenizer = load_tokenizer(path)
    engine = Recording(path)
    with VLLMSampler(engine, tokenizer, [str(tmp_path)], sees=True) as sampler:
        assert sum(isinstance(prompt, PicturePrompt) for prompt in engine.asked) == 3  # it was tried before any step
        engine.asked.clear()
        pictures = [make_picture(0, 90, 50), make_picture(1, 30, 70)]
        encoded = encode_chat(tokenizer, chat("a", pictures[0], "or", pictures[1], "?"))
        sampler.load_policy(0, *policy(load_model(path, dtype="float32", sees=True)))
        sampler.generate([Request("p", encoded), Request("q", encode_chat(tokenizer, chat("a")))], SamplingParams(4))
        seen, text = engine.asked
        assert isinstance(seen, PicturePrompt) and seen.images == tuple(pictures) and isinstance(text, np.ndarray)
        assert seen.token_ids.tolist() == list(encoded) and len(seen.marked) < len(encoded)
        marks = tokenizer.convert_tokens_to_ids(tokenizer.vision.marker)
        assert list(seen.marked).count(marks) == 2
        again = tokenizer.vision.processor(
            text=[tokenizer.decode(seen.marked)], images=_input(_asked(seen))["multi_modal_data"]["image"],
            add_special_tokens=False,
        )  # fmt: skip
        assert again["input_ids"][0] == seen.token_ids.tolist()


def test_who_reads_otherwise_is_refused(seeing: Any, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(seeing("qwen3_vl"))
    with pytest.raises(EngineError, match="vLLM reads a prompt with pictures as 3 tokens"):
        VLLMSampler(Recording(seeing("qwen3_vl"), refuses=True), tokenizer, [str(tmp_path)], sees=True)
    _require_same([1, 2], [1, 2])
    with pytest.raises(ReadOtherwise, match=r"as 3 tokens, the trainer as 2, and they differ at 1 \(7, 2\)"):
        _require_same([1, 7, 2], [1, 2])
    with pytest.raises(ReadOtherwise, match="as 1 tokens, the trainer as 2: its processor is another one"):
        _require_same([1], [1, 2])
    encoded = encode_chat(tokenizer, chat("a", make_picture(0)))
    blind = VLLMSampler(Recording(seeing("qwen3_vl")), tokenizer, [str(tmp_path)])
    with pytest.raises(ValueError, match="prompt 'p' has pictures, which are not sent to the engine"):
        blind.generate([Request("p", encoded)], SamplingParams(4))


def test_pictures_cross_as_the_bytes_of_their_files(tmp_path: Path) -> None:
    picture = make_picture(0, path=str(tmp_path / "0.png"))
    asked = _asked(PicturePrompt(np.array([1, 9, 9, 2]), [1, 9, 2], [picture]))
    data = (tmp_path / "0.png").read_bytes()
    assert asked == {"marked": [1, 9, 2], "read_as": [1, 9, 9, 2], "pictures": [base64.b64encode(data).decode()]}
    assert _asked(np.array([3, 4])) == [3, 4] and _input([3, 4]) == {"prompt_token_ids": [3, 4]}
    assert _input(asked)["multi_modal_data"]["image"][0].size == (56, 56)


@pytest.mark.parametrize("kind", KINDS)
def test_the_tower_is_not_sent_where_it_is_frozen(seeing: Any, tmp_path: Path, kind: str) -> None:
    """All other weights are, by the names of the checkpoint."""
    path = seeing(kind)
    model, engine = load_model(path, dtype="float32", sees=True), Recording(path)
    fixed = [f"{name}." for name, _ in tower(model)]
    with VLLMSampler(engine, load_tokenizer(path), [str(tmp_path)], sees=True, fixed=fixed) as sampler:
        sampler.load_policy(1, *policy(model))
        sent = set(engine.loaded[-1].names)  # type: ignore[union-attr]
        assert sent == {name for name in model.state_dict() if not name.startswith(tuple(fixed))}
        assert sent < set(model.state_dict())
    whole, known = set(dict(as_in_checkpoint(policy(model)[0], path, False, True))), checkpoint_names(path)
    assert known <= whole and all(name.endswith("lm_head.weight") for name in whole - known)  # a tied head


def test_a_server_is_sent_no_pictures(seeing: Any, picture_rows: str, tmp_path: Path) -> None:
    prompts = load_prompts([picture_rows]).prompts

    def check(ranks: Ranks, **settings: Any) -> bool:
        path = seeing("qwen3_vl")
        return check_pictures(
            vision_config(path, path, picture_rows, tmp_path, use_vllm=True, **settings), prompts, ranks
        )

    assert check(Ranks()) and check(Ranks(0, 2, 0, 2))
    many = [*prompts, Prompt("many", tuple(chat(*[make_picture(0)] * 65)))]
    path = seeing("qwen3_vl")
    with pytest.raises(ConfigError, match="prompt 'many' has 65 pictures, and vLLM is given 64 at most"):
        check_pictures(vision_config(path, path, picture_rows, tmp_path, use_vllm=True), many, Ranks())
    assert check_pictures(vision_config(path, path, picture_rows, tmp_path), many, Ranks())
    with pytest.raises(ConfigError, match=r"no pictures are sent to a vLLM server.*vllm_mode: colocate"):
        check(Ranks(), vllm_mode="server", vllm_server_base_url="http://127.0.0.1:1")
    with pytest.raises(ConfigError, match=r"no pictures are sent to a vLLM server.*vllm_tensor_parallel_size: 1"):
        check(Ranks(0, 2, 0, 2), vllm_tensor_parallel_size=2)
    assert check(Ranks(), vllm_mode="server", vllm_server_base_url="http://127.0.0.1:1", images="text")


def test_balance_opens_an_engine_that_is_given_pictures(
    seeing: Any, picture_rows: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, told = seeing("qwen3_vl"), dict[str, Any]()

    def opened(source: str, tokenizer: Any, **settings: Any) -> Any:
        told.update(settings)
        return SimpleNamespace(policy_version=0)

    monkeypatch.setattr("opdengine.rollout.vllm.opening.open_child", opened)
    open_sampler(vision_config(path, path, picture_rows, tmp_path, use_vllm=True), load_tokenizer(path))
    assert told["sees"] and told["fixed"]
