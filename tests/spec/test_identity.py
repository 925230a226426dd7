from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from repa_lab.align.settings import EncoderSettings, RegularizerSettings
from repa_lab.data.settings import DigitsSettings
from repa_lab.metrics.protocol import PROTOCOL_VERSION
from repa_lab.orchestration.plan import identify_run
from repa_lab.spec import ExtractorConfig, RunConfig, load_spec
from repa_lab.spec.identity import RecordedSpecError, Run, identify, local_files
from repa_lab.training.resolve import Inventory
from tests.spec.examples import mapping

CONTENTS = {"a.bin": "111", "b.bin": "222", "copy-of-a.bin": "111"}


def run(overrides: dict[str, Any] | None = None, seed: int = 0, protocol: int = 1, data: str = "d") -> Run:
    """The run of a spec that sets a bit of everything, for a UNet with U-REPA."""
    source = mapping(
        model={"family": "unet", "size": "S"},
        regularizer={"type": "urepa", "weight": 0.5, "encoder": {"name": "e", "weights": "a.bin"}},
        data={"source": "imagefolder", "path": "here", "resolution": 64},
        evaluate={"extractor": {"weights": "a.bin"}, "encoder": {"name": "f"}},
    )
    return identify(load_spec(source, overrides).arms[0].config, seed, protocol, data, CONTENTS)


def test_an_id_is_short_stable_hexadecimal():
    assert re.fullmatch("[0-9a-f]{12}", run().run_id)
    assert run().run_id == run().run_id


def test_seed_protocol_and_data_are_part_of_it():
    ids = {run().run_id, run(seed=1).run_id, run(protocol=2).run_id, run(data="other").run_id}
    assert len(ids) == 4


SCIENCE = {
    "model.family": "sit", "model.size": "B", "model.train": "lora", "model.rank": 8, "model.pretrained": "x",
    "regularizer.type": "repa", "regularizer.weight": 0.25, "regularizer.manifold_weight": 1, "regularizer.block_index": "mid",
    "regularizer.encoder.name": "g", "regularizer.encoder.image_size": 14, "regularizer.encoder.standardize": True,
    "regularizer.projector.type": "linear", "regularizer.projector.width": 64, "regularizer.schedule.type": "linear",
    "regularizer.schedule.warmup_steps": 1, "regularizer.schedule.decay_steps": 9, "regularizer.schedule.end": 0.1,
    "regularizer.schedule.cutoff_step": 5, "regularizer.schedule.power": 2, "regularizer.encoder.weights": "b.bin",
    "data.resolution": 32, "data.vae": "v", "data.holdout": 16,
    "train.steps": 11, "train.batch_size": 8, "train.lr": 1e-3, "train.weight_decay": 0.1, "train.grad_clip": None,
    "train.ema": 0.9, "train.label_dropout": 0.2, "train.time": "logit_normal",
    "evaluate.every": 5, "evaluate.samples": 100, "evaluate.sampler.type": "sde", "evaluate.sampler.solver": "heun",
    "evaluate.sampler.steps": 20, "evaluate.guidance.scale": 1.5, "evaluate.guidance.low": 0.1, "evaluate.guidance.high": 0.7,
    "evaluate.extractor.name": "efficientnet_lite0", "evaluate.extractor.weights": "b.bin", "evaluate.encoder": None,
    "evaluate.timestep": 0.25, "evaluate.batch_size": 9, "evaluate.block_index": "mid",
    "regularizer.encoder.cache": False, "regularizer.encoder.pixels": "vae", "regularizer.projector.kernel": 5,
    "regularizer.loss": "nt_xent", "regularizer.temperature": 0.2, "regularizer.spatial_norm": 0.6, "data.flip": True,
    "regularizer.resample.side": "teacher", "regularizer.resample.when": "before", "regularizer.manifold.scope": "batch_pooled",
    "regularizer.manifold.reduction": "sum", "regularizer.manifold.distance": "l1_margin", "regularizer.manifold.margin": 0.2,
    "regularizer.manifold.sample": 64, "regularizer.schedule.similarity_threshold": 0.6,
    "regularizer.schedule.similarity_ema_decay": 0.9, "regularizer.schedule.similarity_min_count": 5,
    "regularizer.schedule.threshold_mode": "recoverable", "regularizer.schedule.probe_every": 7,
    "model.revision": "v2", "data.buckets": {"step": 32}, "data.caption_column": "text", "evaluate.prompts": ["a cat"],
    "evaluate.labels": "random", "evaluate.extractor.reference": "b.bin", "evaluate.metrics": ["frechet", "kid"], "evaluate.full": {"samples": 64},
    "evaluate.precision": "fp32", "evaluate.rounding": "truncate",
    "train.optimizer.type": "SGD", "train.optimizer.betas": [0.9, 0.95], "train.optimizer.eps": 1e-6,
    "train.lr_schedule.type": "linear", "train.lr_schedule.warmup_steps": 1, "train.lr_schedule.decay_steps": 9,
    "train.lr_schedule.end": 0.1, "train.loss_weight.type": "min_snr", "train.loss_weight.gamma": 3.0,
}  # fmt: skip
# They change only together with others, or stand for content that is hashed in their place.
HUB = {"data.name": "other/set", "data.config": "small", "data.split": "test", "data.revision": "v2"}
ELSEWHERE = {
    *HUB,
    "data.source",
    "data.path",
    "train.steps",
    "regularizer.encoder.tae",
    "regularizer.spatial_align",
    "regularizer.name",
    "train.optimizer.momentum",
}


