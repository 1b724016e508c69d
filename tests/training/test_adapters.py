"""Runs that train adapters: what moves, what is saved, and on what devices.

The comparison across devices is that of
tests/training/runs/test_metamorphic.py, with its tolerances.
"""

import dataclasses
import functools
import json
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from evals import evaluate, ports
from frozen import adapters as adapters_lib, format as frozen_format, freeze
from models import adapter_config, flops, layout, transformer
from models.layers import adapters
from tests.helpers import frozen_dirs, tiny_models
from tests.helpers.serving import no_network
from tests.helpers.training import tiny_experiment, tiny_run
from training import (
  adapters as training_adapters,
  assemble,
  experiment as experiment_lib,
  learner as learner_lib,
)
from training.checkpoints import init_from
from training.evaluation import evals_config
from training.optimizer import chain, update_rules
from training.planning import memory
from training.reporting import metrics

NUM_STEPS, ROWS, LENGTH = 8, 16, 16
MAX_RESIDUAL, MEAN_RESIDUAL = 1e-5, 3e-6
_SIZES = {'num_layers': 4, 'num_heads': 4, 'num_kv_heads': 2, 'vocab_size': 272}
WAYS = {
  'fsdp': {'parallel': {'fsdp': 8}},
  'products': {'parallel': {'data': 2, 'fsdp': 2, 'tensor': 2}},
  'circular': {'parallel': {'data': 4, 'stage': 2, 'stage_repeats': 2}},
  'pmap': {'parallel': {'kind': 'pmap'}},
  'accumulated': {'num_microbatches': 2},
  'recomputed': {'remat': 'full'},
  'minimal': {'remat': 'minimal'},
}
KINDS = {
  'lora': {'groups': (('mlp/down', 6, 12.0), ('attention/key', 0, 1.0))},
  'dora': {'dora': True, 'rslora': True},
  'int4': {'base': 'int4'},
}


@pytest.fixture(name='base', scope='module')
def _base(tmp_path_factory):
  directory = tmp_path_factory.mktemp('base') / 'frozen'
  config = frozen_dirs.config(**_SIZES)
  params = transformer.Transformer(config).init(
    jax.random.key(0), jnp.zeros((1, 1), jnp.int32)
  )
  # So large that the layers count.
  params = jax.tree.map(lambda x: 4 * x if x.ndim > 1 else x, params)
  frozen_dirs.write(directory, config=config, params=params)
  return str(directory)


def _adapter(rank=4, **fields):
  return adapter_config.AdapterConfig(rank=rank, alpha=16.0, **fields)


def _experiment(base, adapter=None, **fields):
  return tiny_experiment.make(
    model=fields.pop('model', None) or init_from.model_of(base),
    init_from=base,
    adapter=adapter or _adapter(),
    data={'row_length': LENGTH, 'batch_size': ROWS},
    **{
      'num_steps': NUM_STEPS,
      'optimizer': chain.OptimizerConfig(warmup_steps=2, peak_lr=2e-2),
      **fields,
    },
  )


def _batch(index):
  return tiny_models.batch(
    batch_size=ROWS,
    row_length=LENGTH,
    vocab_size=256,
    num_segments=2,
    num_padding=index % 4,
    seed=index % 4,
  )


def _train(experiment, num_devices=8, steps=NUM_STEPS):
  """Returns the losses, and the first and the last state."""
  devices = jax.devices()[:num_devices]
  learner = learner_lib.make(experiment, devices)
  state = learner.init(jax.random.key(0))
  first = jax.tree.map(np.asarray, learner.placement.whole(state).params)
  step, losses = learner.compile_train_step(), []
  for index in range(steps):
    state, metrics = step(state, learner.placement.put_batch(_batch(index)))
    losses.append(float(metrics['loss']))
  return np.array(losses), first, learner.placement.whole(state)


@functools.cache
def _expected(base, kind):
  experiment = _experiment(base, _adapter(**KINDS[kind]))
  return _train(experiment, num_devices=1)[0]


