"""transformers' common test suites for models and configurations, at the installed version, on ours."""

import unittest
import unittest.mock

import torch
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_VIDEO_CLASSIFICATION_MAPPING_NAMES,
    MODEL_MAPPING_NAMES,
)
from transformers_suite import require_suite

from vidprism_hf import VidPrismConfig, VidPrismForVideoClassification, VidPrismModel

require_suite()

from tests.test_configuration_common import ConfigTester  # noqa: E402
from tests.test_modeling_common import ModelTesterMixin, floats_tensor  # noqa: E402


class VidPrismModelTester:
    """A small configuration and inputs that fit it."""

    def __init__(self, parent):
        self.parent = parent
        self.batch_size, self.num_frames, self.num_channels, self.image_size = 3, 8, 3, 16
        self.hidden_size, self.num_labels, self.is_training = 16, 5, True
        self.num_attention_heads = 4
        # The suite's layers are our experts, its sequence the first expert's stream of 8 / 2 frames.
        self.rates = [2, 4]
        self.num_hidden_layers = self.expected_num_hidden_layers = len(self.rates)
        self.seq_length = 4

    def get_config(self):
        return VidPrismConfig(
            vision_config={
                "image_size": self.image_size,
                "patch_size": 8,
                "hidden_size": 16,
                "intermediate_size": 32,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "projection_dim": self.hidden_size,
            },
            num_frames=self.num_frames,
            rates=self.rates,
            num_labels=self.num_labels,
        )

    def prepare_config_and_inputs_for_common(self):
        shape = [self.batch_size, self.num_frames, self.num_channels, self.image_size, self.image_size]
        return self.get_config(), {"pixel_values_videos": floats_tensor(shape)}


class VidPrismModelTest(ModelTesterMixin, unittest.TestCase):
    all_model_classes = (VidPrismModel, VidPrismForVideoClassification)
    test_resize_embeddings = False  # no token embeddings to resize

    @classmethod
    def setUpClass(cls):
        # The suite decides by these names which inputs a class takes (labels, for one).
        names = (
            (MODEL_MAPPING_NAMES, VidPrismModel),
            (MODEL_FOR_VIDEO_CLASSIFICATION_MAPPING_NAMES, VidPrismForVideoClassification),
        )
        for mapping, model in names:
            patch = unittest.mock.patch.dict(mapping, vidprism=model.__name__)
            patch.start()
            cls.addClassCleanup(patch.stop)

    def setUp(self):
        self.model_tester = VidPrismModelTester(self)
        self.config_tester = ConfigTester(self, config_class=VidPrismConfig, has_text_modality=False)

    def test_config(self):
        self.config_tester.run_common_tests()

    def test_model_get_set_embeddings(self):
        """Overridden as in transformers' vision models: the input embedding is a convolution."""
        config, _ = self.model_tester.prepare_config_and_inputs_for_common()
        for model_class in self.all_model_classes:
            model = model_class(config)
            assert isinstance(model.get_input_embeddings(), torch.nn.Conv2d)
            assert model.get_output_embeddings() is None
