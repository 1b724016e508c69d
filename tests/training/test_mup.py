"""The coordinate check: under muP a step moves wide models as far as narrow.

Appendix D.1 of arXiv:2203.03466. A few steps of Adam at one learning rate, and
by how much each activation moved since initialisation, as the exponent of the
width: 0 is what muP promises; without it, logits move by as much more as the
model is wider.

At widths so small the head's initial values still matter: their part of what
the logits move by fades as 1 / sqrt(width). Over four seeds exponents were from
-0.27 (logits) to 0.02 with muP, from 0.9 (logits) to 1.7 without.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from models import mup, transformer
from tests.helpers import tiny_models
from training.objectives import next_token, port

WIDTHS = 64, 128, 256
NUM_STEPS = 4
LEARNING_RATE = 0.003
BAND = 0.35

# Two ways of growing: as wide heads, or as many.
SHAPES = {
  'wider_heads': lambda width: {
    'num_heads': 4,
    'num_kv_heads': 4,
    'head_width': width // 4,
    'mup_base_head_width': WIDTHS[0] // 4,
  },
  'more_heads': lambda width: {
    'num_heads': width // 8,
    'num_kv_heads': width // 8,
    'head_width': 8,
  },
}


def _config(shape, width, *, is_mup):
  fields = SHAPES[shape](width)
  if not is_mup:
    fields['mup_base_head_width'] = 0
  return tiny_models.llama_like(
    model_width=width,
    mlp_width=2 * width,
    mup_base_width=WIDTHS[0] if is_mup else 0,
    **fields,
  )


def _activations(model, params, tokens_BT):
  """Returns what each block adds to the stream, and the logits."""
  (logits_BTV, _), kept = model.apply(
    params,
    tokens_BT,
    capture_intermediates=lambda module, _: module.name in ('attention', 'mlp'),
    mutable=['intermediates'],
  )
  found = {'logits': logits_BTV}
  for layer, modules in kept['intermediates'].items():
    for name, calls in modules.items():
      (output,) = calls['__call__']
      found[f'{layer}.{name}'] = output[0] if name == 'attention' else output
  return found


@functools.partial(jax.jit, static_argnums=0)
def _movement(config, seed):
  """Trains, and returns the mean absolute change of each activation."""
  model = transformer.Transformer(config)
  batch = tiny_models.batch(batch_size=8, row_length=16)

  def loss(params):
    total, sums = next_token.NextToken()(params, batch, port.Model(model))
    return total / sums['weight']

  params = model.init(jax.random.key(seed), jnp.zeros((1, 1), jnp.int32))
  multipliers = mup.lr_multipliers(config, params)
  adam = optax.adam(LEARNING_RATE, b2=0.95)

  def step(carry, _):
    params, state = carry
    updates, state = adam.update(jax.grad(loss)(params), state)
    updates = jax.tree.map(jnp.multiply, updates, multipliers)
    return (optax.apply_updates(params, updates), state), None

  start = params, adam.init(params)
  (trained, _), _ = jax.lax.scan(step, start, length=NUM_STEPS)
  return jax.tree.map(
    lambda a, b: jnp.mean(jnp.abs(a - b)),
    _activations(model, trained, batch['tokens']),
    _activations(model, params, batch['tokens']),
  )


def _exponents(shape, widths=WIDTHS, **options):
  """Returns the slope of log movement over log width, of each activation."""
  moved = [_movement(_config(shape, width, **options), 0) for width in widths]

  def slope(name):
    sizes = [found[name] for found in moved]
    return float(np.polyfit(np.log(widths), np.log(sizes), 1)[0])

  return {name: slope(name) for name in moved[0]}


@pytest.mark.slow
@pytest.mark.parametrize(
  'shape', ['wider_heads', pytest.param('more_heads', marks=pytest.mark.slow)]
)
def test_every_activation_moves_alike_at_every_width(shape):
  exponents = _exponents(shape, is_mup=True)
  assert len(exponents) == 5
  assert max(np.abs(list(exponents.values()))) < BAND, exponents


@pytest.mark.slow
def test_without_it_wide_models_move_farther():
  """And the check can fail."""
  exponents = _exponents('wider_heads', WIDTHS[::2], is_mup=False)
  assert min(exponents.values()) > 2 * BAND, exponents
