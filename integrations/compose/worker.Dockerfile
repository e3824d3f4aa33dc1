# A worker on a CPU. For a GPU take a CUDA image with Python 3.11 or newer as the base.
ARG BASE=python:3.12-slim
FROM ${BASE}
# What to install: a released version, or a wheel of your own put beside this file, as
#   docker compose build --build-arg NLA_MONITOR="/build/nla_monitor-0.1.0-py3-none-any.whl[prometheus,otlp,postgres,notify]"
ARG NLA_MONITOR="nla-monitor[prometheus,otlp,postgres,notify]"
COPY worker.constraints.txt *.whl /build/
RUN pip install --no-cache-dir --constraint /build/worker.constraints.txt "${NLA_MONITOR}" \
  && useradd --create-home nla
USER nla
WORKDIR /home/nla
EXPOSE 9464
CMD ["nla-monitor", "worker", "--metrics-port", "9464"]
