"""Plans against the arrays, and the compiler, that they speak of."""

import dataclasses
import math
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from data import data_config
from hardware import compile_ahead, hlo, targets
from models import flops, transformer
from parallel import parallel_config
from tests.helpers import commands, tiny_models
from training import experiment as experiment_lib, learner as learner_lib
from training.optimizer import chain, update_rules
from training.planning import memory, plan as plan_lib, remedy as remedy_lib


def _experiment(*, parallel=None, remat='none', model=None, **fields):
  return experiment_lib.Experiment(
    name='tiny',
    model=model or tiny_models.llama_like(scan_layers=True, vocab_size=64),
    data=data_config.DataConfig(row_length=32, batch_size=16),
    optimizer=chain.OptimizerConfig(warmup_steps=1),
    parallel=parallel_config.ParallelConfig(**(parallel or {})),
    execution=experiment_lib.ExecutionConfig(remat=remat),
    **({'num_steps': 10} | fields),
  )


@pytest.mark.parametrize(
  'name',
  [
    'adamw',
    *(
      pytest.param(name, marks=pytest.mark.slow)
      for name in ('muon', 'adafactor', 'lion', 'ademamix')
    ),
  ],
)
def test_state_bytes_are_those_of_a_real_state(name):
  parallel = {'stage': 2, 'fsdp': 2, 'tensor': 2}
  experiment = _experiment(parallel=parallel)
  # With the default, matrices of this size would be kept whole, as AdamW's are.
  fields = {'min_factored_size': 4} if name == 'adafactor' else {}
  experiment.optimizer.rule = update_rules.RULES[name](**fields)
  learner = learner_lib.make(experiment)
  state = learner.init(jax.random.key(0))
  device = learner.placement.devices[0]

  def on_device(tree):
    return sum(
      shard.data.nbytes
      for leaf in jax.tree.leaves(tree)
      for shard in leaf.addressable_shards
      if shard.device == device
    )

  planned = memory.estimate(learner)
  assert planned.params == on_device(state.params)
  assert planned.optimizer == on_device(state.opt_state)


@pytest.mark.slow
@pytest.mark.parametrize('parallel', [{'fsdp': 8}, {'fsdp': 4, 'tensor': 2}])
def test_the_update_of_muon_is_in_the_formula(parallel):
  """Against the compiler, where parameters are nearly all there is."""
  model = tiny_models.llama_like(
    scan_layers=True,
    vocab_size=1024,
    num_layers=8,
    model_width=256,
    num_heads=8,
    num_kv_heads=8,
    head_width=32,
    mlp_width=1024,
  )
  experiment = _experiment(
    parallel=parallel, model=model, remat='full', compute_dtype='bfloat16'
  )
  experiment.optimizer.rule = update_rules.Muon()
  learner = learner_lib.make(experiment)
  compiled = learner.placement.lower_train(
    learner.build_train_step, learner.batch_shapes()
  ).compile()
  found = compiled.memory_analysis()
  assert found is not None
  needed = found.argument_size_in_bytes + found.temp_size_in_bytes
  planned = memory.estimate(learner)
  assert planned.update == max(planned.phases.values())
  # XLA:CPU does not order what it computes to save memory, as others do; all
  # layers of a stack at once would be several times as much.
  assert planned.total == pytest.approx(needed, rel=0.25)


def test_full_remat_keeps_the_input_of_a_layer_and_nothing_else():
  experiment = _experiment(compute_dtype='bfloat16')
  sizes = dict.fromkeys(parallel_config.AXES, 1)
  (kept,) = memory.residuals(experiment, sizes, 'full', is_fused=True)
  assert kept.shape == (16, 32, experiment.model.model_width)
  assert kept.dtype == jnp.bfloat16


@pytest.mark.parametrize('is_fused', [True, False])
def test_more_remat_keeps_less(is_fused):
  experiment = _experiment()
  sizes = dict.fromkeys(parallel_config.AXES, 1)
  none, minimal, full = (
    sum(
      math.prod(leaf.shape)
      for leaf in memory.residuals(experiment, sizes, policy, is_fused)
    )
    for policy in ('none', 'minimal', 'full')
  )
  assert none > minimal > full > 0


def test_a_kernel_keeps_no_scores():
  experiment = _experiment()
  sizes = dict.fromkeys(parallel_config.AXES, 1)
  shapes = {
    leaf.shape[-2:]
    for leaf in memory.residuals(experiment, sizes, 'none', is_fused=True)
  }
  assert (32, 32) not in shapes


