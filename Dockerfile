# CPU image: docker build -t cytodiffusion . && docker run --rm -v "$PWD:/data" cytodiffusion predict /data/cells -o /data/out
FROM python:3.11-slim
WORKDIR /app
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY src src
RUN pip install --no-cache-dir --extra-index-url https://download.pytorch.org/whl/cpu -c constraints.txt torch \
 && grep -v '^torch==' constraints.txt > /tmp/constraints.txt \
 && pip install --no-cache-dir -c /tmp/constraints.txt .
RUN useradd --create-home lab
USER lab
ENTRYPOINT ["cytodiffusion"]
CMD ["--help"]
