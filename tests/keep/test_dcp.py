"""Folders of torch.distributed.checkpoint, written by it from one rank and from two, and pickles that mean harm."""

import io
import os
import pickle
import shutil
import warnings
from collections import OrderedDict

import pytest
import torch
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
from keep_cases import same
from test_cli import run
from test_ranks import free_port
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING

from waypost.core.errors import CheckpointError, ConfigError
from waypost.keep.dcp import ALLOWED, DcpFolder, _Record, _Unpickler
from waypost.keep.reader import Checkpoint
from waypost.kernels import select
from waypost.model import hf
from waypost.testing.tiny import tiny_checkpoint, tiny_model
from waypost.transform.converting.torch_distributed import export_dcp, import_dcp, name_tensors


def weights():
    return {e.spec.name: e.tensor.clone() for e in hf.entries(tiny_model(seed=5))}


def state(weights):
    """A trainer's state as torch's own helpers lay it out."""
    source = torch.Generator().manual_seed(1)
    moments = {n: {"exp_avg": torch.randn(t.shape, generator=source), "step": torch.tensor(7.0)} for n, t in weights.items()}
    groups = [{"lr": 1e-3, "betas": [0.9, 0.95], "params": list(weights)}]
    return {"model": dict(weights), "optim": {"state": moments, "param_groups": groups}, "epoch": 3}


def write(path, tree):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(tree, checkpoint_id=path, no_dist=True)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write(tmp_path_factory.mktemp("dcp") / "d", state(weights()))


@pytest.fixture(scope="module")
def like(tmp_path_factory):
    return tiny_checkpoint(tmp_path_factory.mktemp("like") / "tiny")


def check(checkpoint):
    want = state(weights())
    for name, tensor in want["model"].items():
        assert same(checkpoint.tensor(name), tensor)
        for moment in ("exp_avg", "step"):
            assert same(checkpoint.tensor(name, moment), want["optim"]["state"][name][moment])
    assert len(checkpoint.specs) == 3 * len(want["model"])


def test_import(folder, like, tmp_path):
    out = Checkpoint(import_dcp(folder, tmp_path / "out", like=like), verify=True)
    check(out)
    assert out.scalars["dcp"]["epoch"] == 3
    assert out.scalars["dcp"]["optim.param_groups.0.lr"] == 1e-3
    assert out.lineage.verb == "import"
    assert out.assets() == Checkpoint(like).assets()
    loaded = hf.load(out.path, ops=select(kernel="naive"))
    assert torch.equal(hf.logits(loaded, [1, 2, 3]), hf.logits(tiny_model(seed=5), [1, 2, 3]))


def _on_two(rank, port, path):
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    tree = state(weights())
    cut = lambda t, d: distribute_tensor(t, mesh, [Shard(d)]) if t.dim() > d else t  # noqa: E731
    tree["model"] = {n: cut(t, i % 2) for i, (n, t) in enumerate(tree["model"].items())}
    for n, slots in tree["optim"]["state"].items():
        tree["optim"]["state"][n] = {m: cut(t, 0) for m, t in slots.items()}
    dcp.save(tree, checkpoint_id=path)
    dist.barrier()
    dist.destroy_process_group()


def test_import_of_shards_in_rows_and_columns(like, tmp_path):
    mp.spawn(_on_two, args=(free_port(), str(tmp_path / "d")), nprocs=2)
    assert len(list((tmp_path / "d").glob("*.distcp"))) == 2
    check(Checkpoint(import_dcp(tmp_path / "d", tmp_path / "out", like=like), verify=True))


@pytest.mark.parametrize("prefix", [(), ("app", "model"), ("state", "model")])
def test_any_prefix(like, tmp_path, prefix):
    tree = weights()
    for part in reversed(prefix):
        tree = {part: tree}
    found = Checkpoint(import_dcp(write(tmp_path / "d", tree), tmp_path / "out", like=like))
    assert found.names == Checkpoint(like).names
    assert all(same(found.tensor(n), t) for n, t in weights().items())


def test_names():
    names = ["model.a.weight", "model.norm"]
    theirs = ["model.model.a.weight", "model.model.norm",
              "optim.state.model.a.weight.exp_avg", "optim.state.model.model.norm.m",
              "optim.state.other.m", "rng"]  # fmt: skip
    assert name_tensors(theirs, names, "here") == {
        "model.model.a.weight": ("weight", "model.a.weight"),
        "model.model.norm": ("weight", "model.norm"),
        "optim.state.model.a.weight.exp_avg": ("exp_avg", "model.a.weight"),
        "optim.state.model.model.norm.m": ("m", "model.norm"),
    }


