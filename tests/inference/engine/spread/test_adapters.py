"""Adapters over devices: the function of one device, and the same bits."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from inference.engine import adapter_table, device_state, engine_config
from inference.engine.spread import (
  adapters as adapters_over,
  layout as layout_lib,
  placement as placement_lib,
  stored as stored_lib,
)
from inference.requests import requests as requests_lib
from inference.sampling import settings as settings_lib
from inference.server.versions import memory
from models.layers import adapters as adapters_lib, mlp
from models.linear import invariant, plain
from models.linear.stored import tree as stored_tree
from parallel import mesh as mesh_lib, parallel_config
from parallel.tensor import by_part, ports
from tests.helpers import frozen_dirs, tiny_models
from tests.helpers.open_weights import stored_params
from tests.helpers.serving import reference_engine
from tests.helpers.training import tiny_adapters

_SIZES = {'out': (288, 48), 'down': (96, 48), 'up': (48, 96)}
_SLOTS = np.asarray([[0, 2, 1, 1, 2]], np.int32)
# Ranks, layers and gains differ.
_ADAPTERS = {
  'first': {'seed': 1, 'rank': 3},
  'second': {'seed': 2, 'rank': 2, 'share': 0.5},
  'third': {'seed': 3, 'rank': 1, 'has_gain': True},
}


def _kernel(owner, form):
  w_IO = np.random.default_rng(0).normal(size=_SIZES[owner])
  w_IO = jnp.asarray(w_IO, jnp.float32)
  return w_IO if form == 'float' else stored_params.kernel(w_IO, form)


def _table(owner, kernel, places=adapter_table.WHOLE):
  params = {'params': {'layer_0': {'mlp': {owner: {'kernel': kernel}}}}}
  made = adapter_table.AdapterTable(
    params, num_adapters=2, rank=4, dtype=jnp.float32, places=places
  )
  for digest in ('first', 'third'):
    made.load(digest, tiny_adapters.tree(params, **_ADAPTERS[digest]))
  return made


def _layer(owner, kernel, table, x_1TI, port, is_apart):
  """Returns the output of a layer whose tokens have adapters."""
  routed = adapters_lib.routed(table, _SLOTS, is_apart=is_apart)
  layer = mlp.Linear(kernel.shape[-1], jnp.float32, False, 0.0, port)
  own = routed['layer_0']['mlp'][owner]
  return layer.apply({'params': {'kernel': kernel}, 'adapters': own}, x_1TI)


def _over_devices(owner, kernel, x_1TI, num_devices, numerics):
  config = tiny_models.odd_heads(model_width=48, head_width=32, mlp_width=96)
  num = 4
  layout = layout_lib.Layout(model=config, vocab_size=61, num_parts=num)
  mesh = mesh_lib.make_mesh(
    parallel_config.ParallelConfig(tensor=num_devices),
    jax.devices()[:num_devices],
  )
  table = _table(owner, kernel, adapters_over.Places(mesh, layout))
  path = tuple(map(jax.tree_util.DictKey, ('layer_0', owner, 'kernel')))
  cut = stored_lib.cut(layout, path, kernel)
  if stored_tree.is_stored(kernel):

    def put(path, x):
      return jax.device_put(*cut.laid_out(path[-1].key, np.asarray(x), mesh))

    kernel = cut.served(jax.tree_util.tree_map_with_path(put, kernel), mesh)
  else:
    whole = layout.laid_out(np.asarray(kernel), (cut.into, cut.out))
    axes = [
      ports.AXIS if layout.is_cut(x) else None for x in (cut.into, cut.out)
    ]
    spec = jax.sharding.PartitionSpec(*axes)
    kernel = jax.device_put(whole, jax.sharding.NamedSharding(mesh, spec))
  is_sum, port = layout.is_cut(cut.into), plain.linear
  if numerics == 'invariant':
    port = (by_part.Joined if is_sum else by_part.Linear)(invariant.linear, num)
  elif is_sum:
    port = ports.Joined(plain.linear)
  if is_sum:
    x_1TI = np.stack([layout.laid_out(x_1TI[0], (None, cut.into))])
  own = jax.sharding.PartitionSpec(None, None, ports.AXIS)
  whole = jax.sharding.PartitionSpec()
  function = jax.shard_map(
    lambda kernel, table, x: _layer(
      owner, kernel, table, x, port, numerics == 'invariant'
    ),
    mesh=mesh,
    in_specs=(
      *jax.tree.map(lambda x: x.sharding.spec, (kernel, table.table)),
      own if is_sum else whole,
    ),
    out_specs=whole if is_sum else own,
    check_vma=False,
  )
  y_TO = np.asarray(jax.jit(function)(kernel, table.table, x_1TI))[0]
  return y_TO if is_sum else layout.of_model(y_TO, (None, cut.out), y_TO.shape)


@pytest.mark.slow
@pytest.mark.parametrize(
  ('owner', 'form'),
  [
    ('down', 'ordered'),  # cut along its outputs; its adapters along inputs
    ('up', 'int8'),
    *(
      pytest.param(*each, marks=pytest.mark.slow)
      for each in (
        ('out', 'float'), ('down', 'float'), ('up', 'float'), ('out', 'nvfp4'),
      )
    ),
  ],
)  # fmt: skip
def test_layers_with_adapters_are_those_of_one_device(owner, form):
  kernel = _kernel(owner, form)
  x_1TI = np.random.default_rng(1).normal(size=(1, 5, _SIZES[owner][0]))
  x_1TI = np.float32(x_1TI)
  table = _table(owner, kernel).table
  expected = _layer(owner, kernel, table, x_1TI, plain.linear, False)[0]
  exact = [
    _over_devices(owner, kernel, x_1TI, num, 'invariant') for num in (1, 4)
  ]
  np.testing.assert_array_equal(exact[0], exact[1])
  fast = _over_devices(owner, kernel, x_1TI, 4, 'fast')
  for found in (exact[0], fast):
    # float32 sums of 48 to 288 numbers, of values around 20.
    np.testing.assert_allclose(found, expected, atol=2e-4, rtol=0)


@pytest.mark.parametrize('num_devices', [2, 4])
def test_a_device_has_its_share_of_the_table(num_devices):
  config = tiny_models.odd_heads(num_layers=1, vocab_size=270, max_length=64)
  params = frozen_dirs.params(config)
  shapes = jax.eval_shape(lambda: params)
  placed = placement_lib.make(
    engine_config.EngineConfig(tensor=num_devices),
    config,
    device_state.unread(shapes),
    vocab_size=259,
  )
  made = adapter_table.AdapterTable(
    params, num_adapters=3, rank=2, dtype=jnp.float32, places=placed.adapters
  )
  assert made.num_bytes == sum(
    leaf.addressable_data(0).nbytes for leaf in jax.tree.leaves(made.table)
  )
  assert made.num_bytes == adapter_table.num_bytes(
    shapes, num_adapters=3, rank=2, dtype=jnp.float32, places=placed.adapters
  )
  entry = made.table['layer_0']['mlp']['down']
  local = {k: x.addressable_data(0).shape for k, x in entry.items()}
  width = -(-42 // num_devices)
  assert local == {'a': (width, 4, 2), 'b': (4, 2, 24), 'gain': (4, 24)}


# ------------------------------------------------------------------------------
# Engines.


@functools.cache
def _tree(digest, kind):
  params = reference_engine.params(kind)
  return tiny_adapters.tree(params, **_ADAPTERS[digest])


def _request(digest, length, **settings):
  ids = np.random.default_rng(length).integers(0, 250, length)
  return requests_lib.Request(
    prompt_ids=tuple(map(int, ids)),
    settings=settings_lib.Settings(
      max_tokens=8, logprobs=2, seed=length, **settings
    ),
    adapter=digest,
  )


def _served(engine, kind, order):
  """Serves with adapters that come and go meanwhile; returns the answers."""
  first, *others = order
  engine.adapters.load(first, _tree(first, kind))
  number = engine.submit(_request(first, 30))
  early = [update for _ in range(2) for update in engine.step()]
  for digest in others:
    engine.adapters.load(digest, _tree(digest, kind))
  early += engine.run()
  assert {each.request_id for each in early} == {number}
  asked = [
    _request(digest, length, temperature=temperature)
    for digest in ('', *_ADAPTERS)
    for length, temperature in ((5, 0.0), (40, 1.0))
  ]
  served = reference_engine.serve(
    engine, asked, rng=np.random.default_rng(len(first)), spread=5,
    preemptions=(0, 1),
  )  # fmt: skip
  for digest in order:
    engine.adapters.unload(digest)
  bare = reference_engine.serve(engine, asked[:2])
  for again, (before,) in zip(
    bare.completions, served.completions[:2], strict=True
  ):
    assert again[0].token_ids == before.token_ids
  found = [(x.token_ids, x.logprobs) for (x,) in served.completions]
  return asked, found


@pytest.mark.slow
@pytest.mark.parametrize(
  ('kind', 'experts'),
  [('odd_heads', 1), pytest.param('mixture', 2, marks=pytest.mark.slow)],
)
def test_answers_of_adapters_have_the_same_bits_on_any_devices(kind, experts):
  room = {
    **reference_engine.TIGHT,
    'max_adapters': 3,
    'max_adapter_rank': 3,
    'constraints': False,
  }
  exact = []
  for num_devices, order in (
    (2, ('second', 'third', 'first')),
    (4, ('first', 'second', 'third')),
  ):
    engine = reference_engine.engine(
      kind, **room, tensor=num_devices, tensor_parts=4, experts=experts
    )
    asked, found = _served(engine, kind, order)
    exact.append(found)
  assert exact[0] == exact[1]
  room['numerics'] = 'fast'
  engine = reference_engine.engine(kind, **room, tensor=2, experts=experts)
  asked, fast = _served(engine, kind, tuple(_ADAPTERS))
  reference = reference_engine.Reference(kind)
  params = reference_engine.params(kind)
  whole = {
    digest: tiny_adapters.merged(params, _tree(digest, kind))
    for digest in _ADAPTERS
  }
  for request, *answers in zip(asked, exact[0], fast, strict=True):
    weights = whole.get(request.adapter)
    expected = reference.answer(request, weights=weights)
    for ids, logprobs in answers:
      assert ids == expected.token_ids
      got = [each.chosen for each in logprobs or ()]
      right = [each.chosen for each in expected.logprobs or ()]
      # As on one device, see test_adapters.py of the engine.
      np.testing.assert_allclose(got, right, atol=1e-4)


def test_plans_count_the_table_of_each_device(tmp_path):
  manifest = frozen_dirs.write(tmp_path / 'f')
  found = {}
  for num_devices in (1, 2):
    config = engine_config.EngineConfig(
      tensor=num_devices, max_adapters=2, max_adapter_rank=4
    )
    found[num_devices] = memory.plan(manifest, config).adapters
  # Both devices are in the memory of the host. One half of the numbers is on
  # each, and the other half is divided.
  assert found[1] < found[2] < 2 * found[1]
