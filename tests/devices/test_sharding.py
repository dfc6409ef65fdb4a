"""Meshes and rules; and that eight devices compute what one does."""

import dataclasses
import socket
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import programs
import pytest
from toys import assert_close, exact, tiny_dit, tiny_mlp

from dmd_jax.devices import sharding
from dmd_jax.devices.sharding import P, fit, gather, global_batch, infer, make_mesh
from dmd_jax.diffusion.denoiser import Denoiser
from dmd_jax.methods.dmd import DMD
from dmd_jax.models import dit
from dmd_jax.training.optimizer import AdamW, per_role
from dmd_jax.training.step import init_state, train_step


def test_one_axis_of_a_mesh_may_be_the_rest():
    assert dict(make_mesh().shape) == {"data": 8, "fsdp": 1, "context": 1, "tensor": 1}
    assert dict(make_mesh(data=2, fsdp=-1).shape)["fsdp"] == 4
    assert dict(make_mesh(data=1, devices=jax.devices()[:1]).shape)["data"] == 1


@pytest.mark.parametrize("axes", [{"data": 3}, {"data": 2, "fsdp": 2}, {"fsdp": -1}, {"fsdp": 16}])
def test_a_mesh_that_does_not_fit_the_devices_is_refused(axes):
    with pytest.raises(ValueError, match=r"mesh\(data=.*\) does not fit 8 devices"):
        make_mesh(**axes)


@dataclasses.dataclass(frozen=True)
class FakeDevice:
    """What a mesh asks of a device; JAX gives GPUs a slice_index too, that of their host."""

    platform: str
    device_kind: str
    id: int
    process_index: int
    slice_index: int
    coords: tuple[int, int, int]
    core_on_chip: int = 0


def two_slices(platform, kind):
    """Two slices of 2x2 chips, or two nodes of four GPUs; JAX lists them in any order."""
    places = [(group, row, column) for row in (0, 1) for column in (0, 1) for group in (0, 1)]
    return [
        FakeDevice(platform, kind, 4 * group + 2 * row + column, group, group, (column, row, 0))
        for group, row, column in places
    ]


def test_slices_of_a_tpu_split_data_and_no_other_axis():
    mesh = make_mesh(data=-1, fsdp=2, devices=two_slices("tpu", "TPU v5 lite"))
    assert dict(mesh.shape) == {"data": 4, "fsdp": 2, "context": 1, "tensor": 1}
    found = np.vectorize(lambda device: device.slice_index)(mesh.devices).reshape(4, 2)
    np.testing.assert_array_equal(found, [[0, 0], [0, 0], [1, 1], [1, 1]])
    assert {device.id for device in mesh.devices.flat} == set(range(8))


def test_weights_cannot_be_split_over_slices():
    with pytest.raises(ValueError, match="mesh data=1 does not divide into the 2 slices"):
        make_mesh(data=1, fsdp=8, devices=two_slices("tpu", "TPU v5 lite"))


def test_nodes_of_gpus_are_one_slice():
    """So that weights may be split over them; one after the other, as their batches are."""
    mesh = make_mesh(data=1, fsdp=8, devices=two_slices("gpu", "NVIDIA H100"))
    assert mesh.shape["fsdp"] == 8
    assert [device.id for device in mesh.devices.flat] == list(range(8))


WEIGHTS = {
    "blocks": {"up": {"kernel": jnp.zeros((3, 8, 64)), "bias": jnp.zeros((3, 64))}},
    "head": {"kernel": jnp.zeros((64, 6))},
}
RULES = (
    (r"up/kernel$", P(sharding.WEIGHTS, "tensor")),
    (r"kernel$", P(None, "fsdp")),
    (r"bias$", P()),
)


def test_the_first_rule_that_matches_speaks_of_the_trailing_axes():
    places = infer(WEIGHTS, RULES, make_mesh(data=2, fsdp=2, tensor=2))
    assert places["blocks"]["up"]["kernel"].spec == P(None, sharding.WEIGHTS, "tensor")
    assert places["blocks"]["up"]["bias"].spec == P(None, None)
    assert places["head"]["kernel"].spec == P(None, "fsdp")


def test_a_state_is_placed_by_the_paths_of_its_weights():
    tx = per_role({"generator": AdamW().transform(1)})
    state = init_state({"generator": WEIGHTS}, tx)
    places = infer(state, RULES, make_mesh(data=2, fsdp=4))
    adam = places.opt_state.inner_states["generator"].inner_state.inner_state
    wanted = places.nets["generator"]["blocks"]["up"]["kernel"]
    assert wanted.spec == P(None, sharding.WEIGHTS, "tensor")
    found = [
        place
        for path, place in jax.tree_util.tree_leaves_with_path((adam, places.ema))
        if "up" in jax.tree_util.keystr(path) and "kernel" in jax.tree_util.keystr(path)
    ]
    assert found == [wanted] * 3  # two moments and the average


