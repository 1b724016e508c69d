"""Episodes with tools: the stream of ids is the template's alone."""

import json
from typing import NamedTuple

import numpy as np
import pytest

from data.examples import prompts as prompts_lib
from evals import sampling
from tests.helpers.open_weights import chat_families
from text.replies import events, fitting
from training.rollouts import rollout_config, rows
from training.rollouts.dialogues import dialogue, environments, tools
from training.rollouts.draws import drawing

_USE = environments.ToolUse(tools=(tools.Calculator(),))
_WORKING = ('qwen', 'llama3')
# A part of the template of `qwen`, and the same without results of tools.
_SHOWN = "message.content + '\\n</tool_response>'"
_HIDDEN = "'</tool_response>'"


def _dialogue(name, template=None):
  source = chat_families.template_of(name) if template is None else template
  return dialogue.Dialogue.of(chat_families.load(name), source, _USE.schemas)


class _Sample(NamedTuple):
  ids: tuple[int, ...]
  logprobs: np.ndarray
  versions: np.ndarray


class _Policy:
  """Says what it is told to, as ids, and records what it was asked."""

  def __init__(self, turns, version=3):
    self.turns, self.version, self.asked = turns, version, []

  def __call__(self, asked):
    self.asked.append(asked)
    found = []
    for turn in asked:
      ids = self.turns[turn.episode][turn.number][: turn.max_tokens]
      found.append(
        _Sample(
          tuple(ids), np.full(len(ids), -0.5, np.float32),
          np.full(len(ids), self.version, np.int32),
        )
      )  # fmt: skip
    return found


def _said(talk, messages, message):
  """Returns the ids of a reply as the template writes it, with its stop."""
  fitted = fitting.fitted([*messages, message], talk.template.style)
  text = talk.template.render(fitted, talk.tools)
  before = talk._render(messages).text
  assert text.text.startswith(before)
  start = len(before)
  ids = talk.tokenizer.encode_marked(
    text.text[start:],
    [(a - start, b - start) for a, b in text.specials if a >= start],
  ).ids
  end = max(i for i, each in enumerate(ids) if each in talk.stop_ids)
  return ids[: end + 1]


def _call(expression, number=0):
  arguments = json.dumps({'expression': expression})
  call = events.Call('calculator', arguments)
  return dialogue.message_of(events.Reply(calls=[call]), number)


@pytest.mark.parametrize('name', _WORKING)
def test_the_stream_is_what_the_template_writes(name):
  talk = _dialogue(name)
  question = {'role': 'user', 'content': '6 * 7 + 1?'}
  first, second = _call('6 * 7'), _call('42+1', 1)
  results = [
    dialogue.result_of(m['tool_calls'][0], r)
    for m, r in ((first, '42'), (second, '43'))
  ]
  last = {'role': 'assistant', 'content': 'It is 43.'}
  so_far = [question], [question, first, results[0]]
  so_far = (*so_far, [*so_far[1], second, results[1]])
  turns = [
    _said(talk, messages, message)
    for messages, message in zip(so_far, (first, second, last), strict=True)
  ]
  policy = _Policy([turns])
  (episode,) = environments.play(
    _USE, talk, [{'question': question['content']}], policy, max_tokens=500
  )
  assert (episode.text, episode.is_truncated) == ('It is 43.', False)
  # The stream is the template's rendering of the whole conversation, up to the
  # last stop token; each prompt of a turn is the one before and more.
  fitted = fitting.fitted([*so_far[2], last], talk.template.style)
  whole = talk.template.render(fitted, talk.tools)
  stream = [*episode.prompt_ids, *episode.ids]
  special = {i: s for s, i in talk.tokenizer.special_tokens.items()}

  def spelled(ids):
    return ''.join(special.get(i) or talk.tokenizer.decode([i]) for i in ids)

  assert whole.text.startswith(spelled(stream))
  prompts = [asked[0].prompt_ids for asked in policy.asked]
  for messages, prompt in zip(so_far, prompts, strict=True):
    assert spelled(prompt) == talk._render(messages).text
    assert tuple(stream[: len(prompt)]) == prompt
  # Only sampled ids are trained, exactly as they were sampled.
  sampled = np.asarray(episode.ids)[episode.is_sampled].tolist()
  assert sampled == [i for turn in turns for i in turn]
  assert (episode.logprobs != 0).tolist() == episode.is_sampled.tolist()
  assert set(episode.versions.tolist()) == {3}


