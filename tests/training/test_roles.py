"""The discriminator as a role: sized by the network that it reads, refused where it is not."""

import jax
import programs
import pytest

from dmd_jax.training.run import build, describe


@pytest.fixture
def config(teacher, data_dir):
    config = programs.config(teacher, data_dir, variant="dmd2")
    config.discriminator.model.blocks = (0,)  # the tiny teacher has one layer
    return config


@pytest.mark.parametrize("features", ["teacher", "fake_score"])
def test_its_heads_have_the_width_of_the_features(config, features):
    config.method.features = features
    run = build(config, jax.devices()[:1])
    assert run.nets["discriminator"].config.dim == run.frozen["teacher"].net.config.dim == 16
    shape = run.state_shape()
    assert shape.nets["discriminator"].heads.project.kernel.shape == (1, 16, 64)
    # 16 x 4 weights of tokens, 16 x 64 values, a layer of 64, a logit, and their biases and norm
    count = 16 * 4 + 4 + 16 * 64 + 64 + 64 * 64 + 64 + 64 + 1 + 32
    assert f"discriminator {count:>13,}   float32" in describe(run)


def test_layers_that_the_network_does_not_have_are_refused(config):
    config.discriminator.model.blocks = (0, 3)
    with pytest.raises(ValueError, match=r"blocks=\(0, 3\) must be below the depth 1 of config\.t"):
        build(config, jax.devices()[:1])


def test_weights_of_a_file_are_refused(config):
    config.discriminator.weights = "teacher"
    with pytest.raises(ValueError, match="its heads are always new"):
        build(config, jax.devices()[:1])


def test_features_of_a_role_that_is_not_there_are_refused(config):
    config.method.features = "teachers"
    with pytest.raises(ValueError, match=r"config\.method\.features='teachers'.*'teacher'"):
        build(config, jax.devices()[:1])
