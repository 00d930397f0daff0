"""How many requests should a client keep under way? Text throughput of the served sample at several windows.

    tuwen build --checkpoint samples/emoji_tiny && python -m perf.client_window

Runs the windows in turn, several rounds over, and prints the median items per second of each.
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path

from tuwen_client import Client

from tuwen.data.pairs import iter_images, iter_texts
from tuwen.serving.ports import free_ports
from tuwen.serving.server import EmbeddedServer

WINDOWS = (1, 4, 16, 32, 64, 128)
ROUNDS = 3
SAMPLES = Path("samples/emoji_cn")


def measure(url: str, texts: list[str], images: list[bytes]) -> dict[int, tuple[float, float]]:
    """Window -> median (texts per second, images per second)."""
    rates: dict[int, list[tuple[float, float]]] = {window: [] for window in WINDOWS}
    for _ in range(ROUNDS):
        for window in WINDOWS:
            with Client(url, max_in_flight=window) as client:
                client.embed_text(texts[:window])
                started = time.perf_counter()
                client.embed_text(texts)
                middle = time.perf_counter()
                client.embed_images(images)
                ended = time.perf_counter()
            rates[window].append((len(texts) / (middle - started), len(images) / (ended - middle)))
    return {
        window: (statistics.median(text for text, _ in found), statistics.median(image for _, image in found))
        for window, found in rates.items()
    }


def main() -> None:
    texts = [record.text for record in iter_texts(SAMPLES / "valid_texts.jsonl")][:1000]
    images = [record.encoded for record in iter_images(SAMPLES / "valid_imgs.tsv")][:500]
    grpc_port, http_port, metrics_port = free_ports(3)
    with EmbeddedServer(
        Path("model_repository"),
        grpc_port=grpc_port,
        http_port=http_port,
        metrics_port=metrics_port,
        cache_size_bytes=0,  # every window asks for the same texts
    ) as server:
        print("window  texts/s  images/s")
        for window, (text_rate, image_rate) in measure(server.endpoints.grpc, texts, images).items():
            print(f"{window:6d}  {text_rate:7.0f}  {image_rate:8.0f}")


if __name__ == "__main__":
    main()
