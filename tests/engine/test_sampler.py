"""The transformers sampler against full forward passes and against Hugging Face's own generation."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from packaging.version import Version
from test_backbone import COMMON, FAMILIES, VOCAB
from test_backbone import make_model as make_family
from transformers import (
    AutoModelForCausalLM,
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from opdengine.models.batching import cache_argument
from opdengine.models.packing import ONE_REGIME
from opdengine.rollout.decoding import Ways, Whole
from opdengine.rollout.transformers import TransformersSampler
from opdengine.types import Completion, Request, SamplingParams

PROMPTS = ["What is 1 + 1?", "A", "def add(a, b):\n    return", "The quick brown fox jumps"]


@pytest.fixture
def model(models: dict[str, str]) -> Any:
    return AutoModelForCausalLM.from_pretrained(models["student"]).eval()


@pytest.fixture
def sampler(model: Any, tokenizer: Any) -> TransformersSampler:
    return TransformersSampler(model, tokenizer)


@pytest.fixture
def requests(tokenizer: Any) -> list[Request]:
    return [Request(f"r{i}", tuple(tokenizer.encode(text)), seed=i) for i, text in enumerate(PROMPTS)]


def forward(model: Any, request: Request, completion: Completion) -> torch.Tensor:
    """[T, V] logits that predict the completion's tokens, from one pass over the whole sequence."""
    ids = [*request.token_ids, *completion.token_ids.tolist()]
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids])).logits[0, len(request.token_ids) - 1 : -1].float()


def check_logprobs(model: Any, request: Request, completion: Completion, warpers: Any = None) -> None:
    logits = forward(model, request, completion)
    if warpers is not None:
        ids = [*request.token_ids, *completion.token_ids.tolist()]
        for t in range(len(logits)):
            seen = torch.tensor([ids[: len(request.token_ids) + t]])
            logits[t] = warpers(seen, logits[t : t + 1].clone())[0]
    expected = logits.log_softmax(-1)[torch.arange(len(logits)), torch.from_numpy(completion.token_ids)]
    torch.testing.assert_close(torch.from_numpy(completion.logprobs), expected, rtol=1e-4, atol=2e-5)


def test_logprobs_are_those_of_a_full_forward_pass(
    model: Any, sampler: TransformersSampler, requests: list[Request]
) -> None:
    result = sampler.generate(requests, SamplingParams(max_tokens=12, n=3, seed=3))
    assert [len(completions) for completions in result] == [3] * 4
    for request, completions in zip(requests, result, strict=True):
        assert len({tuple(c.token_ids) for c in completions}) == 3
        for completion in completions:
            assert len(completion.token_ids) == len(completion.logprobs)
            check_logprobs(model, request, completion)


@pytest.mark.parametrize(
    "settings",
    [
        {"top_k": 5},
        {"top_p": 0.6},
        {"repetition_penalty": 1.7},
        {"temperature": 0.7},
        {"temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.2},
    ],
    ids=str,
)
def test_truncation_and_penalty_are_those_of_hugging_face(
    model: Any, sampler: TransformersSampler, requests: list[Request], settings: dict[str, Any]
) -> None:
    params = SamplingParams(max_tokens=15, n=2, seed=1, **settings)
    warpers = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(params.repetition_penalty)])
    warpers.append(TemperatureLogitsWarper(params.temperature))
    if params.top_k:
        warpers.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        warpers.append(TopPLogitsWarper(params.top_p))
    different = False
    for request, completions in zip(requests, sampler.generate(requests, params), strict=True):
        for completion in completions:
            assert np.isfinite(completion.logprobs).all()  # nothing outside the truncation was drawn
            check_logprobs(model, request, completion, warpers)
            plain = forward(model, request, completion).log_softmax(-1)
            plain = plain[torch.arange(len(plain)), torch.from_numpy(completion.token_ids)]
            different |= not np.allclose(plain.numpy(), completion.logprobs, atol=1e-2)
    assert different


def test_greedy_is_hugging_faces_greedy(
    model: Any, sampler: TransformersSampler, requests: list[Request], tokenizer: Any
) -> None:
    result = sampler.generate(requests, SamplingParams(max_tokens=20, temperature=0.0))
    for request, (completion,) in zip(requests, result, strict=True):
        ids = torch.tensor([list(request.token_ids)])
        expected = model.generate(ids, do_sample=False, max_new_tokens=20, pad_token_id=tokenizer.pad_token_id)
        assert completion.token_ids.tolist() == expected[0, ids.shape[1] :].tolist()


