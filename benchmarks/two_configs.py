r"""What two configs cost in FLOPs and in time, on one machine and in turn.

    python benchmarks/two_configs.py --before=configs/dmd.py --before.batch_size=32 \
        --before.generator_every=2 --before.steps=1800

A round is a cycle of steps of each config: one with the generator's update and those without it.
The time of a run is its number of cycles times the mean over all rounds. Compilation, judging and
the report are not included.
"""

import statistics
import time

import jax
from absl import app, flags
from ml_collections import config_flags

from dmd_jax.devices.cores import split_cores
from dmd_jax.training import loop
from dmd_jax.training.cost import cost, si
from dmd_jax.training.run import build

BEFORE = config_flags.DEFINE_config_file("before", None, "The config to compare with.")
CONFIG = config_flags.DEFINE_config_file("config", "configs/dmd.py")
ROUNDS = flags.DEFINE_integer("rounds", 50, "Cycles of each config.")


class Cycle:
    """The steps of a run from one generator's update to the next, called again and again."""

    def __init__(self, config):
        self.run = build(config)
        self.root, self.seconds = loop.root_key(config), []
        with jax.set_mesh(self.run.mesh):
            futures = loop.compile_steps(self.run)
            self.steps = {kind: future.result() for kind, future in futures.items()}
            (self.state, self.frozen), self.batch = self.run.start(), next(self.run.batches(0))

    def __call__(self):
        start = time.perf_counter()
        with jax.set_mesh(self.run.mesh):
            for number in range(self.run.config.generator_every):
                step = self.steps[self.run.updates_generator(number)]
                self.state, metrics = step(self.state, self.frozen, self.batch, self.root)
            jax.block_until_ready(metrics)
        self.seconds.append(time.perf_counter() - start)

    def total(self):
        """(FLOPs, seconds) of the whole run."""
        config = self.run.config
        cycles = config.steps / config.generator_every
        return cost(self.run).run, cycles * statistics.mean(self.seconds)


def main(_):
    configs = {"before": BEFORE.value, "after": CONFIG.value}
    split_cores(min(config.batch_size // config.accumulate for config in configs.values()))
    cycles = {name: Cycle(config) for name, config in configs.items()}
    for _ in range(ROUNDS.value):
        for cycle in cycles.values():
            cycle()
    totals = {name: cycle.total() for name, cycle in cycles.items()}
    for name, (work, seconds) in totals.items():
        print(f"{name:<8}{si(work)}FLOP{seconds:8.1f} s")
    work, seconds = (after / before for before, after in zip(*totals.values(), strict=True))
    print(f"after / before: {work:.3f} of the FLOPs, {seconds:.3f} of the time")


if __name__ == "__main__":
    flags.mark_flag_as_required("before")
    app.run(main)
