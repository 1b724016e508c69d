"""Every field of every family's config class, set to other values.

An import refuses the value and names the field, or its logits change as those
of transformers do. No value makes it fail in another way.
"""

import dataclasses
import inspect
import logging
import re

import pytest

from frozen.huggingface import config_json
from frozen.huggingface.families import fields as fields_lib
from tests.helpers.open_weights import open_weights, reference_configs
from tests.helpers.open_weights.reference_configs import (
  EQUAL,
  FAULT,
  OUTSIDE,
  REFUSED,
)

_WHY = 'the oracle is not installed: pip install -r requirements-peer.txt'
torch = pytest.importorskip('torch', reason=_WHY)
transformers = pytest.importorskip('transformers', reason=_WHY)

# One model per family, of those whose fields have the most effect together. Two
# layers are the quickest.
MODELS = {
  'llama3': {},
  'mistral': {},
  'qwen2_window': {},
  'qwen3_tied': {'sliding_window': 9},
  'smollm3': {'use_sliding_window': True, 'sliding_window': 9},
  'phi3': {},
  'olmo2': {},
  'gemma': {},
  'gemma2': {'num_hidden_layers': 2},
  'gemma3': {
    'num_hidden_layers': 2,
    'layer_types': ['sliding_attention', 'full_attention'],
  },
  'gpt2': {},
  'gpt_neox': {},
  'mixtral': {},
  'qwen3_moe_dense_first': {
    'num_hidden_layers': 2,
    'use_sliding_window': True,
    'sliding_window': 9,
  },
  'deepseek_v2': {'num_hidden_layers': 2},
  'deepseek_v3': {'num_hidden_layers': 2},
}
FAST = ('llama3',)

# Fields that no config class has, and that files on the hub do have.
OLD_NAMES = {
  'rope_theta', 'rope_scaling', 'partial_rotary_factor', 'rotary_pct',
  'rotary_emb_base', 'rope_local_base_freq', 'sliding_window_pattern',
  '_sliding_window_pattern', 'original_max_position_embeddings', 'n_ctx',
  'head_dim', 'hidden_act', 'hidden_activation', 'attention_bias', 'mlp_bias',
  'layer_types', 'no_rope_layers', 'num_experts', 'num_local_experts',
  'n_routed_experts', 'num_key_value_heads', 'num_kv_heads', 'scoring_func',
  'topk_method', 'moe_layer_freq', 'is_causal', 'is_decoder', 'torch_dtype',
  'name_or_path', 'num_labels', 'per_layer_config', 'tie_last_hidden_states',
  'attn_implementation', 'experts_implementation', 'sliding_window',
  'use_sliding_window', 'max_window_layers', 'use_bidirectional_attention',
  'qk_layernorm', 'use_qk_norm', 'clip_qkv', 'n_group', 'rms_norm_eps',
  'query_pre_attn_scalar', 'attn_logit_softcapping', 'final_logit_softcapping',
  'attention_chunk_size', 'residual_multiplier', 'logits_scaling',
  'embedding_multiplier', 'attention_multiplier', 'text_config', 'use_mrope',
  'rope_interleaved', 'rope_interleave', 'quantization_config',
}  # fmt: skip
# Read by other tests.
_NOT_TRIED = {'architectures', 'model_type', 'rope_parameters'}

ACTIVATIONS = (
  'relu', 'gelu', 'gelu_new', 'gelu_pytorch_tanh', 'gelu_fast', 'silu', 'swish',
  'quick_gelu', 'relu2', 'mish', 'nonsense',
)  # fmt: skip
# Other values of fields without effect, where transformers wants certain ones.
_VALID = {
  'dtype': 'float16', 'torch_dtype': 'float16', 'cache_implementation': None,
  'problem_type': 'regression', 'id2label': {'0': 'a'}, 'label2id': {'a': 0},
  '_attn_implementation': None, 'output_attentions': None, 'auto_map': None,
  'transformers_version': '4.0', 'summary_type': 'last',
  'summary_activation': 'tanh',
  'return_dict': True,  # its models fail with false
}  # fmt: skip
_SIZES = (
  'vocab_size', 'hidden_size', 'intermediate_size', 'num_hidden_layers',
  'num_attention_heads', 'num_key_value_heads', 'head_dim', 'n_embd', 'n_layer',
  'n_head', 'n_inner', 'n_positions', 'num_experts', 'num_local_experts',
  'n_routed_experts', 'moe_intermediate_size', 'n_shared_experts',
  'kv_lora_rank', 'q_lora_rank', 'qk_rope_head_dim', 'qk_nope_head_dim',
  'v_head_dim', 'first_k_dense_replace', 'mlp_only_layers',
)  # fmt: skip
_ABSENT = object()


