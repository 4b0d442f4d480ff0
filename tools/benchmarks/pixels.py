"""The cost of pixel sequences: sampling with and without a KV cache, training by image size, quantizing.

    python tools/benchmarks/pixels.py sampling      16 images of 32 x 32
    python tools/benchmarks/pixels.py training      one image of 8 x 8 to 64 x 64, forward and backward
    python tools/benchmarks/pixels.py quantizing    palette indices beside a training step

Without the cache, each pixel needs a pass over all pixels before it. This is timed at every 64th position and
extrapolated to all, since timing every position would take hours; with the cache, all of sampling is timed. Nothing
else should run meanwhile.
"""

from __future__ import annotations

import argparse
import time

import torch

from sslvit.models.igpt import IGPTModel
from sslvit.models.sampling import complete
from sslvit.settings import IGPTSettings
from sslvit.settings.load import load_recipe
from sslvit.settings.sample import SampleSettings

EVERY = 64


def make(side: int, width: int, depth: int) -> IGPTModel:
    changes = {"image_size": side, "width": width, "depth": depth, "heads": width // 32}
    encoder = load_recipe("igpt/small_cifar10", {f"encoder.{key}": value for key, value in changes.items()}).encoder
    torch.manual_seed(0)
    model = IGPTModel(IGPTSettings(), encoder)
    torch.nn.init.normal_(model.head.weight, std=0.02)
    return model


def seconds_of(function, least: float = 1.0) -> float:
    """Seconds per call, after one call to warm up."""
    function()
    start, calls = time.perf_counter(), 0
    while time.perf_counter() - start < least or calls < 2:
        function()
        calls += 1
    return (time.perf_counter() - start) / calls


@torch.no_grad()
def sampling(width: int, depth: int, images: int = 16, side: int = 32) -> None:
    model = make(side, width, depth).eval()
    encoder = model.encoder
    nothing = torch.zeros(images, 0, dtype=torch.long)
    start = time.perf_counter()
    drawn = complete(encoder, model.head, nothing, SampleSettings(batch=images))
    kept = time.perf_counter() - start

    def read_again(place: int) -> None:  # the prefix alone, not the whole image
        model.head(encoder.decode(drawn[:, :place], encoder.init_kv_cache(images))[:, -1])

    places = range(EVERY // 2, side * side, EVERY)
    again = EVERY * sum(seconds_of(lambda place=place: read_again(place), least=0) for place in places)
    print(f"{images} images of {side} x {side}, width {width}, {depth} blocks, {torch.get_num_threads()} threads")
    print(f"keys and values kept: {kept:8.1f} s")
    print(f"every prefix again:   {again:8.1f} s (from every {EVERY}th place)")
    print(f"                      {again / kept:8.1f} times as long")


def training_step(model: IGPTModel, images: int, side: int):
    pixels = torch.randn(images, 3, side, side)
    return lambda: model.loss(pixels).loss.backward(), pixels


def training(width: int, depth: int) -> None:
    print(f"width {width}, {depth} blocks, {torch.get_num_threads()} threads; forward and backward")
    print("side  pixels  s/image  us/pixel")
    for side in (8, 16, 24, 32, 48, 64):
        images = max(1, 1024 // side**2)
        step, _ = training_step(make(side, width, depth), images, side)
        seconds = seconds_of(step) / images
        print(f"{side:4d}  {side**2:6d}  {seconds:7.3f}  {seconds / side**2 * 1e6:8.1f}", flush=True)


def quantizing(width: int, depth: int, images: int = 8) -> None:
    model = make(32, width, depth)
    step, pixels = training_step(model, images, 32)
    whole, part = seconds_of(step), seconds_of(lambda: model.encoder.patch_embed.quantize(pixels))
    print(
        f"{images} images of 32 x 32, 512 colors: quantized in {part * 1e3:.1f} ms; a training step of width {width}, "
        f"{depth} blocks: {whole * 1e3:.0f} ms. A step quantizes twice: {2 * part / whole:.1%} of it"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["sampling", "training", "quantizing"])
    parser.add_argument("--width", type=int, default=96)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    {"sampling": sampling, "training": training, "quantizing": quantizing}[options.what](options.width, options.depth)


if __name__ == "__main__":
    main()
