"""What a compiled program moves, against what it must."""

import hlo
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

N = 1024


def moved(function, *args):
    return hlo.moved(jax.jit(function).lower(*args).compile().as_text())


def on_devices(shape, *axes):
    mesh = Mesh(np.array(jax.devices()[:8]), ("data",))
    sharding = NamedSharding(mesh, P(*axes))
    return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)


def test_elementwise_operations_read_and_write_once():
    x = jax.ShapeDtypeStruct((N,), jnp.float32)
    assert moved(lambda x: jnp.sin(2 * x + 1), x).memory == 2 * 4 * N
    assert moved(lambda x, y: x * y, x, x).memory == 3 * 4 * N


def test_a_sum_over_devices_is_one_reduction():
    found = moved(lambda x: x.sum(axis=0), on_devices((8, N), "data"))
    assert found.collectives == {"all-reduce": 4 * N}
    assert found.counts == {"all-reduce": 1}


def test_gathers_are_their_results():
    def whole(x):
        return lax.with_sharding_constraint(x, NamedSharding(mesh, P()))

    x = on_devices((8, N), "data")
    mesh = x.sharding.mesh
    text = jax.jit(whole).lower(x).compile().as_text()
    assert hlo.moved(text).collectives == {"all-gather": 4 * 8 * N}
    assert hlo.largest_gather(text) == 4 * 8 * N
    assert hlo.largest_gather("ENTRY %main (x: f32[]) -> f32[] {\n}\n") == 0


def test_loops_count_as_often_as_they_turn():
    def loop(x):
        def turn(total, _):
            return total + jnp.sin(total[None] + x).sum(axis=0), None

        return lax.scan(turn, jnp.zeros(N), None, length=5)[0]

    found = moved(loop, on_devices((8, N), "data"))
    assert found.collectives == {"all-reduce": 5 * 4 * N}
    assert found.counts == {"all-reduce": 5}


def test_a_loop_reads_of_a_stack_one_part_a_turn():
    def loop(stack, x):
        def turn(x, part):
            return jnp.sin(x + part), None

        return lax.scan(turn, x, stack)[0]

    turns = 6
    stack = jax.ShapeDtypeStruct((turns, N), jnp.float32)
    x = jax.ShapeDtypeStruct((N,), jnp.float32)
    found = moved(loop, stack, x).memory
    # At least the part, the sum before and the sum after; and copies at the ends.
    assert turns * 3 * 4 * N <= found <= (turns * 3 + 8) * 4 * N


def test_of_a_condition_the_costlier_branch_counts():
    def either(choice, x):
        return lax.cond(choice, lambda x: lax.sort(jnp.sin(x)), lambda x: x, x)

    x = jax.ShapeDtypeStruct((N,), jnp.float32)
    found = moved(either, jax.ShapeDtypeStruct((), bool), x).memory
    assert 4 * 4 * N <= found <= 8 * 4 * N


TEXT = """HloModule written_by_hand

%step (p: (s32[], f32[64])) -> (s32[], f32[64]) {
  %p = (s32[], f32[64]{0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %x = f32[64]{0} get-tuple-element(%p), index=1
  %sum-start = (f32[64]{0}, f32[64]{0}) all-gather-start(%x), channel_id=1
  %sum-done = f32[64]{0} all-gather-done(%sum-start)
  ROOT %t = (s32[], f32[64]{0}) tuple(%i, %sum-done)
}

%less (p: (s32[], f32[64])) -> pred[] {
  %p = (s32[], f32[64]{0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %n = s32[] constant(3)
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}

ENTRY %main (x: f32[64], c: s4[128]) -> f32[64] {
  %x = f32[64]{0} parameter(0)
  %c = s4[128]{0:T(128)E(4)} parameter(1)
  %zero = s32[] constant(0)
  %t = (s32[], f32[64]{0}) tuple(%zero, %x)
  %w = (s32[], /*index=1*/f32[64]{0}) while(%t), condition=%less, body=%step
  %near = s8[128]{0:T(128)S(1)} convert(%c)
  %one = f32[64]{0} all-reduce(%x), channel_id=7, to_apply=%add
  %again = f32[64]{0} all-reduce(%x), channel_id=7, to_apply=%add
  ROOT %y = f32[64]{0} get-tuple-element(%w), index=1
}
"""


