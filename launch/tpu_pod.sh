#!/usr/bin/env bash
# Trains on every host of one Cloud TPU slice (v4, v5e, v5p, v6e), from the committed state of this
# clone.
#
#     launch/tpu_pod.sh NAME ZONE --config=configs/dmd.py --workdir=/mnt/shared/run
#
# Assumes: gcloud is logged in; the slice NAME exists, with Python 3.11 or newer on its hosts;
# --workdir is a file system that all hosts mount (Filestore, or a bucket by gcsfuse). The same
# command again resumes the run. Not yet tried on TPU hardware.
set -euo pipefail
name=$1 zone=$2
shift 2

clone=$(mktemp --suffix=.tar.gz)
trap 'rm -f "$clone"' EXIT
git -C "$(dirname "$0")/.." archive --format=tar.gz --output="$clone" HEAD
gcloud compute tpus tpu-vm scp "$clone" "$name:dmd_jax.tar.gz" --zone="$zone" --worker=all

# --distributed needs no addresses: JAX asks the slice's metadata for them.
gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=all --command="
  set -e
  mkdir -p dmd_jax && tar -xzf dmd_jax.tar.gz -C dmd_jax && cd dmd_jax
  python3 -m venv .venv && .venv/bin/pip install --quiet --editable '.[tpu]'
  .venv/bin/python -m dmd_jax.main --distributed $(printf '%q ' "$@")"
