"""What the tiny agents can do, measured by playing, judging and debating on held-out games."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

from opdengine.environments.episodes import Episodes
from opdengine.environments.protocol import Observation, Step, Task
from opdengine.rollout.transformers import TransformersSampler
from opdengine.training.evaluate import evaluate_episodes
from opdengine.types import Message, Prompt, Request, SamplingParams
from tiny.agents import lessons, world
from tiny.agents.house import House
from tiny.agents.lessons import PROMPTS
from tiny.lessons import TAG

LABELS = ("SKIP", "WEAK", "STRONG")


class Houses:
    """An environment pool in this process: nothing in a house can hang or crash."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.worlds = [House(**world.OPTIONS) for _ in range(size)]

    def reset(self, jobs: Mapping[int, tuple[int, Task]]) -> dict[int, Observation]:
        """See :class:`opdengine.environments.pool.EnvironmentPool`."""
        return {slot: self.worlds[slot].reset(seed=seed, task=task) for slot, (seed, task) in jobs.items()}

    def step(self, messages: Mapping[int, Message]) -> dict[int, Step]:
        """One action in each of some houses."""
        return {slot: self.worlds[slot].step(message) for slot, message in messages.items()}

    def counts(self) -> dict[str, float]:
        """Nothing breaks here."""
        return {}

    def close(self) -> None:
        """Nothing is held."""


def play(
    model: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    games: Mapping[str, Sequence[Task]],
    temperature: float = 0.0,
    longest: int = world.MAX_TOKENS,
    window: int = 512,
) -> dict[str, float]:
    """The metrics of :func:`opdengine.training.evaluate.evaluate_episodes` over some games.

    Args:
        model: the agent.
        tokenizer: the model's.
        games: tasks by split.
        temperature: 0 is greedy.
        longest: turn, in tokens.
        window: tokens of the longest chat that is played on.
    """
    episodes = Episodes(Houses(64), tokenizer, {}, world.MAX_TURNS, window)
    splits = {s: [Prompt(t["id"], (), key=t["type"], extra={"task": t}) for t in tasks] for s, tasks in games.items()}
    sampler = TransformersSampler(model, tokenizer)
    metrics, _ = evaluate_episodes(episodes, sampler, splits, [temperature], SamplingParams(max_tokens=longest))
    return {name.removeprefix("eval/").partition("@")[0]: value for name, value in metrics.items()}


def success(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, games: Sequence[Task], temperature: float = 0.0
) -> dict[str, float]:
    """Share of games won, of all and by type of task."""
    types = sorted({task["type"] for task in games})
    splits = {"all": list(games), **{kind: [t for t in games if t["type"] == kind] for kind in types}}
    found = play(model, tokenizer, {k: v for k, v in splits.items() if k != "all"}, temperature)
    shares = {kind: round(found[f"{kind}/success"], 4) for kind in types}
    total = sum(shares[kind] * len(splits[kind]) for kind in types) / len(games)
    return {"all": round(total, 4), **shares}


def judge(
    teacher: Any,
    tokenizer: PreTrainedTokenizerFast,
    games: Sequence[Task],
    count: int,
    seed: int = 0,
    judge_prompt: str = world.JUDGE_PROMPT,
    longest: int = 2,
) -> dict[str, Any]:
    """How often the judge says what it should, by what it is shown, and the confusion without history.

    Args:
        teacher: a causal LM.
        tokenizer: the teacher's.
        games: in which it is asked.
        count: of the questions.
        seed: of games and actions.
        judge_prompt: the words of the question.
        longest: reply, in tokens.
    """
    rng = random.Random(seed)
    moments: list[lessons.Moment] = []
    while len(moments) < count:
        moments += [m for m in lessons.play(rng.choice(games), rng, 0.5, judged=0.5) if m.verdict]
    moments = moments[:count]
    sampler = TransformersSampler(teacher, tokenizer)
    result: dict[str, Any] = {}
    for name, history, later in (("plain", False, False), ("history", True, False), ("next_obs", False, True)):
        chats = [[{"role": "user", "content": lessons.question(m, history, later, judge_prompt)}] for m in moments]
        ids = [tokenizer.apply_chat_template(c, add_generation_prompt=True, return_dict=False) for c in chats]
        requests = [Request(str(i), tuple(x)) for i, x in enumerate(ids)]
        replies = sampler.generate(requests, SamplingParams(max_tokens=longest, temperature=0.0))
        pairs = Counter((m.verdict, r[0].text.strip()) for m, r in zip(moments, replies, strict=True))
        result[name] = round(sum(n for (right, said), n in pairs.items() if right == said) / count, 4)
        if name == "plain":
            result["confusion"] = {right: {said: pairs[right, said] for said in LABELS} for right in LABELS}
            result["unparsed"] = sum(n for (_, said), n in pairs.items() if said not in LABELS)
    return result


def debate(
    experts: Sequence[Qwen3ForCausalLM], tokenizer: PreTrainedTokenizerFast, games: Sequence[Task], count: int
) -> dict[str, Any]:
    """How often each expert says the house's expert's action at single steps, by type of task.

    Three numbers each: alone, in round 1, and as it concludes after two rounds (the context under which it
    judges the student).
    """
    rng = random.Random(0)
    states = []
    for number in range(count):
        game = games[number % len(games)]
        states.append((game, rng.choice(lessons.play(game, rng, 0.2))))
    samplers = [TransformersSampler(expert, tokenizer) for expert in experts]

    def say(k: int, chats: Sequence[Sequence[Message]]) -> list[str]:
        ids = [tokenizer.apply_chat_template(list(c), add_generation_prompt=True, return_dict=False) for c in chats]
        requests = [Request(str(i), tuple(x)) for i, x in enumerate(ids)]
        return [r[0].text for r in samplers[k].generate(requests, SamplingParams(max_tokens=8, temperature=0.0))]

    rounds: list[list[list[str]]] = [[] for _ in states]
    for _ in range(2):
        said = []
        for k in range(len(experts)):
            asked = [
                PROMPTS.later_messages(m.chat, k, r, True) if r else PROMPTS.first_messages(m.chat, k, True)
                for (_, m), r in zip(states, rounds, strict=True)
            ]
            said.append(say(k, asked))
        for r, *texts in zip(rounds, *said, strict=True):
            r.append(texts)
    result: dict[str, Any] = {}
    for k in range(len(experts)):
        alone = say(k, [m.chat for _, m in states])
        first = [r[0][k].partition(TAG)[0] for r in rounds]
        concluded = say(k, [PROMPTS.score_messages(m.chat, k, r) for (_, m), r in zip(states, rounds, strict=True)])
        for name, texts in (("alone", alone), ("round_1", first), ("after_debate", concluded)):
            for kind in sorted({game["type"] for game, _ in states}):
                right = [text == m.right for text, (g, m) in zip(texts, states, strict=True) if g["type"] == kind]
                result.setdefault(f"expert_{k}", {}).setdefault(kind, {})[name] = round(sum(right) / len(right), 4)
    return result
