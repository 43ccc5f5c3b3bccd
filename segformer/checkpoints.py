"""Weights in and out, in every naming: strict loading, safe files, atomic writes."""

import os
import pickle
import re
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from segformer.config import SegformerConfig
from segformer.errors import UserError
from segformer.files import locate, read_json, reason, write_atomically, write_json
from segformer.launch import process
from segformer.namings import (
    HEADS,
    Weights,
    adapt_stem,
    common_dtype,
    fits,
    from_ours,
    from_tensorflow,
    has_mmseg_head,
    infer_config,
    misshapen,
    recognise,
    to_ours,
    under,
    unwrap,
)

Model = TypeVar("Model", bound="Pretrained")

WEIGHTS_LICENSE = (
    "These weights are, or were trained from, weights that NVIDIA publishes under its own licence, which restricts "
    "commercial use: read it at https://github.com/NVlabs/SegFormer/blob/master/LICENSE"
)
_WEIGHTS = ("model.safetensors", "pytorch_model.bin", "tf_model.h5")  # in a folder or hub repository; the first counts
# keywords of transformers' from_pretrained beside those in the signature: what the download is given, what changes
# nothing here, and what is refused unless it is off. All others are fields of the configuration.
_HUB = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "token")
_IGNORED = ("attn_implementation", "low_cpu_mem_usage", "trust_remote_code", "use_safetensors")
_REFUSED = {
    "device_map": "call .to(device) on the model",
    "output_loading_info": "loading is strict, warnings say the rest",
    "subfolder": "pass the folder itself",
    "variant": "pass the file itself",
    "quantization_config": "weights are loaded as they are",
    "load_in_8bit": "weights are loaded as they are",
    "load_in_4bit": "weights are loaded as they are",
    "gguf_file": "convert it to safetensors first",
}


