# The head node, and every node of a cluster without GPUs.  Build it from the repository's root:
#   docker build -f docker/cpu.Dockerfile -t rayrl:0.1.0-cpu .
FROM python:3.11.14-slim-bookworm

# g++: kernels compiled at run time; libnuma1: vLLM; openssh-client and rsync: Ray's launcher;
# wget: KubeRay's probes; openjdk: METEOR and SPICE, which take Java 8 to 17.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends \
        g++ libnuma1 openjdk-17-jre-headless openssh-client rsync wget \
    && rm -rf /var/lib/apt/lists/*

# Into the system's Python, because Ray starts its processes in login shells, which reset PATH.
# torch comes first and alone, from PyTorch's own builds for CPUs.
COPY requirements/cpu.txt docker/cloud.txt /tmp/requirements/
RUN pip install --no-cache-dir --disable-pip-version-check uv==0.13.9 \
    && uv pip install --system --no-cache --no-deps --torch-backend cpu \
        "$(grep '^torch==' /tmp/requirements/cpu.txt)" \
    && grep --invert-match '^torch==' /tmp/requirements/cpu.txt > /tmp/requirements/rest.txt \
    && uv pip install --system --no-cache --no-deps --requirement /tmp/requirements/rest.txt \
    && uv pip install --system --no-cache --no-deps --require-hashes \
        --requirement /tmp/requirements/cloud.txt

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
    PYTHONUNBUFFERED=1
USER ray
WORKDIR /home/ray
CMD ["python", "/opt/rayrl/jobs/grpo_coco.py"]
