"""Export: a frozen directory becomes a Hugging Face directory.

It is the reverse of `frozen.huggingface.importing`, with the same tensor maps.
A model that no family of `transformers` computes is refused before any write.

`transformers` has no mask for ids without a token. The rows of such ids at the
end of a vocabulary are left out if the model was trained here: nothing trained
them, and they would be sampled. Rows of an unchanged import are kept: their
first training made them improbable.

Kernels in fewer bits become floats, or with `form` tensors of
compressed-tensors (`frozen.huggingface.quantised.writing`).

A reward model becomes a classifier of one class, such as
LlamaForSequenceClassification, which has the same head, without bias, at the
last token. `transformers` takes the last token that is not padding.
"""

from collections.abc import Iterator, Mapping
import dataclasses
import itertools
import json
import os
import pathlib
from typing import Any, NamedTuple

import numpy as np

from checks import expect
from frozen import format as frozen_format, stored_kernels
from frozen.huggingface import (
  config_json,
  further_layers,
  generation_config as generation_config_lib,
  safetensors_files,
  tensor_map,
)
from frozen.huggingface.quantised import writing
from models import axes, layout
from models.layers import reward_head
from models.linear.stored import tree as stored_tree
from storage import atomic
from text import hf_files, hf_tokenizer, tokenizer as tokenizer_lib

FLOAT, COMPRESSED = FORMS = ('float', 'compressed-tensors')
# Families of which transformers has a classifier with a head like ours.
_CLASSIFIERS = {
  'llama': 'LlamaForSequenceClassification',
  'mistral': 'MistralForSequenceClassification',
  'qwen2': 'Qwen2ForSequenceClassification',
  'qwen3': 'Qwen3ForSequenceClassification',
}


class Exported(NamedTuple):
  """The result of an export."""

  family: str
  notes: list[str]  # for the user


def export_directory(
  source: str | os.PathLike,
  out: str | os.PathLike,
  *,
  family: str = '',
  form: str = FLOAT,
  shard_bytes: int = safetensors_files.SHARD_BYTES,
) -> Exported:
  """Writes a frozen directory as a Hugging Face directory.

  Args:
    out: the directory to write; must not exist, or be empty.
    family: the `model_type` to write; '' for the family that the model was
      imported as, or else the first family that computes the same function.
    form: one of `FORMS`, for kernels in fewer bits.
    shard_bytes: maximum size of a file of weights.

  Raises:
    FileNotFoundError: there is no frozen directory.
    ValueError: no family computes this function, no kernel can be written in
      the form, or `out` is not empty.
  """
  expect.one_of('format', form, FORMS)
  target = pathlib.Path(out).absolute()
  if target.exists() and (not target.is_dir() or any(target.iterdir())):
    raise ValueError(
      f'{target}: got a path with files, expected a new or empty directory;'
      ' choose another --out'
    )
  is_whole = form == FLOAT
  frozen, spare_notes = trimmed(
    frozen_format.read_whole(source) if is_whole else _with_kernels(source)
  )
  model_type, values = describe(frozen, family)
  if frozen.manifest.heads:
    values |= _classifier(model_type)
  with atomic.new_directory(target) as partial:
    write = _write_weights if is_whole else _write_kernels
    spare_notes += write(partial, frozen, model_type, values, shard_bytes)
    notes, special_ids = _write_tokenizer(partial, frozen)
    # Both files list all ids that end a text: some programs read only one file.
    special_ids |= _end_ids(frozen.generation)
    values |= special_ids
    if frozen.manifest.heads:
      notes += _unpadded(values)
    values['dtype'] = values['torch_dtype'] = frozen.manifest.dtype
    _write_json(partial / config_json.FILE, values)
    generation, more = generation_config(frozen.generation)
    _write_json(partial / generation_config_lib.FILE, generation | special_ids)
  return Exported(model_type, spare_notes + notes + more)


def _with_kernels(source: str | os.PathLike) -> frozen_format.Frozen:
  """Returns a frozen model with its kernels as they are stored.

  Tables of a trained model are floats: their last rows may be left out.

  Raises:
    ValueError: it is a reward model.
  """
  frozen = frozen_format.read(source)
  if frozen.manifest.heads:
    raise ValueError(
      f'{source}: got a reward model, expected a language model for'
      f' --format={COMPRESSED}; leave --format out'
    )
  if not frozen.manifest.step:
    return frozen
  inner = dict(frozen.params['params'])
  for table in {'embed', 'head'} & inner.keys():
    inner[table] = stored_tree.whole_kernels(
      inner[table], frozen.manifest.dtype
    )
  return dataclasses.replace(frozen, params={**frozen.params, 'params': inner})


