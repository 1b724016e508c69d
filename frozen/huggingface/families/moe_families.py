"""Families with experts: config.json to ModelConfig and back."""

from typing import Any

from frozen.huggingface.families import (
  dense_families,
  fields as fields_lib,
  rope_fields,
)
from models import model_config

Fields = fields_lib.Fields
ModelConfig = model_config.ModelConfig


def read_mixtral(fields: Fields) -> ModelConfig:
  """Mixtral: Mistral with experts in place of the MLP."""
  fields.expect('hidden_act', 'silu', 'swish')
  found = dense_families.sizes(fields, kv_heads=8, epsilon=1e-5)
  rope = rope_fields.read(fields, rope_fields.Family(1_000_000.0))
  expert_width = found.pop('mlp_width')
  return ModelConfig(
    **found,
    **dense_families.rotary(fields, rope, found['head_width']),
    mlp_width=0,
    window=fields.count('sliding_window', None),
    num_experts=fields.count('num_local_experts', 8),
    num_active_experts=fields.count('num_experts_per_tok', 2),
    expert_width=expert_width,
  )


def write_mixtral(config: ModelConfig) -> dict[str, Any]:
  """Returns the fields that `read_mixtral` reads."""
  return dense_families.write_sizes(config) | {
    'intermediate_size': config.expert_width,
    'sliding_window': config.window or None,
    'num_local_experts': config.num_experts,
    'num_experts_per_tok': config.num_active_experts,
  }


def read_qwen3_moe(fields: Fields) -> ModelConfig:
  """Qwen 3 with experts; the first layers may be dense."""
  fields.expect('hidden_act', 'silu', 'swish')
  found = dense_families.sizes(fields, kv_heads=4)
  found |= _experts(fields, found)
  fields.get('max_window_layers', None)  # transformers ignores it here
  window = 0
  if fields.flag('use_sliding_window', False):
    window = fields.count('sliding_window', 4096)
  fields.get('sliding_window', None)
  return ModelConfig(
    **found,
    **dense_families.rotary(
      fields, rope_fields.read(fields), found['head_width']
    ),
    window=window,
    **dense_families.attention_bias(fields),
    qk_norm=True,
  )


def _experts(fields: Fields, found: dict[str, Any]) -> dict[str, Any]:
  """Returns the expert fields of Qwen 3, and the number of dense layers."""
  name = 'num_experts'
  if fields.has('num_local_experts'):
    name = 'num_local_experts'
  fields.expect('decoder_sparse_step', 1)
  without = fields.get('mlp_only_layers', None) or []
  if without != list(range(len(without))):
    fields.refuse('mlp_only_layers', 'the first layers, or none')
  return {
    'mlp_width': found['mlp_width'] if without else 0,
    'num_dense_layers': len(without),
    'num_experts': fields.count(name),
    'num_active_experts': fields.count('num_experts_per_tok', 8),
    'expert_width': fields.count('moe_intermediate_size', 768),
    'norm_topk': fields.flag('norm_topk_prob', False),
  }


def write_qwen3_moe(config: ModelConfig) -> dict[str, Any]:
  """Returns the fields that `read_qwen3_moe` reads."""
  return dense_families.write_sizes(config) | {
    # Written even if no layer is dense.
    'intermediate_size': config.mlp_width or config.expert_width,
    'mlp_only_layers': list(range(config.num_dense_layers)),
    'decoder_sparse_step': 1,
    'num_experts': config.num_experts,
    'num_experts_per_tok': config.num_active_experts,
    'moe_intermediate_size': config.expert_width,
    'norm_topk_prob': config.norm_topk,
    'attention_bias': config.qkv_bias,
    'use_sliding_window': bool(config.window),
    'sliding_window': config.window or None,
  }


def _read_deepseek(fields: Fields, shared: int) -> dict[str, Any]:
  """Returns the fields that V2 and V3 share.

  Args:
    fields: of the config.
    shared: default number of shared experts.
  """
  fields.expect('hidden_act', 'silu', 'swish')
  fields.expect('moe_layer_freq', 1)
  fields.expect('mlp_bias', False)
  rotary_width = fields.count('qk_rope_head_dim', 64)
  others = fields.count('qk_nope_head_dim', 128)
  # In these families, head_dim is the width of the rotated part.
  fields.expect('head_dim', None, rotary_width)
  fields.expect('qk_head_dim', None, rotary_width + others)
  found = dense_families.sizes(fields, head_width=rotary_width) | {
    'head_width': rotary_width + others
  }
  rope = rope_fields.read(fields)
  value_width = fields.count('v_head_dim', 128)
  scale = 0.0
  if rope.score_amplitude != 1:
    scale = found['head_width'] ** -0.5 * rope.score_amplitude**2
  dense_layers = fields.count('first_k_dense_replace')
  return (
    found
    | dense_families.attention_bias(fields)
    | {
      'rope_base': rope.base,
      'rope_scaling': rope.scaling,
      'rotary_width': rotary_width,
      'value_width': 0 if value_width == found['head_width'] else value_width,
      'latent_width': fields.count('kv_lora_rank', 512),
      'query_latent_width': fields.count('q_lora_rank', 1536),
      'query_scale': scale,
      'num_dense_layers': dense_layers,
      'mlp_width': found['mlp_width'] if dense_layers else 0,
      'num_experts': fields.count('n_routed_experts'),
      'num_active_experts': fields.count('num_experts_per_tok'),
      'num_shared_experts': fields.count('n_shared_experts', shared),
      'expert_width': fields.count('moe_intermediate_size'),
    }
  )


