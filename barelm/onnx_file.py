"""A network as an ONNX graph, with a cache where it writes text, in the names that optimum's and
onnxruntime-genai's readers know.

Tracing a whole network takes as many minutes as it has layers, and copies its weights. Here each
kind of part is traced once, by torch's exporter, with its parameters as inputs: what stands before
the blocks, a block of each kind, what stands behind them. The graph is then put together, the
nodes of a block once for each layer, and the weights are written beside it one after another.

    input_ids (B, T), attention_mask (B, S), position_ids (B, T),
    past_key_values.{i}.key and .value (B, G, P, D), where S = P + T
    -> logits (B, T, V), present.{i}.key and .value (B, G, S, D)

An encoder has no positions and no cache. Padding, where attention_mask is 0, may be anywhere."""

from __future__ import annotations

import graphlib
import importlib
import logging
import warnings
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.nn as nn
from torch.func import functional_call

from barelm.families import family
from barelm.positions import rotary_size
from barelm.run import UserError
from barelm.safetensors import write_tensor

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from torch import Tensor

    from barelm.patterns import Pattern
    from barelm.tokenizer import Tokenizer
    from model import GPT, Block

GENAI_TYPES = ("llama", "mistral", "qwen2", "qwen3")  # families that genai_config.json may name
FAR = 1 << 40  # the position of padding: behind every token, so that none sees it
PAGE = 4096  # bytes: where a tensor begins at a multiple of them a reader maps it


# --------------------------------------------------------------------------------------------------
# The parts that are traced


@dataclass
class Keys:
    """What stands in a cache's place while a mask is traced: where the keys are."""

    positions: Tensor  # (B, S)

    def keys(self, pattern: Pattern) -> tuple[Tensor, bool]:
        return self.positions, False


class Front(nn.Module):
    """What stands before the blocks: ids (B, T), attention_mask (B, S) and, where there is a cache,
    positions (B, T) -> x (B, T, C) and what `GPT.looks` has for each pattern, one behind the
    other."""

    def __init__(self, net: GPT) -> None:
        super().__init__()
        self.net = net

    def forward(self, ids: Tensor, attention_mask: Tensor,
                positions: Tensor | None = None) -> list[Tensor]:  # fmt: skip
        net = self.net
        key_positions = attention_mask.cumsum(1) - 1  # padding, wherever it is, does not count
        if positions is None:
            positions = key_positions.clamp(min=0)
        # Where `may_look` lets nobody look: behind all tokens, or before the first.
        hidden = FAR if net.config.causal else -1
        keys: Any = Keys(key_positions.where(attention_mask != 0, hidden))
        x = net.embed(net.model.embed_tokens(ids), positions)
        out = [x]
        for rope, mask in net.looks(net.model, x, positions, cache=keys).values():
            # An encoder's is alike for all queries; the blocks may ask it how many there are.
            out += [*(rope or ()), mask.expand(-1, -1, ids.shape[1], -1)]
        return out


class Layer(nn.Module):
    """A block: x (B, T, C), what it looks with, all keys and values (B, G, S, D) -> x, and the keys
    and values of the new tokens alone (B, G, T, D)."""

    def __init__(self, block: Block, turns: bool) -> None:
        super().__init__()
        self.block = block
        self.turns = turns  # whether its queries and keys are rotated

    def forward(self, x: Tensor, *inputs: Tensor) -> list[Tensor]:
        *look, keys, values = inputs
        new: list[Tensor] = []

        def cache(k, v):
            new.extend((k, v))
            return keys, values

        rope = tuple(look[:2]) if self.turns else None
        x = self.block(x, rope, look[-1], cache)
        if self.block.has_experts:
            x, _ = x  # and how they were chosen
        return [x, *new]


class Back(nn.Module):
    """What stands behind the blocks: x (B, T, C) and attention_mask -> logits (B, T, V), or what
    the head for another task makes of it."""

    def __init__(self, net: GPT) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor, attention_mask: Tensor) -> list[Tensor]:
        net = self.net
        h = net.model.norm(x)
        if net.score is None:
            return [net.logits(h)]
        if net.task == "classify":
            return [net.score_states(self.pooled(h, attention_mask))]
        scores = net.score_states(h)  # (B, T, labels)
        if net.task == "span":
            return [scores[..., 0], scores[..., 1]]  # (B, T) each
        return [scores]

    def pooled(self, h: Tensor, attention_mask: Tensor) -> Tensor:
        """One state (B, C) of each row, by its real tokens, wherever the padding is."""
        real = (attention_mask != 0).long()  # (B, T)
        if self.net.pooling == "mean":
            return (h * real[..., None]).sum(1) / real.sum(1, keepdim=True)
        numbers = torch.arange(h.shape[1], device=h.device)
        if self.net.pooling == "last":
            place = (real * numbers).argmax(1)
        else:
            place = real.argmax(1)
        return h.gather(1, place[:, None, None].expand(-1, 1, h.shape[-1]))[:, 0]


