"""The mathematics of S4D: a ViT, the masked autoencoder of stage 1, and the experts and heads of stage 2.

It reads in the order in which data flows: a clip becomes tokens, a layer transforms tokens, the masked autoencoder
hides most of them and predicts their pixels (Eqs. 1, 2), the gate sends each token to a few adapter experts
(Eqs. 4-9; a layer with them is Eqs. 10-13), and S4D classifies images and clips with one encoder and two heads.
Equation numbers are those of "Static for Dynamic" (S4D). Parameters carry the names of the released checkpoints.

B batch               T frames, H x W pixels    N tokens, V of them visible, M masked (in Eqs. 1 and 2 M is the mask)
d token width         h attention heads         P values in a token's pixels = tubelet * patch * patch * 3
n experts             k experts per token       r adapter width
"""
import argparse
import pickle
import re
import zipfile
import zlib
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

IMAGE_MEAN = (0.485, 0.456, 0.406)  # ImageNet's, per channel of RGB in [0, 1]
IMAGE_STD = (0.229, 0.224, 0.225)
MASK_RATIO = {"image": 0.90, "video": 0.95}  # Section IV-B


class SettingError(ValueError):
    """Settings that make no model; the message names the value and what was expected."""


@dataclass(frozen=True)
class Size:
    """Shape of the encoder, of the decoder that stage 1 throws away, and of the input."""
    width: int
    depth: int
    heads: int
    decoder_width: int
    decoder_heads: int
    decoder_depth: int = 4
    pixels: int = 160
    patch: int = 16
    frames: int = 16
    tubelet: int = 2

    @property
    def image_tokens(self) -> int:
        return (self.pixels // self.patch) ** 2

    @property
    def video_tokens(self) -> int:
        return self.frames // self.tubelet * self.image_tokens


SIZES = {
    "tiny": Size(128, 4, 2, 64, 1, decoder_depth=2, pixels=48, patch=8),  # ours, for a laptop
    "small": Size(384, 12, 6, 192, 3),
    "base": Size(768, 12, 12, 384, 6),  # the paper's
    "large": Size(1024, 24, 16, 512, 8),
}


# ----------------------------------------------------------------------------------------------- tokens and layers

def modality(x: torch.Tensor) -> str:
    """"image" for a batch (B, 3, H, W), "video" for (B, 3, T, H, W); ValueError for anything else."""
    if x.ndim not in (4, 5) or x.shape[1] != 3:
        raise ValueError(f"expected images (B, 3, H, W) or videos (B, 3, T, H, W), got {tuple(x.shape)}")
    return "image" if x.ndim == 4 else "video"


def patchify(x: torch.Tensor, size: Size) -> torch.Tensor:
    """Cut a batch into tubelets, one row of pixels per token.

    x: (B, 3, H, W) or (B, 3, T, H, W). Returns (B, N, P), tokens in the order (time slot, row, column), the values
    inside a token in the order (frame, row, column, channel). An image is repeated to fill a time slot, Section IV-B.
    """
    if modality(x) == "image":
        x = x.unsqueeze(2).expand(-1, -1, size.tubelet, -1, -1)
    frames, height, width = x.shape[2:]
    if (height, width) != (size.pixels, size.pixels) or frames % size.tubelet or frames > size.frames:
        raise ValueError(f"this model takes {size.pixels} x {size.pixels} pixels and up to {size.frames} frames in "
                         f"multiples of {size.tubelet}, got {frames} frames of {height} x {width}")
    x = x.unflatten(4, (-1, size.patch)).unflatten(3, (-1, size.patch)).unflatten(2, (-1, size.tubelet))
    # (B, 3, slot, frame, row, y, column, x) -> (B, slot, row, column, frame, y, x, 3)
    return x.permute(0, 2, 4, 6, 3, 5, 7, 1).flatten(4).flatten(1, 3)


def sincos_table(length: int, width: int) -> torch.Tensor:
    """Fixed positions (length, width): sine on even and cosine on odd dimensions, one frequency per pair, base 10000.

    The positions are those of the flattened token sequence, so an image (N = 100) has the rows of time slot 0.
    """
    pair = torch.arange(width, dtype=torch.float64) // 2
    angle = torch.arange(length, dtype=torch.float64)[:, None] / 10000 ** (2 * pair / width)
    table = torch.where(torch.arange(width) % 2 == 0, angle.sin(), angle.cos())
    return table.to(torch.get_default_dtype())


def at_least_fp32(x: torch.Tensor) -> torch.Tensor:
    """Losses and the gate's softmax are taken in fp32 under autocast, and left alone in fp64 (the tests' precision)."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def in_autocast_precision(x: torch.Tensor) -> torch.Tensor:
    """What autocast would make of x for each matrix product: made once where several follow."""
    device = x.device.type
    return x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x


class PatchEmbed(nn.Module):
    """Linear embedding of a token's pixels, (B, N, P) -> (B, N, d); weights shaped as the released Conv3d's."""

    def __init__(self, size: Size):
        super().__init__()
        kernel = (size.tubelet, size.patch, size.patch)
        self.proj = nn.Conv3d(3, size.width, kernel_size=kernel, stride=kernel)

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        # Stride = kernel: the convolution is one matrix product per token, which can leave out the masked tokens.
        weight = self.proj.weight.permute(0, 2, 3, 4, 1).flatten(1)         # (d, P), values as in patchify
        return F.linear(patches, weight, self.proj.bias)


class Attention(nn.Module):
    """Multi-head self-attention with biases on queries and values, none on keys: MHSA of Eq. (10)."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.proj = nn.Linear(width, width)

    def queries_keys_values(self, x: torch.Tensor) -> torch.Tensor:
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        qkv = F.linear(x, self.qkv.weight, bias)                            # (B, N, 3 d)
        return qkv.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # (3, B, h, N, d / h)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.queries_keys_values(x)
        if q.dtype == torch.bfloat16 and q.device.type == "cpu":
            # On a CPU the fused kernel takes 1.4 to 10 times as long as plain products in bf16.
            x = (q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)).softmax(-1) @ v
        else:
            x = F.scaled_dot_product_attention(q, k, v)                     # (B, h, N, d / h)
        return self.proj(x.transpose(1, 2).flatten(2))                      # (B, N, d)

    def weights(self, x: torch.Tensor) -> torch.Tensor:
        """The attention map that `forward` applies: (B, N, d) -> (B, h, N, N), rows sum to 1 (Fig. 6)."""
        q, k, _ = self.queries_keys_values(x)
        return at_least_fp32(q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1)


