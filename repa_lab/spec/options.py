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
    """W&B; ``auto`` is online with a key in the environment and offline without.

    ``entity`` is the user or team whose ``project`` it is, null the key's own. ``tags`` are added to family and regularizer.
    ``artifacts: final`` uploads the averaged weights of every run that is done.
    """

    mode: Literal["auto", "online", "offline", "disabled"] = "auto"
    project: str = "repa-lab"
    entity: str | None = None
    tags: Tags = ()
    artifacts: Literal[False, "final"] = False


class RayOptions(Settings):
    """A Ray cluster: ``address`` null starts one on this machine, ``auto`` finds a running one, else ``host:port``.

    ``num_cpus``, ``num_gpus`` and the cluster's own ``resources`` are what each run takes; a run that is lost with its worker
    or its node is started again from its last checkpoint, at most ``retries`` times.
    """

    address: str | None = None
    num_cpus: NotNegative = 1.0
    num_gpus: NotNegative = 0.0
    resources: dict[str, NotNegative] = Field(default_factory=dict)
    retries: Count = 3


# A list of shell commands.
Commands = Annotated[tuple[str, ...], AS_TUPLE]


class SlurmOptions(Settings):
    """What each run asks of Slurm; ``setup`` are shell commands before it, ``array_parallelism`` how many go on at a time."""

    partition: str | None = None
    account: str | None = None
    time_min: Positive = 1440
    gpus_per_node: Count | None = None
    cpus_per_task: Positive = 4
    mem_gb: Positive | None = None
    array_parallelism: Positive = 64
    setup: Commands = ()


class RunOptions(Settings):
    """How runs are carried out; nothing here changes what is computed, so nothing here is part of a run's identity.

    ``micro_batch`` is the images of one forward pass; gradients accumulate over the batch; ``auto`` starts with all of them and
    halves them as often as the GPU runs out of memory. ``share`` trains steps that runs have in common once.
    ``encoder_storage`` is the precision of cached features, ``encoder_batch_size`` the images that an encoder sees at a time.

    ``gpus_per_run`` processes share a run, one on each GPU (on the CPU without any); ``slots_per_gpu`` runs share a GPU. After
    ``max_failures`` no further runs are started. A run that gives no sign of life for ``hang_minutes`` is started again, once.
    """

    executor: Literal["local", "ray", "slurm"] = "local"
    ray: RayOptions = RayOptions()
    slurm: SlurmOptions = SlurmOptions()
    workers: Positive | None = None
    slots_per_gpu: Positive = 1
    gpus_per_run: Positive = 1
    max_failures: Positive | None = None
    hang_minutes: Annotated[float, Field(gt=0)] | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    share: bool = True
    micro_batch: Positive | Literal["auto"] | None = None
    gradient_checkpointing: bool = False
    compile: bool = False
    encoder_precision: Literal["fp32", "bf16"] = "fp32"
    encoder_compile: bool = False
    encoder_batch_size: Positive | None = None
    encoder_storage: Literal["fp16", "fp32"] = "fp16"
    log_every: Positive = 10
    checkpoint_every: Positive | None = None
    data_workers: Count = 0
    wandb: WandbOptions = WandbOptions()
    tensorboard: bool = False
