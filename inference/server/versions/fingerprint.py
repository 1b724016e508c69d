"""The fingerprint of a version: `system_fingerprint`, and the digests in it.

    weights      names, dtypes, shapes and values (`frozen.format`)
    tokenizer    the files of the tokenizer, and the chat template
    config       every field of the model's config, and its recommended settings
    adapter      weights of the adapter and of its base; only where there is one
    numerics     attention path, dtypes of computation and cache, fast or
                 invariant, versions of jax and jaxlib, device, XLA_FLAGS

Two answers with one fingerprint come from one function of (prompt, settings,
seed). With `--engine.numerics=invariant` they are equal bit for bit; otherwise
other requests in the batch change last bits, which the fingerprint does not
cover. The first 16 digits are of the weights' digest; the others cover all
parts.
"""

from typing import Any
import weakref

from frozen import adapters as frozen_adapters, manifest as manifest_lib
from inference import generate
from storage import digests as digests_lib, file_names

_DIGITS = 16
_KNOWN: weakref.WeakKeyDictionary[generate.Generator, str] = (
  weakref.WeakKeyDictionary()
)


def digests(
  manifest: manifest_lib.Manifest,
  generator: generate.Generator | None,
  adapter: frozen_adapters.Adapter | None = None,
) -> dict[str, str | None]:
  """Returns the digest of each part; numerics are None until it is loaded."""
  of_tokenizer = {
    name: digest
    for name, digest in manifest.files.items()
    if name.startswith(f'{file_names.TOKENIZER}/')
    or name == file_names.CHAT_TEMPLATE
  }
  of_config = {
    'model': manifest.model,
    'generation': manifest.files.get(file_names.GENERATION),
  }
  of_adapter = {}
  if adapter is not None:
    # An adapter takes missing parts from its base.
    if adapter.chat_template:
      template = adapter.manifest.files[file_names.CHAT_TEMPLATE]
      of_tokenizer[file_names.CHAT_TEMPLATE] = template
    if adapter.generation:
      settings = adapter.manifest.files[file_names.GENERATION]
      of_config['generation'] = settings
    of_adapter['adapter'] = adapter.manifest.adapter_digest
  return {
    'weights': manifest.weights_digest,
    'tokenizer': digests_lib.of_json(of_tokenizer),
    'config': digests_lib.of_json(of_config),
    **of_adapter,
    'numerics': generator and digests_lib.of_json(numerics(generator)),
  }


def numerics(generator: generate.Generator) -> dict[str, Any]:
  """Returns the values that the digest of the numerics covers."""
  engine = generator.engine
  found = {
    'dtype': generator.frozen.manifest.dtype,
    **engine.backend.numerics(engine.config, engine.device),
  }
  if generator.adapter is not None:
    # All adapters are padded to it, and products have its shape.
    found['adapter_rank'] = str(engine.adapters.rank)
  return found


def of(generator: generate.Generator) -> str:
  """Returns the `system_fingerprint` of the answers of a generator."""
  if generator not in _KNOWN:  # every answer has it, and it never changes
    manifest = generator.frozen.manifest
    parts = digests(manifest, generator, generator.adapter)
    whole = digests_lib.of_json(parts)
    _KNOWN[generator] = f'{manifest.weights_digest[:_DIGITS]}.{whole[:_DIGITS]}'
  return _KNOWN[generator]
