"""A directory of Hugging Face's becomes a frozen one.

    config.json               the model (`frozen.huggingface.config_json`)
    model.safetensors         its weights, or several files and an index
    tokenizer.json, ...       the tokenizer (`text.hf_tokenizer`)
    generation_config.json    recommended settings (`generation_config.py`)

Or a single GGUF file of llama.cpp's (`frozen.huggingface.gguf_file`).
"""

from collections.abc import Callable, Mapping
import hashlib
import json
import os
import pathlib
import tempfile
from typing import Any, NamedTuple

import jax
import numpy as np

from frozen import format as frozen_format, manifest as manifest_lib
from frozen.huggingface import (
  config_json,
  generation_config,
  loading,
  safetensors_files,
  tensor_map,
)
from models import model_config
from text import hf_tokenizer

DTYPES = ('auto', 'float32', 'bfloat16')


class Source(NamedTuple):
  """An opened model: what it is, and its tensors, none of them read."""

  where: str
  model_type: str
  values: Mapping[str, Any]  # of its config.json
  config: model_config.ModelConfig
  tensors: Mapping[str, loading.Tensor]


def open_source(directory: str | os.PathLike) -> Source:
  """Opens a directory; reads its config and the headers of its weights.

  Raises:
    FileNotFoundError: a file is missing.
    ValueError: the model is not supported, or a file is damaged.
  """
  directory = pathlib.Path(directory)
  values = config_json.load(directory)
  where = str(directory / config_json.FILE)
  model_type, config = config_json.read(values, where)
  tensors = safetensors_files.open_directory(directory)
  prefix = tensor_map.prefix_of(model_type)
  if not any(name.startswith(prefix) for name in tensors):
    # Saved without its head, a model's names have nothing in front.
    tensors = {
      name if name in ('lm_head.weight', 'embed_out.weight') else prefix + name:
      tensor
      for name, tensor in tensors.items()
    }  # fmt: skip
  return Source(str(directory), model_type, values, config, tensors)


def choose_dtype(source: Source, asked: str) -> str:
  """Returns float32 or bfloat16; auto keeps every digit there is.

  Raises:
    ValueError: it is none of `DTYPES`.
  """
  if asked not in DTYPES:
    raise ValueError(
      f'dtype: got {asked!r}, expected one of {", ".join(DTYPES)}'
    )
  if asked != 'auto':
    return asked
  found = {tensor.dtype for tensor in source.tensors.values()}
  return (
    'bfloat16'
    if found & {'BF16'} and not found & {'F32', 'F16'}
    else ('float32')
  )


def load_params(
  source: Source,
  dtype: str,
  sharding: Callable[[str, tuple[int, ...]], Any] | None = None,
  pieces: list[tensor_map.Piece] | None = None,
) -> frozen_format.Params:
  """Reads the weights.

  Args:
    source: from `open_source`.
    dtype: float32 or bfloat16.
    sharding: returns where a leaf of a path and shape goes; numpy arrays in
      this process's memory if None.
    pieces: which tensors are which leaves; those of its family if None.

  Returns:
    Variables of `models.transformer.Transformer`.

  Raises:
    ValueError: the tensors are not those of the model.
  """
  abstract = frozen_format.abstract_params(source.config, dtype)
  leaves = {
    path.removeprefix('params/'): leaf
    for path, leaf in frozen_format.leaves_by_path(abstract).items()
  }
  tied = {}
  if pieces is None:
    pieces = tensor_map.pieces(source.model_type, source.config, source.values)
    tied = _tied(source)
  arrays: dict[str, Any] = loading.load(
    source.tensors, pieces, leaves, tied=tied, where=source.where
  )
  if sharding is not None:
    for path in list(arrays):
      x = arrays.pop(path)
      arrays[path] = jax.device_put(x, sharding(path, x.shape))
      arrays[path].block_until_ready()
      del x
  tree: dict[str, Any] = {}
  for path, x in arrays.items():
    *owners, name = path.split('/')
    node = tree
    for owner in owners:
      node = node.setdefault(owner, {})
    node[name] = x
  return {'params': tree}


def _tied(source: Source) -> dict[str, str]:
  """Returns a head that may be stored too, and what it has to equal."""
  if not source.config.tie_embeddings:
    return {}
  prefix = tensor_map.prefix_of(source.model_type)
  names = {'gpt2': ('lm_head', 'wte'), 'gpt_neox': ('embed_out', 'embed_in')}
  head, table = names.get(source.model_type, ('lm_head', 'embed_tokens'))
  return {f'{head}.weight': f'{prefix}{table}.weight'}