@pytest.mark.slow
@pytest.mark.parametrize(
  ('kind', 'way'),
  [
    *(('lora', way) for way in WAYS),
    *(
      pytest.param(kind, way, marks=pytest.mark.slow)
      for kind in ('dora', 'int4')
      for way in WAYS
      if way not in ('products', 'circular')
    ),
    *(
      (kind, way)
      for kind in ('dora', 'int4')
      for way in ('products', 'circular')
    ),
  ],
)
def test_every_way_trains_the_same(base, kind, way):
  experiment = _experiment(base, _adapter(**KINDS[kind]), **WAYS[way])
  losses, _, _ = _train(experiment)
  residuals = np.abs(losses - _expected(base, kind))
  assert residuals.max() <= MAX_RESIDUAL, residuals
  assert residuals.mean() <= MEAN_RESIDUAL, residuals
  assert losses[-4:].mean() < losses[:4].mean() - 0.05, 'nothing was learnt'


@pytest.mark.slow
def test_layers_apart_train_as_stacked_ones_do(base):
  model = dataclasses.replace(init_from.model_of(base), scan_layers=False)
  stacked = learner_lib.make(_experiment(base), jax.devices()[:1])
  apart = learner_lib.make(_experiment(base, model=model), jax.devices()[:1])
  state = stacked.init(jax.random.key(0))
  other = apart.init(jax.random.key(0))
  trees, _ = layout.unstack(state.params, stacked.experiment.model)
  other = other.replace(params=jax.tree.map(jnp.array, trees))
  for index in range(3):
    batch = _batch(index)
    state, first = stacked.compile_train_step()(state, batch)
    other, second = apart.compile_train_step()(other, batch)
    assert float(first['loss']) == pytest.approx(
      float(second['loss']), abs=1e-5
    )


@pytest.mark.slow
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize('kind', ['lora', 'dora'])
def test_the_first_step_has_the_loss_of_the_base_bit_for_bit(base, kind, dtype):
  adapted = _experiment(base, _adapter(**KINDS[kind]), compute_dtype=dtype)
  whole = dataclasses.replace(adapted, adapter=adapter_config.AdapterConfig())
  losses, _, _ = _train(adapted, 1, steps=1)
  learner = learner_lib.make(whole, jax.devices()[:1])
  state = learner.init_with(jax.random.key(0), init_from.read(whole))
  _, metrics = learner.compile_train_step()(state, _batch(0))
  assert losses[0] == float(metrics['loss'])


RULES = {
  'adamw': update_rules.AdamW(),
  'muon': update_rules.Muon(),
  'adafactor': update_rules.Adafactor(),
  'lion': update_rules.Lion(),
}


@pytest.mark.fast_cases(1)
@pytest.mark.parametrize('rule', RULES)
def test_only_adapters_are_state_and_all_of_them_move(base, rule):
  optimizer = chain.OptimizerConfig(
    rule=RULES[rule], warmup_steps=1, peak_lr=1e-3, end_lr=1e-4
  )
  _, first, state = _train(_experiment(base, optimizer=optimizer), 1)
  assert set(state.params) == {adapters.COLLECTION}
  jax.tree.map(
    lambda a, b: _assert_moved(a, np.asarray(b)), first, state.params
  )
  held = sum(x.size for x in jax.tree.leaves(state.params))
  kept = [x for x in jax.tree.leaves(state.opt_state) if hasattr(x, 'size')]
  assert sum(x.size for x in kept) <= 2 * held + 8 * len(kept)
  weights = sum(
    x.size for x in jax.tree.leaves(state.frozen_params[training_adapters.BASE])
  )
  assert held < weights / 4


def _assert_moved(before, after):
  assert np.isfinite(after).all()
  assert np.abs(after - before).max() > 0


@pytest.mark.slow
def test_weight_decay_shrinks_both_matrices(base):
  def norms(decay):
    optimizer = chain.OptimizerConfig(
      warmup_steps=0, peak_lr=1e-2, end_lr=1e-2, weight_decay=decay
    )
    _, _, state = _train(_experiment(base, optimizer=optimizer), 1)
    tree = state.params[adapters.COLLECTION]
    return [
      np.linalg.norm(entry[name])
      for _, entry in adapters.entries(tree)
      for name in ('a', 'b')
    ]

  pairs = list(zip(norms(10.0), norms(0.0), strict=True))
  assert all(decayed < plain for decayed, plain in pairs), pairs


