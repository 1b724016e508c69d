"""Traffic read from the text of a program: a written one and a real one."""

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import numpy as np
import pytest

from hardware import hlo

# In XLA's format: a loop of 5 turns whose body has an asynchronous gather and a
# sum in a fusion; TPU layouts with memory on the chip, S(1); a kernel's
# metadata over several lines.
_TEXT = """HloModule jit_f, is_scheduled=true

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(%x, %y)
}

%all-reduce-scatter.1 (input: f32[64]) -> f32[16] {
  %input = f32[64]{0:T(256)} parameter(0)
  %all-reduce.9 = f32[64]{0:T(256)} all-reduce(%input), replica_groups=[2,4]<=[8], to_apply=%add
  %zero = s32[] constant(0)
  ROOT %part = f32[16]{0:T(256)} dynamic-slice(%all-reduce.9, %zero), dynamic_slice_sizes={16}
}

%slicing (stack: f32[5,64], i: s32[]) -> f32[64] {
  %stack = f32[5,64]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %zero.2 = s32[] constant(0)
  %row = f32[1,64]{1,0} dynamic-slice(%stack, %i, %zero.2), dynamic_slice_sizes={1,64}
  ROOT %flat = f32[64]{0} bitcast(%row)
}

%body (state: (s32[], f32[16], f32[5,64])) -> (s32[], f32[16], f32[5,64]) {
  %state = (s32[], f32[16]{0}, f32[5,64]{1,0}) parameter(0)
  %step = s32[] get-tuple-element(%state), index=0
  %mine = f32[16]{0} get-tuple-element(%state), index=1
  %stack.1 = f32[5,64]{1,0} get-tuple-element(%state), index=2
  %taken = f32[64]{0:T(256)S(1)} fusion(%stack.1, %step), kind=kLoop, calls=%slicing
  %all-gather-start.1 = (f32[16]{0}, f32[64]{0}) all-gather-start(%mine), replica_groups=mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'a'}, dimensions={0}
  %all-gather-done.1 = f32[64]{0} all-gather-done(%all-gather-start.1)
  %kernel = f32[64]{0} custom-call(%all-gather-done.1), custom_call_target="k", backend_config={"a":"
}} ", "b":1}, metadata={}
  %scattered = f32[16]{0} fusion(%kernel), kind=kCustom, calls=%all-reduce-scatter.1
  %one = s32[] constant(1)
  %next = s32[] add(%step, %one)
  ROOT %out = (s32[], f32[16]{0}, f32[5,64]{1,0}) tuple(%next, %scattered, %stack.1)
}

%condition (state.1: (s32[], f32[16], f32[5,64])) -> pred[] {
  %state.1 = (s32[], f32[16]{0}, f32[5,64]{1,0}) parameter(0)
  %count = s32[]{:T(128)} get-tuple-element(%state.1), index=0
  %limit = s32[]{:T(128)} constant(5)
  ROOT %lt = pred[] compare(%count, %limit), direction=LT
}

ENTRY %main (p: f32[16], q: f32[5,64]) -> f32[16] {
  %p = f32[16]{0} parameter(0)
  %q = f32[5,64]{1,0} parameter(1)
  %start = s32[] constant(0)
  %init = (s32[], f32[16]{0}, /*index=2*/f32[5,64]{1,0}) tuple(%start, %p, %q)
  %loop = (s32[], f32[16]{0}, f32[5,64]{1,0}) while(%init), condition=%condition, body=%body
  ROOT %result = f32[16]{0} get-tuple-element(%loop), index=1
}
"""  # noqa: E501


def test_loops_async_starts_and_fused_sums_are_counted():
  traffic = hlo.traffic(hlo.parse(_TEXT))
  assert traffic.unknown == ()
  assert set(traffic.collectives) == {
    hlo.Collective(kind='all-gather', num_devices=4, payload_bytes=64, count=5),
    hlo.Collective(
      kind='reduce-scatter', num_devices=4, payload_bytes=256, count=5
    ),
  }
  # A device sends its shard to three others, and three of four parts of a sum.
  assert traffic.by_kind() == {
    'all-gather': (5, 5 * 3 * 64),
    'reduce-scatter': (5, 5 * 0.75 * 256),
  }