def test_an_axis_that_does_not_divide_is_left_whole():
    mesh = make_mesh(data=2, fsdp=4)
    assert fit(P("fsdp", "tensor"), (8, 6), mesh) == P("fsdp", "tensor")
    assert fit(P(None, "fsdp"), (64, 6), mesh) == P(None, None)
    assert fit(P("fsdp"), (3, 8), mesh) == P(None, "fsdp")
    assert fit(P("fsdp", "data"), (4,), mesh) == P("data")
    assert fit(P(), (2, 2), mesh) == P(None, None)
    assert fit(P(("data", "fsdp")), (16,), mesh) == P(("data", "fsdp"))
    assert fit(P(("data", "fsdp")), (12,), mesh) == P("data")
    assert fit(P(("data", "fsdp")), (15,), mesh) == P(None)


@pytest.mark.parametrize("axes", [{"context": 8}, {"fsdp": 2, "context": 4}], ids=str)
def test_a_state_is_split_over_context_as_over_fsdp(axes):
    """Weights, moments and averages; each device has as many bytes of them."""
    tx = per_role({"generator": AdamW().transform(1)})
    net = jax.eval_shape(lambda: tiny_dit(0))
    state = jax.eval_shape(lambda net: init_state({"generator": net}, tx), net)

    def parts(mesh):
        places = jax.tree.leaves(infer(state, dit.SHARDING_RULES, mesh))
        shapes = zip(jax.tree.leaves(state), places, strict=True)
        return [place.shard_shape(x.shape) for x, place in shapes]

    found = parts(make_mesh(data=1, **axes))
    assert found == parts(make_mesh(data=1, fsdp=8)) != parts(make_mesh())


def test_a_rule_that_matches_nothing_is_refused():
    rules = (*RULES, (r"nose/kernel$", P()), (r"head/kernel$", P()))
    with pytest.raises(ValueError, match=r"match no weight.*nose/kernel\$.*head/kernel\$"):
        infer(WEIGHTS, rules, make_mesh())


def test_a_large_array_without_a_rule_is_refused_and_a_small_one_is_not():
    tree = WEIGHTS | {
        "table": jax.ShapeDtypeStruct((2**8, 2**8 + 1), jnp.float32),
        "gain": WEIGHTS["head"]["kernel"],
    }
    with pytest.raises(ValueError, match=r"no sharding rule matches.*table \(256, 257\)$"):
        infer(tree, RULES, make_mesh())
    tree["table"] = jax.ShapeDtypeStruct((2**8, 2**8), jnp.float32)
    assert infer(tree, RULES, make_mesh())["table"].spec == P(None, None)


def test_no_part_of_a_sequence_crosses_a_border():
    """Of frames of 6 tokens, or of devices with a quarter of all tokens."""
    assert sharding.common_part(48, 6) == 6  # one device
    with jax.set_mesh(make_mesh(data=2, context=4)):
        assert sharding.common_part(48, 6) == 6
        assert sharding.common_part(36, 6) == 3
        assert sharding.common_part(42, 6) == 1  # four devices do not divide it


def test_without_a_mesh_the_constraints_are_not_there():
    x = jnp.ones((3, 5, 2))  # would not divide by anything
    tree = {"x": x}
    assert sharding.shard_batch(tree)["x"] is x
    assert sharding.shard_tokens(x) is x
    assert sharding.tokens_to_heads(x[None]).shape == (1, *x.shape)
    assert gather(tree, RULES)["x"] is x
    np.testing.assert_array_equal(global_batch({"x": np.ones(3)})["x"], 1.0)


def test_the_constraints_place_what_they_name():
    def place(tree):
        tokens = sharding.shard_tokens(tree["tokens"])
        return sharding.shard_batch(tree["batch"]), tokens, gather(tree["layer"], RULES)

    adapted = {"kernel": jnp.ones((8, 6)), "B": {"kernel": jnp.ones((4, 16))}}
    tree = {
        "batch": jnp.ones((8, 3)),
        "tokens": jnp.ones((8, 4, 3)),
        "layer": {"up": adapted, "down": {"kernel": jnp.ones((8, 7))}},
    }
    with jax.set_mesh(make_mesh(data=1, fsdp=2, context=2, tensor=2)):
        batch, tokens, layer = jax.jit(place)(tree)
    assert batch.sharding.shard_shape(batch.shape) == (4, 3)
    assert tokens.sharding.shard_shape(tokens.shape) == (4, 2, 3)
    # Whole over fsdp and context, split over tensor; what tensor does not divide stays whole.
    up, down = layer["up"]["kernel"], layer["down"]["kernel"]
    assert up.sharding.shard_shape(up.shape) == (8, 3)
    assert down.sharding.shard_shape(down.shape) == (8, 7)
    factor = layer["up"]["B"]["kernel"]  # kept over tensor, fsdp and context
    assert factor.sharding.shard_shape(factor.shape) == (4, 8)
    with jax.set_mesh(make_mesh(data=4, tensor=2)):
        odd = jax.jit(lambda layer: gather(layer, RULES))({"up": {"kernel": jnp.ones((8, 7))}})
    assert odd["up"]["kernel"].shape == (8, 7)


