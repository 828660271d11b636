# An image with the console scripts of effdet_nb.
#   docker build -t effdet_nb .                                     for CPUs
#   docker build -t effdet_nb:gpu --build-arg EXTRAS=gpu .          with the CUDA libraries that TensorFlow's wheels need
#   docker run --rm --user "$(id -u):$(id -g)" -v "$PWD:/work" effdet_nb effdet_train -e spec.txt -d trained
#   docker run --rm --gpus all --user "$(id -u):$(id -g)" -v "$PWD:/work" effdet_nb:gpu effdet_train -e spec.txt -d trained
# Paths in the spec are those inside the container: relative ones start in /work.
FROM python:3.11-slim

# Extras of settings.ini, separated by commas; the CUDA libraries come from pip, so the base image is the same.
ARG EXTRAS=""
COPY . /tmp/effdet_nb
RUN pip install --no-cache-dir "/tmp/effdet_nb${EXTRAS:+[${EXTRAS}]}" && rm -rf /tmp/effdet_nb

# The user of --user has no home folder; caches go where everybody may write.
ENV HOME=/tmp MPLCONFIGDIR=/tmp/matplotlib
WORKDIR /work
CMD ["effdet"]
