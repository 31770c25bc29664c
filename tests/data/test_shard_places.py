"""Where shards and their indexes lie: patterns, folders, directories that take no index, web servers."""

from __future__ import annotations

import http.server
import os
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from parallel.errors import UserError
from spar_scale.data.commands import index, show
from spar_scale.data.storage import expand_shards
from spar_scale.data.tar_index import index_path, read_header, read_index


def refusal(action, *given) -> str:
    with pytest.raises(UserError) as caught:
        action(*given)
    return str(caught.value)


@pytest.fixture
def folder(tmp_path) -> Path:
    """A folder with shards (empty files) under names that patterns find, or might take for patterns."""
    for name in ("a/x-00.tar", "a/x-01.tar", "a/x-02.tar", "b/x-00.tar", "run[1]/x-00.tar", "deep/er/x-00.tar"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    for name in ("a/y[0].tar", "a/.hidden.tar", "a/z{0,1}.tar", "none/readme.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    return tmp_path


FOUND = {
    "star": ("a/x-*.tar", ["a/x-00.tar", "a/x-01.tar", "a/x-02.tar"]),
    "question mark": ("a/x-0?.tar", ["a/x-00.tar", "a/x-01.tar", "a/x-02.tar"]),
    "class": ("a/x-0[02].tar", ["a/x-00.tar", "a/x-02.tar"]),
    "folders": ("?/x-00.tar", ["a/x-00.tar", "b/x-00.tar"]),
    "any depth": ("**/x-00.tar", ["a/x-00.tar", "b/x-00.tar", "deep/er/x-00.tar", "run[1]/x-00.tar"]),
    "braces": ("a/x-{00..02}.tar", ["a/x-00.tar", "a/x-01.tar", "a/x-02.tar"]),
    "a list in braces": ("{b,deep/er}/x-00.tar", ["b/x-00.tar", "deep/er/x-00.tar"]),
    "braces and star": ("{a,b}/x-*.tar", ["a/x-00.tar", "a/x-01.tar", "a/x-02.tar", "b/x-00.tar"]),
    "a folder's own brackets": ("run[1]/x-*.tar", ["run[1]/x-00.tar"]),
    "a file in brackets' folder": ("run[1]/x-00.tar", ["run[1]/x-00.tar"]),
    "a file's own brackets": ("a/y[0].tar", ["a/y[0].tar"]),
    "a file's own braces": ("a/z{0,1}.tar", ["a/z{0,1}.tar"]),
}


@pytest.mark.parametrize("case", FOUND)
def test_a_pattern_names_these_shards(folder, case):
    pattern, expected = FOUND[case]
    assert [os.path.relpath(shard, folder) for shard in expand_shards(f"{folder}/{pattern}")] == expected


def test_the_home_directory_is_found(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder))
    assert expand_shards("~/b/*.tar") == [f"{folder}/b/x-00.tar"] == expand_shards("~/b/x-00.tar")


REFUSED = {
    "a folder": ("{}/a", "is a folder, expected shards; did you mean {}/a/*.tar? (5 matching)"),
    "a folder with a slash": ("{}/a/", "is a folder, expected shards; did you mean {}/a/*.tar? (5 matching)"),
    "a folder without shards": ("{}/none", "is a folder without .tar files, expected shards"),
    "a brace beyond the last": ("{}/a/x-{{01..03}}.tar", "no such shard; {}/a holds x-00.tar, "),
    "an open brace": ("{}/a/x-{{00..02.tar", "its braces are not closed ("),
    "a brace of one": ("{}/a/x-{{00}}.tar", "no such shard; {}/a holds "),
    "a folder that matches nothing": ("{}/c*/x.tar", "no such shard; the pattern matches nothing"),
    "a star in a longer **": ("{}/a**/x/*.tar", "cannot be searched ("),
    "the whole file system": ("/**/*.tar", "searches the whole file system; name the folder that holds the shards"),
    "the home of nobody": (
        "~no-such-user/*.tar",
        "no such shard; the folder ~no-such-user does not exist",
    ),
    "a name beyond the limit": ("{}/" + "n" * 300 + "/*.tar", "no such shard; the folder {}/nnn"),
    "a NUL": ("{}/a/\0.tar", "no such shard; {}/a holds "),
    "a folder of a program": ("/proc/self/mem/*.tar", "no such shard; the folder /proc/self/mem does not exist"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_names_no_shard_is_refused_with_what_is_there(folder, case):
    pattern, message = (text.format(folder) for text in REFUSED[case])
    error = refusal(expand_shards, pattern)
    assert message in error and "\n" not in error
    if "{" not in pattern:
        assert error.startswith(f"{pattern}: {message}")


def long_name(make_shard, samples: dict[str, dict[str, bytes]]) -> str:
    """A shard whose index beside it cannot be written: its name would have more than 255 characters."""
    return make_shard(samples, name="x" * 246 + ".tar", indexed=False)


SAMPLES = {"a": {"txt": b"1"}, "b": {"txt": b"22"}}


def test_an_index_that_cannot_lie_beside_its_shard_names_the_variable(make_shard, monkeypatch):
    monkeypatch.delenv("SPAR_INDEX_DIR", raising=False)
    shard = long_name(make_shard, SAMPLES)
    assert refusal(index, [shard]) == (
        f"{shard}.index.npz: cannot be written (File name too long);"
        " set SPAR_INDEX_DIR to a writable directory, then run the same command"
    )


def test_an_index_lies_in_the_directory_of_the_variable(make_shard, monkeypatch, tmp_path):
    shard = long_name(make_shard, SAMPLES)
    monkeypatch.setenv("SPAR_INDEX_DIR", str(tmp_path / "new" / "indexes"))
    index([shard])
    (written,) = (tmp_path / "new" / "indexes").iterdir()
    assert re.fullmatch(r"x{50}-[0-9a-f]{12}\.index\.npz", written.name)
    assert read_index(shard).keys == ("a", "b") and read_header(shard).samples == 2
    monkeypatch.chdir(Path(shard).parent)
    assert read_index(Path(shard).name).keys == ("a", "b")  # the same file by a relative path


def test_shards_of_one_name_have_an_index_each(make_shard, monkeypatch, tmp_path):
    monkeypatch.setenv("SPAR_INDEX_DIR", str(tmp_path / "indexes"))
    one = make_shard(SAMPLES, indexed=False)
    (tmp_path / "other").mkdir()
    other = make_shard({"c": {"txt": b"3"}}, name="other/x-00000.tar", indexed=False)
    index([one, other])
    assert read_index(one).keys == ("a", "b") and read_index(other).keys == ("c",)


def test_an_index_beside_the_shard_serves_where_the_directory_has_none(make_shard, monkeypatch, tmp_path):
    shard = make_shard(SAMPLES)
    monkeypatch.setenv("SPAR_INDEX_DIR", str(tmp_path / "empty"))
    assert read_index(shard).keys == ("a", "b")


def test_an_old_index_beside_the_shard_gives_way_to_one_in_the_directory(make_shard, monkeypatch, tmp_path):
    """On a disk that is read-only nobody can replace the old one."""
    shard = make_shard(SAMPLES)
    old = Path(index_path(shard)).read_bytes()
    make_shard({**SAMPLES, "c": {"txt": bytes(20000)}}, indexed=False)
    monkeypatch.setenv("SPAR_INDEX_DIR", str(tmp_path / "indexes"))
    assert "its index was made for" in refusal(read_header, shard)
    index([shard])
    assert read_header(shard).samples == 3 and Path(index_path(shard)).read_bytes() == old


def test_the_directory_must_be_a_local_one(make_shard, monkeypatch):
    monkeypatch.setenv("SPAR_INDEX_DIR", "s3://bucket/indexes")
    message = "SPAR_INDEX_DIR: found s3://bucket/indexes, expected a local directory"
    assert refusal(index, [make_shard(SAMPLES, indexed=False)]) == message


class WholeFiles(http.server.SimpleHTTPRequestHandler):
    """Serves whole files, as `python -m http.server` does."""

    def log_message(self, format: str, *args: object) -> None:
        return


class Ranges(WholeFiles):
    """Serves parts of a file where they are asked for."""

    def do_GET(self) -> None:
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        path = Path(self.translate_path(self.path))
        if asked is None or not path.is_file():
            return super().do_GET()
        data = path.read_bytes()
        part = data[int(asked[1]) : int(asked[2]) + 1]
        self.send_response(206)
        self.send_header("Content-Length", str(len(part)))
        self.send_header("Content-Range", f"bytes {asked[1]}-{int(asked[1]) + len(part) - 1}/{len(data)}")
        self.end_headers()
        self.wfile.write(part)


class NoSize(WholeFiles):
    """Serves files without their length."""

    def send_header(self, keyword: str, value: str) -> None:
        if keyword != "Content-Length":
            super().send_header(keyword, value)


@pytest.fixture
def serve(tmp_path) -> Iterator[Callable[[type[WholeFiles]], str]]:
    """Return a function that serves `tmp_path` on a free port and returns the URL."""
    servers = []

    def start(kind: type[WholeFiles]) -> str:
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), lambda *given: kind(*given, directory=str(tmp_path)))
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        servers.append((server, thread))
        return f"http://127.0.0.1:{server.server_address[1]}"

    yield start
    for server, thread in servers:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.mark.parametrize("action", [lambda shard: show([shard], 1, None), lambda shard: index([shard])])
def test_a_server_without_ranges_is_refused_in_true_words(make_shard, serve, action):
    shard = make_shard({"a": {"txt": b"1" * 3000}, "b": {"txt": bytes(9 << 20)}})
    url = f"{serve(WholeFiles)}/{Path(shard).name}"
    error = refusal(action, url)
    size = os.path.getsize(shard)
    assert re.match(re.escape(url) + rf": received {size} bytes, requested \d+: this server does not support", error)
    assert "HTTP range requests; copy the shards to a disk or an object store, or use another server" in error


def test_a_server_without_sizes_is_refused(make_shard, serve):
    url = f"{serve(NoSize)}/{Path(make_shard(SAMPLES)).name}"
    assert refusal(read_header, url) == (
        f"{url}.index.npz: the server does not report the size of the file; copy the shards to a disk"
    )


def test_a_shard_on_a_server_is_indexed_in_the_directory_and_read(make_shard, serve, monkeypatch, tmp_path, capsys):
    shard = make_shard({"a": {"txt": b"one"}, "b": {"png": bytes(9 << 20)}, "c": {"txt": b"three"}}, indexed=False)
    url = f"{serve(Ranges)}/{Path(shard).name}"
    error = refusal(index, [url])
    assert (
        error.startswith(f"{url}.index.npz: cannot be written (")
        and "set SPAR_INDEX_DIR to a writable directory" in error
    )
    monkeypatch.setenv("SPAR_INDEX_DIR", str(tmp_path / "indexes"))
    index([url])
    assert read_index(url).keys == ("a", "b", "c")
    show([url], 3, None)
    assert "  a: one\n  b: (no text)\n  c: three\n" in capsys.readouterr().out
    shutil.rmtree(tmp_path / "indexes")
    assert refusal(read_index, url) == f"{url}.index.npz: no such index; run `spar-scale data index {url}`"
