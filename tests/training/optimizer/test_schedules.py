"""Every schedule against formulas of its own, written in numpy."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from training.optimizer import chain, schedules

Config = chain.OptimizerConfig
PEAK, END, WARMUP, STEPS, DECAY = 2e-3, 2e-4, 10, 50, 20

# name, fields -> learning rate of a step after the warm-up.
TABLE = {
  'constant': ({'schedule': 'constant'}, lambda step: PEAK),
  'linear': (
    {'schedule': 'linear', 'end_lr': END},
    lambda step: PEAK + (END - PEAK) * _share(step, WARMUP),
  ),
  'cosine': (
    {'schedule': 'cosine', 'end_lr': END},
    lambda step: (
      END + (PEAK - END) * (1 + math.cos(math.pi * _share(step, WARMUP))) / 2
    ),
  ),
  'wsd': (
    {'schedule': 'wsd', 'end_lr': END, 'decay_steps': DECAY},
    lambda step: PEAK + (END - PEAK) * _share(step, STEPS - DECAY),
  ),
  'wsd sqrt': (
    {
      'schedule': 'wsd',
      'end_lr': END,
      'decay_steps': DECAY,
      'decay_shape': 'sqrt',
    },
    lambda step: (
      END + (PEAK - END) * (1 - math.sqrt(_share(step, STEPS - DECAY)))
    ),
  ),
  'inverse_sqrt': (
    {'schedule': 'inverse_sqrt'},
    lambda step: PEAK / math.sqrt(step / WARMUP),
  ),
}


def _share(step, first):
  """How far a step is on the way from the first to the last."""
  return min(max((step - first) / (STEPS - first), 0), 1)


def _rates(fields, *, warmup_steps=WARMUP, num_steps=STEPS):
  config = Config(**{'peak_lr': PEAK, 'warmup_steps': warmup_steps} | fields)
  config.validate(num_steps)
  schedule = chain.make_schedule(config, num_steps)
  return np.array(jax.vmap(schedule)(jnp.arange(num_steps + 1)))


def test_the_table_has_every_schedule():
  assert {fields['schedule'] for fields, _ in TABLE.values()} == set(
    schedules.SCHEDULES
  )


@pytest.mark.parametrize('name', TABLE)
def test_every_step_has_the_rate_of_the_formula(name):
  fields, formula = TABLE[name]
  rates = _rates(fields)
  expected = [
    PEAK * step / WARMUP if step < WARMUP else formula(step)
    for step in range(STEPS + 1)
  ]
  # float32, of numbers down to a tenth of the peak.
  np.testing.assert_allclose(rates, expected, rtol=2e-6, atol=1e-9)


@pytest.mark.parametrize('name', TABLE)
def test_rates_rise_to_the_peak_and_never_again(name):
  fields, formula = TABLE[name]
  rates = _rates(fields)
  assert rates[0] == 0
  assert rates[WARMUP] == pytest.approx(PEAK)
  assert (np.diff(rates[: WARMUP + 1]) > 0).all()
  # Up to the rounding of float32.
  assert (np.diff(rates[WARMUP:]) <= 1e-6 * PEAK).all()
  assert rates[-1] == pytest.approx(formula(STEPS), rel=1e-5)


@pytest.mark.parametrize('name', [n for n in TABLE if n != 'inverse_sqrt'])
def test_without_warmup_the_first_step_has_the_peak_rate(name):
  assert _rates(TABLE[name][0], warmup_steps=0)[0] == pytest.approx(PEAK)


@pytest.mark.parametrize('name', ['linear', 'cosine'])
def test_a_run_of_nothing_but_warmup_ends_before_the_peak(name):
  rates = _rates(TABLE[name][0], num_steps=WARMUP)
  np.testing.assert_allclose(
    rates[:-1], PEAK * np.arange(WARMUP) / WARMUP, rtol=2e-6
  )


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    ({'schedule': 'step'}, "schedule: got 'step', expected one of constant, l"),
    ({'peak_lr': -1.0}, 'peak_lr: got -1.0, expected > 0'),
    ({'peak_lr': float('nan')}, 'peak_lr: got nan, expected > 0'),
    ({'peak_lr': float('inf')}, 'peak_lr: got inf, expected a finite number'),
    ({'end_lr': -1e-4}, 'end_lr: got -0.0001, expected >= 0'),
    (
      {'peak_lr': 1e-5},
      'end_lr: got 0.0001, expected at most optimizer.peak_lr = 1e-05',
    ),
    ({'warmup_steps': -1}, 'warmup_steps: got -1, expected >= 0'),
    ({'warmup_steps': 51}, 'warmup_steps = 51 and decay_steps = 0, expected'),
    ({'schedule': 'wsd'}, 'decay_steps: got 0, expected > 0 with schedule wsd'),
    (
      {'schedule': 'wsd', 'decay_steps': -3},
      'decay_steps: got -3, expected > 0 with schedule wsd',
    ),
    (
      {'schedule': 'wsd', 'decay_steps': 5, 'decay_shape': 'cosine'},
      "decay_shape: got 'cosine', expected one of linear, sqrt",
    ),
    (
      {'decay_steps': 5},
      "decay_steps: got 5 with schedule 'cosine', which does not use it",
    ),
    (
      {'decay_shape': 'sqrt'},
      "decay_shape: got sqrt with schedule 'cosine', which does not use it",
    ),
    (
      {'schedule': 'constant', 'end_lr': 0.0},
      "end_lr: got 0.0 with schedule 'constant', which does not use it",
    ),
    (
      {'schedule': 'inverse_sqrt', 'warmup_steps': 0},
      'warmup_steps: got 0, expected > 0 with schedule inverse_sqrt',
    ),
  ],
)
def test_impossible_schedules_are_refused(fields, message):
  with pytest.raises(ValueError, match=message):
    Config(**{'warmup_steps': 1, **fields}).validate(STEPS)
