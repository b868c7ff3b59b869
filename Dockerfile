# syntax=docker/dockerfile:1.7
# The image that helm/diptych names. Two targets:
#     docker build --target cpu  -t diptych:0.1.0-cpu  .                          # add --build-arg EXTRAS=demo for the demo model
#     docker build --target cuda -t diptych:0.1.0-cuda .
# Every version is that of constraints.txt. CUDA's libraries come with torch; the driver is the host's, by NVIDIA's container runtime.

ARG PYTHON_IMAGE=python:3.11.14-slim-bookworm

FROM ${PYTHON_IMAGE} AS build
ARG PIP_VERSION=26.3
ARG SETUPTOOLS_VERSION=84.2.1
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PYTHONSAFEPATH=1
RUN python -m venv /opt/diptych
ENV PATH=/opt/diptych/bin:$PATH
WORKDIR /src
COPY constraints.txt pyproject.toml ./
RUN python -m pip install -q -c constraints.txt "pip==${PIP_VERSION}" "setuptools==${SETUPTOOLS_VERSION}"

# The dependencies first, so that a change of the code builds only what stands below.
FROM build AS build-cpu
ARG EXTRAS=""
RUN python -c 'import sys, tomllib; project = tomllib.load(open("pyproject.toml", "rb"))["project"]; extras = [name for name in sys.argv[1].split(",") if name]; print(*project["dependencies"], *(line for name in extras for line in project["optional-dependencies"][name]), sep="\n")' "${EXTRAS}" > requirements.txt \
    && python -m pip install -q --extra-index-url https://download.pytorch.org/whl/cpu -c constraints.txt -r requirements.txt
COPY . .
RUN python -m pip install -q --no-deps --no-build-isolation .

FROM build AS build-cuda
ARG EXTRAS="gpu"
RUN python -c 'import sys, tomllib; project = tomllib.load(open("pyproject.toml", "rb"))["project"]; extras = [name for name in sys.argv[1].split(",") if name]; print(*project["dependencies"], *(line for name in extras for line in project["optional-dependencies"][name]), sep="\n")' "${EXTRAS}" > requirements.txt \
    && python -m pip install -q -c constraints.txt -r requirements.txt
COPY . .
RUN python -m pip install -q --no-deps --no-build-isolation .

FROM ${PYTHON_IMAGE} AS runtime
# A compiler: bf16 on CPUs is C++, compiled for the processor at the first start (docs/performance.md), and Triton compiles with one.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/* \
    && groupadd --gid 10001 diptych \
    && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /var/lib/diptych --shell /usr/sbin/nologin diptych \
    && install -d -o diptych -g diptych /var/lib/diptych
ENV PATH=/opt/diptych/bin:$PATH \
    PYTHONSAFEPATH=1 \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    DIPTYCH_HOME=/var/lib/diptych \
    HF_HOME=/var/lib/diptych/huggingface \
    RAY_USAGE_STATS_ENABLED=0
WORKDIR /var/lib/diptych
EXPOSE 8000 50051
ENTRYPOINT ["diptych"]
CMD ["--help"]

FROM runtime AS cpu
COPY --from=build-cpu /opt/diptych /opt/diptych
USER 10001:10001

FROM runtime AS cuda
# Where GKE puts the driver's libraries and nvidia-smi; elsewhere the container toolkit puts them where they are found anyway.
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    PATH=/opt/diptych/bin:/usr/local/nvidia/bin:$PATH LD_LIBRARY_PATH=/usr/local/nvidia/lib64
COPY --from=build-cuda /opt/diptych /opt/diptych
USER 10001:10001
