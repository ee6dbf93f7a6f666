"""A frozen target that does not fit one device: its decoder layers in shards over all processes (FSDP2).

Draft, adapter, embeddings and head stay whole on every process, and DDP averages the gradients of what is trained: the
target's shards are none of its business. A layer is gathered when it runs, one at a time, in both directions.
"""

from __future__ import annotations

import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel

from ..errors import refusal


def shard_target(target: PreTrainedModel) -> None:
    """Split the decoder layers of `target` among the processes, in place. Before the adapter is put on, and before a
    `Trainer` is made."""
    layers = getattr(target.get_decoder(), "layers", None)
    if not dist.is_initialized() or dist.get_world_size() < 2 or layers is None:
        raise refusal(
            "A sharded target",
            got=f"{dist.get_world_size() if dist.is_initialized() else 1} processes, a {type(target).__name__}",
            expected="several processes and a model with decoder layers",
            fix="Start the script with `accelerate launch --config_file examples/accelerate/sharded_target.yaml`.",
        )
    if getattr(target, "is_quantized", False):
        raise refusal(
            "A sharded target",
            got="quantized weights",
            expected="floating-point ones",
            fix="Train with the whole quantized target on each device, without --shard_target.",
        )
    kind = "cuda" if dist.get_backend() == "nccl" else "cpu"
    mesh = init_device_mesh(kind, (dist.get_world_size(),))
    target.requires_grad_(False)
    for layer in layers:
        fully_shard(layer, mesh=mesh)


def leave_shards_to_fsdp(module: nn.Module) -> None:
    """Tell DDP, before it wraps `module`, that shards are neither to be broadcast nor averaged."""
    shards = [name for name, parameter in module.named_parameters() if isinstance(parameter, DTensor)]
    if shards:
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, shards)
