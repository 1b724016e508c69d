"""The benchmark of input batches: its table, not its speed."""

import dataclasses

import pytest

from benchmarks import input_batches
from data import data_config, sources
from experiments import quickstart
from tests.helpers import tiny_models

TOK = tiny_models.byte_tokenizer()


def _experiment(tmp_path):
  for split in ('train', 'validation'):
    (tmp_path / f'{split}.txt').write_text(f'some text of {split} ' * 9)
  experiment = quickstart.get_config()
  data = data_config.DataConfig(
    open_source=lambda path, split, data_dir, text_key: sources.text_files(
      str(tmp_path / '{split}.txt'), split
    ),
    data_dir=str(tmp_path / 'data'),
    row_length=16,
    batch_size=8,
  )
  return dataclasses.replace(
    experiment, data=data, model=tiny_models.llama_like(vocab_size=259)
  )


@pytest.mark.slow
def test_every_packing_and_a_source_mix_are_measured(tmp_path):
  experiment = _experiment(tmp_path)
  measured = input_batches.measure(
    experiment, TOK, rounds=1, num_batches=2, num_steps=1
  )
  names = [
    *data_config.PACKINGS,
    input_batches.SOURCE_MIX,
    input_batches.STEP,
  ]
  assert list(measured) == names
  assert measured[input_batches.STEP]['times'] == 1
  assert all(values['rows_per_s'] > 0 for values in measured.values())
  (source,) = experiment.data.train_sources()
  tokenising = input_batches.time_tokenising(source.open(''), TOK, 1)
  assert tokenising['tokens_per_s'] > tokenising['bytes_per_s'] > 0
  text = input_batches.report(experiment, measured, tokenising)
  assert text.startswith('input batches: 8 x 16, 2 threads; train step on')
  assert 'MB/s' in text
