"""Checkpoints in object stores: in memory for every layout and every interruption, on an S3 server for the real protocol."""

import json
import socket

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from keep_cases import content, entry, files_of, same
from keep_cases import table as plain_table
from layout_cases import LAYOUTS, any_boxes, model, table
from rank_threads import on_ranks
from test_layouts import blank

from waypost.core.errors import CheckpointError, ConfigError
from waypost.keep import extents, format, remote
from waypost.keep.copying import copy_step
from waypost.keep.export import export_weights
from waypost.keep.objects import ObjectStore
from waypost.keep.reader import Checkpoint
from waypost.keep.remote import Remote, remote_url
from waypost.keep.store import Store
from waypost.testing.faults.injecting import Killed


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(remote, "FIRST_WAIT_S", 0.0)


@pytest.fixture
def url():
    import fsspec

    fs = fsspec.filesystem("memory")
    fs.store.clear()
    yield "memory://bucket/run"
    fs.store.clear()


def holds(checkpoint, entries):
    return all(same(checkpoint.tensor(e.spec.name, e.spec.role), e.tensor) for e in entries)


def test_urls():
    assert remote_url("s3://a/b/") == remote_url("s3:/a/b") == "s3://a/b"
    assert [remote_url(p) for p in ("/a/b", "a", "C:/x", "file:///a", "file:/a")] == [None] * 5
    with pytest.raises(ConfigError, match="no URL"):
        Remote("/tmp/x")
    with pytest.raises(ConfigError, match="nosuch"):
        Remote("nosuch://x")


def test_the_interface_of_the_local_store(url, tmp_path):
    store, local = ObjectStore(url, keep_last=2, keep_every=4), Store(tmp_path, keep_last=2, keep_every=4)
    assert store.latest() is None
    for step in range(1, 8):
        store.save(step, **content(step))
        local.save(step, **content(step))
        assert store.steps() == local.steps()
        assert store.latest().step == step
    got, want = Checkpoint(url, verify=True), Checkpoint(tmp_path)
    assert holds(got, plain_table(7))
    assert (got.config, got.scalars, got.assets(), got.tied) == (want.config, want.scalars, want.assets(), want.tied)
    assert got.manifest.hash == want.manifest.hash
    assert got.manifest.tensors == want.manifest.tensors, "the same digests and the same places in the folder it would be"
    assert store.checkpoint(4).step == 4
    assert Checkpoint(f"{url}/step-00000006").step == 6
    assert store.garbage() == {}
    with pytest.raises(CheckpointError, match="no complete checkpoint of step 5"):
        store.checkpoint(5)


def test_the_same_step_again(url):
    store = ObjectStore(url)
    store.save(1, **content(1))
    store.save(1, **content(2))
    assert holds(store.latest(verify=True), plain_table(2))
    assert len({name.split("/")[1] for name in store.remote.names() if name.count("/") > 1}) == 1


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout(url, layout, monkeypatch):
    monkeypatch.setattr(extents, "EXTENT_BYTES", 300)
    tensors = model(3)
    facts = content(entries=[], config={"hidden_size": 6, "tie_word_embeddings": True})
    for size in (1, 2, 3, 4):
        tables = [table(layout, tensors, rank, size) for rank in range(size)]
        on_ranks(size, lambda r, t=tables, s=size: ObjectStore(url).save(s, group=r, **{**facts, "entries": t[r.rank]}))
    found = [ObjectStore(url, keep_last=4).checkpoint(size, verify=True) for size in (2, 3, 4)]
    assert len({ckpt.manifest.hash for ckpt in found}) == 1
    for now in (1, 2, 3):
        for rank in range(now):
            want = table(layout, tensors, rank, now)
            got = blank(want)
            found[now - 1].read_all(got)
            assert all(same(g.tensor, w.tensor) for g, w in zip(got, want, strict=True))


