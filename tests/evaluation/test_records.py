"""Records of evaluations: where they go, what they replace, and what they say beside the figures."""

import dataclasses
import json
import os
import shutil
import threading

import numpy as np
import pytest
import yaml
from small import LABELS, card_facts, complaint, motion_folder, run_arguments, tiny_export

from vidprism_hf.cli import main
from vidprism_hf.data.bad_clips import BadClip
from vidprism_hf.errors import UserError
from vidprism_hf.evaluation import testing
from vidprism_hf.evaluation.compute import Cost
from vidprism_hf.evaluation.evaluate import chose_checkpoint, keep_and_tell, refresh_export
from vidprism_hf.evaluation.metrics import measure
from vidprism_hf.evaluation.records import check_folder, write_evaluation
from vidprism_hf.evaluation.report import CHOSEN, Evaluation, Protocol, print_evaluation
from vidprism_hf.hub import render_card
from vidprism_hf.hub.card import eval_results
from vidprism_hf.hub.card_merge import with_evaluation
from vidprism_hf.training.run_lock import only_run

CLASSES = [f"class {index}" for index in range(6)]


def evaluation(model="model", clips: int = 4, **facts) -> Evaluation:
    """Clips of the first of six classes, of which all but the first are right."""
    scores = np.tile(np.linspace(1, 0, 6, dtype=np.float32), (clips, 1))
    scores[0] = np.arange(6)
    known = {"dataset": "clips", "split": "its own", "num_clips": clips, "cost": Cost(1.0, 1.0), "unreadable": []}
    metrics = measure(scores, np.zeros(clips, dtype=np.int64))
    known |= {"labels": CLASSES, "metrics": metrics, "protocol": Protocol(8)}
    return Evaluation(**known | facts, model=str(model))


def record(folder) -> dict:
    return json.loads((folder / "evaluation.json").read_text())


@pytest.fixture
def models(tmp_path):
    """Folders of two models side by side, and one of a run."""
    folders = [tmp_path / name for name in ("a", "b", "run/export")]
    for folder in folders:
        folder.mkdir(parents=True)
    return folders


def test_each_evaluation_has_a_folder(models, tmp_path, monkeypatch):
    one, two, export = models
    full = evaluation(export)
    assert write_evaluation(full) == tmp_path / "run" / "evaluation" / "clips-8x1x1"
    assert write_evaluation(evaluation(one)) == tmp_path / "evaluation" / "a" / "clips-8x1x1"
    assert write_evaluation(evaluation(two)) == tmp_path / "evaluation" / "b" / "clips-8x1x1"
    others = {
        "clips-8x3x1-stride4-prob-bf16-mixed": {"protocol": Protocol(8, 3, 1, 4, "prob", "bf16-mixed")},
        "clips-8x1x1-partial": {"num_clips": 5},
        "clips-8x1x1.1": {"split": "another"},
        "clips-8x1x1.2": {"sha256": "0"},
        "more-8x1x1": {"dataset": "more"},
    }
    for name, facts in others.items():
        assert write_evaluation(evaluation(export, **facts)).name == name
    assert write_evaluation(evaluation(export, split="another")).name == "clips-8x1x1.1"  # the same again
    assert {path.name for path in (tmp_path / "run" / "evaluation").iterdir()} == {*others, "clips-8x1x1"}
    assert write_evaluation(evaluation(export, clips=3)).name == "clips-8x1x1.3"  # fewer clips replace no more
    assert record(write_evaluation(evaluation(export, clips=6)))["clips"]["evaluated"] == 6
    monkeypatch.chdir(one)
    assert write_evaluation(evaluation(".")) == tmp_path / "evaluation" / "a" / "clips-8x1x1"
    assert list(one.iterdir()) == []