class Pretrained(nn.Module):
    """`from_pretrained` and `save_pretrained` with transformers' folders: `config.json` and `model.safetensors`."""

    config: SegformerConfig

    def __init__(self, config: SegformerConfig) -> None:
        super().__init__()
        self.config = config

    @classmethod
    def from_pretrained(
        cls: type[Model],
        source: str | os.PathLike[str],
        *,
        config: SegformerConfig | str | os.PathLike[str] | None = None,
        ignore_mismatched_sizes: bool = False,
        dtype: str | torch.dtype | None = None,
        torch_dtype: str | torch.dtype | None = None,
        weights_only: bool = True,
        allow_pickle: bool = False,
        **overrides: Any,
    ) -> Model:
        """A model in eval mode from a folder, a file in any naming (`read` has the list) or a hub id.

        config: instead of the stored one. overrides: fields of the configuration to replace, and transformers' own
        keywords (`_HUB`, `_IGNORED`). Strict: every tensor of the model must be in the file with its shape. Two
        exceptions, each told in a warning: a head that is absent as a whole starts fresh, and with
        ignore_mismatched_sizes so does a classifier of other classes, and an RGB stem is adapted to other bands.
        dtype: "float16" or so; "auto" = the file's; None = float32. allow_pickle (or transformers' keyword
        weights_only=False, which asks the same): reads files that hold more than tensors and so can run any code; off
        unless the caller trusts the file's origin and says so.

        Raises:
            UserError: nothing there, another architecture, or tensors missing, left over or of another shape.
        """
        hub = {key: overrides.pop(key) for key in _HUB if key in overrides}
        for key in _IGNORED:
            overrides.pop(key, None)
        for key, instead in _REFUSED.items():
            if overrides.pop(key, None):
                raise UserError(f"from_pretrained does not take {key}: {instead}")
        checkpoint = read(source, allow_pickle or not weights_only, hub)
        if config is not None:
            given = config if isinstance(config, SegformerConfig) else SegformerConfig.from_pretrained(config)
            checkpoint.config = given.to_dict()
        return cls.from_checkpoint(checkpoint, ignore_mismatched_sizes, dtype or torch_dtype, **overrides)

    @classmethod
    def from_config(cls: type[Model], config: SegformerConfig) -> Model:
        """A model with fresh weights."""
        return cls(config)

    @classmethod
    def from_checkpoint(
        cls: type[Model],
        checkpoint: "Checkpoint",
        ignore_mismatched_sizes: bool = False,
        dtype: str | torch.dtype | None = None,
        **overrides: Any,
    ) -> Model:
        """As `from_pretrained`, of what `read` gave."""
        model = cls(checkpoint.configuration(**overrides)).to(common_dtype(dtype, checkpoint.weights))
        weights, notes = _completed(checkpoint, model, ignore_mismatched_sizes)
        load(model, weights, checkpoint.source)
        for note in notes:
            warnings.warn(f"{checkpoint.source}: {note}", stacklevel=3)
        if hasattr(model, "decode_head"):  # False in old ImageNet folders: no decode head can use flattened tokens
            model.config.reshape_last_stage = True
        return model.eval()

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As of any module; names of the other libraries are understood too."""
        if state_dict.keys() - self.state_dict().keys() and recognise(state_dict) not in (None, "ours"):
            whole = hasattr(self, "segformer")
            ours = to_ours(state_dict)[0]
            state_dict = ours if whole else {name.removeprefix("segformer."): ours[name] for name in ours}
        return super().load_state_dict(state_dict, strict, assign)

    def save_pretrained(self, folder: str | os.PathLike[str], safe_serialization: bool = True) -> None:
        """Writes `config.json` and `model.safetensors` under Hugging Face's names; transformers loads the folder.

        Weights that came under a licence of their own take a `NOTICE` along.
        """
        from safetensors.torch import save

        if not safe_serialization:
            raise UserError("safe_serialization is False, expected True: weights are written as safetensors only")

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        dtype = str(next(self.parameters()).dtype).removeprefix("torch.")  # what transformers loads the weights as
        values = {**self.config.to_dict(), "architectures": [type(self).__name__], "dtype": dtype}
        values.pop("torch_dtype", None)  # its former name, of the file these weights came from
        write_json(folder / "config.json", values)
        # metadata: transformers refuses files that do not say which framework wrote them
        tensors = save(to_disk(self.state_dict()), metadata={"format": "pt"})
        write_atomically(folder / "model.safetensors", lambda file: file.write(tensors))
        notice, path = getattr(self.config, "weights_license", None), folder / "NOTICE"
        present = path.read_text(encoding="utf-8") if path.is_file() else ""
        if notice and notice not in present:
            write_atomically(path, lambda file: file.write(f"{present}{notice}\n".encode()))


@dataclass
class Checkpoint:
    """What a source holds: weights under our names, and what is known about them."""

    source: str
    weights: Weights
    naming: str  # a key of namings.NAMINGS: what the names were
    tensors: int  # how many there were
    notes: list[str]  # what was dropped, a sentence each
    config: dict[str, Any] | None  # the content of config.json, where it fits
    training: Mapping[str, Any]  # the configuration of the run of ours that wrote it
    classes: Sequence[str] | None  # names that came without a configuration
    license: str | None

    def configuration(self, **overrides: Any) -> SegformerConfig:
        """The stored configuration, or else what the shapes tell, with fields replaced."""
        try:
            values = self.config or infer_config(self.weights, self.classes).to_dict()
        except UserError as error:
            raise UserError(f"{self.source}: {error}") from error
        config = SegformerConfig.from_dict(values, **overrides)
        if self.license:
            config.weights_license = self.license  # type: ignore[attr-defined]
        return config


def read(
    source: str | os.PathLike[str], allow_pickle: bool = False, hub: Mapping[str, Any] | None = None
) -> Checkpoint:
    """Opens a checkpoint in whatever naming.

    source: a folder (`config.json` with `model.safetensors`, `pytorch_model.bin` or `tf_model.h5`); a file
    (`.safetensors`, `.pth`, `.pt`, `.bin`, `.h5`, `.ckpt`), whose configuration is that of a training run of ours, a
    config.json beside it that fits, or inferred; or a hub id `owner/name`. hub: keywords of the download.
    Files are read as safetensors or with `weights_only=True`, so that nothing in them can run, unless allow_pickle.
    """
    path = Path(source)
    file = path if path.is_file() else _weights_of(source, hub or {})
    content = _content(file, allow_pickle)
    values = _trained(content) or read_json(file.with_name("config.json"))
    try:
        tensors, aside = unwrap(content)
        weights, naming, dropped = to_ours(tensors)
        if values and path.is_file() and not fits(values, weights):
            values = None  # of another model that happens to lie in the same folder
    except UserError as error:
        raise UserError(f"{file}: {error}") from error
    meta = content["meta"] if isinstance(content.get("meta"), Mapping) else {}
    classes = meta.get("CLASSES")
    classes = classes if isinstance(classes, list | tuple) else None
    license = _license(str(source), naming, (values or {}, meta))
    training = content["hyper_parameters"]["config"] if _trained(content) else {}
    notes = [*aside, *dropped]
    return Checkpoint(str(source), weights, naming, len(tensors), notes, values, training, classes, license)


def start_from(model: Pretrained, source: str | os.PathLike[str]) -> str:
    """Loads pretrained weights of any naming for training and says what was taken.

    The encoder must fit whole, but for its stem, which is adapted from RGB to the model's bands. The model's head is
    taken when it fits too (a checkpoint of the same classes) and otherwise stays as initialised: fine-tuning on other
    classes is the usual case. The licence of the weights, where one is known, goes into the model's configuration.
    """
    checkpoint, own = read(source), model.state_dict()
    adapted = adapt_stem(checkpoint.weights, model.config.num_channels)
    encoder = under(checkpoint.weights, "segformer.")
    prefix = next(prefix for prefix in HEADS if under(own, prefix))
    name, classifier = prefix[:-1].replace("_", " "), f"{prefix.removesuffix('classifier.')}classifier.weight"
    head, fresh = under(checkpoint.weights, prefix), under(own, prefix)
    head_fits = {n: t.shape for n, t in head.items()} == {n: t.shape for n, t in fresh.items()}
    load(model, {**(head if head_fits else fresh), **encoder}, str(source))
    if checkpoint.license:
        model.config.weights_license = checkpoint.license  # type: ignore[attr-defined]
    end = "".join(f"; {note}" for note in adapted)
    if head_fits:
        return f"loaded encoder and {name} from {source}{end}"
    why = "its decode head is mmsegmentation's" if has_mmseg_head(head) else "its width differs"
    if not head:
        why = "the checkpoint has none"
    elif classifier in head:
        found, wanted = (len(side[classifier]) for side in (head, own))
        why = f"the checkpoint has {found} classes, the data {wanted}" if found != wanted else why
    return f"loaded the encoder from {source}; the {name} starts fresh ({why}){end}"


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
            raise UserError(misshapen(name, tuple(tensor.shape), tuple(own[name].shape), source))
    model.load_state_dict(dict(weights))


def to_disk(weights: Mapping[str, Tensor]) -> Weights:
    """Our names -> Hugging Face's on disk, as plain tensors in memory of the CPU."""
    return {name: tensor.detach().cpu().contiguous() for name, tensor in from_ours(weights, "hf")[0].items()}


