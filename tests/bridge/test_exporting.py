"""What goes back to SimpleTuner is what came from it, and what it has no word for is named."""

from __future__ import annotations

import random
import re
from pathlib import Path

import pytest

from repa_lab.align.settings import REGULARIZERS, RegularizerSettings
from repa_lab.bridge.exporting import export_settings
from repa_lab.bridge.simpletuner import (
    ADDED,
    CUMULATIVE,
    DATA_SET,
    FLAVOURS,
    FRAMES,
    IREPA,
    KEYS,
    LOST,
    PARTS,
    REST,
    SWITCHES,
    WITHOUT_EFFECT,
)
from tests.bridge.test_importing import FLUX, GUIDE, SDXL, config_of, load, read

# Every key that carries a setting of the regularizer, at a value that is not its default.
OTHER = {
    "lambda": 0.75, "encoder_image_size": 448, "use_tae": True, "scheduler": "polynomial", "warmup_steps": 7, "decay_steps": 900,
    "lambda_end": 0.125, "power": 2.5, "cutoff_step": 1200, "similarity_threshold": 0.8, "similarity_ema_decay": 0.9,
    "threshold_mode": "recoverable", "block_index": 3, "spatial_align": False, "encoder": "dinov2_vitb14", "model": "dinov2_vitl14_reg",
    "manifold_weight": 0.0,
}  # fmt: skip
EVERY_KEY = [
    ({f"{prefix}_enabled": True}, key.name, OTHER[key.name.partition("_")[2]])
    for prefix, keys in KEYS.items()
    for key in keys
    if key.field.startswith("regularizer.")
] + [
    ({f"{prefix}_enabled": True, "irepa_enabled": True}, name, value)
    for prefix in KEYS
    for name, value in (("irepa_spatial_norm_alpha", 0.25), ("irepa_projector_kernel_size", 5))
]


def settings_of(fields) -> RegularizerSettings:
    return REGULARIZERS[fields["type"]].settings.model_validate(fields)


def family_of(settings):
    prefix = next(iter(settings))[:5]
    return {**({"crepa": FLUX, "urepa": SDXL}[prefix]), f"{prefix}_enabled": True}


class TestRoundTrip:
    @pytest.mark.parametrize("block", GUIDE)
    def test_what_the_guide_shows_comes_back_as_it_was(self, tmp_path, block):
        settings = GUIDE[block]
        exported = export_settings(config_of(tmp_path, {**family_of(settings), **settings})).settings
        assert {name: exported[name] for name in settings} == settings

    @pytest.mark.parametrize(
        "enabled, name, value", EVERY_KEY, ids=lambda value: value if isinstance(value, str) else None
    )
    def test_every_key_comes_back_as_it_was(self, tmp_path, enabled, name, value):
        family = FLUX if "crepa_enabled" in enabled else SDXL
        default = export_settings(config_of(tmp_path, {**family, **enabled})).settings
        exported = export_settings(config_of(tmp_path, {**family, **enabled, name: value})).settings
        assert exported[name] == value
        assert default.get(name) != value
        assert {key: exported[key] for key in default if key != name} == {
            key: default[key] for key in default if key != name
        }

    def test_all_keys_together_lose_nothing_and_give_one_regularizer(self, tmp_path):
        draw = random.Random(4)
        for _ in range(60):
            settings = random_config(draw)
            family = {
                "model_family": draw.choice(
                    ["flux", "sd3", "pixart"] if "crepa_enabled" in settings else ["sd15", "sdxl"]
                )
            }
            config = config_of(tmp_path, {**family, **settings})
            exported = export_settings(config)
            assert {name: exported.settings.get(name) for name in settings} == settings
            zero = "regularizer.manifold_weight: 0.0 cannot be expressed: it takes 0 for 3.0; 1e-9 is as good as 0"
            assert set(exported.lost) <= {zero}
            assert config_of(tmp_path, {**family, **exported.settings}).regularizer == config.regularizer

    @pytest.mark.parametrize(
        "family, settings",
        [
            ("flux", {"type": "repa", "block_index": 12, "projector": {"type": "linear"}, "encoder": {"image_size": 224, "pixels": "vae"}}),
            ("sdxl", {"type": "urepa", "block_index": "mid", "projector": {"type": "conv", "kernel": 7}, "spatial_norm": 0.0, "resample": {"side": "teacher"},
                      "encoder": {"name": "dinov2_vitb14", "image_size": 518, "pixels": "tae", "tae": "madebyollin/taesdxl"}}),
            ("sd15", {"type": "urepa", "block_index": "mid", "projector": {"type": "linear"}, "manifold_weight": 1e-9, "weight": 0.0, "resample": {"side": "teacher"},
                      "encoder": {"image_size": 518, "pixels": "vae"}}),
        ],
    )  # fmt: skip
    def test_a_regularizer_that_it_can_express_comes_back_equal(self, tmp_path, family, settings):
        config = config_of(tmp_path, {"model_family": family})
        regularizer = settings_of(settings)
        exported = export_settings(config.model_copy(update={"regularizer": regularizer}))
        assert exported.lost == ()
        assert config_of(tmp_path, {"model_family": family, **exported.settings}).regularizer == regularizer

    @pytest.mark.parametrize("prefix, family", [("crepa", FLUX), ("urepa", SDXL)])
    def test_its_defaults_come_back_as_it_has_them(self, tmp_path, prefix, family):
        exported = export_settings(config_of(tmp_path, {**family, f"{prefix}_enabled": True}))
        defaults = {
            key.name: key.default
            for key in KEYS[prefix]
            if key.default is not None and key.field.startswith("regularizer.")
        }
        assert exported.settings == {f"{prefix}_enabled": True, **defaults}
        assert exported.lost == ()

    def test_no_regularizer_comes_back_as_none(self, tmp_path):
        for family, name in ((FLUX, "crepa_enabled"), (SDXL, "urepa_enabled")):
            exported = export_settings(config_of(tmp_path, family))
            assert (exported.settings, exported.lost) == ({name: False}, ())


