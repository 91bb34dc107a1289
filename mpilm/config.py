"""The configuration: one dataclass a section. `options` reads them from TOML and the command line.

Every default stands here and nowhere else. What depends on the machine ("auto") is decided
where it is measured, and the decision is written into the run directory.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

Auto = Literal["auto", "on", "off"]


@dataclass
class Run:
    """What is run, where to, and under which promises.

    Args:
        dir: Run directory: configuration, metrics and checkpoints.
        steps: Optimizer updates in all, over every resume.
        seed: Draws the initial weights and the order of the data.
        resume: Where the run begins: `auto` (the newest complete checkpoint of the run directory), `never` (step 0), or
            a checkpoint's path. Until it has finished, the same command goes on from what the run has saved.
        reproducible: The same bits on any number of ranks.
        precision: Arithmetic of the model: `auto` takes bf16 where it is measurably faster; `fp8` is bf16 but for the
            products of linear layers, forwards and for their inputs' gradients.
        compile: torch.compile: `auto` where the run is long enough to pay for it.
        graphs: On GPUs, launch each block's kernels together, as CUDA graphs, for models so small that the host is too
            slow for them; without `pp`, `cp`, `tp` and `recompute` of `parallel`.
        threads: Threads of a rank; 0: one in reproducible mode, else the rank's share of the cores.
        spares: Ranks that wait to step in for those that die, where the launcher lets the others go on (mpirun
            --with-ft ulfm).
        stop_signals: Signals at which all ranks save and end, with exit code 75: "submit me again".
        time_limit_s: So long this job may take; 0: what is left of its allocation (Slurm's, PBS's), if it is in one.
        stop_before_s: Save and end so long before the time limit, and twice what a save and the longest step take;
            shorter than `time_limit_s`.
        hang_timeout_s: End the job, with exit code 77 and everyone's stacks, when nobody gets any further (before and
            after the steps for five times that), or a rank does not answer, for so long, from 1 up; 0: never.
        straggler: Name a rank whose own work takes so many times the median.
        max_skipped: End the run after so many steps in a row with a NaN or infinite gradient.
        device: The file of mpilm/comm/devices: cuda (a GPU, AMD's too), or host; `auto` takes a GPU if there is one.
        share_gpu: More ranks than GPUs are meant: ranks may have one together, and divide its memory.
    """

    dir: str = "runs/demo"
    steps: int = 450
    seed: int = 1
    resume: str = "auto"
    reproducible: bool = True
    precision: Literal["auto", "bf16", "fp32", "fp8"] = "auto"
    compile: Auto = "auto"
    graphs: bool = False
    threads: int = 0
    spares: int = 0
    stop_signals: str = "USR1,TERM"
    time_limit_s: float = 0.0
    stop_before_s: float = 60.0
    hang_timeout_s: float = 600.0
    straggler: float = 1.5
    max_skipped: int = 10
    device: Literal["auto", "cuda", "host"] = "auto"
    share_gpu: bool = False


@dataclass
class Data:
    """What is read, and how much of it makes a step.

    Args:
        path: Folder of HDF5 shards from data_prep.encode; empty: the built-in corpus.
        sequence_length: Tokens of a sequence.
        global_batch_size: Sequences of a step, over all ranks.
        micro_batch_size: Sequences of one forward and backward pass.
        mask_documents: Attention does not cross from one document into the next.
    """

    path: str = ""
    sequence_length: int = 256
    global_batch_size: int = 16
    micro_batch_size: int = 2
    mask_documents: bool = False


@dataclass
class Model:
    """The shape of the model.

    Args:
        kind: The file of mpilm/model that defines it.
        layers: Number of blocks.
        width: Elements of a token's vector.
        heads: Attention heads; they divide the width.
        kv_heads: Heads of keys and values (grouped-query attention); 0: as many as heads.
        hidden: Width inside the feed-forward network; 0: 8/3 of the width, rounded up to a multiple of 64.
        vocab_size: Size of the vocabulary; 0: that of the data.
        tied_embeddings: The output head is the input embedding.
        rope_theta: Base of the rotary positions.
        norm_eps: Added to the variance in RMSNorm.
    """

    kind: str = "gpt"
    layers: int = 4
    width: int = 128
    heads: int = 4
    kv_heads: int = 0
    hidden: int = 0
    vocab_size: int = 0
    tied_embeddings: bool = False
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5


@dataclass
class Optim:
    """AdamW and its learning rate.

    Args:
        lr: Peak learning rate.
        schedule: `cosine`, or `wsd` (warm-up, stable, linear decay at the end).
        warmup_steps: Steps of linear warm-up.
        decay_fraction: Share of the steps that wsd decays over.
        min_lr: Learning rate that the schedule ends at, one update after the last, as a fraction of the peak.
        beta1: Decay of the mean of gradients.
        beta2: Decay of the mean of squared gradients.
        eps: Added to the root of the mean square.
        weight_decay: Of matrices; norms are not decayed.
        clip: Largest global gradient norm; 0: no clipping.
    """

    lr: float = 5e-3
    schedule: Literal["cosine", "wsd"] = "cosine"
    warmup_steps: int = 40
    decay_fraction: float = 0.2
    min_lr: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip: float = 1.0


@dataclass
class Parallel:
    """How the model is split over ranks; what is left is data parallel.

    Args:
        pp: Ranks of a pipeline; each holds some of the layers.
        cp: Ranks that share every sequence, which so can be longer: each has some of its tokens.
        tp: Ranks that share every layer: each has some of its heads, hidden elements and words.
        schedule: Order of a pipeline's work: gpipe, 1f1b, interleaved, or zb (zero bubble).
        chunks: Parts of the model that a rank holds in the interleaved schedule.
        split: Blocks of every part, in order, such as 4,4,3; empty: by what they cost.
        recompute: Keep only the input of each block, and compute the block again in the backward pass: less memory.
    """

    pp: int = 1
    cp: int = 1
    tp: int = 1
    schedule: str = "1f1b"
    chunks: int = 2
    split: str = ""
    recompute: bool = False


@dataclass
class Sync:
    """How replicas are kept together.

    Args:
        kind: The file of mpilm/sync: allreduce, sharded (memory divided over the replicas), parameter_server, or
            local_sgd (replicas train by themselves and are averaged now and then).
        level: What sharded divides: 1 optimizer state; 2 gradients too; 3 weights too.
        servers: The first ranks, which hold the parameters of parameter_server and do not train.
        staleness: Steps that a worker may be ahead of the slowest; 0: updates are of all workers; inf: no limit.
        staleness_rule: What a server does about gradients of old parameters: nothing, scale the learning rate by
            1 / staleness, or compensate for what has changed since.
        collective: The file of mpilm/comm/collectives: ring, shared, tree, mpi, nccl; `auto` measures and picks.
        bucket_mib: Gradients are reduced in buckets of this size.
        compress: What gradients are sent as: `none`, or a file of mpilm/sync/compress: bf16, int8, onebit, powersgd,
            topk. Under local_sgd it is what the replicas' differences are sent as.
        compress_warmup: Updates at the beginning whose gradients are sent as float32.
        rank: Of powersgd's factors: the directions that are sent of a matrix.
        every: Updates of a replica of local_sgd between two averages.
        local_after: Updates before that are allreduce's, for local_sgd (post-local SGD).
        outer_lr: What local_sgd moves by, as a multiple of the average difference: 1 averages, DiLoCo has 0.7.
        outer_momentum: Nesterov momentum of these moves: 0 averages, DiLoCo has 0.9.
        fragments: Parts that local_sgd averages in turns, each while the next step computes; 0: everything at once,
            and steps wait for it.
        save_replicas: Checkpoints of local_sgd hold the replicas too, not only their average: as many go on at the
            same bits, and each takes as much space.
    """

    kind: str = "allreduce"
    level: int = 1
    servers: int = 1
    staleness: int | Literal["inf"] = 0
    staleness_rule: Literal["none", "scale", "compensate"] = "none"
    collective: str = "auto"
    bucket_mib: float = 8.0
    compress: str = "none"
    compress_warmup: int = 0
    rank: int = 4
    every: int = 32
    local_after: int = 0
    outer_lr: float = 1.0
    outer_momentum: float = 0.0
    fragments: int = 0
    save_replicas: bool = True


@dataclass
class Comm:
    """How arrays get from rank to rank.

    Args:
        transport: What MPI is given of a GPU's arrays: their own memory (`device`, for an MPI that knows GPUs), or
            memory of the host that they are copied through (`staged`); `auto` asks MPI and tries.
    """

    transport: Literal["auto", "device", "staged"] = "auto"


@dataclass
class Checkpoint:
    """When the run is saved.

    Args:
        every: Save every so many steps, and at the end; 0: only at the end; auto: as often as loses least time, by
            what a save takes and by `mtbf_h`.
        mtbf_h: Hours between failures of the whole job, on average, for `auto`.
        keep_last: Keep so many of the newest checkpoints.
        keep_every: Keep those at multiples of this step for good; 0: none.
    """

    every: int | Literal["auto"] = 150
    mtbf_h: float = 24.0
    keep_last: int = 2
    keep_every: int = 0


@dataclass
class Log:
    """What is told, and how often.

    Args:
        every: A line of metrics every so many steps.
        validate_every: Validation loss every so many steps, and at the end; 0: never.
        validation_sequences: Sequences it is measured on, always the same ones.
        tensorboard: Also write TensorBoard event files.
    """

    every: int = 10
    validate_every: int = 150
    validation_sequences: int = 128
    tensorboard: bool = True


@dataclass
class Config:
    """A whole run. Sections are independent; what must agree between them is checked in `options`."""

    run: Run = field(default_factory=Run)
    data: Data = field(default_factory=Data)
    model: Model = field(default_factory=Model)
    optim: Optim = field(default_factory=Optim)
    parallel: Parallel = field(default_factory=Parallel)
    sync: Sync = field(default_factory=Sync)
    comm: Comm = field(default_factory=Comm)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    log: Log = field(default_factory=Log)

    def to_dict(self) -> dict[str, Any]:
        """Nested plain values, as TOML and JSON take them."""
        return dataclasses.asdict(self)

    def to_toml(self) -> str:
        """The text that `--config` reads back to an equal configuration."""
        sections = (f"[{name}]\n" + "".join(f"{key} = {_toml(value)}\n" for key, value in section.items())
                    for name, section in self.to_dict().items())
        return "\n".join(sections)


def _toml(value: bool | int | float | str) -> str:
    """A TOML scalar. JSON's strings, numbers and booleans are TOML's too, but for what is no text in UTF-8."""
    import json

    text = json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return text.encode(errors="replace").decode()
