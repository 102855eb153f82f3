"""A thin layer on llama.cpp's C API: load, tokenise, decode, generate. CPU only.

``llama_cpp.Llama`` hides the parameters that decide an edge device's memory (``use_extra_bufts``,
``n_outputs_max``, ``load_mode``, ``swa_full``), so this goes below it. llama.cpp's log is kept in memory
instead of reaching stderr; it is one per process, because llama.cpp's is.
"""

import collections
import ctypes
import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self, get_args

import numpy as np
from llama_cpp import llama_cpp as api
from numpy.typing import NDArray

from impq_edge.errors import ValidationError
from impq_edge.ggml.cache import KvType
from impq_edge.validation.settings import RunSettings

Tokens = NDArray[np.int32]

_BF16 = 30  # GGML_TYPE_BF16 in ggml/include/ggml.h, which llama_cpp does not name
_KV_TYPES = {t: _BF16 if t == "bf16" else getattr(api, f"GGML_TYPE_{t.upper()}") for t in get_args(KvType)}
_LOG_LINES = 2_000  # a 100-block model logs a few hundred while loading
_LOG_DEBUG, _LOG_ERROR, _LOG_CONTINUED = 1, 4, 5  # ggml_log_level
_log: collections.deque[tuple[int, str]] = collections.deque(maxlen=_LOG_LINES)


def _on_log(level: int, text: bytes, _: object) -> None:
    piece = text.decode("utf-8", "replace")
    if level == _LOG_CONTINUED and _log:
        kept_level, line = _log.pop()
        _log.append((kept_level, line + piece))
    elif level > _LOG_DEBUG:
        _log.append((level, piece))


_log_callback = api.llama_log_callback(_on_log)  # kept alive as long as llama.cpp may call it


@dataclasses.dataclass(frozen=True)
class Generated:
    """What a model wrote by itself."""

    tokens: tuple[int, ...]  # without the token that ended it
    stopped: bool  # whether it ended by itself (an end-of-generation token) rather than at the limit


class Engine:
    """One model with one context; close it, or use it in a ``with`` statement.

    Parameters
    ----------
    path
        A GGUF whose header :func:`impq_edge.validation.file.read_facts` accepts.
    settings
        How to run it.

    Raises
    ------
    ValidationError
        When llama.cpp refuses the file or the settings; the sentence quotes its log.
    """

    def __init__(self, path: Path, settings: RunSettings) -> None:
        self.settings = settings
        self._model = self._context = None
        keep_log()
        _log.clear()
        api.llama_backend_init()
        self._model = api.llama_model_load_from_file(os.fsencode(path), _model_parameters(settings))
        if self._model is None:
            raise ValidationError(f"llama.cpp cannot load {path}: {_first_error()}; {_remedy()}.")
        self._vocab = api.llama_model_get_vocab(self._model)
        self.vocabulary = int(api.llama_vocab_n_tokens(self._vocab))
        self._context = api.llama_init_from_model(self._model, _context_parameters(settings))
        if self._context is None:
            self.close()
            raise ValidationError(
                f"llama.cpp cannot run {path} with {settings.context_tokens} tokens of context and a "
                f"{settings.kv_type} cache: {_first_error()}; choose a shorter context or another cache type."
            )
        self.position = 0  # tokens in memory

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Free the context and the model."""
        if self._context is not None:
            api.llama_free(self._context)
        if self._model is not None:
            api.llama_model_free(self._model)
        self._model = self._context = None

    @property
    def adds_bos(self) -> bool:
        """Whether the vocabulary wants a begin-of-sequence token before any text."""
        return bool(api.llama_vocab_get_add_bos(self._vocab))

    @property
    def bos(self) -> int:
        """The begin-of-sequence token."""
        return int(api.llama_vocab_bos(self._vocab))

    def is_end(self, token: int) -> bool:
        """Whether a token ends a generation (EOS, EOT and their kin)."""
        return bool(api.llama_vocab_is_eog(self._vocab, token))

    def special_text(self, token: int) -> str:
        """Return the text of a special token such as BOS; empty where the vocabulary has none."""
        return str(api.llama_vocab_get_text(self._vocab, token).decode()) if token >= 0 else ""

    @property
    def eos(self) -> int:
        """The end-of-sequence token, -1 where the vocabulary has none."""
        return int(api.llama_vocab_eos(self._vocab))

    @property
    def chat_template(self) -> str | None:
        """The file's default chat template, a Jinja source nobody has vouched for."""
        template = api.llama_model_chat_template(self._model, None)
        return template.decode("utf-8", "replace") if template else None

    def tokenize(self, text: str, *, add_special: bool, parse_special: bool = False) -> Tokens:
        """Return token ids, shape (tokens,).

        Parameters
        ----------
        text
            Any text.
        add_special
            Whether to add what the vocabulary wants around a text (BOS).
        parse_special
            Whether ``<|im_start|>`` and its kin in the text become their tokens; leave it off for text
            that is not a rendered chat.
        """
        data = text.encode()
        out = np.empty(len(data) + 2, np.int32)  # no tokenizer makes more tokens than bytes, plus BOS and EOS
        count = self._tokenize_into(data, out, add_special, parse_special)
        if count < 0:  # some do after all: it then tells how many it needs
            out = np.empty(-count, np.int32)
            count = self._tokenize_into(data, out, add_special, parse_special)
        return out[:count].copy()

    def _tokenize_into(self, data: bytes, out: Tokens, add_special: bool, parse_special: bool) -> int:
        pointer = out.ctypes.data_as(ctypes.POINTER(api.llama_token))
        return int(api.llama_tokenize(self._vocab, data, len(data), pointer, len(out), add_special, parse_special))

    def text(self, tokens: Sequence[int]) -> str:
        """Return the text of tokens, special ones included."""
        # Not llama_detokenize, which drops spaces before punctuation for some vocabularies.
        return b"".join(self._piece(token) for token in tokens).decode("utf-8", "replace")

    def _piece(self, token: int) -> bytes:
        size = -int(api.llama_token_to_piece(self._vocab, token, None, 0, 0, True))
        buffer = ctypes.create_string_buffer(max(size, 1))
        api.llama_token_to_piece(self._vocab, token, buffer, size, 0, True)
        return buffer.raw[: max(size, 0)]

    def clear(self) -> None:
        """Forget all tokens."""
        api.llama_memory_clear(api.llama_get_memory(self._context), True)
        self.position = 0

    def decode(self, tokens: Sequence[int] | Tokens, outputs: int = 1) -> NDArray[np.float32]:
        """Append tokens to what is in memory and wait until they are computed.

        Parameters
        ----------
        tokens
            Shape (tokens,), at most what the context still holds.
        outputs
            Logits are returned for the last ``outputs`` tokens, at most ``settings.outputs_tokens`` of
            them; each predicts the token after it.

        Returns
        -------
        Logits, shape (outputs, vocabulary).
        """
        ids = np.ascontiguousarray(tokens, np.int32)
        assert 0 <= outputs <= min(len(ids), self.settings.outputs_tokens)  # llama.cpp would abort the process
        if self.position + len(ids) > self.settings.context_tokens:
            raise ValidationError(
                f"{self.position + len(ids)} tokens do not fit the context of {self.settings.context_tokens}; "
                "choose a longer context."
            )
        wanted = np.zeros(len(ids), np.int8)
        wanted[len(ids) - outputs :] = 1
        step = self.settings.batch_tokens
        parts = [self._decode_batch(ids[at : at + step], wanted[at : at + step]) for at in range(0, len(ids), step)]
        return np.concatenate(parts) if parts else np.empty((0, self.vocabulary), np.float32)

    def _decode_batch(self, ids: Tokens, wanted: NDArray[np.int8]) -> NDArray[np.float32]:
        batch = api.llama_batch(  # no positions and no sequences: llama.cpp continues the only one
            n_tokens=len(ids),
            token=ids.ctypes.data_as(ctypes.POINTER(api.llama_token)),
            logits=wanted.ctypes.data_as(ctypes.POINTER(ctypes.c_int8)),
        )
        status = api.llama_decode(self._context, batch)
        if status != 0:
            raise ValidationError(
                f"llama.cpp failed to decode {len(ids)} tokens after {self.position} (status {status}: "
                f"{_first_error()}); choose a longer context or another cache type."
            )
        self.position += len(ids)
        api.llama_synchronize(self._context)
        rows = int(wanted.sum())
        if rows == 0:
            return np.empty((0, self.vocabulary), np.float32)
        logits = np.ctypeslib.as_array(api.llama_get_logits(self._context), shape=(rows, self.vocabulary))
        return logits.copy()  # llama.cpp overwrites its buffer with the next batch

    def generate(self, prompt: Sequence[int] | Tokens, limit_tokens: int) -> Generated:
        """Continue a prompt greedily until the model ends or ``limit_tokens`` are written."""
        logits = self.decode(prompt)
        written: list[int] = []
        while len(written) < limit_tokens:
            token = int(logits[-1].argmax())
            if self.is_end(token):
                return Generated(tuple(written), stopped=True)
            written.append(token)
            if len(written) < limit_tokens:
                logits = self.decode([token])
        return Generated(tuple(written), stopped=False)


