"""Tensor maps: the tensors of a family, and the parameter leaves in each.

A map is a list of pieces. A piece has the name of a tensor, the leaves that it
holds, and its layout. The same list serves import and export. A tensor or a
leaf that is not in the list is an error.

Experts have two forms. A tensor for each matrix of each expert is the form of
published models; transformers writes it unless save_original_format is false,
and reads it in all versions. So exports have it, too. The other form is used by
the modules of transformers 5: one tensor for all experts of a layer.
"""

from collections.abc import Iterable, Iterator, Mapping
import dataclasses
import re
from typing import Any

from frozen.huggingface import layouts
from models import model_config
from models.layers import mlp

# Tensors that follow from the config: rotary frequencies, and the triangular
# masks in old files. They are ignored.
DERIVED = re.compile(
  r'.*rotary_emb\.inv_freq|.*\.attn\.(masked_)?bias'
  r'|.*\.attention\.(masked_)?bias'
)

_FUSED = ('gate_up_proj', 'down_proj')  # they hold all experts of a layer

AS_IT_IS, TRANSPOSED = layouts.AS_IT_IS, layouts.TRANSPOSED


@dataclasses.dataclass(frozen=True)
class Piece:
  """One of their tensors, and the leaves that it holds."""

  theirs: str
  ours: tuple[str, ...]  # paths of leaves, 'layer_0/mlp/up/kernel'
  layout: layouts.Layout
  expert: int | None = None  # index into leaves that hold all experts


@dataclasses.dataclass(frozen=True)
class Names:
  """Names in which the families that resemble Llama differ."""

  prefix: str = 'model.'
  attention_norm: str = 'input_layernorm'
  attention_norm_after: str = 'post_attention_layernorm'
  mlp_norm: str = 'post_attention_layernorm'
  mlp_norm_after: str = 'post_feedforward_layernorm'
  is_joined: bool = False  # one tensor for q, k, v, and one for gate and up
  moe: str = 'mlp'
  expert: tuple[str, str, str] = ('gate_proj', 'up_proj', 'down_proj')
  is_fused: bool = False  # one tensor for all experts of a layer


_LLAMA = Names()
_NAMES: Mapping[str, Names] = {
  'phi3': Names(is_joined=True),
  'gemma2': Names(mlp_norm='pre_feedforward_layernorm'),
  'gemma3_text': Names(mlp_norm='pre_feedforward_layernorm'),
  'mixtral': Names(moe='block_sparse_moe', expert=('w1', 'w3', 'w2')),
}


def has_fused_experts(names: Iterable[str]) -> bool:
  """Returns whether all experts of a layer share a tensor, by tensor names."""
  return any(name.endswith(f'.experts.{_FUSED[0]}') for name in names)


def pieces(
  model_type: str,
  config: model_config.ModelConfig,
  values: Mapping[str, Any],
  *,
  is_fused: bool = False,
) -> list[Piece]:
  """Returns the pieces of all tensors of a model.

  Args:
    model_type: one of `config_json.FAMILIES`.
    values: its config.json, for fields about the order of tensor rows.
    is_fused: whether all experts of a layer share a tensor.
  """
  if model_type == 'gpt2':
    return list(_gpt2(config))
  if model_type == 'gpt_neox':
    return list(_gpt_neox(config))
  names = _NAMES.get(model_type, _LLAMA)
  if is_fused:  # all families have one name for the layer there
    names = dataclasses.replace(names, is_fused=True, moe=_LLAMA.moe)
  # null is false, as in transformers.
  is_paired = model_type == 'deepseek_v2' or (
    model_type == 'deepseek_v3' and values.get('rope_interleave', True)
  )
  return list(_llama(config, names, is_paired))


def prefix_of(model_type: str) -> str:
  """Returns the prefix of tensor names; absent in files without a head."""
  given = {'gpt2': 'transformer.', 'gpt_neox': 'gpt_neox.'}
  return given.get(model_type, 'model.')


def _leaf(theirs: str, ours: str, layout: layouts.Layout = AS_IT_IS) -> Piece:
  return Piece(theirs, (ours,), layout)


def _linear(
  theirs: str, ours: str | Iterable[str], layout: layouts.Layout, has_bias: bool
) -> Iterator[Piece]:
  """Yields the piece of a matrix, and of its bias if there is one."""
  owners = (ours,) if isinstance(ours, str) else tuple(ours)
  for kind, name in (('weight', 'kernel'), ('bias', 'bias'))[: 1 + has_bias]:
    leaves = tuple(f'{owner}/{name}' for owner in owners)
    plain = name == 'bias' and layout is TRANSPOSED
    yield Piece(f'{theirs}.{kind}', leaves, AS_IT_IS if plain else layout)


