"""`generation_config.json` of an open model, as our sampling settings.

The defaults are the defaults of `transformers.generate`, so a model answers
here as it does there. Generation is greedy unless `do_sample` is true. It then
samples from the 50 most probable tokens unless `top_k` is set. A field that
changes the samples and has no setting here is refused. A field without effect
is listed.
"""

from collections.abc import Callable, Mapping
import math
from typing import Any, NamedTuple

from checks import expect
from text import hf_files

FILE = hf_files.GENERATION

# Fields that this module or the tokenizer reads.
_HANDLED = frozenset(
  {
    'do_sample', 'temperature', 'top_k', 'top_p', 'min_p', 'repetition_penalty',
    'max_new_tokens', 'min_new_tokens', 'stop_strings', 'eos_token_id',
    'bos_token_id', 'pad_token_id',
  }
)  # fmt: skip
# Each field changes the generated tokens, unless it has one of these values.
_UNSUPPORTED: Mapping[str, tuple[Any, ...]] = {
  'num_beams': (1,),
  'num_beam_groups': (1,),
  'diversity_penalty': (0,),
  'penalty_alpha': (0,),
  'top_h': (),
  'typical_p': (1,),
  'epsilon_cutoff': (0,),
  'eta_cutoff': (0,),
  'encoder_repetition_penalty': (1,),
  'no_repeat_ngram_size': (0,),
  'encoder_no_repeat_ngram_size': (0,),
  'bad_words_ids': ([],),
  'constraints': ([],),
  'force_words_ids': ([],),
  'forced_bos_token_id': (),
  'forced_eos_token_id': (),
  'exponential_decay_length_penalty': (),
  'suppress_tokens': ([],),
  'begin_suppress_tokens': ([],),
  'forced_decoder_ids': ([],),
  'sequence_bias': ([], {}),
  'guidance_scale': (1,),
  'token_healing': (False,),
  'watermarking_config': (),
  'dola_layers': (),
  'min_length': (0,),
}
# Fields about speed, memory, further outputs or the file itself, and fields
# that only beam search reads.
_WITHOUT_EFFECT = frozenset(
  {
    'use_cache', 'cache_implementation', 'cache_config', 'max_cache_len',
    'return_legacy_cache', 'low_memory', 'prefill_chunk_size',
    'compile_config', 'disable_compile', 'continuous_batching_config',
    'use_mtp', 'is_assistant', 'num_assistant_tokens',
    'num_assistant_tokens_schedule', 'assistant_confidence_threshold',
    'prompt_lookup_num_tokens', 'max_matching_ngram_size',
    'assistant_early_exit', 'assistant_lookbehind', 'target_lookbehind',
    'assistant_ensemble_weight', 'speculation_type', 'output_attentions',
    'output_hidden_states', 'output_scores', 'output_logits',
    'return_dict_in_generate', 'early_stopping', 'length_penalty',
    'renormalize_logits', 'remove_invalid_values', 'decoder_start_token_id',
    'transformers_version', '_from_model_config',
  }
)  # fmt: skip
_MOST = 2**31 - 1  # largest count
_DEFAULT_TOP_K = 50  # default of transformers if do_sample is true


class Recommended(NamedTuple):
  """Settings, and notes on fields of the file that are not used."""

  settings: dict[str, Any]
  notes: list[str]


def generation_settings(config: Mapping[str, Any]) -> Recommended:
  """Returns the settings that a `generation_config.json` recommends.

  All ids that end a text are in `stop_ids`.

  Raises:
    ValueError: a value is out of range, or fields change the samples in a way
      that is not supported; names all these fields.
  """
  given = {key: value for key, value in config.items() if value is not None}
  _check_supported(given)
  settings, notes = _sampling(given)
  if (penalty := given.get('repetition_penalty', 1)) != 1:
    settings['repetition_penalty'] = _number(
      given, 'repetition_penalty', lambda x: x > 0, 'a number above 0', penalty
    )
  for theirs, ours in (
    ('max_new_tokens', 'max_tokens'),
    ('min_new_tokens', 'min_tokens'),
  ):
    if theirs in given:
      settings[ours] = _count(given[theirs], theirs, ours == 'max_tokens')
  if stop := _strings(given.get('stop_strings', [])):
    settings['stop'] = stop
  if stop_ids := hf_files.eos_ids(given):
    settings['stop_ids'] = stop_ids
  if 'max_length' in given and 'max_new_tokens' not in given:
    notes.append(
      f'max_length {given["max_length"]} is not used, as it counts the prompt;'
      ' a completion ends with max_tokens or the context'
    )
  known = _HANDLED | _UNSUPPORTED.keys() | _WITHOUT_EFFECT | {'max_length'}
  notes += [
    f'{key} {expect.shown(given[key])} is not used'
    for key in given
    if key not in known
  ]
  return Recommended(settings, notes)


def _check_supported(given: Mapping[str, Any]) -> None:
  """Raises ValueError if an unsupported field would change the samples."""
  refused = [
    f'{key} {expect.shown(given[key])}'
    for key, harmless in _UNSUPPORTED.items()
    if key in given and given[key] not in harmless
  ]
  if refused:
    raise ValueError(
      f'{FILE}: got {", ".join(refused)}, expected none of these: they change'
      ' the generated tokens and are not supported; remove them from the file'
    )


def _sampling(given: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
  """Returns the settings of sampling, and notes on unused fields."""
  do_sample = given.get('do_sample', False)
  if type(do_sample) is not bool:
    raise ValueError(
      f'{FILE}: got do_sample {expect.shown(do_sample)}, expected a boolean'
    )
  if not do_sample:
    unused = [
      f'{key} {expect.shown(given[key])}'
      for key in ('temperature', 'top_k', 'top_p', 'min_p')
      if key in given
    ]
    reason = f'do_sample is {"false" if "do_sample" in given else "not set"}'
    notes = [f'{", ".join(unused)} not used: {reason}'] if unused else []
    return {'temperature': 0.0}, notes
  top_k = given.get('top_k', _DEFAULT_TOP_K)
  settings = {
    'temperature': _number(
      given, 'temperature', lambda x: x >= 0, 'a number >= 0', 1.0
    ),
    'top_k': _count(top_k, 'top_k', False),
    'top_p': _number(
      given, 'top_p', lambda x: 0 < x <= 1, 'a number above 0, at most 1', 1.0
    ),
    'min_p': _number(
      given, 'min_p', lambda x: 0 <= x < 1, 'a number >= 0 and below 1', 0.0
    ),
  }
  if 'top_k' in given:
    return settings, []
  return settings, [f'top_k is not set: {_DEFAULT_TOP_K}, as transformers does']


def _number(
  given: Mapping[str, Any],
  key: str,
  is_valid: Callable[[float], bool],
  expected: str,
  default: float,
) -> float:
  value = given.get(key, default)
  is_number = type(value) in (int, float) and math.isfinite(value)
  if not (is_number and is_valid(value)):
    raise ValueError(
      f'{FILE}: got {key} {expect.shown(value)}, expected {expected}'
    )
  return float(value)


def _count(value: Any, key: str, is_positive: bool) -> int:
  least = int(is_positive)
  if type(value) is not int or not least <= value <= _MOST:
    raise ValueError(
      f'{FILE}: got {key} {expect.shown(value)}, expected an integer >= {least}'
    )
  return value


def _strings(value: Any) -> list[str]:
  values = [value] if isinstance(value, str) else value
  if not isinstance(values, list) or not all(
    isinstance(text, str) and text for text in values
  ):
    raise ValueError(
      f'{FILE}: got stop_strings {expect.shown(value)}, expected strings'
    )
  return values
