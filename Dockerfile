# A server for one model, as a user without rights. The tests do not build this file.
#
#   docker build -t vitrail .
#   docker run --rm --read-only --tmpfs /tmp --stop-timeout 70 -p 127.0.0.1:8000:8000 -v "$PWD/runs/finetune/best:/model:ro" vitrail
#
# torch from the package index brings CUDA. For its smaller build for CPUs, name the index that has it:
# --build-arg PIP_EXTRA_INDEX_URL=...
FROM python:3.12-slim
ARG PIP_EXTRA_INDEX_URL=""
WORKDIR /vitrail
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY src src
RUN pip install --no-cache-dir -c constraints.txt '.[serve]' && useradd --system serve
USER serve
WORKDIR /tmp
EXPOSE 8000
HEALTHCHECK --start-period=60s CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/health', timeout=3)"]
# Inside, all addresses; who can ask is decided by -p. For a token: -v tokens:/tokens:ro vitrail model=/model --host 0.0.0.0 --tokens /tokens
ENTRYPOINT ["vitrail", "serve"]
CMD ["model=/model", "--host", "0.0.0.0"]
