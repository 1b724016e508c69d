"""The pipeline: its schedule, its results and its messages."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from parallel import mesh as mesh_lib, parallel_config, pipeline, rules

Config = parallel_config.ParallelConfig
NUM_LAYERS = 8
WIDTH, HIDDEN = 24, 40


def _mesh(**sizes):
  config = Config(**{'data': 1} | sizes)
  num_devices = np.prod(
    [getattr(config, axis) for axis in parallel_config.AXES]
  )
  return mesh_lib.make_mesh(config, jax.devices()[:num_devices])


def _run(mesh, repeats, num_microbatches, apply_layer, params, *args):
  """Runs a stack [N, ...] through the stages of a mesh."""
  if repeats > 1:
    params = jax.tree.map(
      lambda w: w.reshape((repeats, -1, *w.shape[1:])), params
    )
  run_layers = pipeline.make_run_layers(
    mesh, repeats=repeats, num_microbatches=num_microbatches
  )
  return run_layers(apply_layer, params, *args)


# The schedule.


def test_the_schedule_as_a_table():
  """2 stages, 2 repeats, 4 micro-batches: (micro-batch, repeat), - a bubble."""
  schedule = pipeline.make_schedule(2, 2, 4)
  table = [
    [
      f'{schedule.microbatch[t, s]}{"ab"[schedule.repeat[t, s]]}'
      if schedule.is_real[t, s]
      else '-'
      for s in range(2)
    ]
    for t in range(9)
  ]
  assert table == [
    ['0a', '-'],
    ['1a', '0a'],
    ['0b', '1a'],
    ['1b', '0b'],
    ['2a', '1b'],
    ['3a', '2a'],
    ['2b', '3a'],
    ['3b', '2b'],
    ['-', '3b'],
  ]


@pytest.mark.parametrize(
  ('num_stages', 'repeats', 'num_microbatches'),
  [(2, 1, 2), (4, 1, 8), (2, 2, 4), (4, 3, 8), (3, 2, 9)],
)
def test_the_schedule_is_that_of_a_ring(num_stages, repeats, num_microbatches):
  """Simulated: a stage takes its neighbour's micro-batch, or a waiting one."""
  schedule = pipeline.make_schedule(num_stages, repeats, num_microbatches)
  waiting = list(range(num_microbatches))
  held = [None] * num_stages  # (micro-batch, repeat) that each works on
  finished = []
  for t in range(len(schedule.microbatch)):
    back = held[-1]
    if back is not None and back[1] == repeats - 1:
      finished.append(back[0])
      back = None
    elif back is not None:
      back = (back[0], back[1] + 1)
    if back is None and waiting:
      back = (waiting.pop(0), 0)
    held = [back, *held[:-1]]
    for s, job in enumerate(held):
      assert schedule.is_real[t, s] == (job is not None)
      if job is not None:
        assert (schedule.microbatch[t, s], schedule.repeat[t, s]) == job
  assert [*finished, held[-1][0]] == list(range(num_microbatches))
  # The share of the bubble, by the formula of the module's docstring.
  bubble = num_stages - 1
  assert np.mean(~schedule.is_real) == pytest.approx(
    bubble / (num_microbatches * repeats + bubble)
  )


# Results against a plain loop over the layers.


@pytest.mark.parametrize(
  ('num_stages', 'repeats'), [(2, 1), (4, 1), (2, 2), (4, 2), (2, 4)]
)
def test_every_microbatch_visits_every_layer_in_order(num_stages, repeats):
  """Each layer appends its number to x as a decimal digit."""

  def write_down(params, x_BTD, shared, key):
    del shared, key
    return x_BTD * 10 + params['number'], None

  numbers_N = jnp.arange(NUM_LAYERS)
  x_BTD = jnp.broadcast_to(jnp.arange(8)[:, None, None], (8, 1, 1))
  found_BTD, sums = jax.jit(
    lambda numbers_N: _run(
      _mesh(stage=num_stages), repeats, 4, write_down, {'number': numbers_N},
      x_BTD, None, None,
    )
  )(numbers_N)  # fmt: skip
  assert sums is None
  np.testing.assert_array_equal(
    found_BTD, x_BTD * 10**NUM_LAYERS + int('01234567')
  )


def _mlp_layer(params, x_BTD, shared, key):
  """A residual layer; its sums have a gradient, too."""
  del key
  offsets_BT, nothing = shared
  assert nothing is None
  hidden_BTF = jnp.tanh(x_BTD @ params['up'] + offsets_BT[..., None])
  sums = {'load': jnp.sum(hidden_BTF**2, axis=(0, 1)), 'count': x_BTD.shape[0]}
  return x_BTD + hidden_BTF @ params['down'], sums


