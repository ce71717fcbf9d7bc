"""The mark of a synthetic image: a PNG that says, to machines, that no one's cell is shown.

The mark is an XMP packet with IPTC's DigitalSourceType `trainedAlgorithmicMedia`, beside the model,
its weights' sha256, the seed and the class that was asked for. It is also read where such an image was
saved again as JPEG, WebP or TIFF with its XMP. Synthetic images may serve in training; as test data
they are refused, because a model that names them well has only met itself.

Source: IPTC, Digital Source Type vocabulary; Adobe, XMP Specification part 3, PNG.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable
from dataclasses import dataclass
from xml.sax.saxutils import escape, unescape

import numpy as np
from jaxtyping import UInt8
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from cytodiffusion.data.sample import Sample
from cytodiffusion.errors import DataError, UnreadableImage

KEYWORD = "XML:com.adobe.xmp"
SOURCE = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
SPACE = "urn:cytodiffusion:synthetic:1"
PACKET = """<?xpacket begin="" id="W5M0MpCehiHzreSzNTczkc9d"?>
<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">
<rdf:Description rdf:about="" xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/"
 xmlns:cyto="{space}" Iptc4xmpExt:DigitalSourceType="{source}"
 cyto:model="{model}" cyto:weights="{weights}" cyto:seed="{seed}" cyto:label="{label}"/>
</rdf:RDF></x:xmpmeta><?xpacket end="r"?>"""


@dataclass(frozen=True)
class Mark:
    """Where a synthetic image came from."""

    model: str
    weights: str  # sha256 of model.safetensors
    seed: int
    label: str  # the class that was asked for


def marked_png(pixels: UInt8[np.ndarray, "3 h w"], mark: Mark) -> bytes:
    """A PNG file with the mark inside."""
    words = {name: escape(str(value), {'"': "&quot;"}) for name, value in vars(mark).items()}
    info = PngInfo()
    info.add_itxt(KEYWORD, PACKET.format(space=SPACE, source=SOURCE, **words))
    buffer = io.BytesIO()
    image = Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0)))
    image.save(buffer, "PNG", pnginfo=info, optimize=True)
    return buffer.getvalue()


def read_mark(data: bytes) -> Mark | None:
    """The mark of an image file, or None for one without. Another program's mark has empty fields."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            xmp = image.info.get("xmp") or image.info.get(KEYWORD, "")
    except Exception:  # what is no image has no mark; a decoder of Pillow may raise anything
        return None
    packet = xmp.decode("utf-8", "replace") if isinstance(xmp, bytes) else str(xmp)
    if SOURCE not in packet:
        return None
    found = dict(re.findall(r'cyto:(\w+)="([^"]*)"', packet))
    values = {name: unescape(found.get(name, ""), {"&quot;": '"'}) for name in Mark.__annotations__}
    seed = values.pop("seed")
    return Mark(seed=int(seed) if seed.isdecimal() else 0, **values)


def marked(samples: Iterable[Sample]) -> list[str]:
    """Names of the images that say that they are synthetic."""
    return [sample.name for sample in samples if _is_marked(sample)]


def refuse_marked(samples: Iterable[Sample], use: str = "test data") -> None:
    """Raises DataError where images among the samples say that they are synthetic."""
    if names := marked(samples):
        raise DataError(
            f"{len(names)} of these images are marked as synthetic, first '{names[0]}', and cannot "
            f"serve as {use}. Leave them out; in training they may stay (split `train`)."
        )


def _is_marked(sample: Sample) -> bool:
    try:
        return read_mark(sample.read()) is not None
    except UnreadableImage:
        return False  # who reads it next will name it
