"""The audit of training data: what it shows, and what it refuses."""

import dataclasses
import json

import numpy as np
import pytest

from data import packing
from tests.helpers import commands
from tests.helpers.training import chat_run, tiny_run
from training import assemble
from training.diagnosis import audit
from training.objectives import reward


@pytest.fixture(scope='module')
def places(tmp_path_factory):
  root = tmp_path_factory.mktemp('audit')
  chat_run.write_base(root / 'base')
  return root, chat_run.write_chats(root / 'chats', train=9, validation=2)


def _report(experiment, num_rows=1):
  return '\n'.join(audit.report(experiment, num_rows))


def test_trained_tokens_are_marked_with_their_stop_token(places, tmp_path):
  root, _ = places
  (tmp_path / 'chats').mkdir()
  messages = [
    {'role': role, 'content': text}
    for role, text in (
      ('system', 'S'),
      ('user', 'one <|im_end|>'),  # text, which no message can make special
      ('assistant', 'two'),
      ('user', 'three'),
      ('assistant', 'four'),
    )
  ]
  for split in ('train', 'validation'):
    path = tmp_path / 'chats' / f'{split}.jsonl'
    path.write_text(json.dumps({'messages': messages}))
  chats = str(tmp_path / 'chats' / '{split}.jsonl')
  shown = _report(chat_run.experiment(chats, root / 'base'))
  assert (
    '[1] <|im_start|>system\nS<|im_end|>\n'
    '<|im_start|>user\none \\x3c|im_end|><|im_end|>\n'
    '<|im_start|>assistant\n⟦two<|im_end|>⟧\n'
    '<|im_start|>user\nthree<|im_end|>\n'
    '<|im_start|>assistant\n⟦four<|im_end|>⟧'
  ) in shown
  assert 'checked 1 pieces of jsonl: no target is of another' in shown
  assert 'checked 1 pieces of validation' in shown


def test_pairs_are_named(places, tmp_path):
  root, _ = places
  (tmp_path / 'chats').mkdir()
  for split in ('train', 'validation'):
    record = {'prompt': 'q', 'chosen': 'good', 'rejected': 'bad'}
    path = tmp_path / 'chats' / f'{split}.jsonl'
    path.write_text(json.dumps(record))
  experiment = chat_run.experiment(
    str(tmp_path / 'chats' / '{split}.jsonl'),
    root / 'base',
    data={'examples': 'pairs'},
  )
  experiment = dataclasses.replace(experiment, objective=reward.Reward())
  shown = _report(experiment)
  assert '[1 chosen] <|im_start|>user\nq' in shown
  assert '[2 rejected] <|im_start|>user\nq' in shown
  assert '⟦good<|im_end|>⟧' in shown
  assert '⟦bad<|im_end|>⟧' in shown


def test_answers_that_were_cut_are_counted(places, tmp_path):
  root, _ = places
  (tmp_path / 'chats').mkdir()
  for split in ('train', 'validation'):
    record = {'prompt': 'q', 'completion': 'very long ' * 20}
    path = tmp_path / 'chats' / f'{split}.jsonl'
    path.write_text(json.dumps(record))
  chats = str(tmp_path / 'chats' / '{split}.jsonl')
  shown = _report(
    chat_run.experiment(chats, root / 'base', data={'row_length': 40})
  )
  assert 'WARNING: 1 records truncated to row_length' in shown
  assert '1 answers were cut, without one' in shown


def test_text_is_audited_too(corpus):
  shown = _report(tiny_run.experiment(corpus))
  assert 'row 0: 16 of 16 targets are trained' in shown
  assert '⟦<bos>' in shown
  assert 'no target is of another document' in shown


def test_a_plan_that_joins_documents_is_found(places, monkeypatch):
  root, chats = places
  plan = packing.Fitted.pieces

  def longer(self, row):
    starts, lengths = plan(self, row)
    return starts, lengths + 1  # the last target is the next document's first

  monkeypatch.setattr(packing.Fitted, 'pieces', longer)
  with pytest.raises(ValueError, match='a target of another document'):
    _report(chat_run.experiment(chats, root / 'base'), num_rows=0)


def test_a_stop_token_that_is_not_trained_is_found(places, monkeypatch):
  root, chats = places
  experiment = chat_run.experiment(chats, root / 'base')
  real = audit._documents

  def without_stops(rows, row):
    for document in real(rows, row):
      ends = document.trained & ~np.append(document.trained[1:], False)
      yield document._replace(trained=document.trained & ~ends)

  monkeypatch.setattr(audit, '_documents', without_stops)
  with pytest.raises(ValueError, match='jsonl: row 0: .*stop token'):
    _report(experiment, num_rows=0)


def test_the_command_prints_the_audit_and_trains_nothing(places, tmp_path):
  root, chats = places
  args = (
    f'--config=experiments/sft.py:{root / "base"}',
    f'--config.data.path={chats}',
    f'--config.data.data_dir={tmp_path}',
    f'--workdir={tmp_path / "run"}',
  )
  done = commands.run('train.py', *args, '--audit')
  assert done.returncode == 0, done.stderr
  assert 'row 0: ' in done.stdout
  assert 'checked 9 pieces of jsonl' in done.stdout
  assert not (tmp_path / 'run').exists()
  done = commands.run('train.py', *args, '--audit', '--config.data.packing=x')
  assert done.returncode == 1
  assert done.stderr.startswith('error: data.packing')


def test_rows_of_an_audit_are_those_of_the_run(places, tmp_path):
  root, chats = places
  experiment = chat_run.experiment(chats, root / 'base')
  (tmp_path / 'run').mkdir()
  parts = assemble.assemble(experiment, tmp_path / 'run')
  (rows,) = parts.batches.sources
  parts.batches.close()
  trained = sum(
    int(document.trained[1:].sum())
    for row in range(rows.num_rows)
    for document in audit._documents(rows, row)
  )
  batches = type(parts.eval_batches)(rows, 4)
  assert trained == sum(batch['weights'].sum() for batch in batches)
