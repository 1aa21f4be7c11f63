"""Train an autoencoder of the papers' size on GPT-2 small, divided over the processes that torchrun starts.

    torchrun --nproc-per-node=16 -m helpers.dictionaries.paper_run "GPT-4, 16 million" out/16_million.safetensors

What it will take is said, and refused where memory is short, before any of it is allocated. The checkpoint is gone on
from by the same command, with however many processes.
"""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

import psutil
import torch
import torch.distributed as dist

from helpers.activations.stream import ActivationStream, Harvest
from helpers.base.storage import ROOT
from helpers.dictionaries.autoencoders import SparseAutoencoder, TopK
from helpers.dictionaries.dead_latents import AuxK
from helpers.dictionaries.paper_scale import H100, PAPERS, Run, measure_machine, memory_bytes, plan
from helpers.dictionaries.sharded import Together, part, processes
from helpers.dictionaries.speed import itemsize
from helpers.dictionaries.training import TrainConfig, Trained, train

SETTINGS = {"decay": 0.0, "ema": 0.999}  # the paper's, A.1 and A.5
DEAD_AFTER = 10_000_000  # tokens, the paper's


def main(arguments: Sequence[str] | None = None) -> Trained:
    """Run in every process. Raises ValueError where a process has too little memory, and what `train` raises."""
    parser = argparse.ArgumentParser(prog="paper_run", description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=[name for name, run in PAPERS.items() if run.models == 1])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--subject", default="hub", help="embedded, hub or gemma")
    parser.add_argument("--text", type=int, default=10**9, help="tokens of text to fetch, read again when used up")
    options = parser.parse_args(arguments)
    with processes(device="cuda" if torch.cuda.is_available() else "cpu") as group:
        run = PAPERS[options.name]
        _say_and_refuse(run, group)
        return _train(run, options, group)


def _say_and_refuse(run: Run, group: dist.ProcessGroup) -> None:
    gpu = torch.cuda.is_available()
    machine, number = (H100, 2) if gpu else (measure_machine(group), itemsize())
    if group.rank() == 0:
        table = plan(run, [group.size()], machine, number)
        print(f"{run.source}\n{table.round(2).to_string()}", flush=True)
    require_memory(sum(memory_bytes(run, group.size(), number, gpu).values()), _free_bytes(gpu), group.size())


def require_memory(needed: float, free: float, processes: int) -> None:
    """Raise ValueError where each of the processes needs more than its `free` bytes."""
    if needed > free:
        raise ValueError(
            f"each of {processes} processes needs {needed / 1e9:.1f} GB beside the model and has {free / 1e9:.1f}: "
            "start more of them, on more devices"
        )


def _free_bytes(gpu: bool) -> float:
    """For this process: of its GPU, or its share of the machine's memory."""
    if gpu:
        return torch.cuda.mem_get_info()[0]
    return psutil.virtual_memory().available / int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def _train(run: Run, options: argparse.Namespace, group: dist.ProcessGroup) -> Trained:
    from helpers.subjects.subject import CONTEXTS, load_subject, subject_for  # slow, and not needed up to here
    from helpers.text.documents import text_for

    subject = load_subject(subject_for(options.subject))
    text = text_for(options.subject, "train", subject.tokenizer, min(options.text, run.tokens))
    harvest = Harvest(CONTEXTS[options.subject]["paper"])
    stream = ActivationStream(Together(subject, group), text.tokens, harvest, run.batch)
    sae = part(lambda n, seed: SparseAutoencoder(subject.d_model, n, TopK(run.k), seed), run.n_latents, group)
    config = TrainConfig(
        run.tokens,
        lr=5e-4 * (1024 / run.n_latents) ** 0.5,
        remedy=AuxK(k=run.k_aux),
        dead_after=min(1.0, DEAD_AFTER / run.tokens),
        **SETTINGS,
    )
    shown = "training" if group.rank() == 0 else None
    return train(sae, stream.batches(run.tokens), config, shown, ROOT / options.checkpoint, save_every_minutes=30)


if __name__ == "__main__":
    main()
