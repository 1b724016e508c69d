"""Rules that split text before byte-level BPE, by their names in GGUF files.

A GGUF file only has the name of its rule. The meaning of a name is in
llama.cpp's code: a list of expressions, of which each splits the pieces that
the ones before it have left. A name that is not listed is refused.

Reference: `llama-vocab.cpp` of llama.cpp, `llm_tokenizer_bpe`.
"""

from collections.abc import Mapping
import dataclasses
from typing import Any

from checks import expect

_GPT2 = (
  r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
)
_ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_AFTER_DIGITS = r' ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+'
_WORD = r'[^\r\n\p{L}\p{N}]?\p{L}+'
_LLAMA3 = rf'{_ENDINGS}|{_WORD}|\p{{N}}{{1,3}}|{_AFTER_DIGITS}'
_QWEN2 = rf'{_ENDINGS}|{_WORD}|\p{{N}}|{_AFTER_DIGITS}'
_UPPER, _LOWER = (
  rf'[\p{{L{kind}}}{rest}\p{{Lm}}\p{{Lo}}\p{{M}}]'
  for kind, rest in (('u', r'\p{Lt}'), ('l', ''))
)
_START = r'[^\r\n\p{L}\p{N}]?'
_SLASHED = r' ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+'


def _cased(ending: str, digits: str) -> str:
  """Returns an expression that also splits where lower case becomes upper."""
  return (
    rf'{_START}{_UPPER}*{_LOWER}+{ending}|{_START}{_UPPER}+{_LOWER}*{ending}'
    rf'|{digits}|{_SLASHED}'
  )


_DEEPSEEK3 = (
  r'\p{N}{1,3}',
  r'[一-龥぀-ゟ゠-ヿ]+',
  r'[!"#$%&'
  r"'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?"
  r'[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+',
)


@dataclasses.dataclass(frozen=True)
class Rule:
  """A rule: its expressions, and the settings that its name implies."""

  expressions: tuple[str, ...]
  ignores_merges: bool = False  # a piece that is a token needs no merges
  adds_bos: bool = False  # unless the file says otherwise


_PLAIN_GPT2 = Rule((_GPT2,))
_DIGITS = Rule((r'\p{N}', _GPT2))
_RULES: Mapping[str, Rule] = {
  'gpt-2': _PLAIN_GPT2,
  **dict.fromkeys(
    ('smollm', 'starcoder', 'refact', 'command-r', 'codeshell', 'exaone'),
    _DIGITS,
  ),
  'minerva-7b': _DIGITS,
  **dict.fromkeys(
    ('llama-bpe', 'llama3', 'llama-v3', 'falcon3', 'pixtral', 'lfm2'),
    Rule((_LLAMA3,), ignores_merges=True, adds_bos=True),
  ),
  **dict.fromkeys(
    ('dbrx', 'smaug-bpe', 'glm4', 'chatglm-bpe'), Rule((_LLAMA3,))
  ),
  **dict.fromkeys(
    ('qwen2', 'deepseek-r1-qwen', 'stablelm2', 'megrez', 'hunyuan'),
    Rule((_QWEN2,)),
  ),
  **dict.fromkeys(
    ('mpt', 'olmo', 'phi-2', 'jais', 'trillion', 'exaone4', 'granite-docling'),
    _PLAIN_GPT2,
  ),
  'default': Rule(
    (r'[\p{P}\$\+<=>\^~\|]+', _GPT2, r'\p{N}+', '[0-9][0-9][0-9]')
  ),
  'falcon': Rule((r'[\p{P}\$\+<=>\^~\|`]+', _GPT2, '[0-9][0-9][0-9]')),
  'tekken': Rule((_cased('', r'\p{N}'),), ignores_merges=True, adds_bos=True),
  **dict.fromkeys(
    ('gpt-4o', 'llama4'), Rule((_cased(f'{_ENDINGS}?', r'\p{N}{1,3}'),))
  ),
  'deepseek-v3': Rule(_DEEPSEEK3),
  'deepseek-coder': Rule(
    (r'[\r\n]', r'\s?\p{L}+', r'\s?\p{P}+', '[一-龥ࠀ-一가-퟿]+', r'\p{N}')
  ),
}


def rule(name: str) -> Rule:
  """Returns the rule with a name.

  Raises:
    ValueError: the name is not known.
  """
  if not isinstance(name, str) or name not in _RULES:
    raise ValueError(
      f'got tokenizer.ggml.pre = {expect.shown(name)}, expected one of'
      f' {", ".join(_RULES)}; name a Hugging Face directory with --tokenizer'
    )
  return _RULES[name]


def pre_tokenizer(found: Rule) -> dict[str, Any]:
  """Returns the entry `pre_tokenizer` of a tokenizer.json."""
  splits = [
    {
      'type': 'Split',
      'pattern': {'Regex': expression},
      'behavior': 'Isolated',
      'invert': False,
    }
    for expression in found.expressions
  ]
  return {'type': 'Sequence', 'pretokenizers': [*splits, BYTE_LEVEL]}


def name_of(entry: Any, ignores_merges: bool) -> str | None:
  """Returns the name of a rule by its entry in a tokenizer.json, or None."""
  entry = _plain(entry)
  for name, found in _RULES.items():
    same = entry == _plain(pre_tokenizer(found))
    if same and found.ignores_merges == ignores_merges:
      return name
  return None


BYTE_LEVEL = {
  'type': 'ByteLevel',
  'add_prefix_space': False,
  'trim_offsets': True,
  'use_regex': False,
}


def _plain(entry: Any) -> list[str] | None:
  """Returns the expressions of an entry; None if it has other steps."""
  if not isinstance(entry, dict):
    return None
  steps = entry.get('pretokenizers', [entry])
  found = []
  for step in steps:
    kind = step.get('type')
    if kind == 'ByteLevel' and not step.get('add_prefix_space'):
      found += [_GPT2] if step.get('use_regex', True) else []
    elif kind == 'Digits' and step.get('individual_digits'):
      found.append(r'\p{N}')
    elif kind == 'Split' and _is_isolated(step):
      found.append(step['pattern']['Regex'])
    else:
      return None
  return found


def _is_isolated(step: Mapping[str, Any]) -> bool:
  return (
    step.get('behavior') == 'Isolated'
    and not step.get('invert')
    and 'Regex' in step.get('pattern', {})
  )
