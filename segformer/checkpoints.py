"""Weights in and out: one rename table read in both directions, strict loading, safe files, atomic writes."""

import json
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import torch
from torch import Tensor, nn

from segformer.config import SegformerConfig
from segformer.errors import UserError

Weights = dict[str, Tensor]
_FILES = {".bin", ".ckpt", ".h5", ".pt", ".pth", ".safetensors"}
Model = TypeVar("Model", bound="Pretrained")

# ours -> Hugging Face's names on disk, the same in every version of transformers
RENAMES = (
    ("stages.{i}.patch_embeddings.", "encoder.patch_embeddings.{i}."),
    ("stages.{i}.blocks.{j}.layernorm_before.", "encoder.block.{i}.{j}.layer_norm_1."),
    ("stages.{i}.blocks.{j}.layernorm_after.", "encoder.block.{i}.{j}.layer_norm_2."),
    ("stages.{i}.blocks.{j}.attention.q_proj.", "encoder.block.{i}.{j}.attention.self.query."),
    ("stages.{i}.blocks.{j}.attention.k_proj.", "encoder.block.{i}.{j}.attention.self.key."),
    ("stages.{i}.blocks.{j}.attention.v_proj.", "encoder.block.{i}.{j}.attention.self.value."),
    ("stages.{i}.blocks.{j}.attention.o_proj.", "encoder.block.{i}.{j}.attention.output.dense."),
    ("stages.{i}.blocks.{j}.attention.sequence_reduction.", "encoder.block.{i}.{j}.attention.self.sr."),
    ("stages.{i}.blocks.{j}.attention.layer_norm.", "encoder.block.{i}.{j}.attention.self.layer_norm."),
    ("stages.{i}.blocks.{j}.mlp.fc1.", "encoder.block.{i}.{j}.mlp.dense1."),
    ("stages.{i}.blocks.{j}.mlp.dwconv.", "encoder.block.{i}.{j}.mlp.dwconv.dwconv."),
    ("stages.{i}.blocks.{j}.mlp.fc2.", "encoder.block.{i}.{j}.mlp.dense2."),
    ("stages.{i}.layer_norm.", "encoder.layer_norm.{i}."),
    ("decode_head.linear_projections.{i}.", "decode_head.linear_c.{i}.proj."),
)


class Pretrained(nn.Module):
    """`from_pretrained` and `save_pretrained` with transformers' folders: `config.json` and `model.safetensors`."""

    config: SegformerConfig

    def __init__(self, config: SegformerConfig) -> None:
        super().__init__()
        self.config = config

    @classmethod
    def from_pretrained(cls: type[Model], source: str | os.PathLike[str], **overrides: Any) -> Model:
        """A model in eval mode from a folder, a training checkpoint (`.ckpt`) or a hub id.

        overrides replace fields of the stored configuration. Strict: every tensor of the model must be in the file
        with its shape; only a head that this class does not have is left aside.

        Raises:
            UserError: nothing there, another architecture, or tensors missing, left over or of another shape.
        """
        weights, values = read(source)
        if values is None:
            raise UserError(f"{source} holds weights but no config.json, expected both: put them into one folder")
        model = cls(SegformerConfig.from_dict(values, **overrides))
        load(model, _for_class(weights, model), str(source))
        return model.eval()

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Writes `config.json` and `model.safetensors` under Hugging Face's names; transformers loads the folder."""
        from safetensors.torch import save

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        values = {**self.config.to_dict(), "architectures": [type(self).__name__]}
        text = json.dumps(values, indent=2, sort_keys=True) + "\n"
        write_atomically(folder / "config.json", lambda file: file.write(text.encode()))
        # metadata: transformers refuses files that do not say which framework wrote them
        tensors = save(to_disk(self.state_dict()), metadata={"format": "pt"})
        write_atomically(folder / "model.safetensors", lambda file: file.write(tensors))


