"""What sharing a draw costs: the noise of gradients from a tenth of the columns, by the rows of a block.

    PYTHONPATH=kernels python benchmarks/block_rows.py [--rows 2048] [--save]

Reverse KL on made-up distributions like those of trained models (``gpu/problems.py: peaked``), on the CPU; predicted
noise of dX and dW (``SampleReport``). ``--save`` writes ``results/block_rows.json``, from which ``report.py`` makes the
table of the notes.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent / "kernels"), str(HERE / "gpu"), str(HERE)]

import torch
from conftest import save_results
from problems import PEAKS, Shape, peaked

from opd_kernels import linear_divergence, sampling

SHARE, VOCAB, WIDTH = 0.1, 151936, 128
WORKSPACE = 6 << 30
"""Bytes; a chunk has to hold the rows of a block."""


def noises(rows: int, block: int, live: int, exponent: float) -> tuple[float, float]:
    """Predicted relative noise of dX and dW."""
    sampling.BLOCK_ROWS["cpu"] = block
    problem = peaked(Shape("", rows, VOCAB, WIDTH, (WIDTH,)), "cpu", torch.float32, live, exponent)
    heads = problem.hidden, problem.weight, problem.teachers
    out = linear_divergence(*heads, divergence="reverse_kl", vocab_sample=SHARE, workspace_bytes=WORKSPACE)
    assert out.sampling is not None
    return out.sampling.hidden_noise.item(), out.sampling.weight_noise.item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=2048)
    parser.add_argument("--blocks", type=int, nargs="+", default=[256, 512, 1024, 2048])
    parser.add_argument("--save", action="store_true")
    options = parser.parse_args()
    found = {}
    for live, exponent in PEAKS:
        for block in options.blocks:
            hidden, weight = noises(options.rows, block, live, exponent)
            found.setdefault(f"{live}, {exponent}", {})[str(block)] = [hidden, weight]
            print(f"{live} live columns, exponent {exponent}, {block} rows: {hidden:.4f} {weight:.4f}", flush=True)
    if options.save:
        about = {"rows": options.rows, "vocab": VOCAB, "width": WIDTH, "share": SHARE}
        save_results(HERE / "results" / "block_rows.json", {**about, "noise": found})


if __name__ == "__main__":
    main()
