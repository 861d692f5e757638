"""Cases that two processes work on together, as under torchrun, in the file that they are in."""

import datetime
import os
import pickle
import socket
import subprocess
import sys

import torch
import torch.distributed as dist


def work(cases, path, rank, port, world=2):
    """Run every case on one of the processes and keep what each came to.

    A case is a function of nothing; what it returns, or the error it raises as text, is pickled.
    """
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group(
        "gloo", rank=rank, world_size=world, timeout=datetime.timedelta(seconds=60)
    )
    results = {}
    for name, case in cases.items():
        try:
            results[name] = case()
        except Exception as error:  # each case reports for itself
            results[name] = repr(error)
        with open(f"{path}.{rank}", "wb") as file:
            pickle.dump(results, file)
    dist.barrier()
    dist.destroy_process_group()


def results_of(file, tmp_path_factory):
    """What two processes of a file found, called as ``FILE RANK PORT PATH``; and their codes."""
    path = str(tmp_path_factory.mktemp("parallel") / "result")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen([sys.executable, file, str(rank), str(port), path], env=environment)
        for rank in range(2)
    ]
    try:
        codes = [process.wait(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
    found = []
    for rank in range(2):
        with open(f"{path}.{rank}", "rb") as kept:
            found.append(pickle.load(kept))
    return found, codes