def test_memory_traffic_is_that_of_slices_and_of_main_memory():
  # Per turn: a row of 256 bytes and the counter are read for `taken`, which
  # stays on the chip; the kernel reads and writes 256 bytes; the fused sum
  # reads 256 and writes 64; the counter is two numbers read and one written.
  per_turn = (256 + 4) + 2 * 256 + (256 + 64) + 3 * 4
  assert hlo.traffic(hlo.parse(_TEXT)).memory_bytes == 5 * per_turn


@pytest.mark.parametrize(
  ('old', 'new', 'count'),
  [
    ('%start = s32[] constant(0)', '%start = s32[] constant(2)', 3),
    ('constant(5)\n', 'constant(7)\n', 7),
    ('direction=LT', 'direction=LE', 6),
  ],
)
def test_a_loop_ends_where_its_condition_says(old, new, count):
  assert old in _TEXT
  traffic = hlo.traffic(hlo.parse(_TEXT.replace(old, new)))
  assert {item.count for item in traffic.collectives} == {count}


def test_a_loop_whose_end_cannot_be_read_is_counted_once_and_reported():
  text = _TEXT.replace('direction=LT', 'direction=NE')
  traffic = hlo.traffic(hlo.parse(text))
  assert traffic.unknown == ('loop',)
  assert {item.count for item in traffic.collectives} == {1}


def test_groups_that_cannot_be_read_are_reported():
  text = _TEXT.replace('replica_groups=[2,4]<=[8]', 'replica_groups=nonsense')
  assert hlo.traffic(hlo.parse(text)).unknown == ('all-reduce.9',)


@pytest.mark.parametrize(
  ('shape', 'num_bytes'),
  [
    ('f32[2,3]{1,0}', 24),
    ('(bf16[4]{0:T(8)(2,1)}, /*index=1*/pred[8])', 16),
    ('f32[]', 4),
    ('s4[16]', 8),
    ('f8e4m3fn[10]', 10),
    ('u64[3]', 24),
    ('token[]', 0),
  ],
)
def test_bytes_of_shapes(shape, num_bytes):
  assert hlo.shape_bytes(shape) == num_bytes


def test_a_text_that_is_no_program_is_refused():
  with pytest.raises(ValueError, match='got a text without an ENTRY computat'):
    hlo.parse('HloModule nothing')


def _compiled_text(num_turns):
  """Returns the text of a scan whose turns gather a matrix and sum a vector."""
  mesh = Mesh(np.array(jax.devices()), ('x',))
  whole, split = (
    NamedSharding(mesh, spec) for spec in (PartitionSpec(), PartitionSpec('x'))
  )

  def local(w, v):
    def turn(v, _):
      full = jax.lax.all_gather(w, 'x', axis=0, tiled=True)
      return jnp.sin(jax.lax.psum(v @ full, 'x')), None

    return jax.lax.scan(turn, v, length=num_turns)[0]

  f = jax.jit(
    jax.shard_map(
      local,
      mesh=mesh,
      in_specs=(split.spec, whole.spec),
      out_specs=whole.spec,
      check_vma=False,
    )
  )
  return (
    f.lower(
      jax.ShapeDtypeStruct((64, 64), jnp.float32, sharding=split),
      jax.ShapeDtypeStruct((64,), jnp.float32, sharding=whole),
    )
    .compile()
    .as_text()
  )


def test_a_real_program_is_read():
  traffic = hlo.traffic(hlo.parse(_compiled_text(num_turns=6)))
  assert traffic.unknown == ()
  count, sent = traffic.by_kind()['all-reduce']
  assert count == 6
  assert sent == pytest.approx(6 * 2 * 7 / 8 * 64 * 4)
  # The gather does not depend on the turn, and may be moved out of the loop.
  count, sent = traffic.by_kind()['all-gather']
  assert count in (1, 6)
  assert sent == pytest.approx(count * 7 * (64 * 64 * 4 / 8))
  assert traffic.memory_bytes > 6 * 64 * 64 * 4


def test_kernels_are_counted_as_often_as_they_start():
  counts = hlo.kernels(hlo.parse(_TEXT))
  assert counts['k'] == 5
  assert counts['fusion'] == 2 * 5
  assert counts['all-gather-start'] == 5
  # What is inside a fusion is a part of its kernel, and structure is none.
  assert not counts.keys() & {
    'dynamic-slice', 'all-reduce', 'parameter', 'tuple', 'while', 'constant',
    'all-gather-done', 'custom-call',
  }  # fmt: skip