def _norm(theirs: str, ours: str, has_bias: bool = False) -> Iterator[Piece]:
  yield _leaf(f'{theirs}.weight', f'{ours}/scale')
  if has_bias:
    yield _leaf(f'{theirs}.bias', f'{ours}/bias')


def _llama(config, names: Names, is_paired: bool) -> Iterator[Piece]:
  yield _leaf(f'{names.prefix}embed_tokens.weight', 'embed/embedding')
  yield from _norm(f'{names.prefix}norm', 'final_norm')
  if not config.tie_embeddings:
    yield _leaf('lm_head.weight', 'head/embedding')
  for n in range(config.num_layers):
    at, layer = f'{names.prefix}layers.{n}', f'layer_{n}'
    if config.norm_place != 'after':
      yield from _norm(
        f'{at}.{names.attention_norm}', f'{layer}/attention_norm'
      )
      yield from _norm(f'{at}.{names.mlp_norm}', f'{layer}/mlp_norm')
    if config.norm_place != 'before':
      for name in ('attention_norm_after', 'mlp_norm_after'):
        yield from _norm(f'{at}.{getattr(names, name)}', f'{layer}/{name}')
    at_attention = f'{at}.self_attn', f'{layer}/attention'
    if config.latent_width:
      yield from _latent(config, *at_attention, is_paired)
    else:
      yield from _attention(config, names, *at_attention)
    if config.layer(n).has_experts:
      yield from _experts(config, names, f'{at}.{names.moe}', f'{layer}/moe')
    else:
      yield from _dense(config, names, f'{at}.mlp', f'{layer}/mlp')


def _attention(config, names, at, ours) -> Iterator[Piece]:
  sizes = [
    heads * config.head_width
    for heads in (config.num_heads, config.num_kv_heads, config.num_kv_heads)
  ]
  owners = [f'{ours}/{name}' for name in ('query', 'key', 'value')]
  has_bias = config.use_bias or config.qkv_bias
  if names.is_joined:
    yield from _linear(
      f'{at}.qkv_proj', owners, layouts.joined(sizes), has_bias
    )
  else:
    for name, owner in zip('qkv', owners, strict=True):
      yield from _linear(f'{at}.{name}_proj', owner, TRANSPOSED, has_bias)
  if config.qk_norm:
    yield from _norm(f'{at}.q_norm', f'{ours}/query_norm')
    yield from _norm(f'{at}.k_norm', f'{ours}/key_norm')
  yield from _linear(
    f'{at}.o_proj',
    f'{ours}/out',
    TRANSPOSED,
    config.use_bias or config.out_bias,
  )


def _latent(config, at, ours, is_paired) -> Iterator[Piece]:
  rotated, heads = config.rotary_width, config.num_heads
  others = config.head_width - rotated

  def order(heads, before):
    # Ours has the rotated channels of each head first.
    if is_paired:
      return layouts.halves_of_pairs(heads, before, rotated)
    head = [*range(before, before + rotated), *range(before)]
    size = before + rotated
    return [h * size + i for h in range(heads) for i in head]

  queries = layouts.joined(
    [heads * config.head_width], order=order(heads, others)
  )
  if config.query_latent_width:
    yield from _linear(
      f'{at}.q_a_proj', f'{ours}/query_down', TRANSPOSED, config.qkv_bias
    )
    yield from _norm(f'{at}.q_a_layernorm', f'{ours}/query_latent_norm')
    yield from _linear(f'{at}.q_b_proj', f'{ours}/query_up', queries, False)
  else:
    yield from _linear(f'{at}.q_proj', f'{ours}/query', queries, False)
  latent = config.latent_width
  yield from _linear(
    f'{at}.kv_a_proj_with_mqa',
    (f'{ours}/key_rope', f'{ours}/latent'),
    layouts.joined([rotated, latent], order=order(1, latent)),
    config.qkv_bias,
  )
  yield from _norm(f'{at}.kv_a_layernorm', f'{ours}/latent_norm')
  yield from _linear(
    f'{at}.kv_b_proj',
    (f'{ours}/key_up', f'{ours}/value_up'),
    layouts.joined([others, config.value_head_width], heads=heads),
    False,
  )
  yield from _linear(f'{at}.o_proj', f'{ours}/out', TRANSPOSED, config.out_bias)


