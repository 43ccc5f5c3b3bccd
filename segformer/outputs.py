"""What the models return: fields by name, by index or by slice, as transformers' outputs."""

from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor
from torch.utils import _pytree


@dataclass(eq=False)
class ModelOutput(dict[str, Any]):
    """Answers `output.logits`, `output["logits"]`, `output[0]`, `output[:2]`; fields that are None do not count.

    A dictionary that can be made from pairs, as what gathers the outputs of several devices does, and a tree whose
    leaves torch finds.
    """

    def __init_subclass__(cls) -> None:
        _pytree.register_pytree_node(
            cls,
            lambda output: (list(output.values()), list(output)),
            lambda values, names: cls(**dict(zip(names, values, strict=True))),
            serialized_type_name=f"segformer.outputs.{cls.__name__}",
        )

    def __post_init__(self) -> None:
        first, *others = (getattr(self, field.name) for field in fields(self))
        if first is not None and not isinstance(first, Tensor) and all(other is None for other in others):
            self.clear()
            pairs = dict(first)
            for field in fields(self):
                setattr(self, field.name, pairs.get(field.name))

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if value is None:
            self.pop(name, None)
        else:
            super().__setitem__(name, value)

    def __setitem__(self, name: str, value: Any) -> None:
        setattr(self, name, value)

    def __getitem__(self, key: Any) -> Any:
        return super().__getitem__(key) if isinstance(key, str) else self.to_tuple()[key]

    def to_tuple(self) -> tuple[Any, ...]:
        return tuple(getattr(self, field.name) for field in fields(self) if getattr(self, field.name) is not None)


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
