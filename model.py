"""The mathematics of S4D: a ViT, the masked autoencoder of stage 1, and the experts and heads of stage 2.

It reads in the order in which data flows: a clip becomes tokens, a layer transforms tokens, the masked autoencoder
hides most of them and predicts their pixels (Eqs. 1, 2), the gate sends each token to a few adapter experts
(Eqs. 4-9; a layer with them is Eqs. 10-13), and S4D classifies images and clips with one encoder and two heads.
On a first reading, stop at the line of '=' behind S4D.
Equation numbers are those of "Static for Dynamic" (S4D). Parameters carry the names of the released checkpoints.

B batch               T frames, H x W pixels    N tokens, V of them visible, N - V hidden
d token width         h attention heads         P values in a token's pixels = tubelet * patch * patch * 3
n experts             k experts per token       r inner width of an adapter
The paper's mask M is 1 where a token is visible. Ours is called `hidden`: bool, True where a token is hidden. A token's
pixels are its patch, of `tubelet` frames of `patch` x `patch` pixels. `blocks`, a released name, are layers.
"""
import argparse
import json
import os
import pickle
import re
import sys
import zipfile
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

if sys.version_info < (3, 11):
    raise SystemExit(f"error: Python 3.11 or later is needed, this is {sys.version.split()[0]}")

IMAGE_MEAN = (0.485, 0.456, 0.406)  # ImageNet's, per channel of RGB in [0, 1]
IMAGE_STD = (0.229, 0.224, 0.225)
MASK_RATIO = {"image": 0.90, "video": 0.95}  # Section IV-B


class UserError(Exception):
    """What a user can put right; the message names the file or the setting, its value and what was expected."""


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
    "tiny": Size(128, 4, 2, 64, 1, decoder_depth=2, pixels=48, patch=8, tubelet=4),  # ours, for a laptop
    "small": Size(384, 12, 6, 192, 3),
    "base": Size(768, 12, 12, 384, 6),  # the paper's
    "large": Size(1024, 24, 16, 512, 8),
}


# ------------------------------------------------------------------------------- precision: skip on a first reading

def at_least_fp32(x: torch.Tensor) -> torch.Tensor:
    """Losses and the gate's softmax are taken in fp32 under autocast, and left alone in fp64 (the tests' precision)."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def in_autocast_precision(x: torch.Tensor) -> torch.Tensor:
    """What autocast would make of x for each matrix product: made once where several follow."""
    device = x.device.type
    return x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x


@cache
def channel_values(values: tuple[float, float, float], device: torch.device) -> torch.Tensor:
    """A constant per channel, (3,), brought to the device once: a GPU's host would wait for it in every step."""
    with torch.inference_mode(False):       # it is kept, and a later call may train
        return torch.tensor(values, device=device)


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
    return torch.where(torch.arange(width) % 2 == 0, angle.sin(), angle.cos()).float()


