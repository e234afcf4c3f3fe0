"""Training runs that were published, with their mesh, to hold barelm/plan.py against.

    python -m barelm.published     # a table: theirs, ours

Only what the sources say of a run goes in; the constants of barelm/plan.py are one set for all, of
which two were found on the MPT runs alone."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING

import torch

from barelm.footprint import Step, planned_shapes
from barelm.mesh import Sizes
from barelm.plan import Hardware, Software, mfu_of, step_seconds
from model import GPTConfig

if TYPE_CHECKING:
    from barelm.footprint import Shapes

MPT = "github.com/mosaicml/llm-foundry, scripts/train/benchmarking/README.md"
IBM = "github.com/foundation-model-stack/fms-fsdp, README.md"
TITAN = "github.com/pytorch/torchtitan, docs/performance.md (2024)"
NEMO = "github.com/NVIDIA/dgxc-benchmarking, llama3.1/README_*.md, nemo_megatron/README_175b.md"
MEGATRON = "Narayanan et al. 2021 (arXiv 2104.04473), 5.1 and table 1"
BLOOM = "github.com/bigscience-workshop/bigscience, train/tr11-176B-ml (chronicles)"
LLAMA3 = "Grattafiori et al. 2024 (arXiv 2407.21783), table 4"


@dataclass(frozen=True)
class Published:
    """A run: what it was, and how long its step took."""

    name: str
    gpu: str
    source: str
    step: Step
    seconds: float  # of a step, theirs
    software: Software = field(default_factory=Software)
    network: float | None = None  # bytes/s of a device, where it is not the usual

    def ours(self) -> float:
        """Our seconds of a step."""
        hardware = Hardware.of(self.gpu, self.network)
        return sum(step_seconds(self.step, hardware, self.software).values())

    def mfu(self, seconds: float) -> float:
        return mfu_of(self.step, Hardware.of(self.gpu), seconds)


def gpt(
    n_layer: int, n_head: int, n_embd: int, vocab_size: int = 51200, n_ctx: int = 2048
) -> GPTConfig:
    """A network of GPT-3's kind."""
    return GPTConfig(
        vocab_size, n_ctx, n_layer, n_head, n_embd, mlp="gelu", norm="layer", pos="learned"
    )


def llama(n_layer: int, n_head: int, n_kv_head: int, n_embd: int, n_hidden: int, vocab_size: int,
          n_ctx: int) -> GPTConfig:  # fmt: skip
    return GPTConfig(
        vocab_size,
        n_ctx,
        n_layer,
        n_head,
        n_embd,
        n_kv_head=n_kv_head,
        n_hidden=n_hidden,
        qk_norm=False,
        tie=False,
    )


NETWORKS = {
    "MPT-7B": gpt(32, 32, 4096, 50368),
    "MPT-13B": gpt(40, 40, 5120, 50368),
    "MPT-30B": gpt(48, 56, 7168, 50368),
    "MPT-70B": gpt(80, 64, 8192, 50368),
    "GPT-3 175B": gpt(96, 96, 12288),
    "GPT 1T": gpt(128, 160, 25600),
    "BLOOM 176B": gpt(70, 112, 14336, 250880),
    "Llama 2 7B": llama(32, 32, 32, 4096, 11008, 32000, 4096),
    "Llama 2 13B": llama(40, 40, 40, 5120, 13824, 32000, 4096),
    "Llama 2 70B": llama(80, 64, 8, 8192, 28672, 32000, 4096),
    "Llama 3 8B": llama(32, 32, 8, 4096, 14336, 128256, 8192),
    "Llama 3 70B": llama(80, 64, 8, 8192, 28672, 128256, 8192),
    "Llama 3 405B": llama(126, 128, 8, 16384, 53248, 128256, 8192),
}


@cache
def shapes(name: str) -> Shapes:
    return planned_shapes(NETWORKS[name])


def step_of(name: str, sizes: Sizes, rows: int, n_micro: int, recompute: float = 0.0, zero: int = 0,
            grad_dtype: torch.dtype = torch.float32) -> Step:  # fmt: skip
    """The Step of a network of NETWORKS; recompute: the part of its blocks."""
    c = NETWORKS[name]
    return Step(
        c,
        sizes,
        shapes(name),
        c.n_ctx,
        rows,
        n_micro,
        recompute=round(recompute * c.n_layer),
        zero=zero,
        grad_dtype=grad_dtype,
    )


def by_rate(
    name: str, gpu: str, source: str, step: Step, tokens: int, software: Software | None = None
) -> Published:
    """A run of which the tokens that a device computes in a second are known."""
    seconds = step.step_tokens / (tokens * step.sizes.world)
    return Published(name, gpu, source, step, seconds, software or Software())


def by_flops(
    name: str, gpu: str, source: str, step: Step, tflops: int, software: Software | None = None
) -> Published:
    """A run by its TFLOP/s a device as the Megatron papers count them, what is computed again
    included (Narayanan et al. 2021, equation 3)."""
    c = step.config
    s, h = step.seq_len, c.n_embd
    windows = step.step_tokens / s
    flops = (
        96
        * windows
        * s
        * c.n_layer
        * h**2
        * (1 + s / (6 * h) + c.vocab_size / (16 * c.n_layer * h))
    )
    seconds = flops / (step.sizes.world * tflops * 1e12)
    return Published(name, gpu, source, step, seconds, software or Software())