@pytest.fixture(autouse=True)
def _quiet():
  logging.disable(logging.CRITICAL)
  transformers.logging.disable_progress_bar()
  # Threads that wait for each other at full speed stop all tests beside them.
  num_threads = torch.get_num_threads()
  torch.set_num_threads(1)
  yield
  torch.set_num_threads(num_threads)
  logging.disable(logging.NOTSET)


# Experts take most of the time, and have no rotary fields.
_DENSE = {'deepseek_v3_dense': ('deepseek_v3', {'first_k_dense_replace': 3})}


def _params(names):
  return [
    pytest.param(name, marks=[] if name in FAST else pytest.mark.slow)
    for name in names
  ]


@pytest.fixture(scope='module', params=_params(MODELS))
def reference(request, tmp_path_factory):
  name = request.param
  model, overrides = _DENSE.get(name) or (name, MODELS[name])
  return reference_configs.Reference(
    model, tmp_path_factory.mktemp(name), **overrides
  )


def _names(config, model_class) -> list[str]:
  """Returns all fields that the file, the class or the code of a model has."""
  import transformers.masking_utils as masking
  import transformers.modeling_rope_utils as rope

  read = set()
  for module in (inspect.getmodule(model_class), masking, rope):
    source = inspect.getsource(module)
    read |= set(re.findall(r'\bconfig\.([a-z]\w*)', source))
    read |= set(re.findall(r'getattr\((?:self\.)?config, "(\w+)"', source))
  read = {n for n in read if not callable(getattr(config, n, None))}
  fields = {field.name for field in dataclasses.fields(config)}
  return sorted(
    (read | fields | set(config.to_dict()) | OLD_NAMES) - _NOT_TRIED
  )


def _others(name, value):
  """Returns other values of a field, right and wrong ones."""
  if name in ('hidden_act', 'hidden_activation', 'activation_function'):
    return [*ACTIVATIONS, None, ['silu']]
  if isinstance(value, bool):
    return [not value, None, 1]
  if isinstance(value, int):
    return [2 * value, 0, -1, None, str(value), value + 0.5]
  if isinstance(value, float):
    return [2 * value + 0.5, 0.0, -1.0, None, str(value)]
  if isinstance(value, str):
    return ['x', None]
  if isinstance(value, list):
    return [value[::-1], value[1:], [], None, 'x', [[1]]]
  if isinstance(value, dict):
    return [{}, None, [1]]
  return [1, 0.5, True, False, 'x', [1], {}]


def _changes(values, names):
  """Yields the name of a changed field, and all fields."""
  for name in names:
    others = _others(name, values.get(name))
    for other in [*others, _ABSENT] if name in values else others:
      changed = {n: v for n, v in values.items() if n != name}
      if other is not _ABSENT:
        changed[name] = other
      yield name, reference_configs.as_json(changed)


@pytest.mark.slow
def test_each_field_changes_the_logits_or_is_refused(reference):
  names = _names(reference.config, reference.model_class)
  without_effect = fields_lib.WITHOUT_EFFECT
  tried = [name for name in names if name not in without_effect]
  assert len(tried) > 60
  results = {kind: [] for kind in (REFUSED, OUTSIDE, EQUAL, FAULT)}
  for name, values in _changes(reference.values, tried):
    result = reference.result(values, (name,), is_size=name in _SIZES)
    results[result.kind].append(
      f'{name} = {values.get(name, "absent")!r}: {result.text}'
    )
  assert not results[FAULT], '\n'.join(results[FAULT])
  assert len(results[EQUAL]) > 15
  assert len(results[OUTSIDE]) < 60


