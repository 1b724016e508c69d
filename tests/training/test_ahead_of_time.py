"""The real train step, compiled for devices that this machine does not have.

JAX compiles for a target described by name, with libtpu for TPUs and the CUDA
plugin for GPUs. What is checked is what the compiler was given and made of it:
kernels, operand types, memory spaces.
"""

import collections
import re

import jax
import pytest

from data import data_config
from hardware import targets
from models import model_config
from parallel import parallel_config
from training import (
  execution,
  experiment as experiment_lib,
  learner as learner_lib,
)
from training.optimizer import chain

PARALLEL = {'fsdp': 4, 'tensor': 2, 'data': 1}
ROW_LENGTH = 256
EXPERTS = {
  'num_experts': 4, 'num_active_experts': 2, 'expert_width': 128, 'mlp_width': 0
}  # fmt: skip
V5E, V5P, H100 = 'v5e:2x4', 'v5p:2x2x2', 'h100:8'


@pytest.fixture(scope='module', autouse=True)
def _compilers():
  pytest.importorskip('libtpu', reason='needs requirements-plan.txt')
  pytest.importorskip('jax_plugins.xla_cuda13', reason='as above')
  targets.prepare_environment()


def _experiment(
  parallel=None,
  model=None,
  row_length=ROW_LENGTH,
  dtype='bfloat16',
  packing='concat_then_split',
  **execution,
):
  return experiment_lib.Experiment(
    name='ahead_of_time',
    model=model_config.ModelConfig(
      **{
        'vocab_size': 512,
        'num_layers': 4,
        'model_width': 256,
        'num_heads': 4,
        'num_kv_heads': 2,
        'head_width': 64,
        'mlp_width': 512,
        'max_length': ROW_LENGTH,
        **(model or {}),
      }
    ),
    data=data_config.DataConfig(
      batch_size=8, row_length=row_length, packing=packing
    ),
    optimizer=chain.OptimizerConfig(),
    parallel=parallel_config.ParallelConfig(**(parallel or PARALLEL)),
    execution=experiment_lib.ExecutionConfig(**execution),
    compute_dtype=dtype,
  )


def _learner(target, **fields):
  experiment = _experiment(**fields)
  experiment.validate()
  return learner_lib.make(experiment, targets.devices(targets.parse(target)))


def _compiled(target, **fields):
  learner = _learner(target, **fields)
  return learner.placement.lower_train(
    learner.build_train_step, learner.batch_shapes()
  ).compile()


def _kernel_calls(text):
  """Returns which splash kernels a TPU program calls, sorted."""
  calls = [line for line in text.splitlines() if 'tpu_custom_call' in line]
  names = [re.search(r'splash_mha_(fwd|dq|dkv)', line) for line in calls]
  return sorted(name.group(1) for name in names if name)


# The layers are one loop body, so a kernel is in the program once per pass.
# As its output and log-sum-exp are kept, `minimal` runs none a second time.
@pytest.mark.slow
@pytest.mark.parametrize('target', [V5E, V5P])
@pytest.mark.parametrize(
  ('remat', 'expected'),
  [
    ('none', ['dkv', 'dq', 'fwd']),
    ('minimal', ['dkv', 'dq', 'fwd']),
    ('full', ['dkv', 'dq', 'fwd', 'fwd']),
  ],
)
def test_splash_attention_compiles_in_the_train_step(target, remat, expected):
  text = _compiled(target, remat=remat).as_text()
  assert _kernel_calls(text) == expected


@pytest.mark.slow
def test_splash_attention_compiles_inside_pipeline_stages():
  parallel = {'stage': 2, 'fsdp': 2, 'tensor': 2, 'data': 1}
  text = _compiled(V5E, parallel=parallel, remat='minimal').as_text()
  assert {'fwd', 'dq', 'dkv'} == set(_kernel_calls(text))


@pytest.mark.slow
def test_splash_attention_compiles_with_int8_products():
  text = _compiled(V5E, matmul='int8', remat='minimal').as_text()
  assert _kernel_calls(text) == ['dkv', 'dq', 'fwd']
  # Seven matrices in a layer, each multiplied forward and back to the left.
  # On TPU the compiler calls a product a convolution.
  products = re.findall(r'= s32\[[^ ]* (?:dot|convolution)\(', text)
  assert len(products) == 14


@pytest.mark.slow
@pytest.mark.parametrize('target', [V5E, H100])
def test_offload_keeps_layer_inputs_in_host_memory(target):
  compiled = _compiled(target, remat='offload', attention='reference')
  # 4 layers' inputs in bfloat16, of two rows per device: fsdp is 4.
  layer_inputs = 4 * 2 * (ROW_LENGTH * 256) * 2
  analysis = compiled.memory_analysis()
  assert analysis.host_temp_size_in_bytes == layer_inputs
  assert 'S(5)' in compiled.as_text()  # XLA's name of that memory


@pytest.mark.slow
def test_cudnn_attention_compiles_in_the_train_step():
  text = _compiled(H100, remat='none').as_text()
  calls = re.findall(r'custom_call_target="__cudnn\$fmha(\w+)"', text)
  # Layers are apart there: one call of each for every layer.
  num_layers = _learner(H100).experiment.model.num_layers
  assert collections.Counter(calls) == {
    'ScaleBiasSoftmax': num_layers,
    'ScaleBiasSoftmaxBackward': num_layers,
  }


