"""Training of pretrained families from tiny pipelines on disk, in the real layout and through the real loading code."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any, ClassVar

import diffusers
import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file

from repa_lab.data import DataError
from repa_lab.models.families import FAMILIES
from repa_lab.models.pretrained import load_denoiser
from repa_lab.models.released import PretrainedError, locate, problem_with
from repa_lab.orchestration.api import run_one
from repa_lab.runs import RunDirectory, RunsRoot, checkpoints
from repa_lab.training import model as model_module
from repa_lab.training.batches import generator, stream_seed
from repa_lab.training.export import export_model
from repa_lab.training.loop import train
from repa_lab.training.model import open_model, text_cache
from repa_lab.training.trainer import Trainer
from tests.training.conftest import (
    SETTINGS,
    assert_same,
    make_options,
    rows,
    run_steps,
    start_processes,
    weights,
    write_spec,
)
from tests.training.pretrained import (
    FRAMES,
    PRETRAINED,
    SIDES,
    make_pretrained_run,
    open_pretrained,
    write_clips,
    write_images,
    write_pipeline,
)

CPU = torch.device("cpu")
families = pytest.mark.parametrize("family", PRETRAINED)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder for what all tests of this file share: images, pipelines, the cache."""
    root = tmp_path_factory.mktemp("pretrained")
    write_images(root / "images")
    write_clips(root / "clips")
    return root


@pytest.fixture
def made(place):
    """A run of a family, its caches filled."""

    def make(family: str, **settings):
        data = place / ("clips" if FAMILIES[family].is_video else "images")
        run = make_pretrained_run(family, write_pipeline(family, place / family), data, **settings)
        open_pretrained(run, place / "cache")
        return run

    return make


@pytest.fixture(scope="module")
def runs() -> dict[str, RunDirectory]:
    """The runs that were trained, by everything that decides them: several tests look at one."""
    return {}


@pytest.fixture
def trained(made, place, runs):
    """The directory of a run that was trained for some steps and not measured; nothing may be written to it."""

    def go(family: str, steps: int = 2, options=None, **settings) -> RunDirectory:
        key = repr((family, steps, options, settings))
        if key not in runs:
            directory = RunDirectory(place / "runs" / str(len(runs)))
            runs[key] = run_steps(made(family, **settings), directory, place / "cache", steps, **(options or {}))
        return runs[key]

    return go


def latest(directory: RunDirectory) -> Path:
    found = checkpoints.latest(directory.checkpoints)
    assert found
    return found[1]


class TestEveryFamily:
    @families
    def test_lora_trains_with_its_regularizer_and_diffusers_loads_what_is_exported(
        self, family, trained, place, tmp_path
    ):
        directory = trained(family)
        first, second = rows(directory)
        assert np.isfinite([first["loss/denoise"], second["loss/denoise"], second["align/cosine"]]).all()
        assert second["loss/total"] != second["loss/denoise"]
        state = load_file(latest(directory) / "denoiser.safetensors")
        assert all("lora_" in name for name in state)
        assert sum(value.any().item() for name, value in state.items() if "lora_B" in name) > 0
        assert load_file(latest(directory) / "regularizer.safetensors")
        export_model(directory, tmp_path / "lora", "last")
        pipeline = diffusers.DiffusionPipeline.from_pretrained(place / family)
        if hasattr(pipeline, "load_lora_weights"):
            pipeline.load_lora_weights(tmp_path / "lora")
            net = getattr(pipeline, FAMILIES[family].kind)
        else:
            net = peft.PeftModel.from_pretrained(
                getattr(pipeline, FAMILIES[family].kind), tmp_path / "lora"
            ).base_model.model
        ours = {name.removeprefix("net.").replace(".default", ""): value for name, value in state.items()}
        loaded = {
            name.replace(".default_0", "").replace(".default", ""): p
            for name, p in net.named_parameters()
            if "lora_" in name
        }
        assert loaded.keys() == ours.keys()
        assert all(torch.equal(loaded[name], ours[name]) for name in ours)

    @families
    def test_full_training_moves_the_models_own_weights(self, family, trained, place):
        directory = trained(family, 1, **{"model.train": "full"})
        state = load_file(latest(directory) / "denoiser.safetensors")
        before = dict(load_denoiser(place / family, FAMILIES[family]).named_parameters())
        assert state.keys() == before.keys()
        moved = [name for name, value in state.items() if not torch.equal(value, before[name])]
        assert len(moved) > len(state) / 2


