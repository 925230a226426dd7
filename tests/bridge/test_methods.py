"""The methods that SimpleTuner adds to a regularizer, or trains without one: LayerSync and Self-Transcendence, both ways."""

from __future__ import annotations

import json

import pytest

from repa_lab import load_spec
from repa_lab.align.settings import REGULARIZERS
from repa_lab.bridge.exporting import export_settings
from repa_lab.bridge.importing import import_config
from repa_lab.spec.document import parse_yaml
from tests.bridge.test_importing import FLUX, SDXL, config_of, load, read, refusal, remarks

LAYERSYNC = {
    "layersync_enabled": True,
    "layersync_student_block": 8,
    "layersync_teacher_block": 16,
    "layersync_lambda": 0.3,
}
STAGE_SELF = {
    "stage": "self", "student_block": 8, "teacher_block": 16, "weight": 0.25, "cfg_scale": 4.0, "timestep_min": 0.3,
    "timestep_max": 0.6, "stop_step": 5000, "projector_hidden_dim": 512,
}  # fmt: skip
TRANSCENDENCE = {"distillation_method": "self_transcendence", "distillation_config": STAGE_SELF}
ALL = {**FLUX, "crepa_enabled": True, "crepa_lambda": 0.75, "irepa_enabled": True, **LAYERSYNC, **TRANSCENDENCE}
ON = {"crepa_enabled": True}
FRAMES = {
    "crepa_adjacent_distance": 2, "crepa_adjacent_tau": 0.5, "crepa_normalize_by_frames": False,
    "crepa_normalize_neighbour_sum": True,
}  # fmt: skip
# As a spec has them.
SYNCED = {"type": "layersync", "block_index": 7, "teacher_block": 15}
TAUGHT = {"type": "self_transcendence", "block_index": 7, "teacher_block": 15, "loss": "mse"}


class TestLayerSync:
    def test_it_counts_from_one_there_and_from_zero_here(self, tmp_path):
        config = config_of(tmp_path, {**FLUX, **LAYERSYNC})
        found = config.regularizer
        assert (found.type, found.block_index, found.teacher_block, found.weight) == ("layersync", 7, 15, 0.3)
        assert export_settings(config).settings == {"crepa_enabled": False, **LAYERSYNC}
        assert export_settings(config).lost == ()

    def test_zero_is_the_first_block_and_the_default_weight_there(self, tmp_path):
        given = {**FLUX, **LAYERSYNC, "layersync_student_block": 0, "layersync_lambda": 0}
        found = config_of(tmp_path, given).regularizer
        assert (found.block_index, found.weight) == (0, 0.2)
        assert any("layersync_lambda: SimpleTuner takes 0 for 0.2" in line for line in remarks(tmp_path, given))

    def test_without_a_teacher_the_suggestion_stands_in(self, tmp_path):
        given = {**FLUX, "layersync_enabled": True, "layersync_student_block": 8}
        config = config_of(tmp_path, given)
        assert config.regularizer.teacher_block is None
        assert any("SimpleTuner takes the student for its own teacher" in line for line in remarks(tmp_path, given))
        assert export_settings(config).settings["layersync_teacher_block"] > 8

    def test_what_is_wrong_has_its_place(self, tmp_path):
        (line,) = refusal(tmp_path, {**FLUX, "layersync_enabled": True})
        assert line == "config.json:3:3: layersync_enabled: SimpleTuner needs layersync_student_block as well"
        (line,) = refusal(tmp_path, {**SDXL, **LAYERSYNC})
        assert "layersync is for transformers; sdxl is a UNet" in line
        (line,) = refusal(tmp_path, {**FLUX, **LAYERSYNC, "layersync_lamda": 1})
        assert "allowed: layersync_student_block, layersync_teacher_block, layersync_lambda" in line
        assert "did you mean 'layersync_lambda'?" in line