def random_config(draw):
    prefix, irepa = draw.choice(["crepa", "urepa"]), draw.random() < 0.5
    keys = [key for key in (*KEYS[prefix], *(IREPA if irepa else ())) if key.field.startswith("regularizer.")]
    values = {
        **{key.name: OTHER.get(key.name.partition("_")[2]) for key in keys},
        "irepa_spatial_norm_alpha": 1.0,
        "irepa_projector_kernel_size": 7,
    }
    chosen = {key.name: values[key.name] for key in keys if draw.random() < 0.5}
    return {f"{prefix}_enabled": True, **({"irepa_enabled": True} if irepa else {}), **chosen}


REPA = {
    "type": "repa",
    "projector": {"type": "linear"},
    "encoder": {"image_size": 224, "pixels": "vae"},
    "block_index": 8,
}
UREPA = {
    **REPA,
    "type": "urepa",
    "block_index": "mid",
    "encoder": {"image_size": 518, "pixels": "vae"},
    "resample": {"side": "teacher"},
}
LINES = [
    ("loss", REPA, {"loss": "nt_xent"}),
    ("projector.type", REPA, {"projector": {"type": "mlp"}}),
    ("projector.kernel", REPA, {"projector": {"type": "conv", "kernel": 9}, "spatial_norm": 0.6}),
    ("spatial_norm", REPA, {"spatial_norm": 0.6}),
    ("spatial_norm", REPA, {"projector": {"type": "conv"}}),
    ("manifold_weight", UREPA, {"manifold_weight": 0.0}),
    ("manifold.reduction", UREPA, {"manifold": {"reduction": "sum"}}),
    ("manifold.distance", UREPA, {"manifold": {"distance": "l1_margin"}}),
    ("spatial_align", UREPA, {"spatial_align": False, "manifold_weight": 1.0, "manifold": {"scope": "batch_pooled"}}),
    ("resample.side", REPA, {"resample": {"side": "teacher"}}),
    ("resample.side", UREPA, {"resample": {"side": "student"}}),
    ("resample.when", REPA, {"resample": {"when": "before"}}),
    (
        "encoder",
        REPA,
        {
            "encoder": [
                {"image_size": 224, "pixels": "vae"},
                {"name": "dinov2_vits14", "image_size": 224, "pixels": "vae"},
            ]
        },
    ),
    ("encoder.name", REPA, {"encoder": {"name": "clip_vitl14", "image_size": 224, "pixels": "vae"}}),
    ("encoder.weights", REPA, {"encoder": {"weights": "g.pth", "image_size": 224, "pixels": "vae"}}),
    ("encoder.standardize", REPA, {"encoder": {"standardize": True, "image_size": 224, "pixels": "vae"}}),
    ("encoder.pixels", REPA, {"encoder": {"image_size": 224}}),
    ("encoder.tae", REPA, {"encoder": {"image_size": 224, "pixels": "tae", "tae": "mine"}}),
    ("encoder.image_size", REPA, {"encoder": {"image_size": 28, "pixels": "vae"}}),
    ("schedule.power", REPA, {"schedule": {"type": "polynomial", "power": 0.0}}),
    ("schedule.similarity_threshold", REPA, {"schedule": {"similarity_threshold": -0.5, "similarity_min_count": 1}}),
    ("schedule.similarity_min_count", REPA, {"schedule": {"similarity_threshold": 0.5}}),
    (
        "schedule.probe_every",
        REPA,
        {"schedule": {"similarity_threshold": 0.5, "similarity_min_count": 1, "threshold_mode": "recoverable"}},
    ),
]


