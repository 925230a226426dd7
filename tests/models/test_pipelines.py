"""Every family's pipeline, tiny and of diffusers' own classes: what it conditions, hands to its scheduler and samples."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import diffusers
import peft
import pytest
import torch
import transformers
from torch import nn

from repa_lab.models import tiny
from repa_lab.models.families import FAMILIES
from repa_lab.models.families.shared import unflatten, unpack
from repa_lab.models.family import Family, network_of, pipeline_of
from repa_lab.models.pretrained import DiffusersDenoiser
from repa_lab.models.tiny import build_net, write_tiny_pipeline
from tests.rounding import DENOISER, rounding

OURS = [family for family in FAMILIES.values() if family.pipeline]
families = pytest.mark.parametrize("family", OURS, ids=lambda family: family.name)
texted = pytest.mark.parametrize("family", [one for one in OURS if one.pipeline.encode], ids=lambda family: family.name)
CAPTIONS = ["a cat", "a longer caption of a dog, on grass", "Rain"]
SIZE = (64, 96)  # height and width are not taken for one another
FRAMES = 9  # three latent frames of Wan, two of LTX-Video
# Its texts are read with more padding than its pipeline gives them, which rounds otherwise.
ROUNDED = {"kandinsky5"}
PADDED_WITHIN = {"krea2"}  # before the end of its template
Load = Callable[..., Any]


@pytest.fixture(autouse=True, scope="module")
def quiet() -> Iterator[None]:
    shown = [(logs, logs.get_verbosity()) for logs in (diffusers.utils.logging, transformers.utils.logging)]
    for logs, _ in shown:
        logs.set_verbosity_error()
        logs.disable_progress_bar()
    yield
    for logs, verbosity in shown:
        logs.set_verbosity(verbosity)
        logs.enable_progress_bar()


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Load:
    """A family's tiny pipeline, written once; keywords replace its parts."""

    @functools.cache
    def folder(name: str) -> Path:
        path = tmp_path_factory.mktemp("pipelines") / name
        write_tiny_pipeline(FAMILIES[name], path)
        return path

    def loaded(family: Family, **parts: None) -> Any:
        return prepared(diffusers.DiffusionPipeline.from_pretrained(folder(family.name), **parts), family)

    return loaded


def prepared(pipe: Any, family: Family) -> Any:
    """The pipeline, quiet, with no weight of its denoiser at zero, so that nothing is passed over."""
    pipe.set_progress_bar_config(disable=True)
    if pipeline_of(family).allow:
        pipeline_of(family).allow(pipe, *SIZE)
    net, random = net_of(pipe, family), torch.Generator().manual_seed(1)
    for parameter in net.parameters() if net else ():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.2, generator=random)
    return pipe


def net_of(pipe: Any, family: Family) -> Any:
    return getattr(pipe, family.kind)


def encoded(pipe: Any, family: Family, captions: list[str]) -> dict[str, torch.Tensor]:
    """Conditioning by text; where there is none, by class."""
    encode = pipeline_of(family).encode
    with torch.no_grad():
        return encode(pipe, captions) if encode else {"class_labels": torch.arange(len(captions)) + 1}


def sized(family: Family, config: Any, batch: int, size: tuple[int, int]) -> dict[str, torch.Tensor]:
    frames = torch.tensor([(*size, 0, 0, *size)] * batch, dtype=torch.float32)
    sizes = pipeline_of(family).sizes
    return sizes(config, frames) if sizes else {}


def size_of(pipe: Any, family: Family) -> tuple[int, int]:
    """Of an image: the model's own where its pipeline takes no other."""
    if "height" in inspect.signature(type(pipe).__call__).parameters:
        return SIZE
    return (net_of(pipe, family).config.sample_size * family.latent_stride,) * 2


def sampled(pipe: Any, family: Family, batch: int = len(CAPTIONS), **arguments: Any) -> torch.Tensor:
    taken = inspect.signature(type(pipe).__call__).parameters
    size = size_of(pipe, family)
    sizes = {"height": size[0], "width": size[1], "original_size": size, "num_frames": FRAMES}
    random = [torch.Generator().manual_seed(seed) for seed in range(batch)]
    given = {name: value for name, value in sizes.items() if name in taken} | arguments
    return pipe(**given, num_inference_steps=2, generator=random, output_type="pt", return_dict=False)[0]


