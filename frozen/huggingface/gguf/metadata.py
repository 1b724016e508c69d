"""The fields of a GGUF file that describe a model: `families`, reversed.

The fields are read back as an import reads them, and the result is compared
with the model. A model that a GGUF file cannot describe is refused before
anything is written.
"""

from collections.abc import Mapping
import dataclasses
import pathlib
from typing import Any

import numpy as np

from frozen.huggingface import config_json
from frozen.huggingface.gguf import families, header as header_lib
from models import model_config
from models.attention import rope_scaling

_ARCHITECTURES = {
  **{name: architecture for architecture, name in families.MODEL_TYPES.items()},
  'mistral': 'llama',
  'mixtral': 'llama',
}
_SIZES = {
  'vocab_size': 'vocab_size',
  'max_position_embeddings': 'context_length',
  'hidden_size': 'embedding_length',
  'num_hidden_layers': 'block_count',
  'intermediate_size': 'feed_forward_length',
  'num_attention_heads': 'attention.head_count',
  'num_key_value_heads': 'attention.head_count_kv',
  'rms_norm_eps': 'attention.layer_norm_rms_epsilon',
  'rope_theta': 'rope.freq_base',
  # GPT-2
  'n_positions': 'context_length',
  'n_embd': 'embedding_length',
  'n_layer': 'block_count',
  'n_inner': 'feed_forward_length',
  'n_head': 'attention.head_count',
  'layer_norm_epsilon': 'attention.layer_norm_epsilon',
  # experts
  'num_local_experts': 'expert_count',
  'num_experts': 'expert_count',
  'num_experts_per_tok': 'expert_used_count',
  'moe_intermediate_size': 'expert_feed_forward_length',
  # Gemma
  'attn_logit_softcapping': 'attn_logit_softcapping',
  'final_logit_softcapping': 'final_logit_softcapping',
}


@dataclasses.dataclass(frozen=True)
class Described:
  """A model as a GGUF file describes it."""

  model_type: str
  values: Mapping[str, Any]  # fields of config.json
  fields: Mapping[str, Any]  # fields of the GGUF file
  factors: Mapping[str, np.ndarray]  # tensors of rotary positions, by name


def describe(
  config: model_config.ModelConfig,
  model_types: list[str],
  listed: Mapping[str, header_lib.Listed],
) -> Described:
  """Returns the first of some families that computes a model.

  Args:
    model_types: families to try; families without a GGUF form are left out.
    listed: the optional tensors that the file will have, by name.

  Raises:
    ValueError: no family computes the model.
  """
  plain, factors = _without_divisors(config)
  problems = []
  for model_type in dict.fromkeys(model_types):
    if model_type not in _ARCHITECTURES:
      problems.append(f'{model_type}: llama.cpp reads no such family here')
      continue
    is_llama = _ARCHITECTURES[model_type] == 'llama'
    divided = factors if is_llama else {}
    model = plain if divided else config
    try:
      _, values = config_json.write(model, model_type)
      fields = _fields(model_type, values, model)
      again = families.read(
        header_lib.Header(pathlib.Path('export'), fields, listed, 0, 0)
      )
      _, read = config_json.read(again)
    except ValueError as error:
      problems.append(f'{model_type}: {error}')
      continue
    if differing := config_json.difference(model, read):
      problems.append(f'{model_type}: {differing}')
      continue
    return Described(again['model_type'], values, fields, divided)
  raise ValueError(
    'export: got a model that no architecture of GGUF computes, expected one of'
    f' {", ".join(_ARCHITECTURES)}: {"; ".join(problems)}'
  )


def candidates(family: str, imported: str) -> list[str]:
  """Returns the families to try: the requested family, or all of them."""
  return [family] if family else [imported, *_ARCHITECTURES]


def _fields(
  model_type: str,
  values: Mapping[str, Any],
  config: model_config.ModelConfig,
) -> dict[str, Any]:
  architecture = _ARCHITECTURES[model_type]
  found = {
    theirs: values[name]
    for name, theirs in _SIZES.items()
    if values.get(name) is not None
  }
  if architecture != 'gpt2':
    found |= {
      'attention.key_length': config.head_width,
      'attention.value_length': config.head_width,
      'rope.dimension_count': config.rotated_width,
    }
  if architecture in ('gemma2', 'gemma3', 'phi3') and config.window:
    found['attention.sliding_window'] = config.window
  if architecture == 'gemma3':
    found['rope.freq_base_swa'] = values['rope_local_base_freq']
    kinds = [kind == 'sliding_attention' for kind in values['layer_types']]
    found['attention.sliding_window_pattern'] = np.array(kinds)
  scaling = values.get('rope_scaling') or {}
  kind = scaling.get('rope_type', scaling.get('type', 'default'))
  if kind in ('linear', 'yarn'):
    found['rope.scaling.type'] = kind
    found['rope.scaling.factor'] = float(scaling['factor'])
    if original := scaling.get('original_max_position_embeddings'):
      found['rope.scaling.original_context_length'] = original
  elif kind != 'default':
    raise ValueError(f'got rotary positions of the kind {kind}, expected none')
  return {
    families.ARCHITECTURE: architecture,
    **{f'{architecture}.{name}': value for name, value in found.items()},
  }


def _without_divisors(
  config: model_config.ModelConfig,
) -> tuple[model_config.ModelConfig, dict[str, np.ndarray]]:
  """Returns the model without scaled frequencies, and their tensor."""
  scaling = config.rope_scaling
  is_table = (
    scaling.kind == 'longrope'
    and scaling.short_divisors == scaling.long_divisors
    and scaling.amplitude == 1
  )
  if scaling.kind != 'llama3' and not is_table:
    return config, {}
  width = config.rotated_width
  divisors = np.asarray(scaling.short_divisors, np.float32)
  if not is_table:
    plain = rope_scaling.frequencies(config.rope_base, width)
    divisors = plain / rope_scaling.stretched(config.rope_base, width, scaling)
  plain = dataclasses.replace(config, rope_scaling=rope_scaling.RopeScaling())
  return plain, {'rope_freqs.weight': divisors}
