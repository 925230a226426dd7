"""What a plan knows of plugins: their fields, their files, and where they come from."""

from __future__ import annotations

import json
import subprocess
import sys

from repa_lab.align.settings import REGULARIZERS
from repa_lab.registry import loaded_plugins
from repa_lab.spec import RunConfig, load_spec
from repa_lab.spec.documentation import json_schema
from repa_lab.spec.identity import Run
from repa_lab.training.resolve import needs_of
from tests.plugins.mine import GOOD, HEAD, MINE, SPEC, forget, ids, refusal, spec_of
from tests.spec.examples import write

BUILT_IN = REGULARIZERS.names


class TestPlanning:
    def test_its_fields_are_those_of_its_settings_class(self, tmp_path):
        config = load_spec(spec_of(tmp_path)).arms[0].config
        assert config.regularizer.model_dump(mode="json") == {
            "type": "spread",
            "weight": 0.1,
            "margin": 0.5,
            "block_index": None,
            "schedule": config.regularizer.schedule.model_dump(mode="json"),
        }
        assert needs_of(config)[0].taps == (1,)  # what SiT nano suggests
        assert needs_of(config)[0].encoders == ()
        assert Run.from_json("x", json.loads(json.dumps(Run("x", config, 0).to_json()))).config == config
        assert hash(config) == hash(load_spec(tmp_path / "mine.yaml").arms[0].config)

    def test_they_are_checked_and_may_be_varied(self, tmp_path):
        spec = spec_of(
            tmp_path, spec=SPEC + "axes: {regularizer.margin: [0.5, 1.0], regularizer.block_index: [0, 3]}\n"
        )
        assert len(ids(spec)) == len(set(ids(spec).values())) == 5
        for change, line in (
            (("margin: 0.5", "margin: wide"), "5:42: regularizer.margin: expected a number, got 'wide'"),
            (("margin: 0.5", "marign: 0.5"), "5:42: regularizer.marign: unknown field 'marign'; allowed: block_index, margin, "
             "name, schedule, type, weight; did you mean 'margin'?"),
            (("margin: 0.5", "block_index: 99"), "5:42: regularizer.block_index: sit has 4 blocks: "
             "block_index must be 0 to 3, got 99"),
            (("margin: 0.5", "encoder: {}"), "5:42: regularizer.encoder: unknown field 'encoder'; allowed: block_index, margin, "
             "name, schedule, type, weight"),
        ):  # fmt: skip
            assert refusal(spec_of(tmp_path, spec=SPEC.replace(*change).replace("include: [", "# "))) == [
                f"mine.yaml:{line}"
            ]

    def test_a_field_of_tuples_takes_the_lists_of_a_file(self, tmp_path):
        field = "margin: float = 1.0"
        plugin = MINE.replace(
            field,
            f"{field}\n        sizes: tuple[int, ...] = ()\n        ends: dict[str, tuple[tuple[float, int], ...]] = {{}}",
        )
        given = "margin: 0.5, sizes: [3, 5], ends: {a: [[0.5, 2], [1, 3]]}"
        (arm, _) = load_spec(spec_of(tmp_path, plugin, SPEC.replace("margin: 0.5", given))).arms
        settings = arm.config.regularizer
        assert (settings.sizes, settings.ends) == ((3, 5), {"a": ((0.5, 2), (1.0, 3))})
        assert Run.from_json("x", json.loads(json.dumps(Run("x", arm.config, 0).to_json()))).config == arm.config
        for wrong, line in (("[3, x]", "66: regularizer.sizes.1: expected an integer, got 'x'"),
                            ("3", "55: regularizer.sizes: expected a list, got 3")):  # fmt: skip
            text = SPEC.replace("margin: 0.5", f"margin: 0.5, sizes: {wrong}").replace("include: [", "# ")
            assert refusal(spec_of(tmp_path, plugin, text)) == [f"mine.yaml:5:{line}"]

    def test_in_a_sweep_with_built_in_types_each_has_its_own_fields(self, tmp_path):
        types = "axes: {regularizer.type: [none, spread, repa]}\n"
        spec = SPEC.replace("margin: 0.5", "margin: 0.5, loss: nt_xent").replace("include: [", "# ") + types
        found = [arm.config.regularizer for arm in load_spec(spec_of(tmp_path, spec=spec)).arms]
        assert [one.type for one in found] == ["none", "spread", "repa"]
        assert (found[1].margin, hasattr(found[1], "loss")) == (0.5, False)
        assert (found[2].loss, hasattr(found[2], "margin")) == ("nt_xent", False)

    def test_the_schema_knows_its_fields(self, tmp_path):
        load_spec(spec_of(tmp_path))
        paths = json_schema()["$defs"]["Settings"]["properties"]
        described = {field["description"] for field in paths["regularizer.margin"]["anyOf"]}  # dispersive has one too
        assert "Distance below which two images repel each other." in described

    def test_a_name_is_relative_to_the_file_that_gives_it(self, tmp_path):
        write(tmp_path, MINE, "base/mine.py")
        write(tmp_path, SPEC, "base/mine.yaml")
        file = write(tmp_path, "base: ../base/mine.yaml\nname: child\n", "specs/child.yaml")
        assert load_spec(file).plugins == (str(tmp_path / "base" / "mine.py"),)
        forget()
        write(tmp_path, "plugins: [../base/mine.py]\n", "fragments/with.yaml")
        plain = write(tmp_path, SPEC.replace("plugins: [mine.py]\n", ""), "specs/plain.yaml")
        assert (
            load_spec(plain, None, [tmp_path / "fragments" / "with.yaml"]).arms[0].config.regularizer.type == "spread"
        )

    def test_the_same_file_twice_is_one_plugin_and_is_run_once(self, tmp_path):
        counting = (
            MINE
            + "import pathlib\nwith pathlib.Path(__file__).with_name('log').open('a') as log:\n    log.write('x')\n"
        )
        file = spec_of(tmp_path, counting, SPEC.replace("[mine.py]", "[mine.py, ./mine.py]"))
        for _ in range(2):
            load_spec(file)
        assert (tmp_path / "log").read_text() == "x"
        (tmp_path / "mine.py").write_text(counting + "# edited\n")
        load_spec(file)
        assert (tmp_path / "log").read_text() == "xx"

    def test_what_an_edit_takes_away_is_gone(self, tmp_path):
        file = spec_of(tmp_path)
        load_spec(file)
        (tmp_path / "mine.py").write_text(MINE.replace('"spread"', '"spread2"'))
        assert (
            refusal(file)[0]
            .split(": ", 2)[2]
            .startswith(f"unknown regularizer 'spread'; allowed: {', '.join(BUILT_IN)}, spread2")
        )
        assert load_spec(file, {"regularizer.type": "spread2"}).arms

    def test_planning_with_a_plugin_of_settings_alone_needs_no_torch(self, tmp_path):
        """As the built-in ones: the settings are decorated, and the class is imported by whoever trains."""
        plugin = (
            "from repa_lab.plugins import RegularizerSettings, regularizer\n\n\n"
            '@regularizer("lazy", "mypackage.methods:Lazy")\n'
            'class LazySettings(RegularizerSettings):\n    """Settings alone."""\n\n    type: str = "lazy"\n    margin: float = 1.0\n'
        )
        spec_of(tmp_path, plugin, SPEC.replace("type: spread", "type: lazy"))
        code = (
            "import sys; from repa_lab import plan; found = plan('mine.yaml');"
            "print(len(found.runs), sorted({'torch', 'mypackage'} & set(sys.modules)))"
        )
        done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.stdout.split() == ["2", "[]"], done.stderr


