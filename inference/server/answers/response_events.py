"""The events of a response, in OpenAI's types, and the response they add up to.

    writer = Writer(response)
    yield from writer.begin()
    yield from writer.text('Hello')      # or reasoning, call, arguments
    yield from writer.end('stop', usage)

A response is a list of items: reasoning, messages, calls of functions. One item
is open at a time; a piece of another item closes it. The answer without a
stream is `writer.response` at the end, so that it is the sum of the events.
"""

from collections.abc import Iterator, Sequence
import copy
import itertools
import time
from typing import Any

from inference.server.answers import response_items

Event = dict[str, Any]


class Writer:
  """Writes the events of one response."""

  def __init__(self, response: dict[str, Any]):
    """Takes the response in the state `in_progress`, without output."""
    self.response = response
    self._numbers = itertools.count()
    self._item: dict[str, Any] | None = None  # the open one

  def begin(self) -> Iterator[Event]:
    """Yields the first events."""
    for name in ('created', 'in_progress'):
      yield self._event(f'response.{name}', response=self.response)

  def text(
    self, delta: str, logprobs: Sequence[dict[str, Any]] = ()
  ) -> Iterator[Event]:
    """Yields the events of a piece of the answer's text."""
    yield from self._write('message', 'output_text', delta, logprobs)

  def reasoning(self, delta: str) -> Iterator[Event]:
    """Yields the events of a piece of reasoning."""
    yield from self._write('reasoning', 'reasoning_text', delta, ())

  def call(self, name: str, call_id: str) -> Iterator[Event]:
    """Yields the events of a call that begins, and of the item before it."""
    yield from self._close()
    yield from self._open(
      {
        'type': 'function_call',
        'id': response_items.new_id('function_call'),
        'call_id': call_id,
        'name': name,
        'arguments': '',
      }
    )

  def arguments(self, delta: str) -> Iterator[Event]:
    """Yields the event of a piece of the open call's arguments."""
    assert self._item
    assert self._item['type'] == 'function_call'
    if delta:
      self._item['arguments'] += delta
      yield self._of_item('response.function_call_arguments.delta', delta=delta)

  def end(self, reason: str, usage: dict[str, Any]) -> Iterator[Event]:
    """Yields the last events.

    Args:
      reason: the finish_reason of the completion.
      usage: usage of the response.
    """
    is_cut = reason == 'length'
    if not self._item and not self.response['output']:
      yield from self._begin('message', 'output_text')
    yield from self._close('incomplete' if is_cut else 'completed')
    self.response['usage'] = usage
    if is_cut:
      self.response['incomplete_details'] = {'reason': 'max_output_tokens'}
    else:
      self.response['completed_at'] = int(time.time())
    yield from self._finish('incomplete' if is_cut else 'completed')

  def fail(self, message: str) -> Iterator[Event]:
    """Yields the events of a generation that failed."""
    yield from self._close('incomplete')
    yield self._event('error', code='server_error', message=message, param=None)
    self.response['error'] = {'code': 'server_error', 'message': message}
    yield from self._finish('failed')

  def _finish(self, status: str) -> Iterator[Event]:
    self.response['status'] = status
    yield self._event(f'response.{status}', response=self.response)

  def _write(
    self, kind: str, part_kind: str, delta: str, logprobs
  ) -> Iterator[Event]:
    if not delta and not logprobs:
      return
    if not self._item or self._item['type'] != kind:
      yield from self._close()
      yield from self._begin(kind, part_kind)
    assert self._item
    part = self._item['content'][0]
    part['text'] += delta
    more = {}
    if part_kind == 'output_text':
      part['logprobs'].extend(logprobs)
      more['logprobs'] = list(logprobs)
    yield self._of_item(
      f'response.{part_kind}.delta', content_index=0, delta=delta, **more
    )

  def _begin(self, kind: str, part_kind: str) -> Iterator[Event]:
    """Opens an item that has one part, a text."""
    item = {'type': kind, 'id': response_items.new_id(kind), 'content': []}
    part: dict[str, Any] = {'type': part_kind, 'text': ''}
    if kind == 'message':
      item['role'] = 'assistant'
      part |= {'annotations': [], 'logprobs': []}
    else:
      item['summary'] = []
    yield from self._open(item)
    item['content'].append(part)
    yield self._of_item(
      'response.content_part.added', content_index=0, part=part
    )

  def _open(self, item: dict[str, Any]) -> Iterator[Event]:
    item['status'] = 'in_progress'
    self._item = item
    self.response['output'].append(item)
    yield self._event(
      'response.output_item.added', output_index=self._index, item=item
    )

  def _close(self, status: str = 'completed') -> Iterator[Event]:
    """Ends the open item, if there is one."""
    if not (item := self._item):
      return
    if item['type'] == 'function_call':
      yield self._of_item(
        'response.function_call_arguments.done',
        name=item['name'],
        arguments=item['arguments'],
      )
    else:
      (part,) = item['content']
      more = {name: part[name] for name in ('text', 'logprobs') if name in part}
      yield self._of_item(
        f'response.{part["type"]}.done', content_index=0, **more
      )
      yield self._of_item(
        'response.content_part.done', content_index=0, part=part
      )
    item['status'] = status
    yield self._event(
      'response.output_item.done', output_index=self._index, item=item
    )
    self._item = None

  @property
  def _index(self) -> int:
    return len(self.response['output']) - 1

  def _of_item(self, name: str, /, **fields: Any) -> Event:
    assert self._item
    return self._event(
      name, item_id=self._item['id'], output_index=self._index, **fields
    )

  def _event(self, name: str, /, **fields: Any) -> Event:
    # Copied: items grow, while an event that waits to be sent must not.
    return copy.deepcopy(
      {'type': name, 'sequence_number': next(self._numbers), **fields}
    )
