"""Search: which head, trained how, does better than a linear probe of the mean frame where clips are few.

All heads of a row, one for each fold and seed, are trained at once (`torch.func.vmap`), from the frame features that
`vidprism ablate` keeps, so that the clips, folds and options are that verb's. Beside VidPrism's heads stand kernel
ridge regressions, which have no training to go wrong and tell what the features hold: their penalty is the best of
three on the test folds, an upper bound and no result. Held-out clips chose nothing else: heads are tested after their
last step.

    python benchmarks/head_search.py --config recipes/ablations/head.yaml --data.source CLIPS --folds 5
"""

import argparse
import math
import time
from pathlib import Path

import torch
from report import add_report_options, write_report
from torch import nn
from torch.func import functional_call, grad, stack_module_state, vmap
from torch.nn import functional as F

from vidprism_hf.evaluation.ablate import Sweep, check_recipe
from vidprism_hf.evaluation.baselines import standardisation
from vidprism_hf.model import VISION_PRESETS, VidPrismConfig
from vidprism_hf.model.modeling_vidprism import VidPrismTemporalModel
from vidprism_hf.model.temporal_vidprism import (
    VidPrismInteraction,
    expert_diversity_loss,
    gate_balance_loss,
    pool_windows,
)
from vidprism_hf.training.finetune import parse

LINEAR = {"aggregation": "mean", "interaction": "none", "readout": "mean"}
NOISE = {"channel_dropout": 0.5, "noise": 0.5}
PCA = {"start": "pca", "idle_experts": True}
WHITE = {"hidden_size": 128, "start": "white", "idle_experts": True}
# Row to options of `Head` and fields of VidPrismConfig, then to options of `train`.
ROWS = {
    "features as they are": ({}, {"scale": False, "epochs": 30}),
    "standardised": ({}, {"epochs": 30}),
    "+ mean frame added to the clip vector": ({"mean_added": True}, {}),
    "+ mean frame added, projection that varies with time": ({"mean_added": True, "cosines": 2}, {}),
    "PCA start, idle experts, noise": (PCA | NOISE, {}),
    "PCA start, idle experts, noise, a fifth of the rate": (PCA | NOISE, {"rate": 2e-4}),
    "the same, three times the rate, 40 epochs": (PCA | NOISE, {"rate": 3e-3, "epochs": 40}),
    "40 epochs, projection that varies with time": (PCA | NOISE | {"cosines": 2}, {"rate": 3e-3, "epochs": 40}),
    "feature dropout 0.3, three times the rate, 40 epochs": ({"dropout": 0.3}, {"rate": 3e-3, "epochs": 40}),
    "width 128, whitening start, noise": (WHITE | NOISE, {"rate": 2e-3, "epochs": 30}),
    "width 128, whitening start, noise, varies with time": (
        WHITE | NOISE | {"cosines": 2},
        {"rate": 2e-3, "epochs": 30},
    ),
    "width 128, whitening start, noise, plain means": (WHITE | NOISE | LINEAR, {"rate": 2e-3, "epochs": 30}),
}