@pytest.mark.slow
def test_no_gradient_of_a_frozen_weight_is_computed(base):
  """XLA drops the products of the frozen kernels' gradients."""

  def flops_of(adapter):
    learner = learner_lib.make(
      _experiment(base, adapter, model=_apart(base)), jax.devices()[:1]
    )
    lowered = learner.placement.lower_train(
      learner.build_train_step, learner.batch_shapes()
    )
    return lowered.compile().cost_analysis()['flops']

  ratio = flops_of(_adapter(1)) / flops_of(adapter_config.AdapterConfig())
  assert 0.6 < ratio < 0.85, ratio
  model = init_from.model_of(base)
  expected = flops.train_flops_per_token(
    model, LENGTH, is_frozen=True
  ) / flops.train_flops_per_token(model, LENGTH)
  assert ratio == pytest.approx(expected, abs=0.12)


def _apart(base):
  return dataclasses.replace(init_from.model_of(base), scan_layers=False)


def test_the_plan_counts_gradients_and_moments_of_adapters_alone(base):
  def plan(**fields):
    experiment = _experiment(base, **fields)
    learner = learner_lib.make(experiment, jax.devices()[:1])
    return memory.estimate(learner), learner

  found, learner = plan()
  held = 4 * learner.num_params
  assert (found.params, found.gradients) == (held, held)
  assert found.optimizer == pytest.approx(2 * held, rel=0.01)
  assert found.embedding == 0
  base_bytes = 4 * flops.num_params(learner.experiment.model)
  assert found.frozen == base_bytes
  quantised, _ = plan(adapter=_adapter(base='int4'))
  assert quantised.frozen < 0.65 * base_bytes  # tables stay float32
  whole, _ = plan(adapter=adapter_config.AdapterConfig())
  assert whole.optimizer > 5 * found.optimizer
  assert found.layers < whole.layers
  assert whole.frozen == 0


def _run(corpus, base, workdir, **fields):
  fields = {'adapter': _adapter(), **fields}
  experiment = tiny_run.tuning(corpus, base, **fields)
  return tiny_run.run(experiment, workdir)


def _files(root):
  return {
    str(path.relative_to(root)): path.read_bytes()
    for path in root.rglob('*')
    if path.is_file()
  }


@pytest.fixture(name='trained', scope='module')
def _trained(corpus, base, tmp_path_factory):
  """A run of twelve steps, and what it printed."""
  workdir = tmp_path_factory.mktemp('trained')
  words = tmp_path_factory.mktemp('tasks') / 'words.jsonl'
  example = {'context': 'self', 'choices': ['def', 'qq', 'a b'], 'label': 0}
  words.write_text(json.dumps(example | {'id': 0}) + '\n')
  evals = evals_config.EvalsConfig(tasks=(f'choice:{words}',))
  _, text = _run(corpus, base, workdir, ema_decay=0.9, evals=evals)
  return workdir, text


@pytest.mark.slow
def test_a_run_says_what_it_trains_and_freezes_a_merged_directory(
  base, trained
):
  workdir, text = trained
  assert re.search(r'frozen parameters, kernels in float\n', text)
  assert re.search(
    r'trained, in adapters of rank 4: \d+\.\d\d% of the model', text
  )
  frozen, own = frozen_format.read(workdir / 'frozen'), frozen_format.read(base)
  assert frozen.manifest.weights_digest != own.manifest.weights_digest
  assert frozen.manifest.lineage == {'init_from': own.manifest.weights_digest}
  assert frozen.manifest.weights == 'average'
  before = frozen_format.leaves_by_path(own.params)
  after = frozen_format.leaves_by_path(frozen.params)
  changed = {n for n in before if not np.array_equal(before[n], after[n])}
  assert changed == {name for name in before if name.endswith('/kernel')}


