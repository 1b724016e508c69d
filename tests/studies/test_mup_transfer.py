"""The optimum of a grid, and the learning rate as an argument of a program."""

import dataclasses
import math

import jax
import numpy as np
import pytest

from experiments import mup_transfer as page
from studies import mup_transfer
from studies.common import rate_grid
from tests.helpers import tiny_models
from training import learner as learner_lib


def test_the_optimum_is_the_vertex_of_the_parabola():
  rates = list(range(-9, -2))
  losses = [(rate + 6.3) ** 2 + 1.0 for rate in rates]
  assert rate_grid.optimum(rates, losses) == pytest.approx(-6.3)


@pytest.mark.parametrize(
  'losses', [[1.0, 2.0, 3.0], [3.0, 2.0, 1.0], [2.0, 1.0, math.nan]]
)
def test_an_optimum_at_the_edge_is_none(losses):
  assert rate_grid.optimum([-3, -2, -1], losses) is None


@pytest.mark.slow
def test_the_rate_as_an_argument_is_the_rate_of_the_optimizer():
  experiment = page.get_config('mup-128')
  experiment = dataclasses.replace(
    experiment,
    model=tiny_models.llama_like(mup_base_width=12),
    data=dataclasses.replace(experiment.data, row_length=16, batch_size=8),
    num_steps=12,
  )
  batches = [tiny_models.batch(seed=seed) for seed in range(12)]
  rate = 2.0**-6
  experiment.optimizer.peak_lr = rate
  learner = learner_lib.make(experiment, jax.devices()[:1])
  state, train_step = learner.init(jax.random.key(0)), None
  train_step = learner.compile_train_step()
  for batch in batches:
    state, _ = train_step(state, learner.placement.put_batch(batch))
  sums = learner.compile_eval_step()(
    state.params, learner.placement.put_batch(batches[0])
  )
  experiment.optimizer.peak_lr = 1.0
  loss = rate_grid.Model(experiment).loss(rate, 0, batches, batches[:1])
  # Float32 rounding over 12 steps.
  assert loss == pytest.approx(
    float(sums['loss']) / float(sums['weight']), rel=1e-5
  )


def test_panels_have_a_line_per_width():
  losses = {
    (kind, width, rate): [float(abs(rate + 6) + 2)]
    for kind in mup_transfer.KINDS
    for width in (64, 128)
    for rate in (-7, -6, -5)
  }
  standard, mup = mup_transfer.panels(losses, [-7, -6, -5])
  assert (standard.title, mup.title) == ('standard parametrisation', 'muP')
  assert set(mup.lines) == {'width 64', 'width 128'}
  assert mup.lines['width 64'].y == [3.0, 2.0, 3.0]
  assert np.isclose(standard.y_limits[0], 1.95)