def keep_log() -> None:
    """Keep llama.cpp's log in memory from now on."""
    api.llama_log_set(_log_callback, ctypes.c_void_p(0))


def log_lines() -> tuple[str, ...]:
    """Return what llama.cpp has logged since the last model was loaded."""
    return tuple(line.rstrip("\n") for _, line in _log)


def system_info() -> str:
    """Return the instruction sets and features llama.cpp was built with, in its own words."""
    return str(api.llama_print_system_info().decode())


def version() -> str:
    """Return the version of llama.cpp itself."""
    return str(api.llama_version().decode())


def _first_error() -> str:
    return next((line.strip() for level, line in _log if level == _LOG_ERROR), "it gives no reason")


def _remedy() -> str:
    refused = "allocate" in _first_error()
    return "free some memory or choose a smaller file" if refused else "build or download it again"


def _model_parameters(settings: RunSettings) -> Any:
    parameters = api.llama_model_default_params()
    parameters.n_gpu_layers = 0
    parameters.load_mode = api.LLAMA_LOAD_MODE_MMAP if settings.mmap else api.LLAMA_LOAD_MODE_NONE
    parameters.use_extra_bufts = settings.use_extra_bufts
    return parameters


def _context_parameters(settings: RunSettings) -> Any:
    parameters = api.llama_context_default_params()
    parameters.n_ctx = settings.context_tokens
    parameters.n_batch = settings.batch_tokens
    parameters.n_ubatch = settings.ubatch_tokens
    parameters.n_outputs_max = settings.outputs_tokens
    parameters.n_threads = parameters.n_threads_batch = settings.threads
    parameters.type_k = parameters.type_v = _KV_TYPES[settings.kv_type]
    parameters.flash_attn_type = (
        api.LLAMA_FLASH_ATTN_TYPE_ENABLED if settings.flash_attention else api.LLAMA_FLASH_ATTN_TYPE_DISABLED
    )
    parameters.swa_full = False  # the API's default keeps sliding-window layers at full size
    parameters.offload_kqv = parameters.op_offload = False
    return parameters
