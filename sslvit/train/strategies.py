"""How the ranks of a run share its work: each holds all weights (DDP), or a part of them (FSDP2).

A step of either is the same up to rounding, and each can load the checkpoints of the other.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import pytorch_lightning as pl
import torch
from pytorch_lightning.strategies import DDPStrategy
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from sslvit.models.transformer import Block
from sslvit.settings import TrainSettings
from sslvit.sharded_checkpoint import extract_local_shards, shard_like
from sslvit.stopping import RankLost
from sslvit.train.checkpoint_io import AtomicCheckpointIO
from sslvit.train.timing import Clock

# messages of a failed exchange between ranks if another rank is gone, and if the fault is on this one
PEER_ERRORS = (
    r"(?i)connection (was )?(closed|reset|refused)|timed? ?out|broken pipe|no route|unreachable|remote process|socket"
)
LOCAL_ERRORS = r"(?i)address already in use|EADDRINUSE|invalid ?usage|out of memory|duplicate gpu"
NCCL_PATIENCE = 2  # times train.timeout_seconds


def make_strategy(settings: TrainSettings, clock: Clock) -> DDPStrategy:
    """Lightning's strategy for a run of several processes.

    Args:
        settings: Settings of the run.
        clock: Notes when gradients are ready to be exchanged.
    """
    timeout = timedelta(seconds=settings.timeout_seconds)
    if settings.strategy == "fsdp":
        return Sharded(timeout=timeout)
    # gradients are views of the buckets that the ranks exchange: one copy of them instead of two
    return Replicated(timeout=timeout, ddp_comm_hook=clock.mark_gradients, gradient_as_bucket_view=True)


class _RanksStrategy(DDPStrategy):
    """What both strategies share: a lost rank leads to our own message, and not to an abort by NCCL's watchdog.

    The exchange of callbacks/peers.py uses gloo, and must time out before NCCL does.
    """

    def setup_distributed(self) -> None:
        """Give NCCL a longer timeout than that exchange has."""
        super().setup_distributed()
        if distributed.get_backend() == "nccl" and self._timeout is not None:
            cast(distributed.ProcessGroup, distributed.group.WORLD).set_timeout(NCCL_PATIENCE * self._timeout)

    def on_exception(self, exception: BaseException) -> None:
        """Abort NCCL's kernels when a rank is lost: they wait for it, and the teardown would wait for them."""
        is_lost = isinstance(exception, RankLost) or is_peer_failure(exception, self.world_size)
        if is_lost and distributed.is_initialized() and distributed.get_backend() == "nccl":
            cast(distributed.ProcessGroup, distributed.group.WORLD).abort()
        super().on_exception(exception)


class Replicated(_RanksStrategy):
    """Every rank holds all weights and updates them alike; gradients are averaged during the backward pass."""

    def _setup_model(self, model: nn.Module) -> DistributedDataParallel:
        """Exchange buffers in each step on CPUs only: on GPUs running statistics are those of all ranks already."""
        replica = super()._setup_model(model)
        replica.broadcast_buffers = self.root_device.type == "cpu"  # the argument of this name is deprecated
        return replica

    def _register_ddp_hooks(self) -> None:
        """Register the hook on CPUs, too; Lightning does so on GPUs only."""
        assert isinstance(self.model, DistributedDataParallel)
        self.model.register_comm_hook(None, cast(Any, self._ddp_comm_hook))


class Sharded(_RanksStrategy):
    """Each rank holds a part of every weight, gradient and moment (fully_shard; Zhao et al. 2023).

    A block's weights are gathered when it runs, and freed again. Each rank writes its shard of a checkpoint, and the
    first one the manifest that names them (sharded_checkpoint.py).
    """

    def model_to_device(self) -> None:
        """Do nothing yet: the whole model might not fit, so blocks move one by one as they are sharded."""

    def _setup_model(self, model: nn.Module) -> Any:
        shard(cast(pl.LightningModule, model), self.root_device.type, self.precision_plugin.precision == "bf16-mixed")
        return model.to(self.root_device)  # everything that is not a weight

    def _register_ddp_hooks(self) -> None:
        pass

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None) -> None:
        """Write this rank's shard, and on the first rank the manifest."""
        io = self.checkpoint_io
        assert isinstance(io, AtomicCheckpointIO)
        io.finish()  # rank 0 deletes orphaned shards, so none may begin to write before it has done so
        name = f"{checkpoint['global_step']:08d}-{self.broadcast(uuid.uuid4().hex[:8])}"  # new on every save
        shards: dict[str, Tensor] = {}
        manifest = extract_local_shards(checkpoint, shards)
        io.save_shard(manifest, shards, Path(filepath), name, self.global_rank, self.world_size)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Load the state of whole weights; each rank keeps its shard."""
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            for number, values in state["state"].items():
                like = parameters[number]
                for name, value in values.items():
                    if value.shape == like.shape:
                        values[name] = shard_like(value, like)
            optimizer.load_state_dict(state)

    def on_exception(self, exception: BaseException) -> None:
        """Stop writers from waiting for the shards of other ranks."""
        cast(AtomicCheckpointIO, self.checkpoint_io).aborted.set()
        super().on_exception(exception)

    def teardown(self) -> None:
        """Leave the weights where they are, since the run is still to be finished with them."""
        for plugin in (self.cluster_environment, self.precision_plugin, self.accelerator):
            if plugin is not None:
                plugin.teardown()
        self.checkpoint_io.teardown()


def is_peer_failure(error: BaseException, ranks: int) -> bool:
    """Whether an error says that another rank no longer answers, and not that this one has failed."""
    said = str(error)
    is_exchange = isinstance(error, distributed.DistError) or "gloo/transport" in said or "Gloo connect" in said
    return ranks > 1 and is_exchange and bool(re.search(PEER_ERRORS, said)) and not re.search(LOCAL_ERRORS, said)


def shard(task: pl.LightningModule, device: str, is_bf16: bool = False) -> None:
    """Shard the weights of a task over all ranks, block by block, then the rest of each of its networks.

    Args:
        task: The task.
        device: Type of device that the ranks compute on.
        is_bf16: Gather the weights of blocks in bf16, to which autocast would cast them anyway. Gradients are reduced
            in float32, and everything outside of blocks stays in float32: embeddings, the last norm, heads, and
            DINO's prototypes, whose cosines need it.

    Raises:
        ValueError: the task owns weights outside of its networks, which no forward pass would gather.
    """
    mesh = init_device_mesh(device, (distributed.get_world_size(),))
    model = task.model
    assert isinstance(model, nn.Module)
    if outside := [name for owner in (task, model) for name, _ in owner.named_parameters(recurse=False)]:
        raise ValueError(
            f"train.strategy: fsdp gathers weights when a module runs, but {type(model).__name__} holds {outside[0]} "
            "itself. Put it into a module, or use ddp."
        )
    in_bf16 = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)  # tokens stay in float32
    policy = in_bf16 if is_bf16 else MixedPrecisionPolicy()
    for network in model.children():
        for module in network.modules():
            if isinstance(module, Block) and module is not network:
                fully_shard(module, mesh=mesh, mp_policy=policy)
        if any(True for _ in network.parameters()):
            fully_shard(network, mesh=mesh)