def save_nvlabs(model: Pretrained, path: str | os.PathLike[str]) -> tuple[int, list[str]]:
    """Writes a `.pth` under NVlabs' names; how many tensors, and sentences about what had to be made up.

    A segmentation model becomes `{"state_dict", "meta": {"CLASSES"}}` as the original's are, an encoder or classifier
    a bare dict of tensors as `mit_b0.pth` is.
    """
    weights, notes = from_ours(model.state_dict(), "nvlabs")
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    meta = {
        "CLASSES": tuple(model.config.id2label.values()),
        "weights_license": getattr(model.config, "weights_license", None),
    }
    content = {"state_dict": weights, "meta": meta} if under(weights, "decode_head.") else weights
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda file: torch.save(content, file))
    return len(weights), notes


def load_checkpoint(path: Path) -> dict[str, Any]:
    """The content of a training checkpoint of ours; `weights_only`, so nothing in the file can run."""
    if not path.is_file():
        raise UserError(f"no checkpoint at {path}: give the path of a best.ckpt or last.ckpt")
    checkpoint = _unpickle(path)
    if _trained(checkpoint) is None:
        raise UserError(f"{path} is not a checkpoint of this project: train.py writes best.ckpt and last.ckpt")
    return checkpoint


def training_config(source: str | os.PathLike[str], needed: bool) -> dict[str, Any]:
    """The configuration a `.ckpt` was trained with; of any other source nothing, an error where it is needed."""
    path = Path(source)
    if not path.is_file():
        if needed:
            raise UserError(
                f"no checkpoint file at {source}: give the path of a best.ckpt or last.ckpt, or add data=NAME to "
                "score a folder or hub id"
            )
        return {}
    if not needed and (path.suffix != ".ckpt" or _trained(_unpickle(path)) is None):
        return {}
    config: dict[str, Any] = load_checkpoint(path)["hyper_parameters"]["config"]
    if config.get("task", "segmentation") != "segmentation":
        raise UserError(
            f"{source} is a classifier, whose scores stand in its run's metrics.csv: evaluate.py scores segmentation, "
            f"which train.py model.pretrained={source} starts from it"
        )
    if needed and any("_target_" in config["data"][split] for split in ("train", "val")):
        raise UserError(
            f"{source} was trained on a source class of your own, which a checkpoint may not start: add data=NAME"
        )
    return config