@pytest.mark.parametrize("family", ["sdxl", "flux", "dit", "wan"])
class TestTheRun:
    def test_goes_on_from_a_checkpoint_as_if_nothing_had_been(self, family, made, place, trained, fresh):
        run, straight, broken = made(family), trained(family, 4), fresh("broken")
        for _ in range(2):
            run_steps(run, broken, place / "cache", 2)
        assert rows(broken) == rows(straight)
        assert_same(weights(broken), weights(straight))

    def test_weight_0_is_no_regularizer_bit_for_bit(self, family, trained):
        off = trained(family, **{"regularizer.weight": 0.0})
        none = trained(family, regularizer={"type": "none"})
        assert_same(weights(off), weights(none), only="denoiser:")
        assert [row["loss/denoise"] for row in rows(off)] == [row["loss/denoise"] for row in rows(none)]

    def test_micro_batches_and_checkpointed_blocks_compute_the_same(self, family, trained):
        plain, parted = trained(family), trained(family, options={"micro_batch": 1})
        checkpointed = trained(family, options={"gradient_checkpointing": True})
        for ours, theirs in zip(rows(parted), rows(plain), strict=True):  # losses and the norm of the gradients
            assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-4)
        assert_same(weights(checkpointed), weights(plain), only="denoiser:")

    def test_bf16_keeps_what_trains_in_float32_and_what_does_not_in_bf16(self, family, made, place):
        trainer = Trainer(made(family), make_options(precision="bf16"), place / "cache")
        kept = trainer.model.denoiser.net._keep_in_fp32_modules or ()  # by the class, such as Wan's norms
        kinds = {
            (p.requires_grad, p.dtype)
            for name, p in trainer.model.denoiser.named_parameters()
            if not set(kept) & set(name.split("."))
        }
        assert kinds == {(True, torch.float32), (False, torch.bfloat16)}
        row = trainer.step(next(trainer.batches())).row()
        assert np.isfinite([row["loss/denoise"], row["align/cosine"]]).all()


@pytest.mark.slow
@pytest.mark.parametrize("family", ["sdxl", "flux"])
def test_compiled_by_inductor_lora_trains_the_same(family, trained):
    plain, compiled = trained(family), trained(family, options={"compile": True})
    for ours, theirs in zip(rows(compiled), rows(plain), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-4)


@pytest.mark.parametrize(
    "family", ["sdxl", pytest.param("qwen_image", marks=pytest.mark.slow)]
)  # of the latter's last block, the text goes nowhere
def test_two_processes_train_what_one_does(family, place, tmp_path):
    """The README's command for several GPUs, with LoRA and checkpointed blocks."""
    run = make_pretrained_run(family, write_pipeline(family, place / family), place / "images")
    changed = {name: section for name, section in run.config.model_dump(mode="json").items() if name != "evaluate"}
    changed |= {
        "name": "two",
        "train": {**changed["train"], "steps": 3},
        "evaluate": {**SETTINGS["evaluate"], "every": 3, "samples": 20, "batch_size": 6},
    }
    one, two = (
        write_spec(tmp_path / str(count), changed, place / "cache", gradient_checkpointing=True) for count in (1, 2)
    )
    run_one(one, None, None, one.parent / "runs")
    processes = start_processes(two, 2)
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    one, two = (RunsRoot(spec.parent / "runs").runs()[0] for spec in (one, two))
    assert one.run_id == two.run_id
    assert len(rows(one)) == 4
    for ours, theirs in zip(rows(two)[:3], rows(one)[:3], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-4)


