"""What the models return: fields by name, by index or by slice, as transformers' outputs."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor


@dataclass(eq=False)
class ModelOutput(Mapping[str, Any]):
    """Answers `output.logits`, `output["logits"]`, `output[0]`, `output[:2]`; fields that are None do not count."""

    def __getitem__(self, key: str | int | slice) -> Any:
        if not isinstance(key, str):
            return self.to_tuple()[key]
        if key not in list(self):
            raise KeyError(key)
        return getattr(self, key)

    def __iter__(self) -> Iterator[str]:
        return (field.name for field in fields(self) if getattr(self, field.name) is not None)

    def __len__(self) -> int:
        return len(list(iter(self)))

    def to_tuple(self) -> tuple[Any, ...]:
        return tuple(getattr(self, name) for name in self)


@dataclass(eq=False)
class BaseModelOutput(ModelOutput):
    """last_hidden_state: (B, C4, H/32, W/32).

    On request hidden_states, the output (B, C, H, W) of each stage, and attentions, the probabilities (B, heads, N, M)
    of each block: N tokens look at M reduced ones.
    """

    last_hidden_state: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


@dataclass(eq=False)
class SemanticSegmenterOutput(ModelOutput):
    """loss: scalar, given labels. logits: (B, K, ceil(H/4), ceil(W/4)), never upsampled. The rest as the encoder's."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


@dataclass(eq=False)
class ImageClassifierOutput(ModelOutput):
    """loss: scalar, given labels. logits: (B, K). The rest as the encoder's."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
