"""A config of SimpleTuner becomes a spec that says what it says, and every loss and difference is named."""

from __future__ import annotations

import json
import math

import pytest

from repa_lab.align.settings import Schedule
from repa_lab.bridge.exporting import export_settings
from repa_lab.bridge.importing import import_config
from repa_lab.bridge.simpletuner import LOST, WITHOUT_EFFECT
from repa_lab.models.families import FAMILIES
from repa_lab.orchestration.checks import check
from repa_lab.spec import SpecError, load_spec
from repa_lab.training.resolve import Inventory

FLUX, SDXL = {"model_family": "flux"}, {"model_family": "sdxl"}
# The four blocks of the guide, and its two lists of knobs at values that are not the defaults.
GUIDE = {
    "repa": {
        "crepa_enabled": True,
        "crepa_block_index": 8,
        "crepa_lambda": 0.5,
        "crepa_encoder": "dinov2_vitg14",
        "crepa_encoder_image_size": 518,
    },
    "urepa": {
        "urepa_enabled": True,
        "urepa_lambda": 0.5,
        "urepa_manifold_weight": 3.0,
        "urepa_model": "dinov2_vitg14",
        "urepa_encoder_image_size": 518,
    },
    "repa schedule": {
        "crepa_scheduler": "cosine",
        "crepa_warmup_steps": 100,
        "crepa_decay_steps": 5000,
        "crepa_lambda_end": 0.0,
    },
    "urepa schedule": {"urepa_scheduler": "cosine", "urepa_warmup_steps": 100, "urepa_cutoff_step": 5000},
    "repa knobs": {
        "crepa_lambda": 0.7,
        "crepa_block_index": 11,
        "crepa_spatial_align": False,
        "crepa_encoder": "dinov2_vits14",
        "crepa_encoder_image_size": 224,
    },
    "urepa knobs": {
        "urepa_lambda": 1.5,
        "urepa_manifold_weight": 1.0,
        "urepa_model": "dinov2_vits14",
        "urepa_encoder_image_size": 224,
        "urepa_use_tae": True,
    },
}


def read(tmp_path, config, name="config.json"):
    file = tmp_path / name
    file.write_text(config if isinstance(config, str) else json.dumps(config, indent=2), encoding="utf-8")
    return import_config([str(file)])


def load(tmp_path, imported):
    (tmp_path / "question.yaml").write_text(imported.spec, encoding="utf-8")
    return load_spec(tmp_path / "question.yaml")


def config_of(tmp_path, config):
    return load(tmp_path, read(tmp_path, config)).arms[0].config


def regularizer_of(tmp_path, **config):
    family = SDXL if any(name.startswith("urepa") for name in config) else FLUX
    return config_of(tmp_path, {**family, **config}).regularizer


def refusal(tmp_path, config):
    with pytest.raises(SpecError) as caught:
        read(tmp_path, config)
    return [line.removeprefix(f"{tmp_path}/") for line in str(caught.value).splitlines()]


def remarks(tmp_path, config):
    return [remark.removeprefix(f"{tmp_path}/") for remark in read(tmp_path, config).remarks]


