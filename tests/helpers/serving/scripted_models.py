"""A real model that says what a test wants: each token has one successor.

Attention and feed-forward add nothing, so the next token depends on the last
one alone. A script is a list of strings, each a token of its own. The prompt
ends with the token of a script, which the chat template writes, so the answer
to it is the script. Greedy decoding is exact.

The template chooses the script `answer` after the result of a tool, `call` if
there are tools, and else `plain`; chat_template_kwargs {'script': NAME} chooses
another one. With {'thinks': true} the prompt ends with <think>.
"""

from collections.abc import Mapping, Sequence
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers

from inference import generate
from inference.engine import engine_config
from tests.helpers import frozen_dirs
from tests.helpers.open_weights import hf_files
from text import hf_tokenizer

END = '<|im_end|>'
TEMPLATE = """\
{%- if tools %}<|im_start|>system
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}<|im_end|>
{% endif %}
{%- for message in messages %}<|im_start|>{{ message.role }}
{% if message.reasoning_content is defined %}<think>
{{ message.reasoning_content }}
</think>

{% endif %}{{ message.content or '' }}
{%- for call in message.tool_calls or [] %}
CALL
{%- endfor %}<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{{ '<think>' if thinks else '<|' ~ (script or (CHOSEN)) ~ '|>' }}
{%- endif %}"""
CHOSEN = """\
'answer' if messages[-1].role == 'tool' else 'call' if tools else 'plain'"""
HERMES = (
  '<tool_call>{"name": "{{ call.function.name }}", "arguments":'
  ' {{ call.function.arguments | tojson }}}</tool_call>'
)

_CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "K\u00f6ln"}}\n'
# What the model of `weather` says.
SCRIPTS = {
  'plain': ['Hel', 'lo \u65e5', '\u672c', '!'],
  'call': [
    '<think>',
    'I need ',
    'it.',
    '</think>',
    '\n\n',
    _CALL,
    '</tool_call>',
  ],
  'answer': ['It is', ' sunny.'],
  'two': [
    'Both:\n',
    '<tool_call>{"name": "weather",',
    ' "arguments": {}}</tool_call>',
    '\n<tool_call>',
    '{"name": "weather", "arguments": {"city": "Bonn"}}</tool_call>',
  ],
  'broken': [
    '<tool_call>{"name": "weather", "argu',
    'ments": }</tool_call>',
    ' ok',
  ],
  'unclosed': ['<tool_call>{"name": ', '"weather", "arguments": {"a":'],
}
TOOLS = [
  {
    'type': 'function',
    'function': {
      'name': 'weather',
      'description': 'The weather of a city.',
      'parameters': {
        'type': 'object',
        'properties': {'city': {'type': 'string'}},
      },
    },
  }
]
ENGINE = engine_config.EngineConfig(
  max_sequences=4,
  decode_shapes=(4,),
  chunk_tokens=32,
  max_chunks=1,
  max_mixed_chunks=1,
  page_size=16,
  decode_steps=1,
)


def weather(directory: pathlib.Path) -> generate.Generator:
  """Returns a generator that says `SCRIPTS`, whose engine has few programs."""
  return generate.load(write(directory, SCRIPTS), ENGINE)


def write(
  directory: pathlib.Path,
  scripts: Mapping[str, Sequence[str]],
  *,
  call: str = HERMES,
  special: Sequence[str] = (),
  chosen: str = CHOSEN,
  max_length: int = 512,
) -> pathlib.Path:
  """Writes a frozen directory whose model says the scripts; returns it.

  Args:
    directory: for the model and its tokenizer.
    scripts: by name; no string is in two of them, or twice in one.
    call: how the template writes a call, which names the format.
    special: strings that are special tokens.
    chosen: how the template chooses a script, an expression of Jinja.
    max_length: of the context.
  """
  words = [word for script in scripts.values() for word in script]
  assert len(set(words)) == len(words), words
  names = [f'<|{name}|>' for name in scripts]
  tokenizer = _tokenizer(directory, words, [*names, *special])
  ids = tokenizer.special_tokens | _ids(directory)
  pairs = []
  for name, script in zip(names, scripts.values(), strict=True):
    line = [name, *script, END]
    pairs += zip(line, line[1:], strict=False)
  config = frozen_dirs.config(
    num_layers=1, model_width=128, vocab_size=480, max_length=max_length
  )
  frozen_dirs.write(
    directory / 'model',
    config=config,
    params=_params(config, [(ids[a], ids[b]) for a, b in pairs]),
    tokenizer_dir=directory / 'words',
    chat_template=TEMPLATE.replace('CALL', call).replace('CHOSEN', chosen),
    generation={'temperature': 0.0, 'max_tokens': 64},
    provenance=frozen_dirs.provenance(has_bos=False),
  )
  return directory / 'model'


def _tokenizer(directory, words, special):
  source = hf_files.qwen(directory / 'source')
  model = tokenizers.Tokenizer.from_file(str(source / 'tokenizer.json'))
  model.add_special_tokens(hf_files.special(*special))
  known = [word for word in words if word not in special]
  model.add_tokens([tokenizers.AddedToken(w, normalized=False) for w in known])
  model.save(str(source / 'tokenizer.json'))
  hf_tokenizer.convert(source, directory / 'words')
  return hf_tokenizer.load(directory / 'words')


def _ids(directory) -> dict[str, int]:
  found = json.loads((directory / 'words/tokenizer.json').read_text())
  return {token['content']: token['id'] for token in found['added_tokens']}


def _params(config, pairs):
  params = jax.tree.map(np.array, frozen_dirs.params(config))
  inside = params['params']
  for part, kernel in (('attention', 'out'), ('mlp', 'down')):
    inside['layer_0'][part][kernel]['kernel'] *= 0
  inside['final_norm']['scale'] = np.ones_like(inside['final_norm']['scale'])
  rng = np.random.default_rng(0)
  embed = rng.normal(size=inside['embed']['embedding'].shape)
  head = np.zeros_like(embed)
  for before, after in pairs:
    head[after] += embed[before] / np.linalg.norm(embed[before])
  inside['embed']['embedding'] = embed.astype(np.float32)
  inside['head']['embedding'] = head.astype(np.float32)
  return jax.tree.map(jnp.asarray, params)
