"""GPT-2 and GPT-NeoX, with LayerNorm and MLPs without a gate.

See `frozen.huggingface.families.dense_families` for the two functions of a
family.
"""

from typing import Any

from frozen.huggingface.families import (
  dense_families,
  fields as fields_lib,
  rope_fields,
)
from models import model_config

Fields = fields_lib.Fields
ModelConfig = model_config.ModelConfig

UNGATED = {
  'gelu_new': 'gelu',
  'gelu_pytorch_tanh': 'gelu',
  'gelu_fast': 'gelu',
  'gelu': 'gelu_exact',
  'relu': 'relu',
}


def read_gpt2(fields: Fields) -> ModelConfig:
  """GPT-2."""
  width, heads = fields.size('n_embd'), fields.size('n_head')
  if width % heads:
    fields.refuse('n_embd', f'a multiple of n_head = {heads}')
  # An old name of n_positions, which counts, and another order of sums.
  for name in ('n_ctx', 'reorder_and_upcast_attn'):
    fields.get(name, None)
  fields.expect('scale_attn_by_inverse_layer_idx', False)
  return ModelConfig(
    vocab_size=fields.size('vocab_size'),
    num_layers=fields.size('n_layer', most=fields_lib.MOST_LAYERS),
    model_width=width,
    num_heads=heads,
    num_kv_heads=heads,
    head_width=width // heads,
    mlp_width=fields.size_or_none('n_inner', None) or 4 * width,
    max_length=fields.size('n_positions'),
    norm='layernorm',
    norm_epsilon=fields.number('layer_norm_epsilon', 1e-5),
    positions='learned',
    mlp=dense_families.activation(
      fields, 'activation_function', 'gelu_new', UNGATED
    ),
    use_bias=True,
    tie_embeddings=fields.flag('tie_word_embeddings', True),
    init_std=dense_families.init_std(fields),
    query_scale=0.0 if fields.flag('scale_attn_weights', True) else 1.0,
    scan_layers=False,
  )


def write_gpt2(config: ModelConfig) -> dict[str, Any]:
  """Returns the fields that `read_gpt2` reads."""
  return {
    'vocab_size': config.vocab_size,
    'n_layer': config.num_layers,
    'n_embd': config.model_width,
    'n_head': config.num_heads,
    'n_inner': config.mlp_width,
    'n_positions': config.max_length,
    'layer_norm_epsilon': config.norm_epsilon,
    'activation_function': dense_families.activation_name(config.mlp, UNGATED),
    'tie_word_embeddings': config.tie_embeddings,
    'initializer_range': config.init_std,
    'scale_attn_weights': config.query_scale != 1.0,
  }


def read_gpt_neox(fields: Fields) -> ModelConfig:
  """GPT-NeoX, Pythia: attention and MLP in parallel, partly rotated heads."""
  fields.get('num_key_value_heads', None)  # transformers ignores it
  found: dict[str, Any] = dense_families.sizes(fields, epsilon=1e-5) | {
    'norm_epsilon': fields.number('layer_norm_eps', 1e-5)
  }
  found['num_kv_heads'] = found['num_heads']
  # transformers rotates by head_dim, and attends without it.
  if found['head_width'] * found['num_heads'] != found['model_width']:
    fields.refuse('head_dim', 'hidden_size / num_attention_heads, or none')
  rope = rope_fields.read(
    fields,
    found['head_width'],
    rope_fields.Family(
      base_name='rotary_emb_base', partial=0.25, partial_name='rotary_pct'
    ),
  )
  has_bias = fields.flag('attention_bias', True)
  return ModelConfig(
    **found,
    **dense_families.rotary(rope, found['head_width']),
    mlp=dense_families.activation(fields, 'hidden_act', 'gelu', UNGATED),
    norm='layernorm',
    qkv_bias=has_bias,
    out_bias=has_bias,
    mlp_bias=True,
    norm_bias=True,
    parallel_residual=fields.flag('use_parallel_residual', True),
  )


def write_gpt_neox(config: ModelConfig) -> dict[str, Any]:
  """Returns the fields that `read_gpt_neox` reads."""
  written = dense_families.write_sizes(config)
  for name in ('head_dim', 'num_key_value_heads', 'rms_norm_eps', 'rope_theta'):
    del written[name]
  return written | {
    'hidden_act': dense_families.activation_name(config.mlp, UNGATED),
    'layer_norm_eps': config.norm_epsilon,
    'rotary_emb_base': config.rope_base,
    'rotary_pct': config.rotated_width / config.head_width,
    'attention_bias': config.qkv_bias,
    'use_parallel_residual': config.parallel_residual,
  }