def by_text(call: dict[str, Any], captions: list[str]) -> dict[str, Any]:
    """The call's arguments with texts in place of conditioning."""
    if "class_labels" in call:
        return call
    settings = {name: value for name, value in call.items() if isinstance(value, bool | int | float)}
    # Some pipelines take no negative prompt for none, or one for a whole batch.
    needs_negative = not settings.keys().isdisjoint({"true_cfg_scale", "enable_prompt_rewrite"})
    guided = {"negative_prompt": [""] * len(captions)} if needs_negative else {}
    return {"prompt": captions, **settings, **guided}


def first_step(pipe: Any, family: Family, **arguments: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What the pipeline hands to its scheduler, the latents that its model saw, and their time."""
    steps, step = [], pipe.scheduler.step

    @functools.wraps(step)
    def record(output: torch.Tensor, timestep: torch.Tensor, sample: torch.Tensor, *rest: Any, **options: Any) -> Any:
        scale = getattr(pipe.scheduler, "scale_model_input", lambda sample, timestep: sample)
        steps.append((output.clone(), scale(sample, timestep).clone(), timestep / 1000))
        return step(output, timestep, sample, *rest, **options)

    pipe.scheduler.step = record
    sampled(pipe, family, **arguments)
    del pipe.scheduler.step
    return steps[0]


def as_map(values: torch.Tensor, family: Family, size: tuple[int, int]) -> torch.Tensor:
    """Latents as ``(B, C, H, W)``, or of clips ``(B, C, F, H, W)``, from how a pipeline holds them."""
    if family.is_video:
        frames, (height, width) = family.latent_frames(FRAMES), (side // family.latent_stride for side in size)
        return (
            values
            if values.ndim == 5
            else unflatten(values, values.new_zeros(len(values), values.shape[2], frames, height, width))
        )
    if values.ndim == 5:  # one frame, channels last
        return values.squeeze(1).movedim(-1, 1)
    if values.ndim == 4:
        return values
    height, width = (side // family.latent_stride for side in size)
    channels = values[0].numel() // (height * width)
    layout = unflatten if values.shape[1] == height * width else unpack
    return layout(values, values.new_zeros(len(values), channels, height, width))


def check_prediction(pipe: Any, family: Family) -> None:
    net, size = net_of(pipe, family), size_of(pipe, family)
    condition, null = (encoded(pipe, family, captions) for captions in (CAPTIONS, [""] * len(CAPTIONS)))
    output, latents, time = first_step(pipe, family, **pipeline_of(family).call(condition, null, 1.0))
    sizes = sized(family, net.config, len(CAPTIONS), size)
    times = time.float().expand(len(CAPTIONS))
    with torch.no_grad():
        predicted = DiffusersDenoiser(net, family)(as_map(latents, family, size), times, **condition, **sizes)
    expected = as_map(output, family, size)
    torch.testing.assert_close(predicted, expected, rtol=0, atol=rounding(expected, DENOISER))


@texted
def test_the_conditioning_is_what_the_network_takes(family, load):
    pipe = load(family, **{family.kind: None, "vae": None})
    config = build_net(family, network_of(family).tiny).config
    condition = {**encoded(pipe, family, CAPTIONS), **sized(family, config, len(CAPTIONS), SIZE)}
    tokens = next(value.shape[-2] for value in condition.values() if value.ndim > 2)
    shapes = {name: tuple(value.shape) for name, value in condition.items()}
    assert shapes == {
        name: (len(CAPTIONS), *shape) for name, shape in network_of(family).condition(config, tokens).items()
    }
    for name, value in condition.items():
        assert value.is_floating_point() is not ("mask" in name), name
        assert "mask" not in name or family.name in PADDED_WITHIN or (value.diff(dim=1) <= 0).all(), name


@texted
def test_a_caption_is_encoded_alike_in_any_company(family, load):
    pipe = load(family, **{family.kind: None, "vae": None})
    together = encoded(pipe, family, [*CAPTIONS, ""])
    for number, caption in enumerate((*CAPTIONS, "")):
        alone = encoded(pipe, family, [caption])
        for name, value in together.items():
            torch.testing.assert_close(alone[name][0], value[number])
    for name, value in together.items():
        assert "mask" in name or all((value[-1] != row).any() for row in value[:-1]), name


def test_ernie_image_reads_512_tokens_of_a_caption(load):
    pipe = load(FAMILIES["ernie_image"], transformer=None, vae=None)
    condition = encoded(pipe, FAMILIES["ernie_image"], ["x" * 600, "x" * 20])
    (whole,) = pipe.encode_prompt(["x" * 600], torch.device("cpu"))
    assert len(whole) == 601  # with a token for the beginning
    assert condition["encoder_attention_mask"].sum(dim=1).tolist() == [512, 21]
    assert torch.equal(condition["encoder_hidden_states"][0], whole[:512])
    assert not condition["encoder_hidden_states"][1, 21:].any()


@families
def test_sampling_from_conditioning_is_sampling_from_text(family, load):
    pipe = load(family)
    condition, null = (encoded(pipe, family, captions) for captions in (CAPTIONS, [""] * len(CAPTIONS)))
    call = pipeline_of(family).call
    if family.name == "chroma":  # the numbers that it makes of its mask itself mask nothing
        encode = pipe._get_t5_prompt_embeds
        pipe._get_t5_prompt_embeds = lambda **given: tuple(
            part if part.ndim > 2 else part.bool() for part in encode(**given)
        )
    expected = sampled(pipe, family, **by_text(call(condition, null, 3.0), CAPTIONS))
    textless = load(
        family, **{name: None for name in pipe.components if name.startswith(("text_encoder", "tokenizer"))}
    )
    images = sampled(textless, family, **call(condition, null, 3.0))
    assert torch.equal(images, expected) or (family.name in ROUNDED and torch.allclose(images, expected, atol=1e-3))
    assert images.shape[-2:] == size_of(pipe, family)
    other = {name: value.flip(0) for name, value in condition.items()}
    assert not torch.equal(sampled(textless, family, **call(other, null, 3.0)), images)


@families
def test_the_prediction_is_what_the_pipeline_gives_its_scheduler(family, load):
    check_prediction(load(family), family)


def test_pixart_sigma_reads_longer_texts_and_is_told_no_size(tmp_path):
    family = FAMILIES["pixart"]
    write_tiny_pipeline(family, tmp_path, config={"use_additional_conditions": False})
    pipe = prepared(diffusers.PixArtSigmaPipeline.from_pretrained(tmp_path), family)
    assert encoded(pipe, family, CAPTIONS)["encoder_hidden_states"].shape[1] == 300
    check_prediction(pipe, family)


@families
def test_adapters_reach_every_block_that_can_be_tapped(family):
    net = build_net(family, network_of(family).tiny)
    adapters = peft.LoraConfig(r=2, target_modules=list(pipeline_of(family).adapted))
    net = peft.inject_adapter_in_model(adapters, net)
    for blocks in network_of(family).blocks:
        found = net.get_submodule(blocks.path)
        for block in found if isinstance(found, nn.ModuleList) else [found]:
            adapted = {name.split(".lora_A")[0] for name, _ in block.named_parameters() if ".lora_A" in name}
            assert adapted, blocks.path


@families
def test_a_folder_gives_back_its_pipeline(family, tmp_path, monkeypatch):
    built = []
    monkeypatch.setattr(tiny, "build_net", lambda *given: built.append(build_net(*given)) or built[0])
    write_tiny_pipeline(family, tmp_path)
    pipe = diffusers.DiffusionPipeline.from_pretrained(tmp_path)
    assert type(pipe).__name__ == pipeline_of(family).classes[0]
    weights, expected = net_of(pipe, family).state_dict(), built[0].state_dict()
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