class TestImport:
    def test_defaults_of_that_trainer_are_written_down(self, tmp_path):
        regularizer = regularizer_of(tmp_path, urepa_enabled=True)
        assert (regularizer.type, regularizer.weight, regularizer.manifold_weight, regularizer.block_index) == (
            "urepa",
            0.5,
            3.0,
            "mid",
        )
        assert (regularizer.encoder.name, regularizer.encoder.image_size, regularizer.encoder.pixels) == (
            "dinov2_vitg14",
            518,
            "vae",
        )
        assert (regularizer.projector.type, regularizer.spatial_norm) == ("linear", None)
        assert regularizer_of(tmp_path, crepa_enabled=True).block_index == 8
        irepa = regularizer_of(tmp_path, crepa_enabled=True, irepa_enabled=True)
        assert (irepa.projector.type, irepa.projector.kernel, irepa.spatial_norm) == ("conv", 3, 0.6)

    def test_the_spec_itself_holds_them_not_the_labs_defaults(self, tmp_path):
        text = read(tmp_path, {**FLUX, "crepa_enabled": True}).spec
        for line in (
            "weight: 0.5",
            "block_index: 8",
            "spatial_align: true",
            "image_size: 518",
            "power: 1.0",
            "lr: 4.0e-07",
            "rank: 16",
        ):
            assert line in text

    @pytest.mark.parametrize(
        "family, resolution, image_size, side",
        [
            ("sdxl", 1024, 518, "teacher"),  # 32x32 against 37x37
            ("sdxl", 1024, 448, "student"),  # 32x32 both
            ("sd15", 512, 224, "teacher"),  # 8x8 against 16x16
            ("flux", 1024, 518, "student"),  # 64x64
            ("flux", 512, 518, "teacher"),  # 32x32
            ("sana", 1024, 518, "teacher"),  # 32x32
        ],
    )
    def test_the_larger_grid_shrinks(self, tmp_path, family, resolution, image_size, side):
        prefix = "urepa" if family in ("sdxl", "sd15") else "crepa"
        settings = {
            "model_family": family,
            "resolution": resolution,
            f"{prefix}_enabled": True,
            f"{prefix}_encoder_image_size": image_size,
        }
        assert config_of(tmp_path, settings).regularizer.resample.side == side

    def test_a_threshold_is_judged_from_the_first_step_as_there(self, tmp_path):
        schedule = regularizer_of(
            tmp_path, crepa_enabled=True, crepa_similarity_threshold=0.9, crepa_threshold_mode="recoverable"
        ).schedule
        assert (schedule.similarity_threshold, schedule.similarity_min_count, schedule.probe_every) == (0.9, 1, 1)
        assert regularizer_of(tmp_path, crepa_enabled=True).schedule.similarity_min_count == 100

    def test_zero_is_a_number_where_the_lab_has_one(self, tmp_path):
        urepa = regularizer_of(
            tmp_path, urepa_enabled=True, urepa_lambda=0, urepa_manifold_weight=0, urepa_cutoff_step=0
        )
        assert (urepa.weight, urepa.manifold_weight, urepa.schedule.cutoff_step) == (0.0, 0.0, None)
        said = " ".join(
            remarks(tmp_path, {**SDXL, "urepa_enabled": True, "urepa_lambda": 0, "urepa_manifold_weight": "0.0"})
        )
        assert "urepa_lambda: here 0 is 0, and the encoder is not run" in said
        assert "urepa_manifold_weight: SimpleTuner takes 0 for 3.0" in said
        repa = regularizer_of(
            tmp_path, crepa_enabled=True, crepa_encoder_image_size=0, crepa_power=0, crepa_encoder_frames_batch_size=0
        )
        assert (repa.encoder.image_size, repa.schedule.power) == (518, 1.0)

    def test_the_rest_of_a_spec_is_read_too(self, tmp_path):
        given = {
            **SDXL, "pretrained_model_name_or_path": "my/sdxl", "pretrained_vae_model_name_or_path": "my/vae", "model_type": "lora", "lora_rank": 64,
            "learning_rate": 1e-5, "train_batch_size": 2, "gradient_accumulation_steps": 4, "max_train_steps": 700, "resolution": 512, "seed": 42,
            "use_ema": True, "ema_decay": 0.999, "adam_weight_decay": 0.1, "max_grad_norm": 0.0, "mixed_precision": "no",
            "gradient_checkpointing": False, "checkpoint_step_interval": 50, "urepa_enabled": True,
        }  # fmt: skip
        experiment = load(tmp_path, read(tmp_path, given))
        config, run = experiment.arms[0].config, experiment.run
        assert (config.model.pretrained, config.model.train, config.model.rank) == ("my/sdxl", "lora", 64)
        assert (config.data.vae, config.data.resolution, experiment.seeds) == ("my/vae", 512, (42,))
        train = config.train
        assert (train.lr, train.batch_size, train.steps, train.ema, train.weight_decay, train.grad_clip) == (
            1e-5,
            8,
            700,
            0.999,
            0.1,
            None,
        )
        assert (run.micro_batch, run.precision, run.gradient_checkpointing, run.checkpoint_every) == (
            2,
            "fp32",
            False,
            50,
        )

    def test_a_vae_that_is_not_named_is_the_pipelines_own(self, tmp_path):
        given = {"model_family": "sd1x", "pretrained_model_name_or_path": "my/sd15", "urepa_enabled": True}
        config, said = config_of(tmp_path, given), " ".join(remarks(tmp_path, given))
        assert (config.model.pretrained, config.data.vae, config.regularizer.encoder.pixels) == ("my/sd15", None, "vae")
        assert "data.vae" not in said
        check(load(tmp_path, read(tmp_path, given)), Inventory())

    @pytest.mark.parametrize(
        "given, side",
        [
            ({"resolution": 1.0, "resolution_type": "area"}, 1024),
            ({"resolution": 0.25}, 512),
            ({"resolution": 512}, 512),
            ({}, 1024),
        ],
    )
    def test_a_resolution_in_megapixels_is_a_side_in_pixels(self, tmp_path, given, side):
        assert config_of(tmp_path, {**FLUX, **given}).data.resolution == side

    @pytest.mark.parametrize(
        "given, ema",
        [({}, 0.0), ({"use_ema": True}, 0.995), ({"ema_decay": 0.9}, 0.0), ({"use_ema": False, "ema_decay": 0.9}, 0.0)],
    )
    def test_an_average_is_kept_where_the_config_asks_for_one(self, tmp_path, given, ema):
        assert config_of(tmp_path, {**FLUX, **given}).train.ema == ema

    @pytest.mark.parametrize(
        "name, ours", [("sd1x", "sd15"), ("pixart_sigma", "pixart"), ("SD3", "sd3"), ("flux", "flux")]
    )
    def test_families_go_by_the_labs_names(self, tmp_path, name, ours):
        assert config_of(tmp_path, {"model_family": name}).model.family == ours

    @pytest.mark.parametrize("family", sorted(name for name, one in FAMILIES.items() if one.pipeline))
    def test_plan_accepts_what_it_writes_for_every_family(self, tmp_path, family):
        prefix = {"transformer": "crepa", "unet": "urepa"}[FAMILIES[family].kind]
        for more in ({}, {"irepa_enabled": True}, {f"{prefix}_use_tae": True}):
            check(
                load(tmp_path, read(tmp_path, {"model_family": family, f"{prefix}_enabled": True, **more})), Inventory()
            )

    def test_an_encoder_has_several_names_there(self, tmp_path):
        assert regularizer_of(tmp_path, crepa_enabled=True, crepa_encoder="dino_v2_s").encoder.name == "dinov2_vits14"
        both = regularizer_of(tmp_path, crepa_enabled=True, crepa_encoder="dinov2_vits14", crepa_model="dinov2_vitb14")
        assert both.encoder.name == "dinov2_vitb14"

    def test_a_tiny_autoencoder_is_that_of_the_family(self, tmp_path):
        sd15 = config_of(
            tmp_path, {"model_family": "sd15", "urepa_enabled": True, "urepa_use_tae": True}
        ).regularizer.encoder
        assert (sd15.pixels, sd15.tae) == ("tae", "madebyollin/taesd")
        sana = {"model_family": "sana", "crepa_enabled": True, "crepa_use_tae": True}
        assert config_of(tmp_path, sana).regularizer.encoder.pixels == "vae"
        assert any(
            "crepa_use_tae: not carried: no tiny autoencoder is known for the latents of sana" in line
            for line in remarks(tmp_path, sana)
        )

    def test_without_a_family_it_is_a_fragment_that_a_spec_can_use(self, tmp_path):
        imported = read(tmp_path, {**GUIDE["urepa"], "learning_rate": 1e-5, "crepa_encoder_frames_batch_size": 4})
        (tmp_path / "guide.yaml").write_text(imported.spec)
        (tmp_path / "q.yaml").write_text(
            "name: q\nmodel: {family: sd15}\ndata: {source: imagefolder, vae: v}\ntrain: {steps: 9}\nuse: [guide.yaml]\n"
        )
        config = load_spec(tmp_path / "q.yaml").arms[0].config
        assert (
            config.regularizer.type,
            config.regularizer.encoder.image_size,
            config.train.lr,
            config.train.steps,
        ) == ("urepa", 518, 1e-5, 9)
        assert any("no model_family, so this is a fragment" in line for line in imported.remarks)

    def test_frames_at_a_time_are_images_at_a_time(self, tmp_path):
        experiment = load(
            tmp_path, read(tmp_path, {**FLUX, "crepa_enabled": True, "crepa_encoder_frames_batch_size": 4})
        )
        assert experiment.run.encoder_batch_size == 4

    @pytest.mark.parametrize("value, dropout", [(0.1, 0.1), ("0.25", 0.25), (0, 0.0), (1, 1.0), (None, 0.0)])
    def test_caption_dropout_is_label_dropout_and_none_where_it_is_left_out(self, tmp_path, value, dropout):
        assert config_of(tmp_path, {**FLUX, "caption_dropout_probability": value}).train.label_dropout == dropout

    def test_words_and_names_are_read_in_any_case(self, tmp_path):
        given = {
            "model_family": "Z-Image", "model_flavour": "BASE", "model_type": "LoRA", "crepa_enabled": True, "crepa_encoder": "DINO_V2_S",
            "crepa_scheduler": "Cosine", "crepa_threshold_mode": "Permanent", "mixed_precision": "BF16", "resolution_type": "Pixel",
        }  # fmt: skip
        lower = {key: value.lower() if isinstance(value, str) else value for key, value in given.items()}
        assert config_of(tmp_path, given) == config_of(tmp_path, lower)
        config = config_of(tmp_path, given)
        assert (config.model.pretrained, config.regularizer.schedule.type) == ("Tongyi-MAI/Z-Image", "cosine")
        assert config.regularizer.encoder.name == "dinov2_vits14"
        assert (
            regularizer_of(tmp_path, crepa_enabled=True, crepa_encoder="DINOv2_ViTB14_reg").encoder.name
            == "dinov2_vitb14_reg"
        )
        assert regularizer_of(tmp_path, crepa_enabled=True, crepa_encoder="My/Encoder").encoder.name == "My/Encoder"

    def test_settings_that_the_web_interface_saved_are_those_under_config(self, tmp_path):
        saved = {
            "_metadata": {"name": "default", "model_family": None},
            "config": {"--model_family": "flux", "--checkpointing_steps": 50},
        }
        experiment = load(tmp_path, read(tmp_path, saved))
        assert (experiment.arms[0].config.model.family, experiment.run.checkpoint_every) == ("flux", 50)
        saved["config"]["--crepa_lamda"] = 1
        (line,) = refusal(tmp_path, saved)
        assert line.startswith("config.json:9:5: crepa_lamda: SimpleTuner has no such key")


