"""What the processes of ``test_vocab_parallel`` run: every case against the same call on the whole heads.

Run as a script by the test, once per number of processes; prints nothing and exits non-zero on the first difference.
"""

from __future__ import annotations

import itertools
import re
import sys
from collections import Counter
from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist

from opd_kernels import TeacherHead, linear_divergence, linear_logprob, shards, token_stats, topk_divergence

KINDS = ("reverse_kl", "forward_kl", "jsd", "skew_kl")
ROWS, VOCAB, WIDTH = 9, 37, 5
# Vocabulary rows of every rank; the last rank of each holds padding, one of them nothing else.
SPLITS = {2: [(20, 17 + 6)], 4: [(7, 13, 1, 16 + 3), (12, 12, 12, 12), (20, 17, 2, 1)]}
SMALL = 9_000  # bytes: several chunks


def normal(g, *shape, dtype):
    return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)


class World:
    """One random problem, whole and as this rank's shards."""

    def __init__(self, split, teachers, *, dtype=torch.float64, seed=0, bias=False, equal_mix=False):
        g = torch.Generator().manual_seed(seed)
        rank, padded = dist.get_rank(), sum(split)
        start = sum(split[:rank])
        self.cut = slice(start, start + split[rank])
        self.real = slice(start, min(start + split[rank], VOCAB))
        self.hidden = normal(g, ROWS, WIDTH, dtype=dtype)
        self.weight = normal(g, padded, WIDTH, dtype=dtype)
        self.bias = normal(g, padded, dtype=dtype) if bias else None
        if bias:
            self.bias[3] = -torch.inf
        self.heads = []
        for k in range(teachers):
            hidden, weight = normal(g, ROWS, WIDTH + k, dtype=dtype), normal(g, padded, WIDTH + k, dtype=dtype)
            self.heads.append(TeacherHead(hidden, weight, normal(g, padded, dtype=dtype) if bias else None))
        if padded > VOCAB:
            # Padding columns must not matter, whatever they hold.
            self.weight[VOCAB:] = 50.0
            for head in self.heads:
                head.weight[VOCAB:] = -70.0
        self.mix = torch.rand(ROWS, teachers, generator=g)
        self.mix[torch.rand(ROWS, teachers, generator=g) < 0.3] = 0.0
        self.mix[1], self.mix[4] = 0.0, 0.7
        self.token_weight = torch.rand(ROWS, generator=g)
        self.token_weight[[2, 5]] = 0.0
        self.labels = torch.randint(0, VOCAB, (ROWS,), generator=g)
        self.options = {"vocab_size": VOCAB}

    def inputs(self, whole):
        cut = slice(None) if whole else self.cut
        leaves = [x.detach().clone().requires_grad_() for x in (self.hidden, self.weight[cut])]
        if self.bias is not None:
            leaves.append(self.bias[cut].clone().requires_grad_())
        teachers = [
            TeacherHead(h.hidden, h.weight[cut].clone(), None if h.bias is None else h.bias[cut].clone())
            for h in self.heads
        ]
        return leaves, teachers

    def local(self, gradients):
        """This rank's part of the whole gradients."""
        return [gradients[0], *(x[self.cut] for x in gradients[1:])]


def divergence(world, group, **options):
    leaves, teachers = world.inputs(whole=group is None)
    bias = leaves[2] if len(leaves) > 2 else None
    out = linear_divergence(
        *leaves[:2], teachers, student_bias=bias, group=group, impl="torch", **world.options, **options
    )
    upstream = torch.linspace(-1.0, 1.5, ROWS).to(out.loss) if out.loss.dim() else torch.tensor(1.7).to(out.loss)
    gradients = list(torch.autograd.grad(out.loss, leaves, upstream))
    stats = [] if out.stats is None else [x for x in vars(out.stats).values() if x is not None]
    return [out.loss.detach(), out.token_loss, *stats], world.local(gradients) if group is None else gradients


def same(got, want, note, **tolerance):
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, equal_nan=True, msg=lambda m: f"{note}: {m}", **tolerance)


def compare(world, note, tolerance=None, **options):
    tolerance = tolerance or {"rtol": 1e-11, "atol": 1e-12}
    (got, got_gradients), (want, want_gradients) = (divergence(world, g, **options) for g in (dist.group.WORLD, None))
    same(got, want, f"{note} {options}", **tolerance)
    same(got_gradients, want_gradients, f"gradient of {note} {options}", **tolerance)


