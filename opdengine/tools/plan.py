"""What a run will cost before it is started: memory per GPU, seconds per phase, the bottleneck.

FLOPs and bytes are counted (and checked against measured small runs in the tests); seconds follow from
them by the rates of a :class:`Machine`, whose efficiencies are assumptions that a user can set.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from opdengine.config.sections import TeacherConfig
from opdengine.config.train import TrainConfig
from opdengine.errors import ConfigError
from opdengine.tools.shapes import Shape, shape_of

GIB = 2**30


@dataclass(frozen=True)
class Machine:
    """The GPUs of a run and what they reach.

    Args:
        gpus: how many.
        name: of the GPU.
        memory: bytes of one.
        flops: dense bf16 FLOP/s of one, by its data sheet.
        bandwidth: bytes/s of its memory, by its data sheet.
        link: bytes/s that one GPU sends to the others of its node.
        network: bytes/s that one GPU sends to another node.
        gpus_per_node: GPUs that share ``link``.
        flop_efficiency: share of ``flops`` reached by large products (prefill, update).
        bandwidth_efficiency: share of ``bandwidth`` reached while decoding.
    """

    gpus: int = 1
    name: str = "h200"
    memory: float = 141e9
    flops: float = 989e12
    bandwidth: float = 4.8e12
    link: float = 450e9
    network: float = 50e9
    gpus_per_node: int = 8
    flop_efficiency: float = 0.45
    bandwidth_efficiency: float = 0.6


GPUS = {
    "h200": Machine(),
    "h100": Machine(name="h100", memory=80e9, bandwidth=3.35e12),
    "a100": Machine(name="a100", memory=80e9, flops=312e12, bandwidth=2.0e12, link=300e9),
    "l40s": Machine(name="l40s", memory=48e9, flops=362e12, bandwidth=0.864e12, link=32e9),
}
"""Data-sheet values by name."""


STUDENT, GATHERED, TEACHERS = "student: weights, gradients, AdamW", "student: gathered layers and head", "teachers"
ACTIVATIONS, HIDDEN, LOSS, SAMPLER = "activations", "teachers' hidden states", "fused loss", "sampler"

REMEDIES = {
    STUDENT: "more GPUs (its states are sharded), or lora",
    GATHERED: "vocab_parallel_head: true, or a GPU with more memory",
    TEACHERS: "shard: true or offload: true for the teachers, or a hidden_states_url or base_url for the larger ones",
    ACTIVATIONS: "gradient_checkpointing: true, or a smaller max_tokens_per_batch",
    HIDDEN: "a smaller max_tokens_per_batch",
    LOSS: "a smaller workspace_bytes",
    SAMPLER: "vllm_enable_sleep_mode: true, or a smaller vllm_gpu_memory_utilization",
}


@dataclass(frozen=True)
class Work:
    """What one phase of a step does, all GPUs together.

    Args:
        flops: of products.
        read: bytes that decoding reads from memory.
        sent: bytes that every GPU sends.
        seconds: wall time with all GPUs.
    """

    flops: float = 0.0
    read: float = 0.0
    sent: float = 0.0
    seconds: float = 0.0


@dataclass(frozen=True)
class Plan:
    """Phases of one step and the memory of one GPU."""

    machine: Machine
    phases: Mapping[str, Work]
    memory: Mapping[str, float]
    notes: Sequence[str] = field(default_factory=list)
    assumed: Sequence[str] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        """Of one step."""
        return sum(work.seconds for work in self.phases.values())

    @property
    def bottleneck(self) -> str:
        """The longest phase."""
        return max(self.phases, key=lambda name: self.phases[name].seconds)

    @property
    def fits(self) -> bool:
        """Whether a GPU holds everything."""
        return sum(self.memory.values()) <= self.machine.memory

    def __str__(self) -> str:
        m = self.machine
        lines = [f"{m.gpus} x {m.name}", "", f"{'phase':<12}{'seconds':>10}{'share':>8}{'PFLOP':>10}{'GB sent':>12}"]
        for name, work in self.phases.items():
            share = work.seconds / self.seconds if self.seconds else 0.0
            lines.append(
                f"{name:<12}{work.seconds:>10.2f}{share:>8.0%}{work.flops / 1e15:>10.3f}{work.sent / 1e9:>12.1f}"
            )
        lines += [f"{'step':<12}{self.seconds:>10.2f}", f"bottleneck: {self.bottleneck}", "", "memory of one GPU (GiB)"]
        lines += [f"  {name:<34}{size / GIB:>8.1f}" for name, size in self.memory.items()]
        total = sum(self.memory.values())
        verdict = "fits" if self.fits else f"does NOT fit in {m.memory / GIB:.0f}"
        lines.append(f"  {'together':<34}{total / GIB:>8.1f}  {verdict}")
        assumed = ["", "assumed:", *(f"  {line}" for line in self.assumed)] if self.assumed else []
        return "\n".join([*lines, *([""] if self.notes else []), *self.notes, *assumed])


@dataclass(frozen=True)
class Lengths:
    """Mean tokens; the limits of the configuration where nothing better is known.

    Args:
        prompt, completion: of a rollout.
        turn: of one debate turn of one teacher.
    """

    prompt: float
    completion: float
    turn: float


def plan(config: TrainConfig, machine: Machine, lengths: Lengths | None = None) -> Plan:
    """Count one step of a configured run.

    Args:
        config: of the run; its models' shapes are read from their configurations.
        machine: what it is to run on.
        lengths: mean lengths; default: the configured limits, an upper bound.

    Raises:
        ConfigError: there is no GPU.
    """
    if machine.gpus < 1:
        raise ConfigError(f"--gpus {machine.gpus} is not possible; it must be at least 1")
    lengths = lengths or Lengths(config.max_prompt_length, config.max_completion_length, config.debate.max_tokens)
    student = shape_of(config.model, trust_remote_code=config.trust_remote_code)
    exact, teachers = exact_teachers(config)
    here = [(t, shape) for t, shape in zip(exact, teachers, strict=True) if t.is_here and not t.stored_only]
    prompts = config.prompts_per_step * machine.gpus
    rollouts = prompts * config.num_generations
    tokens = rollouts * lengths.completion
    debates = config.debates
    rounds = config.debate.rounds if debates else 0
    transcript = rounds * len(teachers) * lengths.turn if debates and config.debate.use_transcript else 0.0

    def passes(sequences: float, length: float, budget: float) -> float:
        """Of one GPU over its share."""
        return max(sequences * length / machine.gpus / budget, 1.0)

    budget = config.max_tokens_per_batch
    phases = {"rollout": _decode(student, machine, rollouts, lengths.prompt, lengths.completion)}
    if debates:
        turns = []
        for t, shape in here:
            for r in range(rounds) if t.writer_base_url is None else ():
                prompt = lengths.prompt + r * len(teachers) * lengths.turn
                work = _decode(shape, machine, prompts, prompt, lengths.turn)
                batches = passes(prompts, prompt + lengths.turn, 4 * budget)
                turns.append(_gathering(work, shape, machine, batches * lengths.turn) if t.shard else work)
        phases["debate"] = _add(turns)
    length = lengths.prompt + lengths.completion
    reads = []
    for t, shape in here:
        work = _read(shape, machine, rollouts, length + transcript)
        batches = passes(rollouts, length + transcript, budget)
        reads.append(_gathering(work, shape, machine, batches) if t.shard else work)
    phases["score"] = _add(reads)
    phases["update"] = update_work(config, student, teachers, machine, rollouts * length, length, tokens)
    phases["sync"] = sync_work(student, machine)
    notes = []
    if exact:
        waiting = 2.0 * tokens / machine.gpus * sum(shape.hidden for shape in teachers)
        notes.append(f"teachers' hidden states of a step on the host: {waiting / GIB:.1f} GiB per GPU")
    if served := [t.name for t in config.teachers if not t.is_here]:
        notes.append(f"served elsewhere, not counted: {', '.join(served)}")
    for t, shape in zip(exact, teachers, strict=True):
        if not t.is_here:
            size = (4 if t.hidden_states_dtype == "float32" else 2) * tokens * shape.hidden
            notes.append(f"{t.name} sends {size / 1e9:.2f} GB of hidden states a step, and its head once to every GPU")
    if asked := [t.name for t in config.teachers if t.stored and not t.stored_only]:
        notes.append(f"counted as in the first epoch, before what they say is stored: {', '.join(asked)}")
    if unknown := [t.name for t in config.teachers if t.hidden_states_url and t.name not in {e.name for e in exact}]:
        notes.append(f"heads and hidden states not counted, since no config.json is here: {', '.join(unknown)}")
    if written := [t.name for t, _ in here if t.writer_base_url is not None]:
        notes.append(f"debate turns written elsewhere, not counted: {', '.join(written)}")
    memory = memory_of(config, student, teachers, machine, length)
    found = Plan(machine, phases, memory, notes, assumptions(config, machine, lengths))
    if not found.fits:
        notes.append(f"to fit: {REMEDIES[max(found.memory, key=lambda name: found.memory[name])]}")
    writing = [t for t, _ in here if debates and t.writer_base_url is None]
    if any(not t.shard for t in writing):
        notes.append("debates are counted at the rate of a serving engine: give the teachers a writer_base_url")
    if slow := [t.name for t in writing if t.shard]:
        notes.append(f"gather all weights for every token they write (a writer_base_url saves that): {', '.join(slow)}")
    return found


def exact_teachers(config: TrainConfig) -> tuple[list[TeacherConfig], list[Shape]]:
    """The teachers that judge by hidden states, and their shapes; without those of servers that are not known here."""
    exact, shapes = [], []
    for teacher in (config.as_loaded(t) for t in config.teachers if t.judges_exactly):
        try:
            shapes.append(shape_of(teacher.model, trust_remote_code=config.trust_remote_code))
        except (ValueError, OSError):
            if teacher.is_here:
                raise
            continue
        exact.append(teacher)
    return exact, shapes


def assumptions(config: TrainConfig, machine: Machine, lengths: Lengths) -> list[str]:
    """What a plan takes for granted, one line each, with the option that says better where there is one."""
    limits = Lengths(config.max_prompt_length, config.max_completion_length, config.debate.max_tokens)
    told = {"mean_prompt": "a prompt", "mean_completion": "a completion"} | (
        {"mean_turn": "a teacher's turn in a debate"} if config.debates else {}
    )
    lines = []
    for (option, what), name in zip(told.items(), ("prompt", "completion", "turn"), strict=False):
        value, limit = getattr(lengths, name), getattr(limits, name)
        better = f", its limit in the settings: an upper bound (--{option} says better)" if value == limit else ""
        lines.append(f"{what} has {value:g} tokens on average{better}")
    m, mean = machine, f"{100 * machine.flop_efficiency:.0f} % of {machine.flops / 1e12:.0f} TFLOP/s (bfloat16)"
    lines += [
        f"{m.name}: large products reach {mean}, decoding {100 * m.bandwidth_efficiency:.0f} % of "
        f"{m.bandwidth / 1e12:g} TB/s; {m.link / 1e9:g} GB/s between the {m.gpus_per_node} GPUs of a node, "
        f"{m.network / 1e9:g} GB/s to others (--network)",
        "the student's weights, gradients and two moments of AdamW are float32, 16 bytes a weight"
        + ("; with lora less: this is an upper bound" if config.lora is not None else "")
        + "; teachers are bfloat16, here and on servers",
        "the phases follow one another"
        + (f" (max_staleness: {config.max_staleness} lets them overlap)" if config.max_staleness else ""),
    ]
    if not config.use_vllm:
        lines.append("sampling is counted at the rate of vLLM, and transformers is slower: use_vllm: true")
    if config.debates:
        lines.append("no debate is in the cache")
    if config.environment.name:
        lines.append("an episode is one turn: multiply by its turns, and add what the environment itself takes")
    if config.method == "mt_seqkd":
        lines.append("the student's sampling stands for the teachers' writing, of which nothing is counted")
    return lines


def update_work(
    config: TrainConfig,
    student: Shape,
    teachers: Sequence[Shape],
    machine: Machine,
    tokens: float,
    length: float,
    targets: float,
) -> Work:
    """Forward, backward, fused loss and optimiser.

    Args:
        tokens: prompt and completion of all rollouts.
        length: mean length of a sequence.
        targets: tokens that are trained on.
    """
    passes = 4 if config.gradient_checkpointing else 3
    flops = passes * student.body_flops(tokens, length / 2) + loss_flops(student, teachers, targets)
    # FSDP gathers the parameters for forward and backward and scatters the gradients, per micro-batch.
    batches = max(tokens / machine.gpus / config.max_tokens_per_batch, 1.0)
    share = (machine.gpus - 1) / machine.gpus
    gathered = student.parameters - (student.head_parameters if config.vocab_parallel_head else 0)
    sent = share * gathered * (2 * 2 * batches + 4)
    if config.vocab_parallel_head:  # hidden states travel instead of the head
        sent += share * 2 * targets * (student.hidden + sum(t.hidden for t in teachers))
    seconds = flops / (machine.gpus * machine.flops * machine.flop_efficiency)
    transfer = sent / _link(machine)
    optimiser = 28 * student.parameters / machine.gpus / (machine.bandwidth * machine.bandwidth_efficiency)
    return Work(flops=flops, sent=sent, seconds=max(seconds, transfer) + optimiser)


def loss_flops(student: Shape, teachers: Sequence[Shape], targets: float) -> float:
    """Of the fused loss: three products with the student's head, one with each teacher's."""
    return 3 * student.head_flops(targets) + sum(t.head_flops(targets) for t in teachers)


def sync_work(student: Shape, machine: Machine) -> Work:
    """Whole bf16 weights to every sampler."""
    size = 2.0 * student.parameters
    return Work(sent=size, seconds=size / _link(machine))


def memory_of(
    config: TrainConfig, student: Shape, teachers: Sequence[Shape], machine: Machine, length: float
) -> dict[str, float]:
    """Bytes on one GPU by purpose, at the moment of the update."""
    budget = config.max_tokens_per_batch
    element = 2 if config.bf16 else 4
    if config.gradient_checkpointing:  # one state per layer, and one layer's insides
        # With float32 parameters autocast leaves the states between layers float32; FSDP gathers bfloat16 ones.
        between = 4 if machine.gpus == 1 else element
        activations = budget * (between * student.layers * student.hidden + element * _insides(student))
    else:
        activations = element * budget * student.layers * _insides(student)
    states = sum(
        _resident(t, shape, machine)
        for t, shape in zip(exact_teachers(config)[0], teachers, strict=bool(teachers))
        if machine.gpus > 1 or not config.shares_student(t)
    )
    sampler = config.vllm_gpu_memory_utilization * machine.memory if config.use_vllm else 2.0 * student.parameters
    if config.use_vllm and (config.vllm_mode == "server" or config.vllm_enable_sleep_mode):
        sampler = 0.0
    layer = student.parameters / (student.layers + 2)
    parts = machine.gpus if config.vocab_parallel_head else 1
    width = sum(t.hidden for t in teachers)
    joined = 2.0 * (parts - 1) * budget * student.hidden
    return {
        STUDENT: 16 * student.parameters / machine.gpus,
        GATHERED: 2 * 2 * layer + 2 * student.head_parameters / parts if machine.gpus > 1 else 0.0,
        ACTIVATIONS: activations,
        TEACHERS: float(states),
        HIDDEN: 2.0 * parts * budget * width + joined,  # of a micro-batch; the others wait on the host
        LOSS: float(config.workspace_bytes or GIB) + 4 * student.head_parameters / parts,
        SAMPLER: sampler,
    }


def _resident(teacher: TeacherConfig, shape: Shape, machine: Machine) -> float:
    """Bytes of a teacher that stay on one GPU, in bf16; of one elsewhere, stored or waiting on the CPU its head."""
    if teacher.offload or teacher.stored_only or not teacher.is_here:
        return 2.0 * shape.head_parameters
    if not teacher.shard:
        return 2.0 * shape.parameters
    return 2.0 * (shape.parameters - shape.head_parameters) / machine.gpus + 2.0 * shape.head_parameters


def _insides(shape: Shape) -> float:
    """Elements of one layer that backward needs, per token."""
    width = shape.heads * shape.head_dim
    mlp = 3 * shape.intermediate * (shape.experts_per_token or 1)
    return 4 * shape.hidden + 2 * width + 2 * shape.kv_heads * shape.head_dim + mlp


def _decode(shape: Shape, machine: Machine, sequences: float, prompt: float, new: float) -> Work:
    """Prefill, then one token a step: the slower of products and memory."""
    prefill = shape.body_flops(sequences * prompt, prompt / 2)
    flops = shape.body_flops(sequences * new, prompt + new / 2) + shape.head_flops(sequences * new)
    share = _touched(shape, sequences / machine.gpus)
    weights = 2.0 * new * machine.gpus * share
    cache = sequences * new * shape.cache_bytes(prompt + new / 2)
    rate = machine.gpus * machine.flops * machine.flop_efficiency
    memory = (weights + cache) / (machine.gpus * machine.bandwidth * machine.bandwidth_efficiency)
    return Work(flops=prefill + flops, read=weights + cache, seconds=prefill / rate + max(flops / rate, memory))


def _touched(shape: Shape, batch: float) -> float:
    """Parameters that a decoding step of so many sequences reads: all experts that some token needs."""
    if not shape.experts:
        return shape.active_parameters + shape.head_parameters
    missed: float = (1 - shape.experts_per_token / shape.experts) ** batch
    mlp = shape.expert_parameters * shape.experts * (1 - missed)
    return shape.layers * (shape.attention_parameters + mlp) + shape.head_parameters


def _read(shape: Shape, machine: Machine, sequences: float, length: float) -> Work:
    flops = shape.body_flops(sequences * length, length / 2)
    return Work(flops=flops, seconds=flops / (machine.gpus * machine.flops * machine.flop_efficiency))


def _gathering(work: Work, shape: Shape, machine: Machine, passes: float) -> Work:
    """The same by a model that is split over the GPUs: every pass gathers its layers."""
    sent = (machine.gpus - 1) / machine.gpus * 2.0 * (shape.parameters - shape.head_parameters) * passes
    return replace(work, sent=work.sent + sent, seconds=max(work.seconds, sent / _link(machine)))


def _add(works: Sequence[Work]) -> Work:
    names = ("flops", "read", "sent", "seconds")
    return Work(**{name: sum(getattr(w, name) for w in works) for name in names})


def _link(machine: Machine) -> float:
    return machine.network if machine.gpus > machine.gpus_per_node else machine.link
