"""The same weights and tokens in transformers and in this project."""

import pathlib

import jax.numpy as jnp
import torch
import transformers

from tests.helpers import tiny_models
from text import bpe

TEXTS = [
  'The quick brown fox jumps over the lazy dog. It was not amused.',
  'What is the colour of the sky? Blue, of course; 3 + 4 is 7.\n\n',
  'Question: how many apples? Answer: seven apples, naïve as it is.\n',
] * 4
MAX_LENGTH = 48


def tokenizers(directory: pathlib.Path, **options):
  """Returns our tokenizer and that of transformers, of one vocabulary.

  Args:
    directory: where the vocabulary is written.
    **options: of transformers' tokenizer.
  """
  ours = bpe.train(TEXTS, 320)
  ours.save(directory)
  names = {f'{k}_token': v for k, v in bpe.SPECIAL_TOKENS.items()}
  theirs = transformers.PreTrainedTokenizerFast(
    tokenizer_file=str(directory / 'tokenizer.json'), **names, **options
  )
  return ours, theirs


def llama(vocab_size: int, eos_id: int):
  """Returns (our config, our params, transformers' model)."""
  config = tiny_models.llama_like(vocab_size=vocab_size, max_length=MAX_LENGTH)
  model = transformers.LlamaForCausalLM(
    transformers.LlamaConfig(
      vocab_size=vocab_size,
      num_hidden_layers=config.num_layers,
      hidden_size=config.model_width,
      intermediate_size=config.mlp_width,
      num_attention_heads=config.num_heads,
      num_key_value_heads=config.num_kv_heads,
      head_dim=config.head_width,
      max_position_embeddings=MAX_LENGTH,
      rms_norm_eps=config.norm_epsilon,
      rope_parameters={
        'rope_type': 'default',
        'rope_theta': config.rope_base,
      },
      tie_word_embeddings=False,
      bos_token_id=None,
      eos_token_id=eos_id,
      pad_token_id=None,
    )
  ).eval()
  generator = torch.Generator().manual_seed(0)
  with torch.no_grad():
    for name, p in model.named_parameters():
      # Large weights: no two answers are equally likely up to rounding.
      mean = 1.0 if 'norm' in name else 0.0
      p.copy_(mean + 0.3 * torch.randn(p.shape, generator=generator))
  w = {
    name: jnp.asarray(value.numpy())
    for name, value in model.state_dict().items()
  }

  def kernel(name):
    return {'kernel': w[f'{name}.weight'].T}  # torch stores [out, in]

  def norm(name):
    return {'scale': w[f'{name}.weight']}

  tree = {
    'embed': {'embedding': w['model.embed_tokens.weight']},
    'head': {'embedding': w['lm_head.weight']},
    'final_norm': norm('model.norm'),
  }
  for n in range(config.num_layers):
    at = f'model.layers.{n}'
    tree[f'layer_{n}'] = {
      'attention_norm': norm(f'{at}.input_layernorm'),
      'attention': {
        'query': kernel(f'{at}.self_attn.q_proj'),
        'key': kernel(f'{at}.self_attn.k_proj'),
        'value': kernel(f'{at}.self_attn.v_proj'),
        'out': kernel(f'{at}.self_attn.o_proj'),
      },
      'mlp_norm': norm(f'{at}.post_attention_layernorm'),
      'mlp': {
        'gate': kernel(f'{at}.mlp.gate_proj'),
        'up': kernel(f'{at}.mlp.up_proj'),
        'down': kernel(f'{at}.mlp.down_proj'),
      },
    }
  return config, {'params': tree}, model
