"""SentencePiece model files, written field by field."""

import json
import struct

# Numbers of sentencepiece_model.proto.
_MODEL_TYPE, _HAS_BYTES = 3, 35
_CHARSMAP, _IS_PREFIXED, _IS_STRIPPED = 2, 3, 4
BYTES = [(f'<0x{i:02X}>', 0.0, 6) for i in range(256)]
SPECIALS = [('<unk>', 0.0, 2), ('<s>', 0.0, 3), ('</s>', 0.0, 3)]

# Of pieces whose joins meet each other; the highest is joined first.
SCORES = {'\u2581a': -1.0, 'bc': -2.0, 'ab': -3.0, 'abc': -4.0, 'lo': -5.0}
SCORES |= {'ll': -6.0, 'he': -7.0, 'hell': -8.0, '\u2581ab': -9.0}


def varint(number):
  """Returns a number in 7 bits per byte, the lowest first."""
  out = b''
  while number > 127:
    out, number = out + bytes([number & 127 | 128]), number >> 7
  return out + bytes([number])


def field(number, value):
  """Returns a field: an integer, a float, or bytes."""
  if isinstance(value, int):
    return varint(number << 3) + varint(value)
  if isinstance(value, float):
    return varint(number << 3 | 5) + struct.pack('<f', value)
  return varint(number << 3 | 2) + varint(len(value)) + value


def message(fields):
  """Returns a message with these fields."""
  return b''.join(field(number, value) for number, value in fields.items())


def piece(text, score, kind):
  """Returns a piece as a field of the file."""
  text = text if isinstance(text, bytes) else text.encode()
  return field(1, message({1: text, 2: float(score), 3: kind}))


def model(
  pieces,
  *,
  model_type=2,
  has_bytes=True,
  is_prefixed=True,
  is_stripped=False,
  trainer=(),
  normalizer=(),
):
  """Returns the bytes of a model file; BPE without other arguments."""
  rules = {_IS_PREFIXED: int(is_prefixed), _IS_STRIPPED: int(is_stripped)}
  of_trainer = {_MODEL_TYPE: model_type, _HAS_BYTES: int(has_bytes)}
  return (
    b''.join(piece(*each) for each in pieces)
    + field(2, message(of_trainer | dict(trainer)))
    + field(3, message(rules | dict(normalizer)))
  )


def small(**kwargs):
  """Returns a BPE of letters and a few words, whose joins meet each other."""
  pieces = [(word, score, 1) for word, score in SCORES.items()]
  letters = [(letter, -100.0, 1) for letter in 'abcdehlor\u2581']
  more = kwargs.pop('more', [])
  return model([*SPECIALS, *BYTES, *letters, *pieces, *more], **kwargs)


def write(directory, data, config=None, **files):
  """Writes a directory with a model file and, by name, JSON files."""
  directory.mkdir(exist_ok=True)
  (directory / 'tokenizer.model').write_bytes(data)
  for name, value in {'tokenizer_config': config or {}, **files}.items():
    text = json.dumps(value)
    (directory / f'{name}.json').write_text(text, 'utf-8')
  return directory


def joined(text, scores):
  """Joins pieces by the book: the highest score, the first of equals."""
  parts = list(text)
  while True:
    pairs = [
      (scores[a + b], -i)
      for i, (a, b) in enumerate(zip(parts, parts[1:], strict=False))
      if a + b in scores
    ]
    if not pairs:
      return parts
    i = -max(pairs)[1]
    parts[i : i + 2] = [parts[i] + parts[i + 1]]