def _write_kernels(
  directory, frozen, model_type, values, shard_bytes
) -> list[str]:
  """Writes kernels as they are stored; adds their field to the config."""
  params, config = layout.unstack(frozen.params, frozen.config)
  manifest = frozen.manifest
  record = manifest.quantization.get('record', {})
  plan = writing.plan(
    stored_kernels.by_path(params['params']),
    tensor_map.pieces(model_type, config, values),
    dtype=manifest.dtype,
    formats=list(record.get('formats', ())),
  )
  safetensors_files.write_directory(
    directory, plan.shapes, plan.dtypes, plan.tensors, shard_bytes=shard_bytes
  )
  values['quantization_config'] = plan.field
  return plan.notes


def trimmed(
  frozen: frozen_format.Frozen,
) -> tuple[frozen_format.Frozen, list[str]]:
  """Returns the model without its last spare ids, and notes for the user.

  The notes also name tensors that the import has left out.
  """
  config, inner = frozen.config, dict(frozen.params['params'])
  *others, last = config.spare_ids or ((0, 0),)
  notes = []
  if frozen.manifest.step and last[1] == config.vocab_size:
    notes.append(
      f'left out the rows of ids {last[0]} to {last[1] - 1}: no token has them'
    )
    config = dataclasses.replace(
      config, vocab_size=last[0], spare_ids=tuple(others)
    )
    for table in {'embed', 'head'} & inner.keys():
      inner[table] = {'embedding': inner[table]['embedding'][: last[0]]}
    frozen = dataclasses.replace(
      frozen, config=config, params={**frozen.params, 'params': inner}
    )
  if frozen.manifest.step and config.spare_ids:
    notes.append(
      f'transformers may sample ids without a token: {config.spare_ids}'
    )
  if left_out := frozen.manifest.origin.get(further_layers.ORIGIN):
    notes.append(f'without {left_out}, which the import has left out')
  return frozen, notes


def describe(
  frozen: frozen_format.Opened, family: str = ''
) -> tuple[str, dict[str, Any]]:
  """Returns the family of a frozen model, and its config.json.

  Raises:
    ValueError: no family computes the same function.
  """
  if family:
    return config_json.write(frozen.config, family)
  imported = frozen.manifest.origin.get('family', '')
  if imported in config_json.FAMILIES:
    try:
      return config_json.write(frozen.config, imported)
    except ValueError:
      pass  # further training changed the model: another family may fit
  return config_json.write(frozen.config)


def _classifier(model_type: str) -> dict[str, Any]:
  """Returns the fields of config.json that make it a reward model."""
  if model_type not in _CLASSIFIERS:
    raise ValueError(
      f'export: got a reward model of the family {model_type}, expected one of'
      f' {", ".join(_CLASSIFIERS)}, whose classifiers read the last token with'
      ' one matrix; score with `python -m inference.rewards`'
    )
  return {
    'architectures': [_CLASSIFIERS[model_type]],
    'id2label': {'0': reward_head.NAME},
    'label2id': {reward_head.NAME: 0},
  }


def _unpadded(values: dict[str, Any]) -> list[str]:
  """Removes padding that also ends answers; returns notes.

  transformers would read the reward before the end of such answers.
  """
  pad, ends = values.get('pad_token_id'), values.get('eos_token_id')
  if pad is None or pad not in (ends if isinstance(ends, list) else [ends]):
    return []
  values['pad_token_id'] = None
  return [
    'no padding token was written, since it ends answers too: transformers'
    ' would read the reward before it; score one answer at a time there'
  ]


def tensors_of(
  params: frozen_format.Params, pieces: list[tensor_map.Piece]
) -> Iterator[tuple[str, np.ndarray]]:
  """Yields names and values of a family's tensors, made from our leaves."""
  leaves = frozen_format.leaves_by_path(params['params'])
  for piece in pieces:
    parts = [np.asarray(leaves[path]) for path in piece.ours]
    if piece.expert is not None:
      parts = [part[piece.expert] for part in parts]
    yield piece.theirs, piece.layout.write(*parts)


