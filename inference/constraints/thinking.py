"""A cap on the reasoning of an answer, which ends it gracefully.

    request = Request(..., thinking=Cap(most_tokens=200, opening='<think>',
                                        closing='</think>', is_open=True))

The tokens between the markers are free until there are `most_tokens`. If the
model has not closed its reasoning by then, the tokens of the closing marker are
the only ones allowed, one after the other, and the model continues with its
answer. So the cap holds for any sampling, greedy too, and costs no second
request. Tokens of a text marker that the model writes itself count until the
marker is whole; tokens of a forced marker do not count. A grammar may apply at
the same time.

The mask of a step is the port: `inference.engine.flight` applies it as a
grammar's, so preemption, drafts and several samples need nothing of their own.
A copy counts the tokens of a draft as reasoning: behind the cap, each position
of the draft allows the token of the closing marker that is due there.
Log-probabilities are the model's own, of forced tokens too.
"""

from collections.abc import Callable, Sequence
import copy
import dataclasses
import functools

import numpy as np

from checks import expect
from inference.constraints import grammars
from text import detokenize, tokenizer as tokenizer_lib


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cap:
  """The most reasoning of an answer.

  Raises:
    ValueError: the number is negative, or a marker is empty.
  """

  most_tokens: int  # 0: none
  opening: str  # markers around reasoning
  closing: str
  is_open: bool = False  # the prompt ends inside of reasoning

  def __post_init__(self):
    expect.at_least('reasoning.budget', self.most_tokens, 0)
    if not self.opening or not self.closing:
      raise ValueError(
        f'reasoning: got the markers {self.opening!r} and {self.closing!r},'
        ' expected two texts, as <think> and </think>'
      )


class Capped:
  """A cap with the grammar beneath it, for `Request.grammar`."""

  def __init__(
    self,
    cap: Cap,
    inner: grammars.Grammar | None,
    tokenizer: tokenizer_lib.Tokenizer,
  ):
    self._cap, self._inner, self._tokenizer = cap, inner, tokenizer

  def matcher(self, stop_ids: Sequence[int] = ()) -> 'Matcher':
    """Returns the state of a new sequence."""
    begin = None
    if self._inner:
      begin = functools.partial(self._inner.matcher, stop_ids)
    return Matcher(self._cap, begin, self._tokenizer)


class Matcher:
  """The state of one sequence; has the members of `grammars.Matcher`."""

  def __init__(
    self,
    cap: Cap,
    begin: Callable[[], grammars.Matcher] | None,
    tokenizer: tokenizer_lib.Tokenizer,
  ):
    self._cap, self._begin, self._tokenizer = cap, begin, tokenizer
    self._inner = begin() if begin else None
    self._decoder = detokenize.StreamDecoder(tokenizer, is_continued=True)
    self.num_tokens = 0  # of reasoning so far
    self._is_inside = cap.is_open
    # Reasoning may open anywhere with a special token, else at the start only.
    special = tokenizer.special_tokens
    self._opens_anywhere = cap.opening in special
    self._is_start = True
    self._tail = ''  # text that may be part of a marker
    self._forced: list[int] = []  # the rest of the closing marker
    self._check()

  @property
  def failure(self) -> str:
    """Why no token can follow, '' if one can."""
    return self._inner.failure if self._inner else ''

  def fill(self, bits_W: np.ndarray) -> None:
    """Clears the bits of tokens that may not come next, uint32 [V / 32]."""
    if not self._forced:
      if self._inner:
        self._inner.fill(bits_W)
      return
    token = self._forced[0]
    bits_W[:] = 0
    bits_W[token >> 5] = np.uint32(1 << (token & 31))

  def ahead(self) -> 'Matcher':
    """Returns a copy that looks at a draft."""
    made = copy.copy(self)
    made._inner = self._inner.ahead() if self._inner else None
    made._decoder = self._decoder.copy()
    made._forced = [*self._forced]
    return made

  def push(self, token: int) -> None:
    """Takes the token that was sampled."""
    if self._inner:
      self._inner.push(token)
    text = self._decoder.push(token)
    if self._forced:
      self._forced.pop(0)
      if not self._forced:
        self._leave()
      return
    if self._is_inside:
      self._step_inside(token, text)
    else:
      self._step_outside(token, text)
    self._check()

  def _step_inside(self, token: int, text: str) -> None:
    if token == self._tokenizer.special_tokens.get(self._cap.closing):
      self._leave()
      return
    self.num_tokens += 1
    self._tail += text
    if self._cap.closing in self._tail and not self._is_special_closing:
      self._leave()

  def _step_outside(self, token: int, text: str) -> None:
    opening = self._cap.opening
    if token == self._tokenizer.special_tokens.get(opening):
      self._enter('')
      return
    self._tail += text
    stripped = self._tail.lstrip()
    if not self._is_start or self._opens_anywhere:
      self._tail = ''
    elif stripped.startswith(opening):
      rest = stripped[len(opening) :]
      # A token that ends behind the marker has text of the reasoning.
      self.num_tokens += bool(rest)
      self._enter(rest)
    elif not opening.startswith(stripped):
      self._is_start = False

  def _enter(self, rest: str) -> None:
    self._is_inside, self._is_start, self._tail = True, False, rest

  def _leave(self) -> None:
    self._is_inside, self._tail = False, ''
    # Another block may follow at once, as at the start.
    self._is_start = True

  def _check(self) -> None:
    """Forces the closing marker once the cap is reached."""
    if not self._is_inside or self.num_tokens < self._cap.most_tokens:
      return
    if self._begin and not self._decoder.is_whole:
      # No marker follows half a character in a grammar. Reasoning is free text,
      # so the state behind the marker is the same without it.
      self._inner = self._begin()
      for token in () if self._cap.is_open else self._ids(self._cap.opening):
        self._inner.push(token)
    closing = self._cap.closing
    if self._is_special_closing:
      self._forced = list(self._ids(closing))
      return
    # The model may be in the middle of it.
    begun = next(
      n for n in range(len(closing) - 1, -1, -1)
      if self._tail.endswith(closing[:n])
    )  # fmt: skip
    self._forced = list(self._tokenizer.encode(closing[begun:]))

  def _ids(self, marker: str) -> Sequence[int]:
    special = self._tokenizer.special_tokens.get(marker)
    return self._tokenizer.encode(marker) if special is None else (special,)

  @property
  def _is_special_closing(self) -> bool:
    return self._cap.closing in self._tokenizer.special_tokens
