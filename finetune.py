"""Stage 2: the pre-trained encoder gets experts and two heads, and is fine-tuned on images and
clips together.

    torchrun finetune.py --dataset dfew --fold 1    DFEW and AffectNet-7, the paper's settings
    python finetune.py --dataset synthetic          the same on drawn faces and a tiny model

Each mini-batch comes from one of the two sets and goes through its own head; Eq. (3) is in
`JointLoss`. The loop around it is pretrain.py's `train`, which tests the model after every epoch
or every few.

x: a micro-batch as in pretrain.py    labels: (B,)    C classes    n experts    d token width
"""
import argparse
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.transforms import v2

from data import (Samples, Source, TrainingData, dataset_name, hold_out, load_samples, overlap,
                  schedule_epoch, short_name)
from evaluate import evaluate, gate_statistics
from model import (S4D, SIZES, UserError, at_least_fp32, initialise, modality, read_checkpoint)
from pretrain import (Rate, RunFolder, common_settings, count, decayed, describe, guarded,
                      parse, positive, say_next, share, start, train)

# With --size tiny, the default on drawn faces: what learns in minutes on two cores.
TINY = dict(epochs=14, batch_size=16, micro_batch=16, lr=2e-3, warmup_epochs=2, layer_decay=0.9,
            augment="light", mixing=0.0, test_every=2)


def settings() -> argparse.ArgumentParser:
    """Every setting of stage 2. Defaults: the paper's (Section IV-B), else the released code's."""
    p = common_settings(__doc__, TINY)
    add = p.add_argument
    add("--dataset", default="dfew", type=dataset_name, help="labelled clips, or none")
    add("--image-dataset", type=dataset_name,
        help="labelled images, or none (affectnet-7, or synthetic-images)")
    add("--pretrained", help="checkpoint, or none (last.pt of pretrain.py's default run)")
    add("--epochs", type=count, default=100, help="passes over the clips")
    add("--batch-size", type=count, default=32, help="clips of a step, over all processes")
    add("--image-batch-size", type=count, help="images of a step (twice the clips)")
    add("--lr", type=positive, default=4e-5, help="peak learning rate, for 32 clips a step")
    add("--warmup-epochs", type=positive, default=5,
        help="epochs in which the learning rate rises, at most half of all")
    add("--layer-decay", type=share, default=0.75, help="rate of a layer over that of the next")
    add("--image-share", type=positive, default=0.5,
        help="images that an epoch draws, by their number; classes equally often")
    add("--augment", choices=["paper", "light"], default="paper", help="light: flips only")
    add("--mixing", type=share, default=1.0, help="share of micro-batches mixed by mixup or cutmix")
    add("--label-smoothing", type=share, default=0.1, help="of cross-entropy's targets")
    add("--experts", type=count, default=8, help="experts in a MoAE layer, n")
    add("--expert", choices=["adapter", "ffn"], default="adapter",
        help="adapter: beside the FFN; ffn: ViT-MoE, copies of the pre-trained FFN replace it")
    add("--k", type=count, default=2,
        help="experts per token; 1 leaves the gate untrained, as its weight is 1 whatever it says")
    add("--adapter-width", type=count, help="width r (a quarter of the token width)")
    add("--moae-layers", default="later", help="layers with experts: early, middle, later or "
        "alternate (half of the layers each), none, or a list as 6,7,8, counted from 0")
    add("--sigma", type=positive, help="fixed deviation of the gate's noise (learned)")
    add("--no-residual", action="store_true", help="without the residual x of Eq. (8), as released")
    add("--validation", type=share, default=0.0, help="share of the training fold held out to "
        "choose the best epoch, whole people where they are known (0: the test fold chooses)")
    add("--test-every", type=count, default=1, help="epochs from a test to the next")
    return p


