"""Families of GGUF files: metadata as the fields of a config.json, and back.

llama.cpp names a model by its architecture and describes it by fields with that
name in front, such as `gemma3.block_count`. Its code knows the rest, which a
config.json has as fields. A field that is not read here is refused: its effect
on the model is not known.

Reference: llama.cpp's code of each architecture, and its converter.
"""

from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import numpy as np

from checks import expect
from frozen.huggingface.families import fields as fields_lib
from frozen.huggingface.gguf import header as header_lib

ARCHITECTURE = 'general.architecture'
# The family of a config.json by the architecture of a GGUF file. Mistral is
# `llama` there; Mixtral is `llama` with experts.
MODEL_TYPES: Mapping[str, str] = {
  'llama': 'llama',
  'qwen2': 'qwen2',
  'qwen3': 'qwen3',
  'qwen3moe': 'qwen3_moe',
  'gemma': 'gemma',
  'gemma2': 'gemma2',
  'gemma3': 'gemma3_text',
  'phi3': 'phi3',
  'olmo2': 'olmo2',
  'smollm3': 'smollm3',
  'gpt2': 'gpt2',
}
_TABLE = 'token_embd.weight'
_LAYERS_27B = {'gemma2': 46, 'gemma3': 62}  # their scores have another scale
_WITHOUT_EFFECT = 'rope.scaling.finetuned'  # says how a model was made
# Fields that most files leave out, with the values that change nothing. Tokens
# choose among all experts if these are in one group.
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
  'attention.causal': (True,),
  'expert_group_count': (1, 0),
  'expert_group_used_count': (1, 0),
}


class Metadata:
  """The fields of one architecture, taken one by one."""

  def __init__(self, header: header_lib.Header):
    self.path = header.path
    found = header.fields.get(ARCHITECTURE)
    if not isinstance(found, str) or found not in MODEL_TYPES:
      raise ValueError(
        f'{self.path}: got a GGUF file of architecture'
        f' {expect.shown(found)}, expected one of'
        f' {", ".join(MODEL_TYPES)}; other families are not read'
      )
    self.architecture: str = found
    prefix = f'{found}.'
    self._rest = {
      name.removeprefix(prefix): _number(value)
      for name, value in header.fields.items()
      if name.startswith(prefix)
    }

  def has(self, name: str) -> bool:
    """Returns whether a field is there and was not taken yet."""
    return name in self._rest

  def take(self, name: str, *default: Any) -> Any:
    """Returns a field; each is taken once.

    Raises:
      ValueError: there is no such field and no default.
    """
    if name not in self._rest and not default:
      raise ValueError(
        f'{self.path}: got no {self.architecture}.{name}, expected one; the'
        ' file is damaged: copy it again'
      )
    return self._rest.pop(name, *default)

  def size(self, name: str, *default: Any) -> int:
    """Returns a field that is a positive integer.

    Raises:
      ValueError: it is something else, such as a list with a value per layer.
    """
    value: Any = self.take(name, *default)
    if isinstance(value, np.ndarray) and value.size:
      # A value per layer, all of them alike.
      value = value[0].item() if (value == value[0]).all() else value.tolist()
    if type(value) is not int or not 0 < value <= fields_lib.MOST:
      self.refuse(name, value, f'an integer from 1 to {fields_lib.MOST}')
    return value

  def expect(self, name: str, *allowed: Any) -> None:
    """Raises ValueError if a field exists with none of these values."""
    value = self.take(name, allowed[0])
    if isinstance(value, np.ndarray) or value not in allowed:
      self.refuse(name, value, ' or '.join(map(str, allowed)))

  def refuse(self, name: str, value: Any, expected: str) -> NoReturn:
    """Raises ValueError for the value of a field."""
    raise ValueError(
      f'{self.path}: got {self.architecture}.{name} = {expect.shown(value)},'
      f' expected {expected}; no other value is supported'
    )

  def finish(self) -> None:
    """Raises ValueError if fields are left that were not taken."""
    self._rest.pop(_WITHOUT_EFFECT, None)
    for name, allowed in _NEUTRAL.items():
      self.expect(name, *allowed)
    if self._rest:
      names = ', '.join(f'{self.architecture}.{x}' for x in sorted(self._rest))
      raise ValueError(
        f'{self.path}: got {names}, expected only fields of'
        f' {self.architecture}; their effect on the model is not known here'
      )


