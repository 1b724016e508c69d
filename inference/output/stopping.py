"""The transcript of one sequence: tokens in, text, ids and logprobs out.

    transcript = Transcript(tokenizer, settings, max_tokens=limit)
    release = transcript.push(token_id)        # until finish_reason is set

One cursor moves over the tokens and releases text, ids and logprobs together. A
token is released when its last character is complete and can no longer be part
of a stop string. Until then the whole token waits, including characters that
are already safe. So, before the end, the released text is always the text of
the released ids.

A sequence ends for one of these reasons; if one token causes several, the first
one of this list counts:

  stop string   reason 'stop', stop_reason the string; the text ends before it
  EOS           reason 'stop', stop_reason None
  stop id       reason 'stop', stop_reason the id; its own text is left out
  length        reason 'length', stop_reason None

A sequence whose logits are not finite has no next token: `fail` ends it with
reason 'error'. Its text is the text of the tokens before.

The last release holds all remaining ids, so that released ids add up to all
sampled ids. That includes the ids of EOS, of the stop id or of the stop string,
whose text is not released. The first `num_text_ids` ids spell the text.

The first `min_tokens` tokens can only end the sequence by its length. A stop
string that one of them completes is ordinary text, as in vLLM; one that begins
in them and is completed later counts. The sampler excludes EOS and stop ids
during these tokens.
"""

from typing import NamedTuple

from inference.output import stop_strings
from inference.sampling import (
  logprobs as logprobs_lib,
  settings as settings_lib,
)
from text import detokenize, tokenizer as tokenizer_lib


class Release(NamedTuple):
  """The text, ids and logprobs that one token releases; each may be empty."""

  text: str
  token_ids: tuple[int, ...]
  logprobs: tuple[logprobs_lib.TokenLogprobs, ...]  # one per id, or none


class _Held(NamedTuple):
  """A token that is not released yet."""

  token_id: int
  logprobs: logprobs_lib.TokenLogprobs | None
  # Number of characters of the sequence up to the token's end. None if the
  # token ends inside a character, or has no text.
  end: int | None


class Transcript:
  """Collects one sequence until it ends."""

  def __init__(
    self,
    tokenizer: tokenizer_lib.Tokenizer,
    settings: settings_lib.Settings,
    *,
    max_tokens: int,
    stop: stop_strings.StopStrings | None = None,
  ):
    """Starts without tokens.

    Args:
      tokenizer: the tokenizer of the model.
      settings: the settings of the request.
      max_tokens: the length at which the sequence ends.
      stop: the stop strings of `settings`, if other sequences share them.
    """
    self._tokenizer = tokenizer
    self._settings = settings
    self._max_tokens = max_tokens
    # A completion continues a prompt: its first space belongs to the text.
    self._decoder = detokenize.StreamDecoder(tokenizer, is_continued=True)
    self._matcher = stop_strings.StopMatcher(stop or settings.stop)
    self._held: list[_Held] = []
    # Numbers of characters so far: decoded, passed by the matcher, released.
    self._num_decoded = self._num_safe = self._num_released = 0
    self._safe = ''  # passed by the matcher, not released
    self._pieces: list[str] = []
    self.token_ids: list[int] = []  # all, released or not
    self.num_text_ids = 0  # the first ids that spell `text`
    self.finish_reason: str | None = None  # 'stop' | 'length' | 'error'
    self.stop_reason: str | int | None = None  # the string or id that matched

  @property
  def text(self) -> str:
    """All text released."""
    return ''.join(self._pieces)

  def push(
    self, token_id: int, logprobs: logprobs_lib.TokenLogprobs | None = None
  ) -> Release:
    """Takes the next token and returns the release.

    Raises:
      ValueError: the sequence has ended.
    """
    if self.finish_reason:
      raise ValueError(
        f'token {token_id}: got one after the end ({self.finish_reason}),'
        ' expected none; drop what was sampled before the end was known'
      )
    may_stop = len(self.token_ids) >= self._settings.min_tokens
    self.token_ids.append(token_id)
    is_eos = token_id == self._tokenizer.eos_id
    is_eos = is_eos and not self._settings.ignore_eos
    is_stop = may_stop and (is_eos or token_id in self._settings.stop_ids)
    is_last = len(self.token_ids) == self._max_tokens
    if is_stop:
      self._flush(may_stop)
      self._held.append(_Held(token_id, logprobs, None))
    else:
      self._decode(token_id, logprobs, may_stop)
      if is_last:
        self._flush(may_stop)
    if self._matcher.matched is not None:
      return self._finish('stop', self._matcher.matched)
    if is_stop:
      return self._finish('stop', None if is_eos else token_id)
    return self._finish('length') if is_last else self._release()

  def fail(self) -> Release:
    """Ends the sequence where no next token exists; returns the release."""
    return self._finish('error')

  def cut(self) -> Release:
    """Ends the sequence here, with reason 'length'; returns the release."""
    self._flush(may_stop=False)
    return self._finish('length')

  def _decode(self, token_id, logprobs, may_stop: bool) -> None:
    self._pass(self._decoder.push(token_id), may_stop)
    end = self._num_decoded if self._decoder.is_whole else None
    self._held.append(_Held(token_id, logprobs, end))

  def _flush(self, may_stop: bool) -> None:
    """Decodes an unfinished character at the end."""
    self._pass(self._decoder.finish(), may_stop)
    if self._held:
      self._held[-1] = self._held[-1]._replace(end=self._num_decoded)

  def _pass(self, piece: str, may_stop: bool) -> None:
    """Passes decoded text through the matcher."""
    self._num_decoded += len(piece)
    safe = self._matcher.push(piece, may_match=may_stop)
    self._num_safe += len(safe)
    self._safe += safe

  def _finish(self, finish_reason, stop_reason=None) -> Release:
    self.finish_reason, self.stop_reason = finish_reason, stop_reason
    rest = self._matcher.finish()
    self._num_safe += len(rest)
    self._safe += rest
    return self._release(is_end=True)

  def _release(self, *, is_end: bool = False) -> Release:
    """Moves the cursor after the last safe token, or to the end."""
    num_tokens, end = 0, self._num_released
    for index, held in enumerate(self._held, 1):
      if held.end is None:
        continue
      if held.end > self._num_safe:
        break  # ends never decrease
      num_tokens, end = index, held.end
    self.num_text_ids += num_tokens
    if is_end:
      num_tokens, end = len(self._held), self._num_safe
    free, self._held = self._held[:num_tokens], self._held[num_tokens:]
    num_chars = end - self._num_released
    text, self._safe = self._safe[:num_chars], self._safe[num_chars:]
    self._num_released = end
    self._pieces.append(text)
    return Release(
      text,
      tuple(held.token_id for held in free),
      tuple(held.logprobs for held in free if held.logprobs is not None),
    )
