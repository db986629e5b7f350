"""Stage 2: the pre-trained encoder gets experts and two heads, and is fine-tuned on images and clips together.

    torchrun finetune.py --dataset dfew --fold 1              DFEW and AffectNet-7, the paper's settings
    python finetune.py --dataset synthetic                    the same on drawn faces and a tiny model

Each mini-batch comes from one of the two sets and goes through its own head; Eq. (3) is in `JointLoss`. The loop
around it is pretrain.py's `train`. After every epoch the model is tested; the last epoch and the best are reported.

x: a micro-batch as in pretrain.py    labels: (B,)    C classes    n experts    N tokens    d token width
"""
import argparse
import os
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torchvision import tv_tensors
from torchvision.transforms import v2

from data import (Samples, Schedule, Source, TrainingData, dataset_name, digests_of, hold_out, load_samples, short_name,
                  to_float)
from evaluate import evaluate, gate_statistics, table
from model import EXPERT_SETTINGS, S4D, SIZES, UserError, at_least_fp32, initialise, modality, read_checkpoint, rebuild
from pretrain import (Process, Rate, RunFolder, common_settings, decayed, describe, guarded, number, parse, start,
                      train)

# With --size tiny, the default on drawn faces: what learns in minutes on two cores.
TINY = dict(epochs=14, batch_size=16, micro_batch=16, lr=2e-3, warmup_epochs=2, layer_decay=0.9, augment="light",
            mixing=0.0)


def settings() -> argparse.ArgumentParser:
    """Every setting of stage 2; the defaults are the paper's (Section IV-B), where it has none the released code's."""
    p = common_settings(__doc__, TINY)
    p.add_argument("--dataset", default="dfew", type=dataset_name("video", labelled=True, others=("none",)),
                   help="labelled clips, or none")
    p.add_argument("--image-dataset", type=dataset_name("image", labelled=True, others=("none",)),
                   help="labelled images, or none (affectnet-7, or synthetic-images)")
    p.add_argument("--pretrained", help="stage-1 checkpoint, or none (last.pt of pretrain.py's default run)")
    p.add_argument("--epochs", type=number(int, 1), default=100, help="passes over the clips")
    p.add_argument("--batch-size", type=number(int, 1), default=32, help="clips of a step, over all processes")
    p.add_argument("--image-batch-size", type=number(int, 1), help="images of a step (twice the clips)")
    p.add_argument("--lr", type=number(float, 0), default=4e-5, help="peak learning rate, for 32 clips a step")
    p.add_argument("--warmup-epochs", type=number(float, 0), default=5,
                   help="epochs in which the learning rate rises, at most half of all")
    p.add_argument("--layer-decay", type=number(float, 0, 1), default=0.75,
                   help="learning rate of a layer over that of the next")
    p.add_argument("--image-share", type=number(float, 1e-6, 1e3), default=0.5,
                   help="images that an epoch draws, by their number; classes equally often")
    p.add_argument("--augment", choices=["paper", "light"], default="paper", help="light: horizontal flip only")
    p.add_argument("--mixing", type=number(float, 0, 1), default=1.0,
                   help="share of micro-batches with mixup 0.8 or cutmix 1.0")
    p.add_argument("--label-smoothing", type=number(float, 0, 0.99), default=0.1, help="of cross-entropy's targets")
    p.add_argument("--experts", type=number(int, 1, 1024), default=8, help="experts in a MoAE layer, n")
    p.add_argument("--expert", choices=["adapter", "ffn"], default="adapter",
                   help="adapter: beside the FFN; ffn: ViT-MoE, copies of the pre-trained FFN replace it")
    p.add_argument("--k", type=number(int, 1, 1024), default=2,
                   help="experts per token; 1 leaves the gate untrained, as its weight is 1 whatever it says")
    p.add_argument("--adapter-width", type=number(int, 1, 65536), help="width r (a quarter of the token width)")
    p.add_argument("--moae-layers", default="later", help="layers with experts: early, middle, later or alternate "
                   "(half of the layers each), none, or a list as 6,7,8, counted from 0")
    p.add_argument("--sigma", type=number(float, 0), help="fixed deviation of the gate's noise (learned)")
    p.add_argument("--no-residual", action="store_true", help="leave out the residual x of Eq. (8), as released")
    p.add_argument("--balance", type=number(float, 0), default=0.0,
                   help="weight of Switch Transformer's balancing loss (the paper has none)")
    p.add_argument("--validation", type=number(float, 0, 0.99), default=0.0,
                   help="share of the training fold held out to choose the best epoch (0: the test fold chooses)")
    return p


