"""The sections of a config, one frozen dataclass each; defaults that work, no section reads another's fields."""

from __future__ import annotations

import dataclasses
from typing import Literal

from llmjax.core.model_sections import ModelConfig
from llmjax.core.objective_sections import ObjectiveConfig
from llmjax.core.stage_sections import RatePiece, StageConfig


@dataclasses.dataclass(frozen=True)
class TaskConfig:
    """What is learnt: the name picks the batches and the loss."""

    name: Literal["pretrain", "sft", "dpo"] = "pretrain"
    beta: float = 0.1  # DPO: strength of the pull towards the reference policy
    objective: ObjectiveConfig = ObjectiveConfig()  # of pretraining
    label_smoothing: float = 0.0  # share of a target's weight that is spread over the whole vocabulary
    z_loss: float = 0.0  # weight of log(Z)^2 beside the cross-entropy
    multi_token: float = 0.3  # weight of the further heads' mean loss, where the model has such heads
    router_losses: Literal["none", "added"] = "none"  # DPO: the routers' own losses beside the preference


@dataclasses.dataclass(frozen=True)
class TokenizerConfig:
    """Which tokenizer to load, or how to train one when `path` is empty."""

    path: str = ""  # a tokenizer folder, a workdir or tiktoken:NAME; empty: train on the corpus
    kind: Literal["bpe", "unigram", "byte_bpe"] = "bpe"  # SentencePiece's two, or BPE over bytes
    vocab_size: int = 2048
    specials: Literal["basic", "objectives"] = "basic"  # objectives: with sentinels, a mask and marks of the middle
    train_bytes: int = 8_000_000  # how much text the trainer sees
    extend_by: int = 0  # pieces learnt on the corpus beyond those of `path`; old ids stay as they are
    min_bytes_per_token: float = 1.2  # of any language or source in the report, below which a tokenizer is refused
    max_fertility: float = 0.0  # tokens a word, the same; 0: no limit