def _mlp_inputs(rows=16):
  keys = jax.random.split(jax.random.key(0), 4)
  params = {
    'up': 0.2 * jax.random.normal(keys[0], (NUM_LAYERS, WIDTH, HIDDEN)),
    'down': 0.2 * jax.random.normal(keys[1], (NUM_LAYERS, HIDDEN, WIDTH)),
  }
  x_BTD = jax.random.normal(keys[2], (rows, 4, WIDTH))
  return params, x_BTD, jax.random.normal(keys[3], (rows, 4))


def _loss(run, params, x_BTD, offsets_BT):
  x_BTD, sums = run(params, x_BTD, (offsets_BT, None), None)
  return jnp.sum(x_BTD**2) + jnp.sum(jnp.sin(sums['load'])), (x_BTD, sums)


def _plain(params, x_BTD, shared, key):
  return jax.lax.scan(
    lambda x_BTD, params: _mlp_layer(params, x_BTD, shared, key), x_BTD, params
  )


def _assert_same_but_for_rounding(found, expected):
  atol = 5e-6 * max(1.0, float(np.abs(expected).max()))
  np.testing.assert_allclose(found, expected, rtol=2e-4, atol=atol)


@pytest.mark.fast_cases(1)
@pytest.mark.parametrize(
  ('sizes', 'repeats', 'num_microbatches'),
  [
    ({'stage': 2, 'data': 4}, 1, 4),
    ({'stage': 2, 'fsdp': 2, 'tensor': 2}, 2, 4),
    ({'stage': 4, 'expert': 2}, 2, 8),
  ],
  ids=str,
)
def test_outputs_sums_and_gradients_are_a_plain_loops(
  sizes, repeats, num_microbatches
):
  inputs = _mlp_inputs()
  run = functools.partial(
    _run, _mesh(**sizes), repeats, num_microbatches, _mlp_layer
  )
  grad = jax.value_and_grad(_loss, argnums=(1, 2, 3), has_aux=True)
  expected = jax.jit(functools.partial(grad, _plain))(*inputs)
  found = jax.jit(functools.partial(grad, run))(*inputs)
  (_, (_, sums)), _ = found
  assert sums['load'].shape == (NUM_LAYERS, HIDDEN)
  # A layer counts each micro-batch once: work of bubbles is not added.
  rows_per_microbatch = 16 // num_microbatches
  np.testing.assert_array_equal(
    sums['count'], NUM_LAYERS * [num_microbatches * rows_per_microbatch]
  )
  # The same products in float32, added over parts in another order: gradients
  # of a few hundred differ by a few units in their last place, 2^-24 each.
  jax.tree.map(_assert_same_but_for_rounding, found, expected)


def test_bubbles_never_make_a_gradient_infinite():
  """A norm without epsilon has no derivative at zero."""

  def normalise(params, x_BTD, shared, key):
    del shared, key
    norm_BT1 = jnp.sqrt(jnp.sum(x_BTD**2, axis=-1, keepdims=True))
    y_BTD = x_BTD / norm_BT1 + params['bias'][None, None]
    return y_BTD, {'norm': jnp.sum(norm_BT1)}

  def loss(bias_ND, x_BTD):
    x_BTD, sums = _run(
      _mesh(stage=4), 1, 4, normalise, {'bias': bias_ND}, x_BTD, None, None
    )
    return jnp.sum(x_BTD**2) + jnp.sum(sums['norm'])

  x_BTD = jax.random.normal(jax.random.key(0), (4, 3, WIDTH))
  grads = jax.jit(jax.grad(loss, argnums=(0, 1)))(jnp.ones((4, WIDTH)), x_BTD)
  assert all(np.isfinite(g).all() and np.any(g) for g in grads)


def test_keys_belong_to_microbatch_and_layer_not_to_the_schedule():
  def draw(params, x_BTD, shared, key):
    del params, shared
    bits = jax.random.randint(key, (), 0, 2**30)
    return x_BTD.at[:, 0].set(jnp.roll(x_BTD[:, 0], 1, axis=-1)).at[
      :, 0, 0
    ].set(bits), None

  def drawn(num_stages, repeats):
    x_BTD = jnp.zeros((8, 1, NUM_LAYERS), jnp.int32)
    return jax.jit(
      lambda key: _run(
        _mesh(stage=num_stages), repeats, 4, draw,
        {'number': jnp.arange(NUM_LAYERS)}, x_BTD, None, key,
      )
    )(jax.random.key(5))[0]  # fmt: skip

  first_B1N = np.asarray(drawn(2, 1))
  # 4 micro-batches of 2 rows, 8 layers: a draw for each pair of them. Two of
  # 32 draws among 2^30 fall together once in two million keys.
  assert len(np.unique(first_B1N)) == 4 * NUM_LAYERS
  for num_stages, repeats in ((4, 1), (2, 2)):
    np.testing.assert_array_equal(drawn(num_stages, repeats), first_B1N)