def test_fields_without_effect_have_none(reference):
  values = dict(reference.values)
  for name in fields_lib.WITHOUT_EFFECT - _NOT_TRIED:
    default = getattr(reference.config, name, None)
    if name in _VALID:
      values[name] = _VALID[name]
    elif isinstance(default, bool):
      values[name] = not default
    else:
      values[name] = default + 0.25 if isinstance(default, float) else 1
  result = reference.result(reference_configs.as_json(values), ())
  assert result == (EQUAL, 'same bits')


def test_a_model_of_other_sizes_has_the_same_logits(reference):
  values = dict(reference.values)
  numbers_of_layers = {'num_hidden_layers', 'n_layer', 'first_k_dense_replace'}
  for name in {'qk_head_dim', *_SIZES} - numbers_of_layers:
    if isinstance(values.get(name), int):
      values[name] *= 2
  assert reference.result(values, ()).kind == EQUAL


_NASTY = (
  None, True, False, 0, 1, -1, 2**31, 10**30, 0.5, float('inf'), float('nan'),
  '', 'x', '8', 'x' * 10**6, [], [1], [[1]], [None] * 3, {}, {'a': [1]},
)  # fmt: skip


@pytest.mark.parametrize('model', MODELS)
def test_no_value_of_a_field_fails_in_another_way(model):
  """Every error names the field and the file, and is short."""
  model_class, config = open_weights.config_of(model, **MODELS[model])
  values = reference_configs.as_json(config.to_dict())
  values['model_type'] = config.model_type
  rope = values.get('rope_parameters') or {}
  objects = {(): values, ('rope_parameters',): rope}
  objects |= {
    ('rope_parameters', name): inner
    for name, inner in rope.items()
    if isinstance(inner, dict)
  }
  for path, inner in objects.items():
    names = _names(config, model_class) if not path else {*inner, *_ROPE_NAMES}
    for name in names:
      for value in _NASTY:
        changed = inner | {name: value}
        for owner in reversed(path):
          outer = rope if owner != 'rope_parameters' else values
          changed = outer | {owner: changed}
        error = _error_of(changed)
        if error:
          assert error.startswith(reference_configs.WHERE)
          assert name in error
          assert len(error) < 700


def _error_of(values) -> str:
  try:
    config_json.read(values, reference_configs.WHERE)
  except ValueError as error:
    return str(error)
  return ''


_ROPE_NAMES = (
  'rope_theta', 'rope_type', 'type', 'factor', 'attention_factor', 'beta_fast',
  'original_max_position_embeddings', 'short_factor', 'mscale',
  'partial_rotary_factor', 'full_attention', 'sliding_attention', 'truncate',
)  # fmt: skip
_LINEAR = {'rope_type': 'linear', 'factor': 4.0, 'rope_theta': 500.0}
_YARN = {
  'rope_type': 'yarn', 'factor': 4.0, 'rope_theta': 500.0,
  'original_max_position_embeddings': 16,
}  # fmt: skip
_LLAMA3 = {
  'rope_type': 'llama3', 'factor': 4.0, 'low_freq_factor': 1.0,
  'high_freq_factor': 4.0, 'original_max_position_embeddings': 16,
}  # fmt: skip
_OLD_YARN = {'type': 'yarn', 'factor': 4.0}


