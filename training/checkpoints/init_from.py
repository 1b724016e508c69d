"""Runs that start from frozen weights, as for fine-tuning.

The weights may come from another run, or from an import
(`python -m frozen.huggingface import`). The run must have the model of the
frozen directory: an experiment gets it from `model_of`, and `read` refuses any
other model. Frozen weights are rounded to their serving dtype. The run trains
them in float32, as every run does.
"""

from collections.abc import Sequence
import dataclasses
import functools
import pathlib
from typing import Any

import jax

from checks import paths
from data import data_config
from frozen import format as frozen_format, freeze, manifest as manifest_lib
from models import layout, model_config
from storage import file_names
from text import tokenizer as tokenizer_lib
from training import experiment as experiment_lib
from training.frozen_inputs import frozen_models

# Model fields that may differ. They matter in training only, or change the
# layout of the parameters, not the function that the weights compute.
_FREE = (
  'scan_layers',
  'dropout_rate',
  'init_std',
  'balance_loss_weight',
  'router_z_weight',
  'max_length',
  'spare_ids',
)


def model_of(directory: str) -> model_config.ModelConfig:
  """Returns the model config of a frozen directory.

  Equal layers are stacked (`scan_layers`). The tokenizer of the run says which
  ids are spare.

  Raises:
    ValueError: there is no frozen directory, or it is damaged.
  """
  try:
    config = frozen_format.read_config(paths.expanded('variant', directory))
  except FileNotFoundError:
    raise ValueError(
      f'variant: got {directory!r}, expected a frozen directory; make one with'
      ' `python -m frozen.huggingface import` or `python -m frozen.freeze`'
    ) from None
  return dataclasses.replace(
    config, scan_layers=config.is_uniform, spare_ids=()
  )


def tokenizer_of(directory: str) -> data_config.TokenizerConfig:
  """Returns the settings that load the tokenizer of a frozen directory."""
  return data_config.TokenizerConfig(
    kind='directory', path=f'{directory}/{file_names.TOKENIZER}'
  )


def describe(
  experiment: experiment_lib.Experiment, stop_ids: Sequence[int] = ()
) -> dict[str, Any]:
  """Returns the weights that a run begins with, as fields of run.json.

  Args:
    experiment: validated.
    stop_ids: besides EOS, the ids that the run trains to end an answer with.

  Returns:
    `lineage`, their digests by role, and `base`, the chat template and all else
    of `init_from` that is frozen again (`frozen.freeze.base_of`).
  """
  start, base = experiment.init_from, {}
  digests = frozen_models.lineage(experiment.objective, start)
  if start:
    manifest = manifest_lib.read(directory(experiment))
    digests['init_from'] = manifest.weights_digest
    base = freeze.base_of(directory(experiment))
  if experiment.data.examples != data_config.TEXT:
    # The run trains answers of this form.
    base = {**base, 'chat_template': chat_template(experiment)}
    generation = dict(base.get('generation', freeze.DEFAULT_GENERATION))
    known = generation.get('stop_ids', ())
    if unknown := [i for i in stop_ids if i not in known]:
      # Without these ids, a server would generate past the end of an answer.
      generation['stop_ids'] = [*known, *unknown]
    base['generation'] = generation
  return {'lineage': digests, 'base': base}


def chat_template(experiment: experiment_lib.Experiment) -> str:
  """Returns the chat template of a run on records; '': the plain transcript.

  Raises:
    ValueError: it cannot be read.
  """
  given = experiment.data.chat_template
  if '{%' in given or '{{' in given:
    return given
  if given:
    path = paths.expanded('data.chat_template', given)
    try:
      return pathlib.Path(path).read_text(encoding='utf-8')
    except (OSError, UnicodeDecodeError) as error:
      raise ValueError(
        f'data.chat_template: got {given!r} ({error}), expected Jinja source or'
        ' a file with it'
      ) from None
  if experiment.init_from:
    return frozen_format.read_chat_template(directory(experiment))
  return ''


def directory(experiment: experiment_lib.Experiment) -> pathlib.Path:
  """Returns the frozen directory that a run starts from."""
  return pathlib.Path(paths.expanded('config.init_from', experiment.init_from))


def check_tokenizer(
  experiment: experiment_lib.Experiment, tokenizer: tokenizer_lib.Tokenizer
) -> None:
  """Refuses a tokenizer whose ids differ from the ids of `init_from`.

  It may have further tokens after the ids of the frozen directory.

  Raises:
    FileNotFoundError: there is no frozen directory.
    ValueError: names the first id that differs.
  """
  if not experiment.init_from:
    return
  manifest_lib.read(directory(experiment))  # raises if there is none
  frozen_models.check_tokenizer(
    'config.init_from', directory(experiment), tokenizer, is_whole=False
  )


def read(experiment: experiment_lib.Experiment) -> Any:
  """Returns the verified weights of `experiment.init_from`, in their dtype.

  Raises:
    FileNotFoundError: there is no frozen directory.
    ValueError: it is damaged, or its model is not the experiment's.
  """
  frozen = frozen_format.read_whole(directory(experiment))
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
  params, config = layout.unstack(
    _with_own_heads(frozen, experiment), frozen.config
  )
  if experiment.model.scan_layers:
    params, _ = layout.stack(params, config)
  return params


def _with_own_heads(
  frozen: frozen_format.Frozen, experiment: experiment_lib.Experiment
) -> Any:
  """Returns the weights; a reward model's head is for a reward objective."""
  heads = jax.eval_shape(
    functools.partial(experiment.objective.init_heads, experiment.model),
    jax.random.key(0),
  )
  if set(frozen.manifest.heads) - set(heads or {}):
    frozen.manifest.check_language_model(
      'config.init_from', experiment.init_from
    )
  return frozen.params