def leaves(section: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Dotted paths of all settings that are not sections themselves; those of what may be a list once."""
    for name, field in section.model_fields.items():
        inner = field.annotation
        if name == "encoder":
            inner = EncoderSettings if prefix == "regularizer." else None
        elif name == "extractor":
            inner = ExtractorConfig
        elif name == "regularizer":
            inner = RegularizerSettings
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            yield from leaves(inner, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def test_no_setting_is_forgotten_here():
    assert set(leaves(RunConfig)) - ELSEWHERE <= SCIENCE.keys()


def test_every_setting_of_science_is_part_of_it():
    ids = {path: run({path: value}).run_id for path, value in SCIENCE.items()}
    ids["as it is"] = run().run_id
    assert len(set(ids.values())) == len(ids)


@pytest.mark.parametrize(
    "overrides",
    [
        {"data.path": "elsewhere"},
        {"regularizer.encoder.weights": "copy-of-a.bin"},
        {"regularizer.weight": 0.5, "regularizer.schedule.type": "constant"},
        {"run.device": "cpu", "run.precision": "bf16", "run.wandb.project": "other"},
        {"name": "other", "question": "Another?", "seeds": 5, "compare.metric": "x"},
    ],
)
def test_where_things_lie_and_how_they_run_is_not(overrides):
    assert run(overrides).run_id == run().run_id


def test_the_remaining_settings_are_part_of_it_too():
    encoder = {"name": "e", "weights": "a.bin", "pixels": "tae"}
    by_tae = [run({"regularizer.encoder": {**encoder, "tae": tae}}).run_id for tae in ("x", "y")]
    apart = run({"regularizer.spatial_align": False, "regularizer.manifold_weight": 0.0}).run_id
    aligned = run({"regularizer.manifold_weight": 0.0}).run_id
    assert len({*by_tae, apart, aligned, run().run_id}) == 5
    hub = {"data.source": "hub", "data.name": "owner/set"}
    assert len({run({**hub, path: value}).run_id for path, value in [*HUB.items(), ("data.name", "owner/set")]}) == 5


LATER = {
    "data.flip": False, "regularizer.loss": "cosine", "regularizer.temperature": 0.1, "regularizer.spatial_align": True,
    "regularizer.spatial_norm": None, "regularizer.resample": {}, "regularizer.manifold.scope": "intra",
    "regularizer.projector.kernel": 3, "regularizer.encoder.pixels": "image", "regularizer.schedule.probe_every": 50,
    "model.revision": None, "data.buckets": None, "data.caption_column": None, "evaluate.prompts": [],
    "evaluate.precision": "train", "evaluate.rounding": "nearest",
}  # fmt: skip


@pytest.mark.parametrize("path", LATER)
def test_a_setting_that_came_later_changes_nothing_at_its_neutral_value(path):
    assert run({path: LATER[path]}).run_id == run().run_id


def test_several_encoders_are_one_setting():
    one, other = {"name": "e", "weights": "a.bin"}, {"name": "g"}

    def of(*encoders: dict[str, Any]) -> Run:
        return run({"regularizer.encoder": list(encoders)})

    assert of(one).run_id == run().run_id
    assert of({**one, "weights": "copy-of-a.bin"}, other).run_id == of(one, other).run_id
    assert (
        len({of(one, other).run_id, of(other, one).run_id, of(one, one).run_id, of(other).run_id, of(one).run_id}) == 5
    )
    assert len({of(one, other).config, of(one, other).config, of(one).config}) == 2  # settings are keys of mappings
    assert local_files(of(one, {**other, "weights": "b.bin"}).config) == ("a.bin", "b.bin")
    again = of(one, other)
    assert Run.from_json(again.run_id, json.loads(json.dumps(again.to_json()))) == again


def test_whole_numbers_may_be_written_without_a_point():
    assert run({"regularizer.weight": 1}).run_id == run({"regularizer.weight": 1.0}).run_id


def test_what_a_run_does_not_use_is_not():
    none = {"regularizer.type": "none"}
    assert run({**none, "regularizer.weight": 3.0, "regularizer.encoder.name": "z"}).run_id == run(none).run_id
    repa = {"regularizer.type": "repa"}
    assert run(none).run_id != run(repa).run_id
    # A field of U-REPA is none of REPA's: an arm of a sweep over both ignores it.
    types = {"one_at_a_time": {"regularizer.type": ["repa"]}}
    ids = {identify(arm.config, 0, 1, "d", {}).run_id for weight in (3.0, 9.0)
           for arm in load_spec(mapping(regularizer={"type": "urepa", "manifold_weight": weight}, **types)).arms}  # fmt: skip
    assert len(ids) == 3
    digits = {"data.source": "digits", "data.resolution": 8}
    left_out = mapping(data={"source": "digits"})
    written = mapping(data={"source": "digits", "resolution": 8})
    ids = {identify(load_spec(source).arms[0].config, 0, 1, "d", {}).run_id for source in (left_out, written)}
    assert len(ids) == 1
    assert run(digits).run_id != run().run_id


def test_a_weight_of_zero_is_not_the_baseline():
    """It runs the same steps, but it is its own arm with its own row."""
    assert run({"regularizer.weight": 0.0}).run_id != run({"regularizer.type": "none"}).run_id


def test_only_files_that_are_used_are_read():
    def named(overrides: dict[str, Any]) -> tuple[str, ...]:
        return local_files(run(overrides).config)

    assert named({}) == ("a.bin",)
    assert named({"evaluate.extractor.weights": "b.bin"}) == ("a.bin", "b.bin")
    assert named({"regularizer.type": "none", "evaluate.extractor.weights": None}) == ()
    assert named({"regularizer.type": "none", "evaluate.encoder.weights": "b.bin"}) == ("a.bin", "b.bin")


def test_a_run_survives_its_file():
    first = run({"regularizer.weight": 0.1 + 0.2}, seed=7)
    spec = json.loads(json.dumps(first.to_json()))
    assert spec["seed"] == 7
    assert Run.from_json(first.run_id, spec) == first


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"seed": None}, "it has no settings with a seed"),
        ({"data": {"source": "digits", "rotate": 3}}, "data.rotate: Extra inputs are not permitted"),
        ({"train": {"steps": 0}}, "train.steps: Input should be greater than or equal to 1"),
    ],
)
def test_a_record_that_this_version_cannot_read_is_told_in_a_line(change, what):
    with pytest.raises(RecordedSpecError) as caught:
        Run.from_json("0123456789ab", {**run().to_json(), **change})
    assert (
        str(caught.value) == f"the spec.json of run 0123456789ab is damaged, or of another version of repa-lab: {what}"
    )


def test_uniform_is_the_default_where_nothing_is_pretrained():
    times = (None, "uniform", "logit_normal", {"type": "logit_normal", "mean": 0.5}, {"std": 0.5})
    ids = [run({"train.time": time}).run_id for time in times]
    assert run().run_id == ids[0] == ids[1]
    assert len(set(ids)) == 4
    tuned = [run({"model.pretrained": "x", "train.time": time}).run_id for time in times]
    assert run({"model.pretrained": "x"}).run_id == tuned[0]
    assert len(set(tuned)) == 5


def test_times_written_in_two_ways_are_one_setting():
    for word in ("uniform", "logit_normal"):
        assert run({"train.time": {"type": word}}).run_id == run({"train.time": word}).run_id
    assert run({"train.time": {"mean": 0.0, "std": 1.0}}).run_id == run({"train.time": "logit_normal"}).run_id


def test_neutral_settings_are_left_out_of_what_is_hashed_wherever_they_stand():
    """An encoder of a list, and sections within sections."""
    plain = {"name": "e", "weights": "a.bin"}
    later = {**plain, "pixels": "image", "tae": None}
    assert run({"regularizer.encoder": [later, later]}).run_id == run({"regularizer.encoder": [plain, plain]}).run_id
    assert run({"evaluate.encoder": {"name": "f", "pixels": "image"}}).run_id == run().run_id
    everything = {path: value for path, value in LATER.items() if path != "regularizer.resample"}
    assert run(everything).run_id == run().run_id


class TestFolders:
    """Weights that lie in a local folder: what is in them counts, not where they lie."""

    def write(self, folder: Path, weight: bytes = b"weights", config: str = "{}") -> str:
        (folder / "unet").mkdir(parents=True)
        (folder / "unet" / "model.safetensors").write_bytes(weight)
        (folder / "model_index.json").write_text(config)
        return str(folder)

    def id_of(self, kind: str, place: str) -> str:
        """The id of a run that takes its pipeline, its VAE or its tiny autoencoder from there."""
        model = {"family": "sdxl", "pretrained": place if kind == "pretrained" else "some/pipeline"}
        encoder = {"name": "e"} | ({"pixels": "tae", "tae": place} if kind == "tae" else {})
        data = {"source": "digits"} | ({"vae": place} if kind == "vae" else {})
        source = mapping(model=model, regularizer={"type": "urepa", "encoder": encoder}, data=data)
        return identify_run(load_spec(source).arms[0].config, 0).run_id

    @pytest.fixture(params=["pretrained", "vae", "tae"])
    def kind(self, request) -> str:
        return request.param

    def test_a_folder_that_was_moved_is_the_same(self, kind, tmp_path):
        before = self.id_of(kind, self.write(tmp_path / "here"))
        moved = shutil.move(tmp_path / "here", tmp_path / "deep" / "there")
        assert self.id_of(kind, str(moved)) == before
        assert self.id_of(kind, str(moved) + "/") == before
        assert self.id_of(kind, self.write(tmp_path / "filled anew")) == before

    def test_the_way_to_it_does_not_matter(self, kind, tmp_path, monkeypatch):
        absolute = self.id_of(kind, self.write(tmp_path / "here"))
        (tmp_path / "link").symlink_to(tmp_path / "here")
        monkeypatch.chdir(tmp_path)
        assert self.id_of(kind, "here") == self.id_of(kind, "./here") == self.id_of(kind, "link") == absolute

    def test_a_changed_weight_or_config_is_another(self, kind, tmp_path):
        places = [
            self.write(tmp_path / "1"), self.write(tmp_path / "2", b"Weights"), self.write(tmp_path / "3", b"weights."),
            self.write(tmp_path / "4", config="[]"), self.write(tmp_path / "5"), self.write(tmp_path / "6"),
        ]  # fmt: skip
        (tmp_path / "5" / "unet" / "model.safetensors").rename(tmp_path / "5" / "unet" / "other.safetensors")
        (tmp_path / "6" / "extra").write_text("")
        assert len({self.id_of(kind, place) for place in places}) == 6

    def test_what_the_hubs_client_keeps_beside_it_does_not_count(self, kind, tmp_path):
        before = self.id_of(kind, self.write(tmp_path / "here"))
        (tmp_path / "here" / ".cache" / "huggingface").mkdir(parents=True)
        (tmp_path / "here" / ".cache" / "huggingface" / "x.metadata").write_text("when it was fetched")
        (tmp_path / "here" / ".gitattributes").write_text("lfs")
        assert self.id_of(kind, str(tmp_path / "here")) == before

    def test_what_is_no_folder_is_a_name_at_the_hub(self, kind, tmp_path):
        names = ["stabilityai/sdxl", "stabilityai/sdxl-turbo", "nowhere", str(tmp_path / "not" / "there")]
        assert len({self.id_of(kind, name) for name in names}) == 4
        source = mapping(model={"family": "sdxl", "pretrained": "a/b"}, data={"source": "digits", "vae": "c/d"})
        arm = load_spec(source).arms[0]
        assert (
            identify_run(arm.config, 0).run_id
            == identify(
                Inventory().resolve(arm.config), 0, PROTOCOL_VERSION, DigitsSettings().describe().fingerprint, {}
            ).run_id
        )

    def test_a_files_content_counts_too(self, tmp_path):
        for name, content in (("a.safetensors", b"1"), ("b.safetensors", b"1"), ("c.safetensors", b"2")):
            (tmp_path / name).write_bytes(content)
        ids = [self.id_of("vae", str(tmp_path / f"{name}.safetensors")) for name in "abc"]
        assert ids[0] == ids[1] != ids[2]

    def test_a_folder_under_one_setting_is_not_taken_for_another(self, tmp_path):
        place = self.write(tmp_path / "here")
        assert len({self.id_of(kind, place) for kind in ("pretrained", "vae", "tae")}) == 3

    def test_only_those_that_are_used_are_read(self):
        source = mapping(model={"family": "sdxl", "pretrained": "p"}, regularizer={"type": "urepa", "encoder": {"name": "e"}},
                         data={"source": "digits", "vae": "v"})  # fmt: skip
        assert local_files(load_spec(source).arms[0].config) == ("p", "v")
        tae = {"regularizer.encoder.pixels": "tae", "regularizer.encoder.tae": "t"}
        assert local_files(load_spec(source, tae).arms[0].config) == ("p", "t", "v")
        assert local_files(load_spec(source, {**tae, "regularizer.type": "none"}).arms[0].config) == ("p", "v")


def test_a_run_with_a_pretrained_model_survives_its_file():
    """Prompts are a list there and a tuple here, for settings are keys of mappings."""
    settings = {
        "model.pretrained": "x",
        "evaluate.prompts": ["a cat", "a dog"],
        "data.buckets": {"step": 32, "max_aspect": 3},
    }
    first = run(settings)
    again = Run.from_json(first.run_id, json.loads(json.dumps(first.to_json())))
    assert again == first
    assert hash(again.config) == hash(first.config)
    assert again.config.evaluate.prompts == ("a cat", "a dog")
    assert len({run({**settings, "data.buckets": {"step": step}}).run_id for step in (32, 64)}) == 2
    assert run({**settings, "evaluate.prompts": ["a dog", "a cat"]}).run_id != first.run_id
