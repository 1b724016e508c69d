"""Fields of a config.json, read one by one; an unread field is an error.

An overlooked field that changes the mathematics would give a model that is
almost right. So each field is either read by name or listed below, among the
fields that do not change the function of the weights.
"""

from collections.abc import Mapping, Set
import sys
from typing import Any, NoReturn

from checks import expect

REQUIRED = object()  # the default of a field without a default
MOST = 2**31 - 1  # largest size: shapes and ids have 32 bits
# Of layers, and of experts in a layer: names of tensors are listed one by one.
MOST_LAYERS = 10_000
_MOST_LISTED = 8

# Fields about training, output formats, caches, or the file itself. The ids of
# special tokens come from the tokenizer and from generation_config.json.
WITHOUT_EFFECT = frozenset(
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
    'summary_first_dropout', 'is_decoder',
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


def _is_positive(value: Any) -> bool:
  return type(value) in (int, float) and 0 < value <= sys.float_info.max


class Fields:
  """The fields of one config.json, or of an object in it."""

  def __init__(self, values: Mapping[str, Any], where: str, path: str = ''):
    self._values = dict(values)
    self._where = where
    self.path = path  # path of the object, as in 'rope_parameters.'
    self._read: set[str] = set()

  def has(self, name: str) -> bool:
    """Returns whether a field exists and is not null."""
    return self._values.get(name) is not None

  def get(self, name: str, default: Any = REQUIRED) -> Any:
    """Returns a field unchanged; null is None.

    Raises:
      ValueError: there is no such field and no default.
    """
    self._read.add(name)
    if name in self._values:
      return self._values[name]
    if default is REQUIRED:
      raise ValueError(
        f'{self._where}: got no {self.path}{name}, expected one; the file is'
        ' damaged or of another kind'
      )
    return default

  def inside(self, name: str) -> 'Fields':
    """Returns the fields of an object; null and no object have none."""
    value = self.get(name, None)
    value = {} if value is None else value
    if not isinstance(value, dict):
      self.refuse(name, 'an object')
    return Fields(value, self._where, f'{self.path}{name}.')

  def count(self, name: str, default: Any = REQUIRED, most: int = MOST) -> int:
    """Returns a field that is an integer of at least 0; null is 0."""
    value = self.get(name, default)
    value = 0 if value is None else value
    if type(value) is not int or not 0 <= value <= most:
      self.refuse(name, f'an integer from 0 to {most}')
    return value

  def size(self, name: str, default: Any = REQUIRED, most: int = MOST) -> int:
    """Returns a field that is a positive integer."""
    value = self.get(name, default)
    if type(value) is not int or not 1 <= value <= most:
      self.refuse(name, f'an integer from 1 to {most}', value)
    return value

  def size_or_none(self, name: str, default: int | None) -> int:
    """Returns a field that is a positive integer; null is 0."""
    return 0 if self.get(name, default) is None else self.size(name, default)

  def number(self, name: str, default: Any = REQUIRED) -> float:
    """Returns a field that is a positive finite number."""
    value = self.get(name, default)
    if not _is_positive(value):
      self.refuse(name, 'a positive number', value)
    return float(value)

  def number_or_none(self, name: str, default: float | None) -> float:
    """Returns a field that is a positive finite number; null is 0."""
    if self.get(name, default) is None:
      return 0.0
    return self.number(name, default)

  def numbers(self, name: str) -> tuple[float, ...]:
    """Returns a field that is a list of positive finite numbers."""
    values = self.get(name)
    if not isinstance(values, list) or not all(map(_is_positive, values)):
      self.refuse(name, 'a list of positive numbers')
    return tuple(map(float, values))

  def flag(self, name: str, default: Any = REQUIRED) -> bool:
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

  def agree(self, name: str, other: str) -> None:
    """Raises ValueError if two names of one field have different values."""
    values = self.get(name, None), self.get(other, None)
    if None not in values and values[0] != values[1]:
      self.refuse(name, f'{other} = {expect.shown(values[1])} too, or only one')

  def refuse(self, name: str, expected: str, default: Any = None) -> NoReturn:
    """Raises ValueError for the value of a field, or for its default."""
    value = expect.shown(self._values.get(name, default))
    raise ValueError(
      f'{self._where}: got {self.path}{name} = {value}, expected {expected};'
      ' no other value is supported'
    )

  def finish(self) -> None:
    """Raises ValueError if fields are left that were not read."""
    for name in _HARMLESS.keys() & self._values.keys() - self._read:
      self._read.add(name)
      value, allowed = self._values[name], _HARMLESS[name]
      # Types are compared, too: 0 is not false, since it may be a count.
      if not any(type(value) is type(x) and value == x for x in allowed):
        self.refuse(name, ' or '.join(map(repr, allowed)))
    self.finish_object('of the family', WITHOUT_EFFECT)

  def finish_object(self, owner: str, ignored: Set[str] = frozenset()) -> None:
    """Raises ValueError if fields are left that are not null nor ignored."""
    unread = self._values.keys() - self._read - ignored
    # A null field counts as absent. A field with false or 0 may switch off a
    # part that the family always has.
    unread = {n for n in unread if self._values[n] is not None}
    if unread:
      listed = ', '.join(
        f'{self.path}{n} = {expect.shown(self._values[n])}'
        for n in sorted(unread)[:_MOST_LISTED]
      )
      more = len(unread) - _MOST_LISTED
      raise ValueError(
        f'{self._where}: got {listed}{f" and {more} more" if more > 0 else ""},'
        f' expected only fields {owner}, as the effect of others is not known'
        ' here; remove them if they change nothing'
      )