def _dense(config, names, at, ours, width: int = 0) -> Iterator[Piece]:
  has_bias = config.use_bias or config.mlp_bias
  owners = [f'{ours}/gate', f'{ours}/up']
  if not mlp.is_gated(config.mlp):
    raise ValueError(f'got mlp = {config.mlp}, expected one with a gate')
  if names.is_joined:
    sizes = [width or config.mlp_width] * 2
    yield from _linear(
      f'{at}.gate_up_proj', owners, layouts.joined(sizes), has_bias
    )
  else:
    for name, owner in zip(('gate', 'up'), owners, strict=True):
      yield from _linear(f'{at}.{name}_proj', owner, TRANSPOSED, has_bias)
  yield from _linear(f'{at}.down_proj', f'{ours}/down', TRANSPOSED, has_bias)


def _experts(config, names, at, ours) -> Iterator[Piece]:
  yield _leaf(f'{at}.gate.weight', f'{ours}/router/kernel', TRANSPOSED)
  if config.router_correction:
    yield _leaf(
      f'{at}.gate.e_score_correction_bias', f'{ours}/router_correction/bias'
    )
  kinds = ('expert_gate', 'expert_up', 'expert_down')
  if names.is_fused:
    leaves = tuple(f'{ours}/{kind}/kernel' for kind in kinds)
    for name, owners in zip(_FUSED, (leaves[:2], leaves[2:]), strict=True):
      layout = layouts.stacked(len(owners))
      yield Piece(f'{at}.experts.{name}', owners, layout)
  for e in range(0 if names.is_fused else config.num_experts):
    for kind, name in zip(kinds, names.expert, strict=True):
      theirs = f'{at}.experts.{e}.{name}.weight'
      yield Piece(theirs, (f'{ours}/{kind}/kernel',), TRANSPOSED, expert=e)
  if config.num_shared_experts:
    yield from _dense(config, names, f'{at}.shared_experts', f'{ours}/shared')


def _gpt2(config) -> Iterator[Piece]:
  # GPT-2 has Conv1D layers, whose matrices are [in, out] like our kernels.
  yield _leaf('transformer.wte.weight', 'embed/embedding')
  yield _leaf('transformer.wpe.weight', 'position_embed/embedding')
  yield from _norm('transformer.ln_f', 'final_norm', True)
  if not config.tie_embeddings:
    yield _leaf('lm_head.weight', 'head/embedding')
  for n in range(config.num_layers):
    at, layer = f'transformer.h.{n}', f'layer_{n}'
    yield from _norm(f'{at}.ln_1', f'{layer}/attention_norm', True)
    yield from _norm(f'{at}.ln_2', f'{layer}/mlp_norm', True)
    owners = [f'{layer}/attention/{x}' for x in ('query', 'key', 'value')]
    yield from _linear(f'{at}.attn.c_attn', owners, layouts.columns(3), True)
    for theirs, ours in (
      ('attn.c_proj', 'attention/out'),
      ('mlp.c_fc', 'mlp/up'),
      ('mlp.c_proj', 'mlp/down'),
    ):
      yield from _linear(f'{at}.{theirs}', f'{layer}/{ours}', AS_IT_IS, True)


def _gpt_neox(config) -> Iterator[Piece]:
  yield _leaf('gpt_neox.embed_in.weight', 'embed/embedding')
  yield from _norm('gpt_neox.final_layer_norm', 'final_norm', True)
  if not config.tie_embeddings:
    yield _leaf('embed_out.weight', 'head/embedding')
  per_head = layouts.joined([config.head_width] * 3, heads=config.num_heads)
  for n in range(config.num_layers):
    at, layer = f'gpt_neox.layers.{n}', f'layer_{n}'
    yield from _norm(f'{at}.input_layernorm', f'{layer}/attention_norm', True)
    yield from _norm(
      f'{at}.post_attention_layernorm', f'{layer}/mlp_norm', True
    )
    owners = [f'{layer}/attention/{x}' for x in ('query', 'key', 'value')]
    has_bias = config.use_bias or config.qkv_bias
    yield from _linear(
      f'{at}.attention.query_key_value', owners, per_head, has_bias
    )
    yield from _linear(
      f'{at}.attention.dense', f'{layer}/attention/out', TRANSPOSED, has_bias
    )
    for theirs, ours in (('dense_h_to_4h', 'up'), ('dense_4h_to_h', 'down')):
      yield from _linear(
        f'{at}.mlp.{theirs}', f'{layer}/mlp/{ours}', TRANSPOSED, True
      )
