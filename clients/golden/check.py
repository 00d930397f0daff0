"""Golden vectors against a running server, with plain tritonclient over gRPC.

pip install 'tritonclient[grpc]'
python clients/golden/check.py localhost:8001 clients/golden/golden.json
"""

import base64
import json
import sys
from pathlib import Path

import numpy as np
import tritonclient.grpc as triton


def infer(server, model, name, array, datatype):
    tensor = triton.InferInput(name, list(array.shape), datatype)
    tensor.set_data_from_numpy(array)
    return server.infer(model, [tensor])


def main(url, golden_path):
    golden = json.loads(Path(golden_path).read_text())
    model, least = golden["model"]["name"], golden["tolerance"]["min_cosine"]
    wrong = []
    server = triton.InferenceServerClient(url)
    for number, entry in enumerate(golden["texts"]):
        text = np.array([[entry["text"].encode()]], dtype=object)
        ids = infer(server, "tokenize_text", "text", text, "BYTES").as_numpy("input_ids")[0]
        if ids.tolist() != entry["input_ids"]:
            wrong.append(f"input_ids of text {number}")
        answer = infer(server, f"{model}_text", "text", text, "BYTES")
        if answer.as_numpy("text_embeds")[0] @ np.array(entry["text_embeds"]) < least:
            wrong.append(f"text_embeds of text {number}")
    for entry in golden["pictures"]:
        file = np.frombuffer(base64.b64decode(entry["file"]), np.uint8)[None]
        answer = infer(server, f"{model}_image", "image", file, "UINT8")
        if answer.as_numpy("image_embeds")[0] @ np.array(entry["image_embeds"]) < least:
            wrong.append(f"image_embeds of {entry['name']}")
        if str(answer.as_numpy("fingerprint")[0, 0]) != golden["model"]["fingerprint"]:
            wrong.append("fingerprint: another model is served")
    print(*wrong, f"{len(golden['texts'])} texts, {len(golden['pictures'])} pictures, {len(wrong)} wrong", sep="\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2]))
