"""Serving kernels in fewer bits: one function, no float copy of a kernel."""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from frozen import (
  adapters as frozen_adapters,
  format as frozen_format,
  stored_kernels,
)
from inference import full_forward, generate, model_port
from inference.engine import (
  adapter_table,
  device_state,
  engine as engine_lib,
  execution,
  inputs as inputs_lib,
  steps,
)
from inference.engine.compiled import layered
from inference.planning import plan as plan_lib, report, subject
from inference.requests import requests
from inference.sampling import settings as settings_lib
from inference.server.versions import memory
from models import kv_cache, transformer
from models.layers import reward_head
from models.linear.stored import kernel as kernel_lib, product
from tests.helpers import commands, frozen_dirs, tiny_models
from tests.helpers.open_weights import stored_params
from tests.helpers.training import tiny_adapters
from tests.inference import conftest as life_two

_IDS = [256, *b'the weights say this, and nothing else does; read on']
_GREEDY = settings_lib.Settings(
  temperature=0.0, max_tokens=12, logprobs=0, ignore_eos=True
)
_SCHEMES = ['int8', 'int4', 'uint4', 'nf4', 'fp8', 'mxfp4', 'nvfp4']
# Blocks of 16 columns: every matrix and table of the tiny models has several.
_BLOCK_BYTES = 16 * 64 * 4


def _config(**fields):
  sizes = {'model_width': 64, 'mlp_width': 96, 'head_width': 16}
  return frozen_dirs.config(**{**sizes, **fields})


def _mixture(**fields):
  sizes = {'mlp_width': 0, 'num_experts': 8, 'num_active_experts': 2}
  sizes |= {'expert_width': 48, 'num_shared_experts': 1, 'norm_topk': True}
  return _config(**sizes, **fields)


def _params(scheme, config, dtype='float32'):
  return stored_params.stored(frozen_dirs.params(config, dtype=dtype), scheme)


def _mixed(config):
  """Returns variables whose layers have kernels of different forms."""
  floats = frozen_dirs.params(config)
  tree = stored_params.stored(floats, 'Q8_0')['params']
  other = stored_params.stored(floats, 'int4')['params']
  tree = {**tree, 'layer_0': other['layer_0']}
  tree['layer_1']['mlp']['down'] = floats['params']['layer_1']['mlp']['down']
  return {'params': tree}


@pytest.fixture(params=['whole', 'blocks'])
def _in_blocks(request, monkeypatch):
  if request.param == 'blocks':
    monkeypatch.setattr(product, '_BLOCK_BYTES', _BLOCK_BYTES)


def _logits(params, config, ids):
  model = transformer.Transformer(config)
  tokens = np.asarray([ids], np.int32)
  return np.asarray(model.apply(params, tokens)[0][0])


@pytest.mark.slow
@pytest.mark.parametrize('scheme', [*_SCHEMES, 'ordered', 'Q8_0'])
@pytest.mark.usefixtures('_in_blocks')
def test_a_pass_is_that_of_the_whole_kernels(scheme):
  for config in (
    _config(),
    _config(scan_layers=True, tie_embeddings=True),
  ):
    params = _params(scheme, config)
    expected = _logits(stored_params.whole(params), config, _IDS)
    found = _logits(params, config, _IDS)
    # Sums of 64 to 96 numbers in another order, through two layers.
    np.testing.assert_allclose(
      found, expected, atol=2e-5 * np.abs(expected).max(), rtol=0
    )


@pytest.mark.slow
@pytest.mark.parametrize('scheme', ['int8', 'int4', 'Q8_0'])
@pytest.mark.usefixtures('_in_blocks')
def test_prefill_and_decode_steps_are_the_whole_pass(scheme):
  config = _config()
  params = _params(scheme, config)
  model = transformer.Transformer(config)
  tokens = np.asarray([_IDS[:16]], np.int32)
  whole, _ = model.apply(params, tokens)
  cache = kv_cache.init(config, batch_size=1, length=16)
  step, found = jax.jit(model.apply), []
  for part in (slice(0, 9), *(slice(n, n + 1) for n in range(9, 16))):
    positions = np.arange(16)[None, part]
    logits, cache = step(params, tokens[:, part], positions, cache)
    found.append(logits)
  bound = 2e-5 * np.abs(whole).max()
  np.testing.assert_allclose(
    jnp.concatenate(found, axis=1), whole, atol=bound, rtol=0
  )