class Head(nn.Module):
    """VidPrism's temporal model and a classifier, with what the search varies.

    Args:
        size: Channels of the features.
        num_labels: Classes.
        start: Of the input projection: random, "pca" or "white" (PCA with channels of variance 1).
        idle_experts: Whether the experts' layers begin as the identity, but for their norms.
        cosines: Slow cosines of time by which the input projection varies.
        mean_added: Whether the mean frame is added to the clip vector.
        channel_dropout: Share of channels that are dropped in all frames of a clip.
        dropout: Share of numbers that are dropped.
        noise: Deviation of noise on the features.
        config: Fields of VidPrismConfig.
    """

    def __init__(
        self,
        size,
        num_labels,
        start=None,
        idle_experts=False,
        cosines=0,
        mean_added=False,
        channel_dropout=0.0,
        dropout=0.0,
        noise=0.0,
        **config,
    ):
        super().__init__()
        tower = VISION_PRESETS["tiny"]["vision_config"] | {"projection_dim": size}
        fields = {"hidden_size": 64, "num_frames": 16, "attn_implementation": "eager"}
        self.config = VidPrismConfig(vision_config=tower, **fields | config)
        self.temporal = VidPrismTemporalModel._from_config(self.config)
        width = self.config.hidden_size
        self.of_time = nn.ModuleList(nn.Linear(size, width, bias=False) for _ in range(cosines))
        self.classifier = nn.Linear(width, num_labels)
        for layer in (*self.of_time, self.classifier):
            self.temporal._init_weights(layer)
        if idle_experts:
            for expert in self.temporal.experts:
                nn.init.zeros_(expert.attention.out_proj.weight)
                nn.init.zeros_(expert.mlp[2].weight)
        self.start, self.mean_added = start, mean_added
        self.channel_dropout, self.dropout, self.noise = channel_dropout, dropout, noise

    @torch.no_grad()
    def begin(self, frames):
        """Starts the input projection from standardised frames (n, D) of training clips."""
        if self.start is None or self.temporal.input_projection is None:
            return
        weight = self.temporal.input_projection.weight
        some = frames[torch.randperm(len(frames))[:1500]]
        _, size, basis = torch.pca_lowrank(some, len(weight), center=False)
        deviation = size / len(some) ** 0.5
        weight.copy_((basis / (deviation if self.start == "white" else deviation.square().mean().sqrt())).T)

    def forward(self, x, losses=False):
        model, config = self.temporal, self.config
        if losses:
            x = F.dropout(x, self.dropout) * F.dropout(torch.ones_like(x[:, :1]), self.channel_dropout)
            x = x + self.noise * torch.randn_like(x)
        frames = x if model.input_projection is None else model.input_projection(x)
        time = (torch.arange(x.shape[1]) + 0.5) / x.shape[1]
        for order, layer in enumerate(self.of_time, 1):
            frames = frames + 0.5 * torch.cos(math.pi * order * time)[:, None] * layer(x)
        rank_loss = 0.0
        if model.mergers is not None:
            streams, _, _, rank_loss = model.mergers(frames, output_rank_loss=losses)
        else:
            streams = [pool_windows(frames, rate, config.aggregation) for rate in config.rates]
        if model.interaction is not None:
            streams, _ = model.interaction(streams)
        outputs = [expert(stream) for expert, stream in zip(model.experts, streams, strict=True)]
        pooled, weights = model.readout(torch.cat(outputs, dim=1), [output.shape[1] for output in outputs])
        if self.mean_added:
            pooled = pooled + F.layer_norm(frames.mean(dim=1), frames.shape[-1:])
        logits = self.classifier(pooled)
        if not losses:
            return logits
        balance = config.gate_loss_weight * gate_balance_loss(weights.mean(dim=0))
        return logits, balance + config.rank_loss_weight * rank_loss + config.diversity_loss_weight * (
            expert_diversity_loss(outputs)
        )


def message_down(self, stream, length, conv):
    """`VidPrismInteraction._message_down` without unfold, whose gradient vmap takes model by model."""
    step = conv.stride[0]
    count = (stream.shape[1] - 5) // step + 1
    frames = torch.stack([stream[:, tap : tap + step * (count - 1) + 1 : step] for tap in range(5)], dim=-1).flatten(2)
    message = F.linear(frames, conv.weight.flatten(1))
    if message.shape[1] != length:
        message = F.interpolate(message.transpose(1, 2), size=length, mode="linear").transpose(1, 2)
    return message


