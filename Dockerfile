# Builds the wheel, and installs it for one platform. EXTRA is of pyproject.toml: tpu, cuda, or empty for a CPU.
#
#     docker build --build-arg EXTRA=tpu -t llama4-jax .
#     docker run llama4-jax train tiny --steps 20

FROM python:3.12-slim AS build
WORKDIR /source
COPY . .
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM python:3.12-slim
ARG EXTRA=""
COPY --from=build /wheels /wheels
# gcsfs: for gs:// paths
RUN wheel=$(ls /wheels/llama4_jax-*.whl) && pip install --no-cache-dir "${wheel}${EXTRA:+[$EXTRA]}" gcsfs && rm -r /wheels
WORKDIR /work
ENTRYPOINT ["llama4"]
