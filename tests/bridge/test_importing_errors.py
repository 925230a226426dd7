"""A config of SimpleTuner that cannot become a spec is refused, each mistake in one line at its place."""

from __future__ import annotations

import random
import subprocess
import sys

import pytest

from repa_lab.bridge.importing import import_config
from repa_lab.bridge.simpletuner import LOST, READABLE
from repa_lab.models.families import FAMILIES
from repa_lab.spec import SpecError, load_spec
from tests.bridge.test_importing import FLUX, SDXL, read, refusal, remarks


class TestBadInput:
    @pytest.mark.parametrize(
        "config, line",
        [
            ('{\n  "nope" 1\n}', "config.json:2:10: not valid JSON: expected ',' or '}', but got '<scalar>'"),
            ("[1, 2]", 'config.json:1:1: a config must be a JSON object of settings, such as {"crepa_enabled": true}'),
            ('{"crepa_lambda": NaN}', "config.json:1:2: crepa_lambda: expected a finite number, got 'NaN'"),
            ('{"seed": 1,\n "--seed": 2}', "config.json:2:2: seed: given twice"),
        ],
    )
    def test_what_is_no_config_is_one_line(self, tmp_path, config, line):
        assert refusal(tmp_path, config) == [line]

    @pytest.mark.parametrize(
        "words, line",
        [
            (["--crepa_lambda", "0.6", "0.5"], "expected one file, or flags such as --crepa_lambda=0.5; got '0.5'"),
            (["a.json", "b.json"], "expected one file, or flags such as --crepa_lambda=0.5; got 'a.json'"),
            (["--crepa_lambda=x"], "crepa_lambda: expected a number, got 'x'"),
        ],
    )
    def test_what_is_no_flag_is_one_line(self, words, line):
        with pytest.raises(SpecError) as caught:
            import_config(words)
        assert str(caught.value) == f"<given>: {line}"

    @pytest.mark.parametrize(
        "key, value, message",
        [
            ("crepa_lambda", "abc", "expected a number, got 'abc'"),
            ("crepa_lambda", True, "expected a number, got true"),
            ("crepa_lambda", -1, "expected a number of at least 0.0, got -1.0"),
            ("crepa_lambda", {"a": 1}, "expected a number, got {'a': 1}"),
            ("crepa_lambda", "inf", "expected a finite number, got 'inf'"),
            ("crepa_block_index", 2.5, "expected an integer, got 2.5"),
            ("crepa_block_index", -1, "expected a number of at least 0 or mid, got -1"),
            ("crepa_spatial_align", "maybe", "expected true or false, got 'maybe'"),
            ("crepa_spatial_align", 0.5, "expected true or false, got 0.5"),
            (
                "crepa_scheduler",
                "cosin",
                "expected one of constant, linear, cosine, polynomial, got 'cosin'; did you mean 'cosine'?",
            ),
            ("crepa_similarity_threshold", 1.5, "expected a number of at most 1.0, got 1.5"),
            ("crepa_encoder", 7, "expected text, got 7"),
            ("crepa_encoder_image_size", -5, "expected a number of at least 1, got -5"),
            ("caption_dropout_probability", 1.5, "expected a number of at most 1.0, got 1.5"),
            ("caption_dropout_probability", -0.1, "expected a number of at least 0.0, got -0.1"),
            ("model_type", "lycoris", "expected one of full, lora, got 'lycoris'"),
            ("learning_rate", 0, "expected a number of more than 0.0, got 0.0"),
            ("train_batch_size", 0, "expected a number of at least 1, got 0"),
            ("seed", -1, "expected a number of at least 0, got -1"),
            ("model_family", "flxu", None),
            ("model_family", "omnigen", f"unknown family 'omnigen'; allowed: {', '.join(FAMILIES)}"),
        ],
    )
    def test_a_wrong_value_is_one_line_at_its_key(self, tmp_path, key, value, message):
        (line,) = refusal(tmp_path, {"crepa_enabled": True, **FLUX, key: value})
        place = "config.json:3:3: " if key == "model_family" else "config.json:4:3: "
        assert line.startswith(f"{place}{key}: ")
        if message is None:
            assert "unknown family 'flxu'" in line and "did you mean 'flux'?" in line
        else:
            assert line == f"{place}{key}: {message}"

    @pytest.mark.parametrize("family", [name for name, facts in FAMILIES.items() if not facts.from_scratch])
    def test_the_wrong_regularizer_for_a_family_is_refused_not_dropped(self, tmp_path, family):
        unet = FAMILIES[family].kind == "unet"
        wrong = "crepa_enabled" if unet else "urepa_enabled"
        (line,) = refusal(tmp_path, {"model_family": family, wrong: True})
        fits = "repa is for transformers" if unet else "urepa is for UNets"
        kind = f"{family} is a UNet: use urepa_*" if unet else f"{family} is a transformer: use crepa_*"
        assert line == f"config.json:3:3: {wrong}: {fits}; {kind}"

    def test_two_regularizers_and_a_lone_irepa_are_refused(self, tmp_path):
        (line,) = refusal(tmp_path, {**SDXL, "crepa_enabled": True, "urepa_enabled": "true"})
        assert (
            line
            == "config.json:4:3: urepa_enabled: crepa_enabled is true as well; a run has one regularizer: leave one of them out"
        )
        (line,) = refusal(tmp_path, {**FLUX, "irepa_enabled": True})
        assert (
            line
            == "config.json:3:3: irepa_enabled: iREPA needs REPA or U-REPA: set crepa_enabled or urepa_enabled as well"
        )

    @pytest.mark.parametrize(
        "key, meant",
        [
            ("crepa_lamda", "crepa_lambda"),
            ("urepa_manifold_wieght", "urepa_manifold_weight"),
            ("irepa_enable", "irepa_enabled"),
        ],
    )
    def test_an_unknown_key_says_what_was_meant(self, tmp_path, key, meant):
        (line,) = refusal(tmp_path, {key: 1})
        assert line.startswith(f"config.json:2:3: {key}: SimpleTuner has no such key; allowed: {key[:6]}")
        assert line.endswith(f"; did you mean '{meant}'?")

    def test_everything_that_is_wrong_is_said_at_once(self, tmp_path):
        lines = refusal(
            tmp_path, {"crepa_enabled": "perhaps", "crepa_lambda": [], "crepa_x": 1, "model_family": "wann"}
        )
        assert [line.split(": ")[1] for line in lines] == ["crepa_enabled", "crepa_lambda", "crepa_x", "model_family"]

    def test_no_file_and_no_text_are_one_line(self, tmp_path):
        (tmp_path / "bytes.json").write_bytes(b"\xff\xfe{}")
        for name, message in (
            ("none.json", "cannot read the file: No such file or directory"),
            ("bytes.json", "not UTF-8 text: invalid start byte at byte 0"),
        ):
            with pytest.raises(SpecError) as caught:
                import_config([str(tmp_path / name)])
            assert str(caught.value) == f"{tmp_path / name}:1:1: {message}"

    def test_endless_nesting_is_one_line(self, tmp_path):
        assert refusal(tmp_path, '{"a": ' + "[" * 200_000) == ["config.json:1:1: nested more than 40 levels deep"]

    def test_no_text_breaks_a_line_of_a_message(self, tmp_path):
        for config in (
            {"crepa_lambda": "a\nb\u2028c"},
            {"crepa_x\ny\x1b": 1},
            {"model_family": "\ud800\n"},
            {"\ud800\n": 1},
            '{"a\\n\u2028": 1, "a\\n\u2028": 2}',
        ):
            (line,) = refusal(tmp_path, config)
            assert line.encode() and line.isprintable()
        assert all(line.isprintable() for line in remarks(tmp_path, {**FLUX, "a\u2028\n": 1}))

    def test_nothing_that_json_can_hold_is_a_traceback(self, tmp_path):
        draw = random.Random(0)
        names = [*READABLE, *LOST, "x"]
        values = [
            None,
            True,
            False,
            0,
            -1,
            8,
            1e-9,
            1e308,
            10**400,
            "",
            " ",
            "1",
            "true",
            "inf",
            "flux",
            "sdxl",
            "qwen-vl",
            "\ud800",
            [],
            [1],
            {},
            {"a": [None]},
        ]
        accepted = 0
        for _ in range(1500):
            config = {name: draw.choice(values) for name in draw.sample(names, draw.randint(0, 3))}
            try:
                imported = read(tmp_path, config)
            except SpecError as error:
                assert str(error).encode()
                continue
            load_spec_or_fragment(tmp_path, imported)
            accepted += 1
        assert 100 < accepted < 1400


def load_spec_or_fragment(tmp_path, imported):
    around = (
        ""
        if "\nname: " in imported.spec
        else "name: q\nmodel: {family: sd15}\ndata: {source: imagefolder}\ntrain: {steps: 9}\nuse: [f.yaml]\n"
    )
    (tmp_path / "f.yaml").write_text(imported.spec, encoding="utf-8")
    (tmp_path / "q.yaml").write_text(around)
    load_spec(tmp_path / ("q.yaml" if around else "f.yaml"))


def test_no_torch_is_needed():
    code = "import sys, repa_lab.bridge, repa_lab.bridge.exporting; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
