"""Families like Llama, without experts: config.json to ModelConfig and back.

A family has two functions: `read_*` returns the ModelConfig of some fields, and
`write_*` the fields of a ModelConfig. A writer does not check that its fields
express the whole model: `frozen.huggingface.config_json` reads them again and
compares. Absent fields have the defaults of `transformers`.
"""

from typing import Any

from frozen.huggingface.families import (
  fields as fields_lib,
  layer_kinds,
  rope_fields,
)
from models import model_config

Fields = fields_lib.Fields
ModelConfig = model_config.ModelConfig

GATED = {
  'silu': 'swiglu',
  'swish': 'swiglu',
  'gelu_pytorch_tanh': 'geglu',
  'gelu_new': 'geglu',
  'gelu': 'geglu_exact',
  'relu': 'reglu',
}


def activation(fields: Fields, name: str, default: str, known: dict) -> str:
  """Returns the value of `ModelConfig.mlp` for an activation."""
  value = fields.get(name, default)
  if not isinstance(value, str) or value not in known:
    fields.refuse(name, f'one of {", ".join(known)}')
  return known[value]


def activation_name(mlp: str, known: dict[str, str]) -> str | None:
  """Returns the activation in a config.json; None if it has no name there."""
  return next((theirs for theirs, ours in known.items() if ours == mlp), None)


def sizes(
  fields: Fields,
  *,
  kv_heads: int | None = None,
  head_width: int | None = None,
  epsilon: float = 1e-6,
  is_tied: bool = False,
) -> dict[str, Any]:
  """Returns the fields that have the same names in nearly all families.

  Args:
    fields: fields of the config.
    kv_heads: default of num_key_value_heads; None for num_attention_heads.
    head_width: default of head_dim; None for hidden_size / heads.
    epsilon: default of rms_norm_eps.
    is_tied: default of tie_word_embeddings.
  """
  width = fields.size('hidden_size')
  heads = fields.size('num_attention_heads')
  head_width = fields.size_or_none('head_dim', head_width)
  if not head_width:
    if width % heads:
      expected = f'a multiple of num_attention_heads = {heads}'
      fields.refuse('hidden_size', expected)
    head_width = width // heads
  num_kv_heads = fields.size_or_none('num_key_value_heads', kv_heads) or heads
  if heads % num_kv_heads:
    expected = f'a divisor of num_attention_heads = {heads}'
    fields.refuse('num_key_value_heads', expected, num_kv_heads)
  return {
    'vocab_size': fields.size('vocab_size'),
    'num_layers': fields.size('num_hidden_layers', most=fields_lib.MOST_LAYERS),
    'model_width': width,
    'num_heads': heads,
    'num_kv_heads': num_kv_heads,
    'head_width': head_width,
    'mlp_width': fields.size('intermediate_size'),
    'max_length': fields.size('max_position_embeddings'),
    'norm_epsilon': fields.number('rms_norm_eps', epsilon),
    'tie_embeddings': fields.flag('tie_word_embeddings', is_tied),
    'init_std': init_std(fields),
    'scan_layers': False,
  }


def init_std(fields: Fields) -> float:
  """Returns the standard deviation of new weights; 0: not known."""
  if fields.get('initializer_range', 0.02) == 0:
    return 0.02
  return fields.number('initializer_range', 0.02)


def write_sizes(config: ModelConfig) -> dict[str, Any]:
  """Returns the fields that `sizes` reads."""
  return {
    'vocab_size': config.vocab_size,
    'num_hidden_layers': config.num_layers,
    'hidden_size': config.model_width,
    'num_attention_heads': config.num_heads,
    'num_key_value_heads': config.num_kv_heads,
    'head_dim': config.head_width,
    'intermediate_size': config.mlp_width,
    'max_position_embeddings': config.max_length,
    'rms_norm_eps': config.norm_epsilon,
    'tie_word_embeddings': config.tie_embeddings,
    'initializer_range': config.init_std,
    'hidden_act': activation_name(config.mlp, GATED),
    'rope_theta': config.rope_base,
    'rope_scaling': rope_fields.write(config.rope_scaling),
  }


def rotary(rope: rope_fields.Rope, head_width: int) -> dict[str, Any]:
  """Returns the fields of a ModelConfig that describe rotary positions."""
  return {
    'rope_base': rope.base,
    'rope_scaling': rope.scaling,
    'rotary_width': 0 if rope.width == head_width else rope.width,
  }


def attention_bias(fields: Fields) -> dict[str, Any]:
  """Returns the biases of attention's projections: all of them or none."""
  has_bias = fields.flag('attention_bias', False)
  return {'qkv_bias': has_bias, 'out_bias': has_bias}