def _groups(fields: Fields, groups: int, active: int) -> dict[str, Any]:
  """Returns the groups of experts; empty if there is only one.

  Args:
    fields: of the config.
    groups: default number of groups.
    active: default number of groups that a token may use.
  """
  groups = fields.count('n_group', groups)
  active = fields.count('topk_group', active)
  if groups <= 1 or active == groups:
    return {}
  return {'num_expert_groups': groups, 'num_active_groups': active}


def read_deepseek_v2(fields: Fields) -> ModelConfig:
  """DeepSeek-V2: latent attention, experts in groups."""
  found = _read_deepseek(fields, 2)
  fields.expect('scoring_func', 'softmax')
  # The published code divides by the sum, and transformers does not.
  fields.expect('norm_topk_prob', False, None)
  method = fields.get('topk_method', 'greedy')
  if method not in ('greedy', 'group_limited_greedy'):
    fields.refuse('topk_method', 'greedy or group_limited_greedy')
  groups = _groups(fields, 0, 0)
  return ModelConfig(
    **found,
    **(groups if method == 'group_limited_greedy' else {}),
    norm_topk=False,
    router_scale=fields.number('routed_scaling_factor', 1.0),
  )


def read_deepseek_v3(fields: Fields) -> ModelConfig:
  """DeepSeek-V3 and R1: V2 with a sigmoid score for each expert."""
  found = _read_deepseek(fields, 1)
  fields.expect('scoring_func', 'sigmoid')
  fields.expect('topk_method', 'noaux_tc')
  fields.flag('rope_interleave', True)  # read by tensor_map
  groups = _groups(fields, 8, 4)
  return ModelConfig(
    **found,
    **groups,
    expert_group_best=2 if groups else 1,
    norm_topk=fields.flag('norm_topk_prob', True),
    router_score='sigmoid',
    router_correction=True,
    router_scale=fields.number('routed_scaling_factor', 2.5),
  )


def _write_deepseek(config: ModelConfig) -> dict[str, Any]:
  written = dense_families.write_sizes(config) | {
    'intermediate_size': config.mlp_width or config.expert_width,
    'qk_rope_head_dim': config.rotary_width,
    'qk_nope_head_dim': config.head_width - config.rotary_width,
    'v_head_dim': config.value_head_width,
    'kv_lora_rank': config.latent_width,
    'q_lora_rank': config.query_latent_width or None,
    'attention_bias': config.qkv_bias,
    'first_k_dense_replace': config.num_dense_layers,
    'n_routed_experts': config.num_experts,
    'num_experts_per_tok': config.num_active_experts,
    'n_shared_experts': config.num_shared_experts,
    'moe_intermediate_size': config.expert_width,
    'n_group': config.num_expert_groups or 1,
    'topk_group': config.num_active_groups or 1,
    'norm_topk_prob': config.norm_topk,
    'routed_scaling_factor': config.router_scale,
  }
  del written['head_dim']
  scaling = written['rope_scaling']
  if scaling is not None and config.query_scale:
    scaling['mscale_all_dim'] = _score_weight(config)
  return written


def _score_weight(config: ModelConfig) -> float:
  """Returns the mscale_all_dim that gives the model's scale of scores."""
  amplitude = (config.query_scale * config.head_width**0.5) ** 0.5
  slope = rope_fields.magnitude(config.rope_scaling.factor) - 1
  return round((amplitude - 1) / slope, 9) if slope else 0.0


def write_deepseek_v2(config: ModelConfig) -> dict[str, Any]:
  """Returns the fields that `read_deepseek_v2` reads."""
  grouped = config.num_expert_groups > 0
  return _write_deepseek(config) | {
    'topk_method': 'group_limited_greedy' if grouped else 'greedy'
  }


def write_deepseek_v3(config: ModelConfig) -> dict[str, Any]:
  """Returns the fields that `read_deepseek_v3` reads."""
  return _write_deepseek(config) | {
    'rope_interleave': True,
    'scoring_func': 'sigmoid',
    'topk_method': 'noaux_tc',
  }