def test_samples_do_not_depend_on_the_batch(sampler: TransformersSampler, requests: list[Request]) -> None:
    params = SamplingParams(max_tokens=10, n=2, seed=5)
    together = sampler.generate(requests, params)
    backwards = sampler.generate(requests[::-1], params)[::-1]
    alone = [sampler.generate([request], params)[0] for request in requests]
    sampler.max_batch_tokens = 1  # one request at a time
    cut = sampler.generate(requests, params)
    for other in (backwards, alone, cut):
        for ours, theirs in zip(together, other, strict=True):
            assert [c.token_ids.tolist() for c in ours] == [c.token_ids.tolist() for c in theirs]


def test_seeds(sampler: TransformersSampler, requests: list[Request]) -> None:
    def ids(request: Request, **settings: Any) -> list[list[int]]:
        params = SamplingParams(max_tokens=8, **settings)
        return [c.token_ids.tolist() for c in sampler.generate([request], params)[0]]

    first, same = requests[0], Request("other name", requests[0].token_ids, seed=0)
    assert ids(first, seed=1) == ids(same, seed=1)
    assert ids(first, seed=1) != ids(first, seed=2)
    assert ids(first) != ids(Request("r", first.token_ids, seed=9))
    assert ids(first, n=3)[:1] == ids(first, n=1)  # more samples do not change the first


def test_frequencies_are_the_exact_distribution(model: Any, sampler: TransformersSampler, tokenizer: Any) -> None:
    """Chi-square of 4,000 draws of two tokens, three choices each, against the exact joint."""
    prompt = tuple(tokenizer.encode("A quick"))
    draws = 4000
    params = SamplingParams(max_tokens=2, n=draws, top_k=3, temperature=0.9, seed=11)
    sampler.stop_ids = ()
    (completions,) = sampler.generate([Request("p", prompt)], params)
    counts = Counter(tuple(c.token_ids.tolist()) for c in completions)

    def top(ids: tuple[int, ...]) -> dict[int, float]:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids])).logits[0, -1].double() / 0.9
        values, tokens = logits.topk(3)
        return dict(zip(tokens.tolist(), values.softmax(-1).tolist(), strict=True))

    joint = {(a, b): p * q for a, p in top(prompt).items() for b, q in top((*prompt, a)).items()}
    assert set(counts) <= set(joint)
    chi_square = sum((counts[pair] - draws * p) ** 2 / (draws * p) for pair, p in joint.items())
    assert chi_square < 26.1  # 99.9 % of 8 degrees of freedom


def test_end_of_sequence_stops_and_is_kept(model: Any, tokenizer: Any, requests: list[Request]) -> None:
    free = TransformersSampler(model, tokenizer)
    free.stop_ids = ()
    full = free.generate(requests, SamplingParams(max_tokens=12, seed=2))
    stop = full[0][0].token_ids[4].item()
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, stop]
    sampler = TransformersSampler(model, tokenizer)
    assert set(sampler.stop_ids) == {tokenizer.eos_token_id, stop}
    for (long,), (cut,) in zip(full, sampler.generate(requests, SamplingParams(max_tokens=12, seed=2)), strict=True):
        ends = [t for t, token in enumerate(long.token_ids) if token in sampler.stop_ids]
        length = ends[0] + 1 if ends else 12
        assert cut.token_ids.tolist() == long.token_ids[:length].tolist()
        assert cut.stop_reason == ("stop" if ends else "length")
    assert any(c.stop_reason == "stop" for (c,) in sampler.generate(requests, SamplingParams(max_tokens=12, seed=2)))


def test_stop_strings_end_at_the_token_that_completes_them(
    sampler: TransformersSampler, tokenizer: Any, requests: list[Request]
) -> None:
    sampler.stop_ids = ()
    (full,) = sampler.generate(requests[:1], SamplingParams(max_tokens=20, temperature=0.7, seed=4))[0]
    pieces = [tokenizer.decode(full.token_ids[: t + 1]) for t in range(20)]
    stop = pieces[8][len(pieces[4]) :]  # spans several tokens
    assert stop
    params = SamplingParams(max_tokens=20, temperature=0.7, seed=4, stop=("never said", stop))
    (cut,) = sampler.generate(requests[:1], params)[0]
    first = next(t for t, text in enumerate(pieces) if stop in text)
    assert cut.token_ids.tolist() == full.token_ids[: first + 1].tolist()
    assert cut.stop_reason == "stop"
    # A stop string of the prompt is no reason to stop.
    params = SamplingParams(max_tokens=3, seed=4, stop=("What is",))
    assert sampler.generate(requests[:1], params)[0][0].stop_reason == "length"


