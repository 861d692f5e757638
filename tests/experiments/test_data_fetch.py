import gzip
import hashlib
import io
import sys
import tarfile
import threading
import zipfile
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from ocnopt.experiments.data import fetch as fetching
from ocnopt.experiments.data.fetch import fetch
from ocnopt.experiments.data.sets import DENSITIES, SETS, Download
from ocnopt.experiments.data.terminal import DownloadProgress
from ocnopt.experiments.errors import InputError


class Server:
    """Gives out `files` by name, cut to `cut` bytes of those it announces; keeps the `asked`."""

    def __init__(self):
        server = self
        self.files, self.asked, self.cut, self.failures = {}, [], {}, {}

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                server.asked.append(self.path)
                if server.failures.get(self.path, 0):
                    server.failures[self.path] -= 1
                    return self.send_error(503)
                if self.path not in server.files:
                    return self.send_error(404)
                body = server.files[self.path]
                self.send_response(200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body[: server.cut.get(self.path)])

            def log_message(self, *args):
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()

    def close(self):
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(fetching, "PAUSE", 0)
    monkeypatch.setenv("NO_PROXY", "*")
    server = Server()
    yield server
    server.close()


@pytest.fixture
def unreachable():
    """An address at which nobody listens."""
    server = Server()
    server.close()
    return server.url


def download(name, body, *mirrors):
    md5 = hashlib.md5(body).hexdigest()
    return Download(name, tuple(f"{mirror}/{name}" for mirror in mirrors), f"md5:{md5}", len(body))


def plain(server, *mirrors):
    """A set of two plain files; the server has both in its folder `good`."""
    bodies = {name: gzip.compress(name.encode() * 100) for name in ("a.gz", "b.gz")}
    server.files.update({f"/good/{name}": body for name, body in bodies.items()})
    return replace(
        SETS["mnist"],
        files=tuple(bodies),
        downloads=tuple(download(name, body, *mirrors) for name, body in bodies.items()),
    )


