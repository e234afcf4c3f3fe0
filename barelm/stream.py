"""Shards that are elsewhere: read by HTTP ranges, and kept in a cache on the disk.

A shard is read in chunks, each a file of the cache. A chunk that is asked for and is not there is
fetched at once; a few threads fetch what is soon to be asked for. Processes share a cache, and none
waits for another: each fetches what it lacks, and a chunk appears under its name when it is whole.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import queue
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from barelm import host
from barelm.chunks import chunk_tokens
from barelm.dedup import hashed_name
from barelm.download import HUB, PATIENCE, WORTH_ANOTHER_TRY, why_no_answer, why_refused
from barelm.files import parse_json
from barelm.run import UserError
from barelm.shards import HEADER_SIZE, shard_format

if TYPE_CHECKING:
    from collections.abc import Iterable


CACHE = Path("data/cache")
N_THREADS = 8  # of a process, that fetch
TRIES = 5
NEEDED_FILES = ("tokenizer.json", "tokenizer_config.json")


def is_remote(name: str) -> bool:
    """Whether a data set's name is an address: hf://owner/name, https://host/folder/meta.json."""
    return re.match(r"(hf|https?)://", name) is not None


def place_of(name: str) -> str:
    """The URL of the folder of a remote data set, with a slash at its end. Of the Hub:
    hf://owner/name, with @revision behind it, and a folder within it, if need be."""
    if not name.startswith("hf://"):
        return name.removesuffix("meta.json").rstrip("/") + "/"
    match = re.fullmatch(r"hf://([^/@]+/[^/@]+)(?:@([^/]+))?(?:/(.+?))?/?", name)
    if match is None:
        raise UserError(f"--dataset={name}: expected hf://owner/name, or hf://owner/name/folder")
    owner_and_name, revision, folder = match.groups()
    below = f"{folder}/" if folder else ""
    return f"{HUB}datasets/{owner_and_name}/resolve/{revision or 'main'}/{below}"


# --------------------------------------------------------------------------------------------------
# One request


def fetch_range(
    session: Any, url: str, begin: int, end: int, tries: int = TRIES
) -> tuple[bytes, int]:
    """Bytes `begin` to before `end` of a URL, and the size of its whole file; end None: all of it.
    Tried again where that may help, else a UserError."""
    import requests

    headers = {"Accept-Encoding": "identity"}
    if end is not None:
        headers["Range"] = f"bytes={begin}-{end - 1}"
    token = os.environ.get("HF_TOKEN")
    if token and url.startswith(HUB):  # requests leaves it out where it is led to another host
        headers["Authorization"] = f"Bearer {token}"
    for attempt in range(1, tries + 1):
        is_final = False
        try:
            with session.get(url, headers=headers, stream=True, timeout=PATIENCE) as answer:
                answer.raise_for_status()
                if end is not None and answer.status_code != 206:  # all of it, for each part
                    why = "its server sends no ranges of a file: download the folder instead"
                    raise UserError(f"{url}: {why}")
                sent = answer.headers.get("Content-Range", "")
                if end is not None and not sent.startswith(f"bytes {begin}-"):
                    raise UserError(f"{url}: its server sent {sent!r}, not what was asked for")
                data = answer.content
                size = whole_size(answer, len(data))
            if end is None or len(data) == min(end, size) - begin:
                return data, size
            why = f"{len(data)} of {end - begin} bytes came"
        except requests.RequestException as error:
            why = why_no_answer(error, url)
            status = 0
            if error.response is not None:
                status = error.response.status_code
                why = why_refused(status)
            is_refused = 400 <= status < 500 and status not in WORTH_ANOTHER_TRY
            is_final = is_refused or isinstance(error, ValueError)
        if is_final or attempt == tries:
            break
        time.sleep(2 ** (attempt - 1))  # 1, 2, 4, 8 s: a busy server gets some rest
    raise UserError(f"{url}: {why}")


def whole_size(answer: Any, n_bytes: int) -> int:
    """The bytes of the whole file, as an answer says it; else n_bytes."""
    total = answer.headers.get("Content-Range", "").rpartition("/")[2]
    return int(total) if total.isdecimal() else n_bytes


# --------------------------------------------------------------------------------------------------
# The cache


