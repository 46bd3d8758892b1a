"""What the Hugging Face hub and timm read of a network's folder: the block above a README, and timm's config.json."""

import importlib
from typing import TYPE_CHECKING, Any

from sakd_cli.config.networks import brought
from sakd_cli.config.preprocessing import height_width
from sakd_cli.files import yaml_bytes
from sakd_cli.models.external import HUB, library_call

if TYPE_CHECKING:
    from sakd_cli.models.artifact import NetworkCard


def metadata_block(card: "NetworkCard", facts: dict[str, Any], library: str, *tags: str) -> str:
    """The YAML block at the top of a README, as the hub's model cards have it.

    facts  top1 in percent, where it is known, and the number of test images
    """
    block: dict[str, Any] = {"library_name": library, "pipeline_tag": "image-classification"}
    block["tags"] = ["image-classification", "knowledge-distillation", "sakd", *tags]
    if (top1 := facts.get("top1")) is not None:
        dataset = {"name": card.dataset, "type": card.dataset, "split": "test"}
        metric = {"type": "accuracy", "name": "Top-1 (%)", "value": round(float(top1), 2)}
        result = {"task": {"type": "image-classification"}, "dataset": dataset, "metrics": [metric]}
        block |= {"metrics": ["accuracy"], "model-index": [{"name": card.architecture, "results": [result]}]}
    return f"---\n{yaml_bytes(block).decode()}---\n\n"


def timm_config(card: "NetworkCard") -> dict[str, Any]:
    """Entries of config.json by which `timm.create_model("local-dir:FOLDER")` builds the network; none of others."""
    network = brought(card.architecture)
    call = library_call(card.architecture, len(card.classes), card.side)
    if network is None or call is None or network.family != "timm":
        return {}
    name = str(network.arguments["entry"])
    if name.startswith(HUB):
        name = importlib.import_module("timm.models").load_model_config_from_hf(name.removeprefix(HUB))[1]
    height, width = height_width(card.side)
    shown = {
        "num_classes": len(card.classes),
        "input_size": [3, height, width],
        "mean": card.mean,
        "std": card.std,
        "interpolation": card.seen.interpolation,
        "crop_pct": min(height, width) / card.seen.resize,
        "crop_mode": "squash" if card.seen.resize_mode == "squash" else "center",
    }
    arguments = {key: value for key, value in call.arguments.items() if key not in ("pretrained", "num_classes")}
    about = {"architecture": name, "num_classes": len(card.classes), "label_names": card.classes}
    return about | {"pretrained_cfg": shown} | ({"model_args": arguments} if arguments else {})