class TestSampling:
    PROMPTS = ("picture 3 of noise", "a red heart")

    @pytest.mark.parametrize("family", ["sd15", "sdxl", "flux", "sana", "wan", "ltxvideo"])
    def test_the_trained_pipeline_draws_what_stock_diffusers_draws(self, family, made, place, trained, tmp_path):
        settings = {"evaluate.prompts": list(self.PROMPTS), "evaluate.guidance": {"scale": 3.0}, "train.lr": 0.1}
        run, directory = made(family, **settings), trained(family, **settings)
        trainer = Trainer(run, make_options(), place / "cache")
        trainer.resume(latest(directory))
        trainer.model.denoiser.eval()
        export_model(directory, tmp_path / "lora", "last")
        pipeline = diffusers.DiffusionPipeline.from_pretrained(place / family)
        plain = copy.deepcopy(getattr(pipeline, FAMILIES[family].kind))
        pipeline.load_lora_weights(tmp_path / "lora")
        side = SIDES.get(family, 64)

        def stock(captions, stream):
            draws = [generator(0, stream, number) for number in range(len(captions))]
            how = {"height": side, "width": side, "num_inference_steps": 2, "guidance_scale": 3.0, "output_type": "np"}
            if family == "sana":
                how["use_resolution_binning"] = False
            if FAMILIES[family].is_video:
                how["num_frames"] = FRAMES
            images, *_ = pipeline(captions, generator=draws, return_dict=False, **how)
            return torch.from_numpy((images * 255).round().astype(np.uint8)).movedim(-1, 1)

        train_images = open_pretrained(run, place / "cache")
        captions = [train_images.source.captions[i] for i in train_images.split.train[:3].tolist()]
        sampler = trainer.model.sampler(trainer.config.evaluate)
        ours, shown = sampler(range(3)), sampler.shown()
        assert_close_pixels(ours, stock(captions, "sampling"))
        assert_close_pixels(shown, stock(list(self.PROMPTS), "prompts"))
        setattr(pipeline, FAMILIES[family].kind, plain)
        assert (ours.int() - stock(captions, "sampling").int()).abs().max() > 2  # what was trained is seen

    # Latents of four shapes, packed and scaled in ways of their own.
    @pytest.mark.parametrize(
        ("family", "train", "rounding"),
        [
            ("sdxl", "full", "truncate"),
            ("flux2", "full", "nearest"),
            ("qwen_image", "lora", "nearest"),
            ("sana", "lora", "nearest"),
        ],
    )
    def test_in_half_precision_the_denoiser_alone_computes_in_it(self, family, train, rounding, made, place):
        run = made(family, **{"model.train": train, "evaluate.rounding": rounding})
        images = open_pretrained(run, place / "cache")
        model = open_model(run, images, make_options(precision="bf16"), place / "cache", CPU)
        net, vae = model.denoiser.eval().net, images.space.vae.model
        linear = [layer for layer in net.modules() if type(layer) is torch.nn.Linear]
        inside: set[torch.dtype] = set()
        for layer in linear:
            layer.register_forward_hook(lambda layer, given, out: inside.add(out.dtype))
        decode, seen = vae.decode, []
        vae.decode = lambda z, *args, **options: decode(seen.append(z) or z, *args, **options)
        drawn = model.sampler(run.config.evaluate)(range(2))
        vae.decode = decode
        (z,) = seen
        assert inside == {torch.bfloat16}
        assert z.dtype is torch.float32 and not torch.equal(z, z.bfloat16().float())
        pixels = type(vae).decode(vae, z).sample.reshape(drawn.shape)
        levels = (pixels / 2 + 0.5).clamp(0, 1) * 255
        assert torch.equal(drawn, (levels.round() if rounding == "nearest" else levels.floor()).to(torch.uint8))
        assert "forward" not in vars(net)  # training's own precision is back

    def test_a_sample_depends_on_its_number_alone(self, made, place):
        run = made("sdxl")
        model = open_model(run, open_pretrained(run, place / "cache"), make_options(), place / "cache", CPU)
        model.denoiser.eval()
        sampler = model.sampler(run.config.evaluate)
        assert_close_pixels(sampler(range(1, 3)), sampler(range(3))[1:])
        assert stream_seed(0, "sampling", 1) != stream_seed(0, "sampling", 2)

    def test_large_images_are_drawn_a_few_at_a_time_with_the_same_result(self, made, place, monkeypatch):
        run = made("sdxl", **{"evaluate.prompts": list(self.PROMPTS)})
        model = open_model(run, open_pretrained(run, place / "cache"), make_options(), place / "cache", CPU)
        model.denoiser.eval()
        sampler = model.sampler(run.config.evaluate)
        whole, shown = sampler(range(5)), sampler.shown()
        assert model.at_once == 8
        monkeypatch.setattr(model_module, "_PIXELS_AT_ONCE", 2 * 64 * 64)
        assert sampler.at_once == 2
        assert_close_pixels(sampler(range(5)), whole)
        assert_close_pixels(sampler.shown(), shown)

    @pytest.mark.parametrize("buckets", [None, {"step": 16, "max_aspect": 2.0}], ids=["square", "several sizes"])
    def test_a_measured_run_has_distance_agreement_and_pictures(self, made, place, fresh, buckets):
        prompts = {"evaluate.prompts": ["picture 3 of noise"]}
        run = made("flux", **{"evaluate.every": 2, "train.steps": 2, "data.buckets": buckets, **prompts})
        directory = fresh("run")
        train(run, directory, make_options(), place / "cache")
        row = directory.rows()[-1]
        assert {"frechet:efficientnet_lite0@16/pipeline2", "heldout/cka", "heldout/cosine", "heldout/gap"} <= row.keys()
        assert np.isfinite(
            [row["heldout/cka"], row["heldout/cosine"], row["frechet:efficientnet_lite0@16/pipeline2"]]
        ).all()
        assert list(directory.sample_grids()) == [2]


