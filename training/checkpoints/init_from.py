"""Where a run's first weights come from if not from chance: what was frozen.

Fine-tuning, and going on with weights that were imported
(`python -m frozen.huggingface import`). The model of such a run is the frozen
one: `model_of` gives it to an experiment, `read` refuses any other. What was
frozen is rounded to the dtype that it is served in; from there on the run's
parameters are float32, as those of any run.
"""

import dataclasses
import pathlib
from typing import Any

from frozen import format as frozen_format, manifest as manifest_lib
from models import layout, model_config
from training import experiment as experiment_lib, frozen_models

# Of training alone, or how parameters lie: not part of what weights compute.
_FREE = (
  'scan_layers',
  'dropout_rate',
  'init_std',
  'balance_loss_weight',
  'router_z_weight',
  'max_length',
)


def model_of(directory: str) -> model_config.ModelConfig:
  """Returns the model of a frozen directory, with its layers stacked if alike.

  Args:
    directory: as the variant of an experiment names it.

  Raises:
    ValueError: there is no frozen directory, or it is damaged.
  """
  try:
    config = frozen_format.read_config(directory)
  except FileNotFoundError:
    raise ValueError(
      f'variant: got {directory!r}, expected a frozen directory; make one with'
      ' `python -m frozen.huggingface import` or `python -m frozen.freeze`'
    ) from None
  return dataclasses.replace(config, scan_layers=config.is_uniform)


def lineage(experiment: experiment_lib.Experiment) -> dict[str, str]:
  """Returns the digests of the weights that a run begins with, by role."""
  digests = frozen_models.lineage(experiment.objective)
  if experiment.init_from:
    manifest = manifest_lib.read(pathlib.Path(experiment.init_from))
    digests['init_from'] = manifest.weights_digest
  return digests


def read(experiment: experiment_lib.Experiment) -> Any:
  """Reads and verifies the weights that `experiment.init_from` names.

  Returns:
    Variables of the experiment's model, in the dtype that they were frozen in.

  Raises:
    FileNotFoundError: there is no frozen directory.
    ValueError: it is damaged, or its model is not the experiment's.
  """
  frozen = frozen_format.read(experiment.init_from)
  got, wanted = frozen.config.to_dict(), experiment.model.to_dict()
  differing = [
    f'model.{name}: {wanted[name]!r}, frozen {got[name]!r}'
    for name in wanted
    if name not in _FREE and got[name] != wanted[name]
  ]
  if frozen.config.positions == 'learned' and (
    got['max_length'] != wanted['max_length']
  ):
    differing.append(
      f'model.max_length: {wanted["max_length"]}, frozen {got["max_length"]}'
    )
  if differing:
    raise ValueError(
      f'config.init_from = {experiment.init_from}: got another model than the'
      f' one that was frozen ({"; ".join(differing)}), expected the same; take'
      ' the model of the directory, as experiments/finetune.py does'
    )
  params, config = layout.unstack(frozen.params, frozen.config)
  if experiment.model.scan_layers:
    params, _ = layout.stack(params, config)
  return params
