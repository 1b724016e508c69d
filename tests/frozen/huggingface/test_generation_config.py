"""Fields of generation_config.json become settings, errors or notes."""

import pytest

from frozen.huggingface import generation_config


def test_sampling():
  config = {
    'bos_token_id': 1,
    'eos_token_id': [3, 2, 3],
    'pad_token_id': 0,
    'do_sample': True,
    'temperature': 0.6,
    'top_k': 20,
    'top_p': 0.9,
    'min_p': 0.05,
    'repetition_penalty': 1.05,
    'max_new_tokens': 512,
    'min_new_tokens': 2,
    'stop_strings': 'END',
    'transformers_version': '5.0.0',
    'use_cache': True,
    'typical_p': 1.0,
    'suppress_tokens': [],
    'num_beams': None,
  }
  settings, notes = generation_config.generation_settings(config)
  assert settings == {
    'temperature': 0.6,
    'top_k': 20,
    'top_p': 0.9,
    'min_p': 0.05,
    'repetition_penalty': 1.05,
    'max_tokens': 512,
    'min_tokens': 2,
    'stop': ['END'],
    'stop_ids': [3, 2],
  }
  assert notes == []


def test_defaults_are_those_of_transformers():
  generation = pytest.importorskip('transformers').GenerationConfig
  defaults = generation._get_default_generation_params()
  assert defaults['do_sample'] is False
  settings, notes = generation_config.generation_settings({'do_sample': True})
  for name in ('temperature', 'top_k', 'top_p'):
    assert settings[name] == defaults[name]
  assert settings['min_p'] == 0
  assert notes == ['top_k is not set: 50, as transformers does']


def test_every_field_of_transformers_is_known():
  generation = pytest.importorskip('transformers').GenerationConfig()
  fields = dict.fromkeys(vars(generation), 0.5)
  del fields['max_length']
  with pytest.raises(ValueError) as caught:
    generation_config.generation_settings(fields)
  refused = str(caught.value)
  rest = {
    name: None if f'{name} 0.5' in refused else 'x'
    for name in fields
    if name not in generation_config.generation_settings({}).settings
  }
  rest = {k: v for k, v in rest.items() if k not in generation_config._HANDLED}
  _, notes = generation_config.generation_settings(rest)
  assert sorted(note.split()[0] for note in notes) == [
    'max_time', 'num_return_sequences'
  ]  # fmt: skip


@pytest.mark.parametrize('config', [{}, {'do_sample': False}])
def test_greedy(config):
  assert generation_config.generation_settings(config) == (
    {'temperature': 0.0}, []
  )  # fmt: skip


@pytest.mark.parametrize(
  ('config', 'reason'),
  [({}, 'do_sample is not set'), ({'do_sample': False}, 'do_sample is false')],
)
def test_greedy_says_what_it_does_not_use(config, reason):
  config = config | {'temperature': 0.7, 'top_p': 0.5}
  settings, notes = generation_config.generation_settings(config)
  assert settings == {'temperature': 0.0}
  assert notes == [f'temperature 0.7, top_p 0.5 not used: {reason}']


def test_what_is_not_used_is_listed():
  _, notes = generation_config.generation_settings(
    {'max_length': 4096, 'chat_format': 'chatml', 'max_time': 3.0}
  )
  assert notes == [
    'max_length 4096 is not used, as it counts the prompt; a completion ends'
    ' with max_tokens or the context',
    "chat_format 'chatml' is not used",
    'max_time 3.0 is not used',
  ]


def test_what_changes_samples_is_refused_all_at_once():
  config = {'num_beams': 4, 'no_repeat_ngram_size': 3, 'forced_eos_token_id': 2}
  with pytest.raises(
    ValueError,
    match='got num_beams 4, no_repeat_ngram_size 3, forced_eos_token_id 2,'
    ' expected none',
  ):
    generation_config.generation_settings(config)


@pytest.mark.parametrize(
  ('config', 'error'),
  [
    ({'do_sample': 1}, 'got do_sample 1, expected a boolean'),
    ({'temperature': -1}, 'got temperature -1, expected a number >= 0'),
    ({'temperature': float('nan')}, 'got temperature nan'),
    ({'top_p': 0}, 'got top_p 0, expected a number above 0, at most 1'),
    ({'min_p': 1}, 'got min_p 1, expected a number >= 0 and below 1'),
    ({'top_k': 1.5}, r'got top_k 1\.5, expected an integer >= 0'),
    ({'max_new_tokens': 0}, 'got max_new_tokens 0, expected an integer >= 1'),
    ({'repetition_penalty': 0}, 'got repetition_penalty 0, expected a number'),
    ({'stop_strings': ['']}, 'got stop_strings .* expected strings'),
    ({'eos_token_id': '2'}, "got eos_token_id '2', expected an id or a list"),
  ],
)
def test_values_out_of_range(config, error):
  with pytest.raises(ValueError, match=error):
    generation_config.generation_settings({'do_sample': True} | config)
