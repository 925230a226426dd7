"""What is said of W&B's settings before training is what W&B's own client says."""

from __future__ import annotations

import base64
import socket

import pytest
import wandb
from wandb.errors import UsageError
from wandb.sdk.lib.wbauth.validation import check_api_key

from repa_lab.spec import SpecError, load_spec
from repa_lab.tracking import server as tracking
from repa_lab.tracking.server import (
    ServerError,
    WandbRefusalError,
    api_key,
    environment_problems,
    require_server,
    resolve_mode,
)
from tests.orchestration.conftest import tiny

from .server import KEY, serving

__all__ = ["tiny"]

LONG = "k" * 40
KEYS = [
    "", "short", LONG, "k" * 39, "k" * 41, f"local-{LONG}", "local-short", f"a-b-{LONG}", "-" + LONG, LONG + "-", "a" * 30 + "-" + "b" * 30,
    "a.b.c", "a.b", f"{LONG}.b.c", LONG[:-1] + "!", LONG[:-1] + " ", "wandb_v1_" + LONG,
]  # fmt: skip


@pytest.mark.parametrize("key", KEYS)
def test_a_key_is_refused_that_wandb_refuses(clean, monkeypatch, key):
    monkeypatch.setenv("WANDB_API_KEY", key)
    problems = list(environment_problems("online"))
    assert [problem.partition(":")[0] for problem in problems] == (["WANDB_API_KEY"] if check_api_key(key) else [])
    assert not key or not any(key in problem for problem in problems) or key == "short"  # no key is printed


@pytest.mark.parametrize(
    "name, value",
    [
        ("WANDB_BASE_URL", "foo"),
        ("WANDB_BASE_URL", "https://wandb.ai"),
        ("WANDB_BASE_URL", "ftp://example.org"),
        ("WANDB_PROJECT", "a/b"),
        ("WANDB_TAGS", "t" * 65),
        ("WANDB_SILENT", "perhaps"),
        ("WANDB_MODE", "onlin"),
    ],
)
def test_a_variable_that_wandb_refuses_is_named_in_one_line(clean, monkeypatch, name, value):
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    assert list(environment_problems("online")) == []
    monkeypatch.setenv(name, value)
    (problem,) = environment_problems("online")
    assert problem.startswith(f"{name}: ") and "\n" not in problem
    assert list(environment_problems("offline")) == list(environment_problems("disabled")) == []


@pytest.mark.parametrize("chosen", ["onlin", "Offline", "off", "true"])
def test_a_mode_that_does_not_exist(clean, monkeypatch, chosen):
    monkeypatch.setenv("WANDB_MODE", chosen)
    (problem,) = environment_problems(resolve_mode("auto"))
    assert problem == f"WANDB_MODE: expected one of online, offline, disabled, run, shared, dryrun, got {chosen!r}"


@pytest.mark.parametrize(
    "mode, environment, resolved",
    [
        ("auto", {}, "offline"),
        ("auto", {"WANDB_API_KEY": "k"}, "online"),
        ("auto", {"WANDB_API_KEY": ""}, "offline"),
        ("auto", {"WANDB_API_KEY": "k", "WANDB_MODE": "offline"}, "offline"),
        ("auto", {"WANDB_API_KEY": "k", "WANDB_MODE": "dryrun"}, "offline"),
        ("auto", {"WANDB_MODE": "run"}, "online"),
        ("auto", {"WANDB_MODE": "disabled"}, "disabled"),
        ("online", {"WANDB_MODE": "offline"}, "online"),
        ("disabled", {"WANDB_API_KEY": "k"}, "disabled"),
    ],
)
def test_the_mode(clean, monkeypatch, mode, environment, resolved):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert resolve_mode(mode) == resolved


@pytest.mark.parametrize(
    "machine, mode",
    [("127.0.0.1:8080", "online"), ("127.0.0.1", "offline"), ("example.org", "offline")],
)
def test_a_stored_key_counts_for_its_server_alone(clean, tmp_path, monkeypatch, machine, mode):
    """A key of one server is never sent to another."""
    file = tmp_path / "home" / ".netrc"
    file.parent.mkdir()
    file.write_text(f"machine {machine}\n  login user\n  password {KEY}\n")
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:8080")
    assert api_key() == (KEY if mode == "online" else None)
    assert resolve_mode("auto") == mode
    assert bool(list(environment_problems("online"))) == (mode == "offline")
    monkeypatch.setenv("WANDB_API_KEY", LONG)
    assert api_key() == LONG


