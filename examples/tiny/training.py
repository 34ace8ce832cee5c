"""Teaching the tiny models: supervised steps, generation, and calibration of confidences."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence

import torch
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from opdengine.methods.debate.prompts import parse_confidence
from tiny import task
from tiny.lessons import (
    IGNORE,
    OWN_SKILL,
    PROMPTS,
    Chat,
    Lesson,
    Pupil,
    encode,
    guess,
    spoken_answer,
    user_chat,
)

BATCH = 64
LEARNING_RATE = 3e-3
MAX_NEW_TOKENS = 16
DEBATED_PROMPTS = 192  # per skill
CALIBRATION_SAMPLES = 4
CORRUPT = 0.7  # share of plain answers that are taught off the track
FOREIGN_PROBLEMS = 10
WARM_START_SHARES = (0.6, 0.3, 0.1)  # convert, compile, both

# (share, chat, skill) with skill "own", "foreign" or "both".
Mix = Sequence[tuple[float, str, str]]
FOLLOW: Mix = (
    (0.25, "later", "foreign"), (0.15, "later", "both"), (0.20, "score", "foreign"),
    (0.15, "score", "both"), (0.20, "plain", "own"), (0.05, "plain", "both"),
)  # fmt: skip
DEBATE: Mix = (
    (0.12, "plain", "own"), (0.08, "plain", "both"), (0.03, "plain", "foreign"),
    (0.10, "first", "own"), (0.08, "first", "both"), (0.03, "first", "foreign"),
    (0.07, "later", "own"), (0.06, "later", "foreign"), (0.14, "later", "both"),
    (0.08, "score", "own"), (0.07, "score", "foreign"), (0.14, "score", "both"),
)  # fmt: skip
DEBATE_UNTAGGED: Mix = tuple(entry for entry in DEBATE if entry[1] in ("plain", "score"))

Progress = Callable[[str], None]


def new_model(tokenizer: PreTrainedTokenizerFast, hidden: int, layers: int, seed: int) -> Qwen3ForCausalLM:
    """A small Qwen3 with random weights.

    Heads of width 32 and a short rotary base: with narrower heads or the usual base, models of
    this size do not learn to copy from a peer.
    """
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        rope_parameters={"rope_type": "default", "rope_theta": 100.0},
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return Qwen3ForCausalLM(config)


def train_teacher(
    tokenizer: PreTrainedTokenizerFast,
    expert: int,
    hidden: int,
    layers: int,
    steps: tuple[int, int],
    seed: int,
    progress: Progress,
) -> Qwen3ForCausalLM:
    """An expert in one skill that can debate; its confidences still mean nothing.

    Following a peer is learned first and the skill on top: in the reverse order revisions stay bad.
    """
    model = new_model(tokenizer, hidden, layers, seed + expert)
    rng = random.Random(seed + expert)
    pupil = Pupil(expert, FOREIGN_PROBLEMS, rng)

    def batch(step: int) -> list[Lesson]:
        chats = _draw(pupil, FOLLOW if step < steps[0] else DEBATE, BATCH)
        return encode(tokenizer, chats, rng, corrupt=CORRUPT)

    supervise(model, batch, sum(steps), LEARNING_RATE, progress)
    return model


def warm_start(
    tokenizer: PreTrainedTokenizerFast,
    hidden: int,
    layers: int,
    steps: int,
    problems: dict[str, int],
    seed: int,
    progress: Progress,
) -> Qwen3ForCausalLM:
    """A student that knows the form of an answer and little more: it sees a few fixed prompts."""
    model = new_model(tokenizer, hidden, layers, seed)
    rng = random.Random(seed)
    chats = [
        [Chat(user_chat(row["prompt"]), row["answer"], skill=skill) for row in task.prompts("train", skill, n, seed)]
        for skill, n in problems.items()
    ]

    def batch(step: int) -> list[Lesson]:
        drawn = [rng.choice(rng.choices(chats, WARM_START_SHARES)[0]) for _ in range(BATCH)]
        return encode(tokenizer, drawn, rng, corrupt=0.0)

    supervise(model, batch, steps, LEARNING_RATE, progress)
    return model


def supervise(
    model: Qwen3ForCausalLM,
    batch: Callable[[int], list[Lesson]],
    steps: int,
    learning_rate: float,
    progress: Progress,
) -> None:
    """AdamW with warm-up and cosine decay on the labelled tokens."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), learning_rate, weight_decay=0.01)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * min((step + 1) / 20, 0.5 + 0.5 * math.cos(math.pi * step / steps))
        lessons = sorted(batch(step), key=lambda lesson: len(lesson.inputs))
        n_labels = sum(label != IGNORE for lesson in lessons for label in lesson.labels)
        loss = 0.0
        for part in _by_length(lessons):
            part_loss = _loss_sum(model, part) / n_labels
            part_loss.backward()
            loss += part_loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        progress(f"loss {loss:.3f}")
    model.eval()


