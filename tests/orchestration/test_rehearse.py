"""Rehearsals of the shipped experiments and of what users write: the real scheduler, workers, models' classes and reports."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from repa_lab import load_results, load_spec, sweep
from repa_lab.data.sources import Clips
from repa_lab.encoders.registry import attention_problem
from repa_lab.orchestration.checks import check
from repa_lab.orchestration.rehearsal import MARK, rehearsal_root, rehearse_experiment
from repa_lab.runs import RunsRoot, State, checkpoints
from repa_lab.spec import SpecError
from repa_lab.training.resolve import needs_of
from tests.training.pretrained import write_clips, write_images

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
PRETRAINED = sorted(
    file.stem for file in EXPERIMENTS.glob("*.yaml") if "pretrained" in str(load_spec(file).arms[0].draft.value)
)
# Between them: a UNet and a transformer, LoRA and full training, two encoders, a schedule, checkpointed blocks.
BY_DEFAULT = {"sdxl_manifold"}


def rehearse_file(stem: str, tmp_path: Path, **overrides):
    """Rehearse an experiment of the house; its folder, and the root of rehearsals."""
    outcome = sweep(EXPERIMENTS / f"{stem}.yaml", tmp_path / "runs", overrides, workers=2, rehearse=True)
    assert not outcome.failures
    return outcome, RunsRoot(rehearsal_root(tmp_path / "runs"))


def went_through_everything(outcome, root: RunsRoot) -> None:
    ids = set(outcome.directory.manifest.run_ids)
    assert {run.run_id for run in root.runs()} == ids
    for run_id in ids:
        run = root.run(run_id)
        assert run.state.state is State.DONE
        kinds = [event["event"] for event in run.events()]
        assert kinds == ["running", "interrupted", "resumed", "running", "done"]
        steps = [row["step"] for row in run.rows()]
        assert steps == sorted(steps)
        measured = [row["step"] for row in run.rows() if any(name.startswith("frechet:") for name in row)]
        assert measured == [2, 4]
        assert checkpoints.latest(run.checkpoints)
        assert list(run.sample_grids()) == [2, 4]
    page = (outcome.path / "report.html").read_text()
    assert MARK in page


@pytest.mark.parametrize(
    "stem", [stem if stem in BY_DEFAULT else pytest.param(stem, marks=pytest.mark.slow) for stem in PRETRAINED]
)
def test_every_arm_of_a_shipped_experiment_goes_through_everything(stem, tmp_path):
    outcome, root = rehearse_file(stem, tmp_path)
    went_through_everything(outcome, root)
    asked = load_spec(EXPERIMENTS / f"{stem}.yaml")
    assert [arm.label for arm in outcome.directory.manifest.arms] == [arm.label for arm in asked.arms]
    assert not (tmp_path / "runs").exists()  # nothing of a rehearsal is among results
    results = load_results(outcome.path)
    assert set(results.summary["arm"]) == {arm.label for arm in asked.arms}


def rehearsed(tmp_path: Path, **sections):
    spec = {
        "name": "mine",
        "model": {"family": "flux", "pretrained": "black-forest-labs/FLUX.1-dev", "train": "lora"},
        "regularizer": {"type": "repa", "encoder": {"name": "dinov2_vitg14", "image_size": 518}},
        "data": {"source": "imagefolder", "path": "/data/on/the/cluster", "resolution": 1024},
        "train": {"steps": 5000, "batch_size": 8},
        **sections,
    }
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(spec))
    return load_spec(tmp_path / "mine.yaml")


class TestWhatIsRehearsed:
    def test_a_spec_for_several_gpus_is_rehearsed_in_one_process_here(self, tmp_path):
        """Four processes cannot share the two images of a rehearsed batch."""
        asked = rehearsed(tmp_path, run={"gpus_per_run": 4, "executor": "slurm"})
        experiment = rehearse_experiment(asked, tmp_path)
        check(experiment, None)
        assert (experiment.run.gpus_per_run, experiment.run.executor) == (1, "local")

    def test_a_schedule_keeps_its_proportions_and_all_its_parts(self, tmp_path):
        schedule = {"type": "cosine", "warmup_steps": 100, "decay_steps": 5000, "cutoff_step": 2600}
        experiment = rehearsed(tmp_path, regularizer={"type": "repa", "schedule": schedule})
        (arm,) = rehearse_experiment(experiment, tmp_path / "root").arms
        shape = arm.config.regularizer.schedule
        assert (shape.warmup_steps, shape.decay_steps, shape.cutoff_step) == (1, 4, 3)
        assert arm.config.train.steps == 4

    def test_a_block_means_the_same(self, tmp_path):
        experiment = rehearsed(tmp_path, axes={"regularizer.block_index": [8, 56]})
        arms = rehearse_experiment(experiment, tmp_path / "root").arms
        assert [arm.config.regularizer.block_index for arm in arms] == [8, 56]
        config = yaml.safe_load((Path(arms[0].config.model.pretrained) / "transformer" / "config.json").read_text())
        assert (config["num_layers"], config["num_single_layers"]) == (19, 38)

    def test_a_model_from_scratch_keeps_its_depth_and_its_patch(self, tmp_path):
        experiment = load_spec(EXPERIMENTS / "paper/repa/b2.yaml")
        for arm in rehearse_experiment(experiment, tmp_path / "root").arms:
            assert arm.config.model.size == "narrow-B/2"
            assert arm.config.data.vae.startswith(str(tmp_path))

    def test_a_pipeline_that_is_given_another_vae_has_one_that_it_can_draw_with(self, tmp_path):
        data = {
            "source": "imagefolder",
            "path": "/data/on/the/cluster",
            "resolution": 1024,
            "vae": "somebody/better-vae",
        }
        (arm,) = rehearse_experiment(rehearsed(tmp_path, data=data), tmp_path / "root").arms
        assert arm.config.data.vae == arm.config.model.pretrained
        config = yaml.safe_load((Path(arm.config.data.vae) / "vae" / "config.json").read_text())
        assert config["shift_factor"] is not None  # by which Flux shifts what it decodes

    def test_encoders_are_tiny_ones_of_the_same_patches(self, tmp_path):
        names = ["dinov2_vitg14", "dinov3_vitb16", "convnext_tiny", "efficientnet_lite0"]
        experiment = rehearsed(tmp_path, axes={"regularizer.encoder.name": names})
        encoders = [arm.config.regularizer.encoder for arm in rehearse_experiment(experiment, tmp_path / "root").arms]
        assert [one.name for one in encoders] == [
            "tiny-dinov2_vitg14",
            "tiny-dinov3_vitb16",
            "efficientnet_lite0",
            "efficientnet_lite0",
        ]
        assert [one.image_size for one in encoders] == [56, 64, 64, 64]

    def test_attention_is_learned_from_as_many_layers_as_a_tiny_encoder_has(self, tmp_path):
        regularizer = {"type": "haste", "encoder": {"name": "dinov2_vitb14", "cache": False}}
        spec = rehearsed(tmp_path, model={"family": "sit", "size": "B/2"}, regularizer=regularizer)
        (arm,) = rehearse_experiment(spec, tmp_path / "root").arms
        (needs,) = needs_of(arm.config)
        assert arm.config.regularizer.encoder.name == "tiny-dinov2_vitb14"
        assert attention_problem("tiny-dinov2_vitb14", needs.encoder_attention) is None
        assert len(needs.attention) == len(needs.encoder_attention) == 1

    def test_the_specs_own_images_are_used_where_they_are(self, tmp_path):
        own = write_images(tmp_path / "own", count=60)
        experiment = rehearsed(tmp_path, data={"source": "imagefolder", "path": str(own), "resolution": 1024})
        (arm,) = rehearse_experiment(experiment, tmp_path / "root").arms
        few = Path(arm.config.data.path)
        files = sorted(few.glob("*.png"))
        assert len(files) == 24
        assert all(file.read_bytes() == (own / file.name).read_bytes() for file in files)
        captions = (few / "metadata.jsonl").read_text().splitlines()
        assert len(captions) == 24
        assert set(captions) <= set((own / "metadata.jsonl").read_text().splitlines())

    def test_clips_keep_their_frames_and_are_the_specs_own_or_generated(self, tmp_path):
        own = write_clips(tmp_path / "own", count=30, frames=9)
        for path, first in ((own, "clip 0 of noise"), (tmp_path / "nowhere", "a red circle that moves, number 0")):
            (arm,) = rehearse_experiment(
                rehearsed(
                    tmp_path,
                    model={"family": "wan", "pretrained": "Wan-AI/Wan2.1-T2V-1.3B-Diffusers", "train": "lora"},
                    data={"source": "clips", "path": str(path), "frames": 5, "frame_step": 2, "resolution": 480},
                ),
                tmp_path / "root",
            ).arms
            assert (arm.config.data.frames, arm.config.data.frame_step) == (5, 2)
            clips = Clips(arm.config.data)
            assert (len(clips), clips.captions[0]) == (24, first)
            assert clips.read([0]).shape == (1, 3, 5, 64, 64)

    @pytest.mark.slow
    def test_a_comparison_speaks_of_the_settings_that_are_meant(self, tmp_path):
        baseline = {"regularizer.encoder.name": "dinov2_vits14"}
        sections = {
            "axes": {"regularizer.encoder.name": ["dinov2_vits14", "dinov2_vitg14"]},
            "compare": {"baseline": baseline},
        }
        outcome = sweep(rehearsed(tmp_path, **sections), tmp_path / "runs", rehearse=True)
        baselines = [arm.baseline for arm in outcome.directory.manifest.arms]
        assert baselines == [None, "name=dinov2_vits14"]

    @pytest.mark.slow
    def test_a_search_tries_two_trials_around_it(self, tmp_path):
        search = {"space": {"regularizer.weight": {"log": [0.1, 1.0]}}, "trials": 40, "objective": {"metric": "fid"}}
        outcome = sweep(rehearsed(tmp_path, search=search), tmp_path / "runs", rehearse=True)
        assert not outcome.failures
        assert len(outcome.directory.manifest.arms) == 2
        specs = [RunsRoot(outcome.path.parent).run(run_id).spec for run_id in outcome.directory.manifest.run_ids]
        assert {spec["train"]["steps"] for spec in specs} == {4}
        assert len({spec["regularizer"]["weight"] for spec in specs}) == 2


class TestTheCommand:
    @pytest.mark.slow
    def test_a_second_rehearsal_finds_everything_done(self, tmp_path):
        experiment = rehearsed(tmp_path)
        first = sweep(experiment, tmp_path / "runs", rehearse=True)
        again = sweep(experiment, tmp_path / "runs", rehearse=True)
        assert (first.trained, again.trained) == (1, 0)

    def test_what_would_fail_after_hours_fails_now(self, tmp_path):
        folder = tmp_path / "pipeline"
        experiment = rehearsed(tmp_path, regularizer={"type": "urepa"})
        with pytest.raises(SpecError, match="flux is a transformer: use repa, not urepa"):
            sweep(experiment, tmp_path / "runs", rehearse=True)
        experiment = rehearsed(
            tmp_path,
            model={"family": "flux", "pretrained": str(folder)},
            regularizer={"type": "repa", "block_index": 57},
        )
        with pytest.raises(
            SpecError, match=re.escape("flux has 57 blocks: block_index must be 0 to 56, got 57")
        ) as refused:
            sweep(experiment, tmp_path / "runs", rehearse=True)
        assert "mine.yaml:" in str(refused.value)
