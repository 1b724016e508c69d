"""The layer layout of a circular pipeline; checkpoints do not depend on it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from parallel import parallel_config, placement, stage_layout

AXES = {
  'kernel': ('layers', 'embed', 'mlp'),
  'scale': ('layers', 'norm'),
  'head': ('vocab', 'embed'),
  'step': (),
}


def _init(key):
  return {
    'kernel': jax.random.normal(key, (8, 4, 6)),
    'scale': jnp.arange(16.0).reshape((8, 2)),
    'head': jnp.ones((10, 4)),
    'step': jnp.zeros((), jnp.int32),
  }


def test_only_stacked_leaves_are_folded():
  fold = stage_layout.Fold(AXES, repeats=2)
  tree = _init(jax.random.key(0))
  folded = fold.fold(tree)
  assert jax.tree.map(lambda x: x.shape, folded) == {
    'kernel': (2, 4, 4, 6),
    'scale': (2, 4, 2),
    'head': (10, 4),
    'step': (),
  }
  assert fold.logical_axes == AXES | {
    'kernel': (None, *AXES['kernel']),
    'scale': (None, *AXES['scale']),
  }
  # Layer 5 is the second layer of the second repeat.
  np.testing.assert_array_equal(folded['kernel'][1, 1], tree['kernel'][5])
  jax.tree.map(np.testing.assert_array_equal, fold.unfold(folded), tree)


def test_one_time_round_changes_nothing():
  fold = stage_layout.Fold(AXES, repeats=1)
  tree = _init(jax.random.key(0))
  assert fold.is_identity
  assert fold.logical_axes is AXES
  assert fold.fold(tree) is tree
  assert fold.unfold(tree) is tree


def _placed(num_devices, **parallel):
  return placement.make(
    parallel_config.ParallelConfig(**parallel),
    jax.eval_shape(_init, jax.random.key(0)),
    AXES,
    jax.devices()[:num_devices],
  )


@pytest.mark.parametrize('repeats', [1, 2, 4])
def test_a_whole_state_does_not_tell_how_it_was_placed(repeats):
  """A checkpoint of one layout is restored by any other."""
  expected = jax.jit(_init)(jax.random.key(3))
  circular = _placed(8, stage=2, data=4, stage_repeats=repeats)
  state = circular.init(_init, jax.random.key(3))
  # A stage holds layers of every repeat, which are not neighbours.
  held = state['kernel'].sharding.shard_shape(state['kernel'].shape)
  assert held == ((repeats,) * (repeats > 1) + (4 // repeats, 4, 6))
  whole = circular.whole(state)
  jax.tree.map(np.testing.assert_array_equal, whole, expected)
  assert jax.tree.map(lambda x: x.shape, circular.abstract_whole()) == (
    jax.tree.map(lambda x: x.shape, expected)
  )
  again = circular.restored(whole)
  assert again['kernel'].sharding == state['kernel'].sharding
  jax.tree.map(np.testing.assert_array_equal, again, state)
  plain = _placed(1)
  on_one_device = jax.device_put(
    jax.tree.map(np.asarray, whole), jax.devices()[0]
  )
  jax.tree.map(
    np.testing.assert_array_equal, plain.restored(on_one_device), expected
  )


def test_layers_that_do_not_divide_by_the_stages_are_refused():
  with pytest.raises(
    ValueError,
    match='axis layers of .*kernel.*: got 8, expected a multiple of .* = 3',
  ):
    _placed(3, stage=3)
