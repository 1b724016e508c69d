"""Flags from fields: every field has one, and a new one needs nothing else."""

import dataclasses

from absl import flags
import pytest

from evals import options
from inference import flags as flags_lib
from inference.engine import engine_config
from inference.sampling import settings


def _field(default, **metadata):
  return dataclasses.field(
    default=default, metadata={'help': 'Does it.', **metadata}
  )


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Config:
  share: float = _field(0.5)
  count: int = _field(3)
  limit: int | None = _field(None)
  name: str = _field('a')
  is_on: bool = _field(True)
  ids: tuple[int, ...] = _field(())
  words: tuple[str, ...] = _field(())
  pairs: tuple[tuple[int, float], ...] = _field((), flag=False)


def _group(config, **fields):
  return flags_lib.Group(config=config, ways=('prompt',), **fields)


def _parsed(group, *argv):
  values = flags.FlagValues()
  group.define(values)
  values(['serve.py', *argv])
  return group.given(values), values


def test_flags_that_are_not_given_leave_the_fields_alone():
  given, values = _parsed(_group(_Config, prefix='x.'))
  assert given == {}
  assert sorted(values) == [
    *('x.count', 'x.ids', 'x.is_on', 'x.limit', 'x.name', 'x.share', 'x.words')
  ]


def test_flags_become_values_of_the_types_of_the_fields():
  given, _ = _parsed(
    _group(_Config),
    *('--share=1', '--count=4', '--limit=5', '--name=b', '--nois_on'),
    *('--ids=1', '--ids=2', '--words=c d'),
  )
  assert _Config(**given) == _Config(
    share=1.0, count=4, limit=5, name='b', is_on=False, ids=(1, 2),
    words=('c d',),
  )  # fmt: skip
  assert type(given['share']) is float


def test_the_help_states_the_default_of_the_field():
  _, values = _parsed(_group(_Config, default_words='5 or {}'))
  assert values['count'].help == 'Does it. Default: 5 or 3.'
  assert values['is_on'].help == 'Does it. Default: 5 or true.'
  assert values['limit'].help == 'Does it.'


def test_a_field_without_a_form_as_a_flag_is_refused():
  @dataclasses.dataclass
  class Wrong:
    pair: dict[str, int] = _field(None)

  with pytest.raises(TypeError, match=r'pair: got a field of type dict\[str'):
    _group(Wrong).define(flags.FlagValues())


def test_a_new_setting_is_a_flag_by_its_field_alone():
  @dataclasses.dataclass(frozen=True, kw_only=True)
  class More(settings.Settings):
    typical_p: float = _field(1.0)

  given, values = _parsed(_group(More), '--typical_p=0.9', '--top_k=3')
  assert given == {'typical_p': 0.9, 'top_k': 3}
  assert values['typical_p'].help == 'Does it. Default: 1.0.'


@pytest.mark.parametrize(
  ('config', 'without_flag'),
  [
    (
      settings.Settings,
      {'logit_bias', 'logprobs', 'prompt_logprobs', 'constraint'},
    ),
    (engine_config.EngineConfig, set()),
    (options.Options, set()),
  ],
)
def test_every_field_of_what_serve_is_told_is_a_flag_with_help(
  config, without_flag
):
  _, values = _parsed(_group(config))
  names = {field.name for field in dataclasses.fields(config)}
  assert set(values) == names - without_flag
  for name in values:
    assert len(values[name].help) > 20
    assert values[name].value is None
