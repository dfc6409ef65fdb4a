#!/usr/bin/env bash
# Trains on every host of one Cloud TPU slice (v4, v5e, v5p, v6e), from the committed state of this
# clone. Asks for the slice, a spot one, where there is none.
#
#     export MOUNT='mkdir -p runs && gcsfuse --implicit-dirs my-bucket runs'
#     launch/tpu_pod.sh NAME ZONE v5litepod-16 --config=configs/dmd.py --workdir='~/runs/dmd'
#
# Assumes: gcloud is logged in; MOUNT, run on every host in its home, mounts the file system of
# --workdir, which all hosts share: a bucket (here gcsfuse must be on the image) or Filestore.
#
# A slice that is taken away is asked for again, and the run goes on from its newest checkpoint. So
# this script has to live as long as the run: start it in tmux, on a machine that stays. In the end
#     gcloud compute tpus queued-resources delete NAME --zone=ZONE --force
# gives the slice back. Not yet tried on TPU hardware.
set -euo pipefail
name=$1 zone=$2 type=$3
shift 3
case $type in
  v6e-*) runtime=v2-alpha-tpuv6e ;;
  v5p-*) runtime=v2-alpha-tpuv5 ;;
  v5litepod-*) runtime=v2-alpha-tpuv5-lite ;;
  v[234]-*) runtime=tpu-ubuntu2204-base ;;
  *) echo "error: $type is no type of slice, such as v5litepod-16: NAME ZONE TYPE FLAGS" >&2 && exit 2 ;;
esac

tpu() { gcloud compute tpus "$@" --zone="$zone" --quiet; }

state() {
  tpu queued-resources describe "$name" --format='value(state.state)' 2> /dev/null || echo NONE
}

# Waits for the slice. Ends the script if it was refused ten times in a row: a wrong zone or type, no
# quota, no login. A network that fails for a minute does not.
acquire() {
  local now refused=0
  while now=$(state) && [ "$now" != ACTIVE ]; do
    echo "$name: $now"
    case $now in
      NONE)
        if tpu queued-resources create "$name" --node-id="$name" --spot \
          --accelerator-type="$type" --runtime-version="$runtime"; then
          refused=0
        else
          [ $((refused += 1)) -lt 10 ] || exit 1
        fi
        ;;
      SUSPENDED) tpu queued-resources delete "$name" --force ;; # it was taken away
      FAILED) exit 1 ;;
    esac
    sleep 30
  done
}

clone=$(mktemp --suffix=.tar.gz)
trap 'rm -f "$clone"' EXIT
git -C "$(dirname "$0")/.." archive --format=tar.gz --output="$clone" HEAD

# --distributed needs no addresses: JAX asks the slice's metadata for them. uv brings a Python, as
# the images have 3.10.
train() {
  tpu tpu-vm scp "$clone" "$name:dmd_jax.tar.gz" --worker=all &&
    tpu tpu-vm ssh "$name" --worker=all --command="
      set -e
      ${MOUNT:-}
      mkdir -p dmd_jax && tar -xzf dmd_jax.tar.gz -C dmd_jax && cd dmd_jax
      python3 -m pip install --quiet --user uv
      python3 -m uv venv --quiet --allow-existing --python=3.12 .venv
      python3 -m uv pip install --quiet --editable '.[tpu,wan]'
      exec .venv/bin/python -m dmd_jax.main --distributed $(printf '%q ' "$@")"
}

while acquire; do
  status=0
  train "$@" || status=$?
  if [ "$status" = 0 ]; then exit; fi
  # 75: stopped and saved. Any other status is an error, unless the slice turns out to be gone.
  if [ "$status" != 75 ]; then
    sleep 120
    if [ "$(state)" = ACTIVE ]; then exit "$status"; fi
  fi
done