@settings(max_examples=15)
@given(seed=st.integers(0, 10**6), before=st.integers(1, 4), after=st.integers(1, 4), extent=st.sampled_from([1, 100, 10**6]))
def test_any_boxes_to_any_boxes(seed, before, after, extent):
    source = torch.Generator().manual_seed(seed)

    def choose(n):
        return int(torch.randint(0, n + 1, (), generator=source))

    tensors = [t for t in model(seed % 7, hidden=5) if t.role != "master"]
    tables, whole = any_boxes(tensors, before, choose), extents.EXTENT_BYTES
    facts = content(entries=[], config={"hidden_size": 6, "tie_word_embeddings": True})
    store = ObjectStore(f"memory://any/{seed}-{before}-{after}")
    try:
        extents.EXTENT_BYTES = extent
        on_ranks(before, lambda r: store.save(1, group=r, **{**facts, "entries": tables[r.rank]}))
    finally:
        extents.EXTENT_BYTES = whole
    ckpt = store.latest(verify=True)
    for want in any_boxes(tensors, after, choose):
        got = blank(want)
        ckpt.read_all(got)
        assert all(same(g.tensor, w.tensor) for g, w in zip(got, want, strict=True))


def test_only_the_ranges_that_are_needed(url, monkeypatch):
    rows = 3 * format.TILE_BYTES // 4096
    x = torch.arange(rows * 1024, dtype=torch.float32).reshape(rows, 1024)
    ObjectStore(url).save(1, **content(entries=[entry("x", x)]))
    ckpt, fetched = Checkpoint(url), []
    real = Remote.range
    monkeypatch.setattr(Remote, "range", lambda self, name, a, b: fetched.append(b - a) or real(self, name, a, b))
    part = entry("x", x, box=((1020, 1030), (0, 1024)))
    got = blank([part])
    ckpt.read_all(got)
    assert torch.equal(got[0].tensor, x[1020:1030])
    assert sum(fetched) == 10 * 4096


def put_fails(monkeypatch, at, error, before=True):
    """The `at`-th put raises, before or after the object is there."""
    real, count = Remote.put, iter(range(10**6))

    def put(self, name, data):
        struck = next(count) == at
        if struck and before:
            raise error
        real(self, name, data)
        if struck:
            raise error

    monkeypatch.setattr(Remote, "put", put)
    return count


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("again", [False, True])
def test_interrupted_at_every_object(url, monkeypatch, before, again):
    """Killed before or after any object was written: the old step is whole, gc finds the rest, the next save goes through."""
    monkeypatch.setattr(extents, "EXTENT_BYTES", 300)
    real, at, seen = Remote.put, 0, set()
    while True:
        place = f"{url}-{at}"
        monkeypatch.setattr(Remote, "put", real)
        store = ObjectStore(place)
        store.save(1, **content(1))
        monkeypatch.setattr(Remote, "put", real)
        counter = put_fails(monkeypatch, at, Killed(), before)
        try:
            store.save(1 if again else 2, **content(2))
        except Killed:
            pass
        else:
            break
        del counter
        monkeypatch.setattr(Remote, "put", real)
        ckpt = Checkpoint(place, verify=True)
        seed = ckpt.scalars["schedule"]["step"]
        assert holds(ckpt, plain_table(seed))
        seen.add(seed)
        store.clean()
        assert store.garbage() == {}
        assert holds(Checkpoint(place, verify=True), plain_table(seed))
        store.save(3, **content(3))
        assert holds(Checkpoint(place, verify=True), plain_table(3))
        at += 1
    assert at > 10
    assert seen == ({1} if before and not again else {1, 2}), "`latest` of another step moves last"


def test_garbage_is_only_what_nobody_names(url, monkeypatch):
    store = ObjectStore(url)
    store.save(1, **content(1))
    Remote(url).put("notes.txt", b"mine")
    Remote(url).put("step-00000001/00ff00ff/extents/r0-00000", b"xyz")
    Remote(url).put("step-00000009/00ff00ff/config.json", b"{}")
    assert store.garbage() == {"step-00000001/00ff00ff/extents/r0-00000": 3, "step-00000009/00ff00ff/config.json": 2}
    assert store.garbage(older_than_s=3600) == {}, "it may be under way"
    assert len(store.clean()) == 2
    assert Remote(url).get("notes.txt") == b"mine"
    store.latest(verify=True)


def test_a_store_that_cannot_be_reached_is_an_error_of_ours(url, monkeypatch):
    """Also where something may be missing, so that it is asked for with care."""
    ObjectStore(url).save(1, **content(1))

    def unreachable(self, path, **options):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(type(Remote(url)._fs), "cat_file", unreachable)
    for asked in (lambda: Remote(url).find("waypost.json"), lambda: Checkpoint(url)):
        with pytest.raises(CheckpointError, match=r"no route to host .*; check the name, the rights and the connection"):
            asked()


