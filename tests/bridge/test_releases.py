"""Which weights a config of SimpleTuner names, which images, and what their evaluation costs."""

from __future__ import annotations

import json

import pytest
from PIL import Image

from repa_lab.bridge.simpletuner import FLAVOURS
from repa_lab.models.families import FAMILIES
from repa_lab.orchestration.checks import check
from repa_lab.spec import Machine, RunOptions, load_spec
from repa_lab.training.costs import cost_of
from repa_lab.training.resolve import Inventory
from tests.bridge.test_importing import FLUX, config_of, load, read, refusal, remarks

DEV = "black-forest-labs/FLUX.1-dev"
HERE = RunOptions().resolved(Machine())
CHECKPOINTED = RunOptions(gradient_checkpointing=True).resolved(Machine())


class TestFlavour:
    @pytest.mark.parametrize(
        "family, flavour, pretrained",
        [
            ("flux", "schnell", "black-forest-labs/FLUX.1-schnell"),
            ("flux", None, "black-forest-labs/FLUX.1-Krea-dev"),
            ("flux2", None, "black-forest-labs/FLUX.2-dev"),
            ("sd3", "large", "stabilityai/stable-diffusion-3.5-large"),
            ("sd3", None, "stabilityai/stable-diffusion-3.5-medium"),
            ("sana", None, "Efficient-Large-Model/SANA1.5_4.8B_1024px_diffusers"),
            ("pixart_sigma", None, "terminusresearch/pixart-900m-1024-ft-v0.6"),
            ("pixart", "600m-1024", "PixArt-alpha/PixArt-Sigma-XL-2-1024-MS"),
            ("chroma", None, "lodestones/Chroma1-Base"),
            ("chroma", "HD", "lodestones/Chroma1-HD"),
            ("qwen_image", None, "Qwen/Qwen-Image-2512"),
            ("qwen_image", "v1.0", "Qwen/Qwen-Image"),
            ("z-image", "base", "Tongyi-MAI/Z-Image"),
            ("z-image", None, "Tongyi-MAI/Z-Image-Turbo"),
            ("sd1x", None, "Lykon/dreamshaper-8"),
            ("sdxl", None, "stabilityai/stable-diffusion-xl-base-1.0"),
            ("kandinsky5-image", None, "kandinskylab/Kandinsky-5.0-T2I-Lite-sft-Diffusers"),
        ],
    )
    def test_it_names_the_weights_and_simpletuners_default_stands_in(self, tmp_path, family, flavour, pretrained):
        assert config_of(tmp_path, {"model_family": family, "model_flavour": flavour}).model.pretrained == pretrained

    def test_weights_that_are_named_win_as_in_simpletuner(self, tmp_path):
        given = {**FLUX, "model_flavour": "schnell", "pretrained_model_name_or_path": DEV}
        assert config_of(tmp_path, given).model.pretrained == DEV
        assert f"config.json:3:3: model_flavour: not carried: model.pretrained is {DEV}" in remarks(tmp_path, given)

    @pytest.mark.parametrize(
        "family, flavour, message",
        [
            ("flux", "schnel", "repa-lab trains no flavour 'schnel' of flux; allowed: krea, dev, schnell, fluxbooru; did you mean 'schnell'?"),
            ("sd3", "turbo", "repa-lab trains no flavour 'turbo' of sd3; allowed: medium, large"),
            ("flux", "kontext", "repa-lab trains no flavour 'kontext' of flux; allowed: krea, dev, schnell, fluxbooru"),
        ],
    )  # fmt: skip
    def test_one_that_is_unknown_or_cannot_be_trained_is_an_error(self, tmp_path, family, flavour, message):
        assert refusal(tmp_path, {"model_family": family, "model_flavour": flavour}) == [
            f"config.json:3:3: model_flavour: {message}"
        ]

    def test_plan_says_that_it_counts_other_weights(self, tmp_path):
        config = config_of(tmp_path, {"model_family": "sd3", "model_flavour": "large"})
        (note,) = cost_of(config, HERE).rough
        assert note.startswith(
            "parameters, FLOPs and memory are counted for stabilityai/stable-diffusion-3-medium-diffusers; those of"
        )
        assert cost_of(config_of(tmp_path, {**FLUX, "model_flavour": "dev"}), HERE).rough == ()

    def test_plan_lets_a_block_through_that_only_a_larger_release_has(self, tmp_path):
        check(
            load(
                tmp_path,
                read(
                    tmp_path,
                    {"model_family": "sd3", "model_flavour": "large", "crepa_enabled": True, "crepa_block_index": 30},
                ),
            ),
            Inventory(),
        )

    def test_a_family_without_flavours_here_says_so(self, tmp_path):
        (line,) = [
            line for line in remarks(tmp_path, {"model_family": "cogview4", "model_flavour": "x"}) if "flavour" in line
        ]
        assert line.startswith("config.json:3:3: model_flavour: not carried: model.pretrained is ")

    def test_the_table_is_of_families_that_are_trained(self):
        for family, flavours in FLAVOURS.items():
            assert FAMILIES[family].pipeline and flavours


