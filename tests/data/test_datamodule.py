"""The data module: from a source to normalised batches, inside Lightning and alone."""

import json
import shutil

import lightning as L
import pytest
import torch
from clips import greys, render
from jsonargparse import ArgumentParser

from vidprism_hf.data import DEMO_CLASSES, DataError, VideoDataModule
from vidprism_hf.data.loading.views import mirror_label
from vidprism_hf.model import VidPrismVideoProcessor


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two labels with five training clips and three held-out clips each."""
    root = tmp_path_factory.mktemp("data") / "moves"
    for label, split, count in (("a", "train", 5), ("b", "train", 5), ("a", "val", 3), ("b", "val", 3)):
        (root / split / label).mkdir(parents=True)
        for number in range(count):
            render(root / split / label / f"{number}.mp4", greys(6 + number))
    return root


def module(folder, **settings):
    settings = {"processor": "tiny", "num_frames": 4, "batch_size": 4, "num_workers": 0} | settings
    return VideoDataModule(str(folder), **settings)


TENSORS = ("pixel_values_videos", "labels", "clip_index", "readable")


def collect(loader, epochs=2):
    batches = []
    for epoch in range(epochs):
        loader.sampler.set_epoch(epoch)
        batches += list(loader)
    return batches


def test_batches(folder):
    data = module(folder)
    data.setup("fit")
    batches = list(data.train_dataloader())
    assert [len(batch["labels"]) for batch in batches] == [4, 4, 2]  # the last one is kept
    assert batches[0]["pixel_values_videos"].shape == (4, 4, 3, 32, 32)
    assert batches[0]["pixel_values_videos"].dtype == torch.uint8
    assert batches[0]["labels"].dtype == torch.int64
    assert sorted(torch.cat([batch["clip_index"] for batch in batches]).tolist()) == list(range(10))
    for loader in (data.val_dataloader(), data.test_dataloader()):
        labels = torch.cat([batch["labels"] for batch in loader])
        assert labels.tolist() == [0, 0, 0, 1, 1, 1]


@pytest.mark.parametrize("loader", ["train_dataloader", "val_dataloader"])
def test_workers_do_not_change_the_batches(folder, loader):
    alone, helped = (collect(getattr(module(folder, num_workers=n), loader)()) for n in (0, 2))
    assert len(alone) == len(helped)
    for one, two in zip(alone, helped, strict=True):
        assert one.keys() == two.keys()
        assert one["bad_clips"] == two["bad_clips"] == []
        assert all(torch.equal(one[key], two[key]) for key in TENSORS)


def test_batch_size_does_not_change_the_clips(folder):
    four, three = (collect(module(folder, batch_size=size).train_dataloader()) for size in (4, 3))
    for key in TENSORS:
        assert torch.equal(*(torch.cat([batch[key] for batch in batches]) for batches in (four, three)))


def test_seed_changes_the_batches(folder):
    one, two = (collect(module(folder, seed=seed).train_dataloader(), epochs=1)[0] for seed in (0, 1))
    assert not torch.equal(one["pixel_values_videos"], two["pixel_values_videos"])


def test_normalised_pixels_equal_the_processors_full_output(folder):
    data = module(folder)
    batch = data.on_after_batch_transfer(next(iter(data.val_dataloader())), 0)
    paths = [data.val_table.video(index) for index in batch["clip_index"].tolist()]
    served = data.video_processor(paths, return_tensors="pt")["pixel_values_videos"]
    assert batch["pixel_values_videos"].dtype == torch.float32
    torch.testing.assert_close(batch["pixel_values_videos"], served, rtol=0, atol=2e-6)


class Recorder(L.LightningModule):
    """Does nothing but to remember what it is given."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.epochs, self.held_out = {}, []

    def training_step(self, batch, _):
        assert batch["pixel_values_videos"].dtype == torch.float32
        self.epochs.setdefault(self.current_epoch, []).extend(batch["clip_index"].tolist())
        return self.weight * batch["pixel_values_videos"].mean()

    def validation_step(self, batch, _):
        self.held_out.extend(batch["clip_index"].tolist())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_in_a_trainer_each_epoch_has_its_own_order(folder, tmp_path):
    data, recorder = module(folder, num_workers=1), Recorder()
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=3,
        default_root_dir=tmp_path,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(recorder, datamodule=data)
    assert [sorted(order) for order in recorder.epochs.values()] == [list(range(10))] * 3
    assert len({tuple(order) for order in recorder.epochs.values()}) == 3
    for epoch, order in recorder.epochs.items():
        sampler = data.train_dataloader().sampler
        sampler.set_epoch(epoch)
        assert order == [index for _, index in sampler]
    assert recorder.held_out == list(range(6)) * 3
    # A checkpoint with anything but primitives could not be loaded with weights_only=True.
    (checkpoint,) = (tmp_path / "checkpoints").glob("*.ckpt")
    saved = torch.load(checkpoint, weights_only=True)["datamodule_hyper_parameters"]
    assert json.loads(json.dumps(dict(saved))) == dict(data.hparams)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_resumed_run_begins_with_its_epoch(folder, tmp_path, workers):
    """Lightning asks for the first clips before it tells the epoch."""

    def fit(epochs, checkpoint=None):
        recorder = Recorder()
        trainer = L.Trainer(
            accelerator="cpu",
            max_epochs=epochs,
            default_root_dir=tmp_path,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
        )
        trainer.fit(recorder, datamodule=module(folder, num_workers=workers), ckpt_path=checkpoint, weights_only=True)
        trainer.save_checkpoint(tmp_path / "last.ckpt")
        return recorder.epochs

    whole = fit(3)
    fit(2)
    assert fit(3, tmp_path / "last.ckpt")[2] == whole[2]


