"""Judgements that are read from disk: equal to those of the teacher, of no other teacher, and whole or not there."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engine_helpers import loss_and_gradient, make_config, make_engine, make_samples
from remote_helpers import answering
from safetensors.torch import save_file
from teacher_helpers import Server

from opdengine.config.sections import TeacherConfig
from opdengine.config.train import ConfigError, TrainConfig
from opdengine.data.prompts import load_prompts
from opdengine.models.backbone import Backbone
from opdengine.models.given import PREFIX
from opdengine.teachers import TeacherError
from opdengine.teachers.served_model import Served
from opdengine.teachers.server import ServedTeacher
from opdengine.teachers.store import Store, key_of
from opdengine.teachers.stored import identity_of
from opdengine.tools.score import score_given
from opdengine.training.run import check_needs
from opdengine.types import Hidden, Image, TeacherContext, TopK

Models = dict[str, str]
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def recorded_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("recorded") / "recorded.jsonl"
    rows = [{"id": f"p{i}", "prompt": f"What is {i} + {i}?", "completion": f" {2 * i}."} for i in range(8)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def config_of(models: Models, file: str, folder: Path, teacher: Any = None, lmbda: float = 0.0, **more: Any) -> Any:
    teacher = {"model": models["big"], "name": "t", "stored": str(folder / "store"), **(teacher or {})}
    settings = {"method": "opd", "teachers": [teacher], "gkd": {"lmbda": lmbda}, "max_completion_length": 16}
    return make_config(models, file, folder, **{**settings, **more})


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the teachers that have read something, one for every call."""
    read: list[str] = []
    plain = Backbone.score

    def score(self: Backbone, *arguments: Any) -> Any:
        read.extend([self.name] * (self.name != "student"))
        return plain(self, *arguments)

    monkeypatch.setattr(Backbone, "score", score)
    return read


def step_of(config: TrainConfig, passes: list[str] | None = None) -> tuple[float, dict[str, Any], dict[str, float]]:
    """Loss, gradient and counts of one step on all prompts; ``passes`` is left with those of the step alone."""
    engine = make_engine(config)
    if passes is not None:
        passes.clear()
    samples = make_samples(
        engine, load_prompts([d if isinstance(d, str) else d.path for d in config.train_data]).prompts
    )
    counts = engine.teachers[0].counts()
    return *loss_and_gradient(engine, samples), counts


def assert_equal(one: Any, other: Any) -> None:
    """To the last bit."""
    assert one[0] == other[0]
    assert one[1].keys() == other[1].keys()
    assert all(torch.equal(one[1][name], other[1][name]) for name in one[1])


def files_of(folder: Path, ending: str) -> list[Path]:
    return sorted((folder / "store").rglob(f"*.{ending}"))


# -------------------------------------------------------------------------------------------- what is learned


@pytest.mark.parametrize("alignment", ["none", "spans"])
def test_loss_and_gradient_are_those_of_the_teacher(
    models: Models, recorded_file: str, tmp_path: Path, passes: list[str], alignment: str
) -> None:
    """To the last bit: of the teacher alone, of the step that stores, of one that reads, and of one without network."""

    def step(**teacher: Any) -> tuple[float, dict[str, Any], dict[str, float]]:
        teacher = {"tokenizer_alignment": alignment, **teacher}
        return step_of(config_of(models, recorded_file, tmp_path, teacher), passes)

    live = step(stored=None)
    assert passes
    first = step()
    assert passes and first[2] == {"stored/hits/t": 0, "stored/misses/t": 8, "stored/damaged/t": 0}
    again = step()
    assert not passes and again[2] == {"stored/hits/t": 8, "stored/damaged/t": 0}
    alone = step(stored_only=True)
    assert not passes and alone[2]["stored/hits/t"] == 8
    for found in (first, again, alone):
        assert_equal(live, found)