@contextmanager
def counted():
    """Counts collectives by name."""
    calls, places = Counter(), [(shards, "all_gather"), (dist, "all_reduce")]
    originals = [getattr(module, name) for module, name in places]
    for (module, name), original in zip(places, originals, strict=True):

        def wrapper(*args, _name=name, _original=original, **kwargs):
            calls[_name] += 1
            return _original(*args, **kwargs)

        setattr(module, name, wrapper)
    try:
        yield calls
    finally:
        for (module, name), original in zip(places, originals, strict=True):
            setattr(module, name, original)


def check_divergences(splits):
    cases = itertools.product(KINDS, (1, 2, 3), ("sum", "mean", "none"), ("sum", "mixture"))
    for (kind, teachers, reduction, form), split in zip(cases, itertools.cycle(splits), strict=False):
        world = World(split, teachers, seed=teachers)
        compare(
            world,
            f"split {split}",
            divergence=kind,
            teacher_reduction=form,
            reduction=reduction,
            mix=world.mix if reduction != "mean" else [0.9, 0.4, 0.2][:teachers],
            token_weight=world.token_weight if reduction != "sum" else None,
            labels=world.labels,
            stats=reduction != "mean",
            temperature=1.3,
            workspace_bytes=SMALL,
        )


def check_heads(splits):
    """Bias with a column switched off, softcap and logit scale."""
    for kind, form in itertools.product(KINDS, ("sum", "mixture")):
        for softcap in (None, 2.0):
            world = World(splits[0], 2, seed=7, bias=True)
            compare(
                world,
                "bias",
                divergence=kind,
                teacher_reduction=form,
                student_logit_scale=0.7,
                student_softcap=softcap,
                stats=True,
                labels=world.labels.clamp(min=4),
                mix=world.mix,
            )


def check_sampled(splits):
    """Unbiased, and the same hidden gradient on every rank."""
    for split, kind in itertools.product(splits[:2], ("reverse_kl", "jsd")):
        world = World(split, 2, seed=5, bias=True)
        options = {"divergence": kind, "mix": world.mix, "labels": world.labels}
        options["logprob_weight"] = torch.linspace(-1, 1, ROWS, dtype=torch.float64)
        _, exact = divergence(world, None, **options)
        draws = []
        for seed in range(24):
            _, gradients = divergence(world, dist.group.WORLD, vocab_sample=0.4, sample_seed=seed, **options)
            draws.append(gradients)
            everyone = shards.gather_from(dist.group.WORLD, gradients[0])
            assert all(torch.equal(x, gradients[0]) for x in everyone)
        for place, truth in enumerate(exact):
            every = torch.stack([gradients[place] for gradients in draws])
            if every.numel():
                error = (every.mean(0) - truth).norm()
                assert error <= 2.5 * (every.var(0).sum() / len(every)).sqrt() + 1e-12, (split, kind, place, error)


def check_float32(splits):
    for kind in KINDS:
        world = World(splits[0], 2, dtype=torch.float32, seed=3)
        compare(world, "float32", tolerance={"rtol": 2e-5, "atol": 1e-5}, divergence=kind, stats=True, mix=world.mix)


def check_bfloat16(splits):
    world = World(splits[0], 2, dtype=torch.bfloat16, seed=4)
    compare(world, "bfloat16", tolerance={"rtol": 1e-2, "atol": 2e-3}, divergence="jsd", mix=world.mix)


def check_stats(splits):
    for split in splits:
        world = World(split, 3, seed=11)
        results = []
        for group in (dist.group.WORLD, None):
            leaves, teachers = world.inputs(whole=group is None)
            stats = token_stats(
                *leaves,
                teachers,
                labels=world.labels,
                mix=world.mix,
                group=group,
                workspace_bytes=SMALL,
                **world.options,
            )
            results.append(list(vars(stats).values()))
        same(*results, "token_stats", rtol=1e-11, atol=1e-12)


def check_ties(splits):
    """Equal largest logits on two ranks: the lowest id wins, as in one process."""
    world = World(splits[0], 1, seed=12)
    # The student's largest logits are columns 5 and 30, the teacher's column 30 alone: no agreement.
    world.weight[5] = world.weight[30] = 9.0
    world.hidden[:] = 1.0
    teacher = world.heads[0]
    teacher.hidden[:] = 1.0
    teacher.weight[30] = 9.0
    for group in (dist.group.WORLD, None):
        leaves, teachers = world.inputs(whole=group is None)
        stats = token_stats(*leaves, teachers, group=group, **world.options)
        assert stats.top1_agreement.eq(0.0).all()