def simpletuner_weight(step, *, kind, weight, end, warmup, decay, power, cutoff, total):
    """SimpleTuner's weight at a step; see its schedule in the reference: `decay` is an end, 0 is that of training."""
    if 0 < cutoff <= step:
        return 0.0
    if step < warmup:
        return weight * step / warmup
    progress = min((step - warmup) / max((decay or total) - warmup, 1), 1.0)
    if kind == "constant":
        return weight
    if kind == "linear":
        return weight + (end - weight) * progress
    if kind == "cosine":
        return end + (weight - end) * (1 + math.cos(math.pi * progress)) / 2
    return (weight - end) * (1 - progress) ** (power or 1.0) + end


class TestSchedule:
    @pytest.mark.parametrize("kind", ["constant", "linear", "cosine", "polynomial"])
    @pytest.mark.parametrize(
        "warmup, decay, cutoff, power",
        [
            (0, 0, 0, 1.0),
            (10, 30, 0, 2.0),
            (10, 10, 0, 2.0),
            (10, 4, 0, 0.5),
            (10, 1, 12, 2.0),
            (10, 11, 11, 1.0),
            (0, 1, 0, 0),
            (60, 50, 0, 1),
        ],
    )
    def test_every_step_has_the_weight_that_simpletuner_gives_it(self, tmp_path, kind, warmup, decay, cutoff, power):
        total = 50
        given = {
            **FLUX, "crepa_enabled": True, "max_train_steps": total, "crepa_lambda": 0.75, "crepa_scheduler": kind, "crepa_lambda_end": 0.125,
            "crepa_warmup_steps": warmup, "crepa_decay_steps": decay, "crepa_cutoff_step": cutoff, "crepa_power": power,
        }  # fmt: skip
        config = config_of(tmp_path, given)
        settings = {
            name: getattr(config.regularizer.schedule, name)
            for name in ("type", "end", "warmup_steps", "decay_steps", "cutoff_step", "power")
        }
        ours = Schedule(weight=config.regularizer.weight, total_steps=config.train.steps, **settings)
        theirs = {
            "kind": kind,
            "weight": 0.75,
            "end": 0.125,
            "warmup": warmup,
            "decay": decay,
            "power": power,
            "cutoff": cutoff,
            "total": total,
        }
        assert [ours(step) for step in range(total)] == pytest.approx(
            [simpletuner_weight(step, **theirs) for step in range(total)], abs=1e-15
        )

    def test_a_decay_within_the_warm_up_drops_one_step_after_it(self, tmp_path):
        given = {"crepa_enabled": True, "crepa_scheduler": "linear", "crepa_warmup_steps": 100, "crepa_decay_steps": 50}
        assert regularizer_of(tmp_path, **given).schedule.decay_steps == 101  # 0.5 at step 100, 0 from step 101 on
        assert regularizer_of(tmp_path, **{**given, "crepa_scheduler": "constant"}).schedule.decay_steps == 50


