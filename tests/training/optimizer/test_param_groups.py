"""Which parameter is in which group: by name, with layers stacked or apart."""

import jax
import pytest

from models import transformer
from tests.helpers import tiny_models
from training import state as state_lib
from training.optimizer import param_groups

MODELS = {
  'mixture': tiny_models.mixture(scan_layers=True, qk_norm=True),
  'mixture apart': tiny_models.mixture(qk_norm=True),
  'gpt2': tiny_models.gpt2_like(scan_layers=True),
}


def _params(name):
  return state_lib.abstract_params(transformer.Transformer(MODELS[name]))


def _names(marks):
  """Returns 'owner/kind' of everything that is marked."""
  return {
    '/'.join(str(key.key) for key in path[-2:])
    for path, marked in jax.tree_util.tree_leaves_with_path(marks)
    if marked
  }


_ATTENTION = {'query/kernel', 'key/kernel', 'value/kernel', 'out/kernel'}
_GPT2_KERNELS = _ATTENTION | {'up/kernel', 'down/kernel'}
_EXPERTS = {'expert_gate/kernel', 'expert_up/kernel', 'expert_down/kernel'}
_SHARED = {'gate/kernel', 'up/kernel', 'down/kernel'}
_TABLES = {'embed/embedding', 'head/embedding'}


@pytest.mark.parametrize('name', ['mixture', 'mixture apart'])
def test_hidden_matrices_are_those_of_attention_mlps_and_experts(name):
  found = _names(param_groups.is_hidden_matrix(_params(name)))
  assert found == _ATTENTION | _EXPERTS | _SHARED


def test_tables_biases_and_norms_are_no_hidden_matrices():
  found = _names(param_groups.is_hidden_matrix(_params('gpt2')))
  assert found == _GPT2_KERNELS


@pytest.mark.parametrize('name', ['mixture', 'mixture apart'])
def test_decay_masks_go_by_name(name):
  params = _params(name)
  matrices = _ATTENTION | _EXPERTS | _SHARED | {'router/kernel'} | _TABLES
  norms = {
    f'{owner}_norm/scale'
    for owner in ('attention', 'query', 'key', 'mlp', 'final')
  }
  decayed = {
    mask: _names(param_groups.is_decayed(mask, params))
    for mask in param_groups.DECAY_MASKS
  }
  assert decayed == {
    'matrices': matrices,
    'no_embeddings': matrices - _TABLES,
    'all': matrices | norms,
  }


@pytest.mark.parametrize(
  'make', [tiny_models.llama_like, tiny_models.gpt2_like, tiny_models.stable]
)
@pytest.mark.parametrize('scan', [True, False])
def test_only_matrices_decay_by_default(make, scan):
  model = transformer.Transformer(make(scan_layers=scan))
  params = state_lib.abstract_params(model)
  decayed = param_groups.is_decayed('matrices', params)
  for (path, leaf), is_decayed in zip(
    jax.tree_util.tree_leaves_with_path(params),
    jax.tree.leaves(decayed),
    strict=True,
  ):
    scanned = 'layers' in jax.tree_util.keystr(path)
    assert is_decayed == (leaf.ndim - scanned == 2)


@pytest.mark.parametrize('name', MODELS)
def test_own_axes_are_those_besides_layers_and_experts(name):
  params = _params(name)
  ndims = param_groups.own_ndims(params)

  def check(path, leaf, ndim):
    keys = [str(key.key) for key in path]
    stacks = ('layers' in keys) + keys[-2].startswith('expert_')
    assert ndim == leaf.ndim - stacks

  jax.tree_util.tree_map_with_path(check, params, ndims)


def test_multipliers_of_all_that_match_multiply():
  found = param_groups.lr_multipliers(
    (('attention/', 0.5), (r'query/kernel$', 3), ('^embed/', 0.0)),
    _params('mixture'),
  )['params']
  layer = found['layers']
  assert layer['attention']['query']['kernel'] == 1.5
  assert layer['attention']['key']['kernel'] == 0.5
  assert layer['attention_norm']['scale'] == 1.0
  assert found['embed']['embedding'] == 0.0
  assert found['head']['embedding'] == 1.0


@pytest.mark.parametrize(
  ('pairs', 'message'),
  [
    (
      (('atention', 0.5),),
      "got 'atention', which matches no parameter, expected part of one of"
      ' embed/embedding, final_norm/scale, head/embedding, layers/',
    ),
    ((('', 0.0),), 'which freezes every parameter, expected one that learns'),
  ],
)
def test_multipliers_of_no_or_all_parameters_are_refused(pairs, message):
  with pytest.raises(ValueError, match=message):
    param_groups.lr_multipliers(pairs, _params('mixture'))


@pytest.mark.parametrize(
  'pairs',
  [
    ('embed', 0.5),  # what the flag ('embed', 0.5) becomes: not a pair of pairs
    (('embed',),),
    (('embed', -1.0),),
    (('embed', float('nan')),),
    (('embed', 'half'),),
    (('(', 1.0),),
    ((1.0, 'embed'),),
  ],
)
def test_malformed_multipliers_are_refused(pairs):
  with pytest.raises(
    ValueError, match=r'lr_multipliers: got .*, expected pairs .*; write \(\('
  ):
    param_groups.check_lr_multipliers(pairs)
