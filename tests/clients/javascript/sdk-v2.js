// Reads an object with the AWS SDK for JavaScript v2 and its default credential chain.
import AWS from "aws-sdk";
import { bucket, endpoint, key, run } from "./reads.js";

const client = new AWS.S3({ endpoint, s3ForcePathStyle: true });

await run(async () => {
  const object = await client.getObject({ Bucket: bucket, Key: key }).promise();
  return object.Body.toString();
});