def test_padded_vocabulary_is_never_sampled(models: dict[str, str], tokenizer: Any, requests: list[Request]) -> None:
    model = AutoModelForCausalLM.from_pretrained(models["big"]).eval()
    with torch.no_grad():
        model.get_output_embeddings().weight[len(tokenizer) :] = model.get_output_embeddings().weight[:13] * 50
    sampler = TransformersSampler(model, tokenizer)
    for completions in sampler.generate(requests, SamplingParams(max_tokens=10, n=4)):
        assert max(c.token_ids.max() for c in completions) < len(tokenizer)


def test_what_does_not_fit_the_window_is_refused_by_name(sampler: TransformersSampler, requests: list[Request]) -> None:
    long = Request("the long one", tuple([5] * 1000))
    with pytest.raises(ValueError, match=r"'the long one' has 1000 tokens .* by 30.* window of 1024"):
        sampler.generate([requests[0], long], SamplingParams(max_tokens=30))
    assert sampler.generate([long], SamplingParams(max_tokens=24))[0][0].token_ids.size
    with pytest.raises(ValueError, match="'nothing' has no tokens"):
        sampler.generate([Request("nothing", ())], SamplingParams())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_tokens": 0}, "max_tokens=0"),
        ({"temperature": -1.0}, "temperature=-1"),
        ({"top_p": 0.0}, "top_p=0"),
        ({"top_k": -1}, "top_k=-1"),
        ({"n": 2, "temperature": 0.0}, "n=2"),
    ],
)
def test_impossible_sampling_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SamplingParams(**settings)


def test_the_models_mode_is_left_as_it_was(model: Any, sampler: TransformersSampler, requests: list[Request]) -> None:
    for training in (True, False):
        model.train(training)
        sampler.generate(requests[:1], SamplingParams(max_tokens=2))
        assert model.training == training


def test_a_policy_is_loaded_and_stamped(model: Any, sampler: TransformersSampler, requests: list[Request]) -> None:
    params = SamplingParams(max_tokens=8, temperature=0.0)
    before = sampler.generate(requests, params)
    torch.manual_seed(3)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    sampler.load_policy(7, other.state_dict().items())
    assert sampler.policy_version == 7
    for request, (completion,) in zip(requests, sampler.generate(requests, params), strict=True):
        check_logprobs(model, request, completion)
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in model.state_dict().items())
    after = sampler.generate(requests, params)
    assert [c[0].token_ids.tolist() for c in before] != [c[0].token_ids.tolist() for c in after]


class Digits:
    """A stand-in tokenizer for families without one."""

    eos_token_id = 1

    def get_vocab(self) -> dict[str, int]:
        return {str(i): i for i in range(VOCAB)}

    def decode(self, ids: Any, **options: Any) -> str:
        return " ".join(map(str, ids))


