"""Tiny random models that the real llama-server runs: a few hundred kilobytes, loaded in about 20 ms.

They have the llama architecture, random weights and a vocabulary of bytes and words, so they generate random words:
greedy responses differ by prompt and by model, and are the same each time on one machine. Generation never ends by
itself: with any sampler it runs to `max_tokens` (or the end of the context).

The same `TinyModel` gives the same file each time.

Measured with build b10434 on a small machine of two cores, one slot, `--no-warmup --fit off`:

========  =======  ========  ========
model     file     ready in  tokens/s
========  =======  ========  ========
TINY      0.6 MB   40 ms     1,100
TINY_B    1.4 MB   40 ms     750
SLOW      1.3 MB   65 ms     60
========  =======  ========  ========

TOOLS makes a call of a tool whenever the request has one, and then ends. A grammar of the server's makes the call
well-formed, and holds what it says to a JSON schema. Give it only enums and booleans: a free string does not end.

SLOW's context of 8,192 tokens thus lasts for two minutes; even on a machine ten times as fast, for twelve seconds.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

import gguf
import numpy
import numpy.typing

_ALPHABET: Final = ("ba", "de", "fi", "go", "hu", "ka", "le", "mi", "no", "pu", "ra", "se", "ti", "vo", "wu", "za")

_CONTROL_TOKENS: Final = ("<unk>", "<s>", "</s>")
_BYTE_TOKENS: Final = 256
_RANKS: Final = ("yes", "no")

# One line for each message, and the beginning of the response.
_CHAT_TEMPLATE: Final = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)

_TOOL_CALL: Final = "<tool_call>"
# The same, with the tools before it, calls in the format of Hermes, and their results.
_TOOLS_TEMPLATE: Final = (
    "{% if tools %}tools:{% for tool in tools %} {{ tool | tojson }}{% endfor %}\n{% endif %}"
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] or '' }}"
    "{% for call in message.tool_calls or [] %}"
    f'{_TOOL_CALL}{{"name": "{{{{ call.function.name }}}}", "arguments": '
    "{{ call.function.arguments | tojson }}}</tool_call>{% endfor %}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)

_Array = numpy.typing.NDArray[numpy.float32]


@dataclass(frozen=True, slots=True, kw_only=True)
class TinyModel:
    """The shape of a model. `width` is a multiple of `heads`, `heads` of `heads_kv`; `words` is at most 256.

    `title` is the name in the file, if that is not `name`.
    `pooling` "mean" makes one that serves embeddings, "rank" one that reranks. One that `calls_tools` says nothing but
    the beginning of a call, as a token of its own, and what a grammar has it say. One that `infills` has the tokens
    that mark what is before and behind a gap: three control characters.
    """

    name: str
    seed: int
    title: str | None = None
    layers: int = 2
    width: int = 64
    heads: int = 4
    heads_kv: int = 2
    feed_forward: int = 128
    words: int = 256
    ctx_train: int = 4096
    pooling: Literal["mean", "rank"] | None = None
    calls_tools: bool = False
    infills: bool = False

    @property
    def architecture(self) -> str:
        """qwen3 is llama with two more norms, and its loader takes a head for ranking."""
        return "qwen3" if self.pooling == "rank" else "llama"


TINY: Final = TinyModel(name="tiny", seed=1)
TINY_B: Final = TinyModel(name="tiny-b", seed=6, layers=3, width=96, heads=6, heads_kv=3, feed_forward=192, words=200)
# Slow because all threads have to synchronize a few times in each of its many layers, and not because of its size.
SLOW: Final = TinyModel(name="slow", seed=3, layers=40, width=32, heads=2, heads_kv=2, feed_forward=32, ctx_train=8192)
EMBEDDER: Final = TinyModel(name="embedder", seed=4, pooling="mean")
RERANKER: Final = TinyModel(name="reranker", seed=5, pooling="rank")
TOOLS: Final = TinyModel(name="tools", seed=7, calls_tools=True)
INFILL: Final = TinyModel(name="infill", seed=8, infills=True)


def write_model(model: TinyModel, folder: Path) -> Path:
    """Write the model into the folder as `<name>.gguf`; returns its path."""
    path = folder / f"{model.name}.gguf"
    writer = gguf.GGUFWriter(path, model.architecture)
    _add_metadata(writer, model)
    add_vocabulary(writer, model)
    _add_tensors(writer, model)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_metadata(writer: gguf.GGUFWriter, model: TinyModel) -> None:
    writer.add_name(model.title or model.name)
    writer.add_block_count(model.layers)
    writer.add_context_length(model.ctx_train)
    writer.add_embedding_length(model.width)
    writer.add_feed_forward_length(model.feed_forward)
    writer.add_head_count(model.heads)
    writer.add_head_count_kv(model.heads_kv)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(model.width // model.heads)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_chat_template(_TOOLS_TEMPLATE if model.calls_tools else _CHAT_TEMPLATE)
    if model.pooling is not None:
        writer.add_pooling_type(gguf.PoolingType[model.pooling.upper()])
    if model.pooling == "rank":
        writer.add_classifier_output_labels(_RANKS)
        writer.add_key_length(model.width // model.heads)
        writer.add_value_length(model.width // model.heads)


def add_vocabulary(writer: gguf.GGUFWriter, model: TinyModel) -> None:
    """A SentencePiece vocabulary: byte tokens can express any text, and the words are what is generated."""
    words = [f"\N{LOWER ONE EIGHTH BLOCK}{first}{second}" for first in _ALPHABET for second in _ALPHABET][: model.words]
    tokens = [*_CONTROL_TOKENS, *(f"<0x{byte:02X}>" for byte in range(_BYTE_TOKENS)), *words]
    kinds = [gguf.TokenType.UNKNOWN, gguf.TokenType.CONTROL, gguf.TokenType.CONTROL]
    kinds += [gguf.TokenType.BYTE] * _BYTE_TOKENS + [gguf.TokenType.NORMAL] * len(words)
    if model.calls_tools:
        tokens.append(_TOOL_CALL)
        kinds.append(gguf.TokenType.USER_DEFINED)
        # The server checks its grammar against the beginning of the answer, which has no space before it.
        writer.add_add_space_prefix(False)
    if model.infills:
        for number, mark in enumerate(("pre", "suf", "mid"), start=1):
            writer.add_uint32(f"tokenizer.ggml.fim_{mark}_token_id", len(_CONTROL_TOKENS) + number)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * len(tokens))
    writer.add_token_types(kinds)
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_vocab_size(len(tokens))


def _add_tensors(writer: gguf.GGUFWriter, model: TinyModel) -> None:
    """Random weights but for one direction of the residual stream, the first, which is 1 for every token.

    No layer writes to it, so it is positive when the output head reads it. There the rows of all tokens that are no
    words are negative: an end of text, or half a character, is out of reach of any sampler.
    """
    random = numpy.random.default_rng(model.seed)

    def weights(rows: int, columns: int) -> _Array:
        return random.normal(0.0, columns**-0.5, (rows, columns)).astype(numpy.float32)

    def silent_first(rows: int, columns: int) -> _Array:
        drawn = weights(rows, columns)
        drawn[: 2 if model.calls_tools else 1] = 0.0
        return drawn

    ones = numpy.ones(model.width, dtype=numpy.float32)
    specials = len(_CONTROL_TOKENS) + _BYTE_TOKENS
    embedding = random.normal(0.0, 1.0, (specials + model.words, model.width)).astype(numpy.float32)
    embedding[:, 0] = 1.0
    head = 4.0 * weights(specials + model.words, model.width)  # times 4: the likeliest word stands out
    head[:, 0] = 0.0
    head[:specials] = 0.0
    head[:specials, 0] = -1000.0
    if model.calls_tools:
        embedding, head = _with_tool_call(embedding, head)

    width_kv = model.width // model.heads * model.heads_kv
    writer.add_tensor("token_embd.weight", embedding)
    writer.add_tensor("output_norm.weight", ones)
    writer.add_tensor("output.weight", head)
    if model.pooling == "rank":
        writer.add_tensor("cls.output.weight", weights(len(_RANKS), model.width))
    for layer in range(model.layers):
        block = f"blk.{layer}"
        writer.add_tensor(f"{block}.attn_norm.weight", ones)
        if model.architecture == "qwen3":
            head_ones = numpy.ones(model.width // model.heads, dtype=numpy.float32)
            writer.add_tensor(f"{block}.attn_q_norm.weight", head_ones)
            writer.add_tensor(f"{block}.attn_k_norm.weight", head_ones)
        writer.add_tensor(f"{block}.attn_q.weight", weights(model.width, model.width))
        writer.add_tensor(f"{block}.attn_k.weight", weights(width_kv, model.width))
        writer.add_tensor(f"{block}.attn_v.weight", weights(width_kv, model.width))
        writer.add_tensor(f"{block}.attn_output.weight", silent_first(model.width, model.width))
        writer.add_tensor(f"{block}.ffn_norm.weight", ones)
        writer.add_tensor(f"{block}.ffn_gate.weight", weights(model.feed_forward, model.width))
        writer.add_tensor(f"{block}.ffn_up.weight", weights(model.feed_forward, model.width))
        writer.add_tensor(f"{block}.ffn_down.weight", silent_first(model.width, model.feed_forward))


def _with_tool_call(embedding: _Array, head: _Array) -> tuple[_Array, _Array]:
    """Add the token that begins a call, likelier than any other.

    A second direction that no layer writes to makes the end of the text likelier still after a ">", which ends a call.
    Of what a grammar allows, space is the last choice.
    """
    first_byte = len(_CONTROL_TOKENS)
    embedding = numpy.vstack([embedding, embedding[-1:]])
    embedding[:, 1] = 0.0
    embedding[first_byte + ord(">"), 1] = 1.0
    head = numpy.vstack([head, numpy.zeros_like(head[:1])])
    head[:, 1] = 0.0
    head[-1, 0] = 1000.0
    head[_CONTROL_TOKENS.index("</s>"), 1] = 3000.0
    for space in " \t\n":
        head[first_byte + ord(space), 0] = -2000.0
    return embedding, head
