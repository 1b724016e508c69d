"""ModelConfig: the function that a parameter tree computes.

Every checkpoint and every frozen directory stores the whole config. Nothing is
ever inferred from a path or from the shape of an array.
"""

import dataclasses
import math
from typing import Any

from checks import expect
from models.attention import rope_scaling as rope_scaling_lib

NORMS = ('rmsnorm', 'layernorm')
NORM_PLACES = ('before', 'after', 'both')
POSITIONS = ('rope', 'learned')
NO_MLP = 'none'  # layers of attention alone, as in arXiv:2209.11895
MLPS = (
  'swiglu', 'geglu', 'geglu_exact', 'reglu', 'gelu', 'gelu_exact', 'relu',
  NO_MLP,
)  # fmt: skip
EXPERT_MLPS = ('swiglu', 'gelu')  # the MLPS that experts can have
SCORES = ('softmax', 'sigmoid')
LAYER_KINDS = {
  'g': 'global: a token sees all tokens before it',
  'l': 'local: a token sees the tokens of its window',
  'n': 'global, without rotary positions',
  'm': 'local, without rotary positions',
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layer:
  """The properties of one layer that may differ from other layers."""

  is_local: bool
  has_rope: bool
  has_experts: bool


@dataclasses.dataclass(kw_only=True, unsafe_hash=True)
class ModelConfig:
  """A decoder-only transformer.

  Hashable, as a linen module has to be. Flags may set fields before the first
  use; after that no field changes.
  """

  vocab_size: int  # V, rows of the embedding
  num_layers: int  # N
  model_width: int  # D, width of the residual stream
  num_heads: int  # H, query heads
  num_kv_heads: int  # K, key/value heads; K = H is multi-head attention
  head_width: int  # C, channels per head
  mlp_width: int  # F, hidden width of the MLP; 0 without any such MLP
  max_length: int  # positions that the model is trained for, in tokens
  norm: str = 'rmsnorm'  # rmsnorm (arXiv:1910.07467) | layernorm
  norm_epsilon: float = 1e-5  # added to the variance
  positions: str = 'rope'  # rope (arXiv:2104.09864) | learned
  rope_base: float = 10_000.0  # base of the wavelengths, RoPE section 3.3
  mlp: str = 'swiglu'  # one of MLPS, see models/layers/mlp.py
  use_bias: bool = False  # biases in linear layers and in LayerNorm
  tie_embeddings: bool = True  # the head is the embedding
  qk_norm: bool = False  # RMSNorm of each head's queries and keys, before rope
  logit_softcap: float = 0.0  # logits become cap tanh(logits / cap); 0: no cap
  dropout_rate: float = 0.0  # of embeddings, attention weights, both residuals
  init_std: float = 0.02  # GPT-2; residual outputs divide it by sqrt(2N)
  mup_base_width: int = 0  # D of the tuned model; 0: no muP. models/mup.py
  mup_base_head_width: int = 0  # C of that model; 0: C does not grow with D
  scan_layers: bool = True  # one stacked block (compiles once), or N blocks
  num_experts: int = 0  # E, routed experts of a layer; 0: a dense model
  num_active_experts: int = 0  # A, routed experts per token
  num_shared_experts: int = 0  # experts of every token, computed as one MLP
  expert_width: int = 0  # F of one expert, routed or shared
  norm_topk: bool = True  # the weights of a token's experts add up to 1
  # Weights of the two losses of routers, models/moe/layer.py; per layer and
  # token.
  balance_loss_weight: float = 0.0
  router_z_weight: float = 0.0
  # Families of open weights use the fields below;
  # frozen/huggingface/families/ sets the fields of each family.
  qkv_bias: bool = False  # biases of queries, keys, values even if not use_bias
  out_bias: bool = False  # the same for the projection out of attention
  mlp_bias: bool = False  # the same for the MLP
  norm_bias: bool = False  # the same for LayerNorm
  norm_place: str = 'before'  # norms before | after attention and MLP | both
  norm_from_one: bool = False  # norms multiply by 1 + scale
  parallel_residual: bool = False  # attention and MLP read the same stream
  embed_multiplier: float = 1.0  # multiplies embedded tokens; Gemma: sqrt(D)
  qk_norm_whole: bool = False  # qk_norm over all heads together
  query_scale: float = 0.0  # multiplies attention scores; 0: 1 / sqrt(C)
  attention_softcap: float = 0.0  # cap of attention scores; 0: no cap
  window: int = 0  # keys that local layers see, with the query's own; 0: none
  layer_pattern: str = ''  # letters of LAYER_KINDS, repeated; '': all alike
  rope_local_base: float = 0.0  # of local layers, unscaled; 0: rope_base
  rope_scaling: rope_scaling_lib.RopeScaling = dataclasses.field(
    default_factory=rope_scaling_lib.RopeScaling
  )
  rotary_width: int = 0  # channels of a head that are rotated; 0: all
  latent_width: int = 0  # U, models/attention/latent_layer.py; 0: no latents
  query_latent_width: int = 0  # width of query latents; 0: none
  value_width: int = 0  # channels of a value; 0: C
  num_dense_layers: int = 0  # leading layers of a moe model without experts
  router_score: str = 'softmax'  # over all experts | sigmoid of each expert
  router_correction: bool = False  # a bias of the scores, for the choice only
  num_expert_groups: int = 0  # groups that routing chooses from; 0: no groups
  num_active_groups: int = 0  # groups per token
  expert_group_best: int = 1  # best scores of a group, summed to rank groups
  router_scale: float = 1.0  # multiplies the weights of routed experts
  # Ranges [first, end) of ids that no token of the tokenizer has. Their logits
  # are masked everywhere. Derived from the tokenizer, `text.tokenizer`.
  spare_ids: tuple[tuple[int, int], ...] = ()

  @property
  def rotated_width(self) -> int:
    """Returns the channels of a head that are rotated."""
    return self.rotary_width or self.head_width

  @property
  def value_head_width(self) -> int:
    """Returns the channels of a value."""
    return self.value_width or self.head_width

  def layer(self, n: int) -> Layer:
    """Returns the properties of layer n."""
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
    """Raises ValueError, naming the field, for a model that cannot be built."""
    for name in _COUNTS:
      value = getattr(self, name)
      if name == 'mlp_width' and (self.num_experts or self.mlp == NO_MLP):
        continue  # _validate_experts and _validate_layers check it
      is_count = isinstance(value, int) and value >= 1
      self._expect(is_count, name, 'a positive integer')
      self._expect(value <= _MOST, name, f'at most {_MOST:,}')
    for name, allowed in (
      ('norm', NORMS),
      ('positions', POSITIONS),
      ('mlp', MLPS),
      ('norm_place', NORM_PLACES),
      ('router_score', SCORES),
    ):
      expect.one_of(f'model.{name}', getattr(self, name), allowed)
    expect.divides(
      'model.num_kv_heads', self.num_kv_heads, 'num_heads', self.num_heads
    )
    self._expect(
      0.0 <= self.dropout_rate < 1.0, 'dropout_rate', '0 <= rate < 1'
    )
    for name in ('norm_epsilon', 'rope_base', 'init_std'):
      self._expect_positive(name)
    for name, bounded in (
      ('logit_softcap', 'logits'),
      ('attention_softcap', 'scores of attention'),
    ):
      self._expect_not_negative(
        name, f': the bound of the {bounded}, or 0 for none'
      )
    self._validate_positions()
    self._validate_layers()
    self._validate_latent()
    self._validate_mup()
    self._validate_experts()
    self._validate_router()
    self._validate_spare_ids()

  def _expect(
    self, is_fine: bool, name: str, expected: str, given: str = ''
  ) -> None:
    """Raises ValueError: model.NAME: got VALUE GIVEN, expected EXPECTED."""
    if not is_fine:
      given = f' {given}' if given else ''
      raise ValueError(
        f'model.{name}: got {getattr(self, name)!r}{given}, expected {expected}'
      )

  def _expect_positive(self, name: str) -> None:
    is_fine = 0 < getattr(self, name) < math.inf
    self._expect(is_fine, name, 'a positive number')

  def _expect_not_negative(self, name: str, meaning: str = '') -> None:
    is_fine = 0 <= getattr(self, name) < math.inf
    self._expect(is_fine, name, f'a number >= 0{meaning}')

  def _validate_positions(self) -> None:
    width = self.rotated_width
    self._expect(
      self.positions != 'rope' or width % 2 == 0,
      'rotary_width' if self.rotary_width else 'head_width',
      'an even number: rotary positions rotate pairs of channels',
    )
    self._expect(
      0 <= self.rotary_width <= self.head_width,
      'rotary_width',
      f'at most head_width = {self.head_width}, or 0 for all of it',
    )
    for name in ('rope_local_base', 'query_scale'):
      self._expect_not_negative(name)
    self._expect_positive('embed_multiplier')
    self.rope_scaling.validate(width // 2)

  def _validate_layers(self) -> None:
    self._expect(
      self.window >= 0, 'window', 'a positive integer, or 0 for none'
    )
    unknown = sorted(set(self.layer_pattern) - set(LAYER_KINDS))
    self._expect(
      not unknown,
      'layer_pattern',
      f'letters of {", ".join(LAYER_KINDS)}',
      given=f'with {unknown}',
    )
    self._expect(
      bool(self.window) or not set(self.layer_pattern) & set('lm'),
      'window',
      'the number of keys that a query sees there',
      given=f'with local layers, {self.layer_pattern!r}',
    )
    self._expect(
      not self.scan_layers or self.is_uniform,
      'scan_layers',
      'False: a stack has layers that are alike',
      given=f'for layers that differ (layer_pattern = {self.layer_pattern!r},'
      f' num_dense_layers = {self.num_dense_layers})',
    )
    self._expect(
      not (self.parallel_residual and self.norm_place == 'after'),
      'norm_place',
      'before or both',
      given='with parallel_residual',
    )
    self._expect(
      self.qk_norm or not self.qk_norm_whole,
      'qk_norm_whole',
      'False; set model.qk_norm too',
      given='without qk_norm',
    )

    if self.mlp == NO_MLP:
      for name in ('mlp_width', 'mlp_bias', 'parallel_residual'):
        self._expect(
          not getattr(self, name),
          name,
          'none of it: layers of attention alone have no MLP',
          given=f'with mlp = {NO_MLP!r}',
        )

  def _validate_latent(self) -> None:
    if not self.latent_width:
      for name in ('query_latent_width', 'value_width'):
        self._expect(
          not getattr(self, name),
          name,
          '0; set model.latent_width too',
          given='without latent_width',
        )
      return
    self._expect(
      0 < self.rotary_width < self.head_width,
      'rotary_width',
      f'1 to head_width - 1 = {self.head_width - 1}: all heads share the'
      ' rotated channels of a key, and each head has the others',
      given=f'with latent_width = {self.latent_width}',
    )
    self._expect(
      self.num_kv_heads == self.num_heads,
      'num_kv_heads',
      f'num_heads = {self.num_heads}: each head has its own keys',
      given='with latent_width',
    )
    for name in ('qk_norm', 'window', 'attention_softcap', 'use_bias'):
      self._expect(
        not getattr(self, name),
        name,
        'none: latent attention does not have it',
        given='with latent_width',
      )

  def _validate_mup(self) -> None:
    for name in ('mup_base_width', 'mup_base_head_width'):
      value = getattr(self, name)
      self._expect(
        isinstance(value, int) and value >= 0,
        name,
        'a positive integer, or 0 for none',
      )
    self._expect(
      bool(self.mup_base_width) or not self.mup_base_head_width,
      'mup_base_head_width',
      '0; set model.mup_base_width too',
      given='without muP',
    )

  def _validate_experts(self) -> None:
    self._expect(
      self.num_experts != 1, 'num_experts', '0 for a dense model or at least 2'
    )
    for name in ('num_experts', *_EXPERT_COUNTS, *_EXPERT_WEIGHTS):
      self._expect_not_negative(name)
    if not self.num_experts:
      for name in (*_EXPERT_COUNTS, *_EXPERT_WEIGHTS):
        self._expect(
          not getattr(self, name),
          name,
          '0; set model.num_experts for a mixture of experts',
          given='in a dense model',
        )
      return
    self._expect(
      1 <= self.num_active_experts <= self.num_experts,
      'num_active_experts',
      f'1 to num_experts = {self.num_experts}',
    )
    self._expect(
      self.expert_width >= 1,
      'expert_width',
      'a positive integer: the hidden width of one expert',
    )
    self._expect(
      bool(self.num_dense_layers) or not self.mlp_width,
      'mlp_width',
      '0: every layer has experts, of model.expert_width',
      given='in a mixture of experts',
    )
    self._expect(
      self.mlp_width >= 1 or not self.num_dense_layers,
      'mlp_width',
      'the hidden width of those layers',
      given=f'with num_dense_layers = {self.num_dense_layers}',
    )
    for name in ('use_bias', 'mlp_bias'):
      self._expect(
        not getattr(self, name),
        name,
        'False: experts have no biases',
        given='in a mixture of experts',
      )
    self._expect(
      self.mlp in EXPERT_MLPS,
      'mlp',
      f'one of {", ".join(EXPERT_MLPS)}',
      given='in a mixture of experts',
    )

  def _validate_router(self) -> None:
    self._expect(
      0 <= self.num_dense_layers <= self.num_layers,
      'num_dense_layers',
      f'0 to num_layers = {self.num_layers}',
    )
    self._expect_positive('router_scale')
    groups = self.num_expert_groups
    if not groups:
      self._expect(
        not self.num_active_groups,
        'num_active_groups',
        '0; set model.num_expert_groups too',
        given='without groups',
      )
      return
    expect.divides(
      'model.num_expert_groups', groups, 'num_experts', self.num_experts
    )
    each = self.num_experts // groups
    self._expect(
      1 <= self.expert_group_best <= each,
      'expert_group_best',
      f'1 to the {each} experts of a group',
    )
    least = -(-self.num_active_experts // each)
    self._expect(
      least <= self.num_active_groups <= groups,
      'num_active_groups',
      f'{least} to {groups}: groups of {each} experts that hold'
      f' {self.num_active_experts} active ones',
    )

  def _validate_spare_ids(self) -> None:
    edges = [edge for first_end in self.spare_ids for edge in first_end]
    self._expect(
      edges == sorted(set(edges))
      and (not edges or edges[0] >= 0 and edges[-1] <= self.vocab_size)
      and sum(end - first for first, end in self.spare_ids) < self.vocab_size,
      'spare_ids',
      f'ascending ranges (first, end) of some of {self.vocab_size} ids',
    )

  def to_dict(self) -> dict[str, Any]:
    """Returns the fields as JSON values."""
    fields = dataclasses.asdict(self)
    fields['spare_ids'] = [list(first_end) for first_end in self.spare_ids]
    for name, value in fields['rope_scaling'].items():
      if isinstance(value, tuple):
        fields['rope_scaling'][name] = list(value)
    return fields

  @classmethod
  def defaults(cls) -> dict[str, Any]:
    """Returns the default of each field that has one, as JSON values."""
    sizes: dict[str, Any] = {
      field.name: 1
      for field in dataclasses.fields(cls)
      if field.default is dataclasses.MISSING
      and field.default_factory is dataclasses.MISSING
    }
    fields = cls(**sizes).to_dict()
    return {name: fields[name] for name in fields.keys() - sizes.keys()}

  @classmethod
  def from_dict(cls, fields: dict[str, Any]) -> 'ModelConfig':
    """Returns the config of `to_dict`.

    A field that is missing has its default: the file was written before the
    field existed. So the default of a new field must be the function of the
    model without it, and a default never changes.

    Raises:
      ValueError: a field is unknown, or a field without a default is missing.
    """
    _check_fields('', cls, fields)
    fields = dict(fields)
    if 'rope_scaling' in fields:
      fields['rope_scaling'] = _scaling(fields['rope_scaling'])
    fields['spare_ids'] = tuple(map(tuple, fields.get('spare_ids', ())))
    config = cls(**fields)
    config.validate()
    return config


def _check_fields(prefix: str, cls: Any, fields: Any) -> None:
  """Raises ValueError if `fields` do not match the fields of a dataclass."""
  known = dataclasses.fields(cls)
  if not isinstance(fields, dict):
    raise ValueError(
      f'model config: got {prefix or "a value"} {fields!r}, expected an object'
    )
  unknown = sorted(fields.keys() - {field.name for field in known})
  missing = [
    field.name
    for field in known
    if field.name not in fields
    and field.default is dataclasses.MISSING
    and field.default_factory is dataclasses.MISSING
  ]
  for kind, names in (('unknown', unknown), ('missing', missing)):
    if names:
      raise ValueError(
        f'model config: got {kind} fields {prefix}{names}, expected the fields'
        f' of {cls.__name__}; another version of this code wrote the file'
      )


def _scaling(fields: Any) -> rope_scaling_lib.RopeScaling:
  """Returns the RopeScaling of a JSON object."""
  _check_fields('rope_scaling ', rope_scaling_lib.RopeScaling, fields)
  values: dict[str, Any] = {
    k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()
  }
  return rope_scaling_lib.RopeScaling(**values)


_MOST = 2**31 - 1  # positions and ids are int32 on devices
_COUNTS = (
  'vocab_size', 'num_layers', 'model_width', 'num_heads', 'num_kv_heads',
  'head_width', 'mlp_width', 'max_length',
)  # fmt: skip
_EXPERT_COUNTS = ('num_active_experts', 'num_shared_experts', 'expert_width')
_EXPERT_WEIGHTS = ('balance_loss_weight', 'router_z_weight')
