"""Grammars: which tokens may come next, so that an answer keeps a constraint.

    grammar = Grammars(tokenizer).compile(constraint)
    matcher = grammar.matcher()              # one per sequence
    matcher.fill(bits_W)                     # before a token is sampled
    matcher.push(token)                      # after

llguidance keeps an Earley parser over lexemes that are derivatives of regular
expressions, and walks the trie of the vocabulary: no table is built beforehand
(github.com/guidance-ai/llguidance). Its limits bound the time and memory of the
compilation and of every mask.
"""

import collections
from collections.abc import Sequence
import threading
import time
from typing import Any

import numpy as np

from inference.constraints import constraint as constraint_lib, sources
from text import tokenizer as tokenizer_lib

_MOST_KEPT = 128  # compiled grammars of one tokenizer
# Limits in steps: building lexers takes 50,000 steps per ms, one mask 14,000.
_LIMITS = {
  'initial_lexer_fuel': 300_000,
  'step_lexer_fuel': 50_000,
  'step_max_items': 10_000,
  'max_lexer_states': 20_000,
  'max_grammar_size': 100_000,
  'verbose_errors': False,
}


# Processor time that a mask may take on average, and the extra time that all
# masks of a sequence may take together. Masks of ordinary schemas take less
# than a tenth. All sequences of a batch wait for the slowest mask, so one
# whose masks are slower ends with an error.
_MASK_SECONDS, _SPARE_SECONDS = 0.005, 0.2


class Matcher:
  """The state of one sequence in its grammar."""

  def __init__(self, inner: Any, end_ids: Sequence[int], eos_id: int):
    self._inner, self._end_ids, self._eos_id = inner, end_ids, eos_id
    self.failure = ''  # why no token can follow
    self._seconds = 0.0  # time of masks beyond the average that is allowed

  def fill(self, bits_W: np.ndarray) -> None:
    """Sets the bits of the tokens that may come next, uint32 [V / 32].

    An end of the answer may come where the grammar may end. If none may come,
    `failure` says why, and the bits stay as they are.
    """
    start = time.thread_time()
    found = np.frombuffer(self._inner.compute_bitmask(), np.uint32)
    self._seconds += time.thread_time() - start - _MASK_SECONDS
    if self._inner.is_error():
      self.failure = _first_line(self._inner.get_error())
      return
    if self._seconds > _SPARE_SECONDS:
      self.failure = 'the grammar is too complex, its masks take too long'
      return
    found = found[: len(bits_W)].copy()
    may_end = found[self._eos_id >> 5] >> (self._eos_id & 31) & 1
    for token in self._end_ids:
      bit = np.uint32(1 << (token & 31))
      if may_end:
        found[token >> 5] |= bit
      else:
        found[token >> 5] &= ~bit
    if not found.any():
      self.failure = 'the grammar has no token that may come next'
      return
    bits_W[:] = found

  def ahead(self) -> 'Matcher':
    """Returns a copy that looks at a draft; it takes 15 us."""
    return Matcher(self._inner.deep_copy(), self._end_ids, self._eos_id)

  def push(self, token: int) -> None:
    """Takes the token that was sampled."""
    if token in self._end_ids or self.failure:
      return
    if not self._inner.consume_token(token):
      self.failure = _first_line(self._inner.get_error())


class Grammar:
  """A compiled constraint."""

  def __init__(self, inner: Any, special_ids: frozenset[int], eos_id: int):
    self._inner, self._special_ids = inner, special_ids
    self._eos_id = eos_id

  def matcher(self, stop_ids: Sequence[int] = ()) -> Matcher:
    """Returns the state of a new sequence.

    Args:
      stop_ids: stop ids of the request. A stop id without text ends an answer
        only where the grammar may end, as EOS does.
    """
    ends = [token for token in stop_ids if token in self._special_ids]
    return Matcher(self._inner.deep_copy(), [*ends, self._eos_id], self._eos_id)


class Grammars:
  """Compiles constraints for one tokenizer, and keeps the latest grammars."""

  def __init__(self, tokenizer: tokenizer_lib.Tokenizer):
    self.tokenizer, self._lock = tokenizer, threading.Lock()
    self._kept: collections.OrderedDict[Any, Grammar] = (
      collections.OrderedDict()
    )
    self._inner: Any = None
    self._special_ids: frozenset[int] = frozenset()

  def compile(self, constraint: constraint_lib.Constraint) -> Grammar:
    """Returns the grammar of a constraint. Any thread may call this.

    Raises:
      ConstraintError: the constraint has no grammar, or exceeds the limits.
      ModuleNotFoundError: llguidance is not installed.
    """
    with self._lock:
      if constraint in self._kept:
        self._kept.move_to_end(constraint)
        return self._kept[constraint]
      library = _library()
      if self._inner is None:
        self._inner = self._words(library)
    # The library lets other threads run while it compiles.
    inner = library.LLMatcher(
      self._inner,
      sources.source(library, constraint, self.tokenizer.special_tokens),
      log_level=0,
      limits=library.LLParserLimits(**_LIMITS),
    )
    if not inner.is_error():
      inner.deep_copy().compute_bitmask()
    if inner.is_error():
      raise constraint_lib.ConstraintError(
        f'{constraint.kind}: got one that cannot be kept:'
        f' {_first_line(inner.get_error())}; simplify it'
      )
    made = Grammar(inner, self._special_ids, self.tokenizer.eos_id)
    with self._lock:
      self._kept[constraint] = made
      while len(self._kept) > _MOST_KEPT:
        self._kept.popitem(last=False)
    return made

  def _words(self, library: Any) -> Any:
    """Returns the vocabulary in the library's own type."""
    tokenizer = self.tokenizer
    tokens = [tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)]
    specials = {i for i, each in enumerate(tokens) if not each}
    specials |= set(tokenizer.special_tokens.values())
    for i in specials:
      tokens[i] = f'<|{i}|>'.encode()  # a name; no text has it
    self._special_ids = frozenset(specials)
    # The argument of `TokenizerWrapper`.
    words = _Words(tokens, sorted(specials), tokenizer)
    return library.LLTokenizer(
      library.TokenizerWrapper(words), n_vocab=tokenizer.vocab_size
    )


class _Words:
  """A vocabulary in the form that `llguidance.TokenizerWrapper` reads."""

  def __init__(
    self,
    tokens: list[bytes],
    special_ids: list[int],
    tokenizer: tokenizer_lib.Tokenizer,
  ):
    self.tokens, self.special_token_ids = tokens, special_ids
    self.bos_token_id = tokenizer.bos_id
    self.eos_token_id = tokenizer.eos_id
    self._tokenizer = tokenizer

  def __call__(self, text: str | bytes) -> list[int]:
    if isinstance(text, bytes):
      text = text.decode(errors='replace')
    return self._tokenizer.encode(text)


def _library() -> Any:
  try:
    import llguidance  # pyright: ignore[reportMissingImports]
  except ModuleNotFoundError:
    raise ModuleNotFoundError(
      'llguidance: got no such library, expected it for constrained answers;'
      ' pip install -r requirements-serve.txt'
    ) from None
  return llguidance


def _first_line(text: str) -> str:
  """Returns the part of an error that says why, without the state."""
  text = text.split('<state>')[0].split('<non-verbose/>')[0]
  return ' '.join(text.split())[:300] or 'the grammar is too complex'
