# Checkpoint -> model repository: `tuwen build` as a container that ends. Context: the checkout.
#   docker build --target cpu -f docker/Dockerfile.builder .
#   docker build --target gpu --build-arg TRITON_RELEASE=25.xx -f docker/Dockerfile.builder .
# Of the stage `gpu` alone, but an engine reads every FROM: "none" keeps the other one's a name.
ARG TRITON_RELEASE=none

FROM python:3.11.14-slim-bookworm AS cpu
ENV PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 HOME=/home/tuwen
COPY docker/requirements/builder.txt /opt/tuwen/requirements.txt
RUN pip install --no-cache-dir --extra-index-url https://download.pytorch.org/whl/cpu -r /opt/tuwen/requirements.txt \
 # A new volume takes its owner from the folder that it covers.
 && install -d -o 1000 -g 1000 /models /home/tuwen /home/tuwen/.cache
COPY docker/tuwen /usr/local/bin/tuwen
COPY tuwen /opt/tuwen/tuwen
COPY builders /opt/tuwen/builders
COPY clients/python/tuwen_client /opt/tuwen/tuwen_client
COPY model_repository /opt/tuwen/model_repository
COPY samples/emoji_cn /opt/tuwen/samples/emoji_cn
ENV PYTHONPATH=/opt/tuwen
USER 1000:1000
WORKDIR /opt/tuwen
CMD ["tuwen", "build", "--help"]

# The very image that serves: its libnvinfer makes the plans that it will load, and its DALI the pipelines. The Python
# bindings of TensorRT, the only thing missing, must be of the same version: the image is not built otherwise.
FROM nvcr.io/nvidia/tritonserver:${TRITON_RELEASE}-py3 AS gpu
ENV PIP_BREAK_SYSTEM_PACKAGES=1 PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 HOME=/home/tuwen
COPY docker/requirements/builder.txt docker/requirements/builder-gpu.txt /opt/tuwen/
RUN pip install --no-cache-dir --extra-index-url https://download.pytorch.org/whl/cpu -r /opt/tuwen/builder.txt \
 && pip install --no-cache-dir --no-deps -r /opt/tuwen/builder-gpu.txt
COPY docker/tensorrt /opt/tuwen/tensorrt
COPY docker/check_gpu_builder.py /opt/tuwen/check_gpu_builder.py
RUN PYTHONPATH="/opt/tuwen:${PYTHONPATH}" python3 /opt/tuwen/check_gpu_builder.py \
 && install -d -o 1000 -g 1000 /models /home/tuwen /home/tuwen/.cache
COPY docker/tuwen /usr/local/bin/tuwen
COPY tuwen /opt/tuwen/tuwen
COPY builders /opt/tuwen/builders
COPY clients/python/tuwen_client /opt/tuwen/tuwen_client
COPY model_repository /opt/tuwen/model_repository
COPY samples/emoji_cn /opt/tuwen/samples/emoji_cn
ENV PYTHONPATH=/opt/tuwen:${PYTHONPATH}
USER 1000:1000
WORKDIR /opt/tuwen
CMD ["tuwen", "build", "--help"]
