"""A conversation in the terminal.

The model remembers nothing between turns: each turn renders the whole history
through the chat template. What of it is as before, the engine's prefix cache
finds computed; only the rest is read.
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
    generator: who answers.
    chosen: settings that differ from the model's recommendation.
    read: shows a prompt and returns a line; EOFError leaves.
    write: shows text, without a line end of its own.
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
      # The turn is not kept, so a shorter message can still be sent.
      write(f'error: {error}\n')
      write('This turn was not kept. Say less, or /exit and start anew.\n')
    else:
      messages = [*asked, {'role': 'assistant', 'content': answer}]


def render(
  generator: generate.Generator, messages: list[dict[str, str]]
) -> tuple[generate.Prompt, tuple[str, ...]]:
  """Returns the prompt of a conversation, and what ends the answer to it.

  Of an open model, ids: its template writes its special tokens itself.
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
