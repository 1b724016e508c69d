"""Measurements of claims about learning in context."""

from collections.abc import Mapping
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from data.synthetic import markov, repeats
from evals import claims as claims_lib
from models import model_config
from studies.papers import port, small_models

_STATES, _LENGTH = 3, 100  # of chains
_IDS, _ROW, _BLOCK = 16, 40, (5, 14)  # of repeated tokens
_EXAMPLES, _DIMENSION = 10, 10  # of regression
_STEPS, _TASKS = 4000, 256  # of its training, tasks of each step


def gd_in_context(
  claim: claims_lib.Claim, setting: port.Setting
) -> port.Measured:
  """Returns a layer of linear attention beside one step of descent."""
  pairs = [_layer_and_step(seed) for seed in setting.seeds]
  ratio, correlation = claim.quantities
  return {
    ratio.name: [ratio for ratio, _ in pairs],
    correlation.name: [correlation for _, correlation in pairs],
  }


def _tasks(key: jax.Array, num_tasks: int) -> tuple[jax.Array, jax.Array]:
  """Returns x, [B, P + 1, D], and y = w x, [B, P + 1]; the last is asked."""
  x_key, w_key = jax.random.split(key)
  shape = num_tasks, _EXAMPLES + 1, _DIMENSION
  x_BPD = jax.random.uniform(x_key, shape, minval=-1, maxval=1)
  w_BD = jax.random.normal(w_key, (num_tasks, _DIMENSION))
  return x_BPD, jnp.einsum('BPD,BD->BP', x_BPD, w_BD)


def _attended(params, x_BPD: jax.Array, y_BP: jax.Array) -> jax.Array:
  """Returns the answers of linear attention to the last points, [B].

  A token is (x, y), and that of the question (x, 0). The layer adds
  V sum_p (e_p e_p' K q) to the question, of which y is read.
  """
  tokens_BPE = jnp.concatenate([x_BPD, y_BP[..., None]], axis=-1)
  asked_BE = tokens_BPE[:, -1].at[:, -1].set(0)
  tokens_BPE = tokens_BPE[:, :-1]
  scores_BP = jnp.einsum('BPE,EF,BF->BP', tokens_BPE, params['keys'], asked_BE)
  return jnp.einsum('BP,BPE,E->B', scores_BP, tokens_BPE, params['values'])


def _layer_and_step(seed: int) -> tuple[float, float]:
  """Returns the ratio of losses and the correlation of predictions."""
  width = _DIMENSION + 1
  optimizer = optax.adam(optax.cosine_decay_schedule(5e-3, _STEPS))
  keys = jax.random.split(jax.random.key(seed), 4)
  start = {
    'keys': 0.1 * jax.random.normal(keys[0], (width, width)),
    'values': 0.1 * jax.random.normal(keys[1], (width,)),
  }

  def loss(params, key):
    x_BPD, y_BP = _tasks(key, _TASKS)
    return jnp.mean((_attended(params, x_BPD, y_BP) - y_BP[:, -1]) ** 2)

  def step(carry, key):
    params, state = carry
    updates, state = optimizer.update(jax.grad(loss)(params, key), state)
    return (optax.apply_updates(params, updates), state), None

  @jax.jit
  def train(key):
    carry = start, optimizer.init(start)
    return jax.lax.scan(step, carry, jax.random.split(key, _STEPS))[0][0]

  x_BPD, y_BP = _tasks(keys[3], 50_000)
  learnt_B = np.asarray(_attended(train(keys[2]), x_BPD, y_BP))
  # One step from w = 0: rate x sum_p y_p x_p, asked at the last x.
  step_B = np.einsum(
    'BP,BPD,BD->B', y_BP[:, :-1], x_BPD[:, :-1], x_BPD[:, -1], optimize=True
  )
  asked_B = np.asarray(y_BP[:, -1])
  step_B = step_B * (step_B @ asked_B / (step_B @ step_B))
  losses = [np.mean((each - asked_B) ** 2) for each in (learnt_B, step_B)]
  correlation = np.corrcoef(learnt_B, step_B)[0, 1]
  return float(losses[0] / losses[1]), float(correlation)