RECURRENT = {
    "mamba": lambda: hf.MambaConfig(
        vocab_size=VOCAB, hidden_size=32, state_size=8, num_hidden_layers=2, bos_token_id=None, eos_token_id=1
    ),
    "qwen3_5": lambda: hf.Qwen3_5TextConfig(
        **{**COMMON, "num_hidden_layers": 4}, head_dim=8, linear_num_value_heads=4, linear_num_key_heads=2,
        linear_key_head_dim=8, linear_value_head_dim=8,
    ),
    "falcon_h1": lambda: hf.FalconH1Config(
        **COMMON, mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_d_state=8, mamba_n_groups=1, mamba_chunk_size=8
    ),
    "jamba": lambda: hf.JambaConfig(
        **COMMON, attn_layer_period=2, attn_layer_offset=1, num_experts=2, mamba_d_state=8, use_mamba_kernels=False
    ),
    "lfm2": lambda: hf.Lfm2Config(**COMMON, layer_types=["conv", "full_attention"]),
    "gpt_oss": lambda: hf.GptOssConfig(
        **COMMON, head_dim=8, sliding_window=6, num_local_experts=4, num_experts_per_tok=2
    ),
    # Caches that hold one sequence at a time, do not continue one exactly, or are not there.
    "deepseek_v4": lambda: hf.DeepseekV4Config(
        **{**COMMON, "num_key_value_heads": 1}, head_dim=8, q_lora_rank=16, o_lora_rank=16, o_groups=2,
        qk_rope_head_dim=4, moe_intermediate_size=24, n_routed_experts=4, num_experts_per_tok=2, index_n_heads=2,
        index_head_dim=8, sliding_window=12,
    ),
    "minimax": lambda: hf.MiniMaxConfig(
        **COMMON, layer_types=["linear_attention", "full_attention"], block_size=8, num_local_experts=2
    ),
    "minimax, windowed": lambda: hf.MiniMaxConfig(
        **COMMON, layer_types=["linear_attention", "full_attention"], block_size=8, num_local_experts=2,
        sliding_window=12,
    ),
    "rwkv": lambda: hf.RwkvConfig(
        vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, context_length=128, bos_token_id=None, eos_token_id=1
    ),
    "gpt": lambda: hf.OpenAIGPTConfig(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=128),
}  # fmt: skip
WAYS = {
    "deepseek_v4": Ways(together=Version(hf.__version__) >= Version("5.23")),  # its cache was made to hold several
    "minimax": Ways(together=False),
    **dict.fromkeys(("minimax, windowed", "rwkv", "gpt"), Ways(False, Whole)),
}


WINDOWS = {"gemma2", "gemma3"}
"""Families whose caches forget what is far behind."""
TURN = SamplingParams(max_tokens=6, seed=1)


def make_any(family: str) -> Any:
    """A model of a family of attention or of states, with weights large enough that a wrong state shows."""
    if family in FAMILIES:
        return make_family(family, True, scale=2.0).eval()
    torch.manual_seed(0)
    model = hf.AutoModelForCausalLM.from_config(RECURRENT[family]()).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4.0 if parameter.dim() == 2 else 1.0)
    return model


