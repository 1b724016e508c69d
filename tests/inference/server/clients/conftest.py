"""Other people's clients, unmodified, at a real server of a tiny model.

They are not needed to develop here: requirements-clients.txt installs them, and
a test is skipped where its client is missing. No client may reach the network:
the environment says so to those that would.
"""

import os

import pytest

from inference import generate
from inference.engine import engine_config
from tests.helpers import frozen_dirs
from tests.helpers.serving import scripted_models, servers

# A byte is a token: the prompts of these clients have hundreds.
CONTEXT = 2048
_ENGINE = engine_config.EngineConfig(
  max_sequences=8,
  decode_shapes=(8,),
  chunk_tokens=128,
  max_chunks=1,
  max_mixed_chunks=1,
  # The results of a client are compared with those in process, bit for bit.
  numerics='invariant',
)


@pytest.fixture(scope='session')
def wide_dir(tmp_path_factory):
  directory = tmp_path_factory.mktemp('wide') / 'tiny'
  config = frozen_dirs.config(num_layers=1, max_length=CONTEXT)
  # lm_eval asks a server for ids without BOS, whatever the model was trained
  # with: the scores are those of a model that was trained without.
  frozen_dirs.write(
    directory,
    config=config,
    provenance=frozen_dirs.provenance(has_bos=False),
    chat_template=_TEMPLATE,
  )
  return directory


@pytest.fixture(scope='session')
def in_process(wide_dir):
  """The same model without a server."""
  return generate.load(wide_dir, _ENGINE)


@pytest.fixture(scope='module')
def wide(wide_dir):
  """A server of a model with room for the prompts of these clients."""
  with servers.running(generate.load(wide_dir, _ENGINE)) as served:
    yield served


_TEMPLATE = """\
{% for message in messages %}{{ message.role }}: {{ message.content }}
{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"""
# A call of each tool that a client has, and what to say otherwise.
_CALLS = {
  'magic_function': '{"input": 3}',
  'magic_function_no_args': '{}',
  'greeting_generator': '{"answer_style": "pirate"}',
  'get_weather': '{"location": "San Francisco, CA"}',
}
_SCRIPTS = {
  'plain': ['Hello', ' there', '!'],
  'answer': ['It is', ' 5.'],
  **{
    name: [
      f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}',
      f'{" " * len(name)}</tool_call>',  # no string is in two scripts
    ]
    for name, arguments in _CALLS.items()
  },
}
_SCRIPT = (
  "'answer' if messages[-1].role == 'tool' else tools[0].function.name if tools"
  f" and tools[0].function.name in {list(_CALLS)} else 'plain'"
)


@pytest.fixture(scope='module')
def scripted(tmp_path_factory):
  """A server of a model that says what the scripts say."""
  directory = scripted_models.write(
    tmp_path_factory.mktemp('scripted'),
    _SCRIPTS,
    chosen=_SCRIPT,
    max_length=CONTEXT,
  )
  with servers.running(generate.load(directory, _ENGINE)) as served:
    yield served


@pytest.fixture(autouse=True)
def _no_network(monkeypatch):
  for name in (
    'HF_HUB_OFFLINE',
    'HF_DATASETS_OFFLINE',
    'LITELLM_LOCAL_MODEL_COST_MAP',
  ):
    monkeypatch.setenv(name, '1' if name[0] == 'H' else 'True')
  monkeypatch.setenv('OPENAI_API_KEY', 'none')
  assert os.environ['OPENAI_API_KEY']