def check_logprob(splits):
    """One and several labels, the tail, and both gradients; duplicates of a label are allowed."""
    g = torch.Generator().manual_seed(0)
    for split, softcap in itertools.product(splits, (None, 2.0)):
        world = World(split, 1, seed=8, bias=True)
        for labels, tail in ((world.labels, False), (torch.randint(4, VOCAB, (ROWS, 6), generator=g), True)):
            outputs, gradients = [], []
            for group in (dist.group.WORLD, None):
                leaves, _ = world.inputs(whole=group is None)
                with counted() as calls:
                    out = linear_logprob(
                        *leaves[:2],
                        labels,
                        bias=leaves[2],
                        softcap=softcap,
                        temperature=0.8,
                        tail=tail,
                        group=group,
                        impl="torch" if group else "reference",
                        workspace_bytes=SMALL + 1_000,
                        **world.options,
                    )
                    values = [x for x in (out.logprob, out.entropy, out.tail) if x is not None]
                    total = sum((x * torch.linspace(-1, 2, x.numel()).view_as(x)).sum() for x in values)
                    grads = torch.autograd.grad(total, leaves)
                assert calls["all_reduce"] == (1 if group else 0), "dX alone"
                assert not group or calls["all_gather"] > 2, "a header, and one for each of several chunks"
                assert not out.top1_prob.requires_grad
                outputs.append([*(x.detach() for x in values), out.top1_prob])
                gradients.append(list(grads) if group else world.local(grads))
            same(*outputs, f"linear_logprob {split}", rtol=1e-11, atol=1e-12)
            same(*gradients, f"gradient of linear_logprob {split}", rtol=1e-11, atol=1e-12)


def leaves_of(world):
    return world.inputs(whole=False)[0]


def check_topk(splits):
    """A teacher's list has global ids; the whole vocabulary as a list has no tail."""
    for split, kind, k in itertools.product(splits, KINDS, (5, VOCAB)):
        world = World(split, 1, seed=10)
        head = world.heads[0]
        listed, ids = torch.log_softmax(head.hidden @ head.weight[:VOCAB].t(), 1).topk(k, 1)
        if k < VOCAB:  # some rows list fewer
            unused = torch.arange(k) > torch.arange(len(ids))[:, None] % k
            ids, listed = ids.masked_fill(unused, -1), listed.masked_fill(unused, -torch.inf)
        outputs, gradients = [], []
        for group in (dist.group.WORLD, None):
            leaves, _ = world.inputs(whole=group is None)
            options = {"divergence": kind, "token_weight": world.token_weight, "group": group, **world.options}
            out = topk_divergence(*leaves, ids, listed, **options)
            grads = torch.autograd.grad(out.loss, leaves)
            outputs.append([out.loss.detach(), out.token_loss])
            gradients.append(list(grads) if group else world.local(grads))
        same(*outputs, f"topk_divergence {split} {kind} {k}", rtol=1e-11, atol=1e-12)
        same(*gradients, f"gradient of topk_divergence {split} {kind} {k}", rtol=1e-11, atol=1e-12)
        labels = ids.clamp(min=0)
        out = linear_logprob(*leaves_of(world), labels, tail=True, group=dist.group.WORLD, **world.options)
        assert out.tail.isneginf().all() == (k == VOCAB)
    far = [x.detach() * 1e3 if x.dim() == 2 and len(x) == ROWS else x for x in leaves_of(world)]
    whole = [x.detach() * 1e3 if x.dim() == 2 and len(x) == ROWS else x for x in world.inputs(whole=True)[0]]
    best = (whole[0] @ whole[1][:VOCAB].t()).topk(2, 1).indices
    tails = [
        linear_logprob(*leaves, best, tail=True, group=group, **world.options).tail.detach()
        for leaves, group in ((far, dist.group.WORLD), (whole, None))
    ]
    assert tails[0].min() < -800  # exp of it is 0 in float64
    same(tails[:1], tails[1:], "a small tail", rtol=1e-11, atol=1e-12)


def check_no_rows(splits):
    """Zeros on every rank, and nothing waits."""
    world = World(splits[0], 2, seed=10)
    leaves, heads = world.inputs(whole=False)
    none = [TeacherHead(head.hidden[:0], head.weight) for head in heads]
    group = {"group": dist.group.WORLD, **world.options}
    out = linear_divergence(leaves[0][:0], leaves[1], none, **group)
    found = linear_logprob(leaves[0][:0], leaves[1], world.labels[:0, None], tail=True, **group)
    gradients = torch.autograd.grad(out.loss + found.logprob.sum() + found.tail.sum(), leaves)
    assert out.loss == 0 and not any(x.any() for x in gradients)


