"""transformers' common test suite for video processors, at the installed version, on ours."""

import unittest

import numpy as np
import pytest
import torch
from transformers import AutoVideoProcessor
from transformers_suite import require_suite

from vidprism_hf.model.configuration_vidprism import VidPrismConfig
from vidprism_hf.model.video_processing_vidprism import VidPrismVideoProcessor

require_suite()

from tests.test_video_processing_common import VideoProcessingTestMixin, prepare_video_inputs  # noqa: E402


class VidPrismVideoProcessingTester:
    """The inputs of the suite, and the shapes that it is to expect."""

    batch_size, num_channels, num_frames = 5, 3, 8
    num_videos = batch_size

    def expected_output_video_shape(self, videos):
        return self.num_frames, 3, 18, 18

    def prepare_video_inputs(self, equal_resolution=False, return_tensors="pil"):
        return prepare_video_inputs(
            self.batch_size,
            self.num_frames,
            self.num_channels,
            min_resolution=30,
            max_resolution=80,
            equal_resolution=equal_resolution,
            return_tensors=return_tensors,
        )


class VidPrismVideoProcessingTest(VideoProcessingTestMixin, unittest.TestCase):
    fast_video_processing_class = VidPrismVideoProcessor
    test_cast_dtype = True

    @classmethod
    def setUpClass(cls):
        AutoVideoProcessor.register(VidPrismConfig, VidPrismVideoProcessor, exist_ok=True)

    def setUp(self):
        super().setUp()
        np.random.seed(0)
        self.video_processor_tester = VidPrismVideoProcessingTester()

    @property
    def video_processor_dict(self):
        return {
            "size": {"shortest_edge": 20},
            "crop_size": {"height": 18, "width": 18},
            "num_frames": self.video_processor_tester.num_frames,
        }

    def test_call_sample_frames(self):
        # Overridden: the suite samples by `fps` and wants an error where a clip is short; here segments are
        # sampled, short clips repeat frames, and `fps` is what raises.
        processor = VidPrismVideoProcessor(**self.video_processor_dict)
        videos = self.video_processor_tester.prepare_video_inputs(return_tensors="torch")
        for wanted in (3, 10):
            kept = processor(videos, num_frames=wanted, do_sample_frames=False, return_tensors="pt")
            sampled = processor(videos, num_frames=wanted, return_tensors="pt")
            assert kept["pixel_values_videos"].shape[1] == 8
            assert sampled["pixel_values_videos"].shape[1] == wanted
        with pytest.raises(ValueError, match="not `fps`"):
            processor(torch.zeros(8, 3, 20, 20, dtype=torch.uint8), fps=3)


del VideoProcessingTestMixin  # or pytest would collect it here too