@pytest.mark.parametrize('axis', ['fsdp', 'tensor', 'context'])
def test_splitting_a_layer_splits_what_it_keeps(axis):
  model = tiny_models.llama_like(scan_layers=True, vocab_size=64)
  whole, half = (
    memory.estimate(
      learner_lib.make(
        _experiment(model=model, parallel=parallel),
        jax.devices()[: math.prod(parallel.values())],
      )
    )
    for parallel in ({'data': 1}, {'data': 1, axis: 2})
  )
  assert half.saved < 0.8 * whole.saved
  assert half.total < whole.total


def test_accumulation_holds_the_gradients_twice_and_fewer_tokens():
  one, two = (
    memory.estimate(learner_lib.make(_experiment(num_microbatches=parts)))
    for parts in (1, 2)
  )
  assert two.gradients == 2 * one.gradients
  # But for a few vectors as wide as the model, which have no tokens.
  assert two.saved == pytest.approx(one.saved / 2, rel=1e-2)


def test_the_figures_of_a_plan_follow_from_each_other():
  plan = plan_lib.make(
    _experiment(), assumed_mfu=0.5, price_per_device_hour=3.0
  )
  assert plan.tokens == 10 * 16 * 32
  assert plan.flops == plan.tokens * plan.flops_per_token
  rate = 8 * plan.peak_flops_per_s * 0.5
  assert plan.step_seconds * 10 == pytest.approx(plan.flops / rate)
  assert plan.device_hours == pytest.approx(8 * plan.flops / rate / 3600)
  assert plan.cost == pytest.approx(3 * plan.device_hours)
  assert plan.fits
  text = plan_lib.report(plan)
  for told in (
    f'parameters       {plan.num_params:,}',
    '10 steps, 5.120e+03 tokens',
    'at 50.0% MFU (assumed, --plan_mfu)',
    'at 3 per device-hour',
    'Hoffmann et al. 2022',
    'Besiroglu et al. 2024',
  ):
    assert told in text


def _with_compiled(plan, compiled, memory_bytes=2**30):
  peaks = dataclasses.replace(
    plan.peaks, memory_bytes=memory_bytes, link_bytes_per_s=1e9
  )
  return dataclasses.replace(plan, compiled=compiled, peaks=peaks)


def _program(*, peak, memory_bytes=1e9):
  reduced = hlo.Collective(
    kind='all-reduce', num_devices=8, payload_bytes=10**6, count=4
  )
  return compile_ahead.Program(
    arguments=100,
    outputs=90,
    temporaries=50,
    aliased=80,
    peak=peak,
    traffic=hlo.Traffic(
      collectives=(reduced,), memory_bytes=memory_bytes, unknown=('loop.7',)
    ),
  )


def test_the_compiler_is_believed_over_the_formula():
  plan = _with_compiled(plan_lib.make(_experiment()), _program(peak=2**31))
  assert plan.memory.total < 2**30 < plan.memory_needed
  assert not plan.fits
  assert _program(peak=0).in_use == 100 + 90 - 80 + 50
  text = plan_lib.report(plan)
  assert '2 GiB at its peak: formula' in text
  assert 'all-reduce     4 times, 6.68 MiB sent' in text
  assert 'unknown        loop.7' in text
  assert re.search(r'fits +NO', text)


def test_gaps_in_memory_have_to_fit_too():
  plan = plan_lib.make(_experiment())
  gaps = dataclasses.replace(_program(peak=10), temporaries=2**31)
  assert not _with_compiled(plan, gaps).fits
  assert _with_compiled(plan, _program(peak=10)).fits


def test_the_roofline_lowers_what_is_expected():
  plan = plan_lib.make(_experiment())
  slow = _with_compiled(plan, _program(peak=1, memory_bytes=1e12))
  assert slow.roofline.binds == 'HBM'
  assert slow.mfu == slow.best_mfu < plan.mfu
  assert slow.step_seconds == pytest.approx(slow.roofline.seconds)
  assert '(at the roofline)' in plan_lib.report(slow)


@pytest.mark.parametrize('remat', ['none', 'full'])
def test_recomputing_costs_a_third_of_the_products(remat):
  plan = _with_compiled(
    plan_lib.make(_experiment(remat=remat)), _program(peak=1)
  )
  products = plan.tokens_per_step * plan.flops_per_token / 8
  expected = products * {'none': 1, 'full': 4 / 3}[remat]
  assert plan.roofline.compute == pytest.approx(
    expected / plan.peak_flops_per_s
  )


def test_a_refusal_is_a_plan_and_not_a_traceback():
  refused = compile_ahead.OutOfMemory(
    needed=3 * 2**30, available=2**30, message='RESOURCE_EXHAUSTED'
  )
  plan = _with_compiled(plan_lib.make(_experiment()), refused)
  assert plan.fits is False
  assert plan.roofline is None
  text = plan_lib.report(plan)
  assert 'needs 3 GiB of 1 GiB: DOES NOT FIT' in text
  assert 'fix            none found; take more devices' in text


