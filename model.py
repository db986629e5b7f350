"""The mathematics of S4D: a ViT, the masked autoencoder of stage 1, experts and heads of stage 2.

It reads in the order in which data flows: a clip becomes tokens, a layer transforms tokens, the
masked autoencoder hides most of them and predicts their pixels (Eqs. 1, 2), the gate sends each
token to a few adapter experts (Eqs. 4-9; a layer with them is Eqs. 10-13), and S4D classifies
images and clips with one encoder and two heads. On a first reading, stop at the line of '='.
Equations are numbered as in "Static for Dynamic" (S4D); "released" is its authors' own code, whose
names the parameters have.

B batch               T frames, H x W pixels    N tokens, V of them visible, N - V hidden
d token width         h attention heads         P values of a token = tubelet * patch * patch * 3
n experts             k experts per token       r inner width of an adapter
The paper's mask M is 1 where a token is visible. Ours is called `hidden`: bool, True where a token
is hidden. A token's pixels are its patch, of `tubelet` frames of `patch` x `patch` pixels.
"""
import os
import pickle
import re
import zipfile
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from textwrap import shorten

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

IMAGE_MEAN = (0.485, 0.456, 0.406)      # ImageNet's, per channel of RGB in [0, 1]
IMAGE_STD = (0.229, 0.224, 0.225)
MASK_RATIO = {"image": 0.90, "video": 0.95}  # Section IV-B