@pytest.mark.parametrize("family", [*FAMILIES, *RECURRENT])
def test_every_family_samples_from_itself(family: str) -> None:
    """Left padding, sliding windows, recurrent states, n > 1 and rows that finish early."""
    model = make_any(family)
    rng = np.random.default_rng(0)
    requests = [Request(str(n), tuple(rng.integers(2, VOCAB, size=n).tolist()), n) for n in (3, 11, 6)]
    sampler = TransformersSampler(model, Digits())
    resumes = family in FAMILIES and family not in WINDOWS
    assert sampler._proven == (ONE_REGIME, WAYS.get(family, Ways(resumes=resumes)))
    sampler.stop_ids = tuple(range(VOCAB // 8))  # about one row in eight ends with every token
    result = sampler.generate(requests, SamplingParams(max_tokens=16, n=2, seed=1))
    assert len({len(c.token_ids) for completions in result for c in completions}) > 1
    for request, completions in zip(requests, result, strict=True):
        for completion in completions:
            check_logprobs(model, request, completion)


def take_turns(sampler: TransformersSampler, turns: int = 4) -> tuple[list[tuple[Request, Completion]], list[int]]:
    """Chats of several turns, one of which ends early and one begins late; how many columns each pass had."""
    rng = np.random.default_rng(1)
    chats = {str(n): rng.integers(2, VOCAB, size=n).tolist() for n in (3, 11, 6)}
    columns: list[int] = []
    hook = sampler.model.register_forward_pre_hook(
        lambda module, args, kwargs: columns.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    found = []
    for turn in range(turns):
        if turn == 2:
            del chats["11"]
            chats["late"] = rng.integers(2, VOCAB, size=9).tolist()
        requests = [Request(name, tuple(ids), turn) for name, ids in chats.items()]
        for request, (completion,) in zip(requests, sampler.generate(requests, TURN), strict=True):
            found.append((request, completion))
            following = rng.integers(2, VOCAB, size=int(rng.integers(1, 5))).tolist()
            chats[request.id] += [*completion.token_ids.tolist(), *following]
    hook.remove()
    return found, columns


@pytest.mark.parametrize("family", [*FAMILIES, *RECURRENT])
def test_the_turns_of_a_chat_are_sampled_from_the_model_itself(family: str, caplog: pytest.LogCaptureFixture) -> None:
    model = make_any(family)
    sampler = TransformersSampler(model, Digits())
    sampler.stop_ids = tuple(range(VOCAB // 8))
    sampler.prove()
    with sampler.chats():
        found, columns = take_turns(sampler)
    for request, completion in found:
        check_logprobs(model, request, completion)
    anew, whole = take_turns(sampler)  # outside every turn reads the whole chat
    assert [c.token_ids.tolist() for _, c in found] == [c.token_ids.tolist() for _, c in anew]
    if family in FAMILIES and family not in WINDOWS:
        assert sum(columns) < 0.7 * sum(whole) and "reads the whole chat" not in caplog.text
    else:
        assert columns == whole
        with sampler.chats():  # it is said once
            pass
        assert caplog.text.count("every turn reads the whole chat again") == 1


def test_a_turn_of_a_chat_costs_its_own_tokens(model: Any, sampler: TransformersSampler) -> None:
    sampler.prove()
    widths: list[int] = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: widths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    ids = list(range(5, 25))
    with sampler.chats():
        for new in (20, 3, 7):
            widths.clear()
            ((said,),) = sampler.generate([Request("chat", tuple(ids))], SamplingParams(max_tokens=4))
            assert widths[0] == (new if new == 20 else new + 1)  # the last token that was said was not read yet
            ids += [*said.token_ids.tolist(), *range(30, 33 if new == 20 else 37)]
    widths.clear()
    sampler.generate([Request("chat", tuple(ids))], SamplingParams(max_tokens=4))
    assert widths[0] == len(ids)  # nothing is kept beyond


def test_what_was_read_is_of_the_same_tokens_and_within_the_budget(model: Any, sampler: TransformersSampler) -> None:
    sampler.prove()
    widths: list[int] = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: widths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    params = SamplingParams(max_tokens=4)
    first = [Request("a", tuple(range(5, 25))), Request("b", tuple(range(30, 40)))]
    with sampler.chats():
        (a,), (b,) = sampler.generate(first, params)
        rewritten = (*first[0].token_ids[:-1], 99, *a.token_ids.tolist(), 7)  # a chat that a template cut otherwise
        widths.clear()
        ((said,),) = sampler.generate([Request("a", rewritten)], params)
        assert widths[0] == len(rewritten)
        check_logprobs(model, Request("a", rewritten), said)
    sampler.max_batch_tokens = 24
    with sampler.chats():
        (a,), (b,) = sampler.generate(first, params)
        following = [
            Request(r.id, (*r.token_ids, *c.token_ids.tolist(), 7)) for r, c in zip(first, (a, b), strict=True)
        ]
        widths.clear()
        sampler.generate(following, params)
        assert min(widths[:5]) <= 2 and max(widths) >= 20  # one of them was kept, the other had no room


def test_a_cache_that_confuses_copies_is_noticed_and_the_samples_are_right(caplog: pytest.LogCaptureFixture) -> None:
    """Silently: its rows stay where they were when others leave, or a prompt is copied."""
    model = make_family("qwen3", True, scale=2.0).eval()
    plain = model.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        output = plain(*args, **kwargs)
        cache = getattr(output, cache_argument(model))
        if cache is not None:
            cache.reorder_cache = lambda places: type(cache).reorder_cache(cache, places.sort().values.flip(0))
        return output

    model.forward = forward
    sampler = TransformersSampler(model, Digits())
    rng = np.random.default_rng(0)
    requests = [Request(str(n), tuple(rng.integers(2, VOCAB, size=n).tolist()), n) for n in (3, 9)]
    result = sampler.generate(requests, SamplingParams(max_tokens=8, n=3, seed=1))
    assert sampler._proven[1] == Ways(together=False) and "one sequence at a time" in caplog.text
    for request, completions in zip(requests, result, strict=True):
        assert len({tuple(c.token_ids) for c in completions}) == 3
        for completion in completions:
            check_logprobs(model, request, completion)


@pytest.mark.parametrize("ways", [Ways(), Ways(together=False), Ways(False, Whole)], ids=["together", "apart", "whole"])
def test_every_way_draws_the_same_samples(
    sampler: TransformersSampler, requests: list[Request], ways: Ways, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = SamplingParams(max_tokens=10, n=2, seed=5, temperature=0.8, top_k=30, repetition_penalty=1.2)
    expected = sampler.generate(requests, params)
    monkeypatch.setitem(sampler.__dict__, "_proven", (ONE_REGIME, ways))
    for ours, theirs in zip(sampler.generate(requests, params), expected, strict=True):
        assert [c.token_ids.tolist() for c in ours] == [c.token_ids.tolist() for c in theirs]
