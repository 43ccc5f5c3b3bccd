"""What every library calls SegFormer's tensors: one table, read in both directions. Functions of names and tensors.

Weights under our names are complete here: the encoder bears `segformer.` in whole models and in bare encoders alike.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cache, reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor

from segformer.config import VARIANTS, SegformerConfig
from segformer.errors import UserError

Weights = dict[str, Tensor]

# how a sentence calls the columns of the table
NAMINGS = {
    "ours": "this project",
    "hf": "Hugging Face's files",
    "memory": "transformers >= 5.9 in memory",
    "nvlabs": "NVlabs",
    "mmseg": "mmsegmentation",
}
WRAPPERS = ("state_dict", "model", "model_state_dict")  # keys a training script puts weights under
PREFIXES = ("module.", "model.", "net.", "_orig_mod.")  # DistributedDataParallel, LightningModules, torch.compile
HEADS = ("decode_head.", "classifier.")
CONV_SEG = ("decode_head.conv_seg.weight", "decode_head.conv_seg.bias")
PUBLISHED_HEADS = [1, 2, 5, 8]  # attention heads of all six variants
STEM = "segformer.stages.0.patch_embeddings.proj.weight"


class Row(NamedTuple):
    """A family of tensors; None where a library has no such tensor. Our names come from `model.py`."""

    ours: str
    hf: str
    memory: str
    nvlabs: str
    mmseg: str | None = None


def _block(*names: str) -> Row:
    blocks = ("stages.{i}.blocks.{j}.", "encoder.block.{i}.{j}.", "stages.{i}.blocks.{j}.", "block{n}.{j}.")
    return Row(*(block + name for block, name in zip((*blocks, "layers.{i}.1.{j}."), names, strict=True)))


# {i} stage from 0, {n} stage from 1, {j} block. Where rows share a name in one column, that library's tensor is their
# tensors stacked in this order; only Hugging Face's files name each apart.
# Sources: transformers' conversion_mapping, NVlabs' mix_transformer and segformer_head, mmsegmentation's mit backbone.
# fmt: off
TABLE = (
    Row("stages.{i}.patch_embeddings.proj.", "encoder.patch_embeddings.{i}.proj.",
        "stages.{i}.patch_embeddings.proj.", "patch_embed{n}.proj.", "layers.{i}.0.projection."),
    Row("stages.{i}.patch_embeddings.layer_norm.", "encoder.patch_embeddings.{i}.layer_norm.",
        "stages.{i}.patch_embeddings.layer_norm.", "patch_embed{n}.norm.", "layers.{i}.0.norm."),
    _block("layernorm_before.", "layer_norm_1.", "layernorm_before.", "norm1.", "norm1."),
    _block("attention.q_proj.", "attention.self.query.", "attention.q_proj.", "attn.q.", "attn.attn.in_proj_"),
    _block("attention.kv_proj.", "attention.self.key.", "attention.k_proj.", "attn.kv.", "attn.attn.in_proj_"),
    _block("attention.kv_proj.", "attention.self.value.", "attention.v_proj.", "attn.kv.", "attn.attn.in_proj_"),
    _block("attention.sequence_reduction.", "attention.self.sr.",
           "attention.sequence_reduction.sequence_reduction.", "attn.sr.", "attn.sr."),
    _block("attention.layer_norm.", "attention.self.layer_norm.",
           "attention.sequence_reduction.layer_norm.", "attn.norm.", "attn.norm."),
    _block("attention.o_proj.", "attention.output.dense.", "attention.o_proj.", "attn.proj.", "attn.attn.out_proj."),
    _block("layernorm_after.", "layer_norm_2.", "layernorm_after.", "norm2.", "norm2."),
    _block("mlp.fc1.", "mlp.dense1.", "mlp.fc1.", "mlp.fc1.", "ffn.layers.0."),
    _block("mlp.dwconv.", "mlp.dwconv.dwconv.", "mlp.dwconv.dwconv.", "mlp.dwconv.dwconv.", "ffn.layers.1."),
    _block("mlp.fc2.", "mlp.dense2.", "mlp.fc2.", "mlp.fc2.", "ffn.layers.4."),
    Row("stages.{i}.layer_norm.", "encoder.layer_norm.{i}.", "stages.{i}.layer_norm.", "norm{n}.", "layers.{i}.2."),
    Row("decode_head.linear_projections.{i}.", "decode_head.linear_c.{i}.proj.",
        "decode_head.linear_projections.{i}.proj.", "decode_head.linear_c{n}.proj."),
    Row("decode_head.linear_fuse.", "decode_head.linear_fuse.", "decode_head.linear_fuse.",
        "decode_head.linear_fuse.conv."),
    Row("decode_head.batch_norm.", "decode_head.batch_norm.", "decode_head.batch_norm.",
        "decode_head.linear_fuse.bn."),
    Row("decode_head.classifier.", "decode_head.classifier.", "decode_head.classifier.", "decode_head.linear_pred."),
    Row("classifier.", "classifier.", "classifier.", "head."),
)
# fmt: on
_LEAVES = "weight|bias|running_mean|running_var|num_batches_tracked"


class Place(NamedTuple):
    """Where a tensor belongs: the rows it holds (several when stacked), stage and block from 0, and `weight` or so."""

    rows: tuple[Row, ...]
    stage: int
    block: int
    leaf: str


def recognise(names: Iterable[str]) -> str | None:
    """The naming that knows most of `names`, if it knows any of an encoder."""
    names = list(names)
    known = {naming: [place for name in names if (place := _place(name, naming))] for naming in NAMINGS}
    best = max(NAMINGS, key=lambda naming: len(known[naming]))
    return best if any(not place.rows[0].ours.startswith(HEADS) for place in known[best]) else None


def unwrap(content: Any) -> tuple[Weights, list[str]]:
    """The tensors of an unpickled file without wrapping keys and prefixes, and sentences about what was left aside."""
    while isinstance(content, Mapping):
        inner = next((content[key] for key in WRAPPERS if isinstance(content.get(key), Mapping)), None)
        if inner is None:
            break
        content = inner
    if not isinstance(content, Mapping):
        raise UserError(f"found a {type(content).__name__} instead of a dict of tensors")
    weights = {str(name): tensor for name, tensor in content.items() if isinstance(tensor, Tensor)}
    if not weights:
        keys = ", ".join(repr(key) for key in list(content)[:5])
        raise UserError(f"no tensors under {', '.join(WRAPPERS)}; found the keys {keys or 'none'}: save the state dict")
    stripped = _strip(weights)
    if stripped is None:
        raise UserError(
            f"{len(weights)} tensors, first {min(weights)!r}: not the names of a SegFormer in any library known here"
        )
    count = len(weights) - len(stripped)
    return stripped, [f"left aside {count} tensor(s) beside the network's"] if count else []


def to_ours(weights: Mapping[str, Tensor]) -> tuple[Weights, str, list[str]]:
    """Weights of any naming under our names, the naming they had, and sentences about what was dropped.

    Unknown names stay as they are for strict loading to refuse, mmsegmentation's decode head among them.

    Raises:
        UserError: no encoder of a naming known here, or half of what has to be stacked is missing.
    """
    naming = recognise(weights)
    if naming is None:
        raise UserError("these are not the names of a SegFormer in any library known here")
    notes = []
    if naming == "nvlabs" and not weights.keys().isdisjoint(CONV_SEG):
        weights = {name: tensor for name, tensor in weights.items() if name not in CONV_SEG}
        notes.append("dropped decode_head.conv_seg: never used in the forward pass")
    return _convert(weights, naming, "ours", "segformer."), naming, notes


def from_ours(weights: Mapping[str, Tensor], naming: str) -> tuple[Weights, list[str]]:
    """Our names (with or without `segformer.`, as a model has them) -> "hf" or "nvlabs", and what had to be made up.

    As in NVlabs' files, the encoder bears `backbone.` only beside a decode head.
    """
    if naming == "hf":
        whole = any(name.startswith("segformer.") for name in weights)
        return _convert(weights, "ours", "hf", "segformer." if whole else ""), []
    head = weights.get("decode_head.classifier.weight")
    renamed = _convert(weights, "ours", "nvlabs", "" if head is None else "backbone.")
    if head is None:
        return renamed, []
    # the unused classifier of mmseg's base class, as that class initialises it: (K, 128, 1, 1) and (K)
    generator = torch.Generator().manual_seed(0)
    unused = (torch.randn(len(head), 128, 1, 1, generator=generator) * 0.01, torch.zeros(len(head)))
    made = {name: tensor.to(head.dtype) for name, tensor in zip(CONV_SEG, unused, strict=True)}
    return renamed | made, ["filled decode_head.conv_seg from a fixed seed: the original has it and never uses it"]


def from_tensorflow(arrays: Mapping[str, Tensor]) -> Weights:
    """Data sets of a `tf_model.h5` -> Hugging Face's names and PyTorch's layouts.

    Names are `main layer/model scope/main layer/.../kernel:0`. Dense kernels (in, out) are transposed; convolution
    kernels go from (h, w, in, out) to (out, in, h, w), depth-wise ones (3, 3, 1, C) included.
    Source: the TensorFlow classes and loader of transformers 4.57; tried on that layout, not on a published file.
    """
    leaves = {"kernel": "weight", "gamma": "weight", "beta": "bias"}
    leaves |= {"moving_mean": "running_mean", "moving_variance": "running_var"}
    weights = {}
    for path, array in arrays.items():
        *parts, leaf = path.removesuffix(":0").split("/")
        start = next((k for k, part in enumerate(parts) if k and f"{part}." in (*HEADS, "segformer.")), 0)
        name = ".".join(parts[start:])
        if leaf == "kernel":
            array = array.permute(3, 2, 0, 1) if array.ndim == 4 else array.T  # noqa: PLW2901
        weights[f"{name}.{leaves.get(leaf, leaf)}"] = array.contiguous()
        if leaf == "moving_mean":
            weights[f"{name}.num_batches_tracked"] = torch.tensor(0)
    return weights


def sizes(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """Every field of the configuration that shapes tell, from weights under our names."""
    stages: list[dict[str, Any]] = []
    while f"segformer.stages.{len(stages)}.patch_embeddings.proj.weight" in weights:
        stages.append(_stage_sizes(weights, len(stages)))
    if not stages:
        raise UserError(f"the checkpoint lacks {STEM}: the file is incomplete")
    found: dict[str, Any] = {key: [stage[key] for stage in stages] for key in stages[0]}
    found |= {"num_encoder_blocks": len(stages), "num_channels": weights[STEM].shape[1]}
    if "decode_head.linear_fuse.weight" in weights:
        found["decoder_hidden_size"] = len(weights["decode_head.linear_fuse.weight"])
    for name in ("classifier.weight", "decode_head.classifier.weight"):
        if name in weights:
            found["num_labels"] = len(weights[name])
    return found


def infer_config(weights: Mapping[str, Tensor], names: Sequence[str] | None = None) -> SegformerConfig:
    """The configuration of weights that came without one.

    names: the classes, used where their count fits. Strides are not in the shapes and taken as published (4, 2, 2, 2);
    attention heads and a missing head's decoder width come from the variant of the same sizes.

    Raises:
        UserError: no published variant has these sizes.
    """
    found = sizes(weights)
    same = [row for row in VARIANTS.values() if row["hidden_sizes"] == found["hidden_sizes"]]
    if not same:
        raise UserError(
            f"hidden sizes {found['hidden_sizes']} are no published variant's, so the number of attention heads is "
            "unknown: put config.json beside it"
        )
    row = next((row for row in same if row["depths"] == found["depths"]), {})
    if names and len(names) == found.get("num_labels"):
        found["id2label"] = dict(enumerate(names))
    return SegformerConfig(**{**row, **found, "num_attention_heads": PUBLISHED_HEADS})


def fits(values: Mapping[str, Any], weights: Mapping[str, Tensor]) -> bool:
    """Whether the content of a config.json agrees with all that the shapes tell."""
    try:
        config = SegformerConfig.from_dict(values)
    except UserError:
        return False
    return all(getattr(config, key) == value for key, value in sizes(weights).items())


def adapt_stem(weights: Weights, bands: int) -> list[str]:
    """Replaces the RGB kernels (C, 3, k, k) of the stem in `weights` by (C, bands, k, k) and says so.

    One band: their sum, so that a grey image gives what the same image gives as three equal bands. More: the three in
    turn, times 3 / bands, which keeps the scale of the activations.
    """
    kernels = weights.get(STEM)
    if kernels is None or kernels.shape[1] != 3 or bands == 3:
        return []
    if bands == 1:
        weights[STEM] = kernels.sum(1, keepdim=True)
        return ["the stem's RGB kernels were summed for one band"]
    weights[STEM] = kernels[:, torch.arange(bands) % 3] * (3 / bands)
    return [f"the stem's RGB kernels were repeated over {bands} bands and scaled by 3/{bands}"]


def common_dtype(wanted: str | torch.dtype | None, weights: Weights) -> torch.dtype:
    """The type that a caller asked for; "auto": the widest among the weights, so that nothing is rounded."""
    if wanted == "auto":
        kinds = [tensor.dtype for tensor in weights.values() if tensor.is_floating_point()]
        return reduce(torch.promote_types, kinds)
    found = torch.float32 if wanted is None else getattr(torch, str(wanted).removeprefix("torch."), None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise UserError(f"dtype is {wanted!r}, expected 'auto' or a type of torch such as 'float16'")
    return found


def misshapen(name: str, found: tuple[int, ...], expected: tuple[int, ...], source: str) -> str:
    """The sentence for a tensor of another shape; it names the way out where there is one."""
    if name.startswith(("decode_head.classifier.", "classifier.")):
        part = "decode head" if name.startswith("decode_head.") else "classifier"
        return (
            f"{part}: {source} has {found[0]} classes, the model has {expected[0]}; to start a fresh classifier pass "
            "ignore_mismatched_sizes=True to from_pretrained"
        )
    if name in (STEM, STEM.removeprefix("segformer.")) and len(found) == 4 and found[1] == 3:
        return (
            f"stem: {source} has 3 bands, the model has {expected[1]}; to adapt its kernels pass "
            "ignore_mismatched_sizes=True to from_pretrained"
        )
    return f"{name} in {source} has shape {found}, the model expects {expected}: another variant?"


def under(weights: Mapping[str, Tensor], prefix: str) -> Weights:
    return {name: tensor for name, tensor in weights.items() if name.startswith(prefix)}


def has_mmseg_head(weights: Mapping[str, Tensor]) -> bool:
    return any(name.startswith(("decode_head.convs.", "decode_head.fusion_conv.")) for name in weights)


def _stage_sizes(weights: Mapping[str, Tensor], stage: int) -> dict[str, Any]:
    prefix = f"segformer.stages.{stage}."
    width, _, _, patch = weights[f"{prefix}patch_embeddings.proj.weight"].shape
    blocks = {name.split(".")[4] for name in weights if name.startswith(f"{prefix}blocks.")}
    reduction = weights.get(f"{prefix}blocks.0.attention.sequence_reduction.weight")
    hidden = len(weights.get(f"{prefix}blocks.0.mlp.fc1.bias", ())) or 4 * width
    return {
        "hidden_sizes": width,
        "depths": len(blocks),
        "patch_sizes": patch,
        "sr_ratios": 1 if reduction is None else reduction.shape[-1],
        "mlp_ratios": hidden / width if hidden % width else hidden // width,
    }


def _strip(weights: Weights) -> Weights | None:
    """Without prefixes, in any nesting; None where no encoder comes to light."""
    if recognise(weights) is not None:
        return weights
    for prefix in PREFIXES:
        inner = {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}
        stripped = _strip(inner) if inner else None
        if stripped is not None:
            return stripped
    return None


def _convert(weights: Mapping[str, Tensor], found: str, wanted: str, encoder: str) -> Weights:
    """One naming to another; encoder: the prefix its names get. Unknown names stay as they are."""
    converted: Weights = {}
    stacks: dict[str, dict[Row, tuple[str, Tensor]]] = {}  # new name -> its rows -> (old name, tensor)
    for name, tensor in weights.items():
        place = _place(name, found)
        if place is None:
            converted[name] = tensor
            continue
        for row, piece in zip(place.rows, _split(name, tensor, len(place.rows)), strict=True):
            flat = piece.flatten(1) if ".mlp.fc" in row.ours and piece.ndim == 4 else piece  # mmseg's 1x1 convolutions
            stack = stacks.setdefault(_name(row, wanted, place, encoder), {})
            if row in stack:
                raise UserError(f"{stack[row][0]} and {name} are both there: the file holds two networks")
            stack[row] = name, flat
    for name, stack in stacks.items():
        rows = _columns(wanted)[getattr(next(iter(stack)), wanted)]
        for row in rows:
            if row not in stack:
                known, part = next(iter(stack.values()))[0], row.hf.split(".")[-2]
                raise UserError(f"checkpoint has {known} without its {part} projection: the file is incomplete")
        converted[name] = torch.cat([stack[row][1] for row in rows]) if len(rows) > 1 else stack[rows[0]][1]
    return converted


def _split(name: str, tensor: Tensor, count: int) -> Sequence[Tensor]:
    if count == 1:
        return (tensor,)
    if tensor.ndim == 0 or len(tensor) % count:
        raise UserError(f"{name} has shape {tuple(tensor.shape)}, expected {count} projections of one size stacked")
    return tensor.chunk(count)


def _name(row: Row, naming: str, place: Place, encoder: str) -> str:
    template: str = getattr(row, naming)
    prefix = "" if row.ours.startswith(HEADS) else encoder
    return prefix + template.format(i=place.stage, n=place.stage + 1, j=place.block) + place.leaf


@cache
def _columns(naming: str) -> dict[str, tuple[Row, ...]]:
    """Template -> the rows that it holds, in the order they are stacked."""
    rows: dict[str, tuple[Row, ...]] = {}
    for row in TABLE:
        template = getattr(row, naming)
        if template is not None:
            rows[template] = (*rows.get(template, ()), row)
    return rows


@cache
def _patterns(naming: str) -> list[tuple[re.Pattern[str], tuple[Row, ...]]]:
    prefix = "backbone." if naming in ("nvlabs", "mmseg") else "segformer."
    patterns = []
    for template, rows in _columns(naming).items():
        pattern = re.sub(r"\\{(\w)\\}", r"(?P<\1>\\d+)", re.escape(template))
        encoder = "" if rows[0].ours.startswith(HEADS) else f"(?:{re.escape(prefix)})?"
        patterns.append((re.compile(f"{encoder}{pattern}(?P<leaf>{_LEAVES})"), rows))
    return patterns


def _place(name: str, naming: str) -> Place | None:
    for pattern, rows in _patterns(naming):
        match = pattern.fullmatch(name)
        if match:
            spot = match.groupdict()
            stage = int(spot["n"]) - 1 if "n" in spot else int(spot.get("i", 0))
            return Place(rows, stage, int(spot.get("j", 0)), spot["leaf"])
    return None
