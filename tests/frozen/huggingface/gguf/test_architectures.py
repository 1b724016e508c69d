"""GGUF files of every architecture, against transformers.

The files are written as llama.cpp's converter writes them: with the names of
the `gguf` package's own map, rows ordered for rotations of neighbours, one
added to the norms of Gemma, and matrices of GPT-2 turned.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from frozen.huggingface import importing
from frozen.huggingface.gguf import reading
from models import transformer
from tests.helpers.open_weights import open_weights

gguf = pytest.importorskip('gguf', reason='requirements-hub.txt')
_WHY = 'the oracle is not installed: pip install -r requirements-peer.txt'
torch = pytest.importorskip('torch', reason=_WHY)

LENGTH = 40
# float32 sums in another order, on logits of up to about 10.
TOLERANCE = 2e-4

# A model of tests.helpers.open_weights.open_weights by architecture, and the
# fields that only some architectures have.
_WINDOW = {'attention.sliding_window': 'sliding_window'}
_EXPERTS = {'expert_used_count': 'num_experts_per_tok'}
ARCHITECTURES = {
  'llama': ('llama', {}),
  'llama3': ('llama', {}),
  'qwen2': ('qwen2', {}),
  'qwen3_plain': ('qwen3', {}),
  'gemma': ('gemma', {}),
  'gemma2_plain': (
    'gemma2',
    {
      **_WINDOW,
      'attn_logit_softcapping': 'attn_logit_softcapping',
      'final_logit_softcapping': 'final_logit_softcapping',
    },
  ),
  'gemma3_plain': ('gemma3', _WINDOW),
  'olmo2': ('olmo2', {}),
  'smollm3_plain': ('smollm3', {}),
  'phi3_plain': ('phi3', _WINDOW),
  'mixtral_plain': (
    'llama',
    {**_EXPERTS, 'expert_count': 'num_local_experts'},
  ),
  'qwen3_moe_plain': (
    'qwen3moe',
    {
      **_EXPERTS,
      'expert_count': 'num_experts',
      'expert_feed_forward_length': 'moe_intermediate_size',
    },
  ),
  'gpt2_plain': ('gpt2', {}),
}
# What a GGUF file cannot say, so that its architecture decides.
PLAIN = {
  'qwen3_plain': ('Qwen3', {'head_dim': 10}),
  'gemma2_plain': (
    'Gemma2',
    {'head_dim': 10, 'sliding_window': 9, 'query_pre_attn_scalar': 10},
  ),
  'gemma3_plain': (
    'Gemma3Text',
    {
      'head_dim': 10,
      'sliding_window': 9,
      'num_hidden_layers': 7,
      'query_pre_attn_scalar': 10,
    },
  ),
  'smollm3_plain': (
    'SmolLM3', {'num_hidden_layers': 4, 'tie_word_embeddings': True}
  ),
  'phi3_plain': ('Phi3', {'sliding_window': 9, 'pad_token_id': 0}),
  'mixtral_plain': (
    'Mixtral', {'num_local_experts': 4, 'sliding_window': None}
  ),
  'qwen3_moe_plain': (
    'Qwen3Moe',
    {
      'num_experts': 4,
      'num_experts_per_tok': 2,
      'moe_intermediate_size': 24,
      'norm_topk_prob': True,
      'head_dim': 8,
    },
  ),
  'gpt2_plain': ('GPT2', {}),
}  # fmt: skip


@pytest.fixture(autouse=True)
def _one_thread():
  num_threads = torch.get_num_threads()
  torch.set_num_threads(1)
  yield
  torch.set_num_threads(num_threads)


def _converted(name, x, config, architecture):
  """Returns a tensor as llama.cpp's converter writes it."""
  if architecture in ('llama', 'smollm3') and (
    'q_proj' in name or 'k_proj' in name
  ):
    heads = config.num_attention_heads
    if 'k_proj' in name:
      heads = config.num_key_value_heads
    halves = x.reshape(heads, 2, x.shape[0] // heads // 2, *x.shape[1:])
    x = halves.swapaxes(1, 2).reshape(x.shape)
  if architecture.startswith('gemma') and name.endswith('norm.weight'):
    x = x + 1
  if (
    architecture == 'gpt2'
    and x.ndim == 2
    and 'wte' not in name
    and 'wpe' not in name
  ):
    x = x.T
  return np.ascontiguousarray(x)


def tensors(model, architecture):
  """Yields names and values of a GGUF file with the weights of a model."""
  config = model.config
  arch = next(k for k, v in gguf.MODEL_ARCH_NAMES.items() if v == architecture)
  names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
  tied = config.tie_word_embeddings
  experts = {}
  for name, x in model.state_dict().items():
    if name == 'lm_head.weight' and tied:
      continue
    x = _converted(name, x.float().numpy(), config, architecture)
    if '.experts.' in name and name.split('.experts.')[1][0].isdigit():
      start, rest = name.split('.experts.')
      index, rest = rest.split('.', 1)
      experts.setdefault(f'{start}.experts.{rest}', {})[int(index)] = x
      continue
    if '.experts.gate_up_proj' in name:
      gate, up = np.split(x, 2, axis=1)
      layer = name.split('.')[2]
      yield f'blk.{layer}.ffn_gate_exps.weight', np.ascontiguousarray(gate)
      yield f'blk.{layer}.ffn_up_exps.weight', np.ascontiguousarray(up)
      continue
    if '.experts.down_proj' in name:
      yield f'blk.{name.split(".")[2]}.ffn_down_exps.weight', x
      continue
    found = names.get_name(name, try_suffixes=('.weight', '.bias'))
    assert found, name
    yield found, x
  for name, parts in experts.items():
    found = names.get_name(name, try_suffixes=('.weight', '.bias'))
    yield found, np.stack([parts[i] for i in sorted(parts)])


def write(path, model, architecture, extra):
  """Writes a model as llama.cpp's converter does."""
  config = model.config
  writer = gguf.GGUFWriter(path, architecture)
  width = config.hidden_size // config.num_attention_heads
  head_width = getattr(config, 'head_dim', None) or width
  writer.add_context_length(config.max_position_embeddings)
  writer.add_embedding_length(config.hidden_size)
  writer.add_block_count(config.num_hidden_layers)
  writer.add_head_count(config.num_attention_heads)
  if architecture == 'gpt2':
    writer.add_feed_forward_length(4 * config.hidden_size)
    writer.add_layer_norm_eps(config.layer_norm_epsilon)
  else:
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_key_length(head_width)
    writer.add_value_length(head_width)
    writer.add_rope_dimension_count(head_width)
    rope = config.rope_parameters
    rope = rope.get('full_attention', rope)
    writer.add_rope_freq_base(rope['rope_theta'])
  for name, theirs in extra.items():
    value = getattr(config, theirs)
    add = writer.add_float32 if isinstance(value, float) else writer.add_uint32
    add(f'{architecture}.{name}', value)
  for name, x in tensors(model, architecture):
    writer.add_tensor(name, x)
  if getattr(config, 'rope_parameters', {}).get('rope_type') == 'llama3':
    width = head_width
    plain = 1 / rope['rope_theta'] ** (np.arange(0, width, 2) / width)
    scaled = model.model.rotary_emb.inv_freq.numpy()
    divisors = (plain / scaled).astype(np.float32)
    writer.add_tensor('rope_freqs.weight', divisors)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()


@pytest.fixture(params=ARCHITECTURES)
def pair(request, tmp_path, monkeypatch):
  """A model of transformers, and its GGUF file."""
  for name, entry in PLAIN.items():
    monkeypatch.setitem(open_weights.MODELS, name, entry)
  model = open_weights.build(request.param)
  architecture, extra = ARCHITECTURES[request.param]
  write(tmp_path / 'a.gguf', model, architecture, extra)
  return model, tmp_path / 'a.gguf'


def test_logits_are_those_of_the_model_that_was_converted(pair):
  model, path = pair
  source, pieces = reading.open_file(path)
  importing.check_tensors(source, pieces)
  params = importing.load_params(source, 'float32', pieces=pieces)
  tokens = np.random.default_rng(0).integers(
    0, source.config.vocab_size, (2, LENGTH), np.int32
  )
  positions = jnp.broadcast_to(jnp.arange(LENGTH), tokens.shape)
  ours = jax.jit(transformer.Transformer(source.config).apply)(
    params, jnp.asarray(tokens), positions
  )[0]
  with torch.no_grad():
    theirs = model(torch.tensor(tokens, dtype=torch.long)).logits.numpy()
  np.testing.assert_allclose(ours, theirs, atol=TOLERANCE)