def by_mfu(
    name: str, gpu: str, source: str, step: Step, mfu: float, software: Software
) -> Published:
    seconds = 1.0
    hardware = Hardware.of(gpu)
    return Published(name, gpu, source, step, mfu_of(step, hardware, seconds) / mfu, software)


def runs() -> list[Published]:
    """[Published]."""
    eager = Software(compiled=False)
    older = Software(flash=False, sums_once=True)  # how often interleaved: not said
    nemo = {n: Software(chunks=n, hides_tensor=True, sums_once=True) for n in (1, 5, 7, 12)}
    # 126 blocks and both ends are 16 x 8 pieces of one.
    llama3 = Software(chunks=8, sums_once=True)
    return [
        by_rate("MPT-7B", "A100", MPT, step_of("MPT-7B", Sizes(shard=8), 6, 2), 4641, eager),
        by_rate("MPT-13B", "A100", MPT, step_of("MPT-13B", Sizes(shard=8), 2, 3), 2262, eager),
        by_rate("MPT-30B", "A100", MPT, step_of("MPT-30B", Sizes(shard=8), 3, 21, 1), 916, eager),
        by_rate("MPT-70B", "A100", MPT, step_of("MPT-70B", Sizes(shard=64), 8, 4, 1), 410, eager),
        by_rate("MPT-7B", "H100", MPT, step_of("MPT-7B", Sizes(shard=8), 6, 1), 10643, eager),
        by_rate("MPT-30B", "H100", MPT, step_of("MPT-30B", Sizes(shard=32), 14, 3, 1), 2308, eager),
        by_rate("MPT-70B", "H100", MPT, step_of("MPT-70B", Sizes(shard=64), 8, 4, 1), 1039, eager),
        by_rate("Llama 2 7B", "A100", IBM,
                step_of("Llama 2 7B", Sizes(replica=16, shard=8), 2, 1), 3760, eager),
        by_rate("Llama 2 70B", "A100", IBM,
                step_of("Llama 2 70B", Sizes(shard=128), 6, 1, 1), 380, eager),
        by_rate("Llama 2 13B", "A100", TITAN,
                step_of("Llama 2 13B", Sizes(shard=64), 2, 1), 2162, eager),
        by_rate("Llama 3 8B", "A100", TITAN,
                step_of("Llama 3 8B", Sizes(shard=64), 1, 1, 0.5), 2904, eager),
        by_rate("Llama 3 70B", "A100", TITAN,
                step_of("Llama 3 70B", Sizes(shard=64), 1, 1, 1), 331, eager),
        by_flops("GPT-3 175B", "A100", MEGATRON,
                 step_of("GPT-3 175B", Sizes(pp=8, replica=16, tp=8), 1, 96, 1), 140, older),
        by_flops("GPT 1T", "A100", MEGATRON,
                 step_of("GPT 1T", Sizes(pp=64, replica=6, tp=8), 1, 512, 1), 163, older),
        Published("BLOOM 176B", "A100", BLOOM,
                  step_of("BLOOM 176B", Sizes(pp=12, replica=8, tp=4), 2, 128, 1, zero=1), 105,
                  older, 6.25e9),
        Published("Llama 3 8B", "H100", NEMO,
                  step_of("Llama 3 8B", Sizes(replica=128, cp=2), 1, 32), 13.10, nemo[1]),
        Published("Llama 3 70B", "H100", NEMO,
                  step_of("Llama 3 70B", Sizes(pp=4, replica=4, tp=4, cp=2), 1, 64), 14.72,
                  nemo[5]),
        Published("Llama 3 70B", "H100", NEMO,
                  step_of("Llama 3 70B", Sizes(pp=4, replica=64, tp=4, cp=2), 1, 64), 14.92,
                  nemo[5]),
        Published("Llama 3 405B", "H100", NEMO,
                  step_of("Llama 3 405B", Sizes(pp=9, replica=8, tp=8, cp=2), 1, 63), 17.20,
                  nemo[7]),
        Published("GPT-3 175B", "H100", NEMO,
                  step_of("GPT-3 175B", Sizes(pp=8, replica=4, tp=4), 1, 64), 8.309, nemo[12]),
        by_mfu("Llama 3 405B", "H100", LLAMA3,
               step_of("Llama 3 405B", Sizes(pp=16, replica=64, tp=8), 1, 32), 0.43, llama3),
        by_mfu("Llama 3 405B", "H100", LLAMA3,
               step_of("Llama 3 405B", Sizes(pp=16, replica=128, tp=8), 1, 16), 0.41, llama3),
    ]  # fmt: skip


def main() -> None:
    for run in runs():
        ours = run.ours()
        off = 100 * (ours / run.seconds - 1)
        step = run.step
        print(
            f"{run.name:13} {step.sizes.world:5} {run.gpu}  {run.seconds:8.2f} s {ours:8.2f} s "
            f"{off:+6.1f} %  MFU {100 * run.mfu(run.seconds):.1f} {100 * run.mfu(ours):.1f} %  "
            f"{step.sizes.words()}"
        )


if __name__ == "__main__":
    main()