def test_without_network_no_weights_are_loaded(
    models: Models, recorded_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step_of(config_of(models, recorded_file, tmp_path))
    monkeypatch.setattr("opdengine.training.build_teachers.LocalTeacher", None)
    engine = make_engine(config_of(models, recorded_file, tmp_path, {"stored_only": True}))
    head = engine.teachers[0].head
    assert head is not None and head.weight.shape[1] == 64


def test_bfloat16_rounds_states_once(models: Models, recorded_file: str, tmp_path: Path, passes: list[str]) -> None:
    """The step that stores learns from the same numbers as those that read, which are the nearest of bfloat16."""
    live = step_of(config_of(models, recorded_file, tmp_path, {"stored": None}))
    exact = step_of(config_of(models, recorded_file, tmp_path))
    first = step_of(config_of(models, recorded_file, tmp_path, {"stored_dtype": "bfloat16"}), passes)
    assert passes and first[2]["stored/misses/t"] == 8  # what is stored in another dtype is not taken for it
    again = step_of(config_of(models, recorded_file, tmp_path, {"stored_dtype": "bfloat16"}), passes)
    assert not passes
    assert_equal(first, again)
    assert_equal(live, exact)
    assert first[0] != live[0] and first[0] == pytest.approx(live[0], rel=2e-2)
    sizes = sorted(file.stat().st_size for file in files_of(tmp_path, "data"))
    assert sizes[1] == 2 * sizes[0]


def test_what_the_student_samples_is_not_kept(models: Models, recorded_file: str, tmp_path: Path) -> None:
    """It hardly comes again; the step is the same, to the last bit, whatever had been stored before it."""
    live = step_of(config_of(models, recorded_file, tmp_path, {"stored": None}, lmbda=0.5))
    first = step_of(config_of(models, recorded_file, tmp_path, lmbda=0.5))
    again = step_of(config_of(models, recorded_file, tmp_path, lmbda=0.5))
    given = first[2]["stored/misses/t"]
    assert 0 < given < 8 and again[2]["stored/hits/t"] == given and "stored/misses/t" not in again[2]
    assert_equal(first, again)
    assert again[0] == pytest.approx(live[0], rel=1e-5)


def test_log_probs_of_an_endpoint(
    models: Models, recorded_file: str, tmp_path: Path, real_server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Read back to the last bit; once in a run the endpoint is asked again, and other weights are found out."""
    real_server.control()
    served = {"model": "tiny", "base_url": real_server.url, "tokenizer": models["big"], "score_top_k": 8}
    live = step_of(config_of(models, recorded_file, tmp_path, {**served, "stored": None}))
    first = step_of(config_of(models, recorded_file, tmp_path, served))
    asked: list[int] = []
    plain = ServedTeacher.score

    async def score(self: Any, contexts: Any) -> Any:
        asked.append(len(contexts))
        return await plain(self, contexts)

    monkeypatch.setattr(ServedTeacher, "score", score)
    again = step_of(config_of(models, recorded_file, tmp_path, served))
    assert asked == [1] and again[2]["stored/hits/t"] == 8
    nobody = {**served, "base_url": "http://127.0.0.1:9/v1", "stored_only": True}
    alone = step_of(config_of(models, recorded_file, tmp_path, nobody))
    for found in (first, again, alone):
        assert_equal(live, found)

    async def other(self: Any, contexts: Any) -> Any:
        return [TopK(t.ids, t.logprobs - 0.2) for t in await plain(self, contexts)]

    monkeypatch.setattr(ServedTeacher, "score", other)
    with pytest.raises(TeacherError, match=r"teacher 't' now says otherwise .* 0.2 nats .* Other weights are served"):
        step_of(config_of(models, recorded_file, tmp_path, served))


def test_states_that_a_server_sends_are_those_of_the_model_here(
    models: Models, recorded_file: str, tmp_path: Path, passes: list[str]
) -> None:
    """The same weights have the same folder: the server is asked nothing more, and the model here neither."""
    with answering(Served(models["big"])) as url:
        far = {"hidden_states_url": [url]}
        first = step_of(config_of(models, recorded_file, tmp_path, far), passes)
        assert passes and first[2]["stored/misses/t"] == 8
        again = step_of(config_of(models, recorded_file, tmp_path, {**far, "stored_only": True}), passes)
        halved = step_of(config_of(models, recorded_file, tmp_path, {**far, "hidden_states_dtype": "bfloat16"}), passes)
        assert halved[2]["stored/misses/t"] == 8  # other numbers travel, so others are kept
        passes.clear()
    here = step_of(config_of(models, recorded_file, tmp_path, {"stored_only": True}))
    assert not passes
    assert_equal(first, again)
    assert_equal(first, here)


# --------------------------------------------------------------------------------------- whose judgement it is


def test_another_teacher_does_not_meet_what_this_one_said(
    models: Models, recorded_file: str, tmp_path: Path, tiny: Any, tokenizer: Any
) -> None:
    """Weights, settings, tokenizer, dtype: of a teacher that moved all are the same, and nothing is asked again."""
    own = str(shutil.copytree(models["big"], tmp_path / "own"))
    place: dict[str, Any] = {"stored": str(tmp_path / "store")}

    def hits(model: str, **more: Any) -> float:
        engine = make_engine(config_of(models, recorded_file, tmp_path, {**place, "model": model, **more}))
        make_samples(engine, load_prompts([recorded_file]).prompts)
        return float(engine.teachers[0].counts()["stored/hits/t"])

    assert hits(own) == 0 and hits(own) == 8
    assert hits(str(shutil.copytree(own, tmp_path / "moved"))) == 8
    assert hits(own, stored_dtype="bfloat16") == 0 and hits(own, dtype="bfloat16") == 0
    weights = Path(shutil.copytree(own, tmp_path / "weights"), "model.safetensors")
    content = bytearray(weights.read_bytes())
    content[-2] ^= 1  # one bit of one number
    weights.write_bytes(content)
    assert hits(str(weights.parent)) == 0
    settings = Path(shutil.copytree(own, tmp_path / "settings"), "config.json")
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "rope_theta": 5000.0, "rms_norm_eps": 1e-5}))
    assert hits(str(settings.parent)) == 0
    vocabulary = Path(shutil.copytree(own, tmp_path / "vocabulary"), "tokenizer.json")
    vocabulary.write_text(vocabulary.read_text() + "\n")
    assert hits(str(vocabulary.parent)) == 0
    assert hits(own) == 8
    with pytest.raises(ConfigError, match=r"holds nothing that these weights .* 'opdengine score'") as error:
        make_engine(config_of(models, recorded_file, tmp_path, {"model": models["small"], "stored_only": True}))
    assert f"{own!r} (other config.json, " in str(error.value)


def test_another_adapter_is_another_teacher(models: Models, recorded_file: str, tmp_path: Path) -> None:
    """One of which a single factor has changed."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    counts = []
    for scale in (1.0, 1.0, 2.0):
        torch.manual_seed(0)
        model = get_peft_model(
            AutoModelForCausalLM.from_pretrained(models["big"]), LoraConfig(target_modules=["q_proj"])
        )
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.data.normal_(std=scale)
        model.save_pretrained(tmp_path / "adapter")
        engine = make_engine(config_of(models, recorded_file, tmp_path, {"model": str(tmp_path / "adapter")}))
        make_samples(engine, load_prompts([recorded_file]).prompts)
        counts.append(engine.teachers[0].counts()["stored/hits/t"])
    assert counts == [0, 8, 0]


def test_code_beside_the_base_of_an_adapter_is_in_a_teacher(models: Models, tmp_path: Path, tokenizer: Any) -> None:
    """Where code that comes with models is run."""
    base, adapter = Path(shutil.copytree(models["big"], tmp_path / "base")), tmp_path / "adapter"
    adapter.mkdir()
    save_file({"x": torch.zeros(1)}, adapter / "adapter_model.safetensors")
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(base)}))
    teacher = TeacherConfig(model=str(adapter), stored=str(tmp_path))
    found = []
    for text in ("a = 1", "a = 2"):
        (base / "modeling.py").write_text(text)
        found.append([identity_of(teacher, tokenizer, None, trusted) for trusted in (False, True)])
    assert found[0][0] == found[1][0] and found[0][1] != found[1][1]