def test_an_output_keeps_what_is_another_evaluation(models, tmp_path):
    one, two, _ = models
    output = str(tmp_path / "out")
    write_evaluation(evaluation(one), output)
    for other, told in (
        (evaluation(two), "that of another model"),
        (evaluation(one, dataset="more"), "that of another dataset"),
        (evaluation(one, protocol=Protocol(8, frame_stride=2)), "that of another protocol"),
    ):
        for work in (check_folder, write_evaluation):
            with pytest.raises(UserError, match=rf"evaluation\.json: is {told}; name another folder"):
                work(other, output)
    fewer = evaluation(one, clips=3, num_clips=4)
    check_folder(fewer, output)
    with pytest.raises(UserError, match="is one of more clips"):
        write_evaluation(fewer, output)
    assert record(tmp_path / "out")["model"] == str(one)
    (tmp_path / "out" / "evaluation.json").write_text("[]")
    with pytest.raises(UserError, match="is no evaluation"):
        check_folder(evaluation(one), output)


def test_what_is_missing_is_told(tmp_path, capsys):
    found = evaluation(missing=tuple("defg"), unreadable=[BadClip("val", "c", CLASSES[0], "cut")])
    print_evaluation(found)
    printed = capsys.readouterr().out
    assert "model on 3 of 8 clips" not in printed
    for words in (
        "model on 3 of 8 held-out clips (4 missing, 1 undecodable) of clips\n",
        "\n4 of 8 listed clips are not on disk and are left out.\n",
        "\nOver all 8, missing ones counted as wrong: top1 0.3750, top5 0.3750.\n",
        "\nMissing: d, e, f and 1 more\n",
        "\nece and the confusion matrix are of the readable clips.\n",
    ):
        assert words in printed
    written = record(write_evaluation(found, str(tmp_path)))
    assert written["missing_counted_wrong"] == {"top1": 0.375, "top5": 0.375}
    assert written["metrics"]["top1"]["value"] == 0.75
    assert written["clips"]["missing"] == list("defg")
    assert written["caveats"] == found.caveats
    # Of a part nothing is known of all.
    partial = evaluation(missing=("d",), num_clips=9)
    assert partial.over_expected == {}
    assert "Only 4 of the 9 held-out clips were evaluated." in partial.caveats
    assert evaluation().caveats == []


def test_scores_that_are_no_numbers_are_told(tmp_path, capsys):
    scores = np.array([[np.nan, 0], [1, 0], [np.inf, 0], [0, -np.inf]], dtype=np.float32)
    metrics = measure(scores, np.zeros(4, dtype=np.int64))
    assert metrics.accuracies["top1"].value == 0.5
    assert metrics.not_finite == 2
    assert evaluation(metrics=metrics).caveats == [
        "The scores of 2 readable clips are no numbers: they count as wrong."
    ]
    nothing = evaluation(metrics=measure(scores[:1], np.zeros(1, dtype=np.int64)), num_clips=1, labels=list(LABELS))
    assert "ece" not in nothing.values
    written = record(write_evaluation(nothing, str(tmp_path)))
    assert (written["clips"]["not_finite"], written["calibration"]["ece"]) == (1, None)
    print_evaluation(nothing)
    assert "nan" not in capsys.readouterr().out