def test_changes_come_cheapest_first_and_are_flags():
  experiment = _experiment()
  changes = [flags for flags, _ in remedy_lib.candidates(experiment, 8)]
  assert changes[0] == ('--config.execution.remat=minimal',)
  assert changes[1] == ('--config.execution.remat=full',)
  assert ('--config.num_microbatches=2',) in changes
  assert ('--config.parallel.data=1', '--config.parallel.fsdp=8') in changes
  for flags, changed in remedy_lib.candidates(experiment, 8):
    argv = ['train.py', *flags]
    assert len(set(argv)) == len(argv)
    assert changed != experiment
    assert changed.model == experiment.model


@pytest.mark.slow
def test_the_smallest_change_that_fits_is_found(monkeypatch):
  monkeypatch.setattr(remedy_lib, '_splits', lambda *_: [(0, {})])
  monkeypatch.setattr(remedy_lib, '_MOST_DOUBLINGS', 1)
  experiment = _experiment()
  plan = plan_lib.make(experiment)
  totals = {
    flags: memory.estimate(learner_lib.make(changed)).total
    for flags, changed in remedy_lib.candidates(experiment, 8)
  }
  # Room for the second cheapest, and for nothing that is cheaper.
  flags = ('--config.execution.remat=full',)
  assert totals[flags] < totals['--config.execution.remat=minimal',]

  def of_size(memory_bytes):
    peaks = dataclasses.replace(plan.peaks, memory_bytes=memory_bytes)
    small = dataclasses.replace(plan, peaks=peaks)
    monkeypatch.setattr(plan_lib, 'make', lambda *_, **__: small)
    return remedy_lib.make(experiment)

  remedy = of_size(totals[flags] / (1 - remedy_lib._MARGIN)).remedy
  # The plan itself has no margin to keep.
  if remedy is None:
    remedy = remedy_lib._remedy(
      of_size(totals[flags] / (1 - remedy_lib._MARGIN))
    )
  assert remedy == plan_lib.Remedy(
    flags=flags, bytes=totals[flags], is_confirmed=False
  )
  assert of_size(1).remedy is None


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    ({'assumed_mfu': 0.0}, '--plan_mfu: got 0.0, expected a share of the peak'),
    ({'assumed_mfu': 40.0}, '--plan_mfu: got 40.0, expected a share'),
    (
      {'price_per_device_hour': -1.0},
      '--price_per_device_hour: got -1.0, expected a number >= 0',
    ),
    (
      {'price_per_device_hour': math.nan},
      '--price_per_device_hour: got nan, expected a number >= 0',
    ),
    ({'target_name': 'v9:2'}, "--plan: got the unknown target 'v9:2'"),
  ],
)
def test_what_cannot_be_planned_with_is_refused(options, message):
  with pytest.raises(ValueError, match=re.escape(message)):
    plan_lib.make(_experiment(), **options)


def test_a_mesh_that_is_not_the_target_is_refused(monkeypatch):
  pytest.importorskip('libtpu')
  for name, value in targets._ENVIRONMENT.items():
    monkeypatch.setenv(name, value)
  with pytest.raises(ValueError, match='expected the number of devices, 8'):
    plan_lib.make(_experiment(parallel={'data': 3}), 'v5e:2x4')


def test_a_mesh_that_is_not_here_is_refused_with_a_way_out():
  with pytest.raises(
    ValueError,
    match=r'devices, 8; .* or plan for other devices, as in --plan=v5p:4x4x4',
  ):
    plan_lib.make(_experiment(parallel={'data': 3}))


def test_pmap_is_planned_for_here_and_refused_elsewhere():
  experiment = _experiment(parallel={'kind': 'pmap'})
  plan = plan_lib.make(experiment)
  assert plan.memory.total > 0
  assert '8 x cpu (here), data 8' in plan_lib.report(plan)
  with pytest.raises(ValueError, match='parallel.kind: got pmap with --plan'):
    plan_lib.compile_step(learner_lib.make(experiment))


def _unrolled():
  return tiny_models.llama_like(
    vocab_size=256,
    model_width=128,
    num_heads=4,
    num_kv_heads=2,
    head_width=32,
    mlp_width=320,
    max_length=32,
    scan_layers=False,
  )


def _compiler_flops(f, *args):
  cost = jax.jit(f).lower(*args).cost_analysis()
  return cost['flops']


def test_flops_of_the_forward_pass_are_those_the_compiler_counts():
  """Unrolled: the body of a loop would be counted once."""
  config = _unrolled()
  model = transformer.Transformer(config)
  tokens_BT = jax.ShapeDtypeStruct((4, 32), jnp.int32)
  params = jax.eval_shape(model.init, jax.random.key(0), tokens_BT)
  counted = _compiler_flops(model.apply, params, tokens_BT)
  # A row of one block computes all its scores, the upper triangle too.
  analytic = 4 * 32 * flops.forward_flops_per_token(config, context=32)
  # The compiler counts elementwise work besides: norms, rotations, softmax and
  # activations are about 60 operations per channel, next to 2 x 128 or more of
  # the products that made it.
  assert 1.0 <= counted / analytic < 1.08