def test_keys_are_of_all_that_a_teacher_reads() -> None:
    """Any token, the length, the targets, a picture; not the step, the teacher's name or the student's tokens."""
    ids, images = np.arange(9), (Image("a" * 64, 8, 8),)
    base = TeacherContext("s", "t", ids, np.arange(4, 9))
    others = [
        TeacherContext("s", "t", np.where(ids == 2, 3, ids), np.arange(4, 9)),
        TeacherContext("s", "t", ids[:-1], np.arange(4, 8)),
        TeacherContext("s", "t", ids, np.arange(5, 9)),
        TeacherContext("s", "t", ids, np.arange(4, 9), images),
        TeacherContext("s", "t", ids, np.arange(4, 9), (Image("b" * 64, 8, 8),)),
    ]
    assert len({key_of(c) for c in (base, *others)}) == 6
    assert key_of(TeacherContext("other", "u", ids.astype(np.int32), np.arange(4, 9), prompt="p")) == key_of(base)


def test_another_prompt_is_missed_and_named(models: Models, recorded_file: str, tmp_path: Path) -> None:
    """With stored_only the run ends there."""
    step_of(config_of(models, recorded_file, tmp_path))
    rows = [json.loads(line) for line in Path(recorded_file).read_text().splitlines()]
    rows[5]["prompt"] += " "
    other = tmp_path / "other.jsonl"
    other.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(TeacherError, match=r"the answer to prompt 'p5' \(.*other.jsonl, row 6\) \(1 in this step\)"):
        step_of(config_of(models, str(other), tmp_path, {"stored_only": True}))
    counts = step_of(config_of(models, str(other), tmp_path))[2]
    assert (counts["stored/hits/t"], counts["stored/misses/t"]) == (7, 1)


