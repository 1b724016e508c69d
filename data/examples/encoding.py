"""Examples become documents: token ids, each trained or not.

    encoder = Encoder(tokenizer, template, 'chat')
    unit = encoder.unit(record, 'train.jsonl:12')

The text of a conversation is encoded as a server encodes it. So the ids before
an answer are the ids of a server's prompt, and begin with BOS if that prompt
does. A document ends with the stop token of its last trained turn and one more
id, which is not trained: the stop token is then an input, too.

A trained id is an id that the assistant says: its reasoning, text and calls,
and the stop token. Special tokens in messages are text (`text.chat_inputs`).
"""

from collections.abc import Mapping, Sequence
import dataclasses
import hashlib
import json
from typing import Any, NamedTuple

import numpy as np

from checks import expect
from data.examples import shapes
from text import tokenizer as tokenizer_lib
from text.replies import fitting, turns

_FORMAT = 1  # version of the documents' form; part of the digest

NO_ANSWER = 'without an answer of the assistant'
EMPTY_ANSWER = 'with an empty answer'
SAME_ANSWERS = 'with two answers that are the same'


class Empty(ValueError):
  """A record with nothing to train, which is left out; its text says why."""


class Document(NamedTuple):
  """The ids of a conversation, and one pad id at the end."""

  ids: np.ndarray  # int64 [n]
  trained: np.ndarray  # bool [n]: whether the id is a trained target


class Unit(NamedTuple):
  """The documents of a record, which stay in one row."""

  documents: tuple[Document, ...]
  streams: dict[str, tuple[float, ...]]  # one value per document, by name


@dataclasses.dataclass(frozen=True)
class Encoder:
  """Makes units of records."""

  tokenizer: tokenizer_lib.Tokenizer
  template: str  # Jinja source; '' for the plain transcript
  kind: str  # one of shapes.KINDS
  # Whether a text begins with BOS, as `has_bos` of a frozen directory says.
  # Templates with special tokens write BOS themselves. None: as the tokenizer.
  has_bos: bool | None = None

  def __post_init__(self):
    """Checks the kind."""
    expect.one_of('data.examples', self.kind, shapes.KINDS)

  def digest(self) -> str:
    """Returns a hash of all settings of documents except the tokenizer."""
    parts = [_FORMAT, self.template, self.kind, self.has_bos]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

  def unit(self, record: Any, where: str, other: Any | None = None) -> Unit:
    """Returns the documents of a record.

    Args:
      record: a JSON value.
      where: names the record in errors.
      other: for labelled examples, the record whose completion is the second
        document, after the prompt of this record.

    Raises:
      Empty: the record is left out.
      ValueError: the record is malformed, or the template refuses it.
    """
    example = shapes.recognise(record, self.kind, where)
    if self.kind == 'chat':
      document = self._document(
        example.messages, example.tools, example.untrained, where
      )
      return Unit((document,), {})
    if self.kind == 'pairs':
      if example.chosen == example.rejected:
        raise Empty(SAME_ANSWERS)
      answers = example.chosen, example.rejected
      margin = example.margin
      streams = {} if margin is None else {'margins': (margin, margin)}
    else:
      place = f'{where}, next record'
      following = shapes.recognise(other, self.kind, place)
      answers = example.completion, following.completion
      streams = {'labels': (1.0 if example.label else -1.0, 0.0)}
    untrained = range(len(example.prompt))
    documents = tuple(
      self._document(example.prompt + answer, example.tools, untrained, where)
      for answer in answers
    )
    return Unit(documents, streams)

  def _document(
    self,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None,
    untrained: Sequence[int] | frozenset[int],
    where: str,
  ) -> Document:
    _check_answers(messages, untrained)
    template = turns.of(self.tokenizer, self.template)
    try:
      _check_shown(messages, tools, template)
      messages = fitting.fitted(messages, template.style)
      found = turns.find(template, messages, tools, untrained)
      ids, trained = turns.encode(
        self.tokenizer, template, found, has_bos=self.has_bos
      )
    except ValueError as error:
      raise ValueError(f'{where}: {error}') from error
    return Document(
      np.array([*ids, self.tokenizer.pad_id], np.int64),
      np.array([*trained, False], np.bool_),
    )


def check(tokenizer: tokenizer_lib.Tokenizer, template: str) -> None:
  """Checks that training can use a chat template.

  Raises:
    ValueError: the template is malformed; its answers cannot be found in the
      text, or have no stop token.
  """
  turns.check(turns.of(tokenizer, template))


def stop_ids(
  tokenizer: tokenizer_lib.Tokenizer, template: str
) -> tuple[int, ...]:
  """Returns the ids that the model is trained to end its turns with."""
  stop = turns.of(tokenizer, template).ending.stop
  return (tokenizer.special_tokens[stop] if stop else tokenizer.eos_id,)


def _check_answers(
  messages: Sequence[Mapping[str, Any]], untrained: Sequence[int] | frozenset
) -> None:
  """Raises Empty if no answer is trained, or one has nothing in it."""
  answers = [
    message
    for i, message in enumerate(messages)
    if message['role'] == 'assistant' and i not in untrained
  ]
  if not answers:
    raise Empty(NO_ANSWER)
  for message in answers:
    said = ('content', 'reasoning_content', 'thinking', 'reasoning')
    has_text = any(str(message.get(key) or '').strip() for key in said)
    if not has_text and not message.get('tool_calls'):
      raise Empty(EMPTY_ANSWER)


def _check_shown(
  messages: Sequence[Mapping[str, Any]],
  tools: Sequence[Mapping[str, Any]] | None,
  template: turns.Template,
) -> None:
  """Refuses the parts that the template would leave out without an error."""
  if tools and not template.style.has_tools:
    raise ValueError(
      'got tools, expected none: the chat template does not show them to the'
      ' model; set data.chat_template to one that does'
    )
  index = fitting.left_out(messages, template.style)
  if index is not None:
    raise ValueError(
      f'got message {index} of role {messages[index]["role"]}, which the chat'
      ' template leaves out, in part or whole; leave it out, or set'
      ' data.chat_template to one that writes it'
    )