class TestEntryPoints:
    """Plugins of installed packages need not be named."""

    def test_they_are_found_where_a_type_is_asked_for_that_nothing_else_has(self, tmp_path):
        site = tmp_path / "site"
        write(site, MINE, "mypackage/methods.py")
        write(site, "", "mypackage/__init__.py")
        write(site, "Metadata-Version: 2.1\nName: mypackage\nVersion: 1\n", "mypackage-1.dist-info/METADATA")
        write(site, "[repa_lab]\nmine = mypackage.methods\n", "mypackage-1.dist-info/entry_points.txt")
        write(tmp_path, SPEC.replace("plugins: [mine.py]\n", ""), "mine.yaml")
        code = (
            f"import sys; sys.path.insert(0, {str(site)!r}); from repa_lab import plan; found = plan('mine.yaml', 'runs');"
            "print(*(entry.run.run_id for entry in found.runs))"
        )
        done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert done.stdout.split() == list(
            ids(spec_of(tmp_path)).values()
        )  # the content of the file counts, as of any other

    def test_a_mistake_in_one_is_one_line(self, tmp_path):
        site = tmp_path / "site"
        write(site, "import repa_lab\n\nrepa_lab.nonsense()\n", "mypackage.py")
        write(site, "Metadata-Version: 2.1\nName: mypackage\nVersion: 1\n", "mypackage-1.dist-info/METADATA")
        write(site, "[repa_lab]\nmine = mypackage\n", "mypackage-1.dist-info/entry_points.txt")
        write(tmp_path, SPEC.replace("plugins: [mine.py]\n", "").replace("include: [", "# "), "mine.yaml")
        code = (
            f"import sys; sys.path.insert(0, {str(site)!r}); sys.argv = ['repa-lab', 'plan', 'mine.yaml'];"
            "from repa_lab.cli import main; main()"
        )
        done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode not in (0, None)
        (line,) = (done.stdout + done.stderr).splitlines()
        assert f"{site}/mypackage.py:3: AttributeError: " in line


class TestRegistry:
    def test_a_program_may_register_without_a_file_and_again(self, tmp_path):
        """As a notebook's cell does, which may be run any number of times."""
        source = HEAD + '@regularizer("cell")\nclass Cell(Regularizer):\n' + GOOD
        for _ in range(2):
            exec(compile(source, "<ipython-input-1>", "exec"), {"__name__": "__main__"})
        assert REGULARIZERS.origin("cell").line == 4
        config = load_spec({**BASE, "regularizer": {"type": "cell"}}).arms[0].config
        assert isinstance(config, RunConfig)

    def test_names_stand_in_the_order_of_their_registration(self, tmp_path):
        load_spec(spec_of(tmp_path))
        assert REGULARIZERS.names == (*BUILT_IN, "spread")
        origin = REGULARIZERS.origin("spread")
        assert (origin.file, origin.digest) == (str(tmp_path / "mine.py"), loaded_plugins()[str(tmp_path / "mine.py")])


BASE = {"name": "x", "model": {"family": "sit", "size": "nano/2"}, "data": {"source": "digits"}, "train": {"steps": 1}}
