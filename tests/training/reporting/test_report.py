"""report.html: made by a run, of its files alone, and safe to open."""

import json
import re

import pytest

from tests.helpers.training import tiny_run
from training.evaluation import evals_config
from training.reporting import report, report_figures, reporter


@pytest.fixture(scope='module')
def workdir(tmp_path_factory):
  """A run of two starts, with samples."""
  root = tmp_path_factory.mktemp('report')
  corpus = tiny_run.write_corpus(root)
  for steps in (6, 12):
    experiment = tiny_run.experiment(
      corpus, num_steps=steps, evals=evals_config.EvalsConfig(samples=2)
    )
    tiny_run.run(experiment, root / 'run')
  return root / 'run'


@pytest.mark.slow
def test_every_start_leaves_a_page_of_the_whole_run(workdir):
  text = (workdir / 'report.html').read_text()
  assert 'Step 12 of 12: complete' in text
  for words in (
    'Loss of training and validation by step',
    'learning rate by step',
    'gradient norm, before clipping by step',
    'tokens per second by step',
    'Time of the run by its use',
    'optimizer.peak_lr',
    'frozen: weights digest',
    'name validation, documents 3',
    'From step'.lower(),  # the table of two starts
  ):
    assert words in text, words
  digest = json.loads((workdir / 'frozen' / 'manifest.json').read_text())
  assert digest['weights_digest'] in text


@pytest.mark.slow
def test_the_page_needs_no_other(workdir):
  text = (workdir / 'report.html').read_text()
  own = text.replace('http://www.w3.org/2000/svg', '')
  assert not re.search(r'https?:|<script|<link|src=|@import|url\(', own)
  assert "default-src 'none'" in text


def test_samples_are_shown_as_text(workdir):
  lines = (workdir / 'metrics.jsonl').read_text().splitlines()
  records = [json.loads(line) for line in lines]
  drawn = [r for r in records if r['kind'] == 'sample']
  assert [(r['step'], r['index']) for r in drawn] == [
    (6, 0), (6, 1), (12, 0), (12, 1)
  ]  # fmt: skip
  records.append(
    {
      'kind': 'sample',
      'step': 12,
      'index': 2,
      'prompt': '<script>',
      'text': '</pre><b>',
    }
  )
  text = ''.join(report._samples(records))
  assert '<script>' not in text
  assert '<b>' not in text
  assert '&lt;script&gt;<mark>&lt;/pre&gt;&lt;b&gt;</mark>' in text


def test_a_run_that_fails_says_so_on_its_page(tmp_path):
  corpus = tiny_run.write_corpus(tmp_path)
  experiment = tiny_run.experiment(corpus, diagnose_non_finite=False)
  experiment.optimizer.peak_lr = 1e30
  with pytest.raises(reporter.NonFiniteError):
    tiny_run.run(experiment, tmp_path / 'run')
  text = (tmp_path / 'run' / 'report.html').read_text()
  assert 'not complete' in text
  assert 'Ended by an error: step ' in text


def test_a_page_that_cannot_be_made_ends_no_run(tmp_path):
  told: list[str] = []
  report.save(tmp_path / 'nothing', told.append)
  (line,) = told
  assert 'report.html' in line


def test_many_steps_are_averaged_within_their_range():
  records = [
    {'kind': 'train', 'step': i, 'loss': float(i % 2)} for i in range(3000)
  ]
  series = report_figures.averaged('', records, 'loss')
  assert len(series.x) == 300
  assert set(series.y) == {0.5}
  assert set(series.low or ()) == {0.0}
  assert set(series.high or ()) == {1.0}