# ------------------------------------------------------------------------------------------------- the files


def judgements(count: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    return {f"{seed}.{i}": Hidden(torch.randn(3 + i, 8, generator=generator).to(dtype)) for i in range(count)}


def same(one: Any, other: Any) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k].states, other[k].states) for k in one)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_what_is_written_is_read(tmp_path: Path, dtype: torch.dtype) -> None:
    states = judgements(3, dtype=dtype)
    lists = {"l": TopK(np.array([[5, 2, -1]]), np.array([[-0.1, -3.0, -np.inf]], dtype=np.float32))}
    Store(tmp_path).write(states)
    Store(tmp_path).write(lists)
    found = Store(tmp_path).read([*states, "l", "unknown"])
    top = found.pop("l")
    assert same(found, states) and found["0.0"].states.dtype == dtype
    assert isinstance(top, TopK) and top.ids.dtype == np.int64 and top.logprobs.dtype == np.float32
    assert np.array_equal(top.ids, lists["l"].ids) and np.array_equal(top.logprobs, lists["l"].logprobs)


@pytest.mark.parametrize("harm", ["flip", "cut", "remove"])
def test_damage_is_said_and_asked_anew(
    models: Models, recorded_file: str, tmp_path: Path, harm: str, caplog: pytest.LogCaptureFixture
) -> None:
    before = step_of(config_of(models, recorded_file, tmp_path))
    (data,) = files_of(tmp_path, "data")
    content = bytearray(data.read_bytes())
    content[-1] ^= 64
    {
        "flip": lambda: data.write_bytes(content),
        "cut": lambda: os.truncate(data, len(content) - 1),
        "remove": data.unlink,
    }[harm]()
    lost = 8 if harm == "remove" else 1
    with pytest.raises(TeacherError, match=f"does not hold its judgement of the answer .* \\({lost} in this step"):
        step_of(config_of(models, recorded_file, tmp_path, {"stored_only": True}))
    after = step_of(config_of(models, recorded_file, tmp_path))
    assert after[2] == {"stored/hits/t": 8 - lost, "stored/misses/t": lost, "stored/damaged/t": lost}
    assert f"{data}: the judgement at byte" in caplog.text
    assert after[0] == pytest.approx(before[0], rel=1e-5)
    whole = step_of(config_of(models, recorded_file, tmp_path))  # the second copy, and the first one is still said
    assert_equal(after, whole)
    assert whole[2] == {"stored/hits/t": 8, "stored/damaged/t": lost}


