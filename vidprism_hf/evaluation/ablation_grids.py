"""The rows of the ablations: what each changes in the head. A row of several grids is trained once.

Rows speak of 16 frames and the paper's four experts; `{}` is the recipe as it is, which every grid holds, so that its
rows are compared with it.
"""

from typing import Any

# Grid to rows, a row's name to fields of VidPrismConfig, or to `baseline`.
Rows = dict[str, dict[str, Any]]
FOUR = [2, 4, 8, 16]
NO_LOSSES = {"rank_loss_weight": 0.0, "gate_loss_weight": 0.0, "diversity_loss_weight": 0.0}
PLAIN = {"aggregation": "mean", "interaction": "none"}

GRIDS: dict[str, Rows] = {
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
        "RgSTA": {"aggregation": "rgsta"},
    },
    "interaction": {
        "none": {"interaction": "none"},
        "slow to fast": {"interaction": "slow_to_fast"},
        "fast to slow": {"interaction": "fast_to_slow"},
        "both": {"interaction": "both"},
    },
    "readout": {
        "mean": {"readout": "mean"},
        "max": {"readout": "max"},
        "global query": {"readout": "query"},
    },
    "losses": {
        "classification": NO_LOSSES,
        "+ rank": NO_LOSSES | {"rank_loss_weight": 0.1},
        "+ rank, gate": NO_LOSSES | {"rank_loss_weight": 0.1, "gate_loss_weight": 0.01},
        "+ rank, gate, diversity": {
            "rank_loss_weight": 0.1,
            "gate_loss_weight": 0.01,
            "diversity_loss_weight": 0.005,
        },
    },
    # What the paper did not try.
    "merging": {
        "weights over the kept frames, k = 1": {"merge_normalization": "kept"},
        "weights over the rest, k = 1": {"merge_normalization": "rest"},
        "weights over the kept frames, k = 2": {"merge_normalization": "kept", "kept_per_window": 2},
        "weights over the rest, k = 2": {"merge_normalization": "rest", "kept_per_window": 2},
    },
    "gates": {
        "all pairs": {"interaction_pairs": "all"},
        "slow and fast": {"interaction_pairs": "slow_fast"},
        "released code": {
            "interaction_pairs": "slow_fast",
            "interaction_gates": "edge",
            "interaction_update": "last",
        },
    },
    "position": {
        "none": {"time_position": "none"},
        "learned": {"time_position": "learned"},
    },
    # Less of a head, for few clips.
    "small": {
        "as it is": {},
        "mean windows": {"aggregation": "mean"},
        "mean windows, no interaction": PLAIN,
        "the same, learned position": PLAIN | {"time_position": "learned"},
        "the same, mean read-out": PLAIN | {"readout": "mean"},
        "the same, dropout 0.5": PLAIN | {"head_dropout": 0.5},
        "the same, width 256": PLAIN | {"hidden_size": 256},
        "features as they are": {"feature_norm": "none"},
    },
    # Rivals on the same features.
    "baselines": {
        "VidPrism": {},
        "VidPrism, mean windows, no interaction": PLAIN,
        "linear probe on the mean frame": {"baseline": "probe"},
        "linear probe that may weight time": {"baseline": "timed_probe"},
        "transformer of the same size": {"baseline": "transformer"},
        "homogeneous mixture with a router": {"baseline": "mixture"},
    },
}


def grid_rows(names: list[str]) -> list[tuple[str, str, dict[str, Any]]]:
    """Grid, row and changes of some grids, in order; `all` is every grid, the baselines first."""
    first = ["baselines", "small"]
    names = [*first, *(name for name in GRIDS if name not in first)] if "all" in names else names
    return [(grid, row, changes) for grid in dict.fromkeys(names) for row, changes in GRIDS[grid].items()]