def _answer(engine, **fields):
  request = requests.Request(
    prompt_ids=tuple(_IDS[:30]), settings=_GREEDY, **fields
  )
  *_, (_, update) = engine.answer([request])
  assert update.completion
  return update.completion


def _engine(config, params, **overrides):
  return engine_lib.Engine(
    config,
    params,
    tokenizer=tiny_models.byte_tokenizer(),
    weights_digest='d',
    config=dataclasses.replace(life_two.ENGINE, **overrides),
  )


@pytest.mark.slow
@pytest.mark.parametrize('scheme', ['int8', 'nvfp4', 'ordered', 'mixed'])
def test_the_engine_answers_as_the_full_forward(scheme):
  config = _config()
  params = _mixed(config) if scheme == 'mixed' else _params(scheme, config)
  done = _answer(_engine(config, params))
  ids = [*_IDS[:30], *done.token_ids]
  floats = stored_params.whole(params)
  logits = _logits(floats, config, ids)[29:-1, :259]
  assert list(done.token_ids) == logits.argmax(axis=-1).tolist()
  forward = full_forward.FullForward(
    params, config, dtype='float32', vocab_size=259
  )
  recorded = [each.chosen for each in done.logprobs or ()]
  np.testing.assert_allclose(forward.logprobs(ids, 30), recorded, atol=2e-3)


@pytest.mark.slow
@pytest.mark.parametrize('native', ['auto', 'off'])
@pytest.mark.parametrize('config', [_config(), _mixture()], ids=['mlp', 'moe'])
def test_invariant_numerics_have_the_bits_of_the_full_forward(
  monkeypatch, native, config
):
  monkeypatch.setattr(product, '_BLOCK_BYTES', _BLOCK_BYTES)
  params = _params('int4', config)
  engine = _engine(config, params, numerics='invariant', native=native)
  done = _answer(engine)
  if config.num_experts:  # in a crowd experts have rows of other sequences
    crowd = [
      requests.Request(prompt_ids=tuple(ids[:30]), settings=_GREEDY)
      for ids in (_IDS, _IDS[9:], _IDS[2:24])
    ]
    updates = [
      (number, update) for number, update in engine.answer(crowd)
      if update.completion
    ]  # fmt: skip
    assert len(updates) == 3
    together = updates[[number for number, _ in updates].index(0)][1]
    assert together.completion.logprobs == done.logprobs
  ids = [*_IDS[:30], *done.token_ids]
  forward = full_forward.FullForward(
    params,
    config,
    dtype='float32',
    vocab_size=259,
    is_invariant=True,
    stored=engine.backend.execution.stored,
  )
  recorded = [each.chosen for each in done.logprobs or ()]
  assert forward.logprobs(ids, 30).tolist() == recorded


@pytest.mark.slow
def test_layers_of_different_forms_are_different_programs():
  config = _config(num_layers=4)
  floats = frozen_dirs.params(config)
  tree = dict(stored_params.stored(floats, 'int8')['params'])
  tree['layer_2'] = stored_params.stored(floats, 'nf4')['params']['layer_2']
  params = {'params': tree}
  model, state, inputs = _step(config, 'float32')
  args = params, state.kv_cache, state.slots.last_B, inputs
  lowered = layered.lower(*args, model=model, vocab_size=259)
  assert len(lowered.layers) == 2
  expected = steps.decode_step(*args, model=model, vocab_size=259)[1]
  _, found, *_ = lowered.compile()(params, *_args(config))
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), found, expected
  )


def _args(config):
  _, state, inputs = _step(config, 'float32')
  return state.kv_cache, state.slots.last_B, inputs