def test_labels_of_the_demo_are_known_before_it_is_rendered(tmp_path):
    data = VideoDataModule("demo", root=str(tmp_path))
    assert data.id2label == dict(enumerate(DEMO_CLASSES))
    assert data.name == "demo"
    assert list(tmp_path.iterdir()) == []


def test_demo_is_rendered_by_prepare_data(tmp_path, monkeypatch):
    monkeypatch.setattr("vidprism_hf.data.sources.demo.demo_folder.__defaults__", (0, 2, 1))
    data = VideoDataModule("demo", root=str(tmp_path), processor="tiny", num_frames=4, seed=3)
    data.prepare_data()
    (rendered,) = (tmp_path / "demo_clips").iterdir()
    assert rendered.name.endswith("seed3")
    data.setup("fit")
    assert (len(data.train_table), len(data.val_table)) == (16, 8)


def test_names_of_source_and_split(folder):
    assert module(folder).name == "moves"
    flat = folder / "train"
    phrases = {
        module(folder).split_description,
        module(flat, val_fraction=0.2).split_description,
        module(flat, val_pattern="^1").split_description,
        module(flat, val_list="val.txt").split_description,
        VideoDataModule("demo").split_description,
    }
    assert len(phrases) == 5


def test_the_split_of_class_folders_without_a_rule_is_described(folder):
    data = module(folder / "train")
    assert len(data.val_table) == 2
    assert data.split_description == "a share of 0.2 of each class held out (seed 0)"


def test_a_single_list_is_split_by_a_fraction(folder, tmp_path):
    clips = sorted(path.relative_to(folder).as_posix() for path in (folder / "train").rglob("*.mp4"))
    (tmp_path / "all.txt").write_text("\n".join(clips))
    data = module(folder, train_list=str(tmp_path / "all.txt"), val_fraction=0.5)
    assert len(data.train_table) + len(data.val_table) == len(clips)
    assert set(data.val_table.labels.tolist()) == {0, 1}
    assert data.split_description == "clips listed in all.txt, a share of 0.5 of each class held out (seed 0)"


def test_split_rules_reach_the_folder(folder):
    assert len(module(folder / "train", val_pattern="^[01]").val_table) == 4
    assert len(module(folder / "train", val_fraction=0.2).val_table) == 2


@pytest.mark.parametrize(
    ("label", "sided"),
    [
        ("moving_left", True),
        ("Pushing something from left to right", True),
        ("TurnRight", True),
        ("circling-counterclockwise", True),
        ("f_volley", False),
        ("brightness", False),
        ("lefty", False),
    ],
)
def test_labels_that_name_a_side(label, sided):
    assert mirror_label(["walk", label]) == (label if sided else None)


def flips(data):
    return bool(data.train_dataloader().dataset.reader.augmentation.transform.transforms[2].p)


def test_flip_is_off_where_a_label_names_a_side(folder, tmp_path):
    assert flips(module(folder))
    assert not flips(module(folder, horizontal_flip=False))
    sided = tmp_path / "sided"
    shutil.copytree(folder, sided)
    for split in ("train", "val"):
        (sided / split / "a").rename(sided / split / "a_left")
    assert not flips(module(sided))
    assert flips(module(sided, horizontal_flip=True))


