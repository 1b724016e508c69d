"""Import: a Hugging Face directory becomes a frozen directory.

    config.json               the model (`frozen.huggingface.config_json`)
    model.safetensors         its weights, or several files and an index
    tokenizer.json, ...       the tokenizer (`text.hf_tokenizer`)
    generation_config.json    recommended settings (`generation_config.py`)

Quantised matrices, which config.json describes in quantization_config, become
floats or stay as they are (`frozen.huggingface.quantised`).
`frozen.huggingface.gguf.reading` imports a single GGUF file of llama.cpp.
"""

from collections.abc import Callable, Collection, Mapping
import dataclasses
import hashlib
import json
import os
import pathlib
import tempfile
from typing import Any, NamedTuple

import jax

from checks import expect
from frozen import format as frozen_format, manifest as manifest_lib
from frozen.huggingface import (
  config_json,
  further_layers,
  generation_config,
  loading,
  safetensors_files,
  tensor_map,
)
from frozen.huggingface.quantised import kept as kept_lib, table as quantised
from models import model_config
from text import hf_tokenizer

_COUNTS = ('vocab_size', 'num_experts')  # dimensions of a tensor
DTYPES = ('auto', 'float32', 'bfloat16')
MOST_ENDS = 16  # most ids that end a text; the engine's slots have room for 16


class Source(NamedTuple):
  """An opened model: its config, and its tensors, which are not read yet."""

  where: str  # path, for errors
  model_type: str
  values: Mapping[str, Any]  # fields of config.json
  config: model_config.ModelConfig
  tensors: Mapping[str, loading.Tensor]
  quantisation: quantised.Quantised | None = None
  left_out: str = ''  # tensors of no use here, as text


def open_source(directory: str | os.PathLike) -> Source:
  """Returns the model of a directory; reads config and headers only.

  Raises:
    FileNotFoundError: a file is missing.
    ValueError: the model is not supported, or a file is damaged.
  """
  directory = pathlib.Path(directory)
  values = config_json.load(directory)
  where = str(directory / config_json.FILE)
  model_type, config = config_json.read(quantised.without_field(values), where)
  tensors, how = quantised.opened(
    values, safetensors_files.open_directory(directory), str(directory)
  )
  prefix = tensor_map.prefix_of(model_type)
  if not any(name.startswith(prefix) for name in tensors):
    # A model that was saved without its head has names without the prefix.
    tensors = {
      name if name in ('lm_head.weight', 'embed_out.weight') else prefix + name:
      tensor
      for name, tensor in tensors.items()
    }  # fmt: skip
  split = further_layers.split(
    model_type, values, config.num_layers, tensors, str(directory)
  )
  return Source(
    str(directory), model_type, values, config, split.tensors, how,
    split.left_out,
  )  # fmt: skip


def choose_dtype(source: Source, asked: str, kept: Collection[str] = ()) -> str:
  """Returns the dtype of an import; 'auto' chooses one that rounds nothing.

  Args:
    kept: names of tensors that do not become floats.

  Raises:
    ValueError: `asked` is not one of `DTYPES`.
  """
  expect.one_of('dtype', asked, DTYPES)
  if asked != 'auto':
    return asked
  found = {x.dtype for name, x in source.tensors.items() if name not in kept}
  is_bfloat16 = found & {'BF16'} and not found & {'F32', 'F16', 'QUANTISED'}
  return 'bfloat16' if is_bfloat16 else 'float32'


def load_params(
  source: Source,
  dtype: str,
  sharding: Callable[[str, tuple[int, ...]], Any] | None = None,
  pieces: list[tensor_map.Piece] | None = None,
  kept: Mapping[str, Any] | None = None,
) -> frozen_format.Params:
  """Returns the weights, as variables of `models.transformer.Transformer`.

  Args:
    source: from `open_source`.
    dtype: float32 or bfloat16.
    sharding: returns the sharding of a leaf, by its path and shape; None keeps
      numpy arrays in the memory of this process.
    pieces: the tensor map; None for the map of the family.
    kept: leaves that stay in fewer bits, by path.

  Raises:
    ValueError: the tensors do not fit the model.
  """
  leaves = _leaves(source, dtype)
  kept, tensors = kept or {}, source.tensors
  tied = {}
  if pieces is None:
    pieces = _pieces(source)
    tied = _tied(source)
  if kept:
    theirs = {piece.theirs for piece in pieces if kept.keys() & set(piece.ours)}
    tied = {name: x for name, x in tied.items() if x not in theirs}
    tensors = {name: x for name, x in tensors.items() if name not in theirs}
    pieces = [piece for piece in pieces if piece.theirs not in theirs]
    leaves = {path: leaf for path, leaf in leaves.items() if path not in kept}
  arrays: dict[str, Any] = loading.load(
    tensors, pieces, leaves, tied=tied, where=source.where
  )
  if sharding is not None:
    for path in list(arrays):
      x = arrays.pop(path)
      arrays[path] = jax.device_put(x, sharding(path, x.shape))
      arrays[path].block_until_ready()
      del x
  tree: dict[str, Any] = {}
  for path, x in (*arrays.items(), *kept.items()):
    *owners, name = path.split('/')
    node = tree
    for owner in owners:
      node = node.setdefault(owner, {})
    node[name] = x
  return {'params': tree}