@pytest.mark.slow
def test_cudnn_attention_compiles_inside_pipeline_stages():
  parallel = {'stage': 2, 'fsdp': 2, 'tensor': 2, 'data': 1}
  text = _compiled(
    H100, parallel=parallel, remat='minimal', packing='none'
  ).as_text()
  calls = re.findall(r'custom_call_target="__cudnn\$fmha(\w+)"', text)
  assert sorted(calls) == ['Softmax', 'SoftmaxBackward']


def test_auto_takes_a_fused_kernel_where_shapes_allow_it():
  cases = [
    (V5E, {}, 'splash'),
    (V5E, {'row_length': 192}, 'reference'),  # no multiple of 128
    (V5E, {'model': {'dropout_rate': 0.1}}, 'reference'),
    (V5E, {'model': {'num_kv_heads': 1}}, 'reference'),  # tensor = 2
    (H100, {}, 'cudnn'),
    (H100, {'dtype': 'float32'}, 'reference'),
    (H100, {'model': {'dropout_rate': 0.1}}, 'reference'),
    (H100, {'model': {'attention_softcap': 30.0}}, 'reference'),
    (H100, {'model': {'head_width': 136}}, 'reference'),
    (H100, {'parallel': {'context': 8, 'data': 1}}, 'ring'),
    (H100, {'attention': 'reference'}, 'reference'),
    ('a100:8', {}, 'cudnn'),
    (V5E, {'attention': 'reference'}, 'reference'),
  ]
  for target, fields, expected in cases:
    learner = _learner(target, **fields)
    path = execution.attention_path(learner.experiment, learner.placement)
    assert path == expected, (target, fields)


@pytest.mark.parametrize(
  ('target', 'fields', 'max_documents', 'expected'),
  [
    (H100, {'packing': 'none'}, None, 'cudnn, causal only: a row has one doc'),
    (H100, {'packing': 'windows'}, None, 'cudnn, causal only'),
    (H100, {}, None, 'cudnn, with a mask of the documents'),
    (H100, {}, 12, 'cudnn, by lengths of at most 12 documents'),
    (H100, {}, 1, 'cudnn, causal only'),
    (H100, {}, 1000, 'cudnn, with a mask'),
    ('a100:8', {}, 12, 'cudnn, with a mask'),  # lengths need a Hopper
    ('a100:8', {'packing': 'none'}, None, 'cudnn, causal only'),
    (
      H100,
      {'model': {'dropout_rate': 0.1}},
      None,
      'reference, because cudnn attention refuses: got dropout of attention',
    ),
    (V5E, {'row_length': 192}, None, 'reference, because splash attention ref'),
    (V5E, {}, None, 'splash$'),
    (H100, {'attention': 'reference'}, None, 'reference$'),
  ],
)
def test_a_run_says_which_attention_it_takes_and_why(
  target, fields, max_documents, expected
):
  learner = _learner(target, **fields)
  text = execution.describe_attention(
    learner.experiment, learner.placement, max_documents
  )
  assert re.match(expected, text), text


@pytest.mark.parametrize(
  ('target', 'fields', 'expected'),
  [
    ('h100:8', {}, 'apart'),
    ('h100:8', {'dtype': 'float32'}, 'scanned'),  # plain attention
    ('h100:8', {'parallel': {'stage': 2, 'data': -1}}, 'scanned'),
    ('h100:8', {'layers': 'scanned'}, 'scanned'),
    ('h100:8', {'model': {'num_layers': 64}}, 'scanned'),
    (V5E, {}, 'scanned'),
  ],
)
def test_layers_are_apart_where_their_programs_are_short(
  target, fields, expected
):
  learner = _learner(target, **fields)
  assert learner.experiment.execution.layers == expected
  assert learner.model.execution.is_unrolled == (expected == 'apart')


@pytest.mark.parametrize(
  ('target', 'fields', 'message'),
  [
    (V5E, {'attention': 'cudnn'}, 'got devices of platform tpu, expected gpu'),
    (
      H100,
      {'attention': 'splash'},
      'got devices of platform (gpu|cuda), expected tpu',
    ),
    (
      V5E,
      {'attention': 'splash', 'row_length': 192},
      'execution.attention = splash: got rows of 192 tokens, expected a mult',
    ),
    (
      V5E,
      {'attention': 'splash', 'model': {'dropout_rate': 0.1}},
      'got dropout of attention weights, expected none: .* model.dropout_rate',
    ),
    (
      V5E,
      {'attention': 'splash', 'model': {'num_kv_heads': 1}},
      'got model.num_kv_heads = 1, expected a multiple of parallel.tensor = 2',
    ),
    (
      V5E,
      {'attention': 'splash', 'parallel': {'context': 8, 'data': 1}},
      'got parallel.context = 8, expected 1',
    ),
    (
      H100,
      {'attention': 'cudnn', 'dtype': 'float32'},
      'got config.compute_dtype = float32, expected bfloat16',
    ),
    (V5E, {'attention': 'flash'}, "got 'flash', expected one of auto, ref"),
    (V5E, {'matmul': 'int4'}, "got 'int4', expected one of float, int8, fp8"),
    (
      V5E,
      {'matmul': 'int8', 'model': EXPERTS},
      'got int8 with model.num_experts = 4, expected float',
    ),
  ],
)
def test_what_a_target_cannot_do_is_refused_before_compiling(
  target, fields, message
):
  with pytest.raises(ValueError, match=message):
    _learner(target, **fields)


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    ({'attention': 'splash'}, 'got devices of platform cpu, expected tpu'),
    ({'remat': 'offload'}, 'got offload on devices of platform cpu, expected'),
  ],
)
def test_what_a_cpu_cannot_do_is_refused(fields, message):
  with pytest.raises(ValueError, match=message):
    learner_lib.make(_experiment(**fields), jax.devices())
