"""Two real processes on this machine, and the checkpoint that they leave for one device."""

import os
import pathlib
import socket
import subprocess
import sys

import equinox as eqx
import jax
import numpy as np
import pytest
from meshes import assert_trees_close, make_block, make_tokens, train

pytestmark = pytest.mark.slow

FOLDER = pathlib.Path(__file__).parent
SECONDS = 400  # on a machine that does much else; alone they need less than one minute


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def run_pair(commands, environments=({}, {}), code=0):
    """Start both, wait for the exit code, and end them by SIGKILL: JAX catches SIGTERM."""
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    pair = [
        subprocess.Popen(command, env={**os.environ, **environment}, **streams)
        for command, environment in zip(commands, environments, strict=True)
    ]
    try:
        outputs = [process.communicate(timeout=SECONDS)[0] for process in pair]
    finally:
        for process in pair:
            process.kill()
            process.communicate()
    assert [process.returncode for process in pair] == [code, code], "\n".join(outputs)
    return outputs


def test_two_processes_equal_one_device(tmp_path):
    port, path = free_port(), tmp_path / "model.eqx"
    worker = [sys.executable, str(FOLDER / "worker.py"), str(port)]
    run_pair([[*worker, str(process), str(path)] for process in (0, 1)])
    result, losses, arrays = train(make_block(), make_tokens(4, 5))
    desired = (result.load, losses, arrays)
    like = jax.tree.map(np.asarray, desired)
    assert_trees_close(eqx.tree_deserialise_leaves(path, like), desired)
