"""The parameters of the regularisers themselves, such as a projection's, under a ``transformers.Trainer``.

The Trainer clears, averages, clips, saves and loads the parameters of its model alone.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn

from ear_ops.regularizers import Regularizer

SAVED = "regularizers.safetensors"  # in a checkpoint, beside the model's files


class OwnParameters:
    """What the regularisers have of their own, each tensor once, and nothing that belongs to the model.

    Args:
        regularizers: those that are attached.
        model: the model that the Trainer trains.
    """

    def __init__(self, regularizers: Iterable[Regularizer], model: nn.Module) -> None:
        self.tensors: dict[str, Tensor] = {}  # parameters and buffers, by the names of regulariser and attribute
        seen = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
        for regularizer in regularizers:
            for name, tensor in regularizer.named_tensors():
                if id(tensor) not in seen:
                    seen.add(id(tensor))
                    self.tensors[f"{regularizer.name}.{name}"] = tensor
        self.parameters = [tensor for tensor in self.tensors.values() if isinstance(tensor, nn.Parameter)]

    def add_to(self, optimizer: torch.optim.Optimizer, weight_decay: float) -> None:
        """Adds those that ``optimizer`` does not have; vectors, such as a bias, do not decay, as in the Trainer."""
        for decays in (True, False):
            group = [parameter for parameter in self.missing_in(optimizer) if (parameter.dim() > 1) == decays]
            if group:
                optimizer.add_param_group({"params": group, "weight_decay": weight_decay if decays else 0.0})

    def missing_in(self, optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
        known = {parameter for group in optimizer.param_groups for parameter in group["params"]}
        return [parameter for parameter in self.parameters if parameter not in known]

    def save(self, folder: str | Path) -> None:
        if not self.parameters:
            return
        from safetensors.torch import save_file  # here, since `import ear_ops` needs torch alone

        save_file({key: tensor.detach().contiguous() for key, tensor in self.tensors.items()}, Path(folder, SAVED))

    def load(self, folder: str | Path) -> None:
        """Raises ValueError where ``folder`` has others, or none."""
        if not self.parameters:
            return
        from safetensors.torch import load_file

        path = Path(folder, SAVED)
        if not path.exists():
            raise ValueError(
                f"resume_from_checkpoint: expected {SAVED} in {folder}, because regularisers have parameters of their "
                f"own, found none; it was saved without them, so start a new training from the model in it"
            )
        saved = load_file(path)
        shapes, expected = ({key: list(tensor.shape) for key, tensor in of.items()} for of in (saved, self.tensors))
        if shapes != expected:
            raise ValueError(f"regularizers: expected those that {path} was saved with, {shapes}, got {expected}")
        with torch.no_grad():
            for key, tensor in self.tensors.items():
                tensor.copy_(saved[key])

    def callback(self) -> Any:
        """What the Trainer calls, so that it treats them as it does the parameters of the model."""
        from transformers import TrainerCallback

        parameters = self.parameters

        class TrainOwnParameters(TrainerCallback):
            def on_train_begin(self, *_: Any, **__: Any) -> None:
                for parameter in parameters if _processes() > 1 else ():
                    distributed.broadcast(parameter.data, 0)

            def on_step_begin(self, *_: Any, **__: Any) -> None:
                for parameter in parameters:
                    parameter.grad = None

            def on_pre_optimizer_step(self, args: Any, *_: Any, **__: Any) -> None:
                for parameter in parameters if _processes() > 1 else ():
                    if parameter.grad is None:
                        parameter.grad = torch.zeros_like(parameter)
                    distributed.all_reduce(parameter.grad)
                    parameter.grad /= _processes()
                if args.max_grad_norm:
                    nn.utils.clip_grad_norm_(parameters, args.max_grad_norm)

        return TrainOwnParameters()


def _processes() -> int:
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1