def _pieces(source: Source) -> list[tensor_map.Piece]:
  """Returns the tensor map of the family."""
  return tensor_map.pieces(
    source.model_type,
    source.config,
    source.values,
    is_fused=tensor_map.has_fused_experts(source.tensors),
  )


def check_tensors(
  source: Source, pieces: list[tensor_map.Piece] | None = None
) -> list[tensor_map.Piece]:
  """Returns the tensor map: `pieces`, or the map of the family.

  Raises:
    ValueError: the tensors do not fit the model.
  """
  leaves, tied = _leaves(source, 'float32'), {}
  if pieces is None:
    pieces = _pieces(source)
    tied = _tied(source)
  loading.check(source.tensors, pieces, leaves, tied=tied, where=source.where)
  return pieces


def _leaves(source: Source, dtype: str) -> dict[str, Any]:
  """Returns shape and dtype of every leaf of the model, by path."""
  _check_sizes(source)
  abstract = frozen_format.abstract_params(source.config, dtype)
  return {
    path.removeprefix('params/'): leaf
    for path, leaf in frozen_format.leaves_by_path(abstract).items()
  }


def _check_sizes(source: Source) -> None:
  """Raises ValueError if no tensor is as large as the config says.

  Called before lists and shapes are made of the sizes: a file may be wrong.
  """
  config, tensors = source.config, source.tensors
  largest = max((max(x.shape, default=1) for x in tensors.values()), default=0)
  sizes = {'num_heads * head_width': config.num_heads * config.head_width}
  for field in dataclasses.fields(config):
    if field.name.endswith('_width') or field.name in _COUNTS:
      sizes[field.name] = getattr(config, field.name)
  for name, size, most in (
    ('num_layers', config.num_layers, len(tensors)),
    *((name, size, largest) for name, size in sizes.items()),
  ):
    if size > most:
      raise ValueError(
        f'{source.where}: got {name} = {size} in the config, expected at most'
        f' {most}, as {len(tensors)} tensors of at most {largest} rows or'
        ' columns are here; they are not of the same model'
      )


def _tied(source: Source) -> dict[str, str]:
  """Returns the name of a tied head, and the tensor that it must equal.

  Raises:
    ValueError: the head is not tied, and there is none.
  """
  prefix = tensor_map.prefix_of(source.model_type)
  names = {'gpt2': ('lm_head', 'wte'), 'gpt_neox': ('embed_out', 'embed_in')}
  head, table = names.get(source.model_type, ('lm_head', 'embed_tokens'))
  if source.config.tie_embeddings:
    name = f'{head}.weight'
    if name in source.tensors and source.tensors[name].dtype == 'QUANTISED':
      raise ValueError(
        f'{source.where}: got a quantised {name} and tie_word_embeddings = true'
        f' in {config_json.FILE}, expected one of the two; set it to false if'
        ' the model has both tables'
      )
    return {name: f'{prefix}{table}.weight'}
  if f'{head}.weight' not in source.tensors:
    raise ValueError(
      f'{source.where}: got tie_word_embeddings = false in {config_json.FILE}'
      f' and no {head}.weight, expected one of the two; set it to true if the'
      f' head is {table}.weight'
    )
  return {}


class Imported(NamedTuple):
  """The result of an import."""

  manifest: manifest_lib.Manifest
  notes: list[str]  # for the user


def import_directory(
  directory: str | os.PathLike,
  out: str | os.PathLike,
  *,
  dtype: str = 'auto',
  weights: str = quantised.FLOAT,
  origin: Mapping[str, str] | None = None,
  overwrite: bool = False,
) -> Imported:
  """Writes the model of a Hugging Face directory as a frozen directory.

  Args:
    directory: with the files above.
    dtype: one of `DTYPES`, for floats.
    weights: one of `quantised.WEIGHTS`: quantised matrices become floats, stay
      quantised, or stay so if this machine computes with them fast.
    origin: further fields of the manifest's origin.

  Raises:
    FileNotFoundError: a file is missing.
    ValueError: the model is not supported, a file is damaged, or `out` has
      other files.
  """
  expect.one_of('weights', weights, quantised.WEIGHTS)
  source = open_source(directory)
  if weights == quantised.KEPT and source.quantisation is None:
    raise ValueError(
      f'--weights: got {weights} for {directory}, expected none: its weights'
      ' are floats; `python -m frozen.quantize` quantises a frozen directory'
    )
  pieces = check_tensors(source)
  with tempfile.TemporaryDirectory(prefix='tokenizer_') as tokenizer_dir:
    tokenizer = hf_tokenizer.convert(directory, tokenizer_dir)
    check_vocabulary(source, tokenizer)
    generation, notes = read_generation(pathlib.Path(directory))
    check_ends(source, generation)
    kept, told, added = _quantised(source, pieces, weights)
    return freeze_source(
      source,
      out,
      kept=kept.kernels,
      record={**told, 'method': 'kept', 'formats': _formats(source)},
      dtype=choose_dtype(source, dtype, kept.names),
      tokenizer_dir=tokenizer_dir,
      tokenizer=tokenizer,
      generation=generation,
      notes=[*notes, *added],
      origin={**told, **(origin or {})},
      overwrite=overwrite,
    )


