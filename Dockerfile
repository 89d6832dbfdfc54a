# What requirements.lock lists, for CPUs and NVIDIA GPUs alike: torch's wheels bring CUDA, the machine brings its driver.
#
#     docker build --tag clip_robustness .
#     docker run --rm clip_robustness snakemake --configfile config/published.yaml
#
# With a checkout mounted over /project, its code runs and its folders are written to:
#
#     docker run --rm --gpus all --user "$(id -u):$(id -g)" --volume "$PWD:/project" clip_robustness snakemake
FROM python:3.11.14-slim-bookworm

# Snakemake asks git which files it must send to jobs elsewhere; its file-system storage copies with rsync.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends git rsync \
    && rm -rf /var/lib/apt/lists/*

COPY requirements.lock /opt/clip_robustness/
RUN pip install --no-cache-dir --no-deps --requirement /opt/clip_robustness/requirements.lock \
    && pip check

# Snakemake installs its storage plugin anew in every pod: from here, at the locked versions, without a network.
RUN pip download --no-cache-dir --dest /opt/clip_robustness/wheels \
    --constraint /opt/clip_robustness/requirements.lock snakemake-storage-plugin-fs
ENV PIP_NO_INDEX=1 PIP_FIND_LINKS=/opt/clip_robustness/wheels

RUN useradd --create-home --uid 1000 clip \
    && install --directory --owner clip --group clip /project /workdir
WORKDIR /project
COPY --chown=clip:clip . .

# Caches go to a folder that any --user may write to; nvidia-smi names the GPUs that jobs lease.
ENV HOME=/tmp PYTHONPATH=/project/src NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER clip
CMD ["python", "-m", "clip_robustness", "--help"]
