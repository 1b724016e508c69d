"""Model shapes that experiments share, under the names people know them by."""

from models import config as config_lib


def gpt2(
  *, vocab_size: int, num_layers: int, num_heads: int, width: int, length: int
) -> config_lib.ModelConfig:
  """GPT-2 (Radford et al. 2019): LayerNorm, learned positions, GELU, biases."""
  return config_lib.ModelConfig(
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
) -> config_lib.ModelConfig:
  """Llama (arXiv:2302.13971): RMSNorm, rotary positions, SwiGLU, no biases."""
  return config_lib.ModelConfig(
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
