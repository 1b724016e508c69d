"""Charts are well-formed SVG, and show what they are given."""

import math
from xml.etree import ElementTree

import pytest

from training.reporting.page import charts, ticks

_SVG = '{http://www.w3.org/2000/svg}'


def _drawn(chart: charts.Chart) -> ElementTree.Element:
  return ElementTree.fromstring(charts.svg(chart))


def _chart(series, x_log=False, y_log=False, **fields) -> charts.Chart:
  return charts.Chart(
    title='a <title> & more',
    x=charts.Axis(label='step', is_log=x_log),
    y=charts.Axis(label='loss', is_log=y_log),
    series=[series],
    **fields,
  )


def _places(root: ElementTree.Element) -> list[tuple[float, float]]:
  return [
    (float(each.attrib['cx']), float(each.attrib['cy']))
    for each in root.iter(f'{_SVG}circle')
  ]


def test_points_lie_where_their_values_are():
  series = charts.Series(label='', x=[0, 5, 10], y=[1, 2, 3], is_joined=False)
  (x0, y0), (x1, y1), (x2, y2) = _places(_drawn(_chart(series)))
  assert x1 == pytest.approx((x0 + x2) / 2, abs=0.1)
  assert y1 == pytest.approx((y0 + y2) / 2, abs=0.1)
  assert x0 < x2
  assert y0 > y2  # the y axis of SVG points down


def test_a_logarithmic_axis_has_equal_ratios():
  series = charts.Series(
    label='', x=[0.01, 0.1, 1], y=[1, 1, 1], is_joined=False
  )
  (x0, _), (x1, _), (x2, _) = _places(_drawn(_chart(series, x_log=True)))
  assert x1 - x0 == pytest.approx(x2 - x1, abs=0.2)


def test_values_that_cannot_be_drawn_are_left_out():
  series = charts.Series(
    label='', x=[0, 1, 2, 3], y=[1, math.nan, math.inf, 2], is_joined=False
  )
  assert len(_places(_drawn(_chart(series)))) == 2
  # The logarithm of 0 as well.
  assert len(_places(_drawn(_chart(series, x_log=True)))) == 1
  empty = charts.Series(label='', x=[], y=[])
  assert not _places(_drawn(_chart(empty)))


def test_the_title_is_text_and_read_aloud():
  series = charts.Series(label='<b>', x=[1], y=[1], notes=['<i>'])
  root = _drawn(_chart(series))
  assert root.attrib['role'] == 'img'
  assert root[0].tag == f'{_SVG}title'
  assert root[0].text == 'a <title> & more'
  assert [e.text for e in root.iter(f'{_SVG}title')][-1] == '<i>'


def test_a_file_stands_alone():
  series = charts.Series(label='', x=[1, 2], y=[1, 2])
  text = charts.svg(_chart(series), is_file=True)
  assert '<style>' in text
  assert '<style>' not in charts.svg(_chart(series))
  assert 'http' not in text.replace('http://www.w3.org/2000/svg', '')


@pytest.mark.parametrize(
  ('low', 'high', 'expected'),
  [
    (0.0, 100.0, [0, 20, 40, 60, 80, 100]),
    (4.41, 5.58, [4.5, 5.0, 5.5]),
    (-1.0, 1.0, [-1.0, -0.5, 0.0, 0.5, 1.0]),
  ],
)
def test_linear_ticks_are_round(low, high, expected):
  assert ticks.linear(low, high, 5) == pytest.approx(expected)


@pytest.mark.parametrize(
  ('low', 'high', 'expected'),
  [
    (1e-5, 1.0, [1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1]),
    (0.002, 0.125, [0.002, 0.005, 0.01, 0.02, 0.05, 0.1]),
    (5.4, 5.9, [5.4, 5.5, 5.6, 5.7, 5.8, 5.9]),
  ],
)
def test_logarithmic_ticks_are_round(low, high, expected):
  assert ticks.logarithmic(low, high, 6) == pytest.approx(expected)


def test_ticks_are_told_apart():
  assert ticks.texts([4.5, 5.0, 5.5]) == ['4.5', '5.0', '5.5']
  assert ticks.texts([0, 5000, 10000]) == ['0', '5,000', '10,000']
  assert ticks.texts([0.001, 0.01, 0.1]) == ['0.001', '0.01', '0.1']