def weights_sha256(model: nn.Module) -> str:
    """Of names, types, shapes and bytes of all tensors: equal for the same weights in whatever kind of file."""
    digest = sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def model_name(source: str | os.PathLike[str], trained: Mapping[str, Any]) -> str:
    """What to call a model in a report: its choice (b0) where it was trained here, else the last part of its source."""
    return str(trained["choices"]["model"]) if trained else Path(source).name


def _weights_of(source: str | os.PathLike[str], hub: Mapping[str, Any]) -> Path:
    for name in _WEIGHTS:  # one after the other: a repository may hold the same weights in three formats
        file = locate(source, ("config.json", name), hub) / name
        if file.is_file():
            return file
    shards = Path(source) / "model.safetensors.index.json"
    why = ", and shards are not read: save it in one file" if shards.is_file() else " beside config.json"
    raise UserError(f"no weights in {source}: expected {', '.join(_WEIGHTS)}{why}")


def _content(path: Path, allow_pickle: bool) -> Any:
    if path.suffix == ".h5":
        return from_tensorflow(_read_h5(path))
    if path.suffix != ".safetensors":
        return _unpickle(path, allow_pickle)
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except Exception as error:  # safetensors raises types of its own for each kind of damage
        raise UserError(f"cannot read weights {path}: {reason(error)}") from error


def _unpickle(path: Path, allow_pickle: bool = False) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises a dozen types here: truncated zip, foreign pickle, not a zip at all
        if not isinstance(error, pickle.UnpicklingError):
            raise UserError(f"cannot read checkpoint {path}: {reason(error)}") from error
        what = re.search(r"GLOBAL (\S+) was not", str(error))
        if what is None:
            raise UserError(f"cannot read checkpoint {path}: {_looks_like(path)}; download or save it again") from error
        if not allow_pickle:
            raise UserError(
                f"cannot read checkpoint {path} safely: it holds {what[1]}, and such a file can run any code; if you "
                "trust its origin, pass allow_pickle=True to from_pretrained or --allow-pickle to "
                "`python -m segformer convert`"
            ) from error
    warnings.warn(f"allow_pickle: whatever code {path} holds RUNS NOW with your rights", stacklevel=2)
    try:
        # reached by allow_pickle alone, and only for a file that the safe reading above refused for its objects: the
        # original's checkpoints may hold mmcv's in their meta
        return torch.load(path, map_location="cpu", weights_only=False)
    except Exception as error:  # of whatever the file's own code does
        raise UserError(f"cannot read checkpoint {path}: {reason(error)}") from error


