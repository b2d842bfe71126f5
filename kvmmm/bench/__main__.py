"""`python -m kvmmm.bench` is `kvmmm bench`."""

from kvmmm.bench.command import bench

bench(prog_name="kvmmm bench")
