"""SegFormer (arXiv 2105.15203) in reading order: patch embedding, attention, Mix-FFN, block, stage, encoder, heads.

Shapes: B batch, H x W the grid of the stage at hand, N = H * W tokens, M reduced tokens, C its width, h heads, D the
decoder's width, K classes. Tokens stay (B, H, W, C) from end to end, so a convolution sees the same memory as an
ordinary channels-last (B, C, H, W) tensor and nothing is ever copied between the two views.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from segformer.base import SegformerPreTrainedModel
from segformer.bilinear import band_rows, bilinear_matrix, row_bands, upsample_band
from segformer.config import SegformerConfig
from segformer.errors import UserError, nearest
from segformer.kernels import usable
from segformer.losses import binary_pixel_cross_entropy, classification_loss, pixel_cross_entropy
from segformer.outputs import BaseModelOutput, ImageClassifierOutput, SemanticSegmenterOutput

# of embedding and reduction norms, of block and stage norms: transformers builds every LayerNorm with PyTorch's 1e-5,
# NVlabs trained with 1e-6 in blocks and stages, which moves the encoder's outputs by about 2e-5
LAYER_NORM_EPS = {"hf": (1e-5, 1e-5), "nvlabs": (1e-5, 1e-6)}
# element-wise as transformers; NVlabs drops whole channels, a stronger regulariser
CLASSIFIER_DROPOUT: dict[str, type[nn.Module]] = {"element": nn.Dropout, "channel": nn.Dropout2d}
# from which on a kernel saves a GPU more than calling it costs the host: rows to be normalised, and numbers between the
# matrices of a Mix-FFN. By what PyTorch's kernels are known to take, a block of threads for each row and five times the
# floor, not by measurement
LEAST_ROWS, LEAST_HIDDEN = 2**16, 2**22
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
    "swish": F.silu,
}


class LayerNorm(nn.LayerNorm):
    """PyTorch's, by a kernel where one can take the rows: its own is far from what a GPU can do with rows this narrow.

    A compiler makes kernels of its own and fuses them with their neighbours: it gets PyTorch's. inner: nothing but
    matrix products reads the result, so that under autocast it is rounded to their type at once, not by each of them.
    """

    def __init__(self, width: int, eps: float, inner: bool = False) -> None:
        super().__init__(width, eps=eps)
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        if not self.takes(x):
            return super().forward(x)
        from segformer.kernels.layer_norm import layer_norm

        normed: Tensor = layer_norm(x, self.weight, self.bias, self.eps, self.result(x))
        return normed

    def takes(self, x: Tensor) -> bool:
        """Whether the kernel does."""
        if torch.compiler.is_compiling() or not usable(x, LEAST_ROWS * x.shape[-1]):
            return False
        from segformer.kernels.layer_norm import CHANNELS

        return x.shape[-1] <= CHANNELS

    def result(self, x: Tensor) -> torch.dtype:
        """The type of the result: under autocast PyTorch's own gives float32."""
        if not torch.is_autocast_enabled(x.device.type):
            return x.dtype
        return torch.get_autocast_dtype(x.device.type) if self.inner else torch.float32


