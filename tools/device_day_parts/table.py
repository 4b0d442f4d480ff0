"""Formatting results.jsonl as table.md."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from device_day_parts.common import last_line, read_records


def write_table(out: Path) -> str:
    """Write table.md from results.jsonl, and return its text; parts without results have no section."""
    by_part: dict[str, list[dict[str, Any]]] = {}
    for record in read_records(out / "results.jsonl"):
        by_part.setdefault(record["part"], []).append(record)
    text = [f"Written {datetime.now(UTC):%Y-%m-%d %H:%M} UTC.", *of_parts(by_part)]
    for name, section in SECTIONS.items():
        if any("ended" not in record for record in by_part.get(name, [])):
            try:
                text += section(by_part[name])
            except Exception as error:  # incomplete records of an interrupted part; the other sections are still valid
                text += [f"## {name}", f"Not readable: {last_line(error)}"]
    page = "\n\n".join(text) + "\n"
    (out / "table.md").write_text(page)
    return page


def rows_of(head: str, rows: Iterable[Iterable[Any]]) -> str:
    """Format a Markdown table; the first column is text."""
    names = head.split(" | ")
    lines = [f"| {head} |", "|---|" + "---:|" * (len(names) - 1)]
    return "\n".join([*lines, *("| " + " | ".join(map(cell, row)) + " |" for row in rows)])


def cell(value: Any) -> str:
    """Format a value in few digits."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return str(value).replace("|", "\\|").replace("\n", " ")


def percent(value: float | None) -> str | None:
    return None if value is None else f"{100 * value:.0f} %"


def milliseconds(value: float | None) -> float | None:
    return None if value is None else 1000 * value


def of_parts(by_part: dict[str, list[dict[str, Any]]]) -> list[str]:
    rows, notes = [], []
    for name, records in by_part.items():
        for record in records:
            if "ended" in record:
                rows.append([name, record["ended"], record["seconds"]])
            if "output" in record:
                notes.append("\n".join([f"{name}, {record['ended']}:\n\n```", *record["output"], "```"]))
    return [rows_of("part | ended | seconds", rows), *notes]


def start(records: list[dict[str, Any]]) -> list[str]:
    missing = [name for record in records for name in record.get("missing", [])]
    return [f"Not installed: {', '.join(missing)}."] if missing else []


def machine(records: list[dict[str, Any]]) -> list[str]:
    text = ["## Machine"]
    for record in records:
        if record.get("what") == "versions":
            fields = {key: value for key, value in record.items() if key not in ("part", "what") and value is not None}
            text.append(rows_of("what | value", fields.items()))
    measured = [[record["what"], record["value"], record["unit"]] for record in records if "value" in record]
    return [*text, rows_of("ceiling | measured | unit", measured)]


def gpu_tests(records: list[dict[str, Any]]) -> list[str]:
    outcomes = [record for record in records if "test" in record]
    counts = {name: sum(r["outcome"] == name for r in outcomes) for name in ("passed", "failed", "skipped")}
    text = ["## Tests that need a GPU", ", ".join(f"{count} {name}" for name, count in counts.items()) + "."]
    failed = [[r["test"], " ".join(r["error"]), r["seconds"]] for r in outcomes if r["outcome"] == "failed"]
    return [*text, rows_of("failed | error | seconds", failed)] if failed else text


def fixtures(records: list[dict[str, Any]]) -> list[str]:
    text = ["## Golden tests on the device, float32", *gpu_tests(records)[1:]]
    twice = [[r["deterministic"], "yes" if r["is_equal"] else "no", r.get("error") or ", ".join(r.get("different", []))]
             for r in records if "deterministic" in r]  # fmt: skip
    if twice:
        text += ["20 steps twice, `train.deterministic`:", rows_of("recipe | bit-equal | what differs", twice)]
    bf16 = [[r["fixture"], r["bf16_median"], r["bf16_largest"], r["compared"]] for r in records if "fixture" in r]
    if bf16:
        text += ["Under bf16 autocast, |difference| / |reference| by norm:",
                 rows_of("fixture | median | largest | tensors", bf16)]  # fmt: skip
    return text


