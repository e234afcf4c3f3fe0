"""Several processes that generate together: what the first does with the network, the others do.

    run, mirror, (net, tok) = open_together(tp, device, open_model)  # python serve.py --tp=2
    mirror.knows(net=net, tok=tok)
    if not run.is_main:
        mirror.follow()                          # to the end
    mirror(generate, net, tok, ["import"])       # in every process

Each process has a part of the network (barelm/tensor_parallel.py) and a cache of its own heads.
They exchange within the network; here they are only told what to do: a function, and what it is
called with. All compute the same tokens, of the same logits."""

from __future__ import annotations

import io
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from barelm.decode import Decoder
from barelm.mesh import open_mesh
from barelm.run import UserError, setup
from barelm.watch import LOST_PROCESS

if TYPE_CHECKING:
    from collections.abc import Callable
    from subprocess import Popen


SHORT = 4096  # bytes of a message that is sent in one piece
FOR_EVER = timedelta(days=3650)  # a server may be asked nothing for long
# What of a Decoder all processes do; the rest is asked of the host alone.
DECODING = ("set", "clear", "copy", "wipe", "read", "choose", "feed", "capture", "prompt_logits")
DECODING += ("forget", "allow")


def start_others(n: int) -> None:
    """Start this command again as the other n - 1 of n processes, where torchrun has not. They end
    with this one, and it with them."""
    if n < 1:
        raise UserError(f"--tp={n}: expected 1 or more")
    world = int(os.environ.get("WORLD_SIZE", 1))
    if world not in (1, n):
        raise UserError(f"--tp={n}, but torchrun started {world} processes: --nproc_per_node={n}")
    if n == 1:
        return
    if world == n:
        return
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    here = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    here |= {"WORLD_SIZE": str(n), "LOCAL_WORLD_SIZE": str(n)}
    command = [sys.executable, *sys.argv]
    for rank in range(1, n):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        other = subprocess.Popen(
            command, env=os.environ | here | place, stdin=subprocess.DEVNULL, stdout=sys.stderr
        )
        threading.Thread(target=end_with, args=(other, rank), daemon=True).start()
    os.environ.update(here, RANK="0", LOCAL_RANK="0")


def end_with(other: Popen, rank: int) -> None:
    """End this process when another has failed: they compute nothing without each other."""
    status = other.wait()
    if status:
        print(f"process {rank} ended (exit status {status}): so does this one", file=sys.stderr)
        os._exit(1)


def open_together(tp: int, device: str, open_model: Callable, threads: int = 0) -> tuple:
    """What a script with --tp begins with, in the place of `setup` and `load`: (the Run, the Mirror
    or None, what open_model(run, split) returned), split being what `load` takes."""
    start_others(tp)
    run = setup(device, threads=threads)
    if tp == 1:
        return run, None, open_model(run, None)
    from barelm.tensor_parallel import split_heads  # who is alone does without DTensors

    mesh = open_mesh(run, tp=tp)
    return run, Mirror(), open_model(run, partial(split_heads, mesh=mesh))


class Mirror:
    """Called as mirror(f, *args) by the first process, it calls f(*args) in all of them, one after
    another; what it returns is the first's. Functions are named, arguments copied, but for objects
    that all know by a name. here: options for the first process alone."""

    def __init__(self) -> None:
        self.group = dist.new_group(backend="gloo", timeout=FOR_EVER)
        self.names = {}  # {id of an object: its name}
        self.objects = {}  # {name: object}
        self.knows(mirror=self)

    def knows(self, **objects: Any) -> None:
        """Each process calls it with what it has of the same."""
        self.objects |= objects
        self.names |= {id(value): name for name, value in objects.items()}

    def __call__(self, f: Callable, *args: Any, here: dict | None = None, **options: Any) -> Any:
        self.send((f, args, options))
        return f(*args, **options, **(here or {}))

    def end(self) -> None:
        """The others are not needed any more."""
        self.send(None)

    def follow(self) -> None:
        """Do what the first process does, until it ends. What fails there fails here."""
        for number in (signal.SIGINT, signal.SIGTERM):  # the first process ends them all
            signal.signal(number, signal.SIG_IGN)
        while True:
            try:
                message = self.receive()
            except RuntimeError as error:  # the first process is gone
                if any(words in str(error) for words in LOST_PROCESS):
                    return
                raise
            if message is None:
                return
            f, args, options = message
            try:
                f(*args, **options)
            except (Exception, UserError) as error:
                print(f"a process of --tp: {error!r}", file=sys.stderr, flush=True)

    def send(self, message: Any) -> None:
        data = io.BytesIO()
        pickler = pickle.Pickler(data)
        pickler.persistent_id = lambda value: self.names.get(id(value))
        pickler.dump(message)
        data = data.getvalue()
        # The length, and as much as fits behind it.
        first = len(data).to_bytes(8, "little") + data[: SHORT - 8]  # type: ignore[arg-type]
        self.broadcast(first.ljust(SHORT, b"\0"))
        if len(data) > SHORT - 8:  # type: ignore[arg-type]
            self.broadcast(data[SHORT - 8 :])

    def receive(self) -> Any:
        first = self.broadcast(bytes(SHORT))
        length = int.from_bytes(first[:8], "little")
        data = first[8 : 8 + length]
        if length > SHORT - 8:
            data += self.broadcast(bytes(length - len(data)))
        unpickler = pickle.Unpickler(io.BytesIO(data))  # from the first process, which is our own
        unpickler.persistent_load = self.objects.__getitem__
        return unpickler.load()

    def broadcast(self, data: bytes) -> bytes:
        """The first process's bytes; the others give as many."""
        tensor = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        dist.broadcast(tensor, 0, self.group)
        return tensor.numpy().tobytes()


class MirroredDecoder:
    """A Decoder as its Engine has it, of which every process has one."""

    def __init__(self, mirror: Mirror, *args: Any, **options: Any) -> None:
        self.mirror = mirror
        mirror(make_decoder, mirror, *args, **options)
        self.decoder = mirror.objects["decoder"]
        for name in DECODING:
            setattr(self, name, self.mirrored(getattr(Decoder, name)))

    def mirrored(self, method: Callable) -> Callable:
        def call(*args, owner=None, **options):
            here = {} if owner is None else {"owner": owner}  # a job is known to the first alone
            return self.mirror(method, self.decoder, *args, here=here, **options)

        return call

    def __getattr__(self, name):
        return getattr(self.decoder, name)


def make_decoder(mirror: Mirror, *args: Any, **options: Any) -> None:
    """In every process."""
    mirror.knows(decoder=Decoder(*args, **options))
