"""Grammars: which tokens may come next, so that an answer keeps a constraint.

    grammar = Grammars(tokenizer).compile(constraint)
    matcher = grammar.matcher()              # one per sequence
    matcher.fill(bits_W)                     # before a token is sampled
    matcher.push(token)                      # after

llguidance keeps an Earley parser over lexemes that are derivatives of regular
expressions, and walks the trie of the vocabulary: no table is built beforehand
(github.com/guidance-ai/llguidance).

**Hostile constraints.** No process of its own compiles: limits bound the work.
The text is short (`constraint`), `schemas` refuses the keywords that were found
to take long, in Lark too, and the library counts its steps. What passes all of
these may still have no first mask within the limits, so a compilation includes
two of them. About a hundred hostile schemas, expressions and grammars were
compiled: none took more than a second of processor time or 110 MB
(`tests/inference/constraints/test_hostile.py`). The library lets other threads
run meanwhile. Sequences pay for their masks, see `_MASK_SECONDS`.
"""

import collections
from collections.abc import Callable, Sequence
import copy
import functools
import threading
import time
from typing import Any

import numpy as np

from inference.constraints import constraint as constraint_lib, sources
from text import tokenizer as tokenizer_lib

# Compiled grammars of one tokenizer, and the processor time of one and of all
# of them, masks included. Memory grows with work: a second took 50 to 250 MB.
_MOST_KEPT, _MOST_SECONDS, _MOST_SECONDS_OF_ALL = 128, 1.0, 3.0
# Limits in steps: building lexers takes 50,000 steps per ms, one mask 14,000.
_LIMITS = {
  'initial_lexer_fuel': 300_000,
  'step_lexer_fuel': 50_000,
  'step_max_items': 10_000,
  'max_lexer_states': 20_000,
  'max_grammar_size': 100_000,
  'verbose_errors': False,
}


# Processor time that a token may take, its mask included, and the time beyond
# it that a sequence may be behind. Tokens of ordinary schemas take less than a
# tenth. All sequences of a batch wait for the slowest mask, so one that is
# slower for long ends with an error. Time that was not used is not saved up.
_MASK_SECONDS, _SPARE_SECONDS = 0.002, 0.2
_ALL = np.uint32(2**32 - 1)


class _Clock:
  """The processor time of a sequence, and of the copies that look ahead."""

  def __init__(self, grammar: 'Grammar'):
    self._grammar, self._behind = grammar, 0.0  # seconds

  def spent(self, seconds: float) -> str:
    """Adds the time of some work; returns why the sequence ends, or ''."""
    self._grammar.seconds += seconds
    self._behind += seconds
    if self._behind > _SPARE_SECONDS:
      return 'the grammar is too complex, its masks take too long'
    return ''

  def allow(self) -> None:
    """Adds the time that one token may take."""
    self._behind = max(self._behind - _MASK_SECONDS, 0.0)


class Matcher:
  """The state of one sequence in its grammar."""

  def __init__(self, grammar: 'Grammar', ends: Sequence[int], eos_id: int):
    self._grammar, self._end_ids, self._eos_id = grammar, ends, eos_id
    self.failure = ''  # why no token can follow
    self._clock = _Clock(grammar)
    self._root = grammar.root
    self._inner = self._root.deep_copy()
    self._tokens: list[int] = []

  def fill(self, bits_W: np.ndarray) -> None:
    """Sets the bits of the tokens that may come next, uint32 [V / 32].

    An end of the answer may come where the grammar may end. If none may come,
    `failure` says why, and all bits are set.

    Args:
      bits_W: of the whole vocabulary, without gaps in memory.
    """
    if not self.failure:
      self._fill(bits_W)
    if self.failure:
      bits_W[:] = _ALL

  def _fill(self, bits_W: np.ndarray) -> None:
    start = time.thread_time()
    # Written in place: copies would take a third of the time of most masks.
    place = bits_W.ctypes.data, bits_W.nbytes
    self._inner.unsafe_compute_mask_ptr(*place)
    if self._is_worn():
      self._renew()
      self._inner.unsafe_compute_mask_ptr(*place)
    self.failure = self._clock.spent(time.thread_time() - start)
    self._clock.allow()
    if self._inner.is_error():
      self.failure = _first_line(self._inner.get_error())
    if self.failure:
      return
    may_end = bits_W[self._eos_id >> 5] >> (self._eos_id & 31) & 1
    for token in self._end_ids:
      bit = np.uint32(1 << (token & 31))
      if may_end:
        bits_W[token >> 5] |= bit
      else:
        bits_W[token >> 5] &= ~bit
    if not np.count_nonzero(bits_W):
      self.failure = 'the grammar has no token that may come next'

  def ahead(self) -> 'Matcher':
    """Returns a copy that looks at a draft; it takes 15 us."""
    made = copy.copy(self)
    made._inner, made._tokens = self._inner.deep_copy(), [*self._tokens]
    return made

  def push(self, token: int) -> None:
    """Takes the token that was sampled."""
    if token in self._end_ids or self.failure:
      return
    start = time.thread_time()
    is_taken = self._inner.consume_token(token)
    self._tokens.append(token)
    if not is_taken and self._is_worn():
      is_taken = self._renew()
    self.failure = self._clock.spent(time.thread_time() - start)
    if not is_taken:
      self.failure = _first_line(self._inner.get_error())

  def _is_worn(self) -> bool:
    """Whether the states that all copies share are as many as they may be."""
    is_error = self._inner.is_error() and self._grammar.is_quick
    return is_error and ('lexer error: too many' in self._inner.get_error())

  def _renew(self) -> bool:
    """Takes the tokens again with new states; returns whether they fit."""
    self._root = self._grammar.renewed(self._root)
    self._inner = self._root.deep_copy()
    return self._inner.consume_tokens(self._tokens)