def train(build, x, y, folds, seeds, rate=1e-3, epochs=25, batch=20, decay=0.05, scale=True):
    """Trains heads for all folds and seeds at once; returns right or not, (seeds, clips), and processor seconds."""
    start, num_labels, count = time.process_time(), int(y.max()) + 1, int(folds.max()) + 1
    heads, shifts, scales, inside, outside = [], [], [], [], []
    for seed in range(seeds):
        for fold in range(count):
            torch.manual_seed(1000 * seed + fold)
            head = build(x.shape[-1], num_labels)
            inside.append((folds != fold).nonzero()[:, 0])
            outside.append((folds == fold).nonzero()[:, 0])
            mean, deviation = standardisation(x[inside[-1]])
            if not scale:
                mean, deviation = torch.zeros_like(mean), torch.ones_like(mean)
            head.begin(((x[inside[-1]] - mean) / deviation).flatten(0, 1))
            heads.append(head)
            shifts.append(mean)
            scales.append(deviation)
    shifts, scales = torch.stack(shifts)[:, None, None], torch.stack(scales)[:, None, None]
    base, (stacked, _) = heads[0], stack_module_state(heads)
    parameters = {name: value.detach().clone().requires_grad_() for name, value in stacked.items()}
    decays = {name: value.dim() > 2 and not name.endswith("readout.query") for name, value in parameters.items()}
    groups = [
        {"params": [parameters[name] for name, its in decays.items() if its == kind], "weight_decay": kind * decay}
        for kind in (True, False)
    ]
    optimizer = torch.optim.AdamW(groups, lr=rate, fused=True)
    used = min(map(len, inside))
    steps = max(1, round(used / batch))
    total, warm = steps * epochs, 0.1 * steps * epochs
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / warm, 0.5 + 0.5 * math.cos(math.pi * max(0, step - warm) / (total - warm))),
    )

    def loss(weights, clips, labels):
        logits, others = functional_call(base, weights, (clips,), {"losses": True})
        return F.cross_entropy(logits, labels) + others

    gradient = vmap(grad(loss), randomness="different")
    generator = torch.Generator().manual_seed(0)
    for _ in range(epochs):
        order = torch.stack([clips[torch.randperm(len(clips), generator=generator)[:used]] for clips in inside])
        for step in range(steps):
            clips = order[:, step * used // steps : (step + 1) * used // steps]
            detached = {name: value.detach() for name, value in parameters.items()}
            for name, value in gradient(detached, (x[clips] - shifts) / scales, y[clips]).items():
                parameters[name].grad = value
            optimizer.step()
            schedule.step()
    right = torch.zeros(seeds, len(y), dtype=torch.bool)
    with torch.no_grad():
        for number, clips in enumerate(outside):
            weights = {name: value[number] for name, value in parameters.items()}
            logits = functional_call(base, weights, ((x[clips] - shifts[number]) / scales[number],))
            right[number // count, clips] = logits.argmax(-1) == y[clips]
    return right, time.process_time() - start


def ridge(kernel, y, folds):
    """Right or not, (clips,), of a kernel ridge regression, with the best of three penalties."""
    best = None
    for penalty in (0.03, 0.1, 0.3):
        right = torch.zeros(len(y), dtype=torch.bool)
        for fold in folds.unique():
            inner, outer = folds != fold, folds == fold
            among, across = kernel[inner][:, inner], kernel[outer][:, inner]
            mean = among.mean(dim=0)
            centred = among - mean - mean[:, None] + among.mean()
            across = across - mean - across.mean(dim=1, keepdim=True) + among.mean()
            size = centred.diagonal().mean()
            wanted = F.one_hot(y[inner]).float()
            eye = penalty * torch.eye(int(inner.sum()))
            scores = across / size @ torch.linalg.solve(centred / size + eye, wanted - wanted.mean(dim=0))
            right[outer] = scores.argmax(-1) == y[outer]
        best = right if best is None or right.sum() > best.sum() else best
    return best


def kernels(x):
    """What the features hold of classes, by kernels between clips (N, N), of features standardised without labels."""
    mean, deviation = standardisation(x)
    x = (x - mean) / deviation

    def linear(z):
        z = z - z.mean(dim=0)
        return z @ z.T / (z @ z.T).diagonal().mean()

    def of_sets(z):  # mean over pairs of frames of a Gaussian of their distance
        squares = torch.cdist(z.flatten(0, 1), z.flatten(0, 1)).square()
        return torch.exp(-0.5 * squares / squares.median()).view(*z.shape[:2], *z.shape[:2]).mean(dim=(1, 3))

    time = (torch.arange(x.shape[1]) + 0.5) / x.shape[1]
    slow = torch.cat([(torch.cos(math.pi * order * time)[:, None] * x).mean(dim=1) for order in (1, 2)], dim=1)
    middle = linear(x.mean(dim=1))
    return {
        "mean frame": middle,
        "mean frame + 0.3 x two slow cosines of time": middle + 0.3 * linear(slow),
        "mean frame + 0.3 x mean absolute change": middle + 0.3 * linear((x[:, 1:] - x[:, :-1]).abs().mean(dim=1)),
        "set of frames": of_sets(x),
        "set of triples of frames, two apart": of_sets(torch.cat([x[:, :-4], x[:, 2:-2], x[:, 4:]], dim=-1)),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--folds", type=int)
    parser.add_argument("--groups")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rows", nargs="*", default=list(ROWS), help="rows to train, by name")
    parser.add_argument("--work", default="runs/head_search", help="folder for the lists of the folds")
    add_report_options(parser, "--report")
    args, recipe = parser.parse_known_args()
    cli = parse([*recipe, f"--output={args.work}"])
    check_recipe(cli)
    x, y, folds = features(Sweep(cli, Path(args.work), args.folds, args.groups))
    VidPrismInteraction._message_down = message_down
    rows = []
    for name, kernel in kernels(x).items():
        rows.append([f"ridge: {name}", f"{100 * ridge(kernel, y, folds).float().mean():.1f}", "", ""])
    for name in args.rows:
        head, training = ROWS[name]
        right, seconds = train(
            lambda size, labels, head=head: Head(size, labels, **head), x, y, folds, args.seeds, **training
        )
        shares = right.float().mean(dim=1)
        spread = f"± {100 * shares.std():.1f}" if args.seeds > 1 else ""
        rows.append([name, f"{100 * shares.mean():.1f}", spread, f"{seconds / args.seeds / len(folds.unique()):.1f}"])
        print(*rows[-1], flush=True)
    about = (
        f"{cli.datamodule.name}: {len(y)} clips of {int(y.max()) + 1} classes in {len(folds.unique())} folds, "
        f"{args.seeds} seeds. Top-1 in per cent over all clips, its deviation over seeds, processor seconds a head."
    )
    write_report("Heads where clips are few", about, ["row", "top-1", "over seeds", "s"], rows, args)


def features(sweep):
    """Features (N, T, D), labels and folds of all clips, each as it is held out."""
    items = [(fold.val[index], number) for number, fold in enumerate(sweep.folds) for index in range(len(fold.val))]
    x = torch.stack([item["frame_features"].float() for item, _ in items])
    return x, torch.tensor([item["labels"] for item, _ in items]), torch.tensor([fold for _, fold in items])


if __name__ == "__main__":
    main()
