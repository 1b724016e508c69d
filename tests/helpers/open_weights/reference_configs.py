"""A config.json with changed fields, read by transformers and by an import.

Each change has one of four results. The import refuses it and names the field
and the file; transformers refuses it or fails with it; both compute the same
logits; or there is a fault.
"""

import copy
import dataclasses
import json
import pathlib
import tempfile
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from frozen.huggingface import (
  config_json,
  importing,
  safetensors_files,
  tensor_map,
)
from models import transformer
from tests.helpers.open_weights import open_weights

REFUSED, OUTSIDE, EQUAL, FAULT = 'refused', 'outside', 'equal', 'fault'
WHERE = 'a/config.json'
# Past windows of 9 and 11 and past trained lengths of 16 and 32; ids below 30,
# which smaller vocabularies have, too.
TOKENS_BT = np.random.default_rng(0).integers(0, 30, (1, 64))
# float32 sums in another order, on logits of up to about 10.
TOLERANCE = 2e-4


class Result(NamedTuple):
  """One of the four results, and the error or the fault."""

  kind: str
  text: str = ''


class Reference:
  """A model of transformers, and its weights as an import finds them."""

  def __init__(self, name: str, directory: pathlib.Path, **overrides: Any):
    self._model = open_weights.build(name, **overrides)
    open_weights.save(self._model, directory)
    self._source = importing.open_source(directory)
    self.values = dict(self._source.values)
    self.config = self._model.config
    self.model_class = type(self._model)
    self._pieces = _names_of(self._source)
    self._params = importing.load_params(self._source, 'float32')
    ours_BTV = _apply(self._source.config, self._params)
    result = _compared(_theirs(self._model), ours_BTV, 'the logits')
    assert result.kind == EQUAL, result

  def result(
    self, values: dict[str, Any], names: tuple[str, ...], *, is_size=False
  ) -> Result:
    """Returns the result of a config.json.

    Args:
      values: all fields.
      names: of the changed fields; an error must name one of them.
      is_size: whether the names of all tensors are proof enough, and no logits
        are computed if weights of another shape are needed.
    """
    try:
      _, config = config_json.read(values, WHERE)
    except ValueError as error:
      text = str(error)
      is_named = text.startswith(WHERE) and any(n in text for n in names)
      return Result(REFUSED if is_named else FAULT, text)
    try:
      model, has_weights = self._rebuilt(values)
      logits_BTV = _theirs(model)
    except Exception as error:  # transformers has no error class of its own
      return Result(OUTSIDE, repr(error))
    source = self._source._replace(values=values, config=config)
    # A head that is tied is not saved.
    has_weights &= config.tie_embeddings == self._source.config.tie_embeddings
    if has_weights and _function(source) == _function(self._source):
      # Our program is the same, so theirs must be. Their logits of the same
      # model are computed again: the first ones of a process are not always the
      # later ones (experts differ by 8e-7 on some processors).
      same_BTV = _theirs(self._model)
      return _compared(logits_BTV, same_BTV, 'theirs alone changed')
    if has_weights:
      return _compared(logits_BTV, self._ours(source), 'the logits')
    with tempfile.TemporaryDirectory() as directory:
      model.save_pretrained(directory)
      tensors = safetensors_files.open_directory(pathlib.Path(directory))
      source = source._replace(tensors=tensors)
      if is_size:
        left = tensors.keys() ^ {theirs for theirs, _ in _names_of(source)}
        return Result(FAULT, f'tensors {left}') if left else Result(EQUAL)
      try:
        params = importing.load_params(source, 'float32')
      except ValueError as error:
        return Result(FAULT, str(error))
    ours_BTV = _apply(config, params)
    return _compared(logits_BTV, ours_BTV, 'the logits of other shapes')

  def _rebuilt(self, values):
    """Returns their model of a config, and whether it has the same weights."""
    config = type(self.config).from_dict(copy.deepcopy(values))
    config._attn_implementation = 'eager'
    model = self.model_class(config)
    try:
      model.load_state_dict(self._model.state_dict())
    except RuntimeError:  # other names or shapes
      return open_weights.randomise(model), False
    return model.eval(), True

  def _ours(self, source) -> np.ndarray:
    # Loading traces the model, which costs more than all else.
    is_same = _names_of(source) == self._pieces and (
      _is_paired(source) == _is_paired(self._source)
    )
    if is_same:
      return _apply(source.config, self._params)
    return _apply(source.config, importing.load_params(source, 'float32'))


def _names_of(source) -> list[tuple[str, tuple[str, ...]]]:
  """Returns their and our names of all parameters."""
  pieces = tensor_map.pieces(source.model_type, source.config, source.values)
  return [(piece.theirs, piece.ours) for piece in pieces]


def _is_paired(source) -> bool:
  return bool(source.values.get('rope_interleave', True))


def _function(source):
  """Returns all that decides our function of given weights."""
  trained = {'init_std': 0.02, 'max_length': 1}  # no effect here
  is_stretched = source.config.rope_scaling.kind in ('dynamic', 'longrope')
  config = dataclasses.replace(
    source.config, **({} if is_stretched else trained)
  )
  return config, _is_paired(source)


def _apply(config, params) -> np.ndarray:
  # Without jit: its operations are compiled once for all configs.
  params = jax.tree.map(jnp.asarray, params)
  model = transformer.Transformer(config)
  return np.asarray(model.apply(params, jnp.asarray(TOKENS_BT))[0])


def _theirs(model) -> np.ndarray:
  import torch

  with torch.inference_mode():
    tokens_BT = torch.tensor(TOKENS_BT)
    return model(tokens_BT, return_dict=True).logits.float().numpy()


def _compared(theirs_BTV, ours_BTV, what: str) -> Result:
  difference = np.abs(theirs_BTV - ours_BTV).max()
  if difference <= TOLERANCE:  # false for NaN
    return Result(EQUAL, 'same bits' if difference == 0 else '')
  return Result(FAULT, f'{what} differ by {difference}')


def as_json(values: dict[str, Any]) -> dict[str, Any]:
  """Returns the fields as a reader of the file sees them."""
  return json.loads(json.dumps(values))
