# GPU nodes.  The host brings the NVIDIA driver (580 or newer, for CUDA 13) and the NVIDIA container
# toolkit, or what GKE has in its place; CUDA itself comes with the Python packages.  Build it from
# the repository's root:
#   docker build -f docker/gpu.Dockerfile -t rayrl:0.1.0-gpu .
FROM python:3.11.14-slim-bookworm

# g++: kernels compiled at run time; libnuma1: vLLM; openssh-client and rsync: Ray's launcher;
# wget: KubeRay's probes; openjdk: METEOR and SPICE, which take Java 8 to 17.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends \
        g++ libnuma1 openjdk-17-jre-headless openssh-client rsync wget \
    && rm -rf /var/lib/apt/lists/*

# Into the system's Python, because Ray starts its processes in login shells, which reset PATH.
COPY docker/gpu.txt /tmp/requirements/
RUN pip install --no-cache-dir --disable-pip-version-check --no-deps --require-hashes \
        --requirement /tmp/requirements/gpu.txt

COPY pyproject.toml README.md /opt/rayrl/
COPY rayrl /opt/rayrl/rayrl
COPY jobs /opt/rayrl/jobs
RUN pip install --no-cache-dir --disable-pip-version-check --no-deps --no-build-isolation \
        /opt/rayrl \
    && useradd --create-home --uid 1000 --shell /bin/bash ray

# HOME must be in the image: Ray's launcher reads it there to place files.  A job that is stopped
# has 15 minutes to finish its step and save it, and not three seconds.
ENV HOME=/home/ray \
    RAY_JOB_STOP_WAIT_TIME_S=900 \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    PYTHONUNBUFFERED=1

# GKE has no container toolkit: it mounts the driver here and leaves finding it to the image.
# Elsewhere there are no such folders.
ENV PATH=/usr/local/nvidia/bin:$PATH \
    LD_LIBRARY_PATH=/usr/local/nvidia/lib64
USER ray
WORKDIR /home/ray
CMD ["python", "/opt/rayrl/jobs/grpo_coco.py"]
