"""What the child process measures: plain values that travel as JSON. Imports nothing heavy, on either side."""

import dataclasses
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

if TYPE_CHECKING:
    import pydantic


@dataclasses.dataclass(frozen=True)
class Score:
    """The perplexity of a file on a text."""

    # A plain dict with the values of records.STRICT, as in RunSettings.
    __pydantic_config__: ClassVar["pydantic.ConfigDict"] = {"extra": "forbid", "allow_inf_nan": False}

    perplexity: float | None  # None: a window's loss is not finite
    stderr: float | None  # one standard error of the perplexity, tokens taken as independent
    scored_tokens: int
    window_nlls: tuple[float, ...]  # mean NLL of each window in nats per token, up to the first that is not finite

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Self:
        """Rebuild it on the other side."""
        return cls(**{**data, "window_nlls": tuple(data["window_nlls"])})


@dataclasses.dataclass(frozen=True)
class Divergence:
    """How far a file's predictions are from a reference's, token by token; KLD in nats, probabilities as shares."""

    # A plain dict with the values of records.STRICT, as in RunSettings.
    __pydantic_config__: ClassVar["pydantic.ConfigDict"] = {"extra": "forbid", "allow_inf_nan": False}

    tokens: int  # scored
    kld_mean: float  # Σ p (ln p − ln q), p the reference's and q the file's probabilities
    kld_stderr: float  # of the mean, tokens taken as independent; so are all errors here
    kld_median: float
    kld_p99: float
    kld_max: float
    delta_p_mean: float  # of the text's own tokens: q − p
    delta_p_stderr: float
    delta_p_rms: float
    delta_p_rms_stderr: float
    same_top: float  # share of tokens for which both find the same token likeliest
    same_top_stderr: float
    perplexity_ratio: float  # the file's over the reference's
    perplexity_ratio_stderr: float  # of paired losses, so far smaller than those of both perplexities
    reference_perplexity: float
    reference_perplexity_stderr: float
    window_klds: tuple[float, ...]  # mean KLD of each window: compare files pair by pair
    reference_window_nlls: tuple[float, ...]  # mean NLL of each window in nats per token

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Self:
        """Rebuild it on the other side."""
        lists = ("window_klds", "reference_window_nlls")
        return cls(**{**data, **{name: tuple(data[name]) for name in lists}})


@dataclasses.dataclass(frozen=True)
class Speed:
    """Tokens per second over some repetitions."""

    tokens: int  # per repetition
    mean_tok_per_s: float
    sd_tok_per_s: float


@dataclasses.dataclass(frozen=True)
class Times:
    """Seconds of each repetition, of all its tokens together."""

    # A plain dict with the values of records.STRICT, as in RunSettings.
    __pydantic_config__: ClassVar["pydantic.ConfigDict"] = {"extra": "forbid", "allow_inf_nan": False}

    prompt_s: tuple[float, ...]
    generation_s: tuple[float, ...]  # from an empty context
    later_s: tuple[float, ...]  # after the prompt; empty where that was not asked for

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Self:
        """Rebuild it on the other side."""
        return cls(**{name: tuple(values) for name, values in data.items()})


@dataclasses.dataclass(frozen=True)
class ChatTrial:
    """One answer through the chat template."""

    text: str | None  # the answer; None: nothing was asked
    stopped: bool | None  # whether the model ended it by itself; None: nothing could be asked
    tokens: int  # of the answer
    reason: str  # why nothing was asked, or what the template raised; empty otherwise


@dataclasses.dataclass(frozen=True)
class Run:
    """A file run as the device would run it."""

    load_s: float
    prompt: Speed
    generation: Speed
    continuation: str
    chat: ChatTrial
    filled_tokens: int  # held by the context when the memory was read
    process_bytes: int  # of the process before it loaded the model
    peak_rss_bytes: int
    anonymous_bytes: int | None  # at the end; None: unknown on this system

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Self:
        """Rebuild it on the other side."""
        parts = {"prompt": Speed(**data["prompt"]), "generation": Speed(**data["generation"])}
        return cls(**{**data, **parts, "chat": ChatTrial(**data["chat"])})


@dataclasses.dataclass(frozen=True)
class Build:
    """Which llama.cpp this is."""

    llama_cpp: str
    llama_cpp_python: str
    system_info: str  # features and instruction sets, in its own words


@dataclasses.dataclass(frozen=True)
class MemoryLimit:
    """How much memory the process that runs the model may hold, and what holds it to that."""

    # A plain dict with the values of records.STRICT, as in RunSettings.
    __pydantic_config__: ClassVar["pydantic.ConfigDict"] = {"extra": "forbid", "allow_inf_nan": False}

    limit_bytes: int
    method: Literal["cgroup v2", "cgroup v1", "data limit and polling", "not limited here"]
