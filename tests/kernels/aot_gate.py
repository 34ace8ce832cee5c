"""Compiles every Triton kernel for real GPUs without one, and reports what the machine code needs.

Run as a script it prints one JSON object per variant and architecture. It needs no driver, but a
process without TRITON_INTERPRET. ``test_aot.py`` runs it; on another Triton:

    pip install --target DIR --no-deps triton==3.6.0
    PYTHONPATH=DIR:kernels python tests/kernels/aot_gate.py
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from opd_kernels import columns, rows, triton_columns

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks" / "gpu"))

from gap_gemm import gap_kernel

ARCHITECTURES = (80, 90, 100)
KINDS = ("reverse_kl", "forward_kl", "jsd", "skew_kl")
WIDE = {"SPLITS": 128, "BLOCK": rows.BLOCK}
ROW = {"TILES": 3, "BLOCK": columns.WIDTH}
PICKED = {"ROWS": columns.ROWS, "BLOCK": columns.PLACES}


def needs(kind: str, mixture: bool, full: bool) -> dict:
    """What the statistics are to give, as ``TritonRowOps`` asks for it."""
    p, q = (full or (kind == own and not mixture) for own in ("reverse_kl", "forward_kl"))
    return {"P": p, "Q": q, "DOTS": full or not (p or q), "FULL": full}


def statistics() -> Iterator[dict]:
    for teachers, kind, full in (
        (0, "jsd", True),
        (1, "reverse_kl", False),
        (1, "forward_kl", False),
        (2, "jsd", False),
        (2, "jsd", True),
    ):
        yield {"TEACHERS": teachers, "LABELS": full, **needs(kind, False, full)}
    yield {"TEACHERS": 8, "LABELS": True, **needs("jsd", False, True)}


def rules(mixtures: bool) -> Iterator[dict]:
    for kind, teachers in itertools.product(KINDS[0 if mixtures else 2 :], (1, 2, 8)):
        yield {"KIND": kind, "MIXTURE": mixtures and teachers > 1, "TEACHERS": teachers, "BLOCK": rows.BLOCK}


VARIANTS = {
    "statistics_kernel": [{**flags, "BLOCK": rows.BLOCK} for flags in statistics()],
    "merge_kernel": [{**flags, "SPLITS": 128, "num_warps": 1} for flags in statistics()],
    "terms_kernel": [
        flags for flags in (*rules(False), *rules(True)) if flags["MIXTURE"] or flags["KIND"] in KINDS[2:]
    ],
    "gradient_kernel": [
        {**flags, "LABELS": cap, "CAP": cap, "out_ptr": out}
        for flags in (*rules(False), *rules(True))
        for cap, out in ((False, "*bf16"), (True, "*fp32"))
    ],
    "finish_kernel": [{"BIAS": True, "CAP": True, "FLOOR": True, "BLOCK": rows.BLOCK}],
    "logprob_gradient_kernel": [
        {"HAS_ENTROPY": False, "CAP": False, "out_ptr": "*bf16", "BLOCK": rows.BLOCK},
        {"HAS_ENTROPY": True, "CAP": True, "out_ptr": "*fp32", "BLOCK": rows.BLOCK},
    ],
    "squares_kernel": [{"ROWS": rows.ROWS, "BLOCK": rows.BLOCK}],
    "dz_squares_kernel": [{"ROWS": rows.ROWS, "BLOCK": rows.BLOCK, "x_ptr": kind} for kind in ("*bf16", "*fp32")],
    "inclusion_kernel": [
        {"ROUNDS": triton_columns.ROUNDS, "TILES": 19, "BLOCK": columns.SWEEP, "num_warps": columns.SWEEP_WARPS}
    ],
    "mark_kernel": [{"BLOCK": 128}],
    "keep_kernel": [{"FORCED": forced, "BLOCK": rows.BLOCK} for forced in (False, True)],
    "compact_kernel": [WIDE],
    "pick_kernel": [{"SINGLE": single, "BLOCK": columns.PLACES} for single in (True, False)],
    "ratio_kernel": [
        {"LABELS": more, "CAP": more, "BIAS": more, "out_ptr": out, **PICKED}
        for more, out in ((False, "*bf16"), (True, "*fp32"))
    ],
    "scaled_kernel": [{"x_ptr": kind, "out_ptr": kind, **PICKED} for kind in ("*bf16", "*fp32")],
    "take_kernel": [{**ROW, "weight_ptr": kind, "out_ptr": kind} for kind in ("*bf16", "*fp32")],
    "add_rows_kernel": [ROW],
    "scale_kernel": [{"BLOCK": 4096, "x_ptr": "*bf16"}],
}
"""Ways in which the row operations launch each kernel, as constants and pointer types that matter."""

POINTERS = {"label_ptr": "*i64", "ticket_ptr": "*i32", "bias_ptr": "*bf16", "column_ptr": "*i64", "seed_ptr": "*i64"}
POINTERS |= {"forced_ptr": "*i8", "count_ptr": "*i32"}
DOUBLES = ("inclusion_kernel", "keep_kernel")
"""Kernels whose factor is in float64."""
SESSION = {
    "gap_kernel": [
        {**config.kwargs, "num_warps": config.num_warps, "num_stages": config.num_stages, "pointers": "*bf16"}
        for config in gap_kernel.configs
    ],
}
"""The kernels that only the GPU session uses, at each of its settings."""

NUMBERS = ("parameter", "cap", "factor")
LARGE = ("logits_ptr", "out_ptr", "partial_ptr", "x_ptr")
LARGE += (
    "score_ptr",
    "forced_ptr",
    "known_ptr",
    "z_ptr",
    "gap_ptr",
    "own_ptr",
    "weight_ptr",
    "column_ptr",
    "inverse_ptr",
)
"""Pointers that are always aligned; the others are not specialised."""
SESSION_ALIGNED = ("width", "z_width", "t_width", "stride")


def kernels() -> dict[str, triton.JITFunction]:
    """What takes part in a launch ends in ``_kernel``, helpers do not."""
    found = vars(rows) | vars(columns)
    return {name: value for name, value in found.items() if name.endswith("_kernel")}


def build(name: str, variant: dict, capability: int):
    """The compiled kernel, with what the launches of ``TritonRowOps`` promise and nothing else."""
    session = name in SESSION
    kernel, variant = {**kernels(), "gap_kernel": gap_kernel.fn}[name], dict(variant)
    options: dict = {"num_warps": 4} if session else rows.options(variant.get("TEACHERS", 0))
    options |= {key: variant.pop(key) for key in ("num_warps", "num_stages") if key in variant}
    pointers = variant.pop("pointers", None)
    signature, constants, hints = {}, {}, {}
    for index, argument in enumerate(kernel.arg_names):
        aligned = argument in LARGE
        if argument.isupper():
            signature[argument] = "constexpr"
            constants[(index,)] = variant.pop(argument)
        elif argument.endswith("_ptr"):
            kind = "*fp64" if argument == "factor_ptr" and name in DOUBLES else POINTERS.get(argument, "*fp32")
            signature[argument] = variant.pop(argument, pointers or kind)
            aligned |= session
        else:
            signature[argument] = "fp32" if argument in NUMBERS else "i32"
            aligned |= session and (argument in SESSION_ALIGNED or (name, argument) == ("gap_kernel", "vocab"))
            aligned |= argument in ("pitch", "width")
        if aligned:
            hints[(index,)] = [["tt.divisibility", 16]]
    assert not variant, f"{name} has no arguments {sorted(variant)}"
    source = ASTSource(kernel, signature, constants, hints)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def tool(name: str, *arguments: str) -> str:
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([path, *arguments], capture_output=True, text=True, check=True).stdout


def measure(name: str, variant: dict, capability: int) -> dict:
    """Registers, spilled bytes, shared bytes, global loads and stores, and instructions for every logit of the
    student: all in the kernel over what a thread holds, the merge of a row included."""
    compiled = build(name, variant, capability)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = tool("cuobjdump", "-res-usage", file.name)
        sass = tool("cuobjdump", "-sass", file.name)
    found = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\d+\s+)?([A-Z0-9_.]+)", sass, re.M)
    each = variant.get("BLOCK", 0) / 32 / compiled.metadata.num_warps or 1
    used = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL|SHARED):(\d+)", usage)}
    return {
        "kernel": name,
        "variant": variant,
        "capability": capability,
        "warps": compiled.metadata.num_warps,
        "registers": used["REG"],
        "spilled": used["STACK"] + used["LOCAL"] + len(re.findall(r"\b(?:LDL|STL)\b", sass)),
        "shared": compiled.metadata.shared,
        "loads": Counter(re.findall(r"\bLDG\.E[.\w]*", sass)),
        "stores": Counter(re.findall(r"\bSTG\.E[.\w]*", sass)),
        "tensor_cores": len(re.findall(r"\b(?:HGMMA|UTCHMMA|HMMA)\b", sass)),
        "per_logit": len(found) / each,
        "special_per_logit": sum(name.startswith("MUFU") for name in found) / each,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--capability", type=int, action="append", help="80, 90, 100; default all three")
    parser.add_argument("--session", action="store_true", help="the kernels of the GPU session instead")
    parser.add_argument("--quick", action="store_true", help="only the first and the last variant of each kernel")
    options = parser.parse_args()
    assert sorted(kernels()) == sorted(VARIANTS), "every kernel needs its variants here"
    table = SESSION if options.session else VARIANTS
    for capability, name in itertools.product(options.capability or ARCHITECTURES, table):
        variants = table[name]
        for variant in (variants[0], variants[-1]) if options.quick else variants:
            result = measure(name, variant, capability)
            print(json.dumps({"triton": triton.__version__, **result}), flush=True)


if __name__ == "__main__":
    main()
