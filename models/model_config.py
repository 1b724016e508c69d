"""ModelConfig: everything that decides what function a parameter tree is.

It is stored whole in every checkpoint and frozen directory, so that nothing is
ever inferred from a path or from the shape of an array.
"""

import dataclasses
import math
from typing import Any

from models.attention import rope_scaling as rope_scaling_lib

NORMS = ('rmsnorm', 'layernorm')
NORM_PLACES = ('before', 'after', 'both')
POSITIONS = ('rope', 'learned')
MLPS = ('swiglu', 'geglu', 'geglu_exact', 'reglu', 'gelu', 'gelu_exact', 'relu')
# Of these, what experts can be.
EXPERT_MLPS = ('swiglu', 'gelu')
SCORES = ('softmax', 'sigmoid')
LAYER_KINDS = {
  'g': 'global: sees all tokens before it',
  'l': 'local: sees those of a window',
  'n': 'global, without rotary positions',
  'm': 'local, without rotary positions',
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layer:
  """What one layer has of its own, besides its weights."""

  is_local: bool
  has_rope: bool
  has_experts: bool


@dataclasses.dataclass(kw_only=True, unsafe_hash=True)
class ModelConfig:
  """A decoder-only transformer.

  Hashable because linen modules are; flags may set fields before the first
  use, and nothing does afterwards.
  """

  vocab_size: int  # V, rows of the embedding
  num_layers: int  # N
  model_width: int  # D, the residual stream
  num_heads: int  # H, query heads
  num_kv_heads: int  # K, key/value heads; H for multi-head attention
  head_width: int  # C, channels per head
  mlp_width: int  # F, hidden width of the feed-forward block; 0 in a mixture
  max_length: int  # positions the model is trained for, in tokens
  norm: str = 'rmsnorm'  # rmsnorm (arXiv:1910.07467) | layernorm
  norm_epsilon: float = 1e-5  # added to the variance
  positions: str = 'rope'  # rope (arXiv:2104.09864) | learned
  rope_base: float = 10_000.0  # wavelength base, RoPE section 3.3
  mlp: str = 'swiglu'  # see models/mlp.py
  use_bias: bool = False  # biases in linear layers and in LayerNorm
  tie_embeddings: bool = True  # the head is the embedding
  qk_norm: bool = False  # RMSNorm of each head's queries and keys, before rope
  logit_softcap: float = 0.0  # cap; logits are cap tanh(logits / cap). 0: none
  dropout_rate: float = 0.0  # embeddings, attention weights, both residuals
  init_std: float = 0.02  # GPT-2; residual outputs divide by sqrt(2N)
  mup_base_width: int = 0  # D that muP agrees with; 0: no muP. models/mup.py
  mup_base_head_width: int = 0  # C at that D; 0: C does not grow with D
  scan_layers: bool = True  # one stacked block (compiles once) or N of them
  num_experts: int = 0  # E, routed experts of a mixture; 0: a dense model
  num_active_experts: int = 0  # A, routed experts that a token takes
  num_shared_experts: int = 0  # taken by every token, together one block
  expert_width: int = 0  # F of one expert, routed or shared
  norm_topk: bool = True  # weights of a token's experts add up to 1
  balance_loss_weight: float = (
    0.0  # see models/moe/layer.py; per layer and token
  )
  router_z_weight: float = 0.0  # likewise
  # Which families of open weights have the rest is told in frozen/hf_config.py.
  qkv_bias: bool = False  # biases of queries, keys and values, use_bias or not
  out_bias: bool = False  # of the projection back, likewise
  mlp_bias: bool = False  # of the feed-forward block, likewise
  norm_bias: bool = False  # of LayerNorm, likewise
  norm_place: str = 'before'  # before | after each of the two | both
  norm_from_one: bool = False  # the weight of a scale is what it exceeds 1 by
  parallel_residual: bool = False  # attention and mlp see the same stream
  embed_multiplier: float = 1.0  # of embedded tokens; Gemma: sqrt(D)
  qk_norm_whole: bool = False  # qk_norm over all heads together
  query_scale: float = 0.0  # of scores, instead of 1 / sqrt(C); 0: that
  attention_softcap: float = 0.0  # cap of scores, as logit_softcap; 0: none
  window: int = 0  # keys that local layers see, their own included; 0: none
  layer_pattern: str = ''  # of LAYER_KINDS, repeated; '': all alike
  rope_local_base: float = 0.0  # of local layers, never stretched; 0: as others
  rope_scaling: rope_scaling_lib.RopeScaling = dataclasses.field(
    default_factory=rope_scaling_lib.RopeScaling
  )
  rotary_width: int = 0  # channels of a head that are rotated; 0: all
  latent_width: int = 0  # L, see models/attention/latent_layer.py; 0: none
  query_latent_width: int = 0  # of compressed queries; 0: not compressed
  value_width: int = 0  # channels of a value; 0: C
  num_dense_layers: int = 0  # of a mixture: its first ones have no experts
  router_score: str = 'softmax'  # of all experts together | sigmoid of each
  router_correction: bool = False  # added to scores only to choose by
  num_expert_groups: int = 0  # that experts are chosen from; 0: no groups
  num_active_groups: int = 0  # groups that a token's experts are from
  expert_group_best: int = 1  # a group is judged by the sum of so many scores
  router_scale: float = 1.0  # of the weights of routed experts

  @property
  def queries_per_kv(self) -> int:
    """G: query heads that share one key/value head."""
    return self.num_heads // self.num_kv_heads

  @property
  def rotated_width(self) -> int:
    """Channels of a head that are rotated."""
    return self.rotary_width or self.head_width

  @property
  def value_head_width(self) -> int:
    """Channels of a value."""
    return self.value_width or self.head_width

  def layer(self, n: int) -> Layer:
    """Returns what layer n has of its own."""
    pattern = self.layer_pattern or ('l' if self.window else 'g')
    kind = pattern[n % len(pattern)]
    return Layer(
      is_local=kind in 'lm',
      has_rope=kind in 'lg' and self.positions == 'rope',
      has_experts=bool(self.num_experts) and n >= self.num_dense_layers,
    )

  @property
  def is_uniform(self) -> bool:
    """Whether all layers are alike, so that they can be stacked."""
    return len({self.layer(n) for n in range(self.num_layers)}) == 1

  def validate(self) -> None:
    """Raises ValueError, naming the value, for what cannot be built."""
    for name in _COUNTS:
      value = getattr(self, name)
      if name == 'mlp_width' and self.num_experts:
        continue  # checked with the experts
      if not isinstance(value, int) or value < 1:
        raise ValueError(
          f'model.{name}: got {value!r}, expected a positive integer'
        )
    for name, allowed in (
      ('norm', NORMS),
      ('positions', POSITIONS),
      ('mlp', MLPS),
      ('norm_place', NORM_PLACES),
      ('router_score', SCORES),
    ):
      if getattr(self, name) not in allowed:
        raise ValueError(
          f'model.{name}: got {getattr(self, name)!r}, expected one of'
          f' {", ".join(allowed)}'
        )
    if self.num_heads % self.num_kv_heads:
      raise ValueError(
        f'model.num_kv_heads: got {self.num_kv_heads}, expected a divisor of'
        f' num_heads = {self.num_heads}'
      )
    if not 0.0 <= self.dropout_rate < 1.0:
      raise ValueError(
        f'model.dropout_rate: got {self.dropout_rate}, expected 0 <= rate < 1'
      )
    for name in ('norm_epsilon', 'rope_base', 'init_std'):
      if not 0 < getattr(self, name) < math.inf:
        raise ValueError(
          f'model.{name}: got {getattr(self, name)}, expected a positive number'
        )
    for name, bounded in (
      ('logit_softcap', 'logits'),
      ('attention_softcap', 'scores of attention'),
    ):
      if not 0 <= getattr(self, name) < math.inf:
        raise ValueError(
          f'model.{name}: got {getattr(self, name)}, expected a number >= 0:'
          f' the bound of the {bounded}, or 0 for none'
        )
    self._validate_positions()
    self._validate_layers()
    self._validate_latent()
    self._validate_mup()
    self._validate_experts()
    self._validate_router()

  def _validate_positions(self) -> None:
    width, name = self.rotated_width, 'rotary_width'
    if not self.rotary_width:
      name = 'head_width'
    if self.positions == 'rope' and width % 2:
      raise ValueError(
        f'model.{name}: got {width}, expected an even number: rotary positions'
        ' rotate pairs of channels'
      )
    if not 0 <= self.rotary_width <= self.head_width:
      raise ValueError(
        f'model.rotary_width: got {self.rotary_width}, expected at most'
        f' head_width = {self.head_width}, or 0 for all of it'
      )
    for name in ('rope_local_base', 'query_scale'):
      if not 0 <= getattr(self, name) < math.inf:
        raise ValueError(
          f'model.{name}: got {getattr(self, name)}, expected a number >= 0'
        )
    if not 0 < self.embed_multiplier < math.inf:
      raise ValueError(
        f'model.embed_multiplier: got {self.embed_multiplier}, expected a'
        ' positive number'
      )
    self.rope_scaling.validate(width // 2)

  def _validate_layers(self) -> None:
    if self.window < 0:
      raise ValueError(
        f'model.window: got {self.window}, expected a positive integer, or 0'
        ' for none'
      )
    if unknown := set(self.layer_pattern) - set(LAYER_KINDS):
      raise ValueError(
        f'model.layer_pattern: got {self.layer_pattern!r} with'
        f' {sorted(unknown)}, expected letters of {", ".join(LAYER_KINDS)}'
      )
    if set(self.layer_pattern) & set('lm') and not self.window:
      raise ValueError(
        f'model.window: got 0 with local layers, {self.layer_pattern!r},'
        ' expected how many keys they see'
      )
    if self.scan_layers and not self.is_uniform:
      raise ValueError(
        'model.scan_layers: got True for layers that differ'
        f' (layer_pattern = {self.layer_pattern!r}, num_dense_layers ='
        f' {self.num_dense_layers}), expected False: a stack has layers that'
        ' are alike'
      )
    if self.parallel_residual and self.norm_place == 'after':
      raise ValueError(
        "model.norm_place: got 'after' with parallel_residual, expected before"
        ' or both'
      )
    if self.qk_norm_whole and not self.qk_norm:
      raise ValueError(
        'model.qk_norm_whole: got True without qk_norm, expected False; set'
        ' model.qk_norm too'
      )

  def _validate_latent(self) -> None:
    if not self.latent_width:
      for name in ('query_latent_width', 'value_width'):
        if getattr(self, name):
          raise ValueError(
            f'model.{name}: got {getattr(self, name)} without latent_width,'
            ' expected 0; set model.latent_width too'
          )
      return
    if not 0 < self.rotary_width < self.head_width:
      raise ValueError(
        f'model.rotary_width: got {self.rotary_width} with latent_width ='
        f' {self.latent_width}, expected 1 to head_width - 1 ='
        f' {self.head_width - 1}: what all heads share, and what each has'
      )
    if self.num_kv_heads != self.num_heads:
      raise ValueError(
        f'model.num_kv_heads: got {self.num_kv_heads} with latent_width,'
        f' expected num_heads = {self.num_heads}: each head has keys of its own'
      )
    for name in ('qk_norm', 'window', 'attention_softcap', 'use_bias'):
      if getattr(self, name):
        raise ValueError(
          f'model.{name}: got {getattr(self, name)} with latent_width, expected'
          ' none: latent attention does without'
        )

  def _validate_mup(self) -> None:
    for name in ('mup_base_width', 'mup_base_head_width'):
      value = getattr(self, name)
      if not isinstance(value, int) or value < 0:
        raise ValueError(
          f'model.{name}: got {value!r}, expected a positive integer, or 0 for'
          ' none'
        )
    if self.mup_base_head_width and not self.mup_base_width:
      raise ValueError(
        f'model.mup_base_head_width: got {self.mup_base_head_width} without'
        ' muP, expected 0; set model.mup_base_width too'
      )

  def _validate_experts(self) -> None:
    if self.num_experts == 1:
      raise ValueError(
        'model.num_experts: got 1, expected 0 for a dense model or at least 2'
      )
    for name in ('num_experts', *_EXPERT_COUNTS, *_EXPERT_WEIGHTS):
      if not 0 <= getattr(self, name) < math.inf:
        raise ValueError(
          f'model.{name}: got {getattr(self, name)}, expected a number >= 0'
        )
    if not self.num_experts:
      for name in (*_EXPERT_COUNTS, *_EXPERT_WEIGHTS):
        if getattr(self, name):
          raise ValueError(
            f'model.{name}: got {getattr(self, name)} in a dense model,'
            ' expected 0; set model.num_experts for a mixture'
          )
      return
    if not 1 <= self.num_active_experts <= self.num_experts:
      raise ValueError(
        f'model.num_active_experts: got {self.num_active_experts}, expected 1'
        f' to num_experts = {self.num_experts}'
      )
    if self.expert_width < 1:
      raise ValueError(
        f'model.expert_width: got {self.expert_width}, expected a positive'
        ' integer: the hidden width of one expert'
      )
    if self.mlp_width and not self.num_dense_layers:
      raise ValueError(
        f'model.mlp_width: got {self.mlp_width} in a mixture, expected 0: every'
        ' layer has experts, of model.expert_width'
      )
    if self.num_dense_layers and self.mlp_width < 1:
      raise ValueError(
        f'model.mlp_width: got {self.mlp_width} with num_dense_layers ='
        f' {self.num_dense_layers}, expected their hidden width'
      )
    for name in ('use_bias', 'mlp_bias'):
      if getattr(self, name):
        raise ValueError(
          f'model.{name}: got True in a mixture, expected False: experts have'
          ' no biases'
        )
    if self.mlp not in EXPERT_MLPS:
      raise ValueError(
        f'model.mlp: got {self.mlp!r} in a mixture, expected one of'
        f' {", ".join(EXPERT_MLPS)}'
      )

  def _validate_router(self) -> None:
    if not 0 <= self.num_dense_layers <= self.num_layers:
      raise ValueError(
        f'model.num_dense_layers: got {self.num_dense_layers}, expected 0 to'
        f' num_layers = {self.num_layers}'
      )
    if not 0 < self.router_scale < math.inf:
      raise ValueError(
        f'model.router_scale: got {self.router_scale}, expected a positive'
        ' number'
      )
    groups = self.num_expert_groups
    if not groups:
      if self.num_active_groups:
        raise ValueError(
          f'model.num_active_groups: got {self.num_active_groups} without'
          ' groups, expected 0; set model.num_expert_groups too'
        )
      return
    if self.num_experts % groups:
      raise ValueError(
        f'model.num_expert_groups: got {groups}, expected a divisor of'
        f' num_experts = {self.num_experts}'
      )
    each = self.num_experts // groups
    if not 1 <= self.expert_group_best <= each:
      raise ValueError(
        f'model.expert_group_best: got {self.expert_group_best}, expected 1 to'
        f' the {each} experts of a group'
      )
    least = -(-self.num_active_experts // each)
    if not least <= self.num_active_groups <= groups:
      raise ValueError(
        f'model.num_active_groups: got {self.num_active_groups}, expected'
        f' {least} to {groups}: groups of {each} experts that hold'
        f' {self.num_active_experts} active ones'
      )

  def to_dict(self) -> dict[str, Any]:
    """Returns the fields as JSON values."""
    fields = dataclasses.asdict(self)
    for name, value in fields['rope_scaling'].items():
      if isinstance(value, tuple):
        fields['rope_scaling'][name] = list(value)
    return fields

  @classmethod
  def from_dict(cls, fields: dict[str, Any]) -> 'ModelConfig':
    """Rebuilds a config, refusing fields that are unknown or missing.

    Those that came later may be missing, all of them together: what was written
    before them means their defaults.
    """
    known = {field.name for field in dataclasses.fields(cls)}
    unknown, missing = set(fields) - known, known - set(fields)
    if unknown or missing not in (set(), _LATER):
      raise ValueError(
        f'model config: got unknown fields {sorted(unknown)} and missing'
        f' fields {sorted(missing)}, expected exactly those of ModelConfig;'
        ' the file was written by another version'
      )
    fields = dict(fields)
    if 'rope_scaling' in fields:
      fields['rope_scaling'] = _scaling(fields['rope_scaling'])
    config = cls(**fields)
    config.validate()
    return config


def _scaling(fields: dict[str, Any]) -> rope_scaling_lib.RopeScaling:
  """Rebuilds what `dataclasses.asdict` made of it, and JSON of that."""
  known = [f.name for f in dataclasses.fields(rope_scaling_lib.RopeScaling)]
  if sorted(fields) != sorted(known):
    raise ValueError(
      f'model config: got rope_scaling with fields {sorted(fields)}, expected'
      f' {sorted(known)}; the file was written by another version'
    )
  values: dict[str, Any] = {
    k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()
  }
  return rope_scaling_lib.RopeScaling(**values)


_COUNTS = (
  'vocab_size',
  'num_layers',
  'model_width',
  'num_heads',
  'num_kv_heads',
  'head_width',
  'mlp_width',
  'max_length',
)
_EXPERT_COUNTS = ('num_active_experts', 'num_shared_experts', 'expert_width')
_EXPERT_WEIGHTS = ('balance_loss_weight', 'router_z_weight')
# Fields that frozen directories had not from the start: the last ones.
_NAMES = [field.name for field in dataclasses.fields(ModelConfig)]
_LATER = set(_NAMES[_NAMES.index('qkv_bias') :])
