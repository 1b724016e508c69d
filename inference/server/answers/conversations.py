"""From a conversation in OpenAI's shape to a prompt; from updates to events.

    asked = conversations.ask(generator, messages, tools=tools)
    request = generator.request(asked.ids, asked.settings(chosen))
    reader = asked.reader()
    for update in updates: events += reader.read(update)

Messages are plain dicts as in the body of /v1/chat/completions, each with one
text or None as its content. Special tokens in them are text, see
`text.chat_inputs`. Templates differ, so that the messages are fitted to them
(`text/replies/fitting.py`).

If the template would leave out a message or the tools, the request is refused:
a client would not notice the loss.
"""

from collections.abc import Mapping, Sequence
import dataclasses
from typing import Any

from inference import chat_prompts, generate
from inference.constraints import (
  calls,
  constraint as constraint_lib,
  thinking,
)
from inference.requests import requests
from inference.sampling import settings as settings_lib
from inference.server.api import errors, format_schema
from text import chat, chat_inputs
from text.replies import detection, events, fitting, formats, markers, parser


@dataclasses.dataclass(frozen=True, kw_only=True)
class Asked:
  """A prompt, and the rules for its answers."""

  generator: generate.Generator
  ids: tuple[int, ...]
  style: parser.Style
  tools: formats.Tools  # the tools that may be called
  is_reasoning: bool  # the answer begins inside of reasoning
  is_single: bool  # only the first call counts
  messages: tuple[Mapping[str, Any], ...]

  def settings(self, chosen: dict[str, Any]) -> settings_lib.Settings:
    """Returns the settings of an answer, with the stops that end a turn.

    Raises:
      SettingError: a value is out of range.
    """
    return chat_prompts.settings_for(self.generator, self.ids, chosen)

  def language(
    self,
    language: format_schema.Language | None,
    use: format_schema.ToolUse,
  ) -> format_schema.Language | None:
    """Returns the language of a whole answer; None: any text.

    Args:
      language: language of an answer without calls; None: any text.
      use: how the answer may use the tools.

    Raises:
      ApiError: status 400, no grammar can describe the calls of the model.
    """
    if self.tools and (use.is_held or language):
      language = self._with_calls(language, use)
    if language is None:
      return None
    return language._replace(constraint=self._behind_thought(language))

  def _with_calls(
    self, language: format_schema.Language | None, use: format_schema.ToolUse
  ) -> format_schema.Language:
    """Returns the language of text, or of an answer, with calls in it."""
    param = 'tool_choice' if use.is_forced else 'tools'
    tools = use.tools or tuple(
      calls.Tool(name=name, parameters=None) for name in self.tools
    )
    (name,) = (
      name for name, each in formats.CALLS.items() if each is self.style.calls
    )
    if '<function=' in chat_prompts.template(self.generator):
      name = 'xml'  # calls that are not JSON
    with format_schema.refusals(param):
      return format_schema.Language(
        param,
        calls.calls(
          name,
          tools,
          is_forced=use.is_forced,
          is_single=use.is_single,
          answer=None if use.is_forced or not language else language.constraint,
        ),
      )

  def _behind_thought(
    self, language: format_schema.Language
  ) -> constraint_lib.Constraint:
    """Returns the constraint of text that may come after reasoning."""
    found = language.constraint
    if self.style.reasoning is None:
      return found
    opening, closing = self.style.reasoning
    thought = constraint_lib.Thought(
      opening=opening, closing=closing, is_open=self.is_reasoning
    )
    return dataclasses.replace(found, thought=thought)

  def cap(self, param: str, most_tokens: int | None) -> thinking.Cap | None:
    """Returns the cap on reasoning; None: none is needed.

    Args:
      param: the field of the request.
      most_tokens: of reasoning; None: any number.

    Raises:
      ApiError: status 400, the model marks no reasoning that could be limited.
    """
    if most_tokens is None:
      return None
    if self.style.reasoning is None:
      if not most_tokens:
        return None  # it reasons in no way that anybody can see
      raise errors.invalid(
        param,
        f'got {most_tokens} tokens, expected none: the chat template of this'
        ' model marks no reasoning; leave it out',
      )
    opening, closing = self.style.reasoning
    return thinking.Cap(
      most_tokens=most_tokens,
      opening=opening,
      closing=closing,
      is_open=self.is_reasoning,
    )

  def reader(self) -> 'Reader':
    """Returns the reader of one answer."""
    return Reader(self)

  @property
  def has_short_ids(self) -> bool:
    """Whether ids of calls must have 9 letters and digits."""
    return self.style.calls is not None and self.style.calls.has_short_ids


