"""A conversation in the terminal.

The model keeps no state between turns: each turn renders the whole history
through the chat template. The engine's prefix cache has the part that is as
before, so only the new part is computed.
"""

from collections.abc import Callable

from inference import generate
from text import chat as chat_lib

HELP = 'Type a message; /exit or Ctrl-D leaves.'


def run(
  generator: generate.Generator,
  chosen: dict,
  *,
  read: Callable[[str], str],
  write: Callable[[str], None],
) -> None:
  """Talks until the user leaves.

  Args:
    generator: answers the messages.
    chosen: settings that differ from the model's recommendation.
    read: shows a prompt and returns a line; raises EOFError to leave.
    write: shows text, without adding a line end.
  """
  write(HELP + '\n')
  messages: list[dict[str, str]] = []
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
    asked = [*messages, {'role': 'user', 'content': text}]
    try:
      answer = _answer(generator, asked, chosen, write)
    except ValueError as error:
      # The turn is dropped, so that a shorter message can still be sent.
      write(f'error: {error}\n')
      write('The message was dropped. Shorten it, or /exit and start again.\n')
    else:
      messages = [*asked, {'role': 'assistant', 'content': answer}]


def render(
  generator: generate.Generator, messages: list[dict[str, str]]
) -> tuple[generate.Prompt, tuple[str, ...]]:
  """Returns the prompt of a conversation, and the strings that end its answer.

  The prompt is ids for a Hugging Face tokenizer, since the template of such a
  model writes special tokens itself. Else the prompt is text.
  """
  template, stop = generator.frozen.chat_template, ()
  if not template:
    template, stop = chat_lib.DEFAULT_TEMPLATE, chat_lib.DEFAULT_STOP
  elif generator.tokenizer.kind == 'huggingface':
    conversation = chat_lib.Conversation(
      messages=messages, add_generation_prompt=True
    )
    found = chat_lib.encode(generator.tokenizer, template, conversation)
    return found.ids, stop
  prompt = chat_lib.render(
    template,
    messages,
    add_generation_prompt=True,
    bos_token='',  # the generator puts BOS in front of every text prompt
    eos_token='',
  )
  return prompt, stop


def _answer(generator, messages, chosen, write) -> str:
  prompt, stop = render(generator, messages)
  settings = generator.settings_for(
    prompt, **{**chosen, 'stop': (*stop, *(chosen.get('stop') or ()))}
  )
  pieces = generator.stream(prompt, settings)
  write('Model: ')
  text = ''.join(_shown(pieces, write))
  write('\n')
  return text.strip()


def _shown(pieces, write):
  for piece in pieces:
    if isinstance(piece, str):
      write(piece)
      yield piece
