"""Stages of a life, each of two steps, and the table of them."""

import re

import pytest

from experiments import lifecycle
from studies import lifecycle as study


@pytest.mark.slow
def test_stages_are_trained_and_measured(tmp_path, monkeypatch):
  monkeypatch.setenv('HOME', str(tmp_path))  # of the token stores
  stages = 'base', 'sft', 'reward'
  for stage in stages:
    study.train(tmp_path, stage, steps=2)
  found = study.measure(tmp_path, 6, stages)
  assert tuple(found) == stages
  # A model is at no distance from itself, and any other one is at some.
  assert found['base'].kl == (0.0, 0.0)
  assert found['sft'].kl.mean != 0
  assert found['reward'].loss is None
  assert all(each.tokens > 0 and each.flops > 0 for each in found.values())
  lines = study.table(found).splitlines()
  assert len(lines) == 2 + len(stages) + 1
  assert 'of pairs' in next(x for x in lines if x.startswith('| reward'))
  for stage in set(lifecycle.PARENTS) - set(stages):
    lifecycle.get_config(f'{stage}:{tmp_path / "sft/frozen"}').validate()


@pytest.mark.parametrize(
  'variant', ['base:runs/x', 'sft', 'dpo:', 'pretrain', 'grp:runs/x']
)
def test_other_variants_are_refused(variant):
  with pytest.raises(ValueError, match=f'got {re.escape(repr(variant))}'):
    lifecycle.get_config(variant)
