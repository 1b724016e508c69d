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
  family = rope_fields.Family(1_000_000.0)
  rope = rope_fields.read(fields, found['head_width'], family)
  expert_width = found.pop('mlp_width')
  return ModelConfig(
    **found,
    **dense_families.rotary(rope, found['head_width']),
    mlp_width=0,
    window=fields.size_or_none('sliding_window', None),
    **_num_experts(fields, 'num_local_experts', 'num_experts', 8, 2),
    expert_width=expert_width,
  )


def _num_experts(
  fields: Fields,
  name: str,
  alias: str,
  default: Any = fields_lib.REQUIRED,
  active: Any = fields_lib.REQUIRED,
) -> dict[str, Any]:
  """Returns the numbers of experts of a layer and of a token.

  Args:
    fields: fields of the config.
    name: field with the number of experts.
    alias: another name of it.
    default: default number of experts.
    active: default of num_experts_per_tok.
  """
  fields.agree(alias, name)
  if not fields.has(name) and fields.has(alias):
    name = alias
  num_experts = fields.size(name, default, fields_lib.MOST_LAYERS)
  if num_experts == 1:
    fields.refuse(name, 'at least 2 experts')
  num_active = fields.size('num_experts_per_tok', active)
  if num_active > num_experts:
    expected = f'at most {name} = {num_experts}'
    fields.refuse('num_experts_per_tok', expected, num_active)
  return {'num_experts': num_experts, 'num_active_experts': num_active}


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
    window = fields.size_or_none('sliding_window', 4096)
  fields.get('sliding_window', None)
  rope = rope_fields.read(fields, found['head_width'])
  return ModelConfig(
    **found,
    **dense_families.rotary(rope, found['head_width']),
    window=window,
    **dense_families.attention_bias(fields),
    qk_norm=True,
  )


def _experts(fields: Fields, found: dict[str, Any]) -> dict[str, Any]:
  """Returns the expert fields of Qwen 3, and the number of dense layers."""
  fields.expect('decoder_sparse_step', 1)
  without = fields.get('mlp_only_layers', None)
  without = [] if without is None else without
  if (
    not isinstance(without, list)
    or without != list(range(len(without)))
    or len(without) > found['num_layers']
  ):
    fields.refuse('mlp_only_layers', 'the first layers, or none')
  return _num_experts(fields, 'num_experts', 'num_local_experts', 128, 8) | {
    'mlp_width': found['mlp_width'] if without else 0,
    'num_dense_layers': len(without),
    'expert_width': fields.size('moe_intermediate_size', 768),
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


def _read_deepseek(fields: Fields, alias: str, shared: int) -> dict[str, Any]:
  """Returns the fields that V2 and V3 share.

  Args:
    fields: fields of the config.
    alias: another name of n_routed_experts.
    shared: default number of shared experts.
  """
  fields.expect('hidden_act', 'silu', 'swish')
  fields.expect('moe_layer_freq', 1)
  fields.expect('mlp_bias', False)
  rotary_width = fields.size('qk_rope_head_dim', 64)
  others = fields.size('qk_nope_head_dim', 128)
  # In these families, head_dim is the width of the rotated part.
  for name, width, sum_of in (
    ('head_dim', rotary_width, 'qk_rope_head_dim'),
    (
      'qk_head_dim',
      rotary_width + others,
      'qk_rope_head_dim + qk_nope_head_dim',
    ),
  ):
    if fields.has(name) and fields.get(name) != width:
      fields.refuse(name, f'{sum_of} = {width}, or no {name}')
  found = dense_families.sizes(fields, head_width=rotary_width) | {
    'head_width': rotary_width + others
  }
  if found['num_kv_heads'] != found['num_heads']:
    expected = f'num_attention_heads = {found["num_heads"]}'
    fields.refuse('num_key_value_heads', expected)
  family = rope_fields.Family(width_name='qk_rope_head_dim')
  rope = rope_fields.read(fields, rotary_width, family)
  value_width = fields.size('v_head_dim', 128)
  scale = 0.0
  if rope.score_amplitude != 1:
    scale = found['head_width'] ** -0.5 * rope.score_amplitude**2
  dense_layers = fields.count('first_k_dense_replace', most=found['num_layers'])
  return (
    found
    | dense_families.attention_bias(fields)
    | {
      'rope_base': rope.base,
      'rope_scaling': rope.scaling,
      'rotary_width': rotary_width,
      'value_width': 0 if value_width == found['head_width'] else value_width,
      'latent_width': fields.size('kv_lora_rank', 512),
      'query_latent_width': fields.size_or_none('q_lora_rank', 1536),
      'query_scale': scale,
      'num_dense_layers': dense_layers,
      'mlp_width': found['mlp_width'] if dense_layers else 0,
      'num_shared_experts': fields.size('n_shared_experts', shared),
      'expert_width': fields.size('moe_intermediate_size'),
    }
    | _num_experts(fields, 'n_routed_experts', alias)
  )


def _groups(
  fields: Fields, found: dict[str, Any], groups: int, active: int
) -> dict[str, Any]:
  """Returns the groups of experts; empty if there is only one.

  Args:
    fields: fields of the config.
    found: the numbers of experts.
    groups: default number of groups.
    active: default number of groups that a token may use.
  """
  experts = found['num_experts']
  groups = fields.count('n_group', groups)
  active = fields.count('topk_group', active)
  if groups <= 1:
    return {}
  if experts % groups:
    fields.refuse('n_group', f'a divisor of n_routed_experts = {experts}')
  least = -(-found['num_active_experts'] // (experts // groups))
  if not least <= active <= groups:
    expected = (
      f'{least} to n_group = {groups}, with num_experts_per_tok ='
      f' {found["num_active_experts"]}'
    )
    fields.refuse('topk_group', expected, active)
  if active == groups:
    return {}
  return {'num_expert_groups': groups, 'num_active_groups': active}


def read_deepseek_v2(fields: Fields) -> ModelConfig:
  """DeepSeek-V2: latent attention, experts in groups."""
  found = _read_deepseek(fields, 'num_experts', 2)
  fields.expect('scoring_func', 'softmax')
  # The published code divides by the sum, and transformers does not.
  fields.expect('norm_topk_prob', False, None)
  method = fields.get('topk_method', 'greedy')
  if method not in ('greedy', 'group_limited_greedy'):
    fields.refuse('topk_method', 'greedy or group_limited_greedy')
  is_grouped = method == 'group_limited_greedy'
  for name in ('n_group', 'topk_group'):
    fields.get(name, None)
  return ModelConfig(
    **found,
    **(_groups(fields, found, 0, 0) if is_grouped else {}),
    norm_topk=False,
    router_scale=fields.number('routed_scaling_factor', 1.0),
  )


def read_deepseek_v3(fields: Fields) -> ModelConfig:
  """DeepSeek-V3 and R1: V2 with a sigmoid score for each expert."""
  found = _read_deepseek(fields, 'num_local_experts', 1)
  fields.expect('scoring_func', 'sigmoid')
  fields.expect('topk_method', 'noaux_tc')
  fields.flag('rope_interleave', True)  # read by tensor_map
  groups = _groups(fields, found, 8, 4)
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
    'num_nextn_predict_layers': 0,  # 1 if left out; see `further_layers`
  }