IMAGES = {
    "id": "cats",
    "type": "local",
    "instance_data_dir": "datasets/cats",
    "resolution": 512,
    "crop": True,
    "crop_aspect": "square",
}
TEXTS = {"id": "texts", "dataset_type": "text_embeds", "default": True, "type": "local", "cache_dir": "cache/text"}


def with_data(tmp_path, *backends, **config):
    (tmp_path / "data.json").write_text(backends[0] if isinstance(backends[0], str) else json.dumps(backends, indent=2))
    return {**FLUX, "data_backend_config": "data.json", **config}


class TestDataSet:
    def test_the_file_beside_the_config_names_images_and_resolution(self, tmp_path):
        given = with_data(tmp_path, TEXTS, IMAGES, resolution=1024)
        data = config_of(tmp_path, given).data
        assert (data.path, data.resolution, data.buckets) == ("datasets/cats", 512, None)
        said = remarks(tmp_path, given)
        assert any(
            line.startswith(
                "config.json:3:3: data_backend_config: data.path is 'datasets/cats', from data set 'cats' of"
            )
            for line in said
        )
        assert not [line for line in said if "fill in data.path" in line]

    @pytest.mark.parametrize("name", ["data.json", "config/mine/data.json", "elsewhere/data.json"])
    def test_it_is_looked_for_from_every_folder_above_and_beside_the_config(self, tmp_path, name, monkeypatch):
        folder = tmp_path / "config" / "mine"
        folder.mkdir(parents=True)
        (folder / "data.json").write_text(json.dumps([IMAGES]))
        monkeypatch.chdir("/")
        assert config_of(folder, {**FLUX, "data_backend_config": name}).data.resolution == 512

    def test_images_that_lie_where_simpletuner_starts_are_found_there(self, tmp_path, monkeypatch):
        (tmp_path / "datasets" / "cats").mkdir(parents=True)
        (tmp_path / "config").mkdir()
        (tmp_path / "config" / "data.json").write_text(json.dumps([IMAGES]))
        monkeypatch.chdir("/")
        given = {**FLUX, "data_backend_config": "config/data.json"}
        assert config_of(tmp_path / "config", given).data.path == str(tmp_path / "datasets" / "cats")

    @pytest.mark.parametrize(
        "change, side",
        [
            ({"resolution": 1.0, "resolution_type": "area"}, 1024),
            ({"resolution": 0.25, "resolution_type": "area"}, 512),
            ({"resolution": 768, "resolution_type": "pixel"}, 768),
            ({"resolution": None}, 640),
        ],
    )
    def test_its_resolution_has_a_type_of_its_own(self, tmp_path, change, side):
        assert config_of(tmp_path, with_data(tmp_path, {**IMAGES, **change}, resolution=640)).data.resolution == side

    def test_the_grids_are_those_of_its_resolution(self, tmp_path):
        given = with_data(tmp_path, IMAGES, crepa_enabled=True)
        assert (
            config_of(tmp_path, given).regularizer.resample.side == "teacher"
        )  # 32x32 against 37x37; at 1024 px it is the student
        assert config_of(tmp_path, {**FLUX, "crepa_enabled": True}).regularizer.resample.side == "student"

    @pytest.mark.parametrize(
        "change", [{"crop": False}, {"crop_aspect": "preserve"}, {"crop": "false", "resolution_type": "pixel"}]
    )
    def test_images_that_are_not_cut_to_squares_go_into_buckets(self, tmp_path, change):
        given = with_data(tmp_path, {**IMAGES, **change})
        buckets = config_of(tmp_path, given).data.buckets
        assert (buckets.step, buckets.max_aspect) == (64, 2.0)
        said = " ".join(remarks(tmp_path, given))
        assert "is not cut to squares" in said

    def test_what_a_spec_cannot_hold_is_said(self, tmp_path):
        photos = {**IMAGES, "id": "photos", "is_regularisation_data": True}
        off = {**IMAGES, "id": "off", "disabled": True}
        given = with_data(
            tmp_path, photos, off, {**IMAGES, "caption_strategy": "instanceprompt"}, {**IMAGES, "id": "large"}
        )
        said = " ".join(remarks(tmp_path, given))
        assert "captions are by instanceprompt there" in said
        assert said.count("the others are") == 1 and "the others are photos, large" in said
        hub = {"id": "hub", "type": "huggingface", "dataset_name": "some/set", "resolution": 512}
        given = with_data(tmp_path, hub)
        said = " ".join(remarks(tmp_path, given))
        assert config_of(tmp_path, given).data.path is None
        assert "is of type huggingface: save its images to a folder" in said and "fill in data.path" in said

    def test_a_file_that_is_missing_or_without_images_is_a_remark(self, tmp_path):
        missing = remarks(tmp_path, {**FLUX, "data_backend_config": "none.json"})
        assert any(
            "data_backend_config: 'none.json' is not found here or beside the config" in line for line in missing
        )
        assert any("has no image data set" in line for line in remarks(tmp_path, with_data(tmp_path, TEXTS)))

    def test_a_fragment_carries_it_too(self, tmp_path):
        given = with_data(tmp_path, IMAGES)
        del given["model_family"]
        assert "data: {path: datasets/cats, resolution: 512}" in read(tmp_path, given).spec

    @pytest.mark.parametrize(
        "text, line",
        [
            ("{}", "data.json:1:1: a data backend's file is a JSON list of data sets, each an object"),
            ('[\n {"nope" 1}]', "data.json:2:10: not valid JSON: expected ',' or '}'"),
            ('[{"id": [1]},\n {"a": {"resolution": 1},\n  "resolution": "big"}]', None),
            ('[{"id": "a", "crop": "maybe"}]', "data.json:1:14: crop: expected true or false, got 'maybe'"),
        ],
    )
    def test_a_mistake_in_it_is_one_line_at_its_place(self, tmp_path, text, line):
        if line is None:  # the first of two images is read; a mistake in the other has no effect
            assert config_of(tmp_path, with_data(tmp_path, text)).data.resolution == 1024
            text, line = text.replace('{"id": [1]},', ""), "data.json:3:3: resolution: expected a number, got 'big'"
        (found,) = refusal(tmp_path, with_data(tmp_path, text))
        assert found.startswith(line)


