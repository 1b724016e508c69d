"""Logits against transformers, an independent oracle with the same weights.

Skipped where torch and transformers are not installed
(requirements-peer.txt); CI installs them.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import layout, transformer
from tests.helpers import tiny_models

_WHY = 'the oracle is not installed: pip install -r requirements-peer.txt'
torch = pytest.importorskip('torch', reason=_WHY)
transformers = pytest.importorskip('transformers', reason=_WHY)

# Longer than one tile of queries (64), and not a multiple of it.
LENGTH = 150

# float32 sums in another order, on logits of up to about 4: differences were
# below 1e-5 when measured, and above 1e-2 for a wrong norm epsilon.
TOLERANCE = 2e-4


def _randomised(model):
  """Returns the params with random values, also in norms and biases."""
  generator = torch.Generator().manual_seed(0)
  with torch.no_grad():
    for name, p in model.named_parameters():
      # Initialised as they are, norms and biases would drop out of the result.
      mean = 1.0 if 'norm' in name or '.ln_' in name else 0.0
      p.copy_(mean + 0.2 * torch.randn(p.shape, generator=generator))
  return model.eval()


def _weights(model):
  return {k: v.detach().numpy() for k, v in model.state_dict().items()}


def _gpt2(config):
  model = transformers.GPT2LMHeadModel(
    transformers.GPT2Config(
      vocab_size=config.vocab_size,
      n_layer=config.num_layers,
      n_head=config.num_heads,
      n_embd=config.model_width,
      n_inner=config.mlp_width,
      n_positions=config.max_length,
      layer_norm_epsilon=config.norm_epsilon,
      bos_token_id=None,
      eos_token_id=None,
    )
  )
  model = _randomised(model)
  w = _weights(model)

  def dense(name):
    return {'kernel': w[f'{name}.weight'], 'bias': w[f'{name}.bias']}

  def norm(name):
    return {'scale': w[f'{name}.weight'], 'bias': w[f'{name}.bias']}

  tree = {
    'embed': {'embedding': w['transformer.wte.weight']},
    'position_embed': {'embedding': w['transformer.wpe.weight']},
    'final_norm': norm('transformer.ln_f'),
  }
  for n in range(config.num_layers):
    at = f'transformer.h.{n}'
    joint = dense(f'{at}.attn.c_attn')
    kernels = np.split(joint['kernel'], 3, axis=1)
    biases = np.split(joint['bias'], 3)
    names = ('query', 'key', 'value')
    tree[f'layer_{n}'] = {
      'attention_norm': norm(f'{at}.ln_1'),
      'attention': {
        name: {'kernel': kernel, 'bias': bias}
        for name, kernel, bias in zip(names, kernels, biases, strict=True)
      }
      | {'out': dense(f'{at}.attn.c_proj')},
      'mlp_norm': norm(f'{at}.ln_2'),
      'mlp': {
        'up': dense(f'{at}.mlp.c_fc'),
        'down': dense(f'{at}.mlp.c_proj'),
      },
    }
  return model, {'params': tree}


def _llama_fields(config):
  """Returns the fields that the configs of Llama and Mixtral share."""
  return {
    'vocab_size': config.vocab_size,
    'num_hidden_layers': config.num_layers,
    'hidden_size': config.model_width,
    'num_attention_heads': config.num_heads,
    'num_key_value_heads': config.num_kv_heads,
    'head_dim': config.head_width,
    'max_position_embeddings': config.max_length,
    'rms_norm_eps': config.norm_epsilon,
    'rope_parameters': {
      'rope_type': 'default',
      'rope_theta': config.rope_base,
    },
    'tie_word_embeddings': config.tie_embeddings,
    'bos_token_id': None,
    'eos_token_id': None,
  }


def _dense(w, name):
  return {'kernel': w[f'{name}.weight'].T}  # torch stores [out, in]


def _llama_attention(w, at):
  tree = {
    'query': _dense(w, f'{at}.self_attn.q_proj'),
    'key': _dense(w, f'{at}.self_attn.k_proj'),
    'value': _dense(w, f'{at}.self_attn.v_proj'),
    'out': _dense(w, f'{at}.self_attn.o_proj'),
  }
  for ours, theirs in (('query_norm', 'q_norm'), ('key_norm', 'k_norm')):
    if (name := f'{at}.self_attn.{theirs}.weight') in w:
      tree[ours] = {'scale': w[name]}
  return tree


def _llama(config):
  fields = {'intermediate_size': config.mlp_width, **_llama_fields(config)}
  if config.qk_norm:
    model = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**fields))
  else:
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**fields))
  model = _randomised(model)
  w = _weights(model)

  def norm(name):
    return {'scale': w[f'{name}.weight']}

  tree = {
    'embed': {'embedding': w['model.embed_tokens.weight']},
    'final_norm': norm('model.norm'),
  }
  if not config.tie_embeddings:
    tree['head'] = {'embedding': w['lm_head.weight']}
  for n in range(config.num_layers):
    at = f'model.layers.{n}'
    tree[f'layer_{n}'] = {
      'attention_norm': norm(f'{at}.input_layernorm'),
      'attention': _llama_attention(w, at),
      'mlp_norm': norm(f'{at}.post_attention_layernorm'),
      'mlp': {
        'gate': _dense(w, f'{at}.mlp.gate_proj'),
        'up': _dense(w, f'{at}.mlp.up_proj'),
        'down': _dense(w, f'{at}.mlp.down_proj'),
      },
    }
  return model, {'params': tree}


def _mixtral(config):
  fields = {
    'num_experts_per_tok': config.num_active_experts,
    **_llama_fields(config),
  }
  if config.qk_norm:
    model = transformers.Qwen3MoeForCausalLM(
      transformers.Qwen3MoeConfig(
        moe_intermediate_size=config.expert_width,
        num_experts=config.num_experts,
        norm_topk_prob=config.norm_topk,
        **fields,
      )
    )
  else:
    model = transformers.MixtralForCausalLM(
      transformers.MixtralConfig(
        intermediate_size=config.expert_width,
        num_local_experts=config.num_experts,
        **fields,
      )
    )
  model = _randomised(model)
  w = _weights(model)

  def norm(name):
    return {'scale': w[f'{name}.weight']}

  tree = {
    'embed': {'embedding': w['model.embed_tokens.weight']},
    'head': {'embedding': w['lm_head.weight']},
    'final_norm': norm('model.norm'),
  }
  for n in range(config.num_layers):
    at = f'model.layers.{n}'
    gate_up = w[f'{at}.mlp.experts.gate_up_proj'].swapaxes(1, 2)
    gate, up = np.split(gate_up, 2, axis=2)
    down = w[f'{at}.mlp.experts.down_proj'].swapaxes(1, 2)
    tree[f'layer_{n}'] = {
      'attention_norm': norm(f'{at}.input_layernorm'),
      'attention': _llama_attention(w, at),
      'mlp_norm': norm(f'{at}.post_attention_layernorm'),
      'moe': {
        'router': _dense(w, f'{at}.mlp.gate'),
        'expert_gate': {'kernel': gate},
        'expert_up': {'kernel': up},
        'expert_down': {'kernel': down},
      },
    }
  return model, {'params': tree}


@pytest.mark.parametrize('scan_layers', [False, True])
@pytest.mark.parametrize(
  ('build', 'config'),
  [
    (_gpt2, tiny_models.gpt2_like(max_length=LENGTH)),
    (_llama, tiny_models.llama_like(max_length=LENGTH, rope_base=500.0)),
    (_llama, tiny_models.llama_like(max_length=LENGTH, tie_embeddings=True)),
    (_llama, tiny_models.llama_like(max_length=LENGTH, qk_norm=True)),
    (_mixtral, tiny_models.mixture(max_length=LENGTH, num_shared_experts=0)),
    (
      _mixtral,
      tiny_models.mixture(
        max_length=LENGTH, num_shared_experts=0, qk_norm=True
      ),
    ),
  ],
  ids=['gpt2', 'llama', 'llama_tied', 'qwen3', 'mixtral', 'qwen3_moe'],
)
def test_logits_equal_those_of_transformers(build, config, scan_layers):
  theirs, params = build(config)
  params = jax.tree.map(jnp.asarray, params)
  if scan_layers:
    params, config = layout.stack(
      params, dataclasses.replace(config, scan_layers=False)
    )
  tokens_BT = np.random.default_rng(0).integers(
    0, config.vocab_size, (2, LENGTH)
  )
  with torch.inference_mode():
    expected_BTV = theirs(torch.tensor(tokens_BT)).logits.numpy()
  apply = jax.jit(transformer.Transformer(config).apply)
  logits_BTV, _ = apply(params, jnp.asarray(tokens_BT))
  assert logits_BTV.dtype == jnp.float32
  # Large enough for a wrong detail to show.
  assert np.abs(expected_BTV).max() > 1
  np.testing.assert_allclose(logits_BTV, expected_BTV, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize('qk_norm', [False, True])
def test_every_parameter_of_ours_comes_from_theirs(qk_norm):
  config = tiny_models.llama_like(qk_norm=qk_norm)
  _, params = _llama(config)
  ours = jax.eval_shape(
    transformer.Transformer(config).init,
    jax.random.key(0),
    jnp.zeros((1, 1), jnp.int32),
  )
  shapes = jax.tree.map(lambda x: x.shape, params)
  assert shapes == jax.tree.map(lambda x: x.shape, ours)
