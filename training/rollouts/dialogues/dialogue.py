"""Conversations with tools as one stream of ids, to which turns only add ids.

    prompt | sampled, with its stop token | results of tools, and the opening of
    the next turn | sampled ... | ...

The sampled ids are kept and never tokenised again: their text has other ids as
well, and a policy is trained on the ids that it drew. The ids between two of
its turns are the ids that the chat template writes after the stop token. For
this, a template must write a conversation as the beginning of a longer one.
`Dialogue` refuses a template that does not, and gives the reason.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import functools
import os
from typing import Any

from text import chat, tokenizer as tokenizer_lib
from text.replies import detection, events, fitting, markers, parser, turns

Message = Mapping[str, Any]
_PROBES = ('7', '12')


@dataclasses.dataclass(frozen=True)
class Dialogue:
  """Encodes the turns of conversations with tools, and parses replies."""

  tokenizer: tokenizer_lib.Tokenizer
  template: turns.Template
  tools: Sequence[Mapping[str, Any]]  # JSON schemas, as OpenAI's

  @classmethod
  def of(
    cls,
    tokenizer: tokenizer_lib.Tokenizer,
    source: str,
    tools: Sequence[Mapping[str, Any]],
  ) -> 'Dialogue':
    """Returns the dialogue of a model with this chat template.

    Raises:
      ValueError: with this template, conversations with tools are no stream of
        ids.
    """
    found = cls(tokenizer, turns.of(tokenizer, source), tuple(tools))
    if reason := found.refusal():
      raise ValueError(
        f'chat template: got one that {reason}, expected one that writes calls'
        ' of tools and their results at the end of the conversation; take a'
        ' template that does, or train without an environment'
      )
    return found

  def refusal(self) -> str:
    """Returns why the template cannot be used; '' if it can."""
    style = self.template.style
    if not self.template.ending.stop:
      return 'writes no special token behind an answer'
    if not style.has_tools:
      return 'does not show the model its tools'
    if not style.replies.calls or detection.CALLS in style.left_out:
      return 'has no known format of calls'
    if 'tool' in style.left_out:
      return 'leaves out the results of tools'
    # Two rounds: some templates change earlier turns when others follow.
    messages: list[Message] = [{'role': 'user', 'content': 'probed question'}]
    name = self.tools[0]['function']['name']
    try:
      for number, result in enumerate(_PROBES):
        before = self._render(messages).text
        call = events.Call(name, '{}')
        said = message_of(events.Reply(calls=[call]), number)
        given = [result_of(said['tool_calls'][0], result)]
        after = self.between(messages, said, given)
        messages = [*messages, said, *given]
        # Compared by text: the first token of a reply may be joined with the
        # end of the prompt where the template writes both, but a sampled token
        # never is.
        if not self._render(messages).text.startswith(before):
          return 'changes the beginning of a conversation when turns follow'
        whole, end = self.prompt_ids(messages), len(after)
        if whole[-end:] != after or whole[-end - 1] not in self.stop_ids:
          return 'writes other tokens behind a reply than in the whole'
    except ValueError as error:
      return f'refuses a call with its result ({error})'
    return ''

  @functools.cached_property
  def stop_ids(self) -> tuple[int, ...]:
    """Returns the ids that end a turn of the assistant."""
    names = self.template.eos | {self.template.ending.stop}
    known = self.tokenizer.special_tokens
    return tuple(sorted(known[name] for name in names if name in known))

  def prompt_ids(self, messages: Sequence[Message]) -> tuple[int, ...]:
    """Returns the ids of a conversation and of the opening of the next turn.

    Raises:
      ValueError: the template refuses the conversation.
    """
    found = self._render(messages)
    return tuple(self.tokenizer.encode_marked(found.text, found.specials).ids)

  def between(
    self,
    messages: Sequence[Message],
    said: Message,
    given: Sequence[Message],
  ) -> tuple[int, ...]:
    """Returns the ids after the stop token of a reply, up to the next reply.

    Args:
      messages: the messages before the reply.
      said: the reply as a message. Its text is written in the template's way,
        and then left out.
      given: messages after the reply, at least one.

    Raises:
      ValueError: the template refuses the conversation, or no stop token ends
        the reply.
    """
    whole = self._render([*messages, said, *given])
    content = given[0]['content']
    other = {**given[0], 'content': 'y' if content[:1] == 'x' else 'x'}
    changed = self._render([*messages, said, other, *given[1:]])
    # The stop token of the reply is the last one before the first difference.
    same = len(os.path.commonprefix([whole.text, changed.text]))
    names = self.template.eos | {self.template.ending.stop}
    stops = [
      span
      for span in whole.specials
      if span[1] <= same and whole.text[slice(*span)] in names
    ]
    if not stops:
      raise ValueError('no stop token stands between a call and its result')
    first = stops[-1][0]
    # Encoded with the stop token, because some stop tokens take the white space
    # after them.
    ids = self.tokenizer.encode_marked(
      whole.text[first:],
      [(a - first, b - first) for a, b in whole.specials if a >= first],
    ).ids
    return tuple(ids[1:])

  def reply(self, ids: Sequence[int], *, is_whole: bool) -> events.Reply:
    """Returns one turn of the model, parsed: text, reasoning and calls.

    Args:
      ids: the sampled ids.
      is_whole: whether the turn ended with a stop token, the last id.
    """
    text_ids = list(ids[:-1] if is_whole else ids)
    style = self.template.style.replies
    found = style.markers(self.tokenizer.special_tokens)
    tools = {each['function']['name']: each['function'] for each in self.tools}
    opened = style.reasoning and self._opening.rstrip().endswith(
      style.reasoning[0]
    )
    machine = parser.Parser(
      style, found, tools=tools, is_reasoning=bool(opened)
    )
    pieces = markers.Pieces(self.tokenizer, found).cut(
      self.tokenizer.decode(text_ids), text_ids, len(text_ids)
    )
    result = events.Reply()
    for piece in pieces:
      for event in machine.push(piece):
        result.add(event)
    for event in machine.finish('stop' if is_whole else 'length'):
      result.add(event)
    return result

  @functools.cached_property
  def _opening(self) -> str:
    return self._render([{'role': 'user', 'content': 'x'}]).text

  def _render(self, messages: Sequence[Message]) -> chat.Prompt:
    fitted = fitting.fitted(messages, self.template.style)
    return self.template.render(
      fitted, self.tools or None, add_generation_prompt=True
    )


def message_of(reply: events.Reply, number: int) -> dict[str, Any]:
  """Returns a reply as a message of the assistant.

  Args:
    number: number of the turn; calls of all turns have different ids.
  """
  message: dict[str, Any] = {'role': 'assistant', 'content': reply.text}
  if reply.reasoning:
    message['reasoning_content'] = reply.reasoning
  if reply.calls:
    message['tool_calls'] = [
      {
        # Nine characters: templates in the style of Mistral refuse others.
        'id': f'c{number:04d}{i:04d}',
        'type': 'function',
        'function': {'name': call.name, 'arguments': call.arguments},
      }
      for i, call in enumerate(reply.calls)
    ]
  return message


def result_of(call: Mapping[str, Any], content: str) -> dict[str, Any]:
  """Returns the message with the result of a call."""
  return {
    'role': 'tool',
    'tool_call_id': call['id'],
    'name': call['function']['name'],
    'content': content,
  }