def _rope_changes(pairs):
  """Returns rotary fields, right and wrong ones, for heads of some pairs."""
  tables = {
    'short_factor': [1.0 + 0.1 * i for i in range(pairs)],
    'long_factor': [1.5 + 0.5 * i for i in range(pairs)],
  }
  longrope = {'rope_type': 'longrope', 'factor': 2.0, **tables}
  objects = (
    {'rope_theta': 500.0}, {'rope_type': None}, {'rope_theta': None}, _LINEAR,
    {**_LINEAR, 'rope_type': 'dynamic'}, {**_LINEAR, 'type': 'dynamic'},
    {**_LINEAR, 'factor': 0}, {**_LINEAR, 'attention_factor': 2.0}, _YARN,
    {**_YARN, 'mscale': 0.5, 'mscale_all_dim': 0.8}, {**_YARN, 'beta_fast': 8},
    {**_YARN, 'attention_factor': 2.0}, {**_YARN, 'truncate': False},
    {**_YARN, 'factor': None}, {**_YARN, **tables}, _LLAMA3,
    {**_LLAMA3, 'high_freq_factor': 0.5}, {**longrope},
    {**longrope, 'original_max_position_embeddings': 16},
    {**longrope, 'rope_type': 'su'}, {**longrope, 'long_factor': [1.0]},
    {'partial_rotary_factor': 0.5}, {**_LINEAR, 'partial_rotary_factor': 0.5},
    {'full_attention': _LINEAR}, {'full_attention': None},
    {'full_attention': _LINEAR, 'sliding_attention': _LINEAR},
    {'full_attention': _LINEAR, 'sliding_attention': {'rope_theta': 500.0}},
    {'full_attention': {**_YARN, 'truncate': False}},
    {'full_attention': {'rope_type': 'yarn', 'factor': 4.0}},
    {'full_attention': [1]}, {'rope_type': 'mrope'}, {'rope_type': ['x']},
    [1], 'x', True, {},
  )  # fmt: skip
  for changed in objects:
    yield {'rope_parameters': changed}
    yield {'rope_scaling': changed}
  outer = {'original_max_position_embeddings': 32}
  yield from (
    {'rope_theta': 500.0}, {'rope_theta': 0}, {'rotary_emb_base': 500.0},
    {'rope_local_base_freq': 50.0}, {'partial_rotary_factor': 0.5},
    {'rotary_pct': 0.5}, {'rotary_pct': 1.5}, {'rope_scaling': _OLD_YARN},
    {'rope_scaling': _OLD_YARN, **outer}, {'rope_parameters': _YARN, **outer},
    {'rope_parameters': _LLAMA3, **outer},
    {'rope_parameters': longrope, **outer},
    {'rope_theta': 500.0, 'rope_scaling': {'type': 'linear', 'factor': 4.0}},
    {'rope_parameters': _LINEAR, 'rope_scaling': {**_LINEAR, 'factor': 2.0}},
    {'rope_parameters': _LINEAR, 'rope_theta': 2e4},
    {'rope_parameters': {'full_attention': _LINEAR}, **outer},
  )  # fmt: skip