class TestEvaluation:
    @pytest.mark.parametrize(
        "given, samples, steps",
        [
            # 100 steps x 1 image x 3 passes = 300
            ({"train_batch_size": 1, "validation_num_inference_steps": 16}, 18, 16),
            ({"train_batch_size": 1}, 16, 30),
            ({"train_batch_size": 1, "validation_guidance": 4.0, "validation_num_inference_steps": 8}, 37, 8),
            ({"train_batch_size": 3, "validation_num_inference_steps": 30}, 30, 30),
            ({"max_train_steps": 10, "train_batch_size": 1}, 16, 30),
            ({"max_train_steps": 100_000, "train_batch_size": 32}, 10_000, 30),
        ],
    )
    def test_it_costs_as_many_passes_as_training_at_most(self, tmp_path, given, samples, steps):
        config = config_of(tmp_path, {**FLUX, "max_train_steps": 100, **given})
        evaluate = config.evaluate
        assert (evaluate.samples, evaluate.sampler.steps, evaluate.every) == (samples, steps, config.train.steps)

    def test_plan_finds_that_it_costs_about_as_much_as_training(self, tmp_path):
        given = {
            **FLUX,
            "model_type": "lora",
            "max_train_steps": 100,
            "train_batch_size": 4,
        }
        config = config_of(tmp_path, given)
        cost = cost_of(config, CHECKPOINTED)
        assert cost.measuring(config, 0, 100) <= 1.1 * 100 * 4 * cost.denoiser_flops
        by_default = config.model_copy(update={"evaluate": type(config.evaluate)()})
        assert cost_of(by_default, CHECKPOINTED).measuring(by_default, 0, 100) > 1000 * 100 * cost.denoiser_flops

    def test_few_samples_are_said_to_be_noise(self, tmp_path):
        for steps, is_noise in ((100, True), (100_000, False)):
            said = " ".join(remarks(tmp_path, {**FLUX, "max_train_steps": steps, "train_batch_size": 8}))
            assert ("A Frechet distance of so few samples is mostly noise" in said) == is_noise

    @pytest.mark.parametrize("guidance, scale", [(4.5, 4.5), (0.0, 1.0), (1, 1.0), (None, 1.0)])
    def test_guidance_is_that_of_validation(self, tmp_path, guidance, scale):
        assert config_of(tmp_path, {**FLUX, "validation_guidance": guidance}).evaluate.guidance.scale == scale


