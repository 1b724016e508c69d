"""Frozen models beside the trained model: a reference, a teacher.

An objective names them in `models_needed`. Each frozen model is read from its
frozen directory, laid out over the devices by the same rules as the trained
model, and never updated. Checkpoints do not hold frozen models. run.json
records their digests; a resumed run reads them again and compares.
"""

from collections.abc import Mapping
import dataclasses
import pathlib
from typing import Any

import jax
import numpy as np

from checks import paths
from frozen import format as frozen_format, manifest as manifest_lib
from models import layout, model_config
from storage import file_names
from text import tokenizer as tokenizer_lib
from training.objectives import port


def config_of(
  name: str, source: port.ModelSource, vocab_size: int
) -> model_config.ModelConfig:
  """Returns the config of a frozen model, with its layers stacked if alike.

  Args:
    name: in the objective's `models_needed`.
    source: where its weights are.

  Raises:
    ValueError: there is no frozen directory, it is damaged, or its model has
      another vocabulary.
  """
  try:
    manifest = manifest_lib.read(_directory(name, source))
    config = frozen_format.read_config(_directory(name, source))
  except FileNotFoundError:
    raise _absent(name, source) from None
  manifest.check_language_model(f'objective.{name}', source.path)
  if config.vocab_size != vocab_size:
    raise ValueError(
      f'objective.{name}: got a model of {config.vocab_size} tokens, expected'
      f' model.vocab_size = {vocab_size}: both read the same batches; use a'
      ' model with the same tokenizer'
    )
  return dataclasses.replace(
    config, scan_layers=config.is_uniform, dropout_rate=0.0
  )


def _absent(name: str, source: port.ModelSource) -> ValueError:
  return ValueError(
    f'objective.{name}: got {source.path!r}, expected a frozen directory; make'
    ' one with `python -m frozen.huggingface import` or `python -m'
    ' frozen.freeze`'
  )


def _directory(name: str, source: port.ModelSource) -> pathlib.Path:
  return pathlib.Path(paths.expanded(f'objective.{name}', source.path))


def read(source: port.ModelSource, config: model_config.ModelConfig) -> Any:
  """Reads and verifies the variables of a frozen model."""
  frozen = frozen_format.read_whole(_directory('path', source))
  params, unstacked = layout.unstack(frozen.params, frozen.config)
  return layout.stack(params, unstacked)[0] if config.scan_layers else params


def place(params: Any, abstract: Any) -> Any:
  """Sends parameters of any float dtype to the devices."""
  # Each device receives only its own part.
  return jax.tree.map(
    lambda x, like: jax.device_put(
      np.asarray(x).astype(like.dtype), like.sharding
    ),
    params,
    abstract,
  )


def resolved(source: port.ModelSource, init_from: str) -> port.ModelSource:
  """Returns the source; a source without a path becomes `config.init_from`."""
  return source if source.path else port.ModelSource(init_from)


def needed(
  objective: port.Objective, init_from: str
) -> dict[str, port.ModelSource]:
  """Returns the sources of the models that each step reads, by name."""
  return {
    name: resolved(source, init_from)
    for name, source in objective.models_needed.items()
  }


def is_same(one: str, other: str) -> bool:
  """Returns whether two paths name one frozen directory, or equal weights."""
  if not one or not other:
    return False
  places = [
    pathlib.Path(paths.expanded('objective.reference', path)).resolve()
    for path in (one, other)
  ]
  if places[0] == places[1]:
    return True
  try:
    digests = {manifest_lib.read(place).weights_digest for place in places}
  except (OSError, ValueError):
    return False  # reading the weights explains why
  return len(digests) == 1


def refuse_same(name: str, teacher: str, init_from: str) -> None:
  """Raises ValueError if a policy would only imitate the weights of its start.

  Their distance is 0 at its least, and the policy would start there.
  """
  if is_same(teacher, init_from):
    raise ValueError(
      f'{name}: got the weights of config.init_from ({init_from}), expected'
      ' another model: a policy that only imitates its teacher learns nothing'
      f' from itself; set {name} to a teacher'
    )


def check_tokenizers(
  objective: port.Objective, init_from: str, tokenizer: tokenizer_lib.Tokenizer
) -> None:
  """Refuses frozen models with other token ids than the run.

  Raises:
    ValueError: names the model, and the first id that differs.
  """
  for name, source in objective.frozen_sources.items():
    source = resolved(source, init_from)
    # A run may add tokens to the tokens of its own start.
    is_whole = not is_same(source.path, init_from)
    check_tokenizer(
      f'objective.{name}',
      _directory(name, source),
      tokenizer,
      is_whole=is_whole,
    )


def check_tokenizer(
  name: str,
  directory: pathlib.Path,
  tokenizer: tokenizer_lib.Tokenizer,
  *,
  is_whole: bool,
) -> None:
  """Refuses a tokenizer whose ids differ from the ids of a frozen directory.

  Args:
    name: of the value that names the directory, for errors.
    directory: the frozen directory.
    tokenizer: tokenizer of the run.
    is_whole: whether it must have no ids after the ids of the directory.

  Raises:
    ValueError: names the first id that differs.
  """
  place = directory / file_names.TOKENIZER
  frozen = tokenizer_lib.load(place)
  names = {i: token for token, i in tokenizer.special_tokens.items()}
  frozen_names = {i: token for token, i in frozen.special_tokens.items()}
  sizes = tokenizer.vocab_size, frozen.vocab_size
  for i in range(max(sizes) if is_whole else frozen.vocab_size):
    got = expected = 'no such id'
    if i < tokenizer.vocab_size:
      got = names.get(i) or tokenizer.token_bytes(i)
    if i < frozen.vocab_size:
      expected = frozen_names.get(i) or frozen.token_bytes(i)
    if got != expected:
      raise ValueError(
        f'data.tokenizer: got {got!r} for id {i}, expected {expected!r} as in'
        f' {place}: the weights of {name} were trained with it;'
        f' set data.tokenizer.kind to directory and its path to {place}'
      )


def digest_of(name: str, source: port.ModelSource) -> str:
  """Returns the digest of a frozen model's weights.

  Raises:
    ValueError: there is no frozen directory, or its manifest is damaged.
  """
  try:
    return manifest_lib.read(_directory(name, source)).weights_digest
  except FileNotFoundError:
    raise _absent(name, source) from None


def lineage(objective: port.Objective, init_from: str = '') -> dict[str, str]:
  """Returns the digest of each frozen model's weights, by its name."""
  sources = objective.frozen_sources
  return {
    name: digest_of(name, resolved(source, init_from))
    for name, source in sources.items()
  }


def check_lineage(
  objective: port.Objective, init_from: str, recorded: Mapping[str, str]
) -> None:
  """Raises ValueError if a run would resume with another frozen model."""
  for name, digest in lineage(objective, init_from).items():
    if recorded.get(name) != digest:
      raise ValueError(
        f'objective.{name}: got a model with weights {digest[:12]}, expected'
        f' {recorded.get(name, "none")[:12]} as before; set its path back, or'
        ' use another --workdir'
      )
