"""Scores of a test: averages over views, and the shares of several processes put together."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from vidprism_hf.evaluation.scores import ScoreRecorder, average_views, put_together


def test_averages_over_views():
    """Three views lean to the second class, one is sure of the first: only the logits' mean follows that one."""
    logits = torch.tensor([[[9.0, 0.0], [0.0, 1.0], [0.0, 1.0], [0.0, 1.0]]])
    score, prob = (average_views(logits, how) for how in ("score", "prob"))
    assert torch.allclose(score, torch.tensor([[9 / 4, 3 / 4]]))
    assert torch.allclose(prob.exp(), logits.softmax(-1).mean(1))
    assert (score.argmax().item(), prob.argmax().item()) == (0, 1)
    assert torch.allclose(prob.softmax(-1), prob.exp())


def share(indices, total=7):
    scores = np.arange(total * 3, dtype=np.float32).reshape(total, 3)
    chosen = np.array(indices)
    return [scores[chosen], chosen % 3, chosen != 4, chosen]


def test_uneven_shares_come_back_in_order():
    notes = [{"b": (1, "cut")}, {}, {"a": (0, "empty"), "b": (1, "cut")}]
    parts = [share([0, 3, 6]), share([1, 4]), share([2, 5])]
    whole, together = put_together([share(range(7))], [notes[2]]), put_together(parts, notes)
    for name in ("scores", "labels", "readable"):
        assert np.array_equal(getattr(together, name), getattr(whole, name))
    assert list(together.notes.items()) == [("a", (0, "empty")), ("b", (1, "cut"))]


def test_clips_that_are_scored_twice_are_named():
    parts = [share([0, 1, 5]), share([1, 2, 5])]
    assert put_together(parts, [{}, {}], list("abfbcf")).repeated == ("b", "f")
    assert put_together(parts, [{}, {}]).repeated == ("held-out clip 1", "held-out clip 5")
    parts[1][3] = np.array([3, 2, 4])
    assert put_together(parts, [{}, {}]).repeated == ()
    for part in parts:
        part[3] = np.full(3, -1)  # they are not known
    assert put_together(parts, [{}, {}]).repeated == ()


def test_a_recorder_names_clips_that_come_again():
    """As rows of one path do, whose index is a hash of it."""
    recorder = ScoreRecorder()
    recorder.on_test_epoch_start(None, None)
    for names, index in ((["a", "b"], [5, 3]), (["a"], [5])):
        batch = {"labels": torch.zeros(len(index), dtype=torch.long), "clip_index": torch.tensor(index), "name": names}
        recorder.on_test_batch_end(None, None, {"logits": torch.ones(len(index), 1, 2)}, batch, 0)
    recorder.on_test_epoch_end(None, SimpleNamespace(log_dict=lambda values: None))
    assert recorder.result.repeated == ("a",)


def test_nothing_was_scored():
    with pytest.raises(RuntimeError, match="no clip"):
        put_together([], [{}, {}])