def _step(config, dtype):
  """Returns a model, the state of an engine, and inputs of two decodes."""
  backend = execution.choose(life_two.ENGINE, config, jnp.dtype(dtype), 'cpu')
  model = transformer.Transformer(config, jnp.dtype(dtype), backend.execution)
  state = device_state.init_state(
    model,
    num_slots=2,
    num_pages=5,
    page_size=16,
    kv_dtype=backend.kv_dtype,
    channels=backend.channels,
    vocab_size=config.vocab_size,
  )
  _, inputs = inputs_lib.empty(
    inputs_lib.Layout(2, 0, 16, 4, 2), padding_slot=2
  )
  inputs.tokens_T[:] = 7
  inputs.decode_table_DL[:, 0] = 1, 2
  return model, state, inputs


@pytest.mark.fast_cases(2)
@pytest.mark.parametrize('is_mixture', [False, True])
@pytest.mark.parametrize('scheme', ['int8', 'int4', 'fp8', 'Q8_0'])
def test_a_compiled_step_has_no_float_copy_of_a_kernel(scheme, is_mixture):
  # The matrices are far larger than anything else: 24 and 32 MiB in bfloat16.
  sizes = {'model_width': 1024, 'vocab_size': 16384, 'tie_embeddings': True}
  config = _config(mlp_width=8192, num_layers=1, **sizes)
  if is_mixture:  # one expert is as large
    config = _mixture(num_layers=1, **sizes)
    config = dataclasses.replace(
      config, expert_width=8192, num_shared_experts=0
    )
  floats = frozen_format.abstract_params(config, 'bfloat16')
  params = jax.eval_shape(
    lambda tree: stored_params.stored(tree, 'int8'), floats
  )
  if scheme == 'Q8_0':
    quantization = {
      'kind': 'stored',
      'record': {},
      'kernels': {
        path: {'blocks': 'Q8_0'} for path in stored_kernels.described(params)
      },
    }
    params = stored_kernels.with_kernels(floats, quantization)
  elif scheme != 'int8':
    params = jax.eval_shape(
      lambda tree: stored_params.stored(tree, scheme), floats
    )
  model, state, inputs = _step(config, 'bfloat16')
  lowered = steps.decode_step.lower(
    params,
    state.kv_cache,
    state.slots.last_B,
    inputs,
    model=model,
    vocab_size=config.vocab_size,
  )
  memory_use = lowered.compile().memory_analysis()
  # One copy of the smallest large matrix would be 16 MiB.
  assert memory_use.temp_size_in_bytes < 12 * 2**20


def _write(directory, scheme='int4', **fields):
  config = _config(num_layers=1, max_length=48)
  params = _params(scheme, config)
  return frozen_dirs.write(directory, config=config, params=params, **fields)


@pytest.mark.slow
def test_a_directory_is_served_and_its_digest_stays(tmp_path):
  written = _write(tmp_path / 'f')
  generator = generate.load(tmp_path / 'f', life_two.ENGINE)
  (done,) = generator.generate([tuple(_IDS[:30])], _GREEDY)
  floats = stored_params.whole(frozen_format.read(tmp_path / 'f').params)
  logits = _logits(floats, generator.frozen.config, [*_IDS[:30]])
  assert done.token_ids[0] == logits[-1, :259].argmax()
  assert generator.weights_digest() == written.weights_digest


@pytest.mark.slow
def test_adapters_compute_beside_kernels_in_fewer_bits(tmp_path):
  base, adapter, merged = (tmp_path / n for n in ('base', 'adapter', 'merged'))
  _write(base)
  tiny_adapters.write(adapter, base, seed=1, rank=2)
  generator = generate.load(
    base, life_two.ENGINE, adapters={'sql': str(adapter)}
  )
  frozen_adapters.merge_directory(adapter, base, merged)
  whole = generate.load(merged, life_two.ENGINE)
  assert whole.frozen.manifest.quantization == {'kind': 'none'}
  answers = []
  for each in (generator, generator.adapted('sql'), whole):
    (done,) = each.generate([tuple(_IDS[:30])], _GREEDY)
    answers.append([each.chosen for each in done.logprobs or ()])
  bare, adapted, expected = map(np.asarray, answers)
  np.testing.assert_allclose(adapted, expected, atol=1e-3)
  assert np.abs(adapted - bare).max() > 1e-2