class Imported(NamedTuple):
  """What an import came to."""

  manifest: manifest_lib.Manifest
  notes: list[str]  # what the user should know


def import_directory(
  directory: str | os.PathLike,
  out: str | os.PathLike,
  *,
  dtype: str = 'auto',
  origin: Mapping[str, str] | None = None,
  overwrite: bool = False,
) -> Imported:
  """Makes a frozen directory of a Hugging Face one.

  Args:
    directory: what `open_source` opens.
    out: the frozen directory to write.
    dtype: one of `DTYPES`.
    origin: what is known besides of where it comes from.
    overwrite: replace a frozen directory that holds other weights.

  Raises:
    FileNotFoundError: a file is missing.
    ValueError: the model is not supported, a file is damaged, or `out` holds
      something else.
  """
  source = open_source(directory)
  with tempfile.TemporaryDirectory(prefix='tokenizer_') as tokenizer_dir:
    tokenizer = hf_tokenizer.convert(directory, tokenizer_dir)
    check_vocabulary(source, tokenizer)
    generation, notes = read_generation(pathlib.Path(directory))
    return freeze_source(
      source,
      out,
      dtype=dtype,
      tokenizer_dir=tokenizer_dir,
      tokenizer=tokenizer,
      generation=generation,
      notes=notes,
      origin=dict(origin or {}),
      overwrite=overwrite,
    )


def check_vocabulary(
  source: Source, tokenizer: hf_tokenizer.HuggingFaceTokenizer
) -> None:
  """Raises ValueError if the tokenizer has ids that the model does not."""
  if tokenizer.vocab_size > source.config.vocab_size:
    raise ValueError(
      f'{source.where}: got a tokenizer of {tokenizer.vocab_size} ids for a'
      f' model of {source.config.vocab_size}, expected at most as many; they'
      ' are not of one model'
    )


def freeze_source(
  source: Source,
  out: str | os.PathLike,
  *,
  pieces: list[tensor_map.Piece] | None = None,
  dtype: str,
  tokenizer_dir: str | os.PathLike,
  tokenizer: hf_tokenizer.HuggingFaceTokenizer,
  generation: Mapping[str, Any],
  notes: list[str],
  origin: Mapping[str, str],
  overwrite: bool,
) -> Imported:
  """Reads the weights of a source and freezes them with all the rest."""
  chosen = choose_dtype(source, dtype)
  rounded = {'F32', 'F16'} & {x.dtype for x in source.tensors.values()}
  if chosen == 'bfloat16' and rounded:
    notes = [*notes, f'{" and ".join(sorted(rounded))} rounded to bfloat16']
  text = json.dumps(source.values, sort_keys=True)
  manifest = frozen_format.write(
    out,
    params=load_params(source, chosen, pieces=pieces),
    config=source.config,
    dtype=chosen,
    provenance=manifest_lib.Provenance(
      experiment=f'import {source.where}',
      code_commit='',
      step=0,
      tokens_seen=0,
      training_flops=0.0,
      train_seconds=0.0,
      data_mix=[],
      knowledge_cutoff='',
      weights='raw',
      lineage={},
      has_bos=bool(tokenizer.adds_bos),
      origin={
        'format': 'huggingface',
        'family': source.model_type,
        'config_sha256': hashlib.sha256(text.encode()).hexdigest(),
        **origin,
      },
    ),
    tokenizer_dir=tokenizer_dir,
    generation=generation,
    # Templates by other names stay among the tokenizer's files.
    chat_template=tokenizer.chat_templates().get('default', ''),
    overwrite=overwrite,
  )
  return Imported(manifest, notes)


def read_generation(
  directory: pathlib.Path,
) -> tuple[dict[str, Any], list[str]]:
  """Returns recommended settings, and what of the file is not used.

  Without a file: sampling as `transformers` does without one, greedily.
  """
  path = directory / generation_config.FILE
  values: dict[str, Any] = {}
  if path.is_file():
    try:
      values = json.loads(path.read_text(encoding='utf-8'))
    except ValueError as error:
      raise ValueError(
        f'{path}: got a file that is not JSON ({error}); copy it again'
      ) from None
  settings, notes = generation_config.generation_settings(values)
  return settings, list(notes)


def num_bytes(params: frozen_format.Params) -> int:
  """Returns what parameters take."""
  return sum(np.asarray(x).nbytes for x in jax.tree.leaves(params))
