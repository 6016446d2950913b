"""16 virtual CPU devices for documents of mixed lengths, with --config=mixed: a plan crossing 2,048 and 4,096.

Activations are kept up to 2,048 tokens and computed again above. From 4,096 tokens on, the tensor axis has two
devices, which the expert axis gives up.
"""

from moejax.config import DispatchConfig, ParallelConfig
from moejax.mesh import MeshConfig
from moejax.train.schedule import Bucket


def get_buckets() -> tuple[Bucket, ...]:
    return (
        Bucket(
            seq_len=1024,
            batch_size=8,
            mesh=MeshConfig(expert=8, pipeline=2, tensor=1, replica=1, hardware="cpu", hosts=1, host_axis="expert"),
            parallel=ParallelConfig(
                num_microbatches=1,
                repeats=1,
                gather="step",
                remat="none",
                bubble="auto",
                batch_split=0,
            ),
            dispatch=DispatchConfig(
                strategy="dropless",
                capacity_factor=1.5,
                expert_axes=("expert", "tensor"),
                hosts=1,
                chunks=1,
                payload="full",
            ),
            accumulate=1,
        ),
        Bucket(
            seq_len=2560,
            batch_size=8,
            mesh=MeshConfig(expert=8, pipeline=2, tensor=1, replica=1, hardware="cpu", hosts=1, host_axis="expert"),
            parallel=ParallelConfig(
                num_microbatches=1,
                repeats=1,
                gather="step",
                remat="full",
                bubble="auto",
                batch_split=0,
            ),
            dispatch=DispatchConfig(
                strategy="dropless",
                capacity_factor=1.5,
                expert_axes=("expert", "tensor"),
                hosts=1,
                chunks=1,
                payload="full",
            ),
            accumulate=1,
        ),
        Bucket(
            seq_len=5120,
            batch_size=4,
            mesh=MeshConfig(expert=4, pipeline=2, tensor=2, replica=1, hardware="cpu", hosts=1, host_axis="expert"),
            parallel=ParallelConfig(
                num_microbatches=1,
                repeats=1,
                gather="step",
                remat="full",
                bubble="auto",
                batch_split=0,
            ),
            dispatch=DispatchConfig(
                strategy="dropless",
                capacity_factor=1.5,
                expert_axes=("expert", "tensor"),
                hosts=1,
                chunks=1,
                payload="full",
            ),
            accumulate=1,
        ),
    )


def get_model() -> str:
    return "mixed"


def get_config() -> MeshConfig:
    return get_buckets()[0].mesh
