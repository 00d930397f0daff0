"""A text asked for again is answered without computing it, with the same bits, and by its own model."""

from __future__ import annotations

import numpy as np
import pytest
import tritonclient.grpc as triton
from tuwen_client import Client, InvalidInput

from tests.system.test_scores import ask, one_pixel
from tuwen.serving.server import EmbeddedServer

pytestmark = pytest.mark.triton


def executions(server: EmbeddedServer) -> dict[str, tuple[int, int]]:
    """Model -> (times it computed, answers out of the cache)."""
    with triton.InferenceServerClient(server.endpoints.grpc) as raw:
        found = raw.get_inference_statistics().model_stats
    return {entry.name: (entry.execution_count, entry.inference_stats.cache_hit.count) for entry in found}


def test_a_repeated_query_is_only_tokenised(client: Client, sample_server: EmbeddedServer) -> None:
    texts = [f"第{number}次问的红苹果" for number in range(20)]
    first = client.embed_text(texts)
    before = executions(sample_server)
    assert np.array_equal(client.embed_text(texts), first)
    after = executions(sample_server)
    assert after["tiny_rn_text_tower"][0] == before["tiny_rn_text_tower"][0]
    assert after["tiny_rn_text_cached"][1] - before["tiny_rn_text_cached"][1] == 20


def test_the_prompts_of_zero_shot_come_out_of_the_cache(sample_server: EmbeddedServer) -> None:
    with triton.InferenceServerClient(sample_server.endpoints.grpc) as raw:
        labels, templates = ["红苹果", "青苹果"], ["{}", "一个{}"]
        first = ask(raw, "tiny_rn_zero_shot", images=[one_pixel()], labels=labels, templates=templates)
        before = executions(sample_server)
        second = ask(raw, "tiny_rn_zero_shot", images=[one_pixel()], labels=labels, templates=templates)
        after = executions(sample_server)
    assert np.array_equal(first.as_numpy("probs"), second.as_numpy("probs"))
    assert after["tiny_rn_text_tower"][0] == before["tiny_rn_text_tower"][0]
    assert after["tiny_rn_text_cached"][1] - before["tiny_rn_text_cached"][1] >= 4


def test_who_asks_for_little_leaves_all_for_the_next(sample_server: EmbeddedServer) -> None:
    with triton.InferenceServerClient(sample_server.endpoints.grpc) as raw:
        text = triton.InferInput("text", [1, 1], "BYTES")
        text.set_data_from_numpy(np.array([["只要一半".encode()]], np.object_))
        raw.infer("tiny_rn_text", [text], outputs=[triton.InferRequestedOutput("logit_scale")])
        answer = raw.infer("tiny_rn_text", [text])
    assert answer.as_numpy("text_embeds").shape == (1, 128)
    assert answer.as_numpy("fingerprint") is not None


def test_a_refusal_is_not_kept(client: Client) -> None:

    for _ in range(2):
        with pytest.raises(InvalidInput, match="text is empty"):
            client.embed_text([" "])
