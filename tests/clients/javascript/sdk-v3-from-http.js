// Reads an object with the AWS SDK for JavaScript v3 and its provider for the container endpoint
// alone.
import { GetObjectCommand, S3Client } from "@aws-sdk/client-s3";
import { fromHttp } from "@aws-sdk/credential-providers";
import { bucket, endpoint, key, run } from "./reads.js";

const client = new S3Client({ endpoint, forcePathStyle: true, credentials: fromHttp() });

await run(async () => {
  const object = await client.send(new GetObjectCommand({ Bucket: bucket, Key: key }));
  return object.Body.transformToString();
});
