"""What `plan` refuses, and where it says it is wrong. Every message is what a user reads."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from repa_lab.models.families import FAMILIES
from repa_lab.orchestration.plan import make_plan
from repa_lab.runs import RunsRoot
from repa_lab.spec import SpecError, load_spec
from tests.data.conftest import noise_image

SOUND = """\
name: sound
model: {family: sit, size: nano/2}
regularizer: {type: repa, encoder: {name: efficientnet_lite0, image_size: 64}}
data: {source: digits}
train: {steps: 10}
evaluate: {extractor: {name: efficientnet_lite0}}
"""

ONE = "{type: repa, encoder: {name: efficientnet_lite0, image_size: 64}}"
CASES = [
    (
        ("family: sit", "family: sitt"),
        f"2:9: model.family: unknown family 'sitt'; allowed: {', '.join(FAMILIES)}; did you mean 'sit'?",
    ),
    (
        ("size: nano/2", "size: nano/3"),
        "2:22: model.size: unknown size of sit 'nano/3'; allowed: nano/2, nano/4, nano/8, S/2",
    ),
    ((", size: nano/2", ""), "2:1: model.size: sit needs a size: unknown size of sit ''; allowed: nano/2"),
    (("type: repa", "type: urepa"), "3:15: regularizer.type: sit is a transformer: use repa, not urepa"),
    (
        ("type: repa,", "type: repa, block_index: 4,"),
        "3:27: regularizer.block_index: sit has 4 blocks: block_index must be 0 to 3, got 4",
    ),
    (
        ("image_size: 64", "image_size: 16"),
        "3:63: regularizer.encoder.image_size: efficientnet_lite0 gives one token at 16 px; patch tokens are required: "
        "use 32 px or more",
    ),
    (
        ("image_size: 64", "image_size: 70"),
        "3:63: regularizer.encoder.image_size: efficientnet_lite0 has patches of 16: 70 is not a multiple; allowed: 64, 80, ...",
    ),
    (
        (", image_size: 64", ""),
        "3:27: regularizer.encoder.image_size: the papers' rule has no size for 8 px images; set image_size to a "
        "multiple of 16",
    ),
    (
        ("image_size: 64", "image_size: 64, weights: nowhere.pth"),
        "3:79: regularizer.encoder.weights: no file 'nowhere.pth'",
    ),
    (
        ("image_size: 64", "image_size: 64, pixels: vae"),
        "3:79: regularizer.encoder.pixels: vae decodes latents, and data.vae names no VAE; use image, or set data.vae",
    ),
    (
        (
            "{name: efficientnet_lite0, image_size: 64}",
            "[{name: efficientnet_lite0, image_size: 64}, {name: mocov3_vitb16}]",
        ),
        "3:81: regularizer.encoder.1.weights: the weights of 'mocov3_vitb16' are on no model hub; give weights: FILE",
    ),
    (("{source: digits}", "{source: imagefolder, path: nowhere}"), "4:29: data.path: no folder 'nowhere'"),
    (("nano/2", "nano/8, pretrained: x"), "2:36: model.pretrained: sit is trained from scratch: leave pretrained out"),
    (
        ("steps: 10}", "steps: 10}\ncompare: {metric: fid}"),
        "6:11: compare.metric: 'fid' is not measured by this spec; measured: frechet:efficientnet_lite0@10k/ode50",
    ),
    (
        ("steps: 10}", "steps: 10}\nsearch: {space: {regularizer.wait: {log: [1, 2]}}}"),
        "6:18: search.space.regularizer.wait: unknown field 'wait'; allowed: attention_weight, beta, ",
    ),
    (("nano/2}", "nano/2, train: lora}"), "2:36: model.train: sit is trained from scratch: train must be full"),
    (
        ("source: digits}", "source: digits, buckets: {}}"),
        "4:24: data.buckets: sit is built for one size: leave buckets out",
    ),
    (
        ("lite0}}\n", "lite0}, prompts: [a cat]}\n"),
        "6:51: evaluate.prompts: sit is told classes: leave prompts out",
    ),
    (
        ("steps: 10}", "steps: 10}\ncompare: {goal: max}"),
        "6:11: compare.goal: must be min, for smaller values of frechet:efficientnet_lite0@10k/ode50 are better; got max",
    ),
    (
        ("lite0}}\n", "lite0}, metrics: [frechet, precision_recall]}\ncompare: {metric: precision}"),
        "7:1: compare.goal: must be max, for larger values of precision:efficientnet_lite0@10k/ode50 are better; got min",
    ),
    (
        ("steps: 10}", "steps: 10}\nsearch: {space: {train.lr: {log: [1e-4, 1e-3]}}, objective: {goal: max}}"),
        "6:62: search.objective.goal: must be min, for smaller values of frechet:efficientnet_lite0@10k/ode50 are better",
    ),
    (
        (
            "{name: efficientnet_lite0}}",
            "[{name: efficientnet_lite0}, {name: efficientnet_lite0, reference: theirs.npz}]}",
        ),
        "6:12: evaluate.extractor: 'frechet:efficientnet_lite0@10k/ode50' would stand for two numbers, one with other weights "
        "or another reference: leave one out, or measure it in evaluate.full with other samples",
    ),
    (
        ("lite0}}", "lite0}, full: {extractor: {name: efficientnet_lite0, reference: theirs.npz}}}"),
        "6:58: evaluate.full.extractor: 'frechet:efficientnet_lite0@10k/ode50' would stand for two numbers",
    ),
    (("name: sound", "name: cache"), "1:1: name: 'cache' is a folder of the runs root; choose another name"),
    (
        (ONE, "{type: layersync, block_index: 2, teacher_block: 1}"),
        "3:48: regularizer.teacher_block: the teacher must come after the student: block_index is 2, teacher_block 1",
    ),
    (
        (ONE, "{type: sra, block_index: 2, teacher_block: 2}"),
        "3:42: regularizer.teacher_block: the teacher must come after the student: block_index is 2, teacher_block 2",
    ),
    (
        (ONE, "{type: self_flow, schedule: {similarity_threshold: 0.9, threshold_mode: recoverable}}"),
        "3:70: regularizer.schedule.threshold_mode: measuring the cosine of self_flow changes the noise, so weight 0 would "
        "not be off: use permanent",
    ),
    (
        (
            "{family: sit, size: nano/2}\nregularizer: " + ONE,
            "{family: sit_down, size: nano/2}\nregularizer: {type: self_flow}",
        ),
        "3:15: regularizer.type: sit_down takes one time for all tokens; use sit",
    ),
    (
        (ONE, "{type: haste, encoder: {name: efficientnet_lite0, image_size: 64, cache: false}}"),
        "3:38: regularizer.encoder.name: the attention of 'efficientnet_lite0' cannot be captured: use a vision transformer",
    ),
    (
        (ONE, "{type: haste, encoder: {name: dinov2_vits14, image_size: 28}}"),
        "3:28: regularizer.encoder.cache: a regularizer needs the encoder's attention, which has no cache: set false",
    ),
    (
        (ONE, "[{type: haste, layers: 3, encoder: {name: dinov2_vits14, image_size: 28, cache: false}}]"),
        "3:29: regularizer.0.layers: there are 2 blocks up to block_index 1: layers must be 1 to 2",
    ),
    (
        (ONE, "{type: layersync, teacher_block: 4}"),
        "3:32: regularizer.teacher_block: sit has 4 blocks: block_index must be 0 to 3, got 4",
    ),
    (
        (ONE, f"[{ONE}, {{type: dispersive}}]\nrun: {{micro_batch: 1}}"),
        "3:83: regularizer.1.type: dispersive compares the images of one forward pass, and there is only one: raise "
        "train.batch_size or run.micro_batch, or use fewer processes",
    ),
    (
        (ONE, "{type: self_transcendence}"),
        "3:1: regularizer.weights: before its first step a denoiser from scratch has learned nothing to teach: train one",
    ),
    (
        (ONE, "{type: self_transcendence, weights: nowhere.safetensors}"),
        "3:41: regularizer.weights: no file 'nowhere.safetensors'",
    ),
    (
        (ONE, "[{type: sra2}, {type: dispersive, schedule: {similarity_threshold: 0.5}}]"),
        "3:59: regularizer.1.schedule.similarity_threshold: dispersive measures no cosine of tokens that could reach a threshold",
    ),
    (
        (
            "{family: sit, size: nano/2}\nregularizer: " + ONE,
            "{family: unet, size: nano}\nregularizer: [{type: layersync}]",
        ),
        "3:16: regularizer.0.type: unet is a UNet: use urepa, not layersync",
    ),
]


@pytest.mark.parametrize(("change", "expected"), CASES)
def test_each_mistake_is_one_line_with_its_place(tmp_path, monkeypatch, change, expected):
    monkeypatch.chdir(tmp_path)
    file = Path("spec.yaml")
    assert change[0] in SOUND
    file.write_text(SOUND.replace(*change))
    with pytest.raises(SpecError) as caught:
        make_plan(load_spec(file), RunsRoot(Path("runs")))
    lines = str(caught.value).splitlines()
    assert [line for line in lines if line.startswith(f"spec.yaml:{expected}")], lines
    assert not Path("runs").exists()


TUNED = """\
name: tuned
model: {family: sdxl, pretrained: some/pipeline}
regularizer: {type: urepa, encoder: {name: efficientnet_lite0, image_size: 64, pixels: vae}}
data: {source: imagefolder, path: images, resolution: 256, buckets: {step: 32}}
train: {steps: 10}
evaluate: {extractor: {name: efficientnet_lite0}, prompts: [a cat]}
"""
TUNED_CASES = [
    (
        (", pretrained: some/pipeline", ""),
        "2:1: model.pretrained: sdxl is trained from a pretrained pipeline: name a hub id or a folder",
    ),
    (("some/pipeline", "images"), "2:23: model.pretrained: 'images' is no pipeline of diffusers: it has no readable"),
    (
        ("some/pipeline", "dit"),
        "2:23: model.pretrained: 'dit' is a DiTPipeline, not of family sdxl: StableDiffusionXLPipeline",
    ),
    (
        ("some/pipeline", "less"),
        "2:23: model.pretrained: 'less' lacks vae: save a complete StableDiffusionXLPipeline there first",
    ),
    (("some/pipeline", "half"), "2:23: model.pretrained: 'half' has no readable unet/config.json"),
    (
        ("some/pipeline", "sd15"),
        "2:23: model.pretrained: the unet in 'sd15' is a UNet2DModel, and sdxl trains a UNet2DConditionModel",
    ),
    (("256", "264"), "4:43: data.resolution: 264 px is not a multiple of 32, the pixels of a token of sdxl"),
    (("step: 32", "step: 48"), "4:70: data.buckets.step: 48 px is not a multiple of 32, the pixels of a token of sdxl"),
    (
        ("256, buckets: {step: 32}", "32, buckets: {step: 64}"),
        "4:59: data.buckets: no size in steps of 64 px is of about the area of 32x32 px with aspects up to 2; choose a",
    ),
    (("path: images", "path: nowhere"), "4:29: data.path: no folder 'nowhere'"),
    (
        ("path: images", "path: silent"),
        "4:29: data.path: sdxl is trained with captions, and 'silent' has none: give metadata.jsonl (file_name, text), or",
    ),
    (
        ("source: imagefolder, path: images, resolution: 256", "source: digits"),
        "4:8: data.source: sdxl is trained with captions, and the images of digits have none: use imagefolder, datasets or hub",
    ),
    (
        ("prompts:", "sampler: {type: sde}, prompts:"),
        "6:51: evaluate.sampler: sdxl is sampled through its own pipeline and scheduler: only evaluate.sampler.steps can be "
        "set",
    ),
    (
        ("prompts:", "guidance: {scale: 2, high: 0.5}, prompts:"),
        "6:51: evaluate.guidance: the pipeline of sdxl guides at all times: leave low and high out",
    ),
    (
        ("prompts:", "full: {sampler: {type: sde}}, prompts:"),
        "6:58: evaluate.full.sampler: sdxl is sampled through its own pipeline and scheduler: only evaluate.full.sampler.steps "
        "can be set",
    ),
    (
        ("prompts:", "guidance: {scale: 2, high: 0.5}, full: {samples: 50}, prompts:"),
        "6:51: evaluate.guidance: the pipeline of sdxl guides at all times: leave low and high out",
    ),
    (("type: urepa", "type: repa"), "3:15: regularizer.type: sdxl is a UNet: use urepa, not repa"),
    (
        ("type: urepa", "type: urepa, block_index: 2"),
        "3:28: regularizer.block_index: sdxl is tapped at its mid block: block_index must be mid, got 2",
    ),
]
DIT = (("family: sdxl", "family: dit"), ("type: urepa", "type: repa"))
DIT_CASES = [
    "4:60: data.buckets: dit takes square images only: leave buckets out",
    "6:51: evaluate.prompts: dit is told classes: leave prompts out",
]


class TestPretrained:
    @pytest.fixture(autouse=True)
    def here(self, tmp_path, monkeypatch):
        """A working directory with images, some without captions, and folders of pipelines as far as a plan reads them."""
        monkeypatch.chdir(tmp_path)
        for folder in ("images", "silent"):
            Path(folder).mkdir()
            for number in range(1, 41):  # of which four are held out
                noise_image(0).save(f"{folder}/{number}.png")
        Path("images/1.txt").write_text("a cat")
        sdxl = {name: ["somewhere", "something"] for name in FAMILIES["sdxl"].pipeline.tiny} | {
            "unet": ["diffusers", "UNet"]
        }
        for folder, kind, parts, net in (
            ("dit", "DiTPipeline", sdxl, "DiTTransformer2DModel"),
            ("half", "StableDiffusionXLPipeline", sdxl, None),
            ("less", "StableDiffusionXLPipeline", {**sdxl, "vae": [None, None]}, "UNet2DConditionModel"),
            ("sd15", "StableDiffusionXLPipeline", sdxl, "UNet2DModel"),
        ):
            Path(folder, "unet").mkdir(parents=True)
            Path(folder, "model_index.json").write_text(json.dumps({"_class_name": kind, **parts}))
            if net:
                Path(folder, "unet", "config.json").write_text(json.dumps({"_class_name": net}))

    def problems(self, *changes: tuple[str, str]) -> list[str]:
        text = TUNED
        for old, new in changes:
            assert old in text
            text = text.replace(old, new)
        Path("spec.yaml").write_text(text)
        with pytest.raises(SpecError) as caught:
            make_plan(load_spec("spec.yaml"), RunsRoot(Path("runs")))
        assert not Path("runs").exists()
        return [line.removeprefix("spec.yaml:") for line in str(caught.value).splitlines()]

    def test_what_is_right_is_planned_and_not_blocked(self):
        Path("spec.yaml").write_text(TUNED)
        planned = make_plan(load_spec("spec.yaml"), RunsRoot(Path("runs")))
        assert len(planned.pending) == 1
        assert planned.blocked is None

    @pytest.mark.parametrize(("change", "expected"), TUNED_CASES)
    def test_each_mistake_is_one_line_with_its_place(self, change, expected):
        lines = self.problems(change)
        assert [line for line in lines if line.startswith(expected)], lines

    def test_a_family_of_classes_has_rules_of_its_own(self):
        assert self.problems(*DIT) == DIT_CASES
        Path("silent/metadata.jsonl").unlink(missing_ok=True)
        sound = [(", prompts: [a cat]", ""), (", buckets: {step: 32}", ""), ("path: images", "path: silent")]
        text = TUNED
        for old, new in (*DIT, *sound):
            text = text.replace(old, new)
        Path("spec.yaml").write_text(text)
        assert make_plan(load_spec("spec.yaml"), RunsRoot(Path("runs"))).blocked is None  # and it needs no captions


def test_all_problems_are_told_at_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("spec.yaml").write_text(
        SOUND.replace("repa,", "repa, block_index: 7,").replace("64", "16").replace("sound", "by-id")
    )
    with pytest.raises(SpecError) as caught:
        make_plan(load_spec("spec.yaml"), RunsRoot(Path("runs")))
    assert [problem.path for problem in caught.value.problems] == [
        "name",
        "regularizer.block_index",
        "regularizer.encoder.image_size",
    ]


def test_planning_loads_no_torch():
    code = "import sys, repa_lab; repa_lab.plan('experiments/quickstart.yaml'); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=False).returncode == 0


@pytest.mark.parametrize(
    ("train", "precision", "is_refused"), [("lora", "bf16", True), ("lora", "fp32", False), ("full", "bf16", False)]
)
def test_frozen_weights_in_half_precision_cannot_be_measured_in_float32(tmp_path, train, precision, is_refused):
    spec = {
        "name": "q",
        "model": {"family": "sd3", "pretrained": "stabilityai/stable-diffusion-3-medium-diffusers", "train": train},
        "data": {"source": "imagefolder", "resolution": 1024},
        "train": {"steps": 10},
        "evaluate": {"precision": "fp32"},
        "run": {"precision": precision},
    }
    problems = []
    try:
        make_plan(load_spec(spec), RunsRoot(tmp_path))
    except SpecError as error:
        problems = [problem for problem in error.problems if problem.path == "evaluate.precision"]
    told = "LoRA holds the frozen weights in run.precision (bf16): use train, or run.precision: fp32"
    assert [problem.message for problem in problems] == [told] * is_refused