def main() -> None:
    args = parse(settings(), TINY)
    drawn = args.dataset == "synthetic"
    if args.image_dataset is None:
        args.image_dataset = "synthetic-images" if drawn else "affectnet-7"
    if args.pretrained is None:
        args.pretrained = f"runs/pretrain-{'synthetic' if drawn else 'voxceleb2'}/last.pt"
    args.output = args.output or Path("runs") / short_name(args.dataset) / f"fold{args.fold}"
    process = start(args.size, args.precision)
    sources, validation, test = draw_from(args)
    samples = {f"train {m}": source.samples for m, source in sources.items()}
    samples |= {f"test {m}": test[m] for m in test}
    folder = RunFolder(process, args, "finetune", samples)

    torch.manual_seed(args.seed)
    classes = [sources[m].samples.classes if m in sources else () for m in ("image", "video")]
    model, loaded = build(args, classes, folder.saved)
    model.to(process.device)
    optimizer, rate = optimisation(args, model, len(schedule_epoch(sources, args.seed, 0)))
    describe(process, args, model, sources, rate, loaded)

    split = "validation" if args.validation else "test"
    tested = validation or test

    def test_now() -> dict:
        scores, gates = {}, {}
        for m, samples in tested.items():
            scores[m], observed = evaluate(model, samples, process, args.workers)
            gates[m] = gate_statistics(model, observed.activation)
        score = scores["video" if "video" in scores else "image"]["war"]
        return {"score": score, split: scores, "gates": gates}

    objective = JointLoss(model, args.mixing, args.label_smoothing)
    data = TrainingData(sources, "finetune", model.size, args.augment)
    state = train(process, args, folder, model, objective, optimizer, rate, data, test_now)
    if process.main:
        chooser = "held-out training data" if validation else "the test fold itself"
        print(f"best.pt is epoch {state['best']['epoch']}, chosen by WAR on {chooser}")
    checkpoint = args.output / ("best.pt" if validation else "last.pt")
    say_next(process, args, "evaluate.py", "--checkpoint", checkpoint, "--report",
             args.output / "report")


def draw_from(args) -> tuple[dict[str, Source], dict[str, Samples], dict[str, Samples]]:
    """Training sources, validation samples (empty without --validation) and test samples, by
    modality. UserError if a test sample is a training sample too."""
    sources, validation, test = {}, {}, {}
    micro = args.micro_batch or math.ceil(args.batch_size / 2)
    image_batch = args.image_batch_size or 2 * args.batch_size
    image_micro = math.ceil(micro * image_batch / args.batch_size)
    for m, name in (("video", args.dataset), ("image", args.image_dataset)):
        if name == "none":
            continue
        fold = args.fold if m == "video" else 1
        samples = load_samples(name, args.data_root, "train", fold, args.stride, args.crop, m)
        if not samples.classes:
            raise UserError(f"{name} has no labels, which stage 2 learns from")
        test[m] = load_samples(name, args.data_root, "test", fold, args.stride, args.crop, m)
        shared = overlap(samples, test[m])
        if shared:
            raise UserError(shared)
        if args.validation:
            samples, validation[m] = hold_out(samples, args.validation, args.seed)
        if m == "video":
            sources[m] = Source(samples, args.batch_size, micro)
        else:
            sources[m] = Source(samples, image_batch, image_micro, args.image_share, balanced=True)
    if not sources:
        raise UserError("--dataset none and --image-dataset none leave nothing to train on")
    return sources, validation, test


