"""The names of files and directories that outlive a process, each of them once.

WORKDIR/                      one run of training
  run.json                    experiment, model, data mix, lineage, base, commit
  data.json                   tokens, fill rates, overlaps of the data
  tokenizer/
  checkpoints/STEP/           a finished checkpoint
    seal.json                 sizes and digests of all other files
    progress.json             step, PRNG key, position in the data, cost
    params/ opt_state/ ...    one directory for each tree of the state
  checkpoints/STEP.partial/   being written
  checkpoints/STEP.deleted/   being deleted
  checkpoints/damaged-STEP-N/ found damaged, and set aside
  metrics.jsonl  goodput.jsonl  tensorboard/  report.html
  samples.jsonl               answers of rollouts with their rewards
  frozen/                     the frozen directory, to serve
  .lock                       held by the run that writes here

FROZEN/                       weights to serve, and all that they need
  manifest.json               config, digests, lineage, cost
  params/  tokenizer/  chat_template.jinja  generation.json
  quality.json                of kernels in fewer bits: frozen/quantize/
  recipe.json                 how a run made the weights: frozen/recipe.py

ADAPTER/                      a change of frozen weights: frozen/adapters.py
  manifest.json               of another kind: the digest of the base, its own
  adapter_config.json  adapter_model.safetensors  as peft has them

DRAFT_HEAD/                   guesses for frozen weights: frozen/draft_heads.py
  manifest.json               of another kind: the weights' digest, its own
  draft_head.safetensors
"""

# In a workdir.
RUN = 'run.json'
DATA = 'data.json'
CHECKPOINTS = 'checkpoints'
METRICS = 'metrics.jsonl'
GOODPUT = 'goodput.jsonl'
SAMPLES = 'samples.jsonl'
TENSORBOARD = 'tensorboard'
REPORT = 'report.html'
FROZEN = 'frozen'
LOCK = '.lock'

# In a workdir and in a frozen directory.
TOKENIZER = 'tokenizer'

# In the directory of checkpoints.
PARTIAL = '.partial'
DELETED = '.deleted'
DAMAGED = 'damaged-'

# In a checkpoint.
SEAL = 'seal.json'
PROGRESS = 'progress.json'

# In a checkpoint and in a frozen directory.
PARAMS = 'params'

# In a frozen directory.
MANIFEST = 'manifest.json'
CHAT_TEMPLATE = 'chat_template.jinja'
GENERATION = 'generation.json'
QUALITY = 'quality.json'
RECIPE = 'recipe.json'
