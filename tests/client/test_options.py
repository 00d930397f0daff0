"""Options that cannot work are refused at once, by name."""

from __future__ import annotations

from pathlib import Path

import pytest
from tuwen_client import Client, InvalidInput, RetryPolicy, Tls
from tuwen_client.codec import bytes_tensor, infer_request, read_outputs


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"max_in_flight": 0}, "max_in_flight is 0"),
        ({"timeout_s": 0}, "timeout_s is 0"),
        ({"timeout_s": float("nan")}, "timeout_s is nan"),
        ({"priority": "high"}, "priority is 'high', expected 'interactive' or 'bulk'"),
        ({"compression": "zip"}, "compression is 'zip', expected 'gzip'"),
        ({"headers": {"two words": "x"}}, "header 'two words': expected"),
        ({"headers": {"authorization": "Bearer\n"}}, "header 'authorization': expected"),
        ({"token": "口令"}, "token: expected plain ASCII"),
    ],
)
def test_an_option_that_cannot_work_is_refused(options: dict[str, object], sentence: str) -> None:
    with pytest.raises(InvalidInput, match=sentence):
        Client(**options)  # type: ignore[arg-type]


def test_an_option_of_one_call_is_checked_before_anything_is_sent() -> None:
    with Client("localhost:1", model="tiny_rn") as client:
        with pytest.raises(InvalidInput, match="timeout_s is -1"):
            client.embed_text(["猫"], timeout_s=-1)
        with pytest.raises(InvalidInput, match="priority is 'urgent'"):
            client.iter_embed_text(["猫"], priority="urgent")  # type: ignore[arg-type]
        with pytest.raises(InvalidInput, match="either labels"):
            client.classify([b"x"])
        with pytest.raises(InvalidInput, match="images is empty"):
            client.score([], ["猫"])


def test_retry_and_tls_check_themselves(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="attempts is 0"):
        RetryPolicy(attempts=0)
    with pytest.raises(InvalidInput, match="first_delay_s is 3"):
        RetryPolicy(first_delay_s=3, max_delay_s=2)
    with pytest.raises(InvalidInput, match="go together"):
        Tls(cert_path=tmp_path / "cert.pem")
    with pytest.raises(InvalidInput, match=r"ca\.pem: No such file"):
        Client(tls=Tls(ca_path=tmp_path / "ca.pem"))


def test_a_message_carries_priority_and_deadline() -> None:
    tensor = bytes_tensor("text", ["猫".encode(), b""], (2, 1))
    message = infer_request("m", [tensor], ["text_embeds"], 1, 1.5)
    assert message.parameters["queue_priority"].int64_param == 1
    assert message.parameters["timeout"].int64_param == 1_500_000
    assert message.raw_input_contents[0] == b"\x03\0\0\0\xe7\x8c\xab\0\0\0\0"


def test_what_contradicts_itself_is_not_read() -> None:
    from tritonclient.grpc import service_pb2

    response = service_pb2.ModelInferResponse(
        outputs=[{"name": "text_embeds", "datatype": "FP32", "shape": [1, 4]}], raw_output_contents=[bytes(12)]
    )
    with pytest.raises(ValueError, match="cannot reshape"):
        read_outputs(response)
    response.raw_output_contents[0] = bytes(16)
    assert read_outputs(response)["text_embeds"].shape == (1, 4)
