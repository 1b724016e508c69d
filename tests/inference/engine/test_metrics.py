"""Metrics as Prometheus reads them."""

from prometheus_client import parser
import pytest

from inference.engine import metrics as metrics_lib


def test_the_text_is_what_prometheus_parses():
  metrics = metrics_lib.Metrics()
  metrics.sampled_tokens.inc(3)
  metrics.finished.labels('stop').inc()
  metrics.running.set(2)
  metrics.first_token.observe(0.004)
  text = metrics.text().decode()
  families = {
    family.name: family
    for family in parser.text_string_to_metric_families(text)
  }
  samples = {
    (sample.name, *sample.labels.values()): sample.value
    for family in families.values()
    for sample in family.samples
  }
  assert samples['sampled_tokens_total',] == 3
  assert samples['finished_total', 'stop'] == 1
  assert samples['running',] == 2
  assert samples['compilations_after_ready_total',] == 0
  assert samples['time_to_first_token_seconds_count',] == 1
  assert samples['time_to_first_token_seconds_bucket', '0.003'] == 0
  assert samples['time_to_first_token_seconds_bucket', '0.005'] == 1
  kinds = {'sampled_tokens': 'counter', 'running': 'gauge'}
  kinds['inter_token_seconds'] = 'histogram'
  assert {name: families[name].type for name in kinds} == kinds
  assert all(family.documentation for family in families.values())


def test_engines_have_figures_of_their_own():
  first, second = metrics_lib.Metrics(), metrics_lib.Metrics()
  first.steps.inc()
  assert first.value('engine_steps_total') == 1
  assert second.value('engine_steps_total') == 0


def test_a_figure_that_is_not_there_is_zero():
  metrics = metrics_lib.Metrics()
  assert metrics.value('finished_total', reason='stop') == 0


def test_padding_waste_is_the_share_of_rows_that_hold_nothing():
  metrics = metrics_lib.Metrics()
  assert metrics.padding_waste == 0
  metrics.rows.labels('real').inc(30)
  assert metrics.padding_waste == 0
  metrics.rows.labels('padding').inc(10)
  assert metrics.padding_waste == pytest.approx(0.25)