def check_compiled(splits):
    """The opaque ops carry the group."""
    world = World(splits[0], 2, seed=9)
    leaves, heads = world.inputs(whole=False)
    group = dist.group.WORLD

    def call(hidden, weight):
        out = linear_divergence(hidden, weight, heads, divergence="jsd", group=group, **world.options)
        return out.loss + linear_logprob(hidden, weight, world.labels, group=group, **world.options).logprob.sum()

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    results = [torch.autograd.grad(function(*leaves), leaves) for function in (call, compiled)]
    same(*results, "compiled", rtol=1e-12, atol=1e-13)


def check_collectives(splits):
    """One collective per chunk for KL and statistics, two for the others, and two per call."""
    per_chunk = {"reverse_kl": 1, "forward_kl": 1, "jsd": 2, "skew_kl": 2}
    chunks = {}
    for kind, form, teachers, stats in itertools.product(KINDS, ("sum", "mixture"), (1, 3), (False, True)):
        world = World(splits[0], teachers, seed=5)
        leaves, heads = world.inputs(whole=False)
        with counted() as calls:
            linear_divergence(
                *leaves,
                heads,
                divergence=kind,
                teacher_reduction=form,
                stats=stats,
                group=dist.group.WORLD,
                workspace_bytes=SMALL,
                **world.options,
            ).loss.backward()
        gathers = calls["all_gather"] - 1
        assert gathers > 1, "the case must have several chunks"
        assert chunks.setdefault(teachers, gathers) == gathers
        two = per_chunk[kind] == 2 or (form == "mixture" and teachers > 1)
        assert calls["all_reduce"] - 1 == (gathers if two else 0), (kind, form, teachers, calls)


def raises(note, function):
    with pytest.raises(ValueError, match=re.escape(note)):
        function()


def check_errors(splits):
    """Every rank gets the same error, or one names what the ranks disagree on."""
    rank, group = dist.get_rank(), dist.group.WORLD
    world = World(splits[0], 2, seed=6)

    def call(change=lambda leaves, heads: None, **options):
        leaves, heads = world.inputs(whole=False)
        change(leaves, heads)
        return linear_divergence(*leaves, heads, group=group, **{**world.options, **options})

    def poison(leaves, heads):
        if rank == 1:
            heads[1].weight[0, 0] = torch.nan

    raises("teachers[1] has NaN or inf logits on some rank, first at row 0", lambda: call(poison))

    def switch_off(leaves, heads):
        if rank == 0:
            heads[0].weight[3] = torch.inf * heads[0].hidden.sum(0).sign()

    for kind in KINDS:
        raises("teachers[0] has NaN or inf", lambda: call(switch_off, divergence=kind))  # noqa: B023
    raises("disagree on an option", lambda: call(temperature=1.0 + rank))
    raises("disagree on an option", lambda: call(reduction="mean" if rank else "sum"))
    raises("vocab_size=1000", lambda: call(vocab_size=1000))
    raises("labels[0] = 37", lambda: call(labels=torch.full((ROWS,), VOCAB)))
    raises("does not serve", lambda: call(impl="reference"))

    def shift(leaves, heads):
        if rank < 2:
            head = heads[0]
            extra = head.weight.new_zeros(1, head.weight.shape[1])
            weight = torch.cat((head.weight, extra)) if rank == 0 else head.weight[:-1]
            heads[0] = TeacherHead(head.hidden, weight.contiguous())

    raises("rank 0 holds", lambda: call(shift))

    def fewer(leaves, heads):
        if rank == 0:
            heads.pop()

    raises("number of teachers", lambda: call(fewer))
    nan = world.hidden.clone()
    world.hidden[0] = torch.nan
    assert call(reduction="none").token_loss[0].isnan(), "a broken student makes its own loss NaN"
    world.hidden = nan


CHECKS = [
    check_divergences,
    check_heads,
    check_sampled,
    check_float32,
    check_bfloat16,
    check_stats,
    check_ties,
    check_logprob,
    check_topk,
    check_no_rows,
    check_collectives,
    check_errors,
]


def main() -> None:
    rank, size, store = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    # Compiling takes longer than everything else: once is enough.
    for check in CHECKS if size > 2 else (*CHECKS, check_compiled):
        check(SPLITS[size])
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
