"""Measurements of claims about pretraining: runs of experiments, by seed."""

import dataclasses
import pathlib

from evals import claims as claims_lib
from experiments import (
  muon_against_adamw,
  shakespeare_char,
  wsd_against_cosine,
)
from studies.common import quiet_run
from studies.papers import port
from training import experiment as experiment_lib
from training.reporting import metrics


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