def read(header: header_lib.Header) -> dict[str, Any]:
  """Returns the model of a file as the fields of a config.json.

  Raises:
    ValueError: the architecture or one of its fields is not supported.
  """
  metadata = Metadata(header)
  architecture = metadata.architecture
  table = header.listed.get(_TABLE)
  if table is None or len(table.shape) != 2:
    raise ValueError(
      f'{header.path}: got no {_TABLE} of two axes, expected the embedding'
    )
  values = {
    'model_type': MODEL_TYPES[architecture],
    'vocab_size': metadata.take('vocab_size', table.shape[0]),
    'tie_word_embeddings': 'output.weight' not in header.listed,
  }
  if architecture == 'gpt2':
    values |= _gpt2(metadata)
  else:
    values |= _sizes(metadata, header)
    values |= _READERS.get(architecture, _nothing)(metadata, values, header)
    values |= _rotary(metadata, values, header)
  metadata.finish()
  return values


def _number(value: Any) -> Any:
  """Returns a float32 with its shortest decimals: 1e-5, not 9.99999974e-6."""
  return float(str(np.float32(value))) if isinstance(value, float) else value


def _sizes(metadata: Metadata, header) -> dict[str, Any]:
  heads = metadata.size('attention.head_count')
  width = metadata.size('embedding_length')
  head_width = metadata.size('attention.key_length', max(width // heads, 1))
  metadata.expect('attention.value_length', head_width)
  return {
    'hidden_size': width,
    'num_hidden_layers': metadata.size('block_count'),
    'intermediate_size': metadata.size('feed_forward_length'),
    'num_attention_heads': heads,
    'num_key_value_heads': metadata.size('attention.head_count_kv', heads),
    'head_dim': head_width,
    'max_position_embeddings': metadata.size('context_length'),
    'rms_norm_eps': metadata.take('attention.layer_norm_rms_epsilon'),
  }


def _rotary(metadata: Metadata, values, header) -> dict[str, Any]:
  found = {'rope_theta': metadata.take('rope.freq_base', 10_000.0)}
  width = values['head_dim']
  rotated = metadata.size('rope.dimension_count', width)
  if values['model_type'] == 'phi3':
    found['partial_rotary_factor'] = rotated / width
  elif rotated != width:
    metadata.refuse('rope.dimension_count', rotated, f'{width}: a whole head')
  if 'rope_scaling' in values:
    return found
  kind = metadata.take('rope.scaling.type', 'none')
  original = metadata.take('rope.scaling.original_context_length', None)
  if kind in ('linear', 'yarn'):
    found['rope_scaling'] = {
      'rope_type': kind,
      'factor': metadata.take('rope.scaling.factor'),
    }
    if kind == 'yarn':
      found['rope_scaling']['original_max_position_embeddings'] = original
  elif kind != 'none':
    metadata.refuse('rope.scaling.type', kind, 'none, linear or yarn')
  return found


def _nothing(metadata: Metadata, values, header) -> dict[str, Any]:
  return {}


def _llama(metadata: Metadata, values, header) -> dict[str, Any]:
  """Llama, Mistral, SmolLM; Mixtral if it has experts."""
  if metadata.has('expert_count') and metadata.take('expert_count'):
    return {
      'model_type': 'mixtral',
      'num_local_experts': _num_experts(header),
      'num_experts_per_tok': metadata.size('expert_used_count'),
      'sliding_window': None,
    }
  metadata.expect('expert_used_count', 0)
  return {
    'attention_bias': 'blk.0.attn_output.bias' in header.listed,
    'mlp_bias': 'blk.0.ffn_down.bias' in header.listed,
  }


def _num_experts(header: header_lib.Header) -> int:
  router = header.listed.get('blk.0.ffn_gate_inp.weight')
  if router is None:
    raise ValueError(
      f'{header.path}: got experts and no blk.0.ffn_gate_inp.weight, expected'
      ' the router'
    )
  return router.shape[0]


def _smollm3(metadata: Metadata, values, header) -> dict[str, Any]:
  return {'no_rope_layer_interval': 4}


def _qwen3moe(metadata: Metadata, values, header) -> dict[str, Any]:
  metadata.take('expert_count')
  metadata.take('expert_shared_feed_forward_length', None)
  return {
    'num_experts': _num_experts(header),
    'num_experts_per_tok': metadata.size('expert_used_count'),
    'moe_intermediate_size': metadata.size('expert_feed_forward_length'),
    'norm_topk_prob': True,
  }


def _gemma2(metadata: Metadata, values, header) -> dict[str, Any]:
  return _scaled(metadata, values) | {
    'sliding_window': metadata.size('attention.sliding_window', 4096),
    'attn_logit_softcapping': metadata.take('attn_logit_softcapping', 50.0),
    'final_logit_softcapping': metadata.take('final_logit_softcapping', 30.0),
  }


def _gemma3(metadata: Metadata, values, header) -> dict[str, Any]:
  found = _scaled(metadata, values) | {
    'sliding_window': metadata.size('attention.sliding_window', 1024),
    'rope_local_base_freq': metadata.take('rope.freq_base_swa', 10_000.0),
    'final_logit_softcapping': metadata.take('final_logit_softcapping', None),
  }
  pattern = metadata.take('attention.sliding_window_pattern', 6)
  if isinstance(pattern, np.ndarray):  # a flag per layer: is it local?
    kinds = 'full_attention', 'sliding_attention'
    found['layer_types'] = [kinds[bool(is_local)] for is_local in pattern]
  else:
    found['sliding_window_pattern'] = pattern
  return found


def _scaled(metadata: Metadata, values) -> dict[str, Any]:
  """Returns the scale of scores, which llama.cpp knows by the model's size."""
  width = values['head_dim']
  if values['num_hidden_layers'] == _LAYERS_27B[metadata.architecture]:
    width = values['hidden_size'] // values['num_attention_heads']
  return {'query_pre_attn_scalar': width}


def _phi3(metadata: Metadata, values, header) -> dict[str, Any]:
  window = metadata.take('attention.sliding_window', None)
  found: dict[str, Any] = {'sliding_window': window or None}
  if 'rope_factors_long.weight' in header.listed:
    original = metadata.size('rope.scaling.original_context_length')
    found['original_max_position_embeddings'] = original
    found['rope_scaling'] = {'type': 'longrope'}
    if factor := metadata.take('rope.scaling.attn_factor', None):
      found['rope_scaling']['attention_factor'] = factor
  return found


def _gpt2(metadata: Metadata) -> dict[str, Any]:
  return {
    'n_embd': metadata.size('embedding_length'),
    'n_layer': metadata.size('block_count'),
    'n_head': metadata.size('attention.head_count'),
    'n_inner': metadata.size('feed_forward_length'),
    'n_positions': metadata.size('context_length'),
    'layer_norm_epsilon': metadata.take('attention.layer_norm_epsilon'),
  }


_READERS: Mapping[str, Callable[..., dict[str, Any]]] = {
  'llama': _llama,
  'smollm3': _smollm3,
  'qwen3moe': _qwen3moe,
  'gemma2': _gemma2,
  'gemma3': _gemma3,
  'phi3': _phi3,
}
