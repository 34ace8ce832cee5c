"""What chat templates really print: openings, ends of turns, text in its place, and what they leave out."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from engine_helpers import make_config
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, GenerationConfig

from opdengine.cli import _load_student
from opdengine.config.train import TeacherConfig
from opdengine.data.prompts import DataError, PromptSet
from opdengine.data.templates import Reader, check_templates, readable
from opdengine.metrics import write_jsonl
from opdengine.models.chat import (
    encode_answer,
    encode_behind,
    encode_chat,
    load_tokenizer,
    require_same_mode,
    stop_token_ids,
)
from opdengine.models.rendering import arguments_form, opening, render, turn_end
from opdengine.models.surrogates import without_surrogates
from opdengine.rollout.transformers import TransformersSampler
from opdengine.rollout.vllm.engine import EngineInfo, Sampled
from opdengine.rollout.vllm.sampler import VLLMSampler
from opdengine.teachers.local import LocalTeacher
from opdengine.teachers.server import ServedTeacher
from opdengine.training.build_sampler import build_sampler
from opdengine.training.run import train
from opdengine.types import Prompt, Request, SamplingParams

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\nOPENING{% endif %}"
)
QUESTION = {"role": "user", "content": "?"}


def with_template(tiny: Any, template: str, extra: Sequence[str] = ()) -> Any:
    tokenizer = tiny.make_tokenizer(tuple(extra))
    tokenizer.chat_template = template
    return tokenizer


# ---------------------------------------------------------------------------------------- openings

OPEN = ("<think>\n", "[THINK]", "<|START_THINKING|>", "<reasoning>\n", "Answer: ", "<|channel|>analysis<|message|>")
CLOSED = ("<think>\n\n</think>\n\n", "[THINK][/THINK]", "<|START_THINKING|><|END_THINKING|>")


@pytest.mark.parametrize("written", OPEN)
def test_an_answer_that_only_one_template_has_begun_is_refused(tiny: Any, written: str) -> None:
    plain, begun = (with_template(tiny, CHATML.replace("OPENING", text)) for text in ("", written))
    for student, teacher in ((plain, begun), (begun, plain)):
        with pytest.raises(
            ValueError, match=r"open answers differently: .* of teacher 'T' behind .*same chat_template"
        ):
            require_same_mode(student, {}, teacher, {}, "T")
    require_same_mode(begun, {}, with_template(tiny, begun.chat_template), {}, "T")


def test_a_thought_is_also_seen_behind_other_markup(tiny: Any) -> None:
    other = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}[assistant]"
    chatml, thinking = (with_template(tiny, CHATML.replace("OPENING", text)) for text in ("", "<think>\n"))
    require_same_mode(chatml, {}, with_template(tiny, other), {}, "T")
    require_same_mode(thinking, {}, with_template(tiny, other + "<think>"), {}, "T")
    for teacher, student in ((chatml, other + "<think>"), (thinking, other)):
        with pytest.raises(ValueError, match="open answers differently"):
            require_same_mode(with_template(tiny, student), {}, teacher, {}, "T")


@pytest.mark.parametrize("written", CLOSED)
def test_an_empty_thought_on_one_side_is_pointed_out(tiny: Any, caplog: pytest.LogCaptureFixture, written: str) -> None:
    """Both answer at once: a hybrid model that is told not to think, and an instruct model."""
    plain, closed = (with_template(tiny, CHATML.replace("OPENING", text)) for text in ("", written))
    for student, teacher in ((plain, closed), (closed, plain)):
        caplog.clear()
        require_same_mode(student, {}, teacher, {}, "T")
        assert "the chat templates differ: an answer of the student begins behind" in caplog.text


def test_a_system_message_that_one_template_writes_by_itself_is_pointed_out(
    tiny: Any, caplog: pytest.LogCaptureFixture
) -> None:
    own = "{% if messages[0].role != 'system' %}<|im_start|>system\nReason step by step.<|im_end|>\n{% endif %}"
    plain, told = (with_template(tiny, begin + CHATML.replace("OPENING", "")) for begin in ("", own))
    require_same_mode(plain, {}, plain, {}, "T")
    assert not caplog.text
    require_same_mode(plain, {}, told, {}, "T")
    assert "Reason step by step." in caplog.text and "for teacher 'T', which judges under that" in caplog.text


def test_settings_that_both_sides_state_are_meant(tiny: Any) -> None:
    template = CHATML.replace("OPENING", "{% if think %}<think>\n{% endif %}")
    both = with_template(tiny, template), with_template(tiny, template)
    require_same_mode(both[0], {"think": True}, both[1], {"think": False}, "T")
    with pytest.raises(ValueError, match="lack 'think'"):
        require_same_mode(both[0], {"think": True}, both[1], {}, "T")
    fixed = with_template(tiny, CHATML.replace("OPENING", ""))
    with pytest.raises(ValueError, match="open answers differently"):
        require_same_mode(both[0], {"think": True}, fixed, {"think": True}, "T")
    require_same_mode(both[0], {"think": False}, fixed, {"think": False}, "T")


# ---------------------------------------------------------------------------------- ends of a turn

END = "{% for m in messages %}<|h|>{{ m.role }}\n{{ m.content }}"
TURNS = {
    "chatml": (CHATML.replace("OPENING", ""), "<|im_end|>"),
    "llama-3": (END + "<|e|>{% endfor %}{% if add_generation_prompt %}<|h|>{% endif %}", "<|e|>"),
    "llama-2": (
        "{% for m in messages %}{% if m.role == 'user' %}<|h|>[I] {{ m.content }} [/I]{% else %} {{ m.content }} <|e|>"
        "{% endif %}{% endfor %}",
        "<|e|>",
    ),
    "phi": (END + "<|e|>\n{% endfor %}{% if add_generation_prompt %}<|h|>{% else %}<|x|>{% endif %}", "<|e|>"),
    "document end": (END + "<|e|>{% endfor %}{% if add_generation_prompt %}<|h|>{% else %}<|x|>{% endif %}", "<|e|>"),
    "cohere": (END + "<|e|><|x|>{% endfor %}{% if add_generation_prompt %}<|h|>{% endif %}", "<|x|>"),
    "gpt-oss": (
        END + "{% if loop.last and m.role == 'assistant' %}<|x|>{% else %}<|e|>{% endif %}{% endfor %}",
        "<|x|>",
    ),
    "glm": (END + "{% endfor %}{% if add_generation_prompt %}<|h|>assistant{% endif %}", "<|h|>"),
    "alpaca": ("{% for m in messages %}### {{ m.role }}:\n{{ m.content }}\n\n{% endfor %}### assistant:\n", None),
    "no token": (END.replace("<|h|>", "<") + "<end_of_turn>{% endfor %}", None),
    "keeps no answer": ("{% for m in messages if m.role == 'user' %}{{ m.content }}<|e|>{% endfor %}", None),
    "refuses": ("{{ messages[0].content }}{% if messages | length > 1 %}{{ raise_exception('no') }}{% endif %}", None),
}


@pytest.mark.parametrize("name", TURNS)
def test_the_token_that_ends_a_turn_is_what_the_template_prints(tiny: Any, name: str) -> None:
    template, expected = TURNS[name]
    tokenizer = with_template(tiny, template, ["<|h|>", "<|e|>", "<|x|>", "<|endoftext|>"])
    tokenizer.eos_token = "<|endoftext|>"
    end = turn_end(tokenizer)
    assert end == (None if expected is None else tokenizer.convert_tokens_to_ids(expected))
    model = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=[7, 9]))
    assert set(stop_token_ids(tokenizer, model)) == {tokenizer.eos_token_id, 7, 9} | ({end} - {None})


def test_a_template_without_an_end_is_pointed_out(tiny: Any, caplog: pytest.LogCaptureFixture) -> None:
    check_templates([Reader("the student", with_template(tiny, TURNS["alpaca"][0]))], converses=True)
    assert "the student ends answers without a token of their own, so sampling stops at the eos token" in caplog.text
    caplog.clear()
    check_templates([Reader("the student", tiny.make_tokenizer())], converses=True)
    assert not caplog.text


@pytest.mark.parametrize(("begin", "said"), [("", "with no '<s>'"), ("{{ bos_token }}" * 2, "with 2 times '<s>'")])
def test_a_chat_without_one_bos_is_pointed_out(
    tiny: Any, caplog: pytest.LogCaptureFixture, begin: str, said: str
) -> None:
    """Only where the tokenizer puts it before other texts."""
    tokenizer = with_template(tiny, begin + CHATML)
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    check_templates([Reader("the student", tokenizer)], converses=False)
    assert not caplog.text
    single = [("<s>", tokenizer.bos_token_id)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=single)
    check_templates([Reader("the student", tokenizer)], converses=False)
    assert f"the chat template of the student begins a chat {said}" in caplog.text
    caplog.clear()
    tokenizer.chat_template = "{{ bos_token }}" + CHATML
    check_templates([Reader("the student", tokenizer)], converses=False)
    assert not caplog.text


@pytest.fixture(scope="module")
def base(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Any]:
    """A model whose turns end with an ordinary added token, and whose eos is another."""
    tokenizer = tiny.make_tokenizer()
    tokenizer.add_tokens(["<end>"])
    tokenizer.eos_token = "<|pad|>"
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}<end>\n{% endfor %}assistant:"
    return tiny.make_model(tmp_path_factory.mktemp("base") / "model", tokenizer, seed=3), tokenizer


def test_sampling_stops_at_the_end_of_a_turn(base: tuple[str, Any]) -> None:
    folder, tokenizer = base
    model = AutoModelForCausalLM.from_pretrained(folder)
    end = tokenizer.convert_tokens_to_ids("<end>")
    sampler = TransformersSampler(model, tokenizer)
    requests = [Request(str(i), tuple(encode_chat(tokenizer, [QUESTION])), seed=i) for i in range(48)]
    rows = [c for cs in sampler.generate(requests, SamplingParams(max_tokens=300)) for c in cs]
    ended = [c for c in rows if end in c.token_ids]
    assert ended
    for completion in ended:
        assert (
            completion.stop_reason == "stop"
            and completion.token_ids.tolist().index(end) == len(completion.token_ids) - 1
        )
        assert np.isfinite(completion.logprobs).all() and "<end>" not in completion.text


@pytest.mark.parametrize("lora", [None, {"r": 2, "merge_final": True}])
def test_a_trained_base_model_is_known_to_end_its_turns(
    tiny: Any, base: tuple[str, Any], prompt_file: str, tmp_path: Path, lora: dict[str, Any] | None
) -> None:
    """Whoever generates with what a run has written stops where the run's sampler did."""
    folder, tokenizer = base
    other = tiny.make_model(tmp_path / "teacher", tokenizer, seed=4)
    models = {"student": folder, "big": other, "small": other}
    settings: dict[str, Any] = {"method": "opd", "teachers": [{"model": other}], "max_steps": 1, "lora": lora}
    train(make_config(models, prompt_file, tmp_path / "run", **settings), progress=False)
    written = GenerationConfig.from_pretrained(tmp_path / "run" / ("final" if lora is None else "merged"))
    assert written.eos_token_id == sorted([tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<end>")])


def test_the_end_of_a_turn_is_that_of_the_runs_settings(
    base: tuple[str, Any], tmp_path: Path, models: dict[str, str]
) -> None:
    """A template that ends turns otherwise with some argument: every sampler and teacher in this process is told."""
    folder, tokenizer = base
    template = tokenizer.chat_template.replace("<end>", "{% if short %}<|pad|>{% else %}<end>{% endif %}")
    pad, end = tokenizer.convert_tokens_to_ids(["<|pad|>", "<end>"])
    model = AutoModelForCausalLM.from_pretrained(folder)
    for short in (False, True):
        settings = {"chat_template": template, "chat_template_kwargs": {"short": short}}
        config = make_config({**models, "student": folder}, "d", tmp_path, **settings)
        teacher = LocalTeacher(TeacherConfig(folder, name="t", **settings))
        named = load_tokenizer(folder, chat_template=template)
        for sampler in (build_sampler(config, model, named), teacher._generator, _load_student(config)[0]):
            assert isinstance(sampler, TransformersSampler)
            assert (end in sampler.stop_ids) == (not short) and pad in sampler.stop_ids


def test_the_thought_that_a_teachers_template_opens_is_known(models: dict[str, str]) -> None:
    for opens in ("", "<think>\n"):
        template = CHATML.replace("OPENING", "{% if think %}" + opens + "{% endif %}")
        told = {"name": "t", "chat_template": template}
        for think in (False, True):
            config = TeacherConfig(models["big"], **told, chat_template_kwargs={"think": think})
            tokenizer = load_tokenizer(models["big"], chat_template=template)
            far = dataclasses.replace(config, base_url="http://127.0.0.1:1/v1")
            for teacher in (LocalTeacher(config), ServedTeacher(far, tokenizer, len(tokenizer))):
                assert teacher.opening == (opens if think else "")


class Recorded:
    """An engine that notes what it is asked."""

    name, replaceable = "the engine", False
    stamp_of_all = ""

    def describe(self) -> Any:
        return EngineInfo(True, 100, 300, {}, {}, "model", "float32", "processed_logprobs")

    def held(self) -> str:
        return self.stamp_of_all

    def stamp(self, name: str) -> None: ...

    def load(self, policy: Any, name: str) -> None:
        self.stamp_of_all = name

    def generate(
        self, prompts: Sequence[np.ndarray], seeds: Sequence[Sequence[int]], sampling: Mapping[str, Any]
    ) -> list[Sampled]:
        self.asked = sampling
        return [Sampled(frozenset([self.stamp_of_all]), np.array([1]), np.array([0.0]), "stop")]

    def sleep(self) -> None: ...

    def close(self) -> None: ...


def test_vllm_is_told_the_ends(
    base: tuple[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, models: dict[str, str]
) -> None:
    folder, tokenizer = base
    ends = list(stop_token_ids(tokenizer))
    engine = Recorded()
    VLLMSampler(engine, tokenizer, [], stop_ids=ends).generate([Request("a", (1, 2))], SamplingParams(max_tokens=4))
    assert engine.asked["stop_token_ids"] == ends and len(ends) == 2
    model = AutoModelForCausalLM.from_pretrained(folder)
    made: dict[str, Any] = {}
    for place in ("open_child", "open_server"):
        monkeypatch.setattr(f"opdengine.rollout.vllm.opening.{place}", lambda *a, **settings: made.update(settings))
        mode = {"vllm_mode": "server", "vllm_server_base_url": "http://127.0.0.1:1"} if "server" in place else {}
        made.clear()
        build_sampler(
            make_config({**models, "student": folder}, "d", tmp_path, use_vllm=True, **mode), model, tokenizer
        )
        assert set(ends) <= set(made["stop_ids"])


# -------------------------------------------------------------------------------- text in its place

ALPACA = (
    "{{bos_token}}{% for m in messages %}{% if m.role in ('user', 'tool') %}### Instruction:\n{{m.content}}\n"
    "{% else %}### Response:\n{{m.content}}END\n\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}### Response:\n{% endif %}"
)


def sentencepiece(kind: str, template: str = ALPACA.replace("END", "")) -> Any:
    """A tokenizer that marks the beginnings of words in one of the ways of SentencePiece."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE(unk_token="<unk>"))
    if kind == "prepend":  # as in files of Llama-2
        made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=kind)
    made.decoder = decoders.Metaspace()
    text = ["### Instruction:\nx\n### Response:\ny\n\n", "weather is nice today in Paris hello hi"] * 5
    trainer = trainers.BpeTrainer(vocab_size=200, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False)
    made.train_from_iterator(text, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize("kind", ["never", "first", "always", "prepend"])
@pytest.mark.parametrize("end", ["", "</s>", " </s>"])
def test_a_conversation_in_pieces_has_the_ids_of_the_whole(kind: str, end: str) -> None:
    tokenizer = sentencepiece(kind, ALPACA.replace("END", end))
    first, answer = [{"role": "user", "content": "hello"}], [{"role": "user", "content": "weather today"}]
    whole = encode_chat(tokenizer, [*first, {"role": "assistant", "content": "hi"}, *answer])
    start = encode_chat(tokenizer, first)
    assert whole[: len(start)] == start
    following = encode_answer(tokenizer, answer)
    assert whole[-len(following) :] == following
    reply = whole[len(start) : -len(following)]
    assert tokenizer.decode(reply).strip() == "hi"
    assert turn_end(tokenizer) == (tokenizer.eos_token_id if end else None)
    if end:  # what was sampled ended with the token itself, whatever the template prints before it
        stopped = [*reply, tokenizer.eos_token_id]
        rest = encode_answer(tokenizer, answer, sampled=stopped)
        assert tokenizer.eos_token_id not in rest and whole[-len(rest) :] == rest
    assert encode_answer(tokenizer, answer, sampled=reply) == following


@pytest.mark.parametrize("kind", ["never", "first", "always", "prepend"])
def test_a_text_has_the_ids_of_its_place(kind: str) -> None:
    tokenizer = sentencepiece(kind)
    before = opening(tokenizer)
    ids = tokenizer.encode(before + "hello Paris", add_special_tokens=False)
    found = encode_behind(tokenizer, before, "hello Paris")
    assert ids[-len(found) :] == found and tokenizer.decode(found).strip() == "hello Paris"


# ---------------------------------------------------------------------------- what templates leave out

TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
FULL = (
    "{% if tools %}<tools>{{ tools | tojson }}</tools>{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{{ m.content }}{% for c in m.tool_calls or [] %}<call>{{ c | tojson }}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SYSTEM = {"role": "system", "content": "Be brief."}
CALLING = [QUESTION, {"role": "assistant", "content": "", "tool_calls": [CALL]}, {"role": "tool", "content": "1"}]
LOSSES = {
    "tools": (FULL.replace("{% if tools %}", "{% if false %}"), [QUESTION], [TOOL], "leaves out the tools"),
    "calls": (FULL.replace("m.tool_calls or []", "[]"), CALLING, [], "leaves out the tool calls"),
    "function": (
        FULL, [QUESTION, {"role": "assistant", "function_call": {"name": "f", "arguments": "{}"}}, QUESTION], [],
        "leaves out the function calls",
    ),
    "thought": (
        FULL, [QUESTION, {"role": "assistant", "reasoning_content": "1 + 1"}, QUESTION], [],
        "leaves out messages that hold nothing but 'reasoning_content'",
    ),
    "tool": (
        FULL.replace("{{ m.content }}", "{% if m.role != 'tool' %}{{ m.content }}{% endif %}"),
        CALLING, [TOOL], r"leaves out messages of the roles \['tool'\]",
    ),
    "system": (
        FULL.replace("{{ m.content }}", "{% if m.role != 'system' %}{{ m.content }}{% endif %}"),
        [SYSTEM, QUESTION], [], r"leaves out messages of the roles \['system'\]",
    ),
    "earlier": (
        FULL.replace("in messages", "in messages[-1:]"),
        [QUESTION, {"role": "assistant", "content": "?"}, QUESTION], [],
        r"leaves out messages of the roles \['assistant', 'user'\]",
    ),
    "raises": (
        FULL + "{% if messages[0].role == 'system' %}{{ raise_exception('no system here') }}{% endif %}",
        [SYSTEM, QUESTION], [], r"cannot render a chat of the roles \['system', 'user'\]: no system here",
    ),
    "breaks": (FULL + "{{ messages[0].content + 1 }}", [QUESTION], [], "cannot render a chat of the roles"),
}  # fmt: skip


@pytest.mark.parametrize("name", LOSSES)
def test_what_a_template_leaves_out_of_the_data_is_refused_or_counted(tiny: Any, name: str) -> None:
    template, messages, tools, problem = LOSSES[name]
    shown = "{{ m.content }}{{ m.reasoning_content }}{{ (m.function_call or {}).name }}"
    good = Reader("teacher 'good'", with_template(tiny, FULL.replace("{{ m.content }}", shown)))
    bad = Reader("teacher 'bad'", with_template(tiny, template), keys=("a",))
    prompts = [Prompt(f"p{i}", tuple(messages), tuple(tools), key="ab"[i % 2]) for i in range(4)]
    if name != "breaks":
        prompts.append(Prompt("plain", (QUESTION,), key="a"))
    data = PromptSet(tuple(prompts), {})
    assert readable(data, [good]) is data
    unread = rf"prompt 'p0' and 1 more: the chat template of teacher 'bad' {problem}(.|\n)*another chat_template"
    with pytest.raises(DataError, match=rf"2 of {len(prompts)} prompts cannot be read in full:\n  {unread}"):
        readable(data, [good, bad])
    kept = readable(data, [good, bad], skip_bad_rows=True)
    assert [p.id for p in kept.prompts if p.id != "plain"] == ["p1", "p3"] and kept.dropped == {"chat_template": 2}
    with pytest.raises(ValueError, match=problem):
        bad.encode(messages, tools)
    assert good.encode(messages, tools) == encode_chat(good.tokenizer, messages, tools)


def test_text_beside_calls_that_a_template_leaves_out_is_pointed_out(
    tiny: Any, caplog: pytest.LogCaptureFixture
) -> None:
    template = FULL.replace("{{ m.content }}", "{% if not m.tool_calls %}{{ m.content }}{% endif %}")
    chat = [QUESTION, {"role": "assistant", "content": "I look it up.", "tool_calls": [CALL]}, CALLING[2]]
    Reader("the student", with_template(tiny, template)).encode(chat)
    assert "the student leaves out the text of messages that call tools" in caplog.text


def test_thoughts_that_a_template_leaves_out_are_pointed_out_once(tiny: Any, caplog: pytest.LogCaptureFixture) -> None:
    """As many do with those of earlier turns."""
    thought = {"role": "assistant", "content": "2", "thinking": "1 + 1"}
    shows = FULL.replace("{{ m.content }}", "{{ m.thinking }}{{ m.content }}")
    Reader("the student", with_template(tiny, shows)).encode([QUESTION, thought, QUESTION])
    assert "thoughts" not in caplog.text
    reader = Reader("teacher 'T'", with_template(tiny, FULL))
    reader.encode([QUESTION, thought, QUESTION])
    reader.encode([QUESTION, thought, QUESTION, thought, QUESTION])
    assert caplog.text.count("teacher 'T' leaves out the thoughts of earlier messages ('thinking')") == 1


def test_a_judge_is_instructed_by_a_system_message(tiny: Any) -> None:
    readers = [Reader("the student", tiny.make_tokenizer())]
    check_templates([*readers, Reader("teacher 'a'", tiny.make_tokenizer())], converses=False, judges=True)
    for name in ("system", "raises"):
        silent = with_template(tiny, LOSSES[name][0])
        check_templates([*readers, Reader("teacher 'a'", silent)], converses=False)
        with pytest.raises(
            ValueError, match=r"of teacher 'a' .*with which a judge is instructed; .* or a judge_prompt"
        ):
            check_templates([*readers, Reader("teacher 'a'", silent)], converses=False, judges=True)


def test_a_debate_goes_on_behind_a_tool_result(tiny: Any) -> None:
    """The debating teachers read a user's message there, which strict templates refuse."""
    strict = FULL + (
        "{% for m in messages %}{% if loop.index0 and m.role == 'user' and messages[loop.index0 - 1].role == 'tool' %}"
        "{{ raise_exception('no user behind a tool') }}{% endif %}{% endfor %}"
    )
    data = PromptSet((Prompt("p", tuple(CALLING)),), {})
    tokenizer = with_template(tiny, strict)
    assert readable(data, [Reader("t", tokenizer)]) is data
    with pytest.raises(DataError, match="no user behind a tool"):
        readable(data, [Reader("t", tokenizer, debates=True)])


def test_a_run_refuses_before_any_model_is_loaded(
    models: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", refuse)
    data = tmp_path / "d.jsonl"
    rows: list[dict[str, Any]] = [{"prompt": "x", "answer": "1"}, {"prompt": "x", "tools": [TOOL], "answer": "1"}]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def run(**changes: Any) -> None:
        train(make_config(models, str(data), tmp_path / "out", **changes), progress=False)

    with pytest.raises(DataError, match=r"prompt 'd:2': the chat template of the student leaves out the tools"):
        run()
    teachers = [{"model": models["big"], "chat_template": FULL}, {"model": models["small"]}]
    with pytest.raises(DataError, match=r"prompt 'd:2': the chat template of teacher 'small' leaves out the tools"):
        run(chat_template=FULL, teachers=teachers)
    with pytest.raises(AssertionError, match="a model was loaded"):
        run(skip_bad_rows=True)
    whole = tmp_path / "w.jsonl"
    whole.write_text(json.dumps(rows[0]) + "\n")
    with pytest.raises(DataError, match="of the student leaves out the tools"):
        train(make_config(models, str(whole), tmp_path / "out", eval_data=[str(data)]), progress=False)
    teachers[1]["chat_template"] = CHATML.replace("OPENING", "<think>\n")
    with pytest.raises(ValueError, match="the chat templates open answers differently"):
        train(make_config(models, str(whole), tmp_path / "out", teachers=teachers), progress=False)


def test_arguments_of_calls_take_the_form_that_the_template_prints_right(tiny: Any) -> None:
    shown = '{"x": "1"}'
    templates = {
        "mapping": FULL.replace("c | tojson", "c.function.arguments | tojson"),
        "text": FULL.replace("c | tojson", "c.function.arguments"),
        "joined": FULL.replace("c | tojson", "'' + c.function.arguments"),
    }
    for name, template in templates.items():
        tokenizer = with_template(tiny, template)
        assert arguments_form(tokenizer) == ("mapping" if name == "mapping" else "text")
        for arguments in ({"x": "1"}, shown):
            call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
            assert f"<call>{shown}<" in render(
                tokenizer, [QUESTION, {"role": "assistant", "content": "", "tool_calls": [call]}]
            )
    items = with_template(
        tiny,
        FULL.replace("{{ c | tojson }}", "{% for k, v in c.function.arguments | items %}{{ k }}={{ v }}{% endfor %}"),
    )
    assert arguments_form(items) == "mapping" and arguments_form(with_template(tiny, CHATML)) == ""


# -------------------------------------------------------------------------- halves of surrogate pairs


def test_lone_surrogates_are_replaced_at_every_level_and_pairs_joined(tmp_path: Path) -> None:
    fine = {"a": ["é\U0001f600", 1, None], "b": ({"c": "x"},)}
    assert without_surrogates(fine) is fine
    cut = {"a\ud83d": ["x\udc00y", 1], "b": ({"c": "\ud83d" + "\ude00"},)}
    assert without_surrogates(cut) == {"a\ufffd": ["x\ufffdy", 1], "b": ({"c": "\U0001f600"},)}
    deep: Any = []
    for _ in range(5000):
        deep = [deep]
    assert without_surrogates(deep) is deep
    write_jsonl(tmp_path / "a.jsonl", [{"text": "cut \ud83d é"}])
    assert json.loads((tmp_path / "a.jsonl").read_text()) == {"text": "cut \ud83d é"}


def test_a_chat_with_a_lone_surrogate_is_one_clear_error(tokenizer: Any) -> None:
    with pytest.raises(ValueError, match=r"of the roles \['user'\]: a text in it holds half of a character"):
        encode_chat(tokenizer, [{"role": "user", "content": "cut \ud83d"}])


# ------------------------------------------------------------------------------- remembered chats


class Counted:
    """A tokenizer that notes the chats which it renders."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.rendered: list[Any] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def apply_chat_template(self, chat: Any, **how: Any) -> Any:
        if how.get("tokenize"):
            self.rendered.append(chat)
        return self._tokenizer.apply_chat_template(chat, **how)


def test_a_chat_is_encoded_once_for_all_samples_that_are_judged_under_it(tiny: Any) -> None:
    tokenizer = Counted(with_template(tiny, CHATML))
    reader = Reader("the teacher", tokenizer)
    for _ in range(3):
        ids = reader.encode([dict(QUESTION)])
        assert ids == encode_chat(tokenizer._tokenizer, [QUESTION])
        ids.append(1)  # what a caller does to its ids is its own
    assert len(tokenizer.rendered) == 1
    other = reader.encode([{**QUESTION, "content": "!"}])
    assert other == encode_chat(tokenizer._tokenizer, [{**QUESTION, "content": "!"}]) != ids[:-1]
    with_numbers = [{"role": "user", "content": "?", "weight": weight} for weight in (1, 2)]
    assert [reader.encode([message]) for message in with_numbers] == [ids[:-1], ids[:-1]]
    assert len(tokenizer.rendered) == 4


def test_a_template_that_tells_the_time_is_asked_each_time(tiny: Any) -> None:
    tokenizer = Counted(with_template(tiny, "{{ strftime_now('%f') }}" + CHATML))
    reader = Reader("the teacher", tokenizer)
    for _ in range(3):
        reader.encode([QUESTION])
    assert len(tokenizer.rendered) == 3
