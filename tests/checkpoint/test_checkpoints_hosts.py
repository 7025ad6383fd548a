"""Two processes that play two hosts come to the same end: damage that one finds, or a save that fails on one."""

import socket

HOST = """
import sys, errno, json, os, pathlib, jax, numpy as np
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(sys.argv[2], 2, int(sys.argv[1]))
from jax.experimental.multihost_utils import sync_global_devices
from jaxrlhf.config import MeshConfig
from jaxrlhf.errors import Fault, UserError
from jaxrlhf.checkpoint import checkpoints as module
from jaxrlhf.distributed.processes import largest
from jaxrlhf.checkpoint.checkpoints import Checkpoints
from jaxrlhf.checkpoint.lock import RunLock
from jaxrlhf.distributed.mesh import make_mesh
from jaxrlhf.models.sharding import shard

rank, folder = jax.process_index(), pathlib.Path(sys.argv[3])
assert largest(rank * 7) == 7
mesh = make_mesh(MeshConfig(data=-1, fsdp=2))

def tree(step):
    up = np.arange(64, dtype=np.float32).reshape(8, 8) + step
    return {"up": shard(mesh, {"layers.0.mlp.up_proj": {"kernel": up}}), "position": step}

def same(found, step):
    pairs = zip(found["up"]["layers.0.mlp.up_proj"]["kernel"].addressable_shards,
                tree(step)["up"]["layers.0.mlp.up_proj"]["kernel"].addressable_shards)
    return found["position"] == step and all((a.data == b.data).all() for a, b in pairs)

with Checkpoints(folder, 3) as checkpoints:
    for step in (1, 4, 9):
        checkpoints.save(step, tree(step))
if rank == 0:  # one file that each process checks: the largest, and the one after it
    for step, place_in_order in (("9", 0), ("4", 1)):
        files = json.loads(json.loads((folder / step / "record.json").read_bytes())["sealed"])["files"]
        name = sorted(files, key=lambda name: (-files[name][0], name))[place_in_order]
        data = bytearray((folder / step / name).read_bytes())
        data[-1] ^= 1
        (folder / step / name).write_bytes(data)
sync_global_devices("damaged")
said = []
with Checkpoints(folder, 3) as checkpoints:
    found = checkpoints.restore_latest(tree(0), said.append)
    assert found.step == 1 and same(found.tree, 1), found.step
    assert len(said) == 2 and sum("another process found the damage" in line for line in said) == 1, said
    sync_global_devices("set aside")
    assert sorted(p.name for p in folder.iterdir()) == ["1", "4.damaged", "9.damaged", "latest.json"]

    seal = module.seal
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    module.seal = full
    checkpoints.save(2, tree(2))  # one process seals; both hear of it
    try:
        checkpoints.wait()
    except Fault as fault:
        why = "No space left on device" if rank == 0 else "another process could not write its part"
        assert f"step 2 cannot be written: {why}; the checkpoint of step 1 is complete" in str(fault), fault
    else:
        raise AssertionError("the save failed")
    module.seal = seal
    checkpoints.save(3, tree(3))
    assert checkpoints.latest_step() == 3 and same(checkpoints.restore(3, tree(0)), 3)

with RunLock(folder, takes=rank == 0) as lock:
    lock.take()
    try:
        RunLock(folder, takes=rank == 0).take()
    except UserError as error:
        assert ("is running there" if rank == 0 else "process 0 reports which run") in str(error)
    else:
        raise AssertionError("the lock was given twice")
print("ok")
"""


def test_two_hosts_agree(processes, tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    hosts = [processes.start("-c", HOST, rank, address, tmp_path / "c", devices=2) for rank in (0, 1)]
    for host in hosts:
        assert host.wait(240) == 0 and host.output.endswith("ok\n"), host.errors
