"""The generation settings of a request, checked when they are made.

Values come from flags, from HTTP and from a frozen directory's generation.json.
`inference.sampling.sampler.row` turns the settings that the device needs into
arrays, and `inference.output.stopping` reads the settings that end a sequence.
A field that clients of other servers send means here what it means there: at
OpenAI if OpenAI has it, else in vLLM.

The fields of `Settings` are the only list of settings: serve.py makes a flag
of each, and `inference.server.api.schema` a field of the request body. A new
setting is a field here, with its check, and its effect in
`inference.sampling.sampler`.
The metadata of a field:

    help      what the setting does, for users of the flag and of the API
    flag      False: serve.py has no flag for it
    api_name  its name in a request body, if another; '': not in the API
    limits    keywords of JSON Schema: the values of a request that are in range

Imports nothing heavy, so that `serve.py --help` need not wait for JAX.
"""

from collections.abc import Callable, Mapping
import dataclasses
import hashlib
import math
import secrets
from typing import Any

from checks import expect, flag_field
from inference.constraints import constraint as constraint_lib
from storage import file_names

# Seeds have 64 bits, with or without a sign: -1 and 2**64 - 1 are one seed.
_SEED_RANGE = -(2**63), 2**64
# Seeds that are made here are below this: JavaScript reads them exactly.
_NUM_MADE_SEEDS = 2**53
# The most entries that one request may have. The arrays of a slot on the device
# have this width, so that no request compiles a new program.
MAX_BIASED = 300  # as OpenAI allows
MAX_STOP_IDS = 16
# Of stop strings: their number, and the characters of one and of all together.
# They bound the memory of a request and the text that a stream holds back.
MAX_STOPS = 256
MAX_STOP_LENGTH = 1024
MAX_STOP_CHARS = 4096
MAX_LOGPROBS = 20  # as OpenAI's chat API allows
# Beyond this range a float32 logit may overflow, or a token never recover.
_REPETITION_RANGE = 1e-3, 1e3


def _between(low: float, high: float) -> dict[str, Any]:
  return {'minimum': low, 'maximum': high}