def cases(records: list[dict[str, Any]]) -> list[str]:
    found = [r for r in records if "step_seconds" in r]
    order = list(dict.fromkeys(r["case"] for r in records if "case" in r))
    found.sort(key=lambda r: order.index(r["case"]))  # each in the order of its modes
    parts = ("forward", "backward", "optimizer", "between steps")
    rows = [
        [r["case"], r["mode"], r["batch"], r["images_per_second"], percent(r.get("mfu")),
         percent(r.get("share_of_measured")), r.get("peak_gib"), milliseconds(r["step_seconds"]),
         " / ".join(cell(milliseconds(r["split_seconds"].get(part))) for part in parts), r.get("kernels"),
         milliseconds(r.get("kernel_seconds")), r["first_step_seconds"]]
        for r in found
    ]  # fmt: skip
    head = ("recipe | mode | batch | images/s | MFU | of measured peak | peak GiB | step ms | "
            "forward / backward / optimizer / between ms | kernels | kernels ms | first step s")  # fmt: skip
    text = ["## Steps", rows_of(head, rows)]
    others = [
        [r["case"], r["mode"], r["batch"], r.get("error") or r["note"]] for r in records if "error" in r or "note" in r
    ]
    if others:
        text.append(rows_of("recipe | mode | batch | what happened", others))
    broken = [[r["case"], r.get("graphs"), r["graph_breaks"]] for r in found if r.get("graph_breaks")]
    if broken:
        text.append(rows_of("compiled | graphs | graph breaks", broken))
    waits = [[f"{r['case']}, {r['mode']}", place, of["logging"], of["other"]]
             for r in found for place, of in (r.get("waits") or {}).items()]  # fmt: skip
    if any(r.get("waits") is not None for r in found):
        text.append("Waits for the device in ten steps, of which one logs" + (":" if waits else ": none."))
    if waits:
        text.append(rows_of("recipe, mode | where | in a step that logs | in the nine others", waits))
    for r in found:
        top = [[name, count, ms, percent(share)] for name, count, ms, share in r.get("top", [])]
        no_profile = f"no profile: {r.get('profile_error')}"
        text += [f"{r['case']}, {r['mode']}:", rows_of("kernel | count | ms | share", top) if top else no_profile]
    return text


def attention(records: list[dict[str, Any]]) -> list[str]:
    found = [r for r in records if "size" in r]
    kinds = list(found[0]["milliseconds"].keys() - {"errors"}) if found else []
    kinds = [kind for kind in ("default", "flash", "cudnn", "efficient", "math") if kind in kinds]
    rows = [
        [r["shape"], " x ".join(map(str, r["size"])), *(r["milliseconds"].get(kind) for kind in kinds)] for r in found
    ]
    text = ["## Attention, bf16, forward and backward, ms", rows_of(" | ".join(["shape", "size", *kinds]), rows)]
    for r in records:
        if "images" in r:
            of = r["milliseconds"]
            text.append(f"{r['shape']}, {r['images']} images: by size {cell(of['by size'])} ms, packed "
                        f"{cell(of['packed']) or 'not available'}{' ms' if of['packed'] else ''}.")  # fmt: skip
    refused: dict[tuple[str, str], list[str]] = {}
    for r in records:
        for kind, why in r.get("milliseconds", {}).get("errors", {}).items():
            refused.setdefault((kind, why), []).append(r["shape"])
    rows = [[kind, why, "; ".join(shapes)] for (kind, why), shapes in refused.items()]
    return [*text, rows_of("not available | reason | shapes", rows)] if rows else text


def loading(records: list[dict[str, Any]]) -> list[str]:
    rows = [[r["view"], r["origin"], r["workers"], r.get("batch"), r.get("images_per_second"), r.get("start_seconds"),
             r.get("lies_on") or r.get("error")] for r in records if "view" in r]  # fmt: skip
    return ["## Loader", rows_of("view | images | workers | batch | images/s | first batches s | batch lies on", rows)]


def cifar(records: list[dict[str, Any]]) -> list[str]:
    runs: dict[str, dict[str, Any]] = {}
    for record in records:
        if "recipe" in record:
            of = runs.setdefault(record["recipe"], {"scores": {}})
            for row, columns in record.get("probe", {}).items():
                of["scores"].setdefault(row, {}).update(columns)
            of |= {key: value for key, value in record.items() if key != "probe"}
    rows = [[name, r.get("origin"), r.get("steps"), r.get("epochs"), r.get("seconds"), r.get("images_per_second"),
             r.get("first_loss"), r.get("loss"), r.get("error")] for name, r in runs.items()]  # fmt: skip
    text = [
        "## CIFAR-10",
        rows_of("recipe | images | steps | epochs | seconds | images/s | first loss | loss | error", rows),
    ]
    columns = list(dict.fromkeys(column for r in runs.values() for of in r["scores"].values() for column in of))
    scores = [[f"{name}, {row}", *(of.get(column) for column in columns)]
              for name, r in runs.items() for row, of in r["scores"].items()]  # fmt: skip
    if not scores:
        return text
    images = max((r.get("images") or 0) for r in runs.values())
    return [*text, f"Top-1 accuracy (%) on {images:,} images:", rows_of(" | ".join(["encoder", *columns]), scores)]


SECTIONS = {
    "start": start, "machine": machine, "gpu_tests": gpu_tests, "fixtures": fixtures, "cases": cases,
    "attention": attention, "loading": loading, "cifar": cifar,
}  # fmt: skip