class Mlp(nn.Module):
    """Two linear layers with a GELU between them: the FFN of Eq. (11), hidden width 4 d."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Layer(nn.Module):
    """A pre-norm ViT layer; with a `moe_layer` beside its FFN it is the MoAE layer of Section III-D, Eqs. (10)-(13).

    ffn=False: the experts replace the FFN instead, as in ViT-MoE, which Table V compares.
    """

    def __init__(self, width: int, heads: int, moe_layer: nn.Module | None = None, ffn: bool = True):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = Mlp(width, 4 * width) if ffn else None
        self.moe_layer = moe_layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # Eq. (10): x' = x + MHSA(LayerNorm(x))
        x = x + self.attn(self.norm1(x))                                    # x'   (B, N, d)
        normed = self.norm2(x)
        if self.mlp is None:
            return x + self.moe_layer(normed)
        # Eq. (11): x_g = FFN(LayerNorm(x'))
        generic = self.mlp(normed)                                          # x_g  (B, N, d)
        if self.moe_layer is None:
            return x + generic
        # Eq. (12): x_s = MoAE(LayerNorm(x'))
        specific = self.moe_layer(normed)                                   # x_s  (B, N, d)
        # Eq. (13): x_o = x' + x_g + x_s
        return x + generic + specific                                       # x_o  (B, N, d)


class ViT(nn.Module):
    """Patch embedding and layers. `norm` is stage 1's; stage 2 normalises the mean token instead. No class token."""

    def __init__(self, size: Size, moe_layers: dict[int, nn.Module] | None = None, final_norm: bool = False,
                 moe_replaces_ffn: bool = False):
        super().__init__()
        self.size = size
        self.patch_embed = PatchEmbed(size)
        self.register_buffer("positions", sincos_table(size.video_tokens, size.width), persistent=False)
        moe_layers = moe_layers or {}
        self.blocks = nn.ModuleList(Layer(size.width, size.heads, moe_layers.get(i),
                                          ffn=not (moe_replaces_ffn and i in moe_layers)) for i in range(size.depth))
        self.norm = nn.LayerNorm(size.width, eps=1e-6) if final_norm else nn.Identity()

    def encode(self, patches: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        """Pixels of some tokens (B, V, P) and their positions, a table (V, d) or (B, V, d) -> (B, V, d)."""
        x = self.patch_embed(patches) + position
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


# --------------------------------------------------------------------------- stage 1: masked autoencoder, Section III-B

def masked_tokens(tokens: int, ratio: float) -> int:
    """floor(ratio * N). SettingError if that leaves no token masked or none visible."""
    masked = int(ratio * tokens + 1e-9)     # 0.29 * 100 is a little less than 29 in floats
    if not 0 < masked < tokens:
        raise SettingError(f"mask ratio {ratio} of {tokens} tokens must leave some masked and some visible")
    return masked


def random_mask(batch: int, tokens: int, ratio: float, device: torch.device | str = "cpu") -> torch.Tensor:
    """Uniformly random masks (B, N), True = masked, the same number of them True in every sample."""
    order = torch.rand(batch, tokens, device=device).argsort(dim=1)
    return order.argsort(dim=1) < masked_tokens(tokens, ratio)              # the argsort of an order: a token's rank


def take(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Rows of each sample: x (B, N, c) or a shared table (N, c), index (B, V) -> (B, V, c)."""
    if x.ndim == 2:
        return x[index]
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))


class Decoder(nn.Module):
    """Narrow ViT layers over all tokens, then the pixels of the masked ones."""

    def __init__(self, size: Size):
        super().__init__()
        width = size.decoder_width
        self.blocks = nn.ModuleList(Layer(width, size.decoder_heads) for _ in range(size.decoder_depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.head = nn.Linear(width, size.tubelet * size.patch ** 2 * 3)

    def forward(self, x: torch.Tensor, masked: int) -> torch.Tensor:
        """x: (B, N, decoder width), the masked tokens last. Returns (B, M, P)."""
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x[:, -masked:]))


class MaskedAutoencoder(nn.Module):
    """Stage 1: reconstruct the pixels of masked tokens from the few visible ones (Section III-B)."""

    def __init__(self, size: str = "base"):
        super().__init__()
        self.architecture = {"size": size}
        self.size = SIZES[size]
        self.encoder = ViT(self.size, final_norm=True)
        self.encoder_to_decoder = nn.Linear(self.size.width, self.size.decoder_width, bias=False)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, self.size.decoder_width))
        self.decoder = Decoder(self.size)
        self.register_buffer("decoder_positions", sincos_table(self.size.video_tokens, self.size.decoder_width),
                             persistent=False)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.trunc_normal_(self.mask_token, std=0.02)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None, mask_ratio: float | None = None):
        """Mask, encode what is visible, decode, and compare with what was masked.

        x: (B, 3, H, W) or (B, 3, T, H, W), normalised with IMAGE_MEAN and IMAGE_STD. mask: bool (B, N), True =
        masked, the same number in every sample; without one, a random mask of `mask_ratio` (default: the paper's).
        Returns (loss, pred, mask): a scalar, the masked tokens' predicted pixels (B, M, P) in token order, (B, N).
        ValueError for a mask of another shape, dtype or with unequal counts.
        """
        patches = patchify(x, self.size)                                    # (B, N, P)
        batch, tokens = patches.shape[:2]
        if mask is None:
            ratio = MASK_RATIO[modality(x)] if mask_ratio is None else mask_ratio
            mask = random_mask(batch, tokens, ratio, device=x.device)
        if mask.shape != (batch, tokens) or mask.dtype != torch.bool:
            raise ValueError(f"mask must be bool {(batch, tokens)}, got {mask.dtype} {tuple(mask.shape)}")
        masked = int(mask[0].sum())
        if not 0 < masked < tokens or not bool((mask.sum(1) == masked).all()):
            raise ValueError("every sample must have the same number of masked tokens, and some of both kinds")
        # Visible tokens first, then masked ones, each in token order. The paper's M is 1 where a token is visible;
        # ours is True where it is masked.
        order = mask.to(torch.uint8).argsort(dim=1, stable=True)
        visible, hidden = order[:, :tokens - masked], order[:, tokens - masked:]  # (B, V), (B, M)

        # Eq. (1): X_m = X * M, as a selection instead of a product with zeros: masked tokens never enter the encoder.
        z = self.encoder.encode(take(patches, visible), take(self.encoder.positions, visible))  # (B, V, d)
        z = self.encoder_to_decoder(z)
        z = torch.cat([z, self.mask_token.expand(batch, masked, -1).to(z.dtype)], dim=1)
        pred = self.decoder(z + take(self.decoder_positions, order), masked)  # (B, M, P)
        # Eq. (2): L = sum((1 - M) * (X^ - X)^2) / sum(M), in fp32: the mean over a token's values, then over the masked
        # tokens of the batch. As printed it divides by sum(M), but with M = 1 for visible in Eq. (1) that would divide
        # the error of the masked tokens by the number of visible ones; here, as released, by that of masked ones.
        loss = F.mse_loss(at_least_fp32(pred), normalised_target(take(patches, hidden))[0])
        return loss, pred, mask


def normalised_target(patches: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What the decoder must predict: pixels in [0, 1], normalised by their own patch's mean and deviation per channel.

    patches: (B, M, P), normalised with IMAGE_MEAN and IMAGE_STD. Returns the target (B, M, P) and, to undo it, the
    patches' mean and deviation in units of `patches`, (B, M, 1, 3) each.
    """
    values = at_least_fp32(patches).unflatten(-1, (-1, 3))                  # (B, M, P / 3, 3), channel last
    mean = values.mean(dim=2, keepdim=True)
    centred = values - mean
    variance = centred.square().sum(dim=2, keepdim=True) / (values.shape[2] - 1)  # unbiased
    # (pixel - mean) / sqrt(variance + 1e-6) of pixels in [0, 1], of which `values` are pixels / std + constant
    deviation = (variance + 1e-6 / values.new_tensor(IMAGE_STD).square()).sqrt()
    return (centred / deviation).flatten(2), mean, deviation


# ----------------------------------------------------------------- stage 2: mixture of adapter experts, Section III-D

class NoisyTopKGate(nn.Module):
    """Which k of n experts see a token, with what weight. sigma: None = computed from the token, for each expert."""

    def __init__(self, width: int, experts: int, k: int, sigma: float | None = None):
        super().__init__()
        if not 1 <= k <= experts:
            raise SettingError(f"k = {k} experts per token, but there are {experts}")
        if sigma is not None and not sigma >= 0:
            raise SettingError(f"sigma = {sigma} is a standard deviation: expected 0 or more")
        self.k, self.sigma = k, sigma
        self.topkroute_linear = nn.Linear(width, experts)   # W_g; the bias, 0 at first, is the released checkpoints'
        self.noise_linear = nn.Linear(width, experts) if sigma is None else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., d) -> gates (..., n): k positive entries that sum to 1, the others exactly 0."""
        # Eq. (4): G(x) = Softmax(x W_g), whose softmax is taken below, over the k chosen experts only.
        logits = at_least_fp32(self.topkroute_linear(x))                    # (..., n)
        if self.training:
            # The paper gives no sigma; learned as in Shazeer et al. 2017, and without noise in evaluation.
            sigma = self.sigma if self.noise_linear is None else F.softplus(at_least_fp32(self.noise_linear(x)))
            # Eq. (5): H(x) = x W_g + epsilon, of standard deviation sigma
            logits = logits + sigma * torch.randn_like(logits)
        top, chosen = logits.topk(self.k, dim=-1)                           # (..., k)
        # Eq. (6): G(x) = Softmax(Top-K(H(x), k))
        return torch.full_like(logits, -torch.inf).scatter(-1, chosen, top).softmax(dim=-1)


class Adapter(nn.Module):
    """One expert: down to r, GELU, up to d. `residual`: Eq. (8) has one, the released experts have none."""

    def __init__(self, width: int, adapter_width: int, residual: bool = True):
        super().__init__()
        self.residual = residual
        self.fc1 = nn.Linear(width, adapter_width)
        self.fc2 = nn.Linear(adapter_width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # Eq. (8): Adapter(x) = x + W_2 GELU(W_1 x + b_1) + b_2
        return (x if self.residual else 0) + self.fc2(F.gelu(self.fc1(x)))


class MoE(nn.Module):
    """Mixture of experts: a gate and n experts, (B, N, d) -> (B, N, d). An expert maps the tokens that chose it.

    With adapters it is the paper's MoAE; with FFNs it is the layer of ViT-MoE.
    """

    def __init__(self, width: int, experts: list[nn.Module], k: int = 2, sigma: float | None = None):
        super().__init__()
        self.router = NoisyTopKGate(width, len(experts), k, sigma)
        self.experts = nn.ModuleList(experts)

    @torch.compiler.disable                 # how many tokens an expert gets differs in every step
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = in_autocast_precision(x)        # once, not in every expert
        gates, chosen = self.router(x).flatten(0, 1).topk(self.router.k)    # the nonzero G_i and their i, (B N, k)
        order = chosen.flatten().argsort()                                  # the B N k choices, expert by expert
        counts = chosen.flatten().bincount(minlength=len(self.experts)).tolist()
        tokens = x.flatten(0, 1).index_select(0, order // self.router.k).split(counts)  # each expert's, in one piece
        # Filled up to a multiple of 64: a CPU's bf16 kernels are made anew for every number of rows. An expert that no
        # token chose computes on none: its weights get a gradient, of 0, which DDP waits for.
        outputs = torch.cat([expert(F.pad(own, (0, 0, 0, -len(own) % 64)))[:len(own)]
                             for expert, own in zip(self.experts, tokens)])
        outputs = outputs.index_select(0, order.argsort()).unflatten(0, chosen.shape)  # token by token, (B N, k, d)
        # Eq. (7): MoE(x) = sum_i G(x)_i E_i(x); Eq. (9) is the same with E_i = Adapter_i, MoAE
        return torch.einsum("tk,tkd->td", gates.to(outputs.dtype), outputs).view_as(x)


class S4D(ViT):
    """The encoder with MoAE in some layers, and a linear head for images and one for videos (Section III-C).

    image_classes, video_classes: class names in label order. moae_layers: indices of the layers with experts,
    None = the last half, [] = none. expert: "adapter", or "ffn" for ViT-MoE, whose experts replace the FFN.
    """

    def __init__(self, size: str = "base", image_classes: list[str] = (), video_classes: list[str] = (),
                 experts: int = 8, k: int = 2, adapter_width: int | None = None, moae_layers: list[int] | None = None,
                 sigma: float | None = None, residual: bool = True, expert: str = "adapter"):
        depth, width = SIZES[size].depth, SIZES[size].width
        adapter_width = width // 4 if adapter_width is None else adapter_width  # r = d / 4, Section III-D
        if moae_layers is None:
            moae_layers = range(depth - depth // 2, depth)
        moae_layers = sorted(set(moae_layers))
        if any(not 0 <= i < depth for i in moae_layers):
            raise SettingError(f"MoAE layers {moae_layers}: size {size} has layers 0 to {depth - 1}")
        make = partial(Mlp, width, 4 * width) if expert == "ffn" else partial(Adapter, width, adapter_width, residual)
        super().__init__(SIZES[size], {i: MoE(width, [make() for _ in range(experts)], k, sigma) for i in moae_layers},
                         moe_replaces_ffn=expert == "ffn")
        self.architecture = dict(size=size, image_classes=list(image_classes), video_classes=list(video_classes),
                                 experts=experts, k=k, adapter_width=adapter_width, moae_layers=moae_layers,
                                 sigma=sigma, residual=residual, expert=expert)
        self.fc_norm = nn.LayerNorm(width, eps=1e-6)
        self.head = nn.ModuleDict({source: nn.Linear(width, len(classes)) for source, classes in
                                   (("image", image_classes), ("video", video_classes)) if classes})
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def features(self, x: torch.Tensor) -> torch.Tensor:
        """The representation Phi before the heads: normalised images or videos -> (B, d)."""
        patches = patchify(x, self.size)                                    # (B, N, P)
        z = self.encode(patches, self.positions[:patches.shape[1]])         # (B, N, d)
        return self.fc_norm(z.mean(dim=1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits of the batch's own head: (B, 3, H, W) -> (B, image classes), (B, 3, T, H, W) -> (B, video classes)."""
        source = modality(x)
        if source not in self.head:
            raise ValueError(f"this model was not trained on {source}s: its heads are {list(self.head)}")
        return self.head[source](self.features(x))


# ------------------------------------------------------------------------------------------------------ checkpoints

MODULES = {"pretrain": MaskedAutoencoder, "finetune": S4D}  # what the stage in a checkpoint stands for


class CheckpointError(Exception):
    """A checkpoint that cannot be used; the message names the file, the keys and the shapes."""


class DamagedError(CheckpointError):
    """A checkpoint file that is not whole."""


def read_checkpoint(path) -> dict:
    """The plain dict in a checkpoint file: tensors, numbers and text only, so that loading runs no code of the file."""
    try:
        if zipfile.is_zipfile(path):        # torch does not look at the checksums: a wrong bit would load as a weight
            with zipfile.ZipFile(path) as archive:
                if damaged := archive.testzip():
                    raise DamagedError(f"{path} is damaged: the checksum of its part {damaged} is wrong")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise CheckpointError(f"there is no checkpoint {path}") from error
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} is no checkpoint of plain tensors, numbers and text, and running code from a file is refused. If "
            "you trust it, convert it once: torch.save({'model': torch.load(OLD, weights_only=False)['model']}, NEW)"
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, LookupError, AttributeError, TypeError,
            zipfile.BadZipFile, zlib.error) as error:
        raise DamagedError(f"{path} cannot be read as a checkpoint: {error!r}") from error
    weights = checkpoint.get("model") if isinstance(checkpoint, dict) else None
    if not isinstance(weights, dict) or not all(isinstance(value, torch.Tensor) for value in weights.values()):
        raise CheckpointError(f"{path} is no checkpoint: expected a dict with the weights under 'model'")
    if "stage" not in checkpoint:
        return released(checkpoint["model"], path)
    if checkpoint["stage"] not in list(MODULES) or not isinstance(checkpoint.get("architecture"), dict):
        raise CheckpointError(f"{path} names stage {checkpoint['stage']!r}: expected {' or '.join(MODULES)}, and its "
                              "architecture")
    return checkpoint