class OverlapPatchEmbeddings(nn.Module):
    """A strided convolution whose windows overlap, then LayerNorm."""

    def __init__(self, channels: int, width: int, patch_size: int, stride: int, eps: float) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, width, patch_size, stride, padding=patch_size // 2)
        self.layer_norm = LayerNorm(width, eps)

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
            self.layer_norm = LayerNorm(width, _choice(LAYER_NORM_EPS, config, "layer_norm_eps_kind")[0], inner=True)
        self.reduction = reduction
        self.attention_dropout = config.attention_probs_dropout_prob
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, x: Tensor, output_attentions: bool = False) -> tuple[Tensor, Tensor | None]:
        batch, height, width, channels = x.shape
        query = self.q_proj(x).view(batch, height * width, self.heads, -1).transpose(1, 2)  # (B, h, N, C/h)
        if self.reduction > 1:
            reduced = self.layer_norm(self.sequence_reduction(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
        else:
            reduced = x
        kv = self.kv_proj(reduced).view(batch, -1, 2, self.heads, channels // self.heads)
        key, value = kv.permute(2, 0, 3, 1, 4).unbind(0)  # (B, h, M, C/h) each
        dropout = self.attention_dropout if self.training else 0.0
        attentions = None
        if output_attentions:  # the fused kernel does not give them away
            scores = query @ key.transpose(2, 3) / math.sqrt(query.shape[-1])
            exact = torch.promote_types(scores.dtype, torch.float32)
            attentions = F.dropout(scores.softmax(dim=-1, dtype=exact).to(value.dtype), dropout)  # (B, h, N, M)
            context = attentions @ value
        else:
            context = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout)
        context = context.transpose(1, 2).reshape(batch, height, width, channels)
        return self.dropout(self.o_proj(context)), attentions


class MixFFN(nn.Module):
    """An MLP with a depth-wise 3x3 convolution inside: its zero padding is what tells a token where it stands."""

    def __init__(self, width: int, hidden: int, config: SegformerConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.dwconv = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.activation = _choice(ACTIVATIONS, config, "hidden_act")
        self.fc2 = nn.Linear(hidden, width)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.fc2(self.dropout(self._convolved(self.fc1(x)))))

    def _convolved(self, x: Tensor) -> Tensor:
        """(B, H, W, 4C) -> the same of the convolution and the activation."""
        conv = self.dwconv
        if self.activation is F.gelu and usable(x, LEAST_HIDDEN) and _depthwise(conv):
            from segformer.kernels.depthwise import depthwise_gelu

            assert conv.bias is not None
            tokens = x.flatten(1, 2)  # (B, N, 4C)
            return depthwise_gelu(tokens, conv.weight, conv.bias, x.shape[1], x.shape[2]).view(x.shape)
        return self.activation(conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))


class DropPath(nn.Module):
    """Drops a residual branch for whole samples with probability `rate`, scaling the rest to keep the mean."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        scale = self.scale(x)
        return x if scale is None else x * scale.view(-1, 1, 1, 1)

    def scale(self, x: Tensor) -> Tensor | None:
        """(B,) factors on the samples; None, all are kept as they are."""
        if not self.training or self.rate == 0:
            return None
        keep = 1 - self.rate
        return x.new_empty(x.shape[0]).bernoulli_(keep).div_(keep)


class Block(nn.Module):
    """Pre-norm transformer block: attention, then Mix-FFN, each on a residual branch with the same drop-path rate."""

    def __init__(self, config: SegformerConfig, stage: int, drop_path: float) -> None:
        super().__init__()
        width = config.hidden_sizes[stage]
        heads, reduction = config.num_attention_heads[stage], config.sr_ratios[stage]
        eps = _choice(LAYER_NORM_EPS, config, "layer_norm_eps_kind")[1]
        self.layernorm_before = LayerNorm(width, eps, inner=True)
        self.attention = EfficientSelfAttention(width, heads, reduction, config)
        self.drop_path = DropPath(drop_path)
        self.layernorm_after = LayerNorm(width, eps, inner=True)
        self.mlp = MixFFN(width, int(width * config.mlp_ratios[stage]), config)

    def forward(self, x: Tensor, output_attentions: bool = False) -> tuple[Tensor, Tensor | None]:
        context, attentions = self.attention(self.layernorm_before(x), output_attentions)
        x, normed = self._added(x, context)
        return x + self.drop_path(self.mlp(normed)), attentions

    def _added(self, x: Tensor, branch: Tensor) -> tuple[Tensor, Tensor]:
        """The sum after the attention, and what goes into the Mix-FFN."""
        norm, drop_path = self.layernorm_after, self.drop_path
        if _plain(norm, LayerNorm) and _plain(drop_path, DropPath) and norm.takes(x) and usable(branch):
            from segformer.kernels.layer_norm import add_layer_norm

            scale = drop_path.scale(branch)
            return add_layer_norm(x, branch, scale, norm.weight, norm.bias, norm.eps, norm.result(x))
        x = x + drop_path(branch)
        return x, norm(x)


class Stage(nn.Module):
    """Patch embedding, blocks, LayerNorm. The normed map is both the stage's output and the next stage's input."""

    def __init__(self, config: SegformerConfig, stage: int, drop_path: Sequence[float]) -> None:
        super().__init__()
        channels = config.num_channels if stage == 0 else config.hidden_sizes[stage - 1]
        width, patch_size, stride = (
            getattr(config, name)[stage] for name in ("hidden_sizes", "patch_sizes", "strides")
        )
        outer_eps, eps = _choice(LAYER_NORM_EPS, config, "layer_norm_eps_kind")
        self.patch_embeddings = OverlapPatchEmbeddings(channels, width, patch_size, stride, outer_eps)
        self.blocks = nn.ModuleList(Block(config, stage, rate) for rate in drop_path)
        self.layer_norm = LayerNorm(width, eps)
        self.gradient_checkpointing = False

    def forward(self, x: Tensor, output_attentions: bool = False) -> tuple[Tensor, list[Tensor | None]]:
        x, attentions = self.patch_embeddings(x), []
        for block in self.blocks:
            if self.gradient_checkpointing and self.training:
                x, weights = checkpoint(block, x, output_attentions, use_reentrant=False)
            else:
                x, weights = block(x, output_attentions)
            attentions.append(weights)
        return self.layer_norm(x).permute(0, 3, 1, 2), attentions  # (B, C, H, W), channels-last


class SegformerModel(SegformerPreTrainedModel):
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
        self,
        pixel_values: Tensor,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> BaseModelOutput | tuple[Any, ...]:
        """pixel_values: (B, 3, H, W) float, normalised (`pixels.normalize`); sides from 29 pixels."""
        with_attentions, with_states = self._outputs(output_attentions, output_hidden_states)
        maps, attentions = self.features(pixel_values, with_attentions)
        maps = self._states(maps)
        output = BaseModelOutput(maps[-1], maps if with_states else None, attentions)
        return self._returned(output, return_dict)

    def features(
        self, pixel_values: Tensor, output_attentions: bool = False
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...] | None]:
        """(B, 3, H, W) -> a (B, C, H, W) map of each stage, channels-last in memory; the attentions of each block."""
        _check_pixels(pixel_values, self.config)
        x = pixel_values.contiguous(memory_format=torch.channels_last)
        maps, attentions = [], []
        for stage in self.stages:
            x, weights = stage(x, output_attentions)
            maps.append(x)
            attentions += weights
        return tuple(maps), tuple(attentions) if output_attentions else None


class SegformerDecodeHead(nn.Module):
    """The all-MLP head: project each stage to D, bring it to stride 4, fuse, classify.

    Everything between the projections and BatchNorm is linear and bilinear weights sum to one, so the fuse convolution
    commutes with the resize: each stage's slice of it is multiplied into that stage's projection (a product of weights,
    differentiable) and applied at the stage's own resolution. Same parameters, same function and gradient, 27 to 61 %
    fewer operations for the whole model and no (B, 4D, H/4, W/4) tensor. BatchNorm in eval mode is a scale and a shift,
    and joins the product. `merged = False` takes the literal path, as does a head with a part that was replaced or has
    a hook: then each part is called.
    """

    def __init__(self, config: SegformerConfig) -> None:
        super().__init__()
        width = config.decoder_hidden_size
        self.linear_projections = nn.ModuleList(nn.Linear(channels, width) for channels in config.hidden_sizes)
        self.linear_fuse = nn.Conv2d(width * len(config.hidden_sizes), width, 1, bias=False)
        self.batch_norm = nn.BatchNorm2d(width)
        self.dropout = _choice(CLASSIFIER_DROPOUT, config, "classifier_dropout_kind")(config.classifier_dropout_prob)
        self.classifier = nn.Conv2d(width, config.num_labels, 1)
        self.merged = config.merged_decode
        nn.init.kaiming_normal_(self.linear_fuse.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, encoder_hidden_states: Sequence[Tensor]) -> Tensor:
        """Four (B, C, H, W) maps -> logits (B, K, H/4, W/4)."""
        maps = encoder_hidden_states
        if not (self.merged and self._as_built()):
            return self.classifier(self.dropout(F.relu(self.batch_norm(self._fuse_literal(maps)))))
        weights, bias = self._merge(maps[0].device.type)
        learning = torch.is_grad_enabled() or self.batch_norm.training or self.dropout.training
        kernel = usable(maps[0]) and 2 <= len(maps) <= 4
        if maps[0].device.type == "cpu" and not (kernel or learning or torch.compiler.is_compiling()):
            return self._decode_bands(maps, weights, bias)
        tokens = [x.permute(0, 2, 3, 1) for x in maps]
        rest = [F.linear(x, weight) for x, weight in zip(tokens[1:], weights[1:], strict=True)]
        parts = [F.linear(tokens[0], weights[0], bias), *rest]
        if not self.batch_norm.training:
            return self.classifier(self.dropout(_upsample_sum(parts, kernel, relu=True)))
        fused = _upsample_sum(parts, kernel, relu=False)
        return self.classifier(self.dropout(F.relu(self.batch_norm(fused), inplace=True)))

    def _as_built(self) -> bool:
        """Whether every part is of the class it was built from and nobody watches it."""
        projections = [(projection, (nn.Linear,)) for projection in self.linear_projections]
        parts = [
            *projections,
            (self.linear_fuse, (nn.Conv2d,)),
            (self.batch_norm, (nn.BatchNorm2d, nn.SyncBatchNorm)),
            (self.dropout, tuple(CLASSIFIER_DROPOUT.values())),
            (self.classifier, (nn.Conv2d,)),
        ]
        untouched = all(_plain(module, *kinds) for module, kinds in parts)
        return untouched and self.classifier.kernel_size == (1, 1) and self.batch_norm.running_mean is not None

    def _merge(self, device: str) -> tuple[list[Tensor], Tensor]:
        """A (D, C) projection for each stage and their common bias (D,), BatchNorm included in eval mode."""
        slices = self.linear_fuse.weight[:, :, 0, 0].chunk(len(self.linear_projections), dim=1)  # deepest stage first
        norm = self.batch_norm
        # a product of weights: no rounding to half precision (meta tensors have no autocast to switch off)
        with torch.autocast("cpu" if device == "meta" else device, enabled=False):
            weights, bias = [], torch.zeros_like(norm.bias)
            for slice_, projection in zip(reversed(slices), self.linear_projections, strict=True):
                assert isinstance(projection, nn.Linear)
                weights.append(slice_ @ projection.weight)
                bias = bias + slice_ @ projection.bias
            if not norm.training:
                assert norm.running_mean is not None and norm.running_var is not None
                scale = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
                weights = [scale[:, None] * weight for weight in weights]
                bias = scale * (bias - norm.running_mean) + norm.bias
        return weights, bias

    def _decode_bands(self, maps: Sequence[Tensor], weights: Sequence[Tensor], bias: Tensor) -> Tensor:
        """The merged form a band of rows at a time: the D-wide maps stay in a CPU's cache and are never whole."""
        first, *rest = (x.permute(0, 2, 3, 1) for x in maps)  # (B, H, W, C)
        rest = [F.linear(x, weight) for x, weight in zip(rest, weights[1:], strict=True)]
        batch, height, width, _ = first.shape
        vertical = [bilinear_matrix(x.shape[1], height, x.device, x.dtype) for x in rest]
        rows = band_rows(width * len(bias), first.device)
        bands = list(zip(*(row_bands(x.shape[1], height, rows) for x in (first, *rest)), strict=True))
        classifier, logits = self.classifier, []
        for image in range(batch):
            for (out, _), *sources in bands:
                band = F.linear(first[image, out], weights[0], bias)  # (R, W, D)
                for x, matrix, (_, source) in zip(rest, vertical, sources, strict=True):
                    band += upsample_band(x[image, source], matrix[out, source], width)
                logits.append(F.linear(band.relu_(), classifier.weight[:, :, 0, 0], classifier.bias))
        return torch.cat(logits).view(batch, height, width, -1).permute(0, 3, 1, 2)

    def _fuse_literal(self, maps: Sequence[Tensor]) -> Tensor:
        projected = [
            _resize(projection(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2), maps[0])
            for projection, x in zip(self.linear_projections, maps, strict=True)
        ]
        return self.linear_fuse(torch.cat(projected[::-1], dim=1))


class SegformerForSemanticSegmentation(SegformerPreTrainedModel):
    """Encoder and all-MLP decode head: (B, 3, H, W) -> logits (B, K, ceil(H/4), ceil(W/4))."""

    def __init__(self, config: SegformerConfig) -> None:
        super().__init__(config)
        self.segformer = SegformerModel(config)
        self.decode_head = SegformerDecodeHead(config)

    def forward(
        self,
        pixel_values: Tensor,
        labels: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> SemanticSegmenterOutput | tuple[Any, ...]:
        """pixel_values: (B, 3, H, W) float, normalised. labels: (B, H, W) class ids, 255 = ignore.

        The loss is transformers': cross-entropy at label size, averaged over the pixels that are not ignored; with one
        class, binary cross-entropy against 0 and 1, averaged over all pixels.
        """
        with_attentions, with_states = self._outputs(output_attentions, output_hidden_states)
        maps, attentions = self.segformer.features(pixel_values, with_attentions)
        logits = self.decode_head(maps)
        loss = None
        if labels is not None:
            score = pixel_cross_entropy if self.config.num_labels > 1 else binary_pixel_cross_entropy
            loss = score(logits, labels, ignore_index=self.config.semantic_loss_ignore_index)
        output = SemanticSegmenterOutput(loss, logits, self._states(maps) if with_states else None, attentions)
        return self._returned(output, return_dict)


class SegformerForImageClassification(SegformerPreTrainedModel):
    """Encoder and a linear layer on the mean of its last tokens: (B, 3, H, W) -> logits (B, K)."""

    def __init__(self, config: SegformerConfig) -> None:
        super().__init__(config)
        self.segformer = SegformerModel(config)
        self.classifier = nn.Linear(config.hidden_sizes[-1], config.num_labels)
        nn.init.trunc_normal_(self.classifier.weight, std=0.02)
        nn.init.zeros_(self.classifier.bias)

    def forward(
        self,
        pixel_values: Tensor,
        labels: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> ImageClassifierOutput | tuple[Any, ...]:
        """pixel_values: (B, 3, H, W) float, normalised. labels: (B,) class ids; (B, K) floats for several at once.

        `config.problem_type` says which loss; left out, one class means regression, integer labels one class of many.
        """
        with_attentions, with_states = self._outputs(output_attentions, output_hidden_states)
        maps, attentions = self.segformer.features(pixel_values, with_attentions)
        logits = self.classifier(maps[-1].flatten(2).mean(dim=2))
        loss = None if labels is None else classification_loss(logits, labels, self.config.problem_type)
        output = ImageClassifierOutput(loss, logits, self._states(maps) if with_states else None, attentions)
        return self._returned(output, return_dict)


def _check_pixels(pixels: Tensor, config: SegformerConfig) -> None:
    if pixels.ndim != 4 or pixels.shape[1] != config.num_channels:
        expected = f"(batch, {config.num_channels}, height, width)"
        raise UserError(f"pixel_values have shape {tuple(pixels.shape)}, expected {expected}")
    smallest = 1  # the grid of each stage must fill one window of its reduction
    for reduction, stride in zip(reversed(config.sr_ratios), reversed(config.strides), strict=True):
        smallest = (max(reduction, smallest) - 1) * stride + 1
    if pixels.shape[2] < smallest or pixels.shape[3] < smallest:
        found = " x ".join(map(str, pixels.shape[-2:]))
        raise UserError(f"image is {found} pixels, expected sides of at least {smallest}: resize it before the model")


def _plain(module: nn.Module, *kinds: type[nn.Module]) -> bool:
    """Whether a module is just what it was built as and nobody watches it: then what it does may be done elsewhere."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    own = "forward" in vars(module)  # put there by who wraps a module in place
    return type(module) in kinds and not own and not any(getattr(module, hook) for hook in hooks)


def _depthwise(conv: nn.Conv2d) -> bool:
    """Whether it is the Mix-FFN's convolution, not another one in its place."""
    found = conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.padding_mode, conv.bias is not None
    alike = found == ((3, 3), (1, 1), (1, 1), (1, 1), "zeros", True)
    return _plain(conv, nn.Conv2d) and alike and conv.groups == conv.in_channels == conv.out_channels


def _upsample_sum(parts: Sequence[Tensor], kernel: bool, relu: bool) -> Tensor:
    """(B, H, W, D) of each stage -> their sum at the first one's size, (B, D, H, W) channels-last; relu: at least 0."""
    if kernel:
        from segformer.kernels.upsample_sum import upsample_sum

        total: Tensor = upsample_sum(parts[0], list(parts[1:]), relu)
        return total.permute(0, 3, 1, 2)
    fused = parts[0].permute(0, 3, 1, 2)
    for part in parts[1:]:
        fused = _resize(part.permute(0, 3, 1, 2), fused).add_(fused)  # a resized map is nobody else's: added in place
    return F.relu(fused, inplace=True) if relu else fused


def _resize(x: Tensor, like: Tensor) -> Tensor:
    if x.shape[-2:] == like.shape[-2:]:
        return x
    return F.interpolate(x, size=like.shape[-2:], mode="bilinear", align_corners=False)


def _choice(table: Mapping[str, Any], config: SegformerConfig, name: str) -> Any:
    value = getattr(config, name)
    if value not in table:
        raise UserError(f"{name} is {value!r}{nearest(str(value), table)}: choose from {', '.join(table)}")
    return table[value]


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
