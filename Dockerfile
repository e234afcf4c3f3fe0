# serve.py with a model folder mounted at /model; flags go behind the image's name (--name=sft).
# README: Deploy.
# train.py is in it too, for a cluster (deploy/kubernetes).
FROM python:3.12-slim
# Where pip looks too. With PyTorch's index of CPU wheels the image is gigabytes smaller; without it
# a GPU can be used (--gpus=all).
ARG PIP_EXTRA_INDEX_URL
ENV PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
RUN useradd --uid=10001 --no-create-home --shell=/usr/sbin/nologin barelm
WORKDIR /app
# What changes seldom comes first: a change of the scripts installs nothing anew.
COPY requirements.txt requirements-serve.txt ./
RUN pip install --no-cache-dir -r requirements.txt -r requirements-serve.txt
COPY config/ config/
COPY barelm/ barelm/
COPY model.py train.py serve.py ./
USER 10001
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s CMD ["python", "-c", \
    "from urllib.request import urlopen; urlopen('http://127.0.0.1:8000/health', timeout=4)"]
ENTRYPOINT ["python", "serve.py", "--model=/model", "--host=0.0.0.0"]
