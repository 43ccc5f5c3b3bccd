"""What the three models share beside files: where they live, how they save memory, what of them learns."""

from typing import Any, Self

import torch
from torch import Tensor, nn

from segformer.checkpoints import Pretrained
from segformer.config import SegformerConfig
from segformer.errors import UserError, nearest
from segformer.outputs import ModelOutput


class SegformerPreTrainedModel(Pretrained):
    """The base of SegformerModel and of the two models with a head; `Pretrained` adds the files."""

    def __init__(self, config: SegformerConfig) -> None:
        super().__init__(config)
        self.frozen: tuple[str, ...] = ()
        self.recorded = False  # as CUDA graphs, by a compiler

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    @property
    def num_labels(self) -> int:
        return self.config.num_labels

    @property
    def base_model(self) -> nn.Module:
        """The encoder."""
        return getattr(self, "segformer", self)

    def num_parameters(self, only_trainable: bool = False) -> int:
        return sum(p.numel() for p in self.parameters() if p.requires_grad or not only_trainable)

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict[str, Any] | None = None) -> None:
        """Blocks are computed again in the backward pass instead of kept: less memory, a third more work.

        gradient_checkpointing_kwargs: accepted for transformers' sake; checkpoints are always non-reentrant.
        """
        self._set_gradient_checkpointing(True)

    def gradient_checkpointing_disable(self) -> None:
        self._set_gradient_checkpointing(False)

    @property
    def is_gradient_checkpointing(self) -> bool:
        return any(getattr(module, "gradient_checkpointing", False) for module in self.modules())

    def _set_gradient_checkpointing(self, enabled: bool) -> None:
        for module in self.modules():
            if hasattr(module, "gradient_checkpointing"):
                setattr(module, "gradient_checkpointing", enabled)  # noqa: B010 (an attribute of stages alone)

    def freeze(self, *parts: str) -> Self:
        """Stops parts from learning: no gradients, and eval mode (no dropout, fixed BatchNorm) in training too.

        parts: module names as `named_modules` gives them ("segformer.stages.0", "decode_head.batch_norm"), or
        "encoder" for all of the Mix Transformer. Returns the model.
        """
        names = dict(self.named_modules())
        encoder = "segformer" if "segformer" in names else ""
        for part in parts:
            name = encoder if part == "encoder" else part
            if name not in names or (not name and part != "encoder"):
                near = nearest(part, ["encoder", *names])
                inside = ", ".join(child for child, _ in self.named_children())
                raise UserError(
                    f"cannot freeze {part!r}{near}: give 'encoder' or a name of named_modules(): {inside}, or what "
                    "is inside them"
                )
            names[name].requires_grad_(False)
            self.frozen += (name,)
        return self.train(self.training)

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        for part in map(self.get_submodule, self.frozen):
            if not any(parameter.requires_grad for parameter in part.parameters()):  # unless it was thawed
                for module in part.modules():
                    module.training = False
        return self

    def _outputs(self, output_attentions: bool | None, output_hidden_states: bool | None) -> tuple[bool, bool]:
        """What a call asks for, or else the configuration."""
        wanted = {"output_attentions": output_attentions, "output_hidden_states": output_hidden_states}
        first, second = (getattr(self.config, name) if asked is None else asked for name, asked in wanted.items())
        return first, second

    def _states(self, maps: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The stages' outputs as returned: the last one as tokens (B, N, C) where the configuration says so."""
        return maps if self.config.reshape_last_stage else (*maps[:-1], maps[-1].flatten(2).transpose(1, 2))

    def _returned(self, output: ModelOutput, return_dict: bool | None) -> Any:
        return output if (self.config.return_dict if return_dict is None else return_dict) else output.to_tuple()
