"""The page: a template filled from the demo's metrics."""

from __future__ import annotations

from html import escape
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any


def write_page(metrics: dict[str, Any], path: Path) -> None:
    """Fill `page.html` with `metrics` (as in `metrics.json`) and write it to `path`."""
    template = Template(resources.files(__package__).joinpath("page.html").read_text(encoding="utf-8"))
    data, speed, layers = metrics["data"], metrics["throughput"], metrics["layers"]
    machine = metrics["machine"]
    grey = (
        " These images are grey, so what was learned has no colour; the faint coloured noise is weight decay, which "
        "takes a little of every weight."
    )
    values: dict[str, Any] = {
        "data_name": data["name"],
        "variant": metrics["variant"],
        "learned": f"{data['learned_from']:,}",
        "held_out": f"{data['held_out']:,}",
        "classes": data["classes"],
        "size": data["image_size"],
        "accuracy": f"{metrics['accuracy']:.1%}",
        "ten_crop": f"{metrics['ten_crop_accuracy']:.1%}",
        "seconds": f"{metrics['history']['seconds']:.0f}",
        "epochs": len(metrics["history"]["epochs"]),
        "parameters": f"{metrics['parameters']:,}",
        "shown": min(12, data["held_out"]),
        "best": min(5, data["classes"]),
        "filters": metrics["filters"],
        "filters_note": grey if data["grey"] else "",
        "device": machine["device"],
        "threads": machine["threads"],
        "bench_batch": speed["batch"],
        "bench_size": speed["image_size"],
        "bench_rounds": speed["rounds"],
        "version": metrics["version"],
        "torch": machine["torch"],
        "date": machine["date"],
    }
    texts = {name: escape(str(value)) for name, value in values.items()}
    tables = {"throughput": _throughput(speed), "layers": _layers(layers)}
    path.write_text(template.substitute(texts, **tables), encoding="utf-8")


def _throughput(speed: dict[str, Any]) -> str:
    return "\n".join(
        f"<tr><td>{escape(row['network'])}</td><td class='n'>{row['inference']:,.0f}</td>"
        f"<td class='n'>{row['training']:,.0f}</td></tr>"
        for row in speed["images_per_second"]
    )


def _layers(layers: list[dict[str, Any]]) -> str:
    lines = []
    for row in layers:
        texts = (row["name"], row["module"], row["layer"], " x ".join(map(str, row["output"][1:])))
        cells = "".join(f"<td>{escape(text)}</td>" for text in texts)
        lines.append(f"<tr>{cells}{_number(row['parameters'])}{_number(row['multiply_adds'])}</tr>")
    sums = [sum(row[name] for row in layers) for name in ("parameters", "multiply_adds")]
    lines.append(f"<tr class='total'><td colspan='4'>total</td>{_number(sums[0])}{_number(sums[1])}</tr>")
    return "\n".join(lines)


def _number(value: int) -> str:
    return f"<td class='n'>{value:,}</td>" if value else "<td class='n'></td>"
