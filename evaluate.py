"""How good a fine-tuned model is: two clips per video, probabilities averaged; UAR, WAR, recall per class, confusion.

    python evaluate.py --checkpoint runs/dfew/fold1/best.pt                 on the test data of its own fold
    torchrun --nproc_per_node 2 evaluate.py --checkpoint ...                the same numbers from two processes

UAR, unweighted average recall, is the mean of the classes' recalls; WAR, weighted average recall, is the accuracy.
"""
import argparse
import json
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from data import DataError, Samples, TestData, catalogue, dataset_name, ensure_synthetic, load_samples, loader, to_float
from model import S4D, CheckpointError, at_least_fp32, read_checkpoint, rebuild, same_classes
from pretrain import Formatter, Run, default_workers, guarded, start


@torch.no_grad()
def predict(model: S4D, samples: Samples, run: Run, workers: int, batch: int = 16) -> np.ndarray:
    """Probabilities (n, C) float64 of all samples, the same in every process.

    Clips of a video: softmax of each, then the mean (Section IV-B). Batches are fixed by the sample order and dealt
    to the processes, so that nothing is padded or counted twice and the numbers do not depend on how many there are.
    DataError names a sample that cannot be read: none is left out.
    """
    model.eval()
    n = len(samples)
    chunks = [list(range(i, min(i + batch, n))) for i in range(0, n, batch)]
    result = torch.zeros(n, len(samples.dataset.classes), dtype=torch.float64)
    batches = loader(TestData(samples, model.size), workers, batch_sampler=chunks[run.rank::run.world])
    for index, views, _ in tqdm(batches, desc=f"evaluating {samples.name}", leave=False,
                                disable=not run.main):
        x = to_float(views.flatten(0, 1).to(run.device))                    # (B v, 3, H, W) or (B v, 3, T, H, W)
        with torch.autocast(run.device.type, run.dtype, enabled=run.dtype != torch.float32):
            logits = model(x)
        probabilities = at_least_fp32(logits).double().softmax(-1).unflatten(0, views.shape[:2]).mean(1)
        result[index] = probabilities.cpu()
    if run.world > 1:
        result = result.to(run.device)
        dist.all_reduce(result)             # every row is zero in all processes but one
    return result.cpu().numpy()


def confusion_matrix(labels: np.ndarray, predictions: np.ndarray, classes: int) -> np.ndarray:
    """Counts (C, C): rows are true classes, columns predicted ones."""
    return np.bincount(labels * classes + predictions, minlength=classes ** 2).reshape(classes, classes)


def metrics(confusion: np.ndarray) -> dict:
    """UAR, WAR, recalls and the majority-class baseline of a confusion matrix, as fractions.

    A class without samples has no recall (None) and is left out of UAR. DataError if there are no samples at all.
    """
    support = confusion.sum(axis=1)
    if not support.sum():
        raise DataError("no samples to evaluate: UAR and WAR are undefined")
    recall = [float(confusion[i, i] / support[i]) if support[i] else None for i in range(len(support))]
    present = [r for r in recall if r is not None]
    return dict(uar=sum(present) / len(present), war=float(np.trace(confusion) / support.sum()), recall=recall,
                majority_uar=1 / len(present), majority_war=float(support.max() / support.sum()),
                confusion=confusion.tolist())


def evaluate(model: S4D, samples: Samples, run: Run, workers: int, batch: int = 16) -> dict:
    """Metrics of the samples' own head. DataError if its classes are not those of the data set."""
    source, classes = samples.dataset.modality, list(samples.dataset.classes)
    if not same_classes(model.architecture[f"{source}_classes"], classes):
        raise DataError(f"the checkpoint's {source} head knows {model.architecture[f'{source}_classes']}, but "
                        f"{samples.name} has {classes}")
    if not len(samples):
        raise DataError(f"{samples.name} has no samples to evaluate")
    predictions = predict(model, samples, run, workers, batch).argmax(1)
    return metrics(confusion_matrix(samples.labels, predictions, len(classes)))


def table(scores: dict, classes: tuple[str, ...]) -> str:
    """Scores as text: UAR and WAR beside the majority baseline, then the confusion matrix with recalls."""
    confusion, width = scores["confusion"], max(8, *(len(name) + 1 for name in classes))
    lines = [f"UAR {scores['uar']:.4f}  WAR {scores['war']:.4f}   (always the most frequent class: "
             f"UAR {scores['majority_uar']:.4f}  WAR {scores['majority_war']:.4f})",
             "true \\ predicted".ljust(17) + "".join(name.rjust(width) for name in classes) + "recall".rjust(9)]
    for name, row, recall in zip(classes, confusion, scores["recall"]):
        shown = "-" if recall is None else f"{recall:.4f}"
        lines.append(name.ljust(17) + "".join(str(count).rjust(width) for count in row) + shown.rjust(9))
    never = [name for i, name in enumerate(classes) if not any(row[i] for row in confusion)]
    if never:
        lines.append(f"never predicted: {', '.join(never)}")
    return "\n".join(lines)


def settings() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=Formatter)
    p.add_argument("--checkpoint", type=Path, required=True, help="best.pt or last.pt of finetune.py")
    p.add_argument("--dataset", type=dataset_name(labelled=True),
                   help="data set to test on (those that the checkpoint was trained on)")
    p.add_argument("--fold", type=int, help="its fold (the checkpoint's)")
    p.add_argument("--data-root", type=Path, default=Path("data"), help="folder of all data sets (layouts: README)")
    p.add_argument("--batch-size", type=int, default=16, help="samples that one process computes at once")
    p.add_argument("--workers", type=int, default=default_workers(), help="loading processes per process")
    p.add_argument("--output", type=Path, help="folder for evaluation.json (the checkpoint's)")
    return p


def main() -> None:
    args = settings().parse_args()
    if args.batch_size < 1 or args.workers < 0:
        settings().error(f"--batch-size {args.batch_size} --workers {args.workers}: expected 1 or more, and 0 or more")
    checkpoint = read_checkpoint(args.checkpoint)
    run = start(checkpoint["architecture"]["size"])
    model = rebuild(checkpoint, args.checkpoint)
    if not isinstance(model, S4D):
        raise CheckpointError(f"{args.checkpoint} is a stage-1 checkpoint of pretrain.py: it reconstructs pixels and "
                              "has no classes; fine-tune it first (finetune.py --pretrained)")
    model.to(run.device)
    trained = checkpoint.get("settings", {})
    if not trained and not args.dataset:
        raise CheckpointError(f"{args.checkpoint} does not say what it was trained on: give --dataset, and --fold")
    datasets = [args.dataset] if args.dataset else [
        trained[f"{source}s"] for source in ("video", "image") if source in model.head]
    ensure_synthetic(datasets, args.data_root, run)
    results = {}
    for name in datasets:
        fold = args.fold if args.fold is not None else trained.get("fold", 1) if catalogue(name).folds > 1 else 1
        samples = load_samples(name, args.data_root, "test", fold, trained.get("stride"))
        scores = evaluate(model, samples, run, args.workers, args.batch_size)
        results[name] = dict(scores, fold=fold, samples=len(samples))
        if run.main:
            folds = f", fold {fold}" if catalogue(name).folds > 1 else ""
            epoch = f" after epoch {checkpoint['progress']['epoch']}" if "progress" in checkpoint else ""
            print(f"\n{name}{folds}: {len(samples)} test samples, {args.checkpoint}{epoch}\n"
                  f"{table(scores, samples.dataset.classes)}")
    if run.main:
        folder = args.output or args.checkpoint.parent
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "evaluation.json").write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    guarded(main)
