"""Plain Python that opens a picture file as a network is to see it: Pillow and numpy, nothing of sakd."""

from sakd_cli.config.preprocessing import Preprocessing, height_width

# Beside grey of more than 8 bits, which needs to know what white is.
OPENING = """\
picture = {opened}.convert("RGBA")
rgb = Image.new("RGB", picture.size, {background})
rgb.paste(picture, mask=picture.getchannel("A"))  # what is transparent shows this colour
{resized}{cut}
pixels = {array}[None] / 255"""
IMPORTS = "import numpy as np\nfrom PIL import Image{more}"


def imports(seen: Preprocessing) -> str:
    """What the lines need."""
    more = ", ImageOps" if seen.orientation else ""
    torchvision = "" if _with_pillow(seen) else "\nfrom torchvision.transforms.v2 import functional"
    return IMPORTS.format(more=more) + torchvision


def lines(seen: Preprocessing, file: str = "photo.jpg") -> str:
    """Lines after which `pixels` are the picture, [1, 3, H, W] between 0 and 1."""
    opened = f'Image.open("{file}")'
    if seen.orientation:
        opened = f"ImageOps.exif_transpose({opened})"
    height, width = height_width(seen.size)
    if not _with_pillow(seen):
        cut = f"rgb = functional.center_crop(rgb, [{height}, {width}])"
    else:
        cut = f"left, top = round((rgb.width - {width}) / 2), round((rgb.height - {height}) / 2)\n"
        cut += f"rgb = rgb.crop((left, top, left + {width}, top + {height}))"
    array = "np.asarray(rgb, dtype=np.float32).transpose(2, 0, 1)"
    if not seen.antialias:
        array = "rgb.numpy().astype(np.float32)"
    return OPENING.format(opened=opened, background=seen.background, resized=_resized(seen), cut=cut, array=array)


def _with_pillow(seen: Preprocessing) -> bool:
    """Whether Pillow does the same: it has no resizing without a low-pass, and cuts small pictures otherwise."""
    return seen.antialias and seen.resize_mode != "none"


def _resized(seen: Preprocessing) -> str:
    """The line that resizes; empty where nothing does."""
    if seen.resize_mode == "none":
        return "" if seen.antialias else "rgb = functional.pil_to_tensor(rgb)\n"
    height, width = (round(side * seen.resize / min(own)) for own in [height_width(seen.size)] for side in own)
    if seen.resize_mode == "squash":
        size = f"({width}, {height})"
    elif height == width:
        size = f"[{height} * side // min(rgb.size) for side in rgb.size]"
    else:  # as small as covers the box
        size = f"(max({width}, {height} * rgb.width // rgb.height), max({height}, {width} * rgb.height // rgb.width))"
    if _with_pillow(seen):
        return f"rgb = rgb.resize({size}, Image.Resampling.{seen.interpolation.upper()})\n"
    scaled = f"wide, high = {size}\nrgb = functional.pil_to_tensor(rgb)\n"
    mode = f"functional.InterpolationMode.{seen.interpolation.upper()}"
    return scaled + f"rgb = functional.resize(rgb, [high, wide], {mode}, antialias=False)\n"