@pytest.mark.slow
def test_tasks_are_measured_with_the_adapters(trained):
  """Through the plainest port, the frozen average scores the same."""
  workdir, _ = trained
  frozen = frozen_format.read(workdir / 'frozen')
  tokenizer = tiny_models.byte_tokenizer()
  apply = transformer.Transformer(frozen.config).apply
  net = no_network.Network(apply, frozen.params, tokenizer, 16)
  model = ports.Model(
    tokenizer=tokenizer, max_length=16, logprob_fn=net.score, adds_bos=True
  )
  run = json.loads((workdir / 'run.json').read_text())
  result = evaluate.run(run['config']['evals']['tasks'][0], model)
  last = [r for r in metrics.read(workdir) if r['kind'] == 'eval'][-1]
  assert result.score('nll').value == pytest.approx(
    last['choice_words/nll'], rel=1e-4
  )


def test_a_checkpoint_has_the_bytes_of_adapters_alone(base, trained, corpus):
  workdir, _ = trained
  checkpoint = workdir / 'checkpoints' / '12'
  seal = json.loads((checkpoint / 'seal.json').read_text())
  assert set(seal['leaves']) == {'params', 'opt_state', 'average'}
  assert all(
    name.startswith("['adapters']") for name in seal['leaves']['params']
  )
  learner = learner_lib.make(
    tiny_run.tuning(corpus, base, adapter=_adapter()), jax.devices()[:1]
  )
  held = 4 * learner.num_params
  for item in ('params', 'average'):
    files = {n: b for n, b in _files(checkpoint / item).items() if '/d/' in n}
    size = sum(map(len, files.values()))
    # With orbax's own records, which do not grow with the arrays.
    assert held - 8192 < size < held + 65536, (item, size, held)
  assert held + 65536 < 4 * flops.num_params(learner.experiment.model)


@pytest.mark.slow
@pytest.mark.parametrize('kind', KINDS)
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(
  kind, corpus, base, tmp_path
):
  fields = {'adapter': _adapter(**KINDS[kind]), 'ema_decay': 0.9}
  _run(corpus, base, tmp_path / 'whole', **fields)
  for steps in (8, 12):
    # The schedule depends on the number of steps: the run is cut, not shorter.
    _run(corpus, base, tmp_path / 'cut', **fields)
    if steps == 8:
      _cut(tmp_path / 'cut')
  digests = [
    frozen_format.read(tmp_path / name / 'frozen').manifest.weights_digest
    for name in ('whole', 'cut')
  ]
  assert digests[0] == digests[1]


def _cut(workdir):
  """Takes the last checkpoint and the frozen directory out of a run."""
  shutil.rmtree(workdir / 'checkpoints' / '12')
  shutil.rmtree(workdir / 'frozen')


def test_an_adapter_directory_is_the_merged_one_without_its_base(
  base, trained, tmp_path
):
  workdir, _ = trained
  manifest = freeze.freeze_checkpoint(
    workdir, out=tmp_path / 'adapter', merge_adapter=False
  )
  own = frozen_format.read(base)
  adapter = adapters_lib.read(tmp_path / 'adapter', own)
  assert adapter.manifest == manifest
  assert manifest.base_digest == own.manifest.weights_digest
  merged = frozen_format.read(workdir / 'frozen')
  model = transformer.Transformer(own.config)
  tokens = jax.random.randint(jax.random.key(0), (2, 16), 0, 256)
  apply = jax.jit(model.apply)
  adapted, _ = apply({**own.params, 'adapters': adapter.tree}, tokens)
  np.testing.assert_allclose(
    adapted, apply(merged.params, tokens)[0], atol=1e-5, rtol=0
  )
  assert np.abs(adapted - apply(own.params, tokens)[0]).max() > 0.01


def test_a_merge_in_bfloat16_rounds_the_float32_merge_once(trained, tmp_path):
  workdir, _ = trained
  freeze.freeze_checkpoint(workdir, out=tmp_path / 'half', dtype='bfloat16')
  half = frozen_format.read(tmp_path / 'half').params
  exact = frozen_format.read(workdir / 'frozen').params
  jax.tree.map(
    lambda a, b: np.testing.assert_array_equal(a, b.astype(jnp.bfloat16)),
    half,
    exact,
  )


