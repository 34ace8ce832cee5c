"""What a run writes down of its tokens: enough to compute its loss again, from the numbers or from the models."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engine_helpers import divergence, full_logprobs, make_config, make_engine
from run_settings import OF_METHODS, settings_of

from opdengine.config.loading import from_mapping
from opdengine.config.train import ConfigError, TrainConfig
from opdengine.data.prompts import load_prompts
from opdengine.models.chat import load_tokenizer, vocabulary_size
from opdengine.training.run import train
from opdengine.training.token_log import Pieces, TokenLog, read_tokens, recompute_loss, write_tokens
from opdengine.training.writer import read_metrics
from opdengine.types import DIVERGENCES, Hidden, TopK

STEPS = 2


def rows_of(folder: Path, step: int) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "rollouts" / f"step_{step}.jsonl").read_text("utf-8").splitlines()]


def from_models(folder: Path, config: TrainConfig, step: int, log: TokenLog, vocab: int) -> float:
    """The loss of a step in float64: token ids and weights from the log, distributions from the model folders."""
    student = config.model if step == 1 else str(folder / "checkpoints" / f"step_{step - 1}" / "model")
    # An average has its first update behind step 2, and shows in step 3.
    paths = {t.name: student if t.weights == "live" else config.as_loaded(t).model for t in config.teachers}
    rows, total = rows_of(folder, step), 0.0
    for line, arrays in zip(log.lines, log.samples, strict=True):
        if "kl_weight" not in arrays:
            continue  # dropped
        ids, places = arrays["token_ids"].tolist(), np.flatnonzero(arrays["is_target"])
        ours = full_logprobs(student, ids, places, vocab)
        loss = torch.zeros(len(places), dtype=torch.float64)
        if arrays["kl_weight"].any():
            starts = np.cumsum([0, *arrays["context_lengths"]])
            mix = np.broadcast_to(arrays["mix"], (len(places), len(rows[line]["teachers"])))
            for k, name in enumerate(rows[line]["teachers"]):
                part = slice(starts[k], starts[k + 1])
                context, marks = arrays["context_ids"][part].tolist(), arrays["context_is_target"][part]
                theirs = full_logprobs(paths[name], context, np.flatnonzero(marks), vocab)
                usual = DIVERGENCES.index(config.divergence_of(rows[line]["data_source"]))
                kinds = arrays.get("divergence_kind", np.full(len(places), usual))
                for kind in np.unique(kinds):
                    weight = np.where(kinds == kind, arrays["kl_weight"] * mix[:, k], 0)
                    loss += torch.from_numpy(weight) * divergence(DIVERGENCES[kind], ours, theirs)
        if "advantage" in arrays:
            targets = torch.tensor(ids)[torch.from_numpy(places)]
            loss -= torch.from_numpy(arrays["advantage"]) * ours[torch.arange(len(places)), targets]
        total += float(arrays["scale"][0] * loss.sum())
    return total


@pytest.mark.parametrize("method", OF_METHODS)
def test_the_loss_of_every_method_follows_from_its_files(
    method: str, models: dict[str, str], prompt_file: str, tmp_path: Path
) -> None:
    settings = settings_of(method, models, prompt_file, STEPS) | {"log_tokens": "all", "output_dir": str(tmp_path)}
    if settings.get("lora"):
        settings["lora"] = {"r": 2}  # dropout could not be repeated
    config = from_mapping(TrainConfig, settings)
    train(config, progress=False)
    tokenizer = load_tokenizer(config.model)
    lines = {row["step"]: row for row in read_metrics(tmp_path / "metrics.jsonl")}
    for step in range(1, STEPS + 1):
        log, rows = read_tokens(tmp_path / "tokens" / f"step_{step}.npz"), rows_of(tmp_path, step)
        assert log.lines == tuple(range(len(rows)))
        loss = lines[step]["loss"]
        assert recompute_loss(log.samples) == pytest.approx(loss, rel=1e-4, abs=1e-7)
        if method != "gold":  # its teacher has other tokens, of which a log has no alignment
            found = from_models(tmp_path, config, step, log, vocabulary_size(tokenizer))
            assert found == pytest.approx(loss, rel=2e-3, abs=1e-6)
        assert loss != 0
        for row, arrays in zip(rows, log.samples, strict=True):
            targets = arrays["token_ids"][arrays["is_target"]]
            assert len(targets) == row["tokens"]
            unjudged = "kl_weight" not in arrays or not row["teachers"]
            assert bool(row["drop"]) == unjudged or method in ("mt_seqkd", "grpo", "sdpo")
            assert row["prompt"] and row["prompt"][0]["content"]
            if "turns" not in row:
                shown = "".join(log.pieces[int(token)] for token in targets)
                assert whole_text(shown).startswith(row["text"]) or "\ufffd" in row["text"]


def whole_text(pieces: str) -> str:
    """Text of which parts of characters, <F0 9F>, are put together."""
    parts = re.split("<([0-9A-F]{2}(?: [0-9A-F]{2})*)>", pieces)
    data = [bytes.fromhex(part) if i % 2 else part.encode() for i, part in enumerate(parts)]
    return b"".join(data).decode("utf-8", "replace")


def test_rows_say_what_became_of_a_rollout(models: dict[str, str], prompt_file: str, tmp_path: Path) -> None:
    settings = settings_of("uni_opd", models, prompt_file, 1) | {"output_dir": str(tmp_path)}
    settings |= {"uni_opd": {"balance": "group", "keep_per_prompt": 2}, "num_generations": 6}
    train(from_mapping(TrainConfig, settings), progress=False)
    rows = rows_of(tmp_path, 1)
    assert {"balance", ""} <= {row["drop"] for row in rows}
    known = {prompt.id: prompt for prompt in load_prompts([prompt_file]).prompts}
    for row in rows:
        assert row["answer"] == known[row["prompt_id"]].answer
        assert row["prompt"] == [dict(message) for message in known[row["prompt_id"]].messages]
        assert row["reward"] in (0.0, 1.0)
    log = read_tokens(tmp_path / "tokens" / "step_1.npz")
    assert log.lines == tuple(range(8))  # a sample
    for row in (json.loads(line) for line in (tmp_path / "evaluations" / "step_1.jsonl").open()):
        assert row["prompt"] and row["answer"] == known[row["prompt_id"]].answer


def test_turns_of_an_episode_are_written_with_what_the_environment_said(
    models: dict[str, str], prompt_file: str, tmp_path: Path
) -> None:
    settings = settings_of("sage_opd", models, prompt_file, 1) | {"output_dir": str(tmp_path), "log_tokens": "none"}
    train(from_mapping(TrainConfig, settings), progress=False)
    assert not (tmp_path / "tokens").exists()
    for row in rows_of(tmp_path, 1):
        roles = [turn["role"] for turn in row["turns"]]
        assert roles[:2] == ["assistant", "environment"] and roles.count("assistant") == 2
        assert all("failure" in turn and "action" in turn for turn in row["turns"] if turn["role"] == "assistant")
        assert row["turns"][1]["messages"][0]["content"]
        assert "success" in row and row["prompt"]
    for row in (json.loads(line) for line in (tmp_path / "evaluations" / "step_1.jsonl").open()):
        assert row["prompt"] and row["messages"]


def test_a_file_is_the_same_for_the_same_tokens_and_may_lack_fields(
    models: dict[str, str], tokenizer: Any, tmp_path: Path
) -> None:
    one = {"token_ids": np.array([5, 6, 7], dtype=np.int32), "mix": np.ones((2, 3), dtype=np.float32)}
    other = {"token_ids": np.array([8], dtype=np.int32), "scale": np.array([0.5])}
    third = {"token_ids": np.zeros(0, dtype=np.int32), "mix": np.ones(2, dtype=np.float32)}
    for name in ("a.npz", "b.npz"):
        write_tokens(tmp_path / name, [(0, one), (3, other), (4, third)], Pieces(tokenizer))
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    log = read_tokens(tmp_path / "a.npz")
    assert log.lines == (0, 3, 4) and set(log.pieces) == {5, 6, 7, 8}
    for given, found in zip((one, other, third), log.samples, strict=True):
        assert given.keys() == found.keys()
        assert all(np.array_equal(given[k], found[k]) and given[k].dtype == found[k].dtype for k in given)
    (tmp_path / "a.npz").write_bytes((tmp_path / "a.npz").read_bytes()[:200])
    with pytest.raises(ValueError, match=r"a\.npz holds no tokens of a step"):
        read_tokens(tmp_path / "a.npz")


def test_what_a_served_teacher_lists_is_kept(models: dict[str, str], prompt_file: str, tmp_path: Path) -> None:
    """One teacher judges by hidden states, one by a list: the loss is the sum, and the list is in the log."""
    config = make_config(models, prompt_file, tmp_path, log_completions=True, log_tokens="all")
    engine = make_engine(config)
    prompts = load_prompts([prompt_file]).prompts[:2]
    exact, listed = engine.teachers
    head, whole = listed.head, engine.objective()
    assert head is not None
    engine.objective = lambda: dataclasses.replace(whole, heads={exact.name: whole.heads[exact.name]})  # type: ignore

    async def step() -> Any:
        batch = await engine.prepare(prompts, 0)
        await engine.score(batch)
        for sample in batch:
            states = sample.teacher_targets[1]
            assert isinstance(states, Hidden)
            logprobs = (states.states.float() @ head.weight.float().T)[:, : engine.vocab_size].log_softmax(-1)
            targets = torch.from_numpy(sample.target_ids)[:, None]
            best = logprobs.scatter(1, targets, -torch.inf).topk(7, dim=1)
            ids = torch.cat([targets, best.indices], 1)
            told = TopK(ids.numpy(), logprobs.gather(1, ids).numpy())
            sample.teacher_targets = (sample.teacher_targets[0], told)
        engine.measure(batch)
        engine.weigh(batch)
        return batch, engine.update(batch)

    batch, result = asyncio.run(step())
    arrays = [arrays for _, arrays in result.tokens]
    assert recompute_loss(arrays) == pytest.approx(result.metrics["loss"], rel=1e-5)
    for sample, found in zip(batch.samples, arrays, strict=True):
        assert found["alternatives"].shape == (len(sample.target_ids), 2, 5)
        assert (found["alternatives"][:, 0] == -1).all() and (found["alternatives"][:, 1] >= 0).all()
        falling = found["alternatives_logprob"][:, 1]
        assert (np.diff(falling, axis=1) <= 0).all()
        assert np.isfinite(found["teacher_logprob"]).all() and np.isfinite(found["reverse_kl"]).all()


def test_a_piece_is_what_the_token_adds_to_a_text(tokenizer: Any) -> None:
    class SentencePiece:
        """Leaves out the first blank when it decodes."""

        def convert_ids_to_tokens(self, token: int) -> str:
            return ["\u2581the", "re"][token]

        def decode(self, ids: list[int]) -> str:
            return ["the", "re"][ids[0]]

    assert Pieces(SentencePiece())([0, 1]) == {0: " the", 1: "re"}
    ids = tokenizer("a lazy dog").input_ids
    pieces = Pieces(tokenizer)
    assert "".join(pieces(ids)[token] for token in ids) == "a lazy dog"
    assert pieces([10**6]) == {10**6: "[1000000]"}


def test_parts_of_characters_are_shown_as_bytes(tokenizer: Any) -> None:
    """Of byte-level tokenizers and of SentencePiece's; a character that is whole stays."""

    class Named:
        def convert_ids_to_tokens(self, token: int) -> str:
            return ["ĠÃ©ðŁ", "<0x9F>", "\ufffd", "<unk>"][token]

        def decode(self, ids: list[int]) -> str:
            return [" é\ufffd", "\ufffd", "\ufffd", "\ufffd"][ids[0]]

    assert Pieces(Named())(range(4)) == {0: " é<F0 9F>", 1: "<9F>", 2: "\ufffd", 3: "<unk>"}
    text = "a 🎉 in ハン"
    ids = tokenizer(text).input_ids
    found = Pieces(tokenizer)(ids)
    assert any(piece.startswith("<") for piece in found.values())
    assert whole_text("".join(found[token] for token in ids)) == text


def test_tokens_belong_to_completions(models: dict[str, str], prompt_file: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="log_tokens='all' is not possible; it belongs to log_completions: true"):
        make_config(models, prompt_file, tmp_path, log_tokens="all")
    with pytest.raises(ConfigError, match="log_tokens"):
        make_config(models, prompt_file, tmp_path, log_tokens="some")