class Grammar:
  """A compiled constraint."""

  def __init__(
    self, make: Callable[[], Any], special_ids: frozenset[int], eos_id: int
  ):
    """Compiles it.

    Args:
      make: returns the constraint in the library's own type, compiled.
      special_ids: ids without text.
      eos_id: ends an answer.
    """
    start = time.thread_time()
    # The matcher of which all others are copies. They share the states of its
    # lexer, which become more with every mask.
    self.root = make()
    self._make, self._lock = make, threading.Lock()
    self._special_ids, self._eos_id = special_ids, eos_id
    self.seconds = time.thread_time() - start  # of all work
    # Whether it may be compiled again while a batch waits.
    self.is_quick = self.seconds < _SPARE_SECONDS / 4

  def matcher(self, stop_ids: Sequence[int] = ()) -> Matcher:
    """Returns the state of a new sequence.

    Args:
      stop_ids: stop ids of the request. A stop id without text ends an answer
        only where the grammar may end, as EOS does.
    """
    ends = [token for token in stop_ids if token in self._special_ids]
    return Matcher(self, [*ends, self._eos_id], self._eos_id)

  def renewed(self, worn: Any) -> Any:
    """Returns a root with new states, compiled again if `worn` is the root."""
    with self._lock:
      if self.root is worn:
        self.root = self._make()
      return self.root

  def failure(self, num_words: int) -> str:
    """Returns why no answer can begin, or ''.

    Args:
      num_words: of 32 bits, of a mask.
    """
    if self.root.is_error():
      return _first_line(self.root.get_error())
    # The first mask may make more states than the second one finds allowed.
    root = self.root
    for _ in range(2):
      matcher = self.matcher()
      matcher.fill(np.zeros(num_words, np.uint32))
      if self.root is not root:
        return 'its first tokens have too many states'
      if matcher.failure:
        return matcher.failure
    return ''


class Grammars:
  """Compiles constraints for one tokenizer, and keeps the latest grammars."""

  def __init__(self, tokenizer: tokenizer_lib.Tokenizer):
    self.tokenizer, self._lock = tokenizer, threading.Lock()
    self._kept: collections.OrderedDict[Any, Grammar] = (
      collections.OrderedDict()
    )
    self._inner: Any = None  # the vocabulary
    self._special_ids: frozenset[int] = frozenset()

  def compile(self, constraint: constraint_lib.Constraint) -> Grammar:
    """Returns the grammar of a constraint. Any thread may call this.

    Raises:
      ConstraintError: the constraint has no grammar, or exceeds the limits.
      ModuleNotFoundError: llguidance is not installed.
    """
    with self._lock:
      kept = self._kept.get(constraint)
      if kept and kept.seconds < _MOST_SECONDS:
        self._kept.move_to_end(constraint)
        return kept
      library = _library()
      if self._inner is None:
        self._inner = self._words(library)
    source = sources.source(library, constraint, self.tokenizer.special_tokens)
    # The library lets other threads run while it compiles.
    make = functools.partial(
      library.LLMatcher,
      self._inner,
      source,
      log_level=0,
      limits=library.LLParserLimits(**_LIMITS),
    )
    made = Grammar(make, self._special_ids, self.tokenizer.eos_id)
    if failure := made.failure(-(-self.tokenizer.vocab_size // 32)):
      raise constraint_lib.ConstraintError(
        f'{constraint.kind}: got one that cannot be kept: {failure}; simplify'
        ' it'
      )
    self._keep(constraint, made)
    return made

  def _keep(self, constraint: constraint_lib.Constraint, made: Grammar) -> None:
    """Keeps a grammar, and drops the oldest ones beyond the bounds."""
    with self._lock:
      kept = self._kept
      kept[constraint] = made
      kept.move_to_end(constraint)
      while len(kept) > 1 and (
        len(kept) > _MOST_KEPT
        or sum(each.seconds for each in kept.values()) > _MOST_SECONDS_OF_ALL
      ):
        kept.popitem(last=False)

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
  if 'NoExtensionBias' in text:  # the name of llguidance
    return 'no token may come next, as if no text had its form'
  return ' '.join(text.split())[:300] or 'the grammar is too complex'