def _llama_like(
  fields: Fields,
  family: rope_fields.Family = rope_fields.Family(),
  **defaults: Any,
) -> dict[str, Any]:
  """Returns the fields that the relatives of Llama share.

  Args:
    fields: fields of the config.
    family: names and defaults of the family's rotary fields.
    **defaults: passed to `sizes`.
  """
  found = sizes(fields, **defaults)
  rope = rope_fields.read(fields, found['head_width'], family)
  return (
    found
    | rotary(rope, found['head_width'])
    | {'mlp': activation(fields, 'hidden_act', 'silu', GATED)}
  )


def _without_head_width(
  config: ModelConfig, written: dict[str, Any]
) -> dict[str, Any]:
  """Returns `written` without a head_dim of width / heads, the default.

  Older versions of transformers have no other head_dim in these families.
  """
  if config.head_width * config.num_heads == config.model_width:
    del written['head_dim']
  return written


def read_llama(fields: Fields) -> ModelConfig:
  """Llama 1 to 3.x, SmolLM 1 and 2, and models of the same structure."""
  return ModelConfig(
    **_llama_like(fields),
    **attention_bias(fields),
    mlp_bias=fields.flag('mlp_bias', False),
  )


def write_llama(config: ModelConfig) -> dict[str, Any]:
  """Returns the fields that `read_llama` reads."""
  return write_sizes(config) | {
    'attention_bias': config.qkv_bias,
    'mlp_bias': config.mlp_bias,
  }


def read_mistral(fields: Fields) -> ModelConfig:
  """Mistral: Llama with a window in all layers."""
  return ModelConfig(
    **_llama_like(fields, kv_heads=8),
    window=fields.size_or_none('sliding_window', 4096),
  )


def write_mistral(config: ModelConfig) -> dict[str, Any]:
  """Returns the fields that `read_mistral` reads."""
  return write_sizes(config) | {'sliding_window': config.window or None}


def read_qwen2(fields: Fields) -> ModelConfig:
  """Qwen 2 and 2.5: Llama with biases of queries, keys and values."""
  found = _llama_like(fields, kv_heads=32)
  return ModelConfig(
    **found,
    **layer_kinds.read_qwen(fields, found['num_layers']),
    qkv_bias=True,
  )


def write_qwen2(config: ModelConfig) -> dict[str, Any]:
  """Returns the fields that `read_qwen2` reads."""
  written = write_sizes(config) | layer_kinds.write_qwen(config)
  return _without_head_width(config, written)


def read_qwen3(fields: Fields) -> ModelConfig:
  """Qwen 3: Llama with normalised queries and keys."""
  found = _llama_like(fields, kv_heads=32, head_width=128)
  return ModelConfig(
    **found,
    **layer_kinds.read_qwen(fields, found['num_layers']),
    **attention_bias(fields),
    qk_norm=True,
  )


def write_qwen3(config: ModelConfig) -> dict[str, Any]:
  """Returns the fields that `read_qwen3` reads."""
  return (
    write_sizes(config)
    | layer_kinds.write_qwen(config)
    | {'attention_bias': config.qkv_bias}
  )


def read_smollm3(fields: Fields) -> ModelConfig:
  """SmolLM 3: Llama with some layers without positions."""
  family = rope_fields.Family(2_000_000.0)
  found = _llama_like(fields, family, kv_heads=4, is_tied=True)
  return ModelConfig(
    **found,
    **layer_kinds.read_smollm3(fields, found['num_layers']),
    **attention_bias(fields),
    mlp_bias=fields.flag('mlp_bias', False),
  )


def write_smollm3(config: ModelConfig) -> dict[str, Any]:
  """Returns the fields that `read_smollm3` reads."""
  return write_llama(config) | layer_kinds.write_smollm3(config)


def read_phi3(fields: Fields) -> ModelConfig:
  """Phi-3 and 3.5: Llama with joined matrices."""
  return ModelConfig(
    **_llama_like(fields, rope_fields.PHI3, epsilon=1e-5),
    window=fields.size_or_none('sliding_window', None),
  )


def write_phi3(config: ModelConfig) -> dict[str, Any]:
  """Returns the fields that `read_phi3` reads."""
  written = write_sizes(config) | {
    'sliding_window': config.window or None,
    'partial_rotary_factor': config.rotated_width / config.head_width,
  }
  if config.rope_scaling.kind == 'longrope':
    original = config.rope_scaling.original_length
    written['original_max_position_embeddings'] = original
  return _without_head_width(config, written)


def read_olmo2(fields: Fields) -> ModelConfig:
  """OLMo 2: norms after attention and MLP, and over all heads of q and k."""
  return ModelConfig(
    **_llama_like(fields, epsilon=1e-5),
    **attention_bias(fields),
    norm_place='after',
    qk_norm=True,
    qk_norm_whole=True,
  )


def write_olmo2(config: ModelConfig) -> dict[str, Any]:
  """Returns the fields that `read_olmo2` reads."""
  written = write_sizes(config) | {'attention_bias': config.qkv_bias}
  return _without_head_width(config, written)