class TestExport:
    @pytest.mark.parametrize("path, base, change", LINES)
    def test_a_setting_that_it_cannot_express_is_named_alone(self, tmp_path, path, base, change):
        config = config_of(tmp_path, FLUX if base["type"] == "repa" else SDXL)

        def lost(settings):
            regularizer = settings_of(settings)
            return [
                line.split(":")[0]
                for line in export_settings(config.model_copy(update={"regularizer": regularizer})).lost
            ]

        assert lost(base) == []
        expected = {f"regularizer.{path}"} | (
            {"regularizer.manifold.scope"} if "scope" in change.get("manifold", {}) else set()
        )
        assert set(lost({**base, **change})) == expected

    def test_what_would_mean_something_else_there_is_left_out(self, tmp_path):
        config = config_of(tmp_path, FLUX)
        change = {"encoder": {"name": "clip_vitl14", "image_size": 224, "pixels": "vae"}, "projector": {"type": "conv"}}
        regularizer = settings_of({**REPA, **change})
        exported = export_settings(config.model_copy(update={"regularizer": regularizer}))
        assert "crepa_encoder" not in exported.settings and "irepa_spatial_norm_alpha" not in exported.settings
        assert exported.settings["irepa_projector_kernel_size"] == 3

    def test_what_the_run_derives_is_written_as_numbers(self, tmp_path):
        config = config_of(tmp_path, {**FLUX, "resolution": 512})
        settings = {**REPA, "block_index": None, "encoder": {"pixels": "vae"}}
        exported = export_settings(config.model_copy(update={"regularizer": settings_of(settings)}))
        assert (exported.settings["crepa_block_index"], exported.settings["crepa_encoder_image_size"]) == (8, 448)
        assert exported.lost == ()


class TestDocumentation:
    PAGE = (Path(__file__).parents[2] / "docs" / "simpletuner.md").read_text(encoding="utf-8")

    def test_every_key_is_on_the_page_with_its_default(self):
        table = self.PAGE[: self.PAGE.index("## Differences in meaning")]
        rows = [row.split("|")[1:4] for row in table.splitlines() if row.startswith("| `")]
        defaults = {}
        for names, values, _ in rows:
            found, words = re.findall(r"`([\w.]+)`", names), [word.strip() for word in values.split(",")]
            for name, value in zip(found, words * len(found) if len(words) == 1 else words, strict=False):
                both = ("crepa", "urepa") if name.startswith("_") else ("",)
                defaults |= {f"{prefix}{name}": value for prefix in both}
        for key in (
            *KEYS["crepa"],
            *KEYS["urepa"],
            *IREPA,
            *FRAMES,
            CUMULATIVE,
            *(key for kind in ADDED.values() for key in kind.keys),
            *SWITCHES,
        ):
            shown = (
                {None: "none", True: "true", False: "false"}.get(key.default)
                if isinstance(key.default, (bool, type(None)))
                else str(key.default)
            )
            assert defaults[key.name] == shown, key.name
        for name in (*(key.name for key in (*REST, *PARTS, *DATA_SET)), *LOST, *WITHOUT_EFFECT):
            assert f"`{name}`" in self.PAGE, name

    def test_every_flavour_is_on_the_page(self):
        table = self.PAGE[self.PAGE.index("| family | flavours |") :]
        rows = [
            [re.findall(r"[^ `,]+", cell) for cell in row.split("|")[1:3]]
            for row in table[: table.index("\n\n")].splitlines()[2:]
        ]
        assert {family: flavours for (family,), flavours in rows} == {f: [*names] for f, names in FLAVOURS.items()}

    def test_the_session_is_what_the_commands_print(self, tmp_path):
        (session,) = re.findall(r"```\n(\$ cat.*?)```", self.PAGE, flags=re.DOTALL)
        config = re.search(r"\{.*?\n\}", session, flags=re.DOTALL)[0]
        imported = read(tmp_path, config)
        shown = re.search(r"question\.yaml\n(name: .*?)\$ ", session, flags=re.DOTALL)[1]
        assert shown == "".join(f"{line}\n" for line in imported.spec.splitlines() if not line.startswith("#"))
        said = [line.removeprefix(f"{tmp_path}/") for line in imported.remarks]
        for line in re.findall(r"^config\.json.*$", session, flags=re.M):
            assert any(remark.startswith(line.removesuffix(" ...")) for remark in said), line
        exported = export_settings(load(tmp_path, imported).arms[0].config)
        assert exported.lost == tuple(re.findall(r"^regularizer\.\S+: .*cannot.*$", session, flags=re.M))