class TestSelfTranscendence:
    def test_its_stage_self_comes_back_as_it_was(self, tmp_path):
        config = config_of(tmp_path, {**FLUX, **TRANSCENDENCE})
        found = config.regularizer
        assert (found.type, found.block_index, found.teacher_block, found.loss) == ("self_transcendence", 8, 16, "mse")
        assert (found.weight, found.guidance, found.low, found.high) == (0.25, 4.0, 0.3, 0.6)
        assert (found.schedule.cutoff_step, found.projector.type, found.projector.width) == (5000, "mlp", 512)
        assert export_settings(config).settings == {"crepa_enabled": False, **TRANSCENDENCE}
        assert export_settings(config).lost == ()

    def test_defaults_are_written_as_it_has_them(self, tmp_path):
        blocks = {"stage": "self", "student_block": 8, "teacher_block": 16}
        given = {**FLUX, **TRANSCENDENCE, "distillation_config": blocks}
        exported = export_settings(config_of(tmp_path, given)).settings["distillation_config"]
        expected = {"weight": 0.5, "cfg_scale": 30.0, "timestep_min": 0.4, "timestep_max": 0.7, "stop_step": 0}
        assert exported == {**blocks, **expected, "projector_hidden_dim": 2048}

    def test_each_way_to_write_it_says_the_same(self, tmp_path):
        flat = config_of(tmp_path, {**FLUX, **TRANSCENDENCE}).regularizer
        nested = {"self_transcendence": STAGE_SELF, "dmd": {"weight": "x"}}
        assert config_of(tmp_path, {**FLUX, **TRANSCENDENCE, "distillation_config": nested}).regularizer == flat
        words = ["--model_family=flux", "--distillation_method", "self_transcendence"]
        imported = import_config([*words, f"--distillation_config={json.dumps(STAGE_SELF)}"])
        assert load(tmp_path, imported).arms[0].config.regularizer == flat

    @pytest.mark.parametrize(
        "given", [{"distillation_method": "dmd"}, {"distillation_config": {**STAGE_SELF, "stage": "vae"}}]
    )
    def test_another_distillation_is_named_and_not_carried(self, tmp_path, given):
        given = {**FLUX, **TRANSCENDENCE, **given}
        assert config_of(tmp_path, given).regularizer.type == "none"
        lines = remarks(tmp_path, given)
        assert any("distillation_method: not carried: of SimpleTuner's distillations" in line for line in lines)
        assert any(line.endswith("a spec has no field for them: distillation_config") for line in lines)

    def test_an_adapter_as_the_teacher_is_named(self, tmp_path):
        given = {**FLUX, **TRANSCENDENCE, "distillation_config": {**STAGE_SELF, "teacher_adapter_path": "a"}}
        assert any("teacher_adapter_path: not carried: the teacher is" in line for line in remarks(tmp_path, given))

    def test_what_is_wrong_has_its_place(self, tmp_path):
        text = json.dumps({**FLUX, "distillation_method": "self_transcendence"})[:-1]
        text += (
            ',\n"distillation_config": {"stage": "self", "student_block": 1,\n  "wieght": 1, "teacher_block": true}}'
        )
        lines = refusal(tmp_path, text)
        assert any(line.startswith("config.json:3:3: distillation_config.wieght: SimpleTuner has no") for line in lines)
        assert any(line.startswith("config.json:3:16: distillation_config.teacher_block: ") for line in lines)
        (line,) = refusal(tmp_path, {**SDXL, **TRANSCENDENCE})
        assert "self_transcendence is for transformers; sdxl is a UNet" in line


class TestCREPA:
    def test_the_frames_keys_without_a_family_are_crepas(self):
        imported = import_config([f"--{name}={json.dumps(value)}" for name, value in {**FRAMES, **ON}.items()])
        fragment, _ = parse_yaml(imported.spec, None)
        found = REGULARIZERS["crepa"].settings.model_validate(fragment["regularizer"])
        assert (found.type, found.distance, found.tau, found.cumulative) == ("crepa", 2, 0.5, False)
        assert (found.normalize_frames, found.normalize_neighbours) == (False, True)
        assert (found.projector.type, found.weight, found.spatial_align) == ("linear", 0.5, True)

    @pytest.mark.parametrize("family", ["wan", "ltxvideo"])
    def test_a_family_of_videos_has_crepa_and_gives_the_keys_back(self, tmp_path, family):
        config = config_of(tmp_path, {"model_family": family, **ON, **FRAMES, "crepa_lambda": 0.75})
        found = config.regularizer
        assert (config.data.source, found.type, found.block_index, found.weight) == ("clips", "crepa", 8, 0.75)
        exported = export_settings(config)
        assert exported.lost == ()
        assert {name: exported.settings[name] for name in (*ON, *FRAMES, "crepa_lambda")} == {
            **ON, **FRAMES, "crepa_lambda": 0.75,
        }  # fmt: skip
        assert config_of(tmp_path, {"model_family": family, **exported.settings}).regularizer == found

    def test_what_simpletuner_refuses_is_read_and_not_written(self, tmp_path):
        given = {"model_family": "wan", **ON, "crepa_cumulative_neighbors": True}
        config = config_of(tmp_path, given)
        assert config.regularizer.cumulative
        exported = export_settings(config)
        assert exported.lost == (
            "regularizer.cumulative: true cannot be expressed: it documents crepa_cumulative_neighbors, and its parser"
            " refuses it",
        )
        assert "crepa_cumulative_neighbors" not in exported.settings
        assert any(
            "documents this key and refuses it; export leaves it out" in line for line in remarks(tmp_path, given)
        )

    def test_repa_on_clips_is_crepa_without_neighbours_there(self, tmp_path):
        config = config_of(tmp_path, {"model_family": "wan", **ON})
        repa = REGULARIZERS["repa"].settings.model_validate(
            {
                name: getattr(config.regularizer, name)
                for name in REGULARIZERS["repa"].settings.model_fields
                if name != "type" and hasattr(config.regularizer, name)
            }
        )
        exported = export_settings(config.model_copy(update={"regularizer": repa}))
        assert (exported.settings["crepa_adjacent_distance"], exported.lost) == (0, ())

    def test_the_videos_of_the_data_backend_are_clips(self, tmp_path):
        video = {
            "id": "v",
            "dataset_type": "video",
            "instance_data_dir": "films",
            "resolution": 480,
            "video": {"num_frames": 33},
        }
        (tmp_path / "data.json").write_text(json.dumps([{"id": "i", "instance_data_dir": "photos"}, video]))
        given = {"model_family": "wan", **ON, "data_backend_config": "data.json"}
        data = config_of(tmp_path, given).data
        assert (data.source, data.path, data.frames, data.resolution) == ("clips", "films", 33, 480)
        assert any("here a clip is a subfolder of frames, or a .gif" in line for line in remarks(tmp_path, given))
        assert config_of(tmp_path, {**given, "model_family": "flux"}).data.path == "photos"

    def test_they_do_nothing_for_a_family_of_images(self, tmp_path):
        given = {**FLUX, **ON, **FRAMES}
        assert config_of(tmp_path, given).regularizer.type == "repa"
        (line,) = [line for line in remarks(tmp_path, given) if "a spec has no field for them" in line]
        assert line.endswith(": " + ", ".join(FRAMES))

    def test_a_wrong_value_has_its_place(self, tmp_path):
        (line,) = refusal(tmp_path, {**ON, **FRAMES, "crepa_adjacent_tau": 0})
        assert ": crepa_adjacent_tau: " in line
        (line,) = refusal(tmp_path, {**ON, **FRAMES, "crepa_adjacent_distance": -1})
        assert ": crepa_adjacent_distance: " in line


