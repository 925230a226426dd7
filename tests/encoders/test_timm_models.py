from __future__ import annotations

import http.server
import threading
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub.constants
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from repa_lab.encoders.encoder import load_encoder
from repa_lab.encoders.registry import ENCODERS
from repa_lab.timm_models import EncoderError, TimmModel, encoder_tensors, load_model, skeleton
from tests.rounding import TINY_VIT, VIT, rounding

ARCH, TINY = "test_vit", "test_vit.r160_in1k"  # 0.3 M parameters, patches of 16, published for 160 px with 1000 classes
PIXELS = torch.randint(0, 256, (1, 3, 32, 48), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def published(seed: int = 0) -> nn.Module:
    """The tiny model as its publisher would have it, classifier and all, at values that would show."""
    torch.manual_seed(seed)
    model = timm.create_model(ARCH).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


def reference(model: nn.Module, encoder) -> torch.Tensor:
    """The model's own patch tokens, its position table resampled as timm does it on loading."""
    resized = timm.create_model(ARCH, img_size=encoder.input_size(*PIXELS.shape[-2:])).eval()
    resized.load_state_dict(timm.models.vision_transformer.checkpoint_filter_fn(model.state_dict(), resized))
    with torch.no_grad():
        return resized.forward_features(encoder.preprocess(PIXELS))[:, 1:]


def refused(match: str, name: str, weights: Path | str | None, size: int = 32, field: str = "weights") -> None:
    with pytest.raises(EncoderError, match=match) as caught:
        load_encoder(name, size, size, None if weights is None else str(weights))
    assert caught.value.field == field
    assert "\n" not in str(caught.value)


class TestFiles:
    @pytest.mark.parametrize("suffix", ["safetensors", "pth"])
    @pytest.mark.parametrize("head", [True, False], ids=["with its classifier", "without"])
    def test_every_tensor_arrives_whatever_the_form(self, tmp_path, suffix, head):
        model, path = published(), tmp_path / f"tiny.{suffix}"
        state = {key: value for key, value in model.state_dict().items() if head or not key.startswith("head.")}
        save_file(state, path) if suffix == "safetensors" else torch.save({"state_dict": state}, path)
        encoder = load_encoder(TINY, None, 32, str(path))
        loaded = encoder.model.state_dict()
        assert set(loaded) == {key for key in state if not key.startswith("head.")}
        assert all(torch.equal(value, state[key]) for key, value in loaded.items())
        wanted = reference(model, encoder)
        torch.testing.assert_close(encoder(PIXELS).values, wanted, rtol=0, atol=rounding(wanted, TINY_VIT))

    def test_a_file_that_lacks_a_tensor_is_no_file_of_the_model(self, tmp_path):
        state = published().state_dict()
        del state["blocks.3.attn.qkv.weight"]
        save_file(state, tmp_path / "hole.safetensors")
        # The classifier is there, so nothing must be said of it.
        refused(r"Missing key\(s\) in state_dict: \"blocks.3.attn.qkv.weight\"\.$", TINY, tmp_path / "hole.safetensors")
        save_file({"something.weight": torch.zeros(3)}, tmp_path / "other.safetensors")
        refused("does not fit 'test_vit.r160_in1k': .*Missing key", TINY, tmp_path / "other.safetensors")
        torch.save({}, tmp_path / "empty.pth")
        refused("does not fit 'test_vit.r160_in1k': .*Missing key", TINY, tmp_path / "empty.pth")

    def test_a_file_of_a_deeper_model_is_not_cut_short(self, tmp_path):
        state = published().state_dict()
        deeper = {
            key.replace("blocks.5.", "blocks.6."): value.clone() for key, value in state.items() if "blocks.5." in key
        }
        save_file(state | deeper, tmp_path / "deeper.safetensors")
        refused("does not fit 'test_vit.r160_in1k': .*Unexpected key", TINY, tmp_path / "deeper.safetensors")

    def test_another_network_s_names_are_not_left_at_random(self, tmp_path):
        # timm alone takes this file for a classifier that was left out, and starts from random values.
        other = timm.create_model("test_vit").state_dict()
        save_file(other, tmp_path / "vit.safetensors")
        refused("does not fit 'efficientnet_lite0'", "efficientnet_lite0", tmp_path / "vit.safetensors")

    def test_a_missing_file(self, tmp_path):
        refused(f"no file '{tmp_path}/x.pth'", "dinov2_vits14", tmp_path / "x.pth", 28)
        refused(f"no file '{tmp_path}'", "dinov2_vits14", tmp_path, 28)

    def test_weights_of_another_shape(self, vits14, lite0, tmp_path):
        refused("does not fit 'dinov2_vits14_reg'", "dinov2_vits14_reg", vits14[1], 28)
        save_file(lite0.model.state_dict(), tmp_path / "lite0.safetensors")
        refused("does not fit 'dinov2_vits14'", "dinov2_vits14", tmp_path / "lite0.safetensors", 28)
        state = load_file(vits14[1])
        state["blocks.0.mlp.fc1.weight"] = torch.zeros(3, 3)
        save_file(state, tmp_path / "one.safetensors")
        refused("blocks.0.mlp.fc1.weight", "dinov2_vits14", tmp_path / "one.safetensors", 28)

    @pytest.mark.parametrize("name", ["dinov2_vits14", "mocov3_vits16", "test_vit"])
    def test_code_in_the_file_is_not_run(self, hostile, name):
        path, victim = hostile
        refused(
            f"does not fit '{name}': weights_only", name, path, ENCODERS[name].stride * 2 if name in ENCODERS else 32
        )
        assert not victim.exists()
        torch.load(path, weights_only=False)
        assert victim.exists()  # the file was dangerous indeed

    @pytest.mark.parametrize("content", [b"", b"\x80", b"hello world", b"\0" * 100, b"PK\3\4aaaa"])
    @pytest.mark.parametrize(
        "name, suffix", [("efficientnet_lite0", "pth"), ("efficientnet_lite0", "safetensors"), ("mocov3_vits16", "pth")]
    )
    def test_a_damaged_file(self, tmp_path, content, suffix, name):
        (tmp_path / f"x.{suffix}").write_bytes(content)
        refused(f"does not fit '{name}'", name, tmp_path / f"x.{suffix}")


@pytest.fixture(scope="module")
def moco(tmp_path_factory) -> tuple[dict[str, torch.Tensor], Path]:
    """A ViT-S of twelve heads at random weights, and a file of it in the form in which MoCo v3's training saves itself."""
    torch.manual_seed(0)
    model = timm.create_model("vit_small_patch16_224", num_classes=0, num_heads=12)
    nn.init.normal_(model.pos_embed)
    base = model.state_dict()
    trained = {f"module.base_encoder.{key}": value for key, value in base.items()}
    trained |= {
        "module.base_encoder.head.0.weight": torch.zeros(4096, 384),
        "module.predictor.0.weight": torch.zeros(2, 2),
    }
    trained |= {f"module.momentum_encoder.{key}": torch.zeros(1) for key in base}
    optimizer = {"state": {0: {"mu": torch.zeros(3)}}, "param_groups": [{"lr": 0.1, "params": [0]}]}
    path = tmp_path_factory.mktemp("moco") / "vit-s-300ep.pth.tar"
    saved = {"epoch": 300, "arch": "vit_small", "state_dict": trained, "optimizer": optimizer, "scaler": {"scale": 1.0}}
    torch.save(saved, path)
    return base, path


class TestMoCo:
    def test_its_base_encoder_is_taken_from_the_publishers_file(self, moco):
        base, path = moco
        encoder = load_encoder("mocov3_vits16", None, 64, str(path))
        assert all(torch.equal(value, base[key]) for key, value in encoder.model.state_dict().items())
        assert set(encoder.model.state_dict()) == set(base)
        assert "state_dict" not in encoder.model.pretrained_cfg
        twelve = timm.create_model("vit_small_patch16_224", num_classes=0, num_heads=12, img_size=64).eval()
        twelve.load_state_dict(timm.models.vision_transformer.checkpoint_filter_fn(base, twelve))
        pixels = torch.randint(0, 256, (1, 3, 64, 64), dtype=torch.uint8)
        with torch.no_grad():
            wanted = twelve.forward_features(encoder.preprocess(pixels))[:, 1:]
        torch.testing.assert_close(encoder(pixels).values, wanted, rtol=0, atol=rounding(wanted, VIT))

    def test_a_file_of_the_encoder_alone_will_do(self, moco, tmp_path):
        base, _ = moco
        save_file(base, tmp_path / "base.safetensors")
        encoder = load_encoder("mocov3_vits16", 32, 64, str(tmp_path / "base.safetensors"))
        assert torch.equal(encoder.model.norm.weight, base["norm.weight"])

    def test_the_layers_that_go_by_the_number_of_their_block(self, tmp_path):
        facts = ENCODERS["mocov3_vitl16"]
        told = [
            "blocks.13.norm13.bias",
            "blocks.13.mlp.fc13.weight",
            "blocks.14.norm14.weight",
            "blocks.14.mlp.fc14.bias",
        ]
        meant = ["blocks.13.norm1.bias", "blocks.13.mlp.fc1.weight", "blocks.14.norm2.weight", "blocks.14.mlp.fc2.bias"]
        same = "blocks.13.mlp.fc2.weight"
        state = {f"base_encoder.{key}": key for key in (*told, same, "head.weight")} | {"predictor.weight": 0}
        assert encoder_tensors(facts, state) == dict(zip([*meant, same], [*told, same], strict=True))

    def test_a_file_without_one_of_its_layers(self, moco, tmp_path):
        saved = torch.load(moco[1], weights_only=True)
        del saved["state_dict"]["module.base_encoder.norm.bias"]
        torch.save(saved, tmp_path / "hole.pth.tar")
        refused(
            "does not fit 'mocov3_vits16': .*Missing key.*\"norm.bias\"", "mocov3_vits16", tmp_path / "hole.pth.tar"
        )

    def test_a_file_of_its_other_size(self, moco):
        refused("does not fit 'mocov3_vitb16': .*size mismatch", "mocov3_vitb16", moco[1])

    def test_no_file(self):
        refused("the weights of 'mocov3_vits16' are on no model hub; give weights: FILE", "mocov3_vits16", None)


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of a model hub as serves one file: what is asked of it, and the file's bytes."""

    files: dict[str, bytes]
    asked: list[str]

    def do_HEAD(self) -> None:
        self.asked.append(f"{self.command} {self.path}")
        content = self.files.get(self.path)
        self.send_response(200 if content else 404)
        self.send_header("X-Repo-Commit", "0" * 40)
        self.send_header("ETag", '"a-tag"')
        self.send_header("X-Error-Code", "EntryNotFound") if content is None else None
        self.send_header("Content-Length", str(len(content or b"")))
        self.end_headers()

    def do_GET(self) -> None:
        self.do_HEAD()
        self.wfile.write(self.files.get(self.path, b""))

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def hub(monkeypatch, tmp_path) -> Iterator[http.server.HTTPServer]:
    """A hub on this machine, and an empty cache."""
    Hub.files, Hub.asked = {}, []
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", endpoint)
    template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    yield server
    server.shutdown()
    server.server_close()


FILE = f"/timm/{TINY}/resolve/main/model.safetensors"


class TestHub:
    def test_a_file_of_the_hub_is_fetched_once_and_then_had_without_it(self, hub, audited, tmp_path):
        model = published()
        save_file(model.state_dict(), tmp_path / "tiny.safetensors")
        Hub.files[FILE] = (tmp_path / "tiny.safetensors").read_bytes()
        encoder = load_encoder(TINY, None, 32)
        wanted = reference(model, encoder)
        torch.testing.assert_close(encoder(PIXELS).values, wanted, rtol=0, atol=rounding(wanted, TINY_VIT))
        assert f"GET {FILE}" in Hub.asked
        hub.shutdown()
        hub.server_close()
        with audited("socket.connect") as connections:
            again = load_encoder(TINY, None, 32)
        assert torch.equal(again(PIXELS).values, encoder(PIXELS).values)
        assert len(connections) <= 1  # whether the file has changed

    def test_a_hub_that_is_not_there_is_asked_once(self, hub, audited):
        hub.shutdown()
        hub.server_close()
        with audited("socket.connect") as connections:
            refused(
                "'test_vit.r160_in1k' are not in the local cache and the hub cannot be reached; give weights: FILE",
                TINY,
                None,
            )
        assert [address for _, address in connections] == [
            hub.server_address
        ]  # left to itself, the hub's client asks five times more

    def test_a_hub_without_the_file_says_so(self, hub):
        refused(
            r"the weights of 'test_vit.r160_in1k' cannot be downloaded from the hub; give weights: FILE \(.*404",
            TINY,
            None,
        )
        assert f"HEAD {FILE}" in Hub.asked

    def test_offline_mode_asks_nobody(self, hub, monkeypatch):
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        refused("hub cannot be reached; give weights: FILE", "vit_tiny_patch16_224", None)
        assert Hub.asked == []

    def test_a_model_that_nobody_published(self):
        refused(
            "timm knows no published weights of 'vit_base_patch16_18x2_224'; give weights: FILE",
            "vit_base_patch16_18x2_224",
            None,
        )

    def test_weights_that_timm_does_not_know(self):
        match = "timm has no weights 'augreg' for 'test_vit' \\('test_vit.augreg'\\); allowed: r160_in1k"
        refused(match, "test_vit.augreg", None, field="name")


@pytest.mark.parametrize(
    "name", [ARCH, "vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224", "swin_tiny_patch4_window7_224"]
)
def test_timms_transformers_take_other_sizes_than_their_own(name):
    model = TimmModel(name, weights="none")
    net = load_model(name, model, None, skeleton(name, model))
    assert net.forward_features(torch.zeros(1, 3, 320, 288)).isfinite().all()


def test_a_network_that_takes_any_size_anyway_is_not_told_to():
    model = TimmModel("resnet18", weights="none")
    assert load_model("resnet18", model, None, skeleton("resnet18", model))
    with pytest.raises(TypeError, match="dynamic_img_size"):
        timm.create_model("resnet18", num_classes=0, dynamic_img_size=True)


def test_timm_alone_leaves_what_a_file_lacks_at_random(tmp_path):
    # Why repa-lab tries a file twice: should timm become strict, this fails, and once would be enough.
    save_file({"something.weight": torch.zeros(3)}, tmp_path / "other.safetensors")
    overlay = {"file": str(tmp_path / "other.safetensors")}
    assert timm.create_model(TINY, pretrained=True, num_classes=0, pretrained_cfg_overlay=overlay)