def test_sampled_ids_that_the_tokenizer_would_not_choose_are_kept():
  talk = _dialogue('qwen')
  text = (
    '<tool_call>\n{"name": "calculator", "arguments": {"expression": "1+1"}}'
    '\n</tool_call>'
  )
  stop = talk.stop_ids[0]
  body = [i for char in text for i in talk.tokenizer.encode(char)]
  assert body != talk.tokenizer.encode(text)
  odd = [*body, stop]
  final = [*talk.tokenizer.encode('2'), stop]
  policy = _Policy([[odd, final]])
  (episode,) = environments.play(
    _USE, talk, [{'prompt': '1+1?'}], policy, max_tokens=500
  )
  assert list(episode.ids[: len(odd)]) == odd
  assert episode.text == '2'
  given = np.asarray(episode.ids)[~episode.is_sampled]
  assert '\n2\n' in talk.tokenizer.decode(given.tolist())


def test_episodes_end_at_limits_and_alone():
  talk = _dialogue('qwen')
  question = [{'role': 'user', 'content': 'q'}]
  call = _said(talk, question, _call('1+1'))
  answer = [*talk.tokenizer.encode('two'), talk.stop_ids[0]]
  use = environments.ToolUse(tools=_USE.tools, max_turns=2)
  policy = _Policy([[answer], [call, call], [call[:4]], [call, answer]])
  found = environments.play(
    use, talk, [{'question': 'q'}] * 4, policy, max_tokens=len(call) + 2
  )
  assert [each.is_truncated for each in found] == [False, True, True, True]
  assert [len(asked) for asked in policy.asked] == [4, 2]
  assert found[1].num_sampled == found[3].num_sampled == len(call) + 2
  assert found[0].ids == tuple(answer)
  few = environments.ToolUse(tools=_USE.tools, max_given_tokens=3)
  (episode,) = environments.play(
    few, talk, [{'question': 'q'}], _Policy([[call]]), max_tokens=500
  )
  assert episode.is_truncated
  assert all(episode.is_sampled)


@pytest.mark.parametrize(
  ('name', 'template', 'said'),
  [
    ('smollm2', None, 'does not show the model its tools'),
    ('gemma', None, 'does not show the model its tools'),
    ('mistral', None, 'does not show the model its tools'),
    ('phi3', None, 'does not show the model its tools'),
    ('byte', None, 'writes no special token behind an answer'),
    ('qwen', 'no results', 'leaves out the results of tools'),
    # As Qwen3's does with the reasoning of earlier turns.
    ('qwen', 'rewrites', 'changes the beginning of a conversation'),
  ],
)
def test_templates_that_break_the_stream_are_refused(name, template, said):
  if template:
    source = chat_families.template_of(name)
    template = {
      'no results': source.replace(_SHOWN, _HIDDEN),
      'rewrites': '{{ messages | length }}' + source,
    }[template]  # fmt: skip
    assert template != source
  with pytest.raises(ValueError, match=f'chat template: got one that {said}'):
    _dialogue(name, template)


@pytest.mark.parametrize(
  ('expression', 'result'),
  [
    ('6 * 7', '42'), ('(1 + 2) / 4', '0.75'), ('-7 // 2', '-4'),
    ('1/3', '0.3333333333'),
    ('0.1 + 0.2', '0.3'), ('9' * 190, '9' * 190),
    ('1 / 0', 'error: division by zero'), ('2 ** 9', 'error: expected numbers'),
    ('__import__("os")', 'error: expected numbers'),
    ('1 +', "error: '1 +' is no"),
    ('9' * 300, 'error: expected an expression of at most 200'),
    ('True', 'error: expected numbers'), ('', "error: '' is no expression"),
  ],
)  # fmt: skip
def test_the_calculator(expression, result):
  given = json.dumps({'expression': expression})
  found = tools.run({'calculator': tools.Calculator()}, 'calculator', given)
  assert found.startswith(result)


