#!/usr/bin/env bash
# One text or one picture to Triton's HTTP endpoint with curl; prints the answer's JSON.
#   embed.sh http://localhost:8000 tiny_rn text 戴墨镜的笑脸
#   embed.sh http://localhost:8000 tiny_rn image picture.jpg
set -euo pipefail
url=$1 model=$2 kind=$3 item=$4

case $kind in
text)
  # A text goes as JSON; only quotes, backslashes and control characters would have to be escaped.
  curl --fail-with-body -s "$url/v2/models/${model}_text/infer" --json \
    '{"inputs": [{"name": "text", "datatype": "BYTES", "shape": [1, 1], "data": ["'"$item"'"]}]}'
  ;;
image)
  # A picture goes as it is, behind a JSON header whose length in bytes stands in an HTTP header.
  size=$(wc -c <"$item")
  json='{"inputs": [{"name": "image", "datatype": "UINT8", "shape": [1, '$size'], "parameters": {"binary_data_size": '$size'}}]}'
  { printf %s "$json"; cat "$item"; } |
    curl --fail-with-body -s "$url/v2/models/${model}_image/infer" -H "Inference-Header-Content-Length: ${#json}" \
      -H "Content-Type: application/octet-stream" --data-binary @-
  ;;
*)
  echo "kind is $kind, expected text or image" >&2
  exit 2
  ;;
esac
echo
