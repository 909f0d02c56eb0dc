"""A real engine on this machine: llama.cpp's server (package ``xllamacpp``) on a tiny model with random weights.

The model is written here, with package ``gguf``, into the user's cache: nothing is downloaded. What it says is noise; that it
batches continuously, caches prefixes and takes its time as an engine does is real. Its vocabulary is every pair of printable
ASCII characters, so a prompt of n such characters is n/2 tokens whatever it says, and its answers are lower-case letters.

Run as ``python -m stack.llama --config JSON`` (``stack.replica.ReplicaConfig``); prints ``{"port":..,"pid":..}`` when it listens.
"""

from __future__ import annotations

import os
import signal
import string
from pathlib import Path
from typing import Final, NamedTuple
from urllib.parse import urlsplit

import numpy as np
import xxhash

from replay.errors import InputError
from replay.hardware import FleetSpec
from stack.child import announce, follow_parent
from stack.replica import ReplicaConfig

MODEL_NAME: Final = "tidegauge-tiny-random"
SLOTS_MAX: Final = 16  # requests in the batch: llama.cpp reserves a whole context for each
HTTP_THREADS: Final = 256  # one is held by every client that waits or streams, and probes need one too


class Shape(NamedTuple):
    """Hyperparameters; the file's name is a hash of them, so a change writes a new file."""

    layers: int = 2
    width: int = 128
    heads: int = 4
    feed_forward: int = 256
    context: int = 8192  # a slot; 8 MiB of KV cache
    seed: int = 1
    layout: int = 1  # raise it when the way the file is written changes


# Token types of llama.cpp's vocabulary.
NORMAL, UNKNOWN, CONTROL, BYTE = 1, 2, 3, 6
END: Final = "</s>"
SPECIALS: Final = ("<unk>", "<s>", END)
PRINTABLE: Final = tuple(chr(code) for code in range(32, 127))
SPOKEN: Final = frozenset(string.ascii_lowercase + " ")  # what its answers are made of
MUTE: Final = -100.0  # logit of what it never says: control tokens, and bytes that may be no UTF-8


def vocabulary() -> tuple[list[str], list[int], list[float]]:
    """Tokens, their types and scores (SentencePiece; the best score merges first, then the leftmost)."""
    single = [char.replace(" ", "\u2581") for char in PRINTABLE]
    pairs = [left + right for left in single for right in single]
    tokens = [*SPECIALS, *(f"<0x{byte:02X}>" for byte in range(256)), *single, *pairs]
    types = [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256, *[NORMAL] * (len(single) + len(pairs))]
    scores = [0.0] * (len(SPECIALS) + 256) + [-2.0] * len(single) + [-1.0] * len(pairs)
    return tokens, types, scores


def cached_model(shape: Shape | None = None) -> Path:
    """The model's file, written where it is not there yet: a few MB under ``$XDG_CACHE_HOME/tidegauge``."""
    shape = shape or Shape()
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    path = home / "tidegauge" / f"tiny-{xxhash.xxh3_64_hexdigest(repr(shape).encode())}.gguf"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = path.with_suffix(f".{os.getpid()}")  # replicas start side by side: the last one to rename wins
        write_model(scratch, shape)
        scratch.rename(path)
    return path


def write_model(path: Path, shape: Shape) -> None:
    """A Llama with random weights as GGUF; the same bytes for the same shape."""
    import gguf

    tokens, types, scores = vocabulary()
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name(MODEL_NAME)
    writer.add_context_length(shape.context)
    writer.add_embedding_length(shape.width)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.feed_forward)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.heads)
    writer.add_rope_dimension_count(shape.width // shape.heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_scores(scores)
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    for add in (writer.add_add_bos_token, writer.add_add_eos_token, writer.add_add_space_prefix):
        add(False)  # the prompt's tokens are the text's and nothing else
    writer.add_chat_template("{% for message in messages %}{{ message['content'] }}{% endfor %}")
    for name, tensor in _weights(shape, tokens).items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _weights(shape: Shape, tokens: list[str]) -> dict[str, np.ndarray]:
    rng, width = np.random.default_rng(shape.seed), shape.width

    def random(*size: int, scale: float) -> np.ndarray:
        return rng.standard_normal(size).astype(np.float32) * np.float32(scale)

    # Dimension 0 is large and positive in every embedding and survives the layers, so the output's column 0 is a bias: with
    # it only spoken tokens (and now and then the end of the answer) are ever sampled.
    embedding = random(len(tokens), width, scale=1.0)
    embedding[:, 0] = np.sqrt(width)
    output = random(len(tokens), width, scale=0.2)
    spoken = [token == END or SPOKEN.issuperset(token.replace("\u2581", " ")) for token in tokens]
    output[:, 0] = np.where(spoken, 0.0, MUTE)
    weights = {"token_embd.weight": embedding.astype(np.float16), "output.weight": output.astype(np.float16)}
    weights["output_norm.weight"] = np.ones(width, np.float32)
    for layer in range(shape.layers):
        for norm in ("attn_norm", "ffn_norm"):
            weights[f"blk.{layer}.{norm}.weight"] = np.ones(width, np.float32)
        for projection in ("attn_q", "attn_k", "attn_v", "attn_output"):
            weights[f"blk.{layer}.{projection}.weight"] = random(width, width, scale=0.05)
        weights[f"blk.{layer}.ffn_gate.weight"] = random(shape.feed_forward, width, scale=0.05)
        weights[f"blk.{layer}.ffn_up.weight"] = random(shape.feed_forward, width, scale=0.05)
        weights[f"blk.{layer}.ffn_down.weight"] = random(width, shape.feed_forward, scale=0.05)
    return weights


def start_server(spec: FleetSpec, host: str, port: int) -> tuple[object, int]:
    """llama.cpp's HTTP server in threads of this process, and its port. Slots: ``max_num_seqs``, at most ``SLOTS_MAX``."""
    try:
        import xllamacpp
    except ImportError as error:
        raise InputError("xllamacpp is not installed", where="fleet.kind llama", fix="pip install 'tidegauge[llama]'") from error
    shape = Shape()
    params = xllamacpp.CommonParams()
    params.model.path = str(cached_model(shape))
    params.model_alias = {MODEL_NAME}  # whatever name a request asks for, it gets this one
    params.hostnames, params.port = [host], port
    params.n_parallel = min(spec.max_num_seqs, SLOTS_MAX)
    params.n_ctx = shape.context * params.n_parallel
    params.n_batch = max(spec.token_budget, params.n_parallel)
    params.n_ubatch = min(params.n_batch, 512)  # llama.cpp's default
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1  # a core a replica, and no threads that spin for each other
    params.n_threads_http = HTTP_THREADS
    params.cache_ram_mib = 0  # prefixes are cached in the slots, as in an engine, not in 8 GB of host memory beside them
    params.endpoint_metrics, params.ui, params.fit_params = True, False, False
    server = xllamacpp.Server(params)
    return server, urlsplit(server.listening_address).port or port


def main() -> None:
    config, spec = ReplicaConfig.from_command_line("stack.llama")
    if config.follow_parent:
        follow_parent()
    server, port = start_server(spec, config.host, config.port)  # bound to a name: it lives as long as this frame
    announce(port)
    while server:  # SIGTERM ends the process where it stands: whoever sends it has drained the replica before
        signal.pause()


if __name__ == "__main__":
    main()
