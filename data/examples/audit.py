"""An audit of documents: the trained tokens, marked in the text, and checks."""

from collections.abc import Iterator
import itertools
import sys

import numpy as np

from data.examples import encoding
from text import chat, tokenizer as tokenizer_lib, utf8

_BRACKETS = '⟦', '⟧'
_GREEN, _PLAIN = '\033[1;32m', '\033[0m'


def render(
  document: encoding.Document, tokenizer: tokenizer_lib.Tokenizer
) -> str:
  """Returns the text of a document with its trained tokens marked.

  In colour on a terminal, else in double brackets. Special tokens are shown;
  where a message has the string of one, its first character is escaped.
  """
  is_terminal = sys.stdout.isatty()
  opening, closing = (_GREEN, _PLAIN) if is_terminal else _BRACKETS
  names = {i: token for token, i in tokenizer.special_tokens.items()}
  names |= {
    i: names.get(i) or name
    for i, name in (
      (tokenizer.pad_id, '<pad>'),
      (tokenizer.eos_id, '<eos>'),
      (tokenizer.bos_id, '<bos>'),
    )
  }
  parts = []
  for is_trained, start, end in _runs(document.trained):
    text = _text(document.ids[start:end].tolist(), names, tokenizer)
    parts.append(f'{opening}{text}{closing}' if is_trained else text)
  return ''.join(parts)


def check(
  document: encoding.Document, tokenizer: tokenizer_lib.Tokenizer
) -> None:
  """Checks one BOS, and a trained stop token at the end of each trained span.

  Raises:
    ValueError: a check has failed.
  """
  ids, trained = document
  spans = [(a, b) for is_trained, a, b in _runs(trained) if is_trained]
  if len(ids) != len(trained) or not spans:
    raise ValueError(
      f'document: got {len(ids)} ids and {int(np.sum(trained))} trained ones of'
      f' {len(trained)}, expected some trained ones'
    )
  if trained[-1] or trained[0]:
    raise ValueError(
      'document: got a trained id at its start or end, expected an untrained'
      ' first id, which is no target, and an untrained id after the last stop'
      ' token'
    )
  special = {*tokenizer.special_tokens.values()}
  special |= {tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id}
  is_special = np.isin(ids, list(special))
  _check_bos(document, spans, is_special, tokenizer)
  for (start, end), (following, _) in itertools.pairwise(
    [*spans, (len(ids), 0)]
  ):
    if is_special[end - 1] or not is_special[end:following].any():
      continue  # ends with a stop token, or is a part of a turn in several
    text = tokenizer.decode(ids[start:end].tolist())
    if not text.endswith(chat.DEFAULT_STOP):
      raise ValueError(
        f'document: got a trained span that ends with {text[-20:]!r}, expected'
        ' a stop token'
      )


def _check_bos(
  document: encoding.Document,
  spans: list[tuple[int, int]],
  is_special: np.ndarray,
  tokenizer: tokenizer_lib.Tokenizer,
) -> None:
  bos = tokenizer.bos_id
  if bos == tokenizer.eos_id:
    return  # the vocabulary has no BOS
  (places,) = np.nonzero(document.ids[:-1] == bos)
  if not len(places):
    return
  # Some vocabularies name the token that opens each turn BOS, too.
  opens_turns = tokenizer.kind == 'huggingface' and all(
    document.ids[np.nonzero(is_special[:start])[0][-1]] == bos
    for start, _ in spans
    if is_special[:start].any()
  )
  is_doubled = bool(np.any(np.diff(places) == 1))
  if places[0] != 0 or is_doubled or (len(places) > 1 and not opens_turns):
    raise ValueError(
      f'document: got BOS at {places.tolist()}, expected it once, at the start'
    )


def _runs(trained: np.ndarray) -> Iterator[tuple[bool, int, int]]:
  """Yields (value, start, end) of each run of equal values."""
  start = 0
  for value, group in itertools.groupby(trained.tolist()):
    end = start + len(list(group))
    yield value, start, end
    start = end


def _text(
  ids: list[int], names: dict[int, str], tokenizer: tokenizer_lib.Tokenizer
) -> str:
  parts = []
  for is_special, group in itertools.groupby(ids, names.__contains__):
    if is_special:
      parts += [names[i] for i in group]
      continue
    # By bytes: a run may begin or end inside of a character.
    text = utf8.decode(b''.join(map(tokenizer.token_bytes, group)))
    for token in filter(None, names.values()):
      # The same string in ordinary tokens is text: <eos> becomes \x3ceos>.
      text = text.replace(token, f'\\x{ord(token[0]):02x}{token[1:]}')
    parts.append(text)
  # No text may look like the marks, or move the cursor of a terminal.
  return ''.join(
    char
    if char == '\n' or (char.isprintable() and char not in _BRACKETS)
    else char.encode('unicode_escape').decode()
    for char in ''.join(parts)
  )