def test_a_store_that_fails_now_and_then(url, monkeypatch, capsys):
    fs = Remote(url)._fs
    real, count = type(fs).pipe_file, iter(range(10**6))

    def flaky(self, path, value, **options):
        if next(count) % 3 == 0:
            raise ConnectionError("reset by peer")
        real(self, path, value, **options)

    monkeypatch.setattr(type(fs), "pipe_file", flaky)
    ObjectStore(url).save(1, **content(1))
    assert holds(Checkpoint(url, verify=True), plain_table(1))
    assert "ConnectionError: reset by peer; trying again" in capsys.readouterr().err
    monkeypatch.setattr(type(fs), "pipe_file", lambda *a, **k: next(iter(())))
    with pytest.raises(CheckpointError, match="tried 5 times"):
        ObjectStore(url).save(2, **content(2))
    assert Checkpoint(url).step == 1


def test_an_error_is_everybodys(url, monkeypatch):
    tensors = model(0)
    facts = content(entries=[], config={"tie_word_embeddings": True})
    real = Remote.put

    def put(self, name, data):
        if "/r1-" in name:
            raise CheckpointError("no room")
        real(self, name, data)

    monkeypatch.setattr(Remote, "put", put)

    def call(ranks):
        with pytest.raises(CheckpointError, match="no room"):
            ObjectStore(url).save(1, group=ranks, **{**facts, "entries": table("rows", tensors, ranks.rank, 3)})

    on_ranks(3, call)
    assert ObjectStore(url).steps() == []


def test_damage_is_found(url):
    ObjectStore(url).save(1, **content(1))
    place = Remote(url)
    names = [name for name in place.names() if name.count("/") > 1]
    assert len(names) == 7
    for name in names:
        good = place.get(name)
        for bad in (good[:-1], bytes([good[0] ^ 1]) + good[1:], good[:-1] + bytes([good[-1] ^ 64])):
            place.put(name, bad)
            with pytest.raises(CheckpointError, match=r"memory://|memory:/"):
                Checkpoint(url, verify=True)
        place.remove([name])
        with pytest.raises(CheckpointError, match="missing"):
            Checkpoint(url, verify=True)
        place.put(name, good)
    for lie in (b"", b"step-00000009", b"nothing"):
        place.put("latest", lie)
        with pytest.raises(CheckpointError):
            Checkpoint(url)
    with pytest.raises(CheckpointError, match="no checkpoint here"):
        Checkpoint("memory://bucket/elsewhere")
    with pytest.raises(CheckpointError, match="options are for object stores"):
        Checkpoint("/tmp", options={"a": 1})


def test_to_a_folder(url, tmp_path):
    ObjectStore(url).save(1, **content(1))
    want = Store(tmp_path / "local").save(1, **content(1))
    ours, theirs = export_weights(url, tmp_path / "a"), export_weights(want, tmp_path / "b")
    assert {p.name: p.read_bytes() for p in ours.iterdir()} == {p.name: p.read_bytes() for p in theirs.iterdir()}


def test_the_commands(url, capsys):
    from test_cli import run

    ObjectStore(url).save(1, **content(1))
    tree = json.loads(run(capsys, "inspect", url, "--json")[1])
    assert (tree["step"], tree["kind"]) == (1, "checkpoint")
    assert "ok  digests" in run(capsys, "verify", url)[1]
    assert "the same to the bit" in run(capsys, "diff", url, f"{url}/step-00000001")[1]
    Remote(url).put("step-00000009/00ff00ff/config.json", b"{}")
    assert "nothing to remove" in run(capsys, "gc", url)[1]
    assert "step-00000009/00ff00ff/config.json" in run(capsys, "gc", url, "--older-than", "0")[1]
    assert json.loads(run(capsys, "gc", url, "--older-than", "0", "--delete", "--json")[1])["bytes"] == 2
    assert run(capsys, "gc", url, "--keep-last", "1")[0] == 2


PART_BYTES = 5 << 20
"""The smallest part that S3 takes; the library cuts at 50 MiB."""


