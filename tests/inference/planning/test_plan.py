"""Plans of serving against real arrays and the compiler."""

import dataclasses
import re
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from hardware import compile_ahead, peaks, targets
from inference.planning import plan as plan_lib, report, subject
from models import flops, kv_cache
from tests.helpers import commands, frozen_dirs, tiny_models


@pytest.fixture(scope='module')
def model(tmp_path_factory):
  """Returns a frozen directory without its weights."""
  directory = tmp_path_factory.mktemp('plan') / 'tiny'
  frozen_dirs.write(directory)
  shutil.rmtree(directory / 'params')
  return str(directory)


def _plan(config=None, *, dtype='bfloat16', **fields):
  config = config or frozen_dirs.config()
  return plan_lib.Plan(
    **{
      'subject': subject.of_config('tiny', config, dtype),
      'target': 'v5e:2x2',
      'device_kind': 'TPU v5 lite',
      'peaks': peaks.DATASHEETS['TPU v5e'],
      **fields,
    }
  )


def _large():
  """Returns a model whose weights take a third of a v5e."""
  return frozen_dirs.config(
    vocab_size=32_000,
    num_layers=32,
    model_width=2048,
    num_heads=16,
    num_kv_heads=4,
    head_width=128,
    mlp_width=8192,
    max_length=4096,
    scan_layers=True,
  )


def test_only_the_manifest_is_read(model):
  plan = plan_lib.make(subject.of_directory(model))
  assert plan.subject.num_params == flops.num_params(frozen_dirs.config())
  assert plan.weight_bytes == 4 * plan.subject.num_params
  assert plan.compiled is None
  assert f'{plan.subject.num_params:,} parameters, float32' in report.report(
    plan
  )


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_cache_bytes_are_those_of_a_real_cache(dtype):
  plan = _plan(dtype=dtype)
  cache = kv_cache.init(
    plan.config, batch_size=3, length=5, dtype=jnp.dtype(dtype)
  )
  num_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(cache))
  assert plan.kv_bytes_per_token * 3 * 5 == num_bytes


@pytest.mark.parametrize('length', [128, 4096])
def test_one_sequence_more_does_not_fit(length):
  plan = _plan(_large())
  count = plan.num_sequences(length)
  room = plan.peaks.memory_bytes * (1 - plan_lib._MARGIN)
  assert count > 0
  assert plan.bytes_of(count, length) <= room
  assert plan.bytes_of(count + 1, length) > room


def test_a_model_that_does_not_fit_is_told():
  plan = _plan()
  large = dataclasses.replace(plan.subject, num_params=10**11)
  plan = dataclasses.replace(plan, subject=large)
  assert plan.num_sequences(1) == 0
  text = report.report(plan)
  assert 'fits             NO: not the weights and one token' in text


def test_one_sequence_is_bound_by_reading_the_weights():
  plan = _plan(_large())
  # Every weight that multiplies is read once per token.
  expected = 819e9 / (2 * flops.num_matmul_params(plan.config))
  assert plan.tokens_per_s(1, context=0) == pytest.approx(expected)
  assert plan.tokens_per_s(1, context=2048) < expected
  assert plan.tokens_per_s(8, context=0) == pytest.approx(8 * expected)


@pytest.mark.parametrize('context', [0, 64])
def test_compute_binds_from_the_batch_that_the_plan_says(context):
  plan = _plan(_large())
  batch = plan.compute_bound_batch(context)
  assert batch is not None
  per_token = flops.forward_flops_per_token(plan.config, context) / 197e12

  def is_bound(size):
    return plan.step_seconds(size, context) == pytest.approx(size * per_token)

  assert is_bound(batch)
  assert not is_bound(batch - 1)