def test_card_and_results_keep_what_others_conditions_gave(tmp_path):
    export = tmp_path / "export"
    export.mkdir()
    facts = {"dataset": "Clips", "dataset_id": "org/clips", "num_evaluated": 4, "split": "its own"}
    conditions = "8 frames x 1 crop x 1 clip; its own"
    card = card_facts(metrics={"top1": 0.75}, protocol="Best of 3.", conditions=conditions, **facts)
    (export / "README.md").write_text(str(render_card(card)))
    first = eval_results("org/clips", card.metrics, conditions, f"{conditions}. Best of 3.")
    assert list(first) == [".eval_results/org--clips.yaml"]
    (export / ".eval_results").mkdir()
    (export / ".eval_results" / "org--clips.yaml").write_bytes(*first.values())

    found = evaluation(export, dataset_id="org/clips", missing=("d",), chose_checkpoint=True)
    assert refresh_export(found, export) == ["README.md", ".eval_results/org--clips.yaml"]
    (top1, top5) = yaml.safe_load((export / ".eval_results" / "org--clips.yaml").read_text())
    assert (top1["value"], top5["value"]) == (0.75, 0.75)
    caveats = (
        "1 of 5 listed clips are not on disk and are left out. Over all 5, missing ones counted as wrong: "
        f"top1 0.6000, top5 0.6000. {CHOSEN}"
    )
    said = f"on 4 of 5 held-out clips (1 missing). A clip that cannot be decoded counts as wrong. {caveats}"
    assert top1["notes"] == f"{conditions}. By vidprism evaluate, {said}"
    text = (export / "README.md").read_text()
    assert f"\nBy `vidprism evaluate`, {said} The metadata of this card have the results of its export.\n" in text

    other = evaluation(export, dataset_id="org/clips", protocol=Protocol(8, 3))
    before = (export / ".eval_results" / "org--clips.yaml").read_bytes()
    for _ in range(2):
        assert ".eval_results/org--clips-2.yaml" in refresh_export(other, export)
    assert (export / ".eval_results" / "org--clips.yaml").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["export"]  # neither lock nor unfinished file


@pytest.mark.parametrize("name", ["README.md", ".eval_results", ".eval_results/org--clips.yaml"])
def test_a_card_is_not_refreshed_through_a_link_that_leaves_the_export(tmp_path, name):
    export, outside = tmp_path / "export", tmp_path / "outside"
    export.mkdir()
    outside.mkdir()
    (export / "README.md").write_text(str(render_card(card_facts())))
    (outside / "file").write_text((export / "README.md").read_text() if name == "README.md" else "- {secret: 1}\n")
    (export / name).parent.mkdir(exist_ok=True)
    (export / name).unlink(missing_ok=True)
    (export / name).symlink_to(outside if name == ".eval_results" else outside / "file")
    with pytest.raises(UserError, match="is a link that leaves the folder"):
        refresh_export(evaluation(export, dataset_id="org/clips"), export)
    assert [path.name for path in outside.iterdir()] == ["file"]


def test_two_evaluations_of_an_export_wait_for_each_other(tmp_path):
    export = tmp_path / "export"
    export.mkdir()
    readme = export / "README.md"
    readme.write_text(str(render_card(card_facts())))
    private = os.umask(0o077)
    try:
        with only_run(export):
            first = with_evaluation(readme.read_text(), "The first", "Its words.")
            second = threading.Thread(target=refresh_export, args=(evaluation(export), export))
            second.start()
            second.join(0.3)
            readme.write_text(first)
        second.join()
    finally:
        os.umask(private)
    assert "\n### The first\n" in readme.read_text()
    assert "\n### On clips (its own), 8 frames x 1 crop x 1 clip\n" in readme.read_text()
    assert readme.stat().st_mode & 0o777 == 0o600


def test_the_card_tells_unreadable_clips_by_class():
    rows = evaluation().classes
    unread = [row | {"unreadable": 1} if row["clips"] else row for row in rows]
    facts = {"metrics": {"mean_class": 0.5}, "num_evaluated": 4, "dataset": "Clips"}
    plain, with_column = (str(render_card(card_facts(per_class=each, **facts))) for each in (rows, unread))
    assert "unreadable" not in plain
    assert "Wilson" not in plain  # of a metric that has no interval
    assert "| class | clips | unreadable | top1 |" in with_column
    assert "| class 0 | 4 | 1 | 0.7500 |" in with_column
    assert "| class 1 | 0 | 0 |  |  |  |" in with_column


@pytest.mark.parametrize(
    ("stride", "words"), [(1, "every frame"), (2, "every 2nd frame"), (4, "every 4th frame"), (13, "every 13th frame")]
)
def test_protocol_in_words(stride, words):
    assert str(Protocol(8, frame_stride=stride)) == f"8 frames x 1 crop x 1 clip, {words}"


