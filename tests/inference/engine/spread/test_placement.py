"""Weights over devices: each device its parts, and the same weights again."""

import jax
import numpy as np
import pytest

from frozen import format as frozen_format
from inference import generate
from inference.engine import device_state, engine_config
from inference.engine.spread import placement as placement_lib
from models import layout
from tests.helpers import frozen_dirs, tiny_models
from tests.helpers.serving import reference_engine


def _placement(kind, num_devices, params=None, experts=1):
  params = reference_engine.params(kind) if params is None else params
  return placement_lib.make(
    engine_config.EngineConfig(tensor=num_devices, experts=experts),
    reference_engine.model_config(kind),
    device_state.unread(params),
    vocab_size=259,
  )


@pytest.mark.parametrize(
  ('kind', 'experts'),
  [
    ('odd_heads', 1),
    ('gpt2', 1),
    ('whole_norms', 1),
    ('mixture', 1),
    ('mixture', 2),
  ],  # fmt: skip
)
@pytest.mark.parametrize('num_devices', [2, 4])
def test_weights_are_those_of_the_model_again(kind, experts, num_devices):
  params = reference_engine.params(kind)
  placement = _placement(kind, num_devices, experts=experts)
  placed = placement.read(None, device_state.unread(params))
  expected = placement.shapes(None, device_state.unread(params))
  jax.tree.map(
    lambda x, shape: np.testing.assert_equal(
      (x.shape, x.sharding), (shape.shape, shape.sharding)
    ),
    placed,
    expected,
  )
  jax.tree.map(
    lambda x, y: np.testing.assert_array_equal(np.asarray(x), y),
    placement.of_model(placed),
    params,
  )


def test_each_device_has_its_share():
  params = reference_engine.params('llama')
  placement = _placement('llama', 4)
  placed = placement.read(None, device_state.unread(params))
  kernel = placed['params']['layer_0']['mlp']['up']['kernel']
  assert kernel.sharding.shard_shape(kernel.shape) == (24, 40 // 4)
  table = placed['params']['embed']['embedding']
  assert table.sharding.shard_shape(table.shape) == (512 // 4, 24)
  held = placement.num_bytes(device_state.unread(params))
  assert held == sum(
    leaf.addressable_data(0).nbytes for leaf in jax.tree.leaves(placed)
  )


def test_stacked_layers_are_placed_as_separate_ones():
  params, config = layout.stack(
    reference_engine.params('llama'), reference_engine.model_config('llama')
  )
  assert config.scan_layers
  placement = _placement('llama', 2)
  jax.tree.map(
    np.testing.assert_array_equal,
    placement.read(None, device_state.unread(params)),
    placement.read(None, device_state.unread(reference_engine.params('llama'))),
  )


@pytest.mark.slow
def test_a_frozen_directory_is_read_into_its_places(tmp_path):
  config = frozen_dirs.config(num_heads=9, num_kv_heads=3, scan_layers=True)
  manifest = frozen_dirs.write(tmp_path / 'model', config=config)
  opened = frozen_format.open_directory(tmp_path / 'model')
  generator = generate.Generator(
    opened,
    engine_config.EngineConfig(
      tensor=2, max_sequences=1, chunk_tokens=16, max_chunks=1
    ),
    compile_all=False,
  )
  assert generator.weights_digest() == manifest.weights_digest


@pytest.mark.parametrize(
  ('model', 'layout', 'message'),
  [
    ({}, {'tensor': 16}, 'engine.tensor: got 16, expected at most the number'),
    ({}, {'tensor': 2, 'native': 'on'}, 'native = on, expected off'),
    (
      {}, {'tensor': 2, 'experts': 2},
      'engine.experts = 2 of a model without experts',
    ),
  ],
)  # fmt: skip
def test_an_unsupported_engine_is_refused(model, layout, message):
  config = tiny_models.llama_like(**model)
  with pytest.raises(ValueError, match=message):
    placement_lib.make(
      engine_config.EngineConfig(**layout),
      config,
      device_state.unread(frozen_dirs.params(config)),
      vocab_size=61,
    )


def test_experts_that_do_not_divide_are_refused():
  with pytest.raises(ValueError, match='got 8 and experts of width 20'):
    _placement('mixture', 8)


@pytest.mark.parametrize(
  ('layout', 'message'),
  [
    ({'tensor': 4, 'experts': 3}, 'got 3, expected a divisor of the 4 devices'),
    ({'experts': 2}, 'got 2, expected a divisor of the 1 devices'),
    ({'tensor': 2, 'experts': 0}, 'engine.experts: got 0, expected'),
  ],
)
def test_groups_that_do_not_divide_the_devices_are_refused(layout, message):
  with pytest.raises(ValueError, match=message):
    engine_config.EngineConfig(**layout)


def test_fewer_than_one_device_is_refused():
  with pytest.raises(ValueError, match='engine.tensor: got 0, expected'):
    engine_config.EngineConfig(tensor=0)