def _write_weights(
  directory, frozen, model_type, values, shard_bytes
) -> list[str]:
  """Writes floats."""
  params, config = layout.unstack(frozen.params, frozen.config)
  pieces = tensor_map.pieces(model_type, config, values)
  leaves = frozen_format.leaves_by_path(params['params'])
  named = {path for piece in pieces for path in piece.ours}
  if left := sorted(leaves.keys() ^ named):
    raise ValueError(
      f'export: got {", ".join(left)} in the model or in {model_type} alone,'
      ' expected the same parameters in both'
    )
  score = {}
  if frozen.manifest.heads:  # a reward head in place of the language model's
    pieces = [piece for piece in pieces if piece.theirs != 'lm_head.weight']
    head = frozen.params[axes.HEADS][reward_head.NAME]
    score = {'score.weight': np.asarray(head['kernel']).T}
  shapes = {name: tensor.shape for name, tensor in score.items()}
  for piece in pieces:
    parts = [leaves[path].shape for path in piece.ours]
    if piece.expert is not None:
      parts = [shape[1:] for shape in parts]
    shapes[piece.theirs] = tuple(piece.layout.shape(*parts))
  safetensors_files.write_directory(
    directory,
    shapes,
    np.dtype(leaves[pieces[0].ours[0]].dtype),
    itertools.chain(score.items(), tensors_of(params, pieces)),
    shard_bytes=shard_bytes,
  )
  if frozen.manifest.quantization == stored_kernels.NONE:
    return []
  return [f'kernels in fewer bits are written in {frozen.manifest.dtype}']


def _write_tokenizer(
  directory: pathlib.Path, frozen
) -> tuple[list[str], dict[str, Any]]:
  """Copies the tokenizer; returns notes, and the ids of its special tokens."""
  tokenizer = tokenizer_lib.load(frozen.tokenizer_dir)
  if tokenizer.kind != 'huggingface':  # the only one that transformers can load
    return [
      f'no tokenizer was written: transformers does not read the kind'
      f' {tokenizer.kind}'
    ], {}
  tokenizer.save(directory)
  templates = hf_tokenizer.load(frozen.tokenizer_dir).chat_templates()
  if frozen.chat_template != templates.pop('default', ''):
    # Such a file replaces all templates of tokenizer_config.json.
    (directory / hf_files.TEMPLATE).write_bytes(frozen.chat_template.encode())
    for name, text in templates.items():
      path = directory / hf_files.MORE_TEMPLATES / f'{name}.jinja'
      path.parent.mkdir(exist_ok=True)
      path.write_bytes(text.encode())
  found: dict[str, Any] = {}
  for name in ('bos_token', 'eos_token', 'pad_token'):
    token = tokenizer.names.get(name)
    if token is not None and token in tokenizer.special_tokens:
      found[f'{name}_id'] = tokenizer.special_tokens[token]
  return [], found


def _end_ids(generation: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the ids that end a text, as an id or a list of them."""
  ids = list(generation.get('stop_ids', ()))
  return {'eos_token_id': ids if len(ids) > 1 else ids[0]} if ids else {}


def generation_config(
  generation: Mapping[str, Any],
) -> tuple[dict[str, Any], list[str]]:
  """Returns generation_config.json, and notes on settings that it lacks."""
  rest = dict(generation)
  written: dict[str, Any] = {}
  if rest.pop('temperature', 1.0) == 0:
    written['do_sample'] = False
    for name in ('top_k', 'top_p', 'min_p'):
      rest.pop(name, None)
  else:
    written['do_sample'] = True
    written['temperature'] = generation.get('temperature', 1.0)
    written['top_k'] = rest.pop('top_k', 0)
    written['top_p'] = rest.pop('top_p', 1.0)
    if min_p := rest.pop('min_p', 0.0):
      written['min_p'] = min_p
  for ours, theirs in (
    ('max_tokens', 'max_new_tokens'),
    ('min_tokens', 'min_new_tokens'),
    ('repetition_penalty', 'repetition_penalty'),
    ('stop', 'stop_strings'),
  ):
    if value := rest.pop(ours, None):
      written[theirs] = list(value) if ours == 'stop' else value
  rest.pop('stop_ids', None)
  return written, [f'{name} {rest[name]!r} was not written' for name in rest]


def _write_json(path: pathlib.Path, values: Mapping[str, Any]) -> None:
  path.write_text(json.dumps(values, indent=2) + '\n', encoding='utf-8')
