"""Rewards through the engine: the function that training differentiates."""

import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from data.examples import encoding
from evals import evaluate
from frozen import format as frozen_format
from inference import generate, model_port, rewards
from inference.engine import engine_config
from models import transformer
from models.layers import reward_head
from tests.helpers import commands, frozen_dirs, tiny_models
from tests.helpers.open_weights import hf_files
from text import hf_tokenizer
from training.objectives import port, reward

CONFIG = frozen_dirs.config()


@pytest.fixture(scope='module')
def directory(tmp_path_factory):
  directory = tmp_path_factory.mktemp('reward') / 'frozen'
  head = reward_head.init(CONFIG.model_width, jax.random.key(0))
  frozen_dirs.write(
    directory,
    config=CONFIG,
    params={**frozen_dirs.params(CONFIG), 'heads': {'reward': head}},
    chat_template=(
      '{% for m in messages %}<{{ m.role }}>{{ m.content }}</{{ m.role }}>'
      '{% endfor %}'
    ),
  )
  return directory


@pytest.fixture(scope='module')
def generator(directory):
  config = engine_config.EngineConfig(
    max_sequences=2,
    decode_shapes=(2,),
    chunk_tokens=16,
    max_chunks=1,
    max_mixed_chunks=1,
    page_size=8,
  )
  return generate.load(directory, config, is_for_rewards=True)


@pytest.mark.slow
def test_rewards_are_those_of_the_training_objective(directory, generator):
  rng = np.random.default_rng(0)
  # Longer than a chunk and shorter than a page; two begin alike.
  answers = [rng.integers(0, 256, size).tolist() for size in (40, 3, 17, 1)]
  answers += [answers[0][:30] + [7, 8]]
  found = model_port.rewarder(generator)(answers)
  frozen = frozen_format.read(directory)
  # Pairs of the objective: each answer with itself, all in rows of a batch.
  shape = len(answers), 80
  batch = {
    name: np.zeros(shape, np.int32)
    for name in ('tokens', 'positions', 'segment_ids')
  }
  for row, ids in enumerate(answers):
    for side in (0, 1):
      at = row, slice(side * len(ids), (side + 1) * len(ids))
      batch['tokens'][at] = ids
      batch['positions'][at] = np.arange(len(ids))
      batch['segment_ids'][at] = side + 1
  model = port.Model(transformer.Transformer(CONFIG))

  @jax.jit
  def ends(params, batch):
    hidden = model.hidden(
      params, batch['tokens'], batch['positions'], batch['segment_ids']
    )
    head = params['heads']['reward']
    values_BT = reward_head.rewards(head, hidden.states_BTD)
    return reward.at_ends(values_BT, batch)[0]

  ends_BU2 = ends(frozen.params, jax.tree.map(jnp.asarray, batch))
  # float32 sums in another order.
  np.testing.assert_allclose(found, ends_BU2[:, 0, 0], atol=2e-5)
  np.testing.assert_allclose(found, ends_BU2[:, 0, 1], atol=2e-5)
  assert len({round(each, 3) for each in found}) == len(found)


@pytest.mark.slow
def test_no_answers_have_no_rewards(generator):
  assert model_port.rewarder(generator)([]) == []


def test_the_digest_of_the_weights_counts_the_head(generator):
  expected = generator.frozen.manifest.weights_digest
  assert generator.weights_digest() == expected


CHATML = (
  '{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n'
  '{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}'
)
MARKED = (
  '{% for m in messages %}{% if m.role == "assistant" %}A:{% generation %}'
  ' {{ m.content }}{{ eos_token }}{% endgeneration %}\n{% else %}Q:'
  ' {{ m.content }}\n{% endif %}{% endfor %}'
  '{% if add_generation_prompt %}A:{% endif %}'
)