def main() -> None:
    args = parse(settings(), TINY)
    drawn = args.dataset == "synthetic"
    args.image_dataset = args.image_dataset or ("synthetic-images" if drawn else "affectnet-7")
    args.output = args.output or Path("runs") / short_name(args.dataset) / f"fold{args.fold}"
    args.pretrained = args.pretrained or f"runs/pretrain-{'synthetic' if drawn else 'voxceleb2'}/last.pt"
    if args.pretrained != "none":
        args.pretrained = os.path.abspath(args.pretrained)
    process = start(args.size)
    sources, validation, test = draw_from(args)
    folder = RunFolder(process, args, "finetune", {m: source.samples for m, source in sources.items()},
                       validation or test)

    torch.manual_seed(args.seed)
    classes = [sources[m].samples.classes if m in sources else () for m in ("image", "video")]
    model, loaded = build(args, classes, folder.saved)
    model.to(process.device)
    schedule = Schedule(sources, args.seed, args.epochs, process.rank, process.world)
    optimizer, rate = optimisation(args, model, schedule.steps_per_epoch())
    describe(process, args, model, sources, rate, loaded)

    def end_of_epoch() -> dict:
        scores, gates = {}, {}
        for m, samples in (validation or test).items():
            scores[m], observed = evaluate(model, samples, process, args.workers)
            gates[m] = gate_statistics(model, observed.activation)
        return {"score": scores["video" if "video" in scores else "image"]["war"],
                "validation" if validation else "test": scores, "gates": gates}

    objective = JointLoss(model, args.mixing, args.label_smoothing, args.balance)
    train(process, args, folder, model, objective, optimizer, rate, schedule,
          data=TrainingData(sources, "finetune", model.size, args.augment), end_of_epoch=end_of_epoch)
    report(process, args, test, "held-out training data" if validation else "the test fold itself")