def released(state: dict[str, torch.Tensor], path) -> dict:
    """Describe a file of bare weights, as the authors of S4D, VideoMAE and MAE-DFER release them, as one of ours.

    The names are ours already, up to prefixes. The size follows from the token width, a classifier's experts from its
    keys; its adapters have no residual, and its k, which no key tells, is the paper's 2.
    """
    state = {re.sub(r"^((module|_orig_mod|backbone)\.)+", "", key): value for key, value in state.items()}
    if not any(key.startswith("decoder.") for key in state):
        state = {key.removeprefix("encoder."): value for key, value in state.items()}
    embedding = next((value for key, value in state.items() if key.endswith("patch_embed.proj.weight")), None)
    if embedding is None:
        raise CheckpointError(f"{path} has no patch_embed.proj.weight: it is no file of S4D, VideoMAE or MAE-DFER")
    size = next((name for name, size in SIZES.items() if size.width == len(embedding)), "base")
    if any(key.startswith("decoder.") for key in state) or not any(key.startswith("head.") for key in state):
        return dict(stage="pretrain", architecture={"size": size}, model=state)
    classes = {name: unnamed(len(state.get(f"head.{name}.weight", ()))) for name in ("image", "video")}
    layers = sorted({int(key.split(".")[1]) for key in state if ".moe_layer." in key})
    gates = [value for key, value in state.items() if key.endswith("topkroute_linear.weight")]
    down = [value for key, value in state.items() if key.endswith("moe_layer.experts.0.fc1.weight")]
    learned = any("noise_linear" in key for key in state)
    return dict(stage="finetune", model=state, architecture=dict(
        size=size, image_classes=classes["image"], video_classes=classes["video"], moae_layers=layers,
        experts=len(gates[0]) if gates else 8, adapter_width=len(down[0]) if down else None, residual=False,
        sigma=None if learned else 0.0))


