"""Stage 2: the pre-trained encoder gets experts and two heads, and is fine-tuned on images and clips together.

    torchrun finetune.py --dataset dfew --fold 1              DFEW and AffectNet-7, the paper's settings
    python finetune.py --dataset synthetic                    the same on synthetic faces and a tiny model

Each mini-batch comes from one of the two sets and goes through its own head; Eq. (3) is in `JointLoss`. The loop
around it is pretrain.py's `train`. After every epoch the model is tested; the last epoch and the best are reported.

x: a micro-batch as in pretrain.py    labels: (B,)    C classes    n experts    N tokens    d token width
"""
import argparse
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torchvision import tv_tensors
from torchvision.transforms import v2

from data import (DataError, Schedule, Source, TrainingData, dataset_name, ensure_synthetic, hold_out, load_samples,
                  short_name, to_float)
from evaluate import evaluate, table
from model import (EXPERT_SETTINGS, S4D, SIZES, CheckpointError, SettingError, at_least_fp32, initialise, modality,
                   read_checkpoint, rebuild)
from pretrain import Rate, RunFolder, common_settings, decayed, describe, guarded, parse, start, train

# With --size tiny, the default on synthetic faces: what learns in minutes on two cores.
TINY = dict(epochs=14, batch_size=16, lr=2e-3, warmup_epochs=2, layer_decay=0.9, augment="light", mixing=0.0)


def settings() -> argparse.ArgumentParser:
    """Every setting of stage 2; the defaults are the paper's (Section IV-B)."""
    p = common_settings(__doc__, TINY, "Table V: ViT --image-dataset none --moae-layers none; ViT-MTL --moae-layers "
                        "none; S4D (the default); ViT-MoE --expert ffn. Table IV, 1: --pretrained none. Table VI: "
                        "images only --dataset none; clips only --image-dataset none; VideoMAE is ViT with a stage 1 "
                        "of videos only. Table VIII: --moae-layers early, middle, later, alternate. Fig. 3: --experts, "
                        "--moae-layers 8,9,10,11, --image-share.")
    p.add_argument("--dataset", default="dfew", type=dataset_name("video", labelled=True, others=("none",)),
                   help="labelled clips, or none")
    p.add_argument("--image-dataset", type=dataset_name("image", labelled=True, others=("none",)),
                   help="labelled images, or none (affectnet-7, or synthetic-images)")
    p.add_argument("--pretrained", help="stage-1 checkpoint, or none (last.pt of pretrain.py's default run)")
    p.add_argument("--epochs", type=int, default=100, help="passes over the clips")
    p.add_argument("--batch-size", type=int, default=32, help="clips of one optimiser step, over all processes")
    p.add_argument("--image-batch-size", type=int, help="images of one optimiser step (twice the clips)")
    p.add_argument("--lr", type=float, default=4e-5, help="peak learning rate for 32 clips; in proportion for others")
    p.add_argument("--warmup-epochs", type=float, default=5, help="epochs in which the learning rate rises")
    p.add_argument("--weight-decay", type=float, default=0.05, help="of weight matrices; biases and norms have none")
    p.add_argument("--layer-decay", type=float, default=0.75, help="learning rate of a layer over that of the next")
    p.add_argument("--image-share", type=float, default=0.5, help="images that an epoch draws, by their number; "
                   "classes equally often")
    p.add_argument("--augment", choices=["paper", "light"], default="paper", help="light: horizontal flip only")
    p.add_argument("--mixing", type=float, default=1.0, help="share of micro-batches with mixup 0.8 or cutmix 1.0")
    p.add_argument("--label-smoothing", type=float, default=0.1, help="of the cross-entropy's targets")
    p.add_argument("--experts", type=int, default=8, help="experts in a MoAE layer, n")
    p.add_argument("--expert", choices=["adapter", "ffn"], default="adapter",
                   help="adapter: beside the FFN; ffn: ViT-MoE, copies of the pre-trained FFN replace it")
    p.add_argument("--k", type=int, default=2, help="experts per token")
    p.add_argument("--adapter-width", type=int, help="bottleneck width r (a quarter of the token width)")
    p.add_argument("--moae-layers", default="later", help="layers with experts: early, middle, later or alternate "
                   "(half of the layers each), none, or a list as 6,7,8")
    p.add_argument("--sigma", type=float, help="fixed deviation of the gate's noise (learned per token and expert)")
    p.add_argument("--no-residual", action="store_true", help="leave out the residual x of Eq. (8)")
    p.add_argument("--balance", type=float, default=0.0, help="weight of Switch's balancing loss (the paper: none)")
    p.add_argument("--as-released", action="store_true",
                   help="follow the released code where it departs from the paper: --no-residual --balance 1e-3")
    p.add_argument("--validation", type=float, default=0.0,
                   help="share of the training fold held out to choose the best epoch (0: the test fold chooses)")
    return p


