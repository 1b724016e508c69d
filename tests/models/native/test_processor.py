"""The processor, as the system describes it."""

import pathlib

import pytest

from models.native import processor


@pytest.fixture(autouse=True)
def _asks_again():
  processor.described.cache_clear()
  yield
  processor.described.cache_clear()


def _system(monkeypatch, text):
  monkeypatch.setattr(pathlib.Path, 'read_text', lambda path: text)


def test_cores_that_are_alike_are_described_once(monkeypatch):
  core = 'processor : {}\nmodel name : A\nflags : avx2 amx_bf16_too\n'
  _system(monkeypatch, core.format(0) + core.format(1))
  assert processor.described() == 'flags : avx2 amx_bf16_too\nmodel name : A'
  assert not processor.has_bfloat16_tiles()


def test_tiles_are_an_instruction_of_their_own(monkeypatch):
  _system(monkeypatch, 'flags : avx2 amx_bf16 amx_tile\n')
  assert processor.has_bfloat16_tiles()


def test_without_a_description_the_text_is_for_this_machine(monkeypatch):
  def fail(path):
    raise FileNotFoundError(path)

  monkeypatch.setattr(pathlib.Path, 'read_text', fail)
  monkeypatch.setattr(processor.platform, 'node', lambda: 'a-machine')
  assert processor.described().endswith('a-machine')
