"""Runs of supervised fine-tuning: what they train, keep, and go on with."""

import dataclasses
import json
import shutil
import signal
import subprocess
import sys

import pytest

from frozen import format as frozen_format
from inference import chat_prompts, generate
from tests.helpers import tiny_models
from tests.helpers.open_weights import hf_files
from tests.helpers.training import chat_run, tiny_run
from text import chat, tokenizer as tokenizer_lib
from training import assemble, experiment as experiment_lib
from training.optimizer import chain
from training.reporting import metrics

# A run in a process of its own, which dies after a step if there is one.
_RUN = """
import os, pathlib, signal, sys
import rich.console
from tests.helpers.training import chat_run
from training import run
from training.reporting import reporter
chats, base, workdir, last = sys.argv[1:]
add = reporter.Reporter.add
def add_and_die(self, step, metrics):
  add(self, step, metrics)
  if step == int(last):
    os.kill(os.getpid(), signal.SIGKILL)
reporter.Reporter.add = add_and_die
run.run(
  chat_run.experiment(chats, pathlib.Path(base)),
  pathlib.Path(workdir),
  rich.console.Console(quiet=True),
)
"""


@pytest.fixture(scope='module')
def places(tmp_path_factory):
  """The base, the conversations and an uninterrupted run."""
  root = tmp_path_factory.mktemp('chat')
  chat_run.write_base(root / 'base')
  chats = chat_run.write_chats(root / 'chats')
  _, printed = tiny_run.run(
    chat_run.experiment(chats, root / 'base'), root / 'run'
  )
  (root / 'printed').write_text(printed)
  return root, chats


def _losses(workdir):
  return [
    (r['step'], r['loss'])
    for r in metrics.read(workdir)
    if r['kind'] == 'train'
  ]


@pytest.mark.slow
def test_a_run_learns_answers_and_says_what_it_trains(places):
  root, _ = places
  losses = _losses(root / 'run')
  assert losses[-1][1] < losses[0][1]
  printed = (root / 'printed').read_text()
  assert 'examples   jsonl: 40 chat, ' in printed
  assert 'of their tokens are trained' in printed
  assert 'records' not in printed  # none was left out
  described = json.loads((root / 'run' / 'data.json').read_text())
  (source,) = described['sources']
  assert 0.2 < source['trained_share'] < 0.8
  assert source['counts'] == {}


@pytest.mark.slow
def test_a_fine_tune_keeps_template_stop_tokens_and_settings(places):
  root, _ = places
  base = frozen_format.read(root / 'base')
  tuned = frozen_format.read(root / 'run' / 'frozen')
  assert tuned.chat_template == base.chat_template == chat_run.TEMPLATE
  assert tuned.generation == base.generation == chat_run.GENERATION
  assert tuned.config == dataclasses.replace(
    base.config, spare_ids=((337, 352),)
  )
  assert tuned.manifest.lineage == {'init_from': base.manifest.weights_digest}
  names = [
    tokenizer_lib.load(frozen.tokenizer_dir).names for frozen in (base, tuned)
  ]
  assert names[0] == names[1]


@pytest.mark.slow
def test_a_run_resumes_bit_for_bit_in_a_new_process(places, tmp_path):
  root, chats = places
  for last in (7, 0):  # killed after step 7: step 4 is saved
    done = subprocess.run(
      [sys.executable, '-c', _RUN, chats, root / 'base', tmp_path, str(last)],
      env=tiny_models.subprocess_env(num_devices=8),
      timeout=480,
    )
    assert done.returncode == (-signal.SIGKILL if last else 0)
  digests = [
    frozen_format.read(place / 'frozen').manifest.weights_digest
    for place in (root / 'run', tmp_path)
  ]
  assert digests[0] == digests[1]


@pytest.mark.slow
def test_a_run_that_goes_on_needs_its_base_no_longer(places, tmp_path):
  root, chats = places
  shutil.copytree(root / 'base', tmp_path / 'base')
  experiment = chat_run.experiment(chats, tmp_path / 'base', num_steps=4)
  tiny_run.run(experiment, tmp_path / 'run')
  shutil.rmtree(tmp_path / 'base')
  longer = dataclasses.replace(experiment, num_steps=6)
  result, _ = tiny_run.run(longer, tmp_path / 'run')
  assert result.step == 6
  frozen = frozen_format.read(tmp_path / 'run' / 'frozen')
  assert frozen.manifest.step == 6
  assert frozen.chat_template == chat_run.TEMPLATE
  assert frozen.generation == chat_run.GENERATION


@pytest.mark.slow
def test_a_stop_token_that_no_server_knows_is_added_to_the_settings(
  places, tmp_path
):
  """Gemma's turns end with a token that its tokenizer does not call EOS."""
  _, chats = places
  template = (
    "{{ bos_token }}{% for m in messages %}{{ '<start_of_turn>' + m.role }}\n"
    "{{ m.content + '<end_of_turn>\n' }}{% endfor %}"
    '{% if add_generation_prompt %}'
    "{{ '<start_of_turn>assistant\n' }}{% endif %}"
  )
  chat_run.write_base(
    tmp_path / 'base',
    family=hf_files.gemma,
    config=tiny_models.llama_like(vocab_size=640, num_layers=1, max_length=128),
    chat_template=template,
    generation={'temperature': 0.0, 'max_tokens': 9, 'stop_ids': [1]},
  )
  experiment = chat_run.experiment(chats, tmp_path / 'base', num_steps=2)
  tiny_run.run(experiment, tmp_path / 'run')
  frozen = frozen_format.read(tmp_path / 'run' / 'frozen')
  tok = tokenizer_lib.load(frozen.tokenizer_dir)
  stop = tok.special_tokens['<end_of_turn>']
  assert stop != tok.eos_id
  assert frozen.generation['stop_ids'] == [1, stop]
  assert frozen.chat_template == template


