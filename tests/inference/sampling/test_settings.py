"""Settings: every range is checked, and the message names the setting."""

import json

import pytest

from inference.sampling import settings


@pytest.mark.parametrize(
  ('setting', 'value', 'expected'),
  [
    ('temperature', -0.1, 'a number >= 0'),
    ('temperature', float('nan'), 'a number >= 0'),
    ('temperature', float('inf'), 'a number >= 0'),
    ('temperature', '1', 'a number >= 0'),
    ('temperature', True, 'a number >= 0'),
    ('top_p', 0.0, 'a number above 0, at most 1'),
    ('top_p', 1.1, 'a number above 0, at most 1'),
    ('min_p', 1.0, 'a number >= 0 and below 1'),
    ('top_k', -1, 'an integer from 0'),
    ('top_k', 1.5, 'an integer from 0'),
    ('repetition_penalty', 0.0, 'a number from 0.001 to 1000'),
    ('repetition_penalty', float('nan'), 'a number from 0.001 to 1000'),
    ('presence_penalty', 2.1, 'a number from -2 to 2'),
    ('frequency_penalty', -2.1, 'a number from -2 to 2'),
    ('frequency_penalty', None, 'a number from -2 to 2'),
    ('seed', 2**64, f'an integer from {-(2**63)} to {2**64 - 1}'),
    ('n', 0, 'an integer from 1'),
    ('max_tokens', 0, 'an integer from 1'),
    ('min_tokens', -1, 'an integer from 0'),
    ('min_tokens', None, 'an integer from 0'),
    ('ignore_eos', 1, 'True or False'),
    ('logprobs', 21, 'an integer from 0 to 20'),
    ('logprobs', True, 'an integer from 0 to 20'),
    ('prompt_logprobs', -1, 'an integer from 0 to 20'),
    ('stop', ('',), 'strings, none of them empty'),
    ('stop', 'abc', 'strings, none of them empty'),
    ('stop', ('a',) * 257, 'at most 256 strings; send fewer'),
    ('stop', ('a' * 1025,), 'at most 1024 characters in a string; shorten'),
    ('stop', ('a' * 1024,) * 5, 'at most 4096 characters in all strings tog'),
    ('stop_ids', [3], 'token ids'),
    ('stop_ids', (-1,), 'token ids'),
    ('stop_ids', (True,), 'token ids'),
    ('stop_ids', tuple(range(17)), 'at most 16 ids; use stop strings'),
    ('logit_bias', {3: 1.0}, 'pairs of a token id and a bias'),
    ('logit_bias', ((3, 100.5),), 'pairs of a token id and a bias'),
    ('logit_bias', ((3, float('nan')),), 'pairs of a token id and a bias'),
    ('logit_bias', ((-3, 1.0),), 'pairs of a token id and a bias'),
    ('logit_bias', ((3,),), 'pairs of a token id and a bias'),
    ('logit_bias', ((3, 1.0), (3, 2.0)), 'at most 300 token ids, each of them'),
    (
      'logit_bias',
      tuple((i, 1.0) for i in range(301)),
      'at most 300 token ids',
    ),
  ],
)
def test_a_setting_out_of_range_is_refused(setting, value, expected):
  with pytest.raises(
    settings.SettingError, match=f'{setting}: got .*, expected {expected}'
  ) as caught:
    settings.Settings(**{setting: value})
  assert caught.value.setting == setting


def test_more_tokens_at_least_than_at_most_are_refused():
  with pytest.raises(
    settings.SettingError,
    match='min_tokens: got 5, expected at most max_tokens, which is 4; lower',
  ):
    settings.Settings(min_tokens=5, max_tokens=4)
  settings.Settings(min_tokens=4, max_tokens=4)
  settings.Settings(min_tokens=5)


@pytest.mark.parametrize(
  ('setting', 'value'),
  [('stop_ids', (3, 10)), ('logit_bias', ((3, 1.0), (10, 1.0)))],
)
def test_ids_outside_a_vocabulary_are_refused(setting, value):
  chosen = settings.Settings(**{setting: value})
  chosen.check_ids(11)
  with pytest.raises(
    settings.SettingError, match=f'{setting}: got 10, expected .* below 10'
  ):
    chosen.check_ids(10)


def test_settings_are_values():
  chosen = {'logit_bias': ((3, 1.0),), 'stop_ids': (2,), 'stop': ('a',)}
  first, second = settings.Settings(**chosen), settings.Settings(**chosen)
  assert len({first, second, settings.Settings()}) == 2


def test_bias_pairs_read_what_json_can_spell():
  biases = json.loads('{"50256": -100, "7": 1.5}')
  assert settings.bias_pairs(biases) == ((50256, -100), (7, 1.5))
  assert settings.bias_pairs({7: 1.5}) == ((7, 1.5),)


@pytest.mark.parametrize('key', ['hello', '-1', '1.0', '²', '', -1, 1.0, True])
def test_a_bias_for_what_is_no_id_is_refused(key):
  with pytest.raises(
    settings.SettingError, match='logit_bias: got .*, expected token ids'
  ):
    settings.bias_pairs({key: 1.0})


def test_a_recommendation_that_is_unknown_is_refused():
  with pytest.raises(
    ValueError, match=r"generation.json: got the settings \['best_of'\]"
  ):
    settings.recommended({'temperature': 1.0, 'best_of': 2})


def test_a_recommendation_becomes_settings():
  generation = json.loads(
    '{"top_k": 3, "stop": ["a", "b"], "stop_ids": [5, 6],'
    ' "logit_bias": {"4": -1}, "repetition_penalty": 1.1}'
  )
  assert settings.recommended(generation) == settings.Settings(
    top_k=3,
    stop=('a', 'b'),
    stop_ids=(5, 6),
    logit_bias=((4, -1),),
    repetition_penalty=1.1,
  )
