# A worker on a CPU. For a GPU take a CUDA image with Python 3.11 or newer as the base.
ARG BASE=python:3.12-slim
FROM ${BASE}
# What to install: a released version, or the address of a wheel of your own.
ARG NLA_MONITOR="nla-monitor[prometheus,otlp,postgres,notify]"
RUN pip install --no-cache-dir "${NLA_MONITOR}" && useradd --create-home nla
USER nla
WORKDIR /home/nla
EXPOSE 9464
CMD ["nla-monitor", "worker", "--metrics-port", "9464"]
