"""What training costs against the way of the papers' code. Prints ratios; asserts nothing of time."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import timm
import torch
import torch.nn.functional as F
import yaml

from repa_lab.align import REPA, Signals, Tokens
from repa_lab.models.sit import SiT
from repa_lab.models.tap import Tap
from repa_lab.orchestration.plan import make_plan
from repa_lab.runs import RunsRoot
from repa_lab.spec import load_spec
from tests.benchmarks.ratios import ratios, show, spent_by
from tests.orchestration.conftest import TINY

pytestmark = pytest.mark.bench
GRID = (16, 16)


@pytest.mark.parametrize("batch", [1, 4])
def test_a_step_at_b2s_shape(batch):
    """SiT-B/2 at 256 px with a ViT-B/14 of random weights at 224 px, as REPA has it; cached features are given."""
    torch.manual_seed(0)
    encoder = timm.create_model("vit_base_patch14_dinov2", img_size=224, dynamic_img_size=False).eval()
    encoder.requires_grad_(False)
    images = torch.randint(0, 256, (batch, 3, 256, 256), dtype=torch.uint8)
    x, t, y = torch.randn(batch, 4, 32, 32), torch.rand(batch), torch.arange(batch)
    features = torch.randn(batch, 256, 768).half()  # as the cache keeps them

    def trained(is_papers_way: bool) -> Callable[[], None]:
        denoiser, regularizer = SiT.from_size("B/2"), REPA(768, 768)
        tap = Tap(denoiser.blocks[3], lambda output: Tokens(output, GRID))
        parameters = [p for m in (denoiser, regularizer) for p in m.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=1e-4)
        averages = [p.detach().clone() for p in parameters]

        def papers_loss(student: Tokens) -> torch.Tensor:
            with torch.no_grad():
                resized = F.interpolate(images.float() / 255, 224, mode="bicubic")
                teacher = encoder.forward_features((resized - 0.45) / 0.225)[:, 1:]
            loss = torch.zeros(())
            for s, z in zip(regularizer.projectors[0](student).values, teacher, strict=True):
                loss = loss - (F.normalize(s, dim=-1) * F.normalize(z, dim=-1)).sum(-1).mean()
            return loss / batch

        def step() -> None:
            loss = F.mse_loss(denoiser(x, t, y), x)
            student = tap.take()
            if is_papers_way:
                aligned = papers_loss(student)
            else:
                aligned = regularizer(Signals(taps=(student,), encoders=(Tokens(features.float(), GRID),))).value
            (loss + 0.5 * aligned).backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if is_papers_way:
                for average, parameter in zip(averages, parameters, strict=True):
                    average.mul_(0.9999).add_(parameter.detach(), alpha=1e-4)
                loss.item(), aligned.item()
            else:
                torch._foreach_lerp_(averages, [p.detach() for p in parameters], 1e-4)

        return step

    # Multiply-adds of an image: the denoiser's and the projector's, forward and backward, and the encoder's forward.
    denoiser, projector, encoding = 3 * 23.00, 3 * 256 * 7_342_080 / 1e9, 23.16
    predicted = 1 + encoding / (denoiser + projector)
    measured = ratios(trained(True), trained(False), rounds=5)
    show(
        f"the papers' step / a step with cached features, SiT-B/2 and ViT-B/14, batch {batch}",
        measured,
        f"; FLOPs alone predict {predicted:.3f}; the aim is 1.4",
    )


# A run in the papers' way: a process of its own, the encoder in every step, and for each measurement the extractor is loaded
# and the real images go through it, as the released evaluation scripts do. It prints the CPU seconds that the real images
# took, and the last row.
PAPERS_RUN = """
import json, sys, tempfile, time
from pathlib import Path
import torch
torch.set_num_threads(1)
from repa_lab.orchestration.plan import identify_run
from repa_lab.spec import load_spec
from repa_lab.training.speed import ReferenceLoop
from repa_lab.training.batches import open_data
from repa_lab.training.evaluate import open_extractor, open_reference, real_images
from repa_lab.training.trainer import Trainer
spec = load_spec(Path(sys.argv[1]), {"regularizer.encoder.cache": False})
run = identify_run(spec.arms[int(sys.argv[2])].config, int(sys.argv[3]))
empty = lambda: Path(tempfile.mkdtemp(dir=sys.argv[4]))
def look_at_real_images(trainer):
    for extractor in run.config.evaluate.extractors:
        real = real_images(open_data(run.config, empty(), trainer.device))
        open_reference(extractor, open_extractor(run.config, extractor, trainer.device), real, empty())
