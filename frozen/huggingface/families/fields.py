"""A config.json, read field by field; what nobody read is an error.

A field that changes the mathematics and is overlooked makes a model that is
almost the right one. Every field is therefore asked for by name, or is one of
those below, which say nothing about the function that the weights compute.
"""

from collections.abc import Mapping
import math
from typing import Any

_REQUIRED = object()

# About training, output formats, caches, or the file itself; ids of special
# tokens are the tokenizer's and the generation config's.
_WITHOUT_EFFECT = frozenset(
  {
    'architectures', 'auto_map', 'model_type', 'dtype', 'torch_dtype',
    'transformers_version', 'use_cache', 'bos_token_id', 'eos_token_id',
    'pad_token_id', 'unk_token_id', 'sep_token_id', 'cls_token_id',
    'decoder_start_token_id', 'attention_dropout', 'hidden_dropout',
    'classifier_dropout', 'embd_pdrop', 'resid_pdrop', 'attn_pdrop',
    'output_attentions', 'output_hidden_states', 'output_router_logits',
    'return_dict', 'router_aux_loss_coef', 'aux_loss_alpha', 'seq_aux',
    'router_jitter_noise', 'ep_size', 'gradient_checkpointing', 'id2label',
    'label2id', 'problem_type', 'task_specific_params', '_name_or_path',
    '_attn_implementation', '_attn_implementation_autoset', 'name_or_path',
    'chunk_size_feed_forward', 'tokenizer_class', 'pretraining_tp',
    'num_nextn_predict_layers', 'torchscript', 'summary_type',
    'summary_use_proj', 'summary_activation', 'summary_proj_to_labels',
    'summary_first_dropout', 'reorder_and_upcast_attn', 'is_decoder',
    'cache_implementation', 'return_dict_in_generate', 'finetuning_task',
    'transformers.js_config', 'unsloth_fixed', 'unsloth_version',
  }
)  # fmt: skip
# Each would change the function unless it has one of these values.
_HARMLESS: Mapping[str, tuple[Any, ...]] = {
  'add_cross_attention': (False,),
  'is_encoder_decoder': (False,),
  'use_bidirectional_attention': (False, None),
  'pruned_heads': ({}, None),
  'quantization_config': (None,),
}


class Fields:
  """The fields of one config.json."""

  def __init__(self, values: Mapping[str, Any], where: str):
    self._values = dict(values)
    self._where = where
    self._read: set[str] = set()

  def has(self, name: str) -> bool:
    """Returns whether a field is there and is not null."""
    return self._values.get(name) is not None

  def get(self, name: str, default: Any = _REQUIRED) -> Any:
    """Returns a field as it is, null as None."""
    self._read.add(name)
    if name in self._values:
      return self._values[name]
    if default is _REQUIRED:
      raise ValueError(
        f'{self._where}: got no {name}, expected one; the directory is damaged'
        ' or of another kind'
      )
    return default

  def count(self, name: str, default: Any = _REQUIRED) -> int:
    """Returns a field that is an integer of at least 0; null as 0."""
    value = self.get(name, default)
    value = 0 if value is None else value
    if type(value) is not int or value < 0:
      self.refuse(name, 'an integer of at least 0')
    return value

  def number(self, name: str, default: Any = _REQUIRED) -> float:
    """Returns a field that is a number; null as 0."""
    value = self.get(name, default)
    value = 0.0 if value is None else value
    if type(value) not in (int, float) or not math.isfinite(value):
      self.refuse(name, 'a number')
    return float(value)

  def flag(self, name: str, default: Any = _REQUIRED) -> bool:
    """Returns a field that is true or false; null as false."""
    value = self.get(name, default)
    value = False if value is None else value
    if type(value) is not bool:
      self.refuse(name, 'true or false')
    return value

  def expect(self, name: str, *allowed: Any) -> None:
    """Refuses a field that is there and has none of these values."""
    if self.get(name, allowed[0]) not in allowed:
      self.refuse(name, ' or '.join(map(repr, allowed)))

  def refuse(self, name: str, expected: str) -> None:
    """Raises ValueError for the value of a field."""
    raise ValueError(
      f'{self._where}: got {name} = {self._values.get(name)!r}, expected'
      f' {expected}: nothing else is supported'
    )

  def finish(self) -> None:
    """Raises ValueError if there are fields that nobody has read."""
    for name, allowed in _HARMLESS.items():
      if name in self._values:
        self.expect(name, *allowed)
    unread = self._values.keys() - self._read - _WITHOUT_EFFECT
    # What is off, whatever it is, is as if it were not there.
    unread = {n for n in unread if self._values[n] not in (None, False)}
    if unread:
      listed = ', '.join(f'{n} = {self._values[n]!r}' for n in sorted(unread))
      raise ValueError(
        f'{self._where}: got {listed}, expected no fields but those of the'
        ' family: what they change is not known here; remove them if they'
        ' change nothing'
      )