def test_prompts_beside_answers_are_free_up_to_a_number_of_tokens():
  plan = _plan(_large())
  least = plan.least_prompts(8, 64, 1.5)
  alone = plan.step_seconds(8, 64)
  assert plan.step_seconds(8, 64, 1) < 1.1 * alone
  assert plan.step_seconds(8, 64, least - 1) < 1.5 * alone
  assert plan.step_seconds(8, 64, least) >= 1.5 * alone
  per_token = flops.forward_flops_per_token(plan.config, 512) / 197e12
  assert plan.prompt_tokens_per_s(1024) == pytest.approx(1 / per_token)


def test_engines_for_prompts_are_told_where_there_is_room_for_one():
  plan = _plan(_large())
  assert 'prefill apart' not in report.report(plan)
  text = report.report(dataclasses.replace(plan, num_devices=2))
  assert 'prefill apart    a step of ' in text
  assert '--engine.prefill_engines=1 keeps that time' in text


def test_long_caches_are_never_compute_bound():
  plan = _plan(_large())
  assert plan.compute_bound_batch(context=100_000) is None
  assert 'compute-bound never' in report.report(
    _plan(dataclasses.replace(plan.config, max_length=200_000))
  )


def test_a_mixture_reads_the_experts_that_are_taken():
  config = dataclasses.replace(
    _large(),
    mlp_width=0,
    num_experts=16,
    num_active_experts=2,
    expert_width=1024,
  )
  plan = _plan(config)
  one, many = (plan.step_bytes(batch, context=0) for batch in (1, 10_000))
  assert one == 2 * flops.num_matmul_params(config)
  # With many tokens, all of them; the embedding of the input is looked up.
  lookup = config.vocab_size * config.model_width
  norms = (2 * config.num_layers + 1) * config.model_width
  assert many == pytest.approx(2 * (plan.subject.num_params - lookup - norms))


def test_the_compilers_memory_stands_beside_the_formula():
  plan = _plan()
  program = compile_ahead.Program(
    arguments=2**30,
    outputs=2**29,
    temporaries=2**28,
    aliased=2**29,
    peak=2**31,
    traffic=compile_ahead.hlo.Traffic(
      collectives=(), memory_bytes=1.0, unknown=()
    ),
  )
  text = report.report(
    dataclasses.replace(plan, compiled=program, compiled_sequences=4)
  )
  assert '4 sequences of 64: 2 GiB at its peak' in text
  refused = compile_ahead.OutOfMemory(needed=2**31, available=2**30, message='')
  text = report.report(
    dataclasses.replace(plan, compiled=refused, compiled_sequences=4)
  )
  assert 'needs 2 GiB of 1 GiB: DOES NOT FIT' in text


def _run(*flags):
  return subprocess.run(
    [sys.executable, 'serve.py', *flags],
    env=tiny_models.subprocess_env(),
    capture_output=True,
    text=True,
    check=False,
    timeout=300,
  )


def test_serve_plans(model):
  done = _run(f'--model={model}', '--plan')
  assert (done.returncode, done.stderr) == (0, '')
  assert re.search(r'weights +\S+ KiB', done.stdout)
  assert re.search(r'[\d,.e+]+ tokens/s with 1 \(alone\)', done.stdout)


def test_a_bad_target_is_one_line(model):
  done = commands.run('serve.py', f'--model={model}', '--plan=v9:4')
  assert done.returncode == 2
  (line,) = done.stderr.splitlines()
  assert line.startswith("error: --plan: got the unknown target 'v9:4'")


@pytest.mark.slow
@pytest.mark.parametrize('target', ['v5e:2x2', 'h100:1'])
def test_the_decode_step_is_compiled_for_a_device_that_is_not_here(
  model, target, monkeypatch
):
  pytest.importorskip('libtpu')
  pytest.importorskip('jax_cuda13_plugin')
  for name, value in targets._ENVIRONMENT.items():
    monkeypatch.setenv(name, value)
  plan = plan_lib.make(subject.of_directory(model), target)
  assert isinstance(plan.compiled, compile_ahead.Program)
  cache = plan.kv_bytes_per_token * 64 * plan.compiled_sequences
  assert plan.compiled.arguments >= plan.weight_bytes + cache
  assert plan.compiled.aliased >= cache  # written in place
