"""The loss of a draft head, by NumPy; its refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import adapter_config, transformer
from models.layers import draft_head as head_lib
from tests.helpers import tiny_models
from tests.helpers.training import tiny_experiment
from training.objectives import draft_head, port

V, K, T = 61, 40, 12
MODEL = tiny_models.llama_like(init_std=0.5, vocab_size=V)


@pytest.fixture(scope='module')
def case():
  """Returns params and a batch: two documents, padding, an untrained token."""
  model = transformer.Transformer(MODEL)
  params = model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
  head = head_lib.init(MODEL.model_width, 16, jax.random.key(1))
  rng = np.random.default_rng(2)
  head = jax.tree.map(
    lambda x: x + jnp.asarray(rng.normal(0, 0.2, x.shape), x.dtype), head
  )
  ids = rng.integers(0, V, (1, T + 1))
  lengths = 6, 4  # and two places of padding
  positions = np.concatenate([*map(np.arange, lengths), np.zeros(2)])
  segments = np.repeat([1, 2, 0], [*lengths, 2])
  weights = (segments > 0) * rng.uniform(0.5, 1.5, T)
  weights[3] = 0
  batch = {
    'tokens': jnp.asarray(ids[:, :-1], jnp.int32),
    'targets': jnp.asarray(ids[:, 1:], jnp.int32),
    'positions': jnp.asarray(positions[None], jnp.int32),
    'segment_ids': jnp.asarray(segments[None], jnp.int32),
    'weights': jnp.asarray(weights[None], jnp.float32),
  }
  return {**params, 'heads': {head_lib.NAME: head}}, batch


def _expected(loss, params, batch, num_steps, decay):
  """Returns the loss, its weight and the overlap of each step, in float64."""
  model = transformer.Transformer(MODEL)
  arrays = {k: np.asarray(v[0]) for k, v in batch.items()}
  states, _ = model.apply(
    {'params': params['params']},
    batch['tokens'],
    batch['positions'],
    None,
    batch['segment_ids'],
    method='hidden',
  )
  states = np.float64(states[0])
  table = np.float64(params['params']['embed']['embedding'])
  rows = np.float64(
    params['params'].get('head', params['params']['embed'])['embedding']
  )
  head = {
    name: np.float64(leaf['kernel'])
    for name, leaf in params['heads'][head_lib.NAME].items()
  }

  def norm(x):
    return x / np.sqrt(np.mean(x * x) + 1e-6)

  def softmax(x):
    x = np.exp(x - x.max())
    return x / x.sum()

  total, weight, overlaps = 0.0, 0.0, [[] for _ in range(num_steps)]
  for start in range(T):
    state = states[start]
    for step in range(1, num_steps + 1):
      at = start + step
      if at >= T or arrays['segment_ids'][at] != arrays['segment_ids'][start]:
        break
      if not arrays['segment_ids'][start]:
        break
      z = np.concatenate([norm(state), norm(table[arrays['targets'][at - 1]])])
      gate = z @ head['gate']
      inner = gate / (1 + np.exp(-gate)) * (z @ head['up'])
      half = len(z) // 2
      state = (
        z[:half] @ head['state'] + z[half:] @ head['token']
        + inner @ head['down']
      )  # fmt: skip
      p = softmax(rows @ states[at])[:K]
      q = softmax(rows[:K] @ state)
      overlap = np.minimum(p, q).sum()
      value = 1 - overlap
      if loss == draft_head.KL:
        value = np.sum(p * np.log(p / (p.sum() * q)))
      w = arrays['weights'][at]
      total += decay ** (step - 1) * w * value
      weight += decay ** (step - 1) * w
      overlaps[step - 1].append((w * overlap, w))
  return total, weight, [np.sum(each, axis=0) for each in overlaps]


@pytest.mark.slow
@pytest.mark.parametrize(
  'loss', [draft_head.KL, pytest.param(draft_head.TV, marks=pytest.mark.slow)]
)
def test_the_loss_is_that_of_numpy(case, loss):
  params, batch = case
  objective = draft_head.DraftHead(
    loss=loss, num_steps=2, step_decay=0.7, num_ids=K
  )
  model = port.Model(transformer.Transformer(MODEL))
  compute = jax.jit(lambda params, batch: objective(params, batch, model))
  got, sums = compute(params, batch)
  expected, weight, overlaps = _expected(loss, params, batch, 2, 0.7)
  # float32 sums of 20 terms.
  assert got == pytest.approx(expected, rel=1e-4)
  assert sums['weight'] == pytest.approx(weight, rel=1e-5)
  for step, (overlap, of) in enumerate(overlaps, 1):
    assert sums[f'overlap_{step}'].total == pytest.approx(overlap, rel=1e-4)
    assert sums[f'overlap_{step}'].weight == pytest.approx(of, rel=1e-5)
  if loss == draft_head.TV:  # 1 - overlap, by definition
    both = sum(0.7**i * (of - o) for i, (o, of) in enumerate(overlaps))
    assert got == pytest.approx(both, rel=1e-4)


def test_values_that_no_run_can_use_are_refused():
  for fields, message in (
    ({'loss': 'mse'}, "objective.loss: got 'mse', expected one of kl, tv"),
    ({'num_steps': 0}, 'num_steps: got 0, expected at least 1'),
    ({'step_decay': 0.0}, 'step_decay: got 0.0, expected a number above'),
  ):
    with pytest.raises(ValueError, match=message):
      draft_head.DraftHead(**fields).validate()
  objective = draft_head.DraftHead(num_ids=V + 1)
  with pytest.raises(ValueError, match=f'got {V + 1}, expected at most the'):
    objective.init_heads(MODEL, jax.random.key(0))
  fields = {'model': MODEL, 'objective': draft_head.DraftHead()}
  with pytest.raises(ValueError, match="init_from: got '' for a draft head"):
    tiny_experiment.make(**fields).validate()
  fields |= {
    'init_from': 'base',
    'adapter': adapter_config.AdapterConfig(rank=2),
  }
  with pytest.raises(ValueError, match='rank: got 2 with DraftHead, expected'):
    tiny_experiment.make(**fields).validate()
