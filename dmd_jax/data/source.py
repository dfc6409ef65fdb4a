"""What training reads from a data source. Imports only numpy."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np


class Source(Protocol):
    """Training data, read at random positions: `Images`, `Prompts`, or a class of the user.

    A class that a config names, `config.data = dict(cls=Prompts, ...)`, also has `open()`, which
    opens its files and raises ValueError or FileNotFoundError where they cannot be used.

    Attributes:
        name: of the data, for titles.
        sample_shape: shape of one sample of a generator.
        model_fields: fields of a new network's config that follow from the data.
        notes: JSON values for the header of an exported network.
    """

    name: str
    sample_shape: tuple[int, ...]
    model_fields: Mapping[str, Any]
    notes: Mapping[str, Any]

    def __len__(self) -> int:
        """Number of examples."""
        ...

    def examples(self, rows: Sequence[int]) -> dict[str, np.ndarray]:
        """{"data", "cond", "uncond"}, each [n, ...], of n rows."""
        ...

    def conditions(self, rows: Sequence[int]) -> dict[str, np.ndarray]:
        """`examples` without "data", which is not read."""
        ...

    def require_fit(self, what: str, model: Any) -> None:
        """Raises ValueError where the network of config `model` does not fit the data.

        Args:
            what: path of the network in the config, for the message.
            model: config of the network.
        """
        ...
