"""Cores as devices: how many for a batch, and what the user has set."""

import os
import types

import jax
import pytest

from dmd_jax.devices import cores, sharding


@pytest.fixture
def divided(monkeypatch):
    """`split_cores` on a machine of so many usable cores: the number of devices that it sets."""

    def divided(usable, batch, *, by_user=-1, **how):
        config = types.SimpleNamespace(jax_num_cpu_devices=by_user)
        config.update = lambda name, value: setattr(config, name, value)
        monkeypatch.setattr(cores.jax, "config", config)
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(usable)), raising=False)
        monkeypatch.setattr(os, "cpu_count", lambda: 64)
        cores.split_cores(batch, **how)
        return config.jax_num_cpu_devices

    monkeypatch.delenv("XLA_FLAGS", raising=False)
    return divided


@pytest.mark.parametrize(
    "usable, batch, devices",
    [(1, 32, 1), (2, 32, 2), (6, 32, 4), (64, 16, 2), (64, 8, 1), (3, 27, 3), (2, 1, 1)],
)
def test_devices_get_equal_parts_of_eight_samples_or_more(divided, usable, batch, devices):
    assert divided(usable, batch) == devices


def test_a_batch_that_is_padded_needs_no_divisor(divided):
    assert divided(4, 250, even=False) == 4
    assert divided(4, 20, even=False) == 2


@pytest.mark.parametrize(
    "mesh, devices", [((1,), 1), ((2,), 2), ((2, 3), 6), ((-1, 2), 4), ((-1, 3), 3)], ids=str
)
def test_a_stated_mesh_decides_and_a_free_axis_takes_the_cores_that_are_left(
    divided, mesh, devices
):
    assert divided(4, 48, mesh=mesh) == devices


def test_cores_outside_the_affinity_of_the_process_are_not_counted(divided):
    assert divided(1, 250) == 1  # of 64


def test_the_number_that_the_user_set_stays(divided, monkeypatch):
    assert divided(2, 32, by_user=5) == 5
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=3")
    assert divided(2, 32) == -1


@pytest.mark.parametrize("batch, devices", [(250, 8), (20, 2), (15, 0), (1, 0)])
def test_a_mesh_is_set_over_as_many_devices_as_the_batch_fills(batch, devices):
    assert len(jax.devices()) == 8
    with cores.shared(batch):
        found = jax.sharding.get_abstract_mesh().shape
        assert found.get("data", 0) == devices
        assert sharding.even_batch(batch) % max(devices, 1) == 0
    assert jax.sharding.get_abstract_mesh().empty
