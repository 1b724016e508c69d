"""Flags that set fields of frozen values: an optimizer's rule, an objective."""

import pathlib
import re
import sys

from absl import flags
from ml_collections import config_flags
import pytest

from experiments import quickstart
from training import flags as flags_lib
from training.objectives import next_token
from training.optimizer import update_rules

ROOT = pathlib.Path(__file__).parents[2]
QUICKSTART = '--config=experiments/quickstart.py'
RULE = '--config.optimizer.rule'


def _parse(monkeypatch, *args):
  argv = ['train.py', QUICKSTART, *args]
  monkeypatch.setattr(sys, 'argv', argv)
  monkeypatch.chdir(ROOT)
  values = flags.FlagValues()
  config_flags.DEFINE_config_file('config', flag_values=values)
  assert flags_lib.parse(argv, values) == ['train.py']
  assert sys.argv == argv
  return values.config


def test_a_rule_is_picked_with_its_defaults(monkeypatch):
  config = _parse(monkeypatch, f'{RULE}=lion')
  assert config.optimizer.rule == update_rules.Lion()
  # The rest of the optimizer is that of the file.
  assert config.optimizer.peak_lr == 2e-2


def test_a_field_of_the_rule_in_the_file_is_set(monkeypatch):
  config = _parse(
    monkeypatch, f'{RULE}.momentum=0.9', '--config.optimizer.peak_lr=1e-3'
  )
  assert config.optimizer.rule == update_rules.Muon(momentum=0.9)
  assert config.optimizer.peak_lr == 1e-3


@pytest.mark.parametrize('order', [1, -1])
def test_a_choice_comes_before_its_fields_in_any_order(monkeypatch, order):
  args = [f'{RULE}=ademamix', f'{RULE}.alpha=3', f'{RULE}.beta1=0.8'][::order]
  config = _parse(monkeypatch, *args)
  assert config.optimizer.rule == update_rules.Ademamix(alpha=3.0, beta1=0.8)


def test_of_the_same_flag_the_last_counts(monkeypatch):
  config = _parse(monkeypatch, f'{RULE}=lion', f'{RULE}=adafactor')
  assert config.optimizer.rule == update_rules.Adafactor()


def test_a_file_of_flags_counts_as_the_flags(monkeypatch, tmp_path):
  (tmp_path / 'flags').write_text(
    f'{RULE}=ademamix\n# a comment\n\n{RULE}.beta1=0.8\n'
    '--config.optimizer.peak_lr=1e-3\n--config.objective.z_loss_weight=1e-4\n'
  )
  config = _parse(
    monkeypatch, f'{RULE}.alpha=3', f'--flagfile={tmp_path / "flags"}'
  )
  assert config.optimizer.rule == update_rules.Ademamix(alpha=3.0, beta1=0.8)
  assert config.optimizer.peak_lr == 1e-3
  assert config.objective == next_token.NextToken(z_loss_weight=1e-4)


def test_fields_have_the_types_of_their_values(monkeypatch):
  config = _parse(
    monkeypatch,
    f'{RULE}=adafactor',
    f'{RULE}.scale_by_parameter=false',
    f'{RULE}.min_factored_size=4',
  )
  assert config.optimizer.rule == update_rules.Adafactor(
    scale_by_parameter=False, min_factored_size=4
  )


def test_a_field_of_the_objective_is_set(monkeypatch):
  config = _parse(monkeypatch, '--config.objective.z_loss_weight=1e-4')
  assert config.objective == next_token.NextToken(z_loss_weight=1e-4)


