"""config.json: read to a ModelConfig, and written from one.

A family is a pair of functions, to read and to write. An export reads its own
config.json again and compares the model. If a family cannot express the model,
the two differ, and the next family is tried.
"""

import collections
from collections.abc import Callable, Mapping
import dataclasses
import json
import pathlib
from typing import Any, NamedTuple

from checks import expect
from frozen.huggingface.families import (
  dense_families,
  fields as fields_lib,
  gpt_families,
  layer_kinds,
  moe_families,
)
from models import model_config

FILE = 'config.json'
MOST_BYTES = 16 * 2**20  # most bytes of a JSON file without lists of tensors


class Family(NamedTuple):
  """Architecture, reader and writer of one `model_type`."""

  architecture: str
  read: Callable[[fields_lib.Fields], model_config.ModelConfig]
  write: Callable[[model_config.ModelConfig], dict[str, Any]]


# An export without a chosen family tries them in this order.
FAMILIES: Mapping[str, Family] = {
  'llama': Family(
    'LlamaForCausalLM', dense_families.read_llama, dense_families.write_llama
  ),
  'mistral': Family(
    'MistralForCausalLM',
    dense_families.read_mistral,
    dense_families.write_mistral,
  ),
  'qwen2': Family(
    'Qwen2ForCausalLM', dense_families.read_qwen2, dense_families.write_qwen2
  ),
  'qwen3': Family(
    'Qwen3ForCausalLM', dense_families.read_qwen3, dense_families.write_qwen3
  ),
  'smollm3': Family(
    'SmolLM3ForCausalLM',
    dense_families.read_smollm3,
    dense_families.write_smollm3,
  ),
  'phi3': Family(
    'Phi3ForCausalLM', dense_families.read_phi3, dense_families.write_phi3
  ),
  'olmo2': Family(
    'Olmo2ForCausalLM', dense_families.read_olmo2, dense_families.write_olmo2
  ),
  'gemma': Family(
    'GemmaForCausalLM', dense_families.read_gemma, dense_families.write_gemma
  ),
  'gemma2': Family(
    'Gemma2ForCausalLM', dense_families.read_gemma2, dense_families.write_gemma2
  ),
  'gemma3_text': Family(
    'Gemma3ForCausalLM', dense_families.read_gemma3, dense_families.write_gemma3
  ),
  'gpt2': Family(
    'GPT2LMHeadModel', gpt_families.read_gpt2, gpt_families.write_gpt2
  ),
  'gpt_neox': Family(
    'GPTNeoXForCausalLM',
    gpt_families.read_gpt_neox,
    gpt_families.write_gpt_neox,
  ),
  'mixtral': Family(
    'MixtralForCausalLM', moe_families.read_mixtral, moe_families.write_mixtral
  ),
  'qwen3_moe': Family(
    'Qwen3MoeForCausalLM',
    moe_families.read_qwen3_moe,
    moe_families.write_qwen3_moe,
  ),
  'deepseek_v2': Family(
    'DeepseekV2ForCausalLM',
    moe_families.read_deepseek_v2,
    moe_families.write_deepseek_v2,
  ),
  'deepseek_v3': Family(
    'DeepseekV3ForCausalLM',
    moe_families.read_deepseek_v3,
    moe_families.write_deepseek_v3,
  ),
}


def load(directory: pathlib.Path) -> dict[str, Any]:
  """Returns the config.json of a directory.

  Raises:
    FileNotFoundError: there is no config.json.
    ValueError: it is not a JSON object.
  """
  path = directory / FILE
  if not path.is_file():
    raise FileNotFoundError(
      f'{path}: got no such file, expected the directory of a Hugging Face'
      ' model'
    )
  return read_object(path)


def read_object(
  path: pathlib.Path, most_bytes: int = MOST_BYTES
) -> dict[str, Any]:
  """Returns the JSON object in a file.

  Raises:
    ValueError: the file has something else, a name twice, or is too large.
  """
  size = path.stat().st_size
  if size > most_bytes:
    raise ValueError(
      f'{path}: got {size} bytes, expected at most {most_bytes}; no model has'
      ' such a file'
    )
  try:
    values = json.loads(
      path.read_text(encoding='utf-8'), object_pairs_hook=_object
    )
  except (ValueError, RecursionError) as error:
    raise ValueError(
      f'{path}: got a file that is not JSON ({error}), expected a JSON object;'
      ' copy it again'
    ) from None
  if not isinstance(values, dict):
    raise ValueError(
      f'{path}: got {expect.shown(values)}, expected a JSON object'
    )
  return values


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  """Returns a JSON object; refuses a name twice: readers take either value."""
  found = dict(pairs)
  if len(found) < len(pairs):
    names = collections.Counter(name for name, _ in pairs)
    ((twice, _),) = names.most_common(1)
    raise ValueError(f'the name {expect.shown(twice)} twice in one object')
  return found


