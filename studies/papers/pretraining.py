"""Measurements of claims about pretraining: runs of experiments, by seed."""

import dataclasses
import pathlib

import numpy as np

from evals import claims as claims_lib
from experiments import (
  muon_against_adamw,
  mup_transfer as mup_page,
  shakespeare_char,
  wsd_against_cosine,
)
from studies.common import quiet_run, rate_grid
from studies.papers import port
from training import experiment as experiment_lib
from training.reporting import metrics

_WIDE = 256  # width of a model, four times the base
_LOG2_RATES = -10, -9, -8, -7, -6


def shakespeare_cpu(
  claim: claims_lib.Claim, setting: port.Setting
) -> port.Measured:
  """Returns the validation loss of each seed."""
  experiment = shakespeare_char.get_config('cpu')
  experiment = dataclasses.replace(
    experiment,
    data=dataclasses.replace(
      experiment.data, path=setting.inputs['tiny_shakespeare']
    ),
  )
  (quantity,) = claim.quantities
  return {
    quantity.name: [_loss(experiment, seed, setting) for seed in setting.seeds]
  }


def muon_ahead(claim: claims_lib.Claim, setting: port.Setting) -> port.Measured:
  """Returns the paired difference of each seed."""
  return _differences(
    claim,
    setting,
    muon_against_adamw.get_config('muon'),
    muon_against_adamw.get_config('adamw'),
  )


def wsd_costs_nothing(
  claim: claims_lib.Claim, setting: port.Setting
) -> port.Measured:
  """Returns the paired difference of each seed."""
  return _differences(
    claim,
    setting,
    wsd_against_cosine.get_config('wsd'),
    wsd_against_cosine.get_config('cosine'),
  )


def mup_transfer(
  claim: claims_lib.Claim, setting: port.Setting
) -> port.Measured:
  """Returns how far the best rate moves from the narrow to the wide models.

  In steps of the grid, which are factors of 2. An optimum at an edge of the
  grid counts as that edge.
  """
  models = (
    ('standard', mup_page.BASE_WIDTH),  # muP is the same at this width
    ('mup', _WIDE),
    ('standard', _WIDE),
  )
  grid = rate_grid.Grid(
    experiment_of=mup_page.of_width,
    rates=_LOG2_RATES,
    seeds=setting.seeds,
    num_steps=100,
    kept=setting.workdir / 'losses.jsonl',
  )
  losses = grid.measure(models)

  def best(model: tuple[str, int], seed: int) -> float:
    by_rate = [losses[*model, rate][seed] for rate in _LOG2_RATES]
    found = rate_grid.optimum(_LOG2_RATES, by_rate)
    return _LOG2_RATES[int(np.argmin(by_rate))] if found is None else found

  narrow, *wide = models
  return {
    quantity.name: [
      best(model, i) - best(narrow, i) for i in range(len(setting.seeds))
    ]
    for quantity, model in zip(claim.quantities, wide, strict=True)
  }


def _differences(claim, setting, side, reference) -> port.Measured:
  (quantity,) = claim.quantities
  return {
    quantity.name: [
      _loss(side, seed, setting) - _loss(reference, seed, setting)
      for seed in setting.seeds
    ]
  }


def _loss(
  experiment: experiment_lib.Experiment, seed: int, setting: port.Setting
) -> float:
  """Trains or resumes a seed; returns its validation loss, nats per token."""
  place: pathlib.Path = setting.workdir / f'{experiment.name}_{seed}'
  experiment = dataclasses.replace(experiment, seed=seed)
  result = quiet_run.run(experiment, place)
  if result.exit_code:
    raise port.Stopped(result.exit_code)
  evaluated = [r for r in metrics.read(place) if r['kind'] == 'eval']
  return evaluated[-1]['loss']