class PatchEmbed(nn.Module):
    """Linear embedding of a token's pixels, (B, N, P) -> (B, N, d); weights shaped as the released Conv3d's."""

    def __init__(self, size: Size):
        super().__init__()
        kernel = (size.tubelet, size.patch, size.patch)
        self.proj = nn.Conv3d(3, size.width, kernel_size=kernel, stride=kernel)

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        # Stride = kernel: the convolution is one matrix product per token, which can leave out the hidden tokens.
        weight = self.proj.weight.permute(0, 2, 3, 4, 1).flatten(1)         # (d, P), values as in patchify
        return F.linear(patches, weight, self.proj.bias)


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Softmax(q k^T / sqrt(d / h)) v, (B, h, N, d / h) each."""
    if q.dtype != torch.bfloat16 or q.device.type != "cpu":
        return F.scaled_dot_product_attention(q, k, v)
    # Speed only: on a CPU torch's fused kernel takes 1.2 to 5 times as long in bf16 as the plain products.
    return (q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)).softmax(-1) @ v


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
        x = attend(*self.queries_keys_values(x))                            # (B, h, N, d / h)
        return self.proj(x.transpose(1, 2).flatten(2))                      # (B, N, d)

    def weights(self, x: torch.Tensor) -> torch.Tensor:
        """The attention map that `forward` applies: (B, N, d) -> (B, h, N, N), rows sum to 1 (Fig. 6)."""
        q, k, _ = self.queries_keys_values(x)
        return at_least_fp32(q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1)


class Mlp(nn.Module):
    """Two linear layers with a GELU between them: the FFN of Eq. (11), inner width 4 d."""

    def __init__(self, width: int, inner: int):
        super().__init__()
        self.fc1 = nn.Linear(width, inner)
        self.fc2 = nn.Linear(inner, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Layer(nn.Module):
    """A pre-norm ViT layer; with adapters (`moe_layer`) beside its FFN it is the MoAE layer of Section III-D,
    Eqs. (10)-(13). Experts may replace the FFN instead, as in ViT-MoE, which Table V compares."""

    def __init__(self, width: int, heads: int, moe_layer: "MoAE | None" = None):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = Mlp(width, 4 * width) if moe_layer is None or moe_layer.beside_ffn else None
        self.moe_layer = moe_layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # Eq. (10): x' = x + MHSA(LayerNorm(x))
        x = x + self.attn(self.norm1(x))                                    # x'   (B, N, d)
        normed = in_autocast_precision(self.norm2(x))                       # once for FFN, gate and adapters
        # Eq. (11): x_g = FFN(LayerNorm(x')). Only ViT-MoE has none
        generic = 0 if self.mlp is None else self.mlp(normed)               # x_g  (B, N, d)
        # Eq. (12): x_s = MoAE(LayerNorm(x'))
        specific = 0 if self.moe_layer is None else self.moe_layer(normed)  # x_s  (B, N, d)
        # Eq. (13): x_o = x' + x_g + x_s
        return x + generic + specific                                       # x_o  (B, N, d)


class ViT(nn.Module):
    """Patch embedding and layers. `norm` is stage 1's; stage 2 normalises the mean token instead. No class token."""

    def __init__(self, size: Size, experts_in: dict[int, "MoAE"], final_norm: bool = False):
        super().__init__()
        self.size = size
        self.patch_embed = PatchEmbed(size)
        self.register_buffer("positions", sincos_table(size.video_tokens, size.width), persistent=False)
        self.blocks = nn.Sequential(*(Layer(size.width, size.heads, experts_in.get(i)) for i in range(size.depth)))
        self.norm = nn.LayerNorm(size.width, eps=1e-6) if final_norm else nn.Identity()

    def encode(self, patches: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        """Pixels of some tokens (B, V, P) and their positions, a table (V, d) or (B, V, d) -> (B, V, d)."""
        return self.norm(self.blocks(self.patch_embed(patches) + position))


# --------------------------------------------------------------------------- stage 1: masked autoencoder, Section III-B

def masked_tokens(tokens: int, ratio: float) -> int:
    """How many tokens are hidden, floor(ratio * N). UserError if that leaves none hidden or none visible."""
    count = int(ratio * tokens + 1e-9)      # 0.29 * 100 is a little less than 29 in floats
    if not 0 < count < tokens:
        raise UserError(f"mask ratio {ratio} of {tokens} tokens must leave some hidden and some visible")
    return count


def random_mask(batch: int, tokens: int, ratio: float, device: torch.device | str = "cpu") -> torch.Tensor:
    """Uniformly random masks (B, N), True = hidden, the same number of them True in every sample."""
    rank = torch.rand(batch, tokens, device=device).argsort(dim=1).argsort(dim=1)  # of each token, in random order
    return rank < masked_tokens(tokens, ratio)


class MaskedAutoencoder(nn.Module):
    """Stage 1: reconstruct the pixels of hidden tokens from the few visible ones (Section III-B)."""

    def __init__(self, size: str = "base"):
        super().__init__()
        self.architecture = {"size": size}
        self.size = SIZES[size]
        self.encoder = ViT(self.size, experts_in={}, final_norm=True)
        self.encoder_to_decoder = nn.Linear(self.size.width, self.size.decoder_width, bias=False)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, self.size.decoder_width))
        width = self.size.decoder_width
        self.register_buffer("decoder_positions", sincos_table(self.size.video_tokens, width), persistent=False)
        self.decoder = nn.ModuleDict({
            "blocks": nn.Sequential(*(Layer(width, self.size.decoder_heads) for _ in range(self.size.decoder_depth))),
            "norm": nn.LayerNorm(width, eps=1e-6),
            "head": nn.Linear(width, self.size.tubelet * self.size.patch ** 2 * 3)})  # P values
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.trunc_normal_(self.mask_token, std=0.02)

    def forward(self, x: torch.Tensor, hidden: torch.Tensor | None = None, mask_ratio: float | None = None):
        """Hide tokens, encode what is visible, decode, and compare with what was hidden.

        x: (B, 3, H, W) or (B, 3, T, H, W), normalised with IMAGE_MEAN and IMAGE_STD. hidden: bool (B, N), the same
        number True in every sample; without it, a random mask of `mask_ratio` (default: the paper's) is drawn.
        Returns (loss, pred, hidden): a scalar, the hidden tokens' predicted pixels (B, N - V, P) in token order, and
        the mask. ValueError for a mask of another shape, dtype or with unequal counts.
        """
        patches = patchify(x, self.size)                                    # (B, N, P)
        batch, tokens = patches.shape[:2]
        if hidden is None:
            ratio = MASK_RATIO[modality(x)] if mask_ratio is None else mask_ratio
            hidden, count = random_mask(batch, tokens, ratio, x.device), masked_tokens(tokens, ratio)
        else:                               # a GPU's host waits here, for a given mask only
            count = hidden_count(hidden, batch, tokens)
        # Visible tokens first, then hidden ones, each in token order, whether the mask was drawn or given.
        order = hidden.to(torch.uint8).argsort(dim=1, stable=True)          # (B, N)
        seen, unseen = order[:, :-count], order[:, -count:]                 # (B, V), (B, N - V)

        sample = torch.arange(batch, device=x.device)[:, None]
        # Eq. (1): X_m = X * M, as a selection instead of a product with zeros: hidden tokens never enter the encoder.
        z = self.encoder.encode(patches[sample, seen], self.encoder.positions[seen])
        z = self.encoder_to_decoder(z)                                      # (B, V, decoder width)
        z = torch.cat([z, self.mask_token.expand(batch, count, -1).to(z.dtype)], dim=1)
        z = self.decoder["blocks"](z + self.decoder_positions[order])       # (B, N, decoder width)
        pred = self.decoder["head"](self.decoder["norm"](z[:, -count:]))    # (B, N - V, P)
        target = normalised_target(patches[sample, unseen])[0]
        # Eq. (2): L = sum((1 - M) * (X^ - X)^2) / sum(M), in fp32: the mean over a token's values, then over the hidden
        # tokens of the batch. As printed it divides by sum(M), but with M = 1 for visible in Eq. (1) that would divide
        # the error of the hidden tokens by the number of visible ones; here, as released, by that of hidden ones.
        loss = F.mse_loss(at_least_fp32(pred), target)
        return loss, pred, hidden


