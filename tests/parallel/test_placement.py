"""Meshes, rules and pmap; tests/training/test_step.py has their results."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from parallel import mesh as mesh_lib, parallel_config, placement, rules

Config = parallel_config.ParallelConfig


def test_remaining_devices_go_to_data():
  mesh = mesh_lib.make_mesh(Config(fsdp=2, tensor=2))
  sizes = {name: size for name, size in mesh.shape.items() if size > 1}
  assert sizes == {'data': 2, 'fsdp': 2, 'tensor': 2}
  one = mesh_lib.make_mesh(Config(), jax.devices()[:1])
  assert tuple(one.shape) == mesh_lib.AXES
  assert set(one.shape.values()) == {1}


def test_a_mesh_uses_every_device():
  with pytest.raises(
    ValueError, match=r'parallel: got data = 3 = 3, expected .* devices, 8'
  ):
    mesh_lib.make_mesh(Config(data=3))
  with pytest.raises(ValueError, match='data x fsdp = 1 x 5 = 5, expected'):
    mesh_lib.make_mesh(Config(fsdp=5))


@pytest.mark.parametrize(
  ('config', 'message'),
  [
    (Config(kind='ring'), "got 'ring', expected one of mesh, pmap"),
    (Config(fsdp=0), 'parallel.fsdp: got 0, expected at least 1'),
    (Config(data=-2), 'parallel.data: got -2, expected at least 1; set -1 for'),
    (Config(kind='pmap', fsdp=2), 'got pmap with fsdp = 2'),
  ],
)
def test_impossible_layouts_are_refused(config, message):
  with pytest.raises(ValueError, match=message):
    config.validate()


def test_pmap_uses_every_device():
  with pytest.raises(ValueError, match='got 3 with kind=pmap, expected -1 or'):
    placement.make(Config(kind='pmap', data=3), {}, {})


def test_rules_split_matrices_and_refuse_what_does_not_divide():
  mesh = mesh_lib.make_mesh(Config(fsdp=4, tensor=2))
  shapes = {
    'kernel': jax.ShapeDtypeStruct((8, 6), jnp.float32),
    'scale': jax.ShapeDtypeStruct((5,), jnp.float32),
  }
  names = {'kernel': ('embed', 'mlp'), 'scale': ('norm',)}
  found = rules.shardings(mesh, shapes, names)
  assert found['kernel'].shard_shape((8, 6)) == (2, 3)
  assert found['scale'].shard_shape((5,)) == (5,)
  with pytest.raises(
    ValueError,
    match=r"axis embed of \['kernel'\]: got 6, expected a multiple of"
    ' parallel.fsdp = 4; change the model or parallel.fsdp',
  ):
    rules.shardings(
      mesh,
      {'kernel': jax.ShapeDtypeStruct((6, 6), jnp.float32)},
      {'kernel': ('embed', 'mlp')},
    )


@pytest.mark.parametrize('kind', ['mesh', 'pmap'])
def test_a_state_survives_being_made_whole(kind):
  def init(key):
    return {'w': jax.random.normal(key, (8, 4)), 'key': key}

  abstract = jax.eval_shape(init, jax.random.key(0))
  placed = placement.make(
    Config(kind=kind, **({'fsdp': 4} if kind == 'mesh' else {})),
    abstract,
    {'w': ('embed', None), 'key': ()},
  )
  assert placed.num_batch_shards == 8
  state = placed.init(init, jax.random.key(3))
  whole = placed.whole(state)
  np.testing.assert_array_equal(whole['w'], init(jax.random.key(3))['w'])
  assert jax.tree.map(lambda x: x.shape, placed.abstract_whole()) == {
    'w': (8, 4),
    'key': (),
  }
  again = placed.whole(placed.restored(whole))
  np.testing.assert_array_equal(again['w'], whole['w'])