def test_whose_clips_chose_the_checkpoint(tmp_path):
    export = tmp_path / "export"
    export.mkdir()
    subject = evaluation(export, sha256="0")
    assert not chose_checkpoint(subject)
    manifest = {"split": "its own", "val": {"clips": 4, "sha256": "0"}, "chosen_on_val": True}
    streamed = manifest | {"val": {"clips": 4, "sha256": None}}
    for split, known in (
        (manifest, True),
        (streamed, True),
        (manifest | {"chosen_on_val": False}, False),
        (manifest | {"val": {"clips": 4, "sha256": "1"}}, False),
        (streamed | {"split": "another"}, False),
        ([], False),
        (manifest | {"val": None}, False),
    ):
        (export / "split.json").write_text(json.dumps(split))
        assert chose_checkpoint(subject) is known


def test_what_was_found_is_printed_though_it_cannot_be_written(models, tmp_path, capsys):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"):
        keep_and_tell(evaluation(models[0]), str(tmp_path / "file" / "x"))
    assert " top1        0.7500 " in capsys.readouterr().out


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return motion_folder(tmp_path_factory.mktemp("records") / "clips", train=1, val=1)


def test_an_output_that_cannot_be_used_ends_it_before_the_work(source, tmp_path, capsys, monkeypatch):
    export = tiny_export(tmp_path / "export")
    write_evaluation(evaluation("another"), str(tmp_path / "out"))
    (tmp_path / "file").touch()
    monkeypatch.setattr(testing, "evaluate_held_out", None)
    monkeypatch.setattr("vidprism_hf.evaluation.evaluate.evaluate_held_out", None)
    command = ["evaluate", str(export), f"--data.source={source}", "--trainer.accelerator=cpu"]
    for name, told in (("out", "is that of another model"), ("file", "cannot be written")):
        assert main([*command, f"--evaluation.output={tmp_path / name}"]) == 1
        assert told in complaint(capsys)


def test_a_part_of_the_final_test_is_told_as_one(source, tmp_path, capsys):
    """By the run's last lines, its metrics.json and its card; and a later evaluation knows who chose."""
    more = ("--data.batch_size=1", "--trainer.limit_test_batches=1", "--trainer.max_epochs=2")
    assert main(run_arguments(source, tmp_path / "run", *more)) == 0
    assert " on 2 clips (only 1 were evaluated); exported to " in capsys.readouterr().out
    counts = json.loads((tmp_path / "run" / "metrics.json").read_text())["clips"]["val"]
    assert (counts["expected"], counts["evaluated"]) == (2, 1)
    record(tmp_path / "run" / "evaluation" / "clips-8x1x1-partial")
    assert CHOSEN in (tmp_path / "run" / "export" / "README.md").read_text()
    export = shutil.copytree(tmp_path / "run" / "export", tmp_path / "copy")
    before = (export / "README.md").read_text().count(CHOSEN)
    arguments = (f"--data.source={source}", "--trainer.accelerator=cpu", "--data.num_workers=0")
    assert main(["evaluate", str(export), *arguments]) == 0
    assert f"\n{CHOSEN}\n" in capsys.readouterr().out
    assert (export / "README.md").read_text().count(CHOSEN) == before + 1


def test_a_training_whose_test_tells_nothing_is_exported(source, tmp_path, capsys, monkeypatch):
    """As of a dataset with a clip in two rows."""
    put_together = testing.ScoreRecorder.on_test_epoch_end

    def twice(recorder, trainer, module):
        put_together(recorder, trainer, module)
        recorder.result = dataclasses.replace(recorder.result, repeated=("a.mp4",))

    monkeypatch.setattr(testing.ScoreRecorder, "on_test_epoch_end", twice)
    assert main(run_arguments(source, tmp_path / "run", "--trainer.max_epochs=1")) == 1
    assert "a.mp4: was evaluated more than once (1 such clips)" in complaint(capsys)
    text = (tmp_path / "run" / "export" / "README.md").read_text()
    assert "\n## Evaluation\n\nNot evaluated: a.mp4: was evaluated more than once" in text
    assert not (tmp_path / "run" / "metrics.json").exists()