def test_a_port_that_spells_out_devices_runs_inside_a_stage():
  """As attention kernels and experts: shard_map specs that omit 'stage'."""
  mesh = _mesh(stage=2, data=2, tensor=2)
  spec = jax.sharding.PartitionSpec

  def down_by_hand(hidden_BTF, down_FD):
    return jax.shard_map(
      lambda hidden_BTF, down_FD: jax.lax.psum(hidden_BTF @ down_FD, 'tensor'),
      mesh=mesh,
      in_specs=(spec(rules.BATCH_AXES, None, 'tensor'), spec('tensor', None)),
      out_specs=spec(rules.BATCH_AXES, None, None),
    )(hidden_BTF, down_FD)

  def layer(params, x_BTD, shared, key):
    del key
    hidden_BTF = jnp.tanh(x_BTD @ params['up'] + shared[0][..., None])
    sums = {'load': jnp.sum(hidden_BTF**2, axis=(0, 1))}
    return x_BTD + down_by_hand(hidden_BTF, params['down']), sums

  inputs = _mlp_inputs(rows=8)
  run = functools.partial(_run, mesh, 2, 4, layer)
  grad = jax.grad(lambda run, *args: _loss(run, *args)[0], argnums=1)
  expected = jax.jit(functools.partial(grad, _plain))(*inputs)
  found = jax.jit(functools.partial(grad, run))(*inputs)
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, rtol=2e-4, atol=2e-4),
    found,
    expected,
  )


# Messages between devices.


def _collectives(run, mesh, params, x_BTD, offsets_BT):
  """Returns (operation, result) of every message of a gradient."""
  folded = params['up'].ndim == 4
  axes = (*(None,) * folded, 'layers', None, None)
  placed = jax.tree.map(
    lambda w, sharding: jax.ShapeDtypeStruct(
      w.shape, w.dtype, sharding=sharding
    ),
    params,
    rules.shardings(mesh, params, jax.tree.map(lambda _: axes, params)),
  )
  grad = jax.grad(lambda *args: _loss(run, *args)[0])
  compiled = jax.jit(grad).lower(placed, x_BTD, offsets_BT).compile()
  return re.findall(
    r'= (.*?) (all-gather|all-reduce|all-to-all|collective-permute)'
    r'(?:-start)?\(',
    compiled.as_text(),
  )


@pytest.mark.parametrize('repeats', [1, 2])
def test_weights_stay_where_they_are_and_activations_travel(repeats):
  mesh = _mesh(stage=4)
  params, x_BTD, offsets_BT = _mlp_inputs()
  if repeats > 1:
    params = jax.tree.map(
      lambda w: w.reshape((repeats, -1, *w.shape[1:])), params
    )
  run = functools.partial(
    pipeline.make_run_layers(mesh, repeats=repeats, num_microbatches=4),
    _mlp_layer,
  )
  sent = _collectives(run, mesh, params, x_BTD, offsets_BT)
  is_weight = re.compile(rf'({WIDTH},{HIDDEN}|{HIDDEN},{WIDTH})\]')
  assert not [result for result, _ in sent if is_weight.search(result)]
  # One message each way in every iteration, of a micro-batch: 4 of 16 rows.
  moved = [result for result, name in sent if name == 'collective-permute']
  assert [result.split('{')[0] for result in moved] == 2 * [
    f'f32[1,4,4,{WIDTH}]'
  ]
  if repeats == 1:  # the check would see it: a plain loop collects the stack
    sent = _collectives(_plain, mesh, params, x_BTD, offsets_BT)
    assert [result for result, _ in sent if is_weight.search(result)]


def test_what_does_not_divide_is_refused():
  mesh = _mesh(stage=4)
  with pytest.raises(
    ValueError,
    match='stage_microbatches: got 6, expected a multiple of .*stage = 4',
  ):
    pipeline.make_run_layers(mesh, repeats=1, num_microbatches=6)
  params, x_BTD, offsets_BT = _mlp_inputs(rows=6)
  with pytest.raises(
    ValueError, match='rows: got 6, expected a multiple of .* = 4'
  ):
    _run(mesh, 1, 4, _mlp_layer, params, x_BTD, (offsets_BT, None), None)


@pytest.mark.parametrize(
  ('parallel', 'message'),
  [
    (
      {'stage_repeats': 2},
      'got stage_repeats = 2 and stage_microbatches = 0 without stages',
    ),
    (
      {'stage': 4, 'stage_microbatches': 6},
      'stage_microbatches: got 6, expected a multiple of parallel.stage = 4',
    ),
    ({'stage': 2, 'context': 2}, 'got stage = 2 and context = 2, expected one'),
    ({'stage': 2, 'kind': 'pmap'}, 'got pmap with stage = 2, expected 1'),
  ],
)
def test_impossible_stages_are_refused(parallel, message):
  with pytest.raises(ValueError, match=message):
    Config(**parallel).validate()