trainer = Trainer(run, spec.run, empty())  # looks at the real images for the first measurement
step = ReferenceLoop(trainer).step if trainer.aligner.terms else lambda batch: trainer.step(batch).row()
looking = 0
for number, batch in enumerate(trainer.batches(), start=1):
    step(batch)
    if number % run.config.evaluate.every == 0:
        if number > run.config.evaluate.every:
            began = time.process_time()
            look_at_real_images(trainer)
            looking += time.process_time() - began
        (row,), samples = trainer.measure()
measured = run.config.train.steps // run.config.evaluate.every
print(json.dumps([looking * measured / (measured - 1), row]))
"""


@pytest.mark.timeout(3600)
def test_a_table_of_4_arms_and_3_seeds(tmp_path):
    """The lab's sweep begins with empty caches, which it fills, and ends with its report; both ways use two processes."""
    encoder = {"name": "efficientnet_lite0", "image_size": 64, "standardize": False}
    aligned = {f"weight {weight}": {"regularizer.weight": weight} for weight in (0.25, 0.5, 1.0)}
    spec = {
        **TINY,
        "model": {"family": "sit", "size": "nano/2"},
        "regularizer": {"type": "repa", "encoder": encoder, "projector": {"type": "linear"}},
        "train": {"steps": 60, "batch_size": 32, "lr": 2e-3, "ema": 0.99},
        "evaluate": {**TINY["evaluate"], "every": 30, "samples": 250, "sampler": {"steps": 20}, "encoder": None},
        "axes": {"alignment": {"baseline": {"regularizer.type": "none"}, **aligned}},
        "seeds": 3,
    }
    file, root = tmp_path / "spec.yaml", tmp_path / "runs"
    file.write_text(yaml.safe_dump(spec, sort_keys=False))
    ours, _ = spent_by(sys.executable, "-m", "repa_lab", "sweep", file, "--root", root, "--workers", 2)

    def papers_run(place: tuple[int, int]) -> tuple[float, float, dict[str, float]]:
        seconds, printed = spent_by(sys.executable, "-c", PAPERS_RUN, file, *place, tmp_path)
        return (seconds, *json.loads(printed.splitlines()[-1]))

    experiment = load_spec(file)
    arms, runs = [arm.label for arm in experiment.arms], make_plan(experiment, RunsRoot(root)).runs
    with ThreadPoolExecutor(2) as two:
        papers = list(two.map(papers_run, [(arms.index(entry.arm.label), entry.run.seed) for entry in runs]))
    theirs, real = sum(seconds for seconds, *_ in papers), sum(looking for _, looking, _ in papers)
    differences = []
    for entry, (*_, row) in zip(runs, papers, strict=True):
        (metric,) = (name for name in row if name.startswith("frechet"))
        found = RunsRoot(root).run(entry.run.run_id).rows()[-1][metric]
        differences.append(abs(row[metric] / found - 1))
        assert found == row[metric] or entry.arm.label != "baseline"  # both ways do the same work
    print(
        f"\n12 runs of 60 steps in the papers' way / a sweep with its report, CPU time: {theirs / ours:.2f} "
        f"({theirs:.0f} s, {ours:.0f} s), and {(theirs - real) / ours:.2f} if the papers' way kept the statistics of the "
        f"real images; the aim is 2; the distances of aligned arms differ by up to {max(differences):.1g} of themselves, "
        f"as cached features have half precision"
    )
