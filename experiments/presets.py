"""Model shapes that several experiments share, under their published names."""

import dataclasses

from models import model_config

# A conversation as the prompts of evals/tasks/gsm8k.py write it.
QUESTION_TEMPLATE = """\
{{ bos_token }}{% for message in messages %}
{% if message.role == 'assistant' %}
Answer:{% generation %} {{ message.content }}{{ eos_token }}{% endgeneration %}
{% else %}
Question: {{ message.content }}
{% endif %}
{% endfor %}
{% if add_generation_prompt %}Answer:{% endif %}"""


def gpt2(
  *, vocab_size: int, num_layers: int, num_heads: int, width: int, length: int
) -> model_config.ModelConfig:
  """Returns GPT-2: LayerNorm, learned positions, GELU, biases.

  Reference: Radford et al. 2019.
  """
  return model_config.ModelConfig(
    vocab_size=vocab_size,
    num_layers=num_layers,
    model_width=width,
    num_heads=num_heads,
    num_kv_heads=num_heads,
    head_width=width // num_heads,
    mlp_width=4 * width,
    max_length=length,
    norm='layernorm',
    positions='learned',
    mlp='gelu',
    use_bias=True,
    tie_embeddings=True,
  )


def llama(
  *,
  vocab_size: int,
  num_layers: int,
  num_heads: int,
  num_kv_heads: int,
  width: int,
  mlp_width: int,
  length: int,
) -> model_config.ModelConfig:
  """Returns Llama: RMSNorm, rotary positions, SwiGLU, no biases.

  Reference: arXiv:2302.13971.
  """
  return model_config.ModelConfig(
    vocab_size=vocab_size,
    num_layers=num_layers,
    model_width=width,
    num_heads=num_heads,
    num_kv_heads=num_kv_heads,
    head_width=width // num_heads,
    mlp_width=mlp_width,
    max_length=length,
    tie_embeddings=False,
  )


def smollm2_135m() -> model_config.ModelConfig:
  """Returns SmolLM2-135M: 134.5M parameters, tied embeddings.

  Reference: arXiv:2502.02737.
  """
  return dataclasses.replace(
    llama(
      vocab_size=49_152,
      num_layers=30,
      num_heads=9,
      num_kv_heads=3,
      width=576,
      mlp_width=1536,
      length=8192,
    ),
    rope_base=100_000.0,
    tie_embeddings=True,
  )


def llama3(
  *,
  num_layers: int,
  num_heads: int,
  width: int,
  mlp_width: int,
  length: int,
  tie_embeddings: bool = False,
) -> model_config.ModelConfig:
  """Returns Llama 3: 8 kv heads, vocabulary 128,256, rope base 500,000.

  Layers, heads, width and mlp_width of the 8B: 32, 32, 4096, 14336; of the 70B:
  80, 64, 8192, 28672; of the 1B of Llama 3.2: 16, 32, 2048, 8192 with tied
  embeddings.

  Reference: arXiv:2407.21783, table 3.
  """
  return dataclasses.replace(
    llama(
      vocab_size=128_256,
      num_layers=num_layers,
      num_heads=num_heads,
      num_kv_heads=8,
      width=width,
      mlp_width=mlp_width,
      length=length,
    ),
    rope_base=500_000.0,
    tie_embeddings=tie_embeddings,
  )


def qwen3_30b_a3b(*, length: int) -> model_config.ModelConfig:
  """Returns Qwen3-30B-A3B: 8 of 128 experts per token.

  30.53B parameters, of which 3.35B are active per token.

  Reference: arXiv:2505.09388, table 2.
  """
  return dataclasses.replace(
    llama(
      vocab_size=151_936,
      num_layers=48,
      num_heads=32,
      num_kv_heads=4,
      width=2048,
      mlp_width=0,
      length=length,
    ),
    head_width=128,
    num_experts=128,
    num_active_experts=8,
    expert_width=768,
    rope_base=1_000_000.0,
    norm_epsilon=1e-6,
    qk_norm=True,
    balance_loss_weight=1e-3,
  )
