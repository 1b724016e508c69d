"""Plans of models that several devices share, against placements and XLA."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import pytest

from experiments import pretrain
from frozen import draft_heads, format as frozen_format, stored_kernels
from hardware import compile_ahead, hlo, peaks, targets
from inference import drafts
from inference.engine import (
  adapter_table,
  device_state,
  engine_config,
  execution,
)
from inference.engine.drafting import making
from inference.engine.spread import placement as placement_lib
from inference.planning import plan as plan_lib, report, subject
from models.layers import draft_head
from tests.helpers import commands, frozen_dirs, tiny_models
from tests.helpers.open_weights import stored_params
from tests.helpers.serving import reference_engine


def _subject(kind):
  config = reference_engine.model_config(kind)
  return subject.of_config(kind, config, 'float32')


def _eight_billion(target, **fields):
  found = pretrain.get_config('8b')
  parsed = targets.parse(target)
  return plan_lib.Plan(
    subject=subject.of_config('8b', found.model, 'bfloat16'),
    target=target,
    device_kind=parsed.device_kind,
    peaks=peaks.DATASHEETS[parsed.device_kind],
    num_devices=parsed.num_devices,
    slices=targets.slices(parsed),
    **fields,
  )


@pytest.mark.parametrize('kind', ['odd_heads', 'gpt2', 'mixture'])
@pytest.mark.parametrize('tensor', [2, 4])
def test_weights_of_a_device_are_those_that_the_engine_places(kind, tensor):
  planned = plan_lib.make(
    _subject(kind), 'cpu:4', tensor=tensor, is_compiled=False
  )
  placement = placement_lib.make(
    engine_config.EngineConfig(tensor=tensor),
    planned.config,
    device_state.unread(reference_engine.params(kind)),
    vocab_size=planned.config.vocab_size,
  )
  params = device_state.unread(reference_engine.params(kind))
  assert planned.weight_bytes == placement.num_bytes(params)


@pytest.mark.parametrize('tensor', [1, 4])
def test_adapters_of_a_device_are_those_of_the_engines_table(tensor):
  room = {'max_adapters': 3, 'max_adapter_rank': 2}
  planned = plan_lib.make(
    _subject('odd_heads'), 'cpu:4', tensor=tensor, is_compiled=False, **room
  )
  params = device_state.unread(reference_engine.params('odd_heads'))
  config = engine_config.EngineConfig(tensor=tensor, **room)
  placement = placement_lib.make(config, planned.config, params, vocab_size=261)
  table = adapter_table.made(config, params, 'float32', placement)
  assert planned.adapter_bytes == table.num_bytes > 0
  bare = dataclasses.replace(planned, num_adapters=0)
  assert planned.bytes_of(2, 9) - bare.bytes_of(2, 9) == table.num_bytes
  assert planned.step_bytes(2, 9) - bare.step_bytes(2, 9) == table.num_bytes
  assert 'for 3 of rank 2' in report.report(planned)


@pytest.fixture(scope='module')
def drafting(tmp_path_factory):
  """Returns directories of a model, and of a model and a head that draft."""
  path = tmp_path_factory.mktemp('drafting')
  config = frozen_dirs.config(num_layers=2)
  written = frozen_dirs.write(path / 'target', config=config)
  frozen_dirs.write(path / 'model', config=frozen_dirs.config(num_layers=1))
  width = config.model_width
  draft_heads.write(
    path / 'head',
    draft_head.init(width, width, jax.random.key(0)),
    base_digest=written.weights_digest,
    num_ids=100,
    provenance=frozen_dirs.provenance(),
    texts={},
  )
  return path


@pytest.mark.parametrize('tensor', [1, 4])
@pytest.mark.parametrize('kind', ['model', 'head'])
def test_drafts_take_the_memory_of_the_engines_source(kind, tensor, drafting):
  fields = {'speculation': kind, f'draft_{kind}': str(drafting / kind)}
  found = subject.of_directory(str(drafting / 'target'))
  planned, bare = (
    plan_lib.make(found, 'cpu:4', tensor=tensor, is_compiled=False, **each)
    for each in (fields, {'speculation': 'ngram'})
  )
  config = engine_config.EngineConfig(tensor=tensor, **fields)
  frozen = frozen_format.open_directory(drafting / 'target')
  placement = placement_lib.make(
    config,
    frozen.config,
    device_state.unread(frozen.shapes),
    vocab_size=planned.config.vocab_size,
  )
  weights = drafts.read(config, frozen)
  backend = placement.backend(
    execution.choose(config, placement.model, jnp.float32, 'cpu')
  )
  source, backend = making.made(weights, config, placement, backend)
  assert planned.held_bytes - bare.held_bytes == source.num_bytes > 0
  each = planned.bytes_of(2, 9) - bare.bytes_of(2, 9) - source.num_bytes
  assert each == 2 * 9 * backend.beside_bytes > 0
  assert planned.num_sequences(64) < bare.num_sequences(64)
  assert planned.step_seconds(2, 9) == bare.step_seconds(2, 9)
  assert f' of a draft {kind}, and ' in report.report(planned)
  assert 'drafts' not in report.report(bare)
  with pytest.raises(ValueError, match=f'draft_{kind}: got none with specul'):
    plan_lib.make(found, 'cpu:4', is_compiled=False, speculation=kind)


@pytest.mark.slow
def test_a_compiled_step_with_adapters_sends_no_more():
  with_them, without = (
    plan_lib.make(_subject('odd_heads'), 'cpu:4', tensor=4, max_adapters=num)
    for num in (2, 0)
  )
  counts = []
  for planned in (with_them, without):
    assert isinstance(planned.compiled, compile_ahead.Program)
    stream = planned.compiled_sequences * planned.config.model_width * 4
    counts.append(
      sum(
        each.count
        for each in planned.compiled.traffic.collectives
        if each.payload_bytes >= stream
      )
    )
  assert counts[0] == counts[1] == with_them.sums_per_step


def _stored(scheme, model_width=96):
  """Returns a subject and variables with kernels in fewer bits."""
  config = tiny_models.odd_heads(
    model_width=model_width, mlp_width=2 * model_width, head_width=32,
    vocab_size=270, num_layers=1,
  )  # fmt: skip
  params = stored_params.stored(frozen_dirs.params(config), scheme)
  found = subject.of_config(scheme, config, 'float32')
  quantization = stored_kernels.quantization(params, None)
  return dataclasses.replace(found, quantization=quantization), params


def _stored_mixture(scheme):
  """Returns the same of a mixture of experts."""
  config = tiny_models.mixture(
    model_width=96, expert_width=64, head_width=32, vocab_size=270,
    num_layers=1, num_shared_experts=0,
  )  # fmt: skip
  params = stored_params.stored(frozen_dirs.params(config), scheme)
  found = subject.of_config(scheme, config, 'float32')
  quantization = stored_kernels.quantization(params, None)
  return dataclasses.replace(found, quantization=quantization), params


@pytest.mark.parametrize('scheme', ['ordered', 'nvfp4', 'Q8_0'])
@pytest.mark.parametrize('tensor', [2, 4])
def test_weights_in_fewer_bits_are_those_that_the_engine_places(scheme, tensor):
  found, params = _stored(scheme)
  planned = plan_lib.make(found, 'cpu:4', tensor=tensor, is_compiled=False)
  unread = device_state.unread(params)
  placement = placement_lib.make(
    engine_config.EngineConfig(tensor=tensor),
    planned.config,
    unread,
    vocab_size=planned.config.vocab_size,
  )
  assert planned.weight_bytes == placement.num_bytes(unread)
  # A step reads the head, and one row of the embedding.
  assert 0 < planned.step_bytes(1, 0) < planned.weight_bytes
  assert [each.tensor for each in plan_lib.degrees(planned)] == [1, 2, 4]


@pytest.mark.fast_cases(3)
@pytest.mark.parametrize('scheme', ['ordered', 'nvfp4'])
@pytest.mark.parametrize('experts', [1, 2, 4])
def test_experts_in_fewer_bits_are_those_that_the_engine_places(
  scheme, experts
):
  found, params = _stored_mixture(scheme)
  planned = plan_lib.make(
    found, 'cpu:4', tensor=4, experts=experts, is_compiled=False
  )
  unread = device_state.unread(params)
  placement = placement_lib.make(
    engine_config.EngineConfig(tensor=4, experts=experts),
    planned.config,
    unread,
    vocab_size=planned.config.vocab_size,
  )
  assert planned.weight_bytes == placement.num_bytes(unread)
  # An order mixes inputs, unless a device has whole experts.
  across = [cut for cut in planned.across if cut.has_experts]
  assert len(across) == (scheme == 'ordered' and experts < 4)
  # All experts, and the rest but the embedding, which has one row per token.
  assert planned.step_bytes(10**6, 0) < planned.weight_bytes


@pytest.mark.slow
@pytest.mark.parametrize(
  ('target', 'compiler'),
  [('h100:1', 'jax_plugins.xla_cuda13'), ('v5e:1x1', 'libtpu')],
)
def test_a_plan_has_the_products_of_the_engine(target, compiler, monkeypatch):
  pytest.importorskip(compiler, reason='needs requirements-plan.txt')
  texts = []
  compile = compile_ahead.compile

  def seen(lowered):
    texts.append(lowered.as_text())
    return compile(lowered)

  monkeypatch.setattr(compile_ahead, 'compile', seen)
  planned = plan_lib.make(_stored('int8', 128)[0], target)
  assert isinstance(planned.compiled, compile_ahead.Program)
  assert 'stored_product' in texts[0]


@pytest.mark.slow
@pytest.mark.parametrize('experts', [1, 2])
def test_a_step_of_experts_cut_along_outputs_sends_as_planned(experts):
  planned = plan_lib.make(
    _stored_mixture('ordered')[0], 'cpu:4', tensor=4, experts=experts
  )
  assert isinstance(planned.compiled, compile_ahead.Program)
  assert planned.sends_no_weight
  # The sum of attention is none, as in a dense model; that of the experts is
  # over their groups.
  assert planned.sums_per_step == (experts > 1) + 1
  assert 'no weight is sent' in report.report(planned)


@pytest.mark.slow
def test_a_step_of_kernels_cut_along_outputs_sends_inputs_and_outputs():
  planned = plan_lib.make(_stored('ordered')[0], 'cpu:4', tensor=4)
  assert len(planned.across) == 2
  assert planned.sums_per_step == 1  # of the embedding
  assert isinstance(planned.compiled, compile_ahead.Program)
  # A device sends a quarter of the outputs; messages of the sampler are less.
  least = planned.compiled_sequences * 4 * 96 / 4
  sent = sum(
    each.sent_bytes
    for each in planned.compiled.traffic.collectives
    if each.payload_bytes >= least
  )
  assert sent == planned.sent_bytes(planned.compiled_sequences)
  assert planned.sends_no_weight
  text = report.report(planned)
  assert '1 sums of the stream, inputs and outputs of 2 stored kernels' in text


@pytest.mark.parametrize(
  ('kind', 'tensor', 'experts'),
  [
    pytest.param('llama', 2, 1, marks=pytest.mark.slow),
    pytest.param('mixture', 4, 1, marks=pytest.mark.slow),
    pytest.param('mixture', 4, 2, marks=pytest.mark.slow),
  ],
)
def test_the_compiled_step_sends_the_sums_of_the_formula_and_no_weight(
  kind, tensor, experts
):
  planned = plan_lib.make(
    _subject(kind), 'cpu:4', tensor=tensor, experts=experts
  )
  assert isinstance(planned.compiled, compile_ahead.Program)
  stream = planned.compiled_sequences * planned.config.model_width * 4
  found = planned.compiled.traffic.collectives
  # XLA adds two arrays in one message where none waits for the other.
  sums = [each for each in found if each.payload_bytes >= stream]
  assert {each.kind for each in sums} == {'all-reduce'}
  num_bytes = sum(each.count * each.payload_bytes for each in sums)
  assert num_bytes == planned.sums_per_step * stream
  sent = sum(each.sent_bytes for each in sums)
  assert sent == planned.sent_bytes(planned.compiled_sequences)
  # The rest is of the sampler: a few numbers per row.
  assert planned.sends_no_weight
  text = report.report(planned)
  assert f'{planned.sums_per_step} sums of the stream' in text
  assert 'no weight is sent' in text


def test_a_weight_that_is_sent_is_told():
  planned = _eight_billion('v5e:2x4', tensor=8, compiled_sequences=4)
  gathered = hlo.Collective(
    kind='all-gather', num_devices=8, payload_bytes=2**20, count=1
  )
  program = compile_ahead.Program(
    arguments=2**30,
    outputs=0,
    temporaries=0,
    aliased=0,
    peak=2**30,
    traffic=hlo.Traffic(collectives=(gathered,), memory_bytes=1.0, unknown=()),
  )
  planned = dataclasses.replace(planned, compiled=program)
  assert not planned.sends_no_weight
  assert 'WEIGHTS ARE SENT' in report.report(planned)


def test_the_smallest_slice_holds_what_a_smaller_one_does_not():
  # 15 GiB of weights: one v5e has 15.75 GiB, of which 5 % stay free.
  found = plan_lib.smallest(_eight_billion('v5e:4x4'))
  assert found is not None
  name, least = found
  assert (name, least.tensor) == ('v5e:2x2', 2)
  assert not dataclasses.replace(least, tensor=1).num_sequences(4096)
  name, least = plan_lib.smallest(_eight_billion('h100:8')) or ('', None)
  assert name == 'h100:1'


def test_devices_divide_memory_and_reads_and_send():
  one, eight = (_eight_billion('h100:8', tensor=n) for n in (1, 8))
  norms = 2 * (2 * 32 + 1) * 4096  # every device has all of them
  assert eight.weight_bytes - norms == (one.weight_bytes - norms) / 8
  assert eight.kv_bytes_per_token == one.kv_bytes_per_token / 8
  assert one.sent_bytes(1) == 0
  assert eight.sent_bytes(3) == 65 * 3 * 4096 * 2 * 2 * 7 / 8
  assert eight.rate < 8 * eight.tokens_per_s(10**4, 2048)


def test_published_latency_of_8b_is_above_the_bound():
  # Llama 3.1 8B on one H100, vLLM: 6.44 ms + 4.37e-5 ms per token of context
  # (vLLM's blog, 2026-04-22). Both terms are within 1.5 of the bound.
  one = _eight_billion('h100:1')
  weights = one.step_seconds(1, 0)
  token = (one.step_seconds(1, 10**6) - weights) / 10**6
  assert 1 < 6.44e-3 / weights < 1.5
  assert 1 < 4.37e-8 / token < 1.5


def test_a_config_json_is_planned_without_weights(tmp_path):
  values = {
    'model_type': 'qwen2', 'architectures': ['Qwen2ForCausalLM'],
    'hidden_size': 2048, 'num_hidden_layers': 36, 'num_attention_heads': 16,
    'num_key_value_heads': 2, 'intermediate_size': 11008, 'hidden_act': 'silu',
    'vocab_size': 151936, 'tie_word_embeddings': True, 'rms_norm_eps': 1e-6,
    'rope_theta': 1000000.0, 'max_position_embeddings': 32768,
    'torch_dtype': 'bfloat16',
  }  # fmt: skip
  path = tmp_path / 'config.json'
  path.write_text(json.dumps(values))
  found = subject.of(None, str(path), load_experiment=pytest.fail)
  assert (
    found.num_params == 3_085_938_688
  )  # the model card of Qwen2.5-3B: 3.09B
  assert (found.dtype, found.config.num_kv_heads) == ('bfloat16', 2)


@pytest.mark.parametrize(
  ('flags', 'message'),
  [
    ([], 'both or none of --model and --config'),
    (['--config=no/config.json'], 'expected a file config.json, or an exp'),
    (['--config=experiments/none.py'], 'expected a Python file'),
    (
      ['--config=experiments/quickstart.py', '--engine.tensor=3'],
      'got 3 with --plan=cpu:4, expected a divisor of its 4 devices',
    ),
    (
      [
        '--config=experiments/quickstart.py',
        '--engine.tensor=2',
        '--engine.experts=2',
      ],
      'engine.experts = 2 of a model without experts',
    ),
  ],
)
def test_wrong_plans_are_refused_in_one_line(flags, message):
  done = commands.run('serve.py', '--plan=cpu:4', *flags)
  assert done.returncode == 2
  (line,) = done.stderr.splitlines()
  assert message in line


def test_more_devices_than_the_process_has_are_refused():
  num = len(jax.devices())
  with pytest.raises(targets.TargetError, match='force_host_platform_device'):
    targets.devices(targets.parse(f'cpu:{2 * num}'))