def load_checkpoint(path) -> MaskedAutoencoder | S4D:
    """Rebuild the module that a checkpoint describes: ours of either stage, or a released one of S4D, VideoMAE or
    MAE-DFER. CheckpointError if file, keys or shapes do not fit."""
    return rebuild(read_checkpoint(path), path)


def rebuild(checkpoint: dict, path) -> MaskedAutoencoder | S4D:
    """load_checkpoint of a file that has been read."""
    try:
        module = MODULES[checkpoint["stage"]](**checkpoint["architecture"])
    except (TypeError, KeyError, ValueError, RuntimeError, OverflowError) as error:
        raise CheckpointError(f"{path} describes no model: {error!r}") from error
    load_weights(module, checkpoint["model"], path)
    return module


def load_weights(module: nn.Module, state: dict[str, torch.Tensor], path, new: tuple[str, ...] = (),
                 dropped: tuple[str, ...] = ()) -> str:
    """Copy weights into a module. Only parameters whose name contains one of `new` may be missing from the file, and
    only names that start with one of `dropped` may be left over. Returns a line each on what was loaded, made new and
    dropped; CheckpointError, with nothing loaded, for anything else."""
    own = module.state_dict()
    missing = sorted(own.keys() - state.keys())
    extra = sorted(state.keys() - own.keys())
    wrong = [key for key in missing if not any(part in key for part in new)]
    wrong_extra = [key for key in extra if not key.startswith(dropped)]
    shapes = [f"{key} is {tuple(state[key].shape)} in the file and {tuple(own[key].shape)} in the model"
              for key in own.keys() & state.keys() if own[key].shape != state[key].shape]
    problems = ([f"missing: {', '.join(wrong[:5])} ({len(wrong)} in all)"] if wrong else [])
    problems += ([f"not expected: {', '.join(wrong_extra[:5])} ({len(wrong_extra)} in all)"] if wrong_extra else [])
    problems += sorted(shapes)[:5]
    if problems:
        raise CheckpointError(f"{path} does not fit this model: {'; '.join(problems)}")
    module.load_state_dict({key: value for key, value in state.items() if key in own}, strict=False)
    return (f"loaded: {len(own) - len(missing)} tensors of {path}\nmade new: {prefixes(missing)}\n"
            f"dropped: {prefixes(extra)}")


