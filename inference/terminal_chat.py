"""A conversation in the terminal.

The model keeps no state between turns. The prompt of a turn begins with the
prompt ids and the generated ids of the turn before. So white space that a
template would remove stays, and the engine's prefix cache has all but the new
message.
"""

from collections.abc import Callable, Iterator, Sequence
import dataclasses

from inference import chat_prompts, generate
from inference.requests import requests
from text import chat as chat_lib, chat_inputs, detokenize

HELP = 'Type a message; /exit or Ctrl-D leaves.'

Message = dict[str, str]


def run(
  generator: generate.Generator,
  chosen: dict,
  *,
  read: Callable[[str], str],
  write: Callable[[str], None],
  system: str | None = None,
) -> None:
  """Talks until the user leaves.

  Args:
    generator: answers the messages.
    chosen: settings that differ from the model's recommendation.
    read: shows a prompt and returns a line; raises EOFError to leave.
    write: shows text, without adding a line end.
    system: the system prompt; None for none.

  Raises:
    ValueError: the chat template refuses a system prompt.
  """
  talk = Talk(generator, system)
  talk.ask('Hello')  # a template that refuses the system prompt does so now
  write(HELP + '\n')
  while True:
    try:
      text = read('\nYou: ').strip()
    except EOFError:
      write('\n')
      return
    if text == '/exit':
      return
    if not text:
      continue
    asked = talk.ask(text)
    try:
      answer = _answer(generator, asked, chosen, write)
    except ValueError as error:
      # The turn is dropped, so that a shorter message can still be sent.
      write(f'error: {error}\n')
      write('The message was dropped. Shorten it, or /exit and start again.\n')
    else:
      talk.keep(asked, answer)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Asked:
  """A message of the user and its prompt."""

  messages: tuple[Message, ...]  # the last is the new one
  ids: tuple[int, ...]  # the prompt
  # The rendered conversation, with `mark` in place of each answer.
  text: str
  mark: str


class Talk:
  """The turns of a conversation so far."""

  def __init__(self, generator: generate.Generator, system: str | None = None):
    self._generator = generator
    self._messages: tuple[Message, ...] = ()
    if system is not None:
      self._messages = ({'role': 'system', 'content': system},)
    self._last: Asked | None = None
    self._answer: requests.Completion | None = None

  def ask(self, text: str) -> Asked:
    """Returns the prompt of the next message; `keep` adds it to the talk.

    Raises:
      ValueError: the template refuses the conversation.
    """
    messages = (*self._messages, {'role': 'user', 'content': text})
    (mark,) = chat_inputs.unused_characters(
      [message['content'] for message in messages], 1
    )
    marked = [
      {**each, 'content': mark} if each['role'] == 'assistant' else each
      for each in messages
    ]
    rendered = _rendered(self._generator, marked)
    ids = self._continued(rendered, mark)
    if ids is None:
      ids, _ = render(self._generator, messages)
    return Asked(messages=messages, ids=ids, text=rendered.text, mark=mark)

  def keep(self, asked: Asked, answer: requests.Completion) -> None:
    """Adds a message and its answer to the conversation."""
    said = {'role': 'assistant', 'content': answer.text}
    self._messages = (*asked.messages, said)
    self._last, self._answer = asked, answer

  def _continued(
    self, rendered: chat_lib.Prompt, mark: str
  ) -> tuple[int, ...] | None:
    """Returns the ids so far, and the ids of the text behind the last answer.

    None without an answer, or if the template now writes the earlier turns
    differently, like a template that moves the system prompt to the last
    message.
    """
    last, answer = self._last, self._answer
    if last is None or answer is None:
      return None
    before, found, _ = rendered.text.rpartition(mark)
    then = last.text.replace(last.mark, mark)
    # White space before an answer may be in the answer instead.
    if not found or not then.startswith(before.rstrip()):
      return None
    tokenizer = self._generator.tokenizer
    said = answer.token_ids[: answer.num_text_ids]
    decoder = detokenize.StreamDecoder(tokenizer, is_continued=True)
    spelled = ''.join(map(decoder.push, said)) + decoder.finish()
    # A stop string may begin inside a token: then the ids lack some text.
    rest = answer.text[len(spelled) :]
    start = len(before) + len(mark)
    start += _overlap(answer.text, rendered.text[start:])
    specials = [
      (first - start + len(rest), end - start + len(rest))
      for first, end in rendered.specials
      if first >= start
    ]
    ids, _ = tokenizer.encode_marked(rest + rendered.text[start:], specials)
    return (*last.ids, *said, *ids)


def render(
  generator: generate.Generator, messages: Sequence[Message]
) -> tuple[tuple[int, ...], tuple[str, ...]]:
  """Returns the ids of a conversation, and the strings that end its answer."""
  rendered = _rendered(generator, messages)
  return (
    chat_prompts.encode(generator, rendered),
    chat_prompts.stop_strings(generator),
  )


def _rendered(generator, messages: Sequence[Message]) -> chat_lib.Prompt:
  """Returns the text of a conversation, up to the start of an answer."""
  return chat_prompts.render(
    generator,
    chat_lib.Conversation(messages=messages, add_generation_prompt=True),
  )


def _overlap(answer: str, behind: str) -> int:
  """Returns the white space at the end of `answer` that begins `behind`."""
  num_spaces = len(behind) - len(behind.lstrip())
  return next(
    n for n in range(num_spaces, -1, -1) if answer.endswith(behind[:n])
  )


def _answer(generator, asked: Asked, chosen, write) -> requests.Completion:
  settings = chat_prompts.settings_for(generator, asked.ids, chosen)
  pieces = generator.stream(asked.ids, settings)
  write('Model: ')
  completion = _last_shown(pieces, write)
  write('\n')
  return completion


def _last_shown(pieces: Iterator, write) -> requests.Completion:
  """Shows the pieces of a text; returns the completion behind them."""
  for piece in pieces:
    if not isinstance(piece, str):
      return piece
    write(piece)
  raise AssertionError('a stream ends with its completion')