def archive(members):
    """A gzip-compressed tar of names and contents; None for a link in place of a file."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as tar:
        for name, body in members.items():
            info = tarfile.TarInfo(name)
            if body is None:
                info.type, info.linkname = tarfile.SYMTYPE, "/etc/hostname"
            else:
                info.size = len(body)
            tar.addfile(info, None if body is None else io.BytesIO(body))
    return out.getvalue()


CIFAR = SETS["cifar-10"]
MEMBERS = {
    "cifar-10-batches-bin/readme.html": b"read me",
    **{f"cifar-10-batches-bin/{name}": name.encode() * 50 for name in CIFAR.files},
}


def packed(server, body):
    server.files["/cifar-10-binary.tar.gz"] = body
    return replace(CIFAR, downloads=(download("cifar-10-binary.tar.gz", body, server.url),))


def left(root):
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())


def test_plain_files(server, tmp_path):
    data_set = plain(server, f"{server.url}/good")
    root = tmp_path / "new" / "folder"
    assert fetch(data_set, root) is True
    assert left(root) == ["mnist/a.gz", "mnist/b.gz"]
    assert (root / "mnist" / "a.gz").read_bytes() == server.files["/good/a.gz"]
    assert server.asked == ["/good/a.gz", "/good/b.gz"]
    assert fetch(data_set, root) is False
    assert len(server.asked) == 2


def test_only_what_is_missing_is_fetched(server, tmp_path):
    (tmp_path / "mnist").mkdir()
    (tmp_path / "mnist" / "a").write_text("mine, unpacked")
    assert fetch(plain(server, f"{server.url}/good"), tmp_path) is True
    assert server.asked == ["/good/b.gz"]
    assert left(tmp_path) == ["mnist/a", "mnist/b.gz"]


def test_next_mirror_when_one_is_down(server, unreachable, tmp_path):
    data_set = plain(server, unreachable, f"{server.url}/gone", f"{server.url}/good")
    assert fetch(data_set, tmp_path) is True
    assert left(tmp_path) == ["mnist/a.gz", "mnist/b.gz"]
    assert server.asked == ["/gone/a.gz", "/good/a.gz", "/gone/b.gz", "/good/b.gz"]


def test_next_mirror_when_one_gives_something_else(server, tmp_path):
    data_set = plain(server, f"{server.url}/bad", f"{server.url}/good")
    server.files["/bad/a.gz"] = b"<html>moved</html>"
    assert fetch(data_set, tmp_path) is True
    assert left(tmp_path) == ["mnist/a.gz", "mnist/b.gz"]


def test_a_server_that_is_busy_is_asked_again(server, tmp_path):
    data_set = plain(server, f"{server.url}/good")
    server.failures["/good/a.gz"] = 1
    assert fetch(data_set, tmp_path) is True
    assert server.asked == ["/good/a.gz", "/good/a.gz", "/good/b.gz"]


def test_failure_names_every_mirror_and_what_to_do(server, unreachable, tmp_path):
    data_set = plain(server, unreachable, f"{server.url}/bad", f"{server.url}/gone")
    server.files["/bad/a.gz"] = b"<html>moved</html>"
    with pytest.raises(InputError) as raised:
        fetch(data_set, tmp_path)
    says = str(raised.value)
    assert f"{unreachable}/a.gz: Connection refused" in says
    assert f"{server.url}/bad/a.gz: what it gives does not match the checksum" in says
    assert f"{server.url}/gone/a.gz: HTTP 404" in says
    assert f"md5 {data_set.downloads[0].checksum[4:]} at {tmp_path / 'mnist' / 'a.gz'}" in says
    assert "\n" not in says
    assert left(tmp_path) == []
    # What will not get better is not asked twice.
    assert server.asked == ["/bad/a.gz", "/gone/a.gz"]


def test_wrong_checksum_leaves_nothing_behind(server, tmp_path):
    data_set = plain(server, f"{server.url}/good")
    server.files["/good/b.gz"] += b"changed"
    with pytest.raises(InputError, match=r"b\.gz.* does not match the checksum"):
        fetch(data_set, tmp_path)
    assert left(tmp_path) == ["mnist/a.gz"]  # whole, so it need not be fetched again
    assert [path.name for path in tmp_path.iterdir()] == ["mnist"]


def test_a_connection_that_breaks_leaves_nothing_behind(server, tmp_path):
    data_set = plain(server, f"{server.url}/good")
    server.cut["/good/a.gz"] = 20
    with pytest.raises(InputError, match=r"a\.gz could not be fetched"):
        fetch(data_set, tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert server.asked == ["/good/a.gz"] * fetching.ROUNDS


def test_an_interruption_leaves_nothing_behind(server, tmp_path):
    class Bar:
        total = 0

        def update(self, advance):
            raise KeyboardInterrupt

        def reset(self):
            pass

        close = reset

    with pytest.raises(KeyboardInterrupt):
        fetch(plain(server, f"{server.url}/good"), tmp_path, watch=lambda _: Bar())
    assert list(tmp_path.iterdir()) == []


def test_archive_is_unpacked(server, tmp_path):
    assert fetch(packed(server, archive(MEMBERS)), tmp_path) is True
    assert left(tmp_path) == sorted(f"cifar-10-batches-bin/{name}" for name in CIFAR.files)
    for name in CIFAR.files:
        path = tmp_path / "cifar-10-batches-bin" / name
        assert path.read_bytes() == MEMBERS[f"cifar-10-batches-bin/{name}"]


def test_a_folder_that_lacks_a_file_is_made_whole_from_one_copy(server, tmp_path):
    folder = tmp_path / "cifar-10-batches-bin"
    folder.mkdir()
    (folder / "mine.txt").write_text("stays")
    (folder / "test_batch.bin").write_text("of another copy")
    assert fetch(packed(server, archive(MEMBERS)), tmp_path) is True
    assert left(folder) == sorted([*CIFAR.files, "mine.txt"])
    assert (folder / "test_batch.bin").read_bytes() == b"test_batch.bin" * 50


def test_an_archive_put_there_by_hand_is_unpacked(server, tmp_path):
    data_set = packed(server, archive(MEMBERS))
    (tmp_path / "cifar-10-binary.tar.gz").write_bytes(server.files["/cifar-10-binary.tar.gz"])
    assert fetch(data_set, tmp_path) is True
    assert server.asked == []
    assert len(left(tmp_path / "cifar-10-batches-bin")) == 6


def test_an_archive_put_there_by_hand_is_checked(server, tmp_path):
    data_set = packed(server, archive(MEMBERS))
    (tmp_path / "cifar-10-binary.tar.gz").write_bytes(b"something else")
    with pytest.raises(InputError, match=r"cifar-10-binary\.tar\.gz does not match its checksum"):
        fetch(data_set, tmp_path)
    assert left(tmp_path) == ["cifar-10-binary.tar.gz"]


def without(name):
    return {key: value for key, value in MEMBERS.items() if not key.endswith(name)}


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (archive({**MEMBERS, "../evil.bin": b"evil"}), r"outside of it, \.\./evil\.bin"),
        (archive({**MEMBERS, "/tmp/evil.bin": b"evil"}), "outside of it, /tmp/evil.bin"),
        (archive({"cifar-10-batches-bin/../../evil": b"", **MEMBERS}), "outside of it"),
        (archive({**MEMBERS, "cifar-10-batches-bin/test_batch.bin": None}), "else than a file"),
        (archive(without("data_batch_3.bin")), "has no cifar-10-batches-bin/data_batch_3.bin"),
        (archive(MEMBERS)[:-40], "cannot be unpacked"),
        (archive(MEMBERS)[:60] + bytes(60) + archive(MEMBERS)[120:], "cannot be unpacked"),
        (b"no archive at all", "cannot be unpacked"),
    ],
    ids=["up", "absolute", "up inside", "link", "missing", "cut", "corrupt", "other"],
)
def test_an_archive_that_cannot_be_trusted_is_refused(server, tmp_path, body, says):
    root = tmp_path / "root"
    with pytest.raises(InputError, match=says) as raised:
        fetch(packed(server, body), root)
    assert "\n" not in str(raised.value)
    assert left(tmp_path) == []
    assert list(root.iterdir()) == []


def test_a_folder_that_cannot_be_written_to(server, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"cannot write to .*file"):
        fetch(plain(server, f"{server.url}/good"), tmp_path / "file")


def test_without_pooch(server, tmp_path, monkeypatch):
    data_set = plain(server, f"{server.url}/good")
    monkeypatch.setitem(sys.modules, "pooch", None)
    with pytest.raises(InputError, match="needs pooch"):
        fetch(data_set, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_what_has_no_files_is_not_fetched(tmp_path):
    assert fetch(SETS["digits"], tmp_path) is False


def test_bars_end_full_whatever_mirrors_did(server, tmp_path):
    data_set = plain(server, f"{server.url}/bad", f"{server.url}/good")
    server.files["/bad/a.gz"] = b"something longer, which moves the bar" * 50
    with DownloadProgress() as progress:
        assert fetch(data_set, tmp_path, progress.watch) is True
        tasks = progress._progress.tasks
        assert [task.description for task in tasks] == ["a.gz", "b.gz"]
        assert [task.completed for task in tasks] == [d.size for d in data_set.downloads]
        assert [task.total for task in tasks] == [d.size for d in data_set.downloads]


WORDS = SETS["articulary-word-recognition"]


def zipped(members):
    """A zip of names and contents."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as packed:
        for name, body in members.items():
            packed.writestr(name, body)
    return out.getvalue()


