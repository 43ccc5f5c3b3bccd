"""python benchmarks/traffic.py --models b0 b2 b5

What a GPU has to move, counted, not timed: the bytes that go in and out of the operations of a step and how many of
them there are, for transformers' network and this one, run eagerly. Nothing is computed, so any machine will do and
always finds the same. Weights and activations are in bfloat16; attention is one operation that reads query, key and
value and writes its result, as fused kernels have it; a training step is forward, loss and backward.
"""

import argparse
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pairs
import torch
import torch.nn.functional as F
from gpu_networks import Traffic
from torch import Tensor, nn

from segformer import kernels
from segformer.config import VARIANTS, SegformerConfig
from segformer.inference import segment
from segformer.losses import segmentation_loss
from segformer.model import SegformerForSemanticSegmentation
from segformer.pixels import normalize

CLASSES = {512: 150, 1024: 19}


@torch.library.custom_op("benchmark::attention", mutates_args=())
def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return torch.empty_like(query)


@torch.library.custom_op("benchmark::attention_backward", mutates_args=())
def attention_backward(
    grad: Tensor, found: Tensor, query: Tensor, key: Tensor, value: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


attention.register_fake(lambda query, key, value: torch.empty_like(query))
attention_backward.register_fake(lambda _, found, *inputs: tuple(torch.empty_like(each) for each in inputs))
attention.register_autograd(
    lambda ctx, grad: attention_backward(grad, *ctx.saved_tensors),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(output, *inputs),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=VARIANTS, default=["b0", "b2", "b5"])
    parser.add_argument("--sizes", nargs="+", type=int, choices=CLASSES, default=[*CLASSES])
    options = parser.parse_args()
    F.scaled_dot_product_attention = lambda query, key, value, *_, **__: attention(query, key, value)
    kernels._INTERPRETED, kernels._works = True, lambda _: True  # tensors without numbers lie on no GPU
    torch.autocast, torch.is_autocast_enabled = lambda *_, **__: nullcontext(), lambda *_: False  # nor know autocast
    for title, step in (("Inference, one image", inference), ("Training step, one image", training)):
        rows = [counted(model, size, step) for model in options.models for size in options.sizes]
        print(f"\n{title}\n\n{pairs.table(rows)}")


def counted(model: str, size: int, step: Callable[..., Callable[[], Any]]) -> dict[str, Any]:
    theirs, ours = networks(model, CLASSES[size])
    row: dict[str, Any] = {"model": model, "size": size, "classes": CLASSES[size]}
    for name, network, on in (("transformers", theirs, False), ("twins", ours, False), ("kernels", ours, True)):
        kernels.enable(on)
        run = step(network, size)
        with Traffic() as traffic:
            run()
        row |= {f"{name} MB": round(traffic.bytes / 1e6), f"{name} operations": traffic.operations}
    row["bytes, times fewer"] = row["transformers MB"] / row["kernels MB"]
    row["operations, times fewer"] = row["transformers operations"] / row["kernels operations"]
    return row


def networks(model: str, classes: int) -> tuple[nn.Module, nn.Module]:
    import transformers

    with torch.device("meta"):
        theirs = transformers.SegformerForSemanticSegmentation(
            transformers.SegformerConfig(**VARIANTS[model], num_labels=classes)
        )
        ours = SegformerForSemanticSegmentation(SegformerConfig.from_variant(model, num_labels=classes))
    return theirs.bfloat16(), ours.bfloat16()


def scene(size: int) -> tuple[Tensor, Tensor]:
    image = torch.empty(1, 3, size, size, dtype=torch.uint8, device="meta")
    return image, torch.empty(1, size, size, dtype=torch.uint8, device="meta")


def inference(network: nn.Module, size: int) -> Callable[[], Any]:
    image, _ = scene(size)
    network.eval()
    if isinstance(network, SegformerForSemanticSegmentation):
        return lambda: segment(network, image)

    def run() -> Tensor:
        with torch.no_grad():
            logits = network(normalize(image).bfloat16()).logits
            return F.interpolate(logits, size=(size, size), mode="bilinear", align_corners=False).argmax(dim=1)

    return run


def training(network: nn.Module, size: int) -> Callable[[], Any]:
    image, mask = scene(size)
    network.train()

    def run() -> None:
        pixels = normalize(image).bfloat16()
        if isinstance(network, SegformerForSemanticSegmentation):
            loss = segmentation_loss(network(pixels).logits, mask)
        else:
            loss = network(pixels, labels=mask.long()).loss
        torch.autograd.grad(loss, list(network.parameters()))

    return run


if __name__ == "__main__":
    main()