@pytest.mark.parametrize(
  ('tokenizer', 'template', 'end'),
  [
    ('byte', '', 257),
    ('qwen', CHATML, '<|im_end|>'),
    ('qwen', MARKED, '<|im_end|>'),
  ],
  ids=['transcript', 'chatml', 'marked'],
)
def test_an_answer_has_the_ids_that_training_gives_it(
  tmp_path, tokenizer, template, end
):
  if tokenizer == 'byte':
    tok = tiny_models.byte_tokenizer()
  else:
    hf_files.qwen(tmp_path / 'source')
    tok = hf_tokenizer.convert(tmp_path / 'source', tmp_path / 'converted')
    end = tok.special_tokens[end]
  served = types.SimpleNamespace(
    tokenizer=tok,
    frozen=types.SimpleNamespace(
      chat_template=template, manifest=types.SimpleNamespace(has_bos=True)
    ),
  )
  prompt = [
    {'role': 'user', 'content': 'One?'},
    {'role': 'assistant', 'content': 'Yes.'},
    {'role': 'user', 'content': 'Two?'},
  ]
  if not template:  # a transcript has one answer, at the end
    prompt = prompt[2:]
  record = {
    'prompt': prompt,
    'chosen': [{'role': 'assistant', 'content': 'It is 2.'}],
    'rejected': [{'role': 'assistant', 'content': 'No'}],
  }
  unit = encoding.Encoder(tok, template, 'pairs').unit(record, 'here')
  for document, answer in zip(unit.documents, ('It is 2.', 'No'), strict=True):
    ids = model_port.encode_answer(served, prompt, answer)
    # The document has one more id, so that the last one is an input.
    assert list(ids) == document.ids[:-1].tolist()
    assert ids[-1] == end
  text = model_port.encode_answer(served, 'Two?', 'No')
  assert text == model_port.encode_answer(served, prompt[-1:], 'No')


def test_a_file_of_answers_gets_rewards(generator, tmp_path):
  lines = [
    {'prompt': 'p', 'answer': 'one', 'source': 7},
    {'prompt': [{'role': 'user', 'content': 'p'}], 'answer': 'two'},
  ]
  source, out = tmp_path / 'answers.jsonl', tmp_path / 'out.jsonl'
  source.write_text(''.join(json.dumps(line) + '\n' for line in lines))
  numbers = rewards.score_file(generator, str(source), str(out))
  written = [json.loads(line) for line in out.read_text().splitlines()]
  assert [line.pop('reward') for line in written] == numbers
  assert written == lines
  assert numbers == model_port.rewarder(generator)(
    [model_port.encode_answer(generator, 'p', each) for each in ('one', 'two')]
  )


@pytest.mark.parametrize(
  ('line', 'message'),
  [
    ({'prompt': 'p'}, 'line 1: got the fields prompt, expected prompt, answer'),
    ({'prompt': 'p', 'answer': 3}, 'answer: got 3, expected a string'),
    (
      {'prompt': [], 'answer': 'a'},
      r'prompt: got \[\], expected text, or mess',
    ),
    ({'prompt': 'p', 'answer': 'a' * 99}, 'line 1: .* at most 64'),
  ],
)
def test_a_wrong_line_is_named(generator, tmp_path, line, message):
  source = tmp_path / 'answers.jsonl'
  source.write_text(json.dumps(line))
  with pytest.raises(ValueError, match=message):
    rewards.score_file(generator, str(source), str(tmp_path / 'out'))
  assert not (tmp_path / 'out').exists()


def test_a_reward_model_judges_and_predicts_nothing(generator, tmp_path):
  model = model_port.evaluated(generator)
  path = tmp_path / 'pairs.jsonl'
  path.write_text(json.dumps({'prompt': 'p', 'chosen': 'a', 'rejected': 'b'}))
  result = evaluate.run(f'judge:{path}', model)
  assert model.reward_fn
  assert model.encode_answer
  first, second = model.reward_fn(
    [model.encode_answer('p', each) for each in 'ab']
  )
  assert result.score('accuracy').value == float(first > second)
  assert result.score('position_bias').value == 0.0
  text = tmp_path / 'text.txt'
  text.write_text('some text')
  with pytest.raises(ValueError, match='logprob_fn: got none, expected one'):
    evaluate.run(f'perplexity:{text}', model)


def test_it_is_not_served_as_a_language_model(directory):
  with pytest.raises(
    ValueError, match='a reward model, expected a language model'
  ):
    generate.load(directory)


@pytest.mark.slow
def test_a_language_model_gives_no_rewards(tmp_path):
  frozen_dirs.write(tmp_path / 'frozen', config=CONFIG)
  config = engine_config.EngineConfig(max_sequences=1)
  generator = generate.load(
    tmp_path / 'frozen', config, compile_all=False, is_for_rewards=True
  )
  with pytest.raises(ValueError, match='a language model, expected a reward'):
    model_port.rewarder(generator)


@pytest.mark.slow
def test_the_command(directory, tmp_path):
  source, out = tmp_path / 'answers.jsonl', tmp_path / 'out.jsonl'
  source.write_text(json.dumps({'prompt': 'p', 'answer': 'one'}))
  command = 'inference/rewards.py', f'--input={source}', f'--out={out}'
  done = commands.run(*command, f'--model={directory}')
  assert '1 answers, mean reward' in done.stdout
  assert 'reward' in json.loads(out.read_text())
  done = commands.run(*command, f'--model={tmp_path}/none')
  assert done.returncode == 2
  assert 'got no such file, expected a frozen directory' in done.stderr