EXPECTED = {
    "crepa_enabled": True,
    "crepa_lambda": 0.25,
    "crepa_block_index": 3,
    "crepa_scheduler": "linear",
    "crepa_decay_steps": 50,
}


class TestWaysToGiveIt:
    @pytest.mark.parametrize(
        "text",
        [
            '{"--model_family": "flux", "--crepa_enabled": "true", "--crepa_lambda": "0.25", "crepa_block_index": "3", "--crepa_scheduler": "linear", "crepa_decay_steps": 5e1}',
            '\ufeff{\n\t"model_family": "flux",\n\t"crepa_enabled": 1,\n\t"crepa_lambda": 0.25, "crepa_block_index": 3.0,\n\t"crepa_scheduler": "linear", "crepa_decay_steps": 50,\n}\n',
        ],
        ids=["strings and dashes", "tabs and a last comma"],
    )
    def test_each_says_the_same(self, tmp_path, text):
        exported = export_settings(config_of(tmp_path, text)).settings
        assert {name: exported[name] for name in EXPECTED} == EXPECTED

    def test_flags_are_words_of_the_command_line(self, tmp_path):
        words = "--model_family=flux --crepa_enabled --crepa_lambda 0.25 --crepa_block_index=3 --crepa_scheduler linear"
        imported = import_config([*words.split(), "--crepa_decay_steps", "50", "--crepa_similarity_threshold=None"])
        exported = export_settings(load(tmp_path, imported).arms[0].config).settings
        assert {name: exported[name] for name in EXPECTED} == EXPECTED

    def test_what_is_written_there_stays_text_here(self, tmp_path):
        given = {
            **FLUX,
            "pretrained_model_name_or_path": "1e4",
            "crepa_enabled": True,
            "crepa_encoder": "x\ntrain: {steps: 1}\u2028 \u0085 \U0001f600",
        }
        imported = read(tmp_path, given)
        config = load(tmp_path, imported).arms[0].config
        assert (config.model.pretrained, config.train.steps) == ("1e4", 5000)
        assert config.regularizer.encoder.name == given["crepa_encoder"]

    def test_a_key_cannot_end_a_comment(self, tmp_path):
        imported = read(tmp_path, {**FLUX, "a\nseeds: 9\u2028seeds: 8\u0085seeds": 1})
        assert load(tmp_path, imported).seeds == (0,)


