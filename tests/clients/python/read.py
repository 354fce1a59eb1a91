"""Reads an object over and over with one client of a library: LIBRARY ENDPOINT BUCKET KEY TIMES PAUSE.

Each function makes the client, with its default credentials, and gives a function that reads once. What another S3 than
AWS's needs (its URL, path style) is all that is set.
"""

import sys
import time
from urllib.parse import urlsplit


def boto3(endpoint, bucket, key):
    import boto3
    from botocore.config import Config

    s3 = boto3.client("s3", endpoint_url=endpoint, config=Config(s3={"addressing_style": "path"}))
    return lambda: s3.get_object(Bucket=bucket, Key=key)["Body"].read()


def s3fs(endpoint, bucket, key):
    import s3fs

    s3 = s3fs.S3FileSystem(endpoint_url=endpoint)
    return lambda: s3.cat_file(f"{bucket}/{key}")


def polars(endpoint, bucket, key):
    import polars

    # It keeps the store, with its credentials, for the next scan with the same options.
    options = {"aws_endpoint_url": endpoint, "aws_allow_http": "true"}
    scan = lambda: polars.scan_csv(f"s3://{bucket}/{key}", has_header=False, storage_options=options)
    return lambda: scan().collect().item().encode()


def pyarrow(endpoint, bucket, key):
    from pyarrow import fs

    url = urlsplit(endpoint)
    s3 = fs.S3FileSystem(endpoint_override=url.netloc, scheme=url.scheme)

    def read():
        with s3.open_input_stream(f"{bucket}/{key}") as stream:
            return stream.read()

    return read


def awscrt(endpoint, bucket, key):
    import os
    from awscrt import auth, http, io, s3

    bootstrap = io.ClientBootstrap.get_or_create_static_default()
    region, provider = os.environ["AWS_REGION"], auth.AwsCredentialsProvider.new_default_chain(bootstrap)
    signing = s3.create_default_s3_signing_config(region=region, credential_provider=provider)
    client = s3.S3Client(
        bootstrap=bootstrap, region=region, signing_config=signing, tls_mode=s3.S3RequestTlsMode.DISABLED
    )
    host = urlsplit(endpoint).netloc

    def read():
        body = bytearray()
        request = http.HttpRequest("GET", f"/{bucket}/{key}", http.HttpHeaders([("Host", host)]))
        answer = client.make_request(
            type=s3.S3RequestType.GET_OBJECT, request=request, on_body=lambda chunk, **_: body.extend(chunk)
        )
        try:
            answer.finished_future.result()
        except s3.S3ResponseError as error:
            # Its text has no part of S3's response.
            raise RuntimeError(f"{error}: {error.status_code} {error.body}") from error
        return bytes(body)

    return read


def main(library, endpoint, bucket, key, times, pause):
    read, succeeded = globals()[library](endpoint, bucket, key), False
    for i in range(int(times)):
        time.sleep(float(pause) if i else 0)
        try:
            print("read", read().decode().strip(), flush=True)
            succeeded = True
        except Exception as error:
            print("failed", " ".join(f"{type(error).__name__}: {error}".split()), flush=True)
            succeeded = False
    return 0 if succeeded else 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
