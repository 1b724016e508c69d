"""What a request may choose about its completion, checked when it is chosen.

Values come from flags, from HTTP and from a frozen directory's generation.json;
`inference.sampling.sampler.row` turns what the device needs of them into
arrays, and `inference.output.stopping` reads what ends a sequence. The meaning
of a field that clients of other servers send is theirs: OpenAI's where OpenAI
has it, else vLLM's.
"""

from collections.abc import Callable, Mapping
import dataclasses
import math
from typing import Any

from storage import layout

NUM_SEEDS = 2**32
# Of each, the most that one request may ask for: each sequence's place on the
# device is as wide, so that no request compiles anything.
MAX_BIASED = 300  # as OpenAI allows
MAX_STOP_IDS = 16
MAX_LOGPROBS = 20  # as OpenAI's chat API allows
# Beyond these a float32 logit may overflow, or a token never recover.
_REPETITION_RANGE = 1e-3, 1e3


class SettingError(ValueError):
  """A generation setting out of range; `setting` names it."""

  def __init__(self, setting: str, got: Any, expected: str, fix: str = ''):
    hint = f'; {fix}' if fix else ''
    super().__init__(f'{setting}: got {got!r}, expected {expected}{hint}')
    self.setting = setting


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
  """What a request may choose; checked when made.

  Raises:
    SettingError: a value is out of range.
  """

  temperature: float = 1.0  # 0 is greedy
  top_k: int = 0  # most probable tokens to keep; 0 keeps all
  top_p: float = 1.0  # probability mass to keep; 1 keeps all
  min_p: float = 0.0  # least share of the largest probability; 0 keeps all
  # Divides the positive and multiplies the negative logits of tokens in the
  # prompt or the completion; 1 changes nothing.
  repetition_penalty: float = 1.0
  presence_penalty: float = 0.0  # taken off tokens of the completion, once
  frequency_penalty: float = 0.0  # and once per time that they occur in it
  logit_bias: tuple[tuple[int, float], ...] = ()  # (token id, what is added)
  seed: int | None = None  # None draws one, reported in the completion
  n: int = 1  # completions of the prompt
  max_tokens: int | None = None  # None is up to the end of the context
  # Until so many are sampled, EOS and stop ids are not, and no stop string
  # counts that they complete.
  min_tokens: int = 0
  stop: tuple[str, ...] = ()  # ends the completion, not part of its text
  stop_ids: tuple[int, ...] = ()  # token ids that do the same
  ignore_eos: bool = False  # EOS is a token like others: benchmarks
  # Log-probabilities of each sampled token and of so many most probable ones;
  # None is none at all, 0 those of the sampled tokens alone.
  logprobs: int | None = None
  prompt_logprobs: int | None = None  # the same of the prompt's tokens

  def __post_init__(self):
    self._check('temperature', lambda x: 0 <= x < math.inf, 'a number >= 0')
    self._check('top_p', lambda x: 0 < x <= 1, 'a number above 0, at most 1')
    self._check('min_p', lambda x: 0 <= x < 1, 'a number >= 0 and below 1')
    self._check_range('repetition_penalty', *_REPETITION_RANGE)
    self._check_range('presence_penalty', -2, 2)
    self._check_range('frequency_penalty', -2, 2)
    self._check_count('top_k', 0, 2**31)
    self._check_count('n', 1, 2**31)
    self._check_count('min_tokens', 0, 2**31)
    for name, low, high in (
      ('seed', 0, NUM_SEEDS),
      ('max_tokens', 1, 2**31),
      ('logprobs', 0, MAX_LOGPROBS + 1),
      ('prompt_logprobs', 0, MAX_LOGPROBS + 1),
    ):
      if getattr(self, name) is not None:
        self._check_count(name, low, high)
    if not isinstance(self.ignore_eos, bool):
      raise SettingError('ignore_eos', self.ignore_eos, 'True or False')
    self._check_stops()
    self._check_bias()
    if self.max_tokens is not None and self.min_tokens > self.max_tokens:
      raise SettingError(
        'min_tokens',
        self.min_tokens,
        f'at most max_tokens, which is {self.max_tokens}',
        'lower the one or raise the other',
      )

  def check_ids(self, vocab_size: int) -> None:
    """Checks the token ids among the settings against a vocabulary.

    Raises:
      SettingError: an id of `logit_bias` or `stop_ids` is outside.
    """
    biased = [token_id for token_id, _ in self.logit_bias]
    for name, ids in (('logit_bias', biased), ('stop_ids', self.stop_ids)):
      for token_id in ids:
        if token_id >= vocab_size:
          raise SettingError(
            name,
            token_id,
            f'token ids below {vocab_size}, the size of the vocabulary',
            "take ids of this model's tokenizer",
          )

  def _check_stops(self):
    if not isinstance(self.stop, tuple) or not all(
      isinstance(stop, str) and stop for stop in self.stop
    ):
      raise SettingError('stop', self.stop, 'strings, none of them empty')
    is_tuple = isinstance(self.stop_ids, tuple)
    if not is_tuple or not all(map(_is_id, self.stop_ids)):
      raise SettingError('stop_ids', self.stop_ids, 'token ids')
    if len(self.stop_ids) > MAX_STOP_IDS:
      raise SettingError(
        'stop_ids',
        self.stop_ids,
        f'at most {MAX_STOP_IDS} ids',
        'use stop strings for the others',
      )

  def _check_bias(self):
    pairs = self.logit_bias
    if not isinstance(pairs, tuple) or not all(map(_is_bias, pairs)):
      raise SettingError(
        'logit_bias', pairs, 'pairs of a token id and a bias from -100 to 100'
      )
    ids = [token_id for token_id, _ in pairs]
    if len(ids) > MAX_BIASED or len(set(ids)) < len(ids):
      raise SettingError(
        'logit_bias',
        pairs,
        f'at most {MAX_BIASED} token ids, each of them once',
        'keep the largest biases',
      )

  def _check(self, name: str, is_valid: Callable[[Any], bool], expected: str):
    value = getattr(self, name)
    if not (_is_number(value) and is_valid(value)):
      raise SettingError(name, value, expected)

  def _check_range(self, name: str, low: float, high: float):
    self._check(
      name, lambda x: low <= x <= high, f'a number from {low:g} to {high:g}'
    )

  def _check_count(self, name: str, low: int, high: int):
    self._check(
      name,
      lambda x: isinstance(x, int) and low <= x < high,
      f'an integer from {low} to {high - 1}',
    )