@pytest.mark.parametrize("text", ["machine", f"machine 127.0.0.1:8080 login user password {KEY[:8]}", ""])
def test_a_file_of_keys_that_cannot_be_read_holds_none(clean, tmp_path, monkeypatch, text):
    monkeypatch.setenv("NETRC", str(tmp_path / "keys"))
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:8080")
    (tmp_path / "keys").write_text(text)
    assert api_key() is None and resolve_mode("auto") == "offline"


def test_the_server_is_asked_with_a_stored_key(clean, tmp_path, monkeypatch):
    with serving() as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.address)
        monkeypatch.setenv("NETRC", str(tmp_path / "keys"))
        machine = server.address.removeprefix("http://")
        (tmp_path / "keys").write_text(f"machine {machine}\n  login user\n  password {KEY}\n")
        require_server()
    assert server.keys == {"Basic " + base64.b64encode(f"api:{KEY}".encode()).decode()}


def taken_by_wandb(**settings: object) -> bool:
    try:
        wandb.Settings(**settings)
    except (ValueError, UsageError):
        return False
    return True


@pytest.mark.parametrize(
    "project", ["p", "a b", "ü.1_-", "p" * 128, "p" * 129, *(f"a{character}b" for character in "/\\#?%:")]
)
def test_a_project_is_refused_that_wandb_refuses(tiny, project):
    try:
        load_spec(tiny(run={"wandb": {"project": project}}))
        is_taken = True
    except SpecError as error:
        assert str(error).startswith("<given>: run.wandb.project: ") and "\n" not in str(error)
        is_taken = False
    assert is_taken is taken_by_wandb(project=project)


@pytest.mark.parametrize(
    "wandb, said",
    [
        ({"project": ""}, "project: expected text of 1 or more characters, got ''"),
        ({"project": "p" * 129}, f"project: expected text of at most 128 characters, got '{'p' * 99}..."),
        ({"project": "runs/2026?"}, "project: W&B takes no name with / \\ # ? % :, got / ? in 'runs/2026?'"),
        ({"entity": "us/p"}, "entity: W&B takes no name with / \\ # ? % :, got / in 'us/p'"),
        ({"entity": "my team"}, "entity: W&B takes no user or team with spaces, got 'my team'"),
        ({"mode": "on"}, "mode: expected one of auto, online, offline, disabled, got 'on'"),
        ({"artifacts": "all"}, "artifacts: expected one of false, final, got 'all'"),
        ({"artifacts": True}, "artifacts: expected one of false, final, got true"),
        ({"tags": ["x" * 65]}, f"tags.0: expected text of at most 64 characters, got '{'x' * 65}'"),
        ({"tags": [""]}, "tags.0: expected text of 1 or more characters, got ''"),
        ({"tags": "one"}, "tags: expected a list, got 'one'"),
    ],
)
def test_what_wandb_would_refuse_is_refused_with_its_place(tiny, tmp_path, wandb, said):
    with pytest.raises(SpecError) as refused:
        load_spec(tiny(run={"wandb": wandb}))
    assert str(refused.value) == f"<given>: run.wandb.{said}"


def test_a_server_that_takes_the_key(server, monkeypatch):
    require_server()
    assert server.sessions == []  # nothing is begun there
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # W&B's client does not ask it for a server on this machine
    require_server()


@pytest.mark.parametrize("status, said", [(503, "answers with status 503"), (404, "answers with status 404")])
def test_a_server_that_is_none_of_wandb(server, monkeypatch, status, said):
    monkeypatch.setattr(type(server), "answer", lambda *asked: (status, {}))
    with pytest.raises(ServerError, match=said):
        require_server()


def test_a_server_that_cannot_be_reached(server, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"http://127.0.0.1:{taken.getsockname()[1]}"
    monkeypatch.setenv("WANDB_BASE_URL", address)
    with pytest.raises(ServerError, match=f"^W&B's server {address} cannot be reached: Connection refused$"):
        require_server()
    monkeypatch.setenv("WANDB_BASE_URL", "http://no-such-host.invalid")
    with pytest.raises(ServerError, match=r"no-such-host\.invalid (cannot be reached|does not answer)"):
        require_server()


def test_a_server_that_takes_connections_and_says_nothing(server, monkeypatch):
    monkeypatch.setattr(tracking, "_ANSWER_S", 0.3)
    server.answers.clear()
    with pytest.raises(ServerError, match=r"does not answer within 0\.3 s|timed out"):
        require_server()


def test_a_key_that_the_server_refuses(clean, monkeypatch):
    with serving(refuses=True) as refusing:
        monkeypatch.setenv("WANDB_BASE_URL", refusing.address)
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        with pytest.raises(
            WandbRefusalError, match=rf"^WANDB_API_KEY: {refusing.address} refuses the key \(status 401\)$"
        ):
            require_server()
