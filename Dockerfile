# The server as an image:   docker build -t pagoda .
# For NVIDIA GPUs:          docker build -t pagoda:cuda --build-arg VARIANT=cuda .
# Run:                      docker run -p 127.0.0.1:8000:8000 -v ./qwen3-0.6b:/models/qwen3:ro pagoda /models/qwen3
ARG PYTHON=3.12

FROM python:${PYTHON}-slim AS build
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY pyproject.toml CMakeLists.txt README.md LICENSE ./
COPY native native
COPY src src
ARG VARIANT=cpu
RUN python -m venv /opt/pagoda \
  && if [ "$VARIANT" = cuda ]; then extra='[cuda]'; else extra='[vision]'; fi \
  && /opt/pagoda/bin/pip install --no-cache-dir ".$extra" \
  && /opt/pagoda/bin/pip uninstall -y pip

FROM python:${PYTHON}-slim
# Triton compiles its kernels at run time: only the cuda variant holds a compiler.
ARG VARIANT=cpu
RUN if [ "$VARIANT" = cuda ]; then \
      apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*; \
    fi \
  && useradd --uid 1000 --create-home pagoda && install -d -o pagoda -g pagoda /cache
COPY --from=build /opt/pagoda /opt/pagoda
USER pagoda
ENV PATH=/opt/pagoda/bin:$PATH PYTHONUNBUFFERED=1 PAGODA_HOST=0.0.0.0 \
    HF_HOME=/cache/huggingface PAGODA_CACHE=/cache/pagoda TRITON_CACHE_DIR=/cache/triton
VOLUME /cache
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=30m \
  CMD ["python", "-c", "import urllib.request as r; r.build_opener(r.ProxyHandler({})).open('http://127.0.0.1:8000/health', timeout=4)"]
ENTRYPOINT ["pagoda", "serve"]
