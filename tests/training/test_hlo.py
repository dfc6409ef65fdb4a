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


# S(5) is the memory of the host.
HOST = """HloModule jit_f

ENTRY %main (w: bf16[8,256,1024], m: f32[8,64]) -> f32[8,64] {
  %w = bf16[8,256,1024]{2,1,0:T(8,128)(2,1)S(5)} parameter(0)
  %m = f32[8,64]{1,0:T(8,128)S(5)} parameter(1)
  %zero = s32[] constant(0)
  %dynamic-slice-start = ((bf16[8,256,1024]{2,1,0:T(8,128)(2,1)S(5)}, s32[], s32[], s32[]), bf16[1,256,1024]{2,1,0:T(8,128)(2,1)}, u32[]{:S(2)}) dynamic-slice-start(%w, %zero, %zero, %zero), dynamic_slice_sizes={1,256,1024}
  %dynamic-slice-done = bf16[1,256,1024]{2,1,0:T(8,128)(2,1)} dynamic-slice-done(%dynamic-slice-start)
  %copy-start = (f32[8,64]{1,0:T(8,128)}, f32[8,64]{1,0:T(8,128)S(5)}, u32[]{:S(2)}) copy-start(%m)
  %copy-done = f32[8,64]{1,0:T(8,128)} copy-done(%copy-start)
  %copy-start.1 = (f32[8,64]{1,0:T(8,128)S(5)}, f32[8,64]{1,0:T(8,128)}, u32[]{:S(2)}) copy-start(%copy-done)
  ROOT %copy-done.1 = f32[8,64]{1,0:T(8,128)S(5)} copy-done(%copy-start.1)
}
"""  # noqa: E501


def test_copies_from_and_to_the_memory_of_the_host_are_counted_apart():
    found, layer, moments = traffic(HOST), 256 * 1024 * 2, 8 * 64 * 4
    assert found.host == layer + 2 * moments
    # Each copy is also a part of the traffic of the device's memory; small indices are too.
    assert found.memory == pytest.approx(layer + 2 * moments, rel=1e-3)


def test_what_goes_network_is_counted_apart():
    # Pairs along 'b' of the mesh, and of the reduce-scatter: devices i and i + 4.
    halves = traffic(TPU, {}, [0, 0, 0, 0, 1, 1, 1, 1])
    assert halves.network == 21 * (8 * 64 * 4 + 64 * 4 / 2)
    pairs = traffic(TPU, {}, [0, 1, 0, 1, 0, 1, 0, 1])
    assert pairs.network == 64 * 4