class Reader:
  """Reads the updates of one answer."""

  def __init__(self, asked: Asked):
    tokenizer = asked.generator.tokenizer
    found = asked.style.markers(tokenizer.special_tokens)
    self._pieces = markers.Pieces(tokenizer, found)
    self._parser = parser.Parser(
      asked.style,
      found,
      tools=asked.tools,
      is_reasoning=asked.is_reasoning,
      is_single=asked.is_single,
    )

  def read(self, update: requests.Update) -> list[events.Event]:
    """Returns the events of the next update, with `End` in the last one."""
    completion = update.completion
    pieces = self._pieces.cut(
      update.text,
      update.token_ids,
      completion.num_text_ids if completion else None,
    )
    found = [event for piece in pieces for event in self._parser.push(piece)]
    if completion:
      found += self._parser.finish(completion.finish_reason)
    return found


def ask(
  generator: generate.Generator,
  messages: Sequence[Mapping[str, Any]],
  *,
  tools: Sequence[Mapping[str, Any]] = (),
  is_single: bool = False,
  variables: Mapping[str, Any] | None = None,
  add_generation_prompt: bool = True,
  continue_final_message: bool = False,
  reply_format: str = detection.AUTO,
  param: str = 'messages',
) -> Asked:
  """Returns the prompt of a conversation.

  Args:
    generator: the generator that will answer.
    messages: messages of the conversation, oldest first.
    tools: in OpenAI's shape; empty: nothing in the answer is a call.
    is_single: whether only the first call of an answer counts.
    variables: variables of the template.
    add_generation_prompt: whether the prompt ends with the start of an answer.
    continue_final_message: whether the answer continues the last message.
    reply_format: format of the answers, see `text.replies.detection`.
    param: the field of the request that has the messages, for errors.

  Raises:
    ApiError: status 400, the template cannot show the conversation to the
      model, or the conversation does not fit into the context.
  """
  style = chat_prompts.style_of(generator, reply_format)
  _check_shown(messages, tools, style, param)
  conversation = chat.Conversation(
    messages=fitting.fitted(messages, style),
    # Templates test whether tools are there: an empty list is there.
    tools=list(tools) or None,
    variables=variables or {},
    add_generation_prompt=add_generation_prompt,
    continue_final_message=continue_final_message,
  )

  def without_prompt() -> str:
    shorter = dataclasses.replace(conversation, add_generation_prompt=False)
    return chat_prompts.render(generator, shorter).text

  try:
    for text in chat_inputs.strings([*messages, *tools]):
      generator.check_length(text)  # before a template works on it
    rendered = chat_prompts.render(generator, conversation)
    generator.check_length(rendered.text)
    ids = chat_prompts.encode(generator, rendered)
    is_reasoning = detection.is_opened(
      rendered.text,
      conversation,
      style.replies.reasoning,
      without_prompt=without_prompt,
    )
  except (ValueError, RecursionError) as error:
    raise errors.refused_prompt(error, param) from error
  return Asked(
    generator=generator,
    ids=ids,
    style=style.replies,
    tools={
      tool['function']['name']: tool['function'].get('parameters') or {}
      for tool in tools
    },
    is_reasoning=is_reasoning,
    is_single=is_single,
    messages=tuple(messages),
  )


def _check_shown(
  messages: Sequence[Mapping[str, Any]],
  tools: Sequence[Mapping[str, Any]],
  style: detection.TemplateStyle,
  param: str,
) -> None:
  """Refuses messages and tools that the template would leave out silently."""
  if tools and not style.has_tools:
    raise errors.ApiError(
      400,
      'tools: got tools, expected none: the chat template of this model does'
      ' not show them to it; leave them out',
      param='tools',
      code='unsupported_parameter',
    )
  if tools and style.replies.calls is None:
    raise errors.ApiError(
      400,
      'tools: got tools, expected none: this server does not know how the'
      ' model writes calls; start it with --server.reply_format',
      param='tools',
      code='unsupported_parameter',
    )
  index = fitting.left_out(messages, style)
  if index is not None:
    raise _left_out(f'{param}[{index}]', param)


def _left_out(where: str, param: str) -> errors.ApiError:
  return errors.ApiError(
    400,
    f'{where}: got a part of a conversation that the chat template of this'
    ' model leaves out, expected none; leave it out, or move its text to a'
    ' message of the user',
    param=param,
    code='unsupported_parameter',
  )