def _read_gemma(fields: Fields, found: dict[str, Any]) -> dict[str, Any]:
  """Returns the fields that all three generations of Gemma share."""
  return (
    found
    | attention_bias(fields)
    | {'norm_from_one': True, 'embed_multiplier': found['model_width'] ** 0.5}
  )


def _gemma_activation(
  fields: Fields, name: str, other: str, known: dict[str, str] = GATED
) -> str:
  """Returns `ModelConfig.mlp`.

  Args:
    name: the field that transformers computes with.
    other: the field that it ignores; it must not contradict `name`.
    known: activations, by their names there.
  """
  mlp = activation(fields, name, 'gelu_pytorch_tanh', known)
  if fields.has(other) and activation(fields, other, '', known) != mlp:
    fields.refuse(other, f'the same activation as {name}, or no such field')
  return mlp


def read_gemma(fields: Fields) -> ModelConfig:
  """Gemma: scaled embeddings, norms that count from one, GELU."""
  found = sizes(fields, kv_heads=16, head_width=256, is_tied=True)
  rope = rope_fields.read(fields, found['head_width'])
  # The first release has gelu in its config, and computes the tanh form.
  known = GATED | {'gelu': 'geglu'}
  return ModelConfig(
    **_read_gemma(fields, found),
    **rotary(rope, found['head_width']),
    mlp=_gemma_activation(fields, 'hidden_act', 'hidden_activation', known),
  )


def write_gemma(config: ModelConfig) -> dict[str, Any]:
  """Returns the fields that `read_gemma` reads."""
  name = activation_name(config.mlp, GATED)
  return write_sizes(config) | {
    'hidden_act': name,
    'hidden_activation': name,
    'attention_bias': config.qkv_bias,
  }


def read_gemma2(fields: Fields) -> ModelConfig:
  """Gemma 2: soft-caps, norms on both sides, every second layer local."""
  found = sizes(fields, kv_heads=4, head_width=256, is_tied=True)
  rope = rope_fields.read(fields, found['head_width'])
  return ModelConfig(
    **_read_gemma(fields, found),
    **rotary(rope, found['head_width']),
    **layer_kinds.read_alternating(fields, found['num_layers'], every=2),
    mlp=_gemma_activation(fields, 'hidden_activation', 'hidden_act'),
    norm_place='both',
    query_scale=fields.number('query_pre_attn_scalar', 256) ** -0.5,
    attention_softcap=fields.number_or_none('attn_logit_softcapping', 50.0),
    logit_softcap=fields.number_or_none('final_logit_softcapping', 30.0),
  )


def write_gemma2(config: ModelConfig) -> dict[str, Any]:
  """Returns the fields that `read_gemma2` reads."""
  return (
    write_gemma(config)
    | layer_kinds.write_types(config)
    | {
      'query_pre_attn_scalar': _query_scalar(config),
      'attn_logit_softcapping': config.attention_softcap or None,
      'final_logit_softcapping': config.logit_softcap or None,
    }
  )


def read_gemma3(fields: Fields) -> ModelConfig:
  """Gemma 3, text: five of six layers are local, with their own rotary base."""
  found = sizes(fields, kv_heads=4, head_width=256, is_tied=True)
  # transformers reads attn_logit_softcapping and computes without it.
  fields.expect('attn_logit_softcapping', None)
  local_base, rope = rope_fields.read_local_and_global(
    fields, found['head_width'], 10_000.0, 1_000_000.0
  )
  every = fields.size('sliding_window_pattern', 6)
  fields.get('_sliding_window_pattern', None)  # layer_types came from it
  kinds = layer_kinds.read_alternating(fields, found['num_layers'], every=every)
  return ModelConfig(
    **_read_gemma(fields, found),
    **rotary(rope, found['head_width']),
    **kinds,
    rope_local_base=local_base if kinds['window'] else 0.0,
    mlp=_gemma_activation(fields, 'hidden_activation', 'hidden_act'),
    norm_place='both',
    qk_norm=True,
    query_scale=fields.number('query_pre_attn_scalar', 256) ** -0.5,
    logit_softcap=fields.number_or_none('final_logit_softcapping', None),
  )


def write_gemma3(config: ModelConfig) -> dict[str, Any]:
  """Returns the fields that `read_gemma3` reads."""
  return (
    write_gemma(config)
    | layer_kinds.write_types(config)
    | {
      'query_pre_attn_scalar': _query_scalar(config),
      'final_logit_softcapping': config.logit_softcap or None,
      'rope_local_base_freq': config.rope_local_base or config.rope_base,
    }
  )


def _query_scalar(config: ModelConfig) -> int | float:
  scalar = config.query_scale**-2 if config.query_scale else config.head_width
  # Rounds the square of a root back to the integer that it came from.
  return round(scalar) if abs(scalar - round(scalar)) < 1e-6 else scalar
