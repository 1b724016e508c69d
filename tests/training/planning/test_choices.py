"""What an experiment leaves open: chosen by memory and time, kept on resuming.

Devices are GPUs and TPUs that are not here.
"""

import dataclasses

import jax
import pytest

from hardware import peaks, targets
from models.layers import cross_entropy
from storage import file_names
from tests.helpers import tiny_models
from tests.helpers.training import tiny_experiment, tiny_run
from training import execution, experiment as experiment_lib
from training.checkpoints import workdir as workdir_lib
from training.planning import choices, memory

AUTO = experiment_lib.ExecutionConfig()


@pytest.fixture(scope='module')
def gpu():
  pytest.importorskip('jax_plugins.xla_cuda13', reason='requirements-plan.txt')
  targets.prepare_environment()
  return targets.devices(targets.parse('h100:1'))


def _experiment(**fields):
  return tiny_experiment.make(
    **{
      'execution': AUTO,
      'compute_dtype': 'bfloat16',
      'data': {'batch_size': 16, 'row_length': 256, 'packing': 'none'},
      'model': tiny_models.llama_like(
        vocab_size=512,
        num_layers=4,
        model_width=256,
        head_width=16,
        max_length=256,
        scan_layers=True,
      ),  # fmt: skip
    }
    | fields
  )


def _needed(experiment, devices, **fields):
  own = {k: v for k, v in fields.items() if k != 'num_microbatches'}
  experiment = dataclasses.replace(
    experiment,
    num_microbatches=fields.get('num_microbatches', 1),
    execution=dataclasses.replace(experiment.execution, **own),
  )
  learner = choices.learner_lib.make(experiment, devices)
  return memory.estimate(learner).total


def _with_memory(monkeypatch, num_bytes):
  monkeypatch.setattr(peaks, 'memory_bytes', lambda _: num_bytes)


def test_a_cpu_chooses_what_it_always_had():
  found, reasons = choices.make(_experiment(num_microbatches=0), jax.devices())
  assert reasons == ()
  assert found.num_microbatches == 1
  assert found.execution == experiment_lib.ExecutionConfig(
    remat='none',
    layers='scanned',
    loss_chunk_logits=cross_entropy.MAX_CHUNK_LOGITS,
  )


def test_a_gpu_takes_layers_apart_and_large_chunks_of_the_loss(gpu):
  found, reasons = choices.make(_experiment(), gpu)
  assert found.execution == experiment_lib.ExecutionConfig(
    remat='none', layers='apart', loss_chunk_logits=2**28
  )
  said = '\n'.join(reasons)
  assert 'remat none (takes ' in said
  assert 'layers apart (a loop would copy ' in said
  assert 'loss in chunks of at most 268,435,456 logits, which take 1 G' in said


@pytest.mark.parametrize('remat', ['minimal', 'full'])
def test_remat_is_the_first_that_fits(gpu, monkeypatch, remat):
  experiment = _experiment()
  total = _needed(experiment, gpu, remat=remat)
  _with_memory(monkeypatch, 1.001 * total / 0.9)
  found, reasons = choices.make(experiment, gpu)
  assert found.execution.remat == remat
  assert f'remat {remat} (takes ' in reasons[0]
  # An explicit setting stays.
  explicit = dataclasses.replace(AUTO, remat='none')
  found, _ = choices.make(_experiment(execution=explicit), gpu)
  assert found.execution.remat == 'none'


@pytest.mark.slow
def test_micro_batches_are_cut_until_they_fit(gpu, monkeypatch):
  experiment = _experiment(
    num_microbatches=0, execution=dataclasses.replace(AUTO, remat='full')
  )
  total = _needed(experiment, gpu, num_microbatches=4)
  assert total < _needed(experiment, gpu, num_microbatches=2)
  _with_memory(monkeypatch, 1.001 * total / 0.9)
  found, reasons = choices.make(experiment, gpu)
  assert found.num_microbatches == 4
  assert reasons[0].startswith('4 micro-batches (takes ')


def test_a_batch_that_fits_in_no_way_says_so(gpu, monkeypatch):
  _with_memory(monkeypatch, 1e6)
  found, reasons = choices.make(_experiment(), gpu)
  assert found.execution.remat == 'full'
  assert 'DOES NOT FIT' in reasons[0]


@pytest.mark.parametrize('where', ['gpu', 'cpu'])
def test_a_resumed_run_keeps_the_order_of_its_sums(gpu, where):
  devices = gpu if where == 'gpu' else jax.devices()
  before = {'num_microbatches': 4, 'execution': {'loss_chunk_logits': 2**20}}
  found, _ = choices.make(_experiment(num_microbatches=0), devices, before)
  assert found.num_microbatches == 4
  assert found.execution.loss_chunk_logits == 2**20
  # The record of a version that had no such field.
  found, reasons = choices.make(_experiment(), devices, {'execution': {}})
  assert found.execution.loss_chunk_logits == 2**26
  if where == 'gpu':
    assert any('as before' in reason for reason in reasons)
  # What the user says wins.
  own = dataclasses.replace(AUTO, loss_chunk_logits=2**24)
  found, _ = choices.make(_experiment(execution=own), devices, before)
  assert found.execution.loss_chunk_logits == 2**24


def test_plain_attention_is_compiled_once_for_all_layers(gpu):
  found, reasons = choices.make(_experiment(compute_dtype='float32'), gpu)
  assert found.execution.layers == 'scanned'
  assert 'layers scanned (the program compiles one of them)' in reasons


def test_stages_loop_over_their_layers(gpu):
  experiment = _experiment(parallel={'stage': 2})
  devices = targets.devices(targets.parse('h100:2'))
  assert execution.settled(experiment, devices).execution.layers == 'scanned'
  apart = dataclasses.replace(AUTO, layers='apart')
  with pytest.raises(ValueError, match='execution.layers: got apart with par'):
    choices.make(dataclasses.replace(experiment, execution=apart), devices)


@pytest.mark.slow
def test_a_run_records_its_choices_and_keeps_them(tmp_path):
  corpus, workdir = tiny_run.write_corpus(tmp_path), tmp_path / 'run'
  tiny_run.run(tiny_run.experiment(corpus, num_steps=2), workdir)
  config = workdir_lib.config_before(workdir)
  assert config['num_microbatches'] == 1
  assert config['execution'] == {
    'remat': 'none',
    'attention': 'auto',
    'matmul': 'float',
    'layers': 'scanned',
    'loss_chunk_logits': 2**26,
  }
  # As if the run had begun on another device.
  path = workdir / file_names.RUN
  path.write_text(path.read_text().replace(str(2**26), str(2**12)))
  longer = tiny_run.experiment(corpus, num_steps=4, num_microbatches=0)
  tiny_run.run(longer, workdir)
  config = workdir_lib.config_before(workdir)
  assert config['execution']['loss_chunk_logits'] == 2**12
  assert config['num_microbatches'] == 1


def test_a_workdir_without_checkpoints_has_nothing_to_keep(tmp_path):
  assert workdir_lib.config_before(tmp_path / 'none') is None
  (tmp_path / file_names.RUN).write_text('{"config": {}}')
  assert workdir_lib.config_before(tmp_path) is None
