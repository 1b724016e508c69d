"""Settings: every range is checked, and the message names the setting."""

import pytest

from inference import settings


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
    ('seed', 2**32, 'an integer from 0 to 4294967295'),
    ('max_tokens', 0, 'an integer from 1'),
    ('stop', ('',), 'strings, none of them empty'),
    ('stop', 'abc', 'strings, none of them empty'),
  ],
)
def test_a_setting_out_of_range_is_refused(setting, value, expected):
  with pytest.raises(
    settings.SettingError, match=f'{setting}: got .*, expected {expected}'
  ) as caught:
    settings.Settings(**{setting: value})
  assert caught.value.setting == setting


def test_a_recommendation_that_is_unknown_is_refused():
  with pytest.raises(
    ValueError, match=r"generation.json: got the settings \['best_of'\]"
  ):
    settings.recommended({'temperature': 1.0, 'best_of': 2})


def test_a_recommendation_becomes_settings():
  assert settings.recommended({'top_k': 3, 'stop': ['a', 'b']}) == (
    settings.Settings(top_k=3, stop=('a', 'b'))
  )
