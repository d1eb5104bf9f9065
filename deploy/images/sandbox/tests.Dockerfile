# The sandbox image with what its tests need; built by scripts/test-in-image, and never shipped.
ARG SANDBOX=carrel-sandbox
FROM ${SANDBOX}
USER 0:0
COPY requirements/dev.lock /build/
RUN apt-get -qq update && apt-get -qq install --yes --no-install-recommends bubblewrap >/dev/null && rm -rf /var/lib/apt/lists/*
# What the image has stays as it is; only what is missing is added.
RUN pip install --quiet --no-cache-dir --no-deps --require-hashes -r /build/dev.lock
ENV PYTHONDONTWRITEBYTECODE=1 HYPOTHESIS_STORAGE_DIRECTORY=/tmp/hypothesis
USER 1000:1000
