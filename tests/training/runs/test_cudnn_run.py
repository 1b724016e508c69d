"""Whole runs through cuDNN's attention, interpreted, on packed rows."""

import functools

import pytest

from models.attention.kernels import cudnn_gpu
from storage import file_names
from tests.helpers.training import tiny_run
from training import execution
from training.reporting import metrics


@pytest.fixture(scope='module')
def corpus(tmp_path_factory):
  return tiny_run.write_corpus(tmp_path_factory.mktemp('corpus'))


def _losses(corpus, workdir, packing):
  experiment = tiny_run.experiment(
    corpus, num_steps=4, data={'packing': packing, 'row_length': 256}
  )
  experiment.model.max_length = 256
  _, printed = tiny_run.run(experiment, workdir)
  assert (workdir / file_names.FROZEN).is_dir()
  records = metrics.read(workdir)
  return printed, [r['loss'] for r in records if 'loss' in r]


@pytest.mark.slow
@pytest.mark.parametrize(
  ('packing', 'said'),
  [
    ('best_fit', 'cudnn, by lengths of at most '),
    ('concat_then_split', 'cudnn, by lengths of at most '),
    ('none', 'cudnn, causal only: a row has one document'),
  ],
)
def test_a_run_counts_the_documents_of_its_rows(
  corpus, tmp_path, monkeypatch, packing, said
):
  printed, expected = _losses(corpus, tmp_path / 'reference', packing)
  assert 'attention  reference\n' in printed
  monkeypatch.setattr(execution, 'attention_path', lambda *_: 'cudnn')
  monkeypatch.setattr(execution, '_capability', lambda _: (9, 0))
  interpreted = functools.partial(cudnn_gpu.attend, implementation='xla')
  monkeypatch.setattr(cudnn_gpu, 'attend', interpreted)
  monkeypatch.setattr(cudnn_gpu, 'refusal', lambda *_: '')
  printed, got = _losses(corpus, tmp_path / 'cudnn', packing)
  assert f'attention  {said}' in printed
  # float32 sums in another order, over four steps.
  assert got == pytest.approx(expected, rel=1e-4)


@pytest.mark.slow
def test_lengths_that_cudnn_refuses_become_a_mask(
  corpus, tmp_path, monkeypatch
):
  monkeypatch.setattr(execution, 'attention_path', lambda *_: 'cudnn')
  monkeypatch.setattr(execution, '_capability', lambda _: (9, 0))
  interpreted = functools.partial(cudnn_gpu.attend, implementation='xla')
  monkeypatch.setattr(cudnn_gpu, 'attend', interpreted)
  monkeypatch.setattr(cudnn_gpu, 'refusal', lambda *_: 'an old version')
  printed, _ = _losses(corpus, tmp_path / 'run', 'best_fit')
  assert 'cuDNN takes no lengths of documents: an old version' in printed
  assert 'attention  cudnn, with a mask of the documents' in printed