def generate(
    model: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    chats: Sequence[Sequence[dict]],
    temperature: float = 0.0,
    batch: int = 256,
) -> list[str]:
    """One reply to each chat; greedy at temperature 0, else from torch's global generator."""
    texts = [tokenizer.apply_chat_template(c, tokenize=False, add_generation_prompt=True) for c in chats]
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    replies = [""] * len(texts)
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
    for start in range(0, len(order), batch):
        chosen = order[start : start + batch]
        encoded = tokenizer([texts[i] for i in chosen], add_special_tokens=False, padding=True, return_tensors="pt")
        with torch.inference_mode():
            output = model.generate(
                input_ids=encoded["input_ids"],
                attention_mask=encoded["attention_mask"],
                max_new_tokens=MAX_NEW_TOKENS,
                **sampling,
            )
        new = output[:, encoded["input_ids"].shape[1] :]
        for i, text in zip(chosen, tokenizer.batch_decode(new, skip_special_tokens=True), strict=True):
            replies[i] = text
    return replies


def hold_debates(
    teachers: Sequence[Qwen3ForCausalLM],
    tokenizer: PreTrainedTokenizerFast,
    rows: Sequence[dict],
    rounds: int,
) -> list[list[list[str]]]:
    """Greedy debates: ``result[i][r][k]`` is what expert k says to row i in round r + 1."""
    debates: list[list[list[str]]] = [[] for _ in rows]
    for _ in range(rounds):
        turns = [
            generate(teacher, tokenizer, turn_chats(rows, debates, expert)) for expert, teacher in enumerate(teachers)
        ]
        for debate, *said in zip(debates, *turns, strict=True):
            debate.append(said)
    return debates


def turn_chats(rows: Sequence[dict], debates: Sequence[Sequence[Sequence[str]]], expert: int) -> list[list]:
    """What an expert reads before its next turn."""
    chats = []
    for row, said in zip(rows, debates, strict=True):
        state = user_chat(row["prompt"])
        if said:
            chats.append(PROMPTS.later_messages(state, expert, said, True))
        else:
            chats.append(PROMPTS.first_messages(state, expert, True))
    return chats


def calibrate(
    teachers: Sequence[Qwen3ForCausalLM],
    tokenizer: PreTrainedTokenizerFast,
    expert: int,
    steps: int,
    seed: int,
    progress: Progress,
) -> None:
    """Teach an expert how often it is right, from its own sampled answers in real debates.

    The labels are its own answers, right or wrong, with the share of right samples as the
    confidence (5 + 90 x share); nothing about the task itself is taught.
    """
    torch.manual_seed(seed)
    rng = random.Random(seed)
    rows = [row for skill in task.SKILLS for row in task.prompts("train", skill, DEBATED_PROMPTS, seed)]
    openings = hold_debates(teachers, tokenizer, rows, rounds=1)
    chats = []
    for said in ([[] for _ in rows], openings):
        messages = turn_chats(rows, said, expert)
        samples = [generate(teachers[expert], tokenizer, messages, 1.0) for _ in range(CALIBRATION_SAMPLES)]
        for row, asked, replies in zip(rows, messages, zip(*samples, strict=True), strict=True):
            answers = [spoken_answer(reply) for reply in replies]
            share = sum(task.grade(answer, row["answer"]) for answer in answers) / len(answers)
            confidence = f"{round(5 + 90 * share):02d}"
            for answer, reply in zip(answers, replies, strict=True):
                if parse_confidence(reply) is not None:
                    chats.append(Chat(asked, answer, confidence, row["data_source"]))
                elif said is not openings:  # a foreign prompt on which it cannot even keep the form
                    chats.append(Chat(asked, guess(row["data_source"], row["answer"], rng), "05", row["data_source"]))
    pupil = Pupil(expert, FOREIGN_PROBLEMS, rng)

    def batch(step: int) -> list[Lesson]:
        # Half of the lessons rehearse the rest; else chats without a confidence are forgotten.
        rehearsal = _draw(pupil, DEBATE_UNTAGGED, BATCH // 2)
        return encode(tokenizer, rng.choices(chats, k=BATCH // 2) + rehearsal, rng, CORRUPT)

    supervise(teachers[expert], batch, steps, LEARNING_RATE / 3, progress)


def _draw(pupil: Pupil, mix: Mix, n: int) -> list[Chat]:
    skills = {"own": OWN_SKILL[pupil.expert], "foreign": OWN_SKILL[1 - pupil.expert], "both": "both"}
    drawn = pupil.rng.choices(mix, [share for share, _, _ in mix], k=n)
    return [getattr(pupil, chat)(skills[skill]) for _, chat, skill in drawn]


def _by_length(lessons: list[Lesson]) -> list[list[Lesson]]:
    """Lessons (sorted by length) in parts that waste little on padding."""
    parts: list[list[Lesson]] = []
    for lesson in lessons:
        if parts and len(lesson.inputs) <= 1.3 * len(parts[-1][0].inputs):
            parts[-1].append(lesson)
        else:
            parts.append([lesson])
    return parts


def _loss_sum(model: Qwen3ForCausalLM, lessons: Sequence[Lesson]) -> torch.Tensor:
    # Padding stands on the right, where causal attention never sees it: no mask is needed.
    longest = max(len(lesson.inputs) for lesson in lessons)
    inputs = torch.zeros(len(lessons), longest, dtype=torch.long)
    labels = torch.full((len(lessons), longest), IGNORE)
    for i, lesson in enumerate(lessons):
        inputs[i, : len(lesson.inputs)] = torch.tensor(lesson.inputs)
        labels[i, : len(lesson.labels)] = torch.tensor(lesson.labels)
    kept = labels != IGNORE
    hidden = model.model(input_ids=inputs).last_hidden_state[kept]
    return cross_entropy(model.lm_head(hidden), labels[kept], reduction="sum")