def read(source: str | os.PathLike[str]) -> tuple[Weights, dict[str, Any] | None]:
    """Weights under our names and, where the source carries one, the content of its `config.json`.

    source: a folder (`model.safetensors` or `pytorch_model.bin`), a `.ckpt` of ours, or a hub id `owner/name`.
    Files are read as safetensors or with `weights_only=True`: nothing in them can run.
    """
    path = Path(source)
    if not path.exists():
        path = _download(str(source))
    if path.is_file():
        return _read_training_checkpoint(path)
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (path / name).is_file():
            weights = from_disk(_read_tensors(path / name))
            break
    else:
        raise UserError(f"no weights in {path}: expected model.safetensors or pytorch_model.bin beside config.json")
    config = path / "config.json"
    try:
        return weights, json.loads(config.read_text(encoding="utf-8")) if config.is_file() else None
    except json.JSONDecodeError as error:
        raise UserError(f"{config} is not valid JSON: {error}") from error


def start_from(model: Pretrained, source: str | os.PathLike[str]) -> str:
    """Loads pretrained weights for training and says what was taken.

    The encoder must fit whole. The decode head is taken when it fits too (a checkpoint of the same classes) and
    otherwise stays as initialised: fine-tuning on other classes is the usual case.
    """
    weights, _ = read(source)
    own = model.state_dict()
    if not any(name.startswith("segformer.") for name in weights):  # a bare encoder
        weights = {f"segformer.{name}": tensor for name, tensor in weights.items()}
    encoder = {name: tensor for name, tensor in weights.items() if name.startswith("segformer.")}
    head = {name: tensor for name, tensor in weights.items() if name.startswith("decode_head.")}
    fresh = {name: tensor for name, tensor in own.items() if name.startswith("decode_head.")}
    head_fits = {name: tensor.shape for name, tensor in head.items()} == {n: t.shape for n, t in fresh.items()}
    load(model, {**(head if head_fits else fresh), **encoder}, str(source))
    if head_fits:
        return f"loaded encoder and decode head from {source}"
    why = "the checkpoint has none"
    if "decode_head.classifier.weight" in head:
        found, wanted = (len(side["decode_head.classifier.weight"]) for side in (head, own))
        why = f"the checkpoint has {found} classes, the data {wanted}" if found != wanted else "its width differs"
    return f"loaded the encoder from {source}; the decode head starts fresh ({why})"


def load(model: nn.Module, weights: Mapping[str, Tensor], source: str) -> None:
    """Strict `load_state_dict` whose error is a sentence."""
    own = model.state_dict()
    missing, extra = sorted(own.keys() - weights.keys()), sorted(weights.keys() - own.keys())
    for kind, names in (("lacks", missing), ("has the unknown", extra)):
        if names:
            raise UserError(
                f"{source} {kind} {len(names)} tensor(s), first {names[0]!r}: not a checkpoint of this model"
            )
    for name, tensor in weights.items():
        if tensor.shape != own[name].shape:
            found, expected = tuple(tensor.shape), tuple(own[name].shape)
            if name.startswith(("decode_head.classifier.", "classifier.")):
                raise UserError(f"decode head: {source} has {found[0]} classes, the model has {expected[0]}")
            raise UserError(f"{name} in {source} has shape {found}, the model expects {expected}: another variant?")
    model.load_state_dict(dict(weights))


def to_disk(weights: Mapping[str, Tensor]) -> Weights:
    """Our names -> Hugging Face's on disk; the fused key/value rows are split."""
    split: Weights = {}
    for name, tensor in weights.items():
        if ".kv_proj." in name:
            key, value = tensor.chunk(2)
            split[name.replace(".kv_proj.", ".k_proj.")] = key
            split[name.replace(".kv_proj.", ".v_proj.")] = value
        else:
            split[name] = tensor
    return {_rename(name, _TO_DISK): tensor.detach().cpu().contiguous() for name, tensor in split.items()}