def layers_with_experts(text: str, depth: int) -> list[int]:
    """Table VIII's positions, "none", or numbers separated by commas. SettingError for anything else."""
    half = depth // 2
    positions = {"none": [], "early": range(half), "middle": range(depth // 4, depth // 4 + half),
                 "later": range(depth - half, depth), "alternate": range(1, depth, 2)}
    try:
        return list(positions[text] if text in positions else map(int, text.split(",")))
    except ValueError as error:
        raise SettingError(f"--moae-layers {text!r}: expected {', '.join(positions)}, or numbers as 6,7,8") from error


def main() -> None:
    args = parse(settings(), TINY)
    run = start(args.size)
    synthetic = args.dataset == "synthetic"
    args.videos, args.images = args.dataset, args.image_dataset or ("synthetic-images" if synthetic else "affectnet-7")
    if args.as_released:
        args.no_residual, args.balance = True, args.balance or 1e-3
    if args.expert == "ffn" and (args.no_residual or args.adapter_width):
        raise SettingError("--expert ffn has no adapters: --no-residual, --as-released, --adapter-width do not apply")
    args.output = args.output or Path("runs") / short_name(args.dataset) / f"fold{args.fold}"
    args.pretrained = args.pretrained or f"runs/pretrain-{'synthetic' if synthetic else 'voxceleb2'}/last.pt"
    sources, validation, test = load_sources(args, run)
    folder = RunFolder(args, "finetune", sources, validation or test)

    torch.manual_seed(args.seed)
    classes = [sources[name].samples.dataset.classes if name in sources else () for name in ("image", "video")]
    experts = dict(experts=args.experts, k=args.k, adapter_width=args.adapter_width, sigma=args.sigma,
                   moae_layers=layers_with_experts(args.moae_layers, SIZES[args.size].depth),
                   residual=not args.no_residual, expert=args.expert)
    given = folder.saved                    # a run that goes on no longer needs the file that it started from
    if given is None and args.pretrained != "none":
        if not Path(args.pretrained).is_file():
            raise CheckpointError(f"there is no stage-1 checkpoint {args.pretrained}: run pretrain.py first, or give "
                                  "--pretrained FILE, or --pretrained none to train from scratch")
        given = read_checkpoint(args.pretrained)
    if given and given["stage"] == "finetune":
        experts = {name: given["architecture"][name] for name in EXPERT_SETTINGS if name in given["architecture"]}
    model = S4D(args.size, *classes, **experts).to(run.device)
    loaded = "trained from scratch"
    if folder.saved:
        loaded = f"to be continued from {args.output}"
    elif given:
        loaded = initialise(model, given, args.pretrained)
        if given["stage"] == "finetune":
            loaded += f"\nexperts as in that file of stage 2, not as in the settings: {experts}"
    del given                               # its weights and moments, which would stay in memory while training
    lr = args.lr * args.batch_size / 32
    depth = model.size.depth
    optimizer = torch.optim.AdamW(decayed(model.named_parameters(), args.weight_decay,
                                          lambda name: args.layer_decay ** (depth + 1 - layer_of(name, depth))),
                                  lr, betas=(0.9, 0.999), fused=True)
    schedule = Schedule(sources, args.seed, args.epochs, run.rank, run.world)
    per_epoch = schedule.steps_per_epoch()
    describe(run, args, model, sources, args.epochs * per_epoch, lr, loaded)
    rate = Rate(lr, int(args.warmup_epochs * per_epoch), args.epochs * per_epoch, first=1.25e-7, end=1.25e-7)

    def end_of_epoch() -> dict:
        scores = {name: evaluate(model, part, run, args.workers)[0] for name, part in (validation or test).items()}
        return {"score": scores["video" if "video" in scores else "image"]["war"],
                "validation" if validation else "test": scores, "gates": module.gates.summary(run)}

    module = JointLoss(model, args.mixing, args.label_smoothing, args.balance)
    train(run, args, folder, model, module, optimizer, rate, schedule,
          TrainingData(sources, "finetune", model.size, args.augment), end_of_epoch, module.gates.counts)
    report(run, args, test, "held-out training data" if validation else "the test fold itself")


def load_sources(args, run) -> tuple[dict, dict, dict]:
    """Training sources, validation samples (empty without --validation) and test samples, by modality."""
    if args.videos == args.images == "none":
        raise DataError("--dataset none and --image-dataset none leave nothing to train on")
    ensure_synthetic([args.videos, args.images], args.data_root, run)
    sources, validation, test = {}, {}, {}
    batches = {"video": args.batch_size, "image": args.image_batch_size or 2 * args.batch_size}
    micro = args.micro_batch or -(-args.batch_size // 2)
    for name, batch in batches.items():
        if getattr(args, f"{name}s") == "none":
            continue
        fold = args.fold if name == "video" else 1
        samples = load_samples(getattr(args, f"{name}s"), args.data_root, "train", fold, args.stride)
        test[name] = load_samples(samples.name, args.data_root, "test", fold, args.stride)
        if args.validation:
            samples, validation[name] = hold_out(samples, args.validation, args.seed)
        sources[name] = Source(samples, batch, -(-micro * batch // args.batch_size),
                               share=args.image_share if name == "image" else 1.0, balanced=name == "image")
    return sources, validation, test


class JointLoss(nn.Module):
    """Cross-entropy of a single-source mini-batch (Section III-C), as the module that DDP wraps."""

    def __init__(self, model: S4D, mixing: float = 0.0, label_smoothing: float = 0.0, balance: float = 0.0):
        super().__init__()
        self.model, self.mixing, self.label_smoothing, self.balance = model, mixing, label_smoothing, balance
        self.gates = Gates(model)
        self.mix = {name: v2.RandomChoice([v2.MixUp(alpha=0.8, num_classes=head.out_features),
                                           v2.CutMix(alpha=1.0, num_classes=head.out_features)])
                    for name, head in model.head.items()}

    def forward(self, x: torch.Tensor, labels: torch.Tensor, weight: float = 1.0) -> torch.Tensor:
        x = to_float(x)
        source = modality(x)
        if torch.rand(()) < self.mixing:
            x, labels = self.mix[source](x if source == "image" else tv_tensors.Video(x), labels)  # labels: (B, C)
            x = x.as_subclass(torch.Tensor)
        # Times 0 in Eq. (3), a sum of the other head's weights gives them a gradient of 0, which DDP waits for; AdamW's
        # decay and momentum go on there, as for any gradient of 0.
        loss = {name: sum(p.sum() for p in head.parameters()) for name, head in self.model.head.items()}
        loss[source] = F.cross_entropy(at_least_fp32(self.model(x)), labels, label_smoothing=self.label_smoothing)
        alpha = 1 if source == "video" else 0
        # Eq. (3): L_total = (1 - alpha) L_SFER + alpha L_DFER
        total = (1 - alpha) * loss.get("image", 0) + alpha * loss.get("video", 0)
        if self.balance:
            total = total + self.balance * self.gates.balancing_loss()
        self.gates.count(source, weight)
        return weight * total


class Gates:
    """Watches the gates of all layers with experts while the model trains: how tokens spread over the experts."""

    def __init__(self, model: S4D):
        self.routers = {i: block.moe_layer.router for i, block in enumerate(model.blocks)
                        if block.moe_layer is not None}
        self.last = {}                      # layer: the latest batch's (tokens' features, gates)
        experts = model.architecture["experts"]
        self.counts = {source: torch.zeros(len(self.routers), experts, dtype=torch.float64,
                                           device=model.positions.device)
                       for source in model.head if self.routers}  # modality: (layers, n) tokens an expert received
        for i, router in self.routers.items():
            router.register_forward_hook(partial(self.watch, i))

    def watch(self, layer: int, router: nn.Module, inputs: tuple, gates: torch.Tensor) -> None:
        if router.training:
            self.last[layer] = inputs[0], gates

    def count(self, source: str, weight: float) -> None:
        """Add the latest batch to the counts, unless a process without one of its own repeats it, and let go of it."""
        if self.last and weight:
            self.counts[source] += torch.stack([(gates > 0).flatten(0, 1).sum(0) for _, gates in self.last.values()])
        self.last.clear()

    def balancing_loss(self) -> torch.Tensor:
        """n sum_i f_i P_i of Switch Transformer, mean over layers: f_i the share of assignments that expert i got, P_i
        its mean probability before noise and top-k. It is 1 when both are even."""
        losses = []
        for layer, (x, gates) in self.last.items():
            share = (gates > 0).flatten(0, 1).float().mean(0) / self.routers[layer].k
            probability = at_least_fp32(self.routers[layer].topkroute_linear(x)).softmax(-1).flatten(0, 1).mean(0)
            losses.append(len(share) * (share * probability).sum())
        return torch.stack(losses).mean() if losses else torch.zeros(())

    def summary(self, run) -> dict:
        """Per modality and layer since the last call: each expert's share of assignments, and the coefficient of
        variation of these shares (0 = even)."""
        result = {}
        for source in sorted(self.counts):
            counts = run.sum(self.counts[source])
            if not counts.any():
                continue
            share = counts / counts.sum(1, keepdim=True)
            variation = share.std(1, unbiased=False) / share.mean(1)
            result[source] = {layer: dict(share=[round(value, 4) for value in row], cv=round(cv, 4)) for layer, row, cv
                              in zip(self.routers, share.tolist(), variation.tolist())}
            counts.zero_()
        return result


def layer_of(name: str, depth: int) -> int:
    """Place of a parameter for layer-wise decay: 0 the patch embedding, 1 to depth the layers, depth + 1 the heads."""
    if name.startswith("patch_embed."):
        return 0
    return int(name.split(".")[1]) + 1 if name.startswith("blocks.") else depth + 1


def report(run, args, test: dict, chosen_by: str) -> None:
    """Test the last epoch and the best one, and say which data chose it."""
    for file, title in (("last.pt", "last epoch"), ("best.pt", f"best epoch, chosen by WAR on {chosen_by}")):
        run.barrier()                       # the first process writes these files
        path = args.output / file
        checkpoint = read_checkpoint(path)
        epoch, model = checkpoint["progress"]["epoch"], rebuild(checkpoint, path).to(run.device)
        for samples in test.values():
            scores, _ = evaluate(model, samples, run, args.workers)
            if run.main:
                print(f"\n{samples.name}, {len(samples)} test samples, {path}: epoch {epoch}, {title}\n"
                      f"{table(scores, samples.dataset.classes)}")


if __name__ == "__main__":
    guarded(main)