def test_what_does_not_fit_is_said(like, tmp_path):
    tree = weights()
    name = next(iter(tree))
    with pytest.raises(ConfigError, match=r"'rng' .* is neither a weight"):
        import_dcp(write(tmp_path / "a", {"model": tree, "rng": torch.zeros(3)}), tmp_path / "out", like=like)
    assert import_dcp(tmp_path / "a", tmp_path / "out", like=like, weights_only=True)
    assert not Checkpoint(tmp_path / "out").has_state
    with pytest.raises(CheckpointError, match=f"'{name}' is missing"):
        import_dcp(write(tmp_path / "b", {n: t for n, t in tree.items() if n != name}), tmp_path / "no", like=like)
    with pytest.raises(CheckpointError, match="behind any prefix"):
        import_dcp(write(tmp_path / "c", {"x": torch.ones(2)}), tmp_path / "no", like=like)
    head = {**tree, "lm_head.weight": tree["model.embed_tokens.weight"] + 1}
    with pytest.raises(CheckpointError, match="ties the output head"):
        import_dcp(write(tmp_path / "d", head), tmp_path / "no", like=like)
    head["lm_head.weight"] = tree["model.embed_tokens.weight"]
    assert "lm_head.weight" not in Checkpoint(import_dcp(write(tmp_path / "e", head), tmp_path / "tied", like=like)).names
    assert not (tmp_path / "no").exists()


def test_damage(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    data = next(copy.glob("*.distcp"))
    good = data.read_bytes()
    data.write_bytes(good[:-1])
    with pytest.raises(CheckpointError, match="is cut off"):
        DcpFolder(copy)
    data.unlink()
    with pytest.raises(CheckpointError, match=r"distcp: missing"):
        DcpFolder(copy)
    data.write_bytes(bytes(len(good)))
    with pytest.raises(CheckpointError, match="is damaged, or not plain data"):
        DcpFolder(copy).tensor("model.model.norm.weight")
    (copy / ".metadata").unlink()
    with pytest.raises(CheckpointError, match="cannot be read"):
        DcpFolder(copy)


class Harm:
    def __reduce__(self):
        return os.system, ("touch harmed",)


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_pickle_that_means_harm_is_refused(tmp_path, monkeypatch, protocol):
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".metadata").write_bytes(pickle.dumps({"a": Harm()}, protocol))
    with pytest.raises(CheckpointError, match=r"it names \w+\.system, which no checkpoint needs"):
        DcpFolder(tmp_path)
    for innocent in (pickle.dumps([1, 2]), b"", b"garbage"):
        (tmp_path / ".metadata").write_bytes(innocent)
        with pytest.raises(CheckpointError):
            DcpFolder(tmp_path)
    assert os.listdir(tmp_path) == [".metadata"]


class Reaching:
    """An attribute of a class of the allow-list that is no member of an enumeration."""

    def __init__(self, of, name):
        self.of, self.name = of, name

    def __reduce__(self):
        return getattr, (self.of, self.name)


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_only_members_of_the_enumeration_are_reached(protocol):
    """Python 3.11.2 pickles a member as getattr(class, name), later ones as class(value); a checkpoint has either."""
    for name in ("TORCH_CONTIGUOUS_FORMAT", "TORCH_PRESERVE_FORMAT"):
        member = _Unpickler(io.BytesIO(pickle.dumps(Reaching(_MEM_FORMAT_ENCODING, name), 4))).load()
        assert type(member) is _Record
    for of in (OrderedDict, torch.Size, dict, os):
        name = "system" if of is os else "fromkeys"
        harm = Reaching(of, name) if of is not os else os.system
        with pytest.raises(CheckpointError, match="refused"):
            _Unpickler(io.BytesIO(pickle.dumps(harm, protocol))).load()


def test_what_is_allowed_is_inert():
    """Nothing of the allow-list is a function of another library, nor a class with an effect."""
    for found in ALLOWED.values():
        assert isinstance(found, str) or found is dict or found.__module__ == "waypost.keep.dcp"


def test_there_and_back(like, tmp_path, folder):
    ours = import_dcp(folder, tmp_path / "ours", like=like)
    theirs = export_dcp(ours, tmp_path / "theirs")
    check(Checkpoint(import_dcp(theirs, tmp_path / "again", like=like), verify=True))
    want = state(weights())
    tree = {"model": {n: torch.zeros_like(t) for n, t in want["model"].items()}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load(tree, checkpoint_id=str(theirs), no_dist=True)
    assert all(torch.equal(tree["model"][n], t) for n, t in want["model"].items())
    with pytest.raises(ConfigError, match="exists already"):
        export_dcp(ours, tmp_path / "theirs")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["again", "ours", "theirs"]


def test_the_commands(folder, like, tmp_path, capsys):
    code, out, _ = run(capsys, "import", folder, tmp_path / "out", "--like", like)
    assert code == 0
    assert "llama" in out
    assert run(capsys, "export", tmp_path / "out", tmp_path / "back", "--dcp")[0] == 0
    assert (tmp_path / "back" / ".metadata").is_file()
    for bad in (["import", folder, tmp_path / "x"], ["import", like, tmp_path / "x", "--like", like],
                ["import", folder, tmp_path / "x", "--like", like, "--dtype", "bf16"],
                ["export", tmp_path / "out", tmp_path / "x", "--dcp", "--gguf"]):  # fmt: skip
        assert run(capsys, *bad)[0] == 2