# What SimpleTuner's own examples have: family, flavour, and what else matters here.
EXAMPLES = [
    {"model_family": "flux", "train_batch_size": 1, "validation_guidance": 4.0, "validation_num_inference_steps": 16, "use_ema": False},
    {"model_family": "flux", "model_flavour": "schnell", "learning_rate": "1e-4"},
    {"model_family": "flux2", "train_batch_size": 1, "validation_num_inference_steps": 16, "lora_alpha": 16},
    {"model_family": "chroma", "grad_clip_method": "value", "flow_schedule_shift": 3},
    {"model_family": "hidream", "model_flavour": "full", "caption_dropout_probability": 0.1, "max_grad_norm": 0.0, "resolution": 512, "validation_negative_prompt": None},
    {"model_family": "auraflow", "model_flavour": "v0.3", "checkpointing_steps": 50, "lora_rank": 8, "lora_alpha": 8},
    {"model_family": "kolors", "model_flavour": "1.0", "caption_dropout_probability": 0.1, "resolution_type": "pixel_area"},
    {"model_family": "lumina2", "train_batch_size": 2, "validation_num_inference_steps": 40},
    {"model_family": "kandinsky5-image", "lora_type": "lycoris", "lora_rank": 128, "train_batch_size": 3},
    {"model_family": "sd3", "train_batch_size": 3, "validation_guidance": 1.0, "validation_guidance_skip_layers": [7, 8, 9]},
    {"model_family": "z_image", "model_flavour": "turbo", "max_grad_norm": 0.01, "validation_guidance": 1.0, "validation_num_inference_steps": 8},
    {"model_family": "qwen_image", "model_flavour": "v1.0", "gradient_accumulation_steps": 4, "gradient_checkpointing": "true"},
    {"model_family": "pixart", "lora_type": "lycoris", "lora_alpha": 128, "lora_rank": 128},
    {"model_family": "sdxl", "model_flavour": "base-1.0", "pretrained_vae_model_name_or_path": "madebyollin/sdxl-vae-fp16-fix"},
    {"model_family": "sana", "model_flavour": "sana1.0-1.6b-1024"},
]  # fmt: skip


class TestExamples:
    @pytest.mark.parametrize(
        "example", EXAMPLES, ids=lambda example: f"{example['model_family']} {example.get('model_flavour', '')}".strip()
    )
    @pytest.mark.parametrize("aligned", [False, True])
    def test_an_example_becomes_a_spec_that_plan_accepts(self, tmp_path, example, aligned):
        images = tmp_path / "images"
        images.mkdir()
        for number in range(40):  # a tenth is held out, on which alignment is measured
            Image.new("RGB", (96, 64), (6 * number, 90, 200)).save(images / f"{number}.png")
            (images / f"{number}.txt").write_text(f"image {number}")
        family = config_of(tmp_path, {"model_family": example["model_family"]}).model.family
        prefix = "urepa" if FAMILIES[family].kind == "unet" else "crepa"
        enabled = {f"{prefix}_enabled": True} if aligned else {}
        common = {
            "model_type": "lora",
            "max_train_steps": 100,
            "seed": 42,
            "data_backend_config": "config/examples/none.json",
        }
        (tmp_path / "question.yaml").unlink()
        imported = read(tmp_path, {**common, **example, **enabled})
        (tmp_path / "question.yaml").write_text(imported.spec.replace("path: null", f"path: {images}"))
        experiment = load_spec(tmp_path / "question.yaml")
        check(experiment, Inventory())
        assert experiment.arms[0].config.regularizer.type == (
            ("repa" if prefix == "crepa" else "urepa") if aligned else "none"
        )
