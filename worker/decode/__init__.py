"""Audio becomes windows: `pool` in the worker, `process` and `decoder` outside it."""
