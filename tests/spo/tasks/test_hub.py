"""Data sets of the hub: a hub on this machine, its cache, and none that can be reached."""

import http.server
import json
import socket
import threading
import time

import pytest
from sentences import one_sentence
from test_datasets import GSM8K, gsm8k_parquet, rows, write_parquet

from spo.tasks import get_task
from spo.tasks import hub as hub_files
from spo.tasks.sources import state


@pytest.mark.parametrize("source", ["none.jsonl", "data/none.parquet", "./none", "/none/x", "none"])
def test_a_missing_file_is_no_hub_name(source):
    with pytest.raises(ValueError, match="there is no such file or folder"):
        rows(source, "train")


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """An empty cache and an address where nobody listens."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return constants


COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def served(hub, monkeypatch, tmp_path):
    """A hub on this machine that serves a folder as openai/gsm8k, and what it was asked for."""
    root = tmp_path / "served"
    asked: list[str] = []

    class Hub(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            path = self.path.partition("?")[0]
            asked.append(path)
            headers = {"X-Repo-Commit": COMMIT}
            about = "/api/datasets/openai/gsm8k"
            if path in (about, f"{about}/revision/main", f"{about}/revision/v1"):
                body = json.dumps({"id": "openai/gsm8k", "sha": COMMIT, "siblings": []}).encode()
            elif path == f"{about}/tree/{COMMIT}":
                files = [p for p in root.rglob("*") if p.is_file()]
                body = json.dumps(
                    [
                        {
                            "type": "file",
                            "path": p.relative_to(root).as_posix(),
                            "size": p.stat().st_size,
                            "oid": p.name,
                        }
                        for p in files
                    ]
                ).encode()
            elif path.startswith(f"/datasets/openai/gsm8k/resolve/{COMMIT}/"):
                file = root / path.partition(f"{COMMIT}/")[2]
                body, headers["ETag"] = file.read_bytes(), f'"{file.name}"'
            else:
                self.send_error(404)
                return
            self.send_response(200)
            for name, value in (headers | {"Content-Length": str(len(body))}).items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_HEAD = do_GET

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setattr(hub, "ENDPOINT", address)
        files = f"{address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(hub, "HUGGINGFACE_CO_URL_TEMPLATE", files)
        yield root, asked
        server.shutdown()


def test_an_unreachable_hub_is_one_sentence_at_once(hub):
    start = time.monotonic()
    with pytest.raises(ValueError, match="openai/gsm8k/main: no such file.*does not give it") as e:
        get_task("gsm8k").problems("train", 0)
    assert time.monotonic() - start < 5 and "\n" not in str(e.value)


def test_a_hub_that_does_not_answer_is_not_waited_for(hub, monkeypatch):
    monkeypatch.setattr(hub_files, "HUB_TIMEOUT_S", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setattr(hub, "ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        start = time.monotonic()
        with pytest.raises(ValueError, match="does not give it .*timed out"):
            rows("a/b", "train")
        assert time.monotonic() - start < 5


def test_offline_mode_asks_no_one(hub, monkeypatch):
    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", True)
    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, lambda *_: pytest.fail("it asked a server"))
    with pytest.raises(ValueError, match="HF_HUB_OFFLINE") as error:
        rows("a/b", "train")
    assert "\n" not in str(error.value)


def test_a_folder_of_the_hub_is_read_as_one_here(served, hub, monkeypatch):
    root, asked = served
    gsm8k_parquet(root)
    write_parquet(root / "socratic/test-00000-of-00001.parquet", GSM8K * 2)
    one_file = "openai/gsm8k@v1/main/train-00000-of-00001.parquet"
    assert len(rows(one_file, "test")) == 1 and state(one_file) == "cached"
    assert state("openai/gsm8k@v1/main") == "download"  # the others of the folder
    assert len(rows("openai/gsm8k@v1/main", "test")) == 3
    assert not [path for path in asked if "socratic" in path]
    assert state("openai/gsm8k/main") == "download"  # cached as v1, not as main
    assert len(rows("openai/gsm8k/main", "test")) == 3
    assert state("openai/gsm8k/main") == "cached"
    with pytest.raises(ValueError, match="openai/gsm8k/none: .*none"):
        rows("openai/gsm8k/none", "test")
    monkeypatch.setattr(hub, "ENDPOINT", "http://127.0.0.1:9")
    assert len(rows("openai/gsm8k/main", "test")) == 3
    with pytest.raises(ValueError, match="nobody/nothing: no such file"):
        rows("nobody/nothing", "test")


def test_a_configuration_that_is_no_folder_is_what_the_card_says(served):
    root, _ = served
    write_parquet(root / "a/easy-train.parquet", GSM8K[:1])
    write_parquet(root / "a/easy-exam.parquet", GSM8K)
    (root / "README.md").write_text(
        "---\nconfigs:\n- config_name: easy\n  data_files:\n"
        "  - {split: train, path: a/easy-train.parquet}\n"
        "  - {split: test, path: a/easy-exam.parquet}\n---\n"
    )
    assert len(rows("openai/gsm8k/easy", "test")) == 3
    assert len(rows("openai/gsm8k/easy", "train")) == 1
    assert len(rows("openai/gsm8k:easy", "test")) == 3
    with pytest.raises(ValueError, match="gsm8k/hard: no configuration hard; .*easy") as error:
        rows("openai/gsm8k/hard", "test")
    assert "\n" not in str(error.value)


def test_several_configurations_are_named_before_anything_is_downloaded(served):
    root, asked = served
    gsm8k_parquet(root)
    write_parquet(root / "socratic/test-00000-of-00001.parquet", GSM8K * 2)
    card = "---\nconfigs:\n- config_name: main\n- config_name: socratic\n---\n"
    (root / "README.md").write_text(card)
    with one_sentence(["openai/gsm8k@v1: expected one of its configurations main, socratic"]):
        rows("openai/gsm8k@v1", "test")
    with one_sentence(["write openai/gsm8k:main, or openai/gsm8k:* to read all"]):
        rows("openai/gsm8k", "test")
    assert not [path for path in asked if path.endswith(".parquet")]
    assert len(rows("openai/gsm8k@v1:main", "test")) == 3
    assert len(rows("openai/gsm8k@v1:main#train", "test")) == 1
    assert len(rows("openai/gsm8k:*", "test")) == 9
    assert state("openai/gsm8k:main") == state("openai/gsm8k:main#train") == "cached"


def test_a_card_s_files_are_those_of_its_only_configuration(served):
    root, _ = served
    write_parquet(root / "a.parquet", GSM8K[:1])
    write_parquet(root / "b.parquet", GSM8K)
    (root / "README.md").write_text(
        "---\nconfigs:\n- config_name: default\n  data_files:\n"
        "  - {split: train, path: a.parquet}\n  - {split: test, path: b.parquet}\n---\n"
    )
    assert (len(rows("openai/gsm8k", "train")), len(rows("openai/gsm8k", "test"))) == (1, 3)


def test_the_cache_serves_without_a_network(hub, tmp_path):
    repo = tmp_path / "cache/datasets--openai--gsm8k"
    write_parquet(repo / "snapshots/abc/main/test-00000-of-00001.parquet", GSM8K)
    assert state("openai/gsm8k/main") == "download"
    (repo / "refs").mkdir()
    (repo / "refs/main").write_text("abc")
    assert state("openai/gsm8k/main") == "cached" and state(str(tmp_path)) == "local"
    assert len(rows("openai/gsm8k/main", "test")) == 3
