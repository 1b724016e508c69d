"""Clients of others use the chat unchanged."""

import asyncio
import copy
import dataclasses
import json

import openai
import pytest

from inference import model_port, terminal_chat
from inference.sampling import settings as settings_lib
from tests.helpers.serving import scripted_models, servers

_USER = {'role': 'user', 'content': 'How is it?'}


@pytest.fixture(scope='module')
def served(talker):
  with servers.running(talker) as served:
    yield served


def _loop(messages, answer):
  """Adds an answer and the results of its calls, as a user of tools does."""
  messages.append(answer)
  for call in answer.tool_calls:
    assert json.loads(call.function.arguments) == {'city': 'K\u00f6ln'}
    messages.append(
      {'role': 'tool', 'tool_call_id': call.id, 'content': 'sunny'}
    )


def test_the_openai_client_and_a_loop_of_tools(client):
  messages = [_USER]
  asked = {'model': servers.MODEL, 'tools': scripted_models.TOOLS}
  answer = client.chat.completions.create(messages=messages, **asked)
  assert answer.choices[0].finish_reason == 'tool_calls'
  message = answer.choices[0].message
  assert message.reasoning_content == 'I need it.'
  _loop(messages, message)
  answer = client.chat.completions.create(messages=messages, **asked)
  assert answer.choices[0].message.content == 'It is sunny.'
  assert answer.usage.prompt_tokens_details.cached_tokens > 0


def test_the_stream_of_the_openai_client(client):
  asked = {
    'model': servers.MODEL,
    'messages': [_USER],
    'tools': scripted_models.TOOLS,
  }
  with client.chat.completions.stream(**asked) as stream:
    kinds = [event.type for event in stream]
    final = stream.get_final_completion()
  assert 'tool_calls.function.arguments.done' in kinds
  (call,) = final.choices[0].message.tool_calls
  assert call.function.name == 'weather'
  messages = [_USER]
  _loop(messages, final.choices[0].message)
  texts = [
    chunk.choices[0].delta.content or ''
    for chunk in client.chat.completions.create(
      model=servers.MODEL,
      messages=messages,
      tools=scripted_models.TOOLS,
      stream=True,
    )
  ]
  assert ''.join(texts) == 'It is sunny.'


@pytest.mark.slow
def test_the_asynchronous_client(served):
  asyncio.run(_asynchronous(f'{served.url}/v1'))


async def _asynchronous(url):
  async with openai.AsyncOpenAI(base_url=url, api_key='none') as client:
    asked = {'model': servers.MODEL, 'messages': [_USER]}
    answer = await client.chat.completions.create(**asked)
    assert answer.choices[0].message.content == 'Hello \u65e5\u672c!'
    stream = await client.chat.completions.create(**asked, stream=True)
    texts = [c.choices[0].delta.content or '' async for c in stream]
    assert ''.join(texts) == 'Hello \u65e5\u672c!'
    with pytest.raises(openai.BadRequestError) as caught:
      await client.chat.completions.create(**asked, verbosity='low')
    assert caught.value.param == 'verbosity'
    assert caught.value.code == 'unsupported_parameter'
    assert caught.value.request_id.startswith('req_')


def test_what_the_client_cannot_be_given_is_a_structured_error(client):
  asked = {'model': servers.MODEL, 'messages': [_USER]}
  with pytest.raises(openai.NotFoundError) as missing:
    client.chat.completions.create(**{**asked, 'model': 'other'})
  assert missing.value.code == 'model_not_found'
  with pytest.raises(openai.BadRequestError) as refused:
    client.chat.completions.create(**asked, verbosity='low')
  assert refused.value.param == 'verbosity'


_TASK = """\
task: chat
dataset_path: json
dataset_kwargs: {{data_files: {{test: {directory}/chat.jsonl}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{prompt}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["{until}"], max_gen_toks: 12}}
metric_list:
  - {{metric: exact_match}}
"""


@pytest.mark.slow
def test_lm_eval_scores_as_in_process(generator, tmp_path, monkeypatch):
  lm_eval = pytest.importorskip('lm_eval')
  import datasets
  from lm_eval.models import openai_completions

  from evals.harness import lm_eval_adapter

  monkeypatch.setattr(datasets.config, 'HF_DATASETS_CACHE', tmp_path / 'cache')
  datasets.disable_progress_bars()
  template = '{% for m in messages %}{{ m.content }}{% endfor %}? '
  generator = copy.copy(generator)
  generator.frozen = dataclasses.replace(
    generator.frozen, chat_template=template
  )
  ported = model_port.evaluated(generator)
  (said,) = generator.generate(
    [terminal_chat.render(generator, [{'role': 'user', 'content': 'a0'}])[0]],
    settings_lib.Settings(temperature=0.0, max_tokens=12),
  )
  rows = [{'prompt': f'a{i}', 'answer': said.text} for i in range(6)]
  (tmp_path / 'chat.jsonl').write_text(
    ''.join(json.dumps(row) + '\n' for row in rows)
  )
  task = tmp_path / 'chat.yaml'
  task.write_text(_TASK.format(directory=tmp_path, until='zz'))

  def evaluated(model):
    found = lm_eval.simple_evaluate(
      model=model,
      tasks=[str(task)],
      task_manager=lm_eval.tasks.TaskManager(include_defaults=False),
      bootstrap_iters=0,
      apply_chat_template=True,
    )
    texts = [sample['resps'] for sample in found['samples']['chat']]
    return found['results']['chat']['exact_match,none'], texts

  in_process = evaluated(lm_eval_adapter.LM(ported))
  with servers.running(generator) as served:
    remote = openai_completions.LocalChatCompletion(
      base_url=f'{served.url}/v1/chat/completions',
      model=servers.MODEL,
      tokenizer_backend=None,
      tokenized_requests=False,
    )
    over_http = evaluated(remote)
  assert over_http == in_process
  assert in_process[0] > 0
  assert len({text for ((text,),) in in_process[1]}) > 1
