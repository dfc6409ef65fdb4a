#!/usr/bin/env bash
# Trains on all GPUs of one machine. One process drives them all, so nothing is distributed.
#
#     launch/gpu_node.sh --config=configs/dmd.py --workdir=runs/dmd
#
# Assumes: an NVIDIA driver for CUDA 13 (580 or newer), and Python 3.11 or newer. CUDA itself comes
# with pip. CUDA_VISIBLE_DEVICES=0,1 leaves the other GPUs alone. Not yet tried on GPUs.
#
# The same command goes on from the newest checkpoint. On a machine that is taken away and started
# again, this line of `crontab -e` does it: @reboot DIRECTORY/launch/gpu_node.sh --config=...
set -euo pipefail
cd "$(dirname "$0")/.."

[ -d .venv ] || python3 -m venv .venv
.venv/bin/pip install --quiet --editable '.[cuda]'
exec .venv/bin/python -m dmd_jax.main "$@"