def prefixes(keys: list[str]) -> str:
    """A short list of the parts of the model that keys belong to."""
    parts = [key.split(".") for key in keys]
    short = {f"blocks.*.{part[2]}" if part[0] == "blocks" else part[0] for part in parts}
    return ", ".join(sorted(short)) or "nothing"


EXPERT_SETTINGS = ("moae_layers", "expert", "experts", "k", "adapter_width", "sigma", "residual")


def initialise(model: S4D, checkpoint: dict, path) -> str:
    """Initialise stage 2 from a checkpoint that has been read (Section III-C); returns what load_weights says.

    From stage 1, the experts, the norm of the final representation and the heads are new, and the decoder and stage 1's
    last norm are dropped; ViT-MoE's experts start as copies of the pre-trained FFN that they replace. From stage 2, all
    is taken, but for heads of other classes; its experts must be the model's.
    """
    state = {key.removeprefix("encoder."): value for key, value in checkpoint["model"].items()}
    if checkpoint["stage"] == "finetune":
        theirs = S4D(**checkpoint["architecture"]).architecture
        for name in EXPERT_SETTINGS:        # keys and shapes do not tell them all
            if theirs[name] != model.architecture[name]:
                raise CheckpointError(f"{path} was fine-tuned with {name} = {theirs[name]}, this model has "
                                      f"{model.architecture[name]}")
        for source in ("image", "video"):
            if not same_classes(theirs[f"{source}_classes"], model.architecture[f"{source}_classes"]):
                state = {key: value for key, value in state.items() if not key.startswith(f"head.{source}.")}
        return load_weights(model, state, path, new=("head.",), dropped=("head.",))
    for i, block in enumerate(model.blocks):
        if block.mlp is None:
            for key in [key for key in state if key.startswith(f"blocks.{i}.mlp.")]:
                weight, end = state.pop(key), key.removeprefix(f"blocks.{i}.mlp.")
                state |= {f"blocks.{i}.moe_layer.experts.{j}.{end}": weight
                          for j in range(len(block.moe_layer.experts))}
    return load_weights(model, state, path, new=("moe_layer.", "fc_norm.", "head."),
                        dropped=("norm.", "decoder.", "encoder_to_decoder.", "mask_token"))


