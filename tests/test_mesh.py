"""The grid of processes: which sizes there are, what is refused and what for, and what the norm of
gradients comes to that are divided in any way."""

import itertools
import json

import pytest
from conftest import run

from barelm.mesh import Sizes, choose_sizes
from barelm.run import UserError


@pytest.mark.parametrize(
    "asked, sizes",
    [
        (dict(world=8), Sizes(replica=8)),
        (dict(world=8, parallel="fsdp"), Sizes(shard=8)),
        (dict(world=16, parallel="hsdp", local_world=8), Sizes(replica=2, shard=8)),
        (dict(world=16, parallel="hsdp", local_world=8, tp=2), Sizes(replica=2, shard=4, tp=2)),
        (dict(world=8, parallel="hsdp", replicas=4), Sizes(replica=4, shard=2)),
        (dict(world=16, parallel="fsdp", tp=2, pp=2), Sizes(pp=2, shard=4, tp=2)),
        (dict(world=8, cp=4), Sizes(replica=8, cp=4)),
        (dict(world=8, parallel="fsdp", tp=2, cp=2), Sizes(shard=4, tp=2, cp=2)),
        (dict(world=1, parallel="fsdp"), Sizes()),
    ],
)
def test_sizes(asked, sizes):
    chosen = choose_sizes(**asked)
    assert chosen == sizes and chosen.world == asked["world"]


def test_every_product_that_fits_is_taken_and_every_other_refused():
    for world, tp, pp, cp in itertools.product((1, 2, 6, 8), (1, 2, 3), (1, 2, 4), (1, 2)):
        for parallel in ("ddp", "fsdp", "hsdp"):
            if world % (tp * pp * cp):
                with pytest.raises(UserError, match="nearest"):
                    choose_sizes(world, parallel, tp, pp, cp)
                continue
            sizes = choose_sizes(world, parallel, tp, pp, cp)
            assert sizes.world == world and sizes.data * cp * tp * pp == world
            assert (sizes.shard == 1) == (parallel == "ddp" or world == tp * pp)


@pytest.mark.parametrize(
    "asked, words",
    [
        (dict(world=8, tp=3), "--tp=4 --pp=1 --cp=1"),
        (dict(world=6, pp=4), "--tp=1 --pp=3 --cp=1"),
        (dict(world=16, tp=16, local_world=8), "--tp=8"),
        (dict(world=8, parallel="hsdp", replicas=3), "--replicas=4"),
        (dict(world=8, replicas=2), "for --parallel=hsdp"),
        (dict(world=8, parallel="zero"), "ddp, fsdp, hsdp"),
        (dict(world=8, tp=0), "tp=0"),
        (dict(world=8, parallel="hsdp", replicas=-1), "replicas=-1"),
    ],
)
def test_what_does_not_fit_is_refused_with_what_does(asked, words):
    with pytest.raises(UserError, match=words):
        choose_sizes(**asked)


def figures_of(folder, out, key):
    rows = map(json.loads, (folder / out / "log.jsonl").read_text().splitlines())
    return [row[key] for row in rows if key in row]


STEPS = ["--dataset=tiny", "--n_layer=2", "--n_embd=32", "--n_head=2", "--n_kv_head=2"]
STEPS += ["--seq_len=32", "--batch_tokens=512", "--max_steps=6", "--warmup_steps=2"]
STEPS += ["--learning_rate=2e-3", "--eval_every=3", "--eval_tokens=1100", "--save_every=100"]
STEPS += ["--sample_tokens=0", "--dtype=float32", "--grad_clip=0.3"]


@pytest.mark.parametrize("optimizer, tolerance", [("adamw", 1e-5), ("muon", 2e-3)])
def test_parts_and_copies_of_parts_have_the_curve_of_one_process(tiny, optimizer, tolerance):
    """Loss, the norm of the whole gradient, by which it is clipped, and validation losses over a
    number of windows that the processes do not share evenly."""
    options = [*STEPS, f"--optimizer={optimizer}"]
    one = f"out/mesh_one_{optimizer}"
    run(tiny, "train.py", *options, f"--out_dir={one}")
    meshes = {"fsdp": (2, []), "hsdp": (4, ["--replicas=2"])}
    for parallel, (processes, more) in meshes.items():
        out = f"out/mesh_{parallel}_{optimizer}"
        args = [*options, *more, f"--parallel={parallel}", f"--out_dir={out}"]
        run(tiny, "train.py", *args, processes=processes)
        for key in ("loss", "grad_norm", "val_loss"):
            assert figures_of(tiny, out, key) == pytest.approx(
                figures_of(tiny, one, key), abs=tolerance
            )