def words(series, dimensions=9, classes=25):
    """A .ts file as the archive has it, with series of a single step."""
    names = [f"{label}.0" for label in range(classes)]
    lines = ["# tongues", f"@dimensions {dimensions}", f"@classLabel true {' '.join(names)}"]
    rows = [":".join(["0.5"] * dimensions) + f":{names[i % classes]}" for i in range(series)]
    return "\n".join([*lines, "@data", *rows])


TRAIN, TEST = WORDS.files
PUBLISHED = {"ArticularyWordRecognition.txt": "read me", TRAIN: words(275), TEST: words(300)}


def without_checksum(server, body):
    name = WORDS.downloads[0].name
    server.files[f"/{name}"] = body
    return replace(WORDS, downloads=(Download(name, (f"{server.url}/{name}",), None),))


def test_zip_without_a_checksum_is_checked_by_its_counts_and_unpacked(server, tmp_path):
    assert fetch(without_checksum(server, zipped(PUBLISHED)), tmp_path) is True
    assert left(tmp_path) == sorted(f"{WORDS.folder}/{name}" for name in WORDS.files)
    assert (tmp_path / WORDS.folder / TRAIN).read_text() == PUBLISHED[TRAIN]


def test_a_zip_put_there_by_hand(server, tmp_path):
    data_set = without_checksum(server, b"")
    by_hand = tmp_path / "ArticularyWordRecognition.zip"
    by_hand.write_bytes(zipped({**PUBLISHED, TEST: words(299)}))
    with pytest.raises(
        InputError, match="holds 299 series of 9 dimensions and 25 classes, not 300"
    ):
        fetch(data_set, tmp_path)
    by_hand.write_bytes(zipped(PUBLISHED))
    assert fetch(data_set, tmp_path) is True
    assert server.asked == []


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (zipped({**PUBLISHED, TRAIN: words(274)}), r"_TRAIN\.ts holds 274 series of 9.*, not 275"),
        (zipped({**PUBLISHED, TEST: words(300, dimensions=8)}), r"_TEST\.ts holds .* 8 dimensions"),
        (
            zipped({**PUBLISHED, TEST: words(300, classes=24)}),
            r"_TEST\.ts holds .* 24 classes, not",
        ),
        (zipped({**PUBLISHED, TEST: words(300)[:-2]}), r"_TEST\.ts ends line 304 with"),
        (zipped({TRAIN: words(275)}), f"has no {TEST}"),
        (zipped({f"folder/{name}": body for name, body in PUBLISHED.items()}), f"has no {TRAIN}"),
        (zipped({**PUBLISHED, "../evil.ts": "evil"}), r"outside of it, \.\./evil\.ts"),
        (zipped({**PUBLISHED, "/tmp/evil.ts": "evil"}), "outside of it, /tmp/evil.ts"),
        (zipped({f"{TRAIN}/": "", **PUBLISHED}), "as something else than a file"),
        (zipped(PUBLISHED)[:-30], "cannot be unpacked"),
        (zipped(PUBLISHED)[:200] + bytes(60) + zipped(PUBLISHED)[260:], "cannot be unpacked"),
        (b"<html>moved</html>", "cannot be unpacked"),
    ],
    ids=[
        *("fewer", "dimensions", "classes", "cut inside", "missing", "folder", "up", "absolute"),
        *("a folder", "cut", "corrupt", "other"),
    ],
)
def test_a_zip_that_cannot_be_trusted_is_refused(server, tmp_path, body, says):
    root = tmp_path / "root"
    with pytest.raises(InputError, match=says) as raised:
        fetch(without_checksum(server, body), root)
    assert "\n" not in str(raised.value)
    assert left(tmp_path) == []
    assert list(root.iterdir()) == []


