"""How a run is shared out over devices: DDP, FSDP2 and DeepSpeed, each through Lightning's own strategy.

FSDP2 is torch's `fully_shard`: every process keeps its share of the trained weights, gradients and optimiser states
and gathers a block's weights only while it computes with them. `shard` says which blocks there are.
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
    """What a trainer is given for the recipe's `trainer.strategy`.

    Args:
        name: `ddp` and `fsdp` are built here; Lightning knows the others: `auto` (one device, or DDP), `deepspeed`.
        accumulates: Whether gradients are accumulated over several batches.
        timeout: How long a collective operation may take.

    Raises:
        UserError: If it is one whose weights cannot be exported, or that leaves nothing to evaluate.
    """
    if isinstance(name, str) and name.startswith("deepspeed_stage_3"):
        raise UserError(f"trainer.strategy={name}: leaves no whole weights to export; take fsdp, or deepspeed")
    if isinstance(name, str) and name.startswith(("ddp_spawn", "ddp_fork", "ddp_notebook")):
        raise UserError(f"trainer.strategy={name}: its processes keep their results to themselves; take ddp")
    if name == "ddp":
        return DDPStrategy(timeout=timeout, **ddp_settings(accumulates))
    return FullyShardedStrategy(timeout=timeout) if name == "fsdp" else name


def ddp_settings(accumulates: bool) -> dict[str, bool]:
    """What torch's DDP is told.

    Every trained parameter gets a gradient in every step, which is all that a static graph asks for; but torch does
    not support one whose first step has no communication.
    """
    return {"find_unused_parameters": False, "static_graph": not accumulates}


class FullyShardedStrategy(ModelParallelStrategy):
    """FSDP2 over all devices of all nodes.

    A checkpoint is one file, as a single process would write it: any number of processes goes on from it, under this
    strategy or another one. The first process holds the whole of it in its memory while it writes.
    """

    def __init__(self, **settings: Any):
        super().__init__(tensor_parallel_size=1, save_distributed_checkpoint=False, **settings)

    def setup_environment(self) -> None:
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def lightning_module_state_dict(self) -> dict[str, torch.Tensor]:
        """The weights, whole, on the first process; nothing on the others. The work of all processes."""
        return {name: unpadded(tensor) for name, tensor in super().lightning_module_state_dict().items()}

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The optimiser's state, whole, on the first process."""

        def whole(_: int, value: Any) -> Any:
            if not isinstance(value, DTensor):
                return value
            gathered = value.full_tensor()  # the work of all processes
            return unpadded(gathered.cpu()) if self.is_global_zero else None

        return map_state(whole, optimizer.state_dict())

    def load_checkpoint(self, checkpoint_path: str, weights_only: bool | None = None) -> dict[str, Any]:
        """Reads a checkpoint on every process, each of which keeps its share; Lightning takes the rest from it."""
        # Lightning does not say here that a file may hold no code.
        weights_only = True if weights_only is None else weights_only
        path = self.broadcast(checkpoint_path)
        checkpoint = torch.load(path, map_location="cpu", mmap=True, weights_only=weights_only)
        strict, weights = self.lightning_module.strict_loading, checkpoint["state_dict"]
        goes_on = self.lightning_module.trainer.state.fn == TrainerFn.FITTING
        if goes_on:  # of a run that kept an average, which this strategy does not
            weights = checkpoint.get("current_model_state", weights)
        options = StateDictOptions(full_state_dict=True, strict=strict)
        set_model_state_dict(self.model, dict(weights), options=options)
        if goes_on:
            for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
                optimizer.load_state_dict(shared_state(optimizer, state))
        return checkpoint

    def on_validation_start(self) -> None:
        """Gathers the weights for the length of an evaluation: processes may have different numbers of batches."""
        self._keep_whole(True)

    def on_validation_end(self) -> None:
        self._keep_whole(False)

    on_test_start = on_predict_start = on_validation_start
    on_test_end = on_predict_end = on_validation_end

    def _keep_whole(self, whole: bool) -> None:
        shared = [module for module in self.model.modules() if isinstance(module, FSDPModule)]
        # Lightning evaluates in inference mode, whose tensors no training could use again.
        with torch.inference_mode(False), torch.no_grad():
            for number, block in enumerate(shared):
                # The first is the root, which is wanted again as soon as the backward pass begins.
                block.set_reshard_after_forward(not whole and number > 0, recurse=False)
                block.unshard() if whole else block.reshard()


def unpadded(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor without the memory that gathering leaves behind it where its rows do not divide evenly."""
    return tensor.clone() if tensor.untyped_storage().nbytes() > tensor.nbytes else tensor


def shared_state(optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """This process's share of an optimiser's whole state."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]

    def share(index: int, value: Any) -> Any:
        parameter = parameters[index]
        if not isinstance(parameter, DTensor) or not isinstance(value, torch.Tensor) or value.shape != parameter.shape:
            return value  # such as the number of steps
        local = value.to(parameter.device)
        return distribute_tensor(local, parameter.device_mesh, parameter.placements, src_data_rank=None)

    return map_state(share, state)


def map_state(function: Callable[[int, Any], Any], state: dict[str, Any]) -> dict[str, Any]:
    """An optimiser's state with each entry of each parameter replaced by that of the parameter's number and it."""
    entries = {
        index: {name: function(index, value) for name, value in values.items()}
        for index, values in state["state"].items()
    }
    return {**state, "state": entries}


def shard(model: VidPrismForVideoClassification, mesh: DeviceMesh, precision: str) -> None:
    """Shares a model's trained weights out, block by block, in place.

    Frozen weights stay whole on every process: they have neither gradients nor optimiser states.

    Args:
        model: The classifier, frozen where it is to be, with its activation checkpointing.
        mesh: One dimension, all processes.
        precision: The trainer's. Under bf16-mixed weights are gathered in bfloat16 and gradients added in float32.
    """
    half = precision == "bf16-mixed"
    settings = {
        "mesh": mesh,
        "mp_policy": MixedPrecisionPolicy(torch.bfloat16, torch.float32) if half else MixedPrecisionPolicy(),
        "ignored_params": {parameter for parameter in model.parameters() if not parameter.requires_grad},
    }
    # Nothing is changed in place here.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
    for block in blocks(model):
        if any(parameter.requires_grad for parameter in block.parameters()):
            fully_shard(block, **settings)
    fully_shard(model, **settings)


def blocks(model: VidPrismForVideoClassification) -> list[nn.Module]:
    """The parts that compute one after another, the inner ones first: layers and experts, and the rest of the head."""
    head = model.vidprism.temporal_model
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    return [*layers, *([] if head.interaction is None else [head.interaction]), head.readout, head]