@dataclasses.dataclass(frozen=True)
class CurationConfig:
    """What a document must be like to stay. By default nothing is asked of it; duplicates and leaks go in any case."""

    registry: str = ""  # the reviewed file of sources (TOML): then only what it allows is read
    boilerplate: Literal["keep", "strip"] = "keep"  # library headers and licences, site menus
    punctuation: Literal["keep", "plain"] = "keep"  # plain: typographic quotes and dashes as ASCII
    languages: str = ""  # comma-separated ISO 639 codes; others are dropped
    min_language_confidence: float = 0.5
    rules: str = ""  # comma-separated: gopher_quality, gopher_repetition, c4, fineweb
    pii: Literal["keep", "redact", "drop"] = "keep"  # personal data and secrets
    repeated_lines: int = 0  # documents that may hold a line before it goes from the others; 0: any number
    repeated_words: int = 0  # a run of so many words stays only where it comes first; 0: it stays
    perplexity_model: str = ""  # a file of `data scorer`; with it documents above `max_perplexity` are dropped
    max_perplexity: float = 1000.0
    quality_model: str = ""  # a file of `data scorer`; with it the best `quality_keep` stay, exactly
    quality_keep: float = 0.1
    toxicity: str = ""  # module:function that scores a list of texts from 0 to 1
    max_toxicity: float = 0.5
    leak_share: float = 0.5  # of a held-out item's 13-grams that a document may not reach
    common_ngram: float = 0.01  # share of the documents above which a 13-gram is boilerplate


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where documents come from, how they are cleaned and how they become batches."""

    path: str = ""  # a folder that `data build` left; empty: <workdir>/data, built when missing
    sources: str = "stdlib"  # comma-separated files, globs or registry names
    holdouts: str = ""  # the same for documents that must never be trained on
    holdout_fraction: float = 0.05  # share held out by a hash of the content
    min_bytes: int = 200  # shorter documents are dropped
    max_bytes: int = 2_000_000  # longer ones too
    near_duplicate_jaccard: float = 0.7  # 5-word shingles; 0 switches near-deduplication off
    near_duplicate_bloom_mb: int = 0  # memory of the filters that then take the place of verified pairs (LSHBloom)
    licence: str = "stated by the user"  # recorded for sources given as bare paths
    curation: CurationConfig = CurationConfig()
    seq_len: int = 512  # tokens in a row; with an encoder, in a row of its sources
    target_len: int = 0  # with an encoder: tokens in a row of targets; 0: as many as the objective makes of seq_len
    batch_size: int = 8  # rows in a global batch (pairs for DPO)
    shuffle_seed: int = 0
    mixture: str = ""  # source=weight:epochs, ... weight: its tokens when left out; epochs: a cap; @FILE; empty: all
    temperature: float = 1.0  # above 1 it levels the weights of sources
    curriculum: str = ""  # documents from easy to hard: length, rarity or a column of documents.parquet; - reverses
    mix_every: int = 0  # steps after which the weights of the mixture follow the losses of its sources; 0: never
    mix_rate: float = 1.0  # weights are multiplied by exp(mix_rate * loss in nats)


# Slowest interconnect first: slices talk over the data-centre network, tensor-parallel neighbours over the fastest.
AXIS_NAMES = ("slice", "stage", "data", "fsdp", "expert", "context", "tensor")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Sizes of the mesh axes, of which one may be -1 and takes what is left, and what travels over them."""

    slice: int = 1
    stage: int = 1
    data: int = -1
    fsdp: int = 1
    expert: int = 1
    context: int = 1
    tensor: int = 1
    shard: Literal["parameters", "gradients", "optimizer", "nothing"] = "parameters"  # fsdp as ZeRO-3, 2, 1 or none
    context_method: Literal["ring", "all_gather", "ulysses"] = "ring"  # how queries meet the keys of other shards
    schedule: Literal["gpipe", "1f1b", "circular"] = "gpipe"  # of train.accumulation microbatches through the stages
    rounds: int = 1  # circular: how often a microbatch passes every stage
    torus: str = ""  # of the chips, as in 4x4x4, along which a large fsdp axis is split; empty: asked of the devices


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """Optimiser and schedule."""

    name: Literal["adamw", "adam", "adafactor", "lion", "lamb", "muon"] = "adamw"  # adam: decay within the gradient
    learning_rate: float = 3e-4
    schedule: Literal["cosine", "linear", "wsd", "constant", "inverse_sqrt"] = "cosine"
    warmup_steps: int = 100
    warmup_start: float = 0.0  # share of the peak that the warm-up rises from; 1: there is no rise
    noise_tokens: float = 0.0  # noise scale of the gradient, at which stages with batch_rule `surge` have the best rate
    schedule_steps: int = 0  # over which the schedule runs, if the run ends earlier or goes on; 0: train.steps
    decay_fraction: float = 0.2  # share of the steps in which `wsd` falls to the end rate
    end_fraction: float = 0.1  # end rate over peak rate for `cosine` and `wsd`; `linear` ends at zero
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1  # times the rate; norms and biases are left out
    decay_embeddings: Literal["yes", "no"] = "yes"
    clip_norm: float = 1.0  # 0 switches clipping off
    muon_momentum: float = 0.95
    adafactor_steps: Literal["relative", "absolute"] = "relative"  # to a weight's root mean square, or not
    moments: Literal["float32", "bfloat16"] = "float32"  # in which they are kept; they are computed in float32
    rounding: Literal["nearest", "stochastic"] = "nearest"  # of bfloat16 moments and parameters
    memory: Literal["device", "host"] = "device"  # where moments wait between updates
    adam_learning_rate: float = 0.0  # Muon: the rate of embeddings, head and norms; 0: `learning_rate`
    ema_decay: float = 0.0  # of a moving average of the weights kept beside them; 0: none is
    pieces: tuple[RatePiece, ...] = ()  # derived from the stages


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """The loop."""

    steps: int = 1000
    accumulation: int = 1  # microbatches a step
    layers: Literal["scanned", "unrolled"] = "scanned"  # unrolled: longer to compile; weights are stacked either way
    remat: Literal["none", "full", "save_matmuls", "save_names", "offload"] = "none"  # what waits for the derivative
    remat_names: str = "block_input"  # comma-separated; what `save_names` keeps and `offload` moves to host memory
    compiler_options: str = ""  # of the step on TPUs: name=value,name=value as XLA:TPU knows them
    seed: int = 0
    init_from: str = ""  # workdir (or import-hf output) whose weights to start from
    log_every: int = 10
    profile: str = ""  # steps to trace, first:last (set by --profile)


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When to save and what to keep."""

    every: int = 100  # steps
    keep: int = 2  # the last ones
    keep_every: int = 0  # multiples of this many steps are kept for good; 0: none
    remote: str = ""  # URL of a bucket that gets a copy: gs://bucket/run, s3://bucket/run


@dataclasses.dataclass(frozen=True)
class GuardConfig:
    """What to do about steps that go wrong: single ones are skipped on the device, lasting trouble is rolled back."""

    spike_factor: float = 5.0  # a gradient norm above this many times its running median is skipped
    window: int = 128  # accepted steps in that median
    warmup: int = 20  # accepted steps before spikes are looked for
    patience: int = 50  # bad steps in a row until the run is rolled back to its last good checkpoint
    max_rollbacks: int = 3  # then the run stops
    rate_cut: float = 0.3  # share of the learning rate that a roll-back takes away
    loss_rise: float = 1.0  # nats above the median loss at which a step counts as bad
    plateau_steps: int = 1000  # over which a loss has to fall, else the logbook says so; 0: not watched
    early_stop: int = 0  # held-out losses in a row without a new best that end the run; 0: none do
    hang_seconds: float = 1800.0  # without a step until stacks are written and a restart is asked for; 0: never
    check_every: int = 1000  # steps between looks at embeddings, replicas and lagging processes; 0: never
    monitors: Literal["basic", "full"] = "basic"  # full: norms by group, and some work done twice to find bad chips


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """Evaluation of held-out documents."""

    every: int = 0  # steps between quick held-out losses; 0: only at the end
    batches: int = 8  # of the quick one
    weights: Literal["last", "average"] = "last"  # average: of optim.ema_decay, also for what reads checkpoints
    seq_len: int = 0  # context of the final one; 0: data.seq_len
    stride: int = 0  # tokens scored a window; 0: half the context
    compare: Literal["gzip", "none"] = "none"  # a baseline printed beside bits per byte
    prompt: str = ""  # a completion of it is sampled at the end


@dataclasses.dataclass(frozen=True)
class ServeConfig:
    """The HTTP server."""

    max_queue: int = 8  # requests waiting beyond this are answered 429
    max_new_tokens: int = 256  # when a request names none
    grace_seconds: float = 10.0  # what runs when the server is told to stop may still take this long


@dataclasses.dataclass(frozen=True)
class TrackConfig:
    """What is written beside metrics.jsonl."""

    tensorboard: Literal["on", "off"] = "on"
    carbon: Literal["on", "off"] = "on"
    country: str = "USA"  # ISO code, for the grid's carbon intensity


@dataclasses.dataclass(frozen=True)
class Config:
    """A whole run, resolved."""

    name: str = "run"
    task: TaskConfig = TaskConfig()
    model: ModelConfig = ModelConfig()
    tokenizer: TokenizerConfig = TokenizerConfig()
    data: DataConfig = DataConfig()
    stages: tuple[StageConfig, ...] = ()  # of one run, in order; none: the whole run is alike
    mesh: MeshConfig = MeshConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    guard: GuardConfig = GuardConfig()
    eval: EvalConfig = EvalConfig()
    serve: ServeConfig = ServeConfig()
    track: TrackConfig = TrackConfig()
