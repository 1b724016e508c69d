"""Fields of a config.json, read one by one; an unread field is an error.

An overlooked field that changes the mathematics would give a model that is
almost right. So each field is either read by name or listed below, among the
fields that do not change the function of the weights.
"""

from collections.abc import Mapping
import math
from typing import Any

_REQUIRED = object()

# Fields about training, output formats, caches, or the file itself. The ids of
# special tokens come from the tokenizer and from generation_config.json.
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
# Each field changes the function, unless it has one of these values.
_HARMLESS: Mapping[str, tuple[Any, ...]] = {
  'add_cross_attention': (False,),
  'is_encoder_decoder': (False,),
  'use_bidirectional_attention': (False, None),
  'pruned_heads': ({}, None),
  # Families without such biases ignore the fields.
  'attention_bias': (False,),
  'mlp_bias': (False,),
  'is_causal': (True,),
  'tie_encoder_decoder': (False,),
  'do_sample': (False,),
  'use_bfloat16': (False,),
  'use_mrope': (False,),  # Qwen 2.5
  'is_llama_config': (True,),  # SmolLM 2
  'rope_interleaved': (False,),  # SmolLM 2
  'quantization_config': (None,),
}


class Fields:
  """The fields of one config.json."""

  def __init__(self, values: Mapping[str, Any], where: str):
    self._values = dict(values)
    self._where = where
    self._read: set[str] = set()

  def has(self, name: str) -> bool:
    """Returns whether a field exists and is not null."""
    return self._values.get(name) is not None

  def get(self, name: str, default: Any = _REQUIRED) -> Any:
    """Returns a field unchanged; null is None.

    Raises:
      ValueError: there is no such field and no default.
    """
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
    """Returns a field that is an integer of at least 0; null is 0."""
    value = self.get(name, default)
    value = 0 if value is None else value
    if type(value) is not int or value < 0:
      self.refuse(name, 'an integer of at least 0')
    return value

  def number(self, name: str, default: Any = _REQUIRED) -> float:
    """Returns a field that is a finite number; null is 0."""
    value = self.get(name, default)
    value = 0.0 if value is None else value
    if type(value) not in (int, float) or not math.isfinite(value):
      self.refuse(name, 'a number')
    return float(value)

  def flag(self, name: str, default: Any = _REQUIRED) -> bool:
    """Returns a field that is true or false; null is false."""
    value = self.get(name, default)
    value = False if value is None else value
    if type(value) is not bool:
      self.refuse(name, 'true or false')
    return value

  def expect(self, name: str, *allowed: Any) -> None:
    """Raises ValueError if a field exists with none of these values."""
    if self.get(name, allowed[0]) not in allowed:
      self.refuse(name, ' or '.join(map(repr, allowed)))

  def refuse(self, name: str, expected: str) -> None:
    """Raises ValueError for the value of a field."""
    raise ValueError(
      f'{self._where}: got {name} = {self._values.get(name)!r}, expected'
      f' {expected}; no other value is supported'
    )

  def finish(self) -> None:
    """Raises ValueError if fields are left that were not read."""
    for name in _HARMLESS.keys() & self._values.keys() - self._read:
      self._read.add(name)
      value, allowed = self._values[name], _HARMLESS[name]
      # 0 is not false: it may be the number of something.
      if not any(type(value) is type(x) and value == x for x in allowed):
        self.refuse(name, ' or '.join(map(repr, allowed)))
    unread = self._values.keys() - self._read - _WITHOUT_EFFECT
    # A field that is null is not given. One that is false or 0 may switch off
    # what the family always does.
    unread = {n for n in unread if self._values[n] is not None}
    if unread:
      listed = ', '.join(f'{n} = {self._values[n]!r}' for n in sorted(unread))
      raise ValueError(
        f'{self._where}: got {listed}, expected only fields of the family, as'
        ' the effect of others is not known here; remove them if they change'
        ' nothing'
      )
