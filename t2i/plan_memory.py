"""What a rank's device holds during training, in bytes: pure arithmetic.

Static memory, bytes a parameter in bf16, measured with DeepSpeed 0.19.8 and PyTorch 2.14 on 1 and 2 ranks (W):

    engine  weights  gradients  masters  moments  average
    zero0   -        4          4        8        4         fp32 weights, cast where they are used
    zero1   2        4          4/W      8/W      4/W       gradients are whole on every rank until the step
    zero2   2        4/W        4/W      8/W      4/W       and a bucket for what is being summed over ranks
    zero3   2/W      4/W        4/W      8/W      4/W       and small weights whole, the weights under way, and a bucket
    fsdp2   -        4/W        4/W      8/W      4/W       and the weights under way; the masters are the parameters
    ddp     4        4 + 4      -        8        4         the public code: fp32, with copies of gradients in buckets

In fp32 the weights of zero1 to zero3 take 4. Muon has one moment where AdamW has two.

Activations are what autograd keeps in eager mode (`plan_trained.py`); `torch.compile` keeps less, so they are an upper
bound for it.
"""

from __future__ import annotations

from typing import Literal, get_args

from t2i.engine.shards import BUCKET_NUMEL
from t2i.plan_networks import Frozen
from t2i.plan_trained import PARTS, Checkpointing, ImageCost, Trained

Engine = Literal["zero0", "zero1", "zero2", "zero3", "fsdp2"]
ENGINES: tuple[Engine, ...] = get_args(Engine)

FP32 = 4
CONTEXT_BYTES = int(1.5 * 2**30)
"""Assumed: CUDA's context, the communication library's buffers, workspaces of matrix products."""
BUCKET = BUCKET_NUMEL
"""Values in the bucket in which DeepSpeed sums gradients over ranks, in fp32."""
IMAGE_COPIES = 5
"""Of a micro-batch in fp32: the image, noise, x_t, the prediction and its gradient."""
WORKING_COPIES = 3
"""Assumed: tensors of the largest size that exist at once inside an operation or its backward, besides what is kept."""

Bytes = dict[str, int]


def total(parts: Bytes) -> int:
    """Sum of the parts."""
    return sum(parts.values())


def static_memory(engine: Engine, ranks: int, network: Trained, frozen: Bytes, dtype_bytes: int) -> Bytes:
    """Bytes that a rank holds from its first step to its last, by component.

    Args:
        engine: see the table above.
        ranks: that share the state.
        network: what is trained.
        frozen: bytes of the networks that are not, by name; whole on every rank.
        dtype_bytes: of a weight that the network computes with: 2 or 4.
    """
    n = network.total
    shared = 1 if engine == "zero0" else ranks
    weights_shared = ranks if engine in ("zero3", "fsdp2") else 1
    gradients_shared = ranks if engine in ("zero2", "zero3", "fsdp2") else 1
    own_masters = engine in ("zero0", "fsdp2")
    whole = network.small if engine == "zero3" and ranks > 1 else 0
    return {
        "weights": 0 if own_masters else dtype_bytes * (n // weights_shared + whole),
        "gradients": FP32 * n // gradients_shared,
        "masters": FP32 * n // shared,
        "moments": moments_bytes(network) // shared,
        "average": FP32 * n // shared,
        **frozen,
        "sampling copy": dtype_bytes * network.denoiser,
    }


def checkpoint_bytes(network: Trained) -> int:
    """Of one checkpoint, all ranks' parts of it: masters, average and moments."""
    return 2 * FP32 * network.total + moments_bytes(network)


def moments_bytes(network: Trained) -> int:
    """Of all ranks together: two moments a parameter with AdamW, one with Muon."""
    return FP32 * (2 * network.total - network.by_muon)


def reference_static_memory(network: Trained, frozen: Bytes) -> Bytes:
    """Bytes of the public code, whole on every rank: fp32 in distributed data parallel, with AdamW."""
    n = network.total
    return {
        "weights": FP32 * n,
        "gradients": FP32 * n,
        "gradient buckets": FP32 * n,
        "moments": 2 * FP32 * n,
        "average": FP32 * n,
        **frozen,
    }


def buffers(engine: Engine, network: Trained, dtype_bytes: int) -> int:
    """Bytes an engine needs only while it computes, to bring weights together and gradients apart.

    zero0 in bf16: the weights as they are cast, which autograd keeps. zero2, zero3, and zero1 in fp32: a bucket of
    gradients, allocated whole however small the network. zero3, fsdp2: the weights of two blocks, one in use and one on
    its way, and of everything outside blocks; fsdp2 also the gradients of one block in fp32, on one rank too.
    """
    under_way = (2 * network.block + network.rest + network.projector) * dtype_bytes
    bucket = FP32 * BUCKET
    return {
        "zero0": 0 if dtype_bytes == FP32 else dtype_bytes * network.total,
        "zero1": bucket if dtype_bytes == FP32 else 0,
        "zero2": bucket,
        "zero3": bucket + under_way,
        "fsdp2": under_way + FP32 * network.block,
    }[engine]


def activation_memory(
    cost: ImageCost,
    pixels: int,
    micro_batch: int,
    open_samples: int,
    compared_samples: int,
    distance: Frozen | None,
    features: Frozen | None,
    checkpointing: Checkpointing,
) -> Bytes:
    """Bytes at the fullest moment of a micro-step, by component.

    The backward goes through the perceptual networks first, while all of the denoiser is kept; then through the
    blocks, of which checkpointing has one at a time. The larger of the two moments counts.

    Args:
        cost: what one image takes in the trained networks.
        pixels: of an image.
        micro_batch: samples at a time.
        open_samples: those of them that LPIPS sees.
        compared_samples: those of them that P-DINO compares.
        distance: LPIPS; none where it has no weight.
        features: the network of P-DINO and alignment; none where neither has weight.
        checkpointing: the blocks that keep their input alone.
    """
    image_bytes = 3 * FP32 * pixels
    perceptual = open_samples * (distance.saved_bytes if distance is not None else 0)
    perceptual += compared_samples * (features.saved_bytes if features is not None else 0)
    first_map = 64 * FP32 * pixels if distance is not None else 0
    in_perceptual = perceptual + WORKING_COPIES * open_samples * first_map
    in_block = micro_batch * (cost.recomputed_bytes(checkpointing) + WORKING_COPIES * cost.largest)
    return {
        **{part: micro_batch * cost.kept(part, checkpointing) for part in PARTS},
        "ends and projector": micro_batch * cost.outside,
        "images": micro_batch * IMAGE_COPIES * image_bytes,
        "backward": max(in_perceptual, in_block),
    }