def test_damaged_lines_of_an_index_are_not_used(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store, kept = Store(tmp_path), [judgements(2, seed) for seed in range(3)]
    for some in kept:
        store.write(some)
    (index,) = tmp_path.glob("*.index")
    lines = index.read_bytes().splitlines(keepends=True)
    index.write_bytes(lines[0] + lines[1].replace(b"[3, 8]", b"[2, 8]") + lines[2])
    other = Store(tmp_path)
    assert same(other.read([key for some in kept for key in some]), kept[0] | kept[2])
    assert other.damaged == 1 and "a line is damaged" in caplog.text


def test_a_damaged_head_is_refused(models: Models, recorded_file: str, tmp_path: Path) -> None:
    step_of(config_of(models, recorded_file, tmp_path))
    (head,) = files_of(tmp_path, "safetensors")
    content = bytearray(head.read_bytes())
    content[-1] ^= 1
    for damaged in (bytes(content), bytes(content[:100])):
        head.write_bytes(damaged)
        with pytest.raises(ConfigError, match=r"teacher\.safetensors is damaged; remove it"):
            make_engine(config_of(models, recorded_file, tmp_path, {"stored_only": True}))
    head.unlink()
    make_engine(config_of(models, recorded_file, tmp_path))
    make_engine(config_of(models, recorded_file, tmp_path, {"stored_only": True}))


@pytest.mark.parametrize("cut", [1, 30, 0])
def test_a_process_that_was_killed_while_it_wrote(tmp_path: Path, cut: int, caplog: pytest.LogCaptureFixture) -> None:
    """The call that was being written is not there, and the others are, wherever the writing ended."""
    store, first, second = Store(tmp_path), judgements(2, 0), judgements(2, 1)
    store.write(first)
    (data,), (index,) = tmp_path.glob("*.data"), tmp_path.glob("*.index")
    begun, sizes = index.stat().st_size, data.stat().st_size
    store.write(second)
    if cut:  # within the line of the index
        os.truncate(index, begun + cut)
    else:  # within the data, before the line
        os.truncate(index, begun)
        os.truncate(data, sizes + 7)
    after = Store(tmp_path)
    assert same(after.read([*first, *second]), first) and after.damaged == 0
    assert ("ends within a line" in caplog.text) is bool(cut)
    after.write(second)
    assert same(Store(tmp_path).read([*first, *second]), first | second)


WRITER = """
import sys, torch
from pathlib import Path
from opdengine.teachers.store import Store
from opdengine.types import Hidden
store, number = Store(Path(sys.argv[1])), int(sys.argv[2])
print("ready", flush=True)
i = 0
while i < 40 or number == 1:
    store.write({f"{number}.{i}.{j}": Hidden(torch.full((40, 64), float(i))) for j in range(3)})
    i += 1
"""


def test_several_processes_write_while_others_read(tmp_path: Path) -> None:
    """One of them is killed: what is read is whole at any time, and calls are there as a whole."""
    places = f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path), str(number)],
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": places},
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]
    reader, seen = Store(tmp_path), set[str]()
    keys = [f"{n}.{i}.{j}" for n in range(2) for i in range(40) for j in range(3)]

    def read() -> None:
        for key, found in reader.read(keys).items():
            assert isinstance(found, Hidden) and bool((found.states == float(key.split(".")[1])).all())
            seen.add(key)

    try:
        while writers[0].poll() is None or not any(key.startswith("1.") for key in seen):
            read()
        writers[1].kill()
        assert writers[0].wait() == 0
    finally:
        for process in writers:
            process.kill()
            process.wait()
            process.stdout.close()  # type: ignore[union-attr]
    read()
    assert seen >= {key for key in keys if not key.startswith("1.")} and reader.damaged == 0
    of_killed = {key.rpartition(".")[0] for key in seen if key.startswith("1.")}
    assert all(f"{call}.{j}" in seen for call in of_killed for j in range(3))


def test_a_folder_has_a_limit(
    models: Models, recorded_file: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """What does not fit is judged all the same, is counted, and is said once."""
    store = Store(tmp_path / "own", 3000)
    kept = [store.write(judgements(2, seed)) for seed in range(9)]
    assert kept == [True] * sum(kept) + [False] * (9 - sum(kept)) and kept.count(False) > 1
    assert 2000 < store.size <= 3000 and caplog.text.count("has reached stored_max_bytes=3000") == 1
    live = step_of(config_of(models, recorded_file, tmp_path, {"stored": None}))
    for _ in range(2):
        found = step_of(config_of(models, recorded_file, tmp_path, {"stored_max_bytes": 1}))
        assert_equal(live, found)
        assert found[2]["stored/beyond_max_bytes/t"] == 8 and not files_of(tmp_path, "data")


def test_a_line_that_a_full_disk_cuts_is_an_error(tmp_path: Path) -> None:
    """The file may not grow beyond 50 bytes: those of the judgement are less, and the line of the index is longer."""
    some = {"k": Hidden(torch.zeros(1, 1))}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50, limits[1]))
    try:
        with pytest.raises(OSError, match="too large"):
            Store(tmp_path).write(some)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not Store(tmp_path).read(some)