class TestWhatIsSaid:
    @pytest.mark.parametrize("name", [name for name in LOST if "." not in name])
    def test_every_key_without_a_place_is_named_with_the_reason(self, tmp_path, name):
        (line,) = [
            line
            for line in remarks(tmp_path, {**FLUX, "crepa_enabled": True, name: 0.3})
            if f"{name}: not carried: " in line
        ]
        assert line == f"config.json:4:3: {name}: not carried: {LOST[name][1]}"

    def test_what_loses_nothing_is_not_named(self, tmp_path):
        off = {
            "crepa_self_flow": False,
            "crepa_use_backbone_features": "false",
            "crepa_feature_source": "encoder",
            "layersync_enabled": False,
        }
        assert not [line for line in remarks(tmp_path, {**FLUX, "crepa_enabled": True, **off}) if "not carried" in line]

    def test_the_rest_is_named_in_one_line(self, tmp_path):
        lines = remarks(
            tmp_path, {**FLUX, "validation_prompt": "a cat", "optimizer": "adamw_bf16", "lr_scheduler": "sine"}
        )
        beginning = "config.json:1:1: not carried, because a spec has no field for them: "
        assert f"{beginning}validation_prompt, optimizer, lr_scheduler" in lines
        (line,) = [line for line in remarks(tmp_path, dict.fromkeys(WITHOUT_EFFECT, 1)) if beginning in line]
        assert line == beginning + ", ".join(WITHOUT_EFFECT)

    def test_keys_of_a_regularizer_that_is_off_have_no_effect_and_are_named(self, tmp_path):
        given = {
            **FLUX,
            "crepa_enabled": True,
            "urepa_lambda": 0.9,
            "urepa_enabled": False,
            "irepa_spatial_norm_alpha": 0.1,
        }
        lines = remarks(tmp_path, given)
        assert "config.json:1:1: not carried, because urepa_enabled is not true: urepa_lambda" in lines
        assert "config.json:1:1: not carried, because irepa_enabled is not true: irepa_spatial_norm_alpha" in lines
        assert config_of(tmp_path, given).regularizer.spatial_norm is None

    @pytest.mark.parametrize(
        "more, said",
        [
            ({}, "CLS token"),
            ({}, "block_index 8 is the papers' depth 9"),
            ({}, "pixels: vae"),
            ({}, "LayerNorm + Linear"),
            ({}, "resample.side: student, because SimpleTuner shrinks the larger grid"),
            ({"crepa_scheduler": "linear", "crepa_decay_steps": 50}, "the step at which the decay ends"),
            ({"crepa_similarity_threshold": 0.9}, "no bias correction and no minimum count"),
            ({"crepa_encoder": "qwen3-vl"}, "crepa_encoder: not carried: a vision-language model"),
            ({"irepa_enabled": True}, "projector.type: conv"),
            ({"ema_decay": 0.9}, "use_ema is off, so train.ema is 0.0"),
            ({}, "fill in train.steps"),
            ({}, "no model_flavour: black-forest-labs/FLUX.1-Krea-dev stands in"),
            (
                {"crepa_scheduler": "linear", "crepa_warmup_steps": 9, "crepa_decay_steps": 5},
                "decay_steps: 10 does the same",
            ),
            ({"lora_type": "lycoris"}, "lora_type: not carried: repa-lab trains PEFT's LoRA"),
            ({"model_type": "lora", "lora_rank": 8, "lora_alpha": 16}, "the adapter's scale is 1, and 2 there"),
            ({"model_family": "chroma"}, "gradient_checkpointing: not carried: diffusers cannot checkpoint"),
            ({"model_family": "pixart_sigma"}, "never attaches its regularizer to pixart"),
        ],
    )
    def test_every_difference_is_said_in_the_spec_and_to_the_caller(self, tmp_path, more, said):
        imported = read(tmp_path, {**FLUX, "crepa_enabled": True, **more})
        assert any(said in line for line in imported.remarks)
        header = " ".join(line.lstrip("# ") for line in imported.spec.splitlines() if line.startswith("#"))
        assert said in header

    def test_what_does_not_apply_is_not_said(self, tmp_path):
        said = " ".join(
            remarks(tmp_path, {**FLUX, "crepa_enabled": True, "crepa_spatial_align": False, "max_train_steps": 9})
        )
        for absent in ("decay ends", "bias correction", "manifold", "resample", "train.steps", "never attaches"):
            assert absent not in said
        assert "CLS" not in " ".join(remarks(tmp_path, FLUX))