class ChunkCache:
    """Ranges of the files below a URL, each a file in `folder`.

    limit: bytes of the cache, about; the chunks that were used the longest ago are removed. rank,
    world: of the processes of this machine each fetches its share ahead."""

    def __init__(
        self, place: str, folder: Path, limit: float, rank: int = 0, world: int = 1
    ) -> None:
        self.place = place
        self.folder = Path(folder)
        self.limit = limit
        self.rank = rank
        self.world = world
        self.local = threading.local()  # a session, with its connections, for each thread
        self.tasks = queue.PriorityQueue()  # (0 wanted now, 1 ahead; a number; name, begin, end)
        self.numbers = itertools.count()
        self.threads = []
        self.changed = threading.Condition()
        self.wanted = set()  # chunks that somebody waits for
        self.under_way = set()  # chunks that a thread is fetching
        self.errors = {}  # {chunk: UserError}
        self.n_fetched = 0  # by this process

    def path(self, chunk: tuple[str, int, int]) -> str:
        """Where a chunk (name, begin, end), in bytes of its file, is kept."""
        name, begin, end = chunk
        return f"{self.folder}/{name}.{begin}-{end}"

    def has(self, chunk: tuple[str, int, int]) -> bool:
        """Whether a chunk is here. It has its name only when it is whole."""
        return os.path.exists(self.path(chunk))

    def read(self, chunk: tuple[str, int, int], begin: int, end: int) -> bytes:
        """Bytes of a chunk: `begin` to before `end` in its file."""
        _, chunk_begin, _ = chunk
        while True:
            try:
                with open(self.path(chunk), "rb", buffering=0) as file:
                    file.seek(begin - chunk_begin)
                    return file.read(end - begin)
            except FileNotFoundError:  # another process made room just now
                self.want([chunk])

    def want(self, chunks: Iterable[tuple[str, int, int]]) -> None:
        """Return when all of these chunks were here; a UserError where one cannot be had."""
        missing = [chunk for chunk in chunks if not self.has(chunk)]
        if not missing:
            return
        with self.changed:
            for chunk in missing:
                self.errors.pop(chunk, None)
                self.wanted.add(chunk)
                self.put(0, chunk)
            self.changed.wait_for(lambda: self.wanted.isdisjoint(missing))
        for chunk in missing:
            if chunk in self.errors:
                raise self.errors[chunk]

    def ahead(self, chunks: Iterable[tuple[str, int, int]]) -> None:
        """Let the threads fetch this process's share of these chunks, in this order."""
        for number, chunk in enumerate(chunks):
            with contextlib.suppress(OSError):  # those that are not here
                os.utime(self.path(chunk))  # used now: not the next to be removed
            if number % self.world == self.rank and not self.has(chunk):
                self.put(1, chunk)

    def put(self, priority: int, chunk: tuple[str, int, int]) -> None:
        """Add a task; the first one starts the threads, which end with the process."""
        self.tasks.put((priority, next(self.numbers), chunk))
        while len(self.threads) < N_THREADS:
            self.threads.append(threading.Thread(target=self.work, daemon=True))
            self.threads[-1].start()

    def work(self) -> None:
        """What a thread does: one task after another."""
        while True:
            priority, _, chunk = self.tasks.get()
            with self.changed:
                if chunk in self.under_way:  # whoever waits for it waits for that thread
                    continue
                self.under_way.add(chunk)
            error = None
            try:
                if not self.has(chunk):
                    self.fetch(chunk, tries=TRIES if priority == 0 else 1)
            except UserError as failure:
                error = failure
            except Exception as failure:  # a thread that ended would leave others waiting
                error = UserError(f"{self.place}{chunk[0]}: {failure!r}")
            with self.changed:
                self.under_way.discard(chunk)
                if error and priority == 1 and chunk in self.wanted:  # by now: worth more tries
                    self.put(0, chunk)
                    continue
                self.wanted.discard(chunk)
                if error:
                    self.errors[chunk] = error
                self.changed.notify_all()

    def session(self) -> Any:
        """This thread's connections."""
        import requests

        if not hasattr(self.local, "session"):
            self.local.session = requests.Session()
        return self.local.session

    def fetch(self, chunk: tuple[str, int, int], tries: int) -> None:
        """Bring a chunk here."""
        name, begin, end = chunk
        data, _ = fetch_range(self.session(), self.place + name, begin, end, tries)
        self.keep(self.path(chunk), data)
        self.n_fetched += 1
        if self.n_fetched % 64 == 1:
            self.make_room()

    def keep(self, path: str | Path, data: bytes) -> None:
        """Write a file that appears under its name when it is whole. Processes that write the same
        one have temporary names of their own."""
        temporary = f"{path}.{os.getpid()}-{threading.get_ident()}.tmp"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with open(temporary, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            host.replace(temporary, path)
        except OSError as error:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise UserError(f"{path}: cannot be written: {error.strerror}") from None

    def make_room(self) -> None:
        """Remove the chunks that were used the longest ago, down to the limit."""
        files = []
        for path in self.folder.glob("*.bin.*-*"):  # temporary ones of killed processes, too
            with contextlib.suppress(OSError):  # another process removed it
                status = path.stat()
                files.append((status.st_mtime, status.st_size, path))
        total = sum(size for _, size, _ in files)
        for _, size, path in sorted(files):
            if total <= self.limit:
                return
            with contextlib.suppress(OSError):
                path.unlink()
            total -= size

    def whole(self, name: str) -> bytes:
        """A small file below the URL: its bytes."""
        return fetch_range(self.session(), self.place + name, 0, None)[0]

    def header(self, name: str) -> list:
        """(tokens, name of their dtype) of a shard below the URL."""
        url = self.place + name
        header, size = fetch_range(self.session(), url, 0, HEADER_SIZE)
        count, dtype = shard_format(np.frombuffer(header, "<i4"), size, url)
        return [count, dtype.str]


class RemoteShard:
    """The tokens of a shard that is elsewhere: as an array has them, by its length and slices. What
    a slice needs lies in one chunk, if it is a window of the seq_len and stride given here."""

    def __init__(self, cache: ChunkCache, name: str, count: int, dtype: str, seq_len: int,
                 stride: int = 0) -> None:  # fmt: skip
        stride = stride or seq_len
        self.cache = cache
        self.name = name
        self.count = count
        self.dtype = np.dtype(dtype)
        self.step = chunk_tokens(stride)  # tokens from one chunk to the next
        self.overlap = max(0, seq_len + 1 - stride)  # of the last window of a chunk: behind it

    def __len__(self) -> int:
        return self.count

    def chunk(self, token: int) -> tuple[str, int, int]:
        """The chunk of the window that begins at this token: (name, begin, end) in bytes."""
        begin = token // self.step * self.step
        end = min(begin + self.step + self.overlap, self.count)
        width = self.dtype.itemsize
        return self.name, HEADER_SIZE + begin * width, HEADER_SIZE + end * width

    def __getitem__(self, tokens: slice) -> np.ndarray:
        begin, end, _ = tokens.indices(self.count)
        width = self.dtype.itemsize
        place = HEADER_SIZE + begin * width
        data = self.cache.read(self.chunk(begin), place, HEADER_SIZE + end * width)
        return np.frombuffer(data, self.dtype)


# --------------------------------------------------------------------------------------------------
# A data set that is elsewhere


def open_remote(name: str, seq_len: int, stride: int, cache_gb: float) -> tuple[Path, dict]:
    """A data set that prepare.py made and somebody serves: (a folder here with its meta.json and
    tokenizer, {split: {shard's name: RemoteShard}})."""
    place = place_of(name)
    rank = int(os.environ.get("LOCAL_RANK", 0))
    world = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    cache = ChunkCache(place, CACHE, cache_gb * 1e9, rank, world)
    meta = cache.whole("meta.json")
    # Another meta.json is another data set, whose chunks have a folder of their own.
    cache.folder = CACHE / hashed_name(place + hashlib.sha256(meta).hexdigest())
    numbers = parse_json(meta, f"{place}meta.json")
    if not isinstance(numbers, dict):
        raise UserError(f"{place}meta.json: expected a JSON object")
    for file in NEEDED_FILES:
        if not (cache.folder / file).exists():
            cache.keep(cache.folder / file, cache.whole(file))
    cache.keep(cache.folder / "meta.json", meta)
    names = {}
    for split, entry in numbers.items():
        is_split = split in ("train", "val") or split.startswith("val.")
        if is_split and isinstance(entry, dict):
            names[split] = [str(shard) for shard in entry.get("shards", [])]
    headers = read_headers(cache, list(itertools.chain(*names.values())))
    shards = {}
    for split, of_split in names.items():
        shards[split] = {}
        own_stride = stride if split == "train" else 0
        for shard in of_split:
            shards[split][shard] = RemoteShard(  # type: ignore[call-arg]
                cache, shard, *headers[shard], seq_len, own_stride
            )
    return cache.folder, shards


def read_headers(cache: ChunkCache, names: list[str]) -> dict[str, list]:
    """{shard: [tokens, dtype]} of all shards, which the cache keeps."""
    path = cache.folder / "shards.json"
    with contextlib.suppress(OSError, ValueError):  # none yet
        headers = json.loads(path.read_bytes())
        if list(headers) == names:
            return headers
    with ThreadPoolExecutor(N_THREADS) as pool:
        headers = dict(zip(names, pool.map(cache.header, names)))
    cache.keep(path, json.dumps(headers).encode())
    return headers