# The other families read rotary fields with the same code, here and there.
@pytest.mark.slow
@pytest.mark.parametrize(
  'reference',
  _params(('llama3', 'phi3', 'gpt_neox', 'gemma3', 'deepseek_v3_dense')),
  indirect=True,
)
def test_rotary_fields_change_the_logits_or_are_refused(reference):
  config = reference.config
  head = getattr(config, 'head_dim', None) or (
    config.hidden_size // config.num_attention_heads
  )
  dropped = {'rope_parameters', 'original_max_position_embeddings'}
  plain = {k: v for k, v in reference.values.items() if k not in dropped}
  results = {kind: [] for kind in (REFUSED, OUTSIDE, EQUAL, FAULT)}
  for changed in _rope_changes(head // 2):
    # dynamic stretches texts that are longer than the model's length, and
    # longrope is defined for others only.
    length = 96 if 'long_factor' in str(changed) else 48
    values = {**plain, 'max_position_embeddings': length, **changed}
    names = ('rope_', 'rotary', 'original_max', 'full_attention')
    result = reference.result(reference_configs.as_json(values), names)
    results[result.kind].append(f'{changed}: {result.text}')
  assert not results[FAULT], '\n'.join(results[FAULT])
  assert len(results[EQUAL]) > 6


@pytest.mark.parametrize(
  ('reference', 'changed'),
  [
    ('gemma3', {'layer_types': _ABSENT, 'sliding_window_pattern': 2}),
    ('gemma3', {'layer_types': _ABSENT, '_sliding_window_pattern': 2}),
    ('gemma3', {'sliding_window_pattern': 3, '_sliding_window_pattern': 4}),
    ('gemma', {'hidden_act': 'gelu', 'hidden_activation': 'gelu_pytorch_tanh'}),
    ('gpt2', {'n_ctx': 16}),
    ('gpt_neox', {'num_key_value_heads': 2, 'head_dim': 8}),
    ('mixtral', {'num_experts': 4}),
    ('mixtral', {'num_experts': 4, 'num_local_experts': _ABSENT}),
    ('qwen3_moe_dense_first', {'num_experts': 4, 'num_local_experts': 4}),
    ('qwen2_window', {'layer_types': _ABSENT, 'max_window_layers': 0}),
    ('qwen2_window', {'layer_types': _ABSENT, 'use_sliding_window': False}),
    ('smollm3', {'no_rope_layers': _ABSENT, 'no_rope_layer_interval': 2}),
    ('smollm3', {'layer_types': _ABSENT, 'use_sliding_window': False}),
    ('deepseek_v2', {'num_experts': 8, 'head_dim': 4, 'qk_head_dim': 12}),
    ('deepseek_v3', {'num_local_experts': 8, 'rope_interleave': None}),
  ],
  indirect=['reference'],
)
@pytest.mark.slow
def test_two_fields_that_say_one_thing_are_read_as_there(reference, changed):
  values = {**reference.values, **changed}
  values = {n: v for n, v in values.items() if v is not _ABSENT}
  assert reference.result(values, ()).kind == EQUAL


@pytest.mark.parametrize(
  ('model', 'changed', 'message'),
  [
    ('mixtral', {'num_experts': 8}, 'num_experts = 8, expected num_local_ex'),
    ('qwen3_moe', {'num_experts': 8}, 'num_local_experts = 6, expected num_ex'),
    ('deepseek_v2', {'num_experts': 4}, 'num_experts = 4, expected n_routed'),
    ('deepseek_v3', {'num_local_experts': 4}, 'num_local_experts = 4, expec'),
    ('deepseek_v3', {'head_dim': 8}, 'head_dim = 8, expected qk_rope_head_dim'),
    ('deepseek_v2', {'qk_head_dim': 9}, 'qk_head_dim = 9, expected qk_rope_h'),
    ('deepseek_v2', {'num_key_value_heads': 2}, 'num_key_value_heads = 2, exp'),
    ('gpt_neox', {'head_dim': 4}, 'head_dim = 4, expected hidden_size / num'),
    ('gpt2', {'hidden_size': 64}, 'hidden_size = 64, expected only fields of'),
    ('llama', {'hidden_activation': 'relu'}, "hidden_activation = 'relu', exp"),
    ('llama', {'num_kv_heads': 1}, 'num_kv_heads = 1, expected only fields'),
    ('phi3', {'dtype': 'float16', 'torch_dtype': 'float32'}, 'torch_dtype = '),
    ('qwen2_window', {'use_sliding_window': False}, 'layer_types = .* without'),
    ('smollm3', {'layer_types': ['sliding_attention'] * 4}, 'layer_types = '),
    ('gemma2', {'attn_logit_softcapping': 0}, 'attn_logit_softcapping = 0, ex'),
    ('gemma3', {'final_logit_softcapping': 0.0}, 'final_logit_softcapping = 0'),
    ('gemma3', {'query_pre_attn_scalar': -1}, 'query_pre_attn_scalar = -1, e'),
    ('mistral', {'sliding_window': 0}, 'sliding_window = 0, expected an integ'),
    ('gpt2', {'n_inner': 0}, 'n_inner = 0, expected an integer from 1'),
  ],
)
def test_fields_that_disagree_or_are_0_are_refused(model, changed, message):
  _, config = open_weights.config_of(model)
  values = reference_configs.as_json(config.to_dict()) | changed
  values['model_type'] = config.model_type
  error = _error_of(values)
  assert re.match(f'{reference_configs.WHERE}: got {message}', error), error