def attention_only(
  num_layers: int, width: int, vocab_size: int, length: int
) -> model_config.ModelConfig:
  """Returns a transformer whose layers are attention alone."""
  made = small_models.gpt(width, vocab_size, length, num_layers=num_layers)
  return dataclasses.replace(made, mlp='none', mlp_width=0)


def markov_in_context(
  claim: claims_lib.Claim, setting: port.Setting
) -> port.Measured:
  """Returns floors of chains, and losses of one and two layers above them."""
  del claim
  floors, excess, gap = [], [], []
  for seed in setting.seeds:
    chains = markov.draw(
      np.random.default_rng([seed, 2]), 2048, _LENGTH, _STATES
    )
    floor = markov.floors(chains)
    one, two = (
      _trained_on_chains(num_layers, seed, chains.states_BT, setting)
      for num_layers in (1, 2)
    )
    floors.append(floor)
    excess.append(two['loss'] - floor.bigram)
    gap.append(one['loss'] - two['loss'])
  return {
    'bigram floor, nats': [floor.bigram for floor in floors],
    'unigram floor, nats': [floor.unigram for floor in floors],
    'two layers above the bigram floor, nats': excess,
    'one layer above two, nats': gap,
  }


def _trained_on_chains(
  num_layers: int, seed: int, states_BT: np.ndarray, setting: port.Setting
) -> Mapping[str, float]:
  recipe = small_models.Recipe(
    model=attention_only(num_layers, 32, _STATES, _LENGTH),
    optimizer=small_models.adam(3e-3),
    num_steps=2000,
    look_every=200,
  )

  def draw(rng):
    drawn = markov.draw(rng, 16, _LENGTH, _STATES).states_BT
    return drawn, np.ones(drawn.shape, bool)

  def measure():
    trainer = small_models.Trainer(recipe)
    nll_BT, _ = trainer.seen(trainer.last(seed, draw), states_BT)
    return {'loss': float(nll_BT.mean())}

  return small_models.kept(
    setting, recipe, f'layers_{num_layers}', seed, measure
  )


def induction(claim: claims_lib.Claim, setting: port.Setting) -> port.Measured:
  """Returns how well one and two layers continue tokens that repeat."""
  del claim
  runs = [
    [_trained_on_repeats(layers, seed, setting) for seed in setting.seeds]
    for layers in (1, 2)
  ]
  return {
    'two layers, right repeated tokens': [run['right'] for run in runs[1]],
    'two layers less one, right repeated tokens': [
      two['right'] - one['right'] for one, two in zip(*runs, strict=True)
    ],
    'two layers, share of the fall in one tenth of the steps': [
      run['sharpness'] for run in runs[1]
    ],
  }


def _trained_on_repeats(
  num_layers: int, seed: int, setting: port.Setting
) -> Mapping[str, float]:
  recipe = small_models.Recipe(
    model=attention_only(num_layers, 32, _IDS, _ROW),
    optimizer=small_models.adam(3e-3),
    num_steps=3000,
    look_every=100,
  )
  draw = functools.partial(
    repeats.draw, num_rows=32, length=_ROW, num_ids=_IDS, block=_BLOCK
  )

  def measure():
    trainer = small_models.Trainer(recipe)
    ids_BT, is_known_BT = draw(np.random.default_rng([seed, 2]))
    is_known_BT = is_known_BT[:, 1:]
    losses, right = [], 0.0
    for _, params in trainer.run(seed, _all_trained(draw)):
      nll_BT, is_right_BT = trainer.seen(params, ids_BT)
      losses.append(float(nll_BT[is_known_BT].mean()))
      right = float(is_right_BT[is_known_BT].mean())
    return {'right': right, 'sharpness': _sharpness(losses)}

  return small_models.kept(
    setting, recipe, f'layers_{num_layers}', seed, measure
  )


def _all_trained(draw):
  def drawn(rng):
    ids_BT, _ = draw(rng)
    return ids_BT, np.ones(ids_BT.shape, bool)

  return drawn


def _sharpness(losses: list[float]) -> float:
  """Returns the largest part of the whole fall in a tenth of the steps."""
  span = (len(losses) - 1) // 10
  falls = np.subtract(losses[:-span], losses[span:])
  return float(falls.max() / (losses[0] - min(losses)))
