"""Engines over several real processes: the bits of one process."""

import json
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from frozen import draft_heads
from inference import generate
from inference.engine import engine_config
from models import layout
from tests.helpers import commands, frozen_dirs, tiny_models
from tests.helpers.open_weights import stored_params
from tests.helpers.serving import shared_engine, trained_heads
from tests.helpers.training import tiny_adapters

TIMEOUT_S = 600
pytestmark = pytest.mark.slow  # processes start and compile


def _free_port():
  with socket.socket() as listener:
    listener.bind(('127.0.0.1', 0))
    return listener.getsockname()[1]


def _run(commands_of, *, num_devices):
  """Runs processes to their ends; returns exit codes and what they printed."""
  running = [
    subprocess.Popen(
      [sys.executable, *each],
      cwd=commands.ROOT,
      env=tiny_models.subprocess_env(num_devices=num_devices),
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
    )
    for each in commands_of
  ]
  try:
    texts = [each.communicate(timeout=TIMEOUT_S)[0] for each in running]
  finally:
    for each in running:
      each.kill()
  return [each.returncode for each in running], texts


def _answers(model, out, *, count, **fields):
  """Returns the results of processes that share `tensor` devices."""
  port = _free_port()
  codes, texts = _run(
    [
      [
        *('-m', 'tests.helpers.serving.shared_engine'),
        *map(str, (model, out, port, count, index)),
        json.dumps(fields),
      ]
      for index in range(count)
    ],
    num_devices=fields['tensor'] // count,
  )
  assert codes == [0] * count, '\n'.join(texts)
  return json.loads(out.read_text())


def _write_drafts(path, config, params, manifest):
  """Writes a model and a head that guess as a model does, now and then."""
  rng = np.random.default_rng(1)
  noisy = jax.tree.map(
    lambda x: jnp.asarray(x + 0.05 * rng.normal(size=x.shape), x.dtype), params
  )
  frozen_dirs.write(path / 'model', config=config, params=noisy)
  separate, unstacked = layout.unstack(params, config)
  trained = trained_heads.weights(unstacked, separate, num_steps=40)
  draft_heads.write(
    path / 'head',
    trained.head,
    base_digest=manifest.weights_digest,
    num_ids=trained.num_ids,
    provenance=frozen_dirs.provenance(),
    texts={},
  )
  return {
    kind: {
      'speculation': kind,
      'draft_tokens': num_tokens,
      f'draft_{kind}': str(path / kind),
    }
    for kind, num_tokens in (('model', 3), ('head', 1))
  }


def test_two_processes_answer_with_the_bits_of_one(tmp_path):
  """2 x 4 devices in invariant numerics, and one device of this process.

  With look-ups, a model and a head that draft, and with prompts that are
  computed on half of the devices of each process.
  """
  config = frozen_dirs.config(
    num_layers=1, num_heads=9, num_kv_heads=3, scan_layers=True
  )
  model = tmp_path / 'target'
  params = frozen_dirs.params(config)
  manifest = frozen_dirs.write(model, config=config, params=params)
  alone = generate.load(
    model,
    engine_config.EngineConfig(
      **shared_engine.LAYOUT, numerics='invariant', tensor_parts=8
    ),
  )
  expected = shared_engine.answers(alone, has_grammars=True)
  found = _answers(
    model,
    tmp_path / 'out',
    count=2,
    tensor=8,
    numerics='invariant',
    texts=shared_engine.texts(alone, expected),
    more={
      **_write_drafts(tmp_path, config, params, manifest),
      'apart': {'tensor': 4, 'tensor_parts': 8, 'prefill_engines': 1},
    },
  )
  assert found['answers'] == expected
  assert found['digest'] == manifest.weights_digest
  assert min(found['metrics'].values()) > 0, found['metrics']
  for kind in ('model', 'head', 'apart'):
    each = found[kind]
    assert each['answers'] == expected[:-1], kind  # without the grammar
    assert each['digest'] == manifest.weights_digest
    if kind != 'apart':
      assert min(each['metrics'].values()) > 0, (kind, each['metrics'])
  assert found['apart']['apart'] > 0


def test_a_mixture_in_fast_numerics_has_the_bits_of_the_same_devices(tmp_path):
  """Both sum over devices by gloo, see `parallel.processes`."""
  config = frozen_dirs.config(
    num_layers=1,
    mlp_width=0,
    num_experts=4,
    num_active_experts=2,
    expert_width=32,
  )
  params = stored_params.stored(frozen_dirs.params(config), 'int4')
  frozen_dirs.write(tmp_path / 'model', config=config, params=params)
  tiny_adapters.write(tmp_path / 'adapter', tmp_path / 'model', seed=1, rank=3)
  fields = {
    'tensor': 2,
    'experts': 2,
    'constraints': False,
    # Which sequences share a step decides the bits of fast numerics: it must
    # not depend on times.
    'speculation': 'off',
    'stream_seconds': 0,
    'adapters': {'own': str(tmp_path / 'adapter')},
  }
  one, two = (
    _answers(tmp_path / 'model', tmp_path / str(count), count=count, **fields)
    for count in (1, 2)
  )
  assert one['answers'] == two['answers']
  assert one['digest'] == two['digest']
  # Process 0 reads the adapter, and sends it.
  assert one['adapted'] == two['adapted']
  assert one['adapted']['own'] != one['answers']


def test_processes_with_other_weights_are_refused(tmp_path):
  """By the command, in both processes, before anything is compiled twice."""
  config = frozen_dirs.config(num_layers=1)
  models = [tmp_path / str(index) / 'model' for index in range(2)]
  digests = []
  for seed, model in enumerate(models):
    model.parent.mkdir()
    params = frozen_dirs.params(config, seed=seed)
    written = frozen_dirs.write(model, config=config, params=params)
    digests.append(written.weights_digest[:16])
  port = _free_port()
  codes, texts = _run(
    [
      [
        *('serve.py', f'--model={model}', '--prompt=a', '--engine.tensor=2'),
        *(f'--coordinator=127.0.0.1:{port}', '--num_processes=2'),
        f'--process_id={index}',
      ]
      for index, model in enumerate(models)
    ],
    num_devices=1,
  )
  assert codes == [2, 2], '\n'.join(texts)
  error = (
    f'{models[1]}: got weights {digests[1]}, expected those of process 0,'
    f' {digests[0]}; give all processes the same frozen directory'
  )
  assert f'error: process 1: {error}' in texts[0]
  assert f'error: {error}' in texts[1]
