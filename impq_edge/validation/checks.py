"""What is demanded of a measured file: pure functions of the measurements and the device."""

from impq_edge.devices.profile import DeviceProfile
from impq_edge.validation.report import Check, Status
from impq_edge.validation.results import ChatTrial, Divergence, Run, Score

_NO_DEVICE = "no device profile was given"
_MIB = 2**20


def check_all(
    run: Run, score: Score, file_bytes: int, context_tokens: int, device: DeviceProfile | None, here: bool
) -> tuple[Check, ...]:
    """Judge the results of the child processes.

    Parameters
    ----------
    run, score
        What was measured.
    file_bytes
        The size of the file.
    context_tokens
        The context of the device run.
    device
        Whose limits hold; None: none do.
    here
        Whether this machine is that device, so that its speed means anything.
    """
    least_prompt = device.min_prompt_tok_per_s if device else None
    least_generation = device.min_generation_tok_per_s if device else None
    return (
        Check("loads", "passed", run.load_s, None, f"llama.cpp loads it in {run.load_s:.1f} s"),
        _perplexity(score),
        _file_size(file_bytes, device),
        _memory(run, context_tokens, device),
        _speed("prompt_speed", run.prompt.mean_tok_per_s, least_prompt, device, here),
        _speed("generation_speed", run.generation.mean_tok_per_s, least_generation, device, here),
        _chat(run.chat),
    )


def _perplexity(score: Score) -> Check:
    if score.perplexity is None:
        detail = f"not finite in window {len(score.window_nlls) + 1}; the file holds broken weights"
        return Check("perplexity", "failed", None, None, detail)
    return Check("perplexity", "passed", score.perplexity, None, f"finite on {len(score.window_nlls)} windows")


def check_divergence(divergence: Divergence | None, reference: str) -> Check:
    """Judge the comparison with a reference, which sets no limit: it only must be possible."""
    if divergence is None:
        return Check("divergence", "failed", None, None, f"from {reference} it is not finite")
    detail = f"{divergence.kld_mean:.5f} ± {divergence.kld_stderr:.5f} nats per token from {reference}"
    return Check("divergence", "passed", divergence.kld_mean, None, detail)


def _file_size(file_bytes: int, device: DeviceProfile | None) -> Check:
    limit = device.max_file_bytes if device else None
    if limit is None:
        return Check("file_size", "not_checked", file_bytes, None, _unlimited(device))
    status: Status = "passed" if file_bytes <= limit else "failed"
    return Check("file_size", status, file_bytes, limit, f"{file_bytes:,} of at most {limit:,} bytes")


def _memory(run: Run, context_tokens: int, device: DeviceProfile | None) -> Check:
    peak, filled = run.peak_rss_bytes, run.filled_tokens
    if device is None:
        return Check("memory", "not_checked", peak, None, _NO_DEVICE)
    limit = device.memory_bytes - device.system_reserve_bytes
    detail = f"{peak / _MIB:.0f} of {limit / _MIB:.0f} MiB with {filled} of {context_tokens} tokens in the context"
    status: Status = "failed" if peak > limit else "passed"
    if status == "passed" and filled < context_tokens:
        status = "not_checked"
        detail += ", all that the time allowed; allow more to fill it, or choose a shorter context"
    return Check("memory", status, peak, limit, detail)


def _speed(name: str, value: float, limit: float | None, device: DeviceProfile | None, here: bool) -> Check:
    if limit is None:
        return Check(name, "not_checked", value, None, _unlimited(device))
    if not here:
        return Check(name, "not_checked", value, limit, "this machine is not that device; validate on it")
    detail = f"{value:.1f} tok/s of at least {limit:g}"
    return Check(name, "passed" if value >= limit else "failed", value, limit, detail)


def _unlimited(device: DeviceProfile | None) -> str:
    return "the device sets no limit" if device else _NO_DEVICE


def _chat(chat: ChatTrial) -> Check:
    if chat.stopped is None:
        return Check("chat_stops", "not_checked", None, None, chat.reason)
    if chat.stopped:
        return Check("chat_stops", "passed", chat.tokens, None, f"it ended its answer after {chat.tokens} tokens")
    detail = chat.reason or f"it was still writing after {chat.tokens} tokens"
    return Check("chat_stops", "failed", chat.tokens, None, detail)
