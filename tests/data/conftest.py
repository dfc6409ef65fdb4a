"""The embedded data, prepared once for the whole folder."""

import pytest

from dmd_jax import data


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    """A data directory in which 'mnist5k' stands prepared."""
    directory = str(tmp_path_factory.mktemp("tfds"))
    data.load("mnist5k", "train", directory)
    return directory