def same_classes(theirs: list[str], ours: list[str]) -> bool:
    """Whether a head's classes are ours; a released file does not name its own, so that their number must do."""
    return theirs == ours or theirs == unnamed(len(ours))


def unnamed(count: int) -> list[str]:
    return [f"class {i}" for i in range(count)]


# -------------------------------------------------------------------------------------- tables that need no data

def parameters(model: nn.Module) -> tuple[float, float]:
    """Millions of parameters that one token's forward pass uses (k of n experts), and of all that are trained."""
    trained = sum(p.numel() for p in model.parameters())
    idle = sum((layer.router.k - len(layer.experts)) * sum(p.numel() for p in layer.experts[0].parameters())
               for layer in (block.moe_layer for block in model.blocks) if layer is not None)
    return (trained + idle) / 1e6, trained / 1e6


def multiply_accumulates(source: str, mask_ratio: float) -> tuple[float, float]:
    """GMAC of one sample's forward pass of stage 1, ViT-B: with all patches embedded, masked ones too, as the released
    code does, and as ours does, which embeds the visible ones only."""
    model = MaskedAutoencoder("base")
    tokens = model.size.image_tokens if source == "image" else model.size.video_tokens
    mask = torch.arange(tokens)[None] < masked_tokens(tokens, mask_ratio)
    frames = () if source == "image" else (model.size.frames,)
    # The counter of older versions of torch does not know the fused attention of a CPU.
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        model(torch.zeros(1, 3, *frames, model.size.pixels, model.size.pixels), mask)
    ours = counter.get_total_flops() / 2    # a multiply-accumulate is two operations
    embedding = model.encoder.patch_embed.proj.weight.numel() * int(mask.sum())
    return (ours + embedding) / 1e9, ours / 1e9