# As the compiler for CUDA writes it: collectives in two halves, several arrays in one, products and
# their epilogues in Triton's fusions, and cuDNN's attention with an empty workspace.
CUDA = """HloModule jit_f, num_partitions=4

%sum (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %add.1 = f32[] add(%a, %b)
}

%product (p0: bf16[64,32], p1: bf16[32,16]) -> bf16[64,16] {
  %p0 = bf16[64,32]{1,0} parameter(0)
  %p1 = bf16[32,16]{1,0} parameter(1)
  %dot = f32[64,16]{1,0} dot(%p0, %p1), lhs_contracting_dims={1}, rhs_contracting_dims={0}, backend_config={"sizes":["16"]}
  ROOT %convert = bf16[64,16]{1,0} convert(%dot)
}

%limit (i: s32[]) -> pred[] {
  %i = s32[] parameter(0)
  %five = s32[] constant(5)
  ROOT %lt = pred[] compare(%i, %five), direction=LT
}

%condition (t.1: (s32[], bf16[64,32], bf16[8,16])) -> pred[] {
  %t.1 = (s32[], bf16[64,32]{1,0}, bf16[8,16]{1,0}) parameter(0)
  %count = s32[] get-tuple-element(%t.1), index=0
  ROOT %loop_compare_fusion = pred[] fusion(%count), kind=kLoop, calls=%limit
}

%body (t: (s32[], bf16[64,32], bf16[8,16])) -> (s32[], bf16[64,32], bf16[8,16]) {
  %t = (s32[], bf16[64,32]{1,0}, bf16[8,16]{1,0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%t), index=0
  %x = bf16[64,32]{1,0} get-tuple-element(%t), index=1
  %w = bf16[8,16]{1,0} get-tuple-element(%t), index=2
  %all-gather-start = (bf16[8,16]{1,0}, bf16[32,16]{1,0}) all-gather-start(%w), channel_id=1, replica_groups=mesh['axis_0'=4,'axis_1'=1] {'axis_0'}, dimensions={0}, use_global_device_ids=true
  %all-gather-done = bf16[32,16]{1,0} all-gather-done(%all-gather-start)
  %gemm_fusion = bf16[64,16]{1,0} fusion(%x, %all-gather-done), kind=kCustom, calls=%product, backend_config={"fusion_backend_config":{"kind":"__triton_nested_gemm_fusion"}}
  ROOT %out = (s32[], bf16[64,32]{1,0}, bf16[8,16]{1,0}) tuple(%i.1, %x, %w)
}

ENTRY %main (x.1: bf16[64,32], w.1: bf16[8,16], q: bf16[1,256,2,64]) -> f32[64] {
  %x.1 = bf16[64,32]{1,0} parameter(0)
  %w.1 = bf16[8,16]{1,0} parameter(1)
  %q = bf16[1,256,2,64]{3,2,1,0} parameter(2)
  %zero = s32[] constant(0)
  %tuple = (s32[], bf16[64,32]{1,0}, bf16[8,16]{1,0}) tuple(%zero, %x.1, %w.1)
  %while = (s32[], bf16[64,32]{1,0}, bf16[8,16]{1,0}) while(%tuple), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"5"},"known_induction_variable":{"tuple_index":"0"}}
  %attention = (bf16[1,2,256,64]{3,1,2,0}, f32[1,2,256]{2,1,0}, u8[0]{0}) custom-call(%q, %q, %q), custom_call_target="__cudnn$fmhaSoftmax", operand_layout_constraints={bf16[1,256,2,64]{3,2,1,0}}
  %first = bf16[64,32]{1,0} get-tuple-element(%while), index=1
  %all-to-all-start = ((bf16[64,32]{1,0}), bf16[64,32]{1,0}) all-to-all-start(%first), channel_id=2, replica_groups=[2,2]<=[4], dimensions={0}
  %all-to-all-done = bf16[64,32]{1,0} all-to-all-done(%all-to-all-start)
  %reduce-scatter-start = ((bf16[64,32]{1,0}, /*index=1*/bf16[8,16]{1,0}), (bf16[16,32]{1,0}, bf16[2,16]{1,0})) reduce-scatter-start(%all-to-all-done, /*index=1*/%w.1), channel_id=3, replica_groups=[1,4]<=[4], dimensions={0}, to_apply=%sum
  %reduce-scatter-done = (bf16[16,32]{1,0}, bf16[2,16]{1,0}) reduce-scatter-done(%reduce-scatter-start)
  %norms = f32[64]{0} constant({...})
  %all-reduce-start = f32[64]{0} all-reduce-start(%norms), channel_id=4, replica_groups={{0,2},{1,3}}, use_global_device_ids=true, to_apply=%sum
  ROOT %all-reduce-done = f32[64]{0} all-reduce-done(%all-reduce-start)
}
"""  # noqa: E501


def test_the_text_of_a_gpus_program_is_read():
    found, x, w = traffic(CUDA), 2 * 64 * 32, 2 * 8 * 16  # bytes
    assert found.sent == {
        "all-gather": 5 * 3 * w,
        "all-to-all": x / 2,
        "reduce-scatter": (x + w) * 3 / 4,
        "all-reduce": 64 * 4,
    }
    loop = 5 * ((w + 4 * w) + (x + 4 * w + 2 * 64 * 16))
    attention = (3 + 1) * 2 * 256 * 2 * 64 + 4 * 256 * 2
    assert found.memory == loop + attention + 2 * x + 5 / 4 * (x + w) + 2 * 64 * 4
    assert not found.unknown_loops


def test_a_ring_leaves_a_node_once_for_all_its_cards():
    # Two nodes of two. Each card sends half of the ring's bytes over the network; the all-reduce is
    # of one card of each node, and the all-to-all stays within.
    found, x, w = traffic(CUDA, {}, [0, 0, 1, 1]), 2 * 64 * 32, 2 * 8 * 16
    assert found.network == 5 * 3 * w / 2 + (x + w) * 3 / 4 / 2 + 64 * 4
    apart = traffic(CUDA, {}, [0, 1, 2, 3])
    assert apart.network == sum(apart.sent.values())


def test_a_pair_that_leaves_its_node_is_found_behind_others():
    text = TPU.replace("{{0,1},{1,0}}", "{{0,1},{1,2},{2,3},{3,0}}")
    within = traffic(text, {}, [0] * 8)
    assert within.network == 0
    sent = within.sent["collective-permute"]
    apart = traffic(text, {}, [0, 0, 1, 1, 1, 1, 1, 1])
    assert apart.network == sent + apart.sent["reduce-scatter"] + apart.sent["all-gather"]


def test_what_is_no_program_is_refused():
    with pytest.raises(ValueError, match="no ENTRY"):
        Program("func.func @main()")