@pytest.mark.slow
def test_a_fine_tune_chats_and_ends_its_turn(tmp_path):
  """It learns one answer, and the stop token behind it."""
  chat_run.write_base(tmp_path / 'base')
  question = {'role': 'user', 'content': 'red?'}
  answer = {'role': 'assistant', 'content': 'two plus two'}
  (tmp_path / 'chats').mkdir()
  for split in ('train', 'validation'):
    path = tmp_path / 'chats' / f'{split}.jsonl'
    path.write_text(json.dumps({'messages': [question, answer]}))
  experiment = chat_run.experiment(
    str(tmp_path / 'chats' / '{split}.jsonl'),
    tmp_path / 'base',
    num_steps=60,
    optimizer=chain.OptimizerConfig(warmup_steps=2, peak_lr=1e-2),
    checkpoint=experiment_lib.CheckpointConfig(every_steps=60),
    log_every_steps=20,
    eval_every_steps=0,
    data={'batch_size': 8},
  )
  tiny_run.run(experiment, tmp_path / 'run')
  generator = generate.load(tmp_path / 'run' / 'frozen')
  rendered = chat_prompts.render(
    generator,
    chat.Conversation(messages=[question], add_generation_prompt=True),
  )
  ids = chat_prompts.encode(generator, rendered)
  settings = chat_prompts.settings_for(generator, ids, {})
  (completion,) = generator.generate([ids], settings)
  assert completion.text == answer['content']
  assert completion.finish_reason == 'stop'


def test_eos_is_trained_where_it_is_padding_too(tmp_path):
  """Masks that are made by comparing ids with padding lose EOS."""
  headers = chat_run.TEMPLATES / 'headers.jinja'
  chat_run.write_base(
    tmp_path / 'base',
    family=hf_files.llama3,
    chat_template=headers.read_text('utf-8'),
  )
  chats = chat_run.write_chats(tmp_path / 'chats')
  experiment = chat_run.experiment(chats, tmp_path / 'base')
  tmp_path.joinpath('run').mkdir()
  parts = assemble.assemble(experiment, tmp_path / 'run')
  tok = parts.tokenizer
  assert tok.pad_id == tok.eos_id
  for batch in parts.eval_batches:
    for targets, weights, segments in zip(
      batch['targets'], batch['weights'], batch['segment_ids'], strict=True
    ):
      for segment in range(1, segments.max() + 1):
        here = segments == segment
        # The last target is the id behind the last turn, which pads.
        assert targets[here][-1] == tok.pad_id
        assert weights[here][-1] == 0
        assert targets[here][weights[here] > 0][-1] == tok.eos_id
  parts.batches.close()


@pytest.mark.slow
def test_records_that_teach_nothing_are_counted_and_said(places, tmp_path):
  root, chats = places
  path = tmp_path / 'bad'
  shutil.copytree(root / 'chats', path)
  question = {'role': 'user', 'content': 'q'}
  with (path / 'train.jsonl').open('a') as file:
    for messages in (
      [question],
      [question, {'role': 'assistant', 'content': ' \n'}],
      [
        {'role': 'user', 'content': 'long ' * 200},
        {'role': 'assistant', 'content': 'a'},
      ],
      [question, {'role': 'assistant', 'content': 'long ' * 200}],
    ):
      file.write(json.dumps({'messages': messages}) + '\n')
  experiment = chat_run.experiment(
    str(path / '{split}.jsonl'), root / 'base', num_steps=2
  )
  _, printed = tiny_run.run(experiment, tmp_path / 'run')
  for words in (
    'jsonl: 1 records without an answer of the assistant',
    'jsonl: 1 records with an empty answer',
    'jsonl: 1 records without a trained token in row_length',
    'jsonl: 2 records truncated to row_length',
  ):
    assert f'WARNING    {words}' in printed
  assert 'jsonl: 41 chat' in printed


@pytest.mark.parametrize(
  ('line', 'message'),
  [
    ('{"messages": [', r'train\.jsonl:41 is not JSON'),
    ('{"text": "a"}', r'train\.jsonl:41.* text'),
    (
      '{"messages": [{"role": "oracle", "content": "q"},'
      ' {"role": "assistant", "content": "a"}]}',
      r'train\.jsonl:41.*oracle',
    ),
  ],
)
def test_a_malformed_record_is_one_error_with_its_place(
  places, tmp_path, line, message
):
  root, _ = places
  path = tmp_path / 'bad'
  shutil.copytree(root / 'chats', path)
  with (path / 'train.jsonl').open('a') as file:
    file.write(line + '\n')
  experiment = chat_run.experiment(str(path / '{split}.jsonl'), root / 'base')
  with pytest.raises(ValueError, match=message):
    tiny_run.run(experiment, tmp_path / 'run')
  assert not (tmp_path / 'run' / 'run.json').exists()


def test_text_is_no_conversation(places, tmp_path):
  root, chats = places
  experiment = chat_run.experiment(chats, root / 'base')
  experiment.data.packing = 'concat_then_split'
  with pytest.raises(ValueError, match='first_fit, best_fit or none'):
    tiny_run.run(experiment, tmp_path / 'run')
