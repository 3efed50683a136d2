"""Grids of the ablations: what each row changes in the recipe's head. A row of several grids is trained once.

Rows assume 16 frames and `recipes/ablations/head.yaml`, the head for small data: window means, no interaction, the mean
of all frames as readout. `{}` is that recipe unchanged. Every grid contains it, or the default of a part that it lacks,
so that rows of a grid differ in one thing.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ..errors import UserError

# Row name to fields of VidPrismConfig, arguments of VidPrismLightningModule, or `baseline`.
Rows = dict[str, dict[str, Any]]
FOUR = [2, 4, 8, 16]
# The paper's head.
PAPER = {"aggregation": "rgsta", "interaction": "both", "readout": "query"}
RGSTA = {"aggregation": "rgsta"}
BOTH = {"interaction": "both"}
NO_LOSSES = {"rank_loss_weight": 0.0, "gate_loss_weight": 0.0, "diversity_loss_weight": 0.0}

GRIDS: dict[str, Rows] = {
    # Other heads on the same features.
    "baselines": {
        "VidPrism, the recipe": {},
        "VidPrism, the recipe at the tower's width": {"hidden_size": None},
        "VidPrism, the paper's head": PAPER,
        "linear probe on the mean frame": {"baseline": "probe"},
        "linear probe on the mean frame, whitened": {"baseline": "whitened_probe"},
        "linear probe that may weight time": {"baseline": "timed_probe"},
        "transformer of the same size": {"baseline": "transformer"},
        "homogeneous mixture with a router": {"baseline": "mixture"},
    },
    # What the recipe does for small data, one thing undone at a time.
    "small": {
        "the recipe": {},
        "features as they are": {"feature_norm": "none"},
        "random residual branches": {"zero_init_residual": False},
        "width 64": {"hidden_size": 64},
        "the tower's width": {"hidden_size": None},
        "the paper's head": PAPER,
        "the paper's head, features as they are, random residual branches": PAPER
        | {"feature_norm": "none", "zero_init_residual": False},
    },
    "training": {
        "the recipe": {},
        "learning rate 2e-3": {"learning_rate": 2e-3},
        "learning rate 3e-4": {"learning_rate": 3e-4},
        "label smoothing 0.1": {"label_smoothing": 0.1},
        "weight decay 1": {"weight_decay": 1.0},
        "dropout 0.5 before the classifier": {"head_dropout": 0.5},
        "the tower's width, learning rate 3e-4": {"hidden_size": None, "learning_rate": 3e-4},
    },
    # The paper's tables.
    "experts": {
        "1 expert: 4": {"rates": [4]},
        "2 experts: 2, 8": {"rates": [2, 8]},
        "3 experts: 2, 4, 8": {"rates": [2, 4, 8]},
        "4 experts: 2, 4, 8, 16": {"rates": FOUR},
    },
    "aggregation": {
        "hard (every r-th frame)": {"aggregation": "stride"},
        "mean": {"aggregation": "mean"},
        "max": {"aggregation": "max"},
        "RgSTA": RGSTA,
    },
    "interaction": {
        "none": {"interaction": "none"},
        "slow to fast": {"interaction": "slow_to_fast"},
        "fast to slow": {"interaction": "fast_to_slow"},
        "both": BOTH,
    },
    "readout": {
        "mean": {"readout": "mean"},
        "max": {"readout": "max"},
        "global query": {"readout": "query"},
    },
    "losses": {
        "the paper's head, classification": PAPER | NO_LOSSES,
        "+ rank": PAPER | NO_LOSSES | {"rank_loss_weight": 0.1},
        "+ rank, gate": PAPER | NO_LOSSES | {"rank_loss_weight": 0.1, "gate_loss_weight": 0.01},
        "+ rank, gate, diversity": PAPER
        | {"rank_loss_weight": 0.1, "gate_loss_weight": 0.01, "diversity_loss_weight": 0.005},
    },
    # Not in the paper.
    "merging": {
        "RgSTA, weights over the kept frames, k = 1": RGSTA | {"merge_normalization": "kept"},
        "weights over the rest, k = 1": RGSTA | {"merge_normalization": "rest"},
        "weights over the kept frames, k = 2": RGSTA | {"merge_normalization": "kept", "kept_per_window": 2},
        "weights over the rest, k = 2": RGSTA | {"merge_normalization": "rest", "kept_per_window": 2},
    },
    "gates": {
        "both directions, all pairs": BOTH | {"interaction_pairs": "all"},
        "slow and fast": BOTH | {"interaction_pairs": "slow_fast"},
    },
    "position": {
        "none": {"time_position": "none"},
        "learned": {"time_position": "learned"},
    },
}


@dataclass(frozen=True)
class Row:
    """One variant.

    Attributes:
        grid: Its grid.
        name: Its name in the grid.
        changes: Fields of VidPrismConfig and arguments of VidPrismLightningModule that differ from the recipe.
        baseline: A probe (probes.PROBES), `transformer` or `mixture` instead of VidPrism's head.
    """

    grid: str
    name: str
    changes: dict[str, Any] = field(default_factory=dict)
    baseline: str | None = None


# What all rows are compared with.
RECIPE, PROBE = Row("", "the recipe"), Row("", "linear probe", baseline="probe")


def grid_rows(grids: Sequence[str]) -> list[Row]:
    """Returns the rows of some grids, in order; `all` is every grid.

    Raises:
        UserError: If there is no such grid.
    """
    if unknown := [grid for grid in grids if grid not in {"all", *GRIDS}]:
        raise UserError(f"grids: no grid {unknown[0]}; there are {', '.join(GRIDS)}")
    rows = []
    for grid in GRIDS if "all" in grids else dict.fromkeys(grids):
        for name, changes in GRIDS[grid].items():
            config = {key: value for key, value in changes.items() if key != "baseline"}
            rows.append(Row(grid, name, config, changes.get("baseline")))
    return rows