@pytest.mark.slow
def test_a_reward_model_in_fewer_bits_gives_the_rewards_of_its_floats(tmp_path):
  config = _config(num_layers=1, max_length=48)
  head = reward_head.init(config.model_width, jax.random.key(0))
  stored = {**_params('int8', config), 'heads': {'reward': head}}
  found = []
  for name, params in (('f', stored), ('g', stored_params.whole(stored))):
    frozen_dirs.write(tmp_path / name, config=config, params=params)
    generator = generate.load(
      tmp_path / name, life_two.ENGINE, is_for_rewards=True
    )
    found.append(model_port.rewarder(generator)([_IDS[:40], _IDS[:9]]))
  np.testing.assert_allclose(*found, atol=1e-4)


def test_the_table_of_adapters_has_the_layers_of_the_floats():
  for scan_layers in (False, True):
    config = _config(scan_layers=scan_layers)
    assert adapter_table.layer_shapes(
      _params('int4', config)
    ) == adapter_table.layer_shapes(frozen_dirs.params(config))


def test_plans_count_the_bytes_that_are_stored(tmp_path):
  manifest = _write(tmp_path / 'f')
  stored = frozen_format.read(tmp_path / 'f').params
  num_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(stored))
  assert memory.plan(manifest, life_two.ENGINE).weights == num_bytes
  plan = plan_lib.make(subject.of_directory(str(tmp_path / 'f')))
  assert plan.weight_bytes == num_bytes
  assert f'stored           {frozen_format.storage_text(manifest)}' in (
    report.report(plan)
  )
  floats = frozen_dirs.write(
    tmp_path / 'g', config=_config(num_layers=1, max_length=48)
  )
  assert memory.plan(floats, life_two.ENGINE).weights > 5 * num_bytes
  whole = plan_lib.make(subject.of_directory(str(tmp_path / 'g')))
  less = whole.step_bytes(1, 0)
  table = stored['params']['embed']['embedding']  # of which a step reads a row
  saved = 4 * (manifest.num_params - math.prod(table.shape))
  saved -= num_bytes - table.nbytes
  assert plan.step_bytes(1, 0) == pytest.approx(less - saved)


@pytest.mark.slow
def test_plans_of_a_mixture_count_the_experts_that_a_step_reads(tmp_path):
  config = _mixture(num_layers=1, max_length=48)
  params = _params('int4', config)
  for name, tree in (('f', params), ('g', frozen_dirs.params(config))):
    frozen_dirs.write(tmp_path / name, config=config, params=tree)
  plan, whole = (
    plan_lib.make(subject.of_directory(str(tmp_path / name))) for name in 'fg'
  )
  leaves = stored_kernels.by_path(params)
  saved, of_experts = 0, 0
  for path, leaf in leaves.items():
    if isinstance(leaf, kernel_lib.Kernel) and 'params/embed/' not in path:
      bytes_saved = 4 * math.prod(leaf.shape) - leaf.nbytes
      if 'expert_' in path:
        of_experts += bytes_saved
      else:
        saved += bytes_saved
  for num_sequences, share in ((1, 2 / 8), (2, 1 - (6 / 8) ** 2)):
    less = whole.step_bytes(num_sequences, 0) - plan.step_bytes(
      num_sequences, 0
    )
    assert less == pytest.approx(saved + share * of_experts)
  num_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
  assert plan.weight_bytes == num_bytes


def test_the_plan_says_form_bits_and_bytes(tmp_path):
  manifest = _write(tmp_path / 'f', record={'scheme': 'int4', 'method': 'rtn'})
  done = commands.run('serve.py', f'--model={tmp_path / "f"}', '--plan')
  text = frozen_format.storage_text(manifest)
  assert re.fullmatch(
    r'9 x int4 \(int4 rtn\): 4\.\d+ bits per weight of .*', text
  )
  assert f'stored           {text}\n' in done.stdout


@pytest.mark.slow
def test_a_completion_says_form_bits_and_bytes(tmp_path):
  manifest = _write(tmp_path / 'f')
  done = commands.run(
    'serve.py', f'--model={tmp_path / "f"}', '--prompt=a', '--max_tokens=2'
  )
  text = frozen_format.storage_text(manifest)
  assert f'stored          {text}\n' in done.stdout
  assert 'unchanged' in done.stdout