class TestTogether:
    def test_they_become_a_list_and_come_back_as_they_were(self, tmp_path):
        config = config_of(tmp_path, ALL)
        assert [one.type for one in config.regularizer] == ["repa", "layersync", "self_transcendence"]
        exported = export_settings(config)
        assert exported.lost == ()
        assert {name: exported.settings[name] for name in ALL if name not in FLUX} == {
            name: value for name, value in ALL.items() if name not in FLUX
        }
        assert config_of(tmp_path, {**FLUX, **exported.settings}).regularizer == config.regularizer

    def test_a_mistake_is_told_at_the_key_of_its_own_method(self, tmp_path):
        (line,) = refusal(tmp_path, {**ALL, "layersync_lambda": -1})
        assert ": layersync_lambda: " in line
        bad = {**STAGE_SELF, "timestep_max": 2.0}
        (line,) = refusal(tmp_path, {**ALL, "distillation_config": bad})
        assert ": distillation_config.timestep_max: " in line
        (line,) = refusal(tmp_path, {**ALL, "crepa_lambda": -1})
        assert ": crepa_lambda: " in line

    def test_the_baseline_of_the_last_line_has_none_of_them(self, tmp_path):
        imported = read(tmp_path, ALL)
        file = tmp_path / "with_baseline.yaml"
        file.write_text(imported.spec.replace("# include:", "include:"))
        first, baseline = load_spec(file, {"data.path": "x"}).arms
        assert (len(first.config.regularizers), baseline.config.regularizers) == (3, ())


class TestLimits:
    def lost(self, tmp_path, *members) -> list[str]:
        chosen = tuple(REGULARIZERS[one["type"]].settings.model_validate(one) for one in members)
        config = config_of(tmp_path, FLUX).model_copy(update={"regularizer": chosen if len(chosen) > 1 else chosen[0]})
        return [line.split(":")[0] for line in export_settings(config).lost]

    @pytest.mark.parametrize(
        ("path", "base", "change"),
        [
            ("weight", SYNCED, {"weight": 0.0}),
            ("schedule", SYNCED, {"schedule": {"cutoff_step": 10}}),
            ("weight", TAUGHT, {"weight": 0.0}),
            ("schedule", TAUGHT, {"schedule": {"type": "linear", "cutoff_step": 10}}),
            ("guidance", TAUGHT, {"guidance": 0.5}),
            ("low", TAUGHT, {"low": 0.5, "high": 0.5}),
            ("loss", TAUGHT, {"loss": "cosine"}),
            ("weights", TAUGHT, {"weights": "model.safetensors"}),
            ("projector.type", TAUGHT, {"projector": {"type": "linear"}}),
        ],
    )
    def test_a_setting_that_it_cannot_express_is_named_alone(self, tmp_path, path, base, change):
        assert self.lost(tmp_path, base) == []
        assert self.lost(tmp_path, {**base, **change}) == [f"regularizer.{path}"]

    def test_a_method_that_it_lacks_is_named_and_switches_nothing_on(self, tmp_path):
        config = config_of(tmp_path, FLUX)
        haste = REGULARIZERS["haste"].settings(encoder={"image_size": 224, "pixels": "vae", "cache": False})
        exported = export_settings(config.model_copy(update={"regularizer": haste}))
        assert exported.settings == {"crepa_enabled": False}  # though its settings are REPA's and more
        assert exported.lost == ("regularizer.type: haste is not one of SimpleTuner's",)

    def test_members_of_a_list_are_named_by_position(self, tmp_path):
        assert self.lost(tmp_path, SYNCED, {"type": "dispersive"}, {**SYNCED, "name": "again"}) == [
            "regularizer.1.type",
            "regularizer.2.type",
        ]
