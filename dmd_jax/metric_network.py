"""Trains the classifier in whose features quality is measured, and writes its card.

    python -m dmd_jax.metric_network --name=FD-MNIST64 --out=dmd_jax/assets/mnist_metric.safetensors

It learns from the train split alone. The test split is read once, after the last step, for the
accuracy in the card. `--data` names another data set.
"""

import argparse
import shlex
import sys
from pathlib import Path

from dmd_jax.data import load
from dmd_jax.devices.disk import check_writable
from dmd_jax.quality import metric_network


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="*.safetensors; the card is beside")
    parser.add_argument("--data", default="mnist5k", help="data set, as for dmd_jax.data.load")
    parser.add_argument("--data_dir", help="directory of prepared data sets; default: that of TFDS")
    parser.add_argument("--name", help="name of the distance (default: FD-DATA-FEATURES)")
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--batch", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    try:  # what would otherwise fail after the training
        check_writable(args.out.parent)
        train, test = (load(args.data, split, args.data_dir) for split in ("train", "test"))
    except ValueError as error:
        parser.error(str(error))
    card = metric_network.write(
        args.out,
        train,
        test,
        name=args.name,
        command=shlex.join(["python", "-m", "dmd_jax.metric_network", *sys.argv[1:]]),
        steps=args.steps,
        batch=args.batch,
        seed=args.seed,
    )
    print(card)


if __name__ == "__main__":
    main()
