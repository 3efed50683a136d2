"""Distributed strategies: DDP, FSDP2 and DeepSpeed, each through Lightning's own strategy.

FSDP2 is torch's `fully_shard`: every rank keeps its shard of the trainable weights, gradients and optimiser states and
gathers a block's weights only while computing with them. `shard` defines the blocks.
"""

import warnings
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import nn
from torch.distributed import default_pg_timeout
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer
from transformers.modeling_layers import GradientCheckpointingLayer

from ..errors import UserError
from ..model import VidPrismForVideoClassification


def named_strategy(
    name: str | Strategy, accumulates: bool = False, timeout: timedelta = default_pg_timeout
) -> str | Strategy:
    """Returns the Trainer's strategy for the recipe's `trainer.strategy`.

    Args:
        name: `ddp` and `fsdp` are built here; Lightning resolves the rest: `auto` (one device, or DDP), `deepspeed`.
        accumulates: Whether gradients are accumulated over several batches.
        timeout: Time limit of a collective operation.

    Raises:
        UserError: If the strategy's weights cannot be exported, or its ranks do not return results.
    """
    if isinstance(name, str) and name.startswith("deepspeed_stage_3"):
        raise UserError(f"trainer.strategy={name}: its sharded weights cannot be exported; use fsdp or deepspeed")
    if isinstance(name, str) and name.startswith(("ddp_spawn", "ddp_fork", "ddp_notebook")):
        raise UserError(f"trainer.strategy={name}: its processes do not return their results; use ddp")
    if name == "ddp":
        return DDPStrategy(timeout=timeout, **ddp_settings(accumulates))
    return FullyShardedStrategy(timeout=timeout) if name == "fsdp" else name


def ddp_settings(accumulates: bool) -> dict[str, bool]:
    """Returns the settings of torch's DDP.

    A static graph requires a gradient for every trainable parameter in every step, which holds here. With accumulation
    the first step does not communicate, which torch's static graph does not support.
    """
    return {"find_unused_parameters": False, "static_graph": not accumulates}


class FullyShardedStrategy(ModelParallelStrategy):
    """FSDP2 over all devices of all nodes.

    A checkpoint is one unsharded file, so that any number of ranks can resume from it, under any strategy. Rank 0
    needs memory for all of it while writing.
    """

    def __init__(self, **settings: Any):
        super().__init__(tensor_parallel_size=1, save_distributed_checkpoint=False, **settings)

    def setup_environment(self) -> None:
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def lightning_module_state_dict(self) -> dict[str, torch.Tensor]:
        """Returns the unsharded weights on rank 0 and nothing elsewhere. Call it on all ranks."""
        return {name: unpadded(tensor) for name, tensor in super().lightning_module_state_dict().items()}

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Returns the unsharded optimiser state on rank 0. Call it on all ranks."""

        def whole(_: int, value: Any) -> Any:
            if not isinstance(value, DTensor):
                return value
            gathered = value.full_tensor()  # collective
            return unpadded(gathered.cpu()) if self.is_global_zero else None

        return map_state(whole, optimizer.state_dict())

    def load_checkpoint(self, checkpoint_path: str, weights_only: bool | None = None) -> dict[str, Any]:
        """Reads a checkpoint on every rank and keeps that rank's shard; Lightning restores the rest."""
        # Lightning does not set this here; a checkpoint must not run code.
        weights_only = True if weights_only is None else weights_only
        path = self.broadcast(checkpoint_path)
        checkpoint = torch.load(path, map_location="cpu", mmap=True, weights_only=weights_only)
        strict, weights = self.lightning_module.strict_loading, checkpoint["state_dict"]
        goes_on = self.lightning_module.trainer.state.fn == TrainerFn.FITTING
        if goes_on:  # from a run with EMA, which this strategy does not support
            weights = checkpoint.get("current_model_state", weights)
        options = StateDictOptions(full_state_dict=True, strict=strict)
        set_model_state_dict(self.model, dict(weights), options=options)
        if goes_on:
            for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
                optimizer.load_state_dict(shared_state(optimizer, state))
        return checkpoint

    def on_validation_start(self) -> None:
        """Gathers the weights for the whole evaluation, because ranks may have different numbers of batches."""
        self._keep_whole(True)

    def on_validation_end(self) -> None:
        self._keep_whole(False)

    on_test_start = on_predict_start = on_validation_start
    on_test_end = on_predict_end = on_validation_end

    def _keep_whole(self, whole: bool) -> None:
        shared = [module for module in self.model.modules() if isinstance(module, FSDPModule)]
        # Lightning evaluates in inference mode; tensors created there cannot be used in training.
        with torch.inference_mode(False), torch.no_grad():
            for number, block in enumerate(shared):
                # The first is the root, which the backward pass needs at once.
                block.set_reshard_after_forward(not whole and number > 0, recurse=False)
                block.unshard() if whole else block.reshard()


def unpadded(tensor: torch.Tensor) -> torch.Tensor:
    """Returns the tensor without the padding that gathering unevenly divided rows leaves in its storage."""
    return tensor.clone() if tensor.untyped_storage().nbytes() > tensor.nbytes else tensor


def shared_state(optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """Returns this rank's shard of an unsharded optimiser state."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]

    def share(index: int, value: Any) -> Any:
        parameter = parameters[index]
        if not isinstance(parameter, DTensor) or not isinstance(value, torch.Tensor) or value.shape != parameter.shape:
            return value  # e.g. the step count
        local = value.to(parameter.device)
        return distribute_tensor(local, parameter.device_mesh, parameter.placements, src_data_rank=None)

    return map_state(share, state)


def map_state(function: Callable[[int, Any], Any], state: dict[str, Any]) -> dict[str, Any]:
    """Applies a function of (parameter index, value) to every entry of an optimiser's state."""
    entries = {
        index: {name: function(index, value) for name, value in values.items()}
        for index, values in state["state"].items()
    }
    return {**state, "state": entries}


def shard(model: VidPrismForVideoClassification, mesh: DeviceMesh, precision: str) -> None:
    """Shards a model's trainable weights, block by block, in place.

    Frozen weights are replicated: they have neither gradients nor optimiser states.

    Args:
        model: The classifier, after freezing and with its activation checkpointing.
        mesh: One dimension, all ranks.
        precision: The trainer's. Under bf16-mixed, weights are gathered in bfloat16 and gradients reduced in float32.
    """
    half = precision == "bf16-mixed"
    settings = {
        "mesh": mesh,
        "mp_policy": MixedPrecisionPolicy(torch.bfloat16, torch.float32) if half else MixedPrecisionPolicy(),
        "ignored_params": {parameter for parameter in model.parameters() if not parameter.requires_grad},
    }
    # The warning is about in-place changes; there are none.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
    for block in blocks(model):
        if any(parameter.requires_grad for parameter in block.parameters()):
            fully_shard(block, **settings)
    fully_shard(model, **settings)


def blocks(model: VidPrismForVideoClassification) -> list[nn.Module]:
    """Returns the modules to shard, inner ones first: layers and experts, then the rest of the head."""
    head = model.vidprism.temporal_model
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    return [*layers, *([] if head.interaction is None else [head.interaction]), head.readout, head]