class SettingError(ValueError):
  """A generation setting out of range; `setting` names it."""

  def __init__(self, setting: str, got: Any, expected: str, fix: str = ''):
    hint = f'; {fix}' if fix else ''
    super().__init__(
      f'{setting}: got {expect.shown(got)}, expected {expected}{hint}'
    )
    self.setting = setting


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
  """The settings of one request.

  Raises:
    SettingError: a value is out of range.
  """

  temperature: float = flag_field.field(
    1.0,
    'Divides the logits before sampling. 0 always takes the most probable token'
    ' (greedy). Lower it for more predictable text.',
    limits={'minimum': 0},
  )
  top_k: int = flag_field.field(
    0,
    'Samples only from this many most probable tokens; 0 keeps all tokens.',
    limits={'minimum': -1, 'exclusiveMaximum': 2**31},  # -1: as 0, in vLLM
  )
  top_p: float = flag_field.field(
    1.0,
    'Samples only from the most probable tokens that together have this'
    ' probability, above 0 and at most 1; 1 keeps all tokens. Lower it if the'
    ' text drifts.',
    limits={'exclusiveMinimum': 0, 'maximum': 1},
  )
  min_p: float = flag_field.field(
    0.0,
    'Samples only from tokens with at least this share of the probability of'
    ' the most probable token, from 0 to below 1; 0 keeps all tokens.',
    limits={'minimum': 0, 'exclusiveMaximum': 1},
  )
  repetition_penalty: float = flag_field.field(
    1.0,
    'Divides the positive logits, and multiplies the negative logits, of every'
    ' token in the prompt or the completion; 1 disables it. Raise it, for'
    ' example to 1.1, if the text repeats itself.',
    limits=_between(*_REPETITION_RANGE),
  )
  presence_penalty: float = flag_field.field(
    0.0,
    'Subtracted once from the logit of every token that was generated, from -2'
    ' to 2; 0 disables it.',
    limits=_between(-2, 2),
  )
  frequency_penalty: float = flag_field.field(
    0.0,
    "Subtracted from a token's logit for every time it was generated, from -2"
    ' to 2; 0 disables it.',
    limits=_between(-2, 2),
  )
  logit_bias: tuple[tuple[int, float], ...] = flag_field.field(
    (),
    'Added to the logits of these token ids, from -100 to 100.',
    flag=False,
    limits={
      'maxProperties': MAX_BIASED,
      'additionalProperties': {'type': 'number', **_between(-100, 100)},
      'propertyNames': {'pattern': '^[0-9]+$'},
    },
  )
  seed: int | None = flag_field.field(
    None,
    'Seed of the sampling. The same seed, settings and weights give the same'
    ' text. If not given, a seed is drawn and reported with the completion.',
    limits=_between(_SEED_RANGE[0], _SEED_RANGE[1] - 1),
  )
  n: int = flag_field.field(
    1,
    'Number of completions of the prompt, each with a seed of its own.',
    limits={'minimum': 1},
  )
  max_tokens: int | None = flag_field.field(
    None,
    'Most tokens to generate. If neither given nor recommended by the model, a'
    ' completion may fill the context.',
    limits={'minimum': 1, 'exclusiveMaximum': 2**31},
  )
  min_tokens: int = flag_field.field(
    0,
    'EOS and stop token ids are not sampled, and stop strings do not count,'
    ' before this many tokens were generated; 0 disables it.',
    limits={'minimum': 0, 'exclusiveMaximum': 2**31},
  )
  stop: tuple[str, ...] = flag_field.field(
    (),
    'Text that ends the completion, and is left out of it; at most 256 strings,'
    ' of 1,024 characters each and 4,096 together.',
    limits={
      'maxItems': MAX_STOPS,
      'items': {
        'type': 'string',
        'minLength': 1,
        'maxLength': MAX_STOP_LENGTH,
      },
      'minLength': 1,
      'maxLength': MAX_STOP_LENGTH,
    },
  )
  stop_ids: tuple[int, ...] = flag_field.field(
    (),
    'Token id that ends the completion, as EOS does; at most 16 ids.',
    api_name='stop_token_ids',
    limits={
      'maxItems': MAX_STOP_IDS,
      'items': {'type': 'integer', 'minimum': 0},
    },
  )
  ignore_eos: bool = flag_field.field(
    False,
    'Generates further after EOS, up to max_tokens. For benchmarks, which need'
    ' completions of a known length.',
  )
  # None: no log-probabilities. 0: those of the sampled tokens. k: also those of
  # the k most probable tokens.
  logprobs: int | None = flag_field.field(
    None,
    'Returns the log-probability of every generated token, and of this many'
    ' most probable tokens beside it, at most 20.',
    flag=False,
    limits=_between(0, MAX_LOGPROBS),
  )
  # The same for the tokens of the prompt. The API asks for it with `echo`.
  prompt_logprobs: int | None = flag_field.field(
    None,
    flag=False,
    api_name='',
  )

  # The language that the completion belongs to; log-probabilities stay those of
  # the model, as they do with penalties and filters.
  constraint: constraint_lib.Constraint | None = flag_field.field(
    None,
    flag=False,
    api_name='',
  )

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
      ('seed', *_SEED_RANGE),
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
    self._check_constraint()
    if self.max_tokens is not None and self.min_tokens > self.max_tokens:
      raise SettingError(
        'min_tokens',
        self.min_tokens,
        f'at most max_tokens, which is {self.max_tokens}',
        'lower min_tokens or raise max_tokens',
      )

  def _check_constraint(self):
    if self.constraint is None:
      return
    if not isinstance(self.constraint, constraint_lib.Constraint):
      raise SettingError('constraint', self.constraint, 'a Constraint')
    for name in ('min_tokens', 'ignore_eos'):
      if value := getattr(self, name):
        raise SettingError(
          name,
          value,
          'none beside a constraint',
          'the grammar says where the text may end',
        )

  def check_ids(self, vocab_size: int) -> None:
    """Checks the token ids of the settings against a vocabulary.

    Raises:
      SettingError: an id of `logit_bias` or `stop_ids` is not in it.
    """
    biased = [token_id for token_id, _ in self.logit_bias]
    for name, ids in (('logit_bias', biased), ('stop_ids', self.stop_ids)):
      for token_id in ids:
        if token_id >= vocab_size:
          raise SettingError(
            name,
            token_id,
            f'token ids below {vocab_size}, the size of the vocabulary',
            "use ids of this model's tokenizer",
          )

  def _check_stops(self):
    if isinstance(self.stop, tuple) and len(self.stop) > MAX_STOPS:
      raise SettingError(
        'stop', len(self.stop), f'at most {MAX_STOPS} strings', 'send fewer'
      )
    if not isinstance(self.stop, tuple) or not all(
      isinstance(stop, str) and stop for stop in self.stop
    ):
      raise SettingError('stop', self.stop, 'strings, none of them empty')
    lengths = [len(stop) for stop in self.stop]
    for got, most, which in (
      (max(lengths, default=0), MAX_STOP_LENGTH, 'in a string'),
      (sum(lengths), MAX_STOP_CHARS, 'in all strings together'),
    ):
      if got > most:
        raise SettingError(
          'stop', got, f'at most {most} characters {which}', 'shorten them'
        )
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


def new_seed() -> int:
  """Returns a random seed, for a request without one."""
  return secrets.randbelow(_NUM_MADE_SEEDS)


def folded_seed(seed: int, *place: int) -> int:
  """Returns the seed of a part of what has a seed, such as a sample.

  Sums would not do: sample 1 of seed 0 would be sample 0 of seed 1.

  Args:
    seed: of the whole.
    *place: numbers that name the part. Places of different lengths differ.
  """
  text = ','.join(map(str, (seed % 2**64, *place)))
  digest = hashlib.sha256(text.encode()).digest()
  return int.from_bytes(digest[:8], 'big') % _NUM_MADE_SEEDS


def sample_seed(seed: int, index: int) -> int:
  """Returns the seed with which a request for one sample gives sample `index`.

  Args:
    seed: of a request for several samples.
    index: of the sample; the first has the seed of the request.
  """
  return folded_seed(seed, index) if index else seed


def bias_pairs(biases: Mapping[Any, Any]) -> tuple[tuple[int, float], ...]:
  """Returns the `logit_bias` of a mapping from JSON.

  Args:
    biases: from token id to bias. The ids may be strings, as JSON keys are.

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

  Args:
    generation: content of its generation.json.

  Raises:
    ValueError: a setting is unknown or out of range.
  """
  known = [field.name for field in dataclasses.fields(Settings)]
  if unknown := sorted(set(generation) - set(known)):
    raise ValueError(
      f'{file_names.GENERATION}: got the settings {unknown}, expected'
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
