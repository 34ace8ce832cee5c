#!/bin/sh
# Install the harnesses of `opdengine bench` for a Python that has opdengine: requirements/install-bench.sh PYTHON
#
# evalplus and bfcl-eval come without what they require: clients of many vendors and, of bfcl-eval, numpy 1.26.4, for
# parts that are not used here. docs/benchmarks.md says what was tested.
set -eu
PYTHON=${1:-python}
cd "$(dirname "$0")/.."
"$PYTHON" requirements/extras.py bench | "$PYTHON" -m pip install -r /dev/stdin
"$PYTHON" -m pip install --no-deps evalplus==0.3.1 bfcl-eval==2026.3.23 tree_sitter==0.21.3 \
	tree-sitter-java==0.21.0 tree-sitter-javascript==0.21.4
"$PYTHON" -m pip install wget tempdir appdirs psutil tenacity overrides python-dotenv
