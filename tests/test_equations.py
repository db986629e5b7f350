"""model.py against the paper: every equation, (1) to (13), written out again as plainly as it can be.

The first half of this file transcribes the text of the paper, with loops over tokens, heads, experts and pixels and no
function of model.py: it only reads the modules' parameters. The second half holds model.py against it in float64.
"""
import math
import sys
from functools import cache
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from finetune import JointLoss  # noqa: E402
from data import to_float  # noqa: E402
from model import (MASK_RATIO, S4D, Attention, Layer, MaskedAutoencoder, MoAE, NoisyTopKGate, ViTMoE,  # noqa: E402
                   PatchEmbed, SIZES, UserError, masked_tokens, patchify, random_mask, sincos_table)

TINY = SIZES["tiny"]  # 48 x 48 pixels in 8 x 8 patches: 36 tokens per time slot, few enough for loops in Python
HEAD_WIDTH = 64       # in every ViT of the paper: 768 / 12, and 384 / 6 in the decoder
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


# -------------------------------------------------------------------------- the paper, transcribed: one token at a time

def linear(layer, x):
    return layer.weight @ x + layer.bias


def gelu(x):
    return x / 2 * (1 + torch.erf(x / math.sqrt(2)))


def softmax(x):
    return torch.exp(x) / torch.exp(x).sum()


def layer_norm(norm, x):
    centred = x - x.sum() / len(x)
    return centred / torch.sqrt((centred * centred).sum() / len(x) + 1e-6) * norm.weight + norm.bias