def test_a_call_that_fails_is_a_result():
  both = {'python': tools.Python(), 'calculator': tools.Calculator()}
  assert tools.run(both, 'python', '{"code": "print(6 * 7)"}') == '42\n'
  assert 'ZeroDivisionError' in tools.run(both, 'python', '{"code": "1 / 0"}')
  assert 'PermissionError' in tools.run(
    both, 'python', json.dumps({'code': 'import os; os.fork()'})
  )
  for name, arguments in (
    ('search', '{}'), ('python', '[1]'), ('python', '{'),
    ('python', '{"x": 1}'),
    ('python', '{"code": 3}'), ('calculator', '{"expression": null}'),
  ):  # fmt: skip
    assert tools.run(both, name, arguments).startswith('error: ')


def test_wrong_settings_and_records_are_refused():
  with pytest.raises(ValueError, match=r'environment\.tools: got none'):
    environments.ToolUse(tools=())
  with pytest.raises(ValueError, match='max_turns: got 0, expected at least 1'):
    environments.ToolUse(tools=_USE.tools, max_turns=0)
  with pytest.raises(ValueError, match='record: got the fields a, expected'):
    _USE.open().reset({'a': 1})


class _Sampler:
  """Answers every ask of a conversation as `turns` says, by its length."""

  def __init__(self, turns):
    self.turns, self.asked = turns, []

  def sample(self, asks):
    self.asked.append(asks)
    ids = tuple(self.turns[len(self.asked) - 1])
    return [
      [
        sampling.Sample(
          ids,
          'unused',
          np.full(len(ids), -0.5, np.float32),
          np.full(len(ids), 7, np.int32),
          False,
        )
      ]
      for _ in asks
    ]


def test_the_rollouts_of_a_run_play_its_environment():
  talk = _dialogue('qwen')
  record = {'question': '6 * 7?'}
  question = {'role': 'user', 'content': record['question']}
  call = _said(talk, [question], _call('6 * 7'))
  last = [*talk.tokenizer.encode('42'), talk.stop_ids[0]]
  asked = prompts_lib.Prompt(ids=(1,), messages=(question,), record=record)
  drawer = drawing.Drawer(
    config=rollout_config.RolloutConfig(
      rewards=(
        rollout_config.RewardConfig(
          reward=lambda found: [float(each.text == '42') for each in found]
        ),
      ),
      environment=_USE,
      num_prompts=2,
      max_tokens=len(call) + 10,
    ),
    prompts=prompts_lib.Prompts(
      name='p', prompts=(asked,), digest='', num_too_long=0
    ),
    group_size=3,
    seed=0,
    stop_ids=(),
    stop=(),
    dialogue=talk,
  )
  sampler = _Sampler([call, last])
  drawn = drawer.draw(sampler, 0, 7)
  assert drawn.scored.total_N.tolist() == [1.0] * 6
  first, second = sampler.asked
  # Every turn of every episode has a seed of its own, and all end with the
  # template's stop tokens.
  seeds = [ask.seed for ask in (*first, *second)]
  assert len(set(seeds)) == len(seeds) == 12
  assert {ask.stop_ids for ask in first} == {talk.stop_ids}
  assert second[0].prompt_ids[: len(first[0].prompt_ids)] == first[0].prompt_ids
  assert {ask.max_tokens for ask in second} == {10}
  arrays = rows.rows_of(
    drawn.episodes,
    row_length=512,
    pad_id=0,
    names={'sampler_logprobs'},
    rewards_N=drawn.scored.total_N,
    advantages_N=np.ones(6, np.float32),
  )
  # Only what the policy sampled is trained.
  assert (arrays['weights'].sum(axis=1) == len(call) + len(last)).all()
  again = drawer.draw(_Sampler([call, last]), 0, 7)
  assert again.episodes[0].ids == drawn.episodes[0].ids