def assert_close_pixels(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """Alike but for a grey level where rounding of the last bits decides."""
    assert ours.shape == theirs.shape
    assert (ours.int() - theirs.int()).abs().max() <= 1


class TestBuckets:
    BUCKETS: ClassVar[dict[str, Any]] = {"data.buckets": {"step": 16, "max_aspect": 2.0}}

    def test_every_batch_is_of_one_size_and_every_size_is_trained_on(self, made, place):
        run = made("flux", **self.BUCKETS, **{"train.steps": 40})
        trainer = Trainer(run, make_options(), place / "cache")
        shapes = [tuple(batch.x.shape[-2:]) for batch in trainer.batches()]
        assert len(set(shapes)) == 3
        assert all(height * width <= 64 for height, width in shapes)  # latents, of 64 px squares

    def test_tokens_of_both_sides_have_the_images_own_grid(self, made, place):
        run = made("flux", **self.BUCKETS)
        trainer = Trainer(run, make_options(), place / "cache")
        seen = set()
        for batch in trainer.batches():
            trainer.model.denoiser(batch.x, batch.t, **batch.condition)
            (tap,), (targets,) = trainer.aligner.taps.values(), trainer.aligner.targets.values()
            student, teacher = tap.take(), targets(batch.ids, CPU)
            assert student.grid == (batch.x.shape[-2] // 2, batch.x.shape[-1] // 2)
            assert (student.grid[0] > student.grid[1]) == (teacher.grid[0] > teacher.grid[1])
            seen.add(student.grid)
        assert len(seen) > 1

    def test_sdxl_is_told_the_sizes(self, made, place):
        run = made("sdxl", **{**self.BUCKETS, "data.buckets": {"step": 32, "max_aspect": 2.0}})
        trainer = Trainer(run, make_options(), place / "cache")
        source = open_pretrained(run, place / "cache").source
        batch = next(trainer.batches())
        for row, image in zip(batch.condition["time_ids"].tolist(), batch.ids.tolist(), strict=True):
            with source.open(image) as picture:
                assert row[:2] == [picture.height, picture.width]
            assert row[4:] == source.sizes[image].tolist()


def test_captions_are_encoded_again_for_a_pipeline_that_reads_other_layers(tmp_path):
    folder = write_pipeline("krea2", tmp_path / "krea2")
    index = json.loads((folder / "model_index.json").read_text())
    assert index["text_encoder_select_layers"] == [*range(2, 36, 3)]

    def cache():
        return text_cache(FAMILIES["krea2"], folder, make_options(), tmp_path / "cache")

    cache().build(["a cat"], lambda texts: {"text": torch.ones(len(texts), 1)}, 1)
    assert cache().read(["a cat"])["text"].tolist() == [[1.0]]
    (folder / "model_index.json").write_text(json.dumps(index | {"text_encoder_select_layers": [*range(1, 35, 3)]}))
    with pytest.raises(DataError, match="the embedding of 'a cat' is not in the cache"):
        cache().read(["a cat"])


class TestRefusals:
    def test_a_folder_of_another_family(self, place):
        folder = write_pipeline("flux", place / "flux")
        assert problem_with(folder, FAMILIES["flux"]) is None
        message = problem_with(folder, FAMILIES["sdxl"])
        assert message == f"'{folder}' is a FluxPipeline, not of family sdxl: StableDiffusionXLPipeline"
        assert "it has no readable model_index.json" in problem_with(place / "images", FAMILIES["sdxl"])

    def test_a_pipeline_that_lacks_an_encoder(self, tmp_path):
        folder = write_pipeline("sdxl", tmp_path / "sdxl")
        index = (folder / "model_index.json").read_text()
        (folder / "model_index.json").write_text(index.replace('"text_encoder_2"', '"text_encoder_9"'))
        assert "lacks text_encoder_2" in problem_with(folder, FAMILIES["sdxl"])

    def test_weights_that_are_not_here(self, monkeypatch):
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        with pytest.raises(PretrainedError, match="no folder and not in the local cache; pass a folder or go online"):
            locate("nobody/has-this")

    def test_weights_that_are_damaged(self, tmp_path):
        folder = write_pipeline("sdxl", tmp_path / "sdxl")
        (weights_file,) = (folder / "unet").glob("*.safetensors")
        weights_file.write_bytes(weights_file.read_bytes()[:1000])
        with pytest.raises(PretrainedError, match="cannot load the unet of"):
            load_denoiser(folder, FAMILIES["sdxl"])

    def test_no_captions(self, place, tmp_path):
        bare = write_images(tmp_path / "bare")
        (bare / "metadata.jsonl").unlink()
        run = make_pretrained_run("sdxl", write_pipeline("sdxl", place / "sdxl"), bare)
        with pytest.raises(DataError, match="sdxl is trained with captions and there are none"):
            open_pretrained(run, place / "cache")
        dit = make_pretrained_run("dit", write_pipeline("dit", place / "dit"), bare)
        open_pretrained(dit, place / "cache")  # which is told classes

    def test_a_vae_that_the_pipeline_could_not_draw_with(self, place, tmp_path):
        pipeline = write_pipeline("flux", place / "flux")
        shutil.copytree(pipeline / "vae", tmp_path / "vae")
        run = make_pretrained_run("flux", pipeline, place / "images", **{"data.vae": str(tmp_path / "vae")})
        open_pretrained(run, place / "cache")
        config = json.loads((tmp_path / "vae" / "config.json").read_text())
        (tmp_path / "vae" / "config.json").write_text(json.dumps(config | {"shift_factor": None}))
        with pytest.raises(DataError, match="vae' lacks shift_factor, which the pipeline's own VAE has") as caught:
            open_pretrained(run, tmp_path / "cache")
        assert caught.value.field == "vae" and not (tmp_path / "cache").exists()

    def test_a_trained_class_is_dropped_by_the_runs_own_stream_alone(self, made, place):
        run = made("dit", **{"train.label_dropout": 0.0})
        trainer = Trainer(run, make_options(), place / "cache")
        batch = next(trainer.batches())
        torch.manual_seed(1)
        first = trainer.model.denoiser(batch.x, batch.t, **batch.condition)
        torch.manual_seed(2)
        assert torch.equal(trainer.model.denoiser(batch.x, batch.t, **batch.condition), first)