@cache
def position_table(length, width):
    """Sine on even and cosine on odd dimensions, one frequency for the dimensions 2 p and 2 p + 1."""
    rows = [[(math.cos if i % 2 else math.sin)(position / 10000 ** (2 * (i // 2) / width)) for i in range(width)]
            for position in range(length)]
    return torch.tensor(rows, dtype=torch.float64)


def cut(sample):
    """Tokens (3, 4, 8, 8) of an image (3, 48, 48), repeated to four frames, or of a clip (3, T, 48, 48)."""
    clip = torch.stack([sample] * 4, dim=1) if sample.ndim == 3 else sample
    return [clip[:, t:t + 4, y:y + 8, x:x + 8]
            for t in range(0, clip.shape[1], 4) for y in range(0, 48, 8) for x in range(0, 48, 8)]


def in_order(token):
    """A token's values as the decoder predicts them: by frame, row, column, channel."""
    return torch.stack([token[c, t, y, x] for t in range(4) for y in range(8) for x in range(8) for c in range(3)])


def embed(conv, token):
    """A 3-D convolution at the one place that a token is."""
    return conv.bias + sum(conv.weight[:, c, t, y, x] * token[c, t, y, x]
                           for c in range(3) for t in range(4) for y in range(8) for x in range(8))


def attention_rows(attn, heads, tokens):
    """Attention weights [head][query][key]."""
    d = len(tokens[0])
    q = [attn.qkv.weight[:d] @ x + attn.q_bias for x in tokens]
    k = [attn.qkv.weight[d:2 * d] @ x for x in tokens]
    split = [slice(h * d // heads, (h + 1) * d // heads) for h in range(heads)]
    return [[softmax(torch.stack([query[part] @ key[part] for key in k]) / math.sqrt(d / heads)) for query in q]
            for part in split]


def attention(attn, heads, tokens):
    """MHSA of Eq. (10), with biases on queries and values and none on keys."""
    d = len(tokens[0])
    v = [attn.qkv.weight[2 * d:] @ x + attn.v_bias for x in tokens]
    rows = attention_rows(attn, heads, tokens)
    mixed = [torch.cat([sum(rows[h][i][j] * v[j][h * d // heads:(h + 1) * d // heads] for j in range(len(tokens)))
                        for h in range(heads)]) for i in range(len(tokens))]
    return [linear(attn.proj, x) for x in mixed]


def gate(router, k, x, noise=None, sigma=None):
    """Eqs. (4)-(6). noise: standard normal numbers, one per expert; sigma None: the learned one."""
    logits = linear(router.topkroute_linear, x)                                 # x W_g
    if noise is not None:
        if sigma is None:
            sigma = torch.log(1 + torch.exp(linear(router.noise_linear, x)))
        logits = logits + sigma * noise                                         # Eq. (5)
    values = logits.tolist()
    kept = sorted(range(len(values)), key=lambda i: values[i])[-k:]
    suppressed = torch.tensor(-math.inf, dtype=x.dtype)
    return softmax(torch.stack([logits[i] if i in kept else suppressed for i in range(len(logits))]))  # Eqs. (4), (6)


def adapter(expert, x, residual=True):
    """Eq. (8); without its x as released, and as an FFN is."""
    out = linear(expert.fc2, gelu(linear(expert.fc1, x)))
    return x + out if residual else out


def moae(module, k, x, residual=True, noise=None):
    """Eqs. (7) and (9): every expert is computed, weighted and added."""
    gates = gate(module.router, k, x, noise)
    return sum(gates[i] * adapter(expert, x, residual) for i, expert in enumerate(module.experts))


def layer(block, tokens, k=2, residual=True):
    """Eqs. (10)-(13), or a plain ViT layer where there are no experts."""
    attended = attention(block.attn, len(tokens[0]) // HEAD_WIDTH, [layer_norm(block.norm1, x) for x in tokens])
    out = []
    for x, a in zip(tokens, attended):
        x1 = x + a                                                              # Eq. (10)
        normed = layer_norm(block.norm2, x1)
        x_g = linear(block.mlp.fc2, gelu(linear(block.mlp.fc1, normed)))        # Eq. (11)
        x_s = moae(block.moe_layer, k, normed, residual) if block.moe_layer is not None else 0  # Eq. (12)
        out.append(x1 + x_g + x_s)                                              # Eq. (13)
    return out


def target(token):
    """Pixels in [0, 1], each channel normalised by its own mean and unbiased variance over the token's 256 pixels."""
    out = []
    for c in range(3):
        pixels = token[c] * STD[c] + MEAN[c]
        mean = pixels.sum() / 256
        variance = ((pixels - mean) ** 2).sum() / 255
        out.append((pixels - mean) / torch.sqrt(variance + 1e-6))
    return in_order(torch.stack(out))


def reconstruct(model, sample, hidden):
    """Stage 1 for one sample: predictions and targets of its hidden tokens. hidden: bool (N,)."""
    tokens, encoder = cut(sample), model.encoder
    visible = [i for i in range(len(tokens)) if not hidden[i]]
    positions, decoder_positions = position_table(len(tokens), 128), position_table(len(tokens), 64)
    x = [embed(encoder.patch_embed.proj, tokens[i]) + positions[i] for i in visible]  # Eq. (1)
    for block in encoder.blocks:
        x = layer(block, x)
    latent = {i: model.encoder_to_decoder.weight @ layer_norm(encoder.norm, z) for i, z in zip(visible, x)}
    x = [latent.get(i, model.mask_token[0, 0]) + decoder_positions[i] for i in range(len(tokens))]
    for block in model.decoder.blocks:
        x = layer(block, x)
    unseen = [i for i in range(len(tokens)) if hidden[i]]
    predictions = [linear(model.decoder.head, layer_norm(model.decoder.norm, x[i])) for i in unseen]
    return predictions, [target(tokens[i]) for i in unseen]


def represent(model, sample, residual=True):
    """Stage 2's Phi for one sample: all tokens through all layers, their mean, a LayerNorm."""
    tokens = cut(sample)
    positions = position_table(len(tokens), 128)
    x = [embed(model.patch_embed.proj, token) + positions[i] for i, token in enumerate(tokens)]
    for block in model.blocks:
        x = layer(block, x, residual=residual)
    return layer_norm(model.fc_norm, sum(x) / len(x))


def smoothed_cross_entropy(logits, label, smoothing):
    wanted = [(1 - smoothing) * (c == label) + smoothing / len(logits) for c in range(len(logits))]
    return -sum(share * torch.log(probability) for share, probability in zip(wanted, softmax(logits)))


# -------------------------------------------------------------------------------------------------------------- helpers

@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def random_weights(module):
    """The module in float64, without noise, and with no bias or norm left at the 0 or 1 that would hide an error."""
    module.double().eval().requires_grad_(False)
    for parameter in module.parameters():
        parameter.normal_(std=parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.5)
    return module


def autoencoder():
    """A tiny stage 1 with tables in float64 (test_position_tables holds those that it has itself)."""
    model = random_weights(MaskedAutoencoder("tiny"))
    model.encoder.positions, model.decoder_positions = position_table(144, 128), position_table(144, 64)
    return model


def classifier(**settings):
    """A tiny stage 2 with three image and five video classes, and its table in float64."""
    model = random_weights(S4D("tiny", list("abc"), list("vwxyz"), **settings))
    model.positions = position_table(144, 128)
    return model


def batch(modality, frames=8):
    """Two normalised samples. The first token column is all but flat: only there does the target's 1e-6 count."""
    x = torch.randn((2, 3, 48, 48) if modality == "image" else (2, 3, frames, 48, 48), dtype=torch.float64)
    x[..., :8] *= 1e-3
    return x


def some_mask(tokens, count):
    return torch.stack([torch.randperm(tokens) < count for _ in range(2)])


def masked(monkeypatch, model, x, hidden):
    """What an autoencoder returns for this mask, (B, N), in the place of a random one."""
    with monkeypatch.context() as patch:
        patch.setattr("model.random_mask", lambda *given: hidden)
        return model(x, mask_ratio=hidden.double().mean().item())


def fixed_noise(monkeypatch, *shape):
    """What torch.randn_like returns from now on."""
    noise = torch.randn(*shape, dtype=torch.float64)
    monkeypatch.setattr(torch, "randn_like", lambda like: noise)
    return noise


def assert_same(actual, expected, rtol=1e-6, atol=1e-9):
    """actual: a tensor. expected: one of its shape, or nested lists of its rows."""
    def stacked(x):
        return torch.stack([stacked(row) for row in x]) if isinstance(x, list) else x

    torch.testing.assert_close(actual, stacked(expected), rtol=rtol, atol=atol)


# ------------------------------------------------------------------------------------------------- tokens and positions

@pytest.mark.parametrize("modality", ["image", "video"])
def test_tokens_in_their_stated_order_embedded_by_the_released_convolution(modality):
    module, x = random_weights(PatchEmbed(TINY)), batch(modality)
    patches = patchify(x, TINY)
    assert_same(patches, [[in_order(token) for token in cut(s)] for s in x], rtol=0, atol=0)
    assert module.proj.weight.shape == (128, 3, 4, 8, 8)
    assert_same(module(patches), [[embed(module.proj, token) for token in cut(s)] for s in x])


def test_position_tables():
    """They are fixed, as long as the longest clip, and made in float32."""
    stage1, stage2 = MaskedAutoencoder("tiny"), S4D("tiny")
    for table, width in [(stage1.encoder.positions, 128), (stage2.positions, 128), (stage1.decoder_positions, 64)]:
        assert_same(table.double(), position_table(144, width), atol=1e-6)
        assert not table.requires_grad
    assert_same(sincos_table(100, 768).double(), position_table(100, 768), atol=1e-6)
    assert [SIZES["base"].tokens(modality) for modality in ("image", "video")] == [100, 800]


# ------------------------------------------------------------------------------------------------------------ attention

def test_attention_and_its_weights():
    module, x = random_weights(Attention(12, heads=3)), torch.randn(2, 5, 12, dtype=torch.float64)
    assert_same(module(x), [attention(module, 3, list(s)) for s in x])
    keys = module.queries_keys_values(x)[1].transpose(1, 2).flatten(2)
    assert_same(keys, x @ module.qkv.weight[12:24].T)  # no bias, of which the softmax over keys would show nothing
    weights = module.weights(x)  # the map that forward uses and does not return
    assert_same(weights, [attention_rows(module, 3, list(s)) for s in x])
    v = (x @ module.qkv.weight[24:].T + module.v_bias).view(2, 5, 3, 4).transpose(1, 2)
    assert_same(module(x), (weights @ v).transpose(1, 2).reshape(2, 5, 12) @ module.proj.weight.T + module.proj.bias)


# -------------------------------------------------------------------------------------------- stage 1: Eqs. (1) and (2)

@pytest.mark.parametrize("modality, tokens, count", [("image", 36, 25), ("video", 72, 60)])
def test_masked_autoencoder_equations_1_and_2(monkeypatch, modality, tokens, count):
    model, x, hidden = autoencoder(), batch(modality), some_mask(tokens, count)
    loss, pred, used = masked(monkeypatch, model, x, hidden)
    expected, squares = [], []
    for sample, mask in zip(x, hidden):
        predictions, targets = reconstruct(model, sample, mask)
        expected.append(predictions)
        squares += [((p - t) ** 2).sum() / 768 for p, t in zip(predictions, targets)]
    assert torch.equal(used, hidden)
    assert_same(pred, expected)
    assert_same(loss, sum(squares) / (2 * count))  # by the number of hidden tokens: see the README's table


@pytest.mark.parametrize("tokens, ratio, count", [(800, 0.95, 760), (100, 0.90, 90), (36, 0.9, 32), (72, 0.95, 68)])
def test_random_masks_hide_exactly_the_floor_of_the_ratio(tokens, ratio, count):
    hidden = random_mask(6, tokens, ratio)
    assert hidden.dtype == torch.bool and hidden.sum(1).tolist() == [count] * 6
    assert len({tuple(row) for row in hidden.tolist()}) == 6
    often = random_mask(4000, 20, 0.75).double().mean(0)
    assert (often - 0.75).abs().max() < 0.04  # every token alike: 5 standard deviations of a mean of 4000


@pytest.mark.parametrize("modality, ratio, count", [("image", 0.90, 32), ("video", 0.95, 68)])
def test_masks_that_the_autoencoder_draws_itself(monkeypatch, modality, ratio, count):
    assert MASK_RATIO[modality] == ratio
    model, x = autoencoder(), batch(modality)
    loss, pred, hidden = model(x)
    assert hidden.sum(1).tolist() == [count] * 2
    assert_same(masked(monkeypatch, model, x, hidden), (loss, pred, hidden), rtol=0, atol=0)
    assert model(x, mask_ratio=0.5)[2].float().mean() == 0.5


def test_ratios_that_hide_nothing_or_all_are_refused():
    assert masked_tokens(100, 0.29) == 29
    for ratio in (0.0, 0.005, 1.0, 1.5, -0.5):
        with pytest.raises(UserError, match=f"mask ratio {ratio} of 100"):
            masked_tokens(100, ratio)


# ----------------------------------------------------------------------------------------------- the gate: Eqs. (4)-(6)

def gates_of(router, x):
    """G(x), (..., n), of what a gate returns: weights that sum to 1, of k different experts."""
    weights, chosen = router(x)
    assert_same(weights.sum(-1), torch.ones_like(weights[..., 0]))
    assert (chosen.sort(-1).values.diff(dim=-1) > 0).all() and chosen.shape == (*x.shape[:-1], router.k)
    return torch.zeros_like(router.topkroute_linear(x)).scatter(-1, chosen, weights)


@pytest.mark.parametrize("n, k", [(8, 2), (5, 1), (4, 4)])
def test_gate_in_evaluation_has_no_noise(n, k):
    router, x = random_weights(NoisyTopKGate(12, n, k)), torch.randn(2, 7, 12, dtype=torch.float64)
    gates = gates_of(router, x)
    assert_same(gates, [[gate(router, k, token) for token in s] for s in x])
    assert torch.equal(gates, gates_of(router, x))
    if n == k:                              # Eq. (4)
        assert_same(gates, [[softmax(linear(router.topkroute_linear, token)) for token in s] for s in x])


@pytest.mark.parametrize("n, k", [(8, 2), (4, 4)])
@pytest.mark.parametrize("sigma", [None, 0.7])
def test_gate_in_training_adds_noise_of_deviation_sigma(monkeypatch, n, k, sigma):
    router, x = random_weights(NoisyTopKGate(12, n, k, sigma)), torch.randn(2, 7, 12, dtype=torch.float64)
    quiet = gates_of(router, x)
    router.train()
    assert not torch.equal(gates_of(router, x), gates_of(router, x))
    noise = fixed_noise(monkeypatch, 2, 7, n)
    gates = gates_of(router, x)
    assert_same(gates, [[gate(router, k, x[b, i], noise[b, i], sigma) for i in range(7)] for b in range(2)])
    assert not torch.equal(gates, quiet)


# ------------------------------------------------------------------------------------------------ experts: Eqs. (7)-(9)

@pytest.mark.parametrize("layer, residual", [(MoAE, True), (MoAE, False), (ViTMoE, False)])
@pytest.mark.parametrize("n, k, r", [(8, 2, 3), (4, 1, 5), (3, 3, 1), (1, 1, 2)])
def test_expert_layer_equations_7_to_9(layer, n, k, r, residual):
    module = random_weights(layer(12, r, n, k, residual=residual))
    x = torch.randn(2, 7, 12, dtype=torch.float64)
    assert_same(module(x), [[moae(module, k, token, residual) for token in s] for s in x])


@pytest.mark.parametrize("tokens", [7, 2])  # of two tokens, some experts get none
@pytest.mark.parametrize("layer, residual", [(MoAE, True), (MoAE, False), (ViTMoE, False)])
def test_expert_layer_has_the_gradients_of_the_plain_sum(monkeypatch, layer, residual, tokens):
    """In training, so that the learned deviation of the noise has a gradient as well."""
    module = random_weights(layer(12, 3, 4, 2, residual=residual)).train().requires_grad_(True)
    x = torch.randn(2, tokens, 12, dtype=torch.float64, requires_grad=True)
    noise = fixed_noise(monkeypatch, 2, tokens, 4)
    sensitivity = torch.arange(x.numel(), dtype=x.dtype).view_as(x).sin()
    plain = sum(sensitivity[b, i] @ moae(module, 2, x[b, i], residual, noise[b, i])
                for b in range(2) for i in range(tokens))
    wanted = [x, *module.parameters()]
    actual = torch.autograd.grad((module(x) * sensitivity).sum(), wanted)   # an error if one has none
    for one, other in zip(actual, torch.autograd.grad(plain, wanted), strict=True):
        assert_same(one, other)
        assert tokens == 2 or other.abs().max() > 0


@pytest.mark.parametrize("kind, sizes", [(Attention, (128, 2)), (MoAE, (128, 32, 4)), (ViTMoE, (128, 64, 4))])
def test_bf16_is_fp32_up_to_rounding(kind, sizes):
    """On a CPU attention takes another way there; both ways have the same gradients too."""
    torch.manual_seed(0)                    # with other weights a token may be between two experts
    module = kind(*sizes)
    results = []
    for enabled in (False, True):
        module.eval().zero_grad()
        x = torch.randn(2, 36, 128, generator=torch.Generator().manual_seed(0)).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            out = module(x.bfloat16() if enabled else x)
        out.float().square().sum().backward()
        experts = [p.grad for name, p in module.named_parameters() if ".fc" in name]
        results.append([out.float(), x.grad, *experts])
    for exact, rounded in zip(*results):
        assert (exact - rounded).norm() < 0.05 * exact.norm()


def test_a_layer_of_adapters_compiles_whole():
    block, x = Layer(32, 2, MoAE(32, 8, 4, sigma=0.0)).train(), torch.randn(2, 5, 32)
    expected = block(x)
    block.compile(backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(block(x), expected)


# ----------------------------------------------------------------------------------------------- layers: Eqs. (10)-(13)

@pytest.mark.parametrize("experts", [True, False])
def test_layer_equations_10_to_13(experts):
    block = random_weights(Layer(128, 2, MoAE(128, 6, 4, 2) if experts else None))
    x = torch.randn(2, 5, 128, dtype=torch.float64) / 10  # small, so that the norms' 1e-6 shows
    assert_same(block(x), [layer(block, list(s)) for s in x])


# -------------------------------------------------------------------------------------------------- stage 2 and Eq. (3)

@pytest.mark.parametrize("modality, settings", [("image", {}), ("image", {"moae_layers": []}),
                                                ("video", {"moae_layers": [0, 3]})])
def test_s4d_is_the_mean_of_all_tokens_and_the_head_of_its_modality(modality, settings):
    model, x = classifier(**settings), batch(modality)
    phi = [represent(model, sample) for sample in x]
    assert_same(model.features(x), phi)
    assert_same(model(x), [linear(model.head[modality], one) for one in phi])


@pytest.mark.parametrize("chosen, expected", [(None, [2, 3]), ([1], [1]), ([0, 3], [0, 3]), ([], [])])
def test_which_layers_have_experts(chosen, expected):
    model = S4D("tiny", list("abc"), list("vwxyz"), moae_layers=chosen)
    assert [i for i, block in enumerate(model.blocks) if block.moe_layer is not None] == expected


@pytest.mark.parametrize("source, shape", [("image", (2, 3, 48, 48)), ("video", (2, 4, 3, 48, 48))])
def test_joint_loss_equation_3(source, shape):
    """A batch of one source has that source's cross-entropy and no other."""
    model, expected = classifier(), 0
    x, labels = torch.randint(256, shape, dtype=torch.uint8), torch.tensor([2, 0])
    for sample, label in zip(x, labels):
        clip = sample.transpose(0, 1) if source == "video" else sample  # channels first
        pixels = torch.stack([(clip[c].double() / 255 - MEAN[c]) / STD[c] for c in range(3)])
        expected += smoothed_cross_entropy(linear(model.head[source], represent(model, pixels)), int(label), 0.1) / 2
    model.requires_grad_(True).register_forward_pre_hook(lambda module, inputs: inputs[0].double())  # was float32
    loss = JointLoss(model, mixing=0.0, label_smoothing=0.1)(to_float(x), labels)
    assert_same(loss, expected)

    loss.backward()
    other = model.head["video" if source == "image" else "image"]
    assert all((p.grad == 0).all() for p in other.parameters())  # 0, not None: DDP waits for them
    assert all((p.grad != 0).any() for p in [*model.head[source].parameters(), *model.patch_embed.parameters()])


# --------------------------------------------------------------------------------------------- sizes and released names

def affine(name, *shape):
    """A weight, and a bias as long as the weight's first dimension."""
    return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}


def vit_layer(name, d):
    return {f"{name}.attn.qkv.weight": (3 * d, d), f"{name}.attn.q_bias": (d,), f"{name}.attn.v_bias": (d,),
            **affine(f"{name}.attn.proj", d, d), **affine(f"{name}.norm1", d), **affine(f"{name}.norm2", d),
            **affine(f"{name}.mlp.fc1", 4 * d, d), **affine(f"{name}.mlp.fc2", d, 4 * d)}


def shapes_of(model):
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


def test_stage_1_has_the_released_names_and_shapes():
    expected = {**affine("encoder.patch_embed.proj", 768, 3, 2, 16, 16), **affine("encoder.norm", 768),
                "encoder_to_decoder.weight": (384, 768), "mask_token": (1, 1, 384),
                **affine("decoder.norm", 384), **affine("decoder.head", 1536, 384)}
    for i in range(12):
        expected |= vit_layer(f"encoder.blocks.{i}", 768)
    for i in range(4):
        expected |= vit_layer(f"decoder.blocks.{i}", 384)
    with torch.device("meta"):
        assert shapes_of(MaskedAutoencoder("base")) == expected


def test_stage_2_has_the_released_names_and_shapes():
    expected = {**affine("patch_embed.proj", 768, 3, 2, 16, 16), **affine("fc_norm", 768),
                **affine("head.image", 7, 768), **affine("head.video", 11, 768)}
    for i in range(12):
        expected |= vit_layer(f"blocks.{i}", 768)
    for moe in (f"blocks.{i}.moe_layer" for i in range(6, 12)):
        expected |= affine(f"{moe}.router.topkroute_linear", 8, 768) | affine(f"{moe}.router.noise_linear", 8, 768)
        for i in range(8):
            expected |= affine(f"{moe}.experts.{i}.fc1", 192, 768) | affine(f"{moe}.experts.{i}.fc2", 768, 192)
    with torch.device("meta"):
        assert shapes_of(S4D("base", ["face"] * 7, ["face"] * 11)) == expected
