"""Bytes read from a program's text are those worked out by hand."""

import jax
import jax.numpy as jnp
import pytest

from dmd_jax.devices import sharding
from dmd_jax.training.hlo import Program

DEPTH, B, D, DEVICES = 5, 32, 64, 4


def traffic(text, *args):
    return Program(text, *args).traffic()


def shape(*axes):
    return jax.ShapeDtypeStruct(axes, jnp.float32)


def test_a_product_reads_its_operands_and_writes_its_result():
    compiled = jax.jit(jnp.matmul).lower(shape(128, 64), shape(64, 256)).compile()
    assert traffic(compiled.as_text()).memory == 4 * (128 * 64 + 64 * 256 + 128 * 256)


def layers(weights, x):
    """A scan over layers whose weights are gathered one at a time."""

    def layer(x, weight):
        return jnp.tanh(x @ jax.lax.with_sharding_constraint(weight, jax.P())), None

    return jax.lax.scan(layer, x, weights)[0]


def test_the_layers_of_a_scan_gather_all_weights_once():
    mesh = sharding.make_mesh(data=1, fsdp=DEVICES, devices=jax.devices()[:DEVICES])

    def placed(*spec):
        return jax.NamedSharding(mesh, jax.P(*spec))

    weights = jax.ShapeDtypeStruct((DEPTH, D, D), jnp.float32, sharding=placed(None, "fsdp"))
    x = jax.ShapeDtypeStruct((B, D), jnp.float32, sharding=placed("fsdp"))
    with jax.set_mesh(mesh):
        compiled = jax.jit(layers).lower(weights, x).compile()
    found = traffic(compiled.as_text())
    received = DEPTH * D * D * 4 * (DEVICES - 1) / DEVICES
    assert found.sent == {"all-gather": received} and not found.unknown_loops


@pytest.mark.parametrize("bounds", [lambda n: (0, n), lambda n: (n, 11)], ids=["end", "start"])
def test_a_loop_of_traced_length_takes_the_expected_number(bounds):
    def loop(number, x, w):
        return jax.lax.fori_loop(*bounds(number), lambda _, x: x @ w, x)

    length = jax.ShapeDtypeStruct((), jnp.int32)
    text = jax.jit(loop).lower(length, shape(D, D), shape(D, D)).compile().as_text()
    assert traffic(text).unknown_loops == 1
    by_trips = [traffic(text, {"": trips}).memory for trips in (1, 11)]
    assert by_trips[1] - by_trips[0] >= 10 * 3 * 4 * D * D


