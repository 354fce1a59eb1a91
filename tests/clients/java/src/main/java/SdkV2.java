import java.net.URI;
import software.amazon.awssdk.services.s3.S3Client;

/** Reads an object with the AWS SDK for Java v2 and its default credential chain. */
class SdkV2 {
    public static void main(String[] arguments) throws InterruptedException {
        Reads reads = Reads.of(arguments);
        S3Client client = S3Client.builder()
                .endpointOverride(URI.create(reads.endpoint()))
                .forcePathStyle(true)
                .build();
        reads.run(() -> client.getObjectAsBytes(get -> get.bucket(reads.bucket()).key(reads.key())).asUtf8String());
    }
}