def test_flops_of_the_train_step_are_those_the_compiler_counts():
  config = _unrolled()
  experiment = _experiment(model=config)
  learner = learner_lib.make(experiment, jax.devices()[:1])
  lowered = learner.placement.lower_train(
    learner.build_train_step, learner.batch_shapes()
  )
  counted = lowered.cost_analysis()['flops']
  tokens = 16 * 32
  analytic = tokens * 3 * flops.forward_flops_per_token(config, context=32)
  # As above; AdamW adds some 20 operations per parameter and step, here next
  # to 6 per parameter and token of 512: under one per cent.
  assert 1.0 <= counted / analytic < 1.10
  assert learner.flops_per_token * tokens < analytic


def _run(*flags):
  return subprocess.run(
    [sys.executable, 'train.py', *flags],
    env=tiny_models.subprocess_env(),
    capture_output=True,
    text=True,
    check=False,
    timeout=300,
  )


@pytest.mark.slow
def test_plan_needs_neither_workdir_nor_data(tmp_path):
  done = _run(
    '--config=experiments/pretrain_files.py:jsonl',
    '--plan',
    '--price_per_device_hour=2',
    f'--config.data.path={tmp_path}/none.jsonl',
  )
  assert done.returncode == 0, done.stderr
  assert done.stderr == ''
  assert 'experiment       pretrain_jsonl' in done.stdout
  assert '1 x cpu (here)' in done.stdout
  assert 'at 2 per device-hour' in done.stdout


@pytest.mark.parametrize(
  ('flag', 'message'),
  [
    ('--plan=v9:4', "error: --plan: got the unknown target 'v9:4', expected"),
    ('--plan_mfu=2', 'error: --plan_mfu: got 2.0, expected a share'),
  ],
)
def test_a_bad_plan_is_one_line(flag, message):
  done = commands.run(
    'train.py', '--config=experiments/quickstart.py', '--plan', flag
  )
  assert done.returncode == 1
  (line,) = done.stderr.splitlines()
  assert line.startswith(message)


@pytest.mark.slow
def test_a_step_is_compiled_for_a_tpu_that_is_not_here(monkeypatch):
  pytest.importorskip('libtpu')
  for name, value in targets._ENVIRONMENT.items():
    monkeypatch.setenv(name, value)
  experiment = _experiment(
    parallel={'fsdp': 4}, compute_dtype='bfloat16', remat='full'
  )
  plan = plan_lib.make(experiment, 'v5e:2x2')
  assert isinstance(plan.compiled, compile_ahead.Program)
  assert plan.fits
  # The state is donated: all of it is updated in place.
  assert plan.compiled.aliased >= plan.memory.params + plan.memory.optimizer
  assert plan.compiled.traffic.unknown == ()
  assert plan.compiled.traffic.sent_bytes > 0
  assert np.isfinite(plan.step_seconds)


@pytest.mark.slow
def test_what_does_not_fit_a_tpu_is_told_with_a_remedy_that_does(monkeypatch):
  pytest.importorskip('libtpu')
  for name, value in targets._ENVIRONMENT.items():
    monkeypatch.setenv(name, value)
  # 64 rows of 4096 tokens of 24 layers are some 100 GB of activations.
  model = tiny_models.llama_like(
    scan_layers=True,
    vocab_size=512,
    model_width=512,
    num_layers=24,
    num_heads=4,
    num_kv_heads=4,
    head_width=128,
    mlp_width=2048,
    max_length=4096,
  )
  experiment = dataclasses.replace(
    _experiment(model=model, compute_dtype='bfloat16'),
    data=data_config.DataConfig(row_length=4096, batch_size=64),
  )
  plan = remedy_lib.make(experiment, 'v5e:2x2')
  assert isinstance(plan.compiled, compile_ahead.OutOfMemory)
  assert plan.compiled.needed > plan.compiled.available > 15 * 2**30
  assert plan.remedy is not None
  assert plan.remedy.is_confirmed
  assert plan.remedy.bytes < plan.compiled.available


def test_help_does_not_wait_for_jax():
  done = subprocess.run(
    [sys.executable, '-X', 'importtime', 'train.py', '--help'],
    env=tiny_models.subprocess_env(),
    capture_output=True,
    text=True,
    check=False,
    timeout=60,
  )
  assert '--plan' in done.stdout
  assert '--price_per_device_hour' in done.stdout
  assert ' jax' not in done.stderr
