"""What an exported folder says of itself"""

from typing import Any

from sakd_cli.documents.table import Export
from sakd_cli.export.formats import Form
from sakd_cli.models.artifact import NetworkCard


def model_card(card: NetworkCard, facts: dict[str, Any], form: Form, document: Export) -> str:
    """README.md of an export: what it is, the lines that load it, and what was checked.

    facts  metrics and teacher, as `config.json` has them
    """
    check = document.check
    side, teacher, latency = card.side, facts.get("teacher"), document.latency
    inside = document.input == "pixels"
    kind = "images of its test set" if check.real else "images of noise"
    rows = [
        f"# {card.architecture} on {card.dataset}, {document.format}",
        "",
        f"An image classifier for {len(card.classes)} classes of RGB images of {side}x{side} pixels.",
    ]
    if facts.get("top1") is not None:
        rows.append(f"Top-1 on {facts.get('images') or 'its'} test images: {facts['top1']:.2f} %.")
    if "unfinished" in facts:
        rows.append(f"From a training that was not finished ({facts['unfinished']}).")
    if teacher is not None:
        rows.append(f"It learned from {teacher['network']}, SHA-256 `{teacher['sha256']}`.")
    takes = "pixel values between 0 and 1, and normalises them itself" if inside else "normalised pixel values"
    rows += [
        "",
        f"`{form.file}` takes {takes}; `config.json` has the class names in the order of the logits. In this folder:",
        "",
        "```python",
        form.lines(card, inside),
        "```",
        "",
        f"- {document.bytes} bytes, SHA-256 `{document.sha256}`",
        f"- checked on {check.images} {kind}: logits within {check.difference:.1g} of the trained network,",
        f"  the same answer for {check.agreement:g} %",
    ]
    if latency is not None:
        own, file = latency.network, latency.file
        quartiles = f"quartiles {file.low:.2f} to {file.high:.2f}"
        rows.append(
            f"- one image on the CPU that wrote it: {file.median:.2f} ms ({quartiles}), in PyTorch {own.median:.2f} ms"
        )
    return "\n".join(rows) + "\n"