def _looks_like(path: Path) -> str:
    """What a file that is no pickle seems to be."""
    with path.open("rb") as file:
        start = file.read(16)
    if start.startswith(b"version https://"):
        return "it is a pointer of git-lfs, not the weights"
    if start.lstrip().startswith(b"<"):
        return "it is a web page, not the weights"
    return "it is a safetensors file: name it so" if start[8:9] == b"{" else "it is no checkpoint, or a damaged one"


def _read_h5(path: Path) -> Weights:
    try:
        import h5py  # type: ignore[import-untyped]
    except ImportError as error:
        raise UserError(f'{path} needs h5py: pip install "segformer[tf]"') from error
    arrays: Weights = {}

    def collect(name: str, node: Any) -> None:
        # the data sets, not the attribute `weight_names`: Keras cuts that into pieces where it grows past 64 kB
        if isinstance(node, h5py.Dataset):
            arrays[name] = torch.from_numpy(node[()])

    try:
        with h5py.File(path) as file:
            file.visititems(collect)
    except OSError as error:
        raise UserError(f"cannot read weights {path}: {reason(error)}") from error
    return arrays


def _trained(content: Any) -> dict[str, Any] | None:
    """The network's configuration in a training checkpoint of ours."""
    found = content.get("hyper_parameters") if isinstance(content, Mapping) else None
    if isinstance(found, Mapping) and all(isinstance(found.get(key), Mapping) for key in ("model", "config")):
        return found["model"]
    return None


def _license(source: str, naming: str, stored: Sequence[Mapping[str, Any]]) -> str | None:
    """What `stored` says, or NVIDIA's for what NVIDIA published, which is then told once on stderr."""
    for values in stored:
        if "weights_license" in values:
            return values["weights_license"]
    published = any(part == "nvidia" or part.startswith("models--nvidia--") for part in Path(source).parts)
    if not published and naming != "nvlabs":
        return None
    if process() == 0:
        print(f"{source}: {WEIGHTS_LICENSE}", file=sys.stderr)
    return WEIGHTS_LICENSE


def _completed(checkpoint: Checkpoint, model: Pretrained, resize: bool) -> tuple[Weights, list[str]]:
    """The weights under the model's own names, without heads it does not have, and what starts fresh or was adapted."""
    own, source = model.state_dict(), checkpoint.source
    head = next((head for head in HEADS if under(own, head)), "")
    weights = {n: t for n, t in checkpoint.weights.items() if not n.startswith(HEADS) or (head and n.startswith(head))}
    if has_mmseg_head(weights):
        raise UserError(
            f"{source} has mmsegmentation's decode head, another network (BatchNorm and ReLU after every stage's "
            "projection): only its encoder can be taken, by SegformerModel.from_pretrained or model.pretrained="
        )
    notes = adapt_stem(weights, model.config.num_channels) if resize else []
    if not head:
        return {name.removeprefix("segformer."): tensor for name, tensor in weights.items()}, notes
    last = "decode_head.classifier." if head == "decode_head." else head
    fresh = under(own, last)
    if not under(weights, head):
        fresh = under(own, head)
        notes.append(f"{head[:-1]} starts fresh (the checkpoint has none): train it before use")
    elif resize and any(weights[name].shape != tensor.shape for name, tensor in fresh.items() if name in weights):
        notes.append(f"{last[:-1]} starts fresh for {model.config.num_labels} classes: train it before use")
    else:
        fresh = {}
    return weights | fresh, notes