class UserError(Exception):
    """What a user can put right: names the file or the setting, its value and what was expected."""


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

    def tokens(self, modality: str) -> int:
        of_a_slot = (self.pixels // self.patch) ** 2
        return of_a_slot if modality == "image" else self.frames // self.tubelet * of_a_slot


SIZES = {
    "tiny": Size(128, 4, 2, 64, 1, decoder_depth=2, pixels=48, patch=8, tubelet=4),  # ours
    "small": Size(384, 12, 6, 192, 3),
    "base": Size(768, 12, 12, 384, 6),  # the paper's
    "large": Size(1024, 24, 16, 512, 8),
}


# ------------------------------------------------------------ precision: skip on a first reading

def at_least_fp32(x: Tensor) -> Tensor:
    """Half precision to fp32, for losses and the gate; fp64, the tests' precision, stays."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def in_autocast_precision(x: Tensor) -> Tensor:
    """What autocast would make of x for each matrix product: made once where several follow."""
    device = x.device.type
    enabled = torch.is_autocast_enabled(device)
    return x.to(torch.get_autocast_dtype(device)) if enabled else x


@cache
def channel_values(values: tuple, device: torch.device) -> Tensor:
    """A constant per channel, (3,), on the device; kept, as a GPU's host waits when it is sent."""
    with torch.inference_mode(False):   # it is kept, and a later call may train
        return torch.tensor(values, device=device)


# ------------------------------------------------------------------------------ tokens and layers

def modality(x: Tensor) -> str:
    """Tell images (B, 3, H, W) from videos (B, 3, T, H, W). ValueError for other shapes."""
    if x.ndim not in (4, 5) or x.shape[1] != 3:
        raise ValueError(f"expected (B, 3, H, W) or (B, 3, T, H, W), got {tuple(x.shape)}")
    return "image" if x.ndim == 4 else "video"


def patchify(x: Tensor, size: Size) -> Tensor:
    """Cut a batch into patches (tubelets), one row of pixels for each.

    x: (B, 3, H, W) or (B, 3, T, H, W). Returns (B, N, P), patches in the order (time slot, row,
    column), the values inside a patch in the order (frame, row, column, channel). An image is
    repeated to fill a time slot, Section IV-B. ValueError for a batch of another shape.
    """
    if modality(x) == "image":
        x = x.unsqueeze(2).expand(-1, -1, size.tubelet, -1, -1)
    frames, height, width = x.shape[2:]
    square = height == width == size.pixels
    if not square or frames % size.tubelet or frames > size.frames:
        raise ValueError(f"expected {size.pixels} x {size.pixels} pixels and up to {size.frames} "
                         f"frames in multiples of {size.tubelet}, got {tuple(x.shape)}")
    x = x.unflatten(4, (-1, size.patch)).unflatten(3, (-1, size.patch))
    x = x.unflatten(2, (-1, size.tubelet))
    # (B, 3, slot, frame, row, y, column, x) -> (B, slot, row, column, frame, y, x, 3)
    x = x.permute(0, 2, 4, 6, 3, 5, 7, 1)
    return x.flatten(4).flatten(1, 3)                           # (B, N, P)


def sincos_table(length: int, width: int) -> Tensor:
    """Fixed positions (length, width): sine on even and cosine on odd dimensions, one frequency
    per pair of dimensions, base 10000. They number the flattened sequence of tokens, so that an
    image (N = 100) has the rows of time slot 0."""
    position = torch.arange(length, dtype=torch.float64)
    dimension = torch.arange(width)
    frequency = 10000 ** (2 * (dimension.double() // 2) / width)
    angle = position[:, None] / frequency
    return torch.where(dimension % 2 == 0, angle.sin(), angle.cos()).float()


class PatchEmbed(nn.Module):
    """Linear embedding of a token's pixels, (B, N, P) -> (B, N, d). Released checkpoints hold its
    matrix as the weight of a Conv3d, so it is kept as one."""

    def __init__(self, size):
        super().__init__()
        kernel = (size.tubelet, size.patch, size.patch)
        self.proj = nn.Conv3d(3, size.width, kernel_size=kernel, stride=kernel)

    def forward(self, patches):
        # As stride = kernel, a matrix product gives the same, and can leave patches out.
        weight = self.proj.weight.permute(0, 2, 3, 4, 1)        # values in patchify's order
        weight = weight.flatten(1)                              # (d, P)
        return F.linear(patches, weight, self.proj.bias)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax(q k^T / sqrt(d / h)) v, each of (B, h, N, d / h)."""
    if q.dtype != torch.bfloat16 or q.device.type != "cpu":
        return F.scaled_dot_product_attention(q, k, v)
    # For speed only: in bf16 on a CPU torch's kernel takes 1.2 to 9 times as long as this.
    logits = q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)      # (B, h, N, N)
    return logits.softmax(-1) @ v


class Attention(nn.Module):
    """Multi-head self-attention, MHSA of Eq. (10): biases on queries and values, none on keys."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.proj = nn.Linear(width, width)

    def queries_keys_values(self, x):
        """(B, N, d) -> (3, B, h, N, d / h)"""
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        qkv = F.linear(x, self.qkv.weight, bias)                # (B, N, 3 d)
        qkv = qkv.unflatten(-1, (3, self.heads, -1))            # (B, N, 3, h, d / h)
        return qkv.permute(2, 0, 3, 1, 4)

    def forward(self, x):
        q, k, v = self.queries_keys_values(x)
        x = attend(q, k, v)                                     # (B, h, N, d / h)
        x = x.transpose(1, 2).flatten(2)                        # (B, N, d)
        return self.proj(x)

    def weights(self, x):
        """The map that `forward` applies, (B, h, N, N), whose rows sum to 1 (Fig. 6)."""
        q, k, _ = self.queries_keys_values(x)
        logits = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
        return at_least_fp32(logits).softmax(-1)


class Mlp(nn.Module):
    """Two linear layers with a GELU between them: the FFN of Eq. (11), of inner width 4 d."""

    def __init__(self, width, inner):
        super().__init__()
        self.fc1 = nn.Linear(width, inner)
        self.fc2 = nn.Linear(inner, width)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class Layer(nn.Module):
    """A pre-norm ViT layer; with adapters beside its FFN the MoAE layer of Section III-D,
    Eqs. (10)-(13)."""

    def __init__(self, width, heads, moe_layer=None):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = Mlp(width, 4 * width)
        self.moe_layer = moe_layer

    def forward(self, x):
        # Eq. (10): x' = x + MHSA(LayerNorm(x))
        x = x + self.attn(self.norm1(x))                        # x'   (B, N, d)
        normed = in_autocast_precision(self.norm2(x))           # for FFN, gate and adapters
        # Eq. (11): x_g = FFN(LayerNorm(x'))
        generic = self.mlp(normed)                              # x_g  (B, N, d)
        # Eq. (12): x_s = MoAE(LayerNorm(x'))
        specific = 0 if self.moe_layer is None else self.moe_layer(normed)  # x_s  (B, N, d)
        # Eq. (13): x_o = x' + x_g + x_s
        return x + generic + specific                           # x_o  (B, N, d)


class ViT(nn.Module):
    """The encoder of both stages: patch embedding, positions and layers, without a class token.

    size: a Size. mixtures: {i: module}, a mixture of experts for layer i (see MoAE below; stage 1
    has none). final_norm: stage 1 ends in a LayerNorm; stage 2 has one after the mean of tokens.
    """

    def __init__(self, size, mixtures, final_norm=False):
        super().__init__()
        self.size = size
        self.patch_embed = PatchEmbed(size)
        table = sincos_table(size.tokens("video"), size.width)
        self.register_buffer("positions", table, persistent=False)
        self.blocks = nn.Sequential()
        for i in range(size.depth):
            self.blocks.append(Layer(size.width, size.heads, mixtures.get(i)))
        self.norm = nn.LayerNorm(size.width, eps=1e-6) if final_norm else nn.Identity()

    def encode(self, patches, positions):
        """Patches (B, V, P) and their rows of the table, (B, V, d), or (V, d) where all samples
        have the same -> (B, V, d)"""
        x = self.patch_embed(patches) + positions
        return self.norm(self.blocks(x))


# --------------------------------------------------- stage 1: masked autoencoder, Section III-B

def masked_tokens(tokens: int, ratio: float) -> int:
    """How many tokens are hidden, floor(ratio * N). UserError if that were none or all."""
    count = int(ratio * tokens + 1e-9)  # 0.29 * 100 is a little less than 29 in floats
    if not 0 < count < tokens:
        raise UserError(f"mask ratio {ratio} of {tokens} tokens must leave some of both kinds")
    return count


def random_mask(batch: int, tokens: int, ratio: float, device="cpu") -> Tensor:
    """Uniformly random masks (B, N), True = hidden, of the same number in every sample."""
    shuffled = torch.rand(batch, tokens, device=device).argsort(dim=1)
    rank = shuffled.argsort(dim=1)      # argsort of an argsort: each token's rank
    return rank < masked_tokens(tokens, ratio)


class MaskedAutoencoder(nn.Module):
    """Stage 1: reconstruct the pixels of hidden tokens from the visible ones (Section III-B)."""

    def __init__(self, size="base"):
        super().__init__()
        self.architecture = {"size": size}
        self.size = SIZES[size]
        width = self.size.decoder_width
        self.encoder = ViT(self.size, mixtures={}, final_norm=True)
        self.encoder_to_decoder = nn.Linear(self.size.width, width, bias=False)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        table = sincos_table(self.size.tokens("video"), width)
        self.register_buffer("decoder_positions", table, persistent=False)
        values = self.size.tubelet * self.size.patch ** 2 * 3   # P
        blocks = nn.Sequential()
        for _ in range(self.size.decoder_depth):
            blocks.append(Layer(width, self.size.decoder_heads))
        norm = nn.LayerNorm(width, eps=1e-6)
        self.decoder = nn.ModuleDict(dict(blocks=blocks, norm=norm, head=nn.Linear(width, values)))
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.trunc_normal_(self.mask_token, std=0.02)

    def forward(self, x, mask_ratio=None):
        """Hide tokens, encode the visible ones, decode, and compare with what was hidden.

        x: (B, 3, H, W) or (B, 3, T, H, W), normalised with IMAGE_MEAN and IMAGE_STD. mask_ratio:
        share of hidden tokens, by default the paper's. Returns (loss, pred, hidden): a scalar, what
        is predicted of the hidden tokens in their order, (B, N - V, P), and the mask, (B, N).
        """
        patches = patchify(x, self.size)                        # (B, N, P)
        batch, tokens = patches.shape[:2]
        ratio = MASK_RATIO[modality(x)] if mask_ratio is None else mask_ratio
        hidden = random_mask(batch, tokens, ratio, x.device)
        count = masked_tokens(tokens, ratio)
        # Visible tokens first, then hidden ones, each in token order.
        order = hidden.to(torch.uint8).argsort(dim=1, stable=True)  # (B, N)
        seen = order[:, :-count]                                # (B, V)
        unseen = order[:, -count:]                              # (B, N - V)

        sample = torch.arange(batch, device=x.device)[:, None]
        # Eq. (1): X_m = X * M, as a selection: hidden tokens never enter the encoder.
        z = self.encoder.encode(patches[sample, seen], self.encoder.positions[seen])
        z = self.encoder_to_decoder(z)                          # (B, V, decoder width)
        mask_tokens = self.mask_token.expand(batch, count, -1).to(z.dtype)
        z = torch.cat([z, mask_tokens], dim=1)                  # (B, N, decoder width)
        z = self.decoder["blocks"](z + self.decoder_positions[order])
        z = self.decoder["norm"](z[:, -count:])                 # (B, N - V, decoder width)
        pred = self.decoder["head"](z)                          # (B, N - V, P)
        target, _, _ = normalised_target(patches[sample, unseen])
        # Eq. (2): L = sum((1 - M) * (X^ - X)^2) / sum(M), where sum(M) counts the visible tokens.
        # Here, as released, it is the mean over the hidden tokens and their values instead.
        loss = F.mse_loss(at_least_fp32(pred), target)
        return loss, pred, hidden


def normalised_target(patches: Tensor):
    """What the decoder must predict: each patch minus its mean, over its deviation, by channel. So
    it makes no difference that `patches` are normalised with IMAGE_MEAN and IMAGE_STD already.

    patches: (B, N - V, P). Returns the target (B, N - V, P) and, to undo it, mean and deviation
    in units of `patches`, (B, N - V, 1, 3) each.
    """
    values = at_least_fp32(patches).unflatten(-1, (-1, 3))      # (B, N - V, P / 3, 3)
    mean = values.mean(dim=2, keepdim=True)
    centred = values - mean
    variance = centred.square().sum(dim=2, keepdim=True) / (values.shape[2] - 1)  # unbiased
    # As released, 1e-6 is added to the variance of pixels in [0, 1]. Ours are divided by std.
    std = channel_values(IMAGE_STD, values.device)
    deviation = (variance + 1e-6 / std.square()).sqrt()
    return (centred / deviation).flatten(2), mean, deviation


# --------------------------------------------- stage 2: mixture of adapter experts, Section III-D

class NoisyTopKGate(nn.Module):
    """Which k of n experts see a token, with what weight. sigma: deviation of the noise in
    training, for which the paper gives no number. Without one, a second linear layer computes it
    for each token and expert, as released and as in Shazeer et al. 2017."""

    def __init__(self, width, experts, k, sigma=None):
        super().__init__()
        self.k = k
        self.sigma = sigma
        self.topkroute_linear = nn.Linear(width, experts)       # W_g, and a bias as released
        self.noise_linear = nn.Linear(width, experts) if sigma is None else None

    def forward(self, x):
        """(..., d) -> weights of the chosen experts, which sum to 1, and their numbers, (..., k)"""
        # Eq. (4): G(x) = Softmax(x W_g). Here only x W_g; the softmax, of k scores, comes last.
        logits = at_least_fp32(self.topkroute_linear(x))        # (..., n)
        if self.training:
            sigma = self.sigma
            if sigma is None:
                sigma = F.softplus(at_least_fp32(self.noise_linear(x)))
            # Eq. (5): H(x) = x W_g + epsilon, of standard deviation sigma
            logits = logits + sigma * torch.randn_like(logits)
        # Eq. (6): G(x) = Softmax(Top-K(H(x), k)), which is 0 for all others
        top, chosen = logits.topk(self.k, dim=-1)               # (..., k) each
        return top.softmax(dim=-1), chosen


class MoAE(nn.Module):
    """Mixture of adapter experts: a gate and n adapters of inner width r, (B, N, d) -> (B, N, d).
    residual: the x in Eq. (8), which the released experts lack."""

    def __init__(self, width, inner, experts=8, k=2, sigma=None, residual=True):
        super().__init__()
        self.residual = residual
        self.router = NoisyTopKGate(width, experts, k, sigma)
        # Each is Eq. (8) without its x.
        self.experts = nn.ModuleList(Mlp(width, inner) for _ in range(experts))

    def forward(self, x):
        weights, chosen = self.router(x)                        # Eqs. (4) to (6), (B, N, k) each
        # What follows computes, per token, `sum(G[i] * (x + experts[i](x)) for i in range(n))`.
        # Adapters are small: all are computed side by side, and those not chosen multiplied by 0.
        w1 = torch.cat([expert.fc1.weight for expert in self.experts])      # (n r, d)
        b1 = torch.cat([expert.fc1.bias for expert in self.experts])        # (n r)
        w2 = torch.cat([expert.fc2.weight for expert in self.experts], 1)   # (d, n r)
        b2 = torch.stack([expert.fc2.bias for expert in self.experts])      # (n, d)
        # Eq. (8): Adapter_i(x) = x + W_2i GELU(W_1i x + b_1i) + b_2i. Here are all n GELUs.
        gelu = F.gelu(F.linear(x, w1, b1))                      # (B, N, n r)
        gelu = gelu.unflatten(-1, (len(self.experts), -1))      # (B, N, n, r)
        gates = gelu.new_zeros(gelu.shape[:-1])                 # G(x), (B, N, n)
        gates = gates.scatter(-1, chosen, weights.to(gelu.dtype))
        # Eq. (7): MoE(x) = sum_i G_i E_i(x). In Eq. (9) the experts E_i are the adapters, so it is
        #     sum_i G_i x + sum_i W_2i (G_i GELU_i) + sum_i G_i b_2i,
        # as the number G_i commutes with W_2i. The first sum is x, as the G_i sum to 1. The second
        # is one product of w2, in which the W_2i lie side by side, with all G_i GELU_i in a row.
        gated = (gates[..., None] * gelu).flatten(-2)           # (B, N, n r)
        out = F.linear(gated, w2) + gates @ b2                  # (B, N, d)
        return x + out if self.residual else out


class S4D(ViT):
    """The encoder with MoAE in some layers, and two linear heads (Section III-C).

    size: of SIZES. image_classes, video_classes: class names in label order. adapter_width: r, a
    quarter of d if None. moae_layers: numbers of the layers with experts, from 0, the last half if
    None. sigma, residual: see NoisyTopKGate and MoAE. expert: "adapter", or "ffn" for ViT-MoE.
    UserError for settings that make no model.
    """

    def __init__(self, size="base", image_classes=(), video_classes=(), experts=8, k=2,
                 adapter_width=None, moae_layers=None, sigma=None, residual=True,
                 expert="adapter"):
        depth, width = SIZES[size].depth, SIZES[size].width
        if adapter_width is None:
            adapter_width = width // 4  # r = d / 4, Section III-D
        if moae_layers is None:
            moae_layers = range(depth - depth // 2, depth)
        moae_layers = sorted(set(moae_layers))
        if not 1 <= k <= experts:
            raise UserError(f"k = {k}: expected 1 to {experts}, the number of experts")
        if not set(moae_layers) <= set(range(depth)):
            raise UserError(f"moae_layers = {moae_layers}: size {size} has layers 0 to {depth - 1}")
        kinds = {"adapter": (MoAE, adapter_width), "ffn": (ViTMoE, 4 * width)}
        mixture, inner = kinds[expert]
        mixtures = {}
        for i in moae_layers:
            mixtures[i] = mixture(width, inner, experts, k, sigma, residual)
        super().__init__(SIZES[size], mixtures)
        if expert == "ffn":
            for i in moae_layers:
                self.blocks[i].mlp = NoFFN()
        # A checkpoint keeps this, and the model is rebuilt from it.
        self.architecture = dict(
            size=size, image_classes=list(image_classes), video_classes=list(video_classes),
            experts=experts, k=k, adapter_width=adapter_width, moae_layers=moae_layers,
            sigma=sigma, residual=residual, expert=expert)
        self.fc_norm = nn.LayerNorm(width, eps=1e-6)
        self.head = nn.ModuleDict()
        if image_classes:
            self.head["image"] = nn.Linear(width, len(image_classes))
        if video_classes:
            self.head["video"] = nn.Linear(width, len(video_classes))
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def features(self, x):
        """What the heads see: normalised images or videos -> (B, d)"""
        patches = patchify(x, self.size)                        # (B, N, P)
        z = self.encode(patches, self.positions[:patches.shape[1]])  # (B, N, d)
        return self.fc_norm(z.mean(dim=1))

    def forward(self, x):
        """Logits of the batch's own head: (B, 3, H, W) -> (B, image classes),
        (B, 3, T, H, W) -> (B, video classes)"""
        head = self.head[modality(x)]
        return head(self.features(x))


# ==============================================================================================
# From here on what no equation needs: ViT-MoE, checkpoints, two tables. Skip it at first.

class NoFFN(nn.Module):
    """In ViT-MoE, which Table V compares, experts replace the FFN: x_g of Eq. (11) is 0."""

    def forward(self, x):
        return 0


class ViTMoE(MoAE):
    """ViT-MoE's experts, FFNs. They are too large to compute them all: each computes its own
    tokens."""

    def forward(self, x):
        weights, chosen = self.router(x)                        # (B, N, k) each
        out = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            sample, token, rank = torch.where(chosen == i)
            weight = weights[sample, token, rank, None].to(x.dtype)
            out[sample, token] += weight * expert(x[sample, token])
        return out


# ---------------------------------------------------------------- checkpoints, ours and released

MODULES = {"pretrain": MaskedAutoencoder, "finetune": S4D}      # by the stage in a checkpoint
RELEASED_NAMES = ("patch_embed.", "blocks.", "norm.", "fc_norm.", "head.image.", "head.video.",
                  "encoder.patch_embed.", "encoder.blocks.", "encoder.norm.",
                  "encoder_to_decoder.", "mask_token", "decoder.")


@contextmanager
def whole_file(path, mode: str = "wb", **options):
    """A file that takes its name when all of it is on the disk. options: of `open`. UserError if it
    cannot be written."""
    part = Path(f"{path}.part")
    try:
        if os.path.exists(path) and not os.path.isfile(path):   # it would make way for a file
            raise OSError("it is a directory, a device or a pipe")
        with open(part, mode, **options) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)          # when it is closed: Windows replaces no open file
    except (OSError, RuntimeError) as error:
        # torch.save makes a RuntimeError of a file's OSError.
        reason = error if isinstance(error, OSError) else error.__context__ or error
        raise UserError(f"{path} cannot be written: {reason}") from error
    finally:
        with suppress(OSError):
            part.unlink()


def read_checkpoint(path) -> dict:
    """The plain dict in a checkpoint: tensors, numbers and text only, so that no code of the file
    runs. Weights alone, as S4D, VideoMAE and MAE-DFER are released, are described as a checkpoint
    of ours. UserError for all else."""
    try:
        if zipfile.is_zipfile(path):    # torch does not compare its checksums
            damaged = zipfile.ZipFile(path).testzip()
            if damaged:
                raise zipfile.BadZipFile(f"the checksum of its part {damaged} is wrong")
        with open(path, "rb") as file:  # of a path, torch would read safetensors, without settings
            contents = torch.load(file, map_location="cpu", weights_only=True)
        checkpoint = contents if "model" in contents else {"model": contents}
        for name, value in checkpoint["model"].items():
            if not value.is_floating_point():
                raise TypeError(f"{name} is {value.dtype}, not floating point")
        if "stage" not in checkpoint:
            return released(checkpoint["model"])
        if checkpoint["stage"] not in list(MODULES):
            raise ValueError("its stage is neither pretrain nor finetune")
        return checkpoint
    except FileNotFoundError as error:
        raise UserError(f"there is no checkpoint {path}") from error
    except Exception as error:          # odd contents lead to errors of every kind
        reason = repr(error)
        if isinstance(error, pickle.UnpicklingError):   # its text advises to run the file's code
            reason = "it holds more than tensors, numbers and text, or torch.save did not write it"
        raise UserError(f"{path} cannot be read as a checkpoint: {reason}. Other codes' files are "
                        f"converted by: python tests/convert.py {path} OUT") from error


def released(state: dict) -> dict:
    """Describe bare weights as a checkpoint of ours, whose names they have. The released
    classifiers have the paper's experts, without the residual of Eq. (8). ValueError for weights of
    another model."""
    sizes = {size.width: name for name, size in SIZES.items()}
    size = None
    for name, value in state.items():
        if name.endswith("patch_embed.proj.weight"):
            size = sizes.get(len(value))
    others = [name for name in state if not name.startswith(RELEASED_NAMES)]
    if size is None or others:
        raise ValueError(f"its weights are not S4D's: {', '.join(others[:3]) or 'another width'}")
    image_classes = unnamed(len(state.get("head.image.weight", [])))
    video_classes = unnamed(len(state.get("head.video.weight", [])))
    if not image_classes + video_classes:
        return dict(stage="pretrain", architecture={"size": size}, model=state)
    layers = {int(name.split(".")[1]) for name in state if ".moe_layer." in name}
    architecture = dict(size=size, image_classes=image_classes, video_classes=video_classes,
                        moae_layers=sorted(layers), residual=False)
    return dict(stage="finetune", architecture=architecture, model=state)


def unnamed(count: int) -> list[str]:
    """Stand-ins for the names of a head's classes, where its file tells only how many there are."""
    return [f"class {i}" for i in range(count)]


def load_checkpoint(path) -> MaskedAutoencoder | S4D:
    """The module of a checkpoint file. UserError if the file, its names or shapes do not fit."""
    return rebuild(read_checkpoint(path), path)


def rebuild(checkpoint: dict, path) -> MaskedAutoencoder | S4D:
    """The module of a checkpoint that was read from `path`. UserError if it describes none."""
    try:
        module = MODULES[checkpoint["stage"]](**checkpoint["architecture"])
    except (UserError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(f"{path} describes no model: {error}") from error
    load_weights(module, checkpoint["model"], path)
    return module


def load_weights(module: nn.Module, state: dict, path) -> None:
    """Copy weights into a module. UserError if a name is missing or not expected, a shape differs
    or a weight is not finite."""
    try:
        module.load_state_dict(state)
    except RuntimeError as error:       # names all that differ, in many lines
        raise UserError(f"{path} does not fit this model: {shorten(str(error), 500)}") from error
    for name, value in state.items():
        if not value.isfinite().all():
            raise UserError(f"{path} does not fit this model: {name} is not finite")


def initialise(model: S4D, checkpoint: dict, path) -> str:
    """Initialise stage 2 from a checkpoint that has been read (Section III-C); returns a line each
    on what was loaded, made new and dropped, and on heads of other classes.

    From stage 1, the experts, the norm of the final representation and the heads are new, and the
    decoder and stage 1's last norm are dropped; ViT-MoE's experts start as copies of the trained
    FFN that they replace. From stage 2, whose experts the model must have, all is taken but heads
    of other classes, or of the same ones in another order.
    """
    theirs, ours = checkpoint["architecture"], model.architecture
    size = theirs["size"]
    if size != ours["size"]:
        raise UserError(f"{path} does not fit this model: this file is size {size}: --size {size}")
    state = {name.removeprefix("encoder."): value for name, value in checkpoint["model"].items()}
    notes = ""
    if checkpoint["stage"] == "finetune":
        may_be_new, not_ours = ["head."], []
        for m in ("image", "video"):
            classes = theirs[f"{m}_classes"]
            if classes and classes != ours[f"{m}_classes"]:
                not_ours.append(f"head.{m}.")
                notes += f"\nthe head of {m}s is dropped: its classes are {', '.join(classes)}"
    else:
        may_be_new = ["moe_layer.", "fc_norm.", "head."]
        not_ours = ["norm.", "decoder.", "encoder_to_decoder.", "mask_token"]
        if ours["expert"] == "ffn":         # copies of the FFN, so that only the gates are new
            may_be_new = ["moe_layer.router.", "fc_norm.", "head."]
            layers = [f"blocks.{i}" for i in ours["moae_layers"]]
            for name in list(state):
                layer, _, part = name.partition(".mlp.")
                if layer in layers:
                    weight = state.pop(name)
                    for j in range(ours["experts"]):
                        state[f"{layer}.moe_layer.experts.{j}.{part}"] = weight

    dropped = [name for name in state if name.startswith(tuple(not_ours))]
    for name in dropped:
        del state[name]
    new = []
    for name, value in model.state_dict().items():
        if name not in state and any(part in name for part in may_be_new):
            state[name] = value
            new.append(name)
    load_weights(model, state, path)
    return (f"loaded: {len(state) - len(new)} tensors of {path}\n"
            f"made new: {parts(new)}\ndropped: {parts(dropped)}{notes}")


def parts(names: list[str]) -> str:
    """The parts of a model, or of its layers, that parameters belong to."""
    found = {re.sub(r"^blocks\.\d+\.", "", name).split(".")[0] for name in names}
    return ", ".join(sorted(found)) or "nothing"


# -------------------------------------------------------------- Tables IV and V: python model.py

def multiply_accumulates(model: MaskedAutoencoder, shape: tuple, ratio: float) -> float:
    """Count stage 1's forward pass of one sample, as if hidden patches were embedded too, which
    they are in the released code."""
    counter = FlopCounterMode(display=False)
    # The counter does not know the fused attention of a CPU.
    with counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        _, _, hidden = model(torch.zeros(shape), mask_ratio=ratio)
    embedding = hidden.sum().item() * model.encoder.patch_embed.proj.weight.numel()
    return counter.get_total_flops() / 2 + embedding    # a multiply-accumulate is two operations


def main() -> None:
    print("Table V, 10^6 parameters in test / training          paper  recounted")
    heads = dict(image_classes=unnamed(7), video_classes=unnamed(7))
    for row, paper, changes in (
            ("ViT", "86 / 86", dict(image_classes=[], moae_layers=[])),
            ("ViT-MTL", "86 / 86", dict(moae_layers=[])),
            ("S4D", "90 / 101", dict()),
            ("ViT-MoE", "115 / 285", dict(expert="ffn"))):
        with torch.device("meta"):
            model = S4D("base", **(heads | changes))
        trained, used = 0, 0
        for name, weight in model.named_parameters():
            millions = weight.numel() / 1e6
            trained += millions
            used += millions / 4 if ".experts." in name else millions   # two of eight a token
        print(f"{row:47}{paper:>11}  {used:.2f} / {trained:.2f}")

    print("Table IV, 10^12 multiply-accumulates of 100 epochs, forward")
    model, image, clip = MaskedAutoencoder("base"), (1, 3, 160, 160), (1, 3, 16, 160, 160)
    for row, paper, epoch in (          # epoch: samples (Table I), their shape, masked share
            ("images, 75 % masked", "8.8e4", [(287_568, image, 0.75)]),
            ("videos, 90 % masked", "1.8e6", [(1_092_009, clip, 0.90)]),
            ("both, 90 and 95 %", "1.4e6", [(287_568, image, 0.90), (1_092_009, clip, 0.95)])):
        cost = 0
        for samples, shape, ratio in epoch:
            cost += 100 * samples * multiply_accumulates(model, shape, ratio)
        print(f"{row:47}{paper:>11}  {cost / 1e12:.2e}")


if __name__ == "__main__":
    main()
