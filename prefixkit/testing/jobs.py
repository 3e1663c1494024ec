"""What the two processes do with a model: jobs for :func:`prefixkit.testing.workers.run`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from inspect import signature
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

import prefixkit
from prefixkit.adapter import Adapter, Stack
from prefixkit.testing.subject import enable_checkpointing, loss_of, numbers_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Inputs = dict[str, torch.Tensor]
Job = Callable[..., Any]

PROCESSES = 2


def outputs(model: PreTrainedModel, inputs: Inputs) -> torch.Tensor:
    """The outputs of the model as it arrived."""
    with torch.no_grad():
        return numbers_of(model(**inputs))


def replicated_gradients(model: PreTrainedModel, inputs: Inputs, checkpointing: bool) -> Inputs:
    """Gradients of a model that accelerate prepared, each process with its half of the batch."""
    from accelerate import Accelerator  # type: ignore[import-untyped]
    from torch.nn.parallel import DistributedDataParallel

    _prepare(model, checkpointing=checkpointing)
    prepared = Accelerator(cpu=True).prepare(model)
    assert isinstance(prepared, DistributedDataParallel)
    return _gradients(prepared, inputs)


def sharded_gradients(model: PreTrainedModel, inputs: Inputs, checkpointing: bool) -> Inputs:
    """Gradients of a model that FSDP2 sharded."""
    _prepare(model, checkpointing=checkpointing)
    shard(model)
    return _gradients(model, inputs)


def sharded_steps(model: PreTrainedModel, inputs: Inputs, folder: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Train a sharded model a step, save it, and give its outputs, with the prefix and without."""
    shard(model)
    trained = [value for value in model.parameters() if value.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.1)
    loss_of(numbers_of(model(**_half(inputs)))).backward()
    optimizer.step()
    prefixkit.save(model, folder)
    with torch.no_grad():
        found = numbers_of(model(**inputs))
        with prefixkit.disabled(model):
            bare = numbers_of(model(**inputs))
    torch.distributed.barrier()
    return found, bare


def sharded_generation(model: PreTrainedModel, inputs: Inputs, settings: dict[str, Any]) -> torch.Tensor:
    """Tokens that a sharded model generates."""
    from torch.distributed.fsdp import register_fsdp_forward_method

    shard(model)
    # Without this, generate() calls an encoder whose outer modules are still in pieces.
    register_fsdp_forward_method(model, "generate")
    tokens: torch.Tensor = model.generate(**inputs, **settings)  # type: ignore[operator]
    return tokens


def sharded_before(model: PreTrainedModel, stated: tuple[Stack, ...], **options: Any) -> None:
    """Apply a prefix to a model that FSDP2 has sharded."""
    shard(model)
    _apply(model, stated, **options)


@dataclass(frozen=True)
class Saved:
    """A base and its prefix as files, and the stacks that an adapter named."""

    stacks: tuple[Stack, ...]
    base: str
    prefix: str


def spread_training(model: PreTrainedModel, saved: Saved, inputs: Inputs) -> tuple[torch.Tensor, Inputs, torch.Tensor]:
    """Train a prefix a step on a model that tensor parallel has spread: outputs and gradients before, outputs after."""
    spread = _loaded(model, saved)
    trained = {name: value for name, value in spread.named_parameters() if value.requires_grad}
    optimizer = torch.optim.SGD(trained.values(), lr=0.1)
    found = numbers_of(spread(**inputs))
    loss_of(found).backward()
    gradients = {name: _whole(value.grad) for name, value in trained.items() if value.grad is not None}
    optimizer.step()
    prefixkit.save(spread, saved.prefix)
    torch.distributed.barrier()
    return found.detach(), gradients, outputs(spread, inputs)


def spread_generation(model: PreTrainedModel, saved: Saved, inputs: Inputs, settings: dict[str, Any]) -> torch.Tensor:
    """Tokens that a model generates with a prefix, spread by tensor parallel."""
    tokens: torch.Tensor = _loaded(model, saved).generate(**inputs, **settings)  # type: ignore[operator]
    return tokens


def spread_start(model: PreTrainedModel, stated: tuple[Stack, ...], base: str, **options: Any) -> Inputs:
    """What a prefix starts with that is applied to a spread model, on processes with random numbers of their own."""
    spread = spread_by_plan(model, base)
    torch.manual_seed(torch.distributed.get_rank())
    _apply(spread, stated, **options)
    return {name: value.detach().clone() for name, value in spread.named_parameters() if value.requires_grad}


def spread_by_plan(model: PreTrainedModel, base: str) -> PreTrainedModel:
    """The model that is saved at ``base``, spread over the processes by its own plan."""
    from transformers.distributed.configuration_utils import DistributedConfig

    settings: dict[str, Any] = {"tp_size": PROCESSES, "tp_plan": "auto"}
    if "tp_size" in signature(DistributedConfig).parameters:
        settings = {"distributed_config": DistributedConfig(**settings)}
    spread: PreTrainedModel = type(model).from_pretrained(base, **settings)
    spread.train(model.training)
    generation = getattr(model, "generation_config", None)
    if generation is not None:
        spread.generation_config = generation
    return spread


def _loaded(model: PreTrainedModel, saved: Saved) -> PreTrainedModel:
    spread = spread_by_plan(model, saved.base)
    return prefixkit.load(spread, saved.prefix, trainable=True, adapter=_adapter(spread, saved.stacks))


@dataclass(frozen=True)
class Stated:
    """The stacks that an adapter named, since the adapter itself may stand in a module that is not here."""

    stacks: tuple[Stack, ...]

    def __call__(self, _model: object) -> tuple[Stack, ...]:
        """As ``Adapter.stacks``."""
        return self.stacks


def _apply(model: PreTrainedModel, stated: tuple[Stack, ...], **options: Any) -> None:
    prefixkit.apply(model, adapter=_adapter(model, stated), **options)


def _adapter(model: PreTrainedModel, stated: tuple[Stack, ...]) -> Adapter:
    return Adapter(model_types=(model.config.model_type,), stacks=Stated(stated))


def layers_of(model: nn.Module) -> list[str]:
    """Paths of the layers: the members of every outermost list of modules."""
    lists = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    outer = [name for name in lists if not any(name.startswith(f"{other}.") for other in lists)]
    return [f"{name}.{index}" for name in outer for index in range(len(model.get_submodule(name)))]  # type: ignore[arg-type]


def shard(model: nn.Module) -> None:
    """FSDP2: every layer by itself, and the rest with the root."""
    from torch.distributed.fsdp import fully_shard

    for path in layers_of(model):
        fully_shard(model.get_submodule(path))
    fully_shard(model)


def _prepare(model: PreTrainedModel, *, checkpointing: bool) -> None:
    """Here and not before: a model that checkpoints cannot be pickled, with or without a prefix."""
    if checkpointing:
        enable_checkpointing(model)


def _half(inputs: Inputs) -> Inputs:
    rank = torch.distributed.get_rank()
    return {name: value.chunk(PROCESSES)[rank] for name, value in inputs.items()}


def _gradients(model: nn.Module, inputs: Inputs) -> Inputs:
    loss_of(numbers_of(model(**_half(inputs)))).backward()
    grads = {name: value.grad for name, value in model.named_parameters() if value.requires_grad}
    return {name.removeprefix("module."): _whole(grad) for name, grad in grads.items() if grad is not None}


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    from torch.distributed.tensor import DTensor

    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