def hidden_count(hidden: torch.Tensor, batch: int, tokens: int) -> int:
    """How many tokens a given mask hides in each sample. ValueError as said in MaskedAutoencoder.forward."""
    count = int(hidden[0].sum())
    if (hidden.shape != (batch, tokens) or hidden.dtype != torch.bool or not 0 < count < tokens
            or (hidden.sum(1) != count).any()):
        raise ValueError(f"expected a mask of bool {(batch, tokens)} that hides the same number of tokens in every "
                         f"sample, and not all, got {hidden.dtype} {tuple(hidden.shape)}")
    return count


def normalised_target(patches: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What the decoder must predict: pixels in [0, 1], normalised by their own patch's mean and deviation per channel.

    patches: (B, N - V, P), normalised with IMAGE_MEAN and IMAGE_STD. Returns the target (B, N - V, P) and, to undo it,
    the patches' mean and deviation in units of `patches`, (B, N - V, 1, 3) each.
    """
    values = at_least_fp32(patches).unflatten(-1, (-1, 3))                  # (B, N - V, P / 3, 3), channel last
    mean = values.mean(dim=2, keepdim=True)
    centred = values - mean
    variance = centred.square().sum(dim=2, keepdim=True) / (values.shape[2] - 1)  # unbiased
    # Wanted is (pixel - mean) / sqrt(variance + 1e-6) of pixels in [0, 1]. `values` are pixels / std + constant, which
    # makes no difference if the 1e-6 is divided by std^2, as their variance is
    deviation = (variance + 1e-6 / channel_values(IMAGE_STD, values.device).square()).sqrt()
    return (centred / deviation).flatten(2), mean, deviation


# ----------------------------------------------------------------- stage 2: mixture of adapter experts, Section III-D

class NoisyTopKGate(nn.Module):
    """Which k of n experts see a token, with what weight. sigma: None = computed from the token, for each expert.

    In training `latest` keeps, for finetune.py's --balance, the last call's logits before the noise (..., n) and its
    choice (..., k).
    """

    def __init__(self, width: int, experts: int, k: int, sigma: float | None = None):
        super().__init__()
        self.k, self.sigma, self.latest = k, sigma, None
        self.topkroute_linear = nn.Linear(width, experts)   # W_g; the bias, 0 at first, is the released checkpoints'
        self.noise_linear = nn.Linear(width, experts) if sigma is None else None

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(..., d) -> the chosen experts' weights (..., k), which sum to 1, and their numbers (..., k)."""
        # Eq. (4), the dense gate: G(x) = Softmax(x W_g). These are its scores; below, only k go into a softmax
        logits = noisy = at_least_fp32(self.topkroute_linear(x))            # (..., n)
        if self.training:
            # The paper gives no sigma; learned as in Shazeer et al. 2017, and without noise in evaluation.
            sigma = self.sigma if self.noise_linear is None else F.softplus(at_least_fp32(self.noise_linear(x)))
            # Eq. (5): H(x) = x W_g + epsilon, of standard deviation sigma
            noisy = logits + sigma * torch.randn_like(logits)
        # Eq. (6): G(x) = Softmax(Top-K(H(x), k)), which is 0 for all others
        top, chosen = noisy.topk(self.k, dim=-1)                            # (..., k) each
        if self.training:
            self.latest = logits, chosen
        return top.softmax(dim=-1), chosen


class MoAE(nn.Module):
    """Mixture of adapter experts: a gate and n adapters of inner width r, (B, N, d) -> (B, N, d).

    residual: the x in Eq. (8), which the released experts lack.
    """
    beside_ffn = True

    def __init__(self, width: int, inner: int, experts: int = 8, k: int = 2, sigma: float | None = None,
                 residual: bool = True):
        super().__init__()
        self.residual = residual
        self.router = NoisyTopKGate(width, experts, k, sigma)
        self.experts = nn.ModuleList(Mlp(width, inner) for _ in range(experts))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights, chosen = self.router(x)                                    # Eqs. (4) to (6), (B, N, k) each
        # Adapters are small, so all n are computed side by side and what was not chosen is multiplied by 0.
        w1 = torch.cat([expert.fc1.weight for expert in self.experts])      # (n r, d): every expert's W_1, and so on
        b1 = torch.cat([expert.fc1.bias for expert in self.experts])        # (n r)
        w2 = torch.cat([expert.fc2.weight for expert in self.experts], 1)   # (d, n r)
        b2 = torch.stack([expert.fc2.bias for expert in self.experts])      # (n, d)
        # Eq. (8): Adapter(x) = x + W_2 GELU(W_1 x + b_1) + b_2. Here are the n GELUs; what is linear in them follows
        gelu = F.gelu(F.linear(x, w1, b1)).unflatten(-1, (len(b2), -1))     # (B, N, n, r)
        gates = torch.zeros_like(gelu[..., 0]).scatter(-1, chosen, weights.to(gelu.dtype))  # G(x), (B, N, n)
        # Eq. (7): MoE(x) = sum_i G(x)_i E_i(x), and Eq. (9) with E_i = Adapter_i, a sum for each term of an adapter:
        # sum_i W_2i (G_i gelu_i), as one product, + sum_i G_i b_2i + sum_i G_i x, which is x, as the G_i sum to 1
        out = F.linear((gates[..., None] * gelu).flatten(-2), w2) + gates @ b2
        return x + out if self.residual else out


class S4D(ViT):
    """The encoder with MoAE in some layers, and two heads, of images and of videos (Section III-C; linear as released).

    image_classes, video_classes: class names in label order. moae_layers: indices of the layers with experts,
    None = the last half, [] = none. expert: "adapter", or "ffn" for ViT-MoE, whose experts replace the FFN.
    UserError for settings that make no model.
    """

    def __init__(self, size: str = "base", image_classes: list[str] = (), video_classes: list[str] = (),
                 experts: int = 8, k: int = 2, adapter_width: int | None = None, moae_layers: list[int] | None = None,
                 sigma: float | None = None, residual: bool = True, expert: str = "adapter"):
        depth, width = SIZES[size].depth, SIZES[size].width
        adapter_width = width // 4 if adapter_width is None else adapter_width  # r = d / 4, Section III-D
        if moae_layers is None:
            moae_layers = range(depth - depth // 2, depth)
        # Goes into checkpoints, from which the model is rebuilt.
        architecture = dict(size=size, image_classes=list(image_classes), video_classes=list(video_classes),
                            experts=experts, k=k, adapter_width=adapter_width, moae_layers=sorted(set(moae_layers)),
                            sigma=sigma, residual=residual, expert=expert)
        layer = ViTMoE if expert == "ffn" else MoAE
        inner = 4 * width if expert == "ffn" else adapter_width
        check_architecture(inner=inner, **architecture)
        super().__init__(SIZES[size], {i: layer(width, inner, experts, k, sigma, residual)
                                       for i in architecture["moae_layers"]})
        self.architecture = architecture
        self.fc_norm = nn.LayerNorm(width, eps=1e-6)
        self.head = nn.ModuleDict({name: nn.Linear(width, len(classes)) for name, classes in
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
        name = modality(x)
        if name not in self.head:
            raise ValueError(f"this model was not trained on {name}s: its heads are {list(self.head)}")
        return self.head[name](self.features(x))


# ==================================================================================================================
# From here on what no equation needs: ViT-MoE, checks, checkpoints, tables. On a first reading skip to data.py.
# ==================================================================================================================

class ViTMoE(MoAE):
    """ViT-MoE's experts, full FFNs of inner width 4 d that replace the layer's own: too large to compute them all."""
    beside_ffn = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The B N k choices are sorted by expert. How many each has stays on the device: nothing waits for it."""
        weights, chosen = self.router(x)                                    # (B, N, k) each
        order = chosen.flatten().argsort()
        own = chosen.flatten()[order, None] == torch.arange(len(self.experts), device=x.device)  # (B N k, n)
        ends, own = own.sum(0).cumsum(0).to(torch.int32), own.to(x.dtype)
        rows = x.flatten(0, 1).index_select(0, order // chosen.shape[-1])   # (B N k, d), expert by expert

        def linear(rows: torch.Tensor, layers: list[nn.Linear]) -> torch.Tensor:
            weight, bias = (torch.stack([getattr(layer, name) for layer in layers]) for name in ("weight", "bias"))
            return F.grouped_mm(rows, weight.to(x.dtype).transpose(1, 2), offs=ends) + own @ bias

        rows = F.gelu(linear(rows, [expert.fc1 for expert in self.experts]))
        rows = linear(rows, [expert.fc2 for expert in self.experts])
        outputs = rows.index_select(0, order.argsort()).unflatten(0, chosen.shape)  # (B, N, k, d)
        return (weights[..., None].to(outputs.dtype) * outputs).sum(dim=-2)


def check_architecture(size: str, experts: int, k: int, adapter_width: int, inner: int, moae_layers: list[int],
                       sigma: float | None, expert: str, **_) -> None:
    """UserError for settings of S4D that make no model, or experts (of width `inner`) that no memory holds."""
    if expert not in ("adapter", "ffn") or sigma is not None and not 0 <= sigma < float("inf"):
        raise UserError(f"expert = {expert}, sigma = {sigma}: expected adapter or ffn, and None or 0 or more")
    for name, value, first, last in (("experts", experts, 1, 1024), ("k", k, 1, experts),
                                     ("adapter_width", adapter_width, 1, 65536),
                                     ("experts * width", experts * inner, 1, 131072),
                                     *(("moae_layers", i, 0, SIZES[size].depth - 1) for i in moae_layers)):
        if type(value) is not int or not first <= value <= last:
            raise UserError(f"{name} = {value}: expected {first} to {last}")


# ------------------------------------------------------------------------------- checkpoints of ours and of others

MODULES = {"pretrain": MaskedAutoencoder, "finetune": S4D}  # what the stage in a checkpoint stands for
EXPERT_SETTINGS = ("moae_layers", "expert", "experts", "k", "adapter_width", "sigma", "residual")
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}  # of weights
NAMES = (  # prefixes to leave out, and names in transformers' VideoMAE, in the order of a layer, with ours
    (r"^((module|_orig_mod|backbone|videomae)\.)+", ""),
    (r"^embeddings\.patch_embeddings\.projection\.", "encoder.patch_embed.proj."),
    (r"^encoder\.layer\.", "encoder.blocks."),
    (r"^decoder\.decoder_layers\.", "decoder.blocks."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.attention\.attention\.(query|key|value)\.weight$", r".attn.qkv.\1"),
    (r"\.attention\.attention\.(q_bias|query\.bias)$", ".attn.q_bias"),
    (r"\.attention\.attention\.(v_bias|value\.bias)$", ".attn.v_bias"),
    (r"\.attention\.output\.dense\.", ".attn.proj."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
    (r"^layernorm\.", "encoder.norm."),
    (r"^classifier\.", "head.video."),
)


@contextmanager
def whole_file(path, mode: str = "wb", **options):
    """A file that takes its name when all of it is on the disk. options: of `open`. UserError if that fails."""
    if os.path.exists(path) and not os.path.isfile(path):   # a device, or a link to a folder, would make way for a file
        raise UserError(f"{path} cannot be written: it is a directory, a device or a pipe")
    part = Path(f"{path}.part")
    try:
        with open(part, mode, **options) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except (OSError, RuntimeError) as error:    # torch.save makes a RuntimeError of a file's OSError
        reason = error if isinstance(error, OSError) else error.__context__ or error
        raise UserError(f"{path} cannot be written: {reason}") from error
    finally:
        with suppress(OSError):
            part.unlink()


def read_checkpoint(path) -> dict:
    """The plain dict in a checkpoint: tensors, numbers and text only, so that loading runs no code of the file.

    Bare weights, as S4D, VideoMAE (MAE-DFER's too) and transformers' VideoMAE are released (the last as a folder with
    model.safetensors or pytorch_model.bin too), are described as a checkpoint of ours. UserError for anything else.
    """
    file = next((f for f in (Path(path, "model.safetensors"), Path(path, "pytorch_model.bin")) if f.is_file()), path)
    try:
        if str(file).endswith(".safetensors"):
            contents = read_safetensors(file)
        else:
            if zipfile.is_zipfile(file):    # torch does not look at the checksums: a wrong bit would load as a weight
                with zipfile.ZipFile(file) as archive:
                    if damaged := archive.testzip():
                        raise zipfile.BadZipFile(f"the checksum of its part {damaged} is wrong")
            contents = torch.load(file, map_location="cpu", weights_only=True)
        checkpoint = contents if "model" in contents else {"model": contents}
        if not all(isinstance(name, str) and torch.is_tensor(value) and value.dtype in DTYPES.values()
                   for name, value in checkpoint["model"].items()):
            raise TypeError("its weights are no tensors of floating point with names")
        if "stage" not in checkpoint:
            return released(checkpoint["model"])
        descriptions = [checkpoint.get(name, {}) for name in ("architecture", "identity", "digests", "state")]
        if checkpoint["stage"] not in list(MODULES) or not all(isinstance(part, dict) for part in descriptions):
            raise TypeError(f"expected stage {' or '.join(MODULES)} and its descriptions, got {checkpoint['stage']!r}")
        return checkpoint
    except FileNotFoundError as error:
        raise UserError(f"there is no checkpoint {path}") from error
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path} holds more than plain tensors, numbers and text, and no code of a file is run. If you trust it, "
            "convert it once: torch.save({'model': torch.load(OLD, weights_only=False)['model']}, NEW)") from error
    except Exception as error:              # odd contents lead to errors of every kind
        raise UserError(f"{path} cannot be read as a checkpoint: {error!r}") from error


def read_safetensors(path) -> dict[str, torch.Tensor]:
    """Tensors of a safetensors file: the length of its header in 8 bytes, the header in JSON, then all values."""
    data = memoryview(bytearray(Path(path).read_bytes()))
    start, state = 8 + int.from_bytes(data[:8], "little"), {}
    header = json.loads(bytes(data[8:start]))
    header.pop("__metadata__", None)
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        state[name] = torch.frombuffer(data[start + begin:start + end], dtype=DTYPES[entry["dtype"]])
        state[name] = state[name].reshape(entry["shape"])   # an error if the file ends before `end`
    return state


def released(state: dict[str, torch.Tensor]) -> dict:
    """Describe bare weights as a checkpoint of ours. Their names are ours up to prefixes, but for transformers'.

    The size follows from the token width, a classifier's experts from its keys; its adapters have no residual, and its
    k, which no key tells, is the paper's 2. Positions are a fixed table that each size makes itself, so that weights of
    224 pixels serve at 160; a bias on keys adds a constant to a row of logits, which the softmax takes out. The norms'
    epsilon is ours, 1e-6 (transformers': 1e-12, and 1e-5 before the classifier).
    """
    state = {name: value for name, value in state.items() if not name.endswith(("position_embeddings", ".key.bias"))}
    for pattern, ours in NAMES:
        state = {re.sub(pattern, ours, name): value for name, value in state.items()}
    for stem in [name.removesuffix("query") for name in state if name.endswith(".qkv.query")]:
        state[f"{stem}weight"] = torch.cat([state.pop(stem + part) for part in ("query", "key", "value")])
    pretrained = any(name.startswith("decoder.") for name in state)
    if not pretrained:
        state = {name.removeprefix("encoder."): value for name, value in state.items()}
    width = next((len(value) for name, value in state.items() if name.endswith("patch_embed.proj.weight")), None)
    sizes = {size.width: name for name, size in SIZES.items()}
    if width not in sizes:
        raise ValueError(f"patch_embed.proj.weight of S4D, VideoMAE or MAE-DFER has {list(sizes)} rows, here {width}")
    classes = {f"{name}_classes": unnamed(len(state.get(f"head.{name}.weight", ()))) for name in ("image", "video")}
    if pretrained or not any(classes.values()):
        return dict(stage="pretrain", architecture={"size": sizes[width]}, model=state)
    layers = sorted({int(name.split(".")[1]) for name in state if ".moe_layer." in name})
    moe = f"blocks.{max(layers, default=None)}.moe_layer"
    n = len(state.get(f"{moe}.router.topkroute_linear.weight", range(8)))
    r = len(state.get(f"{moe}.experts.0.fc1.weight", range(width // 4)))
    sigma = None if f"{moe}.router.noise_linear.weight" in state else 0.0   # None: learned
    return dict(stage="finetune", model=state, architecture=dict(
        size=sizes[width], **classes, moae_layers=layers, experts=n, k=min(2, n), adapter_width=r, sigma=sigma,
        residual=False, expert="adapter"))


def load_checkpoint(path) -> MaskedAutoencoder | S4D:
    """Rebuild the module of a file that read_checkpoint reads. UserError if file, names or shapes do not fit."""
    return rebuild(read_checkpoint(path), path)


def rebuild(checkpoint: dict, path) -> MaskedAutoencoder | S4D:
    """load_checkpoint of a file that has been read."""
    try:
        module = MODULES[checkpoint["stage"]](**checkpoint["architecture"])
    except (UserError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(f"{path} describes no model: {error}") from error
    load_weights(module, checkpoint["model"], path)
    return module


def load_weights(module: nn.Module, state: dict[str, torch.Tensor], path, new: tuple[str, ...] = (),
                 dropped: tuple[str, ...] = ()) -> str:
    """Copy weights into a module. Only names that contain one of `new` may be missing from the file, and only names
    that start with one of `dropped` may be left over. Returns a line each on what was loaded, made new and dropped.
    UserError, with nothing loaded, if other names or any shape differ or a weight is not finite."""
    own = module.state_dict()
    missing, extra = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    common = sorted(own.keys() & state.keys())
    wrong = {"missing": [name for name in missing if not any(part in name for part in new)],
             "not expected": [name for name in extra if not name.startswith(dropped)],
             "of other shapes": [f"{name} {tuple(state[name].shape)} in the file, {tuple(own[name].shape)} in the model"
                                 for name in common if own[name].shape != state[name].shape],
             "not finite": [name for name in common if not state[name].isfinite().all()]}
    problems = [f"{what}: {', '.join(names[:5])} ({len(names)} in all)" for what, names in wrong.items() if names]
    if problems:
        raise UserError(f"{path} does not fit this model: {'; '.join(problems)}")
    module.load_state_dict({name: state[name] for name in common}, strict=False)
    return f"loaded: {len(common)} tensors of {path}\nmade new: {parts(missing)}\ndropped: {parts(extra)}"


def parts(names: list[str]) -> str:
    """A short list of the parts of a model that names belong to."""
    split = [name.split(".") for name in names]
    short = {f"blocks.*.{name[2]}" if name[0] == "blocks" else name[0] for name in split}
    return ", ".join(sorted(short)) or "nothing"


def initialise(model: S4D, checkpoint: dict, path) -> str:
    """Initialise stage 2 from a checkpoint that has been read (Section III-C); returns what load_weights says.

    From stage 1, the experts, the norm of the final representation and the heads are new, and the decoder and stage 1's
    last norm are dropped; ViT-MoE's experts start as copies of the pre-trained FFN that they replace. From stage 2, all
    is taken, but for heads of other classes; its experts must be the model's.
    """
    state = {name.removeprefix("encoder."): value for name, value in checkpoint["model"].items()}
    theirs, ours = checkpoint["architecture"], model.architecture
    if checkpoint["stage"] == "finetune":
        for name in EXPERT_SETTINGS:        # names and shapes do not tell them all
            if theirs.get(name) != ours[name]:
                raise UserError(f"{path} was fine-tuned with {name} = {theirs.get(name)}, this model has {ours[name]}")
        for name in ("image", "video"):
            if not same_classes(theirs.get(f"{name}_classes"), ours[f"{name}_classes"]):
                state = {key: value for key, value in state.items() if not key.startswith(f"head.{name}.")}
        return load_weights(model, state, path, new=("head.",), dropped=("head.",))
    for i in ours["moae_layers"] if ours["expert"] == "ffn" else ():
        for part in [key for key in state if key.startswith(f"blocks.{i}.mlp.")]:
            weight = state.pop(part)
            state |= {part.replace("mlp", f"moe_layer.experts.{j}"): weight for j in range(ours["experts"])}
    return load_weights(model, state, path, new=("moe_layer.", "fc_norm.", "head."),
                        dropped=("norm.", "decoder.", "encoder_to_decoder.", "mask_token"))


def same_classes(theirs: list[str], ours: list[str]) -> bool:
    """Whether a head's classes are ours; a released file does not name its own, so that their number must do."""
    return theirs == ours or theirs == unnamed(len(ours))


def unnamed(count: int) -> list[str]:
    return [f"class {i}" for i in range(count)]


# ------------------------------------------------------------ tables that follow from the model alone, and --export

def parameters(model: S4D) -> tuple[float, float]:
    """Millions of parameters that one token's forward pass uses (k of n experts), and of all that are trained."""
    trained = sum(p.numel() for p in model.parameters())
    idle = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    used = trained - idle * (1 - model.architecture["k"] / model.architecture["experts"])
    return used / 1e6, trained / 1e6


def multiply_accumulates(name: str, mask_ratio: float) -> tuple[float, float]:
    """GMAC of one sample's forward pass of stage 1, ViT-B: with all patches embedded, hidden ones too, as the released
    code does, and as ours does, which embeds the visible ones only."""
    model = MaskedAutoencoder("base")
    size = model.size
    tokens, frames = (size.image_tokens, ()) if name == "image" else (size.video_tokens, (size.frames,))
    # The counter of older versions of torch does not know the fused attention of a CPU.
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        model(torch.zeros(1, 3, *frames, size.pixels, size.pixels), mask_ratio=mask_ratio)
    ours = counter.get_total_flops() / 2    # a multiply-accumulate is two operations
    embedding = model.encoder.patch_embed.proj.weight.numel() * masked_tokens(tokens, mask_ratio)
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
        checkpoint, path = args.export
        try:
            weights = load_checkpoint(checkpoint).state_dict()
            if os.path.exists(path) and os.path.samefile(checkpoint, path):
                raise UserError(f"{path} is the checkpoint itself, which would lose all but its weights")
            with whole_file(path) as file:
                torch.save({"model": weights}, file)
        except UserError as error:
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
        costs = [[samples * gmac * 100 / 1e3 for gmac in multiply_accumulates(name, ratio)]
                 for samples, name, ratio in parts]
        masked = ", ".join(f"{name} {ratio:.0%}" for _, name, ratio in parts)
        released_cost, own_cost = (sum(column) for column in zip(*costs))
        print(f"{name:12}{masked:22}{paper:9.1e}{released_cost:22.2e}{own_cost:26.2e}")


if __name__ == "__main__":
    main()
