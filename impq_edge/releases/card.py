"""The model card of a release, in the hub's form: YAML for the hub, Markdown for people."""

import re
from typing import Any

import yaml

from impq_edge.releases.gates import told_number, told_speed
from impq_edge.releases.manifest import Manifest, ReleasedFile, ReleasedModel, Taker

_MIB = 2**20


def render_card(made: Manifest) -> str:
    """Return ``README.md``: licence and base model carried over, what there is, who takes which, how to run it."""
    head = yaml.safe_dump(_front_matter(made), sort_keys=False, allow_unicode=True, width=1000)
    sections = [f"# {_plain(made.name)}", _what(made), _table(made), _takers(made), _running(made), _quality(made)]
    sections += [_gates(made), _licences(made), _provenance(made)]
    return f"---\n{head}---\n\n" + "\n\n".join(section for section in sections if section) + "\n"


def _front_matter(made: Manifest) -> dict[str, Any]:
    told = [(model.license, model.license_name, model.license_link) for model in made.models]
    found: dict[str, Any] = {}
    if told[0][0] and len(set(told)) == 1:
        keys = ("license", "license_name", "license_link")
        found = {key: value for key, value in zip(keys, told[0], strict=True) if value}
    elif any(licence for licence, *_ in told):  # several: the text below tells each
        found = {"license": "other"}
    base = list(dict.fromkeys(name for model in made.models for name in model.base_models))
    languages = list(dict.fromkeys(language for model in made.models for language in model.languages))
    if base:
        found |= {"base_model": base if len(base) > 1 else base[0], "base_model_relation": "quantized"}
    if languages:
        found["language"] = languages
    return {
        **found, "pipeline_tag": "text-generation", "library_name": "gguf", "quantized_by": "impq-edge",
        "tags": ["gguf", "llama.cpp", "quantized", "mixed-precision", "impq-edge"],
    }  # fmt: skip


def _what(made: Manifest) -> str:
    names = ", ".join(_plain(model.name) for model in made.models)
    return (
        f"Mixed-precision GGUFs of {names} for edge devices, made and measured by impq-edge "
        f"{made.versions['impq-edge']}. They load in mainline llama.cpp. Which block got how many bits was decided by "
        "measurement, within each device's memory."
    )


def _table(made: Manifest) -> str:
    lines = ["## Files", "", "| file | MiB | bits/weight | perplexity | to F16 | KL divergence | for |"]
    lines.append("|---|---:|---:|---:|---:|---:|---|")
    for file in made.files:
        measured = file.takers[0].measured
        devices = ", ".join(dict.fromkeys(taker.device for taker in file.takers))
        lines.append(
            f"| [{file.file}]({file.file}) | {file.file_bytes / _MIB:,.1f} | {file.bits_per_weight:.2f} "
            f"| {_perplexity(file)} | ×{measured.perplexity_ratio_to_f16:.4f} "
            f"| {measured.kl_divergence:.4f} ± {measured.kl_divergence_stderr:.4f} | {devices} |"
        )
    return "\n".join(lines)


def _perplexity(file: ReleasedFile) -> str:
    first = file.takers[0].measured
    if first.perplexity is None or first.perplexity_stderr is None:
        return "not finite"
    return f"{first.perplexity:.3f} ± {first.perplexity_stderr:.3f}"


def _takers(made: Manifest) -> str:
    lines = [
        "## Which device takes which",
        "",
        "| device | context | file | memory, MiB: predicted, measured | tokens/s | gates | report |",
        "|---|---:|---|---:|---:|---|---|",
    ]
    for file in made.files:
        for taker in file.takers:
            gates, speed = "passed" if taker.passed else "**failed**", " ".join(speed_told(taker))
            memory = f"{taker.predicted.memory_bytes / _MIB:,.0f}, {taker.measured.memory_bytes / _MIB:,.0f}"
            lines.append(
                f"| {_plain(taker.title)} (`{taker.device}`) | {taker.context_tokens:,} | {file.file} | {memory} "
                f"| {speed} | {gates} | {_reports(made, taker)} |"
            )
    told = "Memory is that of the process that runs the file, with the context filled."
    if not all(taker.measured.on_device for file in made.files for taker in file.takers):
        told += " Tokens/s marked “predicted” were not measured on the device, which was not reached."
    if any(taker.measured.over_ssh for file in made.files for taker in file.takers):
        told += " Those marked “over ssh” and their memory were measured on the device itself."
    return "\n".join([*lines, "", told])


