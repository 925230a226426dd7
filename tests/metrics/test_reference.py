from __future__ import annotations

import numpy as np
import pytest
import torch

from repa_lab.metrics import frechet_distance, inception_score, kid, precision_recall, statistics
from repa_lab.metrics.extractor import Extractor
from repa_lab.metrics.protocol import METRICS
from repa_lab.metrics.reference import (
    FOLDER,
    Collector,
    ComparedImages,
    RealImages,
    StatisticsError,
    measure,
    read_reference,
    reference,
    write_images,
)
from tests.rounding import FRECHET, INCEPTION, LITE0, rounding

CPU = torch.device("cpu")
COUNT = 30
PIXELS = torch.randint(0, 256, (COUNT, 1, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def make(*metrics: str, name: str = "efficientnet_lite0") -> Extractor:
    return Extractor(name, None, CPU, metrics)


@pytest.fixture(scope="module")
def everything() -> Extractor:
    return make("frechet", "kid", "precision_recall")


@pytest.fixture(scope="module")
def alone() -> Extractor:
    return make("frechet")


@pytest.fixture(scope="module")
def fid(inception) -> Extractor:
    """Inception for every metric."""
    return Extractor("inception", str(inception), CPU, METRICS.names)


@pytest.fixture(scope="module")
def ten(fid) -> dict[str, torch.Tensor]:
    """Inception's features of the first ten images."""
    return fid.features(PIXELS[:10])


class Images(RealImages):
    """Real images that count how often they are looked at."""

    def __init__(self, source: str = "a", pixels: torch.Tensor = PIXELS, announced: int | None = None) -> None:
        self.looks: list[int]
        object.__setattr__(self, "looks", [])
        super().__init__(source, len(pixels) if announced is None else announced, lambda: self.look(pixels))

    def look(self, pixels: torch.Tensor):
        self.looks.append(len(pixels))
        return pixels.split(7)


def samples_of(extractor: Extractor, features: dict[str, torch.Tensor]) -> ComparedImages:
    """Samples with these features for every metric of the extractor, collected in two batches, the later one first."""
    collector = Collector(extractor, extractor.metrics, ("features", "nothing"))
    half = len(next(iter(features.values()))) // 2
    for rows in (slice(half, None), slice(half)):
        collector.add({layer: values[rows] for layer, values in features.items()}, rows.start or 0)
    return collector.images


def files(cache) -> set[str]:
    return {path.name for path in (cache / FOLDER).iterdir()}


class TestCache:
    def test_a_second_run_does_not_look_at_the_images(self, everything, tmp_path):
        images = Images()
        first = reference(everything, images, tmp_path)
        again = reference(everything, images, tmp_path)
        assert images.looks == [COUNT]
        assert np.array_equal(first.of("frechet").sigma, again.of("frechet").sigma)
        assert np.array_equal(first.of("kid"), again.of("kid"))

    def test_another_process_with_another_extractor_object_finds_it(self, alone, tmp_path):
        reference(alone, Images(), tmp_path)
        images = Images()
        reference(make("frechet"), images, tmp_path)
        assert images.looks == []

    def test_is_the_statistics_of_all_images_and_their_features(self, everything, tmp_path):
        found = reference(everything, Images(), tmp_path)
        features = everything.features(PIXELS)["1280"]
        expected = statistics(features)
        assert found.of("frechet").count == COUNT
        error = rounding(features, LITE0)  # of batches of 7 and of 30
        np.testing.assert_allclose(found.of("frechet").mu, expected.mu, rtol=0, atol=error)
        np.testing.assert_allclose(
            found.of("frechet").sigma, expected.sigma, rtol=0, atol=4 * float(features.std(0).max()) * error
        )
        assert found.of("precision_recall").dtype == np.float32
        np.testing.assert_allclose(found.of("precision_recall"), features, rtol=0, atol=error)

    def test_features_are_kept_only_when_a_metric_needs_them(self, everything, alone, tmp_path):
        assert reference(alone, Images(), tmp_path).features == {}
        assert [name[-4:] for name in files(tmp_path)] == [".npz"]
        images = Images()
        reference(everything, images, tmp_path)
        assert images.looks == [COUNT]
        assert sorted(name[-4:] for name in files(tmp_path)) == [".npy", ".npz"]

    @pytest.mark.parametrize("keep", [1, 7, 10, 29, 30, 1000])
    def test_of_many_images_evenly_spaced_ones_are_kept(self, everything, tmp_path, keep):
        found = reference(everything, Images(), tmp_path, keep).of("kid")
        kept = min(keep, COUNT)
        whole = everything.features(PIXELS)["1280"]
        expected = whole[[i * COUNT // kept for i in range(kept)]]
        np.testing.assert_allclose(found, expected, rtol=0, atol=rounding(whole, LITE0))
        assert np.abs(whole[0] - whole[1]).max() > 1e-2

    def test_other_images_and_other_extractors_are_other_files(self, alone, tmp_path):
        reference(alone, Images(), tmp_path)
        for extractor, images in ((alone, Images("b")), (make("frechet", name="tiny-dinov2_vits14"), Images())):
            reference(extractor, images, tmp_path)
            assert images.looks == [COUNT]
        assert len(files(tmp_path)) == 3

    def test_an_inception_score_needs_no_real_images(self, inception, tmp_path):
        images = Images()
        extractor = Extractor("inception", str(inception), CPU, ("inception_score",))
        found = reference(extractor, images, tmp_path)
        assert (images.looks, found.statistics, found.features) == ([], {}, {})

    def test_images_that_were_not_announced_are_no_reference(self, alone, tmp_path):
        with pytest.raises(ValueError, match="31 real images were announced and 30 arrived"):
            reference(alone, Images(announced=31), tmp_path)
        assert not (tmp_path / FOLDER).exists()

    def test_one_image_is_no_reference(self, alone, tmp_path):
        with pytest.raises(
            StatisticsError, match="frechet needs at least 2 real images, and there are 1 in the training images"
        ):
            reference(alone, Images(pixels=PIXELS[:1]), tmp_path)

    def test_too_few_for_a_neighbourhood_are_refused_before_they_are_looked_at(self, everything, tmp_path):
        images = Images(pixels=PIXELS[:3])
        with pytest.raises(StatisticsError, match="precision_recall needs at least 4 real images, and there are 3"):
            reference(everything, images, tmp_path)
        assert images.looks == []

    def test_damaged_files_are_named(self, everything, tmp_path):
        reference(everything, Images(), tmp_path)
        paths = {path.suffix: path for path in (tmp_path / FOLDER).iterdir()}
        whole = paths[".npy"].read_bytes()
        for content in (b"", whole[:-1], whole[:40]):
            paths[".npy"].write_bytes(content)
            with pytest.raises(StatisticsError, match=r"\.npy' is damaged \(.*\); delete it, and it is computed again"):
                reference(everything, Images(), tmp_path)
        np.save(paths[".npy"], np.zeros((3, 2)))
        with pytest.raises(StatisticsError, match=r"\.npy' is damaged; delete it, and it is computed again"):
            reference(everything, Images(), tmp_path)
        paths[".npz"].write_bytes(paths[".npz"].read_bytes()[:100])
        paths[".npy"].write_bytes(whole)
        with pytest.raises(StatisticsError, match=r"\.npz' is damaged; delete it, and it is computed again"):
            reference(everything, Images(), tmp_path)


class TestMeasure:
    def test_every_metric_in_the_order_of_its_names(self, fid, ten, tmp_path):
        real = PIXELS[10:14]
        against, other = reference(fid, Images(pixels=real), tmp_path), fid.features(real)
        measured = {metric: measure(metric, samples_of(fid, ten), against) for metric in METRICS}
        assert {metric: len(values) for metric, values in measured.items()} == {
            metric: len(kinds) for metric, kinds in ((name, METRICS[name].yields) for name in METRICS)
        }
        for metric, layer in (("frechet", "2048"), ("sfid", "spatial")):
            first, second = statistics(ten[layer]), statistics(other[layer])
            assert measured[metric] == (
                pytest.approx(frechet_distance(first.mu, first.sigma, second.mu, second.sigma), rel=FRECHET),
            )
        assert measured["sfid"] != measured["frechet"]
        x, y = ten["2048"], other["2048"]
        assert measured["kid"] == (pytest.approx(kid(x, y).value, rel=1e-3),)
        assert measured["inception_score"] == (inception_score(ten["logits_unbiased"]).value,)
        assert measured["precision_recall"] == precision_recall(x, y)

    def test_what_is_missing_is_named(self, everything, alone, tmp_path):
        against = reference(alone, Images(), tmp_path)
        samples = samples_of(everything, everything.features(PIXELS))
        with pytest.raises(
            ValueError, match="no features of efficientnet_lite0 for kid: name it when the extractor is made"
        ):
            measure("kid", samples, against)
        with pytest.raises(ValueError, match="no features of efficientnet_lite0 for inception_score"):
            measure("inception_score", samples, against)

    def test_features_are_kept_for_metrics_that_compare_them(self, alone, everything):
        assert samples_of(alone, alone.features(PIXELS)).features == {}
        whole = everything.features(PIXELS)
        assert np.array_equal(samples_of(everything, whole).of("kid"), whole["1280"])


class TestRead:
    def test_a_reference_of_adms_serves_every_metric(self, fid, ten, tmp_path):
        """ADM's form: statistics of ten images, and the first four of them."""
        pooled, spatial = (statistics(ten[layer]) for layer in ("2048", "spatial"))
        images = PIXELS[:4].permute(0, 2, 3, 1).expand(-1, -1, -1, 3).numpy()
        path = tmp_path / "VIRTUAL_x.npz"
        np.savez(path, arr_0=images, mu=pooled.mu, sigma=pooled.sigma, mu_s=spatial.mu, sigma_s=spatial.sigma)
        found = read_reference(fid, path)
        assert measure("frechet", samples_of(fid, ten), found)[0] < 1e-6 * np.trace(found.of("frechet").sigma)
        assert measure("sfid", samples_of(fid, ten), found)[0] < 1e-6 * np.trace(found.of("sfid").sigma)
        assert len(found.of("sfid").mu) == 2023
        np.testing.assert_allclose(found.of("kid"), ten["2048"][:4], rtol=0, atol=rounding(ten["2048"], INCEPTION))
        assert measure("precision_recall", samples_of(fid, ten), found)[1] == 1

    def test_a_file_of_another_extractors(self, alone, tmp_path):
        held = statistics(np.random.default_rng(0).standard_normal((9, 4)))
        np.savez(tmp_path / "x.npz", mu=held.mu, sigma=held.sigma)
        with pytest.raises(StatisticsError, match="has 4 features and the extractor 1280"):
            read_reference(alone, tmp_path / "x.npz")
        np.savez(tmp_path / "x.npz", mu=held.mu, sigma=held.sigma, mu_s=held.mu, sigma_s=held.sigma)
        with pytest.raises(StatisticsError, match="statistics of extractor inception, not efficientnet_lite0"):
            read_reference(alone, tmp_path / "x.npz")

    def test_the_labs_own_file_is_read_back(self, alone, tmp_path):
        made = reference(alone, Images(), tmp_path)
        path = next((tmp_path / FOLDER).iterdir())
        assert np.array_equal(read_reference(alone, path).of("frechet").sigma, made.of("frechet").sigma)
        with pytest.raises(
            StatisticsError, match="has statistics of extractor efficientnet_lite0, not tiny-dinov2_vits14"
        ):
            read_reference(make("frechet", name="tiny-dinov2_vits14"), path)

    def test_statistics_without_images_do_not_serve_kid(self, everything, alone, tmp_path):
        reference(alone, Images(), tmp_path)
        with pytest.raises(StatisticsError, match="holds no images under arr_0"):
            read_reference(everything, next((tmp_path / FOLDER).iterdir()))

    def test_a_reference_of_another_size_or_of_too_few_images_is_refused(self, everything, alone, tmp_path):
        found = statistics(alone.features(PIXELS)["1280"])
        height, width = PIXELS.shape[2:]
        for name, shape in (("few", (3, height, width, 3)), ("large", (9, 2 * height, width, 3))):
            np.savez(tmp_path / name, arr_0=np.zeros(shape, np.uint8), mu=found.mu, sigma=found.sigma)
        with pytest.raises(
            StatisticsError, match=r"precision_recall needs at least 4 real images, and there are 3 in '.*few\.npz'"
        ):
            read_reference(everything, tmp_path / "few.npz", (height, width))
        told = f"large.npz' have {2 * height}x{width} px and the run's {height}x{width} px: give a reference of the run's size"
        with pytest.raises(StatisticsError, match=told):
            read_reference(alone, tmp_path / "large.npz", (height, width))
        assert read_reference(alone, tmp_path / "large.npz").features == {}

    def test_exported_samples_are_measured_alike(self, everything, tmp_path):
        """What is exported for audit gives the same features as the pixels it was made of."""
        write_images(tmp_path / "samples.npz", PIXELS.split(8), COUNT)
        found = statistics(everything.features(PIXELS)["1280"])
        with np.load(tmp_path / "samples.npz") as stored:
            np.savez(tmp_path / "with.npz", arr_0=stored["arr_0"], mu=found.mu, sigma=found.sigma)
        read = read_reference(everything, tmp_path / "with.npz").of("kid")
        expected = everything.features(PIXELS)["1280"]
        np.testing.assert_allclose(read, expected, rtol=0, atol=rounding(expected, LITE0))
