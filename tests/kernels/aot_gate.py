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

from opd_kernels import rows

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks" / "gpu"))

import choose_columns
from gap_gemm import gap_kernel
from one_read import OPTIONS, SETTINGS, one_read_kernel

ARCHITECTURES = (80, 90, 100)
KINDS = ("reverse_kl", "forward_kl", "jsd", "skew_kl")
# What a chunk of one row and one block makes constant.
ONES = {"splits": 1, "table_stride": 1}
FINISH = ("Z_BIAS", "Z_CAP", "Z_FLOOR", "T_BIAS", "T_CAP", "T_FLOOR")


def statistics() -> Iterator[dict]:
    plain = dict.fromkeys(FINISH, False)
    for student, teacher, cross, full in itertools.product((True, False), repeat=4):
        if (student or teacher) and (teacher or not cross) and (student or not full or cross):
            yield {"STUDENT": student, "TEACHER": teacher, "CROSS": cross, "FULL": full, **plain}
    every = {"STUDENT": True, "TEACHER": True, "CROSS": True, "FULL": True}
    yield {**every, **plain, **ONES}
    yield {**every, **dict.fromkeys(FINISH, True)}


def merges() -> Iterator[dict]:
    for flags in statistics():
        if not flags["Z_BIAS"]:
            flags = {name: flags[name] for name in flags if name not in FINISH}
            sizes = {"ROWS": 512, "SPLITS": 1} if "splits" in flags else {"ROWS": 4, "SPLITS": 128}
            yield {**flags, "LABELS": flags["FULL"], "SIDE": 6, **sizes}


VARIANTS = {
    "statistics_kernel": list(statistics()),
    "merge_kernel": list(merges()),
    "value_kernel": [{"KIND": "jsd", "SIDE": 6, **ONES}, *({"KIND": kind, "SIDE": 6} for kind in KINDS)],
    "fold_kernel": [{"KIND": kind, "RAW": raw} for kind in (*KINDS, "mixture") for raw in (True, False)],
    "gradient_kernel": [
        {"KIND": kind, "RAW": raw, "HAS_T": has_t, "CAP": cap, "out_ptr": out}
        for kind in KINDS
        for raw, has_t, cap, out in (
            (True, False, False, "*bf16"),
            (True, True, False, "*bf16"),
            (False, True, False, "*bf16"),
            (True, True, True, "*fp32"),
        )
    ],
    "logprob_gradient_kernel": [
        {"HAS_ENTROPY": False, "CAP": False, "out_ptr": "*bf16"},
        {"HAS_ENTROPY": True, "CAP": True, "out_ptr": "*fp32"},
    ],
}
"""Every way the row operations launch each kernel, as constants and pointer types that matter."""

POINTERS = {
    "label_ptr": "*i64",
    "ticket_ptr": "*i32",
    "finite_ptr": "*i1",
    "z_bias_ptr": "*bf16",
    "t_bias_ptr": "*bf16",
}
SESSION = {
    "one_read_kernel": [
        {"KIND": kind, "TWO": two, "WAIT": True, "SPLITS": 128, "BLOCK": block, "num_warps": warps, "out_ptr": "*bf16"}
        for block, warps in SETTINGS
        for kind in ("reverse_kl", "forward_kl")
        for two in (False, True)
    ],
    "gap_kernel": [
        {**config.kwargs, "num_warps": config.num_warps, "num_stages": config.num_stages, "pointers": "*bf16"}
        for config in gap_kernel.configs
    ],
    "mass_kernel": [{"BLOCK": choose_columns.BLOCK, "dz_ptr": "*bf16"}],
    "score_kernel": [{"BLOCK": choose_columns.BLOCK, "ROWS": 256, "dz_ptr": "*bf16"}],
    "dropped_kernel": [
        {"ROWS": 16, "COLUMNS": 128, "TILES": 64, "LEVELS": 16, "dz_ptr": "*bf16", "below_ptr": "*u8"},
    ],
}
"""The kernels that only the GPU session uses, at each of its settings."""

NUMBERS = ("parameter", "cap", "z_cap", "t_cap", "z_factor", "t_factor")
ALIGNED = ("width", "z_width", "t_width", "z_stride", "t_stride", "u_stride", "acc_stride", "out_stride")
ALIGNED += ("stride",)


def kernels() -> dict[str, triton.JITFunction]:
    """The kernels of ``rows``: what takes part in a launch ends in ``_kernel``, helpers do not."""
    return {name: value for name, value in vars(rows).items() if name.endswith("_kernel")}


def build(name: str, variant: dict, capability: int):
    """The compiled kernel, with the divisibility that the launches of ``TritonRowOps`` have."""
    session = {"one_read_kernel": one_read_kernel, "gap_kernel": gap_kernel.fn}
    kernel, variant = {**kernels(), **vars(choose_columns), **session}[name], dict(variant)
    options = {**(OPTIONS if name in SESSION else rows.OPTIONS)}
    options |= {key: variant.pop(key) for key in ("num_warps", "num_stages") if key in variant}
    pointers = variant.pop("pointers", None)
    signature, constants, hints = {}, {}, {}
    for index, argument in enumerate(kernel.arg_names):
        if argument.isupper() or (argument in ONES and argument in variant):
            signature[argument] = "constexpr"
            constants[(index,)] = variant.pop(argument) if argument in variant else getattr(rows, argument)
        elif argument.endswith("_ptr"):
            signature[argument] = variant.pop(argument, pointers or POINTERS.get(argument, "*fp32"))
        else:
            signature[argument] = "fp32" if argument in NUMBERS else "i32"
        if argument.endswith("_ptr") or argument in ALIGNED or (name, argument) == ("gap_kernel", "vocab"):
            hints[(index,)] = [["tt.divisibility", 16]]
    assert not variant, f"{name} has no arguments {sorted(variant)}"
    source = ASTSource(kernel, signature, constants, hints)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def tool(name: str, *arguments: str) -> str:
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([path, *arguments], capture_output=True, text=True, check=True).stdout


def measure(name: str, variant: dict, capability: int) -> dict:
    """Registers, spilled bytes, shared bytes and global loads and stores of one variant."""
    compiled = build(name, variant, capability)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = tool("cuobjdump", "-res-usage", file.name)
        sass = tool("cuobjdump", "-sass", file.name)
    used = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL|SHARED):(\d+)", usage)}
    return {
        "kernel": name,
        "variant": variant,
        "capability": capability,
        "registers": used["REG"],
        "spilled": used["STACK"] + used["LOCAL"] + len(re.findall(r"\b(?:LDL|STL)\b", sass)),
        "shared": compiled.metadata.shared,
        "loads": Counter(re.findall(r"\bLDG\.E[.\w]*", sass)),
        "stores": Counter(re.findall(r"\bSTG\.E[.\w]*", sass)),
        "tensor_cores": len(re.findall(r"\b(?:HGMMA|UTCHMMA|HMMA)\b", sass)),
        "instructions": len(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/", sass, re.M)),
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