def read(
  values: Mapping[str, Any], where: str = FILE
) -> tuple[str, model_config.ModelConfig]:
  """Returns the family (`model_type`) and the ModelConfig of a config.json.

  Args:
    values: the fields.
    where: path of the file, for errors.

  Raises:
    ValueError: the family is not known, or a field has a value that is not
      supported.
  """
  model_type = values.get('model_type')
  family = FAMILIES.get(model_type) if isinstance(model_type, str) else None
  if family is None:
    raise ValueError(
      f'{where}: got model_type = {expect.shown(model_type)} (architectures ='
      f' {expect.shown(values.get("architectures"))}), expected one of'
      f' {", ".join(FAMILIES)}; other architectures are not supported'
    )
  named = values.get('architectures') or [family.architecture]
  if named != [family.architecture]:
    raise ValueError(
      f'{where}: got architectures = {expect.shown(named)}, expected'
      f' [{family.architecture!r}]: only language models are read, without'
      ' classifiers or images'
    )
  fields = fields_lib.Fields(values, where)
  fields.agree('torch_dtype', 'dtype')
  config = family.read(fields)
  fields.finish()
  try:
    config.validate()
  except ValueError as error:
    raise ValueError(f'{where}: {error}') from None
  return str(model_type), config


def write(
  config: model_config.ModelConfig, model_type: str = ''
) -> tuple[str, dict[str, Any]]:
  """Returns a family that computes the same function, and its config.json.

  Args:
    config: config of the model.
    model_type: the family to write; '' for the first that fits.

  Raises:
    ValueError: no family, or not the chosen one, computes the same function.
  """
  if model_type:
    expect.one_of('family', model_type, FAMILIES)
  wanted = _function_of(config)
  problems = []
  for name in [model_type] if model_type else FAMILIES:
    family = FAMILIES[name]
    written = {
      'architectures': [family.architecture],
      'model_type': name,
      # If absent, transformers takes the ids of the family's first model.
      'bos_token_id': None,
      'eos_token_id': None,
      'pad_token_id': None,
      **family.write(config),
    }
    # Through JSON, because readers see the text and not the Python values.
    as_read = json.loads(json.dumps(written))
    try:
      _, again = read(as_read)
    except ValueError as error:
      problems.append(f'{name}: {error}')
      continue
    differing = _difference(wanted, _function_of(again))
    if not differing:
      return name, written
    problems.append(f'{name}: {differing}')
  raise ValueError(
    'export: got a model that no family of transformers computes, expected one'
    f' of {", ".join(FAMILIES)}: ' + '; '.join(problems)
  )


def difference(
  config: model_config.ModelConfig, other: model_config.ModelConfig
) -> str:
  """Returns the fields in which two functions differ, as text; '' if none."""
  return _difference(_function_of(config), _function_of(other))


def _function_of(config: model_config.ModelConfig) -> dict[str, Any]:
  """Returns the fields that decide the function, in a normal form.

  Two configs compute the same function if these are equal.
  """
  letters = layer_kinds.letters_of(config)
  has_local = bool(set(letters) & set('lm'))
  config = dataclasses.replace(
    config,
    layer_pattern=letters,
    window=config.window if has_local else 0,
    rope_local_base=config.rope_local_base if has_local else 0.0,
    # Fields of training, and of the layout of parameters.
    dropout_rate=0.0,
    init_std=0.02,
    scan_layers=False,
    balance_loss_weight=0.0,
    router_z_weight=0.0,
    # Derived from the tokenizer, which config.json does not describe.
    spare_ids=(),
  )
  fields = dataclasses.asdict(config)
  if config.use_bias:
    fields |= dict.fromkeys(('qkv_bias', 'out_bias', 'mlp_bias'), True)
    fields['norm_bias'] = config.norm == 'layernorm'
  del fields['use_bias']
  if config.norm == 'rmsnorm':
    fields['norm_bias'] = False
  if config.positions == 'learned':
    for name in ('rope_base', 'rope_scaling', 'rotary_width'):
      del fields[name]
  else:
    fields['rotary_width'] = config.rotated_width
  fields['value_width'] = config.value_head_width
  fields['query_scale'] = config.query_scale or config.head_width**-0.5
  if not config.num_experts:
    fields['norm_topk'] = True
  if not config.num_expert_groups:
    fields['expert_group_best'] = 1
  return fields


def _difference(wanted: Mapping[str, Any], got: Mapping[str, Any]) -> str:
  """Returns the fields in which two functions differ, as text; '' if none."""
  names = [
    name
    for name in sorted(wanted.keys() | got.keys())
    if not _is_close(wanted.get(name), got.get(name))
  ]
  return ', '.join(
    f'{name} is {wanted.get(name)!r}, there {got.get(name)!r}' for name in names
  )


def _is_close(a: Any, b: Any) -> bool:
  if isinstance(a, dict) and isinstance(b, dict):
    return a.keys() == b.keys() and all(_is_close(a[k], b[k]) for k in a)
  if isinstance(a, float) and isinstance(b, float):
    # Roots, squares and logarithms in the two directions cost a few digits.
    return abs(a - b) <= 1e-9 * max(abs(a), abs(b))
  return a == b