def test_without_augmentation_training_clips_are_those_of_the_evaluation(folder, monkeypatch):
    said = []
    monkeypatch.setattr("vidprism_hf.data.datamodule.print_once", said.append)
    data = module(folder, augment=False, horizontal_flip=False, mixup_alpha=0.2)
    data.setup("fit")
    assert "training uses the evaluation view" in said[0]
    assert "flip" not in said[0]
    assert data.augmentation == {"view": "that of the evaluation", "mixup": 0.2, "cutmix": None}
    clips = data.train_dataloader().dataset
    swapped = data.val_dataloader().dataset.reader(clips.table.video(0), ())
    assert torch.equal(clips[5, 0]["pixel_values_videos"], swapped)


def test_processor_of_a_saved_checkpoint(folder, tmp_path, shared):
    data = module(folder, processor=str(shared / "weights/dinov2_small_as_clip_vision"))
    assert isinstance(data.video_processor, VidPrismVideoProcessor)
    assert (data.video_processor.num_frames, data.video_processor.crop_size["height"]) == (4, 224)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 0}, r"data\.batch_size=0: must be at least 1"),
        ({"num_workers": -1}, r"data\.num_workers=-1: must be at least 0"),
        ({"num_frames": 0}, r"data\.num_frames=0"),
        ({"seed": -1}, r"data\.seed=-1"),
        ({"min_crop_scale": 0.0}, r"data\.min_crop_scale=0\.0: must be above 0"),
        ({"test_crops": 2}, r"data\.test_crops=2: must be 1 or 3"),
        ({"clip_time_limit": 0.0}, r"data\.clip_time_limit=0\.0: must be above 0, or null"),
        ({"max_bad_fraction": 2.0}, r"data\.max_bad_fraction=2\.0: must be between 0 and 1"),
        ({"feature_cache": "f"}, r"data\.feature_cache: needs data\.train_views"),
        ({"feature_cache": "f", "train_views": 2, "mixup_alpha": 0.2}, r"data\.mixup_alpha: needs pixels"),
        (
            {"feature_cache": "f", "source": "a/b", "streaming": True},
            r"data\.feature_cache: cannot be combined with data\.streaming; remove one",
        ),
        ({"augment": False, "source": "a/b", "streaming": True}, r"data\.augment: streamed training clips are always"),
        ({"augment": False, "train_views": 1}, r"data\.train_views=1: has no effect with data\.augment=false"),
        ({"augment": False, "horizontal_flip": True}, r"data\.horizontal_flip=True: has no effect"),
        ({"augment": False, "rand_augment": 0}, r"data\.rand_augment=0: has no effect"),
        ({"augment": False, "random_erasing": 0.2}, r"data\.random_erasing=0\.2: has no effect"),
        ({"feature_cache_limit": "50 hours"}, r"data\.feature_cache_limit=50 hours: is not a size; write one such as"),
        ({"source": "ucf101", "val_fraction": 0.2}, r"data\.val_fraction: data\.source ucf101 is read as a benchmark"),
        ({"source": "here", "streaming": True}, r"data\.streaming: data\.source here is read as class folders"),
        ({"grayscale": 1.5}, r"data\.grayscale=1\.5"),
        ({"source": "demo", "val_fraction": 0.5}, r"data\.val_fraction: the demo is already split"),
    ],
)
def test_bad_arguments(settings, message):
    with pytest.raises(DataError, match=message):
        VideoDataModule(**settings)


def test_bad_source_and_processor(folder, tmp_path):
    with pytest.raises(DataError, match="nowhere: no such folder"):
        _ = module(tmp_path / "nowhere").id2label
    with pytest.raises(DataError, match="no-model: not a CLIP or VidPrism checkpoint"):
        module(folder, processor=str(tmp_path / "no-model")).setup("fit")


def test_more_processes_than_clips(folder):
    data = module(folder)
    data.trainer = type("Trainer", (), {"world_size": 7})()
    with pytest.raises(DataError, match="6 videos in a split for 7 processes"):
        data.val_dataloader()


def test_notes_of_the_source_are_shown(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "noted")
    (tmp_path / "noted/train/a/readme.txt").touch()
    with pytest.warns(UserWarning, match=r"1 files are not clips and are ignored: train/a/readme\.txt"):
        module(tmp_path / "noted").setup("fit")


def test_command_line_explains_every_argument():
    parser = ArgumentParser()
    parser.add_class_arguments(VideoDataModule, "data")
    text = parser.format_help()
    for phrase in ("Videos per batch on each rank", "^eli_ finds", "Smallest area of a training crop"):
        assert phrase in " ".join(text.split())