def test_a_file_without_a_whole_line_is_told_of_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "a.index").write_bytes(b"0123 [[")
    store = Store(tmp_path)
    assert store.read(["k"]) == store.read(["k"]) == {}
    assert caplog.text.count("ends within a line") == 1


def test_a_head_that_another_process_writes_is_not_counted(tmp_path: Path) -> None:
    """It may be renamed before its size is asked."""
    store = Store(tmp_path)
    store.write(judgements(1))
    size = store.size
    (tmp_path / "teacher.safetensors.0123abcd").write_bytes(b"0" * 99)
    assert store.size == size > 0


# ------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("teacher", "more", "message"),
    [
        ({"model": "self", "weights": "base"}, {}, "stored=.* the student changes"),
        ({"model": "self", "weights": "ema"}, {}, "stored=.* the student changes"),
        ({"stored": None, "stored_only": True}, {}, "stored_only=True .* it belongs to stored"),
        ({"stored": None, "stored_dtype": "bfloat16"}, {}, "stored_dtype='bfloat16' .* it belongs to stored"),
        ({"stored": None, "stored_max_bytes": 5}, {}, "stored_max_bytes=5 .* it belongs to stored"),
        ({"stored_only": True, "stored_max_bytes": 5}, {}, "stored_max_bytes=5 .* nothing is added"),
        ({"stored_only": True, "offload": True}, {}, "offload=True .* not loaded"),
        ({"base_url": "http://h:1/v1", "stored_dtype": "bfloat16"}, {}, "stored_dtype='bfloat16' .* no states"),
        ({}, {"gkd": {"lmbda": 1.0}}, "stored=.* only given answers come again: set gkd.lmbda below 1"),
        ({"stored_only": True}, {"gkd": {"lmbda": 0.5}}, "stored_only=True .* set gkd.lmbda: 0"),
        ({"stored_only": True}, {"gkd": {"lmbda": 0.0, "seq_kd": True}}, "stored_only=True .* which is not stored"),
        ({}, {"method": "mt_seqkd", "gkd": {"lmbda": 1.0}}, "stored=.* never judge"),
    ],
)
def test_settings_without_effect_are_refused(
    models: Models, recorded_file: str, tmp_path: Path, teacher: Any, more: Any, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        config_of(models, recorded_file, tmp_path, teacher, **more)


def test_models_in_memory_are_refused_before_any_is_loaded(models: Models, recorded_file: str, tmp_path: Path) -> None:
    config = config_of(models, recorded_file, tmp_path, {"model": f"{PREFIX}a model"})
    with pytest.raises(ConfigError, match=r"teacher 't': stored=.* save the model with save_pretrained"):
        check_needs(config)


def test_score_asks_only_teachers_whose_judgements_are_kept(
    models: Models, recorded_file: str, tmp_path: Path, passes: list[str]
) -> None:
    teachers = [{"model": models["big"], "stored": str(tmp_path / "store")}, {"model": models["small"]}]
    config = config_of(models, recorded_file, tmp_path, method="mt_opd", teachers=teachers)
    found = score_given(config)
    assert found["stored/misses/big"] == 8 and set(passes) == {"teacher 'big'"}


def test_debates_about_given_answers_are_stored(
    models: Models, recorded_file: str, tmp_path: Path, passes: Any
) -> None:
    """Transcripts are part of what is read; without network they come from the cache of debates, or nowhere."""

    def config(only: bool = False, cache: str = "debates", **debate: Any) -> TrainConfig:
        two = [
            {"model": models[name], "name": name, "stored": str(tmp_path / "store"), "stored_only": only}
            for name in ("big", "small")
        ]
        told = {"cache_dir": str(tmp_path / cache), **debate}
        return config_of(models, recorded_file, tmp_path, method="mad_opd", teachers=two, debate=told)

    first = step_of(config(), passes)
    assert passes
    again = step_of(config(), passes)
    alone = step_of(config(only=True), passes)
    assert not passes
    assert_equal(first, again)
    assert_equal(first, alone)
    with pytest.raises(TeacherError, match=r"teacher '(big|small)' was to write .* stored_only: true runs no network"):
        step_of(config(only=True, cache="elsewhere"))
