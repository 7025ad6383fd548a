import json

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from jaxrlhf.errors import UserError
from jaxrlhf.hf.tensor_files import (
    INDEX,
    SINGLE,
    Pending,
    read_checkpoint,
    read_json,
    read_tensors,
    write_checkpoint,
    write_tensors,
)

TENSORS = {
    "a": np.arange(6, dtype=np.float32).reshape(2, 3),
    "b": np.linspace(-1, 1, 12).astype(ml_dtypes.bfloat16).reshape(3, 4),
    "c": np.array([0.5, 65504], np.float16),
    "scalar": np.array(3.0, np.float32),
}


def pending(tensors):
    return {name: Pending(value.dtype, value.shape, lambda value=value: value) for name, value in tensors.items()}


def test_views_equal_what_was_saved(tmp_path):
    save_file(TENSORS, tmp_path / "x.safetensors", metadata={"format": "pt"})
    stored = read_tensors(tmp_path / "x.safetensors")
    assert set(stored) == set(TENSORS)
    for name, value in TENSORS.items():
        view = stored[name].view()
        assert view.dtype == value.dtype and view.shape == value.shape == stored[name].shape
        assert view.tobytes() == value.tobytes()
        assert isinstance(view, np.memmap) and not view.flags.writeable


def test_the_library_reads_what_is_written(tmp_path):
    transposed = {"t": np.arange(6, dtype=np.float32).reshape(2, 3).T, "scalar": TENSORS["scalar"]}
    write_tensors(tmp_path / "x.safetensors", pending(transposed))
    read = load_file(tmp_path / "x.safetensors")
    for name, value in transposed.items():
        assert read[name].shape == value.shape
        np.testing.assert_array_equal(read[name], value)
    with safe_open(tmp_path / "x.safetensors", "numpy") as file:
        assert file.metadata() == {"format": "pt"}


@pytest.mark.parametrize("limit, files", [(10**6, 1), (48, 2), (24, 3), (1, 4)])
def test_shards_hold_at_most_the_limit_or_one_tensor(tmp_path, limit, files):
    write_checkpoint(tmp_path, pending(TENSORS), limit)
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) == files and (tmp_path / INDEX).exists() == (files > 1)
    for shard in shards:
        held = read_tensors(shard)
        assert len(held) == 1 or sum(tensor.view().nbytes for tensor in held.values()) <= limit
    stored = read_checkpoint(tmp_path)
    assert {name: tensor.view().tobytes() for name, tensor in stored.items()} == {
        name: value.tobytes() for name, value in TENSORS.items()
    }
    if files > 1:
        assert read_json(tmp_path / INDEX)["metadata"]["total_size"] == sum(v.nbytes for v in TENSORS.values())


def test_only_the_primary_process_writes_but_all_fetch(tmp_path):
    fetched = []
    tensors = {n: Pending(v.dtype, v.shape, lambda n=n, v=v: fetched.append(n) or v) for n, v in TENSORS.items()}
    write_checkpoint(tmp_path, tensors, 24, primary=False)
    assert fetched == list(TENSORS) and not list(tmp_path.iterdir())


def framed(header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"w": {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}}


@pytest.mark.parametrize(
    "content, words",
    [
        (b"", ["no safetensors header", "0 bytes"]),
        (b"\x80\x02}q\x00.", ["no safetensors header"]),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n", ["no safetensors header"]),
        (framed(b"{not json}"), ["no safetensors header"]),
        (framed([1]), ["no safetensors header"]),
        (framed(entry(), b"\0" * 8)[:-20], ["no safetensors header"]),
        (framed(entry(), b"\0" * 7), ["tensor w", "truncated"]),
        (framed(entry(shape=(3,)), b"\0" * 8), ["tensor w", "[3]", "8 bytes"]),
        (framed(entry("I64", (2,)), b"\0" * 8), ["tensor w", "[2]", "8 bytes"]),
        (framed(entry(), b"\0" * 12), ["4 bytes after the last tensor", "corrupt"]),
        (framed(entry() | {"x": entry()["w"]}, b"\0" * 8), ["tensor x", "must begin at byte", "corrupt"]),
        (framed(entry(offsets=(4, 12)), b"\0" * 12), ["tensor w", "begins at byte", "corrupt"]),
        (framed(entry(offsets=(0,)), b"\0" * 8), ["tensor w", "malformed"]),
        (framed(entry(shape=(-2,)), b"\0" * 8), ["tensor w", "malformed"]),
        (framed({"w": {"dtype": "F32"}}), ["tensor w", "malformed"]),
        (framed({"w": 3}), ["tensor w", "malformed"]),
    ],
)
def test_a_broken_file_is_named_with_its_tensor(tmp_path, content, words):
    file = tmp_path / SINGLE
    file.write_bytes(content)
    with pytest.raises(UserError) as caught:
        read_checkpoint(tmp_path)
    message = str(caught.value)
    assert message.startswith(f"{file}: ") and "\n" not in message
    assert all(word in message for word in words), message


@pytest.mark.parametrize("dtype, shape", [("I64", (1,)), ("F8_E4M3", (8,)), ("BOOL", (8,)), ("F4", (16,))])
def test_what_is_no_weight_is_refused_only_where_it_is_used(tmp_path, dtype, shape):
    (tmp_path / SINGLE).write_bytes(framed(entry(dtype, shape), b"\0" * 8))
    held = read_checkpoint(tmp_path)["w"]
    with pytest.raises(UserError) as caught:
        held.check_dtype()
    assert str(caught.value).startswith(f"{tmp_path / SINGLE}: tensor w must be stored as one of")


@pytest.mark.parametrize(
    "index, words",
    [
        ("{", ["JSON"]),
        ("[]", ["JSON object"]),
        ("{}", ["weight_map"]),
        ('{"weight_map": {"a": "../x.safetensors"}}', ["weight_map"]),
        ('{"weight_map": {"a": "pytorch_model.bin"}}', ["pytorch_model.bin", "only safetensors"]),
        ('{"weight_map": {"a": "absent.safetensors"}}', ["absent.safetensors", "not in the folder"]),
        ('{"weight_map": {"a": "x.safetensors", "z": "x.safetensors"}}', ["tensor z", "missing"]),
    ],
)
def test_a_broken_index_is_named(tmp_path, index, words):
    save_file(TENSORS, tmp_path / "x.safetensors")
    (tmp_path / INDEX).write_text(index)
    with pytest.raises(UserError) as caught:
        read_checkpoint(tmp_path)
    message = str(caught.value)
    assert str(tmp_path) in message and "\n" not in message
    assert all(word in message for word in words), message


def test_pickle_files_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"no weights; model\.safetensors or model\.safetensors\.index\.json"):
        read_checkpoint(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x02}q\x00.")
    with pytest.raises(UserError, match=r"pytorch_model\.bin: pickle files are not read; convert the file"):
        read_checkpoint(tmp_path)
    save_file(TENSORS, tmp_path / SINGLE)
    assert set(read_checkpoint(tmp_path)) == set(TENSORS)  # beside safetensors they are left alone