@pytest.fixture(scope="module")
def s3():
    """(URL of a bucket, options) on a server of this machine."""
    s3fs = pytest.importorskip("s3fs")
    server_of = pytest.importorskip("moto.server")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = server_of.ThreadedMotoServer(ip_address="127.0.0.1", port=port, verbose=False)
    server.start()
    options = {
        "endpoint_url": f"http://127.0.0.1:{port}",
        "key": "k",
        "secret": "s",
        "client_kwargs": {"region_name": "us-east-1"},
    }
    real = s3fs.S3FileSystem._pipe_file

    async def pipe_file(self, path, data):
        return await real(self, path, data, chunksize=PART_BYTES)

    s3fs.S3FileSystem._pipe_file = pipe_file
    Remote("s3://bucket/x", options)._fs.call_s3("create_bucket", Bucket="bucket")
    yield "s3://bucket/run", options
    s3fs.S3FileSystem._pipe_file = real
    server.stop()


@pytest.mark.filterwarnings("ignore")  # botocore's own
def test_on_an_s3_server(s3, monkeypatch):
    url, options = s3
    rows = 4 * PART_BYTES // 4096 + 1  # more than one part, in more than one extent
    x = torch.arange(rows * 1024, dtype=torch.float32).reshape(rows, 1024)
    store = ObjectStore(url, options=options)
    monkeypatch.setattr(extents, "EXTENT_BYTES", 3 * PART_BYTES)
    tables = [[entry("x", x, box=((a, b), (0, 1024)))] for a, b in ((0, rows // 2), (rows // 2, rows))]
    on_ranks(2, lambda r: store.save(1, group=r, **content(entries=tables[r.rank])))
    store.save(2, **content(entries=[entry("x", x)]))
    ckpt = Checkpoint(url, verify=True, options=options)
    assert ckpt.step == 2
    assert torch.equal(ckpt.tensor("x"), x)
    assert store.checkpoint(1, verify=True).manifest.hash == ckpt.manifest.hash
    fs, key = store.remote._fs, "run/step-00000003/00ff00ff/extents/r0-00000"
    begun = fs.call_s3("create_multipart_upload", Bucket="bucket", Key=key)
    fs.call_s3("upload_part", Bucket="bucket", Key=key, PartNumber=1, UploadId=begun["UploadId"], Body=b"x" * 5_000_000)
    assert store.steps() == [1, 2]
    assert [name.split(" ")[0] for name in store.garbage()] == [key], "parts that nobody sees, and that cost"
    store.clean()
    assert store.garbage() == {}
    assert Checkpoint(url, options=options).step == 2


@pytest.mark.filterwarnings("ignore")  # botocore's own
@pytest.mark.parametrize("last", [2, 10**6], ids=["once", "for good"])
def test_a_copy_to_an_s3_server_and_back(s3, last, monkeypatch, tmp_path):
    """A part that fails is sent again; an upload that ends in its middle is never seen, and gc finds it."""
    url, options = f"{s3[0]}-{last}", s3[1]
    home, there = Store(tmp_path / "home"), ObjectStore(url, options=options)
    x = torch.arange(3 * PART_BYTES // 4, dtype=torch.float32).reshape(-1, 1024)
    for step in (1, 2):
        home.save(step, **content(step, entries=[entry("x", x + step)]))
    copy_step(home.checkpoint(1), there)
    fs, parts = type(there.remote._fs), []
    real = fs._call_s3

    async def call(self, method, *args, **fields):
        if method == "upload_part":
            parts.append(fields["PartNumber"])
            if 2 <= len(parts) <= last:
                raise ConnectionError("reset by peer")
        elif method == "abort_multipart_upload" and last > 2:
            raise ConnectionError("whoever would clear up is gone")
        return await real(self, method, *args, **fields)

    with monkeypatch.context() as broken:
        broken.setattr(fs, "_call_s3", call)
        if last > 2:
            with pytest.raises(CheckpointError, match="tried 5 times"):
                copy_step(home.checkpoint(2), there)
        else:
            copy_step(home.checkpoint(2), there)
            assert len(parts) > 4, "in parts, and one of them twice"
    if last > 2:
        assert there.steps() == [1], "half of a copy is never seen"
        assert any("upload" in name for name in there.garbage()), "parts that nobody sees, and that cost"
        there.clean()
        assert there.garbage() == {}
        assert Checkpoint(url, verify=True, options=options).step == 1
        copy_step(home.checkpoint(2), there)
    again = Store(tmp_path / "again")
    copy_step(Checkpoint(url, options=options), again)
    assert files_of(again.folder(2)) == files_of(home.folder(2))