def _reports(made: Manifest, taker: Taker) -> str:
    """Link what there is: the text, which the hub shows, and the page."""
    there = {output.path for output in made.outputs}
    found = [(name, f"{taker.records}/report.{kind}") for name, kind in (("text", "md"), ("page", "html"))]
    return " ".join(f"[{name}]({path})" for name, path in found if path in there)


def speed_told(taker: Taker) -> tuple[str, str]:
    """Return generated tokens per second, and where they come from."""
    if taker.measured.on_device:
        place = "measured over ssh" if taker.measured.over_ssh else "measured"
        return f"{taker.measured.generation_tok_per_s:,.1f}", place
    rate = None if taker.predicted.speeds is None else taker.predicted.speeds.generation
    if rate is None:
        return "–", "unknown"
    likely, low, high = (told_speed(v) for v in (rate.likely_tok_per_s, rate.low_tok_per_s, rate.high_tok_per_s))
    return likely, f"predicted ({low}–{high})"


def _running(made: Manifest) -> str:
    lines = ["## How to run it", "", "Download the file for the device and give it to llama.cpp:", "", "```sh"]
    for file in made.files:
        for taker in file.takers:
            lines += [f"# {_plain(taker.title)}, {taker.context_tokens:,} tokens of context", taker.run]
    return "\n".join([*lines, "```"])


def _quality(made: Manifest) -> str:
    lines = ["## For comparison", "", "| model | stored as | MiB | perplexity | KL divergence |"]
    lines.append("|---|---|---:|---:|---:|")
    for model in made.models:
        for other in model.compared:
            lines.append(
                f"| {model.name} | {other.what} | {other.file_bytes / _MIB:,.1f} | {finite(other.perplexity)} "
                f"| {other.kl_divergence:.4f} |"
            )
    text = next(i.name for i in made.inputs if i.kind == "evaluation text")
    told = f"Perplexity and KL divergence (nats per token, from F16) on {_plain(text)}; these files are not part of it."
    return "\n".join([*lines, "", told])


def finite(perplexity: float | None) -> str:
    """Return a perplexity for people."""
    return "not finite" if perplexity is None else f"{perplexity:,.3f}"


def _gates(made: Manifest) -> str:
    rows = [
        f"| {file.file} | {taker.device}, {taker.context_tokens:,} | {gate.name} | {gate.status} "
        f"| {told_number(gate.value)} | {told_number(gate.limit)} | {_plain(gate.detail)} |"
        for file in made.files
        for taker in file.takers
        for gate in taker.gates
    ]
    head = ["## Gates", "", "| file | for | gate | status | value | limit | |", "|---|---|---|---|---:|---:|---|"]
    return "\n".join([*head, *rows])


def _licences(made: Manifest) -> str:
    lines = ["## Licence and origin", ""]
    for model in made.models:
        licence = model.license_name or model.license
        link = f" ({_plain(model.license_link)})" if model.license_link else ""
        told = f"licence {_plain(licence)}{link}" if licence else "its card tells no licence"
        base = ", ".join(map(_plain, model.base_models))
        origin = f"; base model {base}" if base else ""
        at = f" at {model.commit[:12]}" if model.commit else ""
        lines.append(f"- {_plain(model.name)}{at}: {told}{origin}")
    return "\n".join(lines)


def _provenance(made: Manifest) -> str:
    runs = ", ".join(_run(model) for model in made.models)
    has_pages = any(output.path.endswith("/report.html") for output in made.outputs)
    page = "`report.html` shows all of this on one page, in a browser. " if has_pages else ""
    return (
        "## How it was made\n\n"
        f"    {_plain(made.command)}\n\n"
        f"Sensitivity was measured once a model ({runs}) and serves all of its files. {page}`manifest.json` holds the "
        "recipe, the hashes of every input and output, versions, and what was predicted and measured; "
        "`sha256sum --check SHA256SUMS` or `impq-edge verify .` checks the files, `impq-edge verify . "
        "--rebuild` the recipe."
    )


def _run(model: ReleasedModel) -> str:
    return f"{_plain(model.name)}: {model.evaluations:,} evaluations, seed {model.seed}"


def _plain(text: str) -> str:
    """Return text from an input as part of a line of Markdown, without meaning there."""
    return re.sub(r"([\\`*_\[\]<>|#])", r"\\\1", " ".join(text.split())) if re.search(r"[`\[\]<>|\\\n]", text) else text