def from_disk(weights: Mapping[str, Tensor]) -> Weights:
    """Hugging Face's names on disk -> ours; key and value are fused."""
    named = {_rename(name, _FROM_DISK): tensor for name, tensor in weights.items()}
    fused: Weights = {}
    for name, tensor in named.items():
        if ".k_proj." in name:
            partner = named.get(name.replace(".k_proj.", ".v_proj."))
            if partner is None:
                raise UserError(f"checkpoint has {name} without its value projection: the file is incomplete")
            fused[name.replace(".k_proj.", ".kv_proj.")] = torch.cat([tensor, partner])
        elif ".v_proj." not in name:
            fused[name] = tensor
    return fused


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Writes a file that is either whole or as it was: temporary file beside it, flush, fsync, replace."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """The content of a training checkpoint of ours; `weights_only`, so nothing in the file can run."""
    if not path.is_file():
        raise UserError(f"no checkpoint at {path}: give the path of a best.ckpt or last.ckpt")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises a dozen types here: truncated zip, foreign pickle, not a zip at all
        raise UserError(f"cannot read checkpoint {path}: {str(error).splitlines()[0]}") from error
    found = checkpoint.get("hyper_parameters") if isinstance(checkpoint, dict) else None
    if not isinstance(found, dict) or not {"model", "config"} <= found.keys():
        raise UserError(f"{path} is not a checkpoint of this project: train.py writes best.ckpt and last.ckpt")
    return checkpoint


def training_config(source: str | os.PathLike[str], needed: bool) -> dict[str, Any]:
    """The configuration a `.ckpt` was trained with; of any other source nothing, an error where it is needed."""
    if not Path(source).is_file():
        if needed:
            raise UserError(
                f"no checkpoint file at {source}: give the path of a best.ckpt or last.ckpt, or add data=NAME to "
                "score a folder or hub id"
            )
        return {}
    config: dict[str, Any] = load_checkpoint(Path(source))["hyper_parameters"]["config"]
    if needed and any("_target_" in config["data"][split] for split in ("train", "val")):
        raise UserError(
            f"{source} was trained on a source class of your own, which a checkpoint may not start: add data=NAME"
        )
    return config


def absolute(source: str) -> str:
    """A local path made absolute; a hub id as it is."""
    return os.path.abspath(os.path.expanduser(source)) if os.path.exists(os.path.expanduser(source)) else source


def model_name(source: str | os.PathLike[str], trained: Mapping[str, Any]) -> str:
    """What to call a model in a report: its choice (b0) where it was trained here, else the last part of its source."""
    return str(trained["choices"]["model"]) if trained else Path(source).name


def _read_training_checkpoint(path: Path) -> tuple[Weights, dict[str, Any]]:
    checkpoint = load_checkpoint(path)
    prefix = "model."  # the attribute of the LightningModule that holds the network
    weights = {k.removeprefix(prefix): v for k, v in checkpoint["state_dict"].items() if k.startswith(prefix)}
    return weights, checkpoint["hyper_parameters"]["model"]


def _read_tensors(path: Path) -> Weights:
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # safetensors and torch raise types of their own for each kind of damage
        raise UserError(f"cannot read weights {path}: {str(error).splitlines()[0]}") from error


def _download(repository: str) -> Path:
    if repository.count("/") != 1 or repository.startswith((".", "/", "~")) or Path(repository).suffix in _FILES:
        raise UserError(f"no checkpoint at {repository}: expected a folder, a .ckpt file or a hub id owner/name")
    from huggingface_hub import snapshot_download

    wanted = ["config.json", "model.safetensors", "pytorch_model.bin"]
    try:
        return Path(snapshot_download(repository, allow_patterns=wanted))
    except Exception as error:  # offline, unknown repository, no access, no space: each a type of its own
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"cannot fetch {repository} from the hub ({reason}): pass a local folder instead") from error


def _for_class(weights: Weights, model: nn.Module) -> Weights:
    """Adds or strips the `segformer.` prefix and leaves aside heads that the model does not have."""
    whole = any(name.startswith("segformer.") for name in weights)
    if hasattr(model, "segformer"):
        return weights if whole else {f"segformer.{name}": tensor for name, tensor in weights.items()}
    prefix = "segformer." if whole else ""
    return {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}


def _compile(pairs: list[tuple[str, str]]) -> list[tuple[re.Pattern[str], str]]:
    rules = []
    for found, wanted in pairs:
        pattern = re.escape(found).replace(r"\{i\}", r"(?P<i>\d+)").replace(r"\{j\}", r"(?P<j>\d+)")
        rules.append((re.compile(rf"(?:^|(?<=\.)){pattern}"), wanted.replace("{i}", r"\g<i>").replace("{j}", r"\g<j>")))
    return rules


_TO_DISK = _compile(list(RENAMES))
_FROM_DISK = _compile([(disk, ours) for ours, disk in RENAMES])


def _rename(name: str, rules: list[tuple[re.Pattern[str], str]]) -> str:
    for pattern, wanted in rules:
        renamed, count = pattern.subn(wanted, name, count=1)
        if count:
            return renamed
    return name
