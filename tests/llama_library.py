"""llama.cpp by ctypes, for tests/long_llama.py: the library that node-llama-cpp brings built.

Its structures of parameters are not declared here: a function returns them with their defaults into
more bytes than any version has, and gets them back so; only what has long stood at their beginning
is set. That is how C passes large structures on 64-bit Linux and macOS."""

import ctypes
import os
import platform
from pathlib import Path

import numpy as np

# Which of the numbers of a context's parameters, what it is by default, and what it is set to.
POOLING = (11, 0xFFFFFFFF, 0)  # what is done to an encoder's states: nothing
EXACT = ((13, 0xFFFFFFFF, 0), (26, 1, 0), (27, 1, 0))  # no flash attention; a cache of float32
ROOM = 2048  # bytes of a structure of parameters: more than it has


class Params(ctypes.Structure):
    _fields_ = [("numbers", ctypes.c_uint32 * (ROOM // 4))]


class Batch(ctypes.Structure):
    _fields_ = [
        ("n_tokens", ctypes.c_int32),
        ("token", ctypes.POINTER(ctypes.c_int32)),
        ("embd", ctypes.c_void_p),
        ("pos", ctypes.POINTER(ctypes.c_int32)),
        ("n_seq_id", ctypes.POINTER(ctypes.c_int32)),
        ("seq_id", ctypes.POINTER(ctypes.POINTER(ctypes.c_int32))),
        ("logits", ctypes.POINTER(ctypes.c_int8)),
    ]


LOG = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
KINDS = {  # of results; all others are pointers
    "llama_model_default_params": Params,
    "llama_context_default_params": Params,
    "llama_model_quantize_default_params": Params,
    "llama_batch_init": Batch,
    "llama_tokenize": ctypes.c_int32,
    "llama_decode": ctypes.c_int32,
    "llama_encode": ctypes.c_int32,
    "llama_vocab_n_tokens": ctypes.c_int32,
    "llama_model_n_embd": ctypes.c_int32,
    "llama_model_decoder_start_token": ctypes.c_int32,
    "llama_model_chat_template": ctypes.c_char_p,
}


class Llama:
    """The library in a folder where npm installed node-llama-cpp."""

    def __init__(self, folder):
        machine = {"x86_64": "x64", "AMD64": "x64", "aarch64": "arm64"}
        name = f"linux-{machine.get(platform.machine(), platform.machine())}"
        place = Path(folder) / "node_modules" / "@node-llama-cpp" / name / "bins" / name
        [path] = place.glob("libllama.v*.so") or [place / "libllama.so"]
        [ggml] = place.glob("libggml.v*.so") or [place / "libggml.so"]
        self.base = ctypes.CDLL(str(place / "libggml-base.so"), ctypes.RTLD_GLOBAL)
        self.ggml = ctypes.CDLL(str(ggml), ctypes.RTLD_GLOBAL)
        self.lib = ctypes.CDLL(str(path), ctypes.RTLD_GLOBAL)
        for name, kind in KINDS.items():
            getattr(self.lib, name).restype = kind
        for name in ("load_from_file", "get_vocab"):
            getattr(self.lib, f"llama_model_{name}").restype = ctypes.c_void_p
        for name in ("init_from_model", "get_logits_ith", "get_embeddings_ith", "get_memory"):
            getattr(self.lib, f"llama_{name}").restype = ctypes.c_void_p
        self.lines = []  # what it says of errors
        self.log = LOG(self.hear)
        self.lib.llama_log_set(self.log, None)
        self.ggml.ggml_backend_load_all_from_path(str(place).encode())
        self.lib.llama_backend_init()
        self.base.ggml_quantize_chunk.restype = ctypes.c_size_t

    def hear(self, level, text, _):
        if level in (3, 4):  # a warning, an error
            self.lines.append(text.decode(errors="replace").strip())

    def quantize_file(self, source, target, file_type):
        """llama.cpp's own quantizer, of a whole file. file_type: a number of llama_ftype."""
        params = self.lib.llama_model_quantize_default_params()
        params.numbers[0] = 1  # threads
        params.numbers[1] = file_type
        paths = [str(path).encode() for path in (source, target)]
        if self.lib.llama_model_quantize(*paths, ctypes.byref(params)):
            raise RuntimeError(f"{source}: not quantized: {'; '.join(self.lines[-3:])}")

    def quantize(self, values, type_number, n_bytes):
        """llama.cpp's own quantizer: bytes (rows, n_bytes) of values (rows, columns)."""
        out = np.zeros((len(values), n_bytes), np.uint8)
        rows, columns = map(ctypes.c_int64, values.shape)
        source, target = (ctypes.c_void_p(a.ctypes.data) for a in (values, out))
        self.base.ggml_quantize_chunk(
            type_number, source, target, ctypes.c_int64(0), rows, columns, None
        )
        return out


class Model:
    """A GGUF file, open: texts to ids, ids to logits. n_ctx: the longest sequence; states: of an
    encoder, that are asked for."""

    def __init__(self, llama, path, n_ctx=256, states=False):
        self.llama = llama
        self.lib = llama.lib
        llama.lines.clear()
        params = self.lib.llama_model_default_params()
        self.model = self.lib.llama_model_load_from_file(str(path).encode(), params)
        if not self.model:
            raise RuntimeError(f"{path}: {'; '.join(llama.lines[-3:])}")
        self.model = ctypes.c_void_p(self.model)
        self.vocab = ctypes.c_void_p(self.lib.llama_model_get_vocab(self.model))
        self.n_vocab = self.lib.llama_vocab_n_tokens(self.vocab)
        context = self.lib.llama_context_default_params()
        for place in range(3):  # n_ctx, n_batch, n_ubatch
            context.numbers[place] = n_ctx
        for place, usual, wanted in (*EXACT, POOLING) if states else EXACT:
            assert context.numbers[place] == usual, "a structure that is not known here"
            context.numbers[place] = wanted
        self.context = self.lib.llama_init_from_model(self.model, context)
        if not self.context:
            raise RuntimeError(f"{path}: {'; '.join(llama.lines[-3:])}")
        self.context = ctypes.c_void_p(self.context)
        n_threads = int(os.environ.get("OMP_NUM_THREADS", 1))
        self.lib.llama_set_n_threads(self.context, n_threads, n_threads)
        self.n_ctx = n_ctx

    def close(self):
        self.lib.llama_free(self.context)
        self.lib.llama_model_free(self.model)

    def tokenize(self, text, add_special=False):
        """The ids of a text in which no special token is read."""
        data = text.encode()
        room = len(data) + 16
        out = (ctypes.c_int32 * room)()
        n = self.lib.llama_tokenize(
            self.vocab, data, len(data), out, room, ctypes.c_bool(add_special), ctypes.c_bool(False)
        )
        return list(out[:n])

    def template(self):
        """The chat template, or None."""
        text = self.lib.llama_model_chat_template(self.model, None)
        return text.decode() if text else None

    def run(self, ids, begin=0, encode=False):
        """Feed ids at positions from `begin` on; all of them have outputs."""
        batch = self.lib.llama_batch_init(len(ids), 0, 1)
        batch.n_tokens = len(ids)
        for i, id in enumerate(ids):
            batch.token[i] = id
            batch.pos[i] = begin + i
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = 0
            batch.logits[i] = 1
        code = (self.lib.llama_encode if encode else self.lib.llama_decode)(self.context, batch)
        self.lib.llama_batch_free(batch)
        if code:
            raise RuntimeError(f"llama.cpp failed with {code}: {'; '.join(self.llama.lines[-3:])}")

    def clear(self):
        memory = self.lib.llama_get_memory(self.context)
        if memory:
            self.lib.llama_memory_clear(ctypes.c_void_p(memory), ctypes.c_bool(True))

    def numbers(self, get, n, width):
        rows = []
        for i in range(n):
            place = get(self.context, i)
            row = ctypes.cast(place, ctypes.POINTER(ctypes.c_float * width)).contents
            rows.append(np.array(row, np.float32))
        return np.stack(rows)

    def logits(self, ids, source=None):
        """(T, V) float32 of ids; of an encoder-decoder with a source."""
        self.clear()
        if source is not None:
            self.run(source, encode=True)
        self.run(ids)
        return self.numbers(self.lib.llama_get_logits_ith, len(ids), self.n_vocab)

    def states(self, ids):
        """(T, C) float32: an encoder's states."""
        self.lib.llama_set_embeddings(self.context, ctypes.c_bool(True))
        self.run(ids, encode=True)
        width = self.lib.llama_model_n_embd(self.model)
        return self.numbers(self.lib.llama_get_embeddings_ith, len(ids), width)

    def greedy(self, ids, n_new, source=None):
        """n_new ids behind `ids`, each the likeliest, by the cache."""
        logits = self.logits(ids, source)[-1]
        made = []
        for i in range(n_new):
            made.append(int(logits.argmax()))
            if i + 1 < n_new:
                self.run(made[-1:], begin=len(ids) + i)
                logits = self.numbers(self.lib.llama_get_logits_ith, 1, self.n_vocab)[0]
        return made