@pytest.mark.slow
@pytest.mark.parametrize('form', ['int8', 'int4'])
def test_a_merge_into_a_quantised_base_is_the_function_that_was_trained(
  form, corpus, base, tmp_path
):
  _, text = _run(corpus, base, tmp_path / 'run', adapter=_adapter(base=form))
  assert f'kernels in {form}; merged into these, dequantised' in text
  logged = [
    json.loads(line)
    for line in (tmp_path / 'run' / 'metrics.jsonl').read_text().splitlines()
  ]
  last = [r for r in logged if r['kind'] == 'eval'][-1]
  # The frozen directory, evaluated as a whole model: no step is taken.
  whole = tiny_run.tuning(corpus, tmp_path / 'run' / 'frozen')
  whole = tiny_run.tuning(corpus, tmp_path / 'run' / 'frozen')
  parts = assemble.assemble(whole, tmp_path / 'run')
  learner = parts.learner
  state = learner.init_with(jax.random.key(0), init_from.read(whole))
  step, put = learner.compile_eval_step(), learner.placement.put_batch
  sums = [step(state.params, put(batch)) for batch in parts.eval_batches]
  total, weight = (sum(float(s[k]) for s in sums) for k in ('loss', 'weight'))
  loss = total / weight
  assert loss == pytest.approx(last['loss'], abs=1e-5)


@pytest.mark.slow
def test_a_run_may_freeze_its_adapters_only(corpus, base, tmp_path):
  apart = experiment_lib.FreezeConfig(merge_adapter=False)
  _, text = _run(corpus, base, tmp_path / 'run', freeze=apart)
  assert 'adapter parameters in 5 files' in text
  digest = frozen_format.read(base).manifest.weights_digest
  assert f'of base {digest} (tiny)' in text
  _, text = _run(corpus, base, tmp_path / 'run', freeze=apart)
  assert 'is complete: step 12' in text
  _, text = _run(corpus, base, tmp_path / 'run')  # asked for otherwise
  assert 'got the directory of an adapter, expected a frozen one' in text
  frozen_format.read(tmp_path / 'run' / 'frozen')


def test_another_base_is_refused(corpus, base, trained, tmp_path):
  workdir, _ = trained
  config = frozen_dirs.config(**_SIZES)
  other = tmp_path / 'other'
  frozen_dirs.write(
    other, config=config, params=frozen_dirs.params(config, seed=1)
  )
  experiment = dataclasses.replace(_experiment(base), init_from=str(other))
  lineage = json.loads((workdir / 'run.json').read_text())['lineage']
  with pytest.raises(ValueError, match='config.init_from: got a base with wei'):
    training_adapters.check_base(experiment, lineage)
  training_adapters.check_base(_experiment(base), lineage)
  freeze.freeze_checkpoint(workdir, out=tmp_path / 'a', merge_adapter=False)
  with pytest.raises(ValueError, match='got an adapter of tiny with weights'):
    adapters_lib.read(tmp_path / 'a', frozen_format.read(other))


def test_another_alpha_is_another_run(corpus, base, trained):
  workdir, _ = trained
  adapter = adapter_config.AdapterConfig(rank=4, alpha=8.0)
  with pytest.raises(
    ValueError, match='got adapter.alpha = 8.0, expected 16.0'
  ):
    _run(corpus, base, workdir, adapter=adapter, ema_decay=0.9, num_steps=14)


@pytest.mark.parametrize(
  ('fields', 'expected'),
  [
    ({'init_from': ''}, "adapter.rank: got 4 with config.init_from = ''"),
    (
      {'execution': experiment_lib.ExecutionConfig(matmul='int8')},
      'execution.matmul: got int8 with adapter.rank = 4, expected float',
    ),
    ({'adapter': _adapter(40)}, 'got 40 for .* expected at most'),
    (
      {'adapter': _adapter(layers='atention')},
      "adapter.layers: got 'atention', which matches no linear layer",
    ),
  ],
)
def test_a_run_that_cannot_be_is_refused(base, fields, expected):
  experiment = dataclasses.replace(_experiment(base), **fields)
  with pytest.raises(ValueError, match=expected):
    learner_lib.make(experiment, jax.devices()[:1])
