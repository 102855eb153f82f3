import dataclasses
import json
import math
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

import impq_edge
from impq_edge.conversion.encoder import EncodeOptions
from impq_edge.data import data_path
from impq_edge.errors import RecordError, ValidationError
from impq_edge.validation.divergence import Compared, compare_tokens, measure_divergence, summarise_divergence
from impq_edge.validation.llama import Engine
from impq_edge.validation.perplexity import CHUNK_TOKENS, measure_perplexity
from impq_edge.validation.report import ValidationReport
from impq_edge.validation.settings import RunSettings
from impq_edge.validation.validate import compare, request_sha256, validate

RTN = EncodeOptions("rtn")

SETTINGS = RunSettings(context_tokens=512, threads=1, batch_tokens=256, ubatch_tokens=256, outputs_tokens=256)
WINDOWS = 2


@pytest.fixture(scope="module")
def text() -> str:
    return data_path("demo", "evaluation.txt").read_text("utf-8")


@pytest.fixture(scope="module")
def files(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The demo model as F16 and with every block at 2 bit."""
    root = tmp_path_factory.mktemp("divergence")
    for kind in ("f16", "q2_k"):
        impq_edge.convert(str(demo), encode=RTN, type=kind, out=root / f"{kind}.gguf")
    return {kind: root / f"{kind}.gguf" for kind in ("f16", "q2_k")}


@pytest.fixture(scope="module")
def engines(files: dict[str, Path]) -> Iterator[tuple[Engine, Engine]]:
    """The file and its reference."""
    with Engine(files["q2_k"], SETTINGS) as engine, Engine(files["f16"], SETTINGS) as reference:
        yield engine, reference


def softmax(logits: np.ndarray) -> np.ndarray:
    exact = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True))
    return exact / exact.sum(axis=1, keepdims=True)


def full_probabilities(engine: Engine, window: np.ndarray) -> np.ndarray:
    inputs = window.copy()
    inputs[0] = engine.bos
    engine.clear()
    engine.decode(inputs[:256])
    # In the same steps: batches of other lengths round differently, and KLD shows it (0.3 %).
    parts = [engine.decode(inputs[at : min(at + CHUNK_TOKENS, 511)], outputs=min(CHUNK_TOKENS, 511 - at))
             for at in range(256, 511, CHUNK_TOKENS)]  # fmt: skip
    return softmax(np.concatenate(parts))


def test_it_is_that_of_the_full_logits(engines: tuple[Engine, Engine], text: str) -> None:
    engine, reference = engines
    score, found = measure_divergence(engine, reference, text, WINDOWS)
    assert found is not None
    tokens = engine.tokenize(text[:20_000], add_special=True)[: WINDOWS * 512].reshape(WINDOWS, 512)
    q, p = (np.stack([full_probabilities(e, window) for window in tokens]) for e in engines)
    kld = (p * np.log(p / q)).sum(axis=2)
    assert found.window_klds == pytest.approx(kld.mean(axis=1), rel=1e-4)
    n = kld.size
    assert found.tokens == score.scored_tokens == n == WINDOWS * 255
    assert found.kld_mean == pytest.approx(kld.mean(), rel=1e-4) and found.kld_mean > 0.05
    assert found.kld_stderr == pytest.approx(kld.std(ddof=1) / math.sqrt(n), rel=1e-3)
    assert found.kld_median == pytest.approx(np.median(kld), rel=1e-3)
    assert found.kld_p99 == pytest.approx(np.quantile(kld, 0.99), rel=1e-3)
    assert found.kld_max == pytest.approx(kld.max(), rel=1e-3)
    same = q.argmax(axis=2) == p.argmax(axis=2)
    assert found.same_top == pytest.approx(same.mean())
    assert found.same_top_stderr == pytest.approx(same.std(ddof=1) / math.sqrt(n))
    at = np.indices((WINDOWS, 255))
    mine, theirs = q[*at, tokens[:, 257:]], p[*at, tokens[:, 257:]]
    delta = mine - theirs
    assert found.delta_p_mean == pytest.approx(delta.mean(), rel=1e-3)
    assert found.delta_p_stderr == pytest.approx(delta.std(ddof=1) / math.sqrt(n), rel=1e-3)
    assert found.delta_p_rms == pytest.approx(math.sqrt((delta**2).mean()), rel=1e-3)
    assert found.delta_p_rms_stderr == pytest.approx(
        (delta**2).std(ddof=1) / math.sqrt(n) / 2 / found.delta_p_rms, rel=1e-3
    )
    ratio = np.log(theirs / mine)
    assert found.perplexity_ratio == pytest.approx(math.exp(ratio.mean()), rel=1e-4)
    assert found.perplexity_ratio_stderr == pytest.approx(
        math.exp(ratio.mean()) * ratio.std(ddof=1) / math.sqrt(n), rel=1e-3
    )


def test_both_perplexities_are_those_of_each_file_alone(engines: tuple[Engine, Engine], text: str) -> None:
    engine, reference = engines
    score, found = measure_divergence(engine, reference, text, WINDOWS)
    assert found is not None
    assert score == measure_perplexity(engine, text, WINDOWS)
    alone = measure_perplexity(reference, text, WINDOWS)
    assert (found.reference_perplexity, found.reference_perplexity_stderr) == (alone.perplexity, alone.stderr)
    assert found.reference_window_nlls == alone.window_nlls
    assert score.perplexity is not None
    assert found.perplexity_ratio == pytest.approx(score.perplexity / found.reference_perplexity)


def test_a_file_does_not_diverge_from_itself(files: dict[str, Path], text: str) -> None:
    with Engine(files["q2_k"], SETTINGS) as engine, Engine(files["q2_k"], SETTINGS) as other:
        _, found = measure_divergence(engine, other, text, WINDOWS)
    assert found is not None
    unchanged = dataclasses.asdict(found)
    for name in ("tokens", "reference_perplexity", "reference_perplexity_stderr", "reference_window_nlls"):
        del unchanged[name]
    assert unchanged.pop("same_top") == unchanged.pop("perplexity_ratio") == 1
    assert unchanged.pop("window_klds") == (0.0,) * WINDOWS
    assert set(unchanged.values()) == {0.0}


def test_two_coins() -> None:
    p, q = 0.75, 0.5
    logits = np.log(np.array([[q, 1 - q], [p, 1 - p]], np.float32))
    reference = np.log(np.array([[p, 1 - p], [q, 1 - q]], np.float32)) + 7
    found = compare_tokens(logits, reference, np.array([0, 1], np.int32))
    assert found.kld == pytest.approx([
        p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q)),
        q * math.log(q / p) + (1 - q) * math.log((1 - q) / (1 - p)),
    ], abs=1e-7)  # fmt: skip
    assert found.nll == pytest.approx([-math.log(q), -math.log(1 - p)], abs=1e-6)
    assert found.reference_nll == pytest.approx([-math.log(p), -math.log(1 - q)], abs=1e-6)
    assert found.same_top.tolist() == [True, True]


def test_it_adds_up_over_independent_parts() -> None:
    """KL of products is the sum of KLs, the property that ln(p/q) has and other distances lack."""
    rng = np.random.default_rng(0)
    a, b, c, d = (rng.normal(size=n).astype(np.float32) for n in (5, 5, 7, 7))

    def kld(file: np.ndarray, reference: np.ndarray) -> float:
        return float(compare_tokens(file[None].copy(), reference[None].copy(), np.zeros(1, np.int32)).kld[0])

    joint = kld((a[:, None] + c).reshape(-1), (b[:, None] + d).reshape(-1))
    assert joint == pytest.approx(kld(a, b) + kld(c, d), rel=1e-5)


def test_huge_and_impossible_logits() -> None:
    def kld(file: list[float], reference: list[float]) -> float:
        rows = (np.array([values], np.float32) for values in (file, reference))
        with np.errstate(invalid="ignore"):
            return float(compare_tokens(*rows, np.zeros(1, np.int32)).kld[0])

    assert kld([3e38, 0.0], [3e38, 1.0]) == 0.0
    assert kld([0.0, 400.0], [400.0, 0.0]) == pytest.approx(400)
    assert kld([1.0, -math.inf], [1.0, -math.inf]) == 0.0  # both rule the token out
    assert kld([1.0, 1.0], [1.0, -math.inf]) == pytest.approx(math.log(2))
    assert kld([1.0, -math.inf], [1.0, 1.0]) == math.inf
    assert math.isnan(kld([math.nan, 1.0], [1.0, 1.0]))


def test_windows_average_to_the_whole() -> None:
    rng = np.random.default_rng(1)
    parts = [Compared(*rng.random((3, 255)), rng.random(255) > 0.5) for _ in range(4)]
    found = summarise_divergence(parts)
    assert found.kld_mean == pytest.approx(np.mean(found.window_klds))
    assert found.tokens == 4 * 255


def test_memory_does_not_grow_with_the_text(engines: tuple[Engine, Engine], text: str) -> None:
    def peak_bytes(windows: int) -> int:
        tracemalloc.start()
        measure_divergence(*engines, text, windows)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return peak

    one_window_of_logits = 255 * engines[0].vocabulary * 4
    assert peak_bytes(4) < peak_bytes(1) + one_window_of_logits / 8


def test_another_vocabulary_is_one_sentence(tiny_ggufs: dict[str, Path], text: str, files: dict[str, Path]) -> None:
    with Engine(files["q2_k"], SETTINGS) as engine, Engine(tiny_ggufs["qwen3"], SETTINGS) as other:
        with pytest.raises(ValidationError, match="tokenise the text differently; pass the F16 of the same model"):
            measure_divergence(engine, other, text, 1)
        engine.vocabulary += 1
        with pytest.raises(ValidationError, match="vocabulary of 8193 tokens and the reference one of 8192"):
            measure_divergence(engine, other, text, 1)


def broken(path: Path, out: Path) -> Path:
    """Floats only: the integers that K-quants round NaN to are finite again."""
    from impq_edge.validation.file import read_facts

    norm = next(t for t in read_facts(path).tensors if t.name == "output_norm.weight")
    data = bytearray(path.read_bytes())
    data[norm.offset_bytes : norm.offset_bytes + 4] = np.float32(np.nan).tobytes()
    out.write_bytes(data)
    return out


def test_weights_that_are_not_finite(files: dict[str, Path], tmp_path: Path, text: str) -> None:
    path = broken(files["f16"], tmp_path / "broken.gguf")
    with Engine(path, SETTINGS) as engine, Engine(files["q2_k"], SETTINGS) as sound:
        score, found = measure_divergence(engine, sound, text, 1)
        assert (score.perplexity, found) == (None, None)
        with pytest.raises(ValidationError, match="The reference's loss is not finite in window 1"):
            measure_divergence(sound, engine, text, 1)
    with pytest.raises(ValidationError, match=r"predictions of .*broken\.gguf are not finite"):
        compare(path, files["q2_k"], windows=1, threads=1)


QUICK = {"windows": 1, "generated_tokens": 4, "repetitions": 1, "context_tokens": 64, "threads": 1}


@pytest.fixture(scope="module")
def report(files: dict[str, Path]) -> ValidationReport:
    return validate(files["q2_k"], reference=files["f16"], **QUICK)


def test_a_report_tells_of_the_reference_and_survives_the_disk(
    report: ValidationReport, files: dict[str, Path], tmp_path: Path
) -> None:
    score, found = compare(files["q2_k"], files["f16"], windows=1, threads=1)
    assert report.divergence == found and (report.perplexity, report.window_nlls) == (
        score.perplexity,
        score.window_nlls,
    )
    assert report.passed and report.reference == "f16.gguf"
    assert {check.name: check.value for check in report.checks}["divergence"] == found.kld_mean
    report.save(tmp_path / "report.json")
    assert ValidationReport.load(tmp_path / "report.json") == report
    data = json.loads((tmp_path / "report.json").read_text())
    assert data["divergence"]["kld_mean"] == found.kld_mean
    for name in ("reference", "reference_sha256", "divergence"):  # as before there were references
        del data[name]
    (tmp_path / "older.json").write_text(json.dumps(data))
    assert ValidationReport.load(tmp_path / "older.json").divergence is None
    data["divergence"] = {"kld_mean": 0.1}
    (tmp_path / "forged.json").write_text(json.dumps(data))
    with pytest.raises(RecordError, match="divergence"):
        ValidationReport.load(tmp_path / "forged.json")


def test_a_reference_changes_nothing_else_that_does_not_depend_on_time(
    report: ValidationReport, files: dict[str, Path]
) -> None:
    alone = validate(files["q2_k"], **QUICK)
    assert (alone.reference, alone.reference_sha256, alone.divergence) == (None, None, None)
    for name in ("perplexity", "perplexity_stderr", "window_nlls", "sha256", "generated_text", "settings"):
        assert getattr(alone, name) == getattr(report, name)
    assert alone.request_sha256 != report.request_sha256
    text = data_path("demo", "evaluation.txt")
    same = {"windows": 1, "context_tokens": 64, "kv_type": None, "fill_s": 300.0}
    assert request_sha256(None, text, **same) == alone.request_sha256  # type: ignore[arg-type]


def test_a_broken_file_fails_its_check(files: dict[str, Path], tmp_path: Path) -> None:
    found = validate(broken(files["f16"], tmp_path / "broken.gguf"), reference=files["f16"], **QUICK)
    failed = {check.name: check.detail for check in found.checks if check.status == "failed"}
    assert failed.keys() >= {"perplexity", "divergence"} and not found.passed
    assert failed["divergence"] == "from f16.gguf it is not finite"


def test_a_reference_is_refused_before_anything_runs(
    files: dict[str, Path], tmp_path: Path, tiny_ggufs: dict[str, Path]
) -> None:
    heard: list[str] = []

    def refused(reference: Path, said: str) -> None:
        with pytest.raises(ValidationError, match=said):
            validate(files["q2_k"], reference=reference, **QUICK, progress=lambda stage, *_: heard.append(stage))

    refused(tmp_path / "none.gguf", "does not exist")
    assert not heard
    refused(tiny_ggufs["qwen3"], "tokenise the text differently")
    assert set(heard) == {"hash"}


def test_progress_is_told(files: dict[str, Path]) -> None:
    heard: list[tuple[str, int, int]] = []
    compare(files["q2_k"], files["f16"], windows=2, threads=1, progress=lambda *step: heard.append(step))
    assert heard == [("divergence", 1, 2), ("divergence", 2, 2)]


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma2"])
def test_more_bits_diverge_less(trained: Callable[[str], Path], tmp_path: Path, architecture: str) -> None:
    means = []
    for kind in ("f16", "q8_0", "q4_k", "q2_k"):
        impq_edge.convert(str(trained(architecture)), encode=RTN, type=kind, out=tmp_path / f"{kind}.gguf")
        means.append(compare(tmp_path / f"{kind}.gguf", tmp_path / "f16.gguf", windows=8)[1].kld_mean)
    assert means[0] == 0
    assert means == sorted(means)
