"""The train step of a GPU, compiled for an H100 that is not here.

Times are measured on a GPU (`make bench-gpu`). What decides them can be counted
without one: kernels, copies, bytes, and arrays that should not exist.
"""

import dataclasses
import functools
import re

import pytest

from data import data_config
from experiments import presets
from hardware import hlo, targets
from training import experiment as experiment_lib, learner as learner_lib
from training.optimizer import chain
from training.planning import choices

ROWS, TIME, LAYERS, HEADS = 4, 512, 3, 4
CALLS = {'__cudnn$fmhaSoftmax', '__cudnn$fmhaSoftmaxBackward'}

pytestmark = pytest.mark.slow


@functools.cache
def _program(max_documents=1, **execution):
  """Returns the text and the parsed program of a GPT-2's train step."""
  pytest.importorskip('jax_plugins.xla_cuda13', reason='requirements-plan.txt')
  targets.prepare_environment()
  devices = targets.devices(targets.parse('h100:1'))
  experiment = experiment_lib.Experiment(
    name='gpu_program',
    model=presets.gpt2(
      vocab_size=512, num_layers=LAYERS, num_heads=HEADS, width=256, length=TIME
    ),
    data=data_config.DataConfig(
      path='-', batch_size=ROWS, row_length=TIME, packing='best_fit'
    ),
    optimizer=chain.OptimizerConfig(),
    execution=experiment_lib.ExecutionConfig(**execution),
    compute_dtype='bfloat16',
  )
  chosen = choices.make(experiment, devices).experiment
  learner = learner_lib.make(chosen, devices, max_documents)
  lowered = learner.placement.lower_train(
    learner.build_train_step, learner.batch_shapes()
  )
  text = lowered.compile().as_text()
  return text, hlo.parse(text)


def _kernels(**fields):
  return hlo.kernels(_program(**fields)[1])


@pytest.mark.parametrize('max_documents', [1, 5])
def test_attention_is_one_kernel_per_layer_and_pass(max_documents):
  text, program = _program(max_documents=max_documents)
  counts = hlo.kernels(program)
  assert {name: counts[name] for name in CALLS} == dict.fromkeys(CALLS, LAYERS)
  # No scores, and no mask.
  assert not re.search(rf'\[{ROWS},\d+,{TIME},{TIME}\]', text)
  assert not re.search(rf'\[{ROWS * HEADS},{TIME},{TIME}\]', text)


def test_nothing_else_is_called_and_nothing_comes_to_the_host():
  text, program = _program()
  calls = re.findall(r'custom_call_target="([^"]+)"', text)
  assert {call for call in calls if not call.startswith('__cu')} == set()
  counts = hlo.kernels(program)
  for opcode in ('infeed', 'outfeed', 'send', 'recv', 'transpose'):
    assert opcode not in counts
  # Of the state's key and number of steps.
  assert counts.get('copy', 0) <= 2


def test_layers_apart_keep_one_stack_of_weights():
  apart, scanned = _program()[1], _program(layers='scanned')[1]
  # The loss has a loop if it has several chunks; here it has one.
  loops = [
    sum(i.opcode == 'while' for body in p.computations.values() for i in
        body.values())
    for p in (apart, scanned)
  ]  # fmt: skip
  assert loops[0] < loops[1]
  before, after = (sum(hlo.kernels(p).values()) for p in (scanned, apart))
  assert after < before
  # The optimizer updates stacks: its kernels do not grow with the layers.
  ours = [
    line
    for line in _program()[0].splitlines()
    if 'fusion(' in line and 'optimizer/add' in line and '= f32' in line
  ]
  assert len(ours) < 3 * 17  # arrays of weights


@pytest.mark.parametrize(
  ('remat', 'num_forward'), [('none', 1), ('minimal', 1), ('full', 2)]
)
@pytest.mark.parametrize('layers', ['apart', 'scanned'])
def test_remat_runs_no_kernel_twice_that_it_can_keep(
  remat, layers, num_forward
):
  counts = _kernels(remat=remat, layers=layers)
  forward, backward = (counts[name] for name in sorted(CALLS, key=len))
  assert (forward, backward) == (num_forward * LAYERS, LAYERS)


def test_the_norm_of_the_weights_reads_the_weights_alone():
  text, program = _program()
  entry = program.computations[program.entry]
  named = dict(re.findall(r'%?([\w.\-]+) = [^\n]*op_name="([^"]*)"', text))
  size = 512 * 256 * 4  # bytes of the largest array of weights
  norms = [
    i
    for i in entry.values()
    if i.opcode == 'fusion'
    and re.fullmatch(r'jit\(train_step\)/reduce_sum', named.get(i.name, ''))
  ]
  assert norms
  for norm in norms:
    operands = [entry[name] for name in norm.operands if name in entry]
    whole = [o for o in operands if hlo.shape_bytes(o.shape) >= size]
    assert len(whole) <= 1


def test_the_choices_are_those_of_a_run():
  _, program = _program()
  explicit = dataclasses.asdict(
    experiment_lib.ExecutionConfig(
      remat='none', layers='apart', loss_chunk_logits=2**28
    )
  )
  assert hlo.kernels(program) == _kernels(**explicit)
