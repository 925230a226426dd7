"""How runs are carried out; outside their identity."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from repa_lab.settings import AS_TUPLE, Count, NotNegative, Positive, Settings

# Short words, as W&B takes them; a list in a file, a tuple here.
Tags = Annotated[
    tuple[Annotated[str, Field(min_length=1, max_length=64)], ...],
    AS_TUPLE,
]


class WandbOptions(Settings):
    """Weights & Biases."""

    mode: Literal["auto", "online", "offline", "disabled"] = "auto"
    """`auto` is online with a key in the environment and offline without."""
    project: str = "repa-lab"
    """The W&B project."""
    entity: str | None = None
    """User or team whose project it is; null is the key's own."""
    tags: Tags = ()
    """Added to the tags for family and regularizer."""
    artifacts: Literal[False, "final"] = False
    """`final` uploads the averaged weights of every run that is done."""


class RayOptions(Settings):
    """A Ray cluster."""

    address: str | None = None
    """Null starts a cluster on this machine, `auto` finds a running one, else `host:port`."""
    num_cpus: NotNegative = 1.0
    """CPUs of each run."""
    num_gpus: NotNegative = 0.0
    """GPUs of each run."""
    resources: dict[str, NotNegative] = Field(default_factory=dict)
    """The cluster's own resources of each run."""
    retries: Count = 3
    """How often a run that was lost with its worker or node is started again from its last checkpoint."""


# A list of shell commands.
Commands = Annotated[tuple[str, ...], AS_TUPLE]


class SlurmOptions(Settings):
    """What each run asks of Slurm."""

    partition: str | None = None
    """The partition; null is the cluster's default."""
    account: str | None = None
    """The account; null is the user's default."""
    time_min: Positive = 1440
    """Minutes that a job may take."""
    gpus_per_node: Count | None = None
    """GPUs of a job; null is those of its runs."""
    cpus_per_task: Positive = 4
    """CPU cores of a task."""
    mem_gb: Positive | None = None
    """Memory of a job in GB; null is the cluster's default."""
    array_parallelism: Positive = 64
    """Most runs at a time."""
    setup: Commands = ()
    """Shell commands before each run."""


class RunOptions(Settings):
    """How runs are carried out. Nothing here changes what is computed, so nothing here is part of a run's identity."""

    executor: Literal["local", "ray", "slurm"] = "local"
    """Where runs are trained."""
    ray: RayOptions = RayOptions()
    """A Ray cluster."""
    slurm: SlurmOptions = SlurmOptions()
    """What each run asks of Slurm."""
    workers: Positive | None = None
    """Runs at a time; null is one for each GPU, or each core without."""
    slots_per_gpu: Positive = 1
    """Runs that share a GPU."""
    gpus_per_run: Positive = 1
    """Processes that share a run, one on each GPU, or on the CPU without any."""
    max_failures: Positive | None = None
    """No further runs are started after so many failures."""
    hang_minutes: Annotated[float, Field(gt=0)] | None = None
    """A run that is silent for so many minutes is started again, once."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where runs are trained."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Precision of the denoiser's forward and backward pass; the weights stay float32."""
    share: bool = True
    """Train steps that runs have in common once; `--no-share` on the command line."""
    micro_batch: Positive | Literal["auto"] | None = None
    """Images of one forward pass; gradients accumulate over the batch. `auto` halves it when the GPU runs out of memory."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass: the same numbers, less memory, more time."""
    compile: bool = False
    """Compile the denoiser with `torch.compile`."""
    encoder_precision: Literal["fp32", "bf16"] = "fp32"
    """Precision of encoders."""
    encoder_compile: bool = False
    """Compile encoders with `torch.compile`."""
    encoder_batch_size: Positive | None = None
    """Most images that an encoder sees at a time."""
    encoder_storage: Literal["fp16", "fp32"] = "fp16"
    """Precision of cached features."""
    log_every: Positive = 10
    """Steps between rows of the training loss."""
    checkpoint_every: Positive | None = None
    """Steps between checkpoints; null is whenever the run is measured."""
    data_workers: Count = 0
    """Processes that load images."""
    wandb: WandbOptions = WandbOptions()
    """Weights & Biases; see [tracking.md](tracking.md)."""
    tensorboard: bool = False
    """Also write TensorBoard's files into each run directory."""
