"""A run: its config, its loop and step, and the files that it writes.

run, roles                  a config becomes a `Run`; its networks by role
checks, description         what is refused of a config; what a dry run says of a run
memory                      int8, and what is kept in the memory of the host
adapters                    roles that train LoRA adapters on a shared base
loop                        `train`: start or resume, steps, saves, judgements, exports, report
step                        `train_step`, pure: gradients, one update, averages
optimizer                   AdamW, Muon and your own, one for each role
checkpoints, checkpoint     the checkpoints of a run; the format of one
configuration               defaults, checks and differences of configs
writers, health, alarms     the log; symptoms of divergence; warnings before it
preemption, profiling       signals; traces
cost, flops                 FLOPs of a run, and of a traced function
plan, search                what a run needs on devices that are not here, and which mesh is best
topologies, gpus, hlo       such devices and their chips; bytes that a compiled program moves

Imports the rooms below.
"""
