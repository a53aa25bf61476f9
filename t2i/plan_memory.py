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

Activations are what autograd keeps of each layer in eager mode, derived from the layers' code with attention and
RMSNorm as PyTorch's fused CUDA kernels; `torch.compile` keeps less, so they are an upper bound for it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from t2i.config import ModelConfig
from t2i.engine.shards import BUCKET_NUMEL
from t2i.plan_networks import Frozen, Trained

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


def block_activations(
    model: ModelConfig, tokens: int, context: int, dtype_bytes: int, fused_norms: bool = True
) -> float:
    """Bytes that autograd keeps of one transformer block for one sample.

    Args:
        model: its widths.
        tokens: that pass through it.
        context: text tokens that it reads too; 0 makes it a text block.
        dtype_bytes: of the arithmetic: 2 or 4. Norms are in fp32 in either case.
        fused_norms: whether RMSNorm keeps its input alone (CUDA), or the normalised input too (CPU).
    """
    c, d, h, fp32 = dtype_bytes, model.width, model.heads, dtype_bytes == FP32
    norm = FP32 + (0 if fused_norms else FP32)
    # The fp32 inputs of the queries' and keys' norms: copies of them in bf16, else qkv's output, values included.
    qk_norms = (3 if fp32 else 2) * FP32 + (0 if fused_norms else 2 * FP32)
    # A text block's values are a view that keeps qkv's output, which in fp32 is counted already.
    values = c if context else (0 if fp32 else 3 * c)
    residual_branches = 2 * (norm + 2 * c + c)  # the norm, modulate's and the first matrix's input, the gated output
    attention = qk_norms + 2 * c + values + 2 * c  # queries and keys, values, the result as it came and as it goes on
    mlp = 4 * c * (8 / 3 if model.condition == "class" else 4)  # gate and up, silu, their product
    statistics = FP32 * (2 + 2 * h + h)  # two norms, those of queries and keys, attention's rows
    per_token = d * (residual_branches + attention + mlp) + statistics
    context_norm = (2 if fp32 else 1) * FP32 + (0 if fused_norms else FP32)
    per_context = d * (context_norm + 2 * c) + FP32 * h
    return tokens * per_token + context * per_context


@dataclass(frozen=True)
class Shapes:
    """What the size of a micro-batch's activations depends on."""

    model: ModelConfig
    size: tuple[int, int]
    """Height and width of an image, in pixels."""
    text_length: int
    text_width: int
    dtype_bytes: int

    @property
    def tokens(self) -> int:
        """Of an image."""
        return self.pixels // self.model.patch_size**2

    @property
    def pixels(self) -> int:
        """Of an image."""
        return self.size[0] * self.size[1]

    def block_tokens(self, index: int) -> int:
        """Of image block `index` (from 0), with those of the class once they have joined."""
        joined = self.model.condition == "class" and index >= self.model.context_start
        return self.tokens + (self.model.context_tokens if joined else 0)


def ends_activations(shapes: Shapes, features: Frozen | None, fused_norms: bool = True) -> float:
    """Bytes that autograd keeps of one sample outside the blocks: text entrance, patch embedding, head, projector."""
    c, d, n, length = shapes.dtype_bytes, shapes.model.width, shapes.tokens, shapes.text_length
    norm = FP32 + (0 if fused_norms else FP32)
    text = length * (shapes.text_width * c + d * norm + FP32 + d * c)  # at its end, the refined text
    patches = n * (3 * shapes.model.patch_size**2 + shapes.model.bottleneck) * c
    head = n * (2 * FP32 * d + 2 * FP32)
    if shapes.model.condition == "class":
        head += n * FP32 * d  # what modulate multiplies
    projector = n * c * (5 * d) if features is not None else 0
    # The cosine of aligned features keeps both in fp32, and their norms.
    alignment = n * 2 * FP32 * features.width if features is not None else 0
    return text + patches + head + projector + alignment


def image_blocks_activations(shapes: Shapes, fused_norms: bool = True) -> float:
    """Bytes that autograd keeps of one sample in all image blocks."""
    model, c = shapes.model, shapes.dtype_bytes
    if model.condition == "text":
        return model.depth * block_activations(model, shapes.tokens, shapes.text_length, c, fused_norms)
    found = 0.0
    for index in range(model.depth):
        tokens = shapes.block_tokens(index)
        found += block_activations(model, tokens, 0, c, fused_norms)
        if model.dropout > 0 and model.depth // 4 <= index < model.depth // 4 * 3:
            found += tokens * model.width * (1 + 8 / 3)  # its two masks, a byte a value
    return found


def activation_memory(
    shapes: Shapes,
    micro_batch: int,
    open_samples: int,
    compared_samples: int,
    distance: Frozen | None,
    features: Frozen | None,
    *,
    aligned: bool,
    checkpointing: bool,
) -> Bytes:
    """Bytes at the fullest moment of a micro-step, by component.

    The backward goes through the perceptual networks first, while all of the denoiser is kept; then through the
    blocks, of which checkpointing has one at a time. The larger of the two moments counts.

    Args:
        shapes: of the stage.
        micro_batch: samples at a time.
        open_samples: those of them that LPIPS sees.
        compared_samples: those of them that P-DINO compares.
        distance: LPIPS; none where it has no weight.
        features: the network of P-DINO and alignment; none where neither has weight.
        aligned: whether alignment has weight.
        checkpointing: whether blocks keep their input alone.
    """
    model, c = shapes.model, shapes.dtype_bytes
    image_blocks = kept_image = image_blocks_activations(shapes)
    text_block = block_activations(model, shapes.text_length, 0, c)
    kept_text = text_block
    if checkpointing:
        kept_image = c * model.width * sum(map(shapes.block_tokens, range(model.depth)))
        kept_text = c * model.width * shapes.text_length
    image_bytes = 3 * FP32 * shapes.pixels
    perceptual = open_samples * (distance.saved_bytes if distance is not None else 0)
    perceptual += compared_samples * (features.saved_bytes if features is not None else 0)
    first_map = 64 * FP32 * shapes.pixels if distance is not None else 0
    in_perceptual = perceptual + WORKING_COPIES * open_samples * first_map
    gate_up = 8 * model.width * shapes.block_tokens(model.depth - 1) * c
    in_block = micro_batch * ((image_blocks / model.depth if checkpointing else 0) + WORKING_COPIES * gate_up)
    return {
        "image blocks": int(micro_batch * kept_image),
        "text blocks": int(micro_batch * model.text_depth * kept_text),
        "ends and projector": int(micro_batch * ends_activations(shapes, features if aligned else None)),
        "images": micro_batch * IMAGE_COPIES * image_bytes,
        "backward": int(max(in_perceptual, in_block)),
    }
