"""Prompts of a policy in reinforcement learning, as token ids.

    {"prompt": "..." or [messages], ...}     TRL, OpenRLHF
    {"question": "...", ...}                 GSM8K
    {"messages": [...], ...}                 up to the last turn of the user

The other keys of a record describe the right answer, for rewards. A
prompt is encoded as a server encodes it, up to the opening of the assistant's
turn. Text without a chat template becomes the plain transcript of `text.chat`.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import hashlib
import json
from typing import Any

import numpy as np

from checks import expect
from data import data_config, row_order
from data.examples import shapes
from text import chat, tokenizer as tokenizer_lib
from text.replies import fitting, turns

_KEYS = ('messages', 'prompt', 'question')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prompt:
  """A prompt, and the other keys of its record."""

  ids: tuple[int, ...]
  messages: Sequence[Mapping[str, Any]]
  record: Mapping[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prompts:
  """The prompts of one source, in memory."""

  name: str
  prompts: tuple[Prompt, ...]
  digest: str  # digest of ids and records
  num_too_long: int  # number of prompts left out

  def __len__(self) -> int:
    return len(self.prompts)

  def shuffled(self, first: int, count: int, seed: int) -> list[Prompt]:
    """Returns prompts of an endless order, in which each epoch is shuffled."""
    indices_N = np.arange(first, first + count)
    places = row_order.shuffled(indices_N, len(self.prompts), seed)
    return [self.prompts[i] for i in places.tolist()]

  def describe(self) -> dict[str, Any]:
    """Returns name, sizes and digest, as JSON values."""
    return {
      'name': self.name,
      'prompts': len(self.prompts),
      'too_long': self.num_too_long,
      'digest': self.digest,
    }


def open_prompts(
  source: Any,
  tokenizer: tokenizer_lib.Tokenizer,
  template: str,
  *,
  name: str,
  most_tokens: int,
  too_long: str,
) -> Prompts:
  """Reads and encodes all prompts of a source.

  Args:
    source: records, see `data.sources`.
    template: Jinja source; '' for the plain transcript.
    most_tokens: most tokens of a prompt, so that its answer fits into a row.
    too_long: one of `data_config.TOO_LONG`, for a longer prompt. Prompts are
      never cut: the question would be another one.

  Raises:
    ValueError: a record is malformed, or no prompt is short enough.
  """
  written = turns.of(tokenizer, template)
  found, num_too_long = [], 0
  digest = hashlib.sha256(template.encode())
  for i in range(len(source)):
    document = source[i]
    place = f'{name}: {document["id"]}'
    prompt = encode(document['record'], tokenizer, written, place)
    if len(prompt.ids) > most_tokens:
      if too_long == data_config.ERROR:
        raise ValueError(
          f'{place}: got a prompt of {len(prompt.ids)} tokens, expected at most'
          f' {most_tokens}, beside the tokens of its answer; lengthen'
          ' data.row_length, or set data.too_long = drop'
        )
      num_too_long += 1
      continue
    found.append(prompt)
    said = json.dumps([prompt.ids, prompt.record], sort_keys=True, default=str)
    digest.update(said.encode())
  if not found:
    raise ValueError(
      f'{name}: got {num_too_long} prompts that are longer than {most_tokens}'
      ' tokens and no other, expected shorter ones; lengthen data.row_length'
    )
  return Prompts(
    name=name,
    prompts=tuple(found),
    digest=digest.hexdigest(),
    num_too_long=num_too_long,
  )


def encode(
  record: Any,
  tokenizer: tokenizer_lib.Tokenizer,
  template: turns.Template,
  place: str,
) -> Prompt:
  """Returns the prompt of a record.

  Raises:
    ValueError: the record has none, or the template refuses it.
  """
  messages = messages_of(record, place)
  try:
    fitted = fitting.fitted(messages, template.style)
    tools = record.get('tools')
    rendered = template.render(fitted, tools, add_generation_prompt=True)
  except ValueError as error:
    raise ValueError(f'{place}: {error}') from error
  ids = list(tokenizer.encode_marked(rendered.text, rendered.specials).ids)
  is_foreign = tokenizer.kind == 'huggingface'
  adds_bos = not is_foreign or getattr(tokenizer, 'adds_bos', False)
  if not template.specials and adds_bos:
    ids = [tokenizer.bos_id, *ids]
  return Prompt(ids=tuple(map(int, ids)), messages=messages, record=record)


def messages_of(record: Any, place: str) -> list[shapes.Message]:
  """Returns the conversation up to the requested answer.

  Raises:
    ValueError: the record has no prompt.
  """
  keys = [
    key for key in _KEYS if isinstance(record, Mapping) and record.get(key)
  ]
  if not keys:
    raise ValueError(
      f'{place}: got {expect.shown(record)}, expected an object with'
      f' {", ".join(_KEYS[:-1])} or {_KEYS[-1]}'
    )
  given = record[keys[0]]
  if keys[0] != 'messages' and isinstance(given, str):
    return [{'role': 'user', 'content': given}]
  messages = shapes.read_messages(given, f'{place}: {keys[0]}')
  while messages and messages[-1]['role'] == 'assistant':
    messages.pop()
  if not messages:
    raise ValueError(
      f'{place}: got {keys[0]} of the assistant alone, expected a message of'
      ' another role, which it answers'
    )
  return messages


def stop_strings(template: str) -> tuple[str, ...]:
  """Returns the strings that end an answer of the plain transcript."""
  return () if template else chat.DEFAULT_STOP