def draw_from(args) -> tuple[dict[str, Source], dict[str, Samples], dict[str, Samples]]:
    """Training sources, validation samples (empty without --validation) and test samples, by modality."""
    sources, validation, test = {}, {}, {}
    micro = args.micro_batch or -(-args.batch_size // 2)
    for m, name, fold, batch in (("video", args.dataset, args.fold, args.batch_size),
                                 ("image", args.image_dataset, 1, args.image_batch_size or 2 * args.batch_size)):
        if name == "none":
            continue
        samples, test[m] = (load_samples(name, args.data_root, split, fold, args.stride) for split in ("train", "test"))
        if known := np.isin(digests_of(test[m]), digests_of(samples)).sum():
            raise UserError(f"{known} of the {len(test[m])} test samples of {name} are training samples too")
        if args.validation:
            samples, validation[m] = hold_out(samples, args.validation, args.seed)
        sources[m] = Source(samples, batch, -(-micro * batch // args.batch_size), balanced=m == "image",
                            share=args.image_share if m == "image" else 1.0)
    if not sources:
        raise UserError("--dataset none and --image-dataset none leave nothing to train on")
    return sources, validation, test


def build(args, classes: list, saved: dict | None) -> tuple[S4D, str]:
    """The model, initialised from --pretrained, and what to say of it. A run that goes on (`saved`) does not need that
    file any more. UserError if it is missing or does not fit."""
    if args.expert == "ffn" and (args.no_residual or args.adapter_width):
        raise UserError("--expert ffn has no adapters: --no-residual and --adapter-width do not apply")
    given = saved
    if given is None and args.pretrained != "none":
        if not Path(args.pretrained).exists():
            raise UserError(f"there is no stage-1 checkpoint {args.pretrained}: run pretrain.py first, or give "
                            "--pretrained FILE, or --pretrained none to train from scratch")
        given = read_checkpoint(args.pretrained)
    experts = dict(experts=args.experts, k=args.k, adapter_width=args.adapter_width, sigma=args.sigma,
                   moae_layers=layers_with_experts(args.moae_layers, SIZES[args.size].depth),
                   residual=not args.no_residual, expert=args.expert)
    if given and given["stage"] == "finetune":
        experts = {name: given["architecture"][name] for name in EXPERT_SETTINGS if name in given["architecture"]}
    model = S4D(args.size, *classes, **experts)
    if saved or given is None:
        return model, f"to be continued from {args.output}" if saved else "trained from scratch"
    loaded = initialise(model, given, args.pretrained)
    if given["stage"] == "finetune":
        loaded += f"\nexperts as in that file of stage 2, not as in the settings: {experts}"
    return model, loaded


def optimisation(args, model: S4D, steps_per_epoch: int) -> tuple[torch.optim.AdamW, Rate]:
    """Section IV-B: AdamW with layer-wise decay, and a rate for 32 clips a step, in proportion for others."""
    lr, depth, steps = args.lr * args.batch_size / 32, model.size.depth, args.epochs * steps_per_epoch
    optimizer = torch.optim.AdamW(decayed(model.named_parameters(), args.weight_decay,
                                          lambda name: args.layer_decay ** (depth + 1 - layer_of(name, depth))),
                                  lr, betas=(0.9, 0.999), fused=True)
    warmup = min(int(args.warmup_epochs * steps_per_epoch), steps // 2)
    return optimizer, Rate(lr, warmup, steps, first=1.25e-7, end=1.25e-7)


def layers_with_experts(text: str, depth: int) -> list[int]:
    """Table VIII's positions, "none", or numbers separated by commas. UserError for anything else."""
    half = depth // 2
    positions = {"none": [], "early": range(half), "middle": range(depth // 4, depth // 4 + half),
                 "later": range(depth - half, depth), "alternate": range(1, depth, 2)}
    try:
        return list(positions[text] if text in positions else map(int, text.split(",")))
    except ValueError as error:
        raise UserError(f"--moae-layers {text!r}: expected {', '.join(positions)}, or numbers as 6,7,8") from error


class JointLoss(nn.Module):
    """Cross-entropy of a single-source mini-batch (Section III-C), as the module that DDP wraps."""

    def __init__(self, model: S4D, mixing: float = 0.0, label_smoothing: float = 0.0, balance: float = 0.0):
        super().__init__()
        self.model, self.mixing, self.label_smoothing, self.balance = model, mixing, label_smoothing, balance
        self.mix = {m: v2.RandomChoice([v2.MixUp(alpha=0.8, num_classes=head.out_features),
                                        v2.CutMix(alpha=1.0, num_classes=head.out_features)])
                    for m, head in model.head.items()}

    def forward(self, x: torch.Tensor, labels: torch.Tensor, weight: float = 1.0) -> torch.Tensor:
        x = to_float(x)
        m = modality(x)
        if torch.rand(()) < self.mixing:
            # torchvision mixes five dimensions only of what is called a video. labels: (B, C) from here on
            x, labels = self.mix[m](x if m == "image" else tv_tensors.Video(x), labels)
            x = x.as_subclass(torch.Tensor)
        loss = F.cross_entropy(at_least_fp32(self.model(x)), labels, label_smoothing=self.label_smoothing)
        alpha = 1 if m == "video" else 0
        loss_image, loss_video = (0, loss) if alpha else (loss, 0)          # so that in the end total = loss
        # Eq. (3): L_total = (1 - alpha) L_SFER + alpha L_DFER, of static and of dynamic expressions: images and videos
        total = (1 - alpha) * loss_image + alpha * loss_video
        # The other head's gradient is 0, not None: DDP waits for it, and AdamW's decay and moments go on, as released.
        total = total + 0 * sum(p.sum() for p in self.model.head.parameters())
        if self.balance:
            total = total + self.balance * balancing_loss(self.model)
        return weight * total


def balancing_loss(model: S4D) -> torch.Tensor:
    """n sum_i f_i P_i of Switch Transformer, mean over layers: f_i the share of assignments that expert i got, P_i its
    mean probability before noise and top-k. It is 1 when both are even. 0 for a model without experts."""
    losses = [torch.zeros(())]
    for block in model.blocks:
        if block.moe_layer is not None:
            logits, chosen = block.moe_layer.router.latest
            n = logits.shape[-1]
            share = F.one_hot(chosen, n).flatten(0, -2).float().mean(0)
            losses.append(n * (share * logits.softmax(-1).flatten(0, -2).mean(0)).sum())
    return torch.stack(losses[1:]).mean() if len(losses) > 1 else losses[0]


def layer_of(name: str, depth: int) -> int:
    """Place of a parameter for layer-wise decay: 0 the patch embedding, 1 to depth the layers, depth + 1 the heads."""
    if name.startswith("patch_embed."):
        return 0
    return int(name.split(".")[1]) + 1 if name.startswith("blocks.") else depth + 1


def report(process: Process, args, test: dict[str, Samples], chosen_by: str) -> None:
    """Test the last epoch and the best one, and say which data chose it."""
    process.barrier()                       # the first process writes these files
    for file, title in (("last.pt", "last epoch"), ("best.pt", f"best epoch, chosen by WAR on {chosen_by}")):
        path = args.output / file
        checkpoint = read_checkpoint(path)
        epoch, model = checkpoint["state"]["epoch"], rebuild(checkpoint, path).to(process.device)
        for samples in test.values():
            scores, _ = evaluate(model, samples, process, args.workers)
            if process.main:
                print(f"\n{samples.name}, {len(samples)} test samples, {path}: epoch {epoch}, {title}\n"
                      f"{table(scores, samples.classes)}")


if __name__ == "__main__":
    guarded(main)
