"""Downloads, from a real server on this machine's loopback; the internet is never asked."""

import hashlib
import http.server
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tinyfusion_pl.artifacts import ArtifactError, temporary_path
from tinyfusion_pl.models import create_model, load_denoiser, load_pretrained
from tinyfusion_pl.models.download import NotOnServerError, cache_folder, fetch
from tinyfusion_pl.models.published import PUBLISHED, Published, fetch_published

BODY = bytes(range(256)) * 10_000  # 2.56 MB: several chunks
SHA256 = hashlib.sha256(BODY).hexdigest()


class Server:
    """Serves `files`: path -> body, or (body, headers that replace what is usual)."""

    def __init__(self):
        self.files, self.asked = {}, []
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                outer.asked.append(self.path)
                if self.path not in outer.files:
                    return self.send_error(404)
                found = outer.files[self.path]
                body, headers = found if isinstance(found, tuple) else (found, {})
                self.send_response(200)
                for key, value in {
                    "Content-Type": "application/octet-stream",
                    "Content-Length": len(body),
                    **headers,
                }.items():
                    if value is not None:
                        self.send_header(key, value)
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *args):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def close(self):
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def server(monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    server = Server()
    yield server
    server.close()


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    """The cache folder, empty."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    assert cache_folder() == tmp_path / "torch" / "hub" / "checkpoints"
    return cache_folder()


def closed_port():
    server = http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler)
    server.server_close()
    return server.server_port


def left_in(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize(
    "known", [{}, {"size": len(BODY)}, {"sha256": SHA256}, {"size": len(BODY), "sha256": SHA256}]
)
def test_a_whole_file_arrives_under_its_name_and_nothing_beside_it(server, cache, known):
    server.files["/a.pt"] = BODY
    assert fetch(f"{server.url}/a.pt", cache / "a.pt", **known) == cache / "a.pt"
    assert (cache / "a.pt").read_bytes() == BODY and left_in(cache) == ["a.pt"]


def test_a_file_that_is_there_is_not_asked_for(server, cache):
    cache.mkdir(parents=True)
    (cache / "a.pt").write_bytes(b"mine")
    fetch(f"{server.url}/a.pt", cache / "a.pt", sha256=SHA256)
    assert server.asked == [] and (cache / "a.pt").read_bytes() == b"mine"


@pytest.mark.parametrize("sent", [0, 1, 1 << 20, len(BODY) - 1])
def test_a_cut_connection_leaves_nothing_and_is_told_with_both_lengths(server, cache, sent):
    server.files["/a.pt"] = BODY[:sent], {"Content-Length": len(BODY)}
    with pytest.raises(
        ArtifactError, match=rf"a\.pt did not come whole .*{sent} of {len(BODY)} bytes.*Run again"
    ) as error:
        fetch(f"{server.url}/a.pt", cache / "a.pt")
    assert str(cache / "a.pt") in str(error.value) and left_in(cache) == []
    server.files["/a.pt"] = BODY
    assert fetch(f"{server.url}/a.pt", cache / "a.pt").read_bytes() == BODY


def test_without_a_stated_length_the_known_size_is_held_against_what_came(server, cache):
    server.files["/a.pt"] = BODY[:-5], {"Content-Length": None}
    with pytest.raises(ArtifactError, match=f"{len(BODY) - 5} of {len(BODY)} bytes"):
        fetch(f"{server.url}/a.pt", cache / "a.pt", size=len(BODY))
    assert left_in(cache) == []


def test_a_whole_file_of_another_size_or_checksum_is_not_kept(server, cache):
    server.files["/a.pt"] = BODY[::-1]
    with pytest.raises(
        ArtifactError, match=rf"is not a\.pt: its checksum is .* file {SHA256[:12]}"
    ):
        fetch(f"{server.url}/a.pt", cache / "a.pt", sha256=SHA256)
    with pytest.raises(ArtifactError, match=f"{len(BODY)} of 7 bytes"):
        fetch(f"{server.url}/a.pt", cache / "a.pt", size=7)
    assert left_in(cache) == []


def test_404_names_the_url_and_the_place(server, cache):
    with pytest.raises(NotOnServerError) as error:
        fetch(f"{server.url}/none.pt", cache / "none.pt")
    assert all(
        words in str(error.value)
        for words in ("404", f"{server.url}/none.pt", str(cache / "none.pt"))
    )
    assert left_in(cache) == []


def test_a_web_page_is_not_taken_for_weights(server, cache):
    server.files["/a.pt"] = b"<html>Sign in</html>", {"Content-Type": "text/html; charset=utf-8"}
    with pytest.raises(ArtifactError, match="gave a web page instead of a.pt"):
        fetch(f"{server.url}/a.pt", cache / "a.pt")
    assert left_in(cache) == []


def test_offline_names_the_url_and_the_exact_place(cache):
    url = f"http://127.0.0.1:{closed_port()}/a.pt"
    with pytest.raises(ArtifactError, match="cannot be fetched") as error:
        fetch(url, cache / "a.pt")
    assert url in str(error.value) and f"put it at {cache / 'a.pt'}" in str(error.value)
    assert left_in(cache) == []


def test_an_interrupted_download_leaves_nothing(server, cache, monkeypatch):
    server.files["/a.pt"] = BODY

    class Bar:
        def __init__(self, **_): ...
        def __enter__(self):
            return self

        def __exit__(self, *_): ...
        def update(self, _):
            raise KeyboardInterrupt

    monkeypatch.setattr("tinyfusion_pl.models.download.tqdm", Bar)
    with pytest.raises(KeyboardInterrupt):
        fetch(f"{server.url}/a.pt", cache / "a.pt")
    assert left_in(cache) == []


def test_what_a_killed_download_left_is_removed_by_the_next(server, cache):
    server.files["/a.pt"] = BODY
    cache.mkdir(parents=True, exist_ok=True)
    temporary_path(cache / "a.pt").touch()  # an earlier process had this one's number
    fetch(f"{server.url}/a.pt", cache / "a.pt")
    assert [path.name for path in cache.iterdir()] == ["a.pt"]


def test_the_bar_is_told_the_whole_and_every_byte(server, cache, monkeypatch):
    told = []

    class Bar:
        def __init__(self, *, total, desc, **_):
            told.append((total, desc))

        def __enter__(self):
            return self

        def __exit__(self, *_): ...
        def update(self, num):
            told.append(num)

    monkeypatch.setattr("tinyfusion_pl.models.download.tqdm", Bar)
    server.files["/a.pt"] = BODY
    fetch(f"{server.url}/a.pt", cache / "a.pt")
    assert told[0] == (len(BODY), "a.pt") and sum(told[1:]) == len(BODY) and len(told) > 2


# -- published names
@pytest.fixture
def tiny(server, monkeypatch, tmp_path):
    """A published name whose file is a digits DiT of 3 blocks on the server."""
    model = create_model("dit_digits", depth=3)
    torch.save(
        {"ema": model.state_dict(), "model": create_model("dit_digits", depth=3).state_dict()},
        tmp_path / "file",
    )
    server.files["/Tiny.pt"] = (tmp_path / "file").read_bytes()
    record = Published(model="dit_digits", url=f"{server.url}/Tiny.pt", kwargs={"depth": 3})
    monkeypatch.setitem(PUBLISHED, "Tiny.pt", record)
    return model


def same_weights(model, other):
    return all(
        torch.equal(a, b)
        for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True)
    )


def test_a_published_name_is_downloaded_once_then_read_from_the_cache(server, tiny, cache):
    for _ in range(2):
        model = load_pretrained("Tiny.pt")
        assert same_weights(model, tiny) and len(model.blocks) == 3 and not model.training
    assert server.asked == ["/Tiny.pt"] and left_in(cache) == ["Tiny.pt"]
    assert model.source == {
        "path": "Tiny.pt",
        "weights": "ema",
        "url": f"{server.url}/Tiny.pt",
        "sha256": hashlib.sha256(server.files["/Tiny.pt"]).hexdigest(),
    }


def test_configurations_take_published_names_too(server, tiny):
    assert same_weights(load_denoiser("dit_digits", checkpoint="Tiny.pt"), tiny)


def test_a_published_name_without_a_checkpoint_says_what_to_give(tiny):
    with pytest.raises(
        ValueError, match="Tiny.pt .http.*Tiny.pt.* to download it, or give model.checkpoint=PATH"
    ):
        load_denoiser("dit_digits")


def test_a_published_name_of_another_family_is_refused_before_any_download(
    server, tiny, monkeypatch
):
    monkeypatch.setitem(
        PUBLISHED, "DiT-XL-2-256x256.pt", Published(model="dit_xl_2", url=f"{server.url}/x")
    )
    from tinyfusion_pl.models import registry

    monkeypatch.setitem(registry._FACTORIES, "toy", registry.partial(torch.nn.Linear, 1, 1))
    with pytest.raises(
        ValueError, match="DiT-XL-2-256x256.pt holds a dit_xl_2, which is another family than toy"
    ):
        load_pretrained("DiT-XL-2-256x256.pt", name="toy")
    assert server.asked == []


def test_a_cached_file_that_is_not_the_published_one_is_told(server, tiny, monkeypatch):
    load_pretrained("Tiny.pt")
    monkeypatch.setitem(PUBLISHED, "Tiny.pt", replace(PUBLISHED["Tiny.pt"], sha256=SHA256))
    with pytest.raises(
        ArtifactError, match=f"is not the published Tiny.pt.*{SHA256[:12]}.*Remove it"
    ):
        load_pretrained("Tiny.pt")


def test_a_file_under_the_cwd_comes_before_the_published_name(server, tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "Tiny.pt").write_bytes(server.files["/Tiny.pt"])
    assert same_weights(load_pretrained("Tiny.pt"), tiny) and server.asked == []


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_a_published_diffusers_folder_is_fetched_in_the_form_the_server_has(
    server, cache, monkeypatch, tmp_path, suffix
):
    from diffusers import DiTTransformer2DModel

    theirs = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        sample_size=4,
        num_embeds_ada_norm=5,
    )
    for block in theirs.transformer_blocks:
        block.norm1.emb.load_state_dict(theirs.transformer_blocks[0].norm1.emb.state_dict())
    theirs.save_pretrained(tmp_path / "theirs", safe_serialization=suffix == "safetensors")
    for file in (tmp_path / "theirs").iterdir():
        server.files[f"/transformer/{file.name}"] = file.read_bytes()
    monkeypatch.setitem(
        PUBLISHED,
        "someone/Tiny",
        Published(model="dit", url=server.url, file="someone--Tiny", is_folder=True),
    )
    for _ in range(2):
        model = load_pretrained("someone/Tiny")
    assert model.config["frequency_shift"] == 1 and len(model.blocks) == 2
    assert left_in(cache / "someone--Tiny" / "transformer") == [
        "config.json",
        f"diffusion_pytorch_model.{suffix}",
    ]
    assert len(server.asked) == {"safetensors": 2, "bin": 3}[suffix]


def test_every_published_record_is_an_https_address_and_a_place_of_its_own():
    places = [record.file or name for name, record in PUBLISHED.items()]
    assert len(set(places)) == len(PUBLISHED) >= 8
    assert all(record.url.startswith("https://") for record in PUBLISHED.values())


@pytest.mark.parametrize(
    ("name", "depth", "input_size"),
    [
        ("DiT-XL-2-256x256.pt", 28, 32),
        ("DiT-XL-2-512x512.pt", 28, 64),
        ("TinyDiT-D14-MaskedKD-500K.pt", 14, 32),
    ],
)
def test_published_names_stand_for_the_published_sizes(name, depth, input_size):
    with torch.device("meta"):
        model = create_model(PUBLISHED[name].model, **PUBLISHED[name].kwargs)
    assert (len(model.blocks), model.config["input_size"], model.config["hidden_size"]) == (
        depth,
        input_size,
        1152,
    )


@pytest.mark.parametrize("name", ["DiT-XL-2-256x256.pt", "facebook/DiT-XL-2-256"])
def test_offline_a_published_name_says_where_to_put_the_file(cache, monkeypatch, name):
    record = PUBLISHED[name]
    offline = replace(record, url=f"http://127.0.0.1:{closed_port()}/{name}")
    monkeypatch.setitem(PUBLISHED, name, offline)
    with pytest.raises(ArtifactError) as error:
        fetch_published(name)
    place = cache / ("facebook--DiT-XL-2-256/transformer/config.json" if record.is_folder else name)
    assert offline.url in str(error.value) and f"put it at {place}." in str(error.value)


def test_the_docs_name_every_published_checkpoint_and_its_address():
    page = (Path(__file__).parents[2] / "docs" / "checkpoints.md").read_text()
    for name, record in PUBLISHED.items():
        assert f"`{name}`" in page and record.url in page, name
