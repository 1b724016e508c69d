from typing import NamedTuple
class Document(NamedTuple):
  ids: object
  trained: object
class Unit(NamedTuple):
  documents: tuple
  streams: dict
class Empty(ValueError): pass
class Encoder: pass
