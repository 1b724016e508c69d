"""Tokenizers and chat templates of families of models, and what serves them."""

import functools
import json
import pathlib
import tempfile
import types

import numpy as np

from data.examples import audit, encoding
from inference import generate
from inference.server.answers import conversations
from tests.helpers.open_weights import hf_files
from text import bpe, hf_tokenizer, tokenizer

_TEMPLATES = pathlib.Path(__file__).parents[2] / 'text/chat_templates'
_ROOTS: list[tempfile.TemporaryDirectory] = []

# In the style of SmolLM2: ChatML without marks, with a system message of its
# own. Its BOS opens each turn, and its EOS is its padding, too.
CHATML = """\
{% for m in messages %}{% if loop.first and m.role != 'system' %}\
<|im_start|>system
You help.<|im_end|>
{% endif %}<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def _smollm2(directory, **files) -> pathlib.Path:
  directory = hf_files.qwen(directory, **files)
  path = directory / 'tokenizer_config.json'
  config = json.loads(path.read_text())
  config |= {'bos_token': '<|im_start|>', 'pad_token': '<|im_end|>'}
  path.write_text(json.dumps(config))
  return directory


# Name: the files of a tokenizer, and a template beside those of tests/text.
_FAMILIES = {
  'smollm2': (_smollm2, CHATML),
  'qwen': (hf_files.qwen, 'chatml'),
  'llama3': (hf_files.llama3, 'headers'),
  'gemma': (hf_files.gemma, 'turns'),
  'mistral': (hf_files.mistral, 'instruct'),
  'llama2': (hf_files.llama2, 'instruct'),
  'phi3': (hf_files.phi3, 'roles'),
}
NAMES = tuple(_FAMILIES)
OURS = ('byte', 'bpe')
ALL = (*NAMES, *OURS)

SYSTEM = {'role': 'system', 'content': 'the hat'}
USER = {'role': 'user', 'content': 'What is 2+2?'}
ANSWER = {'role': 'assistant', 'content': 'the cat: 4'}
CALL = {
  'role': 'assistant',
  'content': None,
  'reasoning_content': 'hm',
  'tool_calls': [
    {
      'id': 'abcdefghi',
      'type': 'function',
      'function': {'name': 'add', 'arguments': '{"a": 2}'},
    }
  ],
}
RESULT = {'role': 'tool', 'tool_call_id': 'abcdefghi', 'content': '4'}
TOOLS = [{'type': 'function', 'function': {'name': 'add', 'parameters': {}}}]


@functools.cache
def directory(name: str) -> pathlib.Path:
  """Returns the Hugging Face files of a family."""
  _ROOTS.append(tempfile.TemporaryDirectory())
  return _FAMILIES[name][0](_ROOTS[-1].name, template=template_of(name))


@functools.cache
def load(name: str) -> tokenizer.Tokenizer:
  """Returns the tokenizer of a family, or one of our own."""
  if name == 'byte':
    return tokenizer.ByteTokenizer()
  if name == 'bpe':
    return bpe.train(hf_files.CORPUS, 300)
  return hf_tokenizer.convert(directory(name), directory(name) / 'saved')


@functools.cache
def template_of(name: str) -> str:
  """Returns the template of a family; '' for tokenizers of our own."""
  if name in OURS:
    return ''
  given = _FAMILIES[name][1]
  path = _TEMPLATES / f'{given}.jinja'
  return given if '\n' in given else path.read_text('utf-8')


def served_ids(
  tok: tokenizer.Tokenizer, source: str, messages, tools=None, *, has_bos=True
) -> list[int]:
  """Returns the ids that a server computes before it answers `messages`."""
  generator = types.SimpleNamespace(
    tokenizer=tok,
    frozen=types.SimpleNamespace(
      chat_template=source, manifest=types.SimpleNamespace(has_bos=has_bos)
    ),
    check_length=lambda text: None,
  )
  generator.prompt_ids = functools.partial(
    generate.Generator.prompt_ids, generator
  )
  return list(conversations.ask(generator, messages, tools=tools or ()).ids)


def encoder_of(name, kind='chat', template=None) -> encoding.Encoder:
  """Returns the encoder of a family, or of another template with its tokens."""
  source = template_of(name) if template is None else template
  return encoding.Encoder(load(name), source, kind)


def document_of(name, *messages, template=None, **record) -> encoding.Document:
  """Returns the document of a conversation, which the audit has checked."""
  encoder = encoder_of(name, template=template)
  unit = encoder.unit({'messages': list(messages), **record}, 'a:1')
  assert unit.streams == {}
  (document,) = unit.documents
  audit.check(document, encoder.tokenizer)
  return document


def shown_of(name, *messages, **fields) -> str:
  """Returns the text of a conversation, what is trained in brackets."""
  return audit.render(document_of(name, *messages, **fields), load(name))


def starts_of(document: encoding.Document) -> list[int]:
  """Returns the first id of each trained span."""
  before = np.concatenate([[False], document.trained[:-1]])
  return np.nonzero(document.trained & ~before)[0].tolist()
