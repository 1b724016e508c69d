"""The prompt of a conversation for a model, and the settings of its answer.

The terminal and the server ask a model in the same way. The template of a
Hugging Face tokenizer writes special tokens itself. Other templates write text,
which begins with BOS as every text prompt. A model without a template gets a
plain transcript, in which strings end an answer.
"""

from collections.abc import Sequence
from typing import Any

from inference import generate
from inference.sampling import settings as settings_lib
from text import chat
from text.replies import detection


def render(
  generator: generate.Generator, conversation: chat.Conversation
) -> chat.Prompt:
  """Returns the text of a conversation.

  Raises:
    ValueError: the template refuses the conversation.
  """
  return chat.prompt(
    template(generator),
    conversation,
    names=_names(generator),
    special_tokens=_special_tokens(generator),
  )


def encode(
  generator: generate.Generator, rendered: chat.Prompt
) -> tuple[int, ...]:
  """Returns the ids of a rendered conversation."""
  if _writes_specials(generator):
    tokenizer = generator.tokenizer
    ids, _ = tokenizer.encode_marked(rendered.text, rendered.specials)
    return tuple(ids)
  return generator.prompt_ids(rendered.text)


def settings_for(
  generator: generate.Generator, ids: Sequence[int], chosen: dict[str, Any]
) -> settings_lib.Settings:
  """Returns the settings of an answer.

  Stop strings of a plain transcript and stop ids that the model recommends end
  an answer, in addition to the stops that a request chooses.
  """
  wanted = chosen.get('stop') or generator.defaults.stop
  chosen = {**chosen, 'stop': (*stop_strings(generator), *wanted)}
  if chosen.get('stop_ids') and not chosen.get('ignore_eos'):
    both = *generator.defaults.stop_ids, *chosen['stop_ids']
    chosen['stop_ids'] = tuple(dict.fromkeys(both))
  return generator.settings_for(ids, **chosen)


def style_of(
  generator: generate.Generator, reply_format: str
) -> detection.TemplateStyle:
  """Returns the style of the model's answers."""
  return detection.style_of(
    template(generator),
    names=tuple(_names(generator).items()),
    special_tokens=frozenset(_special_tokens(generator)),
    reply_format=reply_format,
  )


def template(generator: generate.Generator) -> str:
  """Returns the chat template of the model, or a plain transcript."""
  return generator.frozen.chat_template or chat.DEFAULT_TEMPLATE


def _names(generator: generate.Generator):
  if _writes_specials(generator):
    return generator.tokenizer.names
  return {'bos_token': '', 'eos_token': ''}


def _special_tokens(generator: generate.Generator):
  is_written = _writes_specials(generator)
  return generator.tokenizer.special_tokens if is_written else ()


def stop_strings(generator: generate.Generator) -> tuple[str, ...]:
  """Returns the strings that end an answer in a plain transcript, else ()."""
  return () if generator.frozen.chat_template else chat.DEFAULT_STOP


def _writes_specials(generator: generate.Generator) -> bool:
  """Returns whether the template writes BOS and other special tokens itself."""
  is_foreign = generator.tokenizer.kind == 'huggingface'
  return bool(generator.frozen.chat_template) and is_foreign
