"""Ways to teach a student, each of two steps, and the table of them."""

import pytest

from experiments import distil
from studies import answers, distillation as study
from studies.common import answered


@pytest.mark.slow
def test_variants_are_trained_and_measured(tmp_path, monkeypatch):
  monkeypatch.setenv('HOME', str(tmp_path))  # of the token stores
  variants = 'teacher', 'alone'
  for variant in variants:
    study.train(tmp_path, 3, variant, steps=2)
  # Models of two steps do not end their answers.
  lines = '{"prompt": "1 + 1", "response": "2"}\n' * 8
  (tmp_path / distil.ANSWERS_FILE).write_text(lines)
  answers.write_greedy(  # which are there
    tmp_path / 'teacher' / 'frozen',
    distil.QUESTIONS,
    tmp_path / distil.ANSWERS_FILE,
    max_tokens=4,
  )
  for variant in set(distil.VARIANTS) - set(variants):
    distil.get_config(f'{variant}:{tmp_path}').validate()
  found = study.measure(tmp_path, 4, variants)
  assert (tmp_path / distil.ANSWERS_FILE).read_text() == lines
  assert tuple(found) == variants
  assert all(each.tokens > 0 and each.flops > 0 for each in found.values())
  assert len(study.table([found]).splitlines()) == 2 + len(variants)


def _measured(accuracy):
  score = answered.Score(accuracy, 0.01)
  return study.Measured(
    accuracy=score, loss=score, tokens=1, flops=1.0, seconds=1.0
  )


def test_the_gap_runs_from_the_student_alone_to_its_teacher():
  found = {
    name: _measured(accuracy)
    for name, accuracy in (
      ('teacher', 0.5), ('alone', 0.1), ('forward', 0.3), ('answers', 0.05)
    )
  }  # fmt: skip
  closed = study.gaps(found)
  assert closed['teacher'] == 1
  assert closed['alone'] == 0
  assert closed['forward'] == pytest.approx(0.5)
  assert closed['answers'] < 0
  assert '| forward | 30.0 +- 1.0 | 50 |' in study.table([found])
