"""The saves of a run whose processes each write a part (sharded.py): its steps, the model that is
made of them, and best/. All processes call the same methods of a StepSaver, at the same step; the
run ends with its `finish`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from barelm import host
from barelm.checkpoint import write_companions
from barelm.files import sync_folder, write_json
from barelm.pieces import write_model
from barelm.resume import STATES
from barelm.sharded import ShardWriter, model_tensors, optimizer_tensors
from barelm.steps import MESH, SHARDS, STATE, discard, keep_last, sizes_of, step_folder

if TYPE_CHECKING:
    from barelm.mesh import Mesh
    from barelm.run import Run
    from barelm.tokenizer import Tokenizer
    from model import GPT


class StepSaver:
    """Writes the steps of a run. mesh: {name: size}, who shares what, for the reader's eye."""

    def __init__(self, out_dir: str | Path, run: Run, mesh: Mesh, keep: int = 1,
                 in_background: bool = False) -> None:  # fmt: skip
        self.out_dir = Path(out_dir)
        self.run = run
        self.mesh = mesh
        self.keep = keep
        self.writer = ShardWriter(run, in_background)
        self.best_step = -1  # the step whose model is the best, and goes into best/
        if run.is_main:
            keep_last(self.out_dir, keep)  # and nothing of what a kill has left

    def save(self, net: GPT, tok: Tokenizer, optimizers: list, state: dict) -> None:
        """Save the step that `state`, a dict of plain values, is of: its folder in shards/, then
        the model in out_dir."""
        step = state["step"]
        folder = step_folder(self.out_dir, step)
        temporary = folder.with_name(folder.name + ".tmp")

        def complete():
            write_companions(temporary, net, tok)
            if step == self.best_step:  # first: what a step says of the best is there
                write_model(temporary, self.out_dir / "best", step)
            self.complete_step(temporary, folder, state)
            write_model(folder, self.out_dir, step)
            for name in STATES:  # of an earlier step, which a process had saved alone
                (self.out_dir / name).unlink(missing_ok=True)
            keep_last(self.out_dir, self.keep)

        tensors = model_tensors(net) | optimizer_tensors(net, optimizers)
        self.writer.write(temporary, tensors, complete)

    def complete_step(self, temporary: Path, folder: Path, state: dict) -> None:
        """Give a step, all of whose parts are on the disk, what is beside them, and its name."""
        write_json(temporary / STATE, state)
        facts = {
            "step": state["step"],
            "windows": state.get("windows"),
            "processes": self.run.world,
            "mesh": self.mesh,
            "torch": str(torch.__version__),
            "files": sizes_of(temporary),
        }
        write_json(temporary / MESH, facts)
        sync_folder(temporary)
        discard(folder)  # which is not whole, or the run would not have come to this step again
        host.replace(temporary, folder)
        sync_folder(folder.parent)

    def save_best(self, net: GPT, tok: Tokenizer, step: int, with_save: bool = False) -> None:
        """Save the model alone, into best/; with_save: together with the step, which comes next."""
        self.best_step = step
        if with_save:
            return
        temporary = self.out_dir / SHARDS / "best.tmp"

        def complete():
            write_companions(temporary, net, tok)
            write_model(temporary, self.out_dir / "best", step)
            discard(temporary)

        self.writer.write(temporary, model_tensors(net), complete)

    def finish(self) -> None:
        """Wait until what was saved last is whole."""
        self.writer.wait()