def test_text_written_by_hand():
    found = hlo.moved(TEXT)
    # Of one channel only once; of a start only the result.
    assert found.collectives == {"all-gather": 3 * 256, "all-reduce": 256}
    assert found.counts == {"all-gather": 3, "all-reduce": 1}
    # Four bits are half a byte, and what is on the chip is not in memory.
    without = TEXT.replace("  %near = s8[128]{0:T(128)S(1)} convert(%c)\n", "")
    assert found.memory - hlo.moved(without).memory == 64


def test_prefetching_reads_once():
    lines = """  %slow = f32[64]{0} copy(%x)
  %far = (f32[64]{0}, f32[64]{0:S(1)}, u32[]) copy-start(%x)
  %part = ((f32[64]{0}), f32[16]{0:S(1)}, u32[]) slice-start(%x), slice={[0:16]}
  %buffer = f32[64]{0} custom-call(), custom_call_target="AllocateBuffer"
"""
    more = TEXT.replace("  %zero = ", lines + "  %zero = ")
    # A copy reads and writes; into the memory of the chip it only reads.
    expected = 2 * 256 + 256 + 64
    assert hlo.moved(more).memory - hlo.moved(TEXT).memory == expected


UPDATE = """HloModule written_by_hand

%inside (p: f32[8,64], u: f32[64], i: s32[]) -> (f32[8,64], f32[1,64]) {
  %p = f32[8,64]{1,0} parameter(0)
  %u = f32[64]{0} parameter(1)
  %i = s32[] parameter(2)
  %zero = s32[] constant(0)
  %row = f32[1,64]{1,0} bitcast(%u)
  %near = bf16[8,64]{1,0} convert(%p)
  %cut = bf16[1,64]{1,0} dynamic-slice(%near, %i, %zero), dynamic_slice_sizes={1,64}
  %wide = f32[1,64]{1,0} convert(%cut)
  %new = f32[8,64]{1,0} dynamic-update-slice(%p, %row, %i, %zero)
  ROOT %t = (f32[8,64]{1,0}, f32[1,64]{1,0}) tuple(%new, %wide)
}

ENTRY %main (p: f32[8,64], u: f32[64], i: s32[]) -> (f32[8,64], f32[1,64]) {
  %p = f32[8,64]{1,0} parameter(0)
  %u = f32[64]{0} parameter(1)
  %i = s32[]{:S(6)} parameter(2)
  ROOT %f = (f32[8,64]{1,0}, f32[1,64]{1,0}) fusion(%p, %u, %i), calls=%inside
}
"""


def test_a_fusion_moves_what_it_slices_and_updates():
    # Row of the stack, new row; row in the stack, row cut out.
    assert hlo.moved(UPDATE).memory == 4 * 256
    whole = UPDATE.replace("tuple(%new, %wide)", "tuple(%p, %wide)")
    assert hlo.moved(whole).memory == 8 * 256 + 256 + 8 * 256 + 256


def test_what_cannot_be_read_is_said():
    with pytest.raises(ValueError, match="`text` must be HLO with an entry"):
        hlo.moved("nothing")
    endless = TEXT.replace("direction=LT", "direction=NE")
    with pytest.raises(ValueError, match=r"must have loops that count up .* got w"):
        hlo.moved(endless)


def test_a_fusion_inside_of_one_hands_on_what_it_reads():
    text = """
%inner (p: bf16[8,128]) -> bf16[8,128] {
  %p = bf16[8,128]{1,0} parameter(0)
  ROOT %b = bf16[8,128]{1,0} bitcast(%p)
}

%outer (q: bf16[8,128], r: bf16[128,128]) -> f32[8,128] {
  %q = bf16[8,128]{1,0} parameter(0)
  %r = bf16[128,128]{1,0} parameter(1)
  %f = bf16[8,128]{1,0} fusion(%q), kind=kLoop, calls=%inner
  ROOT %c = f32[8,128]{1,0} convolution(%f, %r), dim_labels=bf_io->bf
}

ENTRY %main (x: bf16[8,128], w: bf16[128,128]) -> f32[8,128] {
  %x = bf16[8,128]{1,0} parameter(0)
  %w = bf16[128,128]{1,0} parameter(1)
  ROOT %out = f32[8,128]{1,0} fusion(%x, %w), kind=kOutput, calls=%outer
}
"""
    assert hlo.moved(text).memory == 2 * 8 * 128 + 2 * 128 * 128 + 4 * 8 * 128