TABLE_5 = (  # row of the paper, its test / train figures in millions, and what makes the model
    ("ViT", "86 / 86", dict(moae_layers=[], image_classes=())),
    ("ViT-MTL", "86 / 86", dict(moae_layers=[])),
    ("S4D", "90 / 101", dict()),
    ("ViT-MoE", "115 / 285", dict(expert="ffn")),
)
TABLE_4 = (  # row, its cost, and (samples of Table I, modality, mask ratio) of what an epoch sees
    ("image only", 8.8e4, ((287_568, "image", 0.75),)),
    ("video only", 1.8e6, ((1_092_009, "video", 0.90),)),
    ("dual-modal", 1.4e6, ((287_568, "image", 0.90), (1_092_009, "video", 0.95))),
)


def main() -> None:
    """Print the columns of Tables IV and V that follow from the model alone, or export a checkpoint."""
    p = argparse.ArgumentParser(description="Print Table V's parameters and Table IV's cost, recounted on this model.")
    p.add_argument("--export", nargs=2, metavar=("CHECKPOINT", "FILE"),
                   help="write a checkpoint's weights under the released names, as {'model': weights}, and stop")
    args = p.parse_args()
    if args.export:
        try:
            torch.save({"model": load_checkpoint(args.export[0]).state_dict()}, args.export[1])
        except CheckpointError as error:
            raise SystemExit(f"error: {error}") from error
        return
    print("Table V, parameters in millions, test / train     paper        recounted")
    for name, paper, settings in TABLE_5:
        with torch.device("meta"):
            model = S4D("base", **(dict(image_classes=unnamed(7), video_classes=unnamed(7)) | settings))
        print("{:50}{:13}{:.2f} / {:.2f}".format(name, paper, *parameters(model)))
    print("\nTable IV, cost of 100 epochs in 10^12 multiply-accumulates of the forward pass (the paper's \"TFLOPs\")\n"
          f"{'':12}{'masked at':22}{'paper':>9}{'all patches embedded':>22}{'visible ones only (ours)':>26}")
    for name, paper, parts in TABLE_4:
        costs = [[samples * gmac * 100 / 1e3 for gmac in multiply_accumulates(source, ratio)]
                 for samples, source, ratio in parts]
        masked = ", ".join(f"{source} {ratio:.0%}" for _, source, ratio in parts)
        released_cost, own_cost = (sum(column) for column in zip(*costs))
        print(f"{name:12}{masked:22}{paper:9.1e}{released_cost:22.2e}{own_cost:26.2e}")


if __name__ == "__main__":
    main()
