#!/usr/bin/env bash
# Trains on a TPU slice of Google Kubernetes Engine through XPK, which writes the JobSet itself.
#
#     launch/gke_xpk.sh NAME CLUSTER v5litepod-16 IMAGE --config=configs/dmd.py --workdir=/runs/dmd
#
# Assumes: `xpk cluster create` has made the cluster; IMAGE is a container with this clone in
# /dmd_jax and `pip install -e '.[tpu]'` done; `xpk storage attach ... --mount-point=/runs
# --auto-mount=true` has attached a volume that all hosts write to (Filestore or a bucket).
#
# A preempted job starts again and goes on from its newest checkpoint. XPK restarts for the exit
# codes 42 and 127 to 255; 75 is that of a run that was stopped and saved. An error (1) ends it.
# Not yet tried on TPU hardware.
set -euo pipefail
name=$1 cluster=$2 type=$3 image=$4
shift 4

# exec: XPK sends SIGTERM to the shell of the command, which has to be the program itself.
xpk workload create --workload="$name" --cluster="$cluster" --tpu-type="$type" \
  --docker-image="$image" --max-restarts=100 --restart-on-exit-codes=75 \
  --termination-grace-period-seconds=120 \
  --command="cd /dmd_jax && exec python -m dmd_jax.main --distributed $(printf '%q ' "$@")"
