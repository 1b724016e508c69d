"""Figures are SVG with text in it, and the same from the same numbers."""

from xml.etree import ElementTree

import pytest

from studies.common import figure

pytest.importorskip('matplotlib')


def _panel(**fields):
  line = figure.Line(x=[1, 2, 4], y=[3, 2, 1], low=[2, 1, 0], high=[4, 3, 2])
  return figure.Panel(
    title='of a test',
    x_label='rate',
    y_label='loss',
    lines={'width 64': line},
    **fields,
  )


def test_a_figure_is_a_small_svg_with_text(tmp_path):
  path = tmp_path / 'figure.svg'
  figure.save(path, [_panel(log_x=True), _panel(y_limits=(0, 4))])
  words = ''.join(ElementTree.parse(path).getroot().itertext())
  assert 'of a test' in words
  assert 'width 64' in words
  assert path.stat().st_size < 60_000


def test_the_same_numbers_draw_the_same_file(tmp_path):
  paths = [tmp_path / 'a.svg', tmp_path / 'b.svg']
  for path in paths:
    figure.save(path, [_panel()])
  assert paths[0].read_bytes() == paths[1].read_bytes()


def test_a_figure_of_nothing_is_refused(tmp_path):
  with pytest.raises(ValueError, match='got a panel without lines'):
    figure.save(tmp_path / 'a.svg', [])


def test_a_figure_is_a_png_if_its_name_says_so(tmp_path):
  path = tmp_path / 'figure.png'
  figure.save(
    path, [_panel(log_x=True, log_y=True, log_base=10)], share_y=False
  )
  assert path.read_bytes().startswith(b'\x89PNG')


def test_another_format_is_refused(tmp_path):
  with pytest.raises(ValueError, match=r'expected a name that ends in \.svg'):
    figure.save(tmp_path / 'figure.pdf', [_panel()])
