"""ModelConfig: everything that decides what function a parameter tree is.

It is stored whole in every checkpoint and frozen directory, so that nothing is
ever inferred from a path or from the shape of an array.
"""

import dataclasses
import math
from typing import Any

NORMS = ('rmsnorm', 'layernorm')
POSITIONS = ('rope', 'learned')
MLPS = ('swiglu', 'gelu')


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
  mlp: str = 'swiglu'  # swiglu (arXiv:2002.05202) | gelu (tanh form)
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
  balance_loss_weight: float = 0.0  # see models/moe.py; per layer and token
  router_z_weight: float = 0.0  # likewise

  @property
  def queries_per_kv(self) -> int:
    """G: query heads that share one key/value head."""
    return self.num_heads // self.num_kv_heads

  def validate(self) -> None:
    """Raises ValueError, naming the value, for what cannot be built."""
    for name in _COUNTS:
      value = getattr(self, name)
      if name == 'mlp_width' and self.num_experts:
        continue
      if not isinstance(value, int) or value < 1:
        raise ValueError(
          f'model.{name}: got {value!r}, expected a positive integer'
        )
    for name, allowed in (
      ('norm', NORMS),
      ('positions', POSITIONS),
      ('mlp', MLPS),
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
    if self.positions == 'rope' and self.head_width % 2:
      raise ValueError(
        f'model.head_width: got {self.head_width}, expected an even number:'
        ' rotary positions rotate pairs of channels'
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
    if not 0 <= self.logit_softcap < math.inf:
      raise ValueError(
        f'model.logit_softcap: got {self.logit_softcap}, expected a number >='
        ' 0: the bound of the logits, or 0 for none'
      )
    self._validate_mup()
    self._validate_experts()

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
    if self.mlp_width:
      raise ValueError(
        f'model.mlp_width: got {self.mlp_width} in a mixture, expected 0: every'
        ' layer has experts, of model.expert_width'
      )
    if self.use_bias:
      raise ValueError(
        'model.use_bias: got True in a mixture, expected False: experts have'
        ' no biases'
      )

  def to_dict(self) -> dict[str, Any]:
    """Returns the fields as JSON values."""
    return dataclasses.asdict(self)

  @classmethod
  def from_dict(cls, fields: dict[str, Any]) -> 'ModelConfig':
    """Rebuilds a config, refusing fields that are unknown or missing."""
    known = {field.name for field in dataclasses.fields(cls)}
    if set(fields) != known:
      unknown, missing = set(fields) - known, known - set(fields)
      raise ValueError(
        f'model config: got unknown fields {sorted(unknown)} and missing'
        f' fields {sorted(missing)}, expected exactly those of ModelConfig;'
        ' the file was written by another version'
      )
    config = cls(**fields)
    config.validate()
    return config


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