class WithParameters(nn.Module):
    """A module whose parameters are inputs: what is traced then has names for them and no copy."""

    def __init__(self, module: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        self.module = [module]  # in a list, so that its parameters are not this module's
        self.names = names

    def forward(self, inputs: list[Tensor], parameters: list[Tensor]) -> list[Tensor]:
        return functional_call(self.module[0], dict(zip(self.names, parameters)), tuple(inputs))


@dataclass
class Piece:
    """A traced module, an onnx.ModelProto, and the names of what goes in and out."""

    model: Any
    inputs: list[str]
    parameters: list[str]
    outputs: list[str]

    @property
    def graph(self) -> Any:
        return self.model.graph


def trace(module: nn.Module, inputs: dict[str, tuple[Tensor, str]], outputs: list[str],
          parameters: dict[str, Tensor]) -> Piece:  # fmt: skip
    """The Piece of a module. inputs: {name: (an example, a sign for each dimension: B, T or S where
    it may be of any size)}. parameters: those of the module that it computes with."""
    sizes = {letter: torch.export.Dim(f"size_{letter}") for letter in "BTS"}
    dims = []
    for _, signs in inputs.values():
        dims.append({i: sizes[sign] for i, sign in enumerate(signs) if sign in sizes})
    tensors = [p.detach() for p in parameters.values()]
    arguments = ([tensor for tensor, _ in inputs.values()], tensors)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # of the exporter's own doings
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        try:
            program = torch.onnx.export(
                WithParameters(module, list(parameters)).eval(),
                arguments,
                input_names=[*inputs, *parameters],
                output_names=outputs,
                dynamic_shapes=(dims, [{} for _ in tensors]),
                dynamo=True,
                verbose=False,
            )
        except torch.onnx.OnnxExporterError as error:
            why = str(error).strip().splitlines()[-1]
            raise UserError(f"--export=onnx: torch cannot export this network: {why}") from None
    model = program.model_proto
    names = [output.name for output in model.graph.output]
    return Piece(model, list(inputs), list(parameters), names)


# --------------------------------------------------------------------------------------------------
# Putting the graph together


@dataclass
class Graph:
    """A graph that grows piece by piece."""

    nodes: list = field(default_factory=list)
    constants: dict = field(default_factory=dict)  # {name: onnx.TensorProto}, small ones
    # {name: (one of the network's tensors, whether it is stored the other way)}
    weights: dict[str, tuple[Tensor, bool]] = field(default_factory=dict)
    inputs: list = field(default_factory=list)
    outputs: list = field(default_factory=list)

    def add(self, piece: Piece, kind: str, place: str, inputs: list[str],
            tensors: dict[str, Tensor], start: str, stem: str) -> list[str]:  # fmt: skip
        """Add the nodes of a piece, with `place` before their names; returns its outputs' names.
        kind: stands before the names of its constants, which all places of a kind share. inputs:
        the names of what goes in. tensors: {a parameter's name in the piece: the tensor}, which the
        file has with `stem` in place of `start`."""
        new = dict(zip(piece.inputs, inputs))
        turned = transposed_parameters(piece)
        names = {name: stem + name.removeprefix(start) for name in piece.parameters}
        new |= names
        for constant in piece.graph.initializer:
            new[constant.name] = f"{kind}{constant.name}"
            if new[constant.name] not in self.constants:
                copy = type(constant)()
                copy.CopyFrom(constant)
                copy.name = new[constant.name]
                self.constants[copy.name] = copy
        used = set()
        for node in piece.graph.node:
            if node.op_type == "Transpose" and node.input[0] in turned:
                name = f"{names[node.input[0]]}.T"  # the weight itself is stored so
                self.weights[name] = (tensors[node.input[0]], True)
                new[node.output[0]] = name
                continue
            used.update(node.input)
            self.nodes.append(renamed_node(node, new, place))
        for name in piece.parameters:
            if name in used:
                self.weights[names[name]] = (tensors[name], False)
        return [new.get(name, f"{place}{name}") for name in piece.outputs]


def renamed_node(node: Any, new: dict[str, str], place: str) -> Any:
    """A copy of a node with the names {old: new}, or else with `place` before them."""
    copy = type(node)()
    copy.CopyFrom(node)
    copy.name = f"{place}{node.name}"
    copy.ClearField("metadata_props")  # the exporter's notes of where it stood in Python
    copy.ClearField("doc_string")
    for names in (copy.input, copy.output):
        for i, name in enumerate(names):
            if name:  # an input that is left out has none
                names[i] = new.get(name, f"{place}{name}")
    return copy


def transposed_parameters(piece: Piece) -> set[str]:
    """The parameters that a piece only ever reads transposed."""
    read: dict[str, set[bool]] = {name: set() for name in piece.parameters}
    for node in piece.graph.node:
        for name in node.input:
            if name in read:
                read[name].add(node.op_type == "Transpose")
    return {name for name, ways in read.items() if ways == {True}}


def in_order(nodes: list) -> list:
    """Nodes in an order in which each comes behind those that it reads."""
    maker = {}
    for i, node in enumerate(nodes):
        maker.update(dict.fromkeys(node.output, i))
    needs = {}
    for i, node in enumerate(nodes):
        needs[i] = [maker[name] for name in node.input if name in maker]
    return [nodes[i] for i in graphlib.TopologicalSorter(needs).static_order()]


def has_cache(net: GPT) -> bool:
    """Whether a network's graph has a cache: where it writes text."""
    return net.config.causal and net.score is None


def build(net: GPT) -> tuple[Graph, Piece]:
    """(the Graph of a network on the CPU, a Piece of it, which has the exporter's versions)."""
    graph = Graph()
    was_fast = net.fast
    net.fast = False  # the formulas: what is faster for torch hides from the exporter
    try:
        x, looks, front = add_front(graph, net)
        pieces: dict[tuple, Piece] = {}
        for i, block in enumerate(net.model.layers):
            key = kind_of(block)
            if key not in pieces:
                pieces[key] = trace_layer(net, block)
            kind = f"kind.{list(pieces).index(key)}."
            x = add_layer(graph, net, i, pieces[key], kind, [x, *looks[block.pattern]])
        add_back(graph, net, x)
    finally:
        net.fast = was_fast
    share_weights(graph)
    graph.nodes = in_order(graph.nodes)
    return graph, front


def share_weights(graph: Graph) -> None:
    """Let what is stored both ways, a tied embedding, be stored once."""
    for name, (_, turned) in list(graph.weights.items()):
        plain = name.removesuffix(".T")
        if turned and plain in graph.weights:
            del graph.weights[name]
            graph.nodes.append(make_node("Transpose", [plain], name, perm=[1, 0]))


def kind_of(block: Block) -> tuple:
    """What blocks must have in common to be one trace: what they see, their parts, and the shapes
    of their parameters."""
    shapes = tuple((name, tuple(t.shape)) for name, t in tensors_of(block).items())
    parts = tuple(type(module) for module in block.children())
    return block.pattern, shapes, parts


# Sizes of the examples: none is 1, which torch.export would take for a constant, nor another's.
EXAMPLE = {"B": 2, "T": 3, "S": 5}


def example(signs: str, sizes: Sequence[int] = (), dtype: torch.dtype = torch.float32) -> tuple:
    """(A tensor of zeros, its signs) as `trace` takes it; sizes: of the dimensions with a "-"."""
    left = list(sizes)
    shape = [EXAMPLE[sign] if sign in EXAMPLE else left.pop(0) for sign in signs]
    return torch.zeros(shape, dtype=dtype), signs


def outer(net: GPT) -> dict[str, Tensor]:
    """The parameters outside of the blocks, by the names that Front and Back have for them."""
    inner = ("model.layers.", "model.mtp.", "model.encoder.")
    return {f"net.{n}": p for n, p in net.named_parameters() if not n.startswith(inner)}


def tensors_of(block: Block) -> dict[str, Tensor]:
    """A block's parameters, and the experts' biases, by the names that Layer has for them."""
    return {f"block.{n}": t for n, t in (*block.named_parameters(), *block.named_buffers())}


def add_front(graph: Graph, net: GPT) -> tuple[str, dict[Pattern, list[str]], Piece]:
    """Add what stands before the blocks: (the name of x, {Pattern: the names of what `GPT.looks`
    has for it}, the Piece)."""
    inputs = {"input_ids": example("BT", dtype=torch.long)}
    dims = {"B": "batch_size", "T": "sequence_length", "S": "total_sequence_length"}
    if has_cache(net):
        inputs["attention_mask"] = example("BS", dtype=torch.long)
        inputs["position_ids"] = example("BT", dtype=torch.long)
    else:
        inputs["attention_mask"] = example("BT", dtype=torch.long)
    for name, (_, signs) in inputs.items():
        graph.inputs.append(value_info(name, "INT64", [dims[sign] for sign in signs]))
    parts = ["cos", "sin", "mask"] if net.config.pos == "rope" else ["mask"]
    patterns = list(dict.fromkeys(net.config.patterns))
    outputs = ["x"]
    for i in range(len(patterns)):
        outputs += [f"{part}.{i}" for part in parts]
    piece = trace(Front(net), inputs, outputs, outer(net))
    x, *rest = graph.add(piece, "front.", "front.", list(inputs), outer(net), "net.", "")
    looks = {}
    for i, pattern in enumerate(patterns):
        looks[pattern] = rest[i * len(parts) : (i + 1) * len(parts)]
    return x, looks, piece


def trace_layer(net: GPT, block: Block) -> Piece:
    c = net.config
    turns = c.pos == "rope"
    inputs = {"x": example("BT-", [c.n_embd])}
    if turns:
        for name in ("cos", "sin"):
            inputs[name] = example("BT--", [1, rotary_size(c)])
    if c.pos in ("alibi", "relative"):
        inputs["mask"] = example("B-TS", [c.n_head])
    else:
        inputs["mask"] = example("B-TS", [1], torch.bool)
    for name in ("keys", "values"):
        inputs[name] = example("B-S-", [c.n_kv_head, c.head_dim])
    piece = trace(Layer(block, turns), inputs, ["y", "k", "v"], tensors_of(block))
    ask_batch_size_of_x(piece)
    return piece


def ask_batch_size_of_x(piece: Piece) -> None:
    """The exporter asks any input for the batch's size: keys and values, which are made of what
    needs that size, are the wrong ones to ask."""
    for node in piece.graph.node:
        if node.op_type == "Shape" and node.input[0] in ("keys", "values"):
            dims = {a.name: a.i for a in node.attribute}
            if dims.get("start", 0) == 0 and dims.get("end") == 1:
                node.input[0] = "x"


def add_layer(graph: Graph, net: GPT, i: int, piece: Piece, kind: str, inputs: list[str]) -> str:
    """Add block i, whose inputs have these names; returns the name of its x."""
    c = net.config
    place = f"layer.{i}."
    new = [f"{place}{name}" for name in piece.outputs[1:]]
    seen = new
    if has_cache(net):
        seen = [f"present.{i}.key", f"present.{i}.value"]
    # The keys that a block sees are made, among others, of what it makes: `in_order` sorts them.
    stem = f"model.layers.{i}."
    tensors = tensors_of(net.model.layers[i])
    x, *new = graph.add(piece, kind, place, [*inputs, *seen], tensors, "block.", stem)
    if has_cache(net):
        for name, past_name, present in zip(new, ("key", "value"), seen):
            past = f"past_key_values.{i}.{past_name}"
            graph.nodes.append(make_node("Concat", [past, name], present, axis=2))
            sizes = ["batch_size", c.n_kv_head, "past_sequence_length", c.head_dim]
            graph.inputs.append(value_info(past, "FLOAT", sizes))
            sizes[2] = "total_sequence_length"
            graph.outputs.append(value_info(present, "FLOAT", sizes))
    return x


def add_back(graph: Graph, net: GPT, x: str) -> None:
    """Add what stands behind the blocks, which reads x; the outputs' names and shapes."""
    inputs = {"x": example("BT-", [net.config.n_embd])}
    inputs["attention_mask"] = example("BT", dtype=torch.long)
    outputs = {"logits": ["batch_size", "sequence_length", net.config.vocab_size]}
    if net.score is not None and net.task == "classify":
        outputs = {"logits": ["batch_size", len(net.labels)]}
    elif net.score is not None and net.task == "tag":
        outputs = {"logits": ["batch_size", "sequence_length", len(net.labels)]}
    elif net.score is not None:
        sizes = ["batch_size", "sequence_length"]
        outputs = {"start_logits": sizes, "end_logits": sizes}
    piece = trace(Back(net), inputs, list(outputs), outer(net))
    names = graph.add(piece, "back.", "back.", [x, "attention_mask"], outer(net), "net.", "")
    for inner, name in zip(names, outputs):
        graph.nodes.append(make_node("Identity", [inner], name))
    infos = [value_info(name, "FLOAT", sizes) for name, sizes in outputs.items()]
    graph.outputs = infos + graph.outputs


def value_info(name: str, kind: str, sizes: list) -> Any:
    """A graph's input or output: its name, type and dimensions, numbers or names."""
    onnx = importlib.import_module("onnx")
    return onnx.helper.make_tensor_value_info(name, getattr(onnx.TensorProto, kind), sizes)


def make_node(kind: str, inputs: list[str], output: str, **attributes: Any) -> Any:
    """An onnx.NodeProto with one output, by which it is named."""
    onnx = importlib.import_module("onnx")
    return onnx.helper.make_node(kind, inputs, [output], name=output, **attributes)


# --------------------------------------------------------------------------------------------------
# The files


def write_onnx(net: GPT, path: Path) -> None:
    """Write a network on the CPU, in float32: the graph to path, and the weights, one after
    another, to a file of this name with _data behind it, which the graph names."""
    onnx = importlib.import_module("onnx")
    graph, piece = build(net)
    data = path.with_name(f"{path.name}_data")
    model = onnx.ModelProto(ir_version=piece.model.ir_version, producer_name="barelm")
    model.opset_import.extend(piece.model.opset_import)
    model.graph.name = "barelm"
    model.graph.node.extend(graph.nodes)
    model.graph.input.extend(graph.inputs)
    model.graph.output.extend(graph.outputs)
    model.graph.initializer.extend(graph.constants.values())
    with open(data, "wb") as file:
        for name, (tensor, turned) in graph.weights.items():
            tensor = tensor.detach().float()
            tensor = (tensor.t() if turned else tensor).contiguous()
            file.write(b"\0" * (-file.tell() % PAGE))
            model.graph.initializer.append(external(name, tensor, data.name, file.tell()))
            write_tensor(file, tensor)
    path.write_bytes(model.SerializeToString())


def external(name: str, tensor: Tensor, file: str, offset: int) -> Any:
    """The onnx.TensorProto of a float32 tensor whose bytes stand in a file from offset on."""
    onnx = importlib.import_module("onnx")
    kind = onnx.TensorProto.FLOAT
    proto = onnx.TensorProto(name=name, data_type=kind, dims=tensor.shape)
    proto.data_location = onnx.TensorProto.EXTERNAL
    places = {"location": file, "offset": offset, "length": tensor.nbytes}
    for key, value in places.items():
        proto.external_data.add(key=key, value=str(value))
    return proto


def genai_config(net: GPT, tok: Tokenizer) -> dict:
    """genai_config.json: what onnxruntime-genai's reader wants to know of a decoder's graph. Its
    tokenizer has to name an end token."""
    c = net.config
    end_id = tok.eos_ids[0]
    kind = family(c)
    if kind not in GENAI_TYPES:
        kind = "llama"  # any decoder with these inputs: the name chooses no mathematics
    decoder = {
        "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
        "filename": "model.onnx",
        "head_size": c.head_dim,
        "hidden_size": c.n_embd,
        "num_attention_heads": c.n_head,
        "num_hidden_layers": c.n_layer,
        "num_key_value_heads": c.n_kv_head,
        "inputs": {name: name for name in ("input_ids", "attention_mask", "position_ids")}
        | {"past_key_names": "past_key_values.%d.key"}
        | {"past_value_names": "past_key_values.%d.value"},
        "outputs": {"logits": "logits"}
        | {"present_key_names": "present.%d.key", "present_value_names": "present.%d.value"},
    }
    model = {
        "type": kind,
        "context_length": c.n_ctx,
        "vocab_size": c.vocab_size,
        "bos_token_id": end_id if tok.bos_id is None else tok.bos_id,
        "eos_token_id": tok.eos_ids,
        "pad_token_id": end_id if tok.pad_id is None else tok.pad_id,
        "decoder": decoder,
    }
    # Its own cache, of a fixed length, is one of another attention than a plain graph's.
    search = {"max_length": c.n_ctx, "do_sample": False, "past_present_share_buffer": False}
    return {"model": model, "search": search}
