# srcfast on NVIDIA GPUs: docs/installing.md. The whole CUDA toolkit, since flash-attn is built here and Triton compiles as it runs.
FROM nvidia/cuda:12.8.1-cudnn-devel-ubuntu24.04

ARG TORCH_VERSION=2.11.0
ARG TORCH_INDEX=https://download.pytorch.org/whl/cu128
# none: without FlashAttention, whose build takes long; PyTorch's kernel is used then.
ARG FLASH_ATTN=flash-attn>=2.8,<3

RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/srcfast
ENV PATH=/opt/srcfast/bin:$PATH PYTHONUNBUFFERED=1 PIP_NO_CACHE_DIR=1

RUN pip install "torch==${TORCH_VERSION}" --index-url "${TORCH_INDEX}" \
    && pip install 'setuptools>=77,<82' wheel packaging ninja psutil
RUN if [ "${FLASH_ATTN}" != none ]; then MAX_JOBS=4 pip install --no-build-isolation "${FLASH_ATTN}"; fi

COPY setup.py pyproject.toml MANIFEST.in README.md LICENSE /src/
COPY csrc /src/csrc
COPY kernels /src/kernels
COPY benchmarks /src/benchmarks
COPY srcfast /src/srcfast
RUN pip install --no-build-isolation '/src[gpu,report,data,smolvlm]'

RUN useradd --create-home --uid 10001 srcfast
USER srcfast
WORKDIR /work
ENTRYPOINT ["srcfast"]
CMD ["doctor"]