def bias_pairs(biases: Mapping[Any, Any]) -> tuple[tuple[int, float], ...]:
  """Returns a `logit_bias` made of a mapping, as JSON spells it.

  Args:
    biases: from token id to bias; JSON can only spell the ids as strings.

  Raises:
    SettingError: a key is not a token id.
  """
  pairs = []
  for key, bias in biases.items():
    is_digits = isinstance(key, str) and key.isascii() and key.isdigit()
    if not (is_digits or _is_id(key)):
      raise SettingError(
        'logit_bias', key, 'token ids as keys', 'tokenize the word first'
      )
    pairs.append((int(key), bias))
  return tuple(pairs)


def recommended(generation: dict[str, Any]) -> Settings:
  """Returns the settings that a frozen directory recommends.

  Raises:
    ValueError: a setting is unknown or out of range.
  """
  known = [field.name for field in dataclasses.fields(Settings)]
  if unknown := sorted(set(generation) - set(known)):
    raise ValueError(
      f'{layout.GENERATION}: got the settings {unknown}, expected'
      f' only {", ".join(known)}; freeze again without them'
    )
  fields = dict(generation)
  for name in ('stop', 'stop_ids'):
    if isinstance(fields.get(name), list):
      fields[name] = tuple(fields[name])
  if isinstance(fields.get('logit_bias'), dict):
    fields['logit_bias'] = bias_pairs(fields['logit_bias'])
  return Settings(**fields)


def _is_number(value: Any) -> bool:
  return isinstance(value, int | float) and not isinstance(value, bool)


def _is_id(value: Any) -> bool:
  return _is_number(value) and isinstance(value, int) and 0 <= value < 2**31


def _is_bias(pair: Any) -> bool:
  return (
    isinstance(pair, tuple)
    and len(pair) == 2
    and _is_id(pair[0])
    and _is_number(pair[1])
    and -100 <= pair[1] <= 100
  )
