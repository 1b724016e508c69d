"""Tiny random models of `transformers`, of every family.

Each entry of `MODELS` is a family and the fields of its config besides the
sizes below: odd head counts, shared heads, a window shorter than the texts,
stretched rotary positions, tied heads.
"""

import pathlib
from typing import Any

SIZES = {
  'vocab_size': 61,
  'hidden_size': 32,
  'num_hidden_layers': 2,
  'num_attention_heads': 4,
  'num_key_value_heads': 2,
  'intermediate_size': 40,
  'max_position_embeddings': 128,
  'bos_token_id': 1,
  'eos_token_id': None,
  'pad_token_id': None,
}
_HEADS_3 = {
  'hidden_size': 24,
  'num_attention_heads': 3,
  'num_key_value_heads': 1,
}
_LATENT = {
  'num_key_value_heads': 4,
  'num_hidden_layers': 3,
  'q_lora_rank': 12,
  'kv_lora_rank': 10,
  'qk_nope_head_dim': 8,
  'qk_rope_head_dim': 4,
  'v_head_dim': 6,
  'n_routed_experts': 8,
  'n_shared_experts': 2,
  'moe_intermediate_size': 20,
  'num_experts_per_tok': 3,
  'first_k_dense_replace': 1,
}
_YARN = {
  'rope_type': 'yarn',
  'rope_theta': 10000.0,
  'factor': 4.0,
  'original_max_position_embeddings': 16,
}
_DIVISORS = [1.0, 1.2, 1.5, 2.0], [1.5, 3.0, 5.0, 9.0]

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
  'llama3': (
    'Llama',
    {
      **_HEADS_3,
      'attention_bias': True,
      'mlp_bias': True,
      'rope_parameters': {
        'rope_type': 'llama3',
        'rope_theta': 500.0,
        'factor': 8.0,
        'low_freq_factor': 1.0,
        'high_freq_factor': 4.0,
        'original_max_position_embeddings': 32,
      },
    },
  ),
  'llama': ('Llama', {'tie_word_embeddings': True}),
  'llama_linear': (
    'Llama',
    {
      'head_dim': 10,
      'rope_parameters': {
        'rope_type': 'linear',
        'rope_theta': 1e4,
        'factor': 3.0,
      },
    },
  ),  # fmt: skip
  'llama_dynamic': (
    'Llama',
    {
      'max_position_embeddings': 48,
      'rope_parameters': {
        'rope_type': 'dynamic',
        'rope_theta': 1e4,
        'factor': 2.0,
      },
    },
  ),  # fmt: skip
  'llama_yarn': ('Llama', {'rope_parameters': _YARN}),
  'mistral': ('Mistral', {'sliding_window': 9, 'head_dim': 6}),
  'mistral_tied': (
    'Mistral',
    {**_HEADS_3, 'sliding_window': None, 'tie_word_embeddings': True},
  ),
  'qwen2': ('Qwen2', {'tie_word_embeddings': True}),
  'qwen2_window': (
    'Qwen2',
    {
      **_HEADS_3,
      'use_sliding_window': True,
      'sliding_window': 11,
      'max_window_layers': 1,
    },
  ),
  'qwen3': ('Qwen3', {'head_dim': 10, 'rope_parameters': _YARN}),
  'qwen3_tied': (
    'Qwen3',
    {
      **_HEADS_3,
      'head_dim': 8,
      'attention_bias': True,
      'tie_word_embeddings': True,
      'layer_types': ['sliding_attention', 'full_attention'],
      'use_sliding_window': True,
      'sliding_window': 70,
    },
  ),
  'gemma': ('Gemma', {'head_dim': 10}),
  'gemma_untied': (
    'Gemma',
    {**_HEADS_3, 'head_dim': 6, 'tie_word_embeddings': False},
  ),
  'gemma2': (
    'Gemma2',
    {
      'num_hidden_layers': 3,
      'head_dim': 6,
      'query_pre_attn_scalar': 11,
      'sliding_window': 9,
      'attn_logit_softcapping': 2.0,
      'final_logit_softcapping': 3.0,
    },
  ),
  'gemma2_plain': (
    'Gemma2',
    {
      **_HEADS_3,
      'head_dim': 8,
      'query_pre_attn_scalar': 8,
      'attn_logit_softcapping': None,
      'final_logit_softcapping': None,
      'sliding_window': 64,
    },
  ),
  'gemma3': (
    'Gemma3Text',
    {
      'num_hidden_layers': 4,
      'head_dim': 6,
      'query_pre_attn_scalar': 7,
      'sliding_window': 9,
      'layer_types': ['sliding_attention', 'full_attention'] * 2,
      'rope_parameters': {
        'full_attention': {
          'rope_type': 'linear',
          'factor': 8.0,
          'rope_theta': 5000.0,
        },
        'sliding_attention': {'rope_type': 'default', 'rope_theta': 100.0},
      },
    },
  ),  # fmt: skip
  'gemma3_all_local': (
    'Gemma3Text',
    {**_HEADS_3, 'head_dim': 8, 'sliding_window': 5},
  ),
  'gpt2': ('GPT2', {}),
  'gpt2_untied': (
    'GPT2',
    {
      'n_embd': 24,
      'n_head': 3,
      'n_inner': 40,
      'activation_function': 'relu',
      'tie_word_embeddings': False,
    },
  ),
  'gpt_neox': ('GPTNeoX', {}),
  'gpt_neox_serial': (
    'GPTNeoX',
    {
      **_HEADS_3,
      'use_parallel_residual': False,
      'attention_bias': False,
      'tie_word_embeddings': True,
      'hidden_act': 'gelu_new',
      'rope_parameters': {
        'rope_type': 'linear',
        'factor': 2.0,
        'rope_theta': 500.0,
        'partial_rotary_factor': 0.5,
      },
    },
  ),
  'phi3': ('Phi3', {'sliding_window': 9}),
  'phi3_longrope': (
    'Phi3',
    {
      **_HEADS_3,
      'original_max_position_embeddings': 16,
      'rope_parameters': {
        'rope_type': 'longrope',
        'rope_theta': 1e4,
        'short_factor': _DIVISORS[0],
        'long_factor': _DIVISORS[1],
      },
    },
  ),
  'olmo2': ('Olmo2', {}),
  'olmo2_odd': ('Olmo2', {**_HEADS_3, 'attention_bias': True}),
  'smollm3': ('SmolLM3', {'num_hidden_layers': 4}),
  'smollm3_list': (
    'SmolLM3',
    {**_HEADS_3, 'no_rope_layers': [0, 1], 'tie_word_embeddings': False},
  ),
  'mixtral': (
    'Mixtral',
    {'num_local_experts': 4, 'num_experts_per_tok': 2, 'sliding_window': 9},
  ),
  'mixtral_odd': (
    'Mixtral',
    {
      **_HEADS_3,
      'num_local_experts': 3,
      'num_experts_per_tok': 1,
      'tie_word_embeddings': True,
    },
  ),
  'qwen3_moe': (
    'Qwen3Moe',
    {
      'head_dim': 6,
      'num_experts': 6,
      'num_experts_per_tok': 3,
      'moe_intermediate_size': 20,
      'norm_topk_prob': True,
    },
  ),
  'qwen3_moe_dense_first': (
    'Qwen3Moe',
    {
      **_HEADS_3,
      'num_hidden_layers': 3,
      'head_dim': 8,
      'num_experts': 4,
      'num_experts_per_tok': 2,
      'moe_intermediate_size': 20,
      'mlp_only_layers': [0],
      'tie_word_embeddings': True,
    },
  ),
  'deepseek_v2': (
    'DeepseekV2',
    {
      **_LATENT,
      'n_group': 4,
      'topk_group': 2,
      'topk_method': 'group_limited_greedy',
      'routed_scaling_factor': 1.7,
      'rope_parameters': {**_YARN, 'mscale': 0.7, 'mscale_all_dim': 0.9},
    },
  ),  # fmt: skip
  'deepseek_v2_lite': (
    'DeepseekV2',
    {
      **_LATENT,
      'hidden_size': 24,
      'num_attention_heads': 3,
      'num_key_value_heads': 3,
      'q_lora_rank': None,
      'attention_bias': True,
      'first_k_dense_replace': 0,
      'num_hidden_layers': 2,
    },
  ),
  'deepseek_v3': (
    'DeepseekV3',
    {
      **_LATENT,
      'n_group': 4,
      'topk_group': 2,
      'rope_parameters': {**_YARN, 'mscale': 1.0, 'mscale_all_dim': 1.0},
    },
  ),  # fmt: skip
  'deepseek_v3_halves': (
    'DeepseekV3',
    {
      **_LATENT,
      'rope_interleave': False,
      'n_group': 1,
      'topk_group': 1,
      'norm_topk_prob': False,
      'num_hidden_layers': 2,
      'n_shared_experts': 1,
    },
  ),
}