def _formats(source: Source) -> list[str]:
  return list(source.quantisation.formats) if source.quantisation else []


def _quantised(
  source: Source, pieces: list[tensor_map.Piece], weights: str
) -> tuple[kept_lib.Kept, dict[str, str], list[str]]:
  """Returns the kernels to keep, fields that describe them, and notes."""
  kept = kept_lib.Kept({}, frozenset(), [])
  if source.quantisation is None:
    return kept, {}, []
  if weights != quantised.FLOAT:
    kept = kept_lib.kernels(source.tensors, pieces)
  if weights == quantised.AUTO:
    kept = kept_lib.fast(kept, pieces)
  notes = [*source.quantisation.notes, *kept.notes]
  told = {'scheme': source.quantisation.title}
  if notes:
    told['notes'] = '; '.join(notes)
  return kept, told, [f'quantised: {source.quantisation.title}', *notes]


def check_vocabulary(
  source: Source, tokenizer: hf_tokenizer.HuggingFaceTokenizer
) -> None:
  """Raises ValueError if the tokenizer has ids that the model does not."""
  if tokenizer.vocab_size > source.config.vocab_size:
    raise ValueError(
      f'{source.where}: got a tokenizer of {tokenizer.vocab_size} ids, expected'
      f' at most {source.config.vocab_size}, as the model has; they are not of'
      ' the same model'
    )


def check_ends(source: Source, generation: Mapping[str, Any]) -> None:
  """Raises ValueError if ids that end a text are invalid, or too many."""
  most = source.config.vocab_size
  ends = generation.get('stop_ids', ())
  if len(ends) > MOST_ENDS:
    raise ValueError(
      f'{source.where}: got {len(ends)} ids in eos_token_id, expected at most'
      f' {MOST_ENDS}; remove the others from {generation_config.FILE} or'
      f' {config_json.FILE}'
    )
  if wrong := [i for i in ends if i >= most]:
    raise ValueError(
      f'{source.where}: got eos_token_id {expect.shown(wrong)}, expected ids'
      f' below vocab_size = {most}; remove the others from'
      f' {generation_config.FILE} or {config_json.FILE}'
    )


def freeze_source(
  source: Source,
  out: str | os.PathLike,
  *,
  pieces: list[tensor_map.Piece] | None = None,
  kept: Mapping[str, Any] | None = None,
  record: Mapping[str, Any] | None = None,
  dtype: str,
  tokenizer_dir: str | os.PathLike,
  tokenizer: hf_tokenizer.HuggingFaceTokenizer,
  generation: Mapping[str, Any],
  notes: list[str],
  origin: Mapping[str, str],
  overwrite: bool,
) -> Imported:
  """Reads the weights of a source and writes the frozen directory.

  Args:
    kept: leaves in fewer bits, see `load_params`.
    record: origin of these leaves, for the manifest.
  """
  chosen = choose_dtype(source, dtype)
  rounded = {'F32', 'F16'} & {x.dtype for x in source.tensors.values()}
  if chosen == 'bfloat16' and rounded:
    notes = [*notes, f'{" and ".join(sorted(rounded))} rounded to bfloat16']
  if source.left_out:
    notes = [*notes, f'left out {source.left_out}; the model does without']
    origin = {**origin, further_layers.ORIGIN: source.left_out}
  text = json.dumps(source.values, sort_keys=True)
  manifest = frozen_format.write(
    out,
    params=load_params(source, chosen, pieces=pieces, kept=kept),
    config=source.config,
    dtype=chosen,
    provenance=manifest_lib.Provenance(
      experiment=origin.get('source') or _name_of(source.where),
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
    record=record,
    # Templates with other names stay in the files of the tokenizer.
    chat_template=tokenizer.chat_templates().get('default', ''),
    overwrite=overwrite,
  )
  return Imported(manifest, notes)


def _name_of(path: str) -> str:
  """Returns the name of a model's directory or of its GGUF file."""
  return pathlib.Path(path).resolve().name.removesuffix('.gguf')


def read_generation(
  directory: pathlib.Path,
) -> tuple[dict[str, Any], list[str]]:
  """Returns the recommended settings, and notes on fields without use.

  Without generation_config.json, generation is greedy, and the EOS ids are the
  ids in config.json, as in `transformers`.
  """
  path = directory / generation_config.FILE
  if path.is_file():
    values = config_json.read_object(path)
  else:
    ends = config_json.load(directory).get('eos_token_id')
    values = {'eos_token_id': ends}
  settings, notes = generation_config.generation_settings(values)
  return settings, list(notes)
