"""Tensor maps of GGUF files, made of the maps of Hugging Face directories.

A converter of llama.cpp gives tensors other names, and changes some of them:

    llama, smollm3    rows of queries and keys are ordered for rotations of
                      neighbours; here, they are in halves
    gemma, 2 and 3    norms have one added
    gpt2              matrices are [out, in], as in all other families
    experts           one tensor holds all experts of a layer

Reference: the names in the package gguf, and llama.cpp's converter.
"""

from collections.abc import Iterator, Mapping
import dataclasses
import re
from typing import Any

from frozen.huggingface import layouts, tensor_map
from models import model_config

_PERMUTED = ('llama', 'mistral', 'mixtral', 'smollm3')
# In models without a norm after attention, the norm in front of the MLP has
# the name of that norm.
_NORMS = {
  'input_layernorm': 'attn_norm',
  'post_attention_layernorm': 'ffn_norm',
}
_NORMS_BOTH = {
  'input_layernorm': 'attn_norm',
  'post_attention_layernorm': 'post_attention_norm',
  'pre_feedforward_layernorm': 'ffn_norm',
  'post_feedforward_layernorm': 'post_ffw_norm',
}
_PARTS = {
  'self_attn.q_proj': 'attn_q',
  'self_attn.k_proj': 'attn_k',
  'self_attn.v_proj': 'attn_v',
  'self_attn.qkv_proj': 'attn_qkv',
  'self_attn.o_proj': 'attn_output',
  'self_attn.q_norm': 'attn_q_norm',
  'self_attn.k_norm': 'attn_k_norm',
  'mlp.gate_proj': 'ffn_gate',
  'mlp.up_proj': 'ffn_up',
  'mlp.gate_up_proj': 'ffn_up',  # both of them: llama.cpp splits the rows
  'mlp.down_proj': 'ffn_down',
  'mlp.gate': 'ffn_gate_inp',
  'block_sparse_moe.gate': 'ffn_gate_inp',
  # GPT-2
  'ln_1': 'attn_norm',
  'ln_2': 'ffn_norm',
  'attn.c_attn': 'attn_qkv',
  'attn.c_proj': 'attn_output',
  'mlp.c_fc': 'ffn_up',
  'mlp.c_proj': 'ffn_down',
}
_OUTSIDE = {
  'model.embed_tokens': 'token_embd',
  'model.norm': 'output_norm',
  'lm_head': 'output',
  'transformer.wte': 'token_embd',
  'transformer.wpe': 'position_embd',
  'transformer.ln_f': 'output_norm',
}
_LAYER = re.compile(r'(?:model\.layers|transformer\.h)\.(\d+)\.(.+)')
_EXPERT = re.compile(r'(?:mlp|block_sparse_moe)\.experts\.\d+\.(.+)')
_EXPERTS = {
  'gate_proj': 'ffn_gate_exps',
  'up_proj': 'ffn_up_exps',
  'down_proj': 'ffn_down_exps',
  'w1': 'ffn_gate_exps',
  'w3': 'ffn_up_exps',
  'w2': 'ffn_down_exps',
}

# [E, in, out] here, [E, out, in] there.
_STACKED = layouts.Layout(
  lambda x: (x.transpose(0, 2, 1),),
  lambda leaf: leaf.transpose(0, 2, 1),
  lambda shape: (shape[0], shape[2], shape[1]),
)
_FROM_ONE = layouts.Layout(
  lambda x: (x - 1,), lambda leaf: leaf + 1, lambda shape: shape
)


def pieces(
  model_type: str, config: model_config.ModelConfig, values: Mapping[str, Any]
) -> list[tensor_map.Piece]:
  """Returns the pieces of all tensors of a GGUF file.

  Args:
    model_type: one of `families.MODEL_TYPES`, or mixtral.
    values: its config.json.
  """
  return list(_unique(_pieces(model_type, config, values)))


def _pieces(model_type, config, values) -> Iterator[tensor_map.Piece]:
  norms = _NORMS if config.norm_place == 'before' else _NORMS_BOTH
  for piece in tensor_map.pieces(model_type, config, values):
    *_, owner, leaf = piece.ours[0].split('/')
    theirs, kind = piece.theirs.rsplit('.', 1)
    name, is_expert = _name(theirs, norms)
    layout = piece.layout
    if is_expert:
      layout = _STACKED
    elif model_type == 'gpt2' and leaf == 'kernel':
      layout = layouts.TRANSPOSED
      if len(piece.ours) == 3:
        layout = layouts.joined([config.num_heads * config.head_width] * 3)
    elif model_type in _PERMUTED and owner in ('query', 'key'):
      heads = config.num_heads if owner == 'query' else config.num_kv_heads
      order = layouts.halves_of_pairs(heads, 0, config.head_width)
      layout = layouts.joined([heads * config.head_width], order=order)
    elif config.norm_from_one and '_norm' in owner:
      layout = _FROM_ONE
    yield dataclasses.replace(
      piece, theirs=f'{name}.{kind}', layout=layout, expert=None
    )


def _unique(found) -> Iterator[tensor_map.Piece]:
  """Yields each tensor once; a tensor of all experts comes once per expert."""
  seen = set()
  for piece in found:
    if piece.theirs not in seen:
      seen.add(piece.theirs)
      yield piece


def _name(theirs: str, norms: Mapping[str, str]) -> tuple[str, bool]:
  """Returns the name in GGUF files, and whether it holds all experts."""
  if theirs in _OUTSIDE:
    return _OUTSIDE[theirs], False
  found = _LAYER.fullmatch(theirs)
  assert found, theirs
  layer, part = found.groups()
  if expert := _EXPERT.fullmatch(part):
    return f'blk.{layer}.{_EXPERTS[expert[1]]}', True
  return f'blk.{layer}.{norms.get(part) or _PARTS[part]}', False