def config_of(name: str, **overrides):
  """Returns the class of a model of `MODELS`, and its config."""
  import transformers

  kind, extra = MODELS[name]
  config_class = getattr(transformers, f'{kind}Config')
  model_class = getattr(
    transformers,
    {'GPT2': 'GPT2LMHeadModel', 'Gemma3Text': 'Gemma3ForCausalLM'}.get(
      kind, f'{kind}ForCausalLM'
    ),
  )
  sizes = dict(SIZES)
  if kind == 'GPT2':
    sizes = {
      'vocab_size': 61, 'n_embd': 32, 'n_layer': 2, 'n_head': 4,
      'n_positions': 256, 'bos_token_id': 1, 'eos_token_id': None,
      'pad_token_id': None,
    }  # fmt: skip
  # Otherwise transformers computes what its fastest kernels do.
  return model_class, config_class(
    **(sizes | extra | overrides), attn_implementation='eager'
  )


def build(name: str, **overrides):
  """Returns a model of `MODELS` whose random weights all change its output."""
  model_class, config = config_of(name, **overrides)
  return randomise(model_class(config))


def randomise(model):
  """Gives a model random weights that all change its output."""
  import torch

  generator = torch.Generator().manual_seed(0)
  with torch.no_grad():
    for key, p in [*model.named_parameters(), *_buffers(model)]:
      # As initialised, norms, biases and corrections would not show. The norms
      # of Gemma count from 1.
      counts_from_zero = type(model).__name__.startswith('Gemma')
      is_norm = 'norm' in key or '.ln_' in key
      mean = 1.0 if is_norm and not counts_from_zero else 0.0
      # A tied head would otherwise say again what it was told.
      is_table = key.endswith(('embed_tokens.weight', 'wte.weight'))
      std = 0.05 if is_table or key.endswith('.bias') else 0.3
      p.copy_(mean + std * torch.randn(p.shape, generator=generator))
  return model.eval()


def _buffers(model):
  """Returns the corrections of DeepSeek-V3: saved buffers, not parameters."""
  return [
    (name, b) for name, b in model.named_buffers() if 'correction' in name
  ]


def save(model, directory: pathlib.Path, **kwargs) -> pathlib.Path:
  """Saves a model as `transformers` does."""
  model.save_pretrained(directory, **kwargs)
  return directory
