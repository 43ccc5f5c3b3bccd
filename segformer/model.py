"""SegFormer (arXiv 2105.15203) in reading order: patch embedding, attention, Mix-FFN, block, stage, encoder, heads.

Shapes: B batch, H x W the grid of the stage at hand, N = H * W tokens, M reduced tokens, C its width, h heads, D the
decoder's width, K classes. Tokens stay (B, H, W, C) from end to end, so a convolution sees the same memory as an
ordinary channels-last (B, C, H, W) tensor and nothing is ever copied between the two views.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from segformer.checkpoints import Pretrained, start_from
from segformer.config import SegformerConfig
from segformer.errors import UserError
from segformer.losses import pixel_cross_entropy

# PyTorch's default 1e-5 for every LayerNorm, as transformers has it: what we save scores the same there. NVlabs used
# 1e-6 inside blocks and stages (a difference of about 2e-5 on the encoder's outputs).
LAYER_NORM_EPS = 1e-5


@dataclass
class ModelOutput:
    """Fields by name, by index or by slice; fields that are None do not count, as in transformers."""

    def to_tuple(self) -> tuple[Any, ...]:
        return tuple(getattr(self, name) for name in self.keys())

    def keys(self) -> list[str]:
        return [field.name for field in fields(self) if getattr(self, field.name) is not None]

    def __getitem__(self, key: str | int | slice) -> Any:
        return getattr(self, key) if isinstance(key, str) else self.to_tuple()[key]

    def __len__(self) -> int:
        return len(self.keys())

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())


@dataclass
class BaseModelOutput(ModelOutput):
    """last_hidden_state: (B, C4, H/32, W/32). hidden_states: the four stage outputs (B, C, H, W), on request."""

    last_hidden_state: Tensor
    hidden_states: tuple[Tensor, ...] | None = None


@dataclass
class SemanticSegmenterOutput(ModelOutput):
    """loss: scalar, given labels. logits: (B, K, ceil(H/4), ceil(W/4)), never upsampled. hidden_states: on request."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None


