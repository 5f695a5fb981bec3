"""One of two processes with two devices each: three steps, then a checkpoint for one device.

python worker.py PORT PROCESS FILE
"""

import pathlib
import sys

import jax

# `meshes` imports helpers of all tests, which lie in the folder above.
sys.path.append(str(pathlib.Path(__file__).parents[1]))


def main(port, process, path):
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 2)
    # On the loopback interface alone: the default listens on all.
    address = f"127.0.0.1:{port}"
    jax.distributed.initialize(
        address,
        num_processes=2,
        process_id=process,
        coordinator_bind_address=address if process == 0 else None,
        initialization_timeout=60,
        shutdown_timeout_seconds=20,
    )
    import equinox as eqx
    from jax.experimental import multihost_utils
    from meshes import make_block, make_mesh, make_tokens, spread, train

    import braidax as bx

    assert jax.process_count() == 2 and jax.device_count() == 4
    # The expert axis comes first: it is the one that crosses processes.
    parallel = bx.ExpertParallel(make_mesh("auto", (2, 2), ("expert", "data")))
    model = parallel.shard(make_block())
    here = {shard.index[0].start for shard in model.routed.experts.down.addressable_shards}
    assert here == {4 * process}
    tokens = list(spread(parallel, *make_tokens(4, 5)))
    result, losses, arrays = train(model, tokens, parallel)
    # Every process takes part in gathering; one writes.
    load, arrays = multihost_utils.process_allgather((result.load, arrays), tiled=True)
    if process == 0:
        eqx.tree_serialise_leaves(path, (load, losses, arrays))
    jax.distributed.shutdown()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