# As a TPU's compiler writes it: arrays with S(1) lie in its fast memory, the limit of a loop comes
# in from outside, and an all-gather beside other work has copies that wait for it.
TPU = """HloModule jit_f, num_partitions=8

%start (p: f32[8,64]) -> (f32[8,64], f32[16,64]) {
  %p = f32[8,64]{1,0:T(8,128)} parameter(0)
  %all-gather.1 = f32[16,64]{1,0} all-gather(%p), channel_id=1, replica_groups=mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'b'}, dimensions={0}, backend_config={"flag_start":"-1"}
  ROOT %custom-call.1 = (f32[8,64]{1,0}, f32[16,64]{1,0}) custom-call(%all-gather.1), custom_call_target="AsyncCollectiveStart"
}

%done (p: f32[8,64]) -> f32[16,64] {
  %p = f32[8,64]{1,0:T(8,128)} parameter(0)
  %all-gather.2 = f32[16,64]{1,0} all-gather(%p), channel_id=1, replica_groups=mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'b'}, dimensions={0}, backend_config={"flag_start":"2"}
  ROOT %custom-call.2 = f32[16,64]{1,0:S(1)} custom-call(%all-gather.2), custom_call_target="AsyncCollectiveDone"
}

%all-reduce-scatter (q: f32[64]) -> f32[32] {
  %q = f32[64]{0} parameter(0)
  %all-reduce.1 = f32[64]{0} all-reduce(%q), channel_id=2, replica_groups=[4,2]<=[2,4]T(1,0), to_apply=%add
  ROOT %slice = f32[32]{0} slice(%all-reduce.1), slice={[0:32]}
}

%body (t: (s32[], s32[], f32[64], f32[8,64])) -> (s32[], s32[], f32[64], f32[8,64]) {
  %t = (s32[], s32[], f32[64]{0:S(1)}, f32[8,64]{1,0:S(1)}) parameter(0)
  %i = s32[] get-tuple-element(%t), index=0
  %n = s32[] get-tuple-element(%t), index=1
  %v = f32[64]{0:S(1)} get-tuple-element(%t), index=2
  %w = f32[8,64]{1,0:S(1)} get-tuple-element(%t), index=3
  %first = (f32[8,64]{1,0:S(1)}, f32[16,64]{1,0:S(1)}) fusion(%w), kind=kCustom, calls=%start
  %second = f32[16,64]{1,0:S(1)} fusion(%w), kind=kCustom, calls=%done
  %third = f32[32]{0:S(1)} fusion(%v), kind=kCustom, calls=%all-reduce-scatter
  ROOT %out = (s32[], s32[], f32[64]{0}, f32[8,64]{1,0}) tuple(%i, %n, %v, %w)
}

%condition (t.1: (s32[], s32[], f32[64], f32[8,64])) -> pred[] {
  %t.1 = (s32[], s32[], f32[64]{0:S(1)}, f32[8,64]{1,0:S(1)}) parameter(0)
  %limit = s32[] get-tuple-element(%t.1), index=1
  %count = s32[] get-tuple-element(%t.1), index=0
  ROOT %lt = pred[] compare(%count, %limit), direction=LT
}

%outer-body (o: (s32[], s32[], f32[64], f32[8,64])) -> (s32[], s32[], f32[64], f32[8,64]) {
  %o = (s32[], s32[], f32[64]{0}, f32[8,64]{1,0:S(1)}) parameter(0)
  %seven.1 = s32[] get-tuple-element(%o), index=1
  %v.1 = f32[64]{0:S(1)} get-tuple-element(%o), index=2
  %w.1 = f32[8,64]{1,0:S(1)} get-tuple-element(%o), index=3
  %zero.1 = s32[] constant(0)
  %inner = (s32[], s32[], f32[64]{0:S(1)}, f32[8,64]{1,0:S(1)}) tuple(%zero.1, %seven.1, %v.1, %w.1)
  ROOT %while.1 = (s32[], s32[], f32[64]{0:S(1)}, f32[8,64]{1,0:S(1)}) while(%inner), condition=%condition, body=%body
}

%outer-condition (t.2: (s32[], s32[], f32[64], f32[8,64])) -> pred[] {
  %t.2 = (s32[], s32[], f32[64]{0}, f32[8,64]{1,0:S(1)}) parameter(0)
  %count.2 = s32[] get-tuple-element(%t.2), index=0
  %three = s32[] constant(3)
  ROOT %lt.2 = pred[] compare(%count.2, %three), direction=LT
}

ENTRY %main (a: f32[64], b: f32[8,64]) -> f32[64] {
  %a = f32[64]{0} parameter(0)
  %b = f32[8,64]{1,0} parameter(1)
  %zero = s32[] constant(0)
  %seven = s32[] constant(7)
  %copy-start = (f32[8,64]{1,0:S(1)}, f32[8,64]{1,0}, u32[]{:S(2)}) copy-start(%b)
  %copy-done = f32[8,64]{1,0:S(1)} copy-done(%copy-start)
  %first.1 = (s32[], s32[], f32[64]{0}, f32[8,64]{1,0:S(1)}) tuple(%zero, %seven, %a, %copy-done)
  %while = (s32[], s32[], f32[64]{0}, f32[8,64]{1,0:S(1)}) while(%first.1), condition=%outer-condition, body=%outer-body
  %kernel = f32[64]{0} custom-call(%a), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"block": 128
}}
  ROOT %permuted = f32[64]{0} collective-permute(%kernel), channel_id=3, source_target_pairs={{0,1},{1,0}}
}
"""  # noqa: E501


def test_the_text_of_a_tpus_program_is_read():
    # Three turns of seven each, in pairs. In the memory: the copy, the kernel, the permutation.
    found = traffic(TPU)
    assert found.sent == {
        "all-gather": 21 * 8 * 64 * 4,
        "reduce-scatter": 21 * 64 * 4 / 2,
        "collective-permute": 64 * 4,
    }
    assert found.memory == 8 * 64 * 4 + 2 * 2 * 64 * 4
    assert not found.unknown_loops


def test_what_goes_between_slices_is_counted_apart():
    # Pairs along 'b' of the mesh, and of the reduce-scatter: devices i and i + 4.
    halves = traffic(TPU, {}, [0, 0, 0, 0, 1, 1, 1, 1])
    assert halves.between_slices == 21 * (8 * 64 * 4 + 64 * 4 / 2)
    pairs = traffic(TPU, {}, [0, 1, 0, 1, 0, 1, 0, 1])
    assert pairs.between_slices == 64 * 4


def test_what_is_no_program_is_refused():
    with pytest.raises(ValueError, match="no ENTRY"):
        Program("func.func @main()")