def test_a_hosts_rows_become_a_global_array():
    rows = np.arange(16.0).reshape(8, 2)
    with jax.set_mesh(make_mesh(data=2, fsdp=4)):
        result = global_batch({"x": rows})["x"]
    assert result.sharding.shard_shape(result.shape) == (1, 2)
    np.testing.assert_array_equal(result, rows)


METHOD = DMD((2,), times=(1.0,))
ROLES = ("generator", "fake_score")
TX = per_role({role: AdamW(1e-2, weight_decay=0.1).transform(10) for role in ROLES})
MLP_RULES = ((r"(second|last)/kernel$", P("fsdp", None)), (r"first/kernel$", P(None, "fsdp")))


def init():
    """A state that is a pure function of nothing, to be born where it lives."""
    nets = {"generator": Denoiser(tiny_mlp(0)), "fake_score": Denoiser(tiny_mlp(1))}
    return init_state(nets, TX)


def train(axes):
    """Metrics of three steps on a mesh, and the state after them."""
    mesh = make_mesh(**axes)
    whole = jax.sharding.NamedSharding(mesh, P())
    frozen = {"teacher": exact([[0.5, 0.0]], 0.7)}
    with jax.set_mesh(mesh):
        places = infer(jax.eval_shape(init), MLP_RULES, mesh)
        state = jax.jit(init, out_shardings=places)()
        kernel = state.nets["generator"].net.second.kernel[...]
        assert kernel.sharding.shard_shape(kernel.shape) == (16 // mesh.shape["fsdp"], 16)
        batch = global_batch({name: np.zeros((16, 1), np.float32) for name in ("cond", "uncond")})
        step = jax.jit(
            lambda state, frozen, batch: train_step(
                state,
                frozen,
                batch,
                jax.random.key(0),
                method=METHOD,
                tx=TX,
                update_generator=True,
            ),
            out_shardings=(places, whole),
            donate_argnums=0,
        )
        found = []
        for _ in range(3):
            state, metrics = step(state, jax.device_put(frozen, whole), batch)
            found.append(metrics)
        assert step._cache_size() == 1
        assert [x.sharding for x in jax.tree.leaves(state)] == jax.tree.leaves(places)
    return jax.device_get((found, state))


@pytest.fixture(scope="module")
def one_device():
    return train({"data": 1, "devices": jax.devices()[:1]})


@pytest.mark.parametrize("axes", [{"data": 8}, {"data": 1, "fsdp": 8}, {"data": 2, "fsdp": 4}])
def test_eight_devices_train_as_one_does(axes, one_device):
    """Losses, gradients (by their norms and moments) and weights, to the rounding of sums."""
    found, state = train(axes)
    assert_close(found, one_device[0], rtol=1e-4, atol=1e-5)
    # Adam divides by the gradient's size: a weight whose gradient is rounding may move either way.
    assert_close(state, one_device[1], rtol=1e-3, atol=1e-4)


HOST = """
import sys
import jax
jax.distributed.initialize(f"localhost:{sys.argv[2]}", 2, int(sys.argv[1]))
import numpy as np
from dmd_jax.devices import sharding
from dmd_jax.devices.processes import from_first, together
from dmd_jax.data import Batches


class Rows:
    def __len__(self):
        return 1000

    def examples(self, rows):
        return {"cond": np.array(rows, np.int32)}


whole = Batches(Rows(), 8, seed=0)[3]["cond"]
for axes in dict(data=4), dict(data=2, context=2), dict(data=1, context=4), dict(fsdp=4, data=1):
    mesh = sharding.make_mesh(**axes)
    index, count = sharding.batch_part(mesh, 8)
    part = Batches(Rows(), 8, seed=0, process_index=index, process_count=count)[3]
    with jax.set_mesh(mesh):
        cond = sharding.global_batch(part)["cond"]
        fetched = sharding.fetch(cond)
    if jax.process_index():
        assert fetched is None
    else:
        np.testing.assert_array_equal(fetched, whole)
    assert cond.shape == whole.shape, cond.shape
    for shard in cond.addressable_shards:
        np.testing.assert_array_equal(shard.data, whole[shard.index])
first = jax.process_index() == 0
assert from_first(lambda: "on process 0" if first else 1 / 0) == "on process 0"
assert together(lambda: jax.process_index()) == jax.process_index()
try:
    together(lambda: 1 / 0 if first else "fine")
except (ZeroDivisionError if first else RuntimeError) as error:
    assert first or "process 0 of the job failed" in str(error), error
else:
    raise AssertionError("a process did not learn of the failure")
print("the same batch on every mesh")
"""


@pytest.mark.slow
def test_two_hosts_make_one_batch_also_where_they_share_its_rows():
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    with ThreadPoolExecutor() as pool:
        run = partial(programs.python, "-c", HOST, **flags)
        hosts = list(pool.map(lambda host: run(host, port), (0, 1)))
    for host in hosts:
        assert "the same batch on every mesh" in host.stdout, host.stderr[-3000:]