def test_without_a_checksum_the_message_asks_for_none(server, unreachable, tmp_path):
    name = WORDS.downloads[0].name
    data_set = replace(WORDS, downloads=(Download(name, (f"{unreachable}/{name}",), None),))
    with pytest.raises(InputError, match=r"put a copy at .*ArticularyWordRecognition\.zip and run"):
        fetch(data_set, tmp_path)


def test_an_archive_may_have_a_folder_of_another_name(server, tmp_path):
    name = "data.tar.gz"
    server.files[f"/{name}"] = archive(
        {"data/gas/data.npy": b"of another set", "data/miniboone/data.npy": b"numbers"}
    )
    data_set = replace(
        DENSITIES["miniboone"], downloads=(download(name, server.files[f"/{name}"], server.url),)
    )
    assert fetch(data_set, tmp_path) is True
    assert left(tmp_path) == ["miniboone/data.npy"]
    assert (tmp_path / "miniboone" / "data.npy").read_bytes() == b"numbers"


def test_a_set_that_has_to_be_brought_is_not_fetched(tmp_path):
    with pytest.raises(InputError, match=r"no server has it; put its two \.ts files there by hand"):
        fetch(SETS["character-trajectories-half"], tmp_path)
    assert list(tmp_path.iterdir()) == []
