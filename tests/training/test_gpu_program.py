"""The train step of a GPU, compiled for an H100 that is not here.

Times are measured on a GPU (`make bench-gpu`). What decides them can be counted
without one: kernels, copies, bytes, and arrays that should not exist.
"""

import functools
import re

import pytest

from hardware import hlo
from tests.helpers import gpu_programs
from tests.helpers.gpu_programs import HEADS, LAYERS, ROWS, TIME

CALLS = {'__cudnn$fmhaSoftmax', '__cudnn$fmhaSoftmaxBackward'}
REMATS = {'none': 1, 'minimal': 1, 'full': 2}  # runs of the forward kernel
# Of a run that chooses nothing: the choices of `training.planning.choices`.
CHOICES = {'remat': 'none', 'layers': 'apart', 'loss_chunk_logits': 2**28}
VARIANTS = (
  {},
  {'max_documents': 5},
  {'layers': 'scanned'},
  CHOICES,
  *(
    {'remat': remat, 'layers': layers}
    for layers in ('apart', 'scanned')
    for remat in REMATS
  ),
)

pytestmark = pytest.mark.slow


@functools.cache
def _programs():
  """Returns the text and the parsed program of every variant."""
  pytest.importorskip('jax_plugins.xla_cuda13', reason='requirements-plan.txt')
  texts = gpu_programs.compile(VARIANTS)
  return [(text, hlo.parse(text)) for text in texts]


def _program(**fields):
  return _programs()[VARIANTS.index(fields)]


def _kernels(**fields):
  return hlo.kernels(_program(**fields)[1])


@pytest.mark.parametrize('fields', [{}, {'max_documents': 5}])
def test_attention_is_one_kernel_per_layer_and_pass(fields):
  text, program = _program(**fields)
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


@pytest.mark.parametrize(('remat', 'num_forward'), REMATS.items())
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
  assert _kernels() == _kernels(**CHOICES)