def build(args, classes: list, saved: dict | None) -> tuple[S4D, str]:
    """The model, and what to say of its weights: those of --pretrained, or new ones. In a run that
    goes on (`saved`) RunFolder loads them, and --pretrained may be gone. UserError for a file that
    is missing or does not fit."""
    if args.expert == "ffn" and (args.no_residual or args.adapter_width):
        raise UserError("--expert ffn has no adapters for --no-residual or --adapter-width")
    experts = dict(experts=args.experts, k=args.k, adapter_width=args.adapter_width,
                   moae_layers=layers_with_experts(args.moae_layers, SIZES[args.size].depth),
                   sigma=args.sigma, residual=not args.no_residual, expert=args.expert)
    if saved is None and args.pretrained == "none":
        return S4D(args.size, *classes, **experts), "trained from scratch"
    if saved is None and not Path(args.pretrained).exists():
        raise UserError(f"there is no stage-1 checkpoint {args.pretrained}: run pretrain.py "
                        "first, or give --pretrained FILE, or none to train from scratch")
    source = saved or read_checkpoint(args.pretrained)
    note = ""
    if source["stage"] == "finetune":
        theirs = source["architecture"]
        experts = {name: theirs[name] for name in experts if name in theirs}
        note = f"\nexperts as in that file of stage 2, not as in the settings: {experts}"
    model = S4D(args.size, *classes, **experts)
    if saved:
        return model, f"to be continued from {args.output}"
    return model, initialise(model, source, args.pretrained) + note


def optimisation(args, model: S4D, steps_per_epoch: int) -> tuple[torch.optim.AdamW, Rate]:
    """Section IV-B: AdamW with layer-wise decay, and a rate for 32 clips a step, in proportion for
    others."""
    depth = model.size.depth

    def scale(name: str) -> float:
        layer = depth + 1                   # the heads
        if name.startswith("patch_embed."):
            layer = 0
        elif name.startswith("blocks."):
            layer = int(name.split(".")[1]) + 1
        return args.layer_decay ** (depth + 1 - layer)

    lr = args.lr * args.batch_size / 32
    groups = decayed(model.named_parameters(), args.weight_decay, scale)
    optimizer = torch.optim.AdamW(groups, lr, betas=(0.9, 0.999), fused=True)
    steps = args.epochs * steps_per_epoch
    warmup = min(int(args.warmup_epochs * steps_per_epoch), steps // 2)
    return optimizer, Rate(lr, warmup, steps, first=1.25e-7, end=1.25e-7)


def layers_with_experts(text: str, depth: int) -> list[int]:
    """Table VIII's positions, "none", or numbers separated by commas. UserError for others."""
    half = depth // 2
    positions = {
        "none": range(0),
        "early": range(half),
        "middle": range(depth // 4, depth // 4 + half),
        "later": range(depth - half, depth),
        "alternate": range(1, depth, 2),
    }
    if text in positions:
        return list(positions[text])
    try:
        return [int(layer) for layer in text.split(",")]
    except ValueError as error:
        raise UserError(f"--moae-layers {text!r}: expected {', '.join(positions)}, or numbers as "
                        "6,7,8") from error


class JointLoss(nn.Module):
    """Cross-entropy of a mini-batch of one source (Section III-C). A module, as DDP (several
    processes) needs one."""

    def __init__(self, model: S4D, mixing: float = 0.0, label_smoothing: float = 0.0):
        super().__init__()
        self.model = model
        self.mixing = mixing
        self.label_smoothing = label_smoothing
        self.mix = {}
        for m, head in model.head.items():
            mixup = v2.MixUp(alpha=0.8, num_classes=head.out_features)
            cutmix = v2.CutMix(alpha=1.0, num_classes=head.out_features)
            self.mix[m] = v2.RandomChoice([mixup, cutmix])

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        if torch.rand(()) < self.mixing:
            # torchvision mixes images: (B, 3, T, H, W) is taken for images of 3 T channels.
            # Labels are (B, C) from here on.
            mixed, labels = self.mix[modality(x)](x.flatten(1, -3), labels)
            x = mixed.view_as(x)
        logits = at_least_fp32(self.model(x))                       # (B, C)
        # Eq. (3): L_total = (1 - alpha) L_SFER + alpha L_DFER, of images and of videos, where alpha
        # is 0 or 1: it is the loss of the batch's own source
        loss = F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing)
        # The other source's head gets a gradient of 0 instead of none: DDP waits for one, and
        # AdamW's decay and moments go on, as released
        return loss + 0 * sum(p.sum() for p in self.model.head.parameters())


if __name__ == "__main__":
    guarded(main)