@pytest.mark.parametrize(
  ('args', 'message'),
  [
    (
      ['--config.objective=next_token'],
      '--config.objective: got a value, expected none: it is chosen in the file'
      ' of an experiment',
    ),
    (
      ['--config.objective.beta=1'],
      "--config.objective.beta: got the unknown field 'beta', expected one of"
      ' z_loss_weight',
    ),
    (
      ['--config.z_loss_weight=1e-4'],
      "got the unknown field 'z_loss_weight', expected one of name, model",
    ),
    ([f'{RULE}=lyon'], '; did you mean lion?'),
    (['--config.optimizer.peak=1'], '; did you mean peak_lr?'),
    (
      [f'{RULE}=sgd'],
      f"{RULE}: got 'sgd', expected one of adamw, muon, adafactor, lion,",
    ),
    (
      [f'{RULE}=lion', f'{RULE}.epsilon=1e-6'],
      f"{RULE}.epsilon: got the unknown field 'epsilon', expected one of beta1,"
      ' beta2, state_dtype',
    ),
    (
      [f'{RULE}.beta3=0.5'],
      f"{RULE}.beta3: got the unknown field 'beta3', expected one of beta1,",
    ),
    ([f'{RULE}.beta1=many'], f'{RULE}.beta1=many: expected a number'),
    ([f'{RULE}.newton_schulz_steps=2.5'], 'steps=2.5: expected an integer'),
    ([f'{RULE}.beta1'], f'{RULE}.beta1: got no value, expected one, as in'),
    ([f'{RULE}.beta1.x=1'], "got the unknown field 'x', expected none"),
    (
      ['--config.optimizer.beta2=0.9'],
      "got the unknown field 'beta2', expected one of rule, peak_lr",
    ),
    (
      ['--config.optimizer.name=lion'],
      "got the unknown field 'name', expected one of rule, peak_lr",
    ),
  ],
)
def test_what_a_rule_does_not_have_is_refused(monkeypatch, args, message):
  with pytest.raises(flags_lib.FlagError) as caught:
    _parse(monkeypatch, *args)
  assert message in str(caught.value)
  assert '\n' not in str(caught.value)


# ------------------------------------------------------------------------------
# Fields that are set by name, as a sweep does.


def test_a_field_is_set_by_its_name():
  config = quickstart.get_config()
  for path, value in (
    ('optimizer.peak_lr', 1),
    ('optimizer.rule', 'lion'),
    ('optimizer.rule.beta1', 0.5),
    ('objective.z_loss_weight', 1e-4),
    ('model.num_layers', 2),
    ('data.tokenizer.kind', 'byte'),
    ('seed', 7),
  ):
    flags_lib.set_field(config, path, value)
  assert config.optimizer.peak_lr == 1.0
  assert isinstance(config.optimizer.peak_lr, float)
  assert config.optimizer.rule == update_rules.Lion(beta1=0.5)
  assert config.objective == next_token.NextToken(z_loss_weight=1e-4)
  assert (config.model.num_layers, config.seed) == (2, 7)
  assert config.data.tokenizer.kind == 'byte'


@pytest.mark.parametrize(
  ('path', 'value', 'words'),
  [
    ('optimizer.peek_lr', 1.0, "got the unknown field 'peek_lr', expected one"),
    ('optimizer.rule', 'lyon', 'did you mean lion'),
    ('optimizer.peak_lr', 'x', "got 'x', expected a number, as its value 0.02"),
    ('model.num_layers', 1.5, 'got 1.5, expected an integer, as its value 4'),
    ('model.num_layers', True, 'got True, expected an integer'),
    ('data.open_source', 'x', "got 'x', expected none: it is chosen in the"),
    ('data.sources[0].weight', 1.0, 'got an index, expected names of fields'),
  ],
)
def test_a_wrong_field_or_value_is_one_line(path, value, words):
  with pytest.raises(ValueError, match=re.escape(words)) as error:
    flags_lib.set_field(quickstart.get_config(), path, value)
  assert str(error.value).startswith(path)


def test_the_flags_of_the_config_are_found_in_a_command():
  argv = [
    'sweep.py', '--config', 'a.py', '--sweep=b.py', '--config.num_steps=3',
    '-config.optimizer.rule', 'lion', '--workdir=--config.x',
  ]  # fmt: skip
  assert flags_lib.config_flags_in(argv) == [
    '--config=a.py', '--config.num_steps=3', '--config.optimizer.rule=lion'
  ]  # fmt: skip