class OverlapPatchEmbeddings(nn.Module):
    """A strided convolution whose windows overlap, then LayerNorm."""

    def __init__(self, channels: int, width: int, patch_size: int, stride: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, width, patch_size, stride, padding=patch_size // 2)
        self.layer_norm = nn.LayerNorm(width, eps=LAYER_NORM_EPS)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer_norm(self.proj(x).permute(0, 2, 3, 1))  # (B, H, W, C)


class EfficientSelfAttention(nn.Module):
    """Multi-head attention whose keys and values come from a grid shrunk `reduction` times per side.

    The reduction convolution does not pad: the border rows and columns that do not fill a window are not looked at,
    which is why sides that are multiples of 32 score higher.
    """

    def __init__(self, width: int, heads: int, reduction: int, config: SegformerConfig) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj = nn.Linear(width, width)
        self.kv_proj = nn.Linear(width, 2 * width)  # one GEMM; files keep `key` and `value` apart
        self.o_proj = nn.Linear(width, width)
        if reduction > 1:
            self.sequence_reduction = nn.Conv2d(width, width, reduction, reduction)
            self.layer_norm = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.reduction = reduction
        self.attention_dropout = config.attention_probs_dropout_prob
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, x: Tensor) -> Tensor:
        batch, height, width, channels = x.shape
        query = self.q_proj(x).view(batch, height * width, self.heads, -1).transpose(1, 2)  # (B, h, N, C/h)
        if self.reduction > 1:
            reduced = self.layer_norm(self.sequence_reduction(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
        else:
            reduced = x
        kv = self.kv_proj(reduced).view(batch, -1, 2, self.heads, channels // self.heads)
        key, value = kv.permute(2, 0, 3, 1, 4).unbind(0)  # (B, h, M, C/h) each
        dropout = self.attention_dropout if self.training else 0.0
        context = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout)
        return self.dropout(self.o_proj(context.transpose(1, 2).reshape(batch, height, width, channels)))


class MixFFN(nn.Module):
    """An MLP with a depth-wise 3x3 convolution inside: its zero padding is what tells a token where it stands."""

    def __init__(self, width: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.dwconv = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.fc2 = nn.Linear(hidden, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = self.dwconv(self.fc1(x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)  # (B, H, W, 4C)
        return self.dropout(self.fc2(self.dropout(F.gelu(x))))


class DropPath(nn.Module):
    """Drops a residual branch for whole samples with probability `rate`, scaling the rest to keep the mean."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.rate == 0:
            return x
        keep = 1 - self.rate
        return x * x.new_empty(x.shape[0], 1, 1, 1).bernoulli_(keep).div_(keep)


class Block(nn.Module):
    """Pre-norm transformer block: attention, then Mix-FFN, each on a residual branch with the same drop-path rate."""

    def __init__(self, config: SegformerConfig, stage: int, drop_path: float) -> None:
        super().__init__()
        width = config.hidden_sizes[stage]
        heads, reduction = config.num_attention_heads[stage], config.sr_ratios[stage]
        self.layernorm_before = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.attention = EfficientSelfAttention(width, heads, reduction, config)
        self.drop_path = DropPath(drop_path)
        self.layernorm_after = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.mlp = MixFFN(width, int(width * config.mlp_ratios[stage]), config.hidden_dropout_prob)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.attention(self.layernorm_before(x)))
        return x + self.drop_path(self.mlp(self.layernorm_after(x)))


class Stage(nn.Module):
    """Patch embedding, blocks, LayerNorm. The normed map is both the stage's output and the next stage's input."""

    def __init__(self, config: SegformerConfig, stage: int, drop_path: Sequence[float]) -> None:
        super().__init__()
        channels = config.num_channels if stage == 0 else config.hidden_sizes[stage - 1]
        width = config.hidden_sizes[stage]
        self.patch_embeddings = OverlapPatchEmbeddings(
            channels, width, config.patch_sizes[stage], config.strides[stage]
        )
        self.blocks = nn.ModuleList(Block(config, stage, rate) for rate in drop_path)
        self.layer_norm = nn.LayerNorm(width, eps=LAYER_NORM_EPS)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embeddings(x)
        for block in self.blocks:
            x = block(x)
        return self.layer_norm(x).permute(0, 3, 1, 2)  # (B, C, H, W), channels-last


class SegformerModel(Pretrained):
    """The Mix Transformer encoder: (B, 3, H, W) normalised pixels -> four feature maps at strides 4, 8, 16, 32."""

    def __init__(self, config: SegformerConfig) -> None:
        super().__init__(config)
        blocks = sum(config.depths)
        # one linear ramp over all blocks, 0 for the first, drop_path_rate for the last
        rates = [config.drop_path_rate * index / max(blocks - 1, 1) for index in range(blocks)]
        starts = [sum(config.depths[:stage]) for stage in range(config.num_encoder_blocks)]
        self.stages = nn.ModuleList(
            Stage(config, stage, rates[start : start + config.depths[stage]]) for stage, start in enumerate(starts)
        )
        self.apply(_init_encoder)
        self.to(memory_format=torch.channels_last)  # as the tokens lie: no reordering

    def forward(
        self, pixel_values: Tensor, output_hidden_states: bool | None = None, return_dict: bool | None = None
    ) -> BaseModelOutput | tuple[Any, ...]:
        """pixel_values: (B, 3, H, W) float, normalised (`pixels.normalize`); sides from 29 pixels."""
        hidden_states = self.features(pixel_values)
        wanted = _resolve(output_hidden_states, self.config, "output_hidden_states", False)
        output = BaseModelOutput(hidden_states[-1], hidden_states if wanted else None)
        return output if _resolve(return_dict, self.config, "return_dict", True) else output.to_tuple()

    def features(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        """(B, 3, H, W) -> one (B, C, H, W) map a stage, channels-last in memory."""
        # the first grid, a quarter of the image, must fill one window of the reduction
        smallest = (self.config.sr_ratios[0] - 1) * self.config.strides[0] + 1
        if min(pixel_values.shape[-2:]) < smallest:
            found = " x ".join(map(str, pixel_values.shape[-2:]))
            raise UserError(
                f"image is {found} pixels, expected sides of at least {smallest}: resize it before the model"
            )
        x = pixel_values.contiguous(memory_format=torch.channels_last)
        maps = []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return tuple(maps)


class SegformerDecodeHead(nn.Module):
    """The all-MLP head: project each stage to D, bring it to stride 4, fuse, classify.

    Everything between the projections and BatchNorm is linear and bilinear weights sum to one, so the fuse convolution
    commutes with the resize: each stage's slice of it is multiplied into that stage's projection (a product of weights,
    differentiable) and applied at the stage's own resolution. Same parameters, same function and gradient, 27 to 60 %
    fewer operations for the whole model and no (B, 4D, H/4, W/4) tensor. `merged = False` takes the literal path.
    """

    def __init__(self, config: SegformerConfig) -> None:
        super().__init__()
        width = config.decoder_hidden_size
        self.linear_projections = nn.ModuleList(nn.Linear(channels, width) for channels in config.hidden_sizes)
        self.linear_fuse = nn.Conv2d(width * len(config.hidden_sizes), width, 1, bias=False)
        self.batch_norm = nn.BatchNorm2d(width)
        # element-wise as transformers; NVlabs drops whole channels ("channel"), a stronger regulariser
        kinds = {"element": nn.Dropout, "channel": nn.Dropout2d}
        kind = getattr(config, "classifier_dropout_kind", "element")
        if kind not in kinds:
            raise UserError(f"classifier_dropout_kind is {kind!r}, expected 'element' or 'channel'")
        self.dropout = kinds[kind](config.classifier_dropout_prob)
        self.classifier = nn.Conv2d(width, config.num_labels, 1)
        self.merged = True
        nn.init.kaiming_normal_(self.linear_fuse.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, encoder_hidden_states: Sequence[Tensor]) -> Tensor:
        """Four (B, C, H, W) maps -> logits (B, K, H/4, W/4)."""
        fused = (self._fuse_merged if self.merged else self._fuse_literal)(encoder_hidden_states)
        return self.classifier(self.dropout(F.relu(self.batch_norm(fused), inplace=True)))

    def _fuse_merged(self, maps: Sequence[Tensor]) -> Tensor:
        slices = self.linear_fuse.weight[:, :, 0, 0].chunk(len(maps), dim=1)  # (D, D) each, deepest stage first
        fused = None
        for projection, slice_, x in zip(self.linear_projections, reversed(slices), maps, strict=True):
            assert isinstance(projection, nn.Linear)
            with torch.autocast(x.device.type, enabled=False):  # a product of weights: no rounding to half precision
                weight, bias = slice_ @ projection.weight, slice_ @ projection.bias  # (D, C), (D)
            projected = _resize(F.linear(x.permute(0, 2, 3, 1), weight, bias).permute(0, 3, 1, 2), maps[0])
            fused = projected if fused is None else projected.add_(fused)  # a resized map is nobody else's
        assert fused is not None
        return fused

    def _fuse_literal(self, maps: Sequence[Tensor]) -> Tensor:
        projected = [
            _resize(projection(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2), maps[0])
            for projection, x in zip(self.linear_projections, maps, strict=True)
        ]
        return self.linear_fuse(torch.cat(projected[::-1], dim=1))


class SegformerForSemanticSegmentation(Pretrained):
    """Encoder and all-MLP decode head: (B, 3, H, W) -> logits (B, K, ceil(H/4), ceil(W/4))."""

    def __init__(self, config: SegformerConfig) -> None:
        super().__init__(config)
        self.segformer = SegformerModel(config)
        self.decode_head = SegformerDecodeHead(config)

    def forward(
        self,
        pixel_values: Tensor,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> SemanticSegmenterOutput | tuple[Any, ...]:
        """pixel_values: (B, 3, H, W) float, normalised. labels: (B, H, W) class ids, 255 = ignore.

        The loss is the cross-entropy at label size, averaged over the pixels that are not ignored, as transformers'.
        """
        hidden_states = self.segformer.features(pixel_values)
        logits = self.decode_head(hidden_states)
        loss = None
        if labels is not None:
            loss = pixel_cross_entropy(logits, labels, ignore_index=self.config.semantic_loss_ignore_index)
        wanted = _resolve(output_hidden_states, self.config, "output_hidden_states", False)
        output = SemanticSegmenterOutput(loss, logits, hidden_states if wanted else None)
        return output if _resolve(return_dict, self.config, "return_dict", True) else output.to_tuple()


def build_segformer(
    names: Sequence[str],
    variant: str,
    pretrained: str | None = None,
    drop_path_rate: float = 0.1,
    classifier_dropout_kind: str = "channel",
) -> tuple[SegformerForSemanticSegmentation, str]:
    """The network of a training run, whose config section `model` this signature is, and what was loaded into it."""
    config = SegformerConfig.from_variant(
        variant,
        id2label=dict(enumerate(names)),
        drop_path_rate=drop_path_rate,
        classifier_dropout_kind=classifier_dropout_kind,
    )
    model = SegformerForSemanticSegmentation(config)
    return model, start_from(model, pretrained) if pretrained else "all weights start fresh"


def _resize(x: Tensor, like: Tensor) -> Tensor:
    if x.shape[-2:] == like.shape[-2:]:
        return x
    return F.interpolate(x, size=like.shape[-2:], mode="bilinear", align_corners=False)


def _resolve(value: bool | None, config: SegformerConfig, name: str, default: bool) -> bool:
    return getattr(config, name, default) if value is None else value


def _init_encoder(module: nn.Module) -> None:
    """NVlabs' initialisation; Hugging Face's normal(0, 0.02) everywhere is clearly worse from scratch."""
    if not isinstance(module, nn.Linear | nn.Conv2d):
        return
    assert module.bias is not None
    nn.init.zeros_(module.bias)
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
    else:
        fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels // module.groups
        nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))
